"""Searches over the weight of a weighted sum, for the knee of a front.

A strategy is a `Search` of pure functions: `ask` names a batch of weights that
can be tried side by side, `tell` takes what came out. What is tried, networks
or anything else, is up to the caller:

  >>> from mopt import search
  >>> def solve(w):  # (x - 1)^2 + w x, minimised over x >= 0
  ...   x = max(1 - w / 2, 0.0)
  ...   return (x - 1) ** 2, x
  >>> strategy = search.bisection(low=0.01, high=1.0, levels=4)
  >>> state = strategy.init()
  >>> while not strategy.done(state):
  ...   weights = strategy.ask(state)
  ...   state = strategy.tell(state, weights, [solve(w) for w in weights])
  >>> [round(trial.weight, 3) for trial in state.trials]
  [0.01, 1.0, 0.1, 0.316, 0.032, 0.562, 0.178]

The weight l is that of f1 + l f2 (`scalarization='penalty'`, equation (2) of
the paper) or of (1 - l) f1 + l f2 (`'convex'`, equation (7)). Both objectives
are minimised.

`tell` knows its weights again when they have been through float32, as those of
`jnp.asarray(weights)` have; a trial has the weight as it was asked. A state may
have been through JSON: `SearchState(*json.loads(json.dumps(state)))`.
"""

from collections.abc import Callable, Sequence
import itertools
import math
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from mopt.checks import check_integer
from mopt.pareto import nondominated

# Relative distance up to which two weights are the same.
_SAME = 1e-6

# How wide a gap between two weights is, and its middle.
_SPACINGS = {
  'log': (lambda a, b: b / a, lambda a, b: math.sqrt(a) * math.sqrt(b)),
  'linear': (lambda a, b: b - a, lambda a, b: 0.5 * (a + b)),
}


class Trial(NamedTuple):
  """A weight, and the objectives of what it led to."""

  weight: float
  objectives: tuple[float, float]  # Not finite if it failed.


class SearchState(NamedTuple):
  """Where a search stands; plain numbers, to be saved as one likes."""

  asked: Sequence[float]  # Weights that wait for their objectives.
  trials: Sequence[Trial]  # In the order in which they were told.
  level: int  # Number of batches that were told.


class Search(NamedTuple):
  """The functions of a strategy, see the module."""

  init: Callable[[], SearchState]
  ask: Callable[[SearchState], np.ndarray]  # [n], float64; empty when done.
  tell: Callable[[SearchState, ArrayLike, ArrayLike], SearchState]
  done: Callable[[SearchState], bool]


def grid(
  low: float = 1e-5, high: float = 1e-2, num: int = 14, spacing: str = 'log'
) -> Search:
  """Tries weights from `low` to `high`, all in one batch.

  Args:
    low: smallest weight, positive for `spacing='log'`, else >= 0.
    high: largest weight.
    num: how many, at least 2.
    spacing: `'log'` or `'linear'`.

  Returns:
    A `Search`.

  Raises:
    ValueError: for arguments out of these ranges.

  Examples:
    >>> from mopt import search
    >>> strategy = search.grid(1e-4, 1e-2, num=3)
    >>> print(strategy.ask(strategy.init()))
    [0.0001 0.001  0.01  ]
  """
  _check_range(low, high, spacing, 'penalty')
  num = check_integer('num', num, 2)
  space = np.geomspace if spacing == 'log' else np.linspace
  weights = space(low, high, num).tolist()
  weights[0], weights[-1] = float(low), float(high)
  weights = list(dict.fromkeys(weights))  # ends may be next to each other
  return _search(weights, lambda state: (), low, high, 1, num)


def dichotomic(
  low: float = 1e-5,
  high: float = 1e-2,
  levels: int = 5,
  max_trials: int = 20,
  scalarization: str = 'penalty',
) -> Search:
  """Tries the weight at which two neighbours on the front are equally good.

  That is the slope of the line through them. Where subproblems are solved
  exactly, the new point is below that line or proves that there is none.
  Between stochastic solutions slopes repeat or leave the range, and the
  search ends early: see `stochastic_dichotomic`. Where an end fails, the gap to
  it is halved until there are two successes; what is beyond them stays unknown.

  Args:
    low: smallest weight, >= 0, tried first with `high`.
    high: largest weight; at most 1 for `scalarization='convex'`.
    levels: largest number of batches, the first two weights included.
    max_trials: largest number of trials.
    scalarization: `'penalty'` or `'convex'`, see the module.

  Returns:
    A `Search`.

  Raises:
    ValueError: for arguments out of these ranges.

  Examples:
    >>> from mopt import search
    >>> strategy = search.dichotomic(0.1, 10.0)
    >>> state = strategy.tell(strategy.init(), [0.1, 10.0], [(0, 4), (3, 1)])
    >>> print(strategy.ask(state))
    [1.]

  References:
    Aneja and Nair, `Bicriteria transportation problem
    <https://doi.org/10.1287/mnsc.25.1.73>`_, 1979; Reiners et al., 2020,
    section 5 and 6.3.2.
  """
  _check_range(low, high, 'linear', scalarization)
  propose = lambda state: (
    _slopes(_front(state.trials), scalarization)
    or _between_failed(state.trials, _spacing(low))
  )
  return _search([low, high], propose, low, high, levels, max_trials)


def stochastic_dichotomic(
  key: jax.Array,
  low: float = 1e-5,
  high: float = 1e-2,
  levels: int = 5,
  max_trials: int = 20,
  scalarization: str = 'penalty',
  min_gap: float = 0.1,
  paper_rule: bool = False,
) -> Search:
  """`dichotomic`, but a weight close to a tried one is drawn anew around it.

  As printed, the paper's rule calls weights close whose difference is at most
  0.001, and draws around the old one. Where knees are near 3e-4 nearly all
  weights are close then. So here closeness is relative, and the draw is around
  the new weight: uniform within a factor of 1 - `min_gap` to 1 + `min_gap`.

  Of two exact solutions the slope lies between their weights. Where it does
  not, the solutions are not exact, and instead of the slope a weight between
  theirs is drawn, uniform in its logarithm.

  Args:
    key: of the draws, `jax.random.key(seed)`; the same key gives the same
      search.
    low: see `dichotomic`, like all others that are not listed.
    high: likewise.
    levels: likewise.
    max_trials: likewise.
    scalarization: likewise.
    min_gap: distance to the nearest tried weight, relative to the new one, up
      to which it is close; in (0, 1).
    paper_rule: keep the printed rule; `min_gap` is not read then.

  Returns:
    A `Search`.

  Raises:
    ValueError: for arguments out of these ranges, or a key that is none.

  Examples:
    >>> import jax
    >>> from mopt import search
    >>> strategy = search.stochastic_dichotomic(jax.random.key(0), 0.9, 10.0)
    >>> state = strategy.tell(strategy.init(), [0.9, 10.0], [(0, 4), (3, 1)])
    >>> (weight,) = strategy.ask(state).tolist()  # near 1, which is near 0.9
    >>> weight != 1.0 and 0.9 <= weight <= 1.1
    True

  References:
    Reiners et al., 2020, Algorithm 3.
  """
  _check_key(key)
  _check_range(low, high, 'linear', scalarization)
  if not 0 < min_gap < 1:
    raise ValueError(f'min_gap must be in (0, 1), got {min_gap}.')

  def propose(state):
    tried = [trial.weight for trial in state.trials]
    front = _front(state.trials)
    weights = _slopes(front, scalarization)
    level_key = jax.random.fold_in(key, state.level)
    uniform = jax.random.uniform(level_key, (len(weights), 2)).tolist()
    if not paper_rule:
      pairs = itertools.pairwise([trial.weight for trial in front])
      weights = [
        between(weight, min(pair), max(pair), first)
        for weight, pair, (first, _) in zip(weights, pairs, uniform)
      ]
    drawn = [draw(w, tried, second) for w, (_, second) in zip(weights, uniform)]
    return drawn or _between_failed(state.trials, _spacing(low))

  def between(weight, left, right, uniform):
    if left < weight < right:
      return weight
    if left == 0:
      return uniform * right
    return left * (right / left) ** uniform

  def draw(weight, tried, uniform):
    nearest = min(tried, key=lambda other: abs(other - weight))
    distance = abs(nearest - weight)
    if paper_rule:
      is_close, center, width = distance <= 1e-3, nearest, 0.1
    else:
      is_close, center, width = distance <= min_gap * weight, weight, min_gap
    if not is_close:
      return weight
    lowest = max((1 - width) * center, low)
    highest = min((1 + width) * center, high)
    return lowest + uniform * (highest - lowest)

  return _search([low, high], propose, low, high, levels, max_trials)


def bisection(
  low: float = 1e-5,
  high: float = 1e-2,
  levels: int = 8,
  max_trials: int = 20,
  spacing: str = 'log',
  intervals: int = 2,
) -> Search:
  """Halves the intervals of weights between which the trade-off changes most.

  On the front, objectives normalised to [0, 1], the trade-off between two
  neighbours is the slope from one to the other. An interval between two
  neighbours is as relevant as the larger fall of the slope, as an angle, at
  one of its ends: a knee is an end of relevant intervals.

  Where trials fail, as networks do that lose all their weights, the gap between
  a success and a failure goes first while no gap of successes is wider.

  Args:
    low: smallest weight, tried first with `high`; positive for
      `spacing='log'`, else >= 0.
    high: largest weight.
    levels: largest number of batches, the first two weights included.
    max_trials: largest number of trials.
    spacing: `'log'` halves by the geometric mean, `'linear'` by the arithmetic.
    intervals: how many are halved at a time, at least 1.

  Returns:
    A `Search`.

  Raises:
    ValueError: for arguments out of these ranges.

  Examples:
    >>> from mopt import search
    >>> strategy = search.bisection(1e-4, 1e-2)
    >>> state = strategy.tell(strategy.init(), [1e-4, 1e-2], [(0, 4), (3, 1)])
    >>> print(strategy.ask(state))
    [0.001]

  References:
    Reiners et al., 2020, section 5.
  """
  _check_range(low, high, spacing, 'penalty')
  intervals = check_integer('intervals', intervals, 1)

  width, middle = _SPACINGS[spacing]

  def propose(state):
    front = _front(state.trials)
    order = _by_relevance([trial.objectives for trial in front])
    weights = _between_failed(state.trials, spacing)
    weights += [halve(state.trials, front[i], front[i + 1]) for i in order]
    return weights[:intervals]

  def halve(trials, a, b):
    # Dominated weights lie between: the widest gap is halved.
    ends = sorted((a.weight, b.weight))
    inside = sorted(t.weight for t in trials if ends[0] <= t.weight <= ends[1])
    widest = max(itertools.pairwise(inside), key=lambda pair: width(*pair))
    return middle(*widest)

  return _search([low, high], propose, low, high, levels, max_trials)


def _by_relevance(front: Sequence[tuple[float, float]]) -> np.ndarray:
  """The intervals of a front by the larger fall of the trade-off at their ends.

  `front` is sorted by the second objective, and so from large first ones on.
  Where the trade-off rises, a front is not convex, and has no knee. Of equally
  relevant intervals the longer one goes first.
  """
  points = np.array(front, np.float64).reshape(-1, 2)
  if len(points) < 2:
    return np.zeros(0, int)
  x, y = ((points - points.min(axis=0)) / np.ptp(points, axis=0)).T
  angles = np.arctan2(np.diff(y), -np.diff(x))
  falls = np.concatenate([[0], np.maximum(np.diff(angles), 0), [0]])
  relevance = np.maximum(falls[:-1], falls[1:])
  lengths = np.hypot(np.diff(x), np.diff(y))
  return np.lexsort((-lengths, -relevance))


def _between_failed(trials: Sequence[Trial], spacing: str) -> list[float]:
  """Middles of gaps between a success and a failure, the widest one first.

  None that is narrower than a gap between two successes. Where nothing has
  succeeded, all gaps count.
  """
  width, middle = _SPACINGS[spacing]
  tried = sorted((t.weight, _has_failed(t)) for t in trials)
  # By how many of both ends have failed.
  gaps: list[list[tuple[float, float]]] = [[], [], []]
  for (low, low_failed), (high, high_failed) in itertools.pairwise(tried):
    gaps[low_failed + high_failed].append((low, high))
  widest = max((width(*gap) for gap in gaps[0]), default=0.0)
  has_success = not all(failed for _, failed in tried)
  found = [g for g in gaps[1 if has_success else 2] if width(*g) >= widest]
  return [middle(*g) for g in sorted(found, key=lambda g: -width(*g))]


def _spacing(low: float) -> str:
  return 'log' if low > 0 else 'linear'


def _has_failed(trial: Trial) -> bool:
  return not np.isfinite(trial.objectives).all()


def _slopes(front: Sequence[Trial], scalarization: str) -> list[float]:
  """The weight at which neighbours on a front have equal weighted sums."""
  weights = []
  for a, b in itertools.pairwise(front):
    gain = a.objectives[0] - b.objectives[0]  # positive, as is the price
    price = b.objectives[1] - a.objectives[1]
    total = price if scalarization == 'penalty' else price + gain
    weights.append(gain / total)
  return weights


def _front(trials: Sequence[Trial]) -> list[Trial]:
  """Trials that nothing dominates, by the second objective, equal ones once."""
  finite = [t for t in trials if not _has_failed(t)]
  keep = nondominated([t.objectives for t in finite])
  different = {t.objectives: t for t, kept in zip(finite, keep) if kept}
  return sorted(different.values(), key=lambda t: t.objectives[1])


def _search(
  first: Sequence[float],
  propose: Callable[[SearchState], Sequence[float]],
  low: float,
  high: float,
  levels: int,
  max_trials: int,
) -> Search:
  """A `Search` that asks for `first`, and then level by level."""
  levels = check_integer('levels', levels, 1)
  max_trials = check_integer('max_trials', max_trials, len(first))

  def init():
    return SearchState(tuple(map(float, first)), (), 0)

  def tell(state, weights, objectives):
    state = _plain(state)
    told = _check_told(state.asked, weights, objectives)
    left = set(state.asked) - {trial.weight for trial in told}
    state = state._replace(
      asked=tuple(weight for weight in state.asked if weight in left),
      trials=(*state.trials, *told),
    )
    if left:
      return state
    state = state._replace(level=state.level + 1)
    if state.level == levels:
      return state
    asked: list[float] = []
    for weight in map(float, propose(state)):
      known = (*asked, *(trial.weight for trial in state.trials))
      is_new = all(abs(weight - other) > _SAME * weight for other in known)
      if is_new and low <= weight <= high:
        asked.append(weight)
    room = max_trials - len(state.trials)
    return state._replace(asked=tuple(asked[:room]))

  return Search(
    init=init,
    ask=lambda state: np.array(state.asked, np.float64),
    tell=tell,
    done=lambda state: not state.asked,
  )


def _plain(state: SearchState) -> SearchState:
  """A state of tuples and floats, from one that may have lists in it."""
  trials = [
    Trial(float(weight), (float(first), float(second)))
    for weight, (first, second) in state.trials
  ]
  return SearchState(
    tuple(map(float, state.asked)), tuple(trials), int(state.level)
  )


def _check_told(asked, weights, objectives) -> tuple[Trial, ...]:
  weights = np.asarray(weights)
  objectives = np.asarray(objectives, np.float64)
  if weights.ndim != 1 or objectives.shape != (len(weights), 2):
    raise ValueError(
      'expected weights [n] and objectives [n, 2], got shapes '
      f'{weights.shape} and {objectives.shape}.'
    )
  told = weights.astype(np.float64).tolist()
  meant = _as_asked(asked, told, is_exact=weights.dtype.itemsize > 4)
  return tuple(
    Trial(weight, (first, second))
    for weight, (first, second) in zip(meant, objectives.tolist())
  )


def _as_asked(
  asked: Sequence[float], told: Sequence[float], is_exact: bool
) -> list[float]:
  """The weights that were asked and are meant by those that are told.

  Those may have been rounded to float32. Of weights that are equal there all
  have to be told, in the order in which they were asked; or any by themselves,
  if they have not been rounded: `is_exact`.
  """
  asked_as, told_as = _by_float32(asked), _by_float32(told)
  meant: dict[float, list[float]] = {}
  for key, group in told_as.items():
    choice = asked_as.get(key, [])
    if is_exact and len(set(group).intersection(choice)) == len(group):
      choice = group
    for weight, other in itertools.zip_longest(group, choice):
      if other is None and choice:
        raise ValueError(f'told of weight {weight} twice.')
      if weight is None:
        raise ValueError(
          f'told of weight {key}, which in float32 is any of {choice}: tell '
          'all of them at once, or in float64.'
        )
      # Not what is far off, and is 0 or infinite in float32 too.
      if other is None or not (
        weight == key or math.isclose(weight, other, rel_tol=_SAME)
      ):
        waiting = ', '.join(map(str, asked)) or 'nothing'
        raise ValueError(f'told of weight {weight}, but asked for {waiting}.')
    meant[key] = list(reversed(choice))
  return [meant[_float32(weight)].pop() for weight in told]


def _by_float32(weights: Sequence[float]) -> dict[float, list[float]]:
  """Weights by what float32 makes of them."""
  groups: dict[float, list[float]] = {}
  for weight in weights:
    groups.setdefault(_float32(weight), []).append(weight)
  return groups


def _float32(weight: float) -> float:
  with np.errstate(over='ignore'):
    return float(np.float32(weight))


def _check_key(key: jax.Array) -> None:
  try:
    jax.random.fold_in(key, 0)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'key must be one key such as jax.random.key(0), got {key!r}.'
    ) from error


def _check_range(low, high, spacing, scalarization) -> None:
  if spacing not in ('log', 'linear'):
    raise ValueError(f"spacing must be 'log' or 'linear', got {spacing!r}.")
  if scalarization not in ('penalty', 'convex'):
    raise ValueError(
      f"scalarization must be 'penalty' or 'convex', got {scalarization!r}."
    )
  if not 0 <= low < high < math.inf or (spacing == 'log' and low == 0):
    least = 'positive' if spacing == 'log' else '>= 0'
    raise ValueError(
      f'low must be {least} and below a finite high, got {low} and {high}.'
    )
  if scalarization == 'convex' and high > 1:
    raise ValueError(
      f"high must be at most 1 for scalarization='convex', got {high}."
    )
