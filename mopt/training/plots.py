"""Pictures of a run."""

from collections.abc import Sequence
import os
from typing import Any

import matplotlib
from matplotlib import colors
from matplotlib import figure
from matplotlib import ticker
import numpy as np

from mopt.training.data import SPLIT_NAMES
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss

# viridis is readable for the colour-blind and in grey.
_COLORMAP = matplotlib.colormaps['viridis']


def plot_front(
  path: str | os.PathLike,
  rows: Sequence[dict[str, Any]],
  title: str,
  split: str = 'test',
  retrained: Sequence[dict[str, Any]] = (),
  loss: Loss = cross_entropy,
  counted: str = 'in the dense layers',
) -> None:
  """Draws the score against nonzeros, the front and its knee.

  Dots are filled if nothing dominates them. Where a weight has several seeds, a
  cross spans all of them.

  Args:
    path: of the .png file.
    rows: of results.csv, with `pareto` and `knee` set; drawn if their `status`
      is ok.
    title: above the axes.
    split: whose score is drawn: `'train'`, `'val'` or `'test'`.
    retrained: rows of networks that were trained longer, drawn as stars.
    loss: of the run.
    counted: which weights the nonzeros are of.
  """
  picture = figure.Figure(figsize=(6.4, 4.4), layout='constrained', dpi=150)
  axes = picture.add_subplot()
  factor = 100 if loss.classes else 1
  score = lambda row: factor * row[f'{loss.score_name}_{split}']
  alive = [
    row
    for row in rows
    if row.get('status', 'ok') == 'ok' and np.isfinite(score(row))
  ]
  show = lambda y: f'{y:.1f} %' if loss.classes else f'{y:.4g}'
  weights = list(filter(None, map(_weight, alive)))
  norm = None
  if weights:
    low, high = min(weights), max(weights)
    norm = (
      colors.LogNorm(low / 2, high * 2)
      if low == high
      else colors.LogNorm(low, high)
    )

  def color(row):
    weight = _weight(row)
    if norm is None or weight is None:
      return '0.4'
    return _COLORMAP(norm(weight)) if weight else '0.6'

  front = sorted(
    (row for row in alive if row['pareto']), key=lambda row: row['nonzeros']
  )
  heights = [score(row) for row in front]
  # A front of three is no line.
  if heights == sorted(heights):
    axes.plot(
      [row['nonzeros'] for row in front],
      heights,
      color='0.75',
      linewidth=1,
      zorder=1,
    )
  for group in _by_weight(alive):
    _cross(axes, group, score, color(group[0]))
  for row in alive:
    axes.scatter(
      row['nonzeros'],
      score(row),
      s=46,
      facecolor=color(row) if row['pareto'] else 'none',
      edgecolor=color(row),
      linewidth=1.5,
      zorder=2,
    )
    if row['knee']:
      axes.scatter(
        row['nonzeros'],
        score(row),
        s=190,
        facecolor='none',
        edgecolor='black',
        linewidth=1.5,
        zorder=3,
      )
      axes.annotate(
        f'knee: {row["nonzeros"]:,} nonzeros, {show(score(row))}',
        (row['nonzeros'], score(row)),
        xytext=(14, -22),
        textcoords='offset points',
        arrowprops={'arrowstyle': '-', 'color': '0.4'},
      )
  if retrained:
    axes.scatter(
      [row['nonzeros'] for row in retrained],
      [score(row) for row in retrained],
      s=90,
      marker='*',
      color='black',
      zorder=4,
      label=f'trained in full, {len(retrained)} seed(s)',
    )
    axes.legend(loc='lower right', fontsize='small')
  if norm is not None:
    scale = matplotlib.cm.ScalarMappable(norm, _COLORMAP)
    label = f'{list(_weights(alive[0]))[-1].removeprefix("weight_")} weight'
    picture.colorbar(scale, ax=axes, label=label)
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:,.0f}'))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  # A pattern, and the name of a file, may hold what begins a formula.
  axes.set_xlabel(f'nonzero weights {counted}', parse_math=False)
  unit = ' (%)' if loss.classes else ''
  axes.set_ylabel(f'{SPLIT_NAMES[split]} {loss.score_name}{unit}')
  axes.set_title(title, fontsize='medium', parse_math=False)
  axes.grid(alpha=0.3)
  failed = len(rows) - len(alive)
  if failed:
    axes.text(
      0.02,
      0.98,
      f'{failed} collapsed, not shown',
      verticalalignment='top',
      transform=axes.transAxes,
    )
  picture.savefig(path)


def _weights(row) -> dict[str, float | None]:
  """The weights of the objectives, by the names of their columns."""
  return {name: x for name, x in row.items() if name.startswith('weight_')}


def _weight(row) -> float | None:
  """That of the second objective, if there are but two."""
  weights = list(_weights(row).values())
  return weights[-1] if len(weights) <= 2 else None


def _by_weight(rows) -> list[list[dict[str, Any]]]:
  """Rows of each weight that has more than one."""
  groups: dict[Any, list[dict[str, Any]]] = {}
  for row in rows:
    groups.setdefault(tuple(_weights(row).values()), []).append(row)
  return [group for group in groups.values() if len(group) > 1]


def _cross(axes, group, score, color) -> None:
  """Error bars from the least to the largest of a group, at its medians."""
  x = np.array([row['nonzeros'] for row in group], float)
  y = np.array([score(row) for row in group])
  span = lambda v: [[np.median(v) - v.min()], [v.max() - np.median(v)]]
  axes.errorbar(
    np.median(x),
    np.median(y),
    xerr=span(x),
    yerr=span(y),
    color=color,
    linewidth=1,
    capsize=2,
    zorder=1,
  )


def plot_search(
  path: str | os.PathLike,
  hypervolumes: Sequence[float],
  title: str,
  error: str = 'error',
) -> None:
  """Draws how the hypervolume grows with the number of trainings.

  Args:
    path: of the .png file.
    hypervolumes: after the first training, the second one, and so on.
    title: above the axes.
    error: what front and knee go by, in words.
  """
  picture = figure.Figure(figsize=(6.4, 4.0), layout='constrained', dpi=150)
  axes = picture.add_subplot()
  axes.step(
    range(1, len(hypervolumes) + 1),
    hypervolumes,
    where='post',
    marker='o',
    color=_COLORMAP(0.3),
  )
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
  axes.set_xlabel('trainings')
  axes.set_ylabel(f'hypervolume in ({error}, ln nonzeros)')
  axes.set_title(title, fontsize='medium', parse_math=False)
  axes.grid(alpha=0.3)
  picture.savefig(path)
