"""How good networks are on a whole split, exactly and for any size of it."""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mopt.training import calls
from mopt.training.data import Split
from mopt.training.job import Job
from mopt.training.layout import Layout
from mopt.training.layout import over_devices
from mopt.training.loss import Loss
from mopt.training.scaling import normalise

PyTree = Any
_AXIS = 'devices'
_BATCH = 250
# Examples in a part of a split that is sent to the devices.
_STREAMED = 10_000


class Evaluation(NamedTuple):
  """Means over the examples of a split, `[M]` each; NaN without any."""

  loss: np.ndarray
  score: np.ndarray


def score(
  loss: Loss, outputs: PyTree, labels: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Loss and score, summed over the examples that count, in float32."""
  each = [f(outputs, labels) for f in (loss.per_example, loss.score)]
  first, second = (jnp.sum(x.astype(jnp.float32) * count) for x in each)
  return first, second


def make_evaluate(
  job: Job,
  splits: Mapping[str, Split],
  layout: Layout,
  streamed: bool,
) -> Callable[[PyTree, str], Evaluation]:
  """Makes the function that scores a population.

  Args:
    job: for the network, the loss, and the mean and standard deviation of the
      pixels.
    splits: of its data, on the devices unless they are streamed.
    layout: of the population; devices that do not have members of their own
      take a share of the batches.
    streamed: whether pictures are sent a part of a split at a time.

  Returns:
    A function of the variables of a population and the name of a split.
  """
  axis = _AXIS if layout.shares_batches else None
  sums_on_devices = over_devices(
    functools.partial(_sums, job, axis),
    layout,
    _AXIS,
    in_axes=(0, None, 0, 0),
  )

  def evaluate(variables, name):
    split = splits[name]
    total = len(split.labels)
    if not total:
      nothing = np.full(math.prod(layout.size), np.nan, np.float32)
      return Evaluation(nothing, nothing)
    size = _STREAMED if streamed else total
    sums = np.zeros(()), np.zeros(())
    for start in range(0, total, size):
      # A slice of all of it would be a copy.
      part = (
        Split(*(x[start : start + size] for x in split)) if streamed else split
      )
      batches = _batches(len(part.labels), layout.num_shares)
      batches = tuple(x[layout.share] for x in batches)
      more = layout.collect(sums_on_devices(variables, part, *batches))
      sums = sums[0] + more[0], sums[1] + more[1]
    return Evaluation(sums[0] / total, sums[1] / total)

  return evaluate


def _batches(
  num_examples: int, num_devices: int
) -> tuple[np.ndarray, np.ndarray]:
  """Places in a split, and whether they count, `[D, batches, examples]`."""
  batches = -(-num_examples // (_BATCH * num_devices))
  shape = (num_devices, batches, _BATCH)
  places = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
  counts = places < num_examples
  return np.where(counts, places, 0), counts.astype(np.float32)


def _sums(
  job: Job,
  axis: str | None,
  variables: PyTree,
  split: Split,
  places: jax.Array,
  counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Scores summed over a split, and over devices that take some batches."""

  def batch_sums(batch):
    indices, count = batch
    images = split.images[indices]
    images = normalise(images, job.data.mean, job.data.std)

    def member_sums(variables):
      outputs = calls.predict(job.model, images, variables)
      return score(job.loss, outputs, split.labels[indices], count)

    return jax.vmap(jax.vmap(member_sums))(variables)

  sums = jax.lax.map(batch_sums, (places, counts))
  sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
  return sums if axis is None else jax.lax.psum(sums, axis)
