"""The examples of docs/objectives.md run, in order."""

import csv
import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mopt import training
from mopt.training.objectives import _PENALTIES

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (_ROOT / 'docs' / 'objectives.md').read_text()


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', _PAGE, re.DOTALL)


def _rows(folder):
  with (folder / 'results.csv').open() as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(call, tmp_path, capsys):
  """Three trainings, each of which compiles: 20 s."""
  commands = [shlex.split(block) for block in _blocks('sh')]
  assert len(commands) == 2
  for python, script, *args in commands:
    assert (python, script) == ('python', 'CHECKOUT/train.py')
    code, _, err = call(*args, '--epochs=2', '--train_size=640')
    assert (code, err) == (0, '')
  assert len(_rows(tmp_path / 'three')) == 3
  lines = (tmp_path / 'found' / 'metrics.jsonl').read_text().splitlines()
  record = json.loads(lines[-1])
  # The columns that the page names.
  table = _PAGE.partition('Columns of `metrics.jsonl`')[2]
  table = table.partition('In `results.csv`')[0]
  columns = re.findall(r'`(\w+)`', table)
  assert len(columns) > 8
  assert record.keys() >= set(columns) - {'conv_l2'}
  first, second = (_rows(tmp_path / name)[0] for name in ('three', 'found'))
  assert (first['weight_l1'], second['weight_l1']) == ('0.0003', '')
  assert first['file'] == 'members/weights_1_0.0003_0_seed_0.npz'
  count, own = _blocks('python')
  capsys.readouterr()
  exec(count, {})
  counted = capsys.readouterr().out
  for row in _rows(tmp_path / 'three'):
    params = training.load(tmp_path / 'three' / row['file']).params
    left = [
      sum(np.linalg.norm(column) > 0 for column in params[name]['kernel'].T)
      for name in ('layer1', 'layer2')
    ]
    numbers = f'{row["file"][8:]} {[int(x) for x in left]}'
    assert numbers in counted.splitlines()
  names = {}
  exec(own, names)
  plain, smooth = names['rows']
  assert [plain['status'], smooth['status']] == ['ok', 'ok']
  assert smooth['rough'] < plain['rough']
  net = training.load(tmp_path / 'own' / smooth['file'])
  w = np.asarray(net.params['layer1']['kernel'], float).reshape(28, 28, 300)
  rough = sum((np.diff(w, axis=axis) ** 2).sum() for axis in (0, 1))
  np.testing.assert_allclose(smooth['rough'], rough, rtol=1e-5)
  assert 'loud' not in smooth
  log = (tmp_path / 'own' / 'metrics.jsonl').read_text()
  assert json.loads(log.splitlines()[-1])['loud'] > 0


def test_what_the_page_names_is_there():
  rows = re.findall(r'^\| `(\w+)(?::\w)?` \| ', _PAGE, re.MULTILINE)
  assert {name for name in rows if name in _PENALTIES} == set(_PENALTIES)
  for flag in re.findall(r'--(\w+)', _PAGE):
    assert flag in training.Config.__dataclass_fields__ or flag == 'workdir'
  # Why not to take it.
  assert jax.grad(jnp.abs)(0.0) == 1
