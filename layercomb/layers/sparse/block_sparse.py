"""`BlockSparseFF`: a feed-forward of which one block of units is computed per position."""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY
from typing import Annotated

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Size
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import contract
from layercomb.layers.basic.initializers import Initializer, glorot_uniform, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.sparse import controllers
from layercomb.layers.sparse.by_expert import by_expert
from layercomb.layers.sparse.switch import feed_forward
from layercomb.shapes import Signature, as_deep, check_float
from layercomb.trees import Tree


class BlockSparseFF(Layer):
    """A feed-forward in blocks of units: a controller picks one block for each position.

    y = (f(x W₁ + b₁) ∘ m) W₂ + b₂, (…, D) → (…, D). The mask m is equal for all units of a block.
    It is made from c = x C₁ C₂, one number per block:

    * ``EVAL``, ``PREDICT``: m is 1 at the block of the largest c, and 0 elsewhere; the other blocks
      are not computed;
    * training: p = softmax(c + temperature · g), where g is Gumbel noise. With probability
      `hard_prob`, drawn once per call, m is the one-hot of the largest p, with the gradient of p
      (straight-through); else m = p. All blocks are computed.

    The chosen blocks are decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``in`` (kernel (E, D, M), bias (E, M)), ``out`` (kernel (E, M, D), bias (D,)),
    ``controller`` (``in`` kernel (D, R), ``out`` kernel (R, E)), for E = n_blocks of M = d_ff / E
    units. Each block is contiguous in memory.

    Attributes:
      d_ff: the number of units.
      n_blocks: E, which must divide d_ff.
      d_lowrank: R, the rank of the controller; None takes D / E, but at least 16.
      temperature: factor of the noise in training, at least 0.
      hard_prob: probability of the hard choice in training, from 0 to 1.
      activation: f, by its name.
      use_bias: whether to add b₁ and b₂.
      kernel_init: of W₁ (D, d_ff) and W₂ (d_ff, D), each as one matrix.
      bias_init: of b₁ and b₂.

    Raises:
      ValueError: if n_blocks does not divide d_ff, naming the nearest sizes that fit; in training,
        without a key.

    References:
      Compared with SparseFF in Jaszczur et al. 2021, https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl, shape_dtype
    >>> tl.BlockSparseFF(64, 4).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 8), dtype=float32),)
    """

    d_ff: Size
    n_blocks: Size
    _: KW_ONLY
    d_lowrank: Size | None = None
    temperature: Annotated[float, Bound(0)] = 0.1
    hard_prob: float = 0.3
    activation: str = 'relu'
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    weight_axes = {
        'in/kernel': 'E|D->M',
        'in/bias': 'E|->M',
        'out/kernel': 'E|M->D',
        'out/bias': '->D',
        'controller/in/kernel': 'D->R',
        'controller/out/kernel': 'R->E',
    }
    position_wise = True

    def __post_init__(self) -> None:
        super().__post_init__()
        controllers.check_fields(self, 'n_blocks')

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
        check_float('BlockSparseFF', x)
        d, e, m, make = x.shape[-1], self.n_blocks, self.d_ff // self.n_blocks, self.kernel_init
        rank = self.d_lowrank or max(16, d // e)
        keys = jax.random.split(rng, 6)
        first = make(keys[0], (d, self.d_ff)).reshape(d, e, m)
        weights: Tree = {
            'in': {'kernel': jnp.moveaxis(first, 1, 0)},  # (E, D, M)
            'out': {'kernel': make(keys[1], (self.d_ff, d)).reshape(e, m, d)},
            'controller': controllers.init(keys[2:4], d, rank, e),
        }
        if self.use_bias:
            weights['in']['bias'] = self.bias_init(keys[4], (e, m))
            weights['out']['bias'] = self.bias_init(keys[5], (d,))
        return weights, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (…, D), in the dtype of x, and the new state.

        Args:
          weights: as of `init`.
          state: ``{}``; in ``REPLAY`` the recorded blocks.
          inputs: x (…, D).
          rng: a typed key, needed in training.
          mode: see `Mode`.

        Raises:
          ValueError: in training, without a key.
        """
        (x,) = inputs
        out = weights['out']
        c = controllers.logits(weights['controller'], x)  # (…, E)
        if mode.is_training:
            mask, state = controllers.sample(self, c, rng, mode, state, 'blocks')
            y = self._whole(weights, x, mask)
        else:
            flat, blocks = x.reshape(-1, x.shape[-1]), controllers.largest(c).reshape(-1, 1)
            parts = {'in': weights['in'], 'out': {'kernel': out['kernel']}}  # b₂ is of no block
            block = functools.partial(
                feed_forward, elementwise(type(self).__name__, self.activation)
            )
            ones = jnp.ones(blocks.shape, jnp.float32)
            y = by_expert(block, parts, flat, blocks, ones).reshape(x.shape)
        return (y + as_deep(out['bias'], y) if self.use_bias else y,), state

    def _whole(self, weights: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
        """The output of all blocks times the mask, without b₂."""
        h = contract('...d,edm->...em', x, weights['in']['kernel'])
        h = elementwise(type(self).__name__, self.activation)(
            h + as_deep(weights['in']['bias'], h) if self.use_bias else h
        )
        h = h * mask[..., None].astype(h.dtype)
        return contract('...em,emd->...d', h, weights['out']['kernel'])
