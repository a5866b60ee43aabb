"""Magnitude pruning during training: exact zeros by Optax updates.

A weight whose magnitude falls below a threshold is set to zero. Nothing holds
it there: the next updates may bring it back (soft pruning, section 4).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mopt.masks import Mask
from mopt.masks import path_name
from mopt.masks import resolve_mask

PyTree = Any


def _keep(weights: jax.Array, threshold: jax.typing.ArrayLike) -> jax.Array:
  # "Not below", so that NaN is kept: |NaN| >= t is False and would turn
  # divergence into sparsity. The comparison is in the dtype of the weights.
  return ~(jnp.abs(weights) < jnp.asarray(threshold, weights.dtype))


def prune(
  params: PyTree, threshold: jax.typing.ArrayLike, mask: Mask = None
) -> PyTree:
  """Sets weights with magnitude below the threshold to zero.

  A weight equal to the threshold stays, and so does one that is not finite.
  Averaged weights (`optax.ema`, schedule-free) are not sparse even where the
  weights they average are: prune them once more at the end.

  Args:
    params: pytree of arrays.
    threshold: positive; compared in the dtype of each leaf.
    mask: which leaves are pruned, see `mopt.mask_by_path`; `None` for all.

  Returns:
    `params` with +0.0 in the place of small weights.

  Raises:
    ValueError: for a threshold that is not positive and finite, or a mask of
      another structure.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.prune(jnp.array([-2e-4, 1e-3, -0.5]), threshold=1e-3))
    [ 0.     0.001 -0.5  ]

  References:
    Reiners et al., 2020, section 4.
  """
  _check_threshold(threshold)
  return jax.tree.map(
    lambda x, chosen: jnp.where(_keep(x, threshold), x, 0) if chosen else x,
    params,
    resolve_mask(mask, params),
  )


class PruneState(NamedTuple):
  """State of `prune_by_magnitude`."""

  count: jax.Array  # shape=(), dtype=jnp.int32: updates so far.
  nonzeros: jax.Array  # shape=(), dtype=jnp.int32: in the masked leaves, after
  # the last update.


def prune_by_magnitude(
  threshold: jax.typing.ArrayLike, mask: Mask = None, every: int = 1
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
  rescales its updates, and nothing is zero then. Under jit a compiler may
  round the updates of kept weights otherwise than without pruning: zeros are
  exact, kept weights equal up to the last bit. A weight that is not finite is
  kept, for divergence must not look like sparsity.

  Args:
    threshold: positive; compared in the dtype of each leaf. A weight equal to
      it stays.
    mask: which leaves are pruned, see `mopt.mask_by_path`; `None` for all.
      `mopt.dense_kernels` is what the paper prunes.
    every: prune at every so many updates: 1 is the paper's batchwise pruning,
      the number of updates in an epoch its epochwise pruning.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.

  Raises:
    ValueError: for a threshold that is not positive and finite or `every` < 1;
      from `update` without `params`, for updates of another shape than the
      parameters (before `mopt.aggregate`, say), or a mask of another structure.

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

  References:
    Reiners et al., 2020, section 4 (intra-training pruning).
  """
  _check_threshold(threshold)
  if not isinstance(every, int) or every < 1:
    raise ValueError(f'every must be an integer >= 1, got {every!r}.')

  def init_fn(params):
    chosen = resolve_mask(mask, params)
    nonzeros = _count(params, chosen)
    return PruneState(count=jnp.zeros((), jnp.int32), nonzeros=nonzeros)

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'prune_by_magnitude needs the parameters: call '
        'update(updates, state, params).'
      )
    _check_shapes(updates, params)
    chosen = resolve_mask(mask, params)
    count = jnp.asarray(optax.safe_increment(state.count))
    due = True if every == 1 else count % every == 0

    def prune_leaf(update, param, is_chosen):
      param = jnp.asarray(param)
      update = jnp.asarray(update, param.dtype)
      if not is_chosen:
        return update
      # The sum as apply_updates computes it.
      keep = _keep((param + update).astype(param.dtype), threshold)
      return jnp.where(keep if every == 1 else keep | ~due, update, -param)

    updates = jax.tree.map(prune_leaf, updates, params, chosen)
    nonzeros = _count(jax.tree.map(jnp.add, params, updates), chosen)
    return updates, PruneState(count, nonzeros)

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


def _check_threshold(threshold: jax.typing.ArrayLike) -> None:
  if isinstance(threshold, jax.core.Tracer):
    return
  value = np.asarray(threshold)
  if value.shape != () or not 0 < float(value) < np.inf:
    raise ValueError(
      f'threshold must be a positive finite number, got {threshold}.'
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
