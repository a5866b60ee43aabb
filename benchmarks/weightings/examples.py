"""One objective for each example: a step of LeNet-5 with m digits.

A step finds the Gramian of all examples' gradients, weights from it, and the
gradient of the weighed losses. The weights are the Gramian's row sums, cheap
and such that nothing can be left out. Ways:

  * per_example_gramian: from activations and cotangents.
  * stacked: `jax.vmap(jax.grad(loss))`, and `mopt.gramian` of that.
  * mean: no Gramian at all, the usual gradient; what a step costs at least.
  * TorchJD autogram: its engine of the same kind.

Columns: ms of a step, the median, iqr_ms the distance of its quartiles;
temp_mb, what the compiled program needs beside its arguments and results;
error, the largest difference from the stacked Gramian by its largest entry;
ratio: ms by TorchJD's. All ways are timed in turns, in one run.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import importlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import models
import mopt


def _row_sums(gramian: Any) -> Any:
  return gramian.sum(0) / gramian.sum()


def _draw(m: int) -> tuple[np.ndarray, np.ndarray]:
  random = np.random.default_rng(m)
  images = random.standard_normal((m, 28, 28, 1), np.float32)
  return images, random.integers(0, 10, m)


def our_steps(m: int) -> dict[str, Callable[..., Any]]:
  """Functions of parameters and a batch, that give the Gramian, too."""
  network = models.create('lenet5')

  def loss(params, image, digit):
    logits = network.apply({'params': params}, image[None])[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, digit)

  losses = jax.vmap(loss, in_axes=(None, 0, 0))
  gramian_fn = mopt.per_example_gramian(loss)
  grads_fn = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0))

  def weighed(params, weights, *batch):
    return jax.grad(lambda p: weights @ losses(p, *batch))(params)

  def per_example(params, *batch):
    _, gramian = gramian_fn(params, *batch)
    return weighed(params, _row_sums(gramian), *batch), gramian

  def stacked(params, *batch):
    _, grads = grads_fn(params, *batch)
    gramian = mopt.gramian(grads)
    weights = _row_sums(gramian)
    combine = lambda x: jnp.tensordot(weights, x, 1)
    return jax.tree.map(combine, grads), gramian

  def mean(params, *batch):
    return weighed(params, jnp.full(m, 1 / m), *batch), jnp.zeros((m, m))

  return {'per_example_gramian': per_example, 'stacked': stacked, 'mean': mean}


def their_step(m: int) -> Callable[[], None]:
  """Raises: ImportError without PyTorch and TorchJD."""
  torch = importlib.import_module('torch')
  autogram = importlib.import_module('torchjd.autogram')
  network = importlib.import_module('benchmarks.peers.pytorch').LeNet5()
  images, digits = map(torch.from_numpy, _draw(m))
  images = images.permute(0, 3, 1, 2).contiguous()
  criterion = torch.nn.CrossEntropyLoss(reduction='none')
  engine = autogram.Engine(network, batch_dim=0)

  def step():
    network.zero_grad()
    losses = criterion(network(images), digits)
    gramian = engine.compute_gramian(losses)
    losses.backward(_row_sums(gramian))

  return step


def measure(many: Sequence[int], seconds: float) -> list[dict[str, Any]]:
  rows = []
  for m in many:
    batch = tuple(map(jnp.asarray, _draw(m)))
    params = models.create('lenet5').init(jax.random.key(0), batch[0])
    params = params['params']
    calls, found, temporary = {}, {}, {}
    for name, step in our_steps(m).items():
      compiled = jax.jit(step).lower(params, *batch).compile()
      _, found[name] = compiled(params, *batch)
      memory = compiled.memory_analysis()
      temporary[name] = memory.temp_size_in_bytes / 2**20
      run = functools.partial(compiled, params, *batch)
      calls[name] = lambda run=run: jax.block_until_ready(run())
    with contextlib.suppress(ImportError):  # There is no such row.
      calls['TorchJD autogram'] = their_step(m)
    rows += _time(m, calls, seconds)
    exact = np.asarray(found['stacked'], np.float64)
    for row in rows[-len(calls) :]:
      row['temp_mb'] = temporary.get(row['way'])
      is_ours = row['way'] == 'per_example_gramian'
      off = np.abs(found['per_example_gramian'] - exact).max() / exact.max()
      row['error'] = float(off) if is_ours else None
  return rows


def _time(
  m: int, calls: dict[str, Callable[[], Any]], seconds: float
) -> list[dict[str, Any]]:
  times: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    call()
  until = time.perf_counter() + seconds
  while time.perf_counter() < until or len(times['mean']) < 5:
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      times[name].append(time.perf_counter() - start)
  median = {name: float(np.median(found)) for name, found in times.items()}
  theirs = median.get('TorchJD autogram')
  rows = []
  for name, found in times.items():
    low, high = np.percentile(found, [25, 75])
    row = dict(way=name, objectives=m, ms=1e3 * median[name])
    row |= dict(iqr_ms=1e3 * (high - low), n=len(found))
    row['ratio'] = median[name] / theirs if theirs else None
    rows.append(row)
  return rows
