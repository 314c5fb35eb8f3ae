"""`Blocks`: how GGUF stores numbers, and what becomes of them here.

A row is cut into blocks of 32 or 256 numbers that share scales. `Blocks.numbers` gives all types as
float32, exactly as ``gguf.quants.dequantize``. The two types that our own narrow weights can hold,
Q8_0 and Q4_0, symmetric in groups of 32, go in and out without a change of any bit: `integers` and
`packed`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from layercomb.errors import UsageError, require

GROUP = 32  # numbers in a block of Q8_0 and Q4_0
_PIECE = 1 << 20  # numbers that are dequantized at a time: they stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A type of tensors.

    Attributes:
      name: as GGUF calls it.
      kind: its number in the file.
      size: how many numbers are in a block.
      n_bytes: how many bytes a block takes.
      bits: of the narrow weights that hold it as it is, 8 or 4; None for other types.
    """

    name: str
    kind: int
    size: int
    n_bytes: int
    bits: int | None = None

    def row_bytes(self, length: int) -> int:
        """How many bytes a row takes.

        Args:
          length: numbers in the row, a multiple of `size`.
        """
        return length // self.size * self.n_bytes

    def numbers(self, data: np.ndarray) -> np.ndarray:
        """The numbers of rows: (M, bytes) uint8 → (M, N) float32."""
        if self.name == 'F32':
            return data.view('<f4').astype(np.float32, copy=False)
        if self.name == 'F16':
            return data.view('<f2').astype(np.float32)
        if self.name == 'BF16':
            return data.view(ml_dtypes.bfloat16).astype(np.float32)
        gguf = require('gguf', 'pretrained')
        dequantize = require('gguf.quants', 'pretrained').dequantize
        with np.errstate(all='ignore'):  # a damaged scale may be anything
            made: np.ndarray = dequantize(data, gguf.GGMLQuantizationType(self.kind))
        return made

    def pieces(self, data: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """The numbers of many rows, some rows at a time.

        Args:
          data: (M, bytes) uint8.

        Yields:
          Which rows, and their numbers (m, N) float32.
        """
        per_row = data.shape[1] // self.n_bytes * self.size
        step = max(1, _PIECE // max(1, per_row))
        for first in range(0, len(data), step):
            rows = slice(first, first + step)
            yield rows, self.numbers(data[rows])


def integers(blocks: Blocks, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of Q8_0 or Q4_0 as narrow weights (see `layers.quantized.matrix`), the same numbers.

    Args:
      blocks: the type.
      data: (M, bytes) uint8.

    Returns:
      Values (M, N) int8, or (M, N / 2) uint8 of two int4 each, and scales (M, G) float32.
    """
    parts = data.reshape(len(data), -1, blocks.n_bytes)  # (M, G, bytes of a block)
    scales = np.ascontiguousarray(parts[..., :2]).view('<f2')[..., 0].astype(np.float32)
    if blocks.bits == 8:
        return np.ascontiguousarray(parts[..., 2:]).view(np.int8).reshape(len(data), -1), scales
    halves = parts[..., 2:]
    q = np.concatenate([halves & 15, halves >> 4], -1)  # (M, G, 32): 0 … 15, which mean −8 … 7
    return pack4(q.reshape(len(data), -1) ^ 8), np.repeat(scales, _repeats(q.shape[1]), -1)


def group_size(blocks: Blocks, length: int) -> int:
    """How many weights share a scale in the narrow weights that `integers` makes.

    A group of int4 lies within one half of its row, so where half a row is no multiple of 32 each
    scale is there twice.

    Args:
      blocks: the type.
      length: of a row.
    """
    return GROUP // _repeats(length // GROUP) if blocks.bits == 4 else GROUP


def _repeats(n_groups: int) -> int:
    return 1 if n_groups % 2 == 0 else 2


def pack4(q: np.ndarray) -> np.ndarray:
    """int4 in the low halves of bytes, (M, N) uint8 → two in each byte, (M, N / 2).

    In our rows the second half of a row is in the high halves.
    """
    n = q.shape[-1] // 2
    return (q[..., :n] & 15) | (q[..., n:] << 4)


def unpack4(words: np.ndarray) -> np.ndarray:
    """The inverse of `pack4`: (M, N / 2) → (M, N), the int4 in the low halves."""
    return np.concatenate([words & 15, words >> 4], -1)


def packed(values: np.ndarray, scales: np.ndarray) -> tuple[Blocks, np.ndarray]:
    """Narrow weights as rows of Q8_0 or Q4_0: the inverse of `integers`.

    Args:
      values: (M, N) int8, or (M, N / 2) uint8 of two int4 each.
      scales: (M, G) float32; they are rounded to float16.

    Returns:
      The type, and (M, bytes) uint8.

    Raises:
      UsageError: if the blocks of 32 that GGUF knows do not have a scale each.
    """
    narrow = values.dtype == np.uint8
    q = unpack4(values) ^ 8 if narrow else values.view(np.uint8)
    rows, length = q.shape
    group = length // scales.shape[-1]
    if length % GROUP == 0 and GROUP % group == 0 and group < GROUP:
        parts = scales.reshape(rows, -1, GROUP // group)
        same = bool((parts == parts[..., :1]).all())
        scales, group = (parts[..., 0], GROUP) if same else (scales, group)
    if length % GROUP or group % GROUP:
        raise UsageError(
            f'a matrix with rows of {length} has groups of {group} weights, and GGUF has blocks of '
            '32: quantize the model with group_size=32'
        )
    with np.errstate(over='ignore'):
        halved = np.repeat(scales, group // GROUP, -1).astype('<f2')
    if not np.isfinite(halved).all():
        raise UsageError(
            'a scale is too large for the float16 of GGUF: save the model that was quantized, in '
            'float32'
        )
    blocks = q.reshape(rows, -1, GROUP)
    if narrow:
        blocks = blocks[..., : GROUP // 2] | (blocks[..., GROUP // 2 :] << 4)
    found = _NAMED['Q4_0' if narrow else 'Q8_0']
    data = np.concatenate([halved[..., None].view(np.uint8), blocks], -1)
    return found, data.reshape(rows, -1)


def plain(values: np.ndarray) -> tuple[Blocks, np.ndarray]:
    """Rows of float32, float16 or bfloat16 as they are stored: (M, N) → the type, (M, bytes)."""
    name = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}[values.dtype.name]
    return _NAMED[name], np.ascontiguousarray(values).view(np.uint8)


def rounded(values: np.ndarray, dtype: str) -> tuple[Blocks, np.ndarray]:
    """Numbers as rows of fewer bits, as llama.cpp rounds them.

    Args:
      values: (M, N) float32.
      dtype: 'float16', 'bfloat16', 'q8_0' or 'q4_0'. Of the last two, rows that blocks of 32 do
        not divide become float16.

    Returns:
      The type, and (M, bytes) uint8.

    Raises:
      UsageError: if a value is too large for float16.
    """
    whole = values.shape[-1] % GROUP == 0
    with np.errstate(over='ignore'):
        if dtype in ('q8_0', 'q4_0') and whole:
            gguf = require('gguf', 'pretrained')
            found = _NAMED[dtype.upper()]
            quantize = require('gguf.quants', 'pretrained').quantize
            return found, quantize(values, gguf.GGMLQuantizationType(found.kind))
        narrow = values.astype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else np.float16)
    if not np.isfinite(narrow.astype(np.float32)).all():
        raise UsageError(f'a weight is too large for {dtype}: save the model in bfloat16')
    return plain(narrow)


def name_of_type(kind: int) -> str:
    """The name of a type by its number, known here or not."""
    gguf = require('gguf', 'pretrained')
    try:
        return str(gguf.GGMLQuantizationType(kind).name)
    except ValueError:
        return f'number {kind}'


_NAMED = {
    blocks.name: blocks
    for blocks in (
        Blocks('F32', 0, 1, 4),
        Blocks('F16', 1, 1, 2),
        Blocks('BF16', 30, 1, 2),
        Blocks('Q8_0', 8, 32, 34, bits=8),
        Blocks('Q4_0', 2, 32, 18, bits=4),
        Blocks('Q4_1', 3, 32, 20),
        Blocks('Q4_K', 12, 256, 144),
        Blocks('Q5_K', 13, 256, 176),
        Blocks('Q6_K', 14, 256, 210),
    )
}
BLOCKS = {blocks.kind: blocks for blocks in _NAMED.values()}
