"""Rounding for what a model reads: the walk computes what it does, and outputs are nearer."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, models, tl, transforms, trees
from layercomb.errors import UsageWarning
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.fitting import Inputs
from layercomb.layers.quantized.matrix import Narrow, in_panels
from layercomb.layers.quantized.rounding import narrow as narrowed
from layercomb.shapes import shape_dtype
from layercomb.transforms.quantization.calibration.calibrating import _Observing
from layercomb.transforms.quantization.calibration.values import run, stack_of

TOKENS = (shape_dtype((2, 12), 'int32'),)


def batches(n=4, vocab=31, length=12):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.integers(0, vocab, (2, length)), jnp.int32) for _ in range(n)]


def lm(**changes):
    return models.TransformerLM(31, 32, 64, n_layers=2, n_heads=2, max_len=16, **changes)


def tied():
    net = tl.Serial(
        tl.Embedding(31, 32), tl.Residual(tl.Dense()), tl.Dense(31, use_bias=False, name='head')
    )
    return transforms.Tied(net, 'embedding/table', 'head/kernel', jnp.transpose)


NETS = {
    'language model': lm(),
    'bfloat16': transforms.cast(lm()),
    'rematerialized': transforms.remat(lm()),
    'unstacked': transforms.unstack(lm(), {})[0],
    'Reformer': models.ReformerLM(31, 32, 64, n_layers=2, n_heads=2, max_len=16, ff_chunk_len=4),
    'LLaMA': models.Llama(
        31, d_model=32, d_ff=64, n_layers=2, n_heads=4, n_kv_heads=2, max_len=16
    ),
    'tied': tied(),
    'shared': tl.Serial(tl.Embedding(31, 32), tl.Repeat(tl.Residual(tl.Dense()), 3, shared=True)),
    'mapped': tl.Serial(
        tl.Embedding(31, 32), tl.Branch(tl.Dense(), tl.Relu()), tl.Map(tl.Dense(16), 2), tl.Add()
    ),
    'two tied layers': transforms.Tied(
        tl.Serial(tl.Embedding(31, 32), tl.Dense(name='a'), tl.Relu(), tl.Dense(name='b')), 'a', 'b'
    ),
}  # fmt: skip


def made(net):
    weights, _ = net.init(TOKENS, jax.random.key(0))
    return weights, init_state(net, TOKENS, Mode.EVAL)


def quantize(net, weights, **changes):
    options = {'bits': 4, 'group_size': 16, 'smallest': 1, 'calibrate': batches(), **changes}
    return transforms.quantize(net, weights, **options)


def outputs(net, weights, state):
    (y,) = run(net, weights, state, stack_of(tuple((x,) for x in batches())))
    return jnp.stack(y.arrays()).astype(jnp.float32)


@pytest.mark.parametrize('name', NETS)
def test_the_walk_computes_what_the_model_computes(name):
    net = NETS[name]
    weights, state = made(net)
    walk = _Observing(lambda path: True)
    _, _, (y,) = walk.through(net, weights, state, '', stack_of(tuple((x,) for x in batches())))
    wanted = outputs(net, weights, state)
    np.testing.assert_allclose(
        jnp.stack(y.arrays()).astype(jnp.float32), wanted, rtol=1e-4, atol=1e-4
    )
    assert walk.read and all(x.gram.shape[0] == x.gram.shape[1] for x in walk.read.values())


@pytest.mark.parametrize(
    'name', [name for name in NETS if name not in ('rematerialized', 'unstacked')]
)
def test_outputs_are_nearer_and_nothing_else_changes(name):
    net = NETS[name]
    weights, state = made(net)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer, narrow = quantize(net, weights)
    plain, plainly = quantize(net, weights, calibrate=None)
    assert layer == plain
    assert jax.tree.structure(narrow) == jax.tree.structure(plainly)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(plainly), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    wanted = outputs(net, weights, state)
    far = jnp.square(outputs(plain, plainly, state) - wanted).sum()
    nearer = 1.0 if name == 'tied' else 0.95  # the rows that are looked up are the same
    assert jnp.square(outputs(layer, narrow, state) - wanted).sum() < nearer * far


def test_the_same_batches_give_the_same_weights():
    net = lm()
    weights, _ = made(net)
    first, again = (quantize(net, weights)[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def nearest_for(kernel, x, before):
    """What a kernel becomes that is rounded for inputs x, to give what it gave for those before."""
    inputs = Inputs(x.T @ x, x.T @ (before - x))
    return in_panels(*narrowed(kernel, 'io', 4, 16, inputs=inputs), 1, 4)


def test_each_matrix_is_rounded_behind_those_before_it():
    """By hand: the second layer's inputs come through the first one as it was rounded."""
    net = tl.Serial(tl.Dense(24, name='a'), tl.Relu(), tl.Dense(8, name='b'))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 16)), jnp.float32)
    weights, _ = net.init((shape_dtype((40, 16)),), jax.random.key(0))
    _, narrow = quantize(net, weights, calibrate=[x])
    values, scales = nearest_for(weights['a']['kernel'], x, x)
    was = jax.nn.relu(x @ weights['a']['kernel'] + weights['a']['bias'])
    h = jax.nn.relu(x @ Narrow(values, scales, 'io', 4).wide() + weights['a']['bias'])
    wanted = nearest_for(weights['b']['kernel'], h, was)
    np.testing.assert_array_equal(narrow['a']['kernel'], values)
    same = (narrow['b']['kernel'] == wanted[0]).all(-1)  # a tie of float32 goes on along its row
    assert same.sum() >= 6
    got = narrow['b']['kernel_scales'][same]
    np.testing.assert_allclose(got, wanted[1][same], rtol=1e-3)


def test_models_of_several_inputs_take_tuples():
    net = tl.Serial(tl.Parallel(tl.Dense(16), tl.Dense(16)), tl.Add())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 16)), jnp.float32)
    weights, _ = net.init((shape_dtype((40, 16)),) * 2, jax.random.key(0))
    quantize(net, weights, calibrate=[(x, x + 1)])
    with pytest.raises(TypeError, match='has 1 values, and the model takes 2'):
        quantize(net, weights, calibrate=[x])


def test_tied_ends_stay_one_array():
    net = tied()
    weights, _ = made(net)
    layer, narrow = quantize(net, weights)
    assert isinstance(layer, transforms.TiedRows)
    assert 'head' not in narrow and narrow['embedding']['table'].dtype == jnp.uint32


class Around(tl.Wrapper):
    """A wrapper that the library does not know."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


def test_a_warning_names_what_is_not_reached():
    net = tl.Serial(tl.Embedding(31, 32), Around(tl.Dense(name='inside')), tl.Dense(8))
    weights, _ = made(net)
    with pytest.warns(UsageWarning, match="does not reach 'inside': they are rounded to the near"):
        _, narrow = quantize(net, weights)
    _, plainly = quantize(net, weights, calibrate=None)
    np.testing.assert_array_equal(narrow['inside']['kernel'], plainly['inside']['kernel'])
    assert (narrow['dense']['kernel'] != plainly['dense']['kernel']).any()


def test_a_layer_of_ones_own_takes_part():
    class Mine(tl.Dense):
        """Registered with its parents, as `singledispatch` goes."""

    net = tl.Serial(tl.Embedding(31, 32), Mine(16))
    weights, _ = made(net)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quantize(net, weights)

    class Other(tl.Dense):
        """Of which it is said that nobody knows what it multiplies."""

    transforms.multiplied.register(Other, lambda layer, inputs: None)
    with pytest.warns(UsageWarning, match="does not reach 'mine'"):
        quantize(tl.Serial(tl.Embedding(31, 32), Other(16, name='mine')), weights)


def test_running_statistics_are_asked_for():
    net = tl.Serial(tl.Dense(16), tl.BatchNorm(), tl.Dense(8))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 16)), jnp.float32)
    weights, state = net.init((shape_dtype((40, 16)),), jax.random.key(0))
    with pytest.raises(ValueError, match='running statistics, that calibrate= needs: give state='):
        quantize(net, weights, calibrate=[x])
    quantize(net, weights, calibrate=[x], state=state)


@pytest.mark.parametrize(
    ('changes', 'error', 'text'),
    [
        ({'bits': 16}, ValueError, 'bfloat16 has no scales, so calibrate= changes nothing'),
        ({'calibrate': []}, ValueError, 'has no batches: give a list of batches, such as'),
        ({'calibrate': batches()[0]}, TypeError, 'calibrate= is a ArrayImpl: give a list of'),
        ({'calibrate': 'text'}, TypeError, 'calibrate= is a str: give a list of batches'),
        ({'calibrate': 3}, TypeError, 'calibrate= is a int: give a list of batches'),
        ({'calibrate': [(batches()[0],) * 2]}, TypeError, 'has 2 values, and the model takes 1'),
        ({'calibrate': [batches()[0] + 31]}, ValueError, 'not finite: look for ids outside'),
        ({'calibrate': [jnp.ones((2, 4))]}, TypeError, 'takes integers'),
        ({'bits': 5}, ValueError, 'bits=5 is not to be had'),
    ],
)
def test_what_is_not_understood_is_refused(changes, error, text):
    net = lm()
    weights, _ = made(net)
    with pytest.raises(error, match=text):
        quantize(net, weights, **changes)


def test_weights_that_are_not_finite_are_refused():
    net = lm()
    weights, _ = made(net)
    for path in ('block/residual/self_attention/query/kernel', 'head/kernel'):
        bad = trees.get(weights, path).at[..., 0].set(jnp.nan)
        wrong = trees.put(trees.drop(weights, path), path, bad)
        with pytest.raises(ValueError, match='not finite'):
            quantize(net, wrong)


def test_a_quantized_model_is_refused():
    net = lm()
    with pytest.raises(ValueError, match='quantized already'):
        quantize(*quantize(net, made(net)[0], calibrate=None))
