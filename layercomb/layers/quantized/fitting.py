"""Rows of weights rounded for the inputs that they multiply: `fitted`.

Shape letters: R rows, G groups in a row, g weights in a group, n = G · g weights in a row. Inside,
weights are (n, R): the same weight of all rows is rounded at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.quantized.nearest import nearest, ratio, rounded

_DAMPING = 0.01  # of the mean square of the features, added to that of each
_TRUST = 0.1  # the same where errors before a matrix are made up for: it keeps noise out
_SWEEPS = 3
_TOGETHER = 8192  # rows


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['gram', 'missing'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What is known of the inputs X (n, N) that a matrix multiplies.

    Attributes:
      gram: H = X Xᵀ (n, n) float32.
      missing: X (X′ − X)ᵀ (n, n) float32 with X′ the inputs that the matrix got before anything was
        rounded; None if they are not known, or the same.
    """

    gram: jax.Array
    missing: jax.Array | None = None

    def __add__(self, other: Inputs) -> Inputs:
        """Those of both together."""
        return jax.tree.map(jnp.add, self, other)


class _Problem(NamedTuple):
    """What all rows share.

    Attributes:
      gram: H (n, n), damped.
      order: in which weights are rounded first (n,): those of the largest inputs, as what follows
        makes up for their errors.
      upper: U (n, n), upper triangular, in this order, with H⁻¹ = Uᵀ U. Row i of U / U[i, i] says
        how the weights after i make up for an error in weight i.
      size: g.
      bits: 4 or 8.
    """

    gram: jax.Array
    order: jax.Array
    upper: jax.Array
    size: int
    bits: int


def fitted(rows: jax.Array, bits: int, size: int, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Rounds rows for the least squared error of their products, |W X′ − Ŵ X|².

    First W becomes the matrix whose products with X are nearest to W X′: so it makes up for what
    was rounded before it (GPTAQ). Scales are the best for the weights of each group. Then weights
    are rounded one after the other, those of the largest inputs first, each error made up for by
    those that follow: GPTQ. Then each scale, and each weight, is set to what is best while all
    others stay, a few times over: coordinate descent as in QuantEase.

    Args:
      rows: W (R, n) float32.
      bits: 4 or 8.
      size: g, which divides n.
      inputs: what W multiplies. A hundredth of the mean diagonal of H is added to the diagonal, and
        a tenth where W becomes another.

    Returns:
      q (R, n) int8 and scales (R, G) float32.

    References:
      Frantar et al. 2022, https://arxiv.org/abs/2210.17323
      Li et al. 2025, https://arxiv.org/abs/2504.02692
      Behdin et al. 2023, https://arxiv.org/abs/2309.01885
    """
    n_rows, n = rows.shape
    if not n_rows:
        return jnp.zeros((0, n), jnp.int8), jnp.zeros((0, n // size), jnp.float32)
    with jax.default_matmul_precision('highest'):
        if inputs.missing is not None:
            rows = rows + jnp.linalg.solve(_damped(inputs.gram, _TRUST), inputs.missing @ rows.T).T
        problem = _problem(inputs.gram, size, bits)
        parts = math.ceil(n_rows / _TOGETHER)
        together = math.ceil(n_rows / parts)
        rows = jnp.pad(rows, ((0, parts * together - n_rows), (0, 0)))
        one = functools.partial(_fitted, problem)
        q, scales = lax.map(one, rows.reshape(parts, together, n))
    return q.reshape(-1, n)[:n_rows], scales.reshape(-1, n // size)[:n_rows]


def _problem(gram: jax.Array, size: int, bits: int) -> _Problem:
    gram = _damped(gram, _DAMPING)
    order = jnp.argsort(-jnp.diagonal(gram), stable=True).astype(jnp.int32)
    # H = M Mᵀ with M upper triangular, and U = M⁻¹.
    lower = jnp.linalg.cholesky(gram[order][:, order][::-1, ::-1])
    eye = jnp.eye(len(gram), dtype=jnp.float32)
    upper = lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)[::-1, ::-1]
    return _Problem(gram, order, upper, size, bits)


def _damped(gram: jax.Array, part: float) -> jax.Array:
    """H with a part of its mean diagonal added to the diagonal, or 1 if all inputs are 0."""
    mean = jnp.trace(gram) / len(gram)
    return gram + jnp.where(mean > 0, part * mean, 1.0) * jnp.eye(len(gram), dtype=jnp.float32)


def _fitted(problem: _Problem, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q (R, n) int8 and scales (R, G) of rows (R, n)."""
    groups = rows.reshape(len(rows), -1, problem.size)
    scales = nearest(groups, problem.bits, refined=True)[1].squeeze(-1).T  # (G, R)
    made = _fed_forward(problem, rows.T, scales), scales

    def sweep(_: Any, made: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _descended(problem, rows.T, *made)

    q, scales = lax.fori_loop(0, _SWEEPS, sweep, made)
    return q.astype(jnp.int8).T, scales.T


def _fed_forward(problem: _Problem, weights: jax.Array, scales: jax.Array) -> jax.Array:
    """Rounds weights (n, R) one after the other, with scales (G, R): q (n, R), as floats."""
    order, upper, size = problem.order, problem.upper, problem.size
    n, n_rows = weights.shape

    def piece(weights: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next g weights in the order, which are of any groups."""
        at = i * size
        block = lax.dynamic_slice(upper, (at, at), (size, size))
        groups = lax.dynamic_slice(order, (at,), (size,)) // size

        def weight(j: Any, carry: Any) -> Any:
            weights, q, errors = carry
            scale = scales[groups[j]]
            k = rounded(weights[j], scale, problem.bits).astype(jnp.float32)
            error = (weights[j] - k * scale) / block[j, j]
            left = weights - block[j][:, None] * error
            return left, q.at[j].set(k), errors.at[j].set(error)

        zeros = jnp.zeros((size, n_rows), jnp.float32)
        its = lax.dynamic_slice(weights, (at, 0), (size, n_rows))
        _, q, errors = lax.fori_loop(0, size, weight, (its, zeros, zeros))
        return weights - lax.dynamic_slice(upper, (at, 0), (size, n)).T @ errors, q

    numbers = jnp.arange(n // size, dtype=jnp.int32)
    _, q = lax.scan(piece, weights[order], numbers)
    return jnp.zeros_like(weights).at[order].set(q.reshape(n, n_rows))


def _descended(
    problem: _Problem, weights: jax.Array, q: jax.Array, scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One sweep of coordinate descent: q (n, R), as floats, and scales (G, R)."""
    gram, size, bits = problem.gram, problem.size, problem.bits
    n, n_rows = weights.shape

    def group(carry: Any, i: jax.Array) -> tuple[Any, None]:
        q, scales, left = carry  # left: w − ŵ (n, R)
        at = i * size
        lines = lax.dynamic_slice(gram, (at, 0), (size, n))
        block = lax.dynamic_slice(lines, (0, at), (size, size))
        its_q, scale = lax.dynamic_slice(q, (at, 0), (size, n_rows)), scales[i]
        slope, bent = lines @ left, block @ its_q
        step = ratio((slope * its_q).sum(0), (bent * its_q).sum(0))
        scale, slope = scale + step, slope - step * bent

        def weight(j: Any, carry: Any) -> Any:
            its_q, slope = carry
            k = rounded(scale * its_q[j] + slope[j] / block[j, j], scale, bits).astype(jnp.float32)
            change = (k - its_q[j]) * scale
            return its_q.at[j].set(k), slope - block[j][:, None] * change

        its_q, _ = lax.fori_loop(0, size, weight, (its_q, slope))
        its_weights = lax.dynamic_slice(weights, (at, 0), (size, n_rows))
        left = lax.dynamic_update_slice(left, its_weights - its_q * scale, (at, 0))
        q = lax.dynamic_update_slice(q, its_q, (at, 0))
        return (q, scales.at[i].set(scale), left), None

    wide = (q.reshape(-1, size, n_rows) * scales[:, None]).reshape(n, n_rows)
    numbers = jnp.arange(n // size, dtype=jnp.int32)
    (q, scales, _), _ = lax.scan(group, (q, scales, weights - wide), numbers)
    return q, scales
