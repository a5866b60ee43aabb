"""What weightings with a state share: how it stays, and their arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mopt.checks import is_finite
from mopt.checks import known_numbers

PyTree = Any


def keep_unless(
  is_good: jax.Array, weights: jax.Array, new: PyTree, old: PyTree
) -> tuple[jax.Array, PyTree]:
  """Weights and the new state; NaN and the old one where something is wrong.

  So a step that is not finite leaves no trace: once it is skipped, the next one
  goes on from what was before it.
  """
  is_good = is_good & jnp.isfinite(weights).all()
  state = jax.tree.map(lambda x, y: jnp.where(is_good, x, y), new, old)
  return jnp.where(is_good, weights, jnp.nan), state


def all_finite(*arrays: jax.Array) -> jax.Array:
  """Whether every entry of every array is finite, one boolean."""
  return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def check_number(
  name: str,
  value: jax.typing.ArrayLike,
  accepts: Callable[[np.ndarray], Any],
  expected: str,
) -> None:
  """Raises unless this is one finite number that is accepted, if it is known.

  Raises:
    ValueError: says that `name` must be `expected`.
  """
  known = known_numbers(name, value)
  if np.shape(value) != ():
    raise ValueError(f'{name} must be one number, got shape {np.shape(value)}.')
  if known is not None and not (is_finite(known) and accepts(known)):
    raise ValueError(f'{name} must be {expected}, got {value}.')


def check_finite(name: str, value: jax.typing.ArrayLike) -> None:
  """Raises unless this is one finite number, or a vector of them."""
  known = known_numbers(name, value)
  if known is not None and not is_finite(known).all():
    raise ValueError(f'{name} must be finite, got {known.tolist()}.')
  if np.ndim(value) > 1:
    shape = np.shape(value)
    raise ValueError(f'{name} must be a number or [m], got shape {shape}.')


def for_each(name: str, value: jax.typing.ArrayLike, m: int) -> jax.Array:
  """A number or a vector `[m]`, as a vector `[m]` of float32 or float64.

  Raises:
    ValueError: for a vector of another length.
  """
  array = jnp.asarray(value)
  array = array.astype(jnp.promote_types(array.dtype, jnp.float32))
  if array.shape not in ((), (m,)):
    raise ValueError(
      f'{name} must be [{m}] for {m} objectives, got shape {array.shape}.'
    )
  return jnp.broadcast_to(array, (m,))


def check_preferences(preferences: Any) -> None:
  """Raises unless this is `None` or `[m]`, non-negative, one of them positive.

  Preferences that are traced are taken as they are.
  """
  if preferences is None:
    return
  known = known_numbers('preferences', preferences)
  if known is not None and not (is_finite(known) & (known >= 0)).all():
    raise ValueError(
      f'preferences must be finite and non-negative, got {known.tolist()}.'
    )
  shape = np.shape(preferences)
  if len(shape) != 1 or shape[0] < 2:
    raise ValueError(f'preferences must be [m] with m >= 2, got shape {shape}.')
  if known is not None and not known.any():
    raise ValueError(f'preferences must not all be 0, got {known.tolist()}.')


def on_simplex(preferences: Any, m: int) -> jax.Array:
  """Preferences `[m]` that sum to 1; 1 / m each for `None`."""
  if preferences is None:
    return jnp.full(m, 1 / m, jnp.float32)
  array = for_each('preferences', preferences, m)
  # The largest first, for a sum of large ones may not be finite.
  array = array / jnp.max(array)
  return array / jnp.sum(array)
