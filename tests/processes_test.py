"""Two real processes on this machine, beside one."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mopt.training import load
from mopt.training import processes

_ROOT = pathlib.Path(__file__).parents[1]
# The smallest network there is, so that most of the time goes into waiting.
_SCRIPT = """
import json, pathlib, sys, tempfile, time
import jax
from mopt import training
from mopt.training import processes
from mopt.training.loop import Interrupted
from tests.networks import Tiny

workdir, coordinator, which, devices, settings, stop, pause = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')  # One GPU is for one process.
jax.config.update('jax_num_cpu_devices', int(devices))
if coordinator:
  processes.start(coordinator, 2, int(which), heartbeat_s=10)
data = training.load_dataset('mnist5k', None, 77, 650)  # 20 steps and 10 more
settings = json.loads(settings)
settings = {k: tuple(v) if type(v) is list else v for k, v in settings.items()}
config = training.Config(val_size=77, train_size=650, **settings)
first = processes.is_first()
def should_stop():
  time.sleep(float(pause))
  return stop == which
with tempfile.TemporaryDirectory() as other:
  folder = pathlib.Path(workdir if first else other)
  resume = (folder / 'config.json').exists()
  job = training.Job(config, Tiny(), data, folder, should_stop=should_stop)
  try:
    if config.is_search:
      # All of them have to be told the same.
      training.search(job, processes.any_of(resume))
    else:
      training.run(job)
  except Interrupted as error:
    print(error)
"""

_MEMBERS = dict(optimizer='sgd', l1=(1e-4, 1e-3, 1e-2), epochs=4)
_SHARED = dict(optimizer='sgd', l1=(1e-4, 1e-3), epochs=8, parallel='data')


def _start(
  workdir, settings, coordinator='', which=0, devices=1, stop='', pause=0
):
  """Process `stop` is asked to stop, and all rest for a while in each epoch."""
  workdir.mkdir(exist_ok=True)
  settings = json.dumps(settings)
  arguments = [workdir, coordinator, which, devices, settings, stop, pause]
  return _python(_SCRIPT, *arguments)


def _python(script, *arguments, **kwargs):
  return subprocess.Popen(
    [sys.executable, '-c', script, *map(str, arguments)],
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    **kwargs,
  )


def _finish(*started):
  """What each of them has said."""
  said = [process.communicate(timeout=300)[0] for process in started]
  for process, output in zip(started, said):
    assert process.returncode == 0, output
  return said


def _coordinator():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def _start_two(workdir, settings, **kwargs):
  address = _coordinator()
  return [_start(workdir, settings, address, i, **kwargs) for i in (0, 1)]


def _check_close(one, two):
  """A weight near the threshold may fall on either side of it."""
  names = {path.name for path in (one / 'members').iterdir()}
  assert names == {'l1_0.0001_seed_0.npz', 'l1_0.001_seed_0.npz'}
  for name in names:
    a, b = (
      jax.tree.leaves(load(folder / 'members' / name).params)
      for folder in (one, two)
    )
    for x, y in zip(a, b):
      same = (x == 0) == (y == 0)
      assert same.mean() > 0.999
      np.testing.assert_allclose(x[same], y[same], rtol=1e-5, atol=2e-6)


def _check_same(one, two):
  """Every byte of what was trained: logs, networks and a table of them."""
  files = [
    path.relative_to(one)
    for path in sorted(one.rglob('*'))
    if path.suffix in ('.jsonl', '.csv', '.npz')
    and 'checkpoints' not in path.parts
  ]
  assert {file.suffix for file in files} >= {'.jsonl', '.npz'}
  for file in files:
    assert (one / file).read_bytes() == (two / file).read_bytes(), file


def _check_close_cells(one, two, rel=1e-4):
  rows = [path.read_text().splitlines() for path in (one, two)]
  assert len(rows[0]) == len(rows[1])
  for a, b in zip(*rows):
    for x, y in zip(a.split(','), b.split(',')):
      assert x == y or float(x) == pytest.approx(float(y), rel=rel)


@pytest.fixture(scope='module')
def spread(tmp_path_factory):
  """Three members in one process of two devices; the last one is filled up."""
  folder = tmp_path_factory.mktemp('spread')
  (said,) = _finish(_start(folder, _MEMBERS, devices=2))
  assert 'members on 2 CPU devices ->' in said
  return folder


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(tmp_path, spread):
  """Three processes that start and compile, on two cores: half a minute."""
  folder = tmp_path / 'run'
  # The second one is asked to stop, and both do.
  first, second = _finish(*_start_two(folder, _MEMBERS, stop='1'))
  assert 'members on 2 CPU devices of 2 processes ->' in first
  assert 'stopped after epoch 1.' in first
  assert 'stopped after epoch 1.' in second
  config = json.loads((folder / 'config.json').read_text())
  assert config['environment']['processes'] == 2
  (said,) = _finish(_start(folder, _MEMBERS, devices=2))
  assert 'going on after epoch 1' in said
  _check_same(spread, folder)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was(tmp_path, spread):
  """Likewise; a device more in one of them makes no difference."""
  folder = tmp_path / 'run'
  _finish(_start(folder, _MEMBERS, devices=2, stop='0'))
  address = _coordinator()
  said, nothing = _finish(
    _start(folder, _MEMBERS, address, 0, devices=1),
    _start(folder, _MEMBERS, address, 1, devices=2),
  )
  assert 'going on after epoch 1' in said
  assert 'members on 2 CPU devices of 2 processes ->' in said
  _check_same(spread, folder)


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
  """Three processes that start and compile, on two cores: up to a minute."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  settings = _SHARED | {'epochs': 1}
  _finish(_start(one, settings))
  said, _ = _finish(*_start_two(two, settings))
  assert 'batches on 2 CPU devices of 2 processes ->' in said
  _check_close(one, two)
  # 77 validation and 500 test examples are not divisible by two devices.
  _check_close_cells(one / 'results.csv', two / 'results.csv')


@pytest.mark.slow
@pytest.mark.parametrize('settings', [_MEMBERS, _SHARED])
def test_a_lost_process_ends_the_other_and_one_goes_on(
  tmp_path, settings, request
):
  """With its checkpoint, on another number of devices.

  It is missed after 10 s at the latest, and three processes start and compile:
  a minute.
  """
  folder = tmp_path / 'run'
  epochs = settings['epochs']
  first, second = _start_two(folder, settings, pause=1)
  seal = folder / 'checkpoints' / '1' / 'sha256.json'
  deadline = time.monotonic() + 200
  while not seal.exists():
    assert first.poll() is None, first.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.1)
  second.send_signal(signal.SIGKILL)
  second.communicate()
  killed = time.monotonic()
  first.communicate(timeout=120)
  assert first.returncode != 0
  # The heartbeat of ten seconds, and the shutdown.
  assert time.monotonic() - killed < 60
  (output,) = _finish(_start(folder, settings, devices=2))
  assert 'going on after epoch' in output
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  found = [json.loads(line)['epoch'] for line in lines]
  members = len(settings['l1'])
  assert found == [n for n in range(1, epochs + 1) for _ in range(members)]
  if settings is _MEMBERS:
    _check_same(request.getfixturevalue('spread'), folder)


@pytest.mark.slow
def test_a_search_over_two_processes_is_that_of_one(tmp_path):
  """Two levels and the knee, and five processes: a minute.

  The level of one weight shares its batches in two processes, and not in one.
  """
  settings = dict(
    search='bisection',
    max_runs=3,
    search_range=(1e-3, 1e-2),
    search_epochs=3,
    epochs=1,
    seed=(0, 1),
    learning_rate=1e-2,
  )
  one, two = tmp_path / 'one', tmp_path / 'two'
  _finish(_start(one, settings, devices=2))
  said, _ = _finish(*_start_two(two, settings))
  assert said.count('members on 2 CPU devices of 2 processes ->') == 2
  assert said.count('batches on 2 CPU devices of 2 processes ->') == 1
  knee = json.loads((one / 'config.json').read_text())['knee']
  assert json.loads((two / 'config.json').read_text())['knee'] == knee
  for name in ('level_1', f'knee_l1_{knee:g}'):
    _check_same(one / name, two / name)
  # An example of 77 may be judged otherwise.
  _check_close_cells(one / 'results.csv', two / 'results.csv', rel=0.05)
  # Two processes know what the one has done, though only the first one sees it.
  before = (one / 'results.csv').read_bytes()
  said, _ = _finish(*_start_two(one, settings))
  assert 'finished already' in said
  assert 'level ' not in said
  assert (one / 'results.csv').read_bytes() == before


_SHARES = """
import sys
import jax
import ml_dtypes
import numpy as np
from mopt.training import processes

coordinator, which = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 1 + int(which))
processes.start(coordinator, 2, int(which), heartbeat_s=10)
assert jax.process_count() == 2

def calls(function, *arguments):
  try:
    return function(*arguments)
  except (OSError, ValueError) as error:
    return f'{type(error).__name__}: {error}'

def fails():
  raise ValueError('damaged')

def fails_in_second():
  if which == '1':
    raise FileNotFoundError(2, 'not here')
  return 'fine'

say = lambda *x: print('SAYS', *x, flush=True)
say(processes.from_first(lambda: ('rows', which)))
say(calls(processes.from_first, fails))
say(calls(processes.together, fails_in_second))
say(processes.together(lambda: which) == which)
say(processes.any_of(which == '1'), processes.any_of(False))
alike = lambda: {'epochs': 3, 'size': 4 + int(which)}
say(calls(processes.check_alike, alike))
processes.check_alike(lambda: {'epochs': 3})
# More than a message of one part, of two, and of three; none in the second.
for size in (1, 4000, 5000, 9_000_000):
  own = np.arange(size, dtype=np.uint32) * (which == '0')
  first, second = processes.share(own if which == '0' else None)
  assert first.tolist() == list(range(size)) and second is None
wide = [np.float64(1) / 3, np.int64(2**40 + 1), np.ones(2, ml_dtypes.bfloat16)]
for found in processes.share(wide):
  assert [x.dtype for x in found] == [x.dtype for x in wide]
  assert all((x == y).all() for x, y in zip(found, wide))
with jax.disable_jit():
  say(processes.share(which))
if which == '1':
  processes.leave(3)
try:
  processes.share(which)
except processes.Lost as error:
  say(str(error).split(' (')[0])
  processes.leave(4)
"""


def test_two_processes_know_what_each_other_say():
  """Two processes, which take 3 s to start."""
  address = _coordinator()
  started = [_python(_SHARES, address, which) for which in (0, 1)]
  said = [process.communicate(timeout=120)[0] for process in started]
  codes = [process.returncode for process in started]
  assert codes == [4, 3], '\n'.join(said)
  expected = [
    "('rows', '0')",
    'ValueError: damaged',
    'FileNotFoundError: [Errno 2] not here',
    'True',
    'True False',
    'ValueError: size=5 in process 1: expected 4, as in the first one.',
    "['0', '1']",
  ]
  lost = ['another process is lost']
  for output, wanted in zip(said, (expected + lost, expected)):
    # Beside what JAX says of its connections.
    lines = [line for line in output.splitlines() if line.startswith('SAYS ')]
    assert lines == [f'SAYS {line}' for line in wanted], output


def test_a_process_alone_shares_with_nobody():
  assert processes.is_first()
  assert processes.any_of(True)
  assert not processes.any_of(False)
  found = 3, {'w': np.ones(2)}
  assert processes.share(found)[0] is found
  assert processes.from_first(lambda: found) is found
  assert processes.together(lambda: found) is found
  # It is not even asked for its values.
  processes.check_alike(lambda: pytest.fail('asked'))


def test_jax_is_told_where_the_others_are_or_finds_them(monkeypatch):
  told = []
  initialize = lambda **kwargs: told.append(kwargs)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  processes.start('auto', heartbeat_s=30)
  processes.start('there:1234', 3, 2)
  assert told == [
    {'heartbeat_timeout_seconds': 30},
    {
      'heartbeat_timeout_seconds': 100,
      'coordinator_address': 'there:1234',
      'num_processes': 3,
      'process_id': 2,
    },
  ]


@pytest.mark.parametrize('error', [RuntimeError, ValueError])
def test_what_jax_does_not_find_is_one_error(monkeypatch, error):
  def initialize(**kwargs):
    raise error('no cluster here')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  said = r'coordinator=auto: expected host:port .* \(no cluster here\)'
  with pytest.raises(ValueError, match=said):
    processes.start('auto')


@pytest.mark.parametrize('address', ['nonsense', ':1234', 'here:', 'here:x'])
def test_an_address_that_is_none_is_refused(address):
  with pytest.raises(ValueError, match=f'={address}: expected host:port'):
    processes.start(address, 2, 1)


@pytest.mark.parametrize(
  ('env', 'expected'),
  [
    ({}, [('jax_num_cpu_devices', 3)]),
    (
      {'XLA_FLAGS': '--xla_cpu_enable_fast_math=false'},
      [('jax_num_cpu_devices', 3)],
    ),
    ({'XLA_FLAGS': '--xla_force_host_platform_device_count=7'}, []),
    ({'JAX_NUM_CPU_DEVICES': '1'}, []),
  ],
)
def test_every_core_is_a_device_unless_told_otherwise(
  monkeypatch, env, expected
):
  for name in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES'):
    monkeypatch.delenv(name, raising=False)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  updates = []
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 2, 5})
  monkeypatch.setattr(jax.config, 'update', lambda *x: updates.append(x))
  processes.make_cores_devices()
  assert updates == expected


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ({'num_processes': 2}, 'num_processes=2, process_id=None: expected with'),
    (
      {'coordinator': 'auto', 'process_id': 1},
      'num_processes=None, process_id=1: expected with',
    ),
    (
      {'coordinator': 'here:1', 'num_processes': 2},
      'process_id=None: expected a number from 0',
    ),
    (
      {'coordinator': 'here:1', 'num_processes': 2, 'process_id': -1},
      'process_id=-1: expected a number from 0',
    ),
    ({'heartbeat_s': 9}, 'heartbeat_s=9: expected at least 10.'),
  ],
)
def test_settings_of_processes_go_together(values, said):
  with pytest.raises(ValueError, match=f'^{said}'):
    processes.Others(**values)
  processes.Others('here:1', 2, 1, 10)
  processes.Others('auto')
