"""Beam search: the likeliest continuations, several candidates at a time.

Shape letters: B rows, K beams, V vocabulary, N hypotheses returned, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Bound, Size, check_value
from layercomb.model import Model
from layercomb.supervised.decoding.prompts import (
    Sequences,
    Start,
    advance,
    as_id,
    begin,
    fresh_state,
    ingest,
)
from layercomb.supervised.decoding.sampling import diverged, has_probabilities
from layercomb.trees import Tree

_PENALTY = Annotated[float, Bound(-10, high=10)]
_LOW, _NONE = -1e30, -1e29  # the total of a place without a beam, and what is above it


class Beams(NamedTuple):
    """What a beam search found, the best first.

    Attributes:
      tokens: (B, N, T) int32, without the prompts, filled up with `eos_id`.
      scores: (B, N) float32. N is `n_best`, or less where no row has so many hypotheses; −∞ says
        that a row has fewer than another, and that there is none.
    """

    tokens: np.ndarray
    scores: np.ndarray


def beam_search(
    model: Model,
    prompts: Sequences,
    n_tokens: int,
    *,
    inputs: Sequences | None = None,
    n_beams: int = 4,
    n_best: int = 1,
    length_penalty: float = 1.0,
    eos_id: int | None = None,
) -> Beams:
    """The likeliest continuations of each prompt that a search of limited width finds.

    A hypothesis ends with `eos_id`, or has `n_tokens` tokens. One of T tokens, the last included,
    has the score::

        Σ_t log p(y_t | prompt, y_<t) / T ** length_penalty

    Hypotheses that have ended are kept apart from live ones, so that they take no places in the
    beam. The search stops when no live one can still come among the best. One beam without an
    `eos_id` is greedy decoding; with an `eos_id` it goes on past an end, for a better score.

    Args:
      model, prompts, n_tokens, inputs, eos_id: as in `decoding.generate`.
      n_beams: K, how many live hypotheses a row keeps.
      n_best: N ≤ K, how many a row returns, if there are so many.
      length_penalty: 0 favours short hypotheses, for each token costs; 1 takes the mean.

    Returns:
      `Beams`.

    Raises:
      TypeError: if a number is none.
      ValueError: if one is out of its range.
      UsageError: as `decoding.generate`.

    References:
      Wu et al., length normalization in section 7, 2016, https://arxiv.org/abs/1609.08144
    """
    n_beams = check_value('beam_search', 'n_beams', n_beams, Size)
    n_best = check_value('beam_search', 'n_best', n_best, Size)
    if n_best > n_beams:
        raise ValueError(f'n_best must be 1 to n_beams={n_beams}, got {n_best!r}')
    length_penalty = check_value('beam_search', 'length_penalty', length_penalty, _PENALTY)
    start = begin(model, prompts, n_tokens, inputs, eos_id)
    search = _Search(n_beams, n_best, np.int32(n_tokens), length_penalty, as_id(eos_id))
    found = _run(start, search)
    tokens, scores, n_made, is_whole = map(np.asarray, found)
    if not is_whole:
        raise diverged(f'after {n_made} tokens')
    n_found = np.isfinite(scores).sum(1).max()
    return Beams(tokens[:, :n_found, : int(n_tokens)], scores[:, :n_found])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['n_tokens', 'length_penalty', 'eos_id'],
    meta_fields=['n_beams', 'n_best'],
)
@dataclasses.dataclass(frozen=True)
class _Search:
    """What a search is told. Only other numbers of beams need another program."""

    n_beams: int
    n_best: int
    n_tokens: Any
    length_penalty: Any
    eos_id: Any  # -1 if nothing ends a hypothesis

    def normed(self, total: jax.Array, length: Any) -> jax.Array:
        """Scores of hypotheses of a length, −∞ in places without one."""
        score = total / jnp.asarray(length, jnp.float32) ** self.length_penalty
        return jnp.where(total > _NONE, score, -jnp.inf)


class _Carry(NamedTuple):
    """A search under way, after `length` tokens."""

    length: jax.Array
    tokens: jax.Array  # (B, K, T), the live ones
    totals: jax.Array  # (B, K), their log-probabilities
    ended: jax.Array  # (B, N, T)
    scores: jax.Array  # (B, N), of those that ended
    logits: jax.Array  # (B, K, V), after the live ones
    state: Tree  # of B·K rows


@jax.jit
def _run(start: Start, search: _Search) -> tuple[jax.Array, ...]:
    """Tokens, scores, how many tokens were made, and whether all had probabilities."""
    b, k, n, t = len(start.tokens), search.n_beams, search.n_best, search.n_tokens
    logits, state = ingest(start)
    per_row = _per_row(start)
    state = _repeated(state, per_row, b, k)
    context = tuple(jnp.repeat(x, k, 0) for x in start.context)
    start = dataclasses.replace(start, context=context)
    fill = jnp.maximum(search.eos_id, 0)
    carry = _Carry(
        length=jnp.int32(0),
        tokens=jnp.full((b, k, start.room), fill, jnp.int32),
        # All beams are the same at first: one of them is enough.
        totals=jnp.full((b, k), _LOW, jnp.float32).at[:, 0].set(0.0),
        ended=jnp.full((b, n, start.room), fill, jnp.int32),
        scores=jnp.full((b, n), -jnp.inf, jnp.float32),
        logits=jnp.repeat(logits[:, None], k, 1).astype(jnp.float32),
        state=state,
    )

    def unfinished(carry: _Carry) -> jax.Array:
        # What a live one may still reach: its total only falls, and is divided by one length or
        # another, of which the first or the last favours it most.
        best = carry.totals.max(-1)
        reach = jnp.maximum(search.normed(best, carry.length + 1), search.normed(best, t))
        hopes = (carry.length < t) & (reach > carry.scores.min(-1)).any()
        return hopes & has_probabilities(carry.logits).all()

    def step(carry: _Carry) -> _Carry:
        chosen, carry = _choose(search, carry)
        state = _copied(carry.state, per_row, chosen)
        newest = carry.tokens[:, :, carry.length - 1].reshape(b * k)
        logits, state = advance(start, state, newest)
        logits = logits.reshape(b, k, -1).astype(jnp.float32)
        return carry._replace(logits=logits, state=state)

    carry = jax.lax.while_loop(unfinished, step, carry)
    # The live ones of full length are hypotheses too; of others none could come among the best.
    is_full = carry.length == t
    full = jnp.where(is_full, search.normed(carry.totals, t), -jnp.inf)
    best = _best(search, carry, carry.tokens, full)
    return *best, carry.length, is_full | has_probabilities(carry.logits).all()


def _choose(search: _Search, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """Each row's next live hypotheses, and the beams, (B, K), that they go on from."""
    b, k, vocab_size = carry.logits.shape
    total = carry.totals[:, :, None] + jax.nn.log_softmax(carry.logits)
    # Twice as many as there are beams: at most K of them end, one for each beam.
    total, at = jax.lax.top_k(total.reshape(b, k * vocab_size), min(2, vocab_size) * k)
    beam, token = at // vocab_size, at % vocab_size  # (B, 2K)
    tokens = jnp.take_along_axis(carry.tokens, beam[:, :, None], 1)
    tokens = tokens.at[:, :, carry.length].set(token)
    ends = token == search.eos_id
    scores = jnp.where(ends, search.normed(total, carry.length + 1), -jnp.inf)
    ended, scores = _best(search, carry, tokens, scores)
    totals, live = jax.lax.top_k(jnp.where(ends, _LOW, total), k)  # (B, K)
    live = jnp.take_along_axis(live, jax.vmap(_stay)(jnp.take_along_axis(beam, live, 1)), 1)
    totals = jnp.take_along_axis(jnp.where(ends, _LOW, total), live, 1)
    tokens = jnp.take_along_axis(tokens, live[:, :, None], 1)
    moved = carry._replace(length=carry.length + 1, tokens=tokens, totals=totals)
    return jnp.take_along_axis(beam, live, 1), moved._replace(ended=ended, scores=scores)


def _stay(beam: jax.Array) -> jax.Array:
    """An order of hypotheses that go on from beams (K,), in which one of each beam takes its place.

    Caches are then copied only into the places of beams from which nothing goes on.
    """
    k = len(beam)
    same = beam[:, None] == beam[None]  # (K, K)
    stays = ~jnp.tril(same, -1).any(1)  # the first of its beam
    free = _order(jnp.zeros(k, bool).at[beam].set(True))  # places where nothing goes on first
    place = jnp.where(stays, beam, free[jnp.cumsum(~stays, dtype=jnp.int32) - 1])
    return _order(place)


def _order(x: jax.Array) -> jax.Array:
    return jnp.argsort(x).astype(jnp.int32)  # JAX's default integer is what a program sets


def _best(search: _Search, carry: _Carry, tokens: jax.Array, scores: jax.Array) -> Any:
    """The best N of those that ended before and those that end now."""
    scores, at = jax.lax.top_k(jnp.concatenate([carry.scores, scores], 1), search.n_best)
    tokens = jnp.concatenate([carry.ended, tokens], 1)
    return jnp.take_along_axis(tokens, at[:, :, None], 1), scores


def _per_row(start: Start) -> Tree:
    """Which arrays of a state have something for each row: those that grow with their number."""

    def shapes(n_rows: int) -> Tree:
        signature = start.signature(start.room, n_rows)
        return jax.eval_shape(lambda: fresh_state(start.net, start.trained, signature))

    n = len(start.tokens)
    return jax.tree.map(lambda x, y: x.shape != y.shape, shapes(n), shapes(n + 1))


def _repeated(state: Tree, per_row: Tree, n: int, k: int) -> Tree:
    """A state of n rows with each of them k times; some arrays have several lines a row."""

    def repeat(x: jax.Array, is_per_row: bool) -> jax.Array:
        if not is_per_row:
            return x
        rows = jnp.repeat(x.reshape(n, -1, *x.shape[1:]), k, 0)
        return rows.reshape(-1, *x.shape[1:])

    return jax.tree.map(repeat, state, per_row)


def _copied(state: Tree, per_row: Tree, chosen: jax.Array) -> Tree:
    """A state in which beam i of row b is what beam `chosen[b, i]` was, updated in place.

    Beams are copied one by one, and only those that change. What they are copied from does not
    change, thanks to `_stay`.
    """
    b, k = chosen.shape
    source = (chosen + jnp.arange(b, dtype=jnp.int32)[:, None] * k).reshape(-1)
    moves = source != jnp.arange(b * k, dtype=jnp.int32)
    order = _order(~moves)  # those first

    def one(i: jax.Array, state: Tree) -> Tree:
        def copy(x: jax.Array, is_per_row: bool) -> jax.Array:
            if not is_per_row:
                return x
            rows = x.reshape(b * k, -1, *x.shape[1:])
            row = jax.lax.dynamic_index_in_dim(rows, source[order[i]], 0)
            rows = jax.lax.dynamic_update_slice_in_dim(rows, row, order[i], 0)
            return rows.reshape(x.shape)

        return jax.tree.map(copy, state, per_row)

    return jax.lax.fori_loop(0, moves.sum(dtype=jnp.int32), one, state)
