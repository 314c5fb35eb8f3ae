"""A cache against recomputing: logits of 300 random tokens, of every model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import Mode, models, tl, trees

V, LENGTH, PROMPT, SOURCE = 19, 300, 70, 37
SIZES = (16, 32, 2, 2)  # d_model, d_ff, layers, heads
LSH = tl.LSHSelfAttention(2, n_hashes=2, chunk_len=16)
OFF = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}
SPARSE = {'ff_block_size': 8, 'qkv_modules': 4, 'head_modules': 2}


def transformer(**more):
    return models.TransformerLM(V, *SIZES, max_len=320, **more)


def reformer(**more):
    return models.ReformerLM(V, *SIZES, max_len=320, chunk_len=16, n_hashes=2, **more)


def terraformer(**more):
    return models.TerraformerLM(V, *SIZES, max_len=320, **{**OFF, **more})


def recurrent():
    return tl.Serial(tl.Embedding(V, 16), tl.Repeat(tl.Residual(tl.SRU()), 2), tl.Dense(V))


MODELS = {
    'dense': transformer,
    'local': functools.partial(
        transformer, attention=tl.LocalSelfAttention(2, 16), positions='rotary'
    ),
    'reversible, lsh': reformer,
    'sparse': functools.partial(terraformer, **SPARSE),
    'recurrent': recurrent,
}
SLOW = {
    'sinusoidal': functools.partial(transformer, positions='sinusoidal'),
    'local and dense': functools.partial(
        transformer, attention=(tl.LocalSelfAttention(2, 16, look_back=2), tl.SelfAttention(2))
    ),
    'local and lsh': functools.partial(
        reformer, attention=(tl.LocalSelfAttention(2, 16), LSH), positions='rotary'
    ),
    'lsh, once': functools.partial(reformer, attention=LSH.replace(duplicates='once')),
    'sparse lsh': functools.partial(terraformer, **SPARSE, attention=LSH),
    'sru for feed-forwards': functools.partial(terraformer, d_sru=8),
}


def weights_of(net, signature):
    """Initial weights; embeddings large enough for attention to choose by them."""
    weights, state = jax.jit(net.init)(signature, jax.random.key(0))
    larger = trees.map_with_path(lambda p, w: 30 * w if 'embedding' in p else w, weights)
    return larger, state


def tokens_of(n, key):
    return jax.random.randint(jax.random.key(key), (1, n), 0, V)


@functools.partial(jax.jit, static_argnums=0)
def decoded(net, weights, context, tokens):
    """Logits of a prompt at once, and of what follows it one by one."""
    around, *mask = context or (None,)

    def inputs(tokens):
        return (tokens,) if around is None else (around, tokens, *mask)

    state = net.init(lc.signature_of(inputs(tokens)), jax.random.key(0), Mode.PREDICT)[1]
    given = inputs(tokens[:, :PROMPT])
    (first,), state = net.apply(weights, state, given, mode=Mode.PREDICT)

    def step(state, token):
        (logits,), state = net.apply(weights, state, inputs(token[None]), mode=Mode.PREDICT)
        return state, logits[:, 0]

    _, rest = jax.lax.scan(step, state, tokens[0, PROMPT:, None])
    return jnp.concatenate([first, rest.swapaxes(0, 1)], 1)


def check(net, context=()):
    tokens = tokens_of(LENGTH, 1)
    around, *mask = context or (None,)
    inputs = (tokens,) if around is None else (around, tokens, *mask)
    weights, state = weights_of(net, lc.signature_of(inputs))
    (whole,), _ = jax.jit(functools.partial(net.apply, mode=Mode.EVAL))(weights, state, inputs)
    made = decoded(*lc.unstack(net, weights), context, tokens)
    np.testing.assert_allclose(made, whole, atol=1e-4 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize('kind', MODELS)
def test_decoding_is_evaluation(kind):
    check(MODELS[kind]())


@pytest.mark.slow
@pytest.mark.parametrize('kind', SLOW)
def test_decoding_is_evaluation_for_more_models(kind):
    check(SLOW[kind]())


def seq2seq(make, **more):
    return make(V, 16, 32, 1, 2, 2, max_len=400, masked=True, **more)


ENCODER_DECODERS = {
    'reformer': functools.partial(seq2seq, models.Reformer, chunk_len=16, n_hashes=2),
    'terraformer': functools.partial(seq2seq, models.Terraformer, **SPARSE),
    'terraformer, lsh': functools.partial(
        seq2seq,
        models.Terraformer,
        **OFF,
        decoder_attention=LSH.replace(masked=True),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', ENCODER_DECODERS)
def test_decoding_is_evaluation_after_an_encoder(kind):
    mask = jnp.arange(SOURCE)[None] < SOURCE - 6
    check(ENCODER_DECODERS[kind](), (tokens_of(SOURCE, 2), mask))
