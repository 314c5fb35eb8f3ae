"""Speculative decoding: a draft of several tokens is checked in one pass of the model.

The model reads a row's last token and the k tokens of its draft at once, which costs little more
than one token where weights have to be read from memory. It then draws the token after each of
them, with the key and the penalties that the token would have had without a draft. The draft is
accepted as far as it is what was drawn, and the token after it is one more; the caches go back to
there.

So the tokens are those of ordinary decoding with the same seed, greedy or drawn, up to rounding,
and whatever the draft is. A `Lookup`'s draft d is accepted with the probability p(d), and else the
token has the distribution p(x) / (1 − p(d)) over x ≠ d, as by the rule of Leviathan et al. for a
draft without alternatives. A `Draft`'s model draws with the same Gumbel noise as the model: where
the distributions of the two are δ apart (in total variation), they draw the same token with the
probability (1 − δ) / (1 + δ) at least. Resampling accepts 1 − δ, but what it makes depends on the
draft, and not on the seed alone.

Shape letters: B rows, L room for tokens, T = 1 + k positions, k drafted tokens, V vocabulary.

References:
  Leviathan et al. 2022, https://arxiv.org/abs/2211.17192
  Chen et al. 2023, https://arxiv.org/abs/2302.01318
  Daliri et al., drafts with common noise, 2024, https://arxiv.org/abs/2408.07978
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError
from layercomb.layers.decoding.once import run_once
from layercomb.layers.decoding.seek import seek
from layercomb.supervised.decoding.drafts import (
    NO_DRAFT,
    Lookup,
    Speculation,
    check_can_go_back,
    check_speculation,
    check_vocabulary,
    size_of_logits,
)
from layercomb.supervised.decoding.keys import fold_each
from layercomb.supervised.decoding.prompts import Sequences, Start, begin
from layercomb.supervised.decoding.reading.ingesting import advance
from layercomb.supervised.decoding.sampling import NO_TOKEN, Sampler
from layercomb.trees import Tree


class Judged(NamedTuple):
    """What became of drafts.

    Attributes:
      tokens: (B, T) int32, the new tokens of each row; 0 behind the last one.
      n_made: (B,) int32, how many there are: those of the draft that were accepted, and one more.
      held: (B, V) int32, as `Sampler.held` gives it, with the new tokens added.
    """

    tokens: jax.Array
    n_made: jax.Array
    held: jax.Array


def judged(
    sampler: Sampler,
    logits: jax.Array,
    keys: jax.Array,
    step: jax.Array,
    held: jax.Array,
    drafts: jax.Array,
    most: jax.Array,
    eos_id: Any,
) -> Judged:
    """Draws the tokens of rows as far as their drafts are what is drawn.

    Args:
      sampler: see `Sampler`.
      logits: (B, T, V), after each row's last token, and after each token of its draft.
      keys: (B,), of rows.
      step: (B,) int32, the number of each row's next token.
      held: (B, V) int32, see `Sampler`.
      drafts: (B, k) int32; `NO_DRAFT` where there is none.
      most: (B,) int32, the most tokens that a row may get; 0 for none.
      eos_id: int32 (), the token that ends a row; −1 for none.
    """
    n_rows, length = logits.shape[:2]
    nothing = jnp.full((n_rows, 1), NO_DRAFT, jnp.int32)
    expected = jnp.concatenate([drafts, nothing], 1)  # (B, T)

    def goes_on(carry: Any) -> jax.Array:
        j, going, _ = carry
        return (j < length) & going.any()

    def one(carry: Any) -> Any:
        j, going, made = carry
        at = jax.lax.dynamic_index_in_dim(logits, j, 1, keepdims=False)
        token = sampler(at, fold_each(keys, step + j), made.held)
        shown = jnp.where(going, token, 0)[:, None]
        held = jnp.where(going[:, None], sampler.add(made.held, token), made.held)
        made = Judged(
            jax.lax.dynamic_update_slice_in_dim(made.tokens, shown, j, 1),
            made.n_made + going.astype(jnp.int32),
            held,
        )
        draft = jax.lax.dynamic_index_in_dim(expected, j, 1, keepdims=False)
        return j + 1, going & (token == draft) & (token != eos_id) & (made.n_made < most), made

    empty = Judged(jnp.zeros((n_rows, length), jnp.int32), jnp.zeros(n_rows, jnp.int32), held)
    found: Judged = jax.lax.while_loop(goes_on, one, (jnp.int32(0), most > 0, empty))[-1]
    return found


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['start', 'sampler', 'keys', 'n_tokens', 'eos_id', 'draft'],
    meta_fields=['n_draft', 'lookup'],
)
@dataclasses.dataclass(frozen=True)
class Job:
    """What speculative decoding starts from.

    Attributes:
      start: the model, and prompts.
      sampler: see `Sampler`.
      keys: (B,), of rows.
      n_tokens: int32 (), how many tokens each row gets.
      eos_id: int32 (), the token that ends a row; −1 for none.
      draft: the draft's model, with the same prompts; None for a lookup.
      n_draft: k.
      lookup: the lookup; None for a draft's model.
    """

    start: Start
    sampler: Sampler
    keys: jax.Array
    n_tokens: Any
    eos_id: Any
    draft: Start | None
    n_draft: int
    lookup: Lookup | None

    @property
    def room(self) -> int:
        """L, how many positions all caches hold."""
        rooms = [self.start.room] if self.draft is None else [self.start.room, self.draft.room]
        return min(rooms)


def job(
    given: Speculation,
    prompts: Sequences,
    start: Start,
    sampler: Sampler,
    keys: jax.Array,
    n_tokens: np.int32,
    eos_id: np.int32,
) -> Job:
    """Prepares speculative decoding.

    Args:
      given: a `Lookup` or a `Draft`.
      prompts: as of `decoding.generate`.
      start: the model, and the prompts.
      sampler, keys, n_tokens, eos_id: as of `Job`.

    Raises:
      TypeError: if `given` is neither.
      UsageError: as `drafts.check_can_go_back`, of both models; if the draft's model has another
        vocabulary, or does not reach as far.
    """
    check_speculation(given)
    check_can_go_back(start.net, start.trained)
    drawn = start, sampler, keys, n_tokens, eos_id
    if isinstance(given, Lookup):
        return Job(*drawn, draft=None, n_draft=given.n_draft, lookup=given)
    try:
        draft = begin(given.model, prompts, int(n_tokens))
    except UsageError as e:
        raise UsageError(f'the draft model: {e}') from None
    check_can_go_back(draft.net, draft.trained, 'the draft model')
    check_vocabulary(*(size_of_logits(each.net) for each in (start, draft)))
    return Job(*drawn, draft=draft, n_draft=given.n_draft, lookup=None)


class Texts(NamedTuple):
    """Rows that are being made.

    Attributes:
      state: of the model, which has read all of each row but its last token.
      draft: the state of the draft's model, whose positions mean nothing; None for a lookup.
      held: (B, V) int32, see `Sampler`.
      tokens: (B, L) int32, prompts and what was made; what is behind means nothing.
      lengths: (B,) int32.
      done: (B,) bool, whether nothing more is made.
    """

    state: Tree
    draft: Any
    held: jax.Array
    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array

    @property
    def last(self) -> jax.Array:
        """The last token of each row, (B,)."""
        return jnp.take_along_axis(self.tokens, self.lengths[:, None] - 1, 1)[:, 0]


def begun(job: Job, token: jax.Array, held: jax.Array, state: Tree, draft: Any) -> Texts:
    """The rows after their first token.

    Args:
      job: what is to be done.
      token: (B,) int32, the first token that was made for each row.
      held: (B, V) int32, see `Sampler`.
      state: of the model, which has read the prompts.
      draft: that of the draft's model, which has read them too; None for a lookup.
    """
    start = job.start
    padding = start.room - start.tokens.shape[1]
    tokens = jnp.pad(start.tokens, ((0, 0), (0, padding)))
    tokens = _written(tokens, start.lengths, token[:, None])
    lengths = start.lengths + 1
    texts = Texts(state, draft, held, tokens, lengths, jnp.zeros(len(token), bool))
    return texts._replace(done=_done(job, texts))


def unfinished(texts: Texts) -> jax.Array:
    """Whether more is to be made: () bool. It ends where logits have no probabilities."""
    return ~texts.done.all() & (texts.last != NO_TOKEN).all()


def continued(job: Job, texts: Texts) -> Texts:
    """The rows with at least one more token for each that is not done: a draft is checked.

    Where no row has a draft, or the caches have no room to check one, each gets one token. Each of
    the two is a loop of at most one round, see `run_once`, so that caches are updated in place.
    """
    drafts, has_draft = None, ~texts.done
    if job.lookup is not None:
        drafts = job.lookup.drafts(texts.tokens, texts.lengths)
        has_draft &= drafts[:, 0] != NO_DRAFT
    # The last position that is read is that of the last drafted token.
    checks = has_draft.any() & (texts.lengths.max() + job.n_draft <= job.room)

    def one(texts: Texts) -> Texts:
        return _checked(job, texts, jnp.zeros((len(texts.done), 0), jnp.int32))

    def many(texts: Texts) -> Texts:
        if drafts is not None:
            return _checked(job, texts, drafts)
        return _checked(job, *_drafted(job, texts))

    return run_once(~checks, run_once(checks, texts, one), many)


def made(job: Job, texts: Texts) -> jax.Array:
    """(B, L) int32: what was made for each row, filled up with `eos_id`."""
    at = jnp.arange(job.start.room, dtype=jnp.int32)[None] + job.start.lengths[:, None]
    tokens = jnp.take_along_axis(texts.tokens, at, 1, mode='clip')
    return jnp.where(at < texts.lengths[:, None], tokens, jnp.maximum(job.eos_id, 0))


def since(job: Job, before: jax.Array, texts: Texts) -> tuple[jax.Array, jax.Array]:
    """The tokens that rows have got since they had other lengths.

    Args:
      job: what is done.
      before: (B,) int32, the lengths before one call of `continued`.
      texts: after it.

    Returns:
      (tokens, n): (B, T) int32, and (B,) int32, how many of them there are.
    """
    at = before[:, None] + jnp.arange(1 + job.n_draft, dtype=jnp.int32)[None]
    return jnp.take_along_axis(texts.tokens, at, 1, mode='clip'), texts.lengths - before


def _checked(job: Job, texts: Texts, drafts: jax.Array) -> Texts:
    """The rows with what is accepted of drafts (B, k), and one token more."""
    read = jnp.concatenate([texts.last[:, None], jnp.maximum(drafts, 0)], 1)
    logits, state = advance(job.start, texts.state, read)
    n_made = texts.lengths - job.start.lengths
    most = jnp.where(texts.done, 0, job.n_tokens - n_made)
    found = judged(job.sampler, logits, job.keys, n_made, texts.held, drafts, most, job.eos_id)
    lengths = texts.lengths + found.n_made
    texts = texts._replace(
        state=seek(state, lengths - 1),
        held=found.held,
        tokens=_written(texts.tokens, texts.lengths, found.tokens),
        lengths=lengths,
    )
    return texts._replace(done=texts.done | _done(job, texts))


def _drafted(job: Job, texts: Texts) -> tuple[Texts, jax.Array]:
    """The rows, of which the draft's model has read more, and its drafts (B, k)."""
    assert job.draft is not None
    start, n_made = job.draft, texts.lengths - job.start.lengths
    at = texts.lengths[:, None] + jnp.array([-2, -1], jnp.int32)
    pair = jnp.take_along_axis(texts.tokens, at, 1)
    state = seek(texts.draft, texts.lengths - 2)
    drawn = job.sampler, job.keys, n_made, texts.held
    drafts, state = drafted(functools.partial(advance, start), state, pair, job.n_draft, *drawn)
    return texts._replace(draft=state), drafts


def drafted(
    run: Callable[[Tree, jax.Array], tuple[jax.Array, Tree]],
    state: Tree,
    pair: jax.Array,
    n_draft: int,
    sampler: Sampler,
    keys: jax.Array,
    step: jax.Array,
    held: jax.Array,
) -> tuple[jax.Array, Tree]:
    """The tokens that a draft's model would draw next.

    Args:
      run: reads tokens (B, T): (state, tokens) → (logits (B, T, V), state).
      state: of the draft's model, which has read all of each row but its last two tokens. It may
        never have read the last but one: after a draft that was accepted whole there is one more.
      pair: (B, 2) int32, the last two tokens.
      n_draft: k.
      sampler, keys, step, held: as of `judged`.

    Returns:
      (B, k) int32, `NO_DRAFT` where logits have no probabilities; and the new state.
    """

    def draw(j: Any, logits: jax.Array, held: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = sampler(logits[:, -1], fold_each(keys, step + j), held)
        return token, sampler.add(held, token)

    def one(j: jax.Array, carry: Any) -> Any:
        state, held, drafts, token = carry
        logits, state = run(state, jnp.maximum(token, 0)[:, None])
        token, held = draw(j, logits, held)
        return state, held, jax.lax.dynamic_update_slice_in_dim(drafts, token[:, None], j, 1), token

    logits, state = run(state, jnp.maximum(pair, 0))
    token, held = draw(0, logits, held)
    drafts = jnp.zeros((len(token), n_draft), jnp.int32).at[:, 0].set(token)
    carry = state, held, drafts, token
    state, _, drafts, _ = jax.lax.fori_loop(jnp.int32(1), jnp.int32(n_draft), one, carry)
    return jnp.where(drafts < 0, NO_DRAFT, drafts), state


def _done(job: Job, texts: Texts) -> jax.Array:
    is_over = texts.lengths - job.start.lengths >= job.n_tokens
    return is_over | ((texts.last == job.eos_id) & (job.eos_id >= 0))


def _written(tokens: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
    """Rows (B, L) with new tokens (B, T) from `at` (B,) on; those beyond L are dropped."""
    rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
    places = at[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    return tokens.at[rows, places].set(new, mode='drop')
