"""How a run weighs its objectives: `--weighting`, from a name to the step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import mopt
from mopt.training import Config
from mopt.training import Job
from mopt.training import optimizer as optimizer_lib
from mopt.training import run
from mopt.training import weighting as weighting_lib
from mopt.training.config import WEIGHTINGS
from mopt.training.loop import Interrupted
from mopt.training.population import file_names
from tests.devices import first_devices
from tests.networks import Tiny

M = 5
NAMES = tuple(f'lp:0.{i}' for i in range(1, M))
FOUND = [name for name in WEIGHTINGS if name != 'fixed']
NEEDS = {'modo': 'modo:0.1'}


def make_config(name, **kwargs):
  return Config(objectives=('error', *NAMES), weighting=name, **kwargs)


def weigh(weighting, gramian, steps=2):
  """Weights of the last of a few steps."""
  weighting = mopt.as_weighting(weighting)
  state, values = weighting.init(M), jnp.arange(1.0, M + 1)
  for _ in range(steps):
    weights, state = weighting.update(gramian, state, values=values)
  return np.asarray(weights)


def make_gramian():
  rng = np.random.default_rng(0)
  gradients = rng.integers(-8, 9, (M, 8)).astype(np.float32)
  return jnp.asarray(gradients @ gradients.T)


def test_settings_and_trainer_know_the_same_names():
  assert set(FOUND) == set(weighting_lib._CHOICES)
  public = {name for name in mopt.__all__ if callable(getattr(mopt, name))}
  # All that is exported under a name of its own.
  assert set(FOUND) - public == {'min_norm'}
  assert set(weighting_lib._AROUND) <= public


@pytest.mark.parametrize('name', FOUND)
def test_every_weighting_suits_five_objectives(name):
  config = make_config(NEEDS.get(name, name))
  weighting_lib.check_weighting(config)
  key = jax.random.key(0)
  found = weighting_lib.make_weighting(config, jnp.zeros(M), key)
  assert np.isfinite(weigh(found, make_gramian())).all()


KEY = jax.random.key(7)
SPELLED = {
  'min_norm': mopt.min_norm_weights,
  'upgrad': mopt.upgrad,
  'cagrad:0.25': lambda g: mopt.cagrad(0.25)(g),
  'fairgrad:1.5': lambda g: mopt.fairgrad(1.5)(g),
  'krum:2': lambda g: mopt.krum(n_byzantine=2)(g),
  'pcgrad': lambda: mopt.pcgrad(KEY),
  'stch:2': lambda: mopt.stch(2.0),
  'every:2/upgrad': lambda: mopt.every(mopt.upgrad, 2),
  'smoothed:0.5/every:2/upgrad': lambda: mopt.smoothed(
    mopt.every(mopt.upgrad, 2), 0.5
  ),
  'normalized:loss/dual_proj': lambda: mopt.normalized(mopt.dual_proj, 'loss'),
  'preferred:1,2,3,4,5/upgrad': lambda: mopt.preferred(
    mopt.upgrad, (1.0, 2.0, 3.0, 4.0, 5.0)
  ),
}


@pytest.mark.parametrize('name', SPELLED)
def test_a_name_is_the_weighting_of_that_name(name):
  expected = SPELLED[name]
  if getattr(expected, '__name__', '') == '<lambda>' and not (
    expected.__code__.co_argcount
  ):
    expected = expected()
  found = weighting_lib.make_weighting(make_config(name), jnp.zeros(M), KEY)
  np.testing.assert_array_equal(
    weigh(found, make_gramian()), weigh(expected, make_gramian())
  )


TWO = ('error', 'l1')
REFUSED = {
  'nothing': 'expected fixed, min_norm, mean, ',
  '': 'expected fixed, min_norm, mean, ',
  'upgrad/': 'expected fixed, min_norm, mean, ',
  'every:3/fixed': 'expected fixed, min_norm, mean, ',
  'upgrad:3': 'expected no number after upgrad.',
  'cagrad:far': 'expected a number, the c, after cagrad.',
  'cagrad:-1': 'c must be ',
  'modo': 'expected step_size after modo, as modo:...',
  'krum': 'krum ',
  'krum:0.5': 'expected a number, the n_byzantine, after krum.',
  'every/upgrad': 'expected n after every, as every:...',
  'often:3/upgrad': 'expected one of every, smoothed, normalized, preferred '
  'before a slash.',
  'normalized:l3/upgrad': 'by must be ',
  'preferred:1,2,3/upgrad': '3 preferences need a Gramian (3, 3), got ',
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_weighting_is_refused(name):
  with pytest.raises(ValueError) as caught:
    weighting_lib.check_weighting(Config(objectives=TWO, weighting=name))
  start = f'weighting={name}: {REFUSED[name]}'
  assert str(caught.value)[: len(start)] == start
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (
      dict(weighting='upgrad', l1=(1e-3,)),
      'l1=0.001: weighting=upgrad finds the weights at every step; expected no '
      'l1, or weighting=fixed.',
    ),
    (
      dict(weighting='upgrad', weights=((1.0, 1e-3),), optimizer='madam'),
      'weights=1,0.001: weighting=upgrad finds the weights at every step; '
      'expected no weights, or weighting=fixed.',
    ),
    (
      dict(weighting='mean', search='grid'),
      'search=grid: weighting=mean finds the weights at every step; expected '
      'weighting=fixed.',
    ),
    (
      dict(optimizer='madam', search='grid'),
      'search=grid: optimizer=madam finds the weights at every step; expected '
      'weighting=fixed.',
    ),
  ],
)
def test_weights_that_are_found_are_not_given(kwargs, message):
  with pytest.raises(ValueError) as caught:
    Config(**kwargs)
  assert str(caught.value) == message


def test_the_multiobjective_optimizers_take_fixed_weights_too():
  config = Config(optimizer='madam', weighting='fixed', l1=(1e-3, 1e-2))
  assert config.all_weights == ((1.0, 1e-3), (1.0, 1e-2))
  assert Config(optimizer='madam').all_weights == (None,)
  assert Config(weighting='upgrad').all_weights == (None,)


def test_files_are_named_by_optimizer_and_weighting():
  name = lambda **kwargs: file_names(Config(**kwargs))[0]
  assert name(optimizer='madam') == 'madam_seed_0'
  assert name(weighting='cagrad:0.5') == 'adam_cagrad_0.5_seed_0'
  found = name(weighting='preferred:1,2/upgrad', optimizer='smgd')
  assert found == 'smgd_preferred_1_2_upgrad_seed_0'


CHAINS = {
  'smgd': lambda w: mopt.smgd(1e-2, 0.9, weighting=w),
  'sgd': lambda w: optax.chain(
    mopt.aggregate(w),
    optax.scale_by_learning_rate(1e-2),
    optax.trace(0.9),
  ),
  'madam': lambda w: mopt.madam(1e-2, weighting=w),
  'adam': lambda w: optax.chain(mopt.aggregate(w), optax.adam(1e-2)),
  'mrmsprop': lambda w: mopt.mrmsprop(1e-2, weighting=w),
  'rmsprop': lambda w: optax.chain(
    mopt.aggregate(w),
    optax.scale_by_rms(0.9, 1e-7, eps_in_sqrt=False),
    optax.scale_by_learning_rate(1e-2),
  ),
}


@pytest.mark.parametrize('name', CHAINS)
def test_optimizers_weigh_directions_or_gradients(name):
  config = Config(
    optimizer=name,
    weighting='upgrad',
    learning_rate=1e-2,
    schedule='constant',
    prune='none',
  )
  rng = np.random.default_rng(0)
  params = {'w': jnp.zeros(4)}
  txs = (
    optimizer_lib.make_optimizer(config, 10, jnp.zeros(2)),
    CHAINS[name](mopt.upgrad),
  )
  states = [tx.init(params) for tx in txs]
  for _ in range(3):
    grads = {'w': jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)}
    pairs = [tx.update(grads, s, params) for tx, s in zip(txs, states)]
    states = [state for _, state in pairs]
    found, expected = (updates['w'] for updates, _ in pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
  'settings',
  [
    dict(optimizer='madam', weighting='normalized:l2/upgrad'),
    dict(weighting='famo', objectives=('error', 'l1', 'group')),
    dict(optimizer='smgd', weighting='smoothed/pcgrad', seed=(0, 1)),
  ],
  ids=lambda settings: settings['weighting'],
)
@pytest.mark.slow
def test_a_run_goes_on_with_the_state_of_its_weighting(
  few_digits, tmp_path, settings
):
  """Three epochs at once, and with a stop after each: 15 s, for it compiles."""

  def train(name, **more):
    workdir = tmp_path / name
    workdir.mkdir(exist_ok=True)
    config = Config(epochs=3, batch_size=16, prune='none', **settings)
    job = Job(config, Tiny(), few_digits, workdir, console=Console(quiet=True))
    return run(job._replace(devices=first_devices(1), **more))

  rows = train('whole')
  for _ in range(2):
    with pytest.raises(Interrupted):
      train('parts', should_stop=lambda: True)
  assert str(train('parts')) == str(rows)  # Some of it is NaN.
  names = ('whole', 'parts')
  first, second = ((tmp_path / n / 'metrics.jsonl').read_text() for n in names)
  assert first == second
  records = [json.loads(line) for line in first.splitlines()]
  for record in records:
    shown = [record[f'weight_{n}'] for n in ('error', 'l1')]
    assert np.isfinite(shown).all()
  # They are found, and so they change, and are no column of what was given.
  assert len({record['weight_l1'] for record in records}) > 2
  assert [row['weight_l1'] for row in rows] == [None] * len(rows)
  if len(rows) == 2:  # Seeds draw other orders.
    assert records[0]['weight_l1'] != records[1]['weight_l1']


def test_the_command_line_takes_a_weighting_and_refuses_in_one_line(
  call, tmp_path
):
  few = ('--model=mlp', '--train_size=320', '--epochs=1', '--workdir=run')
  code, _, err = call(*few, '--optimizer=madam', '--weighting=cagrad:0.4')
  assert (code, err) == (0, '')
  members = [path.name for path in (tmp_path / 'run' / 'members').iterdir()]
  assert members == ['madam_cagrad_0.4_seed_0.npz']
  code, out, err = call('--weighting=krum', '--workdir=other')
  assert (code, out) == (2, '')
  assert err.startswith('train.py: weighting=krum: krum ')
  assert err.count('\n') == 1
  assert not (tmp_path / 'other').exists()
