"""Several processes that train one population: who they are, what they share.

The first one writes, and reads checkpoints; the others have what they need
from it. What all of them compute is the same.
"""

from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

PyTree = Any


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
