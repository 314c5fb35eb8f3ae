"""`stretch`: the same weights, for longer sequences."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import Model, init_state, models, shape_dtype, tl, transforms, walk
from layercomb.layers.core.mode import Mode
from layercomb.supervised import decoding

SIZES = {'d_model': 16, 'd_ff': 32, 'n_layers': 2, 'n_heads': 4}
IDS = jax.random.randint(jax.random.key(0), (2, 48), 0, 13)


def llama(max_len, **more):
    return models.Llama(13, **SIZES, n_kv_heads=2, max_len=max_len, **more)


def test_it_is_the_model_that_was_made_longer_and_decodes_so():
    net = transforms.stretch(llama(16), 48)
    scaling = tl.YarnScaling(3.0, 16)
    assert net == llama(48, scaling=scaling)
    weights, _ = llama(16).init((shape_dtype((2, 16), 'int32'),), jax.random.key(1))
    (wanted,), _ = llama(48, scaling=scaling).apply(weights, {}, (IDS,))
    (got,), _ = net.apply(weights, {}, (IDS,))
    np.testing.assert_array_equal(got, wanted)
    state = init_state(net, (shape_dtype(IDS.shape, 'int32'),), Mode.PREDICT)
    outs = []
    for part in (IDS[:, :30], *jnp.split(IDS[:, 30:], 18, 1)):
        (y,), state = net.apply(weights, state, (part,), mode=Mode.PREDICT)
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), wanted, atol=2e-5)


def test_a_scaling_of_ones_own_takes_the_place_of_another():
    linear = tl.LinearScaling(4.0)
    net = transforms.stretch(llama(16, scaling=tl.LinearScaling(2.0)), 64, linear)
    assert net == llama(64, scaling=linear)


def test_a_model_that_selects_its_keys_is_stretched_too():
    core = tl.BlockAttention(n_chosen=2, block_len=4, n_sinks=1)
    both = transforms.stretch(transforms.sparse_attention(llama(16), core), 48)
    assert both == transforms.sparse_attention(transforms.stretch(llama(16), 48), core)


@pytest.mark.parametrize(
    'attention',
    [
        tl.HashedSelfAttention(4, chunk_len=2),
        tl.MixedSelfAttention(4, chunk_len=2),
        tl.BlockSelfAttention(4, block_len=2),
        tl.LSHSelfAttention(4, chunk_len=4),
    ],
)
def test_models_made_with_attention_that_selects_keep_their_buckets(attention):
    make = functools.partial(
        models.TransformerLM, 13, **SIZES, max_len=16, positions='rotary', attention=attention
    )
    net = transforms.stretch(make(), 48)
    weights, _ = make().init((shape_dtype((2, 16), 'int32'),), jax.random.key(1))
    (y,), _ = net.apply(weights, {}, (IDS,))
    assert y.shape == (2, 48, 13)
    assert decoding.max_len(net) == 48
    assert np.asarray(decoding.generate(Model(net, weights), IDS[:1, :20], 4)).size in (4, 24)
    short, long = ([x for _, x in walk(n) if hasattr(x, 'bucket_dtype')] for n in (make(), net))
    for a, b in zip(short, long, strict=True):
        assert a.factors(16) == b.factors(48)


@pytest.mark.parametrize(
    ('net', 'max_len', 'message'),
    [
        (llama(16), 16, 'max_len=16 is no more than the 16 positions'),
        (llama(16, scaling=tl.LinearScaling(2.0)), 32, 'scaled already, by LinearScaling'),
        (models.TransformerLM(13, **SIZES, max_len=16), 32, 'TransformerLM|Serial'),
        (llama(16), 0, 'max_len must be'),
        (
            tl.SelfAttention(2, rotary=tl.RotaryPositions()),
            32,
            'no rotary positions with a max_len',
        ),
    ],
)
def test_what_cannot_be_stretched_is_refused(net, max_len, message):
    with pytest.raises(ValueError, match=message):
        transforms.stretch(net, max_len)
