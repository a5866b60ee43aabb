"""Gradients of several objectives, stacked: of functions, and of one."""

import functools
import re
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt

FINE = np.array([1 + 1e-9, -1 + 1e-9, 2e-9])


def random_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {
    'a': jnp.asarray(rng.normal(size=(4, 3)), dtype),
    'b': jnp.asarray(rng.normal(size=5), dtype),
  }


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def test_stack_adds_a_leading_axis():
  first, second = random_params(), random_params(jnp.float32)
  second = jax.tree.map(lambda x: -x, second)
  stacked = mopt.stack(first, second, first)
  assert stacked['a'].shape == (3, 4, 3)
  np.testing.assert_array_equal(stacked['a'][1], second['a'])
  np.testing.assert_array_equal(stacked['b'][2], first['b'])


@pytest.mark.parametrize(
  ('grads', 'match'),
  [
    ([], 'at least 2'),
    ([{'a': jnp.ones(1)}], 'at least 2'),
    ([{'a': jnp.ones(1)}, {'b': jnp.ones(1)}], 'gradient 1'),
    ([{'a': jnp.ones(1)}, {'a': jnp.ones(2)}], r"\(1,\), \(2,\)\] at 'a'"),
  ],
)
def test_stack_refuses_gradients_that_do_not_match(grads, match):
  with pytest.raises(ValueError, match=match):
    mopt.stack(*grads)


def network(params, batch):
  inputs, targets = batch
  hidden = jnp.tanh(inputs @ params['w1'])
  return jnp.mean((hidden @ params['w2'] - targets) ** 2)


def network_and_batch():
  rng = np.random.default_rng(2)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {'w1': draw(3, 4), 'w2': draw(4, 2)}
  return params, (draw(6, 3), draw(6, 2))


@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_value_and_stacked_grad_equals_separate_gradients(transform):
  params, batch = network_and_batch()

  def mean(params, batch):
    return jnp.mean(batch[0] @ params['w1'])

  objectives = network, mean, mopt.l1_norm
  grad_fn = transform(mopt.value_and_stacked_grad(*objectives))
  values, grads = grad_fn(params, batch)
  assert values.shape == (3,)
  assert values.dtype == jnp.float32
  separate = [
    jax.value_and_grad(network)(params, batch),
    jax.value_and_grad(mean)(params, batch),
    jax.value_and_grad(mopt.l1_norm)(params),
  ]
  for j, (value, grad) in enumerate(separate):
    np.testing.assert_allclose(values[j], value, rtol=1e-6)
    for key in params:
      np.testing.assert_allclose(grads[key][j], grad[key], rtol=1e-5, atol=1e-7)


def with_aux(params, batch):
  return network(params, batch), {'samples': len(batch[0])}


def test_aux_of_all_objectives():
  params, batch = network_and_batch()

  def l1_aux(params):
    return (mopt.l1_norm(params), 'l1')

  grad_fn = mopt.value_and_stacked_grad(with_aux, l1_aux, has_aux=True)
  (values, aux), grads = grad_fn(params, batch)
  assert aux == ({'samples': 6}, 'l1')
  expected, stacked = mopt.value_and_stacked_grad(network, mopt.l1_norm)(
    params, batch
  )
  np.testing.assert_array_equal(values, expected)
  np.testing.assert_array_equal(grads['w1'], stacked['w1'])


@pytest.mark.parametrize('flags', [(True, False), [True, False]])
def test_aux_of_some_objectives(flags):
  params, batch = network_and_batch()
  grad_fn = mopt.value_and_stacked_grad(with_aux, mopt.l1_norm, has_aux=flags)
  (values, aux), grads = grad_fn(params, batch)
  assert values.shape == (2,)
  assert aux == ({'samples': 6}, None)
  assert grads['w2'].shape == (2, 4, 2)


@pytest.mark.parametrize(
  'flags', [(True,), (True, False, False), (), 'no', (1, 0), (True, None)]
)
def test_other_aux_flags_are_refused(flags):
  with pytest.raises(ValueError, match='has_aux'):
    mopt.value_and_stacked_grad(network, mopt.l1_norm, has_aux=flags)


@pytest.mark.parametrize('objectives', [(), (mopt.l1_norm,)])
def test_fewer_than_two_objectives_are_refused(objectives):
  with pytest.raises(ValueError, match='at least 2'):
    mopt.value_and_stacked_grad(*objectives)


W1_ONLY = {'w1': True, 'w2': False}
PARAMETERS_ALONE = {
  'bare_l1': (mopt.l1_norm, mopt.l1_norm),
  'bare_l2': (mopt.l2_norm_squared, mopt.l2_norm_squared),
  'partial_mask': (functools.partial(mopt.l1_norm, mask=W1_ONLY),) * 2,
  'partial_p': (functools.partial(mopt.lp_norm, p=0.5),) * 2,
  'function': (lambda params: jnp.sum(params['w1'] ** 3),) * 2,
  'takes_the_batch': (
    lambda params, batch: jnp.sum(params['w1'] ** 3),
    lambda params: jnp.sum(params['w1'] ** 3),
  ),
  'takes_anything': (
    lambda params, *args: jnp.sum(params['w1'] ** 3),
    lambda params: jnp.sum(params['w1'] ** 3),
  ),
}


@pytest.mark.parametrize('name', PARAMETERS_ALONE)
def test_an_objective_may_ignore_the_batch(name):
  objective, reference = PARAMETERS_ALONE[name]
  params, batch = network_and_batch()
  values, grads = mopt.value_and_stacked_grad(network, objective)(params, batch)
  np.testing.assert_allclose(values[1], reference(params), rtol=1e-6)
  expected = jax.grad(reference)(params)
  for key in params:
    np.testing.assert_allclose(grads[key][1], expected[key], rtol=1e-6)


# -- Who gets the batch -------------------------------------------------------


def times_batch(params, batch):
  return jnp.sum(params) * batch


def alone(params):
  return 2 * jnp.sum(params)


def with_mask(params, mask=None):
  assert mask is None
  return 2 * jnp.sum(params)


class Times:
  """A callable that gets the batch, and methods of all sorts."""

  def __call__(self, params, batch):
    return times_batch(params, batch)

  def method(self, params, batch):
    return times_batch(params, batch)

  def alone(self, params):
    return alone(params)

  @classmethod
  def of_class(cls, params, batch):
    return times_batch(params, batch)

  @staticmethod
  def static(params):
    return alone(params)

  @functools.partial(jax.jit, static_argnums=0)
  def jitted(self, params):
    return alone(params)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def remat(self, params):
    return alone(params)

  @functools.partial(jax.checkpoint, static_argnums=0)
  def remat_with_batch(self, params, batch):
    return times_batch(params, batch)


class Wrapper:
  """A wrapper that is a class, as of `functools.update_wrapper`."""

  def __init__(self, function):
    functools.update_wrapper(self, function)

  def __call__(self, params):
    return alone(params)


@functools.wraps(alone)
def adds_a_batch(params, batch):
  return times_batch(params, batch)


@functools.wraps(times_batch)
def drops_the_batch(params):
  return alone(params)


@functools.wraps(mopt.l1_norm)
def scaled_norm(params, batch):
  return mopt.l1_norm(params) * batch


@functools.wraps(alone)
def passes_all_on(*args, **kwargs):
  assert len(args) == 2
  return times_batch(*args, **kwargs)


def of_three(params, i, batch=None):
  assert batch is None
  return i * jnp.sum(params)


def keyword_only(params, *, scale=2.0):
  return scale * jnp.sum(params)


@jax.custom_jvp
def custom(params):
  return 2 * jnp.sum(params)


custom.defjvp(lambda primals, tangents: (custom(*primals), 2 * sum(*tangents)))

# The batch is 5: the sum of the parameters is 3, and the value 15 with the
# batch and 6 without.
WITH_BATCH = {
  'function': times_batch,
  'lambda': lambda p, b: times_batch(p, b),
  'third_has_a_default': lambda p, b, c=1.0: c * times_batch(p, b),
  'positional_only': lambda p, b, /: times_batch(p, b),
  'keyword_only_too': lambda p, b, *, c=1.0: c * times_batch(p, b),
  'anything': lambda *args: times_batch(*args),
  'params_and_anything': lambda p, *rest: times_batch(p, *rest),
  'callable': Times(),
  'method': Times().method,
  'class_method': Times.of_class,
  'remat_method': Times().remat_with_batch,
  'jit': jax.jit(times_batch),
  'jit_of_jit': jax.jit(jax.jit(times_batch)),
  'remat': jax.checkpoint(times_batch),
  'nnx_jit': nnx.jit(times_batch),
  'wrapper': adds_a_batch,
  'jit_of_wrapper': jax.jit(adds_a_batch),
  'wrapper_of_norm': scaled_norm,
  'jit_of_wrapper_of_norm': jax.jit(scaled_norm),
  'wrapper_of_all': passes_all_on,
  'partial_of_third': functools.partial(lambda p, b, c: times_batch(p, b), c=0),
  'jit_of_partial': jax.jit(
    functools.partial(lambda p, b, c: times_batch(p, b), c=0)
  ),
}
WITHOUT_BATCH = {
  'function': alone,
  'keyword_only': keyword_only,
  'keywords': lambda p, **kwargs: (2 + len(kwargs)) * jnp.sum(p),
  'mask': with_mask,
  'jit_of_mask': jax.jit(with_mask),
  'mask_of_lambda': lambda p, mask=None: with_mask(p, mask),
  'method': Times().alone,
  'static_method': Times.static,
  'jit_method': Times().jitted,
  'remat_method': Times().remat,
  'jit': jax.jit(alone),
  'jit_of_jit': jax.jit(jax.jit(alone)),
  'remat': jax.checkpoint(alone),
  'custom_jvp': custom,
  'nnx_jit': nnx.jit(alone),
  'nnx_remat': nnx.remat(alone),
  'named_call': jax.named_call(alone),
  'wrapper': drops_the_batch,
  'jit_of_wrapper': jax.jit(drops_the_batch),
  'partial_of_wrapper': functools.partial(drops_the_batch),
  'wrapper_class': Wrapper(times_batch),
  'partial': functools.partial(of_three, i=2),
  'jit_of_partial': jax.jit(functools.partial(of_three, i=2)),
  'partial_of_jit': functools.partial(jax.jit(of_three), i=2),
  'partial_of_partial': functools.partial(
    functools.partial(lambda p, i, j: i * j * jnp.sum(p), i=1), j=2
  ),
  'partial_of_default': functools.partial(lambda p, i=3: i * jnp.sum(p), i=2),
  'partial_of_keyword_only': functools.partial(keyword_only, scale=2.0),
  'jax_partial': jax.tree_util.Partial(of_three, i=2),
}


@pytest.mark.parametrize('name', WITH_BATCH)
def test_an_objective_that_asks_for_the_batch_gets_it(name):
  grad_fn = mopt.value_and_stacked_grad(WITH_BATCH[name], mopt.l1_norm)
  values, grads = grad_fn(jnp.array([1.0, 2.0]), 5.0)
  np.testing.assert_array_equal(values, [15.0, 3.0])
  np.testing.assert_array_equal(grads, [[5.0, 5.0], [1.0, 1.0]])


@pytest.mark.parametrize('name', WITHOUT_BATCH)
def test_an_objective_of_the_parameters_does_not_get_it(name):
  grad_fn = mopt.value_and_stacked_grad(WITHOUT_BATCH[name], mopt.l1_norm)
  values, grads = grad_fn(jnp.array([1.0, 2.0]), 5.0)
  np.testing.assert_array_equal(values, [6.0, 3.0])
  np.testing.assert_array_equal(grads, [[2.0, 2.0], [1.0, 1.0]])


NORMS = {
  'group': mopt.group_norm,
  'l1': mopt.l1_norm,
  'l2': mopt.l2_norm_squared,
  'log_sum': mopt.log_sum_norm,
  'lp': functools.partial(mopt.lp_norm, p=0.5),
}
AROUND_NORMS = {
  'bare': lambda norm: norm,
  'jit': jax.jit,
  'remat': jax.checkpoint,
  'partial': lambda norm: functools.partial(norm, mask=True),
  'jit_of_partial': lambda norm: jax.jit(functools.partial(norm, mask=True)),
  'partial_of_jit': lambda norm: functools.partial(
    jax.jit(norm, static_argnames='mask'), mask=True
  ),
}


@pytest.mark.parametrize('around', AROUND_NORMS)
@pytest.mark.parametrize('norm', NORMS)
def test_norms_never_get_the_batch(norm, around):
  # A boolean, which they would take for a mask; nor does a keyword reach them.
  objective = AROUND_NORMS[around](NORMS[norm])

  def error(params, batch, mask):
    return jnp.sum(params) * batch * mask

  grad_fn = mopt.value_and_stacked_grad(error, objective)
  params = jnp.array([[1.0, -2.0]])
  values, _ = grad_fn(params, False, mask=False)
  np.testing.assert_allclose(values[1], NORMS[norm](params), rtol=1e-6)
  assert values[1] > 0.5


SECOND_HAS_A_DEFAULT = {
  'closure': [lambda p, i=i: i * jnp.sum(p) for i in range(2)][1],
  'number': lambda p, scale=2.0: scale * jnp.sum(p),
  'none': lambda p, batch=None: jnp.sum(p),
  'and_anything': lambda p, i=0, *rest: jnp.sum(p),
  'jit': jax.jit(lambda p, i=3: i * jnp.sum(p)),
  'partial_of_third': functools.partial(lambda p, i=3, j=4: i * j, j=5),
  'of_jax': jnp.sum,
  'method': type('A', (), {'f': lambda self, p, i=3: jnp.sum(p)})().f,
}


@pytest.mark.parametrize('name', SECOND_HAS_A_DEFAULT)
def test_a_default_in_the_place_of_the_batch_is_refused(name):
  message = r'second parameter .* has a default: .*functools[.]partial\('
  with pytest.raises(ValueError, match=message):
    mopt.value_and_stacked_grad(mopt.l1_norm, SECOND_HAS_A_DEFAULT[name])


def test_functools_partial_is_what_helps():
  def power(params, exponent=1):
    return jnp.sum(params**exponent)

  powers = [functools.partial(power, exponent=i) for i in (1, 2, 3)]
  values, _ = mopt.value_and_stacked_grad(*powers)(jnp.array([1.0, 2.0]), 7)
  np.testing.assert_array_equal(values, [3.0, 5.0, 9.0])


def test_keywords_reach_those_that_name_them():
  def error(params, batch, scale):
    return scale * batch * jnp.sum(params)

  bound = functools.partial(keyword_only, scale=3.0)
  grad_fn = mopt.value_and_stacked_grad(
    error, keyword_only, lambda p, **kwargs: kwargs['scale'], bound, alone
  )
  values, _ = grad_fn(jnp.array([1.0, 2.0]), 5.0, scale=10.0)
  np.testing.assert_array_equal(values, [150.0, 30.0, 10.0, 9.0, 6.0])


class Scalars(NamedTuple):
  a: jax.Array
  b: jax.Array


def test_a_builtin_without_a_signature_gets_the_batch():
  params = Scalars(jnp.array(3.0), jnp.array(-4.0))
  grad_fn = mopt.value_and_stacked_grad(getattr, mopt.l1_norm)
  values, grads = grad_fn(params, 'b')
  np.testing.assert_array_equal(values, [-4.0, 7.0])
  np.testing.assert_array_equal(grads, [[0.0, 1.0], [1.0, -1.0]])


def test_several_arguments_reach_the_objective():
  def error(params, x, y, scale):
    return scale * jnp.sum(params * x - y)

  values, grads = mopt.value_and_stacked_grad(error, mopt.l1_norm)(
    jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), 1.0, scale=2.0
  )
  np.testing.assert_allclose(values, [18.0, 3.0])
  np.testing.assert_allclose(grads, [[6.0, 8.0], [1.0, 1.0]])


def test_a_keyword_argument_reaches_an_objective_that_asks_for_it():
  def error(params, *, batch):
    return jnp.sum(params * batch)

  values, _ = mopt.value_and_stacked_grad(error, mopt.l1_norm)(
    jnp.array([1.0, 2.0]), batch=jnp.array([3.0, 4.0])
  )
  np.testing.assert_allclose(values, [11.0, 3.0])


def count_dots(jaxpr) -> int:
  return len(re.findall(r'\bdot_general\[', str(jaxpr)))


def test_l1_adds_no_evaluation_of_the_network():
  params, batch = network_and_batch()
  one = jax.make_jaxpr(jax.value_and_grad(network))(params, batch)
  two = jax.make_jaxpr(mopt.value_and_stacked_grad(network, mopt.l1_norm))(
    params, batch
  )
  assert count_dots(one) == 5  # 2 forward, 3 backward
  assert count_dots(two) == 5


def test_the_compiler_shares_a_common_forward_pass():
  params, batch = network_and_batch()

  def quartic(params, batch):
    return jnp.mean(
      (jnp.tanh(batch[0] @ params['w1']) @ params['w2'] - batch[1]) ** 4
    )

  grad_fn = mopt.value_and_stacked_grad(network, quartic)
  compiled = jax.jit(grad_fn).lower(params, batch).compile().as_text()
  assert len(re.findall(r'= \S+ dot\(', compiled)) == 8  # 2 forward, 2 * 3


@pytest.mark.usefixtures('x64')
def test_values_are_as_exact_as_the_finest_objective():
  def difference(params):
    return jnp.sum(params['a'])  # 1 + 4e-9 - 1

  params = {'a': jnp.asarray(FINE), 'b': jnp.ones(2, jnp.bfloat16)}
  coarse = functools.partial(mopt.l1_norm, mask={'a': False, 'b': True})
  values, grads = mopt.value_and_stacked_grad(difference, coarse)(params)
  assert (values.dtype, grads['a'].dtype) == (jnp.float64, jnp.float64)
  assert grads['b'].dtype == jnp.bfloat16
  np.testing.assert_allclose(values, [FINE.sum(), 2.0], rtol=1e-14)
  square = lambda params: jnp.sum(jnp.square(params['b']))
  values, _ = mopt.value_and_stacked_grad(square, coarse)(
    {'a': jnp.ones(1, jnp.float32), 'b': jnp.ones(3001, jnp.float32)}
  )
  assert values.dtype == jnp.float32


def test_values_in_half_precision_become_float32():
  half = lambda params: jnp.sum(params)
  values, grads = mopt.value_and_stacked_grad(half, half)(
    jnp.ones(3, jnp.bfloat16)
  )
  assert (values.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)


# -- One function of all objectives -------------------------------------------


def many_losses(params, batch, m=3):
  """Of m tasks with a head each; also the features that they share."""
  inputs, targets = batch
  features = jnp.tanh(inputs @ params['w1'])
  outputs = features @ params['w2']
  powers = [jnp.mean(jnp.abs(outputs - targets) ** (j + 2)) for j in range(m)]
  return jnp.stack(powers), features


@pytest.mark.parametrize('m', [2, 3, 9])
@pytest.mark.parametrize('transform', [lambda f: f, jax.jit], ids=['', 'jit'])
def test_value_and_stacked_jac_equals_separate_gradients(transform, m):
  params, batch = network_and_batch()
  losses = functools.partial(many_losses, m=m)
  grad_fn = mopt.value_and_stacked_jac(losses, has_aux=True)
  (values, features), grads = transform(grad_fn)(params, batch)
  expected, expected_features = losses(params, batch)
  np.testing.assert_allclose(values, expected, rtol=1e-6)
  np.testing.assert_allclose(features, expected_features, rtol=1e-6)
  expected = jax.jacrev(lambda p: losses(p, batch)[0])(params)
  for j in range(m):
    for name in params:
      size = np.abs(expected[name][j]).max()
      np.testing.assert_allclose(
        grads[name][j], expected[name][j], atol=1e-6 * size
      )


def test_without_aux_and_with_keywords():
  def losses(params, *, scale):
    return scale * jnp.stack([params.sum(), jnp.square(params).sum()])

  grad_fn = mopt.value_and_stacked_jac(losses)
  values, grads = grad_fn(jnp.array([1.0, 2.0]), scale=3.0)
  np.testing.assert_array_equal(values, [9.0, 15.0])
  np.testing.assert_array_equal(grads, [[3.0, 3.0], [6.0, 12.0]])


def test_the_forward_pass_of_a_jac_is_made_once():
  params, batch = network_and_batch()
  calls = []

  def losses(params, batch):
    calls.append(1)
    return many_losses(params, batch)[0]

  grad_fn = mopt.value_and_stacked_jac(losses)
  grad_fn(params, batch)
  assert len(calls) == 1
  # Two products forward, and three backward for each of three.
  assert count_dots(jax.make_jaxpr(grad_fn)(params, batch)) == 2 + 3 * 3

  def flops(function):
    return jax.jit(function).lower(params, batch).compile().cost_analysis()

  wide = jax.random.normal(jax.random.key(0), (2, 256, 256))
  params, batch = {'w1': wide[0], 'w2': wide[1]}, (wide[0], wide[1])
  forward = flops(losses)['flops']
  backward = flops(jax.grad(lambda *args: losses(*args)[0]))['flops'] - forward
  assert flops(grad_fn)['flops'] < 1.02 * (forward + 3 * backward)


def test_a_jac_under_vmap_and_scan():
  params, batch = network_and_batch()
  grad_fn = mopt.value_and_stacked_jac(lambda *a: many_losses(*a)[0])
  values, grads = grad_fn(params, batch)
  several = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  mapped, _ = jax.vmap(grad_fn, in_axes=(0, None))(several, batch)
  np.testing.assert_allclose(mapped[0], values, rtol=1e-5)

  def body(carry, one):
    return carry, grad_fn(one, batch)

  _, (_, scanned) = jax.lax.scan(body, 0, several)
  for name in params:
    size = np.abs(grads[name]).max()
    np.testing.assert_allclose(scanned[name][0], grads[name], atol=1e-6 * size)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32, jnp.float64])
def test_values_of_a_jac_are_float32_or_float64(dtype):
  with jax.enable_x64(dtype == jnp.float64):
    grad_fn = mopt.value_and_stacked_jac(lambda x: jnp.square(x))
    values, grads = grad_fn(jnp.arange(1, 4, dtype=dtype))
    assert values.dtype == jnp.promote_types(dtype, jnp.float32)
    assert grads.dtype == dtype
    np.testing.assert_array_equal(grads, 2 * np.diag([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
  ('function', 'found'),
  [
    (lambda x: x.sum(), r'float32\[\]'),
    (lambda x: x[:1], r'float32\[1\]'),
    (lambda x: x[None], r'float32\[1, 3\]'),
    (lambda x: x.astype(int), r'int32\[3\]'),
  ],
)
def test_a_jac_of_what_is_no_vector_is_refused(function, found):
  with pytest.raises(ValueError, match=f'must return .*, got {found}'):
    mopt.value_and_stacked_jac(function)(jnp.ones(3))


def test_bad_arguments_of_a_jac_are_refused():
  with pytest.raises(ValueError, match='function must be a function, got 3'):
    mopt.value_and_stacked_jac(3)
  with pytest.raises(ValueError, match="has_aux must be a boolean, got 'no'"):
    mopt.value_and_stacked_jac(jnp.square, has_aux='no')
