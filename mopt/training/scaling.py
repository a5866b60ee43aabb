"""Mean and standard deviation of examples: found, checked, applied.

NumPy alone is needed here, for those who only predict; what is compiled hands
arrays of JAX in.
"""

from typing import Any, overload, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  import jax

# Of all values alike, or one for each place on their last axis.
Scale = float | tuple[float, ...]


@overload
def normalise(images: np.ndarray, mean: Scale, std: Scale) -> np.ndarray: ...
@overload
def normalise(images: 'jax.Array', mean: Scale, std: Scale) -> 'jax.Array': ...
def normalise(images: Any, mean: Scale, std: Scale) -> Any:
  """What a network is fed: `(images - mean) / std`, in float32.

  Args:
    images: pixels in 0..255, or features, any shape; an array of NumPy or of
      JAX.
    mean: subtracted from every value; a tuple has one for each place on the
      last axis.
    std: divides every value; likewise.

  Returns:
    Float32, the shape of `images`; of JAX if `images` are.

  Examples:
    >>> import numpy as np
    >>> from mopt.training import normalise
    >>> print(normalise(np.array([0, 255], np.uint8), mean=0.0, std=255.0))
    [0. 1.]
    >>> print(normalise(np.array([[1.0, 30.0]]), (0.0, 20.0), (2.0, 10.0)))
    [[0.5 1. ]]
  """
  if not hasattr(images, 'astype'):
    images = np.asarray(images)
  images = images.astype(np.float32)
  if isinstance(mean, tuple) or isinstance(std, tuple):
    # Of the rank of the images, and float32 whatever JAX may have.
    shape = (1,) * (images.ndim - 1) + (-1,)
    middle = np.array(mean, np.float32).reshape(shape)
    factor = (1.0 / np.array(std)).astype(np.float32).reshape(shape)
    return (images - middle) * factor
  # Of Python's type: NumPy's own would make float64 of it.
  return (images - float(mean)) * (1.0 / float(std))


def find_scale(every: np.ndarray, images: np.ndarray) -> tuple[Scale, Scale]:
  """Mean and standard deviation that `normalise` takes.

  Args:
    every: all examples to train on, by which data of one source are treated
      alike, however many of them are left.
    images: those that are trained on.
  """
  if images.dtype != np.uint8:
    return _feature_moments(images)
  if 2 * np.count_nonzero(every) < every.size:
    return 0.0, 255.0
  return _moments(images)


def _moments(images: np.ndarray) -> tuple[float, float]:
  """Mean and standard deviation of all pixels."""
  # By their histogram: np.std would make a copy in float64.
  counts = np.zeros(256, np.int64)
  for part in np.array_split(images.reshape(-1), 1 + images.size // 10**7):
    counts += np.bincount(part, minlength=256)
  values = np.arange(256)
  mean = np.average(values, weights=counts)
  std = np.sqrt(np.average((values - mean) ** 2, weights=counts))
  return float(mean), float(std) or 1.0


def _feature_moments(
  features: np.ndarray,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation for each place on the last axis."""
  rows = features.reshape(-1, features.shape[-1])
  # In parts: np.std would make a copy in float64.
  parts = np.array_split(rows, 1 + rows.size // 10**7)
  total = np.zeros(rows.shape[1])
  mean = sum((x.sum(axis=0, dtype=np.float64) for x in parts), total)
  mean = mean / len(rows)
  square = sum((np.square(x - mean).sum(axis=0) for x in parts), total)
  # The mean of equal numbers may be rounded.
  is_constant = rows.min(axis=0) == rows.max(axis=0)
  std = np.where(is_constant, 1.0, np.sqrt(square / len(rows)))
  return tuple(mean.tolist()), tuple(std.tolist())


def check_scale(wanted: str, mean: Scale, std: Scale, places: int) -> None:
  """Raises unless `normalise` can work with a mean and a standard deviation.

  Args:
    wanted: how a message begins.
    mean: to check.
    std: to check.
    places: the size of the last axis of examples.

  Raises:
    ValueError: if their numbers are neither one nor one for each place, or not
      finite, and the deviations positive, in float32.
  """
  means, stds = (x if isinstance(x, tuple) else (x,) for x in (mean, std))
  is_one = not isinstance(mean, tuple) and not isinstance(std, tuple)
  if not is_one and not len(means) == len(stds) == places:
    raise ValueError(
      f'{wanted} a mean and a standard deviation for each of the {places} '
      f'places on the last axis, got {len(means)} and {len(stds)}.'
    )
  # In float32, as `normalise` computes.
  limits = np.finfo(np.float32)
  least, most = float(limits.tiny), float(limits.max)
  for place, (middle, width) in enumerate(zip(means, stds)):
    is_scale = width > 0 and least <= 1 / width <= most
    if not (abs(middle) <= most and is_scale):
      where = '' if is_one else f' at place {place} of the last axis'
      raise ValueError(
        f'{wanted} a finite mean and a positive, finite standard deviation, '
        f'got {middle} and {width}{where}.'
      )
