"""Several adapters on one base: mixed batches beside each alone, and who may ask for which."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_engine import GREEDY, MAX_LEN, Numbers, V, text_of, tokens_of
from test_serving import LIMITS, ask, completed, served

import layercomb as lc
from layercomb import models, serving, tl, transforms, trees
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.serving.batching.slots import Decodable
from layercomb.serving.engine import Engine
from layercomb.serving.limits import Limits
from layercomb.serving.protocol import Refusal, Request

NAMES = (None, 'poems', 'laws')


def adapted(net, weights, seed, **options):
    """A model with a random adapter."""
    net, weights = transforms.lora(net, weights, **options)
    flat = trees.flatten(weights)
    for i, (path, x) in enumerate(sorted(flat.items())):
        if transforms.is_lora(path):
            drawn = np.random.default_rng((seed, i)).normal(size=x.shape) / 2
            flat[path] = jnp.asarray(drawn.astype(np.float32))
    return net, trees.unflatten(flat)


def named(net, weights):
    """Two adapters, of other ranks and for other layers."""
    return {
        'poems': adapted(net, weights, 1, rank=2, alpha=4.0, where='block*'),
        'laws': adapted(net, weights, 2, rank=3, alpha=2.0, where='*self_attention*'),
    }


PLAIN = models.Llama(V, 16, 24, 1, 4, 2, MAX_LEN)


def base_of(vocab_size=V, max_len=MAX_LEN):
    net = models.Llama(vocab_size, 16, 24, 1, 4, 2, max_len)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 1)


def many_of(base):
    """The base with both adapters."""
    its = base.layer, base.weights
    return lc.Model(*transforms.adapters(*its, named(*its)))


@pytest.fixture(scope='module')
def base():
    return base_of()


@pytest.fixture(scope='module')
def merged(base):
    """The model that each name stands for, plain."""
    made = {
        name: lc.Model(*transforms.merge(*x)) for name, x in named(base.layer, base.weights).items()
    }
    return {None: base, **made}


LONGEST = 256


@jax.jit
def plain_logits(weights, ids):
    """The logits (L, V) of the plain model."""
    (logits,), _ = PLAIN.apply(weights, {}, (ids,))
    return logits[0]


def logits_of(model, ids):
    padded = np.zeros((1, LONGEST), np.int32)
    padded[0, : len(ids)] = ids
    return plain_logits(model.weights, padded)


def is_greedy(model, request, made):
    """Whether a model finds each token that was made the likeliest one."""
    (prompt,) = request.prompts
    whole = (*prompt, *made)
    found = logits_of(model, whole).argmax(-1).tolist()
    ends = [0] if len(made) < request.max_tokens else []  # which is not shown
    return [*made, *ends] == found[len(prompt) - 1 : len(whole) - 1 + len(ends)]


@pytest.fixture(scope='module')
def engine(base):
    made = Engine(
        many_of(base), Numbers(), Limits(max_concurrent=4, same_program=True, prefix_cache=1 << 26)
    )
    yield made
    made.stop()


def asked(name, length, seed=0, n=12):
    return Request((text_of(length, seed),), n, sampling=GREEDY, adapter=name)


def test_a_mixed_batch_is_as_each_alone(merged, engine):
    requests = [asked(name, 5 + i, i, 9 + i) for i in range(2) for name in NAMES]
    made = [tokens_of(engine.run(request)) for request in requests]
    assert len({str(row) for row in made}) == len(made)
    for request, (row,) in zip(requests, made, strict=True):
        assert is_greedy(merged[request.adapter], request, row)
    together = [engine.run(request) for request in requests]
    assert [tokens_of(running) for running in together] == made


def test_slots_are_used_again_by_other_adapters(merged, engine):
    for round in range(2):
        begun = [engine.run(asked(NAMES[i % 3], 4, i, 300)) for i in range(4)]
        next(iter(begun[0]))
        for running in begun:
            running.cancel()
        for name in NAMES[round:]:
            request = asked(name, 9, round)
            assert is_greedy(merged[name], request, *tokens_of(engine.run(request)))


def test_what_one_adapter_has_read_is_not_known_to_another(merged, engine):
    for name in NAMES:
        request = asked(name, 200, 7)
        first = engine.run(request)
        made = tokens_of(first)
        again = engine.run(request)
        assert tokens_of(again) == made and is_greedy(merged[name], request, *made)
        assert (first.n_cached, again.n_cached) == (0, 192)


def test_scores_are_those_of_the_adapter(merged, engine):
    text = text_of(20, 3)
    request = Request((text,), 0, echo=True, logprobs=0, adapter='poems')
    scores = [score.logprob for piece in engine.run(request) for score in piece.scores]
    logprobs = jax.nn.log_softmax(logits_of(merged['poems'], text))
    wanted = [float(logprobs[i, token]) for i, token in enumerate(text[1:])]
    np.testing.assert_allclose(scores[1:], wanted, atol=2e-5)


def test_memory_does_not_grow_with_requests(engine):
    def n_bytes():
        return sum(x.nbytes for x in jax.live_arrays())

    def ask_all(round):
        for name in NAMES:
            tokens_of(engine.run(Request((text_of(5, round),), 4, adapter=name)))

    ask_all(0)
    before = n_bytes()
    for round in range(3):
        ask_all(round)
    assert n_bytes() <= before + 1000  # a key or a position on its way


def test_an_unknown_adapter_is_refused(base, engine):
    with pytest.raises(Refusal, match="no model 'x': choose one of 'poems', 'laws'") as caught:
        engine.run(Request(((1,),), 2, adapter='x'))
    assert caught.value.status == 404
    lsh = tl.LSHSelfAttention(2, chunk_len=8, neighbourhood='chunk')
    net = tl.Serial(tl.Embedding(V, 8), lsh, tl.Dense(V))
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(0))
    one = transforms.lora(net, weights, where='dense')
    with pytest.raises(UsageError, match='a layer of this one sees padding: merge one adapter'):
        Decodable.of(lc.Model(*transforms.adapters(net, weights, {'a': one})))


def test_requests_choose_by_the_name_of_the_model():
    model = many_of(base_of(256, 64))
    with pytest.raises(UsageError, match="'laws' is the model itself: give the adapter another"):
        serving.app(model, ByteTokenizer(), 'laws', LIMITS)
    application = serving.app(model, ByteTokenizer(), 'tiny', LIMITS, ['127.0.0.1'])
    with served(application) as address:
        _, said, _ = ask(address, path='/v1/models')
        assert [each['id'] for each in json.loads(said)['data']] == ['tiny', *NAMES[1:]]
        assert json.loads(said)['data'][2]['parent'] == 'tiny'
        answers = {}
        for name in ('tiny', *NAMES[1:]):
            made = completed(address, prompt='abc', model=name, temperature=0, max_tokens=8)
            assert made['model'] == name
            answers[name] = made['choices'][0]['text']
        assert completed(address, prompt='abc', temperature=0, max_tokens=8)['model'] == 'tiny'
        assert len(set(answers.values())) == 3
        status, said, _ = ask(address, {'prompt': 'abc', 'model': 'other'})
        error = json.loads(said)['error']
        assert (status, error['code'], error['param']) == (404, 'model_not_found', 'model')
        assert error['message'] == (
            "there is no model 'other': choose one of 'tiny', 'poems', 'laws'"
        )
        status, said, _ = ask(address, {'prompt': 'ab', 'model': 'laws'}, '/tokenize')
        assert (status, json.loads(said)['tokens']) == (200, [97, 98])
