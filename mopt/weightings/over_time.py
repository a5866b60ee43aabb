"""Other weightings, steadied or made cheaper over the steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mopt.checks import check_gramian
from mopt.checks import check_integer
from mopt.weightings import states
from mopt.weightings.weighting import as_weighting
from mopt.weightings.weighting import as_weights
from mopt.weightings.weighting import Function
from mopt.weightings.weighting import Weighting


class SmoothedState(NamedTuple):
  """State of `smoothed`."""

  average: jax.Array  # shape=(m,), dtype=jnp.float32: the last weights.
  weighting_state: Any  # Of the weighting that is smoothed.


class EveryState(NamedTuple):
  """State of `every`."""

  last: jax.Array  # shape=(m,), dtype=jnp.float32: the last new weights.
  age: jax.Array  # shape=(), dtype=jnp.int32: steps taken with them, mod n.
  weighting_state: Any  # Of the weighting that is asked every n steps.


def smoothed(
  weighting: Weighting | Function, decay: jax.typing.ArrayLike = 0.9
) -> Weighting:
  r"""A moving average of the weights (CR-MOGM).

  .. math:: \lambda_k = d \lambda_{k-1} + (1 - d) \hat\lambda_k, \quad
    \lambda_0 = (1/m, \dots, 1/m)

  When to take it: where batches are small and weights jump. It costs nothing
  beside the weighting itself. Of what that promises little is left: the average
  may be against an objective that today's weights are not against. It does not
  depend on scale or order if the weighting does not.

  If today's weights are not finite, those that are returned are NaN, and the
  average stays as it was.

  Args:
    weighting: a function from the Gramian `[m, m]` to weights `[m]`, or a
      `mopt.Weighting`, which gets `values` and all other extra arguments.
    decay: d, at least 0 and less than 1. The paper has it grow towards 1 as the
      learning rate falls.

  Returns:
    A weighting with a state, of weights `[m]` f32.

  Raises:
    ValueError: for another decay, or what is not a weighting.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.smoothed(mopt.min_norm_weights, decay=0.5)
    >>> gramian = jnp.diag(jnp.array([3., 1.]))  # by itself: 0.25 and 0.75
    >>> weights, state = weighting.update(gramian, weighting.init(2))
    >>> print(weights)
    [0.375 0.625]

  References:
    Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient
    Manipulation and Beyond <https://openreview.net/forum?id=ScwfQ7hdwyP>`_,
    2022, Algorithm 1.
  """
  weighting = as_weighting(weighting)
  states.check_number(
    'decay', decay, lambda x: 0 <= x < 1, 'at least 0 and less than 1'
  )

  def init(m):
    return SmoothedState(jnp.full(m, 1 / m, jnp.float32), weighting.init(m))

  def update(gramian, state, **extra):
    found, inner_state = weighting.update(
      gramian, state.weighting_state, **extra
    )
    found = as_weights(found, len(state.average)).astype(jnp.float32)
    rate = jnp.asarray(decay, jnp.float32)
    average = rate * state.average + (1 - rate) * found
    weights, average = states.keep_unless(
      states.all_finite(found), average, average, state.average
    )
    return weights, SmoothedState(average, inner_state)

  return Weighting(init, update)


def every(weighting: Weighting | Function, n: int) -> Weighting:
  """New weights each n steps, and the same ones in between (PSMGD).

  When to take it: where solving for weights takes a good part of a step, with
  many objectives and a small network. In between a weighting is not run, but
  under `vmap`, where a branch becomes a choice of two results, it is. Gradients
  of all objectives are taken at every step. Weights that are n steps old may be
  against an objective. It does not depend on scale or order if the weighting
  does not.

  New weights that are not finite are returned, but not kept: the next step asks
  anew. In between the Gramian is not looked at.

  Args:
    weighting: a function from the Gramian `[m, m]` to weights `[m]`, or a
      `mopt.Weighting`, which gets `values` and all other extra arguments, of
      each n-th step alone.
    n: an integer >= 1. The first step is one with new weights.

  Returns:
    A weighting with a state, of weights `[m]` f32.

  Raises:
    ValueError: for another n, or what is not a weighting.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.every(mopt.min_norm_weights, 2)
    >>> state = weighting.init(2)
    >>> for square in (1., 3., 3.):
    ...   gramian = jnp.diag(jnp.array([square, 1.]))
    ...   weights, state = weighting.update(gramian, state)
    ...   print(weights)
    [0.5 0.5]
    [0.5 0.5]
    [0.25 0.75]

  References:
    Xu et al., `PSMGD: Periodic Stochastic Multi-Gradient Descent for Fast
    Multi-Objective Optimization <https://arxiv.org/abs/2412.10961>`_, 2024.
  """
  weighting = as_weighting(weighting)
  n = check_integer('n', n, 1)

  def init(m):
    return EveryState(
      jnp.zeros(m, jnp.float32), jnp.zeros((), jnp.int32), weighting.init(m)
    )

  def update(gramian, state, **extra):
    gramian = check_gramian(gramian)

    def ask():
      found, inner_state = weighting.update(
        gramian, state.weighting_state, **extra
      )
      return as_weights(found, len(gramian)).astype(jnp.float32), inner_state

    weights, inner_state = jax.lax.cond(
      state.age == 0, ask, lambda: (state.last, state.weighting_state)
    )
    weights, (last, age) = states.keep_unless(
      states.all_finite(weights),
      weights,
      (weights, (state.age + 1) % n),
      (state.last, state.age),
    )
    return weights, EveryState(last, age, inner_state)

  return Weighting(init, update)
