"""The kinds of attention that recall.py and attention_quality.py compare, each causal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from layercomb import tl
from layercomb.layers.attention.lsh.hashing import automatic_buckets


class Kind(NamedTuple):
    """A kind of attention.

    Attributes:
      make: heads, the longest sequence → the layer.
      keys: how many keys a query sees at most; None for all.
    """

    make: Callable[[int, int], tl.Layer]
    keys: int | None


def _own(n_heads: int, core: tl.Layer, kernel: int = 3) -> tl.Layer:
    """Queries and keys of their own, of one length; keys convolved; another core."""
    return tl.HashedSelfAttention(n_heads, core=core, key_kernel=kernel)


def _full(n_heads: int, length: int) -> tl.Layer:
    return tl.SelfAttention(n_heads)


def _full_own(n_heads: int, length: int) -> tl.Layer:
    return _own(n_heads, tl.DotProductAttention(scale=1.0))


def _local(window: int) -> Kind:
    core = tl.DotProductAttention(scale=1.0, window=window)
    return Kind(lambda n_heads, length: _own(n_heads, core), window)


def _shared(n_hashes: int, chunk_len: int) -> Kind:
    def make(n_heads: int, length: int) -> tl.Layer:
        return tl.LSHSelfAttention(
            n_heads, n_hashes=n_hashes, chunk_len=chunk_len, max_len=length
        )  # fmt: skip

    return Kind(make, n_hashes * chunk_len)


def hashed(n_hashes: int, chunk_len: int, local_len: int, kernel: int = 3, **more) -> Kind:
    """Hashing with keys of their own, beside those near by."""

    def make(n_heads: int, length: int) -> tl.Layer:
        # As many buckets as chunks, so that the last positions see all of theirs.
        n_buckets = automatic_buckets(length, 2 * chunk_len)
        return tl.HashedSelfAttention(
            n_heads, n_hashes=n_hashes, chunk_len=chunk_len, local_len=local_len,
            n_buckets=n_buckets, key_kernel=kernel, **more,
        )  # fmt: skip

    return Kind(make, n_hashes * chunk_len + local_len)


def blocks(n_chosen: int, block_len: int, local_len: int, kernel: int = 3, **more) -> Kind:
    """Blocks by choice, beside keys near by."""

    def make(n_heads: int, length: int) -> tl.Layer:
        return tl.BlockSelfAttention(
            n_heads, n_chosen=n_chosen, block_len=block_len, local_len=local_len,
            key_kernel=kernel, **more,
        )  # fmt: skip

    own = 0 if local_len >= block_len else block_len
    return Kind(make, n_chosen * block_len + local_len + own)


def mixed(n_hashes: int, n_chosen: int, chunk_len: int, local_len: int) -> Kind:
    """Hashing and blocks of as many keys, beside those near by."""

    def make(n_heads: int, length: int) -> tl.Layer:
        return tl.MixedSelfAttention(
            n_heads, n_hashes=n_hashes, n_chosen=n_chosen, chunk_len=chunk_len,
            local_len=local_len, n_buckets=automatic_buckets(length, 2 * chunk_len),
        )  # fmt: skip

    return Kind(make, (n_hashes + n_chosen) * chunk_len + local_len)


KINDS: dict[str, Kind] = {
    'full': Kind(_full, None),
    'full, normalized, convolved': Kind(_full_own, None),
    'local 96': _local(96),
    'shared LSH 4 x 64': _shared(4, 64),
    'hashed 4 x 16': hashed(4, 16, 0),
    'hashed 4 x 16 + local 32, counted': hashed(4, 16, 32, duplicates='count'),
    'hashed 4 x 16 + local 32, plain keys': hashed(4, 16, 32, kernel=1),
    'hashed 4 x 16 + local 32': hashed(4, 16, 32),
    'hashed 8 x 8 + local 32': hashed(8, 8, 32),
    'hashed 4 x 64 + local 64': hashed(4, 64, 64),
    'hashed 8 x 4 + local 64': hashed(8, 4, 64),
    'blocks 4 x 16 + local 32': blocks(4, 16, 32),
    'blocks 8 x 8 + local 32': blocks(8, 8, 32),
    'blocks 4 x 16 + local 32, plain keys': blocks(4, 16, 32, kernel=1),
    'mixed 5 + 3 x 8 + local 32': mixed(5, 3, 8, 32),
    'mixed 2 + 2 x 16 + local 32': mixed(2, 2, 16, 32),
}
