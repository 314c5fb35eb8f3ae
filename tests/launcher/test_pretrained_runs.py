"""Runs that start from a model that exists, and stand alone afterwards."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layercomb import cli, data, interop, supervised, tl, transforms, trees
from layercomb.errors import UsageError
from layercomb.launcher.pretrained import inside, pretrained, pretrained_tokenizer

PRETRAINED = Path(__file__).parents[1] / 'data' / 'pretrained'

CONFIG = """
from __gin__ import dynamic_registration
from layercomb import cli
from layercomb import data
from layercomb import layers as tl
from layercomb import optimizers
from layercomb import supervised

cli.train.model = @cli.pretrained()
cli.train.train_task = @supervised.TrainTask()
cli.train.eval_tasks = @supervised.EvalTask()
cli.train.steps = 3
cli.train.checkpoint_every = 1
cli.pretrained.source = '{source}'
cli.pretrained_tokenizer.source = '{source}'

supervised.TrainTask.data = @data.packed()
supervised.TrainTask.loss = @tl.CrossEntropyLoss()
supervised.TrainTask.optimizer = @optimizers.adamw()
supervised.EvalTask.data = @data.packed()
supervised.EvalTask.metrics = @tl.CrossEntropyLoss()
supervised.EvalTask.n_batches = 1

data.packed.source = @data.text_files()
data.packed.tokenizer = @cli.pretrained_tokenizer()
data.packed.length = 8
data.packed.batch_size = 2
data.text_files.pattern = '{text}'
"""


def told(capsys, *words):
    """The exit code, and what was printed."""
    code = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A tiny GPT-2, a configuration that trains it, and a run, whole and at step 2."""
    folder = tmp_path_factory.mktemp('pretrained')
    shutil.copytree(PRETRAINED / 'gpt2', folder / 'gpt2')
    (folder / 'text.txt').write_text('the cat sat on the mat. ' * 20)
    config = folder / 'tiny.gin'
    config.write_text(CONFIG.format(source=folder / 'gpt2', text=folder / 'text.txt'))
    assert cli.main(['train', str(config), '--output_dir', str(folder / 'whole')]) == 0
    shutil.copytree(folder / 'whole', folder / 'run')
    shutil.rmtree(folder / 'run' / 'checkpoints' / '3')
    return folder


@pytest.fixture
def run(files, tmp_path):
    """A copy of the run of two steps; the model that it began from is gone meanwhile."""
    (files / 'gpt2').rename(files / 'away')
    yield shutil.copytree(files / 'run', tmp_path / 'run')
    (files / 'away').rename(files / 'gpt2')


def rows(run):
    return [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]


def test_training_starts_from_the_weights_that_exist(files):
    model, _ = interop.load(files / 'gpt2')
    saved, _ = cli.trained(str(files / 'run'))
    started = trees.flatten(model.weights)
    for path, x in trees.flatten(saved.weights).items():
        assert 0 < np.abs(x - started[path]).max() < 5e-3, path  # two steps of 0.001 away


def test_a_run_goes_on_bit_for_bit_without_its_source(files, run, capsys):
    code, printed = told(capsys, 'train', run / 'config.gin')  # its output_dir is that run
    assert code == 0 and str(run) in printed
    keys = {'step', 'train/loss', 'train/grad_norm', 'valid/loss'}
    ends = [{k: v for k, v in rows(r)[-1].items() if k in keys} for r in (run, files / 'whole')]
    assert ends[0] == ends[1] and ends[0]['step'] == 3


def test_a_run_is_measured_and_converted_without_its_source(run, capsys, tmp_path):
    for words in (('eval', run), ('convert', run, tmp_path / 'converted')):
        code, printed = told(capsys, *words)
        assert code == 0, printed
    model, tokenizer = cli.trained(str(run))
    again, same = interop.load(tmp_path / 'converted')
    assert again.layer == model.layer and same == tokenizer
    for path, x in trees.flatten(model.weights).items():
        np.testing.assert_array_equal(x, trees.get(again.weights, path))


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        ('inspect', '{run}'),
        ('generate', '{run}', '--prompt', 'the', '--n_tokens', '3'),
        ('export', '{run}', '{out}', '--max_len', '16'),
    ],
)
def test_every_command_takes_a_run_without_its_source(words, run, capsys, tmp_path):
    code, printed = told(capsys, *(x.format(run=run, out=tmp_path / 'out') for x in words))
    assert code == 0, printed


def test_what_its_makers_gave_a_model_stays_with_its_run(run):
    _, tokenizer = cli.trained(str(run))
    _, original = interop.load(PRETRAINED / 'gpt2')
    assert tokenizer == original and tokenizer.chat is not None
    assert tokenizer.generation == original.generation and original.generation
    assert tokenizer.stop_ids == original.stop_ids


def test_a_resumed_run_reads_no_weights_of_its_source(files, tmp_path, monkeypatch):
    run = shutil.copytree(files / 'whole', tmp_path / 'run')
    monkeypatch.setattr(interop, 'load', lambda *given, **more: pytest.fail('it was read'))
    assert cli.main(['train', str(run / 'config.gin')]) == 0


@pytest.mark.filterwarnings('always::layercomb.errors.UsageWarning')
def test_a_source_that_has_changed_is_noticed(files, tmp_path, capsys):
    run = shutil.copytree(files / 'whole', tmp_path / 'run')
    file = files / 'gpt2' / 'model.safetensors'
    before = file.read_bytes()
    try:
        file.write_bytes(before[:-4] + b'abcd')
        code, printed = told(capsys, 'train', run / 'config.gin')
    finally:
        file.write_bytes(before)
    assert code == 0
    assert re.search(
        r"layercomb: '.*gpt2' has changed since this run began, which goes on", printed
    )
    code, printed = told(capsys, 'train', run / 'config.gin')
    assert code == 0 and 'has changed' not in printed


def test_a_run_without_checkpoints_reads_its_source_again(files, tmp_path):
    run = shutil.copytree(files / 'run', tmp_path / 'run')
    with inside(run):
        assert pretrained(str(files / 'gpt2')).weights is None
        shutil.rmtree(run / 'checkpoints')
        assert pretrained(str(files / 'gpt2')).weights is not None


@pytest.mark.parametrize(
    ('source', 'said'),
    [
        ('nowhere', "no model 'nowhere': give"),
        ('transformer_python', 'is a configuration without weights'),
        (str(PRETRAINED.parent / 'trax' / 'lm'), 'is a model of Trax, which is not trained'),
    ],
)
def test_sources_that_cannot_be_are_refused_and_nothing_is_written(
    source, said, files, tmp_path, capsys
):
    more = ('--gin_param', f"pretrained.source='{source}'")
    out = tmp_path / 'out'
    code, printed = told(capsys, 'train', files / 'tiny.gin', '--output_dir', out, *more)
    assert code == 2 and said in printed and printed.count('\n') == 1
    assert not out.exists()


def test_a_run_as_a_source_is_refused_with_the_cure(files):
    with pytest.raises(UsageError, match=r'is a run: layercomb convert .* DIR writes its model'):
        pretrained(str(files / 'run'))


@pytest.mark.slow
def test_in_python(files):
    model = pretrained(str(files / 'gpt2'))
    assert model.tokenizer == pretrained_tokenizer(str(files / 'gpt2'))
    ids = model.tokenizer.encode('the cat sat')[None]
    batch = (ids[:, :-1], ids[:, 1:], np.ones_like(ids[:, 1:], np.float32))
    task = supervised.TrainTask([batch], tl.CrossEntropyLoss(), optax.sgd(0.1))
    loop = supervised.Loop(model, task, progress=False)
    loop.run(1)
    tuned = model.finished(loop.weights, loop.state)
    assert loop.step == 1 and tuned.layer == model.loaded


def test_bits_that_cannot_be(files):
    with pytest.raises(ValueError, match='bits=3: give 16, 8 or 4'):
        pretrained(str(files / 'gpt2'), bits=3)


def test_remat_or_reversible(files):
    with pytest.raises(ValueError, match='both save memory: leave one out'):
        pretrained(str(files / 'gpt2'), reversible=4, remat=True)


def test_narrow_weights_count_as_what_they_stand_for():
    wide, narrow = (
        pretrained(str(PRETRAINED / 'gpt2'), bits=bits, adapt=transforms.lora) for bits in (None, 4)
    )
    assert narrow.wide_count(narrow.weights) == wide.wide_count(wide.weights)
    assert wide.wide_count(wide.weights) == trees.count(wide.weights)


def test_blocks_are_computed_again_in_training_alone(files):
    plain, made = (
        pretrained(str(files / 'gpt2'), bits=8, adapt=transforms.lora, remat=remat)
        for remat in (False, True)
    )
    assert 'Remat(' in repr(made.layer) and 'Remat(' not in repr(plain.layer)
    assert made.finished(made.weights, {}).layer == plain.finished(plain.weights, {}).layer
    ids = np.arange(8, dtype=np.int32)[None]
    segments = np.array([[1, 1, 1, 2, 2, 2, 3, 3]], np.int32)
    trainable, frozen = trees.partition(made.weights, transforms.is_lora)

    def loss(some, layer):
        weights = trees.merge(some, frozen)
        (y,), _ = transforms.segmented(layer).apply(weights, {}, (ids, segments))
        return jnp.sum(y[..., 1] ** 2)

    wanted, got = (jax.value_and_grad(loss)(trainable, x.layer) for x in (plain, made))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), wanted, got)


def test_a_python_without_a_manual(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pydoc_data.topics', None)
    with pytest.raises(UsageError, match=r'text of your own, by .* or none \(--rehearse 0'):
        data.python_manual(data.ByteTokenizer())
