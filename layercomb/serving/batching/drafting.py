"""Drafts for a row that is decoded alone: by lookup in its text, or by a smaller model.

A check of a draft reads 1 + k positions of each row. That pays while reading the weights takes most
of the time, so while few rows are decoded: the scheduler asks for drafts where one row is alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError
from layercomb.serving.batching.programs import Rows
from layercomb.serving.batching.slots import Decodable
from layercomb.supervised.decoding.axes import BLOCK, Leaves
from layercomb.supervised.decoding.drafts import (
    NO_DRAFT,
    Lookup,
    Speculation,
    check_can_go_back,
    check_speculation,
    check_vocabulary,
)

_SIZES = (4 * BLOCK, BLOCK, 1)  # pieces in which a draft's model reads


class Drafter(Protocol):
    """What makes drafts for one row at a time.

    Attributes:
      n_draft: k, how many tokens a draft has.
    """

    n_draft: int

    def draft(self, ids: Sequence[int], row: Rows) -> jax.Array | None:
        """A draft (1, k) int32; None if there is none.

        Args:
          ids: prompt and what was made, at least two tokens.
          row: how its tokens are drawn, without leaves.
        """

    def clear(self) -> None:
        """Drops what is kept on the device."""


def drafter(model: Decodable, speculate: Speculation) -> Drafter:
    """What makes the drafts of a server.

    Args:
      model: what is served.
      speculate: a `Lookup` or a `Draft`.

    Raises:
      TypeError: if it is neither.
      UsageError: as `drafts.check_can_go_back`, of both models; if they have other vocabularies.
    """
    check_speculation(speculate)
    check_can_go_back(model.net, model.trained)
    if isinstance(speculate, Lookup):
        return ByLookup(speculate)
    try:
        small = Decodable.of(speculate.model)
    except UsageError as e:
        raise UsageError(f'the draft model: {e}') from None
    check_can_go_back(small.net, small.trained, 'the draft model')
    check_vocabulary(model.vocab_size, small.vocab_size)
    return ByModel(small, speculate.n_draft)


class ByLookup:
    """Drafts that are copied from the text.

    Args:
      lookup: how.
    """

    def __init__(self, lookup: Lookup) -> None:
        self.n_draft = lookup.n_draft
        self._run = jax.jit(lookup.drafts)

    def draft(self, ids: Sequence[int], row: Rows) -> jax.Array | None:
        """As of `Drafter`."""
        del row
        room = max(8 * BLOCK, 1 << (len(ids) - 1).bit_length())  # few programs
        text = np.zeros((1, room), np.int32)
        text[0, : len(ids)] = ids
        made = self._run(text, np.full(1, len(ids), np.int32))
        return None if int(made[0, 0]) == NO_DRAFT else made

    def clear(self) -> None:
        """As of `Drafter`: there is nothing."""


class ByModel:
    """Drafts of a smaller model, which reads the texts as far as it has not read them.

    Args:
      model: it.
      n_draft: k.
    """

    def __init__(self, model: Decodable, n_draft: int) -> None:
        self.n_draft = n_draft
        self._model = model
        self.clear()

    def clear(self) -> None:
        """As of `Drafter`."""
        self._leaves: Leaves | None = None
        self._room = 0
        self._known: list[int] = []  # the tokens of the first positions of the state
        self._drafts: jax.Array | None = None  # which come after them, but the last

    def draft(self, ids: Sequence[int], row: Rows) -> jax.Array | None:
        """As of `Drafter`; None where the text is longer than this model reaches."""
        needed, limit = len(ids) + self.n_draft, self._model.max_len
        if limit is not None and needed > limit:
            return None
        if self._drafts is not None:
            self._known += np.asarray(self._drafts)[0, :-1].tolist()
            self._drafts = None
        leaves = self._read(list(ids[:-2]), self._fitted(needed))
        self._leaves = None  # donated
        pair, taken = np.asarray([ids[-2:]], np.int32), np.full(1, len(ids) - 2, np.int32)
        run, weights = self._model.programs, self._model.weights
        drafts, self._leaves = run.draft(weights, leaves, pair, taken, row, self.n_draft)
        self._known, self._drafts = list(ids), drafts
        return drafts

    def _fitted(self, needed: int) -> Leaves:
        """The state, with room for so many positions."""
        if self._leaves is None or needed > self._room:
            self._room = self._model.room(needed)
            leaves = self._model.fresh if self._leaves is None else self._leaves
            self._known = [] if self._leaves is None else self._known
            order = np.zeros(1, np.int32)
            self._leaves = self._model.programs.moved_leaves(leaves, order, self._room)
        return self._leaves

    def _read(self, ids: list[int], leaves: Leaves) -> Leaves:
        """The state after a text, of which what it has read before is not read again."""
        pairs = enumerate(zip(ids, self._known, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(self._known)))
        run, fresh, none = self._model.programs, self._model.fresh, np.int32(0)
        self._leaves = None  # donated
        leaves = run.begin(leaves, fresh, [], np.int32(at), none)
        while at < len(ids):
            left, fits = len(ids) - at, self._room - at
            size = next(size for size in _SIZES if size <= max(left, BLOCK) and size <= fits)
            n_real = min(size, left)
            padded = np.zeros((1, size), np.int32)
            padded[0, :n_real] = ids[at : at + n_real]
            _, leaves = run.read(self._model.weights, leaves, padded, at, n_real)
            at += n_real
        return leaves


def no_draft(n_draft: int) -> jax.Array:
    """A draft (1, k) that is refused."""
    return jnp.full((1, n_draft), NO_DRAFT, jnp.int32)
