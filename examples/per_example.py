"""Every example is an objective: steps that no digit of the batch is against.

  python examples/per_example.py --out=per_example.png  # needs mopt-jax[train]

A batch of 32 digits has 32 losses, and the usual gradient is their mean. Here
`upgrad` weighs them so that, to first order, no loss of the batch rises. Their
gradients are never formed: `mopt.per_example_gramian` finds the 32 x 32 inner
products from the activations of LeNet-5, the weights come from these, and one
more backward pass of the weighed losses is the step. The picture shows how the
training losses fall, of the mean digit and of the worst hundredth.

A digit that is learnt has a gradient next to nothing, and to protect that too
`upgrad` would weigh it by the inverse: by 1e15, which leaves rounding alone in
float32. A ridge on the Gramian, a thousandth of its trace, bounds the weights
and gives those digits up.

Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
<https://arxiv.org/abs/2406.16232>`_, 2024, do so for whole networks.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from matplotlib import figure
import numpy as np
import optax

import models
import mopt
from mopt import training

BATCH_SIZE = 32


def ridged(gramian, eps=1e-3):
  ridge = eps * jnp.trace(gramian) * jnp.eye(len(gramian))
  return mopt.upgrad(gramian + ridge)


WEIGHTINGS = {'mean': mopt.mean, 'upgrad': ridged}


def make_loss(network):
  """The loss of one example: parameters, `[28, 28, 1]` and digit -> scalar."""

  def loss(params, image, digit):
    logits = network.apply({'params': params}, image[None])[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits, digit)

  return loss


def train(weighting, network, images, digits, epochs, learning_rate):
  """All losses after each epoch, `[epochs, n]`, and seconds for a step."""
  loss = make_loss(network)
  losses = jax.vmap(loss, in_axes=(None, 0, 0))
  gramian_fn = mopt.per_example_gramian(loss)
  tx = optax.sgd(learning_rate)

  @jax.jit
  def step(params, state, images, digits):
    _, gramian = gramian_fn(params, images, digits)
    weights = weighting(gramian)
    grads = jax.grad(lambda p: weights @ losses(p, images, digits))(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state

  params = network.init(jax.random.key(0), images[:1])['params']
  state, random = tx.init(params), np.random.default_rng(0)
  history, times = [], []
  for _ in range(epochs):
    order = random.permutation(len(digits)).reshape(-1, BATCH_SIZE)
    for chosen in order:
      start = time.perf_counter()
      params, state = step(params, state, images[chosen], digits[chosen])
      jax.block_until_ready(params)
      times.append(time.perf_counter() - start)
    history.append(losses(params, images, digits))
  return np.array(history), float(np.median(times))


def main(argv=None):
  parser = argparse.ArgumentParser(description='Every example is an objective')
  parser.add_argument('--out', default='per_example.png', help='where to draw')
  parser.add_argument('--epochs', type=int, default=10)
  parser.add_argument('--learning_rate', type=float, default=0.05)
  args = parser.parse_args(argv)
  data = training.load_dataset('mnist5k')
  some = np.random.default_rng(0).permutation(len(data.train.labels))[:1024]
  images = (data.train.images[some] - data.mean) / data.std
  digits = data.train.labels[some].astype(np.int32)
  network = models.create('lenet5')
  picture = figure.Figure(figsize=(6, 4), layout='constrained', dpi=150)
  axes = picture.subplots()
  print(f'{"":8} {"mean loss":>10} {"worst 1 %":>10} {"ms a step":>10}')
  for number, (name, weighting) in enumerate(WEIGHTINGS.items()):
    history, seconds = train(
      weighting, network, images, digits, args.epochs, args.learning_rate
    )
    mean, worst = history.mean(axis=1), np.quantile(history, 0.99, axis=1)
    print(f'{name:8} {mean[-1]:10.4f} {worst[-1]:10.4f} {1e3 * seconds:10.1f}')
    epochs = 1 + np.arange(args.epochs)
    axes.plot(epochs, mean, f'C{number}', label=f'{name}: mean')
    axes.plot(epochs, worst, f'C{number}--', label=f'{name}: worst 1 %')
  axes.set(xlabel='epoch', ylabel='training loss', yscale='log')
  axes.legend()
  picture.savefig(args.out)


if __name__ == '__main__':
  main()
