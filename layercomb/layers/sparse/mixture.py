"""`MixtureFF`: a feed-forward of many small experts, of which each position chooses several.

Shape letters: D d_model, F d_ff, E experts, M units of one, R experts that a router chooses from,
K chosen ones, T positions in all.
"""

from __future__ import annotations

import functools
from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Count, Positive, Size
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import contract, dense
from layercomb.layers.basic.initializers import (
    Initializer,
    glorot_uniform,
    lecun_normal,
    zeros,
)
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.quantized.matrix import Narrow, rows_of
from layercomb.layers.quantized.rows import IN_BOUNDS
from layercomb.layers.sparse.by_expert import by_expert
from layercomb.layers.sparse.controllers import smallest_integers
from layercomb.layers.sparse.switch import imbalance, share
from layercomb.layers.state.counted import counted_positions
from layercomb.layers.state.decisions import decide
from layercomb.layers.state.parts import AuxLoss
from layercomb.shapes import (
    Signature,
    as_deep,
    check_float,
    nearest_divisor,
    nearest_multiple,
)
from layercomb.trees import Tree


class MixtureFF(Layer):
    """A feed-forward in experts, some always on, some chosen by a router: (…, D) → (…, D).

    The d_ff units are E experts of M = d_ff / E units each. The first S are shared: every position
    uses them. Of the other R = E − S, position x chooses the K with the largest s + b::

        s = sigmoid(x Wᵣ)                                 in float32, (R,)
        y = Σₑ expertₑ(x) + c Σₑ s[e] expertₑ(x) + b₂     over the shared; over the chosen
        expertₑ(x) = (f(x W₁[e] + b₁[e]) ∘ x V[e]) W₂[e]

    so that (S + K) / E of the weights, and the router, are read for a position. No position is
    dropped, and experts have no capacity limit.

    The bias b of the router balances the experts. It takes part in the choice, and not in y. Its
    gradient is by how much each expert's share of all choices exceeds 1 / R, so that any optimizer
    lowers the bias of an expert that is chosen too often, by small steps. `balance` adds the usual
    auxiliary loss too, that of `SwitchFF` with shares of K choices and the means of s / Σ s.
    Positions of loss weight 0 (padding, a prompt) are computed, but count in neither.

    In ``PREDICT``, few positions read the rows of chosen experts only, from narrow weights too. The
    chosen experts are decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``router`` (kernel (D, R), bias (R,)), ``in`` (kernel_transposed (E, M, D), bias
    (E, M)), ``up`` (kernel_transposed (E, M, D)), ``out`` (kernel (E, M, D), bias (D,)). The shared
    experts come first. To Muon each expert is a matrix of its own.

    Attributes:
      d_ff: the number of units of all experts; `n_experts` must divide it.
      n_experts: E.
      n_chosen: K.
      n_shared: S; n_shared + n_chosen is at most E.
      activation: f, by its name.
      gated: whether there is V; without, an expert is f(x W₁[e] + b₁[e]) W₂[e].
      routing: 'sigmoid', or 'softmax' for s = softmax(x Wᵣ).
      normalize: whether the chosen s are divided by their sum.
      scale: c.
      balance_bias: whether there is b.
      balance: the weight of the auxiliary loss.
      use_bias: whether there are b₁ and b₂.
      kernel_init: of W₁, V and W₂, for each expert separately.
      bias_init: of b₁ and b₂.

    Raises:
      ValueError: if E does not divide d_ff, naming the nearest sizes that fit; if S + K is more
        than E; if one chosen expert is to be normalized, which teaches the router nothing.

    References:
      Dai et al. 2024, DeepSeekMoE, https://arxiv.org/abs/2401.06066; Wang et al. 2024, balancing
      without a loss, https://arxiv.org/abs/2408.15664

    >>> from layercomb import tl, shape_dtype
    >>> tl.MixtureFF(64, 16, n_chosen=3, n_shared=1).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 8), dtype=float32),)
    """

    d_ff: Size
    n_experts: Size = 64
    n_chosen: Size = 7
    n_shared: Count = 1
    _: KW_ONLY
    activation: str = 'silu'
    gated: bool = True
    routing: Literal['sigmoid', 'softmax'] = 'sigmoid'
    normalize: bool = False
    scale: Positive = 1.0
    balance_bias: bool = True
    balance: Annotated[float, Bound(0)] = 0.0
    use_bias: bool = False
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    weight_axes = {
        'router/kernel': 'D->E',
        'router/bias': '->E',
        'in/kernel_transposed': 'E|M*<-D',
        'in/bias': 'E|->M',
        'up/kernel_transposed': 'E|M*<-D',
        'out/kernel': 'E|M*->D',
        'out/bias': '->D',
    }
    position_wise = True
    counts_positions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        elementwise('MixtureFF', self.activation)  # a wrong name raises here
        if self.d_ff % self.n_experts:
            raise ValueError(
                f'MixtureFF: n_experts={self.n_experts} does not divide d_ff={self.d_ff}: use '
                f'n_experts={nearest_divisor(self.d_ff, self.n_experts)}, or '
                f'd_ff={nearest_multiple(self.d_ff, self.n_experts)}'
            )
        if self.n_shared + self.n_chosen > self.n_experts:
            most = self.n_experts - self.n_shared
            raise ValueError(
                f'MixtureFF: n_chosen={self.n_chosen} and n_shared={self.n_shared} are more than '
                f'n_experts={self.n_experts}: use '
                f'{f"n_chosen={most}" if most > 0 else "fewer of them"} or more experts'
            )
        if self.normalize and self.n_chosen == 1:
            raise ValueError(
                'MixtureFF: normalize=True makes the weight of n_chosen=1 expert always 1, and the '
                'router would learn nothing: use normalize=False, or choose more experts'
            )

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Weights as the class lists them, and an auxiliary loss of zero; none in ``PREDICT``.

        Args:
          signature: of x (…, D), floating.
          rng: a typed key.
          mode: see `Mode`.
        """
        (x,) = signature
        check_float('MixtureFF', x)
        d, e, n_routed = x.shape[-1], self.n_experts, self.n_experts - self.n_shared
        m = self.d_ff // e
        keys = jax.random.split(rng, 6)

        def each(key: jax.Array) -> jax.Array:
            # One expert at a time: the initializer would count the axis of experts as inputs.
            return jax.vmap(lambda k: self.kernel_init(k, (m, d)))(jax.random.split(key, e))

        weights: Tree = {
            'router': {'kernel': lecun_normal()(keys[0], (d, n_routed))},
            'in': {'kernel_transposed': each(keys[1])},
            'out': {'kernel': each(keys[2])},
        }
        if self.gated:
            weights['up'] = {'kernel_transposed': each(keys[3])}
        if self.balance_bias:
            weights['router']['bias'] = jnp.zeros(n_routed, jnp.float32)
        if self.use_bias:
            weights['in']['bias'] = self.bias_init(keys[4], (e, m))
            weights['out']['bias'] = self.bias_init(keys[5], (d,))
        state = {'aux_loss': AuxLoss(jnp.zeros((), jnp.float32))}
        return weights, {} if mode is Mode.PREDICT else state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (…, D), in the dtype of x, and the new state.

        Args:
          weights: as of `init`; kernels may be `Narrow`.
          state: ``aux_loss``, and in ``REPLAY`` the recorded experts.
          inputs: x (…, D).
          rng: not used.
          mode: see `Mode`.

        Raises:
          ValueError: for weights of a mixture with other fields.
        """
        (x,) = inputs
        self._check(weights)
        state, counted = counted_positions(state, x)
        flat = x.reshape(-1, x.shape[-1])  # (T, D)
        s = self.scores(weights['router'], flat)  # (T, R)

        def choose() -> jax.Array:
            chosen = self.choices(weights['router'], s)
            kind = smallest_integers(s.shape[1])
            return chosen.astype(kind).reshape(*x.shape[:-1], self.n_chosen)

        experts, state = decide(mode, state, 'experts', choose)
        experts = experts.reshape(-1, self.n_chosen).astype(jnp.int32)  # (T, K)
        gates = jnp.take_along_axis(s, experts, 1)
        if self.normalize:
            gates = _normalized(gates)
        gates = self.scale * gates
        few = mode is Mode.PREDICT and experts.size <= s.shape[1]
        y = (self._few if few else self._many)(weights, flat, experts, gates).reshape(x.shape)
        if self.use_bias:
            y = y + as_deep(weights['out']['bias'].astype(y.dtype), y)
        if mode.is_training:
            loss = self._loss(weights['router'], s, experts, counted)
            state = {**state, 'aux_loss': AuxLoss(loss)}
        return (y,), state

    def _check(self, weights: Tree) -> None:
        """Refuses weights of another mixture, whose rows would be taken for other experts."""
        n_experts, n_units = weights['out']['kernel'].shape[:2]
        found = {
            'd_ff': n_experts * n_units,
            'n_experts': n_experts,
            'n_shared': n_experts - weights['router']['kernel'].shape[1],
            'gated': 'up' in weights,
            'balance_bias': 'bias' in weights['router'],
            'use_bias': 'bias' in weights['out'],
        }
        if other := {k: v for k, v in found.items() if getattr(self, k) != v}:
            told = ', '.join(f'{k}={v}' for k, v in other.items())
            raise ValueError(
                f'MixtureFF: the weights are of one with {told}: give the layer the '
                'fields that they were made with'
            )

    def scores(self, router: Tree, x: jax.Array) -> jax.Array:
        """s (T, R) of x (T, D), in float32 for any dtype of x."""
        logits = dense({'kernel': router['kernel'].astype(jnp.float32)}, x.astype(jnp.float32))
        return jax.nn.sigmoid(logits) if self.routing == 'sigmoid' else jax.nn.softmax(logits)

    def choices(self, router: Tree, s: jax.Array) -> jax.Array:
        """The K experts with the largest s + b, the largest first: (T, R) → (T, K) int32."""
        if self.balance_bias:
            s = s + as_deep(router['bias'].astype(s.dtype), s)
        return jax.lax.top_k(s, self.n_chosen)[1]

    def _loss(
        self, router: Tree, s: jax.Array, experts: jax.Array, counted: jax.Array | None
    ) -> jax.Array:
        """The auxiliary loss, and 0 with the gradient of the router's bias."""
        p = _normalized(s) if self.routing == 'sigmoid' else s
        loss = self.balance * imbalance(p, experts, counted) if self.balance else jnp.float32(0)
        if self.balance_bias:
            its = share(experts, s.shape[1], counted)  # all 0 if no position counts
            excess = jax.lax.stop_gradient(its - its.mean())  # (R,)
            bias = router['bias'].astype(jnp.float32)
            loss = loss + jnp.dot(excess, bias - jax.lax.stop_gradient(bias))
        return loss

    def _many(self, weights: Tree, x: jax.Array, experts: jax.Array, gates: jax.Array) -> jax.Array:
        """The output (T, D) without b₂: shared experts as one, the chosen ones by sorted tiles."""
        own = self._experts(weights)
        n = self.n_shared
        expert = functools.partial(_expert, elementwise('MixtureFF', self.activation))
        y = by_expert(expert, own, x, experts + n, gates)  # a slice would be a copy
        if not n:
            return y
        shared = jax.tree.map(
            lambda w: w[:n].reshape(-1, *w.shape[2:]), own
        )  # (S, M, …) → (S M, …)
        return y + expert(shared, x, jnp.ones((len(x), 1), jnp.float32)).astype(x.dtype)

    def _few(self, weights: Tree, x: jax.Array, experts: jax.Array, gates: jax.Array) -> jax.Array:
        """The output (T, D) without b₂, of gathered rows."""
        t, n, m = len(x), self.n_shared, self.d_ff // self.n_experts
        always = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (t, n))
        on = jnp.concatenate([always, experts + n], 1)  # (T, S + K)
        at = on[..., None] * m + jnp.arange(m, dtype=jnp.int32)[None, None]
        at = at.reshape(t, on.shape[1] * m)  # (T, S + K, M) → (T, (S + K) M)
        gates = jnp.concatenate([jnp.ones((t, n), gates.dtype), gates], 1)
        h = _units(weights['in']['kernel_transposed']).gathered_product(x, at)
        if self.use_bias:
            h = h + weights['in']['bias'].reshape(-1).at[at].get(**IN_BOUNDS).astype(h.dtype)
        h = elementwise('MixtureFF', self.activation)(h)
        if self.gated:
            h = h * _units(weights['up']['kernel_transposed']).gathered_product(x, at)
        h = h * jnp.repeat(gates, m, 1).astype(h.dtype)
        return _units(weights['out']['kernel']).gathered_sum(h, at)

    def _experts(self, weights: Tree) -> dict[str, Any]:
        """What each expert has for itself: its kernels and b₁."""
        own = {'in': weights['in']['kernel_transposed'], 'out': weights['out']['kernel']}
        if self.gated:
            own['up'] = weights['up']['kernel_transposed']
        if self.use_bias:
            own['bias'] = weights['in']['bias']
        return own


def _units(kernel: jax.Array | Narrow) -> Narrow:
    """A table of all units: (E, M, D) → (E M, D)."""
    return rows_of(jax.tree.map(lambda w: w.reshape(-1, w.shape[-1]), kernel))  # words and scales


def _normalized(s: jax.Array) -> jax.Array:
    """s / Σ s along the last axis; 0 where all sigmoids are."""
    # The gradient divides by the square of the sum, which must not be 0.
    return s / jnp.maximum(s.sum(-1, keepdims=True), 1e-18)


def _expert(f: Any, weights: dict[str, Any], x: jax.Array, gates: jax.Array) -> jax.Array:
    """One expert's output, times the gates: x (C, D), gates (C, 1) → (C, D)."""
    own = {k: w.wide().astype(x.dtype) if isinstance(w, Narrow) else w for k, w in weights.items()}
    h = contract('cd,md->cm', x, own['in'])
    h = f(h + as_deep(own['bias'].astype(h.dtype), h) if 'bias' in own else h)
    if 'up' in own:
        h = h * contract('cd,md->cm', x, own['up'])
    h = h * gates.astype(h.dtype)
    return contract('cm,md->cd', h, own['out'])
