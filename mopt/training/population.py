"""The members of a population: which there are, in which order, their names.

Outside of the compiled part all that is known of them is flat, `[M]`, in this
order.
"""

from collections.abc import Sequence
import re
from typing import Any, NamedTuple

from mopt.training.config import Config


class Member(NamedTuple):
  """One network that is trained."""

  seed: int
  weights: tuple[float, ...] | None  # Of the objectives; None: it finds them.

  def columns(self, names: Sequence[str]) -> dict[str, Any]:
    """What tells it in a table or a log, with objectives of these names."""
    weights = self.weights or (None,) * len(names)
    labels = [f'weight_{name}' for name in names]
    return {'seed': self.seed, **dict(zip(labels, weights, strict=True))}

  @property
  def is_short(self) -> bool:
    """Whether the weight of the second of two objectives says it all."""
    if self.weights is None or len(self.weights) != 2:
      return False
    first, second = self.weights
    return first in (1, 1 - second)

  def label(self, names: Sequence[str]) -> str:
    """What names it in a sentence."""
    if self.weights is None:
      found = 'found weights'
    elif self.is_short:
      found = f'{names[1]} {self.weights[1]:g}'
    else:
      found = f'weights {",".join(f"{x:g}" for x in self.weights)}'
    return f'{found}, seed {self.seed}'


def make_population(config: Config) -> tuple[Member, ...]:
  """All weights of the first seed, all of the second, and so on."""
  return tuple(
    Member(seed, weights)
    for seed in config.seed
    for weights in config.all_weights
  )


def file_names(config: Config) -> list[str]:
  """A name for the file of each member, without its ending."""
  members = make_population(config)
  second = config.objectives[1].partition(':')[0]
  every = {weights for weights in config.all_weights if weights is not None}
  # Unless 1, l1 and 1 - l1, l1 are both there.
  is_short = all(member.is_short for member in members) and len(
    {weights[1] for weights in every}
  ) == len(every)

  def name(member, form):
    if member.weights is None:
      found = [config.optimizer]
      if config.weighting is not None:
        found += re.split('[:/,]', config.weighting)
      return '_'.join(found)
    if is_short:
      return f'{second}_{form(member.weights[1])}'
    return '_'.join(['weights', *map(form, member.weights)])

  short = lambda x: f'{x:g}'
  # Unless two weights would have one name.
  is_good = len({name(Member(0, x), short) for x in every}) == len(every)
  form = short if is_good else repr
  return [f'{name(member, form)}_seed_{member.seed}' for member in members]
