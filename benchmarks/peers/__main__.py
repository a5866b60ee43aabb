"""Other libraries doing the same work as this one, side by side on a CPU.

  pip install -e '.[peers]'
  python -m benchmarks.peers           # about ten minutes on two cores
  python -m benchmarks.peers --quick   # a look, in two

What is not installed is left out, with a line that says so.

A training step of LeNet-5, batches of 32 and 128, in float32: random uint8
pictures in memory, shuffled, gathered, normalised; the gradient, the update,
and pruning of dense kernels at 1e-3 after it. Before anything is timed, one
step of plain descent must agree with ours in objectives, gradients and zeros.
Each call is a part of an epoch and blocks; all libraries take turns, in a new
order each round; a time is the median of the rounds, a ratio the median of
the ratios within rounds. Where a library has several ways to do it, such as
the number of threads, the fastest in a short trial is taken ("way" in the
JSON); with --quick, the first. How to read it:

  * mopt adam: the trainer's compiled epoch for Adam on cross entropy and l2
    of convolutions plus 3e-4 times the l1 norm. The same for PyTorch, eager
    and compiled (torch.compile), and Keras on TensorFlow, which prunes in a
    callback, as the authors of the paper do, or, without it, not at all.
  * mopt madam: with the min-norm weights of both objectives, and moments for
    each. TorchJD: its MGDA, then PyTorch's Adam on the sum: one pair of
    moments. Ours also keeps a history of norms, angles and accuracies.

The solve alone: Gramians [m, m] of random gradients, float32, to weights;
"conflicting" ones nearly cancel. The judge is an active-set method in float64.

  * excess: of |d|^2 over the optimum, relative to it, or to 1e-6 of the square
    of the shortest gradient where that is more.
  * not_descent: the share of results that do not descend for some objective,
    with a cosine below -1e-6. UPGrad is not to be the shortest, but is to
    descend.
  * us: a call, blocked. us_inside: in a loop in one program.
"""

import argparse
from collections.abc import Sequence
import importlib.metadata
import os
import sys
from typing import Any

from benchmarks.command import make_parser
from benchmarks.command import OneLineParser
from benchmarks.command import write
from benchmarks.peers import solves
from benchmarks.peers import steps
from benchmarks.step_cost import show
from benchmarks.step_cost import versions

_PEERS = ('torch', 'torchjd', 'keras', 'tensorflow', 'tensorflow_cpu')
_BATCHES = {32: 200, 128: 100}  # Steps in a call.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  return make_parser('peers', __doc__, OneLineParser).parse_args(argv)


def peer_versions() -> dict[str, str]:
  found = {}
  for name in _PEERS:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def threads() -> dict[str, Any]:
  """What each library would take; a row's way says what it took."""
  found: dict[str, Any] = {'cores': len(os.sched_getaffinity(0))}
  for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'XLA_FLAGS'):
    found[name] = os.environ.get(name)
  if torch := sys.modules.get('torch'):
    pytorch = sys.modules['benchmarks.peers.pytorch']
    found['torch'] = max(pytorch.all_threads())
    found['torch_interop'] = torch.get_num_interop_threads()
  if tensorflow := sys.modules.get('tensorflow'):
    threading = tensorflow.config.threading  # 0 is for as many as it likes.
    found['tensorflow'] = threading.get_intra_op_parallelism_threads()
    found['tensorflow_interop'] = threading.get_inter_op_parallelism_threads()
  return found


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  result = dict(versions(), quick=args.quick, peers=peer_versions())
  result |= dict(steps=[], ratios=[])
  for batch, count in _BATCHES.items():
    count, rounds = (20, 3) if args.quick else (count, 9)
    rows, ratios = steps.measure(batch, count, rounds, args.quick)
    show_steps(batch, rows, ratios)
    result['steps'] += rows
    result['ratios'] += ratios
  many = solves.MANY[:4:3] if args.quick else solves.MANY
  count, rounds = (10, 2) if args.quick else (100, 5)
  has_torchjd = 'torchjd' in result['peers']
  result['solves'] = solves.measure(many, count, rounds, has_torchjd)
  if not has_torchjd:
    print('TorchJD: not installed')
  shown = hide(result['solves'], 'cosine_min', 'solved', 'iqr_us', 'count', 'n')
  show('Weights from a Gramian', shown)
  result['threads'] = threads()
  write(args.out, result)


def hide(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
  return [{k: v for k, v in row.items() if k not in names} for row in rows]


def show_steps(batch: int, rows, ratios) -> None:
  timed = [row for row in rows if row['ms_step']]
  show(f'A step of LeNet-5, batch {batch}', hide(timed, 'why', 'way'))
  show('Ratios', ratios)
  for row in rows:
    if note := row['why'] or row['way']:
      print(f'{row["name"]}: {note}')


if __name__ == '__main__':
  main()
