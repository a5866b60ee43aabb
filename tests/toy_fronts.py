"""Problems of two objectives whose fronts are known, and descent on them."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mopt


class Front(NamedTuple):
  """Two objectives of a vector, of which the Pareto set is known.

  Attributes:
    values: from the vector to both objectives, `[2]`.
    start: a vector that is not in the Pareto set.
    place: from a vector to where on the Pareto set it is nearest to, -1 at the
      minimum of one objective and 1 at that of the other one.
    distance: from a vector to how far it is from the Pareto set.
  """

  values: Callable[[jax.Array], jax.Array]
  start: np.ndarray
  place: Callable[[np.ndarray], Any]
  distance: Callable[[np.ndarray], Any]


class Descent(NamedTuple):
  """Attributes: the last vector, and all values, weights and vectors."""

  end: np.ndarray  # [n]
  values: np.ndarray  # [steps, 2], before each step.
  weights: np.ndarray  # [steps, 2]
  points: np.ndarray  # [steps, n], before each step.


def _between(low: np.ndarray, high: np.ndarray) -> dict[str, Callable]:
  """Of a Pareto set that is the segment between two minima."""
  middle, half = (low + high) / 2, (high - low) / 2

  def place(x):
    return np.clip((x - middle) @ half / (half @ half), -1, 1)

  def distance(x):
    nearest = middle + place(x)[..., None] * half
    return np.linalg.norm(x - nearest, axis=-1)

  return {'place': place, 'distance': distance}


def fonseca(n: int = 3) -> Front:
  """The front of Fonseca and Fleming, 1995: no part near its middle is convex.

  A weighted sum ends near one of its ends, whatever the weights.
  """
  ones = np.ones(n) / np.sqrt(n)

  def values(x):
    squares = jnp.stack([jnp.sum((x + ones) ** 2), jnp.sum((x - ones) ** 2)])
    return 1 - jnp.exp(-squares)

  start = np.linspace(0.6, -0.1, n)
  return Front(values, start, **_between(-ones, ones))


def quadratics(scales=(1.0, 1.0), floor=1.0) -> Front:
  """Two bowls `scale (floor + |x - wish|^2 / 2)`, with a floor above zero.

  With scales that differ a sum is the larger one. With a floor above a half the
  product of both is smallest in the middle.
  """
  wishes = np.array([[-1.0, 0.0], [1.0, 0.0]])

  def values(x):
    bowls = floor + 0.5 * jnp.sum((x[None] - wishes) ** 2, axis=1)
    return jnp.asarray(scales, x.dtype) * bowls

  return Front(values, np.array([0.4, 3.0]), **_between(*wishes))


def askew() -> Front:
  """Two bowls whose Pareto set is a curve, from (-1, -1) to (1, 1).

  The gradients have opposite signs everywhere between both minima, on the curve
  and off it. `place` and `distance` are not of use here.
  """

  def values(x):
    one = 0.5 * jnp.sum(jnp.array([1.0, 9.0]) * (x + 1) ** 2)
    return jnp.stack([one, 0.5 * jnp.sum((x - 1) ** 2)])

  return Front(values, np.array([-0.5, 0.5]), np.zeros_like, np.zeros_like)


def descend(
  front: Front,
  weighting: Any,
  learning_rate: optax.ScalarOrSchedule,
  num_steps: int,
  inner: optax.GradientTransformation | None = None,
  **arguments: Any,
) -> Descent:
  """Goes down with a weighting, its values given; `arguments` of aggregate."""
  tx = optax.chain(
    mopt.aggregate(weighting, inner, **arguments),
    optax.scale_by_learning_rate(learning_rate),
  )

  @jax.jit
  def run(x):
    def body(carry, _):
      x, state = carry
      values, grads = front.values(x), jax.jacrev(front.values)(x)
      updates, state = tx.update(grads, state, x, values=values)
      weights = optax.tree.get(state, 'AggregateState').weights
      return (optax.apply_updates(x, updates), state), (values, weights, x)

    (end, _), history = jax.lax.scan(body, (x, tx.init(x)), length=num_steps)
    return Descent(end, *history)

  found = run(jnp.asarray(front.start, jnp.float32))
  return Descent(*(np.asarray(x, np.float64) for x in found))


@functools.cache
def _gradients(values: Callable[[jax.Array], jax.Array]):
  return jax.jit(jax.jacrev(values))


def slope(front: Front, x: np.ndarray) -> float:
  """Length of the shortest convex combination of gradients; 0 if stationary."""
  one, two = np.asarray(_gradients(front.values)(jnp.float32(x)), np.float64)
  apart = (one - two) @ (one - two)
  share = np.clip((two - one) @ two / apart, 0, 1) if apart else 0.5
  return float(np.linalg.norm(share * one + (1 - share) * two))
