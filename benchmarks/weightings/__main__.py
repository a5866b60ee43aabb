"""How exact each weighting is, and what it costs, beside TorchJD's.

  python -m benchmarks.weightings           # ten minutes on two cores
  python -m benchmarks.weightings --quick   # a look, in a minute

Every method gets the same Gramians: of gradients that are integers, so that
the Gramians are exact in float32, drawn at random or around zero so that they
conflict. Those of `scaled` have squares over 16 decades besides. TorchJD, which
`pip install -e '.[peers]'` brings, solves one at a time; it has one thread, for
the matrices are far too small for two. Calls of all are timed in turns, and
every call has another Gramian, on which its weights depend: nothing can be left
out by a compiler. How to read the rows:

  * error: the largest one over the Gramians, by a judge in float64. Of min_norm
    and dual_proj the excess of |d|^2 over the optimum; of cagrad the gap to a
    bound on the worst slope; of fairgrad and nash_mtl the largest residual; of
    krum a weight; of all others the error of the direction.
  * us: of one call with one Gramian, the median; iqr_us the distance of its
    quartiles.
  * vmap_us: of one call with 26 Gramians, as a population of 26 members has it.
  * torchjd_error, torchjd_us: the same, of TorchJD.
  * ratio: us / torchjd_us, and ratio_26: vmap_us / (26 torchjd_us).

`benchmarks/weightings/examples.py` says how to read the last table, of one
objective for each example.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import importlib
import time
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import make_parser
from benchmarks.command import write
from benchmarks.step_cost import show
from benchmarks.step_cost import versions
from benchmarks.weightings import examples
from benchmarks.weightings import judges
import mopt

MANY = (2, 3, 8, 16, 32, 64, 128)
MEMBERS = 26
KINDS = ('random', 'conflict', 'scaled')
# Of more, 26 together would take a minute a call.
_MOST_AT_ONCE = 32


class Method(NamedTuple):
  """A weighting, its judge, and TorchJD's class of it."""

  name: str
  ours: mopt.Weighting
  judge: judges.Judge | None  # None: it is random.
  theirs: str | None
  options: dict[str, Any] = {}  # Of theirs.
  least: int = 2  # The smallest m.
  kinds: Sequence[str] = ('random', 'conflict')
  most: int = 128


def make_methods() -> list[Method]:
  lift = mopt.as_weighting
  key = jax.random.key(0)
  return [
    Method(
      'min_norm',
      lift(mopt.min_norm_weights),
      judges.min_norm,
      'MGDAWeighting',
      kinds=KINDS,
    ),
    Method(
      'dual_proj',
      lift(mopt.dual_proj),
      judges.dual_proj,
      'DualProjWeighting',
      kinds=KINDS,
    ),
    Method(
      'upgrad',
      lift(mopt.upgrad),
      judges.upgrad,
      'UPGradWeighting',
      kinds=KINDS,
      most=64,
    ),
    Method(
      'cagrad',
      lift(mopt.cagrad(0.5)),
      judges.cagrad,
      'CAGradWeighting',
      dict(c=0.5),
    ),
    Method('nash_mtl', lift(mopt.nash_mtl), judges.nash_mtl, None),
    Method(
      'fairgrad',
      lift(mopt.fairgrad(2.0)),
      judges.fairgrad,
      'FairGradWeighting',
      dict(alpha=2.0),
    ),
    Method('imtl_g', lift(mopt.imtl_g), judges.imtl_g, 'IMTLGWeighting'),
    Method('config', lift(mopt.config), judges.config, None),
    Method(
      'aligned_mtl',
      lift(mopt.aligned_mtl),
      judges.aligned_mtl,
      'AlignedMTLWeighting',
    ),
    Method(
      'krum',
      lift(mopt.krum()),
      judges.krum,
      'KrumWeighting',
      dict(n_byzantine=1),
      least=8,
    ),
    Method('pcgrad', mopt.pcgrad(key), None, 'PCGradWeighting'),
    Method('gradvac', mopt.gradvac(key), None, 'GradVacWeighting'),
  ]


def draw_gradients(kind: str, m: int, count: int) -> np.ndarray:
  """`[count, m, n]`: integers, or powers of two times integers."""
  random = np.random.default_rng([m, KINDS.index(kind)])
  n = max(2 * m, 8)
  gradients = random.standard_normal((count, m, n))
  if kind != 'random':
    gradients -= 0.99 * gradients.mean(axis=1, keepdims=True)
  # Sums of n products of integers up to this are below 2^24.
  largest = int(np.sqrt(2**24 / n))
  gradients = np.clip((largest / 5 * gradients).round(), -largest, largest)
  if kind == 'scaled':
    gradients *= 2.0 ** random.integers(-13, 14, (count, m))[..., None]
  return gradients


class Timed:
  """A function of a number, whose calls are timed."""

  def __init__(self, function: Callable[[int], Any]):
    self.function = function
    self.times: list[float] = []

  def measure(self, number: int) -> None:
    start = time.perf_counter()
    self.function(number)
    self.times.append(time.perf_counter() - start)

  def quartiles(self) -> np.ndarray:
    """In microseconds."""
    return 1e6 * np.percentile(self.times, [25, 50, 75])


def their_call(method: Method, gramians: np.ndarray) -> Callable[[int], Any]:
  """Raises: ImportError without TorchJD."""
  torch = importlib.import_module('torch')
  aggregation = importlib.import_module('torchjd.aggregation')
  torch.set_num_threads(1)
  weigh = getattr(aggregation, method.theirs)(**method.options)
  tensors = [torch.from_numpy(g) for g in gramians]

  def call(number):
    try:
      return weigh(tensors[number])
    except ValueError:  # So says the solver of quadratic programs.
      return torch.full((gramians.shape[-1],), torch.nan)

  return call


class Programs(NamedTuple):
  """A weighting of m objectives, compiled."""

  one: Callable[[jax.Array], jax.Array]
  many: Callable[[jax.Array], jax.Array]  # Of `MEMBERS`.
  compile_s: float  # Of the first one, and its first call.


def compile_for(method: Method, m: int) -> Programs:
  state = method.ours.init(m)
  weigh = lambda gramian: method.ours.update(gramian, state)[0]
  one, many = jax.jit(weigh), jax.jit(jax.vmap(weigh))
  start = time.perf_counter()
  one(jnp.eye(m)).block_until_ready()
  compile_s = time.perf_counter() - start
  if m <= _MOST_AT_ONCE:
    many(jnp.tile(jnp.eye(m), (MEMBERS, 1, 1))).block_until_ready()
  return Programs(one, many, compile_s)


def measure(
  method: Method, m: int, count: int, seconds: float
) -> list[dict[str, Any]]:
  programs = compile_for(method, m)
  return [
    measure_kind(method, programs, kind, m, count, seconds)
    for kind in method.kinds
  ]


def measure_kind(
  method: Method,
  programs: Programs,
  kind: str,
  m: int,
  count: int,
  seconds: float,
) -> dict[str, Any]:
  gradients = draw_gradients(kind, m, count)
  exact = gradients @ gradients.swapaxes(1, 2)
  gramians = exact.astype(np.float32)
  assert (gramians == exact).all()
  apart = [jnp.asarray(g) for g in gramians]
  batch = jnp.asarray(gramians[np.arange(MEMBERS) % count])
  calls = {'ours': Timed(lambda i: programs.one(apart[i]).block_until_ready())}
  if m <= _MOST_AT_ONCE:
    calls['vmap'] = Timed(lambda i: programs.many(batch).block_until_ready())
  if method.theirs:
    with contextlib.suppress(ImportError):  # The row says so.
      calls['theirs'] = Timed(their_call(method, gramians))
  for call in calls.values():
    call.function(0)
  until = time.perf_counter() + seconds
  number = 0
  while number < 5 or (time.perf_counter() < until and number < 2000):
    for call in calls.values():
      call.measure(number % count)
    number += 1

  def worst(call):
    if method.judge is None:
      return None
    found = [np.asarray(call.function(i), np.float64) for i in range(count)]
    errors = [method.judge(*pair) for pair in zip(gradients, found)]
    return float(np.max([np.inf if np.isnan(e) else e for e in errors]))

  low, median, high = calls['ours'].quartiles()
  row = dict(method=method.name, kind=kind, objectives=m)
  row |= dict(error=worst(calls['ours']), us=median, iqr_us=high - low)
  row |= dict(vmap_us=None, torchjd_error=None, torchjd_us=None)
  row |= dict(ratio=None, ratio_26=None)
  if 'vmap' in calls:
    row['vmap_us'] = calls['vmap'].quartiles()[1]
  if 'theirs' in calls:
    theirs = calls['theirs'].quartiles()[1]
    row |= dict(torchjd_error=worst(calls['theirs']), torchjd_us=theirs)
    row |= dict(ratio=median / theirs)
    if 'vmap' in calls:
      row['ratio_26'] = row['vmap_us'] / (MEMBERS * theirs)
  return row | dict(compile_s=programs.compile_s, count=count, n=number)


def shown(row: dict[str, Any]) -> dict[str, Any]:
  """What of a row is on the screen; the rest is in the JSON."""
  hidden = ('method', 'iqr_us', 'count', 'n', 'compile_s')
  return {
    name: f'{value:.0e}' if name.endswith('error') and value else value
    for name, value in row.items()
    if name not in hidden
  }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = make_parser('weightings', __doc__)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  warnings.filterwarnings('ignore', module='torch')
  result = dict(versions(), quick=args.quick, rows=[])
  many = MANY[:3] if args.quick else MANY
  count, seconds = (4, 0.1) if args.quick else (8, 0.5)
  for method in make_methods():
    rows = [
      row
      for m in many
      if method.least <= m <= method.most
      for row in measure(method, m, count, seconds)
    ]
    rows.sort(key=lambda row: method.kinds.index(row['kind']))
    show(method.name, [shown(row) for row in rows])
    result['rows'] += rows
  rows = examples.measure((32,) if args.quick else (32, 128), 20 * seconds)
  show('One objective for each example, LeNet-5', rows)
  result['per_example'] = rows
  write(args.out, result)


if __name__ == '__main__':
  main()
