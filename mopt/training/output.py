"""Standard output and error of a program, whoever reads them."""

from collections.abc import Iterator
import contextlib
import io
import os
import sys


def show_any_letter() -> None:
  """Shows escapes in place of letters that the output cannot encode."""
  # A folder of others, say, in a message.
  if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == 'strict':
    sys.stdout.reconfigure(errors='backslashreplace')


@contextlib.contextmanager
def may_be_unread() -> Iterator[None]:
  """Ends a program in silence, with exit code 1, if nobody reads its output."""
  # Python has none if they are closed from the start.
  nowhere = os.open(os.devnull, os.O_WRONLY)
  sys.stdout = sys.stdout or os.fdopen(os.dup(nowhere), 'w')
  sys.stderr = sys.stderr or os.fdopen(os.dup(nowhere), 'w')
  try:
    try:
      yield
    finally:
      # Here, since Python says what fails at its own end.
      sys.stdout.flush()
      sys.stderr.flush()
  except BrokenPipeError:
    # What is left in the buffers goes there.
    os.dup2(nowhere, sys.stdout.fileno())
    os.dup2(nowhere, sys.stderr.fileno())
    sys.exit(1)
