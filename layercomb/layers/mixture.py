"""Feed-forwards of which each position uses a part: `SwitchFF`, `BlockSparseFF`.

Shape letters: B batch, L length, D d_model, F d_ff, E experts or blocks, M units of one of them,
R rank, T positions in all, C rows of a tile, n tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.layers import controllers
from layercomb.layers.activations import elementwise
from layercomb.layers.base import AUX_LOSS, Layer, Mode, Tree
from layercomb.layers.bucketwise import put, rows
from layercomb.layers.core import contract, dense
from layercomb.layers.counted import counted_positions
from layercomb.layers.decisions import DECISIONS
from layercomb.layers.fields import Bound, Rate, Size
from layercomb.layers.initializers import Initializer, glorot_uniform, zeros
from layercomb.shapes import as_deep, check_float

Function = Callable[[jax.Array], jax.Array]

_TILE = (8, 128)  # rows of a tile, at least and at most


class SwitchFF(Layer):
    """A mixture of feed-forwards, of which a router chooses one for each position.

    With p = softmax(x Wᵣ), in float32, and e = argmax p::

        y = p[e] (f(x W₁[e] + b₁[e]) W₂[e] + b₂[e])

    No expert is full and no position left out: positions are sorted by their experts, and each is
    multiplied by the weights of its own alone.

    Training leaves as state, under ``aux_loss``, what keeps the experts in use::

        balance · E · Σₑ share[e] · mean[e]

    where share[e] is the part of the positions that chose e, taken as constant, and mean[e] the
    mean of p[e]. It is `balance` where all are used alike. Positions of loss weight 0 count neither
    in share nor in mean, be they padding or a prompt; if none counts, the loss is 0. They are still
    computed. A `Loop` sees to that, and `losses.apply_counted` in a loop of one's own; else all
    positions count.

    The chosen experts are decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``router`` (kernel (D, E)), ``in`` (kernel (E, D, F), bias (E, F)), ``out`` (kernel
    (E, F, D), bias (E, D)).

    Attributes:
      d_ff: F, the width of each expert.
      n_experts: E.
      balance: the weight of the auxiliary loss.
      jitter: in training the router's input is multiplied by numbers within 1 ± `jitter`.
      activation: f, by its name.
      use_bias: whether b₁ and b₂ are there.
      kernel_init: of W₁, W₂ and Wᵣ, of each expert by itself.
      bias_init: of b₁ and b₂.

    Raises:
      ValueError: in training with jitter, without a key.

    References:
      Fedus et al. 2021, Switch Transformers, section 2, https://arxiv.org/abs/2101.03961

    >>> from layercomb import tl, shape_dtype
    >>> tl.SwitchFF(32, 4).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 8), dtype=float32),)
    """

    d_ff: Size
    n_experts: Size = 8
    _: KW_ONLY
    balance: Annotated[float, Bound(0)] = 0.01
    jitter: Rate = 0.0
    activation: str = 'relu'
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    counts_positions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        elementwise(type(self).__name__, self.activation)  # a wrong name is an error now

    def init(self, signature, rng, mode=Mode.TRAIN):
        """Weights, and an auxiliary loss of zero, except in ``PREDICT``, which has none."""
        (x,) = signature
        check_float('SwitchFF', x)
        d, f, e = x.shape[-1], self.d_ff, self.n_experts
        keys = jax.random.split(rng, 5)

        def each(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            # One by one, or the initializer would count the experts as inputs.
            return jax.vmap(lambda k: self.kernel_init(k, shape))(jax.random.split(key, e))

        weights: Tree = {
            'router': {'kernel': self.kernel_init(keys[0], (d, e))},
            'in': {'kernel': each(keys[1], (d, f))},
            'out': {'kernel': each(keys[2], (f, d))},
        }
        if self.use_bias:
            weights['in']['bias'] = self.bias_init(keys[3], (e, f))
            weights['out']['bias'] = self.bias_init(keys[4], (e, d))
        return weights, {} if mode is Mode.PREDICT else {AUX_LOSS: jnp.zeros((), jnp.float32)}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        state, counted = counted_positions(state, x)
        flat = x.reshape(-1, x.shape[-1])  # (T, D)
        p = self._probabilities(weights['router'], flat, rng, mode)  # (T, E)
        if mode is Mode.REPLAY:
            experts = state[DECISIONS]['experts'].reshape(-1)
        else:
            experts = jnp.argmax(p, -1).astype(controllers.smallest_integers(self.n_experts))
        y = by_expert(
            weights['in'],
            weights['out'],
            elementwise(type(self).__name__, self.activation),
            flat,
            experts,
        )
        own = jnp.take_along_axis(p, experts[:, None].astype(jnp.int32), 1)  # (T, 1)
        y = (y * own.astype(y.dtype)).reshape(x.shape)
        if mode.is_training:
            state = {**state, AUX_LOSS: self.balance * imbalance(p, experts, counted)}
        if mode is Mode.RECORD:
            state = {**state, DECISIONS: {'experts': experts.reshape(x.shape[:-1])}}
        return (y,), state

    def _probabilities(
        self, router: Tree, x: jax.Array, rng: jax.Array | None, mode: Mode
    ) -> jax.Array:
        """p in float32, whatever the layer is computed in."""
        x, kernel = x.astype(jnp.float32), router['kernel'].astype(jnp.float32)
        if mode.is_training and self.jitter:
            if rng is None:
                raise ValueError(
                    'SwitchFF draws jitter in training: pass rng=jax.random.key(…) to apply'
                )
            x = x * jax.random.uniform(rng, x.shape, x.dtype, 1 - self.jitter, 1 + self.jitter)
        return jax.nn.softmax(dense({'kernel': kernel}, x))


class BlockSparseFF(Layer):
    """A feed-forward cut into blocks of units, of which a controller picks one for each position.

    y = (f(x W₁ + b₁) ∘ m) W₂ + b₂, where the mask m is the same for all units of a block, and is
    made from c = x C₁ C₂, a number a block:

    * ``EVAL``, ``PREDICT``: m is 1 at the block of the largest c, and 0 elsewhere; the other blocks
      are not computed;
    * training: p = softmax(c + temperature · g), g being Gumbel noise. With probability
      `hard_prob`, one draw for all that is given at once, m is the one-hot of the largest p, and
      its gradient that of p (straight-through); else m = p. All blocks are computed.

    The chosen blocks are decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``in`` (kernel (E, D, M), bias (E, M)) and ``out`` (kernel (E, M, D), bias (D,)), for
    E = n_blocks of M = d_ff / E units, so that a block lies together; ``controller`` (``in`` kernel
    (D, R), ``out`` kernel (R, E)).

    Attributes:
      d_ff: the number of units.
      n_blocks: E, which must divide it.
      d_lowrank: R, the rank of the controller; None takes D / E, but at least 16.
      temperature: how much noise training adds.
      hard_prob: how often training takes the hard choice.
      activation: f, by its name.
      use_bias: whether b₁ and b₂ are there.
      kernel_init: of W₁ and W₂, each as a whole.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        controllers.check_fields(self, 'n_blocks')

    def init(self, signature, rng, mode=Mode.TRAIN):
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

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        out = weights['out']
        c = controllers.logits(weights['controller'], x)  # (…, E)
        if mode.is_training:
            taken = state[DECISIONS]['blocks'] if mode is Mode.REPLAY else None
            mask, blocks = controllers.sample(self, c, rng, taken)
            if mode is Mode.RECORD:
                state = {**state, DECISIONS: {'blocks': blocks}}
            y = self._whole(weights, x, mask)
        else:
            flat, blocks = x.reshape(-1, x.shape[-1]), controllers.largest(c).reshape(-1)  # (T, …)
            each = {'kernel': out['kernel']}  # the bias belongs to no block
            y = by_expert(
                weights['in'], each, elementwise(type(self).__name__, self.activation), flat, blocks
            )
            y = y.reshape(x.shape)
        return (y + as_deep(out['bias'], y) if self.use_bias else y,), state

    def _whole(self, weights: Tree, x: jax.Array, mask: jax.Array) -> jax.Array:
        """All blocks, times the mask, without b₂."""
        h = contract('...d,edm->...em', x, weights['in']['kernel'])
        h = elementwise(type(self).__name__, self.activation)(
            h + as_deep(weights['in']['bias'], h) if self.use_bias else h
        )
        h = h * mask[..., None].astype(h.dtype)
        return contract('...em,emd->...d', h, weights['out']['kernel'])


def imbalance(p: jax.Array, experts: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """E · Σₑ share[e] · mean[e]: 1 where all experts are used alike, E where one is used alone.

    Args:
      p: (T, E) float32, what a router gives to each expert.
      experts: (T,) integers, the chosen ones; their shares are constants.
      counted: T booleans, of any shape, true where a position counts; None if all do.

    Returns:
      float32 (); 0 if no position counts.
    """
    t, e = p.shape
    chosen = experts[:, None] == jnp.arange(e, dtype=experts.dtype)[None]  # (T, E)
    if counted is None:
        n: Any = max(t, 1)
    else:
        n = jnp.maximum(counted.sum(dtype=p.dtype), 1)
        counts = counted.reshape(-1, 1)
        chosen, p = chosen & counts, jnp.where(counts, p, 0)
    return e * jnp.sum(chosen.sum(0, dtype=p.dtype) * p.sum(0)) / n**2


def by_expert(w_in: Tree, w_out: Tree, f: Function, x: jax.Array, experts: jax.Array) -> jax.Array:
    """y[t] = f(x[t] W₁[e] + b₁[e]) W₂[e] + b₂[e], where e = experts[t].

    Positions are sorted by their experts into tiles of one expert each, whose last rows may be
    empty, and the tiles are computed one after the other: no expert's work is done in vain, and no
    weight is copied for every position. At E positions or fewer a tile is a position.

    Args:
      w_in: ``kernel`` W₁ (E, D, M), ``bias`` b₁ (E, M) or none.
      w_out: ``kernel`` W₂ (E, M, D), ``bias`` b₂ (E, D) or none.
      f: an elementwise function.
      x: (T, D).
      experts: (T,) integers, from 0 to E − 1.

    Returns:
      (T, D), in the dtype of x, summed in float32.
    """
    tiles = _tiles(experts.astype(jnp.int32), len(w_in['kernel']))
    h = x.at[tiles.row].get(mode='fill', fill_value=0, wrap_negative_indices=False)  # (n, C, D)
    h = f(_dense_by_tile(w_in, h, tiles.expert))  # (n, C, M)
    y = _dense_by_tile(w_out, h, tiles.expert)
    return rows(y.reshape(-1, y.shape[-1]), tiles.place)  # (T, D)


class _Tiles(NamedTuple):
    """Where T positions lie in n tiles of C.

    Attributes:
      expert: (n,), of each tile.
      row: (n, C), the position in each place, T where there is none.
      place: (T,), of each position, counted through all tiles.
    """

    expert: jax.Array
    row: jax.Array
    place: jax.Array


def _tiles(experts: jax.Array, n_experts: int) -> _Tiles:
    t = len(experts)
    position = jnp.arange(t, dtype=jnp.int32)
    if t <= n_experts:
        return _Tiles(experts, position[:, None], position)
    size = _tile_size(t, n_experts)
    n = n_experts + (t - n_experts) // size  # where each expert has one position at least
    all_experts = jnp.arange(n_experts, dtype=jnp.int32)[None]
    count = (experts[:, None] == all_experts).sum(0, dtype=jnp.int32)  # (E,)
    n_tiles = -(-count // size)
    end = jnp.cumsum(jnp.stack([count, n_tiles]), 1)
    first, first_tile = end - jnp.stack([count, n_tiles])  # of each expert
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    place = position + rows(first_tile * size - first, rows(experts, order))  # in sorted order
    row = put(jnp.full(n * size, t, jnp.int32), place, order).reshape(n, size)
    expert = (position[:n, None] >= end[1][None]).sum(1, dtype=jnp.int32)
    expert = jnp.minimum(expert, n_experts - 1)  # of tiles left over, which are empty
    return _Tiles(expert, row, put(jnp.zeros_like(order), order, place))


def _tile_size(n_rows: int, n_experts: int) -> int:
    """A power of two, at most half of what an expert gets, so that little is empty."""
    low, high = _TILE
    half = n_rows // (2 * n_experts)
    return max(low, min(high, 1 << max(half.bit_length() - 1, 0)))


def _dense_by_tile(weights: Tree, x: jax.Array, expert: jax.Array) -> jax.Array:
    """x[i] W[e] + b[e] for each tile i, where e = expert[i]: (n, C, D) → (n, C, M)."""
    y = _dot_by_tile(x, weights['kernel'], expert)
    return y + rows(weights['bias'], expert)[:, None] if 'bias' in weights else y


@jax.custom_vjp
def _dot_by_tile(x: jax.Array, w: jax.Array, expert: jax.Array) -> jax.Array:
    """x[i] w[expert[i]]: a loop, because on a CPU `ragged_dot` multiplies by every expert.

    Its gradient is written out because a scan would keep a copy of the weights for every tile.
    """
    return _scan_dot(x, w, expert, 0)


def _forward(x: jax.Array, w: jax.Array, expert: jax.Array) -> tuple[jax.Array, Any]:
    return _dot_by_tile(x, w, expert), (x, w, expert)


def _backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, w, expert = kept

    def add(dw: jax.Array, tile: Any) -> tuple[jax.Array, None]:
        x, dy, e = tile
        return dw.at[e].add(_contract(x, dy, 0, 0)), None

    dw, _ = jax.lax.scan(add, jnp.zeros(w.shape, jnp.float32), (x, dy, expert))
    return _scan_dot(dy, w, expert, 1), dw.astype(w.dtype), None


_dot_by_tile.defvjp(_forward, _backward)


def _scan_dot(x: jax.Array, w: jax.Array, expert: jax.Array, axis: int) -> jax.Array:
    """The last axis of each tile times an axis of its expert's matrix."""

    def one(_: None, tile: Any) -> tuple[None, jax.Array]:
        x, e = tile
        return None, _contract(x, w[e], 1, axis).astype(x.dtype)

    return jax.lax.scan(one, None, (x, expert))[1]


def _contract(a: jax.Array, b: jax.Array, axis: int, other: int) -> jax.Array:
    dimensions = (((axis,), (other,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
