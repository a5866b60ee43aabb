"""The paper's optimizers against a float64 port of its equations."""

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
    (lambda: mopt.smgd(0.1, weighting=(1, 2)), 'weighting'),
  ],
)
def test_bad_hyperparameters_are_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()


@pytest.mark.parametrize('make', [mopt.smgd, mopt.mrmsprop, mopt.madam])
def test_no_learning_rate_is_refused(make):
  with pytest.raises(ValueError, match='learning_rate .*None'):
    make(None)
