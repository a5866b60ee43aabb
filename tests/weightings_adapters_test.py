"""Weightings around others, and those that need no solver: krum and random."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

KEY = jax.random.key(3)
PREFERENCES = np.array([1.0, 4.0, 2.0, 1.0])
INNERS = {
  'mean': mopt.mean,
  'min_norm': mopt.min_norm_weights,
  'upgrad': mopt.upgrad,
  'imtl_g': mopt.imtl_g,
}
each_inner = pytest.mark.parametrize('name', INNERS)
each_by = pytest.mark.parametrize('by', ['none', 'l2', 'loss'])


def make_gradients(m=4, seed=0):
  """Integers, in conflict: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  gradients = rng.integers(-8, 9, (m, 6)).astype(float)
  return gradients - gradients.mean(axis=0).round()


def gramian_of(gradients):
  return jnp.asarray(gradients @ gradients.T, jnp.float32)


def by_values():
  """Weights that are the values, with a state that counts the updates."""

  def update(gramian, state, *, values=None, **extra):
    assert set(extra) <= {'more'}
    return values * jnp.ones_like(gramian[0]), state + 1

  return mopt.Weighting(lambda m: jnp.zeros((), jnp.int32), update)


def weights_of(weighting, gramian, **extra):
  return np.asarray(
    weighting.update(gramian, weighting.init(len(gramian)), **extra)[0],
    np.float64,
  )


# -- preferred ----------------------------------------------------------------


@each_inner
def test_a_preference_is_a_factor_of_the_objective(name):
  gradients = make_gradients()
  preferred = mopt.preferred(INNERS[name], PREFERENCES)
  found = gradients.T @ weights_of(preferred, gramian_of(gradients))
  scaled = gradients * PREFERENCES[:, None] / 2  # Their mean is 2.
  weights = np.asarray(INNERS[name](gramian_of(scaled)), np.float64)
  np.testing.assert_allclose(found, scaled.T @ weights, rtol=1e-4, atol=1e-5)


@each_inner
@pytest.mark.parametrize('equal', [1.0, 0.1, 3e38, 7])
def test_equal_preferences_change_nothing(name, equal):
  gramian = gramian_of(make_gradients())
  preferred = mopt.preferred(INNERS[name], [equal] * 4)
  np.testing.assert_allclose(
    weights_of(preferred, gramian), INNERS[name](gramian), rtol=1e-5
  )


def test_of_the_mean_preferences_are_the_weights():
  preferred = mopt.preferred(mopt.mean, (3, 1))
  np.testing.assert_allclose(weights_of(preferred, jnp.eye(2)), [0.75, 0.25])


def test_of_min_norm_the_preferred_falls_by_the_less():
  gradients = make_gradients()
  preferred = mopt.preferred(mopt.min_norm_weights, PREFERENCES)
  weights = weights_of(preferred, gramian_of(gradients))
  falls = (gradients @ (gradients.T @ weights))[weights > 0]
  rates = PREFERENCES[weights > 0] * falls
  assert (weights > 0).sum() > 1
  np.testing.assert_allclose(rates, rates.mean(), rtol=1e-4)
  assert (weights / PREFERENCES * 2).sum() == pytest.approx(1)


def test_what_is_promised_of_descent_stays():
  for seed in range(5):
    gradients = make_gradients(seed=seed)
    preferred = mopt.preferred(mopt.upgrad, PREFERENCES)
    weights = weights_of(preferred, gramian_of(gradients))
    lengths = np.linalg.norm(gradients, axis=1)
    falls = gradients @ (gradients.T @ weights) / (lengths @ weights) / lengths
    assert (falls >= -1e-6).all()


def test_preferences_may_be_traced():
  gramian = jnp.array([[2.0, -1.0], [-1.0, 8.0]])
  table = jnp.asarray(np.random.default_rng(0).uniform(0.1, 2, (26, 2)))

  def weigh(preferences):
    preferred = mopt.preferred(mopt.upgrad, preferences)
    return preferred.update(gramian, preferred.init(2))[0]

  found = jax.jit(jax.vmap(weigh))(table)
  expected = np.stack([weigh(preferences) for preferences in table])
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_values_are_multiplied_and_the_state_is_that_of_the_inner():
  weighting = mopt.preferred(by_values(), (3.0, 1.0))
  assert weighting.init(2) == 0
  weights, state = weighting.update(
    jnp.eye(2), weighting.init(2), values=[2.0, 8.0], more=1
  )
  assert state == 1
  np.testing.assert_allclose(weights, [1.5 * 3, 0.5 * 4])  # factor^2 * value


@pytest.mark.parametrize(
  ('preferences', 'message'),
  [
    ((1, 0), 'preferences must be positive and finite, got .1.0, 0.0.'),
    ((1, -1), 'positive and finite'),
    ((1, np.nan), 'positive and finite'),
    ((1, 1e39), 'positive and finite'),
    (1.0, r'preferences must be \[m\] with m >= 2, got shape \(\)'),
    ((1.0,), r'\[m\] with m >= 2'),
    (np.ones((2, 2)), r'\[m\] with m >= 2'),
    ('much', 'preferences must be a number'),
  ],
)
def test_other_preferences_are_refused(preferences, message):
  with pytest.raises(ValueError, match=message):
    mopt.preferred(mopt.mean, preferences)


def test_preferences_of_another_number_are_refused():
  preferred = mopt.preferred(mopt.mean, (1, 2, 3))
  with pytest.raises(ValueError, match=r'3 preferences need a Gramian \(3, 3'):
    preferred.update(jnp.eye(2), preferred.init(2))
  with pytest.raises(ValueError, match=r'values must be \[3\]'):
    preferred.update(jnp.eye(3), preferred.init(3), values=jnp.ones(2))


# -- normalized ---------------------------------------------------------------


@each_inner
@each_by
def test_gradients_are_divided_before_they_are_weighed(name, by):
  gradients = make_gradients()
  values = jnp.array([1.0, 0.5, 16.0, 2.0])
  lengths = {
    'none': np.ones(4),
    'l2': np.linalg.norm(gradients, axis=1),
    'loss': np.asarray(values),
  }[by]
  normalized = mopt.normalized(INNERS[name], by)
  weights = weights_of(normalized, gramian_of(gradients), values=values)
  scaled = gradients / lengths[:, None]
  expected = scaled.T @ np.asarray(INNERS[name](gramian_of(scaled)), float)
  np.testing.assert_allclose(
    gradients.T @ weights, expected, rtol=1e-4, atol=1e-5
  )


def test_by_none_is_the_weighting_itself():
  gramian = gramian_of(make_gradients())
  np.testing.assert_array_equal(
    weights_of(mopt.normalized(mopt.upgrad, 'none'), gramian),
    mopt.upgrad(gramian),
  )


def test_by_l2_no_scale_counts():
  gradients = make_gradients()
  scaled = gradients * np.array([[1.0], [1e4], [1e-3], [30.0]])
  directions = [
    x.T @ weights_of(mopt.normalized(mopt.upgrad, 'l2'), gramian_of(x))
    for x in (gradients, scaled)
  ]
  np.testing.assert_allclose(*directions, rtol=1e-4, atol=1e-5)


def test_by_loss_is_that_of_logarithms():
  x = jnp.array([0.5, -1.0])
  losses = (lambda x: jnp.sum((x - 1) ** 2), lambda x: 5 * jnp.sum(x**2) + 1)
  logarithm = lambda loss: lambda x: jnp.log(loss(x))
  logs = map(logarithm, losses)
  values, grads = mopt.value_and_stacked_grad(*losses)(x)
  _, log_grads = mopt.value_and_stacked_grad(*logs)(x)
  tx = mopt.aggregate(mopt.normalized(mopt.min_norm_weights, 'loss'))
  found, _ = tx.update(grads, tx.init(x), x, values=values)
  tx = mopt.aggregate(mopt.min_norm_weights)
  expected, _ = tx.update(log_grads, tx.init(x), x)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_zeros_stay_as_they_are():
  gradients = make_gradients()
  gradients[1] = 0
  normalized = mopt.normalized(mopt.upgrad, 'l2')
  weights = weights_of(normalized, gramian_of(gradients))
  assert np.isfinite(weights).all()
  assert weights[1] == 0.25
  normalized = mopt.normalized(mopt.mean, 'loss')
  weights = weights_of(normalized, jnp.eye(2), values=jnp.array([0.0, 4.0]))
  np.testing.assert_array_equal(weights, [0.5, 0.125])


@pytest.mark.parametrize('bad', [-1.0, np.nan, np.inf])
def test_a_loss_that_is_none_gives_nan(bad):
  for inner in (mopt.mean, mopt.upgrad):
    normalized = mopt.normalized(inner, 'loss')
    values = jnp.array([1.0, bad])
    assert np.isnan(weights_of(normalized, jnp.eye(2), values=values)).all()


@each_by
def test_values_and_the_state_are_those_of_the_inner(by):
  weighting = mopt.normalized(by_values(), by)
  weights, state = weighting.update(
    4 * jnp.eye(2), weighting.init(2), values=jnp.array([2.0, 8.0]), more=1
  )
  assert state == 1
  expected = {'none': [2, 8], 'l2': [1, 4], 'loss': [1, 1]}
  np.testing.assert_array_equal(weights, expected[by])


def test_by_loss_needs_values():
  normalized = mopt.normalized(mopt.mean, 'loss')
  with pytest.raises(ValueError, match=r"normalized\(..., 'loss'\) needs"):
    normalized.update(jnp.eye(2), ())
  with pytest.raises(ValueError, match=r'values must be \[2\]'):
    normalized.update(jnp.eye(2), (), values=jnp.ones(3))


@pytest.mark.parametrize('by', ['l1', None, 2])
def test_another_by_is_refused(by):
  with pytest.raises(ValueError, match="by must be 'none', 'l2' or 'loss'"):
    mopt.normalized(mopt.mean, by)


@pytest.mark.parametrize(
  'adapt',
  [lambda w: mopt.preferred(w, (1, 2)), lambda w: mopt.normalized(w, 'l2')],
  ids=['preferred', 'normalized'],
)
class TestBoth:
  def test_what_is_no_weighting_is_refused(self, adapt):
    with pytest.raises(ValueError, match='weighting must be a function'):
      adapt(3)

  @pytest.mark.parametrize('shape', [(), (1, 1), (2, 3)])
  def test_a_gramian_of_another_shape_is_refused(self, adapt, shape):
    with pytest.raises(ValueError, match='gramian must '):
      adapt(mopt.mean).update(jnp.ones(shape), ())

  def test_each_dtype_stays(self, adapt):
    with jax.enable_x64(True):
      for dtype in (jnp.float32, jnp.float64):
        weights, _ = adapt(mopt.upgrad).update(jnp.eye(2, dtype=dtype), ())
        assert weights.dtype == dtype

  def test_a_random_one_goes_on(self, adapt):
    weighting = adapt(mopt.random(KEY))
    first, state = weighting.update(jnp.eye(2), weighting.init(2))
    second, end = weighting.update(jnp.eye(2), state)
    assert (first != second).all()
    chex.assert_trees_all_equal_shapes_and_dtypes(end, weighting.init(2))


# -- krum ---------------------------------------------------------------------


def scores_of(gradients, n_byzantine):
  squares = ((gradients[:, None] - gradients[None]) ** 2).sum(axis=-1)
  count = len(gradients) - n_byzantine - 2
  return np.sort(squares, axis=1)[:, 1 : 1 + count].sum(axis=1)


@pytest.mark.parametrize('n_byzantine', [0, 1, 2, 4])
@pytest.mark.parametrize('n_selected', [1, 3])
def test_krum_takes_the_lowest_scores(n_byzantine, n_selected):
  weighting = mopt.krum(n_byzantine, n_selected)
  for seed in range(10):
    gradients = make_gradients(7, seed)
    scores = scores_of(gradients, n_byzantine)
    expected = np.zeros(7)
    expected[np.argsort(scores, kind='stable')[:n_selected]] = 1 / n_selected
    found = weighting(gramian_of(gradients))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('n_selected', [1, 4])
def test_krum_takes_none_of_those_who_lie(n_selected):
  rng = np.random.default_rng(0)
  honest = np.ones(5) + 0.1 * rng.normal(size=(5, 5))
  lies = np.array([1e4 * np.ones(5), -3 * honest.mean(axis=0)])
  gradients = np.concatenate([lies[:1], honest, lies[1:]])
  weights = mopt.krum(2, n_selected)(gramian_of(gradients))
  assert weights[0] == weights[-1] == 0
  assert weights.sum() == pytest.approx(1)
  # In another order it takes the same.
  order = rng.permutation(7)
  found = mopt.krum(2, n_selected)(gramian_of(gradients[order]))
  np.testing.assert_array_equal(found, np.asarray(weights)[order])


def test_krum_at_the_ends_of_its_range():
  gramian = gramian_of(make_gradients(7))
  expected = mopt.krum()(gramian)
  largest = float(np.diag(gramian).max())
  for largest_square in (3e38, 1e-30):
    scale = 2.0 ** np.floor(np.log2(largest_square / largest))
    np.testing.assert_array_equal(mopt.krum()(scale * gramian), expected)
  # Of equals the first.
  for equal in (jnp.zeros((4, 4)), jnp.ones((4, 4))):
    np.testing.assert_array_equal(mopt.krum()(equal), [1, 0, 0, 0])
  for bad in (np.nan, np.inf):
    assert np.isnan(mopt.krum()(gramian.at[0, 1].set(bad))).all()


def test_krum_under_vmap_and_in_both_precisions():
  gramians = jnp.stack([gramian_of(make_gradients(7, s)) for s in range(26)])
  found = jax.jit(jax.vmap(mopt.krum(2, 2)))(gramians)
  np.testing.assert_array_equal(found, [mopt.krum(2, 2)(g) for g in gramians])
  with jax.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64):
      assert mopt.krum()(jnp.eye(4, dtype=dtype)).dtype == dtype


def test_krum_needs_neighbours():
  with pytest.raises(
    ValueError, match=r'm >= n_byzantine \+ 3 = 5 gradients, got m = 4\.'
  ):
    mopt.krum(2)(jnp.eye(4))
  with pytest.raises(ValueError, match='m >= n_selected = 5 gradients'):
    mopt.krum(1, 5)(jnp.eye(4))
  with pytest.raises(ValueError, match='gramian must be'):
    mopt.krum()(jnp.ones(4))


@pytest.mark.parametrize(
  ('arguments', 'name'),
  [((-1,), 'n_byzantine'), ((1.5,), 'n_byzantine'), ((1, 0), 'n_selected')],
)
def test_krum_refuses_other_numbers(arguments, name):
  with pytest.raises(ValueError, match=f'{name} must be an integer >='):
    mopt.krum(*arguments)


# -- random -------------------------------------------------------------------


def test_random_weights_are_a_softmax_of_normal_numbers():
  weighting = mopt.random(KEY)

  def step(state, _):
    weights, state = weighting.update(jnp.eye(3), state)
    return state, weights

  _, weights = jax.lax.scan(step, weighting.init(3), length=4000)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
  assert (weights > 0).all()
  # Differences of logarithms are those of normal numbers.
  logs = np.log(np.asarray(weights, np.float64))
  for difference in (logs[:, 0] - logs[:, 1], logs[:, 1] - logs[:, 2]):
    assert difference.mean() == pytest.approx(0, abs=0.1)
    assert difference.var() == pytest.approx(2, abs=0.2)
  successive = np.corrcoef(logs[1:, 0], logs[:-1, 0])[0, 1]
  assert abs(successive) < 0.06


def test_random_weights_are_those_of_their_key():
  def first(key):
    weighting = mopt.random(key)
    return weighting.update(jnp.eye(3), weighting.init(3))[0]

  np.testing.assert_array_equal(first(KEY), first(KEY))
  assert (first(KEY) != first(jax.random.key(4))).all()
  with jax.enable_x64(True):
    for dtype in (jnp.float32, jnp.float64):
      weights, state = mopt.random(KEY).update(
        jnp.eye(2, dtype=dtype), mopt.random(KEY).init(2)
      )
      assert weights.dtype == dtype
      assert state.dtype == jnp.uint32
  with pytest.raises(ValueError, match='gramian must be'):
    mopt.random(KEY).update(jnp.ones(3), mopt.random(KEY).init(3))


def test_states_of_all_go_through_an_optimizer():
  """Nested, with Adam inside, under jit."""
  weighting = mopt.preferred(
    mopt.normalized(mopt.pcgrad(KEY), 'loss'), (1.0, 3.0)
  )
  tx = mopt.aggregate(weighting, optax.scale_by_adam())
  grad_fn = mopt.value_and_stacked_grad(
    lambda x: jnp.sum((x - 1) ** 2), lambda x: jnp.sum((x + 1) ** 2)
  )

  def step(carry, _):
    x, state = carry
    values, grads = grad_fn(x)
    updates, state = tx.update(grads, state, x, values=values)
    return (x - 0.01 * updates, state), values

  x = jnp.full(3, 5.0)
  start = tx.init(x)
  (_, end), values = jax.lax.scan(step, (x, start), length=20)
  assert (np.diff(values, axis=0) < 0).all()
  assert (end.weighting_state != start.weighting_state).any()
