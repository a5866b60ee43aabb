"""Schedules of rates and shares, functions of the number of updates."""

from typing import Any

import jax.numpy as jnp
import optax

# Beyond, float32 is infinite, and a rate would be NaN.
_MAX = float(jnp.finfo(jnp.float32).max)


def logistic_drop(
  init_value: float, end_value: float, transition_steps: int
) -> optax.Schedule:
  r"""A smooth drop, centred at three quarters of the way.

  .. math::

    t(k) = t_{start} - (t_{start} - t_{end}) \,
      \sigma\left(\frac{k - 0.75 K}{0.075 K}\right)

  with the logistic function :math:`\sigma` and K = `transition_steps`. The
  paper counts epochs 1..K and holds the rate within one: see `by_epoch`.

  Args:
    init_value: rate at the start, positive.
    end_value: rate at the end, positive. At K it is reached up to 3.4 % of the
      difference.
    transition_steps: K >= 1.

  Returns:
    A schedule: a function from a count to a rate.

  Raises:
    ValueError: for a rate that is not positive and finite, or K < 1.

  Examples:
    >>> import mopt
    >>> rate = mopt.logistic_drop(1e-3, 1e-4, transition_steps=100)
    >>> [round(float(rate(k)), 6) for k in (1, 75, 100)]
    [0.001, 0.00055, 0.000131]

  References:
    Reiners et al., 2020, section 6.1 and Fig. 3.
  """
  _check_rate('init_value', init_value)
  _check_rate('end_value', end_value)
  if not 1 <= transition_steps <= _MAX:
    raise ValueError(
      f'transition_steps must be >= 1 and finite, got {transition_steps}.'
    )

  def schedule(count):
    position = (count - 0.75 * transition_steps) / (0.075 * transition_steps)
    # 1 / (1 + exp(-x)) by tanh, which saturates where exp would overflow.
    fraction = 0.5 * (1.0 + jnp.tanh(0.5 * position))
    return init_value - (init_value - end_value) * fraction

  return schedule


def inverse_time_decay(init_value: float, decay: float) -> optax.Schedule:
  r"""The rate falls with the inverse of time, :math:`t_k = t_0 / (1 + d k)`.

  Args:
    init_value: rate at the start, positive.
    decay: d >= 0, per update.

  Returns:
    A schedule: a function from a count to a rate.

  Raises:
    ValueError: for a rate that is not positive and finite, or a decay that is
      negative or not finite.

  Examples:
    >>> import mopt
    >>> print(mopt.inverse_time_decay(0.1, decay=0.01)(100))
    0.05

  References:
    Reiners et al., 2020, equation (9).
  """
  _check_rate('init_value', init_value)
  if not 0 <= decay <= _MAX:
    raise ValueError(f'decay must not be negative, but finite, got {decay}.')
  return lambda count: init_value / (1 + decay * count)


def cubic_sparsity(
  final: float, begin: int, end: int, initial: float = 0.0
) -> optax.Schedule:
  r"""A share of zeros that rises fast at first and slowly at last.

  .. math::

    s(k) = s_f + (s_i - s_f) \left(1 - \frac{k - k_0}{k_1 - k_0}\right)^3

  between `begin` :math:`k_0` and `end` :math:`k_1`, exactly `initial` before
  and `final` after. While there are many weights to choose from many go at
  once. For `mopt.prune_to_sparsity`, where 0 prunes nothing; with `every` more
  than 1 the final share comes at the first pruning after `end` updates.

  Args:
    final: the share :math:`s_f` of zeros at the end, from 0 to 1.
    begin: the number of updates where it starts to rise, >= 0.
    end: the number of updates where it has risen, > `begin`.
    initial: the share :math:`s_i` before, from 0 to 1.

  Returns:
    A schedule: a function from a count to a share.

  Raises:
    ValueError: for a share that is not from 0 to 1, a `begin` that is negative,
      or an `end` that is not after it or not finite.

  Examples:
    >>> import mopt
    >>> share = mopt.cubic_sparsity(0.9, begin=100, end=300)
    >>> [round(float(share(k)), 4) for k in (0, 100, 200, 300, 400)]
    [0.0, 0.0, 0.7875, 0.9, 0.9]

  References:
    Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning
    for model compression <https://arxiv.org/abs/1710.01878>`_, 2017, equation
    (1).
  """
  for name, share in (('final', final), ('initial', initial)):
    if not 0 <= share <= 1:
      raise ValueError(f'{name} must be a share from 0 to 1, got {share}.')
  if not 0 <= begin <= _MAX:
    raise ValueError(f'begin must be >= 0 and finite, got {begin}.')
  if not begin < end <= _MAX:
    raise ValueError(f'end must be > begin, {begin}, and finite, got {end}.')

  def schedule(count):
    rest = jnp.clip(1 - (count - begin) / (end - begin), 0, 1)
    share = final + (initial - final) * rest**3
    # Both ends without rounding.
    return jnp.where(rest == 1, initial, share)

  return schedule


def by_epoch(
  schedule: optax.Schedule, steps_per_epoch: int, first: int = 1
) -> optax.Schedule:
  """Evaluates a schedule of epochs at a number of updates.

  Args:
    schedule: a schedule whose count is in epochs.
    steps_per_epoch: updates in an epoch, >= 1. The rate is held within one.
    first: the number of the first epoch; the paper counts from 1.

  Returns:
    A schedule whose count is in updates.

  Raises:
    ValueError: for `steps_per_epoch` < 1, or what is not a schedule.

  Examples:
    >>> import mopt
    >>> rate = mopt.by_epoch(lambda epoch: epoch, steps_per_epoch=10)
    >>> [int(rate(k)) for k in (0, 9, 10)]
    [1, 1, 2]
  """
  if not callable(schedule):
    raise ValueError(f'schedule must be a function, got {schedule!r}.')
  if not 1 <= steps_per_epoch <= _MAX:
    raise ValueError(
      f'steps_per_epoch must be >= 1 and finite, got {steps_per_epoch}.'
    )

  def stepped(count: Any):
    return schedule(first + count // steps_per_epoch)

  return stepped


def _check_rate(name: str, value: float) -> None:
  if not 0 < value <= _MAX:
    raise ValueError(f'{name} must be positive and finite, got {value}.')
