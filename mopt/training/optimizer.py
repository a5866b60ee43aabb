"""The settings of a run as an Optax chain, and as a pruning strategy."""

from typing import Any

import jax
import optax

import mopt
from mopt.training.config import Config
from mopt.training.objectives import prunable
from mopt.training.weighting import make_weighting

PyTree = Any


def learning_rate(config: Config, steps: int) -> optax.Schedule:
  """The learning rate as a function of the number of updates.

  The logistic drop is held within an epoch of `steps` updates.
  """
  rate = config.initial_rate
  match config.schedule:
    case 'logistic_drop':
      drop = mopt.logistic_drop(rate, config.final_rate, config.epochs)
      return mopt.by_epoch(drop, steps)
    case 'inverse_time':
      return mopt.inverse_time_decay(rate, config.decay)
    case _:
      return optax.constant_schedule(rate)


def make_optimizer(
  config: Config, steps: int, weights: jax.Array, key: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
  """The chain of one member.

  Args:
    config: the settings.
    steps: updates in an epoch.
    weights: `[m]`, of a weighted sum; may be traced.
    key: from which its state starts where weights are random; may be traced.
      Only a new state needs it.
  """
  rate = learning_rate(config, steps)
  key = jax.random.key(0) if key is None else key
  many: dict[str, Any] = dict(
    num_objectives=len(config.objectives),
    weighting=make_weighting(config, weights, key),
  )
  aggregate = mopt.aggregate(**many)
  rms = dict(decay=config.rms_decay, eps=config.eps or 1e-7)
  adam = dict(b1=config.b1, b2=config.b2, eps=config.eps or 1e-8)
  sgd = dict(momentum=config.momentum or None, nesterov=config.nesterov)
  match config.optimizer:
    case 'sgd' | 'smgd':
      optimizer = mopt.smgd(rate, **sgd, **many)
    case 'mrmsprop':
      optimizer = mopt.mrmsprop(rate, **rms, **many)
    case 'madam':
      optimizer = mopt.madam(rate, **adam, **many)
    # The others sum the gradients first, which SMGD does, too.
    case 'rmsprop':
      optimizer = optax.chain(
        aggregate,
        optax.scale_by_rms(**rms, eps_in_sqrt=False),
        optax.scale_by_learning_rate(rate),
      )
    case _:
      optimizer = optax.chain(aggregate, optax.adam(rate, **adam))
  if config.prune in ('epoch', 'batch'):
    every = 1 if config.prune == 'batch' else steps
    pruning = mopt.prune_by_magnitude(
      config.threshold, mask=prunable(config), every=every
    )
    optimizer = optax.chain(optimizer, pruning)
  return optimizer


def prune(config: Config, params: PyTree) -> PyTree:
  """Prunes a member, unless it is never to be done.

  All strategies but none do so at the start and at the end.
  """
  if config.prune == 'none':
    return params
  return mopt.prune(params, config.threshold, prunable(config))
