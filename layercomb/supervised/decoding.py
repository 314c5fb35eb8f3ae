"""Decoding: `generate` a batch in one compiled program, or `stream` it token by token.

Both ingest the prompt at once, then go a position at a time in ``PREDICT``, with caches that are
updated in place. Weights are unstacked first, since slicing stacked ones copies them every token.
Row b of step i draws with a key folded with b and i, so a sample does not depend on the batch it is
made in, nor on which of the two functions makes it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.layers.attention import LocalSelfAttention, SelfAttention
from layercomb.layers.base import Layer, Mode, Tree, Wrapper, init_state
from layercomb.layers.caches import set_positions
from layercomb.layers.combinators import Serial
from layercomb.layers.core import Dense
from layercomb.layers.lsh import LSHAttention, LSHSelfAttention
from layercomb.layers.multiplicative import MultiplicativeHead
from layercomb.layers.sparse_attention import SparseQKVAttention
from layercomb.model import Model, check_tokens
from layercomb.shapes import shape_dtype
from layercomb.transforms import Tied, bare, unstack, unstack_state

Prompts = Any  # (B, P) integers, or a list of sequences of them, of any lengths

_ROOM = 64  # caches grow in such steps, so that near lengths share a compiled program


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from its logits.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens may be drawn.
      top_p: only the likeliest tokens whose probabilities together reach p may be drawn.

    Raises:
      ValueError: if a value is out of its range.

    References:
      Holtzman et al., nucleus sampling, 2020, https://arxiv.org/abs/1904.09751
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f'temperature must be at least 0, got {self.temperature!r}')
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f'top_k must be a whole number of at least 1, got {self.top_k!r}')
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f'top_p must be above 0 and at most 1, got {self.top_p!r}')

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Draws a token for each row.

        Args:
          logits: (B, V).
          keys: (B,) typed keys.

        Returns:
          (B,) int32.
        """
        logits = logits.astype(jnp.float32)
        if self.temperature == 0:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None:
            least = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p is not None:
            ordered = -jnp.sort(-logits, -1)
            before = jnp.cumsum(jax.nn.softmax(ordered), -1) - jax.nn.softmax(ordered)
            # What comes before a token must not have reached p yet; the first always stays.
            least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), -1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def generate(
    model: Model,
    prompts: Prompts,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | int = 0,
    eos_id: int | None = None,
) -> np.ndarray:
    """Continues each prompt by `n_tokens` tokens, in one compiled program.

    Args:
      model: a language model with weights, (B, L) → (B, L, V).
      prompts: (B, P) integers, or a list of B sequences of integers of any lengths.
      n_tokens: how many to make.
      temperature, top_k, top_p: see `Sampler`; temperature 0 is greedy.
      rng: a typed key, or a seed.
      eos_id: a row is done once it has made this token, and is filled up with it.

    Returns:
      (B, n_tokens) int32, without the prompts.

    Raises:
      UsageError: if a prompt is empty, holds ids outside the vocabulary, or is with `n_tokens`
        longer than the model's positions reach.
    """
    start = _start(model, prompts, n_tokens)
    sampler = Sampler(temperature, top_k, top_p)
    keys = _row_keys(rng, len(start.tokens))
    start, state = dataclasses.replace(start, state={}), start.state
    return np.asarray(_generate(start, sampler, n_tokens, eos_id, state, keys)[0])


def stream(
    model: Model,
    prompts: Prompts,
    n_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: jax.Array | int = 0,
    eos_id: int | None = None,
) -> Iterator[np.ndarray]:
    """Yields (B,) tokens as they are made: the columns of what `generate` returns.

    Ends early once every row has made `eos_id`. Arguments and errors are those of `generate`; they
    are checked at the call, not at the first token.
    """
    start = _start(model, prompts, n_tokens)
    sampler = Sampler(temperature, top_k, top_p)
    return _stream(start, sampler, n_tokens, eos_id, _row_keys(rng, len(start.tokens)))


def max_len(layer: Layer) -> int | None:
    """The longest sequence that a model's positions reach, or None if nothing limits it."""
    limits = [getattr(layer, 'max_len', None), *map(max_len, layer.sublayers)]
    return min((n for n in limits if n is not None), default=None)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['weights', 'state', 'tokens', 'lengths'],
    meta_fields=['net'],
)
@dataclasses.dataclass(frozen=True)
class _Start:
    """All that decoding begins with."""

    net: Layer
    weights: Tree
    state: Tree
    tokens: jax.Array  # (B, P), padded at the end
    lengths: jax.Array  # (B,)


def _start(model: Model, prompts: Prompts, n_tokens: int) -> _Start:
    if not isinstance(model, Model) or model.weights is None:
        raise TypeError('decoding needs an lc.Model with weights: init, load or train it first')
    if not isinstance(n_tokens, int) or n_tokens < 1:
        raise ValueError(f'n_tokens must be a whole number of at least 1, got {n_tokens!r}')
    _refuse_looking_ahead(model.layer)
    tokens, lengths = _pad(prompts)
    longest = tokens.shape[1]
    try:
        check_tokens(model.layer, (tokens,))
    except ValueError as e:
        raise UsageError(f'the prompt does not fit the model: {e}') from None
    needed, limit = longest + n_tokens, max_len(model.layer)
    if limit is not None and needed > limit:
        raise UsageError(
            f'the prompt of {longest} tokens and {n_tokens} new ones make {needed}, and '
            f"the model's max_len is {limit}: shorten the prompt, or ask for fewer"
        )
    room = _round_up(needed) if limit is None else min(_round_up(needed), limit)
    signature = shape_dtype((len(tokens), room), 'int32')
    tokens = np.pad(tokens, ((0, 0), (0, min(_round_up(longest), room) - longest)))
    net, weights = unstack(model.layer, model.weights)
    trained = unstack_state(model.layer, model.state)
    fresh = init_state(net, signature, Mode.PREDICT)
    state = _carry_over(net, trained, fresh, signature)
    return _Start(net, weights, state, jnp.asarray(tokens), jnp.asarray(lengths))


_ATTENTION = (
    SelfAttention,
    LocalSelfAttention,
    LSHSelfAttention,
    LSHAttention,
    SparseQKVAttention,
)
_HEADS = (Dense, MultiplicativeHead)


def _refuse_looking_ahead(layer: Layer) -> None:
    """Raises a UsageError if self-attention sees later positions, which decoding does not have."""
    if isinstance(layer, _ATTENTION) and not layer.causal:
        raise UsageError(
            f'{type(layer).__name__} with causal=False sees later positions, so it cannot make '
            'them one by one: decode a model with causal attention'
        )
    for each in layer.sublayers:
        _refuse_looking_ahead(each)


def _pad(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Ragged prompts as one array (B, P), padded with 0 at the end, and their lengths (B,)."""
    rows: Sequence[np.ndarray] = [np.asarray(row) for row in prompts]
    for row in rows:
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise UsageError(
                'a prompt is a sequence of at least one token id, and prompts are a list of them: '
                f'got {row.dtype} of shape {row.shape}'
            )
    if not rows:
        raise UsageError('there is no prompt: give at least one')
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


def _round_up(length: int) -> int:
    return -(-length // _ROOM) * _ROOM


def _carry_over(net: Layer, trained: Tree, fresh: Tree, signature: Any) -> Tree:
    """A fresh decoding state with what training left: running statistics, but no caches."""
    key = jax.eval_shape(jax.random.key, 0)
    made = jax.eval_shape(lambda key: net.init((signature,), key, Mode.TRAIN)[1], key)
    of_training = trees.flatten(made)
    kept = {path: x for path, x in trees.flatten(trained).items() if path in of_training}
    return trees.map_with_path(lambda path, x: jnp.copy(kept[path]) if path in kept else x, fresh)


def _row_keys(rng: jax.Array | int, n: int) -> jax.Array:
    rng = jax.random.key(rng) if isinstance(rng, int) else rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(n))


def _fold_each(keys: jax.Array, i: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)


def _ingest(start: _Start, state: Tree) -> tuple[jax.Array, Tree]:
    """Runs the prompts: logits (B, V) after each, and the state with each row at its length."""
    at, short = start.lengths - 1, _at_one_position(start.net)
    if short is None:
        (logits,), state = start.net.apply(start.weights, state, (start.tokens,), mode=Mode.PREDICT)
        logits = _take(logits, at)
    else:
        inputs = (start.tokens, at)
        (logits,), state = short.apply(start.weights, state, inputs, mode=Mode.PREDICT)
    return logits[:, 0], set_positions(state, start.lengths)


class _AtPosition(Wrapper):
    """A head at one position of each row: (x (B, L, D), positions (B,)) → (B, 1, V)."""

    n_in = property(lambda self: 2)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        x = _take(*inputs)
        return self.layer.apply(weights, state, (x,), rng=rng, mode=mode)


def _at_one_position(net: Layer) -> Layer | None:
    """The model with positions (B,) as a second input and logits (B, 1, V) there alone.

    With the same paths. None if it does not end with a head that sees each position by itself.
    """
    if isinstance(net, Tied):
        inner = _at_one_position(net.layer)
        return None if inner is None else net.replace(layer=inner)
    if type(net) is Serial and net.layers:
        named = [layer.replace(name=key) for key, layer in zip(net.keys, net.layers, strict=True)]
        last = _at_one_position(named[-1])
        return None if last is None else Serial(*named[:-1], last, name=net.name)
    return _AtPosition(net) if type(bare(net)) in _HEADS else None


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, at[:, None, None], axis=1)  # (B, L, D) → (B, 1, D)


def _advance(start: _Start, state: Tree, token: jax.Array) -> tuple[jax.Array, Tree]:
    """Runs one position, (B,) tokens: logits (B, V) after it."""
    (logits,), state = start.net.apply(start.weights, state, (token[:, None],), mode=Mode.PREDICT)
    return logits[:, 0], state


@functools.partial(jax.jit, static_argnums=(1, 2, 3), donate_argnums=4)
def _generate(
    start: _Start, sampler: Sampler, n_tokens: int, eos_id: int | None, state: Tree, keys: jax.Array
) -> tuple[jax.Array, Tree]:
    logits, state = _ingest(start, state)
    first = sampler(logits, _fold_each(keys, 0))
    made = jnp.full((len(first), n_tokens), 0 if eos_id is None else eos_id, jnp.int32)
    made = made.at[:, 0].set(first)

    def unfinished(carry: Any) -> jax.Array:
        i, _, done, *_ = carry
        return (i < n_tokens) & ~done.all()

    def step(carry: Any) -> Any:
        i, token, done, state, made = carry
        logits, state = _advance(start, state, token)
        token = sampler(logits, _fold_each(keys, i))
        if eos_id is not None:
            token = jnp.where(done, eos_id, token)
            done = done | (token == eos_id)
        return i + 1, token, done, state, jax.lax.dynamic_update_slice(made, token[:, None], (0, i))

    done = first == eos_id if eos_id is not None else jnp.zeros(first.shape, bool)
    carry = (jnp.int32(1), first, done, state, made)
    *_, state, made = jax.lax.while_loop(unfinished, step, carry)
    return made, state  # the state, so that the caches given are the ones that are written to


def _stream(
    start: _Start, sampler: Sampler, n_tokens: int, eos_id: int | None, keys: jax.Array
) -> Iterator[np.ndarray]:
    start, state = dataclasses.replace(start, state={}), start.state
    token, state = _first(start, sampler, state, keys)
    done = np.zeros(len(token), bool)
    for i in range(1, n_tokens + 1):
        shown = np.asarray(token)
        if eos_id is not None:
            shown = np.where(done, eos_id, shown)
            done = done | (shown == eos_id)
        yield shown.astype(np.int32)
        if done.all() or i == n_tokens:
            return
        token, state = _next(start, sampler, state, token, keys, i)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def _first(start: _Start, sampler: Sampler, state: Tree, keys: jax.Array) -> tuple[jax.Array, Tree]:
    logits, state = _ingest(start, state)
    return sampler(logits, _fold_each(keys, 0)), state


@functools.partial(jax.jit, static_argnums=1, donate_argnums=2)
def _next(
    start: _Start, sampler: Sampler, state: Tree, token: jax.Array, keys: jax.Array, i: Any
) -> tuple[jax.Array, Tree]:
    logits, state = _advance(start, state, token)
    return sampler(logits, _fold_each(keys, i)), state


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
