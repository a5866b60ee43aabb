"""Gradients of one equation with respect to what all examples share.

An equation of a jaxpr is met by m examples, each with inputs and with a
cotangent of the output of its own, while some inputs, made of parameters, are
the same for all. Of matrix products and convolutions the gradients are known in
factors, of look-ups in a table by what is looked up, so that inner products can
do without them. Of anything else they are what JAX finds for that equation.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn
import jax.numpy as jnp
import numpy as np

from mopt.min_norm import gramian_of


class Use(NamedTuple):
  """An equation in which parameters meet m examples."""

  equation: JaxprEqn
  inputs: list[Any]  # [m, ...] where they depend on the example
  axes: list[int | None]  # 0 there, None elsewhere
  cotangents: list[jax.Array]  # [m, ...], of the outputs that are floats


class _Factors(NamedTuple):
  """Gradients that are sums over t of outer products of x and d."""

  x: jax.Array  # [m, g, t, k]: g groups, each with weights [k, f] of its own
  d: jax.Array  # [m, g, t, f]
  restore: Callable[[jax.Array], jax.Array]  # [g, k, f] as the input is


def evaluate(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
  """The outputs of an equation."""
  params = equation.primitive.get_bind_params(equation.params)
  with equation.ctx.manager:
    outputs = equation.primitive.bind(*inputs, **params)
  return outputs if equation.primitive.multiple_results else [outputs]


def is_float(x: Any) -> bool:
  """Whether it can have a gradient: an array, or what a variable says of it."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def gradients(use: Use, places: list[int]) -> list[jax.Array]:
  """The gradients `[m, *input.shape]` of the inputs at some places."""
  factors = _factors(use, places)
  if factors is not None:
    formed = jax.vmap(factors.restore)(_formed(factors))
    return [formed.astype(use.inputs[places[0]].dtype)]

  def of_one(inputs, cotangents):
    def outputs(*chosen):
      replaced = list(inputs)
      for place, value in zip(places, chosen):
        replaced[place] = value
      return [y for y in evaluate(use.equation, replaced) if is_float(y)]

    _, pull_back = jax.vjp(outputs, *(inputs[place] for place in places))
    return pull_back(cotangents)

  of_all = jax.vmap(of_one, in_axes=(use.axes, 0))
  return list(of_all(use.inputs, use.cotangents))


def gramian_of_use(use: Use, place: int) -> jax.Array:
  """Inner products `[m, m]` of the gradients of one input, the cheaper way."""
  m = len(use.cotangents[0])
  looked_up = _gramian_of_lookup(use)
  if looked_up is not None:
    return looked_up
  factors = _factors(use, [place])
  if factors is None:
    (gradient,) = gradients(use, [place])
    return gramian_of(gradient, None, m)
  x, d, _ = factors
  t, k, f = *x.shape[2:], d.shape[3]
  # Multiplications for a pair of examples.
  if t * k * f / m + k * f <= t * t * (k + f):
    return gramian_of(_formed(factors), None, m)
  products = _crosswise('igtk,jgsk->gitjs', x)
  products *= _crosswise('igtf,jgsf->gitjs', d)
  return products.sum(axis=(0, 2, 4))


def _formed(factors: _Factors) -> jax.Array:
  highest = jax.lax.Precision.HIGHEST
  return jnp.einsum('igtk,igtf->igkf', factors.x, factors.d, precision=highest)


def _crosswise(formula: str, x: jax.Array) -> jax.Array:
  """Products of all examples with all, whole where the batch is sharded."""
  axes = formula.partition('->')[2]
  is_sharded = any(jax.typeof(x).sharding.spec)
  whole = jax.sharding.PartitionSpec(*(None for _ in axes))
  return jnp.einsum(
    formula,
    x,
    x,
    precision=jax.lax.Precision.HIGHEST,
    out_sharding=whole if is_sharded else None,
  )


def _is_empty(use: Use) -> bool:
  """Whether an array has no entry, of which no shape can be inferred."""
  return any(0 in np.shape(x) for x in use.inputs + use.cotangents)


def _wide(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _factors(use: Use, places: list[int]) -> _Factors | None:
  """The factors of the gradients, `None` where none are known.

  Of two factors of an equation one depends on the example, the other does not.
  """
  rules = {'dot_general': _of_product, 'conv_general_dilated': _of_convolution}
  rule = rules.get(use.equation.primitive.name)
  if rule is None or _is_empty(use) or use.axes[1 - places[0]] is None:
    return None
  (place,) = places
  split = rule(use.equation.params, place, use.inputs[place].shape)
  if split is None:
    return None
  factor, restore = split
  x, (d,) = use.inputs[1 - place], use.cotangents
  x, d = jax.vmap(factor)(_wide(x), _wide(d))
  return _Factors(x, d, restore)


def _of_product(params: Any, place: int, shape: tuple[int, ...]) -> Any:
  """Of `dot_general`: groups are its batch axes."""
  contracted, batch = params['dimension_numbers']
  summed, own_summed = contracted[1 - place], contracted[place]
  grouped, own_grouped = batch[1 - place], batch[place]
  own_free = [
    axis for axis in range(len(shape)) if axis not in own_summed + own_grouped
  ]
  order = [*own_grouped, *own_summed, *own_free]
  size = lambda axes: math.prod(shape[axis] for axis in axes)
  g, k, f = size(own_grouped), size(own_summed), size(own_free)

  def factor(x, d):
    free = [axis for axis in range(x.ndim) if axis not in summed + grouped]
    x = x.transpose(*grouped, *free, *summed).reshape(g, -1, k)
    # In the output the axes of the first of both come first.
    d = d.reshape((g, f, -1) if place == 0 else (g, -1, f))
    return x, d.swapaxes(1, 2) if place == 0 else d

  def restore(formed):
    sizes = [shape[axis] for axis in order]
    return formed.reshape(sizes).transpose(np.argsort(order))

  return factor, restore


def _of_convolution(params: Any, place: int, shape: tuple[int, ...]) -> Any:
  """Of a kernel: for each position of the output the inputs under it.

  What JAX finds is, for m examples, a convolution in m groups, which is slow.
  """
  if place == 0 or params['batch_group_count'] > 1:
    return None
  into, kernel, out = params['dimension_numbers']
  groups = params['feature_group_count']
  features, channels, *window = (shape[axis] for axis in kernel)
  padding = [(0, 0, 0), (0, 0, 0)] + [
    (low, high, dilation - 1)
    for (low, high), dilation in zip(params['padding'], params['lhs_dilation'])
  ]
  strides = params['window_strides']

  def factor(x, d):
    x, d = x.transpose(into), d.transpose(out)  # [images, channels, ...]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), padding)
    size = d.shape[2:]
    shifted = []
    for offset in np.ndindex(*window):
      first = np.multiply(offset, params['rhs_dilation'])
      last = first + np.multiply(np.subtract(size, 1), strides) + 1
      last = [*x.shape[:2], *last]
      shifted.append(jax.lax.slice(x, [0, 0, *first], last, [1, 1, *strides]))
    return rows(jnp.stack(shifted, axis=2)), rows(d)

  def rows(x):
    """To `[groups, positions, the rest]`."""
    positions = math.prod(x.shape[x.ndim - len(window) :])
    x = x.reshape(len(x), groups, -1, positions).transpose(1, 0, 3, 2)
    return x.reshape(groups, -1, x.shape[-1])

  def restore(formed):
    formed = formed.reshape(groups, channels, *window, -1)
    formed = jnp.moveaxis(formed, -1, 1).reshape(features, channels, *window)
    return formed.transpose(np.argsort(kernel))

  return factor, restore


def _gramian_of_lookup(use: Use) -> jax.Array | None:
  """Of a table whose rows are looked up, by what examples have in common.

  `None` for anything else, or where it is cheaper to form the gradients.
  """
  if use.equation.primitive.name != 'gather' or _is_empty(use):
    return None
  table, found = use.inputs
  numbers = use.equation.params['dimension_numbers']
  whole_rows = use.equation.params['slice_sizes'] == (1, *table.shape[1:])
  is_lookup = numbers.start_index_map == numbers.collapsed_slice_dims == (0,)
  t = math.prod(found.shape[1:-1])
  if not (whole_rows and is_lookup) or t * t > len(table):
    return None
  m = len(found)
  found = found.reshape(m, t)
  if use.equation.params['mode'] == jax.lax.GatherScatterMode.CLIP:
    found = jnp.clip(found, 0, len(table) - 1)
  (d,) = use.cotangents
  axes = [axis + 1 for axis in numbers.offset_dims]
  d = jnp.moveaxis(d, axes, range(-len(axes), 0)).reshape(m, t, -1)
  # What lies outside has no gradient.
  inside = (found >= 0) & (found < len(table))
  same = found[:, :, None, None] == found[None, None]
  same &= inside[:, :, None, None]
  products = _crosswise('itf,jsf->itjs', _wide(d))
  return jnp.where(same, products, 0).sum(axis=(1, 3))
