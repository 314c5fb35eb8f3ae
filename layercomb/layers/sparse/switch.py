"""`SwitchFF`: a mixture of feed-forwards, one for each position.

Shape letters: B batch, L length, D d_model, F d_ff, E experts, T positions in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import KW_ONLY
from typing import Annotated

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Rate, Size
from layercomb.layers.basic.activations import elementwise
from layercomb.layers.basic.dense import contract, dense
from layercomb.layers.basic.initializers import Initializer, glorot_uniform, zeros
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.facts.devices import over_rows, own_key
from layercomb.layers.sparse import controllers
from layercomb.layers.sparse.by_expert import by_expert, counts
from layercomb.layers.state.counted import counted_positions
from layercomb.layers.state.decisions import decide
from layercomb.layers.state.parts import AuxLoss
from layercomb.shapes import Signature, as_deep, check_float
from layercomb.trees import Tree

Function = Callable[[jax.Array], jax.Array]


class SwitchFF(Layer):
    """A mixture of feed-forwards: a router chooses one for each position, (…, D) → (…, D).

    With p = softmax(x Wᵣ), in float32, and e = argmax p::

        y = p[e] (f(x W₁[e] + b₁[e]) W₂[e] + b₂[e])

    Experts have no capacity limit, and no position is dropped: positions are sorted by expert, and
    each is multiplied only by the weights of its own.

    Training puts an `AuxLoss` into the state, ``aux_loss``, which balances the experts::

        balance · E · Σₑ share[e] · mean[e]

    where share[e] is the fraction of positions that chose e, without gradient, and mean[e] is the
    mean of p[e]. It equals `balance` if all experts are used alike. Positions of loss weight 0
    (padding, a prompt) are computed but count neither in share nor in mean; if no position counts,
    the loss is 0. `Loop` passes these weights, as does `losses.apply_counted` in your own loop;
    otherwise all positions count.

    The chosen experts are decisions: ``RECORD`` keeps them, ``REPLAY`` takes them.

    Weights: ``router`` (kernel (D, E)), ``in`` (kernel (E, D, F), bias (E, F)), ``out`` (kernel
    (E, F, D), bias (E, D)).

    Attributes:
      d_ff: F, the width of each expert.
      n_experts: E.
      balance: the weight of the auxiliary loss, at least 0.
      jitter: in training the router's input is multiplied by uniform noise within 1 ± `jitter`.
      activation: f, by its name.
      use_bias: whether to add b₁ and b₂.
      kernel_init: of Wᵣ, and of W₁ and W₂ for each expert separately.
      bias_init: of b₁ and b₂.

    Raises:
      ValueError: in training with jitter, without a key.

    References:
      Fedus et al. 2021, Switch Transformers, section 2, https://arxiv.org/abs/2101.03961

    >>> from layercomb import tl, shape_dtype
    >>> tl.SwitchFF(32, 4).output_signature(shape_dtype((2, 5, 8)))
    (ShapeDtypeStruct(shape=(2, 5, 8), dtype=float32),)
    """

    d_ff: Size
    n_experts: Size = 8
    _: KW_ONLY
    balance: Annotated[float, Bound(0)] = 0.01
    jitter: Rate = 0.0
    activation: str = 'relu'
    use_bias: bool = True
    kernel_init: Initializer = glorot_uniform()
    bias_init: Initializer = zeros()

    position_wise = True
    counts_positions = True
    weight_axes = {
        'router/kernel': 'D->E',
        'in/kernel': 'E|D->F',
        'in/bias': 'E|->F',
        'out/kernel': 'E|F->D',
        'out/bias': 'E|->D',
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        elementwise(type(self).__name__, self.activation)  # a wrong name raises here

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
        check_float('SwitchFF', x)
        d, f, e = x.shape[-1], self.d_ff, self.n_experts
        keys = jax.random.split(rng, 5)

        def each(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
            # One expert at a time: the initializer would count the axis of experts as inputs.
            return jax.vmap(lambda k: self.kernel_init(k, shape))(jax.random.split(key, e))

        weights: Tree = {
            'router': {'kernel': self.kernel_init(keys[0], (d, e))},
            'in': {'kernel': each(keys[1], (d, f))},
            'out': {'kernel': each(keys[2], (f, d))},
        }
        if self.use_bias:
            weights['in']['bias'] = self.bias_init(keys[3], (e, f))
            weights['out']['bias'] = self.bias_init(keys[4], (e, d))
        state = {'aux_loss': AuxLoss(jnp.zeros((), jnp.float32))}
        return weights, {} if mode is Mode.PREDICT else state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """y (…, D), in the dtype of x, and the new state.

        Args:
          weights: as of `init`.
          state: ``aux_loss``, and in ``REPLAY`` the recorded experts.
          inputs: x (…, D).
          rng: a typed key, needed in training with jitter.
          mode: see `Mode`.

        Raises:
          ValueError: in training with jitter, without a key.
        """
        (x,) = inputs
        state, counted = counted_positions(state, x)
        flat = x.reshape(-1, x.shape[-1])  # (T, D)
        p = self._probabilities(weights['router'], flat, rng, mode)  # (T, E)

        def choose() -> jax.Array:
            experts = jnp.argmax(p, -1).astype(controllers.smallest_integers(self.n_experts))
            return experts.reshape(x.shape[:-1])

        experts, state = decide(mode, state, 'experts', choose)
        experts = experts.reshape(-1, 1).astype(jnp.int32)  # (T, 1)
        own = jnp.take_along_axis(p, experts, 1)  # (T, 1)
        expert = functools.partial(feed_forward, elementwise(type(self).__name__, self.activation))
        parts = {'in': weights['in'], 'out': weights['out']}
        y = by_expert(expert, parts, flat, experts, own).reshape(x.shape)
        if mode.is_training:
            loss = self.balance * imbalance(p, experts, counted)
            state = {**state, 'aux_loss': AuxLoss(loss)}
        return (y,), state

    def _probabilities(
        self, router: Tree, x: jax.Array, rng: jax.Array | None, mode: Mode
    ) -> jax.Array:
        """p (T, E) of x (T, D), in float32 for any dtype of x."""
        x, kernel = x.astype(jnp.float32), router['kernel'].astype(jnp.float32)
        if mode.is_training and self.jitter:
            if rng is None:
                raise ValueError(
                    'SwitchFF draws jitter in training: pass rng=jax.random.key(…) to apply'
                )
            x = x * jax.random.uniform(
                own_key(rng), x.shape, x.dtype, 1 - self.jitter, 1 + self.jitter
            )
        return jax.nn.softmax(dense({'kernel': kernel}, x))


def feed_forward(f: Function, weights: Tree, x: jax.Array, gates: jax.Array) -> jax.Array:
    """gate · (f(x W₁ + b₁) W₂ + b₂), one expert's output: (C, D) → (C, D).

    Args:
      f: an elementwise function.
      weights: ``in`` (kernel (D, M), bias (M,) or none), ``out`` (kernel (M, D), bias (D,) or
        none).
      x: (C, D).
      gates: (C, 1).
    """
    h = x
    for name in ('in', 'out'):
        h = contract('cd,df->cf', h, weights[name]['kernel'])
        h = h + as_deep(weights[name]['bias'], h) if 'bias' in weights[name] else h
        h = f(h) if name == 'in' else h
    return h * gates.astype(h.dtype)


def share(experts: jax.Array, n_experts: int, counted: jax.Array | None = None) -> jax.Array:
    """The fraction of all choices that each expert has: (T, K) → (E,) float32.

    Args:
      experts: (T, K) integers, the chosen experts.
      n_experts: E.
      counted: bool of any shape with T elements, True where a position counts; None if all do.

    Returns:
      (E,) float32; 0 if no position counts.
    """
    if counted is not None:
        own = counted.reshape(-1, 1).astype(jnp.int32)  # (T, 1)
        counted = jnp.broadcast_to(own, experts.shape).reshape(-1)
    n = over_rows(counts(experts.reshape(-1), n_experts, counted).astype(jnp.float32))
    return n / jnp.maximum(n.sum(), 1)


def imbalance(p: jax.Array, experts: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """E · Σₑ share[e] · mean[e]: 1 if all experts are used alike, E if only one is used.

    Args:
      p: (T, E) float32, the router's probabilities.
      experts: (T, K) integers, the chosen experts; no gradient flows through their shares.
      counted: bool of any shape with T elements, True where a position counts; None if all do.

    Returns:
      float32 (); 0 if no position counts.
    """
    e = p.shape[1]
    if counted is None:
        total, n = p.sum(0), jnp.asarray(len(p), p.dtype)
    else:
        which = counted.reshape(-1, 1)
        total, n = jnp.where(which, p, 0).sum(0), which.sum(dtype=p.dtype)
    mean = over_rows(total) / jnp.maximum(over_rows(n), 1)
    return e * jnp.dot(share(experts, e, counted), mean)
