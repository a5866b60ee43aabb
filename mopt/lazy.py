"""Names of a package that are loaded when they are first asked for (PEP 562).

So what needs NumPy alone does not wait for JAX, nor fails without it. All
modules of the package load on access, too: `import mopt` is enough for
`mopt.search.bisection`. Type checkers are told by an `__init__.pyi`.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import pkgutil
import sys
from typing import Any


def attach(
  package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], tuple[str, ...]]:
  """Makes what a package defines to load its names later.

  Args:
    package: its `__name__`.
    names: of each of its modules, what the package has from it.

  Returns:
    `__getattr__`, `__dir__` and `__all__` of the package; the last one is
    sorted and without modules.

  Examples:
    >>> from mopt import lazy
    >>> find, _, public = lazy.attach('mopt', {'pareto': ('knee',)})
    >>> public
    ('knee',)
    >>> find('knee').__module__
    'mopt.pareto'

  References:
    Levkivskyi, `PEP 562 <https://peps.python.org/pep-0562/>`_, 2017.
  """
  home = {name: module for module, found in names.items() for name in found}
  public = tuple(sorted(home, key=str.casefold))
  this = sys.modules[package]

  def modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(this.__path__)]

  def find(name: str) -> Any:
    if name in home:
      module = importlib.import_module(f'{package}.{home[name]}')
      value = getattr(module, name)
      setattr(this, name, value)  # The next time nobody is asked.
      return value
    if name in modules():
      return importlib.import_module(f'{package}.{name}')
    raise AttributeError(
      f'module {package!r} has no attribute {name!r}', name=name, obj=this
    )

  def names_of_all() -> list[str]:
    return sorted({*vars(this), *public, *modules()})

  return find, names_of_all, public
