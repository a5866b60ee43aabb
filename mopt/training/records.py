"""What is logged and tabulated of the members of a run.

An objective has a name; its value is the column `NAME`, its weight
`weight_NAME`. Loss and score are `NAME_SPLIT`, as `Loss` calls them.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
import os
from typing import Any

import numpy as np

import mopt
from mopt.masks import Mask
from mopt.masks import masked_leaves
from mopt.training import files
from mopt.training.evaluation import Evaluation
from mopt.training.layout import split_members
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss
from mopt.training.objectives import layer_name
from mopt.training.objectives import leaf_column
from mopt.training.population import Member
from mopt.training.program import Complexity
from mopt.training.step import Failure
from mopt.training.step import Metrics

PyTree = Any

_WEIGHT = 'weight_'  # of an objective, whose name follows


def is_collapsed(row: dict[str, Any], loss: Loss = cross_entropy) -> bool:
  """Whether a member has failed, as its `status` says.

  Rows without one, of others' tables, have failed if they have diverged or lack
  a layer.
  """
  if 'status' in row:
    return row['status'] != 'ok'
  return _is_dead(row, layer_columns(row), loss)


def _is_dead(row: dict[str, Any], layers: Sequence[str], loss: Loss) -> bool:
  """Whether a network has diverged, or has a layer without a nonzero weight.

  Such a layer passes nothing on, so the network answers the same to every
  picture.
  """
  counts = [row[name] for name in layers]
  # Objectives of the parameters; the value of the error is the loss.
  objectives = [
    name.removeprefix(_WEIGHT) for name in row if name.startswith(_WEIGHT)
  ]
  values = [
    row[name] for name in (f'{loss.name}_train', *objectives) if name in row
  ]
  is_finite = all(map(math.isfinite, values))
  return not is_finite or min(counts, default=row['nonzeros']) == 0


def layer_columns(row: Mapping[str, Any]) -> list[str]:
  """The columns of a row that count the weights of one layer."""
  others = ('nonzeros', 'nonzeros_all')
  return [k for k in row if k.startswith('nonzeros_') and k not in others]


def judged(
  row: dict[str, Any], split: str, loss: Loss = cross_entropy
) -> tuple[float, int] | None:
  """(error, nonzeros) of a member, `None` if it has collapsed.

  The error is 1 less the mean score on a split, which may have an example that
  no other split has the like of: where it is not finite, the member has failed.
  """
  error = 1 - row[f'{loss.score_name}_{split}']
  if is_collapsed(row, loss) or not math.isfinite(error):
    return None
  return error, row['nonzeros']


def mark_front(
  rows: Sequence[dict[str, Any]],
  split: str,
  loss: Loss = cross_entropy,
  third: str | None = None,
) -> None:
  """Sets `pareto` and `knee` of each row, on (error, log nonzeros).

  Args:
    rows: changed in place. Collapsed members are left out.
    split: whose score selects: `'train'`, `'val'` or `'test'`.
    loss: of the run.
    third: a column that joins the front, but not the knee.
  """
  known = [(row, judged(row, split, loss)) for row in rows]
  alive = [row for row, point in known if point]
  points = [point for _, point in known if point]
  knee = mopt.knee(points, method='chord', scale='log')
  if third is not None:
    points = [(*point, row[third]) for point, row in zip(points, alive)]
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
    {
      k: math.nan if v is None and not k.startswith(_WEIGHT) else v
      for k, v in row.items()
    }
    for row in files.read_csv(path)
  ]


def epoch_records(
  names: Sequence[str],
  members: Sequence[Member],
  head: Mapping[str, Any],
  metrics: Metrics,
  val: Evaluation,
  counts: Complexity,
  loss: Loss = cross_entropy,
) -> list[dict[str, Any]]:
  """What is logged of an epoch, a record for each member.

  Args:
    names: of the objectives, in their order.
    members: of the population.
    head: what comes first in each record.
    metrics: of the epoch.
    val: the networks after it, on validation data.
    counts: ditto.
    loss: of the run.
  """
  unknown = (math.nan,) * len(names)
  own = np.array([member.weights or unknown for member in members], float)
  # Fixed weights as they were given: those of the steps are rounded.
  exact = lambda found: np.where(np.isnan(own), found, own)
  pairs = [f'{a}_{b}' for a, b in itertools.combinations(names, 2)]
  columns: dict[str, Any] = {}
  for form, labels, values in (
    ('{}', names, metrics.values),
    ('grad_norm_{}', names, metrics.grad_norms),
    ('cosine_{}', pairs, metrics.cosines),
    ('weight_{}', names, exact(metrics.weights)),
    ('weight_{}_min', names, exact(metrics.weights_min)),
    ('weight_{}_max', names, exact(metrics.weights_max)),
  ):
    columns |= {form.format(k): v for k, v in zip(labels, values.T)}
  columns |= {
    f'{loss.name}_train': metrics.loss,
    f'{loss.score_name}_train': metrics.score,
    f'{loss.name}_val': val.loss,
    f'{loss.score_name}_val': val.score,
  }
  columns |= _counted(counts)
  return _by_member(names, members, head, columns)


def histogram_records(
  names: Sequence[str],
  members: Sequence[Member],
  head: Mapping[str, Any],
  params: PyTree,
  mask: Mask,
) -> list[dict[str, Any]]:
  """How the weights of each prunable leaf are distributed: `[M, ...]` each."""
  records = []
  for member, tree in zip(members, split_members(params)):
    for path, kernel in masked_leaves(mask, tree):
      layer = {'layer': layer_name(path)}
      histogram = weight_histogram(kernel)
      columns = member.columns(names)
      records.append({**head, **columns, **layer, **histogram})
  return records


def result_rows(
  names: Sequence[str],
  members: Sequence[Member],
  scores: Mapping[str, Evaluation],
  counts: Complexity,
  failure: Failure,
  layers: Sequence[str],
  chance: float | None,
  loss: Loss = cross_entropy,
) -> list[dict[str, Any]]:
  """The columns of results.csv but for the front's and the name of a file.

  Args:
    names: of the objectives, in their order.
    members: of the population.
    scores: by the name of the split, on all of `SPLIT_NAMES`.
    counts: of the pruned networks.
    failure: `[M]` each.
    layers: columns of leaves of which some weight has to be left.
    chance: the share of the most frequent class in the training data, `None`
      where there are no classes.
    loss: of the run.
  """
  columns: dict[str, Any] = {
    f'{loss.name}_{k}': x.loss for k, x in scores.items()
  }
  columns |= {**counts.values, **_counted(counts)}
  columns |= {'params': counts.params, 'nonzeros_all': counts.nonzeros_all}
  columns |= {f'{loss.score_name}_{k}': x.score for k, x in scores.items()}
  rows = _by_member(names, members, {}, columns)
  score = scores['train'].score
  least = -math.inf if chance is None else chance + 1e-6
  for index, row in enumerate(rows):
    if failure.objective[index]:
      row['status'] = describe_failure(names, failure, index)
    elif (
      _is_dead(row, layers, loss)
      or not math.isfinite(score[index])
      or score[index] <= least
    ):
      row['status'] = 'collapsed'
    else:
      row['status'] = 'ok'
  return rows


def describe_failure(names: Sequence[str], failure: Failure, index: int) -> str:
  """Where a member has met a value that is not finite."""
  objective, epoch, step = (int(x[index]) for x in failure)
  return (
    f"objective '{names[objective - 1]}' or its gradient is not finite in "
    f'epoch {epoch + 1} step {step + 1}'
  )


def _counted(counts: Complexity) -> dict[str, Any]:
  """Columns of nonzeros, in all and of each layer."""
  total, per_leaf, *_ = counts.nonzeros
  layers = {leaf_column(k): v for k, v in per_leaf.items()}
  return {'nonzeros': total, **layers}


def _by_member(
  names: Sequence[str],
  members: Sequence[Member],
  head: Mapping[str, Any],
  columns: Mapping[str, Any],
) -> list[dict[str, Any]]:
  """From columns `[M]` to a record for each member."""
  lists = {name: np.asarray(x).tolist() for name, x in columns.items()}
  return [
    {**head, **member.columns(names), **{k: x[index] for k, x in lists.items()}}
    for index, member in enumerate(members)
  ]
