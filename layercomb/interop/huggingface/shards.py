"""The tensors of a directory: in one file, or in several with an index."""

from __future__ import annotations

from pathlib import Path

from layercomb.errors import UsageError
from layercomb.interop import pickles, safetensors
from layercomb.interop.stored import Stored, read_json

SAFE, TORCH = 'model.safetensors', 'pytorch_model.bin'
INDEX = '.index.json'


def tensors_in(directory: Path) -> dict[str, Stored]:
    """The tensors of a model by name, mapped: safetensors if there are any, else torch's files.

    Args:
      directory: absolute.

    Raises:
      UsageError: if there are none, a file is damaged, or the index does not fit the files.
    """
    for name in (SAFE, TORCH):
        if (directory / name).is_file():
            return _read(directory / name)
        if (directory / f'{name}{INDEX}').is_file():
            return _indexed(directory, f'{name}{INDEX}')
    raise UsageError(
        f'{str(directory)!r} holds no weights, {SAFE} or {TORCH}: download the whole model'
    )


def _read(path: Path) -> dict[str, Stored]:
    return (safetensors if path.name.endswith('.safetensors') else pickles).read_tensors(path)


def _indexed(directory: Path, index: str) -> dict[str, Stored]:
    where = read_json(directory / index).get('weight_map')
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UsageError(f'{index} has no weight_map from names to files: download it again')
    suffixes = ('.safetensors', '.bin')
    made: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file or not file.endswith(suffixes):
            raise UsageError(f'{index} names {file!r:.80}, which is no file of tensors beside it')
        for name, tensor in _read(directory / file).items():
            if where.get(name) != file:
                raise UsageError(
                    f'{index} does not say that {name!r:.80} is in {file:.80}: download all files '
                    'of the model again'
                )
            made[name] = tensor
    lost = [name for name in where if name not in made]
    if lost:
        raise UsageError(
            f'{index} says that {lost[0]!r:.80} is in {where[lost[0]]:.80}, which lacks it: '
            'download all files of the model again'
        )
    return made
