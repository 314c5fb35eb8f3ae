"""Positions of the rows of a decoding state, and `seek`, which changes them."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.state.parts import Part

S = TypeVar('S', bound='Seekable')
T = TypeVar('T')


class Seekable(Part):
    """A part of a decoding state whose rows can be moved to other positions, such as a cache."""

    def seek(self: S, lengths: jax.Array) -> S:
        """The same part with each row at another position; by default moves each field.

        Args:
          lengths: (B,) int32.
        """
        moved = {name: seek(value, lengths) for name, value in self.fields().items()}
        return self.replace(**moved)


class Position(Seekable):
    """How many positions each row of a decoding state has taken.

    A layer that counts positions keeps one in its state in ``PREDICT``, beside its other entries::

        return weights, {'position': tl.Position.first(x.shape[0])}

    Attributes:
      rows: (B,) int32.
    """

    rows: jax.Array

    @classmethod
    def first(cls, n_rows: int) -> Position:
        """The position 0 of `n_rows` rows."""
        return cls(jnp.zeros(n_rows, jnp.int32))

    def moved(self, length: int) -> Position:
        """The position of rows that have taken `length` more."""
        return Position(self.rows + length)

    def seek(self, lengths: jax.Array) -> Position:
        """The rows at other positions.

        Args:
          lengths: (B,) integers.
        """
        return Position(jnp.array(lengths, jnp.int32))  # a copy: each may be donated


def seek(state: T, lengths: jax.Array) -> T:
    """The decoding state with each row at another position.

    To decode prompts of different lengths together, ingest them padded at the end, then seek to
    their lengths. What the padding left in the caches is overwritten before it is seen.

    Args:
      state: any state of ``PREDICT``, of a layer or a whole model.
      lengths: (B,) int32, how many positions each row keeps, at most as many as it has taken.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> state = {'positions': {'position': tl.Position.first(2)}}
    >>> tl.seek(state, jnp.array([3, 5]))['positions']['position'].rows.tolist()
    [3, 5]
    """

    def one(part: Any) -> Any:
        return part.seek(lengths) if isinstance(part, Seekable) else part

    moved: T = jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Seekable))
    return moved


def with_known_positions(state: T) -> T:
    """The state with positions as NumPy arrays, so that `jit` and `eval_shape` know their values.

    Args:
      state: any state of ``PREDICT``.
    """

    def one(x: Any) -> Any:
        return Position(np.asarray(x.rows)) if isinstance(x, Position) else x  # type: ignore[arg-type]

    known: T = jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Position))
    return known


def held(state: Any, kind: type[T]) -> T:
    """A layer's cache or position, checked for its type.

    Args:
      state: the layer's state, or the entry of it.
      kind: the class wanted, such as `KVCache`.

    Raises:
      ValueError: if the state was not made for ``PREDICT``.
    """
    if not isinstance(state, kind):
        raise ValueError(
            'this state holds no caches: make one with lc.init_state(net, signature), or '
            'model.init(x, mode=Mode.PREDICT)'
        )
    return state
