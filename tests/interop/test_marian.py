"""Marian gives what transformers gives, and goes out as it came in."""

import numpy as np
import pytest
from tiny import expected, loaded

from layercomb import Mode
from layercomb.errors import UsageError
from layercomb.interop.families import config_of
from layercomb.interop.tensors import spill
from layercomb.supervised import decoding


@pytest.fixture(scope='module')
def translator():
    return loaded('marian')


@pytest.fixture(scope='module')
def given():
    return expected('marian')


def test_logits_are_those_of_transformers(translator, given):
    model, *_ = translator
    source, inputs = (given[k].astype(np.int32) for k in ('input_ids', 'decoder_input_ids'))
    logits = model(source, inputs, given['attention_mask'].astype(bool))
    np.testing.assert_allclose(logits, given['logits'], atol=2e-5)


def test_greedy_translations_are_those_of_transformers(translator, given):
    model, *_ = translator
    mask = given['attention_mask'].astype(bool)
    sources = [row[real] for row, real in zip(given['input_ids'], mask, strict=True)]
    made = given['made']
    written = decoding.generate(model, [[39], [39]], 16, inputs=sources, temperature=0)
    # It never writes what pads: transformers sets those logits to −∞.
    same = (written == made[:, 1:17]).all(1)
    assert same.all()


def test_tensors_and_configuration_go_out_as_they_came_in(translator):
    model, entries, tensors, config = translator
    written = dict(spill(model.layer, model.weights, entries))
    assert written.keys() == tensors.keys()
    for key, x in written.items():
        np.testing.assert_array_equal(x, tensors[key], strict=True)
    family, found = config_of(model.layer)
    assert family.name == 'marian'
    # Two words for one activation.
    assert {k: config[k] for k in found} == found | {'activation_function': 'swish'}


def test_other_forms_are_refused():
    with pytest.raises(UsageError, match="'normalize_before' is True, and only False"):
        loaded('marian', normalize_before=True)


def test_the_three_tables_are_one(translator):
    model, *_ = translator
    assert 'kernel' not in model.weights['head'] and 'tokens' not in model.weights['decoder']
    assert Mode.PREDICT  # decoding is in test_greedy_translations
