"""Weightings: from the Gramian of m gradients to the weights of their sum.

A weighting is any function `[m, m] -> [m]`. `mopt.min_norm_weights` is another
one, of its own file.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mopt import pairs
from mopt import quadratic_program
from mopt.checks import check_gramian
from mopt.checks import INJECTED
from mopt.checks import is_finite
from mopt.checks import known_numbers

# Gramian [m, m] -> weights [m].
Weighting = Callable[[jax.Array], jax.Array]


def fixed_weights(weights: jax.typing.ArrayLike) -> Weighting:
  """A weighted sum: the same weights at every step.

  `(1, l)` is the penalty form (2) of the paper, `(1 - l, l)` the convex form
  (7). Weights may be traced, so that a population can be mapped over them.

  Args:
    weights: `[m]`, m >= 2, non-negative and finite. They need not sum to 1.

  Returns:
    A weighting that ignores the Gramian.

  Raises:
    ValueError: for weights that are not a vector, negative or not finite (as
      far as they are known when this is called).

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> penalty = mopt.fixed_weights((1.0, 3e-4))
    >>> print(penalty(jnp.eye(2)))
    [1.e+00 3.e-04]

  References:
    Reiners et al., 2020, equations (2) and (7).
  """
  check_weights(weights)
  values = jnp.asarray(weights)
  values = values.astype(jnp.promote_types(values.dtype, jnp.float32))

  def weighting(gramian: jax.Array) -> jax.Array:
    shape = np.shape(gramian)
    if shape != 2 * values.shape:
      raise ValueError(
        f'{len(values)} weights need a Gramian {2 * values.shape}, got shape '
        f'{shape}.{"" if shape else INJECTED}'
      )
    return values

  return weighting


def mean(gramian: jax.Array) -> jax.Array:
  """The mean of the gradients, whatever they are.

  When to take it: as what the others are compared with. It descends for an
  objective only if no other pulls harder the other way. It costs nothing.

  Args:
    gramian: `[m, m]`, m >= 2, see `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is: 1 / m each.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.mean(jnp.eye(4)))
    [0.25 0.25 0.25 0.25]
  """
  gramian = check_gramian(gramian)
  return jnp.full_like(gramian[0], 1 / len(gramian))


def dual_proj(gramian: jax.Array) -> jax.Array:
  """The direction nearest to the mean that descends for all objectives.

  The mean of the gradients is projected onto the dual cone: what has no
  negative inner product with any gradient. Where nothing conflicts it is the
  mean.

  When to take it: where the mean is what you want, and no objective is to get
  worse for it. Long gradients count for more, as in the mean. It does not
  depend on the order of the objectives. Two have a closed form; of more each
  costs about what `mopt.min_norm_weights` does.

  Solved by the active-set method of `mopt.min_norm_weights`, in pairs of
  floats: exact for norms that lie decades apart. A gradient that is zero keeps
  its weight 1 / m, which changes nothing. A Gramian that is not finite gives
  weights that are all NaN. Forward-mode derivatives and, of two objectives,
  reverse-mode ones are those of the solver's arithmetic.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite, see
      `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is; at least 1 / m each.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.dual_proj(jnp.eye(2)))
    [0.5 0.5]
    >>> print(mopt.dual_proj(jnp.array([[1., -2.], [-2., 8.]])))
    [1.  0.5]

  References:
    Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
    <https://arxiv.org/abs/1706.08840>`_, 2017, equation (11), of the mean as
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, have it.
  """
  return _dual_proj(check_gramian(gramian))


def upgrad(gramian: jax.Array) -> jax.Array:
  """Each gradient, freed of what conflicts with others, and the mean of those.

  Every gradient is projected onto the dual cone, what has no negative inner
  product with any gradient, by itself. So the sum descends for all objectives
  and, unlike that of `dual_proj`, grows in proportion to each gradient's own
  scale. Where nothing conflicts it is the mean.

  When to take it: as the first choice for several tasks that conflict. It does
  not depend on the order of the objectives. Two have a closed form; of more it
  costs m times what `dual_proj` does, side by side.

  How it is solved and what it does with zeros and with what is not finite is
  said at `dual_proj`.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite, see
      `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is; at least 1 / m each.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.upgrad(jnp.eye(2)))
    [0.5 0.5]
    >>> print(mopt.upgrad(jnp.array([[1., -2.], [-2., 8.]])))
    [1.5   0.625]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024.
  """
  return _upgrad(check_gramian(gramian))


# Or a call outside of jit would compile its loop anew.
@jax.jit
def _dual_proj(gramian: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  if len(gramian) == 2:
    cross, squares = gramian[0, 1], jnp.diagonal(gramian)
    # At most one of them is beyond a half: the mean cannot be against both.
    weights = jnp.maximum(0.5, 0.5 * _share(-cross, squares))
  else:
    weights = _project(gramian, mean(gramian))
  return jnp.where(is_finite, weights, jnp.nan)


@jax.jit
def _upgrad(gramian: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  if len(gramian) == 2:
    cross, squares = gramian[0, 1], jnp.diagonal(gramian)
    # What the projection of the other one takes of it.
    weights = 0.5 + 0.5 * jnp.maximum(0, _share(-cross, squares))
  else:
    each = jnp.eye(len(gramian), dtype=gramian.dtype) / len(gramian)
    weights = jax.vmap(_project, in_axes=(None, 0))(gramian, each).sum(axis=0)
  return jnp.where(is_finite, weights, jnp.nan)


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
  """`part / whole`, 0 where that is 0 / 0."""
  return jnp.where(whole > 0, part, 0) / jnp.where(whole > 0, whole, 1)


def _project(gramian: jax.Array, start: jax.Array) -> jax.Array:
  """Weights of the projection of `start` weights onto the dual cone.

  That is the smallest `v' G v` with `v >= start`. With `v = start + unit y`,
  the scales `unit` making the diagonal of C about 1, it is the program
  `min y' C y / 2 + q' y, y >= 0` of `q = C (start / unit)`.
  """
  unit, _ = quadratic_program.unit_scales(gramian)
  scaled = gramian * unit[:, None] * unit[None, :]
  inverse = start / unit
  # A power of two, so that nothing is rounded: the largest is about 1.
  _, exponent = jnp.frexp(jnp.max(inverse))
  matrix = pairs.from_array(scaled)
  inverse = pairs.from_array(jnp.ldexp(inverse, -exponent))
  row = (inverse[0][None], inverse[1][None])
  found = quadratic_program.solve(
    quadratic_program.Program(
      matrix=matrix,
      linear=pairs.total(pairs.mul(matrix, row)),
      size=jnp.sum(jnp.abs(matrix[0]) * jnp.abs(row[0]), axis=1),
    ),
    limit=jnp.inf,
  )
  added = pairs.to_array(found, gramian.dtype)
  # First the scales, whose product with what is added is in range.
  return start + jnp.ldexp(unit, exponent) * added


def check_weights(weights: jax.typing.ArrayLike) -> None:
  """Raises unless weights are `[m]`, m >= 2, non-negative and finite."""
  known = known_numbers('weights', weights)
  if known is not None and not (is_finite(known) & (known >= 0)).all():
    raise ValueError(
      f'weights must be finite and non-negative, got {known.tolist()}.'
    )
  shape = jnp.asarray(weights).shape
  if len(shape) != 1 or shape[0] < 2:
    raise ValueError(f'weights must be [m] with m >= 2, got shape {shape}.')
