"""LSH self-attention: each position sees the nearest positions of its own bucket.

Queries serve as keys too, so that near positions share a bucket. The attention is computed in
`windows`, the hash in `hashing`. Shape letters: B batch, H heads, L length, D d_model or depth of
values, K head depth, R hash rounds, C chunk, T new positions.

References:
    Reformer (Kitaev et al. 2020), https://arxiv.org/abs/2001.04451
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from layercomb.layers.attention import tiles
from layercomb.layers.attention.functions import check_segments, check_shared_heads, check_softcap
from layercomb.layers.attention.lsh import windows as bucketwise
from layercomb.layers.attention.lsh.rounds import UNIT_EPSILON, Plan
from layercomb.shapes import check_mask


def lsh_attention(
    q: jax.Array,
    v: jax.Array,
    buckets: jax.Array,
    *,
    n_buckets: int,
    chunk_len: int,
    causal: bool = True,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    neighbourhood: Literal['bucket', 'chunk', 'circle'] = 'bucket',
    duplicates: Literal['count', 'once'] = 'count',
    epsilon: float = UNIT_EPSILON,
    alone: Literal['exact', 'rounded'] = 'exact',
    round_len: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
    chunks_together: int | None = None,
    heads_together: int | None = None,
) -> jax.Array:
    """Softmax attention of each position to its neighbours in its buckets.

    With k = q / √(‖q‖² + ε) and s[t, c] = scale · q[t]·k[c]; s[t, t] is −100, so that a position
    sees itself only if it sees nothing else::

        y[t] = Σ_r Σ_{c ∈ W_r(t)} exp(s[t, c] − z[t]) v[c]
        z[t] = log Σ_r Σ_{c ∈ W_r(t)} exp s[t, c]

    In round r positions are sorted by (bucket, position). W_r(t) holds the positions of t's bucket
    that are fewer than C places from t and, if causal, not after t. Later positions do not change
    W_r(t), so the function is exactly causal; other implementations are not. Time grows as R·L·C.

    Args:
      q: (B, H, L, K), floating: queries, which serve as keys too.
      v: (B, G, L, D); G divides H, and head h of q reads head ⌊h·G/H⌋ of v.
      buckets: (B, H, R, L), integers from 0 to n_buckets − 1, as of `lsh_buckets`. In a circle,
        n_buckets + 1 says that a row ends before this position.
      n_buckets: number of buckets.
      chunk_len: C; L need not be a multiple.
      causal: whether t sees only itself and positions before.
      mask: (B, L) bool, True = a real position. Other positions see nothing, are not seen, and give
        zeros; their values must be finite.
      segments: (B, L) int32, the document of each position, not decreasing along a row: t sees
        positions of its own document alone. With ``'bucket'`` and ``'chunk'`` they are those that
        it sees in the document alone, in the same buckets. A ``'circle'`` is that of the row.
      neighbourhood: ``'bucket'``, as above. ``'chunk'`` is for weights trained with other
        implementations: W_r(t) then holds all positions of any bucket in t's chunk of the sorted
        sequence and the chunk before it (and the one after, if not causal). This is not exactly
        causal: a later token moves the chunk boundaries, which changes what an earlier query sees.
        ``'circle'`` is ``'chunk'`` as Trax and transformers have it: the chunks of all rounds
        follow each other in a circle. The first chunk of a round sees the last one of the round
        before it, that of the first round the last one of the last; positions that a query meets
        twice there count twice.
      duplicates: ``'count'``: a pair that meets in N rounds counts N times. ``'once'``: it counts
        once (log N is subtracted from its score, at R more comparisons per pair).
      epsilon: ε.
      alone: ``'exact'``: a position that sees itself alone, such as the first, gets its value.
        ``'rounded'``, of a causal circle that counts duplicates, is for weights trained with Trax
        or transformers: it gets its value within 0.4 %, as their float32 rounds it there.
      round_len: a circle's rounds are filled with padding to a multiple of this length, itself a
        multiple of C; None for C. More than C makes chunks of nothing but padding, which the first
        chunk of a round then sees, as in transformers.
      scale: factor of the scores, 1 by default.
      softcap: as of `dot_product_attention`; it does not touch s[t, t].
      dropout_rate: share of the probabilities set to zero, in [0, 1); the others grow by
        1 / (1 − dropout_rate).
      rng: a typed key for dropout, needed if the rate is not zero.
      chunks_together: chunks of a head computed at a time, at most. None: as many as fit a CPU's
        caches, larger tiles elsewhere.
      heads_together: heads computed at a time: the largest divisor of B·H up to this. None: as many
        as fit a CPU's caches, all elsewhere.

    Returns:
      (B, H, L, D), in the dtype of v.

    Raises:
      ValueError: if shapes, dtypes or sizes do not fit together.

    >>> q = jnp.ones((1, 2, 50, 8))
    >>> from layercomb import tl
    >>> buckets = tl.lsh_buckets(q, jax.random.key(0), n_buckets=4, n_hashes=3)
    >>> lsh_attention(q, q, buckets, n_buckets=4, chunk_len=16).shape
    (1, 2, 50, 8)
    """
    _check(q, v, buckets, mask, chunk_len, n_buckets, neighbourhood, duplicates)
    check_segments(segments, q, v)
    check_circle(alone, round_len, neighbourhood, chunk_len, causal, duplicates)
    _check_numbers(softcap, epsilon, dropout_rate, rng, (chunks_together, heads_together))
    step = (round_len or chunk_len) // chunk_len
    length, arrays = q.shape[2], (q, v, buckets, mask, segments)
    if step > 1:
        q, v, buckets, mask, segments = _filled(*arrays, step * chunk_len, n_buckets)
    plan = Plan(
        length=q.shape[2],
        chunk_len=chunk_len,
        **_windows(q.shape[2], chunk_len, causal, neighbourhood, segments, chunks_together),
        heads_together=heads_together,
        scale=1.0 if scale is None else float(scale),
        causal=causal,
        dropout_rate=dropout_rate,
        softcap=softcap,
        group=q.shape[1] // max(v.shape[1], 1),
        n_buckets=n_buckets,
        by_bucket=neighbourhood == 'bucket',
        circle=neighbourhood == 'circle',
        once=duplicates == 'once' and (neighbourhood == 'circle' or buckets.shape[2] > 1),
        step=step,
        epsilon=float(epsilon),
        rounded=alone == 'rounded',
    )
    y = bucketwise.attend(plan, q, v, buckets, mask, rng if dropout_rate else None, segments)
    return y[:, :, :length]


def _windows(
    length: int, chunk_len: int, causal: bool, neighbourhood: str, segments: Any, most: int | None
) -> dict[str, Any]:
    """The fields of `Plan` that say which chunks a window holds, and how many chunks are a tile.

    Where chunks are those of documents, they begin anywhere: a window a chunk longer at either end
    holds all that a query sees.
    """
    reach = 1, 0 if causal else 1
    more = segments is not None and neighbourhood == 'chunk'
    look_back, look_ahead = (n + more for n in reach)  # a later place may be an earlier position
    n_chunks, n_pairs = -(-length // chunk_len), chunk_len**2 * (look_back + 1 + look_ahead)
    n = tiles.even_share(n_chunks, most or tiles.pairs_in_tile() // n_pairs)
    if not causal and neighbourhood == 'circle':
        # The last chunk looks into the next round: the last tile must end with it.
        n = next(g for g in range(n, 0, -1) if n_chunks % g == 0)
    return {'look_back': look_back, 'look_ahead': look_ahead, 'reach': reach, 'n_together': n}


def _filled(q: Any, v: Any, buckets: Any, mask: Any, segments: Any, to: int, n_buckets: int) -> Any:
    """The arrays of `lsh_attention`, with absent positions behind them, to a multiple of `to`."""
    width = [(0, 0), (0, 0), (0, 0), (0, -q.shape[2] % to)]
    buckets = jnp.pad(buckets.astype(jnp.int32), width, constant_values=n_buckets + 1)
    mask, segments = (x if x is None else jnp.pad(x, width[2:]) for x in (mask, segments))
    width = [*width[:2], width[3], width[2]]
    return jnp.pad(q, width), jnp.pad(v, width), buckets, mask, segments


def _check_numbers(
    softcap: float | None,
    epsilon: float,
    dropout_rate: float,
    rng: Any,
    together: tuple[int | None, int | None],
) -> None:
    """Raises ValueError if a number of `lsh_attention` is out of its bounds."""
    check_softcap(softcap)
    if not epsilon > 0:
        raise ValueError(f'epsilon must be positive, got {epsilon}')
    if not 0 <= dropout_rate < 1:
        raise ValueError(f'dropout_rate must be in [0, 1), got {dropout_rate}')
    for n in together:
        if n is not None and n < 1:
            raise ValueError(f'chunks_together and heads_together must be at least 1, got {n}')
    if dropout_rate and rng is None:
        raise ValueError(f'dropout_rate={dropout_rate} needs a random key: pass rng=')


def check_circle(
    alone: str,
    round_len: int | None,
    neighbourhood: str,
    chunk_len: int,
    causal: bool,
    duplicates: str,
) -> None:
    """Checks the options of `lsh_attention` that others must go with.

    Args:
      alone, round_len: the options of a circle.
      neighbourhood, chunk_len, causal, duplicates: what they must go with.

    Raises:
      ValueError: if they do not.
    """
    circle = neighbourhood == 'circle'
    fits = circle and causal and duplicates == 'count'
    if alone not in ('exact', 'rounded') or (alone == 'rounded' and not fits):
        raise ValueError(
            f"alone={alone!r}: it is 'exact', or 'rounded' for causal attention with "
            "neighbourhood='circle' and duplicates='count'"
        )
    if round_len is not None and (not circle or round_len < 1 or round_len % chunk_len):
        raise ValueError(
            f"round_len={round_len} is of neighbourhood='circle', and a multiple of "
            f'chunk_len={chunk_len}: leave it out otherwise'
        )


def _check(
    q: Any,
    v: Any,
    buckets: Any,
    mask: Any,
    chunk_len: int,
    n_buckets: int,
    neighbourhood: str,
    duplicates: str,
) -> None:
    """Raises ValueError if the arguments do not fit together."""
    shapes = f'q {q.shape}, v {v.shape}, buckets {buckets.shape}'
    if not q.ndim == v.ndim == buckets.ndim == 4 or q.shape[::2] != v.shape[::2]:
        raise ValueError(f'LSH attention takes q (B, H, L, K) and v (B, H, L, D), got {shapes}')
    check_shared_heads(q.shape[1], v.shape[1], 'values', shapes)
    if (*buckets.shape[:2], buckets.shape[3]) != q.shape[:3] or not buckets.shape[2]:
        raise ValueError(f'buckets must be (B, H, R, L), got {shapes}')
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (q, v)):
        raise ValueError(f'LSH attention takes floats, got q {q.dtype}, v {v.dtype}')
    if not jnp.issubdtype(buckets.dtype, jnp.integer):
        raise ValueError(f'buckets must be integers, got {buckets.dtype}')
    if mask is not None:
        check_mask(mask, (q.shape[0], q.shape[2]))
    if chunk_len < 1 or n_buckets < 1:
        raise ValueError(f'chunk_len and n_buckets must be positive, got {chunk_len}, {n_buckets}')
    if neighbourhood not in ('bucket', 'chunk', 'circle') or duplicates not in ('count', 'once'):
        raise ValueError(
            "neighbourhood is 'bucket', 'chunk' or 'circle', duplicates is 'count' or 'once', "
            f'got {neighbourhood!r} and {duplicates!r}'
        )
