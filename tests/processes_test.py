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
import pathlib, sys, tempfile
import jax
from mopt import training
from mopt.training import processes
from tests.networks import Tiny

workdir, coordinator, which, epochs, devices, pause = sys.argv[1:]
jax.config.update('jax_platforms', 'cpu')  # One GPU is for one process.
jax.config.update('jax_num_cpu_devices', int(devices))
if coordinator:
  processes.start(coordinator, 2, int(which), heartbeat_s=10)
data = training.load_dataset('mnist5k', None, 77, 650)  # 20 steps and 10 more
config = training.Config(
  optimizer='sgd', l1=(1e-4, 1e-3), epochs=int(epochs), parallel='data',
  val_size=77, train_size=650,
)
first = processes.is_first()
def rest():
  if pause:
    import time; time.sleep(float(pause))
  return False
with tempfile.TemporaryDirectory() as other:
  folder = pathlib.Path(workdir if first else other)
  training.run(
    training.Job(config, Tiny(), data, folder, should_stop=rest)
  )
"""


def _start(workdir, coordinator='', which=0, epochs=1, devices=1, pause=''):
  workdir.mkdir(exist_ok=True)
  arguments = [workdir, coordinator, which, epochs, devices, pause]
  return subprocess.Popen(
    [sys.executable, '-c', _SCRIPT, *map(str, arguments)],
    cwd=_ROOT,
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(*started):
  for process in started:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def _coordinator():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def _check_equal(one, two):
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


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
  """Three processes that start and compile, on two cores: up to a minute."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  _finish(_start(one))
  address = _coordinator()
  _finish(*(_start(two, address, i) for i in (0, 1)))
  _check_equal(one, two)
  config = json.loads((two / 'config.json').read_text())
  assert config['environment']['processes'] == 2
  # 77 validation and 500 test examples are not divisible by two devices.
  rows = [(f / 'results.csv').read_text().splitlines() for f in (one, two)]
  for a, b in zip(*rows):
    for x, y in zip(a.split(','), b.split(',')):
      assert x == y or float(x) == pytest.approx(float(y), rel=1e-4)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_one_goes_on(tmp_path):
  """With its checkpoint, on another number of devices.

  It is missed after 10 s, and three processes start and compile: a minute.
  """
  address, folder = _coordinator(), tmp_path / 'run'
  first, second = (
    _start(folder, address, i, epochs=8, pause=1) for i in (0, 1)
  )
  seal = folder / 'checkpoints' / '2' / 'sha256.json'
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
  process = _start(folder, epochs=8, devices=2)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  assert 'going on after epoch' in output
  epochs = [
    json.loads(line)['epoch']
    for line in (folder / 'metrics.jsonl').read_text().splitlines()
  ]
  assert epochs == [n for n in range(1, 9) for _ in range(2)]


_SHARES = """
import sys
import jax
import numpy as np
from mopt.training import processes

coordinator, which = sys.argv[1:]
processes.start(coordinator, 2, int(which), heartbeat_s=10)
assert jax.process_count() == 2
template = {'w': np.zeros(3, np.float32), 'count': np.int32(0)}
# Only the first one has a checkpoint to read, or a signal.
tree = {'w': np.arange(3, dtype=np.float32), 'count': np.int32(7)}
found = (4, tree) if processes.is_first() else None
epoch, tree = processes.from_first(found, template)
print(epoch, tree['w'].tolist(), int(tree['count']), flush=True)
print(processes.from_first(None, template), flush=True)
print(processes.any_of(which == '1'), processes.any_of(False), flush=True)
"""


def test_two_processes_have_what_the_first_one_found():
  """Two processes, which take 3 s to start."""
  address = _coordinator()
  started = [
    subprocess.Popen(
      [sys.executable, '-c', _SHARES, address, str(which)],
      cwd=_ROOT,
      env=os.environ | {'PYTHONPATH': str(_ROOT)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for which in (0, 1)
  ]
  said = [process.communicate(timeout=120) for process in started]
  for process, (output, errors) in zip(started, said):
    assert process.returncode == 0, errors
    # After what JAX says of its connections.
    expected = ['4 [0.0, 1.0, 2.0] 7', 'None', 'True False']
    assert output.splitlines()[-3:] == expected


def test_a_process_alone_shares_with_nobody():
  assert processes.is_first()
  assert processes.any_of(True)
  assert not processes.any_of(False)
  found = 3, {'w': np.ones(2)}
  assert processes.from_first(found, None) is found
  assert processes.from_first(None, None) is None


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
