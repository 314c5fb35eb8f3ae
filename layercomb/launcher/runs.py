"""A run's directory: its configuration, whether it may be resumed, and its trained model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from layercomb import paths
from layercomb.errors import UsageError, machine_errors, usage_errors
from layercomb.layers.core.layer import Layer
from layercomb.model import Model

CONFIG = 'config.gin'
OPERATIVE = 'operative_config.gin'
# What may change when a run is resumed: its length, what is reported of it, and the pieces in which
# it is computed.
_MAY_CHANGE = re.compile(
    r'cli\.train\.(steps|keep|keep_best|callbacks|\w+_every|eval_tasks|tokenizer|sample_\w+|baseline_text|mesh|offload|offload_dtype)$'
    r'|.*make_mesh\.|.*EvalTask\.|.*TrainTask\.(accumulate|accumulate_dtype|loss_chunk_len)$|.*\.ff_chunk_len$'
)


def is_run(directory: str | Path) -> bool:
    """Whether a directory holds a run.

    Args:
      directory: any path.

    Raises:
      UsageError: if the path cannot be read.
    """
    folder = paths.local(directory, 'run_dir')
    with machine_errors('check the path'):
        return (folder / CONFIG).is_file()


def directory_of(output_dir: str | None, config: Path) -> Path:
    """Where a configuration is trained.

    Args:
      output_dir: what the user says; None for ``runs/NAME``, or if the configuration is that of a
        run, for that run.
      config: the path of the configuration.
    """
    if output_dir is None and config.name == CONFIG and (config.parent / OPERATIVE).is_file():
        return config.parent
    return paths.local(
        Path('runs') / config.stem if output_dir is None else output_dir, '--output_dir'
    )


def config_of(run_dir: str | Path) -> str:
    """The configuration of a run, as text.

    Args:
      run_dir: the output directory of a run.

    Raises:
      UsageError: if there is no run, or it cannot be read.
    """
    return read_text(config_file(run_dir))


def config_file(run_dir: str | Path) -> Path:
    """The path of a run's configuration.

    Args:
      run_dir: the output directory of a run.

    Raises:
      UsageError: if there is no run.
    """
    if not is_run(run_dir):
        raise UsageError(
            f'{str(run_dir)!r} holds no run ({CONFIG} is missing): give the output_dir of one'
        )
    return paths.local(run_dir, 'run_dir') / CONFIG


def read_text(path: Path) -> str:
    """Reads a file of text in UTF-8, without byte order mark, with every line end as a newline.

    Args:
      path: of the file.

    Raises:
      UsageError: if it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding='utf-8-sig')
    except OSError as e:
        raise UsageError(f'cannot read {str(path)!r} ({e}): check the path') from None
    except UnicodeDecodeError as e:
        raise UsageError(f'cannot read {str(path)!r}: {not_utf8(e)}: save it as UTF-8') from None


def write_text(path: Path, text: str) -> None:
    """Writes a file of text in UTF-8, whole or not at all.

    Args:
      path: of the file, which is replaced.
      text: its new content.

    Raises:
      OSError: if it cannot be written.
    """
    unfinished = path.with_name(f'.{path.name}')
    try:
        unfinished.write_text(text, encoding='utf-8')
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def not_utf8(error: UnicodeDecodeError) -> str:
    """The first byte that is not UTF-8, in words: 'byte 0xff at 0 is no UTF-8'."""
    return f'byte 0x{error.object[error.start]:02x} at {error.start} is no UTF-8'


def saved_model(
    run_dir: str | Path, net: Layer, signature: Any, checkpoint: str = 'last'
) -> tuple[Model, int]:
    """The model from one of a run's checkpoints. Nothing is written.

    Args:
      run_dir: the output directory of a run, which may still be training.
      net: the run's model, without weights.
      signature: of the model's inputs.
      checkpoint: 'last', 'best' or the number of a step.

    Returns:
      (model, step).

    Raises:
      UsageError: if there is no such checkpoint, it cannot be read, or it is of another model.
    """
    from layercomb.supervised.checkpoints import saved_weights

    with usage_errors():
        key = jax.eval_shape(jax.random.key, 0)
        weights, state = jax.eval_shape(lambda rng: net.init(signature, rng), key)
    with machine_errors(f'check that {str(run_dir)!r} can be read'):
        weights, state, step = saved_weights(run_dir, weights, state, checkpoint)
    return Model(net, weights, state), step


_CURE = 'choose another --output_dir, delete it, or allow the change by --allow_changes'


def check_directory(
    directory: Path, text: str, allow_changes: bool = False, cure: str = _CURE
) -> None:
    """Raises a UsageError unless the directory is new, empty, or holds this very run.

    Args:
      directory: the run's directory.
      text: the run's configuration.
      allow_changes: True skips the comparison with the configuration there; the `Loop` then
        compares the parts.
      cure: what to do about another configuration.
    """
    with machine_errors('choose another --output_dir'):
        if (directory / CONFIG).exists():
            if not allow_changes:
                _same_experiment(directory, text, cure)
        elif directory.exists() and not _is_empty(directory):
            raise UsageError(
                f'{str(directory)!r} is not empty and holds no run: choose another --output_dir'
            )
        paths.check_can_hold(directory)


def _same_experiment(directory: Path, text: str, cure: str) -> None:
    old, new = _bindings(read_text(directory / CONFIG)), _bindings(text)
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    if changed:
        raise UsageError(
            f'{str(directory)!r} holds another experiment ({changed[0]} is '
            f'{old.get(changed[0], "not bound")} there, {new.get(changed[0], "not bound")} '
            f'here): {cure}'
        )


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _bindings(text: str) -> dict[str, str]:
    """The bindings of a configuration, without those that may change when a run is resumed."""
    joined = re.sub(r'\\\n\s*', '', text)
    found = re.findall(r'^([\w./]+) = (.*(?:\n[ \t].*)*)', joined, re.MULTILINE)
    lines = {name: re.sub(r'\s*\n\s*', ' ', value) for name, value in found}
    return {name: value for name, value in lines.items() if not _MAY_CHANGE.match(name)}
