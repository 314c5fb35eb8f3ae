"""Half residuals whose layers look a few positions around: a piece of both streams at a time.

All of f is computed for a piece, from the piece and the positions around it that it looks at. So
the device holds nothing that grows with the length. What is around a piece is computed twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.serial import serial_route
from layercomb.layers.core.layer import Key, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import add_wanted, zero_cts
from layercomb.layers.reversible.layers import ReversibleHalfResidual
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.layers.reversible.series import Pass
from layercomb.layers.state.decisions import put_decisions, take_decisions
from layercomb.parallel.streams.pieces import (
    Piece,
    Streams,
    key_of,
    over_pieces,
)
from layercomb.parallel.streams.reaching import Reach
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A half residual, computed a piece at a time.

    A `Chunk` that is all of it decides the pieces, and draws as it would.

    Attributes:
      half: the layer (acc, x) → (acc + f(x), x).
      reach: of f.
      length: L.
      size: of a piece, unless a `Chunk` decides.
    """

    half: ReversibleHalfResidual
    reach: Reach
    length: int
    size: int

    @property
    def chunk(self) -> Chunk | None:
        """The `Chunk` that is all of f."""
        one = self.half.layers[0] if len(self.half.layers) == 1 else None
        return one if type(one) is Chunk else None

    @property
    def piece_len(self) -> int:
        """How many positions a piece has."""
        if self.chunk is not None:
            return self.chunk.slice_len
        return self._whole(max(self.size, self.reach.back, self.reach.ahead))

    @property
    def around(self) -> tuple[int, int]:
        """Positions before and after a piece; a window starts, and ends, where f may start."""
        return self._whole(self.reach.back), self._whole(self.reach.ahead)

    def _whole(self, n: int) -> int:
        return -(-n // self.reach.step) * self.reach.step

    def forward(self, weights: Tree, streams: Streams, rng: Key) -> tuple[Streams, Any]:
        """The streams after the layer, and what it decided."""
        acc, x = streams

        def step(acc: Any, i: Any, piece: Piece) -> Any:
            first = i * self.piece_len
            y, found = self._apply(weights, piece.window(x, first), self._key(rng, i))
            return acc.added(piece.inner(y), first), found

        acc, found = over_pieces(step, acc, self.length, self.piece_len, self.around)
        return (acc, x), found

    def backward(
        self, weights: Tree, found: Any, streams: Streams, cts: Streams, rng: Key
    ) -> tuple[Streams, Streams, Tree]:
        """The streams before the layer, the cotangents of these, and those of weights."""
        (acc, x), (d_acc, d_x) = streams, cts

        def step(carry: Any, i: Any, piece: Piece, found: Any) -> Any:
            acc, d_x, total = carry
            first = i * self.piece_len
            ct = piece.widened(d_acc.fetched(first, piece.size))
            y, d, d_weights = self._one_pass(
                weights, found, piece.window(x, first), ct, self._key(rng, i)
            )
            acc = acc.added(-piece.inner(y), first)
            d_x = d_x.added(d, first - piece.back)
            return (acc, d_x, add_wanted(total, d_weights)), None

        start = acc, d_x, zero_cts(weights)
        (acc, d_x, total), _ = over_pieces(
            step, start, self.length, self.piece_len, self.around, found
        )
        return (acc, x), (d_acc, d_x), total

    def _key(self, rng: Key, i: Any) -> Key:
        rng = rng if self.chunk is None else fold(rng, 0)
        return key_of(rng, i, self.length, self.piece_len)

    def _apply(self, weights: Tree, x: jax.Array, rng: Key) -> tuple[jax.Array, Tree]:
        """f of a window, and what it decided."""
        new: Tree = {}
        if self.chunk is not None:
            its = weights.get(self.half.keys[0], {})
            (y,), new = self.chunk.layer.apply(its, {}, (x,), rng=rng, mode=Mode.RECORD)
            return y, take_decisions(new)[1]
        layers: Any = self.half.layers

        def call(i: int, values: Any) -> Any:
            layer, key = layers[i], self.half.keys[i]
            outputs, its = layer.apply(
                weights.get(key, {}), {}, values, rng=fold(rng, i), mode=Mode.RECORD
            )
            new.update({key: its} if its else {})
            return outputs

        (y,) = serial_route(layers, call, (x,))
        return y, take_decisions(new)[1]

    def _one_pass(
        self, weights: Tree, found: Tree, x: jax.Array, ct: jax.Array, rng: Key
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """f of a window, the cotangent of the window, and those of weights."""
        state = put_decisions({}, found)
        if self.chunk is None:
            made: Any = Pass(self.half, weights, state, rng, Mode.REPLAY, None).run((x,), (ct,))
            (y,), (d_x,), d_weights = made
            return y, d_x, d_weights
        key, layer = self.half.keys[0], self.chunk.layer
        its = weights.get(key, {})
        (y,), (d,), d_its = one_pass(
            layer, its, state, (x,), (ct,), rng=rng, mode=Mode.REPLAY, state_cts=None
        )
        return y, d, {key: d_its} if key in weights else {}  # type: ignore[return-value]
