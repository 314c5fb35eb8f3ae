"""Attention head by head equals attention whole: outputs, decisions and gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl
from layercomb.layers.attention import multihead, slices
from layercomb.layers.attention.heads import goes_by_head
from layercomb.layers.attention.projections import kernel_gradient
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import Decisions
from layercomb.layers.state.parts import beside, own

B, L, D = 2, 12, 8
LAYERS = {
    'LSH, dropout': lambda: tl.LSHSelfAttention(
        4, chunk_len=4, n_buckets=4, n_hashes=2, masked=True, dropout=0.3
    ),
    'dense, rotary': lambda: tl.SelfAttention(
        2, masked=True, dropout=0.3, rotary=tl.RotaryPositions()
    ),
    'window': lambda: tl.SelfAttention(2, masked=True, dropout=0.3, window=5),
    'local, no bias': lambda: tl.LocalSelfAttention(
        2,
        4,
        masked=True,
        query=tl.SplitHeads(2, use_bias=False),
        output=tl.MergeHeads(use_bias=False),
    ),
    'cross': lambda: tl.CrossAttention(2, masked=True, dropout=0.3),
    'shared heads, norms': lambda: tl.SelfAttention(
        4,
        n_kv_heads=2,
        masked=True,
        dropout=0.3,
        query_norm=tl.RMSNorm(),
        key_norm=tl.LayerNorm(),
        rotary=tl.RotaryPositions(),
        softcap=2.0,
    ),
    'local, shared heads': lambda: tl.LocalSelfAttention(
        4, 4, n_kv_heads=1, masked=True, dropout=0.3, scale=0.4
    ),
    'cross, shared heads': lambda: tl.CrossAttention(4, masked=True, n_kv_heads=2, dropout=0.3),
    'LSH, shared heads': lambda: tl.LSHSelfAttention(
        4,
        n_kv_heads=2,
        chunk_len=4,
        n_buckets=4,
        n_hashes=2,
        masked=True,
        dropout=0.3,
        query_norm=tl.RMSNorm(),
        scale=0.5,
        softcap=2.0,
    ),
    'hashed': lambda: tl.HashedSelfAttention(
        4,
        n_kv_heads=2,
        chunk_len=4,
        n_buckets=4,
        n_hashes=2,
        local_len=3,
        n_sinks=1,
        masked=True,
        rotary=tl.RotaryPositions(),
    ),
    'blocks': lambda: tl.BlockSelfAttention(
        4, n_kv_heads=2, n_chosen=1, block_len=3, local_len=2, masked=True, scale=0.8, softcap=2.0
    ),
    'hashed and blocks': lambda: tl.MixedSelfAttention(
        4,
        n_kv_heads=2,
        n_hashes=1,
        n_chosen=1,
        chunk_len=3,
        n_buckets=2,
        local_len=2,
        masked=True,
        dropout=0.2,
    ),
    'an output that reads the stream': lambda: tl.SelfAttention(2, masked=True, output=Gated()),
}


class Gated(tl.MergeHeads):
    """What heads give, times the stream."""

    position_wise = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (y * inputs[1],), state


tl.by_head.register(Gated)(tl.by_head.rule(tl.MergeHeads))


def example(net):
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    mask = jnp.arange(L) < jnp.array([[L], [L - 3]])
    memory = (jax.random.normal(jax.random.key(2), (B, L - 1, D)),) * (net.n_in - 2)
    mask = mask[:, : L - len(memory)]
    return (x, *memory, mask)


def goes(net, *inputs):
    signature = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in inputs)
    weights, _ = net.init(signature, jax.random.key(0))
    return goes_by_head(net, weights, inputs)


def assert_close(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('make', LAYERS.values(), ids=list(LAYERS))
def test_head_by_head_is_whole(make, monkeypatch):
    monkeypatch.setattr(slices, 'POSITIONS_TOGETHER', 5)
    net = make()
    inputs = example(net)
    weights, _ = net.init(tuple(jax.eval_shape(lambda: inputs)), jax.random.key(0))
    weights = jax.tree.map(lambda w: w + 0.1, weights)  # biases that are not zero
    ct = jax.random.normal(jax.random.key(3), (B, L, D))

    def run(apply, gradient):
        (y,), state = apply(net, weights, {}, inputs, rng=jax.random.key(4), mode=Mode.RECORD)
        (again,), d_inputs, d_weights = gradient(
            net, weights, state, inputs, (ct,), rng=jax.random.key(4), mode=Mode.REPLAY
        )
        return y, again, d_inputs, d_weights, state

    y, again, *rest = run(type(net).apply, tl.one_pass)
    assert goes_by_head(net, weights, inputs)
    wanted = run(Combinator.apply, tl.one_pass.default)
    assert_close((y, again, *rest), wanted)
    assert_close(again, y)


def test_heads_that_fit_no_others_go_whole():
    net = tl.SelfAttention(6, d_head=2, query_norm=tl.RMSNorm())
    (x,) = example(net)[:1]
    assert goes(net, x)
    net = tl.SelfAttention(4, query_norm=tl.Serial(tl.Dense(2)))
    assert not goes(net, x)


def test_one_position_has_dropout_in_a_reversible_stack():
    half = tl.ReversibleHalfResidual(tl.SelfAttention(2, dropout=0.5))
    net = tl.ReversibleSerial(half, tl.ReversibleSwap())
    inputs = tuple(jax.random.normal(jax.random.key(1), (2, B, 1, D)))
    weights, _ = net.init(tuple(jax.eval_shape(lambda: inputs)), jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(mode):
        def total(weights):
            outputs, _ = net.apply(weights, {}, inputs, rng=jax.random.key(2), mode=mode)
            return sum(jnp.square(y).sum() for y in outputs)

        return jax.grad(total)(weights)

    assert_close(gradient(Mode.TRAIN), gradient(Mode.RECORD))


def test_recorded_buckets_keep_their_layout():
    net = tl.LSHSelfAttention(4, chunk_len=4, n_buckets=4, n_hashes=3)
    x = example(net)[0]
    weights, _ = net.init((jax.ShapeDtypeStruct(x.shape, x.dtype),), jax.random.key(0))
    _, state = net.apply(weights, {}, (x,), rng=jax.random.key(4), mode=Mode.RECORD)
    assert own(state['core'], Decisions).values['buckets'].shape == (B, 4, 3, L)


def test_what_cannot_be_taken_apart_goes_whole():
    class Halves(Layer):
        """Splits features into two heads."""

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            (x,) = inputs
            scaled = (x * weights['gain']).reshape(*x.shape[:2], 2, -1)
            return (jnp.moveaxis(scaled, 2, 1),), state

        def init(self, signature, rng, mode=Mode.TRAIN):
            return {'gain': jnp.ones(())}, {}

    net = tl.LSHSelfAttention(2, chunk_len=4, n_buckets=4, query=Halves())
    (x,) = example(net)[:1]
    assert not goes(net, x)
    assert not goes(tl.LSHSelfAttention(2, chunk_len=4), x.astype(jnp.bfloat16))


def test_a_core_that_reads_across_heads_goes_whole():
    def among_all(q, k, v):
        return v * jnp.arange(1.0, q.shape[1] + 1)[:, None, None]

    net = tl.SelfAttention(4, core=tl.Fn('AmongAll', among_all))
    (x,) = example(net)[:1]
    assert not goes(net, x)


def test_a_memory_whose_positions_are_mixed_goes_whole():
    class Mixing(tl.SplitHeads):
        """Says that it mixes positions."""

        position_wise = False

    net = tl.CrossAttention(2, key=Mixing(2))
    assert net.key.position_wise is False and not goes(net, *example(net)[:1] * 2)


def test_a_projection_of_another_value_than_it_says_is_refused():
    class ToAnother(tl.SelfAttention):
        """Reads keys and values of a second sequence."""

        n_in = 2

        def route(self, call, stack):
            return multihead.attend(self, call, *stack)

    net = ToAnother(2)
    (x,) = example(net)[:1]
    weights, _ = net.init(tuple(jax.eval_shape(lambda: (x, x))), jax.random.key(0))
    with pytest.raises(ValueError, match='route hands key another value than input 0: say in'):
        net.apply(weights, {}, (x, x + 1), mode=Mode.RECORD)


def test_keys_that_fit_no_head_are_refused():
    q = jnp.ones((1, 2, 8, 4))
    with pytest.raises(ValueError, match='for 2 heads: give one key, or one each'):
        tl.lsh_buckets(q, jax.random.split(jax.random.key(0), 3), n_buckets=4, n_hashes=1)
    with pytest.raises(TypeError, match=r'give a typed key, jax.random.key'):
        tl.lsh_buckets(q, jnp.zeros(2, jnp.uint32), n_buckets=4, n_hashes=1)


def test_queries_of_all_heads_never_exist(optimized):
    length, width, heads = 1024, 64, 16

    def gradient(of):
        net = tl.LSHSelfAttention(heads, chunk_len=16, n_hashes=1, max_len=length)
        x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
        weights, _ = jax.eval_shape(lambda key: net.init((x,), key), jax.random.key(0))
        buckets = jax.ShapeDtypeStruct((1, heads, 1, length), jnp.uint8)
        state = {'core': beside({}, Decisions({'buckets': buckets}))}

        def run(weights, state, x, ct):
            key = jax.random.key(0)
            return of(net, weights, state, (x,), (ct,), rng=key, mode=Mode.REPLAY)

        compiled = jax.jit(run).lower(weights, state, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (length * width * 4)

    by_head, whole = gradient(tl.one_pass), gradient(tl.one_pass.default)
    assert by_head < whole - 3


@pytest.mark.parametrize('length', [5, 8, 19])
def test_the_gradient_of_a_kernel_is_summed_in_pieces(length, monkeypatch):
    monkeypatch.setattr(slices, 'POSITIONS_TOGETHER', 8)
    x = jax.random.normal(jax.random.key(0), (2, length, 3))
    y = jax.random.normal(jax.random.key(1), (2, 4, length, 5))
    wanted = np.einsum('bld,bhlk->dhk', x, y)
    np.testing.assert_allclose(kernel_gradient(x, y), wanted, rtol=1e-5, atol=1e-5)
