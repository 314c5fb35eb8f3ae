"""Masks from token ids."""

from __future__ import annotations

import jax.numpy as jnp

from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import check_rank, describe
from layercomb.trees import Tree


class PaddingMask(Layer):
    """ids ≠ pad: integers (B, L) → boolean (B, L), True where a position is real.

    Layers with ``masked=True`` take it as their second input:

    >>> from layercomb import tl
    >>> net = tl.Serial(
    ...     tl.Branch(tl.Embedding(16, 8), tl.PaddingMask()),
    ...     tl.SelfAttention(2, causal=False, masked=True),
    ... )
    >>> net.n_in, net.n_out
    (1, 1)

    Attributes:
      pad: the id of padding.

    Raises:
      TypeError: when applied to anything but integers.
      ValueError: when applied to another shape than (B, L).
    """

    pad: int = 0

    position_wise = True

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Integers (B, L) → boolean (B, L)."""
        (ids,) = inputs
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(
                f'PaddingMask takes token ids, integers, got {describe([ids])}: give it what the '
                'embedding is given'
            )
        check_rank('PaddingMask', ids, 'token ids (batch, length)', 2)
        limits = jnp.iinfo(ids.dtype)
        if not limits.min <= self.pad <= limits.max:  # no such id can be there
            return (jnp.ones(ids.shape, bool),), state
        return (ids != jnp.asarray(self.pad, ids.dtype),), state
