"""BERT, RoBERTa, ALBERT and FNet in Hugging Face's format."""

from __future__ import annotations

import dataclasses
from typing import Any

from layercomb import models
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.names import ACTIVATIONS, WORDS, dense, norm
from layercomb.interop.tensors import Entry
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.shapes import Signature, shape_dtype


@dataclasses.dataclass(frozen=True)
class Names:
    """How a kind of encoder names its tensors.

    Attributes:
      kind: its model_type.
      of_class: what its architectures begin with.
      layer: the prefix of a block's tensors.
      mixing: our names of the parts that mix positions -> theirs; empty for FNet.
      mixing_norm, dense, dense_1, feeding_norm: of a block.
      pooler: of the classifier's first layer, with the prefix if it has one.
      classes: of its second.
      predictions: the dense layer, the norm and the bias of the masked-LM head.
      projection: of the embeddings; None if there is none.
      activation: of the feed-forwards, where the file says none.
    """

    kind: str
    of_class: str
    layer: str
    mixing: dict[str, str]
    mixing_norm: str
    dense: str
    dense_1: str
    feeding_norm: str
    pooler: str
    classes: str
    predictions: tuple[str, str, str]
    projection: str | None = None
    activation: str = 'gelu'

    def head(self, config: Config) -> str:
        """The head that the architectures ask for.

        Raises:
          UsageError: for one that is unknown.
        """
        made = config.get('architectures') or [f'{self.of_class}Model']
        found = str(made[0]).removeprefix(self.of_class)
        heads = {
            'Model': 'mean' if config.get('_mean_pooling', False) else 'hidden',
            'ForMaskedLM': 'masked_lm',
            'ForPreTraining': 'masked_lm',
            'ForSequenceClassification': 'classes',
        }
        if found not in heads:
            known = ', '.join(f'{self.of_class}{name}' for name in heads)
            raise UsageError(f'config.json: the architecture {made[0]!r} is unknown: known {known}')
        return heads[found]


_BERT = Names(
    kind='bert',
    of_class='Bert',
    layer='encoder.layer.{}.',
    mixing={
        'query': 'attention.self.query',
        'key': 'attention.self.key',
        'value': 'attention.self.value',
        'output': 'attention.output.dense',
    },
    mixing_norm='attention.output.LayerNorm',
    dense='intermediate.dense',
    dense_1='output.dense',
    feeding_norm='output.LayerNorm',
    pooler='bert.pooler.dense',
    classes='classifier',
    predictions=(
        'cls.predictions.transform.dense',
        'cls.predictions.transform.LayerNorm',
        'cls.predictions.bias',
    ),
)
_ROBERTA = dataclasses.replace(
    _BERT,
    kind='roberta',
    of_class='Roberta',
    pooler='classifier.dense',
    classes='classifier.out_proj',
    predictions=('lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias'),
)
_ALBERT = Names(
    kind='albert',
    of_class='Albert',
    layer='encoder.albert_layer_groups.0.albert_layers.0.',
    mixing={
        'query': 'attention.query',
        'key': 'attention.key',
        'value': 'attention.value',
        'output': 'attention.dense',
    },
    mixing_norm='attention.LayerNorm',
    dense='ffn',
    dense_1='ffn_output',
    feeding_norm='full_layer_layer_norm',
    pooler='albert.pooler',
    classes='classifier',
    predictions=('predictions.dense', 'predictions.LayerNorm', 'predictions.bias'),
    projection='encoder.embedding_hidden_mapping_in',
    activation='gelu_new',
)
_FNET = dataclasses.replace(
    _BERT,
    kind='fnet',
    of_class='FNet',
    mixing={},
    mixing_norm='fourier.output.LayerNorm',
    pooler='fnet.pooler.dense',
    projection='embeddings.projection',
    activation='gelu_new',
)


def _common(names: Names, config: Config) -> dict[str, Any]:
    """The arguments that all these models have."""
    for name in ('is_decoder', 'add_cross_attention'):
        config.must_be(name, False)
    config.must_be('position_embedding_type', 'absolute')
    config.must_be('chunk_size_feed_forward', 0)
    config.must_be('tie_word_embeddings', True)
    for name in ('fc_size', 'num_attention_heads', 'num_fc_layers', 'size_per_head', 'type'):
        config.get(f'pooler_{name}')  # of the first release; nothing reads them
    config.get('directionality')
    head = names.head(config)
    labels = config.get('id2label') or {}
    n_classes = len(labels) or config.count('num_labels', 2)
    n_types = config.count('type_vocab_size', 4 if names.kind == 'fnet' else 2)
    return {
        'vocab_size': config.count('vocab_size'),
        'd_model': config.count('hidden_size'),
        'd_ff': config.count('intermediate_size'),
        'n_layers': config.count('num_hidden_layers'),
        'max_len': config.count('max_position_embeddings'),
        'head': head,
        'n_classes': n_classes if head == 'classes' else None,
        'n_types': n_types,
        'typed': bool(config.get('_typed', n_types > 1 and head != 'mean')),
        'activation': config.one_of('hidden_act', ACTIVATIONS, names.activation),
        'epsilon': config.number('layer_norm_eps', 1e-12),
    }


def _bert(names: Names, config: Config) -> Layer:
    given = _common(names, config)
    given['n_heads'] = config.count('num_attention_heads')
    if names is _ROBERTA:
        first = config.count('pad_token_id', 1) + 1
        given |= {'first_position': first, 'max_len': given['max_len'] - first}
    if names is _ALBERT:
        for name in ('num_hidden_groups', 'inner_group_num'):
            config.must_be(name, 1)
        for name in ('net_structure_type', 'gap_size', 'num_memory_blocks', 'down_scale_factor'):
            config.get(name)  # of the first release; nothing reads them
        given |= {'d_embedding': config.count('embedding_size', 128), 'shared': True}
    net: Layer = models.BERT(**given)
    return net


def _fnet(names: Names, config: Config) -> Layer:
    for name in ('use_tpu_fourier_optimizations', 'tpu_short_seq_length'):
        config.get(name)  # how it is computed, not what
    net: Layer = models.FNet(**_common(names, config))
    return net


def _entries(names: Names, config: Config) -> list[Entry]:
    """The tensors of a model."""
    head = names.head(config)
    prefix = '' if head in ('hidden', 'mean') else f'{names.kind}.'
    many = range(config.count('num_hidden_layers'))
    layers = None if names is _ALBERT else many
    ours = 'blocks/block' if names is _FNET else 'block'
    # Old files hold the table and the bias of the head twice, and both must be the same.
    again = names.predictions[2].removesuffix('bias') + 'decoder'
    made = [
        Entry(
            'embeddings/tables/tokens/table',
            f'{prefix}embeddings.word_embeddings.weight',
            also=(f'{again}.weight',) if head == 'masked_lm' else (),
        ),
        Entry('embeddings/tables/types/table', f'{prefix}embeddings.token_type_embeddings.weight'),
        Entry('embeddings/positions/table', f'{prefix}embeddings.position_embeddings.weight'),
        *norm('embeddings/norm', f'{prefix}embeddings.LayerNorm'),
    ]
    if names.projection is not None:
        made += dense('embeddings/projection', prefix + names.projection)
    block = prefix + names.layer
    for part, theirs in names.mixing.items():
        made += dense(f'{ours}/mixing/self_attention/{part}', block + theirs, layers)
    made += norm(f'{ours}/mixing_norm', block + names.mixing_norm, layers)
    made += dense(f'{ours}/feeding/feed_forward/dense', block + names.dense, layers)
    made += dense(f'{ours}/feeding/feed_forward/dense_1', block + names.dense_1, layers)
    made += norm(f'{ours}/feeding_norm', block + names.feeding_norm, layers)
    if head == 'masked_lm':
        transform, its_norm, bias = names.predictions
        made += [*dense('head/dense', transform), *norm('head/norm', its_norm)]
        made.append(Entry('head/logits/bias', bias, also=(f'{again}.bias',)))
    if head == 'classes':
        made += [*dense('head/pooler', names.pooler), *dense('head/classes', names.classes)]
    return made


def _config(names: Names, net: Layer) -> dict[str, Any]:
    """The configuration of a model, read off its layers."""
    at: dict[str, Any] = dict(walk(net))
    block = 'blocks/block' if names is _FNET else 'block'
    tokens, types = at['embeddings/tables/tokens'], at['embeddings/tables/types']
    positions = at['embeddings/positions']
    _, activation, _ = at[f'{block}/feeding/feed_forward'].keys
    # Each head is known by a layer that the others lack.
    heads = {'head/logits': 'ForMaskedLM', 'head/classes': 'ForSequenceClassification'}
    kind = next((name for path, name in heads.items() if path in at), 'Model')
    made: dict[str, Any] = {
        'architectures': [names.of_class + kind],
        'model_type': names.kind,
        'vocab_size': tokens.vocab_size,
        'hidden_size': at[f'{block}/feeding/feed_forward/dense_1'].n_units,
        'intermediate_size': at[f'{block}/feeding/feed_forward/dense'].n_units,
        'num_hidden_layers': next(x.n for _, x in walk(net) if isinstance(x, Repeat)),
        'max_position_embeddings': positions.max_len + positions.first,
        'type_vocab_size': types.vocab_size,
        'hidden_act': WORDS[activation],
        'layer_norm_eps': at['embeddings/norm'].epsilon,
        'tie_word_embeddings': True,
        '_typed': net.n_in > 1 + bool(names.mixing),
        '_mean_pooling': 'head/mean' in at,
    }
    if names.mixing:
        made['num_attention_heads'] = at[f'{block}/mixing/self_attention'].n_heads
    if names is _ROBERTA:
        made['pad_token_id'] = positions.first - 1
    if names is _ALBERT:
        made |= {'embedding_size': tokens.d_model, 'num_hidden_groups': 1, 'inner_group_num': 1}
    if 'head/classes' in at:
        n = at['head/classes'].n_units
        made['id2label'] = {str(i): f'LABEL_{i}' for i in range(n)}
        made['label2id'] = {f'LABEL_{i}': i for i in range(n)}
    return made


def _signature(names: Names, net: Layer) -> Signature:
    """Token ids, types if the model takes them, and a mask unless it is FNet."""
    n_masks = int(bool(names.mixing))
    ids = (shape_dtype((1, 8), 'int32'),) * (net.n_in - n_masks)
    return ids + (shape_dtype((1, 8), bool),) * n_masks


def _family(names: Names) -> Family:
    make = _fnet if names is _FNET else _bert
    return Family(
        name=names.kind,
        net=lambda config: make(names, config),
        entries=lambda config: _entries(names, config),
        config=lambda net: _config(names, net),
        signature=lambda net: _signature(names, net),
        ignored=(
            r'.*position_ids',
            r'.*token_type_ids',
            # Of whether a sentence follows another, and of states that nothing reads.
            r'cls\.seq_relationship\.(weight|bias)',
            r'sop_classifier\.classifier\.(weight|bias)',
            r'((bert|albert|roberta|fnet)\.)?pooler\.(dense\.)?(weight|bias)',
        ),
    )


BERT = _family(_BERT)
ROBERTA = _family(_ROBERTA)
ALBERT = _family(_ALBERT)
FNET = _family(_FNET)
