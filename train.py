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
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any, get_args, get_origin, NoReturn

from absl import app
from absl import flags
from absl import logging as absl_logging
from flax import linen as nn
import jax.numpy as jnp
from rich.console import Console

import models
from mopt import training
from mopt.training import caches
from mopt.training import output
from mopt.training import processes
from mopt.training import settings
from mopt.training import signals
from mopt.training.checkpoints import Damaged
from mopt.training.config import Config
from mopt.training.data import fingerprint
from mopt.training.loop import Interrupted
from mopt.training.processes import Others
from mopt.training.workdir import find_workdir
from mopt.training.workdir import locked
from mopt.training.workdir import make_workdir
from mopt.training.workdir import Place
from mopt.training.workdir import start_fingerprint

FLAGS = flags.FLAGS


class _Tuple(flags.ArgumentParser):
  """What `settings.text` writes: numbers or names, or lists of them."""

  def __init__(self, kind: Any):
    (self.item, _) = get_args(kind)
    name = 'name' if self.item is str else getattr(self.item, '__name__', '')
    self.syntactic_help = f'a comma-separated list of {name}s'
    if get_origin(self.item) is tuple:
      self.inner = _Tuple(self.item)
      self.syntactic_help = f'{self.inner.syntactic_help}, or several with ;'

  def parse(self, argument):
    if isinstance(argument, tuple):
      return argument
    if get_origin(self.item) is tuple:
      return tuple(map(self.inner.parse, argument.split(';')))
    try:
      return tuple(self.item(text) for text in argument.split(','))
    except ValueError:
      raise ValueError(f'expected {self.syntactic_help}') from None


class _Text(flags.ArgumentSerializer):
  """Writes a tuple, for --help and --flagfile."""

  def serialize(self, value):
    return settings.text(value, repr)  # To the bit.


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
  kind = settings.kind(field)
  rest: dict[str, Any] = dict(
    default=field.default, help=about.help, module_name=about.group
  )
  if about.choices:
    flags.DEFINE_enum(field.name, enum_values=about.choices, **rest)
  elif get_origin(kind) is tuple:
    flags.DEFINE(_Tuple(kind), field.name, serializer=_Text(), **rest)
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
for _settings in (Config, Place, Others):
  for _field in dataclasses.fields(_settings):
    _define(_field)
app.define_help_flags()  # Which ours replace.
flags.DEFINE_flag(_Help('help', '?'))
flags.DEFINE_flag(_Help('helpshort'))


@contextlib.contextmanager
def _workdir(
  place: Place, config: Config, data: training.Dataset
) -> Iterator[pathlib.Path]:
  """Where this process writes: not where the first one does, unless it is."""
  if not processes.is_first():
    with tempfile.TemporaryDirectory() as folder:
      yield pathlib.Path(folder)
  elif place.resume:
    workdir = find_workdir(place.workdir)
    for line in training.check_resumable(config, data, workdir):
      print(line)
    yield workdir
  else:
    yield make_workdir(place.workdir)


def _load(config: Config) -> tuple[training.Dataset, nn.Module]:
  """The data, and a network that fits them."""
  models.find(config.model)  # Before data are read, which may take long.
  data_dir = config.data_dir and os.path.expanduser(config.data_dir)
  data = training.load_dataset(
    config.dataset, data_dir, config.val_size, config.train_size
  )
  model = models.create(
    config.model, data.num_classes, jnp.dtype(config.compute_dtype)
  )
  training.check_fit(config, model, data)
  return data, model


def _prepare(
  config: Config, place: Place, stack: contextlib.ExitStack
) -> tuple[training.Dataset, nn.Module, pathlib.Path]:
  """Data, network and a locked folder, as the stack has it.

  What is wrong in one process is wrong in all: none waits for another.
  """
  # After JAX is told of the others: a module of a network may make use of it.
  data, model = processes.together(lambda: _load(config))

  def about():
    # Each machine may have its own folders.
    shared = dataclasses.replace(config, data_dir=None, init=None)
    return dataclasses.asdict(shared) | {
      'resume': place.resume,
      'data': fingerprint(data),
      'init': start_fingerprint(config),
    }

  processes.check_alike(about)

  def enter():
    workdir = stack.enter_context(_workdir(place, config, data))
    stack.enter_context(locked(workdir))
    return workdir

  return data, model, processes.together(enter)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags; what is wrong with them takes one line and exit 2."""
  try:
    rest = FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(f'{rest[1]}: expected flags only, see --help.')
  except flags.Error as error:
    _stop(error)
  return rest


def _say(error: Exception, code: int) -> int:
  message = ' '.join(str(error).split())
  print(f'train.py: {message}', file=sys.stderr)
  return code


def _stop(error: Exception, code: int = 2) -> NoReturn:
  sys.exit(_say(error, code))


def main(argv: list[str]) -> None:
  del argv
  output.show_any_letter()
  # JAX reports every platform that it looks for and does not find.
  logging.getLogger('jax').setLevel(logging.WARNING)
  # Orbax has much to say of each checkpoint, and logs what it raises.
  if not FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.FATAL)
  processes.make_cores_devices()
  caches.keep_compiled_programs()
  with contextlib.ExitStack() as stack:
    try:
      config, place, others = map(_values, (Config, Place, Others))
      if others.coordinator is not None:
        processes.start(**dataclasses.asdict(others))
      data, model, workdir = _prepare(config, place, stack)
    except ValueError as error:
      _stop(error)
    # The others say what the first one says.
    # Names of files may hold what rich takes for markup.
    console = Console(quiet=not processes.is_first(), markup=False)
    try:
      with signals.stop_on_signals() as should_stop:
        job = training.Job(
          config, model, data, workdir, None, console, should_stop
        )
        if config.is_search:
          training.search(job, place.resume)
        else:
          training.run(job)
      return
    except Damaged as error:
      _stop(error)
    except Interrupted as error:
      _stop(error, signals.EXIT_CODE)
    except processes.Lost as error:
      code = _say(error, signals.EXIT_CODE)
    except OSError as error:  # A full disk, say; what is written is complete.
      code = _say(error, 1)
  # Others do not know of it, and wait.
  processes.leave(code)


if __name__ == '__main__':
  with output.may_be_unread():
    app.run(main, flags_parser=parse_flags)
