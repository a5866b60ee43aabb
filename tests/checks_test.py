"""Checks that many functions share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt
from mopt import checks
from mopt import search


@pytest.mark.parametrize(
  'value',
  [
    3,
    2**70,
    np.int64(3),
    np.uint8(3),
    np.array(3),
    jnp.int32(3),
    jnp.array(3, jnp.uint8),
  ],
)
def test_integers_become_those_of_python(value):
  found = checks.check_integer('n', value, 3)
  assert type(found) is int
  assert found == int(value)


@pytest.mark.parametrize(
  'value',
  [
    *(2, -1, 3.0, 1e400, np.float32(3), '3', b'3', None, 3j, [3]),
    *(True, np.True_, np.array(True), jnp.array(True)),
    *(np.array([3]), jnp.array([3]), np.array(3.0), jnp.float32(3), jax.numpy),
  ],
  ids=repr,
)
def test_what_is_no_integer_or_too_small_is_refused_by_name(value):
  with pytest.raises(ValueError, match='^n must be an integer >= 3, got '):
    checks.check_integer('n', value, 3)


def test_an_integer_that_is_traced_is_not_known():
  with pytest.raises(ValueError, match='n must be known .* static_args'):
    jax.jit(lambda n: checks.check_integer('n', n, 3))(3)


# Everything in the core that counts. What counts updates or epochs as a part of
# a schedule may be any number.
INTEGERS = {
  'every': lambda n: mopt.prune_by_magnitude(1.0, every=n),
  'num_objectives': lambda n: mopt.madam(0.1, num_objectives=n),
  'levels': lambda n: search.dichotomic(levels=n),
  'max_trials': lambda n: search.bisection(max_trials=n),
  'intervals': lambda n: search.bisection(intervals=n),
  'num': lambda n: search.grid(num=n),
  'num_samples': lambda n: mopt.knee_bootstrap([[[0, 1], [1, 0]]], n),
  'seed': lambda n: mopt.knee_bootstrap([[[0, 1], [1, 0]]], 2, n),
}


@pytest.mark.parametrize('name', INTEGERS)
def test_everything_takes_the_same_integers(name):
  for value in (3, np.int64(3), np.array(3), jnp.int32(3)):
    INTEGERS[name](value)
  for value in (True, np.True_, 3.0, np.float64(3), '3', None, -1):
    if (name, value) == ('num_objectives', None):
      continue  # of 2
    with pytest.raises(ValueError, match=f'{name} must be an integer >= '):
      INTEGERS[name](value)


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (2**70, 2.0**70),
    (0.5, 0.5),
    (np.float32(0.5), 0.5),
    (jnp.bfloat16(0.5), 0.5),
    ([1, 2], [1.0, 2.0]),
    (jnp.array([1, 2]), [1.0, 2.0]),
    (np.inf, np.inf),
  ],
)
def test_numbers_are_known_as_float64(value, expected):
  found = checks.known_numbers('x', value)
  assert found.dtype == np.float64
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  'value', ['1', None, 1j, 10**400, print, [[1], [1, 2]], jax.random.key(0), {}]
)
def test_what_is_no_number_is_refused_by_name(value):
  with pytest.raises(ValueError, match='^x must be a number, got '):
    checks.known_numbers('x', value)


def test_what_is_traced_is_not_known():
  seen = []
  jax.jit(lambda x: seen.append(checks.known_numbers('x', x)))(1.0)
  assert seen == [None]
