"""benchmarks.weightings: its judges, and that it measures what it says."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.weightings import __main__ as bench
from benchmarks.weightings import examples
from benchmarks.weightings import judges

METHODS = {method.name: method for method in bench.make_methods()}
JUDGED = [name for name, method in METHODS.items() if method.judge]


@pytest.mark.parametrize('kind', bench.KINDS)
@pytest.mark.parametrize('m', [2, 128])
def test_gramians_are_exact_in_float32(kind, m):
  gradients = bench.draw_gradients(kind, m, 3)
  gramians = gradients @ gradients.swapaxes(1, 2)
  assert (gramians.astype(np.float32) == gramians).all()
  lengths = np.linalg.norm(gradients, axis=2)
  assert (lengths > 0).all()
  if kind == 'scaled' and m > 2:
    assert lengths.max() > 1e7 * lengths.min()
  if kind == 'conflict':  # Their mean is far shorter than they are.
    mean = np.linalg.norm(gradients.mean(axis=1), axis=1)
    assert (mean < 0.1 * lengths.mean(axis=1)).all()


@pytest.mark.parametrize('name', JUDGED)
def test_a_judge_tells_ours_from_others(name):
  method = METHODS[name]
  m = max(method.least, 4)
  for gradients in bench.draw_gradients('random', m, 3):
    gramian = jnp.asarray(gradients @ gradients.T, jnp.float32)
    weights, _ = method.ours.update(gramian, method.ours.init(m))
    weights = np.asarray(weights, float)
    assert abs(method.judge(gradients, weights)) < 1e-4
    other = weights * np.linspace(0.7, 1.3, m)
    assert abs(method.judge(gradients, other)) > 1e-4


def test_judges_by_hand():
  two = np.array([[2.0, 0.0], [0.0, 1.0]])
  # The shortest combination: (1, 4) / 5, of the squared length 4 / 5.
  assert judges.min_norm(two, np.array([0.2, 0.8])) < 1e-9
  equal = judges.min_norm(two, np.array([0.5, 0.5]))
  assert equal == pytest.approx((1.25 - 0.8) / 0.8)
  against = np.array([[1.0, 0.0], [-2.0, 2.0]])
  # The mean (-1/2, 1) is against the first, freed of which it is (0, 1).
  assert abs(judges.dual_proj(against, np.array([1.0, 0.5]))) < 1e-9
  assert judges.dual_proj(against, np.array([0.5, 0.5])) > 0.1
  # G a = 1 / a of orthogonal gradients: a = 1 / length.
  assert judges.nash_mtl(two, np.array([0.5, 1.0])) < 1e-9
  assert judges.nash_mtl(two, np.array([1.0, 1.0])) == pytest.approx(3.0)
  assert judges.krum(np.eye(4)[:, :1] * 9, np.array([0, 1.0, 0, 0])) == 0


def test_it_measures_and_writes(tmp_path, monkeypatch, capsys):
  """One weighting, and a step of LeNet-5 three ways: 15 s, for it compiles."""
  monkeypatch.setattr(bench, 'MANY', (3,))
  monkeypatch.setattr(bench, 'make_methods', lambda: [METHODS['dual_proj']])
  measure = examples.measure
  monkeypatch.setattr(examples, 'measure', lambda *_: measure((4,), 0.1))
  path = tmp_path / 'weightings.json'
  bench.main(['--quick', f'--out={path}'])
  assert 'dual_proj' in capsys.readouterr().out
  result = json.loads(path.read_text())
  assert [row['kind'] for row in result['rows']] == list(bench.KINDS)
  for row in result['rows']:
    assert row['objectives'] == 3
    assert abs(row['error']) < 1e-6
    assert 0 < row['us'] < row['vmap_us'] * bench.MEMBERS
  first, stacked, mean = result['per_example'][:3]
  assert first['way'] == 'per_example_gramian'
  assert first['error'] < 1e-6
  assert min(row['ms'] for row in (first, stacked, mean)) > 0
  assert mean['temp_mb'] < stacked['temp_mb']
