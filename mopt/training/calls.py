"""How a network is called, in one place, and whether it can be trained."""

from collections.abc import Callable
import inspect
from typing import Any

from flax import linen as nn
from flax.nnx.bridge import ToLinen
import jax
import jax.numpy as jnp
import numpy as np

from mopt.masks import path_name
from mopt.training.data import Dataset
from mopt.training.loss import check_shapes
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss

PyTree = Any


def init(model: nn.Module, key: jax.Array, inputs: jax.Array) -> PyTree:
  """Variables, as arrays without the boxes that carry partitions."""
  return _init(model, key, inputs)[1]


def _init(model, key, inputs):
  # A module of NNX that drops asks for its stream when it is made; no stream
  # but that of the parameters changes them.
  rngs = {'params': key, 'dropout': key}
  outputs, variables = model.init_with_output(
    rngs, inputs, **_mode(model, False)
  )
  return outputs, nn.meta.unbox(variables)


def train(
  model: nn.Module, key: jax.Array, inputs: jax.Array, variables: PyTree
) -> tuple[Any, PyTree]:
  """Outputs, and the variables that are no parameters as they are then."""
  outputs, state = model.apply(
    variables,
    inputs,
    **_mode(model, True),
    rngs={'dropout': key},
    mutable=[name for name in variables if name != 'params'],
  )
  return outputs, nn.meta.unbox(state)


def predict(model: nn.Module, inputs: jax.Array, variables: PyTree) -> Any:
  """Outputs of a network that is not in training."""
  return model.apply(variables, inputs, **_mode(model, False))


def over_axis(model: nn.Module, axis: str | None) -> nn.Module:
  """The network with its field `axis_name`, if it has one, set to an axis."""
  if isinstance(model, ToLinen):
    if 'axis_name' not in model.kwargs:
      return model
    return model.clone(kwargs={**model.kwargs, 'axis_name': axis})
  return model.clone(axis_name=axis) if hasattr(model, 'axis_name') else model


def _mode(model: nn.Module, is_training: bool) -> dict[str, Any]:
  """`train=`, for a network that takes it."""
  return {'train': is_training} if _takes_train(model) else {}


def _takes_train(call: Callable[..., Any]) -> bool:
  if isinstance(call, nn.Sequential):  # It hands on all that it is given.
    return bool(call.layers) and _takes_train(call.layers[0])
  if isinstance(call, ToLinen):  # It takes everything; its class may not.
    call = call.nnx_class.__call__
  parameters = inspect.signature(call).parameters
  kinds = {parameter.kind for parameter in parameters.values()}
  return 'train' in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def check(
  name: str, model: nn.Module, data: Dataset, loss: Loss = cross_entropy
) -> PyTree:
  """Raises unless a network fits the data and can be trained, at no cost.

  Args:
    name: of the network, for messages.
    model: a linen module.
    data: the data set.
    loss: of its outputs.

  Returns:
    The shapes of its variables, `params` and others, if it has any.

  Raises:
    ValueError: with one line, for a network that cannot take such inputs, in
      training or out of it, that gives no logits `[batch, num_classes]`, or
      nothing that the loss can be of, or whose variables cannot be trained and
      saved.
  """
  key = jax.random.key(0)
  variables = _call(name, model, data, loss, 1, _init, key)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    where = f'in {path_name(path)}, a variable of the network'
    # NumPy's types of floats: a file holds no others.
    if not np.issubdtype(leaf.dtype, np.floating):
      raise ValueError(
        f'model={name}: expected float32 {where}, got {leaf.dtype}.'
      )
    if not all(isinstance(key, jax.tree_util.DictKey) for key in path):
      raise ValueError(
        f'model={name}: expected nothing but dictionaries around arrays {where}'
        f', got {jax.tree_util.keystr(path)}.'
      )
  before = {k: v for k, v in variables.items() if k != 'params'}
  after = _call(name, model, data, loss, 2, train, key, variables)
  if changed := set(_signature(before)) ^ set(_signature(after)):
    raise ValueError(
      f'model={name}: expected a step of training to keep the shapes of what '
      f'is no parameter; it changes {min(changed)}.'
    )
  return {'params': {}} | dict(variables)


def _call(
  name: str,
  model: nn.Module,
  data: Dataset,
  loss: Loss,
  batch: int,
  function: Callable[..., tuple[Any, PyTree]],
  key: jax.Array,
  *variables: PyTree,
) -> PyTree:
  """The shapes of what `_init` or `train` gives beside outputs."""
  size = data.train.images.shape[1:]
  images = jax.ShapeDtypeStruct((batch, *size), jnp.float32)
  try:
    outputs, others = jax.eval_shape(
      lambda key, images, *variables: function(model, key, images, *variables),
      key,
      images,
      *variables,
    )
  # It is the code of a stranger.
  except Exception as error:
    inputs = f'inputs [batch, {", ".join(map(str, size))}]'
    when = ' in training' if function is train else ''
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise ValueError(
      f'model={name}: expected a network for {inputs}{when}, got {reason}'
    ) from error
  shape = getattr(outputs, 'shape', None)
  if loss.classes and shape != (batch, data.num_classes):
    got = type(outputs).__name__ if shape is None else f'shape {shape}'
    number = 'one picture' if batch == 1 else f'{batch} pictures'
    raise ValueError(
      f'dataset={data.name}: expected logits [batch, {data.num_classes}] for '
      f'as many classes, got {got} for {number}.'
    )
  labels = data.train.labels
  dtype = jax.dtypes.canonicalize_dtype(labels.dtype)
  one = jax.ShapeDtypeStruct((batch, *labels.shape[1:]), dtype)
  check_shapes(loss, outputs, one)
  return others


def _signature(tree: PyTree) -> list[str]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [f'{path_name(path)} {x.dtype}{list(x.shape)}' for path, x in leaves]
