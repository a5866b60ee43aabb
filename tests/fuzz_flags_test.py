"""Whatever the command line says: a run that can begin, or one line and exit 2.

The same examples in every run.
"""

import dataclasses
import math
import shutil

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from mopt.training import optimizer
from mopt.training.config import Config
from mopt.training.knee_search import make_strategy
from mopt.training.layout import make_layout
import train

FIELDS = tuple(Config.__dataclass_fields__)
OTHERS = (
  'workdir',
  'resume',
  'coordinator',
  'num_processes',
  'process_id',
  'heartbeat_s',
)
# What other data sets are is asked of TFDS: tests/data_test.py.
FLAGS = sorted({*FIELDS, *OTHERS} - {'dataset'})

WORDS = st.sampled_from(
  ['', ' ', 'x', 'none', 'None', 'true', 'False', 'auto', 'all', '-', '--', '=']
  + ['~no_such_user/x', '.', '../x', "'", '\n', 'é', '☃', 'x' * 300, '٣']
)
NUMBERS = st.sampled_from(
  ['0', '-0', '1', '2', '-1', '3.5', '1e-3', '.5', '1_0', '0x10', '1e3', '+7']
  + ['nan', 'inf', '-inf', 'NaN', '1e999', '1e-999', '1e39', '1e-46', '3e38']
  + [str(2**31 - 1), str(2**31), str(2**63), str(10**30), '9' * 400]
)
LISTS = st.sampled_from(
  [',', ',,', '1,', ',1', '1,2', '2,1', '1,1', '1,2,3', '0,1', '0,nan', '1,inf']
  + ['1e-5,1e-2', '0.1,0.2', '1;2', '1 2', '[1,2]', '1e-400,1', '-1,1', '0,-0']
)
# No place of another folder, and no address.
TEXTS = st.text(
  st.characters(exclude_characters='/:~\0', exclude_categories=['Cs']),
  max_size=6,
)
ANYTHING = (
  WORDS
  | NUMBERS
  | LISTS
  | TEXTS
  | st.integers().map(str)
  | st.floats().map(str)
  | st.lists(st.floats(0, 1), min_size=1, max_size=3).map(
    lambda values: ','.join(map(str, values))
  )
)
INTEGERS = st.integers(-1, 300).map(str)
FLOATS = st.floats(0, 1).map(str) | st.floats().map(str)


@st.composite
def command_lines(draw):
  """Up to three flags, most of them with a value of their kind."""
  names = st.lists(st.sampled_from(FLAGS), min_size=1, max_size=3, unique=True)
  args = []
  for name in draw(names):
    flag = train.FLAGS[name]
    kinds = {'int': INTEGERS, 'float': FLOATS, 'bool': st.sampled_from('01')}
    kind = kinds.get(flag.flag_type(), LISTS)
    if choices := getattr(flag.parser, 'enum_values', None):
      kind = st.sampled_from(choices)
    args.append(f'--{name}={draw(kind | kind | ANYTHING)}')
  return args


def assert_can_be_built(config):
  """Builds what a run is made of, but networks and data."""
  rate = optimizer.learning_rate(config, 125)
  for count in (0, 1, 10**6):
    assert 0 <= float(rate(count)) <= float(jnp.finfo(jnp.float32).max)
  # Under a path that every pattern which reaches a run has found.
  params = {'layer1': {'kernel': jnp.ones((2, 2))}}
  names = config.objectives
  grads = np.random.default_rng(0).normal(size=(len(names), 2, 2))
  grads = {'layer1': {'kernel': jnp.asarray(grads, jnp.float32)}}
  for weights in config.all_weights:
    assert weights is None or len(weights) == len(names)
  weights = jnp.array(config.all_weights[-1] or [0] * len(names), jnp.float32)
  config = dataclasses.replace(config, prunable='dense')
  tx = optimizer.make_optimizer(config, 125, weights)
  updates, _ = tx.update(grads, tx.init(params), params)
  assert not np.isnan(updates['layer1']['kernel']).any()
  assert 0 < np.float32(config.threshold) < math.inf
  assert make_layout(config, jax.devices()).devices
  for seed in config.seed:
    jax.random.key(seed)
  # More trainings than that take memory before they take time.
  if config.is_search and config.max_runs < 10**5:
    strategy = make_strategy(config)
    assert not strategy.done(strategy.init())


def no_cluster(**kwargs):
  raise RuntimeError('no cluster')  # also within a job on one


@hypothesis.settings(
  max_examples=300,
  deadline=None,
  database=None,
  derandomize=True,
  suppress_health_check=[
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.function_scoped_fixture,
  ],
)
@hypothesis.given(command_lines())
def test_any_flags(call, tmp_path, monkeypatch, args):
  runs = []
  note = lambda job, *args: runs.append(job.config)
  monkeypatch.setattr(train.training, 'run', note)
  monkeypatch.setattr(train.training, 'search', note)
  monkeypatch.setattr(jax.distributed, 'initialize', no_cluster)
  folder = tmp_path / 'here'
  folder.mkdir()
  monkeypatch.chdir(folder)
  code, out, err = call(*args)
  left = sorted(folder.rglob('*'))
  shutil.rmtree(folder)
  if code == 0:
    (config,) = runs
    assert_can_be_built(config)
    return
  assert code == 2
  assert not runs
  assert (left, out) == ([], '')
  assert err.startswith('train.py: ')
  assert err.count('\n') == 1
  # It may be at odds with the default of another.
  assert any(f'{name}=' in err for name in FLAGS)
