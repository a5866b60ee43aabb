"""The compiled part: a population of networks, an epoch at a time.

Members differ in the l1 weight and in the seed. Every leaf of their state has
two leading axes, `[S, L]` for S seeds and L weights: members of one seed start
alike and see the same batches. An epoch is one program, `lax.scan` over steps
inside `pmap` over devices, which split each batch.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mopt
from mopt.training.config import Config
from mopt.training.data import Dataset
from mopt.training.data import normalise
from mopt.training.data import Split

PyTree = Any
_AXIS = 'devices'
_EVAL_BATCH = 250


class State(NamedTuple):
  """A population between two epochs."""

  params: PyTree  # Leaves [S, L, ...].
  opt_state: optax.OptState  # Leaves [S, L, ...].


class Metrics(NamedTuple):
  """Means over the steps of an epoch, `[S, L]` each."""

  objective_1: jax.Array  # Cross entropy and the l2 of convolution kernels.
  objective_2: jax.Array  # The l1 norm of dense kernels.
  grad_norm_1: jax.Array
  grad_norm_2: jax.Array
  cosine: jax.Array  # Of the angle between both gradients; 0 if one is 0.
  weight_1: jax.Array
  weight_2: jax.Array
  ce: jax.Array  # Over the examples, as they were seen.
  accuracy: jax.Array


class Evaluation(NamedTuple):
  """Means over the examples of a split, `[S, L]` each; NaN without any."""

  ce: jax.Array | np.ndarray
  accuracy: jax.Array | np.ndarray


def steps_per_epoch(config: Config, num_examples: int) -> int:
  """Number of updates in an epoch; the last batch may be a partial one."""
  if config.batch_size > num_examples:
    raise ValueError(
      f'batch_size={config.batch_size}: expected at most the '
      f'{num_examples} training examples.'
    )
  if config.drop_remainder:
    return num_examples // config.batch_size
  return -(-num_examples // config.batch_size)


def check_fit(config: Config, model: nn.Module, data: Dataset) -> None:
  """Raises unless batches, network and pictures go together, at no cost.

  Raises:
    ValueError: for a batch larger than the data, or pictures that the network
      cannot take.
  """
  steps_per_epoch(config, len(data.train.labels))
  image = jax.ShapeDtypeStruct((1, *data.train.images.shape[1:]), jnp.float32)
  jax.eval_shape(model.init, jax.random.key(0), image)


def learning_rate(config: Config, steps: int) -> optax.Schedule:
  """The learning rate as a function of the number of updates.

  The logistic drop ends at a tenth of the initial rate, as in the authors'
  code, and is held within an epoch of `steps` updates.
  """
  rate = config.initial_rate
  match config.schedule:
    case 'logistic_drop':
      drop = mopt.logistic_drop(rate, 0.1 * rate, config.epochs)
      return mopt.by_epoch(drop, steps)
    case 'inverse_time':
      return mopt.inverse_time_decay(rate, config.decay)
    case _:
      return optax.constant_schedule(rate)


def make_optimizer(
  config: Config, steps: int, l1: jax.Array
) -> optax.GradientTransformationExtraArgs:
  """The chain of one member. `l1` may be traced."""
  rate = learning_rate(config, steps)
  if config.scalarization == 'penalty':
    weights = jnp.stack([jnp.ones_like(l1), l1])  # equation (2)
  else:
    weights = jnp.stack([1 - l1, l1])  # equation (7)
  weighted_sum = mopt.fixed_weights(weights)
  rms = dict(decay=config.rms_decay, eps=config.eps or 1e-7)
  adam = dict(b1=config.b1, b2=config.b2, eps=config.eps or 1e-8)
  sgd = dict(momentum=config.momentum or None, nesterov=config.nesterov)
  match config.optimizer:
    case 'smgd':
      optimizer = mopt.smgd(rate, **sgd)
    case 'mrmsprop':
      optimizer = mopt.mrmsprop(rate, **rms)
    case 'madam':
      optimizer = mopt.madam(rate, **adam)
    # The others sum the gradients first, and so optimise the weighted sum.
    case 'sgd':
      optimizer = mopt.smgd(rate, **sgd, weighting=weighted_sum)
    case 'rmsprop':
      optimizer = optax.chain(
        mopt.aggregate(weighted_sum),
        optax.scale_by_rms(**rms, eps_in_sqrt=False),
        optax.scale_by_learning_rate(rate),
      )
    case _:
      optimizer = optax.chain(
        mopt.aggregate(weighted_sum), optax.adam(rate, **adam)
      )
  if config.prune in ('epoch', 'batch'):
    every = 1 if config.prune == 'batch' else steps
    pruning = mopt.prune_by_magnitude(
      config.threshold, mask=mopt.dense_kernels, every=every
    )
    optimizer = optax.chain(optimizer, pruning)
  return optimizer


def over_members(function: Callable) -> Callable:
  """Maps a function of one member over the axes `[S, L]` of its arguments."""
  return jax.vmap(jax.vmap(function))


def prune_members(config: Config, params: PyTree) -> PyTree:
  """Prunes dense kernels, as all strategies do at the start and the end."""
  if config.prune == 'none':
    return params
  prune = functools.partial(
    mopt.prune, threshold=config.threshold, mask=mopt.dense_kernels
  )
  return jax.jit(over_members(prune))(params)


class Program(NamedTuple):
  """The compiled functions of a run."""

  init: Callable[[], State]
  epoch: Callable[[State, int], tuple[State, Metrics]]
  evaluate: Callable[[PyTree, str], Evaluation]


def make_program(
  config: Config,
  model: nn.Module,
  data: Dataset,
  devices: Sequence[jax.Device] | None = None,
) -> Program:
  """Puts the data on the devices and makes the functions that use it.

  Args:
    config: the settings.
    model: a linen module from images `[batch, h, w, c]` to logits.
    data: the data set.
    devices: what each batch is split over; all local ones by default. The
      batch need not divide by their number.

  Returns:
    A `Program`. `epoch(state, number)` takes epochs from 0 and consumes its
    state; `evaluate(params, split)` takes `'train'`, `'val'` or `'test'`.

  Raises:
    ValueError: for a batch larger than the data, or a model that does not fit
      the pictures.
  """
  devices = list(devices or jax.local_devices())
  steps = steps_per_epoch(config, len(data.train.labels))
  seeds = np.array(config.seed, np.int32)
  # The multiobjective optimizers find their weights: theirs is not read.
  l1 = np.array([v or 0.0 for v in config.l1_values], np.float32)
  # Placed once and where pmap wants it: a state that is not compiles anew.
  mesh = jax.sharding.Mesh(np.array(devices), (_AXIS,))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  place = functools.partial(jax.device_put, device=replicated)
  splits = place({'train': data.train, 'val': data.val, 'test': data.test})
  member_seeds, member_l1 = place((jnp.asarray(seeds), jnp.asarray(l1)))
  device_numbers = jnp.arange(len(devices))
  preprocess = functools.partial(normalise, mean=data.mean, std=data.std)

  def init_member(seed, l1):
    key = jax.random.fold_in(jax.random.key(seed), 0)
    image = jnp.zeros((1, *data.train.images.shape[1:]))
    params = model.init(key, image)['params']
    if config.prune != 'none':
      params = mopt.prune(params, config.threshold, mopt.dense_kernels)
    return State(params, make_optimizer(config, steps, l1).init(params))

  # Run once, it is not worth optimising: compiling takes a fifth of the time.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def init_state():
    over_l1 = jax.vmap(init_member, in_axes=(None, 0))
    return jax.vmap(over_l1, in_axes=(0, None))(member_seeds, member_l1)

  map_devices = functools.partial(
    jax.pmap, axis_name=_AXIS, out_axes=None, devices=devices
  )
  epoch = map_devices(
    functools.partial(_epoch, config, model, preprocess, steps, len(devices)),
    in_axes=(None, None, None, None, None, 0),
    donate_argnums=0,
  )
  evaluate = map_devices(
    functools.partial(_evaluate, model, preprocess, len(devices)),
    in_axes=(None, None, 0),
  )

  def run_epoch(state, number):
    number = place(jnp.int32(number))
    return epoch(
      state, splits['train'], member_seeds, member_l1, number, device_numbers
    )

  def run_evaluate(params, split):
    if not len(splits[split].labels):
      nothing = np.full((len(seeds), len(l1)), np.nan, np.float32)
      return Evaluation(nothing, nothing)
    return evaluate(params, splits[split], device_numbers)

  return Program(
    init=lambda: place(init_state()), epoch=run_epoch, evaluate=run_evaluate
  )


def _epoch(
  config: Config,
  model: nn.Module,
  preprocess: Callable[[jax.Array], jax.Array],
  steps: int,
  num_devices: int,
  state: State,
  train: Split,
  seeds: jax.Array,
  l1: jax.Array,
  number: jax.Array,
  device: jax.Array,
) -> tuple[State, Metrics]:
  """One epoch on one device: its share of every batch."""
  num_examples = len(train.labels)
  share = -(-config.batch_size // num_devices)
  # Examples [steps, batch] as places in a permutation. Batches that are not
  # full, or not divisible, are filled up with examples that count nothing.
  places = np.arange(steps * config.batch_size).reshape(steps, -1)
  places = np.pad(
    places,
    ((0, 0), (0, share * num_devices - config.batch_size)),
    constant_values=num_examples,
  )
  counts = places < num_examples
  places = np.where(counts, places, 0).reshape(steps, num_devices, share)
  counts = counts.reshape(steps, num_devices, share)
  batch_sizes = counts.sum(axis=(1, 2))

  def permutation(seed):
    key = jax.random.fold_in(jax.random.key(seed), number + 1)
    return jax.random.permutation(key, num_examples)

  mine = functools.partial(jnp.take, indices=device, axis=1)
  order = jax.vmap(permutation, out_axes=1)(seeds)  # [examples, S]
  xs = (
    order[mine(places)],  # [steps, share, S]
    mine(counts).astype(jnp.float32),
    jnp.asarray(batch_sizes, jnp.float32),
  )
  member_step = functools.partial(_step, config, model, steps, num_devices)
  over_l1 = jax.vmap(member_step, in_axes=(0, 0, None, None, None))
  over_seeds = jax.vmap(over_l1, in_axes=(0, None, 0, None, None))

  def step(state, x):
    chosen, count, batch_size = x
    batch = Split(
      preprocess(train.images[chosen.T]),  # [S, share, h, w, c]
      train.labels[chosen.T],
    )
    return over_seeds(state, l1, batch, count, batch_size)

  state, metrics = jax.lax.scan(step, state, xs)
  # Per-example metrics are summed over a step, the others are its values.
  examples = batch_sizes.sum()
  means = jax.tree.map(lambda x: x.mean(axis=0), metrics)
  return state, means._replace(
    ce=metrics.ce.sum(axis=0) / examples,
    accuracy=metrics.accuracy.sum(axis=0) / examples,
  )


def _step(
  config: Config,
  model: nn.Module,
  steps: int,
  num_devices: int,
  state: State,
  l1: jax.Array,
  batch: Split,
  count: jax.Array,
  batch_size: jax.Array,
) -> tuple[State, Metrics]:
  """One update of one member, on a device's share of a batch.

  `count` is 1 for examples and 0 for filling, `batch_size` the number of
  examples on all devices.
  """

  def error(params, batch):
    logits: Any = model.apply({'params': params}, batch.images)
    ce, correct = _scores(logits, batch.labels, count)
    # The mean of this over devices is the mean over the whole batch.
    mean = ce * (num_devices / batch_size)
    penalty = config.conv_l2 * mopt.l2_norm_squared(params, mopt.conv_kernels)
    return mean + penalty, (ce, correct)

  complexity = functools.partial(mopt.l1_norm, mask=mopt.dense_kernels)
  grad_fn = mopt.value_and_stacked_grad(
    error, complexity, has_aux=(True, False)
  )
  (values, (scores, _)), grads = grad_fn(state.params, batch)
  # Before the update: the weights are not linear in the gradients.
  values, grads = jax.lax.pmean((values, grads), _AXIS)
  ce, correct = jax.lax.psum(scores, _AXIS)
  optimizer = make_optimizer(config, steps, l1)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  # The compiler merges this Gramian with the optimizer's own.
  gramian = mopt.gramian(grads)
  norms = jnp.sqrt(jnp.diagonal(gramian))
  product = norms[0] * norms[1]
  weights = optax.tree.get(opt_state, 'AggregateState').weights
  return State(params, opt_state), Metrics(
    objective_1=values[0],
    objective_2=values[1],
    grad_norm_1=norms[0],
    grad_norm_2=norms[1],
    cosine=jnp.where(
      product == 0, 0, gramian[0, 1] / jnp.where(product == 0, 1, product)
    ),
    weight_1=weights[0],
    weight_2=weights[1],
    ce=ce,
    accuracy=correct,
  )


def _scores(
  logits: jax.Array, labels: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Cross entropy and hits, summed over the examples that count."""
  ce = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )
  hits = jnp.argmax(logits, axis=-1) == labels
  return jnp.sum(ce * count), jnp.sum(hits * count)


def _evaluate(
  model: nn.Module,
  preprocess: Callable[[jax.Array], jax.Array],
  num_devices: int,
  params: PyTree,
  split: Split,
  device: jax.Array,
) -> Evaluation:
  """Means over a whole split; each device takes every D-th batch of it."""
  num_examples = len(split.labels)
  batches = -(-num_examples // (_EVAL_BATCH * num_devices))
  places = np.arange(batches * num_devices * _EVAL_BATCH)
  places = places.reshape(batches, num_devices, _EVAL_BATCH)
  counts = places < num_examples

  def batch_scores(batch):
    indices, count = batch
    images, labels = preprocess(split.images[indices]), split.labels[indices]

    def member_scores(params):
      logits: Any = model.apply({'params': params}, images)
      return _scores(logits, labels, count)

    return over_members(member_scores)(params)

  mine = functools.partial(jnp.take, indices=device, axis=1)
  indices = mine(np.where(counts, places, 0))
  sums = jax.lax.map(batch_scores, (indices, mine(counts).astype(jnp.float32)))
  ce, correct = jax.lax.psum(jax.tree.map(lambda x: x.sum(axis=0), sums), _AXIS)
  return Evaluation(ce / num_examples, correct / num_examples)
