"""Models in the formats of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError
from layercomb.model import Model
from layercomb.shapes import Signature

TRAX = 'model.pkl.gz'  # what the directory of a run of Trax holds


def load(path: str | Path, **options: Any) -> tuple[Model, Any]:
    """Reads a model of another library: it is told by the form of its path.

    Args:
      path: a directory of Hugging Face, a ``.gguf`` file, or Trax's ``model.pkl.gz`` or the
        directory that holds it.
      **options: of the reader: `huggingface.load`, `gguf.load` or `trax.load`. The first two take
        `cache`, a folder for weights that later loads map.

    Returns:
      The model, and its tokenizer; None if it has none.

    Raises:
      UsageError: if it cannot be read, see the readers.
    """
    file = paths.local(path, 'path')
    is_directory = file.is_dir()
    if file.name.endswith('.gguf') and not is_directory:
        from layercomb.interop import gguf

        return gguf.load(file, **options)
    if (file / TRAX).is_file() if is_directory else file.name.endswith('.pkl.gz'):
        from layercomb.interop import trax

        return trax.load(file, **options)
    from layercomb.interop import huggingface

    return huggingface.load(path, **options)


def save(
    path: str | Path, model: Model, tokenizer: Any = None, dtype: str | None = None
) -> dict[str, int]:
    """Writes a model for other programs: a ``.gguf`` file, or a directory of Hugging Face.

    Args:
      path: ends with ``.gguf``, or names a directory, new or empty.
      model: of one of the families; its adapters are merged. `peft.save` writes them alone.
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


def signature(model: Model) -> Signature:
    """The signature of a model's inputs, as its family has them, e.g. token ids and a mask.

    Args:
      model: as `load` gives it.

    Raises:
      UsageError: if the model is of no family.
    """
    from layercomb.interop.families import config_of
    from layercomb.transforms.low_rank.adapting import without_lora
    from layercomb.transforms.quantization.holding import hold_wide

    net = hold_wide(without_lora(model.layer))
    return config_of(net)[0].signature(net)
