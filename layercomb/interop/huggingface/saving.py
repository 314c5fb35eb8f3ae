"""`save`: a model and its tokenizer as a directory that transformers reads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths, trees
from layercomb.data.adapted import Adapted
from layercomb.data.tokenizers import ByteTokenizer
from layercomb.errors import UsageError, machine_errors, require
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of
from layercomb.interop.huggingface.loading import CONFIG, check_vocabulary
from layercomb.interop.huggingface.shards import INDEX, SAFE
from layercomb.interop.huggingface.vocabulary_files import (
    GENERATION,
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
)
from layercomb.interop.merged import merged
from layercomb.interop.safetensors import write_tensors
from layercomb.interop.tensors import shapes_of, spill
from layercomb.interop.tokenizer import PretrainedTokenizer
from layercomb.interop.vocabularies import Subwords, byte_letters
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.quantized.matrix import SCALES
from layercomb.model import Model
from layercomb.transforms.quantization.holding import hold_wide
from layercomb.transforms.quantization.layer import Quantized, bare, narrow_axes
from layercomb.trees import Tree

DTYPES = (None, 'float32', 'bfloat16', 'float16')


def save(
    directory: str | Path,
    model: Model,
    tokenizer: Any = None,
    *,
    dtype: str | None = None,
    shard_bytes: int = 2 * 10**9,
) -> dict[str, int]:
    """Writes a model and its tokenizer as a directory that transformers reads, whole or not at all.

    It holds ``config.json``, ``model.safetensors`` (or several, with an index) and, with a
    tokenizer, ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json`` and the
    chat template.

    Args:
      directory: the path; it must be empty, or not exist yet.
      model: of one of the families, as `load` or a function such as `models.Llama` makes it.
        Narrow weights are written as the numbers that they stand for, and adapters are merged.
      tokenizer: a `PretrainedTokenizer` with a tokenizer.json, or a `data.ByteTokenizer`; None for
        none.
      dtype: of the weights: 'float32', 'bfloat16' or 'float16'; None keeps each as it is, and
        writes int8 and int4 as float32.
      shard_bytes: about how large a file of weights may be.

    Returns:
      The size in bytes of each file by its name.

    Raises:
      UsageError: if the model is of no family, or has no weights; for a tokenizer of another kind,
        or with more ids than the model; if something is there already, or it cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f'dtype={dtype!r}: give float32, bfloat16 or float16, or leave it out')
    if model.weights is None:
        raise UsageError('this model has no weights to save: call model.init(x) first')
    out = paths.local(directory, 'directory')
    model = merged(model)
    assert model.weights is not None
    net = hold_wide(model.layer)
    family, config = config_of(net)
    weights = widened(model.layer, net, model.weights, family.signature(net))
    entries = family.entries(Config(config))
    given = _pretrained(tokenizer)
    check_vocabulary(net, given)
    with machine_errors('choose another directory, or free some space'):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f'{str(out)!r} is there already: choose another directory')
        with paths.whole(out) as made:
            made.mkdir()
            tensors = ((name, _as(x, dtype)) for name, x in spill(net, weights, entries))
            _write_weights(made, tensors, shard_bytes)
            wide = {str(jnp.dtype(x.dtype)) for x in jax.tree.leaves(weights)}
            kinds = {dtype} if dtype else wide
            config['dtype'] = kinds.pop() if len(kinds) == 1 else 'float32'
            _write_description(made, config, given)
            sizes = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
    return sizes


def save_description(directory: Path, net: Layer, tokenizer: Any = None) -> None:
    """Writes what `save` writes besides weights.

    Args:
      directory: absolute; it exists.
      net: of one of the families, without narrow weights.
      tokenizer: as of `save`.

    Raises:
      UsageError: as of `save`.
    """
    _, config = config_of(net)
    _write_description(directory, config, _pretrained(tokenizer))


def widened(net: Layer, wide: Layer, weights: Tree, signature: Any) -> Tree:
    """The weights of a model with narrow layers as those of the wide model.

    Each becomes wide when NumPy asks for it, and is not kept: few are wide at a time.

    Args:
      net: the model, whose `Quantized` layers hold the narrow weights.
      wide: the same without them.
      weights: of `net`.
      signature: of the inputs.

    Returns:
      Weights of `wide`, those that were narrow as `Widened`; bfloat16 stays bfloat16, and integers
      become float32.
    """
    flat = dict(trees.flatten(weights))
    shapes = trees.flatten(shapes_of(wide, signature))
    for leaf, layer in walk(net):
        if not isinstance(layer, Quantized):
            continue
        for name, letters in narrow_axes(bare(layer.layer)).items():
            path = joined(leaf, name)
            if path not in flat or flat[path].dtype == jnp.float32:
                continue
            values, scales = flat[path], flat.pop(path + SCALES, None)
            flat[path] = Widened(shapes[path].shape, values, scales, letters, layer)
    return trees.unflatten(flat)


@dataclasses.dataclass(frozen=True, eq=False)
class Widened:
    """A narrow weight that looks like a wide one: ``np.asarray`` makes it.

    Attributes:
      shape: of the wide weight.
      values, scales: as of `Narrow`, possibly stacked on leading axes.
      letters: its axes.
      kept: the layer that holds it.
    """

    shape: tuple[int, ...]
    values: jax.Array
    scales: jax.Array | None
    letters: str
    kept: Quantized

    @property
    def dtype(self) -> np.dtype[Any]:
        """bfloat16 for 16 bits, else float32."""
        return jnp.dtype('bfloat16' if self.kept.bits == 16 else 'float32')

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy  # it is made anew
        turn: Any = self._wide
        for _ in range(self.values.ndim - 1 - self.letters.count('o')):  # axes that are stacked
            turn = jax.vmap(turn)
        made = np.asarray(turn(self.values, self.scales)).reshape(self.shape)
        return made if dtype is None else made.astype(dtype)

    def _wide(self, values: jax.Array, scales: jax.Array | None) -> jax.Array:
        return self.kept.matrix(values, scales, self.letters).wide().astype(self.dtype)


def _as(x: np.ndarray, dtype: str | None) -> np.ndarray:
    """A tensor in its dtype, in the order in which it is written."""
    return np.ascontiguousarray(x if dtype is None else x.astype(jnp.dtype(dtype))).reshape(x.shape)


def _write_weights(out: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """One file of weights, or several and an index of them."""
    where: dict[str, str] = {}
    shards: list[Path] = []
    total = 0
    for shard in _groups(tensors, shard_bytes):
        shards.append(out / f'shard{len(shards)}')
        write_tensors(shards[-1], shard, {'format': 'pt'})
        where |= dict.fromkeys(shard, str(len(shards) - 1))
        total += sum(x.nbytes for x in shard.values())
    if len(shards) == 1:
        shards[0].rename(out / SAFE)
        return
    names = [f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
    for path, name in zip(shards, names, strict=True):
        path.rename(out / name)
    found = {name: names[int(i)] for name, i in sorted(where.items())}
    index = {'metadata': {'total_size': total}, 'weight_map': found}
    _write_json(out / f'{SAFE}{INDEX}', index)


def _groups(
    tensors: Iterable[tuple[str, np.ndarray]], most: int
) -> Iterator[dict[str, np.ndarray]]:
    """Tensors in groups of at most so many bytes; a larger one is a group of its own."""
    group: dict[str, np.ndarray] = {}
    for name, x in tensors:
        if group and sum(y.nbytes for y in group.values()) + x.nbytes > most:
            yield group
            group = {}
        group[name] = x
    yield group


def _pretrained(tokenizer: Any) -> PretrainedTokenizer | None:
    """A tokenizer that can be written.

    Raises:
      UsageError: if it is of another kind.
    """
    if isinstance(tokenizer, Adapted):
        tokenizer = tokenizer.tokenizer
    if type(tokenizer) is ByteTokenizer:
        return PretrainedTokenizer(_bytes(), tokenizer.eos_id)
    known = isinstance(tokenizer, PretrainedTokenizer)
    if tokenizer is None or (known and isinstance(tokenizer.vocabulary, Subwords)):
        return tokenizer
    kind = type(tokenizer.vocabulary if known else tokenizer).__name__
    raise UsageError(
        f'a tokenizer of {kind} cannot be written as tokenizer.json: save the model without it, '
        'and copy its files'
    )


def _bytes() -> Any:
    """A `tokenizers.Tokenizer` whose tokens are the bytes."""
    library = require('tokenizers', 'pretrained')
    made = library.Tokenizer(library.models.BPE(byte_letters(), []))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = library.decoders.ByteLevel()
    return made


def _write_description(
    out: Path, config: dict[str, Any], tokenizer: PretrainedTokenizer | None
) -> None:
    """The configuration, with what the tokenizer knows of it, and the tokenizer's files."""
    if tokenizer is not None:
        config |= {'bos_token_id': tokenizer.bos_id, 'eos_token_id': tokenizer.eos_id}
        if tokenizer.start_id is not None:
            config['decoder_start_token_id'] = tokenizer.start_id
        _write_tokenizer(out, tokenizer)
    _write_json(out / CONFIG, config)


def _write_tokenizer(out: Path, tokenizer: PretrainedTokenizer) -> None:
    (out / TOKENIZER).write_text(tokenizer.vocabulary.source, encoding='utf-8')
    settings: dict[str, Any] = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'clean_up_tokenization_spaces': False,
        **tokenizer.tokens,
    }
    if tokenizer.chat is not None:
        settings['chat_template'] = tokenizer.chat.source
        (out / TEMPLATE).write_text(tokenizer.chat.source, encoding='utf-8')
    _write_json(out / SETTINGS, settings)
    advice = dict(tokenizer.generation)
    if advice.keys() - {'repetition_penalty'}:
        advice['do_sample'] = True
    ends = list(tokenizer.stop_ids)
    advice['eos_token_id'] = ends if len(ends) > 1 else ends[0]
    if tokenizer.bos_id is not None:
        advice['bos_token_id'] = tokenizer.bos_id
    if tokenizer.start_id is not None:
        advice['decoder_start_token_id'] = tokenizer.start_id
    _write_json(out / GENERATION, advice)


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=float)
    path.write_text(text + '\n', encoding='utf-8')
