"""How long one waits: imports, `--help`, and the first trained epoch.

  python -m benchmarks.start_up           # five minutes on two cores
  python -m benchmarks.start_up --quick   # one of each

Every time is that of a process of its own, which has to read its files anew;
rows run interleaved, and a time is the median over the rounds. How to read it:

  * import jax, optax: what anyone pays who uses them.
  * import mopt: what comes on top, in the same process.
  * train.py --help: up to its end.
  * first epoch: of `train.py --l1=3e-4`, from the start of the process until
    the metrics of the first epoch are on disk; then it is killed. Cold: nothing
    is cached, neither decoded pictures nor compiled programs. Warm: the process
    before has left both. `mnist5k` has 125 steps in an epoch, `mnist`, for
    which --data_dir says where TFDS has prepared it, 1,719.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks.command import make_parser
from benchmarks.command import OneLineParser
from benchmarks.command import ROOT
from benchmarks.command import write
from benchmarks.step_cost import show
from benchmarks.step_cost import versions

_IMPORTS = """
import time
start = time.perf_counter()
import jax, optax
before = time.perf_counter()
import mopt
print(before - start, time.perf_counter() - before)
"""


def _environment(cache: pathlib.Path) -> dict[str, str]:
  rest = {k: v for k, v in os.environ.items() if not k.startswith('JAX_COMPIL')}
  return rest | {'XDG_CACHE_HOME': str(cache)}


def import_times() -> tuple[float, float]:
  """Seconds for jax and optax, and for mopt after them."""
  command = [sys.executable, '-c', _IMPORTS]
  done = subprocess.run(
    command, cwd=ROOT, check=True, capture_output=True, text=True
  )
  first, second = map(float, done.stdout.split())
  return first, second


def help_time() -> float:
  start = time.perf_counter()
  command = [sys.executable, 'train.py', '--help']
  # absl exits with 1 after it has shown the help.
  subprocess.run(command, cwd=ROOT, capture_output=True)
  return time.perf_counter() - start


def first_epoch_time(flags: Sequence[str], cache: pathlib.Path) -> float:
  """Seconds until the first epoch is on disk, with what is cached there."""
  with tempfile.TemporaryDirectory() as parent:
    workdir = pathlib.Path(parent) / 'run'
    metrics = workdir / 'metrics.jsonl'
    command = [sys.executable, 'train.py', *flags, f'--workdir={workdir}']
    start = time.perf_counter()
    with subprocess.Popen(
      command,
      cwd=ROOT,
      env=_environment(cache),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    ) as process:
      while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
          raise RuntimeError(f'train.py ended early: {process.stderr.read()}')
        time.sleep(0.005)
      seconds = time.perf_counter() - start
      process.kill()
  return seconds


def measure(
  datasets: dict[str, Sequence[str]], rounds: int
) -> dict[str, list[float]]:
  """Seconds of every row and round."""
  times: dict[str, list[float]] = {}

  def note(name: str, seconds: float) -> None:
    times.setdefault(name, []).append(seconds)

  def imports() -> None:
    first, second = import_times()
    note('import jax, optax', first)
    note('import mopt', second)

  def epochs(name: str, flags: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
      for state in ('cold', 'warm'):
        seconds = first_epoch_time(flags, pathlib.Path(cache))
        note(f'first epoch, {name}, {state}', seconds)

  calls: list[Callable[[], None]] = [
    imports,
    lambda: note('train.py --help', help_time()),
    *(functools.partial(epochs, *item) for item in datasets.items()),
  ]
  imports()  # Files are read from the disk, and modules compiled.
  times.clear()
  random = np.random.default_rng(0)
  for _ in range(rounds):
    for i in random.permutation(len(calls)):
      calls[i]()
  return times


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = make_parser('start_up', __doc__, OneLineParser)
  parser.add_argument('--data_dir', type=pathlib.Path, help='of TFDS')
  args = parser.parse_args(argv)
  if args.data_dir and not (args.data_dir / 'mnist').is_dir():
    parser.error(f'--data_dir: no mnist in {str(args.data_dir)!r}')
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  datasets = {'mnist5k': ['--l1=3e-4']}
  if args.data_dir:
    where = f'--data_dir={args.data_dir.absolute()}'
    datasets['mnist'] = ['--l1=3e-4', '--dataset=mnist', where]
  rows = []
  for name, times in measure(datasets, 1 if args.quick else 5).items():
    low, high = np.percentile(times, [25, 75])
    row = dict(name=name, median_s=float(np.median(times)))
    row |= dict(iqr_s=float(high - low), min_s=min(times), n=len(times))
    rows.append(row)
  show('Waiting', rows)
  write(args.out, dict(versions(), quick=args.quick, rows=rows))


if __name__ == '__main__':
  main()
