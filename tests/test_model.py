"""Model and summary: what people at a prompt see."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import UsageError, tl, transforms, trees
from layercomb.layers.core.mode import Mode
from layercomb.model import seeded
from layercomb.summary import rows


def net():
    return tl.Serial(tl.Dense(8), tl.BatchNorm(momentum=0.5), tl.Relu(), tl.Dense(3, name='head'))


def x():
    return np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def test_init_from_an_example_or_a_signature():
    one = lc.Model(net()).init(x())
    two = lc.Model(net()).init(lc.shape_dtype((4, 5)), 0)
    assert one.n_weights == two.n_weights == 5 * 8 + 8 + 16 + 8 * 3 + 3
    assert (one.weights['head']['kernel'] == two.weights['head']['kernel']).all()
    three = lc.Model(net()).init(x(), jax.random.key(1))
    assert (three.weights['head']['kernel'] != one.weights['head']['kernel']).any()
    assert one.init(x()) is one


def test_call_keeps_the_state():
    model = lc.Model(net()).init(x())
    before = model.state['batch_norm']['mean']
    y = model(x())
    assert y.shape == (4, 3) and (model.state['batch_norm']['mean'] == before).all()
    model(x(), mode=Mode.TRAIN)
    assert (model.state['batch_norm']['mean'] != before).any()
    pair = lc.Model(tl.Dup()).init(x())(x())
    assert isinstance(pair, tuple) and len(pair) == 2


def test_call_decodes():
    model = lc.Model(tl.SelfAttention(2)).init(lc.shape_dtype((1, 4, 6)), mode=Mode.PREDICT)
    z = np.random.default_rng(0).normal(size=(1, 4, 6)).astype(np.float32)
    whole = lc.Model(tl.SelfAttention(2), model.weights)(z)
    parts = [model(z[:, :2], mode=Mode.PREDICT), model(z[:, 2:3], mode=Mode.PREDICT)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole[:, :3], rtol=1e-5, atol=1e-5)


FULL = {
    'cache': (tl.SelfAttention(2), 'in SelfAttention.core', 'the cache holds 4'),
    'local': (tl.LocalSelfAttention(2, 2), 'in LocalSelfAttention.core', 'the cache holds 4'),
    'convolution': (tl.Conv1D(6, 3, padding='causal'), '', 'the cache holds 4'),
    'positions': (tl.SinusoidalPositions(max_len=4), '', 'is 5 long and max_len=4'),
    'deep': (
        tl.Repeat(tl.Remat(tl.Residual(tl.LayerNorm(), tl.SelfAttention(2))), 2),
        'in Residual.self_attention',
        'the cache holds 4 positions, 4 are taken and 1 more were given: make the state with',
    ),
}


@pytest.mark.parametrize(('layer', 'where', 'cause'), FULL.values(), ids=list(FULL))
def test_decoding_past_the_end_says_so(layer, where, cause):
    model = lc.Model(layer).init(lc.shape_dtype((1, 4, 6)), mode=Mode.PREDICT)
    z = np.ones((1, 4, 6), np.float32)
    model(z[:, :3], mode=Mode.PREDICT)
    model(z[:, :1], mode=Mode.PREDICT)
    full = model.state
    with pytest.raises(ValueError, match=cause) as error:
        model(z[:, :1], mode=Mode.PREDICT)
    assert re.search(where, ' '.join(getattr(error.value, '__notes__', [])))
    assert model.state is full


def test_decoding_passes_nan_on():
    model = lc.Model(tl.SelfAttention(2)).init(lc.shape_dtype((1, 4, 6)), mode=Mode.PREDICT)
    assert jnp.isnan(model(np.full((1, 1, 6), np.nan, np.float32), mode=Mode.PREDICT)).all()


def test_dropout_at_the_prompt_needs_a_key():
    model = lc.Model(tl.Dropout(0.5)).init(x())
    with pytest.raises(ValueError, match=r'draws in training: pass rng='):
        model(x(), mode=Mode.TRAIN)
    assert model(x(), mode=Mode.TRAIN, rng=jax.random.key(0)).shape == (4, 5)


def test_a_seed_is_a_key():
    x = jnp.ones((2, 8))
    model = lc.Model(tl.Dropout(0.5)).init(x)
    drawn = [model(x, mode=Mode.TRAIN, rng=rng) for rng in (3, jax.random.key(3))]
    np.testing.assert_array_equal(*drawn)
    for rng in (2**63, 0.5, 'a'):
        with pytest.raises(ValueError, match=r'rng=.*: give an integer in −2⁶³ … 2⁶³ − 1'):
            model(x, rng=rng)


def test_save_and_load(tmp_path):
    model = lc.Model(net()).init(x(), 1)
    model(x(), mode=Mode.TRAIN)
    wanted = model(x())
    model.save(tmp_path / 'one')
    again = lc.Model(net()).init(x(), 2).load(tmp_path / 'one')
    assert (again(x()) == wanted).all()
    with pytest.raises(UsageError, match='is not empty: save to a new directory, or empty it'):
        model.save(tmp_path / 'one')
    other = lc.Model(tl.Serial(tl.Dense(7), tl.BatchNorm(), tl.Relu(), tl.Dense(3, name='head')))
    with pytest.raises(UsageError) as e:
        other.init(x()).load(tmp_path / 'one')
    assert '\n' not in str(e.value) and 'one' in str(e.value)
    with pytest.raises(UsageError, match='holds no saved weights: check the path'):
        again.load(tmp_path / 'none')


def test_a_model_without_weights_says_how_to_get_some(tmp_path):
    model = lc.Model(net())
    assert model.n_weights == 0 and repr(model).endswith('# no weights yet')
    with pytest.raises(ValueError, match=r'no weights yet: call model.init\(x\) first'):
        model(x())
    with pytest.raises(UsageError, match=r'no weights to save: call model.init\(x\) first'):
        model.save(tmp_path / 'new')
    with pytest.raises(ValueError, match=r'init the model first: model.init\(x\).load\(dir\)'):
        model.load(tmp_path / 'new')
    with pytest.raises(TypeError, match=r'Model binds a layer such as tl.Dense\(4\), got <class'):
        lc.Model(tl.Dense)


def test_calling_a_bare_layer_names_the_fix():
    with pytest.raises(TypeError) as e:
        tl.Dense(4)(x())
    assert str(e.value) == (
        'Dense is a description and holds no weights: bind it first, '
        'lc.Model(layer).init(x)(x), or call layer.apply(weights, state, (x,))'
    )


def test_too_few_inputs_and_wrong_shapes():
    model = lc.Model(net()).init(x())
    with pytest.raises(
        TypeError, match='Serial takes 1 value off the stack, 2 were there: float32'
    ):
        model(x(), x())
    with pytest.raises(ValueError, match='the input is 6 wide and the weights were made for 5'):
        model(np.zeros((4, 6), np.float32))


@pytest.mark.parametrize(
    'layer',
    [
        tl.Embedding(7, 4),
        tl.Serial(tl.Embedding(7, 4), tl.Dense(7)),
        transforms.Tied(
            tl.Serial(tl.Serial(tl.Embedding(7, 4)), tl.Dense(7)),
            'serial/embedding/table',
            'dense/kernel',
            jnp.transpose,
        ),
    ],
)
def test_tokens_outside_the_vocabulary(layer):
    model = lc.Model(layer).init(lc.shape_dtype((1, 3), 'int32'))
    with pytest.raises(
        ValueError, match='token id 7 is outside the vocabulary of 7: ids run from 0'
    ):
        model(np.array([[0, 7, 1]], np.int32))
    assert model(np.array([[0, 6, 1]], np.int32)).shape[:2] == (1, 3)


@pytest.mark.parametrize(
    ('positions', 'asks'),
    [
        ('learned', 'LearnedPositions'),
        ('sinusoidal', 'SinusoidalPositions'),
        ('rotary', 'SplitHeads'),
        ('none', 'SplitHeads'),
    ],
)
def test_tokens_without_a_batch_axis_are_refused(positions, asks):
    net = lc.models.TransformerLM(16, 8, 16, 1, 2, 32, positions=positions)
    model, tokens = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32')), [7, 1, 2]
    shape = r'takes \(batch, length, features\), got the shape \(3, 8\): add a batch axis, x\[None]'
    with pytest.raises(ValueError, match=f'{asks} {shape}'):
        model(tokens)
    with pytest.raises(ValueError, match=shape):
        model.layer.output_signature(lc.shape_dtype((3,), 'int32'))


def test_repr():
    assert repr(lc.Model(tl.Dense(3)).init(x())) == 'Model(Dense(3))  # 18 weights'


# summary.


def test_summary_is_a_table_with_totals():
    block = tl.Residual(tl.Dense(8), tl.Dropout(0.1))
    layer = tl.Serial(
        tl.Embedding(16, 8), tl.Repeat(block, 3), tl.Chunk(tl.Dense(16, name='head'), 4)
    )
    table = lc.summary(layer, lc.shape_dtype((2, 4), 'int32'))
    assert table == (
        'path              layer         output           weights  bytes\n'
        'embedding         Embedding     float32[2,4,8]       128    512\n'
        'residual/dense    3 × Dense     float32[2,4,8]       216    864\n'
        'residual/dropout  3 × Dropout   float32[2,4,8]         0      0\n'
        'residual/add      3 × Add       float32[2,4,8]         0      0\n'
        'head              Chunk(Dense)  float32[2,4,16]      144    576\n'
        'total                                                488  1,952'
    )
    assert lc.summary(lc.Model(layer), np.zeros((2, 4), np.int32)) == table


def test_summary_of_a_model_in_bfloat16_names_the_layers():
    table = lc.summary(lc.cast(tl.Serial(tl.LayerNorm(), tl.Dense(4))), lc.shape_dtype((2, 4)))
    assert [line.split()[1] for line in table.splitlines()[1:3]] == ['LayerNorm', 'Cast(Dense)']


def test_summary_counts_a_tied_weight_once():
    body = tl.Serial(tl.Embedding(16, 8), tl.Dense(16, use_bias=False, name='head'))
    layer = transforms.Tied(body, 'embedding/table', 'head/kernel', jnp.transpose)
    lines = lc.summary(layer, lc.shape_dtype((2, 4), 'int32')).splitlines()
    assert lines[-2].split()[0] == 'head' and lines[-2].split()[-2:] == ['0', '0']
    assert lines[-1].split() == ['total', '128', '512']


SPARSE = {'ff_block_size': 4, 'qkv_modules': 4, 'head_modules': 2}
MODELS = {
    'MLP': lambda m: m.MLP((4, 5), 3),
    'TransformerLM': lambda m: m.TransformerLM(11, 8, 8, 1, 2, 16),
    'TransformerEncoder': lambda m: m.TransformerEncoder(11, 3, 8, 8, 1, 2, 16),
    'ReformerLM': lambda m: m.ReformerLM(11, 8, 8, 1, 2, 16),
    'Reformer': lambda m: m.Reformer(11, 8, 8, 1, 1, 2, 16, masked=True),
    'RevNet': lambda m: m.RevNet(widths=(4, 8), n_blocks=1),
    'TerraformerLM': lambda m: m.TerraformerLM(11, 8, 8, 1, 2, 16, **SPARSE),
    'Terraformer': lambda m: m.Terraformer(11, 8, 8, 1, 1, 2, 16, **SPARSE),
    'BERT': lambda m: m.BERT(11, 8, 8, 1, 2, 16),
    'FNet': lambda m: m.FNet(11, 8, 8, 1, 16),
    'GPT2': lambda m: m.GPT2(11, 8, 8, 1, 2, 16),
    'Gemma2': lambda m: m.Gemma2(11, 8, 8, 2, 2, 1, 16),
    'Gemma3': lambda m: m.Gemma3(11, 8, 8, 3, 2, 1, 16),
    'Llama': lambda m: m.Llama(11, 8, 8, 1, 2, 1, 16),
    'Marian': lambda m: m.Marian(11, 8, 8, 1, 1, 2, 16),
    'Qwen2': lambda m: m.Qwen2(11, 8, 8, 1, 2, 1, 16),
    'Qwen3': lambda m: m.Qwen3(11, 8, 8, 1, 2, 1, 16),
    'T5': lambda m: m.T5(11, 8, 8, 1, 1, 2),
    'Transformer': lambda m: m.Transformer(11, 8, 8, 1, 1, 2, 16, masked=True),
    'Terraformer masked': lambda m: m.Terraformer(11, 8, 8, 1, 1, 2, 16, masked=True, **SPARSE),
}


def test_every_model_has_a_row():
    assert {name.split()[0] for name in MODELS} == set(lc.models.__all__)


@pytest.mark.parametrize('name', MODELS)
def test_summary_shows_what_each_model_holds_and_puts_out(name):
    net, image = MODELS[name](lc.models), lc.shape_dtype((1, 8, 8, 3))
    tokens = [lc.shape_dtype((1, n), 'int32') for n in (8, 4)]
    mask = lc.shape_dtype((1, 8), bool)
    inputs = (image,) if name in ('MLP', 'RevNet') else (*tokens, mask)
    inputs = (tokens[0], mask) if name == 'BERT' else inputs
    inputs = inputs[: net.n_in]
    found = rows(net, inputs)
    weights = jax.eval_shape(lambda: net.init(inputs, jax.random.key(0))[0])
    assert sum(row.count for row in found) == trees.count(weights)
    assert found[-1].outputs == net.output_signature(inputs)


def test_summary_is_of_shapes_alone():
    layer = lc.models.TransformerLM(50_000, 8192, 65536, 96, 64, 4096)
    assert '96 × ' in lc.summary(layer, lc.shape_dtype((64, 4096), 'int32'))


def test_layers_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tl.Dense(4).n_units = 5


def test_ids_are_checked_in_each_group_of_a_map():
    model = lc.Model(tl.Map(tl.Embedding(9, 4), 2)).init([lc.shape_dtype((1, 1), 'int32')] * 2)
    ids = jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match='token id 88 is outside the vocabulary of 9'):
        model(ids, ids + 88)


def test_all_bits_of_a_seed_count():
    keys = {str(jax.random.key_data(seeded('rng', n))) for n in (0, 1, -1, 2**32, -(2**63))}
    assert len(keys) == 5
    assert (jax.random.key_data(seeded('rng', 7)) == jax.random.key_data(jax.random.key(7))).all()
    with pytest.raises(ValueError, match='give an integer in'):
        seeded('rng', np.array([1, 2]))
