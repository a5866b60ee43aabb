"""LeNet-5 by this project: the compiled epoch of its trainer."""

import time

import jax
import numpy as np

from benchmarks.peers.task import Task
from benchmarks.peers.task import Weights
import models
from mopt.training import Config
from mopt.training import Dataset
from mopt.training import Job
from mopt.training.data import Split
from mopt.training.program import make_program

_OPTIMIZERS = {
  ('adam', False): 'adam',
  ('adam', True): 'madam',
  ('sgd', False): 'sgd',
  ('sgd', True): 'smgd',
}


class Trainer:
  """On one device; it also counts, and keeps a history of norms and angles."""

  def __init__(self, task: Task):
    config = Config(
      optimizer=_OPTIMIZERS[task.optimizer, task.is_mgda],
      l1=None if task.is_mgda else (task.l1,),
      conv_l2=task.conv_l2,
      prune='batch' if task.prunes else 'none',
      threshold=task.threshold,
      learning_rate=task.rate,
      schedule='constant',
      momentum=0.0,
      batch_size=task.batch,
    )
    train = Split(*task.draw())
    nothing = Split(train.images[:0], train.labels[:0])
    data = Dataset('random', 10, train, nothing, nothing, task.mean, task.std)
    network = models.create('lenet5')
    devices = jax.local_devices()[:1]
    self._task = task
    self._program = make_program(Job(config, network, data, devices=devices))
    self._state = self._program.prune(self._program.init())

  def epoch(self) -> float:
    start = time.perf_counter()
    self._state, self._metrics = self._program.epoch(self._state, 0)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start

  def objectives(self) -> list[float]:
    first, second = self._metrics.values[0].tolist()
    is_sum = not self._task.is_mgda
    return [first + self._task.l1 * second] if is_sum else [first, second]

  def weights(self) -> Weights:
    params = self._program.layout.collect(self._state.params)
    return jax.tree.map(lambda x: np.array(x[0]), dict(params))
