"""Which leaves of a parameter tree an operation acts on.

A *mask* is what `optax.masked` takes: a pytree of booleans with the structure
of the parameters, or a function from parameters to such a tree. `None` means
every leaf, `True` and `False` all of them and none. `mask_by_path` turns a
predicate on a leaf's path into such a function; `dense_kernels` and
`conv_kernels` are the two that the paper needs.

A function that selects nothing although there are leaves is an error, for it
was meant to find something: layers may be named otherwise. A tree of `False`,
the single `False`, and a tree without leaves select nothing in peace.
"""

from collections.abc import Callable
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree] | bool | None

# Layers that Flax names by itself, and that are no convolutions however many
# axes their kernels have.
_DENSE_LAYER = re.compile(
  r'(Dense|DenseGeneral|Linear|LinearGeneral|Einsum)_\d+'
)


def path_name(path: tuple[Any, ...]) -> str:
  """The path of a leaf as text, e.g. `'params/layer1/kernel'`."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def mask_by_path(
  predicate: Callable[[str, Any], bool],
) -> Callable[[PyTree], PyTree]:
  """Makes a mask from a predicate on the path (and the leaf).

  Args:
    predicate: called as `predicate(path, leaf)` with the path as text, its
      parts joined by `/`, and the leaf (an array or its shape).

  Returns:
    A function from a parameter tree to a tree of booleans, which every `mask`
    argument here and in Optax accepts.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> params = {'layer1': {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}}
    >>> mopt.mask_by_path(lambda path, leaf: path.startswith('layer1'))(params)
    {'layer1': {'bias': True, 'kernel': True}}
    >>> mopt.dense_kernels(params)
    {'layer1': {'bias': False, 'kernel': True}}
  """

  def mask_fn(params: PyTree) -> PyTree:
    if _is_count(params):
      raise ValueError(
        f'a mask was called with {params}, as optax.inject_hyperparams calls '
        "what it takes for a schedule: name it there, static_args=('mask',)."
      )
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: bool(predicate(path_name(path), leaf)), params
    )

  return mask_fn


def _is_count(params: PyTree) -> bool:
  is_array = isinstance(params, (jax.Array, np.ndarray, np.generic, int))
  return is_array and np.ndim(params) == 0 and is_integer(params)


def dense_kernels(params: PyTree) -> PyTree:
  """Mask of the kernels of dense layers: leaves `kernel` with two axes.

  These are the weights that the paper counts, penalises and prunes. With more
  axes those of attention are dense too: three under `query`, `key` and `value`,
  and under `out` beside them; and those of layers that Flax has named
  `DenseGeneral_0`, `Dense_0`, `Einsum_0` and so on. More than names and axes is
  not known here: select other layers by `mopt.mask_by_path`.

  Args:
    params: a parameter tree (arrays or shapes), named as Flax does: of linen,
      boxed or not (`nn.with_partitioning`), an NNX state, or an NNX module.

  Returns:
    A tree of booleans.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> mopt.dense_kernels({
    ...     'query': {'kernel': jnp.ones((4, 2, 2))},
    ...     'conv': {'kernel': jnp.ones((3, 1, 8))},
    ... })
    {'conv': {'kernel': False}, 'query': {'kernel': True}}

  References:
    Reiners et al., 2020, section 6.1.
  """
  return _kernels(params, dense=True)


def conv_kernels(params: PyTree) -> PyTree:
  """Mask of the kernels of convolutions: leaves `kernel` with more axes.

  These are the weights under the paper's l2 regularization. What has three axes
  or more and is no convolution is listed at `mopt.dense_kernels`.

  Args:
    params: a parameter tree (arrays or shapes), see `mopt.dense_kernels`.

  Returns:
    A tree of booleans.

  References:
    Reiners et al., 2020, section 6.1.
  """
  return _kernels(params, dense=False)


def _kernels(params: PyTree, dense: bool) -> PyTree:
  """Mask of the leaves named `kernel`, of dense layers or of the others."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  layers = {_layer(path_name(path)) for path, _ in leaves}

  def predicate(path, leaf):
    layer, axes = _layer(path), np.ndim(leaf)
    if layer is None or axes < 2:
      return False
    above, _, name = layer.rpartition('/')
    is_attention = name in ('query', 'key', 'value') or (
      name == 'out' and f'{above}/query'.lstrip('/') in layers
    )
    is_dense = (
      axes == 2
      or (axes == 3 and is_attention)
      or _DENSE_LAYER.fullmatch(name) is not None
    )
    return is_dense == dense

  return mask_by_path(predicate)(params)


def _layer(path: str) -> str | None:
  """The path of the layer whose kernel this is, `None` if it is no kernel."""
  layer, name = split_layer(path)
  return layer if name == 'kernel' else None


def split_layer(path: str) -> tuple[str, str]:
  """The path of the layer of a leaf, and the name of the leaf in there."""
  # A box has one leaf, its value: of Flax NNX, and of partitioned parameters.
  layer, _, name = path.removesuffix('/value').rpartition('/')
  return layer, name


def resolve_mask(mask: Mask, tree: PyTree) -> PyTree:
  """The mask as a tree of Python booleans with the structure of `tree`.

  Args:
    mask: a pytree of booleans, a function from `tree` to one, one boolean for
      all leaves, or `None` for all.
    tree: the parameters (arrays or shapes).

  Returns:
    A pytree of `bool`, one for each leaf of `tree`.

  Raises:
    ValueError: if the structure differs or a leaf of the mask is no boolean, or
      for a function that selects none of at least one leaf.
  """
  if mask is None or isinstance(mask, (bool, np.bool_)):
    return jax.tree.map(lambda _: mask is None or bool(mask), tree)
  expected = jax.tree.structure(tree)
  # A tree may be callable as well: the modules of Flax NNX are.
  is_tree = jax.tree.structure(mask) == expected and not _is_leaf(mask)
  is_function = callable(mask) and not is_tree
  mask_tree = mask(tree) if is_function else mask
  found = jax.tree.structure(mask_tree)
  if found != expected:
    raise ValueError(
      'mask must have the structure of the parameters, a boolean for each '
      f'leaf: expected {expected}, got {found}.'
    )

  def as_bool(path, leaf):
    if isinstance(leaf, (bool, np.bool_)):
      return bool(leaf)
    raise ValueError(
      f'mask must hold a Python boolean for each leaf, got {leaf!r} at '
      f'{path_name(path)!r}.'
    )

  resolved = jax.tree_util.tree_map_with_path(as_bool, mask_tree)
  chosen = jax.tree.leaves(resolved)
  if is_function and chosen and not any(chosen):
    raise ValueError(_none_selected(mask, tree))
  return resolved


def _is_leaf(x: Any) -> bool:
  return jax.tree_util.treedef_is_leaf(jax.tree.structure(x))


def _none_selected(mask: Any, tree: PyTree) -> str:
  paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
  names = ', '.join(map(repr, paths[:5]))
  more = f' and {len(paths) - 5} more' if len(paths) > 5 else ''
  return (
    f'the mask {getattr(mask, "__name__", mask)} selects none of the leaves '
    f'{names}{more}. See mopt.mask_by_path; a tree of booleans, or False, may '
    'select none.'
  )


def weight_mask(mask: Mask, tree: PyTree) -> PyTree:
  """`resolve_mask`, but `None` passes over leaves of integers and booleans.

  Those are counters and the like, and no weights unless a mask names them, or
  one is all that there is: an array that is no leaf of anything else.
  """
  if mask is None and not _is_leaf(tree):
    return jax.tree.map(lambda leaf: not is_integer(leaf), tree)
  return resolve_mask(mask, tree)


def is_integer(leaf: Any) -> bool:
  """Whether a leaf (an array, a shape or a number) has integers or booleans."""
  dtype = getattr(leaf, 'dtype', None)
  if dtype is None:
    return isinstance(leaf, int)
  return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_))


def masked_leaves(mask: Mask, tree: PyTree) -> list[tuple[str, Any]]:
  """The leaves that a mask selects, each with its path, in tree order.

  Raises:
    TypeError: if one of them is no array of real numbers.
  """
  chosen = jax.tree.leaves(resolve_mask(mask, tree))
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  found = [(path_name(p), x) for (p, x), keep in zip(leaves, chosen) if keep]
  for path, leaf in found:
    if not _is_real(leaf):
      raise TypeError(
        f'expected an array of real numbers at {path!r}, got {leaf!r}.'
      )
  return found


def _is_real(leaf: Any) -> bool:
  # What is traced is a jax.Array, too.
  if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
    return False
  dtype = getattr(leaf, 'dtype', type(leaf))
  kinds = jnp.floating, jnp.integer, jnp.bool_
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)
