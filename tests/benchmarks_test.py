"""The benchmarks of speed run, and write what they say."""

import json
import math

import pytest

from benchmarks import epoch_speed
from benchmarks import step_cost

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def result(tmp_path_factory):
  path = tmp_path_factory.mktemp('step_cost') / 'new' / 'step_cost.json'
  step_cost.main(['--quick', '--sizes=5e3', f'--out={path}'])
  return json.loads(path.read_text())


def test_every_row_is_there(result):
  names = {}
  for row in result['rows']:
    names.setdefault(row['table'], set()).add(row['name'])
  assert set(names) == {'update', 'gramian', 'min-norm', 'lenet5'}
  triads = {'triad of 2 N', 'triad of 4 N', 'triad of 8 N'}
  optimizers = {'sgd', 'rmsprop', 'adam', 'smgd', 'mrmsprop', 'madam'}
  optimizers |= {'adam, weighted sum'}
  pruned = {f'{name} + prune' for name in optimizers}
  assert names['update'] == triads | optimizers | pruned
  assert names['gramian'] == triads | {'gramian, m=2', 'gramian, m=3'}
  assert {'adam, weighted sum + prune', 'madam + prune'} <= names['lenet5']
  assert len(names['min-norm']) == 2


def test_every_row_has_its_numbers(result):
  for row in result['rows']:
    assert row['median_us'] >= row['min_us'] > 0, row
    assert row['iqr_us'] >= 0, row
    assert row['n'] >= 3, row
    assert row['compile_s'] > 0, row
    assert row['temp_bytes'] >= 0, row
    if row['table'] in ('update', 'gramian'):
      assert row['size'] == 5000
      ratio = row['median_us'] / row['floor_us']
      assert row['ratio'] == pytest.approx(ratio), row
      assert 0 < ratio < math.inf
    else:
      assert row['floor_us'] is row['ratio'] is None


def test_floors_are_in_the_ratio_of_what_is_moved(result):
  floors = {
    row['name']: row['floor_us']
    for row in result['rows']
    if row['table'] == 'update'
  }
  # These hold 5 to 7 N and are compared with one triad.
  unit = floors['madam'] / 14
  assert floors['mrmsprop'] == pytest.approx(10 * unit)
  assert floors['adam, weighted sum'] == pytest.approx(8 * unit)
  assert floors['triad of 8 N'] == pytest.approx(12 * unit)
  assert floors['madam + prune'] == floors['madam']


def test_it_says_where_it_was_measured(result):
  assert result['quick'] is True
  assert result['platform'] == 'cpu'
  known = ('device', 'cpus', 'python', 'date', 'jax', 'jaxlib', 'optax', 'mopt')
  assert all(result[name] for name in (*known, 'numpy'))
  parts = {share['part'] for share in result['shares']}
  assert 'Gramian, solve' in parts


@pytest.mark.parametrize(
  'argument', ['--sizes=abc', '--sizes=', '--sizes=1e4,x', '--fast', '1e4']
)
def test_wrong_arguments_are_refused(argument, capsys):
  with pytest.raises(SystemExit) as error:
    step_cost.parse([argument])
  assert error.value.code == 2
  assert 'error' in capsys.readouterr().err


def test_sizes():
  assert step_cost.parse([]).sizes == [60_000, 1_000_000, 10_000_000]
  assert step_cost.parse(['--quick']).sizes == [10_000]
  # Smaller ones have no room for the leaves.
  assert step_cost.parse(['--sizes=1e6,1']).sizes == [1_000_000, 5000]


def test_flops_are_those_of_the_layers():
  # Places of the output, times the entries of the kernel, times two.
  lenet5 = 26 * 26 * 54 + 11 * 11 * 864 + 58_920
  assert epoch_speed.forward_flops('lenet5') == 2 * lenet5
  vgg = 32 * 32 * (864 + 9216) + 16 * 16 * (18_432 + 36_864)
  vgg += 8 * 8 * (73_728 + 147_456) + 20_480
  assert epoch_speed.forward_flops('vgg') == 2 * vgg


def test_epochs_are_timed(tmp_path):
  path = tmp_path / 'new' / 'epoch_speed.json'
  epoch_speed.main(['--quick', f'--out={path}'])
  result = json.loads(path.read_text())
  assert result['quick'] is True
  (row,) = result['rows']
  assert (row['model'], row['optimizer'], row['members']) == (
    'lenet5',
    'adam',
    1,
  )
  assert row['n'] == 2
  assert row['epoch_s'] == pytest.approx(1875 * row['ms_step'] / 1000)
  assert row['images_s'] == pytest.approx(32_000 / row['ms_step'])
  assert row['ratio'] == pytest.approx(row['ms_step'] / row['floor_ms'])
  flops = 3 * 32 * epoch_speed.forward_flops('lenet5')
  floor_ms = flops / row['matmul_gflops'] / 1e6
  assert row['floor_ms'] == pytest.approx(floor_ms)
