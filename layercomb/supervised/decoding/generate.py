"""Decoding: `generate` a batch in one call, or `stream` it token by token.

Both read the prompt at once, then go one position at a time in ``PREDICT``, with caches that are
updated in place. Row b of step i draws with a key folded with b and i. So the sample of row b does
not depend on the other rows, nor on which of the two functions makes it, but for rounding, which in
bfloat16 differs between one row and several. The same prompt in another row gives another sample.
`beam_search` looks for the likeliest continuations, and `score` gives the likelihood of given
texts.

All numbers are arguments of the programs. A new program is compiled for another model, another
number of rows, and each length that `round_up` gives. LSH attention with neighbourhood='chunk'
or 'circle' would see padding, so there a program is compiled for every prompt length.

With `speculate` several tokens are drafted and then checked in one pass, see `speculating`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.model import Model
from layercomb.supervised.decoding import speculating
from layercomb.supervised.decoding.beams import Beams, beam_search
from layercomb.supervised.decoding.compiling import compile_for
from layercomb.supervised.decoding.drafts import Draft, Lookup, Speculation
from layercomb.supervised.decoding.keys import fold_each, row_keys
from layercomb.supervised.decoding.prompts import (
    Sequences,
    Start,
    as_id,
    begin,
    check_bias,
    max_len,
)
from layercomb.supervised.decoding.reading.ingesting import advance, ingest
from layercomb.supervised.decoding.sampling import NO_TOKEN, Sampler, check_drawn
from layercomb.supervised.decoding.scoring import Scores, score
from layercomb.trees import Tree

__all__ = [
    'Beams',
    'Draft',
    'Lookup',
    'Sampler',
    'Scores',
    'beam_search',
    'generate',
    'max_len',
    'score',
    'stream',
]


def generate(
    model: Model,
    prompts: Sequences,
    n_tokens: int,
    *,
    inputs: Sequences | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: tuple[tuple[int, float], ...] = (),
    rng: jax.Array | int = 0,
    eos_id: int | None = None,
    speculate: Speculation | None = None,
) -> np.ndarray:
    """Continues each prompt by `n_tokens` tokens, in one call.

    Args:
      model: with weights: a language model, (B, L) → (B, L, V), or an encoder-decoder, (B, S),
        (B, L)[, mask (B, S)] → (B, L, V).
      prompts: (B, P) integers, or a list of B sequences of integers of any lengths. For an
        encoder-decoder, what its decoder begins with: at least one token.
      n_tokens: how many tokens to make for each row.
      inputs: what an encoder reads, (B, S) or a list of B sequences; lengths may differ if the
        model takes a mask.
      temperature, top_k, top_p, repetition_penalty, presence_penalty, frequency_penalty,
        logit_bias: see `Sampler`; temperature 0 is greedy.
      rng: a typed key, or a seed.
      eos_id: the token that ends a row; the rest of the row is filled with it. It must be in the
        vocabulary. None ends no row.
      speculate: a `Lookup` or a `Draft`, to make several tokens in one pass of the model where
        they could be guessed. The tokens are the same, up to rounding.

    Returns:
      (B, n_tokens) int32, without the prompts.

    Raises:
      TypeError: if the model has no weights.
      ValueError: if a number is out of its range, or `rng` is neither a key nor a seed.
      UsageError: if a prompt is empty or holds ids outside the vocabulary; if prompt and `n_tokens`
        together exceed the model's `max_len`; if the model sees later positions; if `inputs` do not
        fit the model and the prompts; if it cannot speculate, see `drafts.check_can_go_back`; or if
        logits are NaN, naming the token.
    """
    sampler = Sampler(
        temperature,
        top_k,
        top_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
    )
    start = begin(model, prompts, n_tokens, inputs, eos_id)
    check_bias(start.net, sampler)
    keys, limits = row_keys(rng, len(start.tokens)), (np.int32(n_tokens), as_id(eos_id))
    if speculate is None:
        made = _generate(start, sampler, *limits, keys)
    else:
        made = _speculate(speculating.job(speculate, prompts, start, sampler, keys, *limits))
    tokens = np.asarray(made)[:, : int(n_tokens)]
    check_drawn(tokens, 0)
    return tokens


def stream(
    model: Model,
    prompts: Sequences,
    n_tokens: int,
    *,
    inputs: Sequences | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: tuple[tuple[int, float], ...] = (),
    rng: jax.Array | int = 0,
    eos_id: int | None = None,
    speculate: Speculation | None = None,
) -> Iterator[np.ndarray]:
    """Yields tokens (B,) int32 as they are made: the columns of what `generate` returns.

    It ends early once every row has made `eos_id`. Arguments and errors are those of `generate`.
    Arguments are checked at the call; NaN raises when it arises. To stream many prompts of one
    model, unstack it once: ``lc.Model(*lc.unstack(net, weights), state)``.
    """
    sampler = Sampler(
        temperature,
        top_k,
        top_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
    )
    start = begin(model, prompts, n_tokens, inputs, eos_id)
    check_bias(start.net, sampler)
    keys = row_keys(rng, len(start.tokens))
    if speculate is None:
        return _stream(start, sampler, int(n_tokens), as_id(eos_id), keys)
    limits = np.int32(n_tokens), as_id(eos_id)
    return _stream_checked(speculating.job(speculate, prompts, start, sampler, keys, *limits))


class _Kept(NamedTuple):
    """What the next token is made from, besides the last token."""

    state: Tree
    held: jax.Array  # (B, V) int32, see `Sampler`
    i: jax.Array  # how many tokens there are


def _first(start: Start, sampler: Sampler, keys: jax.Array) -> tuple[jax.Array, _Kept]:
    """The first token of each row, (B,), and what the next one is made from."""
    logits, state = ingest(start)
    token, held = _drawn(logits, start.tokens, start.lengths, sampler, keys)
    return token, _Kept(state, held, jnp.int32(1))


@jax.jit
def _drawn(
    logits: jax.Array, tokens: jax.Array, lengths: jax.Array, sampler: Sampler, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first token of each row, and what its row then holds, see `Sampler`."""
    held = sampler.held(tokens, lengths, logits.shape[-1])
    token = sampler(logits, fold_each(keys, 0), held)
    return token, sampler.add(held, token)


def _step(
    start: Start, sampler: Sampler, kept: _Kept, token: jax.Array, keys: jax.Array
) -> tuple[jax.Array, _Kept]:
    logits, state = advance(start, kept.state, token[:, None])
    token = sampler(logits[:, 0], fold_each(keys, kept.i), kept.held)
    return token, _Kept(state, sampler.add(kept.held, token), kept.i + 1)


class _Rows(NamedTuple):
    """Rows on their way."""

    token: jax.Array  # (B,) int32, the last one
    done: jax.Array  # (B,) bool
    kept: _Kept


def _begin(start: Start, sampler: Sampler, eos_id: np.int32, keys: jax.Array) -> _Rows:
    token, kept = _first(start, sampler, keys)
    return _Rows(token, (token == eos_id) & (eos_id >= 0), kept)


def _several(
    constants: tuple[Start, Sampler, jax.Array, jax.Array],
    rows: _Rows,
    end: jax.Array,
    made: jax.Array,
) -> tuple[_Rows, jax.Array]:
    """Makes tokens until there are `end` of them, or all rows are done: columns of `made`."""
    start, sampler, eos_id, keys = constants
    first = rows.kept.i

    def unfinished(carry: Any) -> jax.Array:
        (token, done, kept), _ = carry
        return (kept.i < end) & ~done.all() & (token != NO_TOKEN).all()

    def step(carry: Any) -> Any:
        (token, done, kept), made = carry
        column = kept.i - first
        token, kept = _step(start, sampler, kept, token, keys)
        token = jnp.where(done, eos_id, token)
        made = jax.lax.dynamic_update_slice_in_dim(made, token[:, None], column, 1)
        return _Rows(token, done | (token == eos_id), kept), made

    done: tuple[_Rows, jax.Array] = jax.lax.while_loop(unfinished, step, (rows, made))
    return done


def _generate(
    start: Start, sampler: Sampler, n_tokens: np.int32, eos_id: np.int32, keys: jax.Array
) -> jax.Array:
    """(B, room) tokens, of which the first `n_tokens` are made."""
    constants = start, sampler, eos_id, keys
    rows = _begin(*constants)
    compile_for(_rest, constants, rows, n_tokens)
    return _rest(constants, rows, n_tokens)[0]


@functools.partial(jax.jit, donate_argnums=1)
def _rest(constants: Any, rows: _Rows, n_tokens: jax.Array) -> tuple[jax.Array, _Rows]:
    """(B, room) tokens after the first ones are there: one program serves any number.

    The rows are returned too, so that caches are written where they are.
    """
    start, _, eos_id, _ = constants
    made = jnp.full((len(rows.token), start.room - 1), jnp.maximum(eos_id, 0), jnp.int32)
    first = rows.token[:, None]
    rows, made = _several(constants, rows, n_tokens, made)
    return jnp.concatenate([first, made], 1), rows


_BLOCK = 16  # the most tokens that are streamed by one call
_SECONDS = 0.04  # what one call takes, about: 25 times a second is often enough for a screen


@functools.lru_cache(maxsize=16)
def _next(structure: Any) -> Any:
    """The compiled steps: (leaves of what stays the same, rows, how many) → (rows, tokens).

    Leaves are passed flat, since flattening nested dicts and hashing a model at each token takes
    longer than a small model does.
    """

    def steps(leaves: list[jax.Array], rows: _Rows, n: jax.Array) -> Any:
        made = jnp.zeros((len(rows.token), _BLOCK), jnp.int32)
        return _several(jax.tree.unflatten(structure, leaves), rows, rows.kept.i + n, made)

    return jax.jit(steps, donate_argnums=1)


def _stream(
    start: Start, sampler: Sampler, n_tokens: int, eos_id: np.int32, keys: jax.Array
) -> Iterator[np.ndarray]:
    """Yields columns. A call makes several where tokens are quick: each call takes time, too."""
    leaves, structure = jax.tree.flatten(jax.device_put((start, sampler, eos_id, keys)))
    steps = _next(structure)
    rows = _begin(start, sampler, eos_id, keys)
    if n_tokens > 1:
        compile_for(steps, leaves, rows, np.int32(1))
    blocks = [(np.asarray(rows.token)[:, None], 1)]
    done = np.zeros(len(rows.token), bool)
    shown, asked, n, since = 0, 1, 1, time.perf_counter()
    while blocks:
        if asked < n_tokens:  # dispatches the next tokens before these are read
            n = min(n, n_tokens - asked)
            rows, made = steps(leaves, rows, np.int32(n))
            blocks.append((made, n))
            asked += n
        made, count = blocks.pop(0)
        columns = np.asarray(made)[:, :count]
        now = time.perf_counter()
        if shown:
            n = int(np.clip(_SECONDS * count / max(now - since, 1e-6), 1, _BLOCK))
        since = now
        for column in columns.T:
            column = np.where(done, eos_id, column)
            check_drawn(column[:, None], shown)
            done |= column == eos_id
            shown += 1
            yield column
            if done.all():
                return


def _speculate(job: speculating.Job) -> jax.Array:
    """(B, room) tokens, as of `_generate`."""
    texts = _begin_speculating(job)
    compile_for(_rest_checked, job, texts)
    return _rest_checked(job, texts)[0]


@functools.partial(jax.jit, donate_argnums=1)
def _rest_checked(
    job: speculating.Job, texts: speculating.Texts
) -> tuple[jax.Array, speculating.Texts]:
    def step(texts: speculating.Texts) -> speculating.Texts:
        return speculating.continued(job, texts)

    texts = jax.lax.while_loop(speculating.unfinished, step, texts)
    return speculating.made(job, texts), texts


def _begin_speculating(job: speculating.Job) -> speculating.Texts:
    """The rows after their first token."""
    token, kept = _first(job.start, job.sampler, job.keys)
    draft = None if job.draft is None else ingest(job.draft)[1]
    return _begun(job, token, kept.held, kept.state, draft)


_begun = jax.jit(speculating.begun, donate_argnums=(2, 3, 4))


@functools.lru_cache(maxsize=16)
def _next_checked(structure: Any) -> Any:
    """The compiled step: (leaves of the job, rows) → (new tokens (B, T), how many (B,), rows)."""

    def step(leaves: list[jax.Array], texts: speculating.Texts) -> Any:
        job = jax.tree.unflatten(structure, leaves)
        new = speculating.continued(job, texts)
        return *speculating.since(job, texts.lengths, new), new

    return jax.jit(step, donate_argnums=1)


def _stream_checked(job: speculating.Job) -> Iterator[np.ndarray]:
    """Yields columns as soon as every row has one."""
    eos_id, n_tokens = int(job.eos_id), int(job.n_tokens)
    leaves, structure = jax.tree.flatten(jax.device_put(job))
    step = _next_checked(structure)
    texts = _begin_speculating(job)
    new, n_new = texts.last[:, None], np.ones(len(texts.done), np.int32)
    rows: list[list[int]] = [[] for _ in texts.done]
    shown = 0
    while True:
        for row, tokens, n in zip(rows, np.asarray(new), np.asarray(n_new), strict=True):
            row += tokens[:n].tolist()
        is_over = [len(row) == n_tokens or row[-1] in (eos_id, NO_TOKEN) for row in rows]
        goes_on = not all(is_over) and all(row[-1] != NO_TOKEN for row in rows)
        if goes_on:  # dispatches the next tokens before these are used
            new, n_new, texts = step(leaves, texts)
        ends = [len(row) for row, over in zip(rows, is_over, strict=True) if not over]
        for i in range(shown, min(ends, default=max(map(len, rows)))):
            column = np.array([row[i] if i < len(row) else eos_id for row in rows], np.int32)
            check_drawn(column[:, None], i)
            yield column
        shown = max(shown, min(ends, default=shown))
        if not goes_on:
            return
