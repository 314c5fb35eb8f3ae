"""Training whose residual streams live in host memory does what training does."""

from __future__ import annotations

import numpy as np
import optax
import pytest

from layercomb import optimizers, tl, trees
from layercomb.supervised import Callback, Loop, TrainTask

V, L, B = 16, 6, 2


def model(attention=tl.LSHSelfAttention(2, n_hashes=2, chunk_len=2, max_len=8), ff=None):
    ff = ff or tl.Chunk(tl.Serial(tl.LayerNorm(), tl.Dense(8), tl.Gelu(), tl.Dense(8)), 2)
    block = tl.ReversibleSerial(
        tl.ReversibleHalfResidual(tl.LayerNorm(), attention),
        tl.ReversibleSwap(),
        tl.ReversibleHalfResidual(ff),
        tl.ReversibleSwap(),
        name='block',
    )
    return tl.Serial(
        tl.Embedding(V, 8, table_init=tl.Normal(1.0)),
        tl.Dup(),
        tl.ReversibleRepeat(block, 3, name='blocks'),
        tl.Add(),
        tl.Dense(V),
    )


class Data:
    """Batches of random tokens, the same each time."""

    def __iter__(self):
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(0, V, (B, L + 1)).astype(np.int32)
            yield x[:, :-1], x[:, 1:], np.ones((B, L), np.float32)


class Rows(Callback):
    """Keeps what a run reports."""

    def __init__(self):
        self.found = []

    def after_step(self, loop, row):
        self.found.append((row['train/loss'], row['train/grad_norm']))


def loop(net, offload, directory=None, optimizer=optax.sgd(0.1, 0.9), mesh=None, **task):
    rows = Rows()
    task = {'loss_chunk_len': 4, **task}
    made = Loop(
        net, TrainTask(Data(), tl.CrossEntropyLoss(), optimizer, **task), (), directory,
        progress=False, eval_every=None, checkpoint_every=None, callbacks=(rows,),
        offload=offload, mesh=mesh,
    )  # fmt: skip
    return made, rows.found


def assert_same(ours, theirs):
    for path, x in trees.flatten(theirs).items():
        np.testing.assert_allclose(trees.get(ours, path), x, rtol=1e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize('offload', ['streams', 'blocks+streams'])
def test_losses_and_weights_are_those_of_training_without(offload):
    (one, rows), (other, found) = loop(model(), None), loop(model(), offload)
    for each in (one, other):
        each.run(3)
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    assert_same(other.weights, one.weights)
    kinds = {
        x.sharding.memory_kind for x in trees.flatten(other._carry.trainable['blocks']).values()
    }
    assert kinds == ({'pinned_host'} if 'blocks' in offload else {'device'})


def test_gradients_may_be_clipped_and_summed_and_optimizers_need_no_blocks():
    given = {'clip_norm': 0.1, 'accumulate': 2, 'optimizer': optax.adabelief(1e-3)}
    (one, rows), (other, found) = (loop(model(), x, **given) for x in (None, 'streams'))
    for each in (one, other):
        each.run(2)
    np.testing.assert_allclose(found, rows, rtol=1e-5)
    assert_same(other.weights, one.weights)


def test_a_run_goes_on_with_and_without(tmp_path):
    for steps, offload in enumerate(('streams', 'blocks+streams', None), 1):
        last, _ = loop(model(), offload, tmp_path, optimizers.adamw(1e-2))
        assert last.step == steps - 1
        last.run(steps)
    through, _ = loop(model(), None, optimizer=optimizers.adamw(1e-2))
    through.run(3)
    assert_same(last.weights, through.weights)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"'streams': .*loss_chunk_len"):
        loop(model(), 'streams', loss_chunk_len=None)
    mixture = loop(model(ff=tl.SwitchFF(8, 2)), 'streams')[0]
    with pytest.raises(ValueError, match='layers that keep a state in training'):
        mixture.run(1)
    embedding, *rest = model().layers
    two = tl.Serial(embedding, tl.Repeat(tl.Residual(tl.Dense()), 2, name='front'), *rest)
    with pytest.raises(ValueError, match=r"'blocks\+streams': .* 'front' is a stack too"):
        loop(two, 'blocks+streams')
