"""Multiobjective optimization for JAX, as Optax gradient transformations."""

from mopt.aggregation import aggregate
from mopt.aggregation import AggregateState
from mopt.alias import madam
from mopt.alias import mrmsprop
from mopt.alias import smgd
from mopt.masks import conv_kernels
from mopt.masks import dense_kernels
from mopt.masks import mask_by_path
from mopt.min_norm import gramian
from mopt.min_norm import kkt_residual
from mopt.min_norm import min_norm_weights
from mopt.objectives import count_nonzero
from mopt.objectives import l1_norm
from mopt.objectives import l2_norm_squared
from mopt.objectives import lp_norm
from mopt.objectives import NonzeroCount
from mopt.objectives import stack
from mopt.objectives import value_and_stacked_grad
from mopt.pareto import hypervolume
from mopt.pareto import knee
from mopt.pareto import knee_bootstrap
from mopt.pareto import nondominated
from mopt.pruning import prune
from mopt.pruning import prune_by_magnitude
from mopt.pruning import PruneState
from mopt.scalarizations import chebyshev
from mopt.scalarizations import epsilon_constraint
from mopt.schedules import by_epoch
from mopt.schedules import inverse_time_decay
from mopt.schedules import logistic_drop
from mopt.weightings import fixed_weights
from mopt.weightings import Weighting

__version__ = '0.1.0'

__all__ = (
  'aggregate',
  'AggregateState',
  'by_epoch',
  'chebyshev',
  'conv_kernels',
  'count_nonzero',
  'dense_kernels',
  'epsilon_constraint',
  'fixed_weights',
  'gramian',
  'hypervolume',
  'inverse_time_decay',
  'kkt_residual',
  'knee',
  'knee_bootstrap',
  'l1_norm',
  'l2_norm_squared',
  'logistic_drop',
  'lp_norm',
  'madam',
  'mask_by_path',
  'min_norm_weights',
  'mrmsprop',
  'nondominated',
  'NonzeroCount',
  'prune',
  'prune_by_magnitude',
  'PruneState',
  'smgd',
  'stack',
  'value_and_stacked_grad',
  'Weighting',
)
