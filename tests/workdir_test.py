"""Who may go on in a folder: the same settings and data, and one process."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import types

import pytest

from mopt.training import Config
from mopt.training import settings
from mopt.training.files import UNFINISHED
from mopt.training.workdir import Busy
from mopt.training.workdir import check_settings
from mopt.training.workdir import locked
from mopt.training.workdir import make_workdir

_ROOT = pathlib.Path(__file__).parents[1]


def _write(folder, about):
  (folder / 'config.json').write_text(json.dumps(about))


# What each field may become, where that is not the default.
_OTHER = dict(
  dataset='mnist',
  data_dir='/data',
  train_size=100,
  val_size=7,
  stream=True,
  rotation=1.0,
  shift=0.2,
  flip=True,
  model='vgg',
  init='net.npz',
  compute_dtype='bfloat16',
  optimizer='sgd',
  objectives=('error', 'l2'),
  weighting='upgrad',
  weights=((1.0, 1e-4), (1.0, 2e-4)),
  l1=(1e-4, 1e-3),
  scalarization='convex',
  conv_l2=0.0,
  conv_l2_in_both=True,
  prune='epoch',
  prunable='kernels',
  threshold=1e-4,
  learning_rate=0.1,
  end_rate=0.01,
  schedule='constant',
  decay=0.1,
  momentum=0.5,
  nesterov=True,
  rms_decay=0.5,
  b1=0.5,
  b2=0.5,
  eps=1e-3,
  batch_size=64,
  drop_remainder=True,
  epochs=31,
  seed=(0, 1),
  parallel='data',
  profile=True,
  tensorboard=True,
  checkpoint_every=5,
  search='bisection',
  search_range=(1e-4, 1e-2),
  search_epochs=3,
  levels=3,
  max_runs=21,
  select_on='test',
  front_column='l1',
)
# All that is said of what changes no result but by rounding.
_MAY_CHANGE = {'data_dir', 'stream', 'parallel', 'profile', 'tensorboard'}
_MAY_CHANGE |= {'checkpoint_every'}


def test_what_may_change_is_marked_on_the_settings():
  assert set(settings.marked(Config, 'may_change')) == _MAY_CHANGE
  of_searches = settings.marked(Config, 'search_may_change')
  assert set(of_searches) == {'levels', 'max_runs'}


def test_a_mark_is_all_that_it_takes(tmp_path, monkeypatch):
  _write(tmp_path, dataclasses.asdict(Config()))
  config = Config(batch_size=64)
  with pytest.raises(ValueError, match='^batch_size=64: expected 32'):
    check_settings(config, tmp_path)
  field = Config.__dataclass_fields__['batch_size']
  about = settings.said_of(field)._replace(may_change=True)
  monkeypatch.setattr(field, 'metadata', {'setting': about})
  assert check_settings(config, tmp_path) == ['batch_size=64, was 32']


def test_every_setting_is_below():
  assert list(_OTHER) == [field.name for field in dataclasses.fields(Config)]


@pytest.mark.parametrize('name', _OTHER)
def test_settings_may_change_where_the_result_does_not(tmp_path, name):
  before = Config()
  _write(tmp_path, dataclasses.asdict(before))
  assert check_settings(before, tmp_path) == []
  config = dataclasses.replace(before, **{name: _OTHER[name]})
  if name in _MAY_CHANGE:
    (line,) = check_settings(config, tmp_path)
    assert line == f'{name}={_OTHER[name]}, was {getattr(before, name)}'
  else:
    with pytest.raises(ValueError, match='as in .*config.json') as error:
      check_settings(config, tmp_path)
    assert str(error.value).startswith(f'{name}={_OTHER[name]}: expected')


@pytest.mark.parametrize(
  ('search', 'changes', 'named'),
  [
    ('bisection', {'max_runs': 30}, None),
    ('bisection', {'levels': 4}, None),
    ('dichotomic', {'levels': 4, 'max_runs': 30}, None),
    ('stochastic_dichotomic', {'max_runs': 30, 'parallel': 'data'}, None),
    ('grid', {'max_runs': 30}, 'max_runs'),
    ('none', {'levels': 4}, 'levels'),
    ('bisection', {'search_epochs': 4}, 'search_epochs'),
    ('bisection', {'search': 'dichotomic'}, 'search'),
    ('bisection', {'search': 'none'}, 'search'),
  ],
)
def test_a_search_may_get_more_trainings(tmp_path, search, changes, named):
  before = Config(search=search)
  _write(tmp_path, dataclasses.asdict(before))
  config = dataclasses.replace(before, **changes)
  if named is None:
    lines = check_settings(config, tmp_path)
    assert [line.split('=')[0] for line in lines] == sorted(
      changes, key=list(_OTHER).index
    )
  else:
    with pytest.raises(ValueError, match=f'^{named}='):
      check_settings(config, tmp_path)


def test_settings_are_those_of_json(tmp_path):
  """Where tuples are lists, 1 is 1.0, and 1e-4 may be written otherwise."""
  config = Config(l1=(1e-4, 3e-4), seed=(0, 7), learning_rate=1.0)
  about = json.loads(json.dumps(dataclasses.asdict(config)))
  _write(tmp_path, about | {'learning_rate': 1, 'seconds': 3, 'knee': None})
  assert check_settings(config, tmp_path) == []
  with pytest.raises(ValueError, match=r'seed=\(7, 0\): expected \[0, 7\]'):
    check_settings(dataclasses.replace(config, seed=(7, 0)), tmp_path)


def test_a_run_from_before_a_setting_was_there_has_its_default(tmp_path):
  about = dataclasses.asdict(Config())
  for name in ('checkpoint_every', 'conv_l2_in_both', 'search_range'):
    del about[name]
  _write(tmp_path, about)
  assert check_settings(Config(), tmp_path) == []
  with pytest.raises(ValueError, match='conv_l2_in_both=True: expected False'):
    check_settings(Config(conv_l2_in_both=True), tmp_path)


@pytest.mark.parametrize(
  ('name', 'text'),
  [
    ('results.csv', 'l1,seed,ce_train,l1_norm,acc_train\n1e-3,0,1.0,2.0,0.5\n'),
    ('metrics.jsonl', '{"epoch": 1, "ce": 0.3, "accuracy": 0.9}\n'),
  ],
)
def test_a_folder_with_columns_of_other_names_is_refused(tmp_path, name, text):
  _write(tmp_path, dataclasses.asdict(Config()))
  (tmp_path / name).write_text(text)
  message = re.escape(f'{tmp_path / name}: expected columns as this version')
  with pytest.raises(ValueError, match=message):
    check_settings(Config(), tmp_path)
  assert (tmp_path / name).read_text() == text
  # What is of today, or was cut off.
  today = text.replace('acc_', 'accuracy_')
  for name_before in ('ce"', 'accuracy"'):
    today = today.replace(name_before, f'{name_before[:-1]}_train"')
  for good in (today, text[:20], ''):
    (tmp_path / name).write_text(good)
    assert check_settings(Config(), tmp_path) == []


@pytest.mark.parametrize(
  'text',
  [None, '', '{"epochs": 3', '[1]', 'null', '{"environment": [1]}'],
)
def test_without_settings_there_is_nothing_to_resume(tmp_path, text):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=f'workdir={tmp_path}: .* to resume'):
    check_settings(Config(), tmp_path)


def test_other_data_are_refused_and_the_same_are_not(tmp_path):
  about = dataclasses.asdict(Config(dataset='mine.npz'))
  path = tmp_path / 'config.json'
  config = Config(dataset='mine.npz', parallel='data')
  lines = ['parallel=data, was auto']
  _write(tmp_path, about | {'environment': {'data': '12ab'}})
  assert check_settings(config, tmp_path, '12ab') == lines
  with pytest.raises(ValueError) as error:
    check_settings(config, tmp_path, '34cd')
  assert str(error.value) == (
    f'dataset=mine.npz: expected the data of {path}, with the fingerprint '
    '12ab, got 34cd; or another workdir.'
  )
  # A setting that differs is the better reason.
  with pytest.raises(ValueError, match='^train_size=7: expected None'):
    check_settings(dataclasses.replace(config, train_size=7), tmp_path, '34cd')
  # Of a level of a search, and of a run from before there were any.
  assert check_settings(config, tmp_path) == lines
  for old in (about, about | {'environment': {}}):
    _write(tmp_path, old)
    assert check_settings(config, tmp_path, '34cd') == lines


def _as_on_windows(fcntl):
  """What stands in for `msvcrt`, whose locks end with the process, too."""

  def locking(file, mode, length):
    assert (mode, length) == ('now', 1)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

  return types.SimpleNamespace(LK_NBLCK='now', locking=locking)


@pytest.fixture(params=['fcntl', 'msvcrt'])
def system(request, monkeypatch):
  if request.param == 'msvcrt':
    import fcntl

    monkeypatch.setitem(sys.modules, 'msvcrt', _as_on_windows(fcntl))
    monkeypatch.setitem(sys.modules, 'fcntl', None)
  return request.param


_LOCKS = """
import runpy, sys, time
workdir = runpy.run_path(sys.argv[1])
with workdir['locked'](sys.argv[2]):
  print('locked', flush=True)
  time.sleep(60)
"""


def test_a_folder_is_for_one_process(tmp_path):
  module = _ROOT / 'mopt' / 'training' / 'workdir.py'
  command = [sys.executable, '-c', _LOCKS, str(module), str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
    try:
      assert process.stdout.readline() == b'locked\n'
      message = f'workdir={tmp_path}.* no other process'
      with pytest.raises(Busy, match=message), locked(tmp_path):
        pass
    finally:
      process.kill()
  # However it ended.
  with locked(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_a_folder_is_free_again_after_an_error(tmp_path, system):
  for _ in range(2):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
      raise ZeroDivisionError
  with locked(tmp_path):
    for _ in range(2):
      with pytest.raises(Busy), locked(tmp_path):
        pass
    names = [path.name for path in tmp_path.iterdir()]
    assert names == ([] if system == 'fcntl' else ['.unfinished-lock'])
  with locked(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_a_lock_file_of_a_killed_process_is_no_obstacle(tmp_path, monkeypatch):
  import fcntl

  (tmp_path / '.unfinished-lock').touch()
  monkeypatch.setitem(sys.modules, 'msvcrt', _as_on_windows(fcntl))
  monkeypatch.setitem(sys.modules, 'fcntl', None)
  with locked(tmp_path), pytest.raises(Busy), locked(tmp_path):
    pass
  assert list(tmp_path.iterdir()) == []


def test_parents_of_a_workdir_are_made(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = make_workdir('runs/first/../second')
  assert folder.is_dir()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['runs']


def test_a_null_byte_is_refused():
  with pytest.raises(ValueError, match='expected letters .* no null byte'):
    make_workdir('a\0b')


def test_a_run_killed_before_it_began_is_no_obstacle(tmp_path):
  unfinished = tmp_path / f'{UNFINISHED}1234'
  unfinished.write_text('{"model":')
  assert make_workdir(str(tmp_path)) == tmp_path
  assert unfinished.exists()
  (tmp_path / 'results.csv').write_text('precious')
  with pytest.raises(ValueError, match='has files'):
    make_workdir(str(tmp_path))
