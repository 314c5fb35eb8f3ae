"""What decoding refuses, every entrance refuses: an exported program and its README, too."""

from __future__ import annotations

import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import export, models, tl
from layercomb.errors import UsageError
from layercomb.interop.safetensors import load_weights, save_weights
from layercomb.layers.core.mode import Mode
from layercomb.supervised import decoding

V, ROOM = 32, 12
NET = models.TransformerLM(V, 8, 8, 1, 2, max_len=64, positions='rotary')


def made(net, mode=Mode.TRAIN, length=8):
    return lc.Model(net).init(lc.shape_dtype((1, length), 'int32'), rng=3, mode=mode)


MODEL = made(NET)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('exported') / 'out'
    export.write(MODEL, out, '', batch_size=np.int64(2), max_len=jnp.int32(ROOM))
    return out


def readme(folder):
    """What the code of its README defines."""
    (code,) = re.findall(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)
    names: dict = {}
    here = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(here)
    return names


@pytest.fixture(scope='module')
def names(folder):
    return readme(folder)


def test_the_readme_decodes_to_the_end_of_its_caches_and_no_further(names):
    right = decoding.generate(MODEL, [[5, 6, 7]], 20, temperature=0)[0].tolist()
    assert names['continued']([5, 6, 7], ROOM - 2) == right[: ROOM - 2]  # the last is not read
    assert names['continued'](np.uint8([5, 6, 7]), 2) == right[:2]
    for n in (ROOM - 1, 20, 10**9):
        with pytest.raises(ValueError, match=f'the caches hold {ROOM} positions, and 3 tokens'):
            names['continued']([5, 6, 7], n)
    assert len(names['continued'](list(range(ROOM)), 1)) == 1
    with pytest.raises(ValueError, match='the caches hold'):
        names['continued'](list(range(ROOM + 1)), 1)


@pytest.mark.parametrize(
    ('prompt', 'n_tokens', 'said'),
    [
        ([], 3, 'at least one token id, and ask for at least one'),
        ([5], 0, 'ask for at least one'),
        ([5], -1, 'ask for at least one'),
        ([5.5], 3, 'at least one token id'),
        ([True], 3, 'at least one token id'),
        ([[5]], 3, 'at least one token id'),
        ('abc', 3, 'at least one token id'),
        ([5, V], 3, f'outside the vocabulary of {V}'),
        ([-1], 3, f'outside the vocabulary of {V}'),
    ],
)
def test_what_the_readme_refuses(names, prompt, n_tokens, said):
    with pytest.raises(ValueError, match=said):
        names['continued'](prompt, n_tokens)


def test_weights_that_diverged_give_no_token(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = jax.tree.map(lambda x: x * jnp.nan, load_weights(folder / 'model.safetensors'))
    save_weights(tmp_path / 'model.safetensors', weights)
    with pytest.raises(ValueError, match='the logits are NaN or infinite after position 1'):
        readme(tmp_path)['continued']([5, 6], 3)


def steps(names, rows):
    """Logits (T, B, V) of the program, for tokens (T, B)."""
    state, out = names['start'](), []
    for row in rows:
        logits, state = names['step'](names['weights'], state, np.int32(row)[:, None])
        out.append(np.asarray(logits))
    return np.array(out)


def test_past_its_room_the_program_gives_nan_for_good(names):
    logits = steps(names, [[5, 6]] * (ROOM + 3))
    assert np.isfinite(logits[:ROOM]).all() and np.isnan(logits[ROOM:]).all()


def test_an_id_outside_the_vocabulary_makes_its_row_nan_and_no_other(names):
    right = steps(names, [[5, 6], [7, 8], [9, 10]])
    for wrong in (V, -1, 2**31 - 1):
        logits = steps(names, [[5, 6], [wrong, 8], [9, 10]])
        assert np.isnan(logits[1:, 0]).all()
        np.testing.assert_array_equal(logits[:, 1], right[:, 1])


def one_hot(ids):
    return jax.nn.one_hot(ids, V)


KEEPS_NOTHING = {
    'embedding': tl.Serial(tl.Embedding(V, 8), tl.Dense(V)),
    'one-hot': tl.Serial(tl.Fn('OneHot', one_hot, position_wise=True), tl.Dense(V)),
    'statistics': tl.Serial(tl.Embedding(V, 8), tl.BatchNorm(), tl.Dense(V)),
    'one-hot and attention': tl.Serial(
        tl.Fn('OneHot', one_hot, position_wise=True), tl.SelfAttention(2), tl.Dense(V)
    ),
    'a smaller embedding': tl.Serial(tl.Embedding(V, 8), tl.Dense(V + 9)),
}


@pytest.mark.parametrize('name', KEEPS_NOTHING)
def test_nan_is_for_good_whatever_the_model_keeps(name):
    """Without caches nothing in the model knows of the room, or of what was read before."""
    model = made(KEEPS_NOTHING[name])
    programs = export.decode_programs(model, 2, 4)
    weights, step = lc.trees.flatten(model.weights), programs['decode_step'].call

    def finite(rows):
        state, out = programs['decode_init'].call(), []
        for row in rows:
            logits, state = step(weights, state, np.int32(row)[:, None])
            out.append(np.isfinite(np.asarray(logits)))
        assert all(len(set(row)) == 1 for x in out for row in x.tolist())
        return [x[:, 0].tolist() for x in out]

    assert finite([[1, 2]] * 6) == [[True, True]] * 4 + [[False, False]] * 2
    for wrong in (V, V + 5, -1, 2**31 - 1, -(2**31)):
        made_finite = finite([[1, 2], [wrong, 2], [1, 2], [1, 2]])
        assert made_finite == [[True, True]] + [[False, True]] * 3
    state = programs['decode_init'].call()
    logits, _ = step(weights, state, np.int32([[1], [2]]))
    right = model(np.int32([[1]]))[0, 0]
    np.testing.assert_allclose(logits[0], right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'tokens', [np.zeros((1, 1), np.int32), np.zeros((2, 2), np.int32), np.zeros((2, 1), np.float32)]
)
def test_tokens_of_another_shape_or_type_are_refused(names, tokens):
    with pytest.raises(ValueError, match='ismatch for args'):
        names['step'](names['weights'], names['start'](), tokens)


def test_what_the_layout_says(folder):
    layout = json.loads((folder / 'decode_step.json').read_text())
    assert layout['max_len'] == ROOM and layout['vocab_size'] == V
    assert layout['tokens'] == {'shape': [2, 1], 'dtype': 'int32'}
    assert 'is\n  2, and the state has room for 12' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('wrong', [0, -1, True, 2.0, '2'])
def test_sizes_of_an_export(wrong, tmp_path):
    for name in ('batch_size', 'max_len'):
        with pytest.raises((TypeError, ValueError), match=f'{name} must be (at least 1|an int)'):
            export.write(MODEL, tmp_path / 'out', '', **{name: wrong})
        with pytest.raises((TypeError, ValueError), match=f'{name} must be (at least 1|an int)'):
            export.decode_programs(MODEL, **{name: wrong})
    assert not list(tmp_path.iterdir())


NO_LANGUAGE_MODEL = {
    'a class for each row': (tl.Embedding(V, 8), tl.Mean(axis=1), tl.Dense(4)),
    'two outputs': (tl.Embedding(V, 8), tl.Dense(V), tl.Dup()),
    'integers': (tl.Embedding(V, 8), tl.Fn('Best', lambda x: x.argmax(-1, keepdims=True))),
}


@pytest.mark.parametrize('name', NO_LANGUAGE_MODEL)
def test_what_is_no_language_model_is_not_decoded(name):
    model = made(tl.Serial(*NO_LANGUAGE_MODEL[name]))
    for use in (
        lambda: decoding.generate(model, [[1]], 3),
        lambda: next(decoding.stream(model, [[1]], 3)),
        lambda: decoding.beam_search(model, [[1]], 3),
        lambda: export.decode_programs(model),
    ):
        with pytest.raises(UsageError, match=r'needs a language model, .* this one makes \w+\['):
            use()


def test_what_a_head_reads_is_not_called_logits():
    model = made(tl.Serial(*NO_LANGUAGE_MODEL['a class for each row']))
    said = r'before its last layer this one makes float32\[1, 8\]'
    with pytest.raises(UsageError, match=said):
        decoding.generate(model, [[1]], 3)


# All that keeps positions


def lm(*layers):
    return tl.Serial(tl.Embedding(V, 8), *layers, tl.Dense(V))


HASHED = {'n_hashes': 2, 'chunk_len': 4, 'n_buckets': 4}
KEEPS = {
    'attention': lm(tl.SelfAttention(2)),
    'rotary': models.TransformerLM(V, 8, 8, 1, 2, max_len=64, positions='rotary'),
    'local': lm(tl.LocalSelfAttention(2, chunk_len=4)),
    'hashed': lm(tl.LSHSelfAttention(2, **HASHED)),
    'hashed by chunks': lm(tl.LSHSelfAttention(2, neighbourhood='chunk', **HASHED)),
    'sparse': lm(tl.SparseQKVAttention(n_heads=2, n_modules=2)),
    'recurrent': lm(tl.SRU(8)),
    'convolution': lm(tl.Conv1D(8, 3, padding='causal')),
    'learned': lm(tl.LearnedPositions(6)),
    'sinusoidal': lm(tl.SinusoidalPositions(max_len=6)),
    'axial': lm(tl.AxialPositions((2, 3), (4, 4))),
    'many layers': lm(tl.Repeat(tl.Residual(tl.LayerNorm(), tl.SelfAttention(2)), 2)),
    'reversible': models.ReformerLM(V, 8, 8, 2, 2, max_len=64),
}


STACKED = {'many layers', 'reversible'}  # of what is tried by itself


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n in STACKED)) for n in KEEPS]
)
def test_past_its_room_a_cache_gives_nan_compiled_and_is_refused_at_a_prompt(name):
    model, net = made(KEEPS[name], Mode.PREDICT, 6), KEEPS[name]
    step = jax.jit(lambda weights, state, x: net.apply(weights, state, (x,), mode=Mode.PREDICT))
    state, token = model.state, jnp.int32([[1]])
    finite = []
    for _ in range(8):
        (logits,), state = step(model.weights, state, token)
        finite.append(bool(jnp.isfinite(logits).all()))
    assert finite == [True] * 6 + [False] * 2
    for _ in range(6):
        model(token, mode=Mode.PREDICT)
    before = jax.tree.map(np.asarray, model.state)
    with pytest.raises(ValueError, match=r'holds 6 positions, 6 are taken and 1 more|is 7 long'):
        model(token, mode=Mode.PREDICT)
    jax.tree.map(np.testing.assert_array_equal, model.state, before)
    with pytest.raises(ValueError, match=r'holds 6 positions, 6 are taken and 1 more|is 7 long'):
        net.apply(model.weights, model.state, (token,), mode=Mode.PREDICT)


# What else decoding is given


def test_a_stream_goes_on_with_the_weights_that_it_began_with():
    model = made(NET)
    right = decoding.generate(model, [[5, 6]], 6, temperature=0)[:, :6]
    stream = decoding.stream(model, [[5, 6]], 6, temperature=0)
    first = next(stream)
    model.weights = jax.tree.map(lambda x: x * 0, model.weights)
    model.layer = tl.Dense(3)
    assert [first.tolist(), *(t.tolist() for t in stream)] == right.T.tolist()


def test_keys_of_the_old_kind_and_seeds_of_any_kind_draw_the_same():
    right = decoding.generate(MODEL, [[5, 6]], 6, rng=7).tolist()
    for rng in (jax.random.key(7), jax.random.PRNGKey(7), np.int64(7), jnp.int32(7), np.array(7)):
        assert decoding.generate(MODEL, [[5, 6]], 6, rng=rng).tolist() == right
        streamed = decoding.stream(MODEL, [[5, 6]], 6, rng=rng)
        assert [t.tolist() for t in streamed] == np.transpose(right).tolist()


@pytest.mark.parametrize(
    'rng',
    [jax.random.split(jax.random.key(0)), jnp.float32(1), jnp.uint32([1, 2, 3]), 1.0, True, '1'],
    ids=lambda rng: str(rng)[:20],
)
def test_what_is_no_key(rng):
    for draw in (decoding.generate, decoding.stream):
        with pytest.raises(ValueError, match='rng'):
            draw(MODEL, [[5]], 2, rng=rng)


@pytest.mark.parametrize(
    'wrong', [5, None, [5], 'abc', [[]], [[5.0]], [[True]], [[[5]]], [[5, [6]]]]
)
def test_prompts_that_are_none(wrong):
    for use in (decoding.generate, decoding.stream, decoding.beam_search):
        with pytest.raises(UsageError, match='a list of'):
            use(MODEL, wrong, 2)
    with pytest.raises(UsageError, match='a list of'):
        decoding.score(MODEL, wrong)


@pytest.mark.parametrize(
    ('how', 'said'),
    [
        ({'n_tokens': 0}, 'n_tokens must be at least 1, got 0'),
        ({'n_tokens': 62}, "make 65, and the model's max_len is 64"),
        ({'prompts': [[1, V]]}, f'outside the vocabulary of {V}'),
        ({'eos_id': V}, 'the eos_id does not fit the model'),
        ({'eos_id': 1.0}, r'eos_id must be an int, got 1\.0'),
        ({'inputs': [[1]]}, 'give a language model prompts alone'),
    ],
)
def test_every_way_to_decode_refuses_the_same(how, said):
    for use in (decoding.generate, decoding.stream, decoding.beam_search):
        with pytest.raises((TypeError, ValueError, UsageError), match=said):
            use(MODEL, **{'prompts': [[1, 2, 3]], 'n_tokens': 2, **how})


@pytest.mark.parametrize('temperature', [float('nan'), np.float32('inf'), -1, True, 'hot', None])
def test_temperatures_that_are_none(temperature):
    for draw in (decoding.generate, decoding.stream):
        said = 'temperature must be (at least 0 and finite|a number), got'
        with pytest.raises((TypeError, ValueError), match=said):
            draw(MODEL, [[5]], 2, temperature=temperature)
