"""Decoders as transformers has them: recorded logits, tensors there and back, configurations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from layercomb.interop.configs import Config
from layercomb.interop.families import config_of, family_of
from layercomb.interop.tensors import fill, shapes_of, spill
from layercomb.layers.core.mode import Mode

FOLDER = Path(__file__).parents[1] / 'data' / 'pretrained'
spec = importlib.util.spec_from_file_location('make_decoders', FOLDER / 'make_decoders.py')
assert spec is not None and spec.loader is not None
recorder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recorder)
RECORDED = np.load(FOLDER / 'decoders.npz')
CASES = list(recorder.CASES)


class Known:
    """A tensor whose values are known, or follow from its name."""

    def __init__(self, given, name=''):
        self.values = given if isinstance(given, np.ndarray) else None
        self.shape = tuple(given.shape if self.values is not None else given)
        self.name = name

    def read(self):
        return recorder.values(self.name, self.shape) if self.values is None else self.values


def recorded(case, **changes):
    """The configuration and the tensors of a case."""
    config = json.loads(str(RECORDED[f'{case}/config'])) | changes
    shapes = json.loads(str(RECORDED[f'{case}/shapes']))
    return config, {name: Known(shape, name) for name, shape in shapes.items()}


def described(config):
    """The model that a configuration describes."""
    family, known = family_of(config), Config(config)
    net = family.net(known)
    family.entries(known)
    known.check_read(family.name)
    return net


def loaded(config, tensors):
    """A model and its weights, as a loader makes them."""
    family, net = family_of(config), described(config)
    entries, shapes = family.entries(Config(config)), shapes_of(net, family.signature(net))
    return net, fill(net, shapes, entries, tensors, ignored=family.ignored)


@pytest.mark.parametrize('case', CASES)
def test_logits_are_those_of_transformers(case):
    net, weights = loaded(*recorded(case))
    vocab_size = RECORDED[f'{case}/logits'].shape[-1]
    apply = jax.jit(net.apply, static_argnames='mode')
    (logits,), _ = apply(weights, {}, (recorder.token_ids(vocab_size),), mode=Mode.EVAL)
    wanted = RECORDED[f'{case}/logits']
    np.testing.assert_allclose(logits[:, -recorder.KEPT :], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', CASES)
def test_tensors_and_configuration_come_back(case):
    config, tensors = recorded(case)
    net, weights = loaded(config, tensors)
    family = family_of(config)
    written = family.config(net)
    found, other = config_of(net)
    assert (family, written) == (found, other) or config['model_type'] == 'phi3'  # then a Llama
    again = dict(spill(net, weights, family.entries(Config(written))))
    assert again.keys() == tensors.keys()
    for name, values in again.items():
        np.testing.assert_array_equal(values, tensors[name].read(), err_msg=name)
    copies = {name: Known(values) for name, values in again.items()}
    other, same = loaded(json.loads(json.dumps(written)), copies)
    assert other == net
    jax.tree.map(np.testing.assert_array_equal, same, weights)
