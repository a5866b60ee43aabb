"""Multiobjective optimization for JAX, as Optax gradient transformations.

`help(mopt.aggregate)` says how the gradients of several objectives become one
update, `help(mopt.weightings)` which of the weightings to take.
"""

from mopt import lazy

__version__ = '0.1.0'

# By module. Type checkers read __init__.pyi, where a test finds the same.
_NAMES = {
  'aggregation': ('aggregate', 'AggregateState'),
  'alias': ('madam', 'mrmsprop', 'smgd'),
  'elementwise': ('graddrop', 'GradDropState', 'trimmed_mean'),
  'masks': ('conv_kernels', 'dense_kernels', 'mask_by_path'),
  'min_norm': ('gramian', 'kkt_residual', 'min_norm_weights'),
  'objectives': (
    'count_nonzero',
    'group_norm',
    'l1_norm',
    'l2_norm_squared',
    'log_sum_norm',
    'lp_norm',
    'NonzeroCount',
  ),
  'pareto': ('hypervolume', 'knee', 'knee_bootstrap', 'nondominated'),
  'per_example': ('per_example_gramian',),
  'pruning': ('keep_zeros', 'prune', 'prune_by_magnitude'),
  'rules': ('PruneState',),
  'scalarizations': ('chebyshev', 'epsilon_constraint'),
  'schedules': (
    'by_epoch',
    'cubic_sparsity',
    'inverse_time_decay',
    'logistic_drop',
  ),
  'sparsity': ('prune_n_of_m', 'prune_to_sparsity', 'prune_units'),
  'stacked': ('stack', 'value_and_stacked_grad', 'value_and_stacked_jac'),
  'weightings.adapters': ('normalized', 'preferred'),
  'weightings.bargaining': ('fairgrad', 'nash_mtl'),
  'weightings.by_loss': ('dwa', 'gls', 'random_loss', 'stch'),
  'weightings.cones': ('dual_proj', 'upgrad'),
  'weightings.conflict_averse': ('cagrad',),
  'weightings.fixed': ('fixed_weights', 'mean', 'random'),
  'weightings.learnt': ('famo', 'gradnorm', 'imtl_l', 'uncertainty'),
  'weightings.over_time': ('every', 'smoothed'),
  'weightings.robust': ('krum',),
  'weightings.spectral': ('aligned_mtl', 'config', 'imtl_g'),
  'weightings.stochastic': ('modo', 'sdmgrad'),
  'weightings.surgery': ('gradvac', 'pcgrad'),
  'weightings.weighting': ('as_weighting', 'Weighting'),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _NAMES)
