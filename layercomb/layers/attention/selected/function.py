"""`selected_attention`: softmax attention over keys that are found, and keys near by.

Shape letters: B batch, H heads of queries, G heads of keys, L length, K depth of queries and keys,
D depth of values, R rounds; F folds of heads of a row that are computed as one sequence.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.attention.functions import check_softcap
from layercomb.layers.attention.selected.arrays import check_arrays
from layercomb.layers.attention.selected.backends import gpu, native, pairs
from layercomb.layers.attention.selected.backends.sets import Plan
from layercomb.layers.state import segments as documents

# Short sequences of a row's heads are computed as one, so that a loop has something to do. Rows
# stay apart: what is not finite in one must not reach another.
_CPU_KEYS = 4096
# Queries and keys of a tile of XLA's, and pairs of tiles at a time. On a CPU 8 pairs take two
# thirds of the time of 1; others need more to be busy, and a TPU multiplies 128 rows at a time.
_TILES = {'cpu': (64, 8), 'tpu': (128, 64)}
_TILES_ELSEWHERE = 64, 64


def selected_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_buckets: jax.Array,
    k_buckets: jax.Array,
    *,
    n_buckets: int,
    n_keys: int,
    local_len: int = 0,
    n_sinks: int = 0,
    causal: bool = True,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    duplicates: Literal['once', 'count'] = 'once',
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
    tile_len: int | None = None,
    heads_together: int | None = None,
) -> jax.Array:
    """Softmax attention of each query to keys of its buckets, to those near by, and to the first.

    In round r a query of bucket b at position t sees S_r(t), the last `n_keys` keys of bucket b up
    to t. Beside these are the last `local_len` keys up to t, and the first `n_sinks` of all::

        y_t = Σ_r Σ_{c ∈ S_r(t)} exp(s[t, c] − z_t) v_c        s[t, c] = scale · q_t · k_c

    No later token changes what a causal query sees, nor the outputs but for rounding. Not causal,
    half of the keys are before the query, itself among them, and half behind it. Only real
    positions count, so that padding takes no place, and only those of the query's own document.

    Time and memory are linear in L, apart from sorting; the backward pass keeps q, k, v, the output
    and one number a query, and is one pass.

    Args:
      q: (B, H, L, K).
      k, v: (B, G, L, K) and (B, G, L, D). G divides H; head h of the queries reads head ⌊h·G/H⌋.
      q_buckets, k_buckets: (B, H, R, L) and (B, G, R, L) integers, 0 … n_buckets − 1; one that is
        out of bounds takes the nearest. R may be 0 beside near or first keys.
      n_buckets: how many buckets there are.
      n_keys: of a bucket, for each query.
      local_len: how many near keys a query sees, itself included; 0 for none.
      n_sinks: how many of the first keys it sees.
      causal: whether position t sees positions up to t only.
      mask: (B, L) bool, True = a real position; or None.
      segments: (B, L) int32, the document of each position, neighbours of one number; or None.
      duplicates: 'once' counts a key once that is found several times, 'count' as often as it is.
      scale: of the products; None for 1 / √K.
      softcap: as of `dot_product_attention`.
      dropout_rate: share of the probabilities set to zero, in [0, 1).
      rng: a typed key, or one for every head (H,); needed for dropout.
      tile_len: queries, and keys, that XLA computes together; None for 64, on a TPU 128. Native
        kernels have no tiles, and are used on a CPU where they know the call and the windows are
        narrow; those of a GPU, see `backends.gpu`, have their own.
      heads_together: heads of keys of a row that XLA computes as one sequence: the largest divisor
        of G up to this. None: on a CPU as many as have 4,096 positions, all elsewhere. With dropout
        each is alone.

    Returns:
      (B, H, L, D), in the dtype of v; zero where the mask is False.

    Raises:
      ValueError: if shapes, dtypes or sizes do not fit together.

    >>> from layercomb import tl
    >>> x = jax.random.normal(jax.random.key(0), (1, 2, 50, 8))
    >>> buckets = tl.lsh_buckets(x, jax.random.key(1), n_buckets=4, n_hashes=3)
    >>> selected_attention(x, x, x, buckets, buckets, n_buckets=4, n_keys=16, local_len=8).shape
    (1, 2, 50, 8)
    """
    _check(q, k, v, q_buckets, k_buckets, mask, segments)
    _check_numbers(n_buckets, n_keys, local_len, n_sinks, softcap, dropout_rate, rng)
    _check_choice(duplicates, q_buckets.shape[2] + local_len + n_sinks)
    if dropout_rate:  # each head of queries drops by its own key, alone
        k, v, k_buckets = (jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v, k_buckets))
    g, length, depth = k.shape[1:]
    c, together = _tiles(tile_len, length)
    plan = Plan(
        length=length,
        n_heads=_together(g, length, heads_together, alone=bool(dropout_rate)),
        group=q.shape[1] // g,
        n_buckets=n_buckets,
        n_rounds=q_buckets.shape[2],
        n_keys=min(n_keys, 2 * length),  # half of them may be on one side
        local_len=min(local_len, 2 * length),
        n_sinks=min(n_sinks, length),
        causal=causal,
        once=duplicates == 'once',
        scale=depth**-0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        dropout_rate=dropout_rate,
        tile_len=c,
        piece_len=c,
        together=together,
    )
    buckets = _within(q_buckets, n_buckets), _within(k_buckets, n_buckets)
    segments = None if segments is None else documents.runs(segments)
    return _attend(plan, q, k, v, buckets, mask, segments, rng if dropout_rate else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    plan: Plan, q: Any, k: Any, v: Any, buckets: Any, mask: Any, segments: Any, rng: Any
) -> jax.Array:
    return _attend_forward(plan, q, k, v, buckets, mask, segments, rng)[0]


@functools.partial(jax.jit, static_argnums=0)
def _attend_forward(
    plan: Plan, q: Any, k: Any, v: Any, buckets: Any, mask: Any, segments: Any, rng: Any
) -> Any:
    if native.applies(plan, q, k, v):
        out, z = native.forward(plan, q, k, v, buckets, mask, segments)
    else:
        folded = _folded(plan, q, k, v, buckets, mask, segments, rng)
        by_tiles = functools.partial(_over_folds, functools.partial(pairs.forward, plan))
        out, z = _computed(gpu.forward, by_tiles, (plan, q, k, v), folded, ())
        out, z = out.reshape(*q.shape[:3], -1), z.reshape(q.shape[:3])
    return out, (q, k, v, buckets, mask, segments, rng, out, z)


@functools.partial(jax.jit, static_argnums=0)
def _attend_backward(plan: Plan, kept: Any, d_out: Any) -> Any:
    q, k, v, buckets, mask, segments, rng, out, z = kept
    if native.applies(plan, q, k, v):
        grads = native.backward(plan, q, k, v, buckets, mask, segments, (out, z), d_out)
        return (*grads, None, None, None, None)
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    folded = _folded(plan, q, k, v, buckets, mask, segments, rng)
    further = tuple(_fold(plan.n_q, x) for x in (z, d_out, dot_out))
    by_tiles = functools.partial(_over_folds, functools.partial(pairs.backward, plan))
    made = _computed(gpu.backward, by_tiles, (plan, q, k, v), folded, further)
    shaped = (d.reshape(x.shape).astype(x.dtype) for d, x in zip(made, (q, k, v), strict=True))
    return (*shaped, None, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _computed(by_kernel: Any, by_tiles: Any, call: Any, folded: Any, further: Any) -> Any:
    """Of folds, by the kernels of a GPU in programs for one, else by tiles of XLA's."""
    if not gpu.applies(*call):
        return by_tiles((*folded, *further))
    *given, rng = folded
    plan = gpu.planned(call[0], call[1].dtype)

    def kernel(given: Any, further: Any) -> Any:
        return by_kernel(plan, *given, *further)

    def plain(given: Any, further: Any) -> Any:
        return by_tiles((*given, rng, *further))

    return lax.platform_dependent(given, further, default=plain, **{gpu.PLATFORM: kernel})


def _tiles(tile_len: int | None, length: int) -> tuple[int, int]:
    """The length of XLA's tiles, and how many pairs are computed at a time."""
    usual, together = _TILES.get(jax.default_backend(), _TILES_ELSEWHERE)
    return min(tile_len or usual, -(-length // 8) * 8), together


def _together(n: int, length: int, most: int | None, alone: bool) -> int:
    """How many of n heads are computed as one sequence: a divisor of n."""
    if alone:
        return 1
    if most is None:
        most = max(1, _CPU_KEYS // length) if jax.default_backend() == 'cpu' else n
    return next(i for i in range(min(n, most), 0, -1) if n % i == 0)


def _folded(
    plan: Plan, q: Any, k: Any, v: Any, buckets: Any, mask: Any, segments: Any, rng: Any
) -> Any:
    """The arguments of `pairs.forward` with a leading axis F."""
    b, g, length, _ = k.shape
    real = jnp.ones((b, length), bool) if mask is None else mask
    if mask is not None:  # what nobody sees is in tiles too, and 0 · NaN is NaN
        k, v = (jnp.where(mask[:, None, :, None], x, 0) for x in (k, v))
    q, k, v = _fold(plan.n_q, q), _fold(plan.n_k, k), _fold(plan.n_k, v)
    n = len(plan.windows) - plan.n_rounds

    def numbered(buckets: Any, per_head: int, nobody: int) -> Any:
        """(B, heads, R, L) → (F, R', heads of a fold · L), with buckets of each head."""
        near = [(0, 0), (0, 0), (0, n), (0, 0)]  # near keys and the first ones: one bucket
        made = jnp.pad(buckets.astype(jnp.int32), near)
        heads = jnp.arange(b * g, dtype=jnp.int32) % plan.n_heads
        first = (1 + plan.n_buckets * heads).reshape(b, g, 1)
        first = jnp.broadcast_to(first, (b, g, per_head)).reshape(b, -1, 1, 1)
        made = jnp.where(real[:, None, None], made + first, nobody)
        made = made.reshape(-1, plan.n_heads * per_head, made.shape[2], length)
        return made.swapaxes(1, 2).reshape(len(made), -1, plan.n_heads * per_head * length)

    nobody = plan.n_buckets * plan.n_heads + 1
    numbers = numbered(buckets[0], plan.group, 0), numbered(buckets[1], 1, nobody)
    if segments is not None:
        segments = _fold(plan.n_k, jnp.broadcast_to(segments[:, None], (b, g, length)))
    if rng is not None:  # each head is alone, see `selected_attention`
        of_heads: Any = tiles.key_per_head(rng, (b, g))
        rng = of_heads.reshape(-1)
    return q, k, v, numbers, segments, rng


def _fold(n: int, x: jax.Array) -> jax.Array:
    """(B, heads, L, …) → (F, n, …)."""
    return x.reshape(-1, n, *x.shape[3:])


def _over_folds(f: Any, folded: Any) -> Any:
    """f of each fold, one by one: under `vmap` its loops would run as long as the longest."""
    if len(folded[0]) == 1:
        made = f(*jax.tree.map(lambda x: x[0], folded))
        return jax.tree.map(lambda x: x[None], made)
    return lax.map(lambda x: f(*x), folded)


def _check(
    q: Any, k: Any, v: Any, q_buckets: Any, k_buckets: Any, mask: Any, segments: Any
) -> None:
    """Raises ValueError if shapes or dtypes do not fit together."""
    check_arrays(q, k, v, mask, segments)
    for name, x, buckets in (('q', q, q_buckets), ('k', k, k_buckets)):
        shape = buckets.shape
        if buckets.ndim != 4 or (*shape[:2], shape[3]) != x.shape[:3]:
            raise ValueError(
                f'{name}_buckets must be (B, heads, R, L) for {name} {x.shape}, got {shape}'
            )
        if not jnp.issubdtype(buckets.dtype, jnp.integer):
            raise ValueError(f'{name}_buckets must be integers, got {buckets.dtype}')
    if q_buckets.shape[2] != k_buckets.shape[2]:
        raise ValueError(
            f'queries have {q_buckets.shape[2]} rounds of buckets, and keys {k_buckets.shape[2]}'
        )


def _within(buckets: jax.Array, n: int) -> jax.Array:
    """Buckets in bounds: others would be those of another head."""
    return jnp.clip(buckets.astype(jnp.int32), 0, n - 1)


def _check_choice(duplicates: str, n_kinds: int) -> None:
    if not n_kinds:
        raise ValueError(
            'no query sees a key: give buckets of one round at least, or local_len= or n_sinks='
        )
    if duplicates not in ('once', 'count'):
        raise ValueError(f"duplicates is 'once' or 'count', got {duplicates!r}")


def _check_numbers(
    n_buckets: int,
    n_keys: int,
    local_len: int,
    n_sinks: int,
    softcap: float | None,
    dropout_rate: float,
    rng: Any,
) -> None:
    """Raises ValueError if a number is out of its bounds."""
    check_softcap(softcap)
    if n_buckets < 1 or n_keys < 1 or local_len < 0 or n_sinks < 0:
        raise ValueError(
            f'n_buckets={n_buckets} and n_keys={n_keys} are at least 1, local_len={local_len} and '
            f'n_sinks={n_sinks} at least 0'
        )
    if not 0 <= dropout_rate < 1:
        raise ValueError(f'dropout_rate must be in [0, 1), got {dropout_rate}')
    if dropout_rate and rng is None:
        raise ValueError(f'dropout_rate={dropout_rate} needs a random key: pass rng=')
