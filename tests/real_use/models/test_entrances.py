"""What one entrance refuses, all refuse."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import Mode, models, supervised, tl

LM = models.TransformerLM(16, 8, 8, 1, 1, max_len=8)
LAYERS = {
    'leaf': tl.Dense(5),
    'combinator': tl.Serial(tl.Dense(5)),
    'wrapper': tl.Repeat(tl.Dense(5), 2),
    'chunk': tl.Chunk(tl.Dense(5), 2),
    'reversible': tl.Serial(tl.Dup(), tl.ReversibleSerial(tl.ReversibleHalfResidual(tl.Dense(5)))),
}


class Doubled(lc.Layer):
    """A layer from elsewhere, without checks of its own."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        return {'factor': jnp.full(x.shape[-1], 2.0)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x * weights['factor'],), state


@pytest.mark.parametrize('layer', [*LAYERS.values(), Doubled()], ids=[*LAYERS, 'own'])
def test_one_signature_alone_is_a_tuple_of_one(layer, key):
    one = lc.shape_dtype((2, 4, 5))
    made = [layer.init(x, jax.random.clone(key)) for x in (one, (one,), jnp.zeros((2, 4, 5)))]
    for other in made[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, made[0], other))


def test_a_model_function_takes_one_signature_alone(key):
    weights, _ = LM.init(lc.shape_dtype((1, 8), 'int32'), key)
    assert weights['embedding']['table'].shape == (16, 8)


@pytest.mark.parametrize('mode', ['predict', 'PREDICT', 4, None, Mode])
@pytest.mark.parametrize('layer', [*LAYERS.values(), Doubled()], ids=[*LAYERS, 'own'])
def test_what_is_no_mode_is_refused_and_does_not_count_as_evaluation(layer, mode, key):
    x = jnp.ones((2, 4, 5))
    weights, state = layer.init(x, key)
    for call in (
        lambda: layer.apply(weights, state, (x,), mode=mode),
        lambda: lc.Model(layer, weights, state)(x, mode=mode),
        lambda: layer.init(x, jax.random.clone(key), mode),
        lambda: lc.init_state(layer, x, mode),
        lambda: lc.Model(layer).init(x, mode=mode),
    ):
        with pytest.raises(TypeError, match=r'(init|apply): mode=.* is no Mode: give .*Mode\.'):
            call()


def test_a_mode_by_its_name_is_told_which_mode_that_is(key):
    with pytest.raises(TypeError, match=r"mode='predict' is no Mode: give Mode\.PREDICT$"):
        tl.SelfAttention(1).init(lc.shape_dtype((1, 4, 8)), key, 'predict')


@pytest.mark.parametrize('layer', [*LAYERS.values(), Doubled()], ids=[*LAYERS, 'own'])
def test_an_array_in_the_place_of_a_tuple_is_not_taken_apart_by_rows(layer, key):
    x = jnp.ones((1, 4, 5))  # one row, which would be mistaken for one input
    weights, state = layer.init(x, key)
    with pytest.raises(TypeError, match=r'takes a tuple of inputs, got float32\[1,4,5\]: write'):
        layer.apply(weights, state, x)


def test_too_many_inputs_are_counted_in_every_layer(key):
    x = jnp.ones((1, 5))
    for layer in (tl.Dense(5), Doubled(), tl.Relu()):
        weights, state = layer.init(x, key)
        with pytest.raises(TypeError, match=r'takes 1 value off the stack, 2 were there'):
            layer.apply(weights, state, (x, x))


@pytest.mark.parametrize(
    'layer',
    [
        tl.Dense(3),
        tl.Embedding(9, 4),
        tl.Add(),
        tl.CrossEntropyLoss(),
        tl.Serial(tl.Dense(3)),
        tl.Residual(tl.Dense()),
        tl.SelfAttention(1),
        tl.Remat(tl.Dense(3)),
        tl.Chunk(tl.Dense(3), 2),
        tl.Once(tl.Dense(3)),
        tl.Map(tl.Dense(3), 2),
        Doubled(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_signatures_are_counted_as_inputs_are(layer, key):
    x = lc.shape_dtype((2, 4, 6))
    for n in {0, layer.n_in - 1, layer.n_in + 1}:
        many = 'value' if layer.n_in == 1 else 'values'
        with pytest.raises(TypeError, match=rf'takes {layer.n_in} {many} off the stack, .*{n} w'):
            layer.init((x,) * n, jax.random.clone(key))


# Layers from elsewhere write `init` and `apply` in their own way.


class WithoutMode(lc.Layer):
    """Its state depends on no mode."""

    def init(self, signature, rng):
        (x,) = signature
        return {'factor': jnp.full(x.shape[-1], 2.0)}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (inputs[0] * weights['factor'],), state


class ByName(Doubled):
    """A mode by name alone, and another order."""

    def init(self, signature, rng, *, mode=Mode.TRAIN):
        return super().init(signature, rng, mode=mode)

    def apply(self, weights, state, inputs, mode=Mode.EVAL, rng=None):
        return super().apply(weights, state, inputs, rng=rng, mode=mode)


class OtherNames(Doubled):
    """Names of its own."""

    def init(self, xs, key, m=Mode.TRAIN):
        return super().init(xs, key, m)

    def apply(self, w, s, xs, rng=None, mode=Mode.EVAL):
        return super().apply(w, s, xs, rng=rng, mode=mode)


class PassedOn(Doubled):
    """Whatever it is given, it hands on."""

    def init(self, *args, **given):
        return super().init(*args, **given)

    def apply(self, *args, **given):
        return super().apply(*args, **given)


def doubled(weights, state, inputs, *, rng=None, mode=Mode.EVAL):
    return (inputs[0] * weights['factor'],), state


def factors(signature, rng, mode=Mode.TRAIN):
    return {'factor': jnp.full(signature[0].shape[-1], 2.0)}, {}


class Static(lc.Layer):
    """Functions that know no layer."""

    init = staticmethod(factors)
    apply = staticmethod(doubled)


class Again(Static):
    """Taken from another class by name."""

    init = Static.init
    apply = Static.apply


class Compiled(Doubled):
    """Compiled by itself."""

    apply = functools.partial(jax.jit, static_argnums=0, static_argnames='mode')(Doubled.apply)


ELSEWHERE = [WithoutMode(), ByName(), OtherNames(), PassedOn(), Static(), Again(), Compiled()]
elsewhere = pytest.mark.parametrize('layer', ELSEWHERE, ids=lambda layer: type(layer).__name__)


@elsewhere
def test_a_layer_from_elsewhere_stands_where_others_do(layer, key):
    x = jnp.arange(6.0).reshape(2, 3)
    weights, state = layer.init((x,), jax.random.clone(key))
    np.testing.assert_array_equal(layer.apply(weights, state, (x,))[0][0], 2 * x)
    net = tl.Serial(layer, tl.Repeat(layer, 2), tl.AssertShape('bd->bd', layer))
    np.testing.assert_array_equal(lc.Model(net).init(x, key)(x, mode=Mode.TRAIN), 16 * x)
    assert lc.init_state(layer, (x,)) == {}


@elsewhere
def test_a_layer_from_elsewhere_is_checked_as_others_are(layer, key):
    x = jnp.ones((2, 3))
    weights, state = layer.init(x, jax.random.clone(key))
    assert weights['factor'].shape == (3,)
    for call, text in (
        (lambda: layer.init((x, x), key), 'takes 1 value off the stack, 2 were there'),
        (lambda: layer.init(x, key, 'predict'), r'init: mode=.* is no Mode: give Mode\.PREDICT'),
        (lambda: layer.apply(weights, state, (x, x)), 'takes 1 value off the stack, 2 were'),
        (lambda: layer.apply(weights, state, x), 'takes a tuple of inputs, got float32'),
        (lambda: layer.apply(weights, state, (x,), mode='eval'), r'apply: mode=.* is no Mode'),
    ):
        with pytest.raises(TypeError, match=text):
            call()


def test_arguments_by_name_and_by_place_mean_the_same(key):
    x = jnp.ones((2, 3))
    for layer in (tl.Dense(3), Doubled(), ByName(), PassedOn(), Static(), WithoutMode()):
        weights, _ = layer.init(signature=x, rng=jax.random.clone(key), mode=Mode.EVAL)
        named = {'weights': weights, 'state': {}, 'inputs': (x,)}
        (got,), _ = layer.apply(**named)
        np.testing.assert_array_equal(got, layer.apply(weights, {}, inputs=[x])[0][0])
        with pytest.raises(TypeError, match='takes a tuple of inputs'):
            layer.apply(**{**named, 'inputs': x})
        with pytest.raises(TypeError, match='is no Mode'):
            layer.apply(**named, mode='eval')
    weights, _ = OtherNames().init(xs=x, key=jax.random.clone(key), m=Mode.EVAL)
    (got,), _ = OtherNames().apply(w=weights, s={}, xs=(x,))
    np.testing.assert_array_equal(got, 2 * x)
    with pytest.raises(TypeError, match='takes 1 value off the stack, 2 were'):
        OtherNames().apply(w=weights, s={}, xs=(x, x))
    (got,), _ = OtherNames().apply(weights, {}, (x,), key, Mode.TRAIN)
    np.testing.assert_array_equal(got, 2 * x)
    for layer, place in ((OtherNames(), (key, 'eval')), (ByName(), ('eval',))):
        with pytest.raises(TypeError, match=r'apply: mode=.eval. is no Mode'):
            layer.apply(weights, {}, (x,), *place)


@pytest.mark.parametrize(
    'call',
    [
        lambda layer, key: layer.init(),
        lambda layer, key: layer.init((), key, Mode.EVAL, 3),
        lambda layer, key: layer.init(jnp.ones(3), key, more=3),
        lambda layer, key: layer.apply({}, {}),
        lambda layer, key: layer.apply({}, {}, (jnp.ones(3),), key, Mode.EVAL),
    ],
)
def test_what_python_refuses_is_refused_by_python(call, key):
    for layer in (Doubled(), tl.Dense(3)):
        with pytest.raises(TypeError, match=r'argument|takes 1 value'):
            call(layer, key)


BATCH = np.ones((4, 3), np.float32), np.zeros(4, np.int32), np.ones(4, np.float32)
LOSS = tl.CrossEntropyLoss()


def loop(where, eval_data=None, **task):
    train_task = supervised.TrainTask(
        **{'data': [BATCH] * 3, 'loss': LOSS, 'optimizer': optax.sgd(0.1), **task}
    )
    eval_tasks = () if eval_data is None else supervised.EvalTask(eval_data, LOSS)
    return supervised.Loop(tl.Dense(2), train_task, eval_tasks, where, progress=False)


@pytest.mark.parametrize(
    ('eval_data', 'task', 'said'),
    [
        ([BATCH[:2]], {}, r"3 arrays \(inputs…, targets, loss_weights\), and EvalTask 'valid' yi"),
        ([(BATCH[0][:, :2], *BATCH[1:])], {}, 'the input is 2 wide and the weights were made for'),
        ([(BATCH[0], BATCH[1].astype(np.float32), BATCH[2])], {}, 'targets must be integers'),
        ([(BATCH[0][:2], *BATCH[1:])], {}, r'targets must be \(2,\) here'),
        ([], {}, "EvalTask 'valid': the data holds no batch"),
        (None, {'accumulate': 3}, 'accumulate=3 does not divide a batch of 4 rows'),
        (None, {'data': [BATCH[:2]]}, 'a batch is 3 arrays'),
        (None, {'data': [(*BATCH[:2], np.float32(1))]}, r'weights must be \(4,\) here'),
        (None, {'data': [(np.float32(1), *BATCH[1:])]}, r'one number of rows.*got \(float32\[\]\)'),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step_and_nothing_is_written(
    tmp_path, eval_data, task, said
):
    with pytest.raises((TypeError, ValueError, lc.UsageError), match=said):
        loop(tmp_path / 'run', eval_data, **task)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_by_itself_refuses_the_same(key):
    weights, state = tl.Dense(2).init(BATCH[0], key)
    for batch, said in (
        (BATCH[:2], 'a batch is 3 arrays'),
        ((BATCH[0][:, :2], *BATCH[1:]), 'the input is 2 wide'),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            supervised.evaluate(tl.Dense(2), weights, state, supervised.EvalTask([batch], LOSS))


def test_a_later_batch_of_another_form_is_the_data_s_fault(tmp_path):
    late = loop(tmp_path, data=[BATCH, BATCH, BATCH[0]])
    with pytest.raises(lc.UsageError, match=r'^batch 3 of the data: data must yield tuples of arr'):
        late.run(3)
