"""Named trees: nested dicts of weights and state, whose leaves have paths.

Checkpoints, decay masks, frozen weights, sharding rules and conversions all use paths such as
``'block/residual/dense/kernel'``.

A state may hold values that are known by their type (`Typed`), such as an auxiliary loss. Paths and
files have no types: `plain` turns such values into arrays and dicts, and `typed` turns them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = dict[str, Any]


class Typed:
    """A value in a state that is known by its type: a pytree node."""

    def plain(self) -> Any:
        """The value without its type: an array, or nested dicts of arrays, as on disk."""
        raise NotImplementedError

    def filled(self, plain: Any) -> Any:
        """A value of the same type and structure with other arrays, in the form of `plain`."""
        raise NotImplementedError


def plain(tree: Any) -> Any:
    """A pytree with each `Typed` value replaced by arrays and dicts, at the same paths."""
    return jax.tree.map(lambda x: x.plain() if is_typed(x) else x, tree, is_leaf=is_typed)


def typed(tree: Any, like: Any) -> Any:
    """The inverse of `plain`.

    Args:
      tree: without types.
      like: a tree of the wanted structure, whose leaves do not matter.
    """
    return jax.tree.map(
        lambda kind, x: kind.filled(x) if is_typed(kind) else x, like, tree, is_leaf=is_typed
    )


def is_typed(x: Any) -> bool:
    """Whether x is `Typed`; for the argument `is_leaf` of JAX's functions."""
    return isinstance(x, Typed)


def flatten(tree: Mapping[str, Any] | Typed) -> dict[str, Any]:
    """A nested dict as one flat dict from paths to leaves, in sorted order of keys.

    `Typed` values are flattened as `plain` returns them.

    >>> flatten({'dense': {'kernel': 1, 'bias': 2}, 'scale': 3})
    {'dense/bias': 2, 'dense/kernel': 1, 'scale': 3}
    """
    flat = {}
    whole: Mapping[str, Any] = tree.plain() if isinstance(tree, Typed) else tree
    for key in sorted(whole):
        value = whole[key].plain() if isinstance(whole[key], Typed) else whole[key]
        if isinstance(value, Mapping):
            flat.update({f'{key}/{path}': leaf for path, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`.

    >>> unflatten({'dense/bias': 2, 'scale': 3})
    {'dense': {'bias': 2}, 'scale': 3}
    """
    tree: Tree = {}
    for path, leaf in flat.items():
        tree = put(tree, path, leaf)
    return tree


def get(tree: Mapping[str, Any], path: str) -> Any:
    """The leaf or subtree at `path`.

    Raises:
      KeyError: if there is nothing there; the message lists what there is at the deepest level
        that exists.
    """
    here: Any = tree
    for depth, key in enumerate(path.split('/')):
        here = here.plain() if isinstance(here, Typed) else here
        if not isinstance(here, Mapping) or key not in here:
            found = sorted(here) if isinstance(here, Mapping) else ['a leaf']
            where = '/'.join(path.split('/')[:depth]) or 'the root'
            raise KeyError(f'no {path!r} in the tree: at {where} there is {", ".join(found)}')
        here = here[key]
    return here


def put(tree: Mapping[str, Any], path: str, value: Any) -> Tree:
    """A copy of `tree` with `value` at `path`, which must be free.

    Raises:
      ValueError: if two weights would stand under one path.

    >>> put({'a': {'x': 1}}, 'a/y', 2)
    {'a': {'x': 1, 'y': 2}}
    """
    head, _, rest = path.partition('/')
    out = dict(tree)
    if not rest:
        if head in out:
            raise ValueError(f'two weights under one path, {path!r}: give one of them a name')
        out[head] = value
    else:
        below = out.get(head, {})
        if not isinstance(below, Mapping):
            raise ValueError(f'a weight and a subtree under one path, {head!r}: rename one')
        out[head] = put(below, rest, value)
    return out


def drop(tree: Mapping[str, Any], path: str) -> Tree:
    """A copy of `tree` without the leaf or subtree at `path`; emptied subtrees are removed.

    Raises:
      KeyError: if there is nothing at `path`.

    >>> drop({'a': {'x': 1}, 'b': 2}, 'a/x')
    {'b': 2}
    """
    get(tree, path)
    head, _, rest = path.partition('/')
    out = dict(tree)
    below = drop(out[head], rest) if rest else {}
    if below:
        out[head] = below
    else:
        del out[head]
    return out


def map_with_path(fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Any) -> Tree:
    """`fn(path, leaf, ...)` at every leaf; a leaf of `None` counts as absent and stays.

    >>> map_with_path(lambda path, x: f'{path}={x}', {'a': {'b': 1}})
    {'a': {'b': 'a/b=1'}}
    """

    def name(keys: tuple[Any, ...]) -> str:
        return '/'.join(str(k.key) for k in keys)

    made = jax.tree_util.tree_map_with_path(
        lambda k, *xs: fn(name(k), *xs), plain(tree), *map(plain, rest)
    )
    return typed(made, tree)


def count(tree: Any) -> int:
    """How many numbers the arrays (or signatures) of `tree` hold."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def n_bytes(tree: Any) -> int:
    """How many bytes the arrays (or signatures) of `tree` take; keys of random generators none."""
    leaves = [x for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in leaves)


NOT_DECAYED = ('bias', 'scale', 'gate_bias', 'up_bias')
MAGNITUDE = '_lora_magnitude'  # the end of the name of the norms of a matrix's columns


def decay_mask(weights: Tree) -> Tree:
    """True at the weights that weight decay should shrink: all but biases, scales and magnitudes.

    Goes by the leaf's name, since a bias under `Repeat` is stacked and has two axes. Made for
    ``optax.adamw(..., mask=trees.decay_mask)``.

    >>> decay_mask({'dense': {'kernel': 1.0, 'bias': 0.0}})
    {'dense': {'bias': False, 'kernel': True}}
    """

    def decays(path: str, _: Any) -> bool:
        name = path.split('/')[-1]
        return name not in NOT_DECAYED and not name.endswith(MAGNITUDE)

    return map_with_path(decays, weights)


def partition(weights: Tree, trainable: Callable[[str], bool] | None = None) -> tuple[Tree, Tree]:
    """Separates weights that train from frozen and integer ones.

    Args:
      weights: a nested dict of arrays.
      trainable: a predicate on paths; None lets every floating-point weight train.

    Returns:
      Two trees of the structure of `weights`, with None where the leaf is in the other one. JAX
      takes None for "no leaf", so the first can be differentiated and given to an optimizer.
    """

    def trains(path: str, x: Any) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating) and (trainable is None or trainable(path))

    yes = map_with_path(lambda path, x: x if trains(path, x) else None, weights)
    no = map_with_path(lambda path, x: None if trains(path, x) else x, weights)
    return yes, no


def merge(first: Tree, second: Tree) -> Tree:
    """The inverse of `partition`: each leaf from the tree in which it is not None."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
    )
