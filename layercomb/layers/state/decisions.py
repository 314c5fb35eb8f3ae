"""Decisions of layers, such as LSH's buckets: taken in training, recorded, and replayed.

A decision is what a tiny rounding error could flip. A reversible layer runs forwards in ``RECORD``
and backwards in ``REPLAY``, so that both passes decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layercomb.layers.core.mode import Mode
from layercomb.layers.state.parts import Part, beside, own, put_back, take_out
from layercomb.trees import Tree


class Decisions(Part):
    """What a layer has decided, beside its state: ``RECORD`` puts it there, ``REPLAY`` takes it.

    Attributes:
      values: a tree of arrays by the decision's name.
    """

    values: Tree


def decide(mode: Mode, state: Tree, name: str, make: Callable[[], Any]) -> tuple[Any, Tree]:
    """A discrete decision of a layer: made, recorded or replayed, as the mode says.

    A layer whose output depends on a choice that a rounding error could flip (an argmax, a sort, a
    threshold) makes it so, and may then stand in a reversible layer.

    Args:
      mode: that of `apply`.
      state: the layer's.
      name: of the decision, one of the layer's own.
      make: makes it: () → an array, in the smallest integers that hold it, or a tree of such.

    Returns:
      The decision, and the state to go on with: in ``RECORD`` it holds the decision. In ``REPLAY``
      the decision is the one that the state holds, and `make` is not called.

    Raises:
      ValueError: in ``REPLAY``, if the state holds no decision of this name.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> x = jnp.array([[1.0, 3.0, 2.0]])
    >>> at, kept = tl.decide(tl.Mode.RECORD, {}, 'at', lambda: jnp.argmax(x, -1))
    >>> again, _ = tl.decide(tl.Mode.REPLAY, kept, 'at', lambda: jnp.argmax(-x, -1))
    >>> at.tolist(), again.tolist()
    ([1], [1])
    """
    found = own(state, Decisions)
    values = {} if found is None else found.values
    if mode is Mode.REPLAY:
        if name not in values:
            raise ValueError(
                f'REPLAY finds no decision {name!r} in the state: hand in the state that RECORD '
                'gave, or one into which put_decisions has put what take_decisions found in it'
            )
        return values[name], state
    decision = make()
    if mode is Mode.RECORD:
        state = beside(state, Decisions({**values, name: decision}))
    return decision, state


def take_decisions(state: Tree) -> tuple[Tree, Tree]:
    """Separates a state from the decisions recorded in it, both with their paths."""
    return take_out(state, Decisions)


def put_decisions(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_decisions`."""
    return put_back(state, found)
