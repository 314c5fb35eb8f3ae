"""Adapters of low rank: a leaf beside its dense formula, whole models, and what does not fit."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layercomb import Model, capture, models, optimizers, summary, tl, transforms, trees
from layercomb.layers.attention import multihead
from layercomb.layers.basic.dense import matmul
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized import pieces
from layercomb.shapes import shape_dtype
from layercomb.supervised import Loop, TrainTask, decoding

TOKENS = (shape_dtype((2, 40), 'int32'),)


def values(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def moved(weights, by=0.3):
    """Weights whose adapters are no longer those of the start: B is not zero."""

    def one(path, x):
        return x + by * values(*x.shape, seed=len(path)) if transforms.is_lora(path) else x

    return trees.map_with_path(one, weights)


def assert_close(got, wanted, tolerance=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        size = max(float(np.abs(b).max(initial=0)), 1)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size)


# One leaf beside its formula, written out with dense matrices.

LEAVES = {
    'dense': tl.Dense(6),
    'gated': tl.GatedDense(6, use_bias=True),
    'split': tl.SplitHeads(2, 3),
    'merge': tl.MergeHeads(),
}


def leaf_inputs(name, length):
    if name == 'merge':
        return values(2, 2, length, 4), values(2, length, 6, seed=1)
    return (values(2, length, 8),)


def formula(layer, weights, x, leaf, narrow=None):
    """y = c ⊙ (x (W + s A B)) + b, where c are norms from the magnitudes for DoRA."""
    s = layer.alpha / (layer.rank**0.5 if layer.rank_stabilized else layer.rank)

    def matrix(name):
        w = weights[name] if narrow is None else narrow[name]
        i = weights[f'{name}_lora_a'].ndim - 1
        w = w + s * jnp.tensordot(weights[f'{name}_lora_a'], weights[f'{name}_lora_b'], 1)
        if not layer.dora:
            return w
        norms = jax.lax.stop_gradient(jnp.sqrt((w**2).sum(tuple(range(i)))))
        return w * (weights[f'{name}_lora_magnitude'] / norms)

    if leaf == 'gated':
        gate, up = (x @ matrix(n) + weights[f'{n}_bias'] for n in ('gate', 'up'))
        return jax.nn.silu(gate) * up
    if leaf == 'split':
        y = jnp.einsum('bld,dhk->bhlk', x, matrix('kernel'))
        return y + weights['bias'][:, None]
    if leaf == 'merge':
        return jnp.einsum('bhlk,hkd->bld', x, matrix('kernel')) + weights['bias']
    return x @ matrix('kernel') + weights['bias']


@pytest.fixture
def small_pieces(monkeypatch):
    """So few weights are wide at a time that there are several pieces, and a rest."""
    monkeypatch.setattr(pieces, 'ON_CPU', 16)


@pytest.mark.parametrize(
    ('leaf', 'bits', 'how'),
    [
        ('dense', None, 'plain'),
        ('dense', 16, 'dora'),
        ('gated', None, 'stabilized'),
        ('gated', 4, 'plain'),
        ('split', None, 'dora'),
        ('split', 8, 'plain'),
        ('merge', None, 'plain'),
        ('merge', 4, 'dora'),
    ],
)
def test_a_leaf_and_its_gradients_are_those_of_the_formula(leaf, bits, how, small_pieces):
    layer, inputs = LEAVES[leaf], leaf_inputs(leaf, 20)  # 40 rows: more than a kernel takes
    if bits:
        layer = transforms.Quantized(layer, bits, 4, smallest=1)
    layer = transforms.LowRank(
        layer, 2, 3.0, dora=how == 'dora', rank_stabilized=how == 'stabilized'
    )
    weights, _ = layer.init(inputs, jax.random.key(0))
    assert_close(
        layer.apply(weights, {}, inputs)[0][0], layer.plain().apply(weights, {}, inputs)[0][0]
    )
    weights = moved(weights)
    narrow = None
    if bits:
        merged = layer.replace(dora=False).each(lambda m: m.wide(), weights)
        flat = {k: jnp.tensordot(weights[f'{k}_lora_a'], weights[f'{k}_lora_b'], 1) for k in merged}
        narrow = {k: merged[k] - layer.scale * flat[k] for k in merged}
    trained = None if bits is None else lambda path: transforms.is_lora(path) or 'bias' in path
    some, rest = trees.partition(weights, trained)

    def loss(some, x, f):
        return jnp.sin(f(trees.merge(some, rest), x)).sum()

    def run(weights, x):
        return layer.apply(weights, {}, (x, *inputs[1:]), mode=Mode.TRAIN)[0][0]

    def wanted(weights, x):
        return formula(layer, weights, x, leaf, narrow)

    got = jax.jit(lambda s, x: jax.value_and_grad(loss, (0, 1))(s, x, run))(some, inputs[0])
    assert_close(got, jax.value_and_grad(loss, (0, 1))(some, inputs[0], wanted), 3e-5)
    few = jax.tree.map(lambda x: x[:, :, :1] if x.ndim == 4 else x[:, :1], inputs)  # as in decoding
    y = layer.apply(weights, {}, few)[0][0]
    np.testing.assert_allclose(y, wanted(weights, few[0]), atol=2e-4)


def test_dropout_is_on_the_inputs_of_a_alone_and_the_same_backwards():
    layer = transforms.LowRank(tl.Dense(6, use_bias=False), 6, 6.0, dropout=0.5)
    weights = {'kernel': jnp.zeros((6, 6))}
    weights |= {f'kernel_lora_{x}': jnp.eye(6) for x in 'ab'}  # so y = drop(x)
    x = jnp.ones((50, 6))

    def run(x):
        return layer.apply(weights, {}, (x,), rng=jax.random.key(0), mode=Mode.TRAIN)[0][0]

    y, pull = jax.vjp(run, x)
    assert set(np.unique(y)) == {0, 2} and 100 < int((y == 0).sum()) < 200
    np.testing.assert_array_equal(pull(jnp.ones_like(y))[0], y)
    np.testing.assert_array_equal(layer.apply(weights, {}, (x,))[0][0], x)
    plain = {**weights, 'kernel': jnp.eye(6), 'kernel_lora_b': jnp.zeros((6, 6))}
    made = layer.apply(plain, {}, (x,), rng=jax.random.key(0), mode=Mode.TRAIN)[0][0]
    np.testing.assert_array_equal(made, x)
    with pytest.raises(ValueError, match=r'LowRank with dropout=0.5 draws in training: pass rng='):
        layer.apply(weights, {}, (x,), mode=Mode.TRAIN)


def test_a_cast_leaf_computes_in_bfloat16():
    layer = transforms.LowRank(transforms.Cast(tl.Dense(6)), 2, dora=True)
    x = values(20, 8)
    weights = moved(layer.init((x,), jax.random.key(0))[0])
    assert all(w.dtype == jnp.float32 for w in jax.tree.leaves(weights))
    y = layer.apply(weights, {}, (x.astype(jnp.bfloat16),), mode=Mode.TRAIN)[0][0]
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        y.astype(np.float32), formula(layer, weights, x, 'dense'), rtol=0.05, atol=0.05
    )


# A whole model.


def lm(**changes):
    given = {'n_layers': 2, 'n_heads': 4, 'n_kv_heads': 2, 'max_len': 64, 'tied': True}
    return models.Llama(64, 16, 24, **{**given, **changes})


@functools.cache
def made(bits=None, **options):
    """(plain layer, adapted layer, weights of the adapted one, tokens)."""
    net = lm()
    weights, _ = jax.jit(functools.partial(net.init, TOKENS))(jax.random.key(0))
    if bits:
        net, weights = transforms.quantize(net, weights, bits, 8, smallest=1)
    adapted, weights = transforms.lora(net, weights, 2, **options)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 64, TOKENS[0].shape), jnp.int32)
    return net, adapted, moved(weights), x


@functools.partial(jax.jit, static_argnums=0)
def logits(net, weights, x):
    return net.apply(weights, {}, (x,))[0][0]


@pytest.mark.parametrize(
    ('bits', 'options'),
    [
        (None, ()),
        (8, ('rank_stabilized',)),
        (4, ('dora',)),
    ],
)
def test_merged_is_unmerged(bits, options):
    net, adapted, weights, x = made(bits, **dict.fromkeys(options, True))
    wanted = logits(adapted, weights, x)
    plain, merged = transforms.merge(adapted, weights)
    assert transforms.without_lora(adapted) == net
    assert plain == (net if bits is None else tied_but_wide_inside(net))
    assert not any(map(transforms.is_lora, trees.flatten(merged)))
    np.testing.assert_allclose(logits(plain, merged, x), wanted, atol=1e-5)
    assert abs(wanted - logits(net, weights, x)).max() > 1e-2
    again, narrow = transforms.merge(adapted, weights, keep_narrow=True)
    assert again == net
    kernel = narrow['block']['feed_forward']['dense']['kernel']
    assert bits is None or kernel.dtype in ('uint32', 'uint8')
    assert transforms.merge(plain, merged) == (plain, merged)


def tied_but_wide_inside(net):
    """The quantized model with wide layers in its blocks."""
    inner = transforms.rewrite(
        net.layer,
        lambda path, layer: transforms.hold_wide(layer) if path.startswith('block') else layer,
        paths=True,
    )
    return net.with_sublayers((inner,))


def test_adapters_stand_beside_their_matrices():
    _net, adapted, weights, _x = made()
    names = {
        path: w.shape for path, w in trees.flatten(weights).items() if transforms.is_lora(path)
    }
    attention, ff = 'block/attention/self_attention/', 'block/feed_forward/'
    assert names == {
        f'{attention}query/kernel_lora_a': (2, 16, 2),
        f'{attention}query/kernel_lora_b': (2, 2, 4, 4),
        f'{attention}key/kernel_lora_a': (2, 16, 2),
        f'{attention}key/kernel_lora_b': (2, 2, 2, 4),
        f'{attention}value/kernel_lora_a': (2, 16, 2),
        f'{attention}value/kernel_lora_b': (2, 2, 2, 4),
        f'{attention}output/kernel_lora_a': (2, 4, 4, 2),
        f'{attention}output/kernel_lora_b': (2, 2, 16),
        **{f'{ff}gated_dense/{m}_lora_{w}': s for m in ('gate', 'up')
           for w, s in (('a', (2, 16, 2)), ('b', (2, 2, 24)))},
        f'{ff}dense/kernel_lora_a': (2, 24, 2),
        f'{ff}dense/kernel_lora_b': (2, 2, 16),
    }  # fmt: skip
    fresh, _ = jax.eval_shape(functools.partial(adapted.init, TOKENS), jax.random.key(0))
    assert trees.flatten(fresh).keys() == trees.flatten(weights).keys()
    assert {p: w.shape for p, w in trees.flatten(fresh).items() if transforms.is_lora(p)} == names
    narrow = made(8)[2]
    assert {p: w.shape for p, w in trees.flatten(narrow).items() if transforms.is_lora(p)} == names


def test_a_is_uniform_by_how_many_values_are_summed_and_b_is_zero():
    _, weights = transforms.lora(tl.Dense(8), {'kernel': values(400, 8)}, 16)
    a, b = weights['kernel_lora_a'], weights['kernel_lora_b']
    assert 0.0495 < a.max() <= 0.05 and -0.05 <= a.min() < -0.0495 and abs(a.mean()) < 1e-3
    assert not b.any()
    other = transforms.lora(tl.Dense(8), {'kernel': values(400, 8)}, 16, seed=1)[1]
    assert not (a == other['kernel_lora_a']).any()
    same = transforms.lora(tl.Dense(8), {'kernel': values(400, 8)}, 16)[1]
    np.testing.assert_array_equal(a, same['kernel_lora_a'])


def test_magnitudes_are_the_norms_of_the_columns():
    net, weights = transforms.quantize(tl.Dense(8), {'kernel': values(24, 8)}, 4, 8, smallest=1)
    net, made = transforms.lora(net, weights, dora=True)
    wide = net.replace(dora=False).each(lambda m: m.wide(), made)['kernel']
    np.testing.assert_allclose(
        made['kernel_lora_magnitude'], np.linalg.norm(wide, axis=0), rtol=1e-6
    )


def test_what_knows_layers_knows_adapted_ones():
    _net, adapted, weights, x = made()
    wanted = logits(adapted, weights, x)
    apart, weights_apart = transforms.unstack(adapted, weights)
    np.testing.assert_allclose(logits(apart, weights_apart, x), wanted, atol=1e-5)
    assert transforms.unstack_state(adapted, {}) == {}
    table = summary(adapted, TOKENS[0])
    assert '2 × LowRank(MergeHeads)' in table and '2 × LowRank(GatedDense)' in table
    assert '2 × LowRank(Quantized(SplitHeads))' in summary(made(8)[1], TOKENS[0])
    axes = transforms.axes(adapted, weights)
    output = 'block/attention/self_attention/output/kernel'
    assert (axes[f'{output}_lora_a'].spec, axes[f'{output}_lora_b'].spec) == ('HK->R', 'R->D')
    assert axes[f'{output}_lora_a'].stacked == 1
    found = capture(adapted, weights, {}, (x,), '*gated_dense')[1]
    assert found['block/feed_forward/gated_dense'].shape == (2, 2, 40, 24)
    cast = transforms.cast(adapted)
    assert 'LowRank(Cast(' in repr(cast) and jnp.isfinite(logits(cast, weights, x)).all()


def test_magnitudes_are_not_decayed():
    _, _, weights, _ = made(dora=True)
    decayed = trees.flatten(trees.decay_mask(weights))
    lora = {path: yes for path, yes in decayed.items() if transforms.is_lora(path)}
    assert all(yes != path.endswith('magnitude') for path, yes in lora.items()) and len(lora) == 21


def test_quantizing_afterwards_is_adapting_afterwards():
    _, adapted, weights, _ = made()
    net, narrow = transforms.quantize(adapted, weights, 8, 8, smallest=1)
    assert net == made(8)[1]
    assert_close(narrow, made(8)[2], 0)


def test_an_adapted_model_decodes_what_the_merged_one_finds_likely():
    _, adapted, weights, x = made()
    plain, merged = transforms.merge(adapted, weights)
    tokens = decoding.generate(Model(adapted, weights), x[:, :5], 4, temperature=0)
    whole = jnp.concatenate((x[:, :5], jnp.asarray(tokens, jnp.int32), x[:, 9:]), 1)
    likely = logits(plain, merged, whole).argmax(-1)[:, 4:8]
    np.testing.assert_array_equal(tokens, likely)


def test_a_tied_head_can_have_an_adapter_and_is_untied_when_merged():
    net = lm(n_layers=1)
    weights, _ = jax.jit(functools.partial(net.init, TOKENS))(jax.random.key(0))
    net, weights = transforms.quantize(net, weights, 8, 8, smallest=1)
    adapted, weights = transforms.lora(net, weights, 2, where='head')
    assert set(filter(transforms.is_lora, trees.flatten(weights))) == {
        'head/kernel_lora_a',
        'head/kernel_lora_b',
    }
    assert isinstance(adapted, transforms.Tied) and 'kernel' not in weights['head']
    weights, x = moved(weights), made()[3]
    plain, merged = transforms.merge(adapted, weights)
    assert not isinstance(plain, transforms.Tied)
    np.testing.assert_allclose(logits(plain, merged, x), logits(adapted, weights, x), atol=1e-5)


def test_tied_layers_share_an_adapter():
    net = tl.Serial(tl.Dense(4, name='first'), tl.Relu(), tl.Dense(4, name='last'))
    net = transforms.Tied(net, 'first', 'last')
    x = values(3, 4)
    weights, _ = net.init((x,), jax.random.key(0))
    with pytest.raises(ValueError, match=r"'first' and 'last' are tied, and where= chooses layers"):
        transforms.lora(net, weights, where='last')
    adapted, weights = transforms.lora(net, weights, 2)
    assert list(weights) == ['first']
    plain, merged = transforms.merge(adapted, moved(weights))
    assert plain == net
    np.testing.assert_allclose(
        plain.apply(merged, {}, (x,))[0][0],
        adapted.apply(moved(weights), {}, (x,))[0][0],
        atol=1e-5,
    )


# Training.


def steps(net, weights, x, trainable=transforms.is_lora):
    """The loss and its gradient, of adapters alone, compiled."""
    some, rest = trees.partition(weights, trainable)

    def loss(some, rest, x):
        return jnp.square(net.apply(trees.merge(some, rest), {}, (x,), mode=Mode.TRAIN)[0][0]).sum()

    return jax.jit(jax.value_and_grad(loss)).lower(some, rest, x).compile(), (some, rest, x)


STACKS = {
    'scan': lambda block: tl.Repeat(tl.Serial(tl.RMSNorm(), *block, name='block'), 6),
    'remat': lambda block: tl.Repeat(tl.Remat(tl.Serial(tl.RMSNorm(), *block, name='block')), 6),
    'reversible': lambda block: tl.Serial(
        tl.Dup(),
        tl.ReversibleRepeat(
            tl.ReversibleSerial(
                tl.ReversibleHalfResidual(*block), tl.ReversibleSwap(), name='block'
            ),
            6,
        ),
        tl.Add(),
    ),
}


@pytest.mark.parametrize('bits', [None, 8])
@pytest.mark.parametrize('stack', STACKS)
def test_frozen_weights_have_no_gradient_and_no_copy(stack, bits, monkeypatch):
    """Loops carry each frozen matrix once, as an input; narrow ones are never wide."""
    monkeypatch.setattr(pieces, 'ON_CPU', 2048)
    net = STACKS[stack]((tl.Dense(256), tl.Gelu(), tl.Dense(128)))
    x = values(1, 160, 128)
    weights, _ = jax.jit(functools.partial(net.init, (x,)))(jax.random.key(0))
    if bits:
        net, weights = transforms.quantize(net, weights, bits)
    net, weights = transforms.lora(net, weights, 2)
    compiled, args = steps(net, weights, x)
    text = compiled.as_text()
    for shape in ('128,256', '256,128'):
        loops = [line.partition(' while(')[0] for line in text.splitlines() if ' while(' in line]
        assert loops and all(line.count(f'[6,{shape}]') <= 1 for line in loops)
        assert not (bits and (f'f32[{shape}]' in text or f'f32[6,{shape}]' in text))
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes < trees.n_bytes(args[0]) + 4096
    rows = 160 * (128 + 256) * 4  # one value of a block, in both widths
    most = {'scan': 6 * 7, 'remat': 6 + 6, 'reversible': 12}[stack] * rows + 3 * 128 * 256 * 4
    assert memory.temp_size_in_bytes < most


def test_forgetting_trainable_over_narrow_weights_is_refused():
    for stack in ('scan', 'reversible'):
        net, x = STACKS[stack]((tl.Dense(16),)), values(1, 40, 16)
        weights, _ = net.init((x,), jax.random.key(0))
        net, weights = transforms.lora(*transforms.quantize(net, weights, smallest=1), 2)
        with pytest.raises(ValueError, match='quantized weights do not train'):
            steps(net, weights, x, None)


@pytest.mark.parametrize('how', ['plain', 'narrow'])
def test_reversible_stacks_train_adapters_as_plain_ones(how, monkeypatch):
    by_head = []
    known = multihead.goes_by_head
    monkeypatch.setattr(
        multihead, 'goes_by_head', lambda *given: by_head.append(known(*given)) or by_head[-1]
    )
    half = tl.ReversibleHalfResidual
    attention = half(tl.LayerNorm(), tl.SelfAttention(2, n_kv_heads=1))
    ff = half(tl.LayerNorm(), tl.Chunk(tl.Serial(tl.GatedDense(12), tl.Dense(8)), 5))
    layers = (attention, tl.ReversibleSwap(), ff, tl.ReversibleSwap())
    net = tl.ReversibleRepeat(tl.ReversibleSerial(*layers, name='block'), 2)
    plain = tl.Repeat(tl.Serial(*layers, name='block'), 2)
    inputs = values(2, 10, 8), values(2, 10, 8, seed=1)
    weights, _ = net.init(inputs, jax.random.key(0))
    given = {'dropout': 0.3} if how == 'narrow' else {}
    both = []
    for each in (net, plain):
        w = weights
        if how == 'narrow':
            each, w = transforms.quantize(each, w, 8, 8, smallest=1)
        each, w = transforms.lora(each, w, 2, **given)
        some, rest = trees.partition(moved(w, 0.05), transforms.is_lora)

        def loss(some, each=each, rest=rest):
            key = jax.random.key(1)
            y = each.apply(trees.merge(some, rest), {}, inputs, rng=key, mode=Mode.TRAIN)[0]
            return jnp.sin(y[0]).mean() + jnp.cos(y[1]).mean()

        both.append(jax.jit(jax.value_and_grad(loss))(some))
    assert_close(both[0], both[1], 1e-4)
    assert by_head and all(went == (how == 'plain') for went in by_head)


class Batches:
    """The next token is the one after."""

    def __iter__(self):
        for i in itertools.count():
            x = np.random.default_rng(i).integers(0, 64, (2, 12)).astype(np.int32)
            yield x, (x + 1) % 64, np.ones((2, 12), np.float32)


def test_a_run_with_adapters_resumes_bitwise_and_keeps_no_state_of_frozen_weights(tmp_path):
    block = tl.Residual(tl.Dense(), name='block')
    net = tl.Serial(tl.Embedding(64, 8), tl.Repeat(block, 2), tl.Dense(64, name='head'))
    weights, _ = net.init(TOKENS, jax.random.key(0))
    net, weights = transforms.quantize(net, weights, 8, smallest=1)
    net, weights = transforms.lora(net, weights, 2, dropout=0.1)
    weights = moved(weights)

    def run(n, directory):
        task = TrainTask(
            Batches(), tl.CrossEntropyLoss(), optax.adamw(1e-2), trainable=transforms.is_lora
        )
        model = Model(net, weights, {})
        loop = Loop(model, task, output_dir=directory, progress=False, eval_every=None)
        loop.run(n)
        return loop

    at_once = run(4, None)
    run(2, tmp_path / 'run')
    again = run(4, tmp_path / 'run')
    for a, b in zip(jax.tree.leaves(at_once.weights), jax.tree.leaves(again.weights), strict=True):
        np.testing.assert_array_equal(a, b)
    before, after = trees.flatten(weights), trees.flatten(at_once.weights)
    for path in before:
        assert (before[path] != after[path]).any() == transforms.is_lora(path)
    n_lora = trees.count([x for path, x in before.items() if transforms.is_lora(path)])
    assert trees.count(at_once.opt_state) <= 2 * n_lora + 2


@pytest.mark.parametrize('recipe', ['muon', 'adafactor'])
def test_optimizers_that_ask_for_axes_know_adapters(recipe):
    _, net, weights, _x = made(dora=True)
    some, _rest = trees.partition(weights, transforms.is_lora)
    optimizer = getattr(optimizers, recipe)(1e-2, net=net)
    state = jax.eval_shape(optimizer.init, some)
    with jax.numpy_dtype_promotion('standard'):  # optax's own steps need it
        update, _ = jax.eval_shape(optimizer.update, some, state, some)
    assert jax.tree.map(jnp.shape, update) == jax.tree.map(jnp.shape, some)


# What does not fit.


def test_patterns_choose_layers():
    net = lm()
    weights, _ = jax.eval_shape(functools.partial(net.init, TOKENS), jax.random.key(0))

    def chosen(where):
        made = jax.eval_shape(lambda w: transforms.lora(net, w, 2, where=where)[1], weights)
        found = {
            path.rpartition('/')[0] for path in trees.flatten(made) if transforms.is_lora(path)
        }
        return {path.removeprefix('block/') for path in found}

    ff = {'feed_forward/gated_dense', 'feed_forward/dense'}
    projections = {f'attention/self_attention/{x}' for x in ('query', 'key', 'value', 'output')}
    assert chosen('*') == ff | projections
    assert chosen('*attention*') == projections
    assert chosen(['*query', '*/value']) == {
        f'attention/self_attention/{x}' for x in ('query', 'value')
    }
    assert chosen(lambda path: path.endswith('dense')) == ff
    assert chosen('head') == {'head'}


def test_lora_says_what_it_takes():
    net, adapted, weights, _ = made()
    lora = functools.partial(transforms.lora, net, weights)
    with pytest.raises(
        ValueError,
        match=r"lora: where='\*q_proj' matches no layer with matrices: choose of "
        r"'block/attention/self_attention/query', .*'head'$",
    ):
        lora(where='*q_proj')
    with pytest.raises(ValueError, match=r"where='x' matches no layer"):
        lora(where=('*query', 'x'))
    with pytest.raises(ValueError, match='the predicate where matches no layer'):
        lora(where=lambda path: False)
    with pytest.raises(TypeError, match=r'lora: where=\(3,\): give a path, a pattern such as'):
        lora(where=(3,))
    with pytest.raises(ValueError, match='no layer with matrices that could have adapters'):
        transforms.lora(tl.Serial(tl.Embedding(4, 4)), {})
    with pytest.raises(ValueError, match='the model has adapters already: merge them first'):
        transforms.lora(adapted, weights)
    for wrong, error in (
        ({'rank': 0}, 'LowRank: rank must be at least 1, got 0'),
        ({'alpha': -1.0}, 'LowRank: alpha must be above 0 and finite, got -1.0'),
        ({'dropout': 1.0}, 'LowRank: dropout must be at least 0 and below 1, got 1.0'),
    ):
        with pytest.raises(ValueError, match=error):
            lora(**wrong)
    with pytest.raises(TypeError, match=r'LowRank: rank must be an int, got 2\.5'):
        lora(2.5)
    for layer in (tl.LayerNorm(), tl.Embedding(4, 4), transforms.LowRank(tl.Dense(4))):
        with pytest.raises(TypeError, match=r'LowRank holds a leaf with matrices, not a '):
            transforms.LowRank(layer)
    narrow, w = transforms.quantize(
        tl.MergeHeads(), {'kernel': values(2, 4, 8), 'bias': values(8)}, smallest=1
    )
    with pytest.raises(ValueError, match="'' is narrow, and nothing beside it says how many heads"):
        transforms.lora(narrow, w)


def test_a_layer_of_ones_own_joins_in():
    class Mine(tl.Layer):
        weight_axes = {'w': 'D->F'}

        def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
            (x,) = inputs
            return (matmul(x, weights['w']),), state

    transforms.lora_paths.register(Mine, lambda layer: ('w',))
    net, weights = transforms.lora(Mine(), {'w': values(4, 6)}, 2)
    weights, x = moved(weights), values(3, 4)
    w = weights['w'] + 8 * weights['w_lora_a'] @ weights['w_lora_b']
    np.testing.assert_allclose(net.apply(weights, {}, (x,))[0][0], x @ w, atol=1e-4)
