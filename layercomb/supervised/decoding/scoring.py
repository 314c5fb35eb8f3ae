"""`score`: the log-likelihood of given texts under a model; and that of single tokens."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import losses
from layercomb.checks import Size, check_value
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.metrics.classification import CrossEntropyLoss
from layercomb.model import Model
from layercomb.supervised.decoding.prompts import (
    Sequences,
    check_ids,
    checked,
    context_of,
    max_len,
    padded,
    padded_length,
)
from layercomb.supervised.decoding.sampling import diverged

_TOGETHER = 512  # positions whose logits exist at a time


class Scores(NamedTuple):
    """Log-likelihoods, in nats.

    Attributes:
      tokens: (B, L) float32, log p(y_t | y_<t) of each token; 0 for given tokens and for padding.
      totals: (B,) float32, the sums over tokens.
    """

    tokens: np.ndarray
    totals: np.ndarray


N_ALTERNATIVES = 20  # the most that OpenAI's API tells


class Alternatives(NamedTuple):
    """How likely tokens are, and the likeliest ones at their places.

    Attributes:
      logprob: (B,) float32, log p of each token.
      ids: (B, N) int32, the likeliest tokens, best first.
      logprobs: (B, N) float32, log p of these.
    """

    logprob: jax.Array
    ids: jax.Array
    logprobs: jax.Array


def alternatives(logits: jax.Array, tokens: jax.Array) -> Alternatives:
    """The log-probabilities of tokens, and of the `N_ALTERNATIVES` likeliest ones.

    Args:
      logits: (B, V).
      tokens: (B,) integers.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(log_p, tokens[:, None], 1, mode='clip')[:, 0]
    best, ids = jax.lax.top_k(log_p, min(N_ALTERNATIVES, logits.shape[1]))
    return Alternatives(chosen, ids.astype(jnp.int32), best)


def score(
    model: Model, texts: Sequences, *, n_given: int = 1, inputs: Sequences | None = None
) -> Scores:
    """The log-likelihood of texts: Σ_t log p(y_t | y_<t), over t from `n_given` on.

    It runs in ``EVAL``, on whole sequences. Logits exist for a slice of the positions at a time.

    Args:
      model: as in `decoding.generate`.
      texts: (B, L) integers, or a list of B sequences of integers, each longer than `n_given`.
      n_given: how many first tokens of each text are given and not scored; at least 1, since the
        model gives no probability to the first token.
      inputs: what an encoder reads, as in `decoding.generate`.

    Returns:
      `Scores`.

    Raises:
      TypeError: if the model has no weights, or `n_given` is no int.
      ValueError: if `n_given` is below 1.
      UsageError: if a text is too short or too long, or holds ids outside the vocabulary; if
        `inputs` do not go with it; or if logits are NaN.
    """
    net, weights, state = checked(model)
    n_given = check_value('score', 'n_given', n_given, Size)
    tokens, lengths = padded('text', texts)
    if lengths.min() <= n_given:
        raise UsageError(
            f'a text has {lengths.min()} tokens, of which {n_given} are given: there is nothing '
            'to score; give a longer text, or a smaller n_given'
        )
    check_ids(net, 'text', tokens)
    longest, limit = tokens.shape[1], max_len(net)
    if limit is not None and longest - 1 > limit:
        raise UsageError(
            f"a text has {longest} tokens, and the model's max_len is {limit}: score a shorter one"
        )
    room = padded_length(net, 'text', lengths - 1)
    room = room if limit is None else min(room, limit)
    at = np.arange(1, room + 1)
    scored = (at >= n_given) & (at < lengths[:, None])
    tokens = np.pad(tokens, ((0, 0), (0, room + 1 - longest)))
    source, *mask = context_of(net, inputs, len(tokens)) or (None,)
    values = tokens[:, :-1], *mask, tokens[:, 1:], scored.astype(np.float32)
    values = values if source is None else (source, *values)
    made = np.asarray(_losses(net, weights, state, tuple(map(jnp.asarray, values))))
    rows, steps = np.nonzero(scored & np.isnan(made))
    if rows.size:
        raise diverged(f'before token {steps[0] + 1} of text {rows[0]}')
    by_token = np.zeros((len(tokens), longest), np.float32)
    by_token[:, 1:] = np.where(scored, -made, 0)[:, : longest - 1]
    return Scores(by_token, by_token.sum(1))


@functools.partial(jax.jit, static_argnums=0)
def _losses(net: Layer, weights: Any, state: Any, values: Any) -> jax.Array:
    """The cross-entropy of each position, (B, L)."""
    scoring = losses.attach(net, CrossEntropyLoss(), chunk_len=_TOGETHER)
    (values, _), _ = scoring.apply(weights, state, values, mode=Mode.EVAL)
    return values
