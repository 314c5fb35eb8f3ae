"""Controllers of low rank, which choose the units of a sparse feed-forward.

In training the choice is sampled. With logits c, p = softmax(c + temperature · g), where g is
Gumbel noise. With probability `hard_prob`, drawn once per call, the mask is the one-hot of the
largest p, with the gradient of p (straight-through); else it is p.

References:
    Jaszczur et al. 2021, section 3.1, https://arxiv.org/abs/2111.12763
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import layercomb_kernels
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import dense, matmul
from layercomb.layers.basic.initializers import lecun_normal
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.devices import own_key
from layercomb.layers.quantized.native import has_kernels, with_kernel
from layercomb.layers.state.decisions import decide
from layercomb.shapes import nearest_divisor, nearest_multiple
from layercomb.trees import Tree


def check_fields(layer: Any, cut: str) -> None:
    """Checks the fields that layers with a controller share.

    Args:
      layer: has d_ff, hard_prob and activation.
      cut: the name of its field that must divide d_ff.

    Raises:
      ValueError: if it does not, hard_prob is not from 0 to 1, or the activation is unknown.
    """
    owner, n = type(layer).__name__, getattr(layer, cut)
    if layer.d_ff % n:
        raise ValueError(
            f'{owner}: {cut}={n} does not divide d_ff={layer.d_ff}: use '
            f'{cut}={nearest_divisor(layer.d_ff, n)}, or d_ff={nearest_multiple(layer.d_ff, n)}'
        )
    if not 0 <= layer.hard_prob <= 1:
        raise ValueError(f'{owner}: hard_prob={layer.hard_prob} is a probability, from 0 to 1')
    elementwise(owner, layer.activation)  # a wrong name raises here


def init(keys: Any, d: int, rank: int, n: int) -> Tree:
    """The weights C₁ (D, R) and C₂ (R, n), float32, for which logits vary as much as x does.

    With logits near zero, noise would make the choice, and units would learn nothing of their own
    until the controller had grown.

    Args:
      keys: two typed keys.
      d: D, the width of the input.
      rank: R.
      n: number of choices.
    """
    make = lecun_normal()
    return {'in': {'kernel': make(keys[0], (d, rank))}, 'out': {'kernel': make(keys[1], (rank, n))}}


def logits(weights: Tree, x: jax.Array) -> jax.Array:
    """c = x C₁ C₂, in float32.

    Args:
      weights: as of `init`.
      x: (…, D).

    Returns:
      (…, n) float32.
    """
    return matmul(dense(weights['in'], x), weights['out']['kernel'])


def units(weights: Tree, x: jax.Array, block_size: int) -> jax.Array:
    """The chosen unit of each block of N.

    Args:
      weights: as of `init`.
      x: (…, D).
      block_size: N, which divides n.

    Returns:
      (…, n / N) int32, numbers from 0 to n − 1.
    """
    first, second = weights['in']['kernel'], weights['out']['kernel']
    rows = x.reshape(-1, x.shape[-1])  # (M, D)
    choose = _fast_units if has_kernels(len(rows), x, first, second) else _units
    return choose(block_size, rows, first, second).reshape(*x.shape[:-1], -1)


def _units(block_size: int, x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    c = logits({'in': {'kernel': first}, 'out': {'kernel': second}}, x)
    n_blocks = c.shape[1] // block_size
    chosen = largest(c.reshape(len(c), n_blocks, block_size))  # (M, F) → (M, F / N)
    return chosen + block_size * jnp.arange(n_blocks, dtype=chosen.dtype)[None]


def _fast_units(block_size: int, *arrays: jax.Array) -> jax.Array:
    by_kernel = functools.partial(layercomb_kernels.chosen_units, block_size=block_size)
    return with_kernel(functools.partial(_units, block_size), by_kernel)(*arrays)


def sample(
    layer: Any, c: jax.Array, rng: jax.Array | None, mode: Mode, state: Tree, name: str
) -> tuple[jax.Array, Tree]:
    """The mask in training, and the new state. The choices, (…) integers, are a decision.

    Args:
      layer: has temperature and hard_prob.
      c: (…, n) float32, logits of the choices.
      rng: a typed key.
      mode, state, name: as of `decide`.

    Returns:
      The mask (…, n) float32, and the new state.

    Raises:
      ValueError: without a key.
    """
    if rng is None:
        raise ValueError(
            f'{type(layer).__name__} draws in training: pass rng=jax.random.key(…) to apply'
        )
    noise_key, hard_key = jax.random.split(rng)
    if layer.temperature:
        c = c + layer.temperature * jax.random.gumbel(own_key(noise_key), c.shape, c.dtype)
    p = jax.nn.softmax(c)

    def choose() -> jax.Array:
        return largest(c).astype(smallest_integers(c.shape[-1]))

    choices, state = decide(mode, state, name, choose)
    through = one_hot(choices, p) + (p - jax.lax.stop_gradient(p))
    is_hard = jax.random.bernoulli(hard_key, np.float32(layer.hard_prob))
    return jnp.where(is_hard, through, p), state


def largest(c: jax.Array) -> jax.Array:
    """The first index of the largest in each block; the last index if the block has NaN.

    XLA's argmax is several times slower on a CPU than these two reductions.

    Args:
      c: (…, n) floating.

    Returns:
      (…) int32.
    """
    at = jax.lax.broadcasted_iota(jnp.int32, c.shape, c.ndim - 1)
    return jnp.where(c == c.max(-1, keepdims=True), at, c.shape[-1] - 1).min(-1)


def one_hot(choices: jax.Array, like: jax.Array) -> jax.Array:
    """1 at each choice and 0 elsewhere.

    Args:
      choices: (…) integers.
      like: (…, n), whose shape and dtype the result has.
    """
    at = jax.lax.broadcasted_iota(choices.dtype, like.shape, like.ndim - 1)
    return (choices[..., None] == at).astype(like.dtype)


def smallest_integers(n: int) -> Any:
    """The smallest of uint8, uint16 and int32 that numbers n choices."""
    kinds = (jnp.uint8, jnp.uint16)
    return next((t for t in kinds if n - 1 <= jnp.iinfo(t).max), jnp.int32)
