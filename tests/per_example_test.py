"""The Gramian of all examples' gradients, against the stacked gradients."""

import functools

from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import models
from models.convolution import BatchLastConv
from models.convolution import swap_batch
import mopt

M = 5


def stacked(loss, params, *batch, mask=None):
  """Values and Gramian from one gradient for each example."""
  axes = (None, *(0 for _ in batch))
  values, grads = jax.vmap(jax.value_and_grad(loss), axes)(params, *batch)
  return values, mopt.gramian(grads, mask)


def programs(loss, args, mask=None):
  """Ours and the stacked way, compiled."""
  ours = mopt.per_example_gramian(loss, mask)
  other = functools.partial(stacked, loss, mask=mask)
  return [jax.jit(f).lower(*args).compile() for f in (ours, other)]


def compare(found, expected, tolerance=5e-7):
  """Each in units of its largest entry."""
  for x, y in zip(found, expected, strict=True):
    assert x.shape == y.shape
    assert x.dtype == y.dtype
    largest = max(jnp.abs(y).max(), jnp.finfo(jnp.float32).tiny)
    np.testing.assert_allclose(x / largest, y / largest, rtol=0, atol=tolerance)


def check(loss, *args, mask=None, tolerance=5e-7):
  """Compares ours with the stacked way, and returns the Gramian."""
  ours, other = programs(loss, args, mask)
  found = ours(*args)
  compare(found, other(*args), tolerance)
  return found[1]


def normal(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def labels(m=M):
  return jnp.arange(m) % 10


def cross_entropy(logits, label):
  return -jax.nn.log_softmax(logits)[label]


def loss_of(model, **frozen):
  """The loss of one example, for which a linen module wants a batch of one."""

  def loss(params, x, label):
    variables = {'params': params, **frozen}
    return cross_entropy(model.apply(variables, x[None])[0], label)

  return loss


def network(model, inputs):
  variables = model.init(jax.random.key(0), inputs[:1])
  params = variables.pop('params')
  return loss_of(model, **variables), params, inputs, labels(len(inputs))


@pytest.mark.parametrize('batch_last', [True, False])
def test_lenet5_in_fewer_operations_and_less_memory(batch_last):
  model = models.create('lenet5', batch_last=batch_last)
  loss, *args = network(model, normal(32, 28, 28, 1))
  ours, other = programs(loss, args)
  compare(ours(*args), other(*args))
  flops = [p.cost_analysis()['flops'] for p in (ours, other)]
  assert flops[0] < 0.3 * flops[1]
  bytes_ = [p.memory_analysis().temp_size_in_bytes for p in (ours, other)]
  assert bytes_[0] < 0.5 * bytes_[1]


def test_multilayer_perceptron():
  check(*network(models.create('mlp'), normal(M, 28, 28, 1)))


@pytest.mark.slow
def test_vgg_whose_batch_statistics_are_frozen():
  # Its other convolution, of LeNet-5 too, takes twice as long to compile.
  model = models.create('vgg', batch_last=False)
  check(*network(model, normal(M, 8, 8, 3)))


class Layers(nn.Module):
  """Most layers that Flax has."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 2), strides=2, padding='SAME')(x)
    x = nn.GroupNorm(3)(nn.gelu(x))
    x = nn.Conv(4, (2, 2), kernel_dilation=2, feature_group_count=2)(x)
    x = nn.LayerNorm()(nn.silu(x))
    x = nn.ConvTranspose(4, (3, 3), strides=(2, 1))(x)
    x = nn.WeightNorm(nn.Conv(4, (2, 2), padding='CIRCULAR'))(x)
    x = nn.RMSNorm()(nn.max_pool(x, (2, 2)))
    x = nn.DenseGeneral((2, 3), axis=(1, 3))(x)
    return nn.Dense(10)(nn.PReLU()(x).reshape(len(x), -1))


@pytest.mark.slow
def test_layers_of_pictures():
  check(*network(Layers(), normal(M, 9, 8, 3)))


class Words(nn.Module):
  """Tied weights, attention, a loop, and a layer that is computed twice."""

  rows: int = 200

  @nn.compact
  def __call__(self, words):
    table = nn.Embed(self.rows, 8)
    x = table(words) + nn.Embed(7, 8)(jnp.arange(7))[None]
    x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x))
    x = x + nn.remat(nn.Dense)(8)(nn.relu(x))
    x = nn.RNN(nn.SimpleCell(8))(x)
    return table.attend(x[:, -1])


def test_layers_of_words():
  words = jax.random.randint(jax.random.key(1), (M, 7), 0, 200)
  check(*network(Words(), words))


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs, use_running_average=True)
    self.dense = nnx.Linear(100, 10, rngs=rngs)
    self.dropout = nnx.Dropout(0.5)

  def __call__(self, x, key):
    x = nnx.relu(self.norm(self.conv(x)))
    return self.dense(self.dropout(x.reshape(-1), rngs=nnx.Rngs(key)))


def test_a_network_of_nnx_and_a_key_for_each_example():
  graph, params, others = nnx.split(NNX(nnx.Rngs(0)), nnx.Param, ...)

  def loss(params, x, label, key):
    return cross_entropy(nnx.merge(graph, params, others)(x, key), label)

  keys = jax.random.split(jax.random.key(0), M)
  check(loss, params, normal(M, 5, 5, 1), labels(), keys)


def test_an_example_of_any_form_and_parameters_that_are_numbers():
  def loss(params, example):
    (kernel, factor), unused = params
    del unused
    return factor * (kernel @ example['x'] + example['y'][0]).sum()

  params = (normal(2, 3), jnp.float32(0.5)), jnp.arange(3)
  batch = {'x': np.asarray(normal(M, 3)), 'y': (normal(M), None)}
  values, gramian = mopt.per_example_gramian(loss)(params, batch)
  kernel = 0.5 * jnp.repeat(batch['x'][:, None], 2, axis=1).reshape(M, -1)
  inner = (params[0][0] @ batch['x'].T).sum(axis=0) + 2 * batch['y'][0]
  np.testing.assert_allclose(values, 0.5 * inner, rtol=1e-6)
  expected = kernel @ kernel.T + jnp.outer(inner, inner)
  np.testing.assert_allclose(gramian, expected, rtol=1e-5, atol=1e-5)


# What happens to parameters before, while and after they meet the example.
USES = {
  'tied': lambda p, x: jnp.tanh(x @ p['w']) @ p['w'].T,
  'tied by a slice': lambda p, x: (x @ p['w'])[:2] * p['w'][0, :2],
  'product on the left': lambda p, x: p['w'].T @ jnp.outer(x, x[:2]),
  'through a function': lambda p, x: x @ jnp.exp(p['w']),
  'two that meet before': lambda p, x: x @ (p['w'] * p['c'][:, None]),
  'two at once': lambda p, x: jnp.where(x > 0, p['w'][:, 0], p['c']),
  'one twice at once': lambda p, x: jnp.where(x > 0, p['c'], p['c']),
  'transposed and cast': lambda p, x: p['w'].T.astype(jnp.float32) @ x,
  'no example': lambda p, x: p['w'] * p['c'][:, None],
  'no parameter': lambda p, x: x,
  'stopped': lambda p, x: x @ jax.lax.stop_gradient(p['w']) * p['b'],
  'as an index': lambda p, x: x[p['c'].astype(jnp.int32)] * p['c'],
  'compared': lambda p, x: jnp.where(x[0] > p['b'], p['b'], 1.0),
  'a norm beside it': lambda p, x: x @ p['w'] + 0.1 * jnp.sum(p['w'] ** 2),
  'a call': lambda p, x: jax.jit(lambda w, b: x @ w + b)(p['w'], p['b']),
  'a loop': lambda p, x: jax.lax.fori_loop(
    0, 3, lambda _, y: jnp.tanh(y @ p['w'] @ p['w'].T), x
  ),
  'a branch': lambda p, x: jax.lax.cond(
    x[0] > 0, lambda: x @ p['w'] + p['b'], lambda: p['b']
  ),
  'a solution': lambda p, x: jnp.linalg.solve(
    jnp.eye(3) + jnp.outer(p['c'], p['c']), x
  ),
  'sorted': lambda p, x: jnp.sort(x * p['c']),
  'reversed': lambda p, x: p['c'][::-1] * x,
  'accumulated': lambda p, x: x @ p['w'] @ p['w'].T @ p['w'] + p['b'],
}


@pytest.mark.parametrize('name', USES)
def test_a_parameter_may_be_used_in_any_way(name):
  params = {'w': normal(3, 4), 'b': normal(4), 'c': normal(3)}
  loss = lambda p, x: jnp.sum(jnp.sin(USES[name](p, x)))
  check(loss, params, normal(M, 3, seed=1))


@jax.custom_vjp
def straight_through(x, w):
  return jnp.round(x @ w)


straight_through.defvjp(
  lambda x, w: (jnp.round(x @ w), (x, w)),
  lambda kept, d: (d @ kept[1].T, jnp.outer(kept[0], d)),
)


@jax.custom_jvp
def doubled(x, w):
  return x @ w


doubled.defjvps(lambda dx, _, x, w: dx @ w, lambda dw, _, x, w: 2 * (x @ dw))


@pytest.mark.parametrize('function', [straight_through, doubled])
def test_a_derivative_of_its_own_is_kept(function):
  params = {'w': normal(3, 4), 'v': normal(4, 2)}
  loss = lambda p, x: jnp.sum(jnp.sin(function(x, p['w']) @ p['v']))
  gramian = check(loss, params, normal(M, 3))
  # Not that of what it computes.
  other = mopt.per_example_gramian(
    lambda p, x: jnp.sum(jnp.sin(x @ p['w'] @ p['v']))
  )
  assert jnp.abs(gramian - other(params, normal(M, 3))[1]).max() > 0.1


def sizes(draw, n):
  return [draw(st.integers(1, 4)) for _ in range(n)]


@settings(max_examples=10)
@given(st.data())
def test_any_product_of_two_arrays(data):
  """All layouts of dot_general, with either of the factors the parameter."""
  axes = dict(zip('gkltuf', sizes(data.draw, 6)))
  x = data.draw(
    st.permutations(data.draw(st.sampled_from(['gkt', 'klt', 't'])))
  )
  shared = [a for a in x if a in 'gkl']
  w = data.draw(st.permutations([*shared, 'u', 'f']))
  out = data.draw(
    st.permutations([a for a in dict.fromkeys(x + w) if a not in 'kl'])
  )
  order = data.draw(st.booleans())
  x, w, out = ''.join(x), ''.join(w), ''.join(out)
  formula = f'{x},{w}->{out}' if order else f'{w},{x}->{out}'

  def loss(params, x):
    pair = (x, params) if order else (params, x)
    return jnp.sum(jnp.sin(jnp.einsum(formula, *pair)))

  m = data.draw(st.integers(1, 4))
  shape = lambda names: [axes[a] for a in names]
  check(loss, normal(*shape(w)), normal(m, *shape(x), seed=1))


@settings(max_examples=8)
@given(st.data())
def test_any_convolution(data):
  n = data.draw(st.integers(1, 2))
  numbers = lambda low, high: [
    data.draw(st.integers(low, high)) for _ in range(n)
  ]
  groups, inputs, features, images = sizes(data.draw, 4)
  window = numbers(1, 3)
  layout = data.draw(st.permutations(range(n + 2)))
  kernel_layout = data.draw(st.permutations(range(n + 2)))
  own = lambda shape, order: [shape[order.index(a)] for a in range(n + 2)]
  kernel = own([groups * features, inputs, *window], kernel_layout)
  x = own([images, groups * inputs, *numbers(5, 8)], layout)
  options = {
    'window_strides': numbers(1, 3),
    'padding': [(a, b) for a, b in zip(numbers(-1, 2), numbers(0, 2))],
    'lhs_dilation': numbers(1, 2),
    'rhs_dilation': numbers(1, 2),
    'feature_group_count': groups,
    'dimension_numbers': jax.lax.ConvDimensionNumbers(
      tuple(layout), tuple(kernel_layout), tuple(layout)
    ),
  }

  def loss(params, x):
    return jnp.sum(jnp.sin(jax.lax.conv_general_dilated(x, params, **options)))

  # Small and large, for both ways to the Gramian.
  m = data.draw(st.sampled_from([1, 3]))
  check(loss, normal(*kernel), normal(m, *x, seed=1))


@pytest.mark.parametrize('mode', ['fill', 'clip', 'wrap'])
@pytest.mark.parametrize('rows', [4, 40])
@pytest.mark.parametrize('axis', [0, 1])
def test_rows_of_a_table_that_are_looked_up(mode, rows, axis):
  words = jnp.array([[-1, 1, 1], [rows + 3, 1, 2], [-90, 2, 2]])
  factors = normal(3, 2)

  def loss(table, words):
    found = jnp.take(table, words, axis=axis, mode=mode, fill_value=0)
    return jnp.sum(jnp.sin(found if axis == 0 else found.T) * factors)

  table = normal(rows, 2) if axis == 0 else normal(2, rows)
  check(loss, table, words)


def convolve(w, x):
  return jax.lax.conv_general_dilated(
    x[None, None], w[None, None], (1,), [(0, 0)]
  )


@pytest.mark.parametrize(
  ('shape', 'function'),
  [
    ((3, 2), lambda w, x: x[:0, None] * w[:0]),
    ((3, 2), lambda w, x: jnp.ones((0, 3)) * x[0] @ w),
    ((3, 0), lambda w, x: x @ w),
    ((3, 2), lambda w, x: w[x[:0].astype(jnp.int32)]),
    ((4,), convolve),
  ],
)
def test_of_nothing_there_is_no_gradient(shape, function):
  params = {'w': normal(*shape), 'b': normal(3)}
  loss = lambda p, x: jnp.sum(function(p['w'], x)) + jnp.sum(x * p['b'])
  x = normal(M, 3)
  gramian = jax.jit(mopt.per_example_gramian(loss))(params, x)[1]
  compare([gramian], [x @ x.T])


OPERATIONS = st.sampled_from(
  ['dense', 'bias', 'scale', 'again', 'tanh', 'sort', 'centre', 'shift']
)


@settings(max_examples=10)
@given(st.lists(OPERATIONS, min_size=1, max_size=6), st.integers(1, 3))
def test_any_small_network(operations, positions):
  params = {'a': normal(3)}
  for i, name in enumerate(operations):
    shape = {'dense': (3, 3), 'bias': (3,), 'scale': (3,)}.get(name)
    if shape:
      params[str(i)] = normal(*shape, seed=i)

  def loss(params, x):
    for i, name in enumerate(operations):
      p = params.get(str(i))
      first = params[min(params)]
      match name:
        case 'dense':
          x = x @ p
        case 'bias':
          x = x + p[None]
        case 'scale':
          x = x * p[None]
        case 'again':
          x = x + (x @ first if first.ndim == 2 else x * first[None])
        case 'tanh':
          x = jnp.tanh(x)
        case 'sort':
          x = jnp.sort(x, axis=1)
        case 'centre':
          x = x - x.mean(axis=1, keepdims=True)
        case 'shift':
          x = jnp.roll(x, 1, axis=1)
    return jnp.sum(jnp.sin(x))

  check(loss, params, normal(3, positions, 3))


def test_masks_leave_parameters_out():
  loss = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p['w']) @ p['v']))
  params, x = {'w': normal(3, 4), 'v': normal(4, 2)}, normal(M, 2, 3)
  mask = mopt.mask_by_path(lambda path, leaf: path == 'w')
  parts = [
    check(loss, params, x, mask=mask),
    check(loss, params, x, mask={'w': False, 'v': True}),
  ]
  f = mopt.per_example_gramian
  compare([sum(parts)], [f(loss)(params, x)[1]])
  np.testing.assert_array_equal(f(loss, False)(params, x)[1], np.zeros((M, M)))
  missing = mopt.mask_by_path(lambda path, leaf: path == 'u')
  with pytest.raises(ValueError, match='selects none of the leaves'):
    f(loss, missing)(params, x)


def test_integers_and_booleans_have_no_gradient():
  loss = lambda params, x: jnp.sum(params['w'] * params['keep'] * x)
  params = {'w': normal(3), 'keep': jnp.array([True, False, True])}
  x = normal(M, 3)
  gramian = mopt.per_example_gramian(loss)(params, x)[1]
  kept = x * params['keep'][None]
  np.testing.assert_allclose(gramian, kept @ kept.T, rtol=1e-6)


def test_one_example_has_a_gramian_too():
  gramian = check(lambda p, x: jnp.sum(p * x), jnp.ones(3), jnp.ones((1, 3)))
  np.testing.assert_array_equal(gramian, [[3]])


def test_half_precision_is_summed_in_float32():
  class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
      layer = functools.partial(BatchLastConv, kernel_size=(3, 3))
      x = swap_batch(layer(3, dtype=jnp.bfloat16)(swap_batch(x)))
      x = nn.Conv(3, (2, 2), dtype=jnp.bfloat16)(nn.relu(x))
      x = nn.Dense(10, dtype=jnp.bfloat16)(x.reshape(len(x), -1))
      return x.astype(jnp.float32)

  loss, params, *batch = network(Half(), normal(M, 5, 5, 1))
  check(loss, params, *batch, tolerance=2e-2)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  f = mopt.per_example_gramian(lambda *args: loss(*args).astype(jnp.bfloat16))
  values, gramian = jax.jit(f)(half, *batch)
  assert values.dtype == gramian.dtype == jnp.float32


def test_float64_stays_and_float32_stays_float32_with_x64():
  def loss(params, x):
    y = jnp.tanh(x @ params['w']).sum(axis=0) * params['scale']
    return jnp.sum(params['table'][jnp.arange(3) // 2] @ y)

  params = {'w': normal(3, 4), 'scale': normal(4), 'table': normal(50, 4)}
  x = normal(M, 2, 3)
  with jax.enable_x64(True):
    check(loss, params, x)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    gramian = check(loss, wide, x.astype(jnp.float64), tolerance=1e-15)
    assert gramian.dtype == jnp.float64


def test_a_step_in_a_scan_descends_for_every_example():
  loss, params, *batch = network(models.create('mlp'), normal(M, 4))
  f = mopt.per_example_gramian(loss)
  losses = jax.vmap(loss, (None, 0, 0))
  tx = optax.sgd(0.1)

  def step(carry, _):
    params, state = carry
    values, gramian = f(params, *batch)
    weights = mopt.upgrad(gramian)
    grads = jax.grad(lambda p: weights @ losses(p, *batch))(params)
    updates, state = tx.update(grads, state)
    return (optax.apply_updates(params, updates), state), values

  carry = params, tx.init(params)
  _, values = jax.jit(lambda c: jax.lax.scan(step, c, length=8))(carry)
  assert (jnp.diff(values, axis=0) < 0).all()


def test_a_population_is_mapped_over_its_parameters():
  loss = lambda p, x: jnp.sum(jnp.sin(jnp.tanh(x @ p['w']) @ p['v']))
  params, x = {'w': normal(3, 4), 'v': normal(4, 2)}, normal(M, 2, 3)
  f = mopt.per_example_gramian(loss)
  members = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  found = jax.jit(jax.vmap(f, (0, None)))(members, x)
  for scale, *one in zip((1, 2), *found):
    member = jax.tree.map(lambda x, scale=scale: scale * x, params)
    compare(one, jax.jit(f)(member, x), tolerance=1e-6)


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_a_batch_that_is_sharded(kind, four_devices):
  def loss(p, x):
    y = jax.lax.conv_general_dilated(x[None, None], p['k'], (1,), 'SAME')[0]
    y = jnp.tanh(y.T @ p['w']) @ p['v'] + p['b'][None]
    return jnp.sum(jnp.sin(y) * p['table'][jnp.arange(3)])

  params = {'k': normal(2, 1, 3), 'w': normal(2, 4), 'v': normal(4, 2)}
  params |= {'b': normal(2), 'table': normal(50, 2)}
  x = normal(8, 3)
  expected = jax.jit(functools.partial(stacked, loss))(params, x)
  types = (getattr(jax.sharding.AxisType, kind),)
  mesh = jax.make_mesh((4,), ('d',), types, devices=four_devices)
  place = lambda x, *axes: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*axes))
  )
  with jax.set_mesh(mesh):
    found = jax.jit(mopt.per_example_gramian(loss))(
      place(params), place(x, 'd')
    )
  compare(jax.device_get(found), expected)


def equations(jaxpr):
  """All of them, those of calls too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from equations(inner)


def largest_size(function, *args):
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return max(x.aval.size for e in equations(jaxpr) for x in e.outvars)


def test_gradients_of_dense_layers_and_tables_are_not_formed():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, words):
      return nn.Dense(10)(nn.Embed(3000, 16)(words).reshape(len(words), -1))

  loss, params, *batch = network(Net(), jnp.arange(6 * 20).reshape(6, 20))
  table = params['Embed_0']['embedding'].size
  f = mopt.per_example_gramian(loss)
  assert largest_size(f, params, *batch) <= table
  stacked_size = largest_size(functools.partial(stacked, loss), params, *batch)
  assert stacked_size == 6 * table


def test_products_are_exact_where_the_platform_rounds_them():
  loss, *args = network(Layers(), normal(M, 9, 8, 3))
  # One equation, whose gradient JAX finds.
  own = lambda p, x: jnp.sum(doubled(x, p))
  own_args = normal(3, 4), normal(M, 3)
  for f, inputs in ((loss, args), (own, own_args)):
    jaxpr = jax.make_jaxpr(mopt.per_example_gramian(f))(*inputs)
    products = [
      e for e in equations(jaxpr.jaxpr) if e.primitive.name == 'dot_general'
    ]
    exact = [e for e in products if 'HIGHEST' in str(e.params['precision'])]
    # The network is computed as its author wants.
    assert 0 < len(exact) < len(products)
    # And what has two axes for examples is not.
    ends = [e for e in products if e.outvars[0].aval.shape == (M, M)]
    assert ends
    assert all(e in exact for e in ends)


BATCH = (jnp.ones((M, 3)), jnp.ones(M))


@pytest.mark.parametrize(
  ('result', 'message'),
  [
    (lambda x: x, r'one real number for one example, got .*float32\[3\]'),
    (lambda x: (x.sum(), {'mean': x}), 'batch statistics'),
    (lambda x: {'loss': x.sum()}, 'one real number'),
    (lambda x: x.sum().astype(jnp.int32), 'one real number'),
    (lambda x: x.sum() * 1j, 'one real number'),
    (lambda x: None, 'got None'),
  ],
)
def test_a_loss_is_one_number(result, message):
  f = mopt.per_example_gramian(lambda p, x, y: result(p * x))
  with pytest.raises(ValueError, match=message):
    f(jnp.ones(3), *BATCH)


@pytest.mark.parametrize(
  ('batch', 'found'),
  [
    ((jnp.ones((M, 3)), jnp.ones(M + 1)), r'\[\(5,\), \(6,\)\]'),
    ((jnp.ones((M, 3)), 1.0), r'\[\(\), \(5,\)\]'),
    ((jnp.ones((0, 3)), jnp.ones(0)), r'\[\(0,\)\]'),
    ((None, None), r'\[\]'),
  ],
)
def test_a_batch_has_one_size(batch, found):
  f = mopt.per_example_gramian(lambda p, x, y: jnp.sum(p))
  with pytest.raises(ValueError, match=f'one m >= 1, got .*{found}'):
    f(jnp.ones(3), *batch)


def test_new_batch_statistics_are_refused():
  model = nn.BatchNorm(use_running_average=False)
  variables = model.init(jax.random.key(0), jnp.ones((2, 3)))

  def loss(params, x):
    return model.apply(
      {**variables, 'params': params}, x[None], mutable=['batch_stats']
    )

  with pytest.raises(ValueError, match='new batch statistics'):
    mopt.per_example_gramian(loss)(variables['params'], BATCH[0])


def test_parameters_are_real():
  f = mopt.per_example_gramian(lambda p, x: jnp.sum(x) * p['w'].real.sum())
  with pytest.raises(TypeError, match="real numbers at 'w'"):
    f({'w': jnp.ones(2) * 1j}, BATCH[0])


def test_what_has_no_reverse_mode_has_no_gramian():
  """As the stacked way, it says what cannot be differentiated."""

  def loss(params, x):
    is_small = lambda y: jnp.sum(y) < 9
    return jnp.sum(jax.lax.while_loop(is_small, lambda y: y + params, x))

  for f in (mopt.per_example_gramian(loss), functools.partial(stacked, loss)):
    with pytest.raises(ValueError, match='lax.while_loop'):
      f(jnp.ones(3), BATCH[0])
