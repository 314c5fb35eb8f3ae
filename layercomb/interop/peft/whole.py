"""Weights that an adapter holds whole, such as the head of a classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.interop.peft.config import Adapter
from layercomb.interop.tensors import Entry, Tensor
from layercomb.layers.core.layer import Layer
from layercomb.transforms.weight_axes import axes


def put_whole(
    flat: Mapping[str, Any],
    net: Layer,
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
) -> dict[str, Any]:
    """The weights of a model, some of them replaced.

    Args:
      flat: the weights by path.
      net: the model, wide.
      entries: of its family.
      tensors: those that an adapter holds whole, by their names in the base.
      adapter: says which there must be.

    Raises:
      UsageError: if one is missing, unknown, of another shape, or is to replace a narrow one.
    """
    made, used = dict(flat), set[str]()
    for entry in entries:
        for i, names in enumerate(entry.all_names):
            name = next((name for name in names if name in tensors), None)
            used.update(names)
            if name is None:
                if adapter.holds_whole(names[0].rpartition('.')[0]):
                    raise UsageError(
                        f'modules_to_save asks for {names[0]}, which is not in the file: copy the '
                        'whole adapter'
                    )
                continue
            at = None if entry.layers is None else i
            made[entry.ours] = _replaced(made[entry.ours], at, net, entry, name, tensors[name])
    unknown = sorted(tensors.keys() - used)
    if unknown:
        raise UsageError(
            f'the adapter replaces {unknown[0]}, which this model does not have: it was made for '
            'another one, so load it on that'
        )
    return made


def _replaced(
    ours: Any, at: int | None, net: Layer, entry: Entry, name: str, tensor: Tensor
) -> Any:
    """A weight with the one of a layer replaced, or all of it."""
    if ours.dtype != jnp.float32:
        raise UsageError(
            f'the adapter replaces {name}, which is narrow in this model: load the model with '
            "dtype='float32'"
        )
    declared = axes(net, trees.unflatten({entry.ours: ours}))[entry.ours]
    wanted = entry.shape(ours.shape, declared)
    given = entry.cut(tensor.read())
    if given.shape != wanted:
        raise UsageError(
            f'the adapter replaces {name}: it is {given.shape} and not {wanted}: it was made for a '
            'model of other sizes'
        )
    new = (given.T if entry.transposed else given).astype(np.float32)
    if at is None:
        return jnp.asarray(new.reshape(ours.shape))
    return ours.at[at].set(jnp.asarray(new.reshape(ours.shape[1:])))
