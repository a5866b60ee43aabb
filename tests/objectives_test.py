"""Objectives and their stacked gradients."""

import functools
import re
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt

MASK = {'a': True, 'b': False}


def random_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {
    'a': jnp.asarray(rng.normal(size=(4, 3)), dtype),
    'b': jnp.asarray(rng.normal(size=5), dtype),
  }


def l1_float64(x):
  return np.abs(x).sum()


def l2_float64(x):
  return np.square(x).sum()


def lp_float64(x, p=0.5, e=1e-3):
  return ((x**2 + e**2) ** (p / 2) - e**p).sum()


def finite_difference(function, x, h=1e-6):
  flat = np.asarray(x, np.float64).ravel()
  slopes = np.zeros_like(flat)
  for i in range(flat.size):
    step = np.zeros_like(flat)
    step[i] = h
    slopes[i] = (function(flat + step) - function(flat - step)) / (2 * h)
  return slopes.reshape(np.shape(x))


COMPLEXITIES = {
  'l1_norm': (mopt.l1_norm, l1_float64),
  'l2_norm_squared': (mopt.l2_norm_squared, l2_float64),
  'lp_norm': (functools.partial(mopt.lp_norm, p=0.5), lp_float64),
  'lp_norm_of_small_weights': (
    functools.partial(mopt.lp_norm, p=0.3, smoothing=2.0),
    functools.partial(lp_float64, p=0.3, e=2.0),
  ),
}


@pytest.mark.parametrize('name', COMPLEXITIES)
def test_values_match_float64(name):
  objective, reference = COMPLEXITIES[name]
  params = random_params()
  expected = sum(reference(np.asarray(x, np.float64)) for x in params.values())
  value = objective(params)
  assert value.dtype == jnp.float32
  assert value.shape == ()
  np.testing.assert_allclose(value, expected, rtol=2e-6)
  np.testing.assert_allclose(
    objective(params, mask=MASK),
    reference(np.asarray(params['a'], np.float64)),
    rtol=2e-6,
  )


@pytest.mark.parametrize('name', COMPLEXITIES)
def test_gradients_match_finite_differences_in_float64(name):
  objective, reference = COMPLEXITIES[name]
  params = random_params()
  grads = jax.grad(objective)(params)
  for key, leaf in params.items():
    assert np.abs(leaf).min() > 1e-3  # away from the kink of l1
    expected = finite_difference(reference, leaf)
    np.testing.assert_allclose(grads[key], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize('name', COMPLEXITIES)
def test_leaves_outside_of_the_mask_have_no_gradient(name):
  objective, _ = COMPLEXITIES[name]
  params = random_params()
  grads = jax.grad(objective)(params, mask=MASK)
  np.testing.assert_array_equal(grads['b'], np.zeros(5))
  np.testing.assert_array_equal(grads['a'], jax.grad(objective)(params)['a'])


def test_gradient_of_the_stack_matches_finite_differences_in_float64():
  batch = np.random.default_rng(1).normal(size=5)

  def error(params, batch):
    return jnp.sum(jnp.tanh(params['b'] * batch) ** 2)

  params = random_params()
  values, grads = mopt.value_and_stacked_grad(error, mopt.l2_norm_squared)(
    params, jnp.asarray(batch, jnp.float32)
  )
  batch = np.asarray(jnp.asarray(batch, jnp.float32), np.float64)

  def reference(w):
    return (np.tanh(w * batch) ** 2).sum()

  np.testing.assert_allclose(
    grads['b'],
    [
      finite_difference(reference, params['b']),
      finite_difference(l2_float64, params['b']),
    ],
    rtol=5e-5,
  )
  np.testing.assert_allclose(
    values[0], reference(np.asarray(params['b'], np.float64)), rtol=1e-5
  )


def group_float64(kernel):
  return np.sqrt((kernel**2).reshape(-1, kernel.shape[-1]).sum(axis=0)).sum()


GROUPED = {
  'dense': {'kernel': jnp.array([[3.0, 0.0, -1.0], [4.0, 0.0, 2.0]])},
  'conv': {'kernel': jnp.arange(-8.0, 16.0).reshape(2, 2, 3, 2)},
  'bias': jnp.ones(7),
}


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_group_norm_sums_the_norms_of_what_enters_each_unit(transform):
  value, grads = transform(jax.value_and_grad(mopt.group_norm))(GROUPED)
  assert value.dtype == jnp.float32
  conv = np.asarray(GROUPED['conv']['kernel'], np.float64)
  # By hand: 5 and 0 and the root of 5.
  np.testing.assert_allclose(
    value, 5 + np.sqrt(5) + group_float64(conv), rtol=1e-6
  )
  np.testing.assert_allclose(
    grads['dense']['kernel'],
    [[0.6, 0, -1 / np.sqrt(5)], [0.8, 0, 2 / np.sqrt(5)]],
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    grads['conv']['kernel'],
    finite_difference(lambda x: group_float64(x.reshape(conv.shape)), conv),
    rtol=1e-6,
    atol=1e-9,
  )
  np.testing.assert_array_equal(grads['bias'], np.zeros(7))
  alone = mopt.group_norm(GROUPED, mopt.dense_kernels)
  np.testing.assert_allclose(alone, 5 + np.sqrt(5), rtol=1e-6)


@pytest.mark.parametrize('scale', [1e-37, 1e-30, 1e30, 1e37])
def test_group_norm_neither_overflows_nor_vanishes(scale):
  kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]]) * scale
  value, grad = jax.value_and_grad(mopt.group_norm)({'kernel': kernel})
  np.testing.assert_allclose(value, 5 * scale, rtol=1e-6)
  np.testing.assert_allclose(grad['kernel'], [[0.6, 0], [0.8, 0]], rtol=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_group_norm_hides_nothing_that_is_not_finite(bad):
  kernel = jnp.array([[bad, 1.0], [0.0, 1.0]])
  np.testing.assert_equal(float(mopt.group_norm({'kernel': kernel})), bad)


def test_group_norm_of_nothing_is_zero():
  for shape in ((0, 3), (3, 0), (2, 0, 4)):
    kernel = jnp.zeros(shape)
    value, grad = jax.value_and_grad(mopt.group_norm)({'kernel': kernel})
    assert (float(value), grad['kernel'].shape) == (0.0, shape)
  for leaf in (2.0, jnp.ones(3)):  # no groups
    assert float(mopt.group_norm({'w': leaf}, mask=True)) == 0.0


def test_group_norm_of_bfloat16_and_float64_is_accumulated_as_the_others():
  small = mopt.group_norm({'kernel': jnp.ones((3001, 1), jnp.bfloat16)})
  assert small.dtype == jnp.float32
  np.testing.assert_allclose(small, np.sqrt(3001), rtol=1e-6)
  with jax.enable_x64(True):
    fine = 1 + 1e-9 * np.arange(6.0).reshape(3, 2)
    value = mopt.group_norm({'kernel': jnp.asarray(fine)})
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, group_float64(fine), rtol=1e-15)


ZEROS = jnp.array([-1.5, -0.0, 0.0, 1e-30, 3.0])
SIGNS = np.array([-1.0, 0.0, 0.0, 1.0, 1.0])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_l1_subgradient_is_the_sign_and_zero_at_zero(transform, dtype):
  grad = transform(jax.grad(mopt.l1_norm))(ZEROS.astype(dtype))
  assert grad.dtype == dtype
  np.testing.assert_array_equal(grad.astype(jnp.float32), SIGNS)


def test_l1_subgradient_is_the_sign_under_vmap():
  batch = jnp.stack([ZEROS, -ZEROS, 0 * ZEROS])
  grads = jax.jit(jax.vmap(jax.grad(mopt.l1_norm)))(batch)
  np.testing.assert_array_equal(grads, [SIGNS, -SIGNS, 0 * SIGNS])


def test_l1_shows_values_that_are_not_finite():
  assert np.isnan(mopt.l1_norm(jnp.array([1.0, jnp.nan])))
  assert np.isposinf(mopt.l1_norm(jnp.array([1.0, -jnp.inf])))


@pytest.mark.parametrize(
  'objective', [mopt.l1_norm, mopt.l2_norm_squared], ids=['l1', 'l2']
)
def test_bfloat16_is_summed_in_float32(objective):
  # A bfloat16 sum of ones stops at 256.
  value = objective({'a': jnp.ones(3001, jnp.bfloat16)})
  assert value.dtype == jnp.float32
  assert float(value) == 3001.0
  grad = jax.grad(objective)(jnp.ones(3, jnp.bfloat16))
  assert grad.dtype == jnp.bfloat16


def test_l2_squares_bfloat16_in_float32():
  x = jnp.array([1.0078125], jnp.bfloat16)  # the square takes 15 bits
  assert float(mopt.l2_norm_squared(x)) == 1.0078125**2


def test_lp_norm_sums_bfloat16_in_float32():
  value = mopt.lp_norm(jnp.ones(3001, jnp.bfloat16), p=0.5, smoothing=1e-6)
  np.testing.assert_allclose(value, 3001 * (1 - 1e-3), rtol=1e-5)


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('smoothing', [1e-6, 1e-3, 1.0])
def test_lp_norm_lies_within_its_smoothing_below_the_power(p, smoothing):
  sizes = np.concatenate([[0.0], np.logspace(-9, 6, 61)]).astype(np.float32)
  values = jax.vmap(lambda x: mopt.lp_norm(x, p=p, smoothing=smoothing))(
    jnp.asarray(sizes)
  )
  power = sizes.astype(np.float64) ** p
  rounding = 1e-5 * power + 1e-7 * smoothing**p
  assert (values <= power + rounding).all()
  assert (values >= power - smoothing**p - rounding).all()
  assert values[0] == 0
  assert (np.diff(np.asarray(values)) > 0)[20:].all()


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_lp_norm_is_at_rest_at_zero(transform):
  grad = transform(jax.grad(functools.partial(mopt.lp_norm, p=0.5)))
  np.testing.assert_array_equal(grad(jnp.array([0.0, -0.0])), [0.0, 0.0])


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    ({'p': 0.0}, 'p must lie between'),
    ({'p': 1.0}, 'p must lie between'),
    ({'p': float('nan')}, 'p must lie between'),
    ({'p': 0.5, 'smoothing': 0.0}, 'smoothing must be positive'),
    ({'p': 0.5, 'smoothing': float('nan')}, 'smoothing must be positive'),
    ({'p': 0.5, 'smoothing': float('inf')}, 'smoothing must be positive'),
    ({'p': 0.9, 'smoothing': 1e300}, 'smoothing .* got 1e[+]300'),
    ({'p': 0.5, 'smoothing': 1e-46}, 'smoothing .* got 1e-46'),
  ],
)
def test_lp_norm_refuses_bad_arguments(kwargs, match):
  with pytest.raises(ValueError, match=match):
    mopt.lp_norm(jnp.ones(2), **kwargs)


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_count_nonzero_counts_in_total_and_for_each_leaf(transform):
  params = {
    'a': {'kernel': jnp.array([[0.0, -0.0, 1e-37], [jnp.nan, jnp.inf, 2.0]])},
    'b': jnp.array([0.0, 3.0, 0.0]),
    'c': jnp.zeros((0, 4)),
    'd': 0.5,
  }
  count = transform(mopt.count_nonzero)(params)
  assert int(count.total) == 6
  assert count.total.dtype == jnp.int32
  expected = {'a/kernel': 4, 'b': 1, 'c': 0, 'd': 1}
  assert {k: int(v) for k, v in count.per_leaf.items()} == expected
  sizes = {'a/kernel': 6, 'b': 3, 'c': 0, 'd': 1}
  assert {k: int(v) for k, v in count.size_per_leaf.items()} == sizes
  assert int(count.size) == 10


def test_sizes_are_numbers_of_python_and_come_last():
  total, per_leaf, size, size_per_leaf = mopt.count_nonzero(random_params())
  assert (int(total), size) == (17, 17)
  assert type(size) is int
  assert per_leaf.keys() == size_per_leaf.keys()
  assert size_per_leaf == {'a': 12, 'b': 5}
  members = jax.vmap(lambda w: mopt.count_nonzero({'w': w}))(jnp.ones((3, 2)))
  np.testing.assert_array_equal(members.size, [2, 2, 2])


def test_leaves_of_one_path_are_counted_together():
  params = {'a/b': jnp.ones(2), 'a': {'b': jnp.array([0.0, 1.0, 1.0, 1.0])}}
  count = mopt.count_nonzero(params)
  assert int(count.total) == 5
  assert {k: int(v) for k, v in count.per_leaf.items()} == {'a/b': 5}
  assert count.size_per_leaf == {'a/b': 6}


@pytest.mark.parametrize('leaf', [3.0, -3, np.float64(3), np.array(3, int)])
@pytest.mark.parametrize(
  ('objective', 'expected'),
  [
    (mopt.l1_norm, 5.0),
    (mopt.l2_norm_squared, 11.0),
    (functools.partial(mopt.lp_norm, p=0.5), lp_float64(np.array([1, 1, 3.0]))),
  ],
  ids=['l1', 'l2', 'lp'],
)
def test_python_numbers_are_leaves(objective, expected, leaf):
  found = objective({'a': jnp.ones(2), 'b': leaf}, mask=True)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_l1_of_small_integers_does_not_wrap_around():
  # A single array is what is asked for, whatever its dtype.
  assert float(mopt.l1_norm(jnp.array([-128, 127], jnp.int8))) == 255.0


# A step counter, say, or whether a layer is frozen.
WITH_INTEGERS = {
  'w': jnp.array([0.0, -2.0]),
  'count': jnp.array([3, 4], jnp.int32),
  'numpy': np.array([5], np.uint8),
  'python': 6,
  'frozen': jnp.array([True]),
  'flag': True,
}


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_integers_are_no_weights(transform):
  for norm, expected in (
    (mopt.l1_norm, 2.0),
    (mopt.l2_norm_squared, 4.0),
    (functools.partial(mopt.lp_norm, p=0.5), lp_float64(np.array([0, 2.0]))),
  ):
    found = transform(norm)(WITH_INTEGERS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
  count = transform(mopt.count_nonzero)(WITH_INTEGERS)
  assert (int(count.total), int(count.size)) == (1, 2)
  assert list(count.per_leaf) == list(count.size_per_leaf) == ['w']
  integers = {k: v for k, v in WITH_INTEGERS.items() if k != 'w'}
  assert float(mopt.l1_norm(integers)) == 0.0
  assert mopt.count_nonzero(integers).size == 0


@pytest.mark.parametrize(
  'mask',
  [True, jax.tree.map(lambda _: True, WITH_INTEGERS)],
  ids=['bare', 'tree'],
)
def test_integers_that_a_mask_names_are_counted(mask):
  assert float(mopt.l1_norm(WITH_INTEGERS, mask)) == 2 + 7 + 5 + 6 + 1 + 1
  count = mopt.count_nonzero(WITH_INTEGERS, mask)
  assert (int(count.total), count.size) == (7, 8)
  by_path = mopt.mask_by_path(lambda path, leaf: path == 'count')
  assert float(mopt.l1_norm(WITH_INTEGERS, by_path)) == 7.0


# -- Double precision ---------------------------------------------------------

# Nothing of this survives in float32.
FINE = np.array([1 + 1e-9, -1 + 1e-9, 2e-9])


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
@pytest.mark.parametrize('name', COMPLEXITIES)
def test_norms_of_float64_are_float64_and_so_are_their_gradients(
  name, transform
):
  objective, reference = COMPLEXITIES[name]
  params = {'a': jnp.asarray(FINE), 'b': jnp.ones(2, jnp.float32)}
  assert params['a'].dtype == jnp.float64
  value, grads = transform(jax.value_and_grad(objective))(params)
  assert value.dtype == jnp.float64
  expected = reference(FINE) + reference(np.ones(2))
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert abs(float(objective({'a': params['a']})) - reference(FINE)) < 1e-12
  assert (grads['a'].dtype, grads['b'].dtype) == (jnp.float64, jnp.float32)
  slopes = {
    'l1_norm': np.sign(FINE),
    'l2_norm_squared': 2 * FINE,
    'lp_norm': 0.5 * FINE * (FINE**2 + 1e-6) ** -0.75,
    'lp_norm_of_small_weights': 0.3 * FINE * (FINE**2 + 4) ** -0.85,
  }
  np.testing.assert_allclose(grads['a'], slopes[name], rtol=1e-13)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_norms_of_smaller_floats_stay_float32_under_x64(dtype):
  params = {'a': jnp.ones(3001, dtype), 'b': np.ones(2, np.float32)}
  for objective, _ in COMPLEXITIES.values():
    assert objective(params).dtype == jnp.float32
  assert float(mopt.l1_norm(params)) == 3003.0
  assert mopt.l1_norm({}).dtype == jnp.float32
  assert mopt.count_nonzero(params).total.dtype == jnp.int32


@pytest.mark.usefixtures('x64')
def test_values_are_as_exact_as_the_finest_objective():
  def difference(params):
    return jnp.sum(params['a'])  # 1 + 4e-9 - 1

  params = {'a': jnp.asarray(FINE), 'b': jnp.ones(2, jnp.bfloat16)}
  coarse = functools.partial(mopt.l1_norm, mask={'a': False, 'b': True})
  values, grads = mopt.value_and_stacked_grad(difference, coarse)(params)
  assert (values.dtype, grads['a'].dtype) == (jnp.float64, jnp.float64)
  assert grads['b'].dtype == jnp.bfloat16
  np.testing.assert_allclose(values, [FINE.sum(), 2.0], rtol=1e-14)
  square = lambda params: jnp.sum(jnp.square(params['b']))
  values, _ = mopt.value_and_stacked_grad(square, coarse)(
    {'a': jnp.ones(1, jnp.float32), 'b': jnp.ones(3001, jnp.float32)}
  )
  assert values.dtype == jnp.float32


def test_values_in_half_precision_become_float32():
  half = lambda params: jnp.sum(params)
  values, grads = mopt.value_and_stacked_grad(half, half)(
    jnp.ones(3, jnp.bfloat16)
  )
  assert (values.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)


# -- Counts and stacks --------------------------------------------------------


def test_count_nonzero_lists_the_masked_leaves_only():
  count = mopt.count_nonzero(random_params(), MASK)
  assert list(count.per_leaf) == ['a']
  assert int(count.total) == 12


def test_stack_adds_a_leading_axis():
  first, second = random_params(), random_params(jnp.float32)
  second = jax.tree.map(lambda x: -x, second)
  stacked = mopt.stack(first, second, first)
  assert stacked['a'].shape == (3, 4, 3)
  np.testing.assert_array_equal(stacked['a'][1], second['a'])
  np.testing.assert_array_equal(stacked['b'][2], first['b'])


@pytest.mark.parametrize(
  ('grads', 'match'),
  [
    ([], 'at least 2'),
    ([{'a': jnp.ones(1)}], 'at least 2'),
    ([{'a': jnp.ones(1)}, {'b': jnp.ones(1)}], 'gradient 1'),
    ([{'a': jnp.ones(1)}, {'a': jnp.ones(2)}], r"\(1,\), \(2,\)\] at 'a'"),
  ],
)
def test_stack_refuses_gradients_that_do_not_match(grads, match):
  with pytest.raises(ValueError, match=match):
    mopt.stack(*grads)


def network(params, batch):
  inputs, targets = batch
  hidden = jnp.tanh(inputs @ params['w1'])
  return jnp.mean((hidden @ params['w2'] - targets) ** 2)


def network_and_batch():
  rng = np.random.default_rng(2)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {'w1': draw(3, 4), 'w2': draw(4, 2)}
  return params, (draw(6, 3), draw(6, 2))


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_value_and_stacked_grad_equals_separate_gradients(transform):
  params, batch = network_and_batch()

  def mean(params, batch):
    return jnp.mean(batch[0] @ params['w1'])

  objectives = network, mean, mopt.l1_norm
  grad_fn = transform(mopt.value_and_stacked_grad(*objectives))
  values, grads = grad_fn(params, batch)
  assert values.shape == (3,)
  assert values.dtype == jnp.float32
  separate = [
    jax.value_and_grad(network)(params, batch),
    jax.value_and_grad(mean)(params, batch),
    jax.value_and_grad(mopt.l1_norm)(params),
  ]
  for j, (value, grad) in enumerate(separate):
    np.testing.assert_allclose(values[j], value, rtol=1e-6)
    for key in params:
      np.testing.assert_allclose(grads[key][j], grad[key], rtol=1e-5, atol=1e-7)


def with_aux(params, batch):
  return network(params, batch), {'samples': len(batch[0])}


def test_aux_of_all_objectives():
  params, batch = network_and_batch()

  def l1_aux(params):
    return (mopt.l1_norm(params), 'l1')

  grad_fn = mopt.value_and_stacked_grad(with_aux, l1_aux, has_aux=True)
  (values, aux), grads = grad_fn(params, batch)
  assert aux == ({'samples': 6}, 'l1')
  expected, stacked = mopt.value_and_stacked_grad(network, mopt.l1_norm)(
    params, batch
  )
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(grads['w1'], stacked['w1'])


@pytest.mark.parametrize('flags', [(True, False), [True, False]])
def test_aux_of_some_objectives(flags):
  params, batch = network_and_batch()
  grad_fn = mopt.value_and_stacked_grad(with_aux, mopt.l1_norm, has_aux=flags)
  (values, aux), grads = grad_fn(params, batch)
  assert values.shape == (2,)
  assert aux == ({'samples': 6}, None)
  assert grads['w2'].shape == (2, 4, 2)


@pytest.mark.parametrize(
  'flags', [(True,), (True, False, False), (), 'no', (1, 0), (True, None)]
)
def test_other_aux_flags_are_refused(flags):
  with pytest.raises(ValueError, match='has_aux'):
    mopt.value_and_stacked_grad(network, mopt.l1_norm, has_aux=flags)


@pytest.mark.parametrize('objectives', [(), (mopt.l1_norm,)])
def test_fewer_than_two_objectives_are_refused(objectives):
  with pytest.raises(ValueError, match='at least 2'):
    mopt.value_and_stacked_grad(*objectives)


W1_ONLY = {'w1': True, 'w2': False}
PARAMETERS_ALONE = {
  'bare_l1': (mopt.l1_norm, mopt.l1_norm),
  'bare_l2': (mopt.l2_norm_squared, mopt.l2_norm_squared),
  'partial_mask': (functools.partial(mopt.l1_norm, mask=W1_ONLY),) * 2,
  'partial_p': (functools.partial(mopt.lp_norm, p=0.5),) * 2,
  'function': (lambda params: jnp.sum(params['w1'] ** 3),) * 2,
  'takes_the_batch': (
    lambda params, batch: jnp.sum(params['w1'] ** 3),
    lambda params: jnp.sum(params['w1'] ** 3),
  ),
  'takes_anything': (
    lambda params, *args: jnp.sum(params['w1'] ** 3),
    lambda params: jnp.sum(params['w1'] ** 3),
  ),
}


@pytest.mark.parametrize('name', PARAMETERS_ALONE)
def test_an_objective_may_ignore_the_batch(name):
  objective, reference = PARAMETERS_ALONE[name]
  params, batch = network_and_batch()
  values, grads = mopt.value_and_stacked_grad(network, objective)(params, batch)
  np.testing.assert_allclose(values[1], reference(params), rtol=1e-6)
  expected = jax.grad(reference)(params)
  for key in params:
    np.testing.assert_allclose(grads[key][1], expected[key], rtol=1e-6)


# -- Who gets the batch -------------------------------------------------------


def times_batch(params, batch):
  return jnp.sum(params) * batch


def alone(params):
  return 2 * jnp.sum(params)


def with_mask(params, mask=None):
  assert mask is None
  return 2 * jnp.sum(params)


class Times:
  """A callable that gets the batch, and methods of all sorts."""

  def __call__(self, params, batch):
    return times_batch(params, batch)

  def method(self, params, batch):
    return times_batch(params, batch)

  def alone(self, params):
    return alone(params)

  @classmethod
  def of_class(cls, params, batch):
    return times_batch(params, batch)

  @staticmethod
  def static(params):
    return alone(params)

  @functools.partial(jax.jit, static_argnums=0)
  def jitted(self, params):
    return alone(params)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def remat(self, params):
    return alone(params)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def remat_with_batch(self, params, batch):
    return times_batch(params, batch)


class Wrapper:
  """A wrapper that is a class, as of `functools.update_wrapper`."""

  def __init__(self, function):
    functools.update_wrapper(self, function)

  def __call__(self, params):
    return alone(params)


@functools.wraps(alone)
def adds_a_batch(params, batch):
  return times_batch(params, batch)


@functools.wraps(times_batch)
def drops_the_batch(params):
  return alone(params)


@functools.wraps(mopt.l1_norm)
def scaled_norm(params, batch):
  return mopt.l1_norm(params) * batch


@functools.wraps(alone)
def passes_all_on(*args, **kwargs):
  assert len(args) == 2
  return times_batch(*args, **kwargs)


def of_three(params, i, batch=None):
  assert batch is None
  return i * jnp.sum(params)


def keyword_only(params, *, scale=2.0):
  return scale * jnp.sum(params)


@jax.custom_jvp
def custom(params):
  return 2 * jnp.sum(params)


custom.defjvp(lambda primals, tangents: (custom(*primals), 2 * sum(*tangents)))

# The batch is 5: the sum of the parameters is 3, and the value 15 with the
# batch and 6 without.
WITH_BATCH = {
  'function': times_batch,
  'lambda': lambda p, b: times_batch(p, b),
  'third_has_a_default': lambda p, b, c=1.0: c * times_batch(p, b),
  'positional_only': lambda p, b, /: times_batch(p, b),
  'keyword_only_too': lambda p, b, *, c=1.0: c * times_batch(p, b),
  'anything': lambda *args: times_batch(*args),
  'params_and_anything': lambda p, *rest: times_batch(p, *rest),
  'callable': Times(),
  'method': Times().method,
  'class_method': Times.of_class,
  'remat_method': Times().remat_with_batch,
  'jit': jax.jit(times_batch),
  'jit_of_jit': jax.jit(jax.jit(times_batch)),
  'remat': jax.checkpoint(times_batch),
  'nnx_jit': nnx.jit(times_batch),
  'wrapper': adds_a_batch,
  'jit_of_wrapper': jax.jit(adds_a_batch),
  'wrapper_of_norm': scaled_norm,
  'jit_of_wrapper_of_norm': jax.jit(scaled_norm),
  'wrapper_of_all': passes_all_on,
  'partial_of_third': functools.partial(lambda p, b, c: times_batch(p, b), c=0),
  'jit_of_partial': jax.jit(
    functools.partial(lambda p, b, c: times_batch(p, b), c=0)
  ),
}
WITHOUT_BATCH = {
  'function': alone,
  'keyword_only': keyword_only,
  'keywords': lambda p, **kwargs: (2 + len(kwargs)) * jnp.sum(p),
  'mask': with_mask,
  'jit_of_mask': jax.jit(with_mask),
  'mask_of_lambda': lambda p, mask=None: with_mask(p, mask),
  'method': Times().alone,
  'static_method': Times.static,
  'jit_method': Times().jitted,
  'remat_method': Times().remat,
  'jit': jax.jit(alone),
  'jit_of_jit': jax.jit(jax.jit(alone)),
  'remat': jax.checkpoint(alone),
  'custom_jvp': custom,
  'nnx_jit': nnx.jit(alone),
  'nnx_remat': nnx.remat(alone),
  'named_call': jax.named_call(alone),
  'wrapper': drops_the_batch,
  'jit_of_wrapper': jax.jit(drops_the_batch),
  'partial_of_wrapper': functools.partial(drops_the_batch),
  'wrapper_class': Wrapper(times_batch),
  'partial': functools.partial(of_three, i=2),
  'jit_of_partial': jax.jit(functools.partial(of_three, i=2)),
  'partial_of_jit': functools.partial(jax.jit(of_three), i=2),
  'partial_of_partial': functools.partial(
    functools.partial(lambda p, i, j: i * j * jnp.sum(p), i=1), j=2
  ),
  'partial_of_default': functools.partial(lambda p, i=3: i * jnp.sum(p), i=2),
  'partial_of_keyword_only': functools.partial(keyword_only, scale=2.0),
  'jax_partial': jax.tree_util.Partial(of_three, i=2),
}


@pytest.mark.parametrize('name', WITH_BATCH)
def test_an_objective_that_asks_for_the_batch_gets_it(name):
  grad_fn = mopt.value_and_stacked_grad(WITH_BATCH[name], mopt.l1_norm)
  values, grads = grad_fn(jnp.array([1.0, 2.0]), 5.0)
  np.testing.assert_array_equal(values, [15.0, 3.0])
  np.testing.assert_array_equal(grads, [[5.0, 5.0], [1.0, 1.0]])


@pytest.mark.parametrize('name', WITHOUT_BATCH)
def test_an_objective_of_the_parameters_does_not_get_it(name):
  grad_fn = mopt.value_and_stacked_grad(WITHOUT_BATCH[name], mopt.l1_norm)
  values, grads = grad_fn(jnp.array([1.0, 2.0]), 5.0)
  np.testing.assert_array_equal(values, [6.0, 3.0])
  np.testing.assert_array_equal(grads, [[2.0, 2.0], [1.0, 1.0]])


NORMS = {
  'group': mopt.group_norm,
  'l1': mopt.l1_norm,
  'l2': mopt.l2_norm_squared,
  'lp': functools.partial(mopt.lp_norm, p=0.5),
}
AROUND_NORMS = {
  'bare': lambda norm: norm,
  'jit': jax.jit,
  'remat': jax.checkpoint,
  'partial': lambda norm: functools.partial(norm, mask=True),
  'jit_of_partial': lambda norm: jax.jit(functools.partial(norm, mask=True)),
  'partial_of_jit': lambda norm: functools.partial(
    jax.jit(norm, static_argnames='mask'), mask=True
  ),
}


@pytest.mark.parametrize('around', AROUND_NORMS)
@pytest.mark.parametrize('norm', NORMS)
def test_norms_never_get_the_batch(norm, around):
  # A boolean, which they would take for a mask; nor does a keyword reach them.
  objective = AROUND_NORMS[around](NORMS[norm])

  def error(params, batch, mask):
    return jnp.sum(params) * batch * mask

  grad_fn = mopt.value_and_stacked_grad(error, objective)
  params = jnp.array([[1.0, -2.0]])
  values, _ = grad_fn(params, False, mask=False)
  np.testing.assert_allclose(values[1], NORMS[norm](params), rtol=1e-6)
  assert values[1] > 1


SECOND_HAS_A_DEFAULT = {
  'closure': [lambda p, i=i: i * jnp.sum(p) for i in range(2)][1],
  'number': lambda p, scale=2.0: scale * jnp.sum(p),
  'none': lambda p, batch=None: jnp.sum(p),
  'and_anything': lambda p, i=0, *rest: jnp.sum(p),
  'jit': jax.jit(lambda p, i=3: i * jnp.sum(p)),
  'partial_of_third': functools.partial(lambda p, i=3, j=4: i * j, j=5),
  'of_jax': jnp.sum,
  'method': type('A', (), {'f': lambda self, p, i=3: jnp.sum(p)})().f,
}


@pytest.mark.parametrize('name', SECOND_HAS_A_DEFAULT)
def test_a_default_in_the_place_of_the_batch_is_refused(name):
  message = r'second parameter .* has a default: .*functools[.]partial\('
  with pytest.raises(ValueError, match=message):
    mopt.value_and_stacked_grad(mopt.l1_norm, SECOND_HAS_A_DEFAULT[name])


def test_functools_partial_is_what_helps():
  def power(params, exponent=1):
    return jnp.sum(params**exponent)

  powers = [functools.partial(power, exponent=i) for i in (1, 2, 3)]
  values, _ = mopt.value_and_stacked_grad(*powers)(jnp.array([1.0, 2.0]), 7)
  np.testing.assert_array_equal(values, [3.0, 5.0, 9.0])


def test_keywords_reach_those_that_name_them():
  def error(params, batch, scale):
    return scale * batch * jnp.sum(params)

  bound = functools.partial(keyword_only, scale=3.0)
  grad_fn = mopt.value_and_stacked_grad(
    error, keyword_only, lambda p, **kwargs: kwargs['scale'], bound, alone
  )
  values, _ = grad_fn(jnp.array([1.0, 2.0]), 5.0, scale=10.0)
  np.testing.assert_array_equal(values, [150.0, 30.0, 10.0, 9.0, 6.0])


class Scalars(NamedTuple):
  a: jax.Array
  b: jax.Array


def test_a_builtin_without_a_signature_gets_the_batch():
  params = Scalars(jnp.array(3.0), jnp.array(-4.0))
  grad_fn = mopt.value_and_stacked_grad(getattr, mopt.l1_norm)
  values, grads = grad_fn(params, 'b')
  np.testing.assert_array_equal(values, [-4.0, 7.0])
  np.testing.assert_array_equal(grads, [[0.0, 1.0], [1.0, -1.0]])


def test_several_arguments_reach_the_objective():
  def error(params, x, y, scale):
    return scale * jnp.sum(params * x - y)

  values, grads = mopt.value_and_stacked_grad(error, mopt.l1_norm)(
    jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), 1.0, scale=2.0
  )
  np.testing.assert_allclose(values, [18.0, 3.0])
  np.testing.assert_allclose(grads, [[6.0, 8.0], [1.0, 1.0]])


def test_a_keyword_argument_reaches_an_objective_that_asks_for_it():
  def error(params, *, batch):
    return jnp.sum(params * batch)

  values, _ = mopt.value_and_stacked_grad(error, mopt.l1_norm)(
    jnp.array([1.0, 2.0]), batch=jnp.array([3.0, 4.0])
  )
  np.testing.assert_allclose(values, [11.0, 3.0])


def count_dots(jaxpr) -> int:
  return len(re.findall(r'\bdot_general\[', str(jaxpr)))


def test_l1_adds_no_evaluation_of_the_network():
  params, batch = network_and_batch()
  one = jax.make_jaxpr(jax.value_and_grad(network))(params, batch)
  two = jax.make_jaxpr(mopt.value_and_stacked_grad(network, mopt.l1_norm))(
    params, batch
  )
  assert count_dots(one) == 5  # 2 forward, 3 backward
  assert count_dots(two) == 5


def test_the_compiler_shares_a_common_forward_pass():
  params, batch = network_and_batch()

  def quartic(params, batch):
    return jnp.mean(
      (jnp.tanh(batch[0] @ params['w1']) @ params['w2'] - batch[1]) ** 4
    )

  grad_fn = mopt.value_and_stacked_grad(network, quartic)
  compiled = jax.jit(grad_fn).lower(params, batch).compile().as_text()
  assert len(re.findall(r'= \S+ dot\(', compiled)) == 8  # 2 forward, 2 * 3
