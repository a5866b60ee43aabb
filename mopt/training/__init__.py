"""What train.py is made of. Needs the extra `[train]`.

But for `load`, what it returns, and `normalise`: they need NumPy alone.
"""

from mopt import lazy

# By module. Type checkers read __init__.pyi, where a test finds the same.
_NAMES = {
  'arrays': ('make_dataset',),
  'config': ('Config',),
  'data': ('Dataset', 'load_dataset'),
  'files': ('UNFINISHED',),
  'job': ('Job',),
  'knee_search': ('check_resumable', 'search'),
  'loss': ('cross_entropy', 'Loss'),
  'network': ('load', 'Network'),
  'program': ('check_fit',),
  'scaling': ('normalise',),
  'single_run': ('run',),
}

__getattr__, __dir__, __all__ = lazy.attach(__name__, _NAMES)
