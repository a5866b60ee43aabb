"""Reruns any table or figure of the paper, and shows both results.

  python -m benchmarks.paper table2c                # a table: minutes to hours
  python -m benchmarks.paper fig4 fig5 --seed=0,1,2
  python -m benchmarks.paper all --quick            # a look at everything
  python -m benchmarks.paper --list                 # what is there already

Names:
  table2a         pruning once, after training, LeNet-5 on MNIST
  table2b         pruning after each epoch, LeNet-5 on MNIST
  table2c         pruning after each batch, LeNet-5 on MNIST
  table2c_tuned   the same with another learning rate, better than the paper's
  rates           how that rate was chosen
  table2d         pruning after each batch, VGG on CIFAR10 (accelerator)
  fig3            the learning-rate schedule; nothing is trained
  fig4            fronts of table2c
  fig5            nonzeros over the epochs, and how weights spread
  fig6            VGG: loss, accuracy, nonzeros (accelerator)
  fig7            accuracy of multiobjective optimizers and their twins
  fig8            the weights that they find
  fig9            four searches for the knee, and the hypervolume of each
  drift           where SMGD goes if its rate does not decay
  front           fronts of table2c, table2c_tuned and the paper, with knees
  strategies      fronts of table2a, b, c and c_tuned (section 6.2.1)
  all             all of these; without an accelerator table2d and fig6 only
                  where what they are made of, or a part of it, is there

What is trained, a piece, is one call of train.py with one of the flag files
beside this module and one seed; it is printed, and you can type it too. What
it leaves becomes one JSON in --results, and what is there is not trained
again: delete the file to have it trained anew. A piece that is cut off has no
result. Tables are also written as .md, figures as .png, into the same folder.

The paper rounds accuracies to 0.1 %; ours are compared with them unrounded.
"""

import argparse
from collections.abc import Sequence
import functools
import pathlib
import signal
import subprocess
import sys
from typing import NoReturn

import jax
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command import OneLineParser
from benchmarks.paper import curves
from benchmarks.paper import fronts
from benchmarks.paper import pieces
from benchmarks.paper import plan
from benchmarks.paper import rates
from benchmarks.paper import searches
from benchmarks.paper import tables

_PROGRAM = 'python -m benchmarks.paper'
_RESULTS = pieces.ROOT / 'benchmarks' / 'results'
_RUNS = pieces.ROOT / 'runs'
_FIGURES = {
  'fig3': curves.fig3,
  'fig4': fronts.fig4,
  'fig5': curves.fig5,
  'fig6': curves.fig6,
  'fig7': curves.fig7,
  'fig8': curves.fig8,
  'fig9': searches.fig9,
  'drift': curves.drift,
  'front': fronts.front,
  'strategies': fronts.strategies,
}


def _stop(message: str, code: int = 2) -> NoReturn:
  print(f'{_PROGRAM}: {message}', file=sys.stderr)
  sys.exit(code)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = OneLineParser(
    prog=_PROGRAM,
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('names', metavar='NAME', nargs='*', help='see above')
  parser.add_argument('--data_dir', help='where TFDS keeps its data sets')
  parser.add_argument(
    '--seed', type=_seeds, default=(0,), help='default: 0; or 0,1,2'
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a small subset, kept in runs/paper_quick: a minute for a name of '
    'MNIST, some for one of CIFAR10 on a CPU; its numbers say nothing',
  )
  parser.add_argument(
    '--results',
    type=pathlib.Path,
    help='where results are kept (default: benchmarks/results/paper)',
  )
  parser.add_argument(
    '--list', action='store_true', help='say what is there and what is not'
  )
  args = parser.parse_args(argv)
  args.names = _check_names(args.names, args.list)
  args.data_dir = _check_data_dir(args.data_dir)
  args.places = _places(args.results, args.quick)
  return args


def _seeds(text: str) -> tuple[int, ...]:
  try:
    seeds = tuple(int(seed) for seed in text.split(','))
  except ValueError:
    seeds = ()
  distinct = len(set(seeds)) == len(seeds)
  if not seeds or not distinct or not all(0 <= s < 2**31 for s in seeds):
    raise argparse.ArgumentTypeError(
      f'{text}: expected different integers in [0, 2^31), with commas.'
    )
  return seeds


def _check_names(names: Sequence[str], is_list: bool) -> list[str]:
  known = ', '.join((*plan.NAMES, 'all'))
  for name in names:
    if name != 'all' and name not in plan.NAMES:
      _stop(f'{name}: expected one of {known}.')
  if not names and not is_list:
    _stop(f'expected at least one of {known}; see --help.')
  if 'all' in names or not names:
    return ['all']
  return list(dict.fromkeys(names))


def _check_data_dir(name: str | None) -> str | None:
  """As an absolute path, for train.py runs in another folder."""
  if name is None:
    return None
  path = pathlib.Path(name).expanduser()
  if not name or not path.is_dir():
    _stop(f'data_dir={name}: expected a folder.')
  return str(path.resolve())


def _places(results: pathlib.Path | None, quick: bool) -> pieces.Places:
  work = _RUNS / ('paper_quick' if quick else 'paper')
  default = work if quick else _RESULTS / 'paper'
  folder = default if results is None else results.expanduser().resolve()
  if quick and folder.is_relative_to(_RESULTS):
    _stop(f'results={results}: expected another folder with --quick.')
  existing = next(p for p in (folder, *folder.parents) if p.exists())
  if not existing.is_dir():
    _stop(f'results={results}: expected a folder, {existing} is a file.')
  return pieces.Places(folder, work)


@functools.cache
def has_accelerator() -> bool:
  """Asked in a process of its own, which lets go of it again."""
  command = [sys.executable, '-c', 'import jax; print(jax.default_backend())']
  found = subprocess.run(command, capture_output=True, text=True)
  return found.returncode == 0 and found.stdout.strip() != 'cpu'


class Benchmark:
  """Names, with the choices of one call of the command line."""

  def __init__(self, args: argparse.Namespace, call: pieces.Call):
    self.args = args
    self.call = call
    # So wide that the cells of several seeds are not wrapped.
    self.console = Console(width=max(Console().width, 240))

  def pieces_of(self, training: str) -> list[plan.Piece]:
    args = self.args
    more = () if args.quick else plan.TRAININGS[training].seeds
    seeds = dict.fromkeys((*args.seed, *more))
    return [p for s in seeds for p in plan.pieces(training, s, args.quick)]

  def is_there(self, training: str) -> bool:
    places = self.args.places
    return all(places.json(p).exists() for p in self.pieces_of(training))

  def can_run(self, training: str) -> bool:
    if self.args.quick or not plan.TRAININGS[training].needs_accelerator:
      return True
    return has_accelerator()

  def wanted(self, name: str) -> list[str]:
    return plan.trainings(name, self.is_there, self.can_run)

  def is_due(self, name: str) -> bool:
    """Whether `all` includes a name: trained here, or of what is there."""
    if name not in plan.LEFT_OUT or any(map(self.is_there, self.wanted(name))):
      return True
    return has_accelerator()

  def all_names(self) -> list[str]:
    names = [name for name in plan.NAMES if self.is_due(name)]
    if left := [name for name in plan.NAMES if name not in names]:
      self.console.print(
        f'Left out: {", ".join(left)}, of which trainings need an accelerator, '
        'and JAX finds none here.',
        highlight=False,
        soft_wrap=True,
      )
    return names

  def make(self, name: str) -> None:
    """Trains what is missing, and shows a table or draws a figure."""
    wanted = self.wanted(name)
    runs = [t for t in wanted if self.is_there(t) or self.can_run(t)]
    left = [t for t in wanted if t not in runs]
    if left and (not runs or name in tables.TITLES):
      _stop(
        f'{name}: expected an accelerator, and JAX finds none here; '
        '--quick is for a look.'
      )
    results = {training: self.results_of(training) for training in runs}
    if left:
      self.console.print(
        f'{name}: left out {", ".join(left)}, which need an accelerator, and '
        'JAX finds none here.',
        highlight=False,
        soft_wrap=True,
      )
    if name == 'rates':
      path = self.write(name, rates.markdown(results))
    elif name in tables.TITLES:
      path = self.show(results[name], name)
    else:
      path = _FIGURES[name](results, self.args.places.results / f'{name}.png')
    if name == 'fig9':
      self.write(name, searches.markdown(results))
    print(f'{"quick: " * self.args.quick}{name} -> {_short(path)}')

  def results_of(self, training: str) -> list[pieces.Result]:
    args = self.args
    found: dict[int, list[pieces.Result]] = {}
    for piece in self.pieces_of(training):
      pieces.train(piece, args.places, args.data_dir, args.quick, self.call)
      result = pieces.load(args.places.json(piece), args.quick)
      found.setdefault(piece.seed, []).append(result)
    merged = [pieces.merge(parts) for parts in found.values()]
    pieces.check_alike(merged)
    return merged

  def show(self, results: list[pieces.Result], name: str) -> pathlib.Path:
    self.console.print(tables.rich_table(results, name))
    for line in tables.summary(results, name):
      self.console.print(line, highlight=False, soft_wrap=True)
    return self.write(name, tables.markdown(results, name))

  def write(self, name: str, page: str) -> pathlib.Path:
    """A page, which ends with the notes beside it that are made by hand."""
    folder = self.args.places.results
    notes = folder / f'{name}_notes.md'
    if notes.exists():
      page += '\n' + notes.read_text()
    path = folder / f'{name}.md'
    path.write_text(page)
    return path

  def print_list(self) -> None:
    """Each piece once, with the names that it serves."""
    names = plan.NAMES if self.args.names == ['all'] else self.args.names
    users: dict[str, list[str]] = {}
    for name in names:
      for part in plan.NAMES[name]:
        for training in [part] if isinstance(part, str) else part:
          users.setdefault(training, []).append(name)
    table = Table('piece', 'for', 'state', box=box.SIMPLE_HEAD)
    for training, served in users.items():
      for piece in self.pieces_of(training):
        path = self.args.places.json(piece)
        state = 'missing'
        if path.exists():
          seconds = pieces.load(path, self.args.quick).config['seconds']
          state = f'there, took {seconds:,.0f} s'
        elif piece.needs_accelerator and not self.args.quick:
          state += ', needs an accelerator'
        table.add_row(piece.name, ', '.join(served), state)
    self.console.print(table)


def _short(path: pathlib.Path) -> str:
  is_inside = path.is_relative_to(pieces.ROOT)
  return str(path.relative_to(pieces.ROOT) if is_inside else path)


def main(
  argv: Sequence[str] | None = None, call: pieces.Call = pieces.call
) -> None:
  args = parse(argv)
  benchmark = Benchmark(args, call)
  try:
    if args.list:
      benchmark.print_list()
      return
    everything = args.names == ['all']
    for name in benchmark.all_names() if everything else args.names:
      benchmark.make(name)
  except pieces.Failed as error:
    _stop(str(error), error.code)
  except KeyboardInterrupt:
    _stop('interrupted; the piece that was running has no result.', 130)
  except OSError as error:
    _stop(str(error), 1)


if __name__ == '__main__':
  # This process only counts and draws; the accelerator is for the trainings.
  jax.config.update('jax_platforms', 'cpu')
  # As Ctrl-C, so that no training goes on alone.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  main()
