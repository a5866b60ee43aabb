"""Weightings of gradients that are scaled before they are weighed."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from mopt.checks import check_gramian
from mopt.checks import is_finite
from mopt.checks import known_numbers
from mopt.weightings.weighting import as_weighting
from mopt.weightings.weighting import check_values
from mopt.weightings.weighting import Function
from mopt.weightings.weighting import Weighting


def preferred(
  weighting: Weighting | Function, preferences: jax.typing.ArrayLike
) -> Weighting:
  r"""A weighting to which some objectives matter more.

  The direction is the one that the weighting finds where each objective is
  :math:`p_j f_j`, told in terms of the raw gradients:

  .. math::

    \lambda_j = p_j \, w_j(P G P), \quad P = \mathrm{diag}(p)

  Preferences are divided by their mean first, so that only their ratios count
  and equal ones change nothing.

  When to take it: where the objectives are not of one rank. What a preference
  does depends on the weighting. Of `mean`, `upgrad` and `dual_proj` it is the
  share of a gradient in the mean that they start from: a large one gets its
  way. With `min_norm_weights` it is the other way round: there the
  :math:`p_j f_j` fall at one rate, so that an objective of a large preference
  falls by the less itself. The directions of `imtl_g` and `config` do not
  depend on scales and only get another length. What the weighting promises of
  descent stays promised: a positive factor changes no sign. It costs what the
  weighting does.

  Weights on the simplex are on it no more; what is on it are :math:`\lambda_j
  / p_j`. They are not scaled back, for the length of a direction is a part of
  what `upgrad` and `dual_proj` mean by it. A gradient that is zero, and what
  is not finite, does what it does to the weighting. Derivatives are those of
  the weighting.

  Args:
    weighting: a function from the Gramian to weights, or a `mopt.Weighting`.
    preferences: `[m]`, m >= 2, positive and finite. May be traced, so that a
      population can be mapped over them.

  Returns:
    A `mopt.Weighting` with the state of `weighting`. The values of the
    objectives are multiplied as their gradients are. Its update raises a
    ValueError for a Gramian that is not `[m, m]`.

  Raises:
    ValueError: for what is not a weighting, and for preferences that are not a
      vector, not positive or not finite (as far as they are known when this is
      called).

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.preferred(mopt.upgrad, (3.0, 1.0))
    >>> weights, _ = weighting.update(jnp.eye(2), weighting.init(2))
    >>> print(weights)
    [0.75 0.25]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, have a preference vector.
  """
  inner = as_weighting(weighting)
  known = known_numbers('preferences', preferences)
  if known is not None and not (is_finite(known) & (known > 0)).all():
    raise ValueError(
      f'preferences must be positive and finite, got {known.tolist()}.'
    )
  array = jnp.asarray(preferences)
  if array.ndim != 1 or len(array) < 2:
    raise ValueError(
      f'preferences must be [m] with m >= 2, got shape {array.shape}.'
    )
  array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
  # Divided by a power of two their sum is in range.
  _, exponent = jnp.frexp(jnp.max(array))
  shares = jnp.ldexp(array, -exponent)
  factors = shares / jnp.mean(shares)

  def update(gramian, state, *, values=None, **extra):
    gramian = check_gramian(gramian)
    if gramian.shape != 2 * factors.shape:
      raise ValueError(
        f'{len(factors)} preferences need a Gramian {2 * factors.shape}, got '
        f'shape {gramian.shape}.'
      )
    if values is not None:
      values = check_values('preferred', values, len(factors))
      values = values * factors.astype(values.dtype)
    by = factors.astype(gramian.dtype)
    scaled = gramian * by[:, None] * by[None, :]
    weights, state = inner.update(scaled, state, values=values, **extra)
    return weights * by.astype(weights.dtype), state

  return Weighting(inner.init, update)


def normalized(
  weighting: Weighting | Function, by: Literal['none', 'l2', 'loss']
) -> Weighting:
  r"""A weighting of gradients that are divided by their norms or losses first.

  .. math::

    \lambda_j = w_j(N^{-1} G N^{-1}) / n_j, \quad N = \mathrm{diag}(n)

  with n the norms of the gradients (`'l2'`), the values of the objectives
  (`'loss'`), or 1 (`'none'`).

  When to take it: where the scales of the objectives mean nothing, and the
  weighting looks at them: `min_norm_weights` prefers the shortest gradient,
  the mean and `upgrad` the longest. With `'l2'` the direction depends on
  angles alone, so that steps do not get shorter where the gradients do: it
  wants a falling learning rate. With `'loss'` it is that of the logarithms of
  the objectives. What the weighting promises of descent stays promised: a
  positive factor changes no sign. It costs what the weighting does.

  A gradient that is zero, and a loss that is, stays as it is. A loss that is
  negative, or not finite, gives weights that are all NaN. Derivatives are those
  of the arithmetic and of the weighting.

  The code of Sener and Koltun has this option, but weighs the raw gradients by
  what it has found for the normalised ones: their :math:`\lambda_j` is
  :math:`w_j`, which need not be a common descent direction.

  Args:
    weighting: a function from the Gramian to weights, or a `mopt.Weighting`.
    by: `'none'`, `'l2'` or `'loss'`.

  Returns:
    A `mopt.Weighting` with the state of `weighting`; the values of the
    objectives reach it as they are. With `'loss'` its update raises a
    ValueError without `values` `[m]`.

  Raises:
    ValueError: for what is not a weighting, or another `by`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.normalized(mopt.min_norm_weights, 'l2')
    >>> gramian = jnp.array([[16., 0.], [0., 1.]])
    >>> weights, _ = weighting.update(gramian, weighting.init(2))
    >>> print(weights)
    [0.125 0.5  ]

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018: an option of their code.
  """
  inner = as_weighting(weighting)
  if by not in ('none', 'l2', 'loss'):
    raise ValueError(f"by must be 'none', 'l2' or 'loss', got {by!r}.")

  def update(gramian, state, *, values=None, **extra):
    gramian = check_gramian(gramian)
    lengths = _lengths(by, gramian, values)
    scaled = gramian / lengths[:, None] / lengths[None, :]
    weights, state = inner.update(scaled, state, values=values, **extra)
    return weights / lengths.astype(weights.dtype), state

  return Weighting(inner.init, update)


def _lengths(by: str, gramian: jax.Array, values: Any) -> jax.Array:
  """What gradients are divided by, `[m]`, in the dtype of the Gramian."""
  if by == 'none':
    return jnp.ones_like(gramian[0])
  if by == 'l2':
    squares = jnp.diagonal(gramian)
    return jnp.sqrt(jnp.where(squares > 0, squares, 1))
  losses = check_values("normalized(..., 'loss')", values, len(gramian))
  lengths = jnp.where(losses == 0, 1, losses).astype(gramian.dtype)
  is_right = jnp.all(jnp.isfinite(losses) & (losses >= 0))
  return jnp.where(is_right, lengths, jnp.nan)
