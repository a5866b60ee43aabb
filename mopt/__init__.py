"""Multiobjective optimization for JAX, as Optax gradient transformations."""

from mopt import lazy

__version__ = '0.1.0'

# By module. Type checkers read __init__.pyi, where a test finds the same.
_NAMES = {
  'aggregation': ('aggregate', 'AggregateState'),
  'alias': ('madam', 'mrmsprop', 'smgd'),
  'masks': ('conv_kernels', 'dense_kernels', 'mask_by_path'),
  'min_norm': ('gramian', 'kkt_residual', 'min_norm_weights'),
  'objectives': (
    'count_nonzero',
    'group_norm',
    'l1_norm',
    'l2_norm_squared',
    'lp_norm',
    'NonzeroCount',
    'stack',
    'value_and_stacked_grad',
  ),
  'pareto': ('hypervolume', 'knee', 'knee_bootstrap', 'nondominated'),
  'pruning': ('prune', 'prune_by_magnitude', 'PruneState'),
  'scalarizations': ('chebyshev', 'epsilon_constraint'),
  'schedules': ('by_epoch', 'inverse_time_decay', 'logistic_drop'),
  'weightings.by_loss': ('dwa', 'gls', 'random_loss', 'stch'),
  'weightings.cones': ('dual_proj', 'upgrad'),
  'weightings.fixed': ('fixed_weights', 'mean'),
  'weightings.learnt': ('famo', 'gradnorm', 'imtl_l', 'uncertainty'),
  'weightings.over_time': ('every', 'smoothed'),
  'weightings.stochastic': ('modo', 'sdmgrad'),
  'weightings.weighting': ('as_weighting', 'Weighting'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _NAMES)
