"""Llama, Mistral, and what decoders of their kind share in names and configurations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from layercomb import layers as tl
from layercomb import models
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import Family
from layercomb.interop.families.rope import max_len, rotary, written
from layercomb.interop.tensors import Entry, linear
from layercomb.layers.core.layer import Layer
from layercomb.models.llama import places
from layercomb.transforms.tying import Tied

FULL, SLIDING = 'full_attention', 'sliding_attention'
# Tables of sines, which old files hold.
TABLES = (r'(.*\.)?rotary_emb\.inv_freq',)
_ACTIVATIONS = {
    'silu': 'silu',
    'swish': 'silu',
    'gelu_pytorch_tanh': 'gelu',
    'gelu_new': 'gelu',
    'gelu': 'exact_gelu',
    'relu': 'relu',
}


def net(config: Config) -> Layer:
    """The model that a configuration describes: Llama, or Mistral, which may have a window."""
    config.must_be('rope_interleaved', False)
    return models.Llama(
        **sizes(config),
        window=config.count('sliding_window') if config.get('sliding_window') else None,
        epsilon=config.number('rms_norm_eps', 1e-6),
        qkv_bias=config.flag('attention_bias'),
        out_bias=config.flag('attention_bias'),
        ff_bias=config.flag('mlp_bias'),
        tied=config.flag('tie_word_embeddings'),
        activation=activation(config, 'hidden_act', 'silu'),
    )


def sizes(config: Config, turned: dict[str, Any] | None = None) -> dict[str, Any]:
    """The sizes and rotary positions of a decoder, as arguments of `models.Llama`.

    Args:
      config: of the model.
      turned: what `rotary` says; None to ask it.
    """
    turned = rotary(config) if turned is None else turned
    head = config.get('head_dim')
    return {
        'vocab_size': config.count('vocab_size'),
        'd_model': config.count('hidden_size'),
        'd_ff': config.count('intermediate_size'),
        'n_layers': config.count('num_hidden_layers'),
        'n_heads': config.count('num_attention_heads'),
        'n_kv_heads': config.count('num_key_value_heads', config.count('num_attention_heads')),
        'd_head': None if head is None else config.count('head_dim'),
        'max_len': max_len(config, turned['scaling']),
        **turned,
    }


def activation(config: Config, name: str, default: str) -> str:
    """The activation that a configuration names.

    Args:
      config: of the model.
      name: of the entry.
      default: their word where it is missing.
    """
    known: str = config.one_of(name, _ACTIVATIONS, default)
    return known


def windows(config: Config, kinds: Sequence[str] | None) -> tuple[int | None, ...] | None:
    """The window of each layer; None if no layer has one.

    Args:
      config: of the model. Its ``layer_types`` say which layers have the ``sliding_window``.
      kinds: those of the layers where ``layer_types`` is missing; None if none has a window.

    Raises:
      UsageError: for unknown kinds, too many or too few, or kinds without a window's width.
    """
    found = config.get('layer_types', kinds)
    width = config.get('sliding_window')
    if found is None:
        return None
    n = config.count('num_hidden_layers')
    if not isinstance(found, list | tuple) or len(found) != n or {*found} - {FULL, SLIDING}:
        raise UsageError(
            f'config.json: layer_types is {found!r:.80}, and must say {FULL} or {SLIDING} for each '
            f'of the {n} layers: this model cannot be loaded'
        )
    if SLIDING not in found:
        return None
    width = config.count('sliding_window')
    return tuple(width if kind == SLIDING else None for kind in found)


def entries(config: Config) -> list[Entry]:
    """The tensors of the model that a configuration describes."""
    biases = config.flag('attention_bias'), config.flag('attention_bias')
    alike = [None] * config.count('num_hidden_layers')
    return [
        *ends(config.flag('tie_word_embeddings')),
        *of_layers(
            alike, *biases, ff_bias=config.flag('mlp_bias'), norms=('post_attention_layernorm',)
        ),
    ]


def ends(tied: bool, head: str = 'head/kernel', within: Sequence[str] = ()) -> list[Entry]:
    """The entries of the embedding, the last norm and the head.

    Args:
      tied: whether the head is the embedding's table. A file may hold it twice then.
      head: the path of the head's kernel.
      within: other beginnings of the names than ``model``, such as ``language_model.model``.
    """
    also = tuple(f'{w}.embed_tokens.weight' for w in within)
    heads = ('lm_head.weight', *(f'{w.split(".")[0]}.lm_head.weight' for w in within))
    table = 'model.embed_tokens.weight'
    scale = tuple(f'{w}.norm.weight' for w in within)
    made = [
        Entry('embedding/table', table, also=(*also, *heads) if tied else also),
        Entry('norm/scale', 'model.norm.weight', also=scale),
    ]
    return made if tied else [*made, linear(head, heads[0], also=heads[1:])]


def of_layers(
    kinds: Sequence[Any],
    qkv_bias: bool = False,
    out_bias: bool = False,
    *,
    ff_bias: bool = False,
    qk_norm: bool = False,
    norms: Sequence[str] = ('post_attention_layernorm',),
    within: Sequence[str] = (),
) -> Iterator[Entry]:
    """The entries of the layers.

    Args:
      kinds: one value for each layer, equal where layers are alike: how the model scans them.
      qkv_bias, out_bias, ff_bias, qk_norm: as of `models.Llama`.
      norms: their names of the norms after the first: the one before the feed-forward, or the ones
        after the attention, before and after the feed-forward.
      within: as of `ends`.
    """
    block = [*_attention(qkv_bias, out_bias, qk_norm), *_feed_forward(ff_bias)]
    block.append(('attention/norm/scale', 'input_layernorm.weight', False))
    of_norms: tuple[str, ...] = ('feed_forward/norm/scale',)
    if len(norms) > 1:
        of_norms = ('attention/norm_after/scale', *of_norms, 'feed_forward/norm_after/scale')
    block += [(ours, f'{n}.weight', False) for ours, n in zip(of_norms, norms, strict=True)]
    for (path, layers), (ours, theirs, transposed) in itertools.product(places(kinds), block):
        also = tuple(f'{w}.layers.{{}}.{theirs}' for w in within)
        name = f'model.layers.{{}}.{theirs}'
        yield Entry(f'{path}/{ours}', name, transposed, layers, also=also)


def _attention(qkv_bias: bool, out_bias: bool, qk_norm: bool) -> Iterator[tuple[str, str, bool]]:
    """Our path, their name, and whether theirs is transposed."""
    at = 'attention/self_attention'
    parts = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'output': 'o_proj'}
    for ours, theirs in parts.items():
        yield f'{at}/{ours}/kernel', f'self_attn.{theirs}.weight', True
        if out_bias if ours == 'output' else qkv_bias:
            yield f'{at}/{ours}/bias', f'self_attn.{theirs}.bias', False
    if qk_norm:
        yield f'{at}/query_norm/scale', 'self_attn.q_norm.weight', False
        yield f'{at}/key_norm/scale', 'self_attn.k_norm.weight', False


def _feed_forward(use_bias: bool) -> Iterator[tuple[str, str, bool]]:
    at = 'feed_forward'
    yield f'{at}/gated_dense/gate', 'mlp.gate_proj.weight', True
    yield f'{at}/gated_dense/up', 'mlp.up_proj.weight', True
    yield f'{at}/dense/kernel', 'mlp.down_proj.weight', True
    if use_bias:
        yield f'{at}/gated_dense/gate_bias', 'mlp.gate_proj.bias', False
        yield f'{at}/gated_dense/up_bias', 'mlp.up_proj.bias', False
        yield f'{at}/dense/bias', 'mlp.down_proj.bias', False


def parts_of(net: Layer) -> tuple[Any, list[Any], Any, bool]:
    """A decoder's embedding, its blocks, one for each layer, its head, and whether it is tied.

    Args:
      net: as `models.llama.decoder` makes it.

    Raises:
      TypeError: for a model of other layers.
    """
    tied, body = isinstance(net, Tied), net.layer if isinstance(net, Tied) else net
    if not isinstance(body, tl.Serial):
        raise TypeError('not a decoder')
    blocks: list[Any] = []
    for repeat in body.layers[1:-2]:
        if not isinstance(repeat, tl.Repeat):
            raise TypeError('not a decoder')
        inner: Any = repeat.layer
        alternate = '0' in inner.keys
        blocks += list(inner.layers if alternate else (inner,)) * repeat.n
    return body.layers[0], blocks, body.layers[-1], tied


def described(net: Layer) -> dict[str, Any]:
    """The entries of a configuration that all decoders share, read off a model.

    Args:
      net: as `models.llama.decoder` makes it.
    """
    embedding, blocks, _, tied = parts_of(net)
    (norm, attention, *_), (_, gated, *_) = (residual.layers for residual in blocks[0].layers)
    depth = attention.d_head or embedding.d_model // attention.n_heads
    return {
        'vocab_size': embedding.vocab_size,
        'hidden_size': embedding.d_model,
        'intermediate_size': gated.n_units,
        'num_hidden_layers': len(blocks),
        'num_attention_heads': attention.n_heads,
        'num_key_value_heads': attention.n_kv_heads or attention.n_heads,
        'head_dim': depth,
        'rms_norm_eps': norm.epsilon,
        'tie_word_embeddings': tied,
        'hidden_act': next(k for k, v in _ACTIVATIONS.items() if v == gated.activation),
        **written(attention.rotary),
    }


def config(net: Layer) -> dict[str, Any]:
    """The inverse of `net`."""
    _, blocks, _, _ = parts_of(net)
    attention, gated = (residual.layers[1] for residual in blocks[0].layers)
    made = described(net)
    if attention.window is not None:
        window = {'sliding_window': attention.window}
        return {'architectures': ['MistralForCausalLM'], 'model_type': 'mistral', **made, **window}
    biases = {'attention_bias': attention.qkv_bias, 'mlp_bias': gated.use_bias}
    return {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', **made, **biases}


LLAMA = Family('Llama', net, entries, config, ignored=TABLES)
