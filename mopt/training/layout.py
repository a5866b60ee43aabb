"""Which device trains which members of a population.

Either members are spread over the devices, which then have nothing to tell
each other, or every device has all members and a share of each batch. Devices
may be those of several processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mopt.training import processes
from mopt.training.config import Config

PyTree = Any


class Layout(NamedTuple):
  """A population of S seeds times L weights on D devices.

  Its arrays begin with the axes `[D, s, l]`: a device has s of the seeds times
  l of the weights, or all of them if the devices share each batch. On the host
  they are flat, `[M]`, seed by seed.
  """

  devices: tuple[jax.Device, ...]  # D, one process after the other.
  size: tuple[int, int]  # S and L.
  grid: tuple[int, int]  # Into how many seeds and weights are cut.
  shares_batches: bool = False  # All devices have all members.

  @property
  def local(self) -> list[int]:
    """Which of the devices are this process's own."""
    here = jax.process_index()
    return [i for i, d in enumerate(self.devices) if d.process_index == here]

  @property
  def num_shares(self) -> int:
    """Into how many parts a batch is cut."""
    return len(self.devices) if self.shares_batches else 1

  @property
  def share(self) -> list[int]:
    """Which part of a batch each of this process's devices has: `[D]`."""
    return [i if self.shares_batches else 0 for i in self.local]

  def over_members(self, function: Callable) -> Callable:
    """Maps a function of one member over the first axes of its arguments."""
    return jax.vmap(jax.vmap(jax.vmap(function)))

  def seeds(self, of_seed: Any) -> Any:
    """From `[S, ...]` to `[D, s, ...]`, on this process's devices."""
    return of_seed[self._places(0)]

  def weights(self, of_weight: Any) -> Any:
    """From `[L, ...]` to `[D, l, ...]`, on this process's devices."""
    return of_weight[self._places(1)]

  def _places(self, axis: int) -> np.ndarray:
    """Which seeds, or weights, each device has: `[D, s]` or `[D, l]`."""
    length, parts = self.size[axis], self.grid[axis]
    share = -(-length // parts)
    # What is left over is filled up by the last one, whose copies are ignored.
    chosen = np.minimum(np.arange(parts * share), length - 1)
    # Devices beyond the grid begin with it anew: their copies are ignored.
    device = np.array(self.local)
    part = device % parts if axis else device // self.grid[1]
    return chosen.reshape(parts, share)[part % parts]

  def scatter(self, tree: PyTree) -> PyTree:
    """From NumPy leaves `[M, ...]` to those of a population."""

    def place(x):
      x = x.reshape(*self.size, *x.shape[1:])
      return x[self._places(0)[:, :, None], self._places(1)[:, None]]

    return jax.tree.map(place, tree)

  def collect(self, tree: PyTree) -> PyTree:
    """From leaves of a population to NumPy, `[M, ...]`, seed by seed.

    In every process, all of which must ask.
    """
    return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), self.collect_grid(tree)
    )

  def collect_grid(self, tree: PyTree) -> PyTree:
    """From leaves of a population to NumPy, `[S, L, ...]`."""
    rows, columns = self.grid

    def join(x):
      # Those of the devices beyond are copies.
      seeds, weights, *rest = x.shape[1:]
      x = x[: rows * columns].reshape(rows, columns, seeds, weights, *rest)
      x = x.swapaxes(1, 2).reshape(rows * seeds, columns * weights, *rest)
      return x[: self.size[0], : self.size[1]]

    return jax.tree.map(join, self._of_all(jax.device_get(tree)))

  def _of_all(self, tree: PyTree) -> PyTree:
    """From NumPy leaves of this process's devices to those of all."""
    if self.shares_batches or len(self.local) == len(self.devices):
      return tree
    leaves, structure = jax.tree.flatten(tree)
    joined = map(np.concatenate, zip(*processes.share(leaves)))
    return jax.tree.unflatten(structure, joined)


def split_members(tree: PyTree) -> Iterator[PyTree]:
  """The tree of each member, from leaves `[M, ...]`."""
  leaves, structure = jax.tree.flatten(tree)
  return (jax.tree.unflatten(structure, member) for member in zip(*leaves))


def over_devices(
  function: Callable,
  layout: Layout,
  axis_name: str,
  in_axes: Any,
  donate_argnums: tuple[int, ...] = (),
) -> Callable:
  """`jax.pmap` over the devices of a layout, or what equals it without jit.

  With `JAX_DISABLE_JIT=1` pmap would compile a program for each operation that
  it comes across, and again at each step: four steps took more than three
  minutes. `jax.vmap` runs what it has compiled before.
  """
  settings: Any = jax.config  # Type checkers know of no attribute.
  if settings.jax_disable_jit:
    return jax.vmap(function, in_axes, axis_name=axis_name)
  return jax.pmap(
    function,
    axis_name=axis_name,
    in_axes=in_axes,
    devices=layout.devices,
    # Else it would want every process to have as many, used or not.
    axis_size=len(layout.devices),
    donate_argnums=donate_argnums,
  )


def make_layout(config: Config, devices: Sequence[jax.Device]) -> Layout:
  """Spreads members over devices, or lets the devices share each batch.

  With `parallel='auto'` members are spread; a single one has all devices for
  its batches, but on the CPUs of one process, where two halves of a small batch
  take longer than the whole. Members use no more devices than make them faster.

  Every process uses as many devices, since `jax.pmap` wants them so: where the
  members do not need all of them, the devices beyond train copies.

  Args:
    config: the settings.
    devices: the same in every process, with some of each.

  Raises:
    ValueError: if this process has none of the devices.
  """
  size = len(config.seed), len(config.all_weights)
  owned: dict[int, list[jax.Device]] = {}
  for device in devices:
    owned.setdefault(device.process_index, []).append(device)
  if jax.process_index() not in owned:
    raise ValueError(
      f'devices: expected some of process {jax.process_index()}, got those of '
      f'{", ".join(map(str, sorted(owned)))}.'
    )

  def first_of_each(number):
    return tuple(d for i in sorted(owned) for d in owned[i][:number])

  devices = first_of_each(min(map(len, owned.values())))
  is_slower = devices[0].platform == 'cpu' and len(owned) == 1
  is_better = size == (1, 1) and not is_slower
  if config.parallel == 'data' or (config.parallel == 'auto' and is_better):
    return Layout(devices, size, (1, 1), len(devices) > 1)

  def cost(grid):
    share = [-(-n // parts) for n, parts in zip(size, grid)]
    # Members of one seed have their batches in common: weights stay together.
    return share[0] * share[1], grid[0] * grid[1], grid[1]

  grids = [
    (rows, columns)
    for rows in range(1, min(size[0], len(devices)) + 1)
    for columns in range(1, min(size[1], len(devices) // rows) + 1)
  ]
  grid = min(grids, key=cost)
  number = -(-grid[0] * grid[1] // len(owned))
  return Layout(first_of_each(number), size, grid)
