"""How the objectives of a run are weighed, by its name.

A new weighting is one entry of `_CHOICES`, and its name in the settings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mopt
from mopt.training.config import Config


class _Choice(NamedTuple):
  """A weighting as it stands, or what makes one."""

  thing: Any
  takes_key: bool = False
  number: str | None = None  # What may follow a colon, as a keyword,
  parse: Callable[[str], Any] = float  # and how it is read.
  is_needed: bool = False  # Whether it has to be there.
  is_factory: bool = True


def _plain(weighting: Any) -> _Choice:
  return _Choice(weighting, is_factory=False)


_CHOICES = {
  'min_norm': _plain(mopt.min_norm_weights),
  'mean': _plain(mopt.mean),
  'dual_proj': _plain(mopt.dual_proj),
  'upgrad': _plain(mopt.upgrad),
  'cagrad': _Choice(mopt.cagrad, number='c'),
  'imtl_g': _plain(mopt.imtl_g),
  'aligned_mtl': _plain(mopt.aligned_mtl),
  'config': _plain(mopt.config),
  'krum': _Choice(mopt.krum, number='n_byzantine', parse=int),
  'fairgrad': _Choice(mopt.fairgrad, number='alpha'),
  'nash_mtl': _plain(mopt.nash_mtl),
  'pcgrad': _Choice(mopt.pcgrad, takes_key=True),
  'gradvac': _Choice(mopt.gradvac, takes_key=True, number='beta'),
  'random': _Choice(mopt.random, takes_key=True),
  'modo': _Choice(mopt.modo, number='step_size', is_needed=True),
  'sdmgrad': _Choice(mopt.sdmgrad, number='regularization'),
  'dwa': _Choice(mopt.dwa, number='temperature'),
  'famo': _Choice(mopt.famo),
  'stch': _Choice(mopt.stch, number='mu'),
  'gls': _Choice(mopt.gls),
  'uncertainty': _Choice(mopt.uncertainty),
  'imtl_l': _Choice(mopt.imtl_l),
  'gradnorm': _Choice(mopt.gradnorm, number='alpha'),
  'random_loss': _Choice(mopt.random_loss, takes_key=True),
}


def _numbers(text: str) -> tuple[float, ...]:
  return tuple(map(float, text.split(',')))


# Those that change another one, which follows a slash.
_AROUND = {
  'every': _Choice(mopt.every, number='n', parse=int, is_needed=True),
  'smoothed': _Choice(mopt.smoothed, number='decay'),
  'normalized': _Choice(
    mopt.normalized, number='by', parse=str, is_needed=True
  ),
  'preferred': _Choice(
    mopt.preferred, number='preferences', parse=_numbers, is_needed=True
  ),
}


def make_weighting(config: Config, weights: jax.Array, key: jax.Array) -> Any:
  """The weighting of one member.

  Args:
    config: the settings.
    weights: `[m]`, of a weighted sum; may be traced.
    key: from which random weightings start; may be traced.

  Raises:
    ValueError: for a name that is unknown, or a number that is out of range.
  """
  if config.weighting_name == 'fixed':
    return mopt.fixed_weights(weights)
  try:
    return _find(config.weighting_name, key)
  except ValueError as error:
    raise ValueError(f'weighting={config.weighting_name}: {error}') from error


def check_weighting(config: Config) -> None:
  """Raises unless the weighting suits the number of objectives, at no cost.

  Raises:
    ValueError: names the weighting and what was wrong.
  """
  m = len(config.objectives)
  key = jax.random.key(0)
  weighting = make_weighting(config, jnp.ones(m), key)
  weighting = mopt.as_weighting(weighting)

  def weigh():
    gramian, values = jnp.eye(m), jnp.ones(m)
    return weighting.update(gramian, weighting.init(m), values=values)

  try:
    jax.eval_shape(weigh)
  except ValueError as error:
    name = config.weighting_name
    raise ValueError(f'weighting={name}: {error}') from error


def _find(text: str, key: jax.Array) -> Any:
  """A weighting by its name, as `upgrad`, `cagrad:0.5` or `every:9/upgrad`."""
  head, slash, inner = text.partition('/')
  name, colon, number = head.partition(':')
  table = _AROUND if slash else _CHOICES
  if not slash and name in _AROUND:
    raise ValueError(f'expected another one after it, as {text}/upgrad.')
  if name not in table:
    where = ' before a slash' if slash else ''
    raise ValueError(f'expected one of {", ".join(table)}{where}.')
  choice = table[name]
  if choice.number is None and colon:
    raise ValueError(f'expected no number after {name}.')
  if choice.is_needed and not colon:
    raise ValueError(f'expected {choice.number} after {name}, as {name}:...')
  args = (_find(inner, key),) if slash else ()
  named: dict[str, Any] = {'key': key} if choice.takes_key else {}
  if choice.number and colon:
    try:
      named[choice.number] = choice.parse(number)
    except ValueError:
      raise ValueError(
        f'expected a number, the {choice.number}, after {name}.'
      ) from None
  return choice.thing(*args, **named) if choice.is_factory else choice.thing
