"""GPT-2 in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from layercomb import models
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.names import ACTIVATIONS, WORDS
from layercomb.interop.tensors import Entry
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.transforms.tying import Tied

_ATTENTION, _FEEDING = 'block/attention', 'block/feed_forward'


def _net(config: Config) -> Layer:
    config.must_be('scale_attn_weights', True)
    config.must_be('scale_attn_by_inverse_layer_idx', False)
    config.must_be('add_cross_attention', False)
    # How it was computed in half precision, an older name of n_positions, and a head of another
    # model.
    for name in ('reorder_and_upcast_attn', 'n_ctx', 'gradient_checkpointing'):
        config.get(name)
    for name in ('type', 'use_proj', 'activation', 'proj_to_labels', 'first_dropout'):
        config.get(f'summary_{name}')
    net: Layer = models.GPT2(
        vocab_size=config.count('vocab_size', 50257),
        d_model=config.count('n_embd', 768),
        d_ff=None if config.get('n_inner') is None else config.count('n_inner'),
        n_layers=config.count('n_layer', 12),
        n_heads=config.count('n_head', 12),
        max_len=config.count('n_positions', 1024),
        activation=config.one_of('activation_function', ACTIVATIONS, 'gelu_new'),
        epsilon=config.number('layer_norm_epsilon', 1e-5),
        tied=bool(config.get('tie_word_embeddings', True)),
    )
    return net


def _entries(config: Config) -> list[Entry]:
    d, layers = config.count('n_embd', 768), range(config.count('n_layer', 12))
    tied = bool(config.get('tie_word_embeddings', True))
    head = 'lm_head.weight'
    made = [
        Entry('embedding/table', 'transformer.wte.weight', also=('wte.weight', head)[: 1 + tied]),
        *_both('norm', 'ln_f', norm=True),
        _named('positions/table', 'wpe.weight'),
        *_both(f'{_ATTENTION}/norm', 'h.{}.ln_1', layers, norm=True),
        *_both(f'{_FEEDING}/norm', 'h.{}.ln_2', layers, norm=True),
        *_both(f'{_ATTENTION}/self_attention/output', 'h.{}.attn.c_proj', layers),
        *_both(f'{_FEEDING}/dense', 'h.{}.mlp.c_fc', layers),
        *_both(f'{_FEEDING}/dense_1', 'h.{}.mlp.c_proj', layers),
    ]
    for i, part in enumerate(('query', 'key', 'value')):
        ours = f'{_ATTENTION}/self_attention/{part}'
        made += _both(ours, 'h.{}.attn.c_attn', layers, part=(i * d, i * d + d))
    return made if tied else [*made, Entry('head/kernel', head, transposed=True)]


def _both(
    ours: str,
    theirs: str,
    layers: Sequence[int] | None = None,
    *,
    norm: bool = False,
    part: tuple[int, int] | None = None,
) -> Iterator[Entry]:
    """The weight and the bias of a module. Its matrices are (in, out), as ours."""
    weight = 'scale' if norm else 'kernel'
    yield _named(f'{ours}/{weight}', f'{theirs}.weight', layers, part)
    yield _named(f'{ours}/bias', f'{theirs}.bias', layers, part)


def _named(
    ours: str,
    theirs: str,
    layers: Sequence[int] | None = None,
    part: tuple[int, int] | None = None,
) -> Entry:
    """An entry, whose tensor has no prefix in files of the model without its head."""
    return Entry(ours, f'transformer.{theirs}', layers=layers, part=part, also=(theirs,))


def _config(net: Layer) -> dict[str, Any]:
    at: dict[str, Any] = dict(walk(net))
    embedding = at['embedding']
    return {
        'architectures': ['GPT2LMHeadModel'],
        'model_type': 'gpt2',
        'vocab_size': embedding.vocab_size,
        'n_embd': embedding.d_model,
        'n_inner': at[f'{_FEEDING}/dense'].n_units,
        'n_layer': next(x.n for _, x in walk(net) if isinstance(x, Repeat)),
        'n_head': at[f'{_ATTENTION}/self_attention'].n_heads,
        'n_positions': at['positions'].max_len,
        'activation_function': WORDS[at[_FEEDING].keys[2]],
        'layer_norm_epsilon': at['norm'].epsilon,
        'tie_word_embeddings': isinstance(net, Tied),
    }


# Ignored are masks, which old files hold.
GPT2 = Family('gpt2', _net, _entries, _config, ignored=(r'.*\.attn\.(masked_)?bias',))
