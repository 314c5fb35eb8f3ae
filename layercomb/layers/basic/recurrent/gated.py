"""`LSTM` and `GRU`: gates decide what a memory takes, keeps and shows.

Shape letters: B batch, L length, D width of the input, n units.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.basic.dense import dense
from layercomb.layers.basic.initializers import Initializer, Orthogonal, glorot_uniform
from layercomb.layers.basic.recurrent.memory import continued
from layercomb.layers.basic.recurrent.recurrence import Memory, recurrence
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.decoding.caches import Past
from layercomb.layers.decoding.seek import held
from layercomb.layers.state.segments import beginnings
from layercomb.shapes import Signature, check_float, check_sequence, shape_dtype
from layercomb.trees import Tree


class GatedRecurrent(Layer):
    """What `LSTM` and `GRU` have in common; a subclass says its step.

    Attributes:
      n_units: the width of the output; None keeps the input's.
      forget_bias: the initial bias of the gate that keeps the memory, the second of all.
      kernel_init: of each of the `n_gates` parts of the kernel.
      recurrent_init: of each of the `n_gates` parts of the recurrent kernel.
      n_gates: how many there are, what they gate included.
      n_kept: how many vectors of n units are carried along, the output first.
      product_biased: whether the last gate's part of the hidden product has a bias of its own.
    """

    n_units: Size | None = None
    forget_bias: float = 1.0
    kernel_init: Initializer = glorot_uniform()
    recurrent_init: Initializer = Orthogonal()

    n_gates: ClassVar[int]
    n_kept: ClassVar[int]
    product_biased: ClassVar[bool] = False

    weight_axes = {
        'kernel': 'D->F',
        'recurrent_kernel': 'U->F',
        'bias': '->F',
        'recurrent_bias': '->U',
    }
    position_wise = False
    sees_segments = True

    @staticmethod
    def step(memory: Memory, projected: jax.Array, product: jax.Array) -> Memory:
        """The memory after a position, as `recurrence` takes it.

        Args:
          memory: before the position, `n_kept` arrays (B, n).
          projected: x W + b, (B, n_gates·n).
          product: the hidden product, (B, n_gates·n).
        """
        raise NotImplementedError

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Any]:
        """Weights, float32; in ``PREDICT`` a state of the memory at every position, else none.

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
        check_float(type(self).__name__, x)
        check_sequence(type(self).__name__, x)
        batch, length, d = x.shape
        n = self.n_units or d
        # Each gate by itself, or its variance would be that of a layer several times as wide.
        keys = jax.random.split(rng, (2, self.n_gates))
        weights = {
            'kernel': jnp.concatenate([self.kernel_init(key, (d, n)) for key in keys[0]], -1),
            'recurrent_kernel': jnp.concatenate(
                [self.recurrent_init(key, (n, n)) for key in keys[1]], -1
            ),
            'bias': jnp.zeros(self.n_gates * n, jnp.float32).at[n : 2 * n].set(self.forget_bias),
        }
        if self.product_biased:
            weights['recurrent_bias'] = jnp.zeros(n, jnp.float32)
        if mode is not Mode.PREDICT:
            return weights, {}
        return weights, Past.empty(shape_dtype((batch, length, self.n_kept * n)), 1)

    def apply(
        self, weights: Tree, state: Any, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Any]:
        """(B, L, D) → (B, L, n_units); in ``PREDICT`` the L inputs are the next positions."""
        (x,) = inputs
        check_sequence(type(self).__name__, x)
        kernel = weights['recurrent_kernel']
        n, n_kept = kernel.shape[0], self.n_kept
        projected = jnp.swapaxes(dense(weights, x), 0, 1).astype(jnp.float32)  # (L, B, n_gates·n)
        bias = weights.get('recurrent_bias')
        if bias is not None:
            bias = jnp.pad(bias, (kernel.shape[1] - n, 0))
        begins = beginnings(state)

        def run(start: Memory) -> Memory:
            return recurrence(self.step, projected, kernel, bias, start, begins)

        def run_joined(start: jax.Array) -> jax.Array:
            memories = run(tuple(jnp.split(start, n_kept, -1)))
            return jnp.swapaxes(jnp.concatenate(memories, -1), 0, 1)  # (B, L, n_kept·n)

        if mode is Mode.PREDICT:
            memories, state = continued(run_joined, held(state, Past), x.shape[1])
            y = memories[..., :n]
        else:
            y = jnp.swapaxes(run((jnp.zeros((len(x), n), jnp.float32),) * n_kept)[0], 0, 1)
        return (y.astype(x.dtype),), state


class LSTM(GatedRecurrent):
    """A long short-term memory: (B, L, D) → (B, L, n_units), causal.

    i, f, g, o = σ, σ, tanh, σ of the four parts of x[t] W + b + h[t−1] U
    c[t] = f c[t−1] + i g, from c[−1] = 0
    h[t] = o tanh(c[t]), from h[−1] = 0; the output is h.

    All positions are multiplied by W at once, and one after the other by U. Gates and memory are
    float32, products are of x's dtype. Equations, and the order of the gates, are those of
    PyTorch, whose two biases are summed here.

    Weights: ``kernel`` W (D, 4·n_units) = [W_i | W_f | W_g | W_o], ``recurrent_kernel`` U
    (n_units, 4·n_units) and ``bias`` (4·n_units,), in the same order.

    In ``PREDICT`` the state keeps h and c of every position, because rows can be moved back to an
    earlier one: prompts of several lengths are read padded at the end. That takes
    8·n_units·(L + 1) bytes a row. The work of a step does not grow with L. In packed rows the
    memory is forgotten where a document begins.

    Attributes:
      n_units: the width of the output; None keeps the input's.
      forget_bias: the initial b_f. A unit then remembers about 1 + e^forget_bias positions. The
        other biases start at 0.
      kernel_init: of each of the four parts of W.
      recurrent_init: of each of the four parts of U.

    Raises:
      TypeError: for integers.
      ValueError: for another rank; when applied to an input of another width than D.

    References:
      Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735; the gate that
      forgets: Gers et al. 2000, https://doi.org/10.1162/089976600300015015

    >>> from layercomb import tl, shape_dtype
    >>> tl.LSTM(3).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 3), dtype=float32),)
    """

    n_gates = 4
    n_kept = 2

    @staticmethod
    def step(memory: Memory, projected: jax.Array, product: jax.Array) -> Memory:
        """(h, c) of one position."""
        i, f, g, o = jnp.split(projected + product, 4, -1)
        c = jax.nn.sigmoid(f) * memory[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


class GRU(GatedRecurrent):
    """A gated recurrent unit: (B, L, D) → (B, L, n_units), causal.

    r, z = σ of the first two parts of x[t] W + b + h[t−1] U
    n = tanh(x[t] W_n + b_n + r (h[t−1] U_n + b_hn))
    h[t] = (1 − z) n + z h[t−1], from h[−1] = 0; the output is h.

    The gate r is applied after the hidden product, as by PyTorch, so that there is one product a
    position; in the paper it comes before. Of PyTorch's two biases of r and z, b is the sum.
    All positions are multiplied by W at once. Gates and memory are float32, products are of x's
    dtype.

    Weights: ``kernel`` W (D, 3·n_units) = [W_r | W_z | W_n], ``recurrent_kernel`` U
    (n_units, 3·n_units) and ``bias`` (3·n_units,), in the same order; ``recurrent_bias`` b_hn
    (n_units,).

    In ``PREDICT`` the state keeps h of every position, because rows can be moved back to an earlier
    one: prompts of several lengths are read padded at the end. That takes 4·n_units·(L + 1) bytes a
    row. The work of a step does not grow with L. In packed rows the memory is forgotten where a
    document begins.

    Attributes:
      n_units: the width of the output; None keeps the input's.
      forget_bias: the initial b_z. A unit then remembers about 1 + e^forget_bias positions. The
        other biases start at 0.
      kernel_init: of each of the three parts of W.
      recurrent_init: of each of the three parts of U.

    Raises:
      TypeError: for integers.
      ValueError: for another rank; when applied to an input of another width than D.

    References:
      Cho et al. 2014, https://arxiv.org/abs/1406.1078

    >>> from layercomb import tl, shape_dtype
    >>> tl.GRU(3).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 3), dtype=float32),)
    """

    n_gates = 3
    n_kept = 1
    product_biased = True

    @staticmethod
    def step(memory: Memory, projected: jax.Array, product: jax.Array) -> Memory:
        """(h,) of one position."""
        (h,) = memory
        (r, z, n), (by_r, by_z, by_n) = (jnp.split(each, 3, -1) for each in (projected, product))
        r, z = jax.nn.sigmoid(r + by_r), jax.nn.sigmoid(z + by_z)
        n = jnp.tanh(n + r * by_n)
        return ((1 - z) * n + z * h,)
