"""How the next token is drawn from its logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Bound, Size, check_value, take_fields
from layercomb.errors import UsageError

NO_TOKEN = -1  # drawn where the logits have no probabilities
_COLD = 1e-6  # below it, argmax takes the likeliest token, as drawing would, up to rounding
_ALL = 2**31 - 1  # more tokens than any vocabulary has
N_BIASES = 300  # pairs of `logit_bias`, as many as OpenAI's API takes; a program has room for all
_IDS = 6  # the place of the ids of biases among the numbers of a sampler

Temperature = Annotated[float, Bound(0, math.inf)]
Share = Annotated[float, Bound(above=0, high=1)]
Penalty = Annotated[float, Bound(1e-6, high=1e6)]
Subtracted = Annotated[float, Bound(-1e6, high=1e6)]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from its logits.

    The repetition penalty is applied first, then presence and frequency penalty, the biases,
    temperature, top-k and top-p. All numbers are arguments of the compiled program, so one program
    serves any of them. A filter that no row needs is skipped at run time.

    Inside a program, each number may also be an array of one number a row, see `stacked`: the draw
    of a row does not depend on the numbers of the others.

    Attributes:
      temperature: logits are divided by it; 0, or less than 1e-6, takes the likeliest token.
      top_k: only the k likeliest tokens may be drawn; None for no limit.
      top_p: only the likeliest tokens whose probabilities together reach p may be drawn; None for
        no limit.
      repetition_penalty: for tokens that the row already holds, prompt included, positive logits
        are divided by it and others multiplied. 1 changes nothing; more makes repetitions rarer.
      presence_penalty: subtracted from the logits of tokens that were made, prompt not included.
      frequency_penalty: subtracted as often as the token was made, prompt not included.
      logit_bias: (token id, bias) pairs, at most 300; each bias is added to the token's logit.

    Raises:
      TypeError: if a value is no number, or `logit_bias` holds no pairs.
      ValueError: if one is out of its range, or an id comes twice.

    References:
      Holtzman et al., nucleus sampling, 2020, https://arxiv.org/abs/1904.09751
      Keskar et al., CTRL (the penalty), 2019, https://arxiv.org/abs/1909.05858
    """

    temperature: Temperature = 1.0
    top_k: Size | None = None
    top_p: Share | None = None
    repetition_penalty: Penalty = 1.0
    presence_penalty: Subtracted = 0.0
    frequency_penalty: Subtracted = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, 'logit_bias', _pairs(self.logit_bias))
        take_fields(self)

    def __call__(
        self, logits: jax.Array, keys: jax.Array, held: jax.Array | None = None
    ) -> jax.Array:
        """Draws a token for each row.

        Args:
          logits: (B, V).
          keys: (B,) typed keys.
          held: (B, V) int32, the tokens that each row holds, as `held` gives them; None for no
            penalty.

        Returns:
          (B,) int32; `NO_TOKEN` in rows without probabilities, see `has_probabilities`.
        """
        numbers = _Numbers.of(self, len(logits))
        logits = logits.astype(jnp.float32)
        if held is not None:
            logits = _where_needed(numbers.penalized, numbers.penalize, logits, held)
        logits = _where_needed(numbers.biased, numbers.favour, logits)
        likeliest = _first_of_greatest(logits)
        cold = numbers.temperature[:, 0] < _COLD
        token = jax.lax.cond(
            cold.all(),
            lambda logits: likeliest,
            lambda logits: jnp.where(cold, likeliest, numbers.draw(logits, keys)),
            logits,
        )
        return jnp.where(has_probabilities(logits), token, NO_TOKEN)

    def held(self, tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
        """The tokens that rows hold at first: (B, V) int32, 1 for each token of the prompt.

        Args:
          tokens: (B, P) int32, the prompts, padded at the end.
          lengths: (B,) int32, of the prompts.
          vocab_size: V.
        """
        there = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
        empty = jnp.zeros((len(tokens), vocab_size), jnp.int32)
        return empty.at[rows, tokens].max(there.astype(jnp.int32))

    def add(self, held: jax.Array, token: jax.Array) -> jax.Array:
        """Adds one token a row.

        Args:
          held: (B, V) int32, the tokens that rows hold.
          token: (B,) int32.

        Returns:
          (B, V) int32: 2 more for each token that was made.
        """
        return held.at[jnp.arange(len(token), dtype=jnp.int32), token].add(2)


class _Numbers(NamedTuple):
    """The numbers of a sampler, one a row: (B, 1), and (B, K) ids and biases."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    biased_ids: jax.Array
    biases: jax.Array

    @classmethod
    def of(cls, sampler: Sampler, n_rows: int) -> _Numbers:
        *scalars, ids, biases = _flatten(sampler)[0]
        made = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (n_rows,))[:, None] for x in scalars]
        ids = jnp.broadcast_to(jnp.asarray(ids, jnp.int32), (n_rows, N_BIASES))
        biases = jnp.broadcast_to(jnp.asarray(biases, jnp.float32), (n_rows, N_BIASES))
        return cls._make((*made, ids, biases))

    @property
    def penalized(self) -> jax.Array:
        """Whether any row has a penalty."""
        subtracted = (self.presence_penalty != 0) | (self.frequency_penalty != 0)
        return (subtracted | (self.repetition_penalty != 1)).any()

    def penalize(self, logits: jax.Array, held: jax.Array) -> jax.Array:
        n_made = (held // 2).astype(jnp.float32)
        penalty = self.repetition_penalty
        rarer = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(held > 0, rarer, logits)
        logits = logits - self.frequency_penalty * n_made
        return jnp.where(n_made > 0, logits - self.presence_penalty, logits)

    @property
    def biased(self) -> jax.Array:
        """Whether any row has a bias."""
        return (self.biases != 0).any()

    def favour(self, logits: jax.Array) -> jax.Array:
        rows = jnp.arange(len(logits), dtype=jnp.int32)[:, None]
        return logits.at[rows, self.biased_ids].add(self.biases, mode='drop')

    def draw(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Tokens (B,) from filtered logits, also in rows whose temperature is 0."""
        size = logits.shape[-1]
        cold = self.temperature < _COLD
        logits = logits / jnp.where(cold, 1.0, self.temperature)
        limits_k, limits_p = ~cold & (self.top_k < size), ~cold & (self.top_p < 1)
        logits = _where_needed(
            limits_k.any(),
            lambda x: jnp.where(limits_k, _likeliest(x, jnp.ones_like(x), self.top_k[:, 0]), x),
            logits,
        )
        logits = _where_needed(
            limits_p.any(),
            lambda x: jnp.where(limits_p, _likeliest(x, jax.nn.softmax(x), self.top_p[:, 0]), x),
            logits,
        )
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32))(keys)
        return _first_of_greatest(noise + logits)  # as jax.random.categorical has it


def stacked(samplers: Sequence[Sampler]) -> Sampler:
    """One sampler for a batch, with a number of each of `samplers` for each row, in their order."""
    rows = [_flatten(sampler)[0] for sampler in samplers]
    kinds = [np.int32 if at == _IDS else np.float32 for at in range(len(rows[0]))]
    columns = zip(kinds, zip(*rows, strict=True), strict=True)
    return _unflatten(None, [np.stack([np.asarray(x, kind) for x in xs]) for kind, xs in columns])


def _where_needed(needed: jax.Array, filtered: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """The filtered logits, or the logits, `args[0]`, if no row needs the filter."""
    made: jax.Array = jax.lax.cond(needed, filtered, lambda logits, *_: logits, *args)
    return made


def _first_of_greatest(x: jax.Array) -> jax.Array:
    """argmax over the last axis, (B, V) → (B,) int32; any token in rows with NaN.

    On a CPU, XLA takes seven times as long for its own argmax.
    """
    numbers = jnp.arange(x.shape[-1], dtype=jnp.int32)
    found = jnp.where(x == x.max(-1, keepdims=True), numbers, numbers[-1])
    return found.min(-1)


def has_probabilities(logits: jax.Array) -> jax.Array:
    """Whether logits (…, V) give probabilities: no NaN, no +∞, and at least one above −∞."""
    # The maximum would not do: on a CPU it ignores NaN.
    return (logits < jnp.inf).all(-1) & (logits > -jnp.inf).any(-1)


def diverged(where: str) -> UsageError:
    """The error for logits without probabilities, to be raised.

    Args:
      where: the place, such as 'at token 3 of row 0'.
    """
    return UsageError(
        f'the logits are NaN or infinite {where}: the weights have most likely diverged, so load '
        'those of an earlier checkpoint, or train with a lower learning rate'
    )


def check_drawn(tokens: np.ndarray, first: int) -> None:
    """Raises a UsageError if one of the tokens is `NO_TOKEN`.

    Args:
      tokens: (B, T) integers.
      first: the number of the first column, for the message.
    """
    steps, rows = np.nonzero(tokens.T == NO_TOKEN)
    if steps.size:
        raise diverged(f'at token {first + steps[0]} of row {rows[0]}')


def _likeliest(logits: jax.Array, shares: jax.Array, wanted: jax.Array) -> jax.Array:
    """Sets logits (B, V) below t to −∞, for the largest t with Σ shares[logits ≥ t] ≥ wanted.

    t is found bit by bit, by 32 sums. Sorting a vocabulary of 50,000 would take longer than a step
    of a small model.
    """
    bits = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)  # integers in the order of the floats

    def one(i: jax.Array, least: jax.Array) -> jax.Array:
        tried = least | (sign >> jnp.asarray(i, jnp.uint32))  # (B,)
        total = jnp.where(order >= tried[:, None], shares, 0.0).sum(-1)
        return jnp.where(total >= wanted, tried, least)

    least = jax.lax.fori_loop(np.int32(0), np.int32(32), one, jnp.zeros(len(logits), jnp.uint32))
    return jnp.where(order >= least[:, None], logits, -jnp.inf)


def _pairs(given: Any) -> tuple[tuple[int, float], ...]:
    """`logit_bias` as it is held.

    Raises:
      TypeError: if it is no sequence of pairs of an id and a number.
      ValueError: if there are too many, an id comes twice or is negative, or a bias is not finite.
    """
    try:
        pairs = tuple((check_value('Sampler', 'logit_bias', i, int), float(b)) for i, b in given)
    except (TypeError, ValueError):
        raise TypeError(
            f'Sampler: logit_bias must be pairs of a token id and a number, got {given!r:.100}'
        ) from None
    if len(pairs) > N_BIASES:
        raise ValueError(f'Sampler: logit_bias may have {N_BIASES} pairs, got {len(pairs)}')
    if len({i for i, _ in pairs}) < len(pairs):
        raise ValueError('Sampler: logit_bias names a token twice: give one bias for each')
    for i, bias in pairs:
        if i < 0 or not abs(bias) <= 1e6:
            raise ValueError(f'Sampler: logit_bias must be ids and biases to ±1e6, got {i}, {bias}')
    return pairs


def _flatten(sampler: Sampler) -> tuple[tuple[Any, ...], None]:
    top_k = _ALL if sampler.top_k is None else sampler.top_k
    top_p = 1.0 if sampler.top_p is None else sampler.top_p
    if isinstance(top_k, int):
        top_k = min(top_k, _ALL)
    penalties = sampler.repetition_penalty, sampler.presence_penalty, sampler.frequency_penalty
    return (sampler.temperature, top_k, top_p, *penalties, *_bias(sampler.logit_bias)), None


def _bias(given: Any) -> Any:
    """Ids and biases as arrays with `N_BIASES` places, from pairs; or the arrays that there are."""
    if given and not isinstance(given[0], tuple):
        return given
    ids, biases = np.full(N_BIASES, _ALL, np.int32), np.zeros(N_BIASES, np.float32)
    if given:
        ids[: len(given)], biases[: len(given)] = zip(*given, strict=True)
    return ids, biases


def _unflatten(_: None, numbers: Sequence[Any]) -> Sampler:
    sampler = object.__new__(Sampler)  # traced numbers cannot be validated, and have been
    *scalars, ids, biases = numbers
    values = (*scalars, (ids, biases))
    for field, value in zip(dataclasses.fields(Sampler), values, strict=True):
        object.__setattr__(sampler, field.name, value)
    return sampler


# One program serves all numbers, also those that are None.
jax.tree_util.register_pytree_node(Sampler, _flatten, _unflatten)
