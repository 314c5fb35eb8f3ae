"""Decoding: `generate` a batch in one compiled program, or `stream` it token by token.

Both read the prompt at once, then go a position at a time in ``PREDICT``, with caches that are
updated in place. Row b of step i draws with a key folded with b and i, so a sample does not depend
on the batch it is made in, nor on which of the two functions makes it. `beam_search` looks for the
likeliest continuations, and `score` tells how likely given ones are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.base import Tree
from layercomb.model import Model
from layercomb.supervised.beams import Beams, beam_search
from layercomb.supervised.prompts import Sequences, Start, advance, begin, ingest, max_len
from layercomb.supervised.sampling import Sampler
from layercomb.supervised.scoring import Scores, score

__all__ = [
    'Beams',
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
    rng: jax.Array | int = 0,
    eos_id: int | None = None,
) -> np.ndarray:
    """Continues each prompt by `n_tokens` tokens, in one compiled program.

    Args:
      model: with weights: a language model, (B, L) → (B, L, V), or an encoder-decoder, (B, S),
        (B, L)[, mask (B, S)] → (B, L, V).
      prompts: (B, P) integers, or a list of B sequences of integers of any lengths; to an
        encoder-decoder what its decoder begins with, a token at least.
      n_tokens: how many to make.
      inputs: what an encoder reads, likewise; lengths may differ if the model takes a mask.
      temperature, top_k, top_p, repetition_penalty: see `Sampler`; temperature 0 is greedy.
      rng: a typed key, or a seed.
      eos_id: a row is done once it has made this token, and is filled up with it.

    Returns:
      (B, n_tokens) int32, without the prompts.

    Raises:
      TypeError: if the model has no weights.
      ValueError: if a number is out of its range.
      UsageError: if a prompt is empty, holds ids outside the vocabulary, or is with `n_tokens`
        longer than the model's positions reach; if the model looks ahead; or if `inputs` do not go
        with the model and the prompts.
    """
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty)
    start = begin(model, prompts, n_tokens, inputs)
    return np.asarray(_generate(start, sampler, n_tokens, eos_id, _row_keys(rng, start)))


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
    rng: jax.Array | int = 0,
    eos_id: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields (B,) tokens as they are made: the columns of what `generate` returns.

    Ends early once every row has made `eos_id`. Arguments and errors are those of `generate`; they
    are checked at the call, not at the first token. To stream many prompts of one model, unstack it
    once: ``lc.Model(*lc.unstack(net, weights), state)``.
    """
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty)
    start = begin(model, prompts, n_tokens, inputs)
    return _stream(start, sampler, n_tokens, eos_id, _row_keys(rng, start))


def _row_keys(rng: jax.Array | int, start: Start) -> jax.Array:
    rng = jax.random.key(rng) if isinstance(rng, int) else rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(len(start.tokens)))


def _fold_each(keys: jax.Array, i: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)


@jax.jit
def _first(start: Start, sampler: Sampler, keys: jax.Array) -> tuple[jax.Array, Any]:
    """The first token of each row, and what the next one is made from."""
    logits, state = ingest(start)
    seen = sampler.seen(start.tokens, start.lengths, logits.shape[-1])
    token = sampler(logits, _fold_each(keys, 0), seen)
    return token, (state, sampler.add(seen, token))


def _step(
    start: Start, sampler: Sampler, kept: tuple[Tree, Any], token: Any, keys: Any, i: Any
) -> tuple[jax.Array, Any]:
    state, seen = kept
    logits, state = advance(start, state, token)
    token = sampler(logits, _fold_each(keys, i), seen)
    return token, (state, sampler.add(seen, token))


_next = functools.partial(jax.jit, donate_argnums=2)(_step)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _generate(
    start: Start, sampler: Sampler, n_tokens: int, eos_id: int | None, keys: jax.Array
) -> jax.Array:
    first, kept = _first(start, sampler, keys)
    made = jnp.full((len(first), n_tokens), 0 if eos_id is None else eos_id, jnp.int32)
    made = made.at[:, 0].set(first)

    def unfinished(carry: Any) -> jax.Array:
        i, _, done, *_ = carry
        return (i < n_tokens) & ~done.all()

    def step(carry: Any) -> Any:
        i, token, done, kept, made = carry
        token, kept = _step(start, sampler, kept, token, keys, i)
        if eos_id is not None:
            token = jnp.where(done, eos_id, token)
            done = done | (token == eos_id)
        return i + 1, token, done, kept, jax.lax.dynamic_update_slice(made, token[:, None], (0, i))

    done = first == eos_id if eos_id is not None else jnp.zeros(first.shape, bool)
    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), first, done, kept, made))[-1]


def _stream(
    start: Start, sampler: Sampler, n_tokens: int, eos_id: int | None, keys: jax.Array
) -> Iterator[np.ndarray]:
    token, kept = _first(start, sampler, keys)
    done = np.zeros(len(token), bool)
    for i in range(1, n_tokens + 1):
        made = token
        if i < n_tokens:  # the next one is on its way while this one is looked at
            token, kept = _next(start, sampler, kept, made, keys, i)
        shown = np.asarray(made)
        if eos_id is not None:
            shown = np.where(done, eos_id, shown)
            done = done | (shown == eos_id)
        yield shown.astype(np.int32)
        if done.all():
            return
