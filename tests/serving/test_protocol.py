"""What a request may say, and the text of a choice as its tokens come."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layercomb.data import ByteTokenizer
from layercomb.serving import Limits
from layercomb.serving.openai.completions import parse
from layercomb.serving.protocol import Refusal
from layercomb.serving.texts import Text
from layercomb.supervised.decoding.sampling import Sampler

LIMITS = Limits(max_tokens=50, max_prompt=20, max_choices=4)


def read(body, limits=LIMITS):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(body, ByteTokenizer(), 'tiny', 256, limits)


def test_what_clients_send_by_default():
    request = read(
        {
            'model': 'tiny', 'prompt': 'é', 'max_tokens': 5, 'temperature': 0, 'top_p': 1, 'n': 1,
            'stop': 'x', 'seed': 7, 'stream': True, 'stream_options': {'include_usage': True},
            'presence_penalty': 0, 'frequency_penalty': 0.0, 'logprobs': None, 'logit_bias': {},
            'best_of': 1, 'suffix': None, 'user': 'me', 'echo': False,
        }
    )  # fmt: skip
    assert request.prompts == ((195, 169),) and request.max_tokens == 5
    assert request.stop == ('x',) and request.seed == 7 and request.include_usage


def test_prompts_are_texts_or_tokens():
    for prompt, wanted in [
        ('ab', ((97, 98),)),
        (['a', 'b'], ((97,), (98,))),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ]:
        assert read({'prompt': prompt}).prompts == wanted
    assert read({'prompt': ['a', 'b'], 'n': 2}).rows == [(97,), (97,), (98,), (98,)]


def test_a_seed_is_drawn_where_none_is_given():
    assert len({read({'prompt': 'a'}).seed for _ in range(8)}) > 1


def test_how_tokens_are_drawn():
    request = read(
        {
            'prompt': 'a', 'temperature': 0.5, 'presence_penalty': 1, 'frequency_penalty': -2,
            'logit_bias': {'7': -100, '5': 1.5, '6': 0},
        }
    )  # fmt: skip
    wanted = {'presence_penalty': 1.0, 'frequency_penalty': -2.0}
    assert request.sampling == Sampler(0.5, **wanted, logit_bias=((5, 1.5), (7, -100.0)))


def test_what_the_makers_advise_holds_where_the_request_is_silent():
    body = json.dumps({'prompt': 'a', 'top_p': 0.5}).encode()
    advised = {'temperature': 0.25, 'top_p': 0.75}
    request = parse(body, ByteTokenizer(), 'tiny', 256, LIMITS, advised)
    assert request.sampling == Sampler(0.25, top_p=0.5)


def test_the_best_of_several_are_made_with_scores_that_are_not_shown():
    request = read({'prompt': ['a', 'b'], 'best_of': 2})
    assert request.rows == [(97,), (97,), (98,), (98,)] and request.rows_of_text == [True] * 4
    assert (request.n, request.logprobs, request.shows_logprobs) == (1, 0, False)
    request = read({'prompt': 'a', 'best_of': 2, 'logprobs': 3})
    assert request.logprobs == 3 and request.shows_logprobs


def test_a_prompt_alone():
    request = read({'prompt': 'ab', 'echo': True, 'max_tokens': 0, 'logprobs': 1})
    assert request.max_tokens == 0
    text = Text(ByteTokenizer(), (), 0, 'aé'.encode()[:-1])
    assert (text.prompt, text.finish_reason) == ('a\ufffd', 'length')


MISTAKES = [
    (b'{"prompt": ', 'the body is no JSON'),
    (b'\xff', 'the body is no JSON'),
    (b'[' * 100_000, 'the body is no JSON'),
    (b'{"prompt": "a", "temperature": NaN}', 'NaN is no number of JSON'),
    (b'[]', 'must be an object'),
    ({}, "'prompt' must be a text"),
    ({'prompt': 3}, "'prompt' must be a text"),
    ({'prompt': []}, "'prompt' must be a text"),
    ({'prompt': ''}, "'prompt' is empty"),
    ({'prompt': [[]]}, "'prompt' is empty"),
    ({'prompt': ['a', 3]}, "'prompt' must be a text"),
    ({'prompt': [1, True]}, "'prompt' must be a text"),
    ({'prompt': [256]}, 'a token 256 outside the vocabulary of 256'),
    ({'prompt': [-1]}, 'a token -1 outside'),
    ({'prompt': '\ud800'}, "'prompt' is no text"),
    ({'prompt': 'a' * 21}, 'has 21 tokens, and 20 are allowed here'),
    ({'prompt': 'a', 'max_tokens': 0}, "'max_tokens' must be at least 1, or 0 with 'echo'"),
    ({'prompt': 'a', 'max_tokens': 51}, "'max_tokens' must be at most 50"),
    ({'prompt': 'a', 'max_tokens': 2.5}, "'max_tokens' must be an int"),
    ({'prompt': 'a', 'n': 5}, 'must be at most 4'),
    ({'prompt': ['a'] * 3, 'n': 2}, 'must be at most 4'),
    ({'prompt': 'a', 'temperature': 'hot'}, "'temperature' must be a number"),
    ({'prompt': 'a', 'temperature': -1}, "'temperature' must be at least 0 and at most 2"),
    (b'{"prompt": "a", "temperature": 1e999}', "'temperature'"),
    ({'prompt': 'a', 'top_p': 0}, "'top_p' must be above 0 and at most 1"),
    ({'prompt': 'a', 'top_k': 0}, "'top_k'"),
    ({'prompt': 'a', 'repetition_penalty': 0}, "'repetition_penalty'"),
    ({'prompt': 'a', 'seed': 'x'}, "'seed' must be an int"),
    ({'prompt': 'a', 'stop': ['a'] * 17}, "'stop' must be a text, or up to 16"),
    ({'prompt': 'a', 'stop': ''}, "'stop'"),
    ({'prompt': 'a', 'stream': 1}, "'stream' must be true or false"),
    ({'prompt': 'a', 'stream_options': []}, "'stream_options'"),
    ({'prompt': 'a', 'presence_penalty': 2.5}, "'presence_penalty' must be at least -2 and at"),
    ({'prompt': 'a', 'frequency_penalty': -3}, "'frequency_penalty' must be at least -2 and at"),
    ({'prompt': 'a', 'logprobs': 21}, "'logprobs' must be at least 0 and at most 20"),
    ({'prompt': 'a', 'best_of': 3, 'stream': True}, "'best_of' must be at most n in a stream"),
    ({'prompt': 'a', 'best_of': 5}, "'best_of' times the number of prompts must be at most 4"),
    ({'prompt': 'a', 'best_of': 0}, "'best_of' must be at least 1"),
    ({'prompt': 'a', 'logit_bias': {'256': 1}}, 'a token 256 outside the vocabulary of 256'),
    ({'prompt': 'a', 'logit_bias': {'a': 1}}, "'logit_bias' must be an object .*: 'a' is no id"),
    ({'prompt': 'a', 'logit_bias': {'7': 1, '07': 2}}, "'07' is no id"),
    ({'prompt': 'a', 'logit_bias': {'5': 101}}, "'logit_bias' must be at least -100 and at most"),
    ({'prompt': 'a', 'logit_bias': {str(i): 1 for i in range(301)}}, 'an object of up to 300'),
    ({'prompt': 'a', 'max_token': 3}, "'max_token' is not a field"),
    ({'prompt': 'a', '\ud800': 3}, 'is not a field'),
    ({'prompt': 'a', 'model': 'gpt'}, "there is only the model 'tiny'"),
]


@pytest.mark.parametrize(('body', 'said'), MISTAKES)
def test_mistakes(body, said):
    with pytest.raises(Refusal, match=said) as caught:
        read(body)
    assert caught.value.status == (404 if 'model' in said else 400)
    assert '\n' not in str(caught.value)
    json.dumps(caught.value.body, ensure_ascii=False).encode()


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3),
    ),
    st.sampled_from(['prompt', 'stop', 'n', 'seed', 'stream_options', 'logit_bias', 'top_p']),
)
def test_anything_is_read_or_refused(value, name):
    fields = {'prompt': 'a', name: value}
    try:
        read(fields)
    except Refusal as e:
        assert e.status == 400


def said(tokens, stop=(), max_tokens=99):
    text = Text(ByteTokenizer(), stop, max_tokens)
    return [text.add(token) for token in tokens], text


def test_characters_are_whole():
    pieces, text = said('né€'.encode())
    assert pieces == ['n', '', 'é', '', '', '€'] and text.finish_reason is None
    pieces, text = said('n€'.encode(), max_tokens=3)
    assert pieces == ['n', '', '\ufffd', ''] and text.finish_reason == 'length'


def test_the_end_of_a_document_ends_it():
    pieces, text = said(b'ab\0c', stop=['bc'])
    assert pieces == ['a', '', 'b', ''] and text.finish_reason == 'stop' and text.n_tokens == 3


def test_any_token_that_ends_an_answer_does():
    class Ended(ByteTokenizer):
        stop_ids = (1, 2)

    for end in (b'\0', b'\1', b'\2'):
        text = Text(Ended(), (), 9)
        assert [text.add(i) for i in b'a' + end + b'b'] == ['a', '', '']
        assert (text.finish_reason, text.n_tokens) == ('stop', 2)


@given(st.text('ab€', max_size=12), st.lists(st.text('ab€', min_size=1, max_size=3), max_size=4))
def test_stop_texts_never_show(text, stop):
    """Beside it: what the text is before the stop text that is complete first."""
    pieces, made = said(text.encode() + b'\0', stop)
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stop)]
    seen = text[: ends[0]] if ends else text
    wanted = seen[: min((i for s in stop if (i := seen.find(s)) >= 0), default=len(seen))]
    assert ''.join(pieces) == wanted and made.finish_reason == 'stop'


def test_limits_are_checked():
    for wrong, said in [
        ({'max_tokens': 0}, 'Limits: max_tokens must be at least 1, got 0'),
        ({'max_concurrent': 1.5}, 'max_concurrent must be an int'),
        ({'max_queue': -1}, 'max_queue must be at least 0'),
        ({'patience': 0}, 'patience must be above 0'),
    ]:
        with pytest.raises((TypeError, ValueError), match=said):
            Limits(**wrong)


def test_a_huge_number_of_choices_costs_nothing():
    with pytest.raises(Refusal, match='times the number of prompts must be at most'):
        read({'prompt': 'a', 'n': 2**31 - 1})
    with pytest.raises(Refusal, match="'n' times the number of prompts must be at most"):
        read({'prompt': [[-1]] * 99_999})  # no prompt is read
