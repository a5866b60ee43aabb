"""What networks are trained to do, and what they are judged by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Columns begin with these that mean something else.
_TAKEN = ('nonzeros', 'weight')


class Loss(NamedTuple):
  """A loss and a score; columns of tables and logs are called by their names.

  Both are functions of what the network returns for a batch, and of the labels
  of the batch, and give a number for each example: `[batch]`. JAX traces them.
  An example's own outputs and label decide its number: means are taken outside.

  The first objective is the mean loss, a float. Front and knee go by 1 less the
  mean score, and by the number of nonzeros.

  Examples:
    >>> import jax.numpy as jnp
    >>> from mopt import training
    >>> squares = training.Loss(
    ...     per_example=lambda outputs, labels: (outputs[:, 0] - labels) ** 2,
    ...     score=lambda outputs, labels: abs(outputs[:, 0] - labels) < 0.1,
    ...     name='mse',
    ...     score_name='close',
    ... )
    >>> outputs, labels = jnp.array([[1.0], [3.0]]), jnp.array([1.0, 2.0])
    >>> print(squares.per_example(outputs, labels))
    [0. 1.]
    >>> print(squares.score(outputs, labels))
    [ True False]
  """

  per_example: Callable[[Any, jax.Array], jax.Array]  # Is minimised.
  score: Callable[[Any, jax.Array], jax.Array]  # Larger is better.
  name: str = 'loss'
  score_name: str = 'score'
  # Whether labels are classes, 0 to `num_classes - 1`, outputs are logits
  # `[batch, num_classes]`, and scores are hits, of which a share comes about by
  # chance.
  classes: bool = False

  def error(self, split: str) -> str:
    """What front and knee go by on a split, in words."""
    if self.classes:
      return f'{split} error'.lstrip()
    return ' '.join(filter(None, ('1 -', split, self.score_name)))

  def show(self, score: float) -> str:
    """A mean score for people."""
    if np.isnan(score):
      return '-'
    return f'{100 * score:.2f} %' if self.classes else f'{score:.4g}'


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), labels
  )


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1) == labels


# Of logits [batch, classes] and labels [batch].
cross_entropy = Loss(_cross_entropy, _hits, 'ce', 'accuracy', classes=True)


def check_names(loss: Loss) -> None:
  """Raises unless columns can be called by the names of a loss.

  Raises:
    ValueError: for names that are equal, no words, or those of other columns.
  """
  names = loss.name, loss.score_name
  for name in names:
    is_word = isinstance(name, str) and name.isidentifier()
    if not is_word or any(f'{name}_'.startswith(f'{x}_') for x in _TAKEN):
      raise ValueError(
        f'loss={loss.name}: expected names of letters, digits and _ that do '
        f'not begin as other columns do, {" or ".join(_TAKEN)}, got {name!r}.'
      )
  if names[0] == names[1]:
    raise ValueError(
      f'loss={loss.name}: expected another name for the score, got '
      f'{loss.score_name!r}.'
    )


def check_shapes(loss: Loss, outputs: Any, labels: Any) -> None:
  """Raises unless loss and score give a number for each example, at no cost.

  Args:
    loss: to check.
    outputs: the shapes of what the network returns.
    labels: the shape of the labels of the same batch.

  Raises:
    ValueError: with one line that names the loss, and the shapes.
  """
  wanted = (labels.shape[0],)
  given = f'outputs {_said(outputs)} and labels {_said(labels)}'
  for name, function, is_kind, kind in (
    ('per_example', loss.per_example, _is_float, 'floats'),
    ('score', loss.score, _is_real, 'real numbers'),
  ):
    begin = f'loss={loss.name}: expected {name} to give {kind} {list(wanted)}'
    try:
      found = jax.eval_shape(function, outputs, labels)
    # It is the code of a stranger.
    except Exception as error:
      reason = ' '.join(f'{type(error).__name__}: {error}'.split())
      raise ValueError(f'{begin} for {given}, got {reason}') from error
    shape = getattr(found, 'shape', None)
    if shape != wanted or not is_kind(found.dtype):
      raise ValueError(f'{begin} for {given}, got {_said(found)}.')


def _is_float(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.floating)


def _is_real(dtype: Any) -> bool:
  kinds = jnp.floating, jnp.integer, jnp.bool_
  return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _said(tree: Any) -> str:
  """The types and shapes of arrays: float32[2, 3]."""
  words = jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', tree)
  return str(words).replace("'", '')
