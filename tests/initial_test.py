"""Networks that training begins with: files, errors, and where they are put."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import chex
from flax import nnx
import jax
import numpy as np
import pytest

from mopt import training
from mopt.training import Config
from mopt.training import initial
from mopt.training import Job
from mopt.training import load_dataset
from mopt.training import network
from mopt.training.files import fingerprint
from mopt.training.files import read_csv
from mopt.training.network import Network
from mopt.training.program import check_fit
from mopt.training.program import make_program
from mopt.training.records import weight_histogram
from mopt.training.workdir import check_settings
from tests.devices import first_devices
from tests.networks import Normed
from tests.networks import Tiny

_ROOT = pathlib.Path(__file__).parents[1]


class _Lists(nnx.Module):
  """Keys that are numbers."""

  def __init__(self, *, rngs):
    dense = lambda *sizes: nnx.Linear(*sizes, rngs=rngs)
    self.hidden = nnx.List([dense(49, 12), dense(12, 12)])
    self.out = dense(12, 10)

  def __call__(self, images):
    x = images[:, ::4, ::4].reshape(len(images), -1)
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    return self.out(x)


@pytest.fixture(scope='module')
def digits():
  return load_dataset('mnist5k', train_size=96, val_size=40)


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _random(model, data, seed=7):
  """Variables that no initialisation draws: statistics, too, are random."""
  shapes = jax.eval_shape(
    lambda key: model.init(key, data.train.images[:1].astype(np.float32)),
    jax.random.key(0),
  )
  random = np.random.default_rng(seed)
  draw = lambda x: random.uniform(0.5, 1.5, x.shape).astype(x.dtype)
  return jax.tree.map(draw, dict(shapes))


def _entries(tree, prefix=''):
  return {
    prefix + '/'.join(map(str, keys)): leaf
    for keys, leaf in network.leaves(tree)
  }


def _save(path, variables):
  net = Network(variables, 'my:net', 10, (28, 28, 1), 0.0, 255.0)
  network.save(path, net)


def _init(config, model, data):
  devices = first_devices(4)
  check_fit(config, model, data)
  program = make_program(Job(config, model, data, devices=devices))
  return program.layout.collect(program.init())


def _assert_all_equal(tree, expected):
  """Every member, in leaves `[M, ...]`, has the bits of a tree."""
  chex.assert_trees_all_equal_structs(tree, expected)
  for leaf, x in zip(jax.tree.leaves(tree), jax.tree.leaves(expected)):
    assert leaf.dtype == x.dtype
    np.testing.assert_array_equal(leaf, np.broadcast_to(x, leaf.shape))


@pytest.mark.parametrize('form', ['member', 'params/', ''])
@pytest.mark.parametrize('parallel', ['data', 'members'])
def test_every_member_begins_with_it(here, digits, form, parallel):
  """Every seed and every weight, with an optimizer that has seen nothing."""
  variables = _random(Tiny(), digits)
  if form == 'member':
    _save('net.npz', variables)
  else:
    np.savez('net.npz', **_entries(variables['params'], form))
  config = Config(
    l1=(1e-4, 1e-3), seed=(3, 4), init='net.npz', parallel=parallel
  )
  state = _init(config, Tiny(), digits)
  _assert_all_equal(state.params, variables['params'])
  fresh = _init(
    Config(l1=(1e-4, 1e-3), seed=(3, 4), parallel=parallel), Tiny(), digits
  )
  chex.assert_trees_all_equal(state.opt_state, fresh.opt_state)
  # Without a file two seeds begin differently.
  kernel = fresh.params['layer1']['kernel']
  assert (kernel[0] == kernel[1]).all()
  assert (kernel[0] != kernel[2]).any()


def test_statistics_are_those_of_the_file_if_it_has_any(here, digits):
  variables = _random(Normed(), digits)
  config = Config(l1=(1e-3,), seed=(0, 1), init='net.npz')
  entries = _entries(variables['params'])
  np.savez('net.npz', **entries)
  state = _init(config, Normed(), digits)
  _assert_all_equal(state.params, variables['params'])
  norm = state.model_state['batch_stats']['norm1']
  assert (norm['mean'] == 0).all()
  assert (norm['var'] == 1).all()
  others = _entries(variables['batch_stats'], 'batch_stats/')
  for both in (entries, _entries(variables['params'], 'params/')):
    np.savez('net.npz', **both, **others)
    state = _init(config, Normed(), digits)
    _assert_all_equal(state.variables, variables)
  # All of them or none.
  np.savez('net.npz', **entries, **dict([others.popitem()]))
  with pytest.raises(ValueError, match='expected an entry batch_stats/norm1/'):
    check_fit(config, Normed(), digits)


@pytest.mark.parametrize('form', ['member', ''])
def test_a_network_of_nnx_has_lists(here, digits, form):
  model = nnx.bridge.to_linen(_Lists)
  variables = _random(model, digits)
  if form == 'member':
    _save('net.npz', variables)
  else:
    np.savez('net.npz', **_entries(variables['params'], form))
  state = _init(Config(l1=(1e-3,), init='net.npz'), model, digits)
  assert sorted(state.params['hidden']) == [0, 1]
  _assert_all_equal(state.params, variables['params'])


def test_a_file_is_cast_to_the_types_of_the_parameters(here, digits):
  params = _random(Tiny(), digits)['params']
  for dtype in (np.float64, np.float16, '>f4'):
    wide = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
    np.savez('net.npz', **_entries(wide))
    state = _init(Config(l1=(1e-3,), init='net.npz'), Tiny(), digits)
    expected = jax.tree.map(lambda x: x.astype(np.float32), wide)
    _assert_all_equal(state.params, expected)


_SHAPES = {
  'params': {'layer1': {'bias': np.zeros(2), 'kernel': np.zeros((3, 2))}},
  'batch_stats': {'norm': {'mean': np.zeros(())}},
}
_GOOD = {
  'layer1/bias': np.ones(2),
  'layer1/kernel': np.full((3, 2), 2.0),
  'batch_stats/norm/mean': np.float64(3),
}


def _read(path='net.npz'):
  return initial.read(path, _SHAPES, 'my:net')


def _says(message, path='net.npz'):
  with pytest.raises(initial.Misfit) as error:
    _read(path)
  assert str(error.value) == f'init={path}: expected {message}'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'layer1/bias': None},
      'an entry params/layer1/bias of shape (2,), as my:net has it, got none.',
    ),
    (
      {'layer1/bias': None, 'layer1/b': np.ones(2)},
      'an entry params/layer1/bias of shape (2,), as my:net has it, got '
      'layer1/b, which it has not.',
    ),
    (
      {'layer2/bias': np.ones(2)},
      'no entries but the variables of my:net, got layer2/bias, which it has '
      'not.',
    ),
    (
      {'memory/mean': np.ones(2)},
      'no entries but the variables of my:net, got memory/mean, which it has '
      'not.',
    ),
    (
      {'params/layer1/bias': np.ones(2)},
      'no entries but the variables of my:net, got params/layer1/bias, which '
      'it has not.',
    ),
    (
      {'layer1/kernel': np.ones((2, 3))},
      'shape (3, 2) as layer1/kernel, as my:net has it, got (2, 3).',
    ),
    (
      {'batch_stats/norm/mean': np.ones(1)},
      'shape () as batch_stats/norm/mean, as my:net has it, got (1,).',
    ),
    ({'layer1/bias': np.ones(2, int)}, 'floats as layer1/bias, got int64.'),
    ({'layer1/bias': np.ones(2, '>c8')}, 'floats as layer1/bias, got >c8.'),
    # What NumPy makes of bfloat16.
    ({'layer1/bias': np.ones(2, 'V2')}, 'floats as layer1/bias, got |V2.'),
    (
      {'layer1/bias': np.array(['a', 'b'])},
      'floats as layer1/bias, got <U1.',
    ),
    (
      {'layer1/bias': np.array([None, 1.0])},
      'as layer1/bias an array of floats (Object arrays cannot be loaded when '
      'allow_pickle=False).',
    ),
    (
      {'layer1/kernel': np.array([[1, 2], [3, np.nan], [0, 0]])},
      'numbers that are finite in float64 as layer1/kernel, got nan at [1, 1].',
    ),
    (
      {'batch_stats/norm/mean': np.float32(-np.inf)},
      'numbers that are finite in float64 as batch_stats/norm/mean, got -inf '
      'at [].',
    ),
  ],
)
def test_what_does_not_fit_is_named(here, change, message):
  entries = {k: v for k, v in (_GOOD | change).items() if v is not None}
  np.savez('net.npz', **entries)
  _says(message)


def test_what_is_too_large_for_a_parameter_is_not_finite(here):
  shapes = {'params': {'x': np.zeros(2, np.float32)}}
  np.savez('net.npz', x=np.array([1, -1e39]))
  with pytest.raises(
    initial.Misfit, match=r'float32 as x, got -1e\+39 at \[1]'
  ):
    initial.read('net.npz', shapes, 'my:net')


def test_a_parameter_may_have_any_name(here):
  """That of a collection, or of what a member says of itself."""
  variables = {
    'params': {
      'params': {'x': np.ones(1)},
      'x': np.zeros(1),
      'about': -np.ones(1),
    }
  }
  shapes = jax.tree.map(np.zeros_like, variables)
  for prefix in ('', 'params/'):
    np.savez('net.npz', **_entries(variables['params'], prefix))
    found = initial.read('net.npz', shapes, 'my:net')
    chex.assert_trees_all_equal(found, variables)
  _save('net.npz', variables)
  found = initial.read('net.npz', shapes, 'my:net')
  chex.assert_trees_all_equal(found, variables)


def _not_there(path):
  del path


def _array(path):
  with path.open('wb') as file:
    np.save(file, np.ones(3))


def _text(path):
  path.write_text('no archive')


def _empty(path):
  path.touch()


def _folder(path):
  path.mkdir()


@pytest.mark.parametrize(
  ('make', 'reason'),
  [
    (_not_there, 'No such file or directory'),
    (_array, 'it is no archive'),
    (_text, 'it is no archive'),
    (_empty, 'it is no archive'),
    (_folder, 'Is a directory'),
  ],
)
def test_what_is_no_archive_is_one_line(here, make, reason):
  make(here / 'net.npz')
  _says(f'a file .npz with the parameters of a network ({reason}).')


@pytest.mark.parametrize('path', ['', '\0', '~no_such_user/x', 300 * 'x'])
def test_what_is_no_path_is_one_line(here, path):
  with pytest.raises(initial.Misfit, match='^init=.*: expected a file .npz'):
    _read(path)


def test_what_is_no_array_in_an_archive_is_named(here):
  entries = dict(_GOOD)
  del entries['layer1/bias']
  np.savez('net.npz', **entries)
  with zipfile.ZipFile('net.npz', 'a') as archive:
    archive.writestr('layer1/bias', 'hello')
  _says('floats as layer1/bias, got bytes.')


def test_an_array_of_any_size_is_refused(here):
  """It is asked for before the archive turns out to be shorter."""
  np.savez('net.npz', **_GOOD)
  with zipfile.ZipFile('net.npz') as archive:
    files = {name: archive.read(name) for name in archive.namelist()}
  large = files['layer1/kernel.npy'].replace(
    b'(3, 2), }' + 13 * b' ', b'(30000000000000, 2), }'
  )
  assert len(large) == len(files['layer1/kernel.npy'])
  assert large != files['layer1/kernel.npy']
  with zipfile.ZipFile('net.npz', 'w') as archive:
    for name, content in (files | {'layer1/kernel.npy': large}).items():
      archive.writestr(name, content)
  with pytest.raises(initial.Misfit, match='as layer1/kernel an array of fl'):
    _read()


def test_a_file_is_refused_wherever_a_bit_has_flipped(here):
  path = here / 'net.npz'
  np.savez_compressed(path, **_GOOD)
  whole, content = _read(), path.read_bytes()
  with zipfile.ZipFile(path) as archive:
    end = archive.start_dir
  refused = []
  for place in range(0, end, 3):
    damaged = bytearray(content)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    try:
      found = _read()
    except initial.Misfit as error:
      refused.append(str(error))
      continue
    chex.assert_trees_all_equal(found, whole)  # In a date, for example.
  assert len(refused) > end / 6
  assert not [message for message in refused if '\n' in message]


def test_numpy_alone_reads_it(here):
  np.savez('net.npz', **_GOOD)
  script = """
import sys
for name in ('jax', 'jaxlib', 'flax', 'optax'):
  sys.modules[name] = None
import numpy as np
from mopt.training import initial
shapes = {'params': {'layer1': {'bias': np.ones(2), 'kernel': np.ones((3, 2))}},
          'batch_stats': {'norm': {'mean': np.ones(())}}}
print(initial.read('net.npz', shapes, 'x')['params']['layer1']['kernel'].sum())
"""
  result = subprocess.run(
    [sys.executable, '-c', script],
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (result.stdout, result.stderr) == ('12.0\n', '')


_NET = """
from flax import linen as nn


class Net(nn.Module):
  num_classes: int
  dtype: object

  @nn.compact
  def __call__(self, images):
    x = images[:, ::4, ::4].reshape(len(images), -1)
    x = nn.relu(nn.Dense(12, dtype=self.dtype, name='layer1')(x))
    return nn.Dense(self.num_classes, dtype=self.dtype, name='layer2')(x)
"""
_SMALL = ['--train_size=96', '--val_size=40', '--epochs=2']


@pytest.fixture
def net(here, monkeypatch):
  (here / 'net_initial.py').write_text(_NET)
  yield '--model=net_initial:Net'
  sys.modules.pop('net_initial', None)


def _log(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_run_begins_where_another_has_ended(call, here, net):
  args = [net, *_SMALL]
  code, _, err = call(*args, '--l1=1e-4', '--workdir=first')
  assert (code, err) == (0, '')
  member = f'first/{read_csv("first/results.csv")[0]["file"]}'
  args += [f'--init={member}', '--l1=1e-4,1e-3', '--seed=0,1', '--workdir=next']
  code, _, err = call(*args)
  assert (code, err) == (0, '')
  params = training.load(member).params
  start = [
    record
    for record in _log(here / 'next' / 'histograms.jsonl')
    if record['when'] == 'initial'
  ]
  assert len(start) == 8
  for record in start:
    expected = weight_histogram(params[record['layer']]['kernel'])
    assert {k: record[k] for k in expected} == expected
  # The order of examples is another for each seed.
  first = [r for r in _log(here / 'next' / 'metrics.jsonl') if r['epoch'] == 1]
  assert len({record['ce_train'] for record in first}) == 4
  about = json.loads((here / 'next' / 'config.json').read_text())
  assert about['init'] == member

  # It goes on with this file only.
  code, out, err = call(*args, '--resume')
  assert (code, err) == (0, '')
  assert 'finished already' in out
  before = about['environment']['init']
  other = jax.tree.map(lambda x: x + 1, params)
  np.savez(member, **_entries(other))
  code, out, err = call(*args, '--resume')
  assert (code, out) == (2, '')
  after = fingerprint(member)
  assert before != after
  assert err == (
    f'train.py: init={member}: expected the file that next/config.json has '
    f'begun with, with the fingerprint {before}, got {after}; or another '
    'workdir.\n'
  )
  pathlib.Path(member).unlink()
  with pytest.raises(ValueError, match='^init=.*: expected a file that can be'):
    check_settings(
      Config(**{k: _as_tuple(v) for k, v in about.items() if k in _FIELDS}),
      here / 'next',
    )


_FIELDS = Config.__dataclass_fields__


def _as_tuple(value):
  return tuple(value) if isinstance(value, list) else value


def test_a_search_begins_each_training_with_it(call, here, net):
  random = np.random.default_rng(0)
  params = {
    'layer1': {'kernel': random.normal(size=(49, 12)), 'bias': np.zeros(12)},
    'layer2': {'kernel': random.normal(size=(12, 10)), 'bias': np.zeros(10)},
  }
  np.savez('net.npz', **_entries(params))
  args = [net, *_SMALL, '--init=net.npz', '--search=grid', '--max_runs=3']
  code, _, err = call(*args, '--search_epochs=1', '--workdir=search')
  assert (code, err) == (0, '')
  logs = sorted((here / 'search').glob('*/histograms.jsonl'))
  assert logs[-1].parent.name == 'level_1'
  for log in logs:
    start = [record for record in _log(log) if record['when'] == 'initial']
    for record in start:
      kernel = params[record['layer']]['kernel'].astype(np.float32)
      expected = weight_histogram(kernel)
      assert {k: record[k] for k in expected} == expected
  np.savez('net.npz', **_entries(jax.tree.map(lambda x: 2 * x, params)))
  code, out, err = call(
    *args, '--search_epochs=1', '--workdir=search', '--resume'
  )
  assert (code, out) == (2, '')
  assert err.startswith('train.py: init=net.npz: expected the file that search')


@pytest.mark.parametrize(
  ('entries', 'named'),
  [
    ({}, 'an entry params/layer1/bias of shape (12,), as net_initial:Net'),
    (None, 'a file .npz with the parameters of a network (No such file'),
  ],
)
def test_a_file_that_does_not_fit_is_one_line_and_exit_2(
  call, here, net, entries, named
):
  if entries is not None:
    np.savez('net.npz', **entries)
  before = {*here.iterdir(), here / '__pycache__'}
  code, out, err = call(net, *_SMALL, '--init=net.npz')
  assert (code, out) == (2, '')
  assert err.startswith(f'train.py: init=net.npz: expected {named}')
  assert err.count('\n') == 1
  assert before >= set(here.iterdir())
