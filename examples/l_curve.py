"""The corner of an L-curve: a knee of two objectives without a network.

  python examples/l_curve.py --out=l_curve.png  # needs mopt and matplotlib

A barcode is seen out of focus, with noise. To undo the blur is ill-posed, so
Tikhonov's regularization adds the size |x|^2 of the solution, times a weight,
to the misfit |Ax - b|^2: both are minimised, and on logarithmic axes the front
is an L. `mopt.search.bisection` looks for its corner in at most 20 solves.

Small weights follow the noise, large ones flatten the bars; at the knee, ringed
in the picture, the bars are back. The knee does not know the truth: its error
is some 20 % larger than the smallest that any weight gives.

Hansen, `Analysis of discrete ill-posed problems by means of the L-curve
<https://doi.org/10.1137/1034115>`_, 1992.
"""

import argparse

import matplotlib
from matplotlib import colors
from matplotlib import figure
import numpy as np

import mopt
from mopt import search

LOW, HIGH = 1e-8, 1e2  # of the weights


def problem(n=200, width=0.02, noise=0.01, seed=7):
  """A blur `[n, n]`, the bars `[n]` and what is seen of them `[n]`."""
  random = np.random.default_rng(seed)
  t = (np.arange(n) + 0.5) / n
  blur = np.exp(-0.5 * ((t[:, None] - t) / width) ** 2)
  blur /= n * width * np.sqrt(2 * np.pi)
  bars = random.integers(0, 2, 26)[(26 * t).astype(int)]
  truth = bars * (abs(t - 0.5) < 0.4) * 1.0  # and a quiet zone at both ends
  return blur, truth, blur @ truth + noise * random.normal(size=n)


def make_solver(blur, seen):
  """A function: weight -> solution `[n]`, logarithms of both objectives."""
  left, singular, right = np.linalg.svd(blur)
  seen_left = left.T @ seen

  def solve(weight):
    x = right.T @ (singular * seen_left / (singular**2 + weight))
    return x, np.log([np.sum((blur @ x - seen) ** 2), np.sum(x**2)])

  return solve


def draw(path, weights, points, knee, curves):
  """The front on the left, and on the right signals `{label: [n]}`."""
  picture = figure.Figure(figsize=(10, 4), layout='constrained', dpi=150)
  axes, right = picture.subplots(1, 2)
  misfit, size = np.exp(points).T
  scale = matplotlib.cm.ScalarMappable(colors.LogNorm(LOW, HIGH), 'viridis')
  edges = scale.to_rgba(weights)
  faces = edges.copy()
  faces[~mopt.nondominated(points), 3] = 0  # hollow where dominated
  axes.scatter(misfit, size, 40, facecolors=faces, edgecolors=edges)
  axes.scatter(misfit[knee], size[knee], 190, 'none', edgecolors='black')
  axes.set(xscale='log', yscale='log', xlabel='misfit', ylabel='size')
  picture.colorbar(scale, ax=axes, label='weight')
  for (label, curve), color in zip(curves.items(), ['0.7', 'C1', 'C0']):
    right.plot(curve, color=color, label=label)
  right.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3)
  picture.savefig(path)


def main(argv=None):
  parser = argparse.ArgumentParser(description='Finds the corner of an L-curve')
  parser.add_argument('--out', default='l_curve.png', help='where to draw it')
  args = parser.parse_args(argv)
  blur, truth, seen = problem()
  solve = make_solver(blur, seen)
  strategy = search.bisection(LOW, HIGH, levels=20, max_trials=20)
  state = strategy.init()
  while not strategy.done(state):
    weights = strategy.ask(state)
    state = strategy.tell(state, weights, [solve(w)[1] for w in weights])
  weights, points = map(np.array, zip(*state.trials))
  knee = mopt.knee(points)
  x, _ = solve(weights[knee])
  error = lambda x: np.linalg.norm(x - truth) / np.linalg.norm(truth)
  dense = np.geomspace(LOW, HIGH, 401)
  dense_knee = dense[mopt.knee([solve(w)[1] for w in dense])]
  best = min(dense, key=lambda w: error(solve(w)[0]))
  print(f'knee: weight {weights[knee]:.2e}, {len(weights)} solves')
  print(f'on a dense grid: weight {dense_knee:.2e}, {len(dense)} solves')
  print(f'relative error at the knee: {error(x):.3f}')
  print(f'smallest: {error(solve(best)[0]):.3f}, at weight {best:.2e}')
  curves = {'bars': truth, 'seen': seen, 'at the knee': x}
  draw(args.out, weights, points, knee, curves)


if __name__ == '__main__':
  main()
