"""Fronts, hypervolumes and knees, against definitions and moocore."""

from fractions import Fraction
import itertools
import math

from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import moocore
import numpy as np
import pytest

import mopt

# Reiners et al., 2020, Table 2(c): lambda, test accuracy, and nonzeros of the
# dense layers (l0_layer1 + l0_layer2 + l0_layer3). Adam on the penalty form.
TABLE_2C = (
  (0.0, 0.990, 46551 + 9830 + 830),
  (1e-5, 0.990, 17751 + 4575 + 614),
  (3e-5, 0.988, 12582 + 2434 + 503),
  (5e-5, 0.989, 9260 + 1689 + 414),
  (7e-5, 0.987, 5946 + 1192 + 365),
  (9e-5, 0.989, 5779 + 977 + 298),
  (1e-4, 0.988, 5491 + 907 + 288),
  (3e-4, 0.985, 2107 + 300 + 170),
  (5e-4, 0.983, 1408 + 179 + 117),
  (7e-4, 0.981, 1253 + 157 + 116),
  (9e-4, 0.980, 1176 + 178 + 95),
  (1e-3, 0.979, 877 + 99 + 80),
  (3e-3, 0.972, 359 + 62 + 57),
)
# The last row of the table: at lambda = 5e-3 training has collapsed.
COLLAPSED = (5e-3, 0.113, 0)

integers = st.integers(0, 5)  # few values: ties and duplicates
floats = st.floats(allow_nan=False, width=32)


def points_of(coordinate, min_size=0, max_size=12):
  pair = st.tuples(coordinate, coordinate)
  return st.lists(pair, min_size=min_size, max_size=max_size)


def as_array(points):
  return np.array(points, np.float64).reshape(-1, 2)


def by_definition(points):
  """Of each point: whether no other is as good in all, better in one."""

  def dominates(a, b):
    no_worse = all(x <= y for x, y in zip(a, b))
    return no_worse and any(x < y for x, y in zip(a, b))

  return [not any(dominates(a, b) for a in points) for b in points]


@given(points_of(integers) | points_of(floats) | points_of(integers | floats))
@example([(0.0, math.inf), (1.0, math.inf)])
@example([(math.inf, math.inf), (math.inf, math.inf)])
@example([(-math.inf, 0.0), (-math.inf, 1.0), (0.0, -math.inf)])
@example([(0.0, -0.0), (-0.0, 0.0)])
def test_nondominated_by_definition(points):
  keep = mopt.nondominated(points)
  assert keep.dtype == bool
  assert keep.shape == (len(points),)
  assert keep.tolist() == by_definition(points)


@given(points_of(integers, 1) | points_of(floats, 1))
def test_nondominated_against_moocore(points):
  expected = moocore.is_nondominated(as_array(points), keep_weakly=True)
  np.testing.assert_array_equal(mopt.nondominated(points), expected)


def test_nondominated_of_many_points():
  random = np.random.default_rng(0)
  points = np.round(random.normal(size=(2000, 2)), 1)
  expected = moocore.is_nondominated(points, keep_weakly=True)
  np.testing.assert_array_equal(mopt.nondominated(points), expected)
  assert 1 < expected.sum() < 100


@given(
  points_of(st.integers(-2, 8)) | points_of(st.floats(-10, 10, width=32)),
  st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_hypervolume_against_moocore(points, reference):
  expected = moocore.hypervolume(as_array(points), ref=np.array(reference))
  actual = mopt.hypervolume(points, reference)
  assert isinstance(actual, float)
  assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize('seed', range(5))
def test_hypervolume_of_a_front_of_many_points(seed):
  random = np.random.default_rng(seed)
  x = random.uniform(size=300)
  # A front, points that it dominates, and some beyond the reference.
  points = np.concatenate(
    [np.stack([x, (1 - np.sqrt(x)) ** 2], 1), random.uniform(0, 2, (300, 2))]
  )
  expected = moocore.hypervolume(points, ref=np.array([0.9, 0.8]))
  assert mopt.hypervolume(points, [0.9, 0.8]) == pytest.approx(expected)


@pytest.mark.parametrize(
  ('points', 'area'),
  [
    ([], 0),
    (np.zeros((0, 2)), 0),
    ([[1, 1]], 4),
    ([[1, 2], [2, 1]], 3),
    ([[1, 2], [2, 1], [1, 2], [2, 1]], 3),  # duplicates
    ([[1, 2], [2, 1], [2, 2]], 3),  # a dominated point
    ([[1, 2], [0, 3], [4, -9]], 2),  # on the edge, and beyond it
    ([[3, 3]], 0),  # the reference itself
    ([[math.inf, 0], [1, 1]], 4),
    ([[-math.inf, 1]], math.inf),
  ],
)
def test_hypervolume_by_hand(points, area):
  assert mopt.hypervolume(points, reference=[3, 3]) == area


def test_of_points_that_tie_in_one_objective_the_better_one_stays():
  points = [[1, 3], [1, 2], [2, 2], [3, 1], [3, 1], [4, 1]]
  keep = [False, True, False, True, True, False]
  assert mopt.nondominated(points).tolist() == keep
  third = np.column_stack([points, np.zeros(6)])
  assert mopt.nondominated(third).tolist() == keep


@st.composite
def many_objectives(draw, coordinate, min_size=1):
  m = draw(st.integers(3, 5))
  point = st.tuples(*[coordinate] * m)
  points = draw(st.lists(point, min_size=min_size, max_size=8))
  return np.array(points, np.float64).reshape(-1, m)


@given(many_objectives(st.integers(0, 2)) | many_objectives(floats))
@example(np.array([[math.inf] * 3, [math.inf] * 3, [0, math.inf, -math.inf]]))
def test_nondominated_of_many_objectives_by_definition(points):
  assert mopt.nondominated(points).tolist() == by_definition(points)


# Finite ones: with four objectives, moocore keeps dominated infinite points.
@given(many_objectives(st.integers(0, 2)) | many_objectives(st.floats(-9, 9)))
def test_nondominated_of_many_objectives_against_moocore(points):
  expected = moocore.is_nondominated(points, keep_weakly=True)
  np.testing.assert_array_equal(mopt.nondominated(points), expected)


@given(many_objectives(st.integers(-1, 4)) | many_objectives(st.floats(-9, 9)))
def test_hypervolume_of_many_objectives_against_moocore(points):
  reference = np.arange(2.0, 2.0 + points.shape[1])
  expected = moocore.hypervolume(points, ref=reference)
  actual = mopt.hypervolume(points, reference)
  assert isinstance(actual, float)
  assert actual == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(many_objectives(integers) | points_of(integers, 1).map(as_array))
def test_duplicates_add_no_volume_and_stay_on_the_front(points):
  twice = np.concatenate([points, points[::-1]])
  reference = np.full(points.shape[1], 5.0)
  area = mopt.hypervolume(points, reference)
  assert mopt.hypervolume(twice, reference) == area
  once, again = np.split(mopt.nondominated(twice), 2)
  np.testing.assert_array_equal(once, again[::-1])
  np.testing.assert_array_equal(once, mopt.nondominated(points))


def test_hypervolume_of_three_objectives_by_hand():
  # Two boxes of 4 and 2 that share 1.
  assert mopt.hypervolume([[1, 1, 2], [2, 2, 1]], [3, 3, 3]) == 4 + 2 - 1
  assert mopt.hypervolume(np.zeros((0, 3)), [3, 3, 3]) == 0
  assert mopt.hypervolume([[1, 1, 3], [4, 0, 0]], [3, 3, 3]) == 0
  unbounded = [[1, 1, -math.inf], [2, 0, -math.inf]]
  assert mopt.hypervolume(unbounded, [3, 3, 3]) == math.inf


@given(points_of(integers, 1), st.randoms(use_true_random=False))
def test_hypervolume_needs_the_front_only(points, random):
  area = mopt.hypervolume(points, (6, 6))
  front = as_array(points)[mopt.nondominated(points)]
  assert mopt.hypervolume(front, (6, 6)) == area
  random.shuffle(points)
  assert mopt.hypervolume(points, (6, 6)) == area


# Distances to the chord (times the root of 2) 0.29 and 0.30, slopes 30, 1 and
# 0.5: the methods disagree.
TURN = [[0, 1], [0.01, 0.7], [0.4, 0.3], [1, 0]]
# Distances 0.80 and 0.69, slopes 9, 0.45 and 0.01; with the second objective
# in decades 0.23 and 0.37, and 3.3, 1.7 and 0.5.
DECADES = [[0, 1000], [0.1, 100], [0.3, 10], [1, 1]]


@pytest.mark.parametrize(
  ('points', 'method', 'scale', 'index'),
  [
    # 1 - x - y: 0.7 and 0.4.
    ([[0, 1], [0.1, 0.2], [0.5, 0.1], [1, 0]], 'chord', 'linear', 1),
    # Slopes 8, 1/4 and 1/5.
    ([[0, 1], [0.1, 0.2], [0.5, 0.1], [1, 0]], 'tradeoff', 'linear', 1),
    (TURN, 'chord', 'linear', 2),
    (TURN, 'tradeoff', 'linear', 1),
    (DECADES, 'chord', 'linear', 1),
    (DECADES, 'chord', 'log', 2),
    (DECADES, 'tradeoff', 'linear', 1),
    (DECADES, 'tradeoff', 'log', 2),
    # In other units, and not in order.
    ([[700, 0], [210, 5], [0, 35], [280, 4]], 'chord', 'linear', 1),
    ([[700, 0], [210, 5], [0, 35], [280, 4]], 'tradeoff', 'linear', 1),
    # An S: of its two turns one is a knee, and the other the opposite.
    ([[0, 9], [1, 6], [2, 3], [6, 2], [7, 1], [8, 0]], 'tradeoff', 'linear', 2),
  ],
)
def test_knee_by_hand(points, method, scale, index):
  assert mopt.knee(points, method, scale) == index


@pytest.mark.parametrize('scale', ['linear', 'log'])
def test_methods_disagree_on_either_scale(scale):
  points = np.array(TURN)
  if scale == 'log':
    points[:, 1] = 10 ** (3 * points[:, 1])  # the same shape in decades
  assert mopt.knee(points, 'chord', scale) == 2
  assert mopt.knee(points, 'tradeoff', scale) == 1


def test_defaults_are_chord_and_linear():
  assert mopt.knee(TURN) == mopt.knee(TURN, 'chord', 'linear') == 2


METHODS = pytest.mark.parametrize('method', ['chord', 'tradeoff'])
SCALES = pytest.mark.parametrize('scale', ['linear', 'log'])


@METHODS
@SCALES
@pytest.mark.parametrize(
  'points',
  [
    [],
    [[1, 2]],
    [[1, 2], [2, 1]],
    [[1, 2], [2, 1], [1, 2], [2, 1], [2, 1]],  # two, repeated
    [[1, 2], [2, 1], [2, 2], [3, 3]],  # two, and dominated points
    [[1, 1], [0.5, 0.5], [2, 2]],  # one, and dominated points
    # Bulges towards what is bad, in decades too.
    [[0, 3], [1, 2.9], [2, 2.5], [3, 1]],
  ],
)
def test_no_knee(points, method, scale):
  assert mopt.knee(points, method, scale) is None


@METHODS
@pytest.mark.parametrize('offset', [0, 1e-3, 1e5])
def test_a_line_has_no_knee(method, offset):
  x = offset + np.linspace(0, 1, 7)
  assert mopt.knee(np.stack([x, -3 * x], 1), method) is None
  decades = np.stack([x, 1e5 * np.exp(offset - x)], 1)
  assert mopt.knee(decades, method, 'log') is None
  assert mopt.knee(decades, method, 'linear') is not None


@METHODS
def test_the_first_of_equal_points_is_the_knee(method):
  points = [[1, 0], [0.1, 0.2], [0, 1], [0.1, 0.2], [1, 0], [0.1, 0.2]]
  assert mopt.knee(points, method) == 1


# The same from both axes: each method finds two turns of one size.
MIRRORED = [[0, 10], [1, 4], [4, 1], [10, 0]]


@METHODS
@SCALES
@pytest.mark.parametrize('order', list(itertools.permutations(range(4))))
@pytest.mark.parametrize('unit', [1, 0.1, 1 / 3])
def test_of_equal_bulges_the_smaller_first_objective_wins(
  method, scale, order, unit
):
  points = unit * np.array(MIRRORED, np.float64)[list(order)]
  if scale == 'log':
    points[:, 1] = np.exp(points[:, 1])
  assert mopt.knee(points, method, scale) == order.index(1)


def exact_knee(points):
  """By Das' rule, in fractions: a point, or `None`."""
  front = sorted({p for p, kept in zip(points, by_definition(points)) if kept})
  if len(front) < 3:
    return None
  (left, top), (right, bottom) = front[0], front[-1]
  bulges = [
    1 - Fraction(x - left, right - left) - Fraction(y - bottom, top - bottom)
    for x, y in front
  ]
  return front[bulges.index(max(bulges))] if max(bulges) > 0 else None


@settings(max_examples=300)
@given(points_of(st.integers(0, 12), 3, 6), st.sampled_from([1, 0.1, 1 / 3]))
@example([(8, 2), (0, 10), (3, 5), (2, 6)], 0.1)  # a tie but for rounding
def test_the_knee_does_not_depend_on_rounding(points, unit):
  expected = exact_knee(points)
  index = mopt.knee(unit * as_array(points))
  assert index == (None if expected is None else points.index(expected))


@METHODS
@SCALES
@settings(max_examples=200)
@given(points=points_of(st.integers(1, 9), 3), data=st.data())
def test_dominated_points_do_not_change_the_knee(method, scale, points, data):
  index = mopt.knee(points, method, scale)
  keep = mopt.nondominated(points)
  front = as_array(points)[keep]
  alone = mopt.knee(front, method, scale)
  if index is None:
    assert alone is None
    return
  assert keep[index]
  assert tuple(front[alone]) == points[index]
  # More of them, somewhere else.
  base = data.draw(st.sampled_from(points))
  worse = (base[0] + data.draw(st.integers(1, 99)), base[1])
  assert mopt.knee([*points, worse], method, scale) == index
  assert mopt.knee([worse, *points], method, scale) == index + 1


FUNCTIONS = pytest.mark.parametrize(
  'function',
  [
    mopt.nondominated,
    lambda points: mopt.hypervolume(points, (1, 1)),
    mopt.knee,
    lambda points: mopt.knee(points, 'tradeoff', 'log'),
  ],
)


@FUNCTIONS
@pytest.mark.parametrize(
  'points',
  [
    [1, 2],
    [[1], [2]],
    3.0,
    np.zeros((2, 2, 2)),
    # Nothing in them, but not no points of two objectives.
    np.zeros((5, 0)),
    np.zeros((0, 1)),
    np.zeros((2, 0, 3)),
  ],
)
def test_wrong_shapes_are_refused(function, points):
  match = r'must be \[n, (2\]|m\] with m >= 2), got shape'
  with pytest.raises(ValueError, match=match):
    function(points)


def test_three_objectives_are_too_many_for_a_knee_and_for_two_references():
  points = [[1, 2, 3]]
  assert mopt.nondominated(points).tolist() == [True]
  with pytest.raises(ValueError, match=r'\[n, 2\], got shape \(1, 3\)'):
    mopt.knee(points)
  with pytest.raises(ValueError, match=r'\[n, 2\], got shape \(1, 3\)'):
    mopt.hypervolume(points, (4, 4))
  with pytest.raises(ValueError, match=r'\[n, 4\], got shape \(1, 3\)'):
    mopt.hypervolume(points, (4, 4, 4, 4))


@FUNCTIONS
@pytest.mark.parametrize('place', [(0, 0), (1, 1), (2, 0)])
def test_nan_is_refused(function, place):
  points = np.array([[0.1, 0.9], [0.5, 0.5], [2.0, 3.0]])
  points[place] = math.nan
  with pytest.raises(ValueError, match='NaN'):
    function(points)


@METHODS
@SCALES
@pytest.mark.parametrize('bad', [[math.inf, 0], [5, math.inf], [-math.inf, 9]])
def test_knee_refuses_infinite_points(method, scale, bad):
  # The second is dominated: it is refused all the same.
  with pytest.raises(ValueError, match='finite'):
    mopt.knee([[0, 3], [1, 1], [3, 0.5], bad], method, scale)


@pytest.mark.parametrize(
  'reference',
  [1, [1], [[1, 2]], [1, math.nan], [math.inf, 1], [-math.inf, 1, 2]],
)
def test_hypervolume_refuses_a_reference(reference):
  with pytest.raises(ValueError, match='reference must be'):
    mopt.hypervolume([[0] * np.size(reference)], reference)


@pytest.mark.parametrize('smallest', [0, -1])
def test_knee_refuses_what_has_no_logarithm(smallest):
  points = [[0, 3], [1, 1], [3, smallest]]
  assert mopt.knee(points) == 1
  with pytest.raises(ValueError, match='positive second objective'):
    mopt.knee(points, scale='log')


@pytest.mark.parametrize('points', [[], TURN])
def test_knee_refuses_unknown_words(points):
  with pytest.raises(ValueError, match="method must be .*'elbow'"):
    mopt.knee(points, method='elbow')
  with pytest.raises(ValueError, match="scale must be .*'log2'"):
    mopt.knee(points, scale='log2')


@pytest.mark.parametrize('size', [1e308, 1e-320])
@METHODS
def test_the_knee_is_that_of_points_of_any_size(method, size):
  points = np.array([[-1.5, 1.5], [-1.2, -1.2], [0.5, -1.3], [1.5, -1.5]])
  assert mopt.knee(points * size, method) == mopt.knee(points, method) == 1


@METHODS
def test_no_knee_between_neighbours_whose_logarithms_are_one(method):
  second = [1e300]
  for _ in range(3):
    second.append(np.nextafter(second[-1], 0))
  points = np.stack([np.array([0, 0.1, 0.2, 1]), second], axis=1)
  assert mopt.nondominated(points).all()
  assert mopt.knee(points, method, 'log') is None


def test_no_points_of_three_objectives():
  assert mopt.nondominated(np.zeros((0, 3))).shape == (0,)
  assert mopt.hypervolume(np.zeros((0, 3)), (1, 1, 1)) == 0
  assert mopt.hypervolume([], (1, 1, 1)) == 0
  with pytest.raises(ValueError, match='got shape'):
    mopt.knee(np.zeros((0, 3)))


def knee_of_table(rows, **kwargs):
  points = [(1 - accuracy, nonzeros) for _, accuracy, nonzeros in rows]
  return rows[mopt.knee(points, **kwargs)][0]


@pytest.mark.parametrize(('scale', 'l1'), [('log', 3e-4), ('linear', 9e-5)])
def test_knee_of_the_paper(scale, l1):
  assert knee_of_table(TABLE_2C, method='chord', scale=scale) == l1


def test_a_collapsed_network_must_be_taken_out_first():
  rows = (*TABLE_2C, COLLAPSED)
  assert knee_of_table(rows) != knee_of_table(TABLE_2C)
  with pytest.raises(ValueError, match='positive second objective'):
    knee_of_table(rows, scale='log')


def noisy_runs(num_runs, seed=0):
  """Runs `[S, 6, 2]` of six settings near a front with a round corner."""
  random = np.random.default_rng(seed)
  x = np.linspace(0.05, 1, 6)
  front = np.stack([x, 0.02 / x + 0.1], axis=1)
  return front * np.exp(0.25 * random.normal(size=(num_runs, 6, 2)))


def shares_of_all_draws(runs, method, scale):
  """The shares that infinitely many replicates have, draw by draw."""
  num_runs, n, _ = runs.shape
  shares = np.zeros(n)
  for draw in itertools.product(range(num_runs), repeat=num_runs):
    means = []
    for setting in range(n):
      first, second = zip(*(runs[run, setting] for run in draw))
      is_log = scale == 'log'
      mean = math.prod(second) ** (1 / len(draw)) if is_log else sum(second)
      means.append((sum(first), mean))
    index = mopt.knee(means, method, scale)
    if index is not None:
      shares[index] += 1 / num_runs**num_runs
  return shares


@METHODS
@SCALES
@pytest.mark.parametrize('num_runs', [2, 3, 4])
def test_bootstrap_against_all_draws(method, scale, num_runs):
  runs = noisy_runs(num_runs, seed=num_runs)
  expected = shares_of_all_draws(runs, method, scale)
  assert 0.1 < expected.max() < 0.9  # not the same knee in all draws
  actual = mopt.knee_bootstrap(runs, 4000, 0, method, scale)
  assert actual.shape == (6,)
  assert actual.dtype == np.float64
  # Five standard deviations of a share.
  np.testing.assert_allclose(actual, expected, atol=5 * math.sqrt(0.25 / 4000))


def test_bootstrap_on_a_log_scale_takes_the_geometric_mean():
  # Of the setting in the middle 1 and 1e4: 100 is below the chord in decades,
  # but the arithmetic mean, 5000.5, is above it.
  runs = [
    [[0, 1e4], [0.3, 1], [1, 0.5]],
    [[0, 1e4], [0.3, 1e4], [1, 0.5]],
  ]
  shares = mopt.knee_bootstrap(runs, scale='log')
  # All draws but that of the second run alone.
  assert shares[1] == pytest.approx(0.75, abs=0.07)
  assert shares[[0, 2]].tolist() == [0, 0]


def test_bootstrap_draws_whole_runs():
  # In units of 1 and of 9. Were settings drawn one by one, setting 1 of the
  # second run would meet setting 2 of the first, and lose.
  runs = np.array([[0, 1], [0.1, 0.1], [0.4, 0.09], [1, 0]])
  runs = np.stack([runs, 9 * runs])
  assert mopt.knee_bootstrap(runs).tolist() == [0, 1, 0, 0]


@METHODS
def test_bootstrap_of_one_run_and_of_none_that_has_a_knee(method):
  shares = mopt.knee_bootstrap([TURN], 7, method=method)
  assert shares.tolist() == np.eye(4)[mopt.knee(TURN, method)].tolist()
  line = [[0, 2], [1, 1], [2, 0]]
  assert mopt.knee_bootstrap([line, line], 7, method=method).tolist() == [0] * 3
  assert mopt.knee_bootstrap(np.zeros((2, 0, 2))).shape == (0,)


def test_bootstrap_repeats_itself():
  runs = noisy_runs(5)
  first = mopt.knee_bootstrap(runs, 200, seed=3)
  np.testing.assert_array_equal(mopt.knee_bootstrap(runs, 200, seed=3), first)
  assert (mopt.knee_bootstrap(runs, 200, seed=4) != first).any()
  # Nor does the order of the settings matter.
  backwards = mopt.knee_bootstrap(runs[:, ::-1], 200, seed=3)
  np.testing.assert_array_equal(backwards[::-1], first)


@given(
  st.lists(points_of(st.integers(1, 9), 4, 4), min_size=1, max_size=3),
  st.sampled_from(['linear', 'log']),
)
def test_bootstrap_shares_are_of_the_replicates(runs, scale):
  shares = mopt.knee_bootstrap(runs, 8, scale=scale)
  np.testing.assert_array_equal(shares * 8, np.round(shares * 8))
  assert 0 <= shares.min() <= shares.sum() <= 1


@pytest.mark.parametrize(
  ('points', 'options', 'message'),
  [
    ([], {}, r'\[S, n, 2\] with S >= 1, got shape \(0,\)'),
    (TURN, {}, r'got shape \(4, 2\)'),
    (np.zeros((0, 4, 2)), {}, r'got shape \(0, 4, 2\)'),
    (np.zeros((2, 4, 3)), {}, r'got shape \(2, 4, 3\)'),
    ([[[0, 1], [math.nan, 2]]], {}, 'must be finite'),
    ([[[0, 1], [math.inf, 2]]], {}, 'must be finite'),
    ([TURN], {'num_samples': 0}, 'num_samples must be an integer >= 1, got 0'),
    ([TURN], {'num_samples': 1.5}, 'num_samples must be .* got 1.5'),
    ([TURN], {'method': 'elbow'}, "method must be .*'elbow'"),
    ([TURN], {'scale': 'log2'}, "scale must be .*'log2'"),
    ([TURN], {'scale': 'log'}, 'positive second objective'),
    ([TURN], {'seed': -1}, 'seed must be an integer >= 0, got -1'),
    ([TURN], {'seed': None}, 'seed must be .* got None'),
  ],
)
def test_bootstrap_refuses(points, options, message):
  with pytest.raises(ValueError, match=message):
    mopt.knee_bootstrap(points, **options)
