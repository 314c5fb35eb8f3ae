"""How the next token is drawn from its logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from its logits: what follows, in this order.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens may be drawn.
      top_p: only the likeliest tokens whose probabilities together reach p may be drawn.
      repetition_penalty: before all that, the logits of tokens that the row holds already, prompt
        included, are divided by it where they are positive and multiplied where they are not; 1
        changes nothing, more makes repetitions rarer.

    Raises:
      ValueError: if a value is out of its range.

    References:
      Holtzman et al., nucleus sampling, 2020, https://arxiv.org/abs/1904.09751
      Keskar et al., CTRL (the penalty), 2019, https://arxiv.org/abs/1909.05858
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ValueError(f'temperature must be at least 0, got {self.temperature!r}')
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f'top_k must be a whole number of at least 1, got {self.top_k!r}')
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ValueError(f'top_p must be above 0 and at most 1, got {self.top_p!r}')
        if not _is_number(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise ValueError(f'repetition_penalty must be above 0, got {self.repetition_penalty!r}')

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; known while the temperature is traced, too."""
        return _is_number(self.temperature) and self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether tokens become rarer that are there already."""
        return not _is_number(self.repetition_penalty) or self.repetition_penalty != 1

    def __call__(
        self, logits: jax.Array, keys: jax.Array, seen: jax.Array | None = None
    ) -> jax.Array:
        """Draws a token for each row.

        Args:
          logits: (B, V).
          keys: (B,) typed keys.
          seen: (B, V) bool, the tokens that each row holds; None where nothing is penalised.

        Returns:
          (B,) int32.
        """
        logits = logits.astype(jnp.float32)
        if seen is not None:
            penalty = self.repetition_penalty
            rarer = jnp.where(logits > 0, logits / penalty, logits * penalty)
            logits = jnp.where(seen, rarer, logits)
        if self.greedy:
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

    def seen(self, tokens: jax.Array, lengths: jax.Array, vocab_size: int) -> jax.Array | None:
        """What rows hold at first, (B, V) bool, of prompts (B, P); None if nothing is penalised."""
        if not self.penalises:
            return None
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        rows = jnp.arange(len(tokens))[:, None]
        return jnp.zeros((len(tokens), vocab_size), bool).at[rows, tokens].max(real)

    def add(self, seen: jax.Array | None, token: jax.Array) -> jax.Array | None:
        """What rows hold after one more token each, (B,)."""
        return None if seen is None else seen.at[jnp.arange(len(token)), token].set(True)


def _flatten(sampler: Sampler) -> tuple[tuple[Any, ...], int | None]:
    temperature = None if sampler.greedy else sampler.temperature
    penalty = sampler.repetition_penalty if sampler.penalises else None
    return (temperature, sampler.top_p, penalty), sampler.top_k


def _unflatten(top_k: int | None, numbers: tuple[Any, ...]) -> Sampler:
    sampler = object.__new__(Sampler)  # traced numbers cannot be validated, and have been
    temperature, top_p, penalty = numbers
    values = {
        'temperature': 0.0 if temperature is None else temperature,
        'top_k': top_k,
        'top_p': top_p,
        'repetition_penalty': 1.0 if penalty is None else penalty,
    }
    for name, value in values.items():
        object.__setattr__(sampler, name, value)
    return sampler


# A program holds for any numbers: only which of them are in use is part of it.
jax.tree_util.register_pytree_node(Sampler, _flatten, _unflatten)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
