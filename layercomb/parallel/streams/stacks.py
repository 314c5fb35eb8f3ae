"""Reversible layers on streams in host memory: `forwards` and `backwards`, one rule per class."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.core.layer import Key, Layer, fold
from layercomb.layers.reversible.cotangents import add_wanted, zero_cts
from layercomb.layers.reversible.layers import (
    ReversibleHalfResidual,
    ReversibleSelect,
    ReversibleSwap,
)
from layercomb.layers.reversible.rules import Rules
from layercomb.layers.reversible.stack import ReversibleRepeat, ReversibleSerial
from layercomb.parallel.streams.by_head import ByHead, why_not
from layercomb.parallel.streams.pieces import Streams
from layercomb.parallel.streams.reaching import of_series
from layercomb.parallel.streams.windows import Windows
from layercomb.parallel.swapped import Update, block, moved
from layercomb.trees import Tree


class Lengths(NamedTuple):
    """How streams are cut.

    Attributes:
      length: L.
      size: positions in a piece.
    """

    length: int
    size: int


class Moving(NamedTuple):
    """What stands in the place of weights of a stack that is in host memory; see `swapped.Held`.

    Attributes:
      trained: weights, the optimizer's state, and the sum of squares of gradients.
      frozen: frozen weights, and what all blocks share.
      update: applies a block's gradient.
    """

    trained: Any
    frozen: Any
    update: Update


@Rules
def misfit(layer: Layer) -> str | None:
    """Why a reversible layer cannot work on streams in host memory; None if it can."""
    return f'{type(layer).__name__} has no rule that computes it in pieces'


@Rules
def forwards(
    layer: Layer, weights: Tree, streams: Streams, rng: Key, lengths: Lengths
) -> tuple[Streams, Any]:
    """The streams after a reversible layer, and what it decided.

    Args:
      layer: one in which `misfit` finds nothing.
      weights: its own.
      streams: (L, B, D) each, in host memory.
      rng: its key.
      lengths: how streams are cut.
    """
    raise TypeError(f'streams: {misfit(layer)}')


@Rules
def backwards(
    layer: Layer,
    weights: Tree,
    found: Any,
    streams: Streams,
    cts: Streams,
    rng: Key,
    lengths: Lengths,
) -> tuple[Streams, Streams, Tree]:
    """The streams before a reversible layer, their cotangents, and those of weights.

    Args:
      layer, weights, rng, lengths: as of `forwards`.
      found: what it decided there.
      streams: those after it.
      cts: their cotangents, in host memory too.
    """
    raise TypeError(f'streams: {misfit(layer)}')


def _of_half(half: ReversibleHalfResidual, lengths: Lengths) -> Windows | ByHead:
    found = of_series(half.layers)
    return ByHead(half, *lengths) if found is None else Windows(half, found, *lengths)


@misfit.register(ReversibleHalfResidual)
def _fits_half(layer):
    if layer.n_in != 2:
        return f'{type(layer).__name__} takes context, such as masks or the states of an encoder'
    return None if of_series(layer.layers) is not None else why_not(layer)


@forwards.register(ReversibleHalfResidual)
def _half(layer, weights, streams, rng, lengths):
    return _of_half(layer, lengths).forward(weights, streams, rng)


@backwards.register(ReversibleHalfResidual)
def _undo_half(layer, weights, found, streams, cts, rng, lengths):
    return _of_half(layer, lengths).backward(weights, found, streams, cts, rng)


@misfit.register(ReversibleSwap)
@misfit.register(ReversibleSelect)
def _fits(layer):
    return None


@forwards.register(ReversibleSwap)
def _swap(layer, weights, streams, rng, lengths):
    return streams[::-1], {}


@backwards.register(ReversibleSwap)
def _swap_back(layer, weights, found, streams, cts, rng, lengths):
    return streams[::-1], cts[::-1], {}


@forwards.register(ReversibleSelect)
def _select(layer, weights, streams, rng, lengths):
    return tuple(streams[i] for i in layer.indices), {}


@backwards.register(ReversibleSelect)
def _select_back(layer, weights, found, streams, cts, rng, lengths):
    back = [layer.indices.index(i) for i in range(len(layer.indices))]
    return tuple(streams[i] for i in back), tuple(cts[i] for i in back), {}


@misfit.register(ReversibleSerial)
@misfit.register(ReversibleRepeat)
def _fits_inside(layer):
    return next((why for each in layer.sublayers if (why := misfit(each)) is not None), None)


@forwards.register(ReversibleSerial)
def _serial(layer, weights, streams, rng, lengths):
    found: list[Any] = []
    for i, (key, each) in enumerate(layer.children):
        n = each.n_in
        its = weights.get(key, {})
        made, new = forwards(each, its, streams[:n], fold(rng, i), lengths)
        streams = made + streams[n:]
        found.append(new)
    return streams, found


@backwards.register(ReversibleSerial)
def _undo_serial(layer, weights, found, streams, cts, rng, lengths):
    d_weights: Tree = {}
    for i, (key, each) in reversed(list(enumerate(layer.children))):
        n, its = each.n_out, weights.get(key, {})
        made, d, d_its = backwards(each, its, found[i], streams[:n], cts[:n], fold(rng, i), lengths)
        streams, cts = made + streams[n:], d + cts[n:]
        if key in weights:
            d_weights[key] = d_its
    return streams, cts, {key: d_weights[key] for key in weights}


@forwards.register(ReversibleRepeat)
def _repeat(layer, weights, streams, rng, lengths):
    """What blocks decide is in host memory too, but for the block at hand."""
    whole = None
    if isinstance(weights, Moving):
        whole = trees.merge(weights.trained[0], weights.frozen[0])

    def step(streams: Streams, xs: Any) -> Any:
        its, i = xs
        its = weights if layer.shared else its if whole is None else block(whole, layer.n, i)
        streams, found = forwards(layer.layer, its, streams, fold(rng, i), lengths)
        return streams, _sent(found)

    numbers = jnp.arange(layer.n, dtype=jnp.int32)
    scanned = weights if whole is None and not layer.shared else None
    return jax.lax.scan(step, streams, (scanned, numbers))


@backwards.register(ReversibleRepeat)
def _undo_repeat(layer, weights, found, streams, cts, rng, lengths):
    """From the last block to the first.

    The block is counted in the carry: XLA for GPUs has read slices of host memory forwards where a
    scan that is reversed goes backwards (openxla/xla#46231).
    """
    is_moving = isinstance(weights, Moving)

    def undo(its: Tree, i: Any, streams: Streams, cts: Streams) -> tuple[Any, Tree]:
        its_rng, decided = fold(rng, i), _block(found, i)
        *made, d = backwards(layer.layer, its, decided, streams, cts, its_rng, lengths)
        return tuple(made), d

    def step(carry: Any, its: Any) -> Any:
        streams, cts, total, i = carry
        if is_moving:
            total, (streams, cts) = moved(
                weights.update,
                layer.n,
                total,
                weights.frozen,
                i,
                lambda its: undo(its, i, streams, cts),
            )
            return (streams, cts, total, i - 1), None
        (streams, cts), d = undo(weights if layer.shared else its, i, streams, cts)
        if layer.shared:
            return (streams, cts, add_wanted(total, d), i - 1), None
        return (streams, cts, None, i - 1), d

    total: Any = weights.trained if is_moving else zero_cts(weights) if layer.shared else None
    carry = streams, cts, total, jnp.int32(layer.n - 1)
    scanned = None if layer.shared or is_moving else weights
    (streams, cts, total, _), d_weights = jax.lax.scan(step, carry, scanned, layer.n, reverse=True)
    return streams, cts, total if layer.shared or is_moving else d_weights


def _sent(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def _block(tree: Any, i: jax.Array) -> Any:
    """The i-th of arrays in host memory, on the device."""

    def one(x: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        return jax.device_put(part, jax.memory.Space.Device)

    return jax.tree.map(one, tree)
