"""Whatever goes in: an answer that holds, or an error that names what is wrong.

Other tests say what each function computes; these draw what nobody thought of.
The same examples in every run.
"""

import fractions
import itertools
import math
import numbers
from typing import NamedTuple

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt
from mopt import search


def fuzz(examples):
  return hypothesis.settings(
    max_examples=examples,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
  )


def float64(x):
  return np.asarray(x).astype(np.float64)


def assert_same_types(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    assert (x.shape, x.dtype) == (np.shape(y), y.dtype)


def assert_on_the_simplex(weights):
  weights = np.asarray(weights)
  assert weights.dtype == np.float32
  assert (weights >= 0).all()
  assert abs(weights.sum(dtype=np.float64) - 1) <= 1e-6


# -- Trees --------------------------------------------------------------------
#
# Few shapes, for each is compiled anew.

SHAPES = ((), (3,), (2, 2), (2, 0), (2, 1, 3))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
TINY = 1e-40  # subnormal in float32 and bfloat16, and nothing in float16
ORDINARY = (0.0, -0.0, 1.0, -2.5, 1e-3, -1e-3, 3e-4, 17.0)
EXTREME = (TINY, -TINY, 1e-30, 3e38, -3e38, math.inf, -math.inf, math.nan)


class Pair(NamedTuple):
  """A tree that is no dictionary."""

  kernel: object
  bias: object


def trees(leaves, min_size=0):
  """Dictionaries, tuples, lists, NamedTuples, `None`, and nothing at all."""
  # Two of the keys are paths of others.
  keys = st.sampled_from(['a', 'b', 'kernel', 'a/kernel', 'a/b'])
  nested = st.recursive(
    leaves | st.none(),
    lambda children: (
      st.dictionaries(keys, children, max_size=3)
      | st.lists(children, max_size=2)
      | st.lists(children, max_size=2).map(tuple)
      | st.builds(Pair, children, children)
    ),
    max_leaves=4,
  )
  return nested.filter(lambda t: len(jax.tree.leaves(t)) >= min_size)


@st.composite
def arrays(draw, values=ORDINARY + EXTREME, dtypes=DTYPES, shape=None):
  """Arrays of JAX or NumPy."""
  shape = draw(st.sampled_from(SHAPES)) if shape is None else shape
  size = math.prod(shape)
  elements = st.lists(st.sampled_from(values), min_size=size, max_size=size)
  with np.errstate(over='ignore'):  # 3e38 in float16
    array = np.array(draw(elements), np.float32).reshape(shape)
    array = array.astype(draw(st.sampled_from(dtypes)))
  return draw(st.sampled_from([array, jnp.asarray(array)]))


def python_numbers(values=ORDINARY + EXTREME):
  floats = st.sampled_from(values)
  return floats | floats.map(np.float32) | st.integers(-(2**70), 2**70)


@st.composite
def with_masks(draw, inner):
  """A tree, and a mask in one of its forms with its booleans."""
  tree = draw(inner)
  leaves, structure = jax.tree.flatten(tree)
  booleans = st.lists(st.booleans(), min_size=len(leaves), max_size=len(leaves))
  chosen = draw(st.just([True] * len(leaves)) | booleans)
  mask = structure.unflatten(chosen)
  forms = [mask]
  if any(chosen) or not chosen:  # a function that selects none is an error
    forms.append(lambda params: mask)
  if not any(chosen):
    forms.append(False)
  if all(chosen):
    forms += [True, mopt.mask_by_path(lambda path, leaf: True)]
    # Integers are no weights unless a mask names them.
    is_float = [np.asarray(x).dtype.kind not in 'iub' for x in leaves]
    forms += [None] if all(is_float) else []
  return tree, draw(st.sampled_from(forms)), chosen


def chosen_leaves(tree, chosen):
  return [float64(x) for x, c in zip(jax.tree.leaves(tree), chosen) if c]


def assert_sum(found, terms):
  """A sum in float32 of terms in float64; what is subnormal may be lost."""
  assert (found.shape, found.dtype) == ((), jnp.float32)
  expected = sum(map(np.sum, terms), 0.0)
  if np.isfinite(expected) and 3.3e38 < abs(expected) < 3.5e38:
    return  # either is right
  with np.errstate(over='ignore'):
    np.testing.assert_allclose(
      float(found), np.float32(expected), rtol=1e-5, atol=1e-36
    )


@fuzz(100)
@hypothesis.given(with_masks(trees(arrays() | python_numbers())))
def test_norms_of_any_tree(case):
  tree, mask, chosen = case
  leaves = chosen_leaves(tree, chosen)
  assert_sum(mopt.l1_norm(tree, mask), [np.abs(x) for x in leaves])
  assert_sum(mopt.l2_norm_squared(tree, mask), [np.square(x) for x in leaves])


@fuzz(60)
@hypothesis.given(
  with_masks(trees(arrays((*ORDINARY, 1e6, -math.inf, math.nan)))),
  st.sampled_from([0.1, 0.5, 0.999]),
  st.sampled_from([1e-6, 1e-3, 7.0]),
)
def test_lp_norm_of_any_tree(case, p, smoothing):
  tree, mask, chosen = case
  found = mopt.lp_norm(tree, p, mask, smoothing)
  leaves = chosen_leaves(tree, chosen)
  # The documented bounds; NaN and infinity are on both sides.
  above = sum((np.abs(x) ** p).sum() for x in leaves)
  below = above - sum(x.size for x in leaves) * smoothing**p
  slack = 1e-5 * above
  if np.isfinite(above):
    assert below - slack <= float(found) <= above + slack
  else:
    np.testing.assert_equal(float(found), float(above))


@fuzz(100)
@hypothesis.given(with_masks(trees(arrays() | python_numbers())))
def test_counts_of_any_tree(case):
  tree, mask, chosen = case
  total, per_leaf, size, size_per_leaf = mopt.count_nonzero(tree, mask)
  assert total.dtype == jnp.int32
  assert sum(int(n) for n in per_leaf.values()) == int(total)
  assert sum(size_per_leaf.values()) == size
  assert per_leaf.keys() == size_per_leaf.keys()
  assert all(int(n) <= size_per_leaf[path] for path, n in per_leaf.items())
  # XLA takes what is subnormal for 0 on some platforms.
  leaves = [
    np.asarray(x)
    for x, is_chosen in zip(jax.tree.leaves(tree), chosen)
    if is_chosen
  ]
  assert size == sum(x.size for x in leaves)
  most = sum(int((x != 0).sum()) for x in leaves)
  least = sum(int((~(np.abs(x.astype(float)) < 1e-37)).sum()) for x in leaves)
  assert least <= int(total) <= most


@fuzz(40)
@hypothesis.given(trees(arrays(), min_size=1), st.integers(2, 3))
def test_stacked_gradients_of_any_tree(tree, m):
  objectives = [mopt.l1_norm, mopt.l2_norm_squared, mopt.l1_norm][:m]
  values, grads = mopt.value_and_stacked_grad(*objectives)(tree)
  assert (values.shape, values.dtype) == ((m,), jnp.float32)
  expected = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((m, *x.shape), x.dtype), tree
  )
  assert_same_types(grads, expected)
  for x, grad in zip(jax.tree.leaves(tree), jax.tree.leaves(grads)):
    x = float64(x)
    signs = np.where(np.abs(x) < 1e-37, 0, np.sign(x))  # of NaN it is NaN
    np.testing.assert_array_equal(float64(grad)[0], signs)
  with pytest.raises(ValueError, match='at least 2 gradients, got 1'):
    mopt.stack(tree)
  with pytest.raises(ValueError, match='structure'):
    mopt.stack(tree, {'another': tree})


# -- Trees that are none of arrays --------------------------------------------


# Functions of a tree of parameters or, the last one, of stacked gradients.
TREE_FUNCTIONS = {
  'group_norm': mopt.group_norm,
  'l1_norm': mopt.l1_norm,
  'l2_norm_squared': mopt.l2_norm_squared,
  'lp_norm': lambda tree: mopt.lp_norm(tree, 0.5),
  'count_nonzero': mopt.count_nonzero,
  'stack': lambda tree: mopt.stack(tree, tree),
  'stacked_grad': mopt.value_and_stacked_grad(
    mopt.l1_norm, mopt.l2_norm_squared
  ),
  'prune': lambda tree: mopt.prune(tree, 1e-3),
  'prune_by_magnitude': lambda tree: mopt.prune_by_magnitude(1e-3).init(tree),
  'gramian': mopt.gramian,
}


class Thing:
  """What no library knows."""

  def __repr__(self):
    return 'a thing'


NO_NUMBERS = (
  'text',
  b'bytes',
  Thing(),
  print,
  np.array(['1', '2']),
  np.array([Thing(), None]),
  np.datetime64('2020-01-01'),
)


@pytest.mark.parametrize('name', TREE_FUNCTIONS)
@fuzz(20)
@hypothesis.given(
  trees(arrays(shape=(2, 2))), st.sampled_from(NO_NUMBERS), st.booleans()
)
def test_a_leaf_that_is_no_number_is_named(name, tree, bad, is_first):
  tree = [bad, tree] if is_first else {'a': tree, 'bad': [None, bad]}
  path = "at '0'" if is_first else "at 'bad/1'"
  with pytest.raises((TypeError, ValueError)) as error:
    TREE_FUNCTIONS[name](tree)
  named = [path, repr(bad), str(bad), type(bad).__name__, 'leading axes']
  named += [str(bad.dtype)] if isinstance(bad, np.ndarray) else []
  assert any(part in str(error.value) for part in named)


@fuzz(30)
@hypothesis.given(trees(arrays(shape=(3,))), trees(st.booleans()))
def test_masks_of_another_structure_are_refused(tree, mask):
  if jax.tree.structure(tree) == jax.tree.structure(mask):
    mopt.l1_norm(tree, mask)
  elif mask is None or isinstance(mask, bool):  # is no tree, but all or none
    assert mopt.l1_norm(tree, mask).dtype == jnp.float32
  else:
    with pytest.raises(ValueError, match='structure of the parameters'):
      mopt.l1_norm(tree, mask)


def leaves_by_name(tree, name=''):
  """Each leaf of a tree of `trees` with the last part of its path, in order."""
  if isinstance(tree, Pair):
    children = zip(Pair._fields, tree)
  elif isinstance(tree, dict):
    children = sorted(tree.items())
  elif isinstance(tree, (list, tuple)):
    children = zip(map(str, range(len(tree))), tree)
  else:
    return [] if tree is None else [(name, tree)]
  return [
    pair for key, child in children for pair in leaves_by_name(child, key)
  ]


@fuzz(60)
@hypothesis.given(trees(arrays(shape=()) | arrays(shape=(2, 2)) | arrays()))
def test_kernels_are_chosen_by_name_and_axes(tree):
  ends = [(n.split('/')[-1], np.ndim(x)) for n, x in leaves_by_name(tree)]
  for mask, sizes in ((mopt.dense_kernels, {2}), (mopt.conv_kernels, {3})):
    found = mask(tree)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    expected = [name == 'kernel' and axes in sizes for name, axes in ends]
    assert jax.tree.leaves(found) == expected


# -- Pruning ------------------------------------------------------------------

# Normal in float32: subnormal thresholds are 0 where XLA has none.
THRESHOLDS = st.sampled_from([1e-30, 3e-4, 1e-3, 1.0, 2.6, 3e38])


def assert_pruned(new, old, tau):
  """What is below the threshold, as its dtype has it, is +0.0; all else stays.

  NaN is not below it, or divergence would look like sparsity.
  """
  with np.errstate(over='ignore'):
    tau = float(np.asarray(tau, np.float32).astype(new.dtype))
  new, old = float64(new), float64(old)
  small = np.abs(old) < tau
  expected = np.where(small, 0.0, old)
  np.testing.assert_array_equal(new, expected)
  assert not np.signbit(new[small]).any()


def is_refused(tau, leaves, chosen):
  """Whether a dtype among the chosen leaves has no such threshold."""
  halves = [x for x, c in zip(leaves, chosen) if c and x.dtype == jnp.float16]
  return bool(halves) and not 6e-8 <= tau < 65504


@fuzz(120)
@hypothesis.given(with_masks(trees(arrays())), THRESHOLDS)
def test_pruned_trees(case, tau):
  tree, mask, chosen = case
  if is_refused(tau, jax.tree.leaves(tree), chosen):
    with pytest.raises(ValueError, match='threshold .* in float16'):
      mopt.prune(tree, tau, mask)
    return
  with np.errstate(over='ignore'):  # 3e38 in float16
    pruned = mopt.prune(tree, tau, mask)
  assert_same_types(pruned, tree)
  leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(pruned), chosen)
  for old, new, is_chosen in leaves:
    assert_pruned(new, old, tau if is_chosen else 0.0)


@st.composite
def params_and_updates(draw):
  """Arrays of one structure and shape, each with a dtype of its own."""
  # A tree that is None is no parameters.
  inner = trees(arrays()).filter(lambda tree: tree is not None)
  params, mask, chosen = draw(with_masks(inner))
  leaves, structure = jax.tree.flatten(params)
  updates = [draw(arrays(shape=leaf.shape)) for leaf in leaves]
  return params, structure.unflatten(updates), mask, chosen


@fuzz(50)
@hypothesis.given(params_and_updates(), THRESHOLDS, st.integers(1, 2))
def test_updates_that_prune(case, tau, every):
  params, updates, mask, chosen = case
  tx = mopt.prune_by_magnitude(tau, mask, every)
  if is_refused(tau, jax.tree.leaves(params), chosen):
    with pytest.raises(ValueError, match='threshold .* in float16'):
      tx.init(params)
    return
  state = tx.init(params)
  with np.errstate(over='ignore', invalid='ignore'):
    found, new_state = tx.update(updates, state, params)
    new = optax.apply_updates(params, found)
    plain = jax.tree.map(
      lambda p, u: jnp.asarray(p) + jnp.asarray(u, p.dtype), params, updates
    )
  assert_same_types(found, params)
  assert_same_types(new_state, state)
  leaves = zip(jax.tree.leaves(plain), jax.tree.leaves(new), chosen)
  for old, x, is_chosen in leaves:
    assert_pruned(x, old, tau if is_chosen and every == 1 else 0.0)
  structure = jax.tree.structure(params)
  count = mopt.count_nonzero(new, structure.unflatten(chosen)).total
  assert int(new_state.nonzeros) == int(count)


# -- Weights and optimizers ---------------------------------------------------


# Compiled once for each m, and not for each call.
solve = jax.jit(mopt.min_norm_weights)
residual = jax.jit(mopt.kkt_residual)


def exact_residual(gramian, weights):
  """`kkt_residual` in fractions."""
  as_fractions = np.vectorize(lambda x: fractions.Fraction(float(x)), 'O')
  gramian, weights = map(as_fractions, (gramian, weights))
  slopes = gramian @ weights
  return float((weights @ slopes - slopes).max())


@pytest.mark.parametrize('m', [2, 3, 5])
@fuzz(60)
@hypothesis.given(st.data())
def test_weights_of_gradients_of_any_length(m, data):
  """Lengths anywhere in the documented range, and all directions."""
  directions = data.draw(
    st.lists(
      st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.9, 1e-3]),
      min_size=4 * m,
      max_size=4 * m,
    )
  )
  exponents = st.lists(st.integers(-14, 18), min_size=m, max_size=m)
  lengths = 10.0 ** np.array(data.draw(exponents))
  gradients = np.reshape(directions, (m, 4)) * lengths[:, None]
  tree = {'a': jnp.asarray(gradients[:, :3]), 'b': jnp.zeros((m, 0))}
  tree['c'] = jnp.asarray(gradients[:, 3])
  gramian = mopt.gramian(tree)
  assert (gramian.shape, gramian.dtype) == ((m, m), jnp.float32)
  exact = gradients @ gradients.T
  norms = np.linalg.norm(gradients, axis=1)
  slack = 1e-6 * np.outer(norms, norms) + 1e-37
  assert (np.abs(np.asarray(gramian) - exact) <= slack).all()
  weights = solve(gramian)
  assert_on_the_simplex(weights)
  found = exact_residual(gramian, weights)
  # What is left by rounding weights, which may cancel, to float32; and more of
  # it where gradients span less than m dimensions, for the solver bends it.
  terms = (np.asarray(weights, np.float64) * norms).sum()
  precision = 1e-6 if m == 2 else 1e-3
  assert found <= precision * norms.max() * terms + 1e-36
  # Halves of smaller weights are subnormal.
  if np.min(weights, initial=1, where=np.asarray(weights) > 0) > 1e-30:
    slack = 1e-6 * abs(found) + 1e-10 * norms.max() * terms + 1e-36
    assert abs(float(residual(gramian, weights)) - found) <= slack
  for bad in (math.nan, math.inf, -math.inf):
    i, j = data.draw(st.tuples(*[st.integers(0, m - 1)] * 2))
    broken = gramian.at[i, j].set(bad).at[j, i].set(bad)
    assert np.isnan(solve(broken)).all()


@pytest.mark.parametrize('m', [2, 4])
@fuzz(100)
@hypothesis.given(st.data())
def test_a_solve_ends_for_any_numbers(m, data):
  """Not symmetric, not positive: no promise but an end without an error."""
  numbers_ = st.floats(width=32, allow_nan=False, allow_infinity=False)
  entries = data.draw(st.lists(numbers_, min_size=m * m, max_size=m * m))
  weights = solve(np.reshape(np.float32(entries), (m, m)))
  assert (weights.shape, weights.dtype) == ((m,), jnp.float32)


OPTIMIZERS = {
  'smgd': lambda m: mopt.smgd(0.1, momentum=0.9, num_objectives=m),
  'mrmsprop': lambda m: mopt.mrmsprop(0.1, num_objectives=m),
  'madam': lambda m: mopt.madam(0.1, num_objectives=m),
  'aggregate': lambda m: mopt.aggregate(
    mopt.fixed_weights((1.0,) * m), num_objectives=m
  ),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
@fuzz(12)
@hypothesis.given(st.data())
def test_optimizers_of_any_tree(name, data):
  m = data.draw(st.integers(2, 3))
  shape = data.draw(st.sampled_from([(), (2, 0), (2, 2)]))
  params = data.draw(trees(arrays(ORDINARY, shape=shape), min_size=1))
  leaves, structure = jax.tree.flatten(params)
  has_nan = data.draw(st.booleans())
  values = (0.0, 1.0, -2.5, 1e3) + (math.nan, math.inf) * has_nan
  grads = structure.unflatten(
    data.draw(arrays(values, (leaf.dtype,), (m, *leaf.shape)))
    for leaf in leaves
  )
  # As a tree, for there may be none.
  prune = mopt.prune_by_magnitude(1e-3, mopt.dense_kernels(params))
  tx = optax.chain(OPTIMIZERS[name](m), prune)
  state = tx.init(params)
  with np.errstate(all='ignore'):  # in NumPy arrays
    updates, new_state = tx.update(grads, state, params)
  assert_same_types(updates, params)
  assert_same_types(new_state, state)
  weights = optax.tree.get(new_state, 'weights')
  is_finite = all(np.isfinite(float64(g)).all() for g in jax.tree.leaves(grads))
  if name == 'aggregate':
    np.testing.assert_array_equal(weights, np.ones(m))
  elif is_finite:
    assert_on_the_simplex(weights)
  else:
    for update in jax.tree.leaves(updates):
      assert np.isnan(float64(update)).all()


# -- Arguments that are no trees ----------------------------------------------
#
# Each call takes one value; what it should take is said beside it. What is
# taken gives no NaN; what is not gives an error that names value or argument.

LARGEST = float(jnp.finfo(jnp.float32).max)
TINIEST = float(jnp.finfo(jnp.float32).tiny)
W = jnp.array([0.5, -2.0])
VALUES = [0.5, -0.5]
POINTS = [[0, 4], [1, 1], [4, 0]]


def is_number(v):
  return isinstance(v, numbers.Real) and not math.isnan(v)


def is_positive(v):
  return is_number(v) and 0 < v <= LARGEST


def is_non_negative(v):
  return is_number(v) and 0 <= v <= LARGEST


def is_finite(v):
  return is_number(v) and abs(v) <= LARGEST


def is_float64(v):
  return is_number(v) and not math.isinf(v)


def is_count(least):
  def is_right(v):
    is_integer = isinstance(v, (int, np.integer)) and not isinstance(v, bool)
    return is_integer and v >= least

  return is_right


def is_threshold(v):
  return is_positive(v) and v >= TINIEST


def never(v):
  return False


def trial(make):
  """The weights of a search that is told of a front until it ends."""

  def run(v):
    strategy = make(v)
    state = strategy.init()
    while not strategy.done(state):
      asked = strategy.ask(state)
      state = strategy.tell(state, asked, [(w, 1 / (w + 1e-9)) for w in asked])
    return np.array([t.weight for t in state.trials])

  return run


CALLS = {
  'lp_norm p': (
    lambda v: mopt.lp_norm(W, v),
    lambda v: is_number(v) and 0 < v < 1,
  ),
  'lp_norm smoothing': (
    lambda v: mopt.lp_norm(W, 0.5, smoothing=v),
    lambda v: is_positive(v) and v > 2e-38,
  ),
  'value_and_stacked_grad has_aux': (
    lambda v: (
      mopt.value_and_stacked_grad(mopt.l1_norm, mopt.l1_norm, has_aux=v) and 0
    ),
    lambda v: isinstance(v, bool),
  ),
  'l1_norm mask': (
    lambda v: mopt.l1_norm({'a': W}, v),
    lambda v: v is None or isinstance(v, bool),
  ),
  'l1_norm leaf of mask': (
    lambda v: mopt.l1_norm({'a': W}, {'a': v}),
    lambda v: isinstance(v, (bool, np.bool_)),
  ),
  'prune threshold': (
    lambda v: mopt.prune(W, v),
    is_threshold,
  ),
  'prune_by_magnitude threshold': (
    lambda v: mopt.prune_by_magnitude(v).init(W).nonzeros,
    is_threshold,
  ),
  'prune_by_magnitude every': (
    lambda v: mopt.prune_by_magnitude(1.0, every=v).init(W).nonzeros,
    is_count(1),
  ),
  'aggregate num_objectives': (
    lambda v: mopt.aggregate(mopt.min_norm_weights, num_objectives=v) and 0,
    is_count(2),
  ),
  'madam learning_rate': (
    lambda v: mopt.madam(v) and 0,
    lambda v: is_finite(v) or callable(v),
  ),
  'madam b2': (
    lambda v: mopt.madam(0.1, b2=v) and 0,
    lambda v: is_non_negative(v) and v < 1,
  ),
  'mrmsprop eps': (lambda v: mopt.mrmsprop(0.1, eps=v) and 0, is_threshold),
  'smgd num_objectives': (
    lambda v: mopt.smgd(0.1, num_objectives=v) and 0,
    lambda v: v is None or is_count(2)(v),
  ),
  'stochastic_dichotomic key': (search.stochastic_dichotomic, never),
  'aggregate weighting': (lambda v: mopt.aggregate(v) and 0, callable),
  'aggregate inner': (
    lambda v: mopt.aggregate(mopt.min_norm_weights, v) and 0,
    lambda v: v is None,
  ),
  'min_norm_weights gramian': (mopt.min_norm_weights, never),
  'kkt_residual weights': (
    lambda v: mopt.kkt_residual(jnp.eye(2), v),
    never,
  ),
  'fixed_weights weights': (mopt.fixed_weights, never),
  'fixed_weights one of weights': (
    lambda v: mopt.fixed_weights((1.0, v))(jnp.eye(2)),
    is_non_negative,
  ),
  'fixed_weights gramian': (mopt.fixed_weights((1.0, 2.0)), never),
  'chebyshev values': (lambda v: mopt.chebyshev(v, [1.0, 1.0]), never),
  'chebyshev one of weights': (
    lambda v: mopt.chebyshev(VALUES, [1.0, v]),
    is_non_negative,
  ),
  'chebyshev one of ideal': (
    lambda v: mopt.chebyshev(VALUES, [1.0, 1.0], [0.0, v]),
    is_finite,
  ),
  'chebyshev rho': (
    lambda v: mopt.chebyshev(VALUES, [1.0, 1.0], rho=v),
    is_non_negative,
  ),
  'epsilon_constraint one of bounds': (
    lambda v: mopt.epsilon_constraint(VALUES, [v], 1.0),
    lambda v: is_finite(v) or (is_number(v) and v == math.inf),
  ),
  'epsilon_constraint penalty': (
    lambda v: mopt.epsilon_constraint(VALUES, [0.0], v),
    is_non_negative,
  ),
  'logistic_drop init_value': (
    lambda v: mopt.logistic_drop(v, 1.0, 10)(3),
    is_positive,
  ),
  'logistic_drop end_value': (
    lambda v: mopt.logistic_drop(1.0, v, 10)(9),
    is_positive,
  ),
  'logistic_drop transition_steps': (
    lambda v: mopt.logistic_drop(1.0, 0.1, v)(3),
    lambda v: is_positive(v) and v >= 1,
  ),
  'inverse_time_decay init_value': (
    lambda v: mopt.inverse_time_decay(v, 0.1)(3),
    is_positive,
  ),
  'inverse_time_decay decay': (
    lambda v: mopt.inverse_time_decay(1.0, v)(3),
    is_non_negative,
  ),
  'by_epoch schedule': (
    lambda v: mopt.by_epoch(v, 10) and 0,
    callable,
  ),
  'by_epoch steps_per_epoch': (
    lambda v: mopt.by_epoch(lambda k: k, v)(3),
    lambda v: is_positive(v) and v >= 1,
  ),
  'nondominated points': (
    mopt.nondominated,
    lambda v: isinstance(v, (list, tuple)) and not v,
  ),
  'nondominated one of points': (
    lambda v: mopt.nondominated([[v, 1], [0, 2]]),
    is_number,
  ),
  'hypervolume one of reference': (
    lambda v: mopt.hypervolume(POINTS, [3, v]),
    is_float64,
  ),
  'knee one of points': (
    lambda v: mopt.knee([[v, 1], [0, 2], [3, 0]]) or 0,
    is_float64,
  ),
  'knee method': (lambda v: mopt.knee(POINTS, v), never),
  'knee scale': (lambda v: mopt.knee(POINTS, scale=v), never),
  'knee_bootstrap num_samples': (
    lambda v: mopt.knee_bootstrap([POINTS], v),
    is_count(1),
  ),
  'knee_bootstrap seed': (
    lambda v: mopt.knee_bootstrap([POINTS], 3, v),
    is_count(0),
  ),
  'grid low': (
    trial(lambda v: search.grid(v, 2.0)),
    lambda v: is_number(v) and 0 < v < 2,
  ),
  'grid num': (trial(lambda v: search.grid(num=v)), is_count(2)),
  'dichotomic high': (
    trial(lambda v: search.dichotomic(1e-3, v)),
    lambda v: is_float64(v) and v > 1e-3,
  ),
  'dichotomic levels': (
    trial(lambda v: search.dichotomic(levels=v)),
    is_count(1),
  ),
  'stochastic_dichotomic min_gap': (
    trial(lambda v: search.stochastic_dichotomic(jax.random.key(0), min_gap=v)),
    lambda v: is_number(v) and 0 < v < 1,
  ),
  'bisection max_trials': (
    trial(lambda v: search.bisection(max_trials=v)),
    is_count(2),
  ),
  'bisection intervals': (
    trial(lambda v: search.bisection(intervals=v)),
    is_count(1),
  ),
  'bisection spacing': (
    lambda v: search.bisection(spacing=v) and 0,
    never,
  ),
}

SCALARS = (
  st.sampled_from([0, 1, 2, 3, 99, -1, True, False])
  | st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.5, -1.5, 1e-3, 0.1 + 0.2])
  | st.sampled_from([math.inf, -math.inf, math.nan])
  # At and beyond the ends of float32 and float64.
  | st.sampled_from([1e-46, 1e-39, 3e38, 1e39, 1e308, -1e39, 5e-324])
  | st.sampled_from([np.float64(0.5), np.int64(3), np.float32('nan')])
  | st.sampled_from(['', 'many', 'None', b'x', None, 1j, Thing(), print])
  | st.sampled_from([[], [0.5], {}, {'a': 1}, (), {3}])
)


@pytest.mark.parametrize('name', CALLS)
@fuzz(60)
@hypothesis.given(SCALARS)
def test_arguments_are_taken_or_refused_by_name(name, value):
  call, is_right = CALLS[name]
  with np.errstate(over='ignore'):  # 1e39 in float32
    if is_right(value):
      assert not np.isnan(np.asarray(call(value), np.float64)).any()
      return
    with pytest.raises((TypeError, ValueError)) as error:
      call(value)
  argument = name.split()[-1]
  named = argument, repr(value), str(value), type(value).__name__, 'a sequence'
  message = str(error.value).lower()
  assert any(part.lower() in message for part in named)


@fuzz(200)
@hypothesis.given(
  st.floats(1e-30, 1e30),
  st.floats(1e-30, 1e30),
  st.integers(1, 2**31 - 1),
  st.integers(0, 2**31 - 1),
)
def test_rates_stay_between_their_ends(init, end, steps, count):
  rate = float(mopt.logistic_drop(init, end, steps)(count))
  low, high = sorted((init, end))
  assert low * (1 - 1e-5) <= rate + 1e-6 * high
  assert rate <= high * (1 + 1e-5)
  assert 0 <= mopt.inverse_time_decay(init, end)(count) <= init
  stepped = mopt.by_epoch(lambda epoch: epoch, steps)
  assert stepped(count) == 1 + count // steps


# -- Fronts -------------------------------------------------------------------

COORDINATES = st.sampled_from(
  [0.0, -0.0, 1.0, 2.0, 3.0, 0.1, 1e300, -1e300, 5e-324, math.inf, -math.inf]
)


def clouds(coordinates, m, max_size=7):
  return st.lists(st.tuples(*[coordinates] * m), max_size=max_size)


def dominates(a, b):
  return all(x <= y for x, y in zip(a, b)) and a != b


@pytest.mark.parametrize('m', [2, 3, 4])
@fuzz(100)
@hypothesis.given(st.data())
def test_fronts_of_any_points_in_any_order(m, data):
  points = data.draw(clouds(COORDINATES, m))
  keep = mopt.nondominated(points)
  assert keep.dtype == bool
  expected = [not any(dominates(q, p) for q in points) for p in points]
  assert keep.tolist() == expected
  order = data.draw(st.permutations(range(len(points))))
  again = [points[i] for i in order] * 2
  assert mopt.nondominated(again).tolist() == [expected[i] for i in order] * 2


@pytest.mark.parametrize('m', [2, 3, 4])
@fuzz(60)
@hypothesis.given(st.data())
def test_hypervolume_is_the_number_of_dominated_cells(m, data):
  points = data.draw(clouds(st.integers(-1, 5), m))
  reference = data.draw(st.tuples(*[st.integers(0, 4)] * m))
  cells = itertools.product(*(range(-1, r) for r in reference))
  expected = sum(
    any(all(x <= c for x, c in zip(p, cell)) for p in points) for cell in cells
  )
  assert mopt.hypervolume(points, reference) == expected
  order = data.draw(st.permutations(points))
  assert mopt.hypervolume([*order, *points], reference) == expected


@pytest.mark.parametrize('method', ['chord', 'tradeoff'])
@pytest.mark.parametrize('scale', ['linear', 'log'])
@fuzz(100)
@hypothesis.given(data=st.data())
def test_knees_of_any_points(method, scale, data):
  sizes = [1.0, 2.0, 3.0, 0.1, 7.5, 1e300, 1e-300, 5e-324]
  if scale == 'linear':
    sizes += [0.0, -1.0, -1e300]
  points = data.draw(clouds(st.sampled_from(sizes), 2))
  index = mopt.knee(points, method, scale)
  order = data.draw(st.permutations(points))
  again = mopt.knee([*order, *points], method, scale)
  if index is None:
    assert again is None
    return
  assert mopt.nondominated(points)[index]
  assert points.index(points[index]) == index
  assert [*order, *points][again] == points[index]
  shares = mopt.knee_bootstrap([points], 2, 0, method, scale)
  assert shares.tolist() == [float(i == index) for i in range(len(points))]


ON_POINTS = {
  'nondominated': mopt.nondominated,
  'hypervolume': lambda points: mopt.hypervolume(points, (9, 9)),
  'knee': mopt.knee,
  'knee_bootstrap': lambda points: mopt.knee_bootstrap([points]),
}


@pytest.mark.parametrize('name', ON_POINTS)
@fuzz(60)
@hypothesis.given(st.lists(st.integers(0, 3), max_size=4), st.data())
def test_arrays_of_other_shapes_are_no_points(name, shape, data):
  points = np.zeros(shape)
  most = 3 if name == 'nondominated' else 2
  is_right = len(shape) == 2 and 2 <= shape[1] <= most
  # As an empty list is.
  if is_right or (shape == [0] and name != 'knee_bootstrap'):
    ON_POINTS[name](points)
  else:
    with pytest.raises(ValueError, match='must be .* got shape'):
      ON_POINTS[name](points)
  if is_right and points.size:
    points.flat[data.draw(st.integers(0, points.size - 1))] = math.nan
    with pytest.raises(ValueError, match='NaN'):
      ON_POINTS[name](points)


# -- Searches -----------------------------------------------------------------

OUTCOMES = st.sampled_from(
  [0.0, 1.0, 2.0, 3.5, 1e-9, 1e308, -1e308, 5e-324, math.inf, math.nan]
)


@st.composite
def searches(draw):
  """Any of the strategies with arguments that it takes, and its limits."""
  ends = st.sampled_from(
    [0.0, 5e-324, 1e-300, 1e-9, 1e-5, 1e-2, 0.5, 1.0, 1.0 + 1e-7, 7.0, 1e308]
  )
  low, high = sorted(draw(st.tuples(ends, ends).filter(lambda e: e[0] != e[1])))
  spacing = draw(st.sampled_from(['linear', 'log'])) if low else 'linear'
  scalarization = draw(st.sampled_from(['penalty', 'convex']))
  if high > 1:
    scalarization = 'penalty'
  levels, most = draw(st.integers(1, 5)), draw(st.integers(2, 9))
  name = draw(
    st.sampled_from(['grid', 'dichotomic', 'stochastic', 'paper', 'bisection'])
  )
  if name == 'grid':
    strategy, levels = search.grid(low, high, most, spacing), 1
  elif name == 'dichotomic':
    strategy = search.dichotomic(low, high, levels, most, scalarization)
  elif name == 'bisection':
    intervals = draw(st.integers(1, 3))
    strategy = search.bisection(low, high, levels, most, spacing, intervals)
  else:
    key = jax.random.key(draw(st.integers(0, 9)))
    strategy = search.stochastic_dichotomic(
      *(key, low, high, levels, most, scalarization),
      paper_rule=name == 'paper',
    )
  return strategy, low, high, levels, most


@fuzz(300)
@hypothesis.given(searches(), st.data())
def test_searches_end_and_stay_in_their_range(case, data):
  strategy, low, high, levels, most = case
  state = strategy.init()
  with np.errstate(all='ignore'):
    while not strategy.done(state):
      weights = strategy.ask(state)
      assert state.level < levels
      told = [data.draw(st.tuples(OUTCOMES, OUTCOMES)) for _ in weights]
      state = strategy.tell(state, weights, told)
  tried = [t.weight for t in state.trials]
  assert len(set(tried)) == len(tried) <= most
  assert all(low <= weight <= high for weight in tried)
  assert {tried[0], max(tried)} == {low, high} or levels == 1
