"""The launcher, as a person meets it: what it prints, what it refuses, and its exit codes."""

import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from layercomb import Model, cli, models, serving, shape_dtype, trees
from layercomb.data import ByteTokenizer
from layercomb.errors import UsageError, usage_errors
from layercomb.interop.safetensors import load_weights
from layercomb.launcher import runs
from layercomb.supervised import decoding

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


def test_the_best_checkpoint_and_others_by_their_step(files, capsys, tmp_path):
    _, config, _ = files
    run = str(tmp_path / 'run')
    bindings = ('keep_best="valid/bits_per_byte"', 'eval_every=1', 'keep=1', 'sample_prompt=None')
    params = [x for b in bindings for x in ('--gin_param', f'train.{b}')]
    wild = ['--gin_param', 'adamw.learning_rate=3.0']
    assert cli.main(['train', str(config), '--output_dir', run, *params, *wild]) == 0
    rows = [json.loads(x) for x in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    best = min(rows, key=lambda row: row['valid/bits_per_byte'])
    for checkpoint, row in (('best', best), (str(best['step']), best), ('last', rows[-1])):
        capsys.readouterr()
        assert cli.main(['eval', run, '--checkpoint', checkpoint]) == 0
        wanted = f'step {row["step"]}\nvalid/bits_per_byte {row["valid/bits_per_byte"]:.6g}\n'
        assert capsys.readouterr().out == wanted
    how = ['--prompt', 'cat', '--n_tokens', '2', '--checkpoint', 'best']
    assert cli.main(['generate', run, *how]) == 0
    assert cli.main(['export', run, str(tmp_path / 'out'), '--checkpoint', 'best']) == 0
    capsys.readouterr()
    assert "no checkpoint '9' in" in refused(capsys, 'eval', run, '--checkpoint', '9')
    unknown = ('train.keep_best="valid/loss"', 'train.steps=4')
    said = refused(capsys, *train(files, *unknown, directory='none'))
    assert "keep_best='valid/loss' is not measured: there are valid/bits_per_byte" in said


def test_a_confusion_matrix_is_a_table_and_lists_in_the_log(tmp_path, capsys):
    (tmp_path / 'text.txt').write_text('the cat sat on the mat. ' * 20)
    text = TINY.replace('{text}', str(tmp_path / 'text.txt'))
    text = text.replace('@tl.BitsPerByte()', '(@tl.BitsPerByte(), @tl.ConfusionMatrix(), @tl.F1())')
    text += 'tl.ConfusionMatrix.n_classes = 256\ntl.F1.n_classes = 256\n'
    config, run = tmp_path / 'tiny.gin', tmp_path / 'run'
    config.write_text(text)
    assert cli.main(['train', str(config), '--output_dir', str(run)]) == 0
    assert 'valid/f1 ' in capsys.readouterr().out
    row = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
    table = row['valid/confusion_matrix']
    assert len(table) == 256 and sum(map(sum, table)) == 16
    assert cli.main(['eval', str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index('valid/confusion_matrix, a row a target, a column a found class:')
    assert lines[at + 1].split() == [str(i) for i in range(256)]
    assert [float(x) for x in lines[at + 2 + ord('t')].split()] == [ord('t'), *table[ord('t')]]


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


def test_generate_with_a_model_of_few_positions(files, capsys):
    short = ('TransformerLM.max_len=4', 'data.packed.length=4', 'train.sample_prompt=None')
    command = train(files, *short, 'train.steps=1', directory='short')
    assert cli.main([str(word) for word in command]) == 0
    run = str(files[0] / 'short')
    assert cli.main(['generate', run, '--prompt', 'ca', '--n_tokens', '2']) == 0
    assert '\nca' in capsys.readouterr().out


def test_generate_with_narrow_weights(files, capsys):
    how = ['--prompt', 'cat', '--n_tokens', '4']
    for bits in ('16', '8', '4'):
        assert cli.main(['generate', str(files[2]), *how, '--bits', bits]) == 0
        assert capsys.readouterr().out.startswith('cat')


def test_generate_with_narrow_caches(files, capsys):
    how = ['--prompt', 'cat', '--n_tokens', '4', '--temperature', '0', '--speculate', '2']
    for more in ([], ['--kv_cache', 'bfloat16'], ['--kv_cache', 'int8', '--bits', '8']):
        assert cli.main(['generate', str(files[2]), *how, *more]) == 0
        assert capsys.readouterr().out.startswith('cat')
    for what in files[1:]:
        said = refused(capsys, 'inspect', what, '--kv_cache', 'int8')
        assert '--kv_cache is about decoding' in said


def test_narrow_weights_are_rounded_for_a_text(files, capsys):
    text = files[0] / 'read.txt'
    text.write_text('the cat sat on the mat and saw another cat. ' * 40)
    how = ['--bits', '4', '--calibrate', str(text)]
    assert cli.main(['generate', str(files[2]), '--prompt', 'cat', '--n_tokens', '4', *how]) == 0
    told = capsys.readouterr()
    assert told.out.startswith('cat')
    said = re.search(
        r'4 bits, calibrated on (\d+) tokens: perplexity of (\d+) others (\S+) before, (\S+) after',
        told.err,
    )
    n, held, before, after = map(float, said.groups())
    assert n > 1000 and held > 50 and 1 < before < 300 and abs(after / before - 1) < 0.3
    assert cli.main(['eval', str(files[2]), '--text', str(text), *how]) == 0
    assert 'perplexity' in capsys.readouterr().out


def test_what_cannot_be_calibrated(files, capsys, tmp_path):
    run, text = files[2], tmp_path / 'short.txt'
    text.write_text('a cat')
    of_four = ('generate', run, '--prompt', 'x', '--bits', 4, '--calibrate')
    assert 'has 5 tokens: give one of at least' in refused(capsys, *of_four, text)
    assert 'No such file' in refused(capsys, *of_four, tmp_path / 'none.txt')
    for bits in ((), ('--bits', 16)):
        said = refused(capsys, 'eval', run, '--text', text, '--calibrate', text, *bits)
        assert 'give --bits 8 or 4 too' in said
    assert '--calibrate is about a text' in refused(capsys, 'eval', run, '--calibrate', text)
    binary = tmp_path / 'binary'
    binary.write_bytes(bytes([255, 254, 0]))
    assert 'UTF-8' in refused(capsys, *of_four, binary)


def test_generate_searches_with_beams_and_penalises_repetitions(files, capsys):
    how = ['generate', str(files[2]), '--prompt', 'cat', '--n_tokens', '6']
    said = []
    for option in (['--beams', '1'], ['--temperature', '0']):  # one beam is greedy
        assert cli.main([*how, *option]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith('cat')
    assert cli.main([*how, '--temperature', '0', '--repetition_penalty', '9']) == 0
    assert capsys.readouterr().out != said[0]


def test_generate_with_drafts_says_the_same(files, capsys):
    how = ['generate', str(files[2]), '--prompt', 'cat cat', '--n_tokens', '12']
    assert cli.main(how) == 0
    said = capsys.readouterr().out
    for option in (['--speculate', '3'], ['--draft', str(files[2]), '--speculate', '2']):
        assert cli.main([*how, *option]) == 0
        assert capsys.readouterr().out == said
    assert 'draws nothing: leave out --speculate' in refused(
        capsys, *how, '--beams', '2', '--speculate', '3'
    )


def test_generate_refuses_to_search_and_to_draw(files, capsys):
    how = ('generate', files[2], '--prompt', 'cat', '--beams', '2')
    said = refused(capsys, *how, '--top_k', '3', '--temperature', '0.8')
    assert 'searches and draws nothing: leave out --temperature and --top_k' in said


@pytest.mark.slow
def test_an_encoder_decoder_reads_the_prompt_and_answers(files, capsys, monkeypatch, tmp_path):
    net = models.Reformer(256, 8, 8, 1, 1, 1, max_len=24, masked=True)
    tokens = shape_dtype((1, 8), 'int32')
    model, tokenizer = Model(net).init((tokens, tokens, shape_dtype((1, 8), bool))), ByteTokenizer()
    monkeypatch.setattr(cli, 'trained', lambda *args, **how: (model, tokenizer))
    how = ['generate', str(files[2]), '--prompt', 'cat', '--n_tokens', '4']
    for option in (['--temperature', '0'], ['--beams', '2']):
        assert cli.main([*how, *option]) == 0
        assert not capsys.readouterr().out.startswith('cat')
    assert 'takes a language model: this one has 3 inputs' in refused(
        capsys, 'export', files[2], tmp_path / 'out'
    )
    assert 'takes a language model' in refused(capsys, 'serve', files[2], '--port', 0)


def test_export(files, capsys, tmp_path):
    out = tmp_path / 'out'
    assert cli.main(['export', str(files[2]), str(out), '--max_len', '16']) == 0
    assert 'decode_step.bin' in capsys.readouterr().out
    assert (out / 'config.gin').read_text() == (files[2] / 'config.gin').read_text()
    weights = load_weights(out / 'model.safetensors')
    assert trees.get(weights, 'embedding/table').shape == (256, 8)
    assert 'is not empty: export to a new directory' in refused(capsys, 'export', files[2], out)
    assert 'max_len=25 is more than' in refused(
        capsys, 'export', files[2], tmp_path / 'x', '--max_len', 25
    )


def test_inspect_config_and_run(files, capsys):
    _, config, run = files
    for what in (config, run):
        assert cli.main(['inspect', str(what)]) == 0
        out = capsys.readouterr().out
        assert 'block/residual/self_attention/query' in out and 'temporaries' in out
    assert cli.main(['inspect', str(config), '--offload', 'blocks']) == 0
    heads, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert heads.split() == ['without', 'blocks']
    assert [row.split()[0] for row in rows] == ['weights', 'optimizer', 'temporaries', 'host']
    assert rows[-1].split()[1] == '0' != rows[-1].split()[2]


MISTAKES = {
    'train.model=3': 'train: model must be a Layer or a Model, got 3',
    "adamw.learning_rate='abc'": "learning_rate must be a number or a function, got 'abc'",
    "TransformerLM.d_model='8'": "must be an int.*, got '8'",
    'TransformerLM.n_heads=3': r'3 heads do not divide the width 8: use \d',
    "TransformerLM.activation='relux'": "no activation 'relux': there are elu",
    "TransformerLM.positions='x'": "no positions 'x': there are learned",
    'models.TransformerLM.attention=(@tl.SelfAttention(),)': "'n_heads'",
    'TransformerLM.attention=@tl.RMSNorm': 'write the name in full',
    'train.stepz=3': "doesn't have a parameter named 'stepz'",
    'tl.Denze.n_units=3': 'did you mean Dense',
    'train.steps=': 'Unable to parse',
    "train.steps='3'": "train: steps must be an int, got '3'",
    'train.steps=0': 'train: steps must be at least 1, got 0',
    "train.seed='abc'": "seed must be an int, got 'abc'",
    'train.seed=99999999999999999999999': 'Loop: seed=9{23}: give an integer in −2⁶³ … 2⁶³ − 1',
    'train.model=@models.TransformerLM': r'a function: call it, TransformerLM\(…\)',
    'train.eval_tasks=5': r'eval_tasks must be a sequence of EvalTask, got \(5,\)',
    'train.baseline_text=5': 'train: baseline_text must be a sequence of documents .*, got 5',
    'train.baseline_text=()': 'train: baseline_text is empty: give at least one',
    'train.sample_prompt=5': 'sample_prompt must be a str or None, got 5',
    'train.sample_temperature=-1': 'temperature must be at least 0 and finite, got -1',
    'train.sample_tokens=30': "the prompt of 2 tokens and 30 new ones make 32, and the model's max",
    "train.tokenizer='bytes'": "train: tokenizer must have encode, .*, got 'bytes'",
    'train.tokenizer=@data.ByteTokenizer': 'tokenizer must have encode, eos_id and vocab_size',
    "text_files.pattern='nothing/*.txt'": "no file matches 'nothing/\\*.txt'|nothing",
    'data.packed.batch_size=0': 'packed: batch_size must be at least 1, got 0',
    'TrainTask.accumulate=3': 'accumulate=3 does not divide a batch of 2 rows',
    'TransformerLM.max_len=4': 'the sequence is 8 long and max_len=4: shorten it',
    'TransformerLM.vocab_size=50': r'token id \d+ is outside the vocabulary of 50',
    'train.train_task=@tl.CrossEntropyLoss()': 'train: train_task must be a TrainTask',
    'TrainTask.loss_chunk_len=-1': 'loss_chunk_len',
}


@pytest.mark.parametrize('binding', MISTAKES)
def test_mistakes_in_a_binding(files, capsys, binding):
    said = refused(capsys, *train(files, binding, directory='mistake'))
    assert re.search(MISTAKES[binding], said), said
    assert not (files[0] / 'mistake').exists()  # so that the corrected command goes on


@pytest.mark.parametrize('error', [OverflowError, ZeroDivisionError, IndexError, LookupError])
def test_errors_of_values_are_usage_errors(error):
    with pytest.raises(UsageError, match='too large'), usage_errors():
        raise error('too large')


def test_what_may_change_in_a_run(tmp_path):
    text = "cli.train.tokenizer = 'bytes'\nmodels.MLP.layer_widths = \\\n    (64,\n     32)\n"
    (tmp_path / 'config.gin').write_text(text)
    runs.check_directory(tmp_path, text.replace("'bytes'", '@data.ByteTokenizer()'))
    message = r'\(models.MLP.layer_widths is \(64, 32\) there, \(64, 16\) here\): choose'
    with pytest.raises(UsageError, match=message):
        runs.check_directory(tmp_path, text.replace('32', '16'))


def test_an_output_dir_that_cannot_be(files, capsys):
    (files[0] / 'letter').write_text('dear')
    said = refused(capsys, *train(files, directory='letter/run'))
    assert re.search(r'Not a directory \(.*letter.*\): choose another --output_dir', said), said


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
    broken = tmp_path / 'broken.gin'
    broken.write_text('from __gin__ import dynamic_registration\nimport no_such_module\n')
    assert "No module named 'no_such_module'" in refused(capsys, 'inspect', broken)


OUT_OF_RANGE = {
    ('--temperature', '-1'): 'temperature must be',
    ('--top_k', '0'): 'top_k must be',
    ('--top_p', '1.5'): 'top_p must be',
    ('--n_tokens', '0'): 'n_tokens must be',
    ('--repetition_penalty', '0'): 'repetition_penalty must be',
    ('--beams', '0'): 'n_beams must be',
    ('--seed', '99999999999999999999'): 'give an integer in −2⁶³ … 2⁶³ − 1',
    ('--gin_param', "train.tokenizer='bytes'"): 'tokenizer must have encode',
    ('--n_tokens', 'few'): "argument --n_tokens: invalid int value: 'few': see layercomb generate",
    ('--bits', '5'): 'argument --bits: invalid choice',
    ('--kv_cache', 'int4'): "argument --kv_cache: invalid choice: 'int4'",
    ('--speculate', '65'): "argument --speculate: a draft has 1 to 64 tokens, got '65'",
    ('--speculate', 'few'): "a draft has 1 to 64 tokens, got 'few': see layercomb generate",
    ('-',): 'give one of --prompt TEXT',
    ('no-dash',): 'unrecognized arguments: no-dash',
}


@pytest.mark.parametrize('option', OUT_OF_RANGE)
def test_values_out_of_range(files, capsys, option):
    said = refused(capsys, 'generate', files[2], '--prompt', 'x', '--n_tokens', 2, *option)
    assert OUT_OF_RANGE[option] in said, said


def test_what_the_system_refuses(files, capsys, tmp_path, monkeypatch):
    too_long = 'x' * 300
    for command in (['eval', too_long], ['inspect', too_long], ['export', too_long, 'out']):
        assert 'File name too long' in refused(capsys, *command)
    assert 'File name too long' in refused(capsys, 'generate', too_long, '--prompt', 'x')
    assert 'File name too long' in refused(capsys, 'serve', too_long, '--port', 0)

    def unreadable(*args):
        raise PermissionError(13, 'Permission denied', 'checkpoints')

    monkeypatch.setattr('layercomb.supervised.checkpoints.saved_weights', unreadable)
    run = files[2]
    for command in (['eval', run], ['export', run, tmp_path / 'out'], ['serve', run, '--port', 0]):
        assert 'Permission denied (checkpoints): check that' in refused(capsys, *command)
    assert 'Permission denied' in refused(capsys, 'generate', run, '--prompt', 'x')


def test_mistakes_of_serving(files, capsys):
    run = files[2]
    assert 'max_concurrent must be' in refused(capsys, 'serve', run, '--max_concurrent', 0)
    assert 'choose another --host' in refused(capsys, 'serve', run, '--host', 'a..b')
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert 'choose another --port' in refused(capsys, 'serve', run, '--port', port)


def test_drafts_of_a_server(files, monkeypatch):
    got = []
    monkeypatch.setattr(serving, 'run', lambda *given: got.append(given[7]))
    for options in ([], ['--speculate', '3'], ['--draft', str(files[2])]):
        assert cli.main(['serve', str(files[2]), '--port', '0', *options]) == 0
    assert got[:2] == [None, decoding.Lookup(3)] and isinstance(got[2], decoding.Draft)


def test_the_key_of_a_server_comes_from_an_option_or_the_environment(files, capsys, monkeypatch):
    run, keys = files[2], []
    monkeypatch.setattr(serving, 'run', lambda *given: keys.append(given[6]))
    for options, variable in [((), None), ((), 'b'), (('--api_key', 'a'), 'b')]:
        monkeypatch.delenv('LAYERCOMB_API_KEY', raising=False)
        if variable is not None:
            monkeypatch.setenv('LAYERCOMB_API_KEY', variable)
        assert cli.main(['serve', str(run), '--port', '0', *options]) == 0
    assert keys == [None, 'b', 'a']
    monkeypatch.setenv('LAYERCOMB_API_KEY', '')  # of a variable that was not set
    said = refused(capsys, 'serve', run)
    assert 'LAYERCOMB_API_KEY: the API key must be 1 to 512 letters' in said
    assert '--api_key: the API key must be' in refused(capsys, 'serve', run, '--api_key', 'a b')


def test_a_closed_pipe_ends_quietly(files):
    command = [sys.executable, '-m', 'layercomb', 'generate', str(files[2]), '--prompt', 'the cat']
    with subprocess.Popen(
        [*command, '--n_tokens', '16'], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.read(3) == b'the'
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b'', 0)


def test_serve_answers_until_it_is_interrupted(files):
    command = [sys.executable, '-u', '-m', 'layercomb', 'serve', str(files[2]), '--port', '0']
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = iter(process.stdout.readline, '')
            url = next(m[0] for line in lines if (m := re.search(r'http://127.0.0.1:\d+/', line)))
            body = json.dumps({'prompt': 'cat', 'max_tokens': 3}).encode()
            asked = urllib.request.Request(
                f'{url}v1/completions', body, {'Content-Type': 'application/json'}
            )
            with urllib.request.urlopen(asked, timeout=60) as response:
                assert json.load(response)['model'] == 'run'
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert process.stderr.read() == ''
        finally:
            process.kill()


def test_a_missing_extra_names_what_to_install(capsys, files, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gin', None)
    assert 'pip install "layercomb[train]"' in refused(capsys, 'inspect', files[1])
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    assert 'pip install "layercomb[serve]"' in refused(capsys, 'serve', files[2])


def test_a_corrupt_checkpoint_is_named(capsys, files, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(files[2], run)
    steps = sorted((run / 'checkpoints').iterdir(), key=lambda p: p.name)
    largest = max(
        (steps[-1] / 'weights').rglob('*'), key=lambda p: p.stat().st_size if p.is_file() else 0
    )
    largest.write_bytes(b'x' * largest.stat().st_size)
    assert 'is damaged' in refused(capsys, 'generate', run, '--prompt', 'x', '--n_tokens', 2)
