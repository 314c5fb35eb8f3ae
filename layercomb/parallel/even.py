"""Batches of several processes whose data is of unequal length: all bring as many, of one shape."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np

from layercomb.errors import UsageError
from layercomb.layers.facts import processes
from layercomb.parallel.layout import Layout

Batch = tuple[Any, ...]


def evened(batch: Batch | None, layout: Layout, together: int, where: str) -> Batch | None:
    """A batch as large as those of the other processes; rows that were added count for nothing.

    All processes have to ask, for one batch after another, until all have none.

    Args:
      batch: of this process, its last array loss weights; None if its data has ended.
      layout: of the devices.
      together: how many rows in sequence belong together.
      where: what messages call the batch.

    Returns:
      The batch, filled up as of `Layout.filled`; None if no process has one.

    Raises:
      UsageError: if batches differ in more than their number of rows.
    """
    if layout.mesh is None or processes.is_alone():
        return None if batch is None else layout.filled(batch, together)
    form = '' if batch is None else _form([('…', *x.shape[1:]) for x in batch], batch)
    rows = 0 if batch is None else len(batch[0])
    mine = batch is not None, rows, zlib.crc32(form.encode()) >> 1
    each = processes.from_all(np.array(mine, np.int32))  # (N, 3)
    have = np.flatnonzero(each[:, 0])
    if not have.size:
        return None
    other = next((i for i in have if each[i, 2] != each[have[0], 2]), None)
    if other is not None or have.size < len(each):
        forms = processes.texts(form)
        if other is not None:
            cure = 'batches may differ in their rows alone'
            raise _differ(where, forms, int(have[0]), int(other), cure)
        form = forms[have[0]]
    if rows == 0:  # one that counts for nothing
        arrays = json.loads(form)
        batch = tuple(np.zeros((1, *shape[1:]), kind) for kind, shape in arrays)
    assert batch is not None
    return layout.filled(batch, together, max(1, int(each[:, 1].max())))


def check_alike(batch: Batch, where: str) -> None:
    """Raises a UsageError in all processes unless their batches have the same shapes.

    Args:
      batch: of this process.
      where: what messages call it.
    """
    forms = processes.texts(_form([x.shape for x in batch], batch))
    other = next((i for i, form in enumerate(forms) if form != forms[0]), None)
    if other is not None:
        raise _differ(where, forms, 0, other, 'all must bring batches of one shape and dtype')


def _form(shapes: list[Any], batch: Batch) -> str:
    """Dtypes and shapes, as text that can be sent."""
    return json.dumps([(str(x.dtype), s) for s, x in zip(shapes, batch, strict=True)])


def _differ(where: str, forms: list[str], one: int, other: int, cure: str) -> UsageError:
    first, second = (
        ' '.join(f'{kind}[{",".join(map(str, shape))}]' for kind, shape in json.loads(forms[i]))
        for i in (one, other)
    )
    return UsageError(f'{where}: process {one} has {first}, process {other} {second}: {cure}')
