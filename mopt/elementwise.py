"""Updates of stacked gradients that look at each parameter by itself.

They stand where `mopt.aggregate` does, first in a chain, and need no Gramian.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mopt.aggregation import check_stacked
from mopt.checks import check_integer
from mopt.objectives import as_float
from mopt.weightings.weighting import Key


class GradDropState(NamedTuple):
  """State of `graddrop`."""

  key: jax.Array  # The data of the random key for the next update.


def graddrop(
  key: jax.Array, *, num_objectives: int = 2
) -> optax.GradientTransformationExtraArgs:
  r"""Sums, for each parameter, the gradients of one sign, drawn at random.

  .. math::

    P = \frac{1}{2} \left(1 + \frac{\sum_j g_j}{\sum_j |g_j|}\right)

  is the chance of the positive ones. The more the objectives agree the surer
  is their sign, and where they agree it is the sum.

  When to take it: to repeat what has been published with it, or as noise that
  objectives have to agree on to be rid of. Descent is promised for none of
  them; on average it is a direction that no parameter's majority is against.
  One factor for all gradients changes nothing but the length, and their order
  nothing. It costs a random number for each parameter.

  A gradient that is not finite makes the update NaN. Whatever else is said at
  `mopt.aggregate` of what may stand around it holds here.

  Args:
    key: random key, such as `jax.random.key(0)`. A copy that changes at each
      update is kept in the state.
    num_objectives: m >= 2.

  Returns:
    A `GradientTransformationExtraArgs`. Updates enter with leaves
    `[m, *param.shape]` and leave as `[*param.shape]`, in the same dtype.

  Raises:
    ValueError: for what is not a key, or `num_objectives` < 2; from `update`
      without `params`, or for a leaf of another shape, which is named.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> tx = mopt.graddrop(jax.random.key(0))
    >>> params = {'w': jnp.zeros(3)}
    >>> grads = {'w': jnp.array([[1., -1., 0.], [3., -2., 4.]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> print(updates['w'])
    [ 4. -3.  4.]

  References:
    Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with
    Gradient Sign Dropout <https://arxiv.org/abs/2010.06808>`_, 2020, Algorithm
    1, of the gradients of parameters, with f the identity and no leak.
  """
  start = Key.of(key)
  m = check_integer('num_objectives', num_objectives, 2)

  def init_fn(params):
    del params
    return GradDropState(start.data)

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    _check('graddrop', updates, params, m)
    data, now = start.split(state.key)
    leaves, structure = jax.tree.flatten(updates)
    keys = jax.random.split(now, len(leaves)) if leaves else ()
    combined = [_pick_a_sign(k, leaf) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(structure, combined), GradDropState(data)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def trimmed_mean(
  num_trimmed: int = 1, *, num_objectives: int
) -> optax.GradientTransformationExtraArgs:
  """The mean, for each parameter, without the largest and smallest gradients.

  When to take it: where the m gradients are of one objective, say from m
  workers, and up to `num_trimmed` of them may be anything: then the mean stays
  within the range of the others. It is not for objectives that differ, and
  promises none of them descent. One factor for all gradients changes nothing
  but the length, and their order nothing. It costs a sort of m numbers for
  each parameter.

  NaN counts as the largest: up to `num_trimmed` gradients that are not finite
  are trimmed as well, and with more the update is not finite. Whatever else is
  said at `mopt.aggregate` of what may stand around it holds here.

  Args:
    num_trimmed: how many are left out at each end, >= 0; 0 is the mean.
    num_objectives: m > 2 num_trimmed, and >= 2.

  Returns:
    A `GradientTransformationExtraArgs` without a state. Updates enter with
    leaves `[m, *param.shape]` and leave as `[*param.shape]`, in the same dtype.

  Raises:
    ValueError: for arguments that are not such integers; from `update` without
      `params`, or for a leaf of another shape, which is named.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> tx = mopt.trimmed_mean(1, num_objectives=4)
    >>> params = {'w': jnp.zeros(2)}
    >>> grads = {'w': jnp.array([[1., 5.], [2., 9.], [3., 7.], [99., -99.]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> print(updates['w'])
    [2.5 6. ]

  References:
    Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates <https://arxiv.org/abs/1803.01498>`_, 2018, definition 2.
  """
  count = check_integer('num_trimmed', num_trimmed, 0)
  m = check_integer('num_objectives', num_objectives, 2)
  if m <= 2 * count:
    raise ValueError(
      f'num_objectives must be > 2 num_trimmed = {2 * count}, got {m}.'
    )

  def trim(leaf):
    wide = as_float(leaf)
    kept = jnp.sort(wide, axis=0)[count : m - count]
    return jnp.mean(kept, axis=0).astype(jnp.asarray(leaf).dtype)

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    _check('trimmed_mean', updates, params, m)
    return jax.tree.map(trim, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


def _pick_a_sign(key: jax.Array, leaf: jax.Array) -> jax.Array:
  wide = as_float(leaf)
  size = jnp.sum(jnp.abs(wide), axis=0)
  positive = jnp.sum(jnp.maximum(wide, 0), axis=0)
  negative = jnp.sum(jnp.minimum(wide, 0), axis=0)
  # Of numbers in [0, 1): surely below a share of 1, and never below one of 0.
  drawn = jax.random.uniform(key, size.shape, size.dtype)
  is_positive = drawn * size < positive
  parts = jnp.where(is_positive, positive, negative)
  # What is not finite would lose itself in a comparison.
  parts = jnp.where(jnp.isfinite(size), parts, jnp.nan)
  return parts.astype(jnp.asarray(leaf).dtype)


def _check(name, updates, params, m):
  if params is None:
    raise ValueError(
      f'{name} needs the parameters: call update(updates, state, params).'
    )
  check_stacked(updates, params, m)
