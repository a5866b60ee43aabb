"""Checks of arguments that all of the library shares."""

import contextlib
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Of a weighting that is called with a number.
INJECTED = (
  ' Optax takes a weighting for a schedule under optax.inject_hyperparams: add '
  "'weighting' to static_args."
)


def check_integer(name: str, value: Any, least: int) -> int:
  """An integer >= `least`, as one of Python.

  Integers of NumPy and JAX are integers, and so are arrays of one without axes.
  A boolean is none, though Python has it otherwise, and no float is.

  Raises:
    ValueError: for anything else, or a value that is traced.
  """
  if isinstance(value, jax.core.Tracer):
    raise ValueError(
      f'{name} must be known when this is called, got the traced {value}. '
      f'Under optax.inject_hyperparams add {name!r} to static_args.'
    )
  number = None
  dtype = getattr(value, 'dtype', None)
  is_bool = isinstance(value, bool) or dtype == np.dtype(np.bool_)
  if not is_bool and getattr(value, 'shape', ()) == ():
    with contextlib.suppress(TypeError):
      number = operator.index(value)
  if number is None or number < least:
    raise ValueError(f'{name} must be an integer >= {least}, got {value!r}.')
  return number


def check_gramian(gramian: jax.typing.ArrayLike) -> jax.Array:
  """A Gramian `[m, m]` with m >= 2, in float32 or float64.

  Raises:
    ValueError: for another shape.
  """
  gramian = jnp.asarray(gramian)
  gramian = gramian.astype(jnp.promote_types(gramian.dtype, jnp.float32))
  if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
    hint = '' if gramian.ndim else INJECTED
    raise ValueError(
      f'gramian must be [m, m], got shape {gramian.shape}.{hint}'
    )
  if gramian.shape[0] < 2:
    raise ValueError(
      f'gramian must have m >= 2 objectives, got m = {gramian.shape[0]}.'
    )
  return gramian


def known_numbers(name: str, value: Any) -> np.ndarray | None:
  """Real numbers as float64, `None` if they are traced.

  What is not traced can be looked at, within a traced function too.

  Raises:
    ValueError: for what is no real number, nor an array of them.
  """
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value)):
    return None
  try:
    # An integer of any size.
    array = np.asarray(float(value) if isinstance(value, int) else value)
    kinds = jnp.floating, jnp.integer, jnp.bool_
    if any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
      return array.astype(np.float64)
  except (TypeError, ValueError, OverflowError):
    pass  # as below
  raise ValueError(f'{name} must be a number, got {value!r}.')


def is_finite(known: np.ndarray) -> np.ndarray:
  """Whether what is known is finite in JAX, where floats have 32 bits too."""
  with np.errstate(over='ignore'):
    return np.isfinite(known.astype(jnp.result_type(float)))


def check_factor(
  name: str,
  factor: jax.typing.ArrayLike,
  dtype: jax.typing.DTypeLike = jnp.float32,
  is_positive: bool = False,
) -> jax.Array:
  """A scalar that is finite and not negative, as far as that is known.

  Raises:
    ValueError: for anything else, or 0 where it must be positive.
  """
  known = known_numbers(name, factor)
  if known is not None:
    is_right = is_finite(known) & (known > 0 if is_positive else known >= 0)
    if not is_right.all():
      sign = 'positive' if is_positive else 'non-negative'
      raise ValueError(f'{name} must be finite and {sign}, got {known}.')
  factor = jnp.asarray(factor, dtype)
  if factor.shape:
    raise ValueError(f'{name} must be a scalar, got shape {factor.shape}.')
  return factor
