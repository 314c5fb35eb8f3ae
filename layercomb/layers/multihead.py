"""What attention layers share: projections to heads and back, and the gradient head by head.

A multi-head layer is a combinator of parts, each of which can be replaced: ``query``, ``key``,
``value`` (B, L, D) → (B, H, L, K), a ``core`` that attends, and ``output`` back to (B, L, D). Shape
letters: B batch, L length, D d_model, H heads, K head depth, M memory length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers import tiles
from layercomb.layers.base import Layer, Mode, Tree, _set, check_inputs, fold, where
from layercomb.layers.combinators import Combinator
from layercomb.layers.cotangents import add_cts, vjp, zero_cts, zeros_once
from layercomb.layers.fields import Size, nearest_divisor
from layercomb.layers.initializers import Initializer, glorot_uniform
from layercomb.layers.narrow import Narrow
from layercomb.shapes import check_float, is_float


class SplitHeads(Layer):
    """A projection to heads: y[b, h, l] = x[b, l] W[:, h] + b[h], (B, L, D) → (B, H, L, K).

    Weights: ``kernel`` (D, H, K), ``bias`` (H, K).

    Attributes:
      n_heads: H.
      d_head: K; None takes D / H, which must be whole.
      use_bias: whether b is there.
    """

    n_heads: Size
    d_head: Size | None = None
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    headwise = True
    matrices = {'kernel': 'ioo'}

    def by_head(self, weights: Tree) -> Tree:
        """The weights of each head alone, on a leading axis H."""
        kernel = jnp.moveaxis(weights['kernel'], 1, 0)[:, :, None]  # (H, D, 1, K)
        return {'kernel': kernel, **({'bias': weights['bias'][:, None]} if self.use_bias else {})}

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('SplitHeads', x)
        d = x.shape[-1]
        if self.d_head is None and d % self.n_heads:
            nearest = nearest_divisor(d, self.n_heads)
            raise ValueError(
                f'{self.n_heads} heads do not divide the width {d}: use {nearest}, or say d_head='
            )
        k = self.d_head or d // self.n_heads
        kernel = self.kernel_init(rng, (d, self.n_heads * k)).reshape(d, self.n_heads, k)
        bias = {'bias': jnp.zeros((self.n_heads, k))} if self.use_bias else {}
        return {'kernel': kernel, **bias}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        (x,) = inputs
        kernel = weights['kernel']
        if isinstance(kernel, Narrow):
            y = jnp.moveaxis(kernel.product(x), -2, 1)  # (B, L, H, K) → (B, H, L, K)
        else:
            y = split_heads(x, kernel)
        return (y + weights['bias'][:, None] if self.use_bias else y,), state


class MergeHeads(Layer):
    """A projection from heads: y[b, l] = Σ_h x[b, h, l] W[h] + b, (B, H, L, K) → (B, L, D).

    Its second input, (B, L, D), only says how wide to be, so that heads of any depth fit any model.

    Weights: ``kernel`` (H, K, D), ``bias`` (D,).
    """

    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    n_in = 2
    headwise = True
    matrices = {'kernel': 'iio'}

    def by_head(self, weights: Tree) -> Tree:
        """The weights of each head alone, on a leading axis H; the first one has the bias."""
        kernel = weights['kernel'][:, None]  # (H, 1, K, D)
        if not self.use_bias:
            return {'kernel': kernel}
        bias = weights['bias']
        return {'kernel': kernel, 'bias': jnp.zeros((len(kernel), *bias.shape)).at[0].set(bias)}

    def init(self, signature, rng, mode=Mode.TRAIN):
        x, like = signature
        _, h, _, k = x.shape
        d = like.shape[-1]
        kernel = self.kernel_init(rng, (h * k, d)).reshape(h, k, d)
        return {'kernel': kernel, **({'bias': jnp.zeros(d)} if self.use_bias else {})}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        x, _ = inputs
        kernel = weights['kernel']
        if isinstance(kernel, Narrow):
            y = kernel.product(jnp.moveaxis(x, 1, -2))  # (B, H, L, K) → (B, L, H, K) → (B, L, D)
        else:
            y = merge_heads(x, kernel)
        return (y + weights['bias'] if self.use_bias else y,), state


# Positions whose products are summed into the gradient of a kernel at a time.
POSITIONS_TOGETHER = 4096


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


@jax.custom_vjp
def split_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, L, D), (D, H, K) → (B, H, L, K), in the dtype of x; has no forward-mode derivative."""
    return _dot('dhk,bld->bhlk', kernel, x).astype(x.dtype)


@jax.custom_vjp
def merge_heads(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(B, H, L, K), (H, K, D) → (B, L, D), in the dtype of x; has no forward-mode derivative."""
    return _dot('bhlk,hkd->bld', x, kernel).astype(x.dtype)


def _split_back(kept: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    d_x = _dot('bhlk,dhk->bld', ct, kernel).astype(x.dtype)
    return d_x, kernel_gradient(x, ct).astype(kernel.dtype)


def _merge_back(kept: Any, ct: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    d_x = _dot('hkd,bld->bhlk', kernel, ct).astype(x.dtype)
    return d_x, jnp.moveaxis(kernel_gradient(ct, x), 0, -1).astype(kernel.dtype)


split_heads.defvjp(lambda x, kernel: (split_heads(x, kernel), (x, kernel)), _split_back)
merge_heads.defvjp(lambda x, kernel: (merge_heads(x, kernel), (x, kernel)), _merge_back)


def kernel_gradient(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ_bl x[b, l] ⊗ y[b, :, l], (B, L, D), (B, H, L, K) → (D, H, K) float32.

    Of long sequences a piece at a time: the product wants the sum's axis last, and a copy of x laid
    out so would be as large as x.
    """

    def part(total: jax.Array, at: Any, size: int) -> jax.Array:
        return total + _dot('bld,bhlk->dhk', *positions((x, y), at, size))

    start = jnp.zeros((x.shape[2], y.shape[1], y.shape[3]), jnp.float32)
    return over_positions(part, start, x.shape[1])


def over_positions(step: Callable[[Any, Any, int], Any], carry: Any, length: int) -> Any:
    """Carries through ``step(carry, first, size)`` the positions of a sequence, some at a time."""
    n, rest = divmod(length, POSITIONS_TOGETHER)
    carry = tiles.loop(
        0, n, lambda i, carry: step(carry, i * POSITIONS_TOGETHER, POSITIONS_TOGETHER), carry
    )
    return step(carry, n * POSITIONS_TOGETHER, rest) if rest else carry


def positions(tree: Any, first: Any, size: int) -> Any:
    """Some positions of every (…, L, features)."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, x.ndim - 2), tree)


def add_at(tree: Any, pieces: Any, first: Any) -> Any:
    """A tree of (…, L, features) with pieces added to some positions, in place where it can be."""

    def add(x: jax.Array, piece: jax.Array) -> jax.Array:
        axis = x.ndim - 2
        piece = lax.dynamic_slice_in_dim(x, first, piece.shape[axis], axis) + piece
        return lax.dynamic_update_slice_in_dim(x, piece, first, axis)

    return jax.tree.map(add, tree, pieces)


def by_piece(
    f: Callable[[Tree, Any], Any], weights: Tree, values: Any, cts: Any, sums: Any, d_values: Any
) -> tuple[Any, Any, Tree]:
    """Adds up outputs and gradients of a position-wise function, some positions at a time.

    Args:
      f: from weights and a tree of (…, L, features) to another such tree.
      weights: its weights.
      values: its argument.
      cts: of what it gives.
      sums: what its outputs are added to, or None, where they are not wanted.
      d_values: what the cotangents of `values` are added to.

    Returns:
      The two sums, and the cotangents of the weights.
    """

    def step(carry: Any, first: Any, size: int) -> Any:
        sums, d_values, d_weights = carry
        made, pull = vjp(f, weights, positions(values, first, size))
        d, d_pieces = pull(positions(cts, first, size))
        sums = None if sums is None else add_at(sums, made, first)
        return sums, add_at(d_values, d_pieces, first), jax.tree.map(jnp.add, d_weights, d)

    length = jax.tree.leaves(values)[0].shape[-2]
    result: tuple[Any, Any, Tree] = over_positions(
        step, (sums, d_values, zero_cts(weights)), length
    )
    return result


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
    """What multi-head layers share: parts that nobody chose follow the other fields."""

    def parts(self) -> dict[str, Layer]:
        """The query, key, value, core and output of the other fields' making."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for field, part in self.parts().items():
            if getattr(self, field) is None:
                _set(self, field, part)
        super().__post_init__()

    def replace(self, **changes: Any) -> Any:
        """The same layer with other values in some fields, and in the parts made from these."""
        made = {f: None for f, part in self.parts().items() if getattr(self, f) == part}
        return super().replace(**{**made, **changes})

    # Which input each projection reads; without an annotation, so that it is no field.
    reads = {'query': 0, 'key': 0, 'value': 0}

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        """As the parts say; in ``RECORD``, inside a reversible stack, head by head where possible.

        Attention is a sum over heads, so each gives its part of the output, and queries, keys and
        values of all heads never exist at once. Parts that do not say `headwise`, narrow streams,
        whose sum would be rounded otherwise, and other platforms than the CPU, which a head would
        not keep busy, go whole.
        """
        if mode is not Mode.RECORD or not self._goes_by_head(weights, inputs):
            return super().apply(weights, state, inputs, rng=rng, mode=mode)
        check_inputs(self, inputs)

        def one(total: jax.Array, head: Head) -> tuple[jax.Array, Tree]:
            projected = self._project(head.weights, self._read(inputs), mode)
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
        if not self._goes_by_head(weights, inputs) or cts[0] is None:
            given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
            return super().apply_and_grad(weights, state, inputs, cts, **given)
        inputs, (ct,) = tuple(inputs), cts
        by_head, pull_apart = jax.vjp(self._apart, weights)

        def one(carry: Any, head: Head) -> tuple[Any, Tree]:
            def attend(weights: Tree, projected: Tree, inputs: Any) -> jax.Array:
                return self._attend(head, weights, projected, inputs, mode)[0]

            def merge(weights: Tree, values: Any) -> jax.Array:
                return self._merge(weights, values, mode)

            def project(weights: Tree, read: Tree) -> Tree:
                return self._project(weights, read, mode)

            total, d_inputs = carry
            w, read = head.weights, self._read(inputs)
            y, pull = vjp(attend, w, project(w, read), inputs)
            d_y = zeros_once(y.shape, y.dtype, y)
            total, (d_y, d_x), d_merge = by_piece(
                merge, w, (y, inputs[0]), ct, total, (d_y, d_inputs[0])
            )
            d_attend, d_projected, d_others = pull(d_y)
            d_inputs = jax.tree.map(add_cts, (d_x, *d_inputs[1:]), d_others)
            _, d_read, d_project = by_piece(
                project, w, read, d_projected, None, self._read(d_inputs)
            )
            d_inputs = tuple(d_read.get(str(i), d) for i, d in enumerate(d_inputs))
            d_weights = jax.tree.map(lambda *ds: sum(ds[1:], ds[0]), d_merge, d_attend, d_project)
            return (total, d_inputs), d_weights

        x = inputs[0]
        start = jax.tree.map(
            lambda value: zeros_once(value.shape, value.dtype, x) if is_float(value) else None,
            (x, inputs),
        )
        (y, d_inputs), d_by_head = lax.scan(one, start, self._heads(by_head, state, rng))
        return (y,), d_inputs, pull_apart(d_by_head)[0]

    def _goes_by_head(self, weights: Tree, inputs: Any) -> bool:
        apart = all(
            part.headwise and (key not in (*self.reads, 'output') or not part.mixes_positions)
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

    def _read(self, inputs: Any) -> Tree:
        """The inputs that projections read, each once, by its number."""
        used = {self.reads[key] for key, _ in self._children if key in self.reads}
        return {str(i): inputs[i] for i in sorted(used)}

    def _project(self, weights: Tree, read: Tree, mode: Mode) -> Tree:
        """One head's queries, keys and values, (B, 1, L, K), of what is read."""
        return {
            key: self._part(key, weights, {}, (read[str(self.reads[key])],), None, mode)[0]
            for key, _ in self._children
            if key in self.reads
        }

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
