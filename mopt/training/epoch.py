"""The compiled part: a population of networks, an epoch at a time.

Members differ in the l1 weight and in the seed. Every leaf of their state has
two leading axes, `[S, L]` for S seeds and L weights: members of one seed start
alike and see the same batches. An epoch is one program, `lax.scan` over steps
inside `pmap` over devices, which split each batch, or have a share of the
members each: see `mopt.training.layout`.
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
from mopt.masks import path_name
from mopt.training import calls
from mopt.training import optimizer as optimizer_lib
from mopt.training.augment import augment
from mopt.training.augment import Augmentation
from mopt.training.batches import Batches
from mopt.training.batches import make_batches
from mopt.training.batches import spread
from mopt.training.batches import steps_per_epoch
from mopt.training.batches import stream
from mopt.training.config import Config
from mopt.training.data import check_augmentation
from mopt.training.data import check_data
from mopt.training.data import Dataset
from mopt.training.data import normalise
from mopt.training.data import Scale
from mopt.training.data import Split
from mopt.training.evaluation import Evaluation
from mopt.training.evaluation import make_evaluate
from mopt.training.evaluation import score
from mopt.training.layout import Layout
from mopt.training.layout import make_layout
from mopt.training.layout import over_devices

PyTree = Any
_Array = jax.Array | np.ndarray
_AXIS = 'devices'


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


class Complexity(NamedTuple):
  """Of the dense kernels; leaves `[M]`."""

  nonzeros: mopt.NonzeroCount
  l1_norm: _Array


class Program(NamedTuple):
  """The compiled functions of a run."""

  layout: Layout
  init: Callable[[], State]
  prune: Callable[[State], State]
  epoch: Callable[[State, int], tuple[State, Metrics]]
  evaluate: Callable[[State, str], Evaluation]
  complexity: Callable[[State], Complexity]
  restore: Callable[[PyTree], State]


def check_fit(config: Config, model: nn.Module, data: Dataset) -> None:
  """Raises unless batches, network and data go together, at no cost.

  Raises:
    ValueError: for data that `mopt.training.data.check_data` refuses, a batch
      larger than the data, examples that cannot be moved as asked, a network
      that `mopt.training.calls.check` refuses, or one without a dense layer,
      whose complexity would be 0.
  """
  check_data(data)
  check_augmentation(config, data)
  steps_per_epoch(config, len(data.train.labels))
  params = calls.check(config.model, model, data)
  if not any(jax.tree.leaves(mopt.dense_kernels(params))):
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = ', '.join(path_name(path) for path, _ in paths) or 'none'
    raise ValueError(
      'model: expected a dense layer, a leaf named kernel with two axes, to '
      f'penalise, prune and count the weights of; its leaves are {names}.'
    )


def must_stream(
  config: Config, data: Dataset, devices: Sequence[jax.Device]
) -> bool:
  """Whether pictures stay on the host: as told, or if they would not fit."""
  if config.stream is not None:
    return config.stream
  stats = devices[0].memory_stats() or {}  # CPUs have none.
  splits = (data.train, data.val, data.test)
  # Half is left to networks, optimizers and activations.
  limit = stats.get('bytes_limit', np.inf) / 2
  return sum(split.images.nbytes for split in splits) > limit


def make_program(
  config: Config,
  model: nn.Module,
  data: Dataset,
  devices: Sequence[jax.Device] | None = None,
) -> Program:
  """Puts the data on the devices and makes the functions that use it.

  Args:
    config: the settings.
    model: a linen module from images `[batch, h, w, c]` to logits, called with
      `train=` if it takes that. If it has a field `axis_name`, as
      `models.vgg.VGG` has, that is set to the axis of the devices.
    data: the data set.
    devices: what members are spread over or each batch is split over; those
      of all processes by default. Neither need divide by their number.

  Returns:
    A `Program`. `init()` gives networks before any pruning, and `prune(state)`
    does what comes before training and after it. `epoch(state, number)` takes
    epochs from 0 and consumes its state; `evaluate(state, split)` takes
    `'train'`, `'val'` or `'test'`, and `complexity(state)` counts. Metrics,
    scores and counts are `[M]` in NumPy, whatever the layout;
    `restore(tree)` is the inverse of `layout.collect(state)`.

  Raises:
    ValueError: for a batch larger than the data, or a model that does not fit
      the pictures.
  """
  layout = make_layout(config, list(devices or jax.devices()))
  devices = layout.devices
  steps = steps_per_epoch(config, len(data.train.labels))
  # Over what gradients are averaged.
  axis = None if layout.is_spread else _AXIS
  model = calls.over_axis(model, axis)
  # Placed once and where pmap wants it: a state that is not compiles anew.
  mine = [devices[i] for i in layout.local]
  mesh = jax.sharding.Mesh(np.array(mine), (_AXIS,))
  to = lambda *axes: functools.partial(
    jax.device_put,
    device=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)),
  )
  place = to(_AXIS) if layout.is_spread else to()
  streamed = must_stream(config, data, mine)
  splits = {'train': data.train, 'val': data.val, 'test': data.test}
  if not streamed:
    splits = to()(splits)
  all_seeds = jnp.array(config.seed, jnp.int32)
  # The multiobjective optimizers find their weights: theirs is not read.
  l1_values = np.array([v or 0.0 for v in config.l1_values], np.float32)
  l1 = place(layout.weights(l1_values))

  def init_member(seed, l1):
    key = jax.random.fold_in(jax.random.key(seed), 0)
    image = jnp.zeros((1, *data.train.images.shape[1:]), jnp.float32)
    variables = dict(calls.init(model, key, image))
    params = variables.pop('params')
    optimizer = optimizer_lib.make_optimizer(config, steps, l1)
    opt_state = optimizer.init(params)
    never = Failure(*jnp.zeros((3, 1), jnp.int32)[:, 0])
    return State(params, variables, opt_state, never)

  # Run once, it is not worth optimising: compiling takes a fifth of the time.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def init():
    over_l1 = jax.vmap(init_member, in_axes=(None, 0))
    over_seeds = jax.vmap(over_l1, in_axes=(0, None))
    over_all = jax.vmap(over_seeds) if layout.is_spread else over_seeds
    return over_all(layout.seeds(np.array(config.seed, np.int32)), l1)

  prune = jax.jit(
    layout.over_members(functools.partial(optimizer_lib.prune, config))
  )

  @jax.jit
  @layout.over_members
  def complexity(params):
    mask = mopt.dense_kernels(params)
    nonzeros = mopt.count_nonzero(params, mask)
    return Complexity(nonzeros, mopt.l1_norm(params, mask))

  @jax.jit
  def draw(number):
    """The orders of the examples `[S, examples]`, and keys `[S]` for noise."""

    def draw_member(seed):
      key = jax.random.fold_in(jax.random.key(seed), number + 1)
      order_key, noise_key = jax.random.split(key)
      order = jax.random.permutation(order_key, len(data.train.labels))
      return order, noise_key

    return jax.vmap(draw_member)(all_seeds)

  own = 0 if layout.is_spread else None
  train = over_devices(
    functools.partial(_train, config, model, data.mean, data.std, steps, axis),
    layout,
    _AXIS,
    # A part of an epoch that is sent has its share for each device.
    in_axes=(own, own, own, None, 0 if streamed else None, 0),
    out_axes=own,
    donate_argnums=(0,),
  )

  def epoch(state, number):
    orders, noise = draw(number)
    if layout.is_spread:
      batches = make_batches(config, np.asarray(orders), 1)
      batches = spread(batches, layout)
    else:
      batches = make_batches(config, np.asarray(orders), len(devices))
      batches = jax.tree.map(lambda x: x[layout.local], batches)
    noise = place(layout.seeds(noise))
    whole = [(splits['train'], batches)]
    parts = stream(data.train, batches) if streamed else whole
    metrics: list[Metrics] = []
    for split, part in parts:
      # The host is one part ahead of the devices, and no more.
      jax.block_until_ready(metrics[-1:])
      state, part_metrics = train(
        state, l1, noise, np.int32(number), split, part
      )
      metrics.append(part_metrics)
    return state, _over_epoch(metrics, np.asarray(batches.size[0]), layout)

  evaluate = make_evaluate(model, data, splits, layout, streamed)
  return Program(
    layout=layout,
    init=lambda: place(init()),
    prune=lambda s: place(s._replace(params=prune(s.params))),
    epoch=epoch,
    evaluate=lambda state, split: evaluate(state.variables, split),
    complexity=lambda state: layout.collect(complexity(state.params)),
    restore=lambda tree: place(layout.scatter(tree)),
  )


def _train(
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


def _over_epoch(
  parts: Sequence[Metrics], sizes: np.ndarray, layout: Layout
) -> Metrics:
  """From the metrics of parts of an epoch to its own, `[M]`.

  Those of parts are `[steps, S, L]`, or `[D, steps, s, l]` of spread members.
  """
  metrics = jax.tree.map(
    lambda *x: np.concatenate(x, axis=-3), *jax.device_get(list(parts))
  )
  if layout.is_spread:
    steps_last = jax.tree.map(lambda x: np.moveaxis(x, 1, -1), metrics)
    metrics = jax.tree.map(
      lambda x: np.moveaxis(x, -1, 0), layout.collect_grid(steps_last)
    )
  means = jax.tree.map(lambda x: x.mean(axis=0, dtype=np.float64), metrics)
  # Scores are summed over a step, the others are its values.
  examples = sizes.sum()
  of_grid = means._replace(
    weight_2_min=metrics.weight_2_min.min(axis=0),
    weight_2_max=metrics.weight_2_max.max(axis=0),
    ce=metrics.ce.sum(axis=0) / examples,
    accuracy=metrics.accuracy.sum(axis=0) / examples,
  )
  return jax.tree.map(np.ravel, of_grid)
