"""Weights as integers and scales: the nearest, or the best for the inputs that they multiply.

A matrix is rows (…, n), and each row is multiplied by inputs of n features. A group of g neighbours
in a row shares a scale: ŵ = scale · q.

Shape letters: R rows, G groups in a row, g weights in a group, n = G · g.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LIMITS = {8: (-127, 127), 4: (-8, 7)}
_PARTS = (8.0, 7.0, 7.5, 8.5, 9.0, 10.0)  # into which the extreme of a group is cut
_DAMPING = 0.01  # of the mean square of the features, added to that of each
_SWEEPS = 3
_TOGETHER = 8192  # rows


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def narrow(
    wide: jax.Array,
    axes: str,
    bits: int,
    group_size: int,
    minima: bool = False,
    gram: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Rounds a matrix, or a stack of them, to narrow weights.

    To the nearest or, if it is known what the matrix multiplies, so that products with that change
    least.

    Args:
      wide: floating, with the axes that `axes` names; any others come first.
      axes: letters ``i`` and ``o``, see `matrix`.
      bits: 4, 8 or 16.
      group_size: wanted number of weights that share a scale; the nearest divisor of the row's
        length is taken (of half of it for int4), by ratio.
      minima: whether a group has a minimum, too: see `from_least`.
      gram: X Xᵀ (n, n) float32 of the inputs X (n, N) of a matrix that is not stacked, whose rows
        have n weights; None if they are not known.

    Returns:
      Values and scales, as of `Narrow`; scales are None for 16 bits.
    """
    n_lead, n_i = wide.ndim - len(axes), axes.count('i')
    lead, shape = wide.shape[:n_lead], wide.shape[n_lead:]
    if axes == 'oi':
        o = shape[:-1]
    else:
        o = shape[n_i:]
        wide = jnp.moveaxis(wide.reshape(*lead, math.prod(shape[:n_i]), *o), n_lead, -1)
    if bits == 16:
        return wide.astype(jnp.bfloat16), None
    length = wide.shape[-1]
    size = group_of(length // 2 if bits == 4 else length, group_size)  # a group is within one half
    wide = wide.astype(jnp.float32)
    if minima:
        q, scales = from_least(wide, bits, size)
    else:
        q, scales = integers(wide, bits, size, gram)
    return (_pack(q) if bits == 4 else q), scales


def can_narrow(shape: tuple[int, ...], axes: str, bits: int) -> bool:
    """Whether a matrix can be stored in so many bits: int4 needs rows of even length.

    Args:
      shape: of the wide matrix.
      axes: letters ``i`` and ``o``, one for each axis.
      bits: 4, 8 or 16.
    """
    length = math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == 'i')
    return bits != 4 or length % 2 == 0


def group_of(length: int, group_size: int) -> int:
    """The divisor of `length` nearest to `group_size`, by ratio.

    >>> group_of(768, 64), group_of(100, 64), group_of(48, 64)
    (64, 50, 48)
    """
    divisors = (n for n in range(1, length + 1) if length % n == 0)
    return min(divisors, key=lambda n: abs(math.log(n / group_size)))


def _pack(q: jax.Array) -> jax.Array:
    """int8 from −8 to 7, (…, n) → two int4 per byte, (…, n / 2) uint8."""
    n = q.shape[-1] // 2
    q = lax.bitcast_convert_type(q, jnp.uint8)
    return (q[..., :n] & 15) | (q[..., n:] << 4)


def integers(
    rows: jax.Array, bits: int, size: int, gram: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to integers and scales.

    Args:
      rows: W (…, n) float32.
      bits: 4 or 8.
      size: g, which divides n.
      gram: X Xᵀ (n, n) float32 of the inputs X (n, N) that W is for; None to round to the nearest.

    Returns:
      q (…, n) int8 and scales (…, G) float32.
    """
    groups = rows.reshape(*rows.shape[:-1], -1, size)  # (…, n) → (…, G, g)
    if gram is None:
        q, scales = nearest(groups, bits)
    else:
        with jax.default_matmul_precision('highest'):
            q, scales = for_inputs(groups.reshape(-1, *groups.shape[-2:]), bits, gram)
    return q.reshape(rows.shape), scales.reshape(groups.shape[:-1])


def from_least(rows: jax.Array, bits: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Rounds rows to integers that count from the least weight of each group.

    ŵ = scale · (q + 2^(bits − 1)) + minimum: the least weight is the minimum, and the largest is
    the largest integer.

    Args:
      rows: W (…, n) float32.
      bits: 4 or 8.
      size: g, which divides n.

    Returns:
      q (…, n) int8; and scales, with minima behind them, (…, 2G) float32.
    """
    groups = rows.reshape(*rows.shape[:-1], -1, size)  # (…, n) → (…, G, g)
    least, half = groups.min(-1, keepdims=True), 2 ** (bits - 1)
    scales = (groups.max(-1, keepdims=True) - least) / (2 * half - 1)
    steps = (groups - least) / jnp.where(scales == 0, 1, scales) - half
    q = jnp.clip(jnp.round(steps), -half, half - 1).astype(jnp.int8)
    return q.reshape(rows.shape), jnp.concatenate([scales, least], -2).squeeze(-1)


def nearest(groups: jax.Array, bits: int, refined: bool = False) -> tuple[jax.Array, jax.Array]:
    """Rounds groups for the least squared error of their weights.

    8 bits: scale = max |w| / 127, so that no weight is off by more than half a scale. 4 bits: the
    best of a few scales that are parts of the group's extreme w. If `refined`, each of these is
    followed by the scale ⟨w, q⟩ / ⟨q, q⟩, the best for its q, and that is tried too. The error of
    Gaussian weights is then 1.2 per cent less; a model was no better for it alone.

    Args:
      groups: w (…, g) float32.
      bits: 4 or 8.
      refined: of 4 bits, whether to try these too.

    Returns:
      q (…, g) int8 and scales (…, 1) float32.
    """
    if bits == 8:
        scales = jnp.abs(groups).max(-1, keepdims=True) / 127
        return _rounded(groups, scales, bits), scales
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    extreme = jnp.where(-low > high, low, high)
    best: Any = None
    for parts in _PARTS:
        scales = extreme / -parts  # the extreme becomes −8; there is no +8
        best = _better(best, groups, scales, bits)
        if not refined:
            continue
        q = _rounded(groups, scales, bits).astype(jnp.float32)
        scales = _ratio((groups * q).sum(-1, keepdims=True), (q * q).sum(-1, keepdims=True))
        best = _better(best, groups, scales, bits)
    return best[1], best[2]


def _better(best: Any, groups: jax.Array, scales: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """(squared error, q, scales) of each group, those before or with these scales."""
    q = _rounded(groups, scales, bits)
    error = jnp.square(q.astype(jnp.float32) * scales - groups).sum(-1, keepdims=True)
    made = error, q, scales
    if best is None:
        return made
    return tuple(jnp.where(error < best[0], a, b) for a, b in zip(made, best, strict=True))


def for_inputs(groups: jax.Array, bits: int, gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rows for the least squared error of their products, |(W − Ŵ) X|².

    First weights are rounded one after the other, each error made up for by those that follow, with
    scales from what the weights of a group have become: GPTQ. Then each scale, and each weight, is
    set to what is best while all others stay, a few times over: coordinate descent as in QuantEase.

    Args:
      groups: W (R, G, g) float32.
      bits: 4 or 8.
      gram: H = X Xᵀ (n, n) float32. A hundredth of its mean diagonal is added to the diagonal.

    Returns:
      q (R, G, g) int8 and scales (R, G) float32.

    References:
      Frantar et al. 2022, https://arxiv.org/abs/2210.17323
      Behdin et al. 2023, https://arxiv.org/abs/2309.01885
    """
    n = len(gram)
    mean = jnp.trace(gram) / n
    eye = jnp.eye(n, dtype=jnp.float32)
    gram = gram + jnp.where(mean > 0, _DAMPING * mean, 1.0) * eye
    # H = M Mᵀ with M upper triangular, and U = M⁻¹: H⁻¹ = Uᵀ U. Row i of U / U[i, i] says how the
    # weights after i make up for an error in weight i.
    lower = jnp.linalg.cholesky(gram[::-1, ::-1])
    upper = lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)[::-1, ::-1]
    one = functools.partial(_row, bits=bits, gram=gram, upper=upper)
    q, scales = lax.map(one, groups, batch_size=min(_TOGETHER, len(groups)))
    return q.astype(jnp.int8), scales


def _row(groups: jax.Array, *, bits: int, gram: jax.Array, upper: jax.Array) -> Any:
    """q (G, g), as floats, and scales (G,) of a row (G, g)."""

    def sweep(_: Any, made: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, scales = made
        return _descended(groups, q, scales, bits, gram)

    made: Any = lax.fori_loop(0, _SWEEPS, sweep, _fed_forward(groups, bits, upper))
    return made


def _fed_forward(groups: jax.Array, bits: int, upper: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds a row, weight by weight: q (G, g), as floats, and scales (G,)."""
    n_groups, size = groups.shape

    def group(row: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
        at = i * size
        block = lax.dynamic_slice(upper, (at, at), (size, size))
        weights = lax.dynamic_slice(row, (at,), (size,))
        scale = nearest(weights, bits, refined=True)[1][0]

        def weight(j: Any, carry: Any) -> Any:
            weights, q, errors = carry
            k = _rounded(weights[j], scale, bits).astype(jnp.float32)
            error = (weights[j] - k * scale) / block[j, j]
            return weights - error * block[j], q.at[j].set(k), errors.at[j].set(error)

        zeros = jnp.zeros(size, jnp.float32)
        _, q, errors = lax.fori_loop(0, size, weight, (weights, zeros, zeros))
        row = row - errors @ lax.dynamic_slice(upper, (at, 0), (size, len(row)))
        return row, (q, scale)

    numbers = jnp.arange(n_groups, dtype=jnp.int32)
    _, made = lax.scan(group, groups.reshape(-1), numbers)
    return made[0], made[1]


def _descended(
    groups: jax.Array, q: jax.Array, scales: jax.Array, bits: int, gram: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One sweep of coordinate descent over a row: q (G, g), as floats, and scales (G,)."""
    n_groups, size = groups.shape
    n = n_groups * size

    def group(carry: Any, i: jax.Array) -> tuple[Any, None]:
        q, scales, left = carry  # left: w − ŵ (n,)
        at = i * size
        rows = lax.dynamic_slice(gram, (0, at), (n, size))
        block = lax.dynamic_slice(rows, (at, 0), (size, size))
        slope = left @ rows
        its_q, scale = q[i], scales[i]
        bent = its_q @ block
        step = _ratio(slope @ its_q, bent @ its_q)
        scale, slope = scale + step, slope - step * bent

        def weight(j: Any, carry: Any) -> Any:
            its_q, slope = carry
            k = _rounded(scale * its_q[j] + slope[j] / block[j, j], scale, bits)
            change = (k.astype(jnp.float32) - its_q[j]) * scale
            return its_q.at[j].set(k.astype(jnp.float32)), slope - change * block[j]

        its_q, _ = lax.fori_loop(0, size, weight, (its_q, slope))
        left = lax.dynamic_update_slice(left, groups[i] - its_q * scale, (at,))
        return (q.at[i].set(its_q), scales.at[i].set(scale), left), None

    left = (groups - q * scales[:, None]).reshape(-1)
    numbers = jnp.arange(n_groups, dtype=jnp.int32)
    (q, scales, _), _ = lax.scan(group, (q, scales, left), numbers)
    return q, scales


def _rounded(weights: jax.Array, scales: jax.Array, bits: int) -> jax.Array:
    low, high = _LIMITS[bits]
    return jnp.clip(jnp.round(_ratio(weights, scales)), low, high).astype(jnp.int8)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, or x where y is 0: a group of zeros stays zero."""
    return x / jnp.where(y == 0, 1, y)
