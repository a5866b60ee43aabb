"""What a front costs: K trainings of LeNet-5 as one program, or one by one.

  python -m benchmarks.front           # five minutes on two cores
  python -m benchmarks.front --quick   # a look, in half a minute

The members are trained by Adam with batches of 32 and pruned after each; they
have one seed and K l1 weights. What is timed is a part of an epoch, of the kind
that `benchmarks.epoch_speed` times: 200 steps on CPUs, the 1,875 of MNIST
elsewhere. A row has K members on one device (what `vmap` brings), or spread as
`train.py` does it (what devices bring on top; every core of a CPU is one); one
row where that is one program. The single run, K = 1 on one device, is what all
rows are compared with: it is timed anew before each of them, with nothing
beside it, so that the moods of the machine hit all alike. Compilation is apart,
each call blocks, and a time is the median over the calls. An otherwise idle
machine is needed: whoever has one of two cores hides what the other brings.
How to read it:

  * devices: those that the members use.
  * ms_step: of one update of one member, iqr_ms the distance of its quartiles.
  * steps_s: updates per second, of all members together.
  * singles: how many single runs last as long as all K members.
  * ratio: singles / K, the time of the front by that of K single runs one after
    the other. Below 1 the one program is faster. The aim is 0.55 on two cores,
    and 3 singles for 26 members on one GPU.
  * compile_s: how much longer the first call takes, which compiles the epoch.
  * limit: how much faster than one after the other single runs are that have
    nothing to do with each other, one on each device, started at once in
    threads. It is below 2 on two cores that are virtual or busy. Devices can
    bring no more: with single runs the ratio is 1 / limit at best (`floor`),
    with K members that of K on one device, by the limit.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.command import make_parser
from benchmarks.command import write
from benchmarks.epoch_speed import epoch_caller
from benchmarks.epoch_speed import make_config
from benchmarks.epoch_speed import Timed
from benchmarks.step_cost import show
from benchmarks.step_cost import versions
from mopt.training import processes
from mopt.training.layout import make_layout

MEMBERS = (1, 2, 4, 8, 16, 26)


class Way(NamedTuple):
  """How many members are trained, on how many devices."""

  members: int
  devices: int


def make_callers(
  many: Sequence[int], steps: int, devices: Sequence[jax.Device]
) -> dict[Way, Callable[[], Any]]:
  """All members on the first device, and on as many as the layout gives."""
  callers = {}
  for members in sorted({1, *many}):
    config = make_config('lenet5', 'adam', members)
    for available in (devices[:1], devices):
      used = make_layout(config, available).devices
      way = Way(members, len(used))
      if way not in callers:
        callers[way] = epoch_caller(config, steps, used)
  return callers


def at_once(callers: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
  """Calls all in a thread each, and returns when the last one is done."""

  def call():
    with futures.ThreadPoolExecutor(len(callers)) as threads:
      return list(threads.map(lambda caller: caller(), callers))

  return call


def measure(many: Sequence[int], steps: int, rounds: int) -> dict[str, Any]:
  devices = jax.local_devices()
  callers = make_callers(many, steps, devices)
  config = make_config('lenet5', 'adam', 1)
  # On a device each, as many as the rows have.
  singles = [callers[Way(1, 1)]] + [
    epoch_caller(config, steps, [device])
    for device in devices[1 : max(way.devices for way in callers)]
  ]
  timed = {way: Timed(caller) for way, caller in callers.items()}
  together = Timed(at_once(singles))
  single = timed.pop(Way(1, 1))
  first = {}
  for way, row in {Way(1, 1): single, **timed}.items():
    row.measure()  # compiles
    first[way] = row.times.pop()
  together.measure()
  together.times.clear()
  for _ in range(rounds):
    for row in (*timed.values(), together):
      single.measure()
      row.measure()
  timed = {Way(1, 1): single, **timed}
  limit = len(singles) * single.median / together.median
  return {
    'available': len(devices),
    'limit': {
      'programs': len(singles),
      'ms_alone': 1e3 * single.median / steps,
      'ms_together': 1e3 * together.median / steps,
      'n': rounds,
      'limit': limit,
      'floor': 1 / limit,
    },
    'rows': [
      describe(way, steps, timed[way], single, first[way])
      for way in sorted(timed)
    ],
  }


def describe(
  way: Way, steps: int, row: Timed, single: Timed, first: float
) -> dict[str, Any]:
  low, high = np.percentile(row.times, [25, 75])
  step = row.median / steps / way.members
  return {
    'members': way.members,
    'devices': way.devices,
    'steps': steps,
    'n': len(row.times),
    'ms_step': 1e3 * step,
    'iqr_ms': 1e3 * float(high - low) / steps / way.members,
    'steps_s': 1 / step,
    'singles': row.median / single.median,
    'ratio': row.median / single.median / way.members,
    'compile_s': first - row.median,
  }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = make_parser('front', __doc__)

  def members(text):
    numbers = [int(number) for number in text.split(',')]
    if min(numbers) < 1:
      raise ValueError
    return numbers

  parser.add_argument(
    '--members', type=members, help='default: 1,2,4,8,16,26; 1 is always there'
  )
  args = parser.parse_args(argv)
  args.members = args.members or (MEMBERS[:2] if args.quick else MEMBERS)
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  # As train.py does, and before anything starts JAX.
  processes.make_cores_devices()
  steps, rounds = 200 if jax.default_backend() == 'cpu' else 1875, 7
  if args.quick:
    steps, rounds = 5, 3
  result = dict(versions(), quick=args.quick)
  result |= measure(args.members, steps, rounds)
  hidden = ('steps', 'n')
  shown = [
    {k: v for k, v in row.items() if k not in hidden} for row in result['rows']
  ]
  show(f'Fronts of LeNet-5, {steps:,} steps', shown)
  limit = result['limit']
  if limit['programs'] > 1:
    print(
      f'{limit["programs"]} single runs at once are {limit["limit"]:.2f} times '
      'as fast as one after the other: the ratio of such programs is '
      f'{limit["floor"]:.2f} at best.'
    )
  write(args.out, result)


if __name__ == '__main__':
  main()
