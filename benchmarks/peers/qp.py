"""The exact weights of the min-norm element, in float64, slowly.

The judge of all solvers, ours included, and so written apart from them.
"""

import itertools

import numpy as np


def enumerate_faces(gramian: np.ndarray) -> np.ndarray:
  """Tries each set of gradients that may take part: 2^m of them."""
  m = len(gramian)
  best, weights = np.inf, np.eye(m)[0]
  for size in range(1, m + 1):
    for face in itertools.combinations(range(m), size):
      found = _optimum(gramian, list(face))
      if found is not None and (value := found @ gramian @ found) < best:
        best, weights = value, found
  return weights


def _optimum(gramian: np.ndarray, face: list[int]) -> np.ndarray | None:
  """Of a face, as weights of all; nothing if one would be negative."""
  u = _multipliers(gramian, face)
  if u is None or u.min() < 0 or not np.isfinite(u).all():
    return None
  weights = np.zeros(len(gramian))
  weights[face] = u / u.sum()
  return weights


def _multipliers(gramian: np.ndarray, face: list[int]) -> np.ndarray | None:
  """u with `G u = 1` on a face: all inner products with d are equal there."""
  matrix = gramian[np.ix_(face, face)]
  # Norms may be decades apart.
  scale = 1 / np.sqrt(np.diagonal(matrix))
  try:
    u = np.linalg.solve(scale[:, None] * matrix * scale, scale)
  except np.linalg.LinAlgError:
    return None
  return scale * u


def min_norm_weights(gramian: np.ndarray) -> np.ndarray:
  """By Lawson and Hanson's way: gradients enter a face, or leave it.

  With u = w t the problem is `min u' G u / 2 - sum(u)` over u >= 0.

  Args:
    gramian: `[m, m]`, positive definite.

  Raises:
    ArithmeticError: if it does not end.
  """
  gramian = np.asarray(gramian, np.float64)
  m = len(gramian)
  u, face = np.zeros(m), []
  for _ in range(50 * m):
    slopes = 1 - gramian @ u
    slopes[face] = -np.inf
    # |d|^2 = 1 / sum(u), and so this is relative to the optimum.
    if slopes.max() <= 1e-9:
      return u / u.sum()
    face.append(int(np.argmax(slopes / np.sqrt(np.diagonal(gramian)))))
    while True:
      target = np.zeros(m)
      target[face] = _multipliers(gramian, face)
      if target[face].min() > 0:
        break
      low = [j for j in face if target[j] <= 0]
      steps = u[low] / (u[low] - target[low])
      u = np.maximum(u + steps.min() * (target - u), 0)
      leaving = low[int(np.argmin(steps))]
      u[leaving] = 0
      face.remove(leaving)
    u = target
  raise ArithmeticError('the active set did not settle.')


def kkt_residual(gramian: np.ndarray, weights: np.ndarray) -> float:
  """`|d|^2` exceeds the optimum by at most twice this."""
  slopes = gramian @ weights
  return float(weights @ slopes - slopes.min())
