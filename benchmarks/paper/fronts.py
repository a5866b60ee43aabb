"""Fig. 4 and the strategies of section 6.2.1: fronts, ours and the paper's."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
import numpy as np

from benchmarks.paper import canvas
from benchmarks.paper import tables
from benchmarks.paper.pieces import Result
import mopt

Results = Mapping[str, Sequence[Result]]


def fig4(results: Results, path: pathlib.Path) -> pathlib.Path:
  """Error against the l1 norm, accuracy against the number of nonzeros."""
  ours = results['table2c']
  rows = [row for result in ours for row in tables.alive(result.rows)]
  paper = tables.alive(tables.paper_rows('table2c'))
  picture = canvas.Picture(
    2, f'Fig. 4, batchwise pruning. {tables.describe(ours)}'
  )
  scale = canvas.scale_of(row['weight_l1'] for row in rows + paper)
  left, right = picture.axes
  for axes, x, y in ((left, 'ce_test', 'l1'), (right, 'acc', 'nonzeros')):
    _dots(axes, paper, x, y, scale, is_filled=False)
    _dots(axes, rows, x, y, scale, is_filled=True)
    _ring(axes, [row for row in rows if row['knee']], x, y, 'black')
    _ring(axes, _knee(paper), x, y, '0.6')
    axes.set_yscale('log')
  left.set_title('(a)')
  left.set_xlabel('test cross entropy (nats)')
  left.set_ylabel('l1 norm of the dense kernels')
  right.set_title('(b)')
  right.set_xlabel('test accuracy (%)')
  right.set_ylabel('nonzero weights in the dense layers')
  lowest = canvas.lowest_accuracy(_value(row, 'acc') for row in rows)
  right.set_xlim(left=lowest)
  _legend(left, rows, paper, lowest)
  picture.color_bar(scale, picture.axes)
  return picture.save(path)


def _value(row: Mapping[str, Any], name: str) -> float:
  return 100 * row['accuracy_test'] if name == 'acc' else row[name]


def _dots(axes: Axes, rows, x, y, scale, *, is_filled) -> None:
  hues: Any = [canvas.color(scale, row['weight_l1']) for row in rows]
  axes.scatter(
    [_value(row, x) for row in rows],
    [_value(row, y) for row in rows],
    s=42,
    facecolors=hues if is_filled else 'none',
    edgecolors=hues,
    linewidths=1.4,
    zorder=2,
  )


def _ring(axes: Axes, rows, x, y, color) -> None:
  axes.scatter(
    [_value(row, x) for row in rows],
    [_value(row, y) for row in rows],
    s=170,
    facecolors='none',
    edgecolors=color,
    linewidths=1.4,
    zorder=3,
  )


def _knee(rows):
  """The knee by the trainer's rule, on (training error, log nonzeros)."""
  points = [(1 - row['accuracy_train'], row['nonzeros']) for row in rows]
  index = mopt.knee(points, method='chord', scale='log')
  return [] if index is None else [rows[index]]


def _legend(axes: Axes, rows, paper, lowest) -> None:
  def dot(label, **style):
    return Line2D([], [], linestyle='none', marker='o', label=label, **style)

  def hidden(rows):
    number = sum(_value(row, 'acc') < (lowest or 0) for row in rows)
    return f', {number} below {lowest:g} %' if number else ''

  hue, ring = canvas.MIDDLE, dict(markersize=12, markerfacecolor='none')
  axes.legend(
    handles=[
      dot('ours' + hidden(rows), color=hue),
      dot('paper' + hidden(paper), color=hue, markerfacecolor='none'),
      dot('knee, ours', color='black', **ring),
      dot('knee, paper', color='0.6', **ring),
    ],
    title='no collapsed networks; knees by\ntraining error and log nonzeros',
    fontsize='small',
    title_fontsize='small',
  )


_STRATEGIES = (
  ('table2a', 'after training', canvas.LIGHT, '^'),
  ('table2b', 'epochwise', canvas.MIDDLE, 's'),
  ('table2c', 'batchwise', canvas.DARK, 'o'),
  ('table2c_tuned', 'batchwise, tuned rate', 'black', 'D'),
)


def strategies(results: Results, path: pathlib.Path) -> pathlib.Path:
  """Does pruning more often give better networks? Section 6.2.1."""
  picture = canvas.Picture(
    1,
    f'When to prune. {tables.describe(results["table2c"])}; lines: fronts',
    width=7.0,
  )
  (axes,) = picture.axes
  everything = []
  for name, label, hue, marker in _STRATEGIES:
    ours = [row for r in results[name] for row in tables.alive(r.rows)]
    _front(axes, ours, f'{label}, ours', hue, marker, is_filled=True)
    everything += ours
    if name == 'table2c_tuned':  # The paper has no such run.
      continue
    paper = tables.alive(tables.paper_rows(name))
    paper = [row for row in paper if not np.isnan(row['accuracy_test'])]
    if paper:
      _front(axes, paper, f'{label}, paper', hue, marker, is_filled=False)
    else:
      text = f'{label}, paper: could not be read'
      axes.plot([], [], linestyle='none', label=text)
  axes.set_xscale('log')
  lowest = canvas.lowest_accuracy(_value(row, 'acc') for row in everything)
  axes.set_ylim(bottom=lowest)
  axes.set_xlabel('nonzero weights in the dense layers')
  axes.set_ylabel('test accuracy (%)')
  axes.legend(fontsize='small')
  return picture.save(path)


def front(results: Results, path: pathlib.Path) -> pathlib.Path:
  """The paper's front, ours with its settings, and ours with a better rate."""
  tuned = results['table2c_tuned']
  picture = canvas.Picture(
    1, f'{tables.describe(tuned)}; lines: fronts, rings: knees', width=7.0
  )
  (axes,) = picture.axes
  paper = tables.alive(tables.paper_rows('table2c'))
  mine = {
    name: [row for r in results[name] for row in tables.alive(r.rows)]
    for name in ('table2c', 'table2c_tuned')
  }
  for rows, label, hue, marker, is_filled in (
    (mine['table2c_tuned'], 'ours, tuned rate', canvas.DARK, 'o', True),
    (mine['table2c'], "ours, the paper's rate", canvas.MIDDLE, 's', True),
    (paper, 'paper, Table 2(c)', canvas.LIGHT, '^', False),
  ):
    _front(axes, rows, label, hue, marker, is_filled=is_filled)
    _ring(axes, _knee(rows), 'nonzeros', 'acc', 'black')
  axes.set_xscale('log')
  axes.set_ylim(
    bottom=canvas.lowest_accuracy(
      _value(row, 'acc') for rows in mine.values() for row in rows
    )
  )
  axes.set_xlabel('nonzero weights in the dense layers, of 58,920')
  axes.set_ylabel('test accuracy (%)')
  axes.legend(fontsize='small')
  return picture.save(path)


def _front(axes: Axes, rows, label, hue, marker, *, is_filled) -> None:
  """All points, and a line through those that none of them dominates."""
  points = sorted((row['nonzeros'], 100 * row['accuracy_test']) for row in rows)
  keep = mopt.nondominated([(x, -y) for x, y in points])
  style = dict(
    color=hue,
    marker=marker,
    markerfacecolor=hue if is_filled else 'none',
  )
  axes.plot(*zip(*points), linestyle='none', **style)
  front = [point for point, is_kept in zip(points, keep) if is_kept]
  axes.plot(
    *zip(*front), linestyle='-' if is_filled else '--', label=label, **style
  )
