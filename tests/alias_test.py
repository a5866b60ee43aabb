"""The paper's optimizers against a float64 port of its equations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

STEPS = 20
SIZE = 6

# -- A small problem with noise: quadratics, and a gradient for each step -----


def make_problem(m):
  rng = np.random.default_rng(m)
  roots = rng.normal(size=(m, SIZE, SIZE)) / np.sqrt(SIZE)
  matrices = roots @ np.swapaxes(roots, 1, 2) + 0.1 * np.eye(SIZE)
  centers = rng.normal(size=(m, SIZE))
  noise = 0.3 * rng.normal(size=(STEPS, m, SIZE))
  # Representable in f32, so that both sides see the same problem.
  return [x.astype(np.float32) for x in (matrices, centers, noise)]


START = np.random.default_rng(7).normal(size=SIZE).astype(np.float32)


def to_tree(x):
  return {'a': x[..., :4].reshape(*x.shape[:-1], 2, 2), 'b': x[..., 4:]}


def from_tree(tree):
  a, b = np.asarray(tree['a']), np.asarray(tree['b'])
  return np.concatenate([a.reshape(*a.shape[:-2], 4), b], axis=-1)


def run_library(tx, m=2):
  """The weights after each step, `[STEPS, SIZE]`."""
  matrices, centers, noise = map(jnp.asarray, make_problem(m))

  def step(carry, noise):
    params, state = carry
    w = jnp.concatenate([params['a'].reshape(4), params['b']])
    distance = w[None] - centers
    grads = jnp.sum(matrices * distance[:, None, :], axis=2) + noise
    updates, state = tx.update(to_tree(grads), state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  params = to_tree(jnp.asarray(START))
  run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), noise)[1])
  return from_tree(run(params, tx.init(params)))


# -- The port: equations (8) to (15), float64, one line each ------------------


def min_norm(gradients):
  """(15), by enumeration of supports."""
  m = len(gradients)
  gramian = gradients @ gradients.T
  found = []
  for size in range(1, m + 1):
    for chosen in map(list, itertools.combinations(range(m), size)):
      system = np.ones((size + 1, size + 1))
      system[:size, :size] = gramian[np.ix_(chosen, chosen)]
      system[size, size] = 0
      weights = np.zeros(m)
      weights[chosen] = np.linalg.solve(system, np.eye(size + 1)[size])[:size]
      if (weights >= 0).all():
        found.append((weights @ gramian @ weights, weights))
  return min(found, key=lambda pair: pair[0])[1]


def run_port(make_step, rates, m=2):
  matrices, centers, noise = (x.astype(np.float64) for x in make_problem(m))
  w = START.astype(np.float64)
  step = make_step()
  path = []
  for k, rate in enumerate(rates):
    g = np.einsum('jab,jb->ja', matrices, w - centers) + noise[k]  # (8)
    w = w + step(g, min_norm(g), rate)
    path.append(w)
  return np.array(path)


def port_smgd(momentum=0.0, nesterov=False):
  v = 0.0

  def step(g, weights, rate):
    nonlocal v
    g = weights @ g  # line 6 of Algorithm 2
    v = v * momentum - rate * g  # (10)
    return v * momentum - rate * g if nesterov else v

  return step


def port_mrmsprop(beta, eps):
  mov = 0.0

  def step(g, weights, rate):
    nonlocal mov
    mov = beta * mov + (1 - beta) * g**2  # (11), of each objective
    return -rate * (weights @ (g / (np.sqrt(mov) + eps)))  # (12)

  return step


def port_madam(beta1, beta2, eps, amsgrad=False):
  first, second, largest, k = 0.0, 0.0, 0.0, 0

  def step(g, weights, rate):
    nonlocal first, second, largest, k
    k += 1
    first = beta1 * first + (1 - beta1) * g  # (13), of each objective
    second = beta2 * second + (1 - beta2) * g**2
    first_hat = first / (1 - beta1**k)
    second_hat = second / (1 - beta2**k)
    if amsgrad:
      second_hat = largest = np.maximum(largest, second_hat)
    return -rate * (weights @ (first_hat / (np.sqrt(second_hat) + eps)))  # (14)

  return step


# eps is large, so that its place counts.
OPTIMIZERS = {
  'smgd': (mopt.smgd, {}, port_smgd),
  'momentum': (
    mopt.smgd,
    {'momentum': 0.9},
    lambda: port_smgd(0.9),
  ),
  'nesterov': (
    mopt.smgd,
    {'momentum': 0.9, 'nesterov': True},
    lambda: port_smgd(0.9, nesterov=True),
  ),
  'mrmsprop': (
    mopt.mrmsprop,
    {'decay': 0.8, 'eps': 0.1},
    lambda: port_mrmsprop(0.8, 0.1),
  ),
  'madam': (
    mopt.madam,
    {'b1': 0.8, 'b2': 0.95, 'eps': 0.1},
    lambda: port_madam(0.8, 0.95, 0.1),
  ),
  'amsgrad': (
    mopt.madam,
    {'b1': 0.8, 'b2': 0.95, 'eps': 0.1, 'amsgrad': True},
    lambda: port_madam(0.8, 0.95, 0.1, amsgrad=True),
  ),
}

COUNT = np.arange(STEPS)
RATES = {
  'constant': (0.05, np.full(STEPS, 0.05)),
  'inverse_time_decay': (
    mopt.inverse_time_decay(0.1, 0.2),
    0.1 / (1 + 0.2 * COUNT),  # (9)
  ),
  'logistic_drop': (
    mopt.logistic_drop(0.1, 0.01, STEPS),
    0.1 - 0.09 / (1 + np.exp(-(COUNT - 15) / 1.5)),
  ),
}


@pytest.mark.parametrize('rate', RATES)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_twenty_steps_match_the_equations_in_float64(name, rate):
  make, kwargs, port = OPTIMIZERS[name]
  learning_rate, rates = RATES[rate]
  found = run_library(make(learning_rate, **kwargs))
  expected = run_port(port, rates)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  assert np.abs(expected[-1] - START).max() > 0.1


@pytest.mark.parametrize('name', ['momentum', 'mrmsprop', 'madam'])
def test_three_objectives_match_the_equations_in_float64(name):
  make, kwargs, port = OPTIMIZERS[name]
  found = run_library(make(0.05, num_objectives=3, **kwargs), m=3)
  expected = run_port(port, np.full(STEPS, 0.05), m=3)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_problem_has_both_ends_and_the_inside_of_the_simplex():
  matrices, centers, noise = (x.astype(np.float64) for x in make_problem(2))
  rates = np.full(STEPS, 0.05)
  path = run_port(port_smgd, rates)
  points = np.concatenate([START[None].astype(np.float64), path[:-1]])
  weights = [
    min_norm(np.einsum('jab,jb->ja', matrices, w - centers) + noise[k])[1]
    for k, w in enumerate(points)
  ]
  assert sum(0.05 < x < 0.95 for x in weights) > 10


def test_defaults_are_those_of_the_paper():
  for name, defaults in {
    'smgd': port_smgd,
    'mrmsprop': lambda: port_mrmsprop(0.9, 1e-7),
    'madam': lambda: port_madam(0.9, 0.999, 1e-8),
  }.items():
    found = run_library(getattr(mopt, name)(0.05))
    expected = run_port(defaults, np.full(STEPS, 0.05))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


# -- Against Optax ------------------------------------------------------------


def run_grads(tx, grads, params):
  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  run = jax.jit(lambda p, s: jax.lax.scan(step, (p, s), grads)[1])
  return np.asarray(run(params, tx.init(params)))


def random_grads(*shape):
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_momentum_holds_the_rate_unlike_optax_sgd():
  grads = random_grads(STEPS, 3)
  stacked = jnp.stack([grads, grads], axis=1)
  params = jnp.zeros(3)
  runs = {
    name: (
      run_grads(mopt.smgd(rate, momentum=0.9), stacked, params),
      run_grads(optax.sgd(rate, momentum=0.9), grads, params),
    )
    for name, (rate, _) in RATES.items()
  }
  np.testing.assert_allclose(*runs['constant'], rtol=1e-5, atol=1e-6)
  ours, theirs = runs['logistic_drop']
  assert np.abs(ours - theirs)[-1].max() > 1e-2


SINGLE = {
  'smgd': (mopt.smgd(0.1), optax.sgd(0.1)),
  'nesterov': (
    mopt.smgd(0.1, 0.9, nesterov=True),
    optax.sgd(0.1, 0.9, nesterov=True),
  ),
  'mrmsprop': (
    mopt.mrmsprop(0.1),
    optax.rmsprop(0.1, eps=1e-7, eps_in_sqrt=False),
  ),
  'madam': (mopt.madam(0.1), optax.adam(0.1)),
  'amsgrad': (mopt.madam(0.1, amsgrad=True), optax.amsgrad(0.1)),
}


@pytest.mark.parametrize('name', SINGLE)
def test_equal_objectives_give_the_optimizer_of_optax(name):
  ours, theirs = SINGLE[name]
  grads, params = random_grads(STEPS, 4), jnp.ones(4)
  found = run_grads(ours, jnp.stack([grads, grads], axis=1), params)
  expected = run_grads(theirs, grads, params)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_madam_is_not_min_norm_followed_by_adam():
  grads, params = random_grads(STEPS, 2, 4), jnp.zeros(4)
  mixed_first = optax.chain(
    mopt.aggregate(mopt.min_norm_weights), optax.adam(0.1)
  )
  difference = run_grads(mopt.madam(0.1), grads, params) - run_grads(
    mixed_first, grads, params
  )
  assert np.abs(difference).max() > 0.05


def weighted_sum(weights, optimizer):
  return optax.chain(mopt.aggregate(mopt.fixed_weights(weights)), optimizer)


def test_madam_with_fixed_weights_is_not_adam_on_the_weighted_sum():
  weights = 0.9, 0.1
  grads, params = random_grads(STEPS, 2, 4), jnp.zeros(4)
  ours = mopt.madam(0.1, weighting=mopt.fixed_weights(weights))
  difference = run_grads(ours, grads, params) - run_grads(
    weighted_sum(weights, optax.adam(0.1)), grads, params
  )
  assert np.abs(difference).max() > 0.05


@pytest.mark.parametrize('penalty', [1e-3, 0.25, 3.0])
def test_penalty_and_convex_form_agree_under_adam(penalty):
  convex = penalty / (1 + penalty)
  grads, params = random_grads(STEPS, 2, 4), jnp.zeros(4)
  found = [
    run_grads(weighted_sum(weights, optax.adam(0.01)), grads, params)
    for weights in ((1.0, penalty), (1 - convex, convex))
  ]
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('penalty', [1e-3, 0.25, 3.0])
def test_penalty_and_convex_form_agree_under_sgd_of_a_scaled_rate(penalty):
  convex = penalty / (1 + penalty)
  grads, params = random_grads(STEPS, 2, 4), jnp.zeros(4)
  found = [
    run_grads(weighted_sum(weights, optax.sgd(rate)), grads, params)
    for weights, rate in (
      ((1.0, penalty), 0.01),
      ((1 - convex, convex), 0.01 * (1 + penalty)),
    )
  ]
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


# -- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: mopt.smgd(0.1, momentum=1.0), 'momentum must be in'),
    (lambda: mopt.smgd(0.1, momentum=-0.1), 'momentum must be in'),
    (lambda: mopt.smgd(0.1, momentum=float('nan')), 'momentum must be in'),
    (lambda: mopt.mrmsprop(0.1, decay=1.0), 'decay must be in'),
    (lambda: mopt.mrmsprop(0.1, eps=0.0), 'eps must be positive'),
    (lambda: mopt.madam(0.1, b1=1), 'b1 must be in'),
    (lambda: mopt.madam(0.1, b2=-0.5), 'b2 must be in'),
    (lambda: mopt.madam(0.1, eps=-1e-8), 'eps must be positive'),
    (lambda: mopt.madam(0.1, num_objectives=1), 'num_objectives'),
    (lambda: mopt.madam(0.1, num_objectives=True), 'num_objectives must be an'),
    (lambda: mopt.madam(0.1, num_objectives=2.0), 'num_objectives must be an'),
    (lambda: mopt.smgd(0.1, weighting=(1, 2)), 'weighting'),
    # As JAX has them, in float32.
    (lambda: mopt.mrmsprop(0.1, decay=1 - 1e-12), 'decay must .* got 0.999'),
    (
      lambda: mopt.madam(0.1, b2=np.float32(np.nan)),
      'b2 must be in .* got nan',
    ),
    (lambda: mopt.madam(0.1, b1=jnp.float32(2)), 'b1 must be in .* got 2.0'),
    (
      lambda: mopt.madam(0.1, b1=jnp.bfloat16(0.999)),
      'got 1.0 in bfloat16. .*32',
    ),
    (lambda: mopt.madam(0.1, b1='0.9'), "b1 must be a number, got '0.9'"),
    (lambda: mopt.madam(0.1, eps=np.inf), 'eps must be positive and finite'),
    (lambda: mopt.madam(0.1, eps=np.nan), 'eps must be positive and finite'),
    (lambda: mopt.mrmsprop(0.1, eps=1e39), r'eps must be .* got 1e[+]39'),
    (lambda: mopt.mrmsprop(0.1, eps=1e-46), 'eps must be .* got 1e-46'),
    (
      lambda: mopt.madam(0.1, eps=jnp.float16(1e-8)),
      'got 0.0 in float16. optax',
    ),
    (lambda: mopt.smgd(0.1, momentum=jnp.inf), r'momentum must be in \[0, 1\)'),
  ],
)
def test_bad_hyperparameters_are_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize('make', [mopt.smgd, mopt.mrmsprop, mopt.madam])
def test_no_learning_rate_is_refused(make):
  with pytest.raises(ValueError, match='learning_rate .*None'):
    make(None)


OPTIMIZERS_BY_NAME = {
  'smgd': mopt.smgd,
  'mrmsprop': mopt.mrmsprop,
  'madam': mopt.madam,
}
each_make = pytest.mark.parametrize(
  'make', OPTIMIZERS_BY_NAME.values(), ids=OPTIMIZERS_BY_NAME
)


@each_make
@pytest.mark.parametrize(
  'rate', [np.nan, np.inf, -np.inf, 1e39, np.float32(np.nan), jnp.array(np.inf)]
)
def test_a_rate_that_is_not_finite_is_refused(make, rate):
  with pytest.raises(ValueError, match='learning_rate must be a finite number'):
    make(rate)


@each_make
def test_a_negative_rate_ascends_as_it_does_in_optax(make):
  grads, params = random_grads(3, 2, 4), jnp.zeros(4)
  up, down = (run_grads(make(rate), grads, params) for rate in (-0.1, 0.1))
  np.testing.assert_array_equal(up[0], -down[0])
  assert np.any(up[0])


# -- As hyperparameters of Optax ----------------------------------------------


@each_make
@pytest.mark.parametrize('jit', [False, True], ids=['eager', 'jit'])
def test_injected_as_it_is(make, jit):
  tx = optax.inject_hyperparams(make)(learning_rate=0.05)
  grads, params = random_grads(5, 2, 4), jnp.ones(4)
  update = jax.jit(tx.update) if jit else tx.update
  state = (jax.jit(tx.init) if jit else tx.init)(params)
  assert 'weighting' not in state.hyperparams
  assert 'num_objectives' not in state.hyperparams
  expected = run_grads(make(0.05), grads, params)
  for grad, row in zip(grads, expected):
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, row, rtol=1e-5, atol=1e-6)
  # The next rate is what the caller wants.
  zero = state._replace(
    hyperparams=state.hyperparams | {'learning_rate': jnp.float32(0)}
  )
  updates, _ = update(grads[0], zero, params)
  np.testing.assert_array_equal(updates, np.zeros(4))


@each_make
def test_what_is_injected_may_be_a_schedule(make):
  schedule = mopt.inverse_time_decay(0.1, 0.5)
  grads, params = random_grads(5, 2, 4), jnp.ones(4)
  injected = optax.inject_hyperparams(make)(schedule)
  expected = run_grads(make(schedule), grads, params)
  state = injected.init(params)
  for grad, row in zip(grads, expected):
    updates, state = jax.jit(injected.update)(grad, state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, row, rtol=1e-5, atol=1e-6)


STATIC_ARGS = 'weighting', 'num_objectives', 'mask'


@each_make
def test_what_is_no_hyperparameter_is_named(make):
  weighting = lambda gramian: jnp.ones(len(gramian))
  options = {
    'weighting': weighting,
    'num_objectives': 3,
    'mask': mopt.mask_by_path(lambda path, leaf: True),
  }
  grads, params = random_grads(3, 4), jnp.ones(4)
  inject = optax.inject_hyperparams(make, static_args=STATIC_ARGS)
  tx = inject(0.1, **options)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  plain = make(0.1, **options)
  expected, _ = plain.update(grads, plain.init(params), params)
  np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


@each_make
def test_what_is_not_named_says_so(make):
  grads, params = jnp.ones((3, 4)), jnp.ones(4)
  inject = optax.inject_hyperparams(make)
  tx = inject(0.1, num_objectives=3)
  # Known when it is made, but not under jit, where it is a part of the state.
  state = tx.init(params)
  tx.update(grads, state, params)
  with pytest.raises(ValueError, match="'num_objectives' to static_args"):
    jax.jit(tx.update)(grads, state, params)
  with pytest.raises(ValueError, match="add 'weighting' to static_args"):
    inject(0.1, weighting=lambda gramian: 0 * gramian).init(params)
  with pytest.raises(ValueError, match=r"static_args=\('mask',\)"):
    inject(0.1, mask=mopt.dense_kernels).init(params)


def test_hyperparameters_in_half_precision_are_refused_with_a_hint():
  params = jnp.ones(4, jnp.float16)  # whose eps of 1e-8 is 0
  with pytest.raises(
    ValueError, match='eps .*0 in float16. .*hyperparam_dtype'
  ):
    optax.inject_hyperparams(mopt.madam)(1e-3).init(params)
  tx = optax.inject_hyperparams(mopt.madam, hyperparam_dtype=jnp.float32)(1e-3)
  assert tx.init(params).hyperparams['eps'] == np.float32(1e-8)


# -- Which leaves the weights are found from ----------------------------------


@each_make
def test_a_mask_says_which_leaves_the_weights_are_of(make):
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}
  grads = {
    # Of the kernels alone the weights are [0.9, 0.1], the lengths being 1, 3.
    'kernel': jnp.array([[[1.0, 0], [0, 0]], [[0, 3.0], [0, 0]]]),
    # And with the biases as well the lengths are 5 and 3.
    'bias': jnp.array([[24.0**0.5, 0], [0, 0]]),
  }
  for mask, expected in (
    (mopt.dense_kernels, [0.9, 0.1]),
    ({'kernel': True, 'bias': False}, [0.9, 0.1]),
    (None, [9 / 34, 25 / 34]),
    (True, [9 / 34, 25 / 34]),
  ):
    tx = make(0.1, mask=mask)
    updates, state = tx.update(grads, tx.init(params), params)
    weights = optax.tree.get(state, 'AggregateState').weights
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert np.any(updates['bias'])


def test_what_its_docstring_says_of_parameters_without_one_of_the_objectives():
  def error(params):
    return jnp.sum((params['kernel'] - 3) ** 2) + jnp.sum(
      (params['bias'] - 3) ** 2
    )

  norm = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
  grad_fn = mopt.value_and_stacked_grad(error, norm)
  params = {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)}

  def updates_of(tx):
    return tx.update(grad_fn(params)[1], tx.init(params), params)[0]

  groups = {'kernel': 'kernels', 'bias': 'biases'}
  each = {'kernels': mopt.madam(0.1), 'biases': mopt.madam(0.1)}
  updates = updates_of(optax.partition(each, groups))
  assert np.any(updates['kernel'])
  assert not np.any(updates['bias'])
  # What helps.
  each['biases'] = mopt.madam(0.1, weighting=mopt.fixed_weights((1, 0)))
  updates = updates_of(optax.partition(each, groups))
  np.testing.assert_allclose(updates['bias'], 0.1 * np.ones(2), rtol=1e-4)
  # All of the weight everywhere: kernels shrink, though the error wants more.
  updates = updates_of(mopt.smgd(0.1, mask={'kernel': False, 'bias': True}))
  np.testing.assert_allclose(updates['kernel'], -0.1 * np.ones((2, 2)))
  assert not np.any(updates['bias'])
