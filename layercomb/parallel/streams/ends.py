"""What stands before and behind the reversible stack of a model, a piece of the length at a time.

`Front` makes the two streams of token ids, `Back` the losses of the streams. Both come with their
gradients.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.core.checks import where
from layercomb.layers.core.layer import Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.seek import Position
from layercomb.layers.positions.axial import AxialPositions
from layercomb.layers.positions.learned import LearnedPositions
from layercomb.layers.positions.sinusoidal import SinusoidalPositions
from layercomb.layers.reversible.cotangents import add_wanted, vjp, zero_cts
from layercomb.parallel.streams.pieces import (
    Piece,
    Streams,
    empty,
    key_of,
    over_pieces,
)
from layercomb.trees import Tree

# Layers that add to a position what depends on its number, and go on from any in ``PREDICT``.
COUNTING = (AxialPositions, LearnedPositions, SinusoidalPositions)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Layers in series inside a model, applied to pieces.

    Attributes:
      owner: the model, a `Serial`.
      first: the number of the first of these layers.
      layers: the layers.
    """

    owner: Any
    first: int
    layers: tuple[Layer, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the layers that may have weights."""
        made: tuple[str, ...] = self.owner.keys[self.first : self.first + len(self.layers)]
        return made

    def weights(self, whole: Tree) -> Tree:
        """The weights of these layers, out of the model's."""
        return {key: whole[key] for key in self.keys if key in whole}

    def run(self, weights: Tree, values: Any, at: Any, rng: Key, number: Any) -> Any:
        """What the layers make of a piece.

        Args:
          weights: as of `weights`.
          values: (B, C, …) each.
          at: the first position of the piece.
          rng: of the model; or None.
          number: of the piece, for keys; None for the only one.
        """
        for i, (key, layer) in enumerate(zip(self.keys, self.layers, strict=True)):
            its, taken = weights.get(key, {}), values[: layer.n_in]
            its_rng = fold(rng, self.first + i)
            its_rng = its_rng if number is None else fold(its_rng, number)
            state, mode = {}, Mode.TRAIN
            if isinstance(layer, COUNTING):
                rows = jnp.broadcast_to(at, taken[0].shape[:1]).astype(jnp.int32)
                state, mode = {'position': Position(rows)}, Mode.PREDICT
            with where(self.owner, key, layer, taken):
                made, _ = layer.apply(its, state, taken, rng=its_rng, mode=mode)
            values = tuple(made) + tuple(values[layer.n_in :])
        return values


@dataclasses.dataclass(frozen=True, eq=False)
class Front:
    """Token ids (B, L) → two streams in host memory.

    Attributes:
      part: the layers before the stack.
      size: positions in a piece.
    """

    part: Part
    size: int

    def forward(self, weights: Tree, tokens: jax.Array, rng: Key) -> Streams:
        """The streams of token ids (B, L)."""
        length = tokens.shape[1]
        make = self._make(tokens, rng)
        one = Piece(min(self.size, length))
        shapes = jax.eval_shape(lambda: make(weights, jnp.int32(0), one))
        start = tuple(
            empty(length, self.size, x.shape[0], x.shape[2], number)
            for number, x in enumerate(shapes)
        )

        def step(streams: Streams, i: Any, piece: Piece) -> Any:
            made = make(weights, i, piece)
            first = i * self.size
            return tuple(s.put(x, first) for s, x in zip(streams, made, strict=True)), None

        streams: Streams = over_pieces(step, start, length, self.size)[0]
        return streams

    def backward(self, weights: Tree, tokens: jax.Array, cts: Streams, rng: Key) -> Tree:
        """The cotangents of weights."""
        length = tokens.shape[1]
        make = self._make(tokens, rng)

        def step(total: Tree, i: Any, piece: Piece) -> Any:
            _, pull = vjp(lambda weights: make(weights, i, piece), weights)
            (d,) = pull(tuple(ct.fetched(i * self.size, piece.size) for ct in cts))
            return add_wanted(total, d), None

        total: Tree = over_pieces(step, zero_cts(weights), length, self.size)[0]
        return total

    def _make(self, tokens: jax.Array, rng: Key) -> Any:
        length = tokens.shape[1]

        def make(weights: Tree, i: Any, piece: Piece) -> Any:
            first = i * self.size
            some = jax.lax.dynamic_slice_in_dim(tokens, first, piece.size, 1)
            number = i if length > self.size else None
            made = self.part.run(weights, (some,), first, rng, number)
            return tuple(x.astype(jnp.float32) for x in made)

        return make


@dataclasses.dataclass(frozen=True, eq=False)
class Back:
    """Streams and others, such as targets (B, L) → losses (B, L); a slice of a `Chunk` at a time.

    Attributes:
      part: the layers behind the stack, the last of which is the `Chunk` around head and losses.
    """

    part: Part

    @property
    def size(self) -> int:
        """Positions in a slice."""
        return self._chunk.slice_len

    @property
    def _chunk(self) -> Chunk:
        last: Any = self.part.layers[-1]
        return last

    def forward(self, weights: Tree, streams: Streams, others: Any, rng: Key) -> Any:
        """The losses and their weights, (B, L) each."""
        length = others[0].shape[1]
        score = self._score(others, rng)

        def made(i: Any, piece: Piece) -> Any:
            pieces = tuple(s.fetched(i * self.size, piece.size) for s in streams)
            return score(weights, pieces, i, piece)

        one = Piece(min(self.size, length))
        shapes = jax.eval_shape(lambda: made(jnp.int32(0), one))
        start = tuple(jnp.zeros((s.shape[0], length, *s.shape[2:]), s.dtype) for s in shapes)

        def step(whole: Any, i: Any, piece: Piece) -> Any:
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, y, i * self.size, 1)
                for x, y in zip(whole, made(i, piece), strict=True)
            ), None

        return over_pieces(step, start, length, self.size)[0]

    def backward(
        self, weights: Tree, streams: Streams, others: Any, cts: Any, rng: Key
    ) -> tuple[Streams, Tree]:
        """The cotangents of the streams, in host memory, and those of weights."""
        length = others[0].shape[1]
        score = self._score(others, rng)
        n = len(streams)
        start = tuple(
            empty(length, self.size, x.n_rows, x.width, n + number)
            for number, x in enumerate(streams)
        )

        def step(carry: Any, i: Any, piece: Piece) -> Any:
            d_streams, total = carry
            first = i * self.size
            pieces = tuple(s.fetched(first, piece.size) for s in streams)
            _, pull = vjp(lambda weights, xs: score(weights, xs, i, piece), weights, pieces)
            its_cts = tuple(
                None if ct is None else jax.lax.dynamic_slice_in_dim(ct, first, piece.size, 1)
                for ct in cts
            )
            d, ds = pull(its_cts)
            d_streams = tuple(s.put(x, first) for s, x in zip(d_streams, ds, strict=True))
            return (d_streams, add_wanted(total, d)), None

        carry = start, zero_cts(weights)
        d_streams, total = over_pieces(step, carry, length, self.size)[0]
        return d_streams, total

    def _score(self, others: Any, rng: Key) -> Any:
        """(weights, pieces of the streams, number, form) → losses of the piece."""
        length = others[0].shape[1]
        *between, last = self.part.layers
        inner = dataclasses.replace(self.part, layers=tuple(between))
        key, n = self.part.keys[-1], self.part.first + len(between)

        def score(weights: Tree, values: Any, i: Any, piece: Piece) -> Any:
            first = i * self.size
            beside = tuple(jax.lax.dynamic_slice_in_dim(x, first, piece.size, 1) for x in others)
            values = inner.run(weights, (*values, *beside), first, rng, i)
            its_rng = key_of(fold(rng, n), i, length, self.size)
            chunk: Any = last
            made, _ = chunk.layer.apply(
                weights.get(key, {}), {}, values, rng=its_rng, mode=Mode.TRAIN
            )
            return tuple(made)

        return score
