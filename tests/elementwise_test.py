"""Stacked gradients that become one, each parameter by itself."""

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

KEY = jax.random.key(5)
MAKE = {
  'graddrop': lambda m: mopt.graddrop(KEY, num_objectives=m),
  'trimmed_mean': lambda m: mopt.trimmed_mean(1, num_objectives=m),
}
each = pytest.mark.parametrize('name', MAKE)


def make_params(dtype=jnp.float32):
  return {'w': jnp.zeros((4, 3), dtype), 'b': {'c': jnp.zeros((), dtype)}}


def make_grads(m, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.integers(-9, 10, (m, *x.shape)), dtype),
    make_params(),
  )


def step(tx, grads, params=None):
  params = jax.tree.map(lambda x: x[0], grads) if params is None else params
  return tx.update(grads, tx.init(params), params)


# -- graddrop -----------------------------------------------------------------


def test_each_parameter_takes_one_sign():
  grads = make_grads(5)
  updates, _ = step(MAKE['graddrop'](5), grads)
  for leaf, update in zip(jax.tree.leaves(grads), jax.tree.leaves(updates)):
    leaf, update = np.asarray(leaf), np.asarray(update)
    positive = np.where(leaf > 0, leaf, 0).sum(axis=0)
    negative = np.where(leaf < 0, leaf, 0).sum(axis=0)
    assert ((update == positive) | (update == negative)).all()


def test_the_chance_of_a_sign_is_its_share():
  # One parameter with a share of 3 in 4, many times over.
  grads = jnp.stack([jnp.full(20_000, 3.0), jnp.full(20_000, -1.0)])
  updates, _ = step(MAKE['graddrop'](2), grads)
  values, counts = np.unique(updates, return_counts=True)
  np.testing.assert_array_equal(values, [-1, 3])
  assert counts[1] / 20_000 == pytest.approx(0.75, abs=0.015)


def test_where_all_agree_it_is_the_sum():
  grads = {'w': jnp.array([[1.0, -1.0, 0.0, 2e38], [2.0, -3.0, 0.0, 0.0]])}
  for seed in range(20):
    updates, _ = step(mopt.graddrop(jax.random.key(seed)), grads)
    np.testing.assert_array_equal(
      updates['w'], np.float32([3.0, -4.0, 0.0, 2e38])
    )


def test_each_leaf_and_each_step_has_numbers_of_its_own():
  leaf = jnp.stack([jnp.ones(64), -jnp.ones(64)])
  grads, params = {'a': leaf, 'b': leaf}, {'a': leaf[0], 'b': leaf[0]}
  tx = mopt.graddrop(KEY)
  first, state = tx.update(grads, tx.init(params), params)
  second, _ = tx.update(grads, state, params)
  assert (first['a'] != first['b']).any()
  assert (first['a'] != second['a']).any()
  chex.assert_trees_all_equal(first, step(mopt.graddrop(KEY), grads)[0])


def test_what_is_not_finite_shows():
  for bad in (np.nan, np.inf, -np.inf):
    grads = jnp.array([[1.0, bad], [-1.0, 1.0]])
    updates, _ = step(mopt.graddrop(KEY), grads)
    np.testing.assert_array_equal(np.isnan(updates), [False, True])


# -- trimmed_mean -------------------------------------------------------------


@pytest.mark.parametrize(('m', 'count'), [(2, 0), (3, 1), (7, 2), (8, 3)])
def test_the_ends_are_trimmed(m, count):
  grads = make_grads(m)
  updates, state = step(mopt.trimmed_mean(count, num_objectives=m), grads)
  assert state == optax.EmptyState()
  for leaf, update in zip(jax.tree.leaves(grads), jax.tree.leaves(updates)):
    kept = np.sort(np.asarray(leaf, np.float64), axis=0)[count : m - count]
    np.testing.assert_allclose(update, kept.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize('lie', [1e30, -1e30, np.nan, np.inf, -np.inf])
def test_one_who_lies_cannot_leave_the_range_of_the_others(lie):
  grads = make_grads(4)['w']
  updates, _ = step(MAKE['trimmed_mean'](4), grads.at[1].set(lie))
  others = np.delete(np.asarray(grads), 1, axis=0)
  assert (updates >= others.min(axis=0)).all()
  assert (updates <= others.max(axis=0)).all()


def test_two_who_are_not_finite_show():
  grads = make_grads(4)['w'].at[:2].set(np.nan)
  assert np.isnan(step(MAKE['trimmed_mean'](4), grads)[0]).all()


# -- Both ---------------------------------------------------------------------


@each
@pytest.mark.parametrize('kind', ['bfloat16', 'float16', 'float32', 'float64'])
def test_every_dtype_stays(name, kind):
  with jax.enable_x64(kind == 'float64'):
    grads = make_grads(3, kind)
    tx = MAKE[name](3)
    params = make_params(kind)
    start = tx.init(params)
    updates, state = jax.jit(tx.update)(grads, start, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    expected, _ = step(MAKE[name](3), exact)
    if kind != 'float64':  # Of which numbers are drawn otherwise.
      chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), updates),
        expected,
        rtol=float(jnp.finfo(kind).eps),
      )


@each
def test_a_population_and_a_scan(name):
  tx = optax.chain(MAKE[name](3), optax.scale_by_learning_rate(0.1))

  def run(params, grads):
    def body(carry, grads):
      params, state = carry
      updates, state = tx.update(grads, state, params, value=1.0)
      return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(body, (params, tx.init(params)), grads)[0][0]

  leaf = np.random.default_rng(0).normal(size=(26, 5, 3, 4))
  grads, params = jnp.asarray(leaf, jnp.float32), jnp.zeros((26, 4))
  together = jax.jit(jax.vmap(run))(params, grads)
  alone = np.stack([jax.jit(run)(*member) for member in zip(params, grads)])
  np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
  assert (together != 0).all()


@each
def test_four_devices_equal_one(name, four_devices):
  tx = MAKE[name](3)
  grads = make_grads(3)
  params = make_params()
  copies = jax.tree.map(lambda x: jnp.stack([x] * 4), grads)

  def update(params, grads):
    grads = jax.lax.pmean(grads, 'batch')
    return tx.update(grads, tx.init(params), params)[0]

  found = jax.pmap(
    update,
    axis_name='batch',
    in_axes=(None, 0),
    out_axes=None,
    devices=four_devices,
  )(params, copies)
  chex.assert_trees_all_close(found, step(tx, grads)[0], rtol=1e-6)


@each
@pytest.mark.parametrize('axis_type', [AxisType.Explicit, AxisType.Auto])
def test_sharded_parameters_equal_whole_ones(name, axis_type, four_devices):
  tx = MAKE[name](3)
  numbers = np.random.default_rng(0).integers(-9, 10, (3, 8, 4))
  grads, params = jnp.asarray(numbers, jnp.float32), jnp.zeros((8, 4))
  whole, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  mesh = jax.make_mesh(
    (2, 2), ('x', 'y'), axis_types=(axis_type,) * 2, devices=four_devices
  )
  with jax.set_mesh(mesh):
    sharding = NamedSharding(mesh, P('x', 'y'))
    params = jax.device_put(params, sharding)
    grads = jax.device_put(grads, NamedSharding(mesh, P(None, 'x', 'y')))
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  np.testing.assert_array_equal(found, whole)
  assert found.sharding.is_equivalent_to(sharding, 2)


@each
def test_nothing_to_do(name):
  tx = MAKE[name](3)
  updates, _ = tx.update({}, tx.init({}), {})
  assert updates == {}


@each
def test_what_is_not_stacked_is_refused(name):
  tx = MAKE[name](3)
  params = make_params()
  state = tx.init(params)
  with pytest.raises(ValueError, match=f'{name} needs the parameters'):
    tx.update(make_grads(3), state)
  with pytest.raises(ValueError, match="stacked over 3 objectives.*'b/c'"):
    tx.update(make_grads(4), state, params)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: mopt.graddrop(0), 'key must be one random key'),
    (lambda: mopt.graddrop(KEY, num_objectives=1), 'num_objectives must be an'),
    (lambda: mopt.trimmed_mean(-1, num_objectives=3), 'num_trimmed must be an'),
    (lambda: mopt.trimmed_mean(0, num_objectives=1), 'num_objectives must be'),
    (
      lambda: mopt.trimmed_mean(2, num_objectives=4),
      'num_objectives must be > 2 num_trimmed = 4, got 4',
    ),
  ],
)
def test_other_arguments_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
