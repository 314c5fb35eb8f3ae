"""Every public layer, through what every layer promises."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import losses, tl, transforms, trees
from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import describe, is_float, shape_dtype, signature_of

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
      draws: whether training needs a key.
      opaque: why `repr` cannot be evaluated, if it cannot.
    """

    make: Callable[[], Layer]
    signature: tuple[jax.ShapeDtypeStruct, ...] = (stream(),)
    axes: tuple[int | None, ...] | None = None
    out: int = 1
    draws: bool = False
    opaque: str = ''

    @property
    def steps(self) -> tuple[int | None, ...]:
        return (1,) * len(self.signature) if self.axes is None else self.axes


def scaled(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * (1 + jnp.tanh(y))


def feed_forward() -> Layer:
    return tl.Serial(tl.Dense(D), tl.Dropout(0.2))


SCORES = (stream(B, L, 7), tokens(), stream(B, L))
IMAGE = (stream(B, 4, 4, 4),)
QKV = (heads(), heads(), heads())
TWO = (stream(), stream())
THREE = (*TWO, stream())
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
    'BinaryAccuracy': Row(tl.BinaryAccuracy, CHANCES),
    'BinaryCrossEntropyLoss': Row(tl.BinaryCrossEntropyLoss, CHANCES),
    'BinaryF1': Row(tl.BinaryF1, CHANCES),
    'BitsPerByte': Row(lambda: tl.BitsPerByte(bytes_per_token=3.5), SCORES),
    'BlockSparseFF': Row(lambda: tl.BlockSparseFF(12, 3), draws=True),
    'Branch': Row(lambda: tl.Branch(tl.Dense(4), tl.Add()), TWO),
    'Branch beside nothing': Row(lambda: tl.Branch(None, [tl.Dense(4), tl.Relu()], [])),
    'Chunk': Row(lambda: tl.Chunk(feed_forward(), 3), draws=True),
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
    'ExactGelu': Row(tl.ExactGelu),
    'F1': Row(lambda: tl.F1(7), SCORES),
    'Flatten': Row(lambda: tl.Flatten(2), IMAGE),
    'Fn': Row(lambda: tl.Fn('Scaled', scaled, position_wise=True), TWO, opaque='holds a function'),
    'FoldHeads': Row(lambda: tl.FoldHeads(2), out=2),
    'Gelu': Row(tl.Gelu),
    'HardSigmoid': Row(tl.HardSigmoid),
    'L2Loss': Row(tl.L2Loss, THREE),
    'LSHAttention': Row(
        lambda: tl.LSHAttention(n_hashes=2, chunk_len=2, n_buckets=2, masked=True),
        (heads(), heads(), mask()),
        (2, 2, 1),
        2,
        draws=True,
    ),
    'LSHSelfAttention': Row(
        lambda: tl.LSHSelfAttention(2, n_hashes=2, chunk_len=2, max_len=L, dropout=0.1), draws=True
    ),
    'LayerNorm': Row(lambda: tl.LayerNorm(epsilon=1e-5)),
    'LeakyRelu': Row(tl.LeakyRelu),
    'LeakyRelu steeper': Row(lambda: tl.LeakyRelu(0.2)),
    'LearnedPositions': Row(lambda: tl.LearnedPositions(L)),
    'LocalAttention': Row(lambda: tl.LocalAttention(2), QKV, (2, 2, 2), 2),
    'LocalConv': Row(lambda: tl.LocalConv(2, (2, 3), n_outputs=2)),
    'LocalSelfAttention': Row(
        lambda: tl.LocalSelfAttention(2, 2, masked=True), (stream(), mask()), (1, 1)
    ),
    'LogSoftmax': Row(tl.LogSoftmax),
    'Map': Row(lambda: tl.Map(tl.Serial(tl.BatchNorm(), tl.Dense(4)), 2), TWO),
    'MaskedSequenceAccuracy': Row(tl.MaskedSequenceAccuracy, SCORES, ()),
    'MaxPool': Row(lambda: tl.MaxPool(padding='same'), IMAGE, ()),
    'Mean': Row(tl.Mean, axes=()),
    'Mean masked': Row(lambda: tl.Mean(masked=True), (stream(), mask()), ()),
    'MergeHeads': Row(tl.MergeHeads, (heads(), stream()), (2, 1)),
    'MultiplicativeDense': Row(lambda: tl.MultiplicativeDense(2, 12)),
    'MultiplicativeHead': Row(lambda: tl.MultiplicativeHead(7)),
    'Multiply': Row(tl.Multiply, TWO),
    'Once': Row(lambda: tl.Once(tl.Conv1D(D)), axes=()),  # it takes no next positions
    'PaddingMask': Row(lambda: tl.PaddingMask(3), (tokens(),)),
    'Parallel': Row(lambda: tl.Parallel(tl.Dense(4), None, [tl.Relu()]), (*TWO, stream())),
    'Perplexity': Row(tl.Perplexity, SCORES),
    'RMSNorm': Row(tl.RMSNorm),
    'Relu': Row(tl.Relu),
    'Relu2': Row(tl.Relu2),
    'Remat': Row(lambda: tl.Remat(feed_forward()), draws=True),
    'Repeat': Row(
        lambda: tl.Repeat(tl.Residual(tl.Conv1D(D, padding='causal'), tl.Dropout(0.2)), 2),
        draws=True,
    ),
    'Repeat shared': Row(lambda: tl.Repeat(tl.Serial(tl.BatchNorm(), tl.Dense(D)), 2, shared=True)),
    'Residual': Row(lambda: tl.Residual(tl.Dense(4), shortcut=tl.Dense(4), name='step')),
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
    'SRU': Row(lambda: tl.SRU(6)),
    'Select': Row(lambda: tl.Select([1, 0, 1], n_in=3), (*TWO, stream())),
    'SelfAttention': Row(lambda: tl.SelfAttention(2, rotary=tl.RotaryPositions())),
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
    'Quantized': Row(lambda: transforms.Quantized(tl.Dense(4))),  # too small to be narrow
    'Tied': Row(
        lambda: transforms.Tied(
            tl.Serial(tl.Embedding(7, D), tl.Dense(7, name='head')),
            'embedding/table',
            'head/kernel',
            jnp.transpose,
        ),
        (tokens(),),
        opaque='holds a function',
    ),
    'Scored': Row(
        lambda: losses.attach(tl.Dense(7), (tl.CrossEntropyLoss(), tl.Accuracy()), chunk_len=3),
        (stream(), tokens(), stream(B, L)),
    ),
}

ABSTRACT = {Layer, tl.Wrapper, tl.Combinator, tl.Activation, tl.Metric, tl.Reversible}


every_row = pytest.mark.parametrize('row', ROWS.values(), ids=list(ROWS))


def rng() -> jax.Array:
    """A fresh key each time: to use one twice is an error."""
    return jax.random.key(7)


def example(signature: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    made = np.random.default_rng(0)

    def one(x: Any) -> jax.Array:
        if x.dtype == bool:
            return jnp.asarray(made.random(x.shape) < 0.7).at[:, 0].set(True)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(made.integers(0, 7, x.shape), x.dtype)
        return jnp.asarray(made.normal(size=x.shape), x.dtype)

    return tuple(map(one, signature))


@dataclasses.dataclass
class Facts:
    """What a row's layer gives, compiled as one program; pairs are of outputs and state."""

    weights: Any
    state: Any
    trained: Any
    evaluated: Any
    narrow: Any
    grads: Any


def everything(row: Row, inputs: Any, rngs: Any) -> Facts:
    """Applies a layer in training, in EVAL, and in bfloat16, and differentiates its weights."""
    layer = row.make()
    weights, state = layer.init(row.signature, rngs[0])

    def total(weights: Any) -> Any:
        outputs, new = layer.apply(weights, state, inputs, rng=rngs[1], mode=Mode.TRAIN)
        floats = [jnp.sum(y.astype(jnp.float32)) for y in outputs if is_float(y)]
        return sum(floats, jnp.float32(0)), (outputs, new)

    (_, trained), grads = jax.value_and_grad(total, has_aux=True)(weights)
    evaluated = layer.apply(weights, state, inputs) if row.draws or state else trained
    narrow = cast(layer).apply(weights, state, narrowed(inputs), rng=rngs[2], mode=Mode.TRAIN)
    return Facts(weights, state, trained, evaluated, narrow, grads)


jax.tree_util.register_dataclass(Facts)


def cast(layer: Layer) -> Layer:
    return layer if isinstance(layer, transforms.Cast) else transforms.cast(layer)


def narrowed(inputs: Any) -> Any:
    return tuple(x.astype(jnp.bfloat16) if is_float(x) else x for x in inputs)


def decoded(layer: Layer, signature: Any, pieces: Any, rng: Any) -> Any:
    """Outputs and state after each piece."""
    weights, state = layer.init(signature, rng, Mode.PREDICT)
    made = []
    for piece in pieces:
        outputs, state = layer.apply(weights, state, piece, mode=Mode.PREDICT)
        made.append((outputs, state))
    return made


@functools.cache
def computed(row: Row) -> tuple[Layer, Any, Facts]:
    """A row's layer, example inputs, and the facts about them."""
    inputs = example(row.signature)
    run = jax.jit(everything, static_argnums=0)
    return row.make(), inputs, run(row, inputs, (rng(), rng(), rng()))


def assert_close(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=tolerance, atol=tolerance
        )


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def leaves_inside(value: Any) -> Iterator[Layer]:
    """Layers that hold no layers, found through fields alone, without `sublayers`."""
    if isinstance(value, tuple):
        for v in value:
            yield from leaves_inside(v)
    elif isinstance(value, Layer):
        below = [
            leaf
            for f in dataclasses.fields(value)
            for leaf in leaves_inside(getattr(value, f.name))
        ]
        yield from below or [value]


def test_every_public_layer_has_a_row():
    public = {
        v for v in map(tl.__dict__.get, tl.__all__) if isinstance(v, type) and issubclass(v, Layer)
    }
    tested = {type(row.make()) for row in ROWS.values()}
    assert public - tested == ABSTRACT


@every_row
def test_the_axes_of_every_weight_are_declared(row):
    """`transforms.axes` itself refuses a declaration with another number of axes."""
    layer, _, facts = computed(row)
    found = transforms.axes(layer, facts.weights)
    assert found.keys() == trees.flatten(facts.weights).keys()
    assert [path for path, axes in found.items() if not axes.is_declared] == []


@every_row
def test_compiled_equals_eager(row):
    layer, inputs, facts = computed(row)
    mode, wanted = (Mode.TRAIN, facts.trained) if row.draws else (Mode.EVAL, facts.evaluated)
    key = rng() if row.draws else None
    eager = layer.apply(facts.weights, facts.state, inputs, rng=key, mode=mode)
    assert_close(eager, wanted, 1e-2 if isinstance(layer, transforms.Cast) else 1e-5)
    assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in wanted[0])


@every_row
def test_trains_as_it_evaluates_unless_it_says_otherwise(row):
    layer, inputs, facts = computed(row)
    if row.draws:
        (train, _), (evaluate, _) = facts.trained, facts.evaluated
        assert any((a != b).any() for a, b in zip(train, evaluate, strict=True))
    elif not facts.state:
        apply = functools.partial(layer.apply, facts.weights, facts.state)
        # Attention is recorded head by head, the same function (tests/layers/test_multihead.py).
        others = (Mode.PREDICT, *[Mode.RECORD] * isinstance(layer, MultiHead))
        programs = [
            jax.make_jaxpr(functools.partial(apply, mode=m))(inputs)
            for m in Mode
            if m not in others
        ]
        assert len({str(p) for p in programs}) == 1


@every_row
def test_outputs_are_as_announced(row):
    layer, _, facts = computed(row)
    assert layer.n_in == len(row.signature)
    assert layer.n_out == len(facts.trained[0])
    for mode, (outputs, state) in ((Mode.TRAIN, facts.trained), (Mode.EVAL, facts.evaluated)):
        assert describe(layer.output_signature(row.signature, mode)) == describe(outputs)
        assert shapes(state) == shapes(facts.state)


@pytest.mark.parametrize('name', [name for name, row in ROWS.items() if stream() in row.signature])
def test_another_width_than_that_of_the_weights_is_refused_in_words(name):
    layer, signature = ROWS[name].make(), ROWS[name].signature
    weights, state = jax.eval_shape(lambda: layer.init(signature, rng()))
    wider = tuple(stream(B, L, 2 * D) if s == stream() else s for s in signature)

    def apply(weights: Any, state: Any, inputs: Any) -> Any:
        return layer.apply(weights, state, inputs, rng=rng(), mode=Mode.TRAIN)

    if not weights:
        assert jax.eval_shape(apply, weights, state, wider)
        return
    with pytest.raises(ValueError, match='16 wide and the weights were made for 8: give the shape'):
        jax.eval_shape(apply, weights, state, wider)


@every_row
def test_init_is_abstract_and_weights_know_no_mode(row):
    layer, _, facts = computed(row)
    for mode in Mode:
        if mode is not Mode.PREDICT or row.steps:
            init = functools.partial(layer.init, row.signature, mode=mode)
            weights, state = jax.eval_shape(init, rng())
            assert shapes(weights) == shapes(facts.weights)
            assert mode is Mode.PREDICT or shapes(state) == shapes(facts.state)


@every_row
def test_says_whether_it_is_position_wise_and_is_if_it_says_so(row):
    layer, inputs, facts = computed(row)
    assert isinstance(layer.position_wise, bool)
    if not layer.position_wise:
        return
    piece = [
        jax.lax.slice_in_dim(x, 1, 3, axis=at) for x, at in zip(inputs, row.steps, strict=True)
    ]
    outputs, _ = jax.jit(layer.apply)(facts.weights, facts.state, tuple(piece))
    for y, whole in zip(outputs, facts.evaluated[0], strict=True):
        wanted = jax.lax.slice_in_dim(whole, 1, 3, axis=row.out)
        tolerance = 1e-2 if whole.dtype == jnp.float16 else 1e-5
        np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=tolerance)


@every_row
def test_decoding_step_by_step_is_evaluation(row):
    if not row.steps:
        pytest.skip('does not decode')
    layer, inputs, facts = computed(row)
    start = jax.eval_shape(lambda: layer.init(row.signature, rng(), Mode.PREDICT)[1])
    ends = (L - 2, L - 1, L) if start else (L - 1, L)
    pieces = [
        tuple(
            x if axis is None else jax.lax.slice_in_dim(x, begin, end, axis=axis)
            for x, axis in zip(inputs, row.steps, strict=True)
        )
        for begin, end in zip((0, *ends), ends, strict=False)
    ]
    run = jax.jit(decoded, static_argnums=(0, 1))
    outputs, states = zip(*run(layer, row.signature, pieces, rng()), strict=True)
    assert all(shapes(state) == shapes(start) for state in states)
    for parts, whole in zip(zip(*outputs, strict=True), facts.evaluated[0], strict=True):
        tolerance = 1e-2 if whole.dtype == jnp.float16 else 1e-5
        got = np.concatenate(parts, row.out)
        np.testing.assert_allclose(got, whole, rtol=tolerance, atol=tolerance)


@every_row
def test_computes_in_bfloat16_with_float32_weights(row):
    layer, inputs, facts = computed(row)
    signature = signature_of(jax.eval_shape(narrowed, inputs))
    weights, state = jax.eval_shape(functools.partial(cast(layer).init, signature), rng())
    assert shapes(weights) == shapes(facts.weights)
    assert shapes(state) == shapes(facts.narrow[1]) == shapes(facts.state)
    assert all(np.isfinite(np.asarray(y, np.float32)).all() for y in facts.narrow[0])


@every_row
def test_float32_stays_where_float64_is_the_default_and_ranks_are_not_promoted(row):
    layer = row.make()

    def total(weights: Any, state: Any, inputs: Any) -> Any:
        made = layer.apply(weights, state, inputs, rng=rng(), mode=Mode.TRAIN)
        floats = [jnp.sum(y, dtype=jnp.float32) for y in made[0] if is_float(y)]
        return sum(floats, jnp.float32(0)), made

    def decode(weights: Any, state: Any, inputs: Any) -> Any:
        return layer.apply(weights, state, inputs, mode=Mode.PREDICT)

    def check(made: Any) -> None:
        assert not {'float64', 'int64'} & {str(s.dtype) for s in jax.tree.leaves(made)}

    with jax.enable_x64(True), jax.numpy_rank_promotion('raise'):
        if row.steps:
            init = functools.partial(layer.init, row.signature, mode=Mode.PREDICT)
            weights, state = jax.eval_shape(init, rng())
            check((weights, state))
            check(jax.eval_shape(decode, weights, state, row.signature))
        weights, state = jax.eval_shape(layer.init, row.signature, rng())
        check((weights, state))
        check(jax.eval_shape(jax.grad(total, has_aux=True), weights, state, row.signature))


@every_row
def test_is_a_value(row):
    one, two = row.make(), row.make()
    assert one == two and hash(one) == hash(two) and one is not two
    named = one.replace(name='another')
    assert named != one and named.replace(name=one.name) == one
    assert named.name == 'another' and type(named) is type(one)
    for copied in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert copied == one and hash(copied) == hash(one)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.name = 'other'
    with pytest.raises(TypeError, match='is a description and holds no weights: bind it first'):
        one(*example(row.signature))


@every_row
def test_repr_reads_like_the_code_that_made_it(row):
    for layer in (row.make(), row.make().replace(name='another')):
        text = repr(layer)
        assert text.startswith(type(layer).__name__ + '(')
        assert layer.name is None or f'name={layer.name!r}' in text
        if not row.opaque:
            names = {**vars(tl), **vars(transforms), **vars(losses)}
            assert eval(text, names) == layer
    if row.opaque:
        pytest.skip(row.opaque)


@every_row
def test_gradients_of_weights_are_finite(row):
    _, _, facts = computed(row)
    assert shapes(facts.grads) == shapes(facts.weights)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(facts.grads))


@every_row
def test_a_rewrite_reaches_every_layer(row):
    layer = row.make()
    assert layer.with_sublayers(layer.sublayers) == layer
    assert transforms.rewrite(layer, lambda x: x) == layer
    n = iter(range(100))

    def mark(layer: Layer) -> Layer:
        return layer if layer.sublayers else layer.replace(name=f'seen{next(n)}')

    marked = transforms.rewrite(layer, mark)
    found = list(leaves_inside(marked))
    assert all(leaf.name and leaf.name.startswith('seen') for leaf in found)
    assert len(found) == len(list(leaves_inside(layer)))
    with pytest.raises(ValueError, match='layer'):
        layer.with_sublayers((*layer.sublayers, tl.Dense(3)))


@every_row
def test_weights_lie_under_unique_paths(row):
    _, _, facts = computed(row)
    paths = list(trees.flatten(facts.weights))
    assert len(paths) == len(jax.tree.leaves(facts.weights))
    assert not any('decisions' in p for p in (*paths, *trees.flatten(facts.state)))
