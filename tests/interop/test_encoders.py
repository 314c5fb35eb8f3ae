"""BERT, RoBERTa, ALBERT and FNet give what transformers gives, and go out as they came in."""

import json

import numpy as np
import pytest
from tiny import PRETRAINED, Array, expected, loaded

from layercomb import Model, models, transforms
from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of, family_of
from layercomb.interop.tensors import fill, shapes_of, spill

NAMES = sorted(
    path.name
    for path in PRETRAINED.iterdir()
    if path.is_dir() and path.name.split('_')[0] in ('bert', 'roberta', 'albert', 'fnet')
)


def inputs_of(name):
    given = expected(name)
    made = [given[k].astype(np.int32) for k in ('input_ids', 'token_type_ids') if k in given]
    if 'attention_mask' in given:
        made.append(given['attention_mask'].astype(bool))
    return tuple(made), given['outputs']


@pytest.mark.parametrize('name', NAMES)
def test_outputs_are_those_of_transformers(name):
    inputs, outputs_there = inputs_of(name)
    model, *_ = loaded(name)
    outputs = np.asarray(model(*inputs))
    if outputs.ndim == 3 and inputs[-1].dtype == bool:  # what padding gives is of no use
        outputs, outputs_there = outputs[inputs[-1]], outputs_there[inputs[-1]]
    np.testing.assert_allclose(outputs, outputs_there, atol=2e-5)


@pytest.mark.parametrize('name', NAMES)
def test_tensors_go_out_as_they_came_in(name):
    model, entries, tensors, _ = loaded(name)
    written = dict(spill(model.layer, model.weights, entries))
    for key, x in written.items():
        np.testing.assert_array_equal(x, tensors[key], strict=True)
    left = tensors.keys() - written.keys()
    assert all('pooler' in key for key in left)  # of hidden states that nothing reads


@pytest.mark.parametrize('name', NAMES)
def test_a_configuration_is_read_off_the_layers(name):
    model, _, _, config = loaded(name)
    family, found = config_of(model.layer)
    assert family.name == found['model_type'] == config['model_type']
    for key in found.keys() & config.keys() - {'id2label', 'label2id'}:
        assert found[key] == config[key], key


def test_missing_left_over_and_misshapen_tensors_are_named_together():
    from safetensors.numpy import load_file

    folder = PRETRAINED / 'bert_masked_lm'
    config = json.loads((folder / 'config.json').read_text())
    tensors = {key: Array(x) for key, x in load_file(folder / 'model.safetensors').items()}
    tensors['other'] = tensors.pop('cls.predictions.bias')
    name = 'bert.encoder.layer.1.attention.self.key.weight'
    tensors[name] = Array(tensors[name].values[1:])
    family = family_of(config)
    net = family.net(Config(config))
    shapes, entries = shapes_of(net, family.signature(net)), family.entries(Config(config))
    with pytest.raises(UsageError) as refused:
        fill(net, shapes, entries, tensors, ignored=family.ignored)
    assert str(refused.value) == (
        'the tensors do not fit the configuration (missing: cls.predictions.bias; left over: other;'
        f' misshapen: {name} is (15, 16) and not (16, 16)): take both from the same model'
    )


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'model_type': 'xlnet'}, "a model of type 'xlnet', and known are albert, "),
        ({'is_decoder': True}, "'is_decoder' is True, and only False is understood"),
        ({'hidden_act': 'mish'}, "'hidden_act' is 'mish', and known are gelu, "),
        ({'hidden_size': 'wide'}, "'hidden_size' is 'wide' and not a positive integer"),
        ({'position_embedding_type': 'relative_key'}, "only 'absolute' is understood"),
        ({'architectures': ['BertForCoffee']}, "'BertForCoffee' is unknown: known BertModel, "),
        ({'normalizes_twice': True}, "says 'normalizes_twice': True, which is unknown for bert"),
        ({'rotary': 7}, "says 'rotary': 7, which is unknown for bert"),
    ],
)
def test_what_is_not_understood_is_refused(changes, said):
    with pytest.raises(UsageError) as refused:
        loaded('bert_masked_lm', **changes)
    assert said in str(refused.value)


def test_a_model_of_no_family_is_refused():
    with pytest.raises(UsageError, match='belongs to none of the families'):
        config_of(models.MLP())


def test_padding_does_not_change_an_embedding():
    model, *_ = loaded('bert_hidden', _mean_pooling=True)
    assert model.layer.n_in == 2
    ids = np.arange(2, 8, dtype=np.int32)[None]
    whole = np.asarray(model(ids, np.ones((1, 6), bool)))
    padded = np.pad(ids, ((0, 0), (0, 4)), constant_values=1)
    mask = np.arange(10)[None] < 6
    np.testing.assert_allclose(np.asarray(model(padded, mask)), whole, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=-1), 1, rtol=1e-6)


def test_narrow_weights_give_nearly_the_same():
    inputs, _ = inputs_of('albert_masked_lm')
    model, *_ = loaded('albert_masked_lm')
    narrow = Model(*transforms.quantize(model.layer, model.weights, bits=8, smallest=1))
    there = inputs[-1]
    exact = np.asarray(model(*inputs))[there]
    off = np.asarray(narrow(*inputs))[there] - exact
    assert np.abs(off).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ('name', 'ours', 'again'),
    [
        (
            'bert_masked_lm',
            'bert.embeddings.word_embeddings.weight',
            'cls.predictions.decoder.weight',
        ),
        ('bert_masked_lm', 'cls.predictions.bias', 'cls.predictions.decoder.bias'),
        ('roberta_masked_lm', 'lm_head.bias', 'lm_head.decoder.bias'),
        ('albert_masked_lm', 'predictions.bias', 'predictions.decoder.bias'),
        ('marian', 'model.shared.weight', 'lm_head.weight'),
        ('marian', 'model.shared.weight', 'model.encoder.embed_tokens.weight'),
    ],
)
def test_what_is_there_twice_must_be_the_same(name, ours, again):
    _, entries, tensors, config = loaded(name)
    family = family_of(config)
    net = family.net(Config(config))
    shapes = shapes_of(net, family.signature(net))
    for off in (0, 1):
        given = {**tensors, again: tensors[ours] + np.float32(off)}
        wrapped = {key: Array(x) for key, x in given.items()}
        if not off:
            fill(net, shapes, entries, wrapped, ignored=family.ignored)
            continue
        with pytest.raises(UsageError, match='differ'):
            fill(net, shapes, entries, wrapped, ignored=family.ignored)
