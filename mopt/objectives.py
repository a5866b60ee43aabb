"""Objectives on the parameters alone, and what they count.

An objective is a function `objective(params, *args) -> scalar`.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.masks import weight_mask

PyTree = Any
Objective = Callable[..., Any]


def as_float(x: Any) -> jax.Array:
  """In float32, or float64 if it is that: half precision is not summed."""
  dtype = getattr(x, 'dtype', jnp.result_type(float))
  dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))
  return jnp.asarray(x, dtype)


def of_one_dtype(arrays: Sequence[Any]) -> list[jax.Array]:
  """All of them in float32, or in float64 if one of them is."""
  arrays = [as_float(x) for x in arrays]
  dtype = functools.reduce(
    jnp.promote_types, [x.dtype for x in arrays], jnp.dtype(jnp.float32)
  )
  return [x.astype(dtype) for x in arrays]


def _sum_over(
  term: Callable[[jax.Array], jax.Array], params: PyTree, mask: Mask
) -> jax.Array:
  """The sum of `term` over the entries of the weights."""
  leaves = masked_leaves(weight_mask(mask, params), params)
  sums = of_one_dtype([jnp.sum(term(as_float(x))) for _, x in leaves])
  return sum(sums[1:], sums[0]) if sums else jnp.zeros((), jnp.float32)


def l1_norm(params: PyTree, mask: Mask = None) -> jax.Array:
  """Sum of absolute values, with subgradient `sign(w)`: 0 at 0.

  `jax.grad(jnp.abs)(0.)` is 1, so that a plain l1 pushes every pruned weight
  away from zero. Here a weight that is zero stays at rest.

  Args:
    params: pytree of arrays.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> w = jnp.array([-2.0, 0.0, 3.0])
    >>> print(mopt.l1_norm(w), jax.grad(mopt.l1_norm)(w))
    5.0 [-1.  0.  1.]

  References:
    Reiners et al., 2020, equation (4).
  """
  # x * sign(x) with the sign held fixed: value |x|, derivative sign(x).
  term = lambda x: x * jax.lax.stop_gradient(jnp.sign(x))
  return _sum_over(term, params, mask)


def l2_norm_squared(params: PyTree, mask: Mask = None) -> jax.Array:
  """Sum of squares, without the factor 1/2 of the paper's equation (3).

  Args:
    params: pytree of arrays.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.l2_norm_squared({'w': jnp.array([3.0, 4.0])}))
    25.0
  """
  return _sum_over(jnp.square, params, mask)


def _check_scale(name: str, value: float) -> None:
  # Beyond these terms are 0 / 0 or 0 * inf.
  limits = jnp.finfo(jnp.float32)
  if not float(limits.tiny) <= value <= float(limits.max):
    raise ValueError(f'{name} must be positive, a normal float32, got {value}.')


def lp_norm(
  params: PyTree, p: float, mask: Mask = None, smoothing: float = 1e-3
) -> jax.Array:
  """Sum of smoothed p-th powers, 0 < p < 1: between l1 and counting.

  `|w|^p` has an infinite slope at 0. With smoothing e each term is
  `(w^2 + e^2)^(p/2) - e^p`: 0 at 0 with derivative 0, and within `e^p` of
  `|w|^p` everywhere. No root is taken of the sum.

  Args:
    params: pytree of arrays, `|w|` below `1e18 * smoothing`.
    p: the exponent, 0 < p < 1. Above: `l1_norm`, `l2_norm_squared`.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.
    smoothing: e > 0, in the units of the weights; a normal float32.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Raises:
    ValueError: for `p` or `smoothing` out of range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> w = jnp.array([0.0, 4.0])
    >>> print(round(float(mopt.lp_norm(w, p=0.5, smoothing=1e-6)), 2))
    2.0
  """
  if not 0 < p < 1:
    raise ValueError(
      f'p must lie between 0 and 1, got {p}: use l1_norm for 1 and '
      'l2_norm_squared for 2.'
    )
  _check_scale('smoothing', smoothing)

  def term(x):
    # The same as the docstring's difference, without its cancellation.
    ratio = x / smoothing
    return smoothing**p * jnp.expm1(0.5 * p * jnp.log1p(jnp.square(ratio)))

  return _sum_over(term, params, mask)


def log_sum_norm(
  params: PyTree, mask: Mask = None, eps: float = 0.1
) -> jax.Array:
  """Sum of logarithms, `eps log(1 + |w| / eps)`: l1 for small weights.

  A small weight is pulled towards 0 as by `l1_norm`, with the slope 1, and a
  large one hardly: the slope is `eps / (eps + |w|)`. So those that stay shrink
  less, at a price: it is not convex. At 0 the subgradient is 0, and a weight
  that is zero stays at rest.

  Args:
    params: pytree of arrays, `|w|` below `1e38 * eps`.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.
    eps: where the slope is a half, > 0, in the units of the weights; a normal
      float32. The larger, the nearer to l1.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Raises:
    ValueError: for an `eps` out of range.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> w = jnp.array([0.0, 0.1])
    >>> round(float(mopt.log_sum_norm(w)), 4)
    0.0693
    >>> print(jax.grad(mopt.log_sum_norm)(w))
    [0.  0.5]

  References:
    Candès, Wakin and Boyd, `Enhancing Sparsity by Reweighted l1 Minimization
    <https://doi.org/10.1007/s00041-008-9045-x>`_, 2008, section 2.2.
  """
  _check_scale('eps', eps)

  def term(x):
    # |x| with the sign held fixed, as in l1_norm.
    size = x * jax.lax.stop_gradient(jnp.sign(x))
    return eps * jnp.log1p(size / eps)

  return _sum_over(term, params, mask)


def group_norm(params: PyTree, mask: Mask = None) -> jax.Array:
  """Group lasso: the l2 norms of what enters each unit or filter, summed.

  A group is all that has one place on the last axis of a leaf: the weights into
  one unit of a dense kernel `[in, out]`, or one filter of a convolution
  `[height, width, in, out]`. As l1 does with weights, this drives whole groups
  to zero, which a narrower layer can leave out. Groups are not scaled by their
  size. The gradient of a group that is all zeros is taken as 0, one of the
  subgradients there, so that it stays at rest.

  Args:
    params: pytree of arrays; leaves with fewer than two axes, such as biases,
      have no groups and add nothing.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    >>> print(mopt.group_norm({'kernel': kernel, 'bias': jnp.ones(2)}))
    5.0

  References:
    Yuan and Lin, `Model selection and estimation in regression with grouped
    variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006; for
    networks Wen et al., `Learning Structured Sparsity in Deep Neural Networks
    <https://arxiv.org/abs/1608.03665>`_, 2016.
  """

  def norms(x):
    if x.ndim < 2:
      return jnp.zeros((), x.dtype)
    axes = tuple(range(x.ndim - 1))
    # Squares neither overflow nor vanish; the largest is held fixed, for it
    # cancels.
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    largest = jax.lax.stop_gradient(largest)
    is_zero = largest == 0
    scale = jnp.where(is_zero | ~jnp.isfinite(largest), 1, largest)
    squares = jnp.sum(jnp.square(x / scale), axis=axes, keepdims=True)
    # Twice, since a gradient of the root at 0 would be infinite times 0.
    root = jnp.sqrt(jnp.where(is_zero, 1, squares))
    return scale * jnp.where(is_zero, 0, root)

  return _sum_over(norms, params, mask)


class NonzeroCount(NamedTuple):
  """How many entries differ from zero (NaN does), and how many there are."""

  total: jax.Array  # shape=(), dtype=jnp.int32.
  per_leaf: dict[str, jax.Array]  # path of the leaf -> shape=(), jnp.int32.
  size: int = 0  # Entries, zeros too; an array where a transformation made one.
  size_per_leaf: dict[str, int] = {}  # path of the leaf -> entries.


def count_nonzero(params: PyTree, mask: Mask = None) -> NonzeroCount:
  """Counts the nonzero entries, in total and for each leaf.

  Args:
    params: pytree of arrays with fewer than 2^31 entries in all.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A `NonzeroCount`: `total` and `size`, and both for each leaf, keyed by path.
    Leaves whose paths are the same text, `{'a/b': x, 'a': {'b': y}}`, are
    counted together.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> params = {'a': jnp.array([0.0, 1.0]), 'b': jnp.ones(3)}
    >>> count = mopt.count_nonzero(params)
    >>> int(count.total), {k: int(v) for k, v in count.per_leaf.items()}
    (4, {'a': 1, 'b': 3})
    >>> count.size, count.size_per_leaf
    (5, {'a': 2, 'b': 3})

  References:
    Reiners et al., 2020, equation (5).
  """
  per_leaf: dict[str, jax.Array] = {}
  sizes: dict[str, int] = {}
  for path, x in masked_leaves(weight_mask(mask, params), params):
    count = jnp.sum(x != 0, dtype=jnp.int32)
    per_leaf[path] = per_leaf[path] + count if path in per_leaf else count
    sizes[path] = sizes.get(path, 0) + np.size(x)
  total = sum(per_leaf.values(), jnp.zeros((), jnp.int32))
  return NonzeroCount(total, per_leaf, sum(sizes.values()), sizes)
