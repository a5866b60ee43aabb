"""The benchmarks of speed run, and write what they say."""

import functools
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import epoch_speed
from benchmarks import front
from benchmarks import start_up
from benchmarks import step_cost
import mopt
from tests.devices import first_devices

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
  triads = {f'triad of {held} N' for held in (2, 4, 8)}
  optimizers = {'sgd', 'rmsprop', 'adam', 'smgd', 'mrmsprop', 'madam'}
  optimizers |= {'adam, weighted sum', 'madam, m=8'}
  pruned = {f'{name} + prune' for name in optimizers}
  # madam of 8 objectives holds 25 N.
  larger = {'triad of 16 N', 'triad of 32 N'}
  assert names['update'] == triads | larger | optimizers | pruned
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


def test_calls_are_long_at_every_size(result):
  for row in result['rows']:
    assert row['steps_per_call'] >= 3, row
    # Half of what is asked for, for the machine may have become faster.
    assert row['steps_per_call'] * row['median_us'] > 500, row


def test_floors_are_those_of_triads_that_hold_as_much(result):
  rows = [row for row in result['rows'] if row['table'] == 'update']
  floors = {row['name']: row['floor_us'] for row in rows}
  triads = {
    held: floors[f'triad of {held} N'] / (1.5 * held)
    for held in (2, 4, 8, 16, 32)
  }
  for name, held, moved in (
    ('sgd', 2, 3),
    ('adam', 4, 7),
    ('smgd', 4, 6),
    ('adam, weighted sum', 8, 8),
    ('mrmsprop', 8, 10),
    ('madam', 8, 14),
    ('madam + prune', 8, 14),
    ('madam, m=8', 32, 50),
  ):
    assert floors[name] == pytest.approx(moved * triads[held]), name


@pytest.mark.parametrize(
  ('size', 'most', 'held'),
  [
    (60_000, 25, [2, 4, 8, 16, 32]),
    (60_000, 3, [2, 4, 8]),
    (60_000, 16, [2, 4, 8, 16]),
    (10_000_000, 25, [2, 4, 8, 16]),  # 32 would be 1.3 GB
    (100_000_000, 7, [2, 4, 8]),
  ],
)
def test_triads_are_as_large_as_rows_or_in_no_cache(
  monkeypatch, size, most, held
):
  monkeypatch.setattr(step_cost.jnp, 'ones', lambda n: np.zeros(1))
  programs = step_cost.triads('update', size, most)
  assert [program.held // size for program in programs] == held
  assert [program.moved for program in programs] == [
    1.5 * size * held for held in held
  ]


def _before_the_loop(compiled):
  """The main computation, without those that it calls."""
  return compiled.as_text().split('ENTRY')[1]


def test_what_is_repeated_is_repeated(monkeypatch):
  # By the barrier alone.
  monkeypatch.setattr(step_cost, '_IN_LOOP', None)
  (program,) = (
    program
    for program in step_cost.gramian_programs(5000, [8])
    if program.m == 8
  )
  program.compile(0)
  entry = _before_the_loop(program._compiled)
  assert 'while(' in entry
  assert 'dot_general' not in entry
  assert 'dot_general' in program._compiled.as_text()
  # Without it the compiler does take it out.
  gradients = program.arguments[0]
  without = functools.partial(
    step_cost.repeat, lambda _, grads: mopt.gramian(grads), 8
  )
  lowered = jax.jit(without).lower(jnp.zeros((8, 8)), gradients)
  assert 'dot_general' in _before_the_loop(lowered.compile())


def test_steps_of_a_call_are_those_of_the_function():
  program = step_cost.Program(
    'min-norm', 'sum', lambda carry, x: carry + x, jnp.int32(0), (1,), unit=3
  )
  program.compile(1e-3)
  assert program.steps == 3 * program.repeats
  before = int(program.carry)
  program.call()
  assert program.carry - before == program.repeats


def test_work_that_was_left_out_is_noticed():
  program, triad = (
    step_cost.Program(
      'update', name, lambda x: 2 * x, jnp.ones(3), (), 7, moved=3, held=2
    )
    for name in ('sgd', 'triad')
  )
  for each, times in ((program, [2e-6, 3e-6]), (triad, [1e-5, 3e-5])):
    each.compile(0)
    each.times = times
  assert program.row([triad])['ratio'] == pytest.approx(0.125)
  program.times = [1e-6]
  with pytest.raises(RuntimeError, match='sgd, 7: expected its floor of 20 us'):
    program.row([triad])


def test_it_says_where_it_was_measured(result):
  assert result['quick'] is True
  assert result['platform'] == jax.default_backend()
  assert {row['device'] for row in result['rows']} == {result['device']}
  known = ('device', 'cpus', 'python', 'date', 'jax', 'jaxlib', 'optax', 'mopt')
  assert all(result[name] for name in (*known, 'numpy'))
  parts = {share['part'] for share in result['shares']}
  assert 'Gramian, solve' in parts


def test_the_readme_has_its_ratios():
  root = pathlib.Path(step_cost.ROOT)
  path = root / 'benchmarks' / 'results' / 'step_cost.json'
  kept = json.loads(path.read_text())
  assert not kept['quick']
  rows = {
    (row['name'], row['size']): row
    for row in kept['rows']
    if row['table'] == 'update'
  }
  sizes = (60_000, 1_000_000, 10_000_000, 100_000_000)

  def cells(of, to=None, digits=1):
    found = []
    for size in sizes:
      row = rows.get((of, size))
      if row is None:
        return [*found, '']
      ratio = row['ratio']
      if to is not None:
        ratio = row['median_us'] / rows[to, size]['median_us']
      found.append(f'{ratio:.{digits}f}')
    return found

  weighted = 'adam, weighted sum'
  expected = {
    '`madam` / `optax.adam`': cells('madam', 'adam'),
    '`mrmsprop` / `optax.rmsprop`': cells('mrmsprop', 'rmsprop'),
    '`madam` / its memory floor of 14 words': cells('madam'),
    '`madam` of 8 objectives / its floor of 50 words': cells('madam, m=8'),
    '`optax.adam` / its memory floor of 7 words': cells('adam'),
    'Adam on the weighted sum, with / without pruning': cells(
      f'{weighted} + prune', weighted, 2
    ),
  }
  readme = (root / 'README.md').read_text()
  (table,) = re.findall(r'\| ratio \| 6e4.*?\n\n', readme, re.DOTALL)
  found = {
    name.strip(): [cell.strip() for cell in line]
    for name, *line in (row.split('|')[1:-1] for row in table.split('\n')[2:-2])
  }
  assert found == expected


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


@pytest.fixture(scope='module')
def fronts(tmp_path_factory):
  # JAX runs: a core each would come too late.
  first_devices(4)
  assert jax.device_count() == 4
  path = tmp_path_factory.mktemp('front') / 'new' / 'front.json'
  # Four programs: they need not be fast, but compiled.
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    front.main(['--quick', f'--out={path}'])
  finally:
    jax.config.update('jax_disable_most_optimizations', False)
  assert jax.device_count() == 4
  return json.loads(path.read_text())


def test_fronts_are_trained_on_one_device_and_on_more(fronts):
  assert fronts['quick'] is True
  assert fronts['platform'] == jax.default_backend()
  assert all(fronts[name] for name in ('device', 'date', 'jax', 'mopt'))
  assert fronts['available'] == 4
  ways = [(row['members'], row['devices']) for row in fronts['rows']]
  # One member has no use for a second device.
  assert ways == [(1, 1), (2, 1), (2, 2)]


def test_fronts_are_compared_with_single_runs(fronts):
  single, *others = fronts['rows']
  assert single['ratio'] == single['singles'] == 1
  # Once before each of the others, and before single runs at once.
  assert single['n'] == 3 * others[0]['n']
  for row in fronts['rows']:
    assert row['steps'] == 5
    assert row['n'] >= 3
    assert row['ms_step'] > 0
    assert row['iqr_ms'] >= 0
    assert row['compile_s'] > 0
    assert row['steps_s'] == pytest.approx(1000 / row['ms_step'])
    ratio = row['ms_step'] / single['ms_step']
    assert row['ratio'] == pytest.approx(ratio), row
    assert row['singles'] == pytest.approx(row['members'] * ratio), row


def test_single_runs_at_once_show_the_limit(fronts):
  limit = fronts['limit']
  assert limit['programs'] == 2  # As many as the rows have devices.
  assert limit['n'] == fronts['rows'][1]['n']
  alone = fronts['rows'][0]['ms_step']
  assert limit['ms_alone'] == pytest.approx(alone)
  speed_up = 2 * limit['ms_alone'] / limit['ms_together']
  assert limit['limit'] == pytest.approx(speed_up)
  assert limit['floor'] == pytest.approx(1 / speed_up)


def test_members_of_fronts():
  assert front.parse([]).members == (1, 2, 4, 8, 16, 26)
  assert front.parse(['--members=3,5']).members == [3, 5]


@pytest.mark.parametrize('members', ['', '0', '2,-1', '1.5', 'all'])
def test_wrong_members_are_refused(members, capsys):
  with pytest.raises(SystemExit) as error:
    front.parse([f'--members={members}'])
  assert error.value.code == 2
  assert 'error' in capsys.readouterr().err


def test_benchmarks_leave_the_devices_to_main():
  # Where an import has started JAX, its devices can no longer be chosen.
  code = 'from mopt.training import processes; import benchmarks.front, jax;'
  code += 'processes.make_cores_devices();'
  code += 'jax.config.update("jax_num_cpu_devices", 3);'
  code += 'assert jax.device_count() == 3'
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  subprocess.run([sys.executable, '-c', code], check=True, env=env)


def test_waiting_is_timed(tmp_path):
  path = tmp_path / 'new' / 'start_up.json'
  start_up.main(['--quick', f'--out={path}'])
  result = json.loads(path.read_text())
  assert all(result[name] for name in ('device', 'date', 'jax', 'mopt'))
  rows = {row['name']: row for row in result['rows']}
  assert set(rows) == {
    'import jax, optax',
    'import mopt',
    'train.py --help',
    'first epoch, mnist5k, cold',
    'first epoch, mnist5k, warm',
  }
  assert all(row['n'] == 1 for row in rows.values())
  # It has to import all that --help does, and train.
  shortest = rows['train.py --help']['median_s']
  assert rows['first epoch, mnist5k, warm']['median_s'] > shortest > 0


def test_waiting_for_data_that_is_not_there_is_refused(tmp_path, capsys):
  with pytest.raises(SystemExit) as error:
    start_up.parse([f'--data_dir={tmp_path}'])
  assert error.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert str(tmp_path) in line


def test_a_training_that_ends_early_is_told(tmp_path):
  with pytest.raises(RuntimeError, match='ended early: .*l1'):
    start_up.first_epoch_time(['--l1=nan'], tmp_path)
