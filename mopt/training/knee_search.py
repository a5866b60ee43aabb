"""A search for the knee: short trainings level by level, then the knee in full.

What `mopt.search` asks for is trained as one population a level. Objectives are
those of validation data, and the test set is scored for the knee alone.
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from typing import Any

from flax import linen as nn
import jax
import numpy as np
from rich.console import Console

import mopt
from mopt import search as strategies
from mopt.training import results
from mopt.training.config import Config
from mopt.training.data import Dataset
from mopt.training.epoch import check_fit
from mopt.training.run import environment
from mopt.training.run import run
from mopt.training.run import selection_split
from mopt.training.run import table
from mopt.training.run import train_members

# What a search that goes on may have otherwise than when it began.
_MAY_CHANGE = ('data_dir', 'stream', 'parallel', 'levels', 'max_runs')


def search(
  config: Config,
  model: nn.Module,
  data: Dataset,
  workdir: str | os.PathLike,
  devices: Sequence[jax.Device] | None = None,
  console: Console | None = None,
  resume: bool = False,
) -> list[dict[str, Any]]:
  """Searches for the weight of the knee, and trains that one in full.

  In `workdir`: config.json; results.csv, all trainings of the levels that are
  done, replaced as a whole after each level; front.png and search.png of them;
  a folder of logs and networks per level; and `knee_l1_*`, what
  `mopt.training.run` leaves of the weight of the knee, with all seeds. Levels
  train `config.search_epochs` (a third of the epochs by default) with the first
  of the seeds.

  Args:
    config: the settings, with `config.is_search`.
    model: a linen module, see `mopt.training.epoch.make_program`.
    data: the data set.
    workdir: an existing folder.
    devices: see `mopt.training.epoch.make_program`.
    console: where progress and tables go; the standard output by default.
    resume: go on with the search that lies in `workdir`. A level that was cut
      off is trained anew, and so the end is the same.

  Returns:
    The rows of results.csv of the knee, one per seed; none without a knee.

  Raises:
    ValueError: if batch, data and model do not fit, or, before anything is
      written, if what is to be resumed belongs to other settings.
  """
  start = time.perf_counter()
  console = console or Console()
  workdir = pathlib.Path(workdir)
  check_fit(config, model, data)
  strategy = make_strategy(config)
  split = selection_split(config, data)
  state = strategy.init()
  rows: list[dict[str, Any]] = []
  if resume:
    check_resumable(config, workdir)
    rows = _read_rows(workdir)
    for row in rows:
      state = _tell(config, strategy, state, [row], split)
  about = dataclasses.asdict(config) | {'environment': environment()}
  results.write_json(workdir / 'config.json', about)
  while not strategy.done(state):
    level = state.level + 1
    weights = strategy.ask(state).tolist()
    text = ', '.join(f'{weight:.3g}' for weight in weights)
    console.print(
      f'level {level}: l1 {text} ({len(rows)} of at most {config.max_runs} '
      'trainings done)',
      soft_wrap=True,
      highlight=False,
    )
    new = _train_level(
      config, model, data, workdir, devices, console, level, weights, split
    )
    state = _tell(config, strategy, state, new, split)
    rows += new
    results.mark_front(rows, split)
    results.write_csv(workdir / 'results.csv', rows)
    _draw(config, workdir, rows, split)
  console.print(table(rows, split))
  knee = next((row['l1'] for row in rows if row['knee']), None)
  found = []
  if knee is None:
    console.print('No knee: fewer than three points, or none below their line.')
  else:
    found = _train_knee(config, model, data, workdir, devices, console, knee)
    _draw(config, workdir, rows, split, found)
  seconds = round(time.perf_counter() - start, 1)
  about |= {'knee': knee, 'seconds': seconds}
  results.write_json(workdir / 'config.json', about)
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


def check_resumable(config: Config, workdir: str | os.PathLike) -> None:
  """Raises unless a folder holds a search with these settings.

  Raises:
    ValueError: names the first setting that differs, or says that there is no
      search.
  """
  workdir = pathlib.Path(workdir)
  try:
    before = json.loads((workdir / 'config.json').read_text())
    differ = [
      field.name
      for field in dataclasses.fields(Config)
      if before[field.name] != _as_json(getattr(config, field.name))
    ]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise ValueError(
      f'workdir={workdir}: expected the folder of a search to resume ({error}).'
    ) from error
  # A grid is made of its size.
  may_change = _MAY_CHANGE[:3] if config.search == 'grid' else _MAY_CHANGE
  for name in differ:
    if name not in may_change:
      raise ValueError(
        f'{name}={getattr(config, name)}: expected {before[name]}, as in '
        f'{workdir}/config.json, or another workdir.'
      )


def _as_json(value):
  return list(value) if isinstance(value, tuple) else value


def _read_rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  path = workdir / 'results.csv'
  if not path.exists():
    return []
  return [
    {name: math.nan if value is None else value for name, value in row.items()}
    for row in results.read_csv(path)
  ]


def _tell(config, strategy, state, rows, split) -> strategies.SearchState:
  weights = [row['l1'] for row in rows]
  objectives = [_objectives(config, row, split) for row in rows]
  return strategy.tell(state, weights, objectives)


def _objectives(config: Config, row, split: str) -> tuple[float, float]:
  """What a strategy is told of a network.

  A dichotomic search needs the terms of the weighted sum, for its slopes are
  weights of it: a network without weights is one end of that front. The others
  go by what front and knee are judged by, where it is a failure.
  """
  if config.search in ('dichotomic', 'stochastic_dichotomic'):
    return row[f'ce_{split}'], row['l1_norm']
  if results.is_collapsed(row):
    return math.inf, math.inf
  return 1 - row[f'acc_{split}'], math.log(row['nonzeros'])


def _train_level(
  config, model, data, workdir, devices, console, level, weights, split
) -> list[dict[str, Any]]:
  folder = workdir / f'level_{level}'
  if folder.exists():  # of a search that was cut off
    shutil.rmtree(folder)
  folder.mkdir()
  settings = dataclasses.replace(
    config,
    search='none',
    l1=tuple(weights),
    seed=config.seed[:1],
    epochs=config.search_epochs or max(1, config.epochs // 3),
  )
  rows = train_members(
    settings, model, data, folder, devices, console, ('train', 'val', split)
  )
  return [{'level': level} | row for row in rows]


def _train_knee(
  config, model, data, workdir, devices, console, knee
) -> list[dict[str, Any]]:
  folder = workdir / f'knee_l1_{knee:g}'
  if (folder / 'results.csv').exists():
    console.print(f'{folder}: trained already.', soft_wrap=True)
    return results.read_csv(folder / 'results.csv')
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir()
  console.print(
    f'knee: l1 {knee:.3g}, now {config.epochs} epochs with seed '
    f'{",".join(map(str, config.seed))}',
    highlight=False,
  )
  settings = dataclasses.replace(config, search='none', l1=(knee,))
  return run(settings, model, data, folder, devices, console)


def hypervolumes(rows: Sequence[dict[str, Any]], split: str) -> list[float]:
  """Of the first row, the first two, and so on, in (error, ln nonzeros).

  Up to the worst values of all rows, collapsed ones left out.
  """
  points = [
    (math.inf, math.inf)
    if results.is_collapsed(row)
    else (1 - row[f'acc_{split}'], math.log(row['nonzeros']))
    for row in rows
  ]
  alive = [point for point in points if math.isfinite(point[0])]
  if not alive:
    return [0.0] * len(points)
  worst = np.max(alive, axis=0)
  return [mopt.hypervolume(points[: n + 1], worst) for n in range(len(points))]


def _draw(config, workdir, rows, split, retrained=()) -> None:
  # Imported late: matplotlib takes a second, which --help would wait for.
  from mopt.training import plots

  name = results.SPLIT_NAMES[split]
  title = f'{config.search} search, {config.model} on {config.dataset}'
  plots.plot_front(
    workdir / 'front.png',
    rows,
    f'{title}: {len(rows)} trainings, knee by {name} error',
    split,
    retrained,
  )
  plots.plot_search(
    workdir / 'search.png', hypervolumes(rows, split), f'{title}, {name} data'
  )
