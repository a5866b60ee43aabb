"""The gradients of m objectives, stacked along a leading axis.

They travel as one pytree whose leaves are `[m, *param.shape]`: the form that
`mopt.aggregate` takes.
"""

from collections.abc import Callable, Sequence
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mopt.masks import path_name
from mopt.objectives import as_float
from mopt.objectives import group_norm
from mopt.objectives import l1_norm
from mopt.objectives import l2_norm_squared
from mopt.objectives import log_sum_norm
from mopt.objectives import lp_norm
from mopt.objectives import Objective
from mopt.objectives import of_one_dtype

PyTree = Any


def stack(*grads: PyTree) -> PyTree:
  """Stacks the gradients of m objectives along a new leading axis.

  Args:
    *grads: m >= 2 pytrees of the same structure and shapes.

  Returns:
    One pytree, every leaf `[m, *leaf.shape]`.

  Raises:
    ValueError: for fewer than two trees, or trees that differ in structure or
      in the shape of a leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> mopt.stack({'w': jnp.zeros(3)}, {'w': jnp.ones(3)})['w'].shape
    (2, 3)
  """
  if len(grads) < 2:
    raise ValueError(f'stack needs at least 2 gradients, got {len(grads)}.')
  structures = [jax.tree.structure(g) for g in grads]
  for number, structure in enumerate(structures):
    if structure != structures[0]:
      raise ValueError(
        'stack needs gradients of one structure: expected '
        f'{structures[0]}, got {structure} for gradient {number}.'
      )

  def join(path, *leaves):
    shapes = [np.shape(leaf) for leaf in leaves]
    if len(set(shapes)) > 1:
      raise ValueError(
        f'stack needs gradients of one shape, got {shapes} at '
        f'{path_name(path)!r}.'
      )
    return jnp.stack(leaves)

  return jax.tree_util.tree_map_with_path(join, *grads)


class _Call(NamedTuple):
  """What an objective takes beside its parameters."""

  takes_batch: bool  # All positional and keyword arguments.
  keywords: frozenset[str]  # Else: those keyword arguments,
  takes_keywords: bool  # or all of them.


_Parameter = inspect.Parameter
_NORMS = (group_norm, l1_norm, l2_norm_squared, log_sum_norm, lp_norm)


def _call_of(objective: Objective) -> _Call:
  """Reads from the signature of an objective what it is called with.

  Raises:
    ValueError: for a second parameter that has a default and is no mask.
  """
  alone = _Call(False, frozenset(), False)
  function, bound = _innermost(objective)
  if function in _NORMS:
    return alone  # what else they take is a mask, not a batch
  parameters = _parameters(objective)
  if parameters is None:  # a builtin: no signature to read
    return _Call(True, frozenset(), True)
  kinds = [p.kind for p in parameters]
  in_place = [
    p
    for p in parameters
    if p.kind in (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)
  ]
  if len(in_place) > 1:
    second = in_place[1]
    if second.default is _Parameter.empty:
      return _Call(True, frozenset(), True)
    if second.name != 'mask':
      raise ValueError(
        f'the second parameter of an objective is the batch, but {second.name} '
        f'of {objective!r} has a default: bind it by '
        f'functools.partial(objective, {second.name}=...), or make the batch '
        'the second parameter, without a default.'
      )
  elif _Parameter.VAR_POSITIONAL in kinds:
    return _Call(True, frozenset(), True)
  names = {p.name for p in parameters if p.kind == _Parameter.KEYWORD_ONLY}
  return alone._replace(
    keywords=frozenset(names - bound),
    takes_keywords=_Parameter.VAR_KEYWORD in kinds,
  )


def takes_batch(objective: Objective) -> bool:
  """Whether `value_and_stacked_grad` hands the batch to an objective."""
  return _call_of(objective).takes_batch


def _innermost(function: Any) -> tuple[Any, frozenset[str]]:
  """What partial and JAX have wrapped, and the keywords that are bound."""
  bound: frozenset[str] = frozenset()
  while True:
    if isinstance(function, functools.partial):
      bound |= frozenset(function.keywords)
      function = function.func
    elif _is_wrapped_by_jax(function):
      function = function.__wrapped__
    else:
      return function, bound


def _parameters(function: Any) -> list[inspect.Parameter] | None:
  """The parameters of a function by itself, `None` if it does not tell.

  What a `functools.wraps` wrapper wraps does not matter: it takes what it
  takes. `jax.jit` and the like take what the function takes that they wrap.
  """
  if isinstance(function, functools.partial):
    inner = _parameters(function.func)
    if inner is None:
      return None
    stand_in: Any = lambda: None
    stand_in.__signature__ = inspect.Signature(inner)
    function = functools.partial(stand_in, *function.args, **function.keywords)
  elif _is_wrapped_by_jax(function):
    return _parameters(function.__wrapped__)
  elif inspect.ismethod(function):
    inner = _parameters(function.__func__)
    return inner and inner[1:]
  try:
    signature = inspect.signature(function, follow_wrapped=False)
  except (TypeError, ValueError):
    return None
  return list(signature.parameters.values())


def _is_wrapped_by_jax(function: Any) -> bool:
  """Whether this is `jax.jit`, `jax.checkpoint`, `nnx.jit` of a function."""
  if not hasattr(function, '__wrapped__'):
    return False
  # A wrapper has the name of what it wraps, but the globals of its module.
  module = type(function).__module__
  if inspect.isfunction(function):
    module = function.__globals__.get('__name__', '')
  return module.partition('.')[0] in ('jax', 'jaxlib', 'flax')


def value_and_stacked_grad(
  *objectives: Objective, has_aux: bool | Sequence[bool] = False
) -> Callable[..., Any]:
  """Makes a function that returns all values and all gradients, stacked.

  Every objective is differentiated by itself, so that one without a network
  behind it (`l1_norm`) costs no backward pass; under `jax.jit` the compiler
  shares the forward pass of those that have one in common.

  An objective gets the batch if it has a second positional parameter without a
  default, or `*args`. One of the parameters alone, such as `mopt.l1_norm` or
  `functools.partial(mopt.l1_norm, mask=mask)`, is called without; so is one
  whose second parameter is `mask` with a default. Any other default there is
  refused, for in `lambda params, i=i: ...` the batch would take the place of
  `i`: write `functools.partial(objective, i=i)`. A wrapper made with
  `functools.wraps` is judged by its own parameters, `jax.jit` of a function by
  those of the function.

  Args:
    *objectives: m >= 2 functions `objective(params, *args) -> scalar`, or
      `-> (scalar, aux)` where `has_aux` says so. Keyword arguments reach those
      that get the batch, and others that name them behind a `*`.
    has_aux: whether the objectives return auxiliary data: for all of them, or
      one boolean for each.

  Returns:
    `f(params, *args) -> (values, grads)`: values `[m]`, f32 (f64 if one of them
    is), grads a pytree with leaves `[m, *param.shape]`. With auxiliary data
    `((values, aux), grads)`: `aux` is a tuple of length m that holds `None`
    for an objective without.

  Raises:
    ValueError: for fewer than two objectives, one whose second parameter has a
      default and is no mask, or a `has_aux` of another length or of other
      things than booleans.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> error = lambda params, batch: jnp.sum((params['w'] - batch) ** 2)
    >>> grad_fn = mopt.value_and_stacked_grad(error, mopt.l1_norm)
    >>> values, grads = grad_fn({'w': jnp.array([2.0, 0.0])}, 1.0)
    >>> print(values, grads['w'])
    [2. 2.] [[ 2. -2.]
     [ 1.  0.]]

  References:
    Reiners, Klamroth, Stiglmayr, `Efficient and Sparse Neural Networks by
    Pruning Weights in a Multiobjective Learning Approach
    <https://arxiv.org/abs/2008.13590>`_, 2020, line 4 of Algorithm 2.
  """
  m = len(objectives)
  if m < 2:
    raise ValueError(f'expected at least 2 objectives, got {m}.')
  flags = (has_aux,) * m if isinstance(has_aux, bool) else tuple(has_aux)
  if len(flags) != m or not all(isinstance(flag, bool) for flag in flags):
    raise ValueError(
      f'has_aux must be a boolean or one for each of the {m} objectives, '
      f'got {has_aux!r}.'
    )
  calls = [_call_of(objective) for objective in objectives]

  def value_and_grads(params: PyTree, *args: Any, **kwargs: Any):
    values, auxes, grads = [], [], []
    for objective, aux_flag, call in zip(objectives, flags, calls):
      function = jax.value_and_grad(objective, has_aux=aux_flag)
      if call.takes_batch:
        value, grad = function(params, *args, **kwargs)
      else:
        named = {
          name: value
          for name, value in kwargs.items()
          if call.takes_keywords or name in call.keywords
        }
        value, grad = function(params, **named)
      value, aux = value if aux_flag else (value, None)
      values.append(value)
      auxes.append(aux)
      grads.append(grad)
    stacked = stack(*grads)
    values = jnp.stack(of_one_dtype(values))
    return ((values, tuple(auxes)) if any(flags) else values), stacked

  return value_and_grads


# Up to so many objectives a backward pass is written out for each.
_FEW = 8


def value_and_stacked_jac(
  function: Objective, has_aux: bool = False
) -> Callable[..., Any]:
  """Makes a function that returns all values of one, and all their gradients.

  For objectives that are found together, such as the losses of several tasks of
  one network: the forward pass is made once, with `jax.jit` and without. Of
  objectives that are functions of their own, `value_and_stacked_grad` is the
  one to take.

  Args:
    function: `function(params, *args, **kwargs) -> values`, `[m]` floats with
      m >= 2; with auxiliary data `(values, aux)`.
    has_aux: whether it returns auxiliary data.

  Returns:
    `f(params, *args, **kwargs) -> (values, grads)`: values `[m]`, f32 (f64 if
    they are), grads a pytree with leaves `[m, *param.shape]`. With auxiliary
    data `((values, aux), grads)`.

  Raises:
    ValueError: for what is no function, or a `has_aux` that is no boolean; from
      `f` if the values are not `[m]` floats with m >= 2.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> def losses(params, batch):
    ...   features = jnp.tanh(params['w'] * batch)  # found once
    ...   return jnp.stack([features.sum(), jnp.square(features).sum()])
    >>> grad_fn = mopt.value_and_stacked_jac(losses)
    >>> values, grads = grad_fn({'w': jnp.zeros(3)}, 2.0)
    >>> print(values, grads['w'])
    [0. 0.] [[2. 2. 2.]
     [0. 0. 0.]]
  """
  if not callable(function):
    raise ValueError(f'function must be a function, got {function!r}.')
  if not isinstance(has_aux, bool):
    raise ValueError(f'has_aux must be a boolean, got {has_aux!r}.')

  def value_and_grads(params: PyTree, *args: Any, **kwargs: Any):
    def of_params(params):
      found = function(params, *args, **kwargs)
      values, aux = found if has_aux else (found, None)
      shape, dtype = jnp.shape(values), jnp.result_type(values)
      is_float = jnp.issubdtype(dtype, jnp.floating)
      if len(shape) != 1 or shape[0] < 2 or not is_float:
        raise ValueError(
          'function must return [m] floats with m >= 2, the values of the '
          f'objectives, got {dtype}{list(shape)}.'
        )
      return jnp.asarray(values), aux

    values, pull, aux = jax.vjp(of_params, params, has_aux=True)
    one_each = jnp.eye(len(values), dtype=values.dtype)
    if len(values) <= _FEW:
      # On CPUs twice as fast as mapped ones, whose convolutions are grouped.
      stacked = stack(*(pull(row)[0] for row in one_each))
    else:
      (stacked,) = jax.vmap(pull)(one_each)
    values = as_float(values)
    return ((values, aux) if has_aux else values), stacked

  return value_and_grads
