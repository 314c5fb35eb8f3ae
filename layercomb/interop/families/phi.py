"""Phi-3, whose queries, keys and values are one tensor, and gate and up another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from layercomb import models
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.llama import (
    TABLES,
    activation,
    described,
    ends,
    of_layers,
    parts_of,
    sizes,
)
from layercomb.interop.families.rope import rotary
from layercomb.interop.tensors import Entry, linear
from layercomb.layers.core.layer import Layer


def net(config: Config) -> Layer:
    """The model that a configuration describes."""
    config = config.or_else(_DEFAULTS)
    config.get('original_max_position_embeddings')  # it matters to 'longrope' alone
    return models.Llama(
        **sizes(config, rotary(config, long=True)),
        window=config.count('sliding_window') if config.get('sliding_window') else None,
        epsilon=config.number('rms_norm_eps'),
        tied=config.flag('tie_word_embeddings'),
        activation=activation(config, 'hidden_act', 'silu'),
    )


def entries(config: Config) -> list[Entry]:
    """The tensors of the model that a configuration describes."""
    config = config.or_else(_DEFAULTS)
    n = config.count('num_hidden_layers')
    fused = tuple(_fused(config, range(n)))
    found = {each.ours for each in fused}
    return [
        *ends(config.flag('tie_word_embeddings')),
        *(each for each in of_layers([None] * n) if each.ours not in found),
        *fused,
    ]


def config(net: Layer) -> dict[str, Any]:
    """The inverse of `net`."""
    _, blocks, _, _ = parts_of(net)
    attention = blocks[0].layers[0].layers[1]
    made = described(net)
    scaling = made['rope_scaling'] or {}
    made['original_max_position_embeddings'] = scaling.pop(
        'original_max_position_embeddings', made['max_position_embeddings']
    )
    return {
        'architectures': ['Phi3ForCausalLM'],
        'model_type': 'phi3',
        **{name: value for name, value in made.items() if name != 'head_dim'},
        'partial_rotary_factor': attention.rotary.share,
        'sliding_window': attention.window,
    }


def _fused(config: Config, layers: range) -> Iterator[Entry]:
    """The parts of the fused tensors, in their order."""
    n_heads = config.count('num_attention_heads')
    n_shared = config.count('num_key_value_heads', n_heads)
    depth = config.count('head_dim', config.count('hidden_size') // n_heads)
    f = config.count('intermediate_size')
    attention, gated = 'block/attention/self_attention', 'block/feed_forward/gated_dense'
    fused = {
        'self_attn.qkv_proj': {
            f'{attention}/query/kernel': n_heads * depth,
            f'{attention}/key/kernel': n_shared * depth,
            f'{attention}/value/kernel': n_shared * depth,
        },
        'mlp.gate_up_proj': {f'{gated}/gate': f, f'{gated}/up': f},
    }
    for theirs, parts in fused.items():
        ends_at = list(itertools.accumulate(parts.values()))
        for (ours, rows), end in zip(parts.items(), ends_at, strict=True):
            name = f'model.layers.{{}}.{theirs}.weight'
            yield linear(ours, name, layers, part=(end - rows, end))


_DEFAULTS = {
    'max_position_embeddings': 4096,
    'original_max_position_embeddings': 4096,
    'rms_norm_eps': 1e-5,
    'partial_rotary_factor': 1.0,
}

PHI = Family('Phi', net, entries, config, ignored=TABLES)
