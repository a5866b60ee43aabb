"""How a network is called, and which are refused before training."""

import functools
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from mopt import training
from mopt.training import calls
from mopt.training import network
from mopt.training.data import Dataset
from mopt.training.data import Split
from tests.networks import Normed

KEY = jax.random.key(0)
IMAGES = jnp.linspace(0, 1, 2 * 8 * 8).reshape(2, 8, 8, 1)


def dense(module, images, scale: Any = 1.0):
  x = images.reshape(len(images), -1)
  return module.param('kernel', nn.initializers.ones, (64, 10)).sum() + (
    jnp.zeros((len(images), 10)) + scale * x.sum()
  )


class Plain(nn.Module):
  @nn.compact
  def __call__(self, images):
    return dense(self, images)


class Telling(nn.Module):
  """Twice as much in training; training is what it takes for granted."""

  @nn.compact
  def __call__(self, images, train=True):
    return dense(self, images, 2 if train else 1)


class Asking(nn.Module):
  @nn.compact
  def __call__(self, images, *, train):
    return dense(self, images, 2 if train else 1)


class Anything(nn.Module):
  @nn.compact
  def __call__(self, images, **kwargs):
    assert set(kwargs) == {'train'}
    return dense(self, images, 2 if kwargs['train'] else 1)


class PlainNNX(nnx.Module):
  def __init__(self, *, rngs):
    self.kernel = nnx.Param(jnp.ones((64, 10)))

  def __call__(self, images):
    return jnp.zeros((len(images), 10)) + images.sum() + self.kernel.sum()


class TellingNNX(PlainNNX):
  def __call__(self, images, train=True):
    return super().__call__(images * (2 if train else 1))


@pytest.mark.parametrize(
  ('model', 'is_told'),
  [
    (Plain(), False),
    (Telling(), True),
    (Asking(), True),
    (Anything(), True),
    (nn.Sequential([Plain(), nn.relu]), False),
    (nn.Sequential([lambda x: x, Plain()]), False),
    (nn.Sequential([Telling(), nn.relu]), True),
    (nn.remat(Plain)(), False),
    (nnx.bridge.to_linen(PlainNNX), False),
    (nnx.bridge.to_linen(TellingNNX), True),
  ],
)
def test_train_is_for_those_that_take_it(model, is_told):
  variables = calls.init(model, KEY, IMAGES)
  kernels = 64 * 10
  once = float(IMAGES.sum())
  logits = calls.predict(model, IMAGES, variables)
  np.testing.assert_allclose(logits, kernels + once, rtol=1e-6)
  logits, state = calls.train(model, KEY, IMAGES, variables)
  expected = kernels + (2 if is_told else 1) * once
  np.testing.assert_allclose(logits, expected, rtol=1e-6)
  assert state == {}


@pytest.mark.parametrize('name', models.NAMES)
def test_networks_begin_as_flax_has_them(name):
  model = models.create(name)
  images = jnp.zeros((1, 28, 28, 1))
  init = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  ours = init(functools.partial(calls.init, model))(KEY, images)
  theirs = init(model.init)(KEY, images)
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    np.testing.assert_array_equal(x, y)


def dataset(num_classes=10):
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
  split = Split(images, np.arange(40, dtype=np.int32) % num_classes)
  return Dataset('small', num_classes, split, split, split, 0.0, 255.0)


class Boxed(nn.Module):
  """Parameters in boxes, which say over what they may be partitioned."""

  @nn.compact
  def __call__(self, images):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'x'))
    x = images.reshape(len(images), -1)
    return nn.Dense(10, kernel_init=init, name='layer1')(x)


def test_boxes_are_for_the_network_and_not_for_files(tmp_path):
  """Trains and compiles: 3 s."""
  data, model = dataset(), Boxed()
  config = training.Config(l1=(0.0,), epochs=1, model='boxes:Boxed')
  training.run(training.Job(config, model, data, tmp_path))
  net = training.load(tmp_path / 'members' / 'l1_0_seed_0.npz')
  assert net.model == 'boxes:Boxed'
  shapes = jax.tree.map(np.shape, net.params)
  assert shapes == {'layer1': {'kernel': (64, 10), 'bias': (10,)}}
  pictures = data.test.images
  logits = model.apply(net.variables, net.preprocess(pictures))
  x = pictures.reshape(40, 64) / 255
  x = x @ net.params['layer1']['kernel'] + net.params['layer1']['bias']
  np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-5)


def test_a_batch_split_over_devices_has_statistics_of_the_whole():
  """Of NNX, whose field is an argument of its class."""

  class Net(nnx.Module):
    def __init__(self, *, rngs, axis_name=None):
      self.norm = nnx.BatchNorm(1, axis_name=axis_name, rngs=rngs)

    def __call__(self, images, train=False):
      return self.norm(images, use_running_average=not train)

  model = nnx.bridge.to_linen(Net, axis_name=None)
  assert calls.over_axis(model, None).kwargs['axis_name'] is None
  variables = calls.init(model, KEY, IMAGES)
  split = jax.vmap(
    functools.partial(
      calls.train, calls.over_axis(model, 'devices'), KEY, variables=variables
    ),
    axis_name='devices',
  )
  logits, state = split(inputs=IMAGES[:, None])
  x = np.asarray(IMAGES)
  expected = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
  np.testing.assert_allclose(logits[:, 0], expected, rtol=1e-4, atol=1e-5)
  mean = state['batch_stats']['norm']['mean']
  np.testing.assert_allclose(mean.ravel(), 0.01 * x.mean(), rtol=1e-5)
  # Those without the field stay as they are; those of linen are cloned.
  without = nnx.bridge.to_linen(PlainNNX)
  assert calls.over_axis(without, 'devices') is without
  assert calls.over_axis(Plain(), 'devices') == Plain()
  assert calls.over_axis(Normed(), 'devices').axis_name == 'devices'


class Faulty(nn.Module):
  """Wrong in one way."""

  how: str

  @nn.compact
  def __call__(self, images, train=False):
    layer = nn.Dense(10, name='layer1')
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    if self.how == 'only alone':
      return layer(images.reshape(1, -1)[:, :64])
    logits = layer(images.reshape(len(images), -1))
    if self.how == 'two outputs':
      return logits, logits
    if self.how == 'counter':
      self.variable('state', 'steps', jnp.zeros, (), jnp.int32)
    if self.how == 'half':
      self.param('scale', nn.initializers.ones, (), jnp.bfloat16)
    if self.how == 'list':
      self.param('scales', lambda key: [jnp.ones(2), jnp.ones(3)])
    if self.how == 'growing':
      memory = self.variable('state', 'memory', zeros, (1, 4))
      if train:
        memory.value = zeros((2, 4))
    if self.how == 'noise' and train:
      logits += jax.random.normal(self.make_rng('noise'), logits.shape)
    if self.how == 'pictures':
      return nn.Conv(10, (9, 9), padding='VALID')(images)[:, 0, 0]
    if self.how == 'raises':
      raise KeyError('a\nb')
    return logits


@pytest.mark.parametrize(
  ('how', 'said'),
  [
    (
      'only alone',
      'dataset=small: expected logits [batch, 10] for as many classes, got '
      'shape (1, 10) for 2 pictures.',
    ),
    (
      'two outputs',
      'dataset=small: expected logits [batch, 10] for as many classes, got '
      'tuple for one picture.',
    ),
    (
      'counter',
      'model=my:net: expected float32 in state/steps, a variable of the '
      'network, got int32.',
    ),
    (
      'half',
      'model=my:net: expected float32 in params/scale, a variable of the '
      'network, got bfloat16.',
    ),
    (
      'list',
      'model=my:net: expected nothing but dictionaries around arrays in '
      'params/scales/0, a variable of the network, got '
      "['params']['scales'][0].",
    ),
    (
      'growing',
      'model=my:net: expected a step of training to keep the shapes of what is '
      'no parameter; it changes state/memory float32[1, 4].',
    ),
    (
      'raises',
      'model=my:net: expected a network for inputs [batch, 8, 8, 1], got '
      r"KeyError: 'a\nb'",
    ),
  ],
)
def test_what_cannot_be_trained_is_refused(how, said):
  with pytest.raises(ValueError) as error:
    calls.check('my:net', Faulty(how), dataset())
  assert str(error.value) == said


def test_reasons_of_flax_take_one_line():
  start = 'model=my:net: expected a network for inputs [batch, 8, 8, 1]'
  for how, said in [
    ('noise', ' in training, got InvalidRngError: '),
    ('pictures', ', got '),
  ]:
    with pytest.raises(ValueError) as error:
      calls.check('my:net', Faulty(how), dataset())
    message = str(error.value)
    assert message.startswith(start + said)
    assert '\n' not in message
    assert '  ' not in message


def test_a_network_that_fits_is_told_by_its_shapes():
  shapes = calls.check('my:net', Faulty('in no way'), dataset())
  assert jax.tree.map(lambda x: x.shape, shapes) == {
    'params': {'layer1': {'kernel': (64, 10), 'bias': (10,)}}
  }
  shapes = calls.check('vgg', models.create('vgg'), dataset())
  assert sorted(shapes) == ['batch_stats', 'params']
  assert shapes['params']['denselayer']['kernel'].shape == (128, 10)


def test_a_file_keeps_the_keys_of_its_network(tmp_path):
  """Numbers, as lists of layers of NNX have, and any collection."""
  variables = {
    'params': {
      'layers': {0: {'kernel': np.ones(2)}, 10: {'kernel': np.zeros(3)}},
      'a/b': {'0': np.full(4, 0.5)},
    },
    'memory': {'norm': np.arange(3.0)},
  }
  net = network.Network(variables, 'my:net', 10, (8, 8, 1), 0.0, 255.0)
  network.save(tmp_path / 'net.npz', net)
  loaded = training.load(tmp_path / 'net.npz')
  assert loaded._replace(variables={}) == net._replace(variables={})
  assert jax.tree.structure(loaded.variables) == jax.tree.structure(variables)
  for x, y in zip(*map(jax.tree.leaves, (loaded.variables, variables))):
    np.testing.assert_array_equal(x, y)
