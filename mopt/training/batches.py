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
  """The batches of consecutive steps on D devices, of s seeds each."""

  step: jax.Array | np.ndarray  # [D, steps], in its epoch.
  chosen: jax.Array | np.ndarray  # [D, steps, s, share], places in a split.
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


def make_batches(config: Config, orders: np.ndarray, layout: Layout) -> Batches:
  """The batches of an epoch, of this process's devices.

  Batches that are not full, or not divisible, are filled up with other
  examples: they count nothing in objectives and metrics, but keep the
  statistics of batch normalisation those of a whole batch.

  Args:
    config: the settings.
    orders: `[S, examples]`, a permutation for each seed.
    layout: which seeds, and which share of a batch, a device has.

  Returns:
    `Batches` of all steps.
  """
  seeds, num_examples = orders.shape
  steps = steps_per_epoch(config, num_examples)
  num_shares = layout.num_shares
  share = -(-config.batch_size // num_shares)
  column = np.arange(share * num_shares)
  places = np.arange(steps)[:, None] * config.batch_size + column
  counts = (column < config.batch_size) & (places < num_examples)
  chosen = orders[:, places % num_examples]
  chosen = chosen.reshape(seeds, steps, num_shares, share)
  chosen = chosen.transpose(2, 0, 1, 3)[
    np.array(layout.share)[:, None], layout.seeds(np.arange(seeds))
  ]  # [D, s, steps, share]
  count = counts.reshape(steps, num_shares, share).transpose(1, 0, 2)
  per_device = (len(layout.share), steps)
  return Batches(
    step=np.broadcast_to(np.arange(steps, dtype=np.int32), per_device),
    chosen=chosen.swapaxes(1, 2).astype(np.int32),
    count=count[layout.share].astype(np.float32),
    size=np.broadcast_to(counts.sum(axis=1, dtype=np.float32), per_device),
  )


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
