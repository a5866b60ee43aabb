"""Fig. 9: four searches for the knee, and what each has found when."""

from collections.abc import Mapping, Sequence
import math
import pathlib
from typing import Any

from matplotlib import ticker
import numpy as np

from benchmarks.paper import canvas
from benchmarks.paper import tables
from benchmarks.paper.pieces import Result
import mopt
from mopt.training.knee_search import hypervolumes

Results = Mapping[str, Sequence[Result]]

# In the order of the panels of the paper, with a marker and a line style.
_SEARCHES = (
  ('fig9_grid', 'grid', 'o', '-'),
  ('fig9_dichotomic', 'dichotomic', 's', '--'),
  ('fig9_bisection', 'bisection', 'D', '-.'),
  ('fig9_stochastic', 'stochastic dichotomic', '^', ':'),
)
_HEADINGS = (
  'search',
  'seed',
  'trainings',
  'hypervolume',
  'after 5',
  'after 10',
  'l1 of the knee',
  'its nonzeros',
  'val. acc. %',
  'in full: nonzeros',
  'val. acc. %',
  'test acc. %',
)


def fig9(results: Results, path: pathlib.Path) -> pathlib.Path:
  """What each search has trained, and the hypervolume after each training."""
  first = results[_SEARCHES[0][0]][0]
  picture = canvas.Picture(
    5,
    'Fig. 9, searches for the knee on validation data. '
    f'{"quick: " * first.quick}LeNet-5 on {first.config["dataset"]}, '
    f'{first.config["search_epochs"]} epochs; panels: seed '
    f'{first.config["seed"][0]}',
    width=3.6,
  )
  everything = [r for name, *_ in _SEARCHES for r in results[name]]
  rows = [row for r in everything for row in tables.alive(r.rows)]
  scale = canvas.scale_of(row['weight_l1'] for row in rows)
  *panels, right = picture.axes
  for letter, axes, (name, label, *_) in zip('abcd', panels, _SEARCHES):
    _panel(axes, results[name][0], scale)
    axes.set_title(f'({letter}) {label}', fontsize='medium')
    axes.set_xlim(0, 1.05 * max(row['ce_val'] for row in rows))
    axes.set_ylim(*_span([row['l1'] for row in rows]))
  panels[0].set_ylabel('l1 norm of the dense kernels')
  picture.color_bar(scale, panels)
  for name, label, marker, line in _SEARCHES:
    _growth(right, results[name], label, marker, line)
  right.set_title('hypervolume; shaded: all seeds', fontsize='medium')
  right.set_xlabel('trainings')
  right.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  right.legend(fontsize='small')
  return picture.save(path)


def _span(values: Sequence[float]) -> tuple[float, float]:
  return min(values) / 1.3, max(values) * 1.3


def _panel(axes, result: Result, scale) -> None:
  """The axes of the paper; networks that something dominates are hollow."""
  rows = tables.alive(result.rows)
  hues: Any = [canvas.color(scale, row['weight_l1']) for row in rows]
  points = [(row['ce_val'], row['l1']) for row in rows]
  keep = mopt.nondominated(points)
  axes.scatter(
    *zip(*points),
    s=36,
    facecolors=[h if kept else 'none' for h, kept in zip(hues, keep)],
    edgecolors=hues,
    linewidths=1.3,
    zorder=2,
  )
  knee = [(r['ce_val'], r['l1']) for r in rows if r['knee']]
  if knee:
    axes.scatter(
      *zip(*knee), s=170, facecolors='none', edgecolors='black', zorder=3
    )
  axes.set_yscale('log')
  axes.set_xlabel('validation cross entropy')
  failed = len(result.rows) - len(rows)
  note = f'{len(result.rows)} trainings'
  if failed:
    note += f', {failed} collapsed'
  axes.text(0.97, 0.97, note, ha='right', va='top', transform=axes.transAxes)


def _growth(axes, runs: Sequence[Result], label, marker, line) -> None:
  """The mean over the seeds, and the range of them."""
  curves = [growth(run.rows) for run in runs]
  length = max(map(len, curves))
  # A search that has ended stays where it is.
  table = np.array([c + [c[-1]] * (length - len(c)) for c in curves])
  x = np.arange(1, length + 1)
  several = f', {len(runs)} seeds' if len(runs) > 1 else ''
  (drawn,) = axes.plot(
    x,
    table.mean(axis=0),
    linestyle=line,
    marker=marker,
    markersize=4,
    label=label + several,
  )
  axes.fill_between(
    x,
    table.min(axis=0),
    table.max(axis=0),
    color=drawn.get_color(),
    alpha=0.2,
    linewidth=0,
  )


def growth(rows: Sequence[dict[str, Any]]) -> list[float]:
  """Hypervolume of the first training, the first two, and so on.

  In (validation error, ln nonzeros), up to `tables.REFERENCE`.
  """
  error, nonzeros = tables.REFERENCE
  return hypervolumes(rows, 'val', (error, math.log(nonzeros)))


def markdown(results: Results) -> str:
  """A row per search and seed."""
  first = results[_SEARCHES[0][0]][0]
  quick = 'Quick: ' * first.quick
  lines = [
    f'{quick}Fig. 9: searches for the knee, LeNet-5 on '
    f'{first.config["dataset"]}, trainings of '
    f'{first.config["search_epochs"]} epochs; the knee in full, '
    f'{first.config["epochs"]} epochs.',
    '',
    '| ' + ' | '.join(_HEADINGS) + ' |',
    '|---' * len(_HEADINGS) + '|',
  ]
  for name, label, *_ in _SEARCHES:
    lines += [
      f'| {" | ".join(_cells(label, result))} |' for result in results[name]
    ]
  error, nonzeros = tables.REFERENCE
  lines += [
    '',
    f'Hypervolumes are in (validation error, ln nonzeros) up to ({error:g}, '
    f'ln {nonzeros:,}). Knees by Das, in the same plane, on validation data; '
    'the test set is scored for the knee alone, after it was trained in full.',
    '',
    *_means(results),
    '',
    '`python -m benchmarks.paper fig9`',
  ]
  return '\n'.join(lines) + '\n'


def _cells(label: str, result: Result) -> list[str]:
  volumes = growth(result.rows)
  after = lambda n: f'{volumes[min(n, len(volumes)) - 1]:.4f}'
  percent = lambda value: f'{100 * value:.2f}'
  cells = [
    label,
    ', '.join(map(str, result.config['seed'])),
    str(len(result.rows)),
    after(len(volumes)),
    after(5),
    after(10),
  ]
  knee = [row for row in result.rows if row['knee']]
  if not knee:
    return cells + ['none'] + [tables.MISSING] * 5
  (row,) = knee
  (full,) = result.knee
  return [
    *cells,
    f'{row["weight_l1"]:.3g}',
    f'{row["nonzeros"]:,}',
    percent(row['accuracy_val']),
    f'{full["nonzeros"]:,}',
    percent(full['accuracy_val']),
    percent(full['accuracy_test']),
  ]


def _means(results: Results) -> list[str]:
  """Which search wins: the mean hypervolume over the seeds, best first."""
  found = []
  for name, label, *_ in _SEARCHES:
    volumes = [growth(result.rows)[-1] for result in results[name]]
    low, high = min(volumes), max(volumes)
    spread = f' ({low:.4f} to {high:.4f})' if len(volumes) > 1 else ''
    found.append((float(np.mean(volumes)), label, spread))
  found.sort(reverse=True)
  text = ', '.join(f'{label} {v:.4f}{spread}' for v, label, spread in found)
  return [f'Hypervolume, mean over the seeds: {text}.']
