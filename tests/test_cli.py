"""The launcher, as a person meets it: what it prints, what it refuses, and its exit codes."""

import io
import json
import re
import shutil
import sys

import pytest

from layercomb import cli

TINY = """
from __gin__ import dynamic_registration
from layercomb import cli
from layercomb import data
from layercomb import layers as tl
from layercomb import models
from layercomb import optimizers
from layercomb import supervised

cli.train.model = @models.TransformerLM()
cli.train.train_task = @supervised.TrainTask()
cli.train.eval_tasks = @supervised.EvalTask()
cli.train.steps = 3
cli.train.tokenizer = @data.ByteTokenizer()
cli.train.sample_prompt = 'ab'
cli.train.sample_tokens = 5

models.TransformerLM.vocab_size = 256
models.TransformerLM.d_model = 8
models.TransformerLM.d_ff = 8
models.TransformerLM.n_layers = 1
models.TransformerLM.n_heads = 2
models.TransformerLM.max_len = 24

supervised.TrainTask.data = @data.packed()
supervised.TrainTask.loss = @tl.CrossEntropyLoss()
supervised.TrainTask.optimizer = @optimizers.adamw()
supervised.EvalTask.data = @data.packed()
supervised.EvalTask.metrics = @tl.BitsPerByte()
supervised.EvalTask.n_batches = 1
optimizers.adamw.learning_rate = 0.01

data.packed.source = @data.text_files()
data.packed.length = 8
data.packed.batch_size = 2
data.packed.shuffle = False
data.text_files.pattern = '{text}'
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A text, a configuration that trains on it, and a finished run."""
    folder = tmp_path_factory.mktemp('launcher')
    (folder / 'text.txt').write_text('the cat sat on the mat. ' * 20)
    config = folder / 'tiny.gin'
    config.write_text(TINY.replace('{text}', str(folder / 'text.txt')))
    run = folder / 'run'
    assert cli.main(['train', str(config), '--output_dir', str(run)]) == 0
    return folder, config, run


def refused(capsys, *arguments):
    """What the launcher says, in one line, when it exits with code 2."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('layercomb: ') and captured.err.count('\n') == 1, captured.err
    return captured.err


def train(files, *bindings, directory='other'):
    folder, config, _ = files
    params = [x for b in bindings for x in ('--gin_param', b)]
    return ('train', config, '--output_dir', folder / directory, *params)


def test_run_directory_describes_itself(files):
    _, _, run = files
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['step'] == 3 and 'valid/bits_per_byte' in rows[-1]
    assert (run / 'report.png').stat().st_size > 1000
    assert 'models.TransformerLM.d_model = 8' in (run / 'config.gin').read_text()
    assert list(run.glob('events.out.tfevents*'))


def test_the_operative_config_names_defaults_too(files):
    _, _, run = files
    bound, operative = ((run / name).read_text() for name in ('config.gin', 'operative_config.gin'))
    for name in ('models.TransformerLM.d_model = 8', "models.TransformerLM.positions = 'learned'"):
        assert name in operative
    assert 'cli.train.keep = 3' in operative and 'keep' not in bound


def test_train_again_is_finished_and_more_steps_go_on(files, capsys):
    _, config, run = files
    again = ['train', str(config), '--output_dir', str(run)]
    assert cli.main(again) == 0
    out = capsys.readouterr().out
    assert 'step 3: ' in out and 'a sample:\nab' in out and str(run) in out
    assert cli.main([*again, '--gin_param', 'train.steps=5']) == 0
    assert 'step 5: ' in capsys.readouterr().out
    steps = [json.loads(line)['step'] for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 5


def test_byte_models_are_measured_on_the_batches_of_the_eval_task(files, capsys):
    _, config, run = files
    wanted = 'train.baseline_text=@data.text_files()'
    said = []
    for n_batches in (1, 3):
        params = ('--gin_param', wanted, '--gin_param', f'EvalTask.n_batches={n_batches}')
        assert cli.main(['train', str(config), '--output_dir', str(run), *params]) == 0
        line = re.search(r'beside it, Witten–Bell .*', capsys.readouterr().out)
        assert line is not None
        said.append(line[0])
    assert said[0] != said[1]


def test_eval(files, capsys):
    _, _, run = files
    assert cli.main(['eval', str(run), '--gin_param', 'EvalTask.n_batches=2']) == 0
    assert 'valid/bits_per_byte ' in capsys.readouterr().out


def test_generate_streams_and_reads_prompts(files, capsys, monkeypatch, tmp_path):
    _, _, run = files
    (tmp_path / 'prompt').write_text('cat')
    how = ['--n_tokens', '4', '--temperature', '0']
    said = []
    for prompt in (['--prompt', 'cat'], ['--prompt_file', str(tmp_path / 'prompt')]):
        assert cli.main(['generate', str(run), *prompt, *how]) == 0
        captured = capsys.readouterr()
        said.append(captured.out)
        assert captured.out.startswith('cat') and 'tokens' in captured.err
    monkeypatch.setattr('sys.stdin', io.StringIO('cat'))
    assert cli.main(['generate', str(run), '-', *how]) == 0
    said.append(capsys.readouterr().out)
    assert len(set(said)) == 1


def test_inspect_config_and_run(files, capsys):
    _, config, run = files
    for what in (config, run):
        assert cli.main(['inspect', str(what)]) == 0
        out = capsys.readouterr().out
        assert 'block/residual/self_attention/query' in out and 'temporaries' in out


MISTAKES = {
    'train.model=3': 'train.model must be a layer, got 3',
    "adamw.learning_rate='abc'": "learning_rate must be a number, got 'abc'",
    "TransformerLM.d_model='8'": "must be an int.*, got '8'",
    'TransformerLM.n_heads=3': r'3 heads do not divide the width 8: use \d',
    "TransformerLM.activation='relux'": "no activation 'relux': there are elu",
    "TransformerLM.positions='x'": "no positions 'x': there are learned",
    'models.TransformerLM.attention=(@tl.SelfAttention(),)': "'n_heads'",
    'TransformerLM.attention=@tl.RMSNorm': 'write the name in full',
    'train.stepz=3': "doesn't have a parameter named 'stepz'",
    'tl.Denze.n_units=3': 'did you mean Dense',
    'train.steps=': 'Unable to parse',
    "train.steps='3'": "train: steps='3': give a positive integer",
    "text_files.pattern='nothing/*.txt'": "no file matches 'nothing/\\*.txt'|nothing",
    'data.packed.batch_size=0': 'batch_size=0',
    'TrainTask.accumulate=3': 'accumulate=3 does not divide a batch of 2 rows',
    'TransformerLM.max_len=4': 'the sequence is 8 long and max_len=4: shorten it',
    'TransformerLM.vocab_size=50': r'token id \d+ is outside the vocabulary of 50',
    'train.train_task=@tl.CrossEntropyLoss()': 'train.train_task must be a TrainTask',
    'TrainTask.loss_chunk_len=-1': 'loss_chunk_len',
}


@pytest.mark.parametrize('binding', MISTAKES)
def test_mistakes_in_a_binding(files, capsys, binding):
    said = refused(capsys, *train(files, binding, directory='mistake'))
    assert re.search(MISTAKES[binding], said), said
    assert not (files[0] / 'mistake' / 'metrics.jsonl').exists()


def test_mistakes_with_files(files, capsys, tmp_path):
    folder, config, run = files
    said = refused(capsys, 'train', 'no_such_config')
    assert re.search('one of .*transformer_python', said), said
    assert 'holds another experiment (models.TransformerLM.d_ff is 8 there, 16 here)' in refused(
        capsys, *train(files, 'TransformerLM.d_ff=16', directory='run')
    )
    (tmp_path / 'letter').write_text('dear')
    assert 'is not empty and holds no run' in refused(
        capsys, 'train', config, '--output_dir', tmp_path
    )
    assert (tmp_path / 'letter').read_text() == 'dear'
    assert 'holds no run (config.gin is missing)' in refused(capsys, 'eval', tmp_path)
    assert 'cannot read' in refused(capsys, 'generate', run, '--prompt_file', folder / 'nothing')
    assert 'give one of --prompt' in refused(capsys, 'generate', run)
    assert 'the prompt is empty' in refused(capsys, 'generate', run, '--prompt', '')
    assert "the model's max_len is 24" in refused(
        capsys, 'generate', run, '--prompt', 'x' * 30, '--n_tokens', 2
    )
    assert 'temperature must be' in refused(
        capsys, 'generate', run, '--prompt', 'x', '--n_tokens', 2, '--temperature', -1
    )
    broken = tmp_path / 'broken.gin'
    broken.write_text('from __gin__ import dynamic_registration\nimport no_such_module\n')
    assert "No module named 'no_such_module'" in refused(capsys, 'inspect', broken)


def test_a_missing_extra_names_what_to_install(capsys, files, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gin', None)
    assert 'pip install "layercomb[train]"' in refused(capsys, 'inspect', files[1])


def test_a_corrupt_checkpoint_is_named(capsys, files, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(files[2], run)
    steps = sorted((run / 'checkpoints').iterdir(), key=lambda p: p.name)
    largest = max(
        (steps[-1] / 'weights').rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    largest.write_bytes(b'x' * largest.stat().st_size)
    assert 'is damaged' in refused(capsys, 'generate', run, '--prompt', 'x', '--n_tokens', 2)
