"""The `ReformerLM` of Trax 1.4.1, whose attention may differ from block to block."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

from layercomb import layers as tl
from layercomb import models
from layercomb.errors import UsageError
from layercomb.interop.trax.flat_weights import Shape, Writer
from layercomb.interop.trax.parameters import ATTENTION, Parameters
from layercomb.interop.trax.plans import (
    TOKENS,
    Plan,
    activation_of,
    heads_of,
    n_blocks,
    table,
    width_inside,
)
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.wrapper import snake_case

EPSILON = 1e-6  # added to the mean square of a key


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


def reformer_lm(shapes: list[Shape], known: Parameters) -> Plan:
    """How a `ReformerLM` is read, from the shapes of its weights and what else is known."""
    name = 'ReformerLM'
    shapes[1] = table(shapes[1])
    v = known.size(name, 'vocab_size', shapes[0][0])
    d = known.size(name, 'd_model', shapes[0][1])
    write = Writer(d)
    write.add('embedding', (v, d), 'embedding/table')
    places = _places(write, shapes, known, d)
    blocks = shapes[len(write.entries) :]
    d_ff = known.size(name, 'd_ff', width_inside(blocks, d))
    kinds = _kinds(blocks, known, d)
    layers = [_attention(kind, known, d, places['max_len']) for kind in kinds]
    activation = activation_of(name, known, 'FastGelu')
    known.refuse_unknown(name)
    pattern = _shortest(layers)
    for i, kind in enumerate(kinds):
        block, of = divmod(i, len(pattern))
        first, second = (f'block/reversible_half_residual{_nth(2 * of + k)}' for k in (0, 1))
        write.norm(f'block {i}: attention', f'{first}/layer_norm', block)
        _write_attention(write, kind, f'block {i}: attention', f'{first}/{_key(layers[i])}', block)
        write.norm(f'block {i}: feed-forward', f'{second}/feed_forward/layer_norm', block)
        write.feed_forward(f'block {i}: feed-forward', d_ff, f'{second}/feed_forward', block)
    write.norm('after the blocks', 'head/layer_norm', width=2 * d)
    write.dense('logits', (2 * d, v), 'head/dense')
    net = models.ReformerLM(
        v, d, d_ff, len(kinds), attention=pattern, activation=activation, ff_chunk_len=None,
        **places,
    )  # fmt: skip
    return Plan(net, (TOKENS,), write.entries, shapes)


def _write_attention(write: Writer, kind: Kind, where: str, ours: str, block: int) -> None:
    """The attention of a block of a `ReformerLM`."""
    if kind.name == 'CausalAttention':
        write.attention(where, ours, block)
        return
    sizes = kind.n_heads, kind.d_qk, kind.d_v
    write.heads(where, sizes, kind.name == 'SelfAttention', kind.has_bias, ours, block)


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
    n = n_blocks(name, 'n_layers', len(found), known)
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
    return [_said(kind, names[i % len(names)], known) for i, kind in enumerate(found[:n])]


def _said(kind: Kind, name: str | None, known: Parameters) -> Kind:
    """The attention of a block, as the parameters say where they say something."""
    name = name or kind.name
    if name == 'CausalAttention':
        return Kind(name)
    h, k, v = kind.n_heads or 1, kind.d_qk or 1, kind.d_v or 1
    return Kind(
        name,
        known.size('ReformerLM', 'n_heads', h),
        known.size('ReformerLM', 'd_attention_key', k),
        known.size('ReformerLM', 'd_attention_value', v),
        name == 'SelfAttention' and bool(known.get(name, 'bias', kind.has_bias)),
    )


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
        return tl.SelfAttention(heads_of('ReformerLM', known, d))
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
        neighbourhood='circle',
        epsilon=kind.d_qk * EPSILON,
        alone='rounded',
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
