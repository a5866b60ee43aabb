"""Members spread over devices: who has whom, and that nothing else changes.

What trains is compiled for one device and for several: 6 to 10 s.
"""

import contextlib
import functools
import itertools
import math
from typing import NamedTuple

import chex
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from mopt.training import batches as batches_lib
from mopt.training import Config
from mopt.training import layout as layout_lib
from mopt.training import load_dataset
from mopt.training.batches import make_batches
from mopt.training.job import Job
from mopt.training.layout import Layout
from mopt.training.layout import make_layout
from mopt.training.layout import over_devices
from mopt.training.program import make_program
from tests.devices import fake_devices
from tests.devices import FakeDevice
from tests.devices import first_devices
from tests.networks import Dropping
from tests.networks import Normed

pytestmark = pytest.mark.usefixtures('exact_products')


def _config(seeds, weights, **kwargs):
  l1 = tuple(1e-4 * (i + 1) for i in range(weights))
  return Config(seed=tuple(range(seeds)), l1=l1, **kwargs)


_SIZES = (st.integers(1, 7), st.integers(1, 9), st.integers(1, 12))


@given(*_SIZES)
def test_the_largest_share_is_as_small_as_can_be(seeds, weights, number):
  layout = make_layout(_config(seeds, weights), fake_devices(number))
  assert layout.size == (seeds, weights)
  used = len(layout.devices)
  assert layout.devices == tuple(fake_devices(used))
  share = layout.weights(np.arange(weights)).shape[1]
  share *= layout.seeds(np.arange(seeds)).shape[1]
  # All ways to cut, and what the device with the most members has to train.
  shares = {
    (rows, columns): -(-seeds // rows) * -(-weights // columns)
    for rows, columns in itertools.product(range(1, number + 1), repeat=2)
    if rows * columns <= number
  }
  assert share == min(shares.values())
  # A device more would not make it faster.
  fewest = min(r * c for (r, c), members in shares.items() if members == share)
  assert used == fewest <= number


@given(*_SIZES)
def test_members_come_back_in_their_order(seeds, weights, number):
  layout = make_layout(_config(seeds, weights), fake_devices(number))
  # As `make_program` does: each device pairs its seeds with its weights.
  of_seed = layout.seeds(10 * np.arange(seeds))
  of_weight = layout.weights(np.arange(weights))
  assert len(of_seed) == len(of_weight) == len(layout.devices)
  own = of_seed[:, :, None] + of_weight[:, None, :]
  wide = np.stack([own, -own], axis=-1)
  found = layout.collect({'a': own, 'b': wide})
  expected = 10 * np.arange(seeds)[:, None] + np.arange(weights)
  np.testing.assert_array_equal(found['a'], expected.ravel())
  np.testing.assert_array_equal(found['b'][..., 1], -expected.ravel())
  # And go where they came from.
  np.testing.assert_array_equal(layout.scatter(found)['b'], wide)


@pytest.mark.parametrize(
  ('number', 'parallel'), [(1, 'auto'), (4, 'auto'), (4, 'data')]
)
def test_a_function_of_one_member_is_mapped_over_all(number, parallel):
  layout = make_layout(_config(2, 2, parallel=parallel), fake_devices(number))
  shapes = []
  layout.over_members(lambda x: shapes.append(x.shape) or x)(
    np.zeros((2, 2, 2, 5))
  )
  assert shapes == [(5,)]


@given(*_SIZES, st.sampled_from(['cpu', 'gpu']))
def test_shared_batches_take_all_devices(seeds, weights, number, platform):
  config = _config(seeds, weights, parallel='data')
  layout = make_layout(config, fake_devices(number, platform))
  assert layout.devices == tuple(fake_devices(number, platform))
  assert layout.shares_batches == (number > 1)
  assert layout.share == list(range(number))
  for of_all, places in ((seeds, layout.seeds), (weights, layout.weights)):
    expected = np.broadcast_to(np.arange(of_all), (number, of_all))
    np.testing.assert_array_equal(places(np.arange(of_all)), expected)
  ids = np.arange(seeds * weights).reshape(seeds, weights)
  copies = np.broadcast_to(ids, (number, seeds, weights))
  flat = layout.collect({'a': copies})['a']
  np.testing.assert_array_equal(flat, ids.ravel())
  np.testing.assert_array_equal(layout.scatter({'a': flat})['a'], copies)


@pytest.mark.parametrize(
  ('parallel', 'platform', 'used'),
  [
    ('auto', 'cpu', 1),
    ('auto', 'gpu', 4),
    ('auto', 'tpu', 4),
    ('members', 'gpu', 1),
    ('data', 'cpu', 4),
  ],
)
def test_a_single_member_has_all_devices_but_on_a_cpu(parallel, platform, used):
  config = _config(1, 1, parallel=parallel)
  layout = make_layout(config, fake_devices(4, platform))
  assert (layout.grid, len(layout.devices)) == ((1, 1), used)
  assert layout.shares_batches == (used > 1)
  # The multiobjective optimizers find the weights: one member for each seed.
  found = Config(optimizer='madam', parallel=parallel)
  assert make_layout(found, fake_devices(4, platform)) == layout


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_several_members_are_spread_everywhere(platform):
  layout = make_layout(_config(1, 2), fake_devices(4, platform))
  assert (layout.grid, len(layout.devices)) == ((1, 2), 2)


def _dealt(number, processes):
  """Fake devices as they are in a layout: one process after the other."""
  devices = fake_devices(number, processes=processes)
  return tuple(sorted(devices, key=lambda device: device.process_index))


@pytest.mark.parametrize(
  ('parallel', 'weights'), [('auto', 1), ('data', 1), ('data', 3)]
)
def test_several_processes_share_the_batches(parallel, weights):
  devices = fake_devices(4, processes=2)
  layout = make_layout(_config(1, weights, parallel=parallel), devices)
  assert layout == (_dealt(4, 2), (1, weights), (1, 1), True)
  # This is the first process.
  assert layout.local == layout.share == [0, 1]
  assert layout.seeds(np.array([7])).tolist() == [[7], [7]]


@given(*_SIZES, st.integers(1, 4))
def test_several_processes_have_the_members_of_one(
  seeds, weights, number, processes
):
  """What one process would have on as many devices, in the same order."""
  config = _config(seeds, weights, parallel='members')
  total = number * processes
  alone = make_layout(config, fake_devices(total))
  ids = np.arange(seeds * weights)
  blocks = []
  for which in range(processes):
    with _as_process(which):
      layout = make_layout(config, fake_devices(total, processes=processes))
      blocks.append(layout.scatter({'a': ids, 'b': -ids[:, None]}))
      used = len(layout.local)
      assert layout.share == [0] * used
  assert (layout.size, layout.grid) == (alone.size, alone.grid)
  # As many of each process; only the devices beyond the grid train copies.
  assert 0 <= used * processes - len(alone.devices) < processes
  owners = [device.process_index for device in layout.devices]
  assert owners == [i for i in range(processes) for _ in range(used)]
  found = np.concatenate([block['a'] for block in blocks])
  expected = alone.scatter(ids)
  np.testing.assert_array_equal(found[: len(expected)], expected)
  assert np.isin(found, ids).all()
  # And every process has all of them back.
  share = lambda leaves: [jax.tree.leaves(block) for block in blocks]
  for which in range(processes):
    with _as_process(which), pytest.MonkeyPatch.context() as patch:
      if processes > 1:
        patch.setattr(layout_lib.processes, 'share', share)
      back = layout.collect(blocks[which])
    np.testing.assert_array_equal(back['a'], ids)
    np.testing.assert_array_equal(back['b'], -ids[:, None])


@contextlib.contextmanager
def _as_process(which):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'process_index', lambda: which)
    yield


def test_a_single_member_is_copied_to_processes_without_one():
  config = _config(1, 1, parallel='members')
  layout = make_layout(config, fake_devices(6, processes=3))
  assert layout == (_dealt(6, 3)[::2], (1, 1), (1, 1), False)
  assert layout.weights(np.array([5.0])).tolist() == [[5.0]]


def test_each_process_has_as_many_devices_as_the_one_with_the_fewest():
  devices = [*fake_devices(3), FakeDevice(3, process_index=1)]
  for parallel in ('auto', 'members', 'data'):
    layout = make_layout(_config(1, 4, parallel=parallel), devices)
    assert layout.devices == (devices[0], devices[3])


def test_devices_of_other_processes_alone_are_refused():
  with pytest.raises(ValueError, match='^devices: .* of process 0, got .* 1.$'):
    make_layout(_config(1, 2), [FakeDevice(0, process_index=1)])


@given(*_SIZES, st.integers(1, 20))
def test_each_seed_sees_its_order_of_examples(seeds, weights, number, size):
  config = _config(seeds, weights, batch_size=size)
  layout = make_layout(config, fake_devices(number))
  random = np.random.default_rng(0)
  orders = np.stack([random.permutation(20) for _ in range(seeds)])
  batches = make_batches(config, orders, layout)
  devices, steps = len(layout.devices), -(-20 // size)
  own = layout.seeds(np.arange(seeds))
  assert batches.chosen.shape == (devices, steps, own.shape[1], size)
  for device in range(devices):
    counted = batches.count[device] == 1  # [steps, batch]
    for place, seed in enumerate(own[device]):
      seen = batches.chosen[device, :, place][counted]
      np.testing.assert_array_equal(seen, orders[seed])
    np.testing.assert_array_equal(batches.step[device], range(steps))
    np.testing.assert_array_equal(batches.size[device], counted.sum(axis=1))
  # As the devices want them: others would be converted at every epoch.
  dtypes = [str(x.dtype) for x in batches]
  assert dtypes == ['int32', 'int32', 'float32', 'float32']


@pytest.fixture(scope='module')
def digits():
  # Neither divides by the batches, nor by those of an evaluation.
  return load_dataset('mnist5k', val_size=257, train_size=300)


class _Found(NamedTuple):
  """What a population is after training, `[M]` in NumPy."""

  params: dict
  model_state: dict
  metrics: NamedTuple
  complexity: NamedTuple
  scores: NamedTuple


def _train(config, data, model, num_devices, grid):
  program = make_program(
    Job(config, model, data, devices=first_devices(num_devices))
  )
  layout = program.layout
  assert layout.grid == grid
  state = program.prune(program.init())
  metrics = []
  for number in range(2):
    state, epoch = program.epoch(state, number)
    metrics.append(epoch)
  for leaf in jax.tree.leaves(state):
    assert len(leaf.sharding.device_set) == len(layout.devices)
  state = program.prune(state)
  scores = program.evaluate(state, 'val')
  found = _Found(
    layout.collect(state.params),
    layout.collect(state.model_state),
    metrics,
    program.complexity(state),
    scores,
  )
  for leaf in jax.tree.leaves(found):
    assert leaf.shape[0] == math.prod(layout.size)
  return found


def _assert_same(found, expected, threshold):
  """But for weights at the threshold, which may fall on either side."""

  def compare(a, b):
    differ = (a == 0) != (b == 0)
    magnitude = np.maximum(np.abs(a), np.abs(b))[differ]
    np.testing.assert_allclose(magnitude, threshold, atol=1e-6)
    np.testing.assert_allclose(a[~differ], b[~differ], rtol=1e-4, atol=1e-5)
    return differ.sum()

  flips = sum(
    jax.tree.leaves(jax.tree.map(compare, found.params, expected.params))
  )
  counts, others = found.complexity, expected.complexity
  assert abs(counts.nonzeros.total - others.nonzeros.total).sum() <= flips
  assert abs(counts.nonzeros_all - others.nonzeros_all).sum() <= flips
  np.testing.assert_array_equal(counts.params, others.params)
  np.testing.assert_allclose(
    counts.values['l1'], others.values['l1'], rtol=1e-5
  )
  chex.assert_trees_all_close(found[1:3], expected[1:3], rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(found.scores, expected.scores, rtol=1e-4)


_POPULATION = dict(l1=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1), seed=(0, 7), epochs=4)


def test_a_spread_population_equals_one_device(digits):
  # Each of four devices has one seed and three weights, the last one filled up.
  alone = _train(
    Config(**_POPULATION, parallel='data'), digits, Dropping(0.2), 1, (1, 1)
  )
  config = Config(**_POPULATION, parallel='members')
  found = _train(config, digits, Dropping(0.2), 4, (2, 2))
  _assert_same(found, alone, config.threshold)
  # Were all members alike, it would not show who is who.
  norms = found.complexity.values['l1']
  assert len(np.unique(norms.round(3))) == norms.size


@pytest.mark.slow
def test_a_spread_and_streamed_population_equals_one_device(
  digits, monkeypatch
):
  """Batch statistics and dropout; two of five seeds on each of 3 devices."""
  monkeypatch.setattr(batches_lib, '_STEPS', 4)  # parts of 4, 4 and 2
  config = functools.partial(
    Config, optimizer='sgd', l1=(1e-3,), seed=(0, 1, 2, 3, 7), epochs=4
  )
  model = Normed(dropout=0.2)
  alone = _train(config(parallel='data'), digits, model, 1, (1, 1))
  found = _train(config(stream=True), digits, model, 3, (3, 1))
  _assert_same(found, alone, config().threshold)
  means = alone.model_state['batch_stats']['norm1']['mean']
  differ = abs(means[:, None] - means[None]).max(axis=-1) > 1e-4
  assert (differ | np.eye(5, dtype=bool)).all()


@pytest.mark.parametrize('stream', [False, True])
def test_without_validation_examples_a_spread_population_has_no_scores(stream):
  empty = load_dataset('mnist5k', val_size=0, train_size=32)
  config = _config(2, 3, stream=stream)
  program = make_program(Job(config, Dropping(0.0), empty))
  assert program.layout.grid != (1, 1)
  scores = program.evaluate(program.init(), 'val')
  assert scores.loss.shape == scores.score.shape == (6,)
  assert np.isnan(scores.loss).all()
  assert np.isnan(scores.score).all()


def test_without_jit_the_devices_do_the_same(four_devices):
  layout = Layout(tuple(four_devices), (1, 1), (1, 1), True)

  def function(state, scale, rows):
    def step(state, row):
      total = jax.lax.psum(row, 'devices')
      return state + scale * total, total.sum()

    return jax.lax.scan(step, state, rows)

  rows = np.arange(24.0, dtype=np.float32).reshape(4, 2, 3)
  state = np.zeros((4, 3), np.float32)
  arguments = (layout, 'devices', (0, None, 0))
  expected = over_devices(function, *arguments)(state, 2.0, rows)
  with jax.disable_jit():
    actual = over_devices(function, *arguments)(state, 2.0, rows)
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected)
