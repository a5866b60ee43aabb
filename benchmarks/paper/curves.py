"""Fig. 3 and 5 to 8: what changes over the epochs."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib.axes import Axes
import numpy as np

from benchmarks.paper import canvas
from benchmarks.paper import plan
from benchmarks.paper import tables
from benchmarks.paper.pieces import Result
import mopt

Results = Mapping[str, Sequence[Result]]
_NAMES = {
  'smgd': 'SMGD',
  'sgd': 'SGD',
  'madam': 'MAdam',
  'adam': 'Adam',
  'mrmsprop': 'MRMSProp',
  'rmsprop': 'RMSProp',
}


def column(
  results: Sequence[Result], name: str, l1: float | None = None
) -> np.ndarray:
  """A curve over the epochs, the mean over the seeds; of one l1 weight."""
  curves = []
  for result in results:
    values = result.epochs[name]
    if l1 is not None:
      values = values[np.isclose(result.epochs['weight_l1'], l1, rtol=1e-9)]
    curves.append(values)
  return np.mean(curves, axis=0)


def _epochs(curve: np.ndarray) -> np.ndarray:
  return np.arange(1, len(curve) + 1)


def fig3(results: Results, path: pathlib.Path) -> pathlib.Path:
  """The learning rate; nothing is trained."""
  del results
  epochs = np.arange(1, 126)
  rate = mopt.logistic_drop(1e-3, 1e-4, transition_steps=125)
  picture = canvas.Picture(1, 'Fig. 3: mopt.logistic_drop(1e-3, 1e-4, 125)')
  (axes,) = picture.axes
  axes.plot(epochs, rate(epochs), color=canvas.DARK)
  axes.set_ylim(bottom=0)
  canvas.epoch_axis(axes)
  axes.set_ylabel('learning rate')
  return picture.save(path)


def fig5(results: Results, path: pathlib.Path) -> pathlib.Path:
  """Nonzeros of layer1, and how the weights of layer3 spread."""
  batchwise, epochwise = results['table2c'], results['table2b']
  picture = canvas.Picture(3, f'Fig. 5. {tables.describe(batchwise)}')
  left, middle, right = picture.axes
  rows = [row for r in (*batchwise, *epochwise) for row in r.rows]
  weights = sorted({row['weight_l1'] for row in rows})
  _layer1(left, batchwise, weights)
  _layer1(middle, epochwise, weights)
  middle.sharey(left)
  left.set_ylabel('nonzero weights in layer1')
  left.set_title('(a) batchwise pruning')
  middle.set_title('(b) epochwise pruning')
  picture.figure.legend(
    handles=left.lines,
    loc='outside lower center',
    ncols=8,
    title='l1 in (a) and (b)',
    fontsize='small',
    title_fontsize='small',
  )
  seed = batchwise[0].config['seed'][0]
  right.set_title(f'(c) batchwise, l1 = 5e-5, seed {seed}')
  _violins(right, batchwise[0])
  return picture.save(path)


def _layer1(axes: Axes, results: Sequence[Result], weights) -> None:
  """A curve per l1, with the colour and the marker that it has in all axes."""
  markers = 'osv^D<>p*hPXd8'
  scale = canvas.scale_of(weights)
  trained = {row['weight_l1'] for row in results[0].rows}
  for index, weight in enumerate(weights):
    curve = np.array([])
    if weight in trained:
      curve = column(results, 'nonzeros_layer1', weight)
    axes.plot(
      _epochs(curve),
      np.where(curve > 0, curve, np.nan),  # A collapse ends its curve.
      color=canvas.color(scale, weight),
      marker=markers[index % len(markers)],
      markevery=5,
      markersize=4,
      label=f'{weight:g}',
    )
  axes.set_yscale('log')
  canvas.epoch_axis(axes)


def _violins(axes: Axes, result: Result) -> None:
  """The nonzero weights at a time as a violin, and the zeros as a number.

  The trainer keeps those of before and after the first pruning, of each fifth
  epoch, and of the end.
  """
  shown = result.histograms
  for place, record in enumerate(shown):
    # Of 840 weights a hundredth is too few to show a shape.
    counts = np.array(record['counts']).reshape(25, -1).sum(axis=1)
    edges = np.linspace(record['low'], record['high'], len(counts) + 1)
    half = np.repeat(0.45 * counts / max(counts.max(), 1), 2)
    axes.fill_betweenx(
      np.repeat(edges, 2)[1:-1],
      place - half,
      place + half,
      color=canvas.MIDDLE,
      linewidth=0,
    )
    axes.annotate(
      f'{record["zeros"]} zeros' if place == 0 else f'{record["zeros"]}',
      (place, 1),
      xycoords=('data', 'axes fraction'),
      xytext=(0, -3),
      textcoords='offset points',
      ha='center',
      va='top',
      fontsize='small',
    )
  axes.margins(y=0.12)
  labels = [_when(record) for record in shown]
  axes.set_xticks(range(len(shown)), labels, rotation=45, ha='right')
  axes.set_ylabel('nonzero weights of layer3')


def _when(record: Mapping[str, Any]) -> str:
  return (
    f'epoch {record["epoch"]}' if record['when'] == 'epoch' else record['when']
  )


def fig6(results: Results, path: pathlib.Path) -> pathlib.Path:
  """VGG on CIFAR10: loss, accuracy, and nonzeros by threshold and schedule."""
  name = next((n for n in plan.CURVES if results.get(n)), None)
  title = 'Fig. 6. VGG on CIFAR10'
  if name:
    title = f'Fig. 6. {tables.describe(results[name])}'
  picture = canvas.Picture(3, title)
  left, middle, right = picture.axes
  left.set_title('(a) l1 = 0.03')
  middle.set_title('(b) l1 = 0.03')
  right.set_title('(c) l1 = 0.004, thresholds and schedules')
  if name:
    _train_and_val(left, results[name], 'ce', 1)
    left.set_ylabel('cross entropy (nats)')
    _train_and_val(middle, results[name], 'accuracy', 100)
    middle.set_ylabel('accuracy (%)')
  else:
    canvas.not_measured(left)
    canvas.not_measured(middle)
  _thresholds(right, results)
  return picture.save(path)


def _train_and_val(axes: Axes, results: Sequence[Result], name, unit) -> None:
  for split, label, style, hue in (
    ('train', 'training', '-', canvas.DARK),
    ('val', 'validation', ':', canvas.MIDDLE),
  ):
    curve = unit * column(results, f'{name}_{split}', 0.03)
    if np.isnan(curve).all():
      label += ': none held out'
    _line(axes, curve, linestyle=style, color=hue, label=label)
  axes.legend()


def _line(axes: Axes, curve: np.ndarray, **style: Any) -> None:
  """A curve over the epochs, which is seen if there is one epoch only."""
  marker = 'o' if len(curve) < 4 else None
  axes.plot(_epochs(curve), curve, marker=marker, **style)
  canvas.epoch_axis(axes)


def _thresholds(axes: Axes, results: Results) -> None:
  """Colour and marker tell the threshold, the line the schedule."""
  if not any(results.get(name) for name in plan.FIG6C):
    canvas.not_measured(axes)
    return
  for name in filter(results.get, plan.FIG6C):
    _, schedule, threshold = name.split('_')
    is_lrs = schedule == 'lrs'
    axes.set_yscale('log')
    _line(
      axes,
      column(results[name], 'nonzeros'),
      linestyle='-' if is_lrs else '--',
      color=canvas.DARK if threshold == '0.001' else canvas.LIGHT,
      label=f'threshold {threshold}, {"Fig. 3" if is_lrs else "constant"} rate',
    )
  axes.set_ylabel('nonzero weights in the dense layer')
  axes.legend(fontsize='small')


def _panels(results: Results, title: str, draw, path) -> pathlib.Path:
  """Fig. 7 and 8: a panel for each optimizer and its twin."""
  known = [n for pair in plan.PANELS for n in pair if results.get(n)]
  about = '; '.join(
    dict.fromkeys(tables.describe(results[name]) for name in known)
  )
  picture = canvas.Picture(3, f'{title} {about}')
  for letter, axes, pair in zip('abc', picture.axes, plan.PANELS):
    names = [_NAMES[name.removeprefix('fig7_')] for name in pair]
    data = 'CIFAR10' if 'rmsprop' in pair[0] else 'MNIST'
    axes.set_title(f'({letter}) {data}: {" and ".join(names)}')
    if all(results.get(name) for name in pair):
      draw(axes, results, pair)
      axes.legend(fontsize='small')
    else:
      canvas.not_measured(axes)
  return picture.save(path)


def critical(name: str) -> tuple[float, float]:
  """The paper's critical l1 for a piece, and its training accuracy there."""
  table, l1 = ('table2d', 0.03) if 'rms' in name else ('table2c', 3e-4)
  (row,) = (r for r in tables.paper_rows(table) if r['weight_l1'] == l1)
  return l1, row['accuracy_train']


def fig7(results: Results, path: pathlib.Path) -> pathlib.Path:
  """Accuracies of each multiobjective optimizer and its twin."""

  def draw(axes, results, pair):
    best = []
    for name, hue in zip(pair, (canvas.DARK, canvas.LIGHT)):
      label = _NAMES[name.removeprefix('fig7_')]
      for split, data, style in (
        ('train', 'training', '-'),
        ('val', 'validation', ':'),
      ):
        curve = 100 * column(results[name], f'accuracy_{split}')
        _line(axes, curve, linestyle=style, color=hue, label=f'{label}, {data}')
        best.append(curve.max())
    l1, accuracy = critical(pair[0])
    axes.axhline(
      100 * accuracy,
      color='0.4',
      linestyle='--',
      linewidth=1,
      label=f'paper, training at l1 = {l1:g}',
    )
    axes.set_ylabel('accuracy (%)')
    if lowest := canvas.lowest_accuracy(best):
      axes.set_ylim(lowest, 100)

  return _panels(results, 'Fig. 7.', draw, path)


def fig8(results: Results, path: pathlib.Path) -> pathlib.Path:
  """The weight of the l1 norm, found at every step or fixed."""

  def draw(axes, results, pair):
    lowest = []
    for name, hue in zip(pair, (canvas.DARK, canvas.LIGHT)):
      label = _NAMES[name.removeprefix('fig7_')]
      curve, low, high = _weights(results[name])
      _line(axes, curve, color=hue, label=f'{label}, mean of an epoch')
      lowest.append(curve.min())
      if low is not None and (low < high).any():
        label = f'{label}, least to most of its steps'
        style = dict(color=hue, alpha=0.2, linewidth=0, label=label)
        axes.fill_between(_epochs(curve), low, high, **style)
    l1, _ = critical(pair[0])
    label = f"paper's critical l1 = {l1:g}"
    style = dict(color='0.4', linestyle='--', linewidth=1, label=label)
    axes.axhline(l1 / (1 + l1), **style)
    axes.set_yscale('log', nonpositive='clip')
    # Single steps find weights of 0, or nearly so.
    axes.set_ylim(bottom=0.01 * min(lowest))
    axes.set_ylabel('weight of the l1 norm, λ of (7)')

  title = 'Fig. 8, where a fixed l1 is drawn as λ = l1 / (1 + l1).'
  return _panels(results, title, draw, path)


def drift(results: Results, path: pathlib.Path) -> pathlib.Path:
  """SMGD with pruning, with and without a decay of its rate."""
  title = 'SMGD drifts along the front, as far as its rate takes it.'
  about = tables.describe(results['drift_smgd'])
  picture = canvas.Picture(3, f'{title} {about}')
  weight, nonzeros, accuracy = picture.axes
  for name, label, hue in (
    ('fig7_smgd', '0.01 / (1 + 3.33e-4 step)', canvas.LIGHT),
    ('drift_smgd', '0.01, falling to 0.001 as in Fig. 3', canvas.DARK),
  ):
    for axes, column_name, unit in (
      (weight, 'weight_l1', 1),
      (nonzeros, 'nonzeros', 1),
      (accuracy, 'accuracy_val', 100),
    ):
      curve = unit * column(results[name], column_name)
      _line(axes, curve, color=hue, label=label)
  l1, _ = critical('drift_smgd')
  weight.axhline(l1 / (1 + l1), color='0.4', linestyle='--', linewidth=1)
  for axes, label in (
    (weight, 'weight of the l1 norm, mean of an epoch'),
    (nonzeros, 'nonzero weights in the dense layers'),
    (accuracy, 'validation accuracy (%)'),
  ):
    axes.set_ylabel(label)
  weight.set_yscale('log')
  nonzeros.set_yscale('log')
  weight.legend(title='learning rate', fontsize='small')
  return picture.save(path)


def _weights(results: Sequence[Result]):
  """The second of two weights that sum to 1, and its extremes in an epoch.

  The penalty form error + l1 * complexity has weights (1, l1): in (7), which
  sums to 1, that is l1 / (1 + l1).
  """
  mean = column(results, 'weight_l1')
  mean = mean / (column(results, 'weight_error') + mean)
  if 'weight_l1_min' not in results[0].epochs:
    return mean, None, None
  # Of found weights alone, which sum to 1. The fixed ones have no extremes.
  low = column(results, 'weight_l1_min')
  high = column(results, 'weight_l1_max')
  return mean, low, high
