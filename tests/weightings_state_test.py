"""Weightings with state: each rule again in float64, and what it promises."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt
from mopt.training import checkpoints

# As a user makes them, with defaults where there are any.
ALL = {
  'dwa': mopt.dwa(),
  'dwa_epochs': mopt.dwa(0.5, every=2),
  'every': mopt.every(mopt.min_norm_weights, 3),
  'famo': mopt.famo(),
  'gls': mopt.gls(),
  'gradnorm': mopt.gradnorm(),
  'imtl_l': mopt.imtl_l(),
  'modo': mopt.modo(0.02),
  'random_loss': mopt.random_loss(),
  'sdmgrad': mopt.sdmgrad(),
  'smoothed': mopt.smoothed(mopt.min_norm_weights),
  'smoothed_dwa': mopt.smoothed(mopt.dwa(), 0.5),
  'stch': mopt.stch(),
  'uncertainty': mopt.uncertainty(),
}
NEED_VALUES = {
  *('dwa', 'dwa_epochs', 'famo', 'gls', 'gradnorm', 'imtl_l'),
  *('smoothed_dwa', 'stch', 'uncertainty'),
}
# Those that look at the gradients.
NEED_GRAMIAN = {'every', 'gradnorm', 'modo', 'sdmgrad', 'smoothed'}
each = pytest.mark.parametrize('name', ALL)


class Steps(NamedTuple):
  gramians: np.ndarray  # [steps, m, m]
  values: np.ndarray  # [steps, m]


def make_steps(m=3, num_steps=6, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  grads = rng.normal(size=(num_steps, m, 2 * m)) * np.arange(1, m + 1)[:, None]
  gramians = scale**2 * grads @ grads.swapaxes(1, 2)
  values = rng.uniform(0.1, 3.0, size=(num_steps, m))
  return Steps(np.float32(gramians), np.float32(values))


@functools.cache
def step_of(weighting):
  """A step as a program that all tests share."""

  def step(state, gramian, values):
    weights, state = weighting.update(gramian, state, values=values)
    return state, weights

  return jax.jit(step)


def run(weighting, steps):
  """Weights of every step, and the last state."""
  step, state = step_of(weighting), weighting.init(steps.values.shape[1])
  found = []
  for gramian, values in zip(*steps):
    state, weights = step(state, gramian, values)
    found.append(weights)
  return np.stack(found), state


def run_many(weighting, steps):
  """Weights of every step, of many."""

  @jax.jit
  def scan(steps):
    body = lambda state, step: step_of(weighting)(state, *step)
    state = weighting.init(steps.values.shape[1])
    return jax.lax.scan(body, state, steps)[1]

  return np.asarray(scan(Steps(*map(jnp.asarray, steps))))


# -- The rules again, in float64 ----------------------------------------------


def project(vector):
  """Onto the simplex, by bisection of the shift."""
  low, high = vector.min() - 1, vector.max()
  for _ in range(200):
    middle = (low + high) / 2
    if np.maximum(vector - middle, 0).sum() > 1:
      low = middle
    else:
      high = middle
  return np.maximum(vector - high, 0)


def softmax(logits):
  powers = np.exp(logits - logits.max())
  return powers / powers.sum()


def adam(gradients, start, rate=0.025, decay=0.0, after=lambda x: x):
  """Yields the parameters before each step; sends get gradients back."""
  x, mu, nu = start, 0.0, 0.0
  for t in itertools.count(1):
    gradient = gradients(x) + decay * x
    mu = 0.9 * mu + 0.1 * gradient
    nu = 0.999 * nu + 0.001 * gradient**2
    step = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
    x = after(x - rate * step)
    yield x


def rule_dwa(steps, temperature=2.0, every=1):
  losses = steps.values.reshape(-1, every, steps.values.shape[1]).mean(axis=1)
  for t in range(len(steps.values)):
    period = t // every
    if period < 2:
      yield np.ones(losses.shape[1])
    else:
      rates = losses[period - 1] / losses[period - 2]
      yield losses.shape[1] * softmax(rates / temperature)


def rule_stch(steps, mu=0.1):
  for values in steps.values:
    m = len(values)
    yield softmax(values / m / mu) / m


def rule_gls(steps):
  for values in steps.values:
    yield np.prod(values) ** (1 / len(values)) / len(values) / values


def rule_uncertainty(steps):
  s = np.zeros(steps.values.shape[1])
  values = iter(steps.values)
  learnt = adam(lambda s: 0.5 - 0.5 * np.exp(-s) * next(values), s)
  for _ in steps.values:
    yield 0.5 * np.exp(-s)
    s = next(learnt)


def rule_imtl_l(steps):
  s = np.zeros(steps.values.shape[1])
  values = iter(steps.values)
  learnt = adam(lambda s: np.exp(s) * next(values) - 1, s)
  for _ in steps.values:
    yield np.exp(s)
    s = next(learnt)


def rule_famo(steps):
  def gradient(xi):
    before, after = next(pairs)
    z = softmax(xi)
    jacobian = np.diag(z) - np.outer(z, z)
    return jacobian @ (np.log(before) - np.log(after))

  xi = np.zeros(steps.values.shape[1])
  pairs = itertools.pairwise(steps.values)
  learnt = adam(gradient, xi, decay=0.001)
  for t, values in enumerate(steps.values):
    xi = next(learnt) if t else xi
    parts = softmax(xi) / values
    yield parts / parts.sum()


def rule_gradnorm(steps, alpha=1.5):
  def gradient(weights):
    gramian, values = next(both)
    rates = values / steps.values[0]
    lengths = np.sqrt(np.diag(gramian))
    targets = (weights * lengths).mean() * (rates / rates.mean()) ** alpha
    return np.sign(weights * lengths - targets) * lengths

  weights = np.ones(steps.values.shape[1])
  both = iter(zip(*steps))
  learnt = adam(gradient, weights, after=lambda w: w * len(w) / w.sum())
  for _ in steps.values:
    yield weights
    weights = next(learnt)


def rule_modo(steps, step_size=0.02):
  weights = np.full(steps.values.shape[1], 1 / steps.values.shape[1])
  for gramian in steps.gramians:
    weights = project(weights - step_size * gramian @ weights)
    yield weights


def rule_sdmgrad(steps, weight=0.3):
  preferred = np.full(steps.values.shape[1], 1 / steps.values.shape[1])
  point = preferred
  for gramian in steps.gramians:
    rate = 1 / np.trace(gramian)
    for _ in range(20):
      point = project(point - rate * gramian @ (point + weight * preferred))
    yield (point + weight * preferred) / (1 + weight)


def rule_smoothed(steps):
  average = np.full(steps.values.shape[1], 1 / steps.values.shape[1])
  for gramian in steps.gramians:
    found = np.asarray(mopt.min_norm_weights(gramian), np.float64)
    average = 0.9 * average + 0.1 * found
    yield average


def rule_smoothed_dwa(steps):
  average = np.full(steps.values.shape[1], 1 / steps.values.shape[1])
  for found in rule_dwa(steps):
    average = (average + found) / 2
    yield average


def rule_every(steps):
  for t in range(len(steps.gramians)):
    yield np.asarray(mopt.min_norm_weights(steps.gramians[t - t % 3]))


RULES = {
  'dwa': rule_dwa,
  'dwa_epochs': lambda steps: rule_dwa(steps, 0.5, every=2),
  'every': rule_every,
  'famo': rule_famo,
  'gls': rule_gls,
  'gradnorm': rule_gradnorm,
  'imtl_l': rule_imtl_l,
  'modo': rule_modo,
  'sdmgrad': rule_sdmgrad,
  'smoothed': rule_smoothed,
  'smoothed_dwa': rule_smoothed_dwa,
  'stch': rule_stch,
  'uncertainty': rule_uncertainty,
}


def in_float64(steps):
  return Steps(*(x.astype(np.float64) for x in steps))


@pytest.mark.parametrize('m', [2, 3])
@pytest.mark.parametrize('name', RULES)
def test_six_steps_are_those_of_the_rule(name, m):
  steps = make_steps(m)
  found, _ = run(ALL[name], steps)
  expected = np.stack(list(RULES[name](in_float64(steps))))
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
  # No rule is that of equal weights.
  assert np.ptp(found, axis=1).max() > 1e-2


def test_all_but_the_random_one_are_compared():
  assert ALL.keys() - RULES.keys() == {'random_loss'}


def test_random_weights_are_the_softmax_of_normal_numbers():
  many = make_steps(3, 2000)
  found = run_many(mopt.random_loss(), many)
  np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
  # Differences of their logarithms are normal, of variance 2.
  difference = np.log(found[:, 0]) - np.log(found[:, 1])
  assert abs(difference.mean()) < 4 * np.sqrt(2 / 2000)
  assert abs(difference.var() - 2) < 4 * 2 * np.sqrt(2 / 2000)
  assert abs(np.corrcoef(difference[1:], difference[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize('make', [jax.random.key, jax.random.PRNGKey])
def test_random_weights_are_those_of_the_key(make):
  steps = make_steps(3, 4)
  default, _ = run(mopt.random_loss(), steps)
  same, _ = run(mopt.random_loss(make(0)), steps)
  other, _ = run(mopt.random_loss(make(1)), steps)
  np.testing.assert_array_equal(default, same)
  assert (default != other).all()
  assert len(np.unique(default)) == default.size


# -- Arguments of each --------------------------------------------------------


def last(weighting, steps, **extra):
  state, update = weighting.init(steps.values.shape[1]), weighting.update
  update = jax.jit(update)
  for gramian, values in zip(*steps):
    weights, state = update(gramian, state, values=values, **extra)
  return np.asarray(weights)


def test_a_second_batch_takes_the_place_of_the_gramian():
  steps = make_steps(3, 1)
  rng = np.random.default_rng(1)
  cross = np.float32(rng.normal(size=(3, 3)))  # not symmetric
  thirds = np.full(3, 1 / 3)
  found = last(mopt.modo(0.3, regularization=0.5), steps, cross_gramian=cross)
  expected = project(thirds - 0.3 * (cross @ thirds + 0.5 * thirds))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

  preferences = np.array([0.0, 1.0, 3.0])
  weighting = mopt.sdmgrad(
    regularization=2.0, preferences=preferences, step_size=0.5, num_steps=2
  )
  found = last(weighting, steps, cross_gramian=cross)
  point, preferred = thirds, preferences / 4
  for _ in range(2):
    rate = 0.5 / np.trace(steps.gramians[0].astype(np.float64))
    point = project(point - rate * cross @ (point + 2 * preferred))
  expected = (point + 2 * preferred) / 3
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('make', [lambda: mopt.modo(0.1), mopt.sdmgrad])
def test_a_second_batch_through_an_optimizer(make):
  # Also beside values and what another transformation asks for.
  tx = mopt.aggregate(make())
  params, grads = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
  update = jax.jit(tx.update)
  cross = jnp.array([[4.0, 0.0], [0.0, 1.0]])
  _, plain = update(grads, tx.init(params), params)
  _, other = update(
    grads, tx.init(params), params, cross_gramian=cross, value=1.0
  )
  assert plain.weights[0] > 0.5 > other.weights[0]
  with pytest.raises(ValueError, match=r'\[2, 2\], inner.* shape \(3, 3\)'):
    update(grads, tx.init(params), params, cross_gramian=jnp.eye(3))


def test_without_a_second_batch_noisy_gradients_get_too_little_weight():
  # Two gradients of length 1, at a right angle: weights are equal. The second
  # one has noise of variance 4; its weight is 1 / (1 + 5) of biased products.
  rng = np.random.default_rng(0)
  rows = np.eye(2, 8)[None, None].repeat(4000, 0).repeat(2, 1)
  rows[:, :, 1] += np.sqrt(4 / 8) * rng.normal(size=(4000, 2, 8))
  one, two = jnp.float32(rows[:, 0]), jnp.float32(rows[:, 1])
  weighting = mopt.modo(0.005)

  @jax.jit
  def average(second):
    def body(state, pair):
      a, b = pair
      weights, state = weighting.update(a @ a.T, state, cross_gramian=a @ b.T)
      return state, weights

    return jax.lax.scan(body, weighting.init(2), (one, second))[1].mean(axis=0)

  np.testing.assert_allclose(average(two), 1 / 2, atol=0.05)
  np.testing.assert_allclose(average(one), [5 / 6, 1 / 6], atol=0.05)


def test_many_small_steps_end_at_the_minimum():
  gramian = make_steps(4, 1).gramians[0]
  same = Steps(gramian[None].repeat(3000, 0), np.ones((3000, 4), np.float32))
  rate = 1 / np.trace(gramian)
  expected = mopt.min_norm_weights(gramian)
  for weighting in (mopt.modo(rate), mopt.sdmgrad(regularization=0.0)):
    found = run_many(weighting, same)
    np.testing.assert_allclose(found[-1], expected, atol=1e-4)


def test_a_large_regularization_is_the_preference():
  preferences = np.array([1.0, 5.0, 2.0])
  steps = make_steps(3, 3)
  weighting = mopt.sdmgrad(regularization=1e6, preferences=preferences)
  np.testing.assert_allclose(last(weighting, steps), preferences / 8, atol=1e-5)
  weighting = mopt.sdmgrad(regularization=1e38)
  np.testing.assert_allclose(last(weighting, steps), 1 / 3, atol=1e-5)


def test_the_smooth_maximum_is_differentiated():
  values = jnp.array([0.7, -0.4, 1.1])
  preferences, ideal, mu = jnp.array([0.5, 0.3, 0.2]), jnp.float32(-2.0), 0.05

  def smooth(values):
    terms = preferences * (values - ideal) / mu
    return mu * jax.scipy.special.logsumexp(terms)

  weighting = mopt.stch(mu, preferences=10 * preferences, ideal=ideal)
  found, _ = weighting.update(jnp.eye(3), (), values=values)
  np.testing.assert_allclose(found, jax.grad(smooth)(values), rtol=1e-5)
  # A small mu gives the maximum itself.
  sharp = mopt.stch(1e-6, preferences=preferences, ideal=ideal)
  found, _ = sharp.update(jnp.eye(3), (), values=values)
  slope = jax.grad(mopt.chebyshev)
  expected = slope(values, preferences, ideal=jnp.full(3, ideal), rho=0.0)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_geometric_mean_is_differentiated():
  values = jnp.array([0.7, 3.0, 1e-3])
  mean = lambda values: jnp.prod(values) ** (1 / 3)
  found, _ = mopt.gls().update(jnp.eye(3), (), values=values)
  np.testing.assert_allclose(found, jax.grad(mean)(values), rtol=1e-5)


def test_a_minimum_is_taken_off():
  steps = make_steps(3)
  moved = steps._replace(values=steps.values - np.float32([2, 0, 5]))
  found, _ = run(mopt.famo(minimum=(-2.0, 0.0, -5.0)), moved)
  np.testing.assert_allclose(found, run(mopt.famo(), steps)[0], rtol=1e-4)


@pytest.mark.parametrize('name', ['uncertainty', 'imtl_l', 'famo', 'gradnorm'])
def test_any_optimizer_may_learn(name):
  # One that needs the parameters, one with a schedule, one of a single number.
  make = getattr(mopt, name)
  steps = make_steps(3)
  plain, _ = run(make(), steps)
  schedule = optax.cosine_decay_schedule(0.1, 100)
  for optimizer in (optax.adamw(0.1), optax.sgd(schedule), optax.sgd(0.1)):
    found, _ = run(make(optimizer=optimizer), steps)
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-6)
    assert np.isfinite(found).all()
    assert np.abs(found[-1] - plain[-1]).max() > 1e-4


def test_lengths_are_even_if_alpha_is_zero():
  gramian = np.diag([1e4, 1.0, 1e-2]).astype(np.float32)
  same = Steps(gramian[None].repeat(3000, 0), np.ones((3000, 3), np.float32))
  schedule = optax.cosine_decay_schedule(0.01, 3000)
  found = run_many(mopt.gradnorm(0.0, optax.adam(schedule)), same)
  lengths = found[-1] * np.sqrt(np.diag(gramian))
  np.testing.assert_allclose(lengths, lengths.mean(), rtol=0.05)


# -- What it may depend on ----------------------------------------------------


@pytest.mark.parametrize('name', sorted(ALL.keys() - {'random_loss'}))
def test_order_does_not_matter(name):
  order = np.array([2, 0, 1])
  steps = make_steps(3)
  turned = Steps(steps.gramians[:, order][:, :, order], steps.values[:, order])
  found, _ = run(ALL[name], turned)
  np.testing.assert_allclose(
    found, run(ALL[name], steps)[0][:, order], rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  'name', ['dwa', 'every', 'gls', 'famo', 'gradnorm', 'smoothed', 'sdmgrad']
)
def test_the_scale_of_all_objectives_does_not_matter(name):
  steps = make_steps(3)
  scaled = Steps(4**2 * steps.gramians, 4 * steps.values)
  found, _ = run(ALL[name], scaled)
  expected, _ = run(ALL[name], steps)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['gls', 'famo'])
def test_the_direction_does_not_depend_on_each_scale(name):
  scale = np.float32([10.0, 1.0, 0.01])
  steps = make_steps(3)
  found, _ = run(ALL[name], steps._replace(values=steps.values * scale))
  # Weights times gradients, which have the scale of the losses.
  direction, expected = found * scale, run(ALL[name], steps)[0]
  direction /= direction.sum(axis=1, keepdims=True)
  expected = expected / expected.sum(axis=1, keepdims=True)
  np.testing.assert_allclose(direction, expected, rtol=1e-3)


# -- Zero, negative, not finite ------------------------------------------------


@each
def test_losses_of_zero_are_finite_or_nan(name):
  steps = make_steps(3)
  steps.values[2:4, 1] = 0
  steps.values[4] = 0
  found, state = run(ALL[name], steps)
  if name == 'gls':
    assert np.isnan(found[2:5]).all()
    found = found[[0, 1, 5]]
  assert np.isfinite(found).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_what_zeros_mean():
  steps = make_steps(2, 7)
  steps.values[:] = 1
  steps.values[2:4, 0] = 0  # falls to 0, stays there, and rises from it
  found, _ = run(mopt.dwa(), steps)
  share = 2 * softmax(np.array([0.0, 0.5]))
  expected = [[1, 1]] * 3 + [share, [1, 1], [2, 0], [1, 1]]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  found, _ = run(mopt.famo(), steps)
  np.testing.assert_allclose(found[2:4], [[1, 0]] * 2, atol=1e-6)
  # A loss that stays at 0: the weight grows and stays finite.
  steps = make_steps(2, 20)
  steps.values[:, 0] = 0
  for weighting in (mopt.uncertainty, mopt.imtl_l):
    found, _ = run(weighting(optax.sgd(10.0)), steps)
    assert (np.diff(found[:4, 0]) > 0).all()
    assert found[-1, 0] > 1e25
    assert np.isfinite(found).all()


@pytest.mark.parametrize('value', [-1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('name', sorted(NEED_VALUES))
def test_bad_losses_give_nan_and_the_state_stays(name, value):
  steps = make_steps(3, 5)
  good, state = run(ALL[name], steps)
  bad = steps._replace(values=steps.values.copy())
  bad = Steps(*(np.insert(x, 3, x[2], axis=0) for x in bad))
  bad.values[3, 1] = value
  found, bad_state = run(ALL[name], bad)
  if name == 'stch' and value == -1:
    assert np.isfinite(found).all()
    return
  assert np.isnan(found[3]).all()
  np.testing.assert_array_equal(np.delete(found, 3, axis=0), good)
  jax.tree.map(np.testing.assert_array_equal, bad_state, state)


def test_a_loss_that_is_too_large_leaves_no_trace():
  for make in (mopt.imtl_l, mopt.uncertainty):
    weighting = make(optax.sgd(5.0))
    steps = make_steps(2, 4)
    steps.values[:] = 1e-3  # so that weights grow
    steps.values[2] = 3e38
    found, state = run(weighting, steps)
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[[0, 1, 3]]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@each
def test_a_gramian_that_is_not_finite(name, value):
  steps = make_steps(3, 5)
  good, state = run(ALL[name], steps)
  # As the fourth one, with which `every` solves.
  bad = Steps(*(np.insert(x, 3, x[2], axis=0) for x in steps))
  bad.gramians[3, 1, 2] = value
  found, bad_state = run(ALL[name], bad)
  if name not in NEED_GRAMIAN:  # they do not look at it
    assert np.isfinite(found).all()
    return
  assert np.isnan(found[3]).all()
  np.testing.assert_array_equal(np.delete(found, 3, axis=0), good)
  jax.tree.map(np.testing.assert_array_equal, bad_state, state)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_second_batch_that_is_not_finite(value):
  cross = jnp.eye(2).at[0, 1].set(value)
  for weighting in (mopt.modo(0.1), mopt.sdmgrad()):
    state = weighting.init(2)
    weights, after = jax.jit(weighting.update)(
      jnp.eye(2), state, cross_gramian=cross
    )
    assert np.isnan(weights).all()
    np.testing.assert_array_equal(after.point, state.point)


def test_gradients_that_are_zero():
  steps = make_steps(3, 4)
  steps.gramians[:] = 0
  for name in NEED_GRAMIAN - {'every', 'smoothed'}:
    found, state = run(ALL[name], steps)
    assert np.isfinite(found).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# -- Refused -------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(NEED_VALUES))
def test_what_needs_values_says_so(name):
  tx = mopt.aggregate(ALL[name])
  params, grads = jnp.zeros(2), jnp.eye(2)
  state = tx.init(params)
  update = functools.partial(jax.eval_shape, tx.update, grads, state, params)
  with pytest.raises(ValueError, match=r'needs the values .*values=values'):
    update()
  # The value of Optax is another one.
  with pytest.raises(ValueError, match=r'needs the values'):
    update(value=1.0)
  with pytest.raises(ValueError, match=r'values must be \[2\], got shape \(3'):
    update(values=jnp.ones(3))
  update(values=jnp.array([1, 2]))  # they may be integers


@pytest.mark.parametrize('name', sorted(ALL.keys() - NEED_VALUES))
def test_what_needs_no_values_gets_none(name):
  tx = mopt.aggregate(ALL[name])
  params, grads = jnp.zeros(2), jnp.eye(2)
  _, state = jax.jit(tx.update)(grads, tx.init(params), params)
  assert np.isfinite(state.weights).all()


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (
      lambda: mopt.smoothed(mopt.mean, 1.0),
      'decay must be .* less than 1, got',
    ),
    (lambda: mopt.smoothed(mopt.mean, -0.1), 'decay must be .* got -0.1'),
    (lambda: mopt.smoothed(mopt.mean, (0, 0)), r'decay .* one number.*\(2,\)'),
    (lambda: mopt.smoothed(0.5), 'weighting must be a function'),
    (lambda: mopt.every(mopt.mean, 0), 'n must be an integer >= 1, got 0'),
    (lambda: mopt.every(mopt.mean, 2.0), 'n must be an integer >= 1, got 2.0'),
    (lambda: mopt.every('mean', 2), 'weighting must be a function'),
    (lambda: mopt.modo(0), 'step_size must be finite and positive, got 0'),
    (lambda: mopt.modo(np.nan), 'step_size must be .* got nan'),
    (lambda: mopt.modo('0.1'), "step_size must be a number, got '0.1'"),
    (
      lambda: mopt.modo(1, regularization=-1),
      'regularization must be .* non-neg',
    ),
    (lambda: mopt.sdmgrad(regularization=np.inf), 'regularization .* got inf'),
    (lambda: mopt.sdmgrad(step_size=-1), 'step_size must be finite'),
    (lambda: mopt.sdmgrad(num_steps=0), 'num_steps must be an integer >= 1'),
    (lambda: mopt.sdmgrad(preferences=(1, -1)), 'preferences .* non-negative'),
    (lambda: mopt.sdmgrad(preferences=(0, 0)), 'must not all be 0'),
    (lambda: mopt.sdmgrad(preferences=(1,)), r'\[m\] with m >= 2, .* \(1,\)'),
    (lambda: mopt.dwa(0.0), 'temperature must be finite and positive'),
    (lambda: mopt.dwa(every=0), 'every must be an integer >= 1, got 0'),
    (lambda: mopt.stch(-1.0), 'mu must be finite and positive, got -1.0'),
    (lambda: mopt.stch(1e39), r'mu must be .* got 1e\+39'),  # inf in float32
    (lambda: mopt.stch(preferences=(np.nan, 1)), 'preferences must be finite'),
    (lambda: mopt.stch(preferences=1.0), r'preferences .* shape \(\)'),
    (lambda: mopt.stch(ideal=(0, np.inf)), 'ideal must be finite'),
    (lambda: mopt.stch(ideal=np.ones((2, 2))), r'ideal must be a number or'),
    (lambda: mopt.famo(minimum=np.nan), 'minimum must be finite, got nan'),
    (lambda: mopt.famo(0.025), 'optimizer must be an optax.Gradient.* 0.025'),
    (lambda: mopt.uncertainty(optax.adam), 'optimizer must be'),
    (lambda: mopt.imtl_l('adam'), 'optimizer must be'),
    (lambda: mopt.gradnorm(-1.0), 'alpha must be finite and non-negative, got'),
    (lambda: mopt.gradnorm(optimizer=1), 'optimizer must be'),
    (lambda: mopt.random_loss(0), 'key must be one random key'),
    (
      lambda: mopt.random_loss(jax.random.split(jax.random.key(0))),
      'one random',
    ),
  ],
)
def test_arguments_are_checked(make, match):
  with pytest.raises(ValueError, match=match):
    make()


def test_vectors_of_another_length_are_refused():
  values = jnp.ones(3)
  for weighting, name in (
    (mopt.stch(preferences=(1, 1)), 'preferences'),
    (mopt.stch(ideal=(0, 0)), 'ideal'),
    (mopt.famo(minimum=(0, 0)), 'minimum'),
    (mopt.sdmgrad(preferences=(1, 1)), 'preferences'),
  ):
    with pytest.raises(ValueError, match=rf'{name} must be \[3\] .* \(2,\)'):
      weighting.update(jnp.eye(3), weighting.init(3), values=values)


@pytest.mark.parametrize('wrap', [mopt.smoothed, lambda w: mopt.every(w, 2)])
def test_what_is_wrapped_must_return_weights(wrap):
  weighting = wrap(lambda gramian: gramian)
  with pytest.raises(ValueError, match=r'must return \[2\] weights'):
    weighting.update(jnp.eye(2), weighting.init(2))


def test_hyperparameters_may_be_traced():
  steps = make_steps(2, 4)
  makers = {
    'smoothed': lambda x: mopt.smoothed(mopt.min_norm_weights, x),
    'modo': mopt.modo,
    'sdmgrad': lambda x: mopt.sdmgrad(
      regularization=x, preferences=jnp.stack([x, 1 - x])
    ),
    'dwa': mopt.dwa,
    'stch': lambda x: mopt.stch(x, preferences=jnp.stack([x, 1 - x])),
    'gradnorm': mopt.gradnorm,
    'famo': lambda x: mopt.famo(minimum=-x),
  }

  @jax.jit
  def together(xs):
    def one(x):
      found = {}
      for name, make in makers.items():
        weighting = make(x)
        state = weighting.init(2)
        for gramian, values in zip(*steps):
          weights, state = weighting.update(
            jnp.asarray(gramian), state, values=jnp.asarray(values)
          )
        found[name] = weights
      return found

    return jax.vmap(one)(xs)

  xs = np.float32([0.1, 0.6])
  found = together(xs)
  for name, make in makers.items():
    for index, x in enumerate(xs):
      expected = last(make(float(x)), steps)
      np.testing.assert_allclose(
        found[name][index], expected, rtol=1e-4, atol=1e-5
      )


# -- The state -----------------------------------------------------------------


@pytest.mark.parametrize('has_x64', [False, True], ids=['', 'x64'])
@each
def test_states_are_arrays_of_fixed_types(name, has_x64):
  weighting = ALL[name]
  with jax.enable_x64(has_x64):
    dtype = jnp.float64 if has_x64 else jnp.float32
    before = weighting.init(3)
    after, weights = jax.eval_shape(
      step_of(weighting), before, jnp.eye(3, dtype=dtype), jnp.ones(3, dtype)
    )
    allowed = {jnp.float32, jnp.int32, jnp.uint32, jnp.bool_}
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
      assert isinstance(x, jax.Array)
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.dtype in [jnp.dtype(d) for d in allowed]
    assert weights.shape == (3,)


@each
def test_names_in_the_state_do_not_hide_the_last_weights(name):
  tx = mopt.aggregate(ALL[name])
  state = tx.init(jnp.zeros(2))
  assert optax.tree.get(state, 'weights').shape == (2,)


def test_in_between_the_solver_is_not_run():
  calls = []

  def counted(gramian):
    jax.debug.callback(lambda: calls.append(None))
    return mopt.mean(gramian)

  run(mopt.every(counted, 4), make_steps(2, 10))
  jax.effects_barrier()
  assert len(calls) == 3


def test_new_weights_that_are_not_finite_are_asked_for_anew():
  steps = make_steps(2, 6)
  broken = steps._replace(gramians=steps.gramians.copy())
  broken.gramians[:2] = np.nan
  found, _ = run(mopt.every(mopt.upgrad, 3), broken)
  assert np.isnan(found[:2]).all()
  for row, t in zip(found[2:], [2, 2, 2, 5]):
    expected = mopt.upgrad(steps.gramians[t])
    np.testing.assert_allclose(row, expected, rtol=1e-6)


def test_wrappers_pass_values_on_and_may_wrap_each_other():
  steps = make_steps(3, 6)
  found, _ = run(mopt.every(mopt.smoothed(mopt.gls(), 0.5), 2), steps)
  average = np.full(3, 1 / 3)
  expected = list(rule_gls(in_float64(steps)))
  for t in range(0, 6, 2):
    average = (average + expected[t]) / 2
    np.testing.assert_allclose(found[t], average, rtol=1e-5)
    np.testing.assert_array_equal(found[t], found[t + 1])


def test_losses_alone_leave_the_gramian_out():
  # What the compiler leaves of products of long gradients.
  def cost(name):
    tx = mopt.aggregate(ALL[name], num_objectives=3)
    params, grads = jnp.zeros(10_000), jnp.ones((3, 10_000))
    update = lambda g, s, v: tx.update(g, s, params, values=v)[0]
    args = grads, tx.init(params), jnp.ones(3)
    return jax.jit(update).lower(*args).compile().cost_analysis()['flops']

  assert cost('famo') < cost('modo') - 100_000


class Around(NamedTuple):
  params: jax.Array
  opt_state: optax.OptState


def make_optimizer(name, inner):
  return optax.chain(
    mopt.aggregate(ALL[name], inner, num_objectives=3),
    optax.scale_by_learning_rate(0.05),
    optax.contrib.reduce_on_plateau(patience=1, rtol=0.5),
  )


@pytest.mark.parametrize('has_adam', [False, True], ids=['sgd', 'adam'])
@each
def test_a_restored_state_goes_on_as_if_nothing_had_been(
  name, has_adam, tmp_path
):
  """Beside Optax's own value, which is one number. Orbax takes its time."""
  tx = make_optimizer(name, optax.scale_by_adam() if has_adam else None)
  wishes = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
  values_of = lambda params: 0.1 + jnp.sum((params[None] - wishes) ** 2, axis=1)

  @jax.jit
  def step(params, state):
    values, grads = values_of(params), jax.jacrev(values_of)(params)
    updates, state = tx.update(
      grads, state, params, values=values, value=values.sum()
    )
    return Around(optax.apply_updates(params, updates), state)

  start = Around(jnp.array([4.0, -3.0]), tx.init(jnp.zeros(2)))
  at_five = start
  for _ in range(5):
    at_five = step(*at_five)
  whole = at_five
  for _ in range(4):
    whole = step(*whole)
  with checkpoints.Checkpoints(tmp_path, 0) as saved:
    saved.save(5, jax.device_get(at_five), 0.0)
  _, restored = checkpoints.restore(
    tmp_path, jax.device_get(start), pytest.fail
  )
  resumed = Around(*jax.tree.map(jnp.asarray, tuple(restored)))
  for _ in range(4):
    resumed = step(*resumed)
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  scale = optax.tree.get(whole, 'ReduceLROnPlateauState').scale
  assert 0 < scale < 1  # it has noticed
  assert (whole.params != at_five.params).any()
