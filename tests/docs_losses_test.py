"""The example of docs/losses.md runs, and learns what it says."""

import pathlib
import re

import numpy as np
import pytest

from mopt import training
from mopt.training import records

_PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'losses.md'
_BLOCKS = re.findall(r'```python\n(.*?)```', _PAGE.read_text(), re.DOTALL)


def _forward(net, inputs):
  """The multilayer perceptron of a file, in NumPy and float64."""
  x = (np.asarray(inputs, np.float64) - net.mean) / net.std
  names = sorted(net.params)
  for name in names:
    layer = {k: v.astype(np.float64) for k, v in net.params[name].items()}
    x = x @ layer['kernel'] + layer['bias']
    x = np.maximum(x, 0) if name != names[-1] else x
  return x


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
  """Two trainings of 30 epochs: 15 s."""
  monkeypatch.chdir(tmp_path)
  names = {}
  for block in _BLOCKS:
    exec(block, names)
  assert capsys.readouterr().out.startswith('1 200\n')
  data = names['data']
  # The page says so.
  assert 'less than a hundredth of the\nvariance' in _PAGE.read_text()
  bound = np.var(data.test.labels.astype(np.float64)) / 100
  for optimizer, number in (('adam', 2), ('madam', 1)):
    rows = records.read_rows(tmp_path / optimizer / 'results.csv')
    assert len(rows) == number
    for row in rows:
      assert row['status'] == 'ok'
      net = training.load(tmp_path / optimizer / row['file'])
      for split in ('train', 'val', 'test'):
        images, labels = getattr(data, split)
        error = _forward(net, images)[:, 0] - labels.astype(np.float64)
        assert row[f'mse_{split}'] == pytest.approx((error**2).mean(), rel=1e-4)
        # Of so many, one may be so close to the bound that rounding decides.
        close = (abs(error) < 0.25).mean()
        assert abs(row[f'close_{split}'] - close) <= 1.01 / len(labels)
    best = min(rows, key=lambda row: row['mse_val'])
    assert best['mse_test'] < bound
  outputs = np.asarray(names['outputs'])
  expected = _forward(names['net'], names['x'][:500])
  np.testing.assert_allclose(outputs, expected, atol=1e-4)


def test_what_the_page_says_of_the_library_is_there():
  page = _PAGE.read_text()
  for name in re.findall(r'training\.(\w+)', page):
    assert hasattr(training, name)
  for name in re.findall(r'\[(\w+\.md)\]', page):
    assert (_PAGE.parent / name).exists()
