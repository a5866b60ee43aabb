"""What a setting is: a field of a dataclass, and all that is said of it.

Flags, their help and groups, the checks, and what may change when a run goes on
are made from it.
"""

from collections.abc import Callable
import dataclasses
import typing
from typing import Any, NamedTuple

import numpy as np

# As `--help` shows them.
GROUPS = (
  'data',
  'network',
  'objectives',
  'optimizer',
  'pruning',
  'search',
  'running',
)

# Beyond these a number is 0 or infinite where it is computed with.
_FLOAT32 = np.finfo(np.float32)
_TINY, LARGEST = float(_FLOAT32.tiny), float(_FLOAT32.max)

# What was expected in place of a value, or `None` if it is good.
Check = Callable[[Any], str | None]


def anything(value: Any) -> str | None:
  del value
  return None


class Setting(NamedTuple):
  """What is said of a setting."""

  group: str  # One of `GROUPS`.
  help: str
  choices: tuple[str, ...] = ()  # If there are any, it is one of them.
  check: Check = anything
  # Whether it may be otherwise when a run goes on, since it changes no result
  # but by rounding; or when a search does, which may get more trainings.
  may_change: bool = False
  search_may_change: bool = False


def setting(
  default: Any,
  group: str,
  help: str,
  *,
  choices: tuple[str, ...] = (),
  check: Check = anything,
  may_change: bool = False,
  search_may_change: bool = False,
) -> Any:
  """A field of a dataclass, with what is said of it; see `Setting`.

  It returns `Any` so that type checkers see a default of any type.
  """
  about = Setting(group, help, choices, check, may_change, search_may_change)
  return dataclasses.field(default=default, metadata={'setting': about})


def said_of(field: dataclasses.Field) -> Setting:
  return field.metadata['setting']


def kind(field: dataclasses.Field) -> Any:
  """The type of a setting, where it may be `None` that beside it."""
  kinds = typing.get_args(field.type)
  return kinds[0] if type(None) in kinds else field.type


def marked(cls: Any, mark: str) -> tuple[str, ...]:
  """The names of those settings of which a mark of `Setting` is true."""
  return tuple(
    field.name
    for field in dataclasses.fields(cls)
    if getattr(said_of(field), mark)
  )


def check_each(settings: Any) -> None:
  """Raises unless every setting is good by itself; `None` is, as a default.

  Raises:
    ValueError: with one line that names the setting, its value and what is
      expected.
  """
  for field in dataclasses.fields(settings):
    value, about = getattr(settings, field.name), said_of(field)
    if value is None and field.default is None:
      continue
    if about.choices and value not in about.choices:
      *rest, last = about.choices
      wanted = f'{", ".join(rest)} or {last}'
    else:
      wanted = about.check(value)
    if wanted is not None:
      raise ValueError(f'{field.name}={text(value)}: expected {wanted}.')


def text(value: Any, number: Callable[[float], str] = '{:g}'.format) -> str:
  """A value as it may be written on the command line.

  Args:
    value: of a setting.
    number: writes a float; `repr` so that it comes back as it was.
  """
  if not isinstance(value, tuple):
    return str(value)
  if value and isinstance(value[0], tuple):
    return ';'.join(text(v, number) for v in value)
  return ','.join(number(v) if isinstance(v, float) else str(v) for v in value)


def a_number(is_good: Callable[[Any], bool], wanted: str) -> Check:
  return lambda value: None if is_good(value) else wanted


# Comparisons are false of NaN.
positive = a_number(
  lambda x: _TINY <= x <= LARGEST,
  'a number that is positive and finite in float32',
)
not_negative = a_number(
  lambda x: 0 <= x <= LARGEST, 'a number >= 0, finite in float32'
)
below_1 = a_number(
  lambda x: 0 <= x < 1 and float(np.float32(x)) < 1,
  'a number in [0, 1), also in float32',
)


def up_to(most: float) -> Check:
  return a_number(lambda x: 0 <= x <= most, f'a number in [0, {most}]')


def at_least(least: int) -> Check:
  def check(value):
    if value < least:
      return f'an integer >= {least}'
    return None if value < 2**31 else 'an integer < 2^31'

  return check


def distinct(
  is_good: Callable[[Any], bool], wanted: str, what: str = 'number'
) -> Check:
  """At least one, none twice, and all of them good."""

  def check(values):
    if not values:
      return f'at least one {what}'
    if len(set(values)) != len(values):
      return f'no {what} twice'
    return None if all(map(is_good, values)) else wanted

  return check
