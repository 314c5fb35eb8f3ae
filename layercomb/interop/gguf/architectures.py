"""Architectures of .gguf files: their metadata as a config.json, and their tensors' names.

The families of `interop.families` know Hugging Face's names alone. An `Architecture` translates.
Three things differ in the numbers. Of architecture ``llama``, the rows of queries and keys are
permuted, (H, K/2, 2) where Hugging Face has (H, 2, K/2), since llama.cpp rotates neighbours. Norms
of Gemma have 1 added. A linear layer is (out, in) everywhere, also where GPT-2 has (in, out).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from layercomb.errors import UsageError
from layercomb.interop.gguf import rope
from layercomb.interop.gguf.file import File, Stored
from layercomb.interop.gguf.keys import Keys
from layercomb.interop.gguf.weights import Tensor
from layercomb.interop.tensors import Entry

_BLOCK = re.compile(r'blk\.(\d+)\.')
_OUTSIDE = {
    'model.embed_tokens': 'token_embd',
    'model.norm': 'output_norm',
    'lm_head': 'output',
}
_INSIDE = {
    'input_layernorm': 'attn_norm',
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'self_attn.q_norm': 'attn_q_norm',
    'self_attn.k_norm': 'attn_k_norm',
    'post_attention_layernorm': 'ffn_norm',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
}
_LLAMA_NAMES = _OUTSIDE | {f'model.layers.{{}}.{a}': f'blk.{{}}.{b}' for a, b in _INSIDE.items()}
_GEMMA_NAMES = _LLAMA_NAMES | {
    'model.layers.{}.post_attention_layernorm': 'blk.{}.post_attention_norm',
    'model.layers.{}.pre_feedforward_layernorm': 'blk.{}.ffn_norm',
    'model.layers.{}.post_feedforward_layernorm': 'blk.{}.post_ffw_norm',
}
_GPT2_NAMES = {
    'transformer.wte': 'token_embd',
    'transformer.wpe': 'position_embd',
    'transformer.h.{}.ln_1': 'blk.{}.attn_norm',
    'transformer.h.{}.attn.c_attn': 'blk.{}.attn_qkv',
    'transformer.h.{}.attn.c_proj': 'blk.{}.attn_output',
    'transformer.h.{}.ln_2': 'blk.{}.ffn_norm',
    'transformer.h.{}.mlp.c_fc': 'blk.{}.ffn_up',
    'transformer.h.{}.mlp.c_proj': 'blk.{}.ffn_down',
    'transformer.ln_f': 'output_norm',
    'lm_head': 'output',
}


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """How an architecture of GGUF is said in Hugging Face's terms.

    Attributes:
      name: ``general.architecture``.
      config: the entries of the config.json that the metadata mean, besides the common ones.
      names: of tensors, theirs by Hugging Face's, without ``.weight`` and ``.bias``.
      permutes: whether the rows of queries and keys are permuted.
      norm_shift: what was added to the scales of norms.
      turned: Hugging Face's tensors that are (in, out) there.
    """

    name: str
    config: Callable[[Keys, File], dict[str, Any]]
    names: Mapping[str, str]
    permutes: bool = False
    norm_shift: float = 0.0
    turned: frozenset[str] = frozenset()

    def renamed(self, entry: Entry) -> Entry:
        """An entry of the family, with the name that the tensor has in the file."""
        stem, _, kind = entry.theirs.rpartition('.')
        if stem not in self.names or kind not in ('weight', 'bias'):
            raise UsageError(
                f'the tensor {entry.theirs!r} has no name in a .gguf of architecture {self.name}: '
                'save the model in another format'
            )
        turned = stem in self.turned and kind == 'weight'
        theirs = f'{self.names[stem]}.{kind}'
        transposed = entry.transposed or turned
        return dataclasses.replace(entry, theirs=theirs, transposed=transposed, also=())

    def order(self, name: str, n_rows: int, config: Mapping[str, Any]) -> np.ndarray | None:
        """Which row of the file each row of ours is; None if all are where they are.

        Args:
          name: of the tensor in the file.
          n_rows: how many rows it has.
          config: of the model.
        """
        which = re.fullmatch(r'blk\.\d+\.attn_([qk])\.(?:weight|bias)', name)
        if which is None or not self.permutes:
            return None
        heads = config['num_attention_heads' if which[1] == 'q' else 'num_key_value_heads']
        if n_rows % (2 * heads):
            raise UsageError(
                f'{name} has {n_rows} rows, which {heads} heads of pairs do not divide: download '
                'the file again'
            )
        return np.arange(n_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def tensor(self, stored: Stored, config: Mapping[str, Any]) -> Tensor:
        """A tensor of the file as the family wants it.

        Args:
          stored: as it lies in the file.
          config: of the model.
        """
        order = self.order(stored.name, stored.shape[0], config)
        is_norm = stored.name.endswith('norm.weight')
        return Tensor(stored, order, -self.norm_shift if is_norm else 0.0)


def architecture_of(file: File) -> Architecture:
    """The architecture that a file names.

    Raises:
      UsageError: if it is unknown, listing those known, or the file is no whole model.
    """
    name = file.metadata.get('general.architecture')
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UsageError(
            f'{str(file.path)!r} holds a model of architecture {name!r:.60}, and known are '
            f'{", ".join(ARCHITECTURES)}: take one of those'
        )
    kind = file.metadata.get('general.type', 'model')
    if kind != 'model':
        raise UsageError(
            f'{str(file.path)!r} holds no model, but a part of type {kind!r:.60}: take the file of '
            'the model itself'
        )
    if file.metadata.get('split.count', 1) not in (0, 1):
        raise UsageError(
            f'{str(file.path)!r} is one of {file.metadata["split.count"]} parts: join them with '
            "llama.cpp's llama-gguf-split --merge"
        )
    return ARCHITECTURES[name]


def config_of_file(file: File, architecture: Architecture) -> dict[str, Any]:
    """The config.json of the model in a file.

    Raises:
      UsageError: if metadata are missing, wrong, or not understood.
    """
    keys = Keys(file.metadata, architecture.name)
    n_blocks = keys.count('block_count')
    found = {int(m[1]) for name in file.tensors if (m := _BLOCK.match(name)) is not None}
    if len(found) != n_blocks or max(found) != n_blocks - 1:
        raise UsageError(
            f'{str(file.path)!r} announces {n_blocks:,} layers and holds {len(found):,}: download '
            'it again'
        )
    table = file.tensors.get('token_embd.weight')
    if table is None or len(table.shape) != 2:
        raise UsageError(f'{str(file.path)!r} has no table token_embd.weight: take a whole model')
    keys.must_be('vocab_size', table.shape[0])
    config = architecture.config(keys, file)
    keys.check_read()
    return {
        'vocab_size': table.shape[0],
        'tie_word_embeddings': 'output.weight' not in file.tensors,
        **config,
    }


def metadata_of(config: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """The inverse of `config_of_file`: an architecture and its metadata.

    Args:
      config: a config.json of the families Llama, Mistral, Qwen or Gemma 3, with all its sizes.

    Raises:
      UsageError: for a model of another family, or what has no place in the metadata.
    """
    architecture = ARCHITECTURES.get(_WRITTEN.get(config['model_type'], ''))
    if architecture is None:
        raise UsageError(
            f'a model of type {config["model_type"]} cannot be written as .gguf, only those of '
            f'type {", ".join(_WRITTEN)}: save it as a directory of Hugging Face'
        )
    width, base = head_depth(config), config['rope_theta']
    made = {
        'vocab_size': config['vocab_size'],
        'context_length': config['max_position_embeddings'],
        'embedding_length': config['hidden_size'],
        'block_count': config['num_hidden_layers'],
        'feed_forward_length': config['intermediate_size'],
        'attention.head_count': config['num_attention_heads'],
        'attention.head_count_kv': config['num_key_value_heads'],
        'attention.key_length': width,
        'attention.value_length': width,
        'attention.layer_norm_rms_epsilon': float(config['rms_norm_eps']),
        'rope.dimension_count': width,
        **({} if base is None else {'rope.freq_base': float(base)}),
        **rope.metadata_of(config.get('rope_scaling')),
    }
    if config.get('sliding_window') is not None:
        made['attention.sliding_window'] = config['sliding_window']
    metadata = {f'{architecture.name}.{name}': value for name, value in made.items()}
    return architecture, metadata


def head_depth(config: Mapping[str, Any]) -> int:
    """The depth of a head, which a config.json may leave out."""
    depth: int = config.get('head_dim') or config['hidden_size'] // config['num_attention_heads']
    return depth


def _llama_like(keys: Keys, file: File, model_type: str) -> dict[str, Any]:
    """What Llama, Qwen and Gemma have in common."""
    heads = keys.count('attention.head_count')
    width = keys.count('embedding_length')
    d_head = keys.count('attention.key_length', max(1, width // heads))
    keys.must_be('attention.value_length', d_head)
    keys.must_be('rope.dimension_count', d_head)
    keys.must_be('attention.causal', True)
    return {
        'model_type': model_type,
        'hidden_size': width,
        'intermediate_size': keys.count('feed_forward_length'),
        'num_hidden_layers': keys.count('block_count'),
        'num_attention_heads': heads,
        'num_key_value_heads': keys.count('attention.head_count_kv', heads),
        'head_dim': d_head,
        'max_position_embeddings': keys.count('context_length'),
        'rms_norm_eps': keys.number('attention.layer_norm_rms_epsilon'),
        'rope_theta': keys.number('rope.freq_base', 10000.0),
        **rope.scaling(keys, file, d_head),
    }


def _llama(keys: Keys, file: File) -> dict[str, Any]:
    config = _llama_like(keys, file, 'llama')
    window = keys.get('attention.sliding_window')
    if window:
        config |= {
            'model_type': 'mistral',
            'sliding_window': keys.count('attention.sliding_window'),
        }
    else:
        config |= {
            'attention_bias': 'blk.0.attn_output.bias' in file.tensors,
            'mlp_bias': 'blk.0.ffn_down.bias' in file.tensors,
        }
    return config | {'hidden_act': 'silu'}


def _qwen(model_type: str) -> Callable[[Keys, File], dict[str, Any]]:
    def config(keys: Keys, file: File) -> dict[str, Any]:
        return _llama_like(keys, file, model_type) | {'hidden_act': 'silu'}

    return config


def _gemma3(keys: Keys, file: File) -> dict[str, Any]:
    config = _llama_like(keys, file, 'gemma3_text')
    heads, n_layers = config['num_attention_heads'], config['num_hidden_layers']
    # The 27B model alone scales its scores by another width, as llama.cpp knows by its depth.
    scaled = config['hidden_size'] // heads if n_layers == 62 else config['head_dim']
    keys.must_be('attention.sliding_window_pattern', 6)
    return config | {
        'hidden_activation': 'gelu_pytorch_tanh',
        'query_pre_attn_scalar': scaled,
        'sliding_window': keys.count('attention.sliding_window'),
        'sliding_window_pattern': 6,
        'rope_local_base_freq': keys.number('rope.freq_base_swa', 10000.0),
        'final_logit_softcapping': keys.get('final_logit_softcapping') or None,
        'attn_logit_softcapping': keys.get('attn_logit_softcapping') or None,
    }


def _gpt2(keys: Keys, file: File) -> dict[str, Any]:
    del file
    return {
        'model_type': 'gpt2',
        'n_layer': keys.count('block_count'),
        'n_head': keys.count('attention.head_count'),
        'n_embd': keys.count('embedding_length'),
        'n_inner': keys.count('feed_forward_length'),
        'n_positions': keys.count('context_length'),
        'layer_norm_epsilon': keys.number('attention.layer_norm_epsilon'),
        'activation_function': 'gelu_new',
    }


# Which architecture a model_type is written as.
_WRITTEN = {
    'llama': 'llama',
    'mistral': 'llama',
    'qwen2': 'qwen2',
    'qwen3': 'qwen3',
    'gemma3_text': 'gemma3',
}
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture('llama', _llama, _LLAMA_NAMES, permutes=True),
        Architecture('qwen2', _qwen('qwen2'), _LLAMA_NAMES),
        Architecture('qwen3', _qwen('qwen3'), _LLAMA_NAMES),
        Architecture('gemma3', _gemma3, _GEMMA_NAMES, norm_shift=1.0),
        Architecture(
            'gpt2',
            _gpt2,
            _GPT2_NAMES,
            turned=frozenset(name for name in _GPT2_NAMES if '.c_' in name),
        ),
    )
}
