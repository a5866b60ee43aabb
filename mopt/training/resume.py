"""Going on in a folder: nobody else is in it, and its settings are ours."""

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import re
from typing import Any

from mopt.training.config import Config
from mopt.training.files import UNFINISHED

# What may be otherwise than when a run began: it changes no result but by
# rounding.
_MAY_CHANGE = ('data_dir', 'stream', 'parallel', 'profile', 'checkpoint_every')
# A search may get more trainings; but a grid is made of their number.
_MAY_CHANGE_SEARCH = ('levels', 'max_runs')


class Busy(ValueError):
  """Another process is at work in a folder."""


def check_settings(config: Config, workdir: str | os.PathLike) -> list[str]:
  """Raises unless a folder holds a run or search with these settings.

  Returns:
    A line for each setting that differs, and may.

  Raises:
    ValueError: names the first setting that differs and must not, or says that
      nothing is there, or files whose columns have other names.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    before = json.loads(path.read_text())
    differ = {
      field.name: before.get(field.name, field.default)
      for field in dataclasses.fields(Config)
    }
  except (OSError, ValueError, AttributeError) as error:
    raise ValueError(
      f'workdir={workdir}: expected the folder of a run to resume ({error}).'
    ) from error
  may_change = _MAY_CHANGE
  if config.search not in ('none', 'grid'):
    may_change += _MAY_CHANGE_SEARCH
  lines = []
  for name, old in differ.items():
    new = getattr(config, name)
    if _as_json(new) == _as_json(old):
      continue
    if name not in may_change:
      raise ValueError(
        f'{name}={new}: expected {old}, as in {path}, or another workdir.'
      )
    lines.append(f'{name}={new}, was {old}')
  check_columns(workdir)
  return lines


def check_columns(workdir: str | os.PathLike) -> None:
  """Raises if a table or a log was written when columns had other names.

  Raises:
    ValueError: names the file; half a log would be of the old names.
  """
  for name in ('results.csv', 'metrics.jsonl'):
    path = pathlib.Path(workdir) / name
    if not path.exists():
      continue
    with path.open(encoding='utf-8', errors='replace') as file:
      head = file.readline()
    # Where they were acc_train and accuracy; a line may be cut off.
    is_old = re.search(r'\bacc_train\b|"accuracy": ', head)
    if is_old and head.endswith('\n'):
      raise ValueError(
        f'{path}: expected columns as this version of mopt names them, such as '
        'accuracy_train; go on with the version that wrote it, or in another '
        'workdir.'
      )


def _as_json(value):
  return list(value) if isinstance(value, tuple) else value


@contextlib.contextmanager
def locked(workdir: str | os.PathLike) -> Iterator[None]:
  """Keeps a folder for one process, until it ends, however it does.

  On Windows, where a folder cannot be locked, a file in it is: it counts as
  unfinished, and is gone at the end.

  Raises:
    Busy: if another process has it.
  """
  try:
    import fcntl
  except ImportError:
    # Not tried on Windows itself. Its module is looked up by name since type
    # checkers know it there only.
    msvcrt: Any = importlib.import_module('msvcrt')
    path = pathlib.Path(workdir) / f'{UNFINISHED}lock'
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    lock = lambda: msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
  else:
    path = None
    file = os.open(workdir, os.O_RDONLY)
    lock = lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  try:
    lock()
  except OSError as error:
    os.close(file)
    raise Busy(
      f'workdir={workdir}: expected a folder that no other process is '
      'training in.'
    ) from error
  try:
    yield
  finally:
    os.close(file)
    if path is not None:
      # Unless another process has it open by now.
      with contextlib.suppress(OSError):
        path.unlink()
