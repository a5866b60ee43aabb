"""Runs that stop and go on as if they never had, and members that fail.

The first test with a program compiles it, for up to 10 s, for all that follow.
"""

import contextlib
import csv
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import faults
import mopt
from mopt.training import Config
from mopt.training import files
from mopt.training import Job
from mopt.training import load
from mopt.training import load_dataset
from mopt.training import loop
from mopt.training import program as program_lib
from mopt.training import records
from mopt.training import run
from mopt.training import step as step_lib
from mopt.training.checkpoints import Damaged
from mopt.training.data import Split
from mopt.training.evaluation import Evaluation
from mopt.training.loop import Interrupted
from mopt.training.population import make_population
from mopt.training.population import Member
from tests.devices import first_devices
from tests.networks import Normed
from tests.networks import Tiny

_EPOCHS = 6
_STEPS = 3
_TRACES = ('results.csv', 'metrics.jsonl', 'histograms.jsonl')


@pytest.fixture(scope='module')
def digits():
  """96 real digits of all classes, 3 batches; others to evaluate on."""
  data = load_dataset('mnist5k')

  def take(split, n):
    chosen = np.linspace(0, len(split.labels) - 1, n).astype(int)
    return Split(split.images[chosen], split.labels[chosen])

  return data._replace(
    train=take(data.train, 32 * _STEPS),
    val=take(data.val, 40),
    test=take(data.test, 50),
  )


@pytest.fixture(scope='module', autouse=True)
def programs():
  """Makes each program once, though every run asks for its own.

  What is kept between runs has no state but functions.
  """
  make = program_lib.make_program
  kept = {}

  def make_once(job):
    config = dataclasses.replace(job.config, checkpoint_every=1, profile=False)
    key = config, job.model, id(job.data), tuple(job.devices)
    if key not in kept:
      kept[key] = job.data, make(job)
    return kept[key][1]

  # They need not be fast, but compiled.
  jax.config.update('jax_disable_most_optimizations', True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(program_lib, 'make_program', make_once)
    yield
  jax.config.update('jax_disable_most_optimizations', False)


def _config(**kwargs):
  defaults = dict(l1=(1e-4, 1e-2), seed=(0, 1), epochs=_EPOCHS)
  # Better than chance after so few steps.
  defaults |= dict(learning_rate=0.01, parallel='data')
  return Config(**(defaults | kwargs))


class _Runs:
  """Runs of one population, in folders of their own."""

  def __init__(self, folder, data, config, model=None, num_devices=1):
    self.folder = folder
    self.data = data
    self.config = config
    self.model = model or Tiny()
    self.devices = first_devices(num_devices)

  def go(self, name, stop_after=(), config=None, num_devices=None, **console):
    """Rows and output; the rows are `None` if it was stopped."""
    workdir = self.folder / name
    workdir.mkdir(exist_ok=True)
    output = io.StringIO()
    rows = None
    with contextlib.suppress(Interrupted):
      job = Job(
        config or self.config,
        self.model,
        self.data,
        workdir,
        first_devices(num_devices) if num_devices else self.devices,
        Console(file=output, width=200, **console),
        lambda: _log(workdir)[-1]['epoch'] in stop_after,
      )
      rows = run(job)
    return rows, output.getvalue()

  def traces(self, name):
    """The bytes of all that a run leaves behind for its readers."""
    workdir = self.folder / name
    paths = [workdir / name for name in _TRACES]
    paths += sorted((workdir / 'members').iterdir())
    return {str(p.relative_to(workdir)): p.read_bytes() for p in paths}


def _epochs_done(workdir):
  epochs = [
    int(path.name)
    for path in (workdir / 'checkpoints').glob('*')
    if (path / 'sha256.json').exists()
  ]
  return max(epochs, default=0)


def _log(workdir, name='metrics.jsonl'):
  lines = (workdir / name).read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def adam(digits, tmp_path_factory):
  """Runs of Adam with Tiny, of which `whole` was never stopped."""
  runs = _Runs(tmp_path_factory.mktemp('adam'), digits, _config())
  runs.rows, _ = runs.go('whole')
  return runs


def _assert_same(runs, name):
  whole, other = runs.traces('whole'), runs.traces(name)
  assert len(whole) == len(_TRACES) + len(runs.rows)
  assert whole.keys() == other.keys()
  for path, data in whole.items():
    assert data == other[path], path


@pytest.mark.parametrize('stops', [(1,), (5,), (1, 2, 3, 4, 5)])
def test_a_run_that_is_stopped_ends_as_if_it_never_had(adam, stops):
  name = f'stopped_{len(stops)}_{stops[0]}'
  for stop in stops:
    rows, output = adam.go(name, stops)
    assert rows is None
    assert f'epoch {stop}/6' in output
    assert f'epoch {stop + 1}/6' not in output
    assert _log(adam.folder / name)[-1]['epoch'] == stop
    assert not (adam.folder / name / 'results.csv').exists()
  rows, output = adam.go(name, stops)
  assert f'going on after epoch {stops[-1]}' in output
  assert f'epoch {stops[-1]}/6' not in output
  assert rows == adam.rows
  _assert_same(adam, name)


def test_a_terminal_has_a_bar_and_no_line_for_each_epoch(adam):
  """The second epoch of these is traced, which changes no number."""
  config = dataclasses.replace(adam.config, profile=True)
  rows, output = adam.go('terminal', config=config, force_terminal=True)
  assert rows == adam.rows
  _assert_same(adam, 'terminal')
  assert 'epoch 1/6' not in output
  assert '6/6' in output
  # What TensorBoard reads, and what ui.perfetto.dev does.
  traces = list((adam.folder / 'terminal' / 'profile').rglob('*.pb'))
  assert len(traces) == 1
  assert list(traces[0].parent.glob('perfetto_trace.json.gz'))


def test_stopped_in_its_last_epoch_it_is_done(adam):
  rows, _ = adam.go('late', (6,))
  assert rows == adam.rows
  _assert_same(adam, 'late')


@pytest.mark.slow
def test_moments_and_running_means_go_on_as_they_were(digits, tmp_path):
  """Moments of each objective; members on a device each."""
  config = _config(optimizer='madam', l1=None, parallel='members')
  runs = _Runs(tmp_path, digits, config, Normed(dropout=0.2), 2)
  runs.rows, output = runs.go('whole')
  assert 'members on 2 CPU devices' in output
  for _ in range(2):
    rows, _ = runs.go('stopped', (2, 4))
    assert rows is None
  runs.go('stopped')
  _assert_same(runs, 'stopped')


@pytest.mark.slow
def test_it_may_go_on_on_other_devices(adam):
  adam.go('moved', (2,))
  spread = dataclasses.replace(adam.config, parallel='members')
  _, output = adam.go('moved', (4,), config=spread, num_devices=2)
  assert 'going on after epoch 2' in output
  assert 'members on 2 CPU devices' in output
  rows, output = adam.go('moved')
  assert 'members on 1 CPU device' in output
  for row, expected in zip(rows, adam.rows, strict=True):
    assert row['ce_train'] == pytest.approx(expected['ce_train'], rel=1e-3)
    assert row['l1'] == pytest.approx(expected['l1'], rel=1e-3)
    assert row['nonzeros'] == pytest.approx(expected['nonzeros'], rel=0.01)
  # What was lost between epochs would show: the other seed is not as near.
  assert rows[0]['ce_train'] != pytest.approx(rows[2]['ce_train'], rel=1e-2)
  log = _log(adam.folder / 'moved')
  assert [record['epoch'] for record in log] == sorted([*range(1, 7)] * 4)


class _Crash(Exception):
  """Of the program, in the middle of a run."""


@pytest.mark.parametrize('is_logged', [False, True])
def test_a_crash_loses_what_came_after_the_checkpoint(
  adam, monkeypatch, is_logged
):
  """In epoch 5 of 6 with a checkpoint every third, before its log or after."""
  name = f'crash_{is_logged}'
  config = dataclasses.replace(adam.config, checkpoint_every=3)
  with monkeypatch.context() as patch:
    crash = _crash_in_epoch_5
    if is_logged:  # What comes next is the checkpoint, were there one.
      patch.setattr(loop, '_report_failures', crash())
    else:
      patch.setattr(records, 'epoch_records', crash())
    with pytest.raises(_Crash):
      adam.go(name, config=config)
  last = 5 if is_logged else 4
  assert _log(adam.folder / name)[-1]['epoch'] == last
  histograms = _log(adam.folder / name, 'histograms.jsonl')
  assert histograms[-1]['epoch'] == 5
  folder = adam.folder / name / 'checkpoints'
  assert [path.name for path in folder.iterdir()] == ['3']
  rows, output = adam.go(name, config=config)
  assert 'going on after epoch 3' in output
  assert 'epoch 4/6' in output
  assert rows == adam.rows
  _assert_same(adam, name)
  assert sorted(path.name for path in folder.iterdir()) == ['3', '6']


def _crash_in_epoch_5():
  """In place of a function of the loop that is called once an epoch."""
  called = 0
  before = records.epoch_records

  def function(*args, **kwargs):
    nonlocal called
    called += 1
    if called == 5:
      raise _Crash
    # That of failures returns nothing, and nobody asks.
    return before(*args, **kwargs) if len(args) == 6 else None

  return function


def test_half_a_line_of_a_log_is_cut_off(adam):
  adam.go('half', (3,))
  for name in ('metrics.jsonl', 'histograms.jsonl'):
    with (adam.folder / 'half' / name).open('a') as file:
      file.write('{"epoch": 4, "when": "epoch", "learn')
  adam.go('half')
  _assert_same(adam, 'half')


def test_what_a_killed_end_has_left_is_replaced(adam):
  """Killed after the last checkpoint, before results.csv, the last file."""
  adam.go('end')
  workdir = adam.folder / 'end'
  (workdir / 'results.csv').unlink()
  for path in list((workdir / 'members').iterdir())[:2]:
    path.write_bytes(path.read_bytes()[:100])
  (workdir / 'members' / f'{files.UNFINISHED}1234').write_text('half a network')
  rows, output = adam.go('end')
  assert rows == adam.rows
  assert 'going on after epoch 6' in output
  assert 'epoch 6/6' not in output
  _assert_same(adam, 'end')


def test_a_finished_run_is_not_trained_again(adam, monkeypatch):
  monkeypatch.setattr(program_lib, 'make_program', None)
  workdir = adam.folder / 'whole'
  before = {p: p.stat().st_mtime_ns for p in sorted(workdir.rglob('*'))}
  rows, output = adam.go('whole')
  assert rows == adam.rows
  assert 'finished already' in output
  after = {p: p.stat().st_mtime_ns for p in sorted(workdir.rglob('*'))}
  assert after == before


def _damage(workdir, epoch):
  path = workdir / 'checkpoints' / str(epoch) / 'default' / 'manifest.ocdbt'
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_a_damaged_checkpoint_is_trained_again(adam):
  """From the one before, with a warning; and is whole then."""
  adam.go('damaged', (4,))
  _damage(adam.folder / 'damaged', 4)
  rows, output = adam.go('damaged', (5,))
  assert rows is None
  assert 'checkpoints/4: not used, 4/default/manifest.ocdbt' in output
  assert 'going on after epoch 3' in output
  # The one that was written anew, if the newest is gone.
  shutil.rmtree(adam.folder / 'damaged' / 'checkpoints' / '5')
  rows, output = adam.go('damaged')
  assert 'not used' not in output
  assert 'going on after epoch 4' in output
  assert rows == adam.rows
  _assert_same(adam, 'damaged')


def test_without_a_whole_checkpoint_nothing_is_touched(adam):
  adam.go('lost', (2,))
  workdir = adam.folder / 'lost'
  for epoch in (1, 2):
    _damage(workdir, epoch)
  files = lambda: {
    path: path.read_bytes()
    for path in sorted(workdir.rglob('*'))
    if path.is_file() and path.name != 'config.json'
  }
  before = files()
  with pytest.raises(Damaged, match='checkpoints: expected a checkpoint'):
    adam.go('lost')
  assert files() == before
  # As it says.
  shutil.rmtree(workdir / 'checkpoints')
  rows, _ = adam.go('lost')
  assert rows == adam.rows
  _assert_same(adam, 'lost')


def test_a_log_that_cannot_be_written_leaves_what_can_go_on(adam, monkeypatch):
  append = files.append_jsonl

  def fill_disk(path, records):
    if records[0]['epoch'] == 4:
      path.write_text(path.read_text() + '{"epoch": 4, "l1"')
      raise OSError(28, 'No space left on device')
    append(path, records)

  with monkeypatch.context() as patch:
    patch.setattr(files, 'append_jsonl', fill_disk)
    with pytest.raises(OSError, match='No space'):
      adam.go('full')
  assert _epochs_done(adam.folder / 'full') == 3
  adam.go('full')
  _assert_same(adam, 'full')


@pytest.mark.parametrize('name', ['results.csv', 'l1_0.01_seed_1.npz'])
def test_a_result_that_cannot_be_written_is_not_there(adam, monkeypatch, name):
  """As a disk fills up: what is buffered fails when it is flushed."""
  folder = 'full_' + name
  adam.go(folder, (5,))
  replace = files.replace

  def fill_disk(path, write):
    def write_full(file):
      write(file)
      raise OSError(28, 'No space left on device')

    replace(path, write_full if path.name == name else write)

  workdir = adam.folder / folder
  with monkeypatch.context() as patch:
    patch.setattr(files, 'replace', fill_disk)
    with pytest.raises(OSError, match='No space'):
      adam.go(folder)
  assert not list(workdir.rglob(name))
  assert not list(workdir.rglob(f'{files.UNFINISHED}*'))
  adam.go(folder)
  _assert_same(adam, folder)


@pytest.fixture(scope='module')
def poisoned(digits, tmp_path_factory):
  """Runs whose members of the weights below fail where they say.

  In one of them the pictures are not finite, in the others the l1 norm; the
  compiled program is the same whether such members are there or not.
  """
  where = {
    # Objective, epoch and step.
    2e-4: (1, 2, 0),
    3e-4: (2, 3, 1),
    4e-4: (2, 0, 0),
    5e-4: (1, 0, 1),
    6e-4: (2, 5, 2),
  }
  runs = _Runs(tmp_path_factory.mktemp('poisoned'), digits, None)
  runs.healthy = _config(l1=(1e-4, 2.1e-4, 3.1e-4, 4.1e-4, 10.0))
  runs.config = _config(l1=(1e-4, 2e-4, 3e-4, 4e-4, 10.0))
  with faults.poisoned(where):
    runs.rows, runs.output = runs.go('whole')
    runs.go('healthy', config=runs.healthy)
    yield runs


_STATUS = {
  1e-4: 'ok',
  2e-4: "objective 'error' or its gradient is not finite in epoch 3 step 1",
  3e-4: "objective 'l1' or its gradient is not finite in epoch 4 step 2",
  4e-4: "objective 'l1' or its gradient is not finite in epoch 1 step 1",
  10.0: 'collapsed',
}


def test_a_member_that_fails_says_where(poisoned):
  for row in poisoned.rows:
    assert row['status'] == _STATUS[row['weight_l1']]
  rows = files.read_csv(poisoned.folder / 'whole' / 'results.csv')
  assert [row['status'] for row in rows] == list(_STATUS.values()) * 2
  with (poisoned.folder / 'whole' / 'results.csv').open() as file:
    last = ['status', 'file', 'pareto', 'knee']
    assert next(csv.reader(file))[-4:] == last
  # Each is said once.
  for weight, status in _STATUS.items():
    for seed in (0, 1):
      line = f'l1 {weight:g}, seed {seed}: stopped, {status}'
      assert poisoned.output.count(line) == ('not finite' in status)


def test_a_member_that_fails_is_neither_knee_nor_front(poisoned):
  healthy = records.read_rows(poisoned.folder / 'healthy' / 'results.csv')
  fronts = [
    {
      (row['weight_l1'], row['seed'])
      for row in rows
      if row['pareto'] or row['knee']
    }
    for rows in (poisoned.rows, healthy)
  ]
  assert fronts[0]
  assert {l1 for l1, _ in fronts[0]} == {1e-4}
  # Had they not failed, they would have been on it.
  assert {l1 for l1, _ in fronts[1]} & {2.1e-4, 3.1e-4, 4.1e-4}
  for row in healthy:
    assert row['status'] == ('collapsed' if row['weight_l1'] == 10 else 'ok')


def test_other_members_do_not_notice(poisoned):
  for seed in (0, 1):
    name = f'members/l1_0.0001_seed_{seed}.npz'
    whole, healthy = (
      (poisoned.folder / run / name).read_bytes()
      for run in ('whole', 'healthy')
    )
    assert whole == healthy
  logs = [
    [r for r in _log(poisoned.folder / run) if r['weight_l1'] == 1e-4]
    for run in ('whole', 'healthy')
  ]
  assert logs[0] == logs[1]
  assert all(r['error'] is not None for r in logs[0])


def test_the_network_before_the_failure_is_kept(poisoned):
  """That of weight 2e-4 fails in the first step of epoch 3."""
  poisoned.go('two', (2,))
  program = loop.program_lib.make_program(
    Job(poisoned.config, Tiny(), poisoned.data, devices=poisoned.devices)
  )
  template = program.layout.collect(program.init())
  checkpoint = poisoned.folder / 'two' / 'checkpoints'
  _, state = loop.checkpoints.restore(checkpoint, template, pytest.fail)
  for seed in (0, 1):
    nets = [
      load(poisoned.folder / 'whole' / 'members' / f'l1_{l1:g}_seed_{seed}.npz')
      for l1 in poisoned.config.l1
    ]
    for net in nets:
      assert all(np.isfinite(x).all() for x in jax.tree.leaves(net.variables))
    same = [
      np.array_equal(
        net.params['layer1']['kernel'],
        state.params['layer1']['kernel'][len(nets) * seed + index],
      )
      for index, net in enumerate(nets)
    ]
    # The fourth failed before, in the first step of all.
    assert same == [False, True, False, True, False]
  start = program.layout.collect(program.prune(program.init()).params)
  np.testing.assert_array_equal(
    nets[3].params['layer1']['kernel'],
    start['layer1']['kernel'][len(nets) + 3],
  )


def test_what_has_failed_is_logged_as_unknown(poisoned):
  for record in _log(poisoned.folder / 'whole'):
    if record['weight_l1'] == 2e-4:
      has_failed = record['epoch'] == 3
      assert (record['error'] is None) == has_failed
      assert record['accuracy_val'] is not None


def test_a_member_that_has_failed_stays_so_when_it_goes_on(poisoned):
  """Stopped in an epoch in which one has failed, and after it."""
  for stop, number in ((1, 2), (3, 2), (4, 2), (6, 0)):
    _, output = poisoned.go('stopped', (1, 3, 4))
    assert output.count(': stopped, objective') == number
    assert _log(poisoned.folder / 'stopped')[-1]['epoch'] == stop
  _assert_same(poisoned, 'stopped')


@pytest.mark.slow
def test_weights_that_overflow_stop_one_member_alone(digits, tmp_path):
  """Nothing is made up here: one step of SGD with a weight of 1e37."""
  runs = _Runs(tmp_path, digits, _config(optimizer='sgd', seed=(0,)))
  rows, _ = runs.go('healthy')
  wild = _config(optimizer='sgd', seed=(0,), l1=(1e-4, 1e37))
  wild_rows, output = runs.go('wild', config=wild)
  assert [row['status'] for row in rows] == ['ok', 'ok']
  assert wild_rows[0]['status'] == 'ok'
  assert wild_rows[1]['status'] == (
    "objective 'error' or its gradient is not finite in epoch 1 step 2"
  )
  assert wild_rows[1]['pareto'] == wild_rows[1]['knee'] == 0
  name = 'members/l1_0.0001_seed_0.npz'
  assert runs.traces('healthy')[name] == runs.traces('wild')[name]
  net = load(tmp_path / 'wild' / 'members' / 'l1_1e+37_seed_0.npz')
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(net.params))


def test_a_population_that_fails_as_a_whole_ends_in_peace(poisoned):
  config = _config(l1=(2e-4, 3e-4, 4e-4, 5e-4, 6e-4))
  rows, output = poisoned.go('all', config=config)
  assert all('not finite' in row['status'] for row in rows)
  assert not any(row['pareto'] or row['knee'] for row in rows)
  assert output.count(': stopped, objective') == 10


def test_a_member_at_chance_has_collapsed(poisoned):
  counts = np.bincount(poisoned.data.train.labels)
  rows = [row for row in poisoned.rows if row['weight_l1'] == 10]
  for row in rows:
    assert row['status'] == 'collapsed'
    assert row['accuracy_train'] <= counts.max() / counts.sum() + 1e-6
    assert row['nonzeros'] > 0
    assert row['pareto'] == row['knee'] == 0


@pytest.mark.parametrize(
  ('accuracy', 'nonzeros', 'status'),
  [
    (0.61, 5, 'ok'),
    (0.6, 5, 'collapsed'),
    (0.2, 5, 'collapsed'),
    (0.61, 0, 'collapsed'),  # Without weights between two layers.
  ],
)
def test_a_network_at_chance_has_collapsed(accuracy, nonzeros, status):
  here = lambda value: np.full(1, value)
  counts = mopt.NonzeroCount(
    here(nonzeros + 9),
    {'layer1/kernel': here(9), 'layer2/kernel': here(nonzeros)},
  )
  accuracies = {'train': accuracy, 'val': 0.99, 'test': 0.99}
  (row,) = records.result_rows(
    ('error', 'l1'),
    [Member(0, (1.0, 1e-4))],
    {k: Evaluation(here(1.0), here(v)) for k, v in accuracies.items()},
    program_lib.Complexity(counts, {'l1': here(2.0)}, here(99), here(50)),
    step_lib.Failure(*[np.zeros(1, np.int32)] * 3),
    layers=['nonzeros_layer1', 'nonzeros_layer2'],
    chance=0.6,
  )
  assert row['status'] == status
  assert row['accuracy_train'] == accuracy


@pytest.mark.parametrize(
  ('l1', 'names'),
  [
    ((1e-4, 2e-3), ['l1_0.0001', 'l1_0.002']),
    # Equal in six digits.
    ((0.1234567, 0.1234568), ['l1_0.1234567', 'l1_0.1234568']),
  ],
)
def test_every_network_has_a_file_of_its_own(digits, tmp_path, l1, names):
  config = Config(l1=l1, seed=(7,))
  weights = np.arange(6.0, dtype=np.float32).reshape(2, 3)
  job = Job(config, Tiny(), digits, tmp_path)
  loop._save_members(job, make_population(config), {'params': {'w': weights}})
  for index, name in enumerate(names):
    net = load(tmp_path / 'members' / f'{name}_seed_7.npz')
    np.testing.assert_array_equal(net.params['w'], weights[index])
