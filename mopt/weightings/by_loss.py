"""Weights from the values of the objectives, by a formula.

They cost nothing, and none promises to be against no objective: they do not
know the gradients. For that reason the Gramian is not looked at either, be it
finite or not, so that a compiler may leave it out. Values are given to the
update of an optimizer: `tx.update(grads, state, params, values=values)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mopt.checks import check_factor
from mopt.checks import check_gramian
from mopt.checks import check_integer
from mopt.weightings import states
from mopt.weightings.weighting import check_values
from mopt.weightings.weighting import Key
from mopt.weightings.weighting import Weighting


class DwaState(NamedTuple):
  """State of `dwa`."""

  last: jax.Array  # shape=(m,), dtype=jnp.float32: mean of the last period.
  before: jax.Array  # shape=(m,), dtype=jnp.float32: of the one before it.
  total: jax.Array  # shape=(m,), dtype=jnp.float32: sum of this one so far.
  age: jax.Array  # shape=(), dtype=jnp.int32: steps of this period so far.
  periods: jax.Array  # shape=(), dtype=jnp.int32: periods done, at most 2.


class RandomState(NamedTuple):
  """State of `random_loss`."""

  key: jax.Array  # dtype=jnp.uint32: data of the key to go on with.


def dwa(temperature: jax.typing.ArrayLike = 2.0, every: int = 1) -> Weighting:
  r"""More weight for losses that fall slowly (dynamic weight average).

  .. math:: \lambda_j = m \, \mathrm{softmax}_j \left(
    \frac{L_j(t - 1)}{L_j(t - 2)} / T \right)

  of losses L that are means over periods of `every` steps. In the first two
  periods weights are 1.

  When to take it: to even out how fast objectives improve, at no cost. It does
  not depend on the scale of each objective, nor on their order. It may be
  against an objective. It is gentle: where losses change by a few percent, so
  do the weights, unless the temperature is low. Where they rest weights are 1:
  it does not keep an objective of large scale from drowning others.

  A loss that is 0 counts as the smallest float above it: 0 after 0 is no
  change, and what has risen from 0 gets all the weight. Ratios of negative
  losses mean nothing: for them, as for what is not finite, weights are NaN, and
  the state stays.

  Args:
    temperature: T, positive; a large one makes weights equal.
    every: an integer >= 1, in the paper the steps of an epoch.

  Returns:
    A weighting with a state, of weights `[m]` f32 whose sum is m. Its `update`
    needs `values` `[m]`, the losses.

  Raises:
    ValueError: for arguments other than those; from `update` without `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.dwa()
    >>> state = weighting.init(2)
    >>> for values in ([4., 4.], [1., 4.], [1., 4.]):
    ...   weights, state = weighting.update(
    ...     jnp.eye(2), state, values=jnp.array(values))
    >>> print(weights)  # twice the softmax of 1/8 and 1/2
    [0.81466687 1.1853333 ]

  References:
    Liu et al., `End-to-End Multi-Task Learning with Attention
    <https://arxiv.org/abs/1803.10704>`_, 2019, equation (7).
  """
  check_factor('temperature', temperature, is_positive=True)
  every = check_integer('every', every, 1)

  def init(m):
    ones, zero = jnp.ones(m, jnp.float32), jnp.zeros((), jnp.int32)
    return DwaState(ones, ones, jnp.zeros(m, jnp.float32), zero, zero)

  def update(gramian, state, *, values=None, **extra):
    values = _values('dwa', values, gramian).astype(jnp.float32)
    last, before = _above_zero(state.last), _above_zero(state.before)
    rates = jnp.where(state.periods < 2, 1, jnp.minimum(last / before, 1e30))
    # First the difference, which a small temperature then makes -inf.
    rates = (rates - jnp.max(rates)) / jnp.asarray(temperature, jnp.float32)
    weights = len(values) * jax.nn.softmax(rates)

    total, age = state.total + values, state.age + 1
    is_over = age == every
    choose = lambda new, old: jnp.where(is_over, new, old)
    new = DwaState(
      last=choose(total / every, state.last),
      before=choose(state.last, state.before),
      total=choose(jnp.zeros_like(total), total),
      age=choose(0, age),
      periods=jnp.minimum(state.periods + is_over, 2),
    )
    is_good = states.all_finite(values, total) & (values >= 0).all()
    return states.keep_unless(is_good, weights, new, state)

  return Weighting(init, update)


def stch(
  mu: jax.typing.ArrayLike = 0.1,
  *,
  preferences: jax.typing.ArrayLike | None = None,
  ideal: jax.typing.ArrayLike = 0.0,
) -> Weighting:
  r"""The gradient of a smooth maximum of the losses (smooth Tchebycheff).

  That is, with preferences p on the simplex, equal ones unless others are
  given, and an ideal point z, of

  .. math:: \mu \log \sum_j \exp \frac{p_j (L_j - z_j)}{\mu}, \qquad
    \lambda_j = p_j \, \mathrm{softmax}_j \frac{p_j (L_j - z_j)}{\mu}

  When to take it: for a point of the front that you name, on a part that is not
  convex, too, where no weighted sum ends. At the end all :math:`p_j (L_j -
  z_j)` are equal, up to mu, if the front goes through such a point. See
  `mopt.chebyshev` for the maximum itself. It depends on the scale of losses
  (give preferences or divide), not on their order. It costs nothing.

  Losses may be negative or 0. What is not finite gives weights that are NaN.

  Args:
    mu: positive, in units of :math:`p_j L_j`. A small one is close to the
      maximum, whose kink learning rates have to be small for.
    preferences: `[m]`, m >= 2, non-negative; they are divided by their sum. The
      larger, the smaller the loss in the end. `None` for equal ones.
    ideal: z, a number or `[m]`, below what losses can reach.

  Returns:
    A weighting of weights `[m]`, f32 (f64 if `values` are), non-negative, of a
    sum of at most the largest preference. Its state is empty, and its `update`
    needs `values` `[m]`, the losses.

  Raises:
    ValueError: for arguments other than those; from `update` without `values`,
      or for preferences of another m.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.stch()
    >>> values = jnp.array([1.0, 1.2])  # halves of which differ by mu
    >>> print(weighting.update(jnp.eye(2), (), values=values)[0])
    [0.13447069 0.3655293 ]

  References:
    Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective
    Optimization <https://arxiv.org/abs/2402.19078>`_, 2024, equation (8).
  """
  check_factor('mu', mu, is_positive=True)
  states.check_preferences(preferences)
  states.check_finite('ideal', ideal)

  def update(gramian, state, *, values=None, **extra):
    values = _values('stch', values, gramian)
    m = len(values)
    preferred = states.on_simplex(preferences, m)
    heights = preferred * (values - states.for_each('ideal', ideal, m))
    heights = (heights - jnp.max(heights)) / mu
    weights = (preferred * jax.nn.softmax(heights)).astype(values.dtype)
    return states.keep_unless(states.all_finite(values), weights, state, state)

  return Weighting(lambda m: (), update)


def gls() -> Weighting:
  r"""The gradient of the geometric mean of the losses (GLS).

  .. math:: \lambda_j = \frac{1}{m L_j} \Big(\prod_i L_i\Big)^{1/m}

  When to take it: where losses are of different scales, and a percent of each
  is worth the same. It costs nothing. It may be against an objective. The
  direction does not depend on the scale of each objective, nor on their order.

  All losses must be positive: at 0 the mean has no gradient. For others, and
  for what is not finite, weights are NaN. Close to 0 one weight is very large.

  Returns:
    A weighting of weights `[m]`, f32 (f64 if `values` are), positive. Its state
    is empty, and its `update` needs `values` `[m]`, the losses.

  Raises:
    ValueError: from `update` without `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.gls()
    >>> values = jnp.array([1., 4.])  # of the mean 2
    >>> print(weighting.update(jnp.eye(2), (), values=values)[0])
    [1.   0.25]

  References:
    Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and
    Geometric Loss Strategy for Multi-Task Learning
    <https://arxiv.org/abs/1904.08492>`_, 2019, equation (1).
  """

  def update(gramian, state, *, values=None, **extra):
    values = _values('gls', values, gramian)
    is_good = states.all_finite(values) & (values > 0).all()
    logs = jnp.log(_above_zero(values))
    weights = jnp.exp(jnp.mean(logs) - logs) / len(values)
    return states.keep_unless(is_good, weights, state, state)

  return Weighting(lambda m: (), update)


def random_loss(key: Any = None) -> Weighting:
  """Random weights at each step, the softmax of normal numbers (RLW).

  When to take it: as what others have to beat; in its paper it was as good as
  many of them. It costs nothing, and depends on neither scale nor, but for
  chance, order. `values` are not needed.

  Args:
    key: a random key, the same numbers for the same key; `None` for
      `jax.random.key(0)`.

  Returns:
    A weighting with a state, of weights `[m]` f32 on the simplex.

  Raises:
    ValueError: for what is not one key.

  Examples:
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> weighting = mopt.random_loss()
    >>> weights, state = weighting.update(jnp.eye(2), weighting.init(2))
    >>> print(weights.sum())
    1.0

  References:
    Lin et al., `Reasonable Effectiveness of Random Weighting
    <https://arxiv.org/abs/2111.10603>`_, 2022, Algorithm 2.
  """
  start = Key.of(jax.random.key(0) if key is None else key)

  def update(gramian, state, **extra):
    m = len(check_gramian(gramian))
    data, now = start.split(state.key)
    weights = jax.nn.softmax(jax.random.normal(now, (m,), jnp.float32))
    return weights, RandomState(data)

  return Weighting(lambda m: RandomState(start.data), update)


def _values(name: str, values: Any, gramian: Any) -> jax.Array:
  """As many values as the Gramian, which is not looked at, has rows."""
  return check_values(name, values, len(check_gramian(gramian)))


def _above_zero(values: jax.Array) -> jax.Array:
  """Of which logarithms and quotients are finite."""
  return jnp.maximum(values, jnp.finfo(values.dtype).tiny)
