"""Layers that mix positions, on whole sequences and on parts of them that devices have."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from layercomb import losses, parallel, tl, transforms
from layercomb.layers.attention.devices.exchange import Exchange
from layercomb.layers.attention.devices.ring import over_devices
from layercomb.layers.core.wrapper import Wrapper
from layercomb.parallel.positions import check_spans

B, L, D, N_HEADS = 2, 32, 16, 4
SEGMENTS = np.asarray([[0] * 5 + [1] * 14 + [2] * 13, [0] * 20 + [1] * 3 + [2] * 9], np.int32)
MASK = np.arange(L)[None] < np.asarray([[L], [L - 9]])

BLOCKS = functools.partial(
    tl.BlockSelfAttention, N_HEADS, block_len=4, n_chosen=2, local_len=4, max_len=L
)
HASHED = functools.partial(
    tl.HashedSelfAttention, N_HEADS, n_hashes=2, chunk_len=4, local_len=4, max_len=L
)
LSH = functools.partial(tl.LSHSelfAttention, N_HEADS, n_hashes=2, chunk_len=4, max_len=L)
MIXED = functools.partial(
    tl.MixedSelfAttention, N_HEADS, n_hashes=2, chunk_len=4, local_len=4, max_len=L
)
ROTARY = {'rotary': tl.RotaryPositions()}

# Each is given x (B, L, D); then a mask or segments, if it takes two inputs.
LAYERS = {
    'full': tl.SelfAttention(N_HEADS),
    'both_ways': tl.SelfAttention(N_HEADS, causal=False),
    'masked': tl.SelfAttention(N_HEADS, causal=False, masked=True),
    'masked_causal': tl.SelfAttention(N_HEADS, masked=True),
    'grouped': tl.SelfAttention(N_HEADS, n_kv_heads=2, **ROTARY),
    'capped': tl.SelfAttention(N_HEADS, softcap=2.0, scale=0.7),
    'window': tl.SelfAttention(N_HEADS, window=3),
    'window_masked': tl.SelfAttention(N_HEADS, window=4, masked=True),
    'wide_window': tl.SelfAttention(N_HEADS, window=19, **ROTARY),
    'relative': tl.Serial(
        tl.RelativeBias(N_HEADS, max_distance=20), tl.SelfAttention(N_HEADS, relative=True)
    ),
    'relative_both_ways': tl.Serial(
        tl.RelativeBias(N_HEADS, 8), tl.SelfAttention(N_HEADS, relative=True, causal=False)
    ),
    'local': tl.LocalSelfAttention(N_HEADS, 4),
    'local_far': tl.LocalSelfAttention(N_HEADS, 2, look_back=5),
    'local_both_ways': tl.LocalSelfAttention(N_HEADS, 2, causal=False, look_ahead=3, masked=True),
    'local_across': tl.LocalSelfAttention(N_HEADS, 5, masked=True),
    'lsh': LSH(),
    'lsh_masked': LSH(masked=True, n_kv_heads=2),
    'lsh_circle': LSH(neighbourhood='circle', duplicates='once', causal=False),
    'lsh_torch': LSH(rotations='torch'),
    'blocks': BLOCKS(),
    'blocks_grouped': BLOCKS(n_kv_heads=2, masked=True),
    'hashed': HASHED(),
    'hashed_masked': HASHED(masked=True, n_kv_heads=2),
    'mixed': MIXED(),
    'sparse': tl.SparseQKVAttention(N_HEADS),
    'conv': tl.Conv1D(8, width=4, padding='causal', dilation=3),
    'local_conv': tl.LocalConv(4),
    'learned': tl.LearnedPositions(L),
    'axial': tl.AxialPositions((4, 8)),
    'sinusoidal': tl.SinusoidalPositions(),
    'batch_norm': tl.BatchNorm(),
    'shared_dropout': tl.Dropout(0.5, shared_axes=(1,)),
    'point_conv': tl.Conv1D(8, width=1),
}
PACKED = (
    'full',
    'grouped',
    'window',
    'relative',
    'local',
    'lsh',
    'blocks',
    'hashed',
    'mixed',
    'learned',
)
LAYERS |= {
    f'packed_{name}': transforms.segmented(tl.Serial(LAYERS[name], tl.Dense(4))) for name in PACKED
}
LAYERS['packed_rotary'] = transforms.segmented(tl.SelfAttention(N_HEADS, **ROTARY))


def inputs_of(name):
    """x, and a mask or segments."""
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    if LAYERS[name].n_in == 1:
        return (x,)
    return x, jnp.asarray(SEGMENTS if name.startswith('packed') else MASK)


def outputs_and_gradients(net, weights, state, inputs, cotangent, mode):
    """The outputs of a layer, and the gradients of weights and inputs, without keys."""
    x, *more = inputs

    def total(weights, x):
        (y, *_), _ = net.apply(weights, state, (x, *more), rng=jax.random.key(3), mode=mode)
        return jnp.vdot(y, cotangent), y

    (_, y), (d_weights, d_x) = jax.value_and_grad(total, (0, 1), has_aux=True)(weights, x)
    return y, d_x, d_weights


def errors(name, n, mode=tl.Mode.TRAIN):
    """How far outputs and gradients of n devices are from those of one."""
    net, given = LAYERS[name], arguments(name, mode)
    wanted = outputs_and_gradients(net, *given, mode)
    found = split(net, n, mode)(*given)
    return max(map(_error, found, wanted))


def sent(name, n):
    """What the program of a layer's outputs and gradients sends: (kind, shape), without sums."""
    program = split(LAYERS[name], n, tl.Mode.TRAIN).lower(*arguments(name, tl.Mode.TRAIN)).compile()
    found = re.findall(
        r'= \(?(\w+\[[\d,]*\])[^=]* (all-gather|all-to-all|collective-permute)\(', program.as_text()
    )
    return [(kind, shape) for shape, kind in found]


def arguments(name, mode):
    """Weights, state, inputs and a cotangent of the outputs."""
    net, inputs = LAYERS[name], inputs_of(name)
    signature = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    weights, state = net.init(signature, jax.random.key(0))
    weights = jax.tree.map(  # biases too
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), weights
    )
    shape = jax.eval_shape(
        lambda w: net.apply(w, state, inputs, rng=jax.random.key(0), mode=mode)[0][0], weights
    ).shape
    return weights, state, inputs, jax.random.normal(jax.random.key(2), shape)


def split(net, n, mode):
    """`outputs_and_gradients` of a layer by n devices."""

    def one(weights, state, inputs, cotangent):
        y, d_x, d_weights = outputs_and_gradients(net, weights, state, inputs, cotangent, mode)
        return y, d_x, jax.lax.psum(d_weights, 'sequence')

    mesh = parallel.make_mesh(fsdp=1, sequence=n, devices=jax.devices()[:n])
    part, whole = PartitionSpec(None, 'sequence'), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            one, mesh=mesh, in_specs=(whole, whole, part, part), out_specs=(part, part, whole),
            check_vma=False,
        )
    )  # fmt: skip


def _error(found, wanted):
    """The largest difference of two trees, relative to the largest number."""
    found, wanted = (list(map(np.asarray, jax.tree.leaves(x))) for x in (found, wanted))
    apart = [np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)]
    return max(apart, default=0) / max((np.abs(b).max() for b in wanted), default=1)


def windows(n_queries, n_keys, window, n, n_shared, dtype):
    """The error of windowed attention of one sequence to another, or to itself."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, ct = (jax.random.normal(k, (2, N_HEADS, n_queries, 8), dtype) for k in keys[:2])
    k, v = (jax.random.normal(k, (2, n_shared, n_keys, 8), dtype) for k in keys[2:])
    given = {'causal': True, 'window': window}

    def both(attend, *args):
        y, pull = jax.vjp(functools.partial(attend, **given), *args)
        return y, pull(ct if y.shape == ct.shape else ct[:, :, : y.shape[2]])

    wanted = both(tl.dot_product_attention, q, k, v)
    mesh = parallel.make_mesh(fsdp=1, sequence=n, devices=jax.devices()[:n])
    part = PartitionSpec(None, None, 'sequence')

    def one(q, k, v, ct):
        y, pull = jax.vjp(functools.partial(over_devices, **given), q, k, v)
        return y, pull(ct)

    split = jax.shard_map(one, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    found = jax.jit(split)(q, k, v, ct)
    return _error(*(jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in (found, wanted)))


def rows_that_count(n):
    """The state of an average in an encoder, whose padding is told by the decoder's targets."""
    rng = np.random.default_rng(0)
    source, x = (jnp.asarray(rng.integers(1, 32, (B, L)), jnp.int32) for _ in range(2))
    loss_weights = jnp.asarray(np.arange(L) < 6, jnp.float32)[None] * jnp.asarray([[1.0], [0.0]])
    encoder = tl.Once(tl.Serial(tl.Embedding(32, D), tl.SwitchFF(16, 4, balance=1.0)))
    decoder = tl.Chunk(tl.SwitchFF(16, 4, balance=1.0), 2)
    net = tl.Serial(
        tl.Parallel(tl.Serial(tl.Embedding(32, D), decoder), encoder),
        tl.CrossAttention(N_HEADS), tl.Dense(32),
    )  # fmt: skip
    return _aux(net, (x, source), x, loss_weights, n)


def _aux(net, inputs, targets, loss_weights, n):
    signature = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs)
    weights, state = net.init(signature, jax.random.key(0))
    scored = losses.attach(net, tl.CrossEntropyLoss())

    def one(batch):
        _, new = losses.apply_counted(
            scored, weights, state, batch, batch[-1], rng=jax.random.key(1), mode=tl.Mode.TRAIN
        )
        return losses.total(new)

    batch = (*inputs, targets, loss_weights)
    if n == 1:
        return float(one(batch))
    mesh = parallel.make_mesh(fsdp=1, sequence=n, devices=jax.devices()[:n])
    part = PartitionSpec(None, 'sequence')
    return float(
        jax.jit(
            jax.shard_map(
                lambda b: jax.lax.pmean(one(b), 'sequence'),
                mesh=mesh, in_specs=(part,), out_specs=PartitionSpec(), check_vma=False,
            )
        )(batch)
    )  # fmt: skip


def checked(metric, chunk_len=None):
    """Checks a model with a loss or metric."""
    net = tl.Serial(tl.Embedding(32, D), tl.SelfAttention(N_HEADS), tl.Dense(32))
    check_spans(losses.attach(net, metric, chunk_len))


class RowMeans(tl.CrossEntropyLoss):
    """Squares of the means of rows: no sum over positions."""

    def sums(self, values, weights):
        return jnp.square((values * weights).mean(1)).sum(), jnp.float32(len(values))


class Around(Wrapper):
    """Passes on what a layer gives."""

    spans_devices = True

    def apply(self, weights, state, inputs, *, rng=None, mode=tl.Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


def heads_there_and_back(n, n_heads, n_shared):
    """Whether heads that were exchanged come back, and which heads of keys each one reads."""
    mesh = parallel.make_mesh(fsdp=1, sequence=n, devices=jax.devices()[:n])
    x = np.arange(n_heads * n * 2, dtype=np.float32).reshape(1, n_heads, n * 2, 1)
    heads = np.broadcast_to(np.arange(n_shared)[None, :, None, None], (1, n_shared, n * 2, 1))

    def one(x, heads):
        exchange = Exchange.of(n_heads, n_shared)
        mine, keys = exchange.queries(x), exchange.shared(heads)
        read = jnp.repeat(keys, mine.shape[1] // keys.shape[1], 1)
        return exchange.back(mine), exchange.back(read)

    part = PartitionSpec(None, None, 'sequence')
    split = jax.shard_map(one, mesh=mesh, in_specs=part, out_specs=part, check_vma=False)
    back, read = jax.jit(split)(x, heads)
    wanted = np.arange(n_heads) // (n_heads // n_shared)
    return bool((np.asarray(back) == x).all()), bool((np.asarray(read)[0, :, 0, 0] == wanted).all())
