"""Four CPU devices, so that pmap is real, and strict shapes.

On a GPU there are as many devices as there are cards: what needs four of them
asks for the fixture `four_devices`.
"""

import atexit
import os
import pathlib
import shutil
import tempfile

import hypothesis
import jax
import numpy as np
import pytest

from tests.devices import first_devices

# Most of the time goes into compiling, much of it the same programs again, in
# this process and in those that tests start.
_PROGRAMS = tempfile.mkdtemp()
atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = _PROGRAMS
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
jax.config.update('jax_compilation_cache_dir', _PROGRAMS)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# A busy machine is no failure.
hypothesis.settings.register_profile('patient', deadline=None)
hypothesis.settings.load_profile('patient')


# Linux gives a process 65,530 pieces of memory, of which each program takes a
# few: beyond that, compiling one more crashes.
_MAPS = pathlib.Path('/proc/self/maps')
_MANY = 20_000


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Lets go of what is compiled, between two files, if it is a lot."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > _MANY:
    jax.clear_caches()


@pytest.fixture
def four_devices():
  """Four devices of the default platform; skips where there are fewer."""
  return first_devices(4)


@pytest.fixture
def exact_products():
  """Products as exact as CPUs have them: GPUs round to TF32, TPUs further."""
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture(scope='session')
def few_digits():
  """Two batches of ten classes, and none to validate on."""
  from mopt import training  # the library's tests do without

  data = training.load_dataset('mnist5k')
  chosen = np.linspace(0, len(data.train.labels) - 1, 64).astype(int)
  train = data.train._replace(
    images=data.train.images[chosen], labels=data.train.labels[chosen]
  )
  nothing = train._replace(images=train.images[:0], labels=train.labels[:0])
  return data._replace(train=train, val=nothing, test=train)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
  """Calls train.py in this process; returns exit code, output and errors."""
  import train  # takes seconds, and the library does without

  monkeypatch.chdir(tmp_path)
  # JAX is that of all tests.
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '4')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path))

  def run(*args):
    train.FLAGS.unparse_flags()
    for name in train.FLAGS:
      if train.FLAGS[name].present:
        train.FLAGS[name].unparse()
    code = 0
    try:
      train.main(train.parse_flags(['train.py', *args]))
    except SystemExit as stop:
      code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  return run
