"""Gemma 2, and Gemma 3 for text; of a model that sees pictures too, the text part alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from layercomb import layers as tl
from layercomb import models
from layercomb.errors import UsageError, UsageWarning
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.llama import (
    FULL,
    SLIDING,
    TABLES,
    activation,
    described,
    ends,
    of_layers,
    parts_of,
    sizes,
    windows,
)
from layercomb.interop.families.rope import parameters, rotary
from layercomb.interop.tensors import Entry
from layercomb.layers.core.layer import Layer

_NORMS = ('post_attention_layernorm', 'pre_feedforward_layernorm', 'post_feedforward_layernorm')
# Where the text part is in a model that sees pictures: in older files, and in newer ones.
_WITHIN = ('language_model.model', 'model.language_model')
_PICTURES = (r'(model\.)?vision_tower\..*', r'(model\.)?multi_modal_projector\..*')
_ABOUT_PICTURES = (
    'vision_config', 'mm_tokens_per_image', 'image_token_index', 'image_token_id',
    'boi_token_index', 'boi_token_id', 'eoi_token_index', 'eoi_token_id',
)  # fmt: skip
# What their files leave out.
_BOTH: dict[str, Any] = {
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'num_hidden_layers': 26,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'tie_word_embeddings': True,
    'hidden_activation': 'gelu_pytorch_tanh',
}
_GEMMA2 = {
    **_BOTH,
    'vocab_size': 256000,
    'max_position_embeddings': 8192,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
}
_GEMMA3 = {
    **_BOTH,
    'vocab_size': 262208,
    'max_position_embeddings': 131072,
    'rope_theta': 1000000.0,
    'sliding_window_pattern': 6,
}


def net(config: Config) -> Layer:
    """The model that a configuration describes.

    Warns:
      UsageWarning: if it sees pictures too: only its text part is taken.
    """
    text = _text(config)
    made = _net(text)
    if config.get('model_type') != 'gemma3':
        return made
    text.check_read('Gemma 3')
    about = [config.get(name) for name in _ABOUT_PICTURES]
    if any(each is not None for each in about):
        warnings.warn(
            'this Gemma 3 sees pictures too: its text part alone is taken, which reads text',
            UsageWarning,
            stacklevel=2,
        )
    return made


def entries(config: Config) -> list[Entry]:
    """The tensors of the text part of the model that a configuration describes."""
    text = _text(config)
    biased, older = text.flag('attention_bias'), _is_gemma2(text)
    capped = text.get('final_logit_softcapping') is not None
    kinds = _windows(text) or (None,) * text.count('num_hidden_layers')
    head = 'head/dense/kernel' if capped else 'head/kernel'
    return [
        *ends(text.flag('tie_word_embeddings'), head, within=_WITHIN),
        *of_layers(kinds, biased, biased, qk_norm=not older, norms=_NORMS, within=_WITHIN),
    ]


def config(net: Layer) -> dict[str, Any]:
    """The inverse of `net`."""
    _, blocks, head, _ = parts_of(net)
    layers = [block.layers[0].layers[1] for block in blocks]
    first, older = layers[0], layers[0].query_norm is None
    widths = [layer.window for layer in layers]
    made = described(net)
    last: Any = head
    cap = last.layers[1].limit if isinstance(head, tl.Serial) else None
    scalar = made['head_dim'] if first.scale is None else first.scale**-2
    return {
        'architectures': ['Gemma2ForCausalLM' if older else 'Gemma3ForCausalLM'],
        'model_type': 'gemma2' if older else 'gemma3_text',
        **{name: value for name, value in made.items() if name != 'hidden_act'},
        'hidden_activation': made['hidden_act'],
        'attention_bias': first.qkv_bias,
        'query_pre_attn_scalar': round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        'sliding_window': next((w for w in widths if w is not None), None),
        'layer_types': [FULL if w is None else SLIDING for w in widths],
        'attn_logit_softcapping': first.softcap,
        'final_logit_softcapping': cap,
        **({} if older else _positions(layers)),
    }


def _positions(layers: Sequence[Any]) -> dict[str, Any]:
    """The rotary positions of the two kinds of layers."""
    full, local = (
        next((layer.rotary for layer in layers if (layer.window is None) is sees_all), None)
        for sees_all in (True, False)
    )
    known: dict[str, Any] = {}
    if full is not None:
        scaling = None if full.scaling is None else parameters(full.scaling)
        known |= {'rope_theta': full.period, 'rope_scaling': scaling}
    if local is not None and local.scaling is None:
        known['rope_local_base_freq'] = local.period
    if local is None or local.scaling is None:
        return known if full is not None else {**known, 'rope_theta': None, 'rope_scaling': None}
    kinds = {FULL: full, SLIDING: local}
    new = {
        kind: {'rope_type': 'default', 'rope_theta': each.period}
        | ({} if each.scaling is None else parameters(each.scaling))
        for kind, each in kinds.items()
        if each is not None
    }
    return {'rope_theta': None, 'rope_scaling': None, 'rope_parameters': new}


def _text(config: Config) -> Config:
    """The configuration of the text part, with what files leave out."""
    kind = config.get('model_type')
    if kind != 'gemma3':
        return config.or_else(_GEMMA2 if kind == 'gemma2' else _GEMMA3)
    tied = config.flag('tie_word_embeddings', default=True)
    text = config.inside('text_config').or_else({**_GEMMA3, 'tie_word_embeddings': tied})
    text.must_be('tie_word_embeddings', tied)
    return text


def _net(config: Config) -> Layer:
    older = _is_gemma2(config)
    config.must_be('use_bidirectional_attention', False)
    full = rotary(config) if older else rotary(config, kind=FULL)
    local = full if older else rotary(config, 10000.0, SLIDING, 'rope_local_base_freq')
    given = sizes(config, full)
    scalar = config.number('query_pre_attn_scalar')
    if not scalar > 0:
        raise UsageError(
            f"config.json: 'query_pre_attn_scalar' is {scalar}, and must be above 0: take the file "
            'that came with the model'
        )
    return models.Gemma3(
        **given,
        window=_windows(config),
        local_period=local['period'],
        local_scaling=local['scaling'],
        scale=None if scalar == config.count('head_dim') else scalar**-0.5,
        softcap=_cap(config, 'attn_logit_softcapping'),
        logit_softcap=_cap(config, 'final_logit_softcapping'),
        epsilon=config.number('rms_norm_eps', 1e-6),
        attention_bias=config.flag('attention_bias'),
        qk_norm=not older,
        tied=config.flag('tie_word_embeddings'),
        activation=activation(config, 'hidden_activation', 'gelu_pytorch_tanh'),
    )


def _is_gemma2(config: Config) -> bool:
    return config.get('model_type') == 'gemma2'


def _cap(config: Config, name: str) -> float | None:
    return None if config.get(name) is None else config.number(name)


def _windows(config: Config) -> tuple[int | None, ...] | None:
    """The window of each layer; every so many layers there is one without."""
    every = 2 if _is_gemma2(config) else config.count('sliding_window_pattern')
    n = config.count('num_hidden_layers')
    return windows(config, [SLIDING if (i + 1) % every else FULL for i in range(n)])


GEMMA = Family('Gemma', net, entries, config, ignored=(*TABLES, *_PICTURES))
