"""What attention layers share: projections around a core, and the gradient head by head.

A multi-head layer is a combinator of parts, each of which can be replaced: ``query``, ``key``,
``value`` (B, L, D) → (B, H, L, K), a ``core`` that attends, and ``output`` back to (B, L, D). Shape
letters: B batch, L length, D d_model, H heads, K head depth, M memory length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import tiles
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.attention.slices import add_at, by_piece, over_positions, positions
from layercomb.layers.core.checks import check_inputs, where
from layercomb.layers.core.combinator import Combinator, fold
from layercomb.layers.core.cotangents import add_cts, vjp, zero_cts, zeros_once
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.positionwise import of_sublayers
from layercomb.layers.core.printing import set_field
from layercomb.shapes import is_float
from layercomb.trees import Tree


class Head(NamedTuple):
    """What one head has of its own.

    Attributes:
      weights: of the parts, for this head.
      core: the state of its core, (B, 1, …).
      key: of its core, (1,); or None.
    """

    weights: Tree
    core: Tree
    key: jax.Array | None


class MultiHead(Combinator):
    """What multi-head layers share: parts that nobody chose follow the other fields.

    Attributes:
      reads: the number of the input that each projection reads in `route`.
    """

    def parts(self) -> dict[str, Layer]:
        """The query, key, value, core and output of the other fields' making."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field, part in self.parts().items():
            if getattr(self, field) is None:
                set_field(self, field, part)
        super().__post_init__()

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields, and in the parts made from these."""
        made = {f: None for f, part in self.parts().items() if getattr(self, f) == part}
        return super().replace(**{**made, **changes})

    position_wise = property(of_sublayers)
    # Without an annotation, so that it is no field.
    reads = {'query': 0, 'key': 0, 'value': 0}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """As the parts say; in ``RECORD``, inside a reversible stack, head by head where possible.

        Attention is a sum over heads, so each gives its part of the output, and queries, keys and
        values of all heads never exist at once. Parts that do not say `headwise`, narrow streams,
        whose sum would be rounded otherwise, and other platforms than the CPU, which a head would
        not keep busy, go whole.
        """
        if mode is not Mode.RECORD or not self._goes_by_head(inputs):
            return super().apply(weights, state, inputs, rng=rng, mode=mode)
        check_inputs(self, inputs)

        def one(total: jax.Array, head: Head) -> tuple[jax.Array, Tree]:
            projected = self._project(head.weights, inputs, mode)
            y, core = self._attend(head, head.weights, projected, inputs, mode)

            def add_piece(total: jax.Array, at: Any, size: int) -> jax.Array:
                pieces = positions((y, inputs[0]), at, size)
                return add_at(total, self._merge(head.weights, pieces, mode), at)

            return over_positions(add_piece, total, total.shape[1]), core

        x = inputs[0]
        start = zeros_once(x.shape, x.dtype, x)
        y, core = lax.scan(one, start, self._heads(self._apart(weights), state, rng))
        core = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), core)  # (B, H, …)
        return (y,), {**state, **({'core': core} if core else {})}

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """Head by head, where ``RECORD`` goes so: each gives its part of all gradients.

        Projections go some positions at a time, so that of arrays as wide as the model there are
        the output and the gradients of the inputs, and no others.
        """
        if not self._goes_by_head(inputs) or cts[0] is None:
            given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
            return super().apply_and_grad(weights, state, inputs, cts, **given)
        inputs, (ct,) = tuple(inputs), cts
        by_head, pull_apart = jax.vjp(self._apart, weights)

        def one(carry: Any, head: Head) -> tuple[Any, Tree]:
            def attend(weights: Tree, projected: Tree, inputs: Any) -> jax.Array:
                return self._attend(head, weights, projected, inputs, mode)[0]

            def merge(weights: Tree, values: Any) -> jax.Array:
                return self._merge(weights, values, mode)

            total, d_inputs = carry
            w = head.weights
            y, pull = vjp(attend, w, self._project(w, inputs, mode), inputs)
            d_y = zeros_once(y.shape, y.dtype, y)
            total, (d_y, d_x), d_merge = by_piece(
                merge, w, (y, inputs[0]), ct, total, (d_y, d_inputs[0])
            )
            d_attend, d_projected, d_others = pull(d_y)
            d_inputs = jax.tree.map(add_cts, (d_x, *d_inputs[1:]), d_others)
            d_inputs, d_project = self._project_grad(w, inputs, d_projected, d_inputs, mode)
            d_weights = jax.tree.map(lambda *ds: sum(ds[1:], ds[0]), d_merge, d_attend, d_project)
            return (total, d_inputs), d_weights

        x = inputs[0]
        start = jax.tree.map(
            lambda value: zeros_once(value.shape, value.dtype, x) if is_float(value) else None,
            (x, inputs),
        )
        (y, d_inputs), d_by_head = lax.scan(one, start, self._heads(by_head, state, rng))
        return (y,), d_inputs, pull_apart(d_by_head)[0]

    def _goes_by_head(self, inputs: Any) -> bool:
        apart = all(
            part.headwise and (key not in (*self.reads, 'output') or part.position_wise)
            for key, part in self._children
        )
        wide = all(x.dtype == jnp.float32 for x in inputs if is_float(x))
        return jax.default_backend() == 'cpu' and apart and wide

    def _apart(self, weights: Tree) -> Tree:
        """The weights with a leading axis of heads."""
        children: dict[str, Any] = dict(self._children)
        return {key: children[key].by_head(w) for key, w in weights.items()}

    def _heads(self, by_head: Tree, state: Tree, rng: jax.Array | None) -> Head:
        """What each head has of its own, with a leading axis (H)."""
        core = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], state.get('core', {}))
        key = fold(rng, self.keys.index('core'))
        if key is not None:
            n_heads = jax.tree.leaves(by_head)[0].shape[0]
            key = tiles.keys_of_heads(key, n_heads)[:, None]
        return Head(by_head, core, key)

    def _project(self, weights: Tree, inputs: Any, mode: Mode) -> Tree:
        """One head's queries, keys and values, (B, 1, L, K), by name."""
        return {
            key: self._part(key, weights, {}, (inputs[self.reads[key]],), None, mode)[0]
            for key, _ in self._children
            if key in self.reads
        }

    def _project_grad(
        self, weights: Tree, inputs: Any, cts: Tree, d_inputs: Any, mode: Mode
    ) -> tuple[Any, Tree]:
        """The cotangents of inputs with those of one head's projections added; of the weights."""
        d_inputs, d_weights = list(d_inputs), zero_cts(weights)
        for i in sorted({self.reads[key] for key in cts}):

            def project(weights: Tree, x: jax.Array, i: int = i) -> Tree:
                return {
                    key: self._part(key, weights, {}, (x,), None, mode)[0]
                    for key in cts
                    if self.reads[key] == i
                }

            its_cts = {key: ct for key, ct in cts.items() if self.reads[key] == i}
            _, d_inputs[i], d = by_piece(project, weights, inputs[i], its_cts, None, d_inputs[i])
            d_weights = jax.tree.map(jnp.add, d_weights, d)
        return tuple(d_inputs), d_weights

    def _merge(self, weights: Tree, values: Any, mode: Mode) -> jax.Array:
        """One head's part of the output, from what it attended to and the first input."""
        n_in = dict(self._children)['output'].n_in
        return self._part('output', weights, {}, values[:n_in], None, mode)[0]

    def _attend(
        self, head: Head, weights: Tree, projected: Tree, inputs: Any, mode: Mode
    ) -> tuple[jax.Array, Tree]:
        """What one head hands to the output, and the new state of its core, which alone draws."""
        new: Tree = {}

        def call(i: int, stack: Any) -> Any:
            nonlocal new
            key, part = self._children[i]
            if key in projected:
                if stack[0] is not inputs[self.reads[key]]:
                    raise ValueError(
                        f'{type(self).__name__}: route hands {key} another value than input '
                        f'{self.reads[key]}: say in `reads` which input each projection reads'
                    )
                return (projected[key],)
            if key == 'output':
                return stack[:1]
            values = tuple(stack[: part.n_in])
            if key != 'core':
                return self._part(key, weights, {}, values, None, mode)
            *outputs, new = self._part(key, weights, head.core, values, head.key, mode)
            return tuple(outputs)

        return self.route(call, inputs)[0], new

    def _part(self, key: str, weights: Tree, state: Tree, values: Any, rng: Any, mode: Mode) -> Any:
        """The outputs of a part; of the core with its state behind them."""
        part = dict(self._children)[key]
        with where(self, key, part, values):
            check_inputs(part, values)
            outputs, new = part.apply(weights.get(key, {}), state, values, rng=rng, mode=mode)
        return (*outputs, new) if key == 'core' else outputs


def heads(layer: Any, core: Layer) -> dict[str, Layer]:
    """The usual parts around a core: three projections to heads, and one from them."""
    split = SplitHeads(layer.n_heads, layer.d_head)
    return {'query': split, 'key': split, 'value': split, 'core': core, 'output': MergeHeads()}


def attend(layer: Any, call: Any, x: Any, memory: Any, *mask: Any) -> tuple[Any, ...]:
    """The route that all multi-head layers share, from `x` to what it reads of `memory`."""
    at = layer.keys.index
    (q,) = call(at('query'), (x,))
    (k,) = call(at('key'), (memory,))
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f'{type(layer).__name__}: queries of a sequence {x.shape[-1]} wide and keys of one '
            f'{memory.shape[-1]} wide have {q.shape[-1]} and {k.shape[-1]} features a '
            'head: say d_head='
        )
    (v,) = call(at('value'), (memory,))
    if layer.rotary is not None:
        q, k = call(at('rotary'), (q, k))
    (y,) = call(at('core'), (q, k, v, *mask))
    return call(at('output'), (y, x))


def dropout_arguments(rate: float, rng: jax.Array | None, mode: Mode) -> dict[str, Any]:
    """What an attention function needs to drop probabilities: nothing outside training."""
    if not rate or not mode.is_training:
        return {}
    if rng is None:
        raise ValueError(
            f'attention with dropout={rate} draws in training: pass rng=jax.random.key(…) to apply'
        )
    return {'dropout_rate': rate, 'rng': rng}
