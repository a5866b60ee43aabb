"""The work that all libraries are given, and how to see that it is the same.

Weights are handed around in our layouts, a kernel of a convolution as `[height,
width, in, out]` and one of a dense layer as `[in, out]`, in NumPy.
"""

from collections.abc import Callable
import dataclasses
from typing import Protocol

import numpy as np

Weights = dict[str, dict[str, np.ndarray]]  # Of layers: kernel and bias.

CONVOLUTIONS = ('conv1', 'conv2')
DENSE = ('layer1', 'layer2', 'layer3')
# Relative of objectives, absolute of gradients, whose leaves reach 0.02 to 1.
# The push of the l1 norm, 3e-4, is well above it, roundings well below.
_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Task:
  """Training of LeNet-5 on random pictures; settings of the paper."""

  batch: int
  steps: int  # In an epoch, which reads every picture once.
  is_mgda: bool = False  # Finds its weights, or has those of equation (2).
  prunes: bool = True
  optimizer: str = 'adam'  # Or 'sgd', to compare gradients with.
  rate: float = 1e-3
  l1: float = 3e-4
  conv_l2: float = 1e-4
  threshold: float = 1e-3
  mean: float = 127.5
  std: float = 73.9

  def draw(self) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `[n, 28, 28, 1]`, dtype=np.uint8, and labels."""
    random = np.random.default_rng(0)
    n = self.batch * self.steps
    images = random.integers(0, 256, (n, 28, 28, 1), np.uint8)
    return images, random.integers(0, 10, n, np.int32)


class Trainer(Protocol):
  """A network in training, by one of the libraries."""

  def epoch(self) -> float:
    """Trains on; the seconds from shuffling until all is computed."""
    ...

  def objectives(self) -> list[float]:
    """Of the last step, before its update: the weighted sum, or both."""
    ...

  def weights(self) -> Weights:
    """As they are now."""
    ...


# By their settings, which are for speed only.
Ways = dict[str, Callable[[Task, Weights], Trainer]]


def one_step(is_mgda: bool, prunes: bool) -> Task:
  """A step whose update is the negative gradient."""
  return Task(32, 1, is_mgda, prunes, optimizer='sgd', rate=1.0)


def check_same(task: Task, ours: Trainer, theirs: Trainer) -> None:
  """Of two trainers after `one_step`.

  Raises:
    AssertionError: if objectives, gradients or what is pruned differ.
  """
  difference = np.subtract(ours.objectives(), theirs.objectives())
  worst = float(np.max(np.abs(difference) / np.abs(ours.objectives())))
  assert worst < _TOLERANCE, f'objectives differ by {worst:.1e}'
  after, other = ours.weights(), theirs.weights()
  for layer, leaves in after.items():
    for name, a in leaves.items():
      b = other[layer][name]
      assert a.shape == b.shape, f'{layer}/{name}: {a.shape} and {b.shape}'
      same = np.abs(a - b) <= _TOLERANCE
      if task.prunes and layer in DENSE and name == 'kernel':
        same &= (a == 0) == (b == 0)
        # Rounding decides about what ends at the threshold.
        larger = np.maximum(np.abs(a), np.abs(b))
        same |= np.abs(larger - task.threshold) < 1e-6
      worst = float(np.abs(a - b).max())
      assert same.all(), f'{layer}/{name} differ by {worst:.1e} after a step'
