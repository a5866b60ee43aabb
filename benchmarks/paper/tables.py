"""Table 2: our rows beside the paper's, and what they come to."""

from collections import Counter
from collections.abc import Mapping, Sequence
import csv
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.paper.pieces import Result
import mopt
from mopt.training.records import is_collapsed
from mopt.training.records import layer_columns

TITLES = {
  'table2a': 'Table 2(a): pruning once, after training',
  'table2b': 'Table 2(b): epochwise pruning',
  'table2c': 'Table 2(c): batchwise pruning',
  'table2c_tuned': 'Table 2(c) with a tuned learning rate',
  'table2d': 'Table 2(d): batchwise pruning',
}
# Test error, and all dense weights of LeNet-5 nonzero.
REFERENCE = (0.05, 58_920)
_TARGETS = (0.985, 0.989, 0.979)
MISSING = '–'

Row = dict[str, Any]  # As in results.csv.


class Pair(NamedTuple):
  """A row: the means over our seeds, and what the paper has."""

  l1: float
  ours: dict[str, float]
  sd: dict[str, float]  # NaN with one seed.
  paper: dict[str, float]  # NaN for what could not be read.
  worse: tuple[str, ...]  # Of accuracy and nonzeros, those we are worse in.
  collapsed: int  # Of our seeds.


def paper_rows(name: str) -> list[dict[str, float]]:
  """A table of the paper, with the sum of nonzeros over the layers."""
  table = name.removesuffix('_tuned')
  path = pathlib.Path(__file__).with_name(f'{table}.csv')
  lines = path.read_text().splitlines()
  rows = [
    {name: float(cell or 'nan') for name, cell in row.items()}
    for row in csv.DictReader(x for x in lines if not x.startswith('#'))
  ]
  layers = layer_columns(rows[0])
  return [row | {'nonzeros': sum(row[x] for x in layers)} for row in rows]


def alive(rows: Sequence[Row]) -> list[Row]:
  """The rows of networks that have learnt something."""
  return [row for row in rows if not is_collapsed(row)]


def pairs(results: Sequence[Result], name: str) -> list[Pair]:
  """All rows that we have trained, by l1."""
  paper = {row['weight_l1']: row for row in paper_rows(name)}
  groups: dict[float, list[Row]] = {}
  for result in results:
    for row in result.rows:
      groups.setdefault(row['weight_l1'], []).append(row)
  return [_pair(l1, groups[l1], paper.get(l1)) for l1 in sorted(groups)]


def _pair(l1, rows, paper) -> Pair:
  table = {
    k: [float(row[k]) for row in rows]
    for k, value in rows[0].items()
    if not isinstance(value, str)  # the status of a network
  }
  # A mean of equal numbers may differ from them in the last bit.
  ours = {k: round(float(np.mean(v)), 9) for k, v in table.items()}
  several = len(rows) > 1
  sd = {
    k: float(np.std(v, ddof=1)) if several else math.nan
    for k, v in table.items()
  }
  collapsed = len(rows) - len(alive(rows))
  return Pair(l1, ours, sd, paper or {}, _worse(ours, paper), collapsed)


def _worse(ours, paper) -> tuple[str, ...]:
  """Comparisons with what could not be read, or collapsed, are not made."""
  if paper is None or is_collapsed(paper):
    return ()
  worse = []
  if ours['accuracy_test'] < paper['accuracy_test']:
    worse.append('accuracy')
  if ours['nonzeros'] > paper['nonzeros']:
    worse.append('nonzeros')
  return tuple(worse)


def dominated(rows: Sequence[Pair], name: str) -> list[tuple[float, float]]:
  """Our rows that one of the paper's dominates, as pairs of l1 weights.

  No worse in test accuracy and in nonzeros, and better in one of them.
  """
  found = []
  paper = alive(paper_rows(name))
  for pair in rows:
    mine = pair.ours['accuracy_test'], -pair.ours['nonzeros']
    for row in paper:
      other = row['accuracy_test'], -row['nonzeros']
      if other != mine and all(b >= a for a, b in zip(mine, other)):
        found.append((pair.l1, row['weight_l1']))
        break
  return found


def _percent(value: float, digits: int) -> str:
  return f'{100 * value:.{digits}f}'


# Column of results.csv, heading, and how we and the paper print it.
_Format = tuple[str, str, Any, Any]
_COUNT = (lambda v: f'{v:,.0f}',) * 2
_ACCURACY = (lambda v: _percent(v, 2), lambda v: _percent(v, 1))
_AFTER = (
  ('accuracy_test', 'test acc. %', *_ACCURACY),
  ('accuracy_train', 'train acc. %', *_ACCURACY),
  ('ce_test', 'test CE', *(lambda v: f'{v:.3f}',) * 2),
  ('l1', 'l1 norm', *(lambda v: f'{v:,.1f}',) * 2),
)


def _formats(row: Mapping[str, float]) -> list[_Format]:
  """The columns of a table, for the layers that the network has."""
  layers = layer_columns(row)
  if len(layers) == 1:  # The sum is the same.
    layers = []
  return [
    ('nonzeros', 'dense nonzeros', *_COUNT),
    *((name, name.removeprefix('nonzeros_'), *_COUNT) for name in layers),
    *_AFTER,
  ]


def _cell(pair: Pair, column: _Format) -> str:
  name, _, print_ours, print_paper = column
  paper = pair.paper.get(name, math.nan)
  mean, sd = pair.ours[name], pair.sd[name]
  left = MISSING if math.isnan(mean) else print_ours(mean)
  left += '' if math.isnan(sd) else f' ± {print_ours(sd)}'
  return f'{left} | {MISSING if math.isnan(paper) else print_paper(paper)}'


def _note(pair: Pair) -> str:
  notes = []
  if not pair.paper:
    notes.append('not in the paper')
  elif is_collapsed(pair.paper):
    notes.append('paper: collapsed')
  if pair.collapsed:
    notes.append(f'ours: {pair.collapsed} collapsed')
  if pair.worse:
    both = len(pair.worse) == 2
    notes.append(f'worse: {"both" if both else pair.worse[0]}')
  return ', '.join(notes)


def cells(rows: Sequence[Pair]) -> tuple[list[str], list[list[str]]]:
  """A table as text: its headings and its rows."""
  columns = _formats(rows[0].ours)
  headings = ['l1', *(heading for _, heading, *_ in columns), '']
  body = [
    [f'{p.l1:g}', *(_cell(p, column) for column in columns), _note(p)]
    for p in rows
  ]
  return headings, body


def hardware(results: Sequence[Result]) -> list[str]:
  """The accelerators of each training, as in 'one H100'; none for CPUs."""
  found = []
  for result in results:
    kinds = result.config.get('environment', {}).get('devices', [])
    for kind, number in Counter(x for x in kinds if x != 'cpu').items():
      name = re.sub(r'^NVIDIA |[ -]\d+ ?GB.*$', '', kind)
      found.append(f'one {name}' if number == 1 else f'{number} {name}s')
  return list(dict.fromkeys(found))


def describe(results: Sequence[Result]) -> str:
  """Network, data, epochs, seeds and accelerators, for a title."""
  config = results[0].config
  model = {'lenet5': 'LeNet-5', 'vgg': 'VGG'}.get(config['model'])
  data = {'mnist': 'MNIST', 'cifar10': 'CIFAR10'}
  seeds = [str(seed) for r in results for seed in r.config['seed']]
  epochs = config['epochs']
  text = (
    f'{model} on {data.get(config["dataset"], config["dataset"])}, '
    f'{epochs} epoch{"s" * (epochs != 1)}, '
    f'seed{"s" * (len(seeds) > 1)} {", ".join((*seeds, *hardware(results)))}'
  )
  return f'quick: {text}' if results[0].quick else text


def hypervolume(rows: Sequence[Row]) -> float:
  """The area in (test error, ln nonzeros) up to `REFERENCE`.

  Collapsed networks, and others that are not better than the reference in
  both, add nothing.
  """
  points = [
    (1 - row['accuracy_test'], math.log(row['nonzeros'])) for row in alive(rows)
  ]
  return mopt.hypervolume(points, (REFERENCE[0], math.log(REFERENCE[1])))


def fewest(rows: Sequence[Row], accuracy: float) -> float:
  """Nonzeros of the smallest network with such a test accuracy, or NaN."""
  good = [row['nonzeros'] for row in rows if row['accuracy_test'] >= accuracy]
  return min(good, default=math.nan)


def summary(results: Sequence[Result], name: str) -> list[str]:
  """Lines below a table: what is worse, and fronts as one number each."""
  rows, paper = pairs(results, name), paper_rows(name)
  lost = [f'{a:g} (by {b:g})' for a, b in dominated(rows, name)]
  trained = {pair.l1 for pair in rows}
  left = [
    f'{row["weight_l1"]:g}' for row in paper if row['weight_l1'] not in trained
  ]
  lines = [
    'Rows of ours that one of the paper dominates in (test accuracy, '
    f'nonzeros), by l1: {", ".join(lost) or "none"}. The paper rounds '
    'accuracies to 0.1 %, ours are compared unrounded.'
  ]
  if all(math.isnan(row['accuracy_test']) for row in paper):
    lines = ["The paper's test accuracies could not be read: no dominance."]
  if left:
    lines.append(f'In the paper, not trained here: {", ".join(left)}.')
  is_front = name in ('table2c', 'table2c_tuned')
  return lines + (_fronts(results, name) if is_front else [])


def _fronts(results: Sequence[Result], name: str) -> list[str]:
  paper = paper_rows(name)
  pooled = [row for result in results for row in result.rows]
  volumes = ', '.join(f'{hypervolume(r.rows):.4f}' for r in results)
  if len(results) > 1:
    volumes += f', all seeds together {hypervolume(pooled):.4f}'
  lines = [
    'Hypervolume in (test error, ln nonzeros) up to '
    f'({REFERENCE[0]:g}, ln {REFERENCE[1]:,}), more is better: '
    f'ours {volumes}; paper {hypervolume(paper):.4f}.'
  ]

  def count(value):
    return 'none' if math.isnan(value) else f'{value:,.0f}'

  for target in _TARGETS:
    ours = ', '.join(count(fewest(r.rows, target)) for r in results)
    lines.append(
      f'Fewest nonzeros with a test accuracy >= {100 * target:.1f} %: '
      f'ours {ours}; paper {count(fewest(paper, target))}.'
    )
  return lines


def title(results: Sequence[Result], name: str) -> str:
  means = ', mean ± standard deviation' if len(results) > 1 else ''
  return f'{TITLES[name]}. {describe(results)}{means}. Cells: ours | paper'


def rich_table(results: Sequence[Result], name: str) -> Table:
  rows = pairs(results, name)
  headings, body = cells(rows)
  table = Table(box=box.SIMPLE_HEAD, title=title(results, name))
  for heading in headings:
    table.add_column(heading, justify='right')
  for pair, row in zip(rows, body):
    table.add_row(*row, style='bold red' if len(pair.worse) == 2 else '')
  return table


def markdown(results: Sequence[Result], name: str) -> str:
  """The table as a page, with what reproduces it."""
  headings, body = cells(pairs(results, name))
  quick = ' --quick' if results[0].quick else ''
  seeds = ','.join(str(s) for r in results for s in r.config['seed'])
  lines = ['| ' + ' | '.join(headings) + ' |', '|---' * len(headings) + '|']
  lines += [
    '| ' + ' | '.join(cell.replace('|', '/') for cell in row) + ' |'
    for row in body
  ]
  command = f'python -m benchmarks.paper {name}{quick} --seed={seeds}'
  head = [f'{title(results, name).replace("|", "/")}.', '']
  notes = [f'* {line}' for line in summary(results, name)]
  return '\n'.join([*head, *lines, '', *notes, '', f'`{command}`']) + '\n'
