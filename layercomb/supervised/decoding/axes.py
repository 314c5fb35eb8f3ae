"""The axes of a decoding state, so that rows of a batch can be set, moved, and kept in pieces.

A state is any tree: keys and values (B·H, L, K), positions (B,), rings, a user's own memory. Which
axis belongs to the rows and which to the positions is found by comparing the shapes of states for
other numbers of rows and other lengths.

States are flat lists of leaves here, since flattening nested dicts at each token takes longer than
a small model does. Shape letters: B rows, L positions that there is room for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.seek import Position, Seekable, seek
from layercomb.shapes import is_float, shape_dtype
from layercomb.supervised.decoding.prompts import longest
from layercomb.supervised.decoding.reading.ingesting import fresh_state
from layercomb.trees import Tree

BLOCK = 64  # positions in a block, see `Axes.block`
Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of one leaf of a state.

    Attributes:
      row: the axis of the rows, on which each row has `width` places; None if rows share the leaf.
      width: places of one row.
      length: the axis of the positions; None if there is none.
      beyond: places on that axis besides the positions.
      is_position: whether it tells where rows stand.
      is_made_again: whether `seek` makes it from other leaves.
    """

    row: int | None
    width: int
    length: int | None
    beyond: int
    is_position: bool
    is_made_again: bool


@dataclasses.dataclass(frozen=True)
class Axes:
    """The leaves of a model's decoding state.

    Attributes:
      structure: of the tree.
      leaves: what is known of each.
      can_seek: whether rows can be moved back to any earlier position: then prompts may be padded.
    """

    structure: Any
    leaves: tuple[Leaf, ...]
    can_seek: bool

    def memory(self) -> str | None:
        """The path of something that a row remembers whole, so that it cannot go back; or None."""
        return self._path(_is_rest)

    def made_again(self) -> str | None:
        """The path of a cache of which a part is made again wherever a row goes; or None."""
        return self._path(lambda leaf: leaf.is_made_again and leaf.length is not None)

    def _path(self, is_meant: Callable[[Leaf], bool]) -> str | None:
        named = jax.tree_util.tree_leaves_with_path(self.tree(self.leaves))  # type: ignore[arg-type]
        paths = (path for path, leaf in named if is_meant(leaf))
        found = next(paths, None)
        return None if found is None else jax.tree_util.keystr(found, simple=True, separator='/')

    def tree(self, leaves: Sequence[jax.Array]) -> Tree:
        """The state as a tree, from its leaves."""
        made: Tree = jax.tree.unflatten(self.structure, leaves)
        return made

    def sought(self, leaves: Sequence[jax.Array], positions: jax.Array) -> Leaves:
        """The leaves with the rows at other positions (B,)."""
        return jax.tree.leaves(seek(self.tree(leaves), positions))

    def parked(self, leaves: Sequence[jax.Array], active: jax.Array) -> Leaves:
        """The leaves with the rows that are not active at position 0, where they cost least.

        Args:
          leaves: of B rows.
          active: (B,) bool.
        """
        found = zip(self.leaves, leaves, strict=True)
        return [jnp.where(active, x, 0) if leaf.is_position else x for leaf, x in found]

    def moved(self, leaves: Sequence[jax.Array], rows: jax.Array, room: int) -> Leaves:
        """Chosen rows, with room for another number of positions.

        Args:
          leaves: of any number of rows.
          rows: (B,) int32, the rows wanted.
          room: L, the new one; positions from it on are lost, and new ones are zeros.
        """
        return [_moved(leaf, x, rows, room) for leaf, x in zip(self.leaves, leaves, strict=True)]

    def placed(
        self, leaves: Sequence[jax.Array], row: jax.Array, one: Sequence[jax.Array], n_blocks: Any
    ) -> Leaves:
        """The leaves with one row replaced: its first `n_blocks` blocks, and all else.

        Args:
          leaves: of B rows.
          row: int32 (), which.
          one: of 1 row, with as much room.
          n_blocks: int32 (), how many blocks of positions to copy.
        """
        out = list(leaves)
        for i, (leaf, x) in enumerate(zip(self.leaves, one, strict=True)):
            if leaf.row is not None and leaf.length is None:
                out[i] = jax.lax.dynamic_update_slice_in_dim(out[i], x, row * leaf.width, leaf.row)
        zero = jnp.int32(0)

        def copy(i: jax.Array, out: Leaves) -> Leaves:
            return self.put_block(out, row, i, self.block(one, zero, i))

        return jax.lax.fori_loop(zero, jnp.int32(n_blocks), copy, out)

    def block(self, leaves: Sequence[jax.Array], row: jax.Array, number: jax.Array) -> Leaves:
        """What one row keeps of a block of `BLOCK` positions: a slice of each leaf with positions.

        Caches may hold places before and after the positions, so the slices of neighbouring blocks
        overlap by as many.

        Args:
          leaves: of B rows.
          row: int32 (), which.
          number: int32 (), of the block.
        """
        made = []
        for leaf, x in zip(self.leaves, leaves, strict=True):
            if leaf.row is not None and leaf.length is not None:
                start, sizes = _where(leaf, x, row, number)
                made.append(jax.lax.dynamic_slice(x, start, sizes))
        return made

    def put_block(
        self, leaves: Sequence[jax.Array], row: jax.Array, number: jax.Array, block: Leaves
    ) -> Leaves:
        """The leaves with a block of one row replaced; arguments as of `block`, which made it.

        Blocks are put in their order, since the last places of one belong to the next.
        """
        out, pieces = list(leaves), iter(block)
        for i, (leaf, x) in enumerate(zip(self.leaves, leaves, strict=True)):
            if leaf.row is not None and leaf.length is not None:
                start, _ = _where(leaf, x, row, number)
                out[i] = jax.lax.dynamic_update_slice(x, next(pieces), start)
        return out

    def rest(self, leaves: Sequence[jax.Array]) -> Leaves:
        """What a state of 1 row holds besides blocks and positions: the memory after the last one.

        It is needed, with the blocks, to go on from there. Empty if the blocks tell all.
        """
        return [x for leaf, x in zip(self.leaves, leaves, strict=True) if _is_rest(leaf)]

    def reset(self, leaves: Sequence[jax.Array], fresh: Sequence[jax.Array]) -> Leaves:
        """The leaves of 1 row at its beginning, without touching what positions have left.

        Args:
          leaves: of 1 row.
          fresh: of 1 row, as `begun` gives them.
        """
        found = zip(self.leaves, leaves, fresh, strict=True)
        return [x if leaf.length is not None else new for leaf, x, new in found]

    def put_rest(self, leaves: Sequence[jax.Array], rest: Leaves) -> Leaves:
        """The leaves with what `rest` gave."""
        found, pieces = zip(self.leaves, leaves, strict=True), iter(rest)
        return [next(pieces) if _is_rest(leaf) else x for leaf, x in found]


def begun(net: Layer, trained: Tree) -> tuple[Axes, Leaves]:
    """The axes of a model's decoding state, and the leaves of one row that has taken nothing.

    Args:
      net: a language model, (B, L) → (B, L, V), unstacked.
      trained: the state that training left.

    Raises:
      UsageError: as `axes_of`.
    """
    axes, (room, _) = axes_of(net, trained), _lengths(net)
    fresh = jax.tree.leaves(jax.jit(_fresh(net, 1, room))(trained))
    return axes, fresh


def axes_of(net: Layer, trained: Tree) -> Axes:
    """The axes of a model's decoding state; nothing is computed.

    Args:
      net: as of `begun`.
      trained: the state that training left, or its shapes.

    Raises:
      UsageError: as `fresh_state`; if the model counts something for all rows together, or if an
        axis of its state depends on both the number of rows and the length.
    """
    room, other = _lengths(net)
    sizes = (1, room), (2, room), (1, other)
    one, *others = (jax.eval_shape(_fresh(net, *size), trained) for size in sizes)
    _check_counts(net, one, others[0])
    shapes = [[x.shape for x in jax.tree.leaves(tree)] for tree in (one, *others)]
    found = zip(*shapes, _owners(one), strict=True)
    leaves = tuple(_leaf(a, b, c, (room, other), owner) for a, b, c, owner in found)
    return Axes(jax.tree.structure(one), leaves, not any(map(_is_rest, leaves)))


def _lengths(net: Layer) -> tuple[int, int]:
    """Two lengths that a state may have."""
    limit = longest(net)
    room = BLOCK if limit is None else min(BLOCK, limit)
    return room, 2 * room if limit is None or 2 * room <= limit else max(1, room // 2)


def _fresh(net: Layer, n_rows: int, length: int) -> Callable[[Tree], Tree]:
    """From the state that training left to a fresh one, for so many rows and positions."""
    return lambda trained: fresh_state(net, trained, (shape_dtype((n_rows, length), 'int32'),))


def _leaf(
    one: Any, two: Any, longer: Any, lengths: tuple[int, int], owner: tuple[bool, bool]
) -> Leaf:
    """What is known of a leaf from its shapes: of 1 and 2 rows, and of another length."""
    rows = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    along = [i for i, (a, b) in enumerate(zip(one, longer, strict=True)) if a != b]
    more = lengths[1] - lengths[0]
    grows = all(longer[i] - one[i] == more for i in along)
    if len(rows) > 1 or len(along) > 1 or not grows or (along and along == rows):
        raise UsageError(
            f'decoding together needs a state with an axis for rows and another one for positions, '
            f'such as (B, L, D): one of this model has the shape {list(one)} for 1 row and '
            f'{lengths[0]} positions, {list(two)} for 2 rows, and {list(longer)} for {lengths[1]} '
            'positions'
        )
    row, length = (next(iter(found), None) for found in (rows, along))
    width = 1 if row is None else one[row]
    beyond = 0 if length is None else one[length] - lengths[0]
    return Leaf(row, width, length, beyond, *owner)


def _owners(state: Tree) -> list[tuple[bool, bool]]:
    """For each leaf: whether it is a position, and whether a part's own `seek` makes it again."""
    found: list[tuple[bool, bool]] = []

    def visit(part: Any, made_again: bool) -> None:
        is_position = isinstance(part, Position)
        own = isinstance(part, Seekable) and type(part).seek is not Seekable.seek
        made_again = made_again or (own and not is_position)
        inner = jax.tree.leaves(part, is_leaf=lambda x: isinstance(x, Seekable) and x is not part)
        for x in inner:
            if isinstance(x, Seekable):
                visit(x, made_again)
            else:
                found.append((is_position, made_again))

    visit(state, False)
    return found


def _check_counts(net: Layer, one: Tree, two: Tree) -> None:
    """Raises a UsageError if rows share a count, which moves on while they are decoded."""
    of_training = jax.eval_shape(
        lambda: net.init((shape_dtype((1, 1), 'int32'),), jax.random.key(0), Mode.TRAIN)[1]
    )
    known = {path for path, _ in jax.tree_util.tree_leaves_with_path(of_training)}
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True)
    for (path, x), y in pairs:
        if x.shape == y.shape and not is_float(x) and path not in known:
            name = jax.tree_util.keystr(path, simple=True, separator='/')
            raise UsageError(
                f'decoding: {name!r} counts for all rows together, and requests that are decoded '
                'together stand at different positions: keep a tl.Position'
            )


def _is_rest(leaf: Leaf) -> bool:
    own = leaf.row is not None and leaf.length is None
    return own and not leaf.is_position and not leaf.is_made_again


def _moved(leaf: Leaf, x: jax.Array, rows: jax.Array, room: int) -> jax.Array:
    if leaf.row is None:
        return x
    places = (rows[:, None] * leaf.width + np.arange(leaf.width, dtype=np.int32)[None]).reshape(-1)
    x = jnp.take(x, places, leaf.row, mode='clip')
    if leaf.length is None:
        return x
    size = room + leaf.beyond
    x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[leaf.length]), axis=leaf.length)
    widths = [(0, 0)] * x.ndim
    widths[leaf.length] = 0, size - x.shape[leaf.length]
    return jnp.pad(x, widths)


def _where(leaf: Leaf, x: jax.Array, row: jax.Array, number: jax.Array) -> tuple[Any, list[int]]:
    """Where a block of a row starts in a leaf, and the sizes of its slice."""
    assert leaf.row is not None and leaf.length is not None
    start, sizes = [jnp.int32(0)] * x.ndim, list(x.shape)
    start[leaf.row], sizes[leaf.row] = row * leaf.width, leaf.width
    start[leaf.length] = number * BLOCK
    sizes[leaf.length] = min(BLOCK + leaf.beyond, x.shape[leaf.length])
    return start, sizes
