"""A class of somebody's own is treated as the library's: by what it says, not by what it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import Mode, UsageError, losses, models, tl
from layercomb.model import embeddings
from layercomb.supervised import decoding
from layercomb.supervised.decoding import prompts
from layercomb.supervised.decoding.reading import ingesting

V = 13


class Table(lc.Layer):
    """An embedding of one's own, in two factors."""

    vocab_size: int
    width: int

    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        one, two = jax.random.split(rng)
        narrow = jax.random.normal(one, (self.vocab_size, 2))
        return {'narrow': narrow, 'wide': jax.random.normal(two, (2, self.width))}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (weights['narrow'][inputs[0]] @ weights['wide'],), state


class Mean(lc.Layer):
    """Attention of one's own: the mean of what a position sees."""

    causal: bool = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        if mode is not Mode.PREDICT:
            return {}, {}
        zeros = jnp.zeros((x.shape[0], 1, x.shape[2]))
        return {}, {'sum': zeros, 'position': jnp.zeros(x.shape[0], jnp.int32)}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        if not self.causal:
            return (jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),), state
        seen = jnp.arange(1, x.shape[1] + 1, dtype=jnp.float32)[:, None]
        if mode is not Mode.PREDICT:
            return (jnp.cumsum(x, 1) / seen,), state
        total = state['sum'] + jnp.cumsum(x, 1)
        count = state['position'].astype(jnp.float32)[:, None, None] + seen
        after = state['position'] + x.shape[1]
        return (total / count,), {'sum': total[:, -1:], 'position': after}


class Head(lc.Layer):
    """A head of one's own."""

    makes_logits = True
    position_wise = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        return {'logits': jax.random.normal(rng, (signature[0].shape[-1], V))}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return (jnp.tanh(inputs[0]) @ weights['logits'],), state


def lm(*layers):
    net = tl.Serial(Table(V, 6), *layers, Head(name='head'))
    return lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))


def test_an_embedding_of_ones_own_checks_its_ids():
    model = lm()
    assert [(i, layer.vocab_size) for i, layer in embeddings(model.layer)] == [(0, V)]
    with pytest.raises(ValueError, match=f'token id {V} is outside the vocabulary of {V}'):
        model(jnp.array([[1, V]]))
    with pytest.raises(UsageError, match='the prompt does not fit the model: token id 20 is out'):
        decoding.generate(model, [[20]], 2)


def test_attention_of_ones_own_that_looks_ahead_is_refused():
    with pytest.raises(UsageError, match='Mean with causal=False sees later positions'):
        decoding.generate(lm(tl.Residual(Mean(False))), [[1]], 2)
    with pytest.raises(ValueError, match='decoder_attention: Mean with causal=False sees'):
        models.Reformer(V, 8, 8, 1, 1, 2, 16, decoder_attention=Mean(False))


def test_a_head_of_ones_own_is_asked_for_one_position():
    model = lm(tl.Residual(Mean()), tl.Dense(6))
    given = [[1, 2, 3]]
    start = prompts.begin(model, given, 4)
    assert ingesting.at_one_position(start.net) is not None
    assert f',{start.tokens.shape[1]},{V}]' not in str(jax.make_jaxpr(ingesting.ingest)(start))
    made = decoding.generate(model, given, 4, temperature=0)[0]
    text = list(given[0])
    for _ in range(4):
        text.append(int(jnp.argmax(model(jnp.array([text]))[0, -1])))
    np.testing.assert_array_equal(made, text[3:])


class Unsaid(Head):
    """The same, which computes in its own way and says nothing of positions."""

    makes_logits = False

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return super().apply(weights, state, inputs, rng=rng, mode=mode)


def test_a_head_that_says_so_is_computed_a_piece_at_a_time():
    tail = tl.Serial(tl.LayerNorm(), Head(), name='tail')
    body = tl.Serial(Table(V, 6), tail)
    made = losses.attach(body, tl.CrossEntropyLoss(), 4)
    assert isinstance(made.layers[-1], tl.Chunk) and made.layers[-1].layer.layer == tail
    unsaid = tl.Serial(Table(V, 6), tl.Serial(tl.LayerNorm(), Unsaid(), name='tail'))
    made = losses.attach(unsaid, tl.CrossEntropyLoss(), 4)
    assert isinstance(made.layers[-1], tl.Serial)
    assert ingesting.at_one_position(unsaid) is None


class Reading(tl.Combinator):
    """Attention to a memory, of one's own."""

    core: lc.Layer = tl.DotProductAttention(causal=False)
    n_in = 2
    reads_memory = True

    def route(self, call, stack):
        heads, memory = stack[:2]
        return call(0, (heads, memory, memory)) + stack[2:]


class Secret(Reading):
    """The same, which does not say so."""

    reads_memory = False


def test_what_reads_a_memory_may_look_ahead_there():
    assert prompts.checked(lc.Model(tl.Serial(tl.Dup(), Reading()), {}))
    with pytest.raises(UsageError, match='attends to a memory says reads_memory = True'):
        prompts.checked(lc.Model(tl.Serial(tl.Dup(), Secret()), {}))


class Seeing(Mean):
    """Attention that sees what a row is padded with."""

    sees_padding = True


def test_what_sees_padding_reads_prompts_of_one_length():
    model = lm(Seeing())
    decoding.generate(model, [[1, 2], [3, 4]], 2)
    with pytest.raises(UsageError, match='Seeing sees what a shorter prompt is padded with'):
        decoding.generate(model, [[1, 2], [3]], 2)


class Turning(tl.Combinator):
    """Self-attention of one's own, with positions in queries and keys, and a longest sequence."""

    n_heads: int
    max_len: int | None = None
    core: lc.Layer = tl.DotProductAttention()
    rotary: lc.Layer | None = None
    needs_max_len = property(lambda self: self.max_len is None)


def test_models_tell_attention_of_ones_own_what_it_leaves_open():
    net = models.TransformerLM(V, 8, 8, 1, 2, 16, attention=Turning(2), positions='rotary')
    (layer,) = (each for _, each in lc.walk(net) if isinstance(each, Turning))
    assert layer.max_len == 16 and layer.rotary == tl.RotaryPositions(max_len=16)
    assert decoding.max_len(net) == 16
    own = Turning(2, 8, rotary=tl.RotaryPositions(64))
    net = models.TransformerLM(V, 8, 8, 1, 2, 16, attention=own, positions='rotary')
    assert own in [each for _, each in lc.walk(net)]
    with pytest.raises(ValueError, match="positions='rotary': no layer of the attention pattern"):
        models.TransformerLM(V, 8, 8, 1, 2, 16, attention=Mean(), positions='rotary')


def test_attention_of_ones_own_gets_sparse_projections():
    made = tl.sparse_qkv(Turning(2, name='own'), 4)
    assert made == tl.SparseQKVAttention(2, 4, name='own')
    net = models.TerraformerLM(
        V, 8, 8, 1, 2, 16, attention=Turning(2), ff_block_size=4, qkv_modules=4
    )
    assert any(isinstance(each, tl.SparseQKVAttention) for _, each in lc.walk(net))
    with pytest.raises(TypeError, match='Mean has no projections that could be sparse'):
        models.TerraformerLM(V, 8, 8, 1, 2, 16, attention=Mean(), positions='none')
