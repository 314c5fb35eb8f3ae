"""Softmax attention of each chunk of queries to the chunks around it, some chunks at a time.

Each query meets a window of W = (look_back + 1 + look_ahead)·C keys, so its softmax is whole and
the cost is linear in the length. Chunks are taken in tiles of G, whose windows are cut from one
slice of keys; the backward pass recomputes the probabilities of each tile as `blockwise` does.

Shape letters: B batch, H heads, L length, K depth of queries and keys, D depth of values, C chunk;
N tiles of G chunks; W window; P the length with the chunks that the first and the last window need;
q and w stand for one query's and one key's place in its chunk and window.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about one call.

    Attributes:
      length: L, before padding.
      chunk_len: C.
      look_back: chunks before its own that a query sees.
      look_ahead: chunks after its own that a query sees.
      n_together: G, chunks in a tile.
      scale: factor of the scores.
      causal: whether a query sees only keys at its own position and before.
      dropout_rate: share of the probabilities set to zero.
    """

    length: int
    chunk_len: int
    look_back: int
    look_ahead: int
    n_together: int
    scale: float
    causal: bool
    dropout_rate: float = 0.0

    @property
    def n_chunks_seen(self) -> int:
        """Chunks in a window."""
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
    """The windows (G, W, ...) of a tile from the keys that they share, ((G + W/C − 1)·C, ...)."""
    shape = (plan.n_together, plan.chunk_len, *x.shape[1:])
    n, c = plan.tile_len, plan.chunk_len
    shifted = [x[s * c : s * c + n].reshape(shape) for s in range(plan.n_chunks_seen)]
    return jnp.concatenate(shifted, axis=1)  # (G, W, ...)


def slice_of_tile(plan: Plan, x: jax.Array, i: Any) -> jax.Array:
    """The part of x (P, ...) that the windows of tile i cover."""
    n = plan.tile_len + plan.window_len - plan.chunk_len
    return lax.dynamic_slice_in_dim(x, i * plan.tile_len, n)


def add_windows(plan: Plan, total: jax.Array, i: Any, parts: jax.Array) -> jax.Array:
    """Adds the windows of tile i, (G, W, K), to the positions of `total` (P, K) they came from."""
    old = slice_of_tile(plan, total, i)
    (new,) = jax.linear_transpose(functools.partial(windows, plan), old)(parts)
    return lax.dynamic_update_slice_in_dim(total, old + new, i * plan.tile_len, 0)


def visible(plan: Plan, real: jax.Array, i: Any) -> jax.Array:
    """Which keys of its window each query of tile i sees, (G, C, W)."""
    seen = windows(plan, slice_of_tile(plan, real, i))[:, None]  # (G, 1, W)
    if plan.causal:
        key = jnp.arange(plan.window_len, dtype=jnp.int32)[None] - plan.look_back * plan.chunk_len
        seen = seen & (key <= jnp.arange(plan.chunk_len, dtype=jnp.int32)[:, None])[None]
    return jnp.broadcast_to(seen, (plan.n_together, plan.chunk_len, plan.window_len))


def forward_head(plan: Plan, q: Any, k: Any, v: Any, real: Any, rng: Any) -> Any:
    """One head's output (N, G, C, D) and logsumexp (N, G, C).

    From q (N, G, C, K), k (P, K), v (P, D), and which keys are real, (P,) bool.
    """

    def tile(_, i):
        q_i = q[i].astype(jnp.float32) * plan.scale
        k_i = windows(plan, slice_of_tile(plan, k, i))
        v_i = windows(plan, slice_of_tile(plan, v, i))
        seen = visible(plan, real, i)
        scores = jnp.where(seen, tiles.dot('gqk,gwk->gqw', q_i, k_i), -tiles.FAR)
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
    plan: Plan, q: Any, k: Any, v: Any, real: Any, rng: Any, z: Any, d_out: Any, dot_out: Any
) -> Any:
    """One head's gradients of q (N, G, C, K), of k (P, K) and of v (P, D)."""

    def tile(carry, i):
        d_k, d_v = carry
        q_i = q[i].astype(jnp.float32) * plan.scale
        k_i = windows(plan, slice_of_tile(plan, k, i))
        v_i = windows(plan, slice_of_tile(plan, v, i))
        p = jnp.exp(tiles.dot('gqk,gwk->gqw', q_i, k_i) - z[i][..., None])
        p = jnp.where(visible(plan, real, i), p, 0.0)
        d_p = tiles.dot('gqd,gwd->gqw', d_out[i], v_i)
        d_s = p * (tiles.drop(plan.dropout_rate, rng, i, d_p) - dot_out[i][..., None])
        p = tiles.drop(plan.dropout_rate, rng, i, p)
        d_v = add_windows(plan, d_v, i, tiles.dot('gqw,gqd->gwd', p, d_out[i]))
        d_k = add_windows(plan, d_k, i, tiles.dot('gqw,gqk->gwk', d_s, q[i]))
        d_q = tiles.dot('gqw,gwk->gqk', d_s, k_i) * plan.scale
        return (d_k, d_v), d_q.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (d_k, d_v), d_q = tiles.each(tile, zeros, plan.n_tiles)
    return d_q, (d_k * plan.scale).astype(k.dtype), d_v.astype(v.dtype)


def surround(plan: Plan, x: jax.Array) -> jax.Array:
    """Pads x (B, H, L, ...) to (B, H, P, ...) with what the first and last windows look for."""
    before, after = plan.look_back * plan.chunk_len, plan.look_ahead * plan.chunk_len
    after += plan.n_tiles * plan.tile_len - plan.length
    return jnp.pad(x, [(0, 0), (0, 0), (before, after)] + [(0, 0)] * (x.ndim - 3))


def centre(plan: Plan, x: jax.Array) -> jax.Array:
    """Undoes `surround`."""
    before = plan.look_back * plan.chunk_len
    return x[:, :, before : before + plan.length]


def cut(plan: Plan, x: jax.Array) -> jax.Array:
    """Cuts x (B, H, L, ...) into tiles of chunks, the last one filled up with zeros."""
    missing = plan.n_tiles * plan.tile_len - plan.length
    x = jnp.pad(x, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 3))
    shape = (plan.n_tiles, plan.n_together, plan.chunk_len)
    return x.reshape(*x.shape[:2], *shape, *x.shape[3:])  # (B, H, N, G, C, ...)


def join(plan: Plan, x: jax.Array) -> jax.Array:
    """Undoes `cut`."""
    whole = plan.n_tiles * plan.tile_len
    return x.reshape(*x.shape[:2], whole, *x.shape[5:])[:, :, : plan.length]  # (B, H, L, ...)


def per_head(plan: Plan, q: Any, k: Any, v: Any, mask: Any, rng: Any) -> Any:
    """The arguments of `forward_head`, each with leading axes (B, H)."""
    rows = q.shape[:2]
    real = jnp.ones((1, 1, 1), bool) if mask is None else mask[:, None]
    real = surround(plan, jnp.broadcast_to(real, (*rows, plan.length)))  # (B, H, P)
    rng = tiles.key_per_head(rng, rows)
    return cut(plan, q), surround(plan, k), surround(plan, v), real, rng


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    rng: jax.Array | None,
) -> jax.Array:
    """Local attention as `plan` says, in time and memory linear in the length.

    Args:
      plan: the static description.
      q: (B, H, L, K).
      k: (B, H, L, K).
      v: (B, H, L, D).
      mask: (B, L) bool, True = a real key; or None.
      rng: the key of dropout; or None for no dropout.

    Returns:
      (B, H, L, D), in the dtype of v; zero where a query sees no key.
    """
    return attend_forward(plan, q, k, v, mask, rng)[0]


def n_pairs(plan: Plan) -> int:
    """Pairs of a query and a key in a tile."""
    return plan.tile_len * plan.window_len


@functools.partial(jax.jit, static_argnums=0)
def attend_forward(plan: Plan, q: Any, k: Any, v: Any, mask: Any, rng: Any) -> Any:
    """The output, and what the backward pass needs."""
    f = functools.partial(forward_head, plan)
    out, z = tiles.over_heads(f, per_head(plan, q, k, v, mask, rng), n_pairs(plan))
    out = join(plan, out)
    return out, (q, k, v, mask, rng, out, z)


@functools.partial(jax.jit, static_argnums=0)
def attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    """The gradients of q, k and v; None for what has none."""
    q, k, v, mask, rng, out, z = kept
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    heads = (*per_head(plan, q, k, v, mask, rng), z, cut(plan, d_out), cut(plan, dot_out))
    d_q, d_k, d_v = tiles.over_heads(functools.partial(backward_head, plan), heads, n_pairs(plan))
    return join(plan, d_q), centre(plan, d_k), centre(plan, d_v), None, None


attend.defvjp(attend_forward, attend_backward)
