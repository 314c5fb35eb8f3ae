"""Each model: shapes, equality, its number of weights, what it sees, and what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, models, tl, trees
from layercomb.layers.core.mode import Mode
from layercomb.shapes import describe, shape_dtype

V, D, F, N, H, L = 11, 8, 12, 2, 2, 6
TOKENS = (shape_dtype((2, L), 'int32'),)


def lm(**changes):
    return models.TransformerLM(V, D, F, N, H, L, **changes)


def encoder(**changes):
    return models.TransformerEncoder(V, 3, D, F, N, H, L, **changes)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(0, V, (2, L)).astype(np.int32)


def count(layer, signature=TOKENS):
    init = functools.partial(layer.init, signature)
    return trees.count(jax.eval_shape(init, jax.random.key(0))[0])


def init(layer, signature=TOKENS):
    return jax.jit(functools.partial(layer.init, signature))(jax.random.key(0))[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(layer, weights, state, inputs, mode=Mode.EVAL):
    return layer.apply(weights, state, inputs, mode=mode)


BUILDERS = {
    'MLP': lambda: models.MLP((4, 5), 3, 'gelu', 0.1, flatten=True),
    'TransformerLM': lambda: lm(dropout=0.1, ff_chunk_len=2, remat=True),
    'TransformerLM local': lambda: lm(
        attention=[tl.LocalSelfAttention(2, 3), tl.SelfAttention(2)], positions='rotary'
    ),
    'TransformerEncoder': lambda: encoder(masked=True, positions='sinusoidal'),
}


@pytest.mark.parametrize('build', BUILDERS.values(), ids=list(BUILDERS))
def test_a_model_built_twice_is_one_model(build):
    assert build() == build() and hash(build()) == hash(build())
    assert eval(repr(build()), vars(tl)) == build()


def test_output_shapes():
    image = (shape_dtype((2, 4, 3, 1)),)
    assert describe(models.MLP((4,), 3, flatten=True).output_signature(image)) == 'float32[2,3]'
    for positions in ('learned', 'sinusoidal', 'rotary', 'none'):
        layer = lm(positions=positions)
        assert describe(layer.output_signature(TOKENS)) == f'float32[2,{L},{V}]'
    assert describe(encoder().output_signature(TOKENS)) == 'float32[2,3]'
    masked = (*TOKENS, shape_dtype((2, L), bool))
    assert describe(encoder(masked=True).output_signature(masked)) == 'float32[2,3]'


def test_the_number_of_weights_is_that_of_the_formula():
    attention = 4 * (D * D + D)
    feed_forward = D * F + F + F * D + D
    block = attention + feed_forward + 2 * (2 * D)
    body = V * D + N * block + 2 * D
    assert count(lm()) == body + L * D + D * V + V
    assert count(lm(positions='sinusoidal')) == body + D * V + V
    assert count(encoder()) == body + L * D + D * 3 + 3
    assert count(lm(norm=tl.RMSNorm())) == count(lm()) - (2 * N + 1) * D
    assert count(models.MLP((4, 5), 3), (shape_dtype((2, 7)),)) == 8 * 4 + 5 * 5 + 6 * 3
    assert count(lm(dropout=0.1, ff_chunk_len=2, remat=True)) == count(lm())


def test_paths():
    weights = jax.eval_shape(lambda: init(lm()))
    assert list(weights) == ['block', 'embedding', 'head', 'learned_positions', 'norm']
    assert {p for p in trees.flatten(weights) if p.endswith('kernel')} == {
        'block/residual/self_attention/key/kernel',
        'block/residual/self_attention/output/kernel',
        'block/residual/self_attention/query/kernel',
        'block/residual/self_attention/value/kernel',
        'block/residual_1/feed_forward/dense/kernel',
        'block/residual_1/feed_forward/dense_1/kernel',
        'head/kernel',
    }
    remat = jax.eval_shape(lambda: init(lm(remat=True, ff_chunk_len=2)))
    assert jax.tree.map(jnp.shape, remat) == jax.tree.map(jnp.shape, weights)


def test_a_language_model_is_causal_and_decodes():
    rotary = tl.RotaryPositions()
    pattern = (tl.LocalSelfAttention(H, 2, rotary=rotary), tl.SelfAttention(H))
    layer = lm(attention=pattern)
    weights, x = init(layer), tokens()
    (y,), _ = apply(layer, weights, {}, (x,))
    edited = np.concatenate([x[:, :3], tokens(1)[:, 3:]], 1)
    (z,), _ = apply(layer, weights, {}, (edited,))
    np.testing.assert_allclose(z[:, :3], y[:, :3], rtol=1e-6, atol=1e-6)
    assert (np.abs(z[:, 3:] - y[:, 3:]) > 1e-4).any()
    state, made = init_state(layer, TOKENS), []
    for span in ((0, 4), (4, 5), (5, 6)):
        (piece,), state = apply(layer, weights, state, (x[:, slice(*span)],), Mode.PREDICT)
        made.append(piece)
    np.testing.assert_allclose(np.concatenate(made, 1), y, rtol=1e-4, atol=1e-4)


def test_an_encoder_does_not_see_padding():
    layer, x = encoder(masked=True), tokens()
    mask = np.arange(L) < np.array([[L], [3]])
    weights = init(layer, (*TOKENS, shape_dtype((2, L), bool)))
    (y,), _ = apply(layer, weights, {}, (x, mask))
    edited = np.where(mask, x, tokens(1))
    (z,), _ = apply(layer, weights, {}, (edited, mask))
    np.testing.assert_allclose(z, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('n_layers', 'n', 'nearest'), [(7, 2, 8), (5, 3, 6), (1, 4, 4), (0, 1, 1)])
def test_a_pattern_that_does_not_fit_names_the_nearest_depth(n_layers, n, nearest):
    attention = [tl.SelfAttention(2)] * n
    wanted = f'n_layers={n_layers} is no multiple of the {n} .* of the pattern: use {nearest}$'
    with pytest.raises(ValueError, match=wanted):
        models.TransformerLM(V, D, F, n_layers, H, L, attention=attention)


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (
            lambda: models.TransformerLM(V, n_layers='6'),
            'TransformerLM: n_layers must be an int, got',
        ),
        (lambda: lm(positions=['a']), r"TransformerLM: positions must be a str, got \['a'\]"),
        (lambda: lm(remat='no'), "TransformerLM: remat must be a bool, got 'no'"),
        (lambda: models.MLP(128), 'MLP: layer_widths must be a sequence of int, got 128'),
        (
            lambda: models.ReformerLM(V, axial_shape=8),
            'ReformerLM: axial_shape must be a tuple of 2 int or None, got 8',
        ),
        (lambda: models.TransformerLM(vocab=V), "unexpected keyword argument 'vocab'"),
    ],
)
def test_arguments_of_another_type(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_what_models_refuse():
    with pytest.raises(ValueError, match='attention is empty: give a layer, or several'):
        lm(attention=[])
    with pytest.raises(ValueError, match="no positions 'absolute': there are learned, sinusoidal"):
        lm(positions='absolute')
    for wrong in (tl.SelfAttention, [tl.SelfAttention]):
        with pytest.raises(TypeError, match='attention must be a Layer or a sequence of Layer or'):
            lm(attention=wrong)
    with pytest.raises(TypeError, match=r'got <class .*, a class: call it, SelfAttention\(…\)$'):
        lm(attention=tl.SelfAttention)
    with pytest.raises(ValueError, match="no activation 'gleu': there are elu"):
        lm(activation='gleu')
    with pytest.raises(ValueError, match='3 heads do not divide the width 8: use 2'):
        models.TransformerLM(V, D, F, N, 3, L).output_signature(TOKENS)
    for positions in ('learned', 'sinusoidal', 'rotary'):
        with pytest.raises(
            ValueError, match=f'sequence is {L + 1} long and max_len={L}: shorten it'
        ):
            lm(positions=positions).output_signature(shape_dtype((2, L + 1), 'int32'))
    with pytest.raises(TypeError, match=r'takes 2 values off the stack, only 1 was'):
        encoder(masked=True).output_signature(TOKENS)


def test_wrapped_attention_is_told_positions_and_lengths():
    net = models.ReformerLM(
        16, 8, 8, 1, 2, max_len=64, positions='rotary', attention=tl.Remat(tl.LSHSelfAttention(2))
    )
    assert 'max_len=64' in repr(net) and 'rotary=RotaryPositions' in repr(net)
    with pytest.raises(ValueError, match="positions='rotary': no layer of the attention pattern"):
        models.TransformerLM(16, 8, 8, 1, 2, 64, attention=tl.Dense(), positions='rotary')


def test_chunks_change_neither_weights_nor_outputs():
    tokens = jax.random.randint(jax.random.key(0), (1, 20), 0, 16)
    outputs = []
    for chunk_len in (None, 8):
        net = models.ReformerLM(16, 8, 16, 2, 2, max_len=32, chunk_len=4, ff_chunk_len=chunk_len)
        weights, _ = net.init((shape_dtype((1, 20), 'int32'),), jax.random.key(1))
        outputs.append((trees.flatten(weights), net.apply(weights, {}, (tokens,))[0][0]))
    (plain, y), (chunked, z) = outputs
    assert plain.keys() == chunked.keys()
    np.testing.assert_allclose(y, z, atol=1e-5)
