"""The devices of a run: the mesh that a command names, and processes that train together."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax

from layercomb.errors import UsageError
from layercomb.parallel import AXES, make_mesh

_LOST = re.compile(
    r'(?i)gloo|connection (closed|reset|refused)|heartbeat|coordination|barrier|'
    r'unavailable|deadline.exceeded|nccl|peer'
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
        help=f'{what}: data=2,fsdp=4,tensor=1; one axis may be -1, for the rest, and fsdp alone is '
        'fsdp=-1',
    )


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
    if options.mesh is not None:
        return make_mesh(**options.mesh)
    return make_mesh() if options.distributed else None


@contextlib.contextmanager
def together(options: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if the options say so; only the first one writes and shows.

    An error that comes of another process's end is told in a line, and ends this process: the run
    goes on from its last checkpoint when all are started again.

    Args:
      options: of the command.

    Raises:
      UsageError: if the processes cannot be found.
    """
    if not options.distributed:
        for name in ('coordinator_address', 'num_processes', 'process_id'):
            if getattr(options, name) is not None:
                raise UsageError(f'--{name} is about several processes: give --distributed too')
        yield
        return
    _join(options)
    try:
        with _quiet(jax.process_index() > 0):
            yield
    except (RuntimeError, ValueError) as e:  # JAX's runtime errors are RuntimeErrors
        if not isinstance(e, jax.errors.JaxRuntimeError) or not _LOST.search(str(e)):
            raise
        print(
            f'layercomb: process {jax.process_index()}: another process of the run has ended, or '
            'cannot be reached: start all of them again, and they go on from the last checkpoint',
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # at a usual exit JAX waits for the lost process, and aborts with its stack


def is_first() -> bool:
    """Whether this process writes and tells for all."""
    return jax.process_index() == 0


def on_one(tree: Any) -> Any:
    """A tree of arrays of a mesh on the first device; None if several processes have it.

    Args:
      tree: such as the weights of a `Loop`.
    """
    if all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(tree)):
        return tree
    if jax.process_count() > 1:
        return None
    return jax.device_put(jax.device_get(tree), jax.local_devices()[0])


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
