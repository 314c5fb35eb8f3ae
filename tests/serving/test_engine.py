"""Completions that are made together, beside `decoding.generate`, which makes them alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import models, tl, transforms
from layercomb.errors import UsageError
from layercomb.layers.attention import functions
from layercomb.serving.batching.slots import Reading
from layercomb.serving.engine import Engine
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request
from layercomb.supervised import decoding
from layercomb.supervised.decoding import Sampler

V, MAX_LEN = 48, 600
GREEDY = Sampler(0.0)
ENDLESS = Sampler(0.0, logit_bias=((0, -1000.0),))


class Numbers:
    """A tokenizer whose text is the ids; 0 ends a text."""

    vocab_size, eos_id = V, 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return ''.join(f'{i} ' for i in ids)


class Stops(Numbers):
    stop_ids = (0, 7)


def lm(attention=None, **more):
    net = models.TransformerLM(V, 16, 16, 2, 2, MAX_LEN, attention=attention, **more)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 1)


@pytest.fixture(scope='module')
def model():
    return lm()


@pytest.fixture(scope='module')
def engine(model):
    made = Engine(model, Numbers(), Limits(max_concurrent=4, max_queue=50, prefix_cache=1 << 26))
    yield made
    made.stop()


def text_of(length, seed=0):
    return tuple(np.random.default_rng(seed).integers(1, V, length).tolist())


def tokens_of(running):
    """The tokens of each choice."""
    made = {i: [] for i in range(len(running.request.rows))}
    for piece in running:
        made[piece.index] += [int(word) for word in piece.text.split()]
    return list(made.values())


def alone(model, request):
    """What `generate` makes of each choice, up to the end."""
    how = request.sampling
    made = decoding.generate(
        model,
        [list(row) for row in request.rows],
        request.max_tokens,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        repetition_penalty=how.repetition_penalty,
        presence_penalty=how.presence_penalty,
        frequency_penalty=how.frequency_penalty,
        logit_bias=how.logit_bias,
        rng=request.seed,
        eos_id=0,
    ).tolist()
    return [row[: row.index(0)] if 0 in row else row for row in made]


REQUESTS = [
    Request((text_of(3), text_of(5, 1)), 9, n=2, sampling=Sampler(0.8, top_k=20), seed=5),
    Request((text_of(70, 2),), 40, sampling=GREEDY),
    Request((text_of(2, 3),), 30, sampling=Sampler(1.3, top_p=0.9), seed=-4),
    Request((text_of(5, 4),), 9, sampling=Sampler(0.0, repetition_penalty=1.5)),
    Request((text_of(9, 5),), 25, sampling=Sampler(0.5, presence_penalty=1, frequency_penalty=1)),
    Request((text_of(9, 5),), 12, sampling=Sampler(1.0, logit_bias=((3, 4.0), (9, -9.0))), seed=1),
]


def test_among_others_as_alone(model, engine):
    wanted = [alone(model, request) for request in REQUESTS]
    assert [tokens_of(engine.run(request)) for request in REQUESTS] == wanted
    together = [engine.run(request) for request in reversed(REQUESTS)]
    assert [tokens_of(running) for running in reversed(together)] == wanted
    assert engine.n_running == engine.n_waiting == 0


def test_one_program_makes_the_same_to_the_last_bit(model):
    """With `same_program`, the likelihoods, too, do not depend on the neighbours."""
    engine = Engine(model, Numbers(), Limits(max_concurrent=3, same_program=True, prefix_cache=0))
    request = Request((text_of(20),), 12, seed=3, logprobs=0)

    def scores(running):
        return [score for piece in running for score in piece.scores]

    by_itself = scores(engine.run(request))
    others = [Request((text_of(n, n),), 4 * n, seed=n) for n in (2, 9, 5, 30)]
    running = [engine.run(each) for each in (*others[:2], request, *others[2:])]
    assert scores(running[2]) == by_itself and len(by_itself) == 12
    for each in running[:2] + running[3:]:
        tokens_of(each)
    engine.stop()


def cached(bits, **more):
    """Keys and values of `lm` in fewer bits."""
    made = lm(**more)
    return lc.Model(transforms.narrow_caches(made.layer, bits), made.weights, made.state)


KINDS = {
    'bfloat16': lambda: cached(16),
    'int8': lambda: cached(8, attention=tl.SelfAttention(4, n_kv_heads=2)),
    'local': lambda: lm(tl.LocalSelfAttention(2, 8)),
    'lsh': lambda: lm(tl.LSHSelfAttention(2, chunk_len=8, n_hashes=2, max_len=MAX_LEN)),
    'chunks': lambda: lm(
        tl.LSHSelfAttention(2, chunk_len=8, n_hashes=1, neighbourhood='chunk', max_len=MAX_LEN)
    ),
    'hashed': lambda: lm(tl.HashedSelfAttention(2, n_hashes=2, max_len=MAX_LEN)),
    'blocks': lambda: lm(tl.BlockSelfAttention(2, n_chosen=2, block_len=3, local_len=4)),
    'mixed': lambda: lm(tl.MixedSelfAttention(2, n_hashes=2, n_chosen=1, max_len=MAX_LEN)),
    'recurrent': lambda: lc.Model(
        tl.Serial(tl.Embedding(V, 16), tl.Repeat(tl.SRU(), 2), tl.Dense(V))
    ).init(lc.shape_dtype((1, 8), 'int32')),
    'narrow': lambda: narrow(lm()),
}


def narrow(model):
    return lc.Model(*transforms.quantize(model.layer, model.weights, bits=8), model.state)


SLOW = ('chunks', 'recurrent', 'narrow')


@pytest.mark.parametrize(
    'kind', [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS]
)
def test_any_language_model(kind):
    """Prompts of several pieces, at once, and again from what is known of them."""
    model = KINDS[kind]()
    engine = Engine(model, Numbers(), Limits(max_concurrent=2, same_program=True))
    requests = [Request((text_of(n, n),), 6, sampling=GREEDY) for n in (80, 70)]
    wanted = [alone(model, request) for request in requests]
    for known in (0, 0 if kind == 'chunks' else 64):
        running = [engine.run(request) for request in requests]
        assert [tokens_of(each) for each in running] == wanted
        assert running[0].n_cached == known
    engine.stop()


class Memory(tl.Layer):
    """h[t] = 0.9 h[t−1] + x[t], which keeps only the last h: rows cannot go back."""

    position_wise = False

    def init(self, signature, rng, mode=tl.Mode.TRAIN):
        (x,) = signature
        empty = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32)
        return {}, {'h': empty} if mode is tl.Mode.PREDICT else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=tl.Mode.EVAL):
        (x,) = inputs

        def step(h, x):
            h = 0.9 * h + x
            return h, h

        start = state['h'] if mode is tl.Mode.PREDICT else jnp.zeros_like(x[:, 0])
        h, y = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
        return (jnp.swapaxes(y, 0, 1),), {'h': h} if mode is tl.Mode.PREDICT else state


class Count(Memory):
    """Counts positions of all rows together, which do not stand together."""

    def init(self, signature, rng, mode=tl.Mode.TRAIN):
        weights, state = super().init(signature, rng, mode)
        return weights, {**state, 'n': jnp.zeros((), jnp.int32)} if state else {}


def remembering(layer):
    net = tl.Serial(tl.Embedding(V, 16), layer, tl.Dense(V))
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


def test_a_memory_that_cannot_go_back_is_read_exactly():
    """Its texts are known again at the ends of blocks alone, and never padded."""
    model = remembering(Memory())
    engine = Engine(model, Numbers(), Limits(max_concurrent=1))
    for length, known in ((150, 0), (150, 128), (4, 0), (75, 64)):
        ids = text_of(150)[:length]
        running = engine.run(Request((ids,), 6, sampling=GREEDY))
        (made,) = tokens_of(running)
        logits = model(jnp.array([[*ids, *made]]))[0]
        wanted = jnp.argmax(logits[length - 1 :], -1).tolist()[:6]
        assert made == wanted[: len(made)] and running.n_cached == known
        assert len(made) == 6 or wanted[len(made)] == 0
    engine.stop()


def test_a_count_of_all_rows_together_is_refused():
    with pytest.raises(UsageError, match="'count/n' counts for all rows together"):
        Engine(remembering(Count()), Numbers())


def test_a_beginning_that_was_read_is_not_read_again(model, engine):
    shared = text_of(300, 7)
    for own, known in ((20, 0), (20, 256), (12, 256)):
        request = Request((shared[:300] + text_of(own, own),), 8, sampling=GREEDY)
        running = engine.run(request)
        assert tokens_of(running) == alone(model, request) and running.n_cached == known
    assert tokens_of(engine.run(Request((shared[:256],), 2, sampling=GREEDY)))
    twice = engine.run(Request((shared[:256],), 2, sampling=GREEDY))  # its last token is read
    assert tokens_of(twice) and twice.n_cached == 192


def test_an_answer_is_part_of_the_next_beginning(model, engine):
    """As in a talk, whose next turn begins with all that was said."""
    said, sampling = text_of(100, 8), Sampler(1.0, logit_bias=((0, -1000.0),))
    first = Request((said,), 100, sampling=sampling)
    (answer,) = tokens_of(engine.run(first))
    assert len(answer) == 100
    request = Request((said + tuple(answer) + text_of(9, 9),), 8, sampling=sampling)
    running = engine.run(request)
    assert tokens_of(running) == alone(model, request) and running.n_cached == 192


def test_what_was_not_used_for_longest_is_dropped(model):
    engine = Engine(model, Numbers(), Limits(max_concurrent=1, prefix_cache=1))
    assert not tokens_of(engine.run(Request((text_of(70),), 1)))[1:]
    prefixes = engine.scheduler.prefixes
    assert prefixes.n_bytes == 0  # nothing fits
    prefixes.limit = 4 * 2 * 2 * 64 * 16 * 4  # 4 blocks of 2 layers' keys and values
    for seed in (1, 2, 1, 3):
        running = engine.run(Request((text_of(140, seed),), 1))
        tokens_of(running)
    assert prefixes.n_bytes == prefixes.limit
    known = []
    for seed in (1, 3, 2):
        running = engine.run(Request((text_of(140, seed),), 1))
        tokens_of(running)
        known.append(running.n_cached)
    assert known == [128, 128, 0]
    for _ in range(2):  # a text of 5 blocks keeps its beginning, without which the rest is no use
        running = engine.run(Request((text_of(330, 4),), 1))
        tokens_of(running)
    assert running.n_cached == 256 and prefixes.n_bytes == prefixes.limit
    engine.stop()


def test_caches_grow_with_texts(model, engine):
    """Those of all rows, while they are decoded; and up to the last position there is."""
    requests = [Request((text_of(n, n),), MAX_LEN - n, sampling=ENDLESS) for n in (490, 580)]
    short = Request((text_of(5),), 50, sampling=ENDLESS)
    running = [engine.run(request) for request in (short, *requests)]
    assert [tokens_of(each) for each in running] == [alone(model, r) for r in (short, *requests)]
    with pytest.raises(Refusal, match='and the model reaches 600') as caught:
        engine.run(Request((text_of(590, 3),), 11))
    assert caught.value.status == 400


# Likelihoods


def log_p(model, ids):
    return np.asarray(jax.nn.log_softmax(model(jnp.array([ids]))[0].astype(jnp.float32)))


def test_tokens_are_scored_by_the_models_own_distribution(model, engine):
    ids = text_of(90, 4)
    sampling = Sampler(0.7, top_k=5, presence_penalty=2, logit_bias=((4, 3.0), (0, -1000.0)))
    running = engine.run(Request((ids,), 6, sampling=sampling, logprobs=3, echo=True))
    first, *rest = list(running)
    assert first.text == Numbers().decode(ids) and len(first.scores) == 90
    assert first.scores[0].logprob is None and first.scores[0].top == ()
    scores = (*first.scores, *(score for piece in rest for score in piece.scores))
    assert len(scores) == 96 and all(len(piece.scores) == 1 for piece in rest)
    told = [score.id for score in scores]
    wanted = log_p(model, told)
    for t, score in enumerate(scores[1:]):
        np.testing.assert_allclose(score.logprob, wanted[t, score.id], atol=2e-5)
        best = np.sort(wanted[t])[::-1][:3]
        np.testing.assert_allclose([p for _, p in score.top], best, atol=2e-5)
        np.testing.assert_allclose([wanted[t, i] for i, _ in score.top], best, atol=2e-5)


@pytest.mark.parametrize('kind', [pytest.param('chunks', marks=pytest.mark.slow), 'attention'])
def test_a_prompt_alone_may_be_scored(model, kind):
    model = KINDS[kind]() if kind in KINDS else model
    engine = Engine(model, Numbers(), Limits(max_concurrent=1))
    ids = text_of(20)
    (piece,) = engine.run(Request((ids,), 0, echo=True, logprobs=0))
    assert piece.text == Numbers().decode(ids) and piece.finish_reason == 'length'
    wanted = log_p(model, ids)
    found = [score.logprob for score in piece.scores[1:]]
    np.testing.assert_allclose(found, wanted[np.arange(19), list(ids[1:])], atol=2e-5)
    (piece,) = engine.run(Request((ids,), 0, echo=True))
    assert piece.text == Numbers().decode(ids) and piece.scores == ()
    engine.stop()


def test_a_prompt_alone_leaves_the_others_alone(model, engine):
    """It ends without having had a slot."""
    running = [
        engine.run(Request((text_of(9, 1),), 120, sampling=ENDLESS)),
        *(engine.run(Request((text_of(9, i),), 0, echo=True, logprobs=0)) for i in range(3)),
        engine.run(Request((text_of(5, 9),), 5, sampling=ENDLESS)),
    ]
    assert [len(tokens_of(each)[0]) for each in running] == [120, 9, 9, 9, 5]


def test_a_prompt_that_waits_for_a_slot_is_told_once(model):
    engine = Engine(model, Numbers(), Limits(max_concurrent=2))
    running = [
        engine.run(Request((text_of(3),), 60, sampling=ENDLESS)),
        engine.run(Request((text_of(4), text_of(5)), 60, echo=True, sampling=ENDLESS)),
    ]
    assert [list(map(len, tokens_of(each))) for each in running] == [[60], [64, 65]]
    engine.stop()


def test_what_ends_a_choice_is_no_text(model):
    engine = Engine(model, Stops(), Limits(max_concurrent=1))
    sampling = Sampler(0.0, logit_bias=((7, 1000.0),))
    (piece,) = engine.run(Request(((1,),), 5, sampling=sampling, logprobs=1))
    assert (piece.text, piece.finish_reason) == ('', 'stop')
    assert [score.id for score in piece.scores] == [7]  # clients count on it
    engine.stop()


# Who goes, who waits, and what fails


def until(said, seconds=20):
    end = time.monotonic() + seconds
    while not said() and time.monotonic() < end:
        time.sleep(0.005)
    assert said()


def test_who_stops_listening_frees_the_place(engine, forced):
    heard = []
    forced.slow(lambda: heard.append(1))
    for _ in engine.run(Request((text_of(5),), 500)):
        break
    n = len(heard)
    until(lambda: not engine.n_running)
    assert len(heard) < n + 4


def test_a_long_prompt_holds_nobody_up(engine, monkeypatch):
    """One piece, then a token for the others; and a prompt may be left while it is read."""
    reached, go_on = threading.Semaphore(0), threading.Semaphore(0)
    read, pieces = Reading.read, []

    def stepwise(self, hurried):
        reached.release()
        assert go_on.acquire(timeout=20)
        pieces.append(1)
        read(self, hurried)

    endless = Request((text_of(3),), 400, sampling=Sampler(1.0, logit_bias=((0, -1000.0),)))
    running = engine.run(endless)
    writing = iter(running)
    next(writing)
    monkeypatch.setattr(Reading, 'read', stepwise)
    reading = engine.run(Request((text_of(550, 77),), 50))
    assert reached.acquire(timeout=20)  # the first piece is about to be read
    n_made = running.n_made
    go_on.release()
    assert reached.acquire(timeout=20)  # and the second
    assert running.n_made > n_made
    reading.cancel()
    go_on.release(20)
    assert tokens_of(reading) == [[]]
    assert len(pieces) < 5
    writing.close()
    until(lambda: not engine.n_running)


def spoilt(model, at):
    """A model whose logits are NaN after a token."""

    def spoil(logits, tokens):
        return jnp.where((tokens == at)[:, :, None], jnp.nan, logits)

    net = tl.Serial(
        tl.Dup(), model.layer.replace(name='lm'), tl.Fn('Spoil', spoil, position_wise=True)
    )
    return lc.Model(net, {'lm': model.weights}, {})


def test_nan_ends_its_own_request_alone(model):
    engine = Engine(spoilt(model, 5), Numbers(), Limits(max_concurrent=2))
    well = Request(((1, 2, 3),), 20, sampling=Sampler(0.0, logit_bias=((5, -1000.0),)))
    ill = Request(((1, 2),), 9, sampling=Sampler(0.0, logit_bias=((5, 1000.0),)))
    for _ in range(2):
        running = [engine.run(well), engine.run(ill)]
        with pytest.raises(Refusal, match='NaN or infinite at token 1 of row 0') as caught:
            tokens_of(running[1])
        assert caught.value.status == 500
        assert tokens_of(running[0]) == alone(model, well)
    with pytest.raises(Refusal, match='NaN or infinite at token 0 of row 0'):
        tokens_of(engine.run(Request(((1, 5),), 2)))
    running = [
        engine.run(well),
        engine.run(Request(((1, 5, 2), (1, 2)), 0, echo=True, logprobs=0)),
        engine.run(well),
    ]
    with pytest.raises(Refusal, match='NaN or infinite in the prompt'):
        tokens_of(running[1])
    assert tokens_of(running[0]) == tokens_of(running[2]) == alone(model, well)
    engine.stop()


def test_nan_in_the_caches_of_a_prompt_reaches_nobody_else(model, monkeypatch):
    """Each row of the prompt holds it, and what comes into their slots is shorter."""
    monkeypatch.setattr(functions, 'has_kernels', lambda *_: False)  # they read no further

    def spoil(x, tokens):  # before the blocks, so that keys and values are NaN
        return jnp.where((tokens == 5)[:, :, None], jnp.nan, x)

    embedding, *rest = model.layer.layers
    net = tl.Serial(tl.Dup(), embedding, tl.Fn('Spoil', spoil, position_wise=True), *rest)
    engine = Engine(lc.Model(net, model.weights, model.state), Numbers(), Limits(max_concurrent=3))
    well = Request(((1, 2, 3),), 20, n=3, sampling=Sampler(0.0, logit_bias=((5, -1000.0),)))
    for _ in range(2):
        with pytest.raises(Refusal, match='NaN or infinite at token 0'):
            tokens_of(engine.run(Request((text_of(99)[:-1] + (5,),), 9, n=3)))
        assert tokens_of(engine.run(well)) == alone(model, well)
    engine.stop()


def test_a_failing_device_ends_what_it_made_and_no_more(model, engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.programs, 'step', None)
        running = [engine.run(request) for request in REQUESTS[1:3]]
        for each in running:
            with pytest.raises(Refusal, match='the model failed: its log says why'):
                tokens_of(each)
        assert not engine.scheduler.prefixes.n_bytes
    assert tokens_of(engine.run(REQUESTS[1])) == alone(model, REQUESTS[1])


def test_what_the_model_does_not_know_is_refused(engine):
    with pytest.raises(Refusal, match='the prompt does not fit the model: token id 48'):
        engine.run(Request(((1, V),), 2))
    with pytest.raises(Refusal, match='the logit_bias does not fit the model: token id 48'):
        engine.run(Request(((1,),), 2, sampling=Sampler(logit_bias=((V, 1.0),))))


def test_rotations_that_go_by_the_length_bound_it():
    """Requests share a state, so all of them turn as texts of the trained length do."""
    net = models.Llama(V, 16, 16, 2, 2, max_len=600, scaling=tl.DynamicScaling(8.0, 80))
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 1)
    engine = Engine(model, Numbers(), Limits(max_concurrent=1))
    request = Request((text_of(70),), 10, sampling=ENDLESS)
    assert engine.max_len == 80 and tokens_of(engine.run(request)) == alone(model, request)
    with pytest.raises(Refusal, match='make 81, and the server 80, the length up to which'):
        engine.run(Request((text_of(71),), 10))
    engine.stop()


def test_a_closed_engine_says_so(model):
    engine = Engine(model, Numbers(), Limits(max_concurrent=1))
    running = engine.run(Request((text_of(5),), 500, sampling=ENDLESS))
    engine.stop()
    assert len(tokens_of(running)[0]) < 500
    with pytest.raises(Refusal, match='the server is stopping') as caught:
        engine.run(Request((text_of(5),), 5))
    assert caught.value.status == 503


def test_the_queue_is_bounded_and_patience_ends(model, forced):
    forced.slow()
    engine = Engine(model, Numbers(), Limits(max_concurrent=1, max_queue=1, patience=0.2))

    async def ask():
        first = await engine.start(Request(((1,),), 500))
        pieces = first.pieces()
        assert await anext(pieces)  # its programs are compiled
        waiting = asyncio.create_task(engine.start(Request(((1,),), 1)))
        await asyncio.sleep(0.01)
        assert engine.n_waiting == 1
        for _ in range(2):  # at once, and after the patience of the one in the queue
            with pytest.raises(Refusal) as caught:
                await (engine.start(Request(((1,),), 1)) if engine.n_waiting else waiting)
            assert caught.value.status == 429 and caught.value.headers['Retry-After']
            await asyncio.sleep(0.3)
        assert engine.n_waiting == 0 and engine.n_running == 1
        first.cancel()
        assert [piece async for piece in pieces]
        await engine.close()

    asyncio.run(ask())
    assert engine.n_running == 0


def test_the_engine_needs_no_server():
    code = (
        'import sys, layercomb.serving.engine\n'
        "assert not {'starlette', 'uvicorn'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, '-c', code], check=True)
