"""The Reformer in Hugging Face's format: a decoder of local and LSH attention.

Logits are those of transformers for a sequence of any length, if the chunks of its LSH attention
are a multiple of those of its local attention, or it has one kind of attention alone. Else
transformers may append whole chunks of padding, which the first chunk of a round then sees in the
place of the last real one. Lengths up to a chunk of LSH attention, and those that it pads by less
than one, are equal there too.

With ``"hash_seed": null`` transformers draws other rotations at each call, and ours come from
``seed=0``: sequences up to a chunk are equal, which need no rotations.

Neither transformers' generation with its cache nor ours computes again what earlier positions saw,
so both part from the whole sequence's answers once it is longer than a chunk, and from each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layercomb import layers as tl
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.names import ACTIVATIONS, WORDS, dense, norm
from layercomb.interop.tensors import Entry, linear
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.models.reformer import ReformerLM

EPSILON = 1e-6  # added to the mean square of a key


def _net(config: Config) -> Layer:
    if not config.flag('is_decoder'):
        raise UsageError(
            "config.json: 'is_decoder' is not true, and only the Reformer that reads from left to "
            'right is understood: the other one attends across the ends of the sequence'
        )
    _check_form(config)
    layers = _attention(config, _max_len(config))
    kinds = _kinds(config)
    is_axial = config.flag('axial_pos_embds', True)
    net: Layer = ReformerLM(
        config.count('vocab_size'),
        config.count('hidden_size'),
        config.count('feed_forward_size'),
        len(kinds),
        max_len=_max_len(config),
        attention=[layers[kind] for kind in kinds[: _period(kinds)]],
        activation=config.one_of('hidden_act', ACTIVATIONS, 'relu'),
        positions='axial' if is_axial else 'learned',
        axial_shape=tuple(config['axial_pos_shape']) if is_axial else None,
        axial_depths=tuple(config['axial_pos_embds_dim']) if is_axial else None,
        norm=tl.LayerNorm(config.number('layer_norm_eps', 1e-12)),
    )
    return net


def _check_form(config: Config) -> None:
    """Refuses other forms, and reads entries that do not change what is computed."""
    config.must_be('tie_word_embeddings', False)
    config.must_be('local_num_chunks_before', 1, 0)
    config.must_be('lsh_num_chunks_before', 1)
    config.must_be('local_num_chunks_after', 0)
    config.must_be('lsh_num_chunks_after', 0)
    for name in (
        'num_hidden_layers', 'chunk_size_feed_forward', 'chunk_size_lm_head', 'axial_norm_std',
        'local_attention_probs_dropout_prob', 'lsh_attention_probs_dropout_prob',
        'axial_pos_shape', 'axial_pos_embds_dim', 'local_attn_chunk_length',
        'lsh_attn_chunk_length', 'num_hashes', 'num_buckets', 'hash_seed',
    ):  # fmt: skip
        config.get(name)  # those of another kind of attention or positions say nothing


def _kinds(config: Config) -> list[str]:
    """'local' or 'lsh' for each layer."""
    kinds = config['attn_layers']
    if not isinstance(kinds, list) or not kinds or not {*map(str, kinds)} <= {'local', 'lsh'}:
        raise UsageError(
            f"config.json: 'attn_layers' is {kinds!r:.80}, and must be a list of 'local' and 'lsh'"
        )
    return kinds


def _period(kinds: Sequence[str]) -> int:
    """After how many layers the kinds of attention repeat."""
    n = len(kinds)
    return next(k for k in range(1, n + 1) if n % k == 0 and kinds == [*kinds[:k]] * (n // k))


def _max_len(config: Config) -> int:
    """The longest sequence that has positions."""
    max_len = config.count('max_position_embeddings')
    if config.flag('axial_pos_embds', True):
        shape, depths = config['axial_pos_shape'], config['axial_pos_embds_dim']
        if not all(isinstance(x, list) and len(x) == 2 for x in (shape, depths)):
            raise UsageError(
                f"config.json: 'axial_pos_shape' is {shape!r:.40} and 'axial_pos_embds_dim' "
                f'{depths!r:.40}, and both must be two numbers'
            )
        max_len = min(max_len, math.prod(shape))
    return max_len


def _attention(config: Config, max_len: int) -> dict[str, Layer]:
    """The layers by kind, those that are there."""
    kinds, made = _kinds(config), {}
    n_heads, depth = config.count('num_attention_heads'), config.count('attention_head_size')
    common: dict[str, Any] = {'d_head': depth, 'qkv_bias': False, 'out_bias': False}
    if 'local' in kinds:
        made['local'] = tl.LocalSelfAttention(
            n_heads,
            config.count('local_attn_chunk_length'),
            look_back=config.get('local_num_chunks_before', 1),
            **common,
        )
    if 'lsh' in kinds:
        n_buckets, seed = config.get('num_buckets'), config.get('hash_seed')
        if isinstance(n_buckets, list):
            n_buckets = tuple(reversed(n_buckets))  # the first one counts fastest there
        made['lsh'] = tl.LSHSelfAttention(
            n_heads,
            n_hashes=config.count('num_hashes', 1),
            chunk_len=config.count('lsh_attn_chunk_length'),
            n_buckets=n_buckets,
            max_len=max_len,
            neighbourhood='circle',
            epsilon=depth * EPSILON,
            alone='rounded',
            seed=0 if seed is None else seed,
            rotations='jax' if seed is None else 'torch',
            **common,
        )
    return made


def _entries(config: Config) -> list[Entry]:
    made = [Entry('embedding/table', 'reformer.embeddings.word_embeddings.weight')]
    there = 'reformer.embeddings.position_embeddings'
    if config.flag('axial_pos_embds', True):
        for a in range(2):
            tensor = f'{there}.weights.{a}'
            made.append(Entry(f'axial_positions/table_{a}', tensor, one_at=1 - a))
    else:
        made.append(Entry('learned_positions/table', f'{there}.embedding.weight'))
    kinds = _kinds(config)
    period = _period(kinds)
    for i in range(period):
        layers = range(i, len(kinds), period)
        theirs = 'reformer.encoder.layers.{}'
        half, feed = (f'block/reversible_half_residual{_nth(2 * i + k)}' for k in (0, 1))
        made += norm(f'{half}/layer_norm', f'{theirs}.attention.layer_norm', layers)
        ours = f'{half}/{PLACES[kinds[i]]}'
        parts = {'query': 'query', 'key': 'key', 'value': 'value'}
        if kinds[i] == 'lsh':
            parts = {'query': 'query_key', 'value': 'value'}
        for part, name in parts.items():
            tensor = f'{theirs}.attention.self_attention.{name}.weight'
            made.append(linear(f'{ours}/{part}/kernel', tensor, layers))
        tensor = f'{theirs}.attention.output.dense.weight'
        made.append(linear(f'{ours}/output/kernel', tensor, layers))
        ours, theirs = f'{feed}/feed_forward', f'{theirs}.feed_forward'
        made += norm(f'{ours}/layer_norm', f'{theirs}.layer_norm', layers)
        made += dense(f'{ours}/dense', f'{theirs}.dense.dense', layers)
        made += dense(f'{ours}/dense_1', f'{theirs}.output.dense', layers)
    made += norm('head/layer_norm', 'reformer.encoder.layer_norm')
    made.append(linear('head/dense/kernel', 'lm_head.decoder.weight'))
    # Older files have the second name. transformers 5 writes both, and reads the first.
    bias = Entry('head/dense/bias', 'lm_head.decoder.bias', also=('lm_head.bias',), alike=False)
    return [*made, bias]


PLACES = {'local': 'local_self_attention', 'lsh': 'lsh_self_attention'}


def _nth(i: int) -> str:
    """What tells the names of equal layers apart."""
    return f'_{i}' if i else ''


def _config(net: Layer) -> dict[str, Any]:
    at: dict[str, Any] = dict(walk(net))
    block = 'block/reversible_half_residual'
    n = next(x.n for path, x in walk(net) if path == 'block' and hasattr(x, 'stacked_axes'))
    pattern = []
    while f'{block}{_nth(2 * len(pattern))}' in at:
        half = f'{block}{_nth(2 * len(pattern))}'
        pattern.append(next(kind for kind, key in PLACES.items() if f'{half}/{key}' in at))
    layers = {kind: at[f'{block}{_nth(2 * i)}/{PLACES[kind]}'] for i, kind in enumerate(pattern)}
    any_layer, feed = layers[pattern[0]], at[f'{block}_1/feed_forward']
    made: dict[str, Any] = {
        'architectures': ['ReformerModelWithLMHead'],
        'model_type': 'reformer',
        'is_decoder': True,
        'vocab_size': at['embedding'].vocab_size,
        'hidden_size': at['embedding'].d_model,
        'attn_layers': pattern * n,
        'num_attention_heads': any_layer.n_heads,
        'attention_head_size': any_layer.d_head,
        'feed_forward_size': at[f'{block}_1/feed_forward/dense'].n_units,
        'hidden_act': WORDS[feed.keys[2]],
        'layer_norm_eps': at['head/layer_norm'].epsilon,
        'tie_word_embeddings': False,
    }
    return made | _positions(at) | _local(layers.get('local')) | _lsh(layers.get('lsh'))


def _positions(at: dict[str, Any]) -> dict[str, Any]:
    """The entries of positions."""
    axial = at.get('axial_positions')
    if axial is None:
        max_len = at['learned_positions'].max_len
        return {'axial_pos_embds': False, 'max_position_embeddings': max_len}
    return {
        'axial_pos_embds': True,
        'axial_pos_shape': list(axial.shape),
        'axial_pos_embds_dim': list(axial.depths),
        'max_position_embeddings': axial.max_len,
    }


def _local(layer: Any) -> dict[str, Any]:
    """The entries of local attention."""
    if layer is None:
        return {}
    return {
        'local_attn_chunk_length': layer.chunk_len,
        'local_num_chunks_before': layer.look_back,
        'local_num_chunks_after': 0,
    }


def _lsh(layer: Any) -> dict[str, Any]:
    """The entries of LSH attention."""
    if layer is None:
        return {}
    n_buckets = layer.n_buckets
    return {
        'lsh_attn_chunk_length': layer.chunk_len,
        'lsh_num_chunks_before': 1,
        'lsh_num_chunks_after': 0,
        'num_hashes': layer.n_hashes,
        'num_buckets': list(reversed(n_buckets)) if isinstance(n_buckets, tuple) else n_buckets,
        'hash_seed': layer.seed if layer.rotations == 'torch' else None,
        'max_position_embeddings': layer.max_len,
    }


REFORMER = Family(name='reformer', net=_net, entries=_entries, config=_config)
