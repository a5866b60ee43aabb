"""Any number of objectives in a run, by name, and what may be pruned.

A test that trains compiles one small network or two, 3 to 6 s each; those that
take longer say why.
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import models
import mopt
from mopt import training
from mopt.training import Config
from mopt.training import files
from mopt.training import Job
from mopt.training import objectives as objectives_lib
from mopt.training import records
from mopt.training.data import Split
from mopt.training.evaluation import Evaluation
from mopt.training.objectives import make_objectives
from mopt.training.population import file_names
from mopt.training.population import make_population
from mopt.training.program import check_job
from mopt.training.program import Complexity
from mopt.training.program import make_program
from mopt.training.step import Failure
from tests.devices import first_devices
from tests.networks import Convolutional
from tests.networks import Tiny

pytestmark = pytest.mark.usefixtures('exact_products')

_ROOT = pathlib.Path(__file__).parents[1]
_THREE = ('error', 'l1', 'group')
_WEIGHTS = (1.0, 3e-3, 1e-3)
_NONE = types.MappingProxyType({})


def _shapes(model):
  image = jnp.zeros((1, 28, 28, 1))
  return jax.eval_shape(model.init, jax.random.key(0), image)['params']


@pytest.fixture(scope='module', autouse=True)
def fast_compiler():
  """Networks need not be fast here, but compiled."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def _digits(number=32):
  """So many real digits of all classes in each split.

  Splits of one size, so that what evaluates is compiled once.
  """

  def take(split):
    chosen = np.linspace(0, len(split.labels) - 1, number).astype(int)
    return Split(split.images[chosen], split.labels[chosen])

  data = training.load_dataset('mnist5k')
  return data._replace(
    train=take(data.train), val=take(data.val), test=take(data.test)
  )


def _error_of(function, *args, **kwargs):
  with pytest.raises(ValueError) as error:
    function(*args, **kwargs)
  return str(error.value)


# In float64, as a reader of the help would write them.
_FORMULAS = {
  'l1': lambda w: np.abs(w).sum(),
  'l2': lambda w: (w**2).sum(),
  'lp': lambda w: ((w**2 + 1e-6) ** 0.25 - 1e-3**0.5).sum(),
  'lp:0.5': lambda w: ((w**2 + 1e-6) ** 0.25 - 1e-3**0.5).sum(),
  'lp:0.7': lambda w: ((w**2 + 1e-6) ** 0.35 - 1e-3**0.7).sum(),
  'group': lambda w: (
    np.sqrt((w**2).sum(axis=tuple(range(w.ndim - 1)))).sum()
    if w.ndim > 1
    else 0.0
  ),
}
_KERNELS = {
  'dense': ['layer1/kernel', 'layer2/kernel', 'layer3/kernel'],
  'kernels': [
    'conv1/kernel',
    'layer1/kernel',
    'layer2/kernel',
    'layer3/kernel',
  ],
  'all': [
    *('conv1/bias', 'conv1/kernel', 'layer1/bias', 'layer1/kernel'),
    *('layer2/bias', 'layer2/kernel', 'layer3/bias', 'layer3/kernel'),
  ],
  'layer[12]/': [
    *('layer1/bias', 'layer1/kernel', 'layer2/bias', 'layer2/kernel'),
  ],
}


def _leaves(params):
  """The leaves by path."""
  return {
    '/'.join(key.key for key in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@pytest.mark.parametrize('prunable', _KERNELS)
def test_each_objective_is_of_what_may_be_pruned(prunable):
  names = ('error', *_FORMULAS)
  weights = ((1.0,) * len(names),)
  config = Config(objectives=names, weights=weights, prunable=prunable)
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32),
    _shapes(Tiny()),
  )
  found = make_objectives(config)
  assert found.names == names
  assert list(found.of_params) == list(names[1:])
  for name, function in zip(names[1:], found.others):
    chosen = [_leaves(params)[path] for path in _KERNELS[prunable]]
    wanted = sum(_FORMULAS[name](np.asarray(x, float)) for x in chosen)
    np.testing.assert_allclose(function(params), wanted, rtol=1e-5)


@pytest.mark.parametrize(
  ('second', 'message'),
  [
    (
      'l3',
      'objectives=l3: expected error first, and then one or more of l1, l2, '
      'group, log_sum, lp.',
    ),
    (
      'l3:0.5',
      'objectives=l3:0.5: expected error first, and then one or more of l1, '
      'l2, group, log_sum, lp.',
    ),
    ('l1:2', 'objectives=l1:2: expected no number after l1.'),
    ('group:0', 'objectives=group:0: expected no number after group.'),
    (
      'lp:1.5',
      'objectives=lp:1.5: p must lie between 0 and 1, got 1.5: use l1_norm for '
      '1 and l2_norm_squared for 2.',
    ),
    (
      'lp:nan',
      'objectives=lp:nan: p must lie between 0 and 1, got nan: use l1_norm for '
      '1 and l2_norm_squared for 2.',
    ),
    ('lp:half', 'objectives=lp:half: expected a number after lp.'),
  ],
)
def test_what_is_no_objective_is_refused(second, message):
  config = Config(objectives=('error', second))
  assert _error_of(make_objectives, config) == message


def _smooth(params):
  return jnp.sum(params['layer1']['bias'] ** 2)


@pytest.mark.parametrize(
  'name',
  [
    *('error', 'l1', 'lp', 'lp:0.3', 'seed', 'file', 'level', 'status'),
    *('params', 'pareto', 'knee', 'epoch', 'learning_rate', 'when', 'layer'),
    *('nonzeros', 'nonzeros_all', 'nonzeros_conv1', 'accuracy_val'),
    *('ce_train', 'weight_l1', 'grad_norm_l1', 'cosine_error_l1'),
    *('l1_min', 'l1_max'),
  ],
)
def test_an_objective_of_your_own_takes_no_name_of_ours(name):
  assert _error_of(make_objectives, Config(), {name: _smooth}) == (
    f'objectives={name}: expected another name for an objective of your own; '
    'this one is taken.'
  )


def test_names_of_your_own_may_resemble_ours():
  # Which begin as columns do, or end so.
  for name in ('l', 'centre', 'seeds', 'weighty', 'minimum', 'error2'):
    config = Config(objectives=('error', name))
    found = make_objectives(config, {name: _smooth})
    assert found.others == (_smooth,)


def test_a_message_lists_your_own():
  config = Config(objectives=('error', 'smoth'))
  assert _error_of(make_objectives, config, {'smooth': _smooth}) == (
    'objectives=smoth: expected error first, and then one or more of l1, l2, '
    'group, log_sum, lp, smooth.'
  )


def test_an_objective_of_your_own_is_asked_for():
  own = {'smooth': _smooth, 'other': _smooth}
  config = Config(objectives=('error', 'smooth'))
  assert _error_of(make_objectives, config, own) == (
    'objectives=error,smooth: expected other among them, an objective of your '
    'own.'
  )


def test_angles_of_two_pairs_need_two_names():
  own = dict.fromkeys(('a', 'a_b', 'b_c', 'c'), _smooth)
  names = ('error', *own)
  config = Config(objectives=names, optimizer='madam')
  assert _error_of(make_objectives, config, own) == (
    'objectives=error,a,a_b,b_c,c: expected names by which all pairs can be '
    'told, got a_b_c twice.'
  )


@pytest.mark.parametrize('prunable', _KERNELS)
def test_what_may_be_pruned(prunable):
  mask = objectives_lib.prunable(Config(prunable=prunable))
  found = _leaves(mask(_shapes(Tiny())))
  assert [path for path, keep in found.items() if keep] == _KERNELS[prunable]
  objectives_lib.check_prunable(Config(prunable=prunable), _shapes(Tiny()))


def test_what_may_be_pruned_of_lenet5():
  shapes = _shapes(models.create('lenet5'))
  sizes = {}
  for prunable in ('dense', 'kernels', 'all', 'conv'):
    mask = _leaves(objectives_lib.prunable(Config(prunable=prunable))(shapes))
    chosen = [x for path, x in _leaves(shapes).items() if mask[path]]
    sizes[prunable] = sum(int(np.prod(x.shape)) for x in chosen)
  dense = 400 * 120 + 120 * 84 + 84 * 10
  conv = 3 * 3 * 6 + 3 * 3 * 6 * 16
  assert sizes['dense'] == dense
  assert sizes['kernels'] == dense + conv
  assert sizes['all'] == dense + conv + 120 + 84 + 10 + 6 + 16 == 60_074
  assert sizes['conv'] == conv + 6 + 16


@pytest.mark.parametrize(
  ('prunable', 'message'),
  [
    (
      'dense',
      'prunable=dense: expected a dense layer, a leaf named kernel with two '
      'axes, to penalise, prune and count the weights of; the leaves of the '
      'network are conv1/bias, conv1/kernel, conv2/bias, conv2/kernel.',
    ),
    (
      'layer',
      'prunable=layer: expected a pattern that is found in the path of a leaf, '
      'to penalise, prune and count the weights of; the leaves of the network '
      'are conv1/bias, conv1/kernel, conv2/bias, conv2/kernel.',
    ),
  ],
)
def test_where_nothing_is_found_it_is_said(prunable, message):
  job = Job(Config(prunable=prunable), Convolutional(), _digits())
  assert _error_of(check_job, job) == message


class Mean(nn.Module):
  """No parameters at all."""

  @nn.compact
  def __call__(self, images):
    return jnp.zeros((len(images), 10)) + images.mean()


class Scaled(nn.Module):
  """Parameters, but no kernel."""

  @nn.compact
  def __call__(self, images):
    scale = self.param('scale', nn.initializers.ones, (10,))
    return scale[None] * images.mean(axis=(1, 2))


def test_without_a_kernel_or_a_leaf_it_is_said():
  def message(prunable, model):
    return _error_of(
      check_job, Job(Config(prunable=prunable), model, _digits())
    )

  assert message('kernels', Scaled()) == (
    'prunable=kernels: expected a leaf named kernel with two axes or more, to '
    'penalise, prune and count the weights of; the leaves of the network are '
    'scale.'
  )
  assert message('all', Mean()) == (
    'prunable=all: expected at least one leaf, to penalise, prune and count '
    'the weights of; the leaves of the network are none.'
  )


@pytest.mark.parametrize(
  ('text', 'reason'),
  [('', ''), ('(', ' (missing ), unterminated subpattern at position 0)')],
)
def test_what_is_no_pattern_is_refused(text, reason):
  assert _error_of(Config, prunable=text) == (
    f'prunable={text}: expected dense, kernels, all or a regular expression'
    f'{reason}.'
  )


@pytest.mark.parametrize(
  ('prunable', 'default'),
  [
    ('dense', 1e-4),
    ('layer', 1e-4),
    ('bias', 1e-4),
    ('kernels', 0.0),
    ('all', 0.0),
    ('conv1/kernel', 0.0),
  ],
)
def test_the_squares_of_convolutions_count_where_nothing_else_does(
  prunable, default
):
  shapes = _shapes(Tiny())
  factor = lambda **kwargs: objectives_lib.conv_l2(
    Config(prunable=prunable, **kwargs), shapes
  )
  assert factor() == default
  assert factor(conv_l2=0.0) == 0.0
  assert factor(conv_l2=0.25) == 0.25


def test_columns_of_leaves():
  columns = lambda prunable, **kwargs: objectives_lib.leaf_columns(
    Config(prunable=prunable), _shapes(Tiny()), **kwargs
  )
  assert columns('kernels') == [
    f'nonzeros_{name}' for name in ('conv1', 'layer1', 'layer2', 'layer3')
  ]
  assert columns('layer1') == ['nonzeros_layer1_bias', 'nonzeros_layer1']
  assert columns('layer1', min_axes=2) == ['nonzeros_layer1']


@pytest.mark.parametrize('zeroed', ['layer2/bias', 'layer2/kernel'])
def test_a_bias_of_zeros_is_no_collapse_but_a_kernel_is(zeroed):
  config = Config(prunable='all')
  params = jax.tree.map(lambda x: jnp.ones((1, *x.shape)), _shapes(Tiny()))
  layer, leaf = zeroed.split('/')
  params[layer][leaf] = jnp.zeros_like(params[layer][leaf])
  count = jax.vmap(mopt.count_nonzero)(params)
  one = np.ones(1)
  (row,) = records.result_rows(
    config.objectives,
    make_population(dataclasses.replace(config, l1=(1e-3,))),
    dict.fromkeys(('train', 'val', 'test'), Evaluation(one, one)),
    Complexity(count, {'l1': one}, one, one),
    Failure(*np.zeros((3, 1), int)),
    objectives_lib.leaf_columns(config, _shapes(Tiny()), min_axes=2),
    chance=0.1,
  )
  assert (
    row['nonzeros_layer2_bias' if leaf == 'bias' else 'nonzeros_layer2'] == 0
  )
  assert row['status'] == ('ok' if leaf == 'bias' else 'collapsed')


_FINDS = 'optimizer=madam finds the weights at every step'
_REFUSED = {
  'l1 with three': (
    dict(objectives=_THREE, l1=(1e-3,)),
    'l1=0.001: expected two objectives, got error,l1,group.',
  ),
  'convex with three': (
    dict(objectives=_THREE, scalarization='convex', weights=(_WEIGHTS,)),
    'scalarization=convex: expected two objectives, got error,l1,group.',
  ),
  'conv_l2_in_both with three': (
    dict(objectives=_THREE, conv_l2_in_both=True, optimizer='madam'),
    'conv_l2_in_both=True: expected two objectives, got error,l1,group.',
  ),
  'search with three': (
    dict(objectives=_THREE, search='bisection', weights=(_WEIGHTS,)),
    'search=bisection: expected two objectives, got error,l1,group.',
  ),
  'no weights': (
    dict(objectives=_THREE),
    'weights=: expected the weights of error, l1 and group, as 1,3e-4,1e-4; '
    'or a weighting that finds them, as weighting=upgrad.',
  ),
  'too few': (
    dict(objectives=_THREE, weights=(_WEIGHTS, (1.0, 1e-3))),
    'weights=1,0.001: expected 3 numbers, for error,l1,group.',
  ),
  'too many': (
    dict(weights=(_WEIGHTS,)),
    'weights=1,0.003,0.001: expected 2 numbers, for error,l1.',
  ),
  'with l1': (
    dict(weights=((1.0, 1e-3),), l1=(1e-3,)),
    'weights=1,0.001: expected no weights with l1=0.001.',
  ),
  'with madam': (
    dict(weights=((1.0, 1e-3),), optimizer='madam'),
    f'weights=1,0.001: {_FINDS}; expected no weights, or weighting=fixed.',
  ),
  'with convex': (
    dict(weights=((1.0, 1e-3),), scalarization='convex'),
    'weights=1,0.001: expected no weights with scalarization=convex.',
  ),
  'with a search': (
    dict(weights=((1.0, 1e-3), (1.0, 1e-2)), search='grid'),
    'weights=1,0.001;1,0.01: expected no weights with search=grid.',
  ),
  'negative': (
    dict(weights=((1.0, -1e-3),)),
    'weights=1,-0.001: expected numbers >= 0, finite in float32, not all 0.',
  ),
  'NaN': (
    dict(weights=((1.0, float('nan')),)),
    'weights=1,nan: expected numbers >= 0, finite in float32, not all 0.',
  ),
  'infinite in float32': (
    dict(weights=((1.0, 1e39),)),
    'weights=1,1e+39: expected numbers >= 0, finite in float32, not all 0.',
  ),
  'all 0': (
    dict(weights=((1.0, 1e-3), (0.0, 0.0))),
    'weights=1,0.001;0,0: expected numbers >= 0, finite in float32, not all 0.',
  ),
  'twice': (
    dict(weights=((1.0, 1e-3), (1.0, 1e-3))),
    'weights=1,0.001;1,0.001: expected no member twice.',
  ),
  'none': (dict(weights=()), 'weights=: expected at least one member.'),
  'one objective': (
    dict(objectives=('error',)),
    'objectives=error: expected error, and then at least one other, NAME or '
    'NAME:NUMBER.',
  ),
  'not error first': (
    dict(objectives=('l1', 'error')),
    'objectives=l1,error: expected error, and then at least one other, NAME '
    'or NAME:NUMBER.',
  ),
  'an empty name': (
    dict(objectives=('error', '')),
    'objectives=error,: expected error, and then at least one other, NAME or '
    'NAME:NUMBER.',
  ),
  'an empty number': (
    dict(objectives=('error', 'lp:')),
    'objectives=error,lp:: expected error, and then at least one other, NAME '
    'or NAME:NUMBER.',
  ),
  # Folders are named after it, and Orbax takes these for a pattern.
  'a name no folder may have': (
    dict(objectives=('error', 'a[b]')),
    'objectives=error,a[b]: expected error, and then at least one other, NAME '
    'or NAME:NUMBER.',
  ),
  'objectives twice': (
    dict(objectives=('error', 'l1', 'l1')),
    'objectives=error,l1,l1: expected no name twice.',
  ),
}


@pytest.mark.parametrize(
  ('settings', 'message'), _REFUSED.values(), ids=_REFUSED.keys()
)
def test_weights_that_do_not_fit_are_refused(settings, message):
  assert _error_of(Config, **settings) == message


@pytest.mark.parametrize(
  ('settings', 'names', 'labels'),
  [
    (
      dict(l1=(3e-4, 1e-3)),
      ['l1_0.0003_seed_0', 'l1_0.001_seed_0'],
      ['l1 0.0003, seed 0', 'l1 0.001, seed 0'],
    ),
    # Six digits are not enough to tell them.
    (
      dict(l1=(0.1234561, 0.1234562)),
      ['l1_0.1234561_seed_0', 'l1_0.1234562_seed_0'],
      ['l1 0.123456, seed 0'] * 2,
    ),
    (
      dict(l1=(0.25,), scalarization='convex', seed=(1, 2)),
      ['l1_0.25_seed_1', 'l1_0.25_seed_2'],
      ['l1 0.25, seed 1', 'l1 0.25, seed 2'],
    ),
    (
      dict(weights=((1.0, 3e-4),), objectives=('error', 'lp:0.5')),
      ['lp_0.0003_seed_0'],
      ['lp:0.5 0.0003, seed 0'],
    ),
    (
      dict(weights=((2.0, 3e-4), (1.0, 3e-4))),
      ['weights_2_0.0003_seed_0', 'weights_1_0.0003_seed_0'],
      ['weights 2,0.0003, seed 0', 'l1 0.0003, seed 0'],
    ),
    # Of both equations, so that the second weight does not tell them apart.
    (
      dict(weights=((1.0, 0.25), (0.75, 0.25))),
      ['weights_1_0.25_seed_0', 'weights_0.75_0.25_seed_0'],
      ['l1 0.25, seed 0'] * 2,
    ),
    (
      dict(weights=(_WEIGHTS, (1.0, 0.0, 2.0)), objectives=_THREE),
      ['weights_1_0.003_0.001_seed_0', 'weights_1_0_2_seed_0'],
      ['weights 1,0.003,0.001, seed 0', 'weights 1,0,2, seed 0'],
    ),
    (
      dict(
        weights=((1.0, 0.1234561, 0.0), (1.0, 0.1234562, 0.0)),
        objectives=_THREE,
      ),
      [
        'weights_1.0_0.1234561_0.0_seed_0',
        'weights_1.0_0.1234562_0.0_seed_0',
      ],
      ['weights 1,0.123456,0, seed 0'] * 2,
    ),
    (
      dict(optimizer='madam', objectives=_THREE, seed=(3,)),
      ['madam_seed_3'],
      ['found weights, seed 3'],
    ),
  ],
)
def test_members_have_names(settings, names, labels):
  config = Config(**settings)
  assert file_names(config) == names
  members = make_population(config)
  found = [member.label(config.objectives) for member in members]
  assert found == labels


def _rows(number):
  """Around a front that has a knee, and of few values."""
  random = np.random.default_rng(3)
  nonzeros = 10 ** random.uniform(2, 4, number)
  errors = 0.05 + 5 / nonzeros + random.exponential(0.02, number)
  group = random.integers(0, 30, number)
  return [
    {'accuracy_val': 1 - e, 'nonzeros': int(n), 'group': g, 'status': 'ok'}
    for e, n, g in zip(errors.round(3).tolist(), nonzeros, group.tolist())
  ]


def test_a_third_column_joins_the_front():
  rows = _rows(60)
  rows[7]['status'] = 'collapsed'
  records.mark_front(rows, 'val')
  two = [(row['pareto'], row['knee']) for row in rows]
  records.mark_front(rows, 'val', third='group')
  alive = [row for row in rows if row['status'] == 'ok']
  keys = lambda row: (-row['accuracy_val'], row['nonzeros'], row['group'])

  def is_on_front(row):
    return not any(
      all(a <= b for a, b in zip(keys(other), keys(row)))
      and keys(other) != keys(row)
      for other in alive
    )

  assert [row['pareto'] for row in rows] == [
    int(row['status'] == 'ok' and is_on_front(row)) for row in rows
  ]
  # It is another front, with the same knee.
  assert sum(row['pareto'] for row in rows) > sum(pareto for pareto, _ in two)
  assert [row['knee'] for row in rows] == [knee for _, knee in two]
  assert sum(knee for _, knee in two) == 1


def test_a_column_that_is_not_there_joins_no_front():
  config = Config(front_column='l2', objectives=('error', 'lp:0.5'))
  assert _error_of(check_job, Job(config, Tiny(), _digits())) == (
    'front_column=l2: expected one of lp:0.5, ce_train, nonzeros_all, '
    'nonzeros_layer1, nonzeros_layer2, nonzeros_layer3.'
  )
  for column in ('lp:0.5', 'ce_train', 'nonzeros_all', 'nonzeros_layer2'):
    good = dataclasses.replace(config, front_column=column)
    check_job(Job(good, Tiny(), _digits()))


def _no_scalar(params):
  return params['layer1']['bias']


def _integer(params):
  return jnp.sum(params['layer1']['bias'] > 0)


def _raises(params, batch):
  raise KeyError('nothing\nhere')


def _nothing(params):
  del params


def _default(params, scale=2.0):
  return scale * _smooth(params)


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    (_no_scalar, 'expected one float, got float32[24].'),
    (_integer, 'expected one float, got int32[].'),
    (_nothing, 'expected one float, got NoneType.'),
    (
      _raises,
      'expected a function of parameters, or of parameters and a batch, got '
      "KeyError: 'nothing\\nhere'",
    ),
    (
      3,
      'expected a function of parameters, or of parameters and a batch, got '
      'TypeError: Expected a callable value, got 3',
    ),
    (
      lambda: 1.0,
      'expected a function of parameters, or of parameters and a batch, got '
      'TypeError: ',
    ),
    (
      _default,
      'expected a function of parameters, or of parameters and a batch, got '
      'ValueError: the second parameter of an objective is the batch, but '
      'scale of ',
    ),
  ],
)
@pytest.mark.parametrize('search', ['none', 'grid'])
def test_what_gives_no_number_is_refused_before_anything_is_written(
  tmp_path, function, message, search
):
  config = Config(objectives=('error', 'own'), search=search)
  job = Job(config, Tiny(), _digits(), tmp_path, objectives={'own': function})
  train = training.run if search == 'none' else training.search
  found = _error_of(train, job)
  assert found.startswith(f'objectives=own: {message}')
  assert '\n' not in found
  assert not list(tmp_path.iterdir())


def _spread(params, batch):
  """Squares of the logits, averaged over a batch."""
  logits = Tiny().apply({'params': params}, batch.images)
  return jnp.mean(logits**2)


def test_a_dichotomic_search_wants_an_objective_of_the_parameters(tmp_path):
  for search in ('dichotomic', 'stochastic_dichotomic'):
    config = Config(objectives=('error', 'spread'), search=search)
    own = {'spread': _spread}
    job = Job(config, Tiny(), _digits(), tmp_path, objectives=own)
    assert _error_of(training.search, job) == (
      f'search={search}: expected an objective of the parameters alone, got '
      'spread, which takes a batch.'
    )
  assert not list(tmp_path.iterdir())


def _loss(params, images, labels):
  logits = Tiny().apply({'params': params}, images)
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _penalties(params):
  """Those of the dense kernels, written out once more."""
  kernels = [params[f'layer{i}']['kernel'] for i in (1, 2, 3)]
  return {
    'l1': sum(jnp.abs(w).sum() for w in kernels),
    'group': sum(jnp.sqrt((w**2).sum(axis=0)).sum() for w in kernels),
    'log_sum': sum((0.1 * jnp.log(1 + 10 * jnp.abs(w))).sum() for w in kernels),
    'lp:0.5': sum(((w**2 + 1e-6) ** 0.25 - 1e-3**0.5).sum() for w in kernels),
  }


def _trained(config, data, own=_NONE, num_devices=1):
  """Parameters before an epoch of one member and after it, and metrics."""
  devices = first_devices(num_devices)
  program = make_program(
    Job(config, Tiny(), data, devices=devices, objectives=own)
  )
  state = program.prune(program.init())
  before = jax.tree.map(lambda x: x[0, 0, 0], state.params)
  state, metrics = program.epoch(state, 0)
  after = jax.tree.map(lambda x: np.asarray(x[0, 0, 0]), state.params)
  return before, after, metrics


def test_three_steps_of_adam_are_those_of_optax():
  data = _digits(96)
  config = Config(
    objectives=_THREE, weights=(_WEIGHTS,), prune='none', schedule='constant'
  )
  params, after, metrics = _trained(config, data)
  key = jax.random.fold_in(jax.random.key(0), 1)
  order = jax.random.permutation(jax.random.split(key)[0], 96)
  tx = optax.adam(1e-3)
  opt_state = tx.init(params)

  @jax.jit
  @jax.value_and_grad
  def weighted_sum(params, images, labels):
    conv = jnp.sum(params['conv1']['kernel'] ** 2)
    penalties = _penalties(params)
    error = _loss(params, images, labels) + 1e-4 * conv
    return error + 3e-3 * penalties['l1'] + 1e-3 * penalties['group']

  sums = []
  for chosen in order.reshape(3, 32):
    images = data.train.images[chosen] / np.float32(255)
    value, grads = weighted_sum(params, images, data.train.labels[chosen])
    sums.append(value)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  for path, leaf in _leaves(params).items():
    np.testing.assert_allclose(_leaves(after)[path], leaf, atol=5e-6)
  found = metrics.values[0] @ _WEIGHTS
  np.testing.assert_allclose(found, np.mean(sums), rtol=1e-5)
  np.testing.assert_allclose(metrics.weights[0], _WEIGHTS, rtol=1e-6)


def _least_norm(gramian):
  """Weights on the simplex, by trying every set that may be positive."""
  m = len(gramian)
  best = np.inf, np.zeros(m)
  for size in range(1, m + 1):
    for chosen in itertools.combinations(range(m), size):
      part = gramian[np.ix_(chosen, chosen)]
      system = np.block([[part, np.ones((size, 1))], [np.ones(size), 0.0]])
      solution = np.linalg.solve(system, np.append(np.zeros(size), 1.0))
      if (solution[:-1] < 0).any():
        continue
      weights = np.zeros(m)
      weights[list(chosen)] = solution[:-1]
      best = min(
        best, (weights @ gramian @ weights, weights), key=lambda x: x[0]
      )
  return best[1]


@pytest.mark.parametrize('names', [_THREE, (*_THREE, 'lp:0.5')])
def test_madam_finds_the_least_norm(names):
  """One step, so that what is logged is of known parameters."""
  data = _digits()
  # So that gradients are of one size, and no weight is all there is.
  own = {
    'far': lambda params: jnp.sum((params['layer1']['kernel'] - 0.01) ** 2)
  }
  names = (*names[:-1], 'far')
  config = Config(objectives=names, optimizer='madam', conv_l2=0.0)
  params, _, metrics = _trained(config, data, own)
  images = data.train.images / np.float32(255)
  functions = [lambda p: _loss(p, images, data.train.labels)]
  for name in names[1:]:
    functions.append(own.get(name) or (lambda p, n=name: _penalties(p)[n]))
  # Zeros of pruned weights have no slope but 0; NumPy has them elsewhere.
  grads = []
  for name, function in zip(names, functions):
    grad = _leaves(jax.grad(function)(params))
    flat = [np.asarray(x, float).ravel() for x in grad.values()]
    if name in ('l1', 'group', 'lp:0.5'):
      leaves = _leaves(params).values()
      flat = [np.where(np.ravel(w) == 0, 0, g) for g, w in zip(flat, leaves)]
    grads.append(np.concatenate(flat))
  grads = np.array(grads)
  gramian = grads @ grads.T
  wanted = _least_norm(gramian)
  found = np.asarray(metrics.weights[0], float)
  assert (found >= 0).all()
  np.testing.assert_allclose(found.sum(), 1, rtol=1e-6)
  assert (wanted > 0).sum() > 1
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  norms = np.sqrt(np.diagonal(gramian))
  np.testing.assert_allclose(metrics.grad_norms[0], norms, rtol=1e-4)
  cosines = [
    gramian[i, j] / (norms[i] * norms[j])
    for i, j in itertools.combinations(range(len(names)), 2)
  ]
  np.testing.assert_allclose(metrics.cosines[0], cosines, atol=1e-5)


@pytest.mark.parametrize('num_devices', [1, 2])
def test_an_objective_may_look_at_the_batch(num_devices):
  data = _digits()
  own = {'spread': _spread, 'smooth': _smooth}
  config = Config(
    objectives=('error', *own),
    weights=((1.0, 0.5, 2.0),),
    parallel='data',
    prune='none',
    optimizer='sgd',
    learning_rate=1.0,
    schedule='constant',
    momentum=0.0,
    conv_l2=0.0,
  )
  before, after, metrics = _trained(config, data, own, num_devices)
  batch = Split(data.train.images / np.float32(255), data.train.labels)
  # That of the first one, since a bias begins with 0.
  logits = Tiny().apply({'params': before}, batch.images)
  spread = (np.asarray(logits, float) ** 2).mean()
  np.testing.assert_allclose(metrics.values[0, 1], spread, rtol=1e-5)
  assert metrics.values[0, 2] == 0

  def weighted_sum(params):
    error = _loss(params, *batch)
    return error + 0.5 * _spread(params, batch) + 2.0 * _smooth(params)

  grads = _leaves(jax.grad(weighted_sum)(before))
  for path, leaf in _leaves(before).items():
    wanted = leaf - grads[path]
    np.testing.assert_allclose(_leaves(after)[path], wanted, atol=2e-6)


def test_conv_l2_joins_an_objective_that_looks_at_the_batch():
  data = _digits()
  config = Config(
    objectives=('error', 'spread'),
    weights=((1.0, 0.5),),
    conv_l2_in_both=True,
    conv_l2=0.1,
  )
  before, _, metrics = _trained(config, data, {'spread': _spread})
  images = data.train.images / np.float32(255)
  logits = np.asarray(Tiny().apply({'params': before}, images), float)
  conv = 0.1 * (np.asarray(before['conv1']['kernel'], float) ** 2).sum()
  found = metrics.values[0, 1]
  np.testing.assert_allclose(found, (logits**2).mean() + conv, rtol=1e-5)


@pytest.mark.parametrize('optimizer', ['smgd', 'mrmsprop', 'madam'])
def test_the_multiobjective_optimizers_train_with_three(optimizer):
  config = Config(
    objectives=_THREE,
    optimizer=optimizer,
    epochs=6,
    learning_rate=0.1 if optimizer == 'smgd' else 0.01,
  )
  program = make_program(
    Job(config, Tiny(), _digits(64), devices=first_devices(1))
  )
  state = program.prune(program.init())
  losses = []
  for number in range(config.epochs):
    state, metrics = program.epoch(state, number)
    for found in metrics[:6]:
      assert np.isfinite(found).all()
    np.testing.assert_allclose(metrics.weights.sum(axis=1), 1, rtol=1e-5)
    losses.append(metrics.loss[0])
  assert losses[-1] < losses[0] - 0.05
  assert program.layout.collect(state.failure.objective) == [0]


def _jsonl(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def _run(folder, config, data=None, own=_NONE):
  """Rows of a run, and what it said."""
  folder.mkdir(exist_ok=True)
  output = io.StringIO()
  console = Console(file=output, width=200, markup=False)
  devices = first_devices(2)
  job = Job(config, Tiny(), data or _digits(128), folder, devices, console)
  rows = training.run(job._replace(objectives=own))
  return rows, output.getvalue()


def _note_fronts(patch):
  """A list of the third columns that fronts are made with."""
  thirds = []
  plain = records.mark_front

  def note(rows, split, loss, third=None):
    thirds.append(third)
    plain(rows, split, loss, third)

  patch.setattr(records, 'mark_front', note)
  return thirds


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """A run of three members with objectives of each kind."""
  folder = tmp_path_factory.mktemp('three')
  config = Config(
    objectives=('error', 'l1', 'group', 'lp:0.7', 'spread', 'smooth'),
    weights=(
      (1.0, 1e-4, 0.0, 0.0, 1e-3, 0.0),
      (1.0, 1e-3, 1e-3, 0.0, 0.0, 0.0),
      (0.5, 0.0, 3e-3, 2e-3, 0.0, 1.0),
    ),
    prunable='kernels',
    front_column='group',
    epochs=5,
    learning_rate=0.01,
  )
  labels = []
  with pytest.MonkeyPatch.context() as patch:
    from matplotlib.axes import Axes

    plain = Axes.set_xlabel

    def note(self, text, *args, **kwargs):
      labels.append(text)
      return plain(self, text, *args, **kwargs)

    patch.setattr(Axes, 'set_xlabel', note)
    own = {'spread': _spread, 'smooth': _smooth}
    thirds = _note_fronts(patch)
    _, output = _run(folder, config, own=own)
  assert thirds == ['group']
  return folder, config, output, labels


def test_results_hold_the_values_of_the_networks_that_are_saved(three):
  folder, config, *_ = three
  rows = files.read_csv(folder / 'results.csv')
  assert [row['file'] for row in rows] == [
    f'members/weights_{weights}_seed_0.npz'
    for weights in (
      '1_0.0001_0_0_0.001_0',
      '1_0.001_0.001_0_0_0',
      '0.5_0_0.003_0.002_0_1',
    )
  ]
  for row, weights in zip(rows, config.weights):
    for name, weight in zip(config.objectives, weights):
      assert row[f'weight_{name}'] == weight
    assert row['status'] == 'ok'
    params = training.load(folder / row['file']).params
    leaves = {k: np.asarray(x, float) for k, x in _leaves(params).items()}
    kernels = [leaves[path] for path in _KERNELS['kernels']]
    for name in ('l1', 'group', 'lp:0.7'):
      wanted = sum(_FORMULAS[name](w) for w in kernels)
      np.testing.assert_allclose(row[name], wanted, rtol=1e-5)
    smooth = (leaves['layer1/bias'] ** 2).sum()
    np.testing.assert_allclose(row['smooth'], smooth, rtol=1e-5)
    # Of a batch there is none in the end.
    assert 'spread' not in row
    nonzeros = [int((w != 0).sum()) for w in kernels]
    names = ('conv1', 'layer1', 'layer2', 'layer3')
    assert [row[f'nonzeros_{name}'] for name in names] == nonzeros
    assert row['nonzeros'] == sum(nonzeros)
    # Pruned, convolutions too.
    assert all(((w == 0) | (abs(w) >= 1e-3)).all() for w in kernels)
    assert row['params'] == sum(x.size for x in leaves.values())
    every = sum(int((x != 0).sum()) for x in leaves.values())
    assert row['nonzeros_all'] == every
  front = [dict(row) for row in rows]
  records.mark_front(front, 'val', third='group')
  assert [row['pareto'] for row in front] == [row['pareto'] for row in rows]


def test_logs_speak_the_names_of_the_objectives(three):
  folder, config, output, labels = three
  names = config.objectives
  log = _jsonl(folder / 'metrics.jsonl')
  assert [record['epoch'] for record in log] == [
    epoch for epoch in range(1, 6) for _ in range(3)
  ]
  wanted = ['epoch', 'learning_rate', 'seed', *(f'weight_{x}' for x in names)]
  wanted += names
  wanted += [f'grad_norm_{x}' for x in names]
  wanted += [f'cosine_{a}_{b}' for a, b in itertools.combinations(names, 2)]
  wanted += [f'weight_{x}_{end}' for end in ('min', 'max') for x in names]
  wanted += [f'{x}_{y}' for y in ('train', 'val') for x in ('ce', 'accuracy')]
  wanted += ['nonzeros']
  wanted += [f'nonzeros_{x}' for x in ('conv1', 'layer1', 'layer2', 'layer3')]
  assert list(log[0]) == wanted
  for record, weights in zip(log, config.weights):
    for name, weight in zip(names, weights):
      assert record[f'weight_{name}'] == weight
      assert record[f'weight_{name}_min'] == weight
    # All that has a value here points somewhere.
    for a, b in itertools.combinations(names, 2):
      assert -1 <= record[f'cosine_{a}_{b}'] <= 1
    assert record['cosine_l1_group'] > 0.5
  histograms = _jsonl(folder / 'histograms.jsonl')
  layers = [record['layer'] for record in histograms[:4]]
  assert layers == ['conv1', 'layer1', 'layer2', 'layer3']
  assert histograms[0]['weight_lp:0.7'] == 0.0
  about = json.loads((folder / 'config.json').read_text())
  assert about['objectives'] == list(names)
  assert about['weights'] == [list(weights) for weights in config.weights]
  assert labels == ['nonzero weights in the kernels']
  assert '0.5,0,0.003,0.002,0,1' in output


@pytest.mark.parametrize(
  ('prunable', 'text'),
  [
    ('dense', 'in the dense layers'),
    ('all', 'of all parameters'),
    ('layer[12]', 'in leaves that match layer[12]'),
  ],
)
def test_pictures_say_which_weights_they_count(prunable, text):
  assert objectives_lib.counted(Config(prunable=prunable)) == text


def test_other_weights_do_not_go_on(three):
  folder, config, *_ = three
  members = config.weights
  other = dataclasses.replace(
    config, weights=(*members[:2], members[0][:5] + (2.0,))
  )
  message = _error_of(training.check_resumable, other, _digits(128), folder)
  assert message == (
    f'weights={other.weights}: expected {[list(w) for w in members]}, as in '
    f'{folder}/config.json, or another workdir.'
  )
  assert training.check_resumable(config, _digits(128), folder) == []


def test_all_zeros_in_all_biases_are_fine(tmp_path):
  """With a threshold that no step of a bias gets over."""
  config = Config(
    l1=(1e-6,), prunable='all', threshold=0.03, epochs=6, learning_rate=0.01
  )
  ((row,), _) = _run(tmp_path, config)
  biases = [row[f'nonzeros_layer{i}_bias'] for i in (1, 2, 3)]
  assert biases == [0, 0, 0]
  assert row['nonzeros_conv1_bias'] == 0
  assert row['status'] == 'ok'
  assert row['nonzeros'] == row['nonzeros_all'] > 0
  layers = {r['layer'] for r in _jsonl(tmp_path / 'histograms.jsonl')}
  assert layers >= {'layer1', 'layer1_bias'}


def _fence(params):
  """Not a number once the biases sum up to a quarter."""
  return jnp.log(0.25 - jnp.sum(params['layer3']['bias']))


def test_an_objective_that_turns_nan_fails_its_member_alone(tmp_path):
  settings = dict(
    objectives=('error', 'fence', 'l1'),
    epochs=3,
    learning_rate=0.01,
    schedule='constant',
  )
  quiet, steep = (1.0, 0.0, 1e-4), (1.0, 100.0, 1e-4)
  config = Config(weights=(quiet, steep), **settings)
  own = {'fence': _fence}
  rows, output = _run(tmp_path / 'both', config, own=own)
  # Adam moves each of ten biases by 0.01 in each of three steps.
  what = "objective 'fence' or its gradient is not finite in epoch 1 step 4"
  assert [row['status'] for row in rows] == ['ok', what]
  assert f'weights 1,100,0.0001, seed 0: stopped, {what}; ' in output
  alone = Config(weights=(quiet,), **settings)
  _run(tmp_path / 'alone', alone, own=own)
  name = 'members/weights_1_0_0.0001_seed_0.npz'
  both, single = (
    _leaves(training.load(tmp_path / folder / name).params)
    for folder in ('both', 'alone')
  )
  for path, leaf in both.items():
    np.testing.assert_allclose(leaf, single[path], atol=1e-6)


def test_weights_of_two_are_l1_by_another_name(tmp_path):
  """To the bit."""
  values = (3e-4, 1e-2)
  short = Config(l1=values, epochs=2)
  long = Config(
    objectives=('error', 'l1'),
    weights=tuple((1.0, x) for x in values),
    epochs=2,
  )
  found, wanted = (
    _run(tmp_path / name, config)
    for name, config in (('short', short), ('long', long))
  )
  assert found[0] == wanted[0]
  for name in ('results.csv', 'metrics.jsonl', 'histograms.jsonl'):
    one, other = (tmp_path / x / name for x in ('short', 'long'))
    assert one.read_bytes() == other.read_bytes()
  for path in (tmp_path / 'short' / 'members').iterdir():
    other = training.load(tmp_path / 'long' / 'members' / path.name)
    for key, leaf in _leaves(training.load(path).params).items():
      np.testing.assert_array_equal(leaf, _leaves(other.params)[key])


@pytest.mark.slow
def test_the_knee_of_another_penalty_is_searched(tmp_path, monkeypatch):
  """Two levels and the knee, each of which compiles: 15 s."""
  config = Config(
    objectives=('error', 'lp:0.5'),
    search='dichotomic',
    search_range=(1e-4, 1e-2),
    search_epochs=4,
    epochs=4,
    max_runs=4,
    learning_rate=0.01,
    front_column='lp:0.5',
  )
  output = io.StringIO()
  console = Console(file=output, width=200, markup=False)
  job = Job(config, Tiny(), _digits(128), tmp_path, first_devices(2), console)
  thirds = _note_fronts(monkeypatch)
  found = training.search(job)
  assert len(thirds) > 2
  assert set(thirds) == {'lp:0.5'}
  assert 'level 1: lp:0.5 0.0001, 0.01 (0 of at most 4' in output.getvalue()
  rows = files.read_csv(tmp_path / 'results.csv')
  assert len(rows) >= 3
  for row in rows:
    path = tmp_path / row['file']
    assert path.name == f'lp_{row["weight_lp:0.5"]:g}_seed_0.npz'
    params = training.load(path).params
    kernels = [params[f'layer{i}']['kernel'] for i in (1, 2, 3)]
    wanted = sum(_FORMULAS['lp'](np.asarray(w, float)) for w in kernels)
    np.testing.assert_allclose(row['lp:0.5'], wanted, rtol=1e-4)
  # The next weight is the slope between the ends, of the terms of the sum.
  first, second = rows[:2]
  slope = (second['ce_val'] - first['ce_val']) / (
    first['lp:0.5'] - second['lp:0.5']
  )
  np.testing.assert_allclose(rows[2]['weight_lp:0.5'], slope, rtol=1e-4)
  knees = [row['weight_lp:0.5'] for row in rows if row['knee']]
  assert [row['weight_lp:0.5'] for row in found] == knees
  folders = [path.name for path in tmp_path.glob('knee_*')]
  assert folders == [f'knee_lp_{knee:g}' for knee in knees]


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (
      ['--weights=1,many'],
      'flag --weights=1,many: expected a comma-separated list of floats',
    ),
    (
      ['--weights='],
      'flag --weights=: expected a comma-separated list of floats',
    ),
    (
      ['--weights=1,1e-3;'],
      'flag --weights=1,1e-3;: expected a comma-separated list of floats',
    ),
    (
      ['--weights=1,1e-3,1e-4'],
      'weights=1,0.001,0.0001: expected 2 numbers, for error,l1.',
    ),
    (
      ['--weights=1,-1e-3'],
      'weights=1,-0.001: expected numbers >= 0, finite in float32, not all 0.',
    ),
    (
      ['--objectives='],
      'objectives=: expected error, and then at least one other, NAME or '
      'NAME:NUMBER.',
    ),
    (
      ['--objectives=error,l1,group'],
      'weights=: expected the weights of error, l1 and group, as 1,3e-4,1e-4; '
      'or a weighting that finds them, as weighting=upgrad.',
    ),
    (
      ['--objectives=error,smooth'],
      'objectives=smooth: expected error first, and then one or more of l1, '
      'l2, group, log_sum, lp.',
    ),
    (
      ['--objectives=error,lp:2'],
      'objectives=lp:2: p must lie between 0 and 1, got 2.0: use l1_norm for 1 '
      'and l2_norm_squared for 2.',
    ),
    (
      ['--prunable=(', '--model=mlp'],
      'prunable=(: expected dense, kernels, all or a regular expression '
      '(missing ), unterminated subpattern at position 0).',
    ),
    (
      ['--prunable=layer9', '--model=mlp'],
      'prunable=layer9: expected a pattern that is found in the path of a '
      'leaf, to penalise, prune and count the weights of; the leaves of the '
      'network are ',
    ),
    (
      ['--front_column=group'],
      'front_column=group: expected one of l1, ce_train, nonzeros_all, '
      'nonzeros_layer1, nonzeros_layer2, nonzeros_layer3.',
    ),
  ],
)
def test_what_is_wrong_on_the_command_line_takes_one_line(
  call, tmp_path, args, message
):
  code, out, err = call('--train_size=640', '--workdir=new', *args)
  assert (code, out) == (2, '')
  assert err.startswith(f'train.py: {message}')
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


def test_a_file_of_flags_brings_back_weights_to_the_bit(monkeypatch):
  import train

  members = ((1.0, 1 / 3, 1e-4), (2.0, 0.0, 0.1 + 0.2))
  args = [
    '--objectives=error,lp:0.3,group',
    '--weights=' + ';'.join(','.join(map(repr, w)) for w in members),
    '--prunable=layer[12]/',
  ]

  def parse(*args):
    train.FLAGS.unparse_flags()
    for name in train.FLAGS:
      if train.FLAGS[name].present:
        train.FLAGS[name].unparse()
    train.parse_flags(['train.py', *args])
    return train._values(Config)

  config = parse(*args)
  assert config.weights == members
  text = train.FLAGS.flags_into_string()
  lines = [x for x in text.splitlines() if x.partition('=')[0] in _OURS]
  assert len(lines) == len(_OURS)
  assert parse(*lines) == config
  l1 = parse('--l1=0.12345678901,1e-05')
  assert l1.l1 == (0.12345678901, 1e-5)
  assert '--l1=0.12345678901,1e-05' in train.FLAGS.flags_into_string()


_OURS = ('--objectives', '--weights', '--prunable')


@pytest.mark.slow
def test_three_objectives_from_the_command_line(tmp_path):
  """A process of its own compiles LeNet-5: 30 s."""
  args = ('--objectives=error,l1,group', '--optimizer=madam', '--seed=0,1')
  command = [sys.executable, str(_ROOT / 'train.py'), *args]
  done = subprocess.run(
    [*command, '--train_size=320', '--epochs=2', '--workdir=run'],
    cwd=tmp_path,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stderr) == (0, '')
  assert 'found' in done.stdout
  with (tmp_path / 'run' / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['file'] for row in rows] == [
    f'members/madam_seed_{seed}.npz' for seed in (0, 1)
  ]
  for row in rows:
    assert float(row['l1']) > float(row['group']) > 0
    assert [row[f'weight_{name}'] for name in _THREE] == [''] * 3
  for record in _jsonl(tmp_path / 'run' / 'metrics.jsonl'):
    weights = [record[f'weight_{name}'] for name in _THREE]
    assert min(weights) >= 0
    assert sum(weights) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_weights_and_kernels_from_the_command_line(call, tmp_path):
  """LeNet-5 is compiled: 15 s."""
  args = [
    '--objectives=error,l1,group',
    '--weights=1,3e-4,1e-4;1,0,3e-3',
    '--front_column=group',
    '--prunable=kernels',
    '--train_size=320',
    '--epochs=2',
    '--workdir=run',
  ]
  code, out, err = call(*args)
  assert (code, err) == (0, '')
  assert '1,0.0003,0.0001' in out
  with (tmp_path / 'run' / 'results.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [row['file'] for row in rows] == [
    'members/weights_1_0.0003_0.0001_seed_0.npz',
    'members/weights_1_0_0.003_seed_0.npz',
  ]
  for row in rows:
    layers = [int(x) for k, x in row.items() if re.match('nonzeros_[cl]', k)]
    assert len(layers) == 5
    assert sum(layers) == int(row['nonzeros'])
  other = [
    '--weights=1,3e-4,1e-4;1,0,2e-3' if 'weights' in x else x for x in args
  ]
  code, out, err = call(*other, '--resume')
  assert (code, out) == (2, '')
  assert err == (
    'train.py: weights=((1.0, 0.0003, 0.0001), (1.0, 0.0, 0.002)): expected '
    '[[1.0, 0.0003, 0.0001], [1.0, 0.0, 0.003]], as in run/config.json, or '
    'another workdir.\n'
  )
  code, out, err = call(*args, '--resume')
  assert (code, err) == (0, '')
  assert 'finished already' in out
