"""Nash-MTL and FairGrad: the equation they solve in float64, and properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import mopt

# One program for all alpha of a size.
fairgrad = jax.jit(lambda gramian, alpha: mopt.fairgrad(alpha)(gramian))
RIDGE = 2.0**-20


def make_gradients(kind, m, is_scaled=False, seed=0):
  """Integers, times powers of two: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  gradients = rng.integers(-8, 9, (m, m + 6)).astype(float)
  if kind == 'conflict':  # Nearly all around zero.
    gradients -= gradients.mean(axis=0).round()
    gradients[:, 0] = 1
  if kind == 'low_rank':  # All around zero, if there are enough of them.
    gradients = gradients[:, : max(2, m // 3)]
  if is_scaled:  # Norms over 8 decades.
    gradients *= 2.0 ** rng.integers(-13, 14, m)[:, None]
  return gradients


def residuals(gradients, weights, alpha, ridge=RIDGE):
  """Of each equation, relative to its right side, and what rounding may do."""
  weights = np.asarray(weights, np.float64)
  gramian = gradients @ gradients.T
  lengths = np.linalg.norm(gradients, axis=1)
  gains = gramian @ weights + ridge * lengths**2 * weights
  expected = weights ** (-1 / alpha)
  rounding = 2.0**-24 * lengths * (lengths @ weights)
  return np.abs(gains - expected), expected, rounding


@pytest.mark.parametrize('m', [2, 3, 8, 32, 64, 128])
@pytest.mark.parametrize('is_scaled', [False, True], ids=['', 'scaled'])
@pytest.mark.parametrize('kind', ['random', 'conflict', 'low_rank'])
def test_the_equation_of_nash_holds(kind, is_scaled, m):
  for seed in range(2):
    gradients = make_gradients(kind, m, is_scaled, seed)
    weights = mopt.nash_mtl(jnp.float32(gradients @ gradients.T))
    assert (weights > 0).all()
    error, size, rounding = residuals(gradients, weights, 1)
    assert (error <= 1e-5 * size + 4 * rounding).all()
    if kind == 'random':
      d = gradients.T @ np.asarray(weights, np.float64)
      np.testing.assert_allclose(d @ d, m, rtol=1e-3)
      assert (gradients @ d > 0).all()


@pytest.mark.parametrize('m', [2, 3, 8, 32])
@pytest.mark.parametrize('alpha', [0.2, 0.5, 2.0, 10.0])
@pytest.mark.parametrize('kind', ['random', 'conflict', 'low_rank'])
def test_the_equation_of_fairgrad_holds(kind, alpha, m):
  for seed in range(2):
    gradients = make_gradients(kind, m, False, seed)
    weights = fairgrad(jnp.float32(gradients @ gradients.T), alpha)
    error, size, rounding = residuals(gradients, weights, alpha)
    # A large power of what is rounded is as much more off.
    assert (error <= 1e-5 * max(1, 1 / alpha) * size + 4 * rounding).all()


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0, 10.0])
def test_norms_over_decades_are_weighted_by_the_same_equation(alpha):
  gradients = make_gradients('random', 8, True)
  weights = fairgrad(jnp.float32(gradients @ gradients.T), alpha)
  lengths = np.linalg.norm(gradients, axis=1)
  parts = np.asarray(weights, np.float64) * lengths
  error, size, rounding = residuals(gradients, weights, alpha)
  # What adds nothing to the direction need not be known to all digits.
  counts = parts > 1e-6 * parts.max()
  assert counts.sum() > 1
  assert (error <= 1e-4 * size + 4 * rounding)[counts].all()


@pytest.mark.parametrize('cosine', [-0.999, -0.5, 0.0, 0.9])
def test_two_of_nash_have_a_closed_form(cosine):
  norms = np.array([3.0, 1 / 512])
  cosines = np.array([[1, cosine], [cosine, 1]])
  weights = mopt.nash_mtl(jnp.float32(cosines * np.outer(norms, norms)))
  expected = 1 / norms / np.sqrt(1 + cosine + RIDGE)
  np.testing.assert_allclose(weights, expected, rtol=1e-4)


@pytest.mark.parametrize('alpha', [0.5, 2.0, 4.0])
def test_equal_gradients_of_fairgrad_solve_one_equation(alpha):
  m, square = 5, 7.0
  equation = lambda a: m * square * a - a ** (-1 / alpha)
  expected = brentq(equation, 1e-6, 1e3, xtol=1e-15)
  found = mopt.fairgrad(alpha)(jnp.full((m, m), square))
  np.testing.assert_allclose(found, np.full(m, expected), rtol=1e-5)


def test_fairgrad_of_one_is_nash():
  gradients = make_gradients('random', 6, True)
  gramian = jnp.float32(gradients @ gradients.T)
  expected = mopt.nash_mtl(gramian)
  np.testing.assert_array_equal(mopt.fairgrad(1.0)(gramian), expected)


def test_the_larger_alpha_the_more_equal_are_gains():
  gradients = make_gradients('random', 5)
  spreads = []
  for alpha in (0.1, 1.0, 10.0, 100.0):
    weights = fairgrad(jnp.float32(gradients @ gradients.T), alpha)
    gains = gradients @ (gradients.T @ np.asarray(weights, np.float64))
    spreads.append(gains.max() / gains.min())
  assert (np.diff(spreads) < 0).all()
  assert spreads[-1] < 1.2


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('m', [2, 5])
def test_order_and_scale(alpha, m):
  gradients = make_gradients('random', m, True, seed=1)
  gramian = jnp.float32(gradients @ gradients.T)
  expected = fairgrad(gramian, alpha)
  order = np.random.default_rng(0).permutation(m)
  found = fairgrad(gramian[order][:, order], alpha)
  np.testing.assert_allclose(found, expected[order], rtol=1e-4)
  for scale in (2.0**-30, 2.0**30):
    power = scale ** (-2 * alpha / (1 + alpha))
    found = fairgrad(scale**2 * gramian, alpha)
    np.testing.assert_allclose(found, power * expected, rtol=1e-5)


def test_the_direction_of_nash_does_not_depend_on_any_scale():
  gradients = make_gradients('conflict', 4)
  factor = np.array([1, 2.0**20, 2.0**-18, 3.0])
  expected = mopt.nash_mtl(jnp.float32(gradients @ gradients.T))
  scaled = gradients * factor[:, None]
  found = mopt.nash_mtl(jnp.float32(scaled @ scaled.T))
  np.testing.assert_allclose(found * factor, expected, rtol=1e-4)


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('norm', [2.0**-10, 3.0])
def test_opposite_gradients_cancel(alpha, norm):
  gradients = np.array([[1.0], [-norm]])
  weights = fairgrad(jnp.float32(gradients @ gradients.T), alpha)
  parts = np.asarray(weights, np.float64) * [1, norm]
  assert np.isfinite(parts).all()
  assert (parts > 0).all()
  np.testing.assert_allclose(parts[0], parts[1], rtol=1e-5)
  if alpha == 1:
    np.testing.assert_allclose(parts, 1024, rtol=1e-4)


@pytest.mark.parametrize('alpha', [1.0, 2.0])
@pytest.mark.parametrize('m', [2, 4])
def test_zero_gradients_are_left_out(alpha, m):
  gradients = make_gradients('random', m)
  gradients[1] = 0
  weights = fairgrad(jnp.float32(gradients @ gradients.T), alpha)
  assert weights[1] == 0
  error, size, _ = residuals(
    np.delete(gradients, 1, axis=0), np.delete(weights, 1), alpha
  )
  assert (error <= 1e-5 * size).all()
  np.testing.assert_array_equal(fairgrad(jnp.zeros((m, m)), alpha), 0)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_gramian_that_is_not_finite_gives_nan(bad):
  gramian = jnp.eye(3).at[0, 1].set(bad)
  assert np.isnan(mopt.nash_mtl(gramian)).all()
  assert np.isnan(mopt.fairgrad()(gramian)).all()


@pytest.mark.parametrize(
  ('alpha', 'message'),
  [
    (0, 'alpha must be finite and positive, got 0.0.'),
    (-2, 'alpha must be finite and positive, got -2.0.'),
    (np.nan, 'alpha must be finite and positive, got nan.'),
    ([1.0], r'alpha must be a scalar, got shape \(1,\).'),
    (None, 'alpha must be a number, got None.'),
  ],
)
def test_a_wrong_alpha_is_refused(alpha, message):
  with pytest.raises(ValueError, match=message):
    mopt.fairgrad(alpha)


@pytest.mark.parametrize('shape', [(), (3,), (1, 1), (2, 3)])
def test_a_gramian_of_another_shape_is_refused(shape):
  for weighting in (mopt.nash_mtl, mopt.fairgrad()):
    with pytest.raises(ValueError, match='gramian must '):
      weighting(jnp.ones(shape))


def test_a_population_with_an_alpha_each_and_a_scan_agree():
  many = [make_gradients('conflict', 4, False, s) for s in range(26)]
  gramians = jnp.stack([jnp.float32(x @ x.T) for x in many])
  each_alpha = jnp.linspace(0.5, 3, 26)
  expected = [fairgrad(g, alpha) for g, alpha in zip(gramians, each_alpha)]
  found = jax.jit(jax.vmap(fairgrad))(gramians, each_alpha)
  body = lambda carry, x: (carry, fairgrad(*x))
  _, scanned = jax.lax.scan(body, 0, (gramians, each_alpha))
  np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4)
  np.testing.assert_allclose(scanned, np.stack(expected), rtol=1e-4)


def test_float64_is_more_exact_and_dtypes_stay():
  gradients = make_gradients('conflict', 5)
  with jax.enable_x64(True):
    exact = jnp.asarray(gradients @ gradients.T)
    for alpha in (1.0, 2.0):
      weights = mopt.fairgrad(alpha)(exact)
      assert weights.dtype == jnp.float64
      error, size, _ = residuals(gradients, weights, alpha)
      assert (error <= 1e-10 * size).all()
      single = mopt.fairgrad(alpha)(exact.astype(jnp.float32))
      assert single.dtype == jnp.float32
    assert mopt.nash_mtl(exact).dtype == jnp.float64


@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_derivatives_are_those_of_differences(alpha):
  gradients = make_gradients('random', 3)
  with jax.enable_x64(True):
    gramian = jnp.asarray(gradients @ gradients.T)
    change = jnp.asarray(np.cov(make_gradients('conflict', 3)))
    step = 1e-6
    more = fairgrad(gramian + step * change, alpha)
    less = fairgrad(gramian - step * change, alpha)
    expected = (more - less) / (2 * step)
    _, forward = jax.jvp(lambda g: fairgrad(g, alpha), (gramian,), (change,))
    backward = jnp.tensordot(jax.jacrev(fairgrad)(gramian, alpha), change, 2)
    np.testing.assert_allclose(forward, expected, rtol=1e-6)
    np.testing.assert_allclose(backward, expected, rtol=1e-6)
    by_alpha = jax.jacrev(fairgrad, argnums=1)(gramian, alpha)
    more = fairgrad(gramian, alpha + step)
    less = fairgrad(gramian, alpha - step)
    np.testing.assert_allclose(by_alpha, (more - less) / (2 * step), rtol=1e-5)


def test_derivatives_with_a_zero_gradient_are_finite():
  gramian = jnp.diag(jnp.array([1.0, 0.0, 4.0]))
  found = jax.jacrev(mopt.nash_mtl)(gramian)
  assert np.isfinite(found).all()
  # The first weight is 1 / |g|.
  np.testing.assert_allclose(found[0, 0, 0], -0.5, rtol=1e-4)
