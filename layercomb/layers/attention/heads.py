"""Attention head by head: `HeadByHead`, the outputs and gradients of a multi-head layer.

Attention is a sum over heads. Each head adds its term to the output and to all gradients, so that
queries, keys and values of all heads never exist at once. Projections are computed a slice of
positions at a time. The only arrays as wide as the model are the output and the gradients of the
inputs. Keys and values that several heads share are projected again for each of them.

Shape letters: B batch, L length, D d_model, H heads, K head depth.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.attention.by_head import by_head
from layercomb.layers.attention.slices import add_at, by_slice, over_positions, positions
from layercomb.layers.core.checks import check_inputs, where
from layercomb.layers.core.layer import Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.sequence import sequence_parts
from layercomb.layers.reversible.cotangents import add_cts, vjp, zero_cts, zeros_once
from layercomb.layers.state.counted import put_counted, take_counted
from layercomb.shapes import is_float
from layercomb.trees import Tree


class Head(NamedTuple):
    """The arrays that belong to one head.

    Attributes:
      weights: of the parts, for this head.
      core: the state of its core, (B, 1, …).
      key: of its core, (1,); or None.
    """

    weights: Tree
    core: Tree
    key: jax.Array | None


def goes_by_head(layer: Any, weights: Tree, inputs: Any) -> bool:
    """Whether a multi-head layer is computed head by head.

    It is possible if each part has a rule in `by_head` and no projection mixes positions. It is
    done on a CPU only, since one head does not keep another platform busy, and only with float32
    streams, since the sum over heads would be rounded otherwise.

    Args:
      layer: a `MultiHead` layer.
      weights: its weights.
      inputs: its inputs, (B, L, D) and others.
    """
    parts = zip(layer.keys, layer.sublayers, strict=True)
    if any(p.position_wise is not True for key, p in parts if key in (*layer.reads, 'output')):
        return False
    if sequence_parts() > 1:  # each device has heads of its own
        return False
    wide = all(x.dtype == jnp.float32 for x in inputs if is_float(x))
    if jax.default_backend() != 'cpu' or not wide:
        return False
    return jax.eval_shape(lambda weights: apart(layer, weights), weights) is not None


def apart(layer: Any, weights: Tree) -> Tree | None:
    """The weights with a leading axis H; None if a part needs all heads at once.

    What several heads share is repeated for each, so that its gradient is the sum of theirs.

    Args:
      layer: a `MultiHead` layer.
      weights: its weights.
    """
    made = {}
    for key, part in zip(layer.keys, layer.sublayers, strict=True):
        with where(layer, key, part, ()):
            made[key] = by_head(part, weights.get(key, {}))
        if made[key] is None:
            return None
    made = {key: made[key] for key in weights}
    n_heads = max((len(x) for x in jax.tree.leaves(made)), default=1)
    if any(n_heads % max(len(x), 1) for x in jax.tree.leaves(made)):
        return None

    def for_each(x: jax.Array) -> jax.Array:
        return x if len(x) == n_heads else jnp.repeat(x, n_heads // len(x), 0)

    return jax.tree.map(for_each, made)


@dataclasses.dataclass(frozen=True, eq=False)
class HeadByHead:
    """A multi-head layer, applied to its inputs one head after the other.

    Attributes:
      owner: the `MultiHead` layer, for which `goes_by_head` holds.
      inputs: its inputs, (B, L, D) and others.
      mode: the mode of `apply`.
      told: what its parts are told for this call, as of `take_counted`, the same for all heads.
    """

    owner: Any
    inputs: tuple[Any, ...]
    mode: Mode
    told: Tree

    def outputs(self, weights: Tree, state: Tree, rng: jax.Array | None) -> Any:
        """The result of `apply`: a tuple of the output (B, L, D), and the new state.

        Args:
          weights, state: of the whole layer.
          rng: a typed key; or None.
        """
        x = self.inputs[0]

        def one(total: jax.Array, head: Head) -> tuple[jax.Array, Tree]:
            projected = self._project(head.weights)
            y, core = self.attend(head, head.weights, projected, self.inputs)

            def add_slice(total: jax.Array, at: Any, size: int) -> jax.Array:
                values = positions((y, x), at, size)
                return add_at(total, self.merge(head.weights, values), at)

            return over_positions(add_slice, total, total.shape[1]), core

        start = zeros_once(x.shape, x.dtype, x)
        y, core = lax.scan(one, start, self.heads(apart(self.owner, weights), state, rng))
        core = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), core)  # (B, H, …)
        return (y,), {**state, **({'core': core} if core else {})}

    def gradients(self, weights: Tree, state: Tree, ct: jax.Array, rng: jax.Array | None) -> Any:
        """The result of `one_pass`: outputs, cotangents of the inputs and of the weights.

        Args:
          weights, state: of the whole layer.
          ct: (B, L, D), cotangent of the output.
          rng: a typed key; or None.
        """
        x = self.inputs[0]
        by_heads, pull_apart = jax.vjp(lambda weights: apart(self.owner, weights), weights)
        start = jax.tree.map(
            lambda value: zeros_once(value.shape, value.dtype, x) if is_float(value) else None,
            (x, self.inputs),
        )

        def one(carry: Any, head: Head) -> tuple[Any, Tree]:
            return self._add_gradients(carry, head, ct)

        (y, d_inputs), d_apart = lax.scan(one, start, self.heads(by_heads, state, rng))
        return (y,), d_inputs, pull_apart(d_apart)[0]

    def _add_gradients(self, carry: Any, head: Head, ct: jax.Array) -> tuple[Any, Tree]:
        """Adds one head's output and cotangents of inputs; also returns those of its weights."""
        total, d_inputs = carry
        w, inputs = head.weights, self.inputs

        def attend(weights: Tree, projected: Tree, inputs: Any) -> jax.Array:
            return self.attend(head, weights, projected, inputs)[0]

        y, pull = vjp(attend, w, self._project(w), inputs)
        d_y = zeros_once(y.shape, y.dtype, y)
        total, (d_y, d_x), d_merge = by_slice(
            self.merge, w, (y, inputs[0]), ct, total, (d_y, d_inputs[0])
        )
        d_attend, d_projected, d_others = pull(d_y)
        d_inputs = jax.tree.map(add_cts, (d_x, *d_inputs[1:]), d_others)
        d_inputs, d_project = self._project_grad(w, d_projected, d_inputs)
        d_weights = jax.tree.map(lambda *ds: sum(ds[1:], ds[0]), d_merge, d_attend, d_project)
        return (total, d_inputs), d_weights

    def heads(self, by_heads: Any, state: Tree, rng: jax.Array | None) -> Head:
        """The arrays of each head, with a leading axis H.

        Args:
          by_heads: the weights, as of `apart`.
          state: of the whole layer.
          rng: a typed key; or None.
        """
        state, _ = take_counted(state)
        core = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], state.get('core', {}))
        key = fold(rng, self.owner.keys.index('core'))
        if key is not None:
            n_heads = jax.tree.leaves(by_heads)[0].shape[0]
            key = tiles.keys_of_heads(key, n_heads)[:, None]
        return Head(by_heads, core, key)

    def _project(self, weights: Tree) -> Tree:
        """One head's queries, keys and values, (B, 1, L, K), by name."""
        reads = self.owner.reads
        keys = [key for key in self.owner.keys if key in reads]
        return {key: self.project(key, weights, self.inputs[reads[key]]) for key in keys}

    def project(self, key: str, weights: Tree, x: jax.Array) -> jax.Array:
        """One head's queries, keys or values of some positions, (B, 1, L, K).

        Args:
          key: which.
          weights: of the parts, for this head.
          x: (B, L, D), what this projection reads.
        """
        y: jax.Array = self._part(key, weights, {}, (x,), None)[0]
        return y

    def _project_grad(self, weights: Tree, cts: Tree, d_inputs: Any) -> tuple[Any, Tree]:
        """Adds the cotangents of one head's projections; also returns those of its weights."""
        d_inputs, d_weights, reads = list(d_inputs), zero_cts(weights), self.owner.reads
        for i in sorted({reads[key] for key in cts}):
            its_cts = {key: ct for key, ct in cts.items() if reads[key] == i}

            def project(weights: Tree, x: jax.Array, keys: Any = tuple(its_cts)) -> Tree:
                return {key: self.project(key, weights, x) for key in keys}

            x = self.inputs[i]
            _, d_inputs[i], d = by_slice(project, weights, x, its_cts, None, d_inputs[i])
            d_weights = jax.tree.map(jnp.add, d_weights, d)
        return tuple(d_inputs), d_weights

    def merge(self, weights: Tree, values: Any) -> jax.Array:
        """One head's term of the output, (B, L, D).

        Args:
          weights: of the parts, for this head.
          values: what it attended to, (B, 1, L, K), and the first input, (B, L, D).
        """
        return self._part('output', weights, {}, values[: self._sublayer('output').n_in], None)[0]

    def attend(
        self, head: Head, weights: Tree, projected: Tree, inputs: Any
    ) -> tuple[jax.Array, Tree]:
        """One head's attention output (B, 1, L, K), and the new state of its core.

        Only the core gets a random key.

        Args:
          head: its arrays.
          weights: of the parts, for this head.
          projected: its queries, keys and values, by name.
          inputs: those of the layer; of what only projections read, shapes are enough.
        """
        owner = self.owner
        new: Tree = {}

        def call(i: int, stack: Any) -> Any:
            nonlocal new
            key, part = owner.keys[i], owner.sublayers[i]
            if key in projected:
                if stack[0] is not inputs[owner.reads[key]]:
                    raise ValueError(
                        f'{type(owner).__name__}: route hands {key} another value than input '
                        f'{owner.reads[key]}: say in `reads` which input each projection reads'
                    )
                return (projected[key],)
            if key == 'output':
                return stack[:1]
            values = tuple(stack[: part.n_in])
            if key != 'core':
                return self._part(key, weights, {}, values, None)
            *outputs, new = self._part(key, weights, head.core, values, head.key)
            return tuple(outputs)

        return owner.route(call, inputs)[0], new

    def _part(self, key: str, weights: Tree, state: Tree, values: Any, rng: Any) -> Any:
        """The outputs of a part; the core returns its new state as the last value."""
        part = self._sublayer(key)
        with where(self.owner, key, part, values):
            check_inputs(part, values)
            state = put_counted(state, self.told.get(key, {}))
            outputs, new = part.apply(weights.get(key, {}), state, values, rng=rng, mode=self.mode)
        return (*outputs, take_counted(new)[0]) if key == 'core' else outputs

    def _sublayer(self, key: str) -> Layer:
        layer: Layer = self.owner.sublayers[self.owner.keys.index(key)]
        return layer
