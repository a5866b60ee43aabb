"""LeNet-5 by Keras on TensorFlow: `fit` and, to prune, a callback."""

import functools
import os
import time

# Read at import.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('KERAS_BACKEND', 'tensorflow')

import keras
import numpy as np
import tensorflow as tf

from benchmarks.peers.task import CONVOLUTIONS
from benchmarks.peers.task import DENSE
from benchmarks.peers.task import Task
from benchmarks.peers.task import Ways
from benchmarks.peers.task import Weights

if keras.backend.backend() != 'tensorflow':
  raise ImportError(f'Keras runs on {keras.backend.backend()}, not TensorFlow')
tf.get_logger().setLevel('ERROR')


class _Prune(keras.callbacks.Callback):
  """After each batch, by way of the host: what the authors of the paper do."""

  def __init__(self, threshold: float):
    super().__init__()
    self._threshold = threshold

  def on_train_batch_end(self, batch, logs=None):
    for name in DENSE:
      layer = self.model.get_layer(name)
      kernel, bias = layer.get_weights()
      kernel[np.abs(kernel) < self._threshold] = 0
      layer.set_weights([kernel, bias])


class _Clock(keras.callbacks.Callback):
  """An epoch without what `fit` does before its first one."""

  def on_epoch_begin(self, epoch, logs=None):
    self._start = time.perf_counter()

  def on_epoch_end(self, epoch, logs=None):
    self.seconds = time.perf_counter() - self._start


def _network(task: Task) -> keras.Model:
  l2, l1 = keras.regularizers.L2(task.conv_l2), keras.regularizers.L1(task.l1)
  conv = dict(kernel_size=3, activation='relu', kernel_regularizer=l2)
  dense = dict(activation='relu', kernel_regularizer=l1)
  scale = 1 / task.std
  return keras.Sequential(
    [
      keras.Input((28, 28, 1), dtype='uint8'),
      keras.layers.Rescaling(scale, offset=-task.mean * scale),
      keras.layers.Conv2D(6, **conv, name='conv1'),
      keras.layers.AveragePooling2D(2),
      keras.layers.Conv2D(16, **conv, name='conv2'),
      keras.layers.AveragePooling2D(2),
      keras.layers.Flatten(),
      keras.layers.Dense(120, **dense, name='layer1'),
      keras.layers.Dense(84, **dense, name='layer2'),
      keras.layers.Dense(10, kernel_regularizer=l1, name='layer3'),
    ]
  )


class Trainer:
  """Pictures are read, shuffled and put into batches by `fit`."""

  def __init__(self, task: Task, weights: Weights, is_xla: bool, unroll: int):
    self._task, self._data = task, task.draw()
    self._network = _network(task)
    for name, leaves in weights.items():
      layer = self._network.get_layer(name)
      layer.set_weights([leaves['kernel'], leaves['bias']])
    optimizer = (
      keras.optimizers.Adam(task.rate, epsilon=1e-8)
      if task.optimizer == 'adam'
      else keras.optimizers.SGD(task.rate)
    )
    self._network.compile(
      optimizer,
      keras.losses.SparseCategoricalCrossentropy(from_logits=True),
      jit_compile=is_xla,
      steps_per_execution=unroll,
    )

  def epoch(self) -> float:
    clock = _Clock()
    # The clock stops after the last pruning.
    callbacks = [_Prune(self._task.threshold)] if self._task.prunes else []
    history = self._network.fit(
      *self._data,
      batch_size=self._task.batch,
      callbacks=[*callbacks, clock],
      verbose=0,
    )
    self._loss = history.history['loss'][-1]
    return clock.seconds

  def objectives(self) -> list[float]:
    return [self._loss]

  def weights(self) -> Weights:
    weights: Weights = {}
    for name in CONVOLUTIONS + DENSE:
      kernel, bias = self._network.get_layer(name).get_weights()
      weights[name] = {'kernel': kernel, 'bias': bias}
    return weights


def fit(task: Task) -> Ways:
  """All ways that may be the fastest."""
  # Several steps in one go leave no place for a callback between them.
  unrolls = (1,) if task.prunes else sorted({1, min(task.steps, 10)})
  return {
    f'jit_compile={is_xla}, steps_per_execution={unroll}': functools.partial(
      Trainer, is_xla=is_xla, unroll=unroll
    )
    for is_xla in (False, True)
    for unroll in unrolls
  }
