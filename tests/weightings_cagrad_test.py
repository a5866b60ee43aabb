"""CAGrad, by its dual problem in float64, by SciPy, and by its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.optimize import nnls

import mopt

# One program for all c of a size.
cagrad = jax.jit(lambda gramian, c: mopt.cagrad(c)(gramian))


def make_gradients(kind, m, is_scaled, seed=0):
  """Integers, times powers of two: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  gradients = rng.integers(-8, 9, (m, max(m, 8))).astype(float)
  if kind == 'conflict':
    gradients -= gradients.mean(axis=0).round()
  if kind == 'dependent':
    gradients[1::2] = -gradients[: len(gradients[1::2])]
    gradients[0] += 1
  if kind == 'low_rank':
    gradients = gradients[:, : max(2, m // 3)]
  if is_scaled:  # Norms over 8 decades.
    gradients *= 2.0 ** rng.integers(-13, 14, m)[:, None]
  return gradients


def dual_bound(gradients, weights, c):
  """No direction within the ball gains more than this for all."""
  middle = gradients.mean(axis=0)
  radius = c * np.linalg.norm(middle)
  added = np.maximum(weights - 1 / len(weights), 0)
  # Or weights that sum to 0, if there are any: then nothing gains.
  scale = np.linalg.norm(gradients, axis=1)
  system = np.vstack([(gradients / scale[:, None]).T, np.ones(len(scale))])
  to_zero, _ = nnls(system, np.eye(len(system))[-1])
  bounds = [np.inf]
  for share in (added, to_zero / scale):
    if share.sum() > 0:
      d = gradients.T @ (share / share.sum())
      bounds.append(d @ middle + radius * np.linalg.norm(d))
  return min(bounds)


def gap_of(gradients, weights, c):
  """To the bound, in lengths of the mean and of the longest gradient."""
  middle = gradients.mean(axis=0)
  weights = np.asarray(weights, np.float64)
  off = gradients.T @ weights - middle
  radius = c * np.linalg.norm(middle)
  length = np.linalg.norm(off)
  assert length <= radius * (1 + 1e-5) + 1e-6 * np.abs(gradients).max()
  # What rounding puts outside of the ball gains nothing.
  d = middle + off * min(1, radius / max(length, 1e-300))
  gain = (gradients @ d).min()
  longest = np.linalg.norm(gradients, axis=1).max()
  bound = dual_bound(gradients, weights, c)
  return (bound - gain) / (np.linalg.norm(middle) * longest)


KINDS = pytest.mark.parametrize(
  'kind', ['random', 'conflict', 'dependent', 'low_rank']
)
SCALED = pytest.mark.parametrize('is_scaled', [False, True], ids=['', 'scaled'])


@pytest.mark.parametrize('m', [2, 3, 8, 32, 128])
@SCALED
@KINDS
def test_no_direction_of_the_ball_gains_more(kind, is_scaled, m):
  for seed in range(2):
    gradients = make_gradients(kind, m, is_scaled, seed)
    exact = gradients @ gradients.T
    for c in (0.1, 0.5, 1.5):
      weights = cagrad(jnp.asarray(exact, jnp.float32), c)
      assert (weights >= np.float32(1 / m)).all()
      assert gap_of(gradients, weights, c) <= 1e-5
      if c == 0.5 and m in (3, 32):  # Each size is compiled anew.
        with jax.enable_x64(True):
          assert gap_of(gradients, cagrad(jnp.asarray(exact), c), c) <= 1e-6


@pytest.mark.parametrize('c', [0.5, 2.0])
def test_the_weights_are_those_of_the_dual_problem_by_scipy(c):
  gradients = make_gradients('random', 4, False, seed=3) + 2.0
  middle = gradients.mean(axis=0)
  radius = c * np.linalg.norm(middle)

  def dual(share):
    d = gradients.T @ share
    return d @ middle + radius * np.linalg.norm(d)

  start = np.full(4, 0.25)
  sum_is_one = {'type': 'eq', 'fun': lambda share: share.sum() - 1}
  found = minimize(
    dual,
    start,
    bounds=[(0, 1)] * 4,
    constraints=sum_is_one,
    options={'ftol': 1e-14, 'maxiter': 1000},
  )
  d = gradients.T @ found.x
  expected = middle + radius * d / np.linalg.norm(d)
  weights = mopt.cagrad(c)(jnp.float32(gradients @ gradients.T))
  np.testing.assert_allclose(
    gradients.T @ np.asarray(weights, np.float64), expected, atol=1e-4
  )


@pytest.mark.parametrize('m', [2, 5])
def test_without_room_it_is_the_mean(m):
  gramian = jnp.float32(np.cov(make_gradients('conflict', m, True)))
  for given, c in ((gramian, 0.0), (jnp.zeros((m, m)), 0.5)):
    found = mopt.cagrad(c)(given)
    np.testing.assert_array_equal(found, np.full(m, np.float32(1 / m)))


def test_a_mean_of_zero_is_left():
  gramian = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
  np.testing.assert_array_equal(mopt.cagrad(0.5)(gramian), [0.5, 0.5])


@pytest.mark.parametrize('c', [0.5, 1.0, 2.0])
def test_opposite_gradients_cancel_if_they_may(c):
  # Of g and -3 g the mean is -g, and the nearest to 0 in reach (c - 1) g.
  weights = mopt.cagrad(c)(jnp.array([[1.0, -3.0], [-3.0, 9.0]]))
  along = float(weights[0] - 3 * weights[1])
  np.testing.assert_allclose(along, min(c, 1) - 1, atol=1e-6)


def test_a_zero_gradient_asks_for_descent_alone():
  gradients = make_gradients('conflict', 4, False)
  gradients[1] = 0
  gramian = jnp.float32(gradients @ gradients.T)
  weights = mopt.cagrad(1.0)(gramian)
  assert weights[1] == np.float32(0.25)
  np.testing.assert_allclose(weights, mopt.dual_proj(gramian), atol=1e-5)


@pytest.mark.parametrize('m', [2, 5])
def test_order_and_scale_do_not_matter(m):
  gradients = make_gradients('random', m, True, seed=1)
  gramian = jnp.float32(gradients @ gradients.T)
  expected = cagrad(gramian, 0.5)
  order = np.random.default_rng(0).permutation(m)
  found = cagrad(gramian[order][:, order], 0.5)
  np.testing.assert_allclose(found, expected[order], rtol=1e-5)
  for scale in (2.0**-40, 2.0**40):
    np.testing.assert_array_equal(cagrad(scale * gramian, 0.5), expected)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_gramian_that_is_not_finite_gives_nan(bad):
  assert np.isnan(mopt.cagrad()(jnp.eye(3).at[0, 1].set(bad))).all()


@pytest.mark.parametrize(
  ('c', 'message'),
  [
    (-1, 'c must be finite and non-negative, got -1.0.'),
    (np.nan, 'c must be finite and non-negative, got nan.'),
    (np.inf, 'c must be finite and non-negative, got inf.'),
    ([0.5], r'c must be a scalar, got shape \(1,\).'),
    ('much', "c must be a number, got 'much'."),
  ],
)
def test_a_wrong_c_is_refused(c, message):
  with pytest.raises(ValueError, match=message):
    mopt.cagrad(c)


@pytest.mark.parametrize('shape', [(), (3,), (1, 1), (2, 3)])
def test_a_gramian_of_another_shape_is_refused(shape):
  with pytest.raises(ValueError, match='gramian must '):
    mopt.cagrad()(jnp.ones(shape))


def test_a_population_with_a_c_each_and_a_scan_agree():
  many = [make_gradients('conflict', 4, True, s) for s in range(26)]
  gramians = jnp.stack([jnp.float32(x @ x.T) for x in many])
  each_c = jnp.linspace(0, 2, 26)
  expected = np.stack([cagrad(g, c) for g, c in zip(gramians, each_c)])
  found = jax.jit(jax.vmap(cagrad))(gramians, each_c)
  body = lambda carry, x: (carry, cagrad(*x))
  _, scanned = jax.lax.scan(body, 0, (gramians, each_c))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(scanned, expected, rtol=1e-5)


def test_dtypes_stay_with_x64():
  with jax.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64):
      assert mopt.cagrad(0.5)(jnp.eye(3, dtype=dtype)).dtype == dtype


def test_steps_find_the_minimum_of_the_mean():
  """An unbalanced pair: half the mean's descent is kept, so it gets there."""
  wishes = jnp.array([[-1.0, 0.0], [1.0, 1.0]])
  scales = 1.0, 10.0
  objectives = [
    functools.partial(
      lambda x, wish, scale: scale * jnp.sum((x - wish) ** 2), wish=w, scale=s
    )
    for w, s in zip(wishes, scales)
  ]
  grad_fn = mopt.value_and_stacked_grad(*objectives)
  tx = mopt.aggregate(mopt.cagrad(0.5))

  @jax.jit
  def run(x):
    def body(carry, _):
      x, state = carry
      update, state = tx.update(grad_fn(x)[1], state, x)
      return (x - 0.02 * update, state), None

    return jax.lax.scan(body, (x, tx.init(x)), length=300)[0][0]

  expected = (wishes[0] + 10 * wishes[1]) / 11
  np.testing.assert_allclose(run(jnp.array([3.0, -2.0])), expected, atol=1e-3)
