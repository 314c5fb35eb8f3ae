"""`BidirectionalRepeat`: any block n times in series, whose inputs training does not keep.

The blocks stay what they are; training mixes the stream before a block into the one after it::

    x_1     = x_0 + f_0(x_0)
    x_{k+1} = x_k + γ (x_{k-1} − x_k) + (1 + γ) f_k(x_k)        γ = ±2^−m, by chance

where f_k(x) = block_k(x) − x. From x_{k+1} and x_k follows x_{k-1}. Streams are integers on a grid,
so that it follows exactly: (X_{k-1} >> m) − (X_k >> m) stands for 2^−m (x_{k-1} − x_k), and the
lowest m bits of X_{k-1} are kept.

That needs f_k(x_k) to the bit, which XLA would compute in another order where it is fused with
other work. Both passes therefore run the same program (`_increment`) in a branch of its own. A sum
over each stream, kept from the forward pass, shows whether that failed.

Shape letters: B batch, n blocks, W bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, ChunkLen
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.constants import refuse_narrow
from layercomb.layers.reversible.cotangents import Wanted, constant, known, zero_cts
from layercomb.layers.reversible.fixed_point import Grid, fits, pack, unpack
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.layers.reversible.passing import passes_on
from layercomb.layers.reversible.pieces import in_pieces
from layercomb.layers.state.counted import put_counted, take_counted
from layercomb.layers.state.decisions import put_decisions, take_decisions
from layercomb.trees import Tree


class BidirectionalRepeat(Repeat):
    """A block n times in series, as `Repeat`, whose inputs training does not keep.

    In training, each block after the first computes::

        x_{k+1} = γ x_{k-1} + (1 − γ) x_k + (1 + γ) (block(x_k) − x_k)

    where γ is 2^−m or −2^−m, by chance for each sample and block. Otherwise γ is 0, and this is
    `Repeat` to the bit; weights and state are the same too. The memory of training grows with `n`
    by `m` bits a value, the weights, their gradients and the state. The backward pass runs each
    block twice: for its output, and for its gradient.

    Streams in training are float32 on a grid of 2^−fraction, below 2^(31 − fraction). A sample with
    a greater value comes out as NaN, which a `Loop` reports. So does its gradient, should a stream
    not be restored to the bit. Gradients are those of the equation, as if nothing were rounded.

    Attributes:
      layer: the block, (x, *context) → (x, *context): context, such as a mask, is passed on.
      n: how many times.
      shared: one set of weights for all blocks.
      m: how small γ is; a trained model needs it small.
      fraction: how many bits stand after the point.
      chunk_len: how many positions a position-wise residual of the block, such as a feed-forward,
        takes at a time in training, as of `Chunk`; None for all. It saves memory and costs no time.

    Raises:
      TypeError: if the block passes on something else than its context.
      ValueError: in training, without a key.

    References:
      Zhang, Lewis & Kleijn, On Exact Bit-level Reversible Transformers Without Changing
      Architectures (γ = ±½), 2024, https://arxiv.org/abs/2407.09093

    >>> from layercomb import tl
    >>> tl.BidirectionalRepeat(tl.Residual(tl.Dense()), 12).m
    4
    """

    position_wise = property(of_sublayers)

    m: Annotated[int, Bound(1, high=8)] = 4
    fraction: Annotated[int, Bound(0, high=30)] = 14
    chunk_len: ChunkLen | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not passes_on(self.layer):
            raise TypeError(
                f'BidirectionalRepeat: {type(self.layer).__name__} takes {self.layer.n_in} values, '
                'of which the first alone may change: it does not hand on the others as they are'
            )

    @property
    def plain(self) -> Repeat:
        """The same blocks as a `Repeat`."""
        return Repeat(self.layer, self.n, self.shared, name=self.name)

    @functools.cached_property
    def in_training(self) -> Layer:
        """The block as training computes it: with the same weights, in pieces of `chunk_len`."""
        return self.layer if self.chunk_len is None else in_pieces(self.layer, self.chunk_len)

    @property
    def limit(self) -> int:
        """What streams must stay below in training."""
        return 2 ** (31 - self.fraction)

    @property
    def grid(self) -> Grid:
        """The numbers on which streams lie in training."""
        return Grid(self.fraction)

    def signs(self, rng: jax.Array, batch: int) -> jax.Array:
        """γ · 2^m of each block and sample, ±1: int32 (n, B).

        It is 0 for the first block, for there is no stream before it.

        Args:
          rng: as of `apply`.
          batch: B.
        """
        key = jax.random.fold_in(rng, self.n)  # blocks draw from `rng` folded with 0 … n − 1
        return jax.random.rademacher(key, (self.n, batch), jnp.int32).at[0].set(0)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Runs the blocks in order; block `i` draws from `rng` folded with `i`, γ with `n`."""
        if not mode.is_training:
            return super().apply(weights, state, inputs, rng=rng, mode=mode)
        if rng is None:
            raise ValueError(
                'BidirectionalRepeat draws γ in training: pass rng=jax.random.key(…) to apply'
            )
        x, *context = inputs
        refuse_narrow(weights)
        y, new = _trained(self, mode, weights, state, x.astype(jnp.float32), tuple(context), rng)
        return (y.astype(x.dtype), *context), new


class Streams(NamedTuple):
    """What goes from block to block: two streams, as one and their difference.

    A loop updates both in place; two streams that change places it would copy.

    Attributes:
      now: int32 (B, …), on the grid: the stream after a block.
      step: int32 (B, …): what was added to the stream before that block.
      fit: bool (B,): whether all values of a sample were on the grid so far.
    """

    now: jax.Array
    step: jax.Array
    fit: jax.Array


class Side(NamedTuple):
    """What is kept of the stream before a block.

    Attributes:
      bits: uint8 (B, W): its lowest m bits.
      total: int32 (B,): its sum.
    """

    bits: jax.Array
    total: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One pass through the blocks of a `BidirectionalRepeat`, forward or backward.

    Attributes:
      owner: the layer.
      mode: ``RECORD`` or ``REPLAY``.
      weights, state, rng: as of `apply`.
      context: what all blocks are given beside the stream.
    """

    owner: BidirectionalRepeat
    mode: Mode
    weights: Tree
    state: Tree
    context: Arrays
    rng: jax.Array

    def forward(self, x: jax.Array) -> tuple[Streams, Tree, Side]:
        """The last streams, the new state, and what is kept of each stream, (n, B, …)."""
        grid, m = self.owner.grid, self.owner.m

        def step(streams: Streams, block: _Block) -> tuple[Streams, Any]:
            (added, fit), new = self._increment(streams.now, block)
            # The stream before is made again when the block has come to its end.
            added, now, last = jax.lax.optimization_barrier((added, streams.now, streams.step))
            before = now - last
            mixed = _per_sample(block.sign, now) * ((before >> m) - (now >> m))
            moved = added + mixed
            after = sum(x.astype(jnp.float32) for x in (now, added, mixed))
            fit = streams.fit & fit & fits(after)
            return Streams(now + moved, moved, fit), (new, Side(pack(before, m), _sums(before)))

        start = Streams(grid.of(x), jnp.zeros(x.shape, jnp.int32), fits(grid.scaled(x)))
        streams, (new, side) = jax.lax.scan(step, start, self._each_block(len(x)))
        return streams, new, side

    def backward(
        self,
        streams: Streams,
        side: Side,
        ct: jax.Array,
        state_cts: Tree | None,
        wanted: tuple[Wanted, Wanted],
    ) -> tuple[Streams, jax.Array, Arrays, Tree]:
        """The first streams, and cotangents of the first, of the context and of the weights.

        Args:
          streams: the last.
          side: what was kept of each.
          ct: of the last stream.
          state_cts: of the new state.
          wanted: which weights, and which context, have a cotangent.
        """
        given = self.weights, self.context

        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            streams, (d_before, d_now), total = carry
            block, its_side, its_cts = xs
            streams, its_state, right = self._undone(streams, its_side, block)
            gamma = self._gamma(block, ct)
            d_f = jnp.where(_per_sample(right, ct), (1 + gamma) * d_now, jnp.nan)
            d_before = d_before - 2 * gamma * d_now
            # What undoing takes is free before the gradient begins.
            streams, d_f, d_before = jax.lax.optimization_barrier((streams, d_f, d_before))
            with constant(wanted[0].others(self._weights(block)) + wanted[1].others(self.context)):
                d_x, d = self._gradients(streams.now, its_state, d_f, its_cts, block)
            total = self._added(total, tuple(map(Wanted.only, wanted, given, d)), block)
            return (streams, (gamma / (1 + gamma) * d_f, d_before + d_x), total), None

        zeros = tuple(map(Wanted.only, wanted, given, zero_cts(given, ct)))
        carry = streams, (zero_cts(ct, ct), ct), zeros
        xs = self._each_block(len(ct)), side, state_cts
        (streams, (_, d_x), (d_weights, d_context)), _ = jax.lax.scan(step, carry, xs, reverse=True)
        return streams, d_x, d_context, d_weights

    def _added(self, total: tuple[Tree, Any], d: tuple[Tree, Any], block: _Block) -> Any:
        """Cotangents of weights and context with those of one block."""

        def put(stacked: jax.Array, one: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(stacked, one, block.number, 0)

        add = jnp.add if self.owner.shared else put
        return jax.tree.map(add, total[0], d[0]), jax.tree.map(jnp.add, total[1], d[1])

    def _each_block(self, batch: int) -> _Block:
        """What differs between blocks, stacked."""
        n, shared = self.owner.n, self.owner.shared
        return _Block(
            jnp.arange(n, dtype=jnp.int32),
            self.owner.signs(self.rng, batch),
            None if shared else self.weights,
            take_counted(self.state)[0],
        )

    def _increment(self, now: jax.Array, block: _Block) -> tuple[tuple[jax.Array, jax.Array], Tree]:
        """(1 + γ) f(x) on the grid, int32, which samples of it fit there, and the new state.

        The bits are the same in both passes.

        Work in a branch is not fused with other work, nor merged with equal work.
        """
        grid = self.owner.grid

        @jax.jit  # traced once for its shapes and the branch
        def run() -> tuple[tuple[jax.Array, jax.Array], Tree]:
            x = grid.floats(now)
            (y, *_), new = self.owner.in_training.apply(
                self._weights(block),
                self._state(block),
                (x, *self.context),
                rng=fold(self.rng, block.number),
                mode=self.mode,
            )
            added = (1 + self._gamma(block, x)) * (y.astype(x.dtype) - x)
            return (grid.of(added), fits(grid.scaled(added))), take_counted(new)[0]

        shapes = jax.eval_shape(run)

        def never() -> tuple[tuple[jax.Array, jax.Array], Tree]:
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        return jax.lax.cond(block.number >= 0, run, never)

    def _undone(
        self, streams: Streams, side: Side, block: _Block
    ) -> tuple[Streams, Tree, jax.Array]:
        """The streams before a block, its state with its decisions, and which samples are right."""
        m, x = self.owner.m, streams.now - streams.step
        (added, _), new = self._increment(x, block)
        high = _per_sample(block.sign, x) * (streams.step - added) + (x >> m)
        before = (high << m) | unpack(side.bits, m, x.shape)
        state = self._state(block)
        if self.mode is Mode.RECORD:
            state = put_decisions(state, take_decisions(new)[1])
        return Streams(x, x - before, streams.fit), state, _sums(before) == side.total

    def _gradients(
        self, now: jax.Array, state: Tree, ct: jax.Array, state_cts: Tree | None, block: _Block
    ) -> tuple[Any, tuple[Tree, Any]]:
        """Cotangents of a block's stream, and of its weights and context, from those of f."""
        _, (d_x, *d_context), d_weights = one_pass(
            self.owner.in_training,
            self._weights(block),
            state,
            (self.owner.grid.floats(now), *self.context),
            (ct, *(None for _ in self.context)),
            rng=fold(self.rng, block.number),
            mode=Mode.REPLAY,
            state_cts=state_cts,
        )
        return d_x, (d_weights, tuple(d_context))

    def _weights(self, block: _Block) -> Tree:
        return self.weights if block.weights is None else block.weights

    def _state(self, block: _Block) -> Tree:
        return put_counted(block.state, take_counted(self.state)[1])  # the same for all blocks

    def _gamma(self, block: _Block, x: jax.Array) -> jax.Array:
        """γ of each sample, as deep as x."""
        return _per_sample(block.sign, x).astype(x.dtype) * 2.0**-self.owner.m


class _Block(NamedTuple):
    """What one block differs in from others; None for weights that all share."""

    number: jax.Array
    sign: jax.Array
    weights: Tree | None
    state: Tree


def _per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) → (B, 1, …), with as many axes as `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def _sums(k: jax.Array) -> jax.Array:
    """(B, …) → (B,), modulo 2^32."""
    return k.sum(tuple(range(1, k.ndim)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _trained(
    owner: BidirectionalRepeat,
    mode: Mode,
    weights: Tree,
    state: Tree,
    x: jax.Array,
    context: Arrays,
    rng: jax.Array,
) -> tuple[jax.Array, Tree]:
    """The blocks in training; their gradient runs them backwards. `state` is taken as constant."""
    return _ran(Run(owner, _inside(mode), weights, state, context, rng), x, mode)[0]


def _inside(mode: Mode) -> Mode:
    """The mode of the blocks: they replay if told so, and record for the backward pass if not."""
    return Mode.REPLAY if mode is Mode.REPLAY else Mode.RECORD


def _ran(run: Run, x: jax.Array, mode: Mode) -> tuple[tuple[jax.Array, Tree], Any]:
    """Output and new state, and what the backward pass starts from."""
    streams, new, side = run.forward(x)
    y = jnp.where(_per_sample(streams.fit, x), run.owner.grid.floats(streams.now), jnp.nan)
    return (y, take_decisions(new)[0] if mode is Mode.TRAIN else new), (streams, side)


def _forward(owner: BidirectionalRepeat, mode: Mode, *given: Any) -> tuple[Any, Any]:
    (weights, state, x, context, rng), (of_weights, _, _, of_context, _) = zip(
        *map(Wanted.split, given), strict=True
    )
    run = Run(owner, _inside(mode), weights, state, context, rng)
    outputs, kept = _ran(run, x, mode)
    return outputs, (weights, state, context, rng, kept, (of_weights, of_context))


def _backward(owner: BidirectionalRepeat, mode: Mode, kept: Any, cts: Any) -> tuple[Any, ...]:
    weights, state, context, rng, (streams, side), wanted = kept
    ct, state_cts = jax.tree.map(known, cts)
    if ct is None:
        ct = jnp.zeros(streams.now.shape, jnp.float32)
    run = Run(owner, _inside(mode), weights, state, context, rng)
    _, d_x, d_context, d_weights = run.backward(streams, side, ct, state_cts, wanted)
    return d_weights, None, d_x, d_context, None


_trained.defvjp(_forward, _backward, symbolic_zeros=True)
