"""Schedules against numbers worked out by hand."""

from hypothesis import given
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

# t = start - (start - end) / (1 + exp(-z)), z = (k - 0.75 K) / (0.075 K), for
# start = 1e-3 and end = 1e-4. At K: z = 0.25 / 0.075 = 10 / 3 and
# 1 / (1 + exp(-10/3)) = 0.9655548, so t = 1.3100068e-4 whatever K is.
BY_HAND = [
  # K = 30: z = (1 - 22.5) / 2.25 = -9.5555556, fraction 7.0802e-5.
  (30, 1, 9.99936278e-4),
  (30, 22.5, 5.5e-4),
  (30, 30, 1.31000676e-4),
  # K = 125: z = (1 - 93.75) / 9.375 = -9.8933333, fraction 5.0508e-5.
  (125, 1, 9.99954543e-4),
  (125, 93.75, 5.5e-4),
  (125, 125, 1.31000676e-4),
]


@pytest.mark.parametrize(('steps', 'count', 'expected'), BY_HAND)
def test_logistic_drop_has_the_value_worked_out_by_hand(steps, count, expected):
  rate = mopt.logistic_drop(1e-3, 1e-4, steps)(count)
  np.testing.assert_allclose(rate, expected, rtol=2e-6)


@pytest.mark.parametrize('steps', [1, 30, 125, 10_000])
def test_logistic_drop_matches_the_formula_in_float64(steps):
  count = np.arange(0, 2 * steps + 1, max(steps // 50, 1))
  z = np.exp((count - 0.75 * steps) / (0.075 * steps))
  expected = 1e-3 - (1e-3 - 1e-4) * z / (z + 1)
  rates = jax.vmap(mopt.logistic_drop(1e-3, 1e-4, steps))(jnp.asarray(count))
  np.testing.assert_allclose(rates, expected, rtol=2e-6)


ULP = np.spacing(np.float32(1e-3))  # the rounding of the first rate


def test_logistic_drop_never_rises_and_stays_between_its_ends():
  rates = np.asarray(mopt.logistic_drop(1e-3, 1e-4, 300)(jnp.arange(601)))
  assert (np.diff(rates) <= ULP).all()
  assert rates[0] <= np.float32(1e-3)
  assert rates[-1] >= np.float32(1e-4)
  assert (np.diff(rates)[100:300] < 0).all()


def test_logistic_drop_may_rise_where_it_is_told_to():
  rates = np.asarray(mopt.logistic_drop(1e-4, 1e-3, 300)(jnp.arange(601)))
  assert (np.diff(rates) >= -ULP).all()
  np.testing.assert_allclose(rates[[0, -1]], [1e-4, 1e-3], rtol=1e-3)


def test_logistic_drop_saturates_where_exp_would_overflow():
  rate = mopt.logistic_drop(1e-3, 1e-4, 1)
  huge = jnp.array([2**31 - 1, 10**6], jnp.int32)
  np.testing.assert_allclose(jax.jit(rate)(huge), [1e-4, 1e-4], rtol=1e-6)
  np.testing.assert_allclose(rate(-1e30), 1e-3, rtol=1e-6)


@pytest.mark.parametrize('decay', [0.0, 0.01, 3.0])
def test_inverse_time_decay_matches_equation_9(decay):
  count = np.arange(200)
  rates = mopt.inverse_time_decay(0.1, decay)(jnp.arange(200))
  rates = np.broadcast_to(rates, 200)
  np.testing.assert_allclose(rates, 0.1 / (1 + decay * count), rtol=1e-6)


def test_by_epoch_holds_the_rate_within_an_epoch():
  rate = mopt.by_epoch(mopt.logistic_drop(1e-3, 1e-4, 3), steps_per_epoch=4)
  rates = np.asarray(rate(jnp.arange(12))).reshape(3, 4)
  assert (rates == rates[:, :1]).all()
  expected = [float(mopt.logistic_drop(1e-3, 1e-4, 3)(k)) for k in (1, 2, 3)]
  np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-6)


def test_by_epoch_counts_from_the_epoch_it_is_told():
  rate = mopt.by_epoch(lambda epoch: epoch, steps_per_epoch=10, first=0)
  assert [int(rate(k)) for k in (0, 9, 10, 25)] == [0, 0, 1, 2]


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: mopt.logistic_drop(0.0, 1e-4, 10), 'init_value must be positive'),
    (lambda: mopt.logistic_drop(1e-3, -1e-4, 10), 'end_value must be positive'),
    (lambda: mopt.logistic_drop(float('nan'), 1, 10), 'init_value'),
    (lambda: mopt.logistic_drop(1e-3, 1e-4, 0), 'transition_steps'),
    (lambda: mopt.inverse_time_decay(-1.0, 0.1), 'init_value must be positive'),
    (lambda: mopt.inverse_time_decay(1.0, -0.1), 'decay must not be negative'),
    (lambda: mopt.inverse_time_decay(1.0, float('nan')), 'decay'),
    (lambda: mopt.by_epoch(lambda k: k, 0), 'steps_per_epoch'),
    # These gave rates that are NaN or infinite.
    (lambda: mopt.logistic_drop(np.inf, 1.0, 10), 'init_value .* got inf'),
    (lambda: mopt.logistic_drop(1.0, 1e39, 10), 'end_value .* got 1e[+]39'),
    (lambda: mopt.logistic_drop(1.0, 0.1, np.inf), 'steps must be .* got inf'),
    (lambda: mopt.logistic_drop(1.0, 0.1, 10**400), 'steps must be .* got 10'),
    (lambda: mopt.inverse_time_decay(np.inf, 1.0), 'init_value .* got inf'),
    (lambda: mopt.inverse_time_decay(1.0, np.inf), 'decay must .* got inf'),
    (lambda: mopt.by_epoch(lambda k: k, np.inf), 'steps_per_epoch .* got inf'),
    (lambda: mopt.by_epoch(1e-3, 10), 'schedule must be a function, got 0.001'),
  ],
)
def test_bad_arguments_are_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize(
  'schedule',
  [
    mopt.logistic_drop(1e-1, 1e-2, 8),
    mopt.inverse_time_decay(1e-1, 0.5),
    mopt.by_epoch(mopt.logistic_drop(1e-1, 1e-2, 4), steps_per_epoch=2),
  ],
  ids=['logistic_drop', 'inverse_time_decay', 'by_epoch'],
)
def test_schedules_are_learning_rates_of_optax_under_jit(schedule):
  tx = optax.sgd(schedule)
  params = jnp.zeros(2)

  @jax.jit
  def run(state):
    def step(state, _):
      return tx.update(jnp.ones(2), state, params)[::-1]

    return jax.lax.scan(step, state, length=8)[1]

  updates = run(tx.init(params))
  expected = [-float(schedule(k)) for k in range(8)]
  np.testing.assert_allclose(updates[:, 0], expected, rtol=1e-6)
  assert len(set(expected)) > 1


# -- Shares of zeros ----------------------------------------------------------


@pytest.mark.parametrize(
  ('count', 'share'),
  # 0.2 + 0.7 * (1 - 0.5^3) = 0.8125, 0.9 - 0.7 * 0.75^3 = 0.6046875.
  [(0, 0.2), (10, 0.2), (15, 0.6046875), (20, 0.8125), (30, 0.9), (99, 0.9)],
)
def test_the_cubic_share_is_that_of_the_paper(count, share):
  schedule = mopt.cubic_sparsity(0.9, begin=10, end=30, initial=0.2)
  assert float(schedule(count)) == pytest.approx(share, rel=1e-6)
  found = float(jax.jit(schedule)(jnp.int32(count)))
  assert found == pytest.approx(share, rel=1e-6)


@given(
  st.floats(0, 1, width=32),
  st.floats(0, 1, width=32),
  st.integers(0, 10_000),
  st.integers(1, 10_000),
)
def test_the_ends_of_the_cubic_share_are_exact(final, initial, begin, steps):
  end = begin + steps
  schedule = mopt.cubic_sparsity(final, begin, end, initial)
  for count in (0, begin, np.int32(begin)):
    assert schedule(count) == np.float32(initial)
  for count in (end, 2 * end, np.int32(end)):
    assert schedule(count) == np.float32(final)
  shares = schedule(np.linspace(begin, end, 20))
  low, high = sorted([initial, final])
  assert ((shares >= low - 1e-6) & (shares <= high + 1e-6)).all()


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'final': 1.1}, 'final must be a share from 0 to 1, got 1.1'),
    ({'initial': -0.1}, 'initial must be a share from 0 to 1, got -0.1'),
    ({'final': np.nan}, 'final must be a share from 0 to 1, got nan'),
    ({'begin': -1}, 'begin must be >= 0 and finite, got -1'),
    ({'begin': 10}, 'end must be > begin, 10, and finite, got 10'),
    ({'end': np.inf}, 'end must be > begin, 0, and finite, got inf'),
  ],
)
def test_bad_cubic_shares_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    mopt.cubic_sparsity(**({'final': 0.9, 'begin': 0, 'end': 10} | kwargs))
