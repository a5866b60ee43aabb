"""Tasks that share a trunk and have a head each: `aggregate(shared=...)`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

M = 3
IS_SHARED = {'trunk': True, 'heads': [False] * M}


def make_problem(seed=0):
  """Parameters, inputs, and targets of tasks whose scales differ."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'trunk': draw(4, 6), 'heads': [draw(6, 2) for _ in range(M)]}
  targets = draw(M, 16, 2) * np.float32([1, 5, 0.3])[:, None, None]
  return params, draw(16, 4), targets


def losses(params, inputs, targets):
  features = jnp.tanh(inputs @ params['trunk'])
  return jnp.stack(
    [
      jnp.mean(jnp.square(features @ head - target))
      for head, target in zip(params['heads'], targets)
    ]
  )


def grads_of(params, *batch):
  return mopt.value_and_stacked_jac(losses)(params, *batch)[1]


def update_of(tx, params, grads):
  return tx.update(grads, tx.init(params), params)


WEIGHTINGS = {
  'dual_proj': mopt.dual_proj,
  'upgrad': mopt.upgrad,
  'min_norm': mopt.min_norm_weights,
}


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_the_trunk_is_weighed_and_heads_move_by_their_own_gradient(name):
  params, *batch = make_problem()
  grads = grads_of(params, *batch)
  tx = mopt.aggregate(WEIGHTINGS[name], num_objectives=M, shared=IS_SHARED)
  updates, state = update_of(tx, params, grads)
  trunk = np.asarray(grads['trunk'], np.float64).reshape(M, -1)
  weights = WEIGHTINGS[name](jnp.float32(trunk @ trunk.T))
  np.testing.assert_allclose(state.weights, weights, rtol=1e-4)
  expected = np.tensordot(np.asarray(weights, np.float64), grads['trunk'], 1)
  np.testing.assert_allclose(updates['trunk'], expected, rtol=1e-3, atol=1e-5)
  for j, head in enumerate(updates['heads']):
    # Of the other objectives it is exactly 0.
    np.testing.assert_array_equal(head, grads['heads'][j][j])


def test_a_shared_leaf_is_not_seen_by_the_weights_of_others():
  params, *batch = make_problem()
  grads = grads_of(params, *batch)
  louder = {**grads, 'heads': jax.tree.map(lambda x: 100 * x, grads['heads'])}
  tx = mopt.aggregate(mopt.upgrad, num_objectives=M, shared=IS_SHARED)
  first, _ = update_of(tx, params, grads)
  second, _ = update_of(tx, params, louder)
  np.testing.assert_array_equal(first['trunk'], second['trunk'])


INNERS = {'sgd': optax.identity(), 'adam': optax.scale_by_adam()}


@pytest.mark.parametrize('inner', INNERS)
def test_partition_gives_the_same(inner):
  params, *batch = make_problem()
  inner = INNERS[inner]
  each = functools.partial(mopt.aggregate, inner=inner, num_objectives=M)
  one = each(mopt.upgrad, shared=IS_SHARED)
  two = optax.partition(
    {'shared': each(mopt.upgrad), 'own': each(mopt.fixed_weights((1.0,) * M))},
    {'trunk': 'shared', 'heads': ['own'] * M},
  )
  states = one.init(params), two.init(params)
  for _ in range(3):
    grads = grads_of(params, *batch)
    found, first = jax.jit(one.update)(grads, states[0], params)
    expected, second = jax.jit(two.update)(grads, states[1], params)
    states = first, second
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
      found,
      expected,
    )
    params = optax.apply_updates(
      params, jax.tree.map(lambda x: -0.1 * x, found)
    )


ALIASES = {'smgd': mopt.smgd, 'mrmsprop': mopt.mrmsprop, 'madam': mopt.madam}


@pytest.mark.parametrize('name', ALIASES)
def test_the_papers_optimizers_take_it(name):
  params, *batch = make_problem()
  grads = grads_of(params, *batch)
  make = functools.partial(ALIASES[name], 0.1, num_objectives=M)
  found, state = update_of(make(shared=IS_SHARED), params, grads)
  # By hand: the trunk alone, and each head by itself.
  trunk, alone = update_of(
    make(), {'trunk': params['trunk']}, {'trunk': grads['trunk']}
  )
  np.testing.assert_allclose(found['trunk'], trunk['trunk'], rtol=1e-6)
  weights = [
    optax.tree.get(s, 'AggregateState').weights for s in (state, alone)
  ]
  np.testing.assert_array_equal(*weights)
  everything = mopt.fixed_weights((1.0,) * M)
  heads, _ = update_of(make(weighting=everything), params, grads)
  jax.tree.map(np.testing.assert_array_equal, found['heads'], heads['heads'])


def test_a_mask_may_choose_among_what_is_shared():
  params = {'a': jnp.zeros(1), 'b': jnp.zeros(1), 'head': jnp.zeros(1)}
  grads = {
    'a': jnp.array([[2.0], [-1.0]]),
    'b': jnp.array([[9.0], [9.0]]),
    'head': jnp.array([[1.0], [3.0]]),
  }
  tx = mopt.aggregate(
    mopt.min_norm_weights,
    mask={'a': True, 'b': False, 'head': False},
    shared={'a': True, 'b': True, 'head': False},
  )
  updates, state = update_of(tx, params, grads)
  np.testing.assert_allclose(state.weights, [1 / 3, 2 / 3], rtol=1e-6)
  found = [updates[name].item() for name in params]
  np.testing.assert_allclose(found, [0.0, 9.0, 4.0], atol=1e-6)


def test_a_function_chooses_what_is_shared():
  params, *batch = make_problem()
  grads = grads_of(params, *batch)
  shared = mopt.mask_by_path(lambda path, leaf: path.startswith('trunk'))
  tx = mopt.aggregate(mopt.upgrad, num_objectives=M, shared=shared)
  named = mopt.aggregate(mopt.upgrad, num_objectives=M, shared=IS_SHARED)
  jax.tree.map(
    np.testing.assert_array_equal,
    update_of(tx, params, grads)[0],
    update_of(named, params, grads)[0],
  )


@pytest.mark.parametrize(
  ('shared', 'match'),
  [
    ({'trunk': True}, 'must have the structure of the parameters'),
    ({'trunk': 'yes', 'heads': [False] * M}, "Python boolean .* 'yes'"),
    (mopt.mask_by_path(lambda path, leaf: False), 'trunk'),
  ],
)
def test_a_mask_that_does_not_fit_is_refused(shared, match):
  params, *batch = make_problem()
  tx = mopt.aggregate(mopt.upgrad, num_objectives=M, shared=shared)
  with pytest.raises(ValueError, match=match):
    update_of(tx, params, grads_of(params, *batch))


@pytest.mark.parametrize('name', ['DualProj', 'IMTLG'])
def test_mtl_backward_of_torchjd_gives_the_same(name):
  torch = pytest.importorskip('torch', reason='torch is not installed')
  torchjd = pytest.importorskip('torchjd', reason='torchjd is not installed')
  ours = {'DualProj': mopt.dual_proj, 'IMTLG': mopt.imtl_g}
  params, inputs, targets = make_problem()
  leaf = lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)
  trunk, heads = leaf(params['trunk']), [leaf(x) for x in params['heads']]
  features = torch.tanh(torch.tensor(inputs, dtype=torch.float64) @ trunk)
  values = [
    ((features @ head - torch.tensor(target, dtype=torch.float64)) ** 2).mean()
    for head, target in zip(heads, targets)
  ]
  torchjd.autojac.mtl_backward(
    values,
    features=features,
    tasks_params=[[head] for head in heads],
    shared_params=[trunk],
  )
  # As exact as its solver is.
  exact = torchjd.linalg.QuadprogProjector(reg_eps=1e-12)
  options = {'DualProj': {'projector': exact}, 'IMTLG': {}}[name]
  aggregator = getattr(torchjd.aggregation, name)(**options)
  torchjd.autojac.jac_to_grad([trunk], aggregator)
  tx = mopt.aggregate(ours[name], num_objectives=M, shared=IS_SHARED)
  grads = grads_of(params, inputs, targets)
  updates, _ = update_of(tx, params, grads)
  # In float32, of which theirs has no rounding.
  size = np.abs(grads['trunk']).max()
  np.testing.assert_allclose(
    updates['trunk'], trunk.grad, rtol=0, atol=1e-6 * size
  )
  for head, expected in zip(updates['heads'], heads):
    size = np.abs(expected.grad.numpy()).max()
    np.testing.assert_allclose(head, expected.grad, rtol=0, atol=1e-6 * size)
