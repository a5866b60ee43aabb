"""The compiled epoch: devices, members, batches, evaluation.

Most tests compile an epoch of their own or two, which takes 3 to 10 s; those
that take longer say why.
"""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
import mopt
from mopt.training import batches as batches_lib
from mopt.training import Config
from mopt.training import Dataset
from mopt.training import evaluation as evaluation_lib
from mopt.training import Job
from mopt.training import load_dataset
from mopt.training import optimizer as optimizer_lib
from mopt.training import program as program_lib
from mopt.training import run
from mopt.training import search
from mopt.training import step as step_lib
from mopt.training.augment import augment
from mopt.training.augment import Augmentation
from mopt.training.batches import steps_per_epoch
from mopt.training.config import OPTIMIZERS
from mopt.training.data import Split
from mopt.training.layout import make_layout
from mopt.training.program import check_fit
from mopt.training.program import make_program
from mopt.training.program import must_stream
from mopt.training.step import Metrics
from tests.devices import first_devices
from tests.networks import Convolutional
from tests.networks import Dropping
from tests.networks import Normed
from tests.networks import Tiny

pytestmark = pytest.mark.usefixtures('exact_products')


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
  # Spread members: tests/layout_test.py.
  defaults = {'l1': (1e-3,), 'epochs': 4, 'parallel': 'data'}
  return Config(**(defaults | kwargs))


def _program(config, data, num_devices=1, model=None):
  devices = first_devices(num_devices)
  return make_program(Job(config, model or Tiny(), data, devices=devices))


def _epochs(config, data, num_devices=1, epochs=1, model=None):
  program = _program(config, data, num_devices, model)
  state = program.prune(program.init())
  for number in range(epochs):
    state, metrics = program.epoch(state, number)
  return program, jax.device_get(state), jax.device_get(metrics)


def _first(state):
  """What the first device has: the others have the same."""
  for leaf in jax.tree.leaves(state):
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
  return jax.tree.map(lambda x: x[0], state)


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
  for a, b in zip(_dense(_first(one).params), _dense(_first(four).params)):
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
  chex.assert_trees_all_close(
    _first(one).params, _first(several).params, atol=5e-6
  )
  chex.assert_trees_all_close(metrics_one, metrics_several, rtol=1e-4)


def test_an_epoch_is_the_loop_one_would_write(digits):
  """One member against plain Optax, batch by batch, partial batch included."""
  config = _config(batch_size=100, l1=(1e-3,), seed=(5,))
  data = digits._replace(train=_take(digits.train, 250))
  program = _program(config, data)
  state = program.prune(program.init())
  params = jax.tree.map(lambda x: x[0, 0, 0], state.params)
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

  trained = jax.tree.map(lambda x: x[0, 0, 0], state.params)
  chex.assert_trees_all_close(trained, params, atol=5e-6)
  mean = sum(ce * n for ce, n in losses) / 250
  np.testing.assert_allclose(metrics.loss[0], mean, rtol=1e-5)


@pytest.mark.parametrize('optimizer', ['adam', 'madam'])
def test_a_member_equals_the_same_run_alone(digits, optimizer):
  l1 = None if optimizer == 'madam' else (1e-4, 3e-3)
  config = _config(optimizer=optimizer, l1=l1, seed=(0, 7))
  _, population, _ = _epochs(config, digits)
  alone_l1 = None if optimizer == 'madam' else (3e-3,)
  alone = _config(optimizer=optimizer, l1=alone_l1, seed=(7,))
  _, single, _ = _epochs(alone, digits)
  member = jax.tree.map(lambda x: x[0, 1, -1], population.params)
  single = jax.tree.map(lambda x: x[0, 0, 0], single.params)
  chex.assert_trees_all_close(member, single, atol=1e-5)


def test_members_differ_by_seed_and_weight(digits):
  _, state, metrics = _epochs(_config(l1=(1e-5, 1e-2), seed=(0, 1)), digits)
  kernel = state.params['layer1']['kernel'][0]
  assert kernel.shape == (2, 2, 75, 24)
  nonzeros = (kernel != 0).sum(axis=(2, 3))
  assert (nonzeros[:, 0] > nonzeros[:, 1]).all()
  assert not np.array_equal(kernel[0, 0], kernel[1, 0])
  np.testing.assert_allclose(metrics.weights[:, 1], [1e-5, 1e-2] * 2, rtol=1e-6)


@pytest.mark.parametrize('parallel', ['data', 'members'])
def test_a_run_compiles_each_function_once(digits, parallel):
  config = _config(parallel=parallel, l1=(1e-3, 1e-2), seed=(0, 1))
  program = _program(config, digits, 4, Dropping(0.2))
  assert len(program.layout.devices) == 4
  state = program.prune(program.init())
  state, _ = program.epoch(state, 0)
  program.evaluate(state, 'val')
  program.complexity(state)
  events = collections.Counter()

  def listener(event, duration, **kwargs):
    del duration, kwargs
    events[event] += 1

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for number in (1, 2):
      state, _ = program.epoch(state, number)
      program.evaluate(state, 'val')
      program.complexity(state)
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
    {'params': jax.tree.map(lambda x: x[0, 0, 1], params)},
    examples.images / np.float32(255),
  )
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(axis=1, keepdims=True)
  log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  ce = -log_probs[np.arange(len(logits)), examples.labels].mean()
  accuracy = (logits.argmax(axis=1) == examples.labels).mean()
  np.testing.assert_allclose(found.loss[1], ce, rtol=1e-5)
  np.testing.assert_allclose(found.score[1], accuracy, rtol=1e-6)


def test_without_validation_examples_there_is_no_validation(digits):
  empty = digits._replace(val=_take(digits.val, 0))
  program = _program(_config(), empty)
  assert np.isnan(program.evaluate(program.init(), 'val').loss).all()


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


@pytest.mark.parametrize('optimizer', ['adam', 'madam'])
@pytest.mark.parametrize('in_both', [False, True])
def test_a_network_without_convolutions_has_no_l2_of_them(
  digits, optimizer, in_both
):
  config = _optimizer_config(optimizer, conv_l2=1e3, conv_l2_in_both=in_both)
  data = digits._replace(train=_take(digits.train, 64))
  check_fit(config, Dropping(0.0), data)
  program, state, metrics = _epochs(config, data, model=Dropping(0.0))
  # Objectives are means over two batches of one size, as is that of the error.
  error, norm = metrics.values.T
  np.testing.assert_allclose(error, metrics.loss, rtol=1e-6)
  # As it is after them, and not 1000 times any square.
  after = program.complexity(state).values['l1']
  np.testing.assert_allclose(norm, after, rtol=0.2)


def test_a_network_without_dense_layers_is_refused(digits):
  with pytest.raises(ValueError) as error:
    check_fit(_config(), Convolutional(), digits)
  assert str(error.value) == (
    'prunable=dense: expected a dense layer, a leaf named kernel with two '
    'axes, to penalise, prune and count the weights of; the leaves of the '
    'network are conv1/bias, conv1/kernel, conv2/bias, conv2/kernel.'
  )


@pytest.mark.parametrize('start', [run, search])
@pytest.mark.parametrize('kind', ['labels', 'logits', 'nothing to select on'])
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
  digits, tmp_path, start, kind
):
  data = digits
  if kind == 'labels':
    hidden = np.full_like(data.test.labels, -1)
    data = data._replace(test=data.test._replace(labels=hidden))
    message = (
      r'dataset=mnist5k: expected labels 0 to 9 in the split test, got -1'
    )
  elif kind == 'logits':
    data = data._replace(num_classes=11)
    message = (
      r'dataset=mnist5k: expected logits \[batch, 11\] for as many classes, '
      r'got shape \(1, 10\) for one picture\.'
    )
  else:
    data = data._replace(test=_take(data.test, 0))
    message = 'dataset=mnist5k: expected examples in the split test, got none'
  config = _config(
    l1=None if start is search else (0.0,),
    search='grid' if start is search else 'none',
    select_on='test' if kind == 'nothing to select on' else 'val',
  )
  with pytest.raises(ValueError, match=message):
    start(Job(config, Tiny(), data, tmp_path))
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('scalarization', ['penalty', 'convex'])
def test_scalarizations_weigh_as_their_equations(digits, scalarization):
  config = _config(l1=(0.25,), scalarization=scalarization)
  _, _, metrics = _epochs(config, digits)
  expected = [[1.0 if scalarization == 'penalty' else 0.75, 0.25]]
  np.testing.assert_allclose(metrics.weights, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics.weights_min, expected, rtol=1e-6)
  np.testing.assert_allclose(metrics.weights_max, expected, rtol=1e-6)


def test_logged_norms_cosine_and_weights_belong_together(digits):
  """With one step an epoch the means are the step's: (15) can be checked."""
  config = _config(optimizer='smgd', l1=None, batch_size=640)
  _, _, metrics = _epochs(config, digits)
  ((g1, g2),) = metrics.grad_norms.astype(np.float64)
  ((cosine,),) = metrics.cosines.astype(np.float64)
  ((w1, w2),) = metrics.weights.astype(np.float64)
  product = cosine * g1 * g2
  expected = (g1**2 - product) / (g1**2 - 2 * product + g2**2)
  np.testing.assert_allclose(w2, expected, rtol=1e-4)
  np.testing.assert_allclose(w1 + w2, 1, rtol=1e-6)
  # The l1 gradient is a sign for every dense weight that is not zero.
  program = _program(config, digits)
  start = mopt.count_nonzero(
    jax.tree.map(lambda x: x[0, 0, 0], program.prune(program.init()).params),
    mopt.dense_kernels,
  )
  np.testing.assert_allclose(g2**2, int(start.total), rtol=1e-5)


def test_batch_statistics_do_not_depend_on_the_devices(digits):
  # 630 = 19 * 32 + 22: the last batch is filled up alike everywhere.
  data = digits._replace(train=_take(digits.train, 630))
  # Plain SGD: Adam would blow up the rounding of small gradients.
  config = _config(optimizer='sgd', prune='after')
  _, one, metrics_one = _epochs(config, data, 1, model=Normed())
  _, four, metrics_four = _epochs(config, data, 4, model=Normed())
  one, four = _first(one), _first(four)
  chex.assert_trees_all_close(one.params, four.params, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(
    one.model_state, four.model_state, rtol=1e-4, atol=1e-6
  )
  chex.assert_trees_all_close(metrics_one, metrics_four, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_the_whole_batch(digits):
  data = digits._replace(train=_take(digits.train, 64))
  config = _config(batch_size=64)
  program = _program(config, data, 4, Normed())
  state = program.prune(program.init())
  conv = jax.tree.map(lambda x: np.asarray(x[0, 0, 0]), state.params['conv1'])
  state, _ = program.epoch(state, 0)
  x = data.train.images[:, ::4, ::4] / np.float32(255)
  x = jax.lax.conv_general_dilated(
    x,
    conv['kernel'],
    (1, 1),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  x = np.asarray(x, np.float64) + conv['bias']
  x = np.where(x > 0, x, np.expm1(x))
  stats = jax.tree.map(lambda x: x[0, 0, 0], state.model_state['batch_stats'])
  expected = {
    'mean': 0.1 * x.mean(axis=(0, 1, 2)),
    'var': 0.9 + 0.1 * x.var(axis=(0, 1, 2)),
  }
  chex.assert_trees_all_close(stats['norm1'], expected, rtol=1e-5, atol=1e-6)
  # The mean of what four devices see has another variance.
  shares = x[:64].reshape(4, 16, -1, 3).var(axis=(1, 2)).mean(axis=0)
  assert (abs(0.9 + 0.1 * shares - expected['var']) > 1e-5).any()


def test_evaluation_uses_the_running_statistics(digits):
  model = Normed(dropout=0.5)
  program = _program(_config(l1=(1e-3, 1e-4)), digits, 4, model)
  state = program.init()
  random = np.random.default_rng(0)
  stats = jax.tree.map(
    lambda x: random.uniform(0.5, 2, x.shape).astype(x.dtype),
    state.model_state,
  )
  found = program.evaluate(state._replace(model_state=stats), 'test')
  member = jax.tree.map(lambda x: x[0, 0, 1], {'params': state.params, **stats})
  logits = model.apply(member, digits.test.images / np.float32(255))
  ce = optax.softmax_cross_entropy_with_integer_labels(
    logits, digits.test.labels
  )
  np.testing.assert_allclose(found.loss[1], ce.mean(), rtol=1e-5)


# 8 steps in parts of 4 and 4, and of 3, 3 and 2.
@pytest.mark.parametrize(('num_devices', 'length'), [(1, 4), (4, 3)])
@pytest.mark.slow
def test_a_streamed_epoch_equals_a_resident_one(
  digits, num_devices, length, monkeypatch
):
  monkeypatch.setattr(batches_lib, '_STEPS', length)
  data = digits._replace(train=_take(digits.train, 250))
  runs = []
  for streamed in (False, True):
    config = _config(stream=streamed, seed=(0, 1))
    model = Normed(dropout=0.2)
    runs.append(_epochs(config, data, num_devices, epochs=2, model=model)[1:])
  chex.assert_trees_all_close(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('num_devices', [1, 4])
def test_a_streamed_evaluation_equals_a_resident_one(
  digits, num_devices, monkeypatch
):
  # 101 examples in parts of 50, 50 and 1.
  monkeypatch.setattr(evaluation_lib, '_STREAMED', 50)
  sizes = []
  batches = evaluation_lib._batches
  monkeypatch.setattr(
    evaluation_lib,
    '_batches',
    lambda size, *args: sizes.append(size) or batches(size, *args),
  )
  scores = []
  for streamed in (False, True):
    config = _config(stream=streamed, l1=(1e-3, 1e-2), seed=(0, 1))
    program = _program(config, digits, num_devices)
    scores.append(program.evaluate(program.init(), 'test'))
  assert sizes == [101, 50, 50, 1]
  chex.assert_trees_all_close(*scores, rtol=1e-6)
  assert scores[1].loss.shape == (4,)


def test_a_streamed_run_without_validation_examples(digits):
  empty = digits._replace(val=_take(digits.val, 0))
  program = _program(_config(stream=True), empty)
  assert np.isnan(program.evaluate(program.init(), 'val').loss).all()


class _Device:
  """What says how much memory it has."""

  def __init__(self, stats):
    self.memory_stats = lambda: stats


def test_data_are_streamed_if_they_fill_half_of_the_memory(digits):
  # Labels, too: those of an autoencoder are as large as its pictures.
  splits = digits.train, digits.val, digits.test
  size = sum(x.images.nbytes + x.labels.nbytes for x in splits)
  enough = _Device({'bytes_limit': 2 * size})
  little = _Device({'bytes_limit': 2 * size - 2})
  assert not must_stream(_config(), digits, [enough])
  assert must_stream(_config(), digits, [little])
  # CPUs do not say.
  for stats in (None, {}, {'bytes_in_use': 7}):
    assert not must_stream(_config(), digits, [_Device(stats)])
  assert not must_stream(_config(), digits, jax.devices())
  # What the user wants goes first.
  assert must_stream(_config(stream=True), digits, [enough])
  assert not must_stream(_config(stream=False), digits, [little])


_MOVED = dict(rotation=15.0, shift=0.1, flip=True)


@pytest.mark.slow
def test_the_seed_alone_decides_augmentation_and_dropout(digits):
  data = digits._replace(train=_take(digits.train, 128))
  # A weight so small that it is lost when gradients are added.
  config = _config(l1=(0.0, 1e-30), seed=(0, 1), **_MOVED)
  program = _program(config, data, 2, Normed(dropout=0.3))
  runs = []
  for _ in range(2):
    state, metrics = program.epoch(program.init(), 0)
    runs.append(jax.device_get((state, metrics)))
  chex.assert_trees_all_equal(*runs)
  state, metrics = runs[0]
  first = jax.tree.map(lambda x: x[:, :, 0], (state.params, state.model_state))
  second = jax.tree.map(lambda x: x[:, :, 1], (state.params, state.model_state))
  chex.assert_trees_all_equal(first, second)
  assert abs(metrics.loss[0] - metrics.loss[2]) > 1e-3


@pytest.mark.parametrize(('num_steps', 'num_devices'), [(4, 1), (1, 4)])
def test_dropout_differs_between_steps_devices_and_epochs(
  num_steps, num_devices
):
  """What drops in all of them is left where it was.

  784 pixels are dropped at a rate of .5, each time for a single picture.
  """
  white = Split(np.full((4, 28, 28, 1), 255, np.uint8), np.arange(4))
  data = Dataset('white', 10, white, white, white, 0.0, 255.0)
  config = _config(
    optimizer='sgd',
    momentum=0.0,
    l1=(0.0,),
    prune='none',
    batch_size=4 // num_steps,
  )
  program = _program(config, data, num_devices, Dropping(0.5))
  state = program.init()
  before = np.asarray(state.params['layer1']['kernel'])
  state, _ = program.epoch(state, 0)
  unchanged = (state.params['layer1']['kernel'] == before).all(axis=-1)
  # Four times, then eight; within four standard errors.
  assert unchanged.mean() == pytest.approx(0.5**4, abs=0.035)
  state, _ = program.epoch(state, 1)
  unchanged = (state.params['layer1']['kernel'] == before).all(axis=-1)
  assert unchanged.mean() == pytest.approx(0.5**8, abs=0.009)


def test_pictures_are_augmented_in_training_only(digits):
  """One step of the second seed; it starts from the pixels as they are."""
  data = digits._replace(train=_take(digits.train, 32), mean=30.0, std=70.0)
  config = _config(seed=(3, 5), **_MOVED)
  program = _program(config, data, model=Dropping(0.0))
  state = program.init()
  params = jax.tree.map(lambda x: x[0, 1, 0], state.params)

  def loss(images, labels):
    logits = Dropping(0.0).apply({'params': params}, (images - 30) / 70)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  images = data.train.images.astype(np.float32)
  score = program.evaluate(state, 'train').loss[1]
  np.testing.assert_allclose(score, loss(images, data.train.labels), rtol=1e-5)

  _, metrics = program.epoch(state, 0)
  order_key, noise = jax.random.split(jax.random.fold_in(jax.random.key(5), 1))
  order = jax.random.permutation(order_key, 32)
  step_key = jax.random.fold_in(jax.random.fold_in(noise, 0), 0)
  key, _ = jax.random.split(step_key)
  move = jax.jit(
    functools.partial(augment, augmentation=Augmentation(**_MOVED))
  )
  moved = move(key, data.train.images[order])
  expected = loss(moved, data.train.labels[order])
  np.testing.assert_allclose(metrics.loss[1], expected, rtol=1e-4)
  assert abs(expected - score) > 0.01


def test_the_l2_of_convolutions_can_be_in_both_goals(digits):
  """One step of plain SGD; by default it is in the first goal only."""
  conv_l2, rate, l1 = 0.01, 0.5, 0.25
  steps = []
  for kwargs in ({}, {'conv_l2_in_both': True}):
    config = _config(
      optimizer='sgd',
      momentum=0.0,
      schedule='constant',
      learning_rate=rate,
      l1=(l1,),
      prune='none',
      batch_size=640,
      conv_l2=conv_l2,
      **kwargs,
    )
    program = _program(config, digits)
    state = program.init()
    start = jax.tree.map(lambda x: np.asarray(x[0, 0, 0]), state.params)
    state, metrics = program.epoch(state, 0)
    end = jax.tree.map(lambda x: np.asarray(x[0, 0, 0]), state.params)
    steps.append((end, *metrics.values[0].tolist()))
  (once, error_once, norm_once), (both, error_both, norm_both) = steps
  kernel = start['conv1']['kernel'].astype(np.float64)
  squares = (kernel**2).sum()
  norm = sum(abs(w).sum() for w in _dense(start))
  np.testing.assert_allclose(norm_once, norm, rtol=1e-6)
  np.testing.assert_allclose(norm_both - norm, conv_l2 * squares, rtol=1e-2)
  np.testing.assert_allclose(error_both, error_once, rtol=1e-6)
  # Its gradient is weighed like the rest of the second goal, equation (2).
  difference = once['conv1'].pop('kernel') - both['conv1'].pop('kernel')
  np.testing.assert_allclose(
    difference, rate * l1 * 2 * conv_l2 * kernel, rtol=1e-3, atol=1e-7
  )
  chex.assert_trees_all_close(once, both, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters(digits):
  model = models.create('lenet5', dtype=jnp.bfloat16)
  config = _config(compute_dtype='bfloat16', epochs=3)
  program = _program(config, digits, model=model)
  state = program.prune(program.init())
  losses = []
  for number in range(3):
    state, metrics = program.epoch(state, number)
    losses.append(metrics.loss[0])
  dtypes = {x.dtype for x in jax.tree.leaves(state.params)}
  assert dtypes == {jnp.dtype('float32')}
  assert np.isfinite(losses).all()
  assert losses[2] < losses[1] < losses[0]
  # Whatever a bfloat16 holds has zeros in its last 16 bits.
  bits = np.asarray(state.params['layer1']['kernel']).view(np.uint32)
  assert (bits & 0xFFFF).any()


@pytest.mark.parametrize('optimizer', ['smgd', 'madam'])
def test_weights_that_are_found_have_a_range(digits, optimizer):
  _, _, metrics = _epochs(_optimizer_config(optimizer), digits)
  weights = metrics.weights_min, metrics.weights, metrics.weights_max
  least, mean, most = (x[0, 1] for x in weights)
  assert 0 <= least < mean < most <= 1
  # Both sum to 1 at every step.
  np.testing.assert_allclose(metrics.weights_max[0, 0], 1 - least, rtol=1e-6)
  np.testing.assert_allclose(metrics.weights_min[0, 0], 1 - most, rtol=1e-6)


@pytest.mark.parametrize('bad', range(3))
@pytest.mark.parametrize('where', ['values', 'norms'])
def test_a_failure_is_of_the_first_objective_that_is_not_finite(bad, where):
  good = np.ones(3, np.float32)
  broken = np.where(np.arange(3) < bad, good, np.nan)
  pair = (broken, good) if where == 'values' else (good, broken)
  never = step_lib.Failure(*np.zeros(3, np.int32))
  at = np.int32(4), np.int32(7)
  found = step_lib._failure(never, *pair, at)
  assert found == (bad + 1, 4, 7)
  assert step_lib._failure(never, good, good, at) == never
  # The first one stays.
  assert step_lib._failure(found, good, good, (5, 0)) == found
  assert step_lib._failure(found, broken[::-1], good, (5, 0)) == found


@pytest.mark.parametrize('m', [1, 2, 3])
def test_metrics_of_an_epoch_are_means_over_its_steps_and_examples(m):
  """Of two parts with two steps and one, of 4, 4 and 2 examples."""
  random = np.random.default_rng(m)
  draw = lambda: random.random((1, 3, 1, 2), np.float32)  # [D, steps, s, l]
  several = lambda n: tuple(draw() for _ in range(n))
  weights = several(m)
  whole = Metrics(
    values=several(m),
    grad_norms=several(m),
    cosines=several(m * (m - 1) // 2),
    weights=weights,
    weights_min=weights,
    weights_max=weights,
    loss=draw(),
    score=draw(),
  )
  parts = [
    jax.tree.map(lambda x: x[:, :2], whole),
    jax.tree.map(lambda x: x[:, 2:], whole),
  ]
  layout = make_layout(_config(l1=(1e-3, 1e-2)), jax.devices()[:1])
  found = program_lib._over_epoch(parts, np.array([4.0, 4.0, 2.0]), layout)
  for name in ('values', 'grad_norms', 'cosines', 'weights'):
    columns = getattr(whole, name)
    assert getattr(found, name).shape == (2, len(columns))
    for index, x in enumerate(columns):
      np.testing.assert_allclose(
        getattr(found, name)[:, index], x.mean(axis=1)[0, 0], rtol=1e-6
      )
  for index, x in enumerate(weights):
    least, most = found.weights_min[:, index], found.weights_max[:, index]
    np.testing.assert_array_equal(least, x.min(axis=1)[0, 0])
    np.testing.assert_array_equal(most, x.max(axis=1)[0, 0])
  for name in ('loss', 'score'):
    total = getattr(whole, name).sum(axis=1)[0, 0]
    np.testing.assert_allclose(getattr(found, name), total / 10, rtol=1e-6)


def test_nothing_is_pruned_where_nothing_is_to_be(digits):
  program = _program(_config(prune='none'), digits)
  state = program.init()
  before = jax.device_get(state)
  chex.assert_trees_all_equal(before, jax.device_get(program.prune(state)))
  assert any((abs(w) < 1e-3).any() for w in _dense(before.params))


@pytest.mark.slow
def test_vgg_trains():
  """Two steps of random pictures: does all of it work together?

  The only one with the real network, which takes 20 s to compile.
  """
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (32, 32, 32, 3)).astype(np.uint8)
  split = Split(images, random.integers(0, 10, 32).astype(np.int32))
  data = Dataset('random', 10, split, split, split, 127.5, 74.0)
  config = _config(model='vgg', batch_size=16, l1=(1e-3,), seed=(0,))
  assert all(config.augmentation)
  program = _program(config, data, model=models.create('vgg'))
  state = program.prune(program.init())
  before = jax.device_get(state)
  state, metrics = program.epoch(state, 0)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
  assert state.params['conv6']['kernel'].shape == (1, 1, 1, 3, 3, 128, 128)
  assert state.params['denselayer']['kernel'].shape == (1, 1, 1, 2048, 10)
  assert state.model_state['batch_stats']['norm6']['var'].shape == (
    1,
    1,
    1,
    128,
  )
  for old, new in zip(
    jax.tree.leaves((before.params, before.model_state)),
    jax.tree.leaves((state.params, state.model_state)),
  ):
    assert np.isfinite(new).all()
    assert (old != new).any()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.slow
def test_every_optimizer_learns_real_digits(optimizer):
  """Shortened to 8 epochs, and to 12 for SGD, which prunes more slowly.

  Of all the training data, for up to 20 s.
  """
  data = load_dataset('mnist5k')
  epochs = 12 if optimizer == 'sgd' else 8
  config = _optimizer_config(optimizer, epochs=epochs)
  program, state, metrics = _epochs(
    config, data, epochs=epochs, model=models.create('lenet5')
  )
  assert np.isfinite(metrics.loss).all()
  score = program.evaluate(state, 'val')
  assert score.score[0] >= 0.9
  nonzeros = sum(int((w != 0).sum()) for w in _dense(state.params))
  print(f'{optimizer}: {nonzeros} of 58,920 dense weights are not zero')
  if not config.finds_weights:
    assert nonzeros < 0.3 * 58_920


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('model', [Tiny(), models.create('vgg')])
def test_nothing_turns_into_float64_with_x64(digits, optimizer, model):
  """What is traced, since the scan compares dtypes before and after a step."""
  config = _optimizer_config(optimizer, rotation=15.0, shift=0.1, flip=True)

  def init(_):
    image = jnp.zeros((1, 28, 28, 1), jnp.float32)
    variables = dict(model.init(jax.random.key(0), image))
    params = variables.pop('params')
    tx = optimizer_lib.make_optimizer(config, 20, jnp.ones(2, jnp.float32))
    never = step_lib.Failure(*[jnp.int32(0)] * 3)
    return step_lib.State(params, variables, tx.init(params), never)

  def train(_):
    state = jax.vmap(jax.vmap(init))(jnp.zeros((1, 1)))
    layout = make_layout(config, first_devices(1))
    batches = batches_lib.make_batches(config, np.arange(640)[None], layout)
    return state, step_lib.train_steps(
      *(Job(config, model, digits), 20, None, state),
      jnp.ones((1, 2), jnp.float32),
      jax.random.split(jax.random.key(0), 1),
      np.int32(0),
      Split(*map(jnp.asarray, digits.train)),
      jax.tree.map(lambda x: x[0], batches),
    )

  with jax.enable_x64(True):
    before, (after, _) = jax.eval_shape(train, 0)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
  dtypes = {str(x.dtype) for x in jax.tree.leaves(before)}
  assert dtypes == {'float32', 'int32'}


@pytest.mark.slow
def test_an_epoch_with_x64_is_the_same(digits):
  """Seeds, order of the examples, and what is random in augmentation.

  Compiled twice, with augmentation: 10 s.
  """
  config = _config(rotation=15.0, shift=0.1, flip=True)
  data = digits._replace(train=_take(digits.train, 128))
  _, expected, _ = _epochs(config, data)
  with jax.enable_x64(True):
    program, state, metrics = _epochs(config, data)
    assert np.isfinite(program.evaluate(state, 'val').loss).all()
  chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
  chex.assert_trees_all_close(state.params, expected.params, atol=1e-5)


@pytest.mark.slow
def test_without_jit_a_step_is_the_same(digits):
  """One operation after the other, for those who debug: up to 20 s."""
  config = _config(parallel='members')
  data = digits._replace(
    train=_take(digits.train, 32), val=_take(digits.val, 2)
  )
  _, expected, metrics = _epochs(config, data, model=Dropping(0.0))
  with jax.disable_jit():
    program, state, without = _epochs(config, data, model=Dropping(0.0))
    assert np.isfinite(program.evaluate(state, 'val').loss).all()
  chex.assert_trees_all_close(state, expected, atol=1e-5)
  chex.assert_trees_all_close(without, metrics, rtol=1e-4, atol=1e-5)
