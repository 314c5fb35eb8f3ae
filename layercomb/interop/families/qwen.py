"""Qwen 2 and Qwen 3."""

from __future__ import annotations

from typing import Any

from layercomb import models
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
from layercomb.interop.tensors import Entry
from layercomb.layers.core.layer import Layer


def net(config: Config) -> Layer:
    """The model that a configuration describes; Qwen 3 has a head depth and norms of its own."""
    newer = _is_newer(config)
    return models.Llama(
        **{**sizes(config), **({} if newer else {'d_head': None})},
        window=_windows(config),
        epsilon=config.number('rms_norm_eps', 1e-6),
        qkv_bias=_has_bias(config),
        out_bias=newer and _has_bias(config),
        qk_norm=newer,
        tied=config.flag('tie_word_embeddings'),
        activation=activation(config, 'hidden_act', 'silu'),
    )


def entries(config: Config) -> list[Entry]:
    """The tensors of the model that a configuration describes."""
    newer, biased = _is_newer(config), _has_bias(config)
    kinds = _windows(config) or (None,) * config.count('num_hidden_layers')
    return [
        *ends(config.flag('tie_word_embeddings')),
        *of_layers(kinds, biased, newer and biased, qk_norm=newer),
    ]


def config(net: Layer) -> dict[str, Any]:
    """The inverse of `net`."""
    _, blocks, _, _ = parts_of(net)
    layers = [block.layers[0].layers[1] for block in blocks]
    newer = layers[0].query_norm is not None
    widths = [layer.window for layer in layers]
    width = next((w for w in widths if w is not None), None)
    made = {
        'architectures': ['Qwen3ForCausalLM' if newer else 'Qwen2ForCausalLM'],
        'model_type': 'qwen3' if newer else 'qwen2',
        **described(net),
        'use_sliding_window': width is not None,
        'sliding_window': width,
        'max_window_layers': len(layers),
        'layer_types': [FULL if w is None else SLIDING for w in widths],
    }
    if newer:
        return {**made, 'attention_bias': layers[0].qkv_bias}
    return {name: value for name, value in made.items() if name != 'head_dim'}


def _is_newer(config: Config) -> bool:
    return config.get('model_type') == 'qwen3'


def _has_bias(config: Config) -> bool:
    return config.flag('attention_bias') if _is_newer(config) else True


def _windows(config: Config) -> tuple[int | None, ...] | None:
    """The window of each layer: by ``layer_types``, or all from ``max_window_layers`` on."""
    used = config.flag('use_sliding_window') and config.get('sliding_window') is not None
    first = config.get('max_window_layers', 28)
    n = config.count('num_hidden_layers')
    kinds = [SLIDING if used and i >= first else FULL for i in range(n)]
    return windows(config, kinds)


QWEN = Family('Qwen', net, entries, config, ignored=TABLES)
