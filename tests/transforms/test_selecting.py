"""`sparse_attention`: the same weights, read by cores that select their keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, models, shape_dtype, tl, transforms, walk
from layercomb.layers.core.mode import Mode

B, L, V = 2, 24, 13
IDS = jax.random.randint(jax.random.key(0), (B, L), 0, V)
ALL = tl.BlockAttention(n_chosen=8, block_len=4)
SIZES = {'d_model': 16, 'd_ff': 32, 'n_layers': 2, 'n_heads': 4, 'max_len': 32}


def llama(**options):
    return models.Llama(V, **SIZES, n_kv_heads=2, **options)


def made(net):
    weights, _ = net.init((shape_dtype(IDS.shape, 'int32'),), jax.random.key(1))
    return weights


def test_all_blocks_chosen_give_what_the_model_gave():
    for net in (llama(), models.TransformerLM(V, **SIZES), llama(qk_norm=True)):
        weights = made(net)
        sparse = transforms.sparse_attention(net, ALL)
        (wanted,), _ = net.apply(weights, {}, (IDS,))
        (got,), _ = sparse.apply(weights, {}, (IDS,))
        np.testing.assert_allclose(got, wanted, atol=2e-5)
        assert jax.tree.structure(made(sparse)) == jax.tree.structure(weights)


def test_few_keys_give_something_else_and_decode_alike():
    net = transforms.sparse_attention(
        llama(), tl.BlockAttention(n_chosen=1, block_len=2, local_len=3, n_sinks=1)
    )
    weights = made(net)
    (wanted,), _ = net.apply(weights, {}, (IDS,))
    (full,), _ = llama().apply(weights, {}, (IDS,))
    assert jnp.abs(full - wanted).max() > 1e-3
    state = init_state(net, (shape_dtype(IDS.shape, 'int32'),), Mode.PREDICT)
    outs = []
    for part in (IDS[:, :9], *jnp.split(IDS[:, 9:], L - 9, 1)):
        (y,), state = net.apply(weights, state, (part,), mode=Mode.PREDICT)
        outs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), wanted, atol=2e-5)


def test_what_the_model_says_of_its_scores_stays():
    attention = tl.SelfAttention(2, causal=False, masked=True, dropout=0.1, scale=0.3, softcap=5.0)
    core = transforms.sparse_attention(attention, tl.HashedAttention(n_buckets=4, n_sinks=2)).core
    assert core == tl.HashedAttention(
        n_buckets=4, n_sinks=2, causal=False, masked=True, dropout=0.1, scale=0.3, softcap=5.0
    )


def test_layers_with_a_window_and_those_not_meant_stay():
    net = tl.Serial(
        tl.SelfAttention(2, window=4, name='near'),
        tl.SelfAttention(2, name='far'),
        tl.SelfAttention(2, name='also_far'),
    )
    sparse = transforms.sparse_attention(net, ALL, where='^far')
    cores = {path: type(x.core) for path, x in walk(sparse) if isinstance(x, tl.SelfAttention)}
    assert cores == {
        'near': tl.DotProductAttention,
        'far': tl.BlockAttention,
        'also_far': tl.DotProductAttention,
    }


@pytest.mark.parametrize(
    ('net', 'core', 'options', 'error', 'message'),
    [
        (tl.Dense(4), ALL, {}, ValueError, 'no attention to all positions in this Dense'),
        (tl.SelfAttention(2), tl.SelfAttention(2), {}, TypeError, 'takes a core that selects'),
        (tl.SelfAttention(2, name='a'), ALL, {'where': 'b'}, ValueError, "matches where='b'"),
        (tl.SelfAttention(2, relative=True), ALL, {}, ValueError, 'adds a bias to scores'),
    ],
)
def test_what_cannot_be_is_refused(net, core, options, error, message):
    with pytest.raises(error, match=message):
        transforms.sparse_attention(net, core, **options)
