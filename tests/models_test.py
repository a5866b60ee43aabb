"""LeNet-5, and the convolution that it runs on."""

import functools
import math

import chex
from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.convolution import conv_general_dilated
from models.convolution import shifted_conv
import mopt

IMAGES = jnp.zeros((2, 28, 28, 1))
NHWC = ('NHWC', 'HWIO', 'NHWC')

# Most of the time here would go into optimizing small programs.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@pytest.fixture(scope='module')
def params():
  model = models.create('lenet5')
  return jit(model.init)(jax.random.key(0), IMAGES)['params']


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_lenet5_is_the_paper_s(params):
  # Table 1a of Reiners et al., 2020.
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert shapes == {
    'conv1': {'kernel': (3, 3, 1, 6), 'bias': (6,)},
    'conv2': {'kernel': (3, 3, 6, 16), 'bias': (16,)},
    'layer1': {'kernel': (400, 120), 'bias': (120,)},
    'layer2': {'kernel': (120, 84), 'bias': (84,)},
    'layer3': {'kernel': (84, 10), 'bias': (10,)},
  }
  assert size(params) == 60_074
  assert size(params['conv1']) + size(params['conv2']) == 940
  dense = mopt.count_nonzero(params, mopt.dense_kernels)
  assert dense.total == 58_920
  assert set(dense.per_leaf) == {
    f'layer{i}/kernel' for i in (1, 2, 3)
  }  # glorot_uniform draws no exact zero
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_kernels_are_glorot_uniform(params):
  for name, layer in params.items():
    *window, fan_in, fan_out = layer['kernel'].shape
    bound = math.sqrt(6 / (math.prod(window) * (fan_in + fan_out)))
    largest = float(jnp.abs(layer['kernel']).max())
    # Of n uniform magnitudes the largest is below the bound by 1/n of it.
    assert (1 - 9 / layer['kernel'].size) * bound < largest <= bound, name
    # The standard error of the root mean square is 0.45 / sqrt(n) of it.
    rms = float(jnp.sqrt(jnp.mean(layer['kernel'] ** 2)))
    error = 2 / math.sqrt(layer['kernel'].size)
    assert rms == pytest.approx(bound / math.sqrt(3), rel=error), name
    assert not layer['bias'].any(), name


@pytest.mark.parametrize('shape', [(28, 28, 1), (32, 32, 3), (10, 17, 2)])
@pytest.mark.parametrize('num_classes', [2, 10, 100])
def test_output_shape(shape, num_classes):
  model = models.create('lenet5', num_classes)
  images = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
  logits, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), images
  )
  chex.assert_shape(logits, (3, num_classes))
  assert variables['params']['layer3']['kernel'].shape == (84, num_classes)


def test_lenet5_is_its_layers(params):
  """Against jax.lax and flax.linen as they come."""
  images = jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
  x = images
  for name in ('conv1', 'conv2'):
    x = lax.conv_general_dilated(
      x, params[name]['kernel'], (1, 1), 'VALID', dimension_numbers=NHWC
    )
    x = nn.relu(x + params[name]['bias'][None, None, None])
    x = nn.avg_pool(x, (2, 2), strides=(2, 2))
  x = x.reshape(4, -1)
  for name in ('layer1', 'layer2', 'layer3'):
    x = x @ params[name]['kernel'] + params[name]['bias'][None]
    x = x if name == 'layer3' else nn.relu(x)
  logits = models.create('lenet5').apply({'params': params}, images)
  np.testing.assert_allclose(logits, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'shape',
  [(2, 9, 28, 1), (2, 28, 9, 1), (28, 28, 1), (2, 28, 28), (1, 1, 1, 1)],
)
def test_images_that_do_not_fit_are_refused(shape):
  model = models.create('lenet5')
  with pytest.raises(ValueError, match='lenet5 needs images') as error:
    model.init(jax.random.key(0), jnp.zeros(shape))
  assert str(shape) in str(error.value)


def test_create_refuses():
  with pytest.raises(ValueError, match="one of lenet5.*'alexnet'"):
    models.create('alexnet')
  for num_classes in (1, 0, -3):
    with pytest.raises(ValueError, match=f'>= 2, got {num_classes}'):
      models.create('lenet5', num_classes)


def test_every_name_makes_a_model():
  assert 'lenet5' in models.NAMES
  for name in models.NAMES:
    assert isinstance(models.create(name), nn.Module)


def lax_(images, kernel, padding):
  return lax.conv_general_dilated(
    images, kernel, (1, 1), padding, dimension_numbers=NHWC
  )


def draw(images_shape, kernel_shape, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0))
  images = jax.random.normal(keys[0], images_shape, dtype)
  return images, jax.random.normal(keys[1], kernel_shape, dtype)


def value_and_grads(conv, padding):
  """Of a scalar that weighs every output differently."""

  def function(images, kernel):
    output = conv(images, kernel, padding)
    weights = jnp.cos(jnp.arange(output.size, dtype=jnp.float32))
    total = jnp.sum(output.astype(jnp.float32) * weights.reshape(output.shape))
    return total, output

  return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)


SHAPES = [
  ((2, 6, 5, 1), (3, 3, 1, 4)),
  ((2, 6, 5, 3), (3, 3, 3, 4)),
  ((1, 7, 4, 2), (2, 4, 2, 1)),
  ((3, 4, 4, 5), (1, 1, 5, 2)),
  ((2, 8, 8, 1), (5, 1, 1, 3)),
  ((2, 5, 4, 16), (3, 2, 16, 3)),
]
PADDINGS = ('VALID', 'SAME', ((1, 0), (2, 3)))


def compare(function, *arguments):
  """Results of both convolutions; as one program, which compiles faster."""

  @jit
  def both(*arguments):
    return function(shifted_conv, *arguments), function(lax_, *arguments)

  return both(*arguments)


@pytest.mark.parametrize(('images_shape', 'kernel_shape'), SHAPES)
def test_shifted_conv_is_the_convolution(images_shape, kernel_shape):
  def function(conv, *arguments):
    return [value_and_grads(conv, p)(*arguments) for p in PADDINGS]

  actual, expected = compare(function, *draw(images_shape, kernel_shape))
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('channels', [1, 6, 16])
def test_shifted_conv_without_jit(channels):
  images, kernel = draw((2, 6, 5, channels), (3, 3, channels, 4))
  np.testing.assert_allclose(
    shifted_conv(images, kernel),
    lax_(images, kernel, 'VALID'),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('images_shape', 'kernel_shape'), [*SHAPES[:2], SHAPES[-1]]
)
def test_shifted_conv_in_bfloat16(images_shape, kernel_shape):
  arguments = draw(images_shape, kernel_shape, jnp.bfloat16)

  def function(conv, *arguments):
    if conv is lax_:  # without rounding
      arguments = [x.astype(jnp.float32) for x in arguments]
    (_, output), grads = value_and_grads(conv, 'SAME')(*arguments)
    return output, *grads

  actual, exact = compare(function, *arguments)
  for x, y in zip(actual, exact):
    assert x.dtype == jnp.bfloat16
    # A bfloat16 has a step of 2^-8, and each is a sum of up to 60 of them.
    scale = float(jnp.sqrt(jnp.mean(y**2)))
    np.testing.assert_allclose(x.astype(jnp.float32), y, 0.02, 0.02 * scale)


@pytest.mark.parametrize('channels', [1, 3, 16])
def test_shifted_conv_under_vmap(channels):
  # As a population runs it: kernels of its members, images shared or not.
  arguments = draw((3, 2, 6, 6, channels), (3, 3, 3, channels, 4))

  def function(conv, images, kernels):
    mapped = value_and_grads(conv, 'SAME')
    return (
      jax.vmap(mapped)(images, kernels),
      jax.vmap(mapped, in_axes=(None, 0))(images[0], kernels),
    )

  actual, expected = compare(function, *arguments)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


# Keyword arguments of a convolution of images [2, 8, 8, 4] by 3 x 3 kernels.
SPECIAL = [
  dict(window_strides=(2, 2)),
  dict(window_strides=(1, 2)),
  dict(lhs_dilation=(2, 1), padding=((1, 1), (1, 1))),
  dict(rhs_dilation=(1, 2)),
  dict(feature_group_count=2),
  dict(feature_group_count=4, padding='VALID'),
]
PLAIN = [
  dict(),
  dict(padding='VALID'),
  dict(padding=((0, 1), (2, 0))),
  dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1)),
  dict(precision=lax.Precision.HIGHEST),
]


def outputs_of(conv, cases):
  """Outputs, and for each whether it is a convolution to the compiler."""

  def call(images, kernel, **kwargs):
    defaults = dict(window_strides=(1, 1), padding='SAME')
    kwargs = dict(defaults, dimension_numbers=NHWC) | kwargs
    groups = kwargs.get('feature_group_count', 1)
    return conv(images, kernel[:, :, : 4 // groups], **kwargs)

  arguments = draw((2, 8, 8, 4), (3, 3, 4, 8))
  functions = [functools.partial(call, **kwargs) for kwargs in cases]
  outputs = jit(lambda *xs: [f(*xs) for f in functions])(*arguments)
  return outputs, [
    'conv_general_dilated' in str(jax.make_jaxpr(f)(*arguments))
    for f in functions
  ]


def test_what_is_not_plain_is_left_to_lax():
  actual, is_conv = outputs_of(conv_general_dilated, SPECIAL)
  assert all(is_conv)
  expected, _ = outputs_of(lax.conv_general_dilated, SPECIAL)
  chex.assert_trees_all_equal(actual, expected)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='made for CPUs')
def test_what_is_plain_has_no_convolution_on_cpu():
  actual, is_conv = outputs_of(conv_general_dilated, PLAIN)
  assert not any(is_conv)
  expected, is_conv = outputs_of(lax.conv_general_dilated, PLAIN)
  assert all(is_conv)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_convolution_of_one_dimension_is_left_to_lax():
  images, kernel = draw((2, 9, 3), (3, 3, 5))
  kwargs = dict(window_strides=(1,), padding='VALID')
  kwargs['dimension_numbers'] = ('NHC', 'HIO', 'NHC')
  np.testing.assert_array_equal(
    conv_general_dilated(images, kernel, **kwargs),
    lax.conv_general_dilated(images, kernel, **kwargs),
  )


def test_it_stands_in_for_the_convolution_of_flax():
  cases = (
    dict(),
    dict(strides=2),
    dict(padding=1),
    dict(padding='CIRCULAR'),
    dict(kernel_dilation=2),
    dict(feature_group_count=3),
    dict(use_bias=False, dtype=jnp.float32, precision='highest'),
  )
  images, _ = draw((2, 7, 8, 3), (1,))

  @jit
  def outputs():
    ours, theirs = [], []
    for kwargs in cases:
      plain = nn.Conv(6, (3, 3), **kwargs)
      conv = plain.clone(conv_general_dilated=conv_general_dilated)
      variables = plain.init(jax.random.key(0), images)
      ours.append(conv.apply(variables, images))
      theirs.append(plain.apply(variables, images))
    return ours, theirs

  chex.assert_trees_all_close(*outputs(), rtol=1e-5, atol=1e-5)
