"""What is said of a setting, and how one that is wrong is refused."""

import dataclasses
import math

import pytest

from mopt.training import settings
from mopt.training.config import Config
from mopt.training.settings import setting


@dataclasses.dataclass(frozen=True)
class _Some:
  kind: str = setting('a', 'data', 'A kind.', choices=('a', 'b', 'c'))
  size: int | None = setting(
    None, 'data', 'A size.', check=settings.at_least(2), may_change=True
  )
  rate: float = setting(0.5, 'data', 'A rate.', check=settings.positive)
  share: float = setting(0.5, 'data', 'A share.', check=settings.below_1)
  times: float = setting(0.0, 'data', 'Times.', check=settings.not_negative)
  turn: float = setting(0.0, 'data', 'A turn.', check=settings.up_to(180))
  many: tuple[float, ...] = setting(
    (1.0,),
    'data',
    'Some numbers.',
    check=settings.distinct(lambda x: x > 0, 'positive numbers'),
    search_may_change=True,
  )

  def __post_init__(self):
    settings.check_each(self)


def test_a_setting_is_a_field_like_any_other():
  assert _Some() == _Some('a', None, 0.5, 0.5, 0.0, 0.0, (1.0,))
  assert (_Some.kind, _Some.size) == ('a', None)
  assert dataclasses.asdict(_Some(size=3))['size'] == 3
  assert dataclasses.replace(_Some(), kind='b') == _Some('b')


@pytest.mark.parametrize(
  ('values', 'line'),
  [
    ({'kind': 'd'}, 'kind=d: expected a, b or c.'),
    ({'kind': None}, 'kind=None: expected a, b or c.'),
    ({'size': 1}, 'size=1: expected an integer >= 2.'),
    ({'size': 2**31}, 'size=2147483648: expected an integer < 2^31.'),
    (
      {'rate': 0.0},
      'rate=0.0: expected a number that is positive and finite in float32.',
    ),
    (
      {'rate': math.nan},
      'rate=nan: expected a number that is positive and finite in float32.',
    ),
    (
      {'share': 1 - 1e-9},  # which float32 rounds
      'share=0.999999999: expected a number in [0, 1), also in float32.',
    ),
    (
      {'times': 1e39},
      'times=1e+39: expected a number >= 0, finite in float32.',
    ),
    ({'turn': 180.5}, 'turn=180.5: expected a number in [0, 180].'),
    ({'many': ()}, 'many=: expected at least one number.'),
    ({'many': (1.0, 2.0, 1.0)}, 'many=1,2,1: expected no number twice.'),
    ({'many': (1e-4, -2.0)}, 'many=0.0001,-2: expected positive numbers.'),
    # Numbers of all digits, where %g has six.
    (
      {'many': (12345678, 12345678)},
      'many=12345678,12345678: expected no number twice.',
    ),
  ],
)
def test_what_is_wrong_is_one_line(values, line):
  with pytest.raises(ValueError) as error:
    _Some(**values)
  assert str(error.value) == line


@pytest.mark.parametrize(
  'values',
  [
    {'size': None},
    {'size': 2},
    {'size': 2**31 - 1},
    {'rate': 1e-37},
    {'rate': 3e38},
    {'share': 0.0},
    {'times': 0.0},
    {'turn': 180.0},
    {'many': (3.0, 1.0)},
  ],
)
def test_what_is_on_the_edge_is_good(values):
  assert dataclasses.asdict(_Some(**values)).items() >= values.items()


def test_a_setting_has_a_type_beside_none():
  kinds = [settings.kind(field) for field in dataclasses.fields(_Some)]
  assert kinds == [str, int, float, float, float, float, tuple[float, ...]]


def test_settings_are_found_by_their_marks():
  assert settings.marked(_Some, 'may_change') == ('size',)
  assert settings.marked(_Some, 'search_may_change') == ('many',)


def test_every_setting_of_a_run_has_a_group_and_a_help():
  for field in dataclasses.fields(Config):
    about = settings.said_of(field)
    assert about.group in settings.GROUPS
    assert about.help.endswith('.')
    assert field.default is not dataclasses.MISSING


def test_seeds_are_shown_with_all_digits():
  with pytest.raises(ValueError, match='^seed=12345678,12345678: expected no'):
    Config(seed=(12345678, 12345678))
