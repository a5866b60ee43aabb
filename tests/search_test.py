"""Searches for knees, on fronts that are known."""

import itertools
import json

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt
from mopt import search

KNEE = 3e-4


def hyperbola(weight, knee=KNEE):
  """Minimises f1 + weight f2 on a front with a corner where f1' = -knee.

  f2 = s in [-3, 3] and f1 = knee (sqrt(s^2 + 1) - s). The chord between the
  ends has that slope too, so it is the knee by Das' rule.
  """
  u = 1 - weight / knee
  s = 3.0 if u >= 1 else -3.0 if u <= -1 else u / np.sqrt(1 - u * u)
  s = min(max(s, -3.0), 3.0)
  return knee * (np.sqrt(s * s + 1) - s), s


def exponential(weight):
  """Minimises f1 + weight f2 for f1 = exp(-s), f2 = 1000 s, s in [0, 12]."""
  s = min(max(-np.log(max(1000 * weight, 1e-300)), 0.0), 12.0)
  return np.exp(-s), 1000 * s


def knee_of(solve, low, high):
  """The weight of the knee among very many."""
  weights = np.geomspace(low, high, 20_001)
  return weights[mopt.knee([solve(w) for w in weights])]


def run(strategy, solve):
  state = strategy.init()
  while not strategy.done(state):
    weights = strategy.ask(state)
    state = strategy.tell(state, weights, [solve(w) for w in weights])
  return state


def knee_found(state):
  alive = [t for t in state.trials if np.isfinite(t.objectives).all()]
  return alive[mopt.knee([t.objectives for t in alive])].weight


STRATEGIES = {
  'grid': search.grid(num=20),
  'dichotomic': search.dichotomic(levels=8),
  'stochastic_dichotomic': search.stochastic_dichotomic(
    jax.random.key(0), levels=8
  ),
  'paper_rule': search.stochastic_dichotomic(
    jax.random.key(0), paper_rule=True
  ),
  'bisection': search.bisection(levels=12),
}
_NAMES = list(STRATEGIES)


@pytest.mark.parametrize('name', ['dichotomic', 'bisection'])
@pytest.mark.parametrize('solve', [hyperbola, exponential])
def test_the_knee_is_found_within_20_percent(name, solve):
  state = run(STRATEGIES[name], solve)
  assert len(state.trials) <= 20
  expected = knee_of(solve, 1e-5, 1e-2)
  if solve is hyperbola:
    assert expected == pytest.approx(KNEE, rel=1e-2)
  assert abs(np.log(knee_found(state) / expected)) < np.log(1.2)


@pytest.mark.parametrize('solve', [hyperbola, exponential])
@pytest.mark.slow
def test_the_knee_is_found_for_50_keys(solve):
  expected = knee_of(solve, 1e-5, 1e-2)
  missed = []
  for seed in range(50):
    strategy = search.stochastic_dichotomic(jax.random.key(seed), levels=8)
    state = run(strategy, solve)
    assert len(state.trials) <= 20
    if abs(np.log(knee_found(state) / expected)) >= np.log(1.2):
      missed.append(seed)
  assert missed == []


def test_dichotomic_asks_for_the_slope_of_the_line():
  for scalarization, expected in (('penalty', 0.5), ('convex', 1 / 3)):
    strategy = search.dichotomic(0.1, 0.9, scalarization=scalarization)
    state = strategy.tell(strategy.init(), [0.9, 0.1], [(4, 1), (1, 7)])
    (weight,) = strategy.ask(state)
    assert weight == pytest.approx(expected)
    # There, both have the same weighted sum.
    if scalarization == 'penalty':
      assert 4 + weight * 1 == pytest.approx(1 + weight * 7)
    else:
      sums = [(1 - weight) * a + weight * b for a, b in ((4, 1), (1, 7))]
      assert sums[0] == pytest.approx(sums[1])


def test_dichotomic_ends_where_a_front_has_no_more_corners():
  """A front of three corners, solved exactly, as a linear program has it."""
  corners = [(0.0, 6.0), (1.0, 3.0), (5.0, 1.0)]
  solve = lambda w: min(corners, key=lambda c: c[0] + w * c[1])
  state = run(search.dichotomic(0.01, 100.0, levels=50, max_trials=50), solve)
  assert {t.objectives for t in state.trials} == set(corners)
  # Two ends, the chord, and both sides of the corner in the middle.
  assert len(state.trials) == 5


def test_the_printed_rule_stays_at_the_ends():
  """From [0, 0.1], where all weights near a knee at 3e-4 are close to 0."""
  options = dict(low=0.0, high=0.1, levels=6)
  key = jax.random.key(1)
  printed = run(
    search.stochastic_dichotomic(key, paper_rule=True, **options), hyperbola
  )
  weights = np.array([t.weight for t in printed.trials])
  assert ((weights == 0) | (weights >= 0.09)).all()
  ours = run(search.stochastic_dichotomic(key, **options), hyperbola)
  assert knee_found(ours) == pytest.approx(KNEE, rel=0.2)


def test_a_close_weight_is_drawn_around_the_new_one():
  # The slope 1.0 is within a tenth of 0.95, which is tried.
  draws = []
  for seed in range(20):
    strategy = search.stochastic_dichotomic(jax.random.key(seed), 0.95, 10.0)
    state = strategy.tell(strategy.init(), [0.95, 10.0], [(0, 4), (3, 1)])
    draws += strategy.ask(state).tolist()
  assert len(set(draws)) == 20
  assert min(draws) >= 0.95
  assert max(draws) <= 1.1
  assert np.ptp(draws) > 0.05


def test_bisection_halves_around_the_largest_change_of_the_trade_off():
  strategy = search.bisection(1.0, 256.0, spacing='log')
  state = strategy.tell(strategy.init(), [1.0, 256.0], [(0, 100), (100, 0)])
  assert strategy.ask(state).tolist() == [16.0]
  # A corner at 16: both of its intervals.
  state = strategy.tell(state, [16.0], [(5, 5)])
  assert sorted(strategy.ask(state)) == [4.0, 64.0]
  # Nearly no corner at 64, and none at 4: again around 16.
  state = strategy.tell(state, [4.0, 64.0], [(2.5, 52.5), (50, 2)])
  assert sorted(strategy.ask(state)) == [8.0, 32.0]


def test_bisection_halves_a_gap_even_if_its_middle_was_dominated():
  strategy = search.bisection(1.0, 9.0, spacing='linear')
  state = strategy.tell(strategy.init(), [1.0, 9.0], [(0, 10), (10, 0)])
  state = strategy.tell(state, [5.0], [(20, 20)])
  assert strategy.ask(state).tolist() == [3.0]


@pytest.mark.parametrize('name', _NAMES)
def test_a_batch_may_be_told_in_parts_and_in_any_order(name):
  strategy = STRATEGIES[name]
  whole, parts = strategy.init(), strategy.init()
  for _ in range(3):
    weights = strategy.ask(whole)
    if not len(weights):
      break
    values = [hyperbola(w) for w in weights]
    whole = strategy.tell(whole, weights, values)
    for i in reversed(range(len(weights))):
      assert not strategy.done(parts)
      parts = strategy.tell(parts, weights[i : i + 1], values[i : i + 1])
    assert parts.asked == whole.asked
    assert sorted(parts.trials) == sorted(whole.trials)


@pytest.mark.parametrize('name', _NAMES)
def test_a_state_survives_json(name):
  strategy = STRATEGIES[name]
  state = strategy.init()
  weights = strategy.ask(state)
  state = strategy.tell(state, weights, [hyperbola(w) for w in weights])
  asked, trials, level = json.loads(json.dumps(state))
  again = search.SearchState(
    tuple(asked), tuple(search.Trial(w, tuple(f)) for w, f in trials), level
  )
  assert again == state


def through_json(state):
  return search.SearchState(*json.loads(json.dumps(state)))


@pytest.mark.parametrize('name', _NAMES)
def test_a_search_goes_on_with_what_json_made_of_its_state(name):
  strategy = STRATEGIES[name]

  def solve(weight):
    return (np.inf, np.nan) if weight > 5e-3 else hyperbola(weight)

  expected = run(strategy, solve)
  state = through_json(strategy.init())
  while not strategy.done(state):
    weights = strategy.ask(state)
    assert weights.dtype == np.float64
    # In parts, so that some are left.
    for weight in weights:
      state = strategy.tell(through_json(state), [weight], [solve(weight)])
      assert isinstance(state.trials[-1], search.Trial)
      assert isinstance(state.asked, tuple)
  np.testing.assert_equal(
    json.loads(json.dumps(state)), json.loads(json.dumps(expected))
  )
  assert strategy.done(through_json(state))


ROUNDINGS = {
  'jax': jnp.asarray,
  'jax_scalars': lambda weights: list(jnp.asarray(weights)),
  'numpy': np.float32,
  'floats': lambda weights: np.float32(weights).tolist(),
  # As a log has them, whose digits are those of float32.
  'text': lambda weights: [float(str(w)) for w in np.float32(weights)],
}


@pytest.mark.parametrize('rounding', ROUNDINGS)
@pytest.mark.parametrize('name', _NAMES)
def test_weights_are_known_again_after_float32(name, rounding):
  strategy = STRATEGIES[name]
  expected = run(strategy, hyperbola)
  state = strategy.init()
  while not strategy.done(state):
    weights = strategy.ask(state)
    values = [hyperbola(w) for w in weights]
    state = strategy.tell(state, ROUNDINGS[rounding](weights), values)
  # Those that were asked, to the last bit.
  assert state == expected
  assert any(float(np.float32(t.weight)) != t.weight for t in state.trials)


def close_pair():
  """A search that asks for two weights that are one in float32, and a third."""
  second = np.nextafter(1.0, 2.0)
  strategy = search.grid(1.0, 2.0, num=2)
  state = search.SearchState((1.0, second, 2.0), (), 0)
  return strategy, state, second


def test_weights_that_float32_does_not_tell_apart():
  strategy, state, second = close_pair()
  assert np.float32(second) == 1
  outcomes = [(0, 3), (1, 2), (2, 1)]
  # All at once, in the order in which they were asked.
  told = strategy.tell(state, jnp.asarray(strategy.ask(state)), outcomes)
  assert [t.weight for t in told.trials] == [1.0, second, 2.0]
  assert [t.objectives for t in told.trials] == outcomes
  told = strategy.tell(state, np.float32([2, 1, 1]), outcomes)
  assert [t.weight for t in told.trials] == [2.0, 1.0, second]
  # One alone may be either, unless it has not been rounded.
  message = r'told of weight 1[.]0, .* any of \[1[.]0, 1[.]0000000000000002\]'
  with pytest.raises(ValueError, match=message):
    strategy.tell(state, jnp.asarray([2.0, 1.0]), outcomes[:2])
  for weight, other in ((1.0, second), (second, 1.0)):
    told = strategy.tell(state, [weight], outcomes[:1])
    assert [t.weight for t in told.trials] == [weight]
    assert told.asked == (other, 2.0)
    # And then the other is known again.
    told = strategy.tell(told, np.float32([1]), outcomes[1:2])
    assert [t.weight for t in told.trials] == [weight, other]
  told = strategy.tell(state, [second, 1.0], outcomes[:2])
  assert [t.weight for t in told.trials] == [second, 1.0]
  with pytest.raises(ValueError, match='twice'):
    strategy.tell(state, np.float32([1, 1, 1]), outcomes)


def test_what_is_0_or_infinite_in_float32_is_not_everything_that_is():
  state = search.SearchState((0.0, 1e308), (), 0)
  strategy = search.dichotomic(0.0, 1e308)
  for weight in (1e-300, 1e307):
    with pytest.raises(ValueError, match='told of weight .* but asked for'):
      strategy.tell(state, [weight], [(1, 1)])
  told = strategy.tell(state, np.float32([0.0, np.inf]), [(0, 1), (1, 0)])
  assert [t.weight for t in told.trials] == [0.0, 1e308]


def test_the_weights_that_were_not_asked_are_shown_in_full():
  strategy = search.grid(1e-4, 1e-2, num=2)
  with pytest.raises(
    ValueError, match='told of weight 0.000101, but asked for 0.0001, 0.01'
  ):
    strategy.tell(strategy.init(), [1.01e-4], [(1, 1)])


@pytest.mark.parametrize(
  'key',
  [
    0,
    None,
    1e-5,
    'key',
    jax.random.split(jax.random.key(0), 3),
    np.zeros(2),
    jnp.int32(0),
  ],
  ids=['int', 'none', 'float', 'text', 'keys', 'floats', 'array'],
)
def test_a_key_that_is_none_is_refused_at_once(key):
  with pytest.raises(ValueError, match=r'key must be one key such as jax.rand'):
    search.stochastic_dichotomic(key)


def test_keys_of_both_kinds_are_keys():
  for key in (jax.random.key(1), jax.random.PRNGKey(1)):
    state = run(search.stochastic_dichotomic(key, levels=3), hyperbola)
    assert len(state.trials) > 2


@pytest.mark.parametrize('name', _NAMES)
def test_failed_trials_are_remembered_and_not_used(name):
  strategy = STRATEGIES[name]

  def solve(weight):
    return (np.nan, np.inf) if weight > 5e-3 else hyperbola(weight)

  state = run(strategy, solve)
  failed = [t for t in state.trials if not np.isfinite(t.objectives).all()]
  assert [t.weight for t in failed if t.weight == 1e-2] == [1e-2]
  assert len(state.trials) <= 20


def test_what_was_not_asked_for_is_refused():
  strategy = search.dichotomic()
  state = strategy.init()
  with pytest.raises(ValueError, match='told of weight 0.5, but asked for'):
    strategy.tell(state, [0.5], [(1, 1)])
  with pytest.raises(ValueError, match='twice'):
    strategy.tell(state, [1e-2, 1e-2], [(1, 1), (1, 1)])
  with pytest.raises(ValueError, match=r'shapes \(1,\) and \(2,\)'):
    strategy.tell(state, [1e-2], [1, 1])
  done = run(search.grid(num=2), hyperbola)
  with pytest.raises(ValueError, match='asked for nothing'):
    strategy.tell(done, [1e-2], [(1, 1)])


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: search.grid(0.0, 1.0), 'low must be positive'),
    (lambda: search.grid(1.0, 0.5), 'below a finite high'),
    (lambda: search.grid(num=1), 'num must be an integer >= 2, got 1'),
    (lambda: search.grid(spacing='sqrt'), "spacing must be .*'sqrt'"),
    (lambda: search.dichotomic(-1.0), 'low must be >= 0'),
    (lambda: search.dichotomic(0.0, np.inf), 'finite high'),
    (lambda: search.dichotomic(np.nan), 'low must be >= 0'),
    (
      lambda: search.dichotomic(levels=0),
      'levels must be an integer >= 1, got 0',
    ),
    (lambda: search.dichotomic(levels=np.nan), 'levels must be .* got nan'),
    (lambda: search.dichotomic(levels=2.5), 'levels must be .* got 2.5'),
    (
      lambda: search.dichotomic(max_trials=1),
      'max_trials must be an integer >= 2, got 1',
    ),
    (lambda: search.dichotomic(max_trials=np.inf), 'max_trials .* got inf'),
    (
      lambda: search.dichotomic(0.1, 2.0, scalarization='convex'),
      'high must be at most 1',
    ),
    (lambda: search.dichotomic(scalarization='sum'), "penalty.*'sum'"),
    (
      lambda: search.stochastic_dichotomic(jax.random.key(0), min_gap=0.0),
      r'min_gap must be in \(0, 1\)',
    ),
    (lambda: search.bisection(0.0), 'low must be positive'),
    (
      lambda: search.bisection(intervals=0),
      'intervals must be an integer >= 1, got 0',
    ),
    (lambda: search.bisection(intervals=1.5), 'intervals .* got 1.5'),
    (lambda: search.bisection(intervals=True), 'intervals .* got True'),
    (
      lambda: search.grid(num=np.True_),
      'num must be an integer .* got np.True_',
    ),
    (lambda: search.dichotomic(levels='5'), "levels must be .* got '5'"),
    (lambda: search.dichotomic(max_trials=[5]), r'max_trials .* got \[5\]'),
  ],
)
def test_arguments_are_checked(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('kind', [np.int64, np.uint8, jnp.int32, np.array])
def test_integers_of_any_kind_are_taken(kind):
  state = run(search.dichotomic(levels=kind(3), max_trials=kind(9)), hyperbola)
  assert state == run(search.dichotomic(levels=3, max_trials=9), hyperbola)
  assert type(state.level) is int
  strategy = search.grid(num=kind(5))
  assert len(strategy.ask(strategy.init())) == 5


@pytest.mark.parametrize('spacing', ['log', 'linear'])
def test_a_grid_asks_for_no_weight_twice(spacing):
  high = np.nextafter(np.nextafter(1.0, 2), 2)
  asked = search.grid(1.0, high, 9, spacing)
  weights = asked.ask(asked.init())
  assert weights.tolist() == sorted(set(weights.tolist()))
  assert (weights[0], weights[-1]) == (1.0, high)
  state = asked.tell(asked.init(), weights, [(w, -w) for w in weights])
  assert asked.done(state)


_VALUES = st.tuples(st.floats(width=32), st.floats(width=32))


@pytest.mark.parametrize('name', _NAMES)
@settings(max_examples=50, deadline=None)
@given(values=st.lists(_VALUES, min_size=20, max_size=20))
def test_whatever_is_told_weights_are_new_and_in_range(name, values):
  strategy, values = STRATEGIES[name], iter(values)
  state = strategy.init()
  seen = []
  while not strategy.done(state):
    weights = strategy.ask(state).tolist()
    seen += weights
    told = list(itertools.islice(values, len(weights)))
    state = strategy.tell(state, weights, told)
  assert len(seen) == len(set(seen)) == len(state.trials) <= 20
  assert all(1e-5 <= weight <= 1e-2 for weight in seen)


@pytest.mark.parametrize('fails', [(1e-3, 1e-2), (1e-5, 1e-4)])
def test_a_range_whose_end_fails_is_bisected_up_to_there(fails):
  def solve(weight):
    is_bad = fails[0] <= weight <= fails[1]
    return (np.inf, np.inf) if is_bad else hyperbola(weight)

  state = run(STRATEGIES['bisection'], solve)
  assert len(state.trials) <= 20
  alive = [w for w in np.geomspace(1e-5, 1e-2, 20_001) if solve(w)[0] < np.inf]
  expected = alive[mopt.knee([solve(w) for w in alive])]
  assert abs(np.log(knee_found(state) / expected)) < np.log(1.2)
  # Up to where it fails, within the width of the gaps there.
  tried = [t.weight for t in state.trials if np.isfinite(t.objectives).all()]
  edge = max(alive) if fails[1] == 1e-2 else min(alive)
  assert min(abs(np.log(w / edge)) for w in tried) < np.log(3)


def test_where_everything_fails_the_middles_are_tried():
  for strategy in (search.bisection(1.0, 16.0), search.dichotomic(1.0, 16.0)):
    state = strategy.tell(strategy.init(), [1.0, 16.0], [(np.nan, 1)] * 2)
    assert strategy.ask(state).tolist() == [4.0]


def test_a_gap_to_a_failure_goes_first_unless_it_is_narrower():
  strategy = search.bisection(1.0, 256.0, intervals=1)
  failed = (np.inf, np.inf)
  state = strategy.tell(strategy.init(), [1.0, 256.0], [(0, 100), failed])
  assert strategy.ask(state).tolist() == [16.0]
  # Both gaps are as wide: first the one to the failure.
  state = strategy.tell(state, [16.0], [(5, 5)])
  assert strategy.ask(state).tolist() == [64.0]
  state = strategy.tell(state, [64.0], [failed])
  # From 1 to 16 is wider than from 16 to 64.
  assert strategy.ask(state).tolist() == [4.0]


def test_a_slope_that_is_not_between_its_weights_is_replaced_by_a_draw():
  # The slope is 6.5e-6: left of both, as between networks it may be.
  told = [(0.034, 3600.0), (0.057, 114.0)]
  exact = search.dichotomic(1e-5, 6e-4)
  assert exact.done(exact.tell(exact.init(), [1e-5, 6e-4], told))
  drawn = []
  for seed in range(40):
    strategy = search.stochastic_dichotomic(jax.random.key(seed), 1e-5, 6e-4)
    state = strategy.tell(strategy.init(), [1e-5, 6e-4], told)
    drawn += strategy.ask(state).tolist()
  assert len(drawn) == 40
  assert 1e-5 <= min(drawn) < 4e-5
  assert 2e-4 < max(drawn) <= 6e-4


def test_bisection_spends_nothing_on_corners_that_point_away():
  """A front with a corner at 16 and a bulge at 64, seen from the ideal."""
  strategy = search.bisection(1.0, 256.0, intervals=2)
  state = strategy.tell(strategy.init(), [1.0, 256.0], [(0, 100), (100, 0)])
  state = strategy.tell(state, [16.0], [(20, 40)])
  state = strategy.tell(state, [4.0, 64.0], [(10, 70), (75, 30)])
  assert sorted(strategy.ask(state)) == [8.0, 32.0]


def test_a_front_without_a_corner_is_halved_where_it_is_longest():
  strategy = search.bisection(1.0, 256.0, intervals=1)
  state = strategy.tell(strategy.init(), [1.0, 256.0], [(0, 100), (100, 0)])
  state = strategy.tell(state, [16.0], [(90, 90)])  # not convex at all
  state = strategy.tell(state, strategy.ask(state), [(99, 60)])
  (weight,) = strategy.ask(state).tolist()
  assert weight == 4.0
