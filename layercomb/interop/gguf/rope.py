"""Scalings of rotary positions: in the metadata of a .gguf file, or as a tensor of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from layercomb.errors import UsageError
from layercomb.interop.gguf.file import File, Stored
from layercomb.interop.gguf.keys import Keys

FACTORS = 'rope_freqs.weight'
# Llama 3.1 and 3.2 as published; the file holds only the factors that follow from these.
_LLAMA3 = {
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
}


def scaling(keys: Keys, file: File, d_head: int) -> dict[str, Any]:
    """The entry rope_scaling of a config.json, or nothing if rotations are not scaled.

    Args:
      keys: the metadata.
      file: that they are in.
      d_head: the depth of a head.

    Raises:
      UsageError: for a scaling that is not understood.
    """
    kind = keys.get('rope.scaling.type', 'none')
    factor = keys.number('rope.scaling.factor', keys.get('rope.scale_linear', 1.0)) or 1.0
    keys.get('rope.scaling.finetuned')  # says only how the model was made
    long = [name for name in file.tensors if name.startswith('rope_factors_')]
    if long:
        raise UsageError(
            f'{str(file.path)!r} scales its rotations by {", ".join(long)}, which is not '
            'understood: this file cannot be loaded'
        )
    factors = file.tensors.get(FACTORS)
    if factors is not None:
        if kind != 'none' or factor != 1.0:
            raise UsageError(f'{str(file.path)!r} scales its rotations twice: download it again')
        return {'rope_scaling': _llama3_scaling(keys, factors, d_head)}
    if kind == 'yarn':
        return {'rope_scaling': _yarn_scaling(keys, factor)}
    if kind not in ('none', 'linear'):
        raise UsageError(
            f'{str(file.path)!r} scales its rotations by {kind!r:.60}, and known are linear, yarn '
            'and the factors of Llama 3: this file cannot be loaded'
        )
    keys.get('rope.scaling.original_context_length')  # means nothing to these kinds
    return {} if factor == 1.0 else {'rope_scaling': {'rope_type': 'linear', 'factor': factor}}


def _yarn_scaling(keys: Keys, factor: float) -> dict[str, Any]:
    made = {
        'rope_type': 'yarn',
        'factor': factor,
        'original_max_position_embeddings': keys.count('rope.scaling.original_context_length'),
    }
    # What transformers and llama.cpp both do where the file says nothing.
    keys.must_be('rope.scaling.attn_factor', 1.0)
    keys.must_be('rope.scaling.yarn_attn_factor', 1.0)
    keys.must_be('rope.scaling.yarn_ext_factor', 1.0)
    for name, ours in (('yarn_beta_fast', 'beta_fast'), ('yarn_beta_slow', 'beta_slow')):
        if (value := keys.get(f'rope.scaling.{name}')) is not None:
            made[ours] = value
    return made


def _llama3_scaling(keys: Keys, factors: Stored, d_head: int) -> dict[str, Any]:
    """The scaling of Llama 3 whose factors are those of the tensor."""
    values = factors.blocks.numbers(factors.data).reshape(-1)
    made = {'rope_type': 'llama3', 'factor': float(values.max()), **_LLAMA3}
    expected = llama3_factors(made, keys.number('rope.freq_base', 10000.0), d_head)
    if values.shape != expected.shape or not np.allclose(values, expected, rtol=1e-3):
        raise UsageError(
            f'{FACTORS} does not hold the factors of Llama 3.1 or 3.2, the only ones that '
            'are understood: this file cannot be loaded'
        )
    return made


def llama3_factors(scaling: Mapping[str, Any], base: float, d_head: int) -> np.ndarray:
    """By how much each frequency is divided in Llama 3, (d_head / 2,) float32.

    Args:
      scaling: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
      base: of the frequencies.
      d_head: the depth of a head.
    """
    wave = 2 * math.pi * base ** (np.arange(0, d_head, 2) / d_head)
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    length, factor = scaling['original_max_position_embeddings'], scaling['factor']
    smooth = (length / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    scaled = np.where(wave > length / low, factor, np.where(wave < length / high, 1.0, between))
    return scaled.astype(np.float32)


def metadata_of(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The inverse of `scaling`: its metadata; Llama 3 has a tensor instead.

    Args:
      scaling: the entry rope_scaling; None for none.

    Raises:
      UsageError: for a kind that has no place in a file.
    """
    kind = scaling['rope_type'] if scaling else 'llama3'
    if scaling is None or kind == 'llama3':
        return {}
    if kind not in ('linear', 'yarn'):
        raise UsageError(
            f'rotations scaled by {kind!r} have no place in a .gguf file: save the model as a '
            'directory of Hugging Face'
        )
    made: dict[str, Any] = {'type': kind, 'factor': float(scaling['factor'])}
    if kind == 'yarn':
        made['original_context_length'] = scaling['original_max_position_embeddings']
        names = {'beta_fast': 'yarn_beta_fast', 'beta_slow': 'yarn_beta_slow'}
        made |= {names[k]: float(v) for k, v in scaling.items() if k in names}
    return {f'rope.scaling.{name}': value for name, value in made.items()}
