"""The examples of the README run, in order."""

import pathlib
import re
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_README = (_ROOT / 'README.md').read_text()


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', _README, re.DOTALL)


def _python(containing):
  (block,) = (b for b in _blocks('python') if containing in b)
  return block


def test_the_library_example_finds_the_relevant_features():
  names = {}
  exec(_python('def step'), names)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 40)).astype(np.float32)
  truth = np.zeros((40, 1), np.float32)
  truth[:4, 0] = [1.0, -2.0, 3.0, -1.5]
  batch = {'x': jnp.asarray(x), 'y': jnp.asarray(x @ truth)}
  params = {'kernel': jax.random.normal(jax.random.key(0), (40, 1))}
  opt_state = names['tx'].init(params)
  values = []
  for _ in range(600):
    params, opt_state, value = names['step'](params, opt_state, batch)
    values.append(value)
  # A common descent: both objectives fall.
  assert (values[-1] < values[0]).all()
  assert values[-1][0] < 0.5 * values[0][0]
  kernel = np.asarray(params['kernel'])
  assert ((kernel == 0) | (abs(kernel) >= 1e-2)).all()
  assert (kernel == 0).any()


def test_the_library_example_is_short():
  lines = [line for line in _python('def step').splitlines() if line.strip()]
  assert len(lines) <= 15


def test_one_line_makes_any_optimizer_multiobjective():
  names = {}
  exec(_python('def step'), names)
  exec(_python('mlion'), names)
  params = {'w': jnp.ones(3)}
  grads = {'w': jnp.eye(3)}
  updates, _ = names['mlion'].update(grads, names['mlion'].init(params), params)
  np.testing.assert_allclose(updates['w'], -1e-4 / 3, rtol=1e-5)


@pytest.mark.slow
def test_a_trained_network_predicts(tmp_path, monkeypatch):
  (command,) = re.findall(r'python (train.py .*--workdir=runs/first)', _README)
  script, *args = shlex.split(command)
  (tmp_path / 'runs').mkdir()
  subprocess.run(
    [sys.executable, str(_ROOT / script), *args, '--epochs=2'],
    cwd=tmp_path,
    check=True,
  )
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(_python('training.load('), names)
  labels = names['training'].load_dataset('mnist5k').test.labels
  assert (names['digits'] == labels).mean() > 0.7


def test_two_commands_set_everything_up():
  commands = re.findall(r'^pip install -e .* && .*$', _README, re.MULTILINE)
  assert commands == [
    "pip install -e '.[train]' && python train.py",
    "pip install -e '.[train,test]' && pytest",
  ]


def test_files_and_names_of_the_readme_exist():
  for target in re.findall(r'\]\((?!https?:)([^)]+)\)', _README):
    assert (_ROOT / target).exists(), target
  for path in re.findall(r'`((?:tests|mopt|benchmarks)/[\w/.]+)`', _README):
    assert (_ROOT / path).exists(), path
