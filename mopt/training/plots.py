"""Pictures of a run."""

from collections.abc import Sequence
import os
from typing import Any

import matplotlib
from matplotlib import colors
from matplotlib import figure
from matplotlib import ticker

from mopt.training.results import is_collapsed

# viridis is readable for the colour-blind and in grey.
_COLORMAP = matplotlib.colormaps['viridis']


def plot_front(
  path: str | os.PathLike, rows: Sequence[dict[str, Any]], title: str
) -> None:
  """Draws test accuracy against nonzeros, the front and its knee.

  Args:
    path: of the .png file.
    rows: of results.csv, with `pareto` and `knee` set.
    title: above the axes.
  """
  alive = [row for row in rows if not is_collapsed(row)]
  picture = figure.Figure(figsize=(6.4, 4.4), layout='constrained', dpi=150)
  axes = picture.add_subplot()
  weights = [row['l1'] for row in alive if row['l1']]
  norm = None
  if weights:
    low, high = min(weights), max(weights)
    norm = (
      colors.LogNorm(low / 2, high * 2)
      if low == high
      else colors.LogNorm(low, high)
    )

  def color(row):
    if norm is None or row['l1'] is None:
      return '0.4'
    return _COLORMAP(norm(row['l1'])) if row['l1'] else '0.6'

  front = sorted(
    (row for row in alive if row['pareto']), key=lambda row: row['nonzeros']
  )
  axes.plot(
    [row['nonzeros'] for row in front],
    [100 * row['acc_test'] for row in front],
    color='0.75',
    linewidth=1,
    zorder=1,
  )
  for row in alive:
    axes.scatter(
      row['nonzeros'],
      100 * row['acc_test'],
      s=46,
      facecolor=color(row) if row['pareto'] else 'none',
      edgecolor=color(row),
      linewidth=1.5,
      zorder=2,
    )
    if row['knee']:
      axes.scatter(
        row['nonzeros'],
        100 * row['acc_test'],
        s=190,
        facecolor='none',
        edgecolor='black',
        linewidth=1.5,
        zorder=3,
      )
      axes.annotate(
        f'knee: {row["nonzeros"]:,} nonzeros, {100 * row["acc_test"]:.1f} %',
        (row['nonzeros'], 100 * row['acc_test']),
        xytext=(14, -22),
        textcoords='offset points',
        arrowprops={'arrowstyle': '-', 'color': '0.4'},
      )
  if norm is not None:
    scale = matplotlib.cm.ScalarMappable(norm, _COLORMAP)
    picture.colorbar(scale, ax=axes, label='l1 weight')
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:,.0f}'))
  axes.xaxis.set_minor_formatter(ticker.NullFormatter())
  axes.set_xlabel('nonzero weights in the dense layers')
  axes.set_ylabel('test accuracy (%)')
  axes.set_title(title, fontsize='medium')
  axes.grid(alpha=0.3)
  failed = len(rows) - len(alive)
  if failed:
    axes.text(
      0.98,
      0.02,
      f'{failed} collapsed, not shown',
      horizontalalignment='right',
      transform=axes.transAxes,
    )
  picture.savefig(path)
