"""Writes decoders.npz: what transformers computes for tiny decoders of every kind.

    python tests/data/pretrained/make_decoders.py

It needs torch and transformers (extra ``bench``). Weights are not recorded: `values` makes them
from the tensors' names, here and in the test, by NumPy's frozen generator.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name('decoders.npz')
LENGTH = 24
KEPT = 8  # the last positions, whose logits are recorded
SMALL = {
    'vocab_size': 29,
    'hidden_size': 16,
    'intermediate_size': 24,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 0,
}
GEMMA = {**SMALL, 'head_dim': 8, 'num_hidden_layers': 5, 'sliding_window': 6}
LLAMA3 = {
    'rope_type': 'llama3',
    'rope_theta': 500.0,
    'factor': 4.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
YARN = {
    'rope_type': 'yarn',
    'rope_theta': 10000.0,
    'factor': 4.0,
    'original_max_position_embeddings': 16,
}
LONGROPE = {
    'rope_type': 'longrope',
    'rope_theta': 10000.0,
    'short_factor': [1.0, 1.5],
    'long_factor': [2.0, 3.0],
    'partial_rotary_factor': 1.0,
}
# By name: the type of the model, and its configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('llama', SMALL),
    'llama tied': ('llama', {**SMALL, 'tie_word_embeddings': True, 'num_key_value_heads': 1}),
    'llama biased': (
        'llama',
        {**SMALL, 'attention_bias': True, 'mlp_bias': True, 'head_dim': 8, 'hidden_act': 'gelu'},
    ),
    'llama llama3': ('llama', {**SMALL, 'rope_parameters': LLAMA3}),
    'llama yarn': ('llama', {**SMALL, 'rope_parameters': YARN}),
    'llama linear': (
        'llama',
        {**SMALL, 'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 2.0}},
    ),
    'llama dynamic': (
        'llama',
        {
            **SMALL,
            'max_position_embeddings': 16,
            'rope_parameters': {'rope_type': 'dynamic', 'rope_theta': 1e4, 'factor': 2.0},
        },
    ),
    'mistral': ('mistral', {**SMALL, 'sliding_window': 5, 'head_dim': 8}),
    'qwen2': ('qwen2', SMALL),
    'qwen2 windows': (
        'qwen2',
        {**SMALL, 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1},
    ),
    'qwen3': ('qwen3', {**SMALL, 'head_dim': 8, 'attention_bias': True}),
    'qwen3 tied': ('qwen3', {**SMALL, 'head_dim': 4, 'tie_word_embeddings': True}),
    'gemma2': ('gemma2', {**GEMMA, 'query_pre_attn_scalar': 12, 'attn_logit_softcapping': 3.0}),
    'gemma3_text': (
        'gemma3_text',
        {**GEMMA, 'sliding_window_pattern': 2, 'query_pre_attn_scalar': 10},
    ),
    'gemma3_text scaled': (
        'gemma3_text',
        {
            **GEMMA,
            'num_hidden_layers': 3,
            'sliding_window_pattern': 3,
            'query_pre_attn_scalar': 8,
            'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
        },
    ),
    'phi3': ('phi3', {**SMALL, 'sliding_window': 7}),
    'phi3 longrope': (
        'phi3',
        {**SMALL, 'original_max_position_embeddings': 16, 'rope_parameters': LONGROPE},
    ),
}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's values, float32: small for vectors, else of a variance of 1 / the last axis.

    Args:
      name: of the tensor, from which alone they follow.
      shape: of the tensor.
    """
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    size = 0.2 if len(shape) == 1 else 1 if 'embed' in name else shape[-1] ** -0.5
    return (drawn * size + (len(shape) == 1 and 'norm' in name)).astype(np.float32)


def token_ids(vocab_size: int) -> np.ndarray:
    """(1, LENGTH) int32."""
    return np.random.RandomState(5).randint(0, vocab_size, (1, LENGTH)).astype(np.int32)


def made(kind: str, entries: dict[str, Any]) -> dict[str, Any]:
    """What transformers says of one model: its config.json, tensors and logits."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **json.loads(json.dumps(entries)))
    config._attn_implementation = 'eager'
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        named = dict(model.named_parameters())
        for name, parameter in named.items():
            parameter.copy_(torch.tensor(values(name, tuple(parameter.shape))))
        ids = torch.tensor(token_ids(config.vocab_size).astype(np.int64))
        logits = model(ids, use_cache=False).logits.numpy()
    return {
        'config': json.dumps(json.loads(config.to_json_string(use_diff=False))),
        'shapes': json.dumps({name: list(p.shape) for name, p in named.items()}),
        'logits': logits[:, -KEPT:].astype(np.float32),
    }


if __name__ == '__main__':
    recorded = {}
    for case, (kind, entries) in CASES.items():
        for what, value in made(kind, entries).items():
            recorded[f'{case}/{what}'] = np.asarray(value)
    np.savez_compressed(FILE, **recorded)
    print(f'{FILE}: {FILE.stat().st_size:,} bytes')
