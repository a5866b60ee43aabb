"""What every optimizer keeps; a new one is tested by being listed here."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import mopt

pytestmark = pytest.mark.usefixtures('exact_products')


def weighted_by(weighting, learning_rate, *, num_objectives=2):
  return optax.chain(
    mopt.aggregate(weighting, num_objectives=num_objectives),
    optax.scale_by_learning_rate(learning_rate),
  )


def weighted_sum(learning_rate, *, num_objectives=2):
  weighting = mopt.fixed_weights((1.0,) * num_objectives)
  return weighted_by(weighting, learning_rate, num_objectives=num_objectives)


def preferred(learning_rate, *, num_objectives=2):
  preferences = np.arange(1, num_objectives + 1)
  weighting = mopt.preferred(mopt.min_norm_weights, preferences)
  return weighted_by(weighting, learning_rate, num_objectives=num_objectives)


def with_key(factory):
  return functools.partial(weighted_by, factory(jax.random.key(0)))


def inverse_squares(gramian):
  """Cheap to compile, for what wraps another weighting."""
  return 1 / (1 + jnp.diagonal(gramian))


# With defaults where there are any. All get the values of the objectives.
WITH_STATE = {
  'dwa': mopt.dwa(),
  'every': mopt.every(inverse_squares, 3),
  'famo': mopt.famo(),
  'gls': mopt.gls(),
  'gradnorm': mopt.gradnorm(),
  'imtl_l': mopt.imtl_l(),
  'modo': mopt.modo(0.05),
  'random_loss': mopt.random_loss(),
  'sdmgrad': mopt.sdmgrad(),
  'smoothed': mopt.smoothed(inverse_squares),
  'stch': mopt.stch(),
  'uncertainty': mopt.uncertainty(),
}

# Called as make(learning_rate, num_objectives=m).
INNERS = {
  'smgd': mopt.smgd,
  'momentum': functools.partial(mopt.smgd, momentum=0.9),
  'nesterov': functools.partial(mopt.smgd, momentum=0.9, nesterov=True),
  'mrmsprop': mopt.mrmsprop,
  'madam': mopt.madam,
  'amsgrad': functools.partial(mopt.madam, amsgrad=True),
  'weighted_sum': weighted_sum,
}
WEIGHTINGS = {
  'mean': functools.partial(weighted_by, mopt.mean),
  'dual_proj': functools.partial(weighted_by, mopt.dual_proj),
  'upgrad': functools.partial(weighted_by, mopt.upgrad),
  'imtl_g': functools.partial(weighted_by, mopt.imtl_g),
  'config': functools.partial(weighted_by, mopt.config),
  # As long as the least of the gradients, its steps would take for ever.
  'aligned_mtl': functools.partial(
    weighted_by, lambda gramian: 4 * mopt.aligned_mtl(gramian)
  ),
  'pcgrad': with_key(mopt.pcgrad),
  'gradvac': with_key(mopt.gradvac),
  'random': with_key(mopt.random),
  'preferred': preferred,
  'normalized': functools.partial(
    weighted_by, mopt.normalized(mopt.min_norm_weights, 'l2')
  ),
  'cagrad': functools.partial(weighted_by, mopt.cagrad(0.5)),
  'nash_mtl': functools.partial(weighted_by, mopt.nash_mtl),
  'fairgrad': functools.partial(weighted_by, mopt.fairgrad(0.5)),
  **{
    name: functools.partial(weighted_by, weighting)
    for name, weighting in WITH_STATE.items()
  },
}
# Of more than two objectives.
NEGATIVE_WEIGHTS = {'imtl_g', 'config', 'aligned_mtl'}
OPTIMIZERS = INNERS | WEIGHTINGS
each_optimizer = pytest.mark.parametrize('name', OPTIMIZERS)
# What does not depend on the weights: compiling takes most of the time.
each_inner = pytest.mark.parametrize('name', INNERS)


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


def some_values(grads):
  """Losses `[m]`, positive and of different sizes, of stacked gradients."""
  m = len(jax.tree.leaves(grads)[0])
  return 0.5 + jnp.arange(m, dtype=jnp.float32)


def update_of(tx):
  """The update with the values that some weightings ask for."""

  def update(grads, state, params, values=None):
    values = some_values(grads) if values is None else values
    return tx.update(grads, state, params, values=values)

  return update


def step_of(tx):
  def step(params, state, grads, values=None):
    updates, state = update_of(tx)(grads, state, params, values)
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
  updates, new_state = jax.jit(update_of(tx))(grads, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  eager = update_of(tx)(grads, state, params)
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
  assert (weights >= 0).all() or name in NEGATIVE_WEIGHTS


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


def run_steps(tx, params, grads):
  """Several steps as a scan, which fails if any dtype changes on the way."""

  @jax.jit
  def run(params, state):
    def body(carry, grads):
      params, state = carry
      updates, state = update_of(tx)(grads, state, params)
      return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(body, (params, state), grads)

  state = tx.init(params)
  (params, new_state), updates = run(params, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
  return params, updates, new_state


DTYPES = {
  'bfloat16': (jnp.bfloat16, False),
  'float16': (jnp.float16, False),
  'float32': (jnp.float32, False),
  'float32_with_x64': (jnp.float32, True),
  'float64': (jnp.float64, True),
}


def with_dtypes():
  """Every optimizer with every dtype; of weightings one m with each."""
  many = [(name, kind, m) for name in INNERS for kind in DTYPES for m in (2, 3)]
  for name in WEIGHTINGS:
    many += [(name, kind, 3 - i % 2) for i, kind in enumerate(DTYPES)]
  return many


@pytest.mark.parametrize(('name', 'kind', 'm'), with_dtypes())
def test_every_dtype_stays_and_weights_are_float32(name, kind, m):
  dtype, has_x64 = DTYPES[kind]
  with jax.enable_x64(has_x64):
    params = make_params(dtype)
    grads = make_grads(params, 5, m)
    tx = optax.chain(make(name, m=m), mopt.prune_by_magnitude(1e-3))
    new, updates, state = run_steps(tx, params, grads)
    assert optax.tree.get(state, 'weights').dtype == jnp.float32
    for leaf in jax.tree.leaves((new, updates)):
      assert leaf.dtype == dtype
      assert np.isfinite(np.asarray(leaf.astype(jnp.float32))).all()
    assert (new['dense']['kernel'] != params['dense']['kernel']).any()


@pytest.mark.parametrize('kind', ['bfloat16', 'float16'])
@each_inner
def test_half_precision_follows_float32(name, kind):
  # Of the same numbers, with a parameter that has no gradient: that is 0 / 0
  # where moments are float16, in which an eps of 1e-8 is 0.
  dtype, _ = DTYPES[kind]
  half = make_params(dtype)
  half_grads = make_grads(half, 4, 2)
  half_grads['dense']['bias'] *= 0
  as_float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  tx = make(name, 1e-3)
  _, found, _ = run_steps(tx, half, half_grads)
  _, expected, _ = run_steps(tx, as_float32(half), as_float32(half_grads))
  assert not found['dense']['bias'].any()
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    digits = float(jnp.finfo(dtype).eps)
    largest = float(jnp.abs(y).max())
    np.testing.assert_allclose(
      x.astype(jnp.float32), y, rtol=digits, atol=digits * largest
    )


@each_optimizer
def test_float64_keeps_its_digits(name):
  with jax.enable_x64(True):
    tx = optax.chain(make(name), mopt.prune_by_magnitude(1e-12))
    params = jax.tree.map(lambda x: 1e-10 * x, make_params(jnp.float64))
    grads = make_grads(params, 3, 2)
    new, updates, _ = run_steps(tx, params, grads)
    moved = jax.tree.map(lambda u: u.sum(axis=0), updates)
    expected = jax.tree.map(jnp.add, params, moved)
    chex.assert_trees_all_close(new, expected, rtol=1e-7, atol=1e-16)
    single = [x.astype(jnp.float32) for x in jax.tree.leaves(updates)]
    assert any((x != y).all() for x, y in zip(single, jax.tree.leaves(updates)))


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
def test_four_devices_equal_one(name, four_devices):
  # Weights are not linear in the gradients, so the stacked gradients are
  # averaged before the update.
  def error(params, batch):
    hidden = jnp.tanh(batch @ params['dense']['kernel'])
    bias = params['dense']['bias'] * params['scale']
    return jnp.mean((hidden + bias[None]) ** 2)

  grad_fn = mopt.value_and_stacked_grad(error, mopt.l2_norm_squared)
  tx = make(name)

  def train_step(params, state, batch):
    values, grads = jax.lax.pmean(grad_fn(params, batch), 'batch')
    return step_of(tx)(params, state, grads, values)

  rng = np.random.default_rng(3)
  batches = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)
  params = make_params()
  many = one = params, tx.init(params)
  on_many = jax.pmap(
    train_step,
    axis_name='batch',
    in_axes=(None, None, 0),
    out_axes=None,
    devices=four_devices,
  )

  @jax.jit
  def on_one(params, state, batch):
    values, grads = grad_fn(params, batch)
    return step_of(tx)(params, state, grads, values)

  for batch in batches:
    many = on_many(*many, batch.reshape(4, 2, 4))
    one = on_one(*one, batch)
  chex.assert_trees_all_close(many, one, rtol=1e-4, atol=1e-5)
  assert_finite_and_moved(one[0], params)


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
@pytest.mark.parametrize('m', [2, 3, 9])
def test_products_are_of_the_highest_precision(monkeypatch, platform, m):
  # By default GPUs round products of matrices to TF32, TPUs to bfloat16.
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  tx = make('madam', m=m)
  params = {'kernel': jnp.ones((64, 32)), 'bias': jnp.ones(32)}
  grads = make_grads(params, m)
  with jax.default_matmul_precision('default'):
    jaxpr = str(jax.make_jaxpr(tx.update)(grads, tx.init(params), params))
  products = jaxpr.count('dot_general[')
  assert products == jaxpr.count('HIGHEST') / 2
  # Where there are none the products of elements are summed.
  assert (products > 0) == (platform == 'cpu' or m > 3)


# -- Sharded parameters --------------------------------------------------------

SPECS = {
  'rows': P('x', None),
  'columns': P(None, 'y'),
  'both': P('x', 'y'),
  'one_of_two': P(('x', 'y'), None),
  'vector': P('y'),
  'whole': P(),
}
# What `jax.make_mesh` gives by default, and what it gave before.
each_mesh = pytest.mark.parametrize(
  'axis_type', [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name
)


def make_mesh(devices, axis_type):
  return jax.make_mesh(
    (2, 2), ('x', 'y'), axis_types=(axis_type,) * 2, devices=devices
  )


def numbers_to_shard(*leading, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {key: (8, 4)[: len(spec) or 2] for key, spec in SPECS.items()}
  return {
    key: rng.normal(size=(*leading, *shape)).astype(np.float32)
    for key, shape in shapes.items()
  }


def shard(tree, mesh, *leading):
  return {
    key: jax.device_put(x, NamedSharding(mesh, P(*leading, *SPECS[key])))
    for key, x in tree.items()
  }


def assert_sharded_as(found, mesh):
  for key, spec in SPECS.items():
    x = found[key]
    axes = len(spec) or 2
    stacked = (None,) * (x.ndim - axes)
    expected = NamedSharding(mesh, P(*stacked, *spec))
    assert x.sharding.is_equivalent_to(expected, x.ndim), key


@functools.cache
def whole_step(name, m):
  """With what the step of sharded parameters is compared, of each kind."""
  tx = optax.chain(make(name, m=m), mopt.prune_by_magnitude(0.3))
  params = numbers_to_shard()
  grads = numbers_to_shard(m, seed=1)
  return jax.jit(step_of(tx))(params, tx.init(params), grads)


@each_mesh
@pytest.mark.parametrize(
  ('name', 'm'),
  # The Gramian of many is another one.
  [(name, m) for name in INNERS for m in (2, 9)]
  + [(name, 3) for name in WEIGHTINGS],
)
def test_sharded_parameters_equal_whole_ones(name, m, axis_type, four_devices):
  tx = optax.chain(make(name, m=m), mopt.prune_by_magnitude(0.3))
  params, grads = numbers_to_shard(), numbers_to_shard(m, seed=1)
  step = jax.jit(step_of(tx))
  whole, whole_state = whole_step(name, m)
  mesh = make_mesh(four_devices, axis_type)
  with jax.set_mesh(mesh):
    params = shard(params, mesh)
    new, state = step(params, tx.init(params), shard(grads, mesh, None))
  assert_sharded_as(new, mesh)
  is_moment = lambda x: isinstance(x, dict)
  for moment in filter(is_moment, jax.tree.leaves(state, is_leaf=is_moment)):
    assert_sharded_as(moment, mesh)
  chex.assert_trees_all_close(new, whole, rtol=2e-5, atol=1e-6)
  chex.assert_trees_all_close(state, whole_state, rtol=2e-5, atol=1e-6)
  assert int(optax.tree.get(state, 'nonzeros')) < 8 * 4 * 5 + 8


@each_mesh
@pytest.mark.parametrize('is_jitted', [False, True], ids=['eager', 'jit'])
@pytest.mark.parametrize('m', [2, 3, 5])
def test_gramian_of_sharded_gradients(m, is_jitted, axis_type, four_devices):
  grads = numbers_to_shard(m)
  mesh = make_mesh(four_devices, axis_type)
  run = jax.jit(mopt.gramian) if is_jitted else mopt.gramian
  flat = np.concatenate([x.reshape(m, -1) for x in grads.values()], axis=1)
  flat = flat.astype(np.float64)
  with jax.set_mesh(mesh):
    found = run(shard(grads, mesh, None))
    np.testing.assert_allclose(found, flat @ flat.T, rtol=1e-5, atol=1e-5)
    weights = jax.jit(mopt.min_norm_weights)(found)
  expected = mopt.min_norm_weights(jnp.float32(flat @ flat.T))
  np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


@each_mesh
def test_a_population_of_sharded_members(axis_type, four_devices):
  tx = make('madam')
  params, grads = numbers_to_shard(3), numbers_to_shard(3, 2, seed=1)
  run = jax.jit(
    jax.vmap(lambda params, grads: step_of(tx)(params, tx.init(params), grads))
  )
  expected = run(params, grads)
  mesh = make_mesh(four_devices, axis_type)
  with jax.set_mesh(mesh):
    found = run(shard(params, mesh, None), shard(grads, mesh, None, None))
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


# -- With the rest of Optax ---------------------------------------------------


@each_optimizer
def test_extra_arguments_are_accepted(name):
  tx = optax.chain(make(name), mopt.prune_by_magnitude(1e-3))
  assert isinstance(tx, optax.GradientTransformationExtraArgs)
  params = make_params()
  grads = make_grads(params, 2)
  state = tx.init(params)
  update = jax.jit(tx.update)
  values = some_values(grads)
  found = update(
    grads, state, params, values=values, value=1.0, grad=grads, anything=None
  )
  expected = update(grads, state, params, values=values)
  chex.assert_trees_all_equal(found, expected)


@each_optimizer
def test_a_group_without_leaves_is_nothing_to_do(name):
  params = make_params()
  grads = make_grads(params, 2)
  alone = make(name)
  tx = optax.partition(
    {'all': alone, 'none': make(name)},
    jax.tree.map(lambda _: 'all', params),
  )
  update = jax.jit(update_of(alone))
  found, _ = jax.jit(update_of(tx))(grads, tx.init(params), params)
  expected, _ = update(grads, alone.init(params), params)
  chex.assert_trees_all_close(found, expected, rtol=1e-6)
  empty, state = update({}, alone.init({}), {}, some_values(grads))
  assert empty == {}
  assert optax.tree.get(state, 'weights').shape == (2,)


@each_inner
def test_the_rate_may_be_injected(name):
  injected = optax.inject_hyperparams(
    lambda learning_rate: make(name, learning_rate)
  )(learning_rate=0.05)
  params = make_params()
  grads = make_grads(params, 2)
  state = injected.init(params)
  update = jax.jit(update_of(injected))
  updates, _ = update(grads, state, params)
  plain = make(name)
  expected, _ = jax.jit(update_of(plain))(grads, plain.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
  state.hyperparams['learning_rate'] = jnp.float32(0.1)
  doubled, _ = update(grads, state, params)
  expected = jax.tree.map(lambda x: 2 * x, expected)
  chex.assert_trees_all_close(doubled, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ['smgd', 'mrmsprop', 'madam'])
def test_every_hyperparameter_may_be_injected(name):
  factory = getattr(mopt, name)
  momentum = {'momentum': 0.9} if name == 'smgd' else {}
  tx = optax.inject_hyperparams(factory)(0.05, **momentum)
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


@each_inner
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
  # Neither falls to 0, of which some take the logarithm.
  wishes = -1.0, 1.0

  def objective(wish):
    return lambda params: (
      1
      + 0.5 * jnp.sum((params['own'] - wish) ** 2)
      + 0.5 * jnp.sum(jnp.array([0.5, 1.0, 2.0]) * params['shared'] ** 2)
    )

  grad_fn = mopt.value_and_stacked_grad(*map(objective, wishes))
  tx = make(name, mopt.inverse_time_decay(0.1, 0.03))

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      values, grads = grad_fn(params)
      return step_of(tx)(params, state, grads, values), values

    carry = params, tx.init(params)
    (params, _), values = jax.lax.scan(body, carry, length=3000)
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
