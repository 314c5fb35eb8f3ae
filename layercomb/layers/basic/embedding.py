"""`Embedding`: looks up rows of a table."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Size
from layercomb.layers.basic.initializers import Initializer, Normal
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import Narrow
from layercomb.shapes import Signature
from layercomb.trees import Tree


class Embedding(Layer):
    """Looks up rows of a table: integers (…) → vectors (…, d_model), y = scale · table[ids].

    Weights: ``table`` (vocab_size, d_model). An id outside the vocabulary raises if its value is
    known, and gives NaN inside `jit`.

    Attributes:
      vocab_size: ids run from 0 to vocab_size − 1.
      d_model: the width of a row.
      table_init: of the table.
      scale: what the vectors are multiplied by, such as √d_model; None for 1.

    Raises:
      TypeError: for inputs that are no integers.
      ValueError: for a narrow table of another width; and when applied, outside `jit`, to an id
        outside the vocabulary.
    """

    vocab_size: Size
    d_model: Size
    table_init: Initializer = Normal(1.0)
    scale: float | None = None

    position_wise = True
    float32 = True
    weight_axes = {'table': 'V:D'}

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The table, float32 (vocab_size, d_model), for integer inputs; no state."""
        (ids,) = signature
        self._check_integers(ids)
        return {'table': self.table_init(rng, (self.vocab_size, self.d_model))}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Integers (…) → (…, d_model), in the table's dtype."""
        (ids,) = inputs
        self._check_integers(ids)
        self.check_ids(ids)
        ids = jnp.where(ids < 0, self.vocab_size, ids)  # or −1 would take the last row
        table = weights['table']
        if isinstance(table, Narrow):
            if table.shape[1] != self.d_model:  # as where bits are read that are others
                raise ValueError(
                    f'Embedding({self.vocab_size}, {self.d_model}) has narrow rows of '
                    f'{table.shape[1]}: these weights are of another model'
                )
            rows = table.take(ids)
        else:
            rows = jnp.take(table, ids, axis=0, mode='fill', fill_value=jnp.nan)
        return (rows if self.scale is None else rows * self.scale,), state

    def _check_integers(self, ids: Any) -> None:
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(
                f'Embedding takes integers, got {ids.dtype}{list(ids.shape)}: give token ids as '
                'int32'
            )

    def check_ids(self, ids: jax.Array) -> None:
        """Raises a ValueError if an id lies outside the vocabulary; traced ids pass unchecked."""
        check_ids(ids, self.vocab_size)


def check_ids(ids: jax.Array, vocab_size: int) -> None:
    """Raises a ValueError if an id lies outside 0 … vocab_size − 1; traced ids pass unchecked."""
    if isinstance(ids, jax.core.Tracer) or ids.size == 0:
        return
    known = np.asarray(ids)  # not jnp: inside jit even constants would be traced
    low, high = int(known.min()), int(known.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f'token id {high if high >= vocab_size else low} is outside the vocabulary of '
            f'{vocab_size}: ids run from 0 to {vocab_size - 1}; check the tokenizer, or raise '
            'vocab_size'
        )
