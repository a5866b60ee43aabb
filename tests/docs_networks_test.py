"""The examples of docs/networks.md run, in order."""

import importlib
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest

import models
from mopt import training

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (_ROOT / 'docs' / 'networks.md').read_text()
_FILES = ('mynet', 'mynnx')


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', _PAGE, re.DOTALL)


def _python(containing):
  (block,) = (b for b in _blocks('python') if containing in b)
  return block


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with the files of the page, where Python is started."""
  for name in _FILES:
    (tmp_path / f'{name}.py').write_text(_python(f'# {name}.py'))
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name in _FILES:
    sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(call, folder):
  """Three trainings, each of which compiles: 20 s."""
  commands = [shlex.split(block) for block in _blocks('sh')]
  assert len(commands) == 2
  for python, script, *args in commands:
    assert (python, script) == ('python', 'CHECKOUT/train.py')
    code, _, err = call(*args, '--epochs=2', '--train_size=640')
    assert (code, err) == (0, '')
  names = {}
  exec(_python('training.load('), names)
  assert names['net'].model == 'mynet:Net'
  labels = training.load_dataset('mnist5k').test.labels
  assert (names['logits'].argmax(axis=-1) == labels).mean() > 0.5
  same = importlib.import_module('mynet').Net(names['net'].num_classes)
  assert same == names['model']
  exec(_python('rows ='), names)
  assert [row['status'] for row in names['rows']] == ['ok']
  (path,) = (folder / 'second' / 'members').iterdir()
  assert training.load(path).model == 'mynet:Net'
  (path,) = (folder / 'nnx' / 'members').iterdir()
  net = training.load(path)
  assert sorted(net.params['hidden']) == [0, 1]
  # Nothing is dropped when it predicts.
  model = models.create(net.model)
  images = net.preprocess(np.ones((2, 28, 28, 1), np.uint8))
  first = model.apply(net.variables, images)
  rngs = {'dropout': jax.random.key(3)}
  np.testing.assert_array_equal(
    first, model.apply(net.variables, images, rngs=rngs)
  )
  dropped = model.apply(net.variables, images, train=True, rngs=rngs)
  assert (np.asarray(first) != dropped).any()


def test_what_the_page_says_of_the_checkout_is_there():
  for name in re.findall(r'`models\.(\w+)\.(\w+)`', _PAGE):
    assert hasattr(getattr(models, name[0]), name[1])
  for flag in re.findall(r'--(\w+)', _PAGE):
    assert flag in training.Config.__dataclass_fields__ or flag in (
      'resume',
      'workdir',
    )
