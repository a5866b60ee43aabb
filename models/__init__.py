"""The networks of the paper, as Flax linen modules."""

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from models.lenet import LeNet5
from models.vgg import VGG

_MODELS = {'lenet5': LeNet5, 'vgg': VGG}
NAMES = tuple(_MODELS)


def create(
  name: str,
  num_classes: int = 10,
  dtype: Any = jnp.float32,
  batch_last: bool = True,
) -> nn.Module:
  """Makes a model by name.

  Args:
    name: one of `models.NAMES`.
    num_classes: size of the output, >= 2.
    dtype: of the computation, such as `jnp.bfloat16`; parameters, running
      statistics and logits stay float32.
    batch_last: whether convolutions have the batch innermost, which on CPUs and
      on a GPU is faster to train, or are `flax.linen.Conv`. TPUs: not measured.
      Parameters and results are the same, but for what dropout draws.

  Returns:
    A module: `module.init(key, images)` gives variables, and
    `module.apply(variables, images)` logits `[batch, num_classes]`. It takes
    `train=True` for training, see `VGG`.

  Raises:
    ValueError: for an unknown name, or fewer than two classes.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import models
    >>> model = models.create('lenet5')
    >>> images = jnp.zeros((2, 28, 28, 1))
    >>> variables = model.init(jax.random.key(0), images)
    >>> model.apply(variables, images).shape
    (2, 10)
  """
  if name not in _MODELS:
    raise ValueError(f'model must be one of {", ".join(NAMES)}, got {name!r}.')
  if num_classes < 2:
    raise ValueError(f'num_classes must be >= 2, got {num_classes}.')
  return _MODELS[name](
    num_classes=num_classes, dtype=dtype, batch_last=batch_last
  )
