"""`aggregate` around and inside of Optax, and the fixed weightings."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

pytestmark = pytest.mark.usefixtures('exact_products')

PARAMS = {'kernel': (3, 2), 'bias': (2,), 'scale': ()}


def random_tree(seed, *leading):
  rng = np.random.default_rng(seed)
  return {
    key: jnp.asarray(rng.normal(size=(*leading, *shape)), jnp.float32)
    for key, shape in PARAMS.items()
  }


def repeat(tree, m=2):
  return mopt.stack(*[tree] * m)


def last_weights(state):
  return np.asarray(optax.tree.get(state, 'weights'))


def assert_trees_close(found, expected, **tolerance):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert x.shape == y.shape
    np.testing.assert_allclose(x, y, **tolerance)


halves = mopt.fixed_weights((0.5, 0.5))

# -- Every optimizer of Optax -------------------------------------------------

TRANSFORMATIONS = {
  'adam': optax.scale_by_adam(),
  'nadam': optax.scale_by_adam(nesterov=True),
  'amsgrad': optax.scale_by_amsgrad(),
  'rms': optax.scale_by_rms(),
  'trace': optax.trace(0.9),
  'nesterov': optax.trace(0.9, nesterov=True),
  'lion': optax.scale_by_lion(),
  'adagrad': optax.scale_by_rss(),
  'adadelta': optax.scale_by_adadelta(),
  'radam': optax.scale_by_radam(),
  'novograd': optax.scale_by_novograd(),
  'yogi': optax.scale_by_yogi(),
  'adabelief': optax.scale_by_belief(),
  'lamb': optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1),
    optax.scale_by_trust_ratio(),
  ),
  'adafactor': optax.adafactor(1e-2, min_dim_size_to_factor=2),
  'clip_then_adam': optax.chain(
    optax.clip_by_global_norm(0.1), optax.scale_by_adam()
  ),
}


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_equal_objectives_give_the_plain_optimizer(name):
  inner = TRANSFORMATIONS[name]
  plain = optax.chain(inner, optax.scale(-1e-2))
  both = optax.chain(mopt.aggregate(halves, inner), optax.scale(-1e-2))

  @functools.partial(jax.jit, static_argnums=0)
  def run(make_grads, params):
    tx = both if make_grads is repeat else plain

    def step(carry, grads):
      params, state = carry
      updates, state = tx.update(make_grads(grads), state, params)
      return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

  params, grads = random_tree(0), random_tree(1, 6)
  expected = run(lambda grads: grads, params)
  found = run(repeat, params)
  assert_trees_close(found, expected, rtol=2e-5, atol=1e-7)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


@pytest.mark.parametrize('name', TRANSFORMATIONS)
def test_state_has_one_inner_state_for_each_objective(name):
  inner = TRANSFORMATIONS[name]
  params = random_tree(0)
  plain = inner.init(params)
  state = mopt.aggregate(halves, inner).init(params)
  assert state.weights.shape == (2,)
  assert jax.tree.structure(state.inner_state) == jax.tree.structure(plain)
  for leaf, alone in zip(
    jax.tree.leaves(state.inner_state), jax.tree.leaves(plain)
  ):
    assert leaf.shape == (2, *alone.shape)
    assert leaf.dtype == alone.dtype


def test_each_objective_passes_through_inner_with_its_own_moments():
  weights = jnp.array([0.3, 2.0, 0.0])
  tx = mopt.aggregate(
    mopt.fixed_weights(weights), optax.scale_by_adam(), num_objectives=3
  )
  alone = optax.scale_by_adam()
  params = random_tree(0)
  state, states = tx.init(params), [alone.init(params)] * 3
  update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
  for step in range(4):
    grads = random_tree(step, 3)
    updates, state = update(grads, state, params)
    directions = []
    for j in range(3):
      own = jax.tree.map(lambda x, j=j: x[j], grads)
      direction, states[j] = update_alone(own, states[j], params)
      directions.append(direction)
    expected = jax.tree.map(lambda *x: 0.3 * x[0] + 2 * x[1], *directions)
    assert_trees_close(updates, expected, rtol=2e-6, atol=1e-7)


def test_weights_come_from_the_raw_gradients():
  tx = mopt.aggregate(mopt.min_norm_weights, optax.scale_by_adam())
  params = {'w': jnp.zeros(2)}
  grads = {'w': jnp.array([[2.0, 0.0], [0.0, 1.0]])}
  updates, state = tx.update(grads, tx.init(params), params)
  np.testing.assert_allclose(last_weights(state), [0.2, 0.8], rtol=1e-6)
  np.testing.assert_allclose(updates['w'], [0.2, 0.8], rtol=1e-5)


def test_weights_can_be_read_from_any_chain():
  params = random_tree(0)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    mopt.aggregate(mopt.min_norm_weights, optax.scale_by_adam()),
    optax.scale_by_learning_rate(0.1),
    mopt.prune_by_magnitude(1e-3),
  )
  state = tx.init(params)
  np.testing.assert_array_equal(last_weights(state), [0.0, 0.0])
  grads = random_tree(1, 2)
  _, state = jax.jit(tx.update)(grads, state, params)
  expected = mopt.min_norm_weights(mopt.gramian(grads))
  np.testing.assert_allclose(last_weights(state), expected, rtol=1e-5)


def test_mask_limits_the_gramian_and_not_the_update():
  grads = random_tree(1, 2)
  params = random_tree(0)
  tx = mopt.aggregate(mopt.min_norm_weights, mask=mopt.dense_kernels)
  updates, state = tx.update(grads, tx.init(params), params)
  kernel = np.asarray(grads['kernel'], np.float64).reshape(2, -1)
  weights = mopt.min_norm_weights(kernel @ kernel.T)
  np.testing.assert_allclose(last_weights(state), weights, rtol=1e-5)
  expected = weights[0] * grads['bias'][0] + weights[1] * grads['bias'][1]
  np.testing.assert_allclose(updates['bias'], expected, rtol=1e-5)


def test_the_update_has_the_dtype_of_the_gradients():
  grads = {'a': jnp.ones((2, 3), jnp.bfloat16), 'b': jnp.ones((2, 3))}
  params = jax.tree.map(lambda x: x[0], grads)
  tx = mopt.aggregate(mopt.min_norm_weights)
  updates, state = tx.update(grads, tx.init(params), params)
  assert updates['a'].dtype == jnp.bfloat16
  assert updates['b'].dtype == jnp.float32
  assert state.weights.dtype == jnp.float32


def test_bfloat16_is_combined_in_float32():
  # 1 + 2^-7 is the next bfloat16 after 1: summed in bfloat16, a quarter of
  # the distance would be lost three times over.
  quarter = 2.0**-9
  grads = jnp.array([[1.0], [quarter], [quarter], [quarter]], jnp.bfloat16)
  tx = mopt.aggregate(mopt.fixed_weights((1.0,) * 4), num_objectives=4)
  params = jnp.zeros(1, jnp.bfloat16)
  updates, _ = tx.update(grads, tx.init(params), params)
  assert float(updates[0]) == 1.0078125


def test_float64_is_combined_in_float64():
  with jax.enable_x64(True):
    params = jnp.zeros(1, jnp.float64)
    grads = jnp.array([[1 + 1e-9], [-1]], jnp.float64)
    tx = mopt.aggregate(mopt.fixed_weights((1, 1)))
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates.dtype == jnp.float64
    assert state.weights.dtype == jnp.float32
    np.testing.assert_allclose(updates, [1e-9], rtol=1e-6)


def test_moments_of_half_precision_are_float32():
  # 0.999 is 1 in bfloat16: there a second moment would never fade.
  params = jnp.ones(3, jnp.bfloat16)
  grads = jnp.ones((2, 3), jnp.bfloat16)
  tx = mopt.aggregate(halves, optax.scale_by_adam())
  state = tx.init(params)
  for count in range(1, 4):
    updates, state = jax.jit(tx.update)(grads, state, params)
    assert updates.dtype == jnp.bfloat16
    nu = optax.tree.get(state, 'nu')
    assert nu.dtype == jnp.float32
    np.testing.assert_allclose(nu, np.full((2, 3), 1 - 0.999**count), rtol=1e-5)


def test_fixed_weights_of_float64_keep_their_digits():
  with jax.enable_x64(True):
    assert mopt.fixed_weights((1.0, 3e-4))(jnp.eye(2))[1] == 3e-4
    single = mopt.fixed_weights(jnp.array([1.0, 3e-4], jnp.float32))
    assert single(jnp.eye(2)).dtype == jnp.float32


@pytest.mark.parametrize('m', [2, 3])
def test_an_update_can_be_differentiated(m):
  # By what the gradients depend on, as in meta-learning.
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(m, 4)) + 0.5)
    tx = mopt.aggregate(mopt.min_norm_weights, num_objectives=m)
    params = jnp.zeros(4, jnp.float64)

    def length(stretch):
      stretched = grads.at[0].multiply(stretch)
      updates, _ = tx.update(stretched, tx.init(params), params)
      return jnp.sum(updates**2)

    step = 1e-6
    ends = [float(length(1 + s * step)) for s in (-1, 1)]
    difference = (ends[1] - ends[0]) / (2 * step)
    assert abs(difference) > 0.01
    for mode in (jax.grad, jax.jacfwd):
      found = float(jax.jit(mode(length))(1.0))
      np.testing.assert_allclose(found, difference, rtol=1e-6)


# One example an objective: as a sum written out it took minutes to compile.
@pytest.mark.parametrize('weighting', ['fixed', 'min_norm'])
def test_128_objectives_are_one_program(weighting):
  m = 128
  weights = np.linspace(0, 1, m)
  weighting = {
    'fixed': mopt.fixed_weights(weights),
    'min_norm': mopt.min_norm_weights,
  }[weighting]
  tx = mopt.aggregate(weighting, num_objectives=m)
  params, grads = random_tree(0), random_tree(1, m)
  start = time.monotonic()
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  jax.block_until_ready(updates)
  assert time.monotonic() - start < 60  # 4 s on a quiet machine
  found = np.asarray(state.weights, np.float64)
  expected = jax.tree.map(
    lambda g: np.tensordot(found, np.asarray(g, np.float64), 1), grads
  )
  assert_trees_close(updates, expected, rtol=1e-4, atol=1e-5)


def test_extra_arguments_reach_the_inner_transformation():
  def update(updates, state, params=None, *, factor, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda x: factor * x, updates), state

  inner = optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
  tx = optax.chain(mopt.aggregate(halves, inner), optax.scale(1.0))
  params, grads = random_tree(0), random_tree(1)
  updates, _ = tx.update(
    repeat(grads), tx.init(params), params, factor=3.0, unused=None
  )
  expected = jax.tree.map(lambda x: 3 * x, grads)
  assert_trees_close(updates, expected, rtol=1e-6)


def test_none_and_empty_leaves_pass():
  params = {'w': jnp.ones(2), 'none': None, 'empty': jnp.zeros((0, 3))}
  grads = {'w': jnp.eye(2), 'none': None, 'empty': jnp.zeros((2, 0, 3))}
  tx = mopt.aggregate(mopt.min_norm_weights, optax.scale_by_adam())
  updates, state = tx.update(grads, tx.init(params), params)
  assert updates['none'] is None
  assert updates['empty'].shape == (0, 3)
  np.testing.assert_array_equal(last_weights(state), [0.5, 0.5])
  np.testing.assert_allclose(updates['w'], [0.5, 0.5], rtol=1e-5)


# -- What is refused ----------------------------------------------------------


def update_of(grads, params, **kwargs):
  tx = mopt.aggregate(mopt.min_norm_weights, **kwargs)
  return jax.jit(tx.update)(grads, tx.init(params), params)


@pytest.mark.parametrize(
  ('key', 'leading'), [('kernel', (3,)), ('bias', ()), ('scale', (2, 2))]
)
def test_a_leaf_of_another_shape_is_named(key, leading):
  grads = random_tree(1, 2)
  grads[key] = jnp.zeros((*leading, *PARAMS[key]))
  with pytest.raises(ValueError, match=f"stacked over 2.*'{key}'"):
    update_of(grads, random_tree(0))


def test_unstacked_gradients_are_refused_even_where_a_size_is_m():
  params = {'w': jnp.ones((2, 2))}
  with pytest.raises(ValueError, match=r"\(2, 2, 2\) at 'w', got \(2, 2\)"):
    update_of(params, params)


def test_another_number_of_objectives_is_refused():
  with pytest.raises(ValueError, match='stacked over 3'):
    update_of(random_tree(1, 2), random_tree(0), num_objectives=3)


def test_another_structure_is_refused():
  params = random_tree(0)
  grads = random_tree(1, 2)
  with pytest.raises(ValueError, match='structure of the parameters'):
    update_of({'bias': grads['bias']}, params)


def test_an_update_without_parameters_is_refused():
  tx = mopt.aggregate(mopt.min_norm_weights)
  state = tx.init(random_tree(0))
  with pytest.raises(ValueError, match='needs the parameters'):
    tx.update(random_tree(1, 2), state)


@pytest.mark.parametrize('m', [1, 0, -2, 2.0, None])
def test_fewer_than_two_objectives_are_refused(m):
  with pytest.raises(ValueError, match='num_objectives'):
    mopt.aggregate(mopt.min_norm_weights, num_objectives=m)


@pytest.mark.parametrize('weighting', [(0.5, 0.5), None, 3e-4])
def test_what_is_not_a_weighting_is_refused(weighting):
  with pytest.raises(ValueError, match='weighting must be a function'):
    mopt.aggregate(weighting)


@pytest.mark.parametrize('inner', [optax.scale_by_adam, 'adam', 0.1])
def test_what_is_not_a_transformation_is_refused(inner):
  with pytest.raises(ValueError, match='GradientTransformation'):
    mopt.aggregate(halves, inner)


def test_a_weighting_may_return_a_list():
  params, grads = random_tree(0), random_tree(1, 2)
  tx = mopt.aggregate(lambda gramian: [1, gramian[0, 0]])
  updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  assert state.weights.dtype == jnp.float32
  first = mopt.gramian(grads)[0, 0]
  expected = jax.tree.map(lambda g: g[0] + first * g[1], grads)
  assert_trees_close(updates, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('result', [None, 'half', {'a': 1}, object()])
def test_a_weighting_that_returns_no_numbers_is_refused(result):
  params, grads = random_tree(0), random_tree(1, 2)
  tx = mopt.aggregate(lambda gramian: result)
  with pytest.raises(ValueError, match=r'weighting must return \[2\] weights'):
    tx.update(grads, tx.init(params), params)


def test_a_weighting_that_returns_another_shape_is_refused():
  tx = mopt.aggregate(lambda gramian: gramian)
  params = random_tree(0)
  with pytest.raises(ValueError, match=r'must return \[2\] weights'):
    tx.update(random_tree(1, 2), tx.init(params), params)


# -- Around it, as its docstring says -----------------------------------------


def test_clipping_before_scales_all_objectives_by_one_factor():
  params, grads = random_tree(0), random_tree(1, 2)
  clipped = optax.chain(
    optax.clip_by_global_norm(0.5), mopt.aggregate(mopt.min_norm_weights)
  )
  updates, state = jax.jit(clipped.update)(grads, clipped.init(params), params)
  plain, plain_state = update_of(grads, params)
  weights = last_weights(plain_state)
  assert weights.min() > 0.01
  np.testing.assert_allclose(last_weights(state), weights, rtol=1e-5)
  factor = 0.5 / optax.tree.norm(grads)
  expected = jax.tree.map(lambda x: factor * x, plain)
  assert_trees_close(updates, expected, rtol=1e-5, atol=1e-8)


def test_clipping_inside_clips_each_objective_and_keeps_the_weights():
  params = {'w': jnp.zeros(2)}
  grads = {'w': jnp.array([[20.0, 0.0], [0.0, 0.5]])}
  updates, state = update_of(grads, params, inner=optax.clip_by_global_norm(1))
  weights = np.array([0.25, 400.0]) / 400.25
  np.testing.assert_allclose(last_weights(state), weights, rtol=1e-6)
  expected = weights * [1.0, 0.5]
  np.testing.assert_allclose(updates['w'], expected, rtol=1e-6)


def test_weight_decay_before_is_added_to_every_objective():
  params, grads = random_tree(0), random_tree(1, 2)
  tx = optax.chain(
    optax.add_decayed_weights(0.5), mopt.aggregate(mopt.min_norm_weights)
  )
  with jax.numpy_rank_promotion('allow'):
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
  decayed = jax.tree.map(lambda g, p: g + 0.5 * p[None], grads, params)
  expected, expected_state = update_of(decayed, params)
  assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)
  weights = last_weights(expected_state)
  np.testing.assert_allclose(last_weights(state), weights, rtol=1e-5)
  _, plain_state = update_of(grads, params)
  assert np.abs(last_weights(plain_state) - weights).max() > 1e-3


def test_masked_around_passes_other_leaves_on_stacked():
  params, grads = random_tree(0), random_tree(1, 2)
  mask = {'kernel': True, 'bias': False, 'scale': False}
  tx = optax.masked(mopt.aggregate(halves), mask)
  updates, _ = tx.update(grads, tx.init(params), params)
  assert updates['kernel'].shape == (3, 2)
  np.testing.assert_array_equal(updates['bias'], grads['bias'])


def test_masked_inside_leaves_other_leaves_as_they_are():
  params, grads = random_tree(0), random_tree(1, 2)
  mask = {'kernel': False, 'bias': True, 'scale': False}
  inner = optax.masked(optax.scale(10.0), mask)
  updates, _ = update_of(grads, params, inner=inner)
  expected, _ = update_of(grads, params)
  expected['bias'] = 10 * expected['bias']
  assert_trees_close(updates, expected, rtol=1e-6)


def test_multi_steps_around_fails():
  tx = optax.MultiSteps(mopt.madam(0.1), every_k_schedule=2)
  params = random_tree(0)
  with pytest.raises((TypeError, ValueError)):
    tx.update(random_tree(1, 2), tx.init(params), params)


def test_accumulated_stacked_gradients_equal_the_full_batch():
  def error(params, batch):
    return jnp.mean((batch @ params['w']) ** 2)

  grad_fn = mopt.value_and_stacked_grad(error, mopt.l1_norm)

  # The recipe of the docstring of `aggregate`.
  def mean_grads(params, micro_batches):
    values, grads = jax.lax.map(
      lambda batch: grad_fn(params, batch), micro_batches
    )
    return jax.tree.map(lambda x: x.mean(axis=0), (values, grads))

  rng = np.random.default_rng(0)
  batch = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)
  params = {'w': jnp.array([0.5, -0.3, 0.2])}
  micro = jax.jit(mean_grads)(params, batch.reshape(4, 3, 3))
  full = grad_fn(params, batch)
  assert_trees_close(micro, full, rtol=1e-5, atol=1e-7)
  updates, _ = update_of(micro[1], params)
  assert_trees_close(updates, update_of(full[1], params)[0], rtol=1e-4)


def test_inject_hyperparams_injects_a_weight():
  def penalised(l1):
    weighting = mopt.fixed_weights(jnp.stack([jnp.ones_like(l1), l1]))
    return optax.chain(mopt.aggregate(weighting), optax.scale(-1.0))

  tx = optax.inject_hyperparams(penalised)(l1=0.25)
  params = {'w': jnp.zeros(2)}
  grads = {'w': jnp.array([[1.0, 0.0], [0.0, 8.0]])}
  state = tx.init(params)
  updates, state = jax.jit(tx.update)(grads, state, params)
  np.testing.assert_allclose(updates['w'], [-1.0, -2.0])
  state.hyperparams['l1'] = jnp.float32(0.5)
  updates, state = jax.jit(tx.update)(grads, state, params)
  np.testing.assert_allclose(updates['w'], [-1.0, -4.0])


# -- Gradients that are not finite --------------------------------------------


@pytest.mark.parametrize(
  ('m', 'value'), [(2, np.nan), (2, np.inf), (2, -np.inf), (3, np.nan)]
)
def test_a_gradient_that_is_not_finite_makes_the_whole_update_nan(m, value):
  params, grads = random_tree(0), random_tree(1, m)
  grads['bias'] = grads['bias'].at[1, 0].set(value)
  updates, state = update_of(grads, params, num_objectives=m)
  assert np.isnan(last_weights(state)).all()
  assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))


def test_a_step_that_is_not_finite_can_be_skipped():
  """By the recipe of the docstring, for optax.apply_if_finite fails."""
  params, grads = random_tree(0), random_tree(1, 2)
  around = optax.apply_if_finite(mopt.madam(0.1), max_consecutive_errors=3)
  with pytest.raises(TypeError, match='equal output types'):
    around.update(grads, around.init(params), params)

  tx = mopt.madam(0.1)

  @jax.jit
  def step(params, state, grads):
    updates, new_state = tx.update(grads, state, params)
    new_params = optax.apply_updates(params, updates)
    finite = jnp.isfinite(mopt.gramian(grads)).all()
    return jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (new_params, new_state),
      (params, state),
    )

  first = step(params, tx.init(params), grads)
  broken = dict(grads, bias=grads['bias'].at[1, 0].set(jnp.nan))
  assert_trees_close(step(*first, broken), first)
  second = step(*first, grads)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(second[0]))
  assert not np.array_equal(second[0]['bias'], first[0]['bias'])


# -- Fixed weights ------------------------------------------------------------


@pytest.mark.parametrize('weights', [(1.0, 3e-4), (0, 1), [0.0, 0.0, 7.0]])
def test_fixed_weights_ignore_the_gramian(weights):
  weighting = mopt.fixed_weights(weights)
  m = len(weights)
  for gramian in (jnp.eye(m), jnp.full((m, m), jnp.nan)):
    found = weighting(gramian)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.float32(weights))


@pytest.mark.parametrize(
  ('weights', 'match'),
  [
    (0.5, 'm >= 2'),
    ((1.0,), 'm >= 2'),
    ((), 'm >= 2'),
    (np.ones((2, 2)), 'm >= 2'),
    ((1.0, -1e-9), 'non-negative'),
    ((1.0, float('nan')), 'finite'),
    ((float('inf'), 1.0), 'finite'),
    ((1.0, 1e39), r'finite .* \[1.0, 1e[+]39\]'),  # inf in float32
  ],
)
def test_bad_fixed_weights_are_refused(weights, match):
  with pytest.raises(ValueError, match=match):
    mopt.fixed_weights(weights)


def test_fixed_weights_of_another_length_are_refused():
  weighting = mopt.fixed_weights((1, 2, 3))
  with pytest.raises(ValueError, match=r'3 weights need .* shape \(2, 2\)'):
    weighting(jnp.eye(2))
  with pytest.raises(ValueError, match=r'3 weights need .* shape \(3,\)'):
    weighting([1.0, 2.0, 3.0])


def population_weights(l1):
  return jnp.stack([jnp.ones_like(l1), l1])


def pair_of_weights(l1):
  return (1.0, l1)


@pytest.mark.parametrize('make', [population_weights, pair_of_weights])
def test_fixed_weights_may_be_traced(make):
  params = {'w': jnp.zeros(2)}
  grads = {'w': jnp.array([[1.0, 0.0], [0.0, 8.0]])}

  @jax.jit
  @jax.vmap
  def update(l1):
    tx = mopt.aggregate(mopt.fixed_weights(make(l1)))
    return tx.update(grads, tx.init(params), params)[0]['w']

  found = update(jnp.array([0.0, 0.5, 2.0]))
  np.testing.assert_allclose(found, [[1, 0], [1, 4], [1, 16]])
