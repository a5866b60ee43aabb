"""Pictures that are moved at random: how far, how often, and nothing else."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from mopt.training.augment import _move
from mopt.training.augment import augment
from mopt.training.augment import Augmentation

pytestmark = pytest.mark.usefixtures('exact_products')

ALL = Augmentation(rotation=15.0, shift=0.1, flip=True)
KEY = jax.random.key(0)

# Most of the time here would go into optimizing small programs.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
traceable = augment
augment = jit(augment, static_argnames='augmentation')
_move = jit(_move)


def _noise(shape, dtype=np.uint8):
  images = np.random.default_rng(0).integers(0, 256, shape)
  return images.astype(dtype)


def _places(height, width):
  """A picture of which each pixel holds its row and its column."""
  return np.stack(np.mgrid[:height, :width], axis=-1).astype(np.float32)


@pytest.mark.parametrize(
  ('augmentation', 'shape', 'dtype'),
  [
    (ALL, (50, 12, 9, 3), np.uint8),
    (Augmentation(180.0, 1.0, True), (50, 8, 8, 1), np.uint8),
    (ALL, (3, 1, 5, 2), np.float32),
  ],
)
def test_shape_and_range_stay(augmentation, shape, dtype):
  # Black and white, so that whatever leaves the range is seen.
  images = 255 * (_noise(shape) > 127).astype(dtype)
  moved = augment(KEY, images, augmentation)
  assert moved.shape == shape
  assert moved.dtype == jnp.float32
  assert float(moved.min()) >= 0
  assert float(moved.max()) <= 255 * (1 + 1e-6)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_all_zero_changes_no_bit(dtype):
  images = _noise((4, 8, 6, 3), dtype)
  kept = augment(KEY, images, Augmentation(0.0, 0.0, False))
  assert kept.dtype == jnp.float32
  np.testing.assert_array_equal(kept, images.astype(np.float32))


@pytest.mark.parametrize(
  'augmentation',
  [
    ALL,
    Augmentation(15.0, 0.0, False),
    Augmentation(0.0, 0.1, False),
    Augmentation(0.0, 0.0, True),
  ],
)
def test_the_key_decides(augmentation):
  images = _noise((8, 9, 10, 3))
  first = augment(jax.random.key(1), images, augmentation)
  again = augment(jax.random.key(1), images, augmentation)
  other = augment(jax.random.key(2), images, augmentation)
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  assert not np.array_equal(first, images)


def test_pictures_of_a_batch_move_each_in_its_own_way():
  images = np.broadcast_to(_noise((9, 10, 3)), (16, 9, 10, 3))
  moved = np.asarray(augment(KEY, images, ALL))
  assert len({x.tobytes() for x in moved}) == 16


def test_a_picture_does_not_depend_on_the_others():
  images = _noise((4, 9, 10, 3))
  others = images.copy()
  others[1:] = 255 - others[1:]
  first, second = augment(KEY, images, ALL), augment(KEY, others, ALL)
  np.testing.assert_array_equal(first[0], second[0])
  assert (np.asarray(first[1:]) != second[1:]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize('width', [10, 11])
def test_flipping_alone_mirrors_about_half_of_the_pictures(width):
  images = _noise((200, 6, width, 3)).astype(np.float32)
  moved = augment(KEY, images, Augmentation(0.0, 0.0, True))
  kept = (moved == images).all(axis=(1, 2, 3))
  mirrored = (moved == images[:, :, ::-1]).all(axis=(1, 2, 3))
  assert (kept ^ mirrored).all()
  # Four standard errors of 200 throws of a coin.
  assert abs(int(mirrored.sum()) - 100) < 29


def test_a_shift_moves_a_blob_as_far_as_it_may_and_evenly():
  height, width, most = 31, 21, 0.2
  image = np.zeros((height, width, 1), np.uint8)
  image[15, 10] = 255
  images = np.broadcast_to(image, (300, *image.shape))
  moved = augment(KEY, images, Augmentation(0.0, most, False))
  # Linear interpolation keeps the sum of a blob and its centre of mass.
  np.testing.assert_allclose(moved.sum(axis=(1, 2, 3)), 255, rtol=1e-4)
  centers = np.einsum('nhwc,hwd->nd', moved, _places(height, width)) / 255
  shifts = (centers - [15, 10]) / [height, width]
  assert np.abs(shifts).max() <= most * (1 + 1e-4)
  for direction in shifts.T:
    uniform = scipy.stats.uniform(-most, 2 * most)
    assert scipy.stats.kstest(direction, uniform.cdf).pvalue > 0.01
  # Up and down is independent of left and right.
  assert abs(scipy.stats.pearsonr(*shifts.T).statistic) < 0.2


class _Moves(NamedTuple):
  """What happened to each of n pictures."""

  angles: np.ndarray  # [n], in degrees.
  shifts: np.ndarray  # [n, 2], of the size.
  flips: np.ndarray  # [n]


def _recover(moved):
  """Moves of pictures of `_places`, and where all their pixels come from.

  Away from the edges, a pixel holds the place where it comes from: an affine
  function, which is fitted.
  """
  n, height, width, _ = moved.shape
  size = np.array([height, width])
  outputs = _places(height, width).reshape(-1, 2).astype(np.float64)
  design = np.column_stack([outputs, np.ones(len(outputs))])
  values = np.asarray(moved, np.float64).reshape(n, -1, 2)
  inside = ((values > 0.5) & (values < size - 1.5)).all(axis=-1)
  fits = [
    np.linalg.lstsq(design[i], x[i], rcond=None)[0]
    for i, x in zip(inside, values)
  ]
  fits = np.stack(fits)
  matrices = fits[:, :2].transpose(0, 2, 1)
  flips = np.linalg.det(matrices) < 0
  # What lands where the centre goes comes from the centre.
  center = (size - 1) / 2
  landed = [np.linalg.solve(m, center - f[2]) for m, f in zip(matrices, fits)]
  angles = np.degrees(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
  shifts = (np.stack(landed) - center) / size
  sources = (design @ fits).reshape(n, height, width, 2)
  return _Moves(angles, shifts, flips), matrices, sources


@pytest.mark.parametrize(
  'augmentation',
  [ALL, Augmentation(20.0, 0.0, False), Augmentation(0.0, 0.3, True)],
)
def test_pictures_are_moved_rigidly_and_evenly_within_the_ranges(augmentation):
  """Measured on the result, so whatever the random numbers are made of."""
  rotation, shift, flip = augmentation
  size = height, width = 36, 29
  images = np.broadcast_to(_places(*size), (400, *size, 2))
  moved = augment(KEY, images, augmentation)
  moves, matrices, sources = _recover(moved)
  # Neither scaled nor sheared.
  products = matrices @ matrices.transpose(0, 2, 1)
  np.testing.assert_allclose(products, [np.eye(2)] * 400, atol=1e-4)
  # Pixels from outside are the nearest at the edge, all others linear.
  nearest = np.clip(sources, 0, [height - 1, width - 1])
  np.testing.assert_allclose(moved, nearest, atol=1e-2)
  assert (nearest != sources).any()

  evenly = [(moves.angles, rotation), *((x, shift) for x in moves.shifts.T)]
  for values, most in evenly:
    assert np.abs(values).max() <= most + 1e-3
    if most:
      uniform = scipy.stats.uniform(-most, 2 * most)
      assert scipy.stats.kstest(values, uniform.cdf).pvalue > 0.01
  # Four standard errors of 400 throws of a coin.
  assert abs(moves.flips.sum() - 200 * flip) <= 40 * flip
  if all(augmentation):
    together = [moves.angles, *moves.shifts.T, moves.flips]
    correlations = np.corrcoef(together) - np.eye(4)
    assert np.abs(correlations).max() < 0.2


@pytest.mark.parametrize('degrees', [-170.0, -15.0, 3.0, 45.0, 90.0])
@pytest.mark.parametrize('size', [(16, 16), (17, 12)])
def test_a_rotation_is_that_of_scipy(degrees, size):
  image = _noise((*size, 3)).astype(np.float32)
  moved = _move(image, np.deg2rad(np.float32(degrees)), jnp.zeros(2), False)
  expected = scipy.ndimage.rotate(
    image, degrees, reshape=False, order=1, mode='nearest'
  )
  np.testing.assert_allclose(moved, expected, atol=0.02)


@pytest.mark.parametrize('shift', [(0.1, 0.0), (-0.33, 0.21), (1.0, -1.0)])
def test_a_shift_is_that_of_scipy(shift):
  image = _noise((17, 12, 3)).astype(np.float32)
  moved = _move(image, jnp.zeros(()), jnp.array(shift), False)
  pixels = (17 * shift[0], 12 * shift[1], 0)
  expected = scipy.ndimage.shift(image, pixels, order=1, mode='nearest')
  np.testing.assert_allclose(moved, expected, atol=0.02)


@pytest.mark.parametrize('size', [(33, 33), (32, 40)])
@pytest.mark.parametrize('degrees', [-120.0, 15.0, 180.0])
def test_the_centre_stays_where_it_is(size, degrees):
  center = (np.array(size) - 1) / 2
  radii = ((_places(*size) - center) ** 2).sum(axis=-1, keepdims=True)
  image = (255 * np.exp(-radii / 50)).astype(np.float32)
  angle = np.deg2rad(np.float32(degrees))
  for flip in (False, True):
    moved = _move(image, angle, jnp.zeros(2), flip)
    # Linear interpolation cuts curves by up to 255 / 25 / 8 in each direction.
    np.testing.assert_allclose(moved, image, atol=2.6)


def test_a_picture_is_mirrored_then_turned_then_shifted():
  # Smooth, since SciPy interpolates twice and we do once.
  image = _noise((30, 24, 1)).astype(np.float32)
  image = scipy.ndimage.gaussian_filter(image, (3, 3, 0))
  image = (image - image.min()) * (255 / np.ptp(image))
  expected = scipy.ndimage.rotate(
    image[:, ::-1], 20, reshape=False, order=1, mode='nearest'
  )
  expected = scipy.ndimage.shift(expected, (3, -1.2, 0), order=1)
  angle, shift = np.deg2rad(np.float32(20)), jnp.array([0.1, -0.05])
  moved = _move(image, angle, shift, True)
  # Where both interpolations know what is around.
  inner = (slice(8, -5), slice(5, -8))
  assert np.ptp(expected[inner]) > 50
  np.testing.assert_allclose(moved[inner], expected[inner], atol=3)


def test_augmentation_maps_over_keys():
  images = _noise((3, 4, 9, 10, 3))
  keys = jax.random.split(KEY, 3)
  over_keys = jax.vmap(lambda key, x: traceable(key, x, ALL))
  mapped = jit(over_keys)(keys, images)
  alone = [augment(key, x, ALL) for key, x in zip(keys, images)]
  np.testing.assert_allclose(mapped, jnp.stack(alone), atol=1e-3)


@pytest.mark.parametrize('precision', [None, 'bfloat16'])
def test_places_are_computed_at_the_highest_precision(precision):
  """Which CPUs have anyway: read from the program."""
  images = _noise((3, 9, 10, 3))
  with jax.default_matmul_precision(precision):
    text = augment.lower(KEY, images, ALL).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(products) >= 2
  for line in products:
    assert 'precision = [HIGHEST, HIGHEST]' in line


def test_pictures_move_alike_with_x64():
  images = _noise((8, 9, 10, 3))
  expected = augment(KEY, images, ALL)
  with jax.enable_x64(True):
    moved = augment(KEY, images, ALL)
  assert moved.dtype == jnp.float32
  np.testing.assert_allclose(moved, expected, atol=1e-2)
