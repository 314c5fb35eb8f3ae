"""State is typed: what a part of it means is said by its class, whatever key it stands under."""

import contextlib
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import losses, models, tl, trees
from layercomb.errors import UsageWarning
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import KVCache
from layercomb.layers.decoding.seek import Position
from layercomb.layers.state.decisions import Decisions, put_decisions, take_decisions
from layercomb.layers.state.parts import Blocks, beside, own, put_back, take_out
from layercomb.losses import total as aux_loss
from layercomb.shapes import shape_dtype
from layercomb.supervised.beginning import trained_state

B, L, D = 2, 6, 4
RESERVED_ONCE = ('decisions', 'aux_loss', 'counted_positions', '0')


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def init(net, *inputs, mode=Mode.TRAIN):
    return net.init(lc.signature_of(inputs), jax.random.key(0), mode)


# Names mean nothing.


class Keeps(Layer):
    """Counts its calls under a key that once meant something else."""

    key: str = 'decisions'

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {self.key: jnp.ones(D)}, {self.key: jnp.zeros(())}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (inputs[0] * weights[self.key],), {self.key: state[self.key] + 1}


@pytest.mark.parametrize('name', RESERVED_ONCE)
def test_a_layer_weight_or_state_may_have_any_name(name):
    """Inside everything that takes states apart, and beside what stands in them for a call."""
    inner = tl.Serial(Keeps(name, name=name), tl.SwitchFF(8, 2), tl.BatchNorm(), name=name)
    net = tl.Repeat(tl.Map(tl.Remat(inner), 2), 2)
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    weights, state = init(net, x, x)
    wanted = jax.tree.structure(state)

    def run(state, mode):
        given = (weights, state, (x, x), jnp.ones((B, L)))
        return losses.apply_counted(net, *given, rng=jax.random.key(2), mode=mode)

    trained, after = run(state, Mode.TRAIN)
    assert jax.tree.structure(after) == wanted
    np.testing.assert_array_equal(after[name][name], [2, 2])  # each block, twice
    recorded, full = run(state, Mode.RECORD)
    rest, found = take_decisions(full)
    assert jax.tree.structure(rest) == wanted
    replayed, _ = run(put_decisions(state, found), Mode.REPLAY)
    for made in (recorded, replayed):  # other programs round otherwise
        for y, wanted in zip(made, trained, strict=True):
            np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    told = pytest.warns(UsageWarning, match='no auxiliary loss')  # as it was one before
    with told if name == 'aux_loss' else contextlib.nullcontext():
        loss = aux_loss(after)
    assert loss is not None and float(loss) == pytest.approx(
        float(sum(x.value.sum() for x in [after['switch_ff']['aux_loss']]))
    )


@pytest.mark.parametrize('name', RESERVED_ONCE)
def test_a_chunk_puts_its_decisions_beside_a_layer_of_any_name(name):
    net = tl.Chunk(tl.Serial(Keeps(name, name=name), tl.SparseFF(8, 4, hard_prob=1.0)), 4)
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    weights, state = init(net, x)
    key = jax.random.key(2)
    (y,), new = net.apply(weights, state, (x,), rng=key, mode=Mode.RECORD)
    rest, found = take_decisions(new)
    assert float(rest[name][name]) == 2 and set(rest) == {name}
    again = net.apply(weights, put_decisions(state, found), (x,), rng=key, mode=Mode.REPLAY)[0][0]
    np.testing.assert_array_equal(again, y)


def test_a_block_named_0_is_trained_and_decoded():
    net = tl.Repeat(tl.Serial(tl.BatchNorm(name='0'), tl.Conv1D(D, 2, padding='causal')), 2)
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    weights, state = init(net, x)
    _, state = net.apply(weights, state, (x,), mode=Mode.TRAIN)
    assert state['0']['mean'].shape == (2, D)
    cache = lc.init_state(net, (x,))
    assert isinstance(cache, Blocks) and set(cache) == {'0', '1'}
    _, after = net.apply(weights, cache, (x,), mode=Mode.PREDICT)
    assert jax.tree.structure(after) == jax.tree.structure(cache)


@pytest.mark.parametrize('net', [tl.Repeat(tl.BatchNorm(), 2), tl.Map(tl.BatchNorm(), 1)])
def test_a_state_for_decoding_is_refused_in_training(net):
    x = jnp.ones((B, L, D))
    weights, state = init(net, x, mode=Mode.PREDICT)
    with pytest.raises(ValueError, match='this state was made for decoding, a block at a time'):
        net.apply(weights, state, (x,), mode=Mode.TRAIN)


# Decisions.


@pytest.mark.parametrize('mode', Mode)
def test_decide_in_every_mode(mode):
    made = []

    def make():
        made.append(1)
        return jnp.int8(3)

    state = {'mean': 1.0}
    given = beside(state, Decisions({'at': jnp.int8(7), 'other': jnp.int8(1)}))
    found, new = tl.decide(mode, given if mode is Mode.REPLAY else state, 'at', make)
    assert int(found) == (7 if mode is Mode.REPLAY else 3) and len(made) == (
        mode is not Mode.REPLAY
    )
    held = own(new, Decisions)
    assert (held is not None) == (mode in (Mode.RECORD, Mode.REPLAY))
    assert take_decisions(new)[0] == state


def test_a_layer_may_decide_twice():
    _, state = tl.decide(Mode.RECORD, {}, 'a', lambda: 1)
    _, state = tl.decide(Mode.RECORD, state, 'b', lambda: 2)
    found = [tl.decide(Mode.REPLAY, state, name, lambda: 0)[0] for name in 'ab']
    assert found == [1, 2]


def test_replay_without_a_record_is_refused():
    net, x = tl.SwitchFF(8, 2), jnp.ones((B, L, D))
    weights, state = init(net, x)
    wanted = "REPLAY finds no decision 'experts' in the state: hand in the state that RECORD gave"
    with pytest.raises(ValueError, match=wanted):
        net.apply(weights, state, (x,), mode=Mode.REPLAY)


@pytest.mark.parametrize('state', [{}, Blocks({'0': {'a': Position.first(1)}}), {'a': {}}])
def test_taking_out_and_putting_back_keeps_types(state):
    rest, found = take_out(state, Decisions)
    assert type(rest) is type(put_back(rest, found)) is type(state) and not found
    assert_equal(put_back(rest, found), state)


def test_a_whole_state_may_be_a_part():
    cache = lc.init_state(tl.Conv1D(D, 2, padding='causal'), shape_dtype((B, L, D)))
    assert take_out(cache, Decisions) == (cache, {}) and own(cache, Decisions) is None
    net, x = tl.Map(tl.Conv1D(D, 2, padding='causal'), 2), jnp.ones((B, L, D))
    weights, state = init(net, x, x, mode=Mode.PREDICT)
    assert jax.tree.structure(net.apply(weights, state, (x, x), mode=Mode.PREDICT)[1]) == (
        jax.tree.structure(state)
    )


# Positions and caches.


def decoders():
    lm = functools.partial(models.TransformerLM, 16, 8, 16, 2, 2, max_len=16)
    lsh = tl.LSHSelfAttention(2, chunk_len=4, n_buckets=4)
    yield pytest.param(lm(), id='full')
    yield pytest.param(lm(attention=tl.LocalSelfAttention(2, 4)), id='local')
    yield pytest.param(models.ReformerLM(16, 8, 16, 2, 2, max_len=16, attention=lsh), id='lsh')
    yield pytest.param(
        models.TerraformerLM(16, 8, 16, 2, 2, 16, ff_block_size=4, qkv_modules=2, head_modules=2),
        id='sparse',
    )


@pytest.mark.parametrize('net', list(decoders()))
def test_one_seek_moves_every_cache(net):
    """Where rows go back to, they go on as a fresh state does that has read so much."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 16, (B, 8)), jnp.int32)
    weights, _ = init(net, tokens)
    step = jax.jit(functools.partial(net.apply, mode=Mode.PREDICT))
    fresh = lc.init_state(net, shape_dtype((B, 12), 'int32'))
    _, far = step(weights, fresh, (tokens,))
    (y,), after = step(weights, tl.seek(far, jnp.array([5, 5])), (tokens[:, 5:6],))
    _, near = step(weights, fresh, (tokens[:, :5],))
    (wanted,), _ = step(weights, near, (tokens[:, 5:6],))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(after) == jax.tree.structure(fresh)
    rows = [x.rows for x in jax.tree.leaves(after, is_leaf=_is_position) if _is_position(x)]
    assert rows and all(x.tolist() == [6, 6] for x in rows)


def _is_position(x):
    return isinstance(x, Position)


class Marks(Layer):
    """A layer of one's own: adds its position, which it keeps beside another array."""

    def init(self, signature, rng, mode=Mode.TRAIN):
        n_rows = signature[0].shape[0]
        if mode is not Mode.PREDICT:
            return {}, {}
        return {}, {'at': tl.Position.first(n_rows), 'position': jnp.zeros(())}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        return (x + state['at'].rows[:, None, None].astype(x.dtype),), {
            **state, 'at': state['at'].moved(x.shape[1]),
        }  # fmt: skip


def test_a_layer_of_ones_own_is_sent_to_other_positions():
    net = tl.Serial(Marks())
    state = tl.seek(lc.init_state(net, shape_dtype((B, L, D))), jnp.array([1, 3]))
    (y,), state = net.apply({}, state, (jnp.zeros((B, 1, D)),), mode=Mode.PREDICT)
    assert y[:, 0, 0].tolist() == [1, 3] and state['marks']['at'].rows.tolist() == [2, 4]
    assert state['marks']['position'] == 0


@pytest.mark.parametrize(
    'layer',
    [tl.SelfAttention(2), tl.Conv1D(D, 2, padding='causal'), tl.SRU(), tl.LearnedPositions(L)],
)
@pytest.mark.parametrize('made_for', [Mode.TRAIN, None])
def test_a_state_without_caches_does_not_decode(layer, made_for):
    x = jnp.ones((B, L, D))
    weights, state = init(layer, x)
    state = (
        state if made_for else {'position': jnp.zeros(B, jnp.int32), 'past': jnp.ones((B, L, D))}
    )
    with pytest.raises(
        ValueError, match=r'this state holds no caches: make one with lc\.init_state'
    ):
        layer.apply(weights, state, (x,), mode=Mode.PREDICT)


# Disk.


def test_paths_know_nothing_of_types():
    state = {
        'ff': {'aux_loss': tl.AuxLoss({'square': 1})},
        'core': KVCache(k=2, v=3, mask=None, position=Position(4)),
        'block': Blocks({'1': {'position': Position(6)}, '0': {'position': Position(5)}}),
    }
    flat = {
        'block/0/position': 5, 'block/1/position': 6, 'core/k': 2, 'core/position': 4,
        'core/v': 3, 'ff/aux_loss/square': 1,
    }  # fmt: skip
    assert trees.flatten(state) == flat == trees.flatten(trees.plain(state))
    assert list(trees.flatten(state)) == sorted(flat)
    assert trees.get(state, 'core/position') == 4 and trees.get(state, 'block/1/position') == 6
    back = trees.typed(trees.unflatten(flat), state)
    assert back == state and jax.tree.structure(back) == jax.tree.structure(state)
    mapped = trees.map_with_path(lambda path, x: (path, 10 * x)[1], state)
    assert mapped['core'].position.rows == 40 and type(mapped['block']) is Blocks
    for tree in (trees.plain(state), trees.plain((state, [state]))):
        assert not any(map(trees.is_typed, jax.tree.leaves(tree, is_leaf=trees.is_typed)))


@pytest.mark.parametrize('mode', [Mode.TRAIN, Mode.PREDICT])
def test_a_model_is_saved_and_loaded_with_its_types(tmp_path, mode):
    blocks = tl.Repeat(tl.Residual(tl.SelfAttention(2), tl.SwitchFF(8, 2)), 2)
    model = lc.Model(tl.Serial(tl.Embedding(16, 8), tl.LearnedPositions(L), blocks))
    tokens = jnp.ones((B, L), jnp.int32)
    model.init(tokens, mode=mode)
    model(tokens, mode=mode)
    model.save(tmp_path / 'model')
    other = lc.Model(model.layer).init(tokens, rng=1, mode=mode).load(tmp_path / 'model')
    assert_equal(other.state, model.state)


@pytest.mark.parametrize('unstacked', [False, True])
def test_training_begins_with_the_statistics_in_a_state_for_decoding(unstacked):
    block = tl.Serial(tl.BatchNorm(), tl.Conv1D(D, 2, padding='causal'), name='block')
    net = tl.Serial(tl.Repeat(tl.Repeat(block, 2, shared=True), 3))
    x = jnp.ones((B, L, D))
    weights, training = init(net, x)
    means = jnp.arange(6 * D, dtype=jnp.float32).reshape(3, 2, D)
    decoding = lc.init_state(net, (x,))
    for i, j in np.ndindex(3, 2):
        decoding['block'][str(i)][str(j)]['batch_norm']['mean'] = means[i, j]
    model = SimpleNamespace(layer=net, state=decoding)
    if unstacked:
        net, _ = lc.unstack(net, weights)
        model = lc.Model(net, {}, lc.transforms.unstack_state(model.layer, training))
        found = trained_state(model, lc.signature_of((x,)), model.state)
        assert_equal(found, model.state)
        return
    found = trained_state(model, lc.signature_of((x,)), training)
    np.testing.assert_array_equal(found['block']['batch_norm']['mean'], means)
    assert jax.tree.structure(found) == jax.tree.structure(training)
