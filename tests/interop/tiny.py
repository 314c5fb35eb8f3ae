"""The tiny models of tests/data/pretrained, read without the reader of directories."""

import json
from pathlib import Path

import numpy as np

from layercomb import Model
from layercomb.interop.configs import Config
from layercomb.interop.families import family_of
from layercomb.interop.tensors import fill, shapes_of

PRETRAINED = Path(__file__).parents[1] / 'data' / 'pretrained'


class Array:
    """A tensor in memory, as `fill` takes it."""

    def __init__(self, values):
        self.values, self.shape = values, values.shape

    def read(self):
        return self.values


def loaded(name, **changes):
    """The model, its entries, its tensors and its configuration with some changes."""
    from safetensors.numpy import load_file

    folder = PRETRAINED / name
    config = {**json.loads((folder / 'config.json').read_text()), **changes}
    tensors = load_file(folder / 'model.safetensors')
    family, read = family_of(config), Config(config)
    net = family.net(read)
    read.check_read(family.name)
    entries = family.entries(Config(config))
    wrapped = {key: Array(x) for key, x in tensors.items()}
    shapes = shapes_of(net, family.signature(net))
    weights = fill(net, shapes, entries, wrapped, ignored=family.ignored)
    return Model(net, weights), entries, tensors, config


def expected(name):
    """What transformers was given and made, arrays by name."""
    with np.load(PRETRAINED / name / 'expected.npz') as given:
        return dict(given)
