"""The harness of faults runs, finds nothing lost, and would find it."""

import json
import shutil
import types

import jax
import numpy as np
import pytest

from benchmarks import faults
from mopt.training import checkpoints
from tests.networks import Tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  path = tmp_path_factory.mktemp('faults') / 'new' / 'faults.json'
  with pytest.MonkeyPatch.context() as patch:
    # Its own test is below, with a network that compiles faster.
    patch.setitem(faults.TRIED, 'NaN', (0, 0))
    # And one for a second process is in tests/resume_test.py.
    patch.setitem(faults.TRIED, 'second process', (0, 0))
    patch.setenv('JAX_NUM_CPU_DEVICES', '1')  # Spread: tests/members_test.py.
    faults.main(['--quick', f'--out={path}'])
  return json.loads(path.read_text())


def test_of_each_fault_nothing_is_lost(result):
  assert result['quick'] is True
  assert all(result[name] for name in ('device', 'date', 'jax', 'mopt'))
  tried = {row['fault']: row['tried'] for row in result['rows']}
  assert tried == {
    'kill -9': 1,
    'SIGTERM, Ctrl-C': 1,
    'mutation': 20,
    'full disk': 1,
  }
  for row in result['rows']:
    assert (row['survived'], row['lost']) == (row['tried'], 0), row
    assert row['how'] == []
    assert row['seconds'] > 0


@pytest.fixture
def trainer(tmp_path, monkeypatch):
  """Of a network that compiles fast, in this process."""
  monkeypatch.setattr(faults.models, 'create', lambda name: Tiny())
  settings = dict(l1=(1e-4, 1e-3), val_size=30, train_size=64, epochs=2)
  jax.config.update('jax_disable_most_optimizations', True)
  yield types.SimpleNamespace(folder=tmp_path, settings=settings)
  jax.config.update('jax_disable_most_optimizations', False)


def test_members_that_meet_nan_are_alone(trainer):
  random = np.random.default_rng(0)
  outcomes = list(faults.train_poisoned(trainer, random, 3))
  assert outcomes == [None] * 3


def _copy_of_another(random, path, other):
  """What Orbax cannot notice."""
  del random
  shutil.rmtree(path / 'default')
  shutil.copytree(other / 'default', path / 'default')
  return 'another'


def test_what_is_lost_is_counted(trainer, monkeypatch):
  config = faults.Config(**trainer.settings)
  data = faults._load(config)
  program = faults.program_lib.make_program(faults.Job(config, Tiny(), data))
  tree = program.layout.collect(program.init())
  folder = trainer.folder / 'whole' / 'checkpoints'
  with checkpoints.Checkpoints(folder, 0) as saved:
    for epoch in (1, 2, 3):
      saved.save(epoch, jax.tree.map(lambda x, e=epoch: x + e, tree), 0.0)
  load = lambda: list(faults.load_mutations(trainer, None, 1))
  monkeypatch.setattr(faults, 'mutate', _copy_of_another)
  assert load() == [None]
  monkeypatch.setattr(checkpoints, '_damage', lambda path: None)
  assert load() == ['another: epoch 3 is another']


def test_a_difference_is_found(tmp_path):
  for name in ('whole', 'other'):
    (tmp_path / name / 'members').mkdir(parents=True)
    for file in ('results.csv', 'metrics.jsonl', 'histograms.jsonl'):
      (tmp_path / name / file).write_text('text')
    (tmp_path / name / 'members' / 'a.npz').write_text('network')
  trainer = object.__new__(faults.Trainer)
  trainer.folder = tmp_path
  trainer.traces = trainer.read('whole')
  assert trainer.difference('other') is None
  (tmp_path / 'other' / 'metrics.jsonl').write_text('texT')
  (tmp_path / 'other' / 'members' / 'b.npz').write_text('network')
  named = 'members/b.npz, metrics.jsonl differ'
  assert trainer.difference('other') == named


@pytest.mark.parametrize('argument', ['--fast', '--seed=x', '3'])
def test_wrong_arguments_are_refused(argument, capsys):
  with pytest.raises(SystemExit) as error:
    faults.parse([argument])
  assert error.value.code == 2
  assert 'error' in capsys.readouterr().err
