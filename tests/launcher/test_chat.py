"""A conversation in the terminal, with a tiny model of bytes."""

import dataclasses
import itertools

import pytest

from layercomb import Model, models, shape_dtype
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError
from layercomb.launcher import chat
from layercomb.supervised import decoding


@dataclasses.dataclass(frozen=True)
class Talking(ByteTokenizer):
    """Bytes, and a template of one letter for each role."""

    chat: bool = True

    def encode_chat(self, messages):
        turns = ''.join(f'{m["role"][0]}:{m["content"]}\n' for m in messages)
        return self.encode(turns + 'a:')


@pytest.fixture(scope='module')
def model():
    net = models.TransformerLM(256, 8, 8, n_layers=1, n_heads=2, max_len=64)
    return Model(net).init(shape_dtype((1, 8), 'int32'))


def lines(*given):
    """A reader of these lines: an exception among them is raised."""
    left = iter(given)

    def read(prompt):
        line = next(left, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def talk(model, *given, **options):
    options = {'system': None, 'n_tokens': 5, 'sampling': {'temperature': 1.0}} | options
    chat.talk(model, Talking(), **options, read=lines(*given))


def test_answers_are_the_same_with_drafts(model, capsys):
    for sampling in ({'temperature': 0.0}, {'temperature': 0.5, 'rng': 3}):
        said = []
        for speculate in (None, decoding.Lookup(2, 1), decoding.Draft(model, 3)):
            talk(model, 'hi', 'hi', n_tokens=9, sampling=sampling, speculate=speculate)
            said.append(capsys.readouterr().out)
        assert said == said[:1] * 3


def test_answers_are_printed_and_remembered(model, capsys, monkeypatch):
    asked = []
    answers = (iter([f'answer {i}', '!']) for i in itertools.count())

    def answer(self, ids, sampling):
        asked.append(bytes(ids).decode())
        return next(answers)

    monkeypatch.setattr(chat.Conversation, 'answer', answer)
    talk(model, 'hi', '', 'and', '/reset', 'new', '/system S', 'x', system='Be')
    assert capsys.readouterr().out == 'answer 0!\nanswer 1!\nanswer 2!\nanswer 3!\n'
    assert asked == [
        's:Be\nu:hi\na:',
        's:Be\nu:hi\na:answer 0!\nu:and\na:',
        's:Be\nu:new\na:',
        's:S\nu:x\na:',
    ]


def test_an_answer_is_what_the_model_makes(model, capsys):
    talk(model, 'hi', sampling={'temperature': 0})
    printed = capsys.readouterr().out
    ids = [[int(i) for i in Talking().encode('u:hi\na:')]]
    made = decoding.generate(model, ids, 5, temperature=0, eos_id=0)[0].tolist()
    made = made[: made.index(0)] if 0 in made else made
    assert printed == Talking().decode(made) + '\n'


def test_ctrl_c_stops_an_answer_and_not_the_program(model, capsys, monkeypatch):
    def answer(self, ids, sampling):
        yield 'half'
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Conversation, 'answer', answer)
    talk(model, 'hi', KeyboardInterrupt(), '/exit', 'never read')
    captured = capsys.readouterr()
    assert captured.out == 'half'
    assert '(stopped)' in captured.err and '(Ctrl-D or /exit ends)' in captured.err


def test_the_oldest_turns_are_forgotten_and_the_system_prompt_stays(model):
    conversation = chat.Conversation(model, Talking(), 10)
    conversation.reset('Be')
    for said in ('1' * 10, '2' * 10):
        assert conversation.ask(said)[1] == 0
        conversation.answered('yes')
    ids, n_forgotten = conversation.ask('3' * 14)
    assert n_forgotten == 2 and len(ids) + 10 <= 64
    assert [m['content'] for m in conversation.messages] == ['Be', '2' * 10, 'yes', '3' * 14]


def test_a_turn_that_is_too_long_is_refused_and_nothing_is_forgotten(model, capsys):
    conversation = chat.Conversation(model, Talking(), 10)
    conversation.ask('hi')
    before = conversation.messages
    with pytest.raises(UsageError, match='tokens too long: the model reaches 64'):
        conversation.ask('x' * 70)
    assert conversation.messages is before
    talk(model, 'x' * 70, '/nothing', '/help')
    said = capsys.readouterr()
    assert said.out == ''
    assert 'too long' in said.err and 'there is no /nothing' in said.err and '/system' in said.err


def test_a_model_without_a_template_does_not_talk(model):
    with pytest.raises(UsageError, match='no chat template, so it only continues texts'):
        chat.talk(model, ByteTokenizer(), None, 5, {})
    with pytest.raises(UsageError, match='--n_tokens 0 leaves no room'):
        chat.talk(model, Talking(), None, 0, {})
