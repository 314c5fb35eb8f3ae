"""Decisions of layers, such as LSH's buckets: they stand in a state under `DECISIONS`.

``RECORD`` keeps them beside what else a state holds, and ``REPLAY`` takes them.
"""

from __future__ import annotations

from layercomb.trees import Tree

DECISIONS = 'decisions'


def take_decisions(state: Tree) -> tuple[Tree, Tree]:
    """Separates a state from the decisions recorded in it, both with their paths."""
    return take_out(state, DECISIONS)


def put_decisions(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_decisions`."""
    return put_back(state, found, DECISIONS)


def take_out(state: Tree, reserved: str) -> tuple[Tree, Tree]:
    """Separates a state from what stands in it under a reserved key, both with their paths."""
    plain, found = {}, {}
    for key, value in state.items():
        if key == reserved:
            found[key] = value
        elif isinstance(value, dict):
            inner_plain, inner_found = take_out(value, reserved)
            if inner_plain or not inner_found:
                plain[key] = inner_plain
            if inner_found:
                found[key] = inner_found
        else:
            plain[key] = value
    return plain, found


def put_back(state: Tree, found: Tree, reserved: str) -> Tree:
    """The inverse of `take_out`."""
    out = dict(state)
    for key, value in found.items():
        inside = out.get(key, {})
        out[key] = value if key == reserved else put_back(inside, value, reserved)
    return out
