"""Data sets: splits, the cache, and what happens where there is no data."""

import importlib.util
import pathlib
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mopt.training import Config
from mopt.training import data as data_lib
from mopt.training import load_dataset
from mopt.training import normalise
from mopt.training import sources

_TFDS = pathlib.Path(__file__).parents[2] / 'shared' / 'tfds'
needs_tfds = pytest.mark.skipif(
  not (_TFDS / 'mnist').exists(),
  reason='needs MNIST prepared by TFDS in ../shared/tfds',
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and the path that data sets would have in it."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'mopt'


def _count_calls(monkeypatch, name, arrays):
  calls = []

  def read(*args):
    calls.append(args)
    return arrays

  monkeypatch.setattr(sources, name, read)
  return calls


def _digits(n=1200):
  labels = np.arange(n, dtype=np.int32) % 10
  images = np.random.RandomState(0).randint(0, 256, (n, 28, 28, 1))
  return [images.astype(np.uint8), labels]


def test_mnist5k_has_the_documented_stratified_split():
  data = load_dataset('mnist5k')
  for split, size in ((data.train, 4000), (data.val, 500), (data.test, 500)):
    assert split.images.shape == (size, 28, 28, 1)
    assert split.images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(split.labels), [size // 10] * 10)
  assert data.num_classes == 10
  # Pictures of digits: dark, with bright strokes, none of them empty.
  assert 20 < data.train.images.mean() < 50
  assert data.train.images.max(axis=(1, 2, 3)).min() > 200


def test_mnist5k_is_made_once_and_then_found(cache, monkeypatch):
  first = load_dataset('mnist5k')
  assert (cache / 'mnist5k.npz').exists()
  monkeypatch.setattr(sources, 'read_mnist5k', None)
  second = load_dataset('mnist5k')
  for split in ('train', 'val', 'test'):
    for x, y in zip(getattr(first, split), getattr(second, split)):
      np.testing.assert_array_equal(x, y)


def _changed(split, **changes):
  """A split with some of its numbers changed, in arrays of its own."""
  for name, (place, value) in changes.items():
    array = getattr(split, name).copy()
    array[place] = value
    split = split._replace(**{name: array})
  return split


def test_other_data_have_another_fingerprint():
  data = load_dataset('mnist5k', None, 20, 100)
  first = data_lib.fingerprint(data)
  assert re.fullmatch('[0-9a-f]{16}', first)
  # Arrays of JAX, and with gaps between their rows, have the same numbers; the
  # scale is computed of them.
  same = [
    load_dataset('mnist5k', None, 20, 100),
    data._replace(train=jax.tree.map(jnp.asarray, data.train)),
    data._replace(
      test=data.test._replace(images=np.repeat(data.test.images, 2, 0)[::2])
    ),
    data._replace(std=1.0),
  ]
  assert {data_lib.fingerprint(x) for x in same} == {first}
  places = {'images': ((7, 3, 4, 0), 99), 'labels': (7, 11)}
  others = [
    data._replace(**{split: _changed(getattr(data, split), **{name: change})})
    for split in ('train', 'val', 'test')
    for name, change in places.items()
  ]
  reverse = lambda x: x[::-1]
  others += [
    data._replace(train=jax.tree.map(reverse, data.train)),
    data._replace(val=data.test, test=data.val),
    data._replace(num_classes=11),
    data._replace(class_names=tuple('abcdefghij')),
    # The same bytes in another shape, and of another type.
    data._replace(
      test=data.test._replace(images=data.test.images.reshape(-1, 14, 56, 1))
    ),
    data._replace(
      test=data.test._replace(labels=data.test.labels.view(np.uint32))
    ),
    data._replace(val=jax.tree.map(lambda x: x[:0], data.val)),
  ]
  prints = [data_lib.fingerprint(x) for x in others]
  assert len({first, *prints}) == 1 + len(others)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_features_of_any_type_have_a_fingerprint(dtype):
  features = jnp.array([[1.0, 2.0], [3.0, -0.5]], jnp.float32)
  split = data_lib.Split(
    np.asarray(features).astype(jnp.dtype(dtype)), np.array([0, 1])
  )
  data = data_lib.Dataset('own', 2, split, split, split, 0.0, 1.0)
  other = split._replace(images=split.images[::-1])
  assert data_lib.fingerprint(data) != data_lib.fingerprint(
    data._replace(val=other)
  )


def test_splits_are_disjoint_and_the_same_in_every_run():
  first, second = load_dataset('mnist5k'), load_dataset('mnist5k')
  np.testing.assert_array_equal(first.val.images, second.val.images)
  seen = [
    x.tobytes()
    for split in (first.train, first.val, first.test)
    for x in split.images
  ]
  assert len(set(seen)) == len(seen) == 5000


def test_the_test_split_does_not_depend_on_the_validation_size():
  first, second = load_dataset('mnist5k', val_size=0), load_dataset('mnist5k')
  np.testing.assert_array_equal(first.test.images, second.test.images)
  assert len(first.train.labels) == 4500
  assert len(first.val.labels) == 0


def test_a_validation_size_that_leaves_nothing_is_refused():
  with pytest.raises(ValueError, match=r'val_size=4500: expected 0 to 4499'):
    load_dataset('mnist5k', val_size=4500)


@pytest.mark.parametrize(
  ('size', 'val_size'), [(100, 500), (4000, 500), (1, 0)]
)
def test_training_examples_can_be_fewer(size, val_size):
  whole = load_dataset('mnist5k', val_size=val_size)
  data = load_dataset('mnist5k', val_size=val_size, train_size=size)
  assert data.train.images.shape == (size, 28, 28, 1)
  assert data.train.labels.shape == (size,)
  if size >= 10:
    counts = np.bincount(data.train.labels)
    np.testing.assert_array_equal(counts, [size // 10] * 10)
  for split in ('val', 'test'):
    for fewer, all_ in zip(getattr(data, split), getattr(whole, split)):
      np.testing.assert_array_equal(fewer, all_)
  # Pictures keep their labels.
  labels = {
    image.tobytes(): label
    for image, label in zip(whole.train.images, whole.train.labels)
  }
  found = [labels[image.tobytes()] for image in data.train.images]
  np.testing.assert_array_equal(found, data.train.labels)
  assert len({image.tobytes() for image in data.train.images}) == size


def test_fewer_training_examples_are_the_same_in_every_run():
  first = load_dataset('mnist5k', train_size=77)
  second = load_dataset('mnist5k', train_size=77)
  np.testing.assert_array_equal(first.train.images, second.train.images)
  # As even as 77 examples can be.
  assert set(np.bincount(first.train.labels)) == {7, 8}


@pytest.mark.parametrize(
  ('size', 'val_size', 'most'),
  [(4001, None, 4000), (4500, 1, 4499), (0, 0, 4500)],
)
def test_a_training_size_that_cannot_be_had_is_refused(size, val_size, most):
  message = f'train_size={size}: expected 1 to {most},'
  with pytest.raises(ValueError, match=message):
    load_dataset('mnist5k', val_size=val_size, train_size=size)


def test_the_second_start_reads_the_cache(cache, monkeypatch):
  calls = _count_calls(monkeypatch, 'read_mnist5k', _digits())
  first = load_dataset('mnist5k', val_size=100)
  second = load_dataset('mnist5k', val_size=100)
  assert len(calls) == 1
  np.testing.assert_array_equal(first.train.images, second.train.images)
  assert [p.name for p in cache.iterdir()] == ['mnist5k.npz']


def test_a_set_in_another_folder_is_another_set(cache, monkeypatch):
  images, labels = _digits()
  for folder, x in (('here', images), ('there', 255 - images), (None, images)):
    calls = _count_calls(monkeypatch, 'read_tfds', [x, labels, x, labels])
    for _ in range(2):
      data = load_dataset('own_set', folder)
      np.testing.assert_array_equal(data.test.images, x)
    assert calls == [('own_set', folder)]
  monkeypatch.setattr(sources, 'read_tfds', None)
  load_dataset('own_set', './there/')
  assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'foreign'])
def test_a_damaged_cache_is_made_anew(cache, monkeypatch, damage):
  calls = _count_calls(monkeypatch, 'read_mnist5k', _digits())
  expected = load_dataset('mnist5k', val_size=100)
  path = cache / 'mnist5k.npz'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(
    {
      'flip': bytes(content),
      'truncate': bytes(content[: len(content) // 2]),
      'empty': b'',
      'foreign': b'not an archive',
    }[damage]
  )
  again = load_dataset('mnist5k', val_size=100)
  assert len(calls) == 2
  np.testing.assert_array_equal(again.train.images, expected.train.images)
  load_dataset('mnist5k', val_size=100)
  assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('in the way')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
  _count_calls(monkeypatch, 'read_mnist5k', _digits())
  assert len(load_dataset('mnist5k', val_size=100).train.labels) == 600


def test_a_failed_write_leaves_nothing_behind(cache, monkeypatch):
  _count_calls(monkeypatch, 'read_mnist5k', _digits())

  def full_disk(file, *arrays):
    file.write(b'half a file')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(np, 'savez', full_disk)
  load_dataset('mnist5k', val_size=100)
  assert list(cache.iterdir()) == []


_HALF = """
import io
import sys
import time

import numpy as np

from mopt.training import data
from mopt.training import sources

savez = np.savez


def half(file, *arrays):
  whole = io.BytesIO()
  savez(whole, *arrays)
  file.write(whole.getvalue()[: whole.tell() // 2])
  file.flush()
  print('half', flush=True)
  time.sleep(600)


np.savez = half
labels = np.arange(1200, dtype=np.int32) % 10
sources.read_mnist5k = lambda: [np.ones((1200, 28, 28, 1), np.uint8), labels]
data.load_dataset('mnist5k', val_size=100)
"""


def test_a_process_killed_while_writing_leaves_no_cache(cache, monkeypatch):
  with subprocess.Popen(
    [sys.executable, '-c', _HALF],
    cwd=pathlib.Path(__file__).parents[1],
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    line = process.stdout.readline()
    process.kill()
  assert line == 'half\n'
  assert process.returncode == -signal.SIGKILL
  left = list(cache.iterdir())
  # Half a file under another name, which nobody reads.
  assert len(left) == 1
  assert left[0].name != 'mnist5k.npz'
  assert left[0].stat().st_size > 100_000
  calls = _count_calls(monkeypatch, 'read_mnist5k', _digits())
  first = load_dataset('mnist5k', val_size=100)
  second = load_dataset('mnist5k', val_size=100)
  assert len(calls) == 1
  np.testing.assert_array_equal(first.train.images, second.train.images)
  assert {p.name for p in cache.iterdir()} == {'mnist5k.npz', left[0].name}


def test_sets_other_than_mnist_are_standardised(cache, monkeypatch):
  images, labels = _digits()
  _count_calls(monkeypatch, 'read_tfds', [images, labels, images, labels])
  data = load_dataset('cifar10')
  scaled = normalise(data.train.images, data.mean, data.std)
  assert abs(scaled.mean()) < 1e-3
  assert abs(scaled.std() - 1) < 1e-3
  assert len(data.val.labels) == 0
  # By the pictures that are trained on.
  data = load_dataset('cifar10', train_size=10)
  assert data.mean == pytest.approx(data.train.images.mean(), rel=1e-9)
  assert data.mean != pytest.approx(images.mean(), rel=1e-6)


def test_missing_data_is_one_line_with_a_way_out(cache, tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def offline(self, **kwargs):
    raise ConnectionError('no network\nand a second line')

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', offline)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  with pytest.raises(sources.DataError) as error:
    load_dataset('mnist', data_dir=str(tmp_path))
  message = str(error.value)
  assert '\n' not in message
  for part in ('dataset=mnist', 'no network', '--data_dir', 'mnist5k'):
    assert part in message


def test_an_unknown_set_is_one_line(cache):
  with pytest.raises(sources.DataError, match='dataset=no_such_set'):
    load_dataset('no_such_set')


@needs_tfds
@pytest.mark.slow
def test_mnist_of_tfds_is_complete(cache):
  """Decodes 70,000 pictures: 10 s."""
  data = load_dataset('mnist', data_dir=str(_TFDS))
  assert len(data.train.labels) == 55_000
  assert len(data.val.labels) == 5_000
  assert len(data.test.labels) == 10_000
  # Frequencies of the official set.
  counts = np.bincount(np.concatenate([data.train.labels, data.val.labels]))
  assert counts.tolist() == [
    5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
  ]  # fmt: skip
  assert (data.mean, data.std) == (0.0, 255.0)


class _Source:
  """What `as_data_source` gives, 31 examples."""

  def __init__(self, features):
    random = np.random.RandomState(0)
    draw = lambda f, i: (
      random.randint(0, 256, f.shape) if f.shape else np.array(i % 3)
    ).astype(f.np_dtype)
    self.examples = [
      {name: draw(f, i) for name, f in features.items()} for i in range(31)
    ]

  def __len__(self):
    return len(self.examples)

  def __getitems__(self, indices):
    return [self.examples[i] for i in indices]


@pytest.fixture
def prepared(cache, monkeypatch):
  """Puts a set of its own making where TFDS looks for one."""
  import tensorflow_datasets as tfds

  def put(splits=('train', 'test'), **features):
    features = {
      'image': tfds.features.Image(shape=(20, 24, 3)),
      'label': tfds.features.ClassLabel(num_classes=3),
      **features,
    }
    features = {name: f for name, f in features.items() if f is not None}
    builder = types.SimpleNamespace(
      is_prepared=lambda: True,
      info=types.SimpleNamespace(
        features=tfds.features.FeaturesDict(features),
        splits=dict.fromkeys(splits),
      ),
      as_data_source=lambda split: [_Source(features) for _ in split],
    )
    monkeypatch.setattr(tfds, 'builder', lambda *args, **kwargs: builder)

  return put


def test_a_set_of_another_shape_and_number_of_classes_is_read(prepared):
  prepared()
  data = load_dataset('odd_digits')
  assert data.num_classes == 3
  assert data.train.images.shape == data.test.images.shape == (31, 20, 24, 3)
  assert data.train.images.dtype == np.uint8
  assert np.bincount(data.train.labels).tolist() == [11, 10, 10]


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (dict(splits=('train', 'validation')), 'splits train and test, got train'),
    (dict(label=None), 'features image and label, got image'),
    (dict(image=((20, 24, 1), np.uint16)), r'0..255 as image, got uint16'),
    (dict(image=((20, 24, 1), np.float32)), r'0..255 as image, got float32'),
    (dict(label=((4,), np.int64)), r'one integer as label, got int64\(4,\)'),
  ],
)
def test_what_is_no_classification_of_pictures_is_one_line(
  prepared, change, said
):
  import tensorflow_datasets as tfds

  change = {
    name: tfds.features.Tensor(shape=value[0], dtype=value[1])
    if name in ('image', 'label') and value
    else value
    for name, value in change.items()
  }
  prepared(**change)
  with pytest.raises(sources.DataError, match=said) as error:
    load_dataset('odd_digits')
  assert str(error.value).startswith('dataset=odd_digits: expected')
  assert '\n' not in str(error.value)


def test_pictures_of_several_sizes_are_one_line(prepared, monkeypatch):
  prepared()
  decode = sources._decode

  def grow(source, name):
    source.examples[7]['image'] = np.zeros((21, 24, 3), np.uint8)
    return decode(source, name)

  monkeypatch.setattr(sources, '_decode', grow)
  with pytest.raises(sources.DataError, match='expected pictures of one size'):
    load_dataset('odd_digits')


def test_without_tensorflow_nothing_is_downloaded(cache, tmp_path, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda n: None if n == 'tensorflow' else find(n),
  )
  with pytest.raises(sources.DataError, match='TensorFlow is not installed'):
    load_dataset('fashion_mnist', data_dir=str(tmp_path))


def test_without_array_record_only_the_embedded_digits_are_read(
  cache, monkeypatch
):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda n: None if n == 'array_record' else find(n),
  )
  message = 'dataset=mnist: expected array_record.* --dataset=mnist5k'
  with pytest.raises(sources.DataError, match=message):
    load_dataset('mnist')
  assert len(load_dataset('mnist5k').test.labels) == 500


def _valid(**changes):
  """Three classes, no validation split; `train=dict(labels=...)` changes it."""

  def split(n, images=None, labels=None):
    return data_lib.Split(
      np.zeros((n, 8, 8, 1), np.uint8) if images is None else images,
      np.arange(n, dtype=np.int32) % 3 if labels is None else labels,
    )

  splits = {
    name: split(n, **changes.pop(name, {}))
    for name, n in (('train', 6), ('val', 0), ('test', 3))
  }
  rest = dict(name='own', num_classes=3, mean=0.0, std=255.0)
  return data_lib.Dataset(**rest | splits | changes)


def _of(n, dtype=np.uint8, shape=(8, 8, 1)):
  return dict(images=np.zeros((n, *shape), dtype))


def _labels(*values, dtype=np.int32):
  return dict(labels=np.array(values, dtype))


@pytest.mark.parametrize('dtype', [np.uint8, np.int32, np.int64])
def test_labels_may_be_any_integers(dtype):
  data_lib.check_data(_valid(test=_labels(2, 0, 1, dtype=dtype)))


def test_arrays_may_be_of_jax():
  data = _valid()
  splits = {
    name: data_lib.Split(*map(jnp.asarray, getattr(data, name)))
    for name in ('train', 'val', 'test')
  }
  data_lib.check_data(data._replace(**splits))


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    # Beyond the logits: training ends as "not finite".
    (
      dict(train=_labels(0, 1, 2, 3, 0, 1)),
      'labels 0 to 2 in the split train, got 0 to 3.',
    ),
    (
      dict(test=_labels(7, 0, 1)),
      'labels 0 to 2 in the split test, got 0 to 7.',
    ),
    # A hidden test set, which would score 0.0 %.
    (
      dict(test=_labels(-1, -1, -1)),
      'labels 0 to 2 in the split test, got -1 to -1 (are they hidden?).',
    ),
    (
      dict(val=_of(2) | _labels(-1, 2)),
      'labels 0 to 2 in the split val, got -1 to 2.',
    ),
    (
      dict(test=_labels(0, 1, 2, dtype=np.float32)),
      'integers as labels of the split test, got float32.',
    ),
    (
      dict(test=_labels(0, 1, 1, dtype=bool)),
      'integers as labels of the split test, got bool.',
    ),
    (
      dict(train=_of(7)),
      'a label for each of the 7 pictures of the split train, got shape (6,).',
    ),
    (
      dict(val=_labels(1, 2)),
      'a label for each of the 0 pictures of the split val, got shape (2,).',
    ),
    (
      dict(test=_labels([0], [1], [2])),
      'a label for each of the 3 pictures of the split test, got shape (3, 1).',
    ),
    # In 0..1, or with more bits.
    (
      dict(val=_of(2, np.float32)),
      'uint8 in the split val, as in train, got float32.',
    ),
    (
      dict(test=_of(3, np.uint16)),
      'pixels of 0..255 in uint8, or float features, in the split test, got '
      'uint16.',
    ),
    (
      dict(train=_of(6, np.float32)),
      'float32 in the split val, as in train, got uint8.',
    ),
    (
      dict(test=_of(3, shape=(8, 9, 1))),
      'pictures [n, height, width, channels] in the split test, of the size of '
      'those in train, got shape (3, 8, 9, 1).',
    ),
    (
      dict(train=_of(6, shape=(8, 8))),
      'pictures [n, height, width, channels] in the split train, of the size '
      'of those in train, got shape (6, 8, 8).',
    ),
    (
      dict(train=_of(6, shape=(8, 0, 1))),
      'pictures [n, height, width, channels] in the split train, of the size '
      'of those in train, got shape (6, 8, 0, 1).',
    ),
    (
      dict(train=dict(labels=[0, 1, 2, 0, 1, 2])),
      'arrays of NumPy or JAX in the split train, got list.',
    ),
    *(
      (
        dict(mean=mean, std=std),
        'a finite mean and a positive, finite standard deviation, got '
        f'{mean} and {std}.',
      )
      for mean, std in (
        (0.0, 0.0),
        (0.0, -1.0),
        (0.0, float('inf')),
        (0.0, float('nan')),
        (0.0, 1e-39),
        (float('nan'), 1.0),
        (float('-inf'), 1.0),
        (1e39, 1.0),
      )
    ),
    (dict(num_classes=1), 'at least 2 classes, got 1.'),
    # It trained to the end, and the picture of the front had no dots.
    (
      dict(test=_of(0) | _labels()),
      'examples in the split test, got none.',
    ),
    (
      dict(train=_of(0) | _labels()),
      'examples in the split train, got none.',
    ),
    (
      dict(mean=(0.0, 0.0), std=(1.0, 1.0)),
      'a mean and a standard deviation for each of the 1 places on the last '
      'axis, got 2 and 2.',
    ),
    (
      dict(mean=0.0, std=(1.0, 1.0)),
      'a mean and a standard deviation for each of the 1 places on the last '
      'axis, got 1 and 2.',
    ),
    (
      dict(mean=(0.0,), std=(1e-39,)),
      'a finite mean and a positive, finite standard deviation, got 0.0 and '
      '1e-39 at place 0 of the last axis.',
    ),
  ],
)
def test_data_that_do_not_fit_are_one_line(changes, said):
  with pytest.raises(ValueError) as error:
    data_lib.check_data(_valid(**changes))
  assert str(error.value) == f'dataset=own: expected {said}'


@pytest.mark.parametrize(
  ('train', 'test', 'said'),
  [
    (0, -1, 'labels 0 to 9 in the split test, got -1 to -1 .are they hidden'),
    (-1, 0, 'at least 2 classes, got 0'),
    (-1, -1, 'at least 2 classes, got 0'),
  ],
)
def test_labels_that_tfds_hides_are_refused(
  cache, monkeypatch, train, test, said
):
  images, labels = _digits()
  hide = lambda value: labels if value == 0 else np.full_like(labels, value)
  arrays = [images, hide(train), images, hide(test)]
  _count_calls(monkeypatch, 'read_tfds', arrays)
  with pytest.raises(ValueError, match=f'^dataset=quiz: expected {said}'):
    load_dataset('quiz')


def test_a_class_that_is_only_tested_is_out_of_range(cache, monkeypatch):
  images, labels = _digits()
  arrays = [images, np.minimum(labels, 4), images, labels]
  _count_calls(monkeypatch, 'read_tfds', arrays)
  message = '^dataset=odd: expected labels 0 to 4 in the split test, got 0 to 9'
  with pytest.raises(ValueError, match=message):
    load_dataset('odd')


def _features(*values, dtype=np.float32):
  """Three classes of one example, each a row of `values`."""
  train = data_lib.Split(np.array(values, dtype), np.arange(3))
  none = data_lib.Split(train.images[:0], train.labels[:0])
  return data_lib.Dataset('own', 3, train, none, train, 0.0, 1.0)


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64])
@pytest.mark.parametrize('rank', [1, 2, 3])
def test_features_may_have_any_shape(dtype, rank):
  row = np.ones((2,) * rank)
  data = _features(row, row, row, dtype=dtype)
  data_lib.check_data(data)
  data_lib.check_data(data._replace(mean=(0.0, 1.0), std=(2.0, 1.0)))


@pytest.mark.parametrize(
  ('values', 'said'),
  [
    ([[0, 1], [2, 3], [4, np.nan]], 'nan at [2, 1]'),
    ([[0, 1], [-np.inf, 3], [4, 5]], '-inf at [1, 0]'),
    ([[0, 1], [2, 1e39], [4, 5]], '1e+39 at [1, 1]'),
  ],
)
def test_features_beyond_float32_are_one_line(values, said):
  data = _features(*values, dtype=np.float64)
  with pytest.raises(ValueError) as error:
    data_lib.check_data(data)
  assert str(error.value) == (
    'dataset=own: expected features that are finite in float32 in the split '
    f'train, got {said}.'
  )
  fine = _features([0, 1], [2, 3], [4, 5], dtype=np.float64)
  with pytest.raises(ValueError, match='in the split test, got'):
    data_lib.check_data(fine._replace(test=data.test))


@pytest.mark.parametrize('values', [[0, 1, 2], [[], [], []]])
def test_features_without_a_size_are_one_line(values):
  with pytest.raises(ValueError, match=r'features \[n, \.\.\.\] in the split'):
    data_lib.check_data(_features(*values))


@pytest.mark.parametrize(('name', 'value'), [('rotation', 5.0), ('flip', True)])
def test_features_are_not_moved(name, value):
  table = _features([0, 1], [2, 3], [4, 5])
  message = f'{name}={value}: expected none with dataset=own, whose examples '
  with pytest.raises(ValueError, match=message):
    data_lib.check_augmentation(Config(**{name: value}), table)
  data_lib.check_augmentation(Config(), table)
  pictures = _features(*np.zeros((3, 8, 8, 1)))
  data_lib.check_augmentation(Config(**{name: value}), pictures)


def test_the_pixels_decide_how_pictures_are_scaled(cache, monkeypatch):
  images, labels = _digits()
  ground = np.random.RandomState(1).rand(*images.shape) < 0.6
  arrays = [np.where(ground, 0, images), labels, images, labels]
  arrays[0] = arrays[0].astype(np.uint8)
  _count_calls(monkeypatch, 'read_tfds', arrays)
  dark = load_dataset('flowers')
  assert (dark.mean, dark.std) == (0.0, 255.0)
  _count_calls(monkeypatch, 'read_tfds', [images, labels, images, labels])
  light = load_dataset('light_mnist')
  assert light.mean == pytest.approx(images.mean(), rel=1e-9)


def test_a_folder_of_tfds_is_for_sets_of_tfds():
  message = (
    '^data_dir=/some/where: expected none with dataset=mnist5k; it is where '
    r'TFDS keeps its sets\.$'
  )
  with pytest.raises(ValueError, match=message):
    load_dataset('mnist5k', data_dir='/some/where')


def test_classes_are_those_of_all_examples(cache, monkeypatch):
  """Not of those that are left to train on."""
  images, labels = _digits()
  arrays = [images, labels, images, np.minimum(labels, 4)]
  _count_calls(monkeypatch, 'read_tfds', arrays)
  data = load_dataset('odd', val_size=5, train_size=3)
  assert data.num_classes == 10
  assert len(np.unique(data.train.labels)) <= 3
