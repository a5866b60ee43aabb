"""A multilayer perceptron: LeNet-300-100, 266,610 parameters on MNIST."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
  """Dense layers alone, for inputs of any shape.

  On images of 28 x 28 x 1 and 10 classes it is the LeNet-300-100 of LeCun et
  al., 1998, with rectified linear units: 266,610 parameters, 266,200 of them in
  the kernels of `layer1`, `layer2` and `layer3`.

  Attributes:
    num_classes: size of the output.
    dtype: of the computation; parameters are float32.
    hidden: sizes of the layers before the last.
  """

  num_classes: int = 10
  dtype: Any = jnp.float32
  hidden: tuple[int, ...] = (300, 100)

  @nn.compact
  def __call__(self, inputs: jax.Array, train: bool = False) -> jax.Array:
    """From inputs `[batch, ...]` to logits `[batch, num_classes]`, in float32.

    Args:
      inputs: float32; what belongs to an example is taken as one vector.
      train: changes nothing in this network.

    Raises:
      ValueError: for inputs without a batch, or without an entry in an example.
    """
    del train
    if inputs.ndim < 1 or 0 in inputs.shape[1:]:
      raise ValueError(
        'mlp needs inputs [batch, ...] with at least one entry an example, got '
        f'shape {inputs.shape}.'
      )
    init = nn.initializers.glorot_uniform()  # as LeNet5
    dense = lambda i, features: nn.Dense(
      features, kernel_init=init, dtype=self.dtype, name=f'layer{i}'
    )
    x = inputs.reshape(inputs.shape[0], -1)
    for i, features in enumerate(self.hidden, start=1):
      x = nn.relu(dense(i, features)(x))
    x = dense(len(self.hidden) + 1, self.num_classes)(x)
    return x.astype(jnp.float32)
