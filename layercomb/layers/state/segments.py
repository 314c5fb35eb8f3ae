"""Which positions of a packed row are of one document; the state tells layers.

Several documents share a row to waste no padding, and must not see each other. `Segmented` of the
transforms therefore puts `Segments` beside the state of every layer that declares
``sees_segments``, for one call. Such a layer reads them by `segments_of`.

Shape letters: B batch, L length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.state.counted import Told
from layercomb.layers.state.parts import own


class Segments(Told):
    """The document of each position, beside the state of a layer that mixes positions.

    A slice of the positions is not told: there, documents would seem to begin where it begins, and
    layers that work on each position by itself need not know.

    Attributes:
      ids: (B, L) int32, equal for positions of one document, and not decreasing along a row.
    """

    ids: jax.Array


def segments_of(state: Any) -> jax.Array | None:
    """The document of each position of a packed batch, which a layer finds beside its state.

    A layer of one's own that mixes positions sets ``sees_segments = True``, calls this, and lets a
    position depend on those with the same number alone. It hands its state on as it is.

    Args:
      state: the layer's.

    Returns:
      (B, L) int32, not decreasing along a row; None where each row is one sequence.

    >>> from layercomb import tl
    >>> print(tl.segments_of({}))
    None
    """
    found = own(state, Segments)
    return None if found is None else found.ids


def beginnings(state: Any) -> jax.Array | None:
    """Where a document begins, for a layer that carries something along a packed row.

    Args:
      state: the layer's.

    Returns:
      (L, B) bool, also True at the first position; None where each row is one sequence.
    """
    ids = segments_of(state)
    return None if ids is None else _is_first(ids).T


def places(ids: jax.Array) -> jax.Array:
    """The position of each token in its document, from 0: (B, L) int32.

    Args:
      ids: as of `Segments`.
    """
    return _at(ids) - _first(ids)


def runs(ids: jax.Array) -> jax.Array:
    """The number of each token's document in its row, counted from 0: (B, L) int32.

    Args:
      ids: as of `Segments`; neighbours of one number are one document.
    """
    new = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum(new, axis=1, dtype=jnp.int32)


def lengths(ids: jax.Array) -> jax.Array:
    """The length of each token's document: (B, L) int32.

    Args:
      ids: as of `Segments`.
    """
    is_last = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    last = lax.cummin(jnp.where(is_last, _at(ids), ids.shape[1]), axis=1, reverse=True)
    return last - _first(ids) + 1


def _at(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)


def _first(ids: jax.Array) -> jax.Array:
    """Where each token's document begins in its row, (B, L) int32."""
    return lax.cummax(jnp.where(_is_first(ids), _at(ids), 0), axis=1)


def _is_first(ids: jax.Array) -> jax.Array:
    """Whether a document begins at each position, (B, L) bool."""
    return jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
