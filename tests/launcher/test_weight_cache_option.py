"""The launcher maps weights that an earlier command kept, unless it is told not to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import layercomb as lc
from layercomb import cli, interop, models, trees
from layercomb.interop import descriptions, weight_cache
from layercomb.launcher import compile_cache

GPT2 = Path(__file__).parents[1] / 'data' / 'pretrained' / 'gpt2'


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A person's cache folder, with caches turned on."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('JAX_ENABLE_COMPILATION_CACHE')
    return tmp_path / 'home' / 'layercomb' / 'weights'


@pytest.fixture
def made(monkeypatch):
    """What was made and kept: the options of each entry."""
    written, write = [], weight_cache._write

    def kept(entry, key, weights):
        written.append(json.loads(key)['options'])
        write(entry, key, weights)

    monkeypatch.setattr(weight_cache, '_write', kept)
    return written


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('files') / 'tiny.gguf'
    _, tokenizer = interop.load(GPT2)
    net = models.Llama(tokenizer.vocab_size, 64, 96, 2, 4, 2, max_len=64)
    weights, _ = net.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    interop.save(path, lc.Model(net, weights), tokenizer, dtype='q8_0')
    return path


def generated(capsys, source, *words):
    said = ('generate', str(source), '--prompt', 'a b', '--n_tokens', '3', '--temperature', '0')
    assert cli.main([*said, *words]) == 0
    printed = capsys.readouterr()
    assert 'layercomb: ' not in printed.err  # no warning
    return printed.out


def test_the_second_command_maps_what_the_first_has_kept(file, home, made, capsys):
    first = generated(capsys, file)
    assert generated(capsys, file) == first and made == [{'reader': 'gguf'}]
    assert len(list(home.iterdir())) == 1 and home.stat().st_mode & 0o777 == 0o700
    assert generated(capsys, file, '--bits', '4') == generated(capsys, file, '--bits', '4')
    options = {'bits': 4, 'group_size': 32, 'smallest': 4096, 'activation_bits': 16}
    assert made[1:] == [{'reader': 'narrowed', **options}]


@pytest.mark.parametrize('source', ['directory', 'file'])
@pytest.mark.parametrize('bits', [16, 8, 4])
def test_narrowed_models_are_the_same(source, bits, file, tmp_path, made):
    path = str(GPT2 if source == 'directory' else file)
    plain, tokenizer = cli.trained(path, bits=bits)
    for _ in range(2):
        model, again = cli.trained(path, bits=bits, cache=tmp_path)
        assert model.layer == plain.layer and again.vocab_size == tokenizer.vocab_size
        one, other = trees.flatten(model.weights), trees.flatten(plain.weights)
        assert one.keys() == other.keys()
        for name, x in one.items():
            np.testing.assert_array_equal(x, other[name], strict=True)
    assert len(made) == 1


def test_a_file_that_is_replaced_between_its_parts_is_not_kept(file, tmp_path, made, monkeypatch):
    source, cache = Path(shutil.copy(file, tmp_path / 'tiny.gguf')), tmp_path / 'cache'
    wider = models.Llama(100, 32, 48, 1, 2, 2, max_len=64)
    weights, _ = wider.init((lc.shape_dtype((1, 8), 'int32'),), jax.random.key(3))
    interop.save(tmp_path / 'other.gguf', lc.Model(wider, weights), dtype='q8_0')
    plain, _ = cli.trained(str(tmp_path / 'other.gguf'), bits=4, text=False)
    of = descriptions.of

    def swapping(path):
        read = of(path)
        os.replace(tmp_path / 'other.gguf', source)
        return read

    with monkeypatch.context() as patched:
        patched.setattr(descriptions, 'of', swapping)
        model, tokenizer = cli.trained(str(source), bits=4, text=False, cache=cache)
    assert not made and tokenizer is None and model.layer == plain.layer
    again, _ = cli.trained(str(source), bits=4, text=False, cache=cache)
    assert len(made) == 1
    for each in (model, again):
        one, other = trees.flatten(each.weights), trees.flatten(plain.weights)
        assert one.keys() == other.keys()
        assert all(np.array_equal(x, other[name]) for name, x in one.items())


def test_it_can_be_turned_off(file, home, made, capsys, monkeypatch):
    generated(capsys, file, '--no_weight_cache')
    monkeypatch.setenv('JAX_ENABLE_COMPILATION_CACHE', 'False')
    generated(capsys, file)
    assert not made and not home.exists()


def test_it_does_not_depend_on_programs_that_are_kept(file, home, made, capsys):
    generated(capsys, file, '--no_compile_cache')
    assert len(made) == 1


def test_a_folder_that_cannot_be_used_is_not_used(file, home, made, capsys):
    home.parent.mkdir(parents=True)
    home.write_text('')
    generated(capsys, file)
    assert not made


def test_a_model_that_is_calibrated_or_wide_is_not_kept(home, made, tmp_path, capsys):
    (tmp_path / 'text').write_text('a b c d ' * 80)
    generated(capsys, GPT2)
    generated(capsys, GPT2, '--bits', '8', '--calibrate', str(tmp_path / 'text'))
    assert not made


@pytest.mark.parametrize('command', ['generate', 'chat', 'serve', 'eval'])
def test_help_says_where_weights_are(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / '100%'))
    monkeypatch.setenv('COLUMNS', '500')
    with pytest.raises(SystemExit):
        cli.main([command, '--help'])
    out = capsys.readouterr().out
    assert (
        '--no_weight_cache' in out
        and f'{tmp_path}/100%/layercomb/weights, and the next command maps them' in out
    )


def test_without_a_text_it_is_refused(capsys, tmp_path):
    assert cli.main(['eval', str(tmp_path), '--no_weight_cache']) == 2
    said = capsys.readouterr().err
    assert '--no_weight_cache is about a text: give --text FILE too' in said


def test_no_folder_is_made_before_weights_are_kept(file, home, capsys):
    assert compile_cache.usable_weights_folder(os.environ) == home
    generated(capsys, GPT2)
    assert not home.exists()
    generated(capsys, file)
    assert compile_cache.usable_weights_folder(os.environ) == home and home.is_dir()


@pytest.mark.skipif(os.name != 'posix', reason='modes tell nothing elsewhere')
def test_a_folder_where_others_may_write_costs_a_line(file, home, made, capsys):
    home.mkdir(parents=True)
    home.chmod(0o777)
    words = ('generate', str(file), '--prompt', 'a b', '--n_tokens', '3', '--temperature', '0')
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        assert cli.main([*words]) == 0
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith('layercomb: ')]
    assert len(said) == 1 and 'chmod go-w' in said[0] and not made


def test_a_relative_folder_or_none_is_not_used(monkeypatch):
    assert compile_cache.usable_weights_folder({'XDG_CACHE_HOME': 'relative'}) is None

    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, 'home', homeless)
    assert compile_cache.weights_folder({}) is None


def test_the_benchmark_of_starts_refuses_a_model_that_is_not_there_in_one_line(tmp_path):
    script = Path(__file__).parents[2] / 'benchmarks' / 'start.py'
    done = subprocess.run(
        [sys.executable, script, tmp_path / 'nowhere'], capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith('start: no model') and done.stderr.count('\n') == 1
