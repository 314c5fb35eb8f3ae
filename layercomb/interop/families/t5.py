"""T5 in Hugging Face's format, version 1.0 and 1.1 (and FLAN's, mT5's)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layercomb import models
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.names import ACTIVATIONS, WORDS
from layercomb.interop.tensors import Entry, linear
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.shapes import Signature, shape_dtype
from layercomb.transforms.tying import Tied


def _feeding(config: Config) -> tuple[bool, str]:
    """Whether feed-forwards are gated, and their activation."""
    said = config.get('feed_forward_proj', 'relu')
    gated, _, word = str(said).rpartition('-')
    for name in ('is_gated_act', 'dense_act_fn'):
        config.get(name)  # the same, said again
    if gated not in ('', 'gated') or word not in ACTIVATIONS:
        raise UsageError(
            f"config.json: 'feed_forward_proj' is {said!r}, and known are relu, gated-gelu and "
            'gated-silu: this model cannot be loaded'
        )
    # Their gated gelu is the approximate one.
    return bool(gated), 'gelu' if (gated, word) == ('gated', 'gelu') else ACTIVATIONS[word]


def _net(config: Config) -> Layer:
    config.must_be('is_encoder_decoder', True)
    config.get('n_positions')  # of the training data
    gated, activation = _feeding(config)
    tied = bool(config.get('tie_word_embeddings', True))
    n_layers = config.count('num_layers')
    net: Layer = models.T5(
        vocab_size=config.count('vocab_size'),
        d_model=config.count('d_model'),
        d_ff=config.count('d_ff'),
        n_encoder_layers=n_layers,
        n_decoder_layers=config.count('num_decoder_layers', n_layers),
        n_heads=config.count('num_heads'),
        d_head=config.count('d_kv'),
        n_buckets=config.count('relative_attention_num_buckets', 32),
        max_distance=config.count('relative_attention_max_distance', 128),
        activation=activation,
        gated=gated,
        tied=tied,
        scaled_head=bool(config.get('scale_decoder_outputs', tied)),
        epsilon=config.number('layer_norm_epsilon', 1e-6),
    )
    return net


def _entries(config: Config) -> list[Entry]:
    gated, _ = _feeding(config)
    tied = bool(config.get('tie_word_embeddings', True))
    again = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
    made = [
        Entry(
            'encoder/tokens/table',
            'shared.weight',
            also=(*again, 'lm_head.weight') if tied else again,
        )
    ]
    if not tied:
        made.append(linear('head/kernel', 'lm_head.weight'))
    n_layers = config.count('num_layers')
    depth = {'encoder': n_layers, 'decoder': config.count('num_decoder_layers', n_layers)}
    for side, n in depth.items():
        layers, ours, theirs = range(n), f'{side}/block', f'{side}.block.{{}}.layer'
        parts = [('mixing', 'SelfAttention', 'self_attention')]
        parts += [('reading', 'EncDecAttention', 'cross_attention')] if side == 'decoder' else []
        for i, (part, name, attention) in enumerate(parts):
            made += _attention(f'{ours}/{part}/{attention}', f'{theirs}.{i}.{name}', layers)
        last = f'{theirs}.{len(parts)}.DenseReluDense'
        made += _feed_forward(f'{ours}/feeding', last, gated, layers)
        for i, part in enumerate([*(part for part, *_ in parts), 'feeding']):
            norm = Entry(f'{ours}/{part}/norm/scale', f'{theirs}.{i}.layer_norm.weight')
            made.append(Entry(norm.ours, norm.theirs, layers=layers))
        made.append(
            Entry(
                f'{side}/distances/table',
                f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
            )
        )
        made.append(Entry(f'{side}/norm/scale', f'{side}.final_layer_norm.weight'))
    return made


def _attention(ours: str, theirs: str, layers: Sequence[int]) -> list[Entry]:
    parts = {'query': 'q', 'key': 'k', 'value': 'v', 'output': 'o'}
    return [
        linear(f'{ours}/{part}/kernel', f'{theirs}.{name}.weight', layers)
        for part, name in parts.items()
    ]


def _feed_forward(ours: str, theirs: str, gated: bool, layers: Sequence[int]) -> list[Entry]:
    parts = {'out/kernel': 'wo'}
    parts |= {'gated_dense/gate': 'wi_0', 'gated_dense/up': 'wi_1'} if gated else {}
    parts |= {} if gated else {'dense/kernel': 'wi'}
    return [
        linear(f'{ours}/{part}', f'{theirs}.{name}.weight', layers) for part, name in parts.items()
    ]


def _config(net: Layer) -> dict[str, Any]:
    at: dict[str, Any] = dict(walk(net))
    blocks = {path: x for path, x in walk(net) if isinstance(x, Repeat)}
    tokens, distances = at['encoder/tokens'], at['encoder/distances']
    attention = at['encoder/block/mixing/self_attention']
    gate = at.get('encoder/block/feeding/gated_dense')
    inner = gate or at['encoder/block/feeding/dense']
    if isinstance(gate, GatedDense):
        word = 'gelu' if gate.activation == 'gelu' else WORDS[gate.activation]
    else:
        word = WORDS[next(k for k in at['encoder/block/feeding'].keys if k in WORDS)]
    return {
        'architectures': ['T5ForConditionalGeneration'],
        'model_type': 't5',
        'is_encoder_decoder': True,
        'vocab_size': tokens.vocab_size,
        'd_model': tokens.d_model,
        'd_ff': inner.n_units,
        'd_kv': attention.d_head or tokens.d_model // attention.n_heads,
        'num_heads': attention.n_heads,
        'num_layers': blocks['encoder/block'].n,
        'num_decoder_layers': blocks['decoder/block'].n,
        'relative_attention_num_buckets': distances.n_buckets,
        'relative_attention_max_distance': distances.max_distance,
        'feed_forward_proj': f'gated-{word}' if gate else word,
        'layer_norm_epsilon': at['encoder/norm'].epsilon,
        'tie_word_embeddings': isinstance(net, Tied) and net.target == 'head/kernel',
        'scale_decoder_outputs': 'scale' in at,
    }


def _signature(net: Layer) -> Signature:
    """Source, inputs and mask."""
    del net
    ids = shape_dtype((1, 8), 'int32')
    return ids, ids, shape_dtype((1, 8), bool)


# The first release had a table beside the attention to the encoder, which nothing reads.
T5 = Family(
    't5',
    _net,
    _entries,
    _config,
    _signature,
    ignored=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',),
)
