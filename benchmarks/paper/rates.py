"""The choice of the learning rate of table2c_tuned, on validation data."""

from collections.abc import Mapping, Sequence

from benchmarks.paper import tables
from benchmarks.paper.pieces import Result

_HEADINGS = ('rate', 'its end', 'dense nonzeros', 'validation acc. %')


def markdown(results: Mapping[str, Sequence[Result]]) -> str:
  """A row per rate; test accuracies are left out, for they did not choose."""
  first = next(iter(results.values()))
  lines = [
    f'Rates tried for table2c_tuned, l1 5e-4. {tables.describe(first)}.',
    '',
    '| ' + ' | '.join(_HEADINGS) + ' |',
    '|---' * len(_HEADINGS) + '|',
  ]
  for pieces in results.values():
    for result in pieces:
      start = result.config['learning_rate']
      end = result.config.get('end_rate') or 0.1 * start
      (row,) = result.rows
      lines.append(
        f'| {start:g} | {end:g} | {row["nonzeros"]:,} | '
        f'{100 * row["accuracy_val"]:.2f} |'
      )
  return '\n'.join([*lines, '', '`python -m benchmarks.paper rates`']) + '\n'
