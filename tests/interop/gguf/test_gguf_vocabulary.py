"""Tokenizers in .gguf files make the ids that llama.cpp makes, and go out as they came."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate
from layercomb.interop.gguf import vocabulary_out
from layercomb.interop.gguf.vocabulary import CUTS, vocabulary
from layercomb.interop.tokenizer import PretrainedTokenizer

# Made by tests/data/gguf/make_vocabularies.py.
RECORDED = json.loads(
    (Path(__file__).parents[2] / 'data' / 'gguf' / 'vocabularies.json').read_text()
)


def metadata(kind, **changes):
    """The entries of one of the recorded vocabularies, with some changed; None leaves one out."""
    of = RECORDED['pieces' if 'pieces' in kind else 'words']
    made = {'tokens': of['tokens'], 'token_type': of['types'], 'eos_token_id': 2}
    if 'pieces' in kind:
        made |= {'model': 'llama', 'scores': of['scores'], 'add_space_prefix': 'space' in kind}
        made |= {'bos_token_id': 1, 'unknown_token_id': 0}
    else:
        made |= {'model': 'gpt2', 'merges': of['merges'], 'pre': kind}
    made |= changes
    return {f'tokenizer.ggml.{k}': v for k, v in made.items() if v is not None}


def read(kind, **changes):
    given = metadata(kind, **changes)
    return vocabulary(given, len(given['tokenizer.ggml.tokens']))


def pretrained(v, **more):
    return PretrainedTokenizer(
        v.tokenizer(), v.eos_id, v.bos_id, v.stop_ids, tokens=v.special, **more
    )


@pytest.mark.parametrize('kind', RECORDED['ids'])
def test_ids_are_those_of_llama_cpp(kind):
    made = read(kind).tokenizer()
    for text, want in zip(RECORDED['texts'], RECORDED['ids'][kind], strict=True):
        if kind == 'qwen2' and 'e\u0301' in text:
            continue  # composed first, as in Hugging Face's tokenizer.json; llama.cpp does not
        assert made.encode(text, add_special_tokens=False).ids == want, text


@pytest.mark.parametrize('kind', RECORDED['ids'])
def test_a_text_comes_back(kind):
    tokenizer = pretrained(read(kind))
    for text in RECORDED['texts'][:4]:
        if 'pieces' in kind or '<' not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(RECORDED['texts'][2])
    decoder = tokenizer.incremental_decoder()
    pieces = [decoder.decode(i) for i in ids] + [decoder.decode([], final=True)]
    assert ''.join(pieces) == RECORDED['texts'][2]


def test_tokens_around_a_text():
    bos = {'bos_token_id': 1, 'add_bos_token': True}
    assert pretrained(read('gpt-2')).encode('a')[0] != 1
    assert pretrained(read('gpt-2', **bos)).encode('a').tolist()[0] == 1
    both = read('pieces', add_eos_token=True).tokenizer()  # of this kind, texts begin with a token
    assert [both.encode('a').ids[i] for i in (0, -1)] == [1, 2]
    assert pretrained(read('llama-bpe', bos_token_id=1)).encode('a')[0] == 1  # by its pre-tokenizer


def test_all_tokens_that_end_an_answer():
    tokens = list(RECORDED['words']['tokens'])
    tokens[5], types = '<|im_end|>', [1] * len(tokens)
    changes = {'tokens': tokens, 'token_type': types, 'merges': []}
    assert read('gpt-2', **changes).stop_ids == (2,)
    types[5] = 3
    assert read('gpt-2', **changes, eot_token_id=7, eom_token_id=9).stop_ids == (2, 7, 9, 5)


@pytest.mark.parametrize('kind', RECORDED['ids'])
def test_a_tokenizer_goes_out_as_it_came(kind):
    v = dataclasses.replace(read(kind), template='{{ messages }}')
    tokenizer = pretrained(v, chat=ChatTemplate(v.template, v.special))
    out = vocabulary_out.metadata_of(vocabulary_out.vocabulary_of(tokenizer, len(v.tokens)))
    again = vocabulary(out, len(v.tokens))
    for field in dataclasses.fields(v):
        if field.name not in ('scores', 'adds_space'):
            assert getattr(again, field.name) == getattr(v, field.name), field.name
    assert again.tokenizer().to_str() == v.tokenizer().to_str()
    more = vocabulary_out.vocabulary_of(tokenizer, len(v.tokens) + 2)  # the model has more rows
    assert more.tokens[-1] == f'[PAD{len(v.tokens) + 1}]' and more.types[-2:] == (5, 5)


def test_pre_tokenizers_of_hugging_face_are_known_by_what_they_do():
    pre, words = tokenizers.pre_tokenizers, read('gpt-2')
    backend = words.tokenizer()
    digits = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False)])
    for step, name in ((pre.ByteLevel(add_prefix_space=False), 'gpt-2'), (digits, 'smollm')):
        backend.pre_tokenizer = step
        tokenizer = PretrainedTokenizer(backend, 2)
        assert vocabulary_out.vocabulary_of(tokenizer, len(words.tokens)).cut == name
    for unknown in (pre.Whitespace(), pre.ByteLevel(add_prefix_space=True), None):
        backend.pre_tokenizer = unknown
        with pytest.raises(UsageError, match='files name, gpt-2, smollm,'):
            vocabulary_out.vocabulary_of(PretrainedTokenizer(backend, 2), len(words.tokens))


def test_tokenizers_that_have_no_place():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}, 'a'))
    with pytest.raises(UsageError, match=r'of type WordLevel has no place in a \.gguf: save'):
        vocabulary_out.vocabulary_of(PretrainedTokenizer(words, 0), 1)
    with pytest.raises(UsageError, match=r'this tokenizer has no place in a \.gguf file: save'):
        vocabulary_out.vocabulary_of(object(), 1)
    with pytest.raises(UsageError, match=r'has 402 tokens and the model 300: take the tokenizer'):
        vocabulary_out.vocabulary_of(pretrained(read('gpt-2')), 300)
    backend = read('gpt-2').tokenizer()
    backend.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(UsageError, match=r'says more than a \.gguf file can'):
        vocabulary_out.vocabulary_of(PretrainedTokenizer(backend, 2), 402)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model': 'bert'}, "model is 'bert', and the kinds of tokenizers known are gpt2, llama:"),
        ({'pre': 'tekken'}, "pre is 'tekken', and the pre-tokenizers known are gpt-2, smollm,"),
        ({'pre': 7}, 'pre is 7, and'),
        ({'tokens': None}, 'no list tokenizer.ggml.tokens'),
        ({'tokens': ['a', 'b']}, 'lists 2 and the model has 402 tokens'),
        ({'tokens': ['a'] * 402}, 'lists a token twice'),
        ({'merges': ['a']}, "the merge 'a' is no pair"),
        ({'merges': ['zz yy']}, 'tokens and merges in the file do not fit together'),
        ({'token_type': [1, 2]}, 'token_type lists 2 and the model'),
        ({'eos_token_id': 402}, 'eos_token_id is 402, and there are 402 tokens'),
        ({'eos_token_id': 'x'}, "eos_token_id is 'x'"),
        ({'add_bos_token': 1}, 'add_bos_token is 1 and not true or false'),
        ({'precompiled_charsmap': [1]}, 'tokenizer.ggml.precompiled_charsmap is not understood'),
    ],
)
def test_metadata_that_are_wrong(changes, message):
    with pytest.raises(UsageError, match=message) as raised:
        vocabulary(metadata('gpt-2', **changes), 402).tokenizer()
    assert '\n' not in str(raised.value)


def test_a_token_that_would_take_too_long_is_refused():
    given = metadata('pieces')
    tokens = [*given['tokenizer.ggml.tokens'][:-1], 'a' * 2000]
    with pytest.raises(UsageError, match='a token of 2,000 letters: download it again'):
        vocabulary({**given, 'tokenizer.ggml.tokens': tokens}, len(tokens))


def test_every_cut_is_recorded():
    assert {*CUTS, 'pieces', 'pieces with a space'} == {*RECORDED['ids']}
    assert np.all([len(ids) == len(RECORDED['texts']) for ids in RECORDED['ids'].values()])
