"""LeNet-5 as the paper has it (Table 1a): 60,074 parameters on MNIST."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models.convolution import BatchLastConv
from models.convolution import swap_batch


@jax.custom_jvp
def _halve(x: jax.Array) -> jax.Array:
  """Average pooling of axes 1 and 2 by two, dropping an odd last entry."""
  x = _windows(x)
  upper, lower = x[:, :, 0], x[:, :, 1]
  total = upper[:, :, :, 0] + upper[:, :, :, 1] + lower[:, :, :, 0]
  return (total + lower[:, :, :, 1]) / 4


@_halve.defjvp
def _halve_jvp(primals, tangents):
  # On CPUs the sum of four slices is faster than a mean, but not its gradient,
  # four padded arrays; and both are far from nn.avg_pool, whose gradient is a
  # window reduction. Together they take a sixth of a step of LeNet-5 less.
  return _halve(*primals), _windows(*tangents).mean(axis=(2, 4))


def _windows(x: jax.Array) -> jax.Array:
  """`[a, 2 h + 1, 2 w, b]`, say, to `[a, h, 2, w, 2, b]`."""
  first, height, width, last = x.shape
  height, width = height // 2, width // 2
  x = x[:, : 2 * height, : 2 * width]
  return x.reshape(first, height, 2, width, 2, last)


class LeNet5(nn.Module):
  """Two convolutions with average pooling, then three dense layers.

  On images of 28 x 28 x 1 and 10 classes it has 60,074 parameters, 58,920 of
  them in the kernels of the dense layers `layer1`, `layer2` and `layer3`.

  Attributes:
    num_classes: size of the output.
    dtype: of the computation; parameters are float32.
    batch_last: whether convolutions have the batch innermost, which is faster
      to train, or are `flax.linen.Conv`. Parameters and results are the same;
      see `models.convolution`.
  """

  num_classes: int = 10
  dtype: Any = jnp.float32
  batch_last: bool = True

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """From images `[batch, height, width, channels]` to logits, in float32.

    Args:
      images: float32, at least 10 x 10.
      train: changes nothing in this network.

    Raises:
      ValueError: for images of less than 10 x 10, of which nothing is left
        after two convolutions.
    """
    del train
    if images.ndim != 4 or min(images.shape[1:3]) < 10:
      raise ValueError(
        'lenet5 needs images [batch, height, width, channels] of at least '
        f'10 x 10, got shape {images.shape}.'
      )
    # Keras' initialiser, which the authors' code relies on.
    init = nn.initializers.glorot_uniform()
    conv = BatchLastConv if self.batch_last else nn.Conv
    x = swap_batch(images) if self.batch_last else images
    for name, features in (('conv1', 6), ('conv2', 16)):
      x = conv(
        features,
        kernel_size=(3, 3),
        padding='VALID',
        kernel_init=init,
        dtype=self.dtype,
        name=name,
      )(x)
      x = _halve(nn.relu(x))
    x = swap_batch(x) if self.batch_last else x
    x = x.reshape(x.shape[0], -1)
    for name, features in (('layer1', 120), ('layer2', 84)):
      x = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)(x)
      x = nn.relu(x)
    x = nn.Dense(
      self.num_classes, kernel_init=init, dtype=self.dtype, name='layer3'
    )(x)
    return x.astype(jnp.float32)
