"""Which examples are in which batch, and how they get to the devices.

Either the whole split lies on every device and batches name its examples, or,
where it does not fit, the pictures of some steps at a time are sent along: a
split of their own, in the order of their use.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from mopt.training.config import Config
from mopt.training.data import Split
from mopt.training.layout import Layout

# Steps in a part of an epoch that is sent to the devices.
_STEPS = 64


class Batches(NamedTuple):
  """The batches of consecutive steps; D devices have a share of each."""

  step: jax.Array | np.ndarray  # [D, steps], in its epoch.
  chosen: jax.Array | np.ndarray  # [D, steps, S, share], places in a split.
  count: jax.Array | np.ndarray  # [D, steps, share], 0 for what only fills up.
  size: jax.Array | np.ndarray  # [D, steps], examples on all devices.


def steps_per_epoch(config: Config, num_examples: int) -> int:
  """Number of updates in an epoch; the last batch may be a partial one."""
  if config.batch_size > num_examples:
    raise ValueError(
      f'batch_size={config.batch_size}: expected at most the '
      f'{num_examples} training examples.'
    )
  if config.drop_remainder:
    return num_examples // config.batch_size
  return -(-num_examples // config.batch_size)


def make_batches(
  config: Config, orders: np.ndarray, num_devices: int
) -> Batches:
  """The batches of an epoch.

  Batches that are not full, or not divisible, are filled up with other
  examples: they count nothing in objectives and metrics, but keep the
  statistics of batch normalisation those of a whole batch.

  Args:
    config: the settings.
    orders: `[S, examples]`, a permutation for each seed.
    num_devices: D.

  Returns:
    `Batches` of all steps.
  """
  seeds, num_examples = orders.shape
  steps = steps_per_epoch(config, num_examples)
  share = -(-config.batch_size // num_devices)
  column = np.arange(share * num_devices)
  places = np.arange(steps)[:, None] * config.batch_size + column
  counts = (column < config.batch_size) & (places < num_examples)
  chosen = orders[:, places % num_examples]
  chosen = chosen.reshape(seeds, steps, num_devices, share)
  count = counts.reshape(steps, num_devices, share).transpose(1, 0, 2)
  per_device = (num_devices, steps)
  return Batches(
    step=np.broadcast_to(np.arange(steps, dtype=np.int32), per_device),
    chosen=chosen.transpose(2, 1, 0, 3).astype(np.int32),
    count=count.astype(np.float32),
    size=np.broadcast_to(counts.sum(axis=1, dtype=np.float32), per_device),
  )


def spread(batches: Batches, layout: Layout) -> Batches:
  """From the batches of one device to those of devices with own members."""
  num_devices = len(layout.devices)
  per_device = jax.tree.map(
    lambda x: np.broadcast_to(x, (num_devices, *x.shape[1:])), batches
  )
  by_seed = batches.chosen[0].swapaxes(0, 1)  # [S, steps, batch]
  return per_device._replace(chosen=layout.seeds(by_seed).swapaxes(1, 2))


def stream(train: Split, batches: Batches) -> Iterator[tuple[Split, Batches]]:
  """Parts of an epoch: pictures `[D, examples, ...]`, and their batches."""
  devices, steps, seeds, share = batches.chosen.shape
  for start in range(0, steps, _STEPS):
    part = Batches(*(x[:, start : start + _STEPS] for x in batches))
    chosen = part.chosen.reshape(devices, -1)
    places = np.arange(chosen.shape[1], dtype=np.int32)
    places = places.reshape(-1, seeds, share)
    yield (
      Split(train.images[chosen], train.labels[chosen]),
      part._replace(chosen=np.broadcast_to(places, (devices, *places.shape))),
    )
