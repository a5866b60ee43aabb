"""The command line: what it writes, and one line for what is wrong."""

import csv
import json
import pathlib
import subprocess
import sys

import pytest

from mopt.training import load
import train

_ROOT = pathlib.Path(__file__).parents[1]
_COLUMNS = [
  'l1',
  'seed',
  'ce_train',
  'ce_val',
  'ce_test',
  'l1_norm',
  'nonzeros',
  'nonzeros_layer1',
  'nonzeros_layer2',
  'nonzeros_layer3',
  'acc_train',
  'acc_val',
  'acc_test',
  'pareto',
  'knee',
]


def _train(*args, cwd):
  command = [sys.executable, str(_ROOT / 'train.py'), *args]
  return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
  """Calls train.py in this process; returns exit code, output and errors."""
  monkeypatch.chdir(tmp_path)

  def run(*args):
    train.FLAGS.unparse_flags()
    for name in train.FLAGS:
      if train.FLAGS[name].present:
        train.FLAGS[name].unparse()
    code = 0
    try:
      train.main(train.parse_flags(['train.py', *args]))
    except SystemExit as stop:
      code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return run


@pytest.mark.slow
def test_a_run_leaves_what_it_promises(tmp_path):
  args = ('--epochs=2', '--l1=1e-4,3e-3', '--seed=0,1')
  done = _train(*args, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert done.stderr == ''
  assert 'epoch 2/2' in done.stdout
  (workdir,) = (tmp_path / 'runs').iterdir()
  names = {path.name for path in workdir.iterdir()}
  assert names == {
    'config.json',
    'front.png',
    'members',
    'metrics.jsonl',
    'results.csv',
  }
  with (workdir / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert list(rows[0]) == _COLUMNS
  assert [(r['l1'], r['seed']) for r in rows] == [
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
  assert [r['epoch'] for r in records] == [1] * 4 + [2] * 4
  for key in [
    'objective_1',
    'objective_2',
    'grad_norm_1',
    'grad_norm_2',
    'cosine',
    'weight_1',
    'weight_2',
    'learning_rate',
    'accuracy',
    'accuracy_val',
    'nonzeros',
    'nonzeros_layer3',
  ]:
    assert isinstance(records[0][key], (int, float))
  net = load(workdir / 'members' / 'l1_0.003_seed_1.npz')
  kernels = [net.params[f'layer{i}']['kernel'] for i in (1, 2, 3)]
  assert sum(int((k != 0).sum()) for k in kernels) == int(rows[3]['nonzeros'])
  assert all(((k == 0) | (abs(k) >= 1e-3)).all() for k in kernels)
  config = json.loads((workdir / 'config.json').read_text())
  assert config['l1'] == [1e-4, 3e-3]
  assert config['environment']['jax']
  assert config['seconds'] > 0


@pytest.mark.slow
def test_multiobjective_members_find_their_weights(call, tmp_path):
  code, out, err = call('--optimizer=madam', '--epochs=1', '--workdir=run')
  assert (code, err) == (0, '')
  assert 'found' in out
  with (tmp_path / 'run' / 'results.csv').open() as file:
    (row,) = csv.DictReader(file)
  assert row['l1'] == ''
  assert (tmp_path / 'run' / 'members' / 'madam_seed_0.npz').exists()


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
    (['--conv_l2=-1'], ['conv_l2=-1', '>= 0']),
    (['--momentum=1'], ['momentum=1', '[0, 1)']),
    (['--b1=1.5'], ['b1=1.5', '[0, 1)']),
    (['--eps=0'], ['eps=0', 'positive']),
    (['--batch_size=0'], ['batch_size=0', '>= 1']),
    (['--batch_size=4001'], ['batch_size=4001', '4000']),
    (['--epochs=0'], ['epochs=0', '>= 1']),
    (['--epochs=2.5'], ['epochs=2.5']),
    (['--val_size=-1'], ['val_size=-1', '>= 0']),
    (['--val_size=4500'], ['val_size=4500', '4499']),
    (['--dataset=no_such_set'], ['dataset=no_such_set', 'mnist5k']),
    (['--workdir='], ['workdir=', 'folder']),
    (['--workdir=no/such/place'], ['workdir=no/such/place', 'folder']),
    (['--workdir=/proc/run'], ['workdir=/proc/run', 'folder']),
    (['--workdir=file'], ['workdir=file', 'folder']),
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


def test_a_folder_without_write_permission_is_refused(
  call, tmp_path, monkeypatch
):
  (tmp_path / 'run').mkdir()

  def refuse(**kwargs):
    raise PermissionError(13, 'Permission denied')

  # In place of a chmod, which does not stop the superuser.
  monkeypatch.setattr(train.tempfile, 'TemporaryFile', refuse)
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


def test_help_names_every_flag_of_a_run(tmp_path):
  done = _train('--help', cwd=tmp_path)
  for name in train.Config.__dataclass_fields__:
    assert f'--{name}' in done.stdout or f'--[no]{name}' in done.stdout
  assert done.stdout.startswith('Trains accurate and sparse networks')
