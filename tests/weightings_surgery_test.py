"""pcgrad and gradvac: against NumPy's on the gradients themselves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt
from mopt.weightings import surgery

ALL = {'pcgrad': mopt.pcgrad, 'gradvac': mopt.gradvac}
each = pytest.mark.parametrize('name', ALL)
KEY = jax.random.key(7)


def pcgrad(gradients, orders):
  """Algorithm 1 of Yu et al., 2020."""
  total = np.zeros(gradients.shape[1])
  for i, order in enumerate(orders):
    altered = gradients[i].copy()
    for j in order:
      other = gradients[j]
      if j != i and altered @ other < 0:
        altered -= altered @ other / (other @ other) * other
    total += altered
  return total


def gradvac(gradients, orders, targets, beta):
  """That of Wang et al., 2021, and the new targets."""
  targets = targets.copy()
  total = np.zeros(gradients.shape[1])
  for i, order in enumerate(orders):
    altered = gradients[i].copy()
    for j in order:
      if j == i:
        continue
      other, target = gradients[j], targets[i, j]
      ours, theirs = np.linalg.norm(altered), np.linalg.norm(other)
      cosine = altered @ other / (ours * theirs)
      if cosine < target:
        rest, sine = np.sqrt(1 - target**2), np.sqrt(1 - cosine**2)
        scale = ours * (target * sine - cosine * rest) / (theirs * rest)
        altered += scale * other
      targets[i, j] = (1 - beta) * target + beta * cosine
    total += altered
  return total, targets


def make_gradients(m, is_scaled=False, seed=0):
  """Integers, times powers of two: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  gradients = rng.integers(-8, 9, (m, m + 2)).astype(float)
  if is_scaled:  # Norms over 8 decades.
    gradients *= 2.0 ** rng.integers(-13, 14, m)[:, None]
  return gradients


def gramian_of(gradients):
  exact = gradients @ gradients.T
  gramian = jnp.asarray(exact, jnp.float32)
  np.testing.assert_array_equal(gramian, exact)
  return gramian


def orders_of(keys, m):
  """What the weighting draws, which is random by `test_orders_...`."""
  return np.asarray(surgery.draw_orders(keys, m))


def steps_of(weighting, gradients_of_steps):
  """The weights of some steps, and the orders that were drawn for them."""
  m = len(gradients_of_steps[0])
  state = weighting.init(m)
  for gradients in gradients_of_steps:
    data = state[1] if isinstance(state, tuple) else state
    now = jax.random.split(jax.random.wrap_key_data(data))[1]
    weights, state = weighting.update(gramian_of(gradients), state)
    yield gradients, np.asarray(weights, np.float64), orders_of(now, m), state


def assert_same(found, expected, size):
  assert np.linalg.norm(found - expected) <= 1e-5 * size


@pytest.mark.parametrize('m', [2, 5])
@pytest.mark.parametrize('is_scaled', [False, True], ids=['', 'scaled'])
def test_pcgrad_is_that_of_the_gradients(m, is_scaled):
  steps = [make_gradients(m, is_scaled, seed) for seed in range(6)]
  for gradients, weights, orders, _ in steps_of(mopt.pcgrad(KEY), steps):
    size = weights @ np.linalg.norm(gradients, axis=1)
    assert_same(gradients.T @ weights, pcgrad(gradients, orders), size)
    assert (weights >= 1).all()


@pytest.mark.parametrize('m', [2, 5])
@pytest.mark.parametrize('is_scaled', [False, True], ids=['', 'scaled'])
@pytest.mark.parametrize('beta', [0.5, 0.01])
def test_gradvac_is_that_of_the_gradients(m, is_scaled, beta):
  steps = [make_gradients(m, is_scaled, seed) for seed in range(6)]
  weighting = mopt.gradvac(KEY, beta=beta)
  targets = np.zeros((m, m))
  for gradients, weights, orders, state in steps_of(weighting, steps):
    expected, targets = gradvac(gradients, orders, targets, beta)
    size = weights @ np.linalg.norm(gradients, axis=1)
    assert_same(gradients.T @ weights, expected, size)
    np.testing.assert_allclose(state[0], targets, atol=2e-6)
    assert (weights >= 1).all()


def test_targets_are_kept_to():
  """Once two gradients have agreed, others are turned until they do."""
  weighting = mopt.gradvac(KEY, beta=1.0)
  agreeing = jnp.array([[4.0, 2.0], [2.0, 4.0]])  # A cosine of 1/2.
  _, state = weighting.update(agreeing, weighting.init(2))
  np.testing.assert_allclose(state[0], [[0, 0.5], [0.5, 0]])
  weights, state = weighting.update(jnp.eye(2), state)
  # Of e1 + c e2 the cosine with e2 is 1/2 where c is tan(30 degrees).
  np.testing.assert_allclose(weights, 1 + np.tan(np.pi / 6), rtol=1e-6)
  np.testing.assert_array_equal(state[0], np.zeros((2, 2)))


def test_targets_of_one_are_not_out_of_reach():
  weighting = mopt.gradvac(KEY, beta=1.0)
  _, state = weighting.update(jnp.ones((2, 2)), weighting.init(2))
  np.testing.assert_array_equal(state[0], [[0, 1], [1, 0]])
  weights, _ = weighting.update(jnp.eye(2), state)
  gradients = np.eye(2)
  altered = gradients + (np.asarray(weights)[:, None] - 1) * gradients[::-1]
  cosine = altered[0, 1] / np.linalg.norm(altered[0])
  assert 1 - 1e-6 < cosine < 1


def test_with_targets_of_zero_gradvac_is_pcgrad():
  gramian = gramian_of(make_gradients(5))
  orders = surgery.draw_orders(KEY, 5)
  found, _ = surgery._gradvac(
    gramian, orders, jnp.zeros((5, 5)), jnp.float32(0.5)
  )
  expected = surgery._pcgrad(gramian, orders)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_of_two_pcgrad_is_twice_upgrad():
  for seed in range(5):
    gramian = gramian_of(make_gradients(2, seed=seed))
    weighting = mopt.pcgrad(KEY)
    weights, _ = weighting.update(gramian, weighting.init(2))
    np.testing.assert_allclose(weights, 2 * mopt.upgrad(gramian), rtol=1e-6)


def test_orders_are_permutations_and_all_of_them():
  keys = jax.random.split(KEY, 200)
  orders = np.asarray(jax.vmap(lambda k: surgery.draw_orders(k, 3))(keys))
  assert (np.sort(orders, axis=-1) == np.arange(3)).all()
  for i in range(3):
    _, counts = np.unique(orders[:, i], axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 10  # 33 on average, with a deviation of 5.
  assert (orders[:, 0] != orders[:, 1]).any()


@each
def test_each_step_has_another_order_and_each_key_its_own(name):
  gramian = gramian_of(make_gradients(5))

  def run(key):
    weighting = ALL[name](key)
    state = weighting.init(5)
    if name == 'gradvac':  # Whose targets change, too.
      weighting = mopt.gradvac(key, beta=0)
    found = []
    for _ in range(3):
      weights, state = weighting.update(gramian, state)
      found.append(np.asarray(weights))
    return np.stack(found)

  found = run(KEY)
  assert (found[0] != found[1]).any()
  np.testing.assert_array_equal(run(KEY), found)
  assert (run(jax.random.key(8)) != found).any()
  # As the key was made before there were types of keys.
  np.testing.assert_array_equal(run(jax.random.PRNGKey(7)), found)


@each
@pytest.mark.parametrize('m', [2, 5])
def test_without_a_conflict_it_is_the_sum(name, m):
  weighting = ALL[name](KEY)
  gramian = gramian_of(np.abs(make_gradients(m)))
  weights, _ = weighting.update(gramian, weighting.init(m))
  np.testing.assert_array_equal(weights, np.ones(m))


@each
def test_a_zero_gradient_changes_nothing(name):
  gradients = make_gradients(5)
  gradients[2] = 0
  weighting = ALL[name](KEY)
  weights, state = weighting.update(gramian_of(gradients), weighting.init(5))
  assert np.isfinite(weights).all()
  assert weights[2] == 1
  if name == 'gradvac':
    assert not state[0][2].any()
    assert not state[0][:, 2].any()
  weights, _ = weighting.update(jnp.zeros((5, 5)), weighting.init(5))
  np.testing.assert_array_equal(weights, np.ones(5))


@each
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_gives_nan_and_leaves_the_targets(name, bad):
  weighting = ALL[name](KEY)
  good = gramian_of(make_gradients(5))
  _, state = weighting.update(good, weighting.init(5))
  weights, new = weighting.update(good.at[0, 1].set(bad), state)
  assert np.isnan(weights).all()
  if name == 'gradvac':
    assert state[0].any()
    np.testing.assert_array_equal(new[0], state[0])
  weights, _ = weighting.update(good, new)
  assert np.isfinite(weights).all()


@each
def test_a_scale_of_all_gradients_changes_no_digit(name):
  gramian = gramian_of(make_gradients(5))
  weighting = ALL[name](KEY)
  expected, _ = weighting.update(gramian, weighting.init(5))
  for scale in (2.0**-90, 2.0**90):
    found, _ = weighting.update(scale * gramian, weighting.init(5))
    np.testing.assert_array_equal(found, expected)


@each
def test_vmap_and_scan_agree(name):
  gramians = jnp.stack(
    [gramian_of(make_gradients(5, seed=s)) for s in range(26)]
  )
  update = ALL[name](KEY).update
  start = ALL[name](KEY).init(5)
  state, expected = start, []
  for gramian in gramians:
    weights, state = update(gramian, state)
    expected.append(weights)

  def body(state, gramian):
    weights, state = update(gramian, state)
    return state, weights

  end, scanned = jax.lax.scan(body, start, gramians)
  np.testing.assert_allclose(scanned, np.stack(expected), rtol=1e-4)
  for one, other in zip(jax.tree.leaves(end), jax.tree.leaves(state)):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  together, _ = jax.vmap(update, in_axes=(0, None))(gramians, start)
  alone = np.stack([update(gramian, start)[0] for gramian in gramians])
  np.testing.assert_allclose(together, alone, rtol=1e-4)


@each
def test_float64_stays_float64_and_the_state_float32(name):
  gradients = make_gradients(5)
  with jax.enable_x64(True):
    weighting = ALL[name](KEY)
    exact = jnp.asarray(gradients @ gradients.T)
    start = weighting.init(5)
    weights, state = weighting.update(exact, start)
    assert weights.dtype == jnp.float64
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    if name == 'gradvac':
      assert state[0].dtype == jnp.float32
    single, _ = weighting.update(exact.astype(jnp.float32), start)
    assert single.dtype == jnp.float32
    now = jax.random.split(KEY)[1]
    orders = orders_of(now, 5)
  if name == 'pcgrad':
    expected = pcgrad(gradients, orders)
  else:
    expected, _ = gradvac(gradients, orders, np.zeros((5, 5)), 0.5)
  np.testing.assert_allclose(
    gradients.T @ np.asarray(weights), expected, rtol=1e-10, atol=1e-10
  )


@each
@pytest.mark.parametrize('shape', [(), (1, 1), (2, 3)])
def test_a_gramian_of_another_shape_is_refused(name, shape):
  weighting = ALL[name](KEY)
  with pytest.raises(ValueError, match='gramian must '):
    weighting.update(jnp.ones(shape), weighting.init(2))


@pytest.mark.parametrize('factory', [mopt.pcgrad, mopt.gradvac, mopt.random])
@pytest.mark.parametrize('key', [0, None, jnp.zeros(3)], ids=repr)
def test_what_is_no_key_is_refused(factory, key):
  with pytest.raises(ValueError, match='key must be one random key'):
    factory(key)


@pytest.mark.parametrize('beta', [-0.1, 1.1, np.nan, [0.5], 'all'])
def test_another_beta_is_refused(beta):
  with pytest.raises(ValueError, match='beta must be a number'):
    mopt.gradvac(KEY, beta=beta)


@each
def test_derivatives_of_a_pair_are_those_of_the_closed_form(name):
  gramian = jnp.array([[2.0, -1.0], [-1.0, 4.0]])
  weighting = ALL[name](KEY)
  weights = lambda g: weighting.update(g, weighting.init(2))[0]
  # Weights 1 - g12 / g11 and 1 - g12 / g22, of either half of the matrix.
  expected = [[-1 / 4, -1 / 2], [-1 / 16, -1 / 4]]
  found = jax.jacrev(weights)(gramian)
  np.testing.assert_allclose(
    [
      [found[0, 0, 0], found[0].sum() - np.trace(found[0])],
      [found[1, 1, 1], found[1].sum() - np.trace(found[1])],
    ],
    expected,
    rtol=1e-5,
  )


@each
def test_it_weighs_the_gradients_of_an_optimizer(name):
  """Three objectives around their mean, under jit, in a scan."""
  targets = jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.0, -2.0]])
  losses = [
    functools.partial(lambda x, target: jnp.sum((x - target) ** 2), target=t)
    for t in targets
  ]
  tx = mopt.aggregate(ALL[name](KEY), num_objectives=3)
  grad_fn = mopt.value_and_stacked_grad(*losses)

  def step(carry, _):
    x, state = carry
    values, grads = grad_fn(x)
    updates, state = tx.update(grads, state, x)
    return (x - 1e-2 * updates, state), values

  x = jnp.array([6.0, 5.0])
  _, history = jax.lax.scan(step, (x, tx.init(x)), length=10)
  # From afar all three fall at every step.
  assert (np.diff(history, axis=0) < 0).all()
