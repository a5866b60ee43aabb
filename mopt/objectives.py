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


def _is_of_params_alone(objective: Objective) -> bool:
  """Whether an objective has no room for anything but its parameters."""
  function, bound = objective, {}
  while isinstance(function, functools.partial):
    bound |= function.keywords
    function = function.func
  function = inspect.unwrap(function)  # of jax.jit, say
  if function in (l1_norm, l2_norm_squared, lp_norm):
    return True  # what else they take is a mask, not a batch
  try:
    parameters = inspect.signature(objective).parameters
  except (TypeError, ValueError):  # a builtin: no signature to read
    return False
  return len(parameters.keys() - bound.keys()) == 1 and all(
    p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()
  )


def value_and_stacked_grad(
  *objectives: Objective, has_aux: bool | Sequence[bool] = False
) -> Callable[..., Any]:
  """Makes a function that returns all values and all gradients, stacked.

  Every objective is differentiated by itself, so that one without a network
  behind it (`l1_norm`) costs no backward pass; under `jax.jit` the compiler
  shares the forward pass of those that have one in common. An objective of the
  parameters alone, such as `mopt.l1_norm` or
  `functools.partial(mopt.l1_norm, mask=mask)`, is called without the batch.

  Args:
    *objectives: m >= 2 functions `objective(params, *args) -> scalar`, or
      `-> (scalar, aux)` where `has_aux` says so.
    has_aux: whether the objectives return auxiliary data: for all of them, or
      one boolean for each.

  Returns:
    `f(params, *args) -> (values, grads)`: values `[m]` f32, grads a pytree
    with leaves `[m, *param.shape]`. With auxiliary data
    `((values, aux), grads)`: `aux` is a tuple of length m that holds `None`
    for an objective without.

  Raises:
    ValueError: for fewer than two objectives, or a `has_aux` of another length
      or of other things than booleans.

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
  params_alone = [_is_of_params_alone(objective) for objective in objectives]

  def value_and_grads(params: PyTree, *args: Any, **kwargs: Any):
    values, auxes, grads = [], [], []
    for objective, aux_flag, alone in zip(objectives, flags, params_alone):
      function = jax.value_and_grad(objective, has_aux=aux_flag)
      if alone:
        value, grad = function(params)
      else:
        value, grad = function(params, *args, **kwargs)
      value, aux = value if aux_flag else (value, None)
      values.append(jnp.asarray(value, jnp.float32))
      auxes.append(aux)
      grads.append(grad)
    stacked = stack(*grads)
    if any(flags):
      return (jnp.stack(values), tuple(auxes)), stacked
    return jnp.stack(values), stacked

  return value_and_grads


def _leaves_f32(mask: Mask, params: PyTree) -> list[jax.Array]:
  return [jnp.asarray(x, jnp.float32) for _, x in masked_leaves(mask, params)]


def _sum_f32(terms: list[jax.Array]) -> jax.Array:
  return sum(map(jnp.sum, terms), jnp.zeros((), jnp.float32))


def l1_norm(params: PyTree, mask: Mask = None) -> jax.Array:
  """Sum of absolute values, with subgradient `sign(w)`: 0 at 0.

  `jax.grad(jnp.abs)(0.)` is 1, so that a plain l1 pushes every pruned weight
  away from zero. Here a weight that is zero stays at rest.

  Args:
    params: pytree of arrays.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all.

  Returns:
    A scalar, f32, accumulated in f32 whatever the dtype of the leaves.

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
  leaves = _leaves_f32(mask, params)
  # x * sign(x) with the sign held fixed: value |x|, derivative sign(x).
  return _sum_f32([x * jax.lax.stop_gradient(jnp.sign(x)) for x in leaves])


def l2_norm_squared(params: PyTree, mask: Mask = None) -> jax.Array:
  """Sum of squares, without the factor 1/2 of the paper's equation (3).

  Args:
    params: pytree of arrays.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all.

  Returns:
    A scalar, f32, accumulated in f32 whatever the dtype of the leaves.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> print(mopt.l2_norm_squared({'w': jnp.array([3.0, 4.0])}))
    25.0
  """
  return _sum_f32([jnp.square(x) for x in _leaves_f32(mask, params)])


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
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all.
    smoothing: e > 0, in the units of the weights; a normal float32.

  Returns:
    A scalar, f32, accumulated in f32 whatever the dtype of the leaves.

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

  return _sum_f32([term(x) for x in _leaves_f32(mask, params)])


class NonzeroCount(NamedTuple):
  """How many entries differ from zero (NaN does)."""

  total: jax.Array  # shape=(), dtype=jnp.int32.
  per_leaf: dict[str, jax.Array]  # path of the leaf -> shape=(), jnp.int32.


def count_nonzero(params: PyTree, mask: Mask = None) -> NonzeroCount:
  """Counts the nonzero entries, in total and for each leaf.

  Args:
    params: pytree of arrays with fewer than 2^31 entries in all.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all.

  Returns:
    A `NonzeroCount`: `total`, and `per_leaf` keyed by path. Leaves whose paths
    are the same text, `{'a/b': x, 'a': {'b': y}}`, are counted together.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> params = {'a': jnp.array([0.0, 1.0]), 'b': jnp.ones(3)}
    >>> count = mopt.count_nonzero(params)
    >>> int(count.total), {k: int(v) for k, v in count.per_leaf.items()}
    (4, {'a': 1, 'b': 3})

  References:
    Reiners et al., 2020, equation (5).
  """
  per_leaf: dict[str, jax.Array] = {}
  for path, x in masked_leaves(mask, params):
    count = jnp.sum(x != 0, dtype=jnp.int32)
    per_leaf[path] = per_leaf[path] + count if path in per_leaf else count
  total = sum(per_leaf.values(), jnp.zeros((), jnp.int32))
  return NonzeroCount(total, per_leaf)
