"""A search for the knee: short trainings level by level, then the knee in full.

What `mopt.search` asks for is trained as one population a level. Objectives are
those of validation data, and the test set is scored for the knee alone.
"""

from collections.abc import Sequence
import dataclasses
import math
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

import mopt
from mopt import search as strategies
from mopt.training import files
from mopt.training import processes
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
from mopt.training.program import check_job
from mopt.training.single_run import environment
from mopt.training.single_run import run
from mopt.training.single_run import selection_split
from mopt.training.single_run import table
from mopt.training.workdir import check_settings


def search(job: Job, resume: bool = False) -> list[dict[str, Any]]:
  """Searches for the weight of the knee, and trains that one in full.

  In the folder: config.json; results.csv, all trainings of the levels that are
  done, replaced as a whole after each level; front.png and search.png of them;
  a folder of logs and networks per level; and `knee_l1_*` (or of the name
  of the other second objective), what
  `mopt.training.run` leaves of the weight of the knee, with all seeds. Levels
  train `config.search_epochs` (a third of the epochs by default) with the first
  of the seeds.

  Args:
    job: what is trained and where, with `job.config.is_search`.
    resume: go on with the search that lies in the folder; the end is the same.

  Returns:
    The rows of results.csv of the knee, one per seed; none without a knee.

  Raises:
    Interrupted: see `mopt.training.run`, like OSError and `Damaged`.
    ValueError: if batch, data, model and loss do not fit, or, before anything
      is written, if what is to be resumed belongs to other settings.
  """
  start = time.perf_counter()
  workdir = pathlib.Path(job.workdir)
  job = job._replace(workdir=workdir)
  config, data, loss, console = job.config, job.data, job.loss, job.console
  check_job(job)
  strategy = make_strategy(config)
  split = selection_split(config, data)
  state = strategy.init()
  rows: list[dict[str, Any]] = []
  if resume:
    rows, state = processes.from_first(
      lambda: _resumed(config, data, workdir, split, loss)
    )
  about = dataclasses.asdict(config)
  about |= {'environment': environment(config, data)}
  files.write_json(workdir / 'config.json', about)
  while not strategy.done(state):
    level = state.level + 1
    weights = strategy.ask(state).tolist()
    text = ', '.join(f'{weight:.3g}' for weight in weights)
    console.print(
      f'level {level}: {config.objectives[1]} {text} '
      f'({len(rows)} of at most {config.max_runs} trainings done)',
      soft_wrap=True,
      highlight=False,
    )
    name = f'level_{level}'
    if done := sum(row['level'] == level for row in rows):
      name += f'_after_{done}'  # which max_runs had cut short, and no longer
    new = _train_level(
      job._replace(workdir=workdir / name), tuple(weights), split
    )
    new = [
      {'level': level} | row | {'file': f'{name}/{row["file"]}'} for row in new
    ]
    state = _tell(config, strategy, state, new, split, loss)
    rows += new
    records.mark_front(rows, split, loss, config.front_column)
    files.write_csv(workdir / 'results.csv', rows)
    _draw(job, rows, split)
  console.print(table(config.objectives, rows, split, loss))
  chosen = _weights(config, [row for row in rows if row['knee']])
  knee = chosen[0] if chosen else None
  found = []
  if knee is None:
    console.print('No knee: fewer than three points, or none below their line.')
  else:
    found = _train_knee(job, knee)
  _draw(job, rows, split, found)
  seconds = round(time.perf_counter() - start, 1)
  about |= {'knee': knee, 'seconds': seconds}
  files.write_json(workdir / 'config.json', about)
  console.print(
    f'{seconds:.0f} s; {workdir}/front.png, search.png, results.csv',
    soft_wrap=True,
  )
  return found


def make_strategy(config: Config) -> strategies.Search:
  """The strategy that the settings name."""
  low, high = config.search_range
  if config.search == 'grid':
    return strategies.grid(low, high, config.max_runs)
  limits = low, high, config.levels or config.max_runs, config.max_runs
  if config.search == 'bisection':
    return strategies.bisection(*limits)
  if config.search == 'dichotomic':
    return strategies.dichotomic(*limits, config.scalarization)
  key = jax.random.key(config.seed[0])
  return strategies.stochastic_dichotomic(key, *limits, config.scalarization)


def check_resumable(
  config: Config,
  data: Dataset,
  workdir: str | os.PathLike,
  loss: Loss = cross_entropy,
) -> list[str]:
  """Raises unless a folder holds a run or search with these settings.

  Returns:
    A line for each setting that differs, and may.

  Raises:
    ValueError: names the first setting that differs and must not, or the data
      set or the network that it began with if they are not what they were, or
      says that nothing is there, or that results.csv is not what this search
      has left.
  """
  lines = check_settings(config, workdir, fingerprint(data), loss)
  if config.is_search:
    split = selection_split(config, data)
    _replay(config, pathlib.Path(workdir), split, loss)
  return lines


def _resumed(
  config: Config,
  data: Dataset,
  workdir: pathlib.Path,
  split: str,
  loss: Loss,
) -> tuple[list[dict[str, Any]], strategies.SearchState]:
  check_settings(config, workdir, fingerprint(data), loss)
  return _replay(config, workdir, split, loss)


def _replay(
  config: Config, workdir: pathlib.Path, split: str, loss: Loss
) -> tuple[list[dict[str, Any]], strategies.SearchState]:
  """The trainings in a folder, and where the strategy stands after them."""
  strategy = make_strategy(config)
  state = strategy.init()
  path = workdir / 'results.csv'
  try:
    rows = records.read_rows(path) if path.exists() else []
    levels = max((row['level'] for row in rows), default=0)
    for name, least in (('max_runs', len(rows)), ('levels', levels)):
      most = getattr(config, name)
      if most is not None and most < least:
        raise ValueError(f'{name}={most} and not {least}')
    for row in rows:
      if row['level'] != state.level + 1:
        raise ValueError(f'level {row["level"]} after level {state.level}')
      state = _tell(config, strategy, state, [row], split, loss)
  # The last two: not the cells that a search writes.
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise ValueError(
      f'{path}: expected the trainings of this search ({error}).'
    ) from error
  return rows, state


def _tell(config, strategy, state, rows, split, loss) -> strategies.SearchState:
  objectives = [_objectives(config, row, split, loss) for row in rows]
  return strategy.tell(state, _weights(config, rows), objectives)


def _weights(config: Config, rows) -> list[float]:
  """What was asked for: the weights of the second objective."""
  return [row[f'weight_{config.objectives[1]}'] for row in rows]


def _objectives(
  config: Config, row, split: str, loss: Loss
) -> tuple[float, float]:
  """What a strategy is told of a network.

  A dichotomic search needs the terms of the weighted sum, for its slopes are
  weights of it: a network without weights is one end of that front. The others
  go by what front and knee are judged by, where it is a failure.
  """
  if config.search in ('dichotomic', 'stochastic_dichotomic'):
    return row[f'{loss.name}_{split}'], row[config.objectives[1]]
  return _judged(row, split, loss)


def _judged(row, split: str, loss: Loss) -> tuple[float, float]:
  """(error, ln nonzeros) of a network, infinite if it has collapsed."""
  point = records.judged(row, split, loss)
  return (point[0], math.log(point[1])) if point else (math.inf, math.inf)


def _train_level(
  job: Job, weights: tuple[float, ...], split: str
) -> list[dict[str, Any]]:
  config = job.config
  settings = dataclasses.replace(
    config,
    search='none',
    l1=weights,
    seed=config.seed[:1],
    epochs=config.search_epochs or max(1, config.epochs // 3),
  )
  _keep_if_of(settings, job.workdir, job.loss)
  rows = train_members(job._replace(config=settings), ('train', 'val', split))
  shutil.rmtree(job.workdir / 'checkpoints', ignore_errors=True)
  return rows


def _keep_if_of(settings: Config, folder: pathlib.Path, loss: Loss) -> None:
  """Keeps what a search that was cut off has left, if it may go on with it."""
  if folder.exists():
    try:
      check_settings(settings, folder, loss=loss)
      return
    except ValueError:  # of other weights, or not even that
      shutil.rmtree(folder)
  folder.mkdir()
  files.write_json(folder / 'config.json', dataclasses.asdict(settings))


def _train_knee(job: Job, knee: float) -> list[dict[str, Any]]:
  config = job.config
  name = config.objectives[1].partition(':')[0]
  folder = job.workdir / f'knee_{name}_{knee:g}'
  job.console.print(
    f'knee: {name} {knee:.3g}, now {config.epochs} epochs with seed '
    f'{",".join(map(str, config.seed))}',
    highlight=False,
  )
  settings = dataclasses.replace(config, search='none', l1=(knee,))
  _keep_if_of(settings, folder, job.loss)
  return run(job._replace(config=settings, workdir=folder))


def hypervolumes(
  rows: Sequence[dict[str, Any]],
  split: str,
  reference: tuple[float, float] | None = None,
  loss: Loss = cross_entropy,
) -> list[float]:
  """Of the first row, the first two, and so on, in (error, ln nonzeros).

  Up to `reference`, or to the worst values of all rows. Collapsed ones add
  nothing.
  """
  points = [_judged(row, split, loss) for row in rows]
  if reference is None:
    alive = [point for point in points if math.isfinite(point[0])]
    if not alive:
      return [0.0] * len(points)
    reference = tuple(np.max(alive, axis=0).tolist())
  return [
    mopt.hypervolume(points[: n + 1], reference) for n in range(len(points))
  ]


def _draw(job: Job, rows, split, retrained=()) -> None:
  # Imported late: matplotlib takes a second, which --help would wait for.
  from mopt.training import plots

  config, workdir, loss = job.config, pathlib.Path(job.workdir), job.loss
  name = SPLIT_NAMES[split]
  title = f'{config.search} search, {config.model} on {config.dataset}'
  plots.plot_front(
    workdir / 'front.png',
    rows,
    f'{title}: {len(rows)} trainings, knee by {loss.error(name)}',
    split,
    retrained,
    loss=loss,
    counted=counted(config),
  )
  plots.plot_search(
    workdir / 'search.png',
    hypervolumes(rows, split, loss=loss),
    f'{title}, {name} data',
    error=loss.error(''),
  )
