"""What attention layers share: projections to heads and back, and the gradient head by head.

A multi-head layer is a combinator of parts, each of which can be replaced: ``query``, ``key``,
``value`` (B, L, D) → (B, H, L, K), a ``core`` that attends, and ``output`` back to (B, L, D). Shape
letters: B batch, L length, D d_model, H heads, K head depth, M memory length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers import tiles
from layercomb.layers.base import Layer, Mode, Tree, _set, fold
from layercomb.layers.combinators import Combinator
from layercomb.layers.cotangents import add_cts, vjp, zero_cts
from layercomb.layers.fields import Size
from layercomb.layers.initializers import Initializer, glorot_uniform
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

    def by_head(self, weights: Tree) -> Tree:
        """The weights of each head alone, on a leading axis H."""
        kernel = jnp.moveaxis(weights['kernel'], 1, 0)[:, :, None]  # (H, D, 1, K)
        return {'kernel': kernel, **({'bias': weights['bias'][:, None]} if self.use_bias else {})}

    def init(self, signature, rng, mode=Mode.TRAIN):
        (x,) = signature
        check_float('SplitHeads', x)
        d = x.shape[-1]
        if self.d_head is None and d % self.n_heads:
            fitting = [h for h in range(1, d + 1) if d % h == 0]
            nearest = min(fitting, key=lambda h: abs(h - self.n_heads))
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
        y = jnp.einsum('bld,dhk->bhlk', x, kernel, preferred_element_type=jnp.float32)
        y = y.astype(x.dtype)  # (B, H, L, K)
        return (y + weights['bias'][:, None] if self.use_bias else y,), state


class MergeHeads(Layer):
    """A projection from heads: y[b, l] = Σ_h x[b, h, l] W[h] + b, (B, H, L, K) → (B, L, D).

    Its second input, (B, L, D), only says how wide to be, so that heads of any depth fit any model.

    Weights: ``kernel`` (H, K, D), ``bias`` (D,).
    """

    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()

    n_in = 2

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
        y = jnp.einsum('bhlk,hkd->bld', x, kernel, preferred_element_type=jnp.float32)
        y = y.astype(x.dtype)
        return (y + weights['bias'] if self.use_bias else y,), state


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

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """On the CPU head by head, so that queries, keys and values of all never exist at once.

        Attention is a sum over heads, so each gives its part of the output and of the gradients.
        Parts that cannot be taken apart (no ``by_head``), narrow streams, whose sum would be
        rounded otherwise, and other platforms, which a head would not keep busy, go whole.
        """
        given = {'rng': rng, 'mode': mode, 'state_cts': state_cts}
        if not self._goes_by_head(weights, inputs):
            return super().apply_and_grad(weights, state, inputs, cts, **given)
        children = dict(self._children)

        def apart(weights: Tree) -> Tree:
            return {key: children[key].by_head(w) for key, w in weights.items()}

        by_head, pull_apart = jax.vjp(apart, weights)
        found = state.get('core', {})
        found = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], found)  # (H, B, 1, …)
        key = fold(rng, self.keys.index('core'))
        n_heads = jax.tree.leaves(by_head)[0].shape[0]
        if key is not None:
            key = tiles.keys_of_heads(key, n_heads)[:, None]  # (H, 1)

        def one(total: Any, xs: Any) -> tuple[Any, Tree]:
            its_weights, its_state, its_key = xs

            def head(weights: Tree, inputs: Any) -> Any:
                return self.route(self._head_caller(weights, its_state, its_key, mode), inputs)

            outputs, pull = vjp(head, its_weights, tuple(inputs))
            d_weights, d_inputs = pull(tuple(cts))
            y, d = total
            return ((y + outputs[0]), jax.tree.map(add_cts, d, d_inputs)), d_weights

        x = inputs[0]
        start = jnp.zeros_like(x), zero_cts(tuple(inputs))
        (y, d_inputs), d_by_head = jax.lax.scan(one, start, (by_head, found, key))
        return (y,), d_inputs, pull_apart(d_by_head)[0]

    def _goes_by_head(self, weights: Tree, inputs: Any) -> bool:
        children = dict(self._children)
        whole = [key for key in weights if not hasattr(children[key], 'by_head')]
        wide = all(x.dtype == jnp.float32 for x in inputs if is_float(x))
        return jax.default_backend() == 'cpu' and not whole and wide

    def _head_caller(self, weights: Tree, state: Tree, key: Any, mode: Mode) -> Any:
        """What `route` calls to run its parts with one head's weights; only the core draws."""

        def call(i: int, stack: Any) -> Any:
            name, part = self._children[i]
            its = (state, key) if name == 'core' else ({}, None)
            outputs, _ = part.apply(weights.get(name, {}), its[0], stack, rng=its[1], mode=mode)
            return outputs

        return call


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
