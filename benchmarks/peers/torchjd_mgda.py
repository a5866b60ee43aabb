"""LeNet-5 by TorchJD: MGDA on the gradients, then PyTorch's Adam."""

import functools
import itertools

import torch
from torchjd.aggregation import MGDA
from torchjd.autojac import backward
from torchjd.autojac import jac_to_grad

from benchmarks.peers import pytorch
from benchmarks.peers.task import Task
from benchmarks.peers.task import Ways


class Trainer(pytorch.Trainer):
  """Adam sees the aggregated gradient: one pair of moments, ours has two."""

  def __init__(self, *args, chunk: int | None, leafwise: bool, **kwargs):
    super().__init__(*args, **kwargs)
    self._chunk, self._leafwise = chunk, leafwise
    self._params = list(self.network.parameters())
    self._mgda = MGDA()

  def step(self, images: torch.Tensor, labels: torch.Tensor) -> list:
    self.optimizer.zero_grad()
    values = self.losses(images, labels)
    backward(values, inputs=self._params, parallel_chunk_size=self._chunk)
    jac_to_grad(
      self._params, self._mgda, optimize_gramian_computation=self._leafwise
    )
    self.update()
    return [value.detach() for value in values]


def eager(task: Task) -> Ways:
  """All ways that may be the fastest."""
  ways = {}
  grid = itertools.product(
    pytorch.all_threads(), (True, False), (None, 1), (False, True)
  )
  for threads, fused, chunk, leafwise in grid:
    name = f'threads={threads}, fused={fused}, parallel_chunk_size={chunk}'
    name += f', optimize_gramian_computation={leafwise}'
    # The gradients it leaves are contiguous whatever the weights are, which
    # PyTorch's fused updates do not expect: channels_last would go wrong.
    how = dict(threads=threads, channels_last=False, fused=fused)
    how |= dict(chunk=chunk, leafwise=leafwise)
    ways[name] = functools.partial(Trainer, **how)
  return ways
