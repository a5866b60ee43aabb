"""Batches: who is in them, who counts, and what is sent to the devices."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest

from mopt.training import batches as batches_lib
from mopt.training import Config
from mopt.training.batches import make_batches
from mopt.training.batches import steps_per_epoch
from mopt.training.batches import stream
from mopt.training.data import Split
from mopt.training.layout import Layout
from tests.devices import fake_devices


def _sharing(orders, number):
  """So many devices that share the batches of these seeds."""
  size = len(orders), 1
  return Layout(tuple(fake_devices(number)), size, (1, 1), number > 1)


@st.composite
def _epochs(draw):
  """Settings, orders of the examples, and a number of devices."""
  num_examples = draw(st.integers(1, 40))
  config = Config(
    batch_size=draw(st.integers(1, num_examples)),
    drop_remainder=draw(st.booleans()),
  )
  random = np.random.default_rng(draw(st.integers(0, 9)))
  seeds = draw(st.integers(1, 3))
  orders = np.stack([random.permutation(num_examples) for _ in range(seeds)])
  return config, orders, draw(st.integers(1, 5))


@settings(deadline=None, max_examples=200)
@given(_epochs())
def test_every_example_counts_once_in_the_order_of_its_seed(epoch):
  config, orders, num_devices = epoch
  seeds, num_examples = orders.shape
  batches = make_batches(config, orders, _sharing(orders, num_devices))
  steps = steps_per_epoch(config, num_examples)
  share = -(-config.batch_size // num_devices)
  assert batches.chosen.shape == (num_devices, steps, seeds, share)
  assert batches.count.shape == (num_devices, steps, share)
  assert set(np.unique(batches.count)) <= {0, 1}
  used = steps * config.batch_size if config.drop_remainder else num_examples
  for seed, order in enumerate(orders):
    # By step, then by device.
    chosen = batches.chosen[:, :, seed].swapaxes(0, 1)
    counted = chosen[batches.count.swapaxes(0, 1) == 1]
    np.testing.assert_array_equal(counted, order[:used])


@settings(deadline=None, max_examples=200)
@given(_epochs())
def test_sizes_are_of_the_examples_that_count(epoch):
  config, orders, num_devices = epoch
  num_examples = orders.shape[1]
  batches = make_batches(config, orders, _sharing(orders, num_devices))
  steps = steps_per_epoch(config, num_examples)
  sizes = [config.batch_size] * steps
  if not config.drop_remainder:
    sizes[-1] = num_examples - (steps - 1) * config.batch_size
  np.testing.assert_array_equal(batches.size, [sizes] * num_devices)
  np.testing.assert_array_equal(batches.count.sum(axis=(0, 2)), sizes)
  np.testing.assert_array_equal(batches.step, [range(steps)] * num_devices)
  # As the devices want them: others would be converted at every epoch.
  dtypes = [str(x.dtype) for x in batches]
  assert dtypes == ['int32', 'int32', 'float32', 'float32']


@settings(deadline=None, max_examples=200)
@given(_epochs())
def test_batches_are_filled_up_with_other_examples(epoch):
  # Batch normalisation sees them: twice the same would shift its statistics.
  config, orders, num_devices = epoch
  seeds, num_examples = orders.shape
  batches = make_batches(config, orders, _sharing(orders, num_devices))
  assert batches.chosen.min() >= 0
  assert batches.chosen.max() < num_examples
  together = batches.chosen.transpose(1, 2, 0, 3)  # [steps, S, D, share]
  filled = together.reshape(-1, seeds, num_devices * together.shape[-1])
  for chosen in filled.reshape(-1, filled.shape[-1]):
    different = min(len(chosen), num_examples)
    assert len(np.unique(chosen)) == different


def test_a_batch_that_divides_is_not_filled_up():
  orders = np.random.default_rng(0).permutation(24)[None]
  batches = make_batches(Config(batch_size=8), orders, _sharing(orders, 4))
  assert batches.count.all()
  # Consecutive examples are on one device.
  np.testing.assert_array_equal(
    batches.chosen[:, 1, 0], orders[0, 8:16].reshape(4, 2)
  )


def test_a_last_batch_is_filled_up_from_the_start_of_the_epoch():
  orders = np.arange(10)[None]
  batches = make_batches(Config(batch_size=4), orders, _sharing(orders, 2))
  np.testing.assert_array_equal(batches.chosen[:, 2, 0], [[8, 9], [0, 1]])
  np.testing.assert_array_equal(batches.count[:, 2], [[1, 1], [0, 0]])
  np.testing.assert_array_equal(batches.size[:, 2], [2, 2])


def _numbered(n):
  """A split of which every picture and label tells its place."""
  images = np.arange(n, dtype=np.uint8)[:, None, None, None]
  labels = 100 + np.arange(n, dtype=np.int32)
  return Split(np.broadcast_to(images, (n, 2, 3, 1)), labels)


@settings(deadline=None, max_examples=200)
@given(_epochs(), st.integers(1, 5))
def test_a_streamed_epoch_shows_the_same_pictures(epoch, length):
  config, orders, num_devices = epoch
  train = _numbered(orders.shape[1])
  batches = make_batches(config, orders, _sharing(orders, num_devices))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches_lib, '_STEPS', length)
    parts = list(stream(train, batches))
  steps = batches.chosen.shape[1]
  lengths = [part.chosen.shape[1] for _, part in parts]
  assert sum(lengths) == steps
  assert lengths[:-1] == [length] * (len(parts) - 1)
  for device in range(num_devices):
    for name in ('images', 'labels'):
      seen = np.concatenate(
        [
          getattr(split, name)[device][part.chosen[device]]
          for split, part in parts
        ]
      )
      resident = getattr(train, name)[batches.chosen[device]]
      np.testing.assert_array_equal(seen, resident)
  for name in ('step', 'count', 'size'):
    joined = [getattr(part, name) for _, part in parts]
    np.testing.assert_array_equal(
      np.concatenate(joined, axis=1), getattr(batches, name)
    )


def test_seven_steps_are_sent_in_three_parts(monkeypatch):
  monkeypatch.setattr(batches_lib, '_STEPS', 3)
  train = _numbered(20)
  orders = np.stack([np.arange(20), np.arange(20)[::-1]])
  batches = make_batches(Config(batch_size=3), orders, _sharing(orders, 2))
  parts = list(stream(train, batches))
  # For each device as many pictures as its steps show: steps, seeds, share.
  shapes = [split.images.shape for split, _ in parts]
  assert shapes == [(2, n * 2 * 2, 2, 3, 1) for n in (3, 3, 1)]
  assert [split.labels.shape for split, _ in parts] == [x[:2] for x in shapes]
  for split, part in parts:
    assert split.images.dtype == np.uint8
    # In the order of their use.
    np.testing.assert_array_equal(
      part.chosen.reshape(2, -1), [range(split.images.shape[1])] * 2
    )
