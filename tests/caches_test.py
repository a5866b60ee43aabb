"""Folders that outlive a run."""

import subprocess
import sys

import jax
import pytest

from mopt.training import caches

_KEY = 'jax_compilation_cache_dir'


@pytest.fixture
def settings(monkeypatch, tmp_path):
  """What JAX is told."""
  found = {}
  monkeypatch.setattr(jax.config, 'update', found.__setitem__)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  return found


def test_programs_are_kept_by_kind_of_cpu(settings, monkeypatch, tmp_path):
  caches.keep_compiled_programs()
  first = settings[_KEY]
  assert first.startswith(str(tmp_path / 'mopt' / 'compiled'))
  caches.keep_compiled_programs()
  assert settings[_KEY] == first
  monkeypatch.setattr(caches, '_cpu_features', lambda: 'flags: fpu')
  caches.keep_compiled_programs()
  assert settings[_KEY] != first


def test_where_the_cpu_is_not_described_the_platform_is(settings, monkeypatch):
  def absent(path):
    raise FileNotFoundError(path)

  caches.keep_compiled_programs()
  before = settings[_KEY]
  monkeypatch.setattr(caches.pathlib.Path, 'read_text', absent)
  folders = set()
  for machine in ('arm64', 'x86_64'):
    monkeypatch.setattr(caches.platform, 'machine', lambda m=machine: m)
    caches.keep_compiled_programs()
    folders.add(settings[_KEY])
  assert len(folders - {before}) == 2


def test_another_folder_may_be_asked_for(settings, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', '/somewhere')
  caches.keep_compiled_programs()
  assert settings == {}


def test_a_home_that_cannot_be_written_to_is_no_error(
  settings, monkeypatch, tmp_path
):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  caches.keep_compiled_programs()
  assert settings == {}


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
  """Processes with JAX, which take 3 s to start."""
  code = """if True:
    import jax
    from mopt.training import caches
    caches.keep_compiled_programs()
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    hits = []
    jax.monitoring.register_event_listener(lambda e, **_: hits.append(e))
    jax.jit(lambda x: x * 3 + 1)(1.0)
    print('/jax/compilation_cache/cache_hits' in hits)
  """
  env = {'XDG_CACHE_HOME': str(tmp_path), 'PYTHONPATH': '.'}
  found = [
    subprocess.run(
      [sys.executable, '-c', code], env=env, capture_output=True, text=True
    ).stdout.strip()
    for _ in range(2)
  ]
  assert found == ['False', 'True']
