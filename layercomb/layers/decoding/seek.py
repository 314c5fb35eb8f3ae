"""Where the rows of a decoding state stand, and how they are sent to other positions."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.state.parts import Part

S = TypeVar('S', bound='Seekable')
T = TypeVar('T')


class Seekable(Part):
    """A part of a decoding state whose rows can be sent to other positions, as a cache's can."""

    def seek(self: S, lengths: jax.Array) -> S:
        """The same part with each row at a position of its own; by default each field is moved.

        Args:
          lengths: (B,) int32.
        """
        moved = {name: seek(value, lengths) for name, value in self.fields().items()}
        return self.replace(**moved)


class Position(Seekable):
    """Where each row of a decoding state stands: how many positions it has taken.

    A layer that counts positions keeps one in its state in ``PREDICT``, beside what else it keeps::

        return weights, {'position': tl.Position.first(x.shape[0])}

    Attributes:
      rows: (B,) int32.
    """

    rows: jax.Array

    @classmethod
    def first(cls, n_rows: int) -> Position:
        """Of rows that have taken nothing yet."""
        return cls(jnp.zeros(n_rows, jnp.int32))

    def moved(self, length: int) -> Position:
        """The rows after so many more positions each."""
        return Position(self.rows + length)

    def seek(self, lengths: jax.Array) -> Position:
        """The rows at other positions, (B,)."""
        return Position(jnp.asarray(lengths, jnp.int32))


def seek(state: T, lengths: jax.Array) -> T:
    """A decoding state in which each row stands at a position of its own.

    To decode prompts of different lengths together, ingest them padded at the end, then seek to
    their lengths: what the padding left behind is overwritten before it is seen.

    Args:
      state: any state of ``PREDICT``, of a whole model.
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
    """A state whose positions are NumPy's, which `jit` and `eval_shape` look at as they are."""

    def one(x: Any) -> Any:
        return Position(np.asarray(x.rows)) if isinstance(x, Position) else x  # type: ignore[arg-type]

    known: T = jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Position))
    return known


def held(state: Any, kind: type[T]) -> T:
    """What a layer's state in ``PREDICT`` must be, or hold: a cache, or a position.

    Raises:
      ValueError: if the state was not made for ``PREDICT``.
    """
    if not isinstance(state, kind):
        raise ValueError(
            'this state holds no caches: make one with lc.init_state(net, signature), or '
            'model.init(x, mode=Mode.PREDICT)'
        )
    return state
