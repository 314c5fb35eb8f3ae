"""`Chunk`: a position-wise layer, a slice of the length at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.combinators.shares import add_aux, by_share, how_many, passes_on, shares
from layercomb.layers.core.cotangents import zero_cts, zeros_once
from layercomb.layers.core.counted import along_length, put_counted, take_counted
from layercomb.layers.core.decisions import DECISIONS, put_decisions, take_decisions
from layercomb.layers.core.layer import Arrays, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.shapes import describe
from layercomb.trees import Tree


class Chunk(Wrapper):
    """Runs a position-wise layer a piece at a time along the length (axis 1), in constant memory.

    The forward pass holds what is inside the layer for one piece only, and so does the backward,
    which computes each piece again. What `chunk_len` does not divide runs as a shorter last piece.
    An auxiliary loss is the mean of the pieces', each by its share of the positions, or of those
    that count if the layer that has the loss is told which do.

    Attributes:
      layer: works on each position by itself, as feed-forwards, norms, dropout and losses do.
      chunk_len: the length of a piece.

    Raises:
      TypeError: if the layer mixes positions (attention, convolution, batch norm; also joining,
        cutting or sharing a dropout mask along axis 1 of (B, L, D), counted from either end).

    References:
      Kitaev et al., Reformer, 2020, section 3, https://arxiv.org/abs/2001.04451
    """

    carries_counted = True

    chunk_len: Size = 128

    recomputes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        mixer = _find_mixer(self.layer)
        if mixer is not None:
            raise TypeError(
                f'Chunk: {type(mixer).__name__} mixes positions, so its result would depend on '
                'where the pieces end: chunk only what works on each position by itself'
            )

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """Applies the layer piece by piece; piece `i` draws from `rng` folded with `i`."""
        length = self._length(inputs)
        if length <= self.chunk_len:
            return self.layer.apply(weights, state, tuple(inputs), rng=rng, mode=mode)
        n = length // self.chunk_len
        found, state, counted = _parts(state, inputs)
        pieces, rest = _cut((tuple(inputs), counted), n, self.chunk_len)
        n_counted = how_many(counted)
        state = add_aux({}, state, 0.0)

        def one(state: Tree, weights: Tree, xs: Any) -> tuple[Tree, Any]:
            (values, its_counted), i, decisions = xs
            its_state = put_counted(put_decisions(state, decisions), its_counted)
            outputs, new = self.layer.apply(weights, its_state, values, rng=fold(rng, i), mode=mode)
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
            state = {**state, DECISIONS: taken}
        return outputs, state

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """Outputs and gradients of one piece after the other, each computed once."""
        length = self._length(inputs)
        given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
        if length <= self.chunk_len:
            return self.layer.apply_and_grad(weights, state, inputs, cts, **given)
        found, plain, counted = _parts(state, inputs)
        if passes_on(plain):  # a piece needs the new state of the one before
            return super().apply_and_grad(weights, state, inputs, cts, **given)
        n, n_counted = length // self.chunk_len, how_many(counted)

        def one(total: Tree, at: Any, size: int, decisions: Tree) -> tuple[Tree, Any]:
            values, its_cts, its_counted = jax.tree.map(
                lambda x: jax.lax.dynamic_slice_in_dim(x, at * self.chunk_len, size, 1),
                (tuple(inputs), tuple(cts), counted),
            )
            outputs, d_values, d = self.layer.apply_and_grad(
                weights,
                put_counted(put_decisions(plain, decisions), its_counted),
                values,
                its_cts,
                rng=fold(rng, at),
                mode=mode,
                state_cts=by_share(state_cts, size / length, shares(its_counted, n_counted)),
            )
            return jax.tree.map(jnp.add, total, d), (tuple(outputs), tuple(d_values))

        def put(whole: Any, made: Any, at: Any) -> Any:
            def update(x: jax.Array, piece: jax.Array) -> jax.Array:
                return jax.lax.dynamic_update_slice_in_dim(x, piece, at * self.chunk_len, 1)

            return jax.tree.map(update, whole, made)

        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            (total, whole), (at, decisions) = carry, xs
            total, made = one(total, at, self.chunk_len, decisions)
            return (total, put(whole, made, at)), None

        # Cut where they lie and put where they belong, so that no copy in pieces exists.
        pieces, total = found.get('pieces', {}), zero_cts(weights)
        first = jax.tree.map(lambda x: x[0], pieces)
        _, made = jax.eval_shape(lambda: one(total, jnp.int32(0), self.chunk_len, first))
        known = next((ct for ct in cts if ct is not None), None)
        whole = jax.tree.map(
            lambda x: zeros_once((x.shape[0], length, *x.shape[2:]), x.dtype, known), made
        )
        numbers = jnp.arange(n, dtype=jnp.int32)
        (total, whole), _ = jax.lax.scan(step, (total, whole), (numbers, pieces))
        if length % self.chunk_len:
            rest = found.get('rest', {})
            total, made = one(total, jnp.int32(n), length % self.chunk_len, rest)
            whole = put(whole, made, jnp.int32(n))
        outputs, d_inputs = whole
        return outputs, d_inputs, total

    def _length(self, inputs: Arrays) -> int:
        lengths = {x.shape[1] if x.ndim > 1 else -1 for x in inputs}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                f'Chunk cuts axis 1 of all its inputs, which must be of one length, got '
                f'({describe(inputs)})'
            )
        return lengths.pop()


def _cut(values: Any, n: int, chunk_len: int) -> tuple[Any, Any]:
    """A tree's n pieces of chunk_len on a leading axis, and what is left over."""
    whole = n * chunk_len

    def pieces(x: jax.Array) -> jax.Array:
        x = x[:, :whole].reshape(x.shape[0], n, chunk_len, *x.shape[2:])  # (B, n, C, …)
        return jnp.moveaxis(x, 1, 0)  # (n, B, C, …)

    is_rest = whole < jax.tree.leaves(values)[0].shape[1]
    rest = jax.tree.map(lambda x: x[:, whole:], values) if is_rest else None
    return jax.tree.map(pieces, values), rest


def _join(pieces: jax.Array) -> jax.Array:
    x = jnp.moveaxis(pieces, 0, 1)  # (B, n, C, …)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])  # (B, n·C, …)


def _parts(state: Tree, inputs: Arrays) -> tuple[Tree, Tree, Tree]:
    """Decisions of pieces, the rest of a state, and which positions of the inputs count."""
    plain, counted = take_counted({k: v for k, v in state.items() if k != DECISIONS})
    return state.get(DECISIONS, {}), plain, along_length(counted, inputs[0].shape[:2])


def _find_mixer(layer: Layer) -> Layer | None:
    """The first layer inside whose outputs mix positions."""
    if layer.mixes_positions:
        return layer
    return next((m for m in map(_find_mixer, layer.sublayers) if m is not None), None)
