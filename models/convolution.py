"""Convolution, in the form that is fastest on the platform.

XLA's convolution on CPUs is slow inside a loop and under `jax.vmap`
(https://github.com/jax-ml/jax/issues/12868 and 26568). There, a small kernel
runs as shifted slices of the image and a matrix product instead.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

_CHANNELS_LAST = jax.lax.conv_dimension_numbers(
  (1, 1, 1, 1), (1, 1, 1, 1), ('NHWC', 'HWIO', 'NHWC')
)

# From how many on they are not gathered in one matrix. With 32 to 128 channels
# a gradient step takes 7 to 45 % less, with 3 half as much again.
_MANY_CHANNELS = 16


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers=None,
  feature_group_count: int = 1,
  precision=None,
) -> jax.Array:
  """Stands in for `jax.lax.conv_general_dilated` in `flax.linen.Conv`.

  On CPUs, a two-dimensional convolution without strides, dilation or groups
  runs as shifted slices; everything else is handed to `jax.lax`. Both agree in
  value and gradient up to rounding.

  Args:
    lhs: `[batch, height, width, channels]`.
    rhs: `[height, width, channels, features]`.
    window_strides: as in `jax.lax.conv_general_dilated`, like all others.
    padding: likewise.
    lhs_dilation: likewise.
    rhs_dilation: likewise.
    dimension_numbers: likewise; the slices want channels last.
    feature_group_count: likewise.
    precision: likewise.

  Returns:
    `[batch, height, width, features]`.
  """
  plain = (
    rhs.ndim == 4
    and jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == _CHANNELS_LAST
    and lhs.dtype == rhs.dtype
    and all(k <= n for k, n in zip(rhs.shape[:2], lhs.shape[1:3]))
    and (isinstance(padding, str) or all(min(pair) >= 0 for pair in padding))
    and feature_group_count == 1
    and all(n == 1 for n in window_strides)
    and all(n == 1 for n in lhs_dilation or ())
    and all(n == 1 for n in rhs_dilation or ())
  )
  if plain and jax.default_backend() == 'cpu':
    return shifted_conv(lhs, rhs, padding, precision)
  return jax.lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    precision=precision,
  )


def shifted_conv(
  images: jax.Array,
  kernel: jax.Array,
  padding: str | Sequence[tuple[int, int]] = 'VALID',
  precision=None,
) -> jax.Array:
  """A convolution with stride 1 as one slice of the images per kernel entry.

  Args:
    images: `[batch, height, width, channels]`.
    kernel: `[rows, columns, channels, features]`.
    padding: `'VALID'`, `'SAME'`, or a pair of widths per spatial dimension.
    precision: of the matrix products.

  Returns:
    `[batch, height, width, features]`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from models.convolution import shifted_conv
    >>> shifted_conv(jnp.ones((1, 3, 3, 2)), jnp.ones((2, 2, 2, 5))).shape
    (1, 2, 2, 5)
  """
  rows, columns, channels, features = kernel.shape
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(
      images.shape[1:3], (rows, columns), (1, 1), padding
    )
  images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
  height = images.shape[1] - rows + 1
  width = images.shape[2] - columns + 1
  matmul = functools.partial(jnp.matmul, precision=precision)
  if channels >= _MANY_CHANNELS:
    # A product per row of the kernel: the slices of one row are wide enough,
    # and a third of the copies remain.
    wide = jnp.concatenate(
      [images[:, :, j : j + width] for j in range(columns)], axis=-1
    )
    entries = kernel.reshape(rows, columns * channels, features)
    terms = (
      matmul(
        wide[:, i : i + height],
        entries[i],
        preferred_element_type=jnp.float32,
      )
      for i in range(rows)
    )
    return functools.reduce(jnp.add, terms).astype(images.dtype)
  slices = [
    images[:, i : i + height, j : j + width]
    for i in range(rows)
    for j in range(columns)
  ]
  if channels == 1:
    # Products with one channel need no copy: they fuse into one loop.
    entries = kernel.reshape(rows * columns, features)
    terms = (
      matmul(x, entry[None], preferred_element_type=jnp.float32)
      for x, entry in zip(slices, entries)
    )
    return functools.reduce(jnp.add, terms).astype(images.dtype)
  return matmul(
    jnp.concatenate(slices, axis=-1),
    kernel.reshape(rows * columns * channels, features),
  )
