"""The settings of a run, checked where they enter."""

import dataclasses

import numpy as np

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

# Beyond these a number is 0 or infinite where it is computed with.
_FLOAT32 = np.finfo(np.float32)
_TINY, _LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)

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

  dataset: str = 'mnist5k'
  data_dir: str | None = None
  train_size: int | None = None
  val_size: int | None = None
  stream: bool | None = None
  rotation: float | None = None
  shift: float | None = None
  flip: bool | None = None
  model: str = 'lenet5'
  compute_dtype: str = 'float32'
  optimizer: str = 'adam'
  l1: tuple[float, ...] | None = None
  scalarization: str = 'penalty'
  conv_l2: float = 1e-4
  conv_l2_in_both: bool = False
  prune: str = 'batch'
  threshold: float = 1e-3
  learning_rate: float | None = None
  end_rate: float | None = None
  schedule: str = 'logistic_drop'
  decay: float = 0.01
  momentum: float = 0.9
  nesterov: bool = False
  rms_decay: float = 0.9
  b1: float = 0.9
  b2: float = 0.999
  eps: float | None = None
  batch_size: int = 32
  drop_remainder: bool = False
  epochs: int = 30
  seed: tuple[int, ...] = (0,)
  parallel: str = 'auto'
  profile: bool = False
  checkpoint_every: int = 1
  search: str = 'none'
  search_range: tuple[float, ...] = (1e-5, 1e-2)
  search_epochs: int | None = None
  levels: int | None = None
  max_runs: int = 20
  select_on: str = 'val'

  def __post_init__(self):
    for name, choices in (
      ('optimizer', OPTIMIZERS),
      ('scalarization', SCALARIZATIONS),
      ('prune', PRUNE),
      ('schedule', SCHEDULES),
      ('compute_dtype', COMPUTE_DTYPES),
      ('parallel', PARALLEL),
      ('search', SEARCHES),
      ('select_on', SELECT_ON),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise ValueError(f'{name}={value}: expected {_any_of(choices)}.')
    for name in ('threshold', 'learning_rate', 'end_rate', 'eps'):
      value = getattr(self, name)
      if value is not None and not _TINY <= value <= _LARGEST:
        raise ValueError(
          f'{name}={value}: expected a number that is positive and finite in '
          'float32.'
        )
    for name in ('conv_l2', 'decay'):
      value = getattr(self, name)
      if not 0 <= value <= _LARGEST:
        raise ValueError(
          f'{name}={value}: expected a number >= 0, finite in float32.'
        )
    for name in ('momentum', 'rms_decay', 'b1', 'b2'):
      value = getattr(self, name)
      if not (0 <= value < 1 and np.float32(value) < 1):
        raise ValueError(
          f'{name}={value}: expected a number in [0, 1), also in float32.'
        )
    for name, least in (
      ('batch_size', 1),
      ('epochs', 1),
      ('train_size', 1),
      ('val_size', 0),
      ('search_epochs', 1),
      ('levels', 1),
      ('max_runs', 2),
      ('checkpoint_every', 1),
    ):
      value = getattr(self, name)
      if value is not None and value < least:
        raise ValueError(f'{name}={value}: expected an integer >= {least}.')
      if value is not None and value >= 2**31:
        raise ValueError(f'{name}={value}: expected an integer < 2^31.')
    for name, most in (('rotation', 180), ('shift', 1)):
      value = getattr(self, name)
      if value is not None and not 0 <= value <= most:
        raise ValueError(f'{name}={value}: expected a number in [0, {most}].')
    self._check_population()
    if self.is_search:
      self._check_search()

  def _check_population(self):
    for name in ('l1', 'seed'):
      values = getattr(self, name)
      if values is None:
        continue
      if not values:
        raise ValueError(f'{name}=: expected at least one number.')
      if len(set(values)) != len(values):
        text = ','.join(f'{v:g}' for v in values)
        raise ValueError(f'{name}={text}: expected no number twice.')
    if any(not 0 <= seed < 2**31 for seed in self.seed):
      text = ','.join(map(str, self.seed))
      raise ValueError(f'seed={text}: expected integers in [0, 2^31).')
    if self.l1 is None:
      return
    text = ','.join(f'{v:g}' for v in self.l1)
    if self.is_multiobjective:
      raise ValueError(
        f'l1={text}: {self.optimizer} finds its own weights at every step; '
        f'expected no l1, or one of {", ".join(WEIGHTED_SUM)}.'
      )
    if self.scalarization == 'convex' and any(not 0 <= v <= 1 for v in self.l1):
      raise ValueError(
        f'l1={text}: expected numbers in [0, 1] with scalarization=convex.'
      )
    if any(not 0 <= v <= _LARGEST for v in self.l1):
      raise ValueError(f'l1={text}: expected numbers >= 0, finite in float32.')

  def _check_search(self):
    if self.is_multiobjective:
      raise ValueError(
        f'search={self.search}: {self.optimizer} finds its own weights at '
        f'every step; expected one of {", ".join(WEIGHTED_SUM)}.'
      )
    if self.l1 is not None:
      text = ','.join(f'{v:g}' for v in self.l1)
      raise ValueError(
        f'l1={text}: expected no l1 with search={self.search}, which tries '
        'weights in search_range.'
      )
    if self.search == 'grid' and self.levels is not None:
      raise ValueError(
        f'levels={self.levels}: expected no levels with search=grid, which has '
        'one.'
      )
    text = ','.join(f'{v:g}' for v in self.search_range)
    wanted = 'expected two numbers, the first one smaller and'
    is_log = self.search in ('grid', 'bisection')  # halves by ratios
    if len(self.search_range) != 2:
      raise ValueError(f'search_range={text}: {wanted} >= 0.')
    low, high = self.search_range
    if not 0 <= low < high <= _LARGEST or (is_log and low == 0):
      raise ValueError(
        f'search_range={text}: {wanted} {"positive" if is_log else ">= 0"}.'
      )
    if self.scalarization == 'convex' and high > 1:
      raise ValueError(
        f'search_range={text}: expected numbers up to 1 with '
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


def _any_of(choices: tuple[str, ...]) -> str:
  return ', '.join(choices[:-1]) + f' or {choices[-1]}'
