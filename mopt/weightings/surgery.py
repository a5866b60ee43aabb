"""Weightings that alter each gradient by the others, one after the other."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mopt import quadratic_program
from mopt.checks import check_gramian
from mopt.checks import is_finite
from mopt.checks import known_numbers
from mopt.weightings.weighting import Key
from mopt.weightings.weighting import Weighting


def pcgrad(key: jax.Array) -> Weighting:
  """Each gradient, freed of each one that it conflicts with, and their sum.

  Where a gradient has a negative inner product with another, its component
  along the other is taken out; then comes the next one, in an order that is
  drawn anew for each gradient at each step.

  When to take it: to repeat what has been published with it; of two objectives
  it is twice `upgrad`. Of more nothing is promised: freed of one gradient, it
  may be against an earlier one again, where `upgrad` is exact. Long gradients
  count for more. One factor for all of them changes nothing, nor does their
  order, but for the numbers drawn. It costs m^3 multiplications, in m steps.

  A gradient that is zero has the weight 1 and changes nothing. A Gramian that
  is not finite gives weights that are all NaN. Derivatives, forward and
  reverse, are those of the arithmetic.

  Args:
    key: random key, such as `jax.random.key(0)`. A copy that changes at each
      step is kept in the state.

  Returns:
    A `mopt.Weighting`, of weights `[m]` f32, f64 if the Gramian is, each at
    least 1. Its state is the data of a key. Its update raises a ValueError for
    a Gramian that is not square or has m < 2.

  Raises:
    ValueError: for what is not a key.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.pcgrad(jax.random.key(0))
    >>> gramian = jnp.array([[1., -2.], [-2., 8.]])
    >>> weights, state = weighting.update(gramian, weighting.init(2))
    >>> print(weights)
    [3.   1.25]

  References:
    Yu et al., `Gradient Surgery for Multi-Task Learning
    <https://arxiv.org/abs/2001.06782>`_, 2020, Algorithm 1.
  """
  start = Key.of(key)

  def update(gramian, state, **extra):
    gramian = check_gramian(gramian)
    state, now = start.split(state)
    return _pcgrad(gramian, draw_orders(now, len(gramian))), state

  return Weighting(init=lambda m: start.data, update=update)


def gradvac(key: jax.Array, *, beta: jax.typing.ArrayLike = 0.5) -> Weighting:
  """Each gradient, turned towards the others as they mostly are, and their sum.

  A running mean of the cosine between two gradients is the target of that
  pair. Where a gradient's cosine with another falls below it, as much of the
  other is added as restores it; then comes the next one, in an order that is
  drawn anew for each gradient at each step. With targets of 0, as they are at
  first, it is `pcgrad`.

  When to take it: for tasks some of which belong together, languages say, so
  that a lasting agreement is worth more than this batch. Nothing is promised
  to descend. Long gradients count for more. One factor for all of them changes
  nothing, nor does their order, but for the numbers drawn. It costs m^3
  multiplications, in m steps.

  A target so close to 1 that no addition would do is taken for 1 - eps. A
  gradient that is zero has no angle: it has the weight 1, changes nothing and
  leaves its targets. A Gramian that is not finite gives weights that are all
  NaN, and leaves the targets. Derivatives, forward and reverse, are those of
  the arithmetic.

  Args:
    key: random key, such as `jax.random.key(0)`. A copy that changes at each
      step is kept in the state.
    beta: how much of the new cosines the targets take, in [0, 1]. May be
      traced.

  Returns:
    A `mopt.Weighting`, of weights `[m]` f32, f64 if the Gramian is, each at
    least 1. Its state is the targets `[m, m]` f32, that of j for i in row i,
    and the data of a key. Its update raises a ValueError for a Gramian that is
    not square or has m < 2.

  Raises:
    ValueError: for what is not a key, or another `beta`.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.gradvac(jax.random.key(0))
    >>> gramian = jnp.array([[1., -1.], [-1., 4.]])
    >>> weights, state = weighting.update(gramian, weighting.init(2))
    >>> print(weights)
    [2.   1.25]
    >>> print(state[0])
    [[ 0.   -0.25]
     [-0.25  0.  ]]

  References:
    Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
    Optimization in Massively Multilingual Models
    <https://arxiv.org/abs/2010.05874>`_, 2021, of all parameters as one group.
  """
  start = Key.of(key)
  known = known_numbers('beta', beta)
  if known is not None and not (
    known.shape == () and is_finite(known) and 0 <= known <= 1
  ):
    raise ValueError(f'beta must be a number in [0, 1], got {beta}.')

  def init(m):
    return jnp.zeros((m, m), jnp.float32), start.data

  def update(gramian, state, **extra):
    gramian = check_gramian(gramian)
    targets, data = state
    data, now = start.split(data)
    orders = draw_orders(now, len(gramian))
    rate = jnp.asarray(beta, gramian.dtype)
    weights, targets = _gradvac(gramian, orders, targets, rate)
    return weights, (targets, data)

  return Weighting(init, update)


def draw_orders(key: jax.Array, m: int) -> jax.Array:
  """For each of m gradients an order `[m, m]` in which it meets them all."""
  keys = jax.random.split(key, m)
  return jax.vmap(lambda k: jax.random.permutation(k, m))(keys)


@jax.jit
def _pcgrad(gramian: jax.Array, orders: jax.Array) -> jax.Array:
  gramian, is_known = quadratic_program.harmless(gramian)
  scaled, unit = _scaled(gramian)

  def free(i, order):
    def meet(shares, j):
      along = jnp.minimum(_dot(scaled[j], shares), 0)
      acts = (j != i) & (scaled[j, j] > 0)
      share = -along / jnp.where(acts, scaled[j, j], 1)
      return shares.at[j].add(jnp.where(acts, share, 0)), None

    return jax.lax.scan(meet, _only(scaled, i), order)[0]

  shares = jax.vmap(free)(jnp.arange(len(scaled)), orders)
  return jnp.where(is_known, _summed(shares, unit), jnp.nan)


class _Turning(NamedTuple):
  """A gradient while it is turned."""

  shares: jax.Array  # [m]: of the gradients whose sum it is now.
  slopes: jax.Array  # [m]: its inner products with all of them.
  targets: jax.Array  # [m]: of its cosines with them.


@jax.jit
def _gradvac(
  gramian: jax.Array, orders: jax.Array, targets: jax.Array, beta: jax.Array
) -> tuple[jax.Array, jax.Array]:
  gramian, is_known = quadratic_program.harmless(gramian)
  scaled, unit = _scaled(gramian)

  def turn(i, order, targets):
    start = _Turning(_only(scaled, i), scaled[i], targets)
    meet = functools.partial(_meet, scaled, i, beta)
    return jax.lax.scan(meet, start, order)[0]

  wide = targets.astype(scaled.dtype)
  found = jax.vmap(turn)(jnp.arange(len(scaled)), orders, wide)
  weights = jnp.where(is_known, _summed(found.shares, unit), jnp.nan)
  new = found.targets.astype(targets.dtype)
  return weights, jnp.where(is_known, new, targets)


def _meet(
  scaled: jax.Array, i: jax.Array, beta: jax.Array, old: _Turning, j: jax.Array
) -> tuple[_Turning, None]:
  """Turns gradient i towards j."""
  squared, square = _dot(old.shares, old.slopes), scaled[j, j]
  has_angle = (squared > 0) & (square > 0) & (j != i)
  ours = jnp.sqrt(jnp.where(has_angle, squared, 1))
  other = jnp.sqrt(jnp.where(has_angle, square, 1))
  cosine = jnp.clip(old.slopes[j] / ours / other, -1, 1)
  cosine = jnp.where(has_angle, cosine, 0)
  target = old.targets[j]
  least = jnp.finfo(scaled.dtype).eps
  ratio = _sine2(cosine) / jnp.maximum(_sine2(target), least)
  # The root has no derivative at 0.
  ratio = jnp.where(ratio > 0, jnp.sqrt(jnp.where(ratio > 0, ratio, 1)), 0)
  share = (target * ratio - cosine) * ours / other
  share = jnp.where(has_angle & (cosine < target), share, 0)
  moved = jnp.where(has_angle, target + beta * (cosine - target), target)
  return _Turning(
    shares=old.shares.at[j].add(share),
    slopes=old.slopes + share * scaled[j],
    targets=old.targets.at[j].set(moved),
  ), None


def _sine2(cosine: jax.Array) -> jax.Array:
  """The square of the sine."""
  return (1 - cosine) * (1 + cosine)


def _scaled(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
  """With a diagonal of about 1, and the scales: all numbers stay in range."""
  unit, _ = quadratic_program.unit_scales(gramian)
  return gramian * unit[:, None] * unit[None, :], unit


def _summed(shares: jax.Array, unit: jax.Array) -> jax.Array:
  """Weights `[m]` of the sum of gradients that are rows of scaled ones."""
  return jnp.sum(shares * (unit[None, :] / unit[:, None]), axis=0)


def _only(scaled: jax.Array, i: jax.Array) -> jax.Array:
  return (jnp.arange(len(scaled)) == i).astype(scaled.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  """Of vectors, in no lower precision than theirs."""
  return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
