"""The paper's multiobjective optimizers, as chains."""

import optax

from mopt.aggregate import aggregate
from mopt.min_norm import min_norm_weights
from mopt.weightings import Weighting


def smgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float | None = None,
  nesterov: bool = False,
  *,
  weighting: Weighting = min_norm_weights,
  num_objectives: int = 2,
) -> optax.GradientTransformationExtraArgs:
  r"""Stochastic multi-gradient descent (SMGD), also known as stochastic MGDA.

  The gradients are combined to a common descent direction first; the momentum
  acts on that. The learning rate is inside the momentum buffer,

  .. math::

    v_k = M v_{k-1} - t_k \sum_j \lambda_j g_j, \qquad w_{k+1} = w_k + v_k,

  as in equation (10), and unlike `optax.sgd`, where a change of rate acts on
  the whole buffer at once. With a constant rate the two agree.

  Args:
    learning_rate: a float, or a schedule of the number of updates.
    momentum: decay M of the buffer, in [0, 1); `None` for no buffer.
    nesterov: look ahead along the momentum.
    weighting: how the objectives are weighed, from the Gramian.
    num_objectives: m >= 2.

  Returns:
    A transformation of stacked gradients, see `mopt.aggregate`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> params = jnp.array([0.0])
    >>> grads = mopt.stack(jnp.array([2.0]), jnp.array([1.0]))
    >>> tx = mopt.smgd(learning_rate=0.5)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates, optax.tree.get(state, 'AggregateState').weights)
    [-0.5] [0. 1.]

  References:
    Reiners et al., 2020, Algorithm 2, equations (10) and (15).
    Liu and Vicente, `The stochastic multi-gradient algorithm for
    multi-objective optimization and its application to supervised machine
    learning <https://doi.org/10.1007/s10479-021-04033-z>`_, 2021.
  """
  _check_rate(learning_rate)
  _check_decay('momentum', 0.0 if momentum is None else momentum)
  return optax.chain(
    aggregate(weighting, num_objectives=num_objectives),
    optax.scale_by_learning_rate(learning_rate),
    optax.identity() if momentum is None else optax.trace(momentum, nesterov),
  )


def mrmsprop(
  learning_rate: optax.ScalarOrSchedule,
  decay: float = 0.9,
  eps: float = 1e-7,
  *,
  weighting: Weighting = min_norm_weights,
  num_objectives: int = 2,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiobjective RMSProp (MRMSProp).

  Each objective keeps its own moving average of squared gradients,

  .. math::

    a_j \leftarrow \beta a_j + (1 - \beta) g_j^2, \qquad
    w \leftarrow w - t_k \sum_j \lambda_j \frac{g_j}{\sqrt{a_j} + \epsilon},

  with weights from the raw gradients.

  Args:
    learning_rate: a float, or a schedule of the number of updates.
    decay: beta, in [0, 1).
    eps: added to the root, not under it as is the default of `optax.rmsprop`.
    weighting: how the objectives are weighed, from the Gramian.
    num_objectives: m >= 2.

  Returns:
    A transformation of stacked gradients, see `mopt.aggregate`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> params = jnp.array([0.0, 0.0])
    >>> grads = mopt.stack(jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0]))
    >>> tx = mopt.mrmsprop(learning_rate=0.1)
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates.round(3))
    [-0.158 -0.158]

  References:
    Reiners et al., 2020, equations (11), (12) and (15).
  """
  _check_rate(learning_rate)
  _check_decay('decay', decay)
  _check_eps(eps)
  return optax.chain(
    aggregate(
      weighting,
      optax.scale_by_rms(decay=decay, eps=eps, eps_in_sqrt=False),
      num_objectives=num_objectives,
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def madam(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  *,
  amsgrad: bool = False,
  weighting: Weighting = min_norm_weights,
  num_objectives: int = 2,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiobjective Adam (MAdam) of Reiners et al., 2020.

  Each objective keeps its own first and second moments; the weights come from
  the raw gradients and mix the preconditioned directions,

  .. math::

    w \leftarrow w - t_k \sum_j \lambda_j
      \frac{\hat m_j}{\sqrt{\hat v_j} + \epsilon}.

  This is neither min-norm followed by one Adam, which would mix first, nor the
  Metric-Aware Multi-Objective Adam of arXiv 2606.03904, which shares the name.
  Since a step of Adam has the same size however small the gradient, the
  weights `(1 - l, l)` here are not Adam on the weighted sum (7) either. With
  preconditioning the update need not descend for every objective.

  Args:
    learning_rate: a float, or a schedule of the number of updates.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the bias-corrected second moment.
    amsgrad: divide by the largest second moment so far.
    weighting: how the objectives are weighed, from the Gramian.
    num_objectives: m >= 2.

  Returns:
    A transformation of stacked gradients, see `mopt.aggregate`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(
    ...     mopt.madam(1e-2),
    ...     mopt.prune_by_magnitude(1e-3, mask=mopt.dense_kernels),
    ... )
    >>> params = {'kernel': jnp.array([[0.5, 0.01]])}
    >>> grads = {'kernel': jnp.array([[[0.0, 1.0]], [[0.0, 2.0]]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)['kernel'])
    [[0.5 0. ]]

  References:
    Reiners et al., 2020, equations (13), (14) and (15).
    Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014.
  """
  _check_rate(learning_rate)
  _check_decay('b1', b1)
  _check_decay('b2', b2)
  _check_eps(eps)
  scale_by = optax.scale_by_amsgrad if amsgrad else optax.scale_by_adam
  return optax.chain(
    aggregate(
      weighting, scale_by(b1=b1, b2=b2, eps=eps), num_objectives=num_objectives
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def _check_rate(value) -> None:
  # Optax takes None for no scaling, with the sign of ascent.
  if value is None:
    raise ValueError('learning_rate must be a number or a schedule, got None.')


def _check_decay(name: str, value) -> None:
  # Schedules and traced values (optax.inject_hyperparams) pass unchecked.
  if isinstance(value, (int, float)) and not 0 <= value < 1:
    raise ValueError(f'{name} must be in [0, 1), got {value}.')


def _check_eps(value) -> None:
  if isinstance(value, (int, float)) and not value > 0:
    raise ValueError(f'eps must be positive, got {value}.')
