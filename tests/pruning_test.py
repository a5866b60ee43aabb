"""Pruning: zeros that are exactly +0.0, and everything that must survive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

TAU = 1e-3


def as_float32(x):
  return np.asarray(jnp.asarray(x).astype(jnp.float32))


def is_plus_zero(x):
  x = as_float32(x)
  return (x == 0) & ~np.signbit(x)


def step_of(tx):
  """A pure step `(params, state, updates) -> (params, state)`."""

  def step(params, state, updates):
    updates, state = tx.update(updates, state, params)
    return optax.apply_updates(params, updates), state

  return step


# -- Exact zeros --------------------------------------------------------------

DTYPES = {
  'f32': (jnp.float32, jnp.float32),
  'bf16': (jnp.bfloat16, jnp.bfloat16),
  'bf16_params': (jnp.bfloat16, jnp.float32),
  'bf16_updates': (jnp.float32, jnp.bfloat16),
}


def many_weights(dtypes):
  """Params and updates whose sums fall on both sides of the threshold."""
  param_dtype, update_dtype = DTYPES[dtypes]
  rng = np.random.default_rng(0)
  params = rng.normal(size=(8, 512)) * 10 ** rng.uniform(-4, 0, size=(8, 512))
  target = rng.normal(size=(8, 512)) * 10 ** rng.uniform(-4, -2, size=(8, 512))
  params[:, 0], target[:, 0] = -0.5, 0.0  # the sum is a zero
  return (
    jnp.asarray(params, param_dtype),
    jnp.asarray(target - params, update_dtype),
  )


def assert_pruned(new):
  """Nothing below the threshold but +0.0, and both sides occur."""
  new = jnp.asarray(new)
  tau = float(jnp.asarray(TAU, new.dtype))
  values = as_float32(new)
  small = np.abs(values) < tau
  assert is_plus_zero(values[small]).all()
  assert 0.05 < small.mean() < 0.95


def run_eager(step, params, state, updates):
  return step(params, state, updates)[0]


def run_jit(step, params, state, updates):
  return jax.jit(step)(params, state, updates)[0]


def run_vmap(step, params, state, updates):
  mapped = jax.vmap(step, in_axes=(0, None, 0))
  return jax.jit(mapped)(params, state, updates)[0]


def run_scan(step, params, state, updates):
  def body(carry, updates):
    return step(*carry, updates), carry[0]

  zeros = jnp.zeros_like(updates)
  stacked = jnp.stack([updates, zeros, zeros])
  scan = jax.jit(lambda c, u: jax.lax.scan(body, c, u)[0])
  return scan((params, state), stacked)[0]


def run_pmap(step, params, state, updates):
  mapped = jax.pmap(
    lambda p, u: step(p, state, u)[0], in_axes=(0, 0), out_axes=0
  )
  split = [x.reshape(4, 2, -1) for x in (params, updates)]
  return mapped(*split).reshape(params.shape)


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize(
  'run', [run_eager, run_jit, run_vmap, run_scan, run_pmap]
)
def test_small_weights_become_plus_zero(run, dtypes):
  params, updates = many_weights(dtypes)
  tx = mopt.prune_by_magnitude(TAU)
  state = tx.init(params)
  new = run(step_of(tx), params, state, updates)
  assert new.dtype == params.dtype
  assert new.shape == params.shape
  assert_pruned(new)


@pytest.mark.parametrize('dtypes', DTYPES)
def test_kept_weights_are_those_of_the_plain_sum(dtypes):
  params, updates = many_weights(dtypes)
  tx = mopt.prune_by_magnitude(TAU)
  new, _ = step_of(tx)(params, tx.init(params), updates)
  plain = optax.apply_updates(params, updates.astype(params.dtype))
  keep = ~(jnp.abs(plain) < jnp.asarray(TAU, params.dtype))
  np.testing.assert_array_equal(
    as_float32(new)[keep], as_float32(plain)[np.asarray(keep)]
  )


def test_no_weight_escapes_within_three_ulps_of_the_threshold():
  # Under jit p - lr * g may be computed with one rounding or with two.
  count, rate = 1_000_000, 0.1
  rng = np.random.default_rng(1)
  tau = np.float32(TAU)
  sign = rng.choice(np.float32([-1, 1]), size=count)
  ulps = rng.integers(-3, 4, size=count)
  target = sign * (tau + ulps * np.spacing(tau)).astype(np.float32)
  params = (rng.uniform(-2, 2, size=count) * TAU).astype(np.float32)
  grads = ((params.astype(np.float64) - target) / rate).astype(np.float32)
  tx = optax.chain(optax.sgd(rate), mopt.prune_by_magnitude(TAU))
  new, _ = jax.jit(step_of(tx))(params, tx.init(params), grads)
  new = np.asarray(new)
  assert not ((new != 0) & (np.abs(new) < tau)).any()
  assert is_plus_zero(new[new == 0]).all()
  kept = np.abs(new[new != 0])
  assert (kept <= tau + 8 * np.spacing(tau)).all()
  assert 0.2 < (new == 0).mean() < 0.8


def prune_now(params, updates, threshold=TAU, **kwargs):
  tx = mopt.prune_by_magnitude(threshold, **kwargs)
  return step_of(tx)(params, tx.init(params), updates)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_weight_equal_to_the_threshold_stays(dtype):
  tau = jnp.asarray(TAU, dtype)
  below = jnp.nextafter(tau, jnp.zeros((), dtype))
  params = jnp.stack([tau, -tau, below, -below])
  expected = [float(tau), -float(tau), 0.0, 0.0]
  pruned = mopt.prune(params, TAU)
  np.testing.assert_array_equal(as_float32(pruned), np.float32(expected))
  assert is_plus_zero(pruned[2:]).all()
  updated, _ = prune_now(params, jnp.zeros_like(params))
  np.testing.assert_array_equal(as_float32(updated), as_float32(pruned))


def test_the_threshold_is_compared_in_the_dtype_of_the_weights():
  # 1e-3 is 0.00099945 in bfloat16: the weight equals it, and stays.
  weight = jnp.array([1e-3], jnp.bfloat16)
  assert float(weight[0]) < 1e-3
  np.testing.assert_array_equal(mopt.prune(weight, 1e-3), weight)


def test_weights_that_are_not_finite_are_kept():
  params = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e-9])
  expected = np.array([np.nan, np.inf, -np.inf, 0.0])
  np.testing.assert_array_equal(mopt.prune(params, TAU), expected)
  new, state = prune_now(params, jnp.zeros(4))
  np.testing.assert_array_equal(new, expected)
  assert int(state.nonzeros) == 3


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_updates_that_are_not_finite_reach_the_weights(value):
  params = jnp.array([0.0, 1.0])
  new, _ = prune_now(params, jnp.array([value, value]))
  np.testing.assert_array_equal(new, [value, value])


def test_minus_zero_becomes_plus_zero():
  params = jnp.array([-0.0, 0.0, -1e-9])
  assert is_plus_zero(mopt.prune(params, TAU)).all()
  new, _ = prune_now(params, jnp.array([-0.0, -0.0, 0.0]))
  assert is_plus_zero(new).all()


def test_prune_keeps_dtypes_and_runs_under_jit():
  params = {'a': jnp.ones(2, jnp.bfloat16), 'b': jnp.array([1e-4, 1.0])}
  prune = jax.jit(functools.partial(mopt.prune, threshold=TAU))
  pruned = prune(params)
  assert pruned['a'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(pruned['b'], [0.0, 1.0])


def test_a_threshold_may_be_traced():
  weights = jnp.array([0.1, 0.3])
  pruned = jax.vmap(lambda t: mopt.prune(weights, t))(jnp.array([0.2, 0.05]))
  np.testing.assert_array_equal(pruned, np.float32([[0, 0.3], [0.1, 0.3]]))


# -- Soft pruning -------------------------------------------------------------


def test_a_pruned_weight_comes_back_with_a_large_update():
  params = jnp.array([0.0, 0.0])
  new, state = prune_now(params, jnp.array([0.5, -0.9e-3]))
  np.testing.assert_array_equal(new, [0.5, 0.0])
  assert int(state.nonzeros) == 1


def test_moments_of_the_optimizer_are_untouched():
  pruned = optax.chain(optax.adam(0.1), mopt.prune_by_magnitude(10.0))
  params = jnp.ones(2)
  grads = jnp.array([1.0, -2.0])
  _, state = pruned.update(grads, pruned.init(params), params)
  plain = optax.adam(0.1)
  _, expected = plain.update(grads, plain.init(params), params)
  for x, y in zip(jax.tree.leaves(state[0]), jax.tree.leaves(expected)):
    np.testing.assert_array_equal(x, y)


QUIET = {
  'adam': optax.scale_by_adam(),
  'rms': optax.scale_by_rms(decay=0.9, eps=1e-7, eps_in_sqrt=False),
}


@pytest.mark.parametrize('name', QUIET)
@pytest.mark.parametrize('quiet_steps', [0, 1, 10, 20_000])
def test_one_gradient_after_quiet_moves_by_at_most_3_17_rates(
  name, quiet_steps
):
  tx = QUIET[name]
  zeros = jnp.zeros(5)
  grads = jnp.array([1e-3, -0.1, 1.0, -30.0, 1e4])

  @jax.jit
  def last_update(state):
    quiet = lambda _, state: tx.update(zeros, state)[1]
    state = jax.lax.fori_loop(0, quiet_steps, quiet, state)
    return tx.update(grads, state)[0]

  moved = np.abs(last_update(tx.init(zeros)))
  assert moved.max() <= 3.17
  if quiet_steps == 20_000 or name == 'rms':
    assert moved.min() > 3.1


def test_rms_moves_by_at_most_3_17_rates_after_any_gradients():
  tx = QUIET['rms']
  rng = np.random.default_rng(0)
  state = tx.init(jnp.zeros(1000))
  update = jax.jit(tx.update)
  for _ in range(50):
    grads = rng.normal(size=1000) * 10 ** rng.uniform(-6, 6, size=1000)
    moved, state = update(jnp.asarray(grads, jnp.float32), state)
    assert np.abs(moved).max() <= 3.17


def test_growing_gradients_move_adam_by_more_than_7_rates():
  # The bound of 3.17 rates holds for the first gradient after quiet. Moments
  # run on while a weight is zero: gradients that grow by b2 / b1 a step reach
  # (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) = 7.27.
  tx = QUIET['adam']
  state = tx.init(jnp.zeros(1))._replace(count=jnp.int32(20_000))
  for age in range(60, -1, -1):
    moved, state = tx.update(jnp.array([(0.9 / 0.999) ** age]), state)
  np.testing.assert_allclose(moved, 7.270, rtol=1e-3)


@pytest.mark.parametrize('factor', [0.3, 3.0])
def test_a_rate_well_below_the_threshold_makes_pruning_final(factor):
  # One gradient after quiet, at the rate where it would just revive or not.
  rate = factor * TAU / 3.17
  tx = optax.chain(optax.adam(rate), mopt.prune_by_magnitude(TAU))
  params = jnp.zeros(3)
  state = tx.init(params)
  state = (
    (state[0][0]._replace(count=jnp.int32(20_000)), *state[0][1:]),
    state[1],
  )
  new, _ = step_of(tx)(params, state, jnp.array([1.0, -5.0, 100.0]))
  assert (new != 0).all() == (factor > 1)
  assert (new == 0).all() == (factor < 1)


# -- The state ----------------------------------------------------------------


def test_every_k_prunes_at_updates_k_and_2k_only():
  tx = mopt.prune_by_magnitude(TAU, every=3)
  params = jnp.array([1e-4, 1.0])
  state = tx.init(params)
  step = jax.jit(step_of(tx))
  seen = []
  for _ in range(7):
    params = params.at[0].set(1e-4)
    params, state = step(params, state, jnp.zeros(2))
    seen.append((float(params[0]) != 0, int(state.count), int(state.nonzeros)))
  kept = [True, True, False, True, True, False, True]
  assert seen == [(x, k + 1, 1 + x) for k, x in enumerate(kept)]


def test_state_counts_nonzeros_of_the_masked_leaves():
  params = {
    'dense': {'kernel': jnp.array([[1.0, 1e-4], [0.0, 2.0]])},
    'bias': jnp.array([1e-4, 5.0]),
  }
  tx = mopt.prune_by_magnitude(TAU, mask=mopt.dense_kernels)
  state = tx.init(params)
  assert (int(state.count), int(state.nonzeros)) == (0, 3)
  updates = jax.tree.map(jnp.zeros_like, params)
  updates, state = jax.jit(tx.update)(updates, state, params)
  assert (int(state.count), int(state.nonzeros)) == (1, 2)
  assert state.nonzeros.dtype == jnp.int32
  new = optax.apply_updates(params, updates)
  counted = mopt.count_nonzero(new, mopt.dense_kernels)
  assert int(counted.total) == int(state.nonzeros)
  np.testing.assert_array_equal(new['bias'], params['bias'])


def test_count_agrees_with_the_weights_over_many_steps_under_jit():
  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=300) * 2e-3, jnp.float32)
  tx = optax.chain(optax.adam(3e-4), mopt.prune_by_magnitude(TAU))

  @jax.jit
  def run(params, grads):
    def body(carry, grads):
      carry = step_of(tx)(*carry, grads)
      return carry, (carry[1][1].nonzeros, jnp.sum(carry[0] != 0))

    return jax.lax.scan(body, (params, tx.init(params)), grads)[1]

  grads = jnp.asarray(rng.normal(size=(30, 300)), jnp.float32)
  counted, found = run(params, grads)
  np.testing.assert_array_equal(counted, found)
  assert len(set(np.asarray(found).tolist())) > 3


# -- Schedules and injected hyperparameters -----------------------------------

WEIGHTS = jnp.array([0.05, 0.15, 0.25, 0.35, -0.45])


def rising(count):
  return 0.1 * count  # 0 at the first update: nothing is below


def nonzeros_of(tx, steps=5, jit=True):
  """The nonzeros after each step that changes nothing by itself."""
  update = jax.jit(tx.update) if jit else tx.update
  params, state = WEIGHTS, tx.init(WEIGHTS)
  found = []
  for _ in range(steps):
    updates, state = update(jnp.zeros_like(params), state, params)
    params = optax.apply_updates(params, updates)
    assert is_plus_zero(params[params == 0]).all()
    found.append(int((params != 0).sum()))
  return found


inject = optax.inject_hyperparams(mopt.prune_by_magnitude)


@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('make', [mopt.prune_by_magnitude, inject])
def test_a_threshold_may_be_a_schedule_of_the_count(make, jit):
  # The count before the update, as Optax has it: thresholds 0, 0.1, 0.2 ...
  assert nonzeros_of(make(rising), jit=jit) == [5, 4, 3, 2, 1]
  # With updates 2 and 4 only: thresholds 0.1 and 0.3.
  assert nonzeros_of(make(rising, every=2), jit=jit) == [5, 4, 4, 2, 2]


def test_a_schedule_is_that_of_optax():
  schedule = optax.linear_schedule(0.0, 0.4, transition_steps=4)
  seen = []

  def noting(count):
    seen.append(int(count))
    return schedule(count)

  assert nonzeros_of(mopt.prune_by_magnitude(noting), jit=False) == [
    *(5, 4, 3, 2, 1)
  ]
  assert seen == [0, 0, 1, 2, 3, 4]  # once by init
  rates = []
  tx = optax.scale_by_schedule(lambda count: rates.append(int(count)) or 1.0)
  state = tx.init(WEIGHTS)
  for _ in range(5):
    _, state = tx.update(WEIGHTS, state, WEIGHTS)
  assert rates == seen[1:]


@pytest.mark.parametrize('threshold', [0.2, np.float64(0.2), jnp.float32(0.2)])
def test_a_threshold_may_be_injected_without_naming_anything(threshold):
  tx = inject(threshold=threshold)
  state = tx.init(WEIGHTS)
  assert set(state.hyperparams) == {'threshold', 'every'}
  update = jax.jit(tx.update)
  updates, state = update(jnp.zeros(5), state, WEIGHTS)
  expected = np.float32([0, 0, 0.25, 0.35, -0.45])
  np.testing.assert_array_equal(WEIGHTS + updates, expected)
  # What it is for.
  state.hyperparams['threshold'] = jnp.float32(0.3)
  updates, state = update(jnp.zeros(5), state, WEIGHTS)
  np.testing.assert_array_equal(WEIGHTS + updates != 0, [0, 0, 0, 1, 1])
  assert int(state.inner_state.nonzeros) == 2


def test_an_injected_threshold_runs_in_a_scan_behind_an_optimizer():
  tx = optax.chain(optax.sgd(0.1), inject(rising, mask={'a': True, 'b': False}))
  params = {'a': WEIGHTS, 'b': WEIGHTS}
  zeros = jax.tree.map(jnp.zeros_like, params)

  @jax.jit
  def run(params):
    def body(carry, _):
      carry = step_of(tx)(*carry, zeros)
      return carry, (carry[0]['a'] != 0).sum()

    carry = params, tx.init(params)
    # Its hyperparameters change their weak type once, whatever the factory.
    carry = step_of(tx)(*carry, zeros)
    return jax.lax.scan(body, carry, length=4)

  (new, _), nonzeros = run(params)
  np.testing.assert_array_equal(nonzeros, [4, 3, 2, 1])
  np.testing.assert_array_equal(new['b'], WEIGHTS)


@pytest.mark.parametrize('every', [np.int64(3), jnp.int32(3), np.array(3)])
def test_an_interval_may_be_an_integer_of_any_kind(every):
  found = nonzeros_of(mopt.prune_by_magnitude(0.2, every=every), 4, jit=True)
  assert found == [5, 5, 3, 3]


def test_an_interval_may_be_traced():
  params = jnp.array([0.1, 1.0])

  def count_zeros(every):
    tx = mopt.prune_by_magnitude(0.2, every=every)
    body = lambda carry, _: (
      step_of(tx)(params, carry[1], jnp.zeros(2)),
      carry[0][0] == 0,
    )
    start = params, tx.init(params)
    (last, _), zeros = jax.lax.scan(body, start, length=6)
    return jnp.append(zeros[1:], last[0] == 0)

  found = jax.jit(jax.vmap(count_zeros))(jnp.array([1, 2, 3, 7, 0, -5]))
  updates = np.arange(1, 7)
  expected = [updates % k == 0 for k in (1, 2, 3, 7)]
  # What cannot be refused is taken as 1.
  expected += [updates > 0] * 2
  np.testing.assert_array_equal(found, expected)
  tx = inject(0.2, every=lambda count: 2 + 0 * count)
  assert nonzeros_of(tx, 4) == [5, 3, 3, 3]
  with pytest.raises(ValueError, match='every must be an integer'):
    jax.jit(count_zeros)(2.0)


@pytest.mark.parametrize('value', [0.0, -1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_a_schedule_that_is_no_threshold_prunes_nothing(value, jit):
  tx = mopt.prune_by_magnitude(lambda count: jnp.float32(value))
  assert nonzeros_of(tx, 2, jit) == [5, 5]
  prune = jax.jit(mopt.prune)
  np.testing.assert_array_equal(prune(WEIGHTS, value), WEIGHTS)
  half = WEIGHTS.astype(jnp.float16)
  np.testing.assert_array_equal(prune(half, 1e9), half)  # infinite there


@pytest.mark.parametrize(
  'schedule',
  [
    lambda count: None,
    lambda count: 'high',
    lambda count: 1j,
    lambda count: jnp.ones(5),
    lambda count: jnp.complex64(1),
  ],
)
def test_a_schedule_of_no_number_is_refused_by_init(schedule):
  tx = mopt.prune_by_magnitude(schedule)
  with pytest.raises(ValueError, match='threshold must'):
    tx.init(WEIGHTS)


def test_a_mask_that_is_injected_as_a_schedule_is_refused_with_a_hint():
  with pytest.raises(ValueError, match=r"static_args=\('mask',\)"):
    inject(0.2, mask=mopt.dense_kernels).init(WEIGHTS)
  tx = optax.inject_hyperparams(mopt.prune_by_magnitude, static_args='mask')(
    0.2, mask=mopt.dense_kernels
  )
  params = {'kernel': WEIGHTS[None], 'bias': WEIGHTS}
  updates, _ = jax.jit(tx.update)(
    jax.tree.map(jnp.zeros_like, params), tx.init(params), params
  )
  new = optax.apply_updates(params, updates)
  assert (int((new['kernel'] != 0).sum()), int((new['bias'] != 0).sum())) == (
    *(3, 5),
  )


# -- Numbers of Python, and integers ------------------------------------------


def test_numbers_of_python_are_pruned():
  params = {'a': 5e-4, 'b': -2.0, 'c': np.float64(1e-4), 'd': np.float32(3)}
  pruned = mopt.prune(params, TAU)
  found = {k: float(v) for k, v in pruned.items()}
  assert found == {'a': 0.0, 'b': -2.0, 'c': 0.0, 'd': 3.0}
  assert all(x.dtype == jnp.float32 for x in pruned.values())
  tx = mopt.prune_by_magnitude(TAU)
  state = tx.init(params)
  assert int(state.nonzeros) == 4
  zeros = dict.fromkeys(params, 0.0)
  updates, state = tx.update(zeros, state, params)
  new = optax.apply_updates(params, updates)
  assert {k: float(v) for k, v in new.items()} == found
  assert int(state.nonzeros) == 2


INTEGERS = {
  'count': jnp.array([0, 1, -3], jnp.int32),
  'numpy': np.array([1, 0], np.uint8),
  'python': 0,
  'frozen': jnp.array([True, False]),
}


@pytest.mark.parametrize('mask', [None, True], ids=['all', 'named'])
def test_integers_stay_as_they_are(mask):
  params = INTEGERS | {'w': jnp.array([1e-4, 2.0])}
  pruned = mopt.prune(params, 2.0 - 1e-3, mask)
  np.testing.assert_array_equal(pruned['w'], [0.0, 2.0])
  for name, leaf in INTEGERS.items():
    assert pruned[name] is leaf
  updates = jax.tree.map(lambda x: np.zeros_like(x), params)
  tx = mopt.prune_by_magnitude(2.0 - 1e-3, mask)
  state = tx.init(params)
  found, new_state = tx.update(updates, state, params)
  for name in INTEGERS:
    assert found[name] is updates[name]
  np.testing.assert_array_equal(found['w'], np.float32([-1e-4, 0]))
  # They are counted where a mask names them.
  named = 4 if mask else 0
  assert (int(state.nonzeros), int(new_state.nonzeros)) == (
    2 + named,
    1 + named,
  )
  count = mopt.count_nonzero(pruned, mask)
  assert int(count.total) == int(new_state.nonzeros)


def test_integers_have_gradients_without_a_dtype():
  params = {'w': jnp.array([1e-4, 2.0]), 'count': jnp.arange(3)}
  square = lambda params: jnp.sum(params['w'] ** 2)
  grads = jax.grad(square, allow_int=True)(params)
  assert grads['count'].dtype == jax.dtypes.float0
  tx = mopt.prune_by_magnitude(TAU)
  updates, state = tx.update(grads, tx.init(params), params)
  assert updates['count'] is grads['count']
  np.testing.assert_array_equal(updates['w'], np.float32([-1e-4, 4]))
  assert int(state.nonzeros) == 1


# -- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  'threshold',
  [0.0, -1.0, np.inf, np.nan, [1.0, 2.0], 1e39, 'high', None, 1j, 10**400],
)
def test_bad_thresholds_are_refused(threshold):
  for form in (threshold, np.asarray(threshold)):
    with pytest.raises(ValueError, match='threshold must be'):
      mopt.prune(jnp.ones(2), form)
    with pytest.raises(ValueError, match='threshold must be'):
      mopt.prune_by_magnitude(form)


@pytest.mark.parametrize('threshold', [-1.0, np.inf, np.nan, [1.0, 2.0]])
def test_bad_thresholds_of_jax_are_refused_where_they_are_known(threshold):
  threshold = jnp.array(threshold)
  with pytest.raises(ValueError, match='threshold must be'):
    mopt.prune(jnp.ones(2), threshold)
  with pytest.raises(ValueError, match='threshold must be'):
    mopt.prune_by_magnitude(threshold)


def test_prune_takes_no_schedule():
  with pytest.raises(ValueError, match='threshold must be a number.*its value'):
    mopt.prune(jnp.ones(2), rising)


@pytest.mark.parametrize(
  ('threshold', 'dtype', 'message'),
  [
    (1e-9, jnp.float16, "1e-09 is 0.0 in float16.*'a/b'.*none of"),
    (1e5, jnp.float16, "100000.0 is inf in float16.*'a/b'.*all of"),
    (1e-46, jnp.float32, "1e-46 is 0.0 in float32.*'a/b'.*none of"),
    (1e-39, jnp.float32, "1e-39 is .* in float32.*'a/b'.*none of"),
    (3.4e38, jnp.bfloat16, "is inf in bfloat16.*'a/b'.*all of"),
  ],
)
@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_a_threshold_that_a_dtype_does_not_have_is_refused_by_leaf(
  threshold, dtype, message, transform
):
  params = {'a': {'b': jnp.ones(2, dtype), 'c': jnp.ones(2)}}
  tx = mopt.prune_by_magnitude(threshold)
  prune = lambda params: mopt.prune(params, threshold)
  for call in (prune, tx.init):
    with pytest.raises(ValueError, match=message):
      transform(call)(params)
  state = mopt.PruneState(jnp.int32(0), jnp.int32(0))
  with pytest.raises(ValueError, match=message):
    transform(tx.update)(params, state, params)
  # Not of a leaf that the mask leaves out.
  mask = {'a': {'b': False, 'c': True}}
  if np.float32(threshold) >= np.finfo(np.float32).tiny:
    mopt.prune_by_magnitude(threshold, mask).init(params)


def test_a_threshold_of_float64_is_compared_there():
  with jax.enable_x64(True):
    weights = jnp.array([1e-60, 1e-50, 1e60])
    for tau, expected in ((1e-55, 2), (1e55, 1)):
      assert int((mopt.prune(weights, tau) != 0).sum()) == expected
      tx = mopt.prune_by_magnitude(tau)
      updates, state = tx.update(jnp.zeros(3), tx.init(weights), weights)
      assert updates.dtype == jnp.float64
      assert int(state.nonzeros) == expected
      assert (state.count.dtype, state.nonzeros.dtype) == (jnp.int32,) * 2
    with pytest.raises(ValueError, match='inf in float32'):
      mopt.prune(jnp.ones(2, jnp.float32), 1e55)


def test_subnormal_thresholds_of_float16_are_what_they_say():
  weights = jnp.array([1e-6, 2e-5, 1e-4], jnp.float16)
  np.testing.assert_array_equal(mopt.prune(weights, 1e-5) != 0, [0, 1, 1])


@pytest.mark.parametrize(
  'every', [0, -1, 1.0, None, True, np.True_, np.float32(2), np.array([2]), '2']
)
def test_bad_intervals_are_refused(every):
  with pytest.raises(ValueError, match='every must be an integer >= 1'):
    mopt.prune_by_magnitude(TAU, every=every)


NO_NUMBERS = ['text', np.ones(2, np.complex64), object(), jax.random.key(0)]


@pytest.mark.parametrize('leaf', NO_NUMBERS, ids=lambda x: type(x).__name__)
def test_a_leaf_that_is_no_array_of_numbers_is_refused_by_its_path(leaf):
  params = {'a': jnp.ones(2), 'b': leaf}
  tx = mopt.prune_by_magnitude(TAU)
  for call in (lambda params: mopt.prune(params, TAU), tx.init):
    with pytest.raises(TypeError, match="real numbers at 'b'"):
      call(params)
  mask = {'a': True, 'b': False}
  assert mopt.prune(params, TAU, mask)['b'] is leaf
  assert int(mopt.prune_by_magnitude(TAU, mask).init(params).nonzeros) == 2


def test_an_update_without_parameters_is_refused():
  tx = mopt.prune_by_magnitude(TAU)
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_stacked_updates_are_refused_and_their_leaf_named():
  params = {'a': jnp.ones(2)}
  with pytest.raises(ValueError, match="last of a chain.*'a'"):
    prune_now(params, {'a': jnp.ones((2, 2))})


def test_a_mask_of_another_structure_is_refused():
  params = {'a': jnp.ones(2)}
  with pytest.raises(ValueError, match='structure'):
    prune_now(params, params, mask={'b': True})


# -- What its docstring says of the neighbours --------------------------------


def test_not_last_in_the_chain_leaves_weights_that_are_not_zero():
  params = jnp.array([5e-4])
  grads = jnp.zeros(1)
  wrong = optax.chain(mopt.prune_by_magnitude(TAU), optax.scale(0.5))
  new, state = step_of(wrong)(params, wrong.init(params), grads)
  assert new[0] != 0
  # The symptom.
  assert int(state[0].nonzeros) == 0
  assert int(mopt.count_nonzero(new).total) == 1
  right = optax.chain(optax.scale(0.5), mopt.prune_by_magnitude(TAU))
  new, _ = step_of(right)(params, right.init(params), grads)
  assert is_plus_zero(new).all()


def test_averaged_weights_are_pruned_once_more_at_the_end():
  params = jnp.array([2e-3, 1.0])
  tx = optax.chain(optax.sgd(1.0), mopt.prune_by_magnitude(TAU))
  average = optax.ema(0.9, debias=False)
  state, average_state = tx.init(params), average.init(params)
  grads = jnp.array([1.5e-3, 0.0])
  for _ in range(100):
    _, average_state = average.update(params, average_state)
    params, state = step_of(tx)(params, state, grads)
    grads = jnp.zeros(2)
  ema = average_state.ema
  assert params[0] == 0
  assert ema[0] != 0
  pruned = mopt.prune(ema, TAU)
  assert is_plus_zero(pruned[0])
  assert pruned[1] == ema[1]


def test_zeros_are_exact_inside_multi_steps():
  tx = optax.MultiSteps(
    optax.chain(optax.sgd(0.1), mopt.prune_by_magnitude(TAU)),
    every_k_schedule=2,
  )
  params = jnp.array([5e-4, 0.1, 0.5])
  state = tx.init(params)
  step = jax.jit(step_of(tx))
  grads = jnp.array([0.0, 1.0, -1.0])
  first, state = step(params, state, grads)
  np.testing.assert_array_equal(first, params)
  second, _ = step(first, state, grads)
  np.testing.assert_allclose(second, [0.0, 0.0, 0.6], rtol=1e-6)
  assert is_plus_zero(second[:2]).all()


def test_zeros_are_exact_inside_apply_if_finite():
  tx = optax.apply_if_finite(
    optax.chain(optax.sgd(0.1), mopt.prune_by_magnitude(TAU)), 5
  )
  params = jnp.array([5e-4, 0.5])
  step = jax.jit(step_of(tx))
  skipped, state = step(params, tx.init(params), jnp.array([jnp.nan, 0.0]))
  np.testing.assert_array_equal(skipped, params)
  assert int(state.inner_state[1].count) == 0
  new, state = step(skipped, state, jnp.zeros(2))
  assert is_plus_zero(new[0])
  assert int(state.inner_state[1].count) == 1


def abs_l1(params):
  return jnp.sum(jnp.abs(params))


@pytest.mark.parametrize(
  ('l1', 'rests'), [(mopt.l1_norm, True), (abs_l1, False)]
)
@pytest.mark.parametrize('make', [mopt.smgd, mopt.madam, mopt.mrmsprop])
def test_pruned_weights_rest_under_the_subgradient_of_mopt(make, l1, rests):
  # The error depends on two weights alone. The others start at zero: nothing
  # but the subgradient of l1 at 0 can move them.
  def error(params):
    return jnp.sum((params[:2] - 1) ** 2)

  grad_fn = mopt.value_and_stacked_grad(error, l1)
  tx = optax.chain(
    make(0.01, weighting=mopt.fixed_weights((1.0, 0.5))),
    mopt.prune_by_magnitude(TAU),
  )

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      carry = step_of(tx)(params, state, grad_fn(params)[1])
      return carry, carry[0]

    return jax.lax.scan(body, (params, tx.init(params)), length=50)[1]

  path = np.asarray(run(jnp.array([0.5, 0.5, 0.0, 0.0, -0.0])))
  assert (np.abs(path[:, :2]) > 0.4).all()
  assert (path[:, 2:] == 0).all() == rests


# -- Shards -------------------------------------------------------------------


@pytest.mark.parametrize('axes', ['Auto', 'Explicit'])
@pytest.mark.parametrize(
  'spec',
  [('x', None), (None, 'y'), ('x', 'y')],
  ids=['rows', 'columns', 'both'],
)
def test_norms_and_pruning_of_shards_are_those_of_the_whole(
  axes, spec, four_devices
):
  kind = getattr(jax.sharding.AxisType, axes)
  mesh = jax.make_mesh(
    (2, 2), ('x', 'y'), axis_types=(kind, kind), devices=four_devices
  )
  rng = np.random.default_rng(0)
  whole = {'kernel': jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)}
  tx = mopt.prune_by_magnitude(lambda count: 0.5)

  def everything(params):
    grad_fn = mopt.value_and_stacked_grad(
      mopt.l1_norm, mopt.l2_norm_squared, functools.partial(mopt.lp_norm, p=0.5)
    )
    values, grads = grad_fn(params)
    halves = jax.tree.map(lambda x: -0.5 * x, params)
    updates, state = tx.update(halves, tx.init(params), params)
    count = mopt.count_nonzero(optax.apply_updates(params, updates))
    pruned = mopt.prune(params, 0.3)
    return (values, state, count), grads, (updates, pruned)

  expected = everything(whole)
  assert 0 < int(expected[0][1].nonzeros) < 48
  with jax.set_mesh(mesh):
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    params = jax.device_put(whole, sharding)
    for run in (everything, jax.jit(everything)):
      found = run(params)
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        found,
        expected,
      )
      for leaf in jax.tree.leaves(found[2]):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
