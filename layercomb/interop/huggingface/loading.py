"""`load`: a model and its tokenizer from a directory of Hugging Face."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from layercomb import paths, trees
from layercomb.errors import UsageError, usage_errors
from layercomb.interop.configs import Config
from layercomb.interop.families import Family, family_of
from layercomb.interop.huggingface.shards import tensors_in
from layercomb.interop.huggingface.vocabulary_files import tokenizer_in
from layercomb.interop.memory import check_fits
from layercomb.interop.stored import read_json
from layercomb.interop.tensors import Entry, fill, shapes_of
from layercomb.interop.tokenizer import PretrainedTokenizer
from layercomb.interop.weight_cache import Flat, described, look, weights_of
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.quantized.rounding import narrow
from layercomb.model import Model, embeddings
from layercomb.transforms.quantization.holding import hold_narrow
from layercomb.transforms.quantization.layer import bare, narrow_axes
from layercomb.transforms.tying import Tied
from layercomb.transforms.weight_axes import holder
from layercomb.trees import Tree

CONFIG = 'config.json'
POOLING = f'1_Pooling/{CONFIG}'  # of sentence-transformers
DTYPES = ('float32', 'bfloat16')
_MOST = 2**31 - 1  # of any size in a config.json
_DEEPEST = 10_000


def load(
    directory: str | Path, *, dtype: str = 'float32', cache: str | Path | None = None
) -> tuple[Model, PretrainedTokenizer | None]:
    """Reads a model and its tokenizer from a directory that transformers can read.

    That is ``config.json``, weights as ``model.safetensors`` or ``pytorch_model.bin``, in one file
    or several with an index, and a tokenizer: ``tokenizer.json``, or a sentencepiece model.
    ``generation_config.json`` and a chat template are read if they are there. Nothing in them is
    run, and files are mapped.

    Args:
      directory: the path.
      dtype: of the weights. 'float32' is for training and everything else. 'bfloat16' halves the
        large matrices, which are read without a float32 copy: `transforms.Quantized` layers hold
        them, for decoding and evaluation, and compute in float32.
      cache: a folder where bfloat16 weights are kept as they are laid out here, and mapped from the
        second load on, see `weight_cache.weights_of`; float32 ones are not. None writes nothing.

    Returns:
      (model, tokenizer); the tokenizer is None if the directory has none.

    Raises:
      UsageError: if a file is missing or damaged; for an unknown family, listing those known; for
        an entry of config.json that is not understood; if tensors are missing, left over or
        misshapen, naming them together; if the tokenizer has more ids than the model; if the
        weights do not fit into the free memory.

    References:
      Wolf et al., Transformers, 2020, https://arxiv.org/abs/1910.03771
    """
    if dtype not in DTYPES:
        raise UsageError(f'dtype={dtype!r}: give {" or ".join(DTYPES)}')
    path = _directory(directory)
    kept_in = cache if dtype == 'bfloat16' else None
    seen = look(kept_in, path)  # before anything is read: files may be replaced
    found = _found(path)
    net, shapes = found.net, found.shapes
    tensors = tensors_in(path)
    tokenizer = found.tokenizer(path)
    half = _halved(net, shapes) if dtype == 'bfloat16' else {}

    def make() -> Flat:
        check_fits(_peak(shapes, dtype), repr(paths.shown(path)))
        weights = fill(
            net,
            shapes,
            found.entries,
            tensors,
            ignored=found.family.ignored,
            dtype=lambda name: 'bfloat16' if name in half else 'float32',
        )
        flat = trees.flatten(weights)
        del weights  # each matrix goes as soon as it has been turned
        for name, (_, letters) in half.items():
            flat[name], _ = narrow(flat[name], letters, 16, 1)
        return flat

    if not half:
        return Model(net, trees.unflatten(make())), tokenizer
    options = {'reader': 'huggingface', 'dtype': dtype}
    weights = weights_of(cache, seen, options, [described(shapes), half], make)
    return Model(_holding(net, half), trees.unflatten(weights)), tokenizer


def describe(directory: str | Path) -> tuple[Layer, PretrainedTokenizer | None]:
    """What a directory says of a model besides its weights, which need not be there.

    Args:
      directory: as of `load`.

    Returns:
      (net, tokenizer): the model that `load` gives in float32, and its tokenizer if it has one.

    Raises:
      UsageError: as of `load`.
    """
    path = _directory(directory)
    found = _found(path)
    return found.net, found.tokenizer(path)


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """A model without its weights.

    Attributes:
      family: that it is of.
      net: the model.
      entries: which tensor is which weight.
      shapes: the weights as `jax.ShapeDtypeStruct`.
      config: the content of config.json.
    """

    family: Family
    net: Layer
    entries: list[Entry]
    shapes: Tree
    config: Mapping[str, Any]

    def tokenizer(self, path: Path) -> PretrainedTokenizer | None:
        """The tokenizer beside it in the directory; None if there is none."""
        made = tokenizer_in(path, self.config)
        check_vocabulary(self.net, made)
        return made


def _directory(directory: str | Path) -> Path:
    path = paths.local(directory, 'directory')
    if not path.is_dir():
        raise UsageError(f'{str(path)!r} is no directory: give that of a model, with {CONFIG}')
    return path


def _found(path: Path) -> _Found:
    """Reads all but the weights and the tokenizer."""
    config = read_json(path / CONFIG)
    family = family_of(config)
    _check_sizes(config)
    asked = Config({**config, **_pooling(path)})
    with usage_errors():
        net = family.net(asked)
        asked.check_read(family.name)
        entries = family.entries(asked)
        shapes = shapes_of(net, family.signature(net))
    return _Found(family, net, entries, shapes, config)


def check_vocabulary(net: Layer, tokenizer: PretrainedTokenizer | None) -> None:
    """Checks that a model knows all ids of a tokenizer; it may have more, as padding.

    Args:
      net: the model.
      tokenizer: its tokenizer; None for none.

    Raises:
      UsageError: if the tokenizer has more ids.
    """
    sizes = [embedding.vocab_size for _, embedding in embeddings(net)][:1]
    if tokenizer is not None and sizes and tokenizer.vocab_size > sizes[0]:
        raise UsageError(
            f'the tokenizer has {tokenizer.vocab_size:,} tokens and the model {sizes[0]:,}: take '
            'both from the same model'
        )


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Refuses sizes that no model has, before anything is made of them."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value)
        is_depth = 'layer' in name and not name.startswith('_')
        if isinstance(value, int) and abs(value) > (_DEEPEST if is_depth else _MOST):
            raise UsageError(
                f'{CONFIG}: {name!r:.60} is {value!r:.40}, which no model has: download it again'
            )


def _pooling(path: Path) -> dict[str, Any]:
    """What sentence-transformers' modules say: that a sentence is the mean of its tokens."""
    file = path / POOLING
    if not file.is_file() or not read_json(file).get('pooling_mode_mean_tokens'):
        return {}
    return {'_mean_pooling': True}


def _peak(shapes: Tree, dtype: str) -> int:
    """How many bytes loading takes at most: all weights, and the largest once more."""
    sizes = [math.prod(x.shape) for x in trees.flatten(shapes).values()]
    return (sum(sizes) + max(sizes, default=0)) * jnp.dtype(dtype).itemsize


def _halved(net: Layer, shapes: Tree) -> dict[str, tuple[str, str]]:
    """The matrices that become bfloat16: path -> that of the leaf, and axes as of `narrow`."""
    made = {}
    for path in trees.flatten(shapes):
        layer, rest, _ = holder(net, path)
        letters = narrow_axes(bare(layer)).get(rest)
        if letters is not None:
            made[path] = (path.removesuffix(rest).rstrip('/'), letters)
    return made


def _holding(net: Layer, half: Mapping[str, tuple[str, str]]) -> Layer:
    """The model with layers that hold bfloat16.

    Args:
      net: the model.
      half: as of `_halved`.
    """
    leaves = {leaf for leaf, _ in half.values()}
    for _, layer in walk(net):
        if isinstance(layer, Tied) and layer.source.rpartition('/')[0] in leaves:
            leaves.add(layer.target.rpartition('/')[0])
    return hold_narrow(net, dict.fromkeys(leaves, (16, 1)))
