"""One run from data to results."""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import platform
import subprocess
import time
from typing import Any

import jax
import numpy as np
import optax
from rich import box
from rich.table import Table

import mopt
from mopt.training import files
from mopt.training import processes
from mopt.training import program as program_lib
from mopt.training import records
from mopt.training.config import Config
from mopt.training.data import Dataset
from mopt.training.data import fingerprint
from mopt.training.data import SPLIT_NAMES
from mopt.training.job import Job
from mopt.training.loop import train_members
from mopt.training.workdir import check_columns


def run(job: Job) -> list[dict[str, Any]]:
  """Trains a population and writes what came out.

  In the folder: config.json, with versions and devices; metrics.jsonl, a line
  per epoch and member as soon as an epoch ends; histograms.jsonl, how the
  weights of each dense layer are distributed, before and after the pruning at
  the start, every fifth epoch and at the end; `checkpoints`; and at the end
  results.csv, front.png, `members/*.npz`, which `mopt.training.load` reads, and
  in config.json the seconds it all took.

  Args:
    job: what is trained and where, see `mopt.training.Job`.

  Returns:
    The rows of results.csv, one per member.

  Raises:
    ValueError: if batch, data and model do not fit, before anything is
      written, or if columns of what is there have other names; `Damaged`, if
      all checkpoints in the folder are.
    Interrupted: if `job.should_stop()`. What was trained is in `checkpoints`,
      and the same call goes on from there, with the same end.
    OSError: if something cannot be written; results that are there stay.
  """
  start = time.perf_counter()
  config, data, console = job.config, job.data, job.console
  workdir = pathlib.Path(job.workdir)
  program_lib.check_fit(config, job.model, data)
  rows = processes.from_first(lambda: _finished(workdir))
  if rows is not None:
    console.print(f'{workdir}: finished already.', soft_wrap=True)
    return rows
  about = dataclasses.asdict(config) | {'environment': environment(data)}
  files.write_json(workdir / 'config.json', about)
  rows = train_members(job._replace(workdir=workdir))
  split = selection_split(config, data)
  records.mark_front(rows, split)
  # Imported late: matplotlib takes a second, which --help would wait for.
  from mopt.training import plots

  plots.plot_front(
    workdir / 'front.png',
    rows,
    f'{config.model} on {data.name}, {config.optimizer}: '
    f'knee and front by {SPLIT_NAMES[split]} error',
  )
  # The last of the files: what has it is complete.
  files.write_csv(workdir / 'results.csv', rows)
  seconds = round(time.perf_counter() - start, 1)
  files.write_json(workdir / 'config.json', about | {'seconds': seconds})
  console.print(table(rows, split))
  console.print(
    f'{seconds:.0f} s; {workdir}/front.png, results.csv, metrics.jsonl, '
    'members/',
    soft_wrap=True,
  )
  return rows


def _finished(workdir: pathlib.Path) -> list[dict[str, Any]] | None:
  """The rows of a run that has come to its end."""
  path = workdir / 'results.csv'
  if not path.exists():
    return None
  check_columns(workdir)
  return records.read_rows(path)


def selection_split(config: Config, data: Dataset) -> str:
  """The split whose error chooses front and knee."""
  if config.select_on == 'test':
    return 'test'
  return 'val' if len(data.val.labels) else 'train'


def environment(data: Dataset) -> dict[str, Any]:
  """What a run depends on besides its settings."""
  return {
    'data': fingerprint(data),
    'mopt': mopt.__version__,
    'jax': jax.__version__,
    'optax': optax.__version__,
    'python': platform.python_version(),
    'devices': [d.device_kind for d in jax.devices()],
    'processes': jax.process_count(),
    'cpu_count': os.cpu_count(),
    'commit': _commit(),
  }


def _commit() -> str | None:
  """Of the checkout that this code lies in; `+` if files differ from it."""
  folder = pathlib.Path(__file__).parent
  try:
    git = lambda *args: subprocess.run(
      ['git', '-C', str(folder), *args],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return None  # an installed package


def table(rows: Sequence[dict[str, Any]], split: str) -> Table:
  """Rows of results.csv for people."""
  name = SPLIT_NAMES[split]
  page = Table(
    box=box.SIMPLE_HEAD,
    caption=f'front and knee: ({name} error, log nonzeros)',
  )
  for column in (
    'l1 weight',
    'seed',
    'l1 norm',
    'nonzeros',
    'train',
    'val',
    'test',
  ):
    page.add_column(column, justify='right')
  page.add_column('')
  for row in rows:
    notes = [
      'collapsed' if records.is_collapsed(row) else '',
      'front' if row['pareto'] and not row['knee'] else '',
      'knee' if row['knee'] else '',
    ]
    weight = row['weight_l1']
    page.add_row(
      'found' if weight is None else f'{weight:.4g}',
      str(row['seed']),
      f'{row["l1"]:.1f}',
      f'{row["nonzeros"]:,}',
      *(_percent(row[f'accuracy_{s}']) for s in ('train', 'val', 'test')),
      ', '.join(filter(None, notes)),
      style='bold' if row['knee'] else '',
    )
  return page


def _percent(value: float) -> str:
  return '-' if np.isnan(value) else f'{100 * value:.2f} %'
