"""What all rules that prune share: exact zeros, a state, and checks.

A rule says which of the weights it keeps after an update. Here that becomes an
Optax transformation, whose updates give exactly +0.0 for the others.
"""

from collections.abc import Callable, Sequence
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


class PruneState(NamedTuple):
  """State of all rules that prune."""

  count: jax.Array  # shape=(), dtype=jnp.int32: updates so far.
  nonzeros: jax.Array  # shape=(), dtype=jnp.int32: in the masked leaves, after
  # the last update.


class Weights(NamedTuple):
  """A leaf that a rule acts on."""

  path: str
  old: jax.Array  # before the update
  new: jax.Array  # after it, were nothing pruned


def rule(
  name: str,
  mask: Mask,
  every: jax.typing.ArrayLike,
  kept: Callable[[Sequence[Weights], Any, Any], Sequence[jax.Array]],
  values: Callable[[jax.Array], Any] = lambda count: None,
  reach: Callable[[PyTree, PyTree], PyTree] = lambda chosen, params: chosen,
) -> optax.GradientTransformationExtraArgs:
  """The transformation that leaves what a rule keeps, and zeros the rest.

  Args:
    name: of the rule, for messages.
    mask: which leaves are counted, and pruned unless `reach` says otherwise.
    every: prune at every so many updates; checked here.
    kept: called as `kept(weights, values(count), due)`; gives an array of
      booleans for each of the weights, that broadcasts to it. `due` is True, or
      a traced boolean, where `every` is more than 1.
    values: what the rule has from schedules, at the number of updates before.
    reach: called as `reach(chosen, params)`; checks the leaves and gives the
      tree of booleans that says which the rule acts on.

  Returns:
    A `GradientTransformationExtraArgs` whose state is a `PruneState`.
  """
  every = _check_every(every)
  is_each = isinstance(every, int) and every == 1

  def select(params):
    chosen = weight_mask(mask, params)
    masked_leaves(chosen, params)  # or it raises
    return chosen, jax.tree.leaves(reach(chosen, params))

  def init_fn(params):
    count = jnp.zeros((), jnp.int32)
    chosen, _ = select(params)
    values(count)  # or the first update would fail
    return PruneState(count, nonzeros=_count(params, chosen))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        f'{name} needs the parameters: call update(updates, state, params).'
      )
    _check_shapes(name, updates, params)
    chosen, reached = select(params)
    # As Optax does: a schedule sees the count before this update.
    now = values(state.count)
    count = jnp.asarray(optax.safe_increment(state.count))
    due = True if is_each else count % every == 0

    updates = jax.tree.map(_as_weights, updates, params)
    leaves, structure = jax.tree.flatten(updates)
    weights = {}
    paths = jax.tree_util.tree_leaves_with_path(params)
    for k, (path, old) in enumerate(paths):
      if reached[k] and not is_integer(old):
        old = jnp.asarray(old)
        # The sum as apply_updates computes it.
        new = (old + leaves[k]).astype(old.dtype)
        weights[k] = Weights(path_name(path), old, new)
    for k, keep in zip(weights, kept(list(weights.values()), now, due)):
      leaves[k] = jnp.where(keep, leaves[k], -weights[k].old)
    updates = jax.tree.unflatten(structure, leaves)

    def add(param, update, is_chosen):
      return jnp.add(param, update) if is_chosen else param

    new = jax.tree.map(add, params, updates, chosen)
    return updates, PruneState(count, _count(new, chosen))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def unless(due: Any, keep: jax.Array) -> jax.Array:
  """Keeps all where pruning is not due."""
  return keep if due is True else keep | ~due


def _as_weights(update: Any, param: Any) -> Any:
  if is_integer(param):
    return update
  return jnp.asarray(update, jnp.asarray(param).dtype)


def in_dtype(
  threshold: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """A threshold in the dtype that it is compared in, 0 for no finite number."""
  tau = jnp.asarray(threshold, dtype)
  if isinstance(threshold, jax.Array):  # which may not have been looked at
    tau = jnp.where(tau < jnp.inf, tau, 0)  # or an infinite one would prune all
  return tau


def _count(params: PyTree, chosen: PyTree) -> jax.Array:
  counts = jax.tree.map(
    lambda x, is_chosen: count_entries(jnp.asarray(x)) if is_chosen else 0,
    params,
    chosen,
  )
  return sum(jax.tree.leaves(counts), jnp.zeros((), jnp.int32))


def count_entries(x: jax.Array) -> jax.Array:
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


def check_threshold(name: str, threshold: Any) -> None:
  """Raises unless this is one number of the right size, as far as is known."""
  known = known_numbers(name, threshold)
  shape = np.shape(threshold)
  if shape != ():
    raise ValueError(f'{name} must be one number, got shape {shape}.')
  # As optax.inject_hyperparams has it from a schedule that starts with 0.
  is_none = known == 0 and isinstance(threshold, jax.Array)
  limit = float(jnp.finfo(jnp.result_type(float)).max)
  if known is not None and not (0 < known <= limit or is_none):
    raise ValueError(
      f'{name} must be a positive finite number, got {threshold}.'
    )


def value_at(name: str, value: Any, count: jax.Array) -> Any:
  """Of a schedule its value, a real number; its size cannot be checked."""
  if not callable(value):
    return value
  schedule, value = value, value(count)
  if not isinstance(value, jax.Array):
    known_numbers(f'the value of {name}', value)
    value = jnp.asarray(value)
  if value.shape != () or not jnp.isrealobj(value):
    raise ValueError(
      f'{name} must give one real number, got shape {value.shape} and '
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


def check_leaves(
  name: str, threshold: Any, leaves: Sequence[tuple[str, Any]]
) -> None:
  """Raises unless the threshold means what it says in the dtype of each."""
  known = None
  if not callable(threshold):
    known = known_numbers(name, threshold)
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
        f'{name} {threshold} is {tau} in {dtype}, the dtype of {path!r}, '
        f'and would prune {"none" if tau < least else "all"} of its weights.'
      )


def _check_shapes(name: str, updates: PyTree, params: PyTree) -> None:
  def check(path, update, param):
    if jnp.shape(update) != jnp.shape(param):
      raise ValueError(
        f'{name} must be the last of a chain, where updates have '
        f'the shape of the parameters: expected {jnp.shape(param)} at '
        f'{path_name(path)!r}, got {jnp.shape(update)}.'
      )

  jax.tree_util.tree_map_with_path(check, updates, params)
