"""Magnitude pruning during training: exact zeros by Optax updates.

A weight whose magnitude falls below a threshold is set to zero. Nothing holds
it there: the next updates may bring it back (soft pruning, section 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mopt.checks import check_integer
from mopt.checks import known_numbers
from mopt.masks import is_integer
from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.masks import path_name
from mopt.masks import weight_mask

PyTree = Any


def _keep(weights: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
  # "Not below", so that NaN is kept: |NaN| >= t is False and would turn
  # divergence into sparsity. The comparison is in the dtype of the weights.
  tau = jnp.asarray(threshold, weights.dtype)
  if isinstance(threshold, jax.Array):  # which may not have been looked at
    tau = jnp.where(tau < jnp.inf, tau, 0)  # or an infinite one would prune all
  return ~(jnp.abs(weights) < tau)


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
  _check_threshold(threshold)
  chosen = weight_mask(mask, params)
  _check_leaves(threshold, chosen, params)

  def prune_leaf(x, is_chosen):
    if not is_chosen or is_integer(x):
      return x
    x = jnp.asarray(x)
    return jnp.where(_keep(x, threshold), x, jnp.zeros((), x.dtype))

  return jax.tree.map(prune_leaf, params, chosen)


class PruneState(NamedTuple):
  """State of `prune_by_magnitude`."""

  count: jax.Array  # shape=(), dtype=jnp.int32: updates so far.
  nonzeros: jax.Array  # shape=(), dtype=jnp.int32: in the masked leaves, after
  # the last update.


def prune_by_magnitude(
  threshold: optax.ScalarOrSchedule,
  mask: Mask = None,
  every: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
  """Prunes small weights after every update, or every so many.

  The update of a weight that would end below the threshold becomes `-w`, so
  that `optax.apply_updates` gives exactly +0.0 and needs no second hook. Other
  updates pass through, cast to the dtype of their parameter. Moments of the
  optimizer are untouched, and a weight may come back. How far one step moves
  it from zero depends on the rate: by at most 3.2 learning rates with RMSProp,
  and with Adam's defaults by 3.2 for a gradient after silence and 7.3 at the
  most, for gradients that grow. A falling rate thus makes soft pruning final.

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

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.

  Raises:
    ValueError: for a threshold that is not positive and finite, or an `every`
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

  References:
    Reiners et al., 2020, section 4 (intra-training pruning).
  """
  is_schedule = callable(threshold)
  if not is_schedule:
    _check_threshold(threshold)
  every = _check_every(every)

  def init_fn(params):
    count = jnp.zeros((), jnp.int32)
    chosen = weight_mask(mask, params)
    _check_leaves(threshold, chosen, params)
    if is_schedule:
      _value_at(threshold, count)  # or the first update would fail
    return PruneState(count, nonzeros=_count(params, chosen))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'prune_by_magnitude needs the parameters: call '
        'update(updates, state, params).'
      )
    _check_shapes(updates, params)
    chosen = weight_mask(mask, params)
    _check_leaves(threshold, chosen, params)
    # As Optax does: a schedule sees the count before this update.
    tau = _value_at(threshold, state.count) if is_schedule else threshold
    count = jnp.asarray(optax.safe_increment(state.count))
    is_each = isinstance(every, int) and every == 1
    due = True if is_each else count % every == 0

    def prune_leaf(update, param, is_chosen):
      if is_integer(param):
        return update
      param = jnp.asarray(param)
      update = jnp.asarray(update, param.dtype)
      if not is_chosen:
        return update
      # The sum as apply_updates computes it.
      keep = _keep((param + update).astype(param.dtype), tau)
      return jnp.where(keep if is_each else keep | ~due, update, -param)

    updates = jax.tree.map(prune_leaf, updates, params, chosen)

    def add(param, update, is_chosen):
      return jnp.add(param, update) if is_chosen else param

    new = jax.tree.map(add, params, updates, chosen)
    return updates, PruneState(count, _count(new, chosen))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _count(params: PyTree, chosen: PyTree) -> jax.Array:
  counts = jax.tree.map(
    lambda x, is_chosen: _count_leaf(jnp.asarray(x)) if is_chosen else 0,
    params,
    chosen,
  )
  return sum(jax.tree.leaves(counts), jnp.zeros((), jnp.int32))


def _count_leaf(x: jax.Array) -> jax.Array:
  # Nonzeros and zeros in one reduction. XLA splits a single large sum on CPUs
  # and writes its terms to memory for that, which at 1e7 weights took 55 ms;
  # a reduction of two arrays it leaves whole: 2 ms.
  zero = jnp.int32(0)
  nonzeros, zeros = jax.lax.reduce(
    ((x != 0).astype(jnp.int32), (x == 0).astype(jnp.int32)),
    (zero, zero),
    lambda a, b: (a[0] + b[0], a[1] + b[1]),
    tuple(range(x.ndim)),
  )
  # Both are used, or the compiler would drop one. NaN differs from zero.
  return (nonzeros + x.size - zeros) // 2


def _check_threshold(threshold: Any) -> None:
  """Raises unless this is one number of the right size, as far as is known."""
  known = known_numbers('threshold', threshold)
  shape = np.shape(threshold)
  if shape != ():
    raise ValueError(f'threshold must be one number, got shape {shape}.')
  # As optax.inject_hyperparams has it from a schedule that starts with 0.
  is_none = known == 0 and isinstance(threshold, jax.Array)
  limit = float(jnp.finfo(jnp.result_type(float)).max)
  if known is not None and not (0 < known <= limit or is_none):
    raise ValueError(
      f'threshold must be a positive finite number, got {threshold}.'
    )


def _value_at(schedule: optax.Schedule, count: jax.Array) -> jax.Array:
  """The threshold at a number of updates. Its size cannot be checked."""
  value = schedule(count)
  if not isinstance(value, jax.Array):
    known_numbers('the value of threshold', value)
    value = jnp.asarray(value)
  if value.shape != () or not jnp.isrealobj(value):
    raise ValueError(
      f'threshold must give one real number, got shape {value.shape} and '
      f'{value.dtype} from {schedule}.'
    )
  return value


def _check_every(every: Any) -> Any:
  """An integer of Python, or one that is traced and at least 1."""
  if not isinstance(every, jax.core.Tracer):
    return check_integer('every', every, 1)
  if every.shape != () or not jnp.issubdtype(every.dtype, jnp.integer):
    raise ValueError(f'every must be an integer >= 1, got {every}.')
  return jnp.maximum(every.astype(jnp.int32), 1)


def _check_leaves(threshold: Any, chosen: PyTree, params: PyTree) -> None:
  """Raises unless leaves are numbers, and the threshold means what it says."""
  leaves = masked_leaves(chosen, params)
  known = None
  if not callable(threshold):
    known = known_numbers('threshold', threshold)
  if known is None or known == 0:
    return
  for path, leaf in leaves:
    if is_integer(leaf):
      continue
    dtype = getattr(leaf, 'dtype', jnp.result_type(float))
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    with np.errstate(over='ignore', under='ignore'):
      tau = float(known.astype(dtype))
    # What is subnormal in float32 is taken for 0 on some platforms.
    least = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).tiny)
    if not least <= tau < np.inf:
      raise ValueError(
        f'threshold {threshold} is {tau} in {dtype}, the dtype of {path!r}, '
        f'and would prune {"none" if tau < least else "all"} of its weights.'
      )


def _check_shapes(updates: PyTree, params: PyTree) -> None:
  def check(path, update, param):
    if jnp.shape(update) != jnp.shape(param):
      raise ValueError(
        'prune_by_magnitude must be the last of a chain, where updates have '
        f'the shape of the parameters: expected {jnp.shape(param)} at '
        f'{path_name(path)!r}, got {jnp.shape(update)}.'
      )

  jax.tree_util.tree_map_with_path(check, updates, params)
