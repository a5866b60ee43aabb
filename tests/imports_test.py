"""Who may import whom, read from the source."""

import ast
import graphlib
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import mopt

ROOT = pathlib.Path(__file__).parents[1]
CORE = {'jax', 'optax', 'numpy', 'chex'}
NUMERICS = (
  'local_gradients',
  'masks',
  'min_norm',
  'objectives',
  'pairs',
  'pareto',
  'per_example',
  'quadratic_program',
  'scalarizations',
  'search',
  'stacked',
  'weightings.adapters',
  'weightings.bargaining',
  'weightings.by_loss',
  'weightings.cones',
  'weightings.conflict_averse',
  'weightings.fixed',
  'weightings.over_time',
  'weightings.robust',
  'weightings.spectral',
  'weightings.states',
  'weightings.surgery',
  'weightings.weighting',
)


# Rooms from the top of the house to the bottom: each imports from lines below
# its own, and nothing else of ours. Those of one line do not know each other.
CORE_ROOMS = """
alias elementwise
aggregation per_example sparsity stacked
local_gradients objectives pruning scalarizations schedules search
min_norm pareto rules weightings.cones weightings.spectral
weightings.by_loss weightings.learnt weightings.over_time weightings.stochastic
weightings.bargaining weightings.conflict_averse
weightings.adapters weightings.fixed weightings.robust weightings.surgery
weightings.states
weightings weightings.weighting
masks quadratic_program
checks lazy pairs
"""
# Files are last since data and checkpoints are written by them, too.
TRAINING_ROOMS = """
knee_search
single_run
loop
records
plots
program
step
augment batches evaluation optimizer
calls
layout
population
objectives weighting
initial
job
network
workdir
arrays
data
own_data
sources
caches checkpoints config loss output processes signals tensorboard
files scaling settings
"""


def levels(package, rooms):
  """How far down each room is, by the name of its module."""
  lines = rooms.split('\n')
  return {f'{package}.{r}': n for n, x in enumerate(lines) for r in x.split()}


def upward(name, found, level):
  """What a module imports that is not below it."""
  return sorted(m for m in found if m in level and level[m] <= level[name])


LEVELS = levels('mopt', CORE_ROOMS) | levels('mopt.training', TRAINING_ROOMS)


def module_name(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {
  module_name(path): path
  for package in ('mopt', 'models')
  for path in sorted((ROOT / package).rglob('*.py'))
}


def is_training(name):
  return name == 'mopt.training' or name.startswith('mopt.training.')


CORE_MODULES = [n for n in FILES if n.startswith('mopt') and not is_training(n)]
TRAINING_MODULES = [n for n in FILES if is_training(n)]
MODEL_MODULES = [n for n in FILES if n.startswith('models')]


def imports(name):
  """All modules that a file imports, now or when it is called or asked."""
  found = set()
  for node in ast.walk(ast.parse(FILES[name].read_bytes())):
    match node:
      case ast.Import(names=names):
        found |= {alias.name for alias in names}
      case ast.ImportFrom(module=package, names=names, level=level):
        assert level == 0, f'{name}: a relative import'
        # A name from a package may be a module of it.
        modules = {f'{package}.{alias.name}' for alias in names}
        found |= (modules & FILES.keys()) or {package}
      case ast.Assign(targets=[ast.Name('_NAMES')], value=table):
        # What a package loads on access.
        found |= {f'{name}.{module}' for module in ast.literal_eval(table)}
  return found


def roots(name):
  """Imported packages that are not of the standard library."""
  return {m.split('.')[0] for m in imports(name)} - sys.stdlib_module_names


def test_the_walk_finds_the_house():
  assert {'mopt', 'mopt.aggregation', 'mopt.pruning'} <= set(CORE_MODULES)
  assert {'mopt.training', 'mopt.training.program'} <= set(TRAINING_MODULES)
  assert {'models', 'models.lenet'} <= set(MODEL_MODULES)
  assert 'mopt.min_norm' in imports('mopt.aggregation')
  assert 'optax' in roots('mopt.aggregation')
  assert 'mopt.aggregation' in imports('mopt')


@pytest.mark.parametrize('name', CORE_MODULES)
def test_the_core_needs_jax_optax_numpy_and_chex(name):
  assert roots(name) <= CORE | {'mopt'}
  assert not [m for m in imports(name) if is_training(m)]


@pytest.mark.parametrize('name', [n for n in CORE_MODULES if n != 'mopt'])
def test_the_core_does_not_import_its_own_front_door(name):
  assert 'mopt' not in imports(name)


def test_every_room_is_on_one_line():
  rooms = f'{CORE_ROOMS} {TRAINING_ROOMS}'.split()
  assert len(rooms) == len(LEVELS)
  assert set(CORE_MODULES) - {'mopt'} == set(levels('mopt', CORE_ROOMS))
  assert set(TRAINING_MODULES) - {'mopt.training'} <= set(LEVELS)


def test_an_arrow_that_points_up_is_found():
  level = levels('house', 'roof\nleft right\ncellar')
  house = ['house.roof', 'house.left', 'house.right', 'house.cellar', 'jax']
  assert upward('house.roof', house[1:], level) == []
  assert upward('house.left', house, level) == sorted(house[:3])
  assert upward('house.cellar', house[:1], level) == house[:1]


@pytest.mark.parametrize('name', sorted(LEVELS.keys() & FILES.keys()))
def test_arrows_point_down(name):
  same_house = [m for m in imports(name) if is_training(m) == is_training(name)]
  assert not upward(name, same_house, LEVELS)
  # The front door is above all of them.
  assert 'mopt.training' not in same_house


@pytest.mark.parametrize('name', [f'mopt.{n}' for n in NUMERICS])
def test_numerics_know_no_optax(name):
  seen, todo = set(), [name]
  while todo:  # nor do the modules of ours that they use
    module = todo.pop()
    seen.add(module)
    assert 'optax' not in roots(module)
    todo += [m for m in imports(module) if m in FILES and m not in seen]


@pytest.mark.parametrize('name', MODEL_MODULES)
def test_models_need_flax_and_jax(name):
  assert roots(name) <= {'flax', 'jax', 'models'}


@pytest.mark.parametrize('name', TRAINING_MODULES)
def test_training_knows_no_network_and_no_command_line(name):
  assert not roots(name) & {'models', 'train', 'benchmarks', 'absl'}


def test_no_module_imports_itself_by_a_detour():
  graph = {name: imports(name) & FILES.keys() for name in FILES}
  order = list(graphlib.TopologicalSorter(graph).static_order())
  assert set(order) == set(FILES)
  assert order.index('mopt') < order.index('mopt.training')


def test_all_of_mopt_loads_nothing_of_the_trainer():
  script = """
import sys
import jax, optax, numpy
before = set(sys.modules)
from mopt import *
print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))
print(*sorted({m.split('.')[0] for m in sys.modules}))
"""
  result = subprocess.run(
    [sys.executable, '-c', script],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  new, loaded = (set(line.split()) for line in result.stdout.splitlines())
  assert 'mopt' in new
  assert not loaded & {
    'flax',
    'matplotlib',
    'mlxtend',
    'models',
    'rich',
    'tensorflow',
    'tensorflow_datasets',
    'train',
  }
  # Optax loads this one; nothing of ours may.
  assert 'absl' not in new
  assert new - sys.stdlib_module_names <= CORE | {'mopt'}


@pytest.mark.parametrize('name', [n for n in FILES if '.' in n])
def test_no_name_of_a_package_hides_a_module_of_it(name):
  package, _, last = name.rpartition('.')
  module = importlib.import_module(name)
  assert getattr(importlib.import_module(package), last) is module


def test_type_checkers_are_told_of_types():
  assert (ROOT / 'mopt' / 'py.typed').is_file()


def test_the_public_names_are_sorted_and_unique():
  assert list(mopt.__all__) == sorted(set(mopt.__all__), key=str.casefold)


@pytest.mark.parametrize('name', mopt.__all__)
def test_public_names_exist_and_are_explained(name):
  thing = getattr(mopt, name)
  assert not name.startswith('_')
  if inspect.isclass(thing) or inspect.isfunction(thing):
    assert thing.__doc__
    # Not what NamedTuple writes by itself: Name(field, ...).
    assert not thing.__doc__.startswith(f'{name}(')
