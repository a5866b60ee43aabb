"""Pareto fronts of objectives that are minimised, and knees of two.

These run on the host, on NumPy arrays in float64: a front is a handful of
trained networks, and an index or `None` is what one wants back.
"""

import numpy as np
from numpy.typing import ArrayLike

from mopt.checks import check_integer

# Bulges, in normalised objectives, that differ by this or less are the same
# but for rounding; one that differs so from none is a straight line.
_SAME_BULGE = 1e-9


def nondominated(points: ArrayLike) -> np.ndarray:
  """Which points no other point dominates.

  A point dominates another if it is no worse in all objectives and better in
  one. Equal points do not dominate each other: all of them are kept. Of two
  points that tie in all objectives but one, only the better one stays.

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
  and neither do dominated points, nor any but the first of equal points.

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

  The index is that of the first one of equal points. Of different points whose
  bulges are equal (to within 1e-9, so that rounding does not choose) it is the
  one with the smallest first objective.

  A knee depends on the scale: a front of network sizes that is a corner on a
  linear axis may be smooth on a logarithmic one, so say which when you report
  one. Take out failed points first: an extreme moves the chord.

  Args:
    points: `[n, 2]`, both columns to be minimised, finite.
    method: `'chord'` or `'tradeoff'`.
    scale: `'linear'`, or `'log'` for the logarithm of the second objective,
      the complexity, which must be positive then.

  Returns:
    The index of the knee among `points`; `None` where there is none: fewer than
    three different nondominated points, all on one line, or a front that
    bulges the other way only.

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
  _check_words(method, scale)
  normalised = _normalised_front(points, scale)
  if normalised is None:
    return None
  indices, x, y = normalised
  if method == 'chord':
    bulge = (1 - x - y) / np.sqrt(2)
  else:
    angles = np.arctan2(-np.diff(y), np.diff(x))
    bulge = np.concatenate([[0], angles[:-1] - angles[1:], [0]])
  if bulge.max() <= _SAME_BULGE:
    return None
  return int(indices[np.argmax(bulge >= bulge.max() - _SAME_BULGE)])


def knee_bootstrap(
  points: ArrayLike,
  num_samples: int = 1000,
  seed: int = 0,
  method: str = 'chord',
  scale: str = 'linear',
) -> np.ndarray:
  """How often each setting is the knee, if the trainings were repeated.

  The knee of one run of each setting is a matter of luck where neighbours are
  close. Given S runs of all settings, every replicate draws S of them with
  replacement, averages their objectives, and takes the `knee` of the means. A
  run is drawn with all of its settings, for they may share a seed. S is small
  as a rule, and the shares are as rough as that: they tell a knee that all
  runs agree on from one that is a toss-up, and are no probabilities to cite
  with two digits.

  Args:
    points: `[S, n, 2]`, S >= 1 runs of the same n settings, both columns to be
      minimised, finite: leave out a setting, or a run, that has failed.
    num_samples: number of replicates, at least 1.
    seed: of the draws, >= 0; the same seed gives the same shares.
    method: of `knee`.
    scale: of `knee`. For `'log'` the logarithms of the second objective are
      averaged, so that its mean is the geometric one.

  Returns:
    `[n]`, dtype float64: the share of replicates in which each setting was the
    knee. Their sum is below 1 where replicates had none. One run gives its
    knee the share 1.

  Raises:
    ValueError: for another shape, method or scale, a point that is not finite,
      an objective that has no logarithm, no replicates, or a bad seed.

  Examples:
    >>> import mopt
    >>> runs = [
    ...     [[0.0, 1.0], [0.1, 0.2], [0.5, 0.1], [1.0, 0.0]],
    ...     [[0.0, 1.0], [0.1, 0.3], [0.5, 0.1], [1.0, 0.0]],
    ... ]
    >>> print(mopt.knee_bootstrap(runs))
    [0. 1. 0. 0.]

  References:
    Efron, `Bootstrap methods: another look at the jackknife
    <https://doi.org/10.1214/aos/1176344552>`_, 1979.
  """
  runs = np.asarray(points, np.float64)
  if runs.ndim != 3 or len(runs) == 0 or runs.shape[2] != 2:
    raise ValueError(
      f'points must be [S, n, 2] with S >= 1, got shape {runs.shape}.'
    )
  if not np.isfinite(runs).all():
    raise ValueError('points must be finite, got NaN or an infinite one.')
  num_samples = check_integer('num_samples', num_samples, 1)
  seed = check_integer('seed', seed, 0)
  _check_words(method, scale)
  runs = _on_scale(runs, scale)
  random = np.random.default_rng(seed)
  counts = np.zeros(runs.shape[1])
  for _ in range(num_samples):
    drawn = random.integers(len(runs), size=len(runs))
    index = knee(runs[drawn].mean(axis=0), method)
    if index is not None:
      counts[index] += 1
  return counts / num_samples


def _normalised_front(
  points: np.ndarray, scale: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
  """The different points of a front: indices, x and y, `[k]` each.

  Sorted by x, from (0, 1) to (1, 0). `None` for less than three.
  """
  indices = np.flatnonzero(nondominated(points))
  _, first = np.unique(points[indices], axis=0, return_index=True)
  indices = indices[first]
  if len(indices) < 3:
    return None
  # Halves, so that no difference overflows; that changes no digit.
  front = 0.5 * _on_scale(points[indices], scale)
  extent = np.ptp(front, axis=0)
  if not extent.all():
    return None  # logarithms so close that they round to one number
  x, y = ((front - front.min(axis=0)) / extent).T
  return indices, x, y


def _on_scale(points: np.ndarray, scale: str) -> np.ndarray:
  """Points `[..., 2]`, the second objective on the scale of `knee`."""
  if scale == 'linear':
    return points
  first, second = points[..., 0], points[..., 1]
  if not (second > 0).all():
    raise ValueError(
      f"scale='log' needs a positive second objective, got {second.min()}."
    )
  return np.stack([first, np.log(second)], axis=-1)


def _check_words(method: str, scale: str) -> None:
  if method not in ('chord', 'tradeoff'):
    raise ValueError(f"method must be 'chord' or 'tradeoff', got {method!r}.")
  if scale not in ('linear', 'log'):
    raise ValueError(f"scale must be 'linear' or 'log', got {scale!r}.")


def _check_points(points: ArrayLike, m: int | None = None) -> np.ndarray:
  """As float64 `[n, m]`; m is 2 or more, if it is not given."""
  points = np.asarray(points, np.float64)
  if points.shape == (0,):  # an empty list
    points = points.reshape(0, m or 2)
  if points.ndim != 2 or not (m or 2) <= points.shape[1] <= (m or np.inf):
    wanted = '[n, m] with m >= 2' if m is None else f'[n, {m}]'
    raise ValueError(f'points must be {wanted}, got shape {points.shape}.')
  if np.isnan(points).any():
    raise ValueError('points must not hold NaN.')
  return points
