"""Checkpoints: bit for bit what was saved, or refused, whatever happens."""

import collections
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import faults
from mopt.training import checkpoints
from mopt.training.checkpoints import Checkpoints
from mopt.training.checkpoints import Damaged
from mopt.training.checkpoints import restore

_ROOT = pathlib.Path(__file__).parents[1]


class _State(NamedTuple):
  params: dict
  opt_state: optax.OptState
  mask: np.ndarray
  counts: tuple


def _tree(epoch):
  """A population of [2, 3] members, with numbers of its epoch's own."""
  random = np.random.default_rng(epoch)
  kernel = random.normal(size=(2, 3, 5, 4)).astype(np.float32)
  kernel[0, 0] = np.nan, np.inf, -0.0, 1e-45  # a denormal
  params = {
    'layer1': {'kernel': kernel, 'bias': np.zeros((2, 3, 0), np.float32)},
    'conv/1': {
      'kernel': random.normal(size=(2, 3, 7)).astype(jnp.bfloat16),
    },
  }
  moments = optax.chain(optax.adam(1e-3), optax.trace(0.9)).init(params)
  moments = jax.tree.map(
    lambda x: random.integers(0, 99, x.shape).astype(x.dtype), moments
  )
  return _State(
    params=params,
    opt_state=jax.device_get(moments),
    mask=random.random((2, 3)) < 0.5,
    counts=(np.int32(epoch), np.array([epoch, -1]), np.array(epoch, np.uint8)),
  )


def _is_same(a, b):
  """Of one structure and bit for bit the same, dtypes included."""
  leaves = [[np.asarray(x) for x in jax.tree.leaves(tree)] for tree in (a, b)]
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
    for x, y in zip(*leaves, strict=True)
  )


def _save(folder, epochs, start=0, score=float):
  with Checkpoints(folder, start) as saved:
    for epoch in epochs:
      saved.save(epoch, _tree(epoch), score(epoch))


def _restore(folder, template=None):
  """The epoch, whether it is the tree of that epoch, and the warnings."""
  warnings = []
  template = _tree(0) if template is None else template
  found = restore(folder, template, warnings.append)
  if found is None:
    return None, None, warnings
  return found[0], _is_same(found[1], _tree(found[0])), warnings


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope='module')
def three(tmp_path_factory):
  """Checkpoints 1, the best, 4 and 5; not to be changed."""
  folder = tmp_path_factory.mktemp('three') / 'checkpoints'
  _save(folder, (1, 4, 5), score=lambda epoch: -epoch)
  return folder


@pytest.fixture
def copy(three, tmp_path):
  return pathlib.Path(shutil.copytree(three, tmp_path / 'checkpoints'))


def test_what_is_saved_comes_back_bit_for_bit(three):
  warnings = []
  epoch, tree = restore(three, _tree(0), warnings.append)
  assert (epoch, warnings) == (5, [])
  assert _is_same(tree, _tree(5))
  assert not _is_same(tree, _tree(4))
  # The classes of the template, and plain arrays that can be written to.
  assert type(tree) is _State
  assert type(tree.opt_state[0][0]) is optax.ScaleByAdamState
  for leaf in jax.tree.leaves(tree):
    assert type(leaf) is np.ndarray
  assert tree.params['conv/1']['kernel'].dtype == jnp.bfloat16
  assert tree.params['layer1']['bias'].shape == (2, 3, 0)


def test_what_is_saved_may_change_at_once(tmp_path):
  """The next epoch overwrites what the background is still writing."""
  tree = {'a': np.ones((1000, 1000), np.float32)}
  with Checkpoints(tmp_path, 0) as saved:
    saved.save(1, tree, 0.0)
    tree['a'][:] = 2
  _, found = restore(tmp_path, tree, pytest.fail)
  assert (found['a'] == 1).all()


def test_two_are_kept_and_the_best(tmp_path):
  with Checkpoints(tmp_path / 'new' / 'folder', 0) as saved:
    kept = []
    for epoch, score in enumerate([0.1, 0.7, 0.5, 0.2, 0.9, 0.3, 0.8], 1):
      saved.save(epoch, {'a': np.full(3, epoch)}, score)
      saved.finish()
      kept.append(''.join(_names(tmp_path / 'new' / 'folder')))
  assert kept == ['1', '12', '23', '234', '45', '56', '567']
  # Those that go on know of the scores before.
  with Checkpoints(tmp_path / 'new' / 'folder', 7) as saved:
    for epoch, score in ((8, 0.4), (9, 0.3)):
      saved.save(epoch, {'a': np.full(3, epoch)}, score)
  assert _names(tmp_path / 'new' / 'folder') == ['5', '8', '9']


def test_nothing_saved_is_nothing_to_restore(tmp_path):
  assert restore(tmp_path, _tree(0), pytest.fail) is None
  assert restore(tmp_path / 'no_such', _tree(0), pytest.fail) is None


def test_one_that_was_not_finished_is_not_used(copy):
  (copy / '5' / 'sha256.json').unlink()
  epoch, is_right, (warning,) = _restore(copy)
  assert (epoch, is_right) == (4, True)
  assert f'{copy}/5: not used' in warning
  assert 'sha256.json' in warning


def test_a_first_one_that_was_not_finished_is_as_none(copy):
  for name in '14':
    shutil.rmtree(copy / name)
  (copy / '5' / 'sha256.json').unlink()
  epoch, _, (warning,) = _restore(copy)
  assert epoch is None
  assert f'{copy}/5: not used' in warning
  _save(copy, (1, 2))
  assert _names(copy) == ['1', '2']
  assert _restore(copy) == (2, True, [])


def test_what_was_refused_is_written_anew(copy):
  """Orbax leaves an epoch alone that is there, and keeps the last two."""
  with Checkpoints(copy, 5) as saved:
    saved.save(6, {'a': np.zeros(3)}, -9.0)  # of something else
  (copy / '5' / 'default' / 'manifest.ocdbt').write_bytes(b'')
  (copy / '7.orbax-checkpoint-tmp' / 'default').mkdir(parents=True)
  (copy / 'notes.txt').write_text('of somebody else')
  epoch, is_right, warnings = _restore(copy)
  assert (epoch, is_right, len(warnings)) == (1, True, 2)
  with Checkpoints(copy, 1) as saved:
    assert {'5', '6'} < set(_names(copy))  # Nothing is deleted in vain.
    saved.save(5, _tree(5), 0.0)
    saved.finish()
    assert _names(copy) == ['1', '5', 'notes.txt']
    assert _restore(copy) == (5, True, [])


def test_older_damage_does_not_keep_others_from_being_written(copy):
  """Orbax reads what scores there were before."""
  (copy / '1' / 'metrics' / 'metrics').write_text('{"scope": 0.9}')
  assert _restore(copy) == (5, True, [])
  _save(copy, (6, 7), start=5)
  assert _names(copy) == ['6', '7']
  assert _restore(copy) == (7, True, [])


def test_a_hundred_mutations_and_none_loads_as_another(three, tmp_path):
  """Orbax reads a hundred of them: 10 s."""
  random = np.random.default_rng(0)
  outcomes = collections.Counter()
  for number in range(100):
    folder = tmp_path / str(number)
    shutil.copytree(three, folder)
    kind = faults.mutate(random, folder / '5', folder / '4')
    try:
      epoch, is_right, warnings = _restore(folder)
    except Damaged:
      epoch, is_right, warnings = 'none', True, []
    assert is_right, (number, kind)
    assert len(warnings) == {'none': 0, 5: 0, 4: 1, 1: 2}[epoch]
    outcomes[kind, epoch] += 1
    shutil.rmtree(folder)
  assert {kind for kind, _ in outcomes} == set(faults.MUTATIONS)
  # A file for the same one of another checkpoint may be no damage.
  assert {kind for kind, epoch in outcomes if epoch == 5} <= {'swap'}
  assert outcomes['swap', 1] > 0  # The best is there where the last are not.
  assert sum(n for (_, epoch), n in outcomes.items() if epoch == 4) > 60


def test_a_checkpoint_under_the_name_of_another_epoch_is_refused(copy):
  (copy / '5').rename(copy / '7')
  epoch, is_right, (warning,) = _restore(copy)
  assert (epoch, is_right) == (4, True)
  assert f'{copy}/7: not used' in warning


def test_if_all_are_damaged_it_says_so(copy):
  for epoch in '145':
    (copy / epoch / 'default' / 'manifest.ocdbt').write_bytes(b'')
  warnings = []
  with pytest.raises(Damaged, match=f'{copy}: expected a checkpoint'):
    restore(copy, _tree(0), warnings.append)
  assert [warning.split(':')[0] for warning in warnings] == [
    f'{copy}/{epoch}' for epoch in '541'
  ]
  assert _names(copy) == ['1', '4', '5']


_KERNEL = np.zeros((3, 4), np.float32)
_COUNT = np.zeros(3, np.int32)


@pytest.mark.parametrize(
  ('template', 'named'),
  [
    ({'a': _KERNEL.T, 'b': _COUNT}, ["['a']", 'float32(3, 4)', '(4, 3)']),
    ({'a': np.zeros((5, 4), 'f'), 'b': _COUNT}, ["['a']", '(3, 4)', '(5, 4)']),
    ({'a': _KERNEL[None], 'b': _COUNT}, ["['a']", '(3, 4)', '(1, 3, 4)']),
    ({'a': _KERNEL[:0], 'b': _COUNT}, ["['a']", '(3, 4)', '(0, 4)']),
    ({'a': _KERNEL.astype('d'), 'b': _COUNT}, ["['a']", 'float32', 'float64']),
    (
      {'a': _KERNEL.astype(jnp.bfloat16), 'b': _COUNT},
      ["['a']", 'float32', 'bfloat16'],
    ),
    ({'a': _KERNEL, 'b': _COUNT.astype('u4')}, ["['b']", 'int32', 'uint32']),
    ({'a': _KERNEL, 'b': _COUNT == 1}, ["['b']", 'int32', 'bool']),
    ({'a': _KERNEL}, ["['b']", 'int32(3,)', 'expected nothing']),
    ({'a': _KERNEL, 'b': _COUNT, 'c': _COUNT}, ["['c']", 'is nothing']),
    ({'a': _KERNEL, 'c': _COUNT}, ["['b']", 'expected nothing']),
    ({'a': {'kernel': _KERNEL}, 'b': _COUNT}, ["['a']", 'expected nothing']),
    ((_KERNEL, _COUNT), ["['a']", 'expected nothing']),
  ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, template, named):
  tree = {'a': _KERNEL + 1, 'b': _COUNT + 1}
  with Checkpoints(tmp_path, 0) as saved:
    saved.save(3, tree, 0.0)
  assert restore(tmp_path, tree, pytest.fail)[0] == 3
  warnings = []
  with pytest.raises(Damaged):
    restore(tmp_path, template, warnings.append)
  (warning,) = warnings
  for part in (f'{tmp_path}/3: not used', *named):
    assert part in warning


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
  (tmp_path / 'file').touch()
  saved = Checkpoints(tmp_path / 'file' / 'checkpoints', 0)
  with pytest.raises(OSError, match='file/checkpoints/1'):
    saved.save(1, _tree(1), 0.0)
  saved.close()  # It was said.


def test_an_epoch_before_the_last_one_is_not_lost_silently(copy):
  """Orbax would leave it out."""
  with Checkpoints(copy, 5) as saved:
    saved.save(7, _tree(7), 0.0)
    with pytest.raises(OSError, match='6: there is a later checkpoint'):
      saved.save(6, _tree(6), 0.0)
  assert _restore(copy) == (7, True, [])


class _Noisy:
  """Fails where no one can catch it."""

  def __init__(self, message):
    self.message = message

  def __del__(self):
    raise RuntimeError(self.message)


def test_of_what_cannot_be_raised_only_closed_loops_are_silent(monkeypatch):
  said = []
  hook = lambda unraisable: said.append(str(unraisable.exc_value))
  monkeypatch.setattr(sys, 'unraisablehook', hook)
  checkpoints._ignore_closed_loops.__wrapped__()
  for message in ('Event loop is closed', 'something else'):
    _Noisy(message)
    gc.collect()
  assert said == ['something else']


def test_a_seal_that_cannot_be_written_is_an_os_error(copy, monkeypatch):
  monkeypatch.setattr(checkpoints.os, 'replace', _refuse)
  saved = Checkpoints(copy, 5)
  saved.save(6, _tree(6), 0.0)
  with pytest.raises(OSError, match='No space left'):
    saved.save(7, _tree(7), 0.0)
  saved.close()  # It was said.
  assert _restore(copy)[:2] == (5, True)


def _refuse(*args):
  raise OSError(28, 'No space left on device')


_SAVES = """
import resource, sys
from absl import logging
import numpy as np
from mopt.training.checkpoints import Checkpoints
logging.set_verbosity(logging.FATAL)
if limit := int(sys.argv[2]):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with Checkpoints(sys.argv[1], 0) as saved:
  for epoch in range(1, 10):
    size = 60_000 if epoch >= 3 else 5_000
    random = np.random.default_rng(epoch)  # Noise cannot be compressed.
    tree = {name: random.normal(size=size) for name in 'abcd'}
    saved.save(epoch, tree, 0.0)
"""


@pytest.mark.parametrize('is_disk', [False, True])
def test_a_full_disk_is_an_os_error_and_nothing_else(tmp_path, is_disk):
  """Real writes that fail, in a process of its own."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  if is_disk:
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=900k', 'tmpfs', str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
      pytest.skip('a small disk needs the rights to mount one')
  try:
    limit = '0' if is_disk else '300000'
    done = subprocess.run(
      [sys.executable, '-c', _SAVES, str(folder / 'checkpoints'), limit],
      capture_output=True,
      text=True,
      env=os.environ | {'PYTHONPATH': str(_ROOT)},
    )
    lines = done.stderr.splitlines()
    last = next(n for n in reversed(range(len(lines))) if lines[n][0] != ' ')
    assert lines[last].startswith(f'OSError: {folder}/checkpoints')
    # Other tracebacks are those of its causes; Orbax's threads have none.
    assert done.stderr.startswith('Traceback')
    assert 'Exception in thread' not in done.stderr
    assert 'Event loop' not in done.stderr
    template = dict.fromkeys('abcd', np.zeros(5_000))
    epoch, tree = restore(folder / 'checkpoints', template, lambda _: None)
    assert epoch == 2
    random = np.random.default_rng(2)
    for name in 'abcd':
      np.testing.assert_array_equal(tree[name], random.normal(size=5_000))
  finally:
    if is_disk:
      subprocess.run(['umount', str(folder)], capture_output=True)


_SAVES_FOREVER = """
import os, sys
import numpy as np
from mopt.training.checkpoints import Checkpoints
import orbax.checkpoint  # What follows is to be all writing.
for folder in sys.argv[1:]:
  if os.fork() == 0:
    print(os.getpid(), flush=True)
    with Checkpoints(folder, 0) as saved:
      for epoch in range(1, 10_000):
        saved.save(epoch, {'a': np.full(100_000, epoch)}, 0.0)
  os.wait()
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_saves_loses_at_most_that(tmp_path):
  """Eight processes start, and are killed: 10 s."""
  random = np.random.default_rng(0)
  folders = [tmp_path / str(number) for number in range(8)]
  template = {'a': np.zeros(100_000, int)}
  left = []
  with subprocess.Popen(
    [sys.executable, '-c', _SAVES_FOREVER, *map(str, folders)],
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
  ) as process:
    for folder in folders:
      child = int(process.stdout.readline())
      while not (folder / '2').exists():
        time.sleep(0.01)
      time.sleep(random.uniform(0, 0.3))
      os.kill(child, 9)
  for folder in folders:
    epochs = [int(name) for name in _names(folder) if name.isdecimal()]
    warnings = []
    epoch, tree = restore(folder, template, warnings.append)
    assert epoch >= max(epochs) - 1
    assert (tree['a'] == epoch).all()
    left.append(len(warnings) + len(_names(folder)) - len(epochs))
    with Checkpoints(folder, epoch) as saved:
      saved.save(epoch + 1, {'a': np.full(100_000, -1)}, 0.0)
    assert all(name.isdecimal() for name in _names(folder))
    epoch_then, tree = restore(folder, template, pytest.fail)
    assert (epoch_then, tree['a'][0]) == (epoch + 1, -1)
  assert any(left), 'none was killed in the middle'
