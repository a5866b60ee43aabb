"""The Gramian of stacked gradients, and the weights of the min-norm element.

Problem (15) of Reiners et al., 2020: the shortest vector in the convex hull of
m gradients is a common descent direction. It depends on the gradients through
their inner products alone, so an `[m, m]` matrix is all that is solved for.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mopt.masks import Mask
from mopt.masks import masked_leaves

PyTree = Any
# A float32 pair (high, low) whose sum carries about 48 bits.
_Double = tuple[jax.Array, jax.Array]


def gramian(stacked: PyTree, mask: Mask = None) -> jax.Array:
  """Inner products of m stacked gradients, leaf by leaf, in float32.

  Each leaf is cast to float32 before it is multiplied (a bfloat16 product
  would lose the sum), and multiplied at the highest precision, since plain
  float32 matrix products run in TF32 on GPUs and in bfloat16 on TPUs. Leaves
  are not copied together, and on GPUs and TPUs not reshaped either, so that
  shards stay where they are.

  Args:
    stacked: pytree with leaves `[m, *shape]`, m >= 2.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all. A
      function is shown the leaves without their leading axis.

  Returns:
    `[m, m]` f32, symmetric. Norms between 1e-18 and 1e19 are supported:
    beyond, squares underflow to 0 or overflow to infinity.

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
  if mask is not None and callable(mask):
    mask = mask(
      jax.eval_shape(lambda t: jax.tree.map(lambda x: x[0], t), stacked)
    )
  total = jnp.zeros((m, m), jnp.float32)
  on_cpu = jax.default_backend() == 'cpu'
  for _, leaf in masked_leaves(mask, stacked):
    leaf = jnp.asarray(leaf, jnp.float32)
    if on_cpu:
      leaf = leaf.reshape(m, -1)  # of which a dot needs no copy
    rest = tuple(range(1, leaf.ndim))
    if m > 3:
      total += jnp.tensordot(
        leaf, leaf, axes=(rest, rest), precision=jax.lax.Precision.HIGHEST
      )
    elif on_cpu:
      total += _gramian_of_few(leaf)
    else:
      # Products that are summed as they are made.
      products = leaf[:, None] * leaf[None]
      total += products.sum(axis=tuple(axis + 1 for axis in rest))
  return total


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
  sums = jnp.matmul(
    jnp.stack(products), jnp.ones(length), precision=jax.lax.Precision.HIGHEST
  )
  half = jnp.zeros((m, m)).at[first, second].set(sums)
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

  Degenerate cases: of equal gradients the first takes the weight; a zero
  gradient takes all of it, since no direction descends for that objective;
  opposite gradients cancel. A Gramian that is not finite gives weights that
  are all NaN, so that a diverging objective shows instead of being ignored.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite: the inner
      products of the gradients, see `gramian`.

  Returns:
    `[m]` f32, non-negative, sum 1 up to rounding.

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
  gramian = _check_gramian(gramian)
  solve = _two_weights if gramian.shape[0] == 2 else _active_set_weights
  finite = jnp.all(jnp.isfinite(gramian))
  # The solver sees a harmless matrix instead of NaN, on which it might spin.
  weights = solve(jnp.where(finite, gramian, jnp.eye(gramian.shape[0])))
  return jnp.where(finite, weights, jnp.nan)


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
    A scalar f32, in the units of the Gramian, evaluated in pairs of floats.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> gramian = jnp.array([[3., 0.], [0., 1.]])
    >>> print(mopt.kkt_residual(gramian, jnp.array([0.25, 0.75])))
    0.0
    >>> print(mopt.kkt_residual(gramian, jnp.array([1., 0.])))
    3.0
  """
  gramian = _check_gramian(gramian)
  weights = jnp.asarray(weights, jnp.float32)
  if weights.shape != gramian.shape[:1]:
    raise ValueError(
      f'weights must be [{gramian.shape[0]}], got shape {weights.shape}.'
    )
  zero = jnp.zeros_like(gramian)
  products = _mul((gramian, zero), (weights[None, :], zero[:1]))
  slopes = _sum(products, axis=1)  # <g_j, d>
  squared = _sum(_mul(slopes, (weights, zero[0])), axis=0)  # |d|^2
  shortfall = _add((squared[0][None], squared[1][None]), _neg(slopes))
  return jnp.max(shortfall[0])


def _check_gramian(gramian: jax.Array) -> jax.Array:
  gramian = jnp.asarray(gramian, jnp.float32)
  if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
    raise ValueError(f'gramian must be [m, m], got shape {gramian.shape}.')
  if gramian.shape[0] < 2:
    raise ValueError(
      f'gramian must have m >= 2 objectives, got m = {gramian.shape[0]}.'
    )
  return gramian


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
  second_weight = jnp.where(at_second, 1.0, weight)
  first_weight = jnp.where(
    inside, second / jnp.where(inside, first + second, 1), 1 - second_weight
  )
  return jnp.stack([first_weight, second_weight])


# On about normalised gradients. The ridge on the diagonal bounds a solution
# that would grow without end where gradients span 0; the others sit above it.
_RIDGE = 1e-12
_SLOPE_TOLERANCE = 1e-11
_VANISHING = 1e-10
# Least curvature of an exchange, see `_principal_pivot`.
_CURVATURE = 1e-11


class _Search(NamedTuple):
  """Where the active-set method stands; a pair of floats for each number."""

  table: _Double  # [m, m + 1]: [C | -s] after the exchanges so far.
  active: jax.Array  # [m], dtype=bool: which objectives take part.
  u: jax.Array  # [m]: the current point, not negative.
  gain: _Double  # []: s' u at the last optimum of a face.
  best: jax.Array  # [m]: that optimum.
  done: jax.Array  # [], dtype=bool.


def _active_set_weights(gramian: jax.Array) -> jax.Array:
  """Solves (15) for any m; see `min_norm_weights`.

  With u = w / s the problem is homogeneous: minimise `u' C u / 2 - s' u` over
  u >= 0 and divide by `s' u` at the end. The scales s make the diagonal of C
  about 1. The method of Lawson and Hanson adds the objective with the steepest
  slope and drops one that would turn negative; each such exchange is a
  principal pivot of the tableau `[C | -s]`, whose last column then holds u for
  the objectives that take part and the slopes for the others.
  """
  m = gramian.shape[0]
  diagonal = jnp.diagonal(gramian)
  # Powers of two: scaling by them is exact. The shortest gradient gets s = 1.
  exponent = -jnp.floor(0.5 * jnp.log2(jnp.maximum(diagonal, 1e-37)) + 0.5)
  exponent = exponent.astype(jnp.int32)
  scale = jnp.ldexp(jnp.ones(m), exponent - jnp.max(exponent))
  unit = jnp.ldexp(jnp.ones(m), exponent)
  scaled = gramian * unit[:, None] * unit[None, :]
  zero = jnp.zeros_like(scaled)
  high, low = _add((scaled, zero), (_RIDGE * jnp.eye(m), zero))
  table = (
    jnp.concatenate([high, -scale[:, None]], axis=1),
    jnp.concatenate([low, zero[:, :1]], axis=1),
  )
  first = jnp.argmin(diagonal)
  start = jnp.where(jnp.arange(m) == first, 1.0, 0.0)
  final = jax.lax.while_loop(
    lambda search: ~search.done,
    functools.partial(_exchange, scale),
    _Search(
      table=_principal_pivot(table, first),
      active=start > 0,
      u=start,
      gain=(zero[0, 0], zero[0, 0]),
      best=start,
      done=jnp.zeros((), bool),
    ),
  )
  weights = scale * (final.best / jnp.max(final.best))
  return weights / jnp.sum(weights)


def _exchange(scale: jax.Array, search: _Search) -> _Search:
  """Lets one objective enter, or one leave. Ends, for no face is met twice."""
  active, u = search.active, search.u
  index = jnp.arange(len(u))
  last = (search.table[0][:, -1], search.table[1][:, -1])
  zero = jnp.zeros_like(scale)
  optimum = _select(active, last, (zero, zero))  # of this face, if feasible
  target = optimum[0]
  blocked = active & ~(target > 0)
  feasible = ~jnp.any(blocked)
  # s'u grows from one feasible face to the next; what does not is rounding.
  gain = _sum(_mul(optimum, (scale, zero)), axis=0)
  progress = feasible & _less(search.gain, gain)
  slope = jnp.where(active, jnp.inf, last[0])
  entering = jnp.argmin(slope)
  optimal = ~(slope[entering] < -_SLOPE_TOLERANCE * scale[entering])
  # 1 / s'u is the square of the shortest vector: as good as zero, in units of
  # the shortest gradient, where rounding has the last word.
  vanishing = gain[0] > 1 / _VANISHING
  done = feasible & (optimal | ~progress | vanishing)
  # Where the optimum is out of reach: walk there until a weight gets to 0.
  step = jnp.where(blocked, u / jnp.where(blocked, u - target, 1), jnp.inf)
  step = jnp.where(blocked & ~(step >= 0), 0, step)  # 0 / 0
  leaving = jnp.argmin(step)
  moved = jnp.maximum(u + jnp.min(step) * (target - u), 0)
  moved = jnp.where(active & (index != leaving), moved, 0)
  pivot = jnp.where(feasible, entering, leaving)
  return _Search(
    table=_principal_pivot(search.table, pivot),
    active=jnp.where(index == pivot, feasible, active),
    u=jnp.where(feasible, target, moved),
    gain=_select(feasible, gain, search.gain),
    best=jnp.where(progress, target, search.best),
    done=done,
  )


def _principal_pivot(table: _Double, k: jax.Array) -> _Double:
  """Exchanges variable and slope k in the tableau `[m, m + 1]`."""
  row = (table[0][k], table[1][k])
  column = (table[0][:, k], table[1][:, k])
  pivot = (row[0][k], row[1][k])
  # Of a rank-deficient Gramian, rounding may leave a curvature below zero. It
  # is lifted, as if the diagonal of C had been that much larger.
  flat = ~(pivot[0] > _CURVATURE)
  reciprocal = _reciprocal(
    _select(flat, (jnp.float32(_CURVATURE), jnp.float32(0)), pivot)
  )
  scaled_column = _mul(column, reciprocal)
  update = _mul(
    (scaled_column[0][:, None], scaled_column[1][:, None]),
    (row[0][None, :], row[1][None, :]),
  )
  new = _add(table, _neg(update))
  scaled_row = _neg(_mul(row, reciprocal))
  m = table[0].shape[0]
  in_row = (jnp.arange(m) == k)[:, None]
  in_column = (jnp.arange(m + 1) == k)[None, :]
  new = _select(in_row, (scaled_row[0][None, :], scaled_row[1][None, :]), new)
  new = _select(
    in_column & ~in_row,
    (scaled_column[0][:, None], scaled_column[1][:, None]),
    new,
  )
  return _select(in_row & in_column, reciprocal, new)


# Arithmetic on pairs of floats: Dekker, `A floating-point technique for
# extending the available precision <https://doi.org/10.1007/BF01397083>`_,
# 1971. A compiler may contract a * b + c into one rounding; the products below
# are exact, so that this cannot change them.


def _two_sum(a: jax.Array, b: jax.Array) -> _Double:
  s = a + b
  t = s - a
  return s, (a - (s - t)) + (b - t)


def _halves(a: jax.Array) -> _Double:
  """a as two numbers of 12 bits, whose products are exact."""
  bits = jax.lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
  high = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return high, a - high


def _two_product(a: jax.Array, b: jax.Array) -> _Double:
  (ah, al), (bh, bl) = _halves(a), _halves(b)
  middle, rest = _two_sum(ah * bl, al * bh)
  high, low = _two_sum(ah * bh, middle)
  return _two_sum(high, low + (rest + al * bl))


def _add(a: _Double, b: _Double) -> _Double:
  s, e = _two_sum(a[0], b[0])
  t, f = _two_sum(a[1], b[1])
  s, e = _two_sum(s, e + t)
  return _two_sum(s, e + f)


def _mul(a: _Double, b: _Double) -> _Double:
  p, e = _two_product(a[0], b[0])
  return _two_sum(p, e + (a[0] * b[1] + a[1] * b[0]))


def _neg(a: _Double) -> _Double:
  return -a[0], -a[1]


def _reciprocal(a: _Double) -> _Double:
  guess = 1.0 / a[0]
  one = (jnp.ones_like(a[0]), jnp.zeros_like(a[0]))
  start = (guess, jnp.zeros_like(guess))
  # Two steps of Newton's iteration double the digits twice.
  for _ in range(2):
    error = _add(one, _neg(_mul(a, start)))
    start = _add(start, _mul(start, error))
  return start


def _less(a: _Double, b: _Double) -> jax.Array:
  difference = _add(b, _neg(a))
  return difference[0] > 0


def _sum(a: _Double, axis: int) -> _Double:
  parts = [
    (jnp.take(a[0], i, axis), jnp.take(a[1], i, axis))
    for i in range(a[0].shape[axis])
  ]
  total = parts[0]
  for part in parts[1:]:
    total = _add(total, part)
  return total


def _select(condition: jax.Array, a: _Double, b: _Double) -> _Double:
  return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])
