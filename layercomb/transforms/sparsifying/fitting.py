"""A mixture of experts fitted to what a dense feed-forward reads and makes.

Shape letters: T positions, D width, F units, M units of an expert, R experts that a router chooses
from, K chosen ones, S shared ones.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.basic.activations import elementwise
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.transforms.sparsifying.units import Array, balanced, chosen, together
from layercomb.trees import Tree

_ROUNDS = 6  # of experts and router, in turns
_FIRST = 4096  # positions that the first experts are made from
_SPREAD = 0.1  # of the router's logits, so that gates are about 0.5
_ROUTER_DAMPING = 0.01  # of the mean square of a feature
_OUT_DAMPING = 0.2  # of the mean square of a unit


class Errors(NamedTuple):
    """Mean squares of what a mixture makes wrong, relative to what the dense layer makes.

    Attributes:
      oracle: with the experts that hold most at each position, and the weights of before.
      routed: with the experts that the router chooses.
      fitted: with the matrix back fitted, too.
    """

    oracle: float
    routed: float
    fitted: float


@dataclasses.dataclass
class _Fit:
    """What a fit works on.

    Attributes:
      x: (T, D), of the mixture.
      h: (T, F), the hidden units for x.
      y: (T, D), what is to be made, without b₂.
      back: (F, D), W₂.
      scale: (T, 1), one over the norms of y.
    """

    x: Array
    h: Array
    y: Array
    back: Array
    scale: Array

    def error(self, on: Array) -> float:
        """The error with factors of the hidden units (T, F)."""
        wrong = ((self.h * on) @ self.back - self.y) * self.scale
        return float(np.square(wrong).sum(1).mean())


def fitted(mixture: MixtureFF, weights: Tree, x: Array, seed: int) -> tuple[Tree, Errors]:
    """The weights of a mixture that makes of x about what the dense layer makes of it.

    Args:
      mixture: with sizes and activation.
      weights: of the dense layer, in the mixture's arrangement, without a router.
      x: (T, D), what the mixture reads.
      seed: of the order that the search for experts begins with.

    Returns:
      Weights of the same dtypes, and the errors.
    """
    fit, energy = _measured(mixture, weights, x)
    n, m = mixture.n_shared, mixture.d_ff // mixture.n_experts
    order = np.argsort(-energy.mean(0), kind='stable')
    shared, rest = np.sort(order[: n * m]), np.sort(order[n * m :])
    experts, router = _routed(mixture, fit.x, energy[:, rest], seed)
    units = np.concatenate([shared, rest[experts.reshape(-1)]])  # the new order of units
    fit = dataclasses.replace(fit, h=fit.h[:, units], back=fit.back[units])

    def of_units(on: Array) -> Array:  # (T, R) → (T, F)
        all_on = np.ones((len(on), n * m), np.float32)
        return np.concatenate([all_on, np.repeat(on, m, 1)], 1)

    held = energy[:, rest] @ _belongs(experts)
    oracle = fit.error(of_units(chosen(held, mixture.n_chosen)))
    gates = of_units(_gates(mixture, router, fit.x))
    routed = fit.error(gates)
    back, bias = _back(fit, gates, mixture.use_bias)
    fit = dataclasses.replace(fit, back=back, y=fit.y - bias)
    errors = Errors(oracle, routed, fit.error(gates))
    return _arranged(mixture, weights, units, router, (back, bias)), errors


def _measured(mixture: MixtureFF, weights: Tree, x: Array) -> tuple[_Fit, Array]:
    """What to fit to, and the squares of what each unit adds at each position: (T, F)."""
    names = {'in': 'kernel_transposed', 'up': 'kernel_transposed', 'out': 'kernel'}
    own = {key: jnp.float32(weights[key][name]) for key, name in names.items() if key in weights}
    if mixture.use_bias:
        own['bias'] = jnp.float32(weights['in']['bias'])
    h, back = np.asarray(_hidden(mixture.activation, own, x)), np.asarray(own['out'])
    y = h @ back
    norms = np.square(y).sum(1, keepdims=True)
    scale = 1 / np.sqrt(norms + 0.1 * np.median(norms) + 1e-20)
    return _Fit(x, h, y, back, scale), np.square(h * np.linalg.norm(back, axis=1) * scale)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(activation: str, weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The hidden units: (T, D) → (T, F)."""
    h = x @ weights['in'].T
    h = elementwise('sparsify', activation)(h + weights['bias'] if 'bias' in weights else h)
    return h * (x @ weights['up'].T) if 'up' in weights else h


def _routed(
    mixture: MixtureFF, x: Array, energy: Array, seed: int
) -> tuple[Array, tuple[Array, Array]]:
    """Experts (R, M) of units, and the router: a kernel (D, R) and a bias (R,).

    Experts are first made from what units add. Then, in turns, the router is fitted to what experts
    add, and units go to the experts that it chooses where they add most.

    Args:
      mixture: with sizes.
      x: (T, D).
      energy: (T, R M), of the units that are not shared.
      seed: as of `fitted`.
    """
    k, m = mixture.n_chosen, mixture.d_ff // mixture.n_experts
    n_routed = mixture.n_experts - mixture.n_shared
    if n_routed == k:
        return np.arange(n_routed * m).reshape(n_routed, m), _all(x.shape[1], n_routed)
    step = -(-len(x) // _FIRST)
    experts = together(energy[::step], m, k, np.random.default_rng(seed))
    regress = _regression(x)
    best: tuple[float, Any] = (-1.0, None)
    for _ in range(_ROUNDS):
        held = energy @ _belongs(experts)
        kernel, bias = regress(np.sqrt(held))
        on = chosen(x @ kernel + bias, k)
        if float((held * on).sum()) > best[0]:
            best = float((held * on).sum()), (experts, (kernel, bias))
        experts = np.argsort(balanced(energy.T @ on, m), kind='stable').reshape(n_routed, m)
    experts, (kernel, bias) = best[1]
    scale = _SPREAD / max(float((x @ kernel).std()), 1e-20)
    # Near 0 a sigmoid is 0.5 and a quarter of its argument.
    return experts, (scale * kernel, scale * (bias - bias.mean()) / 4)


def _belongs(experts: Array) -> Array:
    """1 where a unit is one of an expert's, else 0: (R, M) → (R M, R)."""
    n_experts, size = experts.shape
    made = np.zeros((n_experts * size, n_experts), np.float32)
    made[experts.reshape(-1), np.repeat(np.arange(n_experts), size)] = 1
    return made


def _all(d: int, n_routed: int) -> tuple[Array, Array]:
    """The router where every expert is chosen: all gates are a half."""
    return np.zeros((d, n_routed), np.float32), np.zeros(n_routed, np.float32)


def _regression(x: Array) -> Any:
    """From targets (T, R) to the kernel (D, R) and the bias (R,) that foretell them from x."""
    mean = x.mean(0)
    centred = x - mean
    gram = centred.T @ centred
    gram[np.diag_indices(len(gram))] += _ROUTER_DAMPING * np.trace(gram) / len(gram) + 1e-20
    inverse = np.linalg.inv(gram.astype(np.float64))

    def regress(target: Array) -> tuple[Array, Array]:
        middle = target.mean(0)
        kernel = (inverse @ (centred.T @ (target - middle))).astype(np.float32)
        return kernel, middle - mean @ kernel

    return regress


def _gates(mixture: MixtureFF, router: tuple[Array, Array], x: Array) -> Array:
    """Twice the gate of each chosen expert, and 0 of the others: (T, D) → (T, R)."""
    kernel, bias = router
    s = 1 / (1 + np.exp(-(x @ kernel)))
    return 2 * s * chosen(s + bias, mixture.n_chosen)


def _back(fit: _Fit, gates: Array, use_bias: bool) -> tuple[Array, Array]:
    """W₂ and a change of b₂ that bring the outputs nearest to y, as near to W₂ as that allows.

    Args:
      fit: what to fit to.
      gates: (T, F), factors of the hidden units.
      use_bias: whether b₂ may change.
    """
    on = fit.h * gates
    wrong = (fit.y - on @ fit.back) * fit.scale
    on *= fit.scale
    if use_bias:
        on = np.concatenate([on, fit.scale], 1)
    gram = on.T @ on
    n = len(fit.back)
    at = np.arange(n)
    gram[at, at] += _OUT_DAMPING * np.trace(gram[:n, :n]) / n + 1e-20
    change = np.linalg.solve(gram, on.T @ wrong).astype(np.float32)
    bias = change[n] if use_bias else np.zeros(change.shape[1], np.float32)
    return fit.back + change[:n], bias


def _arranged(
    mixture: MixtureFF,
    weights: Tree,
    units: Array,
    router: tuple[Array, Array],
    out: tuple[Array, Array],
) -> Tree:
    """The mixture's weights, with units in their new order, in experts.

    Args:
      mixture: with sizes.
      weights: of the dense layer.
      units: (F,), the order.
      router: kernel and bias.
      out: W₂ (F, D) in the new order, and the change of b₂.
    """

    def in_experts(x: Any) -> jax.Array:  # (F, …) → (E, M, …)
        return jnp.asarray(x).reshape(mixture.n_experts, -1, *x.shape[1:])

    back = np.asarray(in_experts(out[0])).copy()
    back[mixture.n_shared :] *= 2  # for gates are about a half
    made = {
        part: {name: in_experts(x[units]) for name, x in its.items()}
        for part, its in weights.items()
        if part != 'out'  # whose bias has no units
    }
    made['out'] = {'kernel': jnp.asarray(back, weights['out']['kernel'].dtype)}
    if 'bias' in weights['out']:
        old = jnp.asarray(weights['out']['bias'])
        made['out']['bias'] = old + out[1].astype(old.dtype)
    made['router'] = {'kernel': jnp.asarray(router[0]), 'bias': jnp.asarray(router[1])}
    return made
