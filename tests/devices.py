"""Devices for tests, which are CPUs unless there is a GPU."""

import jax
import pytest


def first_devices(number):
  """So many devices of the default platform; skips where there are fewer."""
  found = jax.devices()[:number]
  if len(found) < number:
    pytest.skip(f'needs {number} devices, found {len(found)}')
  return found
