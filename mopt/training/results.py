"""What is said of the members of a run: rows, the front, histograms."""

from collections.abc import Sequence
import math
import os
from typing import Any

import numpy as np

import mopt
from mopt.training import files

SPLIT_NAMES = {'train': 'training', 'val': 'validation', 'test': 'test'}


def is_collapsed(row: dict[str, Any]) -> bool:
  """Whether a member has failed: diverged, at chance, or without a layer.

  A dense layer without a nonzero weight passes nothing on, so the network
  answers the same to every picture. Chance, the share of the most frequent
  class, is what `status` knows of.
  """
  if row.get('status', 'ok') != 'ok':
    return True
  layers = [n for name, n in row.items() if name.startswith('nonzeros_')]
  finite = math.isfinite(row['ce_train']) and math.isfinite(row['l1_norm'])
  return not finite or min(layers, default=row['nonzeros']) == 0


def mark_front(rows: Sequence[dict[str, Any]], split: str) -> None:
  """Sets `pareto` and `knee` of each row, on (error, log nonzeros).

  Args:
    rows: changed in place. Collapsed members are left out.
    split: whose accuracy selects: `'train'`, `'val'` or `'test'`.
  """
  alive = [row for row in rows if not is_collapsed(row)]
  points = [(1 - row[f'acc_{split}'], row['nonzeros']) for row in alive]
  knee = mopt.knee(points, method='chord', scale='log')
  keep = mopt.nondominated(points)
  for row in rows:
    row.update(pareto=0, knee=0)
  for index, row in enumerate(alive):
    row.update(pareto=int(keep[index]), knee=int(index == knee))


def weight_histogram(weights: np.ndarray, bins: int = 100) -> dict[str, Any]:
  """How weights are distributed, but for those that are exactly 0.

  Args:
    weights: any shape.
    bins: number of equal bins between the least and the largest weight that is
      finite and not 0.

  Returns:
    `low` and `high`, the ends of the bins, `counts` in them, and the number of
    `zeros`.
  """
  rest = weights[np.isfinite(weights) & (weights != 0)].astype(np.float64)
  low, high = (
    (float(rest.min()), float(rest.max())) if rest.size else (0.0, 0.0)
  )
  if low < high:
    counts, _ = np.histogram(rest, bins, (low, high))
  else:  # NumPy widens the range, unless the weights are too large for that.
    counts = np.zeros(bins, int)
    counts[bins // 2] = rest.size
  zeros = int(np.sum(weights == 0))
  return {'low': low, 'high': high, 'counts': counts.tolist(), 'zeros': zeros}


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a results.csv: what was not measured is NaN."""
  return [
    {k: math.nan if v is None and k != 'l1' else v for k, v in row.items()}
    for row in files.read_csv(path)
  ]
