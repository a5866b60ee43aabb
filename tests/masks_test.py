"""Masks: which leaves are chosen, and what is refused."""

import functools

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt
from mopt import masks


def lenet_like():
  return {
    'conv': {'kernel': jnp.ones((3, 3, 1, 2)), 'bias': jnp.ones(2)},
    'conv1d': {'kernel': jnp.ones((3, 1, 2))},
    'dense': {'kernel': jnp.ones((4, 3)), 'bias': jnp.ones(3)},
    'embedding': jnp.ones((5, 4)),
    'kernel_of_none': {'scale': jnp.ones(2)},
    'norm': {'kernel': jnp.ones(3)},
  }


def chosen_paths(mask, params):
  return [path for path, _ in masks.masked_leaves(mask, params)]


def test_dense_kernels_are_the_matrices_named_kernel():
  assert chosen_paths(mopt.dense_kernels, lenet_like()) == ['dense/kernel']


def test_conv_kernels_are_the_kernels_of_more_than_two_axes():
  expected = ['conv/kernel', 'conv1d/kernel']
  assert chosen_paths(mopt.conv_kernels, lenet_like()) == expected


def test_kernel_masks_need_shapes_only():
  params = lenet_like()
  shapes = jax.eval_shape(lambda: params)
  assert mopt.dense_kernels(shapes) == mopt.dense_kernels(params)
  assert mopt.conv_kernels(shapes) == mopt.conv_kernels(params)


def test_predicate_sees_the_joined_path_and_the_leaf():
  seen = {}

  def predicate(path, leaf):
    seen[path] = leaf.shape
    return path.endswith('/1')

  params = {'layers': [jnp.ones(1), jnp.ones(2)], 'pair': (jnp.ones(3),)}
  mask = mopt.mask_by_path(predicate)(params)
  assert mask == {'layers': [False, True], 'pair': (False,)}
  assert seen == {'layers/0': (1,), 'layers/1': (2,), 'pair/0': (3,)}


def test_predicate_may_return_any_truth_value():
  mask = mopt.mask_by_path(lambda path, leaf: np.bool_(leaf.ndim))(
    {'a': jnp.ones(1), 'b': jnp.ones(())}
  )
  assert mask == {'a': True, 'b': False}
  assert all(type(leaf) is bool for leaf in mask.values())


PARAMS = {'a': jnp.array([1.0, -2.0]), 'b': jnp.array([4.0])}


@pytest.mark.parametrize(
  'mask',
  [
    {'a': True, 'b': False},
    {'a': np.bool_(True), 'b': np.bool_(False)},
    lambda params: {'a': True, 'b': False},
    mopt.mask_by_path(lambda path, leaf: path == 'a'),
  ],
  ids=['tree', 'numpy_tree', 'function', 'by_path'],
)
def test_every_form_of_a_mask_chooses_alike(mask):
  assert float(mopt.l1_norm(PARAMS, mask)) == 3.0
  assert int(mopt.count_nonzero(PARAMS, mask).total) == 2
  pruned = mopt.prune(PARAMS, threshold=10.0, mask=mask)
  np.testing.assert_array_equal(pruned['a'], [0.0, 0.0])
  np.testing.assert_array_equal(pruned['b'], [4.0])


def test_no_mask_chooses_every_leaf():
  assert masks.resolve_mask(None, PARAMS) == {'a': True, 'b': True}
  assert float(mopt.l1_norm(PARAMS)) == 7.0


@pytest.mark.parametrize(
  'mask', [{'a': False, 'b': False}, False, np.bool_(False)]
)
def test_what_is_false_chooses_nothing_in_peace(mask):
  assert float(mopt.l1_norm(PARAMS, mask)) == 0.0
  assert int(mopt.count_nonzero(PARAMS, mask).total) == 0
  assert mopt.count_nonzero(PARAMS, mask).size == 0
  pruned = mopt.prune(PARAMS, threshold=10.0, mask=mask)
  jax.tree.map(np.testing.assert_array_equal, pruned, PARAMS)
  stacked = mopt.stack(PARAMS, PARAMS)
  np.testing.assert_array_equal(mopt.gramian(stacked, mask), np.zeros((2, 2)))


@pytest.mark.parametrize('mask', [True, np.bool_(True)])
def test_a_single_true_chooses_every_leaf(mask):
  assert float(mopt.l1_norm(PARAMS, mask)) == 7.0
  assert int(mopt.count_nonzero(PARAMS, mask).total) == 3
  pruned = mopt.prune(PARAMS, threshold=10.0, mask=mask)
  assert [float(jnp.sum(x)) for x in pruned.values()] == [0.0, 0.0]


def test_a_bare_array_has_a_bare_boolean_as_its_mask():
  w = jnp.array([1.0, -2.0])
  assert float(mopt.l1_norm(w, True)) == 3.0
  assert float(mopt.l1_norm(w, False)) == 0.0
  assert float(mopt.l1_norm(w, lambda w: True)) == 3.0
  # That of a function is no mask of a tree.
  with pytest.raises(ValueError, match='structure of the parameters'):
    mopt.l1_norm(PARAMS, lambda params: True)


NONE_CHOSEN = {
  'dense_kernels': mopt.dense_kernels,
  'conv_kernels': mopt.conv_kernels,
  'by_path': mopt.mask_by_path(lambda path, leaf: path == 'c'),
  'function': lambda params: jax.tree.map(lambda _: False, params),
}


@pytest.mark.parametrize('mask', NONE_CHOSEN.values(), ids=NONE_CHOSEN)
@pytest.mark.parametrize(
  'call',
  [
    mopt.group_norm,
    mopt.l1_norm,
    mopt.l2_norm_squared,
    lambda params, mask: mopt.lp_norm(params, 0.5, mask),
    mopt.count_nonzero,
    lambda params, mask: mopt.prune(params, 1.0, mask),
    lambda params, mask: mopt.prune_by_magnitude(1.0, mask).init(params),
    jax.jit(mopt.l1_norm, static_argnums=1),
  ],
  ids=[
    'group',
    'l1',
    'l2',
    'lp',
    'count',
    'prune',
    'prune_by_magnitude',
    'jit',
  ],
)
def test_a_function_that_chooses_none_is_refused_with_the_paths(call, mask):
  with pytest.raises(ValueError, match="selects none .*'a', 'b'[.] See"):
    call(PARAMS, mask)


def test_the_first_five_paths_are_named_and_the_others_counted():
  params = {f'layer{i}': {'w': jnp.ones(1)} for i in range(8)}
  names = ', '.join(f"'layer{i}/w'" for i in range(5))
  message = f'mask dense_kernels selects none of the leaves {names} and 3 more'
  with pytest.raises(ValueError, match=message):
    mopt.l1_norm(params, mopt.dense_kernels)


@pytest.mark.parametrize('tree', [{}, [], None, {'a': {}, 'b': ()}])
@pytest.mark.parametrize(
  'mask',
  [None, True, False, *NONE_CHOSEN.values()],
  ids=['None', 'True', 'False', *NONE_CHOSEN],
)
def test_a_tree_without_leaves_is_nothing_in_peace(tree, mask):
  assert float(mopt.group_norm(tree, mask)) == 0.0
  assert float(mopt.l1_norm(tree, mask)) == 0.0
  assert float(mopt.l2_norm_squared(tree, mask)) == 0.0
  assert float(mopt.lp_norm(tree, 0.5, mask)) == 0.0
  count = mopt.count_nonzero(tree, mask)
  assert (int(count.total), count.size, count.per_leaf) == (0, 0, {})
  assert mopt.prune(tree, 1.0, mask) == tree
  tx = mopt.prune_by_magnitude(1.0, mask)
  state = tx.init(tree)
  assert int(state.nonzeros) == 0
  if tree is not None:  # to Optax, None is no parameters
    updates, state = tx.update(tree, state, tree)
    assert (updates, int(state.nonzeros)) == (tree, 0)


def test_a_group_without_leaves_is_pruned_in_peace():
  params = {'a': jnp.array([1e-4, 1.0])}
  groups = {
    'first': mopt.prune_by_magnitude(1e-3),
    'second': mopt.prune_by_magnitude(1e-3, mopt.dense_kernels),
  }
  tx = optax.partition(groups, {'a': 'first'})
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(new['a'], [0.0, 1.0])


@pytest.mark.parametrize('count', [3, np.int32(3), jnp.int32(3)])
def test_a_mask_that_is_called_as_a_schedule_says_so(count):
  # As optax.inject_hyperparams does, and gets False, which would select none.
  for mask in (mopt.dense_kernels, mopt.mask_by_path(lambda path, leaf: True)):
    with pytest.raises(ValueError, match=r"static_args=\('mask',\)"):
      mask(count)


# What every function with a mask does with it.
MASKED = {
  'group_norm': mopt.group_norm,
  'l1_norm': mopt.l1_norm,
  'l2_norm_squared': mopt.l2_norm_squared,
  'lp_norm': functools.partial(mopt.lp_norm, p=0.5),
  'count_nonzero': mopt.count_nonzero,
  'prune': functools.partial(mopt.prune, threshold=1.0),
  'gramian': lambda params, mask: mopt.gramian(
    mopt.stack(params, params), mask
  ),
}


@pytest.mark.parametrize('name', MASKED)
@pytest.mark.parametrize(
  'mask',
  [
    {'a': True},
    {'a': True, 'b': True, 'c': True},
    {'a': True, 'b': [True]},
    lambda params: {'a': True},
  ],
  ids=['missing', 'extra', 'deeper', 'function'],
)
def test_a_mask_of_another_structure_is_refused(name, mask):
  with pytest.raises(ValueError, match='structure of the parameters'):
    MASKED[name](PARAMS, mask=mask)


@pytest.mark.parametrize('name', MASKED)
@pytest.mark.parametrize(
  'leaf',
  [1, 0.0, 'yes', jnp.array(True), np.array([True, False])],
  ids=['int', 'float', 'text', 'traced', 'elementwise'],
)
def test_a_leaf_that_is_no_boolean_is_refused_by_its_path(name, leaf):
  with pytest.raises(ValueError, match="boolean for each leaf.*at 'b'"):
    MASKED[name](PARAMS, mask={'a': True, 'b': leaf})


# Each of them once was a 1 to count, or an error that did not say where.
NO_NUMBERS = {
  'text': 'kernel',
  'object': object(),
  'array_of_text': np.array(['1', '2']),
  'shape': jax.ShapeDtypeStruct((2,), jnp.float32),
  'complex': np.ones(2, np.complex64),
  'key': jax.random.key(0),
}


@pytest.mark.parametrize('name', sorted(MASKED.keys() - {'prune', 'gramian'}))
@pytest.mark.parametrize('leaf', NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_a_leaf_that_is_no_array_of_numbers_is_refused_by_its_path(name, leaf):
  params = {'a': jnp.ones(2), 'b': leaf}
  with pytest.raises(TypeError, match="real numbers at 'b', got"):
    MASKED[name](params, mask=None)
  # It may be there, if the mask leaves it out.
  MASKED[name](params, mask={'a': True, 'b': False})


@pytest.mark.parametrize('leaf', ['text', 'complex'])
def test_gramian_refuses_a_leaf_that_is_no_array_of_numbers(leaf):
  values = {'text': [['1'], ['2']], 'complex': [[1j], [2j]]}
  stacked = {'a': jnp.ones((2, 3)), 'b': np.array(values[leaf])}
  with pytest.raises(TypeError, match="real numbers at 'b'"):
    mopt.gramian(stacked)


@pytest.mark.parametrize(
  'mask', [mopt.dense_kernels, mopt.dense_kernels(lenet_like())]
)
def test_masks_serve_optax_masked(mask):
  params = lenet_like()
  tx = optax.masked(optax.scale(0.0), mask)
  updates, _ = tx.update(params, tx.init(params), params)
  zeroed = [
    path
    for path, leaf in masks.masked_leaves(None, updates)
    if not np.any(leaf)
  ]
  assert zeroed == ['dense/kernel']


def test_masks_serve_optax_decoupled_weight_decay():
  params = lenet_like()
  tx = optax.add_decayed_weights(0.5, mask=mopt.conv_kernels)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  decayed = [
    path for path, leaf in masks.masked_leaves(None, updates) if np.any(leaf)
  ]
  assert decayed == ['conv/kernel', 'conv1d/kernel']


# -- What Flax makes ----------------------------------------------------------


class Module(nnx.Module):
  """One layer of each kind, whose names do not tell what it is."""

  def __init__(self):
    rngs = nnx.Rngs(0)
    self.first = nnx.Linear(3, 4, rngs=rngs)
    self.second = nnx.Conv(3, 4, (3,), rngs=rngs)
    self.third = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.fourth = nnx.MultiHeadAttention(2, 4, 4, decode=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.many = nnx.List([nnx.Linear(2, 2, rngs=rngs)])

  def __call__(self, x):  # so that a mask of its structure is callable
    return self.first(x)


ATTENTION = [f'fourth/{name}' for name in ('key', 'out', 'query', 'value')]
DENSE = sorted(['first', 'many/0', *ATTENTION])
CONV = ['second', 'third']
NNX_TREES = {
  'state': lambda: nnx.state(Module(), nnx.Param),
  'whole_state': lambda: nnx.state(Module()),
  'pure_dict': lambda: nnx.to_pure_dict(nnx.state(Module(), nnx.Param)),
  'module': Module,
}


def layers_chosen(mask, tree):
  paths = chosen_paths(mask, tree)
  assert all('/kernel' in path for path in paths)
  return sorted(path.split('/kernel')[0] for path in paths)


@pytest.mark.parametrize('name', NNX_TREES)
@pytest.mark.parametrize(
  ('mask', 'expected'),
  [(mopt.dense_kernels, DENSE), (mopt.conv_kernels, CONV)],
  ids=['dense', 'conv'],
)
def test_kernels_of_nnx_are_chosen(name, mask, expected):
  tree = NNX_TREES[name]()
  assert layers_chosen(mask, tree) == expected
  assert layers_chosen(mask(tree), tree) == expected
  shapes = jax.eval_shape(lambda: NNX_TREES[name]())
  assert layers_chosen(mask(shapes), tree) == expected
  module = Module()
  kernels = [
    functools.reduce(
      lambda x, part: x[int(part)] if part.isdigit() else getattr(x, part),
      layer.split('/'),
      module,
    ).kernel[...]
    for layer in expected
  ]
  norm = sum(np.abs(np.asarray(x, np.float64)).sum() for x in kernels)
  np.testing.assert_allclose(mopt.l1_norm(tree, mask), norm, rtol=1e-6)
  count = mopt.count_nonzero(tree, mask)
  assert count.size == sum(x.size for x in kernels)
  assert int(count.total) == count.size


def test_the_gradient_of_a_norm_of_a_module():
  module = Module()
  norm = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
  grads = nnx.grad(norm)(module)
  np.testing.assert_array_equal(
    grads['first']['kernel'][...], np.sign(module.first.kernel[...])
  )
  assert not np.any(grads['third']['kernel'][...])
  assert not np.any(grads['first']['bias'][...])
  by_state = jax.jit(jax.grad(norm))(nnx.state(module, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, by_state, grads)


def test_an_nnx_optimizer_prunes_what_is_counted():
  module = Module()
  tau = 0.2
  tx = optax.chain(
    optax.sgd(1e-3), mopt.prune_by_magnitude(tau, mopt.dense_kernels)
  )
  optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
  before = nnx.to_pure_dict(nnx.state(module, nnx.Param))

  @nnx.jit
  def step(module, optimizer):
    norm = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
    optimizer.update(module, nnx.grad(norm)(module))

  step(module, optimizer)
  assert layers_chosen(mopt.dense_kernels, module) == DENSE
  after = nnx.to_pure_dict(nnx.state(module, nnx.Param))
  kernel, old = (np.asarray(t['first']['kernel']) for t in (after, before))
  # Not where the step of 1e-3 decides.
  assert (kernel[np.abs(old) < tau - 1e-3] == 0).all()
  assert (kernel[np.abs(old) > tau + 2e-3] != 0).all()
  assert 0 < (kernel != 0).sum() < kernel.size
  np.testing.assert_array_equal(
    after['third']['kernel'], before['third']['kernel']
  )
  count = mopt.count_nonzero(module, mopt.dense_kernels)
  nonzeros = optimizer.opt_state[-1].nonzeros[...]
  assert int(nonzeros) == int(count.total) < count.size


def test_stacked_gradients_of_an_nnx_state():
  state = nnx.state(Module(), nnx.Param)

  def error(state, batch):
    return jnp.sum((state['first']['kernel'][...] - batch) ** 2)

  norm = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
  grad_fn = mopt.value_and_stacked_grad(error, norm)
  tx = optax.chain(
    mopt.madam(1e-2), mopt.prune_by_magnitude(0.1, mopt.dense_kernels)
  )

  @jax.jit
  def step(state, opt_state):
    values, grads = grad_fn(state, 1.0)
    updates, opt_state = tx.update(grads, opt_state, state)
    return optax.apply_updates(state, updates), opt_state, values

  new, opt_state, values = step(state, tx.init(state))
  assert jax.tree.structure(new) == jax.tree.structure(state)
  np.testing.assert_allclose(
    values[1], mopt.l1_norm(state, mopt.dense_kernels), rtol=1e-6
  )
  count = mopt.count_nonzero(new, mopt.dense_kernels)
  assert int(opt_state[-1].nonzeros) == int(count.total) < count.size


def partitioned(*names):
  return nn.with_partitioning(nn.initializers.lecun_normal(), names)


class Boxed(nn.Module):
  """Layers of linen, some with parameters in boxes."""

  box: bool = True

  @nn.compact
  def __call__(self, x):  # [batch, length, features]
    boxed = {'kernel_init': partitioned(None, 'model')} if self.box else {}
    conv = {'kernel_init': partitioned(None, None, 'model')} if self.box else {}
    x = nn.Dense(4, name='first', **boxed)(x)
    x = nn.Conv(4, (3,), name='second', **conv)(x)
    x = nn.MultiHeadDotProductAttention(2, name='third')(x, x)
    x = nn.DenseGeneral((2, 3))(x)
    x = x.reshape(*x.shape[:2], -1)
    return nn.ConvTranspose(2, (3,), name='out')(x)


LINEN_DENSE = sorted(
  ['DenseGeneral_0', 'first']
  + [f'third/{name}' for name in ('key', 'out', 'query', 'value')]
)


@pytest.mark.parametrize('box', [True, False], ids=['boxed', 'bare'])
def test_kernels_of_linen_are_chosen(box):
  params = Boxed(box).init(jax.random.key(0), jnp.ones((1, 5, 3)))['params']
  assert isinstance(params['first']['kernel'], nn.Partitioned) == box
  assert layers_chosen(mopt.dense_kernels, params) == LINEN_DENSE
  assert layers_chosen(mopt.conv_kernels, params) == ['out', 'second']
  # In a box or not, the same numbers.
  bare = nn.unbox(params)
  norm = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
  np.testing.assert_array_equal(norm(params), norm(bare))
  grads = jax.jit(jax.grad(norm))(params)
  assert jax.tree.structure(grads) == jax.tree.structure(params)
  jax.tree.map(
    np.testing.assert_array_equal, nn.unbox(grads), jax.grad(norm)(bare)
  )
  tx = mopt.prune_by_magnitude(0.3, mopt.dense_kernels)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  expected = mopt.prune(bare, 0.3, mopt.dense_kernels)
  jax.tree.map(np.testing.assert_array_equal, nn.unbox(new), expected)
  assert np.any(expected['first']['kernel'] != bare['first']['kernel'])
  count = mopt.count_nonzero(new, mopt.dense_kernels)
  assert int(state.nonzeros) == int(count.total) < count.size


def kernels_of_axes(**axes):
  return {name: {'kernel': jnp.ones((2,) * n)} for name, n in axes.items()}


@pytest.mark.parametrize(
  ('tree', 'dense'),
  [
    # Attention has names of its own, at three axes and no others.
    (kernels_of_axes(query=3, key=3, value=3, out=3), 'key out query value'),
    (kernels_of_axes(query=4, out=4), ''),
    # Without a query beside it this is a layer of any kind.
    (kernels_of_axes(out=3, conv=3), ''),
    ({'a': kernels_of_axes(query=3), 'b': kernels_of_axes(out=3)}, 'a/query'),
    # What Flax names by itself.
    (kernels_of_axes(Dense_0=3, DenseGeneral_1=4, Conv_0=3), 'DenseGeneral_1 '
     'Dense_0'),
    (kernels_of_axes(LinearGeneral_0=3, Linear_7=3, Einsum_0=3, DenseNet=3),
     'Einsum_0 LinearGeneral_0 Linear_7'),
    # Two axes are a matrix, whatever the name.
    (kernels_of_axes(Conv_0=2, value=2), 'Conv_0 value'),
  ],
)  # fmt: skip
def test_kernels_of_many_axes_are_told_apart_by_the_names_of_flax(tree, dense):
  found = layers_chosen(mopt.dense_kernels(tree), tree)
  assert found == dense.split()
  # Each kernel is one or the other.
  convs = mopt.conv_kernels(tree)
  assert jax.tree.map(lambda x: not x, convs) == mopt.dense_kernels(tree)
