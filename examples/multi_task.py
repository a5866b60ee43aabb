"""Three tasks of one network: a trunk that they share, and a head for each.

  python examples/multi_task.py --out=multi_task.png  # needs mopt-jax[train]

Which digit is it, is it odd, is it more than 4? The losses of the three come
from one forward pass; in the trunk their gradients are weighed, and each head
moves by its own. A weighting that is never against an objective, `upgrad`,
stands beside the mean and beside the shortest combination, on 5,000 real digits
with a network of Flax NNX. The picture shows the loss of each task.

A weighting does not always help: on tasks that agree as often as these the mean
is hard to beat. What each task gets is what differs.
"""

import argparse

from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
import optax

import mopt
from mopt import training

TASKS = ('digit', 'odd', 'more than 4')
CLASSES = (10, 2, 2)
WEIGHTINGS = {
  'mean': mopt.mean,
  'min_norm': mopt.min_norm_weights,
  'upgrad': mopt.upgrad,
}


class Network(nnx.Module):
  """A trunk, and a head for each of the tasks."""

  def __init__(self, rngs):
    self.first = nnx.Linear(784, 64, rngs=rngs)
    self.second = nnx.Linear(64, 32, rngs=rngs)
    self.heads = nnx.List([nnx.Linear(32, n, rngs=rngs) for n in CLASSES])

  def __call__(self, images):
    features = nnx.relu(self.first(images.reshape(len(images), -1)))
    features = nnx.relu(self.second(features))
    return [head(features) for head in self.heads]


def targets_of(digits):
  return jnp.stack([digits, digits % 2, digits > 4])


def make_losses(graph):
  """A function: parameters, images and digits -> losses `[3]`, hits `[3]`."""

  def losses(params, images, digits):
    outputs = nnx.merge(graph, params)(images)
    targets = targets_of(digits)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    values = [cross_entropy(x, y).mean() for x, y in zip(outputs, targets)]
    hits = [(x.argmax(-1) == y).mean() for x, y in zip(outputs, targets)]
    return jnp.stack(values), jnp.stack(hits)

  return losses


def train(weighting, data, epochs, batch_size=50):
  """Losses `[epochs, 3]` on the training set, and what the test set says."""
  graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
  losses = make_losses(graph)
  grad_fn = mopt.value_and_stacked_jac(losses, has_aux=True)
  is_trunk = mopt.mask_by_path(lambda path, leaf: not path.startswith('heads'))
  tx = optax.chain(
    mopt.aggregate(weighting, num_objectives=len(TASKS), shared=is_trunk),
    optax.adam(1e-3),
  )
  images, digits = jax.tree.map(jnp.asarray, data.train)
  images = (images - data.mean) / data.std
  steps = len(digits) // batch_size

  def step(carry, chosen):
    params, state = carry
    (values, _), grads = grad_fn(params, images[chosen], digits[chosen])
    updates, state = tx.update(grads, state, params, values=values)
    return (optax.apply_updates(params, updates), state), values

  def epoch(carry, key):
    order = jax.random.permutation(key, len(digits))[: steps * batch_size]
    carry, values = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
    return carry, values.mean(axis=0)

  keys = jax.random.split(jax.random.key(0), epochs)
  run = jax.jit(lambda carry: jax.lax.scan(epoch, carry, keys))
  (params, _), history = run((params, tx.init(params)))
  test = (data.test.images - data.mean) / data.std
  return np.array(history), np.array(losses(params, test, data.test.labels)[1])


def main(argv=None):
  parser = argparse.ArgumentParser(description='Three tasks of one network')
  parser.add_argument('--out', default='multi_task.png', help='where to draw')
  parser.add_argument('--epochs', type=int, default=15)
  args = parser.parse_args(argv)
  data = training.load_dataset('mnist5k')
  picture = figure.Figure(figsize=(10, 3.5), layout='constrained', dpi=150)
  panels = picture.subplots(1, len(TASKS))
  print(f'{"accuracy of":12}', *(f'{task:>12}' for task in TASKS))
  for name, weighting in WEIGHTINGS.items():
    history, hits = train(weighting, data, args.epochs)
    print(f'{name:12}', *(f'{100 * hit:10.2f} %' for hit in hits))
    for axes, task, values in zip(panels, TASKS, history.T):
      axes.plot(1 + np.arange(args.epochs), values, label=name)
      axes.set(title=task, xlabel='epoch', yscale='log')
  panels[0].set_ylabel('cross entropy')
  panels[0].legend()
  picture.savefig(args.out)


if __name__ == '__main__':
  main()
