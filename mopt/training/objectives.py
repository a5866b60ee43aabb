"""The objectives of a run by name, the leaves each concerns, what is pruned.

A new objective on the parameters is one entry of `_PENALTIES`.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mopt
from mopt.masks import path_name
from mopt.stacked import takes_batch
from mopt.training.config import Config

PyTree = Any
Objective = Callable[..., Any]


class _Penalty(NamedTuple):
  """A function of the parameters that may be pruned."""

  function: Objective  # Of (params, mask=), and of the number by its name.
  number: str | None = None  # What may follow a colon.
  default: float = 0.0  # Of the number.


_PENALTIES = {
  'l1': _Penalty(mopt.l1_norm),
  'l2': _Penalty(mopt.l2_norm_squared),
  'group': _Penalty(mopt.group_norm),
  'log_sum': _Penalty(mopt.log_sum_norm, 'eps', 0.1),
  'lp': _Penalty(mopt.lp_norm, 'p', 0.5),
}


# Columns, or beginnings of them, that files have beside values of objectives.
_TAKEN = re.compile(
  '(seed|file|level|status|params|pareto|knee|epoch|learning_rate|when|layer)|'
  '(nonzeros|accuracy|ce|weight|grad_norm|cosine)(_.*)?|.*_(min|max)'
)


class Objectives(NamedTuple):
  """What is minimised beside the error, in the order of the settings."""

  names: tuple[str, ...]  # Of all of them: the first one is the error.
  others: tuple[Objective, ...]  # Of (params), or of (params, batch).

  @property
  def of_params(self) -> dict[str, Objective]:
    """Those of the parameters alone, by name."""
    named = zip(self.names[1:], self.others)
    return {name: f for name, f in named if not takes_batch(f)}


def make_objectives(
  config: Config, own: Mapping[str, Objective] = {}
) -> Objectives:
  """The objectives that the settings name.

  Args:
    config: the settings.
    own: objectives of your own by name, see `mopt.training.Job`.

  Raises:
    ValueError: for a name that is unknown, or a number that is out of range,
      a name of your own that is taken or not asked for, or names of which two
      columns would have one.
  """
  for name in own:
    is_ours = name.partition(':')[0] in ('error', *_PENALTIES)
    if is_ours or _TAKEN.fullmatch(name):
      raise ValueError(
        f'objectives={name}: expected another name for an objective of your '
        'own; this one is taken.'
      )
  others = [
    own[text] if text in own else _find(config, text, own)
    for text in config.objectives[1:]
  ]
  if unread := [name for name in own if name not in config.objectives]:
    raise ValueError(
      f'objectives={",".join(config.objectives)}: expected {unread[0]} among '
      'them, an objective of your own.'
    )
  pairs = [f'{a}_{b}' for a, b in itertools.combinations(config.objectives, 2)]
  if twice := [pair for pair in pairs if pairs.count(pair) > 1]:
    raise ValueError(
      f'objectives={",".join(config.objectives)}: expected names by which all '
      f'pairs can be told, got {twice[0]} twice.'
    )
  return Objectives(config.objectives, tuple(others))


def _find(config: Config, text: str, own: Iterable[str]) -> Objective:
  """One of ours by its name, as `l1` or `lp:0.5`."""
  name, _, number = text.partition(':')
  if name not in _PENALTIES:
    raise ValueError(
      f'objectives={text}: expected error first, and then one or more of '
      f'{", ".join([*_PENALTIES, *own])}.'
    )
  penalty = _PENALTIES[name]
  function = functools.partial(penalty.function, mask=prunable(config))
  if penalty.number is None:
    if number:
      raise ValueError(f'objectives={text}: expected no number after {name}.')
    return function
  try:
    value = float(number) if number else penalty.default
  except ValueError:
    raise ValueError(
      f'objectives={text}: expected a number after {name}.'
    ) from None
  try:
    penalty.function({}, **{penalty.number: value})
  except ValueError as error:
    raise ValueError(f'objectives={text}: {error}') from error
  return functools.partial(function, **{penalty.number: value})


def check_objectives(
  objectives: Objectives, params: PyTree, batch: PyTree
) -> None:
  """Raises unless every objective gives one number, at no cost.

  Args:
    objectives: of a run.
    params: the shapes of the parameters.
    batch: those of a batch.

  Raises:
    ValueError: names the objective and what it gave or raised.
  """
  for name, function in zip(objectives.names[1:], objectives.others):
    try:
      args = (params, batch) if takes_batch(function) else (params,)
      found: Any = jax.eval_shape(function, *args)
    # It is the code of a stranger.
    except Exception as error:
      reason = ' '.join(f'{type(error).__name__}: {error}'.split())
      raise ValueError(
        f'objectives={name}: expected a function of parameters, or of '
        f'parameters and a batch, got {reason}'
      ) from error
    is_array = isinstance(found, jax.ShapeDtypeStruct)
    if not (
      is_array
      and found.shape == ()
      and jnp.issubdtype(found.dtype, jnp.floating)
    ):
      got = type(found).__name__
      if is_array:
        got = f'{found.dtype}{list(found.shape)}'
      raise ValueError(f'objectives={name}: expected one float, got {got}.')


def prunable(config: Config) -> Callable[[PyTree], PyTree]:
  """The mask of the leaves that are penalised, pruned and counted."""
  match config.prunable:
    case 'dense':
      return mopt.dense_kernels
    case 'kernels':
      return _kernels
    case 'all':
      return mopt.mask_by_path(lambda path, leaf: True)
    case pattern:
      find = re.compile(pattern).search
      return mopt.mask_by_path(lambda path, leaf: find(path) is not None)


def _kernels(params: PyTree) -> PyTree:
  return jax.tree.map(
    lambda dense, conv: dense or conv,
    mopt.dense_kernels(params),
    mopt.conv_kernels(params),
  )


def check_prunable(config: Config, params: PyTree) -> None:
  """Raises unless a network has something to prune.

  Args:
    config: the settings.
    params: the parameters or their shapes.

  Raises:
    ValueError: names the leaves that there are.
  """
  if any(jax.tree.leaves(prunable(config)(params))):
    return
  paths = jax.tree_util.tree_leaves_with_path(params)
  names = ', '.join(path_name(path) for path, _ in paths) or 'none'
  wanted = {
    'dense': 'a dense layer, a leaf named kernel with two axes',
    'kernels': 'a leaf named kernel with two axes or more',
    'all': 'at least one leaf',
  }.get(config.prunable, 'a pattern that is found in the path of a leaf')
  raise ValueError(
    f'prunable={config.prunable}: expected {wanted}, to penalise, prune and '
    f'count the weights of; the leaves of the network are {names}.'
  )


def conv_l2(config: Config, params: PyTree) -> float:
  """The factor of the squares of convolution kernels.

  By default the paper's, but for kernels that may be pruned: those have a
  penalty of their own.
  """
  if config.conv_l2 is not None:
    return config.conv_l2
  masks = mopt.conv_kernels(params), prunable(config)(params)
  both = jax.tree.map(lambda conv, pruned: conv and pruned, *masks)
  return 0.0 if any(jax.tree.leaves(both)) else 1e-4


def counted(config: Config) -> str:
  """Which weights the nonzeros are of, for a sentence."""
  names = {
    'dense': 'in the dense layers',
    'kernels': 'in the kernels',
    'all': 'of all parameters',
  }
  return names.get(config.prunable, f'in leaves that match {config.prunable}')


def leaf_columns(
  config: Config, params: PyTree, min_axes: int = 0
) -> list[str]:
  """The columns that count the nonzeros of a leaf that may be pruned.

  Args:
    config: the settings.
    params: the parameters or their shapes.
    min_axes: those with fewer axes are left out.
  """
  chosen = jax.tree.leaves(prunable(config)(params))
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return [
    leaf_column(path_name(path))
    for (path, leaf), keep in zip(leaves, chosen)
    if keep and leaf.ndim >= min_axes
  ]


def leaf_column(path: str) -> str:
  """The column that counts the nonzeros of a leaf."""
  return f'nonzeros_{layer_name(path)}'


def layer_name(path: str) -> str:
  """What files call a leaf: of a kernel it is the name of the layer."""
  name = path.removesuffix('/kernel').replace('/', '_')
  # The column nonzeros_all is taken.
  return path.replace('/', '_') if name == 'all' else name
