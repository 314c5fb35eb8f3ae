"""Layers that cannot decode, because they mix positions and keep none, are refused everywhere."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import export, tl
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import Past
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.supervised import decoding
from layercomb.supervised.decoding.reading.fitness import judged_init

V, D = 11, 8


class Shift(Layer):
    """Each position's input is the one before, and 0 at first."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],), state


class SaidShift(Shift):
    """The same, said."""

    position_wise = False


class KeptShift(Shift):
    """The same, which keeps its inputs while it decodes."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, Past.empty(signature[0], 1) if mode is Mode.PREDICT else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        if mode is not Mode.PREDICT:
            return super().apply(weights, state, inputs, rng=rng, mode=mode)
        x, state = state.extend(inputs[0], 1)
        return (x[:, :-1],), state


class Passing(tl.Wrapper):
    """Its layer, and nobody knows."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


class SaidPassing(Passing):
    """Its layer, said."""

    position_wise = property(lambda self: self.layer.position_wise)


class KeptPassing(Passing):
    """Its layer of what `KeptShift` gives; it keeps what that keeps."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        weights, state = self.layer.init(signature, rng, mode)
        kept = KeptShift().init(signature, rng, mode)[1]
        return weights, {'inside': state, 'kept': kept} if kept or state else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        kept, inside = state.get('kept', {}), state.get('inside', {})
        inputs, kept = KeptShift().apply({}, kept, inputs, mode=mode)
        outputs, inside = self.layer.apply(weights, inside, inputs, rng=rng, mode=mode)
        return outputs, {'inside': inside, 'kept': kept} if state else {}


class Rolling(tl.Serial, init=False):
    """A combinator that does more than routing."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (jnp.pad(y, ((0, 0), (1, 0), (0, 0)))[:, :-1],), state


def doubled(x: jax.Array) -> jax.Array:
    return 2 * x


def model(*layers: Layer) -> lc.Model:
    net = tl.Serial(tl.Embedding(V, D), *layers, tl.Dense(V))
    return lc.Model(net).init(np.zeros((1, 4), np.int32))


def refusals(made: lc.Model) -> set[str]:
    """What every entrance says."""
    said = set()
    for use in (
        lambda: decoding.generate(made, [[1, 2]], 3),
        lambda: next(decoding.stream(made, [[1, 2]], 3)),
        lambda: decoding.beam_search(made, [[1, 2]], 3),
        lambda: export.decode_programs(made, max_len=8),
    ):
        with pytest.raises(UsageError, match=r'^decoding: ') as e:
            use()
        said.add(str(e.value))
    return said


def test_every_entrance_refuses_what_says_nothing_with_the_line_to_add():
    (said,) = refusals(model(Shift()))
    assert said == (
        'decoding: Shift does not say whether it works on each position by itself: write '
        'position_wise = True in the class if it does; if not, it needs a state in PREDICT that '
        'keeps what it sees of the positions before'
    )


def test_every_entrance_refuses_what_mixes_positions_and_keeps_none():
    (said,) = refusals(model(SaidShift()))
    assert said == (
        'decoding: SaidShift mixes positions and keeps none of those before, and it would be given '
        'one at a time: use a causal layer that keeps them in its state in PREDICT, or say '
        'cacheless = True in the class if it needs none'
    )


def judged(*layers: Layer) -> str | None:
    net = tl.Serial(tl.Embedding(V, D), *layers, tl.Dense(V))
    signature = (jax.ShapeDtypeStruct((1, 6), jnp.int32),)
    return judged_init(net, signature, jax.random.key(0))[1]


UNFIT = {
    "Fn('Doubled', doubled)": tl.Fn('Doubled', doubled),
    'Passing': Passing(tl.Dense(D)),
    'Passing of attention': Passing(tl.SelfAttention(2)),
    'Shift deep inside': tl.Residual(tl.Repeat(tl.Remat(tl.Serial(tl.Dense(), Shift())), 2)),
    'Shift behind who says so': SaidPassing(Shift()),
    'Rolling': Rolling(tl.Dense(D)),
    'Rolling of attention': Rolling(tl.SelfAttention(2)),
    'Softmaxed': tl.SelfAttention(2, output=tl.Fn('Softmaxed', lambda y, x: x)),
    'Shift of a query': tl.CrossAttention(2, query=tl.Serial(Shift(), tl.SplitHeads(2))),
    'Conv2D': tl.Serial(
        tl.Fn('In', lambda x: x[:, :, None], position_wise=True),
        tl.Conv2D(D),
        tl.Fn('Out', lambda x: x[:, :, 0], position_wise=True),
    ),
    'DotProductAttention': tl.Serial(
        tl.Branch(*[tl.SplitHeads(2)] * 3, None),
        tl.DotProductAttention(causal=False),
        tl.MergeHeads(),
    ),
}


@pytest.mark.parametrize('name', UNFIT)
def test_what_cannot_decode_is_named(name):
    layer = UNFIT[name]
    layers = (tl.Dup(), layer) if layer.n_in == 2 else (layer,)
    wanted = "Fn('Softmaxed'" if name == 'Softmaxed' else name.split(' ')[0]
    wanted = name if name.startswith('Fn') else wanted
    assert re.match(f'decoding: {re.escape(wanted)}', judged(*layers) or '')


FIT = {
    'said of a function': tl.Fn('Doubled', doubled, position_wise=True),
    'attention': tl.SelfAttention(2),
    'attention, said by a wrapper': SaidPassing(tl.SelfAttention(2)),
    'what keeps its inputs': KeptShift(),
    'a wrapper that keeps its inputs': KeptPassing(tl.Dense(D)),
    'a wrapper that keeps its inputs, of attention': KeptPassing(tl.SelfAttention(2)),
    'deep inside': tl.Residual(tl.Repeat(tl.Remat(tl.Serial(tl.SRU(D), KeptShift())), 2)),
    'a causal convolution': tl.Conv1D(D, 3, padding='causal'),
    'a convolution of one tap': tl.Conv1D(D, 1, padding='causal'),
    'running statistics': tl.BatchNorm(),
    'dropout that is shared': tl.Dropout(0.5, (1,)),
    'positions': tl.SinusoidalPositions(),
    'local attention': tl.LocalSelfAttention(2, 4),
    'LSH attention': tl.LSHSelfAttention(2, n_buckets=2, chunk_len=2),
    'hashed attention': tl.HashedSelfAttention(2, n_buckets=2),
    'attention to blocks': tl.BlockSelfAttention(2),
    'both': tl.MixedSelfAttention(2, n_buckets=2),
    'sparse attention': tl.SparseQKVAttention(2, 2),
    'what runs once': tl.Once(tl.SelfAttention(2, causal=False)),
}


@pytest.mark.parametrize('name', FIT)
def test_what_can_decode_is_let_through(name):
    assert judged(FIT[name]) is None


@pytest.mark.parametrize('layer', [KeptShift(), KeptPassing(tl.SelfAttention(2))])
def test_an_own_layer_with_a_cache_decodes_as_it_evaluates(layer):
    made, row = model(layer), [3, 1, 4, 1]
    got = decoding.generate(made, [row], 5, temperature=0)[0].tolist()
    for _ in range(5):
        row.append(int(made(np.int32([row]))[0, -1].argmax()))
    assert got == row[4:]


def test_an_own_layer_that_says_nothing_is_still_scored():
    made, row = model(Shift()), np.int32([[3, 1, 4, 1]])
    logits = made(row)
    wanted = np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), row[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(decoding.score(made, row).tokens[:, 1:], wanted, rtol=1e-5)


def test_a_subclass_that_says_it_needs_no_cache_is_believed():
    class Sure(SaidShift):
        """Says that it knows."""

        cacheless = True

    assert judged(Sure()) is None


# A source is given whole at every step, and what reads it alone mixes what it likes.


class OfSource(Layer):
    """(memory (B, M, D), x (B, L, D)) → x plus the memory's mean, said by nobody."""

    n_in = 2

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        memory, x = inputs
        return (x + memory.mean(1, keepdims=True),), state


def judged_pair(net: Layer, n_tokens: int = 6) -> str | None:
    signature = tuple(jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (5, n_tokens))
    return judged_init(net, signature, jax.random.key(0))[1]


def test_what_reads_a_source_alone_needs_no_cache():
    first = tl.Parallel(tl.Embedding(V, D), tl.Embedding(V, D))
    widen = tl.Fn('Widen', lambda m, x: x + m[:, None], position_wise=True)
    for of_source in (tl.Mean(), tl.Serial(tl.Once(tl.SelfAttention(2, causal=False)), tl.Mean())):
        for length in (1, 6):
            net = tl.Serial(first, tl.Parallel(of_source, None), widen, tl.Dense(V))
            assert judged_pair(net, length) is None
    both = tl.Serial(first, OfSource(), tl.Dense(V))
    assert (judged_pair(both) or '').startswith('decoding: OfSource does not say')
    of_tokens = tl.Serial(first, tl.Parallel(None, tl.Serial(tl.Mean())), widen, tl.Dense(V))
    assert of_tokens.n_in == 2


def test_attention_to_a_memory_passes_and_its_parts_are_looked_at():
    first = tl.Parallel(tl.Once(tl.Embedding(V, D)), tl.Embedding(V, D))
    for attention, wanted in (
        (tl.CrossAttention(2), None),
        (tl.CrossAttention(2, key=tl.Serial(tl.Conv1D(D), tl.SplitHeads(2))), None),
        (tl.CrossAttention(2, query=tl.Serial(Shift(), tl.SplitHeads(2))), 'Shift'),
    ):
        said = judged_pair(tl.Serial(first, tl.Swap(), attention, tl.Dense(V)))
        assert (said or '').startswith(f'decoding: {wanted} ') if wanted else said is None


class Fresh(Layer):
    """Makes the layer that it holds anew each time it is asked."""

    sublayers = property(lambda self: (tl.Serial(tl.Dense(), Shift()),))
    position_wise = property(of_sublayers)

    def init(self, signature, rng, mode=Mode.TRAIN):
        return self.sublayers[0].init(signature, rng, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.sublayers[0].apply(weights, state, inputs, rng=rng, mode=mode)


def test_a_layer_that_is_made_anew_is_found_too():
    assert 'Shift does not say' in (judged(Fresh()) or '')
