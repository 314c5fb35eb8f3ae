"""Commands on models of other libraries, in the place of a run."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import layercomb as lc
from layercomb import cli, interop, transforms
from layercomb.launcher import terminal

DATA = Path(__file__).parents[1] / 'data'
PRETRAINED = DATA / 'pretrained'


def told(capsys, *words):
    """The exit code, and what was printed."""
    code = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize('name', ['bert_hidden', 'fnet_classes', 'marian', 'gpt2'])
def test_inspect_knows_the_inputs_of_each_family(name, capsys):
    code, printed = told(capsys, 'inspect', PRETRAINED / name)
    assert code == 0 and 'Embedding' in printed
    # GPT-2's is the only one that makes text without a source.
    assert ('decoding a row of' in printed and 'caches' in printed) == (name == 'gpt2')


def test_sixteen_bits_come_without_a_wide_copy(monkeypatch):
    asked = []
    load = interop.load
    monkeypatch.setattr(interop, 'load', lambda path, **o: asked.append(o) or load(path, **o))
    model, _ = cli.trained(str(PRETRAINED / 'gpt2'), bits=16)
    assert model.weights['embedding']['table'].dtype == 'bfloat16'
    model, _ = cli.trained(str(DATA / 'trax' / 'lm'), bits=8, text=False)
    assert model.weights
    assert asked == [{'dtype': 'bfloat16'}, {}]


def test_the_directory_of_a_run_of_trax(capsys):
    code, printed = told(capsys, 'inspect', DATA / 'trax' / 'lm')
    assert code == 0 and 'Embedding' in printed


def test_inspect_tells_what_narrow_caches_take(capsys):
    takes = []
    for cache in ((), ('--kv_cache', 'bfloat16'), ('--kv_cache', 'int8')):
        code, printed = told(capsys, 'inspect', PRETRAINED / 'gpt2', *cache)
        assert code == 0
        found = re.search(r'caches +([\d,]+)', printed)
        takes.append(int(found.group(1).replace(',', '')))
    assert takes[0] > 1.9 * takes[1] > 1.9 * takes[2]


def test_a_directory_may_be_named_like_a_file(tmp_path):
    shutil.copytree(PRETRAINED / 'gpt2', tmp_path / 'model.gguf')
    assert interop.load(tmp_path / 'model.gguf')[1] is not None


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (('inspect', PRETRAINED / 'gpt2', '--gin_param', 'x=1'), 'is no run, so --gin_param means'),
        (('eval', PRETRAINED / 'gpt2', '--window', '3'), '--window is about a text: give --text'),
        (('eval', PRETRAINED / 'gpt2', '--bits', '8'), '--bits is about a text: give --text FILE'),
        (('eval', PRETRAINED / 'gpt2'), 'is no run, and has nothing to be measured on'),
        (('chat', PRETRAINED / 'bert_hidden'), 'has no tokenizer'),
        (
            ('inspect', PRETRAINED / 'bert_hidden', '--kv_cache', 'int8'),
            '--kv_cache is for models that keep keys and values of a text, and this one keeps none',
        ),
    ],
)
def test_what_would_mean_nothing_is_refused(words, said, capsys):
    code, printed = told(capsys, *words)
    assert code == 2 and said in printed and printed.count('\n') == 1


def test_a_model_with_narrow_caches_is_saved_as_one_without(tmp_path):
    model, tokenizer = interop.load(PRETRAINED / 'gpt2', dtype='float32')
    narrow = lc.Model(transforms.narrow_caches(model.layer, 8), model.weights, model.state)
    interop.save(tmp_path / 'saved', narrow, tokenizer)
    assert interop.load(tmp_path / 'saved', dtype='float32')[0].layer == model.layer


def test_a_text_goes_up_to_the_first_token_that_ends_it():
    made = (np.array([i]) for i in (5, 6, 2, 7))
    assert [int(token[0]) for token in terminal.until(made, {2, 3})] == [5, 6]
