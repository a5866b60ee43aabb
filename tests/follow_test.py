"""What is called after each epoch: with which records, and if it fails."""

import io
import json
import math

import pytest
from rich.console import Console

from mopt.training import Config
from mopt.training import Job
from mopt.training import processes
from mopt.training import run
from mopt.training import search
from tests.devices import first_devices
from tests.networks import Dropping


def _job(data, workdir, on_epoch, **kwargs):
  workdir.mkdir(exist_ok=True)
  config = Config(**({'l1': (1e-4, 1e-3), 'epochs': 4} | kwargs))
  console = Console(file=io.StringIO())
  return Job(
    config,
    Dropping(0.0),
    data,
    workdir,
    first_devices(1),
    console,
    on_epoch=on_epoch,
  )


def _log(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _as_json(record):
  return {k: v if math.isfinite(v) else None for k, v in record.items()}


def test_it_gets_what_is_logged_epoch_by_epoch(few_digits, tmp_path):
  seen = []

  def note(records):
    # They are in the log already.
    assert _log(tmp_path)[-2:] == list(map(_as_json, records))
    seen.append(records)

  run(_job(few_digits, tmp_path, note))
  assert [[r['epoch'] for r in records] for records in seen] == [
    [epoch, epoch] for epoch in range(1, 5)
  ]
  assert [r['weight_l1'] for r in seen[0]] == [1e-4, 1e-3]
  # Numbers only; what was not measured is one, too.
  values = [v for records in seen for r in records for v in r.values()]
  assert {type(v) for v in values} == {int, float}
  assert math.isnan(seen[0][0]['accuracy_val'])
  assert list(map(_as_json, sum(seen, []))) == _log(tmp_path)


@pytest.mark.parametrize(
  ('checkpoint_every', 'again'), [(1, [2, 3, 4]), (3, [1, 2, 3, 4])]
)
def test_what_it_raises_ends_a_run_that_can_go_on(
  few_digits, tmp_path, checkpoint_every, again
):
  seen = []

  def note(records):
    seen.append(records[0]['epoch'])
    if len(seen) == 2:
      raise ZeroDivisionError('of the user')

  settings = {'checkpoint_every': checkpoint_every}
  job = _job(few_digits, tmp_path / 'a', note, **settings)
  with pytest.raises(ZeroDivisionError, match='^of the user$'):
    run(job)
  assert [r['epoch'] for r in _log(tmp_path / 'a')] == [1, 1, 2, 2]
  assert not (tmp_path / 'a' / 'results.csv').exists()
  del seen[:2]
  seen.append(None)
  # The same end as if nothing had been called.
  rows = run(job._replace(on_epoch=lambda r: seen.append(r[0]['epoch'])))
  assert seen[1:] == again
  whole = run(_job(few_digits, tmp_path / 'b', lambda r: None, **settings))
  assert repr(rows) == repr(whole)  # NaN is not itself.
  assert _log(tmp_path / 'a') == _log(tmp_path / 'b')


def test_a_search_calls_it_for_each_training(few_digits, tmp_path):
  seen = []
  settings = {'search': 'grid', 'max_runs': 5, 'search_epochs': 2}
  settings |= {'search_range': (1e-5, 1e-1), 'learning_rate': 0.01}
  job = _job(
    few_digits, tmp_path, seen.append, l1=None, seed=(3, 4), **settings
  )
  search(job)
  logs = [_log(p.parent) for p in tmp_path.glob('*/metrics.jsonl')]
  logs.sort(key=lambda log: len(log) != 10)  # The level is before the knee.
  assert len(logs) == 2
  assert list(map(_as_json, sum(seen, []))) == sum(logs, [])
  assert [records[0]['epoch'] for records in seen] == [1, 2, 1, 2, 3, 4]
  assert [len(records) for records in seen] == [5, 5, 2, 2, 2, 2]


def test_other_processes_do_not_call_it(few_digits, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  run(_job(few_digits, tmp_path, lambda records: 1 / 0, epochs=1))
  assert len(_log(tmp_path)) == 2
