"""Packages that load their names on access, and the stubs beside them."""

import ast
import importlib
import inspect
import json
import pathlib
import pickle
import pkgutil
import subprocess
import sys

import pytest

import mopt
from mopt import training

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = {package.__name__: package for package in (mopt, training)}


def _fresh(script):
  """What a script prints, in a process that has imported nothing."""
  command = [sys.executable, '-c', script]
  result = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert not result.returncode, result.stderr
  return result.stdout


def _stub(package):
  """From names to the modules that the stub of a package has them from."""
  path = pathlib.Path(package.__file__).with_suffix('.pyi')
  found = {}
  for node in ast.parse(path.read_bytes()).body:
    if isinstance(node, ast.ImportFrom):
      (alias,) = node.names
      # Else type checkers take it for private.
      assert alias.asname == alias.name
      assert alias.name not in found
      found[alias.name] = node.module
  return found


def _modules(package):
  return {module.name for module in pkgutil.iter_modules(package.__path__)}


@pytest.mark.parametrize('package', PACKAGES.values(), ids=PACKAGES)
def test_stub_and_package_have_the_same_names(package):
  stub = _stub(package)
  modules = _modules(package)
  assert len(modules) > 9
  assert not modules & set(package.__all__)
  assert set(stub) == modules | set(package.__all__)
  assert set(stub) <= set(dir(package))
  for name, origin in stub.items():
    if name in modules:
      assert origin == package.__name__
      expected = importlib.import_module(f'{origin}.{name}')
    else:
      expected = getattr(importlib.import_module(origin), name)
    assert getattr(package, name) is expected
    if inspect.isclass(expected) or inspect.isfunction(expected):
      # Named where it is made, and not where it is used, too.
      assert expected.__module__ == origin
  # All of them are loaded now.
  public = {
    name
    for name, thing in vars(package).items()
    if not name.startswith('_') and not inspect.ismodule(thing)
  }
  assert public == set(package.__all__)


def test_packages_load_nothing_by_themselves():
  printed = _fresh("""
import sys
before = set(sys.modules)
import mopt
from mopt import training
print(*sorted(set(sys.modules) - before - sys.stdlib_module_names))
""")
  loaded = {m for m in printed.split() if m.split('.')[0] == 'mopt'}
  assert loaded == {'mopt', 'mopt.lazy', 'mopt.training'}
  others = {m.split('.')[0] for m in set(printed.split()) - loaded}
  assert others <= sys.stdlib_module_names


def test_modules_and_names_load_in_a_fresh_process():
  printed = _fresh("""
import inspect, json, pickle, pydoc, sys
import mopt
print(mopt.search.bisection.__module__, 'optax' in sys.modules)
print(mopt.training.network.__name__, 'matplotlib' in sys.modules)
space = {}
exec('from mopt import *', space)
text = pydoc.plain(pydoc.render_doc(mopt))
print(json.dumps([
  sorted(set(space) - {'__builtins__'}),
  [name for name in mopt.__all__ if name not in text],
  inspect.getdoc(mopt),
  inspect.getdoc(mopt.prune_by_magnitude),
]))
state = mopt.PruneState(3, 4)
print(pickle.loads(pickle.dumps(state)) == state)
""")
  first, second, found, pickled = printed.splitlines()
  assert first == 'mopt.search False'
  assert second == 'mopt.training.network False'
  names, hidden, doc, doc_of_name = json.loads(found)
  assert names == sorted(mopt.__all__)
  assert not hidden
  assert doc == inspect.getdoc(mopt)
  assert doc_of_name == inspect.getdoc(mopt.prune_by_magnitude)
  assert pickled == 'True'


def test_a_pickle_loads_its_module():
  data = pickle.dumps(training.Network({}, 'lenet5', 10, (2,), (0.0, 1.0), 2.0))
  printed = _fresh(f'import pickle; print(pickle.loads({data!r}))')
  assert printed.startswith("Network(variables={}, model='lenet5',")


@pytest.mark.parametrize('name', ['nothing', '_nothing', 'search.grid', ''])
@pytest.mark.parametrize('package', PACKAGES.values(), ids=PACKAGES)
def test_an_unknown_name_is_an_error(package, name):
  with pytest.raises(AttributeError) as caught:
    getattr(package, name)
  # As Python's own modules say it, and it may add what was meant.
  expected = f'module {package.__name__!r} has no attribute {name!r}'
  assert str(caught.value) == expected
  assert (caught.value.name, caught.value.obj) == (name, package)


def test_an_unknown_name_cannot_be_imported():
  with pytest.raises(ImportError, match="cannot import name 'nothing'"):
    from mopt import nothing  # noqa: F401


def test_type_checkers_know_all_names_and_no_other(tmp_path):
  lines = ['import mopt', 'from mopt import training']
  for name, package in PACKAGES.items():
    known = [*package.__all__, *_modules(package), '__version__']
    lines += [f'print({name}.{x})' for x in known if hasattr(package, x)]
  first = len(lines) + 1
  lines += ['mopt.nothing', 'training.nothing', "mopt.aggregate('halves')"]
  (tmp_path / 'script.py').write_text('\n'.join(lines))
  (tmp_path / 'pyrefly.toml').write_text(f'search-path = ["{ROOT.as_posix()}"]')
  command = [sys.executable, '-m', 'pyrefly', 'check', '-c', 'pyrefly.toml']
  result = subprocess.run(
    [*command, '--output-format=min-text', 'script.py'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=120,
  )
  errors = [line.split() for line in result.stdout.splitlines()]
  assert [(e[0], e[1].split(':')[1], e[-1]) for e in errors] == [
    ('ERROR', str(first), '[missing-attribute]'),
    ('ERROR', str(first + 1), '[missing-attribute]'),
    ('ERROR', str(first + 2), '[bad-argument-type]'),
  ]
