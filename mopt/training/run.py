"""One run from data to results: the loop around the compiled part."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
import platform
import subprocess
import time
from typing import Any

from flax import linen as nn
import jax
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeElapsedColumn
from rich.progress import TimeRemainingColumn
from rich.table import Table

import mopt
from mopt.masks import masked_leaves
from mopt.training import epoch as epoch_lib
from mopt.training import optimizer as optimizer_lib
from mopt.training import results
from mopt.training.batches import steps_per_epoch
from mopt.training.config import Config
from mopt.training.data import Dataset
from mopt.training.evaluation import Evaluation
from mopt.training.layout import Layout


def run(
  config: Config,
  model: nn.Module,
  data: Dataset,
  workdir: str | os.PathLike,
  devices: Sequence[jax.Device] | None = None,
  console: Console | None = None,
) -> list[dict[str, Any]]:
  """Trains a population and writes what came out.

  In `workdir`: config.json, with versions and devices; metrics.jsonl, a line
  per epoch and member as soon as an epoch ends; histograms.jsonl, how the
  weights of each dense layer are distributed, before and after the pruning at
  the start, every fifth epoch and at the end; and at the end results.csv,
  front.png, `members/*.npz`, which `mopt.training.load` reads, and in
  config.json the seconds it all took.

  Args:
    config: the settings.
    model: a linen module, see `mopt.training.epoch.make_program`.
    data: the data set.
    workdir: an existing folder.
    devices: see `mopt.training.epoch.make_program`.
    console: where progress and the table go; the standard output by default.

  Returns:
    The rows of results.csv, one per member.

  Raises:
    ValueError: if batch, data and model do not fit, before anything is
      written.
  """
  start = time.perf_counter()
  console = console or Console()
  workdir = pathlib.Path(workdir)
  epoch_lib.check_fit(config, model, data)
  about = dataclasses.asdict(config) | {'environment': environment()}
  results.write_json(workdir / 'config.json', about)
  rows = train_members(config, model, data, workdir, devices, console)
  split = selection_split(config, data)
  results.mark_front(rows, split)
  results.write_csv(workdir / 'results.csv', rows)
  # Imported late: matplotlib takes a second, which --help would wait for.
  from mopt.training import plots

  plots.plot_front(
    workdir / 'front.png',
    rows,
    f'{config.model} on {data.name}, {config.optimizer}: '
    f'knee and front by {results.SPLIT_NAMES[split]} error',
  )
  seconds = round(time.perf_counter() - start, 1)
  results.write_json(workdir / 'config.json', about | {'seconds': seconds})
  console.print(table(rows, split))
  console.print(
    f'{seconds:.0f} s; {workdir}/front.png, results.csv, metrics.jsonl, '
    'members/',
    soft_wrap=True,
  )
  return rows


def selection_split(config: Config, data: Dataset) -> str:
  """The split whose error chooses front and knee."""
  if config.select_on == 'test':
    return 'test'
  return 'val' if len(data.val.labels) else 'train'


def train_members(
  config: Config,
  model: nn.Module,
  data: Dataset,
  workdir: pathlib.Path,
  devices: Sequence[jax.Device] | None,
  console: Console,
  splits: Sequence[str] = ('train', 'val', 'test'),
) -> list[dict[str, Any]]:
  """Trains a population, with logs and `members/` in `workdir`.

  Returns:
    The columns of results.csv but for the front's, of the pruned networks; NaN
    for scores on other than `splits`.
  """
  program = epoch_lib.make_program(config, model, data, devices)
  members = [(l1, seed) for seed in config.seed for l1 in config.l1_values]
  console.print(
    f'{len(members)} x {config.model} on {data.name} '
    f'({len(data.train.labels):,} training examples), {config.optimizer}, '
    f'{_devices(program.layout)} -> {workdir}',
    soft_wrap=True,
  )
  state = _train(config, data, program, members, workdir, console)
  rows = _rows(members, program, state, splits)
  variables = program.layout.collect(state.variables)
  _save_members(workdir / 'members', config, data, members, variables)
  return rows


def _devices(layout: Layout) -> str:
  number = len(layout.devices)
  use = 'members on' if layout.is_spread else 'batches on'
  kind = layout.devices[0].platform.upper()
  return f'{use} {number} {kind} device{"s" if number > 1 else ""}'


def _train(
  config: Config,
  data: Dataset,
  program: epoch_lib.Program,
  members: Sequence[tuple[float | None, int]],
  workdir: pathlib.Path,
  console: Console,
) -> epoch_lib.State:
  """All epochs, with progress and logs; returns the pruned networks."""
  steps = steps_per_epoch(config, len(data.train.labels))
  rate = optimizer_lib.learning_rate(config, steps)
  layout = program.layout

  def log_histograms(epoch, when, state):
    head = {'epoch': epoch, 'when': when}
    params = layout.collect(state.params)
    records = _histogram_records(members, head, params)
    results.append_jsonl(workdir / 'histograms.jsonl', records)

  state = program.init()
  log_histograms(0, 'initial', state)
  state = program.prune(state)
  log_histograms(0, 'pruned', state)
  with _progress(console) as progress:
    task = progress.add_task('compiling, first epoch', total=config.epochs)
    for number in range(config.epochs):
      with _profiled(config, number, workdir):
        state, metrics = program.epoch(state, number)
      val = program.evaluate(state, 'val')
      counts = program.complexity(state)
      if (number + 1) % 5 == 0 and number + 1 < config.epochs:
        log_histograms(number + 1, 'epoch', state)
      head = {
        'epoch': number + 1,
        'learning_rate': np.asarray(rate(number * steps)).item(),
      }
      results.append_jsonl(
        workdir / 'metrics.jsonl',
        _epoch_records(members, head, metrics, val, counts),
      )
      summary = _summary(metrics, val, counts)
      progress.update(task, advance=1, description=summary)
      if not console.is_terminal:
        console.print(
          f'epoch {number + 1}/{config.epochs}  {summary}', soft_wrap=True
        )
  state = program.prune(state)
  log_histograms(config.epochs, 'final', state)
  return state


def _profiled(config: Config, number: int, workdir: pathlib.Path):
  """Traces the second epoch, or the only one, which compiles."""
  if not config.profile or number != min(1, config.epochs - 1):
    return contextlib.nullcontext()
  return jax.profiler.trace(workdir / 'profile', create_perfetto_trace=True)


def environment() -> dict[str, Any]:
  """What a run depends on besides its settings."""
  return {
    'mopt': mopt.__version__,
    'jax': jax.__version__,
    'optax': optax.__version__,
    'python': platform.python_version(),
    'devices': [d.device_kind for d in jax.local_devices()],
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


def _summary(metrics, val, counts) -> str:
  has_val = not np.isnan(val.ce).any()
  accuracy = val.accuracy if has_val else metrics.accuracy
  return (
    f'loss {_range(metrics.ce, ".3f")}  '
    f'{"val" if has_val else "train"} accuracy {_range(accuracy, ".3f")}  '
    f'nonzeros {_range(counts.nonzeros.total, ",")}'
  )


def _epoch_records(members, head, metrics, val, counts):
  nonzeros, l1_norm = counts
  columns = metrics._asdict() | {
    'ce_val': val.ce,
    'accuracy_val': val.accuracy,
    'l1_norm': l1_norm,
    'nonzeros': nonzeros.total,
  }
  columns |= {_layer(k): v for k, v in nonzeros.per_leaf.items()}
  flat = {name: column.ravel().tolist() for name, column in columns.items()}
  return [
    head
    | {'l1': l1, 'seed': seed}
    | {name: column[index] for name, column in flat.items()}
    for index, (l1, seed) in enumerate(members)
  ]


def _layer_name(path: str) -> str:
  return path.removesuffix('/kernel').replace('/', '_')


def _layer(path: str) -> str:
  return f'nonzeros_{_layer_name(path)}'


def _histogram_records(members, head, params) -> list[dict[str, Any]]:
  records = []
  for (l1, seed), tree in zip(members, _by_member(params)):
    for path, kernel in masked_leaves(mopt.dense_kernels, tree):
      about = head | {'l1': l1, 'seed': seed, 'layer': _layer_name(path)}
      records.append(about | results.weight_histogram(kernel))
  return records


def _by_member(tree) -> Iterator[Any]:
  """The tree of each member, from leaves `[S, L, ...]` in NumPy."""
  leaves, structure = jax.tree.flatten(tree)
  flat = (x.reshape(-1, *x.shape[2:]) for x in leaves)
  return (jax.tree.unflatten(structure, member) for member in zip(*flat))


def _rows(members, program, state, splits) -> list[dict[str, Any]]:
  nonzeros, l1_norm = program.complexity(state)
  unknown = Evaluation(*[np.full(program.layout.size, np.nan)] * 2)
  scores = {
    s: program.evaluate(state, s) if s in splits else unknown
    for s in results.SPLIT_NAMES
  }
  columns = {f'ce_{split}': score.ce for split, score in scores.items()}
  columns |= {'l1_norm': l1_norm, 'nonzeros': nonzeros.total}
  columns |= {_layer(k): v for k, v in nonzeros.per_leaf.items()}
  columns |= {f'acc_{split}': score.accuracy for split, score in scores.items()}
  flat = {k: np.asarray(v).ravel().tolist() for k, v in columns.items()}
  return [
    {'l1': l1, 'seed': seed} | {k: v[index] for k, v in flat.items()}
    for index, (l1, seed) in enumerate(members)
  ]


def _save_members(folder, config: Config, data: Dataset, members, variables):
  folder.mkdir()
  for (l1, seed), member in zip(members, _by_member(variables)):
    weight = config.optimizer if l1 is None else f'l1_{l1:g}'
    results.save(
      folder / f'{weight}_seed_{seed}.npz',
      results.Network(
        variables=member,
        model=config.model,
        num_classes=data.num_classes,
        image_shape=data.train.images.shape[1:],
        mean=data.mean,
        std=data.std,
      ),
    )


def table(rows: Sequence[dict[str, Any]], split: str) -> Table:
  """Rows of results.csv for people."""
  name = results.SPLIT_NAMES[split]
  page = Table(
    box=box.SIMPLE_HEAD,
    caption=f'front and knee: ({name} error, log nonzeros)',
  )
  for column in ('l1', 'seed', 'l1 norm', 'nonzeros', 'train', 'val', 'test'):
    page.add_column(column, justify='right')
  page.add_column('')
  for row in rows:
    notes = [
      'collapsed' if results.is_collapsed(row) else '',
      'front' if row['pareto'] and not row['knee'] else '',
      'knee' if row['knee'] else '',
    ]
    page.add_row(
      'found' if row['l1'] is None else f'{row["l1"]:.4g}',
      str(row['seed']),
      f'{row["l1_norm"]:.1f}',
      f'{row["nonzeros"]:,}',
      *(_percent(row[f'acc_{s}']) for s in ('train', 'val', 'test')),
      ', '.join(filter(None, notes)),
      style='bold' if row['knee'] else '',
    )
  return page


def _percent(value: float) -> str:
  return '-' if np.isnan(value) else f'{100 * value:.2f} %'
