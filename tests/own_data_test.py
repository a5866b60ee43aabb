"""Data of one's own: .npz files and folders, made of real digits."""

import json
import os
import pathlib
import re
import shlex
import shutil

from flax import linen as nn
import numpy as np
from PIL import Image
import pytest

from mopt import training
from mopt.training import Config
from mopt.training import load_dataset
from mopt.training import normalise
from mopt.training import own_data
from mopt.training.data import fingerprint

_PAGE = (pathlib.Path(__file__).parents[1] / 'docs' / 'data.md').read_text()


@pytest.fixture
def here(tmp_path, monkeypatch):
  """The current folder, empty, with an empty cache elsewhere."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / '.cache'))
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture(scope='module')
def digits():
  """Keras' four arrays: 400 digits of five classes, and 100 of them."""
  data = load_dataset('mnist5k')
  arrays = {}
  for name, n in (('train', 400), ('test', 100)):
    images, labels = getattr(data, name)
    classes = [np.flatnonzero(labels == i)[: n // 5] for i in range(5)]
    chosen = np.stack(classes, axis=1).reshape(-1)
    arrays[f'x_{name}'] = images[chosen, ..., 0]
    arrays[f'y_{name}'] = labels[chosen].astype(np.int64)
  return arrays


@pytest.fixture
def table():
  """Twelve examples of three classes with four features, and six."""
  random = np.random.default_rng(0)
  y_train, y_test = np.arange(12) % 3, np.arange(6) % 3
  return {
    'x_train': random.normal(size=(12, 4)),
    'y_train': y_train,
    'x_test': random.normal(size=(6, 4)),
    'y_test': y_test,
  }


def _folder(path, arrays, n=40):
  """Writes the first pictures of every split as `path/train/3/7.png`."""
  for split in ('train', 'test'):
    pairs = zip(arrays[f'x_{split}'][:n], arrays[f'y_{split}'][:n])
    for i, (pixels, label) in enumerate(pairs):
      file = path / split / f'digit{label}' / f'{i}.png'
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels).save(file)
  return path


def _says(name, message):
  """Asserts that a data set is refused in one line that begins as all do."""
  with pytest.raises(ValueError) as error:
    load_dataset(str(name))
  assert str(error.value) == f'dataset={name}: expected {message}'


def test_an_npz_of_pictures_is_read_as_it_is(here, digits):
  np.savez('mine.npz', **digits)
  data = load_dataset('mine.npz')
  assert data.num_classes == 5
  # A tenth for validation, the same share of every class.
  assert [len(s.labels) for s in (data.train, data.val, data.test)] == [
    360,
    40,
    100,
  ]
  counts = np.bincount(digits['y_train']) / 10
  assert (abs(np.bincount(data.val.labels) - counts) <= 1).all()
  np.testing.assert_array_equal(data.test.images[..., 0], digits['x_test'])
  np.testing.assert_array_equal(data.test.labels, digits['y_test'])
  for split in (data.train, data.val, data.test):
    assert split.images.dtype == np.uint8
    assert split.images.shape[1:] == (28, 28, 1)
    assert split.labels.dtype == np.int32
  both = np.concatenate([data.train.images, data.val.images])[..., 0]
  assert {x.tobytes() for x in both} == {x.tobytes() for x in digits['x_train']}
  # As MNIST is, for they are its digits.
  assert (data.mean, data.std) == (0.0, 255.0)
  assert data.class_names == ()
  assert not (here / '.cache').exists()


def test_labels_may_have_an_axis_and_pictures_their_channels(here, digits):
  changed = digits | {
    f'{x}_{s}': digits[f'{x}_{s}'][..., None]
    for x in 'xy'
    for s in ('train', 'test')
  }
  np.savez('flat.npz', **digits)
  np.savez_compressed('deep.npz', **changed)
  flat, deep = load_dataset('flat.npz'), load_dataset('deep.npz')
  for split in ('train', 'val', 'test'):
    for x, y in zip(getattr(flat, split), getattr(deep, split)):
      np.testing.assert_array_equal(x, y)


def test_features_are_standardised_each_by_itself(here, table):
  # Columns of a table have units of their own; one says nothing.
  table['x_train'] = table['x_train'] * [1, 1e-3, 1e6, 0] + [0, 5, -1e6, 0.1]
  np.savez('table.npz', **table)
  data = load_dataset('table.npz', val_size=0)
  assert data.train.images.shape == (12, 4)
  assert data.train.images.dtype == data.test.images.dtype == np.float32
  scaled = normalise(data.train.images, data.mean, data.std)
  np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=2e-3)
  np.testing.assert_allclose(scaled.std(axis=0), [1, 1, 1, 0], atol=2e-3)
  x = table['x_train']
  np.testing.assert_allclose(data.mean, x.mean(axis=0), rtol=1e-6)
  # By what is trained on, not by what is held out.
  fewer = load_dataset('table.npz', val_size=3)
  assert fewer.mean != data.mean
  one = table | {k: table[k][:, 0] for k in ('x_train', 'x_test')}
  np.savez('one.npz', **one)
  assert load_dataset('one.npz').train.images.shape == (11, 1)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'y_test': None},
      'the arrays x_train, y_train, x_test, y_test, got x_test, x_train, '
      'y_train.',
    ),
    (
      {'x_test': np.array([[1.0], None], object)},
      'an array of numbers as x_test (Object arrays cannot be loaded when '
      'allow_pickle=False).',
    ),
    (
      {'y_train': np.full(12, 7)},
      'at least 2 classes in the split train, got label 7 only.',
    ),
    ({'y_train': np.zeros(12, int)}, 'at least 2 classes, got 1.'),
    (
      {'y_train': np.arange(12) - 1},
      'labels 0 to 10 in the split train, got -1 to 10.',
    ),
    (
      {'y_test': np.arange(6)},
      'labels 0 to 2 in the split test, got 0 to 5.',
    ),
    (
      {'y_train': np.arange(12) * 2**40},
      'labels from 0, and no more classes than the 12 examples of the split '
      f'train, got label {11 * 2**40}.',
    ),
    (
      {'y_train': np.arange(12) / 2},
      'integers as labels of the split train, got float64.',
    ),
    (
      {'y_test': np.array(list('abcdef'))},
      'integers as labels of the split test, got <U1.',
    ),
    (
      {'y_train': np.eye(12, 3, dtype=int)},
      'a label for each of the 12 examples of the split train, got shape '
      '(12, 3).',
    ),
    (
      {'y_train': np.arange(11) % 3},
      'a label for each of the 12 examples of the split train, got shape '
      '(11,).',
    ),
    (
      {'x_train': np.zeros((0, 4)), 'y_train': np.zeros(0, int)},
      'examples in the split train, got none.',
    ),
    (
      {'x_test': np.zeros((0, 4)), 'y_test': np.zeros(0, int)},
      'examples in the split test, got none.',
    ),
    (
      {'x_test': np.zeros((6, 5))},
      'features [n, ...] in the split test, of the size of those in train, got '
      'shape (6, 5).',
    ),
    (
      {'x_train': np.zeros((12, 4), np.uint8)},
      'pictures [n, height, width, channels] in the split train, of the size '
      'of those in train, got shape (12, 4).',
    ),
    (
      {'x_test': np.zeros((6, 4), np.uint8)},
      'float64 in the split test, as in train, got uint8.',
    ),
    (
      {'x_train': np.zeros((12, 4), int)},
      'pixels of 0..255 in uint8, or float features, in the split train, got '
      'int64.',
    ),
    (
      {'x_train': np.where(np.arange(12)[:, None] == 7, np.nan, np.eye(12, 4))},
      'features that are finite in float32 in the split train, got nan at '
      '[7, 0].',
    ),
    (
      {'x_test': np.where(np.eye(6, 4) == 1, 1e300, 0)},
      'features that are finite in float32 in the split test, got 1e+300 at '
      '[0, 0].',
    ),
    (
      {'x_train': np.array(1.0)},
      'a label for each of the 1 examples of the split train, got shape (12,).',
    ),
  ],
)
def test_what_is_wrong_with_an_npz_is_one_line(here, table, changes, message):
  arrays = {k: v for k, v in (table | changes).items() if v is not None}
  np.savez('table.npz', **arrays)
  _says('table.npz', message)


@pytest.mark.parametrize(
  ('write', 'reason'),
  [
    (lambda path: None, 'No such file or directory'),
    (lambda path: path.mkdir(), 'Is a directory'),
    (lambda path: path.write_bytes(b''), 'it is no archive'),
    (lambda path: path.write_text('a,b\n1,2\n'), 'it is no archive'),
    (lambda path: path.write_bytes(b'\x93NUMPY'), 'it is no archive'),
  ],
)
def test_what_is_no_npz_is_one_line(here, write, reason):
  write(here / 'mine.npz')
  _says('mine.npz', f'{own_data._WANTED} ({reason}).')


def test_a_damaged_npz_is_one_line(here, digits):
  np.savez('mine.npz', **digits)
  content = bytearray((here / 'mine.npz').read_bytes())
  content[1000] ^= 1
  (here / 'mine.npz').write_bytes(content)
  _says(
    'mine.npz',
    "an array of numbers as x_train (Bad CRC-32 for file 'x_train.npy').",
  )


def test_another_file_of_the_same_name_is_read_anew(here, digits):
  np.savez('mine.npz', **digits)
  load_dataset('mine.npz')
  x_test = digits['x_test'] // 2
  np.savez('mine.npz', **digits | {'x_test': x_test})
  again = load_dataset('mine.npz')
  np.testing.assert_array_equal(again.test.images[..., 0], x_test)


def test_a_run_on_an_npz_of_pictures(call, here, digits):
  np.savez('mine.npz', **digits)
  code, _, err = call(
    '--dataset=mine.npz', '--epochs=3', '--l1=1e-4', '--workdir=run'
  )
  assert (code, err) == (0, '')
  net = training.load('run/members/l1_0.0001_seed_0.npz')
  assert (net.num_classes, net.image_shape) == (5, (28, 28, 1))
  about = json.loads((here / 'run' / 'config.json').read_text())
  assert about['dataset'] == 'mine.npz'
  (row,) = _rows('run')
  # Five digits by chance: 0.2.
  assert row['accuracy_test'] > 0.6


def test_a_run_does_not_go_on_with_other_data(call, here, digits):
  """An epoch, which compiles: 8 s."""
  np.savez('mine.npz', **digits)
  flags = ('--dataset=mine.npz', '--model=mlp', '--l1=0', '--epochs=1')
  flags += ('--workdir=run',)
  assert call(*flags)[::2] == (0, '')
  assert call('--resume', *flags)[::2] == (0, '')
  files = [path for path in (here / 'run').rglob('*') if path.is_file()]
  before = [path.read_bytes() for path in files]
  x_test = digits['x_test'].copy()
  x_test[3, 14, 14] ^= 1  # Settings, sizes and shapes stay what they were.
  np.savez('mine.npz', **digits | {'x_test': x_test})
  code, out, err = call('--resume', *flags)
  assert (code, out) == (2, '')
  assert err.startswith('train.py: dataset=mine.npz: expected the data of ')
  assert err.count('\n') == 1
  assert [path.read_bytes() for path in files] == before


def test_other_pictures_are_other_data(here, digits):
  folder = _folder(here / 'pictures', digits)
  first = fingerprint(load_dataset('pictures'))
  assert fingerprint(load_dataset('pictures')) == first
  file = folder / 'test' / 'digit2' / '99.png'
  Image.fromarray(digits['x_test'][0]).save(file)
  assert fingerprint(load_dataset('pictures')) != first
  file.unlink()
  # The same pictures under other names of classes.
  for split in ('train', 'test'):
    (folder / split / 'digit2').rename(folder / split / 'digit2b')
  assert fingerprint(load_dataset('pictures')) != first


def _rows(workdir):
  from mopt.training import files

  return files.read_csv(pathlib.Path(workdir) / 'results.csv')


class Dense(nn.Module):
  """One hidden layer, for features of any shape."""

  @nn.compact
  def __call__(self, features, train=False):
    x = features.reshape(features.shape[0], -1)
    return nn.Dense(3)(nn.relu(nn.Dense(16)(x)))


def _blobs(shape):
  """Three classes, told apart by the sign and size of one small feature."""
  random = np.random.default_rng(0)
  arrays = {}
  for split, n in (('train', 300), ('test', 90)):
    y = np.arange(n) % 3
    x = random.normal(size=(n, *shape)) * 1e4
    x[..., 0] = 1e-3 * (y.reshape(-1, *[1] * (len(shape) - 1)) - 1)
    arrays |= {f'x_{split}': x, f'y_{split}': y[:, None]}
  return arrays


@pytest.mark.parametrize(
  ('shape', 'settings'),
  [((4,), {}), ((3, 2), {'stream': True, 'parallel': 'data'})],
)
def test_a_run_on_features_of_any_shape(here, shape, settings):
  """Twice, for batches are gathered in two ways: on devices, and on the host.

  Unless each feature has a scale of its own, the one that tells the classes
  apart is lost beside those that are 10 million times as large.
  """
  np.savez('table.npz', **_blobs(shape))
  data = load_dataset('table.npz')
  config = Config(
    dataset='table.npz', l1=(1e-5,), epochs=6, learning_rate=0.02, **settings
  )
  (here / 'run').mkdir()
  (row,) = training.run(training.Job(config, Dense(), data, here / 'run'))
  assert row['accuracy_test'] > 0.9
  # It predicts, in units of the user, and with its own scales.
  net = training.load(here / 'run' / 'members' / 'l1_1e-05_seed_0.npz')
  assert net.image_shape == shape
  assert (net.mean, net.std) == (data.mean, data.std)
  x_test = _blobs(shape)['x_test']
  logits = Dense().apply(net.variables, net.preprocess(x_test))
  hits = np.argmax(logits, axis=-1) == data.test.labels
  assert hits.mean() == pytest.approx(row['accuracy_test'], abs=1e-6)


def test_features_that_a_network_cannot_take_are_one_line(call, here, table):
  np.savez('table.npz', **table)
  code, out, err = call('--dataset=table.npz', '--batch_size=4')
  assert (code, out) == (2, '')
  assert err == (
    'train.py: model=lenet5: expected a network for inputs [batch, 4], got '
    'ValueError: lenet5 needs images [batch, height, width, channels] of at '
    'least 10 x 10, got shape (1, 4).\n'
  )


def test_a_folder_is_what_its_files_are(here, digits):
  folder = _folder(here / 'pictures', digits)
  (folder / 'train' / 'digit3' / '.hidden').write_text('of the system')
  (folder / 'train' / 'Thumbs.db').write_text('of another system')
  data = load_dataset('pictures')
  assert data.class_names == tuple(f'digit{i}' for i in range(5))
  assert data.num_classes == 5
  assert (data.mean, data.std) == (0.0, 255.0)
  assert [len(s.labels) for s in (data.train, data.val, data.test)] == [
    36,
    4,
    40,
  ]
  # Sorted by class and by name.
  order = sorted(range(40), key=lambda i: (digits['y_test'][i], str(i)))
  np.testing.assert_array_equal(
    data.test.images[..., 0], digits['x_test'][order]
  )
  np.testing.assert_array_equal(data.test.labels, digits['y_test'][order])
  assert data.train.labels.dtype == np.int32


def test_a_run_on_a_folder_of_pictures(call, here, digits):
  # What rich takes for markup, and matplotlib for a formula.
  name = 'my [/pictures] $_$'
  _folder(here / name, digits, n=400)
  code, out, err = call(
    f'--dataset={name}', '--epochs=3', '--l1=1e-4', '--workdir=run'
  )
  assert (code, err) == (0, '')
  assert f'decoding {name}, train' in out.replace('\n', ' ')
  (row,) = _rows('run')
  assert row['accuracy_test'] > 0.6


def test_a_folder_is_decoded_once_and_again_if_a_file_changes(
  here, digits, monkeypatch
):
  calls = []
  decode = own_data.decode
  monkeypatch.setattr(
    own_data, 'decode', lambda *args: calls.append(1) or decode(*args)
  )
  folder = _folder(here / 'pictures', digits)
  first = load_dataset('pictures')
  again = load_dataset(str(folder) + '/')
  assert len(calls) == 1
  np.testing.assert_array_equal(again.test.images, first.test.images)
  # A picture of the same name and size in bytes, at another time.
  file = folder / 'test' / 'digit0' / '0.png'
  stat = file.stat()
  Image.fromarray(255 - np.array(Image.open(file))).save(file)
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  changed = load_dataset('pictures')
  assert len(calls) == 2
  np.testing.assert_array_equal(
    changed.test.images[0], 255 - first.test.images[0]
  )
  # One that goes.
  file.unlink()
  assert len(load_dataset('pictures').test.labels) == 39
  assert len(calls) == 3
  # A folder of the same name elsewhere.
  other = _folder(here / 'other' / 'pictures', digits, n=20)
  assert len(load_dataset(str(other)).test.labels) == 20
  assert len(calls) == 4
  load_dataset('pictures')
  assert len(calls) == 4
  # Its last state only.
  assert len(list((here / '.cache' / 'mopt').iterdir())) == 2


def test_grey_and_coloured_pictures_together_are_coloured(here):
  random = np.random.default_rng(0)
  grey = random.integers(0, 256, (12, 14), np.uint8)
  color = random.integers(0, 256, (12, 14, 3), np.uint8)
  for split in ('train', 'test'):
    for name in ('a', 'b'):
      (here / 'mine' / split / name).mkdir(parents=True)
  put = lambda path, pixels, **more: Image.fromarray(pixels).save(
    here / 'mine' / path, **more
  )
  put('train/a/1.png', grey)
  put('train/b/1.PNG', color)
  bits = (grey > 99) * np.uint8(255)
  Image.fromarray(bits).convert('1').save('mine/test/a/1.png')
  palette = Image.fromarray(color // 128 * 127).convert('P')
  palette.save('mine/test/a/2.png', transparency=b'\x00\x80')
  cover = np.dstack([color, grey])
  put('test/b/1.png', cover)
  put('test/b/2.jpeg', grey)
  data = load_dataset('mine', val_size=0)
  assert data.train.images.shape == (2, 12, 14, 3)
  np.testing.assert_array_equal(data.train.images[0], np.dstack([grey] * 3))
  np.testing.assert_array_equal(data.train.images[1], color)
  one, two, three, four = data.test.images
  np.testing.assert_array_equal(one, np.dstack([bits] * 3))
  np.testing.assert_array_equal(two, palette.convert('RGB'))
  np.testing.assert_array_equal(three, color)
  assert abs(four.astype(float).mean() - grey.mean()) < 2
  # Not one is coloured: one channel.
  os.rename('mine/train/b/1.PNG', 'mine/train/color')
  put('train/b/1.png', 255 - grey)
  for path in ('test/a/2.png', 'test/b/1.png', 'train/color'):
    (here / 'mine' / path).unlink()
  assert load_dataset('mine').test.images.shape == (2, 12, 14, 1)


def test_pictures_stand_as_the_camera_was_held(here):
  for split in ('train', 'test'):
    for name in ('a', 'b'):
      (here / 'mine' / split / name).mkdir(parents=True)
      pixels = np.zeros((16, 24), np.uint8)
      pixels[:, :12] = 255
      picture = Image.fromarray(pixels)
      exif = picture.getexif()
      exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
      picture.save(here / 'mine' / split / name / '1.jpg', exif=exif)
  images = load_dataset('mine', val_size=0).train.images
  assert images.shape == (2, 24, 16, 1)
  assert images[:, :11].min() > 200
  assert images[:, 13:].max() < 50


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (
      lambda f: shutil.rmtree(f / 'test'),
      'the folders train and test, got train.',
    ),
    (
      lambda f: shutil.rmtree(f / 'train'),
      'the folders train and test, got test.',
    ),
    (
      lambda f: [shutil.rmtree(f / 'train' / f'digit{i}') for i in range(4)],
      'at least 2 classes in train, got digit4.',
    ),
    (
      lambda f: (f / 'test' / 'digit9').mkdir(),
      'classes of train in test, got test/digit9.',
    ),
    (
      lambda f: (f / 'train' / 'digit9').mkdir(),
      'pictures in train/digit9, got none.',
    ),
    (
      lambda f: [
        file.unlink() for file in (f / 'test').glob('*/*') if file.is_file()
      ],
      'pictures in test, got none.',
    ),
    (
      lambda f: (f / 'train' / 'labels.csv').write_text('0'),
      'a folder for each class in train, got the file train/labels.csv.',
    ),
    (
      lambda f: (f / 'test' / 'digit1' / 'x.bmp').write_text('0'),
      'pictures .png, .jpg, .jpeg, got test/digit1/x.bmp.',
    ),
    (
      lambda f: (f / 'test' / 'digit1' / 'more.png').mkdir(),
      'pictures .png, .jpg, .jpeg, got test/digit1/more.png.',
    ),
    (
      lambda f: Image.new('L', (28, 30)).save(f / 'test' / 'digit1' / 'x.png'),
      'pictures of one size, got 28 x 28 in train/digit0/0.png and 28 x 30 in '
      'test/digit1/x.png.',
    ),
    (
      lambda f: Image.new('I;16', (28, 28)).save(
        f / 'train' / 'digit0' / '0.png'
      ),
      'a picture of 8 bits a channel in train/digit0/0.png (its mode is I;16).',
    ),
  ],
)
def test_what_is_wrong_with_a_folder_is_one_line(here, digits, damage, message):
  damage(_folder(here / 'my-pictures', digits))
  _says('my-pictures', message)


@pytest.mark.parametrize('damage', ['cut', 'text', 'gif'])
def test_a_damaged_picture_is_named(here, digits, damage):
  folder = _folder(here / 'pictures', digits)
  file = folder / 'test' / 'digit2' / 'x.png'
  if damage == 'cut':
    Image.fromarray(digits['x_test'][0]).save(file)
    file.write_bytes(file.read_bytes()[:120])
  elif damage == 'text':
    file.write_text('not a picture')
  else:
    Image.new('L', (28, 28)).save(file, format='GIF')
  with pytest.raises(own_data.DataError) as error:
    load_dataset('pictures')
  message = str(error.value)
  assert message.startswith(
    'dataset=pictures: expected a picture of 8 bits a channel in '
    'test/digit2/x.png ('
  )
  assert '\n' not in message
  # What could not be read is in no cache.
  assert not (here / '.cache').exists()


@pytest.mark.parametrize(
  'name', ['no/such/', './no_such', '~/no_such', './' + 300 * 'a', './\0']
)
def test_a_folder_that_is_not_there_is_one_line(here, name):
  _says(name, f'{own_data._WANTED}; there is none.')


def test_a_folder_that_cannot_be_read_is_one_line(here, digits, monkeypatch):
  folder = _folder(here / 'pictures', digits)

  def forbid(path):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(pathlib.Path, 'iterdir', forbid)
  _says(
    'pictures',
    f'a folder that can be read (Permission denied: {folder.name}/train).',
  )


def test_other_files_are_one_line(here):
  (here / 'data.csv').write_text('1,2\n')
  _says('data.csv', f'{own_data._WANTED} (it is no archive).')


@pytest.mark.parametrize(
  ('made', 'name', 'is_own'),
  [
    ([], 'mnist', False),
    ([], 'glue/cola', False),
    ([], 'mine.npz', True),
    ([], 'mine.NPZ', True),
    ([], '/no/such', True),
    ([], '', False),
    ([], 300 * 'a', False),
    # A folder that has the name of a set of TFDS, and only that.
    (['mnist/1.0'], 'mnist', False),
    (['mnist/train'], 'mnist', True),
    (['mnist/1.0'], './mnist', True),
    (['a/mnist'], 'a/mnist', True),
    (['my pictures'], 'my pictures', True),
  ],
)
def test_a_name_means_own_data_or_a_set_of_tfds(here, made, name, is_own):
  for folder in made:
    (here / folder).mkdir(parents=True)
  assert (own_data.find(name) is not None) == is_own


@pytest.mark.parametrize('name', ['mine.npz', './pictures', 'mnist5k'])
def test_a_folder_of_tfds_is_refused_in_one_line(call, here, name):
  code, out, err = call(f'--dataset={name}', '--data_dir=/some/where')
  assert (code, out) == (2, '')
  assert err == (
    f'train.py: data_dir=/some/where: expected none with dataset={name}; it is '
    'where TFDS keeps its sets.\n'
  )


@pytest.mark.parametrize(
  ('size', 'said'),
  [
    ('val_size=400', 'expected 0 to 399'),
    ('train_size=361', 'expected 1 to 360'),
  ],
)
def test_sizes_that_cannot_be_had_are_refused(call, here, digits, size, said):
  np.savez('mine.npz', **digits)
  code, out, err = call('--dataset=mine.npz', f'--{size}')
  assert (code, out) == (2, '')
  assert err.startswith(f'train.py: {size}: {said}')


@pytest.mark.slow
def test_the_examples_of_the_page_run(call, here):
  """In their order; networks of the size of LeNet-5 are compiled."""
  random = np.random.default_rng(0)
  for path in ('train/cat', 'train/dog', 'test/cat', 'test/dog'):
    (here / 'pictures' / path).mkdir(parents=True)
    for i in range(20):
      pixels = random.integers(0, 256, (16, 16, 3), np.uint8)
      Image.fromarray(pixels).save(here / 'pictures' / path / f'{i}.png')
  names, commands = {}, 0
  for language, text in re.findall(r'```(python|sh)\n(.*?)```', _PAGE, re.S):
    if language == 'python':
      exec(text, names)
      continue
    _, script, *args = shlex.split(text)
    assert script == 'train.py'
    code, _, err = call(*args, '--epochs=1', f'--workdir=run{commands}')
    assert (code, err) == (0, '')
    commands += 1
  assert commands == 3
  assert names['data'].class_names == ('cat', 'dog')
  y = names['y'][500:]
  assert (names['classes'] == y).mean() == pytest.approx(
    names['row']['accuracy_test'], abs=1e-6
  )
  assert (names['classes'] == y).mean() > 0.8
