"""The command line: what it writes, and one line for what is wrong."""

import csv
import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import pytest

from models.lenet import LeNet5
from models.vgg import VGG
from mopt.training import load
from mopt.training import settings
from mopt.training.config import Config
from mopt.training.files import UNFINISHED
from mopt.training.processes import Others
from mopt.training.workdir import Place
import train

_ROOT = pathlib.Path(__file__).parents[1]
_COLUMNS = [
  'seed',
  'weight_error',
  'weight_l1',
  'ce_train',
  'ce_val',
  'ce_test',
  'l1',
  'nonzeros',
  'nonzeros_layer1',
  'nonzeros_layer2',
  'nonzeros_layer3',
  'params',
  'nonzeros_all',
  'accuracy_train',
  'accuracy_val',
  'accuracy_test',
  'status',
  'file',
  'pareto',
  'knee',
]


def _train(*args, cwd):
  command = [sys.executable, str(_ROOT / 'train.py'), *args]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(tmp_path):
  """A process of its own compiles LeNet-5 and trains it: 20 s."""
  args = ('--epochs=6', '--train_size=640', '--l1=1e-4,3e-3', '--seed=0,1')
  done = _train(*args, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert 'epoch 6/6' in done.stdout
  assert '(640 training examples)' in done.stdout
  (workdir,) = (tmp_path / 'runs').iterdir()
  names = {path.name for path in workdir.iterdir()}
  assert names == {
    'checkpoints',
    'config.json',
    'front.png',
    'histograms.jsonl',
    'members',
    'metrics.jsonl',
    'results.csv',
  }
  with (workdir / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == _COLUMNS
  assert [(r['weight_l1'], r['seed']) for r in rows] == [
    ('0.0001', '0'),
    ('0.003', '0'),
    ('0.0001', '1'),
    ('0.003', '1'),
  ]
  for row in rows:
    layers = [int(row[f'nonzeros_layer{i}']) for i in (1, 2, 3)]
    assert int(row['nonzeros']) == sum(layers)
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [r['epoch'] for r in records] == [n for n in range(1, 7) for _ in rows]
  for key in [
    'error',
    'l1',
    'grad_norm_error',
    'grad_norm_l1',
    'cosine_error_l1',
    'weight_error',
    'weight_error_min',
    'weight_error_max',
    'weight_l1',
    'weight_l1_min',
    'weight_l1_max',
    'learning_rate',
    'ce_train',
    'ce_val',
    'accuracy_train',
    'accuracy_val',
    'nonzeros',
    'nonzeros_layer3',
  ]:
    assert isinstance(records[0][key], (int, float))
  assert {row['params'] for row in rows} == {'60074'}
  assert rows[3]['file'] == 'members/l1_0.003_seed_1.npz'
  net = load(workdir / rows[3]['file'])
  leaves = jax.tree.leaves(net.params)
  nonzeros = sum(int((leaf != 0).sum()) for leaf in leaves)
  assert nonzeros == int(rows[3]['nonzeros_all'])
  kernels = [net.params[f'layer{i}']['kernel'] for i in (1, 2, 3)]
  assert sum(int((k != 0).sum()) for k in kernels) == int(rows[3]['nonzeros'])
  assert all(((k == 0) | (abs(k) >= 1e-3)).all() for k in kernels)
  config = json.loads((workdir / 'config.json').read_text())
  assert config['l1'] == [1e-4, 3e-3]
  assert config['environment']['jax']
  assert config['seconds'] > 0
  # None outside of a checkout: tests/results_test.py.
  assert re.fullmatch(
    r'None|[0-9a-f]{40}\+?', str(config['environment']['commit'])
  )
  lines = (workdir / 'histograms.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  whens = [(0, 'initial'), (0, 'pruned'), (5, 'epoch'), (6, 'final')]
  sizes = {'layer1': 400 * 120, 'layer2': 120 * 84, 'layer3': 84 * 10}
  found = [
    (r['epoch'], r['when'], r['weight_l1'], r['seed'], r['layer'])
    for r in records
  ]
  assert found == [
    (epoch, when, float(row['weight_l1']), int(row['seed']), layer)
    for epoch, when in whens
    for row in rows
    for layer in sizes
  ]
  for record in records:
    assert sum(record['counts']) + record['zeros'] == sizes[record['layer']]
    assert (record['zeros'] == 0) == (record['when'] == 'initial')
  final = [r for r in records if r['when'] == 'final'][-3:]
  for record, kernel in zip(final, kernels):
    assert record['zeros'] == (kernel == 0).sum()
    assert record['high'] == kernel.max()


_WINDOWS = f"""
import fcntl, os, signal, subprocess, sys, types

def locking(file, mode, length):
  fcntl.flock(file, fcntl.LOCK_EX)

sys.modules['msvcrt'] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
for name in 'fcntl', 'array_record', 'tensorflow_datasets', 'uvloop':
  sys.modules[name] = None
del os.sched_getaffinity, os.set_blocking, signal.SIGKILL
os.process_cpu_count = os.cpu_count
sys.path.insert(0, {str(_ROOT)!r})
import train
train.app.run(train.main, flags_parser=train.parse_flags)
"""


@pytest.mark.slow
def test_the_embedded_digits_train_without_what_windows_lacks(tmp_path):
  """In a process of its own, which compiles: 10 s."""
  done = subprocess.run(
    [sys.executable, '-c', _WINDOWS, '--epochs=1', '--train_size=64', '--l1=0'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (workdir,) = (tmp_path / 'runs').iterdir()
  names = {path.name for path in workdir.iterdir()}
  assert {'results.csv', 'members', 'front.png', 'checkpoints'} <= names
  assert not [name for name in names if name.startswith(UNFINISHED)]


@pytest.mark.slow
def test_multiobjective_members_find_their_weights(call, tmp_path):
  """Compiles LeNet-5, for an epoch of all digits: 20 s."""
  code, out, err = call('--optimizer=madam', '--epochs=1', '--workdir=run')
  assert (code, err) == (0, '')
  assert 'found' in out
  with (tmp_path / 'run' / 'results.csv').open() as file:
    (row,) = csv.DictReader(file)
  assert row['weight_error'] == row['weight_l1'] == ''
  assert row['file'] == 'members/madam_seed_0.npz'
  assert (tmp_path / 'run' / row['file']).exists()


@pytest.mark.parametrize(
  ('args', 'named'),
  [
    (['--optimizer=adamw'], ['optimizer=adamw', 'madam']),
    (['--model=vgg99'], ['model=vgg99', 'lenet5']),
    (['--prune=often'], ['prune=often', 'batch']),
    (['--schedule=cosine'], ['schedule=cosine', 'logistic_drop']),
    (['--scalarization=chebyshev'], ['scalarization=chebyshev', 'convex']),
    (['--no_such_flag=1'], ['no_such_flag']),
    (['extra'], ['extra', 'flags only']),
    (['--l1=1e-4,many'], ['l1=1e-4,many', 'floats']),
    (['--l1='], ['l1=', 'floats']),
    (['--l1=-1e-4'], ['l1=-0.0001', '>= 0']),
    (['--l1=nan'], ['l1=nan', '>= 0']),
    (['--l1=1e-4,1e-4'], ['l1=0.0001,0.0001', 'twice']),
    (['--l1=1.5', '--scalarization=convex'], ['l1=1.5', '[0, 1]']),
    (['--l1=1e-4', '--optimizer=madam'], ['l1=0.0001', 'madam']),
    (['--seed=one'], ['seed=one', 'ints']),
    (['--seed=-1'], ['seed=-1', '2^31']),
    (['--learning_rate=0'], ['learning_rate=0', 'positive']),
    (['--learning_rate=fast'], ['learning_rate=fast']),
    (['--threshold=-1'], ['threshold=-1', 'positive']),
    (['--threshold=inf'], ['threshold=inf', 'positive']),
    # 0, 1 or infinite in float32.
    (['--threshold=1e-46'], ['threshold=1e-46', 'positive', 'float32']),
    (['--learning_rate=1e39'], ['learning_rate=1e+39', 'finite']),
    (['--conv_l2=1e39'], ['conv_l2=1e+39', 'finite']),
    (['--b2=0.999999999'], ['b2=0.999999999', '[0, 1)', 'float32']),
    (['--l1=1e-4,1e39'], ['l1=0.0001,1e+39', 'finite']),
    (['--conv_l2=-1'], ['conv_l2=-1', '>= 0']),
    (['--momentum=1'], ['momentum=1', '[0, 1)']),
    (['--b1=1.5'], ['b1=1.5', '[0, 1)']),
    (['--eps=0'], ['eps=0', 'positive']),
    (['--batch_size=0'], ['batch_size=0', '>= 1']),
    (['--batch_size=4001'], ['batch_size=4001', '4000']),
    (['--train_size=0'], ['train_size=0', '>= 1']),
    (['--train_size=99999'], ['train_size=99999', '4000']),
    (['--train_size=4002', '--val_size=499'], ['train_size=4002', '4001']),
    (['--train_size=31'], ['batch_size=32', '31']),
    (['--rotation=-1'], ['rotation=-1', '[0, 180]']),
    (['--rotation=200'], ['rotation=200', '[0, 180]']),
    (['--rotation=nan'], ['rotation=nan', '[0, 180]']),
    (['--shift=1.5'], ['shift=1.5', '[0, 1]']),
    (['--shift=-0.1'], ['shift=-0.1', '[0, 1]']),
    (['--flip=sometimes'], ['flip=sometimes']),
    (['--stream=2'], ['stream=2']),
    (['--conv_l2_in_both=yes_'], ['conv_l2_in_both=yes_']),
    (['--compute_dtype=float16'], ['compute_dtype=float16', 'bfloat16']),
    (['--epochs=0'], ['epochs=0', '>= 1']),
    (['--epochs=2.5'], ['epochs=2.5']),
    (['--epochs=3000000000'], ['epochs=3000000000', '2^31']),
    (['--search=grid', '--max_runs=3000000000'], ['max_runs=3', '2^31']),
    (['--val_size=-1'], ['val_size=-1', '>= 0']),
    (['--val_size=4500'], ['val_size=4500', '4499']),
    (['--parallel=both'], ['parallel=both', 'members']),
    (['--search=random'], ['search=random', 'bisection']),
    (['--search=grid', '--search_range=1'], ['search_range=1:', 'two numbers']),
    (['--search=grid', '--search_range=low,1'], ['search_range=low', 'floats']),
    (
      ['--search=bisection', '--search_range=0,1'],
      ['search_range=0,1', 'positive'],
    ),
    (['--search=dichotomic', '--search_range=-1,1'], ['=-1,1', '>= 0']),
    (
      ['--search=grid', '--search_range=1e-2,1e-5'],
      ['search_range=0.01,1e-05', 'the first one smaller'],
    ),
    (
      ['--search=grid', '--search_range=1e-5,2', '--scalarization=convex'],
      ['search_range=1e-05,2', 'up to 1'],
    ),
    (['--search=bisection', '--l1=1e-4'], ['l1=0.0001', 'no l1']),
    (
      ['--search=bisection', '--optimizer=madam'],
      ['search=bisection', 'madam', 'weighting=fixed'],
    ),
    (['--search=grid', '--levels=2'], ['levels=2', 'no levels']),
    (['--levels=0'], ['levels=0', '>= 1']),
    (['--max_runs=1'], ['max_runs=1', '>= 2']),
    (['--search_epochs=0'], ['search_epochs=0', '>= 1']),
    (['--select_on=train'], ['select_on=train', 'val', 'test']),
    (['--resume', '--search=bisection'], ['resume=true', '--workdir']),
    (['--resume'], ['resume=true', '--workdir']),
    (
      ['--resume', '--search=bisection', '--workdir=no_such'],
      ['workdir=no_such', 'to resume', 'config.json'],
    ),
    (
      ['--resume', '--search=bisection', '--workdir=full'],
      ['workdir=full', 'to resume', 'config.json'],
    ),
    (['--dataset=no_such_set'], ['dataset=no_such_set', 'mnist5k']),
    (['--checkpoint_every=0'], ['checkpoint_every=0', '>= 1']),
    (['--num_processes=2'], ['num_processes=2', 'coordinator']),
    (
      ['--coordinator=nonsense', '--num_processes=2', '--process_id=0'],
      ['coordinator=nonsense', 'host:port'],
    ),
    (
      ['--coordinator=here:1', '--num_processes=2', '--process_id=2'],
      ['process_id=2', 'num_processes'],
    ),
    (['--heartbeat_s=5'], ['heartbeat_s=5', 'at least 10']),
    (['--workdir='], ['workdir=', 'folder']),
    (['--workdir=a[1]'], ['workdir=a[1]', 'expected no [ or ]']),
    (['--workdir=file/run'], ['workdir=file/run', 'folder']),
    (['--workdir=/proc/run'], ['workdir=/proc/run', 'folder']),
    (['--workdir=file'], ['workdir=file', 'folder']),
    (['--workdir=~no_such_user/run'], ['workdir=~no_such_user/run', 'folder']),
    (['--resume', '--workdir=~no_such_user'], ['~no_such_user', 'to resume']),
    (['--workdir=full'], ['workdir=full', 'has files']),
  ],
)
def test_bad_input_is_one_line_and_exit_2(call, tmp_path, args, named):
  (tmp_path / 'file').write_text('text')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'results.csv').write_text('precious')
  before = {path.name for path in tmp_path.rglob('*')}
  code, out, err = call(*args)
  assert code == 2
  assert out == ''
  assert err.count('\n') == 1
  assert 'Traceback' not in err
  for part in named:
    assert part in err
  assert {path.name for path in tmp_path.rglob('*')} == before
  assert (tmp_path / 'full' / 'results.csv').read_text() == 'precious'


@pytest.mark.parametrize(
  ('settings', 'said'),
  [
    ({'optimizer': 'adamw'}, 'optimizer=adamw: expected sgd, .* or madam'),
    ({'search': ''}, 'search=: expected none, .* or bisection'),
    ({'l1': ()}, 'l1=: expected at least one number'),
    ({'seed': ()}, 'seed=: expected at least one number'),
  ],
)
def test_settings_are_checked_without_flags(settings, said):
  with pytest.raises(ValueError, match=said):
    Config(**settings)


def test_only_vgg_is_augmented_by_default():
  assert Config().augmentation == (0.0, 0.0, False)
  assert Config(model='vgg').augmentation == (15.0, 0.1, True)


@pytest.mark.parametrize(
  ('args', 'vgg', 'lenet5'),
  [
    ({'rotation': 0.0}, (0.0, 0.1, True), (0.0, 0.0, False)),
    ({'shift': 0.0}, (15.0, 0.0, True), (0.0, 0.0, False)),
    ({'flip': False}, (15.0, 0.1, False), (0.0, 0.0, False)),
    ({'rotation': 5.0}, (5.0, 0.1, True), (5.0, 0.0, False)),
    ({'shift': 1.0}, (15.0, 1.0, True), (0.0, 1.0, False)),
    ({'flip': True}, (15.0, 0.1, True), (0.0, 0.0, True)),
  ],
)
def test_each_kind_of_augmentation_is_chosen_alone(args, vgg, lenet5):
  assert Config(model='vgg', **args).augmentation == vgg
  assert Config(model='lenet5', **args).augmentation == lenet5


@pytest.fixture
def started(call, monkeypatch):
  """Calls train.py up to the run; returns what the run is called with."""
  runs = []

  def note(job, resume=None):
    assert not job.should_stop()
    runs.append((*job[:4], resume))

  monkeypatch.setattr(train.training, 'run', note)
  monkeypatch.setattr(train.training, 'search', note)

  def start(*args):
    code, _, err = call('--workdir=run', *args)
    assert (code, err) == (0, '')
    return runs.pop()

  return start


def test_flags_reach_the_run(started):
  config, model, data, _, _ = started(
    '--model=vgg',
    '--compute_dtype=bfloat16',
    '--train_size=100',
    '--noflip',
    '--rotation=0',
    '--shift=0.25',
    '--stream',
    '--conv_l2_in_both',
  )
  assert isinstance(model, VGG)
  assert model.dtype == jnp.bfloat16
  assert config.compute_dtype == 'bfloat16'
  assert len(data.train.labels) == config.train_size == 100
  assert config.augmentation == (0.0, 0.25, False)
  assert config.stream is True
  assert config.conv_l2_in_both is True


def test_without_flags_it_is_lenet5_as_in_the_paper(started):
  config, model, data, _, resume = started()
  assert resume is None  # no search
  assert config == Config()
  assert isinstance(model, LeNet5)
  assert model.dtype == jnp.float32
  assert len(data.train.labels) == 4000
  assert (config.stream, config.conv_l2_in_both) == (None, False)


def test_flags_reach_a_search(started, tmp_path):
  args = (
    '--search=stochastic_dichotomic',
    '--search_range=0,0.5',
    '--search_epochs=2',
    '--levels=3',
    '--max_runs=9',
    '--select_on=test',
    '--parallel=data',
    '--seed=4,7',
  )
  config, _, _, workdir, resume = started(*args)
  assert config == Config(
    search='stochastic_dichotomic',
    search_range=(0.0, 0.5),
    search_epochs=2,
    levels=3,
    max_runs=9,
    select_on='test',
    parallel='data',
    seed=(4, 7),
  )
  assert (workdir, resume) == (pathlib.Path('run'), False)
  # As the search would have left it.
  about = json.dumps(dataclasses.asdict(config))
  (tmp_path / 'run' / 'config.json').write_text(about)
  config, _, _, workdir, resume = started(
    *args, '--resume', '--max_runs=11', '--parallel=auto'
  )
  assert (config.max_runs, config.parallel) == (11, 'auto')
  assert (workdir, resume) == (pathlib.Path('run'), True)


@pytest.mark.parametrize(
  ('args', 'named'),
  [
    (['--epochs=31'], ['epochs=31', '30']),
    (['--seed=0,1'], ['seed=', '[0]']),
    ([], ['results.csv', 'trainings of this search', '2e-05']),
  ],
)
def test_another_search_is_not_resumed(call, tmp_path, args, named):
  (tmp_path / 'run').mkdir()
  about = dataclasses.asdict(Config(search='bisection'))
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(about))
  row = dict.fromkeys([*_COLUMNS[:-2]], 0.5) | {'level': 1, 'weight_l1': 2e-5}
  table = f'{",".join(row)}\n{",".join(map(str, row.values()))}\n'
  (tmp_path / 'run' / 'results.csv').write_text(table)
  before = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
  flags = ['--resume', '--search=bisection', '--workdir=run', *args]
  code, out, err = call(*flags)
  assert (code, out) == (2, '')
  assert err.count('\n') == 1
  for part in named:
    assert part in err
  after = {path: path.read_bytes() for path in (tmp_path / 'run').iterdir()}
  assert after == before


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_to_the_same_end(tmp_path):
  """SIGKILL in the second of two levels; three processes, two programs.

  Each process compiles LeNet-5 twice, so a minute.
  """
  command = [
    *(sys.executable, str(_ROOT / 'train.py')),
    *('--search=bisection', '--search_range=1e-4,1e-1', '--max_runs=3'),
    *('--train_size=320', '--val_size=320', '--epochs=1', '--search_epochs=1'),
  ]
  env = os.environ | {
    'JAX_NUM_CPU_DEVICES': '1',
    'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  kwargs = dict(cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
  with subprocess.Popen([*command, '--workdir=killed'], **kwargs) as process:
    # Its networks compile anew, for there is one less than in the first level.
    while not (tmp_path / 'killed' / 'level_2').exists():
      assert process.poll() is None
      time.sleep(0.05)
    process.kill()
  table = tmp_path / 'killed' / 'results.csv'
  assert [line[:2] for line in table.read_text().splitlines()[1:]] == ['1,'] * 2
  first = (tmp_path / 'killed' / 'level_1' / 'metrics.jsonl').stat()
  command_again = [*command, '--workdir=killed', '--resume']
  done = subprocess.run(command_again, check=True, **kwargs)
  assert 'level 1' not in done.stdout
  assert 'level 2' in done.stdout
  subprocess.run([*command, '--workdir=whole'], check=True, **kwargs)
  # The table of the search and, if it has a knee, of that.
  killed, whole = (
    {
      path.relative_to(tmp_path / name): path.read_bytes()
      for path in (tmp_path / name).rglob('results.csv')
    }
    for name in ('killed', 'whole')
  )
  assert killed == whole
  assert len(table.read_text().splitlines()) == 1 + 3
  after = (tmp_path / 'killed' / 'level_1' / 'metrics.jsonl').stat()
  assert after.st_mtime_ns == first.st_mtime_ns


def test_a_folder_without_write_permission_is_refused(
  call, tmp_path, monkeypatch
):
  (tmp_path / 'run').mkdir()

  def refuse(**kwargs):
    raise PermissionError(13, 'Permission denied')

  # In place of a chmod, which does not stop the superuser.
  monkeypatch.setattr(tempfile, 'TemporaryFile', refuse)
  code, _, err = call('--workdir=run')
  assert code == 2
  assert 'workdir=run' in err
  assert 'Permission denied' in err


def test_a_real_process_exits_with_2_and_no_traceback(tmp_path):
  done = _train('--batch_size=-3', cwd=tmp_path)
  assert done.returncode == 2
  assert done.stdout == ''
  assert done.stderr.splitlines() == [
    'train.py: batch_size=-3: expected an integer >= 1.'
  ]
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('args', 'read'),
  [
    ('--help', 'nothing'),
    ('--help', 'a line'),
    ('--help', 'closed'),
    ('--epochs=x', 'nothing'),
    ('--epochs=-1', 'nothing'),
  ],
)
def test_nobody_needs_to_read_the_output(tmp_path, args, read):
  """`train.py --help | true`, say: no traceback, here or there."""
  command = shlex.join([sys.executable, str(_ROOT / 'train.py'), args])
  after = {'nothing': '| true', 'a line': '| head -n 1', 'closed': '>&-'}[read]
  if args != '--help':
    after = f'2>&1 {after}'
  done = subprocess.run(
    ['bash', '-c', f'{command} {after}; echo ${{PIPESTATUS[0]}}'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.stderr == ''
  *lines, code = done.stdout.splitlines()
  assert len(lines) == (read == 'a line')
  # As Python does where it writes to a closed pipe; 2 if it was faster.
  assert code in ('1', '2')


@pytest.mark.parametrize(
  ('name', 'env', 'shown'),
  [
    ('\xe9', {'PYTHONIOENCODING': 'ascii'}, r'\xe9'),
    # Bytes that are no UTF-8, and a system that knows ASCII only.
    (b'a\xff', {}, r'a\udcff'),
    (
      '\u2603'.encode(),
      {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
      r'\udce2\udc98\udc83',
    ),
  ],
)
@pytest.mark.parametrize('resume', [False, True])
def test_letters_that_cannot_be_encoded_are_refused_first(
  tmp_path, name, env, shown, resume
):
  """Each in a process of its own, which takes 3 s to start."""
  name = os.fsencode(name)
  command = [sys.executable, _ROOT / 'train.py', b'--workdir=' + name]
  if resume:
    (tmp_path / os.fsdecode(name)).mkdir()
    command.append('--resume')
  before = list(tmp_path.iterdir())
  done = subprocess.run(
    command, cwd=tmp_path, env=os.environ | env, capture_output=True
  )
  assert (done.returncode, done.stdout) == (2, b'')
  (line,) = done.stderr.decode().splitlines()
  assert line.startswith(f'train.py: workdir={shown}: expected letters that')
  assert list(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_a_folder_of_others_may_have_any_letters(tmp_path):
  """It is not shown; checkpoints have no trouble with UTF-8. 10 s."""
  folder = tmp_path / '\u2603'
  folder.mkdir()
  done = subprocess.run(
    [sys.executable, _ROOT / 'train.py', '--l1=0', '--epochs=1']
    + ['--train_size=32', '--workdir=run'],
    cwd=folder,
    env=os.environ | {'PYTHONIOENCODING': 'ascii'},
    capture_output=True,
  )
  assert (done.returncode, done.stderr) == (0, b'')
  assert (folder / 'run' / 'results.csv').exists()


_GROUPS = ['data', 'network', 'objectives', 'optimizer', 'pruning', 'search']
_GROUPS += ['running']


@pytest.mark.parametrize('name', ['--help', '--helpshort', '-?'])
def test_help_names_every_flag_of_a_run_in_its_group(tmp_path, name):
  """A process of its own each, which takes 2 s to start."""
  done = _train(name, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (1, '')
  assert done.stdout.startswith('Trains accurate and sparse networks')
  _, *parts = re.split(r'^(\w+):\n', done.stdout, flags=re.M)
  assert parts[::2] == ['flags', *_GROUPS]
  shown = {
    flag: group
    for group, text in zip(parts[2::2], parts[3::2])
    for flag in re.findall(r'^  --(?:\[no\])?(\w+): \S', text, flags=re.M)
  }
  fields = [field.name for field in dataclasses.fields(Config)]
  others = [field.name for field in dataclasses.fields(Place)]
  others += [field.name for field in dataclasses.fields(Others)]
  assert sorted(shown) == sorted(fields + others)
  assert {shown[name] for name in others} == {'running'}
  assert (shown['dataset'], shown['model']) == ('data', 'network')
  assert (shown['l1'], shown['learning_rate']) == ('objectives', 'optimizer')
  assert (shown['threshold'], shown['max_runs']) == ('pruning', 'search')


def test_full_help_has_those_of_absl_too(tmp_path):
  done = _train('--helpfull', cwd=tmp_path)
  assert (done.returncode, done.stderr) == (1, '')
  headings = re.findall(r'^(\S+):\n', done.stdout, flags=re.M)
  assert {*_GROUPS, 'absl.flags', 'absl.logging'} <= set(headings)
  assert '--flagfile' in done.stdout


@pytest.mark.parametrize(
  'field', dataclasses.fields(Config), ids=lambda field: field.name
)
def test_every_setting_is_a_flag(field):
  flag = train.FLAGS[field.name]
  assert flag.default == field.default
  assert type(flag.default) is type(field.default)
  about = settings.said_of(field)
  assert flag.help.endswith(about.help)  # After what it may be.
  assert flag in train.FLAGS.get_flags_for_module(about.group)
  if flag.default_as_str:  # As it is shown, it means the same.
    assert flag.parser.parse(flag.default_as_str.strip("'")) == field.default


def test_flags_may_come_from_a_file(started, tmp_path):
  (tmp_path / 'some.flags').write_text('--l1=1e-4,1e-3\n--noflip\n--seed=3\n')
  config, *_ = started('--flagfile=some.flags', '--seed=4')
  assert config == Config(l1=(1e-4, 1e-3), flip=False, seed=(4,))
