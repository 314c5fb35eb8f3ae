"""The compiled programs of the engine: they read a piece of a prompt, or make a token for each row.

States are flat lists of leaves, see `axes`; those that a program changes are donated to it, so that
caches are updated in place. Shape letters: B rows, T tokens of a piece, V vocabulary, N
alternatives.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.supervised.decoding.axes import Axes, Leaves
from layercomb.supervised.decoding.keys import fold_each
from layercomb.supervised.decoding.reading.ingesting import at_one_position, logits_of
from layercomb.supervised.decoding.sampling import NO_TOKEN, Sampler
from layercomb.supervised.decoding.scoring import Alternatives, alternatives
from layercomb.supervised.decoding.speculating import drafted, judged
from layercomb.transforms.low_rank.many import put_adapters


class Rows(NamedTuple):
    """Rows that are being decoded.

    Attributes:
      leaves: of their state.
      token: (B,) int32, the last one of each.
      held: (B, V) int32, see `Sampler`.
      keys: (B, …) uint32, the data of the keys of rows.
      step: (B,) int32, how many tokens each has made.
      sampler: with one number a row.
    """

    leaves: Leaves
    token: jax.Array
    held: jax.Array
    keys: jax.Array
    step: jax.Array
    sampler: Sampler


class Drawn(NamedTuple):
    """What was drawn for rows.

    Attributes:
      token: (B,) int32.
      scores: of the tokens; zeros if nobody wants them.
    """

    token: jax.Array
    scores: Alternatives


class Programs:
    """The programs of one model; each compiles for each size it is called with.

    Args:
      net: the model, unstacked.
      weights: the structure of its weights.
      axes: of its state.
    """

    def __init__(self, net: Layer, weights: Any, axes: Axes) -> None:
        self._net, self._weights, self._axes = net, weights, axes
        self._at_end = at_one_position(net)
        self.read = jax.jit(self._read, donate_argnums=1)
        self.read_scored = jax.jit(self._read_scored, donate_argnums=1)
        self.step = jax.jit(self._step, donate_argnums=1)
        self.first = jax.jit(self._first)
        self.check = jax.jit(self._check, donate_argnums=1)
        self.draft = jax.jit(self._draft, donate_argnums=1, static_argnums=5)
        self.place = jax.jit(self._place, donate_argnums=0)
        self.moved = jax.jit(self._moved, static_argnums=2)
        self.moved_leaves = jax.jit(axes.moved, static_argnums=2)
        self.block = jax.jit(axes.block)
        self.put_block = jax.jit(self._put_block, donate_argnums=0)
        self.begin = jax.jit(self._begin, donate_argnums=0)

    def _read(
        self, weights: Leaves, leaves: Leaves, tokens: jax.Array, taken: Any, n_real: Any
    ) -> tuple[jax.Array, Leaves]:
        """Logits (1, V) after a piece (1, T), of which `n_real` tokens count, and the leaves."""
        state, at = self._axes.tree(leaves), jnp.reshape(n_real - 1, 1)
        if self._at_end is None:
            logits, state = self._apply(weights, state, tokens)
            logits = jnp.take_along_axis(logits, at[:, None, None], 1)
        else:
            (logits,), state = self._at_end.apply(
                self._tree(weights), state, (tokens, at), mode=Mode.PREDICT
            )
        return logits[:, 0], self._read_to(state, taken + n_real)

    def _read_scored(
        self,
        weights: Leaves,
        leaves: Leaves,
        tokens: jax.Array,
        taken: Any,
        n_real: Any,
        targets: jax.Array,
    ) -> tuple[jax.Array, Leaves, Alternatives]:
        """As `_read`, and the scores (T, …) of the targets (1, T), the tokens that come next."""
        logits, state = self._apply(weights, self._axes.tree(leaves), tokens)
        last = jax.lax.dynamic_index_in_dim(logits, n_real - 1, 1, keepdims=False)
        return last, self._read_to(state, taken + n_real), alternatives(logits[0], targets[0])

    def _step(
        self, weights: Leaves, rows: Rows, active: jax.Array, wants_scores: jax.Array
    ) -> tuple[Drawn, Rows]:
        """The next token of each row; `active` (B,) bool says which rows are in use."""
        state = self._axes.tree(self._axes.parked(rows.leaves, active))
        token = jnp.maximum(rows.token, 0)
        logits, state = self._apply(weights, state, token[:, None])
        logits, keys = logits[:, 0], jax.random.wrap_key_data(rows.keys)
        drawn = _drawn(rows.sampler, logits, rows.held, fold_each(keys, rows.step), wants_scores)
        return drawn, rows._replace(
            leaves=jax.tree.leaves(state),
            token=drawn.token,
            held=rows.sampler.add(rows.held, drawn.token),
            step=rows.step + 1,
        )

    def _check(
        self, weights: Leaves, rows: Rows, drafts: jax.Array, taken: jax.Array, most: jax.Array
    ) -> tuple[jax.Array, jax.Array, Rows]:
        """What is accepted of the drafts of rows, all of them in use, and one token more.

        Args:
          weights: of the model.
          rows: B rows.
          drafts: (B, k) int32.
          taken: (B,) int32, how many positions each row has taken.
          most: (B,) int32, the most tokens that each may get.

        Returns:
          (tokens, n_made, rows): (B, 1 + k) int32, (B,) int32, see `speculating.Judged`.
        """
        state = self._axes.tree(rows.leaves)
        read = jnp.maximum(jnp.concatenate([rows.token[:, None], drafts], 1), 0)
        logits, state = self._apply(weights, state, read)
        keys = jax.random.wrap_key_data(rows.keys)
        drawn = rows.sampler, logits, keys, rows.step, rows.held
        found = judged(*drawn, drafts, most, jnp.int32(-1))
        last = jnp.take_along_axis(found.tokens, found.n_made[:, None] - 1, 1)[:, 0]
        rows = rows._replace(
            leaves=self._axes.sought(jax.tree.leaves(state), taken + found.n_made),
            token=last,
            held=found.held,
            step=rows.step + found.n_made,
        )
        return found.tokens, found.n_made, rows

    def _draft(
        self,
        weights: Leaves,
        leaves: Leaves,
        pair: jax.Array,
        taken: jax.Array,
        rows: Rows,
        n_draft: int,
    ) -> tuple[jax.Array, Leaves]:
        """What this model drafts for rows of another one, whose leaves are left out.

        Args:
          weights: of this model.
          leaves: of B rows, which have taken `taken` (B,) positions.
          pair: (B, 2) int32, the tokens that come next.
          taken: how many positions rows have taken.
          rows: of the other model.
          n_draft: k.

        Returns:
          (B, k) int32 and the leaves; see `speculating.drafted`.
        """

        def run(state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
            return self._apply(weights, state, tokens)

        state = self._axes.tree(self._axes.sought(leaves, taken))
        drawn = rows.sampler, jax.random.wrap_key_data(rows.keys), rows.step, rows.held
        drafts, state = drafted(run, state, pair, n_draft, *drawn)
        return drafts, jax.tree.leaves(state)

    def _first(
        self, logits: jax.Array, held: jax.Array, keys: jax.Array, sampler: Sampler, wants: Any
    ) -> tuple[Drawn, jax.Array]:
        """The first token of one row, and what it then holds."""
        step = jnp.zeros(1, jnp.int32)
        folded = fold_each(jax.random.wrap_key_data(keys), step)
        drawn = _drawn(sampler, logits, held, folded, wants)
        return drawn, sampler.add(held, drawn.token)

    def _place(self, rows: Rows, slot: jax.Array, one: Rows, n_blocks: jax.Array) -> Rows:
        """The rows with row `slot` replaced by `one`, of which the first blocks are copied."""
        leaves = self._axes.placed(rows.leaves, slot, one.leaves, n_blocks)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), slot, 0)

        rest = jax.tree.map(put, rows._replace(leaves=[]), one._replace(leaves=[]))
        made: Rows = rest._replace(leaves=leaves)
        return made

    def _moved(self, rows: Rows, order: jax.Array, room: int) -> Rows:
        """The rows in another order and number, with another room."""
        leaves = self._axes.moved(rows.leaves, order, room)
        rest = jax.tree.map(lambda x: jnp.take(x, order, 0, mode='clip'), rows._replace(leaves=[]))
        made: Rows = rest._replace(leaves=leaves)
        return made

    def _put_block(self, leaves: Leaves, number: jax.Array, block: Leaves) -> Leaves:
        return self._axes.put_block(leaves, jnp.int32(0), number, block)

    def _begin(
        self, leaves: Leaves, fresh: Leaves, rest: Leaves, taken: jax.Array, adapter: Any
    ) -> Leaves:
        """The leaves of 1 row whose blocks hold `taken` positions; `rest` is empty or theirs."""
        leaves = self._axes.reset(leaves, fresh)
        leaves = self._axes.put_rest(leaves, rest) if rest else leaves
        state = put_adapters(self._axes.tree(leaves), jnp.reshape(jnp.int32(adapter), 1))
        return self._axes.sought(jax.tree.leaves(state), jnp.reshape(taken, 1))

    def _read_to(self, state: Any, taken: jax.Array) -> Leaves:
        return self._axes.sought(jax.tree.leaves(state), jnp.reshape(taken, 1))

    def _apply(self, weights: Leaves, state: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        made, state = self._net.apply(self._tree(weights), state, (tokens,), mode=Mode.PREDICT)
        return logits_of(made), state

    def _tree(self, weights: Leaves) -> Any:
        return jax.tree.unflatten(self._weights, weights)


@functools.lru_cache(maxsize=8)
def programs(net: Layer, weights: Any, axes: Axes) -> Programs:
    """The programs of a model, the same ones for all engines that serve it; see `Programs`."""
    return Programs(net, weights, axes)


def _drawn(
    sampler: Sampler, logits: jax.Array, held: jax.Array, keys: jax.Array, wants_scores: jax.Array
) -> Drawn:
    token = sampler(logits, keys, held)

    def scored(logits: jax.Array) -> Alternatives:
        return alternatives(logits, jnp.maximum(token, 0))

    shapes = jax.eval_shape(scored, logits)
    scores = jax.lax.cond(
        wants_scores,
        scored,
        lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        logits,
    )
    return Drawn(token, scores)


__all__ = ['NO_TOKEN', 'Drawn', 'Programs', 'Rows', 'programs']
