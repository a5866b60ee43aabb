"""Objectives and their stacked gradients."""

import functools

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


def log_sum_float64(x, eps=0.1):
  return (eps * np.log(1 + np.abs(x) / eps)).sum()


COMPLEXITIES = {
  'l1_norm': (mopt.l1_norm, l1_float64),
  'l2_norm_squared': (mopt.l2_norm_squared, l2_float64),
  'log_sum_norm': (mopt.log_sum_norm, log_sum_float64),
  'log_sum_norm_of_large_weights': (
    functools.partial(mopt.log_sum_norm, eps=1e-3),
    functools.partial(log_sum_float64, eps=1e-3),
  ),
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
def test_log_sum_pulls_small_weights_as_l1_and_large_ones_hardly(transform):
  w = jnp.array([0.0, -0.0, 1e-30, -1e-7, 0.1, -0.1, 1e6, -1e30])
  slopes = transform(jax.grad(mopt.log_sum_norm))(w)
  expected = [0, 0, 1, -1, 0.5, -0.5, 1e-7, -1e-31]
  np.testing.assert_allclose(slopes, expected, rtol=1e-5)
  # It is below l1, and above it for no weight.
  sizes = jnp.abs(w[2:])
  values = jax.vmap(transform(mopt.log_sum_norm))(w[2:])
  assert (values <= sizes).all()
  np.testing.assert_allclose(
    values, 0.1 * np.log1p(np.asarray(sizes, float) / 0.1), rtol=1e-6
  )
  # The larger eps, the nearer.
  near = transform(functools.partial(mopt.log_sum_norm, eps=1e6))
  assert near(w[:6]) == pytest.approx(float(mopt.l1_norm(w[:6])), rel=1e-5)


@pytest.mark.parametrize('eps', [0.0, -1.0, 1e-46, float('inf'), float('nan')])
def test_log_sum_refuses_an_eps_out_of_range(eps):
  with pytest.raises(ValueError, match='eps must be positive, .* got '):
    mopt.log_sum_norm({}, eps=eps)


def test_log_sum_hides_nothing_that_is_not_finite():
  assert np.isnan(mopt.log_sum_norm(jnp.array([1.0, np.nan])))
  assert mopt.log_sum_norm(jnp.array([1.0, np.inf])) == np.inf


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
    'log_sum_norm': np.sign(FINE) / (1 + np.abs(FINE) / 0.1),
    'log_sum_norm_of_large_weights': np.sign(FINE) / (1 + np.abs(FINE) / 1e-3),
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


# -- Counts ------------------------------------------------------------------


def test_count_nonzero_lists_the_masked_leaves_only():
  count = mopt.count_nonzero(random_params(), MASK)
  assert list(count.per_leaf) == ['a']
  assert int(count.total) == 12
