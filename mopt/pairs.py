"""Arithmetic on pairs of floats, about 48 bits out of float32.

A pair `(high, low)` stands for the sum of its parts, two float32 arrays of one
shape. float64 would do as well, but JAX has it only where it is switched on
for all of a program, and TPUs do not have it at all.

Dekker, `A floating-point technique for extending the available precision
<https://doi.org/10.1007/BF01397083>`_, 1971. A compiler may contract a * b + c
into one rounding; the products below are exact, so that this cannot change
them. But it takes `(x + 1) - 1` for x, whatever rounding says: what is added
must not be a constant, unless the sum is exact.
"""

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def from_array(x: jax.Array) -> Pair:
  """A float32 or float64 array as a pair."""
  high = x.astype(jnp.float32)
  return high, (x - high.astype(x.dtype)).astype(jnp.float32)


def to_array(a: Pair, dtype: jax.typing.DTypeLike) -> jax.Array:
  """The sum of a pair, in float32 or float64."""
  return a[0].astype(dtype) + a[1].astype(dtype)


def add(a: Pair, b: Pair) -> Pair:
  s, e = _two_sum(a[0], b[0])
  t, f = _two_sum(a[1], b[1])
  s, e = _two_sum(s, e + t)
  return _two_sum(s, e + f)


def mul(a: Pair, b: Pair) -> Pair:
  p, e = _two_product(a[0], b[0])
  return _two_sum(p, e + (a[0] * b[1] + a[1] * b[0]))


def neg(a: Pair) -> Pair:
  return -a[0], -a[1]


def reciprocal(a: Pair) -> Pair:
  guess = 1.0 / a[0]
  one = (jnp.ones_like(a[0]), jnp.zeros_like(a[0]))
  start = (guess, jnp.zeros_like(guess))
  # Two steps of Newton's iteration double the digits twice.
  for _ in range(2):
    error = add(one, neg(mul(a, start)))
    start = add(start, mul(start, error))
  return start


def less(a: Pair, b: Pair) -> jax.Array:
  return add(b, neg(a))[0] > 0


def total(a: Pair) -> Pair:
  """The sum over the last axis.

  As one reduction. As a Python loop the additions of many terms would be
  copied into everything that needs the sum.
  """
  zero = jnp.float32(0)
  high, low = jax.lax.reduce(a, (zero, zero), add, (a[0].ndim - 1,))
  return high, low


def select(condition: jax.Array, a: Pair, b: Pair) -> Pair:
  return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def _two_sum(a: jax.Array, b: jax.Array) -> Pair:
  s = a + b
  t = s - a
  return s, (a - (s - t)) + (b - t)


def _halves(a: jax.Array) -> Pair:
  """a as two numbers of 12 bits, whose products are exact."""
  bits = jax.lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000)
  high = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return high, a - high


def _two_product(a: jax.Array, b: jax.Array) -> Pair:
  (ah, al), (bh, bl) = _halves(a), _halves(b)
  middle, rest = _two_sum(ah * bl, al * bh)
  high, low = _two_sum(ah * bh, middle)
  return _two_sum(high, low + (rest + al * bl))
