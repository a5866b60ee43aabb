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


# -- What is refused ----------------------------------------------------------


@pytest.mark.parametrize('threshold', [0.0, -1.0, np.inf, np.nan, [1.0, 2.0]])
def test_bad_thresholds_are_refused(threshold):
  threshold = np.asarray(threshold)
  with pytest.raises(ValueError, match='threshold must be'):
    mopt.prune(jnp.ones(2), threshold)
  with pytest.raises(ValueError, match='threshold must be'):
    mopt.prune_by_magnitude(threshold)


@pytest.mark.parametrize('every', [0, -1, 1.0, None])
def test_bad_intervals_are_refused(every):
  with pytest.raises(ValueError, match='every must be'):
    mopt.prune_by_magnitude(TAU, every=every)


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
  new, _ = step_of(wrong)(params, wrong.init(params), grads)
  assert new[0] != 0
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
