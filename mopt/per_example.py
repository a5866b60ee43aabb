"""The Gramian of one gradient for each example, without the gradients.

With m examples as m objectives the stacked gradients are m times as large as
the parameters. Their inner products need less. Of a dense layer `y = x W` they
need its inputs and the cotangents d of its outputs: the gradient of example i
is the outer product of x_i and d_i, so that two have the inner product
`(x_i x_j) (d_i d_j)`. One forward and one backward pass give all of it.

Where parameters meet an example is read off the jaxpr of the loss of one
example. There the outputs get a tap: zeros that are added, whose derivative is
the cotangent. This function of one example is then mapped over the batch, by
JAX, and `mopt.local_gradients` does the rest, equation by equation.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn
from jax.extend.core import Literal
import jax.numpy as jnp
import numpy as np

from mopt.local_gradients import evaluate
from mopt.local_gradients import gradients
from mopt.local_gradients import gramian_of_use
from mopt.local_gradients import is_float
from mopt.local_gradients import Use
from mopt.masks import is_integer
from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.masks import resolve_mask
from mopt.min_norm import gramian_of

PyTree = Any

# Calls that are read as if their body stood in their place. Others that have a
# body are one equation: a custom derivative is what its author wants, not the
# derivative of the body, and what a loop does with parameters is its own.
_CALLS = frozenset(
  ['jit', 'closed_call', 'core_call', 'eval_jaxpr', 'remat2', 'checkpoint']
)
# Where the size stays, so do the entries, in another place or dtype, and with
# them the inner products.
_RELAYOUTS = frozenset(
  ['broadcast_in_dim', 'convert_element_type', 'copy', 'reshape', 'rev']
  + ['squeeze', 'transpose']
)


class _Kind(NamedTuple):
  """What a value depends on: on the example, or on some parameters at most."""

  is_mapped: bool = False
  leaves: frozenset[int] = frozenset()
  same_as: int | None = None  # The parameter all of whose entries it has.


class _Step(NamedTuple):
  """An equation, with numbers in place of variables."""

  equation: JaxprEqn
  inputs: list[int]
  outputs: list[int]
  is_mapped: bool  # Depends on the example.
  places: list[int]  # Of the inputs that bring parameters to the example.


class _Program(NamedTuple):
  """The loss of one example as a list of steps. Its values have numbers."""

  kinds: list[_Kind]
  known: dict[int, Any]  # Constants.
  params: list[int]
  example: list[int]
  output: int
  steps: list[_Step]


def per_example_gramian(
  loss: Callable[..., Any], mask: Mask = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Makes a function that returns the Gramian of all examples' gradients.

  Every example is an objective. The Gramian is that of `mopt.gramian` of the
  stacked gradients, `jax.vmap(jax.grad(loss), (None, 0, ...))`, but these are
  not formed: it is found from the inputs of each layer and the cotangents of
  its outputs, which takes one forward and one backward pass. Weights that are
  found from it weigh the losses, whose gradient any optimizer takes: see the
  example. Of LeNet-5 such a step takes 0.4 of the time of the stacked way on a
  CPU for batches of 32, and a quarter for 128.

  Any loss that `jax.vmap(jax.grad(loss))` takes will do. What saves is this:

  * Kernels of dense layers and of convolutions, and tables of embeddings, each
    used once, reshaped, transposed or cast before, or not. Of a kernel that is
    applied at many positions the gradients are formed if that is cheaper, one
    layer after the other.
  * Of anything else that uses a parameter once, such as a bias, a scale, or a
    function with a derivative of its own, gradients are formed, one parameter
    after the other.
  * Of parameters that are used several times (tied weights) or pass through a
    function first (weight normalisation, a norm that is added to the loss) the
    gradients are formed, all at once, and in a loop (`jax.lax.scan`, a
    recurrent layer) those of all parameters that enter it. If those are most of
    the network there is nothing to save.

  Examples may not depend on each other. Batch normalisation makes them: use
  running averages, or another normalisation, of layers or of groups. In
  training mode it would normalise each example by itself, and its new
  statistics are an output that is refused.

  Args:
    loss: `loss(params, *example) -> scalar`, of one example, without an axis
      for the batch. What all examples share is no part of the example: bind it
      by `functools.partial` or in a lambda.
    mask: which leaves count, see `mopt.mask_by_path`; `None` for all. Leaves of
      integers and booleans have no gradient and add nothing.

  Returns:
    `f(params, *batch) -> (values, gramian)`, where leaves of the batch are
    `[m, ...]`, m >= 1: the losses `[m]`, and `[m, m]` symmetric, both f32, f64
    if the loss or a gradient is. Products are carried out as those of
    `mopt.gramian` are. To be called under `jax.jit`, for it traces the loss
    anew at each call.

  Raises:
    ValueError: from `f`, if the loss returns anything but one real number, or
      the leaves of the batch disagree about m.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> loss = lambda params, x, y: (params['w'] @ x - y) ** 2
    >>> params = {'w': jnp.array([1., 0.])}
    >>> x, y = jnp.array([[1., 0.], [1., 1.]]), jnp.array([0., 2.])
    >>> values, gramian = jax.jit(mopt.per_example_gramian(loss))(params, x, y)
    >>> print(values, gramian)
    [1. 1.] [[ 4. -4.]
     [-4.  8.]]
    >>> weights = mopt.upgrad(gramian)
    >>> losses = jax.vmap(loss, (None, 0, 0))
    >>> grads = jax.grad(lambda params: weights @ losses(params, x, y))(params)
    >>> print(grads['w'])  # for any optimizer of Optax
    [ 0.5 -1.5]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024: one objective for each example.
    Goodfellow, `Efficient Per-Example Gradient Computations
    <https://arxiv.org/abs/1510.01799>`_, 2015: norms, of dense layers.
    Li et al., `Large Language Models Can Be Strong Differentially Private
    Learners <https://arxiv.org/abs/2110.05679>`_, 2021: at many positions.
  """

  def values_and_gramian(params: PyTree, *batch: Any):
    m = _batch_size(batch)
    params = jax.tree.map(jnp.asarray, params)
    masked_leaves(mask, params)  # raises for what is not real
    counts = jax.tree.map(
      lambda chosen, leaf: chosen and not is_integer(leaf),
      resolve_mask(mask, params),
      params,
    )
    # Zeros, for a loss that does not depend on the example, sharded as it is.
    axis = jax.typeof(jax.tree.leaves(batch)[0]).sharding.spec[:1]
    spread = jax.sharding.PartitionSpec(*axis) if any(axis) else None
    batch = (jnp.zeros(m, jnp.float32, out_sharding=spread), batch)
    program = _read(loss, params, jax.tree.leaves(counts), batch)
    before = dict(program.known)
    before.update(zip(program.params, jax.tree.leaves(params)))
    _run([s for s in program.steps if not s.is_mapped], before)
    values, uses = _differentiate(program, before, jax.tree.leaves(batch))
    # What JAX finds for an equation would run in TF32 or bfloat16 where the
    # platform does so by default.
    with jax.default_matmul_precision('highest'):
      gramian = _gramian(program, before, uses, m)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32)), gramian

  return values_and_gramian


def _batch_size(batch: PyTree) -> int:
  sizes = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
  if len(sizes) != 1 or sizes & {(), (0,)}:
    raise ValueError(
      'a batch needs leaves [m, ...] with one m >= 1, got leading axes '
      f'{sorted(sizes)}. What all examples share is no part of it: bind it by '
      'functools.partial or in a lambda.'
    )
  ((m,),) = sizes
  return m


def _trace(
  loss: Callable[..., Any], params: PyTree, batch: PyTree
) -> jax.extend.core.ClosedJaxpr:
  """The loss of one example, which comes behind a zero, plus that zero."""

  def checked(params, example):
    zero, args = example
    value = loss(params, *args)
    leaves = jax.tree.leaves(value)
    is_one = len(leaves) == 1 and leaves[0] is value and np.shape(value) == ()
    if not is_one or not is_float(jnp.asarray(value)):
      raise ValueError(
        f'loss must return one real number for one example, got {value!r}. '
        'Auxiliary output, such as new batch statistics, has no place here: '
        'each example is on its own.'
      )
    return jnp.asarray(value) + zero.astype(jnp.result_type(value))

  example = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jax.typeof(x).dtype), batch
  )
  return jax.make_jaxpr(checked)(params, example)


def _read(
  loss: Callable[..., Any], params: PyTree, counts: list[bool], batch: PyTree
) -> _Program:
  """Writes out calls, and follows the parameters that count."""
  closed = _trace(loss, params, batch)
  kinds: list[_Kind] = []
  known: dict[int, Any] = {}
  steps: list[_Step] = []

  def add(kind):
    kinds.append(kind)
    return len(kinds) - 1

  def add_constant(value):
    number = add(_Kind())
    known[number] = value
    return number

  def follow(jaxpr, consts, inputs):
    numbers = dict(zip(jaxpr.constvars, map(add_constant, consts)))
    numbers.update(zip(jaxpr.invars, inputs))

    def read(atom):
      is_literal = isinstance(atom, Literal)
      return add_constant(atom.val) if is_literal else numbers[atom]

    for equation in jaxpr.eqns:
      inputs = [read(atom) for atom in equation.invars]
      body = _body(equation)
      if body is not None and any(kinds[i].leaves for i in inputs):
        # Closed or not.
        consts = getattr(body, 'consts', ())
        outputs = follow(getattr(body, 'jaxpr', body), consts, inputs)
      else:
        found = [kinds[i] for i in inputs]
        outputs = [add(kind) for kind in _kinds_after(equation, found)]
        steps.append(_step(equation, inputs, outputs, found))
      numbers.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]

  own = [
    add(_Kind(leaves=frozenset([i]), same_as=i) if count else _Kind())
    for i, count in enumerate(counts)
  ]
  example = [add(_Kind(is_mapped=True)) for _ in jax.tree.leaves(batch)]
  (output,) = follow(closed.jaxpr, closed.consts, own + example)
  return _Program(kinds, known, own, example, output, steps)


def _body(equation: JaxprEqn) -> Any:
  """The jaxpr that a call stands for, `None` if the equation is none."""
  if equation.primitive.name not in _CALLS:
    return None
  return equation.params.get('jaxpr', equation.params.get('call_jaxpr'))


def _kinds_after(equation: JaxprEqn, kinds: list[_Kind]) -> list[_Kind]:
  """What the outputs of an equation depend on."""
  if any(kind.is_mapped for kind in kinds):
    return [_Kind(is_mapped=True) for _ in equation.outvars]
  leaves = frozenset().union(*(kind.leaves for kind in kinds))
  is_relayout = equation.primitive.name in _RELAYOUTS
  found = []
  for aval in _avals(equation.outvars):
    same_as = None
    if is_relayout and _avals(equation.invars)[0].size == aval.size:
      same_as = kinds[0].same_as
    # Through integers there is no gradient.
    found.append(_Kind(False, leaves, same_as) if is_float(aval) else _Kind())
  return found


def _avals(variables: Sequence[Any]) -> list[Any]:
  """Shapes and dtypes."""
  return [variable.aval for variable in variables]


def _step(
  equation: JaxprEqn, inputs: list[int], outputs: list[int], kinds: list[_Kind]
) -> _Step:
  is_mapped = any(kind.is_mapped for kind in kinds)
  is_use = is_mapped and any(map(is_float, _avals(equation.outvars)))
  places = [k for k, kind in enumerate(kinds) if kind.leaves and is_use]
  return _Step(equation, inputs, outputs, is_mapped, places)


def _run(steps: list[_Step], values: dict[int, Any]) -> None:
  """Adds what the steps compute to the values."""
  for step in steps:
    outputs = evaluate(step.equation, [values[i] for i in step.inputs])
    values.update(zip(step.outputs, outputs))


def _differentiate(
  program: _Program, before: dict[int, Any], batch: list[jax.Array]
) -> tuple[jax.Array, list[tuple[_Step, Use]]]:
  """Losses `[m]`, and the uses of parameters, with inputs and cotangents."""
  steps = [step for step in program.steps if step.is_mapped]
  met = [step for step in steps if step.places]
  kept = sorted(
    {i for step in met for i in step.inputs if program.kinds[i].is_mapped}
  )
  taps = [
    [
      jnp.zeros(aval.shape, aval.dtype)
      for aval in _avals(step.equation.outvars)
      if is_float(aval)
    ]
    for step in met
  ]

  def tapped(taps, example):
    values = dict(before)
    values.update(zip(program.example, example))
    left = iter(taps)
    for step in steps:
      _run([step], values)
      if step.places:
        floats = [i for i in step.outputs if is_float(values[i])]
        for i, tap in zip(floats, next(left), strict=True):
          values[i] = values[i] + tap
    loss = values[program.output]
    return loss, (loss, [values[i] for i in kept])

  cotangents, (losses, inputs) = jax.vmap(
    jax.grad(tapped, has_aux=True), in_axes=(None, 0)
  )(taps, batch)
  values = before | dict(zip(kept, inputs))
  uses = []
  for step, found in zip(met, cotangents):
    axes = [0 if program.kinds[i].is_mapped else None for i in step.inputs]
    inputs = [values[i] for i in step.inputs]
    uses.append((step, Use(step.equation, inputs, axes, found)))
  return losses, uses


def _gramian(
  program: _Program,
  before: dict[int, Any],
  uses: list[tuple[_Step, Use]],
  m: int,
) -> jax.Array:
  """Adds up what is used once, as it is, and then the gradients of the rest."""
  entering = [
    program.kinds[step.inputs[k]] for step, _ in uses for k in step.places
  ]
  times = collections.Counter(leaf for kind in entering for leaf in kind.leaves)
  once = {leaf for leaf, n in times.items() if n == 1}
  alone = once & {kind.same_as for kind in entering}
  total = jnp.zeros((m, m), jnp.float32)
  rest = {}  # The gradients of values that come from other leaves.
  for step, use in uses:
    numbers = [step.inputs[k] for k in step.places]
    is_alone = [program.kinds[i].same_as in alone for i in numbers]
    if is_alone == [True]:
      total = total + gramian_of_use(use, *step.places)
      continue
    for i, gradient, one in zip(numbers, gradients(use, step.places), is_alone):
      if one:
        total = total + gramian_of(gradient, None, m)
      else:
        rest[i] = rest[i] + gradient if i in rest else gradient
  if not rest:
    return total
  sources = sorted(set(times) - alone)
  numbers = [program.params[leaf] for leaf in sources]

  def derive(params):
    values = before | dict(zip(numbers, params))
    _run([step for step in program.steps if not step.is_mapped], values)
    return {i: values[i] for i in rest}

  _, pull_back = jax.vjp(derive, [before[i] for i in numbers])
  (stacked,) = jax.vmap(pull_back)(rest)
  return total + gramian_of(stacked, None, m)
