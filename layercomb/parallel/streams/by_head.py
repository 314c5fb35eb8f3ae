"""Half residuals with attention to all positions: one head of it at a time.

The device holds queries, keys and values of one head for the whole sequence, what attention makes
of them, and in the backward pass the cotangents of these. Streams come and go in pieces::

    forward    project pieces of x; attend; add the head's term to pieces of acc
    backward   project pieces of x; attend; subtract the term from pieces of acc, and project the
               cotangents of acc back; attention's gradient; add its projections back to d_x
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.attention.heads import Head, HeadByHead, apart
from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.attention.projections import MergeHeads
from layercomb.layers.core.layer import Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import unwrapped
from layercomb.layers.reversible.cotangents import add_wanted, vjp, zero_cts
from layercomb.layers.reversible.layers import ReversibleHalfResidual
from layercomb.layers.reversible.one_pass import is_diagonal
from layercomb.layers.state.decisions import put_decisions, take_decisions
from layercomb.parallel.streams.pieces import (
    Piece,
    Streams,
    key_of,
    over_pieces,
)
from layercomb.transforms.casting import Cast
from layercomb.trees import Tree

READ = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True, eq=False)
class ByHead:
    """A half residual with one attention layer, computed a head at a time.

    Attributes:
      half: the layer (acc, x) → (acc + f(x), x), for which `why_not` finds nothing.
      length: L.
      size: of a piece.
    """

    half: ReversibleHalfResidual
    length: int
    size: int

    @property
    def at(self) -> int:
        """Where the attention is among the layers of f."""
        return next(i for i, x in enumerate(self.half.layers) if isinstance(x, MultiHead))

    @property
    def owner(self) -> Any:
        """The attention."""
        return self.half.layers[self.at]

    def forward(self, weights: Tree, streams: Streams, rng: Key) -> tuple[Streams, Any]:
        """The streams after the layer, and what it decided: of each head."""
        acc, x = streams
        before, own = self._divided(weights)
        heads = self._head_by_head(x, Mode.RECORD)
        by_heads = self._apart(own)
        each = heads.heads(by_heads, {}, fold(rng, self.at))

        def one(acc: Any, head: Head) -> Any:
            y, core = self._attended(heads, before, head, x, rng)[1:]
            merge = self._merge(heads, x, rng)

            def step(acc: Any, i: Any, piece: Piece) -> Any:
                first = i * self.size
                term = merge(head.weights, _positions(y, first, piece.size), i)
                return acc.added(term, first), None

            return over_pieces(step, acc, self.length, self.size)[0], take_decisions(core)[1]

        acc, found = jax.lax.scan(one, acc, each)
        return (acc, x), found

    def backward(
        self, weights: Tree, found: Any, streams: Streams, cts: Streams, rng: Key
    ) -> tuple[Streams, Streams, Tree]:
        """The streams before the layer, the cotangents of these, and those of weights."""
        (acc, x), (d_acc, d_x) = streams, cts
        before, own = self._divided(weights)
        heads = self._head_by_head(x, Mode.REPLAY)
        by_heads, pull_apart = jax.vjp(self._apart, own)
        each = heads.heads(by_heads, {}, fold(rng, self.at))
        each = each._replace(core=put_decisions({}, found))

        def one(carry: Any, head: Head) -> Any:
            acc, d_x, d_before = carry
            acc, d_projected, d_own = self._undo(heads, before, head, (acc, x, d_acc), rng)
            d_x, d_before, d = self._project_back(
                heads, before, head, d_projected, (x, d_x, d_before), rng
            )
            return (acc, d_x, d_before), jax.tree.map(jnp.add, d_own, d)

        (acc, d_x, d_before), d_apart = jax.lax.scan(one, (acc, d_x, zero_cts(before)), each)
        (d_own,) = pull_apart(d_apart)
        d_weights = {**d_before, self.half.keys[self.at]: d_own}
        return (acc, x), (d_acc, d_x), {key: d_weights[key] for key in weights}

    def _divided(self, weights: Tree) -> tuple[Tree, Tree]:
        """The weights of what is before the attention, and those of the attention."""
        key = self.half.keys[self.at]
        return {k: w for k, w in weights.items() if k != key}, weights[key]

    def _apart(self, own: Tree) -> Tree:
        """The attention's weights with a leading axis H, as they are stored."""
        parts = (each.layer if isinstance(each, Cast) else each for each in self.owner.sublayers)
        made = apart(self.owner.with_sublayers(tuple(parts)), own)
        if made is None:
            raise ValueError(
                f"offload='streams': a part of {type(self.owner).__name__} needs all heads at "
                'once: leave offload out, or give the part a rule of tl.by_head'
            )
        return made

    def _head_by_head(self, x: Any, mode: Mode) -> HeadByHead:
        like = jax.ShapeDtypeStruct((x.n_rows, self.length, x.width), jnp.float32)
        return HeadByHead(self.owner, (like,), mode, {})

    def _attended(
        self, heads: HeadByHead, before: Tree, head: Head, x: Any, rng: Key
    ) -> tuple[Tree, jax.Array, Tree]:
        """One head's queries, keys and values, its attention, and the new state of its core."""
        projected = self._projected(heads, before, head.weights, x, rng)
        y, core = heads.attend(head, head.weights, projected, heads.inputs)
        return projected, y, core

    def _projected(self, heads: HeadByHead, before: Tree, weights: Tree, x: Any, rng: Key) -> Tree:
        """One head's queries, keys and values of the whole sequence, made in pieces."""
        project = self._project(heads, rng)

        def made(first: Any, i: Any, size: int) -> Tree:
            return project(before, weights, x.fetched(first, size), i)

        shapes = jax.eval_shape(lambda: made(jnp.int32(0), jnp.int32(0), self.length))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def step(whole: Tree, i: Any, piece: Piece) -> Any:
            first = i * self.size
            return _update(whole, made(first, i, piece.size), first), None

        whole: Tree = over_pieces(step, start, self.length, self.size)[0]
        return whole

    def _project(self, heads: HeadByHead, rng: Key) -> Callable[..., Tree]:
        """(weights before, weights of a head, piece of x, its number) → its queries and others."""
        layers, keys = self.half.layers[: self.at], self.half.keys

        def project(before: Tree, weights: Tree, x: jax.Array, i: Any) -> Tree:
            key = key_of(rng, i, self.length, self.size)
            for n, layer in enumerate(layers):
                its = before.get(keys[n], {})
                (x,), new = layer.apply(its, {}, (x,), rng=fold(key, n), mode=heads.mode)
                if heads.mode is Mode.RECORD and take_decisions(new)[1]:
                    raise ValueError(
                        f"offload='streams': {type(layer).__name__} before "
                        f'{type(self.owner).__name__} chooses what it computes, and attention by '
                        'heads would ask it again: leave offload out'
                    )
            return {name: heads.project(name, weights, x) for name in self._read}

        return project

    @property
    def _read(self) -> list[str]:
        return [key for key in READ if key in self.owner.keys]

    def _merge(self, heads: HeadByHead, x: Any, rng: Key) -> Callable[..., jax.Array]:
        """(weights of a head, piece of what it attended to, its number) → its term of f(x)."""
        behind = list(enumerate(self.half.layers))[self.at + 1 :]

        def merge(weights: Tree, y: jax.Array, i: Any) -> jax.Array:
            like = jnp.zeros((y.shape[0], y.shape[2], x.width), jnp.float32)  # says the width
            made = heads.merge(weights, (y, like))
            key = key_of(rng, i, self.length, self.size)
            for n, layer in behind:
                (made,), _ = layer.apply({}, {}, (made,), rng=fold(key, n), mode=heads.mode)
            return made

        return merge

    def _undo(
        self, heads: HeadByHead, before: Tree, head: Head, streams: Streams, rng: Key
    ) -> tuple[Any, Tree, Tree]:
        """acc without a head's term, and the cotangents of what was projected and of weights."""
        acc, x, d_acc = streams
        projected = self._projected(heads, before, head.weights, x, rng)
        merge = self._merge(heads, x, rng)

        def attend(weights: Tree, projected: Tree) -> jax.Array:
            return heads.attend(head, weights, projected, heads.inputs)[0]

        y, pull = vjp(attend, head.weights, projected)

        def step(carry: Any, i: Any, piece: Piece) -> Any:
            acc, d_y, total = carry
            first = i * self.size
            some = _positions(y, first, piece.size)
            term, pull = vjp(lambda w, y: merge(w, y, i), head.weights, some)
            d, d_some = pull(d_acc.fetched(first, piece.size))
            acc = acc.added(-term, first)
            return (acc, _update(d_y, d_some, first), add_wanted(total, d)), None

        start = acc, jnp.zeros(y.shape, y.dtype), zero_cts(head.weights)
        (acc, d_y, total), _ = over_pieces(step, start, self.length, self.size)
        d, d_projected = pull(d_y)
        return acc, d_projected, jax.tree.map(jnp.add, total, d)

    def _project_back(
        self, heads: HeadByHead, before: Tree, head: Head, cts: Tree, carry: Any, rng: Key
    ) -> tuple[Any, Tree, Tree]:
        """d_x and the cotangents of weights with those added that a head's projections have."""
        x, d_x, d_before = carry
        project = self._project(heads, rng)

        def step(carry: Any, i: Any, piece: Piece) -> Any:
            d_x, *totals = carry
            first = i * self.size
            _, pull = vjp(
                lambda before, own, x: project(before, own, x, i),
                before,
                head.weights,
                x.fetched(first, piece.size),
            )
            *ds, d = pull(_positions(cts, first, piece.size))
            return (d_x.added(d, first), *map(add_wanted, totals, ds)), None

        start = d_x, d_before, zero_cts(head.weights)
        (d_x, d_before, d_own), _ = over_pieces(step, start, self.length, self.size)
        return d_x, d_before, d_own


def why_not(half: ReversibleHalfResidual) -> str | None:
    """Why a half residual cannot be computed a head at a time; None if it can.

    Args:
      half: the layer.
    """
    at = [i for i, layer in enumerate(half.layers) if isinstance(layer, MultiHead)]
    if len(at) != 1:
        other = next((x for x in half.layers if x.position_wise is not True), half.layers[0])
        return f'{type(other).__name__} needs all positions at once, and is no attention by heads'
    owner: Any = half.layers[at[0]]
    for layer in half.layers[: at[0]]:
        if layer.position_wise is not True or layer.n_in != 1 or layer.n_out != 1:
            return f'{type(layer).__name__} before {type(owner).__name__} needs all positions'
    for layer in half.layers[at[0] + 1 :]:
        if layer.position_wise is not True or not is_diagonal(layer):
            return f'{type(layer).__name__} behind {type(owner).__name__} needs the sum of heads'
    return _why_not_apart(owner)


def _why_not_apart(owner: Any) -> str | None:
    """Why attention cannot be computed a head at a time."""
    name = type(owner).__name__
    if owner.n_in != 1 or set(owner.reads.values()) != {0}:
        return f'{name} takes masks, or another sequence'
    parts: dict[str, Layer] = dict(zip(owner.keys, owner.sublayers, strict=True))
    if type(unwrapped(parts['output'])) is not MergeHeads:
        return f'{name} has another projection from heads than MergeHeads'
    for key in (*owner.reads, 'output'):
        if key in parts and parts[key].position_wise is not True:
            return f'the projection {type(parts[key]).__name__} of {name} mixes positions'
    return None


def _positions(tree: Any, first: Any, size: int) -> Any:
    """Positions of arrays (B, H, L, K)."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, 2), tree)


def _update(tree: Any, slices: Any, first: Any) -> Any:
    """Arrays (B, H, L, K) with other positions from one on."""
    return jax.tree.map(
        lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, first, 2), tree, slices
    )
