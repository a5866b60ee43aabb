"""Data of one's own: an .npz file with Keras' names, or a folder of pictures.

What is wrong with a file or a folder takes one line that names it. What is
wrong with arrays as such, whoever has made them, is found by
`mopt.training.data.check_data`.
"""

from collections.abc import Sequence
import hashlib
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from mopt.training import files
from mopt.training.files import DAMAGED_ARCHIVE
from mopt.training.sources import cached
from mopt.training.sources import DataError
from mopt.training.sources import digest

_ARRAYS = ('x_train', 'y_train', 'x_test', 'y_test')
_SPLITS = ('train', 'test')
_ENDINGS = ('.png', '.jpg', '.jpeg')
_WANTED = (
  'a file .npz with x_train, y_train, x_test and y_test, or a folder with '
  'train/CLASS/ and test/CLASS/'
)


class Pictures(NamedTuple):
  """What a folder holds, before any of it is read."""

  folder: pathlib.Path
  class_names: tuple[str, ...]  # Sorted; the place of a name is its label.
  paths: tuple[tuple[pathlib.Path, ...], ...]  # Of train, and of test.
  labels: tuple[np.ndarray, ...]  # Ditto, dtype=np.int32.
  key: str  # Another one if a file has come, gone or changed.


def find(name: str) -> pathlib.Path | None:
  """The file or folder that the name of a data set means, if it means one.

  A name that TFDS may know, such as `mnist`, means a folder only if that has
  `train` or `test` in it.
  """
  path = pathlib.Path(os.path.expanduser(name))
  if not name:
    return None
  # Of os.path, which takes what no file could be called, too.
  if path.suffix.lower() == '.npz' or os.path.isfile(path):
    return path
  if path.is_absolute() or name[0] in '.~' or name[-1] in ('/', os.sep):
    return path
  if any(os.path.isdir(path / split) for split in _SPLITS):
    return path
  is_other = os.path.isdir(path) and not re.fullmatch(r'\w+', name)
  return path if is_other else None


def read_npz(name: str, path: pathlib.Path) -> list[np.ndarray]:
  """Reads `x_train, y_train, x_test, y_test`; nothing is unpickled.

  Pictures `[n, h, w]` in uint8 get an axis of channels, features `[n]` one of
  features, and labels `[n, 1]` lose theirs.

  Raises:
    DataError: if the file cannot be read, or lacks one of the four.
  """
  start = f'dataset={name}: expected'
  entry = None
  try:
    with files.archive(path) as arrays:
      if set(_ARRAYS) - set(arrays.files):
        found = ', '.join(sorted(arrays.files)) or 'none'
        raise DataError(
          f'{start} the arrays {", ".join(_ARRAYS)}, got {found}.'
        )
      found = []
      for entry in _ARRAYS:
        found.append(np.atleast_1d(arrays[entry]))
  except DataError:
    raise
  except DAMAGED_ARCHIVE as error:
    reason = files.reason(error)
    if entry is None:
      raise DataError(f'{start} {_WANTED} ({reason}).') from error
    raise DataError(
      f'{start} an array of numbers as {entry} ({reason}).'
    ) from error
  for i, array in enumerate(found):
    if _ARRAYS[i].startswith('y'):
      found[i] = array[:, 0] if array.shape[1:] == (1,) else array
    elif array.ndim == (3 if array.dtype == np.uint8 else 1):
      found[i] = array[..., None]
  return found


def check_labels(name: str, labels: np.ndarray) -> None:
  """Raises if there is one class only, or more classes than examples.

  Args:
    name: of the data set.
    labels: of all examples to train on; `check_data` has found them good.

  Raises:
    DataError: with one line that names a label.
  """
  start = f'dataset={name}: expected'
  least, most = int(labels.min()), int(labels.max())
  if least == most:
    raise DataError(
      f'{start} at least 2 classes in the split train, got label {most} only.'
    )
  # A label such as 2147483647 would ask for as many outputs.
  if most >= len(labels):
    raise DataError(
      f'{start} labels from 0, and no more classes than the {len(labels)} '
      f'examples of the split train, got label {most}.'
    )


def list_pictures(name: str, folder: pathlib.Path) -> Pictures:
  """Finds `train/CLASS/*` and `test/CLASS/*`; hidden files do not count.

  Raises:
    DataError: if there is no such folder; for fewer than two classes, a class
      of test that train has not, a class of train or a split without a
      picture, and what is neither a picture nor a folder of a class.
  """
  start = f'dataset={name}: expected'
  if not os.path.isdir(folder):
    raise DataError(f'{start} {_WANTED}; there is none.')
  try:
    return _list_pictures(start, folder)
  except OSError as error:  # Somebody else's, or it goes while it is read.
    raise DataError(
      f'{start} a folder that can be read ({error.strerror}: {error.filename}).'
    ) from error


def _list_pictures(start: str, folder: pathlib.Path) -> Pictures:
  classes = {}
  for split in _SPLITS:
    if not (folder / split).is_dir():
      found = ', '.join(p.name for p in _visible(folder)[:9]) or 'nothing'
      raise DataError(f'{start} the folders train and test, got {found}.')
    classes[split] = _visible(folder / split)
    if files := [path for path in classes[split] if not path.is_dir()]:
      raise DataError(
        f'{start} a folder for each class in {split}, got the file '
        f'{files[0].relative_to(folder)}.'
      )
  names = tuple(path.name for path in classes['train'])
  if len(names) < 2:
    found = ', '.join(names) or 'none'
    raise DataError(f'{start} at least 2 classes in train, got {found}.')
  for path in classes['test']:
    if path.name not in names:
      raise DataError(
        f'{start} classes of train in test, got {path.relative_to(folder)}.'
      )
  paths, labels = [], []
  for split in _SPLITS:
    found = [(path, _in_class(start, folder, path)) for path in classes[split]]
    for path, pictures in found:
      if split == 'train' and not pictures:
        raise DataError(
          f'{start} pictures in {path.relative_to(folder)}, got none.'
        )
    paths.append(tuple(p for _, pictures in found for p in pictures))
    counts = [len(pictures) for _, pictures in found]
    places = [names.index(path.name) for path, _ in found]
    labels.append(np.repeat(np.array(places, np.int32), counts))
    if not paths[-1]:
      raise DataError(f'{start} pictures in {split}, got none.')
  key = _key(folder, [*paths[0], *paths[1]])
  return Pictures(folder, names, tuple(paths), tuple(labels), key)


def read_pictures(name: str, pictures: Pictures) -> list[np.ndarray]:
  """All pictures, as `decode` gives them, or as it gave them to the cache.

  That has a place for each folder, and what was there last.
  """
  folder = pictures.folder.resolve()
  return cached(
    f'{folder.name[:40]}-{digest(str(folder))}',
    lambda: decode(name, pictures),
    key=pictures.key,
  )


def decode(name: str, pictures: Pictures) -> list[np.ndarray]:
  """Decodes all pictures: uint8 `[n, height, width, channels]`, and labels.

  One channel if all are grey, else three; transparency is dropped. A picture
  stands as its camera was held.

  Raises:
    DataError: for a picture that cannot be read, has more than 8 bits in a
      channel, or not the size of the first one.
  """
  from rich.markup import escape
  from rich.progress import track

  first: tuple[str, tuple[int, ...]] | None = None
  arrays: list[list[np.ndarray]] = []
  for split, paths in zip(_SPLITS, pictures.paths):
    arrays.append([])
    for path in track(paths, escape(f'decoding {name}, {split}')):
      file = str(path.relative_to(pictures.folder))
      try:
        pixels = _decode_file(path)
      except Exception as error:  # Pillow raises what its decoders raise.
        reason = ' '.join(str(error).rstrip('.').split())
        raise DataError(
          f'dataset={name}: expected a picture of 8 bits a channel in {file} '
          f'({reason}).'
        ) from error
      size = pixels.shape[:2]
      first = first or (file, size)
      if size != first[1]:
        sizes = [f'{w} x {h} in {f}' for f, (h, w) in (first, (file, size))]
        raise DataError(
          f'dataset={name}: expected pictures of one size, got '
          f'{" and ".join(sizes)}.'
        )
      arrays[-1].append(pixels)
  channels = max(x.shape[-1] for split in arrays for x in split)
  spread = lambda x: np.broadcast_to(x, (*x.shape[:2], channels))
  train, test = (np.stack([spread(x) for x in split]) for split in arrays)
  return [train, pictures.labels[0], test, pictures.labels[1]]


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  """What a folder holds, sorted; not what systems leave in it unasked."""
  found = sorted(folder.iterdir(), key=lambda path: path.name)
  left = ('Thumbs.db', 'desktop.ini')
  return [p for p in found if p.name[0] != '.' and p.name not in left]


def _in_class(
  start: str, folder: pathlib.Path, path: pathlib.Path
) -> list[pathlib.Path]:
  found = _visible(path)
  for file in found:
    if file.suffix.lower() not in _ENDINGS or not file.is_file():
      raise DataError(
        f'{start} pictures {", ".join(_ENDINGS)}, got '
        f'{file.relative_to(folder)}.'
      )
  return found


def _key(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> str:
  """Of the names, sizes and times of files."""
  state = hashlib.sha256()
  for path in paths:
    stat = path.stat()
    line = path.relative_to(folder), stat.st_size, stat.st_mtime_ns
    state.update(repr(line).encode())
  return state.hexdigest()


def _decode_file(path: pathlib.Path) -> np.ndarray:
  """One picture in uint8, `[height, width, 1 or 3]`."""
  from PIL import Image
  from PIL import ImageOps

  with Image.open(path, formats=('PNG', 'JPEG')) as file:
    picture = ImageOps.exif_transpose(file)
    if picture.mode in ('1', 'L', 'LA'):
      return np.asarray(picture.convert('L'))[..., None]
    # Those of 16 or 32 bits would turn white.
    if picture.mode not in ('P', 'RGB', 'RGBA', 'CMYK', 'YCbCr'):
      raise ValueError(f'its mode is {picture.mode}')
    # A palette with transparency is not one step from RGB.
    if picture.mode == 'P':
      picture = picture.convert('RGBA')
    return np.asarray(picture.convert('RGB'))
