"""T5 gives what transformers gives, and goes out as it came in."""

import numpy as np
import pytest
from tiny import expected, loaded

from layercomb import models
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of, family_of
from layercomb.interop.tensors import spill
from layercomb.supervised import decoding

NAMES = ('t5', 't5_gated')


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_those_of_transformers(name):
    model, *_ = loaded(name)
    given = expected(name)
    source, inputs = (given[k].astype(np.int32) for k in ('input_ids', 'decoder_input_ids'))
    logits = model(source, inputs, given['attention_mask'].astype(bool))
    np.testing.assert_allclose(logits, given['logits'], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_greedy_answers_are_those_of_transformers(name):
    model, *_ = loaded(name)
    given = expected(name)
    mask = given['attention_mask'].astype(bool)
    sources = [row[real] for row, real in zip(given['input_ids'], mask, strict=True)]
    written = decoding.generate(model, [[0], [0]], 16, inputs=sources, temperature=0)
    np.testing.assert_array_equal(written, given['made'][:, 1:17])


@pytest.mark.parametrize('name', NAMES)
def test_tensors_and_configuration_go_out_as_they_came_in(name):
    model, entries, tensors, config = loaded(name)
    written = dict(spill(model.layer, model.weights, entries))
    assert written.keys() == tensors.keys()
    for key, x in written.items():
        np.testing.assert_array_equal(x, tensors[key], strict=True)
    family, found = config_of(model.layer)
    assert family.name == 't5'
    assert {k: config[k] for k in found} == found


def test_a_head_of_its_own():
    net = models.T5(64, 16, 32, 1, 1, n_heads=2, gated=True, tied=False, scaled_head=False)
    family, config = config_of(net)
    assert config['tie_word_embeddings'] is False and config['scale_decoder_outputs'] is False
    assert family_of(config).net(Config(config)) == net
    assert 'lm_head.weight' in [entry.theirs for entry in family.entries(Config(config))]


def test_an_unknown_feed_forward_is_refused():
    with pytest.raises(UsageError, match="'feed_forward_proj' is 'gated-mish', and known are relu"):
        loaded('t5', feed_forward_proj='gated-mish')
