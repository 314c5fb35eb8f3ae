"""`save`: a model and its tokenizer as a .gguf file."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layercomb import paths
from layercomb.errors import UsageError, machine_errors, require
from layercomb.interop.configs import Config
from layercomb.interop.families import config_of, family_of
from layercomb.interop.gguf import vocabulary_out
from layercomb.interop.gguf.architectures import (
    Architecture,
    config_of_file,
    head_depth,
    metadata_of,
)
from layercomb.interop.gguf.blocks import Blocks, plain, rounded
from layercomb.interop.gguf.file import File, Stored
from layercomb.interop.gguf.rope import FACTORS, llama3_factors
from layercomb.interop.gguf.weights import stored
from layercomb.interop.merged import merged
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.transforms.quantization.holding import hold_wide

# Types of matrices by the name that `dtype` gives them, and the number of general.file_type.
_TYPES = {
    'float32': ('F32', 0),
    'float16': ('F16', 1),
    'bfloat16': ('BF16', 32),
    'q8_0': ('Q8_0', 7),
    'q4_0': ('Q4_0', 2),
}


@dataclasses.dataclass(frozen=True, eq=False)
class _Out:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    blocks: Blocks
    rows: np.ndarray


def save(
    path: str | Path, model: Model, tokenizer: Any = None, *, dtype: str | None = None
) -> dict[str, int]:
    """Writes a model and its tokenizer as a .gguf file, which llama.cpp and `load` read.

    Args:
      path: of the file; an existing one is replaced, once the new one is complete.
      model: of the families Llama, Mistral, Qwen or Gemma 3. Narrow weights are written as they
        are: bfloat16 as BF16, int8 and int4 as Q8_0 and Q4_0, if each scale is for a multiple of 32
        weights; scales are rounded to the float16 of the format. Adapters are merged.
      tokenizer: a `PretrainedTokenizer` with byte-level or sentencepiece-like merges; None writes
        none.
      dtype: of the matrices: 'float32', 'float16', 'bfloat16', 'q8_0' or 'q4_0'. None keeps them as
        they are. With 'q4_0' the embedding and the head are Q8_0. Norms and biases are always
        float32.

    Returns:
      The size of the file in bytes, by its name.

    Raises:
      UsageError: if the model or tokenizer has no place in a .gguf file, or it cannot be written.
    """
    if dtype is not None and dtype not in _TYPES:
        raise UsageError(f'dtype={dtype!r}: give one of {", ".join(_TYPES)}')
    if model.weights is None:
        raise UsageError('this model has no weights to save: load it, or train it first')
    model = merged(model)
    assert model.weights is not None
    wide = hold_wide(model.layer)
    family, config = config_of(wide)
    architecture, metadata = metadata_of(config)
    if tokenizer is not None:
        found = vocabulary_out.vocabulary_of(tokenizer, config['vocab_size'])
        metadata |= vocabulary_out.metadata_of(found)
    entries = [architecture.renamed(entry) for entry in family.entries(Config(config))]
    tensors = (
        _Out(name, *_in_their_order(architecture, config, name, shape, blocks, rows))
        for name, shape, blocks, rows in stored(
            model.layer, model.weights, entries, as_they_are=dtype is None
        )
    )
    made = [each if dtype is None else _in_dtype(each, dtype) for each in tensors]
    made += _rope_factors(config)
    _check_alike(wide, architecture, metadata, made)
    return _write(paths.local(path, 'path'), architecture.name, metadata, made)


def _check_alike(
    wide: Layer, architecture: Architecture, metadata: Mapping[str, Any], made: list[_Out]
) -> None:
    """Raises a UsageError if the file, read again, would make another model."""
    tensors = {each.name: Stored(each.name, each.shape, each.blocks, each.rows) for each in made}
    try:
        config = config_of_file(File(Path('the file'), dict(metadata), tensors), architecture)
        same = family_of(config).net(Config(config)) == wide
    except UsageError:
        same = False
    if not same:
        raise UsageError(
            f'a .gguf file of architecture {architecture.name} cannot say all that this model is: '
            'save it as a directory of Hugging Face'
        )


def _in_their_order(
    architecture: Architecture,
    config: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    blocks: Blocks,
    rows: np.ndarray,
) -> tuple[tuple[int, ...], Blocks, np.ndarray]:
    """Shape, type and rows, with rows permuted and norms shifted as the architecture has them."""
    tensor = architecture.order(name, shape[0], config)
    if tensor is not None:
        back = np.argsort(tensor)
        if len(shape) == 1:
            _, rows = plain(blocks.numbers(rows)[:, back])
        else:
            rows = rows[back]
    if architecture.norm_shift and name.endswith('norm.weight'):
        _, rows = plain(blocks.numbers(rows) + np.float32(architecture.norm_shift))
    return shape, blocks, rows


def _in_dtype(tensor: _Out, dtype: str) -> _Out:
    """A tensor with its matrix in `dtype`."""
    if dtype == 'q4_0' and tensor.name in ('token_embd.weight', 'output.weight'):
        dtype = 'q8_0'
    if len(tensor.shape) == 1 or tensor.blocks.name == _TYPES[dtype][0]:
        return tensor
    values = tensor.blocks.numbers(tensor.rows)
    blocks, rows = plain(values) if dtype == 'float32' else rounded(values, dtype)
    return dataclasses.replace(tensor, blocks=blocks, rows=rows)


def _file_type(tensors: list[_Out]) -> int:
    """What general.file_type says: the type of most matrices."""
    kinds = collections.Counter(each.blocks.name for each in tensors if len(each.shape) > 1)
    ((most, _),) = kinds.most_common(1)
    return dict([*_TYPES.values(), ('Q4_1', 3)])[most]


def _rope_factors(config: Mapping[str, Any]) -> list[_Out]:
    """The tensor of the factors of rotations that Llama 3 has."""
    scaling = config.get('rope_scaling')
    if not scaling or scaling['rope_type'] != 'llama3':
        return []
    factors = llama3_factors(scaling, config['rope_theta'], head_depth(config))
    return [_Out(FACTORS, factors.shape, *plain(factors[None]))]


def _write(
    file: Path, architecture: str, metadata: dict[str, Any], tensors: list[_Out]
) -> dict[str, int]:
    gguf = require('gguf', 'pretrained')
    if file.is_dir():
        raise UsageError(f'{str(file)!r} is a directory: choose another name for the file')
    partial = file.with_name(f'.{file.name}.{os.getpid()}')
    with machine_errors('free some space, or write elsewhere'):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            writer = gguf.GGUFWriter(partial, architecture)
            for name, value in metadata.items():
                add_entry(writer, gguf, name, value)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            writer.add_file_type(_file_type(tensors))
            for each in tensors:
                kind = gguf.GGMLQuantizationType(each.blocks.kind)
                as_bytes = (*each.shape[:-1], each.rows.shape[-1])
                writer.add_tensor_info(
                    each.name, as_bytes, np.dtype(np.uint8), each.rows.nbytes, raw_dtype=kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for each in tensors:
                writer.write_tensor_data(each.rows)
            writer.close()
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
    return {file.name: file.stat().st_size}


def add_entry(writer: Any, gguf: Any, name: str, value: Any) -> None:
    """Adds an entry of metadata: integers as uint32, numbers as float32."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_key_value(name, value, kinds.BOOL)
    elif isinstance(value, int):
        writer.add_key_value(name, value, kinds.UINT32)
    elif isinstance(value, float):
        writer.add_key_value(name, value, kinds.FLOAT32)
    elif isinstance(value, str):
        writer.add_key_value(name, value, kinds.STRING)
    else:
        of = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
        writer.add_key_value(name, list(value), kinds.ARRAY, of)
