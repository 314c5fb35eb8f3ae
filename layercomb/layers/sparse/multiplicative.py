"""Dense layers with few weights: `MultiplicativeDense`, `MultiplicativeHead`.

Shape letters: B batch, L length, D d_model, S modules, M features of a module, V vocabulary.

References:
    Jaszczur et al. 2021, Sparse is Enough in Scaling Transformers, https://arxiv.org/abs/2111.12763
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.basic.dense import contract
from layercomb.layers.basic.initializers import Initializer, Normal, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import Narrow, rows_of
from layercomb.shapes import (
    Signature,
    as_deep,
    check_float,
    check_width,
    nearest_divisor,
    nearest_multiple,
)
from layercomb.trees import Tree


class MultiplicativeDense(Layer):
    """y[s·M + m] = Σᵢ x[i] D[i, s] E[i, m] + b: a dense layer with D·(S + M) weights, not D·S·M.

    (…, D) → (…, S·M). The kernel W[i, (s, m)] = D[i, s] E[i, m] can send any input feature to any
    output, so it can represent every permutation. With M rows or more, W is computed. With fewer
    rows, as in decoding, W would cost more than the product, and x ∘ D is multiplied by E.

    Weights: ``modules`` Dᵀ (S, D), ``features`` Eᵀ (M, D), and ``bias`` (S·M,) unless `use_bias` is
    false.

    Attributes:
      n_modules: S.
      n_units: the width of the output, S·M, which S must divide; None for the input's width.
      use_bias: whether to add b.
      bias_init: of b.

    Raises:
      ValueError: if S does not divide the width, naming the nearest number that does.

    References:
      Jaszczur et al. 2021, section 3.2, https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl, shape_dtype
    >>> tl.MultiplicativeDense(4, 12).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 12), dtype=float32),)
    """

    n_modules: Size
    n_units: Size | None = None
    use_bias: bool = True
    bias_init: Initializer = zeros()

    weight_axes = {'modules': 'S:D', 'features': 'M:D', 'bias': '->F'}
    position_wise = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights as the class lists them, float32; no state.

        Args:
          signature: of x (…, D), floating.
          rng: a typed key.
          mode: not used.

        Raises:
          ValueError: if S does not divide the width of the output.
        """
        (x,) = signature
        check_float(type(self).__name__, x)
        d = x.shape[-1]
        n = self.n_units or d
        check_modules(type(self).__name__, self.n_modules, n)
        factors_key, bias_key = jax.random.split(rng)
        weights = _factors(factors_key, d, n, self.n_modules)
        return {
            **weights,
            **({'bias': self.bias_init(bias_key, (n,))} if self.use_bias else {}),
        }, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (…, S·M), in the dtype of x, from x (…, D).

        Args:
          weights: as of `init`; ``features`` may be `Narrow`.
          state: ``{}``.
          inputs: x (…, D).
          rng, mode: not used.
        """
        (x,) = inputs
        y = multiplicative_dense(x, weights['modules'], weights['features'])
        return (y + as_deep(weights['bias'], y) if self.use_bias else y,), state


class MultiplicativeHead(Layer):
    """Logits by a multiplicative layer: (…, D) → (…, vocab_size), with 1 / S of a head's weights.

    A `MultiplicativeDense` for a vocabulary of any size: a module has ⌈V / S⌉ features, and outputs
    beyond V are dropped. Decoding one position at a time is faster than with a `Dense`; predictions
    are somewhat worse.

    Weights: ``modules`` (S, D), ``features`` (⌈V / S⌉, D), and ``bias`` (V,) unless `use_bias` is
    false.

    Attributes:
      vocab_size: V.
      n_modules: S.
      use_bias: whether to add the bias.

    References:
      Jaszczur et al. 2021, section 3.3 ("sparse loss"), https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl, shape_dtype
    >>> tl.MultiplicativeHead(257, 4).output_signature(shape_dtype((2, 8)))
    (ShapeDtypeStruct(shape=(2, 257), dtype=float32),)
    """

    vocab_size: Size
    n_modules: Size = 4
    use_bias: bool = True

    weight_axes = {'modules': 'S:D', 'features': 'M:D', 'bias': '->V'}
    makes_logits = True
    position_wise = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights as the class lists them, float32; no state.

        Args:
          signature: of x (…, D), floating.
          rng: a typed key.
          mode: not used.
        """
        (x,) = signature
        check_float('MultiplicativeHead', x)
        weights = _factors(rng, x.shape[-1], self.vocab_size, self.n_modules)
        return {
            **weights,
            **({'bias': jnp.zeros(self.vocab_size, jnp.float32)} if self.use_bias else {}),
        }, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Logits (…, V), in the dtype of x, from x (…, D).

        Args:
          weights: as of `init`; ``features`` may be `Narrow`.
          state: ``{}``.
          inputs: x (…, D).
          rng, mode: not used.
        """
        (x,) = inputs
        y = multiplicative_dense(x, weights['modules'], weights['features'])
        y = y[..., : self.vocab_size]
        return (y + as_deep(weights['bias'], y) if self.use_bias else y,), state


def _factors(rng: jax.Array, d: int, n: int, n_modules: int) -> Tree:
    """Factors, each with the root of the variance that a Glorot kernel has."""
    modules, features = jax.random.split(rng)
    make = Normal((2 / (d + n)) ** 0.25)
    return {
        'modules': make(modules, (n_modules, d)),
        'features': make(features, (-(-n // n_modules), d)),
    }


def multiplicative_dense(
    x: jax.Array, modules: jax.Array, features: jax.Array | Narrow
) -> jax.Array:
    """y[s·M + m] = Σᵢ x[i] D[i, s] E[i, m], in x's dtype, summed in float32.

    Args:
      x: (…, D).
      modules: Dᵀ (S, D), a row for each module.
      features: Eᵀ (M, D), an array or `Narrow`.

    Returns:
      (…, S·M).

    Raises:
      ValueError: if the widths do not fit.
    """
    (s, d), m = modules.shape, features.shape[0]
    check_width(x, d)
    n_rows = math.prod(x.shape[:-1])
    if n_rows < m:
        y = rows_of(features).factored_product(x.reshape(n_rows, d), modules)  # (R, S, M)
        return y.reshape(*x.shape[:-1], s * m)
    if isinstance(features, Narrow):
        features = features.wide().astype(modules.dtype)
    kernel = modules[:, None] * features[None]  # (S, M, D)
    return contract('...d,nd->...n', x, kernel.reshape(s * m, d))


def check_modules(owner: str, n_modules: int, width: int) -> None:
    """Checks that the number of modules divides a width.

    Args:
      owner: the name of the layer, for the message.
      n_modules: S.
      width: of the layer's input or output.

    Raises:
      ValueError: if it does not, naming the nearest numbers that fit.
    """
    if width % n_modules:
        raise ValueError(
            f'{owner}: n_modules={n_modules} does not divide the width {width}: use '
            f'n_modules={nearest_divisor(width, n_modules)}, or a width of '
            f'{nearest_multiple(width, n_modules)}'
        )
