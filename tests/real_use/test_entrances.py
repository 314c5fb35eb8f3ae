"""What one entrance refuses, all refuse."""

from __future__ import annotations

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
