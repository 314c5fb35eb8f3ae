"""`MixtureFF` against its equations, in every mode and width of weights, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import tl, transforms, trees
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.core.mode import Mode
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.state.counted import count_only
from layercomb.layers.state.decisions import Decisions
from layercomb.layers.state.parts import beside, own
from layercomb.losses import total as aux_loss
from layercomb.shapes import shape_dtype

D, F, E = 6, 32, 8
PAIR = {'d_ff': F, 'n_experts': E, 'n_chosen': 2}
KINDS = {
    'gated': {**PAIR},
    'one of them all': {**PAIR, 'n_chosen': 1, 'n_shared': 0, 'activation': 'gelu'},
    'biased': {**PAIR, 'use_bias': True, 'gated': False, 'activation': 'tanh'},
    'gated and biased': {**PAIR, 'n_shared': 2, 'use_bias': True, 'balance_bias': False},
    'softmax': {**PAIR, 'n_chosen': 3, 'n_shared': 0, 'routing': 'softmax', 'balance': 0.5},
    'normalized': {**PAIR, 'n_chosen': 3, 'normalize': True, 'balance': 0.5},
    'softmax normalized': {**PAIR, 'routing': 'softmax', 'normalize': True, 'n_shared': 2},
    'all': {**PAIR, 'n_chosen': 7, 'balance': 0.5},
    'scaled': {**PAIR, 'routing': 'softmax', 'scale': 2.5},
}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(layer, *signature):
    """Weights of random numbers, by NumPy, so that no initializer is compiled; the first state."""
    weights, state = jax.eval_shape(functools.partial(layer.init, signature), jax.random.key(0))
    draw = np.random.default_rng(5)
    weights = jax.tree.map(lambda w: jnp.asarray(0.6 * draw.normal(size=w.shape), w.dtype), weights)
    return weights, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)


def made(kind='gated', **changes):
    layer = MixtureFF(**{**KINDS[kind], **changes})
    return layer, *filled(layer, shape_dtype((1, 1, D)))


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(layer, weights, state, x, mode=Mode.EVAL):
    (y,), state = layer.apply(weights, state, (x,), mode=mode)
    return y, state


def close(got, wanted, tolerance=1e-5):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, wanted
    )


def scores(layer, logits):
    if layer.routing == 'sigmoid':
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum()


def flat(weights):
    """Weights with all units on one axis: (E, M, …) → (F, …)."""

    def one(path, w):
        return w.reshape(-1, *w.shape[2:]) if path.startswith(('in', 'up', 'out/kernel')) else w

    return trees.map_with_path(one, weights)


@pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT])
@pytest.mark.parametrize(
    'changes',
    [
        {'n_experts': E // 2},
        {'n_experts': 2 * E},
        {'n_shared': 2},
        {'d_ff': 2 * F},
        {'gated': False},
        {'use_bias': True},
        {'balance_bias': False},
    ],
)
def test_weights_of_another_mixture_are_refused(changes, mode):
    layer, weights, _ = made()
    with pytest.raises(
        ValueError, match=r'the weights are of one with .*: give the layer the fields'
    ):
        layer.replace(**changes).apply(weights, {}, (normal(1, 1, D),), mode=mode)


def slow(layer, weights, x, experts=None):
    """The equations, one position after the other, in float64: y, and the loss without `balance`.

    Args:
      layer, weights: of the mixture.
      x: (…, D).
      experts: (…, K) integers, chosen elsewhere; None to choose them.
    """
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), flat(weights))
    n, m, s_ = layer.n_experts - layer.n_shared, layer.d_ff // layer.n_experts, layer.n_shared
    y, share, mean = np.zeros(x.shape), np.zeros(n), np.zeros(n)
    t = math.prod(x.shape[:-1])
    f = elementwise('MixtureFF', layer.activation)
    for at in np.ndindex(*x.shape[:-1]):
        s = scores(layer, x[at] @ w['router']['kernel'])
        if experts is None:
            order = np.argsort(-(s + w['router'].get('bias', 0)), kind='stable')
            chosen = order[: layer.n_chosen]
        else:
            chosen = np.asarray(experts[at], int)
        gates = layer.scale * (s[chosen] / s[chosen].sum() if layer.normalize else s[chosen])
        for e, gate in [*((e, 1) for e in range(s_)), *zip(chosen + s_, gates, strict=True)]:
            units = slice(e * m, (e + 1) * m)
            h = w['in']['kernel_transposed'][units] @ x[at]
            h = h + w['in']['bias'][units] if layer.use_bias else h
            h = np.asarray(f(jnp.asarray(h, jnp.float32)), np.float64)
            if layer.gated:
                h = h * (w['up']['kernel_transposed'][units] @ x[at])
            y[at] += gate * (h @ w['out']['kernel'][units])
        y[at] += w['out']['bias'] if layer.use_bias else 0
        np.add.at(share, chosen, 1 / t / layer.n_chosen)
        mean += s / s.sum() / t
    return y, n * float(share @ mean), share


def dense(layer, weights, x):
    """Every expert for every position, times the gates of the chosen: y and the loss."""
    w, n = flat(weights), layer.n_experts - layer.n_shared
    logits = x @ w['router']['kernel']
    s = jax.nn.sigmoid(logits) if layer.routing == 'sigmoid' else jax.nn.softmax(logits)
    _, at = jax.lax.top_k(s + w['router'].get('bias', 0), layer.n_chosen)
    mask = jax.nn.one_hot(at, n).sum(-2)
    gates = s * mask
    gates = gates / gates.sum(-1, keepdims=True) if layer.normalize else gates
    gates = layer.scale * gates
    gates = jnp.concatenate([jnp.ones((*x.shape[:-1], layer.n_shared)), gates], -1)
    h = x @ w['in']['kernel_transposed'].T + w['in'].get('bias', 0)
    h = elementwise('MixtureFF', layer.activation)(h)
    h = h * (x @ w['up']['kernel_transposed'].T) if layer.gated else h
    h = h * jnp.repeat(gates, layer.d_ff // layer.n_experts, -1)
    axes = tuple(range(x.ndim - 1))
    share = mask.mean(axes) / layer.n_chosen
    p = s / s.sum(-1, keepdims=True)
    loss = layer.balance * n * (share * p.mean(axes)).sum()
    if layer.balance_bias:
        loss = loss + ((share - 1 / n) * w['router']['bias']).sum()  # whose gradient is the excess
    return h @ w['out']['kernel'] + w['out'].get('bias', 0), loss


class TestEquations:
    # One row a tile, or several; a single vector, and many rows.
    @pytest.mark.parametrize('shape', [(D,), (3, D), (2, 9, D)])
    @pytest.mark.parametrize('kind', KINDS)
    def test_outputs_and_loss_are_those_of_a_loop(self, kind, shape):
        layer, weights, state = made(kind)
        x = normal(*shape)
        wanted, loss, _ = slow(layer, weights, np.asarray(x, np.float64))
        for mode in (Mode.EVAL, Mode.PREDICT, Mode.TRAIN, Mode.RECORD):
            y, new = apply(layer, weights, {} if mode is Mode.PREDICT else state, x, mode)
            close(y, wanted)
            if mode.is_training:
                assert new['aux_loss'].value.dtype == jnp.float32
                close(new['aux_loss'].value, layer.balance * loss)
            else:
                assert new == ({} if mode is Mode.PREDICT else state)
            assert (own(new, Decisions) is not None) == (mode is Mode.RECORD)

    @pytest.mark.parametrize('shape', [(3, D), (2, 20, D)])
    @pytest.mark.parametrize('kind', KINDS)
    def test_gradients_are_those_of_all_experts_and_a_mask(self, kind, shape):
        layer, weights, state = made(kind)
        x, ct = normal(*shape), normal(*shape, seed=1)

        def fast(weights, x):
            y, new = apply(layer, weights, state, x, Mode.TRAIN)
            return (ct * y).sum() + new['aux_loss'].value

        def masked(weights, x):
            y, loss = dense(layer, weights, x)
            return (ct * y).sum() + loss

        got, wanted = (jax.jit(jax.grad(f, (0, 1)))(weights, x) for f in (fast, masked))
        close(got, wanted, 1e-4)
        assert np.abs(got[0]['router']['kernel']).max() > 1e-2

    @pytest.mark.parametrize('n', [3, 20])
    def test_gradients_have_gradients(self, n):
        layer, weights, state = made('gated')
        x = normal(2, n, D)

        def fast(weights, x):
            return jnp.sin(apply(layer, weights, state, x, Mode.TRAIN)[0]).sum()

        def masked(weights, x):
            return jnp.sin(dense(layer, weights, x)[0]).sum()

        def squares(f):
            def all_squares(*given):
                return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(f, (0, 1))(*given)))

            return jax.jit(jax.grad(all_squares, (0, 1)))

        for got, wanted in zip(
            *(jax.tree.leaves(squares(f)(weights, x)) for f in (fast, masked)), strict=True
        ):
            most = max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * most)

    def test_gradient_of_the_bias_is_the_excess_of_choices_for_any_loss(self):
        layer, weights, state = made(balance=0.0)
        x = normal(2, 9, D)
        *_, share = slow(layer, weights, np.asarray(x, np.float64))

        def loss(weights):
            return apply(layer, weights, state, x, Mode.TRAIN)[1]['aux_loss'].value

        value, grad = jax.value_and_grad(loss)(weights)
        assert float(value) == 0
        close(grad['router']['bias'], share - 1 / (E - 1))
        assert not np.any(grad['router']['kernel'])
        # An expert chosen too often is chosen less after some steps against the gradient.
        e = int(np.argmax(share))
        calmer = weights['router']['bias'] - 10 * grad['router']['bias']
        moved = {**weights, 'router': {**weights['router'], 'bias': calmer}}
        assert slow(layer, moved, np.asarray(x, np.float64))[2][e] < share[e]

    def test_of_equal_scores_the_lower_expert_is_chosen(self):
        layer, weights, _ = made(balance_bias=False)
        x = normal(3, D)
        still = {**weights, 'router': {'kernel': jnp.zeros((D, E - 1))}}
        wanted = slow(layer, still, np.asarray(x, np.float64), np.tile([0, 1], (3, 1)))[0]
        for mode in (Mode.EVAL, Mode.PREDICT):
            close(apply(layer, still, {}, x, mode)[0], wanted)

    def test_scores_of_nothing_divide_nothing_by_nothing(self):
        layer, weights, state = made('normalized')
        x = jnp.abs(normal(4, D)) + 1
        low = {**weights, 'router': {**weights['router'], 'kernel': jnp.full((D, E - 1), -100.0)}}

        def loss(weights, x):
            y, new = apply(layer, weights, state, x, Mode.TRAIN)
            return y.sum() + new['aux_loss'].value

        for leaf in jax.tree.leaves(jax.value_and_grad(loss, (0, 1))(low, x)):
            assert np.isfinite(leaf).all()


class TestRows:
    @pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT, Mode.TRAIN])
    @pytest.mark.parametrize('shape', [(0, D), (2, 0, D)])
    def test_there_may_be_none(self, shape, mode):
        layer, weights, state = made(use_bias=True, balance=0.5)
        y, new = apply(layer, weights, {} if mode is Mode.PREDICT else state, jnp.ones(shape), mode)
        assert y.shape == shape
        if mode is Mode.TRAIN:
            assert float(new['aux_loss'].value) == 0
            grads = jax.grad(lambda w: apply(layer, w, state, jnp.ones(shape), mode)[0].sum())
            assert not any(np.any(g) for g in jax.tree.leaves(grads(weights)))

    @pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT])
    @pytest.mark.parametrize('n', [3, 20])
    def test_what_is_not_a_number_stays_in_its_row(self, n, mode):
        layer, weights, _ = made('gated and biased')
        x = normal(n, D)
        wanted = apply(layer, weights, {}, x, mode)[0]
        y = apply(layer, weights, {}, x.at[1, 2].set(jnp.nan), mode)[0]
        assert np.isnan(y[1]).all()
        close(np.delete(y, 1, 0), np.delete(wanted, 1, 0), 1e-6)

    @pytest.mark.parametrize('mode', [Mode.EVAL, Mode.TRAIN])
    @pytest.mark.parametrize('kind', ['gated', 'normalized', 'biased'])
    def test_a_later_token_moves_no_earlier_output(self, kind, mode, optimized):
        layer, weights, state = made(kind)
        x = normal(1, 70, D)
        y = apply(layer, weights, state, x, mode)[0]
        for at in (3, 40, 69):
            other = apply(layer, weights, state, x.at[0, at].multiply(-3), mode)[0]
            np.testing.assert_array_equal(np.delete(other, at, 1), np.delete(y, at, 1))
            assert np.abs(other[0, at] - y[0, at]).max() > 1e-3

    @pytest.mark.parametrize('kind', KINDS)
    def test_decoding_is_evaluation(self, kind):
        layer, weights, state = made(kind)
        x = normal(2, 30, D)
        start = layer.init((shape_dtype(x.shape),), jax.random.key(0), Mode.PREDICT)[1]
        assert start == {}
        whole = apply(layer, weights, state, x)[0]
        cuts = [0, 20, 21, 22, 24, 29, 30]  # a prompt of many rows, then tokens, then a few
        pieces = [
            apply(layer, weights, start, x[:, a:b], Mode.PREDICT)[0]
            for a, b in itertools.pairwise(cuts)
        ]
        close(jnp.concatenate(pieces, 1), whole)

    def test_decoding_reads_few_rows(self, optimized):
        layer = MixtureFF(4096, 64, 3, 1)
        x = shape_dtype((1, 1, 256))
        weights = jax.eval_shape(lambda: layer.init((x,), jax.random.key(0))[0])

        def flops(n):
            run = jax.jit(lambda w, x: layer.apply(w, {}, (x,), mode=Mode.PREDICT)[0])
            found = run.lower(weights, shape_dtype((1, n, 256))).compile().cost_analysis()
            return found['flops']

        assert flops(1) < 2 * 3 * 4096 * 256 / 10

    def test_memory_grows_with_what_is_chosen_and_not_with_the_experts(self, optimized):
        # Numbers of (T, K, D) for the outputs of tiles, once; none of (T, K, E).
        t, d, k, e = 8192, 16, 4, 512
        layer = MixtureFF(e, e, k, 0, gated=False)
        x = shape_dtype((t, d))
        weights, state = jax.eval_shape(functools.partial(layer.init, (x,)), jax.random.key(0))

        def loss(weights, state, x):
            (y,), new = layer.apply(weights, state, (x,), mode=Mode.TRAIN)
            return y.sum() + new['aux_loss'].value

        made = jax.jit(jax.grad(loss)).lower(weights, state, x).compile()
        scores, tiles = 4 * t * e, 4 * (t * k + 8 * e) * d
        assert made.memory_analysis().temp_size_in_bytes < 3.5 * scores + 2 * tiles

    def test_goes_under_vmap(self):
        layer, weights, state = made()
        x = normal(3, 12, D)
        for mode in (Mode.EVAL, Mode.PREDICT, Mode.TRAIN):
            one = functools.partial(apply, layer, weights, state, mode=mode)
            y, _ = jax.vmap(lambda x, one=one: one(x))(x)
            close(y, apply(layer, weights, state, x)[0])
        grads = jax.vmap(jax.grad(lambda x: apply(layer, weights, state, x)[0].sum()))(x)
        close(grads, jax.grad(lambda x: apply(layer, weights, state, x)[0].sum())(x), 1e-4)


class TestTraining:
    def test_replay_follows_the_decisions(self):
        layer, weights, state = made('normalized')
        x = normal(2, 9, D)
        y, new = apply(layer, weights, state, x, Mode.RECORD)
        experts = own(new, Decisions).values['experts']
        assert (experts.shape, experts.dtype) == ((2, 9, 3), jnp.uint8)
        close(apply(layer, weights, new, x, Mode.REPLAY), (y, new))
        others = (experts + 1) % (E - 1)
        decided = beside(new, Decisions({'experts': others}))
        y, after = apply(layer, weights, decided, x, Mode.REPLAY)
        wanted, loss, _ = slow(layer, weights, np.asarray(x, np.float64), np.asarray(others))
        close((y, after['aux_loss'].value), (wanted, 0.5 * loss))

    def test_more_than_256_routed_experts_are_numbered_by_two_bytes(self):
        for n, dtype in ((257, jnp.uint8), (258, jnp.uint16)):
            layer, x = MixtureFF(n, n, 2, 1), shape_dtype((3, D))
            weights, state = jax.eval_shape(functools.partial(layer.init, (x,)), jax.random.key(0))
            record = functools.partial(layer.apply, mode=Mode.RECORD)
            _, new = jax.eval_shape(record, weights, state, (x,))
            assert own(new, Decisions).values['experts'].dtype == dtype

    @pytest.mark.parametrize('kind', ['gated', 'softmax', 'biased'])
    def test_reversible_in_pieces_the_gradient_is_that_of_plain_autodiff(self, kind):
        ff = MixtureFF(**{**KINDS[kind], 'balance': 3.0})
        net = tl.ReversibleRepeat(tl.ReversibleHalfResidual(tl.Chunk(ff, 4)), 2)
        x = normal(2, 8, D), normal(2, 8, D, seed=1)
        weights, state = filled(net, *map(shape_dtype, (x[0].shape, x[1].shape)))

        def loss(weights, x, mode):
            (a, b), new = net.apply(weights, state, x, rng=jax.random.key(0), mode=mode)
            return (a * jnp.cos(b)).sum() + aux_loss(new)

        grad = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
        # RECORD runs it as it stands, without the reversible gradient.
        close(grad(weights, x, Mode.TRAIN), grad(weights, x, Mode.RECORD), 1e-4)

    @pytest.mark.parametrize('kind', ['normalized', 'softmax'])
    def test_positions_of_loss_weight_0_count_in_no_load(self, kind):
        layer, weights, state = made(kind)
        x, counted = normal(2, 9, D), jnp.arange(9)[None] < jnp.array([[9], [4]])

        def value(weights, x, state):
            y, new = apply(layer, weights, state, x, Mode.TRAIN)
            return new['aux_loss'].value, y

        some = jax.value_and_grad(value, has_aux=True)
        (loss, y), grad = some(weights, x, count_only(state, counted))
        (wanted, _), wanted_grad = some(weights, x[counted], state)
        close((loss, grad), (wanted, wanted_grad), 1e-5)
        assert np.abs(grad['router']['bias']).max() > 1e-2
        close(y, apply(layer, weights, state, x)[0])  # though all are computed
        (loss, _), grad = some(weights, x, count_only(state, jnp.zeros((2, 9), bool)))
        assert float(loss) == 0 and not any(np.any(g) for g in jax.tree.leaves(grad))

    @pytest.mark.parametrize('n', [3, 40])
    def test_routes_in_float32_when_cast(self, n):
        layer, weights, state = made('normalized')
        x = normal(1, n, D).astype(jnp.bfloat16)
        rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
        y, new = apply(transforms.cast(layer), weights, state, x, Mode.RECORD)
        wanted, loss, _ = slow(layer, rounded, np.asarray(x, np.float64))
        assert (y.dtype, new['aux_loss'].value.dtype) == (jnp.bfloat16, jnp.float32)
        close(y.astype(jnp.float32), wanted, 5e-2)
        close(new['aux_loss'].value, 0.5 * loss)
        y, _ = apply(transforms.cast(layer), weights, {}, x, Mode.PREDICT)
        close(y.astype(jnp.float32), wanted, 5e-2)

    @pytest.mark.parametrize('mode', [Mode.EVAL, Mode.PREDICT, Mode.TRAIN])
    @pytest.mark.parametrize('n', [3, 40])
    def test_keeps_the_dtype_of_what_it_is_given(self, n, mode):
        layer, weights, state = made('gated and biased')
        x = normal(1, n, D).astype(jnp.bfloat16)
        y, _ = apply(layer, weights, {} if mode is Mode.PREDICT else state, x, mode)
        assert y.dtype == jnp.bfloat16

    def test_each_expert_starts_as_a_dense_layer_of_its_width_would(self):
        layer = MixtureFF(16 * 64, 16, 3)
        weights, _ = layer.init((shape_dtype((1, 128)),), jax.random.key(0))
        assert set(weights['in']) == {'kernel_transposed'} and set(weights['out']) == {'kernel'}
        std = np.sqrt(2 / (64 + 128))
        for name in ('in', 'up', 'out'):
            (kernel,) = weights[name].values()
            assert kernel.shape == (16, 64, 128)
            np.testing.assert_allclose(kernel.std((1, 2)), std, rtol=0.05)
        assert weights['router']['kernel'].shape == (128, 15)
        assert not weights['router']['bias'].any()


class TestRefusals:
    @pytest.mark.parametrize(
        ('make', 'error', 'text'),
        [
            (
                lambda: MixtureFF(100, 64),
                ValueError,
                'n_experts=64 does not divide d_ff=100: use n_experts=50, or d_ff=128$',
            ),
            (
                lambda: MixtureFF(64, 8, 7, 2),
                ValueError,
                'n_chosen=7 and n_shared=2 are more than n_experts=8: use n_chosen=6 or more exp',
            ),
            (
                lambda: MixtureFF(64, 8, 1, 9),
                ValueError,
                'n_chosen=1 and n_shared=9 are more than n_experts=8: use fewer of them or more',
            ),
            (
                lambda: MixtureFF(64, 8, 1, normalize=True),
                ValueError,
                'normalize=True makes the weight of n_chosen=1 expert always 1, and the router wo',
            ),
            (lambda: MixtureFF(8, 0), ValueError, 'n_experts must be at least 1, got 0'),
            (lambda: MixtureFF(8.5), TypeError, 'd_ff must be an int, got 8.5'),
            (lambda: MixtureFF(8, 8, 0), ValueError, 'n_chosen must be at least 1, got 0'),
            (lambda: MixtureFF(8, 8, 2, -1), ValueError, 'n_shared must be at least 0, got -1'),
            (lambda: MixtureFF(8, 8, 2, balance=-1.0), ValueError, 'balance must be at least 0'),
            (lambda: MixtureFF(8, 8, 2, activation='rule'), ValueError, "no activation 'rule'"),
            (lambda: MixtureFF(8, 8, 2, routing='hash'), TypeError, "'sigmoid' or 'softmax'"),
        ],
    )
    def test_wrong_arguments(self, make, error, text):
        with pytest.raises(error, match=text):
            make()

    def test_integers_and_another_width(self):
        layer, weights, _ = made()
        with pytest.raises(TypeError, match='takes floating-point vectors along the last axis'):
            layer.init((shape_dtype((2, D), 'int32'),), jax.random.key(0))
        with pytest.raises(ValueError, match='the input is 5 wide and the weights were made for 6'):
            layer.apply(weights, {}, (normal(2, 5),))
