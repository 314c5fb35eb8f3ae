"""Model: a layer bound to its weights and state, for people at a prompt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.layers.base import POSITION, Layer, Mode, Tree, check_inputs
from layercomb.layers.core import Embedding
from layercomb.shapes import is_float, signature_of


class Model:
    """A layer with its weights and state, to be called like a function.

    Everything that trains, decodes or compiles works on the layer and plain values; this class is
    for exploring. It is the one place where something is remembered.

    Args:
      layer: what to bind.
      weights: its weights, if there are any yet; `init` makes fresh ones.
      state: its state.

    >>> from layercomb import Model, tl
    >>> import jax.numpy as jnp
    >>> model = Model(tl.Serial(tl.Dense(8), tl.Relu(), tl.Dense(1))).init(jnp.zeros((2, 4)))
    >>> model(jnp.ones((2, 4))).shape, model.n_weights
    ((2, 1), 49)
    """

    def __init__(self, layer: Layer, weights: Tree | None = None, state: Tree | None = None):
        if not isinstance(layer, Layer):
            raise TypeError(f'Model binds a layer such as tl.Dense(4), got {layer!r}')
        self.layer = layer
        self.weights = weights
        self.state = {} if state is None else state

    def init(self, signature: Any, rng: jax.Array | int = 0, mode: Mode = Mode.TRAIN) -> Model:
        """Makes fresh weights and state.

        Args:
          signature: of the inputs, or example inputs: an array or `lc.shape_dtype(…)`, or a tuple
            of these for several inputs.
          rng: a typed key, or a seed.
          mode: what the state is for; in ``PREDICT`` it holds caches.

        Returns:
          This model.

        Raises:
          TypeError, ValueError: if the layers do not fit together, or not to the signature.
        """
        signature = signature_of(signature)
        rng = jax.random.key(rng) if isinstance(rng, int) else rng
        _, self.weights, self.state = self.layer._build(signature, rng, mode)
        return self

    def __call__(self, *inputs: Any, mode: Mode = Mode.EVAL, rng: jax.Array | None = None) -> Any:
        """Applies the layer, compiled, and keeps the new state.

        Args:
          *inputs: arrays, as many as the layer takes.
          mode: see `Mode`; training needs a key where there is dropout.
          rng: a typed key.

        Returns:
          The output, or a tuple of them unless there is just one.

        Raises:
          ValueError: before `init`; for a shape that does not fit; for a token id that is not in
            the vocabulary; in ``PREDICT``, for positions past the end of a cache (the state stays).
        """
        if self.weights is None:
            raise ValueError('this model has no weights yet: call model.init(x) first')
        arrays = tuple(jnp.asarray(x) for x in inputs)
        check_inputs(self.layer, arrays)
        check_tokens(self.layer, arrays)
        outputs, state = _apply(self.layer, self.weights, self.state, arrays, rng, mode)
        if mode is Mode.PREDICT and any(is_float(y) and jnp.isnan(y).any() for y in outputs):
            refuse_full(self.layer, self.weights, self.state, arrays)
        self.state = state
        return outputs[0] if len(outputs) == 1 else outputs

    @property
    def n_weights(self) -> int:
        """How many numbers the weights hold."""
        return trees.count(self.weights or {})

    def save(self, directory: str | Path) -> None:
        """Writes weights and state into a new directory, whole or not at all.

        Raises:
          UsageError: if something is there already, or there are no weights.
        """
        from layercomb import checkpoints

        if self.weights is None:
            raise UsageError('this model has no weights to save: call model.init(x) first')
        checkpoints.save_tree(directory, {'weights': self.weights, 'state': self.state})

    def load(self, directory: str | Path) -> Model:
        """Reads weights and state that `save` wrote for an equal layer.

        Raises:
          UsageError: if nothing was saved there, it is damaged, or it was another model.
          ValueError: before `init`, which says how large the weights are.
        """
        from layercomb import checkpoints

        if self.weights is None:
            raise ValueError('init the model first: model.init(x).load(dir)')
        like = {'weights': self.weights, 'state': self.state}
        loaded = checkpoints.load_tree(directory, like)
        self.weights, self.state = loaded['weights'], loaded['state']
        return self

    def __repr__(self) -> str:
        size = f'{self.n_weights:,} weights' if self.weights is not None else 'no weights yet'
        return f'Model({self.layer!r})  # {size}'


@functools.partial(jax.jit, static_argnums=(0, 5))
def _apply(
    layer: Layer, weights: Tree, state: Tree, inputs: Any, rng: jax.Array | None, mode: Mode
) -> Any:
    return layer.apply(weights, state, inputs, rng=rng, mode=mode)


def refuse_full(layer: Layer, weights: Tree, state: Tree, inputs: tuple[Any, ...]) -> None:
    """Raises a layer's own ValueError if the next positions do not fit into its caches.

    Compiled code cannot raise, and gives NaN: this traces the layer once more, on positions that
    are known. Nothing is computed.

    Args:
      layer: the model.
      weights: its weights.
      state: its state in ``PREDICT``, before the inputs.
      inputs: the next positions.
    """
    known = trees.map_with_path(
        lambda path, x: np.asarray(x) if path.split('/')[-1] == POSITION else x, state
    )

    def run(weights: Tree, inputs: tuple[Any, ...]) -> Any:
        return layer.apply(weights, known, inputs, mode=Mode.PREDICT)[0]

    jax.eval_shape(run, weights, inputs)


def first_embedding(layer: Layer) -> Embedding | None:
    """The embedding that a model's first input meets, if it meets one before anything else."""
    while layer.sublayers and not isinstance(layer, Embedding):
        layer = layer.sublayers[0]
    return layer if isinstance(layer, Embedding) else None


def check_tokens(layer: Layer, inputs: tuple[Any, ...]) -> None:
    """Raises a ValueError if token ids lie outside the vocabulary of a model's first embedding.

    Compiled code cannot raise, so this looks at the values before they go in.

    Args:
      layer: the model.
      inputs: its inputs; the first are the token ids, where the model begins with an embedding.
    """
    embedding = first_embedding(layer)
    if embedding is not None and jnp.issubdtype(inputs[0].dtype, jnp.integer):
        embedding.check_ids(inputs[0])
