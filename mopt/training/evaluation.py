"""How good networks are on a whole split, exactly and for any size of it."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mopt.training.data import Dataset
from mopt.training.data import normalise
from mopt.training.data import Split

PyTree = Any
_AXIS = 'devices'
_BATCH = 250
# Examples in a part of a split that is sent to the devices.
_STREAMED = 10_000


class Evaluation(NamedTuple):
  """Means over the examples of a split, `[S, L]` each; NaN without any."""

  ce: np.ndarray
  accuracy: np.ndarray


def over_members(function: Callable) -> Callable:
  """Maps a function of one member over the axes `[S, L]` of its arguments."""
  return jax.vmap(jax.vmap(function))


def score(
  logits: jax.Array, labels: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy and hits, summed over the examples that count."""
  ce = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )
  hits = jnp.argmax(logits, axis=-1) == labels
  return jnp.sum(ce * count), jnp.sum(hits * count)


def make_evaluate(
  model: nn.Module,
  data: Dataset,
  splits: Mapping[str, Split],
  devices: Sequence[jax.Device],
  streamed: bool,
) -> Callable[[PyTree, str], Evaluation]:
  """Makes the function that scores a population.

  Args:
    model: see `mopt.training.epoch.make_program`.
    data: for mean and standard deviation of the pixels.
    splits: `data`'s, on the devices unless they are streamed.
    devices: each takes a share of the batches.
    streamed: whether pictures are sent a part of a split at a time.

  Returns:
    A function of variables, with leaves `[S, L, ...]`, and the name of a split.
  """
  sums_on_devices = jax.pmap(
    functools.partial(_sums, model, data.mean, data.std),
    axis_name=_AXIS,
    in_axes=(None, None, 0, 0),
    out_axes=None,
    devices=devices,
  )

  def evaluate(variables, name):
    split = splits[name]
    total = len(split.labels)
    if not total:
      members = jax.tree.leaves(variables)[0].shape[:2]
      nothing = np.full(members, np.nan, np.float32)
      return Evaluation(nothing, nothing)
    size = _STREAMED if streamed else total
    ce, correct = np.zeros(()), np.zeros(())
    for start in range(0, total, size):
      # A slice of all of it would be a copy.
      part = (
        Split(*(x[start : start + size] for x in split)) if streamed else split
      )
      places, counts = _batches(len(part.labels), len(devices))
      scores = sums_on_devices(variables, part, places, counts)
      ce, correct = ce + np.asarray(scores[0]), correct + np.asarray(scores[1])
    return Evaluation(ce / total, correct / total)

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
  model: nn.Module,
  mean: float,
  std: float,
  variables: PyTree,
  split: Split,
  places: jax.Array,
  counts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Scores summed over a split, of which each device takes some batches."""

  def batch_sums(batch):
    indices, count = batch
    images = normalise(split.images[indices], mean, std)

    def member_sums(variables):
      logits: Any = model.apply(variables, images)
      return score(logits, split.labels[indices], count)

    return over_members(member_sums)(variables)

  sums = jax.lax.map(batch_sums, (places, counts))
  return jax.lax.psum(jax.tree.map(lambda x: x.sum(axis=0), sums), _AXIS)
