"""Convolution with the batch innermost.

Networks of few channels are slow with the channels innermost, whatever
convolves them: there is no vector to work on. With the batch innermost all that
runs over pixels works on whole vectors, a shifted image is copied in long
pieces, and the convolution is one matrix product. On CPUs XLA's convolution is,
besides, slow inside a loop and under `jax.vmap`
(https://github.com/jax-ml/jax/issues/12868 and 26568).

On CPUs a gradient step of LeNet-5 takes about half as long as with shifted
images and the channels last, one of the VGG-like network a fifth less. On one
H100 (JAX 0.11.2), beside `flax.linen.Conv`, in ms a step:

  LeNet-5, batches of 32              0.188 -> 0.126
  26 members of it                     1.83 -> 0.338
  VGG                                  1.12 -> 0.98
  14 members of it                     10.2 -> 7.2
  14 members of it in bfloat16          5.2 -> 4.7

TPUs: not measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


def swap_batch(x: jax.Array) -> jax.Array:
  """`[batch, height, width, channels]` to `[channels, ..., batch]`, or back.

  Height and width are axes 1 and 2 of both, so that pooling serves either.
  """
  return x.transpose(3, 1, 2, 0)


class BatchLastConv(nn.Module):
  """Takes the place of `flax.linen.Conv` between two `swap_batch`.

  It has stride 1 and the same parameters, `kernel` `[rows, columns, channels,
  features]` and `bias` `[features]`, with the same initial values. It can be
  differentiated in reverse mode only.

  Attributes:
    features: number of output channels.
    kernel_size: rows and columns.
    padding: `'VALID'`, `'SAME'`, or a pair of widths per spatial dimension.
    kernel_init: initialiser of the kernel.
    dtype: of the computation; parameters are float32.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from models.convolution import BatchLastConv
    >>> conv = BatchLastConv(features=5, kernel_size=(2, 2), padding='VALID')
    >>> images = jnp.ones((3, 28, 28, 32))  # [channels, height, width, batch]
    >>> output, _ = conv.init_with_output(jax.random.key(0), images)
    >>> output.shape
    (5, 27, 27, 32)
  """

  features: int
  kernel_size: tuple[int, int]
  padding: str | Sequence[tuple[int, int]] = 'SAME'
  kernel_init: Callable[..., jax.Array] = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[channels, height, width, batch]` to `[features, ..., batch]`."""
    rows, columns = self.kernel_size
    shape = (rows, columns, x.shape[0], self.features)
    kernel = self.param('kernel', self.kernel_init, shape, jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, shape[-1:], jnp.float32)
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    padding = self.padding
    if isinstance(padding, str):
      padding = jax.lax.padtype_to_pads(
        x.shape[1:3], self.kernel_size, (1, 1), padding
      )
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = x.shape[1] - rows + 1, x.shape[2] - columns + 1
    shifted = jnp.concatenate(
      [
        x[:, i : i + height, j : j + width]
        for i in range(rows)
        for j in range(columns)
      ]
    )  # [rows * columns * channels, height, width, batch]
    # Flat, for of more axes the compiler makes copies first.
    y = _weigh(
      kernel.reshape(-1, self.features), shifted.reshape(len(shifted), -1)
    )
    y = y.reshape(self.features, *shifted.shape[1:])
    return y + jnp.expand_dims(bias, (1, 2, 3))


@jax.custom_vjp
def _weigh(kernel: jax.Array, shifted: jax.Array) -> jax.Array:
  """`kernel.T @ shifted`, of kernel `[k, features]` and shifted `[k, pixels]`.

  The derivative that JAX finds for `shifted` is the transpose of a product,
  which the compiler leaves as such under `jax.vmap`, so that all who read it
  stride through memory: half as much again for a step of LeNet-5.
  """
  return kernel.T @ shifted


def _weigh_bwd(saved, cotangent):
  kernel, shifted = saved
  return shifted @ cotangent.T, kernel @ cotangent


_weigh.defvjp(lambda *args: (_weigh(*args), args), _weigh_bwd)
