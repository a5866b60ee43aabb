"""Several processes that train one population: who they are, what they share.

The first one writes, and reads checkpoints; the others have what they need
from it. What all of them compute is the same.
"""

import contextlib
import dataclasses
import os
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mopt.training.settings import check_each
from mopt.training.settings import setting

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Others:
  """The settings of a process that trains with others."""

  coordinator: str | None = setting(
    None,
    'running',
    'Train with several processes, each on its own devices: host:port of the '
    'first one, or auto within a job that JAX knows (Slurm, Cloud TPU). They '
    'share each batch; only the first one writes.',
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


def any_of(flag: bool) -> bool:
  """Whether any process says so; all of them must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def from_first(
  found: tuple[int, PyTree] | None, template: PyTree
) -> tuple[int, PyTree] | None:
  """What the first process has found, for all of them."""
  if jax.process_count() == 1:
    return found
  epoch, tree = (-1, template) if found is None else found
  epoch = int(multihost_utils.broadcast_one_to_all(np.array(epoch)))
  if epoch < 0:
    return None
  return epoch, jax.device_get(multihost_utils.broadcast_one_to_all(tree))
