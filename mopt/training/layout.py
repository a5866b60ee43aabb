"""Which device trains which members of a population.

Either members are spread over the devices, which then have nothing to tell
each other, or every device has all members and a share of each batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mopt.training.config import Config

PyTree = Any


class Layout(NamedTuple):
  """A population of S seeds times L weights on D devices.

  Its arrays begin with the axes `[S, L]`, or `[D, s, l]` if it is spread: then
  a device has s of the seeds times l of the weights. On the host they are flat,
  `[M]`, seed by seed.
  """

  devices: tuple[jax.Device, ...]  # D
  size: tuple[int, int]  # S and L.
  grid: tuple[int, int] | None  # Into how many seeds and weights are cut.

  @property
  def is_spread(self) -> bool:
    return self.grid is not None

  @property
  def local(self) -> list[int]:
    """Which of the devices are this process's own."""
    here = jax.process_index()
    return [i for i, d in enumerate(self.devices) if d.process_index == here]

  def over_members(self, function: Callable) -> Callable:
    """Maps a function of one member over the first axes of its arguments."""
    function = jax.vmap(jax.vmap(function))
    return jax.vmap(function) if self.is_spread else function

  def seeds(self, of_seed: Any) -> Any:
    """From `[S, ...]` to `[D, s, ...]` if members are spread."""
    return of_seed if self.grid is None else of_seed[self._places(0)]

  def weights(self, of_weight: Any) -> Any:
    """From `[L, ...]` to `[D, l, ...]` if members are spread."""
    return of_weight if self.grid is None else of_weight[self._places(1)]

  def _places(self, axis: int) -> np.ndarray:
    """Which seeds, or weights, each device has: `[D, s]` or `[D, l]`."""
    assert self.grid is not None
    length, parts = self.size[axis], self.grid[axis]
    share = -(-length // parts)
    # What is left over is filled up by the last one, whose copies are ignored.
    chosen = np.minimum(np.arange(parts * share), length - 1)
    device = np.arange(len(self.devices))
    part = device % parts if axis else device // self.grid[1]
    return chosen.reshape(parts, share)[part]

  def scatter(self, tree: PyTree) -> PyTree:
    """From NumPy leaves `[M, ...]` to those of a population."""

    def place(x):
      x = x.reshape(*self.size, *x.shape[1:])
      if self.grid is None:
        return x
      return x[self._places(0)[:, :, None], self._places(1)[:, None]]

    return jax.tree.map(place, tree)

  def collect(self, tree: PyTree) -> PyTree:
    """From leaves of a population to NumPy, `[M, ...]`, seed by seed."""
    return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:]), self.collect_grid(tree)
    )

  def collect_grid(self, tree: PyTree) -> PyTree:
    """From leaves of a population to NumPy, `[S, L, ...]`."""
    tree = jax.device_get(tree)
    if self.grid is None:
      return tree
    rows, columns = self.grid

    def join(x):
      seeds, weights, *rest = x.shape[1:]
      x = x.reshape(rows, columns, seeds, weights, *rest).swapaxes(1, 2)
      x = x.reshape(rows * seeds, columns * weights, *rest)
      return x[: self.size[0], : self.size[1]]

    return jax.tree.map(join, tree)


def split_members(tree: PyTree) -> Iterator[PyTree]:
  """The tree of each member, from leaves `[M, ...]`."""
  leaves, structure = jax.tree.flatten(tree)
  return (jax.tree.unflatten(structure, member) for member in zip(*leaves))


def over_devices(
  function: Callable,
  layout: Layout,
  axis_name: str,
  in_axes: Any,
  out_axes: int | None,
  donate_argnums: tuple[int, ...] = (),
) -> Callable:
  """`jax.pmap` over the devices of a layout, or what equals it without jit.

  With `JAX_DISABLE_JIT=1` pmap would compile a program for each operation that
  it comes across, and again at each step: four steps took more than three
  minutes. `jax.vmap` runs what it has compiled before.
  """
  settings: Any = jax.config  # Type checkers know of no attribute.
  if settings.jax_disable_jit:
    mapped = jax.vmap(function, in_axes, axis_name=axis_name)
    if out_axes is not None:
      return mapped
    # The same on all devices.
    return lambda *args: jax.tree.map(lambda x: x[0], mapped(*args))
  return jax.pmap(
    function,
    axis_name=axis_name,
    in_axes=in_axes,
    out_axes=out_axes,
    devices=layout.devices,
    donate_argnums=donate_argnums,
  )


def make_layout(config: Config, devices: Sequence[jax.Device]) -> Layout:
  """Spreads members over devices, or lets the devices share each batch.

  With `parallel='auto'` members are spread; a single one has all devices for
  its batches, but on CPUs, where two halves of a small batch take longer than
  the whole. Members use no more devices than make them faster. The devices of
  several processes share each batch.

  Raises:
    ValueError: if members are to be spread over processes.
  """
  size = len(config.seed), len(config.l1_values)
  is_single = size == (1, 1) and devices[0].platform != 'cpu'
  is_several = len({device.process_index for device in devices}) > 1
  if is_several and config.parallel == 'members':
    raise ValueError(
      'parallel=members: expected data or auto with several processes.'
    )
  is_better = config.parallel == 'auto' and (is_single or is_several)
  if config.parallel == 'data' or is_better:
    return Layout(tuple(devices), size, None)

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
  return Layout(tuple(devices[: grid[0] * grid[1]]), size, grid)
