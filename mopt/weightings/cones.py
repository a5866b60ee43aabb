"""The mean, freed of what is against an objective: projections onto a cone."""

import functools

import jax
import jax.numpy as jnp

from mopt import pairs
from mopt import quadratic_program
from mopt.checks import check_gramian
from mopt.weightings.fixed import mean


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
  weights that are all NaN. It can be differentiated in both modes; of more than
  two by the equations that hold at the solution, which weights are more than
  1 / m being held fixed.

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


@jax.custom_jvp
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


@_project.defjvp
def _project_jvp(primals, tangents):
  """By the equations of the solution: no slope where weights are added to."""
  (gramian, start), (change, change_of_start) = primals, tangents
  weights = _project(gramian, start)
  unit, _ = quadratic_program.unit_scales(gramian)
  is_free = weights > start
  both = is_free[:, None] & is_free[None, :]
  scaled = gramian * unit[:, None] * unit[None, :]
  system = jnp.where(both, scaled, jnp.eye(len(unit), dtype=gramian.dtype))
  held = jnp.where(is_free, 0, change_of_start)
  times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  slopes = times(change, weights) + times(gramian, held)
  pull = jnp.where(is_free, unit * slopes, 0)
  return weights, held - unit * jnp.linalg.solve(system, pull)
