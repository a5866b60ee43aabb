"""Weightings beside those of TorchJD, where its methods are exact."""

import jax.numpy as jnp
import numpy as np
import pytest

import mopt


def _need():
  reason = 'torchjd is of the extra [peers]'
  torch = pytest.importorskip('torch', reason=reason)
  return torch, pytest.importorskip('torchjd.aggregation', reason=reason)


def make_gradients(m):
  """Well-conditioned, and with few conflicts."""
  rng = np.random.default_rng(m)
  return rng.normal(size=(m, 3 * m)) + 0.3


def relative_error(gradients, found, expected):
  off = gradients.T @ (np.asarray(found, np.float64) - expected)
  return np.linalg.norm(off) / np.linalg.norm(gradients.T @ expected)


SIZES = pytest.mark.parametrize('m', [2, 3, 8, 16])


@SIZES
def test_cagrad(m):
  torch, peers = _need()
  gradients = make_gradients(m)
  gramian = gradients @ gradients.T
  # What TorchJD solves its program to.
  expected = peers.CAGradWeighting(c=0.5)(torch.tensor(gramian)).numpy()
  found = mopt.cagrad(0.5)(jnp.float32(gramian))
  assert relative_error(gradients, found, expected) <= 1e-3


@SIZES
@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_fairgrad(m, alpha):
  torch, peers = _need()
  gradients = make_gradients(m)
  gramian = gradients @ gradients.T
  expected = peers.FairGradWeighting(alpha=alpha)(torch.tensor(gramian)).numpy()
  found = mopt.fairgrad(alpha)(jnp.float32(gramian))
  assert relative_error(gradients, found, expected) <= 1e-5


# Of CVXPY, about how TorchJD has it solve.
@pytest.mark.filterwarnings('ignore:You are solving a parameterized problem')
@SIZES
def test_nash_mtl(m):
  torch, peers = _need()
  pytest.importorskip('cvxpy', reason='TorchJD solves Nash-MTL with it')
  gradients = make_gradients(m)
  aggregator = peers.NashMTL(n_tasks=m, max_norm=0.0, optim_niter=100)
  expected = aggregator(torch.tensor(gradients)).numpy()
  weights = mopt.nash_mtl(jnp.float32(gradients @ gradients.T))
  found = gradients.T @ np.asarray(weights, np.float64)
  assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
