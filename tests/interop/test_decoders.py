"""Decoders as transformers has them: recorded logits, tensors there and back, configurations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from layercomb import models, tl, transforms
from layercomb.errors import UsageError, UsageWarning
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of, family_of
from layercomb.interop.tensors import fill, shapes_of, spill
from layercomb.layers.core.mode import Mode

FOLDER = Path(__file__).parents[1] / 'data' / 'pretrained'
spec = importlib.util.spec_from_file_location('make_decoders', FOLDER / 'make_decoders.py')
assert spec is not None and spec.loader is not None
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
RECORDED = np.load(FOLDER / 'decoders.npz')
CASES = list(recorder.CASES)


class Known:
    """A tensor whose values are known, or follow from its name."""

    def __init__(self, given, name=''):
        self.values = given if isinstance(given, np.ndarray) else None
        self.shape = tuple(given.shape if self.values is not None else given)
        self.name = name

    def read(self):
        return recorder.values(self.name, self.shape) if self.values is None else self.values


def recorded(case, **changes):
    """The configuration and the tensors of a case."""
    config = json.loads(str(RECORDED[f'{case}/config'])) | changes
    shapes = json.loads(str(RECORDED[f'{case}/shapes']))
    return config, {name: Known(shape, name) for name, shape in shapes.items()}


def described(config):
    """The model that a configuration describes."""
    family, known = family_of(config), Config(config)
    net = family.net(known)
    family.entries(known)
    known.check_read(family.name)
    return net


def loaded(config, tensors):
    """A model and its weights, as a loader makes them."""
    family, net = family_of(config), described(config)
    entries, shapes = family.entries(Config(config)), shapes_of(net, family.signature(net))
    return net, fill(net, shapes, entries, tensors, ignored=family.ignored)


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case):
    net, weights = loaded(*recorded(case))
    vocab_size = RECORDED[f'{case}/logits'].shape[-1]
    apply = jax.jit(net.apply, static_argnames='mode')
    (logits,), _ = apply(weights, {}, (recorder.token_ids(vocab_size),), mode=Mode.EVAL)
    wanted = RECORDED[f'{case}/logits']
    np.testing.assert_allclose(logits[:, -recorder.KEPT :], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_tensors_and_configuration_come_back(case):
    config, tensors = recorded(case)
    net, weights = loaded(config, tensors)
    family = family_of(config)
    written = family.config(net)
    found, other = config_of(net)
    assert (family, written) == (found, other) or config['model_type'] == 'phi3'  # then a Llama
    again = dict(spill(net, weights, family.entries(Config(written))))
    assert again.keys() == tensors.keys()
    for name, values in again.items():
        np.testing.assert_array_equal(values, tensors[name].read(), err_msg=name)
    copies = {name: Known(values) for name, values in again.items()}
    other, same = loaded(json.loads(json.dumps(written)), copies)
    assert other == net
    jax.tree.map(np.testing.assert_array_equal, same, weights)


# Configurations as their makers wrote them, in the old form.
SMOLLM2 = {
    'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 576,
    'initializer_range': 0.041666666666666664, 'intermediate_size': 1536, 'is_llama_config': True,
    'max_position_embeddings': 8192, 'mlp_bias': False, 'model_type': 'llama',
    'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3,
    'pad_token_id': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False,
    'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16', 'transformers_version': '4.42.3', 'use_cache': True,
    'vocab_size': 49152, 'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}},
}  # fmt: skip
MISTRAL = {
    'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2,
    'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
    'intermediate_size': 14336, 'max_position_embeddings': 32768, 'model_type': 'mistral',
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
    'rms_norm_eps': 1e-05, 'rope_theta': 10000.0, 'sliding_window': 4096,
    'tie_word_embeddings': False, 'torch_dtype': 'bfloat16', 'use_cache': True,
    'vocab_size': 32000,
}  # fmt: skip
QWEN = {
    'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151645, 'hidden_act': 'silu', 'hidden_size': 896, 'initializer_range': 0.02,
    'intermediate_size': 4864, 'max_position_embeddings': 32768, 'max_window_layers': 21,
    'model_type': 'qwen2', 'num_attention_heads': 14, 'num_hidden_layers': 24,
    'num_key_value_heads': 2, 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0,
    'sliding_window': 32768, 'tie_word_embeddings': True, 'use_cache': True,
    'use_sliding_window': False, 'vocab_size': 151936,
}  # fmt: skip
GEMMA = {
    'architectures': ['Gemma3ForConditionalGeneration'], 'boi_token_index': 255999,
    'eoi_token_index': 256000, 'eos_token_id': [1, 106], 'image_token_index': 262144,
    'initializer_range': 0.02, 'mm_tokens_per_image': 256, 'model_type': 'gemma3',
    'text_config': {
        'hidden_size': 2560, 'intermediate_size': 10240, 'model_type': 'gemma3_text',
        'num_hidden_layers': 34, 'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
        'sliding_window': 1024,
    },
    'torch_dtype': 'bfloat16', 'transformers_version': '4.50.0.dev0',
    'vision_config': {'hidden_size': 1152, 'image_size': 896, 'model_type': 'siglip_vision_model'},
}  # fmt: skip


def test_configurations_as_their_makers_wrote_them():
    smollm2 = models.Llama(49152, 576, 1536, 30, 9, 3, 8192, period=1e5, epsilon=1e-5, tied=True)
    assert described(SMOLLM2) == smollm2
    mistral = models.Llama(32000, 4096, 14336, 32, 32, 8, 32768, window=4096, epsilon=1e-5)
    assert described(MISTRAL) == mistral
    assert described(QWEN) == models.Qwen2(151936, 896, 4864, 24, 14, 2, 32768, tied=True)
    with pytest.warns(UsageWarning, match='sees pictures too: its text part alone is taken'):
        gemma = described(GEMMA)
    assert gemma == models.Gemma3(
        262208, 2560, 10240, 34, 8, 4, 131072,
        window=(*[1024] * 5, None), scaling=tl.LinearScaling(8.0),
    )  # fmt: skip
    for net in (smollm2, mistral, gemma):
        family, written = config_of(net)
        assert family.net(Config(written)) == net


@pytest.mark.parametrize('prefix', ['language_model.model', 'model.language_model'])
def test_the_text_part_of_a_model_that_sees_pictures(prefix):
    text, tensors = recorded('gemma3_text')
    whole = {'model_type': 'gemma3', 'text_config': text, 'vision_config': {'hidden_size': 4}}
    inside = {name.replace('model', prefix, 1): x for name, x in tensors.items()}
    inside['vision_tower.vision_model.embeddings.weight'] = Known(np.zeros(3))
    inside['multi_modal_projector.mm_soft_emb_norm.weight'] = Known(np.zeros(3))
    inside['language_model.lm_head.weight'] = inside[f'{prefix}.embed_tokens.weight']
    with pytest.warns(UsageWarning):
        net, weights = loaded(whole, inside)
    wanted_net, wanted = loaded(text, tensors)
    assert net == wanted_net
    jax.tree.map(np.testing.assert_array_equal, weights, wanted)


def test_a_tied_head_may_be_there_twice_if_both_are_equal():
    config, tensors = recorded('llama tied')
    table = tensors['model.embed_tokens.weight']
    _, weights = loaded(config, tensors)
    both = tensors | {'lm_head.weight': table}
    jax.tree.map(np.testing.assert_array_equal, loaded(config, both)[1], weights)
    alone = {name: x for name, x in tensors.items() if x is not table} | {'lm_head.weight': table}
    jax.tree.map(np.testing.assert_array_equal, loaded(config, alone)[1], weights)
    with pytest.raises(
        UsageError, match=r'embed_tokens\.weight and lm_head\.weight differ, and the'
    ):
        loaded(config, tensors | {'lm_head.weight': Known(table.shape, 'other')})


def test_a_head_of_its_own_must_be_there():
    config, tensors = recorded('llama')
    del tensors['lm_head.weight']
    with pytest.raises(UsageError, match=r'\(missing: lm_head\.weight\)'):
        loaded(config, tensors)


def test_tables_of_sines_are_left_out():
    config, tensors = recorded('llama')
    old = {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': Known(np.ones(2)) for i in (0, 1)}
    loaded(config, tensors | old)


def small(kind, **more):
    sizes = {**recorder.SMALL, 'model_type': kind, **more}
    return {name: value for name, value in sizes.items() if value is not ...}


@pytest.mark.parametrize(
    'case', [case for case in CASES if case.startswith(('llama', 'qwen', 'mistral', 'phi'))]
)
def test_old_and_new_form_say_the_same(case):
    config, _ = recorded(case)
    new = config.pop('rope_parameters')
    period, share = new.pop('rope_theta'), new.pop('partial_rotary_factor', None)
    kind = new.pop('rope_type')
    old = config | {'rope_theta': period, 'rope_scaling': {'type': kind, **new} if new else None}
    old |= {} if share is None else {'partial_rotary_factor': share}
    assert described(old) == described(recorded(case)[0])


def test_kinds_of_layers_have_rotary_positions_of_their_own():
    old = small(
        'gemma3_text', head_dim=8, num_hidden_layers=3, sliding_window_pattern=2, rope_theta=2e5,
        rope_local_base_freq=5e3, rope_scaling={'rope_type': 'linear', 'factor': 2.0},
    )  # fmt: skip
    full, local = {'rope_theta': 2e5, 'rope_type': 'linear', 'factor': 2.0}, {'rope_theta': 5e3}
    new = small('gemma3_text', head_dim=8, num_hidden_layers=3, sliding_window_pattern=2)
    new['rope_parameters'] = {'full_attention': full, 'sliding_attention': local}
    assert described(new) == described(old)
    scaled = {'full_attention': full, 'sliding_attention': {**local, **full, 'factor': 3.0}}
    net = described(new | {'rope_parameters': scaled})
    _, written = config_of(net)
    assert described(json.loads(json.dumps(written))) == net


@pytest.mark.parametrize(
    ('config', 'error'),
    [
        (small('llama', rope_scaling={'type': 'mrope'}), "'type' is 'mrope', and known are"),
        (small('llama', hidden_act='quick_gelu'), "'hidden_act' is 'quick_gelu', and known"),
        (small('llama', attention_bias='yes'), "'attention_bias' is 'yes' and not true or false"),
        (small('llama', hidden_size=...), "config.json has no 'hidden_size': take the file"),
        (small('llama', hidden_size=16.5), "'hidden_size' is 16.5 and not a positive integer"),
        (small('llama', rms_norm_eps='tiny'), "'rms_norm_eps' is 'tiny' and no number"),
        (small('llama', rope_interleaved=True), "'rope_interleaved' is True, and only False"),
        (small('llama', partial_rotary_factor=0.5), "'partial_rotary_factor' is 0.5, and only 1"),
        (small('llama', rope_scaling={'rope_type': 'linear'}), "config.json has no 'factor'"),
        (small('llama', rope_scaling=[4]), r"'rope_scaling' is \[4\] and not an object"),
        (
            small('llama', rope_scaling={'rope_type': 'linear', 'factor': 2.0, 'speed': 3}),
            "says 'speed': 3, which is unknown for rotary positions",
        ),
        (
            small(
                'llama',
                rope_scaling={'rope_type': 'linear', 'factor': 2.0},
                rope_parameters={'rope_type': 'linear', 'factor': 4.0},
            ),
            'rope_scaling and rope_parameters contradict each other',
        ),
        (small('llama', quantization_config={'bits': 4}), "'quantization_config': .* is unknown"),
        (small('llama', attention_sinks=3), "'attention_sinks': 3, which is unknown for"),
        (
            small('qwen2', layer_types=['full_attention', 'chunked_attention']),
            'layer_types is .*chunked.*, and must say full_attention or sliding_attention for each',
        ),
        (small('qwen3', layer_types=['full_attention']), 'for each of the 2 layers: this model'),
        (
            small('gemma3_text', rope_parameters={'rope_theta': 1e4}),
            'rope_parameters has rope_theta, and must have full_attention and sliding_attention',
        ),
        (small('gemma2', query_pre_attn_scalar=0), "'query_pre_attn_scalar' is 0.0, and must be"),
        (small('gemma3', text_config=3), "'text_config' is 3 and not an object"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(config, error):
    with pytest.raises(UsageError, match=error):
        described(config)


def test_what_matters_in_training_alone_is_not_written():
    net = models.Llama(29, 16, 24, 2, 4, 2, 64)
    taught = models.Llama(29, 16, 24, 2, 4, 2, 64, 0.1, remat=True, ff_chunk_len=4)
    assert config_of(transforms.cast(taught)) == config_of(net)
    with pytest.raises(UsageError, match=r'this model belongs to none of the families .*Llama'):
        config_of(models.TransformerLM(29, 16, 24, 2, 4, 64))
    with pytest.raises(UsageError, match='belongs to none'):
        config_of(models.Llama(29, 16, 24, 2, 4, 2, 64, window=(4, None)))  # Mistral has one window
