"""Softmax attention of each chunk of queries to the chunks around it, a tile of chunks at a time.

Each query sees a window of W = (look_back + 1 + look_ahead)·C keys, so its softmax is computed at
once, and time is linear in the length. A tile holds G chunks; their windows are cut from one slice
of keys. The backward pass recomputes the probabilities of each tile, as `flash` does.

Shape letters: B batch, H heads, of which R share a head of keys and values, L length, K depth of
queries and keys, D depth of values, C chunk; N tiles of G chunks; W window; P the padded length,
with the chunks that the first and the last window need; q and w are places of a query in its chunk
and of a key in its window.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.facts.sequence import of_whole, surrounded
from layercomb.layers.state import segments as documents

# The places of k, v and known among the arguments of `forward_head`, after the plan.
OF_KEYS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of one call.

    Attributes:
      length: L, before padding.
      chunk_len: C.
      look_back: chunks before its own that a query sees.
      look_ahead: chunks after its own that a query sees.
      n_together: G, chunks in a tile.
      scale: factor of the scores.
      causal: whether a query sees only keys at its own position and before.
      dropout_rate: share of the probabilities set to zero.
      softcap: c, which makes scores c·tanh(scores / c); None for no cap.
      group: R.
      reach: with segments, chunks of its own document before and after its own that a query sees.
        Documents are cut into chunks each, which the windows hold if they are a chunk longer.
      neighbours: whether the positions around these L are those of other devices.
    """

    length: int
    chunk_len: int
    look_back: int
    look_ahead: int
    n_together: int
    scale: float
    causal: bool
    dropout_rate: float = 0.0
    softcap: float | None = None
    group: int = 1
    reach: tuple[int, int] = (0, 0)
    neighbours: bool = False

    @property
    def n_chunks_seen(self) -> int:
        """Chunks in a window, W / C."""
        return self.look_back + 1 + self.look_ahead

    @property
    def window_len(self) -> int:
        """Keys in a window, W."""
        return self.n_chunks_seen * self.chunk_len

    @property
    def tile_len(self) -> int:
        """Positions in a tile, G·C."""
        return self.n_together * self.chunk_len

    @property
    def n_tiles(self) -> int:
        """Number of tiles, N; the last may be short."""
        return -(-self.length // self.tile_len)


def windows(plan: Plan, x: jax.Array) -> jax.Array:
    """The windows of a tile's chunks, which overlap.

    Args:
      plan: the static description.
      x: ((G + W/C − 1)·C, …), the slice that the windows share.

    Returns:
      (G, W, …).
    """
    shape = (plan.n_together, plan.chunk_len, *x.shape[1:])
    n, c = plan.tile_len, plan.chunk_len
    shifted = [x[s * c : s * c + n].reshape(shape) for s in range(plan.n_chunks_seen)]
    return jnp.concatenate(shifted, axis=1)  # (G, W, ...)


def slice_of_tile(plan: Plan, x: jax.Array, i: Any) -> jax.Array:
    """The slice of x that the windows of tile i cover.

    Args:
      plan: the static description.
      x: (P, …).
      i: the tile's number, int32 ().

    Returns:
      ((G + W/C − 1)·C, …).
    """
    n = plan.tile_len + plan.window_len - plan.chunk_len
    return lax.dynamic_slice_in_dim(x, i * plan.tile_len, n)


def add_windows(plan: Plan, total: jax.Array, i: Any, parts: jax.Array) -> jax.Array:
    """Adds the windows of tile i to the positions they came from: the transpose of `windows`.

    Args:
      plan: the static description.
      total: (P, K).
      i: the tile's number, int32 ().
      parts: (G, W, K).

    Returns:
      (P, K).
    """
    old = slice_of_tile(plan, total, i)
    (new,) = jax.linear_transpose(functools.partial(windows, plan), old)(parts)
    return lax.dynamic_update_slice_in_dim(total, old + new, i * plan.tile_len, 0)


def visible(plan: Plan, known: tuple[jax.Array, jax.Array | None], i: Any) -> jax.Array:
    """Which keys of its window each query of tile i sees.

    Args:
      plan: the static description.
      known: of each position, whether it is a real key, (P,) bool; and, or None, its document and
        its chunk in it, (P, 2) int32.
      i: the tile's number, int32 ().

    Returns:
      (G, C, W) bool.
    """
    real, segments = known
    seen = windows(plan, slice_of_tile(plan, real, i))[:, None]  # (G, 1, W)
    if segments is not None:
        keys = windows(plan, slice_of_tile(plan, segments, i))  # (G, W, 2)
        seen = seen & in_document(plan, keys[..., 0], keys[..., 1])
    if plan.causal:
        key = jnp.arange(plan.window_len, dtype=jnp.int32)[None] - plan.look_back * plan.chunk_len
        seen = seen & (key <= jnp.arange(plan.chunk_len, dtype=jnp.int32)[:, None])[None]
    return jnp.broadcast_to(seen, (plan.n_together, plan.chunk_len, plan.window_len))


def in_document(plan: Plan, document: jax.Array, chunk: jax.Array | None) -> jax.Array:
    """Which keys of its window are of a query's document, and in reach there.

    Args:
      plan: the static description.
      document: of each key, (G, W) int32.
      chunk: the number of each key's chunk in its document, (G, W) int32; None for any reach.

    Returns:
      (G, C, W) bool.
    """
    first = plan.look_back * plan.chunk_len
    apart = [
        keys[:, first : first + plan.chunk_len, None] - keys[:, None]
        for keys in (document, chunk)
        if keys is not None
    ]
    seen = apart[0] == 0
    if chunk is None:
        return seen
    return seen & (apart[1] <= plan.reach[0]) & (apart[1] >= -plan.reach[1])


def forward_head(plan: Plan, q: Any, k: Any, v: Any, known: Any, rng: Any) -> Any:
    """One head's output and logsumexp.

    Args:
      plan: the static description.
      q: (N, G, C, K).
      k: (P, K).
      v: (P, D).
      known: as of `visible`.
      rng: key of dropout, or None.

    Returns:
      The output (N, G, C, D) in the dtype of v, zero where a query sees no key; and z (N, G, C)
      float32, `tiles.FAR` where a query sees no key.
    """

    def tile(_, i):
        q_i = q[i].astype(jnp.float32) * plan.scale
        k_i = windows(plan, slice_of_tile(plan, k, i))
        v_i = windows(plan, slice_of_tile(plan, v, i))
        seen = visible(plan, known, i)
        scores = tiles.capped(tiles.dot('gqk,gwk->gqw', q_i, k_i), plan.softcap)
        scores = jnp.where(seen, scores, -tiles.FAR)
        m = scores.max(-1, keepdims=True)
        p = jnp.where(seen, jnp.exp(scores - m), 0.0)
        total = p.sum(-1, keepdims=True)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        p = tiles.drop(plan.dropout_rate, rng, i, p)
        out = (tiles.dot('gqw,gwd->gqd', p, v_i) / total).astype(v.dtype)
        return None, (out, jnp.where(some, m + jnp.log(total), tiles.FAR)[..., 0])

    return tiles.each(tile, None, plan.n_tiles)[1]


def backward_head(
    plan: Plan, q: Any, k: Any, v: Any, known: Any, rng: Any, z: Any, d_out: Any, dot_out: Any
) -> Any:
    """One head's gradients, from the cotangent of its output.

    Args:
      plan, q, k, v, known, rng: as of `forward_head`.
      z: (N, G, C) float32, the logsumexp.
      d_out: (N, G, C, D), cotangent of the output.
      dot_out: (N, G, C) float32, Σ dO ∘ O.

    Returns:
      Gradients of q (N, G, C, K), of k (P, K) and of v (P, D), in their dtypes; those of k and v
      in float32 if they are to be summed over a group.
    """
    dtypes = (k.dtype, v.dtype) if plan.group == 1 else (jnp.float32, jnp.float32)

    def tile(carry, i):
        d_k, d_v = carry
        q_i = q[i].astype(jnp.float32) * plan.scale
        k_i = windows(plan, slice_of_tile(plan, k, i))
        v_i = windows(plan, slice_of_tile(plan, v, i))
        scores = tiles.capped(tiles.dot('gqk,gwk->gqw', q_i, k_i), plan.softcap)
        p = jnp.exp(scores - z[i][..., None])
        p = jnp.where(visible(plan, known, i), p, 0.0)
        d_p = tiles.dot('gqd,gwd->gqw', d_out[i], v_i)
        d_s = p * (tiles.drop(plan.dropout_rate, rng, i, d_p) - dot_out[i][..., None])
        d_s = tiles.uncapped(d_s, scores, plan.softcap)
        p = tiles.drop(plan.dropout_rate, rng, i, p)
        d_v = add_windows(plan, d_v, i, tiles.dot('gqw,gqd->gwd', p, d_out[i]))
        d_k = add_windows(plan, d_k, i, tiles.dot('gqw,gqk->gwk', d_s, q[i]))
        d_q = tiles.dot('gqw,gwk->gqk', d_s, k_i) * plan.scale
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = tiles.each(tile, zeros, plan.n_tiles)
    return d_q, (d_k * plan.scale).astype(dtypes[0]), d_v.astype(dtypes[1])


def surround(plan: Plan, x: jax.Array) -> jax.Array:
    """Pads x for the first and last windows and to whole tiles: (B, H, L, …) → (B, H, P, …)."""
    before, after = plan.look_back * plan.chunk_len, plan.look_ahead * plan.chunk_len
    missing = plan.n_tiles * plan.tile_len - plan.length
    if plan.neighbours:
        x, before, after = surrounded(x, before, after, axis=2), 0, 0
    after += missing
    return jnp.pad(x, [(0, 0), (0, 0), (before, after)] + [(0, 0)] * (x.ndim - 3))


def centre(plan: Plan, x: jax.Array) -> jax.Array:
    """The transpose of `surround`: (B, H, P, …) → (B, H, L, …)."""
    if plan.neighbours:
        like = jax.ShapeDtypeStruct((*x.shape[:2], plan.length, *x.shape[3:]), x.dtype)
        (made,) = jax.linear_transpose(functools.partial(surround, plan), like)(x)
        return jnp.asarray(made)
    before = plan.look_back * plan.chunk_len
    return x[:, :, before : before + plan.length]


def cut(plan: Plan, x: jax.Array) -> jax.Array:
    """Cuts queries into tiles of chunks, padded with zeros, and heads into groups.

    (B, H, L, …) → (B, H, N, G, C, …), or (B, H/R, R, N, G, C, …) if R is not 1.
    """
    missing = plan.n_tiles * plan.tile_len - plan.length
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3))
    shape = (plan.n_tiles, plan.n_together, plan.chunk_len)
    x = x.reshape(*x.shape[:2], *shape, *x.shape[3:])  # (B, H, N, G, C, ...)
    return tiles.split_group(x, plan.group)


def join(plan: Plan, x: jax.Array) -> jax.Array:
    """Undoes `cut`: (B, H, N, G, C, …) → (B, H, L, …)."""
    x = tiles.join_group(x, plan.group)
    whole = plan.n_tiles * plan.tile_len
    return x.reshape(*x.shape[:2], whole, *x.shape[5:])[:, :, : plan.length]  # (B, H, L, ...)


def per_head(plan: Plan, q: Any, k: Any, v: Any, mask: Any, rng: Any, segments: Any) -> Any:
    """The arguments of `forward_head`, with leading axes (B, H/R).

    Args:
      plan, q, k, v, mask, rng, segments: as of `attend`.

    Returns:
      q (B, H/R, N, G, C, K), k (B, H/R, P, K), v (B, H/R, P, D), known, two (B, H/R, P), and keys
      (B, H/R) or None. If R is not 1, q and keys have a third axis R.
    """

    def of_each(x: jax.Array) -> jax.Array:  # (B, L, …) → (B, H/R, P, …)
        around = surround(plan, jnp.broadcast_to(x, (len(k), plan.length, *x.shape[2:]))[:, None])
        return jnp.broadcast_to(around, (*k.shape[:2], *around.shape[2:]))

    real = of_each(jnp.ones((1, 1), bool) if mask is None else mask)
    if segments is not None:
        places = documents.places
        where = of_whole(places, segments) if plan.neighbours else places(segments)
        segments = of_each(jnp.stack([segments, where // plan.chunk_len], -1))
    known = real, segments
    rng = tiles.split_group(tiles.key_per_head(rng, q.shape[:2]), plan.group)
    return cut(plan, q), surround(plan, k), surround(plan, v), known, rng


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    rng: jax.Array | None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Local attention as `plan` says, in time and memory linear in the length.

    Args:
      plan: the static description.
      q: (B, H, L, K).
      k: (B, H/R, L, K).
      v: (B, H/R, L, D).
      mask: (B, L) bool, True = a real key; or None.
      rng: the key of dropout; or None for no dropout.
      segments: (B, L) int32, the document of each position; or None.

    Returns:
      (B, H, L, D), in the dtype of v; zero where a query sees no key.
    """
    return attend_forward(plan, q, k, v, mask, rng, segments)[0]


def n_pairs(plan: Plan) -> int:
    """(query, key) pairs in a tile, G·C·W."""
    return plan.tile_len * plan.window_len


@functools.partial(jax.jit, static_argnums=0)
def attend_forward(plan: Plan, q: Any, k: Any, v: Any, mask: Any, rng: Any, segments: Any) -> Any:
    """The output (B, H, L, D), and the residuals of the backward pass.

    Args:
      plan, q, k, v, mask, rng, segments: as of `attend`.

    Returns:
      The output, and (q, k, v, mask, rng, segments, output, z), with z as q without K, float32.
    """
    f = functools.partial(forward_head, plan)
    heads = per_head(plan, q, k, v, mask, rng, segments)
    out, z = tiles.over_heads(f, heads, n_pairs(plan), group=plan.group, shared=OF_KEYS)
    out = join(plan, out)
    return out, (q, k, v, mask, rng, segments, out, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of the arguments of `attend`.

    Args:
      plan: the static description.
      kept: the residuals of `attend_forward`.
      d_out: (B, H, L, D), cotangent of the output.

    Returns:
      Gradients of q, k and v, shaped and typed as these; None for the others.
    """
    q, k, v, mask, rng, segments, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    heads = (*per_head(plan, q, k, v, mask, rng, segments), z, cut(plan, d_out), cut(plan, dot_out))
    f = functools.partial(backward_head, plan)
    grouped: Any = {'group': plan.group, 'shared': OF_KEYS, 'summed': (1, 2)}
    d_q, d_k, d_v = tiles.over_heads(f, heads, n_pairs(plan), **grouped)
    d_k, d_v = d_k.astype(k.dtype), d_v.astype(v.dtype)
    return join(plan, d_q), centre(plan, d_k), centre(plan, d_v), None, None, None


attend.defvjp(attend_forward, attend_backward)
