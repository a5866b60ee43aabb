"""Files of a run: networks that load without pickle, tables, the front."""

import json
import zipfile

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from mopt.training import load
from mopt.training import Network
from mopt.training import results
from mopt.training.plots import plot_front

_COLUMNS = [
  'l1',
  'seed',
  'ce_train',
  'ce_val',
  'ce_test',
  'l1_norm',
  'nonzeros',
  'nonzeros_layer1',
  'nonzeros_layer2',
  'acc_train',
  'acc_val',
  'acc_test',
]


def _row(l1, nonzeros, accuracy, seed=0):
  values = (l1, seed, 0.1, 0.2, 0.3, 9.0, nonzeros, nonzeros, nonzeros)
  return dict(zip(_COLUMNS, (*values, accuracy, accuracy, accuracy)))


def _network():
  kernel = np.array([[0.0, -0.5], [1e-3, 0.0]], np.float32)
  params = {
    'layer1': {'kernel': kernel, 'bias': np.ones(2, np.float32)},
    'outer': {'inner': {'kernel': kernel.T}},
  }
  return Network({'params': params}, 'lenet5', 10, (28, 28, 1), 0.0, 255.0)


def test_a_network_comes_back_as_it_was(tmp_path):
  path = tmp_path / 'net.npz'
  results.save(path, _network())
  loaded = load(path)
  chex.assert_trees_all_equal(loaded.params, _network().params)
  assert loaded._replace(variables={}) == _network()._replace(variables={})
  assert [p.name for p in tmp_path.iterdir()] == ['net.npz']


def test_preprocess_scales_and_checks_the_shape():
  images = np.full((2, 28, 28, 1), 51, np.uint8)
  np.testing.assert_allclose(_network().preprocess(images), 0.2, rtol=1e-6)
  with pytest.raises(ValueError, match=r'\[batch, 28, 28, 1\], got .*\(2, 32'):
    _network().preprocess(np.zeros((2, 32, 32, 3), np.uint8))


class _Evil:
  """What runs code when it is unpickled."""

  def __reduce__(self):
    return exec, ('raise SystemExit("unpickled")',)


def test_a_pickle_inside_is_refused_and_not_run(tmp_path):
  path = tmp_path / 'evil.npz'
  results.save(path, _network())
  about = np.array(json.dumps({}))
  np.savez(path, about=about, **{'params/x': np.array([_Evil()], object)})
  with pytest.raises(ValueError, match=r'evil.npz: expected a network'):
    load(path)


@pytest.mark.parametrize(
  'damage', ['flip', 'truncate', 'empty', 'text', 'keys', 'dtype', 'about']
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage):
  path = tmp_path / 'net.npz'
  results.save(path, _network())
  content = bytearray(path.read_bytes())
  if damage == 'flip':
    with zipfile.ZipFile(path) as archive:
      entry = archive.getinfo('params/layer1/kernel.npy')
    content[entry.header_offset + 80] ^= 1
    path.write_bytes(content)
  elif damage == 'truncate':
    path.write_bytes(content[: len(content) // 2])
  elif damage in ('empty', 'text'):
    path.write_bytes(b'' if damage == 'empty' else b'hello')
  elif damage == 'keys':
    np.savez(path, about=np.array('{}'), weights=np.ones(3))
  elif damage == 'dtype':
    np.savez(path, about=np.array('{}'), **{'params/x': np.array(['text'])})
  else:
    np.savez(path, about=np.array('[1, 2]'), **{'params/x': np.ones(3)})
  with pytest.raises(ValueError, match=r'net.npz: expected a network'):
    load(path)


def test_a_missing_network_is_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError):
    load(tmp_path / 'none.npz')


def test_front_and_knee_leave_collapsed_members_out():
  rows = [
    _row(1e-5, 40_000, 0.990),
    _row(1e-4, 6_000, 0.989),
    _row(3e-4, 2_000, 0.985),
    _row(1e-3, 1_900, 0.900),
    _row(1e-2, 0, 0.1),
    _row(2e-4, 7_000, 0.980),
  ]
  results.mark_front(rows, 'val')
  assert [row['pareto'] for row in rows] == [1, 1, 1, 1, 0, 0]
  assert [row['knee'] for row in rows] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_diverged_member_counts_as_collapsed(bad):
  row = _row(1e-4, 6_000, 0.9) | {'ce_train': bad}
  assert results.is_collapsed(row)
  rows = [row, _row(1e-5, 7_000, 0.8)]
  results.mark_front(rows, 'val')
  assert [row['pareto'] for row in rows] == [0, 1]


def test_one_empty_layer_is_a_collapse():
  row = _row(1e-4, 6_000, 0.9)
  assert not results.is_collapsed(row)
  assert results.is_collapsed(row | {'nonzeros_layer2': 0})


def test_a_front_without_members_has_no_knee():
  rows = [_row(1.0, 0, 0.1)]
  results.mark_front(rows, 'val')
  assert (rows[0]['pareto'], rows[0]['knee']) == (0, 0)


def test_csv_keeps_full_precision_and_empty_cells(tmp_path):
  row = _row(None, 5, 1 / 3) | {'ce_val': float('nan')}
  results.write_csv(tmp_path / 'results.csv', [row, _row(3e-4, 7, 0.5)])
  text = (tmp_path / 'results.csv').read_text().splitlines()
  assert text[0] == ','.join(_COLUMNS)
  first, second = results.read_csv(tmp_path / 'results.csv')
  assert first['l1'] is None
  assert first['ce_val'] is None
  assert first['acc_test'] == 1 / 3
  assert second == _row(3e-4, 7, 0.5)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  results.write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    results.write_json(path, {'a': object()})

  def full_disk(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez_compressed', full_disk)
  with pytest.raises(OSError, match='No space left'):
    results.save(path, _network())
  assert json.loads(path.read_text()) == {'a': 1}
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_jsonl_lines_are_strict_json(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  results.append_jsonl(path, [{'a': 1, 'b': float('nan')}])
  results.append_jsonl(path, [{'a': 2, 'b': float('inf')}, {'a': 3, 'b': 0.5}])
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == [{'a': 1, 'b': None}, {'a': 2, 'b': None}, {'a': 3, 'b': 0.5}]


@pytest.mark.parametrize(
  'rows',
  [
    [_row(1e-5, 40_000, 0.99), _row(3e-4, 2_000, 0.98), _row(1e-2, 0, 0.1)],
    [_row(None, 50_000, 0.99)],
    [_row(0.0, 50_000, 0.99), _row(1e-4, 6_000, 0.98)],
    [_row(1e-2, 0, 0.1)],
  ],
)
def test_every_front_can_be_drawn(tmp_path, rows):
  results.mark_front(rows, 'val')
  plot_front(tmp_path / 'front.png', rows, 'title')
  assert (tmp_path / 'front.png').read_bytes()[:4] == b'\x89PNG'


def test_networks_are_small_on_disk(tmp_path):
  kernel = np.zeros((400, 120), np.float32)
  kernel[::50, ::10] = 0.5
  net = _network()._replace(
    variables={'params': {'layer1': {'kernel': jnp.asarray(kernel)}}}
  )
  results.save(tmp_path / 'net.npz', net)
  assert (tmp_path / 'net.npz').stat().st_size < kernel.nbytes / 50
