"""Magnitude pruning during training: exact zeros by Optax updates.

A weight whose magnitude falls below a threshold is set to zero. Nothing holds
it there: the next updates may bring it back (soft pruning, section 4), unless
`keep_zeros` holds it. Rules that count or group are in `mopt.sparsity`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mopt.checks import known_numbers
from mopt.masks import is_integer
from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.masks import weight_mask
from mopt.rules import check_leaves
from mopt.rules import check_threshold
from mopt.rules import in_dtype
from mopt.rules import rule
from mopt.rules import unless
from mopt.rules import value_at
from mopt.rules import Weights

PyTree = Any


def _keep(weights: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
  # "Not below", so that NaN is kept: |NaN| >= t is False and would turn
  # divergence into sparsity. The comparison is in the dtype of the weights.
  return ~(jnp.abs(weights) < in_dtype(threshold, weights.dtype))


def prune(
  params: PyTree, threshold: jax.typing.ArrayLike, mask: Mask = None
) -> PyTree:
  """Sets weights with magnitude below the threshold to zero.

  A weight equal to the threshold stays, and so does one that is not finite.
  Averaged weights (`optax.ema`, schedule-free) are not sparse even where the
  weights they average are: prune them once more at the end. Leaves of integers
  and booleans are no weights, and stay as they are.

  Args:
    params: pytree of arrays.
    threshold: positive; compared in the dtype of each leaf. It may be traced:
      one that is not positive or not finite prunes nothing then.
    mask: which leaves are pruned, see `mopt.mask_by_path`; `None` for all.

  Returns:
    `params` with +0.0 in the place of small weights.

  Raises:
    ValueError: for a threshold that is not positive and finite, for float32 and
      in the dtype of each leaf that is pruned (1e-9 is 0 in float16), or a mask
      of another structure.
    TypeError: for a leaf to be pruned that is no array of real numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.prune(jnp.array([-2e-4, 1e-3, -0.5]), threshold=1e-3))
    [ 0.     0.001 -0.5  ]

  References:
    Reiners et al., 2020, section 4.
  """
  if callable(threshold):
    raise ValueError(
      f'threshold must be a number, got {threshold}: of a schedule, give its '
      'value.'
    )
  check_threshold('threshold', threshold)
  chosen = weight_mask(mask, params)
  check_leaves('threshold', threshold, masked_leaves(chosen, params))

  def prune_leaf(x, is_chosen):
    if not is_chosen or is_integer(x):
      return x
    x = jnp.asarray(x)
    return jnp.where(_keep(x, threshold), x, jnp.zeros((), x.dtype))

  return jax.tree.map(prune_leaf, params, chosen)


def prune_by_magnitude(
  threshold: optax.ScalarOrSchedule,
  mask: Mask = None,
  every: jax.typing.ArrayLike = 1,
  return_threshold: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Prunes small weights after every update, or every so many.

  The update of a weight that would end below the threshold becomes `-w`, so
  that `optax.apply_updates` gives exactly +0.0 and needs no second hook. Other
  updates pass through, cast to the dtype of their parameter. Moments of the
  optimizer are untouched, and a weight may come back. How far one step moves
  it from zero depends on the rate: by at most 3.2 learning rates with RMSProp,
  and with Adam's defaults by 3.2 for a gradient after silence and 7.3 at the
  most, for gradients that grow. A falling rate thus makes soft pruning final.
  A `return_threshold` makes it harder without that (hysteresis): a weight that
  is zero stays there unless one update carries it that far.

  It must be the last of a chain. Whatever follows it, a learning rate say,
  rescales its updates, and nothing is zero then. The symptom: `nonzeros` of its
  state, what it has meant to leave, differs from `mopt.count_nonzero` of the
  parameters. Under jit a compiler may
  round the updates of kept weights otherwise than without pruning: zeros are
  exact, kept weights equal up to the last bit. A weight that is not finite is
  kept, for divergence must not look like sparsity. Leaves of integers and
  booleans are no weights: their updates pass through as they are.

  `optax.inject_hyperparams(mopt.prune_by_magnitude)(threshold=...)` makes the
  threshold a part of the state. A `mask` that is a function has to be named
  there, `static_args='mask'`, for Optax takes every function for a schedule.

  Args:
    threshold: positive; compared in the dtype of each leaf. A weight equal to
      it stays. Or a schedule of the number of updates before this one; where
      its value is not positive or not finite nothing is pruned, for values
      inside of `jax.jit` cannot be refused.
    mask: which leaves are pruned, see `mopt.mask_by_path`; `None` for all.
      `mopt.dense_kernels` is what the paper prunes.
    every: prune at every so many updates: 1 is the paper's batchwise pruning,
      the number of updates in an epoch its epochwise pruning. May be traced;
      less than 1 is taken as 1 then.
    return_threshold: a weight that is zero, at whichever update, pruned or zero
      from the start as biases are, becomes another number only if that is not
      below this one; 3 times the threshold, say. At least the threshold, which
      is the same as `None`: return as a weight stays. Or a schedule, too; where
      the threshold prunes nothing, nothing is held at zero.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.

  Raises:
    ValueError: for a threshold that is not positive and finite, a
      `return_threshold` that is less, as far as both are known, or an `every`
      that is no integer >= 1; from `init` and `update` for a threshold that is
      0 or infinite in the dtype of a leaf, which is named (1e-9 is 0 in
      float16), or a mask of another structure; from `update` without `params`,
      or for updates of another shape than the parameters (before
      `mopt.aggregate`, say).
    TypeError: from `init` and `update`, for a leaf to be pruned that is no
      array of real numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.1), mopt.prune_by_magnitude(1e-3))
    >>> params = jnp.array([0.5, -0.1])
    >>> grads = jnp.array([0.0, -1.0])
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates), state[-1].nonzeros)
    [0.5 0. ] 1

    A threshold that rises over 1,000 updates, from nothing pruned to 1e-3:

    >>> rising = optax.linear_schedule(0.0, 1e-3, transition_steps=1000)
    >>> tx = optax.chain(optax.sgd(0.1), mopt.prune_by_magnitude(rising))

    What is zero returns beyond 3 thresholds:

    >>> tx = mopt.prune_by_magnitude(1e-3, return_threshold=3e-3)
    >>> params = jnp.array([0.0, 0.0, 0.5])
    >>> updates = jnp.array([2e-3, 4e-3, -0.498])
    >>> updates, state = tx.update(updates, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [0.    0.004 0.002]

  References:
    Reiners et al., 2020, section 4 (intra-training pruning).
  """
  thresholds = {'threshold': threshold}
  if return_threshold is not None:
    thresholds['return_threshold'] = return_threshold
  for name, value in thresholds.items():
    if not callable(value):
      check_threshold(name, value)
  if return_threshold is not None:
    _check_order(threshold, return_threshold)

  def values(count):
    return [value_at(name, x, count) for name, x in thresholds.items()]

  def reach(chosen, params):
    for name, value in thresholds.items():
      check_leaves(name, value, masked_leaves(chosen, params))
    return chosen

  def kept(weights, now, due):
    keep = [unless(due, _keep(x.new, now[0])) for x in weights]
    if return_threshold is None:
      return keep
    return [~_is_held(x, *now) & k for x, k in zip(weights, keep)]

  return rule('prune_by_magnitude', mask, every, kept, values, reach)


def _is_held(
  weights: Weights, threshold: jax.Array, return_threshold: jax.Array
) -> jax.Array:
  """Whether a weight is zero, and would not return far enough."""
  held = (weights.old == 0) & ~_keep(weights.new, return_threshold)
  return held & (in_dtype(threshold, weights.new.dtype) > 0)


def _check_order(threshold: Any, return_threshold: Any) -> None:
  if callable(threshold) or callable(return_threshold):
    return
  least = known_numbers('threshold', threshold)
  known = known_numbers('return_threshold', return_threshold)
  if least is not None and known is not None and known < least:
    raise ValueError(
      f'return_threshold must be at least the threshold, {threshold}, got '
      f'{return_threshold}.'
    )


def keep_zeros(mask: Mask = None) -> optax.GradientTransformationExtraArgs:
  """What is exactly zero in the parameters stays zero (hard pruning).

  For training on what pruning has left, without a penalty (a refit), and for a
  network that is loaded sparse. No mask is stored: zeros are read from the
  parameters at each update, so that a weight that becomes zero in training is
  held from then on. Biases that start from zero are held as well, if the mask
  has them: start it once they have moved, or leave them out.

  It must be the last of a chain, as `mopt.prune_by_magnitude`, or stand right
  before another rule: with `mopt.prune_to_sparsity` behind it more and more is
  pruned, and nothing comes back. An update that makes a weight NaN or infinite
  is not held back, for divergence must not look like sparsity. Moments of the
  optimizer are untouched. It takes one pass over the weights, and no more
  memory than two numbers.

  Args:
    mask: which leaves are held, see `mopt.mask_by_path`; `None` for all.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.

  Raises:
    ValueError: from `init` and `update` for a mask of another structure; from
      `update` without `params`, or for updates of another shape than they.
    TypeError: from `init` and `update`, for a leaf to be held that is no array
      of real numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.1), mopt.keep_zeros())
    >>> params = jnp.array([0.5, 0.0])
    >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates))
    [0.4 0. ]

  References:
    Han et al., 2015, "Learning both weights and connections for efficient
    neural networks", section 3: retraining what is left.
  """

  def kept(weights, now, due):
    del now, due
    return [(x.old != 0) | ~jnp.isfinite(x.new) for x in weights]

  return rule('keep_zeros', mask, 1, kept)
