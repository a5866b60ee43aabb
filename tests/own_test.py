"""Networks that are not ours: found by name, made, refused in one line."""

import os
import pathlib
import subprocess
import sys
import textwrap

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from mopt import training

_ROOT = pathlib.Path(__file__).parents[1]

# None of them takes `train`, or names its layers as ours do.
_LINEN = """
from flax import linen as nn


class Net(nn.Module):
  num_classes: int
  dtype: object

  @nn.compact
  def __call__(self, images):
    x = images[:, ::4, ::4].reshape(len(images), -1)
    x = nn.relu(nn.Dense(12, dtype=self.dtype)(x))
    return nn.Dense(self.num_classes, dtype=self.dtype)(x)


def make(num_classes, dtype):
  return Net(num_classes, dtype)


class House:
  make = make
"""

_NNX = """
from flax import nnx


class Net(nnx.Module):
  def __init__(self, num_classes, *, dtype, rngs, axis_name=None):
    dense = lambda *sizes: nnx.Linear(*sizes, dtype=dtype, rngs=rngs)
    # Keys that are numbers.
    self.hidden = nnx.List([dense(49, 12), dense(12, 12)])
    self.norm = nnx.BatchNorm(12, axis_name=axis_name, rngs=rngs)
    self.dropout = nnx.Dropout(0.3, rngs=rngs)
    self.out = dense(12, num_classes)

  def __call__(self, images, train=False):
    x = images[:, ::4, ::4].reshape(len(images), -1)
    for layer in self.hidden:
      x = nnx.relu(layer(x))
    x = self.norm(x, use_running_average=not train)
    return self.out(self.dropout(x, deterministic=not train))


def make(num_classes, dtype):
  return nnx.bridge.to_linen(Net, num_classes, dtype=dtype, axis_name=None)
"""

_PREDICT = """
import sys
import numpy as np
import models
from mopt import training

net = training.load(sys.argv[1])
assert net.model.partition(':')[0] not in sys.modules, 'imported by load'
images = np.load(sys.argv[2])
model = models.create(net.model, net.num_classes)
np.save(sys.argv[3], model.apply(net.variables, net.preprocess(images)))
"""


@pytest.fixture(autouse=True)
def forget_modules():
  """Those of one test are not those of the next."""
  before, path = set(sys.modules), list(sys.path)
  yield
  for name in set(sys.modules) - before:
    if name.startswith('net_'):
      del sys.modules[name]
  # Nothing stays of what it was searched in.
  assert sys.path == path


@pytest.fixture
def here(tmp_path, monkeypatch):
  """The current directory, outside of the repository and of `sys.path`."""
  folder = tmp_path / 'here'
  folder.mkdir()
  monkeypatch.chdir(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize(
  ('source', 'args', 'column'),
  [
    (_LINEN, [], 'nonzeros_Dense_0'),
    (_NNX, ['--parallel=data', '--optimizer=madam'], 'nonzeros_hidden_1'),
    (_NNX, ['--compute_dtype=bfloat16', '--l1=1e-3'], 'nonzeros_out'),
  ],
)
def test_it_is_trained_saved_and_predicts_elsewhere(
  call, tmp_path, source, args, column
):
  """A run, which compiles, and a process that imports JAX: 10 s each."""
  package = tmp_path / 'net_package'
  package.mkdir()
  (package / '__init__.py').touch()
  (package / 'net_inside.py').write_text(source)
  name = 'net_package.net_inside:make'
  code, out, err = call(
    *(f'--model={name}', '--epochs=2', '--train_size=128', '--val_size=40'),
    *('--workdir=run', *args),
  )
  assert (code, err) == (0, '')
  assert name in out
  table = (tmp_path / 'run' / 'results.csv').read_text()
  assert column in table.splitlines()[0].split(',')
  path = sorted((tmp_path / 'run' / 'members').iterdir())[0]
  net = training.load(path)
  assert net.model == name
  images = training.load_dataset('mnist5k').test.images[:20]
  np.save(tmp_path / 'images.npy', images)
  subprocess.run(
    [sys.executable, '-W', 'error', '-c', _PREDICT]
    + [str(path), 'images.npy', 'logits.npy'],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(_ROOT)},
    check=True,
  )
  logits = np.load(tmp_path / 'logits.npy')
  model = models.create(net.model, net.num_classes)
  expected = model.apply(net.variables, net.preprocess(images))
  np.testing.assert_array_equal(logits, expected)
  assert logits.shape == (20, 10)
  assert logits.std() > 0.01
  # Those of the file, and not of another initialisation.
  other = model.init(
    {'params': jax.random.key(0), 'dropout': jax.random.key(0)},
    net.preprocess(images),
  )
  assert jax.tree.structure(other) == jax.tree.structure(net.variables)
  others = model.apply(other, net.preprocess(images))
  assert abs(np.asarray(others) - logits).max() > 0.1


@pytest.mark.parametrize('function', ['make', 'Net', 'House.make'])
def test_create_makes_what_its_name_says(here, function):
  (here / 'net_a.py').write_text(_LINEN)
  model = models.create(f'net_a:{function}', 7, jnp.bfloat16)
  assert type(model).__name__ == 'Net'
  assert (model.num_classes, model.dtype) == (7, jnp.bfloat16)
  assert isinstance(model, nn.Module)
  variables = jax.eval_shape(
    model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1))
  )
  assert variables['params']['Dense_1']['kernel'].shape == (12, 7)


def test_modules_beside_it_are_found_too(here):
  (here / 'net_helper.py').write_text('width = 5\n')
  (here / 'net_late.py').write_text('depth = 3\n')
  (here / 'net_b.py').write_text(
    textwrap.dedent("""
      from flax import linen as nn
      import net_helper

      def make(num_classes, dtype):
        import net_late
        return nn.Dense(net_helper.width + net_late.depth)
    """)
  )
  model = models.create('net_b:make', 7)
  assert isinstance(model, nn.Dense)
  assert model.features == 8


def test_it_is_found_on_the_path_of_python(here, tmp_path, monkeypatch):
  folder = tmp_path / 'elsewhere'
  folder.mkdir()
  (folder / 'net_c.py').write_text(_LINEN)
  with pytest.raises(ValueError, match="No module named 'net_c'"):
    models.create('net_c:make')
  with monkeypatch.context() as patch:
    patch.syspath_prepend(folder)
    assert models.create('net_c:make').num_classes == 10


_FAULTS = {
  'net_syntax': 'def make(:\n',
  'net_raises': 'import math\nmath.sqrt(-1)\n',
  'net_exits': 'import sys\nsys.exit("usage:\\n  net")\n',
  'net_needs': 'import net_nowhere\n',
  'net_made': """
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

number = 3

def lines(num_classes, dtype):
  raise RuntimeError('two\\nlines')

def leaves(num_classes, dtype):
  raise SystemExit(0)

def nothing(num_classes, dtype):
  pass

def unmade(num_classes, dtype):
  return nn.Dense

def other(num_classes, dtype):
  return nnx.Linear(784, num_classes, rngs=nnx.Rngs(0))

def one(num_classes):
  return nn.Dense(num_classes)

def conv(num_classes, dtype):
  return nn.Sequential(
    [nn.Conv(num_classes, (3, 3)), lambda x: x.mean(axis=(1, 2))]
  )

def flat(num_classes, dtype):
  return nn.Dense(num_classes)

class Counting(nn.Module):
  num_classes: int
  dtype: object

  @nn.compact
  def __call__(self, images):
    self.param('count', lambda key: jnp.zeros((), jnp.int32))
    return nn.Dense(self.num_classes)(images.reshape(len(images), -1))
""",
}


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('lenet6', ['expected one of lenet5, mlp, vgg, or package.module:']),
    ('', ['expected one of lenet5']),
    (':', ['expected package.module:function']),
    ('net_made:', ['expected package.module:function']),
    (':conv', ['expected package.module:function']),
    ('net_made:conv:conv', ['expected package.module:function']),
    ('.net_made:conv', ['expected package.module:function']),
    ('./net_made.py:conv', ['expected package.module:function', 'not a file']),
    ('net_made.py:conv', ['expected package.module:function', 'not a file']),
    ('net_gone:f', ["ModuleNotFoundError: No module named 'net_gone'."]),
    ('net_made.deep:f', ["'net_made' is not a package"]),
    (
      'net_needs:f',
      ["No module named 'net_nowhere' (", 'net_needs.py, line 1'],
    ),
    ('net_syntax:f', ['SyntaxError: invalid syntax (net_syntax.py, line 1)']),
    ('net_raises:f', ['ValueError: ', 'net_raises.py, line 2']),
    ('net_exits:f', ['SystemExit: usage: net (', 'net_exits.py, line 2']),
    ('net_made:f', ['a function f in net_made (', 'net_made.py), got none.']),
    ('net_made:number', ['a function number in net_made', 'got 3.']),
    ('net_made:number.deep', ['a function number.deep', 'got none.']),
    ('net_made:lines', ['float32), got RuntimeError: two lines (', 'line 9']),
    ('net_made:leaves', ['(num_classes=10, dtype=', 'SystemExit: 0 (']),
    ('net_made:one', ['TypeError: one() got an unexpected keyword argument']),
    ('net_made:nothing', ['of flax.linen.Module', 'got NoneType.']),
    ('net_made:unmade', ['of flax.linen.Module', "linen.linear.Dense'>."]),
    ('net_made:other', ['flax.nnx.bridge.to_linen(Class, ...)', 'got Linear.']),
    (
      'net_made:conv',
      ['prunable=dense: expected a dense layer', 'layers_0/kernel.'],
    ),
    ('net_made:flat', ['expected logits [batch, 10]', '(1, 28, 28, 10)']),
    ('net_made:Counting', ['float32 in params/count', 'got int32.']),
  ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(
  call, tmp_path, name, said
):
  for module, source in _FAULTS.items():
    (tmp_path / f'{module}.py').write_text(source)
  code, out, err = call(f'--model={name}', '--workdir=run')
  assert (code, out) == (2, '')
  assert err.count('\n') == 1
  for part in said:
    assert part in err
  if name not in ('net_made:conv', 'net_made:flat'):
    assert err.startswith(f'train.py: model={name}: expected ')
  assert not (tmp_path / 'run').exists()
