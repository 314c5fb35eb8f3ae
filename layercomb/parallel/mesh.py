"""`make_mesh`: the devices as a grid, whose axes say what is split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from layercomb.checks import Bound, checked
from layercomb.errors import UsageError

AXES = ('data', 'fsdp', 'sequence', 'tensor')  # of a mesh, the slowest links first
REST = -1

_Size = Annotated[int, Bound(REST)]


@checked
def make_mesh(
    data: _Size = 1,
    fsdp: _Size = REST,
    tensor: _Size = 1,
    devices: Sequence[Any] | None = None,
    *,
    sequence: _Size = 1,
) -> jax.sharding.Mesh:
    """A grid of devices with the axes data, fsdp, sequence and tensor.

    * ``data``: each device has all weights, and some rows of the batch.
    * ``fsdp``: each device has a part of each weight and of the optimizer's state, and some rows of
      the batch. A weight is gathered where it is used, and its gradient is scattered.
    * ``sequence``: devices share rows, and each has some of their positions. For attention they
      exchange positions for heads, or pass keys and values round. Each has a part of each weight,
      as along ``fsdp``.
    * ``tensor``: devices share rows, and each computes some heads and some hidden units.

    One axis may be −1, for the devices that the others leave. Devices that are neighbours along
    the last axis are the closest ones, so let ``tensor`` stay inside a machine.

    Args:
      data, fsdp, tensor: how many devices there are along each axis.
      devices: which ones; by default all that JAX sees, of all processes.
      sequence: how many devices there are along this axis.

    Returns:
      A `jax.sharding.Mesh` for `Loop(mesh=…)`, or `train.mesh` of a configuration.

    Raises:
      TypeError, ValueError: if a size is no positive integer or −1, or two of them are −1.
      UsageError: if the sizes do not make up the devices, naming the nearest that do.

    >>> from layercomb import parallel
    >>> dict(parallel.make_mesh(data=1, fsdp=1).shape)
    {'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 1}
    """
    sizes = dict(zip(AXES, (data, fsdp, sequence, tensor), strict=True))
    if 0 in sizes.values():
        raise ValueError(f'make_mesh: {told(sizes)}: an axis has 1 device or more, or −1')
    free = [name for name, n in sizes.items() if n == REST]
    if len(free) > 1:
        raise ValueError(f'make_mesh: {told(sizes)}: only one axis can be −1, the rest')
    found = jax.devices() if devices is None else list(devices)
    fixed = math.prod(n for n in sizes.values() if n != REST)
    if free and len(found) % fixed == 0:
        sizes[free[0]] = len(found) // fixed
    if math.prod(sizes.values()) != len(found):
        raise UsageError(
            f'a mesh of {told(sizes)} does not fit {_devices(len(found))}: use '
            f'{told(_nearest(sizes, len(found)))}, or set JAX_NUM_CPU_DEVICES to try it on a CPU'
        )
    grid = np.asarray(found, object).reshape(tuple(sizes.values()))
    if devices is None and grid.size > 1 and found[0].platform != 'cpu':
        from jax.experimental import mesh_utils

        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), found)  # by the wires
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _nearest(sizes: dict[str, int], n: int) -> dict[str, int]:
    """Sizes whose product is n: the wanted ones as far as they divide, the rest to fsdp."""
    fits = {}
    for name in ('tensor', 'sequence', 'data'):
        wanted = 1 if sizes[name] == REST else sizes[name]
        fits[name] = max(i for i in range(1, n + 1) if n % i == 0 and i <= max(wanted, 1))
        n //= fits[name]
    return {name: fits.get(name, n) for name in AXES}


def _devices(n: int) -> str:
    return '1 device' if n == 1 else f'{n} devices'


def told(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device, for messages.

    Args:
      sizes: of all axes, −1 for the rest.

    >>> told({'data': 1, 'fsdp': 4, 'sequence': 1, 'tensor': 2}), told({'data': 1, 'fsdp': 1})
    ('fsdp=4 tensor=2', 'fsdp=1')
    """
    return ' '.join(f'{name}={n}' for name, n in sizes.items() if n != 1) or 'fsdp=1'
