"""Weightings for gradients some of which cannot be trusted."""

import jax
import jax.numpy as jnp

from mopt import quadratic_program
from mopt.checks import check_gramian
from mopt.checks import check_integer
from mopt.weightings.weighting import Function


def krum(n_byzantine: int = 1, n_selected: int = 1) -> Function:
  """The mean of the gradients that are nearest to their neighbours.

  A gradient's score is the sum of its squared distances to the
  m - n_byzantine - 2 gradients that are nearest to it. The `n_selected` with
  the lowest scores share the weight, the others get none.

  When to take it: where the m gradients are of one objective, say from m
  workers, and up to `n_byzantine` of them may be anything: then, with m >= 2
  n_byzantine + 3, one that is selected is not far from the true gradient. It
  is not for objectives that differ, and promises none of them descent. One
  factor for all gradients changes nothing, nor does their order; of equal
  scores the first is taken. It costs a sort of `[m, m]` numbers.

  A gradient that is zero is one as any other. A Gramian that is not finite
  gives weights that are all NaN: nobody has scored what is not a number.
  Derivatives are 0.

  Args:
    n_byzantine: how many gradients may be wrong, >= 0.
    n_selected: how many are averaged, >= 1: Multi-Krum if there are several.

  Returns:
    A weighting: from a Gramian `[m, m]` to `[m]` f32, f64 if the Gramian is,
    1 / n_selected or 0 each. It raises a ValueError for a Gramian that is not
    square or has m < n_byzantine + 3 or m < n_selected.

  Raises:
    ValueError: for arguments that are not such integers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> gradients = jnp.array([[1., 0.], [1., 1.], [9., 9.], [0., 1.]])
    >>> print(mopt.krum(n_byzantine=1, n_selected=2)(gradients @ gradients.T))
    [0.5 0.5 0.  0. ]

  References:
    Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant
    Gradient Descent <https://papers.nips.cc/paper/6617>`_, 2017, section 4.
  """
  n_byzantine = check_integer('n_byzantine', n_byzantine, 0)
  n_selected = check_integer('n_selected', n_selected, 1)

  def weighting(gramian: jax.Array) -> jax.Array:
    gramian = check_gramian(gramian)
    m = len(gramian)
    if m < n_byzantine + 3:
      raise ValueError(
        f'krum needs m >= n_byzantine + 3 = {n_byzantine + 3} gradients, got '
        f'm = {m}.'
      )
    if m < n_selected:
      raise ValueError(
        f'krum needs m >= n_selected = {n_selected} gradients, got m = {m}.'
      )
    return _krum(gramian, n_byzantine, n_selected)

  return weighting


def _krum(gramian: jax.Array, n_byzantine: int, n_selected: int) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  m = len(gramian)
  # A power of two, so that nothing overflows and nothing is rounded.
  _, exponent = jnp.frexp(jnp.max(jnp.diagonal(gramian)))
  gramian = jnp.ldexp(gramian, -exponent)
  squares = jnp.diagonal(gramian)
  distances = squares[:, None] - 2 * gramian + squares[None, :]
  itself = jnp.eye(m, dtype=bool)
  distances = jnp.where(itself, jnp.inf, jnp.maximum(distances, 0))
  nearest = jnp.sort(distances, axis=1)[:, : m - n_byzantine - 2]
  rank = jnp.argsort(jnp.argsort(jnp.sum(nearest, axis=1)))
  weights = jnp.where(rank < n_selected, 1 / n_selected, 0)
  weights = weights.astype(gramian.dtype)
  return jnp.where(is_finite, weights, jnp.nan)
