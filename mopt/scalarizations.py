r"""Scalarizations: from the values of m objectives to one number to minimise.

A weighted sum finds the points of a front that lie on its convex hull, and
nothing between them, whatever the weights. The two functions here reach the
rest too. Either is used in one of two ways:

1. As an objective, with any Optax optimizer:

  >>> import jax
  >>> import jax.numpy as jnp
  >>> import mopt
  >>> import optax
  >>> f1 = lambda p: jnp.sum((p - 1.0) ** 2)
  >>> f2 = lambda p: jnp.sum((p + 1.0) ** 2)
  >>> def objective(params, weights):
  ...   return mopt.chebyshev(jnp.stack([f1(params), f2(params)]), weights)
  >>> weights = jnp.array([0.75, 0.25])
  >>> params = jnp.array([0.5])
  >>> print(jax.grad(objective)(params, weights))  # of f2 / 4, the larger term
  [0.75]

2. As a weighting of `mopt.aggregate`, for gradients that are stacked anyway:
   what the scalarization grows by with each value is a weight. It changes from
   step to step, so the transformation is made within the step; only its state
   lives on:

  >>> grad_fn = mopt.value_and_stacked_grad(f1, f2)
  >>> def make_optimizer(weights):
  ...   return optax.chain(
  ...     mopt.aggregate(mopt.fixed_weights(weights)),
  ...     optax.scale_by_learning_rate(0.1),
  ...   )
  >>> @jax.jit
  ... def step(params, state, weights):
  ...   values, grads = grad_fn(params)
  ...   tx = make_optimizer(jax.grad(mopt.chebyshev)(values, weights))
  ...   updates, state = tx.update(grads, state, params)
  ...   return optax.apply_updates(params, updates), state
  >>> state = make_optimizer(weights).init(params)
  >>> params, state = step(params, state, weights)
  >>> print(params, optax.tree.get(state, 'AggregateState').weights)
  [0.425] [0.   0.25]

These weights are not negative, since `weights`, `rho` and `penalty` are not.

Both functions have kinks, and their minima often are at one: steps of constant
size go to and fro across it. Let the learning rate fall to 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mopt.checks import check_factor
from mopt.checks import is_finite
from mopt.checks import known_numbers
from mopt.weightings.fixed import check_weights


def chebyshev(
  values: jax.typing.ArrayLike,
  weights: jax.typing.ArrayLike,
  ideal: jax.typing.ArrayLike | None = None,
  rho: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
  r"""The weighted Chebyshev distance to an ideal point, augmented.

  .. math::

    \max_j w_j (f_j - z_j) + \rho \sum_j w_j (f_j - z_j)

  Let z be below all values. Then every Pareto-optimal point f, on a convex part
  of the front or not, is a minimiser for `rho=0` and the weights
  :math:`w_j = 1 / (f_j - z_j)`, which make all its terms equal. Conversely,
  with positive weights a minimiser is weakly Pareto-optimal, and with rho > 0
  Pareto-optimal; but the larger rho, the more this is a weighted sum again.

  The gradient of the maximum goes to the largest term. Among equal ones it is
  split evenly, one of the subgradients there.

  Args:
    values: `[m]`, m >= 2, of the objectives.
    weights: `[m]`, non-negative and finite; may be traced, and mapped over.
    ideal: `[m]`, z, finite: a point below the front; zeros by default.
    rho: scalar, non-negative and finite.

  Returns:
    A scalar, f32, or f64 where `values` are.

  Raises:
    ValueError: for shapes other than these, weights or a rho that are negative,
      or anything but the values that is not finite (as far as they are known
      when this is called).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> values, weights = jnp.array([1.0, 3.0]), jnp.array([2.0, 1.0])
    >>> print(mopt.chebyshev(values, weights))
    3.0
    >>> print(jax.grad(mopt.chebyshev)(values, weights))
    [0. 1.]
    >>> print(jax.grad(mopt.chebyshev)(values, weights, ideal=[0.0, 1.0]))
    [1.  0.5]

  References:
    Bowman, `On the relationship of the Tchebycheff norm and the efficient
    frontier of multiple-criteria objectives`, 1976; Steuer and Choo, `An
    interactive weighted Tchebycheff procedure for multiple objective
    programming <https://doi.org/10.1007/BF02591870>`_, 1983.
  """
  values = _check_values(values)
  check_weights(weights)
  weights = _check_shape('weights', weights, values.shape, values.dtype)
  distances = values
  if ideal is not None:
    known = known_numbers('ideal', ideal)
    if known is not None and not is_finite(known).all():
      raise ValueError(f'ideal must be finite, got {known.tolist()}.')
    distances = values - _check_shape(
      'ideal', ideal, values.shape, values.dtype
    )
  rho = check_factor('rho', rho, values.dtype)
  terms = weights * distances
  return jnp.max(terms) + rho * jnp.sum(terms)


def epsilon_constraint(
  values: jax.typing.ArrayLike,
  bounds: jax.typing.ArrayLike,
  penalty: jax.typing.ArrayLike,
) -> jax.Array:
  r"""The first objective, with bounds on the others that cost when exceeded.

  .. math::

    f_0 + \mathrm{penalty} \sum_{j \ge 1} \max(0, f_j - \mathrm{bounds}_j)

  The eps-constraint method minimises one objective while the others stay
  within bounds. Every Pareto-optimal point, on a convex part of the front or
  not, is a solution with its own values as bounds. Here the bounds are a
  penalty.

  The penalty is exact if it is above all Lagrange multipliers of the bounds,
  the slopes :math:`-\partial f_0 / \partial f_j` of the front where the bounds
  hold: a minimum within the bounds is a local minimum of this sum then, not
  one that is approached as the penalty grows. With a smaller penalty bounds
  are exceeded. Where the front is not convex its slopes grow beyond the
  bounds: start within them, or take a penalty above the slopes on the way. A
  much larger one is as exact, but a steeper valley to descend.

  The gradient of `max(0, x)` at x = 0 is taken as 0, one of the subgradients
  there: a bound that is met exactly does not push.

  Args:
    values: `[m]`, m >= 2; the first one is minimised.
    bounds: `[m - 1]`, of `values[1:]`; `inf` for none. May be traced, and
      mapped over.
    penalty: scalar, non-negative and finite: units of the first objective for
      one of another, so bring objectives to similar scales.

  Returns:
    A scalar, f32, or f64 where `values` are.

  Raises:
    ValueError: for shapes other than these, bounds that are NaN or `-inf`, or
      a penalty that is negative or not finite (as far as they are known when
      this is called).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import mopt
    >>> values = jnp.array([1.0, 3.0, 5.0])
    >>> print(mopt.epsilon_constraint(values, [2.5, 6.0], penalty=10.0))
    6.0
    >>> print(jax.grad(mopt.epsilon_constraint)(values, [2.5, 6.0], 10.0))
    [ 1. 10.  0.]

  References:
    Haimes, Lasdon and Wismer, `On a bicriterion formulation of the problems of
    integrated system identification and system optimization
    <https://doi.org/10.1109/TSMC.1971.4308298>`_, 1971; for exactness Zangwill,
    `Non-linear programming via penalty functions
    <https://doi.org/10.1287/mnsc.13.5.344>`_, 1967.
  """
  values = _check_values(values)
  known = known_numbers('bounds', bounds)
  if known is not None and not (is_finite(known) | (known == np.inf)).all():
    raise ValueError(f'bounds must be numbers or inf, got {known.tolist()}.')
  bounds = _check_shape('bounds', bounds, (len(values) - 1,), values.dtype)
  penalty = check_factor('penalty', penalty, values.dtype)
  # Unlike jnp.maximum, whose gradient at 0 is 1/2.
  excess = jax.nn.relu(values[1:] - bounds)
  return values[0] + penalty * jnp.sum(excess)


def _check_values(values: jax.typing.ArrayLike) -> jax.Array:
  values = jnp.asarray(values)
  if values.ndim != 1 or len(values) < 2:
    raise ValueError(
      f'values must be [m] with m >= 2, got shape {values.shape}.'
    )
  # What else there is follows: it would make float64 of all this under x64.
  return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _check_shape(
  name: str, array: jax.typing.ArrayLike, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  array = jnp.asarray(array, dtype)
  if array.shape != shape:
    raise ValueError(
      f'{name} must have shape {shape} for these values, got {array.shape}.'
    )
  return array
