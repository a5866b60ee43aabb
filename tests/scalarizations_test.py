"""Scalarizations: values, subgradients, and fronts that are not convex."""

import functools

from hypothesis import assume
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

import mopt
from mopt import search

# -- Values -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('values', 'weights', 'options', 'expected'),
  [
    ([1, 3], [2, 1], {}, 3),
    ([1, 3], [4, 1], {}, 4),
    ([1, 3], [2, 1], {'ideal': [0, 2]}, 2),
    ([1, 3], [2, 1], {'ideal': [3, 5]}, -2),  # above the values
    ([1, 3], [2, 1], {'rho': 0.1}, 3.5),
    ([1, 3], [2, 1], {'ideal': [0, 2], 'rho': 0.1}, 2.3),
    ([1.0, 3.0, 2.0], [0, 1, 2], {'rho': 1}, 11),
    ([-1.0, -3.0], [1, 1], {}, -1),
  ],
)
def test_chebyshev_by_hand(values, weights, options, expected):
  actual = mopt.chebyshev(values, weights, **options)
  assert actual.shape == ()
  assert actual == pytest.approx(expected)


@pytest.mark.parametrize(
  ('values', 'bounds', 'penalty', 'expected'),
  [
    ([1, 3], [5], 10, 1),  # within the bound
    ([1, 3], [3], 10, 1),  # on it
    ([1, 3], [2.5], 10, 6),
    ([1, 3], [2.5], 0, 1),
    ([1, 3, 7], [2, 8], 10, 11),
    ([1, 3, 7], [2, 5], 0.5, 2.5),
    ([1, 3, 7], [2, np.inf], 10, 11),
    ([-1, -3], [-4], 2, 1),
  ],
)
def test_epsilon_constraint_by_hand(values, bounds, penalty, expected):
  actual = mopt.epsilon_constraint(values, bounds, penalty)
  assert actual.shape == ()
  assert actual == pytest.approx(expected)


def test_a_value_that_is_nan_is_not_hidden():
  for values in ([np.nan, 1.0], [1.0, np.nan]):
    assert np.isnan(mopt.chebyshev(values, [0.5, 0.5]))
    assert np.isnan(mopt.epsilon_constraint(values, [2.0], 1.0))


# -- Gradients ----------------------------------------------------------------


def differences(function, values, step=1e-6):
  """Central finite differences, float64."""
  shifts = step * np.eye(len(values))
  return [
    (function(values + s) - function(values - s)) / (2 * step) for s in shifts
  ]


def vectors(m, low=-5.0, high=5.0):
  return hnp.arrays(np.float64, m, elements=st.floats(low, high, width=16))


@st.composite
def chebyshev_arguments(draw):
  m = draw(st.integers(2, 5))
  return (
    draw(vectors(m)),
    draw(vectors(m, 0.0)),
    draw(vectors(m)),
    draw(st.sampled_from([0.0, 1e-3, 0.5])),
  )


@given(chebyshev_arguments())
def test_gradient_of_chebyshev_against_differences(arguments):
  values, weights, ideal, rho = arguments

  def reference(values):
    terms = weights * (values - ideal)
    return terms.max() + rho * terms.sum()

  second, first = np.sort(weights * (values - ideal))[-2:]
  assume(first - second > 1e-3)  # away from the kink
  value, grad = jax.value_and_grad(mopt.chebyshev)(
    jnp.asarray(values, jnp.float32), weights, ideal, rho
  )
  np.testing.assert_allclose(value, reference(values), rtol=1e-5, atol=1e-4)
  expected = differences(reference, values)
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
  assert (grad >= 0).all()  # so that they are weights


@st.composite
def epsilon_arguments(draw):
  m = draw(st.integers(2, 5))
  return (
    draw(vectors(m)),
    draw(vectors(m - 1)),
    draw(st.sampled_from([0.0, 0.1, 30.0])),
  )


@given(epsilon_arguments())
def test_gradient_of_epsilon_constraint_against_differences(arguments):
  values, bounds, penalty = arguments

  def reference(values):
    return values[0] + penalty * np.maximum(0, values[1:] - bounds).sum()

  assume((abs(values[1:] - bounds) > 1e-3).all())
  value, grad = jax.value_and_grad(mopt.epsilon_constraint)(
    jnp.asarray(values, jnp.float32), bounds, penalty
  )
  np.testing.assert_allclose(value, reference(values), rtol=1e-5, atol=1e-4)
  expected = differences(reference, values)
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-4)
  assert (grad >= 0).all()


@pytest.mark.parametrize(
  ('values', 'weights', 'rho', 'expected'),
  [
    ([1.0, 2.0], [2.0, 1.0], 0.0, [1.0, 0.5]),
    ([1.0, 2.0], [2.0, 1.0], 0.5, [2.0, 1.0]),
    ([1.0, 1.0, 1.0], [3.0, 3.0, 3.0], 0.0, [1.0, 1.0, 1.0]),
    ([1.0, 1.0, 0.0], [3.0, 3.0, 3.0], 0.0, [1.5, 1.5, 0.0]),
    ([0.0, 0.0], [1.0, 3.0], 0.0, [0.5, 1.5]),
  ],
)
def test_equal_terms_share_the_gradient(values, weights, rho, expected):
  grad = jax.grad(mopt.chebyshev)(jnp.array(values), weights, rho=rho)
  np.testing.assert_allclose(grad, expected)


def test_a_bound_that_is_met_does_not_push():
  values = jnp.array([1.0, 2.0, 3.0, 4.0])
  bounds = [2.0, 2.5, np.inf]
  grad = jax.grad(mopt.epsilon_constraint)(values, bounds, 10.0)
  assert grad.tolist() == [1.0, 0.0, 10.0, 0.0]


# -- Traced and mapped --------------------------------------------------------


def test_chebyshev_is_mapped_and_compiled():
  values = jnp.array([1.0, 3.0, 2.0])
  weights = jnp.array([[1.0, 0.0, 2.0], [0.2, 0.5, 0.9]])
  each = jax.vmap(mopt.chebyshev, in_axes=(None, 0, None, None))
  ideal = jnp.array([0.0, 0.5, -1.0])
  expected = [mopt.chebyshev(values, w, ideal, 0.1) for w in weights]
  np.testing.assert_allclose(each(values, weights, ideal, 0.1), expected)
  compiled = jax.jit(each)(values, weights, ideal, 0.1)
  np.testing.assert_allclose(compiled, expected, rtol=1e-6)


def test_epsilon_constraint_is_mapped_and_compiled():
  values = jnp.array([1.0, 3.0, 2.0])
  bounds = jnp.array([[1.0, 0.0], [2.0, 5.0], [9.0, jnp.inf]])
  penalties = jnp.array([1.0, 0.0, 3.0])
  each = jax.vmap(mopt.epsilon_constraint, in_axes=(None, 0, 0))
  expected = [1.0 + 4.0, 1.0, 1.0]
  np.testing.assert_allclose(each(values, bounds, penalties), expected)
  np.testing.assert_allclose(jax.jit(each)(values, bounds, penalties), expected)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_gradient_has_the_dtype_of_the_values(dtype):
  values = jnp.array([1.0, 3.0], dtype)
  assert jax.grad(mopt.chebyshev)(values, [0.5, 0.25]).dtype == dtype
  assert jax.grad(mopt.epsilon_constraint)(values, [0.5], 2.0).dtype == dtype


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_values_decide_on_the_dtype_under_x64(transform):
  fine = 1 + 1e-9  # 1 in float32
  with jax.enable_x64(True):
    for dtype, expected in (
      (jnp.float32, jnp.float32),
      (jnp.bfloat16, jnp.float32),
      (jnp.float64, jnp.float64),
    ):
      values = jnp.asarray([fine, 3.0], dtype)
      for call in (
        lambda v: mopt.chebyshev(v, np.array([1.0, 0.1]), [0.0, 0.0], 0.5),
        lambda v: mopt.epsilon_constraint(v, [4.0], np.float64(2)),
      ):
        value, grad = transform(jax.value_and_grad(call))(values)
        assert (value.dtype, grad.dtype) == (expected, dtype)
    value = mopt.epsilon_constraint(jnp.array([fine, 3.0]), [3.0 - 1e-9], 10.0)
    np.testing.assert_allclose(value, fine + 1e-8, rtol=1e-15)
    assert mopt.chebyshev(jnp.array([fine, 0.0]), [1.0, 1.0]) == fine


# -- Bad input ----------------------------------------------------------------

PAIR = [1.0, 2.0]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: mopt.chebyshev(1.0, PAIR), r'values must be \[m\] .* shape \(\)'),
    (lambda: mopt.chebyshev([1.0], [1.0]), r'values must be .* shape \(1,\)'),
    (lambda: mopt.chebyshev(PAIR, 1.0), r'weights must be \[m\] .* \(\)'),
    (lambda: mopt.chebyshev(PAIR, [1, 2, 3]), r'weights .* \(2,\) .* \(3,\)'),
    (lambda: mopt.chebyshev(PAIR, [1, -2]), r'weights .* got \[1.0, -2.0\]'),
    (lambda: mopt.chebyshev(PAIR, [1, np.nan]), 'weights must be finite'),
    (lambda: mopt.chebyshev(PAIR, PAIR, 0.0), r'ideal .* \(2,\) .* \(\)'),
    (lambda: mopt.chebyshev(PAIR, PAIR, [0, np.inf]), 'ideal must be finite'),
    (lambda: mopt.chebyshev(PAIR, PAIR, rho=-1), 'rho must .* got -1'),
    (lambda: mopt.chebyshev(PAIR, PAIR, rho=np.nan), 'rho must be finite'),
    (lambda: mopt.chebyshev(PAIR, PAIR, rho=PAIR), r'rho .* scalar.* \(2,\)'),
    (lambda: mopt.epsilon_constraint([1.0], [], 1), r'values must be \[m\]'),
    (
      lambda: mopt.epsilon_constraint(PAIR, PAIR, 1),
      'bounds must have shape',
    ),
    (
      lambda: mopt.epsilon_constraint(PAIR, 1.0, 1),
      'bounds must have',
    ),
    (
      lambda: mopt.epsilon_constraint(PAIR, [np.nan], 1),
      r'bounds must be numbers or inf, got \[nan\]',
    ),
    (lambda: mopt.epsilon_constraint(PAIR, [-np.inf], 1), 'bounds must be'),
    (lambda: mopt.epsilon_constraint(PAIR, [1], -2.0), 'penalty .* got -2.0'),
    (lambda: mopt.epsilon_constraint(PAIR, [1], np.inf), 'penalty must be fin'),
    (lambda: mopt.epsilon_constraint(PAIR, [1], [1.0]), 'penalty .* scalar'),
    # Finite for Python, infinite in float32.
    (lambda: mopt.chebyshev(PAIR, [1, 1e39]), r'weights .* \[1.0, 1e[+]39\]'),
    (lambda: mopt.chebyshev(PAIR, PAIR, [0, -1e39]), 'ideal must be finite'),
    (lambda: mopt.chebyshev(PAIR, PAIR, rho=1e39), r'rho .* got 1e[+]39'),
    (lambda: mopt.epsilon_constraint(PAIR, [-1e39], 1), r'bounds .*-1e[+]39'),
    (lambda: mopt.epsilon_constraint(PAIR, [1], 1e39), r'penalty .*1e[+]39'),
  ],
)
def test_arguments_are_checked(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_what_is_known_is_checked_within_a_traced_function():
  bad = jax.jit(lambda values: mopt.chebyshev(values, [1.0, -1.0]))
  with pytest.raises(ValueError, match='weights must be finite and non-neg'):
    bad(jnp.ones(2))
  # What is traced is not known.
  assert jax.jit(mopt.chebyshev)(jnp.ones(2), jnp.array([1.0, -1.0])) == 1.0
  with pytest.raises(ValueError, match='weights must have shape'):
    jax.jit(mopt.chebyshev)(jnp.ones(2), jnp.ones(3))


# -- A front that is not convex -----------------------------------------------
#
# Fonseca and Fleming, 1995, with two variables. The Pareto set is the line
# between the two minima; with u in [0, 2] its length from the first one over
# the root of 2, the front is f1 = 1 - exp(-u^2), f2 = 1 - exp(-(2 - u)^2). It
# is concave but for u < 0.3 and u > 1.7.

CENTRE = 1 / np.sqrt(2)


def first(x):
  return 1.0 - jnp.exp(-jnp.sum((x - CENTRE) ** 2))


def second(x):
  return 1.0 - jnp.exp(-jnp.sum((x + CENTRE) ** 2))


def front(u):
  """The points `[..., 2]` of the front."""
  u = np.asarray(u, np.float64)
  return np.stack([-np.expm1(-(u**2)), -np.expm1(-((2 - u) ** 2))], axis=-1)


def place(x):
  """u of a point in the plane."""
  return 1 - np.asarray(x, np.float64).sum(axis=-1) / np.sqrt(2)


START = jnp.array([0.3, -0.4])  # not on the line, and nearer to the first
STEPS = 1500


def descend(objective):
  """Usage 1: any Optax optimizer on a scalar. `objective(x, parameter)`."""
  tx = optax.adam(optax.cosine_decay_schedule(0.02, STEPS))

  def solve(parameter, start=START):
    def step(carry, _):
      x, state = carry
      updates, state = tx.update(jax.grad(objective)(x, parameter), state)
      return (optax.apply_updates(x, updates), state), None

    return jax.lax.scan(step, (start, tx.init(start)), length=STEPS)[0][0]

  return solve


def descend_stacked(scalarization):
  """Usage 2: stacked gradients. `scalarization(values, parameter)`."""
  grad_fn = mopt.value_and_stacked_grad(first, second)

  def make_optimizer(weights):
    return optax.chain(
      mopt.aggregate(mopt.fixed_weights(weights)),
      optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.05, STEPS)),
    )

  def solve(parameter, start=START):
    def step(carry, _):
      x, state = carry
      values, grads = grad_fn(x)
      tx = make_optimizer(jax.grad(scalarization)(values, parameter))
      updates, state = tx.update(grads, state, x)
      return (optax.apply_updates(x, updates), state), None

    state = make_optimizer(jnp.ones(2)).init(start)
    return jax.lax.scan(step, (start, state), length=STEPS)[0][0]

  return solve


def values_of(x):
  return jnp.stack([first(x), second(x)])


def on_values(scalarization):
  return lambda x, parameter: scalarization(values_of(x), parameter)


augmented = functools.partial(mopt.chebyshev, rho=1e-3)
bounded = functools.partial(mopt.epsilon_constraint, penalty=5.0)
USAGES = pytest.mark.parametrize(
  'usage', [lambda s: descend(on_values(s)), descend_stacked]
)
RATIOS = np.geomspace(1 / 30, 30, 9)  # of the second weight to the first
BOUNDS = np.linspace(0.1, 0.9, 9)


def solve_chebyshev(usage, ratios, scalarization=augmented):
  """Points `[k, 2]` in the plane."""
  weights = np.stack([1 / (1 + ratios), ratios / (1 + ratios)], axis=1)
  return jax.jit(jax.vmap(usage(scalarization)))(
    jnp.asarray(weights, jnp.float32)
  )


def test_the_front_is_not_convex():
  u = np.linspace(0, 2, 2001)
  slopes = np.gradient(front(u)[:, 1], front(u)[:, 0])
  assert (np.diff(slopes[300:-300]) < 0).all()
  # It is the front: nothing on a grid of the plane dominates it.
  grid = np.stack(np.meshgrid(*2 * [np.linspace(-2, 2, 201)]), -1)
  f1, f2 = (
    -np.expm1(-((grid + sign * CENTRE) ** 2).sum(-1)).ravel()
    for sign in (-1, 1)
  )
  best = 1 - np.exp(-((2 - np.sqrt(-np.log1p(-f1))).clip(0) ** 2))
  assert (f2 >= best - 1e-12).all()


@pytest.mark.parametrize('weight', [0.02, 0.1, 0.3, 0.45, 0.5, 0.55, 0.8, 0.97])
def test_a_weighted_sum_finds_the_ends_only(weight):
  u = np.linspace(0, 2, 20_001)
  best = u[np.argmin(front(u) @ [1 - weight, weight])]
  assert min(best, 2 - best) < 0.05
  # Where descent ends too, even from the middle.
  objective = lambda x, w: jnp.dot(values_of(x), jnp.stack([1 - w, w]))
  x = jax.jit(descend(objective))(weight, jnp.array([1e-3, 0.0]))
  assert min(place(x), 2 - place(x)) < 0.5


@USAGES
def test_chebyshev_reaches_the_points_between(usage):
  x = solve_chebyshev(usage, RATIOS)
  # Where the ray f1 = ratio f2 meets the front.
  above_ray = lambda u, ratio: front(u) @ [1, -ratio]
  expected = [optimize.brentq(above_ray, 0, 2, args=r) for r in RATIOS]
  np.testing.assert_allclose(place(x), expected, atol=5e-3)
  found = np.array([values_of(each) for each in x])
  np.testing.assert_allclose(found, front(expected), atol=5e-3)
  # All along the front.
  assert np.ptp(found, axis=0).min() > 0.85
  assert np.diff(np.sort(found[:, 0])).max() < 0.3


@USAGES
def test_epsilon_constraint_reaches_the_points_between(usage):
  bounds = jnp.asarray(BOUNDS[:, None], jnp.float32)
  x = jax.jit(jax.vmap(usage(bounded)))(bounds)
  found = np.array([values_of(each) for each in x])
  np.testing.assert_allclose(found[:, 1], BOUNDS, atol=5e-3)
  expected = front(2 - np.sqrt(-np.log1p(-BOUNDS)))
  np.testing.assert_allclose(found, expected, atol=1e-2)


def test_a_penalty_is_exact_above_the_multiplier_and_not_below():
  bound = 0.5
  u = 2 - np.sqrt(-np.log1p(-bound))  # of the point with f2 = bound
  multiplier = u * np.exp(-(u**2)) / ((2 - u) * np.exp(-((2 - u) ** 2)))
  (f1,), (f2,) = np.diff(front([u - 1e-6, u + 1e-6]), axis=0).T
  assert multiplier == pytest.approx(-f1 / f2, rel=1e-5)

  def objective(x, penalty):
    return mopt.epsilon_constraint(values_of(x), [bound], penalty)

  # From within the bound, for multipliers grow beyond it.
  solve = jax.jit(descend(objective))
  start = jnp.array([-0.4, -0.3])
  assert second(start) < bound
  above = values_of(solve(1.5 * multiplier, start))
  np.testing.assert_allclose(above, front(u), atol=5e-3)
  below = values_of(solve(0.7 * multiplier, start))
  assert below[1] > 0.9


def test_rho_leaves_what_is_weakly_optimal():
  # Two points: the second is as good in f1 and better in f2.
  weak, better = jnp.array([1.0, 0.5]), jnp.array([1.0, 0.2])
  weights = [1.0, 1.0]
  assert mopt.chebyshev(weak, weights) == mopt.chebyshev(better, weights)
  assert mopt.chebyshev(weak, weights, rho=1e-3) > mopt.chebyshev(
    better, weights, rho=1e-3
  )


# -- Searches -----------------------------------------------------------------


def run(strategy, solve):
  state = strategy.init()
  while not strategy.done(state):
    weights = strategy.ask(state)
    state = strategy.tell(state, weights, solve(weights))
  return [trial.objectives for trial in state.trials]


def by_chebyshev(ratios):
  x = solve_chebyshev(lambda s: descend(on_values(s)), np.asarray(ratios))
  return [values_of(each).tolist() for each in x]


def by_weighted_sum(ratios):
  """The best weighted sums: of a dense sample of the front."""
  points = front(np.linspace(0, 2, 20_001))
  return [points[np.argmin(points @ [1, ratio])] for ratio in ratios]


@pytest.mark.parametrize(
  'strategy',
  [
    search.grid(1 / 30, 30, num=9),
    search.bisection(1 / 30, 30, levels=6, max_trials=10),
  ],
  ids=['grid', 'bisection'],
)
def test_a_search_over_weights_of_chebyshev_sees_the_whole_front(strategy):
  found = run(strategy, by_chebyshev)
  ends = run(strategy, by_weighted_sum)
  area = mopt.hypervolume(found, (1, 1))
  all_of_it = mopt.hypervolume(front(np.linspace(0, 2, 2001)), (1, 1))
  assert mopt.hypervolume(ends, (1, 1)) < 0.2 * all_of_it
  assert 0.6 * all_of_it < area <= all_of_it
  assert mopt.nondominated(found).all()
