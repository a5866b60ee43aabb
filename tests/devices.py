"""Devices for tests, which are CPUs unless there is a GPU."""

from typing import NamedTuple

import jax
import pytest


class FakeDevice(NamedTuple):
  """What a layout asks of a device."""

  number: int
  platform: str = 'cpu'
  process_index: int = 0


def fake_devices(number, platform='cpu', processes=1):
  """So many, dealt out to processes in turn."""
  return [FakeDevice(i, platform, i % processes) for i in range(number)]


def first_devices(number):
  """So many devices of the default platform; skips where there are fewer."""
  found = jax.devices()[:number]
  if len(found) < number:
    pytest.skip(f'needs {number} devices, found {len(found)}')
  return found
