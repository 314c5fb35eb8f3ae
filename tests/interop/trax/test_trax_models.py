"""Models that Trax 1.4.1 trained answer here as they did there; what does not fit is named.

The checkpoints and the answers were made by Trax itself: see tests/data/make_trax.py.
"""

from __future__ import annotations

import functools
import gzip
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
from layercomb import tl, trees
from layercomb.errors import UsageError
from layercomb.interop import trax
from layercomb.layers.core.walk import walk
from layercomb.supervised import decoding

DATA = Path(__file__).parents[2] / 'data' / 'trax'
SAVED = {'n_heads': 2, 'ff_activation': 'FastGelu'}  # it has no config.gin
RUNS = ['lm', 'seq2seq', 'seq2seq_two_vocabularies', 'reformer']


@functools.lru_cache
def loaded(name):
    model, tokenizer = trax.load(DATA / name, **(SAVED if name == 'saved' else {}))
    assert tokenizer is None
    return model


@functools.lru_cache
def expected(name):
    with np.load(DATA / name / 'expected.npz') as file:
        return dict(file)


def inputs_of(name):
    """What Trax was given; it shifts its tokens itself."""
    said = expected(name)
    shifted = np.pad(said['tokens'], ((0, 0), (1, 0)))[:, :-1]
    source = said.get('source')
    given = (shifted,) if source is None else (source, shifted, source != 0)
    return tuple(map(jnp.asarray, given))


@pytest.mark.parametrize('name', [*RUNS, 'saved'])
def test_logits_are_those_of_trax(name):
    logits, theirs = loaded(name)(*inputs_of(name)), expected(name)['logits']
    at = slice(None)
    if name == 'reformer':  # see the next test
        np.testing.assert_allclose(logits[:, 0], theirs[:, 0], atol=5e-3)
        at = slice(1, None)
    np.testing.assert_allclose(logits[:, at], theirs[:, at], atol=1e-5)


def test_a_position_that_sees_itself_alone_is_rounded_in_trax():
    """It lowers a score by 1e5, where float32 has steps of 1/128: e^x is wrong by half of one."""
    scores = np.float32([-1e5 + 0.3, -1e5 + 0.3])
    in_trax = np.exp(scores - np.logaddexp(*scores))
    assert 1e-4 < abs(in_trax.sum() - 1) < 5e-3


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in RUNS[2:]]


@pytest.mark.parametrize('name', [*RUNS[:2], *SLOW])
def test_greedy_tokens_are_those_of_trax(name):
    said = expected(name)
    greedy = said['greedy']
    length = min(greedy.shape[1], decoding.max_len(loaded(name).layer) - 1)
    context = {}
    if 'source' in said:
        context['inputs'] = [row[row != 0] for row in said['source']]
    made = decoding.generate(
        loaded(name), np.zeros((len(greedy), 1), int), length, temperature=0, **context
    )
    assert length == (64 if name == 'lm' else 15 if name == 'reformer' else 16)
    np.testing.assert_array_equal(made, greedy[:, :length])


def test_the_models_are_those_of_the_pages():
    lm = lc.models.TransformerLM(20, 8, 12, 2, 2, 80, activation='exact_gelu')
    assert loaded('lm').layer == lm
    assert loaded('seq2seq_two_vocabularies').layer == lc.models.Transformer(
        22, 8, 12, 2, 1, 4, 24, target_vocab_size=20, masked=True, activation='relu'
    )
    shared = loaded('seq2seq')
    assert 'embedding' in shared.weights['encoder'] and 'embedding' not in shared.weights['decoder']


def test_attention_of_a_reformer_is_read_from_the_config():
    found = [x for _, x in walk(loaded('reformer').layer)]
    (local,) = (x for x in found if isinstance(x, tl.LocalSelfAttention))
    (lsh,) = (x for x in found if isinstance(x, tl.LSHSelfAttention))
    assert (local.n_heads, local.chunk_len, local.look_back, local.d_head) == (2, 4, 1, 6)
    assert (lsh.n_heads, lsh.chunk_len, lsh.n_hashes, lsh.neighbourhood) == (2, 16, 2, 'circle')
    weights = trees.flatten(loaded('reformer').weights)
    half = 'block/reversible_half_residual'
    assert weights[f'{half}/local_self_attention/value/bias'].shape == (1, 2, 4)
    assert f'{half}_2/lsh_self_attention/value/bias' not in weights
    assert weights['axial_positions/table_1'].shape == (4, 5)


def test_lsh_attention_of_the_same_buckets_is_that_of_trax():
    with np.load(DATA / 'lsh_layer.npz') as file:
        said = dict(file)
    x = said['x']
    (b, length, _), h, chunk_len = x.shape, len(said['query']), 4
    q, v = (np.einsum('bld,hdk->bhlk', x, said[part]) for part in ('query', 'value'))
    buckets = said['buckets'].reshape(b, h, 1, length)
    y = tl.lsh_attention(
        *map(jnp.asarray, (q, v, buckets)),
        n_buckets=4,
        chunk_len=chunk_len,
        neighbourhood='circle',
        epsilon=6e-6,
        alone='rounded',
    )
    ours = np.einsum('bhlk,hkd->bld', y, said['output'])
    np.testing.assert_allclose(ours, said['y'], atol=1e-5)


@pytest.mark.slow
def test_a_model_that_was_read_trains():
    model = loaded('reformer')
    (tokens,) = inputs_of('reformer')

    def error(weights):
        (y,), _ = model.layer.apply(
            weights, {}, (tokens,), rng=jax.random.key(0), mode=lc.Mode.TRAIN
        )
        return (y * y).sum()

    gradients = jax.grad(error)(model.weights)
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(gradients))


# Weights that are not as they should be, and parameters that are not known.


def headers(path):
    """Where each array of a file begins, and its end: (data, [(start, stop), …])."""
    data, spans, at = gzip.decompress(path.read_bytes()), [], 0
    while at < len(data):
        start, at = at, at + 10 + int.from_bytes(data[at + 8 : at + 10], 'little')
        header = eval(data[start + 10 : at])
        at += int(np.prod(header['shape'])) * np.dtype(header['descr']).itemsize
        spans.append((start, at))
    return data, spans


def array(*shape, dtype='<f4'):
    """The bytes of an array of zeros in a file."""
    header = str({'descr': dtype, 'fortran_order': False, 'shape': shape})[:-1] + ', }\n'
    size = len(header).to_bytes(2, 'little')
    return b'\x93NUMPY\x01\x00' + size + header.encode() + bytes(np.zeros(shape, dtype))


@pytest.fixture
def edited(tmp_path):
    """Makes a copy of a run whose weights are edited: a list of bytes, one item an array."""

    def make(name, edit, config=True):
        folder = tmp_path / name
        shutil.copytree(DATA / name, folder)
        data, spans = headers(folder / 'model.weights.npy.gz')
        arrays = [data[start:stop] for start, stop in spans]
        edit(arrays)
        (folder / 'model.weights.npy.gz').write_bytes(gzip.compress(b''.join(arrays), 1))
        if not config:
            (folder / 'config.gin').unlink()
        return folder

    return make


def refusal(folder, **known):
    with pytest.raises(UsageError) as e:
        trax.load(folder, **known)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_missing_left_over_and_misshapen_weights_are_named_together(edited):
    def edit(arrays):
        arrays[4] = array(8, 7)  # query of block 0
        del arrays[32]  # the last matrix of block 1
        arrays.append(array(3, 3))
        arrays.append(array(2))

    said = refusal(edited('lm', edit))
    assert said.startswith(
        'model.weights.npy.gz does not hold the weights of this TransformerLM: of another shape: '
        'block 0: attention: query: kernel is (8, 7) at place 4, not (8, 8); missing: block 1: '
        'feed-forward: second Dense: kernel (12, 8); left over: (3, 3) at '
        'place 37, (2,) at place 38: '
    )


def test_long_lists_are_cut(edited):
    def edit(arrays):
        arrays[2:34] = [array(5)] * 32

    assert ' and 26 more' in refusal(edited('lm', edit))


@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('place', [0, 1, 2, 9, -1])
def test_a_missing_weight_is_refused(edited, name, place):
    said = refusal(edited(name, lambda arrays: arrays.pop(place)))
    assert 'weights' in said or 'positions' in said


@pytest.mark.parametrize('name', RUNS)
def test_a_weight_too_many_is_refused(edited, name):
    assert 'left over: (4,) at place' in refusal(edited(name, lambda a: a.append(array(4))))


def test_old_tables_of_positions_have_one_more_axis(edited):
    def edit(arrays):
        arrays[1] = arrays[1].replace(b'(80, 8)', b'(1, 80, 8)')
        length = int.from_bytes(arrays[1][8:10], 'little')
        arrays[1] = arrays[1][:8] + (length + 3).to_bytes(2, 'little') + arrays[1][10:]

    model, _ = trax.load(edited('lm', edit))
    np.testing.assert_array_equal(
        model.weights['learned_positions']['table'],
        loaded('lm').weights['learned_positions']['table'],
    )


def test_bfloat16_is_read_from_its_bits(edited):
    def edit(arrays):
        bits = np.asarray(loaded('lm').weights['head']['bias']).view(np.uint32) >> 16
        made = array(20, dtype='<u2')
        arrays[-1] = made[: -2 * 20] + bits.astype('<u2').tobytes()

    model, _ = trax.load(edited('lm', edit))
    bias = loaded('lm').weights['head']['bias']
    np.testing.assert_allclose(model.weights['head']['bias'], bias, rtol=1 / 128)
    assert model.weights['head']['bias'].dtype == jnp.float32


def test_what_weights_do_not_tell_is_asked_for_at_once(edited):
    keep = lambda arrays: None  # noqa: E731
    folder = edited('lm', keep, config=False)
    assert refusal(folder) == (
        "the weights of this TransformerLM do not tell n_heads=… nor ff_activation='Relu' (the "
        "default of Trax): pass that to load, or as config= the run's config.gin"
    )
    model, _ = trax.load(folder, n_heads=2, ff_activation='Gelu')
    assert model.layer == loaded('lm').layer
    folder = edited('reformer', keep, config=False)
    assert 'do not tell attention_type=…' in refusal(folder)
    kinds = ['SelfAttention', 'LSHSelfAttention']
    said = refusal(folder, attention_type=kinds)
    for asked in ('chunk_len=', 'n_hashes=1 (the', "ff_activation='FastGelu' (the"):
        assert asked in said
    known = {'attention_type': kinds, 'n_hashes': 2, 'ff_activation': 'FastGelu'}
    model, _ = trax.load(folder, chunk_len=4, n_chunks_before=1, **known)
    assert model(*inputs_of('reformer')).shape == (2, 16, 20)


def test_a_config_elsewhere_is_read(edited, tmp_path):
    folder = edited('lm', lambda arrays: None, config=False)
    model, _ = trax.load(folder / 'model.pkl.gz', config=DATA / 'lm' / 'config.gin')
    assert model.layer == loaded('lm').layer
    text = tmp_path / 'own.gin'
    text.write_text('TransformerLM.n_heads = %heads\nheads = 4  # more\n')
    assert trax.load(folder, config=text)[0].layer == lc.models.TransformerLM(
        20, 8, 12, 2, 4, 80, activation='relu'
    )


@pytest.mark.parametrize(
    ('name', 'known', 'words'),
    [
        ('lm', {'n_head': 2}, 'TransformerLM of Trax has no parameter n_head'),
        ('lm', {'n_heads': 3}, 'n_heads = 3 does not divide the width 8'),
        ('lm', {'n_heads': 'two'}, "n_heads = 'two': a number from 1 to"),
        ('lm', {'ff_activation': 'Snake'}, "ff_activation = 'Snake': those that can be read are"),
        ('lm', {'ff_activation': ['Relu']}, r"ff_activation = \['Relu'\]: those that can be read"),
        ('lm', {'d_model': 16}, r'embedding is \(20, 8\) at place 0, not \(20, 16\)'),
        ('lm', {'n_layers': 3}, 'missing: .*block 2: '),
        ('lm', {'n_layers': 10**6}, 'at most 10,000 blocks are read'),
        ('lm', {'model': 'BERT'}, 'a model of Trax that can be read is .*, and it is a BERT'),
        ('lm', {'model': 'Transformer', 'n_heads': 2}, 'not hold the weights of this Transformer'),
        ('seq2seq', {'output_vocab_size': 20}, r'missing: embedding of the target \(20, 8\)'),
        ('reformer', {'attention_type': 'Favor'}, "attention_type = 'Favor': those that can be"),
        ('reformer', {'n_chunks_before': 2}, 'LSHSelfAttention.n_chunks_before = 2: layercomb'),
        ('reformer', {'n_chunks_after': 1}, 'SelfAttention.n_chunks_after = 1: layercomb reads'),
        ('reformer', {'share_qk': True}, 'SelfAttention.share_qk = True: layercomb reads models'),
        ('reformer', {'chunk_len': 0}, 'this ReformerLM cannot be made here: .*chunk_len'),
        ('reformer', {'ff_use_sru': 2}, 'ReformerLM.ff_use_sru = 2: layercomb reads models of 0'),
        ('reformer', {'pos_axial_shape': (2, 2, 4)}, 'axial positions of 3 axes and 2 depths'),
        ('reformer', {'pos_axial_shape': (2, 8)}, 'positions along axis 0 is .*, not .1, 2, 1, 3'),
        (
            'reformer',
            {'n_heads': 4},
            r'query of each head is \(2, 8, 6\) at .*, not \(4, 8, 6',
        ),
        ('reformer', {'d_attention_value': 5}, r'value of each head is .*, not \(2, 8, 5\)'),
        ('reformer', {'bias': False}, 'left over: '),
        ('reformer', {'attention_type': 'SelfAttention'}, 'missing: block 1: attention: '),
    ],
)
def test_parameters_that_do_not_fit_are_refused(name, known, words):
    with pytest.raises(UsageError, match=words):
        trax.load(DATA / name, **known)


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('TransformerLM.n_gates = 3', 'TransformerLM.n_gates: TransformerLM of Trax 1.4.1 has no'),
        ('LayerNorm.center = False', 'LayerNorm.center = False: layercomb reads models of True'),
        ('eval/TransformerLM.n_heads = 4', 'eval/TransformerLM.n_heads: values in a scope are not'),
        ('TransformerLM.n_heads = print(3)', 'only numbers, strings, lists and names of layers'),
        ('TransformerLM.n_heads = @f()', "n_heads = 'f': a number from 1 to"),
        ('TransformerLM.n_heads = %loop\nloop = %loop', "loop = '%loop': only numbers, strings"),
        ("TransformerLM.n_heads = '", 'only numbers, strings, lists and names of layers'),
        (f'TransformerLM.n_heads = {"-" * 9000}1', 'n_heads = '),
        (f'TransformerLM.n_heads = {"[" * 5000}', 'only numbers, strings, lists and names'),
    ],
)
def test_lines_of_a_config_that_do_not_fit_are_refused(edited, line, words):
    folder = edited('lm', lambda arrays: None)
    config = folder / 'config.gin'
    config.write_text(f'{config.read_text()}\n{line}\n')
    assert words in refusal(folder)


def test_lines_of_a_config_that_do_not_matter_are_left_alone(edited):
    folder = edited('lm', lambda arrays: None)
    (folder / 'config.gin').write_text(
        'import os\ninclude "other.gin"\n# TransformerLM.n_heads = 1\n'
        'trax.models.TransformerLM.n_heads = \\\n    2  # 4\n'
        'train.callback = @run(1, )\ntrain.model = @trax.models.TransformerLM\n'
        "TransformerLM.ff_activation = @trax.layers.Gelu\nx.y = ['#', \n'] = 3']\n"
    )
    assert trax.load(folder)[0].layer == loaded('lm').layer


@pytest.mark.parametrize('data', [b'\xff\xfe', b'#' * (2**20 + 1)])
def test_a_config_that_is_none_is_refused(edited, data):
    folder = edited('lm', lambda arrays: None)
    (folder / 'config.gin').write_bytes(data)
    assert 'config.gin is' in refusal(folder)


def test_files_that_are_not_there_are_named(tmp_path):
    assert 'No such file or directory' in refusal(tmp_path)
    shutil.copytree(DATA / 'lm', tmp_path / 'lm')
    (tmp_path / 'lm' / 'model.weights.npy.gz').unlink()
    said = refusal(tmp_path / 'lm')
    assert said == (
        'model.pkl.gz keeps its weights in model.weights.npy.gz, which is not there: copy it too'
    )
    assert 'vocab' in refusal(DATA / 'lm', vocab=tmp_path / 'vocab')
