"""Models over prompts in parts: the same as in one piece, whatever their blocks are."""

from __future__ import annotations

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models, tl, transforms
from layercomb.layers.core.mode import Mode
from layercomb.supervised import decoding
from layercomb.supervised.decoding import prompts
from layercomb.supervised.decoding.reading import ingesting, parts

V = 40
PROMPTS = [list(range(1, 36)), [7, 8, 9]]


def tied():
    net = models.TransformerLM(V, 8, 16, 3, 2, max_len=64)
    return transforms.Tied(net, 'head/kernel', 'embedding/table', jnp.transpose)


MODELS = {
    'gpt2': lambda: models.GPT2(V, 8, n_layers=4, n_heads=2, max_len=64),
    'tied': tied,
    'seven blocks': lambda: models.TransformerLM(V, 8, 16, 7, 2, max_len=64),
    'reversible': lambda: models.TerraformerLM(
        V, 8, 16, 4, 2, 64, ff_block_size=4, qkv_modules=2, head_modules=2
    ),
    'hashed': lambda: models.ReformerLM(V, 8, 16, 2, 2, 64, chunk_len=8, positions='rotary'),
    'kinds': lambda: tl.Serial(
        tl.Embedding(V, 8),
        tl.Serial(
            *(
                tl.Residual(tl.LayerNorm(), tl.SelfAttention(2, window=4 if i % 3 else None))
                for i in range(12)
            ),
            name='blocks',
        ),
        tl.Dense(V),
    ),
}


def model(kind):
    return lc.Model(MODELS[kind]()).init(lc.shape_dtype((1, 8), 'int32'), 3)


@pytest.mark.parametrize('kind', MODELS)
def test_parts_compute_what_the_whole_does(kind, monkeypatch):
    start = prompts.begin(model(kind), PROMPTS, 9)
    in_parts = ingesting.ingest(start)
    seen = []
    monkeypatch.setattr(parts, '_row', lambda net: seen.append(net))
    whole = ingesting.ingest(start)
    assert seen
    assert jax.tree.structure(in_parts) == jax.tree.structure(whole)
    for a, b in zip(*map(jax.tree.leaves, (in_parts, whole)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', ['gpt2', 'tied', 'seven blocks', 'reversible', 'kinds'])
def test_these_models_have_parts(kind):
    start = prompts.begin(model(kind), PROMPTS, 9)
    row = parts._row(start.net)
    sizes = {'gpt2': 4, 'tied': 3, 'seven blocks': 1, 'reversible': 4, 'kinds': 6}
    assert {len(group.keys) for group in row.groups} == {sizes[kind]}
    assert len({id(group.program) for group in row.groups}) == 1


def test_blocks_that_are_tied_are_one_program_with_the_rest():
    net = models.TransformerLM(V, 8, 16, 3, 2, max_len=64)
    made = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
    net, weights = lc.unstack(net, made.weights)
    path = next(key for key, _ in net.children if key.startswith('block'))
    shared = transforms.Tied(net, f'{path}/0', f'{path}/1')
    assert parts._row(net) is not None and parts._row(shared) is None
    one = lc.Model(shared, shared.tied(weights), {})
    got = decoding.generate(one, PROMPTS, 3, temperature=0)
    wanted = lc.Model(net, shared.untied(shared.tied(weights)), {})
    np.testing.assert_array_equal(got, decoding.generate(wanted, PROMPTS, 3, temperature=0))


@pytest.mark.parametrize('kind', MODELS)
def test_equal_blocks_have_equal_states(kind):
    net = prompts.begin(model(kind), PROMPTS, 9).net
    signature = (lc.shape_dtype((2, 16), 'int32'),)
    wanted = net.init(signature, jax.random.key(0), Mode.PREDICT)[1]
    got = ingesting.fresh_state(net, {}, signature)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    leaves = jax.tree.leaves(got)
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
    for a, b in zip(leaves, jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class Drawn(tl.Layer):
    """Keeps a number that its key gave."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'number': jax.random.normal(rng, (2,))} if mode is Mode.PREDICT else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, state


class Widened(tl.Layer):
    """Twice as many features, which it keeps."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        width = signature[0].shape[-1]
        return {}, {'last': jnp.zeros(width)} if mode is Mode.PREDICT else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (jnp.concatenate([inputs[0]] * 2, -1),), state

    def init_with_outputs(self, signature, rng, mode):
        (x,) = signature
        outputs = (lc.shape_dtype((*x.shape[:-1], 2 * x.shape[-1]), x.dtype),)
        return outputs, *self.init(signature, rng, mode)


@pytest.mark.parametrize('layer', [Drawn(), Widened()])
def test_blocks_whose_states_differ_keep_their_own(layer):
    net = tl.Serial(tl.Embedding(V, 4), tl.Serial(layer, layer, layer, name='all'), tl.Dense(V))
    signature = (lc.shape_dtype((1, 8), 'int32'),)
    wanted = net.init(signature, jax.random.key(0), Mode.PREDICT)[1]
    got = ingesting.fresh_state(net, {}, signature)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_state_is_not_used_twice():
    made = model('gpt2')
    start = prompts.begin(made, PROMPTS, 9)
    first = ingesting.ingest(start)
    again = ingesting.ingest(start)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_layers_keep_their_hash_to_themselves():
    net = model('gpt2').layer
    assert hash(net) == hash(net) == hash(MODELS['gpt2']())
    assert '_kept_hash' in vars(net) and '_kept_hash' not in net.__getstate__()
    assert pickle.loads(pickle.dumps(tl.Dense(4))) == tl.Dense(4)
