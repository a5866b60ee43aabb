"""LeNet-5 by PyTorch, eager and compiled."""

import functools
import itertools
import time

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

from benchmarks.peers.task import CONVOLUTIONS
from benchmarks.peers.task import DENSE
from benchmarks.peers.task import Task
from benchmarks.peers.task import Ways
from benchmarks.peers.task import Weights

_DEFAULT_THREADS = torch.get_num_threads()


class LeNet5(nn.Module):
  """As `models.lenet`; pictures are `[batch, channel, height, width]`."""

  def __init__(self):
    super().__init__()
    self.conv1 = nn.Conv2d(1, 6, 3)
    self.conv2 = nn.Conv2d(6, 16, 3)
    self.layer1 = nn.Linear(400, 120)
    self.layer2 = nn.Linear(120, 84)
    self.layer3 = nn.Linear(84, 10)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = F.avg_pool2d(F.relu(self.conv1(x)), 2)
    x = F.avg_pool2d(F.relu(self.conv2(x)), 2)
    x = F.relu(self.layer1(x.flatten(1)))
    return self.layer3(F.relu(self.layer2(x)))


def _to_torch(layer: str, name: str, value: np.ndarray) -> np.ndarray:
  if name == 'bias':
    return value
  if layer in CONVOLUTIONS:
    return value.transpose(3, 2, 0, 1)
  if layer == 'layer1':  # Channels are flattened first, not last.
    value = value.reshape(5, 5, 16, 120).transpose(2, 0, 1, 3)
  return value.reshape(-1, value.shape[-1]).T


def _from_torch(layer: str, name: str, value: np.ndarray) -> np.ndarray:
  if name == 'bias':
    return value
  if layer in CONVOLUTIONS:
    return value.transpose(2, 3, 1, 0)
  value = value.T
  if layer == 'layer1':
    value = value.reshape(16, 5, 5, 120).transpose(1, 2, 0, 3)
  return value.reshape(-1, value.shape[-1])


class Trainer:
  """With pictures in memory; a step is written as PyTorch's users do."""

  def __init__(
    self,
    task: Task,
    weights: Weights,
    threads: int,
    channels_last: bool,
    fused: bool = True,
  ):
    self._task, self._threads = task, threads
    self.network = network = LeNet5()
    self.load(weights)
    form = torch.channels_last if channels_last else torch.contiguous_format
    network.to(memory_format=form)
    images, labels = task.draw()
    self._images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    self._labels = torch.from_numpy(labels.astype(np.int64))
    self._convs = [getattr(network, name).weight for name in CONVOLUTIONS]
    self._dense = [getattr(network, name).weight for name in DENSE]
    self.optimizer: torch.optim.Optimizer
    how = dict(fused=True) if fused else dict(foreach=True)
    if task.optimizer == 'adam':
      self.optimizer = torch.optim.Adam(network.parameters(), task.rate, **how)
    else:
      self.optimizer = torch.optim.SGD(network.parameters(), task.rate, **how)

  def load(self, weights: Weights) -> None:
    with torch.no_grad():
      for layer, leaves in weights.items():
        module = getattr(self.network, layer)
        for name, parameter in (
          ('kernel', module.weight),
          ('bias', module.bias),
        ):
          value = np.ascontiguousarray(_to_torch(layer, name, leaves[name]))
          parameter.copy_(torch.from_numpy(value))

  def losses(
    self, images: torch.Tensor, labels: torch.Tensor
  ) -> tuple[torch.Tensor, torch.Tensor]:
    task = self._task
    images = (images.float() - task.mean) * (1 / task.std)
    error = F.cross_entropy(self.network(images), labels)
    l2 = sum(w.square().sum() for w in self._convs)
    # The gradient of abs is 0 at 0, as ours.
    l1 = sum(w.abs().sum() for w in self._dense)
    return error + task.conv_l2 * l2, l1

  def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    error, l1 = self.losses(images, labels)
    return error + self._task.l1 * l1

  @torch.no_grad()
  def update(self) -> None:
    self.optimizer.step()
    if self._task.prunes:
      for weight in self._dense:
        weight.masked_fill_(weight.abs() < self._task.threshold, 0)

  def step(self, images: torch.Tensor, labels: torch.Tensor) -> list:
    self.optimizer.zero_grad()
    loss = self.loss(images, labels)
    loss.backward()
    self.update()
    return [loss.detach()]

  def epoch(self) -> float:
    torch.set_num_threads(self._threads)
    start = time.perf_counter()
    order = torch.randperm(len(self._labels))
    for chosen in order.split(self._task.batch):
      self._values = self.step(self._images[chosen], self._labels[chosen])
    return time.perf_counter() - start

  def objectives(self) -> list[float]:
    return [float(value) for value in self._values]

  def weights(self) -> Weights:
    weights: Weights = {}
    for layer in CONVOLUTIONS + DENSE:
      module = getattr(self.network, layer)
      leaves = {'kernel': module.weight, 'bias': module.bias}
      weights[layer] = {
        name: _from_torch(layer, name, leaf.detach().numpy().copy())
        for name, leaf in leaves.items()
      }
    return weights


class Compiled(Trainer):
  """Two graphs, one of the objective and its gradient, one of the update.

  One graph of the whole step, with gradients by `torch.func.grad` and an Adam
  of our own, took as long.
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    # Few programs of one function are kept, and beyond them it runs eagerly.
    # There is one such trainer at a time: those of others go.
    torch.compiler.reset()
    self.loss = torch.compile(self.loss)
    self.update = torch.compile(self.update)


def all_threads() -> list[int]:
  """One and as many as PyTorch takes: two are often slower."""
  return sorted({1, _DEFAULT_THREADS})


def eager(task: Task) -> Ways:
  """All ways that may be the fastest."""
  ways = {}
  grid = itertools.product(all_threads(), (False, True), (True, False))
  for threads, last, fused in grid:
    name = f'threads={threads}, channels_last={last}, fused={fused}'
    how = dict(threads=threads, channels_last=last, fused=fused)
    ways[name] = functools.partial(Trainer, **how)
  return ways


def compiled(task: Task) -> Ways:
  # Code is made from the steps of the other Adam, and in its own layout.
  how = dict(channels_last=False, fused=False)
  return {
    f'threads={threads}': functools.partial(Compiled, threads=threads, **how)
    for threads in all_threads()
  }
