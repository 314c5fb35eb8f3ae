"""Sparse layers against their equations, in every mode, and what they refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import layercomb_kernels
from layercomb import tl, trees
from layercomb.layers.core.layer import init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.native import has_kernels
from layercomb.layers.state.decisions import Decisions
from layercomb.layers.state.parts import beside, own
from layercomb.shapes import shape_dtype

B, L, D, F, N = 2, 6, 12, 24, 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def ff(**changes):
    layer = tl.SparseFF(F, N, d_lowrank=3, bias_init=tl.Normal(0.3), **changes)
    weights, _ = layer.init((shape_dtype((B, L, D)),), jax.random.key(0))
    return layer, weights


def chosen(weights, x):
    """The unit with the largest logit in each block, for one position."""
    controller = weights['controller']
    logits = x @ np.asarray(controller['in']['kernel']) @ np.asarray(controller['out']['kernel'])
    return [
        N * block + int(np.argmax(logits[N * block : N * (block + 1)])) for block in range(F // N)
    ]


def slow_ff(weights, x):
    """The equations, one position and one unit after the other, in float64."""
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    y = np.zeros(x.shape)
    for at in np.ndindex(*x.shape[:-1]):
        y[at] = weights['out']['bias']
        for unit in chosen(weights, x[at]):
            h = weights['in']['kernel_transposed'][unit] @ x[at] + weights['in']['bias'][unit]
            y[at] += max(h, 0.0) * weights['out']['kernel'][unit]
    return y


class TestSparseFF:
    @pytest.mark.parametrize(('seed', 'block'), [(0, 1), (1, 3), (2, 24)])
    def test_evaluation_is_the_equations(self, seed, block):
        layer, weights = ff()
        x = normal(B, L, D, seed=seed)
        (y,), _ = layer.apply(weights, {}, (x,))
        np.testing.assert_allclose(
            y, slow_ff(weights, np.asarray(x, np.float64)), rtol=1e-5, atol=1e-5
        )
        other = layer.replace(block_size=block)  # of any block size, decoding is evaluation
        (evaluated,), _ = other.apply(weights, {}, (x,))
        (decoded,), _ = other.apply(weights, {}, (x[:1, :1],), mode=Mode.PREDICT)
        np.testing.assert_allclose(decoded, evaluated[:1, :1], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize('n', [1, 3, 6])  # gathered rows, and whole matrices
    def test_decoding_is_evaluation(self, n):
        layer, weights = ff()
        x = normal(1, L, D)
        (whole,), _ = layer.apply(weights, {}, (x,))
        made = [
            layer.apply(weights, {}, (x[:, i : i + n],), mode=Mode.PREDICT)[0][0]
            for i in range(0, L, n)
        ]
        np.testing.assert_allclose(jnp.concatenate(made, 1), whole, rtol=1e-5, atol=1e-6)

    def test_decoding_reads_few_rows(self, optimized):
        layer = tl.SparseFF(4096, 64, d_lowrank=16)
        x = shape_dtype((1, 1, 256))
        weights = jax.eval_shape(lambda: layer.init((x,), jax.random.key(0))[0])

        def flops(mode):
            run = jax.jit(lambda w, x: layer.apply(w, {}, (x,), mode=mode)[0])
            return run.lower(weights, x).compile().cost_analysis()['flops']

        assert flops(Mode.PREDICT) < flops(Mode.EVAL) / 10

    @pytest.mark.parametrize('mode', [Mode.EVAL, Mode.TRAIN])
    def test_one_unit_of_a_block_works_where_the_controller_says(self, mode):
        layer, weights = ff(hard_prob=1.0, temperature=0.0)
        x = normal(B, L, D)

        def hidden(shift):  # d y / d (what each unit gives) shows which units work
            out = {**weights['out'], 'kernel': weights['out']['kernel'] + shift}
            return layer.apply({**weights, 'out': out}, {}, (x,), rng=jax.random.key(0), mode=mode)[
                0
            ][0]

        effect = jax.jacobian(hidden)(jnp.zeros((F, D)))[..., 0, :, 0]  # (B, L, F), of feature 0
        for at in np.ndindex(B, L):
            works = set(np.flatnonzero(np.asarray(effect[at]) > 0))
            assert works <= set(chosen(weights, np.asarray(x[at])))
        assert (np.asarray(effect) > 0).any()

    def test_soft_training_is_a_softmax(self):
        layer, weights = ff(hard_prob=0.0, temperature=0.0)
        x = normal(B, L, D)
        (y,), _ = layer.apply(weights, {}, (x,), rng=jax.random.key(0), mode=Mode.TRAIN)
        np.testing.assert_allclose(y, soft(weights, x), rtol=1e-5, atol=1e-5)

    def test_hard_choice_has_the_gradient_of_the_soft_one(self):
        """dy/dc through m = onehot + p − stop(p): activations of the hard pass, slopes of p."""
        layer, weights = ff(hard_prob=1.0, temperature=0.0)
        x = normal(B, L, D)
        target = normal(B, L, D, seed=1)

        def loss(controller):
            w = {**weights, 'controller': controller}
            (y,), _ = layer.apply(w, {}, (x,), rng=jax.random.key(0), mode=Mode.TRAIN)
            return (y * target).sum()

        def formula(controller):
            p = probabilities(controller, x)
            h = jax.nn.relu(x @ weights['in']['kernel_transposed'].T + weights['in']['bias'])
            d_mask = h * (target @ weights['out']['kernel'].T)  # (B, L, F), does not depend on m
            return (p.reshape(B, L, F) * d_mask).sum()

        got, wanted = (
            jax.grad(loss)(weights['controller']),
            jax.grad(formula)(weights['controller']),
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted
        )

    def test_hard_prob_is_the_share_of_hard_steps(self):
        layer, weights = ff(temperature=0.0)
        x = normal(1, 1, D)
        run = jax.vmap(lambda key: layer.apply(weights, {}, (x,), rng=key, mode=Mode.TRAIN)[0][0])
        y = run(jax.random.split(jax.random.key(0), 2000))
        (hard,), _ = layer.apply(weights, {}, (x,))
        share = (jnp.abs(y - hard).max((1, 2, 3)) < 1e-5).mean()
        assert abs(float(share) - 0.3) < 0.04

    def test_noise_changes_choices(self):
        layer, weights = ff(hard_prob=1.0, temperature=1.0)
        made = [
            layer.apply(weights, {}, (normal(B, L, D),), rng=jax.random.key(i), mode=Mode.TRAIN)[0][
                0
            ]
            for i in range(2)
        ]
        assert (made[0] != made[1]).any()

    def test_replay_takes_the_recorded_units(self):
        layer, weights = ff(hard_prob=1.0)
        x = normal(B, L, D)
        (y,), state = layer.apply(weights, {}, (x,), rng=jax.random.key(0), mode=Mode.RECORD)
        units = own(state, Decisions).values['units']
        assert (units.shape, units.dtype) == ((B, L, F // N), jnp.uint8)
        (again,), _ = layer.apply(weights, state, (x,), rng=jax.random.key(0), mode=Mode.REPLAY)
        np.testing.assert_array_equal(again, y)
        other = beside({}, Decisions({'units': (units + 1) % N}))
        (moved,), _ = layer.apply(weights, other, (x,), rng=jax.random.key(0), mode=Mode.REPLAY)
        assert (jnp.abs(moved - y) > 1e-3).any()

    @pytest.mark.parametrize('hard_prob', [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
    def test_gradient_in_a_reversible_stack(self, hard_prob):
        layer, _ = ff(hard_prob=hard_prob)
        block = tl.ReversibleSerial(
            tl.ReversibleHalfResidual(tl.Chunk(layer, 4)), tl.ReversibleSwap()
        )
        net = tl.ReversibleRepeat(block, 3)
        plain = tl.Repeat(tl.Serial(*block.layers, name=block.name), 3)
        x = (normal(B, L, D), normal(B, L, D, seed=1))
        weights, state = net.init(
            tuple(map(shape_dtype, ((B, L, D), (B, L, D)))), jax.random.key(0)
        )

        def loss(net, weights, mode):
            (a, b), _ = net.apply(weights, state, x, rng=jax.random.key(1), mode=mode)
            return (a * b).sum()

        got = jax.jit(jax.grad(functools.partial(loss, net, mode=Mode.TRAIN)))(weights)
        wanted = jax.jit(jax.grad(functools.partial(loss, plain, mode=Mode.RECORD)))(weights)
        for path, w in trees.flatten(wanted).items():
            np.testing.assert_allclose(
                trees.get(got, path), w, rtol=1e-4, atol=1e-4 * float(jnp.abs(w).max())
            )

    @pytest.mark.parametrize(
        ('make', 'message'),
        [
            (
                lambda: tl.SparseFF(100, 64),
                'block_size=64 does not divide d_ff=100: use block_size=50, or d_ff=128',
            ),
            (
                lambda: tl.SparseFF(64, 64, temperature=-1.0),
                'temperature must be at least 0, got -1.0',
            ),
            (
                lambda: tl.SparseFF(64, 64, temperature=float('nan')),
                'temperature must be at least 0',
            ),
            (lambda: tl.SparseFF(64, 64, hard_prob=1.5), 'hard_prob=1.5 is a probability'),
            (
                lambda: tl.SparseFF(64, 64, activation='softmax'),
                "activation='softmax' mixes the units",
            ),
            (lambda: tl.SparseFF(64, 0), 'block_size must be at least 1, got 0'),
        ],
    )
    def test_refuses(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_training_needs_a_key(self):
        layer, weights = ff()
        with pytest.raises(
            ValueError, match=r'SparseFF draws in training: pass rng=jax.random.key'
        ):
            layer.apply(weights, {}, (normal(B, L, D),), mode=Mode.TRAIN)


def probabilities(controller, x):
    c = x @ controller['in']['kernel'] @ controller['out']['kernel']
    return jax.nn.softmax(c.reshape(*x.shape[:-1], F // N, N))


def soft(weights, x):
    h = jax.nn.relu(x @ weights['in']['kernel_transposed'].T + weights['in']['bias'])
    mask = probabilities(weights['controller'], x).reshape(h.shape)
    return (h * mask) @ weights['out']['kernel'] + weights['out']['bias']


class TestMultiplicativeDense:
    @given(st.integers(1, 3), st.sampled_from((1, 2, 3, 4, 6, 12)), st.sampled_from((12, 24)))
    @settings(max_examples=6, deadline=None)
    def test_is_the_equation(self, length, n_modules, n_units):
        layer = tl.MultiplicativeDense(n_modules, n_units, bias_init=tl.Normal(1.0))
        x = normal(2, length, D)
        weights, _ = layer.init((shape_dtype(x.shape),), jax.random.key(0))
        (y,), _ = layer.apply(weights, {}, (x,))
        m, x = n_units // n_modules, np.asarray(x)
        weights = jax.tree.map(np.asarray, weights)
        wanted = np.zeros(y.shape)
        for s, j in np.ndindex(n_modules, m):
            kernel = weights['modules'][s] * weights['features'][j]
            wanted[..., s * m + j] = x @ kernel + weights['bias'][s * m + j]
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)

    def test_few_rows_are_as_many(self):
        layer = tl.MultiplicativeDense(3)  # of 4 features: 4 rows make the kernel
        x = normal(1, 8, D)
        weights, _ = layer.init((shape_dtype(x.shape),), jax.random.key(0))
        (y,), _ = layer.apply(weights, {}, (x,))
        one_by_one = [layer.apply(weights, {}, (x[:, i : i + 1],))[0][0] for i in range(8)]
        np.testing.assert_allclose(jnp.concatenate(one_by_one, 1), y, rtol=1e-5, atol=1e-6)

    @given(st.permutations(range(D)), st.sampled_from((1, 2, 3, 4, 6, 12)))
    @settings(max_examples=10, deadline=None)
    def test_represents_every_permutation(self, order, n_modules):
        """Feature i goes to place p = s·M + m where D[i, s] and E[i, m] are 1 and all else 0."""
        m = D // n_modules
        to = np.argsort(order)  # where each feature goes
        weights = {
            'modules': jnp.asarray(to // m == np.arange(n_modules)[:, None], jnp.float32),
            'features': jnp.asarray(to % m == np.arange(m)[:, None], jnp.float32),
        }
        x = normal(3, D)
        (y,), _ = tl.MultiplicativeDense(n_modules, use_bias=False).apply(weights, {}, (x,))
        np.testing.assert_array_equal(y, x[:, np.array(order)])

    def test_initial_variance_is_a_dense_layers(self):
        x = shape_dtype((4, 256))
        weights, _ = tl.MultiplicativeDense(16).init((x,), jax.random.key(0))
        kernel = weights['modules'][:, None] * weights['features']
        assert abs(float(kernel.var()) * 256 - 1) < 0.2

    def test_refuses(self):
        x = shape_dtype((2, 3, 12))
        message = 'n_modules=5 does not divide the width 12: use n_modules=4, or a width of 10'
        with pytest.raises(ValueError, match=message):
            tl.MultiplicativeDense(5).init((x,), jax.random.key(0))
        weights, _ = tl.MultiplicativeDense(4).init((x,), jax.random.key(0))
        with pytest.raises(
            ValueError, match='the input is 7 wide and the weights were made for 12'
        ):
            tl.MultiplicativeDense(4).apply(weights, {}, (normal(2, 7),))

    def test_head_cuts_what_the_last_module_has_too_much(self):
        head = tl.MultiplicativeHead(11, 4)
        x = normal(2, 5, D)
        weights, _ = head.init((shape_dtype(x.shape),), jax.random.key(0))
        assert weights['features'].shape == (3, D)
        (y,), _ = head.apply(weights, {}, (x,))
        wide = tl.multiplicative_dense(x, weights['modules'], weights['features'])
        np.testing.assert_array_equal(y, wide[..., :11])

    def test_low_rank(self):
        layer = tl.LowRankDense(7, 2)
        weights, _ = layer.init((shape_dtype((3, D)),), jax.random.key(0))
        assert trees.count(weights) == 2 * D + 2 * 7 + 7


def slow_conv(weights, x, s, size):
    """y[t, s] = Σ x[t − i, s + j] W[i, j] + b, by loops: one (B, L, D) for each output."""
    b, length, d = x.shape
    kernel, bias = np.asarray(weights['kernel'], np.float64), np.asarray(weights['bias'])
    m, n = d // s, len(bias)
    x = np.asarray(x, np.float64).reshape(b, length, s, m)
    y = np.zeros((b, length, s, n * m)) + bias.reshape(-1)
    for t, module, i, j in np.ndindex(length, s, *size):
        before, beside = t - (size[0] - 1 - i), module + j - (size[1] - 1) // 2
        if before >= 0 and 0 <= beside < s:
            y[:, t, module] += x[:, before, beside] @ kernel[i, j]
    return [y.reshape(b, length, s, n, m)[..., k, :].reshape(b, length, d) for k in range(n)]


class TestLocalConv:
    @pytest.mark.parametrize('size', [(3, 3), (1, 1), (2, 4), (4, 2)])
    def test_is_the_equation_and_decodes(self, size):
        layer = tl.LocalConv(4, size, n_outputs=2, bias_init=tl.Normal(1.0))
        x = normal(B, L, D)
        weights, _ = layer.init((shape_dtype(x.shape),), jax.random.key(0))
        made, _ = layer.apply(weights, {}, (x,))
        for got, wanted in zip(made, slow_conv(weights, x, 4, size), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        state = init_state(layer, shape_dtype(x.shape))
        parts = []
        for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6)):
            outputs, state = layer.apply(weights, state, (x[:, start:stop],), mode=Mode.PREDICT)
            parts.append(outputs)
        for k in range(2):
            got = jnp.concatenate([part[k] for part in parts], 1)
            np.testing.assert_allclose(got, made[k], rtol=1e-5, atol=1e-5)

    def test_sees_nothing_later(self):
        layer = tl.LocalConv(4)
        x = normal(1, L, D)
        weights, _ = layer.init((shape_dtype(x.shape),), jax.random.key(0))
        (y,), _ = layer.apply(weights, {}, (x,))
        (moved,), _ = layer.apply(weights, {}, (x.at[:, 4:].add(1.0),))
        np.testing.assert_array_equal(moved[:, :4], y[:, :4])
        assert (moved[:, 4] != y[:, 4]).any()

    def test_refuses(self):
        with pytest.raises(ValueError, match=r'kernel_size must be at least 1, got \(0, 3\)'):
            tl.LocalConv(4, (0, 3))
        with pytest.raises(ValueError, match='n_modules=5 does not divide the width 12'):
            tl.LocalConv(5).init((shape_dtype((1, 4, 12)),), jax.random.key(0))


@pytest.mark.skipif(not has_kernels(1), reason='no kernels here')
@pytest.mark.parametrize(
    'layer',
    [
        tl.SparseFF(F, N, bias_init=tl.Normal(0.3)),
        tl.MultiplicativeDense(4),
        tl.MultiplicativeHead(11, 3),
        tl.LocalConv(4, n_outputs=2, bias_init=tl.Normal(1.0)),
        tl.LayerNorm(),
        tl.RMSNorm(),
        tl.SelfAttention(2),
        tl.LSHSelfAttention(2, chunk_len=2, n_buckets=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_one_position_by_kernels_is_as_without(layer):
    x = normal(2, 1, D)
    weights, _ = layer.init((shape_dtype((2, L, D)),), jax.random.key(0))
    state = init_state(layer, shape_dtype((2, L, D)))
    if isinstance(layer, (tl.SelfAttention, tl.LSHSelfAttention)):
        _, state = layer.apply(weights, state, (normal(2, 5, D),), mode=Mode.PREDICT)

    def loss(weights, x):
        outputs, _ = layer.apply(weights, state, (x,), mode=Mode.PREDICT)
        return sum(jnp.sin(y).sum() for y in outputs)

    def results():
        made = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(weights, x)
        return 'layercomb_' in made.as_text(), made.compile()(weights, x)

    has_kernels, by_kernels = results()
    with layercomb_kernels.off():
        still_has, plain = results()
    assert has_kernels and not still_has
    for got, wanted in zip(*map(jax.tree.leaves, (by_kernels, plain)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


KINDS = {
    'dense': tl.SelfAttention(2, rotary=tl.RotaryPositions()),
    'masked': tl.SelfAttention(2, masked=True),
    'local': tl.LocalSelfAttention(2, 4),
    'lsh': tl.LSHSelfAttention(2, chunk_len=4, n_buckets=4, rotary=tl.RotaryPositions()),
}


class TestSparseQKVAttention:
    @pytest.mark.parametrize(
        'kind',
        ['masked', 'lsh', *(pytest.param(k, marks=pytest.mark.slow) for k in ('dense', 'local'))],
    )
    def test_decodes_and_is_causal_around_any_core(self, kind):
        layer = tl.sparse_qkv(KINDS[kind], 4)
        x = normal(B, L, D)
        inputs = (x, jnp.ones((B, L), bool))[: layer.n_in]
        weights, _ = layer.init(tuple(map(jax.typeof, inputs)), jax.random.key(0))
        (whole,), _ = jax.jit(layer.apply)(weights, {}, inputs)
        (moved,), _ = jax.jit(layer.apply)(weights, {}, (x.at[:, 4:].add(1.0), *inputs[1:]))
        np.testing.assert_allclose(moved[:, :4], whole[:, :4], atol=1e-6)
        state = init_state(layer, inputs)
        parts = []
        for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6)):
            piece = tuple(v[:, start:stop] for v in inputs)
            (y,), state = layer.apply(weights, state, piece, mode=Mode.PREDICT)
            parts.append(y)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)

    def test_is_its_equation(self):
        layer = tl.SparseQKVAttention(2, 4)
        x = normal(B, L, D)
        weights, _ = layer.init((shape_dtype(x.shape),), jax.random.key(0))
        (got,), _ = layer.apply(weights, {}, (x,))
        (mixed,), _ = layer.mix.apply(weights['mix'], {}, (x,))
        q, k, v = (
            y.reshape(B, L, 2, D // 2).swapaxes(1, 2)
            for y in slow_conv(weights['project']['local_conv'], mixed, 4, (3, 3))
        )
        s = np.where(
            np.tril(np.ones((L, L), bool)), q @ k.swapaxes(2, 3) / np.sqrt(D // 2), -np.inf
        )
        p = np.exp(s - s.max(-1, keepdims=True))
        y = (p / p.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(B, L, D)
        out = tl.MultiplicativeDense(4)
        (wanted,), _ = out.apply(
            weights['output']['multiplicative_dense'], {}, (jnp.asarray(y, jnp.float32),)
        )
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)

    def test_keeps_what_attends(self):
        lsh = KINDS['lsh'].replace(name='near')
        layer = tl.sparse_qkv(lsh, 4)
        assert (layer.core, layer.rotary, layer.name) == (lsh.core, lsh.rotary, 'near')
        assert tl.sparse_qkv(layer, 2) is layer

    def test_refuses(self):
        with pytest.raises(TypeError, match='CrossAttention cannot have sparse projections'):
            tl.sparse_qkv(tl.CrossAttention(2))
        with pytest.raises(ValueError, match='d_head=3 cannot be kept: leave it out'):
            tl.sparse_qkv(tl.SelfAttention(2, d_head=3))
        with pytest.raises(ValueError, match='5 heads do not divide the width 12: use 4'):
            tl.SparseQKVAttention(5, 4).init((shape_dtype((1, 4, 12)),), jax.random.key(0))
