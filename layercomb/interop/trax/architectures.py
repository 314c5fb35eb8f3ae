"""The models of Trax 1.4.1 that can be read: their hyperparameters, their layers here, and weights.

Each function takes the shapes of all weights and what else is known, and returns a `Plan`. Shapes
are in the order of Trax's layers, so each is a walk along them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from layercomb import layers as tl
from layercomb import models
from layercomb.errors import UsageError, one_line
from layercomb.interop.trax.parameters import ATTENTION, Parameters
from layercomb.interop.trax.tensors import Entry, Shape, Writer
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.wrapper import snake_case
from layercomb.shapes import Signature, shape_dtype
from layercomb.transforms import Tied

# Trax's activations, and the names that they have here.
ACTIVATIONS = {
    'Elu': 'elu',
    'FastGelu': 'gelu',
    'Gelu': 'exact_gelu',
    'LeakyRelu': 'leaky_relu',
    'Relu': 'relu',
    'Sigmoid': 'sigmoid',
    'Softplus': 'softplus',
    'Swish': 'silu',
    'Tanh': 'tanh',
}
N_BLOCKS = 10_000  # at most
IN_BLOCK, IN_DECODER_BLOCK = 16, 26  # weights of a block of an encoder or LM, and of a decoder
TOKENS = shape_dtype((1, 2), 'int32')


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is read.

    Attributes:
      net: the model.
      signature: of inputs that it takes.
      entries: all its weights, in the order of Trax.
      shapes: those of the file, without the leading 1 that old tables of positions have.
    """

    net: Layer
    signature: Signature
    entries: list[Entry]
    shapes: list[Shape]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The attention of a block, as its weights show it.

    Attributes:
      name: of the layer in Trax; None for one of those whose queries are their keys.
      n_heads, d_qk, d_v: H, the depth of queries and keys, and that of values; 0 if they do not
        show.
      has_bias: whether queries, keys and values have a bias.
    """

    name: str | None
    n_heads: int = 0
    d_qk: int = 0
    d_v: int = 0
    has_bias: bool = False


def plan(model: str, shapes: Sequence[Shape], known: Parameters) -> Plan:
    """How a model is read from weights of the given shapes.

    Args:
      model: the name of the model in Trax.
      shapes: of all weights, in the order of Trax.
      known: what else is known.

    Raises:
      UsageError: if something is not known that weights do not tell, or the weights are too few
        or too strange to be those of the model.
    """
    known.check(model)
    if len(shapes) < 8 or len(shapes[0]) != 2 or not all(map(all, shapes)):
        raise UsageError(f'these {len(shapes)} weights are not those of a {model}: check the file')
    try:
        return _PLANS[model](list(shapes), known)
    except (TypeError, ValueError) as e:
        raise UsageError(f'this {model} cannot be made here: {one_line(e)}') from None


def guess(shapes: Sequence[Shape]) -> str | None:
    """The model whose weights these look like, by their ends and their number; None for none."""
    if len(shapes) < 8 or len(shapes[0]) != 2 or len(shapes[-2]) != 2:
        return None
    width = shapes[0][1]
    if shapes[-2][0] == 2 * width:
        return 'ReformerLM'
    if shapes[-2][0] != width or len(_table(shapes[1])) != 2:
        return None
    return 'TransformerLM' if (len(shapes) - 6) % IN_BLOCK == 0 else 'Transformer'


def _transformer_lm(shapes: list[Shape], known: Parameters) -> Plan:
    name, shapes = 'TransformerLM', list(map(_table, shapes))
    v, d, max_len = _ends(name, 'vocab_size', shapes, known)
    d_ff = known.size(name, 'd_ff', _width_inside(shapes, d))
    n = _n_blocks(name, 'n_layers', (len(shapes) - 6) / IN_BLOCK, known)
    heads, activation = _heads(name, known, d), _activation(name, known, 'Relu')
    known.refuse_unknown(name)
    write = Writer(d)
    write.add('embedding', (v, d), 'embedding/table')
    write.add('positions', (max_len, d), 'learned_positions/table')
    for i in range(n):
        _block(write, f'block {i}', 'block', d_ff, i)
    write.norm('after the blocks', 'norm')
    write.dense('logits', (d, v), 'head')
    net = models.TransformerLM(v, d, d_ff, n, heads, max_len, activation=activation)
    return Plan(net, (TOKENS,), write.entries, shapes)


def _transformer(shapes: list[Shape], known: Parameters) -> Plan:
    name, shapes = 'Transformer', list(map(_table, shapes))
    v, d, max_len = _ends(name, 'input_vocab_size', shapes, known)
    d_ff = known.size(name, 'd_ff', _width_inside(shapes, d))
    n_encoder = _n_blocks(name, 'n_encoder_layers', _n_encoder_blocks(shapes, d, d_ff), known)
    rest = len(shapes) - 9 - IN_BLOCK * n_encoder
    n_decoder = _n_blocks(name, 'n_decoder_layers', rest / IN_DECODER_BLOCK, known)
    of_target = shapes[-1][0] if rest % IN_DECODER_BLOCK == 1 else None
    w = known.get(name, 'output_vocab_size', of_target)
    heads, activation = _heads(name, known, d), _activation(name, known, 'Relu')
    known.refuse_unknown(name)
    write = Writer(d)
    write.add('embedding of the source', (v, d), 'encoder/embedding/table')
    write.add('positions of the source', (max_len, d), 'encoder/learned_positions/table')
    for i in range(n_encoder):
        _block(write, f'encoder block {i}', 'encoder/block', d_ff, i)
    write.norm('after the encoder', 'encoder/norm')
    if w is not None:
        write.add('embedding of the target', (w, d), 'decoder/embedding/table')
    write.add('positions of the target', (max_len, d), 'decoder/learned_positions/table')
    for i in range(n_decoder):
        _decoder_block(write, f'decoder block {i}', 'decoder/block', d_ff, i)
    write.norm('after the decoder', 'decoder/norm')
    write.dense('logits', (d, v if w is None else w), 'head')
    net: Layer = models.Transformer(
        v, d, d_ff, n_encoder, n_decoder, heads, max_len,
        target_vocab_size=w, masked=True, activation=activation,
    )  # fmt: skip
    if w is None:
        net = Tied(net, 'encoder/embedding/table', 'decoder/embedding/table')
    return Plan(net, (TOKENS, TOKENS, shape_dtype((1, 2), bool)), write.entries, shapes)


def _reformer_lm(shapes: list[Shape], known: Parameters) -> Plan:
    name = 'ReformerLM'
    shapes[1] = _table(shapes[1])
    v = known.size(name, 'vocab_size', shapes[0][0])
    d = known.size(name, 'd_model', shapes[0][1])
    write = Writer(d)
    write.add('embedding', (v, d), 'embedding/table')
    places = _places(write, shapes, known, d)
    blocks = shapes[len(write.entries) :]
    d_ff = known.size(name, 'd_ff', _width_inside(blocks, d))
    kinds = _kinds(blocks, known, d)
    layers = [_attention(kind, known, d, places['max_len']) for kind in kinds]
    activation = _activation(name, known, 'FastGelu')
    known.refuse_unknown(name)
    pattern = _shortest(layers)
    for i, kind in enumerate(kinds):
        block, of = divmod(i, len(pattern))
        first, second = (f'block/reversible_half_residual{_nth(2 * of + k)}' for k in (0, 1))
        write.norm(f'block {i}: attention', f'{first}/layer_norm', block)
        _heads_of(write, kind, f'block {i}: attention', f'{first}/{_key(layers[i])}', block)
        write.norm(f'block {i}: feed-forward', f'{second}/feed_forward/layer_norm', block)
        write.feed_forward(f'block {i}: feed-forward', d_ff, f'{second}/feed_forward', block)
    write.norm('after the blocks', 'head/layer_norm', width=2 * d)
    write.dense('logits', (2 * d, v), 'head/dense')
    net = models.ReformerLM(
        v, d, d_ff, len(kinds), attention=pattern, activation=activation, ff_chunk_len=None,
        **places,
    )  # fmt: skip
    return Plan(net, (TOKENS,), write.entries, shapes)


_PLANS: dict[str, Callable[[list[Shape], Parameters], Plan]] = {
    'TransformerLM': _transformer_lm,
    'Transformer': _transformer,
    'ReformerLM': _reformer_lm,
}


def _block(write: Writer, where: str, ours: str, d_ff: int, i: int) -> None:
    """Attention of a sequence to itself, and a feed-forward."""
    write.norm(f'{where}: attention', f'{ours}/residual/layer_norm', i)
    write.attention(f'{where}: attention', f'{ours}/residual/self_attention', i)
    write.norm(f'{where}: feed-forward', f'{ours}/residual_1/layer_norm', i)
    write.feed_forward(f'{where}: feed-forward', d_ff, f'{ours}/residual_1/feed_forward', i)


def _decoder_block(write: Writer, where: str, ours: str, d_ff: int, i: int) -> None:
    """Attention to itself, attention to the memory, and a feed-forward."""
    write.norm(f'{where}: attention', f'{ours}/residual/layer_norm', i)
    write.attention(f'{where}: attention', f'{ours}/residual/self_attention', i)
    write.norm(f'{where}: attention to the source', f'{ours}/residual_1/layer_norm', i)
    write.attention(f'{where}: attention to the source', f'{ours}/residual_1/cross_attention', i)
    write.norm(f'{where}: feed-forward', f'{ours}/residual_2/layer_norm', i)
    write.feed_forward(f'{where}: feed-forward', d_ff, f'{ours}/residual_2/feed_forward', i)


def _heads_of(write: Writer, kind: Kind, where: str, ours: str, block: int) -> None:
    """The attention of a block of a `ReformerLM`."""
    if kind.name == 'CausalAttention':
        write.attention(where, ours, block)
        return
    sizes = kind.n_heads, kind.d_qk, kind.d_v
    write.heads(where, sizes, kind.name == 'SelfAttention', kind.has_bias, ours, block)


def _ends(name: str, vocabulary: str, shapes: list[Shape], known: Parameters) -> tuple[int, ...]:
    """V, D and the longest sequence, from the tables of embeddings and positions."""
    v = known.size(name, vocabulary, shapes[0][0])
    d = known.size(name, 'd_model', shapes[0][1])
    return v, d, known.size(name, 'max_len', shapes[1][0])


def _table(shape: Shape) -> Shape:
    """The shape of a table of positions, which old checkpoints have as (1, L, D)."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def _width_inside(shapes: Sequence[Shape], d: int) -> int:
    """The width inside the feed-forwards: that of the first Dense that does not keep D."""
    for one, bias, other in zip(shapes, shapes[1:], shapes[2:], strict=False):
        if len(one) == 2 and one[0] == d != one[1] and bias == one[1:] and other == one[::-1]:
            return one[1]
    return d


def _n_blocks(name: str, parameter: str, counted: float, known: Parameters) -> int:
    """How many blocks there are: the given number, or the nearest to that counted in weights."""
    n = known.size(name, parameter, max(1, round(counted)))
    if n > N_BLOCKS:
        raise UsageError(f'{name}.{parameter} = {n}: at most {N_BLOCKS:,} blocks are read')
    return n


def _n_encoder_blocks(shapes: Sequence[Shape], d: int, d_ff: int) -> int:
    """How many blocks follow each other whole."""
    write = Writer(d)
    _block(write, '', '', d_ff, 0)
    block, n = [entry.shape for entry in write.entries], 0
    while list(shapes[2 + n * IN_BLOCK : 2 + (n + 1) * IN_BLOCK]) == block:
        n += 1
    return n


def _heads(name: str, known: Parameters, d: int) -> int:
    """The number of heads, which matrices of all heads do not tell; 1 if it will be asked for."""
    heads = known.ask(name, 'n_heads')
    if heads is not None and d % known.size(name, 'n_heads', 1):
        raise UsageError(f'{name}.n_heads = {heads} does not divide the width {d}: check it')
    return 1 if heads is None else int(heads)


def _activation(name: str, known: Parameters, default: str) -> str:
    """The activation of the feed-forwards, by its name here."""
    theirs = known.ask(name, 'ff_activation', default)
    if theirs not in list(ACTIVATIONS):
        raise UsageError(
            f'{name}.ff_activation = {theirs!r}: those that can be read are '
            f'{", ".join(ACTIVATIONS)}'
        )
    return ACTIVATIONS[theirs]


def _places(write: Writer, shapes: list[Shape], known: Parameters, d: int) -> dict[str, Any]:
    """The positions of a `ReformerLM`, as arguments of ours; their weights are written."""
    name, first = 'ReformerLM', shapes[1]
    if len(first) == 2:
        max_len = known.size(name, 'max_len', first[0])
        write.add('positions', (max_len, d), 'learned_positions/table')
        return {'positions': 'learned', 'max_len': max_len}
    if len(first) > 3:
        return _axial(write, shapes, known)
    kinds = {'no': 'none', 'sin-cos': 'sinusoidal'}
    kind = known.ask(name, 'pos_type')
    if kind not in [None, *kinds]:
        raise UsageError(
            f"{name}.pos_type = {kind!r}, of which there are no weights: 'no' and 'sin-cos' have "
            'none'
        )
    return {'positions': kinds.get(kind, 'none'), 'max_len': known.size(name, 'max_len', 2048)}


def _axial(write: Writer, shapes: list[Shape], known: Parameters) -> dict[str, Any]:
    """Axial positions: a table (1, …, 1, length of the axis, 1, …, depth) for each axis."""
    n = len(shapes[1]) - 2
    tables = [shape for shape in shapes[1 : 1 + n] if len(shape) == n + 2]
    axes = known.get('ReformerLM', 'pos_axial_shape', [t[1 + a] for a, t in enumerate(tables)])
    depths = known.get('ReformerLM', 'pos_d_axial_embs', [table[-1] for table in tables])
    if not len(axes) == len(depths) == n == 2:
        raise UsageError(
            f'ReformerLM has axial positions of {len(axes)} axes and {len(depths)} depths, and '
            f'weights of {n}: two of each can be read'
        )
    for a, (length, depth) in enumerate(zip(axes, depths, strict=True)):
        shape = (1, *(length if b == a else 1 for b in range(n)), depth)
        write.add(f'positions along axis {a}', shape, f'axial_positions/table_{a}')
    return {
        'positions': 'axial',
        'max_len': axes[0] * axes[1],
        'axial_shape': tuple(axes),
        'axial_depths': tuple(depths),
    }


def _kinds(shapes: list[Shape], known: Parameters, d: int) -> list[Kind]:
    """The attention of each block of a `ReformerLM`."""
    name, found, at = 'ReformerLM', [], 0
    while shapes[at : at + 2] == [(d,), (d,)]:
        kind, n = _kind(shapes[at + 2 :], d)
        if kind is None:
            break
        found.append(kind)
        at += 2 + n + 6  # norm, attention, and the norm and the feed-forward of the other half
    if not found:
        raise UsageError(f'no block of a {name} follows its positions: check the file')
    n = _n_blocks(name, 'n_layers', len(found), known)
    said = known.get(name, 'attention_type')
    if said is None and any(kind.name is None for kind in found):
        said = known.ask(name, 'attention_type')
    names = [None] if said is None else [said] if isinstance(said, str) else list(said)
    for each in names:
        if each not in [None, *ATTENTION]:
            raise UsageError(
                f'{name}.attention_type = {each!r}: those that can be read are '
                f'{", ".join(ATTENTION)}'
            )
    found += [found[0]] * (n - len(found))
    return [
        dataclasses.replace(kind, name=names[i % len(names)] or kind.name)
        for i, kind in enumerate(found[:n])
    ]


def _kind(shapes: list[Shape], d: int) -> tuple[Kind | None, int]:
    """The attention whose weights come next, and how many they are."""
    if shapes[:2] == [(d, d), (d,)]:
        return Kind('CausalAttention'), 8
    matrices = list(itertools.takewhile(lambda shape: len(shape) == 3, shapes))
    biases = list(itertools.takewhile(lambda shape: len(shape) == 2, shapes[len(matrices) :]))
    if len(matrices) < 3:
        return None, 0
    name = None if len(matrices) == 3 else 'SelfAttention'
    (h, _, k), (_, v, _) = matrices[0], matrices[-1]
    return Kind(name, h, k, v, bool(biases)), len(matrices) + len(biases)


def _attention(kind: Kind, known: Parameters, d: int, max_len: int) -> Layer:
    """The layer that attends as a layer of Trax does, without the biases that it has not."""
    if kind.name == 'CausalAttention':
        return tl.SelfAttention(_heads('ReformerLM', known, d))
    query = tl.SplitHeads(kind.n_heads, kind.d_qk, kind.has_bias)
    value = tl.SplitHeads(kind.n_heads, kind.d_v, kind.has_bias)
    parts: dict[str, Any] = {
        'query': query, 'value': value, 'output': tl.MergeHeads(False), 'd_head': kind.d_qk,
    }  # fmt: skip
    if kind.name != 'SelfAttention':
        return _lsh(kind, known, parts, max_len)
    ask = functools.partial(known.ask, kind.name)
    known.expect(kind.name, 'share_qk', False)
    known.expect(kind.name, 'n_chunks_after', 0)
    chunk_len = ask('chunk_len', None)
    if chunk_len is None:
        return tl.SelfAttention(kind.n_heads, key=query, **parts)
    look_back = ask('n_chunks_before', 0)
    return tl.LocalSelfAttention(kind.n_heads, chunk_len, look_back=look_back, key=query, **parts)


def _lsh(kind: Kind, known: Parameters, parts: dict[str, Any], max_len: int) -> Layer:
    name = 'LSHSelfAttention'
    known.expect(name, 'n_chunks_before', 1)
    known.expect(name, 'n_chunks_after', 0)
    n_buckets = known.get(name, 'n_buckets')
    return tl.LSHSelfAttention(
        kind.n_heads,
        n_hashes=known.ask(name, 'n_hashes', 1),
        chunk_len=known.ask(name, 'chunk_len', 128),
        n_buckets=tuple(n_buckets) if isinstance(n_buckets, list) else n_buckets,
        max_len=max_len,
        neighbourhood='chunk',
        **parts,
    )


def _shortest(layers: list[Layer]) -> tuple[Layer, ...]:
    """The shortest pattern that gives the layers when it is repeated."""
    n = len(layers)
    sizes = (k for k in range(1, n + 1) if n % k == 0 and layers == layers[:k] * (n // k))
    return tuple(layers[: next(sizes)])


def _key(layer: Layer) -> str:
    """The name of a layer in the paths of weights."""
    return snake_case(type(layer).__name__)


def _nth(i: int) -> str:
    """What tells the names of equal layers apart."""
    return f'_{i}' if i else ''
