"""Updates of members on one device: consecutive steps, and one of them.

Members differ in the l1 weight and in the seed. Every leaf of their state has
two leading axes, `[S, L]` for S seeds and L weights: members of one seed start
alike and see the same batches.
"""

import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mopt
from mopt.training import calls
from mopt.training import optimizer as optimizer_lib
from mopt.training.augment import augment
from mopt.training.augment import Augmentation
from mopt.training.batches import Batches
from mopt.training.config import Config
from mopt.training.data import Split
from mopt.training.evaluation import score
from mopt.training.scaling import normalise
from mopt.training.scaling import Scale

PyTree = Any
_Array = jax.Array | np.ndarray


class Failure(NamedTuple):
  """Where a member met a value or a gradient that is not finite."""

  objective: _Array  # 0: nowhere yet, 1: the error, 2: the complexity.
  epoch: _Array  # From 0.
  step: _Array  # In its epoch, from 0.


class State(NamedTuple):
  """A population between two epochs; `Layout` says what its axes are."""

  params: PyTree  # Leaves [S, L, ...] or [D, s, l, ...].
  model_state: PyTree  # Other variables, such as {'batch_stats': ...}; ditto.
  opt_state: optax.OptState  # Ditto.
  failure: Failure  # Ditto. A member that has failed stays as it was.

  @property
  def variables(self) -> PyTree:
    """What `model.apply` takes."""
    return {'params': self.params, **self.model_state}


class Metrics(NamedTuple):
  """Means over the steps of an epoch, `[M]` each."""

  objective_1: _Array  # Cross entropy and the l2 of convolution kernels.
  objective_2: _Array  # The l1 norm of dense kernels.
  grad_norm_1: _Array
  grad_norm_2: _Array
  cosine: _Array  # Of the angle between both gradients; 0 if one is 0.
  weight_1: _Array
  weight_2: _Array
  weight_2_min: _Array  # Over the steps.
  weight_2_max: _Array
  ce: _Array  # Over the examples, as they were seen.
  accuracy: _Array


def train_steps(
  config: Config,
  model: nn.Module,
  mean: Scale,
  std: Scale,
  steps: int,
  axis: str | None,
  state: State,
  l1: jax.Array,
  noise: jax.Array,
  epoch: jax.Array,
  split: Split,
  batches: Batches,
) -> tuple[State, Metrics]:
  """Consecutive steps on one device; metrics are `[steps, S, L]`.

  `noise` are keys `[S]` for what is random within an epoch: augmentation and
  dropout. Members of one seed share it. `axis` is that of the devices which
  split each batch, `None` if this one has the whole batch.
  """
  augmentation = Augmentation(*config.augmentation)
  device = 0 if axis is None else jax.lax.axis_index(axis)
  over_l1 = jax.vmap(
    functools.partial(_step, config, model, steps, axis),
    in_axes=(0, 0, None, None, None, None, None),
  )
  over_seeds = jax.vmap(over_l1, in_axes=(0, None, 0, 0, None, None, None))

  def step(state, batch):
    def draw(key):
      key = jax.random.fold_in(jax.random.fold_in(key, batch.step), device)
      return jax.random.split(key)

    keys = jax.vmap(draw)(noise)
    images = split.images[batch.chosen]  # [S, share, h, w, c]
    move = functools.partial(augment, augmentation=augmentation)
    images = normalise(jax.vmap(move)(keys[:, 0], images), mean, std)
    examples = Split(images, split.labels[batch.chosen])
    at = epoch, batch.step
    return over_seeds(
      state, l1, examples, keys[:, 1], batch.count, batch.size, at
    )

  return jax.lax.scan(step, state, batches)


def _step(
  config: Config,
  model: nn.Module,
  steps: int,
  axis: str | None,
  state: State,
  l1: jax.Array,
  batch: Split,
  key: jax.Array,
  count: jax.Array,
  batch_size: jax.Array,
  at: tuple[jax.Array, jax.Array],
) -> tuple[State, Metrics]:
  """One update of one member, on a device's share of a batch.

  `count` is 1 for examples and 0 for filling, `batch_size` the number of
  examples on all devices, `at` the epoch and the step.
  """
  num_devices = 1 if axis is None else jax.lax.axis_size(axis)

  def conv_penalty(params):
    # A tree, for a function that selects nothing would be an error: a network
    # without convolutions has nothing to penalise.
    mask = mopt.conv_kernels(params)
    return config.conv_l2 * mopt.l2_norm_squared(params, mask)

  def error(params, batch):
    variables = state._replace(params=params).variables
    logits, model_state = calls.train(model, key, batch.images, variables)
    ce, correct = score(logits, batch.labels, count)
    # The mean of this over devices is the mean over the whole batch.
    mean = ce * (num_devices / batch_size)
    return mean + conv_penalty(params), (model_state, ce, correct)

  def complexity(params):
    norm = mopt.l1_norm(params, mopt.dense_kernels(params))
    return norm + conv_penalty(params) if config.conv_l2_in_both else norm

  grad_fn = mopt.value_and_stacked_grad(
    error, complexity, has_aux=(True, False)
  )
  (values, (aux, _)), grads = grad_fn(state.params, batch)
  model_state, *sums = aux
  if axis is not None:
    # Before the update: the weights are not linear in the gradients.
    values, grads, model_state = jax.lax.pmean(
      (values, grads, model_state), axis
    )
    sums = jax.lax.psum(sums, axis)
  ce, correct = sums
  optimizer = optimizer_lib.make_optimizer(config, steps, l1)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # The compiler merges this Gramian with the optimizer's own.
  gramian = mopt.gramian(grads)
  norms = jnp.sqrt(jnp.diagonal(gramian))
  product = norms[0] * norms[1]
  weights = optax.tree.get(opt_state, 'AggregateState').weights
  failure = _failure(state.failure, values, norms, at)
  new = State(params, model_state, opt_state, failure)
  is_fine = failure.objective == 0
  kept = jax.tree.map(lambda n, o: jnp.where(is_fine, n, o), new, state)
  return kept._replace(failure=failure), Metrics(
    objective_1=values[0],
    objective_2=values[1],
    grad_norm_1=norms[0],
    grad_norm_2=norms[1],
    cosine=jnp.where(
      product == 0, 0, gramian[0, 1] / jnp.where(product == 0, 1, product)
    ),
    weight_1=weights[0],
    weight_2=weights[1],
    weight_2_min=weights[1],
    weight_2_max=weights[1],
    ce=ce,
    accuracy=correct,
  )


def _failure(
  before: Failure,
  values: jax.Array,
  norms: jax.Array,
  at: tuple[jax.Array, jax.Array],
) -> Failure:
  """The first failure of a member: that of now, unless there was one."""
  good = jnp.isfinite(values) & jnp.isfinite(norms)  # [2]
  now = jnp.where(good[0], jnp.where(good[1], 0, 2), 1).astype(jnp.int32)
  new = Failure(now, *at)
  keep = (before.objective != 0) | (now == 0)
  return jax.tree.map(lambda n, o: jnp.where(keep, o, n), new, before)
