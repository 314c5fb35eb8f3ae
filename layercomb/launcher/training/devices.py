"""The devices of a run: the mesh that a command names, and processes that train together."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from layercomb import trees
from layercomb.errors import UsageError, one_line
from layercomb.parallel import AXES, make_mesh
from layercomb.supervised.offloading import MODES

_TO_TELL = 1.0  # seconds in which all processes tell an error that all have heard of
_LOST = re.compile(
    r'(?i)gloo|connection (closed|reset|refused)|heartbeat|coordination|barrier|remote|'
    r'deadline.exceeded'
)


def options_of(add: Any) -> None:
    """Adds the options of a training command that say where it runs.

    Args:
      add: adds one option.
    """
    mesh_option(add, 'train on several devices')
    add(
        '--distributed',
        action='store_true',
        help='train together with other processes that run the same command; Slurm, Open MPI, GKE '
        'and TPU pods say by themselves which there are',
    )
    add('--coordinator_address', metavar='HOST:PORT', help='of process 0, where nothing says it')
    add('--num_processes', type=int, help='how many there are, where nothing says it')
    add('--process_id', type=int, help='the number of this one, from 0, where nothing says it')


def mesh_option(add: Any, what: str) -> None:
    """Adds the option that names a mesh.

    Args:
      add: adds one option.
      what: what it is good for.
    """
    add(
        '--mesh',
        type=_sizes,
        metavar='AXIS=N,…',
        help=f'{what}: data=2,fsdp=4, of {", ".join(AXES)}; one axis may be -1, for the rest, and '
        'fsdp alone is fsdp=-1',
    )


def offload_option(add: Any, what: str) -> None:
    """Adds the option that names what is in host memory.

    Args:
      add: adds one option.
      what: what it is good for.
    """
    told = [mode for mode in MODES if 'streams' not in mode]
    add('--offload', choices=told, help=f'{what}; see docs/scaling.md')


def _sizes(given: str) -> dict[str, int]:
    """The sizes of a mesh, by axis."""
    sizes = {}
    for part in given.split(','):
        name, _, n = part.strip().partition('=')
        if name not in AXES or name in sizes or not re.fullmatch(r'-1|[1-9]\d*|', n):
            raise argparse.ArgumentTypeError(
                f'{given!r} is no mesh: write e.g. data=2,fsdp=4, of {", ".join(AXES)}'
            )
        sizes[name] = int(n or -1)
    return {'fsdp': 1, **sizes}


def mesh_of(options: argparse.Namespace) -> Any:
    """The mesh that the options name; None if they name none.

    Args:
      options: of the command.

    Raises:
      UsageError: if it does not fit the devices.
    """
    return None if options.mesh is None else make_mesh(**options.mesh)


@contextlib.contextmanager
def together(options: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if the options say so; only the first one writes and shows.

    An error ends this process at once, which ends the others soon. One that comes of another
    process's end is told in a line: the run goes on from its last checkpoint when all are started
    again.

    Args:
      options: of the command.

    Raises:
      UsageError: if the processes cannot be found.
    """
    if not options.distributed:
        for name in ('coordinator_address', 'num_processes', 'process_id'):
            if getattr(options, name) is not None:
                raise UsageError(f'--{name} is about several processes: give --distributed too')
        with _without_echoes():
            yield
        return
    if not jax.distributed.is_initialized():
        _join(options)
    try:
        with _quiet(jax.process_index() > 0), _without_echoes():
            yield
    except BaseException as e:
        if jax.process_count() == 1:
            raise
        code = _tell(e)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_first() and not _is_lost(
            e
        ):  # JAX ends the others by a signal as soon as they miss it
            time.sleep(_TO_TELL)
        os._exit(code)  # at a usual exit JAX would wait for the others, and abort with its stack


def _tell(error: BaseException) -> int:
    """Says what went wrong in this process, and returns its exit code."""
    where = f'layercomb: process {jax.process_index()}: '
    if _is_lost(error):
        lost = (
            'another process of the run has ended, or cannot be reached: start all of them again, '
            'and they go on from the last checkpoint'
        )
        print(f'{where}{lost}', file=sys.stderr)
        return 2
    if isinstance(error, UsageError):
        print(f'{where}{one_line(error)}', file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print(f'{where}stopped', file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def _is_lost(error: BaseException) -> bool:
    """Whether it comes of the end of another process."""
    if isinstance(error, ValueError):  # of a gather that Gloo could not end
        return 'gloo' in str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and bool(_LOST.search(str(error)))


def is_first() -> bool:
    """Whether this process writes and tells for all."""
    return jax.process_index() == 0


def on_one(tree: Any) -> Any:
    """A tree of arrays of a mesh on the first device.

    Args:
      tree: such as the weights of a `Loop`.

    Returns:
      The tree; None if several processes have it, or that device has no room for it.
    """
    if all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(tree)):
        return tree
    if jax.process_count() > 1:
        return None
    first = jax.local_devices()[0]
    memory = first.memory_stats() or {}
    room = memory.get('bytes_limit', math.inf) - memory.get('bytes_in_use', 0)
    return jax.device_put(jax.device_get(tree), first) if trees.n_bytes(tree) < room else None


def _join(options: argparse.Namespace) -> None:
    try:
        jax.distributed.initialize(
            options.coordinator_address,
            options.num_processes,
            options.process_id,
            heartbeat_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as e:
        raise UsageError(
            f'--distributed: the other processes were not found ({str(e).splitlines()[0]}): give '
            '--coordinator_address HOST:PORT, --num_processes and --process_id'
        ) from None


@contextlib.contextmanager
def _quiet(is_quiet: bool) -> Iterator[None]:
    """Drops what is printed, so that each line is there once."""
    if not is_quiet:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    sys.stdout.flush()


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Drops what threads of a save say that has failed: it is told in a line."""
    before = sys.unraisablehook

    def hook(said: Any) -> None:
        if str(said.exc_value) != 'Event loop is closed':
            before(said)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
