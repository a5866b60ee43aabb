"""Pareto fronts of objectives that are minimised, and knees of two.

These run on the host, on NumPy arrays in float64: a front is a handful of
trained networks, and an index or `None` is what one wants back.
"""

import numpy as np
from numpy.typing import ArrayLike

# A bulge below this, in normalised objectives, is a straight line.
_STRAIGHT = 1e-9


def nondominated(points: ArrayLike) -> np.ndarray:
  """Which points no other point dominates.

  A point dominates another if it is no worse in all objectives and better in
  one. Equal points do not dominate each other: all of them are kept.

  Two objectives take a sort and a sweep, n log n; more of them a comparison of
  each point with those before it in lexicographic order, which are all that
  can dominate it, at most m n^2 / 2.

  Args:
    points: `[n, m]`, m >= 2, all columns to be minimised.

  Returns:
    `[n]`, dtype bool.

  Raises:
    ValueError: for another shape, or NaN.

  Examples:
    >>> import mopt
    >>> print(mopt.nondominated([[1, 3], [2, 2], [3, 3], [3, 1]]))
    [ True  True False  True]

  References:
    Reiners et al., 2020, section 2.
  """
  points = _check_points(points)
  if points.shape[1] == 2:
    return _sweep(points)
  different, index = np.unique(points, axis=0, return_inverse=True)
  keep = np.ones(len(different), bool)
  for i, point in enumerate(different):
    # Sorted and all different: no worse in all objectives is better in one.
    before = different[:i][keep[:i]]
    keep[i] = not (before <= point).all(axis=1).any()
  return keep[index.reshape(-1)]


def _sweep(points: np.ndarray) -> np.ndarray:
  """`nondominated` of two objectives."""
  order = np.lexsort((points[:, 1], points[:, 0]))
  keep = np.zeros(len(points), bool)
  best = np.inf  # of the second objective, among smaller first objectives
  start = 0
  while start < len(order):
    # Points that share the first objective stand or fall with its minimum.
    first, second = points[order[start]]
    stop = start
    while stop < len(order) and points[order[stop], 0] == first:
      if points[order[stop], 1] == second and (second < best or start == 0):
        keep[order[stop]] = True
      stop += 1
    best = min(best, second)
    start = stop
  return keep


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
  """Volume that a front dominates, up to a reference point.

  Points that are not better than the reference in all objectives add nothing,
  and neither do dominated points.

  With more than two objectives the volume is cut into slices between the
  values of the last one, each a volume of one objective less (hypervolume by
  slicing objectives): exact, and at most n^(m - 1) steps, which is meant for
  fronts of some dozens of points.

  Args:
    points: `[n, m]`, m >= 2, all columns to be minimised; n may be 0.
    reference: `[m]`, the worst corner of the volume.

  Returns:
    The volume, in the product of the units of the objectives.

  Raises:
    ValueError: for other shapes, NaN, or a reference that is not finite.

  Examples:
    >>> import mopt
    >>> mopt.hypervolume([[1, 2], [2, 1]], reference=[3, 3])
    3.0
    >>> mopt.hypervolume([[1, 2, 2], [2, 1, 1]], reference=[3, 3, 3])
    5.0

  References:
    Zitzler and Thiele, `Multiobjective evolutionary algorithms: a comparative
    case study and the strength Pareto approach
    <https://doi.org/10.1109/4235.797969>`_, 1999; While et al., `A faster
    algorithm for calculating hypervolume
    <https://doi.org/10.1109/TEVC.2005.851275>`_, 2006.
  """
  reference = np.asarray(reference, np.float64)
  if reference.ndim != 1 or len(reference) < 2:
    raise ValueError(f'reference must be [m], m >= 2, got {reference}.')
  if not np.isfinite(reference).all():
    raise ValueError(f'reference must be finite, got {reference}.')
  points = _check_points(points, len(reference))
  return _volume(points[(points < reference).all(axis=1)], reference)


def _volume(points: np.ndarray, reference: np.ndarray) -> float:
  """`hypervolume` of points better than the reference."""
  front = np.unique(points[nondominated(points)], axis=0)  # by first objective
  if len(reference) == 2:
    ceilings = np.concatenate([reference[1:], front[:-1, 1]])
    widths, heights = reference[0] - front[:, 0], ceilings - front[:, 1]
    return float(np.sum(widths * heights))
  front = front[np.argsort(front[:, -1], kind='stable')]
  floors = [*front[:, -1].tolist(), float(reference[-1])]
  return sum(
    (
      (floors[i + 1] - floors[i]) * _volume(front[: i + 1, :-1], reference[:-1])
      for i in range(len(front))
      if floors[i + 1] > floors[i]
    ),
    0.0,
  )


def knee(
  points: ArrayLike, method: str = 'chord', scale: str = 'linear'
) -> int | None:
  r"""The point where giving up one objective stops paying for the other.

  Dominated points are left out, and the objectives of the rest normalised to
  [0, 1], say x and y, sorted by x from (0, 1) to (1, 0).

  * `'chord'`, Das' distance to the line through the two extremes: the point
    with the largest :math:`(1 - x - y) / \sqrt 2`.
  * `'tradeoff'`: the trade-off between neighbours is the slope
    :math:`s_i = (y_{i-1} - y_i) / (x_i - x_{i-1})`, what a unit of the first
    objective buys of the second. The point with the largest fall of it, as an
    angle: :math:`\arctan s_i - \arctan s_{i+1}`.

  A knee depends on the scale: a front of network sizes that is a corner on a
  linear axis may be smooth on a logarithmic one, so say which when you report
  one. Take out failed points first: an extreme moves the chord.

  Args:
    points: `[n, 2]`, both columns to be minimised, finite.
    method: `'chord'` or `'tradeoff'`.
    scale: `'linear'`, or `'log'` for the logarithm of the second objective,
      the complexity, which must be positive then.

  Returns:
    The index of the knee among `points`, the first one of equal points; `None`
    where there is none: fewer than three different nondominated points, all on
    one line, or a front that bulges the other way only.

  Raises:
    ValueError: for another shape, method or scale, a point that is not finite,
      or an objective that has no logarithm.

  Examples:
    >>> import mopt
    >>> mopt.knee([[0.0, 1.0], [0.1, 0.2], [0.5, 0.1], [1.0, 0.0]])
    1
    >>> mopt.knee([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]) is None
    True

  References:
    Das, `On characterizing the "knee" of the Pareto curve based on
    Normal-Boundary Intersection`, Structural Optimization 18, 1999.
    Reiners et al., 2020, section 5.
  """
  points = _check_points(points, 2)
  if not np.isfinite(points).all():
    raise ValueError('knee needs finite points, got an infinite one.')
  if method not in ('chord', 'tradeoff'):
    raise ValueError(f"method must be 'chord' or 'tradeoff', got {method!r}.")
  if scale not in ('linear', 'log'):
    raise ValueError(f"scale must be 'linear' or 'log', got {scale!r}.")
  indices = np.flatnonzero(nondominated(points))
  _, first = np.unique(points[indices], axis=0, return_index=True)
  indices = indices[first]
  if len(indices) < 3:
    return None
  front = points[indices]
  if scale == 'log':
    if not (front[:, 1] > 0).all():
      raise ValueError(
        "scale='log' needs a positive second objective, got "
        f'{front[:, 1].min()}.'
      )
    front = np.column_stack([front[:, 0], np.log(front[:, 1])])
  extent = np.ptp(front, axis=0)
  if not extent.all():
    return None  # logarithms so close that they round to one number
  x, y = ((front - front.min(axis=0)) / extent).T
  if method == 'chord':
    bulge = (1 - x - y) / np.sqrt(2)
  else:
    angles = np.arctan2(-np.diff(y), np.diff(x))
    bulge = np.concatenate([[0], angles[:-1] - angles[1:], [0]])
  best = int(np.argmax(bulge))
  return int(indices[best]) if bulge[best] > _STRAIGHT else None


def _check_points(points: ArrayLike, m: int | None = None) -> np.ndarray:
  """As float64 `[n, m]`; m is 2 or more, if it is not given."""
  points = np.asarray(points, np.float64)
  if points.size == 0:
    points = points.reshape(0, m or 2)
  if points.ndim != 2 or not (m or 2) <= points.shape[1] <= (m or np.inf):
    wanted = '[n, m] with m >= 2' if m is None else f'[n, {m}]'
    raise ValueError(f'points must be {wanted}, got shape {points.shape}.')
  if np.isnan(points).any():
    raise ValueError('points must not hold NaN.')
  return points
