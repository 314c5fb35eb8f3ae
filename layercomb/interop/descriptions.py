"""What a model of another library is besides its weights: its layers and its tokenizer.

`keep` writes that into a directory, from which `read` makes the same model when the original is
gone. Files of Hugging Face are copied as they are; a .gguf file is written as theirs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError, machine_errors
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.transforms.quantization.holding import hold_wide


def keep(source: Path, directory: Path, model: Model, tokenizer: Any) -> None:
    """Writes the description of a model, whole or not at all; an earlier one is replaced.

    Args:
      source: the path that the model was loaded from, absolute.
      directory: where to write it, absolute.
      model: as it was loaded, before anything was rewritten.
      tokenizer: its tokenizer; None for none.

    Raises:
      UsageError: if the model is of no family, or the files cannot be written.
    """
    from layercomb.interop import huggingface

    with machine_errors('free some space, or write elsewhere'):
        if directory.exists():
            shutil.rmtree(directory)
        with paths.whole(directory) as made:
            made.mkdir()
            if source.is_dir():
                _copy(source, made)
            else:
                huggingface.save_description(made, hold_wide(model.layer), tokenizer)


def read(directory: Path) -> tuple[Layer, Any]:
    """The model that a description is of, without weights, and its tokenizer; see `keep`.

    Args:
      directory: that `keep` wrote, or one of Hugging Face.

    Raises:
      UsageError: if a file is missing or damaged.
    """
    from layercomb.interop import huggingface

    return huggingface.describe(directory)


def of(source: Path) -> tuple[Layer, Any]:
    """The layers of a model, in float32, and its tokenizer. No weights are read.

    Args:
      source: a directory of Hugging Face, or a .gguf file.

    Returns:
      (net, tokenizer); the tokenizer is None if it has none.

    Raises:
      UsageError: if it cannot be read.
    """
    from layercomb.interop import gguf, huggingface

    return huggingface.describe(source) if source.is_dir() else gguf.describe(source)


def net_of(source: Path) -> Layer:
    """The layers of a model, in float32. No weights are read.

    Args:
      source: a directory of Hugging Face, or a .gguf file.

    Raises:
      UsageError: if it cannot be read.
    """
    from layercomb.interop import gguf, huggingface

    return huggingface.describe(source)[0] if source.is_dir() else gguf.net(source)


def tokenizer_of(source: Path) -> Any:
    """The tokenizer of a model; None if it has none. No weights are read.

    Args:
      source: a directory of Hugging Face, or a .gguf file.

    Raises:
      UsageError: if it cannot be read.
    """
    from layercomb.interop import gguf, huggingface

    return huggingface.describe(source)[1] if source.is_dir() else gguf.tokenizer(source)


def _copy(source: Path, directory: Path) -> None:
    """Copies what a directory of Hugging Face holds besides weights."""
    from layercomb.interop.huggingface.loading import CONFIG, POOLING
    from layercomb.interop.huggingface.vocabulary_files import FILES

    if not (source / CONFIG).is_file():
        raise UsageError(f'{str(source)!r} has no {CONFIG} any more: check the path')
    for name in (CONFIG, POOLING, *FILES):
        if (source / name).is_file():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, directory / name)
