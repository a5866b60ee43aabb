"""The examples of docs/processes.md run, with two real processes each."""

import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (_ROOT / 'docs' / 'processes.md').read_text()
_ADDRESS = 'localhost:12345'


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', _PAGE, re.DOTALL)


def _run(folder, *commands):
  """What processes of Python on one device each come to, side by side."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'localhost:{free.getsockname()[1]}'
  started = [
    subprocess.Popen(
      [sys.executable, *(x.replace(_ADDRESS, address) for x in command)],
      cwd=folder,
      env=os.environ
      | {
        'PYTHONPATH': str(_ROOT),
        'JAX_PLATFORMS': 'cpu',  # One GPU is for one process.
        'JAX_NUM_CPU_DEVICES': '1',
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for command in commands
  ]
  said = [process.communicate(timeout=300)[0] for process in started]
  return [process.returncode for process in started], said


def _shells(*more):
  """The arguments in either shell, and then some of ours."""
  first, second, _ = map(shlex.split, _blocks('sh'))
  for command in (first, second):
    assert command[:2] == ['python', 'train.py']
  return [[str(_ROOT / 'train.py'), *x[2:], *more] for x in (first, second)]


@pytest.mark.slow
def test_two_shells_train_one_population(tmp_path):
  """Two processes that start and compile."""
  more = ['--model=mlp', '--epochs=1', '--train_size=320', '--val_size=50']
  codes, said = _run(tmp_path, *_shells(*more))
  assert codes == [0, 0], said
  assert 'members on 2 CPU devices of 2 processes' in said[0]
  # The other one is quiet, but for what JAX says of its connections.
  assert 'loss' not in said[1]
  found = {path.name for path in (tmp_path / 'runs/two/members').iterdir()}
  assert found == {
    f'l1_{l1}_seed_0.npz' for l1 in ('0.0001', '0.0003', '0.001')
  }


@pytest.mark.slow
def test_a_script_of_python_does_it_too(tmp_path):
  """Likewise."""
  (script,) = _blocks('python')
  for old, new in (
    ("'lenet5'", "'mlp'"),
    ("'mnist5k'", "'mnist5k', None, 50, 320"),
    ('epochs=2', 'epochs=1, val_size=50, train_size=320'),
  ):
    assert old in script
    script = script.replace(old, new)
  address = [_ADDRESS]
  codes, said = _run(tmp_path, *(['-c', script, *address, n] for n in '01'))
  assert codes == [0, 0], said
  assert len(list((tmp_path / 'results/members').iterdir())) == 2


def test_what_is_wrong_in_one_is_said_by_both(tmp_path):
  """Before anything is written; 4 s."""
  first, second = _shells('--train_size=320', '--val_size=50')
  codes, said = _run(tmp_path, first, [*second, '--epochs=3'])
  assert codes == [2, 2], said
  wanted = 'train.py: epochs=3 in process 1: expected 30, as in the first one.'
  for output in said:
    assert wanted in output.splitlines()
  codes, said = _run(tmp_path, first, [*second, '--dataset=no.npz'])
  assert codes == [2, 2], said
  for output in said:
    assert 'train.py: dataset=no.npz: expected a file' in output
  assert not list(tmp_path.iterdir())
