"""Models in the formats of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layercomb.errors import UsageError
from layercomb.model import Model


def load(path: str | Path, **options: Any) -> tuple[Model, Any]:
    """Reads a model of another library: it is told by the form of its path.

    Args:
      path: a directory of Hugging Face, a ``.gguf`` file, or Trax's ``model.pkl.gz``.
      **options: of the reader: `huggingface.load`, `gguf.load` or `trax.load`.

    Returns:
      The model, and its tokenizer; None if it has none.

    Raises:
      UsageError: if it cannot be read, see the readers.
    """
    name = str(path)
    if name.endswith('.gguf'):
        from layercomb.interop import gguf

        return gguf.load(path, **options)
    if name.endswith('.pkl.gz'):
        from layercomb.interop import trax

        return trax.load(path, **options)
    from layercomb.interop import huggingface

    return huggingface.load(path, **options)


def save(
    path: str | Path, model: Model, tokenizer: Any = None, dtype: str | None = None
) -> dict[str, int]:
    """Writes a model for other programs: a ``.gguf`` file, or a directory of Hugging Face.

    Args:
      path: ends with ``.gguf``, or names a directory, new or empty.
      model: of one of the families.
      tokenizer: goes with it; None for none.
      dtype: of the weights; None keeps them as they are.

    Returns:
      The size in bytes of each file by its name.

    Raises:
      UsageError: if the model is of no family, or the files cannot be written.
    """
    if str(path).endswith('.gguf'):
        from layercomb.interop import gguf

        return gguf.save(path, model, tokenizer, dtype=dtype)
    if Path(path).suffix in ('.bin', '.safetensors', '.pkl', '.gz'):
        raise UsageError(
            f'{str(path)!r} is no form that is written: give a .gguf file, or a directory'
        )
    from layercomb.interop import huggingface

    return huggingface.save(path, model, tokenizer, dtype=dtype)
