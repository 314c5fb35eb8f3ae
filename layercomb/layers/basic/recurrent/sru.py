"""The simple recurrent unit: gates depend on the input alone, and the recurrence is linear."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.basic.activations import activation
from layercomb.layers.basic.dense import dense
from layercomb.layers.basic.initializers import Initializer, glorot_uniform
from layercomb.layers.basic.recurrent.memory import continued
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import Past
from layercomb.layers.decoding.seek import held
from layercomb.layers.state.segments import beginnings
from layercomb.shapes import Signature, check_float, check_sequence, shape_dtype
from layercomb.trees import Tree


class SRU(Layer):
    """A simple recurrent unit: (B, L, D) → (B, L, n_units), causal.

    z, f, r = x W_z + b_z, σ(x W_f + b_f), σ(x W_r + b_r)
    c[t] = f[t] c[t−1] + (1 − f[t]) z[t], from c[−1] = 0
    y = r g(c) + (1 − r) x, with x W_x + b_x in place of this x if n_units is not D.

    All positions are multiplied by the weights at once. Only elementwise work goes position by
    position, in float32.

    Weights: ``kernel`` (D, 3·n_units) = [W_z | W_f | W_r], or (D, 4·n_units) = [… | W_x] if n_units
    is not D; ``bias`` (3·n_units,) or (4·n_units,), in the same order.

    In ``PREDICT`` the state keeps c of every position, because rows can be moved back to an earlier
    one: prompts of several lengths are read padded at the end. That takes 4·n_units·(L + 1) bytes a
    row, as much as attention's keys of this width. The work of a step does not grow with L. In
    packed rows c is forgotten where a document begins.

    Attributes:
      n_units: the width of the output; None keeps the input's.
      activation: the name of g, 'tanh' as in the paper; None is the identity.
      forget_bias: the initial b_f. A unit then remembers about 1 + e^forget_bias positions, 8 by
        default. The other biases start at 0, so y is half memory and half input.
      kernel_init: of each of the three or four parts of the kernel.

    References:
      Lei et al. 2017, https://arxiv.org/abs/1709.02755 (the first version's equations)

    >>> from layercomb import shape_dtype
    >>> SRU(3).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 3), dtype=float32),)
    """

    n_units: Size | None = None
    activation: str | None = 'tanh'
    forget_bias: float = 2.0
    kernel_init: Initializer = glorot_uniform()

    weight_axes = {'kernel': 'D->F', 'bias': '->F'}
    position_wise = False
    sees_segments = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation is not None:
            activation(self.activation)  # raises if there is none of this name

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """Weights, float32; in ``PREDICT`` a state of c at every position, else none.

        Args:
          signature: of the input, (B, L, D) floating-point; in ``PREDICT``, L is the
            longest sequence.
          rng: a typed key.
          mode: see `Mode`.

        Raises:
          TypeError: for integers.
          ValueError: for another rank.
        """
        (x,) = signature
        check_float('SRU', x)
        check_sequence('SRU', x)
        batch, length, d = x.shape
        n = self.n_units or d
        keys = jax.random.split(rng, 3 if n == d else 4)
        # Each part by itself, or its variance would be that of a layer several times as wide.
        kernel = jnp.concatenate([self.kernel_init(key, (d, n)) for key in keys], -1)
        bias = jnp.zeros(kernel.shape[1], jnp.float32).at[n : 2 * n].set(self.forget_bias)
        weights = {'kernel': kernel, 'bias': bias}
        if mode is not Mode.PREDICT:
            return weights, {}
        return weights, Past.empty(shape_dtype((batch, length, n)), 1)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """(B, L, D) → (B, L, n_units); in ``PREDICT`` the L inputs are the next positions."""
        (x,) = inputs
        check_sequence('SRU', x)
        parts = len(weights['bias']) // (self.n_units or x.shape[-1])
        projected = dense(weights, x).astype(jnp.float32)  # (B, L, parts·n_units)
        z, f, r, *highway = jnp.split(projected, parts, -1)
        f, r = jax.nn.sigmoid(f), jax.nn.sigmoid(r)
        u = (1 - f) * z
        begins = beginnings(state)
        if begins is not None:
            f = jnp.where(begins.T[..., None], 0.0, f)
        if mode is Mode.PREDICT:
            kept = held(state, Past)
            c, state = continued(lambda start: linear_recurrence(f, u, start), kept, x.shape[1])
        else:
            c = linear_recurrence(f, u, jnp.zeros_like(u[:, 0]))
        if self.activation is not None:
            (c,), _ = activation(self.activation).apply({}, {}, (c,))
        around = highway[0] if highway else x.astype(jnp.float32)
        return ((r * c + (1 - r) * around).astype(x.dtype),), state


def linear_recurrence(a: jax.Array, u: jax.Array, start: jax.Array) -> jax.Array:
    """c[t] = a[t] c[t−1] + u[t] along axis 1.

    It goes position by position, because memory traffic is the limit, and an associative scan reads
    the arrays log L times. On a CPU the layer's forward pass and gradient at (4, 8192, 256) take
    1.2 s, a fifth of it here; with an associative scan they take 1.6 s.

    Args:
      a: (B, L, n).
      u: (B, L, n).
      start: (B, n), c[−1].

    Returns:
      c, (B, L, n).
    """

    def step(c: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        c = now[0] * c + now[1]
        return c, c

    by_time = jnp.swapaxes(a, 0, 1), jnp.swapaxes(u, 0, 1)  # (L, B, n)
    return jnp.swapaxes(jax.lax.scan(step, start, by_time)[1], 0, 1)  # (B, L, n)
