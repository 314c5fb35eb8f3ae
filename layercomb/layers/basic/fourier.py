"""`FourierMixing`: positions and features mixed by a Fourier transform, without weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import check_float, check_sequence
from layercomb.trees import Tree


class FourierMixing(Layer):
    """y = Re F_L F_D x: Fourier transforms over features and positions, (B, L, D) → (B, L, D).

    ::

        y[l, d] = Σ_mn x[m, n] cos(2π (l m / L + d n / D))

    It takes the place of attention, has no weights, and takes time L D log(L D). Every position
    sees every other, padding too: a batch needs sequences of one length, and there is nothing to
    decode step by step.

    Raises:
      ValueError: when applied to anything but floats (B, L, D).

    References:
      Lee-Thorp et al., FNet, 2021, https://arxiv.org/abs/2105.03824

    >>> import jax.numpy as jnp
    >>> from layercomb import tl
    >>> (y,), _ = tl.FourierMixing().apply({}, {}, (jnp.ones((1, 2, 3)),))
    >>> y.round().tolist()
    [[[6.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]
    """

    position_wise = False
    sees_padding = True
    cacheless = True
    float32 = True

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (B, L, D), in the dtype of x, computed in float32.

        Args:
          weights, state: ``{}``.
          inputs: x (B, L, D), floating.
          rng, mode: not used.
        """
        (x,) = inputs
        check_float('FourierMixing', x)
        check_sequence('FourierMixing', x)
        return (mixed(x.astype(jnp.float32)).astype(x.dtype),), state


@jax.custom_vjp
def mixed(x: jax.Array) -> jax.Array:
    """Re F_L F_D x, (B, L, D) → (B, L, D) float32. It is symmetric, so it is its own gradient."""
    return jnp.fft.fft2(x, axes=(-2, -1)).real


mixed.defvjp(lambda x: (mixed(x), None), lambda _, ct: (mixed(ct),))
