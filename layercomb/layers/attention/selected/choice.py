"""`chosen_blocks`: which blocks of keys each query likes best, by their mean key.

Shape letters: B batch, H heads of queries, G heads of keys, R = H/G, L length, K depth, C block, N
whole blocks that there can be in a row, J chosen blocks, P queries that are compared at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import layercomb_kernels
from layercomb.layers.attention import tiles
from layercomb.layers.attention.selected.arrays import check_arrays
from layercomb.layers.attention.selected.backends import native
from layercomb.layers.state import segments as documents

_SCORES_AT_A_TIME = 2**22


class Blocks(NamedTuple):
    """The whole blocks of a row: C real positions of one document, counted from its first one.

    Attributes:
      means: (B, G, N, K) float32, of their keys.
      document: (B, N) int32, the document of each.
      number: (B, N) int32, its number in the document; −1 where there is no block.
    """

    means: Any
    document: Any
    number: Any


def chosen_blocks(
    q: jax.Array,
    k: jax.Array,
    *,
    block_len: int,
    n_chosen: int,
    causal: bool = True,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """The blocks that each query likes best, its own left out.

    Positions are cut into blocks of C, counted in their document without padding (see
    `block_numbers`). A query t takes the J whole ones b with the greatest q_t · mean(k in b): if
    causal of those that end before its own begins, else of all others. No gradient goes through the
    choice.

    Time is L²·K / C. Scores are compared some queries at a time, so that memory is linear in L. The
    best come first, and of equal ones the first block. What is NaN or −∞ is not chosen. On a CPU
    native kernels choose for float32. They choose what XLA does, in the same order, but where two
    products are as near as rounding.

    Args:
      q: (B, H, L, K).
      k: (B, G, L, K); head h of the queries reads head ⌊h·G/H⌋.
      block_len: C.
      n_chosen: J.
      causal: whether position t sees positions up to t only.
      mask: (B, L) bool, True = a real position; or None.
      segments: (B, L) int32, the document of each position, neighbours of one number; or None.

    Returns:
      (B, H, J, L) int32: numbers of blocks in their document, 0 … ⌈L/C⌉ − 1, and ⌈L/C⌉ for one that
      is missing.

    Raises:
      ValueError: if shapes, dtypes or sizes do not fit together.

    References:
      MoBA, Lu et al. 2025, https://arxiv.org/abs/2502.13189

    >>> x = jax.random.normal(jax.random.key(0), (1, 2, 64, 8))
    >>> blocks = chosen_blocks(x, x, block_len=16, n_chosen=2)
    >>> blocks.shape, blocks[0, 0, :, 20].tolist()
    ((1, 2, 2, 64), [0, 4])
    """
    check_arrays(q, k, k, mask, segments)
    if block_len < 1 or n_chosen < 1:
        raise ValueError(f'block_len={block_len} and n_chosen={n_chosen} are at least 1')
    b, length = q.shape[0], q.shape[2]
    real = jnp.ones((b, length), bool) if mask is None else mask
    ids = jnp.zeros((b, length), jnp.int32) if segments is None else documents.runs(segments)
    own = block_numbers(b, length, block_len, mask, segments)
    blocks = _blocks(lax.stop_gradient(k), real, ids, own, block_len)
    nothing, j = -(-length // block_len), min(n_chosen, blocks.number.shape[1])
    choose = best_blocks if native.chooses(q, blocks.means) else _in_pieces
    found = choose(lax.stop_gradient(q), blocks, ids, own, j, causal, nothing)  # (B, H, J, L)
    missing = [(0, 0), (0, 0), (0, n_chosen - j), (0, 0)]
    return jnp.pad(found, missing, constant_values=nothing)


def _in_pieces(
    q: jax.Array, blocks: Blocks, ids: Any, own: Any, n: int, causal: bool, nothing: int
) -> jax.Array:
    """`best_blocks`, of some queries at a time."""
    b, h, length, _ = q.shape
    n_at_a_time = max(1, _SCORES_AT_A_TIME // max(1, b * h * blocks.number.shape[1]))
    pieces = -(-length // min(length, n_at_a_time))
    piece = -(-length // pieces)

    def cut(x: jax.Array, axis: int) -> jax.Array:  # → (pieces, …, P, …)
        x = jnp.pad(x, [(0, pieces * piece - length if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], pieces, piece, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def of_piece(x: Any) -> jax.Array:
        q, ids, own = x  # (B, H, P, K), (B, P), (B, P)
        return best_blocks(q, blocks, ids, own, n, causal, nothing)

    found = lax.map(of_piece, (cut(q, 2), cut(ids, 1), cut(own, 1)))
    return jnp.moveaxis(found, 0, 3).reshape(b, h, n, -1)[..., :length]


def block_numbers(b: int, length: int, block_len: int, mask: Any, segments: Any) -> jax.Array:
    """The number of each position's block in its document, padding not counted: (B, L) int32.

    Args:
      b, length: B and L.
      block_len: C.
      mask: (B, L) bool, True = a real position; or None.
      segments: (B, L) int32, the document of each position; or None.
    """
    real = jnp.ones((b, length), bool) if mask is None else mask
    ids = jnp.zeros((b, length), jnp.int32) if segments is None else segments
    return _places(real, ids) // block_len


def best_blocks(
    q: jax.Array, blocks: Blocks, ids: Any, own: Any, n: int, causal: bool, nothing: int
) -> jax.Array:
    """The numbers of the n blocks that queries like best, their own left out: (B, H, n, P) int32.

    The best come first, and of equal ones the first. A block whose product is NaN or −∞ is not
    chosen.

    Args:
      q: (B, H, P, K).
      blocks: of the row.
      ids: (B, P) int32, the document of each query.
      own: (B, P) int32, the number of its block there.
      n: how many to choose, at most N.
      causal: whether only those before its own can be chosen.
      nothing: the number of what is missing.
    """
    if native.chooses(q, blocks.means):
        q, means = lax.stop_gradient((q, blocks.means))
        document = jnp.where(blocks.number < 0, -1, blocks.document)
        return layercomb_kernels.best_blocks(q, means, document, ids, own, n, causal, nothing)
    b, h, p, depth = q.shape
    g, number = blocks.means.shape[1], blocks.number
    grouped = q.reshape(b, g, h // g, p, depth)
    s = tiles.dot('bgrpk,bgnk->bgrpn', grouped, blocks.means).reshape(b, h, p, -1)
    s = jnp.where(s == 0, 0.0, s)  # `top_k` would put −0 behind 0, and NaN first
    allowed = (number[:, None] >= 0) & (blocks.document[:, None] == ids[..., None])
    other = number[:, None] < own[..., None] if causal else number[:, None] != own[..., None]
    s = jnp.where((allowed & other)[:, None] & ~jnp.isnan(s), s, -jnp.inf)
    best, at = lax.top_k(s, n)  # (B, H, P, n)
    flat = jnp.take_along_axis(number, at.reshape(b, -1), axis=1).reshape(at.shape)
    return jnp.where(best > -jnp.inf, flat, nothing).swapaxes(2, 3)


def _places(real: jax.Array, ids: jax.Array) -> jax.Array:
    """How many real positions of its document come before each one, (B, L) int32."""
    before = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real.astype(jnp.int32)
    first = documents.places(ids) == 0
    return before - lax.cummax(jnp.where(first, before, 0), axis=1)


def _blocks(k: jax.Array, real: jax.Array, ids: jax.Array, own: jax.Array, size: int) -> Blocks:
    """The whole blocks of each row, from keys (B, G, L, K) and the number of each key's block."""
    length = k.shape[2]
    n = max(1, length // size)
    place = _places(real, ids)
    is_end = real & (place % size == size - 1)
    block = jnp.cumsum(is_end, axis=1, dtype=jnp.int32) - is_end.astype(jnp.int32)  # (B, L)
    at = jnp.where(is_end, block, n)

    def of_ends(x: jax.Array, at: jax.Array) -> jax.Array:
        return jnp.full(n, -1, jnp.int32).at[at].set(x, mode='drop')

    document, number = (jax.vmap(of_ends)(x, at) for x in (ids, own))
    # A key counts where the next end is that of its own block: else it is in an unfinished one.
    its = jnp.minimum(block, n - 1)
    same = (jnp.take_along_axis(x, its, 1) == y for x, y in ((document, ids), (number, own)))
    counted = jnp.where(real & (block < n) & next(same) & next(same), block, n)

    def sums(k: jax.Array, to: jax.Array) -> jax.Array:  # (L, K), (L,) → (N, K)
        return jax.ops.segment_sum(k.astype(jnp.float32), to, n + 1)[:n]

    totals = jax.vmap(jax.vmap(sums, (0, None)))(k, counted)
    return Blocks(totals / size, document, number)
