"""`RelativeBias`: the learned biases of relative positions that the blocks of T5 share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Size
from layercomb.layers.basic.initializers import Initializer, Normal
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.shapes import Signature
from layercomb.trees import Tree


def relative_buckets(
    distance: np.ndarray, n_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
    """The bucket of each distance, as T5 numbers them.

    With n buckets, n = n_buckets, or n_buckets / 2 for each direction: a distance d < n/2 back has
    bucket d; farther ones share buckets of logarithmic width up to `max_distance`, and all from
    there on the last::

        n/2 + ⌊ln(d / (n/2)) / ln(max_distance / (n/2)) · (n − n/2)⌋

    Keys after the query have the other half of the buckets, or bucket 0 if not bidirectional.

    Args:
      distance: position of the key minus that of the query, integers.
      n_buckets, max_distance, bidirectional: as of `RelativeBias`.

    Returns:
      int32, of the same shape.

    >>> relative_buckets(np.array([-200, -16, -3, 0, 3, 16]), 32, 128, True).tolist()
    [15, 10, 3, 0, 19, 26]
    """
    n = n_buckets // 2 if bidirectional else n_buckets
    far = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    exact = n // 2
    turns = np.log(np.maximum(far, 1) / exact) / math.log(max_distance / exact)
    share = turns * (n - exact) + 1e-6  # or rounding would decide where it is an integer
    large = np.minimum(exact + share.astype(np.int32), n - 1)
    after = n * (distance > 0) if bidirectional else 0
    made: np.ndarray = (after + np.where(far < exact, far, large)).astype(np.int32)
    return made


class RelativeBias(Layer):
    """Puts a bias for each distance on the stack: x → x, (2R + 1, H), R = max_distance.

    bias[s − t + R, h] = table[bucket(s − t), h] is added to the score of a query at position t and
    a key at s in head h, by layers with ``relative=True``, whose input after x it is. From distance
    R on the bias is that of R. `relative_buckets` says which distances share a bucket.

    All blocks of a T5 stack share one table. It stands before them, and each block hands the bias
    on. T5 does not scale scores, and has no biases in projections:

    >>> from layercomb import tl
    >>> attention = tl.SelfAttention(
    ...     4, relative=True, causal=False, scale=1.0, qkv_bias=False, out_bias=False
    ... )
    >>> block = tl.Serial(
    ...     tl.Select((0, 1, 1)),  # x, bias → x, bias, bias
    ...     tl.Residual(tl.RMSNorm(), attention),  # x, bias → x
    ...     tl.Residual(tl.RMSNorm(), tl.Dense(64, use_bias=False), tl.Relu(), tl.Dense(16)),
    ... )
    >>> encoder = tl.Serial(
    ...     tl.Embedding(100, 16),
    ...     tl.RelativeBias(4),
    ...     tl.Repeat(block, 6),
    ...     tl.Select((0,), n_in=2),  # without the bias
    ...     tl.RMSNorm(),
    ... )
    >>> encoder.n_in, encoder.n_out
    (1, 1)

    With a mask the stack is x, bias, mask, and attention ``masked=True``. A decoder has a
    ``RelativeBias(4, bidirectional=False)`` of its own, causal attention, and `CrossAttention`
    without bias. In ``PREDICT`` the bias is made at each step and positions come from the caches.

    Weights: ``table`` (n_buckets, H).

    Attributes:
      n_heads: H.
      n_buckets: rows of the table; an even number at least 4 if bidirectional, else at least 2.
      max_distance: R, the distance from which all share the last bucket; more than the number of
        distances that have a bucket alone, n_buckets / 4 if bidirectional, else n_buckets / 2.
      bidirectional: whether keys after the query have buckets of their own; else they have that of
        distance 0, and attention should be causal.
      table_init: of the table.

    Raises:
      ValueError: if n_buckets or max_distance are too small, or n_buckets is odd.

    References:
      Raffel et al. 2019, https://arxiv.org/abs/1910.10683
    """

    n_heads: Size
    n_buckets: Size = 32
    max_distance: Size = 128
    bidirectional: bool = True
    table_init: Initializer = Normal(0.02)

    n_out = 2
    float32 = True
    position_wise = False
    cacheless = True  # the bias is the same at every step
    sees_segments = True  # distances in a document are those in its row
    spans_devices = True
    weight_axes = {'table': 'V:H'}

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = 1 + self.bidirectional
        if self.n_buckets % ways or self.n_buckets < 2 * ways:
            words = 'even, and 4 at least' if self.bidirectional else '2 at least'
            raise ValueError(f'RelativeBias: n_buckets must be {words}, got {self.n_buckets}')
        alone = self.n_buckets // ways // 2
        if self.max_distance <= alone:
            raise ValueError(
                f'RelativeBias: max_distance={self.max_distance} must be more than {alone}, the '
                f'distances that have one of {self.n_buckets} buckets alone'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The ``table``, float32 (n_buckets, H); no state.

        Args:
          signature: of any value.
          rng: a typed key.
          mode: not used.
        """
        return {'table': self.table_init(rng, (self.n_buckets, self.n_heads))}, {}

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """x unchanged, and the bias (2·max_distance + 1, H) float32.

        Args:
          weights: as of `init`.
          state: ``{}``.
          inputs: x, any value.
          rng, mode: not used.
        """
        (x,) = inputs
        distance = np.arange(-self.max_distance, self.max_distance + 1)
        rows = relative_buckets(distance, self.n_buckets, self.max_distance, self.bidirectional)
        return (x, jnp.take(weights['table'], rows, axis=0).astype(jnp.float32)), state
