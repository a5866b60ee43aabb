"""What the command lines of the benchmarks share."""

import argparse
import json
import pathlib
import sys
from typing import Any, NoReturn

ROOT = pathlib.Path(__file__).parents[1]


class OneLineParser(argparse.ArgumentParser):
  """Says what is wrong in one line, and exits with 2."""

  def error(self, message: str) -> NoReturn:
    print(f'{self.prog}: {message}', file=sys.stderr)
    sys.exit(2)


def make_parser(
  name: str,
  doc: str | None,
  kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
  quick: str = 'small and rough',
) -> argparse.ArgumentParser:
  """A parser with --quick, and --out for a JSON in benchmarks/results."""
  parser = kind(
    prog=f'python -m benchmarks.{name}',
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=kind is not OneLineParser,
  )
  out = ROOT / 'benchmarks' / 'results' / f'{name}.json'
  parser.add_argument('--quick', action='store_true', help=quick)
  parser.add_argument('--out', type=pathlib.Path, default=out)
  return parser


def write(path: pathlib.Path, result: dict[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + '\n')
  print(f'Written to {path}')
