"""Mixtures of feed-forwards against their equations, in every mode, and what they refuse."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl, transforms
from layercomb.layers.core.mode import Mode
from layercomb.layers.sparse import by_expert as products
from layercomb.layers.sparse.block_sparse import BlockSparseFF
from layercomb.layers.sparse.switch import SwitchFF, feed_forward
from layercomb.layers.state.decisions import Decisions
from layercomb.layers.state.parts import beside, own
from layercomb.losses import total as aux_loss
from layercomb.shapes import shape_dtype

D, F, E = 6, 8, 4
EXPERT = functools.partial(feed_forward, jnp.tanh)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def made(cls, *args, **fields):
    """A layer, weights of random numbers, and its first state."""
    layer = cls(*args, **fields)
    return layer, *filled(layer, shape_dtype((1, 1, D)))


def filled(layer, *signature):
    # By NumPy, so that no initializer is compiled.
    weights, state = jax.eval_shape(functools.partial(layer.init, signature), jax.random.key(0))
    draw = np.random.default_rng(5)
    weights = jax.tree.map(lambda w: jnp.asarray(0.4 * draw.normal(size=w.shape), w.dtype), weights)
    return weights, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)


def key(seed=1):
    return jax.random.key(seed, impl='unsafe_rbg')  # which is compiled sooner


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(layer, weights, state, x, mode, rng):
    (y,), state = layer.apply(weights, state, (x,), rng=rng, mode=mode)
    return y, state


def apply(layer, weights, state, x, mode=Mode.EVAL):
    return run(layer, weights, state, x, mode, key())


def close(got, wanted, tolerance=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, wanted
    )


def slow_switch(weights, x, experts=None):
    """The equations, one position after the other, in float64; outputs and the loss."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    y, n = np.zeros(x.shape), w['router']['kernel'].shape[1]
    share, mean = np.zeros(n), np.zeros(n)
    for at in np.ndindex(*x.shape[:-1]):
        logits = x[at] @ w['router']['kernel']
        p = np.exp(logits) / np.exp(logits).sum()
        e = int(np.argmax(p)) if experts is None else int(experts[at])
        h = np.maximum(x[at] @ w['in']['kernel'][e] + w['in']['bias'][e], 0)
        y[at] = p[e] * (h @ w['out']['kernel'][e] + w['out']['bias'][e])
        share[e] += 1 / math.prod(x.shape[:-1])
        mean += p / math.prod(x.shape[:-1])
    return y, n * float(share @ mean)


def dense_switch(weights, x, balance):
    """Every expert for every position, and a one-hot of the largest."""
    p = jax.nn.softmax(x @ weights['router']['kernel'])
    chosen = jax.nn.one_hot(jnp.argmax(p, -1), p.shape[-1])
    h = jnp.einsum('...d,edf->...ef', x, weights['in']['kernel']) + weights['in']['bias']
    y = jnp.einsum('...ef,efd->...ed', jax.nn.relu(h), weights['out']['kernel'])
    y = ((p * chosen)[..., None] * (y + weights['out']['bias'])).sum(-2)
    axes = tuple(range(p.ndim - 1))
    return y, balance * p.shape[-1] * (chosen.mean(axes) * p.mean(axes)).sum()


def slow_blocks(weights, x):
    """The equations of EVAL, one position after the other, in float64."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape[:-1]):
        c = x[at] @ w['controller']['in']['kernel'] @ w['controller']['out']['kernel']
        e = int(np.argmax(c))
        h = np.maximum(x[at] @ w['in']['kernel'][e] + w['in']['bias'][e], 0)
        y[at] = h @ w['out']['kernel'][e] + w['out']['bias']
    return y


@jax.jit
def masked_blocks(weights, x, mask):
    """All units, with the mask repeated over those of a block."""
    units = jnp.moveaxis(weights['in']['kernel'], 0, 1).reshape(D, -1)
    h = jax.nn.relu(x @ units + weights['in']['bias'].reshape(-1))
    h = h * jnp.repeat(mask, weights['in']['bias'].shape[1], -1)
    return h @ weights['out']['kernel'].reshape(-1, D) + weights['out']['bias']


class TestByExpert:
    # As many positions as experts or fewer; tiles of 8 and of 16 rows; experts without a position.
    @pytest.mark.parametrize(
        ('experts', 'n', 'n_chosen'),
        [
            ([3, 0, 3, 1], 4, 1),
            ([0, 3] * 4 + [0], 4, 1),
            ([4] * 140 + [1] * 21, 5, 1),
            ([0, 3, 3, 1] * 9, 4, 2),
            ([2, 1, 0], 3, 3),
        ],
    )
    def test_is_every_position_by_itself_and_so_is_its_gradient(self, experts, n, n_chosen):
        e = jnp.asarray(experts, jnp.uint8).reshape(-1, n_chosen)
        x, ct = normal(len(e), D), normal(len(e), D, seed=1)
        gates = normal(*e.shape, seed=6)
        w_in = {'kernel': normal(n, D, F, seed=2), 'bias': normal(n, F, seed=3)}
        w_out = {'kernel': normal(n, F, D, seed=4), 'bias': normal(n, D, seed=5)}

        def fast(weights, x, gates):
            return products.by_expert(EXPERT, weights, x, e, gates)

        def slow(weights, x, gates):
            w_in, w_out = weights['in'], weights['out']
            h = jnp.tanh(jnp.einsum('td,tkdf->tkf', x, w_in['kernel'][e]) + w_in['bias'][e])
            y = jnp.einsum('tkf,tkfd->tkd', h, w_out['kernel'][e]) + w_out['bias'][e]
            return jnp.einsum('tkd,tk->td', y, gates)

        def both(f):
            y, pull = jax.vjp(f, {'in': w_in, 'out': w_out}, x, gates)
            return y, pull(ct)

        values = jax.jit(both, static_argnums=0)
        close(values(fast), values(slow), 1e-4)

    def test_every_position_has_a_place_of_its_own_in_a_tile_of_its_expert(self):
        for t, n, seed in ((9, 8, 0), (700, 3, 1), (3000, 8, 2)):
            made = np.random.default_rng(seed)
            experts = made.integers(0, n, t) if seed % 2 else np.minimum(made.poisson(1, t), n - 1)
            tiles = jax.jit(products._tiles, static_argnums=1)(jnp.asarray(experts), n)
            expert, row, place = jax.tree.map(np.asarray, tiles)
            np.testing.assert_array_equal(row.reshape(-1)[place], np.arange(t))
            np.testing.assert_array_equal(expert[place // row.shape[1]], experts)
            assert (row < t).sum() == t

    def test_goes_under_vmap(self):
        w, v = normal(2, D, F), normal(2, F, D, seed=1)
        x, e = normal(3, 20, D), jnp.asarray(np.arange(60).reshape(3, 20) % 7 % 2)

        def one(x, e):
            weights = {'in': {'kernel': w}, 'out': {'kernel': v}}
            return products.by_expert(EXPERT, weights, x, e[:, None], jnp.ones((20, 1)))

        h = np.tanh(np.einsum('btd,btdf->btf', x, np.asarray(w)[e]))
        wanted = np.einsum('btf,btfd->btd', h, np.asarray(v)[e])
        close(jax.jit(jax.vmap(one))(x, e), wanted)


class TestSwitchFF:
    @pytest.mark.parametrize('shape', [(D,), (2, 9, D)])
    def test_is_the_equations(self, shape):
        layer, weights, state = made(SwitchFF, F, E, balance=0.5)
        x = normal(*shape)
        wanted, loss = slow_switch(weights, np.asarray(x, np.float64))
        y, new = apply(layer, weights, state, x)
        close(y, wanted)
        assert float(new['aux_loss'].value) == 0
        for mode in (Mode.TRAIN, Mode.RECORD):
            y, new = apply(layer, weights, state, x, mode)
            close(y, wanted)
            close(new['aux_loss'].value, 0.5 * loss)
            assert new['aux_loss'].value.dtype == jnp.float32
            assert (own(new, Decisions) is not None) == (mode is Mode.RECORD)

    def test_gradient_is_that_of_all_experts_and_a_one_hot(self):
        layer, weights, state = made(SwitchFF, F, E, balance=0.5)
        x, ct = normal(2, 9, D), normal(2, 9, D, seed=1)

        def fast(weights, x):
            y, new = apply(layer, weights, state, x, Mode.TRAIN)
            return (ct * y).sum() + new['aux_loss'].value

        def slow(weights, x):
            y, loss = dense_switch(weights, x, 0.5)
            return (ct * y).sum() + loss

        got, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(weights, x) for f in (fast, slow))
        close(got, wanted, 1e-4)
        assert np.abs(got[1][0]['router']['kernel']).max() > 1e-2

    def test_loss_is_the_balance_if_all_experts_are_used_alike_and_n_times_it_if_one_is(self):
        layer, weights, state = made(SwitchFF, F, D, balance=0.3)
        even = jnp.tile(jnp.eye(D), (5, 1))
        for router, x, factor in (
            (jnp.zeros((D, D)), normal(5 * D, D), 1),  # all are as probable
            (50 * jnp.eye(D), even, 1),
            (50 * jnp.eye(D), jnp.tile(even[:1], (5 * D, 1)), D),
        ):
            routed = {**weights, 'router': {'kernel': router}}
            _, new = apply(layer, routed, state, x, Mode.TRAIN)
            close(new['aux_loss'].value, 0.3 * factor)

    def test_replay_follows_the_decisions(self):
        layer, weights, state = made(SwitchFF, F, E, balance=0.5)
        x = normal(2, 9, D)
        y, new = apply(layer, weights, state, x, Mode.RECORD)
        experts = own(new, Decisions).values['experts']
        assert (experts.shape, experts.dtype) == ((2, 9), jnp.uint8)
        again, after = apply(layer, weights, new, x, Mode.REPLAY)
        close((again, after), (y, new))
        others = (experts + 1) % E
        decided = beside(new, Decisions({'experts': others}))
        y, after = apply(layer, weights, decided, x, Mode.REPLAY)
        wanted, loss = slow_switch(weights, np.asarray(x, np.float64), np.asarray(others))
        close((y, after['aux_loss'].value), (wanted, 0.5 * loss))

    def test_more_than_256_experts_are_numbered_by_two_bytes(self):
        for n, dtype in ((256, jnp.uint8), (257, jnp.uint16)):
            layer, x = SwitchFF(1, n), shape_dtype((3, D))
            weights, state = jax.eval_shape(functools.partial(layer.init, (x,)), jax.random.key(0))
            record = functools.partial(layer.apply, mode=Mode.RECORD)
            _, new = jax.eval_shape(record, weights, state, (x,))
            assert own(new, Decisions).values['experts'].dtype == dtype

    def test_decoding_is_evaluation(self):
        layer, weights, state = made(SwitchFF, F, E, balance=0.5)
        x = normal(2, 9, D)
        start = layer.init((shape_dtype(x.shape),), jax.random.key(0), Mode.PREDICT)[1]
        assert start == {}
        pieces = [
            apply(layer, weights, start, p, Mode.PREDICT)[0]
            for p in (x[:, :7], x[:, 7:8], x[:, 8:])
        ]
        close(jnp.concatenate(pieces, 1), apply(layer, weights, state, x)[0])

    def test_jitter_moves_the_router_alone_and_in_training_alone(self):
        layer, weights, state = made(SwitchFF, F, E, balance=0.5, jitter=0.3)
        calm = layer.replace(jitter=0.0)
        x = normal(2, 9, D)
        close(apply(layer, weights, state, x), apply(calm, weights, state, x))
        y, new = apply(layer, weights, state, x, Mode.RECORD)
        assert np.abs(y - apply(calm, weights, state, x, Mode.TRAIN)[0]).max() > 1e-3
        close(apply(layer, weights, new, x, Mode.REPLAY)[0], y)
        still = {**weights, 'router': {'kernel': jnp.zeros((D, E))}}
        close(
            apply(layer, still, state, x, Mode.TRAIN)[0],
            apply(calm, still, state, x, Mode.TRAIN)[0],
        )
        with pytest.raises(ValueError, match=r'SwitchFF draws jitter in training: pass rng='):
            layer.apply(weights, state, (x,), mode=Mode.TRAIN)

    def test_loss_of_pieces_is_their_mean_by_length(self):
        ff, weights, state = made(SwitchFF, F, E, balance=0.5)
        x = normal(2, 10, D)
        y, new = apply(tl.Chunk(ff, 4), weights, state, x, Mode.TRAIN)
        close(y, apply(ff, weights, state, x, Mode.TRAIN)[0])
        losses = [
            slow_switch(weights, np.asarray(p, np.float64))[1]
            for p in (x[:, :4], x[:, 4:8], x[:, 8:])
        ]
        close(new['aux_loss'].value, 0.5 * np.dot(losses, [0.4, 0.4, 0.2]))

    def test_routes_in_float32_when_cast(self):
        layer, weights, state = made(SwitchFF, F, E, balance=0.5)
        x = normal(2, 9, D).astype(jnp.bfloat16)
        rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
        y, new = apply(transforms.cast(layer), weights, state, x, Mode.RECORD)
        wanted, loss = slow_switch(rounded, np.asarray(x, np.float64))
        assert (y.dtype, new['aux_loss'].value.dtype) == (jnp.bfloat16, jnp.float32)
        close(y.astype(jnp.float32), wanted, 3e-2)
        close(new['aux_loss'].value, 0.5 * loss)

    def test_each_expert_starts_as_a_dense_layer_would(self):
        layer = SwitchFF(64, 16, use_bias=False)
        weights, _ = layer.init((shape_dtype((1, 128)),), jax.random.key(0))
        assert set(weights['in']) == set(weights['out']) == {'kernel'}
        std = np.sqrt(2 / (64 + 128))
        for name in ('in', 'out'):
            np.testing.assert_allclose(weights[name]['kernel'].std((1, 2)), std, rtol=0.05)
        y, _ = apply(layer, weights, {}, normal(3, 128))
        assert np.isfinite(y).all()


class TestBlockSparseFF:
    @pytest.mark.parametrize('shape', [(D,), (2, 9, D)])
    @pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT])
    def test_is_the_equations(self, shape, mode):
        layer, weights, state = made(BlockSparseFF, F, E)
        x = normal(*shape)
        y, new = apply(layer, weights, state, x, mode)
        close(y, slow_blocks(weights, np.asarray(x, np.float64)))
        assert new == {}

    def test_without_noise_hard_training_is_evaluation_and_one_block_is_dense(self):
        layer, weights, _ = made(BlockSparseFF, F, E, temperature=0, hard_prob=1)
        x = normal(2, 9, D)
        close(apply(layer, weights, {}, x, Mode.TRAIN)[0], apply(layer, weights, {}, x)[0])
        layer, weights, _ = made(BlockSparseFF, F, 1)
        for mode in (Mode.TRAIN, Mode.EVAL):
            y, _ = apply(layer, weights, {}, x, mode)
            close(y, masked_blocks(weights, x, jnp.ones((2, 9, 1))))

    @pytest.mark.parametrize('hard_prob', [0, 1])
    def test_training_and_its_gradient_are_the_formula(self, hard_prob):
        layer, weights, _ = made(BlockSparseFF, F, E, temperature=0.5, hard_prob=hard_prob)
        x, ct = normal(2, 9, D), normal(2, 9, D, seed=1)
        noise = jax.jit(lambda k: jax.random.gumbel(jax.random.split(k)[0], (2, 9, E)))(key())

        def probabilities(weights, x):
            control = weights['controller']
            return jax.nn.softmax(
                x @ control['in']['kernel'] @ control['out']['kernel'] + 0.5 * noise
            )

        def fast(weights, x):
            return (ct * apply(layer, weights, {}, x, Mode.TRAIN)[0]).sum()

        def formula(weights, x):
            # What passes through the mask is p's, at the mask's value: linearised by hand.
            p, pull_p = jax.vjp(probabilities, weights, x)
            mask = jax.nn.one_hot(jnp.argmax(p, -1), E) if hard_prob else p
            value, pull = jax.vjp(lambda *a: (ct * masked_blocks(*a)).sum(), weights, x, mask)
            d_weights, d_x, d_mask = pull(jnp.ones(()))
            more_weights, more_x = pull_p(d_mask)
            return value, (jax.tree.map(jnp.add, d_weights, more_weights), d_x + more_x)

        got = jax.jit(jax.value_and_grad(fast, (0, 1)))(weights, x)
        close(got, jax.jit(formula)(weights, x), 1e-4)

    def test_takes_the_hard_choice_as_often_as_it_is_told_and_for_all_at_once(self):
        layer, weights, _ = made(BlockSparseFF, F, E, temperature=0, hard_prob=0.3)
        x = normal(2, 9, D)
        hard, soft = (
            apply(layer.replace(hard_prob=p), weights, {}, x, Mode.TRAIN)[0] for p in (1.0, 0.0)
        )
        made_hard = 0
        for seed in range(60):
            y, _ = run(layer, weights, {}, x, Mode.TRAIN, key(seed))
            is_hard = np.allclose(y, hard, atol=1e-5)
            assert is_hard or np.allclose(y, soft, atol=1e-5)
            made_hard += is_hard
        assert 8 < made_hard < 29

    def test_replay_follows_the_decisions(self):
        layer, weights, _ = made(BlockSparseFF, F, E, hard_prob=1)
        x = normal(2, 9, D)
        y, new = apply(layer, weights, {}, x, Mode.RECORD)
        blocks = own(new, Decisions).values['blocks']
        assert (blocks.shape, blocks.dtype) == ((2, 9), jnp.uint8)
        close(apply(layer, weights, new, x, Mode.REPLAY), (y, new))
        others = (blocks + 1) % E
        y, _ = apply(layer, weights, beside({}, Decisions({'blocks': others})), x, Mode.REPLAY)
        close(y, masked_blocks(weights, x, jax.nn.one_hot(others, E)))

    def test_starts_as_one_feed_forward_of_its_width(self):
        layer = BlockSparseFF(512, 8, use_bias=False)
        weights, _ = layer.init((shape_dtype((1, 128)),), jax.random.key(0))
        std = np.sqrt(2 / (512 + 128))
        for name in ('in', 'out'):
            np.testing.assert_allclose(weights[name]['kernel'].std(), std, rtol=0.05)
        assert weights['controller']['in']['kernel'].shape == (128, 16)
        for mode in (Mode.EVAL, Mode.TRAIN):
            y, _ = apply(layer, weights, {}, normal(3, 128), mode)
            assert np.isfinite(y).all()


@pytest.mark.parametrize(
    'layer', [SwitchFF(F, E, balance=3.0, jitter=0.1), BlockSparseFF(F, E, hard_prob=0.5)]
)
def test_reversible_in_pieces_the_gradient_is_that_of_plain_autodiff(layer):
    net = tl.ReversibleRepeat(tl.ReversibleHalfResidual(tl.Chunk(layer, 4)), 2)
    x = normal(2, 8, D), normal(2, 8, D, seed=1)
    weights, state = filled(net, *map(shape_dtype, (x[0].shape, x[1].shape)))
    rng = key()

    def loss(weights, x, mode):
        (a, b), new = net.apply(weights, state, x, rng=rng, mode=mode)
        aux = aux_loss(new)
        return (a * jnp.cos(b)).sum() + aux

    grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
    # RECORD runs it as it stands, without the reversible gradient.
    close(grad(weights, x, Mode.TRAIN), grad(weights, x, Mode.RECORD), 1e-4)


class TestRefusals:
    def test_blocks_that_do_not_divide_the_units(self):
        with pytest.raises(
            ValueError,
            match=r'n_blocks=30 does not divide d_ff=96: use n_blocks=32, or d_ff=90$',
        ):
            BlockSparseFF(96, 30)

    @pytest.mark.parametrize(
        ('make', 'error', 'text'),
        [
            (lambda: SwitchFF(8, 0), ValueError, 'n_experts must be at least 1, got 0'),
            (lambda: SwitchFF(8.5), TypeError, 'd_ff must be an int, got 8.5'),
            (lambda: SwitchFF(8, balance=-1.0), ValueError, 'balance must be at least 0, got -1'),
            (lambda: SwitchFF(8, jitter=1.0), ValueError, 'jitter must be at least 0 and below 1'),
            (lambda: SwitchFF(8, activation='rule'), ValueError, "no activation 'rule'"),
            (lambda: BlockSparseFF(8, 2, activation='rule'), ValueError, "no activation 'rule'"),
            (lambda: BlockSparseFF(8, 2, temperature=-1), ValueError, 'temperature must be at le'),
            (lambda: BlockSparseFF(8, 2, hard_prob=1.5), ValueError, 'hard_prob=1.5 is a probabi'),
        ],
    )
    def test_wrong_arguments(self, make, error, text):
        with pytest.raises(error, match=text):
            make()

    def test_training_without_a_key(self):
        layer, weights, state = made(BlockSparseFF, F, E)
        with pytest.raises(ValueError, match=r'BlockSparseFF draws in training: pass rng='):
            layer.apply(weights, state, (normal(2, D),), mode=Mode.TRAIN)

    @pytest.mark.parametrize('layer', [SwitchFF(F, E), BlockSparseFF(F, E)])
    def test_integers_and_another_width(self, layer):
        with pytest.raises(TypeError, match='takes floating-point vectors along the last axis'):
            layer.init((shape_dtype((2, D), 'int32'),), jax.random.key(0))
        weights, state = filled(layer, shape_dtype((2, D)))
        with pytest.raises(ValueError, match='the input is 5 wide and the weights were made for 6'):
            layer.apply(weights, state, (normal(2, 5),))
