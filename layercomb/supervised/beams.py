"""Beam search: the likeliest continuations, several candidates at a time.

Shape letters: B rows, K beams, V vocabulary, N hypotheses returned, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.base import Tree
from layercomb.model import Model
from layercomb.supervised.prompts import Sequences, Start, advance, begin, fresh_state, ingest

_LOW = -1e30  # finite, so that differences are


class Beams(NamedTuple):
    """What a beam search found, the best first.

    Attributes:
      tokens: (B, N, T) int32, without the prompts, filled up with `eos_id`.
      scores: (B, N) float32.
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

    Ended hypotheses stand apart from live ones, so that none pushes another out of the beam; the
    search stops when no live one can still come among the best. One beam is greedy
    decoding where no `eos_id` is given; with one it goes on past an end, for a better score.

    Args:
      model, prompts, n_tokens, inputs, eos_id: as in `decoding.generate`.
      n_beams: K, how many live hypotheses a row keeps.
      n_best: N ≤ K, how many a row returns.
      length_penalty: 0 favours short hypotheses, for each token costs; 1 takes the mean.

    Returns:
      `Beams`.

    Raises:
      ValueError: if a number is out of its range.
      UsageError: as `decoding.generate`.

    References:
      Wu et al., length normalization in section 7, 2016, https://arxiv.org/abs/1609.08144
    """
    if not isinstance(n_beams, int) or n_beams < 1:
        raise ValueError(f'n_beams must be a whole number of at least 1, got {n_beams!r}')
    if not isinstance(n_best, int) or not 1 <= n_best <= n_beams:
        raise ValueError(f'n_best must be 1 to n_beams={n_beams}, got {n_best!r}')
    start = begin(model, prompts, n_tokens, inputs)
    search = _Search(n_beams, n_best, n_tokens, float(length_penalty), eos_id)
    tokens, scores = _run(start, search)
    return Beams(np.asarray(tokens), np.asarray(scores))


@dataclasses.dataclass(frozen=True)
class _Search:
    """What a search is told."""

    n_beams: int
    n_best: int
    n_tokens: int
    length_penalty: float
    eos_id: int | None

    def normed(self, total: jax.Array, length: Any) -> jax.Array:
        """Scores of hypotheses so long."""
        return total / jnp.asarray(length, jnp.float32) ** self.length_penalty


class _Carry(NamedTuple):
    """A search under way, after `length` tokens."""

    length: jax.Array
    tokens: jax.Array  # (B, K, T), the live ones
    totals: jax.Array  # (B, K), their log-probabilities
    ended: jax.Array  # (B, N, T)
    scores: jax.Array  # (B, N), of those that ended
    logits: jax.Array  # (B, K, V), after the live ones
    state: Tree  # of B·K rows


@functools.partial(jax.jit, static_argnums=1)
def _run(start: Start, search: _Search) -> tuple[jax.Array, jax.Array]:
    b, k, n, t = len(start.tokens), search.n_beams, search.n_best, search.n_tokens
    logits, state = ingest(start)
    per_row = _per_row(start)
    state = _take_rows(state, per_row, jnp.repeat(jnp.arange(b), k), b)
    context = tuple(jnp.repeat(x, k, 0) for x in start.context)
    start = dataclasses.replace(start, context=context)
    fill = 0 if search.eos_id is None else search.eos_id
    carry = _Carry(
        length=jnp.int32(0),
        tokens=jnp.full((b, k, t), fill, jnp.int32),
        # All beams are the same at first: one of them is enough.
        totals=jnp.full((b, k), _LOW).at[:, 0].set(0.0),
        ended=jnp.full((b, n, t), fill, jnp.int32),
        scores=jnp.full((b, n), _LOW),
        logits=jnp.repeat(logits[:, None], k, 1).astype(jnp.float32),
        state=state,
    )

    def unfinished(carry: _Carry) -> jax.Array:
        # What a live one may still reach: its total only falls, and is divided by one length or
        # another, of which the first or the last favours it most.
        best = carry.totals.max(-1)
        reach = jnp.maximum(search.normed(best, carry.length + 1), search.normed(best, t))
        return (carry.length < t) & (reach > carry.scores.min(-1)).any()

    def step(carry: _Carry) -> _Carry:
        chosen, carry = _choose(search, carry)
        state = _take_rows(carry.state, per_row, chosen, b * k)
        newest = carry.tokens[:, :, carry.length - 1].reshape(b * k)
        logits, state = advance(start, state, newest)
        logits = logits.reshape(b, k, -1).astype(jnp.float32)
        return carry._replace(logits=logits, state=state)

    carry = jax.lax.while_loop(unfinished, step, carry)
    # The live ones of full length are hypotheses too; of others none could come among the best.
    whole = jnp.where(carry.length == t, search.normed(carry.totals, t), _LOW)
    return _best(search, carry, carry.tokens, whole)


def _choose(search: _Search, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """Each row's next live hypotheses, and the beams, (B·K,), that they go on from."""
    b, k, vocab_size = carry.logits.shape
    total = carry.totals[:, :, None] + jax.nn.log_softmax(carry.logits)
    # Twice as many as there are beams: at most K of them end, one for each beam.
    total, at = jax.lax.top_k(total.reshape(b, k * vocab_size), min(2, vocab_size) * k)
    beam, token = at // vocab_size, at % vocab_size  # (B, 2K)
    tokens = jnp.take_along_axis(carry.tokens, beam[:, :, None], 1)
    tokens = tokens.at[:, :, carry.length].set(token)
    ends = token == search.eos_id if search.eos_id is not None else jnp.zeros(token.shape, bool)
    scores = jnp.where(ends, search.normed(total, carry.length + 1), _LOW)
    ended, scores = _best(search, carry, tokens, scores)
    totals, live = jax.lax.top_k(jnp.where(ends, _LOW, total), k)  # (B, K)
    beam = jnp.take_along_axis(beam, live, 1)
    tokens = jnp.take_along_axis(tokens, live[:, :, None], 1)
    chosen = (beam + jnp.arange(b)[:, None] * k).reshape(-1)
    moved = carry._replace(length=carry.length + 1, tokens=tokens, totals=totals)
    return chosen, moved._replace(ended=ended, scores=scores)


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


def _take_rows(state: Tree, per_row: Tree, rows: jax.Array, n: int) -> Tree:
    """A state of other rows, of the `n` that there are; some arrays have several lines a row."""

    def take(x: jax.Array, is_per_row: bool) -> jax.Array:
        if not is_per_row:
            return x
        taken = x.reshape(n, -1, *x.shape[1:])[rows]
        return taken.reshape(-1, *x.shape[1:])

    return jax.tree.map(take, state, per_row)
