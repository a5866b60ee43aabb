"""What is logged and tabulated of the members of a run."""

from collections.abc import Mapping, Sequence
import math
import os
from typing import Any

import numpy as np

import mopt
from mopt.masks import masked_leaves
from mopt.training import files
from mopt.training.evaluation import Evaluation
from mopt.training.layout import split_members
from mopt.training.population import Member
from mopt.training.program import Complexity
from mopt.training.step import Failure
from mopt.training.step import Metrics

PyTree = Any


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
  """The rows of a csv: what was not measured is NaN."""
  return [
    {k: math.nan if v is None and k != 'l1' else v for k, v in row.items()}
    for row in files.read_csv(path)
  ]


def epoch_records(
  members: Sequence[Member],
  head: Mapping[str, Any],
  metrics: Metrics,
  val: Evaluation,
  counts: Complexity,
) -> list[dict[str, Any]]:
  """What is logged of an epoch, a record for each member."""
  nonzeros, l1_norm = counts
  columns = metrics._asdict() | {
    'ce_val': val.ce,
    'accuracy_val': val.accuracy,
    'l1_norm': l1_norm,
    'nonzeros': nonzeros.total,
  }
  columns |= {_layer(k): v for k, v in nonzeros.per_leaf.items()}
  return _by_member(members, head, columns)


def histogram_records(
  members: Sequence[Member], head: Mapping[str, Any], params: PyTree
) -> list[dict[str, Any]]:
  """How the weights of each dense layer are distributed, leaves `[M, ...]`."""
  records = []
  for member, tree in zip(members, split_members(params)):
    for path, kernel in masked_leaves(mopt.dense_kernels, tree):
      layer = {'layer': _layer_name(path)}
      histogram = weight_histogram(kernel)
      records.append({**head, **member.columns, **layer, **histogram})
  return records


def result_rows(
  members: Sequence[Member],
  scores: Mapping[str, Evaluation],
  counts: Complexity,
  failure: Failure,
  chance: float,
) -> list[dict[str, Any]]:
  """The columns of results.csv but for the front's.

  Args:
    members: of the population.
    scores: by the name of the split, on all of `SPLIT_NAMES`.
    counts: of the pruned networks.
    failure: `[M]` each.
    chance: the share of the most frequent class in the training data.
  """
  nonzeros, l1_norm = counts
  columns = {f'ce_{split}': score.ce for split, score in scores.items()}
  columns |= {'l1_norm': l1_norm, 'nonzeros': nonzeros.total}
  columns |= {_layer(k): v for k, v in nonzeros.per_leaf.items()}
  columns |= {f'acc_{split}': score.accuracy for split, score in scores.items()}
  rows = _by_member(members, {}, columns)
  for index, row in enumerate(rows):
    if failure.objective[index]:
      row['status'] = describe_failure(failure, index)
    elif is_collapsed(row) or row['acc_train'] <= chance + 1e-6:
      row['status'] = 'collapsed'
    else:
      row['status'] = 'ok'
  return rows


def describe_failure(failure: Failure, index: int) -> str:
  """Where a member has met a value that is not finite."""
  objective, epoch, step = (int(x[index]) for x in failure)
  name = ('error', 'complexity')[objective - 1]
  return (
    f'objective {objective} ({name}) or its gradient is not finite in epoch '
    f'{epoch + 1} step {step + 1}'
  )


def _by_member(
  members: Sequence[Member], head: Mapping[str, Any], columns: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """From columns `[M]` to a record for each member."""
  lists = {name: np.asarray(x).tolist() for name, x in columns.items()}
  return [
    {**head, **member.columns, **{k: x[index] for k, x in lists.items()}}
    for index, member in enumerate(members)
  ]


def _layer_name(path: str) -> str:
  return path.removesuffix('/kernel').replace('/', '_')


def _layer(path: str) -> str:
  return f'nonzeros_{_layer_name(path)}'
