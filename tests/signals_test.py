"""SIGTERM and Ctrl-C: the epoch is finished, or left after a while."""

import contextlib
import os
import pathlib
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from mopt.training.signals import EXIT_CODE
from mopt.training.signals import stop_on_signals

_SIGNALS = pathlib.Path(__file__).parents[1] / 'mopt/training/signals.py'
# Says what it does, and leaves its epochs when it is asked to. The module needs
# nothing of the package, whose import takes seconds.
_SCRIPT = f"""
import hashlib, runpy, sys, time
stop_on_signals = runpy.run_path({str(_SIGNALS)!r})['stop_on_signals']
epoch, grace = sys.argv[1], float(sys.argv[2])
with stop_on_signals(grace) as should_stop:
  print('epoch', flush=True)
  while epoch == 'deaf':  # Python, that does not ask.
    time.sleep(0.01)
  if epoch == 'compiled':  # C without the GIL, which no handler interrupts.
    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)
  while not should_stop():
    time.sleep(0.01)
  print('checkpoint', flush=True)
print('left', flush=True)
if epoch == 'short':
  time.sleep(float(sys.argv[3]))
  sys.exit(7)
"""


@contextlib.contextmanager
def _script(*args):
  """A process in its first epoch."""
  with subprocess.Popen(
    [sys.executable, '-c', _SCRIPT, *map(str, args)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    try:
      assert process.stdout.readline() == 'epoch\n'
      yield process
    finally:
      process.kill()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_after_the_epoch(number):
  with _script('short', 60, 0) as process:
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
  assert out == 'checkpoint\nleft\n'
  # The rest is up to the caller.
  assert process.returncode == 7
  assert 'Stopping after this epoch, or in 60 s' in err
  assert 'Traceback' not in err


@pytest.mark.parametrize(
  'numbers',
  [
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGINT),
  ],
)
@pytest.mark.parametrize('epoch', ['deaf', 'compiled'])
def test_a_second_signal_stops_at_once(numbers, epoch):
  with _script(epoch, 60) as process:
    process.send_signal(numbers[0])
    assert process.stderr.readline() == '\n'
    assert 'once more: at once' in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(numbers[1])
    out, err = process.communicate(timeout=30)
  assert (process.returncode, out) == (EXIT_CODE, '')
  assert err == 'Stopped; --resume goes on.\n'


@pytest.mark.parametrize('epoch', ['deaf', 'compiled'])
def test_an_epoch_that_takes_too_long_is_left(epoch):
  with _script(epoch, 0.5) as process:
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    seconds = time.monotonic() - start
  assert (process.returncode, out) == (EXIT_CODE, '')
  assert 'or in 0.5 s' in err
  assert err.endswith('Stopped; --resume goes on.\n')
  assert 0.5 <= seconds < 10


def test_a_terminal_gets_its_cursor_back():
  """Which the bar hides, and nobody is left to show."""
  ours, theirs = pty.openpty()
  with subprocess.Popen(
    [sys.executable, '-c', _SCRIPT, 'deaf', '0'],
    stdout=theirs,
    stderr=subprocess.DEVNULL,
  ) as process:
    try:
      assert b'epoch' in os.read(ours, 100)
      process.send_signal(signal.SIGTERM)
      assert process.wait(timeout=30) == EXIT_CODE
    finally:
      process.kill()
  # Theirs is open still, or what was said might be lost.
  os.set_blocking(ours, False)
  said = b''
  with contextlib.suppress(BlockingIOError):
    while part := os.read(ours, 100):
      said += part
  os.close(theirs)
  os.close(ours)
  assert b'\x1b[?25h' in said


def test_after_it_a_signal_does_what_it_did_before():
  with _script('short', 60, 60) as process:
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == 'checkpoint\n'
    assert process.stdout.readline() == 'left\n'
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
  assert process.returncode == -signal.SIGTERM


def _state():
  handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  wakeup = signal.set_wakeup_fd(-1)
  signal.set_wakeup_fd(wakeup)
  return (
    handlers,
    wakeup,
    set(threading.enumerate()),
    os.listdir('/proc/self/fd'),
  )


def test_handlers_pipes_and_threads_are_as_they_were():
  before = _state()
  with stop_on_signals() as should_stop:
    assert _state() != before
    assert not should_stop()
  with pytest.raises(ZeroDivisionError), stop_on_signals():
    raise ZeroDivisionError
  assert _state() == before


def test_a_signal_that_was_heeded_leaves_nothing_behind(capsys):
  before = _state()
  with stop_on_signals(grace=0.2) as should_stop:
    assert not should_stop()
    os.kill(os.getpid(), signal.SIGINT)
    while not should_stop():
      time.sleep(0.001)
  # Had the watch gone on, it would end this process.
  time.sleep(0.4)
  assert _state() == before
  assert 'Stopped;' not in capsys.readouterr().err
