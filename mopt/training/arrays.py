"""Data sets made of arrays in memory, for a loss of your own."""

from typing import Any

import numpy as np

from mopt.training.data import check_data
from mopt.training.data import Dataset
from mopt.training.data import Split
from mopt.training.scaling import find_scale


def make_dataset(
  name: str,
  train: tuple[Any, Any],
  test: tuple[Any, Any],
  val_size: int | None = None,
  num_classes: int | None = None,
) -> Dataset:
  """Makes a data set of arrays, with labels of any shape.

  Inputs are scaled as `load_dataset` does it; labels stay as they are, so take
  a unit in which they are neither large nor tiny. Validation examples are drawn
  from those to train on, the same in every run.

  Args:
    name: in tables and messages.
    train: inputs and labels to train on: pictures `[n, height, width,
      channels]` in uint8 or features `[n, ...]`; and numbers `[n, ...]`.
    test: likewise.
    val_size: number of examples to hold out for validation; a tenth of those to
      train on by default.
    num_classes: size of the output by which a network is made, number of
      classes if labels are classes; the numbers of a label by default, 1 for
      labels `[n]`.

  Returns:
    A `Dataset`, whose labels are float32, or int32 if they are integers.

  Raises:
    ValueError: if `val_size` leaves nothing to train on; for data that are not
      as said above, not finite, or of unequal lengths.

  Examples:
    >>> import numpy as np
    >>> from mopt import training
    >>> x = np.linspace(0, 1, 60).reshape(30, 2)
    >>> data = training.make_dataset(
    ...     'line', (x[:20], x[:20].sum(axis=1)), (x[20:], x[20:].sum(axis=1))
    ... )
    >>> data.num_classes, len(data.train.labels), len(data.val.labels)
    (1, 18, 2)
  """
  every, other = (Split(*map(np.asarray, pair)) for pair in (train, test))
  labels = every.labels
  if num_classes is None:
    num_classes = int(np.prod(labels.shape[1:]))
  # As they were given: others are those of 32 bits only if they fit there.
  data = Dataset(name, num_classes, every, every, other, 0.0, 1.0)
  check_data(data, classes=False)
  if val_size is None:
    val_size = len(labels) // 10
  if not 0 <= val_size < len(labels):
    raise ValueError(
      f'val_size={val_size}: expected 0 to {len(labels) - 1}, for {name} has '
      f'{len(labels)} examples to train on.'
    )
  is_held_out = np.zeros(len(labels), bool)
  order = np.random.RandomState(0).permutation(len(labels))
  is_held_out[order[:val_size]] = True
  data = data._replace(
    train=_take(every, ~is_held_out),
    val=_take(every, is_held_out),
    test=_take(other, ...),
  )
  mean, std = find_scale(*map(np.asarray, (every.images, data.train.images)))
  data = data._replace(mean=mean, std=std)
  check_data(data, classes=False)
  return data


def _take(split: Split, which: Any) -> Split:
  """Some examples, in the types that training takes."""
  images, labels = (np.asarray(x)[which] for x in split)
  if images.dtype != np.uint8:
    images = images.astype(np.float32)
  is_whole = np.issubdtype(labels.dtype, np.integer)
  return Split(images, labels.astype(np.int32 if is_whole else np.float32))
