"""Mean and standard deviation of examples, and what they are used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mopt.training import normalise
from mopt.training import scaling

_SCALES = (
  (0.0, 255.0),
  (120.7, 64.2),
  ((1.0, 2.0, 3.0), (0.1, 2.0, 7.0)),
  ((1.0, 2.0, 3.0), 4.0),
  (2.0, (1.0, 2.0, 3.0)),
)
_DTYPES = (np.uint8, np.float32, np.float16, jnp.bfloat16, np.int32)


def _with_jax(images, mean, std):
  """`normalise` as it was when it knew arrays of JAX alone."""
  images = jnp.asarray(images).astype(jnp.float32)
  if isinstance(mean, tuple) or isinstance(std, tuple):
    shape = (1,) * (images.ndim - 1) + (-1,)
    middle = np.array(mean, np.float32).reshape(shape)
    factor = (1.0 / np.array(std)).astype(np.float32).reshape(shape)
    return (images - middle) * factor
  return (images - mean) * (1.0 / std)


@pytest.mark.parametrize('scale', _SCALES)
@pytest.mark.parametrize('dtype', _DTYPES)
def test_compiled_it_is_the_program_that_it_was(dtype, scale):
  images = jax.ShapeDtypeStruct((2, 4, 5, 3), dtype)
  program, before = (
    jax.make_jaxpr(lambda x, f=f: f(x, *scale))(images)
    for f in (normalise, _with_jax)
  )
  assert str(program) == str(before)
  assert [str(x.aval) for x in before.jaxpr.outvars] == ['float32[2,4,5,3]']


@pytest.mark.parametrize('scale', _SCALES)
@pytest.mark.parametrize('dtype', _DTYPES)
def test_numpy_gives_the_bits_of_compiled_code(dtype, scale):
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (50, 9, 9, 3)).astype(dtype)
  found = normalise(images, *scale)
  assert type(found) is np.ndarray
  assert found.dtype == np.float32
  expected = jax.jit(lambda x: _with_jax(x, *scale))(images)
  np.testing.assert_array_equal(found, expected)


def test_it_is_float32_whatever_mean_and_deviation_are():
  images = np.array([1.0, 4.0])  # float64
  expected = np.float32([(1 - 2.5) / 1.5, (4 - 2.5) / 1.5])
  for scale in ((np.mean(images), np.std(images)), (2.5, 1.5)):
    found = normalise(images, *scale)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(normalise([1, 4], 2.5, 1.5), expected)


@pytest.mark.parametrize('shape', [(3, 5, 4, 3), (11, 1000, 1000, 1)])
def test_moments_are_those_of_numpy(shape):
  # Parts of up to 10 million pixels are counted at a time.
  random = np.random.default_rng(0)
  images = random.integers(0, 256, shape, np.uint8)
  images[0] = 200
  mean, std = scaling._moments(images)
  assert mean == pytest.approx(np.mean(images), rel=1e-12)
  assert std == pytest.approx(np.std(images), rel=1e-12)
  assert type(mean) is type(std) is float


def test_pictures_of_one_colour_are_not_divided_by_zero():
  images = np.full((2, 4, 4, 3), 7, np.uint8)
  assert scaling._moments(images) == (7.0, 1.0)


@pytest.mark.parametrize('shape', [(7, 3), (5, 4, 3), (3_500_001, 3)])
def test_moments_of_features_are_those_of_numpy(shape):
  # Parts of up to 10 million values are summed at a time.
  random = np.random.default_rng(0)
  x = random.standard_normal(shape, np.float32) * np.float32([1, 9, 0])
  x += np.float32([0, 100, 0.1])
  mean, std = scaling._feature_moments(x)
  flat = x.reshape(-1, 3)[:, :2].astype(np.float64)
  np.testing.assert_allclose(mean[:2], flat.mean(axis=0), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(std[:2], flat.std(axis=0), rtol=1e-9)
  # One that never changes becomes 0, not noise of rounding.
  assert std[2] == 1.0
  assert type(mean[0]) is type(std[0]) is float
  last = scaling.normalise(x[:1], mean, std)[..., 2]
  np.testing.assert_array_equal(last, 0.0)
