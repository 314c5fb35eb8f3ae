"""Training, evaluation and decoding under the settings of JAX that programs have.

A setting may change how numbers are drawn or computed. It never changes what is right: a decoded
token is the likeliest of an evaluation, the score of a hypothesis is that of its tokens, and a loss
is what NumPy makes of the logits.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import tl
from layercomb.supervised import EvalTask, Loop, TrainTask, decoding

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
    """Two batches; the next token is the one after, and some positions are padding."""

    def __iter__(self):
        made = np.random.default_rng(0)
        for _ in range(2):
            x = made.integers(0, V, (B, L)).astype(np.int32)
            yield x, (x + 1) % V, (made.random((B, L)) < 0.8).astype(np.float32)


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


def check_decoded(model: lc.Model) -> None:
    prompts = [[1, 2, 3], [4, 5]]
    greedy = decoding.generate(model, prompts, 3, temperature=0)
    assert greedy.tolist() == [continued(model, prompt, 3) for prompt in prompts]
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


@pytest.mark.parametrize('name', SETTINGS)
def test_training_evaluation_and_decoding(name):
    wanted = by_default()
    with setting(SETTINGS[name]):
        loop, row = trained(plain())
        model = lc.Model(plain(), loop.weights, loop.state)
        check_measured(model, row)
        check_decoded(model)
        if name in THOROUGH:
            check_scored(model)
        assert dtypes((loop.weights, loop.state, loop.opt_state)) <= {'float32', 'int32'}
    if 'rbg' in SETTINGS[name].get('jax_default_prng_impl', ''):
        assert row['valid/loss'] != wanted['valid/loss']  # other keys, other weights
    elif 'jax_threefry_partitionable' not in SETTINGS[name]:
        same = {key: value for key, value in row.items() if 'per_second' not in key}
        near = {key: pytest.approx(wanted[key], rel=1e-4) for key in same}
        assert same == near


def test_sparse_and_reversible_layers_under_all_settings_at_once():
    with setting(SETTINGS['all at once']):
        loop, row = trained(sparse())
        model = lc.Model(sparse(), loop.weights, loop.state)
        check_measured(model, row)
        prompt = [[1, 2, 3]]
        greedy = decoding.generate(model, prompt, 3, temperature=0)
        assert greedy[0].tolist() == continued(model, prompt[0], 3)
        assert dtypes((loop.weights, loop.state, loop.opt_state)) <= {'float32', 'int32'}
