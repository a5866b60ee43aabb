"""Rules that prune by count or in groups: a share, n of m, whole units.

As `mopt.prune_by_magnitude` they stand last in a chain, give exact zeros, and
hold nothing there: put `mopt.keep_zeros` before one to prune hard.
"""

import math
from typing import Any

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
from mopt.masks import split_layer
from mopt.objectives import as_float
from mopt.objectives import of_one_dtype
from mopt.rules import check_leaves
from mopt.rules import check_threshold
from mopt.rules import count_entries
from mopt.rules import in_dtype
from mopt.rules import rule
from mopt.rules import unless
from mopt.rules import value_at

PyTree = Any

# Counts have 32 bits, one of them for the sign and one to spare.
_MOST = 2**30


def prune_to_sparsity(
  schedule: optax.ScalarOrSchedule,
  mask: Mask = None,
  scope: str = 'global',
  every: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
  """Prunes the smallest weights, so many that a given share is zero.

  For a network of a given size: a threshold leaves as many weights as the
  training has driven above it, this leaves the number that was asked for. The
  share usually rises, by `mopt.cubic_sparsity`.

  Of n weights the share s makes `round(s n)` zero (in float32 or the dtype of
  the share, a half to the even number), those that are smallest after the
  update, zeros first. That is the count, however many are equal: of equal
  magnitudes the first in the tree stay, in the order of its leaves and of rows.
  There are more zeros only where more weights are zero already, and fewer only
  where too many are not finite: these are kept, for divergence must not look
  like sparsity.

  Between two prunings weights move, zeros as well. To bring none of them back:
  `optax.chain(optimizer, mopt.keep_zeros(), mopt.prune_to_sparsity(...))`. It
  must be the last of a chain, as `mopt.prune_by_magnitude`.

  The threshold is found without sorting, one bit of it at a time: 31 passes
  over the magnitudes (63 in float64), and one more for each binary digit of
  their number where equal ones have to be told apart. With `every` more than 1
  the other updates do without.

  Args:
    schedule: the share of zeros, from 0 to 1, or a schedule of the number of
      updates before this one. What is traced cannot be refused: beyond 0 and 1
      it is taken as these, and nothing is pruned where it is not finite.
    mask: which leaves are pruned and make up n, see `mopt.mask_by_path`; `None`
      for all. Their sizes must add up to at most 2^30.
    scope: `'global'` to compare all weights with each other, the small layers
      against the large; `'leaf'` to make the share zero in each leaf.
    every: prune at every so many updates. May be traced; less than 1 is taken
      as 1 then.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.

  Raises:
    ValueError: for a share that is not from 0 to 1, another scope, or an
      `every` that is no integer >= 1; from `init` and `update` for a mask of
      another structure, or more than 2^30 weights; from `update` without
      `params`, or for updates of another shape than they.
    TypeError: from `init` and `update`, for a leaf to be pruned that is no
      array of real numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.1), mopt.prune_to_sparsity(0.5))
    >>> params = jnp.array([0.5, -0.1, 0.2, 0.2])
    >>> updates, state = tx.update(jnp.zeros(4), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates), state[-1].nonzeros)
    [0.5 0.  0.2 0. ] 2

    From none to 90 %, in steps of 100 updates:

    >>> share = mopt.cubic_sparsity(0.9, begin=1000, end=5000)
    >>> rule = mopt.prune_to_sparsity(share, every=100)
    >>> tx = optax.chain(optax.adam(1e-3), rule)

  References:
    Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning
    for model compression <https://arxiv.org/abs/1710.01878>`_, 2017.
  """
  if scope not in ('global', 'leaf'):
    raise ValueError(f"scope must be 'global' or 'leaf', got {scope!r}.")
  if not callable(schedule):
    _check_share(schedule)

  def reach(chosen, params):
    sizes = [np.size(x) for _, x in masked_leaves(chosen, params)]
    size = sum(sizes) if scope == 'global' else max(sizes, default=0)
    if size > _MOST:
      hint = ": see scope='leaf'." if scope == 'global' else '.'
      raise ValueError(
        f'prune_to_sparsity takes at most {_MOST} weights, got {size}{hint}'
      )
    return chosen

  def kept(weights, share, due):
    # Or one pass might round the sums otherwise than the next, and then counts
    # would not be exact.
    arrays = jax.lax.optimization_barrier([x.new for x in weights])
    groups = [arrays] if scope == 'global' else [[x] for x in arrays]
    return [k for x in groups for k in _all_but_smallest(x, share, due)]

  values = lambda count: value_at('schedule', schedule, count)
  return rule('prune_to_sparsity', mask, every, kept, values, reach)


def prune_n_of_m(
  n: int, m: int, mask: Mask = None, every: jax.typing.ArrayLike = 1
) -> optax.GradientTransformationExtraArgs:
  """Of each m weights in a row only the n largest stay.

  For hardware that multiplies such matrices faster: 2 of 4, on NVIDIA's GPUs
  since Ampere. A row runs along the input axis, the last but one of a kernel
  `[in, out]` or `[height, width, in, out]`: each output has its own. Where m
  does not divide that axis, the group at the end is smaller, and at most n of
  it stay. Of equal magnitudes the first stay. Weights that are not finite are
  kept, however many, and first of all.

  It must be the last of a chain, as `mopt.prune_by_magnitude`, or right before
  another rule. The choice is made anew at each pruning; put `mopt.keep_zeros`
  before it to hold it. It compares each weight with m, at each update, whatever
  `every` is.

  Args:
    n: how many stay of a group, 1 <= n <= m.
    m: the size of a group; in steps, so not more than tens.
    mask: which leaves are pruned, see `mopt.mask_by_path`; `None` for all. Of
      these only kernels are: leaves with at least two axes, not named `bias`.
      Leave out embeddings, and kernels whose input has several axes.
    every: prune at every so many updates. May be traced; less than 1 is taken
      as 1 then.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.

  Raises:
    ValueError: for n and m that are no integers with 1 <= n <= m, or an `every`
      that is no integer >= 1; from `init` and `update` for a mask of another
      structure, or leaves of which none is a kernel; from `update` without
      `params`, or for updates of another shape than they.
    TypeError: from `init` and `update`, for a leaf to be pruned that is no
      array of real numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.1), mopt.prune_n_of_m(2, 4))
    >>> params = {'kernel': jnp.array([[0.5], [-0.7], [0.1], [0.6]])}
    >>> updates, state = tx.update(
    ...   {'kernel': jnp.zeros((4, 1))}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)['kernel'].T)
    [[ 0.  -0.7  0.   0.6]]

  References:
    Mishra et al., `Accelerating sparse deep neural networks
    <https://arxiv.org/abs/2104.08378>`_, 2021; Zhou et al., `Learning N:M
    fine-grained structured sparse neural networks from scratch
    <https://arxiv.org/abs/2102.04010>`_, 2021.
  """
  n, m = check_integer('n', n, 1), check_integer('m', m, 1)
  if n > m:
    raise ValueError(f'n must be at most m, {m}, got {n}.')

  def reach(chosen, params):
    return _kernels('prune_n_of_m', chosen, params)

  def kept(weights, values, due):
    del values
    return [unless(due, _largest_of_groups(x.new, n, m)) for x in weights]

  return rule('prune_n_of_m', mask, every, kept, reach=reach)


def prune_units(
  threshold: optax.ScalarOrSchedule,
  mask: Mask = None,
  every: jax.typing.ArrayLike = 1,
) -> optax.GradientTransformationExtraArgs:
  """Prunes whole units and filters whose l2 norm falls below a threshold.

  A unit is all that has one place on the last axis of a kernel: the weights
  into one unit of a dense layer `[in, out]`, or one filter of a convolution
  `[height, width, in, out]`. Its bias, if the layer has one, is no part of the
  norm and becomes zero with it. For narrower layers rather than scattered
  zeros; `mopt.group_norm` is the penalty that drives units there.

  It must be the last of a chain, as `mopt.prune_by_magnitude`, or right before
  another rule. A unit whose norm is not finite is kept, and so is such a bias.
  It takes one pass over the kernels at each update.

  Args:
    threshold: positive, for norms in float32 (float64 for such kernels), whose
      squares overflow beyond 1e19 and vanish below 1e-19. A norm equal to it
      stays. Or a schedule of the number of updates before this one; where its
      value is not positive or not finite nothing is pruned.
    mask: which leaves are pruned, see `mopt.mask_by_path`; `None` for all. Of
      these only kernels are: leaves with at least two axes, not named `bias`.
      A leaf `bias` beside a leaf `kernel` goes with it, whether the mask has it
      or not. Leave out embeddings, and kernels whose output has several axes.
    every: prune at every so many updates. May be traced; less than 1 is taken
      as 1 then.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`; its
    `nonzeros` are those of the leaves of the mask.

  Raises:
    ValueError: for a threshold that is not positive and finite, or an `every`
      that is no integer >= 1; from `init` and `update` for a threshold that is
      0 or infinite in the dtype of the norm, a mask of another structure,
      leaves of which none is a kernel, or a bias that has not one entry for
      each unit; from `update` without `params`, or for updates of another shape
      than they.
    TypeError: from `init` and `update`, for a leaf to be pruned that is no
      array of real numbers.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> import optax
    >>> tx = optax.chain(optax.sgd(0.1), mopt.prune_units(0.1))
    >>> kernel = jnp.array([[0.3, 0.01], [0.4, 0.02]])
    >>> params = {'kernel': kernel, 'bias': jnp.ones(2)}
    >>> zeros = {'kernel': jnp.zeros((2, 2)), 'bias': jnp.zeros(2)}
    >>> updates, state = tx.update(zeros, tx.init(params), params)
    >>> new = optax.apply_updates(params, updates)
    >>> print(new['kernel'], new['bias'], state[-1].nonzeros)
    [[0.3 0. ]
     [0.4 0. ]] [1. 0.] 3

  References:
    Wen et al., `Learning structured sparsity in deep neural networks
    <https://arxiv.org/abs/1608.03665>`_, 2016; Li et al., `Pruning filters for
    efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2017.
  """
  if not callable(threshold):
    check_threshold('threshold', threshold)

  def reach(chosen, params):
    reached = _kernels('prune_units', chosen, params)
    kernels = [
      (path, jax.eval_shape(as_float, x))
      for path, x in masked_leaves(reached, params)
    ]
    check_leaves('threshold', threshold, kernels)
    return _with_biases(reached, params)

  def kept(weights, tau, due):
    norms = {
      split_layer(x.path): _unit_norms(x.new) for x in weights if x.new.ndim > 1
    }

    def keep(x):
      layer, name = split_layer(x.path)
      is_bias = name == 'bias'
      norm = norms[layer, 'kernel' if is_bias else name]
      is_kept = ~(norm < in_dtype(tau, norm.dtype))
      return is_kept.reshape(-1) | ~jnp.isfinite(x.new) if is_bias else is_kept

    return [unless(due, keep(x)) for x in weights]

  values = lambda count: value_at('threshold', threshold, count)
  return rule('prune_units', mask, every, kept, values, reach)


# -- The smallest of all ------------------------------------------------------


def _all_but_smallest(
  arrays: list[jax.Array], share: Any, due: Any
) -> list[jax.Array]:
  """Where weights stay when the share that is smallest goes."""
  if not arrays:
    return []
  keys = _magnitude_bits(arrays)
  number = _round(share, sum(x.size for x in arrays))
  last, place = _find_smallest(keys, number, due)

  def keep(key, position):
    return (key > last) | ((key == last) & (position < place))

  return list(map(keep, keys, _positions(keys)))


def _round(share: Any, size: int) -> jax.Array:
  """How many of `size` weights a share is, 0 for one that is not finite."""
  share = as_float(share)
  share = jnp.where(jnp.isfinite(share), jnp.clip(share, 0, 1), 0)
  return jnp.minimum(jnp.round(share * size).astype(jnp.int32), size)


def _magnitude_bits(arrays: list[jax.Array]) -> list[jax.Array]:
  """Unsigned integers in the order of magnitudes; NaN is the largest."""
  arrays = of_one_dtype(arrays)
  unsigned = jnp.uint64 if arrays[0].dtype.itemsize == 8 else jnp.uint32
  no_sign = unsigned(jnp.iinfo(unsigned).max >> 1)
  return [jax.lax.bitcast_convert_type(x, unsigned) & no_sign for x in arrays]


def _positions(arrays: list[jax.Array]) -> list[jax.Array]:
  """The place of each entry in the order of leaves and rows, from 0."""
  found, offset = [], 0
  for x in arrays:
    position = jnp.full((), offset, jnp.int32)
    for axis in range(x.ndim):
      stride = math.prod(x.shape[axis + 1 :])
      iota = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
      position = position + stride * iota
    found.append(position)
    offset += x.size
  return found


def _find_smallest(
  keys: list[jax.Array], number: jax.Array, due: Any
) -> tuple[jax.Array, jax.Array]:
  """What separates the `number` smallest keys from the others.

  Returns:
    The largest key among them, and a position: entries with that key stay
    before it, and go from there on. Without any, or where this is not due, it
    is the key 0, which goes: a zero.
  """
  dtype = keys[0].dtype
  digits = jnp.iinfo(dtype).bits - 1
  infinite = _magnitude_bits([jnp.array(jnp.inf, f'float{digits + 1}')])[0]
  size = sum(x.size for x in keys)

  def count(is_counted, *trees):
    return sum(map(count_entries, map(is_counted, *trees)))

  # Loops rather than a conditional around them, which takes longer than what
  # it spares: where pruning is not due they end at once.
  def add_digit(carry):
    digit, last, up_to = carry
    higher = last | (jnp.ones((), dtype) << digit.astype(dtype))
    below = count(lambda key: key < higher, keys)
    # What is not finite is above all.
    fits = (below < number) & (higher < infinite)
    last, up_to = jnp.where(fits, higher, last), jnp.where(fits, up_to, below)
    return digit - 1, last, up_to

  # The largest key with fewer keys below it, and how many are not above it.
  digit = jnp.where(due, jnp.int32(digits - 1), -1)
  start = digit, jnp.zeros((), dtype), jnp.int32(size)
  _, last, up_to = jax.lax.while_loop(lambda c: c[0] >= 0, add_digit, start)
  # None stay where all that have the key go, or too many are not finite.
  stay = up_to - number

  def is_open(carry):
    return (carry[0] >= 0) & (stay > 0) & (last > 0)

  def add_place(carry):
    digit, place = carry
    higher = place | (1 << digit)
    is_before = lambda key, position: (key == last) & (position < higher)
    fits = count(is_before, keys, _positions(keys)) <= stay
    return digit - 1, jnp.where(fits, higher, place)

  start = jnp.int32(size.bit_length() - 1), jnp.zeros((), jnp.int32)
  _, place = jax.lax.while_loop(is_open, add_place, start)
  return last, place


def _check_share(share: Any) -> None:
  known = known_numbers('schedule', share)
  if np.shape(share) != ():
    raise ValueError(
      f'schedule must be one number, got shape {np.shape(share)}.'
    )
  if known is not None and not 0 <= known <= 1:
    raise ValueError(f'schedule must give a share from 0 to 1, got {share}.')


# -- Groups and units ---------------------------------------------------------


def _largest_of_groups(x: jax.Array, n: int, m: int) -> jax.Array:
  """Where the n largest are, of each m along the last axis but one."""
  (keys,) = _magnitude_bits([x])
  *outer, size, width = x.shape
  groups = -(-size // m)
  # Where shards are a part of types each group has to be in one of them.
  spec = jax.typeof(x).sharding.spec
  is_explicit = any(axis is not None for axis in spec)
  *outer_spec, _, width_spec = spec
  split = jax.P(*outer_spec, None, None, width_spec) if is_explicit else None
  joined = jax.P(*outer_spec, None, width_spec) if is_explicit else None
  if is_explicit:
    keys = jax.reshard(keys, joined)
  # Behind all others, and of the least magnitude.
  padding = [(0, 0)] * len(outer) + [(0, groups * m - size), (0, 0)]
  keys = jnp.pad(keys, padding)
  keys = jnp.reshape(keys, (*outer, groups, m, width), out_sharding=split)
  places = jax.lax.broadcasted_iota(jnp.int32, keys.shape, keys.ndim - 2)

  def add_larger(k, rank):
    key = jax.lax.dynamic_slice_in_dim(keys, k, 1, keys.ndim - 2)
    return rank + ((key > keys) | ((key == keys) & (k < places)))

  rank = jnp.zeros_like(keys, jnp.int32)
  rank = jax.lax.fori_loop(0, m, add_larger, rank, unroll=min(m, 8))
  shape = *outer, groups * m, width
  largest = jnp.reshape(rank < n, shape, out_sharding=joined)
  largest = jax.lax.slice_in_dim(largest, 0, size, axis=-2)
  if is_explicit:
    largest = jax.reshard(largest, jax.P(*spec))
  return largest | ~jnp.isfinite(x)


def _unit_norms(x: jax.Array) -> jax.Array:
  """Norms of units, `[1, ..., 1, units]`."""
  squares = jnp.square(as_float(x))
  return jnp.sqrt(
    jnp.sum(squares, axis=tuple(range(x.ndim - 1)), keepdims=True)
  )


def _kernels(name: str, chosen: PyTree, params: PyTree) -> PyTree:
  """The mask of kernels among those that are chosen."""

  def is_kernel(path, leaf, is_chosen):
    is_weight = is_chosen and np.ndim(leaf) >= 2 and not is_integer(leaf)
    return is_weight and split_layer(path_name(path))[1] != 'bias'

  found = jax.tree_util.tree_map_with_path(is_kernel, params, chosen)
  leaves = masked_leaves(chosen, params)
  if leaves and not any(jax.tree.leaves(found)):
    shapes = ', '.join(f'{path!r} {np.shape(x)}' for path, x in leaves[:5])
    raise ValueError(
      f'{name} needs a kernel, a leaf with at least two axes that is not named '
      f"'bias', got {shapes}{' ...' if len(leaves) > 5 else ''}."
    )
  return found


def _with_biases(kernels: PyTree, params: PyTree) -> PyTree:
  """The mask of kernels and of the biases beside them."""
  units = {
    split_layer(path): np.shape(x)[-1]
    for path, x in masked_leaves(kernels, params)
  }

  def is_reached(path, leaf, is_kernel):
    path = path_name(path)
    layer, name = split_layer(path)
    count = units.get((layer, 'kernel')) if name == 'bias' else None
    if count is not None and np.shape(leaf) != (count,):
      raise ValueError(
        f'prune_units needs a bias of one entry for each of the {count} units '
        f'at {path!r}, got shape {np.shape(leaf)}: leave its kernel out of the '
        'mask.'
      )
    return is_kernel or count is not None

  return jax.tree_util.tree_map_with_path(is_reached, params, kernels)
