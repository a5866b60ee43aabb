"""Updates of members on one device: consecutive steps, and one of them.

Members differ in the weights of the objectives and in the seed. Every leaf of
their state has two leading axes, `[s, l]` for s seeds and l lists of weights:
members of one seed start alike and see the same batches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mopt
from mopt.stacked import takes_batch
from mopt.training import calls
from mopt.training import optimizer as optimizer_lib
from mopt.training.augment import augment
from mopt.training.augment import Augmentation
from mopt.training.batches import Batches
from mopt.training.data import Split
from mopt.training.evaluation import score
from mopt.training.job import Job
from mopt.training.objectives import conv_l2
from mopt.training.objectives import make_objectives
from mopt.training.scaling import normalise

PyTree = Any
_Array = jax.Array | np.ndarray


class Failure(NamedTuple):
  """Where a member met a value or a gradient that is not finite."""

  objective: _Array  # 0: nowhere yet, else its number, from 1.
  epoch: _Array  # From 0.
  step: _Array  # In its epoch, from 0.


class State(NamedTuple):
  """A population between two epochs; `Layout` says what its axes are."""

  params: PyTree  # Leaves [D, s, l, ...].
  model_state: PyTree  # Other variables, such as {'batch_stats': ...}; ditto.
  opt_state: optax.OptState  # Ditto.
  failure: Failure  # Ditto. A member that has failed stays as it was.

  @property
  def variables(self) -> PyTree:
    """What `model.apply` takes."""
    return {'params': self.params, **self.model_state}


class Metrics(NamedTuple):
  """Means over the steps of an epoch, of m objectives in their order.

  Of steps there is a tuple in place of each axis m: where the program stacks
  them, the compiler rounds some of them otherwise.
  """

  values: PyTree  # [M, m]
  grad_norms: PyTree  # [M, m]
  # [M, m (m - 1) / 2], of the angles between two gradients; 0 if one is 0. The
  # pairs are in the order of `itertools.combinations`.
  cosines: PyTree
  weights: PyTree  # [M, m]
  weights_min: PyTree  # [M, m], over the steps.
  weights_max: PyTree  # [M, m]
  loss: _Array  # [M], over the examples, as they were seen.
  score: _Array  # [M], ditto.


def train_steps(
  job: Job,
  steps: int,
  axis: str | None,
  state: State,
  weights: jax.Array,
  noise: jax.Array,
  epoch: jax.Array,
  split: Split,
  batches: Batches,
) -> tuple[State, Metrics]:
  """Consecutive steps on one device; metrics are `[steps, s, l]`.

  `noise` are keys `[s]` for what is random within an epoch: augmentation and
  dropout. Members of one seed share it. `axis` is that of the devices which
  split each batch, `None` if this one has the whole batch.
  """
  mean, std = job.data.mean, job.data.std
  augmentation = Augmentation(*job.config.augmentation)
  device = 0 if axis is None else jax.lax.axis_index(axis)
  over_weights = jax.vmap(
    functools.partial(_step, job, steps, axis),
    in_axes=(0, 0, None, None, None, None, None),
  )
  over_seeds = jax.vmap(over_weights, in_axes=(0, None, 0, 0, None, None, None))

  def step(state, batch):
    def draw(key):
      key = jax.random.fold_in(jax.random.fold_in(key, batch.step), device)
      return jax.random.split(key)

    keys = jax.vmap(draw)(noise)
    images = split.images[batch.chosen]  # [s, share, h, w, c]
    move = functools.partial(augment, augmentation=augmentation)
    images = normalise(jax.vmap(move)(keys[:, 0], images), mean, std)
    examples = Split(images, split.labels[batch.chosen])
    at = epoch, batch.step
    return over_seeds(
      state, weights, examples, keys[:, 1], batch.count, batch.size, at
    )

  return jax.lax.scan(step, state, batches)


def _step(
  job: Job,
  steps: int,
  axis: str | None,
  state: State,
  weights: jax.Array,
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
  config = job.config
  num_devices = 1 if axis is None else jax.lax.axis_size(axis)
  objectives = make_objectives(config, job.objectives)

  def conv_penalty(params):
    # A tree, for a function that selects nothing would be an error: a network
    # without convolutions has nothing to penalise.
    mask = mopt.conv_kernels(params)
    return conv_l2(config, params) * mopt.l2_norm_squared(params, mask)

  def error(params, batch):
    variables = state._replace(params=params).variables
    outputs, model_state = calls.train(job.model, key, batch.images, variables)
    loss, scores = score(job.loss, outputs, batch.labels, count)
    # The mean of this over devices is the mean over the whole batch.
    mean = loss * (num_devices / batch_size)
    return mean + conv_penalty(params), (model_state, loss, scores)

  others = objectives.others
  if config.conv_l2_in_both:
    (second,) = others
    args = (batch,) if takes_batch(second) else ()
    others = (lambda params: second(params, *args) + conv_penalty(params),)
  grad_fn = mopt.value_and_stacked_grad(
    error, *others, has_aux=[True] + [False] * len(others)
  )
  (values, (aux, *_)), grads = grad_fn(state.params, batch)
  model_state, *sums = aux
  if axis is not None:
    # Before the update: the weights are not linear in the gradients.
    values, grads, model_state = jax.lax.pmean(
      (values, grads, model_state), axis
    )
    sums = jax.lax.psum(sums, axis)
  loss, scores = sums
  optimizer = optimizer_lib.make_optimizer(config, steps, weights)
  updates, opt_state = optimizer.update(
    grads, state.opt_state, state.params, values=values
  )
  params = optax.apply_updates(state.params, updates)
  # The compiler merges this Gramian with the optimizer's own.
  gramian = mopt.gramian(grads)
  norms = jnp.sqrt(jnp.diagonal(gramian))
  first, second = np.triu_indices(len(norms), 1)
  products = norms[first] * norms[second]
  cosines = jnp.where(
    products == 0,
    0,
    gramian[first, second] / jnp.where(products == 0, 1, products),
  )
  used = optax.tree.get(opt_state, 'AggregateState').weights
  failure = _failure(state.failure, values, norms, at)
  new = State(params, model_state, opt_state, failure)
  is_fine = failure.objective == 0
  kept = jax.tree.map(lambda n, o: jnp.where(is_fine, n, o), new, state)
  return kept._replace(failure=failure), Metrics(
    values=tuple(values),
    grad_norms=tuple(norms),
    cosines=tuple(cosines),
    weights=tuple(used),
    weights_min=tuple(used),
    weights_max=tuple(used),
    loss=loss,
    score=scores,
  )


def _failure(
  before: Failure,
  values: jax.Array,
  norms: jax.Array,
  at: tuple[jax.Array, jax.Array],
) -> Failure:
  """The first failure of a member: that of now, unless there was one."""
  bad = ~(jnp.isfinite(values) & jnp.isfinite(norms))  # [m]
  now = jnp.where(bad.any(), jnp.argmax(bad) + 1, 0).astype(jnp.int32)
  new = Failure(now, *at)
  keep = (before.objective != 0) | (now == 0)
  return jax.tree.map(lambda n, o: jnp.where(keep, o, n), new, before)
