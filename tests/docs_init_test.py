"""The examples of docs/start_from_a_network.md run, in order."""

import pathlib
import re
import shlex

import numpy as np
import pytest

from mopt import training

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (_ROOT / 'docs' / 'start_from_a_network.md').read_text()
_SETTINGS = training.Config.__dataclass_fields__


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(call, tmp_path):
  """Four trainings, each of which compiles: 30 s."""
  names, commands = {}, 0
  for language, text in re.findall(r'```(python|sh)\n(.*?)```', _PAGE, re.S):
    if language == 'python':
      exec(text, names)
      continue
    for line in text.replace('\\\n', '').splitlines():
      python, script, *args = shlex.split(line)
      assert (python, script) == ('python', 'train.py')
      code, _, err = call(*args, '--epochs=2', '--train_size=640')
      assert (code, err) == (0, '')
      commands += 1
  assert commands == 3
  assert [row['status'] for row in names['rows']] == ['ok']
  dense, sparse = (
    training.load(sorted((tmp_path / name / 'members').iterdir())[0])
    for name in ('dense', 'sparse')
  )
  # Two epochs more: near where they began, and not the same.
  before, after = (net.params['layer1']['kernel'] for net in (dense, sparse))
  assert 0 < abs(before - after).max() < 0.2
  assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.8


def test_the_flags_of_the_page_are_there():
  known = {*_SETTINGS, 'resume', 'workdir'}
  assert set(re.findall(r'--(\w+)', _PAGE)) <= known
