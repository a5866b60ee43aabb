"""What every optimizer keeps; a new one is tested by being listed here."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt


def weighted_sum(learning_rate, *, num_objectives=2):
  weighting = mopt.fixed_weights((1.0,) * num_objectives)
  return optax.chain(
    mopt.aggregate(weighting, num_objectives=num_objectives),
    optax.scale_by_learning_rate(learning_rate),
  )


# Called as make(learning_rate, num_objectives=m).
OPTIMIZERS = {
  'smgd': mopt.smgd,
  'momentum': functools.partial(mopt.smgd, momentum=0.9),
  'nesterov': functools.partial(mopt.smgd, momentum=0.9, nesterov=True),
  'mrmsprop': mopt.mrmsprop,
  'madam': mopt.madam,
  'amsgrad': functools.partial(mopt.madam, amsgrad=True),
  'weighted_sum': weighted_sum,
}
each_optimizer = pytest.mark.parametrize('name', OPTIMIZERS)


def make(name, learning_rate=0.05, m=2):
  return OPTIMIZERS[name](learning_rate, num_objectives=m)


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = {'dense': {'kernel': (4, 3), 'bias': (3,)}, 'scale': ()}
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def make_grads(params, *leading, seed=1):
  """Random stacked gradients, leaves `[*leading, *param.shape]`."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=(*leading, *x.shape)), x.dtype),
    params,
  )


def step_of(tx):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def assert_finite_and_moved(new, old):
  for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old)):
    assert np.isfinite(np.asarray(x.astype(jnp.float32))).all()
    assert (x != y).all()


# -- Shapes and dtypes --------------------------------------------------------


@each_optimizer
def test_init_and_update_agree_eager_and_jitted(name):
  tx = make(name)
  params = make_params()
  grads = make_grads(params, 2)
  state = jax.jit(tx.init)(params)
  chex.assert_trees_all_equal(state, tx.init(params))
  updates, new_state = jax.jit(tx.update)(grads, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  eager = tx.update(grads, state, params)
  chex.assert_trees_all_close((updates, new_state), eager, rtol=1e-5, atol=1e-6)


@each_optimizer
def test_twenty_steps_of_three_objectives_keep_shapes_and_dtypes(name):
  m = 3
  tx = make(name, m=m)
  params = make_params()
  grads = make_grads(params, 20, m)

  @jax.jit
  def run(params, state):
    body = lambda carry, grads: (step_of(tx)(*carry, grads), None)
    return jax.lax.scan(body, (params, state), grads)[0]

  state = tx.init(params)
  new, new_state = run(params, state)  # a change of type fails in the scan
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  assert_finite_and_moved(new, params)
  weights = np.asarray(optax.tree.get(new_state, 'weights'))
  assert weights.shape == (m,)
  assert (weights >= 0).all()


@each_optimizer
def test_a_step_may_stand_in_a_branch(name):
  tx = make(name)
  params = make_params()
  grads = make_grads(params, 2)

  @jax.jit
  def maybe(go, params, state):
    take = lambda: step_of(tx)(params, state, grads)
    return jax.lax.cond(go, take, lambda: (params, state))

  state = tx.init(params)
  stayed, stayed_state = maybe(False, params, state)
  chex.assert_trees_all_equal((stayed, stayed_state), (params, state))
  moved, _ = maybe(True, params, state)
  assert_finite_and_moved(moved, params)


@each_optimizer
def test_bfloat16_parameters_stay_bfloat16(name):
  tx = make(name)
  params = make_params(jnp.bfloat16)
  grads = make_grads(params, 5, 2)

  @jax.jit
  def run(params, state):
    def body(carry, grads):
      params, state = carry
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(body, (params, state), grads)

  (new, _), updates = run(params, tx.init(params))
  for leaf in jax.tree.leaves((new, updates)):
    assert leaf.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(leaf.astype(jnp.float32))).all()
  assert (new['dense']['kernel'] != params['dense']['kernel']).any()


@each_optimizer
def test_repeated_calls_trace_once(name):
  tx = make(name)
  params = make_params()
  traces = []

  @jax.jit
  def step(params, state, grads):
    traces.append(name)
    return step_of(tx)(params, state, grads)

  state = jax.jit(tx.init)(params)
  for seed in range(3):
    grads = make_grads(params, 2, seed=seed)
    params, state = step(params, state, grads)
  assert len(traces) == 1


# -- In populations and on several devices ------------------------------------


@each_optimizer
def test_a_population_equals_its_members_one_by_one(name):
  tx = make(name)
  members = 3
  params = make_grads(make_params(), members, seed=2)
  grads = make_grads(make_params(), members, 4, 2)

  def run(params, grads):
    body = lambda carry, grads: (step_of(tx)(*carry, grads), None)
    return jax.lax.scan(body, (params, tx.init(params)), grads)[0]

  together = jax.jit(jax.vmap(run))(params, grads)
  alone = jax.jit(run)
  for index in range(members):
    member = jax.tree.map(lambda x, i=index: x[i], (params, grads))
    found = jax.tree.map(lambda x, i=index: x[i], together)
    chex.assert_trees_all_close(found, alone(*member), rtol=1e-5, atol=1e-6)


@each_optimizer
def test_four_devices_equal_one(name):
  # Weights are not linear in the gradients, so the stacked gradients are
  # averaged before the update.
  def error(params, batch):
    hidden = jnp.tanh(batch @ params['dense']['kernel'])
    bias = params['dense']['bias'] * params['scale']
    return jnp.mean((hidden + bias[None]) ** 2)

  grad_fn = mopt.value_and_stacked_grad(error, mopt.l2_norm_squared)
  tx = make(name)

  def train_step(params, state, batch):
    _, grads = jax.lax.pmean(grad_fn(params, batch), 'batch')
    return step_of(tx)(params, state, grads)

  rng = np.random.default_rng(3)
  batches = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)
  params = make_params()
  many = one = params, tx.init(params)
  on_many = jax.pmap(
    train_step, axis_name='batch', in_axes=(None, None, 0), out_axes=None
  )
  on_one = jax.jit(
    lambda params, state, batch: step_of(tx)(
      params, state, grad_fn(params, batch)[1]
    )
  )
  assert jax.local_device_count() == 4
  for batch in batches:
    many = on_many(*many, batch.reshape(4, 2, 4))
    one = on_one(*one, batch)
  chex.assert_trees_all_close(many, one, rtol=1e-4, atol=1e-5)
  assert_finite_and_moved(one[0], params)


# -- With the rest of Optax ---------------------------------------------------


@each_optimizer
def test_extra_arguments_are_accepted(name):
  tx = optax.chain(make(name), mopt.prune_by_magnitude(1e-3))
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
  params = make_params()
  grads = make_grads(params, 2)
  state = tx.init(params)
  update = jax.jit(tx.update)
  found = update(grads, state, params, value=1.0, grad=grads, anything=None)
  chex.assert_trees_all_equal(found, update(grads, state, params))


@each_optimizer
def test_the_rate_may_be_injected(name):
  injected = optax.inject_hyperparams(
    lambda learning_rate: make(name, learning_rate)
  )(learning_rate=0.05)
  params = make_params()
  grads = make_grads(params, 2)
  state = injected.init(params)
  update = jax.jit(injected.update)
  updates, _ = update(grads, state, params)
  plain = make(name)
  expected, _ = plain.update(grads, plain.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
  state.hyperparams['learning_rate'] = jnp.float32(0.1)
  doubled, _ = update(grads, state, params)
  expected = jax.tree.map(lambda x: 2 * x, expected)
  chex.assert_trees_all_close(doubled, expected, rtol=1e-5, atol=1e-7)


# What inject_hyperparams must leave alone: numbers that shape the program, and
# functions that are not schedules.
STATIC = {
  'smgd': ('weighting', 'num_objectives'),
  'mrmsprop': ('weighting', 'num_objectives'),
  'madam': ('weighting', 'num_objectives'),
}


@pytest.mark.parametrize('name', STATIC)
def test_every_hyperparameter_may_be_injected(name):
  factory = getattr(mopt, name)
  momentum = {'momentum': 0.9} if name == 'smgd' else {}
  tx = optax.inject_hyperparams(factory, static_args=STATIC[name])(
    0.05, **momentum
  )
  params = make_params()
  grads = make_grads(params, 2)
  state = tx.init(params)
  expected = {
    'smgd': {'learning_rate', 'momentum'},
    'mrmsprop': {'learning_rate', 'decay', 'eps'},
    'madam': {'learning_rate', 'b1', 'b2', 'eps'},
  }
  assert set(state.hyperparams) == expected[name]
  updates, _ = jax.jit(tx.update)(grads, state, params)
  plain = factory(0.05, **momentum)
  plain_updates, _ = plain.update(grads, plain.init(params), params)
  chex.assert_trees_all_close(updates, plain_updates, rtol=1e-4, atol=1e-6)


@each_optimizer
def test_pruning_last_gives_zeros(name):
  tx = optax.chain(
    make(name, 0.01), mopt.prune_by_magnitude(0.3, mask=mopt.dense_kernels)
  )
  params = make_params()
  step = jax.jit(step_of(tx))
  new, state = step(params, tx.init(params), make_grads(params, 2))
  kernel = np.asarray(new['dense']['kernel'])
  zeros = kernel == 0
  assert 0 < zeros.sum() < kernel.size
  assert not np.signbit(kernel[zeros]).any()
  assert (np.abs(kernel[~zeros]) >= 0.3).all()
  assert int(state[-1].nonzeros) == (~zeros).sum()
  assert (new['dense']['bias'] != 0).all()


# -- Descent ------------------------------------------------------------------


@each_optimizer
def test_convex_quadratics_end_at_a_pareto_stationary_point(name):
  # Both objectives want `shared` to be 0, and each its own number in `own`.
  wishes = -1.0, 1.0

  def objective(wish):
    return lambda params: (
      0.5 * jnp.sum((params['own'] - wish) ** 2)
      + 0.5 * jnp.sum(jnp.array([0.5, 1.0, 2.0]) * params['shared'] ** 2)
    )

  grad_fn = mopt.value_and_stacked_grad(*map(objective, wishes))
  tx = make(name, mopt.inverse_time_decay(0.1, 0.03))

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      values, grads = grad_fn(params)
      return step_of(tx)(params, state, grads), values

    carry = params, tx.init(params)
    (params, _), values = jax.lax.scan(body, carry, length=300)
    return params, values

  def shortest(params):
    gramian = mopt.gramian(grad_fn(params)[1])
    weights = np.asarray(mopt.min_norm_weights(gramian), np.float64)
    return weights @ np.asarray(gramian, np.float64) @ weights

  start = {'own': jnp.array([3.0]), 'shared': jnp.array([2.0, -1.0, 0.5])}
  end, values = run(start)
  assert shortest(start) > 1
  assert shortest(end) < 1e-3
  assert (values[-1] < values[0]).all()
