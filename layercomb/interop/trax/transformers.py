"""The `TransformerLM` and the `Transformer`, from encoder to decoder, of Trax 1.4.1."""

from __future__ import annotations

from collections.abc import Sequence

from layercomb import models
from layercomb.interop.trax.flat_weights import Shape, Writer
from layercomb.interop.trax.parameters import Parameters
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
from layercomb.shapes import shape_dtype
from layercomb.transforms import Tied

IN_BLOCK, IN_DECODER_BLOCK = 16, 26  # weights of a block of an encoder or LM, and of a decoder


def transformer_lm(shapes: list[Shape], known: Parameters) -> Plan:
    """How a `TransformerLM` is read, from the shapes of its weights and what else is known."""
    name, shapes = 'TransformerLM', list(map(table, shapes))
    v, d, max_len = _ends(name, 'vocab_size', shapes, known)
    d_ff = known.size(name, 'd_ff', width_inside(shapes, d))
    n = n_blocks(name, 'n_layers', (len(shapes) - 6) / IN_BLOCK, known)
    heads, activation = heads_of(name, known, d), activation_of(name, known, 'Relu')
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


def transformer(shapes: list[Shape], known: Parameters) -> Plan:
    """How a `Transformer` is read, from the shapes of its weights and what else is known."""
    name, shapes = 'Transformer', list(map(table, shapes))
    v, d, max_len = _ends(name, 'input_vocab_size', shapes, known)
    d_ff = known.size(name, 'd_ff', width_inside(shapes, d))
    n_encoder = n_blocks(name, 'n_encoder_layers', _n_encoder_blocks(shapes, d, d_ff), known)
    rest = len(shapes) - 9 - IN_BLOCK * n_encoder
    n_decoder = n_blocks(name, 'n_decoder_layers', rest / IN_DECODER_BLOCK, known)
    of_target = shapes[-1][0] if rest % IN_DECODER_BLOCK == 1 else None
    w = known.get(name, 'output_vocab_size', of_target)
    heads, activation = heads_of(name, known, d), activation_of(name, known, 'Relu')
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


def _ends(name: str, vocabulary: str, shapes: list[Shape], known: Parameters) -> tuple[int, ...]:
    """V, D and the longest sequence, from the tables of embeddings and positions."""
    v = known.size(name, vocabulary, shapes[0][0])
    d = known.size(name, 'd_model', shapes[0][1])
    return v, d, known.size(name, 'max_len', shapes[1][0])


def _n_encoder_blocks(shapes: Sequence[Shape], d: int, d_ff: int) -> int:
    """How many blocks follow each other whole."""
    write = Writer(d)
    _block(write, '', '', d_ff, 0)
    block, n = [entry.shape for entry in write.entries], 0
    while list(shapes[2 + n * IN_BLOCK : 2 + (n + 1) * IN_BLOCK]) == block:
        n += 1
    return n
