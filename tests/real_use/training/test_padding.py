"""Padding of loss weight 0 changes nothing that a model learns from: rows and columns of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import losses, models, tl, transforms
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.metrics.metric import weighted_sum
from layercomb.layers.state.counted import Counted, count_only
from layercomb.losses import total as aux_loss
from layercomb.models.terraformer import AfterMemory

B, L, D, V, E = 3, 8, 8, 16, 4
LOSS = tl.CrossEntropyLoss()
FF = tl.SwitchFF(12, E, balance=1.0)
MANY = tl.MixtureFF(32, 8, 2, balance=0.5)
NORM = tl.BatchNorm(momentum=0.5)


def batch():
    """Tokens, targets and weights, of which some are 0 in the middle."""
    r = np.random.default_rng(0)
    x, y = r.integers(1, V, (2, B, L)).astype(np.int32)
    w = np.ones((B, L), np.float32)
    w[1, 2], w[2, 0], w[0, 5] = 0, 0, 2
    return x, y, w


def padded(arrays, rows=2, columns=6):
    """The same with padding behind it: token 0 of weight 0."""
    return tuple(np.pad(a, ((0, rows), (0, columns))) for a in arrays)


def measured(net, arrays, chunk_len=None):
    """Loss, new state and gradients, as a step of a `Loop` has them."""
    scored = losses.attach(net, LOSS, chunk_len)
    arrays = tuple(map(jnp.asarray, arrays))
    weights, state = net.init(lc.signature_of(arrays[: net.n_in]), jax.random.key(0))

    def mean(weights):
        rng = jax.random.key(1)
        (values, w), new = losses.apply_counted(scored, weights, state, arrays, arrays[-1], rng=rng)
        total, weight = weighted_sum(values, w)
        aux = aux_loss(new)
        return total / jnp.maximum(weight, 1) + (0 if aux is None else aux), new

    (value, new), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(weights)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    return value, new, grads


def assert_close(ours, wanted, tolerance=2e-5):
    def compare(a, b):
        assert np.isfinite(a).all()
        scale = np.abs(b).max(initial=1e-3)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)

    jax.tree.map(compare, ours, wanted)


def lm(*body):
    return tl.Serial(tl.Embedding(V, D), *body, tl.Dense(V))


def half(*layers):
    return tl.ReversibleHalfResidual(*layers)


def streams(stack):
    return lm(tl.Dup(), stack, tl.Add())


NETS = {
    'in series': lambda: lm(FF),
    'in a residual': lambda: lm(tl.Residual(tl.LayerNorm(), FF)),
    'behind causal attention': lambda: lm(tl.Residual(tl.SelfAttention(2, causal=True)), FF),
    'repeated': lambda: lm(tl.Repeat(tl.Residual(FF), 3)),
    'repeated, one set of weights': lambda: lm(tl.Repeat(tl.Residual(FF), 2, shared=True)),
    'repeated twice': lambda: lm(tl.Repeat(tl.Repeat(tl.Residual(FF), 2), 2)),
    'in pieces': lambda: lm(tl.Chunk(tl.Residual(FF), 3)),
    'in pieces of pieces': lambda: lm(tl.Chunk(tl.Chunk(FF, 2), 5)),
    'mapped': lambda: lm(tl.Dup(), tl.Map(FF, 2), tl.Add()),
    'computed again': lambda: lm(tl.Repeat(tl.Remat(tl.Residual(FF)), 2)),
    'tied': lambda: transforms.Tied(
        tl.Serial(tl.Embedding(V, D), FF, tl.Dense(V, name='head')),
        'embedding/table',
        'head/kernel',
        jnp.transpose,
    ),
    'reversible repeat': lambda: streams(
        tl.ReversibleRepeat(tl.ReversibleSerial(half(tl.LayerNorm(), FF), tl.ReversibleSwap()), 3)
    ),
    'reversible repeat, one set of weights': lambda: streams(
        tl.ReversibleRepeat(half(FF), 2, shared=True)
    ),
    'reversible in series': lambda: streams(
        tl.ReversibleSerial(half(FF), tl.ReversibleSwap(), half(tl.Dense(D)))
    ),
    'reversible, before the last': lambda: streams(tl.ReversibleSerial(half(FF, tl.Dense(D)))),
    'reversible, in pieces': lambda: streams(
        tl.ReversibleRepeat(
            tl.ReversibleSerial(half(tl.Chunk(tl.Serial(FF, tl.Dense(D)), 3)), tl.ReversibleSwap()),
            2,
        )
    ),
    'reversible, repeated inside': lambda: streams(
        tl.ReversibleRepeat(half(tl.Repeat(tl.Residual(FF), 2)), 2)
    ),
    'several experts': lambda: lm(tl.Repeat(tl.Residual(MANY), 2)),
    'several experts, reversible': lambda: streams(
        tl.ReversibleRepeat(tl.ReversibleSerial(half(MANY), tl.ReversibleSwap()), 2)
    ),
    'batch norm': lambda: lm(NORM),
    'batch norm, repeated': lambda: lm(tl.Repeat(tl.Residual(NORM, tl.Dense(D)), 3)),
    'batch norm, mapped': lambda: lm(tl.Dup(), tl.Map(NORM, 2), tl.Add()),
    'batch norm, reversible': lambda: streams(
        tl.ReversibleRepeat(tl.ReversibleSerial(half(NORM, tl.Dense(D)), tl.ReversibleSwap()), 2)
    ),
    'both': lambda: lm(NORM, tl.Residual(FF), NORM),
}


# Nestings whose parts are tried by themselves as well.
SLOW = {
    'reversible, in pieces',
    'repeated twice',
    'in pieces of pieces',
    'reversible, repeated inside',
}


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NETS]
)
def test_padding_changes_neither_loss_nor_gradient_nor_statistics(name):
    net = NETS[name]()
    assert_close(measured(net, padded(batch())), measured(net, batch()))


@pytest.mark.parametrize('rows, columns', [(2, 0), pytest.param(0, 6, marks=pytest.mark.slow)])
def test_padding_of_rows_or_columns_alone(rows, columns):
    net = lm(NORM, tl.Chunk(FF, 3))
    assert_close(measured(net, padded(batch(), rows, columns)), measured(net, batch()))


def test_padding_of_a_model_computed_in_bfloat16():
    net = lc.cast(lm(NORM, tl.Residual(FF)))
    assert_close(measured(net, padded(batch())), measured(net, batch()), 1e-2)


def test_padding_of_an_unstacked_model():
    net, _ = transforms.unstack(lm(tl.Repeat(tl.Residual(NORM, FF), 2)), {})
    assert_close(measured(net, padded(batch())), measured(net, batch()))


def test_padding_with_logits_in_pieces():
    head = tl.Serial(FF, tl.Dense(V), name='head')
    net = tl.Serial(tl.Embedding(V, D), NORM, tl.LayerNorm(), head)
    assert_close(measured(net, padded(batch()), chunk_len=3), measured(net, batch(), chunk_len=3))


def test_what_is_inside_pieces_gets_the_same_gradient_in_one_pass():
    """`one_pass` of `Chunk`, against autodiff of `apply`, where pieces count differently."""
    net, x = (
        tl.Chunk(tl.Serial(FF, tl.Dense(D)), 3),
        jax.random.normal(jax.random.key(2), (B, L, D)),
    )
    weights, state = net.init((x,), jax.random.key(0))
    counted = jnp.arange(L) < jnp.array([[8], [4], [1]])
    state = losses.put_counted(state, losses._given(net, counted))
    ct = jax.random.normal(jax.random.key(3), x.shape)

    def total(weights, x):
        (y,), new = net.apply(weights, state, (x,), mode=Mode.TRAIN)
        return (ct * y).sum() + 3 * aux_loss(new)

    @jax.jit
    def in_one_pass(weights, x):
        state_cts = {'switch_ff': {'aux_loss': tl.AuxLoss(jnp.float32(3))}}
        return tl.one_pass(net, weights, state, (x,), (ct,), state_cts=state_cts)[1:]

    wanted = jax.jit(jax.grad(total, (0, 1)))(weights, x)
    (d_x,), d_weights = in_one_pass(weights, x)
    assert_close((d_weights, d_x), wanted)


def switch_balance(kernel, x, w):
    """E · Σₑ share[e] · mean[e] over the positions whose weight is not 0, in float64."""
    rows = np.asarray(x, np.float64)[np.asarray(w) != 0]
    scores = rows @ np.asarray(kernel, np.float64)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    share = np.bincount(p.argmax(-1), minlength=E) / len(rows)
    return E * (share * p.mean(0)).sum()


def test_a_mixtures_balance_and_its_gradient_are_those_of_the_positions_that_count():
    x, w = jax.random.normal(jax.random.key(0), (B, L, D)), batch()[2]
    weights, state = FF.init((x,), jax.random.key(1))
    kernel = weights['router']['kernel']

    def balance(kernel):
        given = {**weights, 'router': {'kernel': kernel}}
        return losses.apply_counted(FF, given, state, (x,), w)[1]['aux_loss'].value

    value, gradient = jax.value_and_grad(balance)(kernel)
    assert float(value) == pytest.approx(switch_balance(kernel, x, w), rel=1e-5)
    assert abs(float(value) - switch_balance(kernel, x, np.ones((B, L)))) > 1e-3
    kernel, step = np.asarray(kernel, np.float64), 1e-6
    for at in np.ndindex(D, E):
        up, down = kernel.copy(), kernel.copy()
        up[at], down[at] = up[at] + step, down[at] - step
        slope = (switch_balance(up, x, w) - switch_balance(down, x, w)) / (2 * step)
        assert float(gradient[at]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_the_pieces_of_a_chunk_weigh_by_the_positions_that_count():
    x, w = jax.random.normal(jax.random.key(0), (2, 7, D)), np.ones((2, 7), np.float32)
    w[0, 1], w[:, 4] = 0, 0  # 5, 4 and 2 count in pieces of 3, 3 and 1
    weights, state = FF.init((x,), jax.random.key(1))
    _, new = losses.apply_counted(tl.Chunk(FF, 3), weights, state, (x,), w)
    kernel = weights['router']['kernel']
    pieces = [switch_balance(kernel, x[:, a:b], w[:, a:b]) for a, b in ((0, 3), (3, 6), (6, 7))]
    assert float(new['aux_loss'].value) == pytest.approx(np.dot(pieces, [5, 4, 2]) / 11, rel=1e-5)


def test_statistics_of_batch_norm_are_those_of_the_positions_that_count():
    x, w = jax.random.normal(jax.random.key(0), (B, L, D)), batch()[2]
    x = x.at[1, 2].set(1e6)  # padding may hold anything
    weights, state = NORM.init((x,), jax.random.key(1))
    (y,), new = losses.apply_counted(NORM, weights, state, (x,), w)
    rows = np.asarray(x, np.float64)[w != 0]
    mean, var = rows.mean(0), rows.var(0)
    np.testing.assert_allclose(new['mean'], 0.5 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new['var'], 0.5 + 0.5 * var, rtol=1e-5)
    wanted = (np.asarray(x, np.float64) - mean) / np.sqrt(var + NORM.epsilon)  # padding too
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    d_x = jax.grad(
        lambda x: jnp.square(
            losses.apply_counted(NORM, weights, state, (x,), w)[0][0] * w[..., None] - 1
        ).sum()
    )(x)
    assert not d_x[1, 2].any() and d_x[1, 3].any()


@pytest.mark.parametrize('layer', [NORM, FF, MANY])
def test_where_every_position_counts_nothing_changes(layer):
    x = jax.random.normal(jax.random.key(0), (B, L, D))
    weights, state = layer.init((x,), jax.random.key(1))

    def run(weights, x, w):
        if w is None:
            (y,), new = layer.apply(weights, state, (x,), mode=Mode.TRAIN)
        else:
            (y,), new = losses.apply_counted(layer, weights, state, (x,), w)
        return jnp.sin(y).sum() + (0 if aux_loss(new) is None else aux_loss(new)), (y, new)

    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    ours, plain = run(weights, x, jnp.ones((B, L))), run(weights, x, None)
    assert_close(ours, plain, 1e-6)  # only a division is by another program's number


@pytest.mark.parametrize('name', ['both', 'in pieces', 'several experts', 'batch norm, reversible'])
def test_a_batch_of_padding_alone_teaches_nothing(name):
    net = NETS[name]()
    x, y, w = batch()
    value, new, grads = measured(net, (x, y, 0 * w))
    assert float(value) == 0
    assert all(not g.any() for g in jax.tree.leaves(grads))
    before = net.init(lc.signature_of((x,)), jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, new, before)


def test_rows_that_fill_the_last_batch_of_an_epoch_do_not_count():
    grain_data = pytest.importorskip('layercomb.data')
    examples = [tuple(a[i] for a in batch()) for i in range(B)]
    (last,) = grain_data.batches(examples, 4, shuffle=False, num_epochs=1)
    assert last[0].shape == (4, L) and not last[2][B:].any()
    net = NETS['both']()
    assert_close(measured(net, last), measured(net, batch()))


def test_images_have_one_weight_a_row():
    net = models.RevNet(n_classes=3, widths=(4, 8), n_blocks=1, norm=NORM)
    r = np.random.default_rng(0)
    x = r.normal(size=(3, 8, 8, 3)).astype(np.float32)
    arrays = x, np.array([0, 2, 1], np.int32), np.ones(3, np.float32)
    filled = tuple(np.pad(a, ((0, 2),) + ((0, 0),) * (a.ndim - 1)) for a in arrays)
    assert_close(measured(net, filled), measured(net, arrays), 1e-4)


def test_where_positions_are_others_a_row_counts_if_one_of_its_weights_is_not_0():
    x, w = np.zeros((3, 5, D), np.float32), np.array([[1, 0, 0], [0, 0, 0], [0, 2, 0]])
    for shape, wanted in (
        ((3, 3, D), w != 0),
        ((3, 5, D), np.tile([[True], [False], [True]], 5)),  # of another length
        ((3, D), [True, False, True]),  # pooled
        ((3, 3, 2, D), np.repeat((w != 0)[..., None], 2, 2)),
        ((6, D), None),  # rows that are not the batch's
    ):
        _, found = tl.counted_positions(count_only({}, jnp.asarray(w) != 0), jnp.zeros(shape))
        assert (found is None) if wanted is None else np.array_equal(found, wanted)
    rows = count_only({}, jnp.array([True, False, True]))  # a weight a row
    assert np.array_equal(tl.counted_positions(rows, jnp.asarray(x))[1].sum(1), [5, 0, 5])


def test_an_encoder_counts_all_of_a_row_that_counts():
    """The source is as long as the targets here, but their weights say nothing about it."""
    encoder = tl.Serial(tl.Embedding(V, D), NORM, tl.Mean(), name='encoder')
    net = tl.Serial(tl.Once(encoder), tl.Drop(), lm(), name='net')
    x, y, w = batch()
    source = np.random.default_rng(1).integers(1, V, (B, L)).astype(np.int32)
    _, new, _ = measured(net, padded((source, x, y, w), columns=0))
    table = net.init(lc.signature_of((source, x)), jax.random.key(0))[0]
    table = np.asarray(table['encoder']['embedding']['table'], np.float64)
    mean = table[source].mean((0, 1))
    np.testing.assert_allclose(new['encoder']['batch_norm']['mean'], 0.5 * mean, rtol=1e-4)


@pytest.mark.parametrize('masked', [False, True])
def test_behind_a_memory_its_real_positions_count_and_padding_does_not(masked):
    net = AfterMemory(NORM, masked=False) if not masked else AfterMemory(
        tl.Serial(tl.Select([0], n_in=2), NORM), masked=True
    )  # fmt: skip
    memory, x = jax.random.normal(jax.random.key(0), (2, B, 4, D))
    real = jnp.arange(4) < jnp.array([[4], [2], [3]])
    w = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], np.float32)
    inputs = (memory, x, real) if masked else (memory, x)
    weights, state = net.init(lc.signature_of(inputs), jax.random.key(0))
    _, new = losses.apply_counted(net, weights, state, inputs, w)
    real = np.asarray(real) if masked else np.ones((B, 4), bool)
    rows = np.concatenate([np.asarray(memory)[:2][real[:2]], np.asarray(x)[w != 0]])
    found = new['batch_norm'] if masked else new
    np.testing.assert_allclose(found['mean'], 0.5 * rows.mean(0), rtol=1e-5, atol=1e-6)


class Size(Layer):
    """A layer of one's own: its auxiliary loss is the mean square of what counts."""

    position_wise = True
    counts_positions = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {}, {'aux_loss': tl.AuxLoss(jnp.zeros(()))}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        state, counted = tl.counted_positions(state, x)
        counted = jnp.ones(x.shape[:-1], bool) if counted is None else counted
        n = jnp.maximum(counted.sum(dtype=x.dtype), 1) * x.shape[-1]
        loss = jnp.where(counted[..., None], jnp.square(x), 0).sum() / n
        return inputs, {'aux_loss': tl.AuxLoss(loss)}


class Watcher(Layer):
    """A layer of one's own that has no state, and tells what it is given."""

    position_wise = True
    counts_positions = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        assert all(isinstance(value, Counted) for value in state.values())
        return inputs, state


def test_a_layer_of_ones_own_may_ask_which_positions_count():
    for net in (lm(Size()), lm(tl.Chunk(Size(), 3)), lm(tl.Repeat(Size(), 2))):
        assert_close(measured(net, padded(batch())), measured(net, batch()))
    for net in (lm(Watcher()), lm(tl.Repeat(Watcher(), 2)), lm(tl.Chunk(Watcher(), 3))):
        assert measured(net, batch())[1] == {}  # and what it leaves does not stay


def test_a_layer_that_does_not_ask_is_averaged_by_length_beside_one_that_does():
    class Plain(Size):
        counts_positions = False

    x, w = jax.random.normal(jax.random.key(0), (2, 5, D)), np.ones((2, 5), np.float32)
    w[:, 0] = 0
    net = tl.Chunk(tl.Serial(Plain(), Size()), 2)
    _, state = net.init((x,), jax.random.key(0))
    _, new = losses.apply_counted(net, {}, state, (x,), w)
    assert float(new['plain']['aux_loss'].value) == pytest.approx(np.square(x).mean(), rel=1e-5)
    assert float(new['size']['aux_loss'].value) == pytest.approx(
        np.square(x[:, 1:]).mean(), rel=1e-5
    )


def test_outside_of_training_nothing_is_given():
    net, x = tl.Serial(Watcher()), jnp.ones((2, 3, D))
    for mode in (Mode.EVAL, Mode.PREDICT):
        _, state = losses.apply_counted(net, {}, {}, (x,), jnp.zeros((2, 3)), mode=mode)
        assert state == {}


def test_a_model_that_averages_over_no_positions_is_the_same_program_as_ever():
    net = losses.attach(lm(tl.Chunk(tl.Residual(tl.Dense(D)), 3), tl.Repeat(tl.Dense(D), 2)), LOSS)
    arrays = tuple(map(jnp.asarray, batch()))
    weights, state = net.init(lc.signature_of(arrays), jax.random.key(0))

    def ours(*arrays):
        return losses.apply_counted(net, weights, state, arrays, arrays[-1])

    def plain(*arrays):
        return net.apply(weights, state, arrays, mode=Mode.TRAIN)

    assert str(jax.make_jaxpr(ours)(*arrays)) == str(jax.make_jaxpr(plain)(*arrays))


class Looping(tl.Wrapper):
    """A layer of somebody's own that scans over its state and knows of nothing else in it."""

    n: int = 3

    def init(self, signature, rng, mode=Mode.TRAIN):
        return jax.vmap(lambda k: self.layer.init(signature, k, mode))(
            jax.random.split(rng, self.n)
        )

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        def step(values, xs):
            return self.layer.apply(*xs, values, rng=rng, mode=mode)

        return jax.lax.scan(step, tuple(inputs), (weights, state))


class Telling(Looping):
    """The same, which hands on which positions count."""

    carries_counted = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        state, counted = tl.take_counted(state)

        def step(values, xs):
            its_weights, its_state = xs
            values, new = self.layer.apply(
                its_weights, tl.put_counted(its_state, counted), values, rng=rng, mode=mode
            )
            return values, tl.take_counted(new)[0]

        return jax.lax.scan(step, tuple(inputs), (weights, state))


class Holding(lc.Layer):
    """A layer of somebody's own around another, neither combinator nor wrapper."""

    inner: lc.Layer

    @property
    def sublayers(self):
        return (self.inner,)

    def init(self, signature, rng, mode=Mode.TRAIN):
        weights, state = self.inner.init(signature, rng, mode)
        return {'a': weights}, {'a': state}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        outputs, new = self.inner.apply(weights['a'], state['a'], inputs, rng=rng, mode=mode)
        return outputs, {'a': new}


@pytest.mark.parametrize('rows', [3, 4], ids=['as many rows as blocks', 'other rows'])
@pytest.mark.parametrize('layer', [Looping(tl.BatchNorm()), Holding(tl.BatchNorm())])
def test_a_layer_of_ones_own_that_hands_nothing_on_trains_and_is_spoken_of(layer, rows, key):
    x = jax.random.normal(key, (rows, 5, 2))
    weights, state = layer.init(x, jax.random.key(1))
    plain, after = layer.apply(weights, state, (x,), mode=Mode.TRAIN)
    padding = jnp.ones((rows, 5)).at[:, 3:].set(0)
    with pytest.warns(lc.errors.UsageWarning, match='holds BatchNorm, .*: set carries_counted'):
        made, new = losses.apply_counted(layer, weights, state, (x,), padding)
    assert jnp.array_equal(made[0], plain[0])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, new, after))


def test_a_layer_of_ones_own_that_hands_it_on_counts_as_repeat_does(key):
    x = jax.random.normal(key, (4, 5, 2))
    padding = jnp.ones((4, 5)).at[:, 3:].set(0)
    made = []
    for layer in (Telling(tl.BatchNorm()), tl.Repeat(tl.BatchNorm(), 3)):
        weights, state = layer.init(x, jax.random.key(1))
        made.append(losses.apply_counted(layer, weights, state, (x,), padding))
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Handing(Holding):
    """The same, which says under which key its layer lies and hands on its state as it is."""

    carries_counted = True

    @property
    def children(self):
        return (('a', self.inner),)


class Beside(tl.Wrapper):
    """A wrapper of somebody's own with a second layer beside the one inside."""

    carries_counted = True
    side: lc.Layer

    def init(self, signature, rng, mode=Mode.TRAIN):
        made = self.layer.init(signature, rng, mode), self.side.init(signature, rng, mode)
        return tuple({**inner, 'side': side} for inner, side in zip(*made, strict=True))

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        values, _ = self.layer.apply(weights, {}, inputs, rng=rng, mode=mode)
        values, new = self.side.apply(weights['side'], state['side'], values, rng=rng, mode=mode)
        return values, {**state, 'side': new}


@pytest.mark.parametrize(
    'layer', [Handing(tl.BatchNorm()), Beside(tl.Relu(), tl.BatchNorm())], ids=['holder', 'beside']
)
def test_layers_that_any_class_hands_it_on_to_count(layer, key):
    x = jnp.abs(jax.random.normal(key, (4, 5, 2)))
    padding = jnp.ones((4, 5)).at[:, 3:].set(0)
    made = []
    for net in (layer, tl.BatchNorm()):
        weights, state = net.init(x, jax.random.key(1))
        made.append(losses.apply_counted(net, weights, state, (x,), padding))
    for a, b in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_an_auxiliary_loss_that_was_nan_once_is_forgotten_by_pieces(key):
    x = jax.random.normal(key, (2, 6, 4))
    for net in (tl.Chunk(tl.SwitchFF(8, 2), 3), tl.Map(tl.SwitchFF(8, 2), 1)):
        weights, state = net.init(x, jax.random.key(1))
        spoilt = jax.tree.map(lambda v: v + jnp.nan, state)
        _, new = net.apply(weights, spoilt, (x,), rng=key, mode=Mode.TRAIN)
        assert jnp.isfinite(aux_loss(new))


@pytest.mark.parametrize('shape', [(), (3,), (3, 5)])
def test_loss_weights_of_other_rows_are_refused(shape, key):
    x = jax.random.normal(key, (4, 5, 2))
    weights, state = tl.BatchNorm().init(x, jax.random.key(1))
    with pytest.raises(ValueError, match=r'loss weights .* give a weight for each row'):
        losses.apply_counted(tl.BatchNorm(), weights, state, (x,), jnp.ones(shape))
