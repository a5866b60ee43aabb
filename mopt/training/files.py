"""Files that are written whole or not at all, and tables in them."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile
from typing import Any, BinaryIO
import zipfile
import zlib

import numpy as np

# What a file is called until it is whole.
UNFINISHED = '.unfinished-'

# What reading an .npz file may raise where there is none, or bits have flipped;
# a flip in its index may ask for a way of compression that zipfile has not.
DAMAGED_ARCHIVE = (
  OSError,
  EOFError,
  KeyError,
  ValueError,
  NotImplementedError,
  RuntimeError,
  MemoryError,  # for an array of a size that cannot be
  zipfile.BadZipFile,
  zlib.error,
)


@contextlib.contextmanager
def archive(path: pathlib.Path) -> Iterator[Any]:
  """The arrays of an .npz file, none of which is unpickled.

  Raises:
    One of `DAMAGED_ARCHIVE`: if it is none, here or where an array is read.
  """
  if not zipfile.is_zipfile(path):
    path.open('rb').close()  # Unless there is no such file.
    raise ValueError('it is no archive')
  # Opened here, for np.load leaves a file open that it cannot read.
  with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
    yield arrays


def reason(error: BaseException) -> str:
  """Why a file could not be read, in one line."""
  found = getattr(error, 'strerror', None) or str(error).rstrip('.')
  return ' '.join(found.split())


def replace(
  path: str | os.PathLike, write: Callable[[BinaryIO], object]
) -> None:
  """Writes a file under another name and then moves it into place."""
  path = pathlib.Path(path)
  number, name = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
  try:
    with open(number, 'wb') as file:
      write(file)
      file.flush()  # Here a full disk may show.
  except BaseException:
    os.unlink(name)  # It is closed, or Windows would not.
    raise
  os.chmod(name, 0o644)
  os.replace(name, path)


def write_text(path: str | os.PathLike, text: str) -> None:
  replace(path, lambda file: file.write(text.encode()))


def write_json(path: str | os.PathLike, value: Any) -> None:
  write_text(path, json.dumps(value, indent=2) + '\n')


def fingerprint(path: str | os.PathLike) -> str:
  """Another one for other bytes, 16 hexadecimal digits."""
  with pathlib.Path(path).open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()[:16]


def write_csv(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> None:
  """Writes rows of the same columns; empty cells for `None` and NaN."""

  def cell(value):
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return '' if missing else value

  text = io.StringIO(newline='')
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(rows[0])
  writer.writerows([cell(value) for value in row.values()] for row in rows)
  write_text(path, text.getvalue())


def read_csv(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads what `write_csv` has written; `None` for an empty cell."""

  def value(cell):
    for number in (int, float):
      try:
        return number(cell)
      except ValueError:
        pass
    return cell or None

  with pathlib.Path(path).open(newline='', encoding='utf-8') as file:
    return [
      {name: value(cell) for name, cell in row.items()}
      for row in csv.DictReader(file)
    ]


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The records of a file of `append_jsonl`; none if there is no file."""
  path = pathlib.Path(path)
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def append_jsonl(
  path: str | os.PathLike, records: Sequence[dict[str, Any]]
) -> None:
  """Appends a line of JSON per record; NaN and infinities become null."""

  def plain(value):
    is_bad = isinstance(value, float) and not math.isfinite(value)
    return None if is_bad else value

  lines = [
    json.dumps({k: plain(v) for k, v in record.items()}, allow_nan=False)
    for record in records
  ]
  with pathlib.Path(path).open('a') as file:
    file.write(''.join(line + '\n' for line in lines))
