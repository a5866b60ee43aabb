"""What a run leaves behind: rows, files, and the way to read them."""

from collections.abc import Sequence
import csv
import json
import math
import os
import pathlib
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

import mopt
from mopt.masks import path_name
from mopt.training.data import DAMAGED_ARCHIVE
from mopt.training.data import normalise

PyTree = Any

# What a file is called until it is whole.
UNFINISHED = '.unfinished-'

SPLIT_NAMES = {'train': 'training', 'val': 'validation', 'test': 'test'}


class Network(NamedTuple):
  """A trained network, as `load` returns it."""

  # Nested dictionaries of NumPy arrays: params and, if any, batch_stats.
  variables: dict[str, PyTree]
  model: str  # For `models.create`.
  num_classes: int
  image_shape: tuple[int, ...]  # (height, width, channels)
  mean: float  # Of the pixels, see `mopt.training.normalise`.
  std: float

  @property
  def params(self) -> PyTree:
    """What was trained."""
    return self.variables['params']

  def preprocess(self, images: np.ndarray) -> jax.Array:
    """From pixels 0..255 `[batch, height, width, channels]` to an input."""
    if tuple(images.shape[1:]) != self.image_shape:
      raise ValueError(
        f'expected images [batch, {", ".join(map(str, self.image_shape))}], '
        f'got shape {tuple(images.shape)}.'
      )
    return normalise(images, self.mean, self.std)


def save(path: str | os.PathLike, network: Network) -> None:
  """Writes a network as .npz, whole or not at all."""
  arrays = {
    path_name(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path(network.variables)
  }
  about = network._replace(variables={})._asdict() | {'names': list(arrays)}
  # Compressed, since most of it is zeros.
  _replace(
    path,
    lambda file: np.savez_compressed(
      file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays
    ),
  )


def load(path: str | os.PathLike) -> Network:
  """Reads a network that `train.py` has written.

  Nothing is unpickled, so a file from a stranger can at worst be refused.

  Args:
    path: a .npz file of the folder `members` of a run.

  Returns:
    A `Network`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no network, or damaged.
  """
  try:
    # Opened here, for np.load leaves a file open that is no archive.
    with (
      pathlib.Path(path).open('rb') as stream,
      np.load(stream, allow_pickle=False) as file,
    ):
      about = json.loads(str(file['about']))
      # A damaged index of the archive may have lost some.
      if missing := set(about['names']) - set(file.files):
        raise ValueError(f'missing entry {min(missing)!r}')
      variables: dict[str, Any] = {'params': {}}
      for name in file.files:
        if name == 'about':
          continue
        *parents, last = name.split('/')
        known = parents and parents[0] in ('params', 'batch_stats')
        if not known or file[name].dtype.kind != 'f':
          raise ValueError(f'unexpected entry {name!r}')
        folder = variables
        for parent in parents:
          folder = folder.setdefault(parent, {})
        folder[last] = file[name]
    return Network(
      variables=variables,
      model=str(about['model']),
      num_classes=int(about['num_classes']),
      image_shape=tuple(int(n) for n in about['image_shape']),
      mean=float(about['mean']),
      std=float(about['std']),
    )
  except FileNotFoundError:
    raise
  # The last three: its entries are not those of a network.
  except (*DAMAGED_ARCHIVE, LookupError, AttributeError, TypeError) as error:
    raise ValueError(
      f'{os.fspath(path)}: expected a network written by train.py ({error}).'
    ) from error


def is_collapsed(row: dict[str, Any]) -> bool:
  """Whether a member has failed: diverged, at chance, or without a layer.

  A dense layer without a nonzero weight passes nothing on, so the network
  answers the same to every picture. Chance, the share of the most frequent
  class, is what `status` knows of.
  """
  if row.get('status', 'ok') != 'ok':
    return True
  layers = [n for name, n in row.items() if name.startswith('nonzeros_')]
  finite = math.isfinite(row['ce_train']) and math.isfinite(row['l1_norm'])
  return not finite or min(layers, default=row['nonzeros']) == 0


def mark_front(rows: Sequence[dict[str, Any]], split: str) -> None:
  """Sets `pareto` and `knee` of each row, on (error, log nonzeros).

  Args:
    rows: changed in place. Collapsed members are left out.
    split: whose accuracy selects: `'train'`, `'val'` or `'test'`.
  """
  alive = [row for row in rows if not is_collapsed(row)]
  points = [(1 - row[f'acc_{split}'], row['nonzeros']) for row in alive]
  knee = mopt.knee(points, method='chord', scale='log')
  keep = mopt.nondominated(points)
  for row in rows:
    row.update(pareto=0, knee=0)
  for index, row in enumerate(alive):
    row.update(pareto=int(keep[index]), knee=int(index == knee))


def weight_histogram(weights: np.ndarray, bins: int = 100) -> dict[str, Any]:
  """How weights are distributed, but for those that are exactly 0.

  Args:
    weights: any shape.
    bins: number of equal bins between the least and the largest weight that is
      finite and not 0.

  Returns:
    `low` and `high`, the ends of the bins, `counts` in them, and the number of
    `zeros`.
  """
  rest = weights[np.isfinite(weights) & (weights != 0)].astype(np.float64)
  low, high = (
    (float(rest.min()), float(rest.max())) if rest.size else (0.0, 0.0)
  )
  if low < high:
    counts, _ = np.histogram(rest, bins, (low, high))
  else:  # NumPy widens the range, unless the weights are too large for that.
    counts = np.zeros(bins, int)
    counts[bins // 2] = rest.size
  zeros = int(np.sum(weights == 0))
  return {'low': low, 'high': high, 'counts': counts.tolist(), 'zeros': zeros}


def write_csv(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> None:
  """Writes rows as CSV, whole or not at all; empty cells for `None`, NaN."""

  def cell(value):
    missing = value is None or (isinstance(value, float) and np.isnan(value))
    return '' if missing else value

  def write(file):
    # A .csv file of the csv module wants text, _replace hands out bytes.
    lines = [','.join(rows[0])]
    lines += [','.join(str(cell(v)) for v in row.values()) for row in rows]
    file.write(('\n'.join(lines) + '\n').encode())

  _replace(path, write)


def read_csv(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads what `write_csv` has written; `None` for an empty cell."""

  def value(cell):
    for number in (int, float):
      try:
        return number(cell)
      except ValueError:
        pass
    return cell or None

  with pathlib.Path(path).open(newline='') as file:
    return [
      {name: value(cell) for name, cell in row.items()}
      for row in csv.DictReader(file)
    ]


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a results.csv: what was not measured is NaN."""
  return [
    {k: math.nan if v is None and k != 'l1' else v for k, v in row.items()}
    for row in read_csv(path)
  ]


def write_json(path: str | os.PathLike, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2) + '\n')


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes a file, whole or not at all."""
  _replace(path, lambda file: file.write(text.encode()))


def append_jsonl(
  path: str | os.PathLike, records: Sequence[dict[str, Any]]
) -> None:
  """Appends a line of JSON per record; NaN and infinities become null."""

  def plain(value):
    is_bad = isinstance(value, float) and not math.isfinite(value)
    return None if is_bad else value

  lines = [
    json.dumps({k: plain(v) for k, v in record.items()}, allow_nan=False)
    for record in records
  ]
  with pathlib.Path(path).open('a') as file:
    file.write(''.join(line + '\n' for line in lines))


def _replace(path: str | os.PathLike, write) -> None:
  """Writes a file under another name and then moves it into place."""
  path = pathlib.Path(path)
  number, name = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
  try:
    with open(number, 'wb') as file:
      write(file)
      file.flush()  # Here a full disk may show.
  except BaseException:
    os.unlink(name)  # It is closed, or Windows would not.
    raise
  os.chmod(name, 0o644)
  os.replace(name, path)
