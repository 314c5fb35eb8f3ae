"""What layers are told for one call, beside their states; and which positions count in training.

Some layers must know what is no input of theirs. A `Told` is put beside their states for one call,
and taken out of the new state. A layer that loops over its state or its positions takes it out
first (`take_counted`), and puts it into each slice (`put_counted`): of whatever kind it is, it is
the same for all blocks of a `Repeat`.

* `Counted`: averages over positions inside a model (a mixture's balance, the statistics of
  `BatchNorm`) must leave out padding as the loss does, but only the loss is given loss weights.
  `losses.apply_counted` tells every layer that declares ``counts_positions``, which reads it by
  `counted_positions`.
* `segments.Segments`: which positions are of one document.

Shape letters: B batch, L length, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Layer
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.sequence import any_position
from layercomb.layers.state.parts import Part, beside, own, put_back, take_out, without
from layercomb.trees import Tree


class Told(Part):
    """Base of what layers are told for one call: their states get it, their weights do not."""

    def inside(self, layer: Layer) -> Told:
        """What is told to the layers inside `layer`, which is told this: the same by default."""
        return self

    def sliced(self, shape: tuple[int, ...]) -> Told | None:
        """The same with arrays that can be cut along axis 1, for values that are.

        Args:
          shape: (B, L) of the values.

        Returns:
          None, by default, if it has no meaning for a slice; no layer is then told.
        """
        return None


class Counted(Told):
    """Which positions count, beside the state of a layer that averages over them.

    Attributes:
      mask: (B, …) bool.
    """

    mask: jax.Array

    def inside(self, layer: Layer) -> Counted:
        """Where the positions are others, all of a row count if one of its positions does."""
        if not (isinstance(layer, Wrapper) and layer.reads_memory):
            return self
        return Counted(_of_rows(self.mask))

    def sliced(self, shape: tuple[int, ...]) -> Counted | None:
        """A mask of the shape (B, L); None if it has another batch size."""
        fits = self.mask if self.mask.shape[:2] == shape else _fitted(self.mask, shape)
        return None if fits is None else Counted(fits)


def tell(net: Layer, wants: Callable[[Layer], bool], told: Told) -> Tree:
    """What `put_counted` puts into the state of a model, to tell its layers something.

    Args:
      net: the model. A layer inside that does not say ``carries_counted`` keeps what is in it from
        knowing.
      wants: whether a layer is to be told.
      told: what.
    """
    given = beside({}, told) if wants(net) else {}
    for key, layer in net.children if net.carries_counted else ():
        if inner := tell(layer, wants, told.inside(net)):
            given = put_back(given, {key: inner} if key else inner)
    return given


def count_only(state: Tree, mask: jax.Array) -> Tree:
    """One layer's state with a mask of the positions that count, for `counted_positions`.

    `losses.apply_counted` does this for all layers of a model.

    Args:
      state: the layer's.
      mask: (B, …) bool.
    """
    return beside(state, Counted(mask))


def counted_positions(state: Tree, x: jax.Array) -> tuple[Tree, jax.Array | None]:
    """Separates a layer's state from the mask of the positions that count, made to fit its input.

    A layer of one's own that averages over positions sets ``counts_positions = True``, and calls
    this first in training. All entries of the mask may be False: avoid a mean of 0 / 0.

    Args:
      state: the layer's.
      x: (…, D), its input.

    Returns:
      The state without the mask, and the mask: a boolean array of ``x.shape[:-1]``, True where the
      position's loss weight is not 0. If x has another length than the loss weights (pooled,
      strided, joined to others), a whole row is True if any of its weights is not 0. The mask is
      None, and all positions count, if the state has none, or if the batch sizes differ.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> tl.counted_positions({'mean': 0.0}, jnp.ones((2, 3, 4)))
    ({'mean': 0.0}, None)
    """
    counted = own(state, Counted)
    if counted is None:
        return state, None
    return without(state, Counted), _fitted(counted.mask, x.shape[:-1])


def take_counted(state: Tree) -> tuple[Tree, Tree]:
    """Splits a state into (the state as it was made, a tree of what layers are told), at the paths.

    Layers are told for one call which positions count, and which are of one document. A layer of
    one's own that loops over its state or its positions takes that out first, and puts it into each
    slice by `put_counted`. It then sets ``carries_counted = True``.
    """
    return take_out(state, Told)


def put_counted(state: Tree, found: Tree) -> Tree:
    """The inverse of `take_counted`: `state` with what layers are told put in."""
    return put_back(state, found)


def along_length(found: Tree, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, with arrays (B, L, …) that can be sliced along axis 1.

    Args:
      found: a tree of `Told`.
      shape: (B, L) of the values to be sliced. What has no meaning for a slice is left out.
    """
    made: Tree = {}
    for key, value in found.items():
        inner = along_length(value, shape) if isinstance(value, dict) else value.sliced(shape)
        made |= {key: inner} if inner else {}
    return made


def after_memory(found: Tree, real: jax.Array, shape: tuple[int, ...]) -> Tree:
    """What `take_counted` found, with a memory's positions put in front: (B, L) → (B, M + L).

    Args:
      found: a tree of `Counted`.
      real: (B, M) boolean, which positions of the memory are real. They count in every row in
        which any other position counts.
      shape: (B, L), of the positions after the memory. An array of another shape is unchanged.
    """

    def one(counted: jax.Array) -> jax.Array:
        if counted.shape != shape:
            return counted
        return jnp.concatenate([real & counted.any(1, keepdims=True), counted], 1)  # (B, M + L)

    return jax.tree.map(one, found)


def _of_rows(counted: jax.Array) -> jax.Array:
    """(B, …) → (B,): whether any position of a row counts, on other devices too."""
    axes = tuple(range(1, counted.ndim))
    return any_position(counted, axes) if axes else counted


def _fitted(counted: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """(B, …) as `shape`; None if the rows differ."""
    shared = min(counted.ndim, len(shape))
    if counted.shape[:1] != shape[: min(counted.ndim, 1)]:
        return None
    if counted.shape[:shared] != shape[:shared]:
        shared = 1
    counted = _of_rows(counted) if shared == 1 else counted.any(tuple(range(shared, counted.ndim)))
    wider = counted.reshape(counted.shape + (1,) * (len(shape) - shared))
    return jnp.broadcast_to(wider, shape)
