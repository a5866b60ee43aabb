"""Weights that do not depend on the gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from mopt.checks import check_gramian
from mopt.checks import INJECTED
from mopt.checks import is_finite
from mopt.checks import known_numbers
from mopt.weightings.weighting import Function
from mopt.weightings.weighting import Key
from mopt.weightings.weighting import Weighting


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


def random(key: jax.Array) -> Weighting:
  """Weights drawn anew at each step: the softmax of m normal numbers.

  When to take it: as a baseline that a weighting has to beat, beside `mean`.
  It descends for all objectives no more often than chance has it, and for their
  mean on average. It depends neither on scales nor on the order. It costs m
  random numbers.

  The Gramian is not looked at, be it finite or not: gradients that are not make
  the update NaN themselves. Derivatives are 0.

  Args:
    key: random key, such as `jax.random.key(0)`. A copy that changes at each
      step is kept in the state.

  Returns:
    A `mopt.Weighting`, of positive weights `[m]` f32, f64 if the Gramian is,
    with sum 1. Its state is the data of a key. Its update raises a ValueError
    for a Gramian that is not square or has m < 2.

  Raises:
    ValueError: for what is not a key.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.random(jax.random.key(0))
    >>> weights, state = weighting.update(jnp.eye(3), weighting.init(3))
    >>> print(f'{weights.sum():.6f}')
    1.000000

  References:
    Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_, 2022: RGW.
  """
  start = Key.of(key)

  def update(gramian, state, **extra):
    gramian = check_gramian(gramian)
    state, now = start.split(state)
    numbers = jax.random.normal(now, gramian.shape[:1], gramian.dtype)
    return jax.nn.softmax(numbers), state

  return Weighting(init=lambda m: start.data, update=update)


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
