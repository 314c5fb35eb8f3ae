"""Checkpoints: whole or absent, checked when read, and nothing older than the last few.

A step's directory holds named trees of arrays (`weights`, `state`, `opt_state`) and a record in
JSON: where the data stood, the random key, and the type and shape of each array. Orbax writes it in
the background under a temporary name and renames it when all is on the disk, so a process killed at
any moment leaves the previous step restorable. Orbax's format does not notice a flipped bit in an
array, so each file's checksum is written beside it, in the background too, and compared before
anything is read.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.errors import UsageError, require

ocp = require('orbax.checkpoint', 'train')

Tree = Any  # nested containers of arrays, or of jax.ShapeDtypeStruct
Kinds = dict[str, str]  # path -> 'float32[4,5]'

_RECORD = 'record'
_CHECKSUMS = 'crc32.json'


class _CheckedHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of trees, which also leaves a checksum of each file."""

    def finalize(self, directory: Any) -> None:
        """Called in the background, when all files are there and before the step is renamed."""
        super().finalize(directory)
        path = Path(directory)
        (path / _CHECKSUMS).write_text(json.dumps(_file_checksums(path)))


@ocp.args.register_with_handler(_CheckedHandler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_CheckedHandler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.StandardRestore):
    pass


class Checkpoints:
    """The last `keep` checkpoints of a run, in one directory.

    Args:
      directory: where the steps' directories stand; made at the first save.
      keep: how many steps to keep; older ones are deleted.
    """

    def __init__(self, directory: str | Path, keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        _usable(self.directory)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest(self) -> int | None:
        """The last complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, trees: Mapping[str, Tree], record: Mapping[str, Any]) -> None:
        """Starts to save a step; returns when the arrays may be donated again.

        Args:
          step: the number of the step, greater than any saved before.
          trees: named trees of arrays.
          record: what else to keep, as JSON can hold it.
        """
        self._manager.save(step, args=_save_args(trees, record))

    def restore(self, step: int, abstract: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict]:
        """Reads a step back.

        Args:
          step: a complete step.
          abstract: named trees of `jax.ShapeDtypeStruct` (or of arrays), as they were saved; an
            array goes where the struct's sharding says, by default on the first device.

        Returns:
          (trees, record), as they were saved.

        Raises:
          UsageError: if the step is damaged, or of another model or optimizer.
        """
        return _restore(self.directory, step, abstract)

    def wait(self) -> None:
        """Waits until what was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets the background threads go."""
        self._manager.close()


def latest_weights(
    run_dir: str | Path, weights: Tree, state: Tree | None = None
) -> tuple[Tree, Tree, int]:
    """The model of a run's last checkpoint, without its optimizer; writes nothing.

    Args:
      run_dir: the output directory of a run, which may still be training.
      weights: the weights as `jax.ShapeDtypeStruct`: `jax.eval_shape(net.init, …)[0]`.
      state: the state, likewise; nothing if the model has none.

    Returns:
      (weights, state, step).

    Raises:
      UsageError: if there is no checkpoint, it is damaged, or it is of another model.
    """
    directory = Path(run_dir).absolute() / 'checkpoints'
    step = max(_steps(directory), default=None)
    if step is None:
        raise UsageError(f'no checkpoint in {str(run_dir)!r}: give the output_dir of a run')
    abstract = {'weights': weights, 'state': {} if state is None else state}
    trees, _ = _restore(directory, step, abstract)
    return trees['weights'], trees['state'], step


def save_tree(directory: str | Path, tree: Tree) -> None:
    """Saves one tree of arrays in a directory of its own, whole or not at all.

    Args:
      directory: a directory that is empty or does not exist yet.
      tree: nested dicts of arrays.

    Raises:
      UsageError: if the directory holds anything.
    """
    path = Path(directory).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f'{str(directory)!r} is not empty: save to a new directory, or empty it')
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=_save_args({'tree': tree}, {}), force=path.exists())


def load_tree(directory: str | Path, abstract: Tree) -> Tree:
    """Reads what `save_tree` wrote.

    Args:
      directory: the directory.
      abstract: the tree as `jax.ShapeDtypeStruct` (or arrays).

    Returns:
      The tree, its arrays on the device.

    Raises:
      UsageError: if nothing was saved there, it is damaged, or it is another tree.
    """
    path = Path(directory).absolute()
    if not (path / _RECORD).is_dir():
        raise UsageError(f'{str(directory)!r} holds no saved weights: check the path')
    trees, _ = _read(path, {'tree': abstract}, cure='save it again')
    return trees['tree']


def _usable(directory: Path) -> None:
    """Raises UsageError where no directory can be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(
            f'cannot write to {str(directory)!r} ({e.strerror}): choose another output_dir'
        ) from None


def _steps(directory: Path) -> list[int]:
    """The complete steps in a directory, which may not exist."""
    if not directory.is_dir():
        return []
    return sorted(ocp.utils.checkpoint_steps(directory))


def _restore(
    directory: Path, step: int, abstract: Mapping[str, Tree]
) -> tuple[dict[str, Tree], dict]:
    """Reads one step, naming in an error the step that would come before it."""
    path = directory / str(step)
    others = [s for s in _steps(directory) if s < step]
    then = f'continue from step {others[-1]}' if others else 'start again'
    return _read(path, abstract, cure=f'delete that directory to {then}')


def _read(path: Path, abstract: Mapping[str, Tree], cure: str) -> tuple[dict[str, Tree], dict]:
    saved = {name: tree for name, tree in abstract.items() if jax.tree.leaves(tree)}
    record = _read_record(path, cure)
    _same(path, record['arrays'], {name: _describe(tree) for name, tree in abstract.items()})
    for name in saved:
        _verify(path, name, cure)
    items = {name: _Restore(_placed(tree)) for name, tree in saved.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(path, args=ocp.args.Composite(**items))
    trees = {name: restored[name] if name in saved else tree for name, tree in abstract.items()}
    return trees, record['values']


def _read_record(path: Path, cure: str) -> dict:
    try:
        sealed = json.loads((path / _RECORD / 'metadata').read_text())
        if zlib.crc32(sealed['text'].encode()) == sealed['crc32']:
            return json.loads(sealed['text'])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise _damaged(path, f'its {_RECORD} cannot be read', cure)


def _verify(path: Path, name: str, cure: str) -> None:
    """Raises UsageError unless every file of one tree is what was written."""
    try:
        expected = json.loads((path / name / _CHECKSUMS).read_text())
    except (OSError, ValueError):
        raise _damaged(path, f'{name}/{_CHECKSUMS} cannot be read', cure) from None
    found = _file_checksums(path / name)
    for file, checksum in expected.items():
        if found.get(file) != checksum:
            how = 'differs from what was written' if file in found else 'is missing'
            raise _damaged(path, f'{name}/{file} {how}', cure)


def _file_checksums(directory: Path) -> dict[str, int]:
    """Path within the directory -> CRC-32 of the file, read a piece at a time."""
    checksums = {}
    for file in sorted(directory.rglob('*')):
        if file.is_file() and file.name != _CHECKSUMS:
            checksum = 0
            with file.open('rb') as f:
                while piece := f.read(1 << 22):
                    checksum = zlib.crc32(piece, checksum)
            checksums[file.relative_to(directory).as_posix()] = checksum
    return checksums


def _damaged(path: Path, cause: str, cure: str) -> UsageError:
    return UsageError(f'checkpoint {str(path)!r} is damaged ({cause}): {cure}')


def _same(path: Path, there: Mapping[str, Kinds], here: Mapping[str, Kinds]) -> None:
    """Raises UsageError at the first array that differs in being, type or shape."""
    for name, leaves in here.items():
        saved = there.get(name, {})
        for leaf in sorted(saved.keys() | leaves.keys()):
            was, wanted = saved.get(leaf, 'absent'), leaves.get(leaf, 'absent')
            if was != wanted:
                raise UsageError(
                    f'checkpoint {str(path)!r} is of another experiment ({name}/{leaf} is {was} '
                    f'there, {wanted} here): use the model and optimizer it was made with, '
                    'or another directory'
                )


def _save_args(trees: Mapping[str, Tree], record: Mapping[str, Any]) -> Any:
    """Orbax's arguments for the trees that hold anything, and for the record."""
    trees = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
    arrays = {name: _describe(tree) for name, tree in trees.items()}
    text = json.dumps({'values': record, 'arrays': arrays})
    sealed = {'text': text, 'crc32': zlib.crc32(text.encode())}
    items = {name: _Save(tree) for name, tree in trees.items()}
    return ocp.args.Composite(**items, **{_RECORD: ocp.args.JsonSave(sealed)})


def _describe(tree: Tree) -> Kinds:
    """What stands where; an optimizer's state has tuples and named tuples on the way."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): (
            f'{jnp.dtype(leaf.dtype).name}[{",".join(map(str, leaf.shape))}]'
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _placed(tree: Tree) -> Tree:
    """Adds to each struct the sharding it lacks: the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, 'sharding', None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, tree)
