"""`Chunk`: runs a position-wise layer on one slice of the length at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import ChunkLen
from layercomb.layers.combinators.shares import add_aux, how_many, shares
from layercomb.layers.core.layer import Arrays, Key, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers, reason, unsaid
from layercomb.layers.state.counted import along_length, put_counted, take_counted
from layercomb.layers.state.decisions import Decisions, put_decisions, take_decisions
from layercomb.layers.state.parts import beside, own, without
from layercomb.shapes import describe
from layercomb.trees import Tree

# Positions in an automatic slice. On the CPU a slice stays in the caches. A GPU is busy with a
# longer one: a Reformer on 65,536 tokens takes 195 ms a step instead of 254 ms on an H100. A TPU
# launches nothing anew for a slice, but reads the weights again, which from about 1,000 positions
# on takes less time than their products: four times as many hide it, in a quarter of a GPU's
# memory. That is reckoned, not measured. Other platforms get what takes the least memory.
_AUTOMATIC = {'cpu': 1024, 'gpu': 16384, 'tpu': 4096}


def automatic_len(platform: str) -> int:
    """How many positions an automatic slice has.

    Args:
      platform: its name, as `jax.default_backend()` gives it.

    >>> automatic_len('cpu'), automatic_len('gpu')
    (1024, 16384)
    """
    return _AUTOMATIC.get(platform, _AUTOMATIC['cpu'])


class Chunk(Wrapper):
    """Runs a position-wise layer on one slice at a time along the length (axis 1).

    y[:, s] = layer(x[:, s]) for each slice s; inputs and outputs are (B, L, …). Activations inside
    the layer exist for one slice at a time; the backward pass computes each slice again. The last
    slice is shorter if `chunk_len` does not divide L. An auxiliary loss is the mean of the slices'
    losses, weighted by their shares of the positions, or of the positions that count, if the layer
    with the loss is told which do.

    Attributes:
      layer: works on each position by itself, as feed-forwards, norms, dropout and losses do.
      chunk_len: the length of a slice; 'auto' chooses it by the platform where the layer is
        applied: 1,024 on a CPU, 16,384 on a GPU, 4,096 on a TPU. Outputs are the same to rounding,
        whatever the length; dropout draws anew for each slice.

    Raises:
      TypeError: if the layer mixes positions: attention, convolution, batch norm; also
        `Concatenate`, `Split` or a shared dropout mask along the axis of positions; or if a layer
        of your own inside does not declare ``position_wise = True``.

    References:
      Kitaev et al., Reformer, 2020, section 3, https://arxiv.org/abs/2001.04451
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    chunk_len: ChunkLen = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer.position_wise is True:
            return
        found = reason(self.layer)
        if found.position_wise is None:
            raise TypeError(f'Chunk: {unsaid(found)}')
        raise TypeError(
            f'Chunk: {type(found).__name__} mixes positions, so its result would depend on '
            'where the slices end: chunk only what works on each position by itself'
        )

    @property
    def slice_len(self) -> int:
        """The length of a slice on the platform at hand."""
        if isinstance(self.chunk_len, str):
            return automatic_len(jax.default_backend())
        return self.chunk_len

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Applies the layer to each slice: (B, L, …) → (B, L, …).

        Slice `i` draws from `rng` folded with `i`; a sequence of one slice draws from `rng` itself.

        Raises:
          ValueError: if inputs have no axis 1, or are of different lengths.
          TypeError: if the layer does not leave positions on axis 1.
        """
        length, slice_len = self.length_of(inputs), self.slice_len
        if length <= slice_len:
            return self.layer.apply(weights, state, tuple(inputs), rng=rng, mode=mode)
        n = length // slice_len
        found, state, counted = state_parts(state, inputs)
        pieces, rest = _cut((tuple(inputs), counted), n, slice_len)
        n_counted = how_many(counted)
        state = add_aux({}, state, 0.0)

        def one(state: Tree, weights: Tree, xs: Any) -> tuple[Tree, Any]:
            (values, its_counted), i, decisions = xs
            its_state = put_counted(put_decisions(state, decisions), its_counted)
            outputs, new = self.layer.apply(weights, its_state, values, rng=fold(rng, i), mode=mode)
            self.check_slice(outputs, values[0].shape[1])
            new, decisions = take_decisions(take_counted(new)[0])
            share = values[0].shape[1] / length
            state = add_aux(state, new, share, shares(its_counted, n_counted))
            return state, (outputs, decisions)

        again = jax.checkpoint(one, prevent_cse=False)  # a scan separates the passes by itself
        state, (outputs, decisions) = jax.lax.scan(
            lambda state, xs: again(state, weights, xs),
            state,
            (pieces, jnp.arange(n, dtype=jnp.int32), found.get('pieces', {})),
        )
        taken = {'pieces': decisions} if decisions else {}
        outputs = jax.tree.map(_join, outputs)
        if rest is not None:
            xs = (rest, jnp.int32(n), found.get('rest', {}))
            state, (tail, decisions) = jax.checkpoint(one)(state, weights, xs)
            if decisions:
                taken['rest'] = decisions
            outputs = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), outputs, tail)
        if mode is Mode.RECORD and taken:
            state = beside(state, Decisions(taken))
        return outputs, state

    def length_of(self, inputs: Arrays) -> int:
        """The length L of inputs (B, L, …).

        Raises:
          ValueError: if an input has no axis 1, or lengths differ.
        """
        lengths = {x.shape[1] if x.ndim > 1 else -1 for x in inputs}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                f'Chunk cuts axis 1 of all its inputs, which must be of one length, got '
                f'({describe(inputs)})'
            )
        return lengths.pop()

    def check_slice(self, outputs: Arrays, length: int) -> None:
        """Checks that outputs of a slice of `length` positions have them on axis 1.

        Raises:
          TypeError: if another axis came there, along which slices would be joined.
        """
        for y in outputs:
            if y.ndim < 2 or y.shape[1] != length:
                raise TypeError(
                    f'Chunk joins slices along axis 1, and {type(self.layer).__name__} turns a '
                    f'slice of {length} positions into ({describe(outputs)}): chunk what keeps '
                    'positions on axis 1'
                )


def _cut(values: Any, n: int, slice_len: int) -> tuple[Any, Any]:
    """A tree of (B, L, …) as n slices, (n, B, slice_len, …), and the rest, or None."""
    whole = n * slice_len

    def pieces(x: jax.Array) -> jax.Array:
        x = x[:, :whole].reshape(x.shape[0], n, slice_len, *x.shape[2:])  # (B, n, C, …)
        return jnp.moveaxis(x, 1, 0)  # (n, B, C, …)

    is_rest = whole < jax.tree.leaves(values)[0].shape[1]
    rest = jax.tree.map(lambda x: x[:, whole:], values) if is_rest else None
    return jax.tree.map(pieces, values), rest


def _join(pieces: jax.Array) -> jax.Array:
    x = jnp.moveaxis(pieces, 0, 1)  # (B, n, C, …)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])  # (B, n·C, …)


def state_parts(state: Tree, inputs: Arrays) -> tuple[Tree, Tree, Tree]:
    """Splits a state: recorded decisions, the rest, and which positions of the inputs count."""
    decisions = own(state, Decisions)
    plain, counted = take_counted(without(state, Decisions))
    found = {} if decisions is None else decisions.values
    return found, plain, along_length(counted, inputs[0].shape[:2])
