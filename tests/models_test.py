"""LeNet-5, the VGG-like network, their convolution, and the perceptron."""

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
from models.convolution import BatchLastConv
from models.convolution import swap_batch
import mopt

pytestmark = pytest.mark.usefixtures('exact_products')

IMAGES = jnp.zeros((2, 28, 28, 1))
CONVOLUTIONAL = ('lenet5', 'vgg')
NHWC = ('NHWC', 'HWIO', 'NHWC')

# Most of the time here would go into optimizing small programs.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@pytest.fixture(scope='module')
def params():
  model = models.create('lenet5')
  return jit(model.init)(jax.random.key(0), IMAGES)['params']


@pytest.fixture(scope='module')
def vgg_variables():
  images = jnp.zeros((1, 32, 32, 3))
  return jit(models.create('vgg').init)(jax.random.key(0), images)


@pytest.fixture(scope='module')
def mlp_params():
  return jit(models.create('mlp').init)(jax.random.key(0), IMAGES)['params']


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


@pytest.mark.parametrize('model', models.NAMES)
def test_kernels_are_glorot_uniform(params, vgg_variables, mlp_params, model):
  params = {
    'lenet5': params,
    'mlp': mlp_params,
    'vgg': vgg_variables['params'],
  }[model]
  for name, layer in params.items():
    assert not layer['bias'].any(), name
    if name.startswith('norm'):
      continue
    *window, fan_in, fan_out = layer['kernel'].shape
    bound = math.sqrt(6 / (math.prod(window) * (fan_in + fan_out)))
    largest = float(jnp.abs(layer['kernel']).max())
    # Of n uniform magnitudes the largest is below the bound by 1/n of it.
    assert (1 - 9 / layer['kernel'].size) * bound < largest <= bound, name
    # The standard error of the root mean square is 0.45 / sqrt(n) of it.
    rms = float(jnp.sqrt(jnp.mean(layer['kernel'] ** 2)))
    error = 2 / math.sqrt(layer['kernel'].size)
    assert rms == pytest.approx(bound / math.sqrt(3), rel=error), name


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
  said = 'model=alexnet: expected one of lenet5, mlp, vgg, or package.module:'
  for function in (models.create, models.find):
    with pytest.raises(ValueError, match=said):
      function('alexnet')
  for num_classes in (0, -3):
    with pytest.raises(ValueError, match=f'>= 1, got {num_classes}'):
      models.create('lenet5', num_classes)


def test_every_name_makes_a_model():
  assert models.NAMES == ('lenet5', 'mlp', 'vgg')
  for name in models.NAMES:
    assert isinstance(models.create(name), nn.Module)


def test_mlp_is_lenet_300_100(mlp_params):
  assert jax.tree.map(lambda x: x.shape, mlp_params) == {
    'layer1': {'kernel': (784, 300), 'bias': (300,)},
    'layer2': {'kernel': (300, 100), 'bias': (100,)},
    'layer3': {'kernel': (100, 10), 'bias': (10,)},
  }
  assert size(mlp_params) == 266_610
  dense = mopt.count_nonzero(mlp_params, mopt.dense_kernels)
  assert dense.total == 784 * 300 + 300 * 100 + 100 * 10
  assert {x.dtype for x in jax.tree.leaves(mlp_params)} == {
    jnp.dtype('float32')
  }


@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 1), (5, 2, 3, 4), (5,)])
def test_mlp_takes_an_example_as_one_vector(shape):
  """In NumPy, with biases that are not 0, and layers as they are told."""
  model = models.MLP(num_classes=3, hidden=(6, 4, 5))
  random = np.random.default_rng(0)
  inputs = random.normal(size=shape).astype(np.float32)
  params = model.init(jax.random.key(1), inputs)['params']
  params = jax.tree.map(lambda x: x + random.normal(size=x.shape), params)
  x = inputs.reshape(5, -1).astype(np.float64)
  for i in (1, 2, 3, 4):
    layer = params[f'layer{i}']
    x = x @ np.asarray(layer['kernel']) + np.asarray(layer['bias'])
    x = x if i == 4 else np.maximum(x, 0)
  assert x.shape == (5, 3)
  for train in (False, True):
    logits = model.apply({'params': params}, inputs, train=train)
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [(), (3, 0), (3, 2, 0, 1)])
def test_inputs_that_do_not_fit_mlp_are_refused(shape):
  with pytest.raises(ValueError, match='mlp needs inputs') as error:
    models.create('mlp').init(jax.random.key(0), jnp.zeros(shape))
  assert str(shape) in str(error.value)


def test_vgg_is_the_paper_s(vgg_variables):
  # Table 1b of Reiners et al., 2020: convolutions, batch normalisations with
  # what is not trained, and the dense layer.
  params, stats = vgg_variables['params'], vgg_variables['batch_stats']
  assert set(vgg_variables) == {'params', 'batch_stats'}
  convs = [f'conv{i}' for i in range(1, 7)]
  norms = [f'norm{i}' for i in range(1, 7)]
  assert set(params) == {*convs, *norms, 'denselayer'}
  assert set(stats) == set(norms)
  sizes = [size(params[name]) for name in convs]
  assert sizes == [896, 9_248, 18_496, 36_928, 73_856, 147_584]
  assert [size(params[x]) for x in norms] == [64, 64, 128, 128, 256, 256]
  assert [size(stats[x]) for x in norms] == [64, 64, 128, 128, 256, 256]
  assert size(params['denselayer']) == 20_490
  assert size(params) == 308_394
  assert size(stats) == 896
  assert size(vgg_variables) == 309_290
  leaves = jax.tree.leaves(vgg_variables)
  assert {x.dtype for x in leaves} == {jnp.dtype('float32')}


def test_the_goals_see_the_dense_kernel_and_the_convolutions_of_vgg(
  vgg_variables,
):
  params = vgg_variables['params']
  dense = mopt.count_nonzero(params, mopt.dense_kernels)
  assert dense.per_leaf == {'denselayer/kernel': 20_480}
  conv = mopt.count_nonzero(params, mopt.conv_kernels)
  assert set(conv.per_leaf) == {f'conv{i}/kernel' for i in range(1, 7)}


@pytest.mark.parametrize(
  ('shape', 'num_classes', 'inputs'),
  [
    ((32, 32, 3), 100, 4 * 4 * 128),
    ((28, 28, 1), 10, 3 * 3 * 128),
    ((8, 8, 3), 2, 128),
    ((17, 40, 4), 5, 2 * 5 * 128),
  ],
)
def test_output_shape_of_vgg(shape, num_classes, inputs):
  model = models.create('vgg', num_classes)
  images = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
  logits, variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), images
  )
  chex.assert_shape(logits, (3, num_classes))
  params = variables['params']
  assert params['conv1']['kernel'].shape == (3, 3, shape[-1], 32)
  assert params['denselayer']['kernel'].shape == (inputs, num_classes)


@pytest.mark.parametrize(
  'shape', [(2, 7, 32, 3), (2, 32, 7, 3), (32, 32, 3), (2, 32, 32)]
)
def test_images_that_do_not_fit_vgg_are_refused(shape):
  with pytest.raises(ValueError, match='vgg needs images .* 8 x 8') as error:
    models.create('vgg').init(jax.random.key(0), jnp.zeros(shape))
  assert str(shape) in str(error.value)


@pytest.fixture(scope='module')
def trained(vgg_variables):
  """Variables of VGG, none of which is as it was initialised."""
  leaves, structure = jax.tree.flatten(vgg_variables)
  random = np.random.default_rng(0)
  # Around 1, so that variances and scales make sense.
  changed = [x + random.uniform(0.5, 1.5, x.shape) for x in leaves]
  trained = jax.tree.unflatten(structure, changed)
  params = jax.tree.map(lambda x: (x - 1) / 10, trained['params'])
  for i in range(1, 7):
    params[f'norm{i}']['scale'] = trained['params'][f'norm{i}']['scale']
  trained = dict(params=params, batch_stats=trained['batch_stats'])
  return jax.tree.map(lambda x: np.asarray(x, np.float32), trained)


def vgg_images(n=6):
  return np.random.default_rng(1).normal(size=(n, 32, 32, 3)).astype('float32')


def expected_of_vgg(variables, images, train):
  """Logits and statistics, in NumPy but for the convolution of jax.lax."""
  params, stats = variables['params'], variables['batch_stats']
  updated = {}
  x = images.astype(np.float64)
  for i in range(1, 7):
    conv, norm = params[f'conv{i}'], params[f'norm{i}']
    x = lax.conv_general_dilated(
      x.astype(np.float32),
      conv['kernel'],
      (1, 1),
      'SAME',
      dimension_numbers=NHWC,
    )
    x = np.asarray(x, np.float64) + conv['bias']
    x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
    old = stats[f'norm{i}']
    mean, var = old['mean'], old['var']
    if train:
      mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
      updated[f'norm{i}'] = {
        'mean': 0.99 * old['mean'] + 0.01 * mean,
        'var': 0.99 * old['var'] + 0.01 * var,
      }
    x = (x - mean) / np.sqrt(var + 1e-3) * norm['scale'] + norm['bias']
    if i % 2 == 0:
      n, height, width, channels = x.shape
      x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
      x = x.max(axis=(2, 4))
  dense = params['denselayer']
  return x.reshape(n, -1) @ dense['kernel'] + dense['bias'], updated


def test_vgg_is_its_layers(trained):
  images = vgg_images()
  logits = jit(models.create('vgg').apply)(trained, images)
  expected, _ = expected_of_vgg(trained, images, train=False)
  scale = expected.std()
  assert scale > 0.1
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)


def test_vgg_in_training_uses_the_batch_and_updates_its_statistics(trained):
  """With the momentum .99 and the epsilon .001 of Keras."""
  images = vgg_images()
  model = models.create('vgg').clone(dropout=(0.0, 0.0, 0.0))
  logits, changed = jit(
    lambda *args: model.apply(*args, train=True, mutable=['batch_stats'])
  )(trained, images)
  expected, updated = expected_of_vgg(trained, images, train=True)
  scale = expected.std()
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)
  chex.assert_trees_all_close(changed, {'batch_stats': updated}, rtol=1e-5)
  # What the batch changes is far above the tolerance.
  change = jax.tree.map(
    lambda x, y: abs(x - y).max(), updated, trained['batch_stats']
  )
  assert min(jax.tree.leaves(change)) > 1e-3


def test_a_split_batch_has_the_statistics_of_the_whole(trained):
  """Gradients across devices: tests/training_test.py."""
  images = vgg_images()
  model = models.create('vgg').clone(
    dropout=(0.0, 0.0, 0.0), axis_name='devices'
  )

  def apply(variables, images):
    return model.apply(variables, images, train=True, mutable=['batch_stats'])

  split = jax.vmap(apply, in_axes=(None, 0), axis_name='devices')
  shares = images.reshape(2, 3, *images.shape[1:])
  logits, changed = jit(split)(trained, shares)
  expected, updated = expected_of_vgg(trained, images, train=True)
  np.testing.assert_allclose(
    logits.reshape(6, -1), expected, rtol=0, atol=1e-4 * expected.std()
  )
  for i in (0, 1):
    share = jax.tree.map(lambda x, i=i: x[i], changed['batch_stats'])
    chex.assert_trees_all_close(share, updated, rtol=1e-5)


def test_dropout_follows_each_block_in_training_only(trained):
  model = models.create('vgg')

  @functools.partial(jit, static_argnums=1)
  def dropped(key, train):
    _, state = model.apply(
      trained,
      vgg_images(),
      train=train,
      rngs={'dropout': key} if train else {},
      mutable=['batch_stats', 'intermediates'],
      capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )
    outputs = state['intermediates']
    outputs = [outputs[f'Dropout_{i}']['__call__'][0] for i in range(3)]
    return [swap_batch(x) for x in outputs]

  first = dropped(jax.random.key(0), True)
  second = dropped(jax.random.key(1), True)
  shapes = [(6, 16, 16, 32), (6, 8, 8, 64), (6, 4, 4, 128)]
  assert [x.shape for x in first] == shapes
  for x, y, rate in zip(first, second, (0.2, 0.3, 0.4)):
    zeros = np.asarray(x == 0)
    # At most 0.005 is the standard error, of 12,288 units.
    assert zeros.mean() == pytest.approx(rate, abs=0.02)
    # Units are dropped one by one, not pictures, channels or places.
    for axis in range(4):
      assert not (zeros.all(axis=axis) | ~zeros.any(axis=axis)).all()
    assert (zeros != np.asarray(y == 0)).any()
  # Not even once is the maximum of four normalised units 0.
  assert all((np.asarray(x) != 0).all() for x in dropped(None, False))


@pytest.mark.parametrize('name', models.NAMES)
def test_every_layer_computes_in_bfloat16(name):
  model = models.create(name, dtype=jnp.bfloat16)
  images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
  _, variables = jax.eval_shape(
    functools.partial(model.init_with_output, capture_intermediates=True),
    jax.random.key(0),
    images,
  )
  outputs = variables['intermediates']
  (logits,) = outputs.pop('__call__')
  assert logits.dtype == jnp.float32
  layers = jax.tree.leaves(outputs)
  # Dropout is a layer, too.
  assert len(layers) == {'lenet5': 5, 'mlp': 3, 'vgg': 6 + 6 + 3 + 1}[name]
  assert {x.dtype for x in layers} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('name', models.NAMES)
def test_bfloat16_is_for_the_computation_only(
  params, mlp_params, trained, name
):
  if name != 'vgg':
    variables = {'params': params if name == 'lenet5' else mlp_params}
    images = np.random.default_rng(2).uniform(size=(6, 28, 28, 1))
    images = images.astype(np.float32)
  else:
    variables, images = trained, vgg_images()
  model = models.create(name, dtype=jnp.bfloat16)
  made = jax.eval_shape(model.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype('float32')}

  @jit
  def outputs():
    exact = models.create(name).apply(variables, images)
    return model.apply(variables, images), exact

  rounded, exact = outputs()
  assert rounded.dtype == exact.dtype == jnp.float32
  scale = float(exact.std())
  np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.1 * scale)
  # It is rounded on the way: exact sums would be 2^16 times closer.
  assert float(jnp.abs(rounded - exact).max()) > 1e-4 * scale


def test_statistics_stay_float32_when_vgg_trains_in_bfloat16(trained):
  model = models.create('vgg', dtype=jnp.bfloat16)
  logits, changed = jax.eval_shape(
    lambda: model.apply(
      trained,
      vgg_images(),
      train=True,
      rngs={'dropout': jax.random.key(0)},
      mutable=['batch_stats'],
    )
  )
  assert logits.dtype == jnp.float32
  chex.assert_trees_all_equal_shapes_and_dtypes(
    changed['batch_stats'], trained['batch_stats']
  )


@pytest.mark.parametrize('name', CONVOLUTIONAL)
@pytest.mark.parametrize('shape', [(2, 8, 6, 3), (2, 7, 9, 3), (1, 2, 3, 1)])
def test_halving_is_pooling(name, shape):
  images = jax.random.normal(jax.random.key(0), shape)
  assert len(np.unique(images)) == images.size  # ties share their gradient
  halve, pool = {
    'lenet5': (models.lenet._halve, nn.avg_pool),
    'vgg': (models.vgg._halve, nn.max_pool),
  }[name]

  def weighted(function, x):
    output = function(x)
    weights = jnp.cos(jnp.arange(output.size, dtype=jnp.float32))
    return jnp.sum(output * weights.reshape(output.shape)), output

  def value_and_grad(function):
    wrapped = functools.partial(weighted, function)
    (_, output), grad = jax.value_and_grad(wrapped, has_aux=True)(images)
    _, tangent = jax.jvp(function, (images,), (jnp.sin(images),))
    return output, grad, tangent

  theirs = functools.partial(pool, window_shape=(2, 2), strides=(2, 2))
  actual, expected = jit(
    lambda: (value_and_grad(halve), value_and_grad(theirs))
  )()
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


# Images, kernel size, features.
CONVOLUTIONS = [
  ((2, 6, 5, 1), (3, 3), 4),
  ((2, 6, 5, 3), (3, 3), 4),
  ((1, 7, 4, 2), (2, 4), 1),
  ((3, 4, 4, 5), (1, 1), 2),
  ((2, 8, 8, 1), (5, 1), 3),
  ((2, 5, 4, 16), (3, 2), 3),
]
PADDINGS = ('VALID', 'SAME', ((1, 0), (2, 3)))


def outputs_and_grads(conv, variables, images):
  """Of a scalar that weighs every output `[batch, ..., features]` otherwise."""

  def weighted(variables, images):
    is_ours = isinstance(conv, BatchLastConv)
    output = conv.apply(variables, swap_batch(images) if is_ours else images)
    output = swap_batch(output) if is_ours else output
    weights = jnp.cos(jnp.arange(output.size, dtype=jnp.float32))
    total = jnp.sum(output.astype(jnp.float32) * weights.reshape(output.shape))
    return total, output

  grad = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
  (_, output), grads = grad(variables, images)
  return output, grads


def pair_of(*args, **kwargs):
  return BatchLastConv(*args, **kwargs), nn.Conv(*args, **kwargs)


@pytest.mark.parametrize(('shape', 'kernel_size', 'features'), CONVOLUTIONS)
def test_the_convolution_is_that_of_flax(shape, kernel_size, features):
  images = jax.random.normal(jax.random.key(0), shape)

  @jit
  def both():
    results = []
    for padding in PADDINGS:
      ours, theirs = pair_of(features, kernel_size, padding=padding)
      variables = theirs.init(jax.random.key(1), images)
      # The same names, shapes and initial values.
      made = ours.init(jax.random.key(1), swap_batch(images))
      variables['params']['bias'] += 0.1
      results.append(
        [
          (made, outputs_and_grads(ours, variables, images)),
          (
            theirs.init(jax.random.key(1), images),
            outputs_and_grads(theirs, variables, images),
          ),
        ]
      )
    return list(zip(*results))

  actual, expected = both()
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('shape', 'kernel_size', 'features'), [CONVOLUTIONS[0], CONVOLUTIONS[-1]]
)
def test_the_convolution_in_bfloat16(shape, kernel_size, features):
  images = jax.random.normal(jax.random.key(0), shape)
  ours, theirs = pair_of(features, kernel_size, padding='SAME')

  @jit
  def both():
    variables = theirs.init(jax.random.key(1), images)
    # What is compared with is as exact as its rounded inputs.
    variables, rounded = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (variables, images)
    )
    half = ours.clone(dtype=jnp.bfloat16)
    return (
      outputs_and_grads(half, variables, rounded),
      outputs_and_grads(theirs, variables, rounded),
    )

  (output, grads), (exact, exact_grads) = both()
  assert output.dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
  for x, y in zip(
    jax.tree.leaves((output, grads)), jax.tree.leaves((exact, exact_grads))
  ):
    # A bfloat16 has a step of 2^-8, and each is a sum of up to 60 terms of
    # about 1, which may cancel.
    scale = max(float(jnp.sqrt(jnp.mean(y**2))), 1.0)
    np.testing.assert_allclose(x.astype(jnp.float32), y, 0.02, 0.02 * scale)


@pytest.mark.parametrize('channels', [1, 3, 16])
def test_the_convolution_of_a_population(channels):
  # Kernels of its members, images shared or not.
  images = jax.random.normal(jax.random.key(0), (3, 2, 6, 6, channels))
  ours, theirs = pair_of(4, (3, 3))

  @jit
  def both():
    keys = jax.random.split(jax.random.key(1), 3)
    variables = jax.vmap(lambda key: theirs.init(key, images[0]))(keys)
    results = []
    for conv in (ours, theirs):
      mapped = functools.partial(outputs_and_grads, conv)
      results.append(
        (
          jax.vmap(mapped)(variables, images),
          jax.vmap(mapped, in_axes=(0, None))(variables, images[0]),
        )
      )
    return results

  chex.assert_trees_all_close(*both(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_the_platform_is_not_asked(name, platform, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: platform)
  model = models.create(name)
  assert model.batch_last
  images = jnp.zeros((2, 28, 28, 1))
  traced = jax.make_jaxpr(model.init)(jax.random.key(0), images)
  assert 'conv_general_dilated[' not in str(traced)


@pytest.mark.parametrize('name', CONVOLUTIONAL)
def test_with_the_channels_last_all_is_the_same(params, trained, name):
  """Values, gradients and parameters; four programs compile, for up to 10 s."""
  variables = {'params': params} if name == 'lenet5' else trained
  images = jnp.linspace(0, 1, 2 * 28 * 28).reshape(2, 28, 28, 1)
  images = images if name == 'lenet5' else vgg_images()

  def outputs(batch_last):
    model = models.create(name, batch_last=batch_last)
    if name == 'vgg':  # What is dropped is drawn for another order of axes.
      model = model.clone(dropout=(0.0, 0.0, 0.0))

    def weighted(variables, images):
      logits, changed = model.apply(
        variables, images, train=True, mutable=['batch_stats']
      )
      weights = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32))
      total = jnp.sum(logits * weights.reshape(logits.shape))
      return total, (logits, changed)

    grad = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
    traced = jax.make_jaxpr(model.apply)(variables, images)
    return (
      str(traced).count('conv_general_dilated['),
      jit(model.init)(jax.random.key(0), images),
      jit(lambda *x: (model.apply(*x), grad(*x)))(variables, images),
    )

  (ours, *actual), (theirs, *expected) = outputs(True), outputs(False)
  assert (ours, theirs) == (0, {'lenet5': 2, 'vgg': 6}[name])
  chex.assert_trees_all_equal(actual[0], expected[0])
  chex.assert_trees_all_equal_shapes_and_dtypes(actual[1], expected[1])
  for x, y in zip(*map(jax.tree.leaves, (actual[1], expected[1]))):
    scale = float(jnp.abs(y).max())
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * scale)
