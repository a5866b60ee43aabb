"""Several processes that train one population: who they are, what they share.

The first one writes, and reads checkpoints; the others have what they need
from it. All of them take the same decisions, on what all of them know: whatever
is shared here is asked for by every process, in the same order.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import os
import pickle
import sys
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from mopt.training.settings import check_each
from mopt.training.settings import setting

_T = TypeVar('_T')

# Bytes of a message of each process: the first part, and each one after it.
_SHORT, _LONG = 2**12, 2**22
# Of those that come first and say how many there are.
_HEAD = 8


class Lost(RuntimeError):
  """Another process does not answer."""


@dataclasses.dataclass(frozen=True)
class Others:
  """The settings of a process that trains with others."""

  coordinator: str | None = setting(
    None,
    'running',
    'Train with several processes, each on its own devices: host:port of the '
    'first one, or auto within a job that JAX knows (Slurm, Cloud TPU). '
    'Members, or else each batch, are spread over the devices of all of them, '
    'see --parallel; only the first one writes. See docs/processes.md.',
  )
  num_processes: int | None = setting(
    None, 'running', 'With --coordinator=host:port.'
  )
  process_id: int | None = setting(
    None, 'running', 'Which of the processes this is, from 0; likewise.'
  )
  heartbeat_s: int = setting(
    100,
    'running',
    'All processes end if one of them is silent for so many seconds.',
    check=lambda value: 'at least 10' if value < 10 else None,
  )

  def __post_init__(self):
    check_each(self)
    number, which = self.num_processes, self.process_id
    if self.coordinator in (None, 'auto'):
      if number is not None or which is not None:
        raise ValueError(
          f'num_processes={number}, process_id={which}: expected with '
          '--coordinator=host:port only.'
        )
    elif number is None or which is None or not 0 <= which < number:
      raise ValueError(
        f'process_id={which}: expected a number from 0 to --num_processes - 1, '
        f'which is {number}.'
      )


def make_cores_devices() -> None:
  """Makes every core of the CPU a device, unless one has said otherwise.

  One device leaves half of two cores idle: small networks have no work for
  more than one. It comes before anything else is asked of JAX.
  """
  if 'JAX_NUM_CPU_DEVICES' in os.environ:
    return
  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # of Linux only
    cores = os.cpu_count() or 1
  # Where JAX runs already, its devices stay as they are.
  with contextlib.suppress(RuntimeError):
    jax.config.update('jax_num_cpu_devices', cores)


def start(
  coordinator: str,
  num_processes: int | None = None,
  process_id: int | None = None,
  heartbeat_s: int = 100,
) -> None:
  """Joins the other processes; before anything else is asked of JAX.

  Args:
    coordinator: `host:port` of the first process, or `auto` where JAX finds it
      (Slurm, Open MPI, Cloud TPU).
    num_processes: how many there are; not with `auto`.
    process_id: which one this is, from 0; not with `auto`.
    heartbeat_s: a process that is silent for so long ends all of them.

  Raises:
    ValueError: if the others cannot be found.
  """
  wanted = (
    f'coordinator={coordinator}: expected host:port of the first process, or '
    'auto within a job that JAX knows'
  )
  arguments: dict[str, Any] = {'heartbeat_timeout_seconds': heartbeat_s}
  if coordinator != 'auto':
    host, _, port = coordinator.rpartition(':')
    if not host or not port.isdecimal():
      raise ValueError(f'{wanted}.')
    arguments |= dict(
      coordinator_address=coordinator,
      num_processes=num_processes,
      process_id=process_id,
    )
  try:
    jax.distributed.initialize(**arguments)
  except (RuntimeError, ValueError) as error:
    raise ValueError(f'{wanted} ({error}).') from error


def is_first() -> bool:
  """Whether this process writes."""
  return jax.process_index() == 0


def share(value: Any) -> list[Any]:
  """What every process has to say, in their order; all of them must ask.

  Whatever number of devices each has, one is enough. Arrays keep all bits, in
  any format.

  Args:
    value: of this process; anything that can be pickled, arrays in NumPy.

  Returns:
    A value of each process.

  Raises:
    Lost: if another process has ended.
  """
  if jax.process_count() == 1:
    return [value]
  message = pickle.dumps(value, protocol=5)
  message = len(message).to_bytes(_HEAD, 'little') + message
  parts = [_gather(message[:_SHORT], _SHORT)]
  heads = [row[:_HEAD].tobytes() for row in parts[0]]
  sizes = [_HEAD + int.from_bytes(head, 'little') for head in heads]
  for start in range(_SHORT, max(sizes), _LONG):
    parts.append(_gather(message[start : start + _LONG], _LONG))
  messages = np.concatenate(parts, axis=1)
  return [pickle.loads(m[_HEAD:size]) for m, size in zip(messages, sizes)]


def _gather(part: bytes, size: int) -> np.ndarray:
  """`[processes, size]`, of bytes that are filled up to `size`."""
  device, over_processes, copy = _gathering()
  own = np.zeros((1, size), np.uint8)
  own[0, : len(part)] = np.frombuffer(part, np.uint8)
  parts = jax.make_array_from_single_device_arrays(
    (jax.process_count(), size), over_processes, [jax.device_put(own, device)]
  )
  try:
    with jax.disable_jit(False):
      return np.asarray(copy(parts).addressable_data(0))
  except (RuntimeError, ValueError) as error:  # Either, as it comes.
    reason = ' '.join(str(error).split())[:200]
    raise Lost(f'another process is lost ({reason}).') from error


@functools.cache
def _gathering() -> tuple[jax.Device, jax.sharding.Sharding, Callable]:
  """A device of this process, and how arrays come to one of each process."""
  first = {d.process_index: d for d in reversed(jax.devices())}
  devices = [first[i] for i in range(jax.process_count())]
  mesh = jax.sharding.Mesh(np.array(devices), ('processes',))
  over = lambda *axes: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes)
  )
  copy = jax.jit(lambda x: x, out_shardings=over())
  return devices[jax.process_index()], over('processes'), copy


def leave(code: int) -> NoReturn:
  """Ends this process: at once if there are others, which may wait for it.

  They would wait for long: JAX's own way to the end waits for all of them.
  """
  if jax.process_count() > 1:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)


def any_of(flag: bool) -> bool:
  """Whether any process says so; all of them must ask."""
  return any(share(bool(flag)))


def together(function: Callable[[], _T]) -> _T:
  """Calls a function in every process; if it fails in one it does in all.

  Raises:
    ValueError: what the first of the processes that failed has raised.
    OSError: likewise. Another error is one of its process alone.
  """
  value, error = None, None
  try:
    value = function()
  except (OSError, ValueError) as caught:
    error = caught
  for found in share(error):
    if found is not None:
      raise found
  return value  # pyrefly: ignore[bad-return]


def from_first(function: Callable[[], _T]) -> _T:
  """What a function returns, or raises, in the first process, for all of them.

  In the others it is not called.
  """
  if jax.process_count() == 1:
    return function()
  value = together(lambda: function() if is_first() else None)
  return share(value)[0]


def check_alike(values: Callable[[], Mapping[str, Any]]) -> None:
  """Raises in all processes unless all of them have the same values.

  They are not asked for in a process alone.

  Raises:
    ValueError: names the first value that differs.
  """
  if jax.process_count() == 1:
    return
  first, *others = share(dict(values()))
  for number, other in enumerate(others, 1):
    for name, expected in first.items():
      if other[name] != expected:
        raise ValueError(
          f'{name}={other[name]} in process {number}: expected {expected}, as '
          'in the first one.'
        )
