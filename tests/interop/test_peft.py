"""Adapters in PEFT's format: recorded logits of PEFT, files there and back, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import interop, transforms, trees
from layercomb.errors import UsageError
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
    ranks = {'gpt2': {'c_attn': 6}, 'gpt2_value': {}, 'llama': {}, 'llama_head': {}, 'bert': {}}
    names = {name.split('.')[-1]: rank for name, rank in config['rank_pattern'].items()}
    assert names == ranks[case]  # three A, one below the other
    wanted = {
        'llama': ['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj'],
        'gpt2': ['c_attn', 'attn.c_proj'],  # and not mlp.c_proj
        'gpt2_value': ['c_attn'],
        'llama_head': ['lm_head'],
        # Its ends would fit attention.output.dense too.
        'bert': [
            f'bert.encoder.layer.{i}.{x}.dense'
            for i in range(2)
            for x in ('intermediate', 'output')
        ],
    }
    assert sorted(config['target_modules']) == sorted(wanted[case])


def changed(tmp_path, case='llama', tensors=None, **config):
    """A copy of a recorded adapter with some changes."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(FOLDER / case, tmp_path / 'made')
    file = tmp_path / 'made' / 'adapter_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    if tensors is not None:
        weights = tmp_path / 'made' / 'adapter_model.safetensors'
        save_file(tensors(load_file(weights)), weights)
    return tmp_path / 'made'


Q = 'base_model.model.model.layers.0.self_attn.q_proj.lora_'
CONFIGS = {
    'another kind': ({'peft_type': 'IA3'}, "an adapter of type 'IA3', and only LORA is known"),
    'biases': ({'bias': 'all'}, "adapter_config.json: 'bias' is 'all', and only 'none' is"),
    'lora_bias': ({'lora_bias': True}, "'lora_bias' is True, and only False is understood"),
    'pissa': ({'init_lora_weights': 'pissa'}, 'changes the base model too: save it there with'),
    'tokens': ({'trainable_token_indices': [3]}, "says 'trainable_token_indices': \\[3\\], which"),
    'unheard of': ({'use_magic': True}, "says 'use_magic': True, which is unknown"),
    'rank': ({'r': 4}, r'down_proj: lora_A is \(3, 24\) and not \(4, 24\): it was made for a'),
    'a pattern': ({'rank_pattern': {'(': 3}}, 'is no pattern'),
    'no pattern': ({'rank_pattern': {'x': 'y'}}, 'must give a number by each name'),
    'dropout': ({'lora_dropout': 1.5}, 'lora_dropout is 1.5, and must be from 0 to below 1'),
    'half of dora': ({'use_dora': True}, 'has no lora_magnitude_vector: copy the whole adapter'),
    'whole': (
        {'modules_to_save': ['lm_head']},
        'asks for lm_head.weight, which is not in',
    ),
    'whole is no list': ({'modules_to_save': 'x'}, "modules_to_save is 'x', and must be a list"),
}
TENSORS = {
    'no B': (lambda x: without(x, f'{Q}B.weight'), 'q_proj has no lora_B: copy the whole adapter'),
    'wide': (
        lambda x: {**x, f'{Q}A.weight': np.zeros((3, 8), np.float32)},
        r'lora_A is \(3, 8\) and not \(3, 16\): it was made for a model of other sizes',
    ),
    'another model': (
        lambda x: {name.replace('layers.1', 'layers.7'): y for name, y in x.items()},
        "layers.7.mlp.down_proj, .* can have none in this model: it was made for 'some/other'",
    ),
    'an embedding': (
        lambda x: {**x, 'base_model.model.model.embed_tokens.lora_embedding_A': np.zeros((3, 29))},
        'is an adapter of an embedding, which cannot be loaded',
    ),
    'no prefix': (lambda x: {**x, 'a.weight': np.zeros(3)}, "'a.weight' is no tensor of an"),
    'a bias': (
        lambda x: {**x, f'{Q}B.bias': np.zeros(16, np.float32)},
        'is unknown in an adapter: merge it',
    ),
    'another head': (
        lambda x: {**x, 'base_model.model.lm_head.weight': np.zeros((30, 16), np.float32)},
        r'replaces lm_head.weight: it is \(30, 16\) and not \(29, 16\)',
    ),
    'no such weight': (
        lambda x: {**x, 'base_model.model.score.weight': np.zeros((30, 16), np.float32)},
        'replaces score.weight, which this model does not have',
    ),
    'nothing': (
        lambda x: {'base_model.model.lm_head.weight': np.zeros((29, 16), np.float32)},
        'holds no lora_A',
    ),
}


def test_a_tied_head_may_have_an_adapter(tmp_path):
    name, x = 'base_model.model.lm_head', np.random.default_rng(0).normal(size=(29, 2))
    tensors = {f'{name}.lora_A.weight': x[:16].T, f'{name}.lora_B.weight': x}
    tensors = {key: np.ascontiguousarray(x.astype(np.float32)) for key, x in tensors.items()}
    folder = changed(tmp_path, 'gpt2', lambda _: tensors, use_dora=False)
    model = peft.load(folder, BASES['gpt2'])
    flat = trees.flatten(model.weights)
    assert flat['head/kernel_lora_b'].shape == (2, 29) and 'head/kernel' not in flat
    table = np.asarray(flat['embedding/table']) + 2 * x @ x[:16].T
    net = BASES['gpt2'].layer.layer
    kept = {key: y for key, y in flat.items() if not transforms.is_lora(key)}
    whole = trees.unflatten({**kept, 'head/kernel': jnp.asarray(table.T, jnp.float32)})
    np.testing.assert_allclose(logits_of(model), logits_of(lc.Model(net, whole)), atol=2e-5)
    peft.save(tmp_path / 'out', model)
    assert products(folder, model).keys() == products(tmp_path / 'out', model).keys()


def without(tensors, name):
    return {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize('case', CONFIGS)
def test_a_configuration_that_is_not_understood_is_refused(case, tmp_path):
    config, said = CONFIGS[case]
    with pytest.raises(UsageError, match=said) as caught:
        peft.load(changed(tmp_path, **config), BASES['llama'])
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('case', TENSORS)
def test_tensors_for_another_model_are_refused(case, tmp_path):
    tensors, said = TENSORS[case]
    folder = changed(tmp_path, tensors=tensors, base_model_name_or_path='some/other')
    with pytest.raises(UsageError, match=said) as caught:
        peft.load(folder, BASES['llama'])
    assert '\n' not in str(caught.value)


def test_what_changes_nothing_is_allowed(tmp_path):
    neutral = {'init_lora_weights': 'eva', 'eva_config': {'rho': 2.0}, 'inference_mode': False}
    model = peft.load(changed(tmp_path, **neutral, revision='main'), BASES['llama'])
    assert any(transforms.is_lora(path) for path in trees.flatten(model.weights))


def test_a_model_that_has_no_adapter_or_two_is_refused(tmp_path):
    model = peft.load(FOLDER / 'llama', BASES['llama'])
    with pytest.raises(UsageError, match='the model has an adapter already'):
        peft.load(FOLDER / 'llama', model)
    with pytest.raises(UsageError, match='holds no adapter of PEFT'):
        peft.load(tmp_path, BASES['llama'])
    with pytest.raises(UsageError, match='this model has no adapter'):
        peft.save(tmp_path / 'out', BASES['llama'])
    with pytest.raises(UsageError, match="this model is no 'bert'"):
        peft.save(tmp_path / 'out', model, model_type='bert')
    peft.save(tmp_path / 'out', model)
    with pytest.raises(UsageError, match='is there already'):
        peft.save(tmp_path / 'out', model)
    mixed = transforms.rewrite(
        model.layer,
        lambda layer: (
            layer.replace(dropout=0.5)
            if isinstance(layer, transforms.LowRank) and isinstance(layer.layer, lc.tl.Dense)
            else layer
        ),
    )
    with pytest.raises(
        UsageError, match=r'the adapters differ in dropout \(0.1, 0.5\), which PEFT'
    ):
        peft.save(tmp_path / 'other', lc.Model(mixed, model.weights))
    head = trained(BASES['bert_classes'], rank=2, where='head/*')
    with pytest.raises(UsageError, match='PEFT holds the head of a classifier whole, and'):
        peft.save(tmp_path / 'other', head)
    assert not (tmp_path / 'other').exists()


def test_a_narrow_base_stays_narrow(tmp_path):
    wide = BASES['llama']
    narrow = lc.Model(*transforms.quantize(wide.layer, wide.weights, smallest=16))
    model = peft.load(FOLDER / 'llama', narrow)
    flat = trees.flatten(model.weights)
    assert flat['block/feed_forward/dense/kernel'].dtype == 'uint32'
    np.testing.assert_allclose(logits_of(model), expected('llama')['after'], atol=0.15)
    peft.save(tmp_path / 'out', model)
    for name, x in products(tmp_path / 'out', model).items():
        np.testing.assert_allclose(x, products(FOLDER / 'llama', model)[name], rtol=1e-6)


# A Python that has torch and PEFT, if one is told.
PEER = Path(os.environ.get('LAYERCOMB_PEFT_PYTHON', sys.executable))


def has_peft():
    if Path(sys.executable) == PEER:
        return all(importlib.util.find_spec(name) for name in ('torch', 'peft', 'transformers'))
    return PEER.exists()


@pytest.mark.slow
@pytest.mark.skipif(not has_peft(), reason='torch and PEFT are not installed')
@pytest.mark.parametrize('case', OURS)
def test_peft_reads_what_is_written_here(case, tmp_path):
    _, model = ours_on(case)
    peft.save(tmp_path / 'out', model)
    name = RECORDER.CASES['bert' if case == 'bert' else case.split('_')[0]][0]
    script = (
        'import sys, numpy as np; from make_peft import base_model, logits_of\n'
        'from peft import PeftModel\n'
        f'model = PeftModel.from_pretrained(base_model({name!r}), {str(tmp_path / "out")!r})\n'
        f'np.save({str(tmp_path / "logits.npy")!r}, logits_of(model.eval()))'
    )
    environment = {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PATH': os.environ['PATH']}
    done = subprocess.run(
        [PEER, '-W', 'ignore', '-c', script], cwd=PRETRAINED, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'missing' not in done.stderr
    np.testing.assert_allclose(logits_of(model), np.load(tmp_path / 'logits.npy'), atol=3e-5)
