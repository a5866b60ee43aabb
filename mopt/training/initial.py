"""A trained network that others begin with, which NumPy alone reads."""

from collections.abc import Iterable, Mapping
import os
import pathlib
from typing import Any

import numpy as np

from mopt.training import files
from mopt.training.files import DAMAGED_ARCHIVE
from mopt.training.network import leaves

PyTree = Any

_PARAMS = 'params'  # The collection whose name entries may leave out.
_ABOUT = 'about'  # What a member says of itself.


class Misfit(ValueError):
  """A file holds no network such as is to be trained."""


def read(name: str, shapes: Mapping[str, PyTree], model: str) -> dict[str, Any]:
  """Reads variables that have the paths and shapes of those of a network.

  Entries are called as in a file of `members`, `params/layer1/kernel`, all with
  or all without the leading `params/`. Nothing is unpickled.

  Args:
    name: of an .npz file; `~` is one's home.
    shapes: nested dictionaries, whose leaves have a `shape` and a `dtype`.
    model: what the network is called in messages.

  Returns:
    Nested dictionaries as `shapes`, of arrays in its types. Of the collections
    but `params` they lack those of which the file has no entry.

  Raises:
    Misfit: with one line that names the file, the first entry that is missing,
      not of the network, or of another shape, no float or not finite, and what
      was expected.
  """
  start = f'init={name}: expected'
  wanted = {'/'.join(map(str, keys)): (keys, x) for keys, x in leaves(shapes)}
  path = pathlib.Path(os.path.expanduser(name))
  variables: dict[str, Any] = {_PARAMS: {}}
  entry = None
  try:
    with files.archive(path) as file:
      found = _by_name(file.files, wanted)
      _check_names(start, model, found, wanted)
      for full, entry in found.items():
        keys, leaf = wanted[full]
        _set(variables, keys, _cast(start, model, entry, file[entry], leaf))
  except Misfit:
    raise
  except DAMAGED_ARCHIVE as error:
    reason = files.reason(error)
    what = 'a file .npz with' if entry is None else f'as {entry} an array of'
    parts = 'the parameters of a network' if entry is None else 'floats'
    raise Misfit(f'{start} {what} {parts} ({reason}).') from error
  return variables


def _by_name(
  entries: Iterable[str], wanted: Mapping[str, Any]
) -> dict[str, str]:
  """The entries of a file by what they are called in the network.

  Of the two ways to call them it is the one that fits better.
  """
  collections = {name.partition('/')[0] for name in wanted} - {_PARAMS}
  others = tuple(f'{collection}/' for collection in collections)
  whole = {entry: entry for entry in entries if entry != _ABOUT}
  short = {
    entry if entry.startswith(others) else f'{_PARAMS}/{entry}': entry
    for entry in entries
    if entry != _ABOUT or f'{_PARAMS}/{_ABOUT}' in wanted
  }
  return min(whole, short, key=lambda found: len(found.keys() ^ wanted.keys()))


def _check_names(
  start: str, model: str, found: Mapping[str, str], wanted: Mapping[str, Any]
) -> None:
  """Raises unless all parameters are there, and nothing but variables."""
  collection = lambda name: name.partition('/')[0]
  there = {_PARAMS, *map(collection, found)}
  missing = [n for n in wanted if n not in found and collection(n) in there]
  extra = [entry for name, entry in found.items() if name not in wanted]
  if missing:
    shape = wanted[missing[0]][1].shape
    instead = f'got {extra[0]}, which it has not' if extra else 'got none'
    raise Misfit(
      f'{start} an entry {missing[0]} of shape {shape}, as {model} has it, '
      f'{instead}.'
    )
  if extra:
    raise Misfit(
      f'{start} no entries but the variables of {model}, got {extra[0]}, which '
      'it has not.'
    )


def _cast(
  start: str, model: str, entry: str, array: Any, leaf: Any
) -> np.ndarray:
  """An entry as the network has it."""
  # What is no array in the archive comes as bytes.
  kind = getattr(array, 'dtype', type(array).__name__)
  if getattr(kind, 'kind', None) != 'f':
    raise Misfit(f'{start} floats as {entry}, got {kind}.')
  if array.shape != leaf.shape:
    raise Misfit(
      f'{start} shape {leaf.shape} as {entry}, as {model} has it, got '
      f'{array.shape}.'
    )
  with np.errstate(over='ignore'):
    found = array.astype(leaf.dtype)
  if not np.isfinite(found).all():
    place = tuple(np.argwhere(~np.isfinite(found))[0].tolist())
    raise Misfit(
      f'{start} numbers that are finite in {found.dtype} as {entry}, got '
      f'{array[place]} at {list(place)}.'
    )
  return found


def _set(tree: dict[Any, Any], keys: tuple[Any, ...], leaf: np.ndarray) -> None:
  """Puts a leaf into nested dictionaries."""
  *parents, last = keys
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = leaf
