"""The examples run, and find what they say."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest

import mopt

_PATH = pathlib.Path(__file__).parents[1] / 'examples' / 'l_curve.py'


@pytest.fixture(scope='module')
def l_curve():
  # By its path: other packages may be called examples.
  spec = importlib.util.spec_from_file_location('l_curve', _PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


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


def test_the_l_curve_is_short():
  assert len(_PATH.read_text().splitlines()) <= 100
