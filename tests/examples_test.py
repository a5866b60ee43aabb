"""The examples run, and find what they say."""

import importlib.util
import pathlib
import re

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mopt
from tests.networks import Tiny

_FOLDER = pathlib.Path(__file__).parents[1] / 'examples'


def load(name):
  """An example, by its path: other packages may be called examples."""
  spec = importlib.util.spec_from_file_location(name, _FOLDER / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def l_curve():
  return load('l_curve')


def least_squares(blur, seen, weight):
  """A solution by the normal equations."""
  matrix = blur.T @ blur + weight * np.eye(len(seen))
  return np.linalg.solve(matrix, blur.T @ seen)


@pytest.mark.parametrize('weight', [1e-6, 1e-3, 1.0])
def test_the_l_curve_solves_its_least_squares(l_curve, weight):
  blur, _, seen = l_curve.problem()
  x, logarithms = l_curve.make_solver(blur, seen)(weight)
  expected = least_squares(blur, seen, weight)
  np.testing.assert_allclose(x, expected, atol=1e-6)
  misfit, size = np.exp(logarithms)
  assert misfit == pytest.approx(np.linalg.norm(blur @ expected - seen) ** 2)
  assert size == pytest.approx(np.linalg.norm(expected) ** 2)


def test_the_corner_of_the_l_curve(l_curve, tmp_path, capsys):
  path = tmp_path / 'front.png'
  l_curve.main([f'--out={path}'])
  assert path.read_bytes().startswith(b'\x89PNG')

  printed = capsys.readouterr().out
  (knee, solves), (dense_knee, _) = (
    (float(weight), int(solves))
    for weight, solves in re.findall(r'weight (\S+), (\d+) solves', printed)
  )
  error, least = map(float, re.findall(r'(?:knee|smallest): (0\.\d+)', printed))
  assert 2 < solves <= 20

  blur, truth, seen = l_curve.problem()
  weights = np.geomspace(1e-8, 1e2, 101)
  x = np.array([least_squares(blur, seen, w) for w in weights])
  misfits = np.linalg.norm(x @ blur.T - seen, axis=1)
  points = np.log(np.stack([misfits, np.linalg.norm(x, axis=1)], axis=1))
  expected = weights[mopt.knee(points)]
  assert 1 / 1.3 < dense_knee / expected < 1.3  # a step is 1.26
  assert 1 / 2 < knee / expected < 2

  errors = np.linalg.norm(x - truth, axis=1) / np.linalg.norm(truth)
  assert least == pytest.approx(errors.min(), rel=0.02)
  assert error == pytest.approx(np.interp(knee, weights, errors), rel=0.02)
  assert least <= error < 1.3 * least
  # The ends of the range are far worse.
  assert min(errors[0], errors[-1]) > 3 * least


@pytest.mark.parametrize(
  'path', sorted(_FOLDER.glob('*.py')), ids=lambda path: path.stem
)
def test_examples_are_short(path):
  assert len(path.read_text().splitlines()) <= 125


@pytest.mark.slow
def test_three_tasks_of_one_network_are_learnt(tmp_path, capsys):
  path = tmp_path / 'tasks.png'
  load('multi_task').main([f'--out={path}', '--epochs=4'])
  assert path.read_bytes().startswith(b'\x89PNG')
  heading, *rows = capsys.readouterr().out.splitlines()
  assert heading.split()[2:4] == ['digit', 'odd']
  found = {row.split()[0]: row.split()[1::2] for row in rows}
  assert set(found) == {'mean', 'min_norm', 'upgrad'}
  for accuracies in found.values():
    digit, odd, more = map(float, accuracies)
    # Guessing gives 10, 50 and 50.
    assert digit > 70
    assert min(odd, more) > 80


@pytest.mark.slow
def test_every_digit_is_an_objective(tmp_path, capsys):
  path = tmp_path / 'losses.png'
  load('per_example').main([f'--out={path}', '--epochs=2'])
  assert path.read_bytes().startswith(b'\x89PNG')
  _, *rows = capsys.readouterr().out.splitlines()
  found = {row.split()[0]: float(row.split()[1]) for row in rows}
  assert set(found) == {'mean', 'upgrad'}
  # From log(10), and faster than the mean.
  assert found['upgrad'] < found['mean'] < np.log(10)


def test_the_mean_of_all_digits_is_the_usual_gradient():
  per_example = load('per_example')
  network = Tiny()
  rng = np.random.default_rng(0)
  images = rng.normal(size=(64, 28, 28, 1)).astype(np.float32)
  digits = rng.integers(0, 10, 64).astype(np.int32)
  found, seconds = per_example.train(
    mopt.mean, network, images, digits, epochs=2, learning_rate=0.1
  )
  assert seconds > 0

  def losses(params, images, digits):
    logits = network.apply({'params': params}, images)
    picked = jax.nn.log_softmax(logits)[np.arange(len(digits)), digits]
    return -picked

  params = network.init(jax.random.key(0), images[:1])['params']
  order = np.random.default_rng(0)
  for epoch in range(2):
    for chosen in order.permutation(64).reshape(-1, 32):
      grad = jax.grad(lambda p, *batch: losses(p, *batch).mean())(
        params, images[chosen], digits[chosen]
      )
      params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
    expected = losses(params, images, digits)
    np.testing.assert_allclose(found[epoch], expected, rtol=1e-4, atol=1e-5)


def test_losses_and_targets_of_the_three_tasks():
  multi_task = load('multi_task')
  digits = jnp.array([0, 3, 7])
  np.testing.assert_array_equal(
    multi_task.targets_of(digits), [[0, 3, 7], [0, 1, 1], [0, 0, 1]]
  )
  graph, params = nnx.split(multi_task.Network(nnx.Rngs(0)), nnx.Param)
  # All weights are 0: nothing is known.
  zeros = jax.tree.map(jnp.zeros_like, params)
  images = jnp.ones((3, 28, 28, 1))
  values, _ = multi_task.make_losses(graph)(zeros, images, digits)
  np.testing.assert_allclose(values, np.log([10, 2, 2]), rtol=1e-6)
