"""`SparseFF`: a feed-forward whose work per position does not grow with its number of weights.

Shape letters: D d_model, F d_ff, N block, R rank.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import Annotated

import jax

from layercomb.checks import Bound, Size
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import contract, dense
from layercomb.layers.basic.initializers import Initializer, glorot_uniform, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import Narrow, rows_of
from layercomb.layers.quantized.rows import IN_BOUNDS
from layercomb.layers.sparse import controllers
from layercomb.shapes import Signature, as_deep, check_float
from layercomb.trees import Tree


class SparseFF(Layer):
    """A feed-forward that uses one unit of each block of N, chosen by a controller.

    y = (f(x W₁ᵀ + b₁) ∘ m) W₂ + b₂, (…, D) → (…, D). The mask m of the d_ff units, in blocks of N,
    is made from c = x C₁ C₂:

    * ``EVAL``, ``PREDICT``: m is 1 at the largest c of each block, and 0 elsewhere;
    * training: p = softmax(c + temperature · g) over each block, where g is Gumbel noise. With
      probability `hard_prob`, drawn once per call, m is the one-hot of the largest p, with the
      gradient of p (straight-through); else m = p.

    In ``PREDICT`` a position reads d_ff / N rows of W₁ and of W₂; a unit's row is contiguous in
    both. N or more positions in one call are multiplied by whole matrices. The chosen units are
    decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``in`` (kernel_transposed (d_ff, D), bias (d_ff,)), ``out`` (kernel (d_ff, D), bias
    (D,)), ``controller`` (``in`` kernel (D, R), ``out`` kernel (R, d_ff)).

    Attributes:
      d_ff: the number of units; `block_size` must divide it.
      block_size: N.
      d_lowrank: R, the rank of the controller; None takes D / N, but at least 16.
      temperature: factor of the noise in training, at least 0.
      hard_prob: probability of the hard choice in training, from 0 to 1.
      activation: f, by its name.
      use_bias: whether to add b₁ and b₂.
      kernel_init: of W₁ and W₂, both (d_ff, D).
      bias_init: of b₁ and b₂.

    Raises:
      ValueError: if N does not divide d_ff, naming the nearest sizes that fit; in training, without
        a key.

    References:
      Jaszczur et al. 2021, section 3.1, https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl, shape_dtype
    >>> tl.SparseFF(64, 16).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 8), dtype=float32),)
    """

    d_ff: Size
    block_size: Size = 64
    _: KW_ONLY
    d_lowrank: Size | None = None
    temperature: Annotated[float, Bound(0)] = 0.1
    hard_prob: float = 0.3
    activation: str = 'relu'
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    weight_axes = {
        'in/kernel_transposed': 'F*<-D',
        'in/bias': '->F',
        'out/kernel': 'F*->D',
        'out/bias': '->D',
        'controller/in/kernel': 'D->R',
        'controller/out/kernel': 'R->F',
    }
    position_wise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        controllers.check_fields(self, 'block_size')

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
        check_float('SparseFF', x)
        d, f, make = x.shape[-1], self.d_ff, self.kernel_init
        rank = self.d_lowrank or max(16, d // self.block_size)
        keys = jax.random.split(rng, 6)
        weights: Tree = {
            'in': {'kernel_transposed': make(keys[0], (f, d))},
            'out': {'kernel': make(keys[1], (f, d))},
            'controller': controllers.init(keys[2:4], d, rank, f),
        }
        if self.use_bias:
            weights['in']['bias'] = self.bias_init(keys[4], (f,))
            weights['out']['bias'] = self.bias_init(keys[5], (d,))
        return weights, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (…, D), in the dtype of x, and the new state.

        Args:
          weights: as of `init`; kernels may be `Narrow`.
          state: ``{}``; in ``REPLAY`` the recorded units.
          inputs: x (…, D).
          rng: a typed key, needed in training.
          mode: see `Mode`.

        Raises:
          ValueError: in training, without a key.
        """
        (x,) = inputs
        if mode is Mode.PREDICT and math.prod(x.shape[:-1]) < self.block_size:
            return (self._few(weights, x),), state
        c = controllers.logits(weights['controller'], x)
        c = c.reshape(*c.shape[:-1], -1, self.block_size)  # (…, F / N, N)
        if mode.is_training:
            mask, state = controllers.sample(self, c, rng, mode, state, 'units')
            return (self._whole(weights, x, mask),), state
        return (self._whole(weights, x, controllers.one_hot(controllers.largest(c), c)),), state

    def _whole(self, weights: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The output of all units times the mask."""
        h = contract('...d,fd->...f', x, weights['in']['kernel_transposed'])
        h = self._activated(h, weights['in'].get('bias'))
        mask = mask.reshape(h.shape).astype(h.dtype)  # (…, F)
        out = weights['out']
        if isinstance(out['kernel'], Narrow):
            out = {**out, 'kernel': out['kernel'].wide().astype(x.dtype)}
        return dense(out, h * mask)

    def _few(self, weights: Tree, x: jax.Array) -> jax.Array:
        """The output of the chosen units only, whose rows are gathered."""
        at = controllers.units(weights['controller'], x, self.block_size)  # (…, F / N)
        bias = weights['in'].get('bias')
        bias = None if bias is None else bias.at[at].get(**IN_BOUNDS)  # (d_ff,) → (…, F / N)
        h = rows_of(weights['in']['kernel_transposed']).gathered_product(x, at)
        y = rows_of(weights['out']['kernel']).gathered_sum(self._activated(h, bias), at)
        return y + as_deep(weights['out']['bias'], y) if self.use_bias else y

    def _activated(self, h: jax.Array, bias: jax.Array | None) -> jax.Array:
        f = elementwise('SparseFF', self.activation)
        return f(h if bias is None else h + as_deep(bias, h))
