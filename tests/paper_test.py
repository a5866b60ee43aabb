"""The tables and figures of the paper: what is trained, kept and shown."""

import dataclasses
import json
import math
import pathlib
import re

from matplotlib import image
import numpy as np
import pytest

from benchmarks.paper import __main__ as cli
from benchmarks.paper import pieces
from benchmarks.paper import plan
from benchmarks.paper import searches
from benchmarks.paper import tables
import models
from mopt.training import files
from mopt.training import records as training_results
from mopt.training.config import Config
import train

_ALL = [
  (training, is_quick)
  for training in plan.TRAININGS
  for is_quick in (False, True)
]


@pytest.fixture
def parse(monkeypatch):
  """Settings and working directory that flags of train.py ask for."""
  monkeypatch.chdir(pieces.ROOT)

  def forget():
    train.FLAGS.unparse_flags()
    for name in train.FLAGS:
      if train.FLAGS[name].present:
        train.FLAGS[name].unparse()

  def run(arguments):
    forget()
    train.FLAGS(['train.py', *arguments])
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: train.FLAGS[name].value for name in names})
    return config, train.FLAGS.workdir

  yield run
  forget()


_LAYERS = ('layer1', 'layer2', 'layer3')
_NAMES = ('seed', 'weight_error', 'weight_l1')


class FakeTrainer:
  """In place of a process of train.py: leaves made-up files, at once."""

  def __init__(self, parse):
    self.parse = parse
    self.commands = []
    self.code = 0

  def __call__(self, command):
    self.commands.append(command)
    config, workdir = self.parse(command[2:])
    workdir = pieces.ROOT / workdir
    workdir.mkdir()
    if not self.code:
      _leave_files(config, workdir)
    return self.code


def _leave_files(config, workdir):
  about = dataclasses.asdict(config)
  device = 'NVIDIA H100 80GB HBM3' if config.model == 'vgg' else 'cpu'
  about['environment'] = {'jax': '0', 'devices': [device]}
  about['seconds'] = 1.5
  files.write_json(workdir / 'config.json', about)
  if config.is_search:
    _leave_search(config, workdir)
    return
  layers = _LAYERS
  if config.model == 'vgg':
    layers = ('denselayer',)
  rows = [
    _made_up_row(weights and weights[1], seed, layers)
    for seed in config.seed
    for weights in config.all_weights
  ]
  training_results.mark_front(rows, 'train')
  files.write_csv(workdir / 'results.csv', rows)
  for epoch in range(1, config.epochs + 1):
    records = [_made_up_epoch(epoch, row, config) for row in rows]
    files.append_jsonl(workdir / 'metrics.jsonl', records)
  random = np.random.default_rng(0)
  for when, epoch in (('initial', 0), ('epoch', 5), ('final', config.epochs)):
    records = [
      {'epoch': epoch, 'when': when, **{k: row[k] for k in _NAMES}}
      | {'layer': layer}
      | training_results.weight_histogram(random.normal(size=840))
      for row in rows
      for layer in layers
    ]
    files.append_jsonl(workdir / 'histograms.jsonl', records)


def _leave_search(config, workdir):
  low, high = config.search_range
  rows = [
    {'level': level} | _made_up_row(float(l1), config.seed[0], _LAYERS)
    for level, l1 in enumerate(np.geomspace(high, low, config.max_runs), 1)
  ]
  training_results.mark_front(rows, 'val')
  files.write_csv(workdir / 'results.csv', rows)
  for row in rows:
    if row['knee']:
      folder = workdir / f'knee_l1_{row["weight_l1"]:g}'
      folder.mkdir()
      files.write_csv(folder / 'results.csv', [row])


def _made_up_row(l1, seed, layers):
  weight = 1e-5 if l1 is None else max(l1, 1e-6)
  error = 0.01 + 20 * weight + 1e-4 * seed
  counts = [int(0.5 / weight**0.8) for _ in layers]
  row = dict(zip(_NAMES, (seed, None if l1 is None else 1.0, l1)))
  row |= {f'ce_{s}': 3 * error for s in ('train', 'val', 'test')}
  row |= {'l1': 0.1 / weight, 'nonzeros': sum(counts)}
  row |= {f'nonzeros_{n}': count for n, count in zip(layers, counts)}
  row |= {f'accuracy_{s}': 1 - error for s in ('train', 'val', 'test')}
  row |= {'params': 60_000, 'nonzeros_all': sum(counts) + 200}
  return row | {'status': 'ok', 'file': f'members/{l1}_{seed}.npz'}


def _made_up_epoch(epoch, row, config):
  counts = {k: v * (2 - 1 / epoch) for k, v in row.items() if 'nonzeros' in k}
  weight = 1e-5 if row['weight_l1'] is None else row['weight_l1']
  val = math.nan if config.val_size == 0 else row['accuracy_val']
  return {
    **{'epoch': epoch, 'seed': row['seed']},
    **{'weight_error': 1.0, 'weight_l1': weight},
    **{'weight_l1_min': 0.1 * weight, 'weight_l1_max': 3 * weight},
    **{'ce_train': 1 / 3 / epoch, 'accuracy_train': row['accuracy_train']},
    **{'ce_val': val, 'accuracy_val': val},
    **counts,
  }


@pytest.fixture
def trainer(parse):
  return FakeTrainer(parse)


@pytest.fixture
def places(tmp_path):
  return pieces.Places(tmp_path / 'results', tmp_path / 'work')


@pytest.fixture
def run(tmp_path, trainer, monkeypatch, capsys):
  """Calls the command line; returns its exit code, output and errors."""
  monkeypatch.setattr(cli, '_RESULTS', tmp_path / 'benchmarks')
  monkeypatch.setattr(cli, '_RUNS', tmp_path / 'runs')
  monkeypatch.setattr(cli, 'has_accelerator', lambda: False)

  def call(*argv):
    code = 0
    try:
      cli.main(argv, trainer)
    except SystemExit as stop:
      code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return call


def _piece(training, seed, quick=False):
  return plan.pieces(training, seed, quick)[0]


def _result(name, rows, seed=0, quick=False):
  config = dict(model='lenet5', dataset='mnist', epochs=30, seed=[seed])
  return pieces.Result(name, quick, [], config, rows, {}, [])


def _row(l1, nonzeros, accuracy_test, **others):
  layers = dict(zip(('nonzeros_layer1', 'nonzeros_layer2'), (nonzeros - 1, 1)))
  names = ('ce_train', 'ce_test', 'l1', 'accuracy_train')
  row = {'weight_l1': l1, 'nonzeros': nonzeros, 'accuracy_test': accuracy_test}
  return row | layers | dict.fromkeys(names, 0.5) | others


@pytest.mark.parametrize(('training', 'is_quick'), _ALL)
def test_flag_files_are_settings_of_the_trainer(parse, training, is_quick):
  config, _ = parse(_piece(training, 3, is_quick).flags)
  is_cifar10 = config.dataset == 'cifar10'
  assert config.model == ('vgg' if is_cifar10 else 'lenet5')
  assert config.model in models.NAMES
  assert config.seed == (3,)
  if config.is_search:
    assert config.max_runs == (4 if is_quick else 20)
    assert config.search_epochs == (1 if is_quick else 10)
  else:
    assert len(config.all_weights) <= (4 if is_quick else 16)
  if is_quick:
    assert config.epochs <= 2
    assert config.dataset == 'mnist5k' or config.train_size == 640
  else:
    assert config.epochs == (125 if is_cifar10 else 30)


def test_overrides_win_over_the_flag_files_they_are_made_of(parse):
  batchwise, _ = parse(_piece('table2c', 0).flags)
  after, _ = parse(_piece('table2a', 0).flags)
  same = dict(prune='after', l1=after.l1)
  assert (len(batchwise.l1), len(after.l1)) == (14, 5)
  assert dataclasses.replace(batchwise, **same) == after
  pruning = [parse(_piece(f'table2{x}', 0).flags)[0].prune for x in 'abc']
  assert pruning == ['after', 'epoch', 'batch']
  config, _ = parse(_piece('fig6c_constant_0.002', 0).flags)
  assert (config.schedule, config.threshold) == ('constant', 0.002)
  assert config.l1 == (0.004,)


@pytest.mark.parametrize('name', ['table2c', 'table2d'])
def test_all_rows_of_the_paper_are_trained(parse, name):
  configs = [parse(piece.flags)[0] for piece in plan.pieces(name, 0)]
  l1 = [l1 for config in configs for l1 in config.l1]
  assert l1 == [r['weight_l1'] for r in tables.paper_rows(name)]
  assert {config.val_size for config in configs} == {0}


def test_parts_of_a_training_are_one_result(run, tmp_path, monkeypatch):
  monkeypatch.setattr(cli, 'has_accelerator', lambda: True)
  code, out, err = run('table2d')
  assert (code, err) == (0, '')
  folder = tmp_path / 'benchmarks' / 'paper'
  paths = sorted(folder.glob('*.json'))
  names = [f'table2d_part{i}_seed0' for i in (1, 2, 3)]
  assert [path.stem for path in paths] == names
  parts = [pieces.load(path) for path in paths]
  merged = pieces.merge(parts)
  paper = tables.paper_rows('table2d')
  assert [row['weight_l1'] for row in merged.rows] == [
    row['weight_l1'] for row in paper
  ]
  assert merged.config['l1'] == [row['weight_l1'] for row in paper]
  seconds = [part.config['seconds'] for part in parts]
  assert merged.config['seconds'] == sum(seconds)
  lengths = [len(part.epochs['weight_l1']) for part in parts]
  assert len(merged.epochs['weight_l1']) == sum(lengths)
  assert 'not trained here' not in out
  assert merged.config['environment']['devices'] == ['NVIDIA H100 80GB HBM3']
  assert 'VGG on CIFAR10, 125 epochs, seed 0, one H100' in out
  other = parts[1]._replace(config=parts[1].config | {'epochs': 3})
  with pytest.raises(pieces.Failed, match='expected epochs'):
    pieces.merge([parts[0], other])


def test_the_numbers_of_the_paper():
  (row,) = (r for r in tables.paper_rows('table2c') if r['weight_l1'] == 3e-4)
  layers = [row[f'nonzeros_layer{i}'] for i in (1, 2, 3)]
  assert layers == [2107, 300, 170]
  assert (row['nonzeros'], row['accuracy_test']) == (2577, 0.985)
  assert len(tables.paper_rows('table2a')) == 16
  assert math.isnan(tables.paper_rows('table2b')[0]['accuracy_test'])
  assert tables.paper_rows('table2d')[-2]['nonzeros'] == 209
  for name in ('table2a', 'table2b', 'table2c', 'table2d'):
    source = pathlib.Path(tables.__file__).with_name(f'{name}.csv').read_text()
    assert source.startswith('# Reiners, Klamroth, Stiglmayr 2020, arXiv')


def test_a_piece_becomes_one_file_and_comes_back(trainer, places, capsys):
  piece = _piece('table2c', 1)
  assert pieces.train(piece, places, '/some/where', call=trainer)
  printed = capsys.readouterr().out
  assert printed.startswith(
    '$ python train.py --flagfile=benchmarks/paper/table2c.flags --seed=1 '
    '--data_dir=/some/where --workdir='
  )
  (path,) = places.results.iterdir()
  assert path.name == 'table2c_seed1.json'
  assert not (places.work / piece.name).exists()
  assert '/some/where' not in path.read_text()
  result = pieces.load(path)
  assert result.command[-1] == '--data_dir=DIR'
  assert result.config['epochs'] == 30
  assert result.config['seconds'] == 1.5
  row = _made_up_row(3e-4, 1, ('layer1', 'layer2', 'layer3'))
  # The networks are not kept.
  assert row.pop('file')
  assert 'file' not in result.rows[7]
  found = {name: result.rows[7][name] for name in row}
  assert found.pop('status') == row.pop('status') == 'ok'
  assert found == pytest.approx(row, rel=1e-5)
  assert isinstance(result.rows[7]['nonzeros'], int)
  assert result.epochs['ce_train'].shape == (30 * 14,)
  assert result.epochs['ce_train'][0] == 0.333333
  assert np.isnan(result.epochs['ce_val']).all()
  kept = [(h['weight_l1'], h['layer'], h['when']) for h in result.histograms]
  assert kept == [(5e-5, 'layer3', x) for x in ('initial', 'epoch', 'final')]


def test_a_result_is_of_a_size_to_be_kept(trainer, places):
  pieces.train(_piece('table2d', 0), places, call=trainer)
  (path,) = places.results.iterdir()
  assert path.stat().st_size < 400_000
  assert max(map(len, path.read_text().splitlines())) < 40_000


def test_what_is_there_is_not_trained_again(trainer, places):
  piece = _piece('table2b', 0, quick=True)
  assert pieces.train(piece, places, quick=True, call=trainer)
  assert not pieces.train(piece, places, quick=True, call=trainer)
  assert len(trainer.commands) == 1
  assert pieces.train(piece._replace(name='other'), places, call=trainer)


@pytest.mark.parametrize(('code', 'expected'), [(2, 2), (-9, 137)])
def test_a_failed_process_leaves_no_result(trainer, places, code, expected):
  piece = _piece('table2a', 0)
  trainer.code = code
  with pytest.raises(pieces.Failed, match=f'table2a_seed0.*{expected}') as info:
    pieces.train(piece, places, call=trainer)
  assert info.value.code == expected
  assert list(places.results.iterdir()) == []
  # What it left of its working directory does not stop the next one.
  trainer.code = 0
  assert pieces.train(piece, places, call=trainer)


def test_seeds_may_find_knees_of_their_own():
  folder = pieces.ROOT / 'benchmarks' / 'results' / 'paper'
  results = [
    pieces.load(path)
    for path in sorted(folder.glob('fig9_bisection_seed*.json'))
  ]
  assert len({result.config['knee'] for result in results}) > 1
  pieces.check_alike(results)
  other = results[0]._replace(config=results[0].config | {'epochs': 7})
  with pytest.raises(pieces.Failed, match='expected epochs=30.* got 7'):
    pieces.check_alike([*results, other])


def test_an_interrupted_process_leaves_no_result(run, tmp_path):
  def interrupt(command):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as stop:
    cli.main(['table2a', f'--results={tmp_path}/results'], interrupt)
  assert stop.value.code == 130
  assert list((tmp_path / 'results').iterdir()) == []


def test_a_process_without_its_files_has_failed(places):
  with pytest.raises(pieces.Failed, match=r'table2a_seed0: .*config.json'):
    pieces.train(_piece('table2a', 0), places, call=lambda command: 0)
  assert list(places.results.iterdir()) == []


def test_a_piece_is_trained_by_one_process_at_a_time(trainer, places):
  piece = _piece('table2a', 0)

  def second(command):
    with pytest.raises(pieces.Failed, match='being trained already'):
      pieces.train(piece, places, call=trainer)
    return trainer(command)

  assert pieces.train(piece, places, call=second)


def test_rows_that_are_worse_than_the_papers_are_marked():
  rows = [
    _row(1e-4, 6_000, 0.988),  # fewer weights, equally accurate
    _row(3e-4, 2_577, 0.9849),
    _row(5e-4, 1_705, 0.99),
    _row(7e-4, 1_527, 0.9809),
    _row(5e-3, 162, 0.90),  # where the paper's has collapsed
    _row(7e-3, 1, 0.11),  # with nothing in layer1
  ]
  found = tables.pairs([_result('table2c', rows)], 'table2c')
  assert [pair.worse for pair in found] == [
    (),
    ('accuracy',),
    ('nonzeros',),
    ('accuracy', 'nonzeros'),
    (),
    (),
  ]
  assert tables.dominated(found, 'table2c') == [(3e-4, 3e-4), (7e-4, 7e-4)]
  _, body = tables.cells(found)
  assert body[0][:2] == ['0.0001', '6,000 | 6,686']
  assert [line[-1] for line in body] == [
    '',
    'worse: accuracy',
    'worse: nonzeros',
    'worse: both',
    'paper: collapsed',
    'not in the paper, ours: 1 collapsed',
  ]


def test_several_seeds_are_a_mean_and_its_deviation():
  results = [
    _result('table2b', [_row(1e-4, 6_000 + 100 * seed, 0.98)], seed)
    for seed in (0, 1, 2)
  ]
  _, (line,) = tables.cells(tables.pairs(results, 'table2b'))
  assert line[1] == '6,100 ± 100 | 7,175'
  assert '98.00 ± 0.00 | –' in line
  assert 'seeds 0, 1, 2' in tables.title(results, 'table2b')
  assert 'could not be read' in tables.summary(results, 'table2b')[0]
  page = tables.markdown(results, 'table2b')
  assert 'python -m benchmarks.paper table2b --seed=0,1,2' in page


@pytest.mark.parametrize(
  ('machines', 'text'),
  [
    ([['cpu'], ['cpu', 'cpu']], ''),
    ([['NVIDIA H100 80GB HBM3']] * 2, ', one H100'),
    ([['NVIDIA A100-SXM4-40GB'] * 4, ['cpu']], ', 4 A100-SXM4s'),
    ([['TPU v5 lite'], ['NVIDIA L4']], ', one TPU v5 lite, one L4'),
  ],
)
def test_accelerators_are_named(machines, text):
  results = [_result('table2b', [], seed) for seed in range(2)]
  for result, devices in zip(results, machines):
    result.config['environment'] = {'devices': devices}
  title = tables.describe(results)
  assert title == f'LeNet-5 on MNIST, 30 epochs, seeds 0, 1{text}'


def test_parts_by_several_machines_name_each_of_them():
  parts = [_result('table2d', []) for _ in range(3)]
  for part, kind in zip(parts, ('NVIDIA L4', 'NVIDIA H100', 'NVIDIA L4')):
    part.config.update(l1=[0.0], seconds=1, environment={'devices': [kind]})
  merged = pieces.merge(parts)
  assert tables.hardware([merged]) == ['one L4', 'one H100']


_KEPT = pieces.ROOT / 'benchmarks' / 'results' / 'paper'


def _kept(name):
  paths = [_KEPT / f'{piece.name}.json' for piece in plan.pieces(name, 0)]
  return pieces.merge([pieces.load(path) for path in paths])


def test_what_is_kept_is_what_the_plan_trains(parse):
  of_name = {
    piece.name: piece
    for training in plan.TRAININGS
    for seed in (0, 1, 2)
    for piece in plan.pieces(training, seed)
  }
  for path in _KEPT.glob('*.json'):
    result, piece = pieces.load(path), of_name[path.stem]
    assert result.name == piece.name
    # Paths of the machine are left out.
    assert result.config['data_dir'] == 'DIR'
    assert not any(part.startswith('/') for part in result.command)
    # A setting that there was not yet, or left to the trainer, makes none.
    asked = json.loads(json.dumps(dataclasses.asdict(parse(piece.flags)[0])))
    # The same, by another name.
    asked['conv_l2'] = asked['conv_l2'] or 1e-4
    names = (asked.keys() & result.config.keys()) - {'data_dir'}
    assert len(names) > 25
    for name in names:
      kept = result.config[name]
      assert kept is None or kept == asked[name], (path, name)
    devices = result.config['environment']['devices']
    is_gpu = devices == ['NVIDIA H100 80GB HBM3']
    assert is_gpu if piece.needs_accelerator else {*devices} == {'cpu'}


@pytest.mark.parametrize('name', ['table2a', 'table2b', 'table2c', 'table2d'])
def test_tables_that_are_kept_are_made_of_what_is_kept(name):
  page = (_KEPT / f'{name}.md').read_text()
  notes = _KEPT / f'{name}_notes.md'
  made = tables.markdown([_kept(name)], name)
  assert page == made + ('\n' + notes.read_text() if notes.exists() else '')
  assert ('one H100' in made) == (name == 'table2d') == notes.exists()


def test_the_notes_beside_table_2d_have_its_numbers():
  ours = {row['weight_l1']: row for row in _kept('table2d').rows}
  papers = {row['weight_l1']: row for row in tables.paper_rows('table2d')}
  lines = (_KEPT / 'table2d_notes.md').read_text().splitlines()
  _, _, *rows = (line for line in lines if line.startswith('|'))
  assert len(rows) == 3
  to_other, to_paper = [], []
  for line in rows:
    cells = [cell.strip().replace(',', '') for cell in line.split('|')[1:-1]]
    l1, mine, paper = cells[0], ours[float(cells[0])], papers[float(cells[0])]
    assert cells[1] == str(mine['nonzeros']), l1
    assert cells[3] == f'{paper["nonzeros"]:.0f}', l1
    assert cells[4] == f'{100 * mine["accuracy_test"]:.2f}', l1
    to_other.append(float(cells[4]) - float(cells[5]))
    if math.isnan(paper['accuracy_test']):
      assert cells[6] == tables.MISSING, l1
    else:
      assert cells[6] == f'{100 * paper["accuracy_test"]:.1f}', l1
      to_paper += [float(cells[6]) - float(x) for x in cells[4:6]]
  text = ' '.join(lines)
  assert f'differ by {max(map(abs, to_other)):.1f} points at most' in text
  assert min(to_other) < 0 < max(to_other)
  assert f'{min(to_paper):.1f} to {max(to_paper):.1f} points above both' in text


def test_the_readme_has_the_numbers_of_table_2d():
  readme = (pieces.ROOT / 'README.md').read_text()
  (text,) = re.findall(r'\* \*\*VGG on CIFAR10\*\*.*?\n\n', readme, re.DOTALL)
  text = ' '.join(text.split())
  result = _kept('table2d')
  ours = {row['weight_l1']: row for row in result.rows}
  for l1 in (0, 7e-3, 0.03):
    row = ours[l1]
    assert f'{100 * row["accuracy_test"]:.2f} %' in text
    assert f'{row["nonzeros"]:,}' in text
  paper = {row['weight_l1']: row for row in tables.paper_rows('table2d')}
  below = [
    100 * (paper[x]['accuracy_test'] - ours[x]['accuracy_test']) for x in ours
  ]
  low, high = np.nanmin(below), np.nanmax(below)
  assert f'{low:.1f} to {high:.1f} points below' in text
  factor = max(ours[x]['nonzeros'] / paper[x]['nonzeros'] for x in ours)
  assert f'up to {factor:.1f} times' in text
  cost = 100 * (ours[0]['accuracy_test'] - ours[0.03]['accuracy_test'])
  gone = 100 * (1 - ours[0.03]['nonzeros'] / 20_480)
  assert f'{gone:.1f} % of the weights cost {cost:.1f} points' in text
  assert f'{result.config["seconds"] / 60:.0f} minutes' in text
  (multi,) = _kept('fig7_mrmsprop').rows
  assert f'{100 * multi["accuracy_test"]:.2f} %' in text
  assert f'{multi["nonzeros"]:,}' in text
  found = _kept('fig7_mrmsprop').epochs['weight_l1']
  assert f'{found[0]:.0e} in the first'.replace('e-0', 'e-') in text
  assert f'{found[-1]:.0e} in the last'.replace('e-0', 'e-') in text


def test_hypervolume_in_test_error_and_log_nonzeros():
  total = 58_920
  rows = [
    _row(1e-4, total / math.e**2, 0.96),
    _row(1e-3, total / math.e**3, 0.955),
    _row(2e-3, total / math.e**3, 0.94),  # too inaccurate
    _row(0.0, total, 0.999),  # nothing pruned
    _row(1e-2, 1, 0.97, nonzeros_layer2=0),  # collapsed
  ]
  # 0.01 * 2 by the first, and 0.005 * 1 more by the second.
  assert tables.hypervolume(rows) == pytest.approx(0.025)
  assert tables.hypervolume([]) == 0
  # More than its row of 3e-4 alone.
  paper = tables.hypervolume(tables.paper_rows('table2c'))
  assert paper > (0.05 - 0.015) * math.log(58_920 / 2_577)


def test_fewest_nonzeros_at_an_accuracy():
  paper = tables.paper_rows('table2c')
  fewest = [tables.fewest(paper, x) for x in (0.985, 0.989, 0.979, 0.995)]
  assert fewest[:3] == [2577, 7054, 1056]
  assert math.isnan(fewest[3])


def test_float32_accuracies_reach_their_decimal(trainer, places):
  row = _row(3e-4, 100, 0.9889999628067017)  # 9,890 of 10,000, by XLA

  def call(command):
    trainer(command)
    workdir = places.work / 'table2c_seed0'
    files.write_csv(workdir / 'results.csv', [row])
    return 0

  pieces.train(_piece('table2c', 0), places, call=call)
  result = pieces.load(places.results / 'table2c_seed0.json')
  assert tables.fewest(result.rows, 0.989) == 100


def test_every_table_and_figure_is_made(run, tmp_path, trainer):
  code, out, err = run('all', '--seed=0,1')
  assert (code, err) == (0, '')
  assert 'Left out: table2d, fig6, ' in out
  folder = tmp_path / 'benchmarks' / 'paper'
  names = {path.name for path in folder.iterdir()}
  assert {'table2c.md', 'table2b.md', 'rates.md'} < names
  assert not {'table2d.md', 'fig6.png'} & names
  assert 'Hypervolume' in out
  pictures = [path for path in folder.iterdir() if path.suffix == '.png']
  figures = {'fig3', 'fig4', 'fig5', 'fig7', 'fig8', 'fig9'}
  figures |= {'drift', 'front', 'strategies'}
  assert {path.stem for path in pictures} == figures
  # Once per training and seed, and nothing for an accelerator. Two searches
  # have a third seed of their own.
  assert len(trainer.commands) == 2 * 20 + 2
  for path in pictures:
    _check_picture(path)


def test_what_is_there_is_shown_without_an_accelerator(
  run, tmp_path, monkeypatch, trainer
):
  folder = tmp_path / 'benchmarks' / 'paper'
  code, out, err = run('fig6')
  assert (code, out, trainer.commands) == (2, '', [])
  assert 'fig6: expected an accelerator' in err
  with monkeypatch.context() as patch:
    patch.setattr(cli, 'has_accelerator', lambda: True)
    run('table2d')
  assert len(trainer.commands) == 3
  for path in (folder / 'table2d.md', *folder.glob('*.png')):
    path.unlink()
  # The table, and Fig. 6 without its third panel.
  monkeypatch.setattr(plan, 'NAMES', {n: plan.NAMES[n] for n in plan.LEFT_OUT})
  code, out, err = run('all')
  assert (code, err, len(trainer.commands)) == (0, '', 3)
  assert 'Left out' not in out
  assert 'fig6: left out fig6c_constant_0.001' in out
  assert (folder / 'table2d.md').exists()
  _check_picture(folder / 'fig6.png')


def test_with_an_accelerator_nothing_is_left_out(run, tmp_path, monkeypatch):
  monkeypatch.setattr(cli, 'has_accelerator', lambda: True)
  code, out, err = run('table2d', 'fig6', 'fig7', 'fig8')
  assert (code, err) == (0, '')
  assert 'eft out' not in out
  assert 'CIFAR10' in out
  folder = tmp_path / 'benchmarks' / 'paper'
  assert len(list(folder.glob('fig6c_*_seed0.json'))) == 4
  # Fig. 6(a, b) is made of what is there: a table with all its members.
  assert len(list(folder.glob('*.json'))) == 3 + 4 + 6
  for name in ('fig6', 'fig7', 'fig8'):
    _check_picture(folder / f'{name}.png')


def _check_picture(path):
  pixels = image.imread(path)
  assert pixels.std() > 0.05
  assert path.stat().st_size < 120_000, path


def test_searches_are_compared_by_hypervolume(run, tmp_path):
  code, out, err = run('fig9')
  assert (code, err) == (0, '')
  folder = tmp_path / 'benchmarks' / 'paper'
  paths = sorted(path.stem for path in folder.glob('*.json'))
  assert paths == [
    *(f'fig9_bisection_seed{seed}' for seed in (0, 1, 2)),
    'fig9_dichotomic_seed0',
    'fig9_grid_seed0',
    *(f'fig9_stochastic_seed{seed}' for seed in (0, 1, 2)),
  ]
  result = pieces.load(folder / 'fig9_bisection_seed1.json')
  assert len(result.rows) == 20
  (knee,) = (row for row in result.rows if row['knee'])
  assert result.knee == [knee]
  page = (folder / 'fig9.md').read_text()
  assert page.count('| bisection |') == 3
  assert f'| {knee["weight_l1"]:.3g} | {knee["nonzeros"]:,} |' in page


def test_hypervolumes_grow_with_the_trainings():
  total = 58_920
  rows = [
    _row(1e-4, total / math.e**2, 0, accuracy_val=0.96),
    _row(1e-2, 1, 0, accuracy_val=0.97, nonzeros_layer2=0),  # collapsed
    _row(1e-3, total / math.e**3, 0, accuracy_val=0.955),
    _row(2e-3, total / math.e**3, 0, accuracy_val=0.94),  # too inaccurate
  ]
  found = searches.growth(rows)
  assert found == pytest.approx([0.02, 0.02, 0.025, 0.025])


def test_quick_results_are_kept_apart(run, tmp_path):
  code, out, err = run('table2b', '--quick')
  assert (code, err) == (0, '')
  assert 'quick: LeNet-5 on mnist5k' in out
  assert not (tmp_path / 'benchmarks').exists()
  folder = tmp_path / 'runs' / 'paper_quick'
  assert 'quick' in (folder / 'table2b.md').read_text()
  code, _, err = run('table2b', '--quick', f'--results={tmp_path}/benchmarks')
  assert (code, err.count('\n')) == (2, 1)
  code, _, err = run('table2b', f'--results={folder}')
  assert (code, err.count('\n')) == (2, 1)
  assert 'expected a full run, got a --quick run' in err


def test_seeds_of_other_settings_are_not_averaged(run, tmp_path):
  run('table2b', '--seed=0,1')
  path = tmp_path / 'benchmarks' / 'paper' / 'table2b_seed1.json'
  content = json.loads(path.read_text())
  content['config']['epochs'] = 29
  path.write_text(json.dumps(content))
  code, _, err = run('table2b', '--seed=0,1')
  assert (code, err.count('\n')) == (2, 1)
  assert 'epochs=30' in err


@pytest.mark.parametrize('text', ['', '[]', '{"name": "table2b_seed0"}'])
def test_a_damaged_result_is_one_line(run, tmp_path, text):
  (tmp_path / 'table2b_seed0.json').write_text(text)
  code, out, err = run('table2b', f'--results={tmp_path}')
  assert (code, out, err.count('\n')) == (2, '', 1)
  assert 'table2b_seed0.json: expected a result' in err


def test_the_list_says_what_is_there(run):
  run('table2b')
  code, out, err = run('--list')
  assert (code, err) == (0, '')
  lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
  assert 'there, took 2 s' in lines['table2b_seed0']
  assert 'missing' in lines['table2c_seed0']
  assert 'needs an accelerator' in lines['table2d_part2_seed0']
  names = {p.name for name in plan.TRAININGS for p in plan.pieces(name, 0)}
  assert set(lines) > names
  _, out, _ = run('fig4', '--list', '--seed=5')
  assert 'table2c_seed5' in out
  assert 'table2d' not in out


@pytest.mark.parametrize(
  ('argv', 'named'),
  [
    (['table9'], ['table9', 'table2c', 'strategies', 'all']),
    (['fig3', 'fig10'], ['fig10', 'fig8']),
    ([], ['table2a', '--help']),
    (['table2d'], ['table2d', 'accelerator', '--quick']),
    (['fig3', '--seed=one'], ['one', 'integers']),
    (['fig3', '--seed=1,1'], ['1,1', 'different']),
    (['fig3', '--seed=-1'], ['-1']),
    (['fig3', '--seed='], ['integers']),
    (['fig3', '--data_dir=/no/such'], ['data_dir=/no/such', 'folder']),
    (['fig3', '--data_dir='], ['data_dir=', 'folder']),
    (['fig3', f'--results={__file__}/x'], ['results=', 'paper_test.py']),
    (['fig3', '--fast'], ['--fast']),
  ],
)
def test_bad_input_is_one_line_and_exit_2(run, tmp_path, argv, named):
  code, out, err = run(*argv)
  assert (code, out) == (2, '')
  assert err.count('\n') == 1
  for part in named:
    assert part in err
  assert list(tmp_path.iterdir()) == []
