"""Each weighting moves on fronts that are known as its paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt
from tests import toy_fronts

FONSECA = toy_fronts.fonseca()
UNBALANCED = toy_fronts.quadratics((10.0, 0.1))
ASKEW = toy_fronts.askew()


def falling(rate, num_steps):
  return optax.cosine_decay_schedule(rate, num_steps)


def descend(front, weighting, rate, num_steps=1000, **arguments):
  return toy_fronts.descend(
    front, weighting, falling(rate, num_steps), num_steps, **arguments
  )


# -- The problems themselves ---------------------------------------------------


@pytest.mark.parametrize('front', [FONSECA, UNBALANCED], ids=['exp', 'bowls'])
def test_the_pareto_set_is_where_gradients_oppose(front):
  assert front.distance(front.start) > 0.1
  assert toy_fronts.slope(front, front.start) > 0.1
  # The minima of both, and what is between them.
  low, high = (
    descend(front, mopt.fixed_weights(w), 0.2).end for w in np.eye(2)
  )
  for place in np.linspace(-1, 1, 9):
    x = (low + high) / 2 + place * (high - low) / 2
    assert front.place(x) == pytest.approx(place, abs=1e-3)
    assert front.distance(x) < 1e-3
    assert toy_fronts.slope(front, x) < 1e-3
  rng = np.random.default_rng(0)
  for x in rng.uniform(-1, 1, size=(20, front.start.size)):
    assert front.distance(x) > 1e-2
    assert toy_fronts.slope(front, x) > 1e-4


def test_the_middle_of_the_exponential_front_is_no_minimum_of_a_sum():
  ones = np.ones(3) / np.sqrt(3)
  places = np.linspace(-1, 1, 201)
  values = np.array([FONSECA.values(jnp.asarray(p * ones)) for p in places])
  for share in np.linspace(0, 1, 101):
    best = places[np.argmin(values @ [share, 1 - share])]
    assert abs(best) > 0.7


# -- A front that is not convex ------------------------------------------------

STATIONARY = {
  'aligned_mtl': mopt.aligned_mtl,
  # From 1 on it ends where any of them does, else with the mean.
  'cagrad': mopt.cagrad(1.0),
  'config': mopt.config,
  'dual_proj': mopt.dual_proj,
  'every': mopt.every(mopt.min_norm_weights, 5),
  'fairgrad': mopt.fairgrad(0.5),
  'gradnorm': mopt.gradnorm(),
  'imtl_g': mopt.imtl_g,
  'min_norm': mopt.min_norm_weights,
  'modo': mopt.modo(0.1),
  'nash_mtl': mopt.nash_mtl,
  'pcgrad': mopt.pcgrad(jax.random.key(0)),
  'sdmgrad': mopt.sdmgrad(),
  'smoothed': mopt.smoothed(mopt.min_norm_weights),
  'stch': mopt.stch(0.01),
  'upgrad': mopt.upgrad,
}


@pytest.mark.parametrize('name', STATIONARY)
def test_the_end_is_pareto_stationary(name):
  found = descend(FONSECA, STATIONARY[name], 0.2)
  assert FONSECA.distance(found.end) < 1e-4
  assert toy_fronts.slope(FONSECA, found.end) < 1e-4


def test_below_one_cagrad_ends_with_the_mean():
  found = descend(FONSECA, mopt.cagrad(0.5), 0.2)
  assert FONSECA.distance(found.end) < 1e-3
  assert abs(FONSECA.place(found.end)) > 0.9
  assert abs(FONSECA.place(descend(FONSECA, mopt.mean, 0.2).end)) > 0.9


@pytest.mark.parametrize(
  'name', ['min_norm', 'dual_proj', 'upgrad', 'config', 'imtl_g']
)
def test_no_objective_ever_gets_worse(name):
  found = descend(FONSECA, STATIONARY[name], 0.02)
  assert np.diff(found.values, axis=0).max() < 1e-5
  # The mean lets one of them get worse.
  found = descend(FONSECA, mopt.mean, 0.02)
  assert found.values[-1, 0] > found.values[0, 0] + 0.05


@pytest.mark.parametrize('share', [0.45, 0.5, 0.55])
def test_the_smooth_maximum_ends_where_a_weighted_sum_cannot(share):
  preferences = np.array([share, 1 - share])
  found = descend(FONSECA, mopt.stch(0.003, preferences=preferences), 0.2)
  one, two = preferences * found.values[-1]
  assert one == pytest.approx(two, abs=0.01)
  assert abs(FONSECA.place(found.end)) < 0.3
  weighted = descend(FONSECA, mopt.fixed_weights(preferences), 0.2)
  assert abs(FONSECA.place(weighted.end)) > 0.9


# -- Objectives of different scales --------------------------------------------

BALANCING = {
  'famo': (mopt.famo(), 1.0),
  'gls': (mopt.gls(), 0.1),
  'gradnorm': (mopt.gradnorm(), 0.1),
  'imtl_l': (mopt.imtl_l(), 0.1),
  'stch': (mopt.stch(0.01, preferences=(0.1, 10.0)), 0.1),
  'uncertainty': (mopt.uncertainty(), 0.1),
}
DROWNING = {
  'dwa': mopt.dwa(),
  'mean': mopt.mean,
  'random_loss': mopt.random_loss(),
}


@pytest.mark.parametrize('name', BALANCING)
def test_neither_of_an_unbalanced_pair_is_drowned(name):
  weighting, rate = BALANCING[name]
  found = descend(UNBALANCED, weighting, rate, 3000)
  assert UNBALANCED.distance(found.end) < 1e-3
  assert abs(UNBALANCED.place(found.end)) < 0.15


SCALE_FREE = {
  'config': (mopt.config, 0.1),
  'imtl_g': (mopt.imtl_g, 0.3),
  'nash_mtl': (mopt.nash_mtl, 0.02),
  'upgrad of unit gradients': (mopt.normalized(mopt.upgrad, 'l2'), 0.02),
}


@pytest.mark.parametrize('name', SCALE_FREE)
def test_scales_do_not_move_the_end(name):
  weighting, rate = SCALE_FREE[name]
  balanced = toy_fronts.quadratics()
  places = []
  for front in (balanced, UNBALANCED):
    found = descend(front, weighting, rate, 3000)
    assert front.distance(found.end) < 2e-2
    places.append(front.place(found.end))
  assert abs(places[0] - places[1]) < 0.1
  # Where scales count the ends are far apart.
  ends = [
    f.place(descend(f, mopt.min_norm_weights, 0.1, 3000).end)
    for f in (balanced, UNBALANCED)
  ]
  assert abs(ends[0] - ends[1]) > 0.3


@pytest.mark.parametrize('name', DROWNING)
def test_the_large_one_of_an_unbalanced_pair_drowns_the_other(name):
  found = descend(UNBALANCED, DROWNING[name], 0.1, 3000)
  assert UNBALANCED.place(found.end) < -0.95


def test_while_losses_fall_dwa_evens_out_their_rates():
  # The large one falls faster, which a low temperature makes much of.
  def gap(weighting):
    values = descend(UNBALANCED, weighting, 0.005, 20).values
    one, two = values[-1] / values[0]
    return two - one

  plain = gap(mopt.fixed_weights((1.0, 1.0)))
  assert plain > 0.1
  assert 0 < gap(mopt.dwa(0.005)) < 0.7 * plain
  # That of the paper does little here.
  assert gap(mopt.dwa()) == pytest.approx(plain, rel=0.02)


# -- gram='preconditioned' -----------------------------------------------------


def test_the_gramian_is_that_of_what_comes_out_of_inner():
  remember = mopt.Weighting(
    init=lambda m: jnp.zeros((m, m)),
    update=lambda gramian, state, **extra: (gramian[0], gramian),
  )
  inner = optax.scale_by_adam()
  tx = mopt.aggregate(remember, inner, num_objectives=3, gram='preconditioned')
  rng = np.random.default_rng(0)
  params = {'a': jnp.ones((3, 2)), 'b': jnp.ones(4)}
  alone = jax.jit(inner.update)
  states = [inner.init(params) for _ in range(3)]
  state = tx.init(params)
  for _ in range(3):
    own = [
      jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
      )
      for _ in range(3)
    ]
    _, state = jax.jit(tx.update)(mopt.stack(*own), state, params)
    found, states = zip(*(alone(*pair) for pair in zip(own, states)))
    rows = np.stack(
      [
        np.concatenate([x.ravel() for x in found_j.values()])
        for found_j in found
      ]
    ).astype(np.float64)
    np.testing.assert_allclose(
      state.weighting_state, rows @ rows.T, rtol=1e-4, atol=1e-4
    )


def with_adam(front, weighting, gram):
  return descend(
    front, weighting, 0.02, 3000, inner=optax.scale_by_adam(), gram=gram
  )


@pytest.mark.parametrize('weighting', [mopt.min_norm_weights, mopt.upgrad])
def test_preconditioned_may_stop_where_both_could_improve(weighting):
  """All signs oppose, so both of Adam's directions cancel from the start."""
  found = with_adam(ASKEW, weighting, 'preconditioned')
  np.testing.assert_allclose(found.end, ASKEW.start, atol=0.01)
  assert toy_fronts.slope(ASKEW, found.end) > 1
  # Without Adam both improve, until they cannot.
  plain = descend(ASKEW, weighting, 0.1, 3000)
  assert toy_fronts.slope(ASKEW, plain.end) < 1e-4
  if weighting is mopt.min_norm_weights:
    assert (plain.values[-1] < plain.values[0] - 0.1).all()


@pytest.mark.parametrize('gram', ['raw', 'preconditioned'])
def test_adam_inside_may_stop_off_the_front_with_either(gram):
  found = with_adam(FONSECA, mopt.min_norm_weights, gram)
  assert FONSECA.distance(found.end) > 0.1
  assert toy_fronts.slope(FONSECA, found.end) > 0.1
  assert np.abs(found.points[-1] - found.points[-300]).max() < 1e-2


def test_preconditioned_weights_fit_the_steps_of_adam():
  # Weights of upgrad make up for the short gradient; Adam has already done so.
  raw = with_adam(UNBALANCED, mopt.upgrad, 'raw')
  assert raw.weights.max() > 5
  # Far off on the way; how far the end is depends on rounding.
  assert (raw.values.max(axis=0) > 5 * raw.values[0]).all()
  assert UNBALANCED.distance(raw.end) > 0.1
  found = with_adam(UNBALANCED, mopt.upgrad, 'preconditioned')
  assert found.weights.max() < 5
  assert UNBALANCED.distance(found.end) < 1e-3
  assert (found.values[-1] < 0.5 * found.values[0]).all()
  print(
    raw.weights.max(),
    raw.values[-1],
    found.weights.max(),
    found.values[-1],
    found.values[0],
  )
