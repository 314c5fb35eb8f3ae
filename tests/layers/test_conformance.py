"""Every public layer, through what every layer promises."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from layercomb import losses, testing, tl, transforms, trees
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import shape_dtype

B, L, D = 2, 4, 8


def stream(*shape: int) -> jax.ShapeDtypeStruct:
    return shape_dtype(shape or (B, L, D))


def tokens() -> jax.ShapeDtypeStruct:
    return shape_dtype((B, L), 'int32')


def mask() -> jax.ShapeDtypeStruct:
    return shape_dtype((B, L), bool)


def heads() -> jax.ShapeDtypeStruct:
    return shape_dtype((B, 2, L, 4))


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer and what it promises.

    Attributes:
      make: builds the layer.
      signature: of its inputs.
      axes: of positions in each input, None for one that is given whole at every step; empty for
        a layer that does not decode.
      out: the axis of positions in the outputs.
      draws: whether training draws from the key.
    """

    make: Callable[[], Layer]
    signature: tuple[jax.ShapeDtypeStruct, ...] = (stream(),)
    axes: tuple[int | None, ...] | None = None
    out: int = 1
    draws: bool = False


def scaled(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * (1 + jnp.tanh(y))


def feed_forward() -> Layer:
    return tl.Serial(tl.Dense(D), tl.Dropout(0.2))


SCORES = (stream(B, L, 7), tokens(), stream(B, L))
IMAGE = (stream(B, 4, 4, 4),)
QKV = (heads(), heads(), heads())
TWO = (stream(), stream())
THREE = (*TWO, stream())
PAIRS = (stream(B, L, 7), shape_dtype((B, L, 2), 'int32'), stream(B, L))
CHANCES = (stream(B, L, 7), shape_dtype((B, L, 7), bool), stream(B, L, 7))

ROWS: dict[str, Row] = {
    'Accuracy': Row(tl.Accuracy, SCORES),
    'Add': Row(tl.Add, TWO),
    'AssertShape': Row(lambda: tl.AssertShape('bld,...d'), TWO),
    'AssertShape of a layer': Row(lambda: tl.AssertShape('b...d->b...e', tl.Dense(4))),
    'AvgPool': Row(tl.AvgPool, IMAGE, ()),
    'AvgPool same': Row(lambda: tl.AvgPool((3, 3), (2, 2), 'same'), IMAGE, ()),
    'AxialPositions': Row(lambda: tl.AxialPositions((2, 2))),
    'BatchNorm': Row(tl.BatchNorm),
    'Bidirectional': Row(lambda: tl.Bidirectional(tl.LSTM(3), tl.SRU(5)), axes=()),
    'Bidirectional masked': Row(
        lambda: tl.Bidirectional(tl.GRU(6), masked=True, join=tl.Add()), (stream(), mask()), ()
    ),
    'BidirectionalRepeat': Row(
        lambda: tl.BidirectionalRepeat(tl.Residual(tl.Conv1D(D, padding='causal')), 2), draws=True
    ),
    'BinaryAccuracy': Row(tl.BinaryAccuracy, CHANCES),
    'BinaryCrossEntropyLoss': Row(tl.BinaryCrossEntropyLoss, CHANCES),
    'BinaryF1': Row(tl.BinaryF1, CHANCES),
    'BitsPerByte': Row(lambda: tl.BitsPerByte(bytes_per_token=3.5), SCORES),
    'BlockSparseFF': Row(lambda: tl.BlockSparseFF(12, 3), draws=True),
    'Branch': Row(lambda: tl.Branch(tl.Dense(4), tl.Add()), TWO),
    'Branch beside nothing': Row(lambda: tl.Branch(None, [tl.Dense(4), tl.Relu()], [])),
    'Chunk': Row(lambda: tl.Chunk(feed_forward(), 3), draws=True),
    'ClassNames': Row(lambda: tl.ClassNames(tuple('abcdefg')), (stream(B, L, 7),)),
    'Concatenate': Row(tl.Concatenate, TWO),
    'ConfusionMatrix': Row(lambda: tl.ConfusionMatrix(7), SCORES),
    'Conv1D': Row(lambda: tl.Conv1D(4), axes=()),
    'Conv1D causal': Row(lambda: tl.Conv1D(4, padding='causal', dilation=2, groups=2)),
    'Conv2D': Row(lambda: tl.Conv2D(6, strides=(2, 1), groups=2), IMAGE, ()),
    'CrossAttention': Row(
        lambda: tl.CrossAttention(2, d_head=3, masked=True),
        (stream(), stream(B, L, 6), mask()),
        (1, None, None),
    ),
    'CrossAttention of shared heads': Row(
        lambda: tl.CrossAttention(4, n_kv_heads=2, softcap=2.0, qkv_bias=False, out_bias=False),
        (stream(), stream()),
        (1, None),
    ),
    'CrossEntropyLoss': Row(lambda: tl.CrossEntropyLoss(label_smoothing=0.1), SCORES),
    'Dense': Row(lambda: tl.Dense(4)),
    'Dense as wide': Row(lambda: tl.Dense(use_bias=False, kernel_init=tl.Normal(0.1))),
    'DotProductAttention': Row(
        lambda: tl.DotProductAttention(dropout=0.1, masked=True),
        (*QKV, mask()),
        (2, 2, 2, 1),
        2,
        draws=True,
    ),
    'Drop': Row(tl.Drop),
    'Dropout': Row(lambda: tl.Dropout(0.5, (1,)), draws=True),
    'Dup': Row(lambda: tl.Dup(2), TWO),
    'Elu': Row(tl.Elu),
    'Embedding': Row(lambda: tl.Embedding(7, D), (tokens(),)),
    'Embedding scaled': Row(lambda: tl.Embedding(7, D, scale=2.5), (tokens(),)),
    'ExactGelu': Row(tl.ExactGelu),
    'F1': Row(lambda: tl.F1(7), SCORES),
    'Flatten': Row(lambda: tl.Flatten(2), IMAGE),
    'Fn': Row(lambda: tl.Fn('Scaled', scaled, position_wise=True), TWO),
    'FoldHeads': Row(lambda: tl.FoldHeads(2), out=2),
    'GatedDense': Row(lambda: tl.GatedDense(6)),
    'GatedDense biased': Row(lambda: tl.GatedDense(6, 'gelu', use_bias=True)),
    'GRU': Row(lambda: tl.GRU(6)),
    'Gelu': Row(tl.Gelu),
    'HardSigmoid': Row(tl.HardSigmoid),
    'L2Loss': Row(tl.L2Loss, THREE),
    'BlockAttention': Row(
        lambda: tl.BlockAttention(n_chosen=1, block_len=1, local_len=0, masked=True),
        (*QKV, mask()),
        (2, 2, 2, 1),
        2,
    ),
    'BlockSelfAttention': Row(
        lambda: tl.BlockSelfAttention(
            4, n_kv_heads=2, n_chosen=1, block_len=2, local_len=1, n_sinks=1, dropout=0.1
        ),
        draws=True,
    ),
    'HashedAttention': Row(
        lambda: tl.HashedAttention(n_hashes=2, chunk_len=2, n_buckets=2, masked=True),
        (*QKV, mask()),
        (2, 2, 2, 1),
        2,
        draws=True,
    ),
    'HashedSelfAttention': Row(
        lambda: tl.HashedSelfAttention(
            2, n_hashes=2, chunk_len=2, max_len=L, local_len=2, n_sinks=1, dropout=0.1
        ),
        draws=True,
    ),
    'HashedSelfAttention of shared heads': Row(
        lambda: tl.HashedSelfAttention(
            4, n_kv_heads=2, n_hashes=2, chunk_len=2, n_buckets=2, local_len=0, duplicates='count'
        ),
        draws=True,
    ),
    'MixedAttention': Row(
        lambda: tl.MixedAttention(
            n_hashes=1, n_chosen=1, chunk_len=1, n_buckets=2, local_len=0, masked=True
        ),
        (*QKV, mask()),
        (2, 2, 2, 1),
        2,
        draws=True,
    ),
    'MixedSelfAttention': Row(
        lambda: tl.MixedSelfAttention(
            4,
            n_kv_heads=2,
            n_hashes=1,
            n_chosen=1,
            chunk_len=2,
            max_len=L,
            local_len=1,
            dropout=0.1,
        ),
        draws=True,
    ),
    'KeyConv': Row(lambda: tl.KeyConv(3), (heads(),), (2,), 2),
    'LSHAttention': Row(
        lambda: tl.LSHAttention(n_hashes=2, chunk_len=2, n_buckets=2, masked=True),
        (heads(), heads(), mask()),
        (2, 2, 1),
        2,
        draws=True,
    ),
    'LSHAttention in a circle': Row(
        lambda: tl.LSHAttention(
            n_hashes=2, chunk_len=2, n_buckets=(2, 2), neighbourhood='circle', rotations='torch'
        ),
        (heads(), heads()),
        (),
        2,
        draws=True,
    ),
    'LSHSelfAttention of transformers': Row(
        lambda: tl.LSHSelfAttention(
            2,
            n_hashes=2,
            chunk_len=L,
            n_buckets=2,
            qkv_bias=False,
            out_bias=False,
            neighbourhood='circle',
            epsilon=1e-5,
            alone='rounded',
            round_len=2 * L,
            rotations='torch',
        ),
        draws=True,
    ),
    'LSHSelfAttention': Row(
        lambda: tl.LSHSelfAttention(2, n_hashes=2, chunk_len=2, max_len=L, dropout=0.1), draws=True
    ),
    'LSHSelfAttention of shared heads': Row(
        lambda: tl.LSHSelfAttention(
            4, n_kv_heads=2, n_hashes=2, chunk_len=2, max_len=L, query_norm=tl.RMSNorm()
        ),
        draws=True,
    ),
    'LSTM': Row(lambda: tl.LSTM(6)),
    'LayerNorm': Row(lambda: tl.LayerNorm(epsilon=1e-5)),
    'LeakyRelu': Row(tl.LeakyRelu),
    'LeakyRelu steeper': Row(lambda: tl.LeakyRelu(0.2)),
    'FourierMixing': Row(tl.FourierMixing, axes=()),
    'LearnedPositions': Row(lambda: tl.LearnedPositions(L)),
    'LearnedPositions later rows': Row(lambda: tl.LearnedPositions(L, first=2)),
    'LocalAttention': Row(lambda: tl.LocalAttention(2), QKV, (2, 2, 2), 2),
    'LocalConv': Row(lambda: tl.LocalConv(2, (2, 3), n_outputs=2)),
    'LocalSelfAttention': Row(
        lambda: tl.LocalSelfAttention(2, 2, masked=True), (stream(), mask()), (1, 1)
    ),
    'LocalSelfAttention of shared heads': Row(
        lambda: tl.LocalSelfAttention(4, 2, n_kv_heads=2, softcap=2.0, dropout=0.1), draws=True
    ),
    'LogSoftmax': Row(tl.LogSoftmax),
    'Map': Row(lambda: tl.Map(tl.Serial(tl.BatchNorm(), tl.Dense(4)), 2), TWO),
    'MaskedSequenceAccuracy': Row(tl.MaskedSequenceAccuracy, SCORES, ()),
    'MaxPool': Row(lambda: tl.MaxPool(padding='same'), IMAGE, ()),
    'Mean': Row(tl.Mean, axes=()),
    'Mean masked': Row(lambda: tl.Mean(masked=True), (stream(), mask()), ()),
    'MergeHeads': Row(tl.MergeHeads, (heads(), stream()), (2, 1)),
    'MixtureFF': Row(lambda: tl.MixtureFF(32, 8, 2)),
    'MixtureFF of softmax': Row(
        lambda: tl.MixtureFF(
            24, 6, 2, 2, gated=False, routing='softmax', normalize=True, balance=0.1, use_bias=True
        )
    ),
    'MultiplicativeDense': Row(lambda: tl.MultiplicativeDense(2, 12)),
    'MultiplicativeHead': Row(lambda: tl.MultiplicativeHead(7)),
    'Multiply': Row(tl.Multiply, TWO),
    'Once': Row(lambda: tl.Once(tl.Conv1D(D)), axes=()),  # it takes no next positions
    'PaddingMask': Row(lambda: tl.PaddingMask(3), (tokens(),)),
    'Parallel': Row(lambda: tl.Parallel(tl.Dense(4), None, [tl.Relu()]), (*TWO, stream())),
    'Perplexity': Row(tl.Perplexity, SCORES),
    'PreferenceAccuracy': Row(tl.PreferenceAccuracy, PAIRS),
    'PreferenceLoss': Row(lambda: tl.PreferenceLoss(label_smoothing=0.1), PAIRS),
    'RMSNorm': Row(tl.RMSNorm),
    'RMSNorm offset': Row(lambda: tl.RMSNorm(offset=1.0)),
    'RelativeBias': Row(lambda: tl.RelativeBias(2, 8, 4), (tokens(),), ()),  # a bias is no sequence
    'Relu': Row(tl.Relu),
    'Relu2': Row(tl.Relu2),
    'Remat': Row(lambda: tl.Remat(feed_forward()), draws=True),
    'Repeat': Row(
        lambda: tl.Repeat(tl.Residual(tl.Conv1D(D, padding='causal'), tl.Dropout(0.2)), 2),
        draws=True,
    ),
    'Repeat shared': Row(lambda: tl.Repeat(tl.Serial(tl.BatchNorm(), tl.Dense(D)), 2, shared=True)),
    'Residual': Row(lambda: tl.Residual(tl.Dense(4), shortcut=tl.Dense(4), name='step')),
    'Reverse': Row(tl.Reverse, (tokens(),), ()),
    'Reverse masked': Row(lambda: tl.Reverse(masked=True), (stream(), mask()), ()),
    'ReversibleConcatenatePair': Row(tl.ReversibleConcatenatePair, TWO),
    'ReversibleHalfResidual': Row(
        lambda: tl.ReversibleHalfResidual(feed_forward()), TWO, draws=True
    ),
    'ReversibleRepeat': Row(
        lambda: tl.ReversibleRepeat(tl.ReversibleHalfResidual(feed_forward()), 2), TWO, draws=True
    ),
    'ReversibleSelect': Row(lambda: tl.ReversibleSelect((1, 0)), TWO),
    'ReversibleSerial': Row(
        lambda: tl.ReversibleSerial(
            tl.ReversibleHalfResidual(tl.LSHSelfAttention(2, chunk_len=2, n_buckets=2)),
            tl.ReversibleSwap(),
        ),
        TWO,
        draws=True,
    ),
    'ReversibleSwap': Row(tl.ReversibleSwap, TWO),
    'RotaryPositions': Row(tl.RotaryPositions, (heads(), heads()), (2, 2), 2),
    'RotaryPositions by length': Row(
        lambda: tl.RotaryPositions(
            max_len=L, scaling=tl.DynamicScaling(2.0, 2), share=0.5, layout='pairs'
        ),
        (heads(), heads()),
        (2, 2),
        2,
    ),
    'RotaryPositions scaled': Row(
        lambda: tl.RotaryPositions(scaling=tl.YarnScaling(4.0, 2)), (heads(), heads()), (2, 2), 2
    ),
    'SRU': Row(lambda: tl.SRU(6)),
    'Select': Row(lambda: tl.Select([1, 0, 1], n_in=3), (*TWO, stream())),
    'SelfAttention': Row(lambda: tl.SelfAttention(2, rotary=tl.RotaryPositions())),
    'UnitNorm': Row(lambda: tl.UnitNorm(scaled=True), (heads(),), (2,), 2),
    'SelfAttention window': Row(
        lambda: tl.SelfAttention(2, window=2, masked=True), (stream(), mask()), (1, 1)
    ),
    'SelfAttention relative': Row(
        lambda: tl.SelfAttention(2, relative=True, masked=True, window=3, dropout=0.1),
        (stream(), shape_dtype((5, 2)), mask()),
        (1, None, 1),
        draws=True,
    ),
    'SelfAttention of shared heads': Row(
        lambda: tl.SelfAttention(
            4,
            n_kv_heads=2,
            dropout=0.1,
            rotary=tl.RotaryPositions(),
            query_norm=tl.RMSNorm(),
            key_norm=tl.RMSNorm(),
        ),
        draws=True,
    ),
    'RewardMargin': Row(tl.RewardMargin, PAIRS),
    'SequenceAccuracy': Row(tl.SequenceAccuracy, SCORES, ()),
    'Serial': Row(
        lambda: tl.Serial(tl.Dup(), tl.Dense(), tl.Multiply(), tl.Dropout(0.1)), draws=True
    ),
    'Serial of nothing': Row(tl.Serial),
    'Sigmoid': Row(tl.Sigmoid),
    'Silu': Row(tl.Silu),
    'SinusoidalPositions': Row(tl.SinusoidalPositions),
    'SinusoidalPositions trainable': Row(lambda: tl.SinusoidalPositions(max_len=L, trainable=True)),
    'SmoothL1Loss': Row(tl.SmoothL1Loss, THREE),
    'SoftCap': Row(lambda: tl.SoftCap(3.0)),
    'Softmax': Row(tl.Softmax),
    'Softplus': Row(tl.Softplus),
    'SparseFF': Row(lambda: tl.SparseFF(12, 4), draws=True),
    'SparseQKVAttention': Row(lambda: tl.SparseQKVAttention(2, 2)),
    'Split': Row(lambda: tl.Split(4)),
    'SplitHeads': Row(lambda: tl.SplitHeads(2, 3), out=2),
    'Swap': Row(tl.Swap, TWO),
    'SwitchFF': Row(lambda: tl.SwitchFF(12, 3)),
    'SwitchFF jitter': Row(lambda: tl.SwitchFF(12, 3, jitter=0.2, use_bias=False), draws=True),
    'Tanh': Row(tl.Tanh),
    'UnfoldHeads': Row(tl.UnfoldHeads, (heads(),), (2,)),
    'Cast': Row(lambda: transforms.Cast(tl.Dense(4), 'float16')),
    'LowRank': Row(lambda: transforms.LowRank(tl.Dense(4), 2)),
    'LowRank of heads': Row(lambda: transforms.LowRank(tl.SplitHeads(2, 3), 2, dora=True), out=2),
    'Quantized': Row(lambda: transforms.Quantized(tl.Dense(4))),  # too small to be narrow
    'Segmented': Row(
        lambda: transforms.segmented(tl.SelfAttention(2, rotary=tl.RotaryPositions())),
        (stream(), tokens()),
        (),
    ),
    'Tied': Row(
        lambda: transforms.Tied(
            tl.Serial(tl.Embedding(7, D), tl.Dense(7, name='head')),
            'embedding/table',
            'head/kernel',
            jnp.transpose,
        ),
        (tokens(),),
    ),
    'Scored': Row(
        lambda: losses.attach(tl.Dense(7), (tl.CrossEntropyLoss(), tl.Accuracy()), chunk_len=3),
        (stream(), tokens(), stream(B, L)),
    ),
}

ABSTRACT = {Layer, tl.Wrapper, tl.Combinator, tl.Activation, tl.Metric, tl.Reversible}


def test_every_public_layer_has_a_row():
    public = {
        v for v in map(tl.__dict__.get, tl.__all__) if isinstance(v, type) and issubclass(v, Layer)
    }
    tested = {type(row.make()) for row in ROWS.values()}
    assert public - tested == ABSTRACT


@pytest.mark.parametrize('row', ROWS.values(), ids=list(ROWS))
def test_says_what_it_is(row):
    """Of the library's own layers nothing is left unsaid."""
    layer = row.make()
    assert isinstance(layer.position_wise, bool)
    weights, _ = jax.eval_shape(functools.partial(layer.init, row.signature), jax.random.key(0))
    found = transforms.axes(layer, weights)
    assert found.keys() == trees.flatten(weights).keys()
    assert [path for path, axes in found.items() if not axes.is_declared] == []


@pytest.mark.parametrize('row', ROWS.values(), ids=list(ROWS))
def test_keeps_what_layers_promise(row):
    """All checks in one test, since what they compute is compiled once for all of them."""
    layer = row.make()
    assert layer == row.make()
    broken = []
    with jax.numpy_rank_promotion('raise'):
        for _, check in testing.layer_checks(
            layer,
            row.signature,
            positions=row.axes,
            positions_out=row.out,
            vocab_size=7,
            draws=row.draws,
        ):
            try:
                check()
            except testing.LayerCheckError as error:
                broken.append(str(error))
    assert not broken, '\n\n'.join(broken)


@pytest.mark.parametrize('name', [name for name, row in ROWS.items() if stream() in row.signature])
def test_another_width_than_that_of_the_weights_is_refused_in_words(name):
    layer, signature = ROWS[name].make(), ROWS[name].signature
    weights, state = jax.eval_shape(lambda: layer.init(signature, jax.random.key(0)))
    wider = tuple(stream(B, L, 2 * D) if s == stream() else s for s in signature)

    def apply(weights: Any, state: Any, inputs: Any) -> Any:
        rng = jax.random.key(0)
        return layer.apply(weights, state, inputs, rng=rng, mode=Mode.TRAIN)

    if not weights:
        assert jax.eval_shape(apply, weights, state, wider)
        return
    with pytest.raises(ValueError, match='16 wide and the weights were made for 8: give the shape'):
        jax.eval_shape(apply, weights, state, wider)
