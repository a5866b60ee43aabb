"""The paper's multiobjective optimizers, as chains.

`optax.inject_hyperparams` takes any of them as it is, and rates, decays and eps
become parts of the state. Other arguments are no hyperparameters: Optax takes
every function for a schedule and every number for an array, so that a
`weighting`, `num_objectives` or a function as `mask` or `shared` have to be
named if they are given:

  >>> import mopt
  >>> import optax
  >>> make = optax.inject_hyperparams(
  ...   mopt.madam, static_args=('weighting', 'num_objectives', 'mask')
  ... )
  >>> tx = make(1e-3, num_objectives=3, mask=mopt.dense_kernels)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mopt.aggregation import aggregate
from mopt.checks import known_numbers
from mopt.masks import Mask
from mopt.min_norm import min_norm_weights
from mopt.weightings.weighting import Function
from mopt.weightings.weighting import Weighting


def smgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float | None = None,
  nesterov: bool = False,
  *,
  weighting: Weighting | Function | None = None,
  num_objectives: int | None = None,
  mask: Mask = None,
  shared: Mask = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Stochastic multi-gradient descent (SMGD), also known as stochastic MGDA.

  The gradients are combined to a common descent direction first; the momentum
  acts on that. The learning rate is inside the momentum buffer,

  .. math::

    v_k = M v_{k-1} - t_k \sum_j \lambda_j g_j, \qquad w_{k+1} = w_k + v_k,

  as in equation (10), and unlike `optax.sgd`, where a change of rate acts on
  the whole buffer at once. With a constant rate the two agree.

  Under min-norm weights a gradient that is zero gets all of the weight: it is
  the shortest combination. Then nothing moves, as it should at a minimum of one
  objective. But parameters that one objective does not depend on never move if
  they are all that this transformation sees: biases as a group of
  `optax.partition`, beside the l1 norm of kernels. And with a `mask` that
  chooses these alone, that objective has all of the weight everywhere. Groups
  like that want `fixed_weights`.

  Args:
    learning_rate: a float, or a schedule of the number of updates.
    momentum: decay M of the buffer, in [0, 1); `None` for no buffer.
    nesterov: look ahead along the momentum.
    weighting: how the objectives are weighed, from the Gramian; `None` for
      `mopt.min_norm_weights`.
    num_objectives: m >= 2; `None` for 2.
    mask: which leaves the Gramian is taken of, see `mopt.mask_by_path`; `None`
      for all. The update has all leaves whatever the mask. Every objective
      should depend on what it chooses: a gradient that is zero there gets all
      of the weight, see above.
    shared: which leaves several tasks share; heads, which are the others, move
      by their own objective's direction, unscaled. See `mopt.aggregate`.

  Returns:
    A transformation of stacked gradients, see `mopt.aggregate`.

  Raises:
    ValueError: for a momentum outside of [0, 1), or a rate that is not finite,
      as far as they are known when this is called; see `mopt.aggregate` for the
      rest.

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
    _aggregate(optax.identity(), weighting, num_objectives, mask, shared),
    optax.scale_by_learning_rate(learning_rate),
    optax.identity() if momentum is None else optax.trace(momentum, nesterov),
  )


def mrmsprop(
  learning_rate: optax.ScalarOrSchedule,
  decay: float = 0.9,
  eps: float = 1e-7,
  *,
  weighting: Weighting | Function | None = None,
  num_objectives: int | None = None,
  mask: Mask = None,
  shared: Mask = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Multiobjective RMSProp (MRMSProp).

  Each objective keeps its own moving average of squared gradients,

  .. math::

    a_j \leftarrow \beta a_j + (1 - \beta) g_j^2, \qquad
    w \leftarrow w - t_k \sum_j \lambda_j \frac{g_j}{\sqrt{a_j} + \epsilon},

  with weights from the raw gradients.

  Under min-norm weights a gradient that is zero gets all of the weight: it is
  the shortest combination. Then nothing moves, as it should at a minimum of one
  objective. But parameters that one objective does not depend on never move if
  they are all that this transformation sees: biases as a group of
  `optax.partition`, beside the l1 norm of kernels. And with a `mask` that
  chooses these alone, that objective has all of the weight everywhere. Groups
  like that want `fixed_weights`.

  Args:
    learning_rate: a float, or a schedule of the number of updates.
    decay: beta, in [0, 1).
    eps: added to the root, not under it as is the default of `optax.rmsprop`.
    weighting: how the objectives are weighed, from the Gramian; `None` for
      `mopt.min_norm_weights`.
    num_objectives: m >= 2; `None` for 2.
    mask: which leaves the Gramian is taken of, see `mopt.mask_by_path`; `None`
      for all. The update has all leaves whatever the mask. Every objective
      should depend on what it chooses: a gradient that is zero there gets all
      of the weight, see above.
    shared: which leaves several tasks share; heads, which are the others, move
      by their own objective's direction, unscaled. See `mopt.aggregate`.

  Returns:
    A transformation of stacked gradients, see `mopt.aggregate`.

  Raises:
    ValueError: for a decay outside of [0, 1), an eps that is not positive and
      finite, or a rate that is not finite, as far as they are known when this
      is called; see `mopt.aggregate` for the rest.

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
    _aggregate(
      optax.scale_by_rms(decay=decay, eps=eps, eps_in_sqrt=False),
      weighting,
      num_objectives,
      mask,
      shared,
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
  weighting: Weighting | Function | None = None,
  num_objectives: int | None = None,
  mask: Mask = None,
  shared: Mask = None,
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

  Under min-norm weights a gradient that is zero gets all of the weight: it is
  the shortest combination. Then nothing moves, as it should at a minimum of one
  objective. But parameters that one objective does not depend on never move if
  they are all that this transformation sees: biases as a group of
  `optax.partition`, beside the l1 norm of kernels. And with a `mask` that
  chooses these alone, that objective has all of the weight everywhere. Groups
  like that want `fixed_weights`.

  Args:
    learning_rate: a float, or a schedule of the number of updates.
    b1: decay of the first moment, in [0, 1).
    b2: decay of the second moment, in [0, 1).
    eps: added to the root of the bias-corrected second moment.
    amsgrad: divide by the largest second moment so far.
    weighting: how the objectives are weighed, from the Gramian; `None` for
      `mopt.min_norm_weights`.
    num_objectives: m >= 2; `None` for 2.
    mask: which leaves the Gramian is taken of, see `mopt.mask_by_path`; `None`
      for all. The update has all leaves whatever the mask. Every objective
      should depend on what it chooses: a gradient that is zero there gets all
      of the weight, see above.
    shared: which leaves several tasks share; heads, which are the others, move
      by their own objective's direction, unscaled. See `mopt.aggregate`.

  Returns:
    A transformation of stacked gradients, see `mopt.aggregate`.

  Raises:
    ValueError: for a b1 or b2 outside of [0, 1), an eps that is not positive
      and finite, or a rate that is not finite, as far as they are known when
      this is called; see `mopt.aggregate` for the rest.

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
    _aggregate(
      scale_by(b1=b1, b2=b2, eps=eps), weighting, num_objectives, mask, shared
    ),
    optax.scale_by_learning_rate(learning_rate),
  )


def _aggregate(
  inner: optax.GradientTransformation,
  weighting: Weighting | Function | None,
  num_objectives: int | None,
  mask: Mask,
  shared: Mask,
) -> optax.GradientTransformationExtraArgs:
  # The defaults are None, for optax.inject_hyperparams would take a function
  # for a schedule, and a number for an array.
  return aggregate(
    min_norm_weights if weighting is None else weighting,
    inner,
    num_objectives=2 if num_objectives is None else num_objectives,
    mask=mask,
    shared=shared,
  )


def _check_rate(value: Any) -> None:
  # Optax takes None for no scaling, with the sign of ascent.
  if value is None:
    raise ValueError('learning_rate must be a number or a schedule, got None.')
  if not callable(value):
    is_right = np.isfinite
    _check('learning_rate', value, is_right, 'a finite number or a schedule')


def _check_decay(name: str, value: Any) -> None:
  _check(name, value, lambda x: (x >= 0) & (x < 1), 'in [0, 1)')


def _check_eps(value: Any) -> None:
  # What is subnormal in float32 is taken for 0 on some platforms.
  least = jnp.finfo(jnp.float32).tiny
  is_right = lambda x: (x >= least) & np.isfinite(x)
  _check('eps', value, is_right, 'positive and finite')


def _check(name: str, value: Any, is_right: Any, expected: str) -> None:
  """Raises unless what is known is right as JAX has it, in float32 say."""
  if isinstance(value, (list, tuple)):  # which a sign would only repeat
    raise ValueError(f'{name} must be a number, got {value}.')
  known = known_numbers(name, value)
  if known is None:
    return
  with np.errstate(over='ignore', under='ignore'):
    known = known.astype(jnp.result_type(float))
  if is_right(known).all():
    return
  hint = ''
  if isinstance(value, jax.Array) and value.dtype.itemsize < 4:
    # Of a hyperparameter that has the dtype of the parameters.
    hint = (
      f' in {value.dtype}. optax.inject_hyperparams keeps float32 with '
      'hyperparam_dtype=jnp.float32'
    )
  raise ValueError(f'{name} must be {expected}, got {value}{hint}.')
