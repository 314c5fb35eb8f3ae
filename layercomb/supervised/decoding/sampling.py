"""How the next token is drawn from its logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Bound, Size, take_fields
from layercomb.errors import UsageError

NO_TOKEN = -1  # drawn where the logits have no probabilities
_COLD = 1e-6  # below it, argmax takes the likeliest token, as drawing would, up to rounding
_ALL = 2**31 - 1  # more tokens than any vocabulary has

Temperature = Annotated[float, Bound(0, math.inf)]
Share = Annotated[float, Bound(above=0, high=1)]
Penalty = Annotated[float, Bound(1e-6, high=1e6)]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from its logits.

    The repetition penalty is applied first, then temperature, top-k and top-p. All numbers are
    arguments of the compiled program, so one program serves any of them. A filter that is switched
    off is skipped at run time.

    Attributes:
      temperature: logits are divided by it; 0, or less than 1e-6, takes the likeliest token.
      top_k: only the k likeliest tokens may be drawn; None for no limit.
      top_p: only the likeliest tokens whose probabilities together reach p may be drawn; None for
        no limit.
      repetition_penalty: for tokens that the row already holds, prompt included, positive logits
        are divided by it and others multiplied. 1 changes nothing; more makes repetitions rarer.

    Raises:
      TypeError: if a value is no number.
      ValueError: if one is out of its range.

    References:
      Holtzman et al., nucleus sampling, 2020, https://arxiv.org/abs/1904.09751
      Keskar et al., CTRL (the penalty), 2019, https://arxiv.org/abs/1909.05858
    """

    temperature: Temperature = 1.0
    top_k: Size | None = None
    top_p: Share | None = None
    repetition_penalty: Penalty = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        take_fields(self)

    def __call__(
        self, logits: jax.Array, keys: jax.Array, seen: jax.Array | None = None
    ) -> jax.Array:
        """Draws a token for each row.

        Args:
          logits: (B, V).
          keys: (B,) typed keys.
          seen: (B, V) bool, the tokens that each row holds; None for no penalty.

        Returns:
          (B,) int32; `NO_TOKEN` in rows without probabilities, see `has_probabilities`.
        """
        logits = logits.astype(jnp.float32)
        if seen is not None:
            penalty = self.repetition_penalty
            rarer = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(seen, rarer, logits)
        token = jax.lax.cond(
            self.temperature < _COLD,
            lambda logits: jnp.argmax(logits, -1).astype(jnp.int32),
            lambda logits: self._draw(logits, keys),
            logits,
        )
        return jnp.where(has_probabilities(logits), token, NO_TOKEN)

    def _draw(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        top_k = _ALL if self.top_k is None else self.top_k
        top_p = 1.0 if self.top_p is None else self.top_p
        logits = jax.lax.cond(
            top_k < logits.shape[-1],
            lambda x: _likeliest(x, jnp.ones_like(x), jnp.asarray(top_k, jnp.float32)),
            lambda x: x,
            logits / self.temperature,
        )
        logits = jax.lax.cond(
            top_p < 1.0,
            lambda x: _likeliest(x, jax.nn.softmax(x), jnp.asarray(top_p, jnp.float32)),
            lambda x: x,
            logits,
        )
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)

    def seen(self, tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array:
        """The tokens that rows hold at first, (B, V) bool.

        Args:
          tokens: (B, P) int32, the prompts, padded at the end.
          lengths: (B,) int32, of the prompts.
          vocab_size: V.
        """
        there = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < lengths[:, None]
        rows = jnp.arange(len(tokens), dtype=jnp.int32)[:, None]
        return jnp.zeros((len(tokens), vocab_size), bool).at[rows, tokens].max(there)

    def add(self, seen: jax.Array, token: jax.Array) -> jax.Array:
        """Adds one token a row.

        Args:
          seen: (B, V) bool, the tokens that rows hold.
          token: (B,) int32.

        Returns:
          (B, V) bool.
        """
        return seen.at[jnp.arange(len(token), dtype=jnp.int32), token].set(True)


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


def _flatten(sampler: Sampler) -> tuple[tuple[Any, ...], None]:
    top_k = _ALL if sampler.top_k is None else sampler.top_k
    top_p = 1.0 if sampler.top_p is None else sampler.top_p
    if isinstance(top_k, int):
        top_k = min(top_k, _ALL)
    return (sampler.temperature, top_k, top_p, sampler.repetition_penalty), None


def _unflatten(_: None, numbers: Sequence[Any]) -> Sampler:
    sampler = object.__new__(Sampler)  # traced numbers cannot be validated, and have been
    for field, value in zip(dataclasses.fields(Sampler), numbers, strict=False):
        object.__setattr__(sampler, field.name, value)
    return sampler


# One program serves all numbers, also those that are None.
jax.tree_util.register_pytree_node(Sampler, _flatten, _unflatten)
