"""Layers that loop: `Repeat`, `Chunk`, `Remat`, `Map`, and the decisions that pass through them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, tl
from layercomb.layers.combinators import chunk
from layercomb.layers.combinators.chunk import automatic_len
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import Decisions, put_decisions, take_decisions
from layercomb.losses import total as aux_loss
from layercomb.shapes import shape_dtype

B, L, D = 2, 6, 4


class Decide(Layer):
    """Keeps one feature of each position: the largest, once noise is added."""

    position_wise = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs

        def choose():
            noise = jax.random.gumbel(rng, x.shape) if mode.is_training else 0.0
            return jnp.argmax(x + noise, -1).astype(jnp.int8)

        chosen, state = tl.decide(mode, state, 'feature', choose)
        kept = jnp.arange(x.shape[-1], dtype=jnp.int8) == chosen[..., None]
        return (jnp.where(kept, x + 1, 0.5 * x),), state


class Count(Layer):
    """Counts its calls and the positions it has seen, in its state."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'calls': jnp.int32(0), 'positions': jnp.int32(0)}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        length = inputs[0].shape[1]
        calls, positions = state['calls'] + 1, state['positions'] + length
        return inputs, {'calls': calls, 'positions': positions}


class Balance(Layer):
    """Leaves the mean square of its input as an auxiliary loss."""

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'aux_loss': tl.AuxLoss({'square': jnp.zeros(())})}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs, {'aux_loss': tl.AuxLoss({'square': jnp.mean(jnp.square(inputs[0]))})}


def values(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def signature(*shape: int):
    return (shape_dtype(shape or (B, L, D)),)


def init(layer: Layer, *shape: int, mode: Mode = Mode.TRAIN):
    return jax.jit(functools.partial(layer.init, signature(*shape), mode=mode))(jax.random.key(0))


def apply(layer, weights, state, *inputs, mode=Mode.EVAL, seed=None):
    def run(weights, state, inputs, rng):
        return layer.apply(weights, state, inputs, rng=rng, mode=mode)

    rng = None if seed is None else jax.random.key(seed)
    return jax.jit(run)(weights, state, inputs, rng)


def assert_equal(got, wanted, tolerance=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def temporaries(layer: Layer, *shape: int) -> int:
    """Bytes that a training step holds besides its arguments and results."""
    weights, state = jax.eval_shape(lambda: init(layer, *shape))

    def loss(weights, state, x):
        rng = jax.random.key(0)
        return layer.apply(weights, state, (x,), rng=rng, mode=Mode.TRAIN)[0][0].sum()

    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    lowered = step.lower(weights, state, *signature(*shape))
    return lowered.compile().memory_analysis().temp_size_in_bytes


# Repeat.


def block() -> Layer:
    return tl.Serial(tl.BatchNorm(momentum=0.5), tl.Dense(D), tl.Dropout(0.5))


@pytest.mark.parametrize('mode', [Mode.TRAIN, Mode.EVAL])
@pytest.mark.parametrize('shared', [False, True])
def test_repeat_is_the_block_many_times(mode, shared):
    net, x = tl.Repeat(block(), 3, shared=shared), values(B, L, D)
    weights, state = init(net)
    assert weights['dense']['kernel'].shape == ((D, D) if shared else (3, D, D))
    assert state['batch_norm']['mean'].shape == (3, D)
    got, new_state = apply(net, weights, state, x, mode=mode, seed=1)

    rng, y, states = jax.random.key(1), x, []
    for i in range(3):
        own = weights if shared else jax.tree.map(lambda w, i=i: w[i], weights)
        own_state = jax.tree.map(lambda s, i=i: s[i], state)
        key = jax.random.fold_in(rng, i)
        (y,), own_state = block().apply(own, own_state, (y,), rng=key, mode=mode)
        states.append(own_state)
    assert_equal(got, (y,), 1e-5)
    assert_equal(new_state, jax.tree.map(lambda *s: jnp.stack(s), *states), 1e-5)


def test_repeat_draws_different_weights_for_each_block():
    weights, _ = init(tl.Repeat(tl.Dense(D), 2))
    assert not (weights['kernel'][0] == weights['kernel'][1]).any()


def test_repeat_decodes_with_a_state_for_each_block():
    net = tl.Repeat(tl.Residual(tl.SelfAttention(2)), 2)
    state = init_state(net, signature())
    assert list(state) == ['0', '1']
    assert state['0']['self_attention']['core'].k.shape == (B * 2, L, 2)
    shared = init_state(tl.Repeat(tl.SelfAttention(2), 2, shared=True), signature())
    assert list(shared) == ['0', '1']


def test_a_program_does_not_grow_with_depth():
    def size(n):
        net = tl.Repeat(block(), n)
        weights, state = jax.eval_shape(lambda: init(net))
        run = jax.jit(lambda w, s, x: net.apply(w, s, (x,)))
        return len(run.lower(weights, state, *signature()).as_text())

    assert size(48) < 1.1 * size(6)


def test_repeat_refuses_blocks_that_change_the_stack():
    with pytest.raises(TypeError, match=r'must put back as many .* takes 1 and puts back 2'):
        tl.Repeat(tl.Dup(), 2)
    with pytest.raises(
        TypeError, match=r'must keep shapes .* turns \(float32\[2,6,4\]\) into \(float32\[2,6,3\]\)'
    ):
        tl.Repeat(tl.Dense(3), 2).output_signature(signature())
    with pytest.raises(ValueError, match='Repeat: n must be at least 1, got 0'):
        tl.Repeat(tl.Relu(), 0)


# Remat.


def wide() -> Layer:
    return tl.Serial(tl.Dense(64), tl.Tanh(), tl.Dense(D), tl.Dropout(0.1))


def test_remat_has_the_same_gradients():
    plain, again = tl.Repeat(wide(), 2), tl.Repeat(tl.Remat(wide()), 2)
    weights, state = init(plain)
    x = values(B, L, D)

    @functools.partial(jax.jit, static_argnums=0)
    def grads(net, weights):
        def loss(weights):
            rng = jax.random.key(3)
            return net.apply(weights, state, (x,), rng=rng, mode=Mode.TRAIN)[0][0].sum()

        return jax.grad(loss)(weights)

    assert_equal(grads(again, weights), grads(plain, weights), 1e-5)


def test_remat_takes_less_memory_under_repeat(optimized):
    plain, again = (temporaries(tl.Repeat(b, 6), 2, 64, D) for b in (wide(), tl.Remat(wide())))
    assert again < 0.6 * plain


# Map.


def test_map_shares_weights_and_threads_state():
    net = tl.Map(tl.Serial(tl.BatchNorm(momentum=0.5), tl.Dense(3)), 2)
    weights, state = init(tl.Serial(tl.BatchNorm(momentum=0.5), tl.Dense(3)))
    both = signature() * 2
    assert jax.tree.map(jnp.shape, net.init(both, jax.random.key(0))[0]) == jax.tree.map(
        jnp.shape, weights
    )
    a, b = values(B, L, D), values(B, L, D, seed=1)
    got, new_state = apply(net, weights, state, a, b, mode=Mode.TRAIN)
    (y,), after = net.layer.apply(weights, state, (a,), mode=Mode.TRAIN)
    (z,), after = net.layer.apply(weights, after, (b,), mode=Mode.TRAIN)
    assert_equal(got, (y, z), 1e-5)
    assert_equal(new_state, after, 1e-5)


def test_map_wants_values_of_one_shape():
    with pytest.raises(
        TypeError, match=r'of one shape, got \(float32\[2,6,4\]\) and \(float32\[2,6,3'
    ):
        tl.Map(tl.Dense(3), 2).output_signature((shape_dtype((2, 6, 4)), shape_dtype((2, 6, 3))))


# Chunk.


def test_chunk_equals_the_whole_at_every_length():
    inner = tl.Residual(tl.LayerNorm(), tl.Dense(8), tl.Gelu(), tl.Dense(D))
    whole, chunked = inner, tl.Chunk(inner, 4)
    weights, _ = init(whole)
    inputs = [values(B, length, D) for length in (1, 3, 4, 8, 10)]

    @functools.partial(jax.jit, static_argnums=0)
    def run(net):
        def loss(weights, x):
            (y,) = net.apply(weights, {}, (x,))[0]
            return jnp.sum(jnp.sin(y)), y

        return [jax.grad(loss, (0, 1), has_aux=True)(weights, x) for x in inputs]

    assert_equal(run(chunked), run(whole), 1e-5)


def test_chunk_runs_in_constant_memory_both_ways(optimized):
    inner = tl.Serial(tl.Dense(512), tl.Relu(), tl.Dense(D))
    short, long = 128, 512
    growth = 4 * B * (long - short) * D  # bytes of the further inputs
    unchunked = [temporaries(inner, B, n, D) for n in (short, long)]
    chunked = [temporaries(tl.Chunk(inner, 32), B, n, D) for n in (short, long)]
    assert unchunked[1] - unchunked[0] > 50 * growth
    assert chunked[1] - chunked[0] <= 4 * growth
    assert chunked[0] < unchunked[0] / 2


def test_chunk_threads_state_through_pieces_and_the_tail():
    net = tl.Chunk(Count(), 4)
    for length, calls in ((3, 1), (4, 1), (8, 2), (10, 3)):
        _, state = apply(net, *init(net, B, length, D), values(B, length, D))
        assert state == {'calls': calls, 'positions': length}


@pytest.mark.parametrize(
    ('platform', 'wanted'),
    [('cpu', 1024), ('gpu', 16384), ('tpu', 4096), ('abacus', 1024)],
)
def test_the_platform_decides_how_long_a_slice_is(platform, wanted, monkeypatch):
    assert automatic_len(platform) == wanted
    seen = []

    class Seen(Layer):
        position_wise = True

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            seen.append(inputs[0].shape[1])
            return inputs, state

    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    net = tl.Chunk(Seen(), 'auto')
    jax.eval_shape(lambda x: net.apply({}, {}, (x,))[0], shape_dtype((1, 40000, 1)))
    assert set(seen) == {wanted, 40000 % wanted}
    seen.clear()
    jax.eval_shape(lambda x: net.replace(chunk_len=7).apply({}, {}, (x,))[0], shape_dtype((1, 21)))
    assert set(seen) == {7}


def test_an_automatic_slice_gives_what_any_other_does(monkeypatch):
    monkeypatch.setattr(chunk, 'automatic_len', lambda platform: 4)
    inner = tl.Residual(tl.LayerNorm(), tl.Dense(8), tl.Gelu(), tl.Dense(D))
    x = values(B, 11, D)

    def gradients(net):
        half = tl.ReversibleSerial(tl.ReversibleHalfResidual(net), tl.ReversibleSwap())
        weights, _ = half.init((shape_dtype(x.shape),) * 2, jax.random.key(1))

        def loss(weights, x):
            streams, _ = half.apply(weights, {}, (x, 2 * x), mode=Mode.TRAIN)
            return sum(jnp.sum(jnp.sin(y)) for y in streams)

        return jax.jit(jax.grad(loss, (0, 1)))(weights, x)

    assert_equal(gradients(tl.Chunk(inner, 'auto')), gradients(tl.Chunk(inner, 5)), 1e-5)
    assert_equal(gradients(tl.Chunk(inner, 'auto')), gradients(inner), 1e-5)


def test_a_length_is_a_number_or_automatic():
    for wrong, error in (('automatic', TypeError), (None, TypeError), (0, ValueError)):
        with pytest.raises(error, match='Chunk: chunk_len must be'):
            tl.Chunk(tl.Dense(4), wrong)


def test_chunk_draws_for_each_piece_anew():
    net = tl.Chunk(tl.Dropout(0.5), 8)
    (y,), _ = apply(net, {}, {}, jnp.ones((1, 20, D)), mode=Mode.TRAIN, seed=0)
    assert not (y[:, :8] == y[:, 8:16]).all()
    assert not (y[:, :4] == y[:, 16:]).all()


@pytest.mark.parametrize(
    ('mixer', 'name'),
    [
        (tl.SelfAttention(2), 'DotProductAttention'),
        (tl.BatchNorm(), 'BatchNorm'),
        (tl.Conv1D(4), 'Conv1D'),
        (tl.Mean(), 'Mean'),
        (tl.LearnedPositions(8), 'LearnedPositions'),
        (tl.Concatenate(axis=1), 'Concatenate'),
        (tl.Split(axis=-2), 'Split'),
        (tl.Dropout(0.1, shared_axes=(0, 1)), 'Dropout'),
        (tl.Flatten(), 'Flatten'),
        (tl.Residual(tl.Repeat(tl.Remat(tl.Serial(tl.Dense(4), tl.BatchNorm())), 2)), 'BatchNorm'),
    ],
)
def test_chunk_refuses_what_mixes_positions(mixer, name):
    with pytest.raises(TypeError, match=f'Chunk: {name} mixes positions.*chunk only what works'):
        tl.Chunk(mixer)


def test_chunk_takes_what_works_on_features():
    inner = tl.Serial(tl.Split(), tl.Concatenate(), tl.Dropout(0.5, (2,)), tl.Flatten(2))
    got, _ = apply(tl.Chunk(inner, 4), {}, {}, values(B, L, D))
    assert_equal(got, (values(B, L, D),))


def test_chunk_wants_inputs_of_one_length():
    with pytest.raises(ValueError, match=r'must be of one length, got \(float32\[2,6,4\], float32'):
        tl.Chunk(tl.Add()).apply({}, {}, (values(2, 6, 4), values(2, 5, 4)))
    with pytest.raises(ValueError, match=r'Chunk cuts axis 1 of all its inputs'):
        tl.Chunk(tl.Relu()).apply({}, {}, (values(2),))


# Auxiliary losses.


def balanced(net: Layer, weights, *inputs: jax.Array, stale: float = 9.0):
    """The sum of the auxiliary losses, and its gradient."""

    def loss(weights):
        state = jax.tree.map(lambda x: x + stale, init_state(net, inputs, Mode.TRAIN))
        return aux_loss(net.apply(weights, state, inputs, mode=Mode.TRAIN)[1])

    return jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize('length', [3, 8, 10])
def test_chunk_leaves_the_auxiliary_loss_of_the_whole(length):
    inner = tl.Repeat(tl.Serial(tl.Dense(D), Balance()), 2)
    weights, _ = init(inner)
    x = values(B, length, D)
    chunked = balanced(tl.Chunk(inner, 4), weights, x)
    assert_equal(chunked, balanced(inner, weights, x), 1e-5)


def test_map_sums_auxiliary_losses():
    inner = tl.Serial(tl.Dense(D), Balance())
    weights, _ = init(inner)
    a, b = values(B, L, D), values(B, L, D, seed=1)
    one, two = balanced(inner, weights, a), balanced(inner, weights, b)
    both = balanced(tl.Map(inner, 2), weights, a, b)
    assert_equal(both, jax.tree.map(jnp.add, one, two), 1e-5)


# Decisions.

DECIDING = {
    'Serial': tl.Serial(tl.Dense(D), Decide(), tl.Residual(Decide())),
    'Repeat': tl.Repeat(tl.Serial(Decide(), tl.Dense(D)), 3),
    'Chunk with a tail': tl.Chunk(tl.Serial(Decide(), tl.Dense(D)), 4),
    'Chunk itself': tl.Chunk(Decide(), 2),
    'short Chunk': tl.Chunk(Decide(), 8),
    'Map': tl.Map(tl.Serial(tl.Dense(D), Decide()), 2),
    'Remat': tl.Remat(tl.Serial(Decide(), tl.Dense(D))),
    'all of them': tl.Map(tl.Repeat(tl.Chunk(tl.Serial(Decide(), Count()), 4), 2), 2),
}


@pytest.mark.parametrize('net', DECIDING.values(), ids=list(DECIDING))
def test_decisions_recorded_are_replayed(net):
    inputs = tuple(values(B, L, D, seed=i) for i in range(net.n_in))
    its_signature = signature() * net.n_in
    weights, state = net.init(its_signature, jax.random.key(0))
    wanted, trained = apply(net, weights, state, *inputs, mode=Mode.TRAIN, seed=5)
    recorded, full = apply(net, weights, state, *inputs, mode=Mode.RECORD, seed=5)
    assert_equal(recorded, wanted)
    plain, found = take_decisions(full)
    assert_equal(plain, trained)
    assert jax.tree.structure(trained) == jax.tree.structure(state)
    assert found and all(x.dtype == jnp.int8 for x in jax.tree.leaves(found))

    with_decisions = put_decisions(state, found)
    replayed, after = apply(net, weights, with_decisions, *inputs, mode=Mode.REPLAY, seed=99)
    assert_equal(replayed, wanted)
    assert_equal(take_decisions(after)[0], trained)
    other, _ = apply(net, weights, state, *inputs, mode=Mode.TRAIN, seed=99)
    assert any((a != b).any() for a, b in zip(other, wanted, strict=True))


@pytest.mark.parametrize(
    'state',
    [
        {},
        {'a': 1},
        {'at': Decisions({'x': 3})},
        {'a': {'at': Decisions({'x': 3})}, 'b': {'c': 1}},
        {'a': {'at': Decisions({'x': 3}), 'b': 4}, 'c': {'d': {'at': Decisions({'x': 5})}}},
        {'empty': {}, 'a': {'at': Decisions({})}},
        {'decisions': {'decisions': 3, 'at': Decisions({'x': 3})}},
    ],
)
def test_decisions_are_taken_out_and_put_back(state):
    plain, found = take_decisions(state)
    assert put_decisions(plain, found) == state
    assert take_decisions(plain) == (plain, {})
    assert 'Decisions' not in str(plain)


def test_a_state_for_decoding_is_refused_elsewhere():
    layer = tl.Repeat(tl.Conv1D(8, padding='causal'), 2)
    x = jnp.ones((1, 4, 8))
    weights, state = layer.init((shape_dtype((1, 4, 8)),), jax.random.key(0), Mode.PREDICT)
    with pytest.raises(ValueError, match='made for decoding, a block at a time: init without mode'):
        layer.apply(weights, state, (x,), mode=Mode.EVAL)


def test_chunk_refuses_what_moves_positions_to_another_axis():
    net = tl.Chunk(tl.SplitHeads(2), 3)
    x = jnp.zeros((2, 6, 8))
    weights, state = jax.eval_shape(net.layer.init, (x,), jax.random.key(0))
    with pytest.raises(
        TypeError, match=r'SplitHeads turns a slice of 3 positions into .*keeps posi'
    ):
        jax.eval_shape(net.apply, weights, state, (x,))
    with pytest.raises(TypeError, match='on axis 1'):
        net.output_signature((x,))
