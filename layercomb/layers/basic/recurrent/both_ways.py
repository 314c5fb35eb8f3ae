"""`Bidirectional`: two recurrent layers, one of which reads each row from its end; `Reverse`.

Shape letters: B batch, L length, D width of the input, F, G widths of the two outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.combinators.routing import Concatenate
from layercomb.layers.core.combinator import Call, Combinator, Stack
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import set_field
from layercomb.layers.state.segments import lengths, places, segments_of
from layercomb.shapes import Signature, check_mask
from layercomb.trees import Tree


class Reverse(Layer):
    """Each row from its end: (B, L, …) → (B, L, …), of any dtype.

    Twice, it gives what it was given. With a mask (B, L) real positions alone change places, the
    first with the last, and padding stays where it is. In packed rows each document is reversed
    where it stands.

    Attributes:
      masked: whether it takes a mask, True = a real position, as a second input.

    Raises:
      ValueError: for an input without positions, or a mask of another kind; in ``PREDICT``, where
        the last position is not known.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> x, mask = jnp.array([[1, 2, 3, 0]]), jnp.array([[True, True, True, False]])
    >>> tl.Reverse(masked=True).apply({}, {}, (x, mask))[0][0].tolist()
    [[3, 2, 1, 0]]
    """

    masked: bool = False

    n_in = property(lambda self: 1 + self.masked)
    position_wise = False
    sees_segments = True
    causal = False

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights, and no state.

        Args:
          signature: of the input, (B, L, …), and of the mask, if it takes one.
          rng: is not used.
          mode: any but ``PREDICT``.

        Raises:
          ValueError: for an input without positions; in ``PREDICT``.
        """
        del rng
        _check(signature[0], mode)
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(B, L, …), and a mask (B, L) if `masked` → (B, L, …)."""
        x, ids = inputs[0], segments_of(state)
        _check(x, mode)
        if self.masked:
            check_mask(inputs[1], tuple(x.shape[:2]))
        if ids is None and not self.masked:
            return (jnp.flip(x, 1),), state
        mask = inputs[1] if self.masked else jnp.ones(x.shape[:2], bool)
        ids = jnp.zeros(x.shape[:2], jnp.int32) if ids is None else ids
        source = _sources(mask, ids)
        source = source.reshape(*source.shape, *[1] * (x.ndim - 2))  # (B, L) → (B, L, 1 …)
        return (jnp.take_along_axis(x, source, 1),), state


def _check(x: Any, mode: Mode) -> None:
    if mode is Mode.PREDICT:
        raise ValueError(
            'Reverse begins with the last position, which decoding step by step does not have: put '
            'an encoder into tl.Once, or decode a model that reads forwards alone'
        )
    if len(x.shape) < 2:
        raise ValueError(
            f'Reverse takes (batch, length, …), got the shape {tuple(x.shape)}: add a batch axis, '
            'x[None]'
        )


def _sources(mask: jax.Array, ids: jax.Array) -> jax.Array:
    """The position that each takes its value from, (B, L) int32.

    Real positions are counted along the row. The n-th of a document takes the value of the n-th
    from its end, the sum of whose numbers is that of the document's first and last.
    """
    at = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32)[None], mask.shape)
    seen = jnp.cumsum(mask, 1, dtype=jnp.int32)  # real positions up to each, itself included
    start = at - places(ids)  # of each position's document
    first = jnp.take_along_axis(seen - mask.astype(jnp.int32), start, 1)
    last = jnp.take_along_axis(seen, start + lengths(ids) - 1, 1) - 1
    real = jnp.argsort(~mask, 1, stable=True).astype(jnp.int32)  # where the n-th real position is
    number = jnp.where(mask, first + last - (seen - 1), 0)
    return jnp.where(mask, jnp.take_along_axis(real, number, 1), at)


class Bidirectional(Combinator):
    """A layer that reads forwards beside one that reads backwards: (B, L, D) → (B, L, F + G).

    y = [forward(x) | reverse(backward(reverse(x)))], so that each position sees all others. With a
    mask the backward run begins at the last real position, so that padding at the end reaches no
    real one. Padding elsewhere reaches those after it in either run: put it at the end.

    It does not decode step by step. As an encoder, put it into `Once`.

    Weights: those of the two layers, under ``forward`` and ``backward``.

    Attributes:
      forward: a layer of one value, such as `LSTM` or a `Serial` of several.
      backward: another; None for one like `forward`, with weights of its own.
      masked: whether it takes a mask (B, L), True = a real position, as a second input.
      join: puts the two outputs together; ``tl.Add()`` sums them.
      reverse: the layer that turns rows around, a `Reverse`.

    Raises:
      TypeError: if `forward` or `backward` does not take one value and give one, or if `join` and
        `reverse` take another number of values.
      ValueError: in ``PREDICT``.

    References:
      Schuster & Paliwal 1997, https://doi.org/10.1109/78.650093

    >>> from layercomb import tl, shape_dtype
    >>> net = tl.Bidirectional(tl.LSTM(3))
    >>> net.output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 6), dtype=float32),)
    >>> encoder = tl.Serial(
    ...     tl.Branch(tl.Embedding(16, 8), tl.PaddingMask()),
    ...     tl.Bidirectional(tl.GRU(4), masked=True),
    ... )
    >>> encoder.n_in
    1
    """

    forward: Layer
    backward: Layer | None = None
    masked: bool = False
    _: dataclasses.KW_ONLY
    join: Layer = Concatenate()
    reverse: Layer | None = None

    n_in = property(lambda self: 1 + self.masked)
    causal = False

    def __post_init__(self) -> None:
        if self.backward is None:
            set_field(self, 'backward', self.forward)
        if self.reverse is None:
            set_field(self, 'reverse', Reverse(self.masked))
        super().__post_init__()
        for field, n_in in (('forward', 1), ('backward', 1), ('join', 2), ('reverse', self.n_in)):
            layer = getattr(self, field)
            if (layer.n_in, layer.n_out) != (n_in, 1):
                raise TypeError(
                    f'Bidirectional: {field}= must take {n_in} and give 1, and '
                    f'{type(layer).__name__} takes {layer.n_in} and gives {layer.n_out}'
                )

    def route(self, call: Call, stack: Stack) -> Stack:
        """x, and a mask if `masked` → the joined outputs, and the values beneath."""
        forward, backward, join, reverse = range(4)
        x, *mask = stack[: self.n_in]
        ahead = call(forward, (x,))
        back = call(backward, call(reverse, (x, *mask)))
        return call(join, ahead + call(reverse, (*back, *mask))) + stack[self.n_in :]
