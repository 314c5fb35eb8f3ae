"""Marian's translators in Hugging Face's format."""

from __future__ import annotations

from typing import Any

from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.names import ACTIVATIONS, WORDS, dense, norm
from layercomb.interop.tensors import Entry
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.models.marian import Marian
from layercomb.shapes import Signature, shape_dtype

# The table again: it must be the same.
_AGAIN = (
    'model.encoder.embed_tokens.weight',
    'model.decoder.embed_tokens.weight',
    'lm_head.weight',
)


def _net(config: Config) -> Layer:
    config.must_be('share_encoder_decoder_embeddings', True)
    config.must_be('tie_word_embeddings', True)
    config.must_be('is_encoder_decoder', True)
    config.must_be('normalize_before', False)
    config.must_be('normalize_embedding', False)
    config.must_be('add_final_layer_norm', False)
    config.must_be('static_position_embeddings', True)
    config.must_be('add_bias_logits', False)
    config.get('num_hidden_layers')  # of the encoder, said again
    config.get('extra_pos_embeddings')  # of another model
    config.get('force_bos_token_to_be_generated')  # by an older name of forced_bos_token_id
    vocab_size = config.count('vocab_size')
    config.must_be('decoder_vocab_size', vocab_size)
    net: Layer = Marian(
        vocab_size=vocab_size,
        d_model=config.count('d_model'),
        d_ff=config.count('encoder_ffn_dim'),
        n_encoder_layers=config.count('encoder_layers'),
        n_decoder_layers=config.count('decoder_layers'),
        n_heads=config.count('encoder_attention_heads'),
        max_len=config.count('max_position_embeddings'),
        decoder_d_ff=config.count('decoder_ffn_dim'),
        decoder_n_heads=config.count('decoder_attention_heads'),
        activation=config.one_of('activation_function', ACTIVATIONS, 'gelu'),
        scaled=bool(config.get('scale_embedding', False)),
    )
    return net


def _entries(config: Config) -> list[Entry]:
    made = [
        Entry('encoder/tokens/table', 'model.shared.weight', also=_AGAIN),
        Entry('head/bias', 'final_logits_bias', is_row=True),
    ]
    for side in ('encoder', 'decoder'):
        layers = range(config.count(f'{side}_layers'))
        ours, theirs = f'{side}/block', f'model.{side}.layers.{{}}'
        made += _attention(f'{ours}/mixing/self_attention', f'{theirs}.self_attn', layers)
        made += norm(f'{ours}/mixing_norm', f'{theirs}.self_attn_layer_norm', layers)
        if side == 'decoder':
            made += _attention(f'{ours}/reading/cross_attention', f'{theirs}.encoder_attn', layers)
            made += norm(f'{ours}/reading_norm', f'{theirs}.encoder_attn_layer_norm', layers)
        made += dense(f'{ours}/feeding/feed_forward/dense', f'{theirs}.fc1', layers)
        made += dense(f'{ours}/feeding/feed_forward/dense_1', f'{theirs}.fc2', layers)
        made += norm(f'{ours}/feeding_norm', f'{theirs}.final_layer_norm', layers)
    return made


def _attention(ours: str, theirs: str, layers: Any) -> list[Entry]:
    parts = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'output': 'out_proj'}
    return [
        entry
        for part, name in parts.items()
        for entry in dense(f'{ours}/{part}', f'{theirs}.{name}', layers)
    ]


def _config(net: Layer) -> dict[str, Any]:
    at: dict[str, Any] = dict(walk(net))
    tokens = at['encoder/tokens']
    made: dict[str, Any] = {
        'architectures': ['MarianMTModel'],
        'model_type': 'marian',
        'is_encoder_decoder': True,
        'vocab_size': tokens.vocab_size,
        'decoder_vocab_size': tokens.vocab_size,
        'd_model': tokens.d_model,
        'max_position_embeddings': at['encoder/positions'].max_len,
        'activation_function': WORDS[at['encoder/block/feeding/feed_forward'].keys[1]],
        'scale_embedding': tokens.scale is not None,
        'share_encoder_decoder_embeddings': True,
        'tie_word_embeddings': True,
        # The last token of Marian's vocabularies pads, and begins what the decoder writes.
        'pad_token_id': tokens.vocab_size - 1,
        'decoder_start_token_id': tokens.vocab_size - 1,
        'eos_token_id': 0,
    }
    for side in ('encoder', 'decoder'):
        made[f'{side}_layers'] = _depth(net, side)
        made[f'{side}_attention_heads'] = at[f'{side}/block/mixing/self_attention'].n_heads
        made[f'{side}_ffn_dim'] = at[f'{side}/block/feeding/feed_forward/dense'].n_units
    return made


def _depth(net: Layer, side: str) -> int:
    """How many blocks one side has."""
    return next(x.n for path, x in walk(net) if path == f'{side}/block' and isinstance(x, Repeat))


def _signature(net: Layer) -> Signature:
    """Source, inputs and mask."""
    del net
    ids = shape_dtype((1, 8), 'int32')
    return ids, ids, shape_dtype((1, 8), bool)


MARIAN = Family(
    name='marian',
    net=_net,
    entries=_entries,
    config=_config,
    signature=_signature,
    ignored=(r'model\.(encoder|decoder)\.embed_positions\.weight',),  # sines, which are computed
)
