"""The Reformer gives what transformers gives, and goes out as it came in."""

import numpy as np
import pytest
from tiny import PRETRAINED, Array, expected, loaded

from layercomb import Model, interop, models, shape_dtype, tl
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of, family_of
from layercomb.interop.tensors import fill, shapes_of, spill
from layercomb.layers.core.walk import walk
from layercomb.supervised import decoding

# LSH chunks of 8: shorter, one, whole ones, and lengths that are no multiple.
LENGTHS = (3, 8, 9, 16, 21, 29, 32)


@pytest.fixture(scope='module')
def reformer():
    return loaded('reformer')


@pytest.fixture(scope='module')
def given():
    return expected('reformer')


@pytest.mark.parametrize('length', LENGTHS)
def test_logits_are_those_of_transformers(reformer, given, length):
    model, *_ = reformer
    logits = model(given['tokens'][:, :length].astype(np.int32))
    np.testing.assert_allclose(logits, given[f'logits_{length}'], atol=2e-5)


def test_greedy_tokens_are_those_of_transformers(reformer, given):
    """It computes the whole sequence at each step; within one chunk our cache gives the same."""
    model, *_ = reformer
    made = given['made'].astype(np.int32)
    for length in (7, 10, 16, 25, 31):
        np.testing.assert_array_equal(model(made[:, :length])[:, -1].argmax(-1), made[:, length])
    written = decoding.generate(model, made[:, :6], 2, temperature=0)
    np.testing.assert_array_equal(written, made[:, 6:8])


def test_tensors_and_configuration_go_out_as_they_came_in(reformer):
    model, entries, tensors, config = reformer
    written = dict(spill(model.layer, model.weights, entries))
    assert tensors.keys() - written.keys() == {'lm_head.bias'}  # which transformers does not read
    for key, x in written.items():
        np.testing.assert_array_equal(x, tensors[key], strict=True)
    family, found = config_of(model.layer)
    assert family.name == 'reformer'
    assert {k: config[k] for k in found} == found


def test_a_directory_is_read_and_written(tmp_path):
    model, tokenizer = interop.load(PRETRAINED / 'reformer')
    interop.save(tmp_path / 'out', model, tokenizer)
    again, _ = interop.load(tmp_path / 'out')
    assert again.layer == model.layer
    lsh = next(x for _, x in walk(again.layer) if isinstance(x, tl.LSHAttention))
    assert (lsh.n_buckets, lsh.seed, lsh.rotations) == ((4, 2), 7, 'torch')


def test_bias_of_older_files(reformer, given):
    """They have it under one name only."""
    model, entries, tensors, _ = reformer
    older = {**tensors, 'lm_head.bias': tensors['lm_head.decoder.bias']}
    del older['lm_head.decoder.bias']
    shapes = shapes_of(model.layer, (shape_dtype((1, 8), 'int32'),))
    weights = fill(model.layer, shapes, entries, {k: Array(x) for k, x in older.items()})
    np.testing.assert_array_equal(weights['head']['dense']['bias'], older['lm_head.bias'])


@pytest.mark.parametrize(
    'changes',
    [
        {'hash_seed': None, 'num_buckets': None},
        {'axial_pos_embds': False, 'num_buckets': 6},
        {'attn_layers': ['lsh'] * 3, 'num_hashes': 1},
        {'attn_layers': ['local', 'local'], 'local_num_chunks_before': 0, 'hidden_act': 'gelu'},
        {'attn_layers': ['lsh', 'local', 'local']},
        {'max_position_embeddings': 20},
    ],
)
def test_configurations_go_out_as_they_came_in(reformer, changes):
    config = {**reformer[3], **changes}
    family, read = family_of(config), Config(config)
    net = family.net(read)
    read.check_read('reformer')
    _, found = config_of(net)
    assert family.net(Config(found)) == net
    tensors = dict(spill(net, Model(net).init((shape_dtype((1, 8), 'int32'),)).weights,
                         family.entries(Config(config))))  # fmt: skip
    assert len(tensors) > 20
    same = {k: found[k] for k in changes if not k.startswith('max_') and k in found}
    assert same == {k: changes[k] for k in same}


def test_without_a_seed_short_sequences_are_equal(given):
    model, *_ = loaded('reformer', hash_seed=None)
    logits = model(given['tokens'][:, :8].astype(np.int32))
    np.testing.assert_allclose(logits, given['logits_8'], atol=2e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'is_decoder': False}, "'is_decoder' is not true, and only the Reformer that reads from"),
        ({'lsh_num_chunks_before': 2}, "'lsh_num_chunks_before' is 2, and only 1 is understood"),
        ({'local_num_chunks_after': 1}, "'local_num_chunks_after' is 1, and only 0 is"),
        ({'local_num_chunks_before': 2}, "'local_num_chunks_before' is 2, and only 1 is"),
        ({'attn_layers': ['lsh', 'full']}, "'attn_layers' is .* must be a list of 'local' and"),
        ({'axial_pos_shape': [2, 4, 4]}, "'axial_pos_shape' is .2, 4, 4. and .* must be two"),
    ],
)
def test_other_forms_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        loaded('reformer', **changes)


def test_a_model_of_our_own_is_no_reformer_of_theirs():
    with pytest.raises(UsageError, match='belongs to none of the families'):
        config_of(models.ReformerLM(20, 8, 8, 2, 2, max_len=64))
