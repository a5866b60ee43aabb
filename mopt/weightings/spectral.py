"""Weightings by an eigendecomposition: the same angle, or no conflict at all.

Weights may be negative: what a gradient has in common with others is taken
out of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mopt import pairs
from mopt import quadratic_program
from mopt.checks import check_gramian
from mopt.pairs import Pair


def imtl_g(gramian: jax.Array) -> jax.Array:
  """The direction whose projections onto all gradients are equal.

  The projections onto the unit gradients, so that no objective gains by a
  longer gradient. The weights sum to 1, and some may be negative.

  When to take it: for losses of different scales, each to be treated alike.
  The scale of a gradient changes the length of the direction alone, and the
  order of the objectives changes nothing. It costs an eigendecomposition of
  `[m, m]`. Descent is promised for two objectives. Of more the direction may
  point away from all of them, where a short gradient would have to be
  subtracted and the sum of 1 turns the signs; `config` has the same line and
  never the wrong way.

  Two objectives have a closed form, which knows no exception. Of more the
  eigenvalues of the cosines up to m eps of the largest count as 0, and where
  no direction has equal projections the nearest in least squares is taken. It
  is 0, and so are the weights, where the gradients cancel. A gradient that is
  zero has the weight 0, and the others are those without it. A Gramian that is
  not finite gives weights that are all NaN. Derivatives, forward and reverse,
  are right where no gradient depends on the others.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite, see
      `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is, of any sign, with sum 1 or all 0.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.imtl_g(jnp.array([[9., 0.], [0., 1.]])))
    [0.25 0.75]

  References:
    Liu et al., `Towards Impartial Multi-task Learning
    <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021, section 3.1. Of
    gradients that depend on each other as Quinton and Rey, `Jacobian Descent
    for Multi-Objective Optimization <https://arxiv.org/abs/2406.16232>`_, 2024,
    have it, but of the unit gradients.
  """
  return _imtl_g(check_gramian(gramian))


def config(gramian: jax.Array) -> jax.Array:
  """The direction that has the same angle to all gradients.

  Its length is the sum of the projections of all gradients onto it, so that
  steps get shorter the more the gradients disagree.

  When to take it: for losses of different scales that are to fall at one
  rate, such as the terms of a physics-informed network. It descends for all
  objectives unless they depend on each other. The scale of a gradient changes
  the length of the direction alone, and the order of the objectives changes
  nothing. It costs an eigendecomposition of `[m, m]`; two objectives have a
  closed form.

  What it does with gradients that are zero, cancel, or depend on each other,
  with what is not finite, and what its derivatives are is said at `imtl_g`.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite, see
      `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is, of any sign and sum.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.config(jnp.array([[9., 0.], [0., 1.]])))
    [0.6666667 2.       ]

  References:
    Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed
    Neural Networks <https://arxiv.org/abs/2408.11104>`_, 2024, equation (2).
  """
  return _config(check_gramian(gramian))


def aligned_mtl(gramian: jax.Array) -> jax.Array:
  """The mean of the nearest gradients that are orthogonal and equally long.

  The m gradients are rotated and scaled until they neither conflict nor
  dominate: their matrix gets all its singular values equal to its smallest,
  and its condition number, which measures how much they conflict, 1.

  When to take it: where training is unstable because gradients conflict or
  differ in length by less than a thousand times. It ends where the objectives
  are Pareto-stationary. On the way not all of them need descend. The shortest
  combination of the gradients decides the length, so that steps get short
  where two nearly agree. One factor for all gradients or their order changes
  nothing; the scale of one does. It costs an eigendecomposition of `[m, m]`
  and products of such matrices in pairs of floats.

  Eigenvalues of the Gramian up to m eps of the largest count as 0, and what
  belongs to them is left out: a gradient that is zero has the weight 0, and the
  direction jumps where an eigenvalue vanishes. A Gramian that is not finite
  gives weights that are all NaN. Derivatives, forward and reverse, are right
  where no gradient depends on the others and the smallest eigenvalue is single.

  Args:
    gramian: `[m, m]`, m >= 2, symmetric positive semidefinite, see
      `mopt.gramian`.

  Returns:
    `[m]` f32, f64 if the Gramian is, of any sign and sum.

  Raises:
    ValueError: if `gramian` is not square or m < 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.aligned_mtl(jnp.array([[16., 0.], [0., 1.]])))
    [0.125 0.5  ]

  References:
    Senushkin et al., `Independent Component Alignment for Multi-Task Learning
    <https://arxiv.org/abs/2305.19000>`_, 2023, Algorithm 1, of equal weights.
  """
  return _aligned_mtl(check_gramian(gramian))


@jax.jit
def _imtl_g(gramian: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  weights = _alike(gramian).weights
  total, size = jnp.sum(weights), jnp.sum(jnp.abs(weights))
  is_none = jnp.abs(total) <= jnp.finfo(gramian.dtype).eps * size
  weights = jnp.where(is_none, 0, weights) / jnp.where(is_none, 1, total)
  return jnp.where(is_finite, weights, jnp.nan)


@jax.jit
def _config(gramian: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  alike = _alike(gramian)
  # The projections of all gradients onto it, of which it has the length.
  weights = alike.weights * jnp.sum(alike.projections)
  return jnp.where(is_finite, weights, jnp.nan)


@jax.jit
def _aligned_mtl(gramian: jax.Array) -> jax.Array:
  gramian, is_finite = quadratic_program.harmless(gramian)
  # A power of four, whose roots are exact, too: the longest is about 1.
  _, exponent = jnp.frexp(jnp.max(jnp.diagonal(gramian)))
  weights = _aligned(jnp.ldexp(gramian, -2 * (exponent // 2)))
  return jnp.where(is_finite, weights, jnp.nan)


class _Alike(NamedTuple):
  """A direction that is at one angle to all gradients.

  Lengths are in units of some power of two.
  """

  weights: jax.Array  # [m]: of the gradients; 0 if they cancel.
  projections: jax.Array  # [m]: of the gradients onto it, times its length.


def _alike(gramian: jax.Array) -> _Alike:
  unit, scale = quadratic_program.unit_scales(gramian)
  scaled = gramian * unit[:, None] * unit[None, :]
  is_some = (jnp.diagonal(scaled) > 0).astype(gramian.dtype)
  lengths = _lengths(scaled)
  if len(gramian) == 2:
    reached, shares = is_some, is_some / lengths
  else:
    shares, reached = _solve_lengths(scaled)
    # Rounding in place of a 0 would count, so much shorter is no gradient.
    shares *= is_some
  # The square of its length. Where the gradients cancel it is rounding.
  parts = lengths * shares
  squared, size = jnp.sum(parts), jnp.sum(jnp.abs(parts))
  is_none = squared <= len(shares) * jnp.finfo(shares.dtype).eps * size
  shares = jnp.where(is_none, 0, shares) / jnp.where(is_none, 1, squared)
  return _Alike(scale * shares, reached * lengths / scale)


def _lengths(scaled: jax.Array) -> jax.Array:
  """Of gradients, 1 of what is zero, so that it can be divided by."""
  squares = jnp.diagonal(scaled)
  return jnp.sqrt(jnp.where(squares > 0, squares, 1))


class _Spectrum(NamedTuple):
  """The eigenvalues of a matrix that are not 0, and their eigenvectors."""

  values: jax.Array  # [m]; 1 where they count as 0.
  vectors: jax.Array  # [m, m], in columns.
  is_some: jax.Array  # [m], dtype=bool: False where they count as 0.

  def function(self, of_values: jax.Array) -> jax.Array:
    """The function `[m, m]` of the matrix that is 0 where it is."""
    columns = self.vectors * jnp.where(self.is_some, of_values, 0)[None, :]
    return _symmetric(_product(columns, self.vectors.T))

  def divide(self, matrix: jax.Array) -> jax.Array:
    """The E of `R E + E R = matrix`, R the root of it; 0 where it is."""
    root = jnp.sqrt(self.values)
    inside = _product(_product(self.vectors.T, matrix), self.vectors)
    both = self.is_some[:, None] & self.is_some[None, :]
    inside = jnp.where(both, inside / (root[:, None] + root[None, :]), 0)
    outside = _product(_product(self.vectors, inside), self.vectors.T)
    return _symmetric(outside)


def _spectrum(matrix: jax.Array) -> _Spectrum:
  values, vectors = jnp.linalg.eigh(matrix)
  # No eigenvalue can be told from 0 better; of a matrix of zeros all are.
  least = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.max(values)
  is_some = values > jnp.maximum(least, 0)
  return _Spectrum(jnp.where(is_some, values, 1), vectors, is_some)


# Each gains the digits that the condition number has left.
_REFINEMENTS = 2


def _cosines(scaled: jax.Array) -> _Spectrum:
  """The spectrum of the cosines between m gradients."""
  inverse = 1 / _lengths(scaled)
  return _spectrum(scaled * inverse[:, None] * inverse[None, :])


@jax.custom_jvp
def _solve_lengths(scaled: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The x of `S x = lengths`, and what it reaches of them, 1 as a rule.

  Where no x solves it, the nearest cosines are those of the least squares.

  Args:
    scaled: `[m, m]`, a Gramian S with a diagonal of about 1, or 0.
  """
  spectrum, lengths = _cosines(scaled), _lengths(scaled)
  is_some = (jnp.diagonal(scaled) > 0).astype(scaled.dtype)
  reached = _product(spectrum.function(jnp.ones_like(lengths)), is_some)
  inverse = spectrum.function(1 / spectrum.values)
  start = _product(inverse, is_some) / lengths
  if scaled.dtype != jnp.float32:
    return start, reached
  # In float32 alone it would lose the digits of the condition number.
  matrix, target = pairs.from_array(scaled), _root(jnp.diagonal(scaled))

  def refine(_, x):
    slopes = pairs.total(pairs.mul(matrix, (x[0][None], x[1][None])))
    missing = pairs.add(target, pairs.neg(slopes))[0] / lengths
    step = _product(inverse, is_some * missing) / lengths
    return pairs.add(x, pairs.from_array(step))

  x = jax.lax.fori_loop(0, _REFINEMENTS, refine, pairs.from_array(start))
  return pairs.to_array(x, scaled.dtype), reached


@_solve_lengths.defjvp
def _solve_lengths_jvp(primals, tangents):
  """By the equation that it solves; what the gradients span is held fixed."""
  (scaled,), (change,) = primals, tangents
  x, reached = _solve_lengths(scaled)
  spectrum, lengths = _cosines(scaled), _lengths(scaled)
  missing = 0.5 * jnp.diagonal(change) / lengths - _product(change, x)
  inverse = spectrum.function(1 / spectrum.values)
  moved = _product(inverse, missing / lengths) / lengths
  return (x, reached), (moved, jnp.zeros_like(reached))


@jax.custom_jvp
def _aligned(gramian: jax.Array) -> jax.Array:
  """The mean of the rows of the inverse root of G times its least singular.

  Args:
    gramian: `[m, m]`, the largest of the diagonal about 1.
  """
  return _inverse_root(gramian)[0]


@_aligned.defjvp
def _aligned_jvp(primals, tangents):
  """By the equation `X G X = 1` of the inverse root X."""
  (gramian,), (change,) = primals, tangents
  weights, inverse, least = _inverse_root(gramian)
  spectrum = _spectrum(gramian)
  # X G dX + dX G X = -X dG X, and X G is the root.
  moved = spectrum.divide(-_product(_product(inverse, change), inverse))
  vector = spectrum.vectors[:, _least(spectrum)]
  relative = 0.5 * _product(vector, _product(change, vector)) / least
  mean_of_rows = jnp.sqrt(least) * jnp.mean(moved, axis=1)
  return weights, mean_of_rows + relative * weights


def _inverse_root(
  gramian: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What `_aligned` gives, the inverse root, and the smallest eigenvalue."""
  m = len(gramian)
  spectrum = _spectrum(gramian)
  inverse = spectrum.function(1 / jnp.sqrt(spectrum.values))
  least = spectrum.values[_least(spectrum)]
  if gramian.dtype != jnp.float32:
    return jnp.sqrt(least) * jnp.mean(inverse, axis=1), inverse, least
  matrix = pairs.from_array(gramian)
  one = pairs.from_array(jnp.eye(m, dtype=gramian.dtype))

  def refine(_, x):
    missing = pairs.add(one, pairs.neg(_matmul(_matmul(x, matrix), x)))
    return pairs.add(x, pairs.from_array(spectrum.divide(missing[0])))

  start = pairs.from_array(inverse)
  x = jax.lax.fori_loop(0, _REFINEMENTS, refine, start)
  # Rayleigh's quotient has the square of the error of the eigenvector.
  vector = pairs.from_array(spectrum.vectors[:, _least(spectrum)])
  row = vector[0][None], vector[1][None]
  along = pairs.total(pairs.mul(vector, pairs.total(pairs.mul(matrix, row))))
  length = pairs.total(pairs.mul(vector, vector))
  least = pairs.mul(along, pairs.reciprocal(length))
  least = jnp.where(jnp.any(spectrum.is_some), least[0], 1)
  rows = pairs.to_array(pairs.total(x), gramian.dtype)
  return jnp.sqrt(least) * rows / m, pairs.to_array(x, gramian.dtype), least


def _least(spectrum: _Spectrum) -> jax.Array:
  """Which eigenvalue is the smallest of those that are not 0."""
  return jnp.argmin(jnp.where(spectrum.is_some, spectrum.values, jnp.inf))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _symmetric(matrix: jax.Array) -> jax.Array:
  return 0.5 * (matrix + matrix.T)


def _matmul(a: Pair, b: Pair) -> Pair:
  """`[m, k] @ [k, n]`."""
  columns = b[0].T[None], b[1].T[None]
  return pairs.total(pairs.mul((a[0][:, None], a[1][:, None]), columns))


def _root(square: jax.Array) -> Pair:
  """The square root of numbers that are not negative, as a pair."""
  guess = pairs.from_array(jnp.sqrt(square))
  rest = pairs.add(pairs.from_array(square), pairs.neg(pairs.mul(guess, guess)))
  half = 0.5 * rest[0] / jnp.where(square > 0, guess[0], 1)
  return pairs.add(guess, pairs.from_array(half))
