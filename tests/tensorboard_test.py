"""Event files: read back byte by byte, and compared with metrics.jsonl."""

import importlib.util
import io
import json
import pathlib
import re
import shlex
import struct
import sys

import numpy as np
import pytest
from rich.console import Console

from mopt.training import Config
from mopt.training import Job
from mopt.training import run
from mopt.training import search
from mopt.training import tensorboard
from mopt.training.files import read_csv
from mopt.training.loop import Interrupted
from tests.devices import first_devices
from tests.networks import Dropping

_PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'follow_a_run.md'
_needs_writer = pytest.mark.skipif(
  importlib.util.find_spec('tensorboardX') is None,
  reason='tensorboardX is not installed, see the extra [tensorboard]',
)


def _job(data, workdir, **kwargs):
  workdir.mkdir(exist_ok=True)
  settings = {'l1': (1e-4, 1e-3), 'epochs': 4, 'tensorboard': True} | kwargs
  return Job(
    Config(**settings),
    Dropping(0.0),
    data,
    workdir,
    first_devices(1),
    Console(file=io.StringIO()),
  )


def _crc32c(data):
  """Castagnoli's, bit by bit, and masked as a file of records has it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
  crc ^= 0xFFFFFFFF
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _events(folder):
  """What the one file in a folder holds."""
  from tensorboardX.proto.event_pb2 import Event

  (path,) = folder.iterdir()
  # What TensorBoard looks for.
  assert 'tfevents' in path.name
  stream = io.BytesIO(path.read_bytes())
  found = []
  while head := stream.read(8):
    (size,) = struct.unpack('<Q', head)
    assert struct.unpack('<I', stream.read(4)) == (_crc32c(head),)
    data = stream.read(size)
    assert struct.unpack('<I', stream.read(4)) == (_crc32c(data),)
    found.append(Event.FromString(data))
  first, second, *rest = found
  assert first.file_version == 'brain.Event:2'
  # All that was shown before is no more.
  assert (second.session_log.status, second.step) == (1, 1)
  return rest


def _shown(workdir):
  """The scalars of each member of a run: by name, those of each step."""
  return {
    folder.name: [
      (event.step, {v.tag: v.simple_value for v in event.summary.value})
      for event in _events(folder)
    ]
    for folder in (workdir / 'tensorboard').iterdir()
  }


def _logged(workdir, rows):
  """The same of metrics.jsonl, whose members are in the order of the rows."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  found = {}
  for i, row in enumerate(rows):
    found[pathlib.Path(row['file']).stem] = [
      (
        record.pop('epoch'),
        {k: np.float32(v) for k, v in record.items() if v is not None},
      )
      for record in records[i :: len(rows)]
    ]
  return found


@_needs_writer
def test_files_show_what_is_logged(few_digits, tmp_path):
  rows = run(_job(few_digits, tmp_path, seed=(0, 1)))
  shown = _shown(tmp_path)
  assert shown == _logged(tmp_path, rows)
  assert sorted(shown) == [
    f'l1_{l1}_seed_{seed}' for l1 in ('0.0001', '0.001') for seed in (0, 1)
  ]
  steps, values = zip(*shown['l1_0.001_seed_1'])
  assert steps == (1, 2, 3, 4)
  assert {'seed', 'weight_l1', 'learning_rate', 'nonzeros'} <= set(values[0])
  # What was not measured is not shown.
  assert 'accuracy_train' in values[0]
  assert 'accuracy_val' not in values[0]
  # It grows as the epochs go by, and not at the end.
  folder = tmp_path / 'tensorboard' / 'l1_0.001_seed_1'
  times = [event.wall_time for event in _events(folder)]
  assert times == sorted(times)
  assert len(set(times)) == 4


@_needs_writer
@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('checkpoint_every', [1, 2, 4])
def test_a_run_that_goes_on_shows_each_epoch_once(
  few_digits, tmp_path, checkpoint_every, before
):
  """Also those before the flag was given, and those that are trained again."""
  settings = {'checkpoint_every': checkpoint_every}
  job = _job(few_digits, tmp_path, **settings, tensorboard=before)

  def fail(records):
    if records[0]['epoch'] == 3:
      raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    run(job._replace(on_epoch=fail))
  if before:
    shown = _shown(tmp_path)
    assert [step for step, _ in shown['l1_0.001_seed_0']] == [1, 2, 3]
  else:
    assert not (tmp_path / 'tensorboard').exists()
  job = _job(few_digits, tmp_path, **settings)
  with pytest.raises(Interrupted):
    run(job._replace(should_stop=lambda: True))
  rows = run(job)
  shown = _shown(tmp_path)
  assert shown == _logged(tmp_path, rows)
  for values in shown.values():
    assert [step for step, _ in values] == [1, 2, 3, 4]


@_needs_writer
def test_a_search_has_files_of_each_training(few_digits, tmp_path):
  settings = {'search': 'grid', 'max_runs': 5, 'search_epochs': 2}
  settings |= {'search_range': (1e-5, 1e-1), 'learning_rate': 0.01}
  rows = search(_job(few_digits, tmp_path, l1=None, **settings))
  (knee,) = tmp_path.glob('knee_*')
  assert _shown(knee) == _logged(knee, rows)
  table = read_csv(tmp_path / 'results.csv')
  level = tmp_path / 'level_1'
  assert _shown(level) == _logged(level, table)


@_needs_writer
def test_a_file_that_cannot_be_written_ends_the_run(
  few_digits, tmp_path, monkeypatch
):
  job = _job(few_digits, tmp_path)
  scalars = tensorboard._scalars

  def remove(record):
    for path in (tmp_path / 'tensorboard').iterdir():
      path.rename(tmp_path / path.name)
    return scalars(record)

  with monkeypatch.context() as patch:
    patch.setattr(tensorboard, '_scalars', remove)
    with pytest.raises(FileNotFoundError, match='tfevents'):
      run(job)
  rows = run(job)
  assert _shown(tmp_path) == _logged(tmp_path, rows)


@_needs_writer
def test_what_no_float_can_show_is_left_out(tmp_path):
  record = {'a': 1, 'b': 0.5, 'c': float('nan'), 'd': 1e39, 'e': -1e39}
  record |= {'f': float('inf'), 'g': -3e38, 'h': 2**24, 'i': None}
  (tmp_path / 'events' / 'old').mkdir(parents=True)
  append = tensorboard.start(tmp_path / 'events', ['x'], [])
  append([record | {'epoch': 7}])
  (event,) = _events(tmp_path / 'events' / 'x')
  assert event.step == 7
  assert {v.tag: v.simple_value for v in event.summary.value} == {
    **{'a': 1, 'b': 0.5, 'g': np.float32(-3e38), 'h': 2**24}
  }
  assert [p.name for p in (tmp_path / 'events').iterdir()] == ['x']


def test_without_the_writer_it_is_one_line_and_exit_2(
  call, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  before = set(tmp_path.iterdir())
  code, out, err = call('--tensorboard', '--workdir=run')
  assert (code, out) == (2, '')
  assert err == (
    'train.py: tensorboard=True: expected tensorboardX, which writes what '
    "TensorBoard shows; to install it: pip install -e '.[tensorboard]'.\n"
  )
  assert set(tmp_path.iterdir()) == before


def test_the_extra_of_the_message_is_there():
  text = (_PAGE.parents[1] / 'pyproject.toml').read_text()
  assert re.search(r'^tensorboard = \["tensorboardX', text, re.M)


@pytest.mark.slow
@_needs_writer
def test_the_page_runs_from_top_to_bottom(call, tmp_path, monkeypatch):
  """Two trainings, each of which compiles: 15 s."""
  names, commands = {}, []
  for language, text in re.findall(
    r'```(python|sh)\n(.*?)```', _PAGE.read_text(), re.S
  ):
    if language == 'python':
      monkeypatch.chdir(tmp_path)
      exec(text, names)
      continue
    commands += map(shlex.split, text.splitlines())
  assert [command[0] for command in commands] == [
    *('pip', 'python', 'tensorboard')
  ]
  _, script, *args = commands[1]
  assert script == 'train.py'
  code, _, err = call(*args, '--epochs=1', '--train_size=640')
  assert (code, err) == (0, '')
  assert len(list((tmp_path / 'followed' / 'tensorboard').iterdir())) == 2
  assert commands[2][1] == '--logdir=followed'
  assert [record['epoch'] for record in names['best']] == [1, 2, 3]
  assert len(names['rows']) == 2
