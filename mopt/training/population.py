"""The members of a population: which there are, in which order, their names.

Outside of the compiled part all that is known of them is flat, `[M]`, in this
order.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mopt.training.config import Config

# The objectives of a run, in their order; files call their columns by them.
OBJECTIVES = ('error', 'l1')


class Member(NamedTuple):
  """One network that is trained."""

  seed: int
  weights: tuple[float, ...] | None  # Of the objectives; None: it finds them.

  @property
  def l1(self) -> float | None:
    """The weight of the l1 norm."""
    return None if self.weights is None else self.weights[1]

  def columns(self, names: Sequence[str]) -> dict[str, Any]:
    """What tells it in a table or a log, with objectives of these names."""
    weights = self.weights or (None,) * len(names)
    labels = [f'weight_{name}' for name in names]
    return {'seed': self.seed, **dict(zip(labels, weights, strict=True))}

  @property
  def label(self) -> str:
    """What names it in a sentence."""
    name = 'found weights' if self.l1 is None else f'l1 {self.l1:g}'
    return f'{name}, seed {self.seed}'


def make_population(config: Config) -> tuple[Member, ...]:
  """All weights of the first seed, all of the second, and so on."""

  def weights(l1):
    if l1 is None:
      return None
    # Equations (2) and (7) of Reiners et al., 2020.
    return (1.0 if config.scalarization == 'penalty' else 1.0 - l1, l1)

  return tuple(
    Member(seed, weights(l1)) for seed in config.seed for l1 in config.l1_values
  )


def file_names(members: Sequence[Member], optimizer: str) -> list[str]:
  """A name for the file of each member, without its ending."""
  known = {member.l1 for member in members if member.l1 is not None}
  # Short, unless two weights would have one name.
  is_short = len({f'{l1:g}' for l1 in known}) == len(known)

  def name(member):
    if member.l1 is None:
      return f'{optimizer}_seed_{member.seed}'
    number = f'{member.l1:g}' if is_short else repr(member.l1)
    return f'l1_{number}_seed_{member.seed}'

  return [name(member) for member in members]
