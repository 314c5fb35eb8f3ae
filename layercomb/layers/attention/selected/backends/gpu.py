"""Selected attention on a GPU: a kernel adds one round after the other to the output.

`ranges` has the kernels, in Triton; jax-triton calls them. XLA sorts, and keeps a few integers a
query and round. They are used on NVIDIA GPUs of compute capability 8.0 and more, if jax-triton is
installed and once they have given what XLA gives on a small input.

Shape letters: F folds; Q queries and M keys of a fold's heads together; S and T these with
padding; K depth of queries and keys, D depth of values; R rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import layercomb_kernels
from layercomb.layers.attention import tiles
from layercomb.layers.attention.selected.backends import pairs
from layercomb.layers.attention.selected.backends.sets import Plan, Sets, make_sets
from layercomb.layers.facts.devices import xla_splits
from layercomb.layers.quantized.rows import rows

DEPTHS = (16, 32, 64, 128)
# Queries, and keys, of a program: what its registers and shared memory hold.
TILE_LENS = {'bfloat16': 64, 'float16': 64, 'float32': 32}
N_WARPS = 8  # with 4, ptxas spills registers
N_BEFORE_LENGTHS = 10  # arrays that a kernel takes before S, T, Q and M
MOST_FOLDS = 65535  # programs along the second axis of a CUDA grid
PLATFORM = 'cuda'  # of programs that have the kernels


def planned(plan: Plan, dtype: Any) -> Plan:
    """The plan with the kernels' tiles, for queries of a dtype."""
    n = TILE_LENS[jnp.dtype(dtype).name]
    return dataclasses.replace(plan, tile_len=n, piece_len=n)


def applies(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether the kernels compute this call: they know some depths and dtypes, and no dropout.

    Args:
      plan: the static description.
      q, k, v: (B, H, L, K), (B, G, L, K) and (B, G, L, D).
    """
    if jax.default_backend() != 'gpu' or layercomb_kernels.are_off() or xla_splits():
        return False
    if not q.size or plan.dropout_rate or len(k) * k.shape[1] // plan.n_heads > MOST_FOLDS:
        return False
    fits = q.shape[-1] in DEPTHS and v.shape[-1] in DEPTHS
    if not fits or not q.dtype == k.dtype == v.dtype or q.dtype.name not in TILE_LENS:
        return False
    return available(q.dtype.name, q.shape[-1], v.shape[-1], plan.softcap is not None, plan.once)


@functools.cache
def available(dtype: str, depth: int, depth_v: int, capped: bool, once: bool) -> bool:
    """Whether this machine's GPU computes what XLA does; a warning where it should and does not.

    Args:
      dtype: of queries, keys and values.
      depth: K.
      depth_v: D.
      capped: whether scores have a cap.
      once: whether a key that is found several times counts once.
    """
    device = jax.devices()[0]
    if not _is_new(getattr(device, 'compute_capability', '0')):
        return False
    if jax.device_count() > 1:
        return _without(
            f'they work on one GPU, and JAX sees {jax.device_count()}: set CUDA_VISIBLE_DEVICES=0 '
            'if one is enough'
        )
    if not is_installed():
        return _without("jax-triton is missing: pip install 'layercomb[gpu]'")
    try:
        with jax.ensure_compile_time_eval(), jax.default_matmul_precision('highest'):
            apart = difference(dtype, depth, depth_v, capped, once)
    except Exception as e:  # whatever a driver or a compiler throws: XLA's path is always there
        return _without(f'they do not run here ({e}). {_CURE}')
    if not apart <= (2e-2 if dtype != 'float32' else 1e-3):
        return _without(
            f'on {device.device_kind} and for {dtype} their results differ by {apart:.1e} of the '
            f'largest value. {_CURE}'
        )
    return True


_CURE = (
    "Try pip install -U 'layercomb[gpu]' and a new process; if it stays so, please report it with "
    'the versions of jax, jax-triton, triton and the driver'
)


def _without(why: str) -> bool:
    warnings.warn(
        f'attention that selects its keys is computed without its GPU kernels: {why}', stacklevel=3
    )
    return False


def is_installed() -> bool:
    """Whether jax-triton is there."""
    return importlib.util.find_spec('jax_triton') is not None


def _is_new(capability: str) -> bool:
    return capability.split('.')[0].isdigit() and int(capability.split('.')[0]) >= 8


def difference(
    dtype: str, depth: int, depth_v: int, capped: bool, once: bool, length: int = 200
) -> float:
    """How far kernels and XLA are apart on a small input, as a share of the largest value.

    Args:
      dtype, depth, depth_v, capped, once: as of `available`.
      length: of the sequence.
    """
    plan = Plan(
        length=length, n_heads=1, group=2, n_buckets=3, n_rounds=2, n_keys=40, local_len=16,
        n_sinks=0, causal=True, once=once, scale=depth**-0.5, softcap=2.0 if capped else None,
        dropout_rate=0.0,
        tile_len=64, piece_len=64, together=8,
    )  # fmt: skip
    draw = np.random.default_rng(0)

    def drawn(n: int, depth: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal((1, n, depth)), jnp.float32).astype(dtype)

    def buckets(n: int) -> jax.Array:
        found = draw.integers(1, 4, (1, 3, n), np.int32)
        found[:, 2:] = 1  # near keys: one bucket
        return jnp.asarray(found)

    q, k, v, d_out = (
        drawn(*x)
        for x in (
            (plan.n_q, depth), (plan.n_k, depth), (plan.n_k, depth_v), (plan.n_q, depth_v)
        )
    )  # fmt: skip
    given = (q, k, v, (buckets(plan.n_q), buckets(plan.n_k)), None)
    own = planned(plan, dtype)
    out, z = jax.jit(functools.partial(forward, own))(*given)
    dot_out = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    made = jax.jit(functools.partial(backward, own))(*given, z, d_out, dot_out)
    alone, further = jax.tree.map(lambda x: x[0], (given, (z, d_out, dot_out)))
    out_x, _ = jax.jit(functools.partial(pairs.forward, plan))(*alone, None)
    made_x = jax.jit(functools.partial(pairs.backward, plan))(*alone, None, *further)
    return max(map(_apart, (out[0], *(x[0] for x in made)), (out_x, *made_x)))


def _apart(x: jax.Array, y: jax.Array) -> float:
    a, b = (np.asarray(z.astype(jnp.float32)) for z in (x, y))
    return float(np.abs(a - b).max() / np.abs(b).max())


def forward(
    plan: Plan, q: Any, k: Any, v: Any, buckets: Any, segments: Any
) -> tuple[jax.Array, jax.Array]:
    """The output (F, Q, D) in the dtype of v, and the logsumexp (F, Q) float32.

    Args:
      plan: the static description, with the kernels' tiles.
      q, k, v, buckets, segments: as of `pairs.forward`, with a leading axis F.
    """
    sets = _all_sets(plan, buckets, segments)
    seen = _before(plan, sets)
    shapes = [(*q.shape[:2], v.shape[-1]), q.shape[:2]]

    def one_round(before: Any, x: Any) -> tuple[Any, None]:
        number, sets = x
        order = sets.low, sets.high, sets.query, sets.key
        given = [q, k, v, *order, *seen, number.reshape(1), *before]
        return _call('forward', plan, given, shapes, plan.n_tiles), None

    start = jnp.zeros(shapes[0], jnp.float32), jnp.full(shapes[1], -tiles.FAR, jnp.float32)
    (out, z), _ = lax.scan(one_round, start, (_numbers(plan), sets))
    blind = z < -tiles.FAR / 2
    out = jnp.where(blind[..., None], 0.0, out).astype(v.dtype)
    return out, jnp.where(blind, tiles.FAR, z)


def backward(
    plan: Plan,
    q: Any,
    k: Any,
    v: Any,
    buckets: Any,
    segments: Any,
    z: Any,
    d_out: Any,
    dot_out: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of q, k and v, in float32.

    Args:
      plan, q, k, v, buckets, segments: as of `forward`.
      z, d_out, dot_out: as of `pairs.backward`, with a leading axis F.
    """
    sets = _all_sets(plan, buckets, segments)
    seen = _before(plan, sets)
    cotangents = z, d_out.astype(v.dtype), dot_out

    def one_round(before: Any, x: Any) -> tuple[Any, None]:
        number, sets = x
        order = sets.low, sets.high, sets.query, sets.key
        given = [q, k, v, *order, *seen, number.reshape(1), *cotangents]
        d_q, *of_keys = before
        of_queries = _call('backward_queries', plan, [*given, d_q], [q.shape], plan.n_tiles)
        n_tiles = sets.key.shape[-1] // plan.piece_len
        given += [*_seen_by(plan, sets), *of_keys]
        of_keys = _call('backward_keys', plan, given, [k.shape, v.shape], n_tiles)
        return (*of_queries, *of_keys), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    (d_q, d_k, d_v), _ = lax.scan(one_round, start, (_numbers(plan), sets))
    return d_q, d_k, d_v


def _numbers(plan: Plan) -> np.ndarray:
    return np.arange(len(plan.windows), dtype=np.int32)


def _all_sets(plan: Plan, buckets: Any, segments: Any) -> Sets:
    """The sets of all rounds and folds, (R, F, …), keys in whole tiles: (R, F, T)."""
    _, of_rounds, windows, firsts = pairs.of_rounds(plan, buckets)
    of_rounds = jax.tree.map(lambda x: x.swapaxes(0, 1), of_rounds)  # (F, R, …) → (R, F, …)
    axis = None if segments is None else 0

    def one(x: Any) -> Sets:
        buckets, window, first = x
        of_fold = functools.partial(make_sets, plan, window=window, first=first)
        return jax.vmap(of_fold, (0, axis))(buckets, segments)

    sets = lax.map(one, (of_rounds, windows, firsts))
    spare = -sets.key.shape[-1] % plan.piece_len
    return sets._replace(key=jnp.pad(sets.key, ((0, 0), (0, 0), (0, spare))))


def _before(plan: Plan, sets: Sets) -> tuple[jax.Array, jax.Array]:
    """Bounds (F, Q, R, 2) of each query and ranks (F, M, R) of each key in all rounds."""
    if not plan.once:
        return jnp.zeros((1,), jnp.int32), jnp.zeros((1,), jnp.int32)
    of_queries = jax.vmap(jax.vmap(rows))  # (R, F, S) in order → (R, F, Q)
    bounds = [of_queries(x, sets.query_place) for x in (sets.low, sets.high)]
    return jnp.stack(bounds, -1).transpose(1, 2, 0, 3), sets.key_rank.transpose(1, 2, 0)


def _seen_by(plan: Plan, sets: Sets) -> tuple[jax.Array, jax.Array]:
    """The first query that sees each tile of keys, and the one after the last; (F, T / P) int32."""
    starts = np.arange(0, sets.key.shape[-1], plan.piece_len, dtype=np.int32)

    def of_fold(low: Any, high: Any) -> tuple[jax.Array, jax.Array]:
        first = jnp.searchsorted(high[: plan.n_q], starts, side='right')
        last = jnp.searchsorted(low[: plan.n_q], starts + plan.piece_len - 1, side='right')
        return first.astype(jnp.int32), last.astype(jnp.int32)

    return jax.vmap(of_fold)(sets.low, sets.high)


def _call(
    name: str, plan: Plan, given: Sequence[jax.Array], shapes: Sequence[Any], n_programs: int
) -> tuple[jax.Array, ...]:
    """Calls a kernel of `ranges`, with some programs for each fold."""
    q, _, v, low, _, _, key = given[:7]
    grid = n_programs, len(q)
    lengths = low.shape[1], key.shape[1], plan.n_q, plan.n_k
    sizes: dict[str, Any] = {
        'R': len(plan.windows),
        'C': plan.tile_len,
        'P': plan.piece_len,
        'K': q.shape[-1],
        'D': v.shape[-1],
        'SCALE': plan.scale,
        'SOFTCAP': plan.softcap or 0.0,
        'ONCE': plan.once,
    }
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    @jax.custom_batching.sequential_vmap
    def call(*given: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(launch()(name, given, lengths, out, grid, sizes))

    return call(*given)


@functools.cache
def launch() -> Callable[..., Any]:
    """The function that calls a kernel, see `_call`; jax-triton is imported at first use."""
    import jax_triton

    from layercomb.layers.attention.selected.backends import ranges

    def call(name: str, given: Any, lengths: Any, out: Any, grid: Any, sizes: Any) -> Any:
        kernel, n = getattr(ranges, name), N_BEFORE_LENGTHS
        return jax_triton.triton_call(
            *given[:n], *lengths, *given[n:],
            kernel=kernel, out_shape=out, grid=grid, num_warps=N_WARPS, **sizes,
        )  # fmt: skip

    return call
