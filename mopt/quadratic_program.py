"""Convex quadratic programs over non-negative numbers, solved exactly.

Minimise `x' C x / 2 + q' x` over `x >= 0`, for a positive semidefinite C. The
min-norm weights of m gradients are one of these, q the negative scales of the
gradients; so is the projection onto the cone of directions that descend for
all of them.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mopt import pairs
from mopt.pairs import Pair

# In units of a diagonal of about 1, and of the sizes of q.
_SLOPE_TOLERANCE = 1e-11
# What a pair may be off, times the largest number that it was made of.
_ROUNDING = 2e-14
# Curvature up to which a direction is taken for one without any.
_FLAT = 1e-12


class Program(NamedTuple):
  """A quadratic program `min x' C x / 2 + q' x, x >= 0`, about normalised."""

  matrix: Pair  # [m, m]: C, with a diagonal of 0.25 to 2, or 0.
  linear: Pair  # [m]: q.
  size: jax.Array  # [m]: magnitude of the terms that make up q.


def unit_scales(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Powers of two `[m]`: to unit lengths, and to that of the shortest.

  The first make the diagonal of a Gramian about 1.
  """
  least = 1e-37 if gramian.dtype == jnp.float32 else 1e-300
  diagonal = jnp.maximum(jnp.diagonal(gramian), least)
  exponent = -jnp.floor(0.5 * jnp.log2(diagonal) + 0.5).astype(jnp.int32)
  ones = jnp.ones_like(diagonal)  # scaling by powers of two is exact
  scale = jnp.ldexp(ones, exponent - jnp.max(exponent))
  return jnp.ldexp(ones, exponent), scale


def harmless(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The Gramian and whether it is finite; if not, the identity in its place.

  On NaN the solver might spin.
  """
  is_finite = jnp.all(jnp.isfinite(gramian))
  other = jnp.eye(len(gramian), dtype=gramian.dtype)
  return jnp.where(is_finite, gramian, other), is_finite


class _Search(NamedTuple):
  """Where the active-set method stands."""

  table: Pair  # [m, m + 1]: [C | q] after the exchanges so far.
  active: jax.Array  # [m], dtype=bool: which numbers may differ from 0.
  x: jax.Array  # [m]: the current point, not negative.
  waiting: jax.Array  # [], dtype=jnp.int32: enters next; m for none.
  gain: Pair  # []: `-q' x` at the last optimum of a face.
  best: Pair  # [m]: that optimum.
  done: jax.Array  # [], dtype=bool.


# From the exchange and the start to the end of a search.
Repeat = Callable[[Callable[[_Search], _Search], _Search], _Search]


def solve(program: Program, limit: float) -> Pair:
  """The solution, by an active-set method in pairs of floats.

  The method of Lawson and Hanson lets the number with the steepest slope enter
  and drops one that would turn negative. Each such exchange is a principal
  pivot of the tableau `[C | q]`, whose last column then holds x for the
  numbers that take part and the slopes of the others. Where one enters along
  which there is no curvature, it goes on until another gets to 0, which leaves
  first; if none does, x grows without end, and its direction is returned.

  Args:
    program: see `Program`.
    limit: of `-q' x` beyond which x counts as growing without end.

  Returns:
    `[m]`, x as a pair.

  References:
    Lawson and Hanson, `Solving Least Squares Problems
    <https://doi.org/10.1137/1.9781611971217>`_, 1974, chapter 23.
  """
  # Most programs take no more exchanges.
  known = functools.partial(repeat_without_asking, 2 * len(program.size))
  return jax.lax.platform_dependent(
    program,
    cpu=functools.partial(search, limit=limit, repeat=repeat),
    default=functools.partial(search, limit=limit, repeat=known),
  )


def repeat(exchange, start: _Search) -> _Search:
  """Exchanges until it is done."""
  return jax.lax.while_loop(lambda s: ~s.done, exchange, start)


def repeat_without_asking(count: int, exchange, start: _Search) -> _Search:
  """The same, for accelerators: there each turn of a loop waits for the host.

  Not if the number of turns is known. What comes after the solution changes
  nothing.
  """

  def turn(_, old):
    new = exchange(old)
    return jax.tree.map(lambda a, b: jnp.where(old.done, a, b), old, new)

  return repeat(exchange, jax.lax.fori_loop(0, count, turn, start))


def search(program: Program, limit: float, repeat: Repeat) -> Pair:
  """`solve`, with one of the ways to repeat."""
  m = len(program.size)
  zero = jnp.zeros(m, jnp.float32)

  def with_linear(part):
    columns = [program.matrix[part], program.linear[part][:, None]]
    return jnp.concatenate(columns, axis=1)

  start = _Search(
    table=(with_linear(0), with_linear(1)),
    active=jnp.zeros(m, bool),
    x=zero,
    waiting=jnp.full((), m, jnp.int32),
    gain=(jnp.full((), -1, jnp.float32), zero[0]),
    best=(zero, zero),
    done=jnp.zeros((), bool),
  )
  return repeat(functools.partial(_exchange, program, limit), start).best


def _exchange(program: Program, limit: float, old: _Search) -> _Search:
  """Lets one number enter, or one leave. Ends, for no face is met twice."""
  active, x = old.active, old.x
  m = len(x)
  index = jnp.arange(m)
  zero = jnp.zeros_like(x)
  last = (old.table[0][:, -1], old.table[1][:, -1])
  optimum = pairs.select(active, last, (zero, zero))  # of this face
  target = optimum[0]
  blocked = active & ~(target > 0)
  is_waiting = old.waiting < m
  feasible = ~jnp.any(blocked) & ~is_waiting

  # The gain grows from one feasible face to the next; what does not is
  # rounding.
  gain = pairs.total(pairs.neg(pairs.mul(optimum, program.linear)))
  progress = feasible & pairs.less(old.gain, gain)
  slope = jnp.where(active, jnp.inf, last[0])
  entering = jnp.argmin(slope)
  rounding = _ROUNDING * jnp.max(target)
  tolerance = _SLOPE_TOLERANCE * program.size[entering] + rounding
  optimal = ~(slope[entering] < -tolerance)

  # How x moves as the number that enters grows by 1.
  column = jnp.where(active, old.table[0][:, entering], 0)
  is_flat = feasible & ~(old.table[0][entering, entering] > _FLAT)
  falling = active & (column < -_FLAT)
  endless = is_flat & ~jnp.any(falling)
  low_column = jnp.where(active, old.table[1][:, entering], 0)
  one = index == entering
  direction = pairs.select(
    one, (jnp.ones_like(x), zero), (jnp.maximum(column, 0), low_column)
  )

  # Where the optimum is out of reach, or there is none: walk towards it until
  # a number gets to 0.
  towards = jnp.where(is_flat, column, target - x)
  stops = jnp.where(is_flat, falling, blocked)
  origin = jnp.where(feasible, target, x)
  step = jnp.where(stops, origin / jnp.where(stops, -towards, 1), jnp.inf)
  step = jnp.where(stops & ~(step >= 0), 0, step)  # 0 / 0
  leaving = jnp.argmin(step)
  walked = jnp.maximum(origin + jnp.min(step) * towards, 0)
  walked = jnp.where(active & (index != leaving), walked, 0)
  walked = jnp.where(is_flat & one, jnp.min(step), walked)

  enters = is_waiting | (feasible & ~is_flat)
  pivot = jnp.where(is_waiting, old.waiting, entering)
  pivot = jnp.where(enters, pivot, leaving)
  moved = jnp.where(enters, jnp.where(is_waiting, x, target), walked)
  finished = feasible & (optimal | ~progress | (gain[0] > limit))
  best = pairs.select(progress, optimum, old.best)
  if limit < jnp.inf:  # Else it is rounding, and there is no such direction.
    best = pairs.select(endless & ~finished, direction, best)
  return _Search(
    table=_principal_pivot(old.table, pivot),
    active=jnp.where(index == pivot, enters, active),
    x=moved,
    waiting=jnp.where(is_flat, entering, m).astype(jnp.int32),
    gain=pairs.select(progress, gain, old.gain),
    best=best,
    done=finished | endless,
  )


def _principal_pivot(table: Pair, k: jax.Array) -> Pair:
  """Exchanges variable and slope k in the tableau `[m, m + 1]`."""
  row = (table[0][k], table[1][k])
  column = (table[0][:, k], table[1][:, k])
  pivot = (row[0][k], row[1][k])
  # Rounding may leave a curvature that is not positive. It is lifted, as if
  # the diagonal of C had been that much larger.
  flat = ~(pivot[0] > _FLAT)
  lifted = (jnp.float32(_FLAT), jnp.float32(0))
  reciprocal = pairs.reciprocal(pairs.select(flat, lifted, pivot))
  scaled_column = pairs.mul(column, reciprocal)
  update = pairs.mul(
    (scaled_column[0][:, None], scaled_column[1][:, None]),
    (row[0][None, :], row[1][None, :]),
  )
  new = pairs.add(table, pairs.neg(update))
  scaled_row = pairs.neg(pairs.mul(row, reciprocal))
  m = table[0].shape[0]
  in_row = (jnp.arange(m) == k)[:, None]
  in_column = (jnp.arange(m + 1) == k)[None, :]
  new = pairs.select(
    in_row, (scaled_row[0][None, :], scaled_row[1][None, :]), new
  )
  new = pairs.select(
    in_column & ~in_row,
    (scaled_column[0][:, None], scaled_column[1][:, None]),
    new,
  )
  return pairs.select(in_row & in_column, reciprocal, new)
