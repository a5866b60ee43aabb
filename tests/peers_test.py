"""The comparison with other libraries: it is the same work, rightly judged."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import ours
from benchmarks.peers import qp
from benchmarks.peers import solves
from benchmarks.peers import steps
from benchmarks.peers import task as task_lib
import models

# Of the extra [peers]; each is tested where it is.
_WAYS = {
  'PyTorch eager': ('torch',),
  'Keras, callback': ('tensorflow', 'keras'),
  'Keras, no pruning': ('tensorflow', 'keras'),
  'TorchJD MGDA': ('torch', 'torchjd'),
}


def _need(*names):
  for name in names:
    pytest.importorskip(name, reason=f'{name} is of the extra [peers]')


def _absent(name):
  raise ModuleNotFoundError(f"No module named '{name}'")


@dataclasses.dataclass
class _Still:
  """A trainer after its step."""

  values: list[float]
  after: task_lib.Weights

  def epoch(self):
    return 1.0

  def objectives(self):
    return self.values

  def weights(self):
    return self.after


def _still(kernel, value=2.0):
  return _Still([value], {'layer1': {'kernel': np.array(kernel)}})


@pytest.mark.parametrize(
  ('kernel', 'value', 'message'),
  [
    ([0.5, 0.0], 2.0, None),
    ([0.500005, 0.0], 2.0, None),
    ([0.5, 0.001], 2.0, None),  # Rounding decides there.
    ([0.5, 0.0], 2.001, 'objectives'),
    ([0.5003, 0.0], 2.0, 'layer1/kernel'),
    ([0.5, 0.000005], 2.0, 'layer1/kernel'),  # Not pruned.
    ([0.5, 0.003], 2.0, 'layer1/kernel'),
    ([0.5, np.nan], 2.0, 'layer1/kernel'),
    ([0.5], 2.0, 'layer1/kernel'),
  ],
)
def test_other_work_is_noticed(kernel, value, message):
  task = task_lib.one_step(is_mgda=False, prunes=True)
  ours, theirs = _still([0.5, 0.0]), _still(kernel, value)
  if message is None:
    task_lib.check_same(task, ours, theirs)
    return
  with pytest.raises(AssertionError, match=message):
    task_lib.check_same(task, ours, theirs)


@pytest.fixture
def exact():
  """No TF32, which GPUs have by default: gradients are compared to 1e-5."""
  with jax.default_matmul_precision('highest'):
    yield


@pytest.mark.usefixtures('exact')
def test_ours_does_what_the_task_says():
  task = task_lib.one_step(is_mgda=False, prunes=True)
  trainer = ours.Trainer(task)
  before = trainer.weights()
  assert trainer.epoch() > 0
  images, labels = task.draw()

  def objective(params):
    logits = models.create('lenet5').apply(
      {'params': params}, (images - task.mean) / task.std
    )
    rows = jax.nn.log_softmax(logits)[np.arange(32), labels]
    l2 = sum((params[k]['kernel'] ** 2).sum() for k in task_lib.CONVOLUTIONS)
    # The slope at 0 is 0.
    l1 = sum(
      (params[k]['kernel'] * np.sign(before[k]['kernel'])).sum()
      for k in task_lib.DENSE
    )
    return -rows.mean() + task.conv_l2 * l2 + task.l1 * l1

  value, grads = jax.value_and_grad(objective)(before)
  after = jax.tree.map(lambda w, g: w - np.asarray(g), before, dict(grads))
  for name in task_lib.DENSE:
    kernel = after[name]['kernel']
    kernel[np.abs(kernel) < task.threshold] = 0
  task_lib.check_same(task, trainer, _Still([float(value)], after))
  assert trainer.weights()['layer1']['kernel'].shape == (400, 120)


@pytest.mark.slow
@pytest.mark.usefixtures('exact')
@pytest.mark.parametrize('name', _WAYS)
def test_every_way_of_a_peer_does_the_same(name):
  _need(*_WAYS[name])
  module, function, special = steps.PEERS[name]
  module = importlib.import_module(f'benchmarks.peers.{module}')
  task = task_lib.Task(32, 4, **special)
  ways = getattr(module, function)(task)
  assert ways
  for make in ways.values():
    steps.check(task, make)
  # And the same without pruning.
  if name != 'Keras, callback':
    steps.check(dataclasses.replace(task, prunes=False), make)


@pytest.mark.slow
@pytest.mark.usefixtures('exact')
@pytest.mark.parametrize('name', _WAYS)
def test_peers_learn_as_ours(name):
  _need(*_WAYS[name])
  module, function, special = steps.PEERS[name]
  module = importlib.import_module(f'benchmarks.peers.{module}')
  # Whatever the order: one batch, again and again.
  task = task_lib.Task(32, 1, **special)
  ours_ = ours.Trainer(task)
  make = next(iter(getattr(module, function)(task).values()))
  theirs = make(task, ours_.weights())
  for _ in range(5):
    ours_.epoch()
    theirs.epoch()
  # Their Adam on the sum of MGDA is not MAdam, but starts like it.
  tolerance = 0.05 if task.is_mgda else 2e-3
  np.testing.assert_allclose(
    theirs.objectives(), ours_.objectives(), rtol=tolerance
  )
  zeros = [
    sum((t.weights()[k]['kernel'] == 0).sum() for k in task_lib.DENSE)
    for t in (ours_, theirs)
  ]
  if task.prunes and not task.is_mgda:
    assert zeros[0] > 100
    assert zeros[1] == pytest.approx(zeros[0], rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
def test_compiled_pytorch_runs_or_says_why():
  _need('torch')
  task = task_lib.Task(8, 2)
  weights = ours.Trainer(task).weights()
  row = steps.peer_row('PyTorch compiled', task, weights, is_quick=True)
  assert (row.trainer is None) == (row.why is not None)
  assert row.why is None or row.why.startswith('does not run here: ')


@pytest.mark.parametrize(
  ('error', 'why'),
  [
    (ImportError('no torch\nmore'), 'not installed: no torch'),
    (RuntimeError('no g++'), 'does not run here: RuntimeError: no g++'),
  ],
)
def test_what_cannot_be_measured_says_why(error, why, monkeypatch):
  def fail(name):
    raise error

  monkeypatch.setattr(steps.importlib, 'import_module', fail)
  row = steps.peer_row('PyTorch eager', task_lib.Task(8, 2), {}, True)
  described = row.describe()
  assert described['why'] == why
  assert described['ms_step'] is described['images_s'] is None
  assert steps.ratios([row]) == []


def test_the_fastest_way_is_taken():
  made = []

  @dataclasses.dataclass
  class Sleeper:
    task: task_lib.Task
    seconds: list[float]

    def epoch(self):
      made.append(self.task.steps)
      return self.seconds.pop(0)

  ways = {
    'slow': lambda task, _: Sleeper(task, [0.1, 3.0, 3.0, 3.0, 3.0]),
    'hopeless': lambda task, _: Sleeper(task, [0.1, 7.0]),
    'fast': lambda task, _: Sleeper(task, [9.0, 4.0, 4.0, 2.0, 4.0]),
  }
  task = task_lib.Task(8, 100)
  assert steps.fastest(task, ways, {}, is_quick=False) == 'fast'
  assert set(made) == {20}
  assert steps.fastest(task, ways, {}, is_quick=True) == 'slow'


def test_ratios_are_taken_round_by_round():
  def row(name, times, **special):
    return steps.Row(name, task_lib.Task(8, 2, **special), times=times)

  found = steps.ratios(
    [
      row('mopt adam', [1.0, 2.0, 4.0]),
      row('mopt madam', [1.1, 2.2, 4.4], is_mgda=True),
      row('PyTorch eager', [3.0, 6.0, 8.0]),
      row('TorchJD MGDA', [5.5, 11.0, 22.0], is_mgda=True),
      row('Keras, callback', []),
    ]
  )
  assert {r['name']: round(r['ratio'], 6) for r in found} == {
    'mopt madam / mopt adam': 1.1,
    'PyTorch eager / mopt adam': 3.0,
    'TorchJD MGDA / mopt madam': 5.0,
  }
  assert [r['aim'] for r in found] == [1.05, 5.0, 10.0]


@pytest.mark.parametrize('family', solves.FAMILIES)
@pytest.mark.parametrize('m', [2, 3, 4, 8])
def test_the_judge_is_right(family, m):
  for gramian in solves.draw_gramians(family, m, 5).astype(np.float64):
    weights = qp.min_norm_weights(gramian)
    tried = qp.enumerate_faces(gramian)
    assert weights.sum() == pytest.approx(1)
    assert weights.min() >= 0
    optimum = tried @ gramian @ tried
    assert weights @ gramian @ weights == pytest.approx(optimum, rel=1e-9)
    assert qp.kkt_residual(gramian, weights) <= 1e-9 * optimum


def test_the_judge_knows_textbook_cases():
  ends = np.array([[1.0, 1.0], [1.0, 4.0]])
  np.testing.assert_allclose(qp.min_norm_weights(ends), [1, 0])
  inside = np.diag([3.0, 1.0])
  np.testing.assert_allclose(qp.min_norm_weights(inside), [0.25, 0.75])
  assert qp.kkt_residual(inside, np.array([1.0, 0.0])) == 3.0


@pytest.mark.parametrize('family', solves.FAMILIES)
def test_many_gradients_can_be_judged(family):
  for m in (16, 32):
    assert solves.exact_optima(solves.draw_gramians(family, m, 3)).min() > 0


def test_verdicts():
  # |d|^2 is 1 at the first, which is the optimum; 4 at the second.
  gramians = np.tile(np.array([[1.0, 1.0], [1.0, 4.0]], np.float32), (4, 1, 1))
  optima = np.ones(4)
  good = [2.0, 0.0]  # The length does not matter.
  found = solves.judge(gramians, [good, good, [0, 1], good], optima)
  assert found['excess_median'] == 0
  assert found['excess_max'] == 3
  assert found['not_descent'] == 0
  assert found['solved'] == 1
  found = solves.judge(gramians, [[np.nan, 1], good, good, good], optima)
  assert found['solved'] == 0.75
  assert found['not_descent'] == 0.25
  assert found['excess_max'] == 0
  conflict = np.array([[[1.0, -1.0], [-1.0, 4.0]]])
  found = solves.judge(conflict, [[0.0, 1.0]], np.array([3 / 7]))
  assert found['not_descent'] == 1
  assert found['cosine_min'] == pytest.approx(-0.5)
  found = solves.judge(conflict, [[np.nan, 0.0]], np.array([3 / 7]))
  assert found['excess_max'] is None
  assert found['not_descent'] == 1


def test_torchjd_solves():
  _need('torch', 'torchjd')
  rows = solves.measure([2], 3, 1, with_torchjd=True)
  by_name = {(row['gradients'], row['solver']): row for row in rows}
  for family in solves.FAMILIES:
    # With two gradients its first step is exact.
    assert by_name[family, 'TorchJD MGDA']['excess_max'] < 1e-5
    assert by_name[family, 'TorchJD MGDA']['us_inside'] is None
    upgrad = by_name.get((family, 'TorchJD UPGrad'))
    assert upgrad is None or upgrad['excess_max'] is None


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  """With what the project itself installs, and less of everything."""
  path = tmp_path_factory.mktemp('peers') / 'new' / 'peers.json'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(steps.importlib, 'import_module', _absent)
    patch.setattr(peers, 'peer_versions', dict)
    patch.setattr(peers, '_BATCHES', {8: 2})
    peers.main(['--quick', f'--out={path}'])
  return json.loads(path.read_text())


@pytest.mark.slow
def test_it_runs_without_peers(result):
  rows = {row['name']: row for row in result['steps']}
  assert set(rows) == {*steps.OURS.values(), *steps.PEERS}
  for name in steps.PEERS:
    assert rows[name]['ms_step'] is None
    assert rows[name]['why'].startswith('not installed: ')
  for name in steps.OURS.values():
    row = rows[name]
    assert row['images_s'] == pytest.approx(8000 / row['ms_step'])
    assert row['n'] == 3
    assert row['iqr_ms'] >= 0
  (ratio,) = result['ratios']
  assert ratio['name'] == 'mopt madam / mopt adam'
  assert ratio['low'] <= ratio['ratio'] <= ratio['high']


@pytest.mark.slow
def test_our_solver_is_exact(result):
  rows = result['solves']
  assert {row['objectives'] for row in rows} == {2, 8}
  assert {row['gradients'] for row in rows} == set(solves.FAMILIES)
  for row in rows:
    assert row['solver'] == 'mopt'
    assert -1e-6 < row['excess_median'] <= row['excess_max'] < 1e-5
    assert row['not_descent'] == 0
    assert row['us'] > 0
    assert row['us_inside'] > 0


@pytest.mark.slow
def test_it_says_where_it_was_measured(result):
  assert result['quick'] is True
  assert result['peers'] == {}
  assert result['threads']['cores'] >= 1
  for name in ('device', 'commit', 'jax', 'mopt', 'date', 'load'):
    assert name in result


@pytest.mark.parametrize('argument', ['--fast', '--qui', 'x', '--out'])
def test_wrong_arguments_are_refused(argument, capsys):
  with pytest.raises(SystemExit) as error:
    peers.parse([argument])
  assert error.value.code == 2
  assert capsys.readouterr().err.count('\n') == 1


def test_arguments():
  args = peers.parse([])
  assert args.out.parts[-3:] == ('benchmarks', 'results', 'peers.json')
  assert not args.quick
  assert peers.parse(['--quick']).quick
