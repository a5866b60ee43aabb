"""Directions that share out the gain: bargaining solutions and fairness.

Both solve `G a = a^(-1 / alpha), a > 0`, with the Gramian G. A solution exists
if and only if some direction descends for all, and then is unique: it minimises
a convex potential. Near a Pareto-stationary point it grows without end, and the
Gramian tells its direction no more than rounding lets it. So what is solved has
a ridge, and always a solution.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mopt import pairs
from mopt import quadratic_program
from mopt.checks import check_factor
from mopt.checks import check_gramian
from mopt.pairs import Pair
from mopt.weightings.weighting import Function

# Of each diagonal element, what is added to it.
_RIDGE = 2.0**-20
# Of the largest number: what is smaller adds nothing to the direction.
_NOTHING = 1e-14
# The same, of what need not be right in all its digits.
_LITTLE = 1e-6
# Of Newton's steps; 5 to 30 are the rule. Later ones are damped.
_FREE_STEPS = 40
_MOST_STEPS = 200
# What a step leaves of a number at least.
_LEAST_LEFT = 0.25


def nash_mtl(gramian: jax.Array) -> jax.Array:
  r"""Nash-MTL: the bargain in which all gain in proportion.

  Weights with :math:`G a = 1 / a, a > 0`: the inner product of the direction d
  with each gradient is the inverse of the weight of that. So d maximises the
  product of all gains over a ball.

  When to take it: where the objectives have nothing in common, not even their
  units. It descends for all. Whatever a gradient is multiplied by, the
  direction is the same, and has the squared length m (so scale the learning
  rate, or clip the update, as the paper does, to length 1). It does not depend
  on the order of the objectives. It costs 5 to 30 solves of an `[m, m]` system.

  Newton's method until its steps are rounding, with the gradient of the
  potential in pairs of floats. What is solved is the equation with `2^-20`
  (1e-6) of itself added to each diagonal element of G, what a float32 Gramian
  may be off, so that there always is a solution: of unit gradients the weights
  are off by 1e-6 of their square, and are at most 1024. At a Pareto-stationary
  point, such as of opposite gradients, the inner products with the direction
  are 0 up to rounding, and so is its length.

  A gradient that is zero has the weight 0, and the others are weighted without
  it. A Gramian that is not finite gives weights that are all NaN. It can be
  differentiated in both modes, by the equation that holds at the solution.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite, see
      `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is; positive, and 0 for zero gradients.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.nash_mtl(jnp.diag(jnp.array([1., 16., 64.]))).round(4))
    [1.    0.25  0.125]

  References:
    Navon et al., `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/abs/2202.01017>`_, 2022, claim 3.1.
  """
  gramian = check_gramian(gramian)
  return _bargain(gramian, jnp.ones((), gramian.dtype))


def fairgrad(alpha: jax.typing.ArrayLike = 2.0) -> Function:
  r"""FairGrad: alpha-fair gains.

  Weights with :math:`G a = a^{-1 / \alpha}, a > 0`: the direction d has the
  largest sum of :math:`\langle g_j, d \rangle^{1 - \alpha} / (1 - \alpha)` over
  a ball. `alpha = 1` is `mopt.nash_mtl`; the smaller, the nearer to the sum of
  all gradients; the larger, the more the objective with the least gain counts.

  When to take it: as `mopt.nash_mtl`, with a say in how equal gains shall be.
  It descends for all. It does not depend on the order of the objectives. But
  for `alpha = 1` it depends on the scales of the gradients: of all scaled by s
  the weights are those times :math:`s^{-2 \alpha / (1 + \alpha)}`. It costs 5
  to 30 solves of an `[m, m]` system.

  The squared length of the direction is the sum of :math:`a^{1 - 1 / \alpha}`.
  Near a Pareto-stationary point, where the weights grow, it falls for
  `alpha < 1` and grows for `alpha > 1`: there steps of it end only if the
  learning rate falls, or the update is clipped.

  How it is solved, and what it does at Pareto-stationary points, with zeros and
  with what is not finite, is said at `mopt.nash_mtl`.

  Args:
    alpha: scalar, positive and finite. May be traced, and mapped over.

  Returns:
    A weighting: from the Gramian `[m, m]`, m >= 2, to weights `[m]` f32, f64 if
    the Gramian is; positive, and 0 for zero gradients.

  Raises:
    ValueError: for an `alpha` that is not positive or not finite (as far as it
      is known when this is called) or no scalar; by the weighting, if the
      Gramian is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.fairgrad(alpha=2.0)
    >>> print(weighting(jnp.diag(jnp.array([1., 8., 64.]))).round(4))
    [1.     0.25   0.0625]

  References:
    Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
    <https://arxiv.org/abs/2402.15638>`_, 2024, equation (5).
  """
  check_factor('alpha', alpha, is_positive=True)

  def weighting(gramian: jax.Array) -> jax.Array:
    gramian = check_gramian(gramian)
    return _bargain(gramian, jnp.asarray(alpha, gramian.dtype))

  return weighting


class _Newton(NamedTuple):
  """Where Newton's method stands."""

  y: Pair  # [m]: positive.
  steps: jax.Array  # [], dtype=jnp.int32.
  done: jax.Array  # [], dtype=bool.


@jax.jit  # Or a call outside of jit would compile its loop anew.
def _bargain(gramian: jax.Array, alpha: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  is_zero = jnp.diagonal(gramian) <= 0
  # Of unit length and apart from the others; that of no scale known is 1.
  either = is_zero[:, None] | is_zero[None, :]
  largest = jnp.max(jnp.diagonal(gramian))
  largest = jnp.where(largest > 0, largest, 1)
  eye = jnp.eye(len(gramian), dtype=gramian.dtype)
  gramian = jnp.where(either, largest * eye, gramian)
  weights = jnp.where(is_zero, 0, _solve(gramian, alpha))
  return jnp.where(is_finite, weights, jnp.nan)


@jax.custom_jvp
def _solve(gramian: jax.Array, alpha: jax.Array) -> jax.Array:
  """Solves the equation for gradients none of which is zero.

  With `a = unit y`, the scales making the diagonal of C about 1 and those of
  the shortest gradient 1, it is `C y = b y^(-1 / alpha)` of
  `b = scale^(1 - 1 / alpha)`.
  """
  unit, scale = quadratic_program.unit_scales(gramian)
  matrix = _ridged(gramian * unit[:, None] * unit[None, :])
  # The solution, were the gradients orthogonal and of these lengths.
  start = scale ** ((alpha - 1) / (alpha + 1))
  y = _newton(matrix, start, alpha)
  overall = jnp.max(unit) ** (2 * alpha / (alpha + 1))
  return overall * (scale * y)


@_solve.defjvp
def _solve_jvp(primals, tangents):
  """By the equation of the solution: `H dy = -dC y - ...`."""
  (gramian, alpha), (change, change_of_alpha) = primals, tangents
  weights = _solve(gramian, alpha)
  unit, _ = quadratic_program.unit_scales(gramian)
  matrix = _ridged(gramian * unit[:, None] * unit[None, :])
  ridged_change = change + _RIDGE * jnp.diag(jnp.diagonal(change))
  gains = weights ** (-1 / alpha)
  highest = jax.lax.Precision.HIGHEST
  pull = jnp.matmul(ridged_change, weights, precision=highest)
  pull -= gains * jnp.log(weights) / alpha**2 * change_of_alpha
  y = weights / unit
  step = _relative_step(matrix, y, weights * gains, -weights * pull, alpha)
  return weights, weights * step


def _ridged(matrix: jax.Array) -> jax.Array:
  return matrix + _RIDGE * jnp.diag(jnp.diagonal(matrix))


def _relative_step(
  matrix: jax.Array,
  y: jax.Array,
  terms: jax.Array,
  right: jax.Array,
  alpha: jax.Array,
) -> jax.Array:
  """Solves `(Y C Y + diag(terms) / alpha) step = right`."""
  system = y[:, None] * matrix * y[None, :] + jnp.diag(terms / alpha)
  # A diagonal of ones.
  even = 1 / jnp.sqrt(jnp.diagonal(system))
  system = system * even[:, None] * even[None, :]
  return even * jnp.linalg.solve(system, even * right)


def _newton(matrix: jax.Array, start: jax.Array, alpha: jax.Array) -> jax.Array:
  """`y > 0` with `(C y)_i = start_i (y_i / start_i)^(-1 / alpha)`.

  Newton's method on the convex potential of which that is the gradient. What a
  step takes from a number is bounded for each by itself, since one that has to
  fall by decades would hold up all others. If that goes round in circles, the
  step is damped as a whole, so that the potential falls.
  """
  dtype = matrix.dtype
  in_pairs = pairs.from_array(matrix)
  smallest = 64 * jnp.finfo(dtype).eps * jnp.maximum(1, alpha)
  smallest = jnp.maximum(smallest, 1e-11)
  # Keeps the curvature within a factor of 2.
  most = 0.5 / (1 + 1 / alpha)

  def step(old: _Newton) -> _Newton:
    y = pairs.to_array(old.y, dtype)
    row = (old.y[0][None], old.y[1][None])
    slopes = pairs.to_array(pairs.total(pairs.mul(in_pairs, row)), dtype)
    gains = start * (y / start) ** (-1 / alpha)
    right = y * (gains - slopes)
    change = _relative_step(matrix, y, y * gains, right, alpha)
    largest = jnp.max(y)
    # No number is to vanish, or the system would be singular.
    is_nothing = (y <= _NOTHING * largest) & (change < 0)
    change = jnp.where(is_nothing, 0, change)
    size = jnp.abs(change) * jnp.minimum(1, y / (_LITTLE * largest))
    damping = most / jnp.maximum(jnp.max(-change), most)
    damping = jnp.where(old.steps < _FREE_STEPS, 1, damping)
    change = jnp.maximum(damping * change, _LEAST_LEFT - 1)
    factor = pairs.from_array(change)
    steps = old.steps + 1
    return _Newton(
      y=pairs.add(old.y, pairs.mul(old.y, factor)),
      steps=steps,
      done=~(jnp.max(size) > smallest) | (steps >= _MOST_STEPS),
    )

  found = jax.lax.while_loop(
    lambda s: ~s.done,
    step,
    _Newton(
      y=pairs.from_array(start),
      steps=jnp.zeros((), jnp.int32),
      done=jnp.zeros((), bool),
    ),
  )
  return pairs.to_array(found.y, dtype)
