"""What all pictures share: size, colours of l1 weights, empty panels."""

from collections.abc import Iterable
import pathlib

import matplotlib
from matplotlib import colors
from matplotlib import figure
from matplotlib import ticker
from matplotlib.axes import Axes
import numpy as np

# Readable for the colour-blind and in grey. Its pale end is hard to see on
# white, and is left out.
COLORMAP = colors.ListedColormap(
  matplotlib.colormaps['viridis'](np.linspace(0, 0.92, 256))
)
# One for each kind of curve, beside its marker or line style.
DARK, MIDDLE, LIGHT = (COLORMAP(x) for x in (0.0, 0.5, 0.95))
_GREY = (0.55, 0.55, 0.55, 1.0)


class Picture:
  """A row of panels, drawn without pyplot and its global state."""

  def __init__(self, panels: int, title: str, width: float = 4.4):
    self.figure = figure.Figure(
      figsize=(max(width * panels, 6.0), 4.2), layout='constrained', dpi=90
    )
    self.axes: list[Axes] = list(
      self.figure.subplots(1, panels, squeeze=False)[0]
    )
    self.figure.suptitle(title, fontsize='medium')
    for axes in self.axes:
      axes.grid(alpha=0.3)

  def color_bar(self, scale: colors.LogNorm, axes: list[Axes]) -> None:
    mappable = matplotlib.cm.ScalarMappable(scale, COLORMAP)
    self.figure.colorbar(mappable, ax=axes, label='l1 weight (grey: 0)')

  def save(self, path: pathlib.Path) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    self.figure.savefig(path)
    return path


def scale_of(weights: Iterable[float]) -> colors.LogNorm:
  """The colours of positive l1 weights; 0 is grey."""
  positive = [weight for weight in weights if weight > 0] or [1.0]
  low, high = min(positive), max(positive)
  return colors.LogNorm(low, high if high > low else 2 * low)


def color(scale: colors.LogNorm, weight: float) -> tuple[float, ...]:
  return COLORMAP(float(scale(weight))) if weight > 0 else _GREY


def epoch_axis(axes: Axes) -> None:
  axes.set_xlabel('epoch')
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))


def lowest_accuracy(accuracies: Iterable[float]) -> float | None:
  """Where an axis begins, in percent; `None` leaves it to matplotlib.

  The best networks differ by tenths of a percent on MNIST, and by some percent
  on CIFAR10, which one that has hardly learnt anything would press into a line.
  """
  best = max(accuracies)
  return 95.0 if best > 97 else 60.0 if best > 80 else None


def not_measured(axes: Axes) -> None:
  """An empty panel, which says why it is empty."""
  axes.grid(False)
  axes.set_xticks([])
  axes.set_yticks([])
  axes.text(
    0.5,
    0.5,
    'not measured (needs a GPU)',
    ha='center',
    va='center',
    color='0.4',
    transform=axes.transAxes,
  )
