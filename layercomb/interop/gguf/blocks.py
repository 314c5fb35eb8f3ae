"""`Blocks`: how GGUF stores numbers, and what becomes of them here.

A row is cut into blocks of 32 or 256 numbers that share scales. `Blocks.numbers` gives all types as
float32, exactly as ``gguf.quants.dequantize``. The types of 8 bits or fewer become our own narrow
weights, without a change of any number: `integers`. Q8_0 and Q4_0, symmetric in groups of 32, go
out again as they came: `packed`.
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
      bits: of the narrow weights that hold it as it is, 8 or 4; None for floats.
      group: how many numbers share a scale.
      minima: whether they share a minimum, too.
      half: whether these are float16.
    """

    name: str
    kind: int
    size: int
    n_bytes: int
    bits: int | None = None
    group: int = 32
    minima: bool = False
    half: bool = False

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
    """Rows as integers, their scales and, if the type has any, minima; the same numbers.

    Args:
      blocks: the type, one with `bits`.
      data: (M, bytes) uint8.

    Returns:
      q (M, N) int8, and scales (M, G) float32, or (M, 2G) with minima behind them. A number is
      scale · q, or scale · (q + 2^(bits − 1)) + minimum.
    """
    parts = data.reshape(len(data), -1, blocks.n_bytes)  # (M, blocks, bytes of a block)
    q, scales, minima = _READ[blocks.name](parts)
    q, scales = q.reshape(len(data), -1), scales.reshape(len(data), -1)
    if not blocks.minima:
        return q, scales
    half = np.uint8(1 << (blocks.bits or 0) - 1)
    return (q - half).view(np.int8), np.concatenate([scales, minima.reshape(len(data), -1)], -1)


Read = tuple[np.ndarray, np.ndarray, np.ndarray]  # integers, scales and minima of blocks


def _floats(parts: np.ndarray, first: int) -> np.ndarray:
    """The float16 at a byte of each block: (M, B, bytes) → (M, B, 1) float32."""
    halves = np.ascontiguousarray(parts[..., first : first + 2]).view('<f2')
    return halves.astype(np.float32)


def _nibbles(data: np.ndarray, size: int) -> np.ndarray:
    """Low halves of `size` bytes, then their high ones: (M, B, n) uint8 → (M, B, 2n)."""
    data = data.reshape(*data.shape[:2], -1, 1, size)
    return np.concatenate([data & 15, data >> 4], -2).reshape(*data.shape[:2], -1)


def _q8_0(parts: np.ndarray) -> Read:
    q = np.ascontiguousarray(parts[..., 2:]).view(np.int8)
    return q, _floats(parts, 0), q[..., :0]


def _q4_0(parts: np.ndarray) -> Read:
    q = (_nibbles(parts[..., 2:], 16) - np.uint8(8)).view(np.int8)
    return q, _floats(parts, 0), q[..., :0]


def _q4_1(parts: np.ndarray) -> Read:
    return _nibbles(parts[..., 4:], 16), _floats(parts, 0), _floats(parts, 2)


def _shared(parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the eight groups of a block of Q4_K or Q5_K, in 6 bits each."""
    its = parts[..., 4:16]
    first, second, third = its[..., :4], its[..., 4:8], its[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], -1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], -1)
    return _floats(parts, 0) * scales, -(_floats(parts, 2) * minima)


def _q4_k(parts: np.ndarray) -> Read:
    return _nibbles(parts[..., 16:], 32), *_shared(parts)


def _q5_k(parts: np.ndarray) -> Read:
    low = _nibbles(parts[..., 48:], 32).reshape(*parts.shape[:2], 8, 32)
    high = parts[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # a bit a group
    return low | high << 4, *_shared(parts)


def _q6_k(parts: np.ndarray) -> Read:
    low = _nibbles(parts[..., :128], 64).reshape(*parts.shape[:2], 8, 32)
    twos = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = parts[..., 128:192].reshape(*parts.shape[:2], 2, 1, 32) >> twos & 3
    q = (low | high.reshape(low.shape) << 4) - np.uint8(32)
    scales = np.ascontiguousarray(parts[..., 192:208]).view(np.int8).astype(np.float32)
    return q.view(np.int8), _floats(parts, 208) * scales, q[..., :0]


_READ = {
    'Q8_0': _q8_0,
    'Q4_0': _q4_0,
    'Q4_1': _q4_1,
    'Q4_K': _q4_k,
    'Q5_K': _q5_k,
    'Q6_K': _q6_k,
}


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
            "32: quantize the model with group_size=32, or save it with dtype='float16'"
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


def with_minima(values: np.ndarray, scales: np.ndarray) -> tuple[Blocks, np.ndarray]:
    """Narrow weights with minima as rows of Q4_1.

    Args:
      values: (M, N / 2) uint8 of two int4 each; int8 is refused.
      scales: (M, 2G) float32, minima behind the scales.

    Returns:
      The type, and (M, bytes) uint8.

    Raises:
      UsageError: if they are no blocks of 32 int4 with a float16 scale and minimum.
    """
    first, least = np.split(scales, 2, axis=-1)
    bits = 4 if values.dtype == np.uint8 else 8
    length = values.shape[-1] * 8 // bits
    group = length // first.shape[-1]
    if bits == 4 and GROUP % group == 0 and length % GROUP == 0:
        parts = [part.reshape(len(values), -1, GROUP // group) for part in (first, least)]
        with np.errstate(over='ignore'):
            halves = [part[..., :1].astype('<f2') for part in parts]
        if all((half == part).all() for half, part in zip(halves, parts, strict=True)):
            q = unpack4(values).reshape(len(values), -1, GROUP) ^ 8
            q = q[..., : GROUP // 2] | (q[..., GROUP // 2 :] << 4)
            data = np.concatenate([*(half.view(np.uint8) for half in halves), q], -1)
            return _NAMED['Q4_1'], data.reshape(len(values), -1)
    raise UsageError(
        f'GGUF cannot hold {bits} bits with a minimum for each {group} weights, as this model has '
        "them from a file of another type: save it with dtype='q8_0', or 'float16'"
    )


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
        Blocks('Q8_0', 8, 32, 34, bits=8, half=True),
        Blocks('Q4_0', 2, 32, 18, bits=4, half=True),
        Blocks('Q4_1', 3, 32, 20, bits=4, minima=True, half=True),
        Blocks('Q4_K', 12, 256, 144, bits=4, minima=True),
        Blocks('Q5_K', 13, 256, 176, bits=8, minima=True),
        Blocks('Q6_K', 14, 256, 210, bits=8, group=16),
    )
}
BLOCKS = {blocks.kind: blocks for blocks in _NAMED.values()}
