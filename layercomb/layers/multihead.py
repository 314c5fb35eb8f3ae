"""What attention layers share: projections to heads and back, and the gradient head by head.

A multi-head layer is a combinator of parts, each of which can be replaced: ``query``, ``key``,
``value`` (B, L, D) → (B, H, L, K), a ``core`` that attends, and ``output`` back to (B, L, D). Shape
letters: B batch, L length, D d_model, H heads, K head depth, M memory length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers import tiles
from layercomb.layers.base import Layer, Mode, Tree, _set, check_inputs, fold, where
from layercomb.layers.combinators import Combinator
from layercomb.layers.cotangents import add_cts, vjp, zeros_once
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
    length, c = x.shape[1], POSITIONS_TOGETHER
    if length <= c:
        return _dot('bld,bhlk->dhk', x, y)

    def part(at: Any, size: int) -> jax.Array:
        piece = lax.dynamic_slice_in_dim(x, at, size, 1), lax.dynamic_slice_in_dim(y, at, size, 2)
        return _dot('bld,bhlk->dhk', *piece)

    start = jnp.zeros((x.shape[2], y.shape[1], y.shape[3]), jnp.float32)
    n, rest = divmod(length, c)
    total = lax.fori_loop(0, n, lambda i, total: total + part(i * c, c), start)
    return total + part(n * c, rest) if rest else total


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
            (y,), core = self._apply_head(head, head.weights, inputs, mode)
            return total + y, core

        x = inputs[0]
        start = zeros_once(x.shape, x.dtype, x)
        y, core = lax.scan(one, start, self._heads(self._apart(weights), state, rng))
        core = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), core)  # (B, H, …)
        return (y,), {**state, **({'core': core} if core else {})}

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """Head by head, where ``RECORD`` goes so: each gives its part of all gradients."""
        if not self._goes_by_head(weights, inputs):
            given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
            return super().apply_and_grad(weights, state, inputs, cts, **given)
        by_head, pull_apart = jax.vjp(self._apart, weights)

        def one(total: Any, head: Head) -> tuple[Any, Tree]:
            def attend(weights: Tree, inputs: Any) -> Any:
                return self._apply_head(head, weights, inputs, mode)[0]

            (y,), pull = vjp(attend, head.weights, tuple(inputs))
            d_weights, d_inputs = pull(tuple(cts))
            return (total[0] + y, jax.tree.map(add_cts, total[1], d_inputs)), d_weights

        x = inputs[0]
        start = jax.tree.map(
            lambda value: zeros_once(value.shape, value.dtype, x) if is_float(value) else None,
            (x, tuple(inputs)),
        )
        (y, d_inputs), d_by_head = lax.scan(one, start, self._heads(by_head, state, rng))
        return (y,), d_inputs, pull_apart(d_by_head)[0]

    def _goes_by_head(self, weights: Tree, inputs: Any) -> bool:
        apart = all(part.headwise for _, part in self._children)
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

    def _apply_head(
        self, head: Head, weights: Tree, inputs: Any, mode: Mode
    ) -> tuple[tuple[jax.Array, ...], Tree]:
        """One head's part of the output, and the new state of its core, which alone draws."""
        new: dict[str, Tree] = {}

        def call(i: int, stack: Any) -> Any:
            name, part = self._children[i]
            state, key = (head.core, head.key) if name == 'core' else ({}, None)
            values = tuple(stack[: part.n_in])
            with where(self, name, part, values):
                check_inputs(part, values)
                outputs, new[name] = part.apply(
                    weights.get(name, {}), state, values, rng=key, mode=mode
                )
            return outputs

        return self.route(call, tuple(inputs)), new['core']


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
