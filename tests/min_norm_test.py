"""The Gramian, and min-norm weights against exact float64 references."""

import functools
import itertools
import time

import chex
import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import mopt
from mopt import pairs
from mopt import quadratic_program

solve = jax.jit(mopt.min_norm_weights)
solve_all = jax.jit(jax.vmap(mopt.min_norm_weights))
residual = jax.jit(mopt.kkt_residual)

TINY = float(np.finfo(np.float32).tiny)
COUNT = 40  # Gramians in a batch, always: one compilation for each m

properties = hypothesis.settings(
  max_examples=100, deadline=None, database=None, derandomize=True
)


# -- References, in float64 ---------------------------------------------------


def exact_minimum(gramian):
  """The optimum of (15) and its weights, by enumeration of all supports.

  Each support gives a linear system: equal slopes, weights that sum to 1. The
  gradients are scaled to unit length first, which keeps it well conditioned.
  """
  gramian = np.asarray(gramian, np.float64)
  m = len(gramian)
  lengths = np.sqrt(np.diag(gramian))
  if not lengths.all():
    return 0.0, np.eye(m)[np.argmin(lengths)]
  cosines = gramian / np.outer(lengths, lengths)
  inverse = lengths.min() / lengths
  best = np.inf, None
  for size in range(1, m + 1):
    for chosen in map(list, itertools.combinations(range(m), size)):
      system = np.zeros((size + 1, size + 1))
      system[:size, :size] = cosines[np.ix_(chosen, chosen)]
      system[:size, size] = system[size, :size] = inverse[chosen]
      try:
        point = np.linalg.solve(system, np.eye(size + 1)[size])[:size]
      except np.linalg.LinAlgError:
        continue  # not affinely independent: a smaller support does as well
      if (point < -1e-12).any():
        continue
      weights = np.zeros(m)
      weights[chosen] = np.maximum(point, 0) * inverse[chosen]
      weights /= weights.sum()
      value = weights @ gramian @ weights
      if value < best[0]:
        best = value, weights
  return best


def exact_pair(gramian):
  """The closed form for two gradients."""
  (g11, g12), (_, g22) = np.asarray(gramian, np.float64)
  if g11 <= g12:
    return np.array([1.0, 0.0])
  if g22 <= g12:
    return np.array([0.0, 1.0])
  return np.array([g22 - g12, g11 - g12]) / (g11 + g22 - 2 * g12)


def assert_on_simplex(weights):
  weights = np.asarray(weights, np.float64)
  assert np.isfinite(weights).all()
  assert (weights >= 0).all()
  np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=0, atol=5e-7)


def squared_norm(gramian, weights):
  gramian = np.asarray(gramian, np.float64)
  weights = np.asarray(weights, np.float64)
  return weights @ gramian @ weights


def excess(gramian, weights):
  optimum, _ = exact_minimum(gramian)
  floor = max(optimum, 1e-6 * np.diag(gramian).min())
  return (squared_norm(gramian, weights) - optimum) / floor


def to_gramians(gradients):
  """f32 Gramians of float64 gradients `[..., m, n]`."""
  return (gradients @ np.swapaxes(gradients, -1, -2)).astype(np.float32)


# -- The Gramian --------------------------------------------------------------


def stacked_gradients(m=3, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = {'a': {'kernel': (4, 5), 'bias': (5,)}, 'b': [(), (2, 3, 2)]}
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=(m, *shape)), dtype),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gramian_float64(leaves):
  m = len(leaves[0])
  flat = [np.asarray(x, np.float64).reshape(m, -1) for x in leaves]
  return sum(x @ x.T for x in flat)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('m', [2, 3])
@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_gramian_matches_float64(transform, m, dtype):
  stacked = stacked_gradients(m, dtype)
  found = transform(mopt.gramian)(stacked)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(found, found.T)
  expected = gramian_float64(jax.tree.leaves(stacked))
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('m', [2, 3, 5])
def test_gramian_of_leaves_of_any_length(monkeypatch, platform, m):
  # Each platform has the sum that is fast there; all are right anywhere.
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  shapes = [(), (0,), (3, 0), (1024,), (1025,), (41, 25), (16, 64, 4), (4099,)]
  rng = np.random.default_rng(m)
  leaves = [rng.normal(size=(m, *s)).astype(np.float32) for s in shapes]
  gramians = jax.jit(lambda leaves: [mopt.gramian(x) for x in leaves])(leaves)
  for leaf, found in zip(leaves, gramians):
    expected = gramian_float64([leaf])
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # A sum of n numbers, in the order that a compiler likes best.
    bound = 1e-7 * max(10, leaf[0].size ** 0.5)
    np.testing.assert_array_less(abs(found - expected), bound * scale + 1e-30)


def test_gramian_of_bfloat16_and_float32_leaves_sums_in_float32():
  ones = jnp.ones((2, 3001))  # a bfloat16 sum of ones stops at 256
  stacked = {'a': ones.astype(jnp.bfloat16), 'b': ones}
  np.testing.assert_array_equal(mopt.gramian(stacked), np.full((2, 2), 6002.0))


def test_gramian_of_float64_leaves_sums_in_float64():
  with jax.enable_x64(True):
    x = np.array([[1 + 1e-9, 1.0], [-1.0, 1.0]])
    found = mopt.gramian({'a': jnp.asarray(x), 'b': jnp.zeros((2, 0))})
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, x @ x.T, rtol=0, atol=1e-15)
    single = mopt.gramian(jnp.asarray(x, jnp.float32))
    assert single.dtype == jnp.float32


@pytest.mark.parametrize(
  'mask',
  [
    {'a': {'kernel': True, 'bias': False}, 'b': [False, False]},
    mopt.dense_kernels,
  ],
  ids=['tree', 'function_of_unstacked_leaves'],
)
def test_gramian_counts_masked_leaves_only(mask):
  stacked = stacked_gradients()
  expected = gramian_float64([stacked['a']['kernel']])
  found = mopt.gramian(stacked, mask)
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


def test_gramian_does_not_depend_on_the_structure_of_the_tree():
  stacked = stacked_gradients()
  flat = jax.tree.leaves(stacked)
  np.testing.assert_array_equal(mopt.gramian(stacked), mopt.gramian(flat))


def test_gramian_maps_over_members():
  members = [stacked_gradients(), stacked_gradients(dtype=jnp.bfloat16)]
  members = [jax.tree.map(lambda x: x.astype(jnp.float32), t) for t in members]
  batch = jax.tree.map(lambda *x: jnp.stack(x), *members)
  found = jax.jit(jax.vmap(mopt.gramian))(batch)
  expected = [gramian_float64(jax.tree.leaves(t)) for t in members]
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-5)


def test_gramian_holds_the_norms_that_it_promises():
  stacked = jnp.array([[1e19, 0.0], [0.0, 1e-18]])
  expected = np.diag([1e38, 1e-36])
  np.testing.assert_allclose(mopt.gramian(stacked), expected, rtol=1e-6)


@pytest.mark.parametrize(
  'stacked',
  [
    {},
    {'a': jnp.float32(1)},
    {'a': jnp.ones((2, 3)), 'b': jnp.ones((3, 3))},
    {'a': jnp.ones((2, 3)), 'b': jnp.float32(1)},
  ],
  ids=['no_leaf', 'scalar', 'two_sizes', 'one_scalar'],
)
def test_gramian_refuses_leaves_without_a_common_leading_axis(stacked):
  with pytest.raises(ValueError, match='one m'):
    mopt.gramian(stacked)


def test_a_mask_of_the_gramian_that_selects_nothing_is_refused():
  stacked = stacked_gradients()
  with pytest.raises(ValueError, match='b/1'):
    mopt.gramian(stacked, mopt.conv_kernels)
  np.testing.assert_array_equal(mopt.gramian(stacked, False), np.zeros((3, 3)))


@pytest.mark.parametrize(
  'weighting', [mopt.min_norm_weights, mopt.fixed_weights((1, 2))]
)
def test_a_weighting_that_is_taken_for_a_schedule_says_what_to_do(weighting):
  tx = optax.inject_hyperparams(mopt.madam)(1e-3, weighting=weighting)
  with pytest.raises(ValueError, match=r"add 'weighting' to static_args"):
    tx.init({'w': jnp.ones(2)})


# -- Exactness ----------------------------------------------------------------


def gradients_of(kind, m, count=COUNT):
  rng = np.random.default_rng(m)
  if kind == 'conflicting':  # rank 3 and a little noise, on all sides of 0
    low_rank = rng.normal(size=(count, m, 3)) @ rng.normal(size=(count, 3, 20))
    return low_rank + 1e-3 * rng.normal(size=(count, m, 20))
  gradients = rng.normal(size=(count, m, 20))
  if kind == 'four_decades':
    gradients *= 10 ** rng.uniform(-2, 2, size=(count, m, 1))
  return gradients


@pytest.mark.parametrize('m', range(2, 9))
@pytest.mark.parametrize('kind', ['plain', 'four_decades', 'conflicting'])
def test_weights_are_optimal_and_descend_for_every_objective(kind, m):
  gramians = to_gramians(gradients_of(kind, m))
  weights = np.asarray(solve_all(gramians), np.float64)
  assert_on_simplex(weights)
  compared = 0
  for gramian, w in zip(gramians.astype(np.float64), weights):
    # Rounding to f32 may take the definiteness: no convex problem then.
    if np.linalg.eigvalsh(gramian)[0] > 0:
      assert excess(gramian, w) <= 1e-5
      compared += 1
    slopes = gramian @ w  # <g_i, d>
    lengths = np.sqrt(np.diag(gramian))
    rounding = 1e-6 * lengths * (w @ lengths)
    assert (slopes >= w @ gramian @ w - rounding).all()
  assert compared >= 0.9 * COUNT


def test_slsqp_finds_no_shorter_vector():
  for m in (3, 5):
    gradients = gradients_of('conflicting', m, count=4)
    for gramian in to_gramians(gradients).astype(np.float64):
      scaled = gramian / np.diag(gramian).min()
      found = optimize.minimize(
        lambda w, g=scaled: w @ g @ w,
        np.full(m, 1 / m),
        jac=lambda w, g=scaled: 2 * g @ w,
        bounds=[(0, 1)] * m,
        constraints={'type': 'eq', 'fun': lambda w: w.sum() - 1},
        method='SLSQP',
        options={'ftol': 1e-15, 'maxiter': 500},
      )
      ours = squared_norm(scaled, solve(gramian))
      np.testing.assert_allclose(ours, found.fun, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('m', [4, 6, 8])
@pytest.mark.parametrize('dimension', [1, 2])
def test_gradients_around_zero_in_too_few_dimensions_cancel(dimension, m):
  # With 0 in the hull: rounded to f32 the Gramian is not even positive
  # semidefinite.
  rng = np.random.default_rng(m)
  angles = 2 * np.pi * (np.arange(m) + rng.uniform(0, 0.5, (COUNT, m))) / m
  gradients = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
  gradients = gradients[..., :dimension]
  gradients *= 10 ** rng.uniform(-1, 1, size=(COUNT, m, 1))
  weights = np.asarray(solve_all(to_gramians(gradients)), np.float64)
  assert_on_simplex(weights)
  assert_short(weights, gradients)


def test_five_numbers_around_zero_cancel():
  gradients = np.array([[2.1], [0.7], [2.6], [1.1], [-0.3]], np.float32)
  weights = solve(mopt.gramian(jnp.asarray(gradients)))
  assert_on_simplex(weights)
  assert_short(weights, gradients)


def assert_short(weights, gradients):
  direction = np.einsum('...m,...mn->...n', weights, gradients)
  shortest = np.square(gradients).sum(axis=-1).min(axis=-1)
  assert (np.square(direction).sum(axis=-1) <= 1e-3 * shortest).all()


def integer_gradients(m):
  rng = np.random.default_rng(100 + m)
  gradients = np.zeros((COUNT, m, 4))
  for g in gradients:  # of 1 to 4 dimensions: ties, duplicates, zeros
    g[:, : rng.integers(1, 5)] = 1
  return gradients * rng.integers(-2, 3, size=gradients.shape)


@pytest.mark.parametrize('m', range(3, 9))
def test_degenerate_integer_gradients_end_at_the_optimum(m):
  gradients = integer_gradients(m)
  gramians = to_gramians(gradients)  # exact: rank-deficient, with exact ties
  weights = solve_all(gramians)
  assert_on_simplex(weights)
  assert max(excess_of_integers(g, w) for g, w in zip(gramians, weights)) < 1e-5


def excess_of_integers(gramian, weights):
  if np.diag(gramian).min() == 0:
    return squared_norm(gramian, weights)  # the optimum is 0
  return excess(gramian, weights)


@pytest.mark.parametrize('m', range(3, 7))
@pytest.mark.parametrize('decades', [0, 8])
def test_weights_of_dependent_gradients_are_exact(m, decades):
  # In three dimensions, on one side of 0: the shortest vector is longer than 0
  # and its weights are unique. The Gramians are exact in float32.
  rng = np.random.default_rng(m)
  compared = 0
  while compared < 20:
    gradients = rng.integers(-9, 10, size=(m, 3)).astype(np.float64)
    gradients[:, 0] = abs(gradients[:, 0]) + 1
    exponent = np.round(decades * np.log2(10) * rng.uniform(-0.5, 0.5, (m, 1)))
    gradients *= 2.0**exponent
    gramian = gradients @ gradients.T
    if (gramian.astype(np.float32) != gramian).any():
      continue
    optimum, _ = exact_minimum(gramian)
    weights = np.asarray(solve(gramian), np.float64)
    weights /= weights.sum()
    # The roundings of the weights alone.
    assert squared_norm(gramian, weights) - optimum <= 1e-12 * optimum
    compared += 1


def nonnegative_least_squares(gradients):
  """Weights in float64: the nearest to (0, 1) in the cone of (g_j, 1)."""
  length = np.sqrt(np.square(gradients).sum(axis=1)).min()
  rows = np.concatenate([gradients / length, np.ones((len(gradients), 1))], 1)
  u, _ = optimize.nnls(rows.T, np.eye(rows.shape[1])[-1])
  return u / u.sum()


# Two sizes to compile, and NNLS of many numbers.
@pytest.mark.slow
@pytest.mark.parametrize('m', [16, 128])
def test_many_gradients_match_nonnegative_least_squares(m):
  rng = np.random.default_rng(m)
  for spread in (1.0, 0.1):  # opposed on all sides, and rather of one mind
    gradients = rng.integers(-9, 10, size=(m, m + 9)).astype(np.float64)
    gradients[:, 0] += np.round(1 / spread) - 1
    gramian = gradients @ gradients.T  # of small integers: exact in float32
    expected = nonnegative_least_squares(gradients)
    weights = np.asarray(solve(gramian), np.float64)
    assert_on_simplex(weights)
    np.testing.assert_allclose(
      squared_norm(gramian, weights / weights.sum()),
      squared_norm(gramian, expected),
      rtol=1e-10,
    )
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-7)


# As users have it who take each example for an objective: two large programs.
@pytest.mark.slow
@pytest.mark.parametrize('m', [128, 256])
def test_many_dependent_gradients_take_seconds(m):
  rng = np.random.default_rng(0)
  gradients = rng.normal(size=(3, m, 20)) + 0.1
  gramians = jnp.asarray(to_gramians(gradients))
  for function, argument in ((solve, gramians[0]), (solve_all, gramians)):
    start = time.monotonic()
    compiled = function.lower(argument).compile()
    assert time.monotonic() - start < 60  # 3 s on a quiet machine
    start = time.monotonic()
    weights = np.asarray(compiled(argument), np.float64)
    assert time.monotonic() - start < 20  # 0.3 s
    assert_on_simplex(weights)
    # Of 20 dimensions, but for rounding.
    assert (weights > 0).sum(axis=-1).max() <= 30


# -- Two gradients ------------------------------------------------------------


def test_pairs_match_the_closed_form_in_float64():
  gradients = np.concatenate(
    [gradients_of('four_decades', 2, 200), gradients_of('conflicting', 2, 50)]
  )
  gramians = to_gramians(gradients)
  expected = [exact_pair(g) for g in gramians]
  np.testing.assert_allclose(solve_all(gramians), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ('first', 'second', 'expected'),
  [
    ([1.0, 2.0], [1.0, 2.0], [1.0, 0.0]),
    ([0.0, 0.0], [1.0, 2.0], [1.0, 0.0]),
    ([1.0, 2.0], [0.0, 0.0], [0.0, 1.0]),
    ([0.0, 0.0], [0.0, 0.0], [1.0, 0.0]),
    ([1.0, 2.0], [-1.0, -2.0], [0.5, 0.5]),
    ([3.0, 0.0], [-1.0, 0.0], [0.25, 0.75]),
    ([2.0, 4.0], [1.0, 2.0], [0.0, 1.0]),
    ([1.0, 0.0], [5.0, 0.1], [1.0, 0.0]),
    ([1.0, 0.0], [1.0, 3.0], [1.0, 0.0]),
  ],
  ids=[
    'equal', 'first_zero', 'second_zero', 'both_zero', 'opposite',
    'antiparallel', 'parallel', 'first_shorter', 'boundary',
  ],
)  # fmt: skip
@pytest.mark.parametrize('scale', [2.0**-50, 1.0, 2.0**50])
def test_special_pairs_have_exact_weights(first, second, expected, scale):
  gradients = np.float32(scale) * np.array([first, second], np.float32)
  gramian = mopt.gramian(jnp.asarray(gradients))
  np.testing.assert_array_equal(solve(gramian), np.float32(expected))


@pytest.mark.parametrize('inner_product', [0.0, 1.5, -200.0])
def test_a_tiny_weight_is_not_clamped(inner_product):
  # An error gradient beside the signs of the dense kernels of LeNet-5: the
  # weight of l1 is far below 1e-3, which others clamp to.
  gramian = np.array([[2.0, inner_product], [inner_product, 59134.0]])
  weights = solve(gramian)
  np.testing.assert_allclose(weights, exact_pair(gramian), rtol=1e-6)
  assert 0 < weights[1] < (1e-3 if inner_product >= 0 else 4e-3)


def test_a_tiny_weight_is_not_clamped_among_three():
  gramian = np.diag([2.0, 59134.0, 3e8])
  expected = (1 / np.diag(gramian)) / (1 / np.diag(gramian)).sum()
  np.testing.assert_allclose(solve(gramian), expected, rtol=1e-6)


@pytest.mark.parametrize(
  'gramian',
  [
    [[1.0, 1.0], [1.0, 1.0]],
    [[0.0, 0.0], [0.0, 2.0]],
    [[2.0, 0.0], [0.0, 0.0]],
    [[0.0, 0.0], [0.0, 0.0]],
    [[1.0, -1.0], [-1.0, 1.0]],
    [[1.0, 1.0], [1.0, 4.0]],
    [[1e38, -1e38], [-1e38, 1e38]],
  ],
)
def test_derivatives_of_a_pair_stay_finite(gramian):
  jacobian = jax.jacobian(mopt.min_norm_weights)(jnp.array(gramian))
  assert np.isfinite(jacobian).all()


def test_derivatives_of_a_pair_inside_match_the_closed_form():
  gramian = jnp.array([[3.0, 0.5], [0.5, 1.0]])
  jacobian = jax.jacobian(mopt.min_norm_weights)(gramian)[1]
  difference = 3.0 + 1.0 - 2 * 0.5
  by_g11 = (difference - 2.5) / difference**2
  by_g22 = -2.5 / difference**2
  by_g12 = (-difference + 2 * 2.5) / difference**2
  found = jacobian[0, 0], jacobian[1, 1], jacobian[0, 1] + jacobian[1, 0]
  np.testing.assert_allclose(found, (by_g11, by_g22, by_g12), rtol=1e-5)


@pytest.mark.parametrize('mode', [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize('m', [3, 5])
def test_derivatives_of_more_match_finite_differences(m, mode):
  gradients = gradients_of('four_decades', m, count=1)[0]
  gradients[-1] = gradients[:-1].sum(axis=0)  # takes no part
  gramian = gradients @ gradients.T
  lengths = np.sqrt(np.diag(gramian))
  jacobian = np.asarray(mode(mopt.min_norm_weights)(jnp.float32(gramian)))
  for i, j in itertools.product(range(m), range(m)):
    step = np.zeros((m, m))
    step[i, j] += 0.5
    step[j, i] += 0.5  # the problem sees the symmetric part alone
    step *= 1e-6 * lengths[i] * lengths[j]
    ends = [exact_minimum(gramian + s * step)[1] for s in (-1, 1)]
    found = (jacobian * step).sum(axis=(1, 2))
    np.testing.assert_allclose(
      found, (ends[1] - ends[0]) / 2, rtol=1e-3, atol=1e-10
    )


def test_derivatives_do_not_care_for_scale():
  gradients = gradients_of('plain', 4, count=1)[0]
  jacobian = jax.jacobian(mopt.min_norm_weights)
  gramian = to_gramians(gradients)
  for scale in (1e-30, 1e30):
    scaled = jacobian(jnp.float32(scale * gramian))
    np.testing.assert_allclose(
      scale * np.float64(scaled), jacobian(gramian), rtol=1e-3, atol=1e-7
    )


# -- Many gradients, special cases --------------------------------------------


@pytest.mark.parametrize('m', [3, 5])
@pytest.mark.parametrize('scale', [1e-15, 1.0, 1e15])
def test_a_zero_gradient_takes_all_weight(m, scale):
  gradients = scale * np.random.default_rng(0).normal(size=(m, 6))
  gradients[1] = 0
  weights = solve(to_gramians(gradients))
  np.testing.assert_array_equal(weights, np.eye(m)[1])


@pytest.mark.parametrize('m', [3, 5])
@pytest.mark.parametrize('length', [0.0, 1.0])
def test_of_equal_gradients_the_first_takes_all_weight(m, length):
  weights = solve(np.full((m, m), length))
  np.testing.assert_array_equal(weights, np.eye(m)[0])


def test_opposite_gradients_cancel_beside_others():
  gradients = np.array([[1.0, 2.0], [-1.0, -2.0], [3.0, -1.0]])
  weights = np.asarray(solve(to_gramians(gradients)), np.float64)
  assert_on_simplex(weights)
  assert np.square(weights @ gradients).sum() <= 1e-6


def test_a_duplicate_does_not_change_the_direction():
  gradients = gradients_of('conflicting', 4)
  doubled = np.concatenate([gradients, gradients[:, 1:2]], axis=1)
  weights = np.asarray(solve_all(to_gramians(doubled)), np.float64)
  alone = np.asarray(solve_all(to_gramians(gradients)), np.float64)
  assert_on_simplex(weights)
  for g, w, v in zip(to_gramians(gradients), weights, alone):
    w = w[:4] + [0, w[4], 0, 0]
    assert squared_norm(g, w) <= squared_norm(g, v) + 1e-5 * np.diag(g).min()


def test_gradients_that_do_not_take_part_have_weight_zero():
  gradients = np.array([[2.0, 1.0, 0], [2.0, -1.0, 0], [9.0, 0, 1.0]])
  weights = solve(to_gramians(gradients))
  np.testing.assert_allclose(weights, [0.5, 0.5, 0], rtol=1e-6)
  assert weights[2] == 0


@pytest.mark.parametrize('m', [2, 3, 5])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_gramian_that_is_not_finite_gives_nan(m, value):
  for i, j in [(0, 0), (0, m - 1), (m - 1, m - 1)]:
    gramian = np.eye(m)
    gramian[i, j] = gramian[j, i] = value
    assert np.isnan(solve(gramian)).all()


@pytest.mark.parametrize(
  'gramian',
  [
    np.ones((0, 0)),
    np.ones((1, 1)),
    np.ones((2, 3)),
    np.ones(4),
    np.ones((2, 2, 2)),
  ],
)
def test_a_gramian_of_another_shape_is_refused(gramian):
  with pytest.raises(ValueError, match='gramian must'):
    mopt.min_norm_weights(gramian)
  with pytest.raises(ValueError, match='gramian must'):
    mopt.kkt_residual(gramian, np.ones(2))


# -- Transformations ----------------------------------------------------------


@pytest.mark.parametrize('m', [2, 5])
def test_jit_vmap_and_scan_agree(m):
  gradients = gradients_of('conflicting', m)
  gradients[1, 0] = 0
  gradients[2, 1] = gradients[2, 0]
  gramians = jnp.asarray(to_gramians(gradients))
  one_by_one = jnp.stack([solve(g) for g in gramians])

  def step(carry, g):
    return (carry, mopt.min_norm_weights(g))

  _, scanned = jax.jit(lambda g: jax.lax.scan(step, 0, g))(gramians)
  np.testing.assert_allclose(solve_all(gramians), one_by_one, rtol=2e-6)
  np.testing.assert_allclose(scanned, one_by_one, rtol=2e-6)


@pytest.mark.parametrize('m', [2, 3, 5])
def test_weights_are_those_of_float32_and_more_with_x64(m):
  gramians = to_gramians(gradients_of('four_decades', m, count=5))
  expected = np.asarray([solve(g) for g in gramians])
  with jax.enable_x64(True):
    single = jnp.asarray(gramians)
    found = jax.lax.map(mopt.min_norm_weights, single)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    double = jax.lax.map(mopt.min_norm_weights, single.astype(jnp.float64))
    assert double.dtype == jnp.float64
    np.testing.assert_allclose(double.sum(axis=1), 1, rtol=1e-15)
    for gramian, weights in zip(gramians, double):
      optimum, exact = exact_minimum(gramian)
      np.testing.assert_allclose(weights, exact, rtol=1e-10)
      assert mopt.kkt_residual(gramian, weights) <= 1e-12 * optimum


def test_weights_of_a_diagonal_are_right_with_x64():
  with jax.enable_x64(True):
    weights = mopt.min_norm_weights(jnp.diag(jnp.array([1.0, 2.0, 4.0])))
    np.testing.assert_allclose(weights, np.array([4, 2, 1]) / 7, rtol=1e-14)


def test_float64_tells_gradients_apart_that_are_the_same_in_float32():
  gradients = np.array([[1.0, 3e-6, 0], [1.0, -1e-6, 0], [1.0, 0, 1e-6]])
  with jax.enable_x64(True):
    weights = mopt.min_norm_weights(mopt.gramian(jnp.asarray(gradients)))
    gramian = gradients @ gradients.T
    np.testing.assert_allclose(weights, exact_minimum(gramian)[1], atol=1e-4)


def test_accelerators_repeat_a_known_number_of_times_and_agree():
  m = 5
  gramians = to_gramians(gradients_of('conflicting', m, count=10))
  scale = np.ones((10, m), np.float32)
  lengths = np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))
  cosines = gramians / lengths[:, :, None] / lengths[:, None]
  programs = quadratic_program.Program(
    (cosines, 0 * cosines), (-scale, 0 * scale), scale
  )
  # With 2 the other loop has to go on.
  ends = []
  for repeat in (
    quadratic_program.repeat,
    functools.partial(quadratic_program.repeat_without_asking, 2),
    functools.partial(quadratic_program.repeat_without_asking, 2 * m),
  ):
    run = functools.partial(quadratic_program.search, limit=1e12, repeat=repeat)
    ends.append(jax.jit(jax.vmap(run))(programs))
  chex.assert_trees_all_close(ends[1], ends[0], rtol=1e-6)
  chex.assert_trees_all_close(ends[2], ends[0], rtol=1e-6)


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_the_solve_lowers_for_accelerators(platform):
  for function in (solve, jax.jit(jax.vmap(mopt.min_norm_weights))):
    shape = (3, 5, 5) if function is not solve else (5, 5)
    exported = jax.export.export(function, platforms=[platform])(
      jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    assert 'while' in exported.mlir_module()


def test_a_second_call_outside_of_jit_compiles_nothing(caplog):
  gramian = jnp.eye(6)
  mopt.min_norm_weights(gramian)
  mopt.kkt_residual(gramian, mopt.min_norm_weights(gramian))
  with jax.log_compiles():
    weights = mopt.min_norm_weights(jnp.eye(6))
    mopt.kkt_residual(gramian, weights)
    assert not [r for r in caplog.records if 'ompil' in r.getMessage()]
    jax.jit(lambda x: x + 1.5)(gramian)  # that it would be seen
    assert [r for r in caplog.records if 'ompil' in r.getMessage()]


@pytest.mark.parametrize('m', [2, 3])
def test_eager_and_jit_agree(m):
  gramian = to_gramians(gradients_of('conflicting', m))[0]
  eager = mopt.min_norm_weights(gramian)
  np.testing.assert_allclose(eager, solve(gramian), rtol=2e-6)


def test_a_nan_member_does_not_touch_the_others():
  gramians = to_gramians(gradients_of('conflicting', 5))
  expected = np.asarray(solve_all(gramians))
  gramians[1, 2, 2] = np.nan
  found = np.asarray(solve_all(gramians))
  assert np.isnan(found[1]).all()
  others = np.arange(COUNT) != 1
  np.testing.assert_array_equal(found[others], expected[others])


# -- The residual -------------------------------------------------------------


@pytest.mark.parametrize('m', [2, 3, 5])
def test_residual_vanishes_at_the_solution(m):
  for kind in ('plain', 'conflicting'):
    for gramian in to_gramians(gradients_of(kind, m, count=10)):
      found = float(residual(gramian, solve(gramian)))
      assert found <= 1e-6 * np.diag(gramian).max()
      assert found >= -1e-6 * np.diag(gramian).max()


@pytest.mark.parametrize('m', [2, 3, 5])
def test_residual_is_positive_elsewhere_and_bounds_the_excess(m):
  rng = np.random.default_rng(0)
  for gramian in to_gramians(gradients_of('plain', m, count=10)):
    optimum, best = exact_minimum(gramian)
    for weights in (*rng.dirichlet(np.ones(m), size=3), np.eye(m)[0]):
      weights = weights.astype(np.float32)
      if np.abs(weights - best).max() < 1e-3:
        continue
      found = float(residual(gramian, weights))
      assert found > 0
      above = squared_norm(gramian, weights) - optimum
      assert above <= 2 * found + 1e-5 * np.diag(gramian).max()


def test_residual_keeps_its_digits_where_float32_would_cancel():
  for gramian in to_gramians(gradients_of('conflicting', 5, count=10)):
    weights = np.asarray(solve(gramian))
    slopes = gramian.astype(np.float64) @ weights
    expected = (slopes @ weights - slopes).max()
    found = float(residual(gramian, weights))
    assert abs(found - expected) <= 1e-11 * np.diag(gramian).max()


def test_residual_refuses_weights_of_another_length():
  with pytest.raises(ValueError, match=r'weights must be \[2\]'):
    mopt.kkt_residual(np.eye(2), np.ones(3))


# -- Properties ---------------------------------------------------------------


def gradients_between(low, high, m, dimension=4):
  """`[m, dimension]` of zeros and numbers between two magnitudes."""
  sizes = st.floats(low, high, width=32)
  numbers = st.one_of(st.just(0.0), sizes, sizes.map(lambda x: -x))
  return hnp.arrays(np.float64, (m, dimension), elements=numbers)


def sizes(m):
  return gradients_between(np.float32(1e-15), np.float32(1e15), m)


@pytest.mark.parametrize('m', [2, 3, 5])
def test_adversarial_floats_give_weights_no_worse_than_the_shortest(m):
  @properties
  @hypothesis.given(sizes(m))
  def check(gradients):
    gramian = to_gramians(gradients)
    weights = np.asarray(solve(gramian), np.float64)
    assert_on_simplex(weights)
    lengths = np.sqrt(np.diag(gramian).astype(np.float64))
    rounding = 1e-6 * (weights @ lengths) ** 2
    shortest = lengths.min() ** 2
    bound = (1 + 1e-5) * shortest + rounding
    assert squared_norm(gramian, weights) <= bound

  check()


@properties
@hypothesis.given(sizes(2))
def test_adversarial_pairs_match_the_closed_form(gradients):
  gramian = to_gramians(gradients)
  # What is subnormal may be 0.
  np.testing.assert_allclose(
    solve(gramian), exact_pair(gramian), rtol=1e-6, atol=TINY
  )


@properties
@hypothesis.given(sizes(2))
def test_pairs_at_the_ends_are_exactly_zero_and_one(gradients):
  (g11, g12), (_, g22) = gramian = to_gramians(gradients)
  weights = np.asarray(solve(gramian)).tolist()
  at_the_end = g12 >= min(g11, g22)
  assert (weights in ([1.0, 0.0], [0.0, 1.0])) == (
    at_the_end or min(exact_pair(gramian)) < TINY
  )


@properties
@hypothesis.given(
  gradients_between(np.float32(1e-6), np.float32(1e6), 2), st.integers(-20, 20)
)
def test_scaling_a_pair_by_a_power_of_two_changes_no_digit(gradients, power):
  gramian = to_gramians(gradients)
  scaled = gramian * np.float32(4.0**power)
  np.testing.assert_array_equal(solve(scaled), solve(gramian))


@properties
@hypothesis.given(
  gradients_between(np.float32(1e-2), np.float32(1e2), 3, dimension=6),
  st.floats(-12, 12),
)
def test_scaling_three_gradients_keeps_the_achieved_norm(gradients, exponent):
  gramian = to_gramians(gradients)
  scaled = to_gramians(10.0**exponent * gradients)
  assert_same_norm(gramian, solve(gramian), solve(scaled))


def assert_same_norm(gramian, first, second):
  lengths = np.sqrt(np.diag(gramian).astype(np.float64))
  used = max(np.asarray(w, np.float64) @ lengths for w in (first, second))
  np.testing.assert_allclose(
    squared_norm(gramian, first),
    squared_norm(gramian, second),
    rtol=1e-5,
    atol=1e-6 * used**2 + 1e-11 * lengths.min() ** 2,
  )


@properties
@hypothesis.given(sizes(2))
def test_swapping_a_pair_swaps_the_weights(gradients):
  gramian = to_gramians(gradients)
  hypothesis.assume(not (gramian == gramian[0, 0]).all())
  swapped = solve(gramian[::-1, ::-1])
  np.testing.assert_array_equal(swapped[::-1], solve(gramian))


@pytest.mark.parametrize('m', [3, 5])
def test_permuting_the_objectives_keeps_the_achieved_norm(m):
  gradients = gradients_between(np.float32(1e-3), np.float32(1e3), m)

  @properties
  @hypothesis.given(gradients, st.permutations(range(m)))
  def check(gradients, order):
    gramian = to_gramians(gradients)
    permuted = np.asarray(solve(gramian[np.ix_(order, order)]))
    back = np.empty_like(permuted)
    back[list(order)] = permuted
    assert_same_norm(gramian, back, solve(gramian))

  check()


# -- Pairs of floats ----------------------------------------------------------


def test_pairs_carry_48_bits():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, 1000, 1)) * 10 ** rng.uniform(-5, 5, (2, 1000, 1))
  with jax.enable_x64(True):
    a, b = pairs.from_array(jnp.asarray(x)), pairs.from_array(jnp.asarray(y))
    x, y = (np.asarray(pairs.to_array(p, jnp.float64)) for p in (a, b))
    value = lambda p: np.asarray(pairs.to_array(p, jnp.float64))
    for found, expected in (
      (pairs.mul(a, b), x * y),
      (pairs.reciprocal(a), 1 / x),
    ):
      assert found[0].dtype == found[1].dtype == jnp.float32
      np.testing.assert_allclose(value(found), expected, rtol=2e-14)
    error = abs(value(pairs.add(a, b)) - (x + y))
    assert (error <= 2e-14 * (abs(x) + abs(y))).all()
    columns = tuple(part.T for part in pairs.mul(a, b))
    error = abs(value(pairs.total(columns)) - (x * y).sum())
    assert error <= 2e-14 * abs(x * y).sum()
    assert bool(
      pairs.less(a, pairs.add(a, (abs(a[0]) * 1e-12, 0 * a[0]))).all()
    )
