"""Checkpoints that are whole or not used.

Orbax writes them, in the background and under another name until they are
complete. It does not notice a bit that has flipped since then: so a last file
holds the SHA-256 of all others, and what does not agree with it is not read.
"""

from collections.abc import Callable
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import threading
from typing import Any

import jax
import numpy as np

from mopt.training import files

PyTree = Any

_DIGESTS = 'sha256.json'


class Damaged(ValueError):
  """No checkpoint can be used."""


class Checkpoints:
  """The checkpoints of a run, one folder per epoch, named by its number.

  Two are kept, and the one with the largest score. Before the first one is
  written, what saves have left that were killed is deleted, and all that cannot
  be used: Orbax would leave it as it is, and count it as one of the two.

  Args:
    folder: made at the first `save`.
    start: the number of epochs that were done before; later checkpoints are
      those that `restore` has refused.
  """

  def __init__(self, folder: str | os.PathLike, start: int):
    self.folder = pathlib.Path(folder).resolve()
    self.start = start
    self._manager: Any = None
    self._thread: threading.Thread | None = None
    self._error: Exception | None = None

  def save(self, epoch: int, tree: PyTree, score: float) -> None:
    """Starts to write a tree of NumPy arrays.

    Raises:
      OSError: if this or the last one cannot be written.
    """
    self.finish()
    # Imported late: it takes seconds, which the first epoch would wait for.
    import orbax.checkpoint as ocp

    try:
      if self._manager is None:
        _clear(self.folder, self.start)
        self._manager = _make_manager(self.folder)
      # Orbax cannot write arrays without entries.
      leaves = {k: x for k, x in _named(tree).items() if x.size}
      is_saved = self._manager.save(
        epoch, args=ocp.args.StandardSave(leaves), metrics={'score': score}
      )
      if not is_saved:
        raise ValueError('there is a later checkpoint')
    except Exception as error:
      raise OSError(f'{self.folder}/{epoch}: {error}') from error
    self._thread = threading.Thread(target=self._seal, args=(epoch,))
    self._thread.start()

  def _seal(self, epoch: int) -> None:
    try:
      self._manager.wait_until_finished()
      digests = _digests(self.folder / str(epoch))
      path = self.folder / str(epoch) / _DIGESTS
      files.write_text(path, json.dumps(digests))
    except Exception as error:  # For the thread that called.
      self._error = error

  def finish(self) -> None:
    """Waits until everything is on disk.

    Raises:
      OSError: if it could not be written.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    if self._error is not None:
      error, self._error = self._error, None
      raise OSError(f'{self.folder}: {error}') from error

  def close(self) -> None:
    """`finish`, and gives back what Orbax holds."""
    try:
      self.finish()
    finally:
      manager, self._manager = self._manager, None
      if manager is not None:
        # It repeats, as another class, the error that was raised above.
        with contextlib.suppress(Exception):
          manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.close()


def restore(
  folder: str | os.PathLike,
  template: PyTree,
  warn: Callable[[str], None],
) -> tuple[int, PyTree] | None:
  """Reads the newest checkpoint that is whole.

  Args:
    folder: as given to `Checkpoints`.
    template: a tree of arrays with the structure, shapes and dtypes that are
      expected.
    warn: called with a line for each checkpoint that is damaged or foreign.

  Returns:
    The epoch and the tree, in NumPy; `None` if no checkpoint was ever finished.

  Raises:
    Damaged: if there are checkpoints, and none of them can be used.
  """
  folder = pathlib.Path(folder).resolve()
  epochs = sorted(
    (int(path.name) for path in folder.glob('*') if path.name.isdecimal()),
    reverse=True,
  )
  for epoch in epochs:
    path = folder / str(epoch)
    reason = _damage(path)
    if reason is None:
      try:
        return epoch, _read(path, template)
      except Exception as error:  # Orbax has no class of its own for it.
        reason = ' '.join(str(error).split())[:200]
    warn(f'{path}: not used, {reason}.')
  if not any((folder / str(epoch) / _DIGESTS).exists() for epoch in epochs):
    return None
  raise Damaged(
    f'{folder}: expected a checkpoint that is whole; delete the folder to '
    'start anew.'
  )


def _clear(folder: pathlib.Path, start: int) -> None:
  """Deletes what no run can use, and what is later than `start`."""
  for path in folder.glob('*'):
    is_used = path.name.isdecimal() and int(path.name) <= start
    is_ours = path.name.isdecimal() or '.orbax-checkpoint-tmp' in path.name
    if is_ours and not (is_used and _damage(path) is None):
      shutil.rmtree(path)


@functools.cache
def _ignore_closed_loops() -> None:
  """Keeps Orbax from printing, if two arrays of a save fail, a traceback."""
  before = sys.unraisablehook

  def hook(unraisable, /):
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

  sys.unraisablehook = hook


def _make_manager(folder: pathlib.Path):
  import orbax.checkpoint as ocp
  from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

  score = lambda metrics: metrics['score']
  policy = keep.AnyPreservationPolicy(
    [keep.LatestN(2), keep.BestN(get_metric_fn=score, n=1)]
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    best_fn=score,  # Else Orbax does not write it, and keeps all without one.
    multiprocessing_options=_alone(),
    create=False,
  )
  folder.mkdir(parents=True, exist_ok=True)
  _ignore_closed_loops()
  return ocp.CheckpointManager(folder, options=options)


def _alone():
  """Tells Orbax that other processes have no part in it."""
  import orbax.checkpoint as ocp

  mine = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=mine,
    active_processes={mine},
    barrier_sync_key_prefix=f'process_{mine}',
  )


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  is_ours = lambda name: name == _DIGESTS or name.startswith(files.UNFINISHED)
  return sorted(
    file
    for file in path.rglob('*')
    if file.is_file() and not (file.parent == path and is_ours(file.name))
  )


def _digests(path: pathlib.Path) -> dict[str, str]:
  # With the epoch in the names: that of a folder cannot be another one's.
  return {
    file.relative_to(path.parent).as_posix(): hashlib.sha256(
      file.read_bytes()
    ).hexdigest()
    for file in _files(path)
  }


def _damage(path: pathlib.Path) -> str | None:
  """What is wrong with the files of a checkpoint."""
  try:
    expected = json.loads((path / _DIGESTS).read_text())
    found = _digests(path)
    names = sorted(expected.keys() | found.keys())
    differ = [n for n in names if expected.get(n) != found.get(n)]
  except FileNotFoundError:
    return f'{_DIGESTS} is missing: it was not finished'
  except (OSError, ValueError, AttributeError) as error:
    return f'{_DIGESTS} cannot be read ({error})'
  return f'{differ[0]} is damaged' if differ else None


def _named(tree: PyTree) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def _read(path: pathlib.Path, template: PyTree) -> PyTree:
  import orbax.checkpoint as ocp

  expected = _named(template)
  reading = ocp.StandardCheckpointer(multiprocessing_options=_alone())
  with reading as reader:
    # Without the template, to which Orbax would pad and cast.
    found = reader.restore(path / 'default')
  found = {key: x for key, x in expected.items() if not x.size} | found
  for key in sorted(expected.keys() | found.keys()):
    described = [
      f'{leaves[key].dtype}{leaves[key].shape}' if key in leaves else 'nothing'
      for leaves in (found, expected)
    ]
    if described[0] != described[1]:
      raise ValueError(f'{key} is {described[0]}, expected {described[1]}')
  leaves = [found[key] for key in expected]
  return jax.tree.unflatten(jax.tree.structure(template), leaves)
