"""What a run is made from: it goes from train.py to the step as one."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import linen as nn
from flax.nnx.bridge import ToLinen
import jax
from rich.console import Console

from mopt.training.config import Config
from mopt.training.data import Dataset
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss


class Job(NamedTuple):
  """Networks to be trained, on what, and where that happens.

  Examples:
    >>> import models
    >>> from mopt import training
    >>> job = training.Job(
    ...     training.Config(epochs=1),
    ...     models.create('lenet5'),
    ...     training.load_dataset('mnist5k'),
    ... )
    >>> job.console.quiet
    False

    With a function that gets the records of each epoch, of 0.9 and 0.95 here:

    >>> def show(records):
    ...   print(max(record['accuracy_val'] for record in records))
    >>> job = job._replace(on_epoch=show)
    >>> job.on_epoch([{'accuracy_val': 0.9}, {'accuracy_val': 0.95}])
    0.95

    Weights & Biases, with `run = wandb.init()`, and MLflow:

    >>> to_wandb = lambda records: run.log(
    ...     {f'member_{i}': record for i, record in enumerate(records)})
    >>> to_mlflow = lambda records: mlflow.log_metrics(
    ...     {f'member_{i}/{k}': v for i, record in enumerate(records)
    ...      for k, v in record.items()}, step=records[0]['epoch'])
  """

  config: Config
  # From images [batch, h, w, c] to logits, or what else the loss is of, called
  # with `train=` if it takes that. If it has a field `axis_name`, as
  # `models.vgg.VGG` has, that is set to the axis of the devices.
  model: nn.Module
  data: Dataset
  workdir: pathlib.Path = pathlib.Path()  # An existing folder.
  # What members are spread over, or each batch is split over; neither need
  # divide by their number. The same in all processes, with some of each. None:
  # all there are.
  devices: Sequence[jax.Device] | None = None
  # Where progress and tables go. Names of files may hold what rich takes for
  # markup.
  console: Console = Console(markup=False)
  should_stop: Callable[[], bool] = lambda: False  # Asked after each epoch.
  # Objectives of your own by name, which `config.objectives` lists: functions
  # of `(params)`, or of `(params, batch)`, whose values are averaged over the
  # devices that share a batch. The batch has `images`, as the network gets
  # them, and `labels`; one that is not full is filled up with other examples,
  # which the error leaves out and these do not.
  objectives: Mapping[str, Callable[..., Any]] = MappingProxyType({})
  loss: Loss = cross_entropy
  # Called after each epoch, by the first process alone, with what metrics.jsonl
  # has just got: a dictionary of numbers for each member, some of them NaN,
  # where that has null. A search calls it for each of its trainings, one after
  # the other; the epochs of each begin with 1. What it raises ends the run;
  # what is written stays, and the run can go on. Epochs after the last
  # checkpoint, such as that one, are then trained, and come here, once more.
  on_epoch: Callable[[list[dict[str, Any]]], object] = lambda records: None

  @property
  def model_name(self) -> str:
    """What files call the network: the setting, if that names this one.

    A network of yours that the setting does not name has the name of its class,
    `package.module:Class`, which `models.create` takes.
    """
    kind = type(self.model)
    if isinstance(self.model, ToLinen):
      kind = self.model.nnx_class
    is_ours = kind.__module__.partition('.')[0] == 'models'
    if is_ours or ':' in self.config.model:
      return self.config.model
    return f'{kind.__module__}:{kind.__qualname__}'
