"""A language model whose heads share keys and values, everywhere a model goes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import Model, init_state, models, tl, transforms
from layercomb.layers.attention import tiles
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype
from layercomb.supervised import decoding

V, D, L, H, G = 11, 32, 12, 4, 2
TOKENS = (shape_dtype((2, L), 'int32'),)
FULL = tl.SelfAttention(
    H,
    n_kv_heads=G,
    qkv_bias=False,
    out_bias=False,
    query_norm=tl.RMSNorm(),
    key_norm=tl.RMSNorm(),
    rotary=tl.RotaryPositions(),
    softcap=2.0,
)
LAYERS = {
    'full': FULL,
    'local': tl.LocalSelfAttention(H, 4, n_kv_heads=1, rotary=tl.RotaryPositions()),
    'LSH': tl.LSHSelfAttention(
        H, n_kv_heads=G, chunk_len=4, n_buckets=2, n_hashes=2, query_norm=tl.RMSNorm()
    ),
}


def lm(attention):
    return models.TransformerLM(V, D, 64, 2, H, L, attention=attention, positions='none')


def tokens():
    return np.random.default_rng(0).integers(0, V, (2, L)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(net, weights, state, inputs, mode=Mode.EVAL):
    (y,), state = net.apply(weights, state, inputs, mode=mode)
    return y.astype(jnp.float32), state


def init(net):
    return jax.jit(functools.partial(net.init, TOKENS))(jax.random.key(0))[0]


def decoded(net, weights):
    """A prompt and single positions, (2, L, V)."""
    state, made = init_state(net, TOKENS), []
    for start, stop in ((0, 7), *((t, t + 1) for t in range(7, L))):
        y, state = apply(net, weights, state, (tokens()[:, start:stop],), Mode.PREDICT)
        made.append(y)
    return np.concatenate(made, 1)


@pytest.mark.parametrize(
    ('name', 'change'),
    [
        *(('full', change) for change in ('', 'unstack', 'cast', 8, 4, 16)),
        *(('local', change) for change in ('', 'cast', 8)),
        *(('LSH', change) for change in ('', 'cast')),
    ],
)
def test_a_model_decodes_what_it_evaluates(name, change):
    attention = LAYERS[name]
    net = lm(attention)
    weights = init(net)
    wanted, _ = apply(net, weights, {}, (tokens(),))
    if change == 'unstack':
        net, weights = transforms.unstack(net, weights)
    elif change == 'cast':
        net = transforms.cast(net, jnp.bfloat16)
    elif change:
        net, weights = transforms.quantize(net, weights, change, 16, smallest=1)
    got, _ = apply(net, weights, {}, (tokens(),))
    if name != 'LSH' or not change:  # rounding may change the buckets
        limit = {4: 0.5, 8: 0.03, 16: 0.03, 'cast': 0.03}.get(change, 1e-5)
        assert jnp.linalg.norm(got - wanted) <= limit * jnp.linalg.norm(wanted)
        tolerance = 0.05 if change == 'cast' else 3e-4
        np.testing.assert_allclose(decoded(net, weights), got, rtol=tolerance, atol=tolerance)
    residual = init_state(net, TOKENS)['block']['0']['residual']
    (cache,) = (part['core'] for part in residual.values() if 'core' in part)
    assert len(cache.v) == 2 * attention.n_kv_heads
    assert cache.v.dtype == (jnp.bfloat16 if change == 'cast' else jnp.float32)


def test_prompts_of_different_lengths_are_generated_as_alone():
    net = lm(FULL)
    weights = init(net)
    model = Model(net, weights, {})
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    together = decoding.generate(model, prompts, 4, temperature=0)
    for row, prompt in zip(together, prompts, strict=True):
        (alone,) = decoding.generate(model, [prompt], 4, temperature=0)
        np.testing.assert_array_equal(row, alone)


@pytest.mark.parametrize('attention', LAYERS.values(), ids=LAYERS)
def test_reversible_stacks_have_the_plain_gradient(attention, monkeypatch):
    """Forward and backward go head by head, with the dropout masks of all heads at once."""
    monkeypatch.setattr(tiles, 'CPU_BLOCK_LEN', 16)
    half = tl.ReversibleHalfResidual(tl.LayerNorm(), attention.replace(dropout=0.3))
    block = tl.ReversibleSerial(half, tl.ReversibleSwap())
    net = tl.ReversibleRepeat(block, 2)
    inputs = tuple(jax.random.normal(jax.random.key(1), (2, 2, 40, D)))
    weights, _ = net.init(tuple(jax.eval_shape(lambda: inputs)), jax.random.key(0))

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(mode):
        def total(weights, inputs):
            outputs, _ = net.apply(weights, {}, inputs, rng=jax.random.key(2), mode=mode)
            return sum(jnp.sin(y).sum() for y in outputs)

        return jax.value_and_grad(total, (0, 1))(weights, inputs)

    got, wanted = gradient(Mode.TRAIN), gradient(Mode.RECORD)  # `RECORD` is differentiated plainly
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_a_model_says_how_many_heads_are_shared():
    net = models.TransformerLM(V, D, 64, 2, H, L, n_kv_heads=G, positions='rotary')
    weights = init(net)['block']['residual']['self_attention']
    assert weights['key']['kernel'].shape == (2, D, G, D // H)
    assert weights['query']['kernel'].shape == (2, D, H, D // H)
    with pytest.raises(ValueError, match='n_kv_heads=2 is of the default attention: say it in'):
        models.TransformerLM(V, D, 64, 2, H, L, n_kv_heads=G, attention=FULL)
    with pytest.raises(ValueError, match='n_kv_heads=3 does not divide n_heads=4: use 2'):
        models.TransformerLM(V, D, 64, 2, H, L, n_kv_heads=3)


@pytest.mark.parametrize('changes', [{'n_kv_heads': 2}])
def test_sparse_projections_refuse_what_they_cannot_keep(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=f'sparse_qkv: {field}=.* cannot be kept beside sparse'):
        tl.sparse_qkv(tl.SelfAttention(4, **changes), 8)
    assert tl.sparse_qkv(tl.SelfAttention(4, softcap=3.0, scale=0.5), 8).core.softcap == 3.0
