"""How fast the trainer trains: epochs of LeNet-5 and the VGG-like network.

  python -m benchmarks.epoch_speed           # a few minutes on two cores
  python -m benchmarks.epoch_speed --quick   # a look, in half a minute

What is timed is `mopt.training`'s own compiled epoch, with the drawing of the
batches, augmentation, both gradients, the Gramian, the update and pruning, on
random pictures (the time does not depend on what they show) and fewer steps
than an epoch has. Compilation is apart, each call blocks, rows run interleaved,
and a time is the median over the calls. How to read it:

  * ms_step: of one update of one member; K members are one program.
  * images_s: pictures per second and member, times K.
  * epoch_s: steps of a full epoch (1,875 of 32 pictures for MNIST, 782 of 64
    for CIFAR10) times K members.
  * floor: three times the multiply-adds of the forward pass (its own, and the
    gradients for activations and for weights), at the rate of a product of two
    large square matrices of the same number format in the same rounds. What is
    above it are thin matrices, copies, pooling, normalisation and memory.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import make_parser
from benchmarks.command import write
from benchmarks.step_cost import show
from benchmarks.step_cost import versions
import models
from mopt.training import Config
from mopt.training import Dataset
from mopt.training import Job
from mopt.training.data import Split
from mopt.training.program import make_program

# Image shape, examples of a full epoch, and the settings of the paper.
NETWORKS = {
  'lenet5': ((28, 28, 1), 60_000, dict(batch_size=32)),
  'vgg': ((32, 32, 3), 50_000, dict(batch_size=64, conv_l2=1e-6)),
}
# Model, optimizer, members, number format.
ROWS = (
  ('lenet5', 'adam', 1, 'float32'),
  ('lenet5', 'adam', 8, 'float32'),
  ('lenet5', 'madam', 1, 'float32'),
  ('vgg', 'rmsprop', 1, 'float32'),
  ('vgg', 'rmsprop', 2, 'float32'),
  ('vgg', 'mrmsprop', 1, 'float32'),
)
# Where the format is native.
ACCELERATOR_ROWS = (
  ('lenet5', 'adam', 26, 'float32'),
  ('vgg', 'rmsprop', 14, 'float32'),
  ('vgg', 'rmsprop', 1, 'bfloat16'),
  ('vgg', 'rmsprop', 14, 'bfloat16'),
)


@dataclasses.dataclass
class Timed:
  """A function that blocks, and how long its calls took."""

  call: Callable[[], Any]
  times: list[float] = dataclasses.field(default_factory=list)

  def measure(self) -> None:
    start = time.perf_counter()
    self.call()
    self.times.append(time.perf_counter() - start)

  @property
  def median(self) -> float:
    return float(np.median(self.times))


def forward_flops(model: str) -> float:
  """Twice the multiply-adds of convolutions and dense layers, for a picture."""
  shape = NETWORKS[model][0]
  network = models.create(model)
  image = jnp.zeros((1, *shape))
  variables = jax.eval_shape(network.init, jax.random.key(0), image)
  outputs = jax.eval_shape(
    functools.partial(network.apply, capture_intermediates=True),
    variables,
    image,
  )[1]['intermediates']
  flops = 0.0
  for name, layer in variables['params'].items():
    if 'kernel' in layer:
      (output,) = outputs[name]['__call__']
      kernel = layer['kernel']  # the last axis: features
      flops += 2.0 * output.size / kernel.shape[-1] * kernel.size
  return flops


def make_config(
  model: str, optimizer: str, members: int, dtype: str = 'float32'
) -> Config:
  """As many l1 weights, or seeds where the optimizer finds its weights."""
  finds = optimizer.startswith('m')
  weights = tuple(np.geomspace(1e-5, 1e-3, members).tolist())
  return Config(
    model=model,
    optimizer=optimizer,
    l1=None if finds else weights,
    seed=tuple(range(members)) if finds else (0,),
    compute_dtype=dtype,
    epochs=1000,
    **NETWORKS[model][2],
  )


def epoch_caller(
  config: Config, steps: int, devices: Sequence[jax.Device] | None = None
) -> Callable[[], Any]:
  """A part of an epoch, on all devices unless told; each call goes on."""
  shape, _, _ = NETWORKS[config.model]
  count = steps * config.batch_size
  random = np.random.default_rng(0)
  images = random.integers(0, 256, (count, *shape), np.uint8)
  train = Split(images, random.integers(0, 10, count, np.int32))
  nothing = Split(images[:0], train.labels[:0])
  data = Dataset('random', 10, train, nothing, nothing, 127.5, 73.9)
  network = models.create(config.model, 10, jnp.dtype(config.compute_dtype))
  program = make_program(Job(config, network, data, devices=devices))
  state = program.prune(program.init())

  def call():
    nonlocal state
    state, metrics = program.epoch(state, 0)
    return jax.block_until_ready((state, metrics))

  return call


def matmul_caller(dtype: str, size: int) -> Callable[[], Any]:
  matrix = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(matrix, matrix).block_until_ready()


def measure(rows, steps: dict[str, int], rounds: int, size: int):
  epochs = [
    Timed(epoch_caller(make_config(*row), steps[row[0]])) for row in rows
  ]
  formats = sorted({row[3] for row in rows})
  products = {dtype: Timed(matmul_caller(dtype, size)) for dtype in formats}
  compile_s = []
  for timed in (*epochs, *products.values()):
    timed.measure()  # compiles
    compile_s.append(timed.times.pop())
  for _ in range(rounds):
    for timed in (*epochs, *products.values()):
      timed.measure()
  flops = {dtype: 2 * size**3 / t.median for dtype, t in products.items()}
  return [
    describe(row, steps[row[0]], timed, first, flops[row[3]])
    for row, timed, first in zip(rows, epochs, compile_s)
  ]


def describe(row, steps, timed, first, flops_s) -> dict[str, Any]:
  model, optimizer, members, dtype = row
  _, examples, settings = NETWORKS[model]
  batch = settings['batch_size']
  low, high = np.percentile(timed.times, [25, 75])
  step = timed.median / steps / members
  floor = 3 * forward_flops(model) * batch / flops_s
  return {
    'model': model,
    'optimizer': optimizer,
    'members': members,
    'dtype': dtype,
    'batch': batch,
    'steps': steps,
    'n': len(timed.times),
    'first_call_s': first,
    'ms_step': 1e3 * step,
    'iqr_ms': 1e3 * float(high - low) / steps / members,
    'images_s': batch / step,
    'epoch_s': step * members * -(-examples // batch),
    'matmul_gflops': flops_s / 1e9,
    'floor_ms': 1e3 * floor,
    'ratio': step / floor,
  }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = make_parser('epoch_speed', __doc__)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  args = parse(argv)
  on_cpu = jax.default_backend() == 'cpu'
  rows = ROWS if on_cpu else ROWS + ACCELERATOR_ROWS
  steps, rounds = {'lenet5': 200, 'vgg': 5}, 7
  if not on_cpu:
    steps = {'lenet5': 1875, 'vgg': 200}
  if args.quick:
    rows, steps, rounds = ROWS[:1], {'lenet5': 5}, 2
  size = 256 if args.quick else 2048 if on_cpu else 8192
  result = dict(versions(), quick=args.quick)
  result['rows'] = measure(rows, steps, rounds, size)
  hidden = ('n', 'steps', 'first_call_s', 'iqr_ms', 'matmul_gflops')
  shown = [
    {k: v for k, v in row.items() if k not in hidden} for row in result['rows']
  ]
  show('Epochs of the trainer', shown)
  write(args.out, result)


if __name__ == '__main__':
  main()
