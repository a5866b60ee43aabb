"""Runs pieces by train.py, and keeps what came out of each as one JSON."""

from collections.abc import Callable, Sequence
import json
import math
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np

from benchmarks.paper.plan import Piece
from mopt.training.files import read_csv
from mopt.training.files import write_text
from mopt.training.workdir import Busy
from mopt.training.workdir import locked

ROOT = pathlib.Path(__file__).parents[2]
# Fig. 5(c) is all that is made of histograms.
_HISTOGRAMS = {'weight_l1': 5e-5, 'layer': 'layer3'}


class Failed(Exception):
  """A piece did not come to its end; carries the exit code."""

  def __init__(self, message: str, code: int):
    super().__init__(message)
    self.code = code


class Places(NamedTuple):
  """Where the results of pieces are kept, and where they are trained."""

  results: pathlib.Path
  work: pathlib.Path

  def json(self, piece: Piece) -> pathlib.Path:
    return self.results / f'{piece.name}.json'


class Result(NamedTuple):
  """What a piece has left."""

  name: str
  quick: bool
  command: list[str]
  config: dict[str, Any]
  rows: list[dict[str, Any]]  # Of results.csv; NaN where a cell is empty.
  epochs: dict[str, np.ndarray]  # Of metrics.jsonl, [epochs * members] each.
  histograms: list[dict[str, Any]]
  # Of a search: the rows of the knee, trained in full. Then `rows` are those of
  # the search, and there are no epochs and histograms.
  knee: list[dict[str, Any]] = []


Call = Callable[[Sequence[str]], int]


def call(command: Sequence[str]) -> int:
  """Runs a command from where its flag files are found; its exit code."""
  return subprocess.run(command, cwd=ROOT).returncode


def train(
  piece: Piece,
  places: Places,
  data_dir: str | None = None,
  quick: bool = False,
  call: Call = call,
) -> bool:
  """Trains a piece, unless its result is there; whether it had to.

  Raises:
    Failed: if train.py ends with another exit code than 0.
  """
  if places.json(piece).exists():
    return False
  places.work.mkdir(parents=True, exist_ok=True)
  places.results.mkdir(parents=True, exist_ok=True)
  lock = places.work / f'{piece.name}.locked'
  lock.mkdir(exist_ok=True)
  try:
    with locked(lock):
      _train(piece, places, data_dir, quick, call)
  except Busy as error:
    raise Failed(f'{piece.name}: being trained already.', 1) from error
  return True


def _train(piece, places, data_dir, quick, call) -> None:
  workdir = places.work / piece.name
  if workdir.exists():  # Of a run that was cut off.
    shutil.rmtree(workdir)
  folders = [] if data_dir is None else [f'--data_dir={data_dir}']
  folders.append(f'--workdir={os.path.relpath(workdir, ROOT)}')
  arguments = ['train.py', *piece.flags, *folders]
  print('$', shlex.join(['python', *arguments]), flush=True)
  code = call([sys.executable, *arguments])
  if code:
    # Negative: ended by a signal, which shells add to 128.
    code = code if code > 0 else 128 - code
    raise Failed(f'{piece.name}: train.py ended with exit code {code}.', code)
  try:
    content = gather(workdir, piece, quick)
  except (OSError, ValueError, KeyError, IndexError) as error:
    reason = f'{type(error).__name__}: {error}'
    raise Failed(f'{piece.name}: left no result: {reason}.', 1) from error
  _write(places.json(piece), content)
  shutil.rmtree(workdir)


def gather(workdir: pathlib.Path, piece: Piece, quick: bool) -> dict[str, Any]:
  """The files of a run as one value, made of what JSON knows.

  A folder with data is nobody else's: `DIR` stands for it.
  """
  config = json.loads((workdir / 'config.json').read_text())
  folder = [] if config['data_dir'] is None else ['--data_dir=DIR']
  config['data_dir'] = 'DIR' if folder else None
  about = {
    'name': piece.name,
    'quick': quick,
    'command': ['python', 'train.py', *piece.flags, *folder],
    'config': config,
    'rows': _read_rows(workdir),
  }
  if config.get('search', 'none') != 'none':
    knees = sorted(workdir.glob('knee_l1_*'))
    knee = [row for folder in knees for row in _read_rows(folder)]
    return about | {'epochs': {}, 'histograms': [], 'knee': knee}
  records = _read_lines(workdir / 'metrics.jsonl')
  histograms = workdir / 'histograms.jsonl'
  return about | {
    'epochs': {
      name: [_short(record[name]) for record in records] for name in records[0]
    },
    'histograms': [
      {name: _short(value) for name, value in record.items()}
      for record in (_read_lines(histograms) if histograms.exists() else [])
      if all(record[name] == value for name, value in _HISTOGRAMS.items())
    ],
  }


def _read_rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  # The networks are not kept.
  return [
    {name: _finite(value) for name, value in row.items() if name != 'file'}
    for row in read_csv(folder / 'results.csv')
  ]


def load(path: pathlib.Path, quick: bool = False) -> Result:
  """Reads what `train` has left.

  Raises:
    Failed: for a file that is damaged, or of a quick run where a full one is
      expected, or the other way round.
  """
  try:
    content = json.loads(path.read_text())
    content = Result._field_defaults | content
    result = Result(**{name: content[name] for name in Result._fields})
    rows, knee = (
      [{k: _exact(k, v) for k, v in row.items()} for row in part]
      for part in (result.rows, result.knee)
    )
    epochs = {k: np.array(v, float) for k, v in result.epochs.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise Failed(
      f'{path}: expected a result of this benchmark ({error!r}); without the '
      'file it is trained anew.',
      2,
    ) from error
  if result.quick != quick:
    kinds = ('a full run', 'a --quick run')
    raise Failed(
      f'{path}: expected {kinds[quick]}, got {kinds[result.quick]}.', 2
    )
  return result._replace(rows=rows, knee=knee, epochs=epochs)


def merge(parts: Sequence[Result]) -> Result:
  """One result of those that share a seed and differ in their l1 weights."""
  first, *others = parts
  if not others:
    return first
  together = lambda name: [x for part in parts for x in getattr(part, name)]
  config = first.config | {
    'l1': [l1 for part in parts for l1 in part.config['l1']],
    'seconds': sum(part.config['seconds'] for part in parts),
  }
  check_alike([p._replace(config=p.config | {'l1': None}) for p in parts])
  environments = [part.config['environment'] for part in parts]
  machines = dict.fromkeys(tuple(e['devices']) for e in environments)
  # Each machine once, however many parts it has trained.
  devices = [device for machine in machines for device in machine]
  config['environment'] = environments[0] | {'devices': devices}
  return first._replace(
    config=config,
    rows=together('rows'),
    epochs={
      name: np.concatenate([part.epochs[name] for part in parts])
      for name in first.epochs
    },
    histograms=together('histograms'),
  )


def check_alike(results: Sequence[Result]) -> None:
  """Raises `Failed` unless these differ in nothing but the seed.

  A flag that one of them did not have yet makes no difference, nor does what
  came out.
  """
  theirs = {'data_dir', 'seed', 'environment', 'seconds', 'knee'}
  first, *others = results
  for other in others:
    for name in (first.config.keys() & other.config.keys()) - theirs:
      if first.config[name] != other.config[name]:
        raise Failed(
          f'{other.name}: expected {name}={first.config[name]}, as in '
          f'{first.name}, got {other.config[name]}; delete one of both.',
          2,
        )


def _finite(value: Any) -> Any:
  """JSON knows no other numbers."""
  is_bad = isinstance(value, float) and not math.isfinite(value)
  return None if is_bad else value


def _exact(name: str, value: Any) -> Any:
  """A number of a row, as it was meant.

  Six digits are what float32 can be trusted with: 9,890 hits of 10,000 come as
  0.98899996, which must not fall short of 0.989.
  """
  if value is None:
    # A weight that was found.
    return None if name.startswith('weight_') else math.nan
  return _short(value)


def _short(value: Any) -> Any:
  """Floats with six significant digits."""
  return float(f'{value:.6g}') if isinstance(value, float) else value


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes one row, column or setting a line, whole or not at all.

  That is readable in a diff, and a tenth of what an indent of 2 makes.
  """

  def lines(value):
    dump = lambda x: json.dumps(x, allow_nan=False)
    if isinstance(value, dict):
      items = [f'{dump(k)}: {dump(v)}' for k, v in value.items()]
      brackets = '{}'
    elif isinstance(value, list) and value and isinstance(value[0], dict):
      items, brackets = [dump(v) for v in value], '[]'
    else:
      return dump(value)
    return brackets[0] + '\n' + ',\n'.join(items) + '\n' + brackets[1]

  items = [f'{json.dumps(k)}: {lines(v)}' for k, v in content.items()]
  write_text(path, '{\n' + ',\n'.join(items) + '\n}\n')
