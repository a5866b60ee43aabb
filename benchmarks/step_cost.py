"""What a training step costs: updates, the min-norm solve, all of LeNet-5.

  python -m benchmarks.step_cost           # some minutes on two cores
  python -m benchmarks.step_cost --quick   # a look, in half a minute

Programs are compiled ahead of time, compile time is apart, and what they update
is donated. A call makes many steps in one program, at every size as many as
take 10 ms at least, so that dispatch is not what is timed; nothing is moved out
of the loop over them. Rows of one table run interleaved, in a new random order
each round, so that the moods of the machine hit all alike. A time is the median
over n calls, each up to `block_until_ready`, divided by the steps in a call;
`iqr` is the distance of its quartiles. On a busy machine the ratio of two
medians says more than either. How to read it:

  * update: one `tx.update` and `apply_updates`, given the gradients. State that
    fits stays in a cache from step to step.
  * floor: the f32 numbers that must pass between memory and processor, over
    the speed of a triad `a = a + s * b`, in place as updates are, that holds
    about as many, so that it has the same cache, measured in the same rounds
    and the same way. For N parameters p and m = 2 gradients g,
    written elsewhere: sgd reads g, reads and writes p = 3 N; rmsprop has a
    moment too = 5 N; adam two = 7 N; smgd reads 2 g for the Gramian and again
    for their sum, and p = 6 N; mrmsprop and 2 moments = 10 N; madam and 4 = 14
    N; adam on the weighted sum 2 g, p and 2 moments = 8 N. madam with m
    gradients: 6 m + 2. Pruning adds none: its sum, test and count can run where
    the parameters pass. A ratio below 1 means a cache that the triad did not
    have.
  * gramian: its floor reads m gradients once.
  * min-norm: one solve, of 64 that come one after the other, of gradients with
    norms over four decades.
  * lenet5: a whole step on 32 random pictures, of 50 batches that come in turn.
    A share is the difference of two rows, taken call by call.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import datetime
import functools
import math
import os
import platform
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from benchmarks.command import make_parser
from benchmarks.command import ROOT
from benchmarks.command import write
import models
import mopt

PyTree = Any

_RATE = 1e-6  # Parameters hardly move, however many steps are timed.
_MANY = (2, 3, 4, 8, 16, 32)
# Passes that move what does not change out of a loop; a second protection.
_IN_LOOP = {
  'xla_disable_hlo_passes': 'while-loop-invariant-code-motion,'
  'while-loop-expensive-invariant-code-motion'
}
# Seconds that a call takes at least: hundreds of times what dispatch does.
_CALL = 0.01
# Steps in a call at least, however slow, and numbers in all of them together:
# a guess at what makes it long enough.
_LEAST, _NUMBERS = 4, 5_000_000
# So many numbers, 800 MB, are in no cache.
_UNCACHED = 200_000_000

_PRUNE = mopt.prune_by_magnitude(1e-3, mask=mopt.dense_kernels)


def _penalty(gramian: jax.Array) -> jax.Array:
  # Not at import, for an array starts JAX: then its devices are settled.
  return mopt.fixed_weights((1.0, 3e-4))(gramian)


def _weighted(inner: optax.GradientTransformation):
  return optax.chain(mopt.aggregate(_penalty), inner)


# The transformation, its number of gradients, and for each parameter the
# numbers that it moves and the numbers that it holds.
OPTIMIZERS = {
  'sgd': (optax.sgd(_RATE), 1, 3, 2),
  'rmsprop': (optax.rmsprop(_RATE), 1, 5, 3),
  'adam': (optax.adam(_RATE), 1, 7, 4),
  'adam, weighted sum': (_weighted(optax.adam(_RATE)), 2, 8, 5),
  'smgd': (mopt.smgd(_RATE), 2, 6, 3),
  'mrmsprop': (mopt.mrmsprop(_RATE), 2, 10, 5),
  'madam': (mopt.madam(_RATE), 2, 14, 7),
  'madam, m=8': (mopt.madam(_RATE, num_objectives=8), 8, 50, 25),
}
# Of so many parameters, all rows together would need some 30 GB.
_LARGE, _OF_LARGE = 3e7, ('adam', 'madam')
LENET5 = {
  'adam, weighted sum': _weighted(optax.adam(1e-3)),
  'madam': mopt.madam(1e-3),
  # Neither Gramian nor solve.
  'madam, fixed weights': mopt.madam(1e-3, weighting=_penalty),
}
# Name, a row, and the row without it.
SHARES = (
  ('pruning', 'adam, weighted sum + prune', 'adam, weighted sum'),
  ('pruning', 'madam + prune', 'madam'),
  ('Gramian, solve', 'madam + prune', 'madam, fixed weights + prune'),
  ('madam for adam', 'madam + prune', 'adam, weighted sum + prune'),
)


@dataclasses.dataclass
class Program:
  """A row: `function(carry, *arguments) -> carry`, which makes `unit` steps."""

  table: str
  name: str
  function: Callable[..., PyTree]
  carry: PyTree
  arguments: tuple[PyTree, ...]
  size: int | None = None
  m: int | None = None
  unit: int = 1
  repeats: int = 1  # Of the function in a call.
  moved: int = 0  # Numbers in a step, and the places they have.
  held: int = 0
  times: list[float] = dataclasses.field(default_factory=list)

  @property
  def steps(self) -> int:
    return self.unit * self.repeats

  def compile(self, seconds: float = _CALL) -> None:
    """Compiles a call that takes `seconds` at least, and warms it up."""
    # A copy of its own, for it is donated and may be shared with other rows.
    self.carry = jax.tree.map(jnp.array, self.carry)
    is_repeated = self.table in ('update', 'gramian')
    while True:
      function = functools.partial(repeat, self.function, self.repeats)
      jitted = jax.jit(function, donate_argnums=0)
      lowered = jitted.lower(self.carry, *self.arguments)
      start = time.perf_counter()
      self._compiled = lowered.compile(_IN_LOOP if is_repeated else None)
      self.compile_s = time.perf_counter() - start
      for _ in range(3):
        self.call()
      took = self.steps * min(self.times)
      self.times.clear()
      if took >= seconds:
        return
      # Of a short call a good part was dispatch: then it takes another round.
      self.repeats = math.ceil(self.repeats * 1.5 * seconds / took)

  def call(self) -> None:
    start = time.perf_counter()
    self.carry = self._compiled(self.carry, *self.arguments)
    jax.block_until_ready(self.carry)
    self.times.append((time.perf_counter() - start) / self.steps)

  def row(self, triads: Sequence['Program']) -> dict[str, Any]:
    """The floor is by the smallest triad that holds as many numbers."""
    median = float(np.median(self.times))
    low, high = np.percentile(self.times, [25, 75])
    memory = self._compiled.memory_analysis()
    row = dict(table=self.table, name=self.name, size=self.size, m=self.m)
    row |= dict(device=jax.devices()[0].device_kind)
    row |= dict(median_us=1e6 * median, iqr_us=1e6 * float(high - low))
    row |= dict(min_us=1e6 * min(self.times), n=len(self.times))
    row |= dict(steps_per_call=self.steps, compile_s=self.compile_s)
    row |= dict(temp_bytes=memory.temp_size_in_bytes if memory else None)
    # What is updated in place: all of it, if it is donated and fits.
    row |= dict(alias_bytes=memory.alias_size_in_bytes if memory else None)
    row |= dict(floor_us=None, ratio=None)
    if self.moved:
      larger = [t for t in triads if t.held >= self.held]
      triad = larger[0] if larger else triads[-1]
      floor = self.moved / triad.moved * float(np.median(triad.times))
      row |= dict(floor_us=1e6 * floor, ratio=median / floor)
      if median < 0.1 * floor:
        raise RuntimeError(
          f'{self.name}, {self.size:,}: expected its floor of '
          f'{1e6 * floor:.3g} us or about, got {1e6 * median:.3g} us: the '
          'compiler has left out work.'
        )
    return row


def repeat(
  function: Callable[..., PyTree], repeats: int, carry: PyTree, *arguments
) -> PyTree:
  """`carry = function(carry, *arguments)`, many times in one program.

  A known number of times, for a GPU need not ask the host then.
  """
  body = lambda _, carry: function(carry, *arguments)
  return jax.lax.fori_loop(0, repeats, body, carry)


def measure(
  programs: Sequence[Program], seconds: float, call: float = _CALL
) -> None:
  """Calls all programs in turn, until each has had its share of time.

  That is 30 calls at least and 200 at most, but no more than thrice `seconds`.
  A call takes `call` seconds at least.
  """
  for program in programs:
    program.compile(call)
  random = np.random.default_rng(0)

  def is_due(program):
    n = len(program.times)
    spent = sum(program.times) * program.steps
    return n < 3 or (n < 200 and spent < (3 if n < 30 else 1) * seconds)

  while due := [p for p in programs if is_due(p)]:
    for i in random.permutation(len(due)):
      due[i].call()


def maker(table: str, size: int) -> Callable[..., Program]:
  """Makes rows of one size, given `step(carry, data)` and what it moves.

  The data are the same in each step, and what depends on them alone, such as a
  Gramian, must not be computed once, before the loop over the steps. So they
  come through a barrier with a number that each step changes, for the compiler
  as if they depended on it. A factor would not do: a matrix product reads a
  copy of what is scaled.
  """

  def make(name, step, carry, data, *, moved, held, m=None):
    def function(carry, data):
      carry, turn = carry
      data, turn = jax.lax.optimization_barrier((data, turn))
      return step(carry, data), -turn

    carry = carry, jnp.float32(1)
    kwargs = dict(moved=moved * size, held=held * size)
    kwargs |= dict(repeats=max(_LEAST, _NUMBERS // size))
    return Program(table, name, function, carry, (data,), size, m, **kwargs)

  return make


def triads(table: str, size: int, most: int) -> list[Program]:
  """As large as any row, which holds `most` numbers per parameter at most.

  Beyond 8 only where it makes a difference, which is in caches.
  """
  step, programs = lambda a, b: a + 1e-9 * b, []
  sizes = [
    held
    for held in (2, 4, 8, 16, 32)
    if held <= 8 or (held < 2 * most and held * size <= _UNCACHED)
  ]
  for held in sizes:
    a = jnp.ones(held * size // 2)
    words = dict(moved=3 * held // 2, held=held)
    name = f'triad of {held} N'
    programs.append(maker(table, size)(name, step, a, a + 1, **words))
  return programs


def make_tree(size: int, m: int | None = None) -> PyTree:
  """Parameters or m stacked gradients, in leaves as networks have them."""
  rows = {'layer1': int(0.8 * size) // 100, 'layer2': int(0.17 * size) // 100}
  shapes = {name: {'kernel': (n, 100)} for name, n in rows.items()}
  shapes['layer2']['bias'] = (size - 100 * sum(rows.values()),)
  random = np.random.default_rng(m)

  def draw(shape):
    shape = shape if m is None else (m, *shape)
    return jnp.asarray(0.05 * random.standard_normal(shape, np.float32))

  return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def optimizer_step(tx: optax.GradientTransformation) -> Callable[..., PyTree]:
  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def update_programs(size: int) -> list[Program]:
  """Each optimizer without and with pruning, or some of them without."""
  names = [n for n in OPTIMIZERS if size <= _LARGE or n in _OF_LARGE]
  prunings = {'': (), ' + prune': (_PRUNE,)} if size <= _LARGE else {'': ()}
  params = make_tree(size)
  grads = {m: make_tree(size, m) for m in {OPTIMIZERS[n][1] for n in names}}
  grads[1] = params
  most = max(OPTIMIZERS[name][-1] for name in names)
  make, programs = maker('update', size), triads('update', size, most)
  for name in names:
    tx, m, moved, held = OPTIMIZERS[name]
    words = dict(m=m, moved=moved, held=held)
    for suffix, prune in prunings.items():
      chain = optax.chain(tx, *prune)
      step, carry = optimizer_step(chain), (params, chain.init(params))
      programs.append(make(name + suffix, step, carry, grads[m], **words))
  return programs


def gramian_programs(size: int, many: Sequence[int]) -> list[Program]:
  many = [m for m in many if m * size <= 33_000_000]
  programs = triads('gramian', size, max(many, default=2))
  for m in many:
    grads, words = make_tree(size, m), dict(m=m, moved=m, held=m)
    step, make = lambda _, g: mopt.gramian(g), maker('gramian', size)
    carry = jnp.zeros((m, m))
    programs.append(make(f'gramian, m={m}', step, carry, grads, **words))
  return programs


def min_norm_programs(many: Sequence[int], steps: int = 64) -> list[Program]:
  def solve_all(carry, gramians):
    total, scale = carry

    # Weights are the same at any scale, but the compiler does not know.
    def step(total, gramian):
      return total + mopt.min_norm_weights(scale * gramian), None

    return jax.lax.scan(step, total, gramians)[0], 3 - scale

  def program(m):
    random = np.random.default_rng(m)
    grads = random.standard_normal((steps, m, 4 * m))
    grads *= 10 ** random.uniform(-2, 2, (steps, m, 1))
    gramians = jnp.asarray(grads @ grads.swapaxes(1, 2), jnp.float32)
    name, carry = f'min_norm_weights, m={m}', (jnp.zeros(m), jnp.float32(1))
    words = dict(m=m, unit=steps, repeats=10)
    return Program('min-norm', name, solve_all, carry, (gramians,), **words)

  return [program(m) for m in many]


def lenet5_programs(steps: int, quick: bool) -> list[Program]:
  """The whole step of a network, with several optimizers."""
  model = models.create('lenet5')
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (steps, 32, 28, 28, 1), np.uint8)
  data = jnp.asarray(images), jnp.asarray(random.integers(0, 10, (steps, 32)))
  init = jax.jit(model.init)
  params = init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))['params']

  def error(params, batch):
    images, labels = batch
    logits = model.apply({'params': params}, images / jnp.float32(255))
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return ce + 1e-4 * mopt.l2_norm_squared(params, mopt.conv_kernels)

  complexity = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
  grad_fn = mopt.value_and_stacked_grad(error, complexity)

  def program(name, *transforms):
    tx = optax.chain(*transforms)

    def epoch(carry, data):
      def step(carry, batch):
        values, grads = grad_fn(carry[0], batch)
        return optimizer_step(tx)(carry, grads), values

      return jax.lax.scan(step, carry[0], data)

    carry = (params, tx.init(params)), jnp.zeros((steps, 2))
    size = optax.tree.size(params)
    return Program('lenet5', name, epoch, carry, (data,), size, 2, steps)

  plain = [] if quick else [program(name, tx) for name, tx in LENET5.items()]
  names = {f'{name} + prune': tx for name, tx in LENET5.items()}
  return plain + [program(name, tx, _PRUNE) for name, tx in names.items()]


def shares_of(programs: Sequence[Program]) -> list[dict[str, Any]]:
  """What parts of a step of LeNet-5 cost."""
  times = {p.name: np.array(p.times) for p in programs}
  shares = []
  for name, whole, rest in [share for share in SHARES if share[2] in times]:
    n = min(len(times[whole]), len(times[rest]))
    cost = float(np.median(times[whole][:n] - times[rest][:n]))
    share = cost / float(np.median(times[whole]))
    shares.append(dict(part=name, of=whole, cost_us=1e6 * cost, share=share))
  return shares


def versions() -> dict[str, Any]:
  """Where and with what this was measured."""

  def git(*command):
    command = ['git', '-C', str(ROOT), *command]
    return subprocess.run(
      command, capture_output=True, text=True
    ).stdout.strip()

  device = jax.devices()[0]
  versions = {m.__name__: m.__version__ for m in (jax, jaxlib, optax, np, mopt)}
  code = ('mopt', 'models', 'benchmarks', ':!benchmarks/results')
  changed = bool(git('status', '--porcelain', *code))
  date = datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds')
  return (
    dict(device=device.device_kind, platform=device.platform)
    | dict(machine=platform.platform(), python=platform.python_version())
    | dict(cpus=os.cpu_count(), load=os.getloadavg()[0], date=date)
    | dict(versions, commit=git('rev-parse', 'HEAD'), changed=changed)
  )


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
  device = jax.devices()[0]
  if device.platform != 'cpu':
    title += f', {device.device_kind}'
  hidden = ('table', 'm', 'device', 'min_us', 'steps_per_call', 'alias_bytes')
  names = [name for name in rows[0] if name not in hidden]
  table = Table(*names, title=title)

  def text(value):
    if value is None:
      return ''
    return f'{value:,.4g}' if isinstance(value, float) else str(value)

  for row in rows:
    table.add_row(*(text(row[name]) for name in names))
  Console(width=120).print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = make_parser('step_cost', __doc__)

  def sizes(text):
    return [max(int(float(size)), 5000) for size in text.split(',')]

  small, full = sizes('1e4'), sizes('6e4,1e6,1e7')
  parser.add_argument('--sizes', type=sizes, help='default: 6e4,1e6,1e7')
  args = parser.parse_args(argv)
  args.sizes = args.sizes or (small if args.quick else full)
  return args


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  seconds, call, steps = (0.05, 1e-3, 3) if args.quick else (1.5, _CALL, 50)
  many = _MANY[:2] if args.quick else _MANY
  result = dict(versions(), quick=args.quick, rows=[])

  def run(title, programs):
    measure(programs, seconds, call)
    triads = [p for p in programs if p.name.startswith('triad')]
    rows = [p.row(triads) for p in programs]
    show(title, rows)
    result['rows'] += rows

  for size in args.sizes:
    run(f'One update of {size:,} parameters', update_programs(size))
  for size in args.sizes:
    run(f'Gramian of {size:,} parameters', gramian_programs(size, many))
  run('One min-norm solve', min_norm_programs(many))
  lenet5 = lenet5_programs(steps, args.quick)
  run('One step of LeNet-5, batch 32', lenet5)
  result['shares'] = shares_of(lenet5)
  show('Parts of a step of LeNet-5', result['shares'])
  write(args.out, result)


if __name__ == '__main__':
  main()
