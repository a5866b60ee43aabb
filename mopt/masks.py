"""Which leaves of a parameter tree an operation acts on.

A *mask* is what `optax.masked` takes: a pytree of booleans with the structure
of the parameters, or a function from parameters to such a tree. `None` means
every leaf. `mask_by_path` turns a predicate on a leaf's path into such a
function; `dense_kernels` and `conv_kernels` are the two that the paper needs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree] | None


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
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: bool(predicate(path_name(path), leaf)), params
    )

  return mask_fn


def _kernels(params: PyTree, wanted: Callable[[int], bool]) -> PyTree:
  """Mask of the leaves named `kernel` whose number of axes is wanted."""

  def predicate(path, leaf):
    return path.rsplit('/', 1)[-1] == 'kernel' and wanted(np.ndim(leaf))

  return mask_by_path(predicate)(params)


def dense_kernels(params: PyTree) -> PyTree:
  """Mask of the kernels of dense layers: leaves `kernel` with two axes.

  These are the weights that the paper counts, penalises and prunes.

  Args:
    params: a parameter tree (arrays or shapes), named as Flax does.

  Returns:
    A tree of booleans.

  References:
    Reiners et al., 2020, section 6.1.
  """
  return _kernels(params, lambda axes: axes == 2)


def conv_kernels(params: PyTree) -> PyTree:
  """Mask of the kernels of convolutions: leaves `kernel` with more axes.

  These are the weights under the paper's l2 regularization.

  Args:
    params: a parameter tree (arrays or shapes), named as Flax does.

  Returns:
    A tree of booleans.

  References:
    Reiners et al., 2020, section 6.1.
  """
  return _kernels(params, lambda axes: axes > 2)


def resolve_mask(mask: Mask, tree: PyTree) -> PyTree:
  """The mask as a tree of Python booleans with the structure of `tree`.

  Args:
    mask: a pytree of booleans, a function from `tree` to one, or `None`.
    tree: the parameters (arrays or shapes).

  Returns:
    A pytree of `bool`, one for each leaf of `tree`.

  Raises:
    ValueError: if the structure differs or a leaf of the mask is no boolean.
  """
  if mask is None:
    return jax.tree.map(lambda _: True, tree)
  mask_tree = mask(tree) if callable(mask) else mask
  expected = jax.tree.structure(tree)
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

  return jax.tree_util.tree_map_with_path(as_bool, mask_tree)


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
