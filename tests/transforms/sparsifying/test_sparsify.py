"""`sparsify`: the same function where all is chosen, and a good choice where little is."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layercomb import init_state, models, shape_dtype, signature_of, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.transforms.quantization.calibration.values import stack_of
from layercomb.transforms.sparsifying.fitting import fitted
from layercomb.transforms.sparsifying.placing import Sizes, placed
from layercomb.transforms.sparsifying.units import balanced, chosen, together
from layercomb.transforms.sparsifying.walking import Fitting

B, L, V = 4, 24, 13
SIZES = {'d_model': 16, 'd_ff': 32, 'n_layers': 2, 'n_heads': 4, 'max_len': 32}
TOKENS = (shape_dtype((B, L), 'int32'),)
ALL = {'n_experts': 8, 'n_chosen': 6, 'n_shared': 2}
NAMES = {'in': 'kernel_transposed', 'up': 'kernel_transposed', 'out': 'kernel'}
FEW = {'n_experts': 8, 'n_chosen': 2, 'n_shared': 1}


class Unknown(Wrapper):
    """Holds a layer, and the library does not know how it is applied."""

    position_wise = True

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)


class Twice(Unknown):
    """Computes twice what the layer inside does."""

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (y,), state = super().apply(weights, state, inputs, rng=rng, mode=mode)
        return (2 * y,), state


def batches(n=4):
    return [jax.random.randint(jax.random.key(i), (B, L), 0, V) for i in range(n)]


def made(net):
    weights, _ = net.init(TOKENS, jax.random.key(7))
    keys = iter(jax.random.split(jax.random.key(8), 99))  # biases are not zero
    noise = lambda x: 0.1 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    return jax.tree.map(lambda x: x + noise(x), weights)


def outputs(net, weights, ids=None):
    ids = batches()[0] if ids is None else ids
    return net.apply(weights, init_state(net, (ids,), Mode.EVAL), (ids,))[0][0]


def feed_forward(d=16, d_ff=64, gated=True, n=600):
    """A dense layer, its weights and inputs that lie in a few directions."""
    inside = tl.GatedDense(d_ff) if gated else tl.Dense(d_ff)
    net = tl.Serial(inside, *([] if gated else [tl.Gelu()]), tl.Dense(d, use_bias=not gated))
    weights, _ = net.init(shape_dtype((1, d)), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    kinds = 3 * jax.random.normal(keys[0], (6, d))[jax.random.randint(keys[1], (n,), 0, 6)]
    return net, weights, kinds + jax.random.normal(keys[2], (n, d))


REPEATED = tl.Repeat(tl.Serial(tl.Dense(32), tl.Relu(), tl.Dense(16)), 2)
shared = tl.Serial(
    tl.Embedding(V, 16),
    tl.Repeat(tl.Residual(tl.Dense(32), tl.Relu(), tl.Dense(16)), 3, shared=True),
)
mapped = tl.Serial(
    tl.Embedding(V, 16),
    tl.Dup(),
    tl.Map(tl.Serial(tl.LayerNorm(), tl.Dense(32), tl.Tanh(), tl.Dense(16)), 2),
    tl.Add(),
)
NETS = {
    'gated': models.Llama(V, **SIZES, n_kv_heads=2, tied=True),
    'alternating': models.Llama(V, **{**SIZES, 'n_layers': 5}, window=(4, None)),
    'norms after': models.Gemma2(V, **SIZES, n_kv_heads=2, d_head=4),
    'plain with biases': models.TransformerLM(V, **SIZES),
    'in slices': models.TransformerLM(V, **SIZES, ff_chunk_len=8, dropout=0.1),
    'GPT-2': models.GPT2(V, 16, n_layers=2, n_heads=4, max_len=32, d_ff=32),
    'reversible': models.ReformerLM(V, **SIZES, n_hashes=1, chunk_len=8),
    'cast': transforms.cast(models.Llama(V, **SIZES, n_kv_heads=2), 'float32'),
    'rematerialized': transforms.remat(models.TransformerLM(V, **SIZES)),
    'unstacked': transforms.unstack(models.TransformerLM(V, **SIZES), {})[0],
    'nothing around': tl.Serial(tl.Embedding(V, 16), REPEATED),
    'shared': shared,
    'mapped': mapped,
}


@pytest.mark.parametrize('name', NETS)
def test_all_experts_chosen_compute_what_the_model_did(name):
    net = NETS[name]
    weights = made(net)
    sparse, its = transforms.sparsify(net, weights, batches(), **ALL)
    np.testing.assert_allclose(outputs(sparse, its), outputs(net, weights), atol=1e-5)
    like, _ = sparse.init(TOKENS, jax.random.key(0))
    assert jax.tree.structure(its) == jax.tree.structure(like)
    for x, wanted in zip(jax.tree.leaves(its), jax.tree.leaves(like), strict=True):
        assert (x.shape, x.dtype) == (wanted.shape, wanted.dtype)


def test_both_sides_of_a_translator_that_reads_a_mask_and_no_shared_experts():
    net = models.Transformer(V, 16, 32, 1, 1, 4, 32, dropout=0.1, masked=True)
    read = [(ids, ids, ids > 2) for ids in batches()]
    weights, state = net.init(signature_of(read[0]), jax.random.key(7), Mode.EVAL)
    sparse, its = transforms.sparsify(net, weights, read, n_experts=8, n_chosen=8, n_shared=0)
    assert sum(isinstance(layer, tl.MixtureFF) for _, layer in walk(sparse)) == 2
    wanted, found = (
        each.apply(w, state, read[0])[0][0] for each, w in ((net, weights), (sparse, its))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_weights_keep_their_dtype_and_the_router_is_wide():
    net = transforms.cast(models.Llama(V, **SIZES, n_kv_heads=2))
    weights = made(net)
    for part in ('gated_dense', 'dense'):
        inside = weights['block']['feed_forward']
        inside[part] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), inside[part])
    sparse, its = transforms.sparsify(net, weights, batches(), **ALL)
    ff = its['block']['feed_forward']['mixture_ff']
    assert {key: {x.dtype for x in part.values()} for key, part in ff.items()} == {
        'router': {jnp.dtype('float32')},
        **{key: {jnp.dtype('bfloat16')} for key in ('in', 'up', 'out')},
    }
    np.testing.assert_allclose(outputs(sparse, its), outputs(net, weights), atol=0.1)


def test_units_stay_the_same_in_another_order():
    net, weights, x = feed_forward()
    _, its = transforms.sparsify(net, weights, [x], **ALL)
    gate, up = weights['gated_dense']['gate'].T, weights['gated_dense']['up'].T
    rows, ups, back = (its[k][n].reshape(64, 16) for k, n in NAMES.items())
    order = [int(np.flatnonzero((gate == row).all(1))[0]) for row in rows]
    assert sorted(order) == list(range(64)) and order != list(range(64))
    np.testing.assert_array_equal(ups, up[np.array(order)])
    back = back / np.repeat([1.0, 2.0], [16, 48])[:, None]
    np.testing.assert_allclose(back, weights['dense']['kernel'][np.array(order)], atol=1e-5)


@pytest.mark.parametrize('gated', [True, False])
def test_fitted_mixtures_are_nearer_than_random_ones(gated):
    net, weights, x = feed_forward(gated=gated)
    known, held = x[:500], x[500:]
    (wanted,), _ = net.apply(weights, {}, (held,))
    sparse, its = transforms.sparsify(net, weights, [known], **FEW)

    def error(its):
        (y,), _ = sparse.apply(its, {}, (held,))
        return float(jnp.square(y - wanted).sum() / jnp.square(wanted).sum())

    router = its['router']
    other = jax.random.permutation(jax.random.key(0), router['kernel'].T).T
    assert error(its) < 0.6 * error({**its, 'router': {**router, 'kernel': other}})
    plain = {**its, 'out': {**its['out'], 'kernel': jnp.zeros_like(its['out']['kernel'])}}
    assert error(its) < 0.5 * error(plain)  # which is the mean of nothing


def test_the_router_is_near_the_best_choice_and_the_matrix_back_makes_up(caplog):
    net, weights, x = feed_forward()
    with caplog.at_level(logging.INFO):
        transforms.sparsify(net, weights, [x], **FEW)
    (record,) = caplog.records
    _, (oracle, routed, fitted_) = record.args
    assert oracle <= routed < 1.5 * oracle and fitted_ < 0.9 * routed


def test_blocks_are_fitted_to_the_inputs_of_all_their_uses_and_no_others():
    block = tl.Residual(tl.Dense(32), tl.Relu(), tl.Dense(16))
    beside = block.replace(name='beside')
    inner = tl.Serial(tl.Repeat(block, 2), tl.Repeat(beside, 2, shared=True))
    net = tl.Repeat(inner, 3, shared=True)
    x = jax.random.normal(jax.random.key(0), (40, 16))
    weights, _ = net.init(shape_dtype((1, 16)), jax.random.key(1))
    made, dense = placed(net, weights, Sizes(8, 6, 2))
    seen = []

    def fit(mixture, own, read, path):
        seen.append((path, np.asarray(read)))
        return fitted(mixture, own, np.concatenate(read), 0)[0]

    Fitting(fit).through(made, dense, {}, '', stack_of(((x,),)))
    first, second, both = [], [], []
    for _ in range(3):
        for i, into in enumerate((first, second)):
            into.append(x)
            own = jax.tree.map(lambda w, i=i: w[i], weights['residual'])
            (x,), _ = block.apply(own, {}, (x,))
        for _ in range(2):
            both.append(x)
            (x,), _ = beside.apply(weights['beside'], {}, (x,))
    assert [path for path, _ in seen] == [*['residual/mixture_ff'] * 2, 'beside/mixture_ff']
    for (_, found), wanted in zip(seen, (first, second, both), strict=True):
        np.testing.assert_allclose(found, np.stack(wanted), atol=1e-5)


def test_decoding_and_training_go_on():
    net = models.Llama(V, **SIZES, n_kv_heads=2)
    sparse, weights = transforms.sparsify(net, made(net), batches(), **FEW)
    ids = batches()[0]
    wanted = outputs(sparse, weights, ids)
    state = init_state(sparse, TOKENS, Mode.PREDICT)
    got = []
    step = jax.jit(lambda state, x: sparse.apply(weights, state, (x,), mode=Mode.PREDICT))
    for part in (ids[:, : L - 3], *jnp.split(ids[:, L - 3 :], 3, 1)):
        (y,), state = step(state, part)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, 1), wanted, atol=2e-5)

    def loss(weights):
        state = init_state(sparse, TOKENS, Mode.TRAIN)
        (y,), _ = sparse.apply(weights, state, (ids,), rng=jax.random.key(0), mode=Mode.TRAIN)
        return jnp.square(y).mean()

    grads = trees.flatten(jax.jit(jax.grad(loss))(weights))
    router = grads['block/feed_forward/mixture_ff/router/kernel']
    assert (jnp.abs(router).sum((1, 2)) > 0).all()  # of both blocks


def test_the_same_batches_give_the_same_weights():
    net = models.TransformerLM(V, **SIZES)
    weights = made(net)
    first, again = (transforms.sparsify(net, weights, batches(), **FEW)[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_where_chooses_and_other_layers_keep_their_names():
    net = tl.Serial(
        tl.Embedding(V, 16), tl.Dense(32), tl.Relu(), tl.Dense(16), tl.Dense(32), tl.Relu(),
        tl.Dropout(0.1), tl.Dense(16), tl.Dense(V),
    )  # fmt: skip
    weights = made(net)
    both, its = transforms.sparsify(net, weights, batches(), **ALL)
    assert set(its) == {'embedding', 'dense_4', 'mixture_ff', 'mixture_ff_1'}
    np.testing.assert_allclose(outputs(both, its), outputs(net, weights), atol=1e-5)
    one, its = transforms.sparsify(net, weights, batches(), where='dense_2', **ALL)
    assert {'dense', 'dense_1', 'dense_4', 'mixture_ff'} < set(one.keys)
    np.testing.assert_allclose(outputs(one, its), outputs(net, weights), atol=1e-5)
    with pytest.raises(
        ValueError, match="where='attention': their first matrices are at 'dense', "
    ):
        transforms.sparsify(net, weights, batches(), where='attention')


def test_what_stands_beside_a_series_that_became_a_mixture_keeps_its_name():
    inside = [tl.Serial(tl.Dense(d), tl.Relu(), tl.Dense(16)) for d in (32, 24)]
    net = tl.Serial(*inside, tl.Serial(tl.Dense(16)))
    x = jax.random.normal(jax.random.key(0), (40, 16))
    weights, _ = net.init(shape_dtype((2, 16)), jax.random.key(1))
    sparse, its = transforms.sparsify(net, weights, [x], where='^serial/', **ALL)
    assert sparse.keys == ('mixture_ff', 'serial_1', 'serial_2')
    np.testing.assert_allclose(outputs(sparse, its, x), outputs(net, weights, x), atol=1e-5)


def test_what_changes_the_width_stays():
    net = tl.Serial(tl.Dense(32), tl.Relu(), tl.Dense(16), tl.Relu(), tl.Dense(32), tl.Relu(),
                    tl.Dense(16), tl.Tanh(), tl.Dense(3))  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (40, 8))
    weights, _ = net.init(shape_dtype((2, 8)), jax.random.key(1))
    sparse, its = transforms.sparsify(net, weights, [x], **ALL)
    assert sparse.keys == ('dense', 'relu', 'dense_1', 'relu_1', 'mixture_ff', 'tanh', 'dense_4')
    np.testing.assert_allclose(outputs(sparse, its, x), outputs(net, weights, x), atol=1e-5)


@pytest.mark.parametrize('at', range(3))
def test_what_is_inside_an_unknown_wrapper_is_no_part_of_a_feed_forward(at):
    layers = [tl.Dense(32), tl.Relu(), tl.Dense(16)]
    layers[at] = Twice(layers[at])
    plain = tl.Residual(tl.Dense(32), tl.Remat(tl.Relu()), tl.Dense(16))
    net = tl.Serial(tl.Embedding(V, 16), tl.Residual(*layers), plain)
    weights = made(net)
    sparse, its = transforms.sparsify(net, weights, batches(), **ALL)
    assert sum(isinstance(layer, tl.MixtureFF) for _, layer in walk(sparse)) == 1
    np.testing.assert_allclose(outputs(sparse, its), outputs(net, weights), atol=1e-5)


def sparsify(net=None, weights=None, read=None, **options):
    net = net or models.Llama(V, **SIZES, n_kv_heads=2)
    read = batches() if read is None else read
    return transforms.sparsify(
        net, made(net) if weights is None else weights, read, **{**FEW, **options}
    )


def test_errors_say_cause_and_cure():
    llama = models.Llama(V, **SIZES, n_kv_heads=2)
    with pytest.raises(ValueError, match=r'does not divide the 32 units of .*: use n_experts=4'):
        sparsify(n_experts=5)
    with pytest.raises(ValueError, match='n_chosen=8 and n_shared=1 are more than n_experts=8'):
        sparsify(n_chosen=8)
    with pytest.raises(ValueError, match='no dense feed-forward in this Serial: it looks for'):
        sparsify(tl.Serial(tl.Embedding(V, 16), tl.Dense(32), tl.Relu(), tl.Dense(8)))
    with pytest.raises(ValueError, match="'block/feed_forward/mixture_ff' is a mixture already"):
        sparsify(*sparsify())
    with pytest.raises(ValueError, match='have 8 positions, too few to fit the router at'):
        sparsify(read=[batches()[0][:1, :8]])
    with pytest.raises(TypeError, match='sparsify: batches is a ArrayImpl: give a list of'):
        sparsify(read=batches()[0])
    with pytest.raises(
        ValueError, match=r"has narrow weights, .* load the model with dtype='float32'"
    ):
        sparsify(*transforms.quantize(llama, made(llama), smallest=1))
    with pytest.raises(ValueError, match='has adapters: merge them first'):
        sparsify(*transforms.lora(llama, made(llama)))
    with pytest.raises(ValueError, match='has a bias beside its gate'):
        sparsify(models.Llama(V, **SIZES, n_kv_heads=2, ff_bias=True))
    with pytest.raises(
        ValueError, match='are not to be seen, for Unknown is not entered: leave it'
    ):
        sparsify(
            tl.Serial(tl.Embedding(V, 16), Unknown(tl.Serial(tl.GatedDense(32), tl.Dense(16))))
        )
    weights = made(llama)
    weights['embedding']['table'] = weights['embedding']['table'] * jnp.nan
    with pytest.raises(ValueError, match='gets inputs that are not finite'):
        sparsify(llama, weights)
    ends = [tl.Serial(tl.GatedDense(32), tl.Dense(16), name=name) for name in 'ab']
    tied = transforms.Tied(tl.Serial(tl.Embedding(V, 16), *ends), 'a', 'b')
    with pytest.raises(ValueError, match='has no weights of its own'):
        sparsify(tied)
    with pytest.raises(ValueError, match="at 'a' has weights that 'b' uses, too: leave it out"):
        sparsify(tied, where='^a')
    one = transforms.Tied(tied.layer, 'a/gated_dense/up', 'b/gated_dense/up')
    with pytest.raises(ValueError, match="at 'b/gated_dense' has no weights of its own"):
        sparsify(one)
    with pytest.raises(ValueError, match=r"where='\*ff\*' is no regular expression"):
        sparsify(where='*ff*')
    segments = [(ids, jnp.ones_like(ids)) for ids in batches()]
    with pytest.raises(ValueError, match='for Segmented is not entered: make the layer inside'):
        sparsify(transforms.Segmented(llama), made(llama), segments)
    norm = tl.Serial(tl.Embedding(V, 16), tl.BatchNorm(), tl.GatedDense(32), tl.Dense(16))
    with pytest.raises(ValueError, match='running statistics, that its inputs depend on: give'):
        sparsify(norm)


def test_experts_are_full_and_hold_what_is_active_together():
    rng = np.random.default_rng(0)
    kind = rng.permutation(np.repeat(np.arange(6), 4))
    energy = (rng.integers(0, 6, (500, 1)) == kind).astype(np.float32)
    energy += 0.01 * rng.random((500, 24), np.float32)
    experts = together(energy, 4, 1, rng)
    assert sorted(experts.reshape(-1)) == list(range(24))
    assert all(len(set(kind[expert])) == 1 for expert in experts)


def test_units_that_find_no_place_go_to_their_next_expert():
    gain = np.array([[9, 1, 0], [8, 5, 0], [7, 6, 0], [0, 0, 1], [9, 9, 2], [1, 1, 1]], float)
    assert balanced(gain, 2).tolist() == [0, 1, 1, 2, 0, 2]
    assert chosen(np.array([[1.0, 3.0, 2.0]]), 2).tolist() == [[0, 1, 1]]
