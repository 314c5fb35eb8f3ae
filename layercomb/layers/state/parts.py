"""Parts of a state, whose types say what they are: auxiliary losses, decisions, and others.

A layer's state is a nested dict of arrays and parts. A part's meaning depends on its type and not
on its key, so layers, weights and states may have any names.

`Decisions`, `Counted` and `Segments` are not the layer's own: other code puts them beside its state
for one call. Their keys begin with "/", as no layer's name does.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

from layercomb.trees import Tree, Typed, plain, typed

P = TypeVar('P', bound='Part')

WHOLE = '//'  # the key of a state that is a part, beside which something is put


@dataclass_transform(frozen_default=True)
class Part(Typed):
    """A value in a state that is known by its class: a frozen dataclass, and a pytree node.

    A subclass annotates its fields: arrays, trees, other parts, or None. A checkpoint holds a part
    with one field as that field's value, and one with several fields as a dict.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes the class a frozen dataclass and registers it with JAX."""
        super().__init_subclass__(**kwargs)
        made: type[Any] = dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_dataclass(made)

    def fields(self) -> dict[str, Any]:
        """The part's values by the names of its fields; None is left out."""
        found: Any = self
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(found)}
        return {name: value for name, value in values.items() if value is not None}

    def replace(self: P, **changes: Any) -> P:
        """The same part with other values in some fields."""
        made: Any = self
        return dataclasses.replace(made, **changes)

    def plain(self) -> Any:
        """The part without its type: the value of its one field, or a dict of several."""
        values = plain(self.fields())
        return values if self._has_many_fields else values[self._first]

    def filled(self, plain: Any) -> Any:
        """The same part with other values, in the form that `plain` returns."""
        found = plain if self._has_many_fields else {self._first: plain}
        return self.replace(**{n: typed(found[n], value) for n, value in self.fields().items()})

    @property
    def _first(self) -> str:
        made: Any = self
        return dataclasses.fields(made)[0].name

    @property
    def _has_many_fields(self) -> bool:
        made: Any = self
        return len(dataclasses.fields(made)) > 1


class AuxLoss(Part):
    """An auxiliary loss in a layer's new state in training, to be added to the model's loss.

    A `Loop` adds all of them. `init` of such a layer returns ``AuxLoss(jnp.zeros(()))``, so that
    the state keeps its structure, and `apply` returns the value in training::

        return (y,), {**state, 'aux_loss': tl.AuxLoss(loss)}

    Combinators that apply a layer several times add its auxiliary losses (`Map`), or average them
    (`Chunk`).

    Attributes:
      value: float32 (), or a tree of such.
    """

    value: Any


class Blocks(dict[str, Any], Typed):
    """The states of a repeated layer in ``PREDICT``, one for each time: ``'0'``, ``'1'`` …

    A `Serial` of the blocks would have the same dict. In training a `Repeat` has one state instead,
    in which those of its blocks are stacked.
    """

    def plain(self) -> Tree:
        """The states as a dict, without types."""
        return plain(dict(self))

    def filled(self, plain: Any) -> Blocks:
        """The same blocks with other states, in the form that `plain` returns."""
        return Blocks({key: typed(plain[key], value) for key, value in self.items()})


def _with_keys(blocks: Blocks) -> tuple[list[Any], tuple[str, ...]]:
    keys = tuple(sorted(blocks))
    return [(jax.tree_util.DictKey(key), blocks[key]) for key in keys], keys


jax.tree_util.register_pytree_with_keys(
    Blocks, _with_keys, lambda keys, values: Blocks(zip(keys, values, strict=True))
)


def refuse_blocks(owner: str, state: Any, mode: Any) -> None:
    """Raises a ValueError if `state` was made for ``PREDICT``: a `Blocks`."""
    if isinstance(state, Blocks):
        raise ValueError(
            f'{owner}: this state was made for decoding, a block at a time: init without '
            f'mode=PREDICT to apply in {mode.name}'
        )


# A layer's whole state may be a part, such as a cache; nothing can be put beside it.


def own(state: Any, kind: type[P]) -> P | None:
    """The part of type `kind` in a state itself, not in states inside it; None if there is none."""
    values = state.values() if isinstance(state, dict) else ()
    return next((value for value in values if isinstance(value, kind)), None)


def beside(state: Tree, part: Part) -> Tree:
    """A state with `part` put beside it for one call; one of the same type is replaced."""
    return {**without(state, type(part)), f'/{type(part).__name__.lower()}': part}


def without(state: Any, kind: type[Part]) -> Any:
    """A state without the part of type `kind` in it; states inside it are unchanged."""
    if own(state, kind) is None:
        return state
    return {key: value for key, value in state.items() if not isinstance(value, kind)}


def take_out(state: Any, kind: type[Part]) -> tuple[Any, Tree]:
    """Splits a state into (the rest, a tree of all parts of type `kind`), at their paths."""
    if not isinstance(state, dict):
        return state, {}
    rest: Tree = type(state)()
    found: Tree = {}
    for key, value in state.items():
        if isinstance(value, kind):
            found[key] = value
            continue
        inner_rest, inner_found = take_out(value, kind)
        if inner_found:
            found[key] = inner_found
        if not inner_found or inner_rest:
            rest[key] = inner_rest
    return rest, found


def put_back(state: Any, found: Tree) -> Any:
    """The inverse of `take_out`: `state` with the parts put in."""
    out = copy.copy(state)
    for key, value in found.items():
        out[key] = put_back(out.get(key, {}), value) if isinstance(value, dict) else value
    return out
