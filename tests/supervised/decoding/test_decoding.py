import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import Mode, UsageError, models, tl
from layercomb.supervised import decoding
from layercomb.supervised.decoding import prompts
from layercomb.supervised.decoding.reading import ingesting
from layercomb.supervised.decoding.sampling import stacked

V = 17

programs_of = importlib.import_module('layercomb.supervised.decoding.generate')


def make(attention=None, positions='learned', **more):
    net = lc.models.TransformerLM(
        V,
        16,
        32,
        n_layers=2,
        n_heads=2,
        max_len=48,
        attention=attention,
        positions=positions,
        **more,
    )
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 3)


ATTENTION = {
    'dense': None,
    'local': tl.LocalSelfAttention(2, 4),
    'convolution': (tl.Conv1D(16, 3, padding='causal', dilation=2), tl.SelfAttention(2)),
    'selecting': (
        tl.HashedSelfAttention(2, n_hashes=2, n_buckets=2, chunk_len=4, local_len=2),
        tl.BlockSelfAttention(2, n_chosen=1, block_len=3, local_len=2, n_sinks=1),
    ),
    'mixed': tl.MixedSelfAttention(
        2, n_hashes=1, n_chosen=1, n_buckets=2, chunk_len=3, local_len=2
    ),
    'both': (tl.LocalSelfAttention(2, 4, look_back=2), tl.SelfAttention(2, d_head=4)),
}


def recompute(model, prompt, n_tokens):
    """Greedy decoding without any cache: the whole sequence again for every token."""
    tokens = np.zeros((1, 24), np.int32)  # of one length, so that it compiles once: it is causal
    tokens[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + n_tokens):
        tokens[0, i] = jnp.argmax(model(tokens)[0, i - 1])
    return tokens[0, len(prompt) : len(prompt) + n_tokens].tolist()


@pytest.mark.parametrize('attention', ATTENTION)
def test_cache_equals_recomputing_with_ragged_prompts(attention):
    model = make(ATTENTION[attention], 'rotary' if attention == 'both' else 'learned')
    given = [[1, 2, 3, 4, 5, 6, 7], [3], [9, 9, 2, 11]]
    made = decoding.generate(model, given, 12, temperature=0)
    for prompt, row in zip(given, made, strict=True):
        assert recompute(model, prompt, 12) == row.tolist()


def test_batch_and_stream_make_the_same_sample():
    model = make()
    given = [[1, 2, 3], [4]]
    how = {'temperature': 0.8, 'top_k': 9, 'top_p': 0.9, 'repetition_penalty': 1.3, 'rng': 5}
    both = decoding.generate(model, given, 10, **how)
    alone = decoding.generate(model, given[:1], 10, **how)
    streamed = np.stack(list(decoding.stream(model, given, 10, **how)), 1)
    np.testing.assert_array_equal(both[:1], alone)
    np.testing.assert_array_equal(both, streamed)
    assert not np.array_equal(both, decoding.generate(model, given, 10, **how | {'rng': 6}))


def test_eos_ends_rows():
    model = make()
    greedy = decoding.generate(model, [[1, 2, 3], [4]], 10, temperature=0)
    eos = int(greedy[0, 3])
    made = decoding.generate(model, [[1, 2, 3], [4]], 10, temperature=0, eos_id=eos)
    for row, free in zip(made, greedy, strict=True):
        end = free.tolist().index(eos) if eos in free else len(free)
        np.testing.assert_array_equal(row[: end + 1], free[: end + 1])
        assert (row[end:] == eos).all()
    streamed = list(decoding.stream(model, [[1, 2, 3]], 10, temperature=0, eos_id=eos))
    assert len(streamed) == greedy[0].tolist().index(eos) + 1


def test_sampler_draws_only_what_it_may():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 0)

    def shares(**how):
        keys = jax.random.split(jax.random.key(0), 4000)
        drawn = decoding.Sampler(**how)(logits, keys)
        return np.bincount(np.asarray(drawn), minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.75), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.1), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(temperature=0), [1, 0, 0, 0])
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    np.testing.assert_allclose(shares(temperature=2), hot / hot.sum(), atol=0.03)


NORMED = {
    'Repeat': tl.Repeat(tl.Residual(tl.BatchNorm(0.1), tl.Dense(8)), 2),
    'shared': tl.Repeat(tl.Residual(tl.BatchNorm(0.1), tl.Dense(8)), 2, shared=True),
    'Map': tl.Serial(tl.Dup(), tl.Map(tl.Serial(tl.BatchNorm(0.1), tl.Dense(8)), 2), tl.Add()),
}


@pytest.mark.parametrize('normed', NORMED.values(), ids=list(NORMED))
def test_running_statistics_reach_the_decoder(normed):
    net = tl.Serial(tl.Embedding(V, 8), normed, tl.Dense(V))
    model = lc.Model(net).init(lc.shape_dtype((4, 8), 'int32'))
    tokens = jax.random.randint(jax.random.key(1), (4, 8), 0, V)
    for _ in range(3):
        model(tokens, mode=Mode.TRAIN)
    assert (
        recompute(model, [1, 2], 5)
        == decoding.generate(model, [[1, 2]], 5, temperature=0)[0].tolist()
    )


def test_ties_inside_repeated_blocks_decode():
    block = tl.Residual(tl.Dense(8, name='a'), tl.Tanh(), tl.Dense(8, name='b'), name='block')
    net = tl.Serial(tl.Embedding(V, 8), tl.Repeat(block, 2), tl.Dense(V, name='head'))
    tied = lc.transforms.Tied(net, 'block/a/kernel', 'block/b/kernel')
    model = lc.Model(tied).init(lc.shape_dtype((1, 8), 'int32'))
    made = decoding.generate(model, [[1, 2]], 5, temperature=0)[0].tolist()
    assert recompute(model, [1, 2], 5) == made


def one_key():
    return jax.random.split(jax.random.key(0), 1)


def test_the_penalty_falls_on_what_a_row_holds():
    logits = jnp.array([[2.0, 1.5, -1.0, -1.2]])
    sampler = decoding.Sampler(temperature=0, repetition_penalty=2.0)
    held = sampler.held(jnp.array([[0, 3, 1]]), jnp.array([2]), 4)  # the third is padding
    np.testing.assert_array_equal(held, [[1, 0, 0, 1]])
    assert int(sampler(logits, one_key(), held)[0]) == 1  # 2 / 2 < 1.5
    held = sampler.add(held, jnp.array([1]))
    assert int(sampler(logits, one_key(), held)[0]) == 0
    negative = jnp.array([[-1.5, -9.0, -1.9, -1.0]])  # 0 becomes −3, and 3 becomes −2
    assert int(sampler(negative, one_key(), held)[0]) == 2


def test_penalties_of_what_was_made():
    """As OpenAI has it: one for each token made, and one for having made it; prompts are free."""
    logits = jnp.array([[2.0, 1.5, 1.0, -1.0]])
    sampler = decoding.Sampler(0, presence_penalty=0.45, frequency_penalty=0.3)
    held = sampler.held(jnp.array([[0, 1]]), jnp.array([2]), 4)
    made = []
    for _ in range(7):
        token = sampler(logits, one_key(), held)
        held = sampler.add(held, token)
        made.append(int(token[0]))
    counts, wanted = np.zeros(4), []
    for _ in range(7):
        wanted.append(int((np.asarray(logits[0]) - 0.3 * counts - 0.45 * (counts > 0)).argmax()))
        counts[wanted[-1]] += 1
    assert made == wanted and len(set(made)) == 3
    assert int(decoding.Sampler(0, presence_penalty=-9)(logits, one_key(), held)[0]) == 0


def test_biases_are_added_to_logits():
    logits = jnp.array([[2.0, 1.5, 1.0, -1.0]])
    for bias, wanted in [([(3, 3.5)], 3), ({0: -1}.items(), 1), ([(0, -100), (1, -100)], 2)]:
        assert int(decoding.Sampler(0, logit_bias=bias)(logits, one_key())[0]) == wanted
    made = decoding.generate(make(), [[1, 2]], 4, logit_bias=[(5, 1000)])
    assert (made == 5).all()
    for wrong, kind, said in [
        ([(1, 2), (1, 3)], ValueError, 'names a token twice'),
        ([(-1, 2)], ValueError, r'must be ids and biases to ±1e6, got -1, 2\.0'),
        ([(1, float('nan'))], ValueError, 'must be ids and biases'),
        ([(i, 1) for i in range(301)], ValueError, 'may have 300 pairs, got 301'),
        (5, TypeError, 'must be pairs of a token id and a number'),
        ([(1.5, 2)], TypeError, 'must be pairs of a token id and a number'),
    ]:
        with pytest.raises(kind, match=said):
            decoding.Sampler(logit_bias=wrong)
    with pytest.raises(UsageError, match='logit_bias does not fit the model: token id 17 is out'):
        decoding.generate(make(), [[1]], 2, logit_bias=[(17, 1)])


def test_rows_with_numbers_of_their_own_are_drawn_as_alone():
    kinds = [
        {},
        {'temperature': 0},
        {'temperature': 0.5, 'top_k': 3},
        {'top_p': 0.4, 'repetition_penalty': 3.0},
        {'presence_penalty': 2, 'frequency_penalty': -1, 'logit_bias': ((3, 5.0),)},
    ]
    samplers = [decoding.Sampler(**how) for how in kinds]
    logits = 3 * jax.random.normal(jax.random.key(1), (5, 50))
    held = jax.random.randint(jax.random.key(2), (5, 50), 0, 6)
    draw = jax.jit(lambda sampler, *args: sampler(*args))
    folded = jax.jit(lambda i: jax.random.split(jax.random.fold_in(jax.random.key(3), i), 5))
    for i in range(10):
        keys = folded(i)
        together = draw(stacked(samplers), logits, keys, held)
        for row, sampler in enumerate(samplers):
            at = slice(row, row + 1)
            assert together[row] == draw(sampler, logits[at], folded(i)[at], held[at])[0]


def test_a_strong_penalty_repeats_nothing():
    made = decoding.generate(
        make(), [[1, 2, 3]], 10, temperature=0, repetition_penalty=1e6, eos_id=None
    )[0]
    assert len({1, 2, 3, *made.tolist()}) == 13


def seq2seq(masked=True, kind=lc.models.Reformer, **more):
    net = kind(V, 16, 32, 1, 1, 2, max_len=96, masked=masked, **more)
    signature = lc.shape_dtype((1, 8), 'int32'), lc.shape_dtype((1, 4), 'int32')
    masks = (lc.shape_dtype((1, 8), bool),) if masked else ()
    return lc.Model(net).init((*signature, *masks), 3)


@pytest.mark.parametrize(
    'kind',
    [
        functools.partial(lc.models.Reformer, chunk_len=8, n_hashes=2),
        pytest.param(
            functools.partial(lc.models.Terraformer, ff_block_size=8, qkv_modules=4),
            marks=pytest.mark.slow,
        ),
    ],
    ids=['reformer', 'terraformer'],
)
def test_an_encoder_decoder_answers_ragged_sources(kind):
    model, sources = seq2seq(kind=kind), [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10]]
    how = {'temperature': 0.7, 'rng': 4}
    both = decoding.generate(model, [[0], [0, 2]], 6, inputs=sources, **how)
    streamed = np.stack(list(decoding.stream(model, [[0], [0, 2]], 6, inputs=sources, **how)), 1)
    np.testing.assert_array_equal(both, streamed)
    alone = decoding.generate(model, [[0]], 6, inputs=sources[:1], **how)
    np.testing.assert_array_equal(both[:1], alone)
    greedy = decoding.generate(model, [[0]], 6, inputs=sources[:1], temperature=0)[0]
    found = decoding.beam_search(model, [[0]], 6, inputs=sources[:1], n_beams=1)
    np.testing.assert_array_equal(found.tokens[0, 0], greedy)
    inputs = jnp.array(sources[:1]), jnp.array([[0, *greedy[:-1]]]), jnp.ones((1, 7), bool)
    np.testing.assert_array_equal(jnp.argmax(model(*inputs)[0], -1), greedy)  # without a cache
    scores = decoding.score(model, [[0, *greedy]], inputs=sources[:1])
    beam = decoding.beam_search(model, [[0]], 6, inputs=sources[:1], n_beams=1, length_penalty=0.0)
    np.testing.assert_allclose(scores.totals[0], beam.scores[0, 0], rtol=1e-4)


def test_errors_of_sources():
    model = seq2seq()
    with pytest.raises(UsageError, match='reads a source before it writes: give inputs='):
        decoding.generate(model, [[0]], 2)
    with pytest.raises(UsageError, match='inputs= is for a model with an encoder'):
        decoding.generate(make(), [[1]], 2, inputs=[[1]])
    with pytest.raises(UsageError, match='2 sources and 1 prompts: give as many of each'):
        decoding.generate(model, [[0]], 2, inputs=[[1], [2]])
    with pytest.raises(UsageError, match=r'the source has 97 tokens, and .* max_len is 96'):
        decoding.generate(model, [[0]], 2, inputs=[[1] * 97])
    with pytest.raises(UsageError, match='the source does not fit the model: token id 17'):
        decoding.generate(model, [[0]], 2, inputs=[[17]])
    with pytest.raises(UsageError, match='the prompt does not fit the model: token id 17'):
        decoding.generate(model, [[17]], 2, inputs=[[1]])
    with pytest.raises(UsageError, match='sources of different lengths need a mask'):
        decoding.generate(seq2seq(masked=False), [[0], [0]], 2, inputs=[[1], [1, 2]])


def test_errors():
    model = make()
    for kind in (tl.SelfAttention, tl.LSHSelfAttention):
        ahead = make(kind(2, causal=False))
        with pytest.raises(UsageError, match='causal=False sees later positions'):
            decoding.generate(ahead, [[1]], 2)
    with pytest.raises(UsageError, match=r'40 tokens and 20 new ones make 60, .* max_len is 48'):
        decoding.generate(model, [[1] * 40], 20)
    with pytest.raises(UsageError, match=r'token id 17 is outside the vocabulary of 17'):
        decoding.stream(model, [[1, 17]], 2)
    with pytest.raises(UsageError, match='sequence of at least one token id'):
        decoding.generate(model, [[]], 2)
    with pytest.raises(UsageError, match='sequence of at least one token id'):
        decoding.generate(model, ['text'], 2)
    with pytest.raises(TypeError, match="temperature must be a number, got 'hot'"):
        decoding.generate(model, [[1]], 2, temperature='hot')
    with pytest.raises(ValueError, match='top_p must be above 0'):
        decoding.generate(model, [[1]], 2, top_p=0.0)
    with pytest.raises(ValueError, match='top_k must be at least 1, got 0'):
        decoding.generate(model, [[1]], 2, top_k=0)
    with pytest.raises(ValueError, match='repetition_penalty must be at least 1e-06 and'):
        decoding.generate(model, [[1]], 2, repetition_penalty=0)
    with pytest.raises(TypeError, match='with weights: init, load or train'):
        decoding.generate(lc.Model(model.layer), [[1]], 2)
    with pytest.raises(ValueError, match='n_tokens must be'):
        decoding.generate(model, [[1]], 0)
    with pytest.raises(UsageError, match='the eos_id does not fit the model: token id 17'):
        decoding.generate(model, [[1]], 2, eos_id=17)
    with pytest.raises(TypeError, match=r'eos_id must be an int, got 2\.0'):
        decoding.stream(model, [[1]], 2, eos_id=2.0)


@pytest.mark.parametrize('tied', [False, True])
def test_prompts_take_logits_at_their_ends_alone(tied, monkeypatch):
    net = make().layer
    if tied:
        net = lc.transforms.Tied(net, 'head/kernel', 'embedding/table', jnp.transpose)
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 3)
    start = prompts.begin(model, [[1, 2, 3], [4]], 5, None)
    of_all = f'2,{start.tokens.shape[1]},{V}]'
    assert of_all not in str(jax.make_jaxpr(ingesting.ingest)(start))
    few, state = ingesting.ingest(start)
    monkeypatch.setattr(ingesting, 'at_one_position', lambda net: None)
    assert of_all in str(jax.make_jaxpr(lambda start: ingesting.ingest(start))(start))
    whole, same_state = ingesting.ingest(start)
    np.testing.assert_allclose(few, whole, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state, same_state))


def test_a_model_that_does_not_end_with_a_dense_decodes():
    model = make()
    ended = lc.Model(tl.Serial(model.layer.replace(name='lm'), tl.LogSoftmax()))
    ended.weights, ended.state = {'lm': model.weights}, {}
    assert ingesting.at_one_position(ended.layer) is None
    both = (decoding.generate(m, [[1, 2], [3]], 4, temperature=0) for m in (model, ended))
    np.testing.assert_array_equal(*both)


def test_other_numbers_are_no_other_program():
    model = lc.Model(models.TransformerLM(16, 8, 8, 1, 1, 32)).init(lc.shape_dtype((1, 8), 'int32'))
    sizes = []
    for n, numbers in enumerate(
        (
            {},
            {'temperature': 0, 'repetition_penalty': np.float32(1.1)},
            {'temperature': np.float32(0.3), 'top_p': jnp.float32(0.5), 'rng': np.int64(1)},
            {'top_k': np.int64(3), 'eos_id': np.int32(2)},
        )
    ):
        made = decoding.generate(model, [[1, 2]], np.int64(3 + n), **numbers)
        streamed = list(decoding.stream(model, [[1, 2]], 3 + n, **numbers))
        np.testing.assert_array_equal(np.stack(streamed, 1), made[:, : len(streamed)])
        programs = programs_of._drawn, programs_of._rest
        sizes.append(
            [p._cache_size() for p in programs] + [programs_of._next.cache_info().currsize]
        )
    assert all(size == sizes[0] for size in sizes)


@pytest.mark.parametrize(
    'how',
    [
        pytest.param({'top_k': 5}, marks=pytest.mark.slow),
        pytest.param({'top_p': 0.6}, marks=pytest.mark.slow),
        {'top_k': 9, 'top_p': 0.8},
    ],
)
def test_the_likeliest_are_those_that_sorting_finds(how):
    logits = jax.random.normal(jax.random.key(1), (3, 50)).round(1)  # some are the same
    keys = jax.random.split(jax.random.key(2), 3)
    kept = logits
    if 'top_k' in how:
        least = -np.sort(-kept, -1)[:, how['top_k'] - 1, None]
        kept = np.where(kept < least, -np.inf, kept)
    if 'top_p' in how:
        p = np.asarray(jax.nn.softmax(kept))
        likelier = np.array([[row[row > x].sum() for x in row] for row in p])
        kept = np.where(likelier < how['top_p'], kept, -np.inf)
    folded = jax.jit(lambda i: jax.vmap(jax.random.fold_in, (0, None))(keys, i))
    sampled, expected = jax.jit(decoding.Sampler(**how)), jax.jit(jax.vmap(jax.random.categorical))
    for i in range(40):
        wanted = expected(folded(i), jnp.asarray(kept))
        np.testing.assert_array_equal(sampled(logits, folded(i)), wanted)


def test_a_tiny_temperature_takes_the_likeliest():
    logits = jnp.array([[1.0, 900.0, 3.0]])
    for temperature in (1e-39, 1e-6, 0):
        assert int(decoding.Sampler(temperature)(logits, one_key())[0]) == 1
    for wrong in (np.nan, np.inf, True, np.ones(2)):
        said = r'temperature must be (at least 0 and finite|a number), got'
        with pytest.raises((TypeError, ValueError), match=said):
            decoding.Sampler(wrong)


def spoilt(at):
    """A model whose logits are NaN after a token."""

    def spoil(logits, tokens):
        return jnp.where((tokens == at)[:, :, None], jnp.nan, logits)

    inner = make()
    net = tl.Serial(
        tl.Dup(), inner.layer.replace(name='lm'), tl.Fn('Spoil', spoil, position_wise=True)
    )
    return lc.Model(net, {'lm': inner.weights}, {})


def test_nan_is_said_and_at_which_token():
    model, how = make(), {'temperature': 0}
    free = decoding.generate(model, [[1, 2]], 6, **how)[0].tolist()
    at = next(i for i in range(1, 6) if free[i] not in free[:i])
    model = spoilt(free[at])
    assert decoding.generate(model, [[1, 2]], at + 1, **how)[0].tolist() == free[: at + 1]
    said = f'NaN or infinite at token {at + 1} of row 0: the weights have most likely diverged'
    with pytest.raises(UsageError, match=said):
        decoding.generate(model, [[1, 2]], at + 3, **how)
    with pytest.raises(UsageError, match=said):
        list(decoding.stream(model, [[1, 2]], at + 3, **how))
    with pytest.raises(UsageError, match=f'after {at + 1} tokens'):
        decoding.beam_search(model, [[1, 2]], at + 3, n_beams=1)
    with pytest.raises(UsageError, match='before token 3 of text 0'):
        decoding.score(model, [[1, 2, free[at], 3, 4]])
    ended = decoding.generate(model, [[1, 2]], at + 3, eos_id=free[at], **how)[0]
    assert ended.tolist() == free[: at + 1] + [free[at]] * 2  # NaN behind an end is no one's
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        logits = jnp.array([[0.0, value, 1.0], [value] * 3])
        drawn = decoding.Sampler()(logits, jax.random.split(jax.random.key(0), 2))
        assert (int(drawn[0]) < 0) == (value != -jnp.inf) and int(drawn[1]) < 0


def test_a_chunk_neighbourhood_reads_prompts_without_padding():
    attention = tl.LSHSelfAttention(2, chunk_len=4, n_hashes=1, neighbourhood='chunk', max_len=48)
    model, text = make(attention), list(range(1, 12))
    logits, _ = ingesting.ingest(prompts.begin(model, [text], 4, None))
    np.testing.assert_allclose(logits[0], model(jnp.array([text]))[0, -1], rtol=1e-5, atol=1e-5)
    log_p = jax.nn.log_softmax(model(jnp.array([text[:-1]]))[0])
    wanted = [log_p[i, token] for i, token in enumerate(text[1:])]
    np.testing.assert_allclose(decoding.score(model, [text]).tokens[0, 1:], wanted, atol=1e-4)
    for run in (
        lambda: decoding.generate(model, [[1], [1, 2]], 4),
        lambda: decoding.score(model, [[1, 2], [1, 2, 3]]),
    ):
        with pytest.raises(UsageError, match="neighbourhood='chunk' sees what a shorter"):
            run()


def test_a_mask_is_no_source():
    net = tl.Serial(tl.Embedding(V, 8), tl.SelfAttention(2, masked=True), tl.Dense(V))
    model = lc.Model(net).init((lc.shape_dtype((1, 4), 'int32'), lc.shape_dtype((1, 4), bool)))
    for inputs in (None, [[1, 2]]):
        with pytest.raises(UsageError, match=r'takes 2 inputs, and no part of it .* tl.Once'):
            decoding.generate(model, [[1]], 2, inputs=inputs)


def test_statistics_that_would_be_lost_are_refused():
    encoder = tl.Once(tl.Serial(tl.Embedding(V, 8), tl.BatchNorm(), name='encoder'))
    net = tl.Serial(encoder, tl.Swap(), tl.Embedding(V, 8), tl.CrossAttention(2), tl.Dense(V))
    tokens = lc.shape_dtype((1, 4), 'int32')
    model = lc.Model(net).init((tokens, tokens), 3)
    with pytest.raises(UsageError, match=r"training left '.*' in a layer that decoding runs once"):
        decoding.generate(model, [[1]], 3, inputs=[[1, 2, 3]])


def test_rotations_that_go_by_the_length_know_how_far_it_goes():
    """The prompt is within the trained length, and what follows is not."""
    net = models.Llama(
        V, 16, 16, 2, 2, max_len=200, scaling=tl.DynamicScaling(8.0, 32), period=50.0
    )
    model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 1)
    made = decoding.generate(model, [[1, 2, 3]], 100, temperature=0)
    text = np.pad(np.concatenate([[[1, 2, 3]], made], 1), ((0, 0), (0, 128 - 103)))
    logits = model(jnp.asarray(text, jnp.int32))  # as long as the state has room for
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, 2:102], made)
    made = decoding.generate(model, [[1, 2, 3]], 29, temperature=0)  # all within it
    logits = model(jnp.asarray(np.concatenate([[[1, 2, 3]], made], 1), jnp.int32))
    np.testing.assert_array_equal(np.argmax(logits, -1)[:, 2:31], made)
