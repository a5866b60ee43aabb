"""A trained network on disk, which NumPy alone reads and writes."""

from collections.abc import Iterator, Mapping
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mopt.training import files
from mopt.training.files import DAMAGED_ARCHIVE
from mopt.training.scaling import normalise
from mopt.training.scaling import Scale

PyTree = Any


class Network(NamedTuple):
  """A trained network, as `load` returns it."""

  # Nested dictionaries of NumPy arrays: params and, say, batch_stats.
  variables: dict[str, PyTree]
  model: str  # For `models.create`, which may import it.
  num_classes: int
  image_shape: tuple[int, ...]  # (height, width, channels), or of features.
  mean: Scale  # Of pixels or features, see `mopt.training.normalise`.
  std: Scale
  class_names: tuple[str, ...] = ()  # By label, where the data have any.

  @property
  def params(self) -> PyTree:
    """What was trained."""
    return self.variables['params']

  def preprocess(self, images: np.ndarray) -> np.ndarray:
    """From pixels 0..255, or features, `[batch, *image_shape]` to an input."""
    if tuple(images.shape[1:]) != self.image_shape:
      raise ValueError(
        f'expected images [batch, {", ".join(map(str, self.image_shape))}], '
        f'got shape {tuple(images.shape)}.'
      )
    return normalise(images, self.mean, self.std)


def save(path: str | os.PathLike, network: Network) -> None:
  """Writes a network as .npz, whole or not at all."""
  arrays, keys = {}, {}
  for above, leaf in leaves(network.variables):
    name = '/'.join(map(str, above))
    arrays[name], keys[name] = np.asarray(leaf), list(above)
  about = network._replace(variables={})._asdict() | {'names': list(arrays)}
  # Lists of layers of NNX have numbers as keys, which the name does not tell.
  if others := {k: v for k, v in keys.items() if v != k.split('/')}:
    about['keys'] = others
  # Compressed, since most of it is zeros.
  files.replace(
    path,
    lambda file: np.savez_compressed(
      file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays
    ),
  )


def leaves(tree: PyTree) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """What nested dictionaries hold, each with the keys that lead there."""
  if not isinstance(tree, Mapping):
    yield (), tree
    return
  for key in sorted(tree):
    for path, leaf in leaves(tree[key]):
      yield (key, *path), leaf


def load(path: str | os.PathLike) -> Network:
  """Reads a network that `train.py` has written.

  Nothing is unpickled or imported, so a file from a stranger can at worst be
  refused. But it names its network, and `models.create` imports and runs the
  module of a name `package.module:function`: look at `model` before.

  Args:
    path: a .npz file of the folder `members` of a run.

  Returns:
    A `Network`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no network, or damaged.
  """
  try:
    # Opened here, for np.load leaves a file open that is no archive.
    with (
      pathlib.Path(path).open('rb') as stream,
      np.load(stream, allow_pickle=False) as file,
    ):
      about = json.loads(str(file['about']))
      # A damaged index of the archive may have lost some.
      if missing := set(about['names']) - set(file.files):
        raise ValueError(f'missing entry {min(missing)!r}')
      variables: dict[str, Any] = {'params': {}}
      for name in file.files:
        if name == 'about':
          continue
        *parents, last = about.get('keys', {}).get(name, name.split('/'))
        known = parents and name in about['names']
        if not known or file[name].dtype.kind != 'f':
          raise ValueError(f'unexpected entry {name!r}')
        folder = variables
        for parent in parents:
          folder = folder.setdefault(parent, {})
        folder[last] = file[name]
    return Network(
      variables=variables,
      model=str(about['model']),
      num_classes=int(about['num_classes']),
      image_shape=tuple(int(n) for n in about['image_shape']),
      mean=_scale(about['mean']),
      std=_scale(about['std']),
      # Files from before have none.
      class_names=tuple(map(str, about.get('class_names', ()))),
    )
  except FileNotFoundError:
    raise
  # The last three: its entries are not those of a network.
  except (*DAMAGED_ARCHIVE, LookupError, AttributeError, TypeError) as error:
    raise ValueError(
      f'{os.fspath(path)}: expected a network written by train.py ({error}).'
    ) from error


def _scale(value: Any) -> Scale:
  """From JSON; features have a number for each place on their last axis."""
  return tuple(map(float, value)) if isinstance(value, list) else float(value)
