"""The encoder-decoder: its gradient, what each side sees, what is kept, decoding, and errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import layercomb as lc
from layercomb import losses, models, tl, trees
from layercomb.layers.core.layer import init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.state.decisions import take_decisions
from layercomb.shapes import describe, shape_dtype
from layercomb.supervised import Loop, TrainTask

B, M, L, V, W, D, F, H, MAX = 2, 13, 10, 11, 7, 8, 12, 2, 16
LOCAL_AND_LSH = (
    tl.LocalSelfAttention(H, 4, dropout=0.1),
    tl.LSHSelfAttention(H, chunk_len=4, dropout=0.1),
)
BOTH_WAYS = (
    tl.LSHSelfAttention(H, chunk_len=4, causal=False, masked=True),
    tl.SelfAttention(H, causal=False, masked=True, dropout=0.1),
)

MIXED = (2, 2, 0.1, BOTH_WAYS, LOCAL_AND_LSH)


def build(n_encoder=1, n_decoder=1, dropout=0.0, *args, **changes):
    settings = {'masked': True, 'chunk_len': 4, 'target_vocab_size': W, 'ff_chunk_len': 6}
    return models.Reformer(
        V, D, F, n_encoder, n_decoder, H, MAX, dropout, *args, **{**settings, **changes}
    )


def local(n_layers):
    """A model that compiles fast."""
    kinds = tl.LocalSelfAttention(H, 4, causal=False, masked=True), tl.LocalSelfAttention(H, 4)
    return build(n_layers, n_layers, 0.0, *kinds, ff_chunk_len=None)


def values(masked=True):
    """Source, inputs and mask: the second row's source is 9 long."""
    rng = np.random.default_rng(0)
    source, inputs = rng.integers(0, V, (B, M)), rng.integers(0, W, (B, L))
    mask = np.arange(M) < np.array([[M], [9]])
    return tuple(map(jnp.asarray, (source, inputs, mask)[: 2 + masked]))


def init(net):
    return net.init(lc.signature_of(values(net.n_in == 3)), jax.random.key(1))


@functools.lru_cache
def weights_of(net):
    return jax.jit(functools.partial(init, net))()


@functools.partial(jax.jit, static_argnums=0, static_argnames='mode')
def apply(net, weights, state, inputs, rng=None, mode=Mode.EVAL):
    return net.apply(weights, state, inputs, rng=rng, mode=mode)


def logits(net, inputs):
    return apply(net, *weights_of(net), inputs)[0][0]


def test_a_model_built_twice_is_one_model():
    assert build() == build() and hash(build()) == hash(build())
    assert eval(repr(build(dropout=0.1)), vars(tl)) == build(dropout=0.1)


def test_shapes_and_paths():
    for positions, masked in (('axial', True), ('rotary', True), ('learned', False)):
        signature = lc.signature_of(values(masked))
        net = build(2, 2, positions=positions, masked=masked)
        assert net.n_in == 2 + masked
        assert describe(net.output_signature(signature)) == f'float32[{B},{L},{W}]'
    alone = build(target_vocab_size=None, masked=False).output_signature(signature)
    assert describe(alone) == f'float32[{B},{L},{V}]'
    weights = jax.eval_shape(lambda: init(build(2, 3)))[0]
    shapes = {path: x.shape for path, x in trees.flatten(weights).items()}
    assert list(weights) == ['decoder', 'encoder', 'head']
    decoder, encoder = 'decoder/block/reversible_half_residual', 'encoder/block/reversible_half_r'
    assert shapes[f'{decoder}/lsh_self_attention/query/kernel'] == (3, D, H, D // H)
    assert shapes[f'{decoder}_1/cross_attention/key/kernel'] == (3, D, H, D // H)
    assert shapes[f'{decoder}_2/feed_forward/dense/kernel'] == (3, D, F)
    assert shapes[f'{encoder}esidual/lsh_self_attention/query/kernel'] == (2, D, H, D // H)
    assert shapes['encoder/norm/scale'] == (D,) and shapes['head/layer_norm/scale'] == (2 * D,)
    assert shapes['encoder/embedding/table'] == (V, D) and shapes['head/dense/kernel'] == (2 * D, W)


@pytest.mark.slow
def test_the_gradient_is_that_of_plain_autodiff():
    """Of all weights, source embedding included: TRAIN runs backwards, RECORD keeps everything."""
    kinds = BOTH_WAYS[:1], LOCAL_AND_LSH[1:]
    net, inputs = build(3, 3, 0.1, *kinds, ff_chunk_len=None), values()
    weights, state = weights_of(net)
    # Where embeddings are next to nothing, norms magnify rounding.
    weights = trees.map_with_path(lambda p, w: 50 * w if 'embedding' in p else w, weights)

    @functools.partial(jax.jit, static_argnums=1)
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gradient(weights, mode):
        (y,), new = net.apply(weights, state, inputs, rng=jax.random.key(3), mode=mode)
        return (y * jnp.cos(y)).sum(), take_decisions(new)[1]

    (ours, kept), found = gradient(weights, Mode.TRAIN)
    (plain, decisions), expected = gradient(weights, Mode.RECORD)
    assert not kept and decisions.keys() == {'encoder', 'decoder'}
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    for path, want in trees.flatten(expected).items():
        got, scale = trees.get(found, path), float(jnp.abs(want).max())
        assert scale > 1e-2 or path.endswith('cross_attention/key/bias'), path  # softmax: zero
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * scale + 1e-6, err_msg=path)


@pytest.mark.slow  # decoding could not be evaluation if it were not
def test_the_decoder_is_causal():
    net, (source, inputs, mask) = build(*MIXED), values()
    y = logits(net, (source, inputs, mask))
    for t in (1, 4, 9):
        edited = inputs.at[:, t:].set((inputs[:, t:] + 1) % W)
        z = logits(net, (source, edited, mask))
        np.testing.assert_allclose(z[:, :t], y[:, :t], atol=1e-6)
        assert (jnp.abs(z - y)[:, t:].max((0, 2)) > 1e-4).all()


def test_padded_source_tokens_move_nothing_and_real_ones_do():
    net, (source, inputs, mask) = build(*MIXED), values()
    y = logits(net, (source, inputs, mask))
    padded = logits(net, (jnp.where(mask, source, (source + 1) % V), inputs, mask))
    np.testing.assert_allclose(padded, y, atol=1e-6)
    real = logits(net, (source.at[:, 8].set((source[:, 8] + 1) % V), inputs, mask))
    assert (jnp.abs(real - y).max((1, 2)) > 1e-4).all()


@pytest.mark.slow
def test_every_position_reads_a_source_without_a_mask():
    net = build(
        1, 1, 0.0, tl.SelfAttention(H, causal=False), tl.LocalSelfAttention(H, 4), masked=False
    )
    source, inputs = values(masked=False)
    edited = logits(net, (source.at[:, -1].set((source[:, -1] + 1) % V), inputs))
    assert (jnp.abs(edited - logits(net, (source, inputs))).max(-1) > 1e-5).all()


def test_decoding_gives_what_evaluation_gives():
    net, inputs = local(2), values()
    source, said, mask = inputs
    weights, _ = weights_of(net)
    expected = logits(net, inputs)
    made, state = [], init_state(net, lc.signature_of(inputs))
    for span in (slice(0, 8), slice(8, 9), slice(9, 10)):
        step = (source, said[:, span], mask)
        (y,), state = apply(net, weights, state, step, mode=Mode.PREDICT)
        made.append(y)
    np.testing.assert_allclose(jnp.concatenate(made, 1), expected, atol=1e-5)


def test_attention_may_be_by_hashing_on_both_sides():
    """And full from one side to the other; buckets are made for the longest sequence."""
    back = tl.HashedSelfAttention(H, n_hashes=2, chunk_len=2, local_len=2)
    look = back.replace(causal=False, masked=True)
    net, (source, said, mask) = build(1, 1, 0.0, look, back), values()
    whole = logits(net, (source, said, mask))
    assert whole.shape == (B, L, W)
    edited = logits(net, (source, said.at[:, 4:].set((said[:, 4:] + 1) % W), mask))
    np.testing.assert_allclose(edited[:, :4], whole[:, :4], atol=1e-6)
    padded = logits(net, (jnp.where(mask, source, (source + 1) % V), said, mask))
    np.testing.assert_allclose(padded, whole, atol=1e-6)
    weights, _ = weights_of(net)
    made, state = [], init_state(net, lc.signature_of((source, said, mask)))
    for span in (slice(0, L - 1), slice(L - 1, L)):
        step = (source, said[:, span], mask)
        (y,), state = apply(net, weights, state, step, mode=Mode.PREDICT)
        made.append(y)
    np.testing.assert_allclose(jnp.concatenate(made, 1), whole, atol=1e-5)


def test_the_parts_decode_without_the_encoder_running_again():
    net, (source, said, mask) = local(2), values()
    net, weights = lc.unstack(net, weights_of(net)[0])
    parts = dict(zip(net.keys, net.sublayers, strict=True))
    (memory,), _ = apply(parts['encoder'], weights['encoder'], {}, (source, mask))
    state = init_state(parts['decoder'], lc.signature_of((said, memory, mask)))
    made = []
    for span in (slice(0, 8), slice(8, 9), slice(9, 10)):
        step = (said[:, span], memory, mask)
        streams, state = apply(parts['decoder'], weights['decoder'], state, step, mode=Mode.PREDICT)
        made.append(apply(parts['head'], weights['head'], {}, streams)[0][0])
    expected = logits(local(2), (source, said, mask))
    np.testing.assert_allclose(jnp.concatenate(made, 1), expected, atol=1e-5)


def test_a_loss_is_attached_and_trained():
    net, (source, inputs, mask) = local(2), values()
    targets = jnp.roll(inputs, -1, 1)
    for model in (net, build(masked=False)):
        assert losses.attach(model, tl.CrossEntropyLoss(), chunk_len=4).n_in == model.n_in + 2

    def error(weights):
        (y,), _ = apply(net, weights, {}, (source, inputs, mask))
        return -jnp.take_along_axis(jax.nn.log_softmax(y), targets[..., None], -1).mean()

    weights, state = weights_of(net)
    model = lc.Model(net, weights, state)
    before = error(weights)
    batch = tuple(map(np.asarray, (source, inputs, mask, targets, jnp.ones((B, L)))))
    task = TrainTask([batch] * 30, tl.CrossEntropyLoss(), optax.adam(3e-2), loss_chunk_len=4)
    loop = Loop(model, task, progress=False)
    first = loop.run(1)['train/loss']
    np.testing.assert_allclose(first, before, rtol=1e-5)
    loop.run(30)
    assert error(loop.weights) < 0.6 * before


def test_a_model_is_cast():
    signature = lc.signature_of(values())
    assert describe(lc.cast(local(2)).output_signature(signature)) == f'bfloat16[{B},{L},{W}]'


MASKED = tl.LocalSelfAttention(2, 32, causal=False, masked=True)
KINDS = [
    pytest.param((MASKED, tl.LocalSelfAttention(2, 32)), id='local'),
    pytest.param((None, None), id='lsh'),
]


@pytest.mark.slow  # tests/layers/reversible/test_reversible.py has the stacks by themselves
@pytest.mark.parametrize('kinds', KINDS)
def test_memory_does_not_grow_with_depth(kinds, optimized):
    """The temporaries of the gradient, less the decisions that must be kept."""
    tokens = shape_dtype((4, 128), 'int32')
    signature = (tokens, tokens, shape_dtype((4, 128), bool))

    def temporaries(n):
        net = models.Reformer(
            16, 32, 64, n, n, 2, 128, 0.1, *kinds,
            masked=True, n_hashes=2, chunk_len=32, ff_chunk_len=None,
        )  # fmt: skip
        key = jax.eval_shape(jax.random.key, 0)
        weights, state = jax.eval_shape(lambda key: net.init(signature, key), key)

        def run(weights, inputs, key, mode):
            (y,), new = net.apply(weights, state, inputs, rng=key, mode=mode)
            return (y * y).sum(), take_decisions(new)[1]

        record = functools.partial(run, mode=Mode.RECORD)
        kept = trees.n_bytes(jax.eval_shape(record, weights, signature, key)[1])
        grad = jax.grad(lambda *args: run(*args, Mode.TRAIN)[0])
        compiled = jax.jit(grad).lower(weights, signature, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes - kept

    low, high = temporaries(4), temporaries(16)
    assert high < 1.02 * low


def test_what_is_refused():
    with pytest.raises(ValueError, match=r'n_layers=3 is no multiple of the 2 attention .*: use 4'):
        build(3, 2, 0.0, BOTH_WAYS)
    with pytest.raises(ValueError, match=r'n_layers=1 is no multiple of the 2 attention .*: use 2'):
        build(2, 1, 0.0, None, LOCAL_AND_LSH)
    with pytest.raises(ValueError, match='attention is empty: give a layer, or several'):
        build(1, 1, 0.0, [])
    with pytest.raises(TypeError, match='attention must be a Layer or a sequence of Layer or None'):
        build(1, 1, 0.0, tl.SelfAttention)
    with pytest.raises(ValueError, match="no positions 'absolute': there are learned, sinusoidal"):
        build(positions='absolute')
    with pytest.raises(ValueError, match='covers 8 positions, max_len is 16: use'):
        build(axial_shape=(2, 4))
    with pytest.raises(ValueError, match="positions='rotary': no layer of the attention pattern"):
        build(1, 1, 0.0, None, tl.Dense(), positions='rotary')
    with pytest.raises(ValueError, match=f'sequence is {MAX + 1} long and max_len={MAX}: shorten'):
        too_long = shape_dtype((B, MAX + 1), 'int32')
        build(masked=False).output_signature((too_long, too_long))


def test_attention_that_does_not_fit_its_place_is_refused():
    local = tl.LocalSelfAttention(H, 4, causal=False)
    with pytest.raises(
        ValueError,
        match='encoder_attention: LocalSelfAttention has 1 in and 1 out and stands where 2 in '
        'and 1 out are: make it with masked=True',
    ):
        build(1, 1, 0.0, local)
    with pytest.raises(
        ValueError, match=r'has 2 in and .* where 1 in .*: make it with masked=False'
    ):
        build(1, 1, 0.0, local.replace(masked=True), masked=False)
    with pytest.raises(
        ValueError, match=r'decoder_attention: SelfAttention has 2 in .*masked=False'
    ):
        build(1, 1, 0.0, None, tl.SelfAttention(H, masked=True))
    with pytest.raises(ValueError, match=r'cross_attention: CrossAttention has 2 in .*masked=True'):
        build(cross_attention=tl.CrossAttention(H))
    with pytest.raises(
        ValueError,
        match='LocalSelfAttention with causal=False sees the tokens that it should predict: make '
        'it with causal=True',
    ):
        build(1, 1, 0.0, None, tl.Remat(local))
    with pytest.raises(TypeError, match='takes 3 values off the stack, only 2 were there'):
        build().output_signature(lc.signature_of(values(masked=False)))


@pytest.mark.parametrize('masked', [False, True])
def test_ids_of_either_side_are_looked_up_in_a_vocabulary_of_its_own(masked):
    """Compiled code gives NaN for others, which training would take for a rate too high."""
    attention = tl.SelfAttention(H, causal=False, masked=masked), tl.LocalSelfAttention(H, 4)
    net = build(1, 1, 0.0, *attention, masked=masked)
    model = lc.Model(net, weights_of(net), {})
    source, inputs, *mask = values(masked)
    wrong = 'token id {} is outside the vocabulary of {}'
    with pytest.raises(ValueError, match=wrong.format(99, V)):
        model(source.at[0, 1].set(99), inputs, *mask)
    with pytest.raises(ValueError, match=wrong.format(W, W)):
        model(source, inputs.at[1, 2].set(W), *mask)
