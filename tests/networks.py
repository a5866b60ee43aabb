"""Networks that compile in no time, for tests of what trains them."""

from flax import linen as nn


class Tiny(nn.Module):
  """Layers named as LeNet-5's, at a tenth of its compilation time."""

  @nn.compact
  def __call__(self, images, train=False):
    del train
    x = nn.Conv(3, (3, 3), padding='VALID', name='conv1')(images[:, ::4, ::4])
    x = nn.relu(x).reshape(len(images), -1)
    for name, features in (('layer1', 24), ('layer2', 16)):
      x = nn.relu(nn.Dense(features, name=name)(x))
    return nn.Dense(10, name='layer3')(x)


class Normed(nn.Module):
  """Batch normalisation and dropout as in VGG, at a tenth of its time."""

  dropout: float = 0.0
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Conv(3, (3, 3), padding='VALID', name='conv1')(images[:, ::4, ::4])
    x = nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      axis_name=self.axis_name,
      name='norm1',
    )(nn.elu(x))
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(10, name='layer1')(x.reshape(len(x), -1))


class Dropping(nn.Module):
  """Dropout of pixels, which leaves rows of the kernel without a gradient."""

  dropout: float

  @nn.compact
  def __call__(self, images, train=False):
    x = images.reshape(len(images), -1)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return nn.Dense(10, name='layer1')(x)


class Convolutional(nn.Module):
  """No dense layer: an average over what the last convolution gives."""

  @nn.compact
  def __call__(self, images, train=False):
    del train
    x = nn.relu(nn.Conv(3, (3, 3), name='conv1')(images[:, ::4, ::4]))
    return nn.Conv(10, (3, 3), name='conv2')(x).mean(axis=(1, 2))
