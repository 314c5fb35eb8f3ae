"""Speculative decoding: the tokens, and so the distribution, of ordinary decoding."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import UsageError, models, tl
from layercomb.supervised import decoding
from layercomb.supervised.decoding import drafts, keys, prompts, speculating
from layercomb.supervised.decoding.reading import ingesting
from layercomb.supervised.decoding.sampling import NO_TOKEN

V = 17
RAGGED = [[1, 2, 3, 4, 1, 2, 3], [4], [9, 9, 2, 11]]


def make(seed=3, vocab_size=V, **more):
    net = models.TransformerLM(vocab_size, 16, 32, n_layers=2, n_heads=2, max_len=48, **more)
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), seed)


def of_layers(*layers):
    """A language model with these layers between its embedding and its head."""
    net = tl.Serial(tl.Embedding(V, 16), *layers, tl.Dense(V))
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'), 5)


def both(model, given, n_tokens, speculate, **how):
    """What is made with speculation, by both functions, and without."""
    made = decoding.generate(model, given, n_tokens, speculate=speculate, **how)
    columns = list(decoding.stream(model, given, n_tokens, speculate=speculate, **how))
    wanted = np.stack(list(decoding.stream(model, given, n_tokens, **how)), 1)
    np.testing.assert_array_equal(np.stack(columns, 1), wanted)
    return made, decoding.generate(model, given, n_tokens, **how)


def found_by_hand(text, n_draft, ngram):
    """A lookup's draft, slowly."""
    for end in range(len(text) - 1, ngram - 1, -1):
        if text[end - ngram : end] == text[len(text) - ngram :]:
            followed = text[end:]
            return [followed[i % len(followed)] for i in range(n_draft)]
    return [drafts.NO_DRAFT] * n_draft


@pytest.mark.parametrize('ngram', [1, 2, 3, 5])
def test_a_lookup_copies_what_followed_last_time(ngram):
    drawn = np.random.default_rng(ngram)
    rows = [drawn.integers(0, 3, n).tolist() for n in (*range(1, 30), *[12] * 30)]
    tokens = np.array([row + [0] * (40 - len(row)) for row in rows], np.int32)
    lookup = decoding.Lookup(n_draft=5, ngram=ngram)
    made = lookup.drafts(jnp.asarray(tokens), jnp.array([len(row) for row in rows], jnp.int32))
    assert made.tolist() == [found_by_hand(row, 5, ngram) for row in rows]


def kinds():
    return {
        'lookup': decoding.Lookup(3, 1),
        'draft': decoding.Draft(make(4), 3),
        'itself': decoding.Draft(make(), 1),
    }


SAMPLING = {
    'greedy': {'temperature': 0},
    'drawn': {'temperature': 0.7, 'rng': 4},
    'filtered': {'temperature': 0.9, 'top_k': 5, 'top_p': 0.9, 'rng': 5},
    'penalized': {
        'temperature': 0.6,
        'repetition_penalty': 1.3,
        'presence_penalty': 0.2,
        'frequency_penalty': 0.3,
        'logit_bias': ((3, 1.0),),
        'rng': 6,
    },
    'greedy and penalized': {'temperature': 0, 'repetition_penalty': 1.5, 'frequency_penalty': 0.5},
}


@pytest.mark.parametrize('how', SAMPLING.values(), ids=list(SAMPLING))
@pytest.mark.parametrize('kind', kinds())
def test_the_tokens_are_those_of_ordinary_decoding(kind, how):
    made, wanted = both(make(), RAGGED, 30, kinds()[kind], **how)
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize('kind', ['lookup', 'draft'])
def test_rows_end_for_themselves_and_at_the_end_of_the_model(kind):
    """Each row has an end of its own; 41 and 7 tokens fill all 48 positions of the model."""
    model, speculate = make(), kinds()[kind]
    free = decoding.generate(model, RAGGED, 41, temperature=0)
    made, _ = both(model, RAGGED, 41, speculate, temperature=0)
    np.testing.assert_array_equal(made, free)
    for eos in {int(free[0, 4]), int(free[1, 9]), int(free[2, 1])}:
        made, wanted = both(model, RAGGED, 20, speculate, temperature=0, eos_id=eos)
        np.testing.assert_array_equal(made, wanted)
    made, wanted = both(model, RAGGED, 1, speculate)
    np.testing.assert_array_equal(made, wanted)


CACHES = {
    'window': lambda: make(attention=tl.SelfAttention(2, window=4)),
    'local': lambda: make(attention=tl.LocalSelfAttention(2, 4)),
    'rotary': lambda: make(positions='rotary'),
    'convolution': lambda: make(
        attention=(tl.Conv1D(16, 3, padding='causal', dilation=2), tl.SelfAttention(2))
    ),
    'recurrent': lambda: of_layers(tl.SRU(), tl.Residual(tl.SelfAttention(2))),
    'sparse': lambda: lc.Model(
        models.TerraformerLM(V, 16, 32, 2, 2, 48, qkv_modules=4, ff_block_size=4)
    ).init(lc.shape_dtype((1, 8), 'int32'), 1),
    'scaled': lambda: lc.Model(
        models.Llama(V, 16, 16, 2, 2, max_len=200, scaling=tl.DynamicScaling(8.0, 32), period=50.0)
    ).init(lc.shape_dtype((1, 8), 'int32'), 1),
    'int8': lambda: lc.Model(*lc.transforms.quantize(make().layer, make().weights, bits=8)),
}


@pytest.mark.parametrize('kind', CACHES)
def test_caches_go_back_to_before_what_was_refused(kind):
    model = CACHES[kind]()
    how = {'temperature': 0, 'speculate': decoding.Lookup(3, 1)}
    made = decoding.generate(model, RAGGED, 36, **how)
    np.testing.assert_array_equal(made, decoding.generate(model, RAGGED, 36, temperature=0))


def exact(model, prompt, n_tokens, repetition_penalty, temperature, top_k):
    """The probability of each text of `n_tokens` after a prompt, by the model's own logits."""
    (logits,) = model.layer.output_signature(lc.shape_dtype((1, 1), 'int32'))
    size = logits.shape[-1]
    found = np.zeros((size,) * n_tokens)
    for text in itertools.product(range(size), repeat=n_tokens):
        tokens, p = [*prompt, *text], 1.0
        logits = np.asarray(model(jnp.array([tokens], jnp.int32))[0], np.float64)
        for i in range(len(prompt), len(tokens)):
            at = logits[i - 1].copy()
            for held in set(tokens[:i]):
                at[held] *= repetition_penalty if at[held] < 0 else 1 / repetition_penalty
            at = np.where(at >= np.sort(at)[-top_k], at, -np.inf) / temperature
            e = np.exp(at - at.max())
            p *= e[tokens[i]] / e.sum()
        found[text] = p
    return found


@pytest.mark.parametrize('kind', ['lookup', 'draft'])
def test_samples_have_the_distribution_of_the_model(kind):
    """Chi-square of 8,000 samples of 4 tokens, over all texts, enumerated."""
    n, size, n_tokens, prompt = 8_000, 4, 4, [1, 2, 1, 2, 3, 1]
    model, small = make(vocab_size=size), make(9, vocab_size=size)
    how = {'temperature': 0.8, 'top_k': 3, 'repetition_penalty': 1.2}
    speculate = {'lookup': decoding.Lookup(3, 1), 'draft': decoding.Draft(small, 3)}[kind]
    made = decoding.generate(model, [prompt] * n, n_tokens, speculate=speculate, rng=1, **how)
    places = np.ravel_multi_index(made.T, (size,) * n_tokens)
    seen = np.bincount(places, minlength=size**n_tokens)
    p = exact(model, prompt, n_tokens, **how).ravel()
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    assert not seen[p == 0].any()
    often = p * n >= 5
    expected = np.append(p[often], p[~often].sum()) * n
    observed = np.append(seen[often], seen[~often].sum())
    chi = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    degrees = len(expected) - 1
    assert degrees > 30 and abs(chi - degrees) < 4 * (2 * degrees) ** 0.5


def job_of(model, given, n_tokens, speculate, temperature=0.0):
    start = prompts.begin(model, given, n_tokens)
    numbers = np.int32(n_tokens), np.int32(-1)
    drawn = keys.row_keys(0, len(given))
    sampler = decoding.Sampler(temperature)
    return speculating.job(speculate, given, start, sampler, drawn, *numbers)


def passes(job):
    """How many passes of the model there are after the first token, and what they made."""
    logits, state = ingesting.ingest(job.start)
    held = job.sampler.held(job.start.tokens, job.start.lengths, logits.shape[-1])
    token = job.sampler(logits, keys.fold_each(job.keys, 0), held)
    draft = None if job.draft is None else ingesting.ingest(job.draft)[1]
    texts, n = speculating.begun(job, token, job.sampler.add(held, token), state, draft), 0
    step = jax.jit(speculating.continued)
    while speculating.unfinished(texts):
        texts, n = step(job, texts), n + 1
    return n, texts


@pytest.mark.parametrize('temperature', [0, 0.8])
def test_drafts_of_the_model_itself_are_accepted_whole(temperature):
    """After the first token, each pass makes the 3 of the draft, and one more."""
    job = job_of(make(), [[1, 2, 3]], 1 + 5 * 4, decoding.Draft(make(), 3), temperature)
    assert passes(job)[0] == 5


def test_a_text_that_repeats_is_looked_up():
    period = tl.Fn('Next', lambda x: jax.nn.one_hot((x + 1) % 5, V) * 9, position_wise=True)
    n, texts = passes(job_of(lc.Model(period, {}), [[0, 1]], 1 + 3 + 4 * 6, decoding.Lookup(5, 1)))
    # One token a pass until one comes again, and then five and one more.
    assert n == 3 + 4 and texts.tokens[0, :10].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_nan_is_said_and_where():
    inner = tl.Fn('Next', lambda x: jax.nn.one_hot((x + 1) % 5, V) * 9, position_wise=True)
    net = tl.Serial(tl.Dup(), inner, tl.Swap(), tl.Fn('Spoil', spoil_last, position_wise=True))
    model = lc.Model(net, {})
    for speculate in (decoding.Lookup(2, 1), decoding.Draft(lc.Model(inner, {}), 2)):
        for run in (decoding.generate, lambda *a, **k: list(decoding.stream(*a, **k))):
            with pytest.raises(UsageError, match='NaN or infinite at token 3 of row 0'):
                run(model, [[0]], 9, temperature=0, speculate=speculate)


def spoil_last(tokens, logits):
    """NaN after token 3."""
    return jnp.where((tokens == 3)[..., None], jnp.nan, logits)


class Memory(tl.Layer):
    """Sums all inputs so far, in one vector: nothing can be taken back."""

    position_wise = False

    def init(self, signature, rng, mode=lc.Mode.TRAIN):
        (x,) = signature
        predicts = mode is lc.Mode.PREDICT
        return {}, {'sum': jnp.zeros((x.shape[0], x.shape[2]))} if predicts else {}

    def apply(self, weights, state, inputs, *, rng=None, mode=lc.Mode.EVAL):
        (x,) = inputs
        y = jnp.cumsum(x, 1)
        if mode is lc.Mode.PREDICT:
            y = y + state['sum'][:, None]
            state = {'sum': y[:, -1]}
        return (y,), state


REFUSED = {
    'lsh': (
        lambda: make(attention=tl.LSHSelfAttention(2, chunk_len=4, n_hashes=1, max_len=48)),
        'of attention that chooses what it reads, which reads all that is before a draft',
    ),
    'hashed': (
        lambda: make(
            attention=tl.HashedSelfAttention(2, n_hashes=2, n_buckets=2, chunk_len=4, local_len=2)
        ),
        'so that a check takes longer than the tokens it could save; decode it without',
    ),
    'neighbourhood': (
        lambda: make(
            attention=tl.LSHSelfAttention(
                2, chunk_len=4, n_hashes=1, max_len=48, neighbourhood='chunk'
            )
        ),
        'cannot speculate: one of its layers sees later positions',
    ),
    'memory': (
        lambda: of_layers(Memory()),
        "cannot speculate: 'memory/sum' remembers all positions in one, and cannot forget a draft",
    ),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_what_cannot_go_back_is_refused(kind):
    made, said = REFUSED[kind]
    model, other = made(), make()
    for run in (decoding.generate, decoding.stream):
        with pytest.raises(UsageError, match=said):
            run(model, [[1, 2]], 4, speculate=decoding.Lookup())
        with pytest.raises(UsageError, match='the draft model cannot speculate'):
            run(other, [[1, 2]], 4, speculate=decoding.Draft(model))


def test_errors():
    model = make()
    with pytest.raises(UsageError, match=r'draft model has 9 tokens and the model 17: .* same voc'):
        decoding.generate(model, [[1]], 4, speculate=decoding.Draft(make(vocab_size=9)))
    short = lc.Model(models.TransformerLM(V, 8, 8, 1, 1, max_len=16))
    short.init(lc.shape_dtype((1, 8), 'int32'))
    with pytest.raises(UsageError, match=r'the draft model: the prompt of 2 .* max_len is 16'):
        decoding.generate(model, [[1, 2]], 20, speculate=decoding.Draft(short))
    with pytest.raises(TypeError, match=r'must be decoding.Lookup\(…\) or decoding.Draft'):
        decoding.generate(model, [[1]], 4, speculate=3)
    with pytest.raises(ValueError, match='Lookup: n_draft must be'):
        decoding.Lookup(0)
    with pytest.raises(ValueError, match='Draft: n_draft must be'):
        decoding.Draft(model, 65)
    with pytest.raises(TypeError, match='Draft: model must be'):
        decoding.Draft(3)
    source = lc.shape_dtype((1, 8), 'int32')
    answers = models.Transformer(V, 8, 8, 1, 1, 1, max_len=16)
    answers = lc.Model(answers).init((source,) * answers.n_in)
    with pytest.raises(UsageError, match='it reads a source, and drafts are for models that cont'):
        decoding.generate(answers, [[1]], 4, inputs=[[1, 2]], speculate=decoding.Lookup())


def test_numbers_are_no_other_program():
    how = {'temperature': 0, 'speculate': decoding.Lookup(3, 1)}
    decoding.generate(make(), [[1, 2]], 5, **how)
    from layercomb.supervised.decoding.generate import _rest_checked

    before = _rest_checked._cache_size()
    decoding.generate(make(8), [[3, 2, 1]], 9, **how | {'temperature': 0.5, 'top_p': 0.5})
    assert _rest_checked._cache_size() == before


def test_no_token_is_accepted_as_a_draft():
    logits = jnp.full((1, 3, V), jnp.nan)
    held, at = jnp.zeros((1, V), jnp.int32), jnp.zeros(1, jnp.int32)
    found = speculating.judged(
        decoding.Sampler(0.0),
        logits,
        keys.row_keys(0, 1),
        at,
        held,
        jnp.full((1, 2), drafts.NO_DRAFT, jnp.int32),
        at + 3,
        np.int32(-1),
    )
    assert found.n_made.tolist() == [1] and found.tokens[0, 0] == NO_TOKEN
