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
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss
from mopt.training.objectives import counted
from mopt.training.workdir import check_columns
from mopt.training.workdir import start_fingerprint


def run(job: Job) -> list[dict[str, Any]]:
  """Trains a population and writes what came out.

  In the folder: config.json, with versions and devices; metrics.jsonl, a line
  per epoch and member as soon as an epoch ends; histograms.jsonl, how the
  weights of each prunable leaf are distributed, before and after the pruning at
  the start, every fifth epoch and at the end; `checkpoints`; and at the end
  results.csv, front.png, `members/*.npz`, which `mopt.training.load` reads, and
  in config.json the seconds it all took. With `config.tensorboard` also
  `tensorboard`, a folder of event files for each member, as the epochs go by.

  Args:
    job: what is trained and where, see `mopt.training.Job`.

  Returns:
    The rows of results.csv, one per member.

  Raises:
    ValueError: if batch, data, model and loss do not fit, before anything is
      written, or if columns of what is there have other names; `Damaged`, if
      all checkpoints in the folder are.
    Interrupted: if `job.should_stop()`. What was trained is in `checkpoints`,
      and the same call goes on from there, with the same end.
    OSError: if something cannot be written; results that are there stay.
  """
  start = time.perf_counter()
  config, data, loss, console = job.config, job.data, job.loss, job.console
  workdir = pathlib.Path(job.workdir)
  program_lib.check_job(job)
  rows = processes.from_first(lambda: _finished(workdir, loss))
  if rows is not None:
    console.print(f'{workdir}: finished already.', soft_wrap=True)
    return rows
  about = dataclasses.asdict(config)
  about |= {'environment': environment(config, data)}
  files.write_json(workdir / 'config.json', about)
  rows = train_members(job._replace(workdir=workdir))
  split = selection_split(config, data)
  records.mark_front(rows, split, loss, config.front_column)
  # Imported late: matplotlib takes a second, which --help would wait for.
  from mopt.training import plots

  plots.plot_front(
    workdir / 'front.png',
    rows,
    f'{job.model_name} on {data.name}, {config.optimizer}: '
    f'knee and front by {loss.error(SPLIT_NAMES[split])}',
    loss=loss,
    counted=counted(config),
  )
  # The last of the files: what has it is complete.
  files.write_csv(workdir / 'results.csv', rows)
  seconds = round(time.perf_counter() - start, 1)
  files.write_json(workdir / 'config.json', about | {'seconds': seconds})
  console.print(table(config.objectives, rows, split, loss))
  console.print(
    f'{seconds:.0f} s; {workdir}/front.png, results.csv, metrics.jsonl, '
    'members/',
    soft_wrap=True,
  )
  return rows


def _finished(workdir: pathlib.Path, loss: Loss) -> list[dict[str, Any]] | None:
  """The rows of a run that has come to its end."""
  path = workdir / 'results.csv'
  if not path.exists():
    return None
  check_columns(workdir, loss)
  return records.read_rows(path)


def selection_split(config: Config, data: Dataset) -> str:
  """The split whose score chooses front and knee."""
  if config.select_on == 'test':
    return 'test'
  return 'val' if len(data.val.labels) else 'train'


def environment(config: Config, data: Dataset) -> dict[str, Any]:
  """What a run depends on besides its settings."""
  return {
    'data': fingerprint(data),
    'init': start_fingerprint(config),
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


def table(
  names: Sequence[str],
  rows: Sequence[dict[str, Any]],
  split: str,
  loss: Loss = cross_entropy,
) -> Table:
  """Rows of results.csv for people, with objectives of these names."""
  error = loss.error(SPLIT_NAMES[split])
  # What a percentage is of goes without saying.
  score = '' if loss.classes else f' {loss.score_name}'
  page = Table(
    box=box.SIMPLE_HEAD,
    caption=f'front and knee: ({error}, log nonzeros)',
  )
  # More would not fit on a line; one of the examples has no value in the end.
  values = names[1:] if len(names) == 2 and names[1] in rows[0] else ()
  for column in (
    f'{names[1]} weight' if len(names) == 2 else 'weights',
    'seed',
    *(f'{name}' for name in values),
    'nonzeros',
    *(f'{name}{score}' for name in SPLIT_NAMES),
  ):
    page.add_column(column, justify='right')
  page.add_column('')
  for row in rows:
    notes = [
      'collapsed' if records.is_collapsed(row, loss) else '',
      'front' if row['pareto'] and not row['knee'] else '',
      'knee' if row['knee'] else '',
    ]
    # That of the error says nothing where there are two.
    told = names[1:] if len(names) == 2 else names
    weights = [row[f'weight_{name}'] for name in told]
    page.add_row(
      'found' if None in weights else ','.join(f'{w:.4g}' for w in weights),
      str(row['seed']),
      *(f'{row[name]:.1f}' for name in values),
      f'{row["nonzeros"]:,}',
      *(loss.show(row[f'{loss.score_name}_{s}']) for s in SPLIT_NAMES),
      ', '.join(filter(None, notes)),
      style='bold' if row['knee'] else '',
    )
  return page
