"""Sparse layers: weights that grow while the work for one position does not.

Shape letters: B batch, L length, D d_model, F d_ff, N block, R rank, S modules, M features of a
module, T positions given at once.

References:
    Jaszczur et al. 2021, Sparse is Enough in Scaling Transformers, https://arxiv.org/abs/2111.12763
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.activations import elementwise
from layercomb.layers.base import DECISIONS, Layer, Mode, Tree
from layercomb.layers.bucketwise import IN_BOUNDS
from layercomb.layers.caches import init_past, with_past
from layercomb.layers.combinators import Serial
from layercomb.layers.convolution import check_rank, convolve
from layercomb.layers.core import Dense, dense
from layercomb.layers.fields import Size
from layercomb.layers.initializers import Initializer, Normal, glorot_uniform, lecun_normal, zeros
from layercomb.shapes import check_float


class SparseFF(Layer):
    """A feed-forward in which one unit of each block of N works, chosen by a controller.

    y = (f(x W₁ᵀ + b₁) ∘ m) W₂ + b₂, where the mask m of the d_ff units, cut into blocks of N, is
    made from c = x C₁ C₂:

    * ``EVAL``, ``PREDICT``: m is 1 at the largest c of each block, and 0 elsewhere;
    * training: p = softmax(c + temperature · g) over each block, g being Gumbel noise. With
      probability `hard_prob`, one draw for all that is given at once, m is the one-hot of the
      largest p, and its gradient that of p (straight-through); else m = p.

    In ``PREDICT`` a position reads d_ff / N rows of W₁ and of W₂, which are stored so that a unit's
    row is contiguous in both; N or more positions at once would read them all, and multiply whole
    matrices. The chosen units are decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``in`` (kernel_transposed (d_ff, D), bias (d_ff,)), ``out`` (kernel (d_ff, D), bias
    (D,)), ``controller`` (``in`` kernel (D, R), ``out`` kernel (R, d_ff)).

    Attributes:
      d_ff: the number of units; `block_size` must divide it.
      block_size: N.
      d_lowrank: R, the rank of the controller; None takes D / N, but at least 16.
      temperature: how much noise training adds.
      hard_prob: how often training takes the hard choice.
      activation: f, by its name.
      use_bias: whether b₁ and b₂ are there.

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
    temperature: float = 0.1
    hard_prob: float = 0.3
    activation: str = 'relu'
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_ff % self.block_size:
            raise ValueError(
                f'SparseFF: block_size={self.block_size} does not divide d_ff={self.d_ff}: use '
                f'block_size={nearest_divisor(self.d_ff, self.block_size)}, or '
                f'd_ff={nearest_multiple(self.d_ff, self.block_size)}'
            )
        if not self.temperature >= 0 or not 0 <= self.hard_prob <= 1:  # NaN is neither
            raise ValueError(
                f'SparseFF: temperature={self.temperature} must not be negative, and '
                f'hard_prob={self.hard_prob} is a probability, from 0 to 1'
            )
        elementwise('SparseFF', self.activation)  # a wrong name is an error now

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('SparseFF', x)
        d, f, make = x.shape[-1], self.d_ff, self.kernel_init
        rank = self.d_lowrank or max(16, d // self.block_size)
        keys = jax.random.split(rng, 6)
        weights: Tree = {
            'in': {'kernel_transposed': make(keys[0], (f, d))},
            'out': {'kernel': make(keys[1], (f, d))},
            'controller': {
                'in': {'kernel': make(keys[2], (d, rank))},
                'out': {'kernel': make(keys[3], (rank, f))},
            },
        }
        if self.use_bias:
            weights['in']['bias'] = self.bias_init(keys[4], (f,))
            weights['out']['bias'] = self.bias_init(keys[5], (d,))
        return weights, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        chosen = self._controller(weights['controller'], x)  # (…, F / N, N) float32
        if mode is Mode.PREDICT and math.prod(x.shape[:-1]) < self.block_size:
            return (self._few(weights, x, _largest(chosen)),), state
        if not mode.is_training:
            return (self._whole(weights, x, _one_hot(_largest(chosen), chosen)),), state
        mask, units = self._sampled(chosen, state, rng, mode)
        if mode is Mode.RECORD:
            state = {**state, DECISIONS: {'units': units}}
        return (self._whole(weights, x, mask),), state

    def _controller(self, weights: Tree, x: jax.Array) -> jax.Array:
        """c in float32, by blocks."""
        c = jnp.dot(
            dense(weights['in'], x), weights['out']['kernel'], preferred_element_type=jnp.float32
        )
        return c.reshape(*c.shape[:-1], -1, self.block_size)  # (…, F / N, N)

    def _sampled(
        self, c: jax.Array, state: Tree, rng: jax.Array | None, mode: Mode
    ) -> tuple[jax.Array, jax.Array]:
        """The mask of training (…, F / N, N), and the units that are largest in it (…, F / N)."""
        if rng is None:
            raise ValueError('SparseFF draws in training: pass rng=jax.random.key(…) to apply')
        noise_key, hard_key = jax.random.split(rng)
        if self.temperature:
            c = c + self.temperature * jax.random.gumbel(noise_key, c.shape, c.dtype)
        p = jax.nn.softmax(c)
        if mode is Mode.REPLAY:
            units = state[DECISIONS]['units']
        else:
            units = _largest(c).astype(self._dtype)
        through = _one_hot(units, p) + (p - jax.lax.stop_gradient(p))
        is_hard = jax.random.bernoulli(hard_key, float(self.hard_prob))
        return jnp.where(is_hard, through, p), units

    def _whole(self, weights: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
        """All units, times the mask."""
        h = _dot('...d,fd->...f', x, weights['in']['kernel_transposed'])
        h = self._activated(h, weights['in'].get('bias'))
        mask = mask.reshape(h.shape).astype(h.dtype)  # (…, F)
        return dense(weights['out'], h * mask)

    def _few(self, weights: Tree, x: jax.Array, units: jax.Array) -> jax.Array:
        """The chosen units alone; their rows are gathered."""
        first = jnp.arange(0, self.d_ff, self.block_size, dtype=units.dtype)
        at = first + units  # (…, F / N)

        def rows(kernel: jax.Array) -> jax.Array:
            return kernel.at[at].get(**IN_BOUNDS)  # (…, F / N, …)

        bias = weights['in'].get('bias')
        h = _dot('...d,...fd->...f', x, rows(weights['in']['kernel_transposed']))
        h = self._activated(h, None if bias is None else rows(bias))
        y = _dot('...f,...fd->...d', h, rows(weights['out']['kernel']))
        return y + weights['out']['bias'] if self.use_bias else y

    def _activated(self, h: jax.Array, bias: jax.Array | None) -> jax.Array:
        f = elementwise('SparseFF', self.activation)
        return f(h if bias is None else h + bias)

    @property
    def _dtype(self) -> Any:
        """The smallest integers that number the units of a block."""
        kinds = (jnp.uint8, jnp.uint16)
        return next((t for t in kinds if self.block_size - 1 <= jnp.iinfo(t).max), jnp.int32)


def _largest(c: jax.Array) -> jax.Array:
    """The first index of the largest in each block, int32; the last one where there is NaN.

    XLA's argmax is several times slower on a CPU than these two reductions.
    """
    at = jax.lax.broadcasted_iota(jnp.int32, c.shape, c.ndim - 1)
    return jnp.where(c == c.max(-1, keepdims=True), at, c.shape[-1] - 1).min(-1)


def _one_hot(units: jax.Array, like: jax.Array) -> jax.Array:
    """1 at the chosen unit of each block and 0 elsewhere: (…, F / N) → (…, F / N, N)."""
    at = jax.lax.broadcasted_iota(units.dtype, like.shape, like.ndim - 1)
    return (units[..., None] == at).astype(like.dtype)


class MultiplicativeDense(Layer):
    """y[s·M + m] = Σᵢ x[i] D[i, s] E[i, m] + b: a dense layer with D·(S + M) weights, not D·S·M.

    The kernel W[i, (s, m)] = D[i, s] E[i, m] can send any input feature to any output, so it can
    represent every permutation. At M rows or more the kernel is made, and multiplied by; at fewer,
    as in decoding, it costs more than the product, and x ∘ D is multiplied by E.

    Weights: ``modules`` Dᵀ (S, D), ``features`` Eᵀ (M, D), and ``bias`` (S·M,) unless `use_bias` is
    false.

    Attributes:
      n_modules: S.
      n_units: the width of the output, S·M, which S must divide; None keeps the input's.
      use_bias: whether b is there.

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

    def init(self, signature, rng, mode=Mode.TRAIN):
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

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        y = multiplicative_dense(x, weights['modules'], weights['features'])
        return (y + weights['bias'] if self.use_bias else y,), state


class MultiplicativeHead(Layer):
    """Logits by a multiplicative layer: (…, D) → (…, vocab_size), with 1 / S of a head's weights.

    As `MultiplicativeDense`, for a vocabulary of any size: the modules are as large as their number
    asks for, and what they have beyond V together is cut off. It is faster than a `Dense` where one
    position at a time is decoded, and predicts somewhat worse.

    Weights: ``modules`` (S, D), ``features`` (⌈V / S⌉, D), and ``bias`` (V,) unless `use_bias` is
    false.

    Attributes:
      vocab_size: V.
      n_modules: S.
      use_bias: whether a bias is there.

    References:
      Jaszczur et al. 2021, section 3.3 ("sparse loss"), https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl, shape_dtype
    >>> tl.MultiplicativeHead(257, 4).output_signature(shape_dtype((2, 8)))
    (ShapeDtypeStruct(shape=(2, 257), dtype=float32),)
    """

    vocab_size: Size
    n_modules: Size = 4
    use_bias: bool = True

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('MultiplicativeHead', x)
        weights = _factors(rng, x.shape[-1], self.vocab_size, self.n_modules)
        return {**weights, **({'bias': jnp.zeros(self.vocab_size)} if self.use_bias else {})}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        y = multiplicative_dense(x, weights['modules'], weights['features'])
        y = y[..., : self.vocab_size]
        return (y + weights['bias'] if self.use_bias else y,), state


def _factors(rng: jax.Array, d: int, n: int, n_modules: int) -> Tree:
    """Factors whose products have the variance of Glorot's kernels, each with its root."""
    modules, features = jax.random.split(rng)
    make = Normal((2 / (d + n)) ** 0.25)
    return {
        'modules': make(modules, (n_modules, d)),
        'features': make(features, (-(-n // n_modules), d)),
    }


def multiplicative_dense(x: jax.Array, modules: jax.Array, features: jax.Array) -> jax.Array:
    """y[s·M + m] = Σᵢ x[i] D[i, s] E[i, m], in x's dtype, summed in float32.

    Args:
      x: (…, D).
      modules: Dᵀ (S, D), a row for each module.
      features: Eᵀ (M, D).

    Returns:
      (…, S·M).

    Raises:
      ValueError: if the widths do not fit.
    """
    (s, d), m = modules.shape, len(features)
    if x.shape[-1] != d:
        raise ValueError(
            f'the input is {x.shape[-1]} wide and the kernel was made for {d}: give the shape that '
            'the model was initialised with'
        )
    if math.prod(x.shape[:-1]) < m:
        scaled = x[..., None, :] * modules  # (…, S, D)
        y = _dot('md,...sd->...ms', features, scaled)  # this way round it reads E fastest
        return y.swapaxes(-1, -2).reshape(*x.shape[:-1], s * m)
    kernel = modules[:, None] * features  # (S, M, D)
    return _dot('...d,nd->...n', x, kernel.reshape(s * m, d))


class LocalConv(Layer):
    """A convolution over positions, causally, and over modules: (B, L, S·M) → n_outputs like it.

    With x seen as (B, L, S, M), and i positions back, j modules to either side::

        y[t, s] = Σᵢⱼ x[t − i, s + j] W[i, j] + b

    The kernel is the same for all modules, so there are few weights. Several outputs, each with a
    kernel of its own, come from one convolution.

    In ``PREDICT`` the state keeps the inputs, as long as the signature given to `init`.

    Weights: ``kernel`` (positions, modules, M, n_outputs·M), ``bias`` (n_outputs, M).

    Attributes:
      n_modules: S, which must divide the width.
      kernel_size: how many positions, the last being its own, and how many modules, with its own in
        the middle, an output sees.
      n_outputs: how many values it puts back.

    Raises:
      ValueError: if S does not divide the width, naming the nearest number that does.

    References:
      Jaszczur et al. 2021, section 3.2, https://arxiv.org/abs/2111.12763

    >>> from layercomb import tl
    >>> tl.LocalConv(4, n_outputs=3).n_out
    3
    """

    n_modules: Size
    kernel_size: tuple[int, int] = (3, 3)
    n_outputs: Size = 1
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros()

    n_out = property(lambda self: self.n_outputs)
    mixes_positions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.kernel_size) < 1:
            raise ValueError(
                f'LocalConv: kernel_size={self.kernel_size} must be two numbers of at least 1, '
                'positions and modules'
            )

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_rank('LocalConv', x, '(batch, length, features)', 3)
        check_float('LocalConv', x)
        check_modules('LocalConv', self.n_modules, x.shape[-1])
        m, n = x.shape[-1] // self.n_modules, self.n_outputs
        kernel_key, bias_key = jax.random.split(rng)
        kernel = self.kernel_init(kernel_key, (*self.kernel_size, m, n * m))
        weights = {'kernel': kernel, 'bias': self.bias_init(bias_key, (n, m))}
        if mode is not Mode.PREDICT:
            return weights, {}
        return weights, init_past(x, self._reach)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        length = x.shape[1]
        if mode is Mode.PREDICT:
            x, state = with_past(x, state, self._reach)
        else:
            x = jnp.pad(x, ((0, 0), (self._reach, 0), (0, 0)))
        side = self.kernel_size[1] - 1
        x = x.reshape(*x.shape[:2], self.n_modules, -1)  # (B, reach + L, S, M)
        x = jnp.pad(x, ((0, 0), (0, 0), (side // 2, side - side // 2), (0, 0)))
        y = convolve(x, weights['kernel'], (1, 1), 'VALID', (1, 1), groups=1)  # (B, L, S, n·M)
        y = y.reshape(*y.shape[:3], self.n_outputs, -1) + weights['bias']  # (B, L, S, n, M)
        return tuple(
            y[..., i, :].reshape(x.shape[0], length, -1) for i in range(self.n_outputs)
        ), state

    @property
    def _reach(self) -> int:
        """How many positions back the kernel sees."""
        return self.kernel_size[0] - 1


def LowRankDense(n_units: int, rank: int, name: str | None = None) -> Serial:
    """y = x A B + b with A (D, rank) and B (rank, n_units): a dense layer of low rank.

    Args:
      n_units: the width of the output.
      rank: of the product.
      name: of the layer.

    >>> from layercomb import tl
    >>> tl.LowRankDense(512, 8)
    Serial(Dense(8, use_bias=False), Dense(512))
    """
    return Serial(Dense(rank, use_bias=False), Dense(n_units), name=name)


def check_modules(owner: str, n_modules: int, width: int) -> None:
    """Raises a ValueError unless so many modules divide a width."""
    if width % n_modules:
        raise ValueError(
            f'{owner}: n_modules={n_modules} does not divide the width {width}: use '
            f'n_modules={nearest_divisor(width, n_modules)}, or a width of '
            f'{nearest_multiple(width, n_modules)}'
        )


def nearest_divisor(n: int, to: int) -> int:
    """The divisor of `n` nearest to a number.

    >>> nearest_divisor(96, 30)
    32
    """
    return min((i for i in range(1, n + 1) if n % i == 0), key=lambda i: abs(i - to))


def nearest_multiple(n: int, of: int) -> int:
    """The positive multiple of a number nearest to `n`.

    >>> nearest_multiple(100, 64)
    128
    """
    return max(1, round(n / of)) * of


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32).astype(x.dtype)
