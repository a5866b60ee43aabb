"""Stopping a run by SIGTERM or Ctrl-C, with what it has done on disk."""

from collections.abc import Callable, Iterator
import contextlib
import os
import select
import signal
import socket
import sys
import threading

# EX_TEMPFAIL of sysexits.h: try again, with --resume.
EXIT_CODE = 75
GRACE = 10.0
_SHOW_CURSOR = '\x1b[?25h'  # which a progress bar hides


@contextlib.contextmanager
def stop_on_signals(grace: float = GRACE) -> Iterator[Callable[[], bool]]:
  """Yields a function that says whether a signal has asked to stop.

  A thread watches, for Python's own handlers wait until a compiled epoch ends.
  If the first signal has not ended this context after `grace` seconds, or there
  is a second one, the process exits at once with `EXIT_CODE`: all that is lost
  is what no checkpoint has.
  """
  # Sockets, for Windows can wait for no pipe.
  reading, writing = socket.socketpair()
  writing.setblocking(False)
  asked, left = threading.Event(), threading.Event()

  def watch():
    if not reading.recv(1) or left.is_set():
      return
    asked.set()
    print(
      f'\nStopping after this epoch, or in {grace:g} s; once more: at once.',
      file=sys.stderr,
      flush=True,
    )
    select.select([reading], [], [], grace)
    if not left.is_set():
      if sys.stdout.isatty():
        sys.stdout.write(_SHOW_CURSOR)
      print('Stopped; --resume goes on.', file=sys.stderr, flush=True)
      os._exit(EXIT_CODE)

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = [signal.signal(n, lambda *_: None) for n in numbers]
  wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield asked.is_set
  finally:
    left.set()
    signal.set_wakeup_fd(wakeup)
    for number, handler in zip(numbers, before):
      signal.signal(number, handler)
    writing.send(b'\0')
    thread.join()
    reading.close()
    writing.close()
