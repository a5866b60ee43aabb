"""Weights from the values of the objectives, learnt beside the network.

A few numbers are trained by an optimizer of their own, whose state is a part of
the weighting's. What is said in `mopt.weightings.by_loss` holds here too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mopt.checks import check_factor
from mopt.checks import check_gramian
from mopt.weightings import states
from mopt.weightings.weighting import check_values
from mopt.weightings.weighting import Weighting

# The rate that FAMO and GradNorm have in their papers.
_RATE = 0.025

# Logarithms stay within this, so that powers and their sums are finite.
_LARGEST_LOG = 60.0


class LearntState(NamedTuple):
  """State of `uncertainty` and `imtl_l`."""

  logs: jax.Array  # shape=(m,), dtype=jnp.float32: what is learnt.
  optimizer_state: optax.OptState


class FamoState(NamedTuple):
  """State of `famo`."""

  logits: jax.Array  # shape=(m,), dtype=jnp.float32
  log_values: jax.Array  # shape=(m,), dtype=jnp.float32: of the last step.
  is_new: jax.Array  # shape=(), dtype=jnp.bool_: there was no last step.
  optimizer_state: optax.OptState


class GradnormState(NamedTuple):
  """State of `gradnorm`."""

  scales: jax.Array  # shape=(m,), dtype=jnp.float32: the next weights.
  log_values: jax.Array  # shape=(m,), dtype=jnp.float32: of the first step.
  is_new: jax.Array  # shape=(), dtype=jnp.bool_: there was no first step.
  optimizer_state: optax.OptState


def uncertainty(
  optimizer: optax.GradientTransformation | None = None,
) -> Weighting:
  r"""Each loss divided by a variance that is learnt (uncertainty weighting).

  Beside the network, log-variances s are learnt that minimise

  .. math:: \sum_j \frac{1}{2} e^{-s_j} L_j + \frac{1}{2} s_j, \qquad
    \lambda_j = \frac{1}{2} e^{-s_j}

  from s = 0. A step has the weights that were learnt before it.

  When to take it: for losses of different units, such as several regressions.
  At rest it is :math:`\lambda_j = 1 / (2 L_j)`, whatever the scale of each
  objective; until then the scale counts. It does not depend on the order. It
  costs an optimizer's step of m numbers. It may be against an objective.

  A loss that stays 0 has its weight grow at each step, up to e^60. With
  negative losses there is nothing to find: for them, as for what is not
  finite, weights are NaN, and the state stays.

  Args:
    optimizer: any of Optax, for `[m]` parameters; `None` for
      `optax.adam(0.025)`.

  Returns:
    A weighting with a state, of weights `[m]` f32, positive. Its `update` needs
    `values` `[m]`, the losses.

  Raises:
    ValueError: for another optimizer; from `update` without `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> weighting = mopt.uncertainty(optax.sgd(1.0))
    >>> state, values = weighting.init(2), jnp.array([2., 0.5])
    >>> for _ in range(100):
    ...   weights, state = weighting.update(jnp.eye(2), state, values=values)
    >>> print(weights)
    [0.25 1.  ]

  References:
    Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for
    Scene Geometry and Semantics <https://arxiv.org/abs/1705.07115>`_, 2018,
    equation (7).
  """
  return _learnt(
    'uncertainty',
    optimizer,
    weights_of=lambda s: 0.5 * jnp.exp(-s),
    gradient=lambda s, values: 0.5 - 0.5 * jnp.exp(-s) * values,
  )


def imtl_l(
  optimizer: optax.GradientTransformation | None = None,
) -> Weighting:
  r"""Each loss times a scale that is learnt, so that all become 1 (IMTL-L).

  Beside the network, logarithms s of the scales are learnt that minimise

  .. math:: \sum_j e^{s_j} L_j - s_j, \qquad \lambda_j = e^{s_j}

  from s = 0. A step has the weights that were learnt before it.

  When to take it: as `uncertainty`, which minimises half of it, with -s for s.
  At rest it is :math:`\lambda_j = 1 / L_j`, whatever the scale of each
  objective. Cost, promises and losses that are 0 or negative: as there.

  Args:
    optimizer: any of Optax, for `[m]` parameters; `None` for
      `optax.adam(0.025)`.

  Returns:
    A weighting with a state, of weights `[m]` f32, positive. Its `update` needs
    `values` `[m]`, the losses.

  Raises:
    ValueError: for another optimizer; from `update` without `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> weighting = mopt.imtl_l(optax.sgd(0.5))
    >>> state, values = weighting.init(2), jnp.array([2., 0.5])
    >>> for _ in range(100):
    ...   weights, state = weighting.update(jnp.eye(2), state, values=values)
    >>> print(weights)
    [0.5 2. ]

  References:
    Liu et al., `Towards Impartial Multi-task Learning
    <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021, section 3.2.
  """
  return _learnt(
    'imtl_l',
    optimizer,
    weights_of=jnp.exp,
    gradient=lambda s, values: jnp.exp(s) * values - 1,
  )


def famo(
  optimizer: optax.GradientTransformation | None = None,
  *,
  minimum: jax.typing.ArrayLike = 0.0,
) -> Weighting:
  r"""Losses that all fall at the same rate, learnt from how they fell (FAMO).

  Weights are :math:`\lambda_j \propto z_j / (L_j - b_j)` of a sum of 1, with z
  the softmax of logits :math:`\xi`, 0 at first. Each step moves them by the
  gradient

  .. math:: (\mathrm{diag}(z) - z z^\top) \,
    \big( \log (L(t - 1) - b) - \log (L(t) - b) \big)

  so that what fell faster gets less.

  When to take it: for many objectives that are to improve by the same factor,
  at the cost of an optimizer's step of m numbers. The direction does not depend
  on the scale of each objective, nor on their order. It may be against one.

  The paper takes both losses on the same batch, with a second forward pass
  after the step. Here the second one is that of the next batch: the difference
  between batches is noise in what is learnt, of mean 0 but for small batches.

  A loss that is at the minimum counts as just above it, and gets all the
  weight, as it does in the limit: give a minimum that is not reached. For what
  is below it, or not finite, weights are NaN, and the state stays.

  Args:
    optimizer: any of Optax, for `[m]` parameters; `None` for that of the paper,
      `optax.chain(optax.add_decayed_weights(0.001), optax.adam(0.025))`.
    minimum: b, a number or `[m]`, below what losses can reach.

  Returns:
    A weighting with a state, of weights `[m]` f32 on the simplex. Its `update`
    needs `values` `[m]`, the losses.

  Raises:
    ValueError: for arguments other than those; from `update` without `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.famo()
    >>> state = weighting.init(2)
    >>> for values in ([4., 1.], [1., 1.]):
    ...   weights, state = weighting.update(
    ...     jnp.eye(2), state, values=jnp.array(values))
    ...   print(weights)
    [0.2 0.8]
    [0.4875027 0.5124973]

  References:
    Liu et al., `FAMO: Fast Adaptive Multitask Optimization
    <https://arxiv.org/abs/2306.03792>`_, 2023, Algorithm 1.
  """
  default = optax.chain(optax.add_decayed_weights(0.001), optax.adam(_RATE))
  optimizer = _check_optimizer(optimizer, default)
  states.check_finite('minimum', minimum)

  def init(m):
    zeros = jnp.zeros(m, jnp.float32)
    return FamoState(zeros, zeros, jnp.bool_(True), optimizer.init(zeros))

  def update(gramian, state, *, values=None, **extra):
    m = len(check_gramian(gramian))
    values = check_values('famo', values, m)
    above = values - states.for_each('minimum', minimum, m)
    is_good = states.all_finite(above) & (above >= 0).all()
    log_values = _log(above)
    shares = jax.nn.softmax(state.logits)
    progress = jnp.where(state.is_new, 0, state.log_values - log_values)
    gradient = shares * (progress - jnp.sum(shares * progress))
    logits, optimizer_state = _step(optimizer, gradient, state, state.logits)
    # The optimizer begins with the first difference.
    logits, optimizer_state = jax.tree.map(
      lambda old, new: jnp.where(state.is_new, old, new),
      (state.logits, state.optimizer_state),
      (logits, optimizer_state),
    )
    new = FamoState(logits, log_values, jnp.bool_(False), optimizer_state)
    weights = jax.nn.softmax(logits - log_values)
    return states.keep_unless(is_good, weights, new, state)

  return Weighting(init, update)


def gradnorm(
  alpha: jax.typing.ArrayLike = 1.5,
  optimizer: optax.GradientTransformation | None = None,
) -> Weighting:
  r"""Weighed gradients of lengths that even out the progress (GradNorm).

  With n the lengths of the gradients, that is roots of the Gramian's diagonal,
  and r the losses over those of the first step, divided by their mean, weights
  are learnt that minimise

  .. math:: \sum_j \Big| \lambda_j n_j
    - r_j^\alpha \, \frac{1}{m} \sum_i \lambda_i n_i \Big|

  where the second term counts as constant. They begin with 1 and, after each
  step, are divided by their mean. A step has the weights that were learnt
  before it.

  When to take it: for gradients of different lengths, where one objective
  drowns the others; a large alpha holds back those that improve fast. It costs
  an optimizer's step of m numbers beside the Gramian's diagonal, which the
  paper takes of the last shared layer: give `aggregate` a `mask`. Neither order
  nor, with alpha = 0 and at rest, scale matter. It may be against an objective.

  A weight does not fall below 1e-6. A loss that is 0 counts as the smallest
  float above it. For negative losses, and for what is not finite, in the
  Gramian too, weights are NaN, and the state stays.

  Args:
    alpha: at least 0. At 0 all weighed gradients become equally long.
    optimizer: any of Optax, for `[m]` parameters; `None` for
      `optax.adam(0.025)`.

  Returns:
    A weighting with a state, of weights `[m]` f32, positive, whose sum is m.
    Its `update` needs `values` `[m]`, the losses.

  Raises:
    ValueError: for arguments other than those; from `update` without `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.gradnorm(alpha=0.0)
    >>> state, values = weighting.init(2), jnp.ones(2)
    >>> gramian = jnp.diag(jnp.array([9., 1.]))
    >>> for _ in range(100):
    ...   weights, state = weighting.update(gramian, state, values=values)
    >>> print((weights * jnp.array([3., 1.])).round(1))
    [1.5 1.5]

  References:
    Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing
    in Deep Multitask Networks <https://arxiv.org/abs/1711.02257>`_, 2018,
    Algorithm 1.
  """
  check_factor('alpha', alpha)
  optimizer = _check_optimizer(optimizer, optax.adam(_RATE))

  def init(m):
    ones = jnp.ones(m, jnp.float32)
    return GradnormState(
      ones, jnp.zeros(m, jnp.float32), jnp.bool_(True), optimizer.init(ones)
    )

  def update(gramian, state, *, values=None, **extra):
    gramian = check_gramian(gramian)
    m = len(gramian)
    values = check_values('gradnorm', values, m)
    is_good = states.all_finite(gramian, values) & (values >= 0).all()
    log_values = _log(values)
    first = jnp.where(state.is_new, log_values, state.log_values)
    # The mean is in the softmax, so that it is not 0 if all losses are.
    rates = m * jax.nn.softmax(log_values - first)
    lengths = jnp.sqrt(jnp.diagonal(gramian)).astype(jnp.float32)
    weighed = state.scales * lengths
    targets = jnp.mean(weighed) * rates ** jnp.asarray(alpha, jnp.float32)
    gradient = lengths * jnp.sign(weighed - targets)
    scales, optimizer_state = _step(optimizer, gradient, state, state.scales)
    scales = jnp.maximum(scales, 1e-6)
    scales = scales / jnp.mean(scales)
    new = GradnormState(scales, first, jnp.bool_(False), optimizer_state)
    return states.keep_unless(is_good, state.scales, new, state)

  return Weighting(init, update)


def _learnt(
  name: str,
  optimizer: Any,
  weights_of: Callable[[jax.Array], jax.Array],
  gradient: Callable[[jax.Array, jax.Array], jax.Array],
) -> Weighting:
  """Weights of logarithms that are learnt from the values."""
  optimizer = _check_optimizer(optimizer, optax.adam(_RATE))

  def init(m):
    zeros = jnp.zeros(m, jnp.float32)
    return LearntState(zeros, optimizer.init(zeros))

  def update(gramian, state, *, values=None, **extra):
    values = check_values(name, values, len(check_gramian(gramian)))
    slope = gradient(state.logs, values.astype(jnp.float32))
    logs, optimizer_state = _step(optimizer, slope, state, state.logs)
    # A finite loss may be so large that its gradient is not.
    is_good = states.all_finite(values, slope) & (values >= 0).all()
    logs = jnp.clip(logs, -_LARGEST_LOG, _LARGEST_LOG)
    new = LearntState(logs, optimizer_state)
    return states.keep_unless(is_good, weights_of(state.logs), new, state)

  return Weighting(init, update)


def _check_optimizer(
  optimizer: Any, default: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The optimizer that is given, or the default one for `None`."""
  if optimizer is None:
    return default
  if not isinstance(optimizer, optax.GradientTransformation):
    raise ValueError(
      'optimizer must be an optax.GradientTransformation, such as '
      f'optax.adam(0.01), got {optimizer!r}.'
    )
  return optimizer


def _step(
  optimizer: optax.GradientTransformation,
  gradient: jax.Array,
  state: Any,
  params: jax.Array,
) -> tuple[Any, optax.OptState]:
  """The parameters and the optimizer's state after a step."""
  updates, optimizer_state = optimizer.update(
    gradient, state.optimizer_state, params
  )
  return optax.apply_updates(params, updates), optimizer_state


def _log(values: jax.Array) -> jax.Array:
  """In float32; of 0 that of the smallest float above it."""
  # A float64 may be smaller, and its logarithm is in range all the same.
  tiny = jnp.finfo(jnp.float32).tiny
  return jnp.log(jnp.maximum(values, tiny)).astype(jnp.float32)
