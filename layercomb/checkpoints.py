"""Trees of arrays on disk: whole or absent, and checked when read.

A directory holds named trees of arrays and a record in JSON, with the dtype and shape of each
array. Orbax writes it under a temporary name, and renames it when all is on the disk. Orbax does
not notice a flipped bit in an array, so each file's checksum is written beside it, also in the
background, and compared before anything is read. Each tree also has the checksum of the record it
was written with, so that nothing can stand beside what belongs elsewhere.

Files do not keep the types of state entries. Trees are written as `trees.plain` makes them, and get
their types back from the tree that the reader expects.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import logging
import sys
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths
from layercomb.errors import UsageError, machine_errors, require
from layercomb.layers.facts import processes
from layercomb.trees import plain, typed

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
else:
    ocp = require('orbax.checkpoint', 'train')

# Orbax's threads log tracebacks of errors that it also raises; the library reports them in a line.
logging.getLogger('absl').addFilter(lambda r: r.exc_info is None or 'orbax' not in r.pathname)

Tree = Any  # nested containers of arrays, or of jax.ShapeDtypeStruct
Kinds = dict[str, str]  # path -> 'float32[4,5]'

_RECORD = 'record'
_CHECKSUMS = 'crc32.json'
_ASK_EVERY = 0.2  # seconds: processes ask each other whether a save is written
_SEAL = 'of_record'  # a file in each tree: the checksum of the record; absent in older ones


class _CheckedHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of trees, which also leaves a checksum of each file, and of the record."""

    async def async_save(self, directory: Any, *given: Any, args: Any = None, **more: Any) -> Any:
        """Starts to write a tree; Orbax calls this.

        Args:
          directory: where to.
          given, more: Orbax's own.
          args: a `_Save`.
        """
        self._seal = args.seal
        return await super().async_save(directory, *given, args=args, **more)

    def finalize(self, directory: Any) -> None:
        """Writes the checksums; Orbax calls this in the background, before it renames the step.

        Args:
          directory: where the files are.
        """
        super().finalize(directory)
        path = Path(directory)
        (path / _SEAL).write_text(str(self._seal), encoding='utf-8')
        (path / _CHECKSUMS).write_text(json.dumps(_file_checksums(path)), encoding='utf-8')


@ocp.args.register_with_handler(_CheckedHandler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.StandardSave):
    seal: int = 0


@ocp.args.register_with_handler(_CheckedHandler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.StandardRestore):
    pass


def save_tree(directory: str | Path, tree: Tree) -> None:
    """Saves one tree of arrays in a directory of its own, whole or not at all.

    Args:
      directory: a directory that is empty or does not exist yet.
      tree: nested dicts of arrays.

    Raises:
      UsageError: if the directory holds anything, or cannot be written.
    """
    path = paths.local(directory, 'directory')
    paths.check_for_arrays(path)
    with machine_errors('free some space, or save elsewhere'):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f'{str(path)!r} is not empty: save to a new directory, or empty it')
        paths.check_can_hold(path)
        with (
            paths.whole(path) as folder,
            ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
        ):
            checkpointer.save(folder, args=save_args({'tree': tree}, {}))


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
    path = paths.local(directory, 'directory')
    with machine_errors('check the path'):
        if not (path / _RECORD).is_dir():
            raise UsageError(f'{str(path)!r} holds no saved weights: check the path')
        trees, _ = read(path, {'tree': abstract}, cure='save it again')
    return trees['tree']


def save_args(trees: Mapping[str, Tree], record: Mapping[str, Any]) -> Any:
    """Orbax's arguments for saving named trees and a record.

    Args:
      trees: trees of arrays by name; those without arrays are left out.
      record: what else to keep, in types that JSON can hold.
    """
    trees = {name: plain(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}
    trees = {name: jax.tree.map(_without_key, tree) for name, tree in trees.items()}
    arrays = {name: kinds(tree) for name, tree in trees.items()}
    text = json.dumps({'values': record, 'arrays': arrays})
    seal = zlib.crc32(text.encode())
    sealed = {'text': text, 'crc32': seal}
    items = {name: _Save(tree, seal=seal) for name, tree in trees.items()}
    return ocp.args.Composite(**items, **{_RECORD: ocp.args.JsonSave(sealed)})


class Background:
    """One save after another in the background, of an Orbax manager.

    Orbax lets the other processes wait for twenty minutes where one could not write. Here they hear
    of it when all ask how the save went.

    Attributes:
      step: the number of the step that was saved last.
    """

    def __init__(self) -> None:
        self.step = 0
        self._pool = concurrent.futures.ThreadPoolExecutor(1, 'saved')
        self._done: concurrent.futures.Future[None] | None = None
        self._caller = 0

    def options(self) -> ocp.options.AsyncOptions:
        """What the manager has to be made with."""
        return ocp.options.AsyncOptions(barrier_sync_fn=self._meet)

    def start(self, manager: ocp.CheckpointManager, step: int, args: Any) -> None:
        """Starts to save a step; returns when its arrays may be donated again.

        Args:
          manager: of these `options`.
          step: its number.
          args: of `save_args`.
        """
        self.step, self._caller = step, threading.get_ident()
        manager.save(step, args=args)
        self._done = self._pool.submit(manager.wait_until_finished)

    def wait(self) -> None:
        """Waits for this process's part, and raises what went wrong with it."""
        if self._done is None:
            return
        concurrent.futures.wait([self._done])
        if (error := self._done.exception()) is not None:
            self._done = None  # it is raised once
            raise error

    def failed(self) -> bool:
        """Waits for all processes. Whether one of them failed; the others then wait no more."""
        while self._done is not None:
            concurrent.futures.wait([self._done], timeout=_ASK_EVERY)
            is_done = self._done.done()
            mine = is_done, is_done and self._done.exception() is not None
            each = processes.from_all(np.array(mine))  # (N, 2)
            if each[:, 1].any():
                self._done = self._done if mine[1] else None
                return True
            if each[:, 0].all():
                self._done = None
        return False

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Waits for other processes, unless this one has failed: Orbax waits in a `finally`."""
        error = sys.exc_info()[1]
        if error is not None and threading.get_ident() != self._caller:
            raise error
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def read(path: Path, abstract: Mapping[str, Tree], cure: str) -> tuple[dict[str, Tree], dict]:
    """Reads named trees, and the record. Of several processes, all have to.

    Args:
      path: what was written with `save_args`.
      abstract: the trees as `jax.ShapeDtypeStruct` or arrays; an array goes where the struct's
        sharding says, by default on the first device. Trees not named here are not read.
      cure: what an error should advise if a file is damaged.

    Returns:
      (trees, record), as they were saved.

    Raises:
      UsageError: if a file is damaged, or the saved trees differ from `abstract`.
    """
    paths.check_for_arrays(path)
    saved = {name: plain(tree) for name, tree in abstract.items() if jax.tree.leaves(tree)}
    keyless = {name: jax.tree.map(_without_key, tree) for name, tree in saved.items()}
    with processes.hearing():
        record = read_record(path, cure)
        _same(path, record['arrays'], {name: kinds(tree) for name, tree in abstract.items()})
        _verify(path, list(saved), record['crc32'], cure)
    items = {name: _Restore(_placed(tree)) for name, tree in keyless.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(path, args=ocp.args.Composite(**items))
    found = {name: jax.tree.map(_as_it_was, restored[name], tree) for name, tree in saved.items()}
    found = {name: typed(tree, abstract[name]) for name, tree in found.items()}
    return {**abstract, **found}, record['values']


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_key(x: Any) -> Any:
    """A typed key, which an optimizer may hold, as its integers, which can be written."""
    if not _is_key(x):
        return x
    return jax.random.key_data(x) if isinstance(x, jax.Array) else jax.eval_shape(_data, x)


def _data(key: jax.Array) -> jax.Array:
    return jax.random.key_data(key)


def _as_it_was(x: jax.Array, like: Any) -> jax.Array:
    """Undoes `_without_key`: makes a typed key of integers if `like` is one."""
    if not _is_key(like):
        return x
    implementations: list[Any] = []  # a struct does not name it, a traced key does
    jax.eval_shape(lambda key: implementations.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(x, impl=implementations[0])


def read_record(path: Path, cure: str) -> dict[str, Any]:
    """Reads what `save_args` wrote besides the arrays.

    Args:
      path: what was written with `save_args`.
      cure: what an error should advise.

    Returns:
      'values', the record, 'arrays', the `kinds` of each tree, and 'crc32' of both.

    Raises:
      UsageError: if it cannot be read, or its checksum is wrong.
    """
    try:
        sealed = json.loads((path / _RECORD / 'metadata').read_text('utf-8'))
        if zlib.crc32(sealed['text'].encode()) == sealed['crc32']:
            return {**json.loads(sealed['text']), 'crc32': sealed['crc32']}
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise _damaged(path, f'its {_RECORD} cannot be read', cure)


def _verify(path: Path, names: Sequence[str], seal: int, cure: str) -> None:
    """Raises a UsageError unless every file of the trees has the checksum that was written.

    Of several processes, each reads a part of the files.
    """
    expected: dict[str, int] = {}
    for name in names:
        try:
            its = json.loads((path / name / _CHECKSUMS).read_text('utf-8'))
            expected |= {f'{name}/{file}': checksum for file, checksum in its.items()}
            written = int((path / name / _SEAL).read_text('utf-8')) if _SEAL in its else seal
        except (OSError, ValueError, AttributeError):
            missing = _SEAL if f'{name}/{_SEAL}' in expected else _CHECKSUMS
            raise _damaged(path, f'{name}/{missing} cannot be read', cure) from None
        if written != seal:
            raise _damaged(path, f'{name} and its {_RECORD} were not written together', cure)
    for file in sorted(expected)[jax.process_index() :: jax.process_count()]:
        found = _checksum(path / file) if (path / file).is_file() else None
        if found != expected[file]:
            how = 'is missing' if found is None else 'differs from what was written'
            raise _damaged(path, f'{file} {how}', cure)


def _file_checksums(directory: Path) -> dict[str, int]:
    """Path within the directory -> CRC-32 of the file."""
    return {
        file.relative_to(directory).as_posix(): _checksum(file)
        for file in sorted(directory.rglob('*'))
        if file.is_file() and file.name != _CHECKSUMS
    }


def _checksum(file: Path) -> int:
    """The CRC-32 of a file, read 4 MiB at a time."""
    checksum = 0
    with file.open('rb') as f:
        while piece := f.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _damaged(path: Path, cause: str, cure: str) -> UsageError:
    return UsageError(f'checkpoint {str(path)!r} is damaged ({cause}): {cure}')


def _same(path: Path, there: Mapping[str, Kinds], here: Mapping[str, Kinds]) -> None:
    """Raises a UsageError at the first array that is missing, or differs in dtype or shape."""
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


def kinds(tree: Tree) -> Kinds:
    """The dtype and shape of each array of a tree, by path, such as 'float32[4,5]'.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`; a typed key counts as its integers.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): (
            f'{jnp.dtype(leaf.dtype).name}[{",".join(map(str, leaf.shape))}]'
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(_without_key, plain(tree))
        )
    }


def _placed(tree: Tree) -> Tree:
    """Puts structs without a sharding on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, 'sharding', None) or here
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, tree)
