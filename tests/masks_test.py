"""Masks: which leaves are chosen, and what is refused."""

import functools

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


def test_an_all_false_mask_chooses_nothing():
  mask = {'a': False, 'b': False}
  assert float(mopt.l1_norm(PARAMS, mask)) == 0.0
  assert int(mopt.count_nonzero(PARAMS, mask).total) == 0


# What every function with a mask does with it.
MASKED = {
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
    True,
    lambda params: {'a': True},
  ],
  ids=['missing', 'extra', 'deeper', 'bare', 'function'],
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
