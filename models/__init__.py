"""The networks of the paper, and others, as Flax linen modules."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from models import own
from models.lenet import LeNet5
from models.mlp import MLP
from models.vgg import VGG

_MODELS: dict[str, type[nn.Module]] = {
  'lenet5': LeNet5,
  'mlp': MLP,
  'vgg': VGG,
}
NAMES = tuple(_MODELS)


def find(name: str) -> Callable[..., Any]:
  """What makes the network of a name, which `create` calls.

  Args:
    name: see `create`.

  Returns:
    A function of `num_classes=` and `dtype=`.

  Raises:
    ValueError: for an unknown name, a module that cannot be imported, or one
      that lacks the function.

  Examples:
    >>> import models
    >>> models.find('lenet5')(num_classes=7).num_classes
    7
  """
  if ':' in name:
    return own.find(name)
  if name not in _MODELS:
    raise ValueError(
      f'model={name}: expected one of {", ".join(NAMES)}, or '
      'package.module:function for a network of your own.'
    )
  return _MODELS[name]


def create(
  name: str,
  num_classes: int = 10,
  dtype: Any = jnp.float32,
  batch_last: bool = True,
) -> nn.Module:
  """Makes a model by name.

  Args:
    name: one of `models.NAMES`, or `'package.module:function'` for your own:
      the module, which may be in the current directory, is imported, which runs
      it, and `function(num_classes=..., dtype=...)` returns a linen module, as
      a class with these two fields does. See docs/networks.md.
    num_classes: size of the output, >= 1; a classifier has 2 or more.
    dtype: of the computation, such as `jnp.bfloat16`; parameters, running
      statistics and logits stay float32.
    batch_last: whether convolutions have the batch innermost, which on CPUs and
      on a GPU is faster to train, or are `flax.linen.Conv`. TPUs: not measured.
      Parameters and results are the same, but for what dropout draws. Networks
      without convolutions, and your own, are not told.

  Returns:
    A module: `module.init(key, images)` gives variables, and
    `module.apply(variables, images)` logits `[batch, num_classes]`. It takes
    `train=True` for training, see `VGG`.

  Raises:
    ValueError: for an unknown name, an output of no size, or a function that
      cannot be imported, raises, or returns something else.

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
  make = find(name)
  if num_classes < 1:
    raise ValueError(f'num_classes must be >= 1, got {num_classes}.')
  if ':' in name:
    return own.make(name, make, num_classes, dtype)
  settings = {'batch_last': batch_last} if hasattr(make, 'batch_last') else {}
  return make(num_classes=num_classes, dtype=dtype, **settings)
