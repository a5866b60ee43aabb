"""The solve alone: from the Gramian of m gradients to their weights."""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import importlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import qp
import mopt

MANY = (2, 3, 4, 8, 16, 32)
# Below this part of the square of the shortest gradient, a shortest vector is
# as good as zero in float32.
_FLOOR = 1e-6


def _gaussian(random: np.random.Generator, m: int) -> np.ndarray:
  return random.standard_normal((m, 4 * m))


def _conflicting(random: np.random.Generator, m: int) -> np.ndarray:
  """All near three directions and their opposites, so that they cancel."""
  n = 4 * m + 8
  near = random.standard_normal((m, 3)) @ random.standard_normal((3, n))
  return near + 0.1 * random.standard_normal((m, n))


def _ill_scaled(random: np.random.Generator, m: int) -> np.ndarray:
  return _gaussian(random, m) * 10 ** random.uniform(0, 4, (m, 1))


FAMILIES = {
  'gaussian': _gaussian,
  'conflicting': _conflicting,
  'norms 1..1e4': _ill_scaled,
}


def draw_gramians(family: str, m: int, count: int) -> np.ndarray:
  """`[count, m, m]`, dtype=np.float32: what all are given, and judged by."""
  random = np.random.default_rng(m)
  drawn = [FAMILIES[family](random, m) for _ in range(count)]
  return np.array([(g @ g.T) for g in drawn], np.float32)


@dataclasses.dataclass
class Solver:
  """A way to weights. A call blocks and gives them all, `[count, m]`."""

  name: str
  call: Callable[[], Iterable[Any]]
  # All in one program, so that nothing is dispatched for each.
  call_inside: Callable[[], Any] | None = None
  is_min_norm: bool = True
  times: list[float] = dataclasses.field(default_factory=list)
  times_inside: list[float] = dataclasses.field(default_factory=list)

  def measure(self) -> None:
    start = time.perf_counter()
    self.call()
    self.times.append(time.perf_counter() - start)
    if self.call_inside:
      start = time.perf_counter()
      self.call_inside()
      self.times_inside.append(time.perf_counter() - start)


def our_solver(gramians: np.ndarray) -> Solver:
  solve = jax.jit(mopt.min_norm_weights)
  apart, together = [jnp.asarray(g) for g in gramians], jnp.asarray(gramians)
  scan = jax.jit(lambda gs: jax.lax.map(mopt.min_norm_weights, gs))
  return Solver(
    'mopt',
    lambda: [solve(g).block_until_ready() for g in apart],
    lambda: scan(together).block_until_ready(),
  )


def torchjd_solvers(gramians: np.ndarray) -> list[Solver]:
  """UPGrad solves m other problems of that size, for another direction."""
  torch = importlib.import_module('torch')
  aggregation = importlib.import_module('torchjd.aggregation')
  torch.set_num_threads(1)  # The matrices are far too small for two.
  tensors = [torch.from_numpy(g) for g in gramians]
  nothing = torch.full((gramians.shape[-1],), torch.nan)

  def solve_all(solve):
    def attempt(tensor):
      try:
        return solve(tensor)
      except ValueError:  # So says the solver of quadratic programs.
        return nothing

    return lambda: [attempt(tensor) for tensor in tensors]

  mgda = Solver('TorchJD MGDA', solve_all(aggregation.MGDAWeighting()))
  try:
    weighting = aggregation.UPGradWeighting()
    weighting(tensors[0])
  except ImportError:  # Its solver comes with an extra.
    return [mgda]
  upgrad = Solver('TorchJD UPGrad', solve_all(weighting), is_min_norm=False)
  return [mgda, upgrad]


def judge(
  gramians: np.ndarray, weights: np.ndarray, optima: np.ndarray
) -> dict[str, Any]:
  """How far weights `[count, m]` are from the optimum, in float64."""
  weights = np.asarray(weights, np.float64)
  solved = np.isfinite(weights).all(axis=1)
  share = float(solved.mean())
  if not share:
    nothing = dict(excess_median=None, excess_max=None, cosine_min=None)
    return nothing | dict(not_descent=1.0, solved=0.0)
  weights, optima = weights[solved], optima[solved]
  weights = weights / weights.sum(axis=1, keepdims=True)
  gramians = gramians[solved].astype(np.float64)
  slopes = np.einsum('kij,kj->ki', gramians, weights)  # <g_j, d>
  values = np.einsum('ki,ki->k', weights, slopes)  # |d|^2
  diagonals = np.diagonal(gramians, axis1=1, axis2=2)
  excess = (values - optima) / np.maximum(optima, _FLOOR * diagonals.min(1))
  cosines = slopes / np.sqrt(diagonals * values[:, None])
  descends = cosines.min(axis=1) >= -1e-6
  return {
    'excess_median': float(np.median(excess)),
    'excess_max': float(np.max(excess)),
    'not_descent': 1 - float(np.mean(descends)) * share,
    'cosine_min': float(np.min(cosines)),
    'solved': share,
  }


def exact_optima(gramians: np.ndarray) -> np.ndarray:
  """Raises: AssertionError if an optimum is not one."""
  optima = []
  for gramian in gramians.astype(np.float64):
    weights = qp.min_norm_weights(gramian)
    optimum = weights @ gramian @ weights
    assert qp.kkt_residual(gramian, weights) <= 1e-8 * optimum
    optima.append(optimum)
  return np.array(optima)


def measure(
  many: Sequence[int], count: int, rounds: int, with_torchjd: bool
) -> list[dict[str, Any]]:
  rows = []
  for family in FAMILIES:
    for m in many:
      gramians = draw_gramians(family, m, count)
      optima = exact_optima(gramians)
      solvers = [our_solver(gramians)]
      if with_torchjd:
        solvers += torchjd_solvers(gramians)
      for number in range(rounds + 1):
        if number == 1:  # Compiled.
          for solver in solvers:
            solver.times.clear()
            solver.times_inside.clear()
        for solver in solvers:
          solver.measure()
      rows += [describe(family, s, gramians, optima) for s in solvers]
  return rows


def describe(
  family: str, solver: Solver, gramians: np.ndarray, optima: np.ndarray
) -> dict[str, Any]:
  count, m = gramians.shape[:2]
  weights = np.array([np.asarray(w) for w in solver.call()])
  row = dict(gradients=family, objectives=m, solver=solver.name)
  row |= judge(gramians, weights, optima)
  if not solver.is_min_norm:  # It does not look for that optimum.
    row |= dict(excess_median=None, excess_max=None)
  low, median, high = np.percentile(solver.times, [25, 50, 75])
  row |= dict(us=1e6 * median / count, iqr_us=1e6 * (high - low) / count)
  inside = solver.times_inside
  row['us_inside'] = 1e6 * float(np.median(inside)) / count if inside else None
  return row | dict(count=count, n=len(solver.times))
