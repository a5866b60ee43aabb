"""Any Optax optimizer, made multiobjective."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mopt.checks import check_integer
from mopt.masks import Mask
from mopt.masks import path_name
from mopt.masks import resolve_mask
from mopt.min_norm import gramian_of
from mopt.weightings.weighting import as_weighting
from mopt.weightings.weighting import as_weights
from mopt.weightings.weighting import Function
from mopt.weightings.weighting import Weighting


class AggregateState(NamedTuple):
  """State of `aggregate`."""

  weights: jax.Array  # shape=(m,), dtype=jnp.float32: of the last update.
  weighting_state: Any  # What the weighting remembers; () if nothing.
  inner_state: optax.OptState  # The leaves have a leading axis of size m.


def aggregate(
  weighting: Weighting | Function,
  inner: optax.GradientTransformation | None = None,
  *,
  num_objectives: int = 2,
  mask: Mask = None,
  shared: Mask = None,
  gram: Literal['raw', 'preconditioned'] = 'raw',
) -> optax.GradientTransformationExtraArgs:
  r"""Turns the stacked gradients of m objectives into one update.

  The weights are found from the raw gradients. Each objective passes through
  `inner` by itself, with a state of its own, and the results are summed:

  .. math::

    \lambda = \mathrm{weighting}(G), \quad G_{ij} = \langle g_i, g_j \rangle,
    \qquad u = \sum_j \lambda_j \, \mathrm{inner}(g_j)

  Some weightings ask for the values of the objectives. They are an argument of
  the update, beside any that other transformations ask for: `tx.update(grads,
  state, params, values=values)`, with `values` `[m]` as
  `mopt.value_and_stacked_grad` gives them.

  Several tasks often share a part of a network, and each has a head of its own.
  A gradient with respect to a head says nothing of a conflict, and the weights
  of others are none of its business. With `shared=mask` the Gramian is of the
  leaves in the mask; in the others the directions are added up, so that each
  head moves by its own objective's, unscaled. Two transformations give the
  same, of one group of leaves each:

  .. code-block:: python

    optax.partition(
        {'shared': mopt.aggregate(weighting, inner),
         'heads': mopt.aggregate(mopt.fixed_weights((1.0, 1.0)), inner)},
        labels)

  Gradients of half precision pass through `inner` in float32, so that moments
  keep their digits; updates leave in the dtype in which they entered.

  Updates enter with leaves `[m, *param.shape]` (see `mopt.stack` and
  `mopt.value_and_stacked_grad`) and leave with the shape of the parameters, so
  this stands first in a chain, and everything Optax has may follow. What
  happens around it:

  * Learning rates, weight decay (decoupled), momentum, masks, pruning: after
    it, as with any optimizer.
  * Clipping before it sees the m gradients as one long vector and scales all
    by one factor, which leaves min-norm weights alone. To clip each objective
    by itself put it into `inner`: the weights still come from raw gradients.
  * Weight decay before it is added to the gradient of every objective, and
    changes the weights. Add it to one objective instead, or decouple it.
  * `optax.masked` around it passes leaves outside of the mask on as they came,
    with their leading axis. Mask inside (`inner=optax.masked(...)`), or after.
  * `optax.MultiSteps` around it fails, for it accumulates in the shape of the
    parameters. Accumulate the stacked gradients instead: weights are not
    linear in them, so the mean over micro-batches (and over devices) comes
    first:

    .. code-block:: python

      def mean_grads(params, micro_batches):  # leaves [k, size, ...]
        values, grads = jax.lax.map(
            lambda batch: grad_fn(params, batch), micro_batches)
        return jax.tree.map(lambda x: x.mean(axis=0), (values, grads))

  * `optax.inject_hyperparams` takes every callable for a schedule: name the
    others, `static_args=('weighting', 'num_objectives', 'mask')`.

  A gradient that is not finite makes the min-norm weights, and so the whole
  update, NaN. `optax.apply_if_finite` fails around a chain that begins with
  stacked gradients; to skip such a step, keep what was before it:

  .. code-block:: python

    finite = jnp.isfinite(mopt.gramian(grads)).all()
    params, state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (new_params, new_state), (params, state))

  Args:
    weighting: function from the Gramian `[m, m]` (f32, f64 if a leaf is) to
      weights `[m]`, such as `mopt.min_norm_weights` or
      `mopt.fixed_weights((1, 3e-4))`, or a `mopt.Weighting`, which has a state.
      See `help(mopt.weightings)` for all of them.
    inner: what each objective's gradient passes through, any transformation
      that `jax.vmap` maps; nothing by default.
    num_objectives: m >= 2.
    mask: which leaves the Gramian is taken of, see `mopt.mask_by_path`; `None`
      for all, or for those that are shared. The update has all leaves whatever
      the mask.
    shared: which leaves are weighed, ditto; in the others the directions of the
      objectives are added up. `None` for all.
    gram: `'raw'` for the Gramian of the gradients, `'preconditioned'` for that
      of what comes out of `inner`. Steps of Adam are of one size whatever the
      gradients'. Raw weights that make up for short gradients, as those of
      `mopt.upgrad` do, are then too large: two quadratics of scales 10 and 0.1
      rose far with them, and preconditioned ones got both down. But these stay
      where directions cancel, as those of Adam do where all signs of two
      gradients are opposite, though both objectives could still improve. Raw
      ones with Adam inside may stop off the front, too: Pareto-stationary
      points are where gradients cancel. It is not the method of arXiv
      2606.03904, which has another norm.

  Returns:
    A `GradientTransformationExtraArgs` whose state is an `AggregateState`;
    `optax.tree.get(state, 'AggregateState').weights` reads the last weights
    from any chain.

  Raises:
    ValueError: for `num_objectives` < 2, what is not a weighting or a
      transformation, or another `gram`; from `update` without `params`, without
      `values` if the weighting asks for them, or for a leaf whose shape is not
      `(m, *param.shape)`, which is named.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(
    ...     mopt.aggregate(mopt.min_norm_weights, optax.scale_by_lion()),
    ...     optax.scale_by_learning_rate(0.1),
    ... )
    >>> params = {'w': jnp.zeros(2)}
    >>> grads = {'w': jnp.array([[3., 0.], [0., 1.]])}  # stacked: [m, 2]
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> weights = optax.tree.get(state, 'AggregateState').weights
    >>> print(updates['w'], weights)
    [-0.01 -0.09] [0.1 0.9]

  References:
    Reiners et al., 2020, Algorithm 2 and section 3.2.
  """
  m = check_integer('num_objectives', num_objectives, 2)
  weighting = as_weighting(weighting)
  if gram not in ('raw', 'preconditioned'):
    raise ValueError(f"gram must be 'raw' or 'preconditioned', got {gram!r}.")
  inner = optax.identity() if inner is None else inner
  if not isinstance(inner, optax.GradientTransformation):
    raise ValueError(
      f'inner must be an optax.GradientTransformation, got {inner!r}.'
    )
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    return AggregateState(
      weights=jnp.zeros(m, jnp.float32),
      weighting_state=weighting.init(m),
      inner_state=jax.vmap(inner.init, in_axes=None, axis_size=m)(
        _at_least_float32(params)
      ),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        'aggregate needs the parameters: call update(updates, state, params).'
      )
    check_stacked(updates, params, m)
    wide_params = _at_least_float32(params)
    directions, inner_state = jax.vmap(
      lambda u, s: inner.update(u, s, wide_params, **extra_args), axis_size=m
    )(_at_least_float32(updates), state.inner_state)
    found, weighting_state = weighting.update(
      gramian_of(
        directions if gram == 'preconditioned' else updates,
        shared if mask is None else mask,
        m,
      ),
      state.weighting_state,
      **extra_args,
    )
    weights = as_weights(found, m)
    combined = jax.tree.map(
      lambda x, update: x.astype(jnp.asarray(update).dtype),
      weighted_sum(weights, directions),
      updates,
    )
    if shared is not None:
      combined = jax.tree.map(
        lambda is_shared, x, parts: x if is_shared else parts,
        resolve_mask(shared, params),
        combined,
        weighted_sum(jnp.ones(m), directions),
      )
    return combined, AggregateState(
      weights.astype(jnp.float32), weighting_state, inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at_least_float32(tree: Any) -> Any:
  """Leaves of half precision in float32, in which moments keep their digits.

  An eps of 1e-8 is 0 in float16, where Adam of a gradient that is exactly zero
  would be 0 / 0; and 0.999 is 1 in bfloat16, where a second moment would never
  fade.
  """

  def widen(leaf):
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))

  return jax.tree.map(widen, tree)


# Up to so many objectives a sum over them is written out.
_FEW = 8


def weighted_sum(weights: jax.Array, stacked: Any) -> Any:
  """Sums leaves `[m, ...]` over m with weights `[m]`, keeping their dtype."""

  def combine(leaf):
    # Products and sums of elements, for a matrix product would round them to
    # TF32 or bfloat16 where the platform does so by default.
    dtype = jnp.promote_types(leaf.dtype, jnp.float32)
    weighed = leaf.astype(dtype) * weights.astype(dtype).reshape(
      -1, *(1,) * (leaf.ndim - 1)
    )
    if len(weighed) > _FEW:
      return weighed.sum(axis=0).astype(leaf.dtype)
    # Weighed before it is taken apart, the leaf need not be written to memory
    # on CPUs.
    return functools.reduce(jnp.add, list(weighed)).astype(leaf.dtype)

  return jax.tree.map(combine, stacked)


def check_stacked(updates: Any, params: Any, m: int) -> None:
  """Raises unless every leaf of updates is `(m, *param.shape)`."""
  found = jax.tree.structure(updates)
  expected = jax.tree.structure(params)
  if found != expected:
    raise ValueError(
      'stacked updates must have the structure of the parameters: expected '
      f'{expected}, got {found}.'
    )

  def check(path, update, param):
    shape = (m, *jnp.shape(param))
    if jnp.shape(update) != shape:
      raise ValueError(
        f'updates must be stacked over {m} objectives: expected shape '
        f'{shape} at {path_name(path)!r}, got {jnp.shape(update)}. See '
        'mopt.stack and mopt.value_and_stacked_grad.'
      )

  jax.tree_util.tree_map_with_path(check, updates, params)
