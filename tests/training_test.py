"""The compiled epoch: devices, members, batches, evaluation."""

import collections
import functools

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
import mopt
from mopt.training import Config
from mopt.training import Dataset
from mopt.training import load_dataset
from mopt.training.batches import steps_per_epoch
from mopt.training.config import OPTIMIZERS
from mopt.training.data import Split
from mopt.training.epoch import check_fit
from mopt.training.epoch import make_program


class Tiny(nn.Module):
  """Layers named as LeNet-5's, at a tenth of its compilation time."""

  @nn.compact
  def __call__(self, images, train=False):
    del train
    x = nn.Conv(3, (3, 3), padding='VALID', name='conv1')(images[:, ::4, ::4])
    x = nn.relu(x).reshape(len(images), -1)
    for name, features in (('layer1', 24), ('layer2', 16)):
      x = nn.relu(nn.Dense(features, name=name)(x))
    return nn.Dense(10, name='layer3')(x)


def _take(split, n):
  return Split(split.images[:n], split.labels[:n])


@pytest.fixture(scope='module')
def digits():
  """20 batches of 32 real digits, and odd numbers to evaluate on."""
  data = load_dataset('mnist5k')
  return data._replace(
    train=_take(data.train, 640),
    val=_take(data.val, 77),
    test=_take(data.test, 101),
  )


def _config(**kwargs):
  return Config(**({'l1': (1e-3,), 'epochs': 4} | kwargs))


def _program(config, data, num_devices=1, model=None):
  return make_program(
    config, model or Tiny(), data, jax.devices()[:num_devices]
  )


def _epochs(config, data, num_devices=1, epochs=1, model=None):
  program = _program(config, data, num_devices, model)
  state = program.prune(program.init())
  for number in range(epochs):
    state, metrics = program.epoch(state, number)
  return program, jax.device_get(state), jax.device_get(metrics)


def _dense(params):
  return [params[f'layer{i}']['kernel'] for i in (1, 2, 3)]


def _optimizer_config(optimizer, **kwargs):
  l1 = None if optimizer in ('smgd', 'mrmsprop', 'madam') else (1e-3,)
  return _config(optimizer=optimizer, l1=l1, **kwargs)


# The others: tests/contract_test.py.
@pytest.mark.parametrize('optimizer', ['adam', 'smgd', 'madam'])
@pytest.mark.slow
def test_four_devices_equal_one(digits, optimizer):
  config = _optimizer_config(optimizer)
  model = models.create('lenet5') if optimizer == 'madam' else Tiny()
  _, one, metrics_one = _epochs(config, digits, 1, model=model)
  _, four, metrics_four = _epochs(config, digits, 4, model=model)
  for a, b in zip(_dense(one.params), _dense(four.params)):
    # A weight may fall on the other side of the threshold only if it is there.
    differ = (a == 0) != (b == 0)
    magnitude = np.maximum(np.abs(a), np.abs(b))[differ]
    np.testing.assert_allclose(magnitude, config.threshold, atol=1e-6)
    same = ~differ
    np.testing.assert_allclose(a[same], b[same], rtol=1e-5, atol=2e-6)
  chex.assert_trees_all_close(metrics_one, metrics_four, rtol=1e-4, atol=1e-5)


def test_a_batch_need_not_divide_by_the_devices(digits):
  # Nor the examples by the batch, 640 = 23 * 27 + 19.
  config = _config(optimizer='sgd', batch_size=27)
  _, one, metrics_one = _epochs(config, digits, 1)
  _, several, metrics_several = _epochs(config, digits, 4)
  chex.assert_trees_all_close(one.params, several.params, atol=5e-6)
  chex.assert_trees_all_close(metrics_one, metrics_several, rtol=1e-4)


def test_an_epoch_is_the_loop_one_would_write(digits):
  """One member against plain Optax, batch by batch, partial batch included."""
  config = _config(batch_size=100, l1=(1e-3,), seed=(5,))
  data = digits._replace(train=_take(digits.train, 250))
  program = _program(config, data)
  state = program.prune(program.init())
  params = jax.tree.map(lambda x: x[0, 0], state.params)
  state, metrics = program.epoch(state, 0)

  key = jax.random.fold_in(jax.random.key(5), 1)
  order = jax.random.permutation(jax.random.split(key)[0], 250)
  # The rate of the logistic drop over 4 epochs, in the first one.
  rate = 1e-3 - 9e-4 / (1 + np.exp(-(1 - 3) / 0.3))
  tx = optax.adam(rate)
  opt_state = tx.init(params)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params, images, labels):
    logits = Tiny().apply({'params': params}, images)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    conv = jnp.sum(params['conv1']['kernel'] ** 2)
    # sign(w), not the derivative of jnp.abs: pruned weights stay at rest.
    l1 = sum(
      jnp.sum(w * jax.lax.stop_gradient(jnp.sign(w))) for w in _dense(params)
    )
    return ce.mean() + 1e-4 * conv + 1e-3 * l1, ce.mean()

  losses = []
  for chosen in (order[:100], order[100:200], order[200:]):
    images = data.train.images[chosen] / np.float32(255)
    (_, ce), grads = loss(params, images, data.train.labels[chosen])
    losses.append((float(ce), len(chosen)))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    for layer in ('layer1', 'layer2', 'layer3'):
      kernel = params[layer]['kernel']
      params[layer]['kernel'] = jnp.where(jnp.abs(kernel) < 1e-3, 0, kernel)

  trained = jax.tree.map(lambda x: x[0, 0], state.params)
  chex.assert_trees_all_close(trained, params, atol=5e-6)
  mean = sum(ce * n for ce, n in losses) / 250
  np.testing.assert_allclose(metrics.ce[0, 0], mean, rtol=1e-5)


@pytest.mark.parametrize('optimizer', ['adam', 'madam'])
def test_a_member_equals_the_same_run_alone(digits, optimizer):
  l1 = None if optimizer == 'madam' else (1e-4, 3e-3)
  config = _config(optimizer=optimizer, l1=l1, seed=(0, 7))
  _, population, _ = _epochs(config, digits)
  alone_l1 = None if optimizer == 'madam' else (3e-3,)
  alone = _config(optimizer=optimizer, l1=alone_l1, seed=(7,))
  _, single, _ = _epochs(alone, digits)
  member = jax.tree.map(lambda x: x[1, -1], population.params)
  single = jax.tree.map(lambda x: x[0, 0], single.params)
  chex.assert_trees_all_close(member, single, atol=1e-5)


def test_members_differ_by_seed_and_weight(digits):
  _, state, metrics = _epochs(_config(l1=(1e-5, 1e-2), seed=(0, 1)), digits)
  kernel = state.params['layer1']['kernel']
  assert kernel.shape == (2, 2, 75, 24)
  nonzeros = (kernel != 0).sum(axis=(2, 3))
  assert (nonzeros[:, 0] > nonzeros[:, 1]).all()
  assert not np.array_equal(kernel[0, 0], kernel[1, 0])
  np.testing.assert_allclose(metrics.weight_2, [[1e-5, 1e-2]] * 2, rtol=1e-6)


def test_a_run_compiles_each_function_once(digits):
  program = _program(_config(), digits, num_devices=4)
  state = program.prune(program.init())
  state, _ = program.epoch(state, 0)
  program.evaluate(state, 'val')
  events = collections.Counter()

  def listener(event, duration, **kwargs):
    del duration, kwargs
    events[event] += 1

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for number in (1, 2):
      state, _ = program.epoch(state, number)
      program.evaluate(state, 'val')
    assert events['/jax/core/compile/backend_compile_duration'] == 0
    # The listener does hear of a compilation.
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(17)).block_until_ready()
    assert events['/jax/core/compile/backend_compile_duration'] > 0
  finally:
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('num_devices', [1, 4])
def test_evaluation_is_exact_for_any_size(digits, split, num_devices):
  config = _config(l1=(1e-3, 1e-4))
  program = _program(config, digits, num_devices)
  state = program.prune(program.init())
  params = state.params
  found = program.evaluate(state, split)
  examples = getattr(digits, split)
  logits = Tiny().apply(
    {'params': jax.tree.map(lambda x: x[0, 1], params)},
    examples.images / np.float32(255),
  )
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(axis=1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  ce = -log_probs[np.arange(len(logits)), examples.labels].mean()
  accuracy = (logits.argmax(axis=1) == examples.labels).mean()
  np.testing.assert_allclose(found.ce[0, 1], ce, rtol=1e-5)
  np.testing.assert_allclose(found.accuracy[0, 1], accuracy, rtol=1e-6)


def test_without_validation_examples_there_is_no_validation(digits):
  empty = digits._replace(val=_take(digits.val, 0))
  program = _program(_config(), empty)
  assert np.isnan(program.evaluate(program.init(), 'val').ce).all()


@pytest.mark.parametrize('strategy', ['none', 'after', 'epoch', 'batch'])
def test_pruning_strategies(digits, strategy):
  config = _config(prune=strategy)
  program = _program(config, digits)

  def small(params):
    return sum(int(((w != 0) & (abs(w) < 1e-3)).sum()) for w in _dense(params))

  state = program.prune(program.init())
  assert (small(state.params) > 0) == (strategy == 'none')
  state, _ = program.epoch(state, 0)
  during = strategy in ('epoch', 'batch')
  assert (small(state.params) == 0) == during
  params = program.prune(state).params
  assert (small(params) == 0) == (strategy != 'none')
  zeros = [w[w == 0] for w in map(np.asarray, _dense(params))]
  assert not any(np.signbit(z).any() for z in zeros)
  # Biases and convolutions are nobody's to prune.
  assert (np.asarray(params['conv1']['kernel']) != 0).all()


def test_the_last_batch_is_kept_or_dropped():
  assert steps_per_epoch(_config(batch_size=32), 65) == 3
  assert steps_per_epoch(_config(batch_size=32, drop_remainder=True), 65) == 2
  with pytest.raises(
    ValueError, match='batch_size=66: expected at most the 65'
  ):
    steps_per_epoch(_config(batch_size=66), 65)


def test_a_network_that_cannot_take_the_pictures_is_refused():
  tiny = Split(np.zeros((64, 8, 8, 1), np.uint8), np.zeros(64, np.int32))
  data = Dataset('tiny', 10, tiny, tiny, tiny, 0.0, 255.0)
  with pytest.raises(ValueError, match=r'lenet5 needs images .* 10 x 10'):
    check_fit(_config(), models.create('lenet5'), data)


@pytest.mark.parametrize('scalarization', ['penalty', 'convex'])
def test_scalarizations_weigh_as_their_equations(digits, scalarization):
  config = _config(l1=(0.25,), scalarization=scalarization)
  _, _, metrics = _epochs(config, digits)
  expected = 1.0 if scalarization == 'penalty' else 0.75
  np.testing.assert_allclose(metrics.weight_1, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics.weight_2, 0.25, rtol=1e-6)


def test_logged_norms_cosine_and_weights_belong_together(digits):
  """With one step an epoch the means are the step's: (15) can be checked."""
  config = _config(optimizer='smgd', l1=None, batch_size=640)
  _, _, metrics = _epochs(config, digits)
  g1, g2, cosine, w1, w2 = (
    np.float64(getattr(metrics, name)[0, 0])
    for name in (
      'grad_norm_1',
      'grad_norm_2',
      'cosine',
      'weight_1',
      'weight_2',
    )
  )
  product = cosine * g1 * g2
  expected = (g1**2 - product) / (g1**2 - 2 * product + g2**2)
  np.testing.assert_allclose(w2, expected, rtol=1e-4)
  np.testing.assert_allclose(w1 + w2, 1, rtol=1e-6)
  # The l1 gradient is a sign for every dense weight that is not zero.
  program = _program(config, digits)
  start = mopt.count_nonzero(
    jax.tree.map(lambda x: x[0, 0], program.prune(program.init()).params),
    mopt.dense_kernels,
  )
  np.testing.assert_allclose(g2**2, int(start.total), rtol=1e-5)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.slow
def test_every_optimizer_learns_real_digits(optimizer):
  """Shortened to 8 epochs, and to 12 for SGD, which prunes more slowly."""
  data = load_dataset('mnist5k')
  epochs = 12 if optimizer == 'sgd' else 8
  config = _optimizer_config(optimizer, epochs=epochs)
  program, state, metrics = _epochs(
    config, data, epochs=epochs, model=models.create('lenet5')
  )
  assert np.isfinite(metrics.ce).all()
  score = program.evaluate(state, 'val')
  assert score.accuracy[0, 0] >= 0.9
  nonzeros = sum(int((w != 0).sum()) for w in _dense(state.params))
  print(f'{optimizer}: {nonzeros} of 58,920 dense weights are not zero')
  if not config.is_multiobjective:
    assert nonzeros < 0.3 * 58_920
