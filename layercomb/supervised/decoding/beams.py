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
from layercomb.supervised.decoding.compiling import compile_for
from layercomb.supervised.decoding.prompts import Sequences, Start, as_id, begin
from layercomb.supervised.decoding.reading.ingesting import advance, fresh_state, ingest
from layercomb.supervised.decoding.sampling import diverged, has_probabilities
from layercomb.trees import Tree

_PENALTY = Annotated[float, Bound(-10, high=10)]
_LOW, _NONE = -1e30, -1e29  # the total of an empty place in the beam; real totals are above _NONE


class Beams(NamedTuple):
    """The hypotheses that a beam search found, best first.

    Attributes:
      tokens: (B, N, T) int32, without the prompts, filled up with `eos_id`. N is `n_best`, or the
        largest number of hypotheses of a row, if that is smaller.
      scores: (B, N) float32; −∞ marks an empty place, in a row with fewer hypotheses than N.
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

    A hypothesis ends with `eos_id`, or at `n_tokens` tokens. A hypothesis of T tokens, `eos_id`
    included, has the score::

        Σ_t log p(y_t | prompt, y_<t) / T ** length_penalty

    Ended hypotheses are kept apart from live ones, so they take no place in the beam. The search
    stops when no live hypothesis can still become one of the best. One beam without an `eos_id` is
    greedy decoding; with an `eos_id` it continues past an end, to look for a better score.

    Args:
      model, prompts, n_tokens, inputs, eos_id: as in `decoding.generate`.
      n_beams: K, how many live hypotheses a row keeps.
      n_best: N ≤ K, how many hypotheses a row returns, at most.
      length_penalty: 0 sums the log-probabilities, which favours short hypotheses; 1 takes their
        mean. From −10 to 10.

    Returns:
      `Beams`.

    Raises:
      TypeError: if a number is not one.
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
    logits, state = _begun(start, n_beams)
    compile_for(_run, start, search, logits, state)
    found, _ = _run(start, search, logits, state)
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
    """The arguments of a search. Only `n_beams` and `n_best` need another program."""

    n_beams: int
    n_best: int
    n_tokens: Any
    length_penalty: Any
    eos_id: Any  # -1 if nothing ends a hypothesis

    def normed(self, total: jax.Array, length: Any) -> jax.Array:
        """The scores of hypotheses of a length; −∞ in empty places."""
        score = total / jnp.asarray(length, jnp.float32) ** self.length_penalty
        return jnp.where(total > _NONE, score, -jnp.inf)


class _Carry(NamedTuple):
    """The state of a search after `length` tokens."""

    length: jax.Array
    tokens: jax.Array  # (B, K, T), the live ones
    totals: jax.Array  # (B, K), their log-probabilities
    ended: jax.Array  # (B, N, T)
    scores: jax.Array  # (B, N), of those that ended
    logits: jax.Array  # (B, K, V), after the live ones
    state: Tree  # of B·K rows


def _begun(start: Start, n_beams: int) -> tuple[jax.Array, Tree]:
    """Logits (B, V) after the prompts, and a state with each row as often as there are beams."""
    logits, state = ingest(start)
    leaves, structure = jax.tree.flatten(state)
    per_row = tuple(jax.tree.leaves(_per_row(start)))
    return logits, jax.tree.unflatten(structure, _repeated(leaves, per_row, len(logits), n_beams))


@functools.partial(jax.jit, donate_argnums=3)
def _run(
    start: Start, search: _Search, logits: jax.Array, state: Tree
) -> tuple[tuple[jax.Array, ...], Tree]:
    """Tokens, scores, how many tokens were made, and whether all logits gave probabilities.

    The state is returned too, so that caches are written where they are.

    Args:
      start: with the prompts.
      search: how.
      logits, state: as of `_begun`.
    """
    b, k, n, t = len(start.tokens), search.n_beams, search.n_best, search.n_tokens
    per_row = _per_row(start)
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
        # The best score that a live hypothesis may still reach. Its total only falls, and the
        # length that favours it most is the next one or the last one.
        best = carry.totals.max(-1)
        reach = jnp.maximum(search.normed(best, carry.length + 1), search.normed(best, t))
        hopes = (carry.length < t) & (reach > carry.scores.min(-1)).any()
        return hopes & has_probabilities(carry.logits).all()

    def step(carry: _Carry) -> _Carry:
        chosen, carry = _choose(search, carry)
        state = _copied(carry.state, per_row, chosen)
        newest = carry.tokens[:, :, carry.length - 1].reshape(b * k)
        logits, state = advance(start, state, newest[:, None])
        logits = logits.reshape(b, k, -1).astype(jnp.float32)
        return carry._replace(logits=logits, state=state)

    carry = jax.lax.while_loop(unfinished, step, carry)
    # Live hypotheses of full length count too. Shorter ones cannot become one of the best.
    is_full = carry.length == t
    full = jnp.where(is_full, search.normed(carry.totals, t), -jnp.inf)
    best = _best(search, carry, carry.tokens, full)
    is_whole = is_full | has_probabilities(carry.logits).all()
    return (*best, carry.length, is_whole), carry.state


def _choose(search: _Search, carry: _Carry) -> tuple[jax.Array, _Carry]:
    """Each row's next live hypotheses, and the beams (B, K) that they continue."""
    b, k, vocab_size = carry.logits.shape
    total = carry.totals[:, :, None] + jax.nn.log_softmax(carry.logits)
    # 2K candidates suffice: at most K of them end, one for each beam.
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
    """An order of hypotheses, which continue beams (K,), that moves as few caches as possible.

    The first hypothesis that continues a beam takes that beam's place. So caches are copied only
    into the places of beams that no hypothesis continues.
    """
    k = len(beam)
    same = beam[:, None] == beam[None]  # (K, K)
    stays = ~jnp.tril(same, -1).any(1)  # the first of its beam
    free = _order(jnp.zeros(k, bool).at[beam].set(True))  # free places first
    place = jnp.where(stays, beam, free[jnp.cumsum(~stays, dtype=jnp.int32) - 1])
    return _order(place)


def _order(x: jax.Array) -> jax.Array:
    return jnp.argsort(x).astype(jnp.int32)  # argsort's dtype depends on jax_enable_x64


def _best(search: _Search, carry: _Carry, tokens: jax.Array, scores: jax.Array) -> Any:
    """The best N of the hypotheses that ended before and those that end now."""
    scores, at = jax.lax.top_k(jnp.concatenate([carry.scores, scores], 1), search.n_best)
    tokens = jnp.concatenate([carry.ended, tokens], 1)
    return jnp.take_along_axis(tokens, at[:, :, None], 1), scores


def _per_row(start: Start) -> Tree:
    """Which arrays of a state are per row: those whose shape changes with the number of rows."""

    def shapes(n_rows: int) -> Tree:
        signature = start.signature(start.room, n_rows)
        return jax.eval_shape(lambda: fresh_state(start.net, start.trained, signature))

    n = len(start.tokens)
    return jax.tree.map(lambda x, y: x.shape != y.shape, shapes(n), shapes(n + 1))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _repeated(leaves: list[jax.Array], per_row: tuple[bool, ...], n: int, k: int) -> Any:
    """Leaves of a state of n rows with each row k times; some have several lines a row."""

    def repeat(x: jax.Array, is_per_row: bool) -> jax.Array:
        if not is_per_row:
            return jnp.copy(x)  # an array of its own, which may be donated
        rows = jnp.repeat(x.reshape(n, -1, *x.shape[1:]), k, 0)
        return rows.reshape(-1, *x.shape[1:])

    return [repeat(x, is_per_row) for x, is_per_row in zip(leaves, per_row, strict=True)]


def _copied(state: Tree, per_row: Tree, chosen: jax.Array) -> Tree:
    """Copies beam `chosen[b, i]` of row b to beam i, in place.

    Only beams that change are copied, one by one. Thanks to `_stay`, no beam is overwritten before
    it is copied.
    """
    b, k = chosen.shape
    source = (chosen + jnp.arange(b, dtype=jnp.int32)[:, None] * k).reshape(-1)
    moves = source != jnp.arange(b * k, dtype=jnp.int32)
    order = _order(~moves)  # beams that change first

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
