"""The folder of a run: a new one, its lock, and whether a run may go on."""

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

from mopt.training.config import Config
from mopt.training.files import fingerprint
from mopt.training.files import UNFINISHED
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss
from mopt.training.settings import marked
from mopt.training.settings import setting
from mopt.training.signals import EXIT_CODE
from mopt.training.signals import GRACE


class Busy(ValueError):
  """Another process is at work in a folder."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run or search is, and whether it goes on there."""

  workdir: str | None = setting(
    None,
    'running',
    'Where the results go: a new or empty folder, made if need be (default: '
    'runs/<time>).',
  )
  resume: bool = setting(
    False,
    'running',
    'Go on in --workdir, where a run or search was interrupted: the end is the '
    f'same. Only {", ".join(marked(Config, "may_change"))} may change, and of '
    f'a search {" and ".join(marked(Config, "search_may_change"))}. Ctrl-C or '
    'SIGTERM interrupts: the epoch is finished, or left after '
    f'{GRACE:g} s, and the exit code is {EXIT_CODE}; a second signal stops at '
    'once.',
  )


def make_workdir(name: str | None) -> pathlib.Path:
  """A folder that can be written to and holds no run, made if need be.

  Args:
    name: of the folder, whose parents are made, too; `None` for runs/<time>.

  Raises:
    ValueError: names the folder, and says what is wrong with it.
  """
  if name is None:
    now = datetime.datetime.now()
    workdir = pathlib.Path('runs') / f'{now:%Y-%m-%d_%H-%M-%S}'
  else:
    workdir = pathlib.Path(os.path.expanduser(name))
  _check_letters(workdir)
  wanted = 'expected a new or empty folder that can be written to'
  if not name and name is not None:
    raise ValueError(f'workdir=: {wanted}.')
  if str(workdir).startswith('~'):  # Or it would be made here.
    raise ValueError(f'workdir={workdir}: {wanted}; there is no such user.')
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # What is unfinished is of a run that was killed before it had begun.
    if not all(p.name.startswith(UNFINISHED) for p in workdir.iterdir()):
      raise ValueError(f'workdir={workdir}: {wanted}; this one has files.')
    tempfile.TemporaryFile(dir=workdir).close()
  except OSError as error:
    reason = error.strerror
    raise ValueError(f'workdir={workdir}: {wanted}; {reason}.') from None
  return workdir


def find_workdir(name: str | None) -> pathlib.Path:
  """The folder of a run or search that is to go on, if there is one.

  Raises:
    ValueError: without a name, or for one with letters that no run has.
  """
  if not name:
    raise ValueError('resume=true: expected --workdir, the folder to go on in.')
  workdir = pathlib.Path(os.path.expanduser(name))
  _check_letters(workdir)
  return workdir


def _check_letters(workdir: pathlib.Path) -> None:
  """Raises unless a folder can be shown, and made, and hold checkpoints.

  Those want UTF-8 of the whole path, whatever the file system takes.
  """
  path = str(workdir.absolute())
  output = getattr(sys.stdout, 'encoding', None) or 'utf-8'
  try:
    path.encode()
    os.fsencode(path)
    str(workdir).encode(output)
    is_good = '\0' not in path
  except UnicodeEncodeError:
    is_good = False
  if not is_good:
    raise ValueError(
      f'workdir={workdir}: expected letters that UTF-8, the output ({output}) '
      f'and the file system ({sys.getfilesystemencoding()}) can encode, and no '
      'null byte.'
    )
  # Orbax takes them for a pattern, and would not find its checkpoints.
  if '[' in path or ']' in path:
    raise ValueError(
      f'workdir={workdir}: expected no [ or ] in {path}, where checkpoints '
      'could not be read.'
    )


def start_fingerprint(config: Config) -> str | None:
  """Of the file with the network that a run begins with, if it has one.

  Raises:
    ValueError: if it cannot be read.
  """
  if config.init is None:
    return None
  try:
    return fingerprint(os.path.expanduser(config.init))
  except (OSError, ValueError) as error:
    raise ValueError(
      f'init={config.init}: expected a file that can be read ({error}).'
    ) from error


def check_settings(
  config: Config,
  workdir: str | os.PathLike,
  data: str | None = None,
  loss: Loss = cross_entropy,
) -> list[str]:
  """Raises unless a folder holds a run or search with these settings.

  Args:
    config: the settings.
    workdir: the folder.
    data: the fingerprint of the data, see `mopt.training.data.fingerprint`; in
      a folder that has none any data will do.
    loss: of the run.

  Returns:
    A line for each setting that differs, and may.

  Raises:
    ValueError: names the first setting that differs and must not, or the data
      set or the file of `init` if it is not what it was, or says that nothing
      is there.
  """
  path = pathlib.Path(workdir) / 'config.json'
  try:
    before = json.loads(path.read_text())
    differ = {
      field.name: before.get(field.name, field.default)
      for field in dataclasses.fields(Config)
    }
    environment = before.get('environment', {})
    data_before = environment.get('data', data)
    start_before = environment.get('init')
  except (OSError, ValueError, AttributeError) as error:
    raise ValueError(
      f'workdir={workdir}: expected the folder of a run to resume ({error}).'
    ) from error
  may_change = marked(Config, 'may_change')
  # A grid is made of the number of its trainings.
  if config.search not in ('none', 'grid'):
    may_change += marked(Config, 'search_may_change')
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
  if data is not None and data != data_before:
    raise ValueError(
      f'dataset={config.dataset}: expected the data of {path}, with the '
      f'fingerprint {data_before}, got {data}; or another workdir.'
    )
  # What a search keeps of a level does not say: its own folder does.
  start = None if start_before is None else start_fingerprint(config)
  if start != start_before:
    raise ValueError(
      f'init={config.init}: expected the file that {path} has begun with, with '
      f'the fingerprint {start_before}, got {start}; or another workdir.'
    )
  check_columns(workdir, loss)
  return lines


def check_columns(
  workdir: str | os.PathLike, loss: Loss = cross_entropy
) -> None:
  """Raises if a table or a log has columns of other names.

  Raises:
    ValueError: names the file, of an older version or another loss; half a log
      would be of the old names.
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
    names = {f'{name}_train' for name in (loss.name, loss.score_name)}
    # Without any it is no table of a run: others say so.
    found = set(re.findall(r'\b[^\W\d]\w*_train\b', head))
    if found and names - found and head.endswith('\n'):
      raise ValueError(
        f'{path}: expected the columns {" and ".join(sorted(names))} of this '
        f'loss, got {", ".join(sorted(found))}; or another workdir.'
      )


def _as_json(value):
  return json.loads(json.dumps(value))  # Tuples within tuples are lists.


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
