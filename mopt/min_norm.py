"""The Gramian of stacked gradients, and the weights of the min-norm element.

Problem (15) of Reiners et al., 2020: the shortest vector in the convex hull of
m gradients is a common descent direction. It depends on the gradients through
their inner products alone, so an `[m, m]` matrix is all that is solved for.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mopt import pairs
from mopt import quadratic_program
from mopt.checks import check_gramian
from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.masks import resolve_mask

PyTree = Any


def gramian(stacked: PyTree, mask: Mask = None) -> jax.Array:
  """Inner products of m stacked gradients, leaf by leaf, in float32.

  Each leaf is cast to float32 before it is multiplied (a bfloat16 product
  would lose the sum; float64 stays), and multiplied at the highest precision,
  since plain float32 matrix products run in TF32 on GPUs and in bfloat16 on
  TPUs. Leaves are not copied together. Sharded leaves stay where they are, but
  on CPUs where the mesh is automatic: there leaves are made flat, which
  gathers one that is sharded on its columns.

  Args:
    stacked: pytree with leaves `[m, *shape]`, m >= 2.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all. A
      function is shown the leaves without their leading axis.

  Returns:
    `[m, m]` f32, f64 if a leaf is, symmetric. Norms between 1e-18 and 1e19 are
    supported in f32: beyond, squares underflow to 0 or overflow to infinity.

  Raises:
    ValueError: if there is no leaf, or the leaves disagree about m.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> stacked = {'w': jnp.array([[3., 4.], [1., 0.]])}
    >>> print(mopt.gramian(stacked))
    [[25.  3.]
     [ 3.  1.]]
  """
  sizes = {np.shape(x)[:1] for x in jax.tree.leaves(stacked)}
  if len(sizes) != 1 or sizes == {()}:
    raise ValueError(
      'stacked gradients need leaves [m, ...] with one m, got leading axes '
      f'{sorted(sizes)}.'
    )
  ((m,),) = sizes
  return gramian_of(stacked, mask, m)


def gramian_of(stacked: PyTree, mask: Mask, m: int) -> jax.Array:
  """`gramian` of m gradients that have been checked; 0 if there is no leaf."""
  if callable(mask):
    unstacked = lambda tree: jax.tree.map(lambda x: x[0], tree)
    mask = resolve_mask(mask, jax.eval_shape(unstacked, stacked))
  total = jnp.zeros((m, m), jnp.float32)
  for _, leaf in masked_leaves(mask, stacked):
    leaf = jnp.asarray(leaf)
    leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    total = total + _gramian_of_leaf(leaf)
  return total


def _gramian_of_leaf(leaf: jax.Array) -> jax.Array:
  m = len(leaf)
  rest = tuple(range(1, leaf.ndim))
  on_cpu = jax.default_backend() == 'cpu'
  is_sharded = any(jax.typeof(leaf).sharding.spec)
  if on_cpu and not is_sharded:
    leaf = leaf.reshape(m, -1)  # of which a dot needs no copy
    rest = (1,)
  if m > 3:
    whole = jax.sharding.PartitionSpec(None, None) if is_sharded else None
    return jnp.tensordot(
      leaf,
      leaf,
      axes=(rest, rest),
      precision=jax.lax.Precision.HIGHEST,
      out_sharding=whole,
    )
  if on_cpu and not is_sharded:
    return _gramian_of_few(leaf)
  # Products that are summed as they are made.
  products = leaf[:, None] * leaf[None]
  return products.sum(axis=tuple(axis + 1 for axis in rest))


def _gramian_of_few(rows: jax.Array) -> jax.Array:
  """`rows @ rows.T` of a few long rows `[m, n]`, on CPUs.

  There a sum takes its terms one by one, each waiting for the last, and a dot
  of so few rows is no faster. Adding up sixteen parts of the products works on
  whole vectors instead, and a dot with ones sums what is left.
  """
  m, n = rows.shape
  length = -(-n // 16) if n > 1024 else max(n, 1)
  starts = range(0, max(n, 1), length)
  first, second = np.triu_indices(m)
  products = []
  for i, j in zip(first, second):
    parts = [rows[i, k : k + length] * rows[j, k : k + length] for k in starts]
    *full, last = parts
    last = jnp.pad(last, (0, length - len(last)))
    products.append(functools.reduce(jnp.add, full, last))
  ones = jnp.ones(length, rows.dtype)
  sums = jnp.matmul(
    jnp.stack(products), ones, precision=jax.lax.Precision.HIGHEST
  )
  half = jnp.zeros((m, m), rows.dtype).at[first, second].set(sums)
  return jnp.where(jnp.tri(m, dtype=bool), half.T, half)


def min_norm_weights(gramian: jax.Array) -> jax.Array:
  """Weights of the shortest convex combination of m gradients.

  Solves problem (15): minimise `w' G w` over `w >= 0, sum(w) = 1`. Two
  gradients have a closed form. More are solved by an active-set method that
  ends when no objective can improve the point, carried out in pairs of
  floats, so that it is exact in float32 even for gradients whose norms lie
  many decades apart. The result does not change when all gradients are scaled
  by one factor: there is no absolute tolerance. Weights are exactly 0 for
  gradients that do not take part. `kkt_residual` tells how far from optimal
  any weights are.

  It can be differentiated in both modes; more than two weights by the equations
  that hold at the solution, which gradients take part being held fixed.

  Degenerate cases: of equal gradients the first takes the weight; a zero
  gradient takes all of it, since no direction descends for that objective;
  opposite gradients cancel. A Gramian that is not finite gives weights that
  are all NaN, so that a diverging objective shows instead of being ignored.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite: the inner
      products of the gradients, see `gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is, non-negative, sum 1 up to rounding.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.min_norm_weights(jnp.array([[3., 0.], [0., 1.]])))
    [0.25 0.75]
    >>> print(mopt.min_norm_weights(jnp.array([[4., 2.], [2., 1.]])))
    [0. 1.]

  References:
    Reiners et al., 2020, equation (15).
    Désidéri, `Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012.
    Lawson and Hanson, `Solving Least Squares Problems
    <https://doi.org/10.1137/1.9781611971217>`_, 1974, chapter 23.
  """
  gramian = check_gramian(gramian)
  return _min_norm_weights(gramian)


@jax.jit  # Or a call outside of jit would compile its loop anew.
def _min_norm_weights(gramian: jax.Array) -> jax.Array:
  solve = _two_weights if len(gramian) == 2 else _many_weights
  gramian, is_finite = quadratic_program.harmless(gramian)
  return jnp.where(is_finite, solve(gramian), jnp.nan)


def kkt_residual(gramian: jax.Array, weights: jax.Array) -> jax.Array:
  """How far weights on the simplex are from solving problem (15).

  At the solution every gradient g_j has an inner product with d = sum w_j g_j
  of at least |d|^2. The residual is the largest shortfall,
  `max_j (|d|^2 - <g_j, d>)`: zero at the solution, and `|d|^2` exceeds the
  optimum by at most twice the residual.

  Args:
    gramian: `[m, m]`, the inner products of the gradients.
    weights: `[m]`, non-negative with sum 1.

  Returns:
    A scalar in the units of the Gramian, f32 or f64 as the arguments are,
    evaluated in pairs of floats.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> gramian = jnp.array([[3., 0.], [0., 1.]])
    >>> print(mopt.kkt_residual(gramian, jnp.array([0.25, 0.75])))
    0.0
    >>> print(mopt.kkt_residual(gramian, jnp.array([1., 0.])))
    3.0
  """
  gramian = check_gramian(gramian)
  weights = jnp.asarray(weights)
  if weights.shape != gramian.shape[:1]:
    raise ValueError(
      f'weights must be [{gramian.shape[0]}], got shape {weights.shape}.'
    )
  dtype = jnp.promote_types(gramian.dtype, weights.dtype)
  return _kkt_residual(gramian.astype(dtype), weights.astype(dtype))


@jax.jit
def _kkt_residual(gramian: jax.Array, weights: jax.Array) -> jax.Array:
  pair = pairs.from_array(weights)
  row = (pair[0][None], pair[1][None])
  slopes = pairs.total(pairs.mul(pairs.from_array(gramian), row))  # <g_j, d>
  squared = pairs.total(pairs.mul(slopes, pair))  # |d|^2
  shortfall = pairs.add((squared[0][None], squared[1][None]), pairs.neg(slopes))
  return jnp.max(pairs.to_array(shortfall, gramian.dtype))


def _two_weights(gramian: jax.Array) -> jax.Array:
  # Quarters, so that no difference or sum below overflows; scaling by a power
  # of two changes no digit.
  quarter = 0.25 * gramian
  g11, g12, g22 = quarter[0, 0], quarter[0, 1], quarter[1, 1]
  first, second = g11 - g12, g22 - g12  # both positive: the minimum is inside
  inside = (first > 0) & (second > 0)
  # The denominator is made harmless before the division, not after: a select
  # after it would still send NaN into a gradient of this function.
  weight = jnp.where(inside, first, 0) / jnp.where(inside, first + second, 1)
  at_second = (first > 0) & ~(second > 0)
  second_weight = jnp.where(at_second, 1, weight)
  first_weight = jnp.where(
    inside, second / jnp.where(inside, first + second, 1), 1 - second_weight
  )
  return jnp.stack([first_weight, second_weight])


# Square of the length, in units of the shortest gradient, that is as good as 0.
_VANISHING = 1e-13


@jax.custom_jvp
def _many_weights(gramian: jax.Array) -> jax.Array:
  """Solves (15) for any m; see `min_norm_weights`.

  With u = w / s the problem is homogeneous: minimise `u' C u / 2 - s' u` over
  u >= 0 and divide by `s' u` at the end. The scales s make the diagonal of C
  about 1.
  """
  unit, scale = quadratic_program.unit_scales(gramian)
  scaled = gramian * unit[:, None] * unit[None, :]
  # Scales are powers of two, 1 for the shortest gradient.
  scale = scale.astype(jnp.float32)
  u = quadratic_program.solve(
    quadratic_program.Program(
      matrix=pairs.from_array(scaled),
      linear=(-scale, jnp.zeros_like(scale)),
      size=scale,
    ),
    limit=1 / _VANISHING,
  )
  weights = pairs.to_array(u, gramian.dtype)
  weights = scale * (weights / jnp.max(weights))
  return weights / jnp.sum(weights)


@_many_weights.defjvp
def _many_weights_jvp(primals, tangents):
  """By the equations of the solution: equal slopes, weights that sum to 1."""
  (gramian,), (change,) = primals, tangents
  weights = _many_weights(gramian)
  unit, scale = quadratic_program.unit_scales(gramian)
  active = weights > 0
  both = active[:, None] & active[None, :]
  m = len(weights)
  scaled = gramian * unit[:, None] * unit[None, :]
  border = jnp.where(active, scale, 0)
  system = jnp.zeros((m + 1, m + 1), gramian.dtype)
  system = system.at[:m, :m].set(
    jnp.where(both, scaled, jnp.eye(m, dtype=gramian.dtype))
  )
  system = system.at[:m, m].set(border).at[m, :m].set(border)
  slopes = jnp.matmul(change, weights, precision=jax.lax.Precision.HIGHEST)
  # In units of the shortest gradient: w = scale u, and G = C / unit / unit.
  pull = jnp.where(active, unit * slopes * jnp.max(unit), 0)
  right = jnp.zeros(m + 1, gramian.dtype).at[:m].set(-pull)
  return weights, scale * jnp.linalg.solve(system, right)[:m]
