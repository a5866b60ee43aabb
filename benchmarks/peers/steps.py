"""A training step of LeNet-5, by this project and by others."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
from typing import Any

import numpy as np

from benchmarks.peers import ours
from benchmarks.peers.task import check_same
from benchmarks.peers.task import one_step
from benchmarks.peers.task import Task
from benchmarks.peers.task import Trainer
from benchmarks.peers.task import Ways
from benchmarks.peers.task import Weights

OURS = {False: 'mopt adam', True: 'mopt madam'}
# Module, its function of ways, and what is special about the task.
PEERS = {
  'PyTorch eager': ('pytorch', 'eager', {}),
  'PyTorch compiled': ('pytorch', 'compiled', {}),
  'Keras, callback': ('keras_fit', 'fit', {}),
  'Keras, no pruning': ('keras_fit', 'fit', dict(prunes=False)),
  'TorchJD MGDA': ('torchjd_mgda', 'eager', dict(is_mgda=True)),
}
# What a ratio is to be at least, or at most, and what we hope for.
AIMS = {
  'PyTorch eager': (2.5, 5.0),
  'TorchJD MGDA': (5.0, 10.0),
  'Keras, callback': (9.0, 20.0),
  'mopt madam': (1.15, 1.05),
}


@dataclasses.dataclass
class Row:
  """A trainer that is timed, or the reason why there is none."""

  name: str
  task: Task
  trainer: Trainer | None = None
  way: str | None = None
  why: str | None = None
  times: list[float] = dataclasses.field(default_factory=list)

  def describe(self) -> dict[str, Any]:
    batch, steps = self.task.batch, self.task.steps
    row = dict(name=self.name, batch=batch, ms_step=None, iqr_ms=None)
    row |= dict(images_s=None, steps=steps, n=len(self.times))
    row |= dict(way=self.way, why=self.why)
    if self.times:
      low, median, high = np.percentile(self.times, [25, 50, 75]) / steps
      row |= dict(ms_step=1e3 * median, iqr_ms=1e3 * (high - low))
      row |= dict(images_s=batch / median)
    return row


@functools.cache
def _reference(task: Task) -> tuple[Weights, Trainer]:
  """Our weights before a step, and ours after it."""
  trainer = ours.Trainer(task)
  weights = trainer.weights()
  trainer.epoch()
  return weights, trainer


def check(task: Task, make: Callable[[Task, Weights], Trainer]) -> None:
  """That the gradients and the pruning of a peer are ours."""
  task = one_step(task.is_mgda, task.prunes)
  weights, reference = _reference(task)
  theirs = make(task, weights)
  theirs.epoch()
  check_same(task, reference, theirs)


def fastest(task: Task, ways: Ways, weights: Weights, is_quick: bool) -> str:
  """The name of the way with the shortest of some short epochs."""
  if is_quick:
    return next(iter(ways))
  short = dataclasses.replace(task, steps=min(task.steps, 20))
  times = {}
  for name, make in ways.items():
    trainer = make(short, weights)
    trainer.epoch()
    times[name] = trainer.epoch()
    # Two threads may take ten times as long as one; that needs no more proof.
    if times[name] < 2 * min(times.values()):
      times[name] = min(times[name], *(trainer.epoch() for _ in range(3)))
  return min(times, key=times.get)


def peer_row(name: str, task: Task, weights: Weights, is_quick: bool) -> Row:
  module, function, special = PEERS[name]
  task = dataclasses.replace(task, **special)
  row = Row(name, task)
  try:
    module = importlib.import_module(f'benchmarks.peers.{module}')
    ways = getattr(module, function)(task)
    row.way = fastest(task, ways, weights, is_quick)
    check(task, ways[row.way])
    row.trainer = ways[row.way](task, weights)
    row.trainer.epoch()
  except ImportError as error:
    row.why = f'not installed: {_line(error)}'
  except RuntimeError as error:  # No compiler, say; the others may run.
    row.why = f'does not run here: {type(error).__name__}: {_line(error)}'
  return row


def _line(error: Exception) -> str:
  lines = str(error).strip().splitlines()
  return lines[0] if lines else ''


def measure(
  batch: int, steps: int, rounds: int, is_quick: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Rows of times, and of ratios; in each round all train for an epoch."""
  rows = []
  for is_mgda, name in OURS.items():
    task = Task(batch, steps, is_mgda)
    rows.append(Row(name, task, ours.Trainer(task)))
  weights = rows[0].trainer.weights()
  task = rows[0].task
  rows += [peer_row(name, task, weights, is_quick) for name in PEERS]
  running = [row for row in rows if row.trainer]
  for row in running:
    row.trainer.epoch()
  random = np.random.default_rng(0)
  for _ in range(rounds):
    for i in random.permutation(len(running)):
      running[i].times.append(running[i].trainer.epoch())
  return [row.describe() for row in rows], ratios(rows)


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Of peers to ours that does the same, taken round by round."""
  times = {row.name: np.array(row.times) for row in rows if row.times}
  found = []
  for row in rows:
    if row.name not in times or row.name == OURS[False]:
      continue
    # Ours with MAdam is itself compared with Adam on the weighted sum.
    is_peer = row.name in PEERS
    base = OURS[row.task.is_mgda and is_peer]
    low, ratio, high = np.percentile(
      times[row.name] / times[base], [25, 50, 75]
    )
    least, aim = AIMS.get(row.name, (None, None))
    found.append(
      dict(name=f'{row.name} / {base}', batch=row.task.batch, ratio=ratio)
      | dict(low=low, high=high, least=least, aim=aim)
    )
  return found
