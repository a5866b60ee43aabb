"""Weightings beside min-norm: against SciPy, closed forms, and properties."""

import functools

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import nnls

import mopt

CONES = {'dual_proj': mopt.dual_proj, 'upgrad': mopt.upgrad}
ALL = {'mean': mopt.mean, **CONES}
each_cone = pytest.mark.parametrize('name', CONES)
each = pytest.mark.parametrize('name', ALL)


def project(gradients, start):
  """The smallest `|sum_j v_j g_j|` with v >= start, by SciPy in float64."""
  scale = np.linalg.norm(gradients, axis=1)
  scale[scale == 0] = 1
  unit = (gradients / scale[:, None]).T
  added, _ = nnls(unit, -(gradients.T @ start), maxiter=10_000)
  return start + added / scale


def expected_direction(name, gradients):
  m = len(gradients)
  if name == 'mean':
    weights = np.full(m, 1 / m)
  elif name == 'dual_proj':
    weights = project(gradients, np.full(m, 1 / m))
  else:
    weights = sum(project(gradients, row / m) for row in np.eye(m))
  return gradients.T @ weights


def make_gradients(kind, m, is_scaled, seed=0):
  """Integers, times powers of two: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  gradients = rng.integers(-8, 9, (m, max(m, 8))).astype(float)
  if kind == 'conflict':  # Around zero, or nearly.
    gradients -= gradients.mean(axis=0).round()
  if kind == 'rank_3':  # And noise.
    sides = rng.integers(-8, 9, (m, 3)), rng.integers(-8, 9, (3, max(m, 8)))
    gradients += 4 * sides[0] @ sides[1]
  if kind == 'dependent':  # Pairs that are nearly equal or opposite.
    half = len(gradients[1::2])
    signs = np.where(np.arange(half) % 2, 1, -1)[:, None]
    noise = rng.integers(-1, 2, gradients[1::2].shape)
    gradients[1::2] = 8 * signs * gradients[::2][:half] + noise
    gradients[::2] *= 8
  if kind == 'low_rank':
    gradients = gradients[:, : max(2, m // 3)]
  if is_scaled:  # Norms over 8 decades.
    gradients *= 2.0 ** rng.integers(-13, 14, m)[:, None]
  return gradients


def gramian_of(gradients):
  exact = gradients @ gradients.T
  gramian = jnp.asarray(exact, jnp.float32)
  np.testing.assert_array_equal(gramian, exact)
  return gramian


SIZES = pytest.mark.parametrize('m', [2, 3, 8, 32])


KINDS = 'random', 'conflict', 'rank_3', 'dependent', 'low_rank'
# upgrad of 128 takes seconds a call, so one of the kinds has to do.
SOLVED = [
  (name, kind, m)
  for name in CONES
  for kind in KINDS
  for m in (2, 3, 8, 16, 32, 64, 128)
  if m < 128 or name == 'dual_proj' or kind == 'conflict'
]


@pytest.mark.parametrize(('name', 'kind', 'm'), SOLVED)
@pytest.mark.parametrize('is_scaled', [False, True], ids=['', 'scaled'])
def test_directions_are_those_of_nonnegative_least_squares(
  name, m, is_scaled, kind
):
  for seed in range(3 if m <= 32 else 1):
    gradients = make_gradients(kind, m, is_scaled, seed)
    weights = np.asarray(CONES[name](gramian_of(gradients)), np.float64)
    assert (weights >= np.float32(1 / m)).all()
    found = gradients.T @ weights
    expected = expected_direction(name, gradients)
    size = np.linalg.norm(expected)
    # Weights are rounded, and where the direction is 0 this is all there is.
    lengths = np.linalg.norm(gradients, axis=1)
    rounding = 1e-7 * (weights @ lengths)
    assert np.linalg.norm(found - expected) <= 1e-5 * size + rounding
    # Nothing gets worse, up to what float32 can tell.
    assert (gradients @ found >= -10 * rounding * lengths).all()


@pytest.mark.parametrize('m', [2, 3, 8, 16, 32, 64, 128])
@pytest.mark.parametrize('is_scaled', [False, True], ids=['', 'scaled'])
def test_dual_proj_exceeds_the_optimum_by_rounding_alone(m, is_scaled):
  for seed in range(5):
    gradients = make_gradients('conflict', m, is_scaled, seed)
    weights = mopt.dual_proj(gramian_of(gradients))
    found = np.square(gradients.T @ np.asarray(weights, np.float64)).sum()
    optimum = np.square(expected_direction('dual_proj', gradients)).sum()
    least = np.square(gradients).sum(axis=1).min()
    assert found - optimum <= 1e-6 * max(optimum, 1e-6 * least)


@each_cone
def test_gradients_that_cancel_leave_rounding(name):
  """Three vectors in a plane around zero: no direction descends for all."""
  gradients = np.array([[4.0, 0.0], [-2.0, 3.0], [-2.0, -5.0]])
  weights = np.asarray(CONES[name](gramian_of(gradients)), np.float64)
  lengths = np.linalg.norm(gradients, axis=1)
  assert np.linalg.norm(gradients.T @ weights) <= 1e-6 * (weights @ lengths)


@each
@SIZES
def test_without_a_conflict_it_is_the_mean(name, m):
  gradients = np.abs(make_gradients('random', m, False))
  weights = ALL[name](gramian_of(gradients))
  np.testing.assert_array_equal(weights, np.full(m, np.float32(1 / m)))


@given(*[st.integers(-50, 50)] * 4)
def test_two_have_a_closed_form(a, b, c, d):
  gradients = np.array([[a, b], [c, d]], float)
  gramian = gradients @ gradients.T
  cross, squares = gramian[0, 1], np.diag(gramian)
  share = np.divide(-cross, squares, out=np.zeros(2), where=squares > 0)
  np.testing.assert_allclose(
    mopt.dual_proj(jnp.float32(gramian)), np.maximum(1, share) / 2, rtol=1e-6
  )
  np.testing.assert_allclose(
    mopt.upgrad(jnp.float32(gramian)),
    (1 + np.maximum(0, share)) / 2,
    rtol=1e-6,
  )


@each
def test_the_order_does_not_matter(name):
  gradients = make_gradients('conflict', 5, True)
  order = [3, 0, 4, 2, 1]
  found = ALL[name](gramian_of(gradients[order]))
  expected = ALL[name](gramian_of(gradients))
  np.testing.assert_allclose(found, expected[np.array(order)], rtol=1e-6)


@each
@pytest.mark.parametrize('m', [2, 5])
def test_a_scale_of_all_gradients_changes_no_digit(name, m):
  gramian = gramian_of(make_gradients('conflict', m, False))
  for scale in (2.0**-60, 2.0**60):
    np.testing.assert_array_equal(
      ALL[name](scale * gramian), ALL[name](gramian)
    )


@pytest.mark.parametrize('m', [2, 3])
def test_of_upgrad_a_gradient_counts_by_its_scale(m):
  """What a gradient adds to the direction grows as it does, and no faster."""
  gradients = make_gradients('conflict', m, False)
  alone = [project(gradients, row / m) for row in np.eye(m)]
  factor = np.array([1.0, 1024.0, 1.0])[:m]
  scaled = gradients * factor[:, None]
  weights = np.asarray(mopt.upgrad(gramian_of(scaled)), np.float64)
  wanted = sum(f * (gradients.T @ v) for f, v in zip(factor, alone))
  np.testing.assert_allclose(
    scaled.T @ weights, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max()
  )


@each_cone
@pytest.mark.parametrize('m', [2, 4])
def test_a_zero_gradient_keeps_its_share(name, m):
  gradients = make_gradients('conflict', m, False)
  gradients[1] = 0
  weights = CONES[name](gramian_of(gradients))
  assert weights[1] == np.float32(1 / m)
  assert np.isfinite(weights).all()
  zeros = CONES[name](jnp.zeros((m, m)))
  np.testing.assert_array_equal(zeros, np.full(m, np.float32(1 / m)))


@each_cone
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('m', [2, 3])
def test_a_gramian_that_is_not_finite_gives_nan(name, bad, m):
  gramian = jnp.eye(m).at[0, 1].set(bad)
  assert np.isnan(CONES[name](gramian)).all()


@each
@pytest.mark.parametrize('shape', [(), (3,), (1, 1), (2, 3), (2, 2, 2)])
def test_a_gramian_of_another_shape_is_refused(name, shape):
  with pytest.raises(ValueError, match='gramian must '):
    ALL[name](jnp.ones(shape))


@each
@pytest.mark.parametrize('m', [2, 4])
def test_jit_vmap_and_scan_agree(name, m):
  weighting = ALL[name]
  gramians = jnp.stack(
    [gramian_of(make_gradients('conflict', m, False, s)) for s in range(4)]
  )
  expected = np.stack([weighting(gramian) for gramian in gramians])
  _, scanned = jax.lax.scan(lambda c, g: (c, weighting(g)), 0, gramians)
  for found in (jax.vmap(weighting)(gramians), scanned):
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@each
@pytest.mark.parametrize('m', [2, 5])
def test_float64_stays_float64_and_float32_float32_with_x64(name, m):
  gradients = make_gradients('conflict', m, False)
  with jax.enable_x64(True):
    exact = jnp.asarray(gradients @ gradients.T)
    weights = ALL[name](exact)
    assert weights.dtype == jnp.float64
    found = gradients.T @ np.asarray(weights)
    expected = expected_direction(name, gradients)
    size = np.linalg.norm(expected)
    # Pairs have 48 bits.
    np.testing.assert_allclose(found, expected, atol=1e-10 * size)
    assert ALL[name](exact.astype(jnp.float32)).dtype == jnp.float32


def test_derivatives_of_a_pair_are_those_of_the_closed_form():
  gramian = jnp.array([[2.0, -1.0], [-1.0, 4.0]])
  # Weights 1/2 - g12 / (2 g11) and 1/2 - g12 / (2 g22).
  expected = np.zeros((2, 2, 2))
  expected[0] = [[-1 / 8, -1 / 4], [0, 0]]
  expected[1] = [[0, -1 / 8], [0, -1 / 32]]
  found = jax.jacrev(mopt.upgrad)(gramian)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  for name in CONES:
    at_zero = jax.jacrev(CONES[name])(jnp.zeros((2, 2)))
    assert np.isfinite(at_zero).all()


@each_cone
@pytest.mark.parametrize('m', [3, 6])
def test_derivatives_of_more_are_those_of_differences(name, m):
  gradients = make_gradients('conflict', m, False, seed=1)
  gradients[:, 0] += 1  # At a distance from where the solution has a kink.
  weighting = CONES[name]
  with jax.enable_x64(True):
    gramian = jnp.asarray(gradients @ gradients.T)
    change = jnp.asarray(np.cov(make_gradients('random', m, False)))
    more, less = (weighting(gramian + step * change) for step in (1e-5, -1e-5))
    expected = (more - less) / 2e-5
    assert (expected != 0).any()
    _, forward = jax.jvp(weighting, (gramian,), (change,))
    backward = jnp.tensordot(jax.jacrev(weighting)(gramian), change, 2)
  size = np.abs(expected).max()
  np.testing.assert_allclose(forward, expected, atol=1e-4 * size)
  np.testing.assert_allclose(backward, expected, atol=1e-4 * size)


@each_cone
def test_derivatives_with_zeros_are_finite(name):
  gradients = make_gradients('conflict', 4, False)
  gradients[1] = 0
  found = jax.jacrev(CONES[name])(gramian_of(gradients))
  assert np.isfinite(found).all()
  assert (found[1] == 0).all()
  assert not jax.jacrev(CONES[name])(jnp.zeros((3, 3))).any()


@each
@pytest.mark.parametrize(
  'inner', [optax.identity(), optax.scale_by_adam()], ids=['sgd', 'adam']
)
def test_it_weighs_the_gradients_of_an_optimizer(name, inner):
  """Three objectives around their mean, with SGD and with Adam inside."""
  targets = jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
  losses = [
    functools.partial(lambda x, target: jnp.sum((x - target) ** 2), target=t)
    for t in targets
  ]
  tx = optax.chain(
    mopt.aggregate(ALL[name], inner, num_objectives=3),
    optax.scale_by_learning_rate(1e-2),
  )
  grad_fn = mopt.value_and_stacked_grad(*losses)

  @jax.jit
  def step(x, state):
    values, grads = grad_fn(x)
    updates, state = tx.update(grads, state, x)
    return optax.apply_updates(x, updates), state, values

  x = jnp.array([6.0, 5.0])
  state = tx.init(x)
  history = []
  for _ in range(60):
    x, state, values = step(x, state)
    history.append(values)
  history = np.array(history)
  # From afar all three fall at every step.
  assert (np.diff(history, axis=0) < 0).all()
