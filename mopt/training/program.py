"""The compiled part: a population of networks, an epoch at a time.

An epoch is one program, `lax.scan` over steps inside `pmap` over devices, which
split each batch, or have a share of the members each: see
`mopt.training.layout`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mopt
from mopt.training import calls
from mopt.training import initial
from mopt.training import optimizer as optimizer_lib
from mopt.training import processes
from mopt.training import tensorboard
from mopt.training.batches import make_batches
from mopt.training.batches import steps_per_epoch
from mopt.training.batches import stream
from mopt.training.config import Config
from mopt.training.data import check_augmentation
from mopt.training.data import check_data
from mopt.training.data import Dataset
from mopt.training.data import Split
from mopt.training.evaluation import Evaluation
from mopt.training.evaluation import make_evaluate
from mopt.training.job import Job
from mopt.training.layout import Layout
from mopt.training.layout import make_layout
from mopt.training.layout import over_devices
from mopt.training.loss import check_names
from mopt.training.loss import cross_entropy
from mopt.training.loss import Loss
from mopt.training.objectives import check_objectives
from mopt.training.objectives import check_prunable
from mopt.training.objectives import leaf_columns
from mopt.training.objectives import make_objectives
from mopt.training.objectives import prunable
from mopt.training.step import Failure
from mopt.training.step import Metrics
from mopt.training.step import State
from mopt.training.step import train_steps
from mopt.training.weighting import check_weighting

PyTree = Any
_Array = jax.Array | np.ndarray
_AXIS = 'devices'


class Complexity(NamedTuple):
  """What networks come to; leaves `[M]`."""

  nonzeros: mopt.NonzeroCount  # Of what may be pruned.
  values: Mapping[str, _Array]  # Of objectives of the parameters, by name.
  params: _Array  # Entries of every leaf.
  nonzeros_all: _Array  # Those of them that are not 0.


class Program(NamedTuple):
  """The compiled functions of a run."""

  layout: Layout
  init: Callable[[], State]
  prune: Callable[[State], State]
  epoch: Callable[[State, int], tuple[State, Metrics]]
  evaluate: Callable[[State, str], Evaluation]
  complexity: Callable[[State], Complexity]
  restore: Callable[[PyTree], State]


def check_fit(
  config: Config, model: nn.Module, data: Dataset, loss: Loss = cross_entropy
) -> None:
  """`check_job` of settings, a network, data and a loss by themselves."""
  check_job(Job(config, model, data, loss=loss))


def check_job(job: Job) -> None:
  """Raises unless all that a run is made from goes together, at no cost.

  Raises:
    ValueError: for names of a loss that columns cannot have, data that
      `mopt.training.data.check_data` refuses, a batch larger than the data,
      examples that cannot be moved as asked, a network that
      `mopt.training.calls.check` refuses, one in which nothing is to be pruned,
      objectives that are unknown, give no number or do not suit a search, a
      weighting that is unknown or does not suit the number of objectives, a
      column of the front that results.csv does not have, a file `config.init`
      that does not hold the network's variables, or `config.tensorboard`
      without what it needs.
  """
  config, model, data = job.config, job.model, job.data
  if config.tensorboard:
    tensorboard.check_installed()
  check_names(job.loss)
  check_data(data, job.loss.classes)
  check_augmentation(config, data)
  steps_per_epoch(config, len(data.train.labels))
  variables = calls.check(job.model_name, model, data, job.loss)
  params = variables['params']
  check_prunable(config, params)
  objectives = make_objectives(config, job.objectives)
  shapes: Any = jax.ShapeDtypeStruct
  images, labels = data.train
  batch = Split(
    shapes((config.batch_size, *images.shape[1:]), jnp.float32),
    shapes((config.batch_size, *labels.shape[1:]), labels.dtype),
  )
  check_objectives(objectives, params, batch)
  check_weighting(config)
  # Whose slopes it takes from rows of results.csv.
  if 'dichotomic' in config.search and not objectives.of_params:
    raise ValueError(
      f'search={config.search}: expected an objective of the parameters alone, '
      f'got {config.objectives[1]}, which takes a batch.'
    )
  columns = [*objectives.of_params, f'{job.loss.name}_train', 'nonzeros_all']
  columns += leaf_columns(config, params)
  if config.front_column not in (None, *columns):
    raise ValueError(
      f'front_column={config.front_column}: expected one of '
      f'{", ".join(columns)}.'
    )
  if config.init is not None:
    initial.read(config.init, variables, job.model_name)


def must_stream(
  config: Config, data: Dataset, devices: Sequence[jax.Device]
) -> bool:
  """Whether examples stay on the host: as told, or if they would not fit."""
  if config.stream is not None:
    return config.stream
  stats = devices[0].memory_stats() or {}  # CPUs have none.
  splits = (data.train, data.val, data.test)
  # Half is left to networks, optimizers and activations.
  limit = stats.get('bytes_limit', np.inf) / 2
  return sum(x.nbytes for split in splits for x in split) > limit


def make_program(job: Job) -> Program:
  """Puts the data on the devices and makes the functions that use it.

  Args:
    job: what is trained; nothing is written.

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
  config, data = job.config, job.data
  layout = make_layout(config, list(job.devices or jax.devices()))
  devices = layout.devices
  steps = steps_per_epoch(config, len(data.train.labels))
  # Over what gradients are averaged.
  axis = _AXIS if layout.shares_batches else None
  job = job._replace(model=calls.over_axis(job.model, axis))
  # Placed once and where pmap wants it: a state that is not compiles anew.
  mine = [devices[i] for i in layout.local]
  mesh = jax.sharding.Mesh(np.array(mine), (_AXIS,))
  to = lambda *axes: functools.partial(
    jax.device_put,
    device=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)),
  )
  place = to(_AXIS)
  streamed = processes.any_of(must_stream(config, data, mine))
  splits = {'train': data.train, 'val': data.val, 'test': data.test}
  if not streamed:
    splits = to()(splits)
  all_seeds = jnp.array(config.seed, jnp.int32)
  objectives = make_objectives(config, job.objectives)
  # Weights that are found at every step are not read.
  unread = (0.0,) * len(objectives.names)
  all_weights = np.array([w or unread for w in config.all_weights], np.float32)
  weights = place(layout.weights(all_weights))

  def draw_variables(key):
    image = jnp.zeros((1, *data.train.images.shape[1:]), jnp.float32)
    return dict(calls.init(job.model, key, image))

  def init_member(start, seed, weights):
    key = jax.random.key(seed)
    variables = draw_variables(jax.random.fold_in(key, 0)) | start
    params = variables.pop('params')
    # Epochs count up from 1.
    last = jax.random.fold_in(key, np.iinfo(np.uint32).max)
    optimizer = optimizer_lib.make_optimizer(config, steps, weights, last)
    opt_state = optimizer.init(params)
    never = Failure(*jnp.zeros((3, 1), jnp.int32)[:, 0])
    return State(params, variables, opt_state, never)

  # Run once, it is not worth optimising: compiling takes a fifth of the time.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def init(start):
    member = functools.partial(init_member, start)
    over_weights = jax.vmap(member, in_axes=(None, 0))
    over_seeds = jax.vmap(over_weights, in_axes=(0, None))
    seeds = layout.seeds(np.array(config.seed, np.int32))
    return jax.vmap(over_seeds)(seeds, weights)

  # Read anew: it would stay in memory beside the population.
  def read_start():
    if config.init is None:
      return {}
    shapes = jax.eval_shape(draw_variables, jax.random.key(0))
    return initial.read(config.init, shapes, job.model_name)

  prune = jax.jit(
    layout.over_members(functools.partial(optimizer_lib.prune, config))
  )

  @jax.jit
  @layout.over_members
  def complexity(params):
    nonzeros = mopt.count_nonzero(params, prunable(config))
    values = {name: f(params) for name, f in objectives.of_params.items()}
    every = mopt.count_nonzero(params)
    return Complexity(nonzeros, values, jnp.int32(every.size), every.total)

  @jax.jit
  def draw(number):
    """The orders of the examples `[S, examples]`, and keys `[S]` for noise."""

    def draw_member(seed):
      key = jax.random.fold_in(jax.random.key(seed), number + 1)
      order_key, noise_key = jax.random.split(key)
      order = jax.random.permutation(order_key, len(data.train.labels))
      return order, noise_key

    return jax.vmap(draw_member)(all_seeds)

  train = over_devices(
    functools.partial(train_steps, job, steps, axis),
    layout,
    _AXIS,
    # A part of an epoch that is sent has its share for each device.
    in_axes=(0, 0, 0, None, 0 if streamed else None, 0),
    donate_argnums=(0,),
  )

  def epoch(state, number):
    orders, noise = draw(number)
    batches = make_batches(config, np.asarray(orders), layout)
    noise = place(layout.seeds(noise))
    whole = [(splits['train'], batches)]
    parts = stream(data.train, batches) if streamed else whole
    metrics: list[Metrics] = []
    for split, part in parts:
      # The host is one part ahead of the devices, and no more.
      jax.block_until_ready(metrics[-1:])
      state, part_metrics = train(
        state, weights, noise, np.int32(number), split, part
      )
      metrics.append(part_metrics)
    return state, _over_epoch(metrics, np.asarray(batches.size[0]), layout)

  evaluate = make_evaluate(job, splits, layout, streamed)
  return Program(
    layout=layout,
    init=lambda: place(init(read_start())),
    prune=lambda s: place(s._replace(params=prune(s.params))),
    epoch=epoch,
    evaluate=lambda state, split: evaluate(state.variables, split),
    complexity=lambda state: layout.collect(complexity(state.params)),
    restore=lambda tree: place(layout.scatter(tree)),
  )


def _over_epoch(
  parts: Sequence[Metrics], sizes: np.ndarray, layout: Layout
) -> Metrics:
  """From the metrics of parts of an epoch to its own, `[M]` and `[M, m]`.

  Those of parts are `[D, steps, s, l]`.
  """
  steps_last = jax.tree.map(
    lambda *x: np.moveaxis(np.concatenate(x, axis=1), 1, -1),
    *jax.device_get(list(parts)),
  )
  metrics = jax.tree.map(
    lambda x: np.moveaxis(x, -1, 0), layout.collect_grid(steps_last)
  )
  means = jax.tree.map(lambda x: x.mean(axis=0, dtype=np.float64), metrics)
  # Scores are summed over a step, the others are its values.
  examples = sizes.sum()
  of_grid = means._replace(
    weights_min=tuple(x.min(axis=0) for x in metrics.weights_min),
    weights_max=tuple(x.max(axis=0) for x in metrics.weights_max),
    loss=metrics.loss.sum(axis=0) / examples,
    score=metrics.score.sum(axis=0) / examples,
  )

  def flat(x):
    if isinstance(x, tuple):  # An empty one: the cosines of one objective.
      return np.reshape(x, (len(x), of_grid.loss.size)).T
    return x.ravel()

  return Metrics(*map(flat, of_grid))
