"""The paper's VGG-like network (Table 1b): 309,290 parameters on CIFAR10."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models.convolution import BatchLastConv
from models.convolution import swap_batch


def _halve(x: jax.Array) -> jax.Array:
  """Max pooling over 2 x 2, which drops an odd last row or column."""
  # As slices, not nn.max_pool: its gradient, a select-and-scatter, is slow on
  # CPUs. Where several are largest, the gradient is shared.
  height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  corners = [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]
  return jnp.maximum(
    jnp.maximum(corners[0], corners[1]), jnp.maximum(corners[2], corners[3])
  )


class VGG(nn.Module):
  """Three blocks of two convolutions, then one dense layer.

  A convolution is followed by an exponential linear unit and then by batch
  normalisation (Keras' momentum and epsilon), a block by max pooling and
  dropout. On images of 32 x 32 x 3 and 10 classes it has 309,290 parameters:
  308,394 are trained, 20,480 of them in the kernel of `denselayer`; 896 are the
  running means and variances in the collection `batch_stats`.

  Attributes:
    num_classes: size of the output.
    dropout: a rate for each block.
    dtype: of the computation; parameters and statistics are float32.
    axis_name: of the mapped axis over which a batch is split, if it is: then
      the batch statistics are those of the whole batch.
    batch_last: whether convolutions have the batch innermost, which is faster
      to train, or are `flax.linen.Conv`. Parameters and results are the same,
      but for what dropout draws; see `models.convolution`.
  """

  num_classes: int = 10
  dropout: tuple[float, float, float] = (0.2, 0.3, 0.4)
  dtype: Any = jnp.float32
  axis_name: str | None = None
  batch_last: bool = True

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
    """From images `[batch, height, width, channels]` to logits, in float32.

    Args:
      images: float32, at least 8 x 8.
      train: normalise by the statistics of the batch and update the running
        ones (`mutable=['batch_stats']`), and drop units (`rngs={'dropout':
        key}`).

    Raises:
      ValueError: for smaller images, of which nothing is left after three
        times pooling.
    """
    if images.ndim != 4 or min(images.shape[1:3]) < 8:
      raise ValueError(
        'vgg needs images [batch, height, width, channels] of at least 8 x 8, '
        f'got shape {images.shape}.'
      )
    # Keras' initialiser, which the authors' code relies on.
    init = nn.initializers.glorot_uniform()
    conv = BatchLastConv if self.batch_last else nn.Conv
    x = swap_batch(images) if self.batch_last else images
    for block, (features, rate) in enumerate(
      zip((32, 64, 128), self.dropout, strict=True)
    ):
      for i in (1, 2):
        number = 2 * block + i
        x = conv(
          features,
          kernel_size=(3, 3),
          kernel_init=init,
          dtype=self.dtype,
          name=f'conv{number}',
        )(x)
        x = nn.BatchNorm(
          use_running_average=not train,
          axis=0 if self.batch_last else -1,  # channels
          momentum=0.99,
          epsilon=1e-3,
          axis_name=self.axis_name,
          dtype=self.dtype,
          name=f'norm{number}',
        )(nn.elu(x))
      x = _halve(x)
      x = nn.Dropout(rate, deterministic=not train)(x)
    x = swap_batch(x) if self.batch_last else x
    x = x.reshape(x.shape[0], -1)
    x = nn.Dense(
      self.num_classes, kernel_init=init, dtype=self.dtype, name='denselayer'
    )(x)
    return x.astype(jnp.float32)
