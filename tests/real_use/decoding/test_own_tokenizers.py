"""Tokenizers and sources of one's own: what has all that is documented works, or is refused."""

from __future__ import annotations

import asyncio
import enum
import logging
import types
import unicodedata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import layercomb as lc
from layercomb import data, models, serving, tl
from layercomb.data.adapted import adapted
from layercomb.data.packing import token_stream
from layercomb.data.pieces import PieceDecoder
from layercomb.errors import UsageError
from layercomb.launcher import terminal
from layercomb.launcher.experiment import Experiment
from layercomb.serving.protocol import Refusal, Request
from layercomb.supervised import TrainTask, decoding
from layercomb.supervised.decoding import prompts


class Words:
    """All that `data.Tokenizer` names, and nothing more: a word is an id, its length."""

    vocab_size, eos_id = 16, 0

    def encode(self, text):
        return np.array([len(word) for word in text.split()], np.int32)

    def decode(self, ids):
        assert type(ids) is list and all(type(i) is int for i in ids)
        return ' '.join('x' * i for i in ids)


class Pieces(Words):
    """As SentencePiece has it: a piece holds the space before it, and the first one is dropped."""

    pieces = ('', ' a', ' b', 'c', ' ')

    def encode(self, text):
        return [1 + 'ab'.index(word) for word in text.split()]

    def decode(self, ids):
        return ''.join(self.pieces[i] for i in ids).removeprefix(' ')


GREEDY = decoding.Sampler(0)


def other(**fields):
    return type('Other', (Words,), fields)()


def whole(ids):
    return lambda self, text: ids


@pytest.fixture(scope='module')
def model():
    net = models.TransformerLM(16, 8, 8, 1, 1, max_len=32)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


def answered(application, request):
    async def ask():
        engine = application.state.engine
        running = await engine.start(request)
        text = ''.join([piece.text async for piece in running.pieces()])
        while engine.n_running:
            await asyncio.sleep(0.001)
        return text

    return asyncio.run(ask())


@pytest.mark.parametrize(
    'make', [list, tuple, np.array, jnp.array, np.uint8, np.int64, lambda x: np.array(x, '>i2')]
)
def test_an_encoder_may_give_integers_of_any_kind(make):
    tokenizer = other(encode=lambda self, text: make([len(word) for word in text.split()]))
    assert token_stream(['a bb', 'ccc'], tokenizer).tolist() == [0, 1, 2, 0, 3, 0]
    ((inputs, targets, _),) = data.packed(
        ['a bb', 'ccc'], 5, 1, tokenizer, shuffle=False, num_epochs=1
    )
    assert inputs.tolist() == [[0, 1, 2, 0, 3]] and targets.tolist() == [[1, 2, 0, 3, 0]]
    ((inputs, targets, _),) = data.bucketed(
        ['a bb'], [4], [1], tokenizer, shuffle=False, num_epochs=1
    )
    assert inputs.tolist() == [[0, 1, 2, 0]] and targets.tolist() == [[1, 2, 0, 0]]
    (example,) = data.pairs([('a bb', 'ccc')], 3, 3, tokenizer)
    assert example[0].tolist() == [1, 2, 0] and example[3].tolist() == [3, 0, 0]


NO_IDS = [
    [1.0, 2.0],
    [[1, 2], [3]],
    [[1, 2]],
    np.float32([1]),
    ['a', 'b'],
    'ab',
    [True, False],
    5,
    None,
    {1, 2},
    types.SimpleNamespace(ids=[1]),
]


@pytest.mark.parametrize('ids', NO_IDS, ids=repr)
def test_an_encoder_that_gives_no_ids_is_refused_when_it_is_given(model, ids):
    tokenizer = other(encode=whole(ids))
    for give in (
        lambda: data.packed(['ab'], 4, 1, tokenizer),
        lambda: data.bucketed(['ab'], [4], [1], tokenizer),
        lambda: data.pairs([('a', 'b')], 4, 4, tokenizer),
        lambda: serving.app(model, tokenizer, 'own'),
    ):
        with pytest.raises(TypeError, match=r'Other\.encode gave .*: token ids are a sequence of'):
            give()


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'vocab_size': None}, 'Other: vocab_size must be an int, got None'),
        ({'vocab_size': 16.0}, r'Other: vocab_size must be an int, got 16\.0'),
        ({'vocab_size': lambda self: 16}, 'vocab_size must be an int, got <bound method'),
        ({'vocab_size': 0}, 'vocab_size must be at least 1 and at most 2147483647, got 0'),
        ({'eos_id': None}, 'Other: eos_id must be an int, got None'),
        ({'eos_id': -1}, 'eos_id must be at least 0 and below 16, got -1'),
        ({'eos_id': 16}, 'eos_id must be at least 0 and below 16, got 16'),
        ({'eos_id': True}, 'eos_id must be an int, got True'),
    ],
)
def test_what_a_tokenizer_says_about_itself_is_checked(model, fields, said):
    for give in (
        lambda: data.packed(['ab'], 4, 1, other(**fields)),
        lambda: serving.app(model, other(**fields), 'own'),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            give()


def test_sizes_may_be_numpys_and_properties():
    fields = {'vocab_size': property(lambda self: np.uint8(16)), 'eos_id': np.array(15)}
    stream = token_stream(['a bb'], adapted(other(**fields), must_decode=True))
    assert stream.tolist() == [15, 1, 2, 15]


def raises(self, ids):
    raise KeyError(ids[0])


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'decode': raises}, r'gave the ids \[1\] and does not decode that list \(KeyError: 1\)'),
        ({'decode': lambda self, ids: ids.tolist()}, 'AttributeError'),
        ({'decode': lambda self, ids: b'x'}, 'decode gave bytes: text is a str'),
        ({'incremental_decoder': lambda self: self}, 'see data.Tokenizer for what'),
    ],
)
def test_a_tokenizer_that_makes_no_text_is_refused_where_text_is_made(model, fields, said):
    assert data.packed(['ab cd'], 4, 1, other(**fields)) is not None  # data needs none
    with pytest.raises(TypeError, match=said):
        serving.app(model, other(**fields), 'own')


def test_a_tokenizer_without_incremental_decoding_serves_and_generates(model, capsys):
    application = serving.app(model, Words(), 'own')
    tokens = decoding.generate(model, [[1, 2]], 6, temperature=0, eos_id=0)[0].tolist()
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    answer = answered(application, Request(((1, 2),), 6, sampling=GREEDY))
    assert answer == ''.join(' ' + 'x' * i for i in tokens)
    echoed = answered(application, Request(((1, 2),), 6, sampling=GREEDY, echo=True))
    assert echoed == 'x xx' + answer
    stopped = answered(application, Request(((1, 2),), 6, sampling=GREEDY, stop=(answer[2:4],)))
    assert stopped == answer[: answer.find(answer[2:4])]
    given = prompts.given(model, 'a bb', Words())
    terminal.write_stream(
        given['prompts'][0], decoding.stream(model, **given, n_tokens=6, temperature=0), Words()
    )
    assert capsys.readouterr().out.startswith('x xx')


def experiment(model, tokenizer, **fields):
    batches = data.packed(['a bb ccc'], 4, 2, Words())
    task = TrainTask(batches, tl.CrossEntropyLoss(), optax.sgd(0.1))
    return Experiment(model.layer, task, tokenizer=tokenizer, **fields)


def test_a_sample_is_one_text_with_its_prompt(model, capsys):
    made = experiment(model, Words(), sample_prompt='a bb', sample_tokens=5, sample_temperature=0)
    made.check()
    trained = types.SimpleNamespace(weights=model.weights, state=model.state)
    terminal.write_result(made, trained, {'step': 1}, Path('run'))
    tokens = decoding.generate(model, [[1, 2]], 5, temperature=0, eos_id=0)[0].tolist()
    tokens = tokens[: tokens.index(0)] if 0 in tokens else tokens
    assert f'a sample:\n{Words().decode([1, 2, *tokens])}\n' in capsys.readouterr().out


def test_an_experiment_refuses_a_tokenizer_when_it_is_described(model):
    experiment(model, other(decode=raises))  # nothing is shown
    with pytest.raises(TypeError, match='does not decode that list'):
        experiment(model, other(decode=raises), sample_prompt='a bb')
    with pytest.raises(ValueError, match='eos_id must be at least 0 and below 16, got 16'):
        experiment(model, other(eos_id=16))


def test_ids_that_the_tokenizer_does_not_decode_end_an_answer(model, forced, caplog):
    class Few(Words):
        def decode(self, ids):
            return ' '.join(['', 'x', 'xx'][i] for i in ids)

    application = serving.app(model, Few(), 'own')
    tokens = [np.array([1]), np.array([7])]
    forced.making([1, 7])
    with caplog.at_level(logging.CRITICAL, 'layercomb'), pytest.raises(Refusal) as caught:
        answered(application, Request(((1,),), 6))
    assert caught.value.status == 500
    with pytest.raises(UsageError, match='list index out of range'):
        terminal.write_stream([1], iter(tokens), Few())


def test_an_encoder_may_make_nothing_of_a_text(model):
    class Digits(Words):
        def encode(self, text):
            return [int(c) for c in text if c.isdigit()]

    serving.app(model, Digits(), 'own')
    with pytest.raises(UsageError, match="Digits makes no token of the prompt 'The'"):
        prompts.given(model, 'The', Digits())
    with pytest.raises(UsageError, match='the 2 documents are empty'):
        data.packed(['a', 'b'], 4, 1, Digits())
    ((inputs, targets, weights),) = data.packed(
        ['a', '12'], 4, 1, Digits(), shuffle=False, num_epochs=1
    )
    assert inputs.tolist() == [[0, 0, 1, 2]] and targets.tolist() == [[0, 1, 2, 0]]
    assert weights.sum() == 4


def test_a_tokenizer_made_of_bytes_with_ids_of_its_own(model):
    """What it inherits decodes bytes, and its ids are none."""

    class Doubled(data.ByteTokenizer):
        vocab_size = 512

        def encode(self, text):
            return 2 * super().encode(text)

        def decode(self, ids):
            return super().decode([i // 2 for i in ids])

    decoder = adapted(Doubled()).incremental_decoder()
    pieces = [decoder.decode(i) for i in Doubled().encode('né!')]
    assert pieces == ['n', '', 'é', '!']


def test_documents_of_bytes_reach_encoders_of_text():
    """Sources of files hold bytes, and most tokenizers take a str alone."""

    class Text(Words):
        def encode(self, text):
            assert type(text) is str
            return [len(word) for word in text.split()]

    assert token_stream([b'\xc3\xa9 bb', bytearray(b'a')], Text()).tolist() == [0, 1, 2, 0, 1, 0]


class Title(str):
    pass


class Titles(str, enum.Enum):  # noqa: UP042  (which prints its name)
    FIRST = 'né'


@pytest.mark.parametrize(
    'document',
    [Title('né'), Titles.FIRST, np.str_('né'), bytearray('né'.encode()), memoryview('né'.encode())],
)
def test_documents_of_kinds_of_text(document):
    assert token_stream([document], data.ByteTokenizer()).tolist() == [0, 110, 195, 169, 0]
    assert list(data.continuations([document], 1)) == [(b'n', b'\xc3\xa9')]


@pytest.mark.parametrize('document', [5, None, ['a'], np.array(['a', 'b'])])
def test_documents_that_are_no_text(document):
    for use in (
        lambda: token_stream([document], data.ByteTokenizer()),
        lambda: data.continuations([document], 1)[0],
    ):
        with pytest.raises(TypeError, match='a document is a str or bytes, not'):
            use()


def test_the_end_of_a_source_is_no_document():
    """A tokenizer that begins each text with a token of its own begins no text there."""
    tokenizer = other(encode=lambda self, text: [9, *(len(word) for word in text.split())])
    how = {'shuffle': False, 'num_epochs': 1}
    batches = [
        [x.tolist() for x in batch]
        for streaming in (False, True)
        for batch in data.packed(['a', 'bb'], 6, 1, tokenizer, streaming=streaming, **how)
    ]
    assert batches[0] == batches[1]
    assert batches[0][0] == [[0, 9, 1, 0, 9, 2]] and batches[0][1] == [[9, 1, 0, 9, 2, 0]]


# Text in pieces


def pieces_of(decode, ids, size=1):
    decoder = PieceDecoder(decode)
    made = [decoder.decode(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*made, decoder.decode([], final=True)]


@given(st.binary(max_size=120), st.integers(1, 4))
def test_pieces_join_to_the_whole_whatever_the_bytes(ids, size):
    decode = data.ByteTokenizer().decode
    assert ''.join(pieces_of(decode, list(ids), size)) == decode(ids)


@given(st.lists(st.integers(0, 4), max_size=90), st.integers(1, 4))
def test_pieces_join_where_a_text_begins_in_another_way(ids, size):
    assert ''.join(pieces_of(Pieces().decode, ids, size)) == Pieces().decode(ids)


def test_no_character_is_shown_before_it_is_whole():
    made = pieces_of(data.ByteTokenizer().decode, list('a€😀'.encode()))
    assert made == ['a', '', '', '€', '', '', '', '😀', '']


def test_a_character_whose_bytes_are_marked_one_by_one():
    """As decoders of bytes do that fall back: each byte of an unfinished run is a U+FFFD."""

    def decode(ids):
        try:
            return bytes(ids).decode()
        except UnicodeDecodeError:
            return '\ufffd' * len(ids)

    assert pieces_of(decode, list('€€'.encode())) == ['', '', '€', '', '', '€', '']
    assert ''.join(pieces_of(decode, list('€€'.encode())[:-1])) == '€\ufffd\ufffd'


def test_unfinished_bytes_as_halves_of_surrogate_pairs():
    """As decoders make them that let no byte be lost."""
    escaped = other(decode=lambda self, ids: bytes(ids).decode(errors='surrogateescape'))
    decoder = adapted(escaped).incremental_decoder()
    assert [decoder.decode(i) for i in 'a€'.encode()] == ['a', '', '', '€']
    assert decoder.decode([0xE2], final=True) == '\ufffd'


def test_a_text_that_later_ids_change_still_goes_on():
    """What was shown cannot be taken back; what comes is not lost."""
    decode = lambda ids: ''.join('ab'[i] for i in ids).replace('aab', 'X')  # noqa: E731
    assert pieces_of(decode, [0, 0, 1, *[1] * 12]) == ['a', 'a', *'b' * 13, '']


def cleaned(ids):
    """As WordPiece is shown: words with spaces between, of which some rules take some out."""
    text = ' '.join(WORDS[i] for i in ids)
    for before, after in [(' .', '.'), (' ,', ','), (" ' ", "'"), (' ?', '?')]:
        text = text.replace(before, after)
    return text


WORDS = ['i', 'don', "'", 't', 'know', 'what', 'it', 'is', 'about', ',']
WORDS += ['but', 'we', 'can', 'stop', '.', 'é', '日本', 'now', '?']


def test_spaces_that_are_taken_out_later():
    ids = [
        WORDS.index(word)
        for word in ['i', 'don', "'", 't', 'know', ',', 'but', 'it', "'", 't', 'is', 'about']
    ]
    made = pieces_of(cleaned, ids)
    assert made[:6] == ['i', ' don', " '", 't', ' know', ',']
    assert ''.join(made) == "i don 't know, but it 't is about"
    assert cleaned(ids) == "i don't know, but it't is about"
    assert ''.join(pieces_of(cleaned, ids, len(ids))) == cleaned(ids)  # all at once


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=120), st.integers(1, 5))
def test_what_is_shown_of_a_text_that_changes_differs_in_spaces_alone(ids, size):
    made = pieces_of(cleaned, ids, size)
    assert ''.join(''.join(made).split()) == ''.join(cleaned(ids).split())
    assert all(made[: -(-len(ids) // size)])  # something with each


def test_letters_that_melt_into_one():
    """An accent that comes after its letter is not lost, and the letter is not shown again."""
    letters = ['e', '\u0301', ' ', 'x']
    decode = lambda ids: unicodedata.normalize('NFC', ''.join(letters[i] for i in ids))  # noqa: E731
    made = pieces_of(decode, [0, 1, 2, 3, 0, 1, 3])
    assert unicodedata.normalize('NFC', ''.join(made)) == 'é xéx' and all(made[:-1])


def euros(ids):
    return bytes('€'.encode()[i % 3] for i in ids).decode(errors='replace')


ADDS = {
    'letters': (data.ByteTokenizer().decode, 97),
    'three bytes each': (euros, 0),
    'a mark at the beginning': (lambda ids: '<s>' + ' '.join(WORDS[i % 19] for i in ids), 0),
    'a line that ends': (lambda ids: ' '.join(WORDS[i % 19] for i in ids) + '\n', 0),
    'nothing': (lambda ids: '', 0),
    'a mark alone': (lambda ids: '<s>', 0),
    'little': (lambda ids: ''.join(' ' + WORDS[i % 19] for i in ids if i % 9 == 0).lstrip(), 0),
    'very little': (lambda ids: ''.join(' x' for i in ids if i % 50 == 0).lstrip(), 0),
    'cleaned': (lambda ids: cleaned([i % 19 for i in ids]), 0),
}  # fmt: skip


@pytest.mark.parametrize('name', ADDS)
def test_a_piece_costs_the_same_however_long_the_text_is(name):
    costs = []
    decode, first = ADDS[name]

    def counted(ids):
        costs.append(len(ids))
        return decode(ids)

    ids = [first + i % 26 if name == 'letters' else i for i in range(2000)]
    text = ''.join(pieces_of(counted, ids))
    if name not in ('a line that ends', 'cleaned'):
        assert text == decode(ids)
    assert max(costs) <= 100 and sum(costs) < 60 * 2000


def test_a_long_prompt_is_forgotten_at_once():
    costs = []

    def decode(ids):
        costs.append(len(ids))
        return '<s>' + bytes(ids).decode(errors='replace')

    decoder = PieceDecoder(decode)
    prompt = 'na €'.encode() * 1000
    assert decoder.decode(prompt) == '<s>' + 'na €' * 1000
    del costs[:]
    assert ''.join(decoder.decode(i) for i in prompt) == 'na €' * 1000
    assert max(costs) <= 40


def test_text_that_depends_on_all_before_it_is_right_and_costs_more():
    decode = lambda ids: ''.join(f'{n}:{i} ' for n, i in enumerate(ids))  # noqa: E731
    ids = list(range(300))
    assert ''.join(pieces_of(decode, ids)) == decode(ids)


# Letters that a tokenizer does not know


class Bases:
    """Of four letters; what else there is becomes an id that stands for no text."""

    vocab_size, eos_id = 6, 5
    letters = 'ACGT'

    def encode(self, text):
        return [self.letters.index(c) if c in self.letters else 4 for c in text]

    def decode(self, ids):
        return ''.join(self.letters[i] for i in ids)


class Greek(Bases):
    letters = 'αβγδ'


class Framed(Greek):
    """With an id at either end."""

    def encode(self, text):
        return [5, *super().encode(text), 5]


@pytest.mark.parametrize('kind', [Bases, Greek, Framed])
def test_a_tokenizer_of_another_alphabet_is_taken(kind):
    made = adapted(kind(), must_decode=True)
    assert made.decode([0, 3]) == kind.letters[0] + kind.letters[3]


def test_a_tokenizer_that_knows_letters_and_decodes_none_is_refused():
    class Broken(Bases):
        def decode(self, ids):
            return ''.join({'A': 'A'}[i] for i in ids)

    with pytest.raises(TypeError, match=r'Broken gave the ids \[4\] and does not decode that list'):
        adapted(Broken(), must_decode=True)

    class Bytes(Greek):
        def decode(self, ids):
            return b'x'

    with pytest.raises(TypeError, match='decode gave bytes: text is a str'):
        adapted(Bytes(), must_decode=True)


def test_the_size_of_a_vocabulary_is_asked_for_once():
    asked = []
    size = property(lambda self: asked.append(1) or 16)
    tokenizer = adapted(other(vocab_size=size))
    for _ in range(50):
        tokenizer.encode('a bb')
    assert len(asked) == 1 and tokenizer.vocab_size == 16
    assert tokenizer == adapted(tokenizer.tokenizer) and hash(tokenizer)
    with pytest.raises(AttributeError):
        tokenizer.tokenizer = None


# Numbers and sources


@pytest.mark.parametrize('number', [np.int64, np.uint8, jnp.int32])
def test_integers_of_numpy_and_jax_are_integers(number):
    how = {'seed': number(3), 'num_epochs': number(1), 'shard': (number(0), number(1))}
    (batch,) = data.packed(['abc'], number(4), number(1), **how)
    assert batch[0].tolist() == [[0, 97, 98, 99]]
    (batch,) = data.bucketed(['abc'], [number(4)], [number(1)], **how)
    assert batch[1].tolist() == [[97, 98, 99, 0]]
    assert data.pairs([('ab', 'c')], number(3), number(3))[0][0].tolist() == [97, 98, 0]
    for make in (data.copy, data.copy_pairs):
        plain, made = make(200, 128, seed=3)[5], make(number(200), number(128), seed=number(3))[5]
        assert all(np.array_equal(x, y) for x, y in zip(plain, made, strict=True))
    assert len(data.duplication(number(8), number(4), number(7))) == 7
    assert data.witten_bell_bits_per_byte(['ab'], ['ab'], orders=np.array([1, 2])).keys() == {1, 2}
    limits = serving.Limits(max_tokens=number(5), patience=np.float32(1.5))
    assert limits == serving.Limits(max_tokens=5, patience=1.5) and type(limits.max_tokens) is int


@pytest.mark.parametrize('wrong', [True, np.True_, np.array([3]), 3.0, np.float32(3), '3'])
def test_what_is_no_integer_is_refused(wrong):
    for give in (
        lambda: data.packed(['abc'], wrong, 1),
        lambda: data.packed(['abc'], 4, wrong),
        lambda: data.packed(['abc'], 4, 1, seed=wrong),
        lambda: data.bucketed(['abc'], [wrong], [1]),
        lambda: data.copy(wrong),
    ):
        with pytest.raises(TypeError, match=r'must be (an int|a sequence of int), got'):
            give()
    with pytest.raises(TypeError, match='Limits: max_tokens must be an int, got'):
        serving.Limits(max_tokens=wrong)
    with pytest.raises(TypeError, match='orders must be a sequence of int, got'):
        data.witten_bell_bits_per_byte(['ab'], ['ab'], orders=[wrong])


@pytest.mark.parametrize('wrong', ['long', float('nan'), float('inf'), None, True])
def test_seconds_that_a_server_cannot_wait(wrong):
    said = 'patience must be (above 0 and finite|a number), got'
    with pytest.raises((TypeError, ValueError), match=said):
        serving.Limits(patience=wrong)


class Own:
    """A sequence with `__len__` and `__getitem__` alone."""

    def __init__(self, items):
        self._items = items

    def __len__(self):
        return len(self._items)

    def __getitem__(self, i):
        return self._items[i]


@pytest.mark.parametrize('kind', [Own, tuple, np.array])
@pytest.mark.parametrize('streaming', [False, True])
def test_a_source_of_ones_own_needs_a_length_and_elements(kind, streaming):
    how = {'shuffle': False, 'num_epochs': 1, 'streaming': streaming}
    (batch,) = data.packed(kind(['ab', 'c']), 5, 1, **how)
    assert batch[0].tolist() == [[0, 97, 98, 0, 99]]


@pytest.mark.parametrize(
    'source', [(x for x in ['ab']), {'a': 1}, {0: 'ab'}, {'ab'}, bytearray(b'ab'), iter(['ab'])]
)
def test_what_has_no_order_or_no_end_is_no_source(source):
    for give in (
        lambda: data.packed(source, 4, 1),
        lambda: data.bucketed(source, [4], [1]),
        lambda: data.batches(source, 1),
        lambda: data.pairs(source, 4, 4),
    ):
        with pytest.raises(TypeError, match='source must be a sequence of documents or examples'):
            give()


def test_rows_of_an_array_are_no_examples():
    for source in (np.zeros((4, 3, 2)), [[[1], [2], [1.0]]]):
        with pytest.raises(TypeError, match=r'batches takes \(inputs, targets, loss_weights\)'):
            data.batches(source, 1)


def test_weights_of_a_bucket_keep_their_fractions():
    """Whatever type the first example of a batch has."""
    source = [(np.int32([1]), np.int32([1]), [1]), (np.int32([2]), np.int32([2]), [0.5])]
    (batch,) = data.bucketed(source, [2], [2], shuffle=False, num_epochs=1)
    assert batch[2].tolist() == [[1, 0], [0.5, 0]]


def test_images_are_no_sequences_to_bucket():
    source = [(np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2)))]
    with pytest.raises(ValueError, match=r'tuples of 1-D arrays, and the source holds .*\(2, 2\)'):
        next(iter(data.bucketed(source, [4], [1], shuffle=False)))
