"""Training, evaluation and decoding under the settings of JAX that programs have.

A setting may change how numbers are drawn or computed. It never changes what is right: a decoded
token is the likeliest of an evaluation, the score of a hypothesis is that of its tokens, and a loss
is what NumPy makes of the logits.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import export, models, tl
from layercomb.data import ByteTokenizer
from layercomb.serving.engine import Engine
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Request
from layercomb.supervised import EvalTask, Loop, TrainTask, decoding
from layercomb.supervised.decoding import Sampler

V, L, B, D = 12, 8, 2, 8

# What the conftest sets, and what JAX begins with, so that a row is one step from either.
SETTINGS: dict[str, dict[str, Any]] = {
    'the defaults': {'jax_debug_key_reuse': False, 'jax_numpy_dtype_promotion': 'standard'},
    'float64': {'jax_enable_x64': True},
    'float64, dtypes promoted': {'jax_enable_x64': True, 'jax_numpy_dtype_promotion': 'standard'},
    'no rank promotion': {'jax_numpy_rank_promotion': 'raise'},
    'keys of rbg': {'jax_default_prng_impl': 'rbg'},
    'keys of unsafe_rbg': {'jax_default_prng_impl': 'unsafe_rbg'},
    'threefry of old': {'jax_threefry_partitionable': False},
    'NaN is an error': {'jax_debug_nans': True},
    'no jit': {'jax_disable_jit': True},
    'products in bfloat16': {'jax_default_matmul_precision': 'bfloat16'},
    'products in full': {'jax_default_matmul_precision': 'highest'},
    'leaks are looked for': {'jax_check_tracer_leaks': True},
    'JAX checks itself': {'jax_enable_checks': True},
    'softmax of old': {'jax_softmax_custom_jvp': False},
    'keys must be typed': {'jax_legacy_prng_key': 'error'},
    'all at once': {
        'jax_enable_x64': True,
        'jax_numpy_rank_promotion': 'raise',
        'jax_default_prng_impl': 'rbg',
        'jax_debug_nans': True,
        'jax_default_matmul_precision': 'highest',
    },
}


# Each whenever the suite runs; the others, which change less, among the slow tests.
ALWAYS = {
    'float64',
    'no rank promotion',
    'keys of rbg',
    'NaN is an error',
    'all at once',
}

# Those that reach into what a program computes; the others change how it is made or drawn.
THOROUGH = {'float64', 'no rank promotion', 'NaN is an error', 'all at once'}


@contextlib.contextmanager
def setting(values):
    """Sets JAX as a program does at its top, for all threads, and back."""
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def plain() -> tl.Layer:
    return tl.Serial(
        tl.Embedding(V, D),
        tl.LearnedPositions(L),
        tl.Dropout(0.1),
        tl.Residual(tl.LayerNorm(), tl.SelfAttention(2)),
        tl.BatchNorm(),
        tl.Dense(V, name='head'),
    )


def sparse() -> tl.Layer:
    half = tl.ReversibleHalfResidual
    return tl.Serial(
        tl.Embedding(V, D),
        tl.Residual(tl.LocalSelfAttention(2, 4, rotary=tl.RotaryPositions())),
        tl.Residual(tl.RMSNorm(), tl.SwitchFF(8, 2)),
        tl.Residual(tl.RMSNorm(), tl.MixtureFF(8, 4, 2)),
        tl.Dup(),
        tl.ReversibleSerial(
            half(tl.LSHSelfAttention(2, n_hashes=2, chunk_len=4, n_buckets=2)),
            tl.ReversibleSwap(),
            half(tl.SparseFF(8, 4)),
        ),
        tl.Add(),
        tl.Dense(V, name='head'),
    )


class Data:
    """Two batches; the next token is the one after, and some positions are padding.

    Of 64 bits, which is what NumPy makes.
    """

    def __iter__(self):
        made = np.random.default_rng(0)
        for _ in range(2):
            x = made.integers(0, V, (B, L))
            yield x, (x + 1) % V, (made.random((B, L)) < 0.8).astype(np.float64)


def trained(layer: tl.Layer) -> tuple[Loop, dict[str, Any]]:
    # Adam makes a whole step of a gradient that is rounding alone, unless epsilon is above that.
    adamw = optax.adamw(1e-2, eps=1e-3)
    task = TrainTask(Data(), tl.CrossEntropyLoss(), adamw, clip_norm=1.0)
    tests = EvalTask(Data(), (tl.CrossEntropyLoss(), tl.Accuracy()))
    loop = Loop(layer, task, tests, progress=False, log_every=1, eval_every=None)
    return loop, loop.run(2)


def log_probabilities(model: lc.Model, tokens: Any) -> np.ndarray:
    """Of each next token, after (B, L) tokens."""
    logits = np.asarray(model(np.asarray(tokens, np.int32)), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def continued(model: lc.Model, prompt: list[int], n_tokens: int) -> list[int]:
    """The likeliest tokens, each by an evaluation of all before it; the model looks back alone."""
    tokens = list(prompt)
    for _ in range(n_tokens):
        padded = [tokens + [0] * (L - len(tokens))]
        tokens.append(int(log_probabilities(model, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def check_measured(model: lc.Model, row: dict[str, Any]) -> None:
    """The loss and the accuracy of an evaluation, by NumPy."""
    loss = right = weight = 0.0
    for x, y, w in Data():
        made = log_probabilities(model, x)
        loss -= (np.take_along_axis(made, y[..., None], -1)[..., 0] * w).sum()
        right += ((made.argmax(-1) == y) * w).sum()
        weight += w.sum()
    np.testing.assert_allclose(row['valid/loss'], loss / weight, rtol=1e-4)
    np.testing.assert_allclose(row['valid/accuracy'], right / weight, rtol=1e-6)


def check_decoded(model: lc.Model, n_tokens: int = 3) -> None:
    prompts = [[1, 2, 3], [4, 5]][: n_tokens - 1]
    greedy = decoding.generate(model, prompts, n_tokens, temperature=0)
    assert greedy.tolist() == [continued(model, prompt, n_tokens) for prompt in prompts]
    if n_tokens < 3:
        return
    streamed = np.stack(list(decoding.stream(model, prompts, 2, temperature=0)), 1)
    np.testing.assert_array_equal(streamed, greedy[:, :2])
    ones = [decoding.generate(model, prompts, 1, top_k=1, rng=3), greedy[:, :1]]
    np.testing.assert_array_equal(*ones)  # one token is left to draw


def check_scored(model: lc.Model) -> None:
    best = decoding.beam_search(model, [[1, 2, 3]], 2, n_beams=2, n_best=2, length_penalty=0)
    texts = [[1, 2, 3, *tokens] for tokens in best.tokens[0].tolist()]
    scores = decoding.score(model, texts, n_given=3)
    padded = np.pad(texts, ((0, 0), (0, L - 5)))
    made = log_probabilities(model, padded)
    wanted = [sum(made[i, t - 1, text[t]] for t in (3, 4)) for i, text in enumerate(texts)]
    np.testing.assert_allclose(best.scores[0], wanted, rtol=1e-4)
    np.testing.assert_allclose(scores.totals, wanted, rtol=1e-4)


def dtypes(tree: Any) -> set[str]:
    return {str(x.dtype) for x in jax.tree.leaves(tree)}


@functools.cache
def by_default() -> dict[str, Any]:
    return trained(plain())[1]


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow) for n in SETTINGS]
)
def test_training_evaluation_and_decoding(name):
    wanted = by_default()
    with setting(SETTINGS[name]):
        loop, row = trained(plain())
        model = lc.Model(plain(), loop.weights, loop.state)
        check_measured(model, row)
        check_decoded(model, 2 if name == 'no jit' else 3)  # which takes its time
        if name in THOROUGH:
            check_scored(model)
        assert dtypes((loop.weights, loop.state, loop.opt_state)) <= {'float32', 'int32'}
    if 'rbg' in SETTINGS[name].get('jax_default_prng_impl', ''):
        assert row['valid/loss'] != wanted['valid/loss']  # other keys, other weights
    elif 'jax_threefry_partitionable' not in SETTINGS[name]:
        same = {key: value for key, value in row.items() if 'per_second' not in key}
        near = {key: pytest.approx(wanted[key], rel=1e-4) for key in same}
        assert same == near


@pytest.mark.slow
def test_sparse_and_reversible_layers_under_all_settings_at_once():
    with setting(SETTINGS['all at once']):
        loop, row = trained(sparse())
        model = lc.Model(sparse(), loop.weights, loop.state)
        check_measured(model, row)
        prompt = [[1, 2, 3]]
        greedy = decoding.generate(model, prompt, 3, temperature=0)
        assert greedy[0].tolist() == continued(model, prompt[0], 3)
        assert dtypes((loop.weights, loop.state, loop.opt_state)) <= {'float32', 'int32'}


MIXED = tl.Serial(
    tl.Conv1D(D, padding='causal'),
    tl.LocalConv(2, (2, 3)),
    tl.Residual(tl.LayerNorm(), tl.SelfAttention(2)),
    tl.BatchNorm(),
    tl.Dense(V),
)


@pytest.mark.parametrize('of_weights', ['float16', 'bfloat16', 'float64'])
@pytest.mark.parametrize('of_inputs', ['float16', 'bfloat16', 'float64'])
def test_weights_and_inputs_of_other_dtypes(of_weights, of_inputs):
    x = np.random.default_rng(0).normal(size=(B, L, D)).astype(np.float32)
    model = lc.Model(MIXED).init(x)
    wanted = model(x)
    narrow = {'float16', 'bfloat16'} & {of_weights, of_inputs}
    with setting({'jax_enable_x64': True, 'jax_numpy_dtype_promotion': 'standard'}):
        weights = jax.tree.map(lambda w: jnp.asarray(w, of_weights), model.weights)
        got = lc.Model(MIXED, weights, model.state)(jnp.asarray(x, of_inputs))
        assert got.dtype == jnp.promote_types(of_weights, of_inputs)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), wanted, atol=0.05 if narrow else 1e-5
        )


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize('name', ['float64', pytest.param('all at once', marks=pytest.mark.slow)])
def test_a_model_cast_to_few_bits_decodes_what_it_evaluates(dtype, name):
    with setting(SETTINGS[name]):
        model = lc.Model(lc.cast(plain(), dtype)).init(lc.shape_dtype((B, L), 'int64'))
        assert dtypes((model.weights, model.state)) == {'float32'}
        prompts = [[1, 2, 3], [4, 5]]
        greedy = decoding.generate(model, prompts, 2, temperature=0)
        assert greedy.tolist() == [continued(model, prompt, 2) for prompt in prompts]


def test_a_setting_for_one_thread_leaves_nothing_behind_for_the_next():
    model = lc.Model(plain()).init(lc.shape_dtype((B, L), 'int32'))
    made = []
    for context in (jax.enable_x64(True), contextlib.nullcontext(), jax.enable_x64(True)):
        with context:
            made.append(decoding.generate(model, [[1, 2, 3]], 2, temperature=0).tolist())
    assert made == [[continued(model, [1, 2, 3], 2)]] * 3


def test_a_run_with_keys_of_rbg_goes_on_as_if_it_had_not_stopped(tmp_path):
    adamw, whole = optax.adamw(1e-2), []
    net = tl.Serial(tl.Embedding(V, D), tl.Dropout(0.3), tl.Dense(V))
    for stops in ((2,), (1, 2)):
        directory = tmp_path / str(len(stops))
        for stop in stops:
            with setting(SETTINGS['keys of rbg']):
                task = TrainTask(Data(), tl.CrossEntropyLoss(), adamw)
                loop = Loop(net, task, output_dir=directory, progress=False)
                loop.run(stop)
        whole.append(loop.weights)
    jax.tree.map(np.testing.assert_array_equal, *whole)


def test_a_checkpoint_made_without_x64_is_read_with_it(tmp_path):
    net = tl.Serial(tl.Embedding(V, D), tl.Dropout(0.3), tl.Dense(V))
    ends = []
    for name, wide in (('without', False), ('with', True)):
        for stop, x64 in ((1, False), (2, wide)):
            with setting({'jax_enable_x64': x64}):
                task = TrainTask(Data(), tl.CrossEntropyLoss(), optax.sgd(0.1))
                loop = Loop(net, task, output_dir=tmp_path / name, progress=False)
                loop.run(stop)
        ends.append(loop.weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *ends)
    assert dtypes(ends) == {'float32'}


def test_a_model_saved_with_x64_is_loaded_without(tmp_path):
    net = tl.Serial(tl.Dense(3), tl.BatchNorm())
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    with setting({'jax_enable_x64': True}):
        model = lc.Model(net).init(x)
        model.save(tmp_path / 'saved')
        wanted = model(x)
    again = lc.Model(net).init(x, 1).load(tmp_path / 'saved')
    np.testing.assert_allclose(again(x), wanted, rtol=1e-6)


def test_decoding_past_the_room_says_so_where_NaN_is_an_error():
    model = lc.Model(tl.SelfAttention(1)).init(lc.shape_dtype((1, 1, 2)), mode=lc.Mode.PREDICT)
    x = np.ones((1, 1, 2), np.float32)
    with setting(SETTINGS['NaN is an error']):
        model(x, mode=lc.Mode.PREDICT)
        with pytest.raises(ValueError, match='the cache holds 1 positions, 1 are taken'):
            model(x, mode=lc.Mode.PREDICT)


SPARSE = {'ff_block_size': 4, 'qkv_modules': 4, 'head_modules': 2}
MODELS = {
    'MLP': lambda: models.MLP((4, 5), 3),
    'TransformerLM': lambda: models.TransformerLM(V, D, D, 2, 2, 16),
    'TransformerLM, rotary': lambda: models.TransformerLM(V, D, D, 2, 2, 16, positions='rotary'),
    'TransformerEncoder': lambda: models.TransformerEncoder(V, 3, D, D, 1, 2, 16),
    'ReformerLM': lambda: models.ReformerLM(V, D, D, 1, 2, 16),
    'Reformer': lambda: models.Reformer(V, D, D, 1, 1, 2, 16, masked=True),
    'RevNet': lambda: models.RevNet(widths=(4, 8), n_blocks=1),
    'TerraformerLM': lambda: models.TerraformerLM(V, D, D, 1, 2, 16, **SPARSE),
    'Terraformer': lambda: models.Terraformer(V, D, D, 1, 1, 2, 16, masked=True, **SPARSE),
}


@pytest.mark.parametrize('name', MODELS)
def test_every_model_stays_in_32_bits_and_promotes_no_rank(name):
    net, image = MODELS[name](), lc.shape_dtype((1, 8, 8, 3))
    tokens = [lc.shape_dtype((1, n), 'int32') for n in (8, 4)]
    inputs = (image,) if name in ('MLP', 'RevNet') else (*tokens, lc.shape_dtype((1, 8), bool))
    inputs = inputs[: net.n_in]
    modes = (lc.Mode.TRAIN,) if name in ('MLP', 'RevNet') else (lc.Mode.TRAIN, lc.Mode.PREDICT)

    def total(mode, weights, state, *values):
        made = net.apply(weights, state, values, rng=jax.random.key(0), mode=mode)
        return made[0][0].sum(), made

    with setting({'jax_enable_x64': True, 'jax_numpy_rank_promotion': 'raise'}):
        for mode in modes:
            init = functools.partial(net.init, inputs, mode=mode)
            weights, state = jax.eval_shape(init, jax.random.key(0))
            run = functools.partial(total, mode)
            f = jax.grad(run, has_aux=True) if mode is lc.Mode.TRAIN else run
            made = jax.eval_shape(f, weights, state, *inputs)
            assert not {'float64', 'int64'} & dtypes((weights, state, made))


def test_an_exported_decoder_and_a_server_do_as_the_library_does(tmp_path, monkeypatch):
    net = models.TransformerLM(256, D, D, 1, 2, 32)
    with setting(SETTINGS['all at once']):
        model = lc.Model(net).init(lc.shape_dtype((1, 4), 'int32'))
        wanted = decoding.generate(model, [[5, 6, 7]], 4, temperature=0)[0].tolist()
        assert wanted == [int(t) for (t,) in decoding.stream(model, [[5, 6, 7]], 4, temperature=0)]
        export.write(model, tmp_path / 'out', 'a = 1\n')
        served = asyncio.run(completion(model, Request(((5, 6, 7),), 4, sampling=Sampler(0.0))))
    monkeypatch.chdir(tmp_path / 'out')
    (code,) = re.findall(r'```python\n(.*?)```', Path('README.md').read_text(), re.DOTALL)
    session: dict = {}
    exec(code, session)
    assert session['continued']([5, 6, 7], 4) == wanted
    assert served == ByteTokenizer().decode(wanted)


async def completion(model: lc.Model, request: Request) -> str:
    engine = Engine(model, ByteTokenizer(), Limits())
    running = await engine.start(request)
    text = ''.join([piece.text async for piece in running.pieces()])
    await engine.close()
    return text
