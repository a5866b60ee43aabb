"""What a run is made from: it goes from train.py to the step as one."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from types import MappingProxyType
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from rich.console import Console

from mopt.training.config import Config
from mopt.training.data import Dataset


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
  """

  config: Config
  # From images [batch, h, w, c] to logits, called with `train=` if it takes
  # that. If it has a field `axis_name`, as `models.vgg.VGG` has, that is set to
  # the axis of the devices.
  model: nn.Module
  data: Dataset
  workdir: pathlib.Path = pathlib.Path()  # An existing folder.
  # What members are spread over, or each batch is split over; neither need
  # divide by their number. None: those of all processes.
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
