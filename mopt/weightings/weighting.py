"""What a weighting is: from the Gramian of m gradients to their weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any

# Gramian [m, m] -> weights [m].
Function = Callable[[jax.Array], jax.Array]


class Weighting(NamedTuple):
  """A weighting with a state, as Optax has its transformations.

  Plain functions from the Gramian `[m, m]` to weights `[m]` are weightings,
  too. This is for those that remember something: earlier weights, losses, a
  random key. `mopt.aggregate` takes both kinds and keeps the state in its own.

  Attributes:
    init: from the number of objectives m to the state, a pytree of arrays.
    update: called as `update(gramian, state, *, values=None, **extra)`, it
      returns weights `[m]` and the new state, of the same shapes and dtypes.
      `values` are the losses `[m]`, and `extra` what else was given to the
      `update` of the optimizer; it ignores what it does not know.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> def update(gramian, state, *, values=None, **extra):
    ...   weights = (mopt.upgrad(gramian) + state) / 2
    ...   return weights, weights
    >>> averaged = mopt.Weighting(init=jnp.zeros, update=update)
    >>> weights, state = averaged.update(jnp.eye(2), averaged.init(2))
    >>> print(weights)
    [0.25 0.25]
  """

  init: Callable[[int], PyTree]
  update: Callable[..., tuple[jax.Array, PyTree]]


def as_weighting(weighting: Weighting | Function) -> Weighting:
  """A weighting with a state, be it an empty one.

  Args:
    weighting: a `mopt.Weighting`, returned as it is, or a function from the
      Gramian `[m, m]` to weights `[m]`.

  Raises:
    ValueError: for what is neither.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.as_weighting(mopt.mean)
    >>> print(weighting.update(jnp.eye(2), weighting.init(2)))
    (Array([0.5, 0.5], dtype=float32), ())
  """
  if isinstance(weighting, Weighting):
    return weighting
  if not callable(weighting):
    raise ValueError(
      'weighting must be a function from the Gramian to weights, such as '
      'mopt.min_norm_weights or mopt.fixed_weights((1, 3e-4)), or a '
      f'mopt.Weighting, got {weighting!r}. Under optax.inject_hyperparams add '
      "'weighting' to static_args."
    )
  return Weighting(
    init=lambda m: (),
    update=lambda gramian, state, **extra: (weighting(gramian), state),
  )


def as_weights(weights: Any, m: int) -> jax.Array:
  """What a weighting has returned, as an array `[m]` of floats.

  Raises:
    ValueError: for what is not numbers, or of another shape.
  """
  try:
    array = jnp.asarray(weights)
  except (TypeError, ValueError):
    array = None
  if array is None or array.shape != (m,):
    found = repr(weights) if array is None else f'shape {array.shape}'
    raise ValueError(f'weighting must return [{m}] weights, got {found}.')
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def check_values(name: str, values: Any, m: int) -> jax.Array:
  """The losses `[m]` that a weighting asks for, in float32 or float64.

  Raises:
    ValueError: if there are none, or of another shape.
  """
  how = f'call update(grads, state, params, values=values) with [{m}] losses'
  if values is None:
    raise ValueError(f'{name} needs the values of the objectives: {how}.')
  values = jnp.asarray(values)
  if values.shape != (m,):
    raise ValueError(f'values must be [{m}], got shape {values.shape}: {how}.')
  return values.astype(jnp.promote_types(values.dtype, jnp.float32))


class Key(NamedTuple):
  """A random key as an array of integers, which every checkpoint can hold."""

  data: jax.Array
  impl: Any  # How the key makes numbers; not a part of any state.

  @classmethod
  def of(cls, key: Any) -> 'Key':
    """Of what `jax.random.key` or `jax.random.PRNGKey` gives.

    Raises:
      ValueError: for anything else.
    """
    try:
      found = cls(jax.random.key_data(key), jax.random.key_impl(key))
      shape = jax.random.wrap_key_data(found.data, impl=found.impl).shape
    except (TypeError, ValueError):
      found, shape = None, None
    if found is None or shape != ():
      raise ValueError(
        f'key must be one random key, such as jax.random.key(0), got {key!r}.'
      )
    return found

  def split(self, data: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The data of the key to go on with, and a key to use now."""
    key, now = jax.random.split(jax.random.wrap_key_data(data, impl=self.impl))
    return jax.random.key_data(key), now
