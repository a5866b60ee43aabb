"""Trains accurate and sparse networks, and shows their Pareto front.

Two goals of equal standing: prediction error, and complexity, the l1 norm of
the dense kernels. Small weights are pruned while training. Without flags it
trains seven LeNet-5 at once on 4,000 real digits, with no download.

  python train.py
  python train.py --optimizer=madam --seed=0,1,2
  python train.py --dataset=mnist --data_dir=~/tensorflow_datasets --l1=3e-4
  python train.py --search=bisection --max_runs=12 --seed=0,1,2
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import logging
import os
import pathlib
import sys
import tempfile
from types import NoneType
from types import UnionType
from typing import Any, get_args, get_origin, NoReturn

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import jax.numpy as jnp
from rich.console import Console

import models
from mopt import training
from mopt.training import caches
from mopt.training import processes
from mopt.training import settings
from mopt.training import signals
from mopt.training.checkpoints import Damaged
from mopt.training.config import Config
from mopt.training.loop import Interrupted
from mopt.training.settings import setting
from mopt.training.workdir import Busy
from mopt.training.workdir import find_workdir
from mopt.training.workdir import locked
from mopt.training.workdir import make_workdir

FLAGS = flags.FLAGS


def _names(mark: str) -> str:
  return ', '.join(settings.marked(Config, mark))


@dataclasses.dataclass(frozen=True)
class Command:
  """What is said of a run on the command line alone."""

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
    f'same. Only {_names("may_change")} may change, and of a search '
    f'{_names("search_may_change")}. Ctrl-C or SIGTERM interrupts: the epoch '
    'is finished, or left after 10 s, and the exit code is '
    f'{signals.EXIT_CODE}; a second signal stops at once.',
  )
  coordinator: str | None = setting(
    None,
    'running',
    'Train with several processes, each on its own devices: host:port of the '
    'first one, or auto within a job that JAX knows (Slurm, Cloud TPU). They '
    'share each batch; only the first one writes.',
  )
  num_processes: int | None = setting(
    None, 'running', 'With --coordinator=host:port.'
  )
  process_id: int | None = setting(
    None, 'running', 'Which of the processes this is, from 0; likewise.'
  )
  heartbeat_s: int = setting(
    100,
    'running',
    'All processes end if one of them is silent for so many seconds.',
    check=lambda value: 'at least 10' if value < 10 else None,
  )

  def __post_init__(self):
    settings.check_each(self)


class _Numbers(flags.ArgumentParser):
  """A comma-separated list of numbers of one type, as a tuple."""

  def __init__(self, number: type):
    self.number = number
    self.syntactic_help = f'a comma-separated list of {number.__name__}s'

  def parse(self, argument):
    if isinstance(argument, tuple):
      return argument
    try:
      return tuple(self.number(text) for text in argument.split(','))
    except ValueError:
      raise ValueError(f'expected {self.syntactic_help}') from None


class _Help(flags.BooleanFlag):
  """Shows our flags in their groups; absl has one list for all of a file."""

  def __init__(self, name: str, short_name: str | None = None):
    text = 'show the flags of train.py, in groups'
    super().__init__(name, False, text, short_name, allow_override=True)

  def parse(self, argument):
    super().parse(argument)
    if self.value:
      groups = map(FLAGS.module_help, settings.GROUPS)
      last = '\nTry --helpfull to get a list of all flags.'
      print(f'{__doc__}\nflags:', *groups, last, sep='\n')
      sys.exit(1)


def _define(field: dataclasses.Field) -> None:
  """Makes a flag of a setting."""
  about = settings.said_of(field)
  kinds = [kind for kind in get_args(field.type) if kind is not NoneType]
  kind = kinds[0] if isinstance(field.type, UnionType) else field.type
  rest: dict[str, Any] = dict(
    default=field.default, help=about.help, module_name=about.group
  )
  if about.choices:
    flags.DEFINE_enum(field.name, enum_values=about.choices, **rest)
  elif get_origin(kind) is tuple:
    numbers = _Numbers(get_args(kind)[0])
    serializer = flags.CsvListSerializer(',')
    flags.DEFINE(numbers, field.name, serializer=serializer, **rest)
  else:
    _KINDS[kind](field.name, **rest)


def _values(cls: type) -> Any:
  """What the flags say of settings."""
  names = [field.name for field in dataclasses.fields(cls)]
  return cls(**{name: FLAGS[name].value for name in names})


_KINDS: dict[Any, Any] = {
  str: flags.DEFINE_string,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_bool,
}
for _field in dataclasses.fields(Config) + dataclasses.fields(Command):
  _define(_field)
app.define_help_flags()  # Which ours replace.
flags.DEFINE_flag(_Help('help', '?'))
flags.DEFINE_flag(_Help('helpshort'))


def _join_processes(command: Command, config: Config) -> None:
  """Starts JAX with those of the other processes, if there are any."""
  number, which = command.num_processes, command.process_id
  given = number is not None or which is not None
  if command.coordinator in (None, 'auto'):
    if given:
      raise ValueError(
        f'num_processes={number}, process_id={which}: expected with '
        '--coordinator=host:port only.'
      )
  elif number is None or which is None or not 0 <= which < number:
    raise ValueError(
      f'process_id={which}: expected a number from 0 to --num_processes - 1, '
      f'which is {number}.'
    )
  if command.coordinator is None:
    return
  if config.is_search:
    raise ValueError(
      f'search={config.search}: expected none with several processes.'
    )
  processes.start(command.coordinator, number, which, command.heartbeat_s)


@contextlib.contextmanager
def _workdir(
  command: Command, config: Config, data: training.Dataset
) -> Iterator[pathlib.Path]:
  """Where this process writes: not where the first one does, unless it is."""
  if processes.is_first():
    if command.resume:
      folder = find_workdir(command.workdir)
      for line in training.check_resumable(config, data, folder):
        print(line)
      yield folder
    else:
      yield make_workdir(command.workdir)
  else:
    with tempfile.TemporaryDirectory() as folder:
      yield pathlib.Path(folder)


def _make_cores_devices() -> None:
  """Makes every core of the CPU a device, unless one has said otherwise.

  One device leaves half of two cores idle: small networks have no work for
  more than one.
  """
  if 'JAX_NUM_CPU_DEVICES' in os.environ:
    return
  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # of Linux only
    cores = os.cpu_count() or 1
  # Where JAX runs already, its devices stay as they are.
  with contextlib.suppress(RuntimeError):
    jax.config.update('jax_num_cpu_devices', cores)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; what is wrong with them takes one line and exit 2."""
  try:
    rest = FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(f'{rest[1]}: expected flags only, see --help.')
  except flags.Error as error:
    _stop(error)
  return rest


def _stop(error: Exception, code: int = 2) -> NoReturn:
  message = ' '.join(str(error).split())
  print(f'train.py: {message}', file=sys.stderr)
  sys.exit(code)


def main(argv: list[str]) -> None:
  del argv
  # A folder of others, say, in a message that the output cannot encode.
  if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == 'strict':
    sys.stdout.reconfigure(errors='backslashreplace')
  # JAX reports every platform that it looks for and does not find.
  logging.getLogger('jax').setLevel(logging.WARNING)
  # Orbax has much to say of each checkpoint, and logs what it raises.
  if not FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.FATAL)
  _make_cores_devices()
  caches.keep_compiled_programs()
  stack = contextlib.ExitStack()
  try:
    config, command = _values(Config), _values(Command)
    _join_processes(command, config)
    # Before data are read, but after JAX is told of the other processes, which
    # the module might make use of.
    models.find(config.model)
    data_dir = config.data_dir and os.path.expanduser(config.data_dir)
    data = training.load_dataset(
      config.dataset, data_dir, config.val_size, config.train_size
    )
    model = models.create(
      config.model, data.num_classes, jnp.dtype(config.compute_dtype)
    )
    training.check_fit(config, model, data)
    workdir = stack.enter_context(_workdir(command, config, data))
  except ValueError as error:
    _stop(error)
  job: Any = training.run
  if config.is_search:
    job = functools.partial(training.search, resume=command.resume)
  # The others say what the first one says.
  # Names of files may hold what rich takes for markup.
  console = Console(quiet=not processes.is_first(), markup=False)
  try:
    with stack, locked(workdir), signals.stop_on_signals() as should_stop:
      job(config, model, data, workdir, None, console, should_stop=should_stop)
  except (Busy, Damaged) as error:
    _stop(error)
  except Interrupted as error:
    _stop(error, signals.EXIT_CODE)
  except OSError as error:  # A full disk, say; what is written is complete.
    _stop(error, 1)


def _run() -> None:
  """`main` as a program, which ends in silence if nobody reads its output."""
  # Python has none if they are closed from the start.
  nowhere = os.open(os.devnull, os.O_WRONLY)
  sys.stdout = sys.stdout or os.fdopen(os.dup(nowhere), 'w')
  sys.stderr = sys.stderr or os.fdopen(os.dup(nowhere), 'w')
  try:
    try:
      app.run(main, flags_parser=parse_flags)
    finally:
      # Here, since Python says what fails at its own end.
      sys.stdout.flush()
      sys.stderr.flush()
  except BrokenPipeError:
    # What is left in the buffers goes there.
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    sys.exit(1)


if __name__ == '__main__':
  _run()
