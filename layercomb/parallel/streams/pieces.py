"""Streams in host memory, and loops that bring one piece of them to the device after the other.

The array of a stream is (L, B·D): positions come first, so that a piece is one block of memory
whatever its length. It may have more than L places, of which the last are not read.

Shape letters: B batch, L length, D d_model, C positions in a piece.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Key, fold


@functools.partial(jax.tree_util.register_dataclass, data_fields=['values'], meta_fields=['n_rows'])
@dataclasses.dataclass(frozen=True)
class Stream:
    """Vectors of all positions, in host memory.

    Attributes:
      values: (L or more, B·D) float32.
      n_rows: B.
    """

    values: Any
    n_rows: int

    @property
    def width(self) -> int:
        """D."""
        size: int = self.values.shape[1]
        return size // self.n_rows

    def fetched(self, first: Any, size: int) -> jax.Array:
        """Positions of the stream, on the device: (B, size, D).

        Args:
          first: int32 ().
          size: how many.
        """
        x = jax.lax.dynamic_slice_in_dim(self.values, first, size, 0)
        x = jax.device_put(x, jax.memory.Space.Device)
        return jnp.swapaxes(x.reshape(size, self.n_rows, self.width), 0, 1)  # (B, C, D)

    def put(self, x: jax.Array, first: Any) -> Stream:
        """The stream with other values from a position on.

        Args:
          x: (B, C, D), on the device.
          first: int32 ().
        """
        x = jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)  # (C, B·D)
        x = jax.device_put(x, jax.memory.Space.Host)
        values = jax.lax.dynamic_update_slice_in_dim(self.values, x, first, 0)
        return Stream(values, self.n_rows)

    def added(self, x: jax.Array, first: Any) -> Stream:
        """The stream with values added from a position on; the arguments are as of `put`."""
        return self.put(self.fetched(first, x.shape[1]) + x.astype(jnp.float32), first)


Streams = tuple[Stream, ...]


class Piece(NamedTuple):
    """What pieces of one form have in common.

    Attributes:
      size: C.
      back: positions before it that it is computed from.
      ahead: positions after it.
    """

    size: int
    back: int = 0
    ahead: int = 0

    def window(self, stream: Stream, first: Any) -> jax.Array:
        """The positions of a stream that a piece is computed from, on the device: (B, W, D).

        Args:
          stream: in host memory.
          first: the piece's first position, int32 ().
        """
        return stream.fetched(first - self.back, self.back + self.size + self.ahead)

    def inner(self, x: jax.Array) -> jax.Array:
        """The piece itself: (B, W, D) → (B, C, D)."""
        return x[:, self.back : self.back + self.size]

    def widened(self, x: jax.Array) -> jax.Array:
        """The piece with zeros around it: (B, C, D) → (B, W, D)."""
        if not self.back and not self.ahead:
            return x
        return jnp.pad(x, [(0, 0), (self.back, self.ahead)] + [(0, 0)] * (x.ndim - 2))


Step = Callable[..., tuple[Any, Any]]  # (carry, number, piece) → the next carry, and an output


def over_pieces(
    step: Step, carry: Any, length: int, size: int, reach: tuple[int, int] = (0, 0),
    found: tuple[Any, ...] | None = None,
) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
    """Carries a value through `step` for each piece of a sequence, from the first to the last.

    Args:
      step: is given (carry, number, piece), or (carry, number, piece, what belongs to it) with
        `found`.
      carry: the first carry.
      length: L.
      size: C; the last piece may be shorter.
      reach: positions before and after a piece that it is computed from, as far as there are.
      found: what an earlier call gave for the same sequence.

    Returns:
      The last carry, and the outputs of pieces of each form, with a leading axis.
    """
    made = []
    for i, (piece, first, n) in enumerate(_forms(length, size, reach)):
        its = None if found is None else found[i]

        def one(carry: Any, xs: Any, piece: Piece = piece) -> Any:
            number, its = xs
            return step(carry, number, piece, *(() if found is None else (its,)))

        if n == 1:
            carry, y = one(carry, (jnp.int32(first), jax.tree.map(lambda x: x[0], its)))
            y = jax.tree.map(lambda x: x[None], y)
        else:
            numbers = jnp.arange(first, first + n, dtype=jnp.int32)
            carry, y = jax.lax.scan(one, carry, (numbers, its))
        made.append(y)
    return carry, tuple(made)


def _forms(length: int, size: int, reach: tuple[int, int]) -> list[tuple[Piece, int, int]]:
    """The forms of pieces in order, each with its first piece and how many there are."""
    back, ahead = reach
    forms = [
        Piece(min(size, length - at), min(back, at), min(ahead, max(length - at - size, 0)))
        for at in range(0, length, size)
    ]
    made, first = [], 0
    for form, same in itertools.groupby(forms):
        n = len(list(same))
        made.append((form, first, n))
        first += n
    return made


def n_pieces(length: int, size: int) -> int:
    """How many pieces a sequence has."""
    return -(-length // size)


def key_of(rng: Key, number: Any, length: int, size: int) -> Key:
    """The key of a piece, as of the slices of `Chunk`: a sequence of one piece has its own.

    Args:
      rng: of the layer; or None.
      number: of the piece, int32 ().
      length, size: of the sequence, and of a piece.
    """
    return rng if length <= size else fold(rng, number)


def empty(length: int, size: int, n_rows: int, width: int, number: int) -> Stream:
    """A stream that is still to be filled.

    Args:
      length: L.
      size: of a piece.
      n_rows: B.
      width: D.
      number: fills it, another for each stream: of equal ones compilers make one, and copies.
    """
    size = min(size, length)

    def one(_: None, __: None) -> Any:
        piece = jnp.full((size, n_rows * width), number, jnp.float32)
        return None, jax.device_put(piece, jax.memory.Space.Host)

    _, made = jax.lax.scan(one, None, None, n_pieces(length, size))
    return Stream(made.reshape(-1, n_rows * width), n_rows)  # (n·C, B·D)
