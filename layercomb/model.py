"""Model: a layer bound to its weights and state, for people at a prompt."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError
from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.basic.embedding import check_ids
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.routing import Rearrange
from layercomb.layers.combinators.variadic import Variadic
from layercomb.layers.core.checks import check_inputs
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.seek import with_known_positions
from layercomb.shapes import is_float, signature_of
from layercomb.transforms.quantization.layer import n_weights
from layercomb.trees import Tree


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
          TypeError, ValueError: if the layers do not fit together, or not to the signature; inside
            `jax.jit` and the like, where there are no arrays to remember.
        """
        signature = signature_of(signature)
        rng = rng if isinstance(rng, jax.Array) else seeded('rng', rng)
        _, weights, state = self.layer.init_with_outputs(signature, rng, mode)
        if is_traced((weights, state)):
            raise ValueError(
                'Model.init inside jax.jit, jax.eval_shape or the like would leave tracers in the '
                'Model: init it outside, or call weights, state = layer.init(signature, key)'
            )
        self.weights, self.state = weights, state
        return self

    def __call__(
        self, *inputs: Any, mode: Mode = Mode.EVAL, rng: jax.Array | int | None = None
    ) -> Any:
        """Applies the layer, compiled, and keeps the new state.

        Inside `jax.jit` and the like, where the new state is no array yet, a Model from outside is
        a pure function: in ``EVAL`` its state stays, and in other modes, where statistics or caches
        would be lost, that is refused. A Model made there of traced weights keeps its state.

        Threads may evaluate one Model together; to train or decode, each needs its own.

        Args:
          *inputs: arrays, as many as the layer takes.
          mode: see `Mode`; training needs a key where there is dropout.
          rng: a typed key, or a seed.

        Returns:
          The output, or a tuple of them unless there is just one.

        Raises:
          ValueError: before `init`; for a shape that does not fit; for a token id that is not in
            the vocabulary; in ``PREDICT``, for positions past the end of a cache (the state stays);
            for a new state that would be lost inside `jax.jit` and the like.
        """
        if self.weights is None:
            raise ValueError('this model has no weights yet: call model.init(x) first')
        arrays = tuple(jnp.asarray(x) for x in inputs)
        check_inputs(self.layer, arrays)
        check_tokens(self.layer, arrays)
        key = rng if rng is None or isinstance(rng, jax.Array) else seeded('rng', rng)
        outputs, state = _apply(self.layer, self.weights, self.state, arrays, key, mode)
        if is_traced(state) and not is_traced((self.weights, self.state)):
            if mode is not Mode.EVAL:
                raise ValueError(
                    f'a Model cannot keep its state in {mode.name} inside jax.jit, jax.grad or the '
                    'like, where it is no array yet: call outputs, state = layer.apply(weights, '
                    'state, inputs, rng=rng, mode=mode), and hand the state on'
                )
            state = self.state
        if mode is Mode.PREDICT and not is_traced(outputs) and _has_nan(outputs):
            refuse_full(self.layer, self.weights, self.state, arrays)
        self.state = state
        return outputs[0] if len(outputs) == 1 else outputs

    @property
    def n_weights(self) -> int:
        """How many weights there are; narrow ones count as the wide ones, without scales."""
        return n_weights(self.layer, self.weights or {})

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


def is_traced(tree: Any) -> bool:
    """Whether there is a tracer among the leaves: the value of a program that is being made."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def _has_nan(outputs: tuple[Any, ...]) -> bool:
    return any(is_float(y) and bool(jnp.isnan(y).any()) for y in outputs)


def seeded(name: str, seed: Any) -> jax.Array:
    """The typed key of a seed, of whose 64 bits all count: those above 32 are folded in.

    Raises:
      ValueError: if `seed`, which the message calls by its name, is none.
    """
    known = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not known or not -(2**63) <= seed < 2**63:
        raise ValueError(f'{name}={seed!r}: give an integer in −2⁶³ … 2⁶³ − 1')
    high, low = divmod(int(seed), 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high % 2**32) if high else key


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
    known = with_known_positions(state)

    def run(weights: Tree, inputs: tuple[Any, ...]) -> Any:
        return layer.apply(weights, known, inputs, mode=Mode.PREDICT)[0]

    jax.eval_shape(run, weights, inputs)


@functools.lru_cache(maxsize=64)  # it is asked at every step
def embeddings(layer: Layer) -> tuple[tuple[int, Any], ...]:
    """The layers that look a model's inputs up as they come, each after the input's number.

    Such a layer has a `vocab_size`, below which the ids of its first input must lie.

    `Serial` and its like route the numbers of inputs here as they route arrays, and whatever
    computes something makes None of them.

    >>> from layercomb import tl
    >>> embeddings(tl.Parallel(None, tl.Serial(tl.Embedding(9, 4), tl.Dense(4))))
    ((1, Embedding(9, 4)),)
    """
    found: list[tuple[int, Any]] = []

    def follow(layer: Layer, stack: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(layer, Rearrange):
            return layer.pick(stack)
        if getattr(layer, 'vocab_size', None) is not None:
            found.extend((i, layer) for i in stack[:1] if i is not None)
            return (None,) * layer.n_out
        if isinstance(layer, AssertShape):
            return follow(layer.layer, stack)
        if isinstance(layer, Variadic):  # other combinators may compute between their layers
            return layer.route(lambda i, values: follow(layer.sublayers[i], values), stack)
        if isinstance(layer, Wrapper):
            n, n_times = layer.layer.n_in, layer.n if isinstance(layer, Map) else 1
            if layer.n_in == n_times * n:
                for i in range(n_times):
                    follow(layer.layer, stack[i * n : (i + 1) * n])
        return (None,) * layer.n_out

    follow(layer, tuple(range(layer.n_in)))
    return tuple(found)


def check_tokens(layer: Layer, inputs: tuple[Any, ...]) -> None:
    """Raises a ValueError if token ids lie outside the vocabulary of what looks them up.

    Compiled code cannot raise, so this looks at the values before they go in.

    Args:
      layer: the model.
      inputs: its inputs, or the first few; None is not looked at.
    """
    for i, embedding in embeddings(layer):
        ids = inputs[i] if i < len(inputs) else None
        if ids is not None and jnp.issubdtype(ids.dtype, jnp.integer):
            check_ids(ids, embedding.vocab_size)
