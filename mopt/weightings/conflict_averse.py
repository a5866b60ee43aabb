"""Directions near the mean that are best for the objective worst off."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mopt import pairs
from mopt import quadratic_program
from mopt.checks import check_factor
from mopt.checks import check_gramian
from mopt.pairs import Pair
from mopt.weightings.weighting import Function

# Of the steps in level; four to eight are the rule.
_MOST_STEPS = 50
# Of the square of a length beyond which a level is out of reach, in units of
# one that is about the square of the radius.
_LIMIT = 1e4
# By how much each level is lowered, in units of the sizes: enough for the
# solver to see that what only a direction without end would reach is too high.
_SLACK = 1e-10


def cagrad(c: jax.typing.ArrayLike = 0.5) -> Function:
  r"""CAGrad: near the mean, the best for the objective that gains least.

  .. math::

    \max_d \min_j \langle g_j, d \rangle, \quad |d - g_0| \le c |g_0|,

  with the mean :math:`g_0` of the gradients. `c = 0` is the mean itself. For
  `c < 1` the direction always descends for the mean, and steps of it end where
  the mean is stationary; for `c >= 1` they end at any Pareto-stationary point.

  When to take it: where the mean of the objectives is what counts, and none
  should be left behind on the way. It does not promise descent for all: some
  objective may get worse if `c` is small and the conflict large. Long gradients
  count for more in the mean, and short ones decide what the least gain is.
  It does not depend on the order of the objectives, nor on a common scale. It
  costs what four to eight calls of `mopt.dual_proj` of three objectives or
  more do.

  Solved by Newton's iteration on the least gain, with the active-set method of
  `mopt.min_norm_weights`, until the gain falls no more. The direction is as
  the paper's equation (2) has it, not divided by `1 + c` or `1 + c^2` as some
  implementations do afterwards.

  Degenerate cases: of several solutions, which only gains of 0 have, it is the
  one nearest to the mean. So a gradient that is zero has the weight 1 / m
  and, as far as `c` allows, the others do as in `mopt.dual_proj`; and opposite
  gradients, with `c >= 1`, cancel. A mean that is zero gives the mean. A
  Gramian that is not finite gives weights that are all NaN. It cannot be
  differentiated in reverse mode.

  Args:
    c: scalar, non-negative and finite: how far from the mean the direction may
      be, in lengths of it. May be traced, and mapped over.

  Returns:
    A weighting: from the Gramian `[m, m]`, m >= 2, to weights `[m]` f32, f64 if
    the Gramian is; at least 1 / m each.

  Raises:
    ValueError: for a `c` that is negative or not finite (as far as it is known
      when this is called) or no scalar; by the weighting, if the Gramian is not
      square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.cagrad(c=0.5)
    >>> print(weighting(jnp.array([[1., -2.], [-2., 8.]])).round(4))
    [1.059 0.5  ]

  References:
    Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
    <https://arxiv.org/abs/2110.14048>`_, 2021, problem (2).
  """
  check_factor('c', c)

  def weighting(gramian: jax.Array) -> jax.Array:
    gramian = check_gramian(gramian)
    return _cagrad(gramian, jnp.asarray(c, gramian.dtype))

  return weighting


class _Problem(NamedTuple):
  """The largest level l with `C y + slopes >= l rates` and |y|_C <= radius."""

  matrix: Pair  # [m, m]: C, with a diagonal of 0.25 to 2, or 0.
  slopes: Pair  # [m]: inner products with the mean.
  sizes: jax.Array  # [m]: magnitude of the terms that make up those.
  rates: jax.Array  # [m]: powers of two, 1 for the shortest gradient.
  radius: jax.Array  # [].


class _Newton(NamedTuple):
  """Where Newton's iteration stands. It comes from above."""

  level: Pair  # []: no direction within reach has a larger one.
  y: Pair  # [m]: the least that reaches the level before, or as good as that.
  length: jax.Array  # []: of y.
  steps: jax.Array  # [], dtype=jnp.int32.
  done: jax.Array  # [], dtype=bool.


@jax.jit  # Or a call outside of jit would compile its loop anew.
def _cagrad(gramian: jax.Array, c: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  m, dtype = len(gramian), gramian.dtype
  unit, _ = quadratic_program.unit_scales(gramian)
  is_zero = jnp.diagonal(gramian) <= 0
  # Nothing is to be measured in units of a zero.
  largest = jnp.max(jnp.where(is_zero, 0, unit))
  largest = jnp.where(largest > 0, largest, 1)
  unit = jnp.where(is_zero, largest, unit)
  matrix = pairs.from_array(gramian * unit[:, None] * unit[None, :])
  start = 1 / (m * unit)
  # Powers of two, so that nothing is rounded: first the largest is about 1,
  # then the radius is, unless that is very small.
  _, exponent = jnp.frexp(jnp.max(start))
  start = jnp.ldexp(start, -exponent)
  pair = pairs.from_array(start)
  square = pairs.to_array(_dot(pair, _product(matrix, pair)), dtype)
  radius = c * jnp.sqrt(jnp.maximum(square, 0))
  _, shift = jnp.frexp(jnp.maximum(radius, 2.0**-40))
  start = pairs.from_array(jnp.ldexp(start, -shift))
  exponent += shift
  problem = _Problem(
    matrix=matrix,
    slopes=_product(matrix, start),
    sizes=jnp.sum(jnp.abs(matrix[0]) * start[0][None], axis=1),
    rates=(unit / largest).astype(jnp.float32),
    radius=jnp.ldexp(radius, -shift),
  )
  found = _largest_level(problem)
  # What is beyond the radius is rounding.
  share = jnp.minimum(
    1, problem.radius / jnp.where(found.length > 0, found.length, 1)
  )
  added = share * pairs.to_array(found.y, dtype)
  # First the scales, whose product with what is added is in range.
  weights = 1 / m + jnp.ldexp(unit, exponent) * added
  return jnp.where(is_finite, weights, jnp.nan)


def _largest_level(problem: _Problem) -> _Newton:
  """Solves it by Newton's iteration on the length that a level needs.

  That is convex in l, so the iteration comes down to the solution. Its next
  level is the bound of the dual problem, `(y'q + radius |y|) / (y'e)`, which
  holds for any y >= 0: also for a direction along which y grows without end.
  """
  dtype = problem.radius.dtype
  m = len(problem.sizes)
  zero = jnp.zeros(m, jnp.float32)
  lengths = jnp.sqrt(jnp.diagonal(problem.matrix[0]))
  bounds = problem.slopes[0] + problem.radius.astype(jnp.float32) * lengths
  level = jnp.min(bounds / problem.rates)
  rounding = 8 * jnp.finfo(dtype).eps

  def step(old: _Newton) -> _Newton:
    threshold = pairs.mul((problem.rates, zero), _spread(old.level, m))
    linear = pairs.add(problem.slopes, pairs.neg(threshold))
    y = quadratic_program.solve(
      quadratic_program.Program(
        matrix=problem.matrix,
        linear=linear,
        size=problem.sizes + jnp.abs(threshold[0]),
      ),
      limit=_LIMIT,
    )
    square = pairs.to_array(_dot(y, _product(problem.matrix, y)), dtype)
    length = jnp.sqrt(jnp.maximum(square, 0))
    gain = -pairs.to_array(_dot(y, linear), dtype)
    total = pairs.total(pairs.mul(y, (problem.rates, zero)))
    is_there = total[0] > 0
    total = pairs.select(is_there, total, (jnp.float32(1), jnp.float32(0)))
    # At the least y of a level its square is the gain; along a direction
    # without end it is 0.
    is_endless = 2 * square < gain
    times = jnp.where(is_endless, 0, problem.radius * length)
    slack = _SLACK * jnp.sum(y[0] * problem.sizes)
    bound = pairs.add(_dot(y, problem.slopes), pairs.from_array(times - slack))
    bound = pairs.mul(bound, pairs.reciprocal(total))
    reached = (length <= (1 + rounding) * problem.radius) & ~is_endless
    falls = is_there & pairs.less(bound, old.level)
    steps = old.steps + 1
    return _Newton(
      level=pairs.select(falls, bound, old.level),
      y=y,
      length=length,
      steps=steps,
      done=reached | ~falls | (steps >= _MOST_STEPS),
    )

  return jax.lax.while_loop(
    lambda s: ~s.done,
    step,
    _Newton(
      level=(level, jnp.zeros_like(level)),
      y=(zero, zero),
      length=jnp.zeros((), dtype),
      steps=jnp.zeros((), jnp.int32),
      done=~(problem.radius > 0),
    ),
  )


def _spread(a: Pair, m: int) -> Pair:
  return jnp.broadcast_to(a[0], (m,)), jnp.broadcast_to(a[1], (m,))


def _dot(a: Pair, b: Pair) -> Pair:
  return pairs.total(pairs.mul(a, b))


def _product(matrix: Pair, vector: Pair) -> Pair:
  return pairs.total(pairs.mul(matrix, (vector[0][None], vector[1][None])))
