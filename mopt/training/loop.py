"""A population from its first epoch to its last."""

from collections.abc import Callable, Sequence
import contextlib
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn

import mopt
from mopt.training import checkpoints
from mopt.training import files
from mopt.training import network
from mopt.training import optimizer as optimizer_lib
from mopt.training import processes
from mopt.training import program as program_lib
from mopt.training import records
from mopt.training import step as step_lib
from mopt.training import tensorboard
from mopt.training.batches import steps_per_epoch
from mopt.training.data import SPLIT_NAMES
from mopt.training.evaluation import Evaluation
from mopt.training.job import Job
from mopt.training.layout import Layout
from mopt.training.layout import split_members
from mopt.training.loss import Loss
from mopt.training.objectives import leaf_columns
from mopt.training.objectives import prunable
from mopt.training.population import file_names
from mopt.training.population import make_population
from mopt.training.population import Member


class Interrupted(Exception):
  """A run was asked to stop, and can go on from where it is."""


def train_members(
  job: Job, splits: Sequence[str] = ('train', 'val', 'test')
) -> list[dict[str, Any]]:
  """Trains a population, with logs, checkpoints and `members/` in its folder.

  Where there are checkpoints it goes on after the last of them.

  Returns:
    The columns of results.csv but for the front's, of the pruned networks, with
    `file` relative to `workdir`; NaN for scores on other than `splits`.

  Raises:
    Interrupted: after an epoch, if `job.should_stop()`.
    Exception: what `job.on_epoch` raises.
    OSError: if something cannot be written.
    Damaged: if there are checkpoints and all of them are damaged.
  """
  config, data, loss = job.config, job.data, job.loss
  program = program_lib.make_program(job)
  members = make_population(config)
  job.console.print(
    f'{len(members)} x {job.model_name} on {data.name} '
    f'({len(data.train.labels):,} training examples), {config.optimizer}, '
    f'{_devices(program.layout)} -> {job.workdir}',
    soft_wrap=True,
  )
  state = _train(job, program, members)
  unknown = Evaluation(*[np.full(len(members), np.nan)] * 2)
  scores = {
    split: program.evaluate(state, split) if split in splits else unknown
    for split in SPLIT_NAMES
  }
  labels = np.asarray(data.train.labels)
  variables = program.layout.collect(state.variables)
  one = next(split_members(variables['params']))
  rows = records.result_rows(
    config.objectives,
    members,
    scores,
    program.complexity(state),
    program.layout.collect(state.failure),
    # Of a bias no weight is needed.
    layers=leaf_columns(config, one, min_axes=2),
    chance=np.bincount(labels).max() / len(labels) if loss.classes else None,
    loss=loss,
  )
  _save_members(job, members, variables)
  paths = [f'members/{name}.npz' for name in file_names(config)]
  return [row | {'file': path} for row, path in zip(rows, paths)]


def _devices(layout: Layout) -> str:
  number = len(layout.devices)
  use = 'batches on' if layout.shares_batches else 'members on'
  kind = layout.devices[0].platform.upper()
  owners = len({device.process_index for device in layout.devices})
  of = f' of {owners} processes' if owners > 1 else ''
  return f'{use} {number} {kind} device{"s" if number > 1 else ""}{of}'


def _train(
  job: Job, program: program_lib.Program, members: Sequence[Member]
) -> step_lib.State:
  """All epochs, with progress and logs; returns the pruned networks."""
  config, workdir, console = job.config, job.workdir, job.console
  steps = steps_per_epoch(config, len(job.data.train.labels))
  rate = optimizer_lib.learning_rate(config, steps)
  layout, names = program.layout, config.objectives

  def log_histograms(epoch, when, state):
    head = {'epoch': epoch, 'when': when}
    params = layout.collect(state.params)
    new = records.histogram_records(
      names, members, head, params, prunable(config)
    )
    files.append_jsonl(workdir / 'histograms.jsonl', new)

  start, state = _start(job, program)
  if start == 0:
    log_histograms(0, 'initial', state)
    state = program.prune(state)
    log_histograms(0, 'pruned', state)
  followers = _followers(job)
  with (
    checkpoints.Checkpoints(workdir / 'checkpoints', start) as saved,
    _progress(console) as progress,
  ):
    task = progress.add_task(
      'compiling, first epoch', total=config.epochs, completed=start
    )
    for number in range(start, config.epochs):
      failed = layout.collect(state.failure.objective)
      with _profiled(job, number):
        state, metrics = program.epoch(state, number)
      val = program.evaluate(state, 'val')
      counts = program.complexity(state)
      if (number + 1) % 5 == 0 and number + 1 < config.epochs:
        log_histograms(number + 1, 'epoch', state)
      head = {
        'epoch': number + 1,
        'learning_rate': np.asarray(rate(number * steps)).item(),
      }
      found = records.epoch_records(
        names, members, head, metrics, val, counts, loss=job.loss
      )
      files.append_jsonl(workdir / 'metrics.jsonl', found)
      for follow in followers:
        follow(found)
      summary = _summary(job.loss, metrics, val, counts)
      progress.update(task, advance=1, description=summary)
      if not console.is_terminal:
        console.print(
          f'epoch {number + 1}/{config.epochs}  {summary}', soft_wrap=True
        )
      _report_failures(job, members, failed, layout.collect(state.failure))
      stop = processes.any_of(job.should_stop())
      is_last = number + 1 == config.epochs
      if stop or is_last or (number + 1) % config.checkpoint_every == 0:
        tree = layout.collect(state)
        if processes.is_first():
          score = _score(job.loss, metrics, val, counts)
          saved.save(number + 1, tree, score)
      if stop and not is_last:
        saved.finish()
        raise Interrupted(f'{workdir}: stopped after epoch {number + 1}.')
  state = program.prune(state)
  log_histograms(config.epochs, 'final', state)
  return state


def _followers(job: Job) -> list[Callable[[list[dict[str, Any]]], object]]:
  """What the records of an epoch are handed to, by the first process."""
  if not processes.is_first():
    return []
  if not job.config.tensorboard:
    return [job.on_epoch]
  events = tensorboard.start(
    job.workdir / 'tensorboard',
    file_names(job.config),
    files.read_jsonl(job.workdir / 'metrics.jsonl'),
  )
  return [events, job.on_epoch]


def _start(
  job: Job, program: program_lib.Program
) -> tuple[int, step_lib.State]:
  """The number of epochs that are done, and the state after them.

  Logs of what comes after the checkpoint are taken out of the files.
  """
  workdir, console = job.workdir, job.console
  state = program.init()
  folder = workdir / 'checkpoints'
  template = program.layout.collect(state)

  def find():
    if not folder.exists():
      return None
    warn = lambda line: console.print(line, soft_wrap=True, highlight=False)
    found = checkpoints.restore(folder, template, warn)
    # Other processes know the structure, which may not be for sending.
    return found and (found[0], jax.tree.leaves(found[1]))

  found = processes.from_first(find)
  epoch = 0 if found is None else found[0]
  for name in ('metrics.jsonl', 'histograms.jsonl'):
    _cut_log(workdir / name, epoch)
  if (workdir / 'members').exists():  # half of them, or without results.csv
    shutil.rmtree(workdir / 'members')
  if found is None:
    return 0, state
  console.print(f'going on after epoch {epoch}', highlight=False)
  tree = jax.tree.unflatten(jax.tree.structure(template), found[1])
  return epoch, program.restore(tree)


def _cut_log(path: pathlib.Path, epoch: int) -> None:
  """Takes out what comes after a checkpoint, and a line cut in half."""
  if not path.exists():
    return

  def is_kept(line):
    try:
      record = json.loads(line)
    except ValueError:
      return False
    return record['epoch'] <= epoch and record.get('when') != 'final'

  lines = path.read_text().splitlines() if epoch else []
  files.write_text(path, ''.join(f'{x}\n' for x in lines if is_kept(x)))


def _report_failures(
  job: Job,
  members: Sequence[Member],
  before: np.ndarray,
  failure: step_lib.Failure,
) -> None:
  names = job.config.objectives
  for index in np.flatnonzero(before != failure.objective).tolist():
    job.console.print(
      f'{members[index].label(names)}: stopped, '
      f'{records.describe_failure(names, failure, index)}; the network '
      'before that step is kept',
      soft_wrap=True,
      highlight=False,
    )


def _score(loss: Loss, metrics, val, counts) -> float:
  """Hypervolume of the population, in (error, ln nonzeros)."""
  error = 1 - (metrics.score if np.isnan(val.score).all() else val.score)
  if not loss.classes:  # It may be of any size: now below 1, in the same order.
    error = error / (1 + abs(error))
  nonzeros = np.maximum(counts.nonzeros.total, 1)
  points = np.column_stack([error, np.log(nonzeros)])
  total = int(counts.nonzeros.size[0])
  points = points[np.isfinite(points).all(axis=1)]
  return mopt.hypervolume(points, (1.0, math.log(total) + 1))


def _profiled(job: Job, number: int):
  """Traces the second epoch, or the only one, which compiles."""
  if not job.config.profile or number != min(1, job.config.epochs - 1):
    return contextlib.nullcontext()
  folder = job.workdir / 'profile'
  return jax.profiler.trace(folder, create_perfetto_trace=True)


def _progress(console: Console) -> Progress:
  return Progress(
    TextColumn('epoch'),
    MofNCompleteColumn(),
    BarColumn(bar_width=20),
    TimeElapsedColumn(),  # a sign of life in a long epoch
    TextColumn('<'),
    TimeRemainingColumn(),
    TextColumn('{task.description}'),
    console=console,
    disable=not console.is_terminal,
  )


def _range(values: np.ndarray, form: str) -> str:
  low, high = values.min(), values.max()
  text = format(low, form)
  return text if low == high else f'{text}..{format(high, form)}'


def _summary(loss: Loss, metrics, val, counts) -> str:
  has_val = not np.isnan(val.loss).all()
  score = val.score if has_val else metrics.score
  form = '.3f' if loss.classes else '.4g'
  return (
    f'loss {_range(metrics.loss, form)}  '
    f'{"val" if has_val else "train"} {loss.score_name} {_range(score, form)}  '
    f'nonzeros {_range(counts.nonzeros.total, ",")}'
  )


def _save_members(job: Job, members: Sequence[Member], variables: Any) -> None:
  config, data = job.config, job.data
  folder = job.workdir / 'members'
  folder.mkdir()
  names = file_names(config)
  for name, member in zip(names, split_members(variables)):
    network.save(
      folder / f'{name}.npz',
      network.Network(
        variables=member,
        model=job.model_name,
        num_classes=data.num_classes,
        image_shape=data.train.images.shape[1:],
        mean=data.mean,
        std=data.std,
        class_names=data.class_names,
      ),
    )
