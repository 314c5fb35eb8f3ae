"""Adapters on the command line: which a server takes, and how one is written alone."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from layercomb import Model, cli, interop, serving, transforms, trees
from layercomb.interop import peft

GPT2 = Path(__file__).parents[1] / 'data' / 'pretrained' / 'gpt2'
SERVED = ('serve', GPT2, '--port', '0')


@pytest.fixture(scope='module')
def base():
    return interop.load(GPT2)


@pytest.fixture(scope='module')
def adapted(base):
    """GPT-2 with an adapter in which nothing is zero."""
    model, _ = base
    net, weights = transforms.lora(model.layer, model.weights, rank=2, where='*self_attention*')
    flat = trees.flatten(weights)
    ones = {path: jnp.ones_like(x) / 9 for path, x in flat.items() if transforms.is_lora(path)}
    return Model(net, trees.unflatten({**flat, **ones}))


@pytest.fixture
def folder(adapted, tmp_path):
    peft.save(tmp_path / 'made', adapted, 'gpt2')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.gin').touch()
    return tmp_path


def told(capsys, *words):
    """The exit code, and what was printed."""
    code = cli.main([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_serve_takes_adapters_of_peft_and_of_runs(folder, adapted, capsys, monkeypatch):
    got = []
    monkeypatch.setattr(serving, 'run', lambda model, _, name, *rest: got.append((model, name)))
    trained = cli.trained
    monkeypatch.setattr(
        cli,
        'trained',
        lambda name, *a, **k: (adapted, None) if name.endswith('run') else trained(name, *a, **k),
    )
    words = ('--adapter', f'one={folder / "made"}', '--adapter', f'two={folder / "run"}')
    assert told(capsys, *SERVED, *words) == (0, '')
    ((model, name),) = got
    assert name == 'gpt2' and transforms.adapter_names(model.layer) == ('one', 'two')
    flat = trees.flatten(model.weights)
    both = flat['block/attention/self_attention/query/kernel_lora_b']
    assert both.shape == (2, 3, 2, 2, 8) and bool((both[:, 1] == both[:, 2]).all())


def test_what_is_no_adapter_of_this_model_is_one_line(folder, adapted, capsys, monkeypatch):
    changed = trees.flatten(adapted.weights)
    changed['norm/scale'] = changed['norm/scale'] + 1
    other = Model(adapted.layer, trees.unflatten(changed))
    trained = cli.trained
    monkeypatch.setattr(
        cli,
        'trained',
        lambda name, *a, **k: (other, None) if name.endswith('run') else trained(name, *a, **k),
    )
    made, run = folder / 'made', folder / 'run'
    for given, said in (
        ((f'gpt2={made}',), "'gpt2' is the model itself: choose another name"),
        ((f'a={made}', f'a={run}'), "'a' is there twice: choose another name"),
        (('a',), '--adapter a: write NAME=DIR, such as poems=runs/poems'),
        ((f'a={folder}',), 'holds no adapter of PEFT (adapter_config.json is missing), nor a run'),
        ((f'a={run}',), 'has another norm/scale than this model, so it trained more than an'),
    ):
        words = [word for each in given for word in ('--adapter', each)]
        code, printed = told(capsys, *SERVED, *words)
        assert code == 2 and said in printed and printed.count('\n') == 1, printed


def test_convert_writes_the_adapter_alone(folder, adapted, base, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'trained', lambda *a, **k: (adapted, None))
    out = folder / 'out'
    code, printed = told(capsys, 'convert', 'run', out, '--adapter', '--base', 'openai/gpt2')
    assert code == 0 and 'adapter_model.safetensors' in printed
    config = json.loads((out / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'openai/gpt2' and config['fan_in_fan_out'] is True
    monkeypatch.setattr(cli, 'trained', lambda *a, **k: base)
    for words, said in {
        ('--adapter',): 'this model has no adapter: transforms.lora(net, weights) gives it one',
        ('--adapter', '--dtype', 'float16'): '--adapter writes float32: leave out --dtype',
        ('--base', 'gpt2'): '--base is the base of an adapter: give --adapter too',
    }.items():
        code, printed = told(capsys, 'convert', 'run', folder / 'none', *words)
        assert code == 2 and said in printed and printed.count('\n') == 1
        assert not (folder / 'none').exists()


def test_convert_merges_an_adapter_into_the_model(folder, adapted, base, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'trained', lambda *a, **k: (adapted, base[1]))
    code, _ = told(capsys, 'convert', 'run', folder / 'out')
    made, _ = interop.load(folder / 'out')
    _, wanted = transforms.merge(adapted.layer, adapted.weights)
    flat = trees.flatten(wanted)
    for path, x in trees.flatten(made.weights).items():
        assert bool(jnp.allclose(x, flat[path], atol=1e-6)), path
    assert code == 0 and made.layer == base[0].layer
