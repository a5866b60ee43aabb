"""Networks that are not ours, by the name of a function that makes them."""

from collections.abc import Callable, Iterator
import contextlib
import importlib
import operator
import sys
import traceback
from typing import Any

from flax import linen as nn
import jax.numpy as jnp


def find(name: str) -> Callable[..., Any]:
  """Imports the function of a name `package.module:function`.

  The module may be in the current directory, as with `python -m`. What it does
  when it is imported is done: a name is to be trusted like a program.

  Raises:
    ValueError: with one line, for a name of another form, a module that cannot
      be imported, or one without the function.
  """
  module_name, _, function_name = name.partition(':')
  parts = [*module_name.split('.'), *function_name.split('.')]
  # A file would be another one, or none, where the network is used.
  is_file = module_name.endswith('.py')
  if is_file or not all(part.isidentifier() for part in parts):
    raise ValueError(
      f'model={name}: expected package.module:function, of a module and not a '
      'file: module:function for module.py in the current directory.'
    )
  try:
    with _current_directory():
      module = importlib.import_module(module_name)
  # A script that is no module may exit.
  except (Exception, SystemExit) as error:
    raise ValueError(
      f'model={name}: expected a module to import, in the current directory or '
      f'where Python finds it, got {_describe(error)}.'
    ) from error
  try:
    function = operator.attrgetter(function_name)(module)
  except AttributeError:
    function = None
  if not callable(function):
    file = getattr(module, '__file__', None)
    raise ValueError(
      f'model={name}: expected a function {function_name} in {module_name}'
      f'{f" ({file})" if file else ""}, got '
      f'{"none" if function is None else repr(function)}.'
    )
  return function


def make(
  name: str, function: Callable[..., Any], num_classes: int, dtype: Any
) -> nn.Module:
  """Calls the function of a name with `num_classes=` and `dtype=`.

  Raises:
    ValueError: with one line, if it raises or returns no linen module.
  """
  try:
    with _current_directory():
      model = function(num_classes=num_classes, dtype=dtype)
  except (Exception, SystemExit) as error:
    raise ValueError(
      f'model={name}: expected a network for (num_classes={num_classes}, '
      f'dtype={jnp.dtype(dtype).name}), got {_describe(error)}.'
    ) from error
  if isinstance(model, nn.Module):
    return model
  got = repr(model) if isinstance(model, type) else type(model).__name__
  raise ValueError(
    f'model={name}: expected an instance of flax.linen.Module (of NNX: '
    f'flax.nnx.bridge.to_linen(Class, ...)), got {got}.'
  )


def _describe(error: BaseException) -> str:
  """What was raised and where, in one line."""
  text = ' '.join(f'{type(error).__name__}: {error}'.split()).rstrip('.: ')
  places = [
    f'{frame.filename}, line {frame.lineno}'
    for frame in traceback.extract_tb(error.__traceback__)
    # Not here, nor where Python imports.
    if frame.filename not in (__file__, importlib.__file__)
    and not frame.filename.startswith('<')
  ]
  return f'{text} ({places[-1]})' if places else text


@contextlib.contextmanager
def _current_directory() -> Iterator[None]:
  """Lets modules be found in the current directory, first, and ends that."""
  importlib.invalidate_caches()  # The file may be new.
  sys.path.insert(0, '')
  try:
    yield
  finally:
    with contextlib.suppress(ValueError):  # The module may have done it.
      sys.path.remove('')
