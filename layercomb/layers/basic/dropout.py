"""`Dropout`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Rate
from layercomb.layers.core.layer import POSITION_AXES, Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.devices import own_key
from layercomb.shapes import Signature
from layercomb.trees import Tree


class Dropout(Layer):
    """Zeroes entries with probability `rate` in training, and scales others by 1 / (1 − rate).

    In other modes it changes nothing. Shape and dtype stay.

    Attributes:
      rate: the probability, 0 ≤ rate < 1.
      shared_axes: axes along which entries are dropped or kept together. (1,) draws one mask for
        all positions, which is cheaper.

    Raises:
      ValueError: in training, without a key; in `init`, for a shared axis that the input
        lacks.

    References:
      Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html
    """

    rate: Rate
    shared_axes: tuple[int, ...] = ()

    float32 = True  # it keeps the dtype of a stream
    position_wise = property(lambda self: not set(POSITION_AXES) & set(self.shared_axes))
    cacheless = True
    spans_devices = True

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """No weights and no state; raises a ValueError if the input lacks one of `shared_axes`."""
        (x,) = signature
        for axis in self.shared_axes:
            if not -len(x.shape) <= axis < len(x.shape):
                raise ValueError(
                    f'Dropout: shared_axes={self.shared_axes} are axes of the input, which has '
                    f'the shape {tuple(x.shape)}'
                )
        return {}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(…) → (…); in training it draws from `rng`, else the input is returned."""
        (x,) = inputs
        if not mode.is_training or self.rate == 0:
            return (x,), state
        if rng is None:
            raise ValueError(
                f'Dropout({self.rate}) draws in training: pass rng=jax.random.key(…) to apply'
            )
        shape = list(x.shape)
        for axis in self.shared_axes:
            shape[axis] = 1
        # In float32, since what is drawn for a float64 is something else.
        key = own_key(rng, by_position=self.position_wise)
        kept = jax.random.bernoulli(key, np.float32(1 - self.rate), shape)
        return (jnp.where(kept, x / (1 - self.rate), 0),), state
