"""Objectives, and their gradients stacked along a leading axis.

An objective is a function `objective(params, *args) -> scalar`. The gradients
of m objectives travel as one pytree whose leaves have a leading axis of size
m, `[m, *param.shape]`: the form that `mopt.aggregate` takes.
"""

from collections.abc import Callable, Sequence
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.masks import path_name
from mopt.masks import weight_mask

PyTree = Any
Objective = Callable[..., Any]


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


def _call_of(objective: Objective) -> _Call:
  """Reads from the signature of an objective what it is called with.

  Raises:
    ValueError: for a second parameter that has a default and is no mask.
  """
  alone = _Call(False, frozenset(), False)
  function, bound = _innermost(objective)
  if function in (group_norm, l1_norm, l2_norm_squared, lp_norm):
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
    values = jnp.stack(_of_one_dtype(values))
    return ((values, tuple(auxes)) if any(flags) else values), stacked

  return value_and_grads


def _as_float(x: Any) -> jax.Array:
  """In float32, or float64 if it is that: half precision is not summed."""
  dtype = getattr(x, 'dtype', jnp.result_type(float))
  dtype = jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))
  return jnp.asarray(x, dtype)


def _of_one_dtype(arrays: Sequence[Any]) -> list[jax.Array]:
  arrays = [_as_float(x) for x in arrays]
  dtype = functools.reduce(
    jnp.promote_types, [x.dtype for x in arrays], jnp.dtype(jnp.float32)
  )
  return [x.astype(dtype) for x in arrays]


def _sum_over(
  term: Callable[[jax.Array], jax.Array], params: PyTree, mask: Mask
) -> jax.Array:
  """The sum of `term` over the entries of the weights."""
  leaves = masked_leaves(weight_mask(mask, params), params)
  sums = _of_one_dtype([jnp.sum(term(_as_float(x))) for _, x in leaves])
  return sum(sums[1:], sums[0]) if sums else jnp.zeros((), jnp.float32)


def l1_norm(params: PyTree, mask: Mask = None) -> jax.Array:
  """Sum of absolute values, with subgradient `sign(w)`: 0 at 0.

  `jax.grad(jnp.abs)(0.)` is 1, so that a plain l1 pushes every pruned weight
  away from zero. Here a weight that is zero stays at rest.

  Args:
    params: pytree of arrays.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> w = jnp.array([-2.0, 0.0, 3.0])
    >>> print(mopt.l1_norm(w), jax.grad(mopt.l1_norm)(w))
    5.0 [-1.  0.  1.]

  References:
    Reiners et al., 2020, equation (4).
  """
  # x * sign(x) with the sign held fixed: value |x|, derivative sign(x).
  term = lambda x: x * jax.lax.stop_gradient(jnp.sign(x))
  return _sum_over(term, params, mask)


def l2_norm_squared(params: PyTree, mask: Mask = None) -> jax.Array:
  """Sum of squares, without the factor 1/2 of the paper's equation (3).

  Args:
    params: pytree of arrays.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.l2_norm_squared({'w': jnp.array([3.0, 4.0])}))
    25.0
  """
  return _sum_over(jnp.square, params, mask)


def lp_norm(
  params: PyTree, p: float, mask: Mask = None, smoothing: float = 1e-3
) -> jax.Array:
  """Sum of smoothed p-th powers, 0 < p < 1: between l1 and counting.

  `|w|^p` has an infinite slope at 0. With smoothing e each term is
  `(w^2 + e^2)^(p/2) - e^p`: 0 at 0 with derivative 0, and within `e^p` of
  `|w|^p` everywhere. No root is taken of the sum.

  Args:
    params: pytree of arrays, `|w|` below `1e18 * smoothing`.
    p: the exponent, 0 < p < 1. Above: `l1_norm`, `l2_norm_squared`.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.
    smoothing: e > 0, in the units of the weights; a normal float32.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Raises:
    ValueError: for `p` or `smoothing` out of range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> w = jnp.array([0.0, 4.0])
    >>> print(round(float(mopt.lp_norm(w, p=0.5, smoothing=1e-6)), 2))
    2.0
  """
  if not 0 < p < 1:
    raise ValueError(
      f'p must lie between 0 and 1, got {p}: use l1_norm for 1 and '
      'l2_norm_squared for 2.'
    )
  # Beyond these terms are 0 / 0 or 0 * inf.
  limits = jnp.finfo(jnp.float32)
  if not float(limits.tiny) <= smoothing <= float(limits.max):
    raise ValueError(
      f'smoothing must be positive, a normal float32, got {smoothing}.'
    )

  def term(x):
    # The same as the docstring's difference, without its cancellation.
    ratio = x / smoothing
    return smoothing**p * jnp.expm1(0.5 * p * jnp.log1p(jnp.square(ratio)))

  return _sum_over(term, params, mask)


def group_norm(params: PyTree, mask: Mask = None) -> jax.Array:
  """Group lasso: the l2 norms of what enters each unit or filter, summed.

  A group is all that has one place on the last axis of a leaf: the weights into
  one unit of a dense kernel `[in, out]`, or one filter of a convolution
  `[height, width, in, out]`. As l1 does with weights, this drives whole groups
  to zero, which a narrower layer can leave out. Groups are not scaled by their
  size. The gradient of a group that is all zeros is taken as 0, one of the
  subgradients there, so that it stays at rest.

  Args:
    params: pytree of arrays; leaves with fewer than two axes, such as biases,
      have no groups and add nothing.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A scalar, accumulated in f32, or in f64 where a leaf is f64; 0 without one.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> kernel = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    >>> print(mopt.group_norm({'kernel': kernel, 'bias': jnp.ones(2)}))
    5.0

  References:
    Yuan and Lin, `Model selection and estimation in regression with grouped
    variables <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006; for
    networks Wen et al., `Learning Structured Sparsity in Deep Neural Networks
    <https://arxiv.org/abs/1608.03665>`_, 2016.
  """

  def norms(x):
    if x.ndim < 2:
      return jnp.zeros((), x.dtype)
    axes = tuple(range(x.ndim - 1))
    # Squares neither overflow nor vanish; the largest is held fixed, for it
    # cancels.
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    largest = jax.lax.stop_gradient(largest)
    is_zero = largest == 0
    scale = jnp.where(is_zero | ~jnp.isfinite(largest), 1, largest)
    squares = jnp.sum(jnp.square(x / scale), axis=axes, keepdims=True)
    # Twice, since a gradient of the root at 0 would be infinite times 0.
    root = jnp.sqrt(jnp.where(is_zero, 1, squares))
    return scale * jnp.where(is_zero, 0, root)

  return _sum_over(norms, params, mask)


class NonzeroCount(NamedTuple):
  """How many entries differ from zero (NaN does), and how many there are."""

  total: jax.Array  # shape=(), dtype=jnp.int32.
  per_leaf: dict[str, jax.Array]  # path of the leaf -> shape=(), jnp.int32.
  size: int = 0  # Entries, zeros too; an array where a transformation made one.
  size_per_leaf: dict[str, int] = {}  # path of the leaf -> entries.


def count_nonzero(params: PyTree, mask: Mask = None) -> NonzeroCount:
  """Counts the nonzero entries, in total and for each leaf.

  Args:
    params: pytree of arrays with fewer than 2^31 entries in all.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all, but in a
      tree those of integers and booleans: none of these is a weight unless a
      mask names it.

  Returns:
    A `NonzeroCount`: `total` and `size`, and both for each leaf, keyed by path.
    Leaves whose paths are the same text, `{'a/b': x, 'a': {'b': y}}`, are
    counted together.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> params = {'a': jnp.array([0.0, 1.0]), 'b': jnp.ones(3)}
    >>> count = mopt.count_nonzero(params)
    >>> int(count.total), {k: int(v) for k, v in count.per_leaf.items()}
    (4, {'a': 1, 'b': 3})
    >>> count.size, count.size_per_leaf
    (5, {'a': 2, 'b': 3})

  References:
    Reiners et al., 2020, equation (5).
  """
  per_leaf: dict[str, jax.Array] = {}
  sizes: dict[str, int] = {}
  for path, x in masked_leaves(weight_mask(mask, params), params):
    count = jnp.sum(x != 0, dtype=jnp.int32)
    per_leaf[path] = per_leaf[path] + count if path in per_leaf else count
    sizes[path] = sizes.get(path, 0) + np.size(x)
  total = sum(per_leaf.values(), jnp.zeros((), jnp.int32))
  return NonzeroCount(total, per_leaf, sum(sizes.values()), sizes)
