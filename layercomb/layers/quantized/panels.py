"""Panels: rows of integers stored sixteen at a time, as `layercomb_kernels` multiplies them.

A word of 32 bits has four columns of int8, or eight of int4. In a panel the words of 16 rows are
interleaved: all first words, then all second ones. So one load brings a word of every row. Scales
are interleaved alike. Rows that make no panel stand behind the panels as they are. The shape stays
(*o, words), and the dtype, uint32, tells panels from rows.

Byte k of a word of int8 is column k plus 128. Byte k of a word of int4 has column k plus 8 in its
low half, and column k + 4 plus 8 in its high half.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYOUT = 1  # counts changes of panels, and of what files and rounding put into them, for caches
HEIGHT = 16  # rows of a panel
_WORD = 32  # bits


def fit(columns: int, group: int, bits: int) -> bool:
    """Whether rows of so many columns can be panels: rows and groups are whole words.

    Args:
      columns: of a row.
      group: how many of them share a scale.
      bits: of a weight; only 8 and 4 have panels.
    """
    return bits in (4, 8) and columns * bits % _WORD == 0 and group * bits % _WORD == 0


def of_rows(values: Any, scales: Any, n_o: int) -> tuple[Any, Any]:
    """Rows of integers as panels: the inverse of `as_rows`.

    Args:
      values: (…, *o, i) int8, or (…, *o, i / 2) uint8 of two int4 each, as of `Narrow`. NumPy
        arrays stay such.
      scales: (…, *o, G) float32.
      n_o: how many ``o`` axes there are.

    Returns:
      Words (…, *o, i · bits / 32) uint32, and the scales interleaved alike.
    """
    if values.dtype == np.int8:
        data = _bytes(values) ^ np.uint8(128)
    else:
        parts = _library(values).concatenate([values & 15, values >> 4], -1) ^ np.uint8(8)
        parts = parts.reshape(*parts.shape[:-1], -1, 2, 4)  # (…, i) → (…, words, halves, bytes)
        data = parts[..., 0, :] | (parts[..., 1, :] << 4)
        data = data.reshape(*values.shape)
    return _interleaved(_joined(data), n_o), _interleaved(scales, n_o)


def as_rows(words: Any, scales: Any, n_o: int, bits: int) -> tuple[Any, Any]:
    """Panels as rows: the inverse of `of_rows`.

    Args:
      words, scales, n_o: as of `of_rows`.
      bits: 8 or 4.

    Returns:
      Values and scales, as `of_rows` takes them.
    """
    data = _split(_apart(words, n_o))  # (…, words, 4)
    return _integers(data, bits), _apart(scales, n_o)


def rows_at(words: jax.Array, scales: jax.Array, at: jax.Array, bits: int) -> Any:
    """Some rows of a table in panels: values and scales as of `Narrow`, (…, i) and (…, G).

    Args:
      words: (F, C) uint32.
      scales: (F, G) float32.
      at: (…) integers within bounds.
      bits: 8 or 4.
    """
    whole = len(words) // HEIGHT * HEIGHT

    def some(x: jax.Array) -> jax.Array:
        width = x.shape[1]
        first = jnp.where(at < whole, at // HEIGHT * HEIGHT * width + at % HEIGHT, at * width)
        step = jnp.where(at < whole, HEIGHT, 1)
        return x.reshape(-1)[first[..., None] + step[..., None] * jnp.arange(width)]

    return _integers(_split(some(words)), bits), some(scales)


def _interleaved(x: Any, n_o: int) -> Any:
    return _turned(x, n_o, lambda panels: panels.swapaxes(-1, -2))


def _apart(x: Any, n_o: int) -> Any:
    def turn(panels: Any) -> Any:
        *lead, height, width = panels.shape
        return panels.reshape(*lead, width, height).swapaxes(-1, -2)

    return _turned(x, n_o, turn)


def _turned(x: Any, n_o: int, turn: Any) -> Any:
    """x with each panel, (16, width), turned, and the rows behind the panels as they are."""
    lead, o, width = x.shape[: -1 - n_o], x.shape[-1 - n_o : -1], x.shape[-1]
    n = math.prod(o)
    whole = n // HEIGHT * HEIGHT
    flat = x.reshape(*lead, n, width)  # (…, *o, width) → (…, F, width)
    panels = turn(flat[..., :whole, :].reshape(*lead, whole // HEIGHT, HEIGHT, width))
    panels = panels.reshape(*lead, whole, width)
    return _library(x).concatenate([panels, flat[..., whole:, :]], -2).reshape(x.shape)


def _integers(data: Any, bits: int) -> Any:
    """Bytes of words, (…, words, 4), as values of rows."""
    lead = data.shape[:-2]
    if bits == 8:
        return _signed(data ^ np.uint8(128)).reshape(*lead, -1)
    parts = _library(data).stack([data & 15, data >> 4], -2)  # (…, words, halves, bytes)
    q = parts.reshape(*lead, -1) ^ np.uint8(8)  # (…, i), in the low halves
    n = q.shape[-1] // 2
    return q[..., :n] | (q[..., n:] << 4)


def _library(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _bytes(x: Any) -> Any:
    return x.view(np.uint8) if isinstance(x, np.ndarray) else lax.bitcast_convert_type(x, jnp.uint8)


def _signed(x: Any) -> Any:
    return x.view(np.int8) if isinstance(x, np.ndarray) else lax.bitcast_convert_type(x, jnp.int8)


def _joined(data: Any) -> Any:
    """Four bytes a word: (…, 4n) uint8 → (…, n) uint32."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).view('<u4')
    return lax.bitcast_convert_type(data.reshape(*data.shape[:-1], -1, 4), jnp.uint32)


def _split(words: Any) -> Any:
    """The bytes of words: (…, n) uint32 → (…, n, 4) uint8."""
    if isinstance(words, np.ndarray):
        words = np.ascontiguousarray(words)
        return words.view(np.uint8).reshape(*words.shape, 4)
    return lax.bitcast_convert_type(words, jnp.uint8)
