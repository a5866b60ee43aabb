"""Weightings: from the Gramian of m gradients to the weights of their sum.

A weighting is any function `[m, m] -> [m]`. `mopt.min_norm_weights` is the one
that finds a common descent direction; the ones here do not look for it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

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
