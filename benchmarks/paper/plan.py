"""Which trainings each table and figure is made of, and their flags."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# Fig. 6(a, b): the first has a validation curve.
CURVES = ('fig7_rmsprop', 'table2d')
FIG6C = tuple(
  f'fig6c_{schedule}_{threshold}'
  for schedule in ('constant', 'lrs')
  for threshold in ('0.001', '0.002')
)
# Fig. 7 and 8, panel by panel: the optimizer, and its twin of one objective.
PANELS = (
  ('fig7_smgd', 'fig7_sgd'),
  ('fig7_madam', 'fig7_adam'),
  ('fig7_mrmsprop', 'fig7_rmsprop'),
)
# Start and end of the logistic drop, of which one is in table2c_tuned.flags.
_RATES = (
  (1e-3, 1e-4),
  (2e-3, 2e-4),
  (4e-3, 4e-4),
  (8e-3, 8e-4),
  (4e-3, 1e-4),
  (8e-3, 1e-4),
  (16e-3, 1e-4),
)
RATES = {f'rate_{start:g}_{end:g}': (start, end) for start, end in _RATES}
_FIG7 = tuple(training for pair in PANELS for training in pair)

# Of a tuple within a tuple one training is enough.
NAMES: dict[str, tuple[str | tuple[str, ...], ...]] = {
  'table2a': ('table2a',),
  'table2b': ('table2b',),
  'table2c': ('table2c',),
  'table2c_tuned': ('table2c_tuned',),
  'rates': tuple(RATES),
  'table2d': ('table2d',),
  'fig3': (),
  'fig4': ('table2c',),
  'fig5': ('table2c', 'table2b'),
  'fig6': (CURVES, *FIG6C),
  'fig7': _FIG7,
  'fig8': _FIG7,
  'fig9': (
    'fig9_grid',
    'fig9_dichotomic',
    'fig9_bisection',
    'fig9_stochastic',
  ),
  'drift': ('fig7_smgd', 'drift_smgd'),
  'front': ('table2c', 'table2c_tuned'),
  'strategies': ('table2a', 'table2b', 'table2c', 'table2c_tuned'),
}
# What `all` leaves out where these would have to be trained on a CPU.
LEFT_OUT = ('table2d', 'fig6')


class Training(NamedTuple):
  """Flags of train.py, but for the seed and the folders."""

  flagfile: str
  flags: tuple[str, ...] = ()
  quick: tuple[str, ...] = ()
  needs_accelerator: bool = False
  # Seeds that are trained whatever seeds are asked for.
  seeds: tuple[int, ...] = ()
  # Flags of processes that train a share of it each, so that less is lost where
  # time is cut into slices; empty for one process.
  parts: tuple[str, ...] = ()


def _mnist(flagfile: str, *flags: str, quick: Sequence[str] = ()) -> Training:
  subset = ('--dataset=mnist5k', '--epochs=2', *quick)
  return Training(flagfile, flags, subset)


def _cifar10(
  flagfile: str,
  *flags: str,
  quick: Sequence[str] = (),
  parts: Sequence[str] = (),
) -> Training:
  subset = ('--train_size=640', '--epochs=1', *quick)
  return Training(flagfile, flags, subset, True, parts=tuple(parts))


def _search(name: str, *seeds: int) -> Training:
  """Short trainings and a long one, in a single call of train.py."""
  subset = (
    '--dataset=mnist5k',
    '--epochs=2',
    '--search_epochs=1',
    '--max_runs=4',
  )
  return Training('fig9', (f'--search={name}',), subset, seeds=seeds)


def _fig6c(name: str) -> Training:
  _, schedule, threshold = name.split('_')
  schedule = {'lrs': 'logistic_drop'}.get(schedule, schedule)
  return _cifar10('fig6c', f'--schedule={schedule}', f'--threshold={threshold}')


# The authors' code: the rate over the number of epochs, here 0.01 / 30.
_DECAY = (
  '--learning_rate=1e-2',
  '--schedule=inverse_time',
  '--decay=3.33e-4',
)
_HELD_OUT = '--val_size=500'
_FEW = '--l1=0,1e-4,3e-4,1e-3'
TRAININGS = {
  'table2a': _mnist('table2a', quick=[_FEW]),
  'table2b': _mnist('table2b', quick=[_FEW]),
  'table2c': _mnist('table2c', quick=['--l1=0,5e-5,3e-4,1e-3']),
  'table2c_tuned': _mnist('table2c_tuned', quick=[_FEW]),
  'table2d': _cifar10(
    'table2d',
    quick=['--l1=0,0.03'],
    parts=[
      '--l1=0,1e-4,3e-4,5e-4,7e-4',
      '--l1=9e-4,1e-3,3e-3,5e-3,7e-3',
      '--l1=9e-3,0.01,0.03,0.05',
    ],
  ),
  **{
    name: _mnist(
      'rates',
      f'--learning_rate={start:g}',
      f'--end_rate={end:g}',
      quick=[_HELD_OUT],
    )
    for name, (start, end) in RATES.items()
  },
  **{name: _fig6c(name) for name in FIG6C},
  'fig7_smgd': _mnist('fig7', '--optimizer=smgd', *_DECAY),
  'fig7_sgd': _mnist('fig7', '--optimizer=sgd', '--l1=3e-4', *_DECAY),
  # Without the decay.
  'drift_smgd': _mnist('fig7', '--optimizer=smgd', '--learning_rate=1e-2'),
  'fig7_madam': _mnist('fig7', '--optimizer=madam', '--learning_rate=1e-3'),
  'fig7_adam': _mnist(
    'fig7', '--optimizer=adam', '--learning_rate=1e-3', '--l1=3e-4'
  ),
  'fig7_mrmsprop': _cifar10(
    'fig7_cifar10', '--optimizer=mrmsprop', quick=[_HELD_OUT]
  ),
  'fig7_rmsprop': _cifar10(
    'fig7_cifar10', '--optimizer=rmsprop', '--l1=0.03', quick=[_HELD_OUT]
  ),
  'fig9_grid': _search('grid'),
  'fig9_dichotomic': _search('dichotomic'),
  'fig9_bisection': _search('bisection', 0, 1, 2),
  'fig9_stochastic': _search('stochastic_dichotomic', 0, 1, 2),
}


class Piece(NamedTuple):
  """What one process trains: a training with one seed."""

  name: str
  training: str
  seed: int
  flags: tuple[str, ...]

  @property
  def needs_accelerator(self) -> bool:
    return TRAININGS[self.training].needs_accelerator


def pieces(training: str, seed: int, quick: bool = False) -> list[Piece]:
  """A training with one seed, in as many processes as it has parts."""
  flagfile, flags, subset, *_, parts = TRAININGS[training]
  flags = (f'--flagfile=benchmarks/paper/{flagfile}.flags', *flags)
  last = f'--seed={seed}'
  if quick or not parts:
    flags += (*(subset if quick else ()), last)
    return [Piece(f'{training}_seed{seed}', training, seed, flags)]
  return [
    Piece(
      f'{training}_part{i}_seed{seed}', training, seed, (*flags, part, last)
    )
    for i, part in enumerate(parts, 1)
  ]


def trainings(
  name: str, is_there: Callable[[str], bool], can_run: Callable[[str], bool]
) -> list[str]:
  """The trainings of a table or figure.

  Of those that can stand in for each other it is the first that is there, or
  else the first that can be run.
  """

  def choose(options: Sequence[str]) -> str:
    good = [t for t in options if is_there(t)]
    return (good or [t for t in options if can_run(t)] or list(options))[0]

  return [
    part if isinstance(part, str) else choose(part) for part in NAMES[name]
  ]
