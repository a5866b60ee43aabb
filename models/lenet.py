"""LeNet-5 as the paper has it (Table 1a): 60,074 parameters on MNIST."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models.convolution import conv_general_dilated


def _halve(x: jax.Array) -> jax.Array:
  """Average pooling over 2 x 2, which drops an odd last row or column."""
  # As a reshape and a mean: in a training step on CPU a quarter faster than
  # nn.avg_pool, whose gradient is a window reduction over a padded array.
  batch, height, width, channels = x.shape
  height, width = height // 2, width // 2
  x = x[:, : 2 * height, : 2 * width]
  return x.reshape(batch, height, 2, width, 2, channels).mean(axis=(2, 4))


class LeNet5(nn.Module):
  """Two convolutions with average pooling, then three dense layers.

  On images of 28 x 28 x 1 and 10 classes it has 60,074 parameters, 58,920 of
  them in the kernels of the dense layers `layer1`, `layer2` and `layer3`.

  Attributes:
    num_classes: size of the output.
    dtype: of the computation; parameters are float32.
  """

  num_classes: int = 10
  dtype: Any = jnp.float32

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
    x = images
    for name, features in (('conv1', 6), ('conv2', 16)):
      x = nn.Conv(
        features,
        kernel_size=(3, 3),
        padding='VALID',
        kernel_init=init,
        conv_general_dilated=conv_general_dilated,
        dtype=self.dtype,
        name=name,
      )(x)
      x = _halve(nn.relu(x))
    x = x.reshape(x.shape[0], -1)
    for name, features in (('layer1', 120), ('layer2', 84)):
      x = nn.Dense(features, kernel_init=init, dtype=self.dtype, name=name)(x)
      x = nn.relu(x)
    x = nn.Dense(
      self.num_classes, kernel_init=init, dtype=self.dtype, name='layer3'
    )(x)
    return x.astype(jnp.float32)
