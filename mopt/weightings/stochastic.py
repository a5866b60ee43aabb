"""Weights that follow the min-norm ones over noisy batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mopt.checks import check_factor
from mopt.checks import check_gramian
from mopt.checks import check_integer
from mopt.weightings import states
from mopt.weightings.weighting import Weighting


class SimplexState(NamedTuple):
  """State of `modo` and `sdmgrad`."""

  point: jax.Array  # shape=(m,), dtype=jnp.float32: on the simplex.


def modo(
  step_size: jax.typing.ArrayLike, *, regularization: jax.typing.ArrayLike = 0.0
) -> Weighting:
  r"""One step a batch towards the min-norm weights (MoDo).

  .. math:: \lambda \leftarrow \Pi_\Delta (\lambda
    - \gamma (C \lambda + \rho \lambda)), \quad
    C_{ij} = \langle g_i(z_1), g_j(z_2) \rangle

  with the projection onto the simplex, from 1 / m each.

  When to take it: where batches are so small that the min-norm weights of one
  of them are mostly noise. It costs a product `[m, m] [m]` and a sort of m. It
  is against no objective only once the weights have come to rest. It does not
  depend on the order, but on the scale: `step_size` is in units of 1 / the
  squared length of gradients.

  The gradient of :math:`|\sum_j \lambda_j g_j|^2 / 2` is without bias if
  its two factors are of two batches: give `cross_gramian`. Without, C is the
  Gramian of the one batch there is. That is on average too large by the
  covariance of the gradients, its diagonal by their variance: objectives whose
  gradients are noisy get too little weight, the more so the smaller the batch.

  A Gramian that is not finite gives weights that are NaN, and the state stays.

  Args:
    step_size: the paper's gamma, positive. 0.1 is usual for gradients of length
      1 or so; beyond 2 / the largest eigenvalue of C it does not settle.
    regularization: rho, at least 0. It draws towards equal weights.

  Returns:
    A weighting with a state, of weights `[m]` f32 on the simplex. Its `update`
    takes `cross_gramian`, `[m, m]`: entry i, j is the inner product of gradient
    i on one batch and j on another one. Give it to the `update` of the
    optimizer, with gradients on a third batch, or of the mean of both.

  Raises:
    ValueError: for another step size or regularization; from `update` for a
      cross Gramian of another shape than the Gramian's.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.modo(0.1)
    >>> gramian = jnp.diag(jnp.array([3., 1.]))
    >>> weights, state = weighting.update(gramian, weighting.init(2))
    >>> print(weights.round(2))  # the min-norm ones are 0.25 and 0.75
    [0.45 0.55]

  References:
    Chen et al., `Three-Way Trade-Off in Multi-Objective Learning
    <https://arxiv.org/abs/2305.20057>`_, 2023, Algorithm 1.
  """
  check_factor('step_size', step_size, is_positive=True)
  check_factor('regularization', regularization)

  def update(gramian, state, *, cross_gramian=None, **extra):
    gramian, cross = _pair(gramian, cross_gramian)
    rate = jnp.asarray(step_size, jnp.float32)
    drawn = jnp.asarray(regularization, jnp.float32) * state.point
    point = _project(state.point - rate * (_times(cross, state.point) + drawn))
    return states.keep_unless(
      states.all_finite(gramian, cross), point, SimplexState(point), state
    )

  return Weighting(_init, update)


def sdmgrad(
  *,
  regularization: jax.typing.ArrayLike = 0.3,
  preferences: jax.typing.ArrayLike | None = None,
  step_size: jax.typing.ArrayLike = 1.0,
  num_steps: int = 20,
) -> Weighting:
  r"""A few steps a batch towards weights between a preference and min-norm.

  The direction is near to a preferred one, and for all objectives as far as
  that allows (SDMGrad): with preferences p on the simplex, equal ones unless
  others are given, `num_steps` times

  .. math:: w \leftarrow \Pi_\Delta (w - \beta C (w + \rho p)), \quad
    C_{ij} = \langle g_i(z_1), g_j(z_2) \rangle

  from where the last step has ended, and then the weights
  :math:`(w + \rho p) / (1 + \rho)`. They sum to 1, as in the authors' code; the
  paper does not divide.

  When to take it: in place of `modo`, where the mean, or another weighted sum,
  is what you want in the first place. It costs `num_steps` products
  `[m, m] [m]` and sorts of m. Against no objective it is only in the limit. It
  does not depend on the order, nor on the scale of all gradients together; long
  ones count for more.

  Without `cross_gramian` it is biased as `modo` is: C is the Gramian of one
  batch, which underweighs objectives with noisy gradients.

  A Gramian that is not finite gives weights that are NaN, and the state stays.

  Args:
    regularization: rho, the paper's lambda, at least 0: 0 is min-norm, a large
      one is the preference.
    preferences: `[m]`, m >= 2, non-negative; they are divided by their sum.
      `None` for equal ones.
    step_size: positive; beta is this divided by the trace of the Gramian. Up to
      2 it settles.
    num_steps: an integer >= 1.

  Returns:
    A weighting with a state, of weights `[m]` f32 on the simplex. Its `update`
    takes `cross_gramian`, see `mopt.modo`.

  Raises:
    ValueError: for arguments other than those; from `update` for preferences or
      a cross Gramian of another m.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.sdmgrad()
    >>> gramian = jnp.diag(jnp.array([3., 1.]))
    >>> weights, state = weighting.update(gramian, weighting.init(2))
    >>> print([f'{w:.3f}' for w in weights])
    ['0.250', '0.750']

  References:
    Xiao et al., `Direction-oriented Multi-objective Learning: Simple and
    Provable Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, 2023,
    Algorithm 1.
  """
  check_factor('regularization', regularization)
  states.check_preferences(preferences)
  check_factor('step_size', step_size, is_positive=True)
  num_steps = check_integer('num_steps', num_steps, 1)

  def update(gramian, state, *, cross_gramian=None, **extra):
    gramian, cross = _pair(gramian, cross_gramian)
    trace = jnp.trace(gramian)
    cross = cross / jnp.where(trace > 0, trace, 1)
    rate = jnp.asarray(step_size, jnp.float32)
    weight = jnp.asarray(regularization, jnp.float32)
    preferred = states.on_simplex(preferences, len(gramian)).astype(jnp.float32)
    point = jax.lax.fori_loop(
      0,
      num_steps,
      lambda _, w: _project(w - rate * _times(cross, w + weight * preferred)),
      state.point,
    )
    # So that a preference that is large beside 1 does not overflow.
    share = weight / (1 + weight)
    return states.keep_unless(
      states.all_finite(gramian, cross, trace),
      (1 - share) * point + share * preferred,
      SimplexState(point),
      state,
    )

  return Weighting(_init, update)


def _init(m: int) -> SimplexState:
  return SimplexState(jnp.full(m, 1 / m, jnp.float32))


def _pair(gramian: Any, cross: Any) -> tuple[jax.Array, jax.Array]:
  """Both in float32; the cross Gramian is the Gramian if there is none."""
  gramian = check_gramian(gramian)
  found = gramian if cross is None else jnp.asarray(cross)
  if found.shape != gramian.shape:
    m = len(gramian)
    raise ValueError(
      f'cross_gramian must be [{m}, {m}], inner products of the gradients on '
      f'one batch and on another one, got shape {found.shape}.'
    )
  return gramian.astype(jnp.float32), found.astype(jnp.float32)


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  """A product of full precision on all platforms."""
  return jnp.sum(matrix * vector[None, :], axis=1)


def _project(vector: jax.Array) -> jax.Array:
  # It may return float64 for float32 where that is the default.
  return optax.projections.projection_simplex(vector).astype(vector.dtype)
