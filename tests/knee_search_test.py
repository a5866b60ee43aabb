"""Searches of trainings: what they ask, what they leave, how they go on."""

import csv
import dataclasses
import io
import itertools
import json
import math
import re
import shutil

from hypothesis import given
from hypothesis import strategies as st
import moocore
import numpy as np
import pytest
from rich.console import Console

from mopt.training import check_resumable
from mopt.training import Config
from mopt.training import Dataset
from mopt.training import Job
from mopt.training import knee_search
from mopt.training import load
from mopt.training import load_dataset
from mopt.training import plots
from mopt.training import search
from mopt.training import single_run
from mopt.training.data import Split
from tests.networks import Dropping

KNEE = 3e-4
_STRATEGIES = ('grid', 'dichotomic', 'stochastic_dichotomic', 'bisection')
_EXAMPLES = Split(np.zeros((40, 28, 28, 1), np.uint8), np.zeros(40, np.int32))
_NOTHING = Split(_EXAMPLES.images[:0], _EXAMPLES.labels[:0])
_DATA = Dataset('none', 10, _EXAMPLES, _EXAMPLES, _EXAMPLES, 0.0, 255.0)


def _hyperbola(weight):
  """A network that minimises ce + weight * l1; the knee is at `KNEE`.

  ce = KNEE (sqrt(s^2 + 1) - s) for s in [-3, 3], which l1 norm and ln nonzeros
  follow: the chord between the ends has the slope of the front at s = 0. The
  test error has its corner at s = 1.5.
  """
  u = 1 - weight / KNEE
  s = math.copysign(3.0, u) if abs(u) >= 1 else u / math.sqrt(1 - u * u)
  s = min(max(s, -3.0), 3.0)
  error = KNEE * (math.sqrt(s * s + 1) - s)
  test_error = 0.05 * (math.sqrt((s - 1.5) ** 2 + 0.1) - (s - 1.5))
  return error, 1 - 100 * error, 1 - test_error, s + 4, round(math.exp(s + 8))


def _scattered(weight):
  """Sparser and worse with larger weights, but for a large noise."""
  random = np.random.default_rng(round(weight * 1e12))
  place = (math.log10(weight) + 5) / 3 + 0.2 * random.normal()
  error = 0.05 + 0.2 * place**2
  nonzeros = round(math.exp(10 - 4 * place + 0.5 * random.normal()))
  return error, 1 - error, 1 - error, 10.0 - place, nonzeros


def _collapsing(weight):
  """A hyperbola whose networks lose all weights beyond 1e-3."""
  return _hyperbola(weight) if weight <= 1e-3 else (4e-3, 0.1, 0.1, 0.0, 0)


class _Trainer:
  """In place of what trains and draws: networks of a known front, at no cost.

  Raises KeyboardInterrupt at the step `stop`, a training or a picture.
  """

  def __init__(self, solve=_hyperbola, stop=None):
    self.solve = solve
    self.stop = stop
    self.steps = 0
    self.calls = []  # folder, weights, seeds and epochs of each training
    self.went_on = []  # whether each of them had begun before
    self.pictures = []

  def train_members(self, job, splits=('train', 'val', 'test')):
    config, data, workdir = job.config, job.data, job.workdir
    # What is there is of the same training, which goes on.
    about = json.loads((workdir / 'config.json').read_text())
    assert about['l1'] == list(config.l1)
    assert about['seed'] == list(config.seed)
    assert about['epochs'] == config.epochs
    left = {path.name for path in workdir.iterdir()}
    assert left <= {'config.json', 'begun', 'members'}
    self.calls.append((workdir.name, config.l1, config.seed, config.epochs))
    self.went_on.append('begun' in left)
    (workdir / 'begun').touch()
    self._step()
    (workdir / 'members').mkdir(exist_ok=True)
    return [
      self._row(l1, seed, data, splits)
      for seed in config.seed
      for l1 in config.l1
    ]

  def _row(self, l1, seed, data, splits):
    ce, accuracy, accuracy_test, norm, nonzeros = self.solve(l1)
    known = lambda split, value: (
      value
      if split in splits and len(getattr(data, split).labels)
      else math.nan
    )
    return {
      'seed': seed,
      'weight_error': 1.0,
      'weight_l1': l1,
      'ce_train': ce,
      'ce_val': known('val', ce),
      'ce_test': known('test', ce),
      'l1': norm,
      'nonzeros': nonzeros,
      'nonzeros_layer1': nonzeros,
      'accuracy_train': accuracy,
      'accuracy_val': known('val', accuracy),
      'accuracy_test': known('test', accuracy_test),
      'status': 'ok' if nonzeros else 'collapsed',
      'file': f'members/l1_{l1:g}_seed_{seed}.npz',
    }

  def draw(self, path, *args, counted='in the dense layers', **_):
    assert counted == 'in the dense layers'
    self._step()
    self.pictures.append((path.name, *args))

  def _step(self):
    self.steps += 1
    if self.steps == self.stop:
      raise KeyboardInterrupt


@pytest.fixture
def searched(tmp_path, monkeypatch):
  """Searches with a `_Trainer`; returns it, what was found and printed."""

  def start(config, folder='search', data=_DATA, resume=False, **kwargs):
    trainer = _Trainer(**kwargs)
    for module in (single_run, knee_search):
      monkeypatch.setattr(module, 'train_members', trainer.train_members)
    monkeypatch.setattr(plots, 'plot_front', trainer.draw)
    monkeypatch.setattr(plots, 'plot_search', trainer.draw)
    workdir = tmp_path / folder
    if not resume:
      workdir.mkdir()
    console = Console(file=io.StringIO(), width=100)
    found = None
    try:
      job = Job(config, Dropping(0.0), data, workdir, console=console)
      found = search(job, resume)
    except KeyboardInterrupt:
      assert trainer.steps == trainer.stop
    return trainer, found, console.file.getvalue()

  return start


def _config(**kwargs):
  return Config(**({'search': 'bisection', 'max_runs': 7} | kwargs))


def _read(folder):
  """The rows of results.csv, empty cells as NaN."""

  def value(name, cell):
    return cell if name in ('status', 'file') else float(cell or 'nan')

  with (folder / 'results.csv').open(newline='') as file:
    return [
      {name: value(name, cell) for name, cell in row.items()}
      for row in csv.DictReader(file)
    ]


def _files(folder):
  """All that is in a folder, to see whether it has changed."""
  return {
    path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_a_row_for_each_training(searched, tmp_path):
  config = _config(seed=(3, 5))
  trainer, found, out = searched(config)
  rows = _read(tmp_path / 'search')
  *levels, _ = trainer.calls
  assert [(row['level'], row['weight_l1']) for row in rows] == [
    (int(folder.removeprefix('level_')), l1)
    for folder, weights, _, _ in levels
    for l1 in weights
  ]
  assert [folder for folder, *_ in levels] == [
    f'level_{i + 1}' for i in range(len(levels))
  ]
  for row in rows:
    ce, accuracy, _, norm, nonzeros = _hyperbola(row['weight_l1'])
    assert (row['ce_val'], row['accuracy_val']) == (ce, accuracy)
    assert (row['l1'], row['nonzeros']) == (norm, nonzeros)
    # Nobody has looked at the test set.
    assert math.isnan(row['ce_test'])
    assert math.isnan(row['accuracy_test'])
  about = json.loads((tmp_path / 'search' / 'config.json').read_text())
  assert about['search'] == 'bisection'
  assert about['seconds'] >= 0
  assert about['knee'] == next(row['weight_l1'] for row in rows if row['knee'])
  assert f'level {len(levels)}: l1' in out
  # Drawn after each level, and once more with the knee trained in full.
  names = [picture[0] for picture in trainer.pictures]
  assert names == [
    *['front.png', 'search.png'] * len(levels),
    'front.png',  # the knee's own
    *['front.png', 'search.png'],
  ]
  _, drawn, _, split, retrained = trainer.pictures[-2]
  assert [row['weight_l1'] for row in drawn] == [
    row['weight_l1'] for row in rows
  ]
  assert (split, retrained) == ('val', found)


@pytest.mark.parametrize(
  ('epochs', 'search_epochs', 'expected'),
  [(30, None, 10), (2, None, 1), (30, 7, 7), (5, 9, 9)],
)
def test_levels_are_short_and_the_knee_is_trained_in_full(
  searched, tmp_path, epochs, search_epochs, expected
):
  config = _config(seed=(3, 5), epochs=epochs, search_epochs=search_epochs)
  trainer, found, _ = searched(config)
  *levels, (folder, weights, seeds, length) = trainer.calls
  assert {(s, n) for _, _, s, n in levels} == {((3,), expected)}
  assert (seeds, length) == ((3, 5), epochs)
  (knee,) = weights
  assert folder == f'knee_l1_{knee:g}'
  assert [(row['weight_l1'], row['seed']) for row in found] == [
    (knee, 3),
    (knee, 5),
  ]
  # The one network whose test error may be told.
  test = [row['accuracy_test'] for row in _read(tmp_path / 'search' / folder)]
  assert test == [_hyperbola(knee)[2]] * 2
  settings = json.loads(
    (tmp_path / 'search' / folder / 'config.json').read_text()
  )
  assert (settings['search'], settings['l1']) == ('none', [knee])


@pytest.mark.parametrize('max_runs', [2, 5, 10])
@pytest.mark.parametrize('name', _STRATEGIES)
def test_no_more_trainings_than_allowed(searched, tmp_path, name, max_runs):
  trainer, _, _ = searched(_config(search=name, max_runs=max_runs))
  rows = _read(tmp_path / 'search')
  weights = [row['weight_l1'] for row in rows]
  assert set(weights) >= {1e-5, 1e-2}
  assert len(set(weights)) == len(weights) <= max_runs
  # These two always have another one to try.
  if name in ('grid', 'bisection'):
    assert len(weights) == max_runs
  trained = [w for folder, w, *_ in trainer.calls if 'level' in folder]
  assert [weight for level in trained for weight in level] == weights


@pytest.mark.parametrize('levels', [1, 3])
@pytest.mark.parametrize('name', _STRATEGIES[1:])
def test_no_more_levels_than_allowed(searched, tmp_path, name, levels):
  searched(_config(search=name, levels=levels, max_runs=20))
  found = [row['level'] for row in _read(tmp_path / 'search')]
  assert max(found) == levels
  assert found == sorted(found)


def _knee_of(rows, split):
  """The row farthest below the line between the ends of the front."""
  alive = [row for row in rows if row['nonzeros'] > 0]
  points = [
    (1 - r[f'accuracy_{split}'], math.log(r['nonzeros'])) for r in alive
  ]
  front = sorted(
    (p, row['weight_l1'])
    for p, row in zip(points, alive)
    if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
  )
  (x0, y0), (x1, y1) = front[0][0], front[-1][0]
  below = [
    1 - (x - x0) / (x1 - x0) - (y - y1) / (y0 - y1) for (x, y), _ in front
  ]
  return front[int(np.argmax(below))][1], {weight for _, weight in front}


@pytest.mark.parametrize(
  ('name', 'solve'),
  [
    *itertools.product(_STRATEGIES, [_hyperbola, _collapsing]),
    ('grid', _scattered),
    ('bisection', _scattered),
  ],
)
def test_the_knee_is_farthest_below_the_chord(searched, tmp_path, name, solve):
  config = _config(search=name, max_runs=14)
  trainer, _, _ = searched(config, solve=solve)
  rows = _read(tmp_path / 'search')
  knee, front = _knee_of(rows, 'val')
  assert [row['weight_l1'] for row in rows if row['knee']] == [knee]
  assert {row['weight_l1'] for row in rows if row['pareto']} == front
  assert trainer.calls[-1][:2] == (f'knee_l1_{knee:g}', (knee,))


@pytest.mark.parametrize('name', _STRATEGIES)
def test_a_known_knee_is_found(searched, name):
  trainer, _, _ = searched(_config(search=name, max_runs=20))
  (knee,) = trainer.calls[-1][1]
  assert abs(math.log(knee / KNEE)) < math.log(1.2)


def test_the_test_set_chooses_if_told_so(searched, tmp_path):
  trainer, _, _ = searched(_config(select_on='test', max_runs=12))
  rows = _read(tmp_path / 'search')
  for row in rows:
    assert row['accuracy_test'] == _hyperbola(row['weight_l1'])[2]
  knee, _ = _knee_of(rows, 'test')
  assert knee != _knee_of(rows, 'val')[0]
  assert trainer.calls[-1][1] == (knee,)


def test_without_validation_examples_the_training_set_chooses(
  searched, tmp_path
):
  data = _DATA._replace(val=_NOTHING)
  config = _config(max_runs=10)
  trainer, found, _ = searched(config, data=data)
  rows = _read(tmp_path / 'search')
  assert all(math.isnan(row['accuracy_val']) for row in rows)
  assert trainer.calls[-1][1] == (_knee_of(rows, 'train')[0],)
  again, same, _ = searched(config, data=data, resume=True)
  assert again.calls == []
  np.testing.assert_equal(same, found)


def _told(monkeypatch):
  """Notes what strategies are told."""
  told = {}
  make = knee_search.make_strategy

  def listening(config):
    strategy = make(config)

    def tell(state, weights, objectives):
      told.update(zip(weights, objectives))
      return strategy.tell(state, weights, objectives)

    return strategy._replace(tell=tell)

  monkeypatch.setattr(knee_search, 'make_strategy', listening)
  return told


def test_a_collapse_does_not_end_a_bisection(searched, tmp_path, monkeypatch):
  told = _told(monkeypatch)
  searched(_config(max_runs=14), solve=_collapsing)
  rows = _read(tmp_path / 'search')
  assert len(rows) == 14
  failed = {row['weight_l1'] for row in rows if row['nonzeros'] == 0}
  assert failed
  # Where networks collapse is known to half a decade, from three decades.
  edge = min(failed) / max(
    row['weight_l1'] for row in rows if row['weight_l1'] <= 1e-3
  )
  assert edge < 10**0.5
  for row in rows:
    expected = (1 - row['accuracy_val'], math.log(max(row['nonzeros'], 1)))
    if row['weight_l1'] in failed:
      expected = (math.inf, math.inf)
      assert (row['pareto'], row['knee']) == (0, 0)
    assert told[row['weight_l1']] == expected


@pytest.mark.parametrize('name', ['dichotomic', 'stochastic_dichotomic'])
def test_a_dichotomic_search_is_told_of_a_collapse(
  searched, tmp_path, monkeypatch, name
):
  told = _told(monkeypatch)
  searched(_config(search=name), solve=_collapsing)
  first, collapsed, second, *_ = _read(tmp_path / 'search')
  assert (collapsed['weight_l1'], collapsed['nonzeros']) == (1e-2, 0)
  assert told[1e-2] == (4e-3, 0.0)
  # The weight at which both ends have the same weighted sum.
  slope = (4e-3 - first['ce_val']) / first['l1']
  np.testing.assert_allclose(second['weight_l1'], slope, rtol=1e-9)


@pytest.mark.parametrize(
  ('solve', 'max_runs'),
  [
    (_hyperbola, 2),  # two points have no knee
    (lambda weight: (0.1, 0.9, 0.9, 5.0, 100), 7),  # all of them the same
    (lambda weight: (2.3, 0.1, 0.1, 0.0, 0), 7),  # all of them collapsed
  ],
)
def test_no_knee_is_said_and_none_trained(searched, tmp_path, solve, max_runs):
  config = _config(max_runs=max_runs)
  trainer, found, out = searched(config, solve=solve)
  assert found == []
  assert 'No knee' in out
  assert not list((tmp_path / 'search').glob('knee*'))
  about = json.loads((tmp_path / 'search' / 'config.json').read_text())
  assert about['knee'] is None
  # Nor does it change the second time.
  before = (tmp_path / 'search' / 'results.csv').read_bytes()
  again, found, out = searched(config, solve=solve, resume=True)
  assert (again.calls, found) == ([], [])
  assert 'No knee' in out
  assert (tmp_path / 'search' / 'results.csv').read_bytes() == before
  # What it has is drawn even if it was killed before.
  assert [name for name, *_ in again.pictures] == ['front.png', 'search.png']


@st.composite
def _tables(draw):
  """Rows of trainings, some of which have collapsed."""
  pairs = st.tuples(st.integers(0, 20), st.integers(0, 50))
  return [
    {
      'ce_train': 0.1,
      'l1': 1.0,
      'nonzeros': nonzeros,
      'nonzeros_layer1': nonzeros,
      'accuracy_val': 1 - error / 20,
    }
    for error, nonzeros in draw(st.lists(pairs, min_size=1, max_size=12))
  ]


@given(_tables())
def test_the_hypervolume_is_that_of_moocore(rows):
  found = knee_search.hypervolumes(rows, 'val')
  assert len(found) == len(rows)
  assert (np.diff(found) >= -1e-12).all()
  points = [
    (1 - row['accuracy_val'], math.log(row['nonzeros']))
    if row['nonzeros']
    else None
    for row in rows
  ]
  alive = [point for point in points if point]
  for n, volume in enumerate(found, 1):
    kept = [point for point in points[:n] if point]
    expected = 0.0
    if kept:
      worst = np.max(alive, axis=0)
      expected = moocore.hypervolume(np.array(kept), ref=worst)
    np.testing.assert_allclose(volume, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('name', _STRATEGIES)
def test_an_interrupted_search_ends_as_if_nothing_had_happened(
  searched, tmp_path, name
):
  """Interrupted in each of its trainings, and before each of its pictures."""
  config = _config(search=name, max_runs=6, seed=(0, 1))
  whole, found, _ = searched(config, 'whole', solve=_collapsing)
  expected = _files(tmp_path / 'whole')
  folders = [folder for folder, *_ in whole.calls]
  assert whole.steps == len(folders) + len(whole.pictures)
  for stop in range(1, whole.steps + 1):
    folder = f'stopped_{stop}'
    first, nothing, _ = searched(config, folder, solve=_collapsing, stop=stop)
    assert (first.steps, nothing) == (stop, None)
    done = _finished(tmp_path / folder)
    second, same, _ = searched(config, folder, solve=_collapsing, resume=True)
    np.testing.assert_equal(same, found)
    # What was trained, as its results say, is not trained again.
    again = [call for call in first.calls if call[0] not in done]
    assert first.calls + second.calls == [
      call for call in whole.calls for _ in range(1 + (call in again))
    ]
    files = _files(tmp_path / folder)
    assert set(files) == set(expected)
    for path in files:
      if path.name == 'results.csv':
        assert files[path][1] == expected[path][1]


def _finished(workdir):
  """The folders of trainings that are in a table."""
  tables = {path.parent.name for path in workdir.glob('knee*/results.csv')}
  rows = _read(workdir) if (workdir / 'results.csv').exists() else []
  return tables | {f'level_{row["level"]:g}' for row in rows}


@pytest.mark.parametrize('config', ['another', 'none', 'the same'])
def test_only_what_is_left_of_the_same_level_is_kept(
  searched, tmp_path, config
):
  """Killed in level 3, in a folder of other weights, of nothing, of its own."""
  whole, _, _ = searched(_config())
  workdir = tmp_path / 'search'
  table = (workdir / 'results.csv').read_text()
  lines = table.splitlines(keepends=True)
  kept = [line for line in lines if line[:2] in ('le', '1,', '2,')]
  assert 1 < len(kept) < len(lines)
  (workdir / 'results.csv').write_text(''.join(kept))
  for folder in ('level_3', 'level_4', whole.calls[-1][0]):
    shutil.rmtree(workdir / folder)
  (workdir / 'level_3').mkdir()
  if config == 'the same':
    (workdir / 'level_3' / 'begun').touch()
  else:
    (workdir / 'level_3' / 'junk').mkdir()
    (workdir / 'level_3' / 'junk' / 'file').touch()
  if config != 'none':
    source = 'level_3' if config == 'the same' else 'level_1'
    about = dataclasses.asdict(_config()) | {
      'search': 'none',
      'l1': next(w for folder, w, *_ in whole.calls if folder == source),
      'epochs': 10,
    }
    (workdir / 'level_3' / 'config.json').write_text(json.dumps(about))
  again, _, _ = searched(_config(), resume=True)
  assert (workdir / 'results.csv').read_text() == table
  assert again.calls == whole.calls[2:]
  assert again.went_on[0] == (config == 'the same')


def test_nothing_is_left_to_do_in_a_finished_search(searched, tmp_path):
  _, found, _ = searched(_config(seed=(0, 1)))
  before = _files(tmp_path / 'search')
  trainer, same, out = searched(_config(seed=(0, 1)), resume=True)
  assert trainer.calls == []
  assert same == found
  assert 'finished already' in out
  # The table is not even written.
  after = _files(tmp_path / 'search')
  changed = {path.name for path in before if before[path] != after[path]}
  assert changed == {'config.json'}


_CHANGES = [
  ('optimizer', 'sgd', 'adam'),
  ('epochs', 31, 30),
  ('search_epochs', 10, None),
  ('seed', (0, 1), [0]),
  ('seed', (1,), [0]),
  ('search', 'dichotomic', 'bisection'),
  ('search_range', (1e-5, 2e-2), [1e-5, 1e-2]),
  ('select_on', 'test', 'val'),
  ('train_size', 40, None),
  ('threshold', 2e-3, 1e-3),
  ('scalarization', 'convex', 'penalty'),
]


@pytest.mark.parametrize(('name', 'value', 'before'), _CHANGES)
def test_another_setting_is_refused_by_name(
  searched, tmp_path, name, value, before
):
  searched(_config(), stop=4)  # in level 2
  files = _files(tmp_path / 'search')
  config = dataclasses.replace(_config(), **{name: value})
  message = f'^{re.escape(f"{name}={value}: expected {before}, as in")}'
  with pytest.raises(ValueError, match=message):
    searched(config, resume=True)
  with pytest.raises(ValueError, match=message):
    check_resumable(config, _DATA, tmp_path / 'search')
  assert _files(tmp_path / 'search') == files


@pytest.mark.parametrize(
  'change',
  [{'parallel': 'members'}, {'stream': True}, {'data_dir': 'elsewhere'}],
)
def test_where_it_is_trained_may_change(searched, tmp_path, change):
  searched(_config(), 'whole')
  searched(_config(), stop=4)
  searched(_config(**change), resume=True)
  _assert_same_tables(tmp_path)
  about = json.loads((tmp_path / 'search' / 'config.json').read_text())
  assert all(about[name] == value for name, value in change.items())


def _assert_same_tables(tmp_path, name='results.csv'):
  expected = (tmp_path / 'whole' / name).read_bytes()
  assert (tmp_path / 'search' / name).read_bytes() == expected


def test_more_trainings_may_be_allowed_later(searched, tmp_path):
  large = _config(max_runs=9)
  whole, found, _ = searched(large, 'whole')
  # The third level wants two.
  first, _, _ = searched(_config(max_runs=4))
  assert [len(weights) for _, weights, *_ in first.calls] == [2, 1, 1, 1]
  second, same, _ = searched(large, resume=True)
  assert same == found
  # But for where the networks of the third level lie.
  table = (tmp_path / 'search' / 'results.csv').read_text()
  assert table.count('level_3_after_1/') == 1
  expected = (tmp_path / 'whole' / 'results.csv').read_text()
  assert table.replace('level_3_after_1/', 'level_3/') == expected
  _assert_same_tables(
    tmp_path, f'knee_l1_{found[0]["weight_l1"]:g}/results.csv'
  )
  # Networks of the third level that were there are kept.
  assert second.calls[0][0] == 'level_3_after_1'
  assert first.calls[2][1] + second.calls[0][1] == whole.calls[2][1]
  assert (tmp_path / 'search' / 'level_3' / 'members').exists()


def test_more_levels_may_be_allowed_later(searched, tmp_path):
  searched(_config(levels=4), 'whole')
  searched(_config(levels=2))
  searched(_config(levels=4), resume=True)
  _assert_same_tables(tmp_path)


def test_a_grid_cannot_grow(searched, tmp_path):
  searched(_config(search='grid', max_runs=4))
  files = _files(tmp_path / 'search')
  config = _config(search='grid', max_runs=5)
  with pytest.raises(ValueError, match='^max_runs=5: expected 4, as in'):
    searched(config, resume=True)
  assert _files(tmp_path / 'search') == files


@pytest.mark.parametrize(
  ('change', 'message'),
  [({'max_runs': 5}, 'max_runs=5 .* 7'), ({'levels': 3}, 'levels=3 .* 4')],
)
def test_less_than_is_done_is_refused(searched, tmp_path, change, message):
  searched(_config())
  files = _files(tmp_path / 'search')
  with pytest.raises(ValueError, match=message):
    searched(_config(**change), resume=True)
  with pytest.raises(ValueError, match=message):
    check_resumable(_config(**change), _DATA, tmp_path / 'search')
  assert _files(tmp_path / 'search') == files


@pytest.mark.parametrize(
  'content', [None, b'', b'{"search": "bisec', b'[]', b'null', b'7', b'\xff\0']
)
def test_a_folder_without_a_search_is_refused(searched, tmp_path, content):
  searched(_config())
  path = tmp_path / 'search' / 'config.json'
  path.unlink() if content is None else path.write_bytes(content)
  files = _files(tmp_path / 'search')
  message = r'^workdir=.*: expected the folder of a .* to resume \('
  with pytest.raises(ValueError, match=message):
    searched(_config(), resume=True)
  with pytest.raises(ValueError, match=message):
    check_resumable(_config(), _DATA, tmp_path / 'search')
  assert _files(tmp_path / 'search') == files


def test_a_search_does_not_go_on_with_other_data(searched, tmp_path):
  searched(_config())
  files = _files(tmp_path / 'search')
  labels = _DATA.test.labels + 1
  other = _DATA._replace(test=_DATA.test._replace(labels=labels))
  message = f'^dataset={Config.dataset}: expected the data of .*config.json'
  with pytest.raises(ValueError, match=message):
    searched(_config(), data=other, resume=True)
  with pytest.raises(ValueError, match=message):
    check_resumable(_config(), other, tmp_path / 'search')
  assert _files(tmp_path / 'search') == files


def test_a_folder_of_a_run_is_refused(searched, tmp_path):
  (tmp_path / 'search').mkdir()
  about = json.dumps(dataclasses.asdict(Config()))
  (tmp_path / 'search' / 'config.json').write_text(about)
  files = _files(tmp_path / 'search')
  with pytest.raises(ValueError, match='=bisection: expected none, as in'):
    searched(_config(max_runs=20), resume=True)
  assert _files(tmp_path / 'search') == files


def _edited(edit):
  """Damages the table of a search by a function of its lines."""
  return lambda text: ''.join(edit(text.splitlines(keepends=True)))


_DAMAGES = {
  'other weights': lambda text: text.replace(',1e-05,', ',2e-05,'),
  'a weight twice': _edited(lambda lines: [*lines[:2], *lines[1:]]),
  'another order': _edited(lambda lines: [lines[0], *lines[:0:-1]]),
  'no first level': _edited(lambda lines: [lines[0], *lines[3:]]),
  'another level': lambda text: text.replace('\n2,', '\n5,'),
  'half a level': _edited(lambda lines: [*lines[:2], *lines[3:]]),
  'a line too short': lambda text: text[: text.rindex(',')],
  'a line too long': lambda text: text[:-1] + ',1\n',
  'a line without cells': lambda text: text.replace(',0,1.0,1e-05,', ',', 1),
  'no levels': lambda text: text.replace('level', 'depth', 1),
  'no accuracy': lambda text: text.replace('accuracy_val', 'acc_val', 1),
  'words': lambda text: text.replace('1e-05', 'many'),
  'negative sizes': lambda text: text.replace(',148,', ',-148,'),
  'another table': lambda text: 'name,age\nAda,36\n',
  'no table': lambda text: 'The quick brown fox\njumps, over\n',
}


@pytest.mark.parametrize('damage', _DAMAGES.values(), ids=_DAMAGES.keys())
def test_a_table_of_another_search_is_refused(searched, tmp_path, damage):
  searched(_config())
  path = tmp_path / 'search' / 'results.csv'
  text = path.read_text()
  assert damage(text) != text
  path.write_text(damage(text))
  files = _files(tmp_path / 'search')
  message = r'results.csv: expected the trainings of this search \('
  with pytest.raises(ValueError, match=message):
    searched(_config(), resume=True)
  with pytest.raises(ValueError, match=message):
    check_resumable(_config(), _DATA, tmp_path / 'search')
  assert _files(tmp_path / 'search') == files


def test_a_damaged_table_is_refused_in_one_way(searched, tmp_path):
  """Cut off anywhere, or with any other byte: no error but a ValueError."""
  config = _config(max_runs=3)
  searched(config)
  path = tmp_path / 'search' / 'results.csv'
  whole = path.read_bytes()
  random = np.random.default_rng(0)
  tables = [whole[:n] for n in range(0, len(whole), 3)]
  for _ in range(200):
    damaged = bytearray(whole)
    damaged[random.integers(len(whole))] = random.integers(256)
    tables.append(bytes(damaged))
  refused = 0
  for table in tables:
    path.write_bytes(table)
    try:
      check_resumable(config, _DATA, tmp_path / 'search')
    except ValueError:
      refused += 1
  # One digit of an objective is as good as another.
  assert refused > len(tables) / 2


def test_real_networks_are_searched_and_kept(tmp_path):
  """A level and the knee are a program each: 10 s to compile."""
  data = load_dataset('mnist5k', val_size=320, train_size=320)
  config = Config(
    search='grid',
    search_range=(1e-3, 3e-1),
    max_runs=4,
    batch_size=8,
    epochs=3,
    search_epochs=1,
    seed=(3, 5),
    learning_rate=1e-2,
  )
  console = Console(file=io.StringIO(), width=100)
  found = search(Job(config, Dropping(0.0), data, tmp_path, console=console))
  rows = _read(tmp_path)
  (knee,) = (row['weight_l1'] for row in rows if row['knee'])
  assert [(row['level'], row['seed']) for row in rows] == [(1, 3)] * 4
  assert [row['seed'] for row in found] == [3, 5]
  folder = f'knee_l1_{knee:g}'
  assert {path.name for path in tmp_path.iterdir()} == {
    'config.json',
    'front.png',
    'level_1',
    folder,
    'results.csv',
    'search.png',
  }
  for name in ('front.png', 'search.png'):
    assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'
  # The tables tell of the networks that are there.
  for where, table, epochs in (('level_1', rows, 1), (folder, found, 3)):
    lines = (tmp_path / where / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['epoch'] == epochs
    for row in table:
      name = f'members/l1_{row["weight_l1"]:g}_seed_{row["seed"]:g}.npz'
      # Relative to the folder that the table lies in.
      home = tmp_path if table is rows else tmp_path / where
      assert home / row['file'] == tmp_path / where / name
      net = load(home / row['file'])
      kernel = net.params['layer1']['kernel']
      assert np.count_nonzero(kernel) == row['nonzeros']
      for split in ('val', 'test'):
        images, labels = getattr(data, split)
        logits = Dropping(0.0).apply(net.variables, net.preprocess(images))
        expected = (logits.argmax(axis=1) == labels).mean()
        if (where, split) == ('level_1', 'test'):
          expected = math.nan  # Levels do not look at the test set.
        np.testing.assert_allclose(
          row[f'accuracy_{split}'], expected, rtol=1e-6
        )
