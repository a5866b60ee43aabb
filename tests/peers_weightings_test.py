"""Weightings beside TorchJD's, where that is installed (the extra [peers])."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt
from mopt.weightings import surgery

torch = pytest.importorskip('torch', reason='torch is of the extra [peers]')
torchjd = pytest.importorskip(
  'torchjd.aggregation', reason='torchjd is of the extra [peers]'
)


def make_gradients(m, seed, n=None):
  """Integers, well-conditioned: their Gramian is exact in float32."""
  rng = np.random.default_rng([seed, m])
  return rng.integers(-8, 9, (m, n or 4 * m)).astype(float)


def gramian_of(gradients):
  return jnp.asarray(gradients @ gradients.T, jnp.float32)


def direction_of(aggregator, gradients):
  return aggregator(torch.from_numpy(gradients)).numpy()


def error_of(weights, gradients, expected):
  found = gradients.T @ np.asarray(weights, np.float64)
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize('m', [2, 3, 8, 32])
@pytest.mark.parametrize('name', ['imtl_g', 'config', 'aligned_mtl'])
def test_spectral_directions_are_theirs(name, m):
  theirs = {
    'imtl_g': torchjd.IMTLG,
    'config': torchjd.ConFIG,
    'aligned_mtl': torchjd.AlignedMTL,
  }[name]()
  for seed in range(5):
    gradients = make_gradients(m, seed)
    expected = direction_of(theirs, gradients)
    weights = getattr(mopt, name)(gramian_of(gradients))
    assert error_of(weights, gradients, expected) < 1e-6


@pytest.mark.parametrize('m', [4, 8])
@pytest.mark.parametrize('n_selected', [1, 3])
def test_krum_selects_what_theirs_does(m, n_selected):
  """On a line, further and further apart.

  They add up distances, the paper squares: elsewhere that is another order.
  """
  n_byzantine = m - 4  # So that there are two neighbours, and no ties.
  theirs = torchjd.Krum(n_byzantine, n_selected)
  for seed in range(10):
    rng = np.random.default_rng(seed)
    start, along = rng.integers(-8, 9, (2, 1, 16))
    gradients = start + 2.0 ** rng.permutation(m)[:, None] * along
    weights = mopt.krum(n_byzantine, n_selected)(gramian_of(gradients))
    expected = direction_of(theirs, gradients)
    assert error_of(weights, gradients, expected) < 1e-6


@pytest.fixture
def same_orders(monkeypatch):
  """Lets theirs draw the orders in which ours meets the others."""

  def use(orders, without_itself):
    drawn = []
    for i, order in enumerate(np.asarray(orders)):
      if without_itself:  # They number the others.
        order = order[order != i]
        order = order - (order > i)
      drawn.append(torch.from_numpy(np.array(order)))
    monkeypatch.setattr(torch, 'randperm', lambda count: drawn.pop(0))

  return use


@pytest.mark.parametrize('m', [2, 3, 8])
def test_pcgrad_is_theirs_in_the_same_order(m, same_orders):
  for seed in range(5):
    gradients = make_gradients(m, seed, n=m)
    orders = surgery.draw_orders(jax.random.key(seed), m)
    same_orders(orders, False)
    expected = direction_of(torchjd.PCGrad(), gradients)
    weights = surgery._pcgrad(gramian_of(gradients), orders)
    assert error_of(weights, gradients, expected) < 1e-5


@pytest.mark.parametrize('m', [2, 3, 8])
def test_gradvac_is_theirs_in_the_same_orders(m, same_orders):
  theirs = torchjd.GradVac(beta=0.5, eps=0.0)
  targets = jnp.zeros((m, m))
  for seed in range(5):
    gradients = make_gradients(m, seed, n=m)
    orders = surgery.draw_orders(jax.random.key(seed), m)
    same_orders(orders, True)
    expected = direction_of(theirs, gradients)
    weights, targets = surgery._gradvac(
      gramian_of(gradients), orders, targets, jnp.float32(0.5)
    )
    assert error_of(weights, gradients, expected) < 1e-5


@pytest.mark.parametrize('name', ['upgrad', 'dual_proj'])
def test_preferences_are_theirs(name):
  """Up to their solver, which is 1e-4 off."""
  preferences = np.array([1.0, 3.0, 2.0, 2.0])
  vector = torch.from_numpy(preferences / preferences.sum())
  theirs = {'upgrad': torchjd.UPGrad, 'dual_proj': torchjd.DualProj}[name]
  for seed in range(5):
    gradients = make_gradients(4, seed)
    expected = direction_of(theirs(pref_vector=vector), gradients)
    weighting = mopt.preferred(getattr(mopt, name), preferences)
    weights, _ = weighting.update(gramian_of(gradients), weighting.init(4))
    assert error_of(weights, gradients, expected) < 1e-3


def test_trimmed_means_are_theirs():
  tx = mopt.trimmed_mean(2, num_objectives=7)
  gradients = make_gradients(7, 0)
  params = jnp.zeros(gradients.shape[1])
  found, _ = tx.update(jnp.float32(gradients), tx.init(params), params)
  expected = direction_of(torchjd.TrimmedMean(2), gradients)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_graddrop_is_theirs_with_the_same_numbers(monkeypatch):
  gradients = make_gradients(5, 0)
  tx = mopt.graddrop(jax.random.key(0), num_objectives=5)
  params = jnp.zeros(gradients.shape[1])
  state = tx.init(params)
  data = jax.random.wrap_key_data(state.key)
  now = jax.random.split(jax.random.split(data)[1], 1)[0]
  drawn = np.array(jax.random.uniform(now, params.shape), np.float64)
  monkeypatch.setattr(torch, 'rand', lambda *_, **__: torch.from_numpy(drawn))
  expected = direction_of(torchjd.GradDrop(), gradients)
  found, _ = tx.update(jnp.float32(gradients), state, params)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def with_few_conflicts(m):
  return np.random.default_rng(m).normal(size=(m, 3 * m)) + 0.3


SIZES = pytest.mark.parametrize('m', [2, 3, 8, 16])


@SIZES
def test_cagrad(m):
  gradients = with_few_conflicts(m)
  gramian = gradients @ gradients.T
  # What TorchJD solves its program to.
  expected = torchjd.CAGradWeighting(c=0.5)(torch.tensor(gramian)).numpy()
  found = mopt.cagrad(0.5)(jnp.float32(gramian))
  assert error_of(found, gradients, gradients.T @ expected) <= 1e-3


@SIZES
@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_fairgrad(m, alpha):
  gradients = with_few_conflicts(m)
  gramian = gradients @ gradients.T
  expected = torchjd.FairGradWeighting(alpha=alpha)(
    torch.tensor(gramian)
  ).numpy()
  found = mopt.fairgrad(alpha)(jnp.float32(gramian))
  assert error_of(found, gradients, gradients.T @ expected) <= 1e-5


# Of CVXPY, about how TorchJD has it solve.
@pytest.mark.filterwarnings('ignore:You are solving a parameterized problem')
@SIZES
def test_nash_mtl(m):
  pytest.importorskip('cvxpy', reason='TorchJD solves Nash-MTL with it')
  gradients = with_few_conflicts(m)
  aggregator = torchjd.NashMTL(n_tasks=m, max_norm=0.0, optim_niter=100)
  expected = aggregator(torch.tensor(gradients)).numpy()
  weights = mopt.nash_mtl(jnp.float32(gradients @ gradients.T))
  found = gradients.T @ np.asarray(weights, np.float64)
  assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
