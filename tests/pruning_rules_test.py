"""What every rule that prunes keeps; a new one is tested by being listed here.

Each of them has a twin in NumPy, which sorts and loops where the rule bisects
and broadcasts.
"""

import functools
import itertools

from flax import linen as nn
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

TAU = 0.3


def by_magnitude(old, new):
  del old
  return {k: ~(np.abs(x) < TAU) for k, x in new.items()}


def with_hysteresis(old, new):
  keep = by_magnitude(old, new)
  returns = {k: ~(np.abs(x) < 3 * TAU) for k, x in new.items()}
  return {k: np.where(old[k] == 0, returns[k], keep[k]) for k in new}


def zeros_kept(old, new):
  return {k: (old[k] != 0) | ~np.isfinite(x) for k, x in new.items()}


def to_sparsity(old, new, share=0.6, scope='global'):
  """Sorted by magnitude, and of equal ones from the last to the first."""
  del old
  if scope == 'leaf':
    each = (to_sparsity(None, {k: x}, share) for k, x in new.items())
    return dict(itertools.chain(*(keep.items() for keep in each)))
  flat = np.concatenate([x.ravel() for x in new.values()] or [np.zeros(0)])
  places = np.arange(flat.size)
  order = sorted(
    places[np.isfinite(flat)], key=lambda k: (abs(flat[k]), -places[k])
  )
  number = int(np.round(np.float32(share) * np.float32(flat.size)))
  keep = np.ones(flat.size, bool)
  keep[order[:number]] = False
  ends = np.cumsum([x.size for x in new.values()])[:-1]
  parts = np.split(keep, ends)
  return {k: p.reshape(x.shape) for (k, x), p in zip(new.items(), parts)}


def is_kernel(name, x):
  return x.ndim >= 2 and not name.endswith('bias')


def n_of_m(old, new, n=2, m=4):
  del old
  keep = {k: np.ones(x.shape, bool) for k, x in new.items()}
  for name, x in new.items():
    if not is_kernel(name, x):
      continue
    *outer, size, width = x.shape
    for row in np.ndindex(*outer, width):
      for start in range(0, size, m):
        column = (*row[:-1], slice(start, start + m), row[-1])
        group = np.nan_to_num(np.abs(x[column]), nan=np.inf, posinf=np.inf)
        order = sorted(range(len(group)), key=lambda k: (-group[k], k))
        stays = np.isin(np.arange(len(group)), order[:n])
        keep[name][column] = stays | ~np.isfinite(group)
  return keep


def units(old, new, threshold=2.0):
  del old
  keep = {k: np.ones(x.shape, bool) for k, x in new.items()}
  for name, x in new.items():
    if not is_kernel(name, x):
      continue
    for unit in range(x.shape[-1]):
      norm = np.linalg.norm(x[..., unit].astype(np.float64).ravel())
      keep[name][..., unit] = stays = not norm < threshold
      bias = name.replace('kernel', 'bias')
      if bias in new:
        keep[bias][unit] = stays or not np.isfinite(new[bias][unit])
  return keep


# Called with `mask` and, but for keep_zeros, `every`; and their twins.
RULES = {
  'magnitude': (functools.partial(mopt.prune_by_magnitude, TAU), by_magnitude),
  'hysteresis': (
    functools.partial(mopt.prune_by_magnitude, TAU, return_threshold=3 * TAU),
    with_hysteresis,
  ),
  'keep_zeros': (mopt.keep_zeros, zeros_kept),
  'sparsity': (functools.partial(mopt.prune_to_sparsity, 0.6), to_sparsity),
  'sparsity_leaf': (
    functools.partial(mopt.prune_to_sparsity, 0.6, scope='leaf'),
    functools.partial(to_sparsity, scope='leaf'),
  ),
  'n_of_m': (functools.partial(mopt.prune_n_of_m, 2, 4), n_of_m),
  'units': (functools.partial(mopt.prune_units, 2.0), units),
}
each_rule = pytest.mark.parametrize('name', RULES)
each_with_every = pytest.mark.parametrize(
  'name', [name for name in RULES if name != 'keep_zeros']
)


def make(name, **kwargs):
  return RULES[name][0](**kwargs)


SHAPES = {
  'conv/kernel': (3, 3, 2, 4),
  'dense/bias': (6,),
  'dense/kernel': (10, 6),
  'scale': (),
}


def make_tree(seed, dtype=jnp.float32, leading=(), shapes=SHAPES):
  """Some zeros, and among the other weights all sizes."""
  rng = np.random.default_rng(seed)

  def draw(shape):
    x = rng.normal(size=(*leading, *shape)) * 10 ** rng.uniform(
      -2, 0.3, size=(*leading, *shape)
    )
    return np.asarray(x * (rng.uniform(size=x.shape) < 0.7), dtype)

  return {name: draw(shape) for name, shape in shapes.items()}


def nested(tree):
  found = {}
  for name, x in tree.items():
    *above, last = name.split('/')
    layer = functools.reduce(lambda d, key: d.setdefault(key, {}), above, found)
    layer[last] = jnp.asarray(x)
  return found


def flat(tree):
  paths = jax.tree_util.tree_leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {name(path): np.asarray(x) for path, x in paths}


def twin(name, old, updates):
  """What is left by the rule of NumPy."""
  with np.errstate(invalid='ignore', over='ignore'):
    sums = {k: old[k] + updates[k].astype(x.dtype) for k, x in old.items()}
  keep = RULES[name][1](old, sums)
  return {
    k: np.where(keep[k], x, np.zeros((), x.dtype)) for k, x in sums.items()
  }


def assert_same(found, expected):
  found = flat(found)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype
    is_nan = np.isnan(x.astype(float))
    np.testing.assert_array_equal(np.isnan(found[name].astype(float)), is_nan)
    np.testing.assert_array_equal(found[name][~is_nan], x[~is_nan])
    # Exact zeros are +0.0; a zero that is kept may be -0.0.
    minus = np.signbit(found[name]) & ~np.signbit(x)
    assert not minus[x == 0].any()


def step_of(tx):
  def step(params, state, updates):
    updates, state = tx.update(updates, state, params)
    return optax.apply_updates(params, updates), state

  return step


def run_once(name, old, updates, run=lambda step: step, **kwargs):
  tx = make(name, **kwargs)
  params = nested(old)
  step = run(step_of(tx))
  return step(params, tx.init(params), nested(updates))


# -- Exact zeros, whatever runs them ------------------------------------------

DTYPES = {
  'f32': (jnp.float32, jnp.float32),
  'bf16': (jnp.bfloat16, jnp.bfloat16),
  'f16': (jnp.float16, jnp.float16),
  'bf16_params': (jnp.bfloat16, jnp.float32),
  'bf16_updates': (jnp.float32, jnp.bfloat16),
}


@pytest.mark.parametrize('dtypes', DTYPES)
@each_rule
def test_what_is_left_is_that_of_numpy(name, dtypes):
  param_dtype, update_dtype = DTYPES[dtypes]
  old, updates = make_tree(0, param_dtype), make_tree(1, update_dtype)
  new, state = run_once(name, old, updates, jax.jit)
  expected = twin(name, old, updates)
  assert_same(new, expected)
  left = sum(np.count_nonzero(x) for x in expected.values())
  size = sum(x.size for x in expected.values())
  assert 0.2 < left / size < 0.9
  assert (int(state.count), int(state.nonzeros)) == (1, left)
  assert state.nonzeros.dtype == state.count.dtype == jnp.int32


@each_rule
def test_float64_is_compared_there(name):
  with jax.enable_x64(True):
    old, updates = make_tree(0, np.float64), make_tree(1, np.float64)
    # Weights that differ beyond float32, and a tree of two dtypes.
    old['dense/kernel'][:, 0] = 1.0 + 1e-12 * np.arange(10)
    updates['dense/kernel'][:, 0] = 0
    old['scale'] = old['scale'].astype(np.float32)
    new, _ = run_once(name, old, updates)
    assert_same(new, twin(name, old, updates))


@each_rule
def test_rules_run_without_jit(name):
  old, updates = make_tree(0), make_tree(1)
  new, state = run_once(name, old, updates)
  assert_same(new, twin(name, old, updates))
  assert int(state.nonzeros) == int(mopt.count_nonzero(new).total)


def member(k, tree):
  return jax.tree.map(lambda x: np.asarray(x)[k], tree)


@pytest.mark.parametrize('transform', [jax.vmap, jax.pmap])
@each_rule
def test_members_of_a_population_are_pruned_each_by_itself(name, transform):
  old, updates = (make_tree(seed, leading=(4,)) for seed in (0, 1))
  tx = make(name)
  step = step_of(tx)
  run = transform(lambda p, u: step(p, tx.init(p), u))
  new, state = run(nested(old), nested(updates))
  for k in range(4):
    of_member = functools.partial(member, k)
    assert_same(of_member(new), twin(name, of_member(old), of_member(updates)))
    count = mopt.count_nonzero(of_member(new)).total
    assert int(state.nonzeros[k]) == int(count)


@each_rule
def test_rules_run_in_a_scan(name):
  old, updates = make_tree(0), make_tree(1, leading=(3,))
  tx = make(name)

  @jax.jit
  def run(params, updates):
    def body(carry, updates):
      carry = step_of(tx)(*carry, updates)
      return carry, carry[1].nonzeros

    return jax.lax.scan(body, (params, tx.init(params)), updates)

  (new, state), nonzeros = run(nested(old), nested(updates))
  expected, counts = old, []
  for k in range(3):
    expected = twin(name, expected, {n: x[k] for n, x in updates.items()})
    counts.append(sum(np.count_nonzero(x) for x in expected.values()))
  assert_same(new, expected)
  np.testing.assert_array_equal(nonzeros, counts)
  assert int(state.count) == 3


@pytest.mark.parametrize(
  ('spec', 'axes'),
  [(('x', 'y'), 'Auto'), (('x', 'y'), 'Explicit'), ((None, 'y'), 'Explicit')],
  ids=['auto', 'explicit', 'explicit_out'],
)
@each_rule
def test_shards_are_pruned_as_the_whole(name, spec, axes, four_devices):
  kind = getattr(jax.sharding.AxisType, axes)
  mesh = jax.make_mesh(
    (2, 2), ('x', 'y'), axis_types=(kind, kind), devices=four_devices
  )
  shapes = {'bias': (6,), 'kernel': (10, 6)}
  old, updates = (make_tree(seed, shapes=shapes) for seed in (0, 1))
  old['kernel'][3:8] = old['kernel'][2]  # ties on both shards
  updates['kernel'][3:8] = updates['kernel'][2]
  specs = {'bias': jax.P(spec[-1]), 'kernel': jax.P(*spec)}
  tx = make(name)
  with jax.set_mesh(mesh):
    shardings = {k: jax.NamedSharding(mesh, spec) for k, spec in specs.items()}
    params, steps = (jax.device_put(x, shardings) for x in (old, updates))
    step = step_of(tx)
    new, state = jax.jit(step)(params, tx.init(params), steps)
    assert_same(new, twin(name, old, updates))
    for k, leaf in new.items():
      assert leaf.sharding.is_equivalent_to(shardings[k], leaf.ndim)
    assert int(state.nonzeros) == int(mopt.count_nonzero(new).total)


# -- What must survive --------------------------------------------------------


@pytest.mark.parametrize('value', [np.nan, -np.inf])
@pytest.mark.parametrize('in_updates', [False, True])
@each_rule
def test_weights_that_are_not_finite_are_neither_pruned_nor_hidden(
  name, in_updates, value
):
  old, updates = make_tree(0), make_tree(1)
  places = {'dense/kernel': (0, 2), 'dense/bias': (1,), 'conv/kernel': (0,) * 4}
  for leaf, place in places.items():
    old[leaf][place] = 0.0
    (updates if in_updates else old)[leaf][place] = value
  new, _ = run_once(name, old, updates)
  assert_same(new, twin(name, old, updates))
  new = flat(new)
  for leaf, place in places.items():
    np.testing.assert_array_equal(new[leaf][place], value)


@each_rule
def test_trees_of_zeros_stay_zero(name):
  old = {k: np.zeros_like(x) for k, x in make_tree(0).items()}
  old['dense/kernel'][0] = -0.0
  new, state = run_once(name, old, old)
  assert_same(new, twin(name, old, old))
  assert int(state.nonzeros) == 0


@each_rule
def test_updates_elsewhere_pass_through(name):
  params = {
    'first': {'kernel': jnp.full((4, 2), 1e-3)},
    'second': {'kernel': jnp.full((4, 2), 1e-3), 'count': jnp.arange(2)},
  }
  mask = mopt.mask_by_path(lambda path, _: path.startswith('first'))
  tx = make(name, mask=mask)
  updates = jax.tree.map(jnp.zeros_like, params)
  updates['second']['kernel'] += 1e-3
  found, state = tx.update(updates, tx.init(params), params)
  jax.tree.map(
    np.testing.assert_array_equal, found['second'], updates['second']
  )
  assert found['second']['count'] is updates['second']['count']
  new = optax.apply_updates(params, found)
  count = mopt.count_nonzero(new, mask)
  assert int(state.nonzeros) == int(count.total)


@pytest.mark.parametrize('tree', [{}, [], {'a': {}, 'b': ()}])
@pytest.mark.parametrize('mask', [None, mopt.dense_kernels])
@each_rule
def test_trees_without_leaves_have_nothing_to_prune(name, tree, mask):
  tx = make(name, mask=mask)
  updates, state = tx.update(tree, tx.init(tree), tree)
  assert updates == tree
  assert (int(state.count), int(state.nonzeros)) == (1, 0)


@pytest.mark.parametrize('shape', [(0, 3), (2, 3, 0)])
@each_rule
def test_leaves_without_entries_are_left_alone(name, shape):
  params = {'kernel': jnp.zeros(shape), 'other': {'kernel': jnp.ones((4, 1))}}
  tx = make(name)
  updates = jax.tree.map(jnp.zeros_like, params)
  updates, state = tx.update(updates, tx.init(params), params)
  assert updates['kernel'].shape == shape
  expected = RULES[name][1](flat(params), flat(params))['other/kernel'].sum()
  assert int(state.nonzeros) == expected


@each_rule
def test_a_mask_of_false_prunes_nothing(name):
  old, updates = make_tree(0), make_tree(1)
  new, state = run_once(name, old, updates, mask=False)
  for k, x in flat(new).items():
    np.testing.assert_array_equal(x, old[k] + updates[k])
  assert int(state.nonzeros) == 0


@each_with_every
def test_rules_prune_at_updates_k_and_2k_only(name):
  old, updates = make_tree(0), make_tree(1)
  old = {k: np.where(x == 0, np.float32(1e-3), x) for k, x in old.items()}
  tx = make(name, every=3)
  params, zeros = nested(old), nested({k: 0 * x for k, x in updates.items()})
  step, state = jax.jit(step_of(tx)), tx.init(params)
  for k in range(1, 8):
    new, state = step(params, state, zeros)
    expected = twin(name, old, flat(zeros)) if k % 3 == 0 else old
    assert_same(new, expected)
    assert int(state.count) == k


@each_with_every
def test_intervals_may_be_traced(name):
  old, zeros = make_tree(0), {k: 0 * x for k, x in make_tree(0).items()}
  old = {k: np.where(x == 0, np.float32(1e-3), x) for k, x in old.items()}

  @jax.jit
  @jax.vmap
  def run(every):
    return run_once(name, old, zeros, every=every)[0]

  new = run(jnp.array([1, 2]))
  assert_same(jax.tree.map(lambda x: x[0], new), twin(name, old, zeros))
  assert_same(jax.tree.map(lambda x: x[1], new), old)


@each_rule
def test_zeros_are_exact_at_the_end_of_a_chain(name):
  old, grads = make_tree(0), make_tree(1)
  tx = optax.chain(optax.adam(0.3), make(name))
  params = nested(old)
  state = tx.init(params)
  step = jax.jit(step_of(tx))
  for _ in range(3):
    params, state = step(params, state, nested(grads))
    count = mopt.count_nonzero(params)
    assert int(state[-1].nonzeros) == int(count.total) < count.size


# -- What is refused ----------------------------------------------------------


@each_rule
def test_updates_that_are_not_those_of_the_parameters_are_refused(name):
  params = {'kernel': jnp.ones((4, 2))}
  tx = make(name)
  state = tx.init(params)
  with pytest.raises(ValueError, match='(prune|keep)_.* needs the parameters'):
    tx.update(params, state)
  stacked = {'kernel': jnp.ones((2, 4, 2))}
  with pytest.raises(ValueError, match="last of a chain.*'kernel', got"):
    tx.update(stacked, state, params)


@each_rule
def test_masks_and_leaves_that_do_not_fit_are_refused(name):
  params = {'kernel': jnp.ones((4, 2)), 'bias': jnp.ones(2)}
  none = mopt.mask_by_path(lambda path, leaf: False)
  with pytest.raises(ValueError, match='selects none of the leaves'):
    make(name, mask=none).init(params)
  with pytest.raises(ValueError, match='structure of the parameters'):
    make(name, mask={'kernel': True}).init(params)
  with pytest.raises(TypeError, match="real numbers at 'bias'"):
    make(name).init(params | {'bias': 'text'})


@pytest.mark.parametrize('every', [0, -1, 1.0, None, True, '2'])
@each_with_every
def test_bad_intervals_are_refused(name, every):
  with pytest.raises(ValueError, match='every must be an integer >= 1'):
    make(name, every=every)


@pytest.mark.parametrize('factory', [mopt.prune_by_magnitude, mopt.prune_units])
@pytest.mark.parametrize(
  'threshold', [0.0, -1.0, np.nan, np.inf, 'high', [1.0]]
)
def test_bad_thresholds_are_refused(factory, threshold):
  with pytest.raises(ValueError, match='threshold must be'):
    factory(threshold)


def test_a_threshold_of_units_is_one_of_float32():
  half = {'kernel': jnp.full((4, 2), 1e-5, jnp.float16)}
  # 0 in float16, where norms are not compared.
  assert int(mopt.prune_units(1e-9).init(half).nonzeros) == 8
  with pytest.raises(ValueError, match="1e-46 is 0.0 in float32.*'kernel'"):
    mopt.prune_units(1e-46).init(half)


# -- Hysteresis ---------------------------------------------------------------


def returned(updates, **kwargs):
  """Where weights that were zero differ from it after one update."""
  tx = mopt.prune_by_magnitude(**kwargs)
  params = jnp.zeros(len(updates))
  found, _ = jax.jit(tx.update)(jnp.array(updates), tx.init(params), params)
  return (np.asarray(found) != 0).tolist()


def test_a_zero_returns_at_the_return_threshold_and_beyond():
  below = float(np.nextafter(np.float32(0.9), np.float32(0)))
  updates = [0.2, 0.3, below, 0.9, -1.0]
  assert returned(updates, threshold=0.3) == [False, True, True, True, True]
  found = returned(updates, threshold=0.3, return_threshold=0.9)
  assert found == [False, False, False, True, True]
  # A weight that is not zero stays at the threshold.
  tx = mopt.prune_by_magnitude(0.3, return_threshold=0.9)
  params = jnp.array([0.3, 0.29, -0.5])
  found, _ = tx.update(jnp.zeros(3), tx.init(params), params)
  np.testing.assert_array_equal(found, np.float32([0, -0.29, 0]))


def test_a_return_threshold_that_is_the_threshold_changes_nothing():
  old, updates = make_tree(0), make_tree(1)
  found = run_once('magnitude', old, updates, return_threshold=TAU)
  expected = run_once('magnitude', old, updates)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_zero_is_held_between_prunings_as_well():
  tx = mopt.prune_by_magnitude(0.3, every=3, return_threshold=0.9)
  params = jnp.array([0.0, 0.0, 0.2])
  updates = jnp.array([0.5, 1.0, 0.0])
  new, _ = step_of(tx)(params, tx.init(params), updates)
  np.testing.assert_array_equal(new, np.float32([0, 1.0, 0.2]))


def test_return_thresholds_may_be_schedules():
  rising = lambda count: 0.3 * (count + 1)
  tx = mopt.prune_by_magnitude(0.1, return_threshold=rising)
  params = jnp.zeros(3)
  updates, state = jnp.array([0.25, 0.5, 0.8]), tx.init(params)
  seen = []
  for _ in range(3):
    found, state = jax.jit(tx.update)(updates, state, params)
    seen.append(int((found != 0).sum()))
  assert seen == [2, 1, 0]


@pytest.mark.parametrize('value', [0.0, -1.0, np.nan, np.inf])
def test_schedules_without_a_threshold_hold_no_zeros(value):
  schedule = lambda count: jnp.float32(value)
  held = {'threshold': schedule, 'return_threshold': 0.9}
  assert returned([1e-3, 0.5], **held) == [True, True]
  none = {'threshold': 0.3, 'return_threshold': schedule}
  assert returned([1e-3, 0.5], **none) == [False, True]


def test_hysteresis_is_injected_as_other_thresholds():
  inject = optax.inject_hyperparams(mopt.prune_by_magnitude)
  tx = inject(0.3, return_threshold=lambda count: 0.9)
  params = jnp.zeros(2)
  updates = jnp.array([0.5, 1.0])
  found, _ = jax.jit(tx.update)(updates, tx.init(params), params)
  np.testing.assert_array_equal(found, [0, 1])


@pytest.mark.parametrize('value', [0.2, np.float32(0.2), jnp.float32(0.2)])
def test_a_return_threshold_below_the_threshold_is_refused(value):
  message = 'return_threshold must be at least the threshold, 0.3, got 0.2'
  with pytest.raises(ValueError, match=message):
    mopt.prune_by_magnitude(0.3, return_threshold=value)
  with pytest.raises(ValueError, match='return_threshold must be a positive'):
    mopt.prune_by_magnitude(0.3, return_threshold=np.inf)
  tx = mopt.prune_by_magnitude(0.3, return_threshold=1e5)
  with pytest.raises(
    ValueError, match="return_threshold 100000.0 is inf in.*'a"
  ):
    tx.init({'a': jnp.ones(2, jnp.float16)})


# -- Hard pruning -------------------------------------------------------------


def test_keep_zeros_before_a_rule_brings_nothing_back():
  old = make_tree(0)
  share = mopt.cubic_sparsity(0.8, begin=0, end=10)
  tx = optax.chain(
    optax.adam(0.5), mopt.keep_zeros(), mopt.prune_to_sparsity(share, every=2)
  )
  params = nested(old)
  state, step = tx.init(params), jax.jit(step_of(tx))
  size = sum(x.size for x in old.values())
  zeros = {k: x == 0 for k, x in old.items()}
  for k in range(14):
    params, state = step(params, state, nested(make_tree(k + 1)))
    now = {name: x == 0 for name, x in flat(params).items()}
    assert all((now[name] | ~zeros[name]).all() for name in now)
    zeros = now
  number = np.round(np.float32(0.8) * np.float32(size))
  assert sum(x.sum() for x in zeros.values()) == number


# -- A share of zeros ---------------------------------------------------------

# Few values, so that many weights are equal; and all the others.
numbers = st.one_of(
  st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, np.nan, np.inf, -np.inf]),
  st.floats(width=32, allow_nan=False, allow_subnormal=False),
)


def prune_all(tx, weights):
  """What a rule leaves of weights that do not move."""
  params = {k: jnp.asarray(x) for k, x in weights.items()}
  zeros = jax.tree.map(jnp.zeros_like, params)
  return step_of(tx)(params, tx.init(params), zeros)


@functools.cache
def prune_to(scope):
  """Compiled once, for weights of any values."""

  @jax.jit
  def prune(share, weights):
    return prune_all(mopt.prune_to_sparsity(share, scope=scope), weights)

  return prune


@settings(max_examples=100)
@given(
  st.lists(numbers, min_size=19, max_size=19),
  st.floats(0, 1, width=32),
  st.sampled_from(['global', 'leaf']),
  st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@example([1.0, -1.0] * 9 + [1.0], 0.5, 'global', jnp.float32)
@example([np.nan] * 12 + [np.inf] * 6 + [1.0], 1.0, 'global', jnp.float32)
@example([0.0] * 18 + [1.0], 0.0, 'global', jnp.float32)
@example([2.0] * 19, 1.0, 'leaf', jnp.bfloat16)
def test_the_smallest_and_of_equal_ones_the_last_go(
  values, share, scope, dtype
):
  with np.errstate(over='ignore'):
    values = np.array(values, dtype)
  weights = {'a': values[:6].reshape(2, 3), 'b': values[6:7], 'c': values[7:]}
  new, state = prune_to(scope)(np.float32(share), weights)
  keep = to_sparsity(None, weights, share, scope)
  expected = {k: np.where(keep[k], x, dtype(0)) for k, x in weights.items()}
  assert_same(new, expected)
  assert int(state.nonzeros) == sum(map(np.count_nonzero, expected.values()))


@pytest.mark.parametrize('share', [0, 0.25, 0.5, 0.9, 1.0, np.float64(0.75)])
@pytest.mark.parametrize('number', [1, 7, 58_920])
def test_counts_are_exact(share, number):
  rng = np.random.default_rng(0)
  weights = {'a': rng.normal(size=number).astype(np.float32)}
  weights['a'][: number // 2] = np.round(weights['a'][: number // 2], 1) + 0.25
  _, state = prune_all(mopt.prune_to_sparsity(share), weights)
  assert number - int(state.nonzeros) == round(share * number)


def test_counts_are_exact_where_compilers_fuse_sums():
  # Rounded once or twice: p - rate * g differs in the last bit, and weights are
  # so close that this would change their order.
  number = 100_000
  rng = np.random.default_rng(0)
  params = jnp.asarray(1 + 1e-4 * rng.uniform(size=number), jnp.float32)
  tx = optax.chain(optax.sgd(0.1), mopt.prune_to_sparsity(0.7))
  step = jax.jit(step_of(tx))
  for seed in range(5):
    rng = np.random.default_rng(seed)
    grads = jnp.asarray(1e-4 * rng.normal(size=number), jnp.float32)
    new, state = step(params, tx.init(params), grads)
    assert int(jnp.sum(new == 0)) == 70_000
    assert int(state[-1].nonzeros) == 30_000


def test_zeros_go_first_and_more_of_them_stay_zero():
  weights = {'a': np.float32([0, 3, 0, 0, -1, 2])}
  for share, left in ((0.2, 3), (0.5, 3), (0.67, 2)):
    _, state = prune_all(mopt.prune_to_sparsity(share), weights)
    assert int(state.nonzeros) == left


@pytest.mark.parametrize(
  ('value', 'left'), [(-1.0, 4), (np.nan, 4), (np.inf, 4), (1.5, 0), (0.5, 2)]
)
def test_shares_that_are_traced_are_taken_within_their_ends(value, left):
  tx = mopt.prune_to_sparsity(lambda count: jnp.float32(value))
  _, state = prune_all(tx, {'a': np.float32([1, 2, 3, 4])})
  assert int(state.nonzeros) == left


def test_a_share_may_be_injected():
  inject = optax.inject_hyperparams(mopt.prune_to_sparsity, static_args='scope')
  for share in (0.5, lambda count: 0.5):
    _, state = prune_all(inject(share), {'a': np.float32([1, 2, 3, 4])})
    assert int(state.inner_state.nonzeros) == 2


@pytest.mark.parametrize('share', [-0.1, 1.1, np.nan, np.inf, 'all', None])
def test_bad_shares_are_refused(share):
  with pytest.raises(ValueError, match='schedule must'):
    mopt.prune_to_sparsity(share)


def test_other_bad_arguments_of_shares_are_refused():
  with pytest.raises(ValueError, match="'global' or 'leaf', got 'layer'"):
    mopt.prune_to_sparsity(0.5, scope='layer')
  with pytest.raises(ValueError, match='one number, got shape'):
    mopt.prune_to_sparsity(np.array([0.5, 0.5]))
  with pytest.raises(ValueError, match='schedule must give one real number'):
    mopt.prune_to_sparsity(lambda count: jnp.ones(2)).init(jnp.ones(2))


def test_more_weights_than_can_be_counted_are_refused():
  half, more = (
    jax.ShapeDtypeStruct((2**29, width), jnp.float32) for width in (1, 3)
  )
  message = 'at most 1073741824 weights, got 1610612736'
  tx = mopt.prune_to_sparsity(0.5)
  jax.eval_shape(tx.init, [half] * 2)
  with pytest.raises(ValueError, match=f"{message}: see scope='leaf'"):
    jax.eval_shape(tx.init, [half] * 3)
  tx = mopt.prune_to_sparsity(0.5, scope='leaf')
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(tx.init, [half, more])


# -- n of m -------------------------------------------------------------------


@functools.cache
def prune_groups(n, m):
  return jax.jit(lambda weights: prune_all(mopt.prune_n_of_m(n, m), weights)[0])


@settings(max_examples=100)
@given(
  st.sampled_from([1, 4, 7, 9]),
  st.sampled_from([(1, 2), (2, 4), (3, 3), (3, 16)]),
  st.lists(numbers, min_size=18, max_size=18),
)
def test_the_largest_of_each_group_stay(size, pair, values):
  x = np.array(values[: 2 * size], np.float32).reshape(size, 2)
  new = prune_groups(*pair)({'w': x})
  keep = n_of_m(None, {'w': x}, *pair)['w']
  assert_same(new, {'w': np.where(keep, x, np.float32(0))})
  finite = np.isfinite(x).all(axis=0)
  for start in range(0, size, pair[1]):
    group = np.asarray(new['w'])[start : start + pair[1]]
    assert (np.count_nonzero(group, axis=0)[finite] <= pair[0]).all()


@pytest.mark.parametrize(
  ('n', 'm', 'message'),
  [
    (0, 4, 'n must be an integer >= 1, got 0'),
    (2, 4.0, 'm must be an integer >= 1, got 4.0'),
    (5, 4, 'n must be at most m, 4, got 5'),
  ],
)
def test_bad_groups_are_refused(n, m, message):
  with pytest.raises(ValueError, match=message):
    mopt.prune_n_of_m(n, m)


# -- Units --------------------------------------------------------------------


@pytest.mark.parametrize('name', ['n_of_m', 'units'])
def test_leaves_of_which_none_is_a_kernel_are_refused(name):
  params = {'bias': jnp.ones((2, 2)), 'scale': jnp.ones(3)}
  message = r"needs a kernel.*got 'bias' \(2, 2\), 'scale' \(3,\)\."
  with pytest.raises(ValueError, match=message):
    make(name).init(params)


def test_a_norm_equal_to_the_threshold_stays():
  kernel = np.float32([[3, 3, 2.9999]])
  kernel = np.concatenate([kernel, np.float32([[4, -4, 4]])])
  new, _ = prune_all(mopt.prune_units(5.0), {'kernel': kernel})
  kept = np.float32([[3, 3, 0], [4, -4, 0]])
  np.testing.assert_array_equal(new['kernel'], kept)


def test_a_bias_goes_with_its_kernel_and_no_other():
  layer = {
    'kernel': jnp.array([[1.0, 1e-3], [1.0, 1e-3]]),
    'bias': jnp.ones(2),
  }
  params = {'a': layer, 'b': layer, 'norm': {'bias': jnp.full(2, 1e-3)}}
  # The mask has its kernel alone.
  mask = {
    'a': {'kernel': True, 'bias': False},
    'b': {'kernel': False, 'bias': True},
    'norm': {'bias': True},
  }
  tx = mopt.prune_units(0.1, mask)
  zeros = jax.tree.map(jnp.zeros_like, params)
  new, state = step_of(tx)(params, tx.init(params), zeros)
  np.testing.assert_array_equal(new['a']['kernel'], [[1, 0], [1, 0]])
  np.testing.assert_array_equal(new['a']['bias'], [1, 0])
  for name in ('b', 'norm'):
    jax.tree.map(np.testing.assert_array_equal, new[name], params[name])
  # Of the leaves of the mask.
  assert int(state.nonzeros) == 2 + 2 + 2


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_bias_that_is_not_finite_is_kept_without_its_unit(value):
  layer = {'kernel': np.full((2, 2), 1e-3), 'bias': np.array([value, 1.0])}
  new, state = prune_all(mopt.prune_units(0.1), layer)
  np.testing.assert_array_equal(new['bias'], [value, 0])
  assert int(state.nonzeros) == 1


def test_a_bias_goes_with_its_kernel_in_boxes():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      init = nn.with_partitioning(nn.initializers.constant(1e-3), (None, 'y'))
      return nn.Dense(3, kernel_init=init, bias_init=nn.initializers.ones)(x)

  params = Net().init(jax.random.key(0), jnp.ones((1, 2)))
  tx = mopt.prune_units(0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  new, state = step_of(tx)(params, tx.init(params), zeros)
  assert all(np.all(x == 0) for x in jax.tree.leaves(new))
  assert int(state.nonzeros) == 0


def test_a_bias_of_another_shape_is_refused():
  params = {'query': {'kernel': jnp.ones((4, 2, 2)), 'bias': jnp.ones((2, 2))}}
  message = "each of the 2 units at 'query/bias', got shape \\(2, 2\\)"
  with pytest.raises(ValueError, match=message):
    mopt.prune_units(0.1).init(params)
  mopt.prune_units(0.1, {'query': {'kernel': False, 'bias': True}})


def test_a_threshold_of_units_may_be_a_schedule():
  kernel = np.float32([[0.5, 1.5, 2.5]])
  tx = mopt.prune_units(lambda count: 1.0 * count)
  params, state = {'kernel': jnp.asarray(kernel)}, None
  state = tx.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  found = []
  for _ in range(4):
    params, state = jax.jit(step_of(tx))(params, state, zeros)
    found.append(int(state.nonzeros))
  assert found == [3, 2, 1, 0]
