"""An engine that checks drafts makes what one without makes, alone and among others."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import UsageError, models, tl
from layercomb.serving.batching.slots import Slots
from layercomb.serving.engine import Engine
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request
from layercomb.supervised import decoding
from layercomb.supervised.decoding import Sampler

V, MAX_LEN = 31, 1100
GREEDY = Sampler(0.0)


class Numbers:
    """A tokenizer whose text is the ids; 0 ends a text."""

    vocab_size, eos_id = V, 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return ''.join(f'{i} ' for i in ids)


def lm(seed=1, max_len=MAX_LEN, vocab_size=V, **more):
    net = models.TransformerLM(vocab_size, 16, 16, 2, 2, max_len, **more)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), seed)


def text_of(length, seed=0, size=V):
    return tuple(np.random.default_rng(seed).integers(1, size, length).tolist())


def tokens_of(running):
    """The tokens of each choice."""
    made = {i: [] for i in range(len(running.request.rows))}
    for piece in running:
        made[piece.index] += [int(word) for word in piece.text.split()]
    return list(made.values())


REQUESTS = [
    Request((text_of(70, 2, 4),), 60, sampling=GREEDY),
    Request((text_of(5, 4),), 40, sampling=Sampler(0.0, repetition_penalty=1.5)),
    Request((text_of(400, 3, 6),), 30, sampling=Sampler(0.8, top_p=0.9), seed=-4),
    Request((text_of(9, 5, 3),), 50, sampling=Sampler(0.4, frequency_penalty=0.5), seed=2),
    Request(((1,),), 20, sampling=GREEDY),
    Request((text_of(9, 6, 3),), 1, sampling=GREEDY),
    Request((text_of(500, 7, 3),), 40, sampling=GREEDY),  # 512 places become 1,024
    Request((text_of(9, 8, 3),), 12, sampling=Sampler(0.5), seed=3, n=3),
    Request((text_of(12, 9, 3),), 12, sampling=Sampler(0.5), seed=4, logprobs=2),
]
KINDS = {
    'lookup': lambda: decoding.Lookup(4, 1),
    'draft': lambda: decoding.Draft(lm(7), 3),
    'itself': lambda: decoding.Draft(lm(), 4),
    'short': lambda: decoding.Draft(lm(7, max_len=90), 2),  # reaches less far than the model
}


@pytest.fixture(scope='module')
def wanted():
    engine = Engine(lm(), Numbers(), Limits(max_concurrent=3))
    made = [tokens_of(engine.run(request)) for request in REQUESTS]
    engine.stop()
    return made


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_made_does_not_depend_on_drafts(kind, wanted):
    engine = Engine(lm(), Numbers(), Limits(max_concurrent=3), KINDS[kind]())
    engine.warm_up()
    assert [tokens_of(engine.run(request)) for request in REQUESTS] == wanted
    together = [engine.run(request) for request in reversed(REQUESTS)]
    assert [tokens_of(running) for running in reversed(together)] == wanted
    engine.stop()


@pytest.fixture
def checks(monkeypatch):
    """How many tokens each check has made."""
    made, real = [], Slots.check

    def heard(slots, *args):
        made.append(real(slots, *args))
        return made[-1]

    monkeypatch.setattr(Slots, 'check', heard)
    return made


def test_drafts_of_the_model_itself_are_accepted_whole(checks):
    """The first token is drawn from the prompt; then each check makes 5."""
    engine = Engine(lm(), Numbers(), Limits(max_concurrent=2), decoding.Draft(lm(), 4))
    (made,) = tokens_of(engine.run(Request((text_of(30),), 21, sampling=Sampler(0.7))))
    assert made[1:] == list(itertools.chain(*checks))
    assert [len(each) for each in checks] == [5] * 4
    checks.clear()
    (made,) = tokens_of(engine.run(Request((text_of(30) + tuple(made),), 11, sampling=GREEDY)))
    assert made[1:] == list(itertools.chain(*checks))
    assert [len(each) for each in checks] == [5, 5]
    engine.stop()


def test_only_a_choice_that_is_alone_has_drafts(checks):
    engine = Engine(lm(), Numbers(), Limits(max_concurrent=2), decoding.Lookup(2, 1))
    tokens_of(engine.run(Request(((1, 2, 1),), 10, n=2, sampling=GREEDY)))
    tokens_of(engine.run(Request(((1, 2, 1),), 10, logprobs=0, sampling=GREEDY)))
    assert not checks
    tokens_of(engine.run(Request(((1, 2, 1),), 30, sampling=GREEDY)))
    assert checks
    engine.stop()


def test_pieces_come_token_by_token_and_can_be_left(checks):
    engine = Engine(lm(), Numbers(), Limits(max_concurrent=1), decoding.Lookup(4, 1))
    running = engine.run(Request(((1, 2, 1, 2, 1),), 500, sampling=GREEDY))
    for _, piece in zip(range(5), running, strict=False):
        assert len(piece.text.split()) == 1
    running.cancel()
    request = Request(((1, 2, 1),), 20, sampling=GREEDY)
    assert len(tokens_of(engine.run(request))[0]) <= 20
    engine.stop()


def test_a_text_ends_where_it_would(checks):
    """The end comes inside a draft: what was accepted behind it is nobody's."""
    period = tl.Fn('Next', lambda x: _onehot((x + 1) % 5), position_wise=True)
    engine = Engine(lc.Model(period, {}), Numbers(), Limits(), decoding.Lookup(6, 1))
    (made,) = tokens_of(engine.run(Request(((1, 2, 3, 4, 0, 1, 2),), 20, sampling=GREEDY)))
    assert made == [3, 4] and len(checks[0]) == 7
    (stopped,) = tokens_of(engine.run(Request(((1, 2, 3, 4, 0, 1),), 20, stop=('4 ',))))
    assert stopped == [2, 3]
    engine.stop()


def _onehot(x):
    return jnp.where(x[..., None] == jnp.arange(V, dtype=jnp.int32), 99.0, 0.0)


def test_nan_ends_a_completion_that_is_checked():
    def spoilt(x):
        return jnp.where((x == 4)[..., None], jnp.nan, _onehot((x + 1) % 7))

    net = tl.Fn('Spoilt', spoilt, position_wise=True)
    engine = Engine(lc.Model(net, {}), Numbers(), Limits(max_concurrent=1), decoding.Lookup(3, 1))
    for _ in range(2):
        with pytest.raises(Refusal, match='NaN or infinite at token 3 of row 0'):
            tokens_of(engine.run(Request(((3, 4, 1, 2, 1),), 20, sampling=GREEDY)))
    engine.stop()


def test_errors():
    with pytest.raises(UsageError, match=r'same_program decodes .*: leave out one of the two'):
        Engine(lm(), Numbers(), Limits(same_program=True), decoding.Lookup())
    with pytest.raises(UsageError, match='draft model has 9 tokens and the model 31'):
        Engine(lm(), Numbers(), Limits(), decoding.Draft(lm(vocab_size=9)))
    with pytest.raises(UsageError, match='the model cannot speculate'):
        attention = tl.HashedSelfAttention(2, n_hashes=2, n_buckets=2, chunk_len=4, local_len=2)
        Engine(lm(attention=attention), Numbers(), Limits(), decoding.Lookup())
    with pytest.raises(TypeError, match='speculate must be'):
        Engine(lm(), Numbers(), Limits(), 3)
