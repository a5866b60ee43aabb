"""Losses other than cross entropy: values, names of columns, refusals.

Networks here are so small that a run takes 2 to 4 s, nearly all of it
compilation.
"""

import csv
import io
import json
import re

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mopt import training
from mopt.training import evaluation
from mopt.training import knee_search
from mopt.training import plots
from mopt.training import records
from mopt.training import single_run
from mopt.training.data import check_data
from mopt.training.data import Split
from mopt.training.loss import check_names
from mopt.training.loss import check_shapes
from mopt.training.program import make_program
from tests.devices import first_devices

pytestmark = pytest.mark.usefixtures('exact_products')

# 250 examples are scored at once, and 32 trained on: no split is a multiple.
SIZES = 299, 33, 57


class Net(nn.Module):
  """Outputs of the shape of a label, or `[batch, 1]`."""

  shape: tuple[int, ...] = (1,)

  @nn.compact
  def __call__(self, inputs):
    x = inputs.reshape(len(inputs), -1)
    x = nn.relu(nn.Dense(12, name='layer1')(x))
    x = nn.Dense(int(np.prod(self.shape)), name='layer2')(x)
    return x.reshape(-1, *self.shape)


def axes(x):
  return tuple(range(1, x.ndim))


SQUARES = training.Loss(
  per_example=lambda y, t: ((y - t.reshape(y.shape)) ** 2).mean(axes(y)),
  score=lambda y, t: abs(y - t.reshape(y.shape)).max(axes(y)) < 0.5,
  name='mse',
  score_name='close',
)
# A score that is no share, and below 0.
NEGATIVE = SQUARES._replace(
  score=lambda y, t: -SQUARES.per_example(y, t), score_name='minus_mse'
)


def make_data(shape=(), sizes=SIZES, seed=0):
  """A function of five of six features, in units of their own."""
  random = np.random.default_rng(seed)
  x = random.normal(size=(sum(sizes), 6))
  entries = int(np.prod(shape))
  y = np.tanh(x[:, :5]) @ random.normal(size=(5, entries))
  y = y.reshape(len(x), *shape)
  x = x * [1, 10, 0.1, 1, 1, 1] + [0, 30, 0, 0, 0, 0]
  train, val, test = sizes
  data = training.make_dataset(
    'features', (x[test:], y[test:]), (x[:test], y[:test]), val
  )
  assert [len(s.labels) for s in (data.train, data.val, data.test)] == [*sizes]
  assert len(data.train.labels) == train
  return data


def quiet():
  return Console(quiet=True)


def forward(net, inputs):
  """What `Net` computes, in NumPy and float64."""
  x = (np.asarray(inputs, np.float64) - net.mean) / net.std
  for name in ('layer1', 'layer2'):
    layer = net.params[name]
    x = x @ layer['kernel'].astype(np.float64) + layer['bias']
    x = np.maximum(x, 0) if name == 'layer1' else x
  return x


def expected(net, split):
  """Mean loss and score of `SQUARES`, in NumPy and float64."""
  labels = np.asarray(split.labels, np.float64).reshape(len(split.labels), -1)
  error = forward(net, split.images) - labels
  # None so close to the bound that rounding decides.
  most = np.abs(error).max(axis=1)
  assert (np.abs(most - 0.5) > 1e-5).all()
  return (error**2).mean(axis=1).mean(), (most < 0.5).mean()


def test_cross_entropy_by_name_gives_the_bits_of_the_default():
  digits = training.load_dataset('mnist5k')
  few = lambda split, n: Split(split.images[:n], split.labels[:n])
  data = digits._replace(train=few(digits.train, 70), val=few(digits.val, 9))
  config = training.Config(l1=(1e-3,), epochs=2)
  default = training.Job(config, Net((10,)), data, devices=first_devices(1))
  # And its formula, written out.
  own = training.Loss(
    lambda logits, labels: (
      -jnp.take_along_axis(
        jax.nn.log_softmax(logits), labels[:, None], axis=-1
      )[:, 0]
    ),
    training.cross_entropy.score,
    *('ce', 'accuracy', True),
  )
  states, scores = [], []
  for job in (
    default,
    default._replace(loss=training.cross_entropy),
    default._replace(loss=own),
  ):
    program = make_program(job)
    state = program.prune(program.init())
    for epoch in range(2):
      state, metrics = program.epoch(state, epoch)
    states.append(jax.device_get(state))
    scores.append((metrics.loss, *program.evaluate(state, 'val')))
  for a, b in zip(*map(jax.tree.leaves, states[:2]), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(*scores[:2])
  np.testing.assert_allclose(scores[0], scores[2], rtol=1e-4)


@pytest.mark.parametrize(
  ('num_devices', 'shape', 'settings'),
  [
    (1, (), {'l1': (1e-3,), 'seed': (0, 1)}),
    (4, (), {'optimizer': 'madam', 'parallel': 'data'}),
    (4, (3, 2), {'l1': (1e-4, 1e-3), 'seed': (0, 1), 'parallel': 'members'}),
    (4, (2,), {'l1': (1e-3,), 'parallel': 'data', 'stream': True}),
  ],
)
def test_values_are_those_of_numpy_whatever_has_the_examples(
  tmp_path, monkeypatch, num_devices, shape, settings
):
  # Parts of a streamed split, the last one not full.
  monkeypatch.setattr(evaluation, '_STREAMED', 100)
  data = make_data(shape)
  assert data.num_classes == int(np.prod(shape))
  config = training.Config(epochs=3, batch_size=32, **settings)
  devices = first_devices(num_devices)
  job = training.Job(
    *(config, Net(shape or (1,)), data, tmp_path, devices, quiet()),
    loss=SQUARES,
  )
  rows = training.run(job)
  assert len(rows) == len(config.seed) * len(config.all_weights)
  for row in rows:
    net = training.load(tmp_path / row['file'])
    assert net.num_classes == data.num_classes
    for name in ('train', 'val', 'test'):
      loss, score = expected(net, getattr(data, name))
      assert row[f'mse_{name}'] == pytest.approx(loss, rel=1e-5)
      assert row[f'close_{name}'] == pytest.approx(score, rel=1e-6)


def test_fillers_of_a_batch_count_nothing(four_devices):
  """An epoch of one step, on 299 examples in four shares of 75."""
  data = make_data((2,))
  config = training.Config(
    l1=(1e-3,), epochs=1, batch_size=299, prune='none', parallel='data'
  )
  program = make_program(
    training.Job(config, Net((2,)), data, devices=four_devices, loss=SQUARES)
  )
  state = program.init()
  before = program.evaluate(state, 'train')
  _, metrics = program.epoch(state, 0)
  np.testing.assert_allclose(metrics.loss, before.loss, rtol=1e-5)
  np.testing.assert_allclose(metrics.score, before.score, rtol=1e-6)
  # No convolutions, and so no penalty of them.
  np.testing.assert_allclose(metrics.values[:, 0], metrics.loss, rtol=1e-6)


@pytest.fixture(scope='module')
def regression(tmp_path_factory):
  """A run with a score below 0, its rows, and what it has printed."""
  folder = tmp_path_factory.mktemp('regression')
  config = training.Config(l1=(1e-4, 1e-1), epochs=2, seed=(0, 1))
  console = Console(width=200, record=True, file=io.StringIO())
  job = training.Job(
    config, Net(), make_data(), folder, first_devices(1), console, loss=NEGATIVE
  )
  return job, training.run(job), console.export_text()


def test_all_files_speak_of_the_loss(regression):
  job, rows, text = regression
  with (job.workdir / 'results.csv').open() as file:
    (first, *_) = csv.DictReader(file)
  log = (job.workdir / 'metrics.jsonl').read_text().splitlines()
  records_ = [json.loads(line) for line in log]
  for split in ('train', 'val', 'test'):
    for name in ('mse', 'minus_mse'):
      assert f'{name}_{split}' in first
      assert (f'{name}_{split}' in records_[0]) == (split != 'test')
  for names in (first, records_[0]):
    assert not [k for k in names if re.match('(ce|accuracy)_', k)]
  for row in rows:
    assert row['minus_mse_val'] == pytest.approx(-row['mse_val'], rel=1e-5)
  assert 'accuracy' not in text
  assert '%' not in text
  assert re.search(r'epoch 2/2 .* val minus_mse -', text)
  assert 'front and knee: (1 - validation minus_mse, log nonzeros)' in text
  assert f'{rows[0]["minus_mse_test"]:.4g}' in text


def test_front_and_status_go_by_the_score(regression):
  """Points far above 1 in error, of which classes know nothing."""
  _, rows, _ = regression
  assert [row['status'] for row in rows] == ['ok'] * len(rows)
  points = [(-row['minus_mse_val'], row['nonzeros']) for row in rows]
  keep = [
    not any(
      other[0] <= point[0] and other[1] <= point[1] and other != point
      for other in points
    )
    for point in points
  ]
  assert [row['pareto'] for row in rows] == keep


def test_the_best_checkpoint_is_kept_where_errors_are_above_1(regression):
  """Orbax keeps that of the largest score: it must tell populations apart."""
  job, *_ = regression
  scores = [
    json.loads(path.read_text())['score']
    for path in (job.workdir / 'checkpoints').rglob('metrics/metrics')
  ]
  assert len(scores) == 2
  assert len(set(scores)) == 2
  assert min(scores) > 0


def test_pictures_show_what_the_score_is(tmp_path, regression, monkeypatch):
  labels = []
  axes_ = plots.figure.Figure().add_subplot()
  before = type(axes_).set_ylabel
  monkeypatch.setattr(
    type(axes_),
    'set_ylabel',
    lambda self, text, *a, **k: (labels.append(text), before(self, text))[1],
  )
  _, rows, _ = regression
  rows = [dict(row) for row in rows]
  plots.plot_front(tmp_path / 'a.png', rows, '', 'val', loss=NEGATIVE)
  plots.plot_search(
    tmp_path / 'b.png', [0.0, 1.0], '', error=NEGATIVE.error('')
  )
  assert [x for x in labels if x and x != 'l1 weight'] == [
    'validation minus_mse',
    'hypervolume in (1 - minus_mse, ln nonzeros)',
  ]


@pytest.mark.parametrize('bad', [np.inf, -np.inf, np.nan])
def test_a_score_that_is_not_finite_on_one_split_is_a_failure_there(
  tmp_path, regression, bad
):
  """An example of validation alone may be one that a score has no number for.

  `mopt.knee` takes finite points only, after the whole training.
  """
  _, rows, _ = regression
  rows = [dict(row) for row in rows]
  rows[0]['minus_mse_val'] = bad
  records.mark_front(rows, 'val', NEGATIVE)
  assert rows[0]['pareto'] == 0
  assert sum(row['pareto'] for row in rows) > 0
  records.mark_front(rows, 'train', NEGATIVE)
  plots.plot_front(tmp_path / 'a.png', rows, '', 'val', loss=NEGATIVE)
  found = knee_search.hypervolumes(rows, 'val', loss=NEGATIVE)
  assert found[0] == 0
  assert np.isfinite(found).all()
  single_run.table(('error', 'l1'), rows, 'val', NEGATIVE)
  with_train = rows[0] | {'minus_mse_train': bad}
  assert records.judged(with_train, 'train', NEGATIVE) is None


@pytest.mark.parametrize(
  ('strategy', 'held_out', 'select_on', 'epochs'),
  [
    ('grid', 33, 'test', 2),
    ('dichotomic', 33, 'val', 2),
    ('bisection', 0, 'val', 20),
  ],
)
def test_a_search_goes_by_the_loss(
  tmp_path, strategy, held_out, select_on, epochs
):
  """Each level compiles: up to 10 s."""
  data = make_data(sizes=(100, held_out, 57))
  config = training.Config(
    search=strategy,
    max_runs=3,
    epochs=1,
    search_epochs=epochs,
    select_on=select_on,
    learning_rate=1e-2 if strategy == 'bisection' else 1e-3,
    search_range=(1e-3, 1e-1),
  )
  job = training.Job(
    *(config, Net(), data, tmp_path, first_devices(1), quiet()), loss=NEGATIVE
  )
  training.search(job)
  rows = records.read_rows(tmp_path / 'results.csv')
  assert len(rows) >= 3
  split = select_on if held_out else 'train'
  for row in rows:
    assert np.isfinite([row['mse_train'], row[f'minus_mse_{split}']]).all()
  # What was asked for follows from what the strategy is told.
  again = knee_search.make_strategy(config)
  state = again.init()
  while not again.done(state):
    weights = again.ask(state).tolist()
    level = [row for row in rows if row['level'] == state.level + 1]
    assert [row['weight_l1'] for row in level] == weights
    points = [
      (row[f'mse_{split}'], row['l1'])
      if strategy == 'dichotomic'
      else (1 - row[f'minus_mse_{split}'], np.log(row['nonzeros']))
      for row in level
    ]
    state = again.tell(state, weights, points)
  assert again.done(state)
  assert state.level == rows[-1]['level']
  assert (tmp_path / 'front.png').exists()
  # It goes on with its own loss, and with no other.
  assert training.check_resumable(config, data, tmp_path, NEGATIVE) == []
  with pytest.raises(ValueError, match='expected the columns close_train and'):
    training.check_resumable(config, data, tmp_path, SQUARES)


def test_a_folder_of_another_loss_is_refused(regression):
  job, rows, _ = regression
  assert len(training.run(job)) == len(rows)
  with pytest.raises(
    ValueError,
    match=r'results.csv: expected the columns close_train and mse_train of '
    'this loss, got minus_mse_train, mse_train; or another workdir',
  ):
    training.run(job._replace(loss=SQUARES))


def _classes(split):
  return Split(split.images, np.arange(len(split.labels), dtype=np.int32) % 3)


def test_a_loss_of_classes_is_judged_as_cross_entropy_is():
  """Its labels, its logits, and chance."""
  own = training.cross_entropy._replace(
    per_example=lambda y, t: ((y - jax.nn.one_hot(t, 3)) ** 2).sum(-1),
    name='brier',
  )
  data = make_data()
  few = data._replace(
    num_classes=3,
    **{k: _classes(getattr(data, k)) for k in ('train', 'val', 'test')},
  )
  training.check_fit(training.Config(), Net((3,)), few, own)
  with pytest.raises(ValueError, match=r'expected logits \[batch, 3\]'):
    training.check_fit(training.Config(), Net((4,)), few, own)
  with pytest.raises(ValueError, match='expected integers as labels'):
    training.check_fit(
      training.Config(), Net((3,)), data._replace(num_classes=3), own
    )


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    # What is broadcast, and sums over examples.
    (lambda y, t: (y - t[None]) ** 2, r'float32\[1, 1\]'),
    (lambda y, t: ((y[:, 0] - t) ** 2).sum(), r'float32\[\]'),
    (lambda y, t: y.mean(axis=0), r'for outputs float32\[2, 1\]'),
    (lambda y, t: y[:, 3:].sum(axis=-1) > t, r'got bool\[1\]'),
    (lambda y: y, 'got TypeError: '),
    (lambda y, t: jnp.concatenate([y, t]), 'got TypeError: '),
    (lambda y, t: 'text', 'got TypeError: '),
    (None, 'got '),
  ],
)
def test_a_loss_that_gives_no_number_an_example_is_refused(function, message):
  loss = SQUARES._replace(per_example=function)
  with pytest.raises(ValueError) as caught:
    training.check_fit(training.Config(), Net(), make_data(), loss)
  text = str(caught.value)
  assert text.startswith('loss=mse: expected per_example to give floats [')
  assert re.search(r'outputs float32\[\d, 1\] and labels float32\[\d\]', text)
  assert re.search(message, text)
  assert '\n' not in text


def test_a_score_is_any_real_number():
  outputs = jax.ShapeDtypeStruct((3, 1), jnp.float32)
  labels = jax.ShapeDtypeStruct((3,), jnp.int32)
  for dtype in (jnp.bool_, jnp.int32, jnp.float32, jnp.bfloat16):
    score = lambda y, t, dtype=dtype: y[:, 0].astype(dtype)
    check_shapes(SQUARES._replace(score=score), outputs, labels)
  score = lambda y, t: y[:, 0].astype(jnp.complex64)
  message = (
    r'mse: expected score to give real numbers \[3\].*got complex64\[3\]'
  )
  with pytest.raises(ValueError, match=message):
    check_shapes(SQUARES._replace(score=score), outputs, labels)


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (('mse', 'mse'), "expected another name for the score, got 'mse'"),
    (('mean error', 'score'), "got 'mean error'"),
    (('', 'score'), "got ''"),
    (('mse', 'nonzeros'), "nonzeros or weight, got 'nonzeros'"),
    (('weight_decay', 'score'), "got 'weight_decay'"),
    (('mse', None), 'got None'),
  ],
)
def test_names_that_columns_cannot_have_are_refused(names, message):
  loss = SQUARES._replace(name=names[0], score_name=names[1])
  with pytest.raises(ValueError, match=re.escape(message)):
    check_names(loss)
  with pytest.raises(ValueError, match=re.escape(message)):
    training.check_fit(training.Config(), Net(), make_data(), loss)


def _labels(data, name, change):
  split = getattr(data, name)
  return data._replace(
    **{name: split._replace(labels=change(split.labels.copy()))}
  )


def _with(value):
  def change(labels):
    labels[5] = value
    return labels

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      _with(np.nan),
      r'labels that are finite in float32 .* val, got nan at \[5',
    ),
    (_with(np.inf), 'finite in float32 in the split val, got inf'),
    (lambda x: x[1:], r'label for each of the 33 .* val, .* got shape \(32,\)'),
    (lambda x: x[:, None], r'one size, as in train, got shape \(33, 1\)'),
    (
      lambda x: x.astype(np.float64),
      'labels in float32 .* val, .* got float64',
    ),
    (lambda x: x.astype(str), 'numbers as labels of the split val, got <U'),
  ],
)
def test_labels_that_no_loss_can_take_are_refused(change, message):
  data = _labels(make_data(), 'val', change)
  for check in (
    lambda: check_data(data, classes=False),
    lambda: training.check_fit(training.Config(), Net(), data, SQUARES),
  ):
    with pytest.raises(ValueError, match=message) as caught:
      check()
    assert str(caught.value).startswith('dataset=features: expected ')


def test_empty_splits_and_outputs_are_refused():
  data = make_data()
  check = lambda data: check_data(data, classes=False)
  nothing = Split(data.val.images[:0], data.val.labels[:0])
  check(data._replace(val=nothing))
  with pytest.raises(ValueError, match='examples in the split test, got none'):
    check(data._replace(test=nothing))
  with pytest.raises(ValueError, match='at least 1 output, got 0'):
    check(data._replace(num_classes=0))
  for name in ('train', 'val', 'test'):
    data = _labels(data, name, lambda x: x[:, None][:, :0])
  with pytest.raises(ValueError, match=r'got shape \(299, 0\)'):
    check(data)


def test_whole_numbers_beyond_int32_are_refused():
  """JAX would take their last 32 bits."""
  x, y = np.ones((8, 2)), np.arange(8) + 2**31
  with pytest.raises(ValueError, match='labels that int32 can hold .* 2147483'):
    training.make_dataset('counts', (x, y), (x, y))


@pytest.mark.parametrize(
  ('labels', 'dtype', 'num_classes'),
  [
    (np.arange(20), np.int32, 1),
    (np.arange(20, dtype=np.uint8), np.int32, 1),
    (np.arange(20) > 3, np.float32, 1),
    (np.arange(120.0).reshape(20, 3, 2), np.float32, 6),
    (list(range(20)), np.int32, 1),
  ],
)
def test_arrays_become_a_data_set(labels, dtype, num_classes):
  x = np.random.default_rng(0).normal(size=(20, 4)) * [1, 2, 3, 0] + 7
  data = training.make_dataset('mine', (x, labels), (x[:5], labels[:5]), 6)
  assert data.num_classes == num_classes
  for split in (data.train, data.val, data.test):
    assert split.labels.dtype == dtype
    assert split.images.dtype == np.float32
  # Every example is in one split, with its own label, in the given order.
  both = [*zip(*data.train), *zip(*data.val)]
  assert sorted(float(np.sum(a)) for a, _ in both) == pytest.approx(
    sorted(x.astype(np.float32).sum(axis=1).tolist())
  )
  place = {tuple(row): i for i, row in enumerate(x.astype(np.float32))}
  for row, label in both:
    np.testing.assert_array_equal(label, np.asarray(labels)[place[tuple(row)]])
  places = [place[tuple(row)] for row in data.train.images]
  assert places == sorted(places)
  assert len(places) == 14
  np.testing.assert_allclose(data.mean, data.train.images.mean(axis=0))
  assert data.std[3] == 1
  again = training.make_dataset('mine', (x, labels), (x[:5], labels[:5]), 6)
  np.testing.assert_array_equal(data.val.images, again.val.images)
  default = training.make_dataset('mine', (x, labels), (x[:5], labels[:5]))
  assert len(default.val.labels) == 2


def test_pictures_stay_pictures():
  x = np.zeros((10, 4, 4, 1), np.uint8)
  data = training.make_dataset('mine', (x, x / 255.0), (x, x / 255.0), 0)
  assert data.train.images.dtype == np.uint8
  assert (data.mean, data.std) == (0.0, 255.0)
  assert data.num_classes == 16


@pytest.mark.parametrize('val_size', [-1, 8])
def test_a_bad_size_of_validation_is_refused(val_size):
  x = np.ones((8, 2))
  with pytest.raises(ValueError, match=f'val_size={val_size}: expected 0 to 7'):
    training.make_dataset('mine', (x, x), (x, x), val_size)
