"""Files of a run: networks that load without pickle, tables, the front."""

import csv
import io
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import chex
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import models
from mopt import NonzeroCount
from mopt.masks import path_name
from mopt.training import Config
from mopt.training import Dataset
from mopt.training import files
from mopt.training import Job
from mopt.training import load
from mopt.training import Network
from mopt.training import network
from mopt.training import records
from mopt.training import single_run
from mopt.training.data import Split
from mopt.training.evaluation import Evaluation
from mopt.training.layout import make_layout
from mopt.training.loop import _train
from mopt.training.plots import plot_front
from mopt.training.plots import plot_search
from mopt.training.population import make_population
from mopt.training.population import Member
from mopt.training.program import Complexity
from mopt.training.program import Program
from mopt.training.step import Failure
from mopt.training.step import Metrics
from mopt.training.step import State
from tests.networks import Dropping

_COLUMNS = [
  'seed',
  'weight_error',
  'weight_l1',
  'ce_train',
  'ce_val',
  'ce_test',
  'l1',
  'nonzeros',
  'nonzeros_layer1',
  'nonzeros_layer2',
  'accuracy_train',
  'accuracy_val',
  'accuracy_test',
]


def _row(l1, nonzeros, accuracy, seed=0):
  values = (seed, None if l1 is None else 1.0, l1, 0.1, 0.2, 0.3, 9.0)
  counts = (nonzeros, nonzeros, nonzeros)
  scores = (accuracy, accuracy, accuracy)
  return dict(zip(_COLUMNS, (*values, *counts, *scores), strict=True))


def _network():
  kernel = np.array([[0.0, -0.5], [1e-3, 0.0]], np.float32)
  params = {
    'layer1': {'kernel': kernel, 'bias': np.ones(2, np.float32)},
    'outer': {'inner': {'kernel': kernel.T}},
  }
  return Network({'params': params}, 'lenet5', 10, (28, 28, 1), 0.0, 255.0)


def _normed():
  """A network with running statistics, as VGG has them."""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  variables = {
    'params': {
      'conv1': {'kernel': draw(3, 3, 3, 4), 'bias': draw(4)},
      'norm1': {'scale': draw(4), 'bias': draw(4)},
    },
    'batch_stats': {'norm1': {'mean': draw(4), 'var': draw(4)}},
  }
  return Network(variables, 'vgg', 10, (32, 32, 3), 120.7, 64.2)


def test_a_network_comes_back_as_it_was(tmp_path):
  path = tmp_path / 'net.npz'
  network.save(path, _network())
  loaded = load(path)
  chex.assert_trees_all_equal(loaded.params, _network().params)
  assert loaded._replace(variables={}) == _network()._replace(variables={})
  assert [p.name for p in tmp_path.iterdir()] == ['net.npz']


def test_names_of_classes_come_back_and_may_be_missing(tmp_path):
  path = tmp_path / 'net.npz'
  named = _network()._replace(class_names=('cat', 'dög'))
  network.save(path, named)
  assert load(path).class_names == ('cat', 'dög')
  # As it was written before there were any.
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files if name != 'about'}
    about = json.loads(str(file['about']))
  del about['class_names']
  np.savez(path, about=np.array(json.dumps(about)), **arrays)
  assert load(path).class_names == ()


def test_preprocess_scales_and_checks_the_shape():
  images = np.full((2, 28, 28, 1), 51, np.uint8)
  np.testing.assert_allclose(_network().preprocess(images), 0.2, rtol=1e-6)
  with pytest.raises(ValueError, match=r'\[batch, 28, 28, 1\], got .*\(2, 32'):
    _network().preprocess(np.zeros((2, 32, 32, 3), np.uint8))


def test_numpy_alone_reads_a_network_and_prepares_pictures(tmp_path):
  script = """
import sys
for name in ('jax', 'jaxlib', 'flax', 'optax'):
  sys.modules[name] = None
import numpy as np
from mopt import training
from mopt.training import network

net = training.load('net.npz')
network.save('again.npz', net)
inputs = net.preprocess(np.load('images.npy'))
assert type(inputs) is np.ndarray
np.save('inputs.npy', inputs)
np.save('thirds.npy', training.normalise(np.uint8([6]), mean=5.0, std=3.0))
"""
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (7, 32, 32, 3), np.uint8)
  np.save(tmp_path / 'images.npy', images)
  network.save(tmp_path / 'net.npz', _normed())
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[1])},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert not result.returncode, result.stderr
  bytes_of = lambda name: (tmp_path / f'{name}.npz').read_bytes()
  assert bytes_of('again') == bytes_of('net')
  inputs = np.load(tmp_path / 'inputs.npy')
  assert inputs.dtype == np.float32
  np.testing.assert_array_equal(inputs, _normed().preprocess(images))
  # As JAX computes it.
  compiled = jax.jit(lambda x: (x.astype(jnp.float32) - 120.7) * (1 / 64.2))
  np.testing.assert_array_equal(inputs, compiled(images))
  third = np.load(tmp_path / 'thirds.npy')
  np.testing.assert_array_equal(third, np.float32([1 / 3]))


def test_entries_are_named_and_sorted_as_jax_does(tmp_path):
  layers = {2: np.ones(1), 10: np.ones(2), 1: np.ones(3)}
  deep = FrozenDict({'b': layers, 'a': {'x/y': np.ones(4)}, 'none': {}})
  net = _network()._replace(variables={'state': {}, 'params': deep})
  network.save(tmp_path / 'net.npz', net)
  leaves = jax.tree_util.tree_leaves_with_path(net.variables)
  with np.load(tmp_path / 'net.npz') as file:
    assert file.files == ['about', *(path_name(path) for path, _ in leaves)]
  found = load(tmp_path / 'net.npz').params
  assert found['b'].keys() == layers.keys()
  assert found['a']['x/y'].shape == (4,)


class _Evil:
  """What runs code when it is unpickled."""

  def __reduce__(self):
    return exec, ('raise SystemExit("unpickled")',)


def test_a_pickle_inside_is_refused_and_not_run(tmp_path):
  path = tmp_path / 'evil.npz'
  network.save(path, _network())
  about = np.array(json.dumps({}))
  np.savez(path, about=about, **{'params/x': np.array([_Evil()], object)})
  with pytest.raises(ValueError, match=r'evil.npz: expected a network'):
    load(path)


@pytest.mark.parametrize(
  'damage',
  ['flip', 'truncate', 'empty', 'text', 'keys', 'dtype', 'about', 'lost'],
)
def test_a_damaged_or_foreign_file_is_refused(tmp_path, damage):
  path = tmp_path / 'net.npz'
  network.save(path, _network())
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
  elif damage == 'lost':
    with np.load(path) as file:
      arrays = dict(file)
    del arrays['params/layer1/kernel']
    np.savez(path, **arrays)
  else:
    np.savez(path, about=np.array('[1, 2]'), **{'params/x': np.ones(3)})
  with pytest.raises(ValueError, match=r'net.npz: expected a network'):
    load(path)


def test_a_file_is_refused_wherever_a_bit_has_flipped(tmp_path):
  path = tmp_path / 'net.npz'
  network.save(path, _normed())
  content = path.read_bytes()
  # What follows are names and sizes once more.
  with zipfile.ZipFile(path) as archive:
    end = archive.start_dir
  others = set()
  for place in range(0, end, 3):
    damaged = bytearray(content)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    try:
      loaded = load(path)
    except ValueError:
      continue
    except Exception as error:
      others.add(f'{type(error).__name__}: {error}')
      continue
    # In a date, for example.
    chex.assert_trees_all_equal(loaded.variables, _normed().variables)
  assert not others


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
  records.mark_front(rows, 'val')
  assert [row['pareto'] for row in rows] == [1, 1, 1, 1, 0, 0]
  assert [row['knee'] for row in rows] == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_diverged_member_counts_as_collapsed(bad):
  row = _row(1e-4, 6_000, 0.9) | {'ce_train': bad}
  assert records.is_collapsed(row)
  rows = [row, _row(1e-5, 7_000, 0.8)]
  records.mark_front(rows, 'val')
  assert [row['pareto'] for row in rows] == [0, 1]


def test_one_empty_layer_is_a_collapse():
  row = _row(1e-4, 6_000, 0.9)
  assert not records.is_collapsed(row)
  assert records.is_collapsed(row | {'nonzeros_layer2': 0})
  # Biases and convolutions are not a layer.
  assert not records.is_collapsed(row | {'nonzeros_all': 0})


def test_an_objective_that_is_not_finite_is_a_collapse():
  row = _row(1e-4, 6_000, 0.9)
  for name in ('l1', 'ce_train'):
    assert records.is_collapsed(row | {name: math.inf})
  row |= {'weight_group': 1e-3, 'group': 5.0}
  assert not records.is_collapsed(row)
  assert records.is_collapsed(row | {'group': math.nan})


def test_a_front_without_members_has_no_knee():
  rows = [_row(1.0, 0, 0.1)]
  records.mark_front(rows, 'val')
  assert (rows[0]['pareto'], rows[0]['knee']) == (0, 0)


def test_columns_speak_the_names_of_any_number_of_objectives():
  names = ('error', 'l1', 'group')
  members = [Member(3, (1.0, 3e-4, 1e-4)), Member(4, None)]
  table = lambda start: start + np.arange(6, dtype=np.float32).reshape(2, 3)
  metrics = Metrics(
    values=table(0),
    grad_norms=table(10),
    cosines=table(20),
    weights=table(30) / 100,
    weights_min=table(40) / 100,
    weights_max=table(50) / 100,
    loss=np.array([0.5, 0.25]),
    score=np.array([0.75, 0.5]),
  )
  known = Evaluation(np.array([0.1, 0.2]), np.array([0.9, 0.8]))
  per_leaf = {'all/kernel': np.array([4, 5]), 'a/b/kernel': np.array([6, 7])}
  counts = Complexity(
    NonzeroCount(np.array([10, 12]), per_leaf),
    {'l1': np.array([2.0, 3.0]), 'group': np.array([4.0, 5.0])},
    params=np.array([100, 100]),
    nonzeros_all=np.array([50, 60]),
  )
  head = {'epoch': 7}
  fixed, found = records.epoch_records(
    names, members, head, metrics, known, counts
  )
  common = {
    **{'epoch': 7, 'seed': 4},
    **{'error': 3, 'l1': 4, 'group': 5},
    **{'grad_norm_error': 13, 'grad_norm_l1': 14, 'grad_norm_group': 15},
    **{'cosine_error_l1': 23, 'cosine_error_group': 24, 'cosine_l1_group': 25},
    **{'ce_train': 0.25, 'accuracy_train': 0.5},
    **{'ce_val': 0.2, 'accuracy_val': 0.8},
    # The column nonzeros_all is not that of a layer.
    **{'nonzeros': 12, 'nonzeros_all_kernel': 5, 'nonzeros_a_b': 7},
  }
  weights = {
    f'weight_{name}{suffix}': float(np.float32(start + index) / 100)
    for suffix, start in (('', 33), ('_min', 43), ('_max', 53))
    for index, name in enumerate(names)
  }
  assert found.keys() == fixed.keys()
  assert found == common | {k: pytest.approx(v) for k, v in weights.items()}
  # As they were given, not as float32 has them.
  for name, weight in zip(names, (1.0, 3e-4, 1e-4)):
    for suffix in ('', '_min', '_max'):
      assert fixed[f'weight_{name}{suffix}'] == weight
  failure = Failure(*np.array([[0, 3], [0, 1], [0, 5]]))
  scores = dict.fromkeys(('train', 'val', 'test'), known)
  ok, failed = records.result_rows(
    names,
    members,
    scores,
    counts,
    failure,
    layers=['nonzeros_a_b'],
    chance=0.1,
  )
  assert ok == {
    **{'seed': 3, 'weight_error': 1.0, 'weight_l1': 3e-4},
    **{'weight_group': 1e-4, 'l1': 2.0, 'group': 4.0},
    **{'ce_train': 0.1, 'ce_val': 0.1, 'ce_test': 0.1},
    **{'nonzeros': 10, 'nonzeros_all_kernel': 4, 'nonzeros_a_b': 6},
    **{'params': 100, 'nonzeros_all': 50},
    **{'accuracy_train': 0.9, 'accuracy_val': 0.9, 'accuracy_test': 0.9},
    **{'status': 'ok'},
  }
  assert failed['weight_group'] is None
  assert failed['status'] == (
    "objective 'group' or its gradient is not finite in epoch 2 step 6"
  )


def test_csv_keeps_full_precision_and_empty_cells(tmp_path):
  row = _row(None, 5, 1 / 3) | {'ce_val': float('nan')}
  files.write_csv(tmp_path / 'results.csv', [row, _row(3e-4, 7, 0.5)])
  text = (tmp_path / 'results.csv').read_text().splitlines()
  assert text[0] == ','.join(_COLUMNS)
  first, second = files.read_csv(tmp_path / 'results.csv')
  assert first['weight_l1'] is None
  assert first['ce_val'] is None
  assert first['accuracy_test'] == 1 / 3
  assert second == _row(3e-4, 7, 0.5)


def test_csv_quotes_what_needs_it(tmp_path):
  row = {'a,b': 'x, "y"', 'line': 'one\ntwo', 'number': 1e-05}
  files.write_csv(tmp_path / 'table.csv', [row])
  assert files.read_csv(tmp_path / 'table.csv') == [row]
  with (tmp_path / 'table.csv').open(newline='') as file:
    assert list(csv.reader(file))[1] == ['x, "y"', 'one\ntwo', '1e-05']


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'config.json'
  files.write_json(path, {'a': 1})
  with pytest.raises(TypeError):
    files.write_json(path, {'a': object()})

  def full_disk(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez_compressed', full_disk)
  with pytest.raises(OSError, match='No space left'):
    network.save(path, _network())
  assert json.loads(path.read_text()) == {'a': 1}
  assert [p.name for p in tmp_path.iterdir()] == ['config.json']


def test_jsonl_lines_are_strict_json(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  files.append_jsonl(path, [{'a': 1, 'b': float('nan')}])
  files.append_jsonl(path, [{'a': 2, 'b': float('inf')}, {'a': 3, 'b': 0.5}])
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == [{'a': 1, 'b': None}, {'a': 2, 'b': None}, {'a': 3, 'b': 0.5}]


_COLLAPSED = _row(1e-2, 0, 0.1) | {'status': 'collapsed'}


@pytest.mark.parametrize(
  'rows',
  [
    [_row(1e-5, 40_000, 0.99), _row(3e-4, 2_000, 0.98), _COLLAPSED],
    [_row(None, 50_000, 0.99)],
    [_row(0.0, 50_000, 0.99), _row(1e-4, 6_000, 0.98)],
    [_COLLAPSED],
  ],
)
def test_every_front_can_be_drawn(tmp_path, rows):
  records.mark_front(rows, 'val')
  plot_front(tmp_path / 'front.png', rows, 'title')
  assert (tmp_path / 'front.png').read_bytes()[:4] == b'\x89PNG'


def test_a_member_that_has_failed_is_not_drawn(tmp_path):
  pictures = []
  for status, nonzeros in (('ok', 9), ('failed', 9), ('failed', 30_000)):
    rows = [_row(1e-5, 40_000, 0.99), _row(3e-4, 2_000, 0.98)]
    rows.append(_row(1e-3, nonzeros, 0.5) | {'status': status})
    records.mark_front(rows, 'val')
    plot_front(tmp_path / 'front.png', rows, 'title')
    pictures.append((tmp_path / 'front.png').read_bytes())
  assert pictures[0] != pictures[1] == pictures[2]


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('spread', [0.0, 0.01])
def test_seeds_and_retrained_networks_can_be_drawn(tmp_path, split, spread):
  rows = [
    _row(l1, nonzeros + seed, accuracy - seed * spread, seed)
    for l1, nonzeros, accuracy in (
      (1e-5, 40_000, 0.99),
      (3e-4, 2_000, 0.98),
      (1e-2, 100, 0.5),
    )
    for seed in range(3)
  ]
  records.mark_front(rows, 'val')
  retrained = [_row(3e-4, 1_800, 0.985, seed) for seed in (0, 1)]
  plot_front(tmp_path / 'alone.png', rows, 'title', split)
  plot_front(tmp_path / 'front.png', rows, 'title', split, retrained)
  pictures = [
    (tmp_path / name).read_bytes() for name in ('alone.png', 'front.png')
  ]
  assert all(picture[:4] == b'\x89PNG' for picture in pictures)
  assert pictures[0] != pictures[1]


def test_a_network_that_collapses_when_retrained_can_be_drawn(tmp_path):
  rows = [_row(1e-5, 40_000, 0.99), _row(3e-4, 2_000, 0.98)]
  records.mark_front(rows, 'val')
  retrained = [_row(3e-4, 0, 0.1)]
  plot_front(tmp_path / 'front.png', rows, 'title', 'val', retrained)
  assert (tmp_path / 'front.png').read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize(
  'hypervolumes', [[0.0, 0.3, 0.3, 0.7], [0.5], [0.0, 0.0]]
)
def test_every_search_can_be_drawn(tmp_path, hypervolumes):
  plot_search(tmp_path / 'search.png', hypervolumes, 'title')
  assert (tmp_path / 'search.png').read_bytes()[:4] == b'\x89PNG'


def test_running_statistics_come_back(tmp_path):
  network.save(tmp_path / 'net.npz', _normed())
  loaded = load(tmp_path / 'net.npz')
  chex.assert_trees_all_equal(loaded.variables, _normed().variables)
  assert loaded.params is loaded.variables['params']
  assert loaded._replace(variables={}) == _normed()._replace(variables={})


def test_a_network_without_statistics_has_none(tmp_path):
  network.save(tmp_path / 'net.npz', _network())
  assert set(load(tmp_path / 'net.npz').variables) == {'params'}


def test_a_vgg_that_is_read_answers_as_before(tmp_path):
  """Compiles VGG twice, to start and to answer: 4 s."""
  model = models.create('vgg')
  images = np.zeros((1, 8, 8, 3), np.uint8)
  variables = jax.jit(
    model.init, compiler_options={'xla_backend_optimization_level': 0}
  )(jax.random.key(0), np.zeros(images.shape, np.float32))
  net = Network(dict(variables), 'vgg', 10, (8, 8, 3), 120.0, 64.0)
  network.save(tmp_path / 'net.npz', net)
  loaded = load(tmp_path / 'net.npz')
  chex.assert_trees_all_equal(loaded.variables, dict(variables))
  apply = jax.jit(
    models.create(loaded.model, loaded.num_classes).apply,
    compiler_options={'xla_backend_optimization_level': 0},
  )
  np.testing.assert_array_equal(
    apply(loaded.variables, loaded.preprocess(images)),
    apply(variables, net.preprocess(images)),
  )


@pytest.mark.parametrize(
  'entry',
  [
    {'opt_state/mu': np.ones(3)},
    {'params': np.ones(3)},
    {'batch_stats': np.ones(3)},
    {'weights': np.ones(3)},
    {'params/count': np.ones(3, np.int32)},
    {'batch_stats/norm1/mean/extra': np.ones(3)},
  ],
)
def test_an_unexpected_entry_is_refused(tmp_path, entry):
  path = tmp_path / 'net.npz'
  network.save(path, _normed())
  with np.load(path) as file:
    arrays = dict(file)
  np.savez(path, **arrays)
  load(path)
  np.savez(path, **arrays, **entry)
  with pytest.raises(ValueError, match=r'net.npz: expected a network'):
    load(path)


def test_a_histogram_by_hand():
  weights = np.array([[-1, 0, 0.5], [1, -0.0, 0.25]], np.float32)
  assert records.weight_histogram(weights, bins=4) == {
    'low': -1.0,
    'high': 1.0,
    # From -1, -.5, 0, .5; the last bin holds its upper end.
    'counts': [1, 0, 1, 2],
    'zeros': 2,
  }


@settings(deadline=None)
@given(
  hypothesis.extra.numpy.arrays(
    np.float32,
    hypothesis.extra.numpy.array_shapes(max_dims=2, max_side=20),
    elements=st.floats(-(2**40), 2**40, width=32),
  )
)
def test_a_histogram_counts_every_weight(weights):
  found = records.weight_histogram(weights)
  assert len(found['counts']) == 100
  assert sum(found['counts']) + found['zeros'] == weights.size
  assert found['zeros'] == weights.size - np.count_nonzero(weights)
  rest = weights[weights != 0]
  if rest.size:
    assert (found['low'], found['high']) == (rest.min(), rest.max())
  # It becomes a line of strict JSON.
  assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
  'weights', [[1e30], [-3e38, 3e38], [0, 1e30, float('nan')]]
)
def test_a_histogram_of_a_diverged_layer(weights):
  found = records.weight_histogram(np.array(weights, np.float32))
  finite = sum(bool(np.isfinite(w) and w != 0) for w in weights)
  assert sum(found['counts']) == finite


@pytest.mark.parametrize('n', [0, 7])
def test_a_histogram_of_nothing_but_zeros(n):
  found = records.weight_histogram(np.zeros(n, np.float32))
  assert found == {'low': 0.0, 'high': 0.0, 'counts': [0] * 100, 'zeros': n}


def test_a_histogram_leaves_out_what_is_not_finite():
  weights = np.array([np.nan, 2, np.inf, 0, -np.inf, 3], np.float32)
  found = records.weight_histogram(weights, bins=2)
  assert found == {'low': 2.0, 'high': 3.0, 'counts': [1, 1], 'zeros': 1}
  found = records.weight_histogram(np.full(3, np.nan, np.float32), bins=2)
  assert found == {'low': 0.0, 'high': 0.0, 'counts': [0, 0], 'zeros': 0}


def test_histograms_are_logged_every_fifth_epoch_but_not_twice(tmp_path):
  """The loop of a run of 10 epochs, around a stand-in for what is trained."""
  kernel = np.array([[0.5, 1e-4], [-0.25, 2.0]], np.float32)
  params = {
    'layer1': {'kernel': np.stack([[[kernel, 2 * kernel]]])},
    'conv1': {'kernel': np.ones((1, 1, 2, 3, 3, 1, 2), np.float32)},
  }
  pruned = {**params, 'layer1': {'kernel': params['layer1']['kernel'].round(2)}}
  nothing, pairs = np.zeros(2), np.zeros((2, 2))
  metrics = Metrics(
    *(pairs, pairs, np.zeros((2, 1)), pairs, pairs, pairs), nothing, nothing
  )
  counts = Complexity(
    NonzeroCount(nothing, {}, np.array([4, 4])), {}, nothing, nothing
  )
  config = Config(
    epochs=10,
    l1=(1e-4, 1e-3),
    seed=(7,),
    batch_size=1,
    parallel='data',
    checkpoint_every=10,
  )
  failure = Failure(*[np.zeros((1, 1, 2), np.int32)] * 3)
  program = Program(
    layout=make_layout(config, jax.devices()[:1]),
    init=lambda: State(params, {}, (), failure),
    prune=lambda state: state._replace(params=pruned),
    epoch=lambda state, number: (state, metrics),
    evaluate=lambda state, split: Evaluation(nothing, nothing),
    complexity=lambda state: counts,
    restore=None,
  )
  split = Split(np.zeros((1, 28, 28, 1), np.uint8), np.zeros(1, np.int32))
  data = Dataset('none', 10, split, split, split, 0.0, 255.0)
  members = make_population(config)
  console = rich.console.Console(file=io.StringIO())
  job = Job(config, Dropping(0.0), data, tmp_path, console=console)
  _train(job, program, members)
  lines = (tmp_path / 'histograms.jsonl').read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  # A line for each dense layer of each member.
  whens = [(0, 'initial'), (0, 'pruned'), (5, 'epoch'), (10, 'final')]
  assert [(r['epoch'], r['when'], r['weight_l1']) for r in logged] == [
    (epoch, when, l1) for epoch, when in whens for l1 in (1e-4, 1e-3)
  ]
  assert {(r['layer'], r['seed']) for r in logged} == {('layer1', 7)}
  assert [r['zeros'] for r in logged] == [0, 0, 1, 1, 1, 1, 1, 1]
  assert [r['high'] for r in logged] == [2.0, 4.0] * 4
  assert [sum(r['counts']) for r in logged] == [4, 4, 3, 3, 3, 3, 3, 3]


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_the_commit_of_a_checkout_is_known(tmp_path, monkeypatch):
  for name in [name for name in os.environ if name.startswith('GIT_')]:
    monkeypatch.delenv(name)
  # Settings of the user, such as hooks or signatures, are none of ours.
  monkeypatch.setenv('GIT_CONFIG_GLOBAL', os.devnull)
  monkeypatch.setenv('GIT_CONFIG_SYSTEM', os.devnull)
  monkeypatch.setattr(single_run, '__file__', str(tmp_path / 'code.py'))
  assert single_run._commit() is None

  def git(*args):
    who = ['-c', 'user.name=a', '-c', 'user.email=b']
    command = ['git', '-C', str(tmp_path), *who, *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()

  git('init')
  (tmp_path / 'code.py').write_text('x = 1')
  git('add', 'code.py')
  git('commit', '--message=first')
  head = git('rev-parse', 'HEAD')
  assert len(head) == 40
  assert single_run._commit() == head
  # What is not tracked is not part of it, such as runs/.
  (tmp_path / 'new.txt').write_text('text')
  assert single_run._commit() == head
  (tmp_path / 'code.py').write_text('x = 2')
  assert single_run._commit() == head + '+'

  def no_git(*args, **kwargs):
    raise FileNotFoundError('git')

  monkeypatch.setattr(subprocess, 'run', no_git)
  assert single_run._commit() is None


def test_networks_are_small_on_disk(tmp_path):
  kernel = np.zeros((400, 120), np.float32)
  kernel[::50, ::10] = 0.5
  net = _network()._replace(
    variables={'params': {'layer1': {'kernel': jnp.asarray(kernel)}}}
  )
  network.save(tmp_path / 'net.npz', net)
  assert (tmp_path / 'net.npz').stat().st_size < kernel.nbytes / 50
