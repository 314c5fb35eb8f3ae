"""Packed rows: each document gives what it gives alone, and no other changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import losses, models, tl, transforms
from layercomb.layers.core.mode import Mode

V, N = 17, 5  # tokens, as many as positions of a row; positions of a document

LM = {'d_model': 8, 'd_ff': 8, 'n_layers': 2, 'n_heads': 2, 'max_len': 64}


def lm(**options):
    return models.TransformerLM(V, **{**LM, **options})


def lsh(**options):
    return tl.LSHSelfAttention(2, n_hashes=2, chunk_len=2, n_buckets=2, **options)


def every_kind():
    """Every kind of attention and of positions, one after the other in one program."""
    pairs = tl.RotaryPositions(scaling=tl.DynamicScaling(2.0, 3), layout='pairs')
    chunks = tl.LSHAttention(n_hashes=2, chunk_len=2, n_buckets=2, neighbourhood='chunk')
    return tl.Serial(
        tl.Embedding(V, 8),
        tl.LearnedPositions(64, first=2),
        tl.Residual(tl.SelfAttention(2, n_kv_heads=1, window=3, rotary=pairs)),
        tl.SinusoidalPositions(),
        tl.Residual(tl.LocalSelfAttention(2, 2, False, look_ahead=1)),
        tl.AxialPositions((8, 8)),
        tl.Residual(lsh()),
        tl.SinusoidalPositions(max_len=64, trainable=True),
        tl.Residual(tl.LSHSelfAttention(2, core=chunks.replace(duplicates='once', causal=False))),
        tl.Serial(tl.RelativeBias(2, 8, 6), tl.SelfAttention(2, relative=True, softcap=2.0)),
        tl.Dense(V),
    )


def recurrent():
    return tl.Serial(
        tl.Embedding(V, 8),
        tl.SRU(),
        tl.LSTM(6),
        tl.Bidirectional(tl.GRU(4), tl.SRU(3)),
        tl.Dense(V),
    )


FAST = {
    'every kind': every_kind,
    'recurrent': recurrent,
    'reformer': lambda: models.ReformerLM(V, **{**LM, 'n_layers': 1}, attention=lsh()),
}
SLOW = {
    'bert': lambda: models.BERT(V, **LM, masked=True),
    'transformer': lm,
    'local': lambda: lm(attention=tl.LocalSelfAttention(2, 2), positions='sinusoidal'),
    'lsh': lambda: lm(attention=lsh(), positions='rotary'),
    'lsh chunk': lambda: lm(attention=lsh(neighbourhood='chunk', duplicates='once')),
    'narrow': lambda: transforms.cast(lm(positions='sinusoidal')),
    'reformer of all': lambda: models.ReformerLM(V, **LM, positions='axial', ff_chunk_len=4),
    'terraformer': lambda: models.TerraformerLM(
        V, **LM, ff_block_size=4, qkv_modules=None, head_modules=2, positions='learned'
    ),
    'llama': lambda: models.Llama(V, **LM, n_kv_heads=1, remat=True),
    'gemma3': lambda: models.Gemma3(V, **{**LM, 'n_layers': 3}, d_head=4, window=(2, 3, None)),
    'gpt2': lambda: models.GPT2(V, **LM),
}
MODELS = {**FAST, **SLOW}
SOME = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def rows(key):
    """Three documents alone (3, N), and packed into one row (1, V): tokens, segments."""
    packed = jax.random.permutation(key, jnp.arange(V, dtype=jnp.int32))[None]  # no token twice
    ids = np.repeat(np.arange(4), [N, N, N, V - 3 * N])
    return packed[:, : 3 * N].reshape(3, N), packed, jnp.asarray(ids, jnp.int32)[None]


def gradients(net, weights, state, inputs):
    """A function from cotangents of logits to logits and gradients."""

    @jax.jit
    def run(weights, ct):
        (y,), new = net.apply(weights, state, inputs, rng=jax.random.key(3), mode=Mode.TRAIN)
        assert tl.take_counted(new)[1] == {}
        return jnp.sum(y.astype(jnp.float32) * ct), y

    return lambda ct: jax.grad(run, has_aux=True)(weights, ct)


@pytest.mark.parametrize('name', SOME)
def test_packed_is_each_document_alone(name):
    net = MODELS[name]()
    alone, packed, ids = rows(jax.random.key(0))
    inputs, of_packed = (alone,), (packed,)
    if net.n_in == 2:
        mask = jax.random.uniform(jax.random.key(1), packed.shape) < 0.8
        inputs, of_packed = (alone, mask[:, : 3 * N].reshape(3, N)), (packed, mask)
    weights, state = net.init(lc.signature_of(inputs), jax.random.key(1))
    seg = transforms.segmented(net)
    assert seg.n_in == net.n_in + 1
    run = gradients(seg, weights, state, (*of_packed, ids))
    n_logits = net.output_signature(inputs)[0].shape[-1]
    ct = jax.random.normal(jax.random.key(2), (3, N, n_logits))
    grads, y = gradients(net, weights, state, inputs)(ct)
    got_grads, got = run(jnp.pad(ct.reshape(1, 3 * N, -1), ((0, 0), (0, V - 3 * N), (0, 0))))
    far = 0.05 if 'narrow' in name else 2e-5
    np.testing.assert_allclose(got[:, : 3 * N].reshape(y.shape), y, rtol=far, atol=far)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5 * far * max(1.0, float(jnp.abs(b).max())))
    if isinstance(net, transforms.Tied):  # whose head has a gradient for every token
        return
    # Of the middle document alone: exactly zero for all others, which share blocks and buckets.
    middle = jnp.zeros((1, V, n_logits)).at[:, N : 2 * N].set(ct[1])
    by_position = run(middle)[0]['embedding']['table'][packed[0]]
    assert not by_position[:N].any() and not by_position[2 * N :].any()
    assert by_position[N : 2 * N].any(1).all()


def test_layers_are_told_of_documents_and_of_positions_that_count():
    """Side by side, through everything that takes states apart; what was told does not stay."""
    block = tl.Serial(
        tl.Residual(tl.SelfAttention(2)), tl.Chunk(tl.SwitchFF(8, 2), 4), tl.Remat(tl.Dense())
    )
    net = tl.Serial(tl.Repeat(tl.Map(block, 1), 2), tl.Dense(V))
    x = jax.random.normal(jax.random.key(0), (1, 10, 8))
    ids = jnp.asarray([[1] * 5 + [2] * 5], jnp.int32)
    weights, state = net.init(lc.signature_of((x,)), jax.random.key(1))
    counts = jnp.asarray([[1] * 5 + [0] * 5])

    def run(net, *args, counts):
        return losses.apply_counted(net, weights, state, args, counts, rng=jax.random.key(2))

    (y,), alone = run(net, x[:, :5], counts=counts[:, :5])
    (got,), new = run(transforms.segmented(net), x, ids, counts=counts)
    np.testing.assert_allclose(got[:, :5], y, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_allclose(losses.total(new), losses.total(alone), rtol=1e-5)


def test_losses_are_attached_behind_the_segments():
    net = tl.Serial(tl.Embedding(V, 8), tl.SelfAttention(2), tl.Dense(V))
    scored = losses.attach(transforms.segmented(net), tl.CrossEntropyLoss(), chunk_len=4)
    assert isinstance(scored, transforms.Segmented) and (scored.n_in, scored.place) == (4, 1)
    assert scored.layer == losses.attach(net, tl.CrossEntropyLoss(), chunk_len=4)


class Averages(tl.Layer):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (inputs[0].mean(1, keepdims=True),), state


class Hides(tl.Wrapper):
    position_wise = property(lambda self: self.layer.position_wise)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(weights, {}, inputs, rng=rng, mode=mode)


HIDDEN = Hides(tl.SelfAttention(2))


class Other(tl.DotProductAttention):
    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return inputs[:1], state


class Own(Averages):
    position_wise = False
    sees_segments = True


REFUSED = {
    'Conv1D mixes positions and does not know segments, so documents of a row would see each '
    'other: train without packing, or, if': lambda: tl.Serial(tl.Residual(tl.Conv1D(8, 3))),
    'LocalConv mixes': lambda: models.TerraformerLM(V, **LM, ff_block_size=4, qkv_modules=4),
    'FourierMixing mixes': tl.FourierMixing,
    'BatchNorm mixes': tl.BatchNorm,
    'SequenceAccuracy mixes': lambda: losses.attach(tl.Dense(V), tl.SequenceAccuracy()),
    'CrossAttention reads another sequence': lambda: tl.CrossAttention(2),
    'Once reads another sequence, of whose': lambda: models.Transformer(V, **SEQ2SEQ),
    'AfterMemory mixes|Once reads': lambda: models.Terraformer(V, **SEQ2SEQ, **DENSE),
    r'Averages\(\) does not say whether it works on each position by itself: train': Averages,
    'Hides holds layers and does not tell them of segments: set carr': lambda: HIDDEN,
    r'Other\(\) does not say whether': Other,  # has another apply: forgets what it inherits
}
DENSE: dict = {'ff_block_size': None, 'qkv_modules': None}
SEQ2SEQ: dict = {'d_model': 8, 'd_ff': 8, 'n_heads': 2, 'max_len': 8}


@pytest.mark.parametrize('said', REFUSED)
def test_what_would_mix_documents_is_refused_by_name(said):
    net = REFUSED[said]()
    with pytest.raises(TypeError, match=f'segmented: {said}' if '|' not in said else said):
        transforms.segmented(net)


def test_a_layer_of_ones_own_may_say_that_it_sees_segments():
    assert transforms.segmented(tl.Serial(Own(), tl.Fn('Zero', jnp.zeros_like))).n_in == 2


def test_wrong_segments_and_decoding_are_refused():
    seg = transforms.segmented(lm())
    tokens = jnp.zeros((2, 6), jnp.int32)
    for wrong in (tokens[:1], tokens.astype(jnp.float32), tokens[:, :5]):
        with pytest.raises(ValueError, match=r'segments must be int32\[2, 6\], the document of'):
            seg.init(lc.signature_of((tokens, wrong)), jax.random.key(0))
    with pytest.raises(ValueError, match='decode with the model inside, one row for each doc'):
        lc.init_state(seg, (tokens, tokens))


def test_temporaries_grow_with_the_length_and_no_faster():
    def n_bytes(length):
        seg = transforms.segmented(tl.SelfAttention(2))
        x, ids = lc.shape_dtype((1, length, 8)), lc.shape_dtype((1, length), 'int32')
        weights, state = jax.eval_shape(seg.init, (x, ids), jax.random.key(0))

        def loss(weights, *inputs):
            return seg.apply(weights, state, inputs, mode=Mode.TRAIN)[0][0].sum()

        step = jax.jit(jax.grad(loss)).lower(weights, x, ids).compile()
        return step.memory_analysis().temp_size_in_bytes

    assert n_bytes(4096) < 2.2 * n_bytes(2048)
