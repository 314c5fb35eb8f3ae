"""Discrete decisions of layers, such as LSH's buckets: made, recorded and replayed in training.

A rounding error could flip such a decision. A reversible layer runs forwards in ``RECORD`` and
backwards in ``REPLAY``, so that both passes decide alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layercomb.layers.core.mode import Mode
from layercomb.layers.state.parts import Part, beside, own, put_back, take_out
from layercomb.trees import Tree


class Decisions(Part):
    """A layer's decisions, beside its state: written in ``RECORD``, read in ``REPLAY``.

    Attributes:
      values: a tree of arrays by the decision's name.
    """

    values: Tree


def decide(mode: Mode, state: Tree, name: str, make: Callable[[], Any]) -> tuple[Any, Tree]:
    """Makes, records or replays a discrete decision of a layer, as the mode says.

    Use it for a choice that a rounding error could flip (an argmax, a sort, a threshold): the layer
    then works inside a reversible layer.

    Args:
      mode: that of `apply`.
      state: the layer's.
      name: of the decision; unique in the layer.
      make: () → the decision: an array of the smallest sufficient integer dtype, or a tree of such.

    Returns:
      The decision, and the state to continue with. In ``RECORD`` that state holds the decision. In
      ``REPLAY`` the decision is read from `state`, and `make` is not called.

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
    """Splits a state into (the state without decisions, a tree of `Decisions`), at their paths."""
    return take_out(state, Decisions)


def put_decisions(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_decisions`: `state` with the decisions put in."""
    return put_back(state, found)
