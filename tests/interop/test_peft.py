"""Adapters in PEFT's format: recorded logits of PEFT, files there and back, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import interop, transforms, trees
from layercomb.interop import peft
from layercomb.interop.configs import Config
from layercomb.interop.families import family_of
from layercomb.interop.peft.config import adapter_of
from layercomb.interop.tensors import fill, shapes_of

PRETRAINED = Path(__file__).parents[1] / 'data' / 'pretrained'
FOLDER = PRETRAINED / 'peft'


def _module(name):
    spec = importlib.util.spec_from_file_location(name, PRETRAINED / f'{name}.py')
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


sys.modules.setdefault('make_decoders', _module('make_decoders'))
RECORDER = _module('make_peft')
DECODERS = np.load(PRETRAINED / 'decoders.npz')
values, token_ids = RECORDER.values, RECORDER.token_ids
CASES = list(RECORDER.CASES)


class Known:
    """A tensor whose values follow from its name."""

    def __init__(self, name, shape):
        self.name, self.shape = name, tuple(shape)

    def read(self):
        return values(self.name, self.shape)


def base_of(name):
    """The model that an adapter is for."""
    if name == 'bert_classes':
        return interop.load(PRETRAINED / name)[0]
    if name == 'gpt2':
        config = json.loads((FOLDER / 'gpt2.json').read_text())
        config = {k: v for k, v in config.items() if k not in ('loss_type',)}
    else:
        config = json.loads(str(DECODERS[f'{name}/config']))
    family = family_of(config)
    net, entries = family.net(Config(config)), family.entries(Config(config))
    shapes = shapes_of(net, family.signature(net))
    tensors = {}
    if name == 'gpt2':
        from layercomb.interop.tensors import spill

        zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
        tensors = {key: Known(key, x.shape) for key, x in spill(net, zeros, entries)}
    else:
        known = json.loads(str(DECODERS[f'{name}/shapes']))
        tensors = {key: Known(key, shape) for key, shape in known.items()}
    return lc.Model(net, fill(net, shapes, entries, tensors, ignored=family.ignored))


BASES = {name: base_of(name) for name in sorted({base for base, _ in RECORDER.CASES.values()})}


def logits_of(model):
    ids = jnp.asarray(token_ids(29))
    if model.layer.n_in > 1:
        short = ids[:, :8]
        return np.asarray(model(short, jnp.zeros_like(short), jnp.ones(short.shape, bool)))
    return np.asarray(model(ids)[:, -RECORDER.KEPT :])


def expected(case):
    with np.load(FOLDER / case / 'expected.npz') as given:
        return dict(given)


def base(case):
    return BASES[RECORDER.CASES[case][0]]


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_peft(case):
    wanted = expected(case)
    np.testing.assert_allclose(logits_of(base(case)), wanted['before'], rtol=1e-5, atol=2e-5)
    model = peft.load(FOLDER / case, base(case))
    np.testing.assert_allclose(logits_of(model), wanted['after'], rtol=1e-5, atol=2e-5)


def products(folder, modules):
    """scale · B A of each module in a file."""
    from safetensors.numpy import load_file

    adapter = adapter_of(json.loads((folder / 'adapter_config.json').read_text()))
    tensors = load_file(folder / 'adapter_model.safetensors')
    made = {name: x for name, x in tensors.items() if 'lora_' not in name or 'magn' in name}
    for name, a in tensors.items():
        if name.endswith('.lora_A.weight'):
            module = name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')
            b = tensors[name.replace('lora_A', 'lora_B')]
            rank, alpha = adapter.of(module)
            assert rank == len(a), module
            made[module] = adapter.scale(rank, alpha) * (b @ a)
    return made


@pytest.mark.parametrize('case', CASES)
def test_what_is_written_is_what_was_read(case, tmp_path):
    model = peft.load(FOLDER / case, base(case))
    model_type = RECORDER.CASES[case][0] if case == 'phi3' else None
    sizes = peft.save(tmp_path / 'out', model, 'some/base', model_type=model_type)
    assert list(sizes) == ['adapter_config.json', 'adapter_model.safetensors']
    theirs, ours = products(FOLDER / case, model), products(tmp_path / 'out', model)
    assert theirs.keys() <= ours.keys()
    assert {name for name in ours.keys() - theirs.keys()} <= {  # the head is written whole
        f'base_model.model.bert.pooler.dense.{x}' for x in ('weight', 'bias')
    }
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=2e-6, atol=1e-7, err_msg=name)
    config = json.loads((tmp_path / 'out/adapter_config.json').read_text())
    known = json.loads((FOLDER / case / 'adapter_config.json').read_text())
    assert config.keys() <= known.keys()
    for name in ('r', 'lora_alpha', 'use_dora', 'use_rslora', 'fan_in_fan_out', 'task_type'):
        assert config[name] == known[name] or case == 'llama_patterns', name
    again = peft.load(tmp_path / 'out', base(case))
    np.testing.assert_allclose(logits_of(again), logits_of(model), atol=1e-5)


def trained(model, seed=0, **options):
    """A model whose adapters are random, B too."""
    net, weights = transforms.lora(model.layer, model.weights, **options)
    flat = trees.flatten(weights)
    for i, (path, x) in enumerate(sorted(flat.items())):
        if transforms.is_lora(path):
            drawn = np.random.default_rng((seed, i)).normal(size=x.shape).astype(np.float32)
            flat[path] = x * (1 + drawn / 9) if 'magnitude' in path else jnp.asarray(drawn / 5)
    return lc.Model(net, trees.unflatten(flat))


# Which leaves have adapters, for the adapters that are made here.
OURS = {
    'llama': {'where': 'block*', 'rank': 2, 'alpha': 3.0},
    'gpt2': {'where': '*self_attention*', 'rank': 2, 'alpha': 8.0, 'rank_stabilized': True},
    'gpt2_value': {'where': '*value', 'rank': 2, 'alpha': 8.0, 'dora': True},
    'llama_head': {'where': 'head', 'rank': 3, 'alpha': 8.0},
    'bert': {'where': '*dense*', 'rank': 2, 'alpha': 8.0, 'dora': True, 'dropout': 0.1},
}


def ours_on(case):
    known = 'bert' if case == 'bert' else case.split('_')[0]
    where = dict(OURS[case])
    if case == 'bert':
        where['where'] = 'block/*dense*'
    return base(known), trained(base(known), **where)


@pytest.mark.parametrize('case', OURS)
def test_ours_come_back(case, tmp_path):
    plain, model = ours_on(case)
    peft.save(tmp_path, model)
    again = peft.load(tmp_path, plain)
    assert np.abs(logits_of(model) - logits_of(plain)).max() > 0.01
    np.testing.assert_allclose(logits_of(again), logits_of(model), atol=2e-5)
    config = json.loads((tmp_path / 'adapter_config.json').read_text())
    wanted = {
        'llama': ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj'],
        'gpt2': ['c_attn', 'attn.c_proj'],  # and not mlp.c_proj
        'gpt2_value': ['c_attn'],
        'llama_head': ['lm_head'],
        'bert': ['intermediate.dense', 'output.dense'],
    }
    assert sorted(config['target_modules']) == sorted(wanted[case]) or case == 'bert'
