"""`Chunk`: outputs and gradients of one slice after the other, each computed once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.combinators.chunk import Chunk, state_parts
from layercomb.layers.combinators.shares import by_share, how_many, passes_on, shares
from layercomb.layers.core.layer import Arrays, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import Cotangents, add_wanted, zero_cts, zeros_once
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.layers.state.counted import put_counted
from layercomb.layers.state.decisions import put_decisions
from layercomb.trees import Tree


@one_pass.register(Chunk)
def _chunk(layer, weights, state, inputs, cts, **given):
    """Slice by slice, unless a slice needs the new state of the one before."""
    length = layer.length_of(inputs)
    if length <= layer.slice_len:
        return one_pass(layer.layer, weights, state, inputs, cts, **given)
    found, plain, counted = state_parts(state, inputs)
    if passes_on(plain):
        return one_pass.default(layer, weights, state, inputs, cts, **given)
    each = tuple(inputs), tuple(cts), counted
    slices = _Slices(layer, weights, plain, each, length, how_many(counted), **given)
    return slices.run(found.get('pieces', {}), found.get('rest', {}))


@dataclasses.dataclass(frozen=True, eq=False)
class _Slices:
    """One pass through the slices of a `Chunk`.

    Attributes:
      owner: the `Chunk`.
      weights, state, rng, mode, state_cts: as of `one_pass`, of the whole.
      each: what is cut along axis 1: inputs, cotangents, and which positions count.
      length: of the whole.
      n_counted: how many positions count in the whole.
    """

    owner: Chunk
    weights: Tree
    state: Tree
    each: tuple[Arrays, Cotangents, Tree]
    length: int
    n_counted: Tree
    rng: jax.Array | None
    mode: Mode
    state_cts: Tree | None

    def run(self, decisions: Tree, of_rest: Tree) -> tuple[Arrays, Cotangents, Tree]:
        """Outputs, cotangents of inputs and weights, given the decisions taken in the slices.

        Slices are cut where they lie and put where they belong, so that no copy in slices exists.
        """
        slice_len = self.owner.slice_len
        n, rest = divmod(self.length, slice_len)

        def step(carry: Any, xs: Any) -> tuple[Any, None]:
            (total, whole), (at, its_decisions) = carry, xs
            total, made = self._one(total, at, slice_len, its_decisions)
            return (total, self._put(whole, made, at)), None

        total = zero_cts(self.weights)
        first = jax.tree.map(lambda x: x[0], decisions)
        _, made = jax.eval_shape(lambda: self._one(total, jnp.int32(0), slice_len, first))
        known = next((ct for ct in self.each[1] if ct is not None), None)
        whole = jax.tree.map(
            lambda x: zeros_once((x.shape[0], self.length, *x.shape[2:]), x.dtype, known), made
        )
        numbers = jnp.arange(n, dtype=jnp.int32)
        (total, whole), _ = jax.lax.scan(step, (total, whole), (numbers, decisions))
        if rest:
            total, made = self._one(total, jnp.int32(n), rest, of_rest)
            whole = self._put(whole, made, jnp.int32(n))
        outputs, d_inputs = whole
        return outputs, d_inputs, total

    def _one(self, total: Tree, at: Any, size: int, decisions: Tree) -> tuple[Tree, Any]:
        """The weights' cotangents with those of a slice added; its outputs and d_inputs."""
        values, its_cts, its_counted = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, at * self.owner.slice_len, size, 1),
            self.each,
        )
        by_layer = shares(its_counted, self.n_counted)
        outputs, d_values, d = one_pass(
            self.owner.layer,
            self.weights,
            put_counted(put_decisions(self.state, decisions), its_counted),
            values,
            its_cts,
            rng=fold(self.rng, at),
            mode=self.mode,
            state_cts=by_share(self.state_cts, size / self.length, by_layer),
        )
        self.owner.check_slice(outputs, size)
        return add_wanted(total, d), (tuple(outputs), tuple(d_values))

    def _put(self, whole: Any, made: Any, at: Any) -> Any:
        """A tree of (B, L, …) with a slice written into each."""

        def update(x: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, part, at * self.owner.slice_len, 1)

        return jax.tree.map(update, whole, made)
