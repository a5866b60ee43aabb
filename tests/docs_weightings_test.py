"""The examples of docs/weightings.md run, and what its tables say is so."""

import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mopt

_ROOT = pathlib.Path(__file__).parents[1]
_PAGE = (_ROOT / 'docs' / 'weightings.md').read_text()
M = 4
KEY = jax.random.key(0)
MADE = {
  'fairgrad': lambda: mopt.fairgrad(2.0),
  'cagrad': lambda: mopt.cagrad(0.5),
  'krum': lambda: mopt.krum(),
  'pcgrad': lambda: mopt.pcgrad(KEY),
  'gradvac': lambda: mopt.gradvac(KEY),
  'modo': lambda: mopt.modo(1e-3),
  'fixed_weights': lambda: mopt.fixed_weights((1.0,) * M),
  'random': lambda: mopt.random(KEY),
  'stch': lambda: mopt.stch(),
}


def _blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', _PAGE, re.DOTALL)


def _promises():
  """From each weighting to what the second table says of it."""
  table = _PAGE.partition('| weighting |')[2].partition('\n\n')[0]
  found = {}
  for line in table.splitlines()[2:]:
    names, *columns = [cell.strip() for cell in line.strip('|').split('|')]
    for name in re.findall(r'`(\w+)', names):
      found[name] = columns
  return found


PROMISES = _promises()


def _make(name):
  if name in MADE:
    return mopt.as_weighting(MADE[name]())
  thing = getattr(mopt, name)
  try:
    return mopt.as_weighting(thing())
  except TypeError:  # It wants a Gramian.
    return mopt.as_weighting(thing)


def _gradients(count=20):
  """Integers that conflict, and do not depend on each other."""
  rng = np.random.default_rng(0)
  gradients = rng.integers(-8, 9, (count, M, 6)).astype(float)
  return 4 * gradients - (3 * gradients.mean(axis=1, keepdims=True)).round()


def _directions(name, gradients):
  """Of the first step, in float64."""
  weighting = _make(name)
  state, values = weighting.init(M), jnp.arange(1.0, M + 1)
  weigh = jax.jit(lambda g: weighting.update(g, state, values=values)[0])
  gramians = jnp.asarray(gradients @ gradients.swapaxes(1, 2), jnp.float32)
  weights = np.array([weigh(g) for g in gramians], float)
  return np.einsum('km,kmn->kn', weights, gradients)


def test_the_table_has_every_weighting():
  around = {'preferred', 'normalized', 'smoothed', 'every'}
  public = {
    name
    for module, names in mopt._NAMES.items()
    if module.startswith('weightings.')
    for name in names
  } - {'Weighting', 'as_weighting'}
  assert set(PROMISES) | around == public | {'min_norm_weights'}
  for name in around:
    assert f'{name}(' in _PAGE
  help_ = mopt.weightings.__doc__
  assert not [name for name in PROMISES if name not in help_]


@pytest.mark.parametrize('name', PROMISES)
def test_what_is_never_against_an_objective(name):
  """With independent gradients, to first order."""
  gradients = _gradients()
  directions = _directions(name, gradients)
  slopes = np.einsum('kmn,kn->km', gradients, directions)
  sizes = np.linalg.norm(gradients, axis=2)
  sizes *= np.linalg.norm(directions, axis=1)[:, None]
  promise = PROMISES[name][0]
  if promise in ('yes', 'if independent'):
    assert (slopes >= -1e-5 * sizes).all()
  elif promise == 'no':
    assert (slopes < -1e-2 * sizes).any()


@pytest.mark.parametrize('name', PROMISES)
def test_whose_direction_does_not_depend_on_scales(name):
  gradients = _gradients()
  factors = 2.0 ** np.arange(-3, M - 3)
  promise = PROMISES[name][1]
  if name in ('famo', 'dwa', 'gls'):  # Scales of losses, which the values are.
    return
  first = _directions(name, gradients)
  second = _directions(name, gradients * factors[:, None])
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  off = np.linalg.norm(unit(first) - unit(second), axis=1)
  if promise == 'yes':
    assert (off < 1e-4).all()
  elif promise == 'no' and name != 'krum':
    assert (off > 1e-2).any()


@pytest.mark.parametrize('name', ['famo', 'dwa', 'gls'])
def test_whose_weights_follow_the_scales_of_losses(name):
  """So that the direction is the same: the gradients have those scales, too."""
  weighting = _make(name)
  factors = np.float32([0.25, 1, 2, 8])
  found = []
  for scale in (np.ones(M, np.float32), factors):
    state, losses = weighting.init(M), np.random.default_rng(1)
    for _ in range(4):
      values = jnp.asarray(scale * losses.uniform(1, 2, M), jnp.float32)
      weights, state = weighting.update(jnp.eye(M), state, values=values)
    found.append(np.asarray(weights) * scale)
  first, second = (x / np.linalg.norm(x) for x in found)
  if name == 'dwa':  # Of losses alone: weights stay, and gradients do not.
    first, second = found[0], found[1] / factors
  np.testing.assert_allclose(first, second, rtol=1e-4)


@pytest.mark.parametrize('name', PROMISES)
def test_what_remembers_and_what_needs_values(name):
  weighting = _make(name)
  remembers = bool(jax.tree.leaves(weighting.init(M)))
  told, needs = PROMISES[name][2:]
  wanted = {'yes': True, 'no': False}.get(told)
  if wanted is None:
    wanted = name not in ('mean', 'fixed_weights', 'gls')
  assert remembers == wanted
  update = lambda: weighting.update(jnp.eye(M), weighting.init(M))
  if needs == 'yes':
    with pytest.raises(ValueError, match=f'{name} needs the values'):
      update()
  else:
    update()


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(call, tmp_path):
  """One training, which compiles: 10 s."""
  names = {}
  for block in _blocks('python'):
    exec(block, names)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 5)).astype(np.float32)
  batch = {'x': x, 'y': x[:, :1], 'z': np.abs(x[:, 1:2])}
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32) / 4
  params = {'trunk': draw(5, 8), 'heads': [draw(8, 1), draw(8, 1)]}
  start = params
  state, history = names['tx'].init(params), []
  for _ in range(100):
    params, state, values = names['step'](params, state, batch)
    history.append(values)
  assert (history[-1] < 0.9 * history[0]).all()
  # The other transformations take the same gradients.
  _, grads = names['grad_fn'](start, batch)
  for tx in [
    names['tasks'],
    *(
      mopt.aggregate(names[name])
      for name in (
        'calm',
        'alike',
        'first',
        'by_largest',
        'by_largest_so_far',
      )
    ),
  ]:
    updates, _ = tx.update(grads, tx.init(start), start, values=history[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert optax.tree.norm(updates) > 0
  (command,) = map(shlex.split, _blocks('sh'))
  assert command[:2] == ['python', 'CHECKOUT/train.py']
  code, _, err = call(*command[2:], '--epochs=1', '--train_size=640')
  assert (code, err) == (0, '')
  assert (tmp_path / 'upgrad' / 'members' / 'madam_upgrad_seed_0.npz').is_file()
