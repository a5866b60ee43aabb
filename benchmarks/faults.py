"""What faults cost a run: kills, signals, flipped bits, a full disk, NaN.

  python -m benchmarks.faults           # a quarter of an hour on two cores
  python -m benchmarks.faults --quick   # one of each, in a minute

A small run of `train.py` (LeNet-5, digits of mnist5k, two l1 weights) is
trained once without a fault. What the others leave after theirs, resumed until
they are done, is compared with it byte for byte: results.csv, both logs and all
networks. Moments, places and sizes are random, from --seed. How to read it:

  * none: the same run again; without this the rest would mean nothing.
  * kill -9: at a moment of the epochs, or, less often, before the first of them
    or while it starts up. The other row: five kills, each of what had gone on.
  * SIGTERM, Ctrl-C: the exit code is 75, and nothing of an epoch is lost. Twice
    is at once: what no checkpoint has is trained again.
  * mutation: of one file of the newest checkpoint: a flipped bit, a cut, a
    deletion, an addition, or a swap with a file of the one before. Survived: it
    is not used, but one before it, or is what was saved nevertheless.
  * full disk: a tmpfs that is too small, or, where one must not mount it, a
    limit to the size of files. Survived: exit code 1 and one line, and with
    more space the run ends as if nothing had been.
  * NaN: a member meets NaN in its pictures or an infinite l1 norm, at a step of
    its own. Survived: its status says so, its weights are finite, and the
    members that meet nothing are those of a population without any.
  * second process: in the folder of a run that goes on; it must not start.

`lost` counts the tries that did not survive, and the file says how.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import csv
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.command import make_parser
from benchmarks.command import ROOT
from benchmarks.command import write
from benchmarks.step_cost import show
from benchmarks.step_cost import versions
import models
from mopt.training import checkpoints
from mopt.training import Config
from mopt.training import Job
from mopt.training import load
from mopt.training import load_dataset
from mopt.training import program as program_lib
from mopt.training import run
from mopt.training import signals
from mopt.training import step as step_lib

MUTATIONS = ('flip', 'cut', 'delete', 'add', 'swap')
_TRACES = ('results.csv', 'metrics.jsonl', 'histograms.jsonl')
# Where the phases of a run begin: it is a process, trains, has trained an
# epoch. Then comes its last checkpoint, and what it writes at its end.
_PHASES = ('.', 'config.json', 'metrics.jsonl')
# How often each fault is tried: in full, and for a look.
TRIED = {
  'none': (1, 0),
  'kill -9': (20, 1),
  'kill -9, five times': (3, 0),
  'SIGTERM, Ctrl-C': (6, 1),
  'SIGTERM twice': (3, 0),
  'mutation': (100, 20),
  'full disk': (6, 1),
  'NaN': (6, 2),
  'second process': (2, 1),
}
_Random = np.random.Generator


class Trainer:
  """Runs of `train.py` with the same settings, and the one without a fault."""

  def __init__(self, folder: pathlib.Path, settings: dict[str, Any]):
    self.folder = folder
    self.settings = settings
    self._env = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled')}
    self._env['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    self._env |= os.environ
    self.phases = (*_PHASES, f'checkpoints/{settings["epochs"]}')
    times = [time.monotonic()]
    with self.start('whole') as process:
      for file in self.phases[1:]:
        self.wait_for(process, 'whole', file)
        times.append(time.monotonic())
      _, errors = process.communicate()
    if process.returncode:
      raise RuntimeError(f'train.py, without a fault: {errors}')
    self.seconds = np.diff([*times, time.monotonic()]).tolist()
    self.traces = self.read('whole')

  @contextlib.contextmanager
  def start(self, name: str, *prefix: str) -> Iterator[subprocess.Popen]:
    """A process that begins, or goes on; it ends with the context."""
    workdir = self.folder / name
    flags = [f'--{k}={_flag(v)}' for k, v in self.settings.items()]
    if (workdir / 'config.json').exists():
      flags.append('--resume')
    elif workdir.exists():
      shutil.rmtree(workdir)  # It had not begun.
    command = [sys.executable, str(ROOT / 'train.py'), f'--workdir={workdir}']
    with subprocess.Popen(
      [*prefix, *command, *flags],
      env=self._env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    ) as process:
      try:
        yield process
      finally:
        process.kill()

  def wait_for(self, process: subprocess.Popen, name: str, file: str) -> None:
    """Until there is a file, or the process is done."""
    while process.poll() is None:
      if (self.folder / name / file).exists():
        return
      time.sleep(0.01)

  def finish(self, name: str) -> str | None:
    """Runs to the end; returns what is wrong with what is there then."""
    with self.start(name) as process:
      _, errors = process.communicate()
    if process.returncode:
      return f'exit code {process.returncode}: {errors[-300:]}'
    return self.difference(name)

  def read(self, name: str) -> dict[str, bytes]:
    workdir = self.folder / name
    paths = [workdir / name for name in _TRACES]
    paths += sorted((workdir / 'members').iterdir())
    return {str(p.relative_to(workdir)): p.read_bytes() for p in paths}

  def difference(self, name: str) -> str | None:
    found = self.read(name)
    names = sorted(found.keys() | self.traces.keys())
    differ = [n for n in names if found.get(n) != self.traces.get(n)]
    return f'{", ".join(differ)} differ' if differ else None


def _flag(value: Any) -> str:
  return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


def again(trainer: Trainer, random: _Random, name: str) -> str | None:
  del random
  return trainer.finish(name)


def kill(trainer: Trainer, random: _Random, name: str) -> str | None:
  phase = random.choice(4, p=(0.15, 0.15, 0.55, 0.15))
  while True:
    with trainer.start(name) as process:
      trainer.wait_for(process, name, trainer.phases[phase])
      seconds = random.uniform(0, trainer.seconds[phase])
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=seconds)
    if process.returncode == -signal.SIGKILL:
      return trainer.finish(name)
    shutil.rmtree(trainer.folder / name)  # It was done.


def kill_again(trainer: Trainer, random: _Random, name: str) -> str | None:
  for _ in range(5):
    with trainer.start(name) as process:
      # While it starts up, and while it trains.
      seconds = trainer.seconds[0] + random.uniform(-1, 3)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=max(0, seconds))
  return trainer.finish(name)


def interrupt(trainer: Trainer, random: _Random, name: str) -> str | None:
  number = (signal.SIGTERM, signal.SIGINT)[int(random.integers(2))]
  return _interrupt(trainer, random, name, [number])


def interrupt_twice(trainer: Trainer, random: _Random, name: str) -> str | None:
  return _interrupt(trainer, random, name, [signal.SIGTERM] * 2)


def _interrupt(trainer, random, name, numbers) -> str | None:
  while True:
    with trainer.start(name) as process:
      trainer.wait_for(process, name, trainer.phases[2])
      time.sleep(random.uniform(0, 0.8 * trainer.seconds[2]))
      for number in numbers:
        process.send_signal(number)
        time.sleep(0.01)
      _, errors = process.communicate()
    if (trainer.folder / name / 'results.csv').exists():
      shutil.rmtree(trainer.folder / name)  # It was in its last epoch.
      continue
    if process.returncode != signals.EXIT_CODE or 'Traceback' in errors:
      return f'exit code {process.returncode}: {errors[-300:]}'
    return trainer.finish(name)


def fill_disk(trainer: Trainer, random: _Random, name: str) -> str | None:
  """In a folder of its own, whose size is that of the disk."""
  whole = trainer.folder / 'whole'
  sizes = [p.stat().st_size for p in whole.rglob('*') if p.is_file()]
  folder = trainer.folder / name
  folder.mkdir()
  share = random.uniform(0.1, 0.9)
  mount = ['mount', '-t', 'tmpfs', '-o', f'size={int(share * sum(sizes))}']
  mount += ['tmpfs', str(folder)]
  is_disk = not subprocess.run(mount, capture_output=True).returncode
  prefix = []
  if not is_disk:
    limit = max(1, int(share * max(sizes) / 1024))
    prefix = ['bash', '-c', 'ulimit -f "$0"; exec "$@"', str(limit)]
  try:
    with trainer.start(f'{name}/run', *prefix) as process:
      _, errors = process.communicate()
    if process.returncode != 1 or errors.count('\n') != 1:
      return f'exit code {process.returncode}: {errors[-300:]}'
    if is_disk:
      mount[4] = 'remount,size=1g'
      subprocess.run(mount, check=True)
    return trainer.finish(f'{name}/run')
  finally:
    if is_disk:
      subprocess.run(['umount', str(folder)], check=True)


def start_second(trainer: Trainer, random: _Random, name: str) -> str | None:
  del random
  with trainer.start(name) as first:
    trainer.wait_for(first, name, trainer.phases[1])
    first.send_signal(signal.SIGSTOP)  # Or it would be done before.
    with trainer.start(name) as second:
      _, errors = second.communicate()
    first.send_signal(signal.SIGCONT)
    if second.returncode != 2 or 'no other process' not in errors:
      return f'the second exits with {second.returncode}: {errors[-300:]}'
    _, errors = first.communicate()
  if first.returncode:
    return f'the first exits with {first.returncode}: {errors[-300:]}'
  return trainer.difference(name)


PROCESSES: dict[str, Callable[[Trainer, _Random, str], str | None]] = {
  'none': again,
  'kill -9': kill,
  'kill -9, five times': kill_again,
  'SIGTERM, Ctrl-C': interrupt,
  'SIGTERM twice': interrupt_twice,
  'full disk': fill_disk,
  'second process': start_second,
}


def mutate(random: _Random, path: pathlib.Path, other: pathlib.Path) -> str:
  """Damages a file of a checkpoint, or swaps it with one of another."""
  kind = MUTATIONS[random.integers(len(MUTATIONS))]
  files = [
    sorted(file for file in folder.rglob('*') if file.is_file())
    for folder in (path, other)
  ]
  file, file_other = (some[random.integers(len(some))] for some in files)
  data = file.read_bytes()
  match kind:
    case 'flip':
      flipped = bytearray(data)
      flipped[random.integers(len(data))] ^= 1 << int(random.integers(8))
      file.write_bytes(flipped)
    case 'cut':
      file.write_bytes(data[: random.integers(len(data))])
    case 'delete':
      file.unlink()
    case 'add':
      (file.parent / 'added').write_bytes(random.bytes(20))
    case 'swap':
      file.write_bytes(file_other.read_bytes())
      file_other.write_bytes(data)
  return kind


def load_mutations(
  trainer: Trainer, random: _Random, tried: int
) -> Iterator[str | None]:
  """Of the newest checkpoint of the run without a fault, one at a time."""
  folder = trainer.folder / 'whole' / 'checkpoints'
  config = Config(**trainer.settings)
  job = Job(config, models.create(config.model), _load(config))
  program = program_lib.make_program(job._replace(devices=jax.devices()[:1]))
  template = program.layout.collect(program.init())
  epochs = sorted(int(path.name) for path in folder.iterdir())
  truth, copies = {}, trainer.folder / 'copies'
  for epoch in epochs:  # Alone, so that it is the newest.
    shutil.copytree(folder / str(epoch), copies / str(epoch))
    _, truth[epoch] = checkpoints.restore(copies, template, print)
    shutil.rmtree(copies)
  for _ in range(tried):
    shutil.copytree(folder, copies)
    newest, before = (copies / str(epoch) for epoch in epochs[:-3:-1])
    kind = mutate(random, newest, before)
    try:
      epoch, tree = checkpoints.restore(copies, template, lambda _: None)
      leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(truth[epoch]))
      same = all(x.tobytes() == y.tobytes() for x, y in leaves)
      yield None if same else f'{kind}: epoch {epoch} is another'
    except checkpoints.Damaged:
      yield None if kind == 'swap' else f'{kind}: nothing is left'
    shutil.rmtree(copies)


def _load(config: Config):
  return load_dataset(config.dataset, None, config.val_size, config.train_size)


@contextlib.contextmanager
def poisoned(where: dict[float, tuple[int, int, int]]) -> Iterator[None]:
  """Members of these l1 weights meet what is not finite.

  What is compiled does not depend on whether there are any.

  Args:
    where: for a weight the objective (1: NaN in the pictures, 2: an infinite
      norm), and the epoch and the step from 0.
  """
  step, make = step_lib._step, step_lib.make_objectives

  def poisoned_step(*args):
    *head, state, weights, batch, key, count, size, at = args
    is_now = {1: jnp.zeros((), bool), 2: jnp.zeros((), bool)}
    for weight, (objective, epoch, number) in where.items():
      is_there = (at[0] == epoch) & (at[1] == number)
      is_now[objective] |= (weights[1] == weight) & is_there
    batch = batch._replace(images=jnp.where(is_now[1], jnp.nan, batch.images))
    overflow = jnp.where(is_now[2], jnp.inf, 0.0)

    def overflowing(*args):
      objectives = make(*args)
      (norm,) = objectives.others
      others = (lambda params: norm(params) + overflow,)
      return objectives._replace(others=others)

    with mock.patch.object(step_lib, 'make_objectives', overflowing):
      return step(*head, state, weights, batch, key, count, size, at)

  with mock.patch.object(step_lib, '_step', poisoned_step):
    yield


def train_poisoned(
  trainer: Trainer, random: _Random, tried: int
) -> Iterator[str | None]:
  """As members of one population, and then another one without any."""
  config = Config(**trainer.settings)
  data = _load(config)
  steps = -(-config.train_size // config.batch_size)
  healthy, poison = config.l1, np.geomspace(2e-4, 3e-3, tried).tolist()
  where = {
    weight: (
      int(random.integers(1, 3)),
      int(random.integers(config.epochs)),
      int(random.integers(steps)),
    )
    for weight in poison
  }
  members = {}
  for name, factor in (('poisoned', 1.0), ('healthy', 1.001)):
    folder = trainer.folder / name
    folder.mkdir()
    weights = (*healthy, *(factor * weight for weight in poison))
    with poisoned(where):
      job = Job(
        Config(**trainer.settings | {'l1': weights, 'parallel': 'data'}),
        models.create(config.model),
        data,
        folder,
        jax.devices()[:1],
        Console(file=io.StringIO()),
      )
      run(job)
    members[name] = [
      folder / 'members' / f'l1_{w:g}_seed_0.npz' for w in weights
    ]
  pairs = list(zip(*members.values()))[: len(healthy)]
  same = all(a.read_bytes() == b.read_bytes() for a, b in pairs)
  with (trainer.folder / 'poisoned' / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))[len(healthy) :]
  for row, path, (objective, epoch, step) in zip(
    rows, members['poisoned'][len(healthy) :], where.values()
  ):
    leaves = jax.tree.leaves(load(path).variables)
    name = config.objectives[objective - 1]
    says = row['status'].startswith(f"objective '{name}' ")
    says &= row['status'].endswith(f'epoch {epoch + 1} step {step + 1}')
    if not same:
      yield 'the other members are others'
    elif not says or not all(np.isfinite(x).all() for x in leaves):
      yield f'objective {name}: {row["status"]}'
    else:
      yield None


def measure(
  folder: pathlib.Path, seed: int, quick: bool
) -> list[dict[str, Any]]:
  settings: dict[str, Any] = dict(l1=(1e-4, 1e-3), val_size=100)
  settings |= (
    dict(train_size=200, epochs=8) if quick else dict(train_size=600, epochs=12)
  )
  trainer = Trainer(folder, settings)
  rows = []
  for number, (fault, many) in enumerate(TRIED.items()):
    tried = many[quick]
    random = np.random.default_rng([seed, number])
    start = time.monotonic()
    match fault:
      case 'mutation':
        outcomes = load_mutations(trainer, random, tried)
      case 'NaN':
        outcomes = train_poisoned(trainer, random, tried)
      case _:
        outcomes = (
          PROCESSES[fault](trainer, random, f'{number}_{i}')
          for i in range(tried)
        )
    if tried:
      outcomes = list(track(outcomes, f'{fault:20}', tried))
      lost = [outcome for outcome in outcomes if outcome is not None]
      row = dict(fault=fault, tried=tried, survived=tried - len(lost))
      seconds = time.monotonic() - start
      rows.append(row | dict(lost=len(lost), seconds=seconds, how=lost))
  return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = make_parser('faults', __doc__, quick='one of each')
  parser.add_argument('--seed', type=int, default=0)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  with tempfile.TemporaryDirectory() as folder:
    rows = measure(pathlib.Path(folder), args.seed, args.quick)
  result = dict(versions(), quick=args.quick, seed=args.seed, rows=rows)
  shown = [{k: v for k, v in row.items() if k != 'how'} for row in rows]
  show('What faults cost a run', shown)
  for row in rows:
    for how in row['how']:
      print(f'{row["fault"]}: {how}')
  write(args.out, result)


if __name__ == '__main__':
  main()
