"""Weightings by an eigendecomposition: against NumPy's in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt

ALL = {
  'imtl_g': mopt.imtl_g,
  'config': mopt.config,
  'aligned_mtl': mopt.aligned_mtl,
}
ALIKE = ['imtl_g', 'config']
each = pytest.mark.parametrize('name', ALL)
each_alike = pytest.mark.parametrize('name', ALIKE)


def expected_weights(name, gradients):
  """As the papers have it, of gradients that need not be independent."""
  m = len(gradients)
  lengths = np.linalg.norm(gradients, axis=1)
  inverse = np.divide(1, lengths, out=np.zeros(m), where=lengths > 0)
  units = gradients * inverse[:, None]
  if name == 'aligned_mtl':
    _, values, vectors = np.linalg.svd(gradients.T, full_matrices=False)
    values = values[values > 1e-9 * values.max()]
    vectors = vectors[: len(values)]
    return vectors.T @ (values[-1] / values * (vectors @ np.full(m, 1 / m)))
  direction = np.linalg.pinv(units, rcond=1e-9) @ np.ones(m)
  weights = inverse * (np.linalg.pinv(units.T, rcond=1e-9) @ direction)
  if name == 'imtl_g':
    return weights / weights.sum()
  size = np.linalg.norm(direction)
  return weights / size * (gradients @ direction / size).sum()


def make_gradients(m, kind='random', seed=0):
  """Integers, times powers of two: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  gradients = rng.integers(-8, 9, (m, 2 * m)).astype(float)
  if kind == 'similar':  # Condition numbers up to some thousands.
    gradients += 16 * rng.integers(-2, 3, 2 * m)
  if kind == 'scaled':  # Norms over 8 decades.
    gradients *= 2.0 ** rng.integers(-13, 14, m)[:, None]
  return gradients


def gramian_of(gradients):
  exact = gradients @ gradients.T
  gramian = jnp.asarray(exact, jnp.float32)
  np.testing.assert_array_equal(gramian, exact)
  return gramian


def assert_same(found, expected, tolerance=1e-6):
  found = np.asarray(found, np.float64)
  np.testing.assert_allclose(
    found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
  )


@each
@pytest.mark.parametrize('m', [2, 4, 16])
@pytest.mark.parametrize('kind', ['random', 'similar', 'scaled'])
def test_weights_are_those_of_float64(name, m, kind):
  if name == 'aligned_mtl' and kind == 'scaled':
    pytest.skip('eigenvalues so small count as 0: test_what_counts_as_zero')
  for seed in range(3):
    gradients = make_gradients(m, kind, seed)
    weights = np.asarray(ALL[name](gramian_of(gradients)), np.float64)
    expected = expected_weights(name, gradients)
    lengths = np.linalg.norm(gradients, axis=1)
    assert_same(weights * lengths, expected * lengths)


@each_alike
@pytest.mark.parametrize('m', [2, 4])
def test_all_gradients_have_the_same_angle(name, m):
  gradients = make_gradients(m, 'scaled')
  direction = gradients.T @ np.asarray(ALL[name](gramian_of(gradients)), float)
  projections = gradients @ direction / np.linalg.norm(gradients, axis=1)
  assert_same(projections, np.full(m, projections.mean()))
  if name == 'config':
    # It descends, and is as long as what it has of all of them.
    assert (projections > 0).all()
    length = np.linalg.norm(direction)
    along = (gradients @ direction).sum() / length
    assert length == pytest.approx(along, rel=1e-6)


def test_of_three_imtl_g_may_point_the_wrong_way_and_config_not():
  # The short one lies between the others, nearer to them than they are to
  # each other, and has to be subtracted.
  gradients = np.array([[8.0, 8.0, 1.0], [8.0, -8.0, 1.0], [0.25, 0.0, 0.0]])
  gramian = gramian_of(gradients)
  down = gradients @ (gradients.T @ np.asarray(mopt.config(gramian)))
  assert (down > 0).all()
  weights = np.asarray(mopt.imtl_g(gramian))
  assert weights.sum() == pytest.approx(1)
  assert weights.min() < 0
  assert (gradients @ (gradients.T @ weights) < 0).all()


@pytest.mark.parametrize('m', [2, 4])
def test_aligned_gradients_are_orthogonal_and_as_long_as_the_least(m):
  """Of m such ones the mean has the square of their length over m."""
  gradients = make_gradients(m)
  weights = np.asarray(mopt.aligned_mtl(gramian_of(gradients)), np.float64)
  direction = gradients.T @ weights
  least = np.linalg.svd(gradients, compute_uv=False).min()
  assert direction @ direction == pytest.approx(least**2 / m, rel=1e-6)


@each
def test_orthogonal_gradients_have_closed_forms(name):
  gramian = jnp.diag(jnp.array([1.0, 4.0, 16.0]))  # Lengths 1, 2, 4.
  expected = {
    'imtl_g': np.array([4, 2, 1]) / 7,
    'config': 7 / 3 / np.array([1, 2, 4]),
    'aligned_mtl': 1 / 3 / np.array([1, 2, 4]),
  }
  np.testing.assert_allclose(ALL[name](gramian), expected[name], rtol=3e-7)


@each
@pytest.mark.parametrize('rank', [1, 2, 3])
def test_gradients_may_depend_on_each_other(name, rank):
  for seed in range(3):
    rng = np.random.default_rng([seed, rank])
    factors = rng.integers(-3, 4, (4, rank)), rng.integers(-3, 4, (rank, 9))
    if rank == 1:  # Of as many signs each all would cancel.
      factors = np.array([[3], [-1], [1], [2]]), factors[1]
    gradients = (factors[0] @ factors[1]).astype(float)
    weights = np.asarray(ALL[name](gramian_of(gradients)), np.float64)
    assert np.isfinite(weights).all()
    direction = gradients.T @ weights
    expected = gradients.T @ expected_weights(name, gradients)
    # What float32 can tell of a sum, of parts that may cancel.
    rounding = 3e-6 * (np.abs(weights) @ np.linalg.norm(gradients, axis=1))
    assert np.linalg.norm(direction - expected) <= rounding


@each
@pytest.mark.parametrize('m', [2, 4])
def test_a_zero_gradient_has_no_weight(name, m):
  gradients = make_gradients(m)
  gradients[1] = 0
  weights = ALL[name](gramian_of(gradients))
  np.testing.assert_allclose(weights[1], 0, atol=1e-7)
  assert_same(weights, expected_weights(name, gradients))
  np.testing.assert_array_equal(ALL[name](jnp.zeros((m, m))), np.zeros(m))


@each
@pytest.mark.parametrize('m', [2, 3])
def test_gradients_that_cancel_leave_rounding(name, m):
  angles = 2 * np.pi * np.arange(m) / m
  gradients = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  gramian = jnp.asarray(gradients @ gradients.T, jnp.float32)
  weights = np.asarray(ALL[name](gramian), np.float64)
  assert np.abs(weights).max() <= 1
  assert np.linalg.norm(gradients.T @ weights) <= 1e-6
  if name in ALIKE and m > 2:
    np.testing.assert_array_equal(weights, np.zeros(m))


def test_what_counts_as_zero():
  """Of norms that lie decades apart `aligned_mtl` leaves the short ones out."""
  within = mopt.aligned_mtl(jnp.diag(jnp.array([1.0, 2.0**-18])))
  np.testing.assert_allclose(within, [2.0**-10, 0.5], rtol=1e-6)
  beyond = mopt.aligned_mtl(jnp.diag(jnp.array([1.0, 2.0**-24])))
  np.testing.assert_allclose(beyond, [0.5, 0])


@each
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('m', [2, 4])
def test_a_gramian_that_is_not_finite_gives_nan(name, bad, m):
  gramian = jnp.eye(m).at[0, 1].set(bad)
  assert np.isnan(ALL[name](gramian)).all()


@each
@pytest.mark.parametrize('shape', [(), (3,), (1, 1), (2, 3), (2, 2, 2)])
def test_a_gramian_of_another_shape_is_refused(name, shape):
  with pytest.raises(ValueError, match='gramian must '):
    ALL[name](jnp.ones(shape))


@each
def test_the_order_does_not_matter(name):
  gradients = make_gradients(4)
  order = np.array([3, 0, 2, 1])
  found = ALL[name](gramian_of(gradients[order]))
  assert_same(found, np.asarray(ALL[name](gramian_of(gradients)))[order])


@each
@pytest.mark.parametrize('m', [2, 4])
def test_a_scale_of_all_gradients_changes_no_digit(name, m):
  gramian = gramian_of(make_gradients(m))
  for scale in (2.0**-90, 2.0**90):
    np.testing.assert_array_equal(
      ALL[name](scale * gramian), ALL[name](gramian)
    )


@each_alike
@pytest.mark.parametrize('m', [2, 4])
def test_a_scale_of_one_gradient_changes_the_length_alone(name, m):
  gradients = make_gradients(m)
  scaled = gradients * (3.0 ** np.arange(m))[:, None]
  directions = [
    x.T @ np.asarray(ALL[name](gramian_of(x)), np.float64)
    for x in (gradients, scaled)
  ]
  one, other = (d / np.linalg.norm(d) for d in directions)
  assert_same(one, other)


@each
def test_vmap_and_scan_agree(name):
  m, weighting = 4, ALL[name]
  gramians = jnp.stack(
    [gramian_of(make_gradients(m, seed=s)) for s in range(26)]
  )
  expected = np.stack([weighting(gramian) for gramian in gramians])
  _, scanned = jax.lax.scan(lambda c, g: (c, weighting(g)), 0, gramians)
  for found in (jax.vmap(weighting)(gramians), scanned):
    assert_same(found, expected)


@each
@pytest.mark.parametrize('m', [2, 4])
def test_float64_stays_float64_and_float32_float32_with_x64(name, m):
  gradients = make_gradients(m)
  with jax.enable_x64(True):
    exact = jnp.asarray(gradients @ gradients.T)
    weights = ALL[name](exact)
    assert weights.dtype == jnp.float64
    assert_same(weights, expected_weights(name, gradients), 1e-12)
    found = ALL[name](exact.astype(jnp.float32))
    assert found.dtype == jnp.float32
    assert_same(found, expected_weights(name, gradients))


@each
def test_derivatives_are_those_of_differences(name):
  m = 4
  gradients = make_gradients(m)
  gramian = gramian_of(gradients)
  change = make_gradients(m, seed=1)
  step = 1e-5
  ends = [
    expected_weights(name, gradients + sign * step * change) for sign in (1, -1)
  ]
  expected = (ends[0] - ends[1]) / (2 * step)
  moved = change @ gradients.T + gradients @ change.T
  found = jnp.tensordot(
    jax.jacrev(ALL[name])(gramian), jnp.float32(moved), axes=2
  )
  assert_same(found, expected, 2e-5)


@each
def test_derivatives_of_zeros_are_finite(name):
  derivative = jax.jacrev(ALL[name])
  for m in (2, 4):
    for gramian in (jnp.zeros((m, m)), jnp.eye(m).at[0, 0].set(0)):
      assert np.isfinite(derivative(gramian)).all()


@each_alike
def test_objectives_of_any_scale_fall_alike(name):
  """Three quadratics, one a thousand times another: all fall, step by step."""
  targets = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
  scales = (1.0, 1e3, 1e-3)
  losses = [
    functools.partial(
      lambda x, target, scale: scale * jnp.sum((x - target) ** 2),
      target=target,
      scale=scale,
    )
    for target, scale in zip(targets, scales)
  ]
  grad_fn = mopt.value_and_stacked_grad(*losses)
  tx = mopt.aggregate(ALL[name], num_objectives=3)
  x = jnp.full(3, 3.0)
  values, grads = grad_fn(x)
  update, _ = tx.update(grads, tx.init(x), x)
  x = x - 0.5 * update / jnp.linalg.norm(update)
  falls = (values - grad_fn(x)[0]) / jnp.array(scales)
  assert (falls > 0).all()
  # They start at one distance, so that they are as far afterwards.
  assert_same(falls, np.full(3, falls.mean()), 1e-4)
