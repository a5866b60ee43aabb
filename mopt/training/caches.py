"""Where decoded pictures and compiled programs are kept between runs."""

import hashlib
import os
import pathlib
import platform

import jax


def folder() -> pathlib.Path:
  """`~/.cache/mopt`, or below `XDG_CACHE_HOME`; it may not exist."""
  root = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(root) / 'mopt'


def keep_compiled_programs() -> None:
  """Lets JAX find what it has compiled in an earlier process.

  Unless `JAX_COMPILATION_CACHE_DIR` says where. A folder of its own for every
  kind of CPU: programs for one may hold instructions that another has not.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  kind = hashlib.sha256(_cpu_features().encode()).hexdigest()[:12]
  path = folder() / 'compiled' / kind
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError:
    return  # a read-only home: slower the next time, and no reason to warn
  jax.config.update('jax_compilation_cache_dir', str(path))
  # Of a run only training and evaluation take longer, and are worth a file.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def _cpu_features() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:  # not on Linux
    return platform.machine() + platform.processor()
  named = ('flags', 'Features', 'model name')
  return '\n'.join(sorted({x for x in lines if x.startswith(named)}))
