"""Event files of a population, which TensorBoard shows."""

from collections.abc import Callable, Mapping, Sequence
import importlib.util
import os
import pathlib
import shutil
import struct
import time
from typing import Any

from mopt.training.settings import LARGEST

_Records = Sequence[Mapping[str, Any]]


def check_installed() -> None:
  """Raises unless event files can be written.

  Raises:
    ValueError: with one line that says what to install.
  """
  if importlib.util.find_spec('tensorboardX') is None:
    raise ValueError(
      'tensorboard=True: expected tensorboardX, which writes what TensorBoard '
      "shows; to install it: pip install -e '.[tensorboard]'."
    )


def start(
  folder: str | os.PathLike, names: Sequence[str], records: _Records
) -> Callable[[_Records], None]:
  """Makes a file for each member, to which records of an epoch are appended.

  Whatever is in the folder is replaced: epochs that a run trains again, after
  it was cut off, would otherwise be there twice. TensorBoard, if it is looking,
  is told so.

  Args:
    folder: made with a folder for each of `names`.
    names: of the members.
    records: of the epochs that are done, if there are any: of each epoch one
      for each member, in their order.

  Returns:
    A function of the records of an epoch, one for each member, see
    `mopt.training.Job.on_epoch`. The names of their numbers are the tags, the
    epoch is the step. What is not finite in float32 is left out.

  Raises:
    OSError: if something cannot be written; so does the function.
  """
  from tensorboardX.proto.event_pb2 import SessionLog

  folder = pathlib.Path(folder)
  if folder.exists():
    shutil.rmtree(folder)
  now = time.time()
  # What has been shown of this step and later ones is no more.
  restart = SessionLog(status=SessionLog.START)
  head = _framed(file_version='brain.Event:2', wall_time=now)
  head += _framed(session_log=restart, step=1, wall_time=now)
  paths = []
  for i, name in enumerate(names):
    # TensorBoard goes by this name, and reads a file of another time anew.
    path = folder / name / f'events.out.tfevents.{now:.6f}.mopt'
    path.parent.mkdir(parents=True)
    path.write_bytes(head + b''.join(map(_scalars, records[i :: len(names)])))
    paths.append(path)

  # Files are not kept open: there may be more members than one may have files.
  def append(records):
    for path, record in zip(paths, records, strict=True):
      with path.open('ab') as file:
        file.write(_scalars(record))

  return append


def _scalars(record: Mapping[str, Any]) -> bytes:
  """The numbers of a record, but the epoch, by their names."""
  from tensorboardX.proto.summary_pb2 import Summary

  values = [
    Summary.Value(tag=name, simple_value=value)
    for name, value in record.items()
    # None is what a log has for NaN, which no comparison is true of.
    if name != 'epoch' and value is not None and abs(value) <= LARGEST
  ]
  summary = Summary(value=values)
  return _framed(summary=summary, step=record['epoch'], wall_time=time.time())


def _framed(**event: Any) -> bytes:
  """An event as a record of a file: its length, itself, and checks of both.

  Not by the SummaryWriter of tensorboardX: a thread of that writes, and if it
  cannot, since the disk is full, the run would wait for it forever.
  """
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  data = Event(**event).SerializeToString()
  size = struct.pack('<Q', len(data))
  check = lambda part: struct.pack('<I', masked_crc32c(part))
  return size + check(size) + data + check(data)
