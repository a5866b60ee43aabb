"""Weights that do not depend on the gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from mopt.checks import check_gramian
from mopt.checks import INJECTED
from mopt.checks import is_finite
from mopt.checks import known_numbers
from mopt.weightings.weighting import Function


def fixed_weights(weights: jax.typing.ArrayLike) -> Function:
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
