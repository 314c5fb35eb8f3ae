"""`segmented`: a model of packed rows, whose documents do not see each other.

Shape letters: B batch, L length.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.state.counted import put_counted, tell
from layercomb.layers.state.parts import take_out
from layercomb.layers.state.segments import Segments
from layercomb.shapes import Signature, describe
from layercomb.trees import Tree


class Segmented(Wrapper):
    """A model of packed rows: one more input, segments (B, L), says which document is where.

    Each document gives what it gives alone: attention of all kinds sees positions of its own
    document, recurrent layers forget the one before, and positions restart at 0 in each. It trains
    and evaluates, and does not decode.

    With `LSHAttention` and ``neighbourhood='bucket'``, a document meets what it meets alone if the
    number of buckets does not depend on the length (`n_buckets` or `max_len` given). With
    ``'chunk'`` and ``'circle'`` it sees itself alone too, but the chunks of its sorted positions
    begin elsewhere.

    Attributes:
      layer: the model.
      at: which input the segments are; None for the last.

    Raises:
      TypeError: if a layer inside mixes positions and does not see segments, or reads another
        sequence.
      ValueError: when applied, if segments are no integers (B, L) as of the first input; in
        ``PREDICT``.

    >>> from layercomb import tl
    >>> Segmented(tl.Serial(tl.Embedding(16, 8), tl.SelfAttention(2))).n_in
    2
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    at: int | None = None

    n_in = property(lambda self: self.layer.n_in + 1)
    place = property(lambda self: self.layer.n_in if self.at is None else self.at)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.layer)

    def inner_signature(self, signature: Signature) -> Signature:
        """The signature of the model's own inputs."""
        return self._own(signature)

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The model's weights and state."""
        return self.init_with_outputs(signature, rng, mode)[1:]

    def init_with_outputs(self, signature: Signature, rng: jax.Array, mode: Mode) -> Any:
        """As of the model."""
        self._check_segments(signature, mode)
        return self.layer.init_with_outputs(self.inner_signature(signature), rng, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The model's outputs and state, each document by itself.

        Args:
          weights, state, rng, mode: as of the model.
          inputs: the model's, with segments (B, L) int32 at `place`. Segments do not decrease along
            a row. Padding has a number of its own.
        """
        self._check_segments(inputs, mode)
        segments = Segments(inputs[self.place].astype(jnp.int32))
        state = put_counted(state, tell(self.layer, lambda layer: layer.sees_segments, segments))
        outputs, new = self.layer.apply(weights, state, self._own(inputs), rng=rng, mode=mode)
        return outputs, take_out(new, Segments)[0]

    def _own(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The model's own of the inputs, or of their signatures."""
        return values[: self.place] + values[self.place + 1 :]

    def _check_segments(self, inputs: tuple[Any, ...], mode: Mode) -> None:
        if mode is Mode.PREDICT:
            raise ValueError(
                'Segmented: packed documents are for training and evaluation: decode with the '
                'model inside, one row for each document'
            )
        segments, first = inputs[self.place], self._own(inputs)[0]
        fits = segments.shape == first.shape[:2] and len(segments.shape) == 2
        if not (fits and jnp.issubdtype(segments.dtype, jnp.integer)):
            raise ValueError(
                f'Segmented: segments must be int32{list(first.shape[:2])}, the document of each '
                f'position, got {describe([segments])}'
            )


def segmented(net: Layer) -> Segmented:
    """The same model for packed rows: it also takes segments (B, L) int32, as its last input.

    Positions with different numbers do not see each other. Numbers do not decrease along a row.
    Padding has a number of its own, such as the last one + 1. Weights, state and paths are those of
    `net`. See `Segmented`.

    Args:
      net: a model of one sequence a row.

    Raises:
      TypeError: if a layer inside mixes positions and does not see segments (convolutions,
        pooling), or reads another sequence (encoder-decoders).

    >>> from layercomb import models, transforms
    >>> transforms.segmented(models.TransformerLM(16, 8, 16, 1, 2, 32)).n_in
    2
    """
    return Segmented(net)


def _check(net: Layer) -> None:
    """Raises a TypeError if a layer would let documents of a row see each other."""
    name = type(net).__name__
    if net.reads_memory:
        raise TypeError(
            f'segmented: {name} reads another sequence, of whose documents segments say nothing: '
            'pack models of one sequence alone'
        )
    if net.position_wise is True or net.sees_segments:
        return
    said = inspect.getattr_static(type(net), 'position_wise', None)
    if not (net.sublayers and isinstance(said, property)):
        why = (
            'mixes positions and does not know segments, so documents of a row would see each other'
            if net.position_wise is False
            else 'does not say whether it works on each position by itself'
        )
        who = ' '.join(repr(net).split()) if net.position_wise is None else name
        raise TypeError(
            f'segmented: {who} {why}: train without packing, or, if the layer is yours, '
            'say position_wise = True, or sees_segments = True and read tl.segments_of(state)'
        )
    for layer in net.sublayers:
        _check(layer)
    if not net.carries_counted:
        raise TypeError(
            f'segmented: {name} holds layers and does not tell them of segments: set '
            'carries_counted = True on a class that passes its state on unchanged, or by '
            'tl.take_counted and tl.put_counted'
        )
