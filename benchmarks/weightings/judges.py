"""How far weights are from what a method asks for, in float64.

Each judge takes gradients `[m, n]` and weights `[m]`, and knows the method from
its paper alone: it shares no code with what it judges. 0 is exact.
"""

from collections.abc import Callable

import numpy as np
from scipy import optimize

Judge = Callable[[np.ndarray, np.ndarray], float]


def _project(gradients: np.ndarray, start: np.ndarray) -> np.ndarray:
  """Weights of the projection of `start` onto the dual cone."""
  scale = np.linalg.norm(gradients, axis=1)
  unit = (gradients / scale[:, None]).T
  added, _ = optimize.nnls(unit, -(gradients.T @ start), maxiter=100_000)
  return start + added / scale


def _excess(gradients, weights, best) -> float:
  """Of `|d|^2` over the optimum, or 1e-6 of the shortest gradient's if more."""
  found = np.square(weights @ gradients).sum()
  optimum = np.square(best @ gradients).sum()
  least = np.square(gradients).sum(axis=1).min()
  return float((found - optimum) / max(optimum, 1e-6 * least))


def _direction(gradients, weights, best) -> float:
  """Of the direction, by its length."""
  expected = best @ gradients
  off = np.linalg.norm(weights @ gradients - expected)
  return float(off / np.linalg.norm(expected))


def min_norm(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The excess. Least squares with a row of ones, that weighs a lot."""
  m = len(gradients)
  size = np.linalg.norm(gradients, axis=1)
  # u = w / s of the problem of the homogeneous form: |sum u g|^2 / 2 - s' u.
  gramian = gradients @ gradients.T / np.outer(size, size)
  factor = np.linalg.cholesky(gramian + 1e-15 * np.eye(m))
  target = np.linalg.solve(factor, 1 / size * size.min())
  u, _ = optimize.nnls(factor.T, target, maxiter=100_000)
  best = u / size
  return _excess(gradients, weights / weights.sum(), best / best.sum())


def dual_proj(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The excess over the projection of the mean."""
  m = len(gradients)
  return _excess(gradients, weights, _project(gradients, np.full(m, 1 / m)))


def upgrad(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The error of the direction."""
  rows = np.eye(len(gradients)) / len(gradients)
  best = sum(_project(gradients, row) for row in rows)
  return _direction(gradients, weights, best)


def cagrad(gradients: np.ndarray, weights: np.ndarray, c: float = 0.5) -> float:
  """The gap between the worst slope and a bound on it, by `|g0|` and `|g|`.

  Of any w on the simplex, `<g_w, g0> + c |g0| |g_w|` is such a bound.
  """
  m = len(gradients)
  mean = gradients.mean(axis=0)
  d = weights @ gradients
  radius = c * np.linalg.norm(mean)
  off = d - mean
  # What is beyond the radius is no solution.
  d = mean + off * min(1, radius / max(np.linalg.norm(off), 1e-300))
  w = np.maximum(weights - 1 / m, 0)
  w = w / w.sum() if w.sum() else np.full(m, 1 / m)
  direction = w @ gradients
  bound = direction @ mean + radius * np.linalg.norm(direction)
  size = np.linalg.norm(mean) * np.linalg.norm(gradients, axis=1).max()
  return float((bound - (gradients @ d).min()) / size)


def fairgrad(
  gradients: np.ndarray, weights: np.ndarray, alpha: float = 2.0
) -> float:
  """The largest relative residual of `<g_i, d>^alpha = 1 / w_i`."""
  slopes = gradients @ (weights @ gradients)
  if (weights <= 0).any() or (slopes <= 0).any():
    return float('inf')
  return float(np.abs(slopes * weights ** (1 / alpha) - 1).max())


def nash_mtl(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The same, with alpha = 1."""
  return fairgrad(gradients, weights, 1.0)


def _unit(gradients: np.ndarray) -> np.ndarray:
  return gradients / np.linalg.norm(gradients, axis=1, keepdims=True)


def imtl_g(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The error of the direction: equal slopes along all, weights of sum 1."""
  unit = _unit(gradients)
  u = np.linalg.solve(unit @ unit.T, np.ones(len(unit)))
  best = u / np.linalg.norm(gradients, axis=1)
  return _direction(gradients, weights, best / best.sum())


def config(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The error of the direction: equal cosines, scaled by the projections."""
  unit = np.linalg.pinv(_unit(gradients)) @ np.ones(len(gradients))
  unit /= np.linalg.norm(unit)
  expected = (gradients @ unit).sum() * unit
  off = np.linalg.norm(weights @ gradients - expected)
  return float(off / np.linalg.norm(expected))


def aligned_mtl(gradients: np.ndarray, weights: np.ndarray) -> float:
  """The error of the direction: all singular values are the least of them."""
  left, singular, right = np.linalg.svd(gradients, full_matrices=False)
  expected = singular[-1] * (left @ right).mean(axis=0)
  off = np.linalg.norm(weights @ gradients - expected)
  return float(off / np.linalg.norm(expected))


def krum(gradients: np.ndarray, weights: np.ndarray) -> float:
  """0 if the gradient with the least squared distances has all weight.

  To its m - 3 nearest, that is. TorchJD sums distances, and may choose others.
  """
  m = len(gradients)
  apart = np.square(gradients[:, None] - gradients).sum(axis=2)
  score = np.sort(apart, axis=1)[:, 1 : m - 2].sum(axis=1)
  return float(np.abs(weights - np.eye(m)[score.argmin()]).max())
