"""Attention of a sequence whose positions several devices split: by heads, by windows, or a ring.

* With a window no longer than a device's part, a device needs the keys that stand before its own
  queries, and no others.
* Where n divides the heads of keys and values, positions are exchanged for heads (`Exchange`): that
  sends the least, and all devices have equally much to do. So are those of packed rows.
* Else keys and values go round in a ring. Each device attends from its queries to one part of the
  keys after the other, and joins what it finds by the logsumexps z::

      z = log Σ_s exp(z_s)        y = Σ_s exp(z_s − z) y_s

  The backward pass goes round again, with the gradients of keys and values. With a window keys go
  as far as it reaches. A causal ring is as slow as its last device, which sees all keys. Sums are
  float32, of outputs and gradients in the dtype of v.

Shape letters: B batch, L the whole length, n devices, H heads of queries, G heads of keys and
values, K depth of queries and keys, D depth of values.

References:
  Ring attention (Liu et al., 2023), https://arxiv.org/abs/2310.01889
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from layercomb.layers.attention import flash, tiles
from layercomb.layers.attention.devices.exchange import Exchange
from layercomb.layers.attention.functions import check, dot_product_attention, plan_of
from layercomb.layers.facts.sequence import (
    SEQUENCE,
    first_position,
    sequence_parts,
    surrounded,
)


def over_devices(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    bias: jax.Array | None = None,
    rng: jax.Array | None = None,
    **given: Any,
) -> jax.Array:
    """`dot_product_attention` where devices split positions; the same on one device.

    Args:
      q: this device's queries (B, H, L/n, K).
      k, v: its keys and values (B, G, L/n, K) and (B, G, L/n, D).
      mask, segments: of its positions (B, L/n).
      bias: as of `dot_product_attention`.
      rng: a typed key, or one a head.
      **given: the other arguments of `dot_product_attention`, without an offset.

    Returns:
      Its outputs (B, H, L/n, D).
    """
    more: dict[str, Any] = {'mask': mask, 'segments': segments, 'bias': bias, 'rng': rng}
    if sequence_parts() == 1:
        return dot_product_attention(q, k, v, **more, **given)
    exchange = Exchange.of(q.shape[1], k.shape[1])
    window = given.get('window')
    own = q.shape[2] == k.shape[2]  # a sequence to itself
    if segments is None and own and window is not None and window <= k.shape[2]:
        return _windowed(q, k, v, **more, **given)
    if segments is None and not exchange.is_even:
        return _ring(q, k, v, **more, **given)
    y = dot_product_attention(
        exchange.queries(q),
        exchange.shared(k),
        exchange.shared(v),
        mask=exchange.rows(mask),
        segments=exchange.rows(segments),
        bias=None if bias is None else exchange.its(bias, 1),
        rng=exchange.keys(rng),
        **given,
    )
    return exchange.back(y)


def _windowed(q: Any, k: Any, v: Any, mask: Any, segments: None, **given: Any) -> jax.Array:
    """Each query sees keys of its own device, and of the one before."""
    before = given['window'] - 1
    real = jnp.ones((len(k), k.shape[2]), bool) if mask is None else mask
    return dot_product_attention(
        q,
        surrounded(k, before, axis=2),
        surrounded(v, before, axis=2),
        mask=surrounded(real, before),  # False before the first position
        offset=jnp.full(len(q), before, jnp.int32),
        **given,
    )


def _ring(
    q: Any, k: Any, v: Any, mask: Any, segments: None, bias: Any, rng: Any,
    dropout_rate: float = 0.0, **given: Any,
) -> jax.Array:  # fmt: skip
    check(q, k, v, mask, None, dropout_rate, rng)
    plan = plan_of(q, k, v, bias=bias, dropout_rate=dropout_rate, **given)
    return ring(plan, q, k, v, mask, rng if dropout_rate else None, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring(plan: flash.Plan, q: Any, k: Any, v: Any, mask: Any, rng: Any, bias: Any) -> jax.Array:
    """Attention to keys and values that go round.

    Args:
      plan: of this device's queries and one device's keys.
      q, k, v, mask, rng, bias: as of `over_devices`; `rng` is None without dropout.

    Returns:
      (B, H, L/n, D), in the dtype of v.
    """
    return _ring_forward(plan, q, k, v, mask, rng, bias)[0]


def _ring_forward(
    plan: flash.Plan, q: Any, k: Any, v: Any, mask: Any, rng: Any, bias: Any
) -> tuple[jax.Array, Any]:
    shape = (*q.shape[:3], v.shape[-1])
    nothing = jnp.full(shape[:3], -jnp.inf, jnp.float32)

    def step(carry: Any, s: jax.Array) -> Any:
        round_, out, z = carry
        found, kept = flash.attend_forward(plan, q, *_of_turn(plan, round_, s, rng, bias))
        z_s = _by_query(plan, kept[-1])  # (B, H, L/n)
        z_s = jnp.where(z_s == tiles.FAR, -jnp.inf, z_s)
        both = jnp.logaddexp(z, z_s)
        old, new = (jnp.where(both == -jnp.inf, 0, jnp.exp(x - both)) for x in (z, z_s))
        out = out * old[..., None] + found.astype(jnp.float32) * new[..., None]
        return (_passed_on(round_), out, both), None

    carry = (k, v, mask), jnp.zeros(shape, jnp.float32), nothing
    (_, out, z), _ = lax.scan(step, carry, jnp.arange(_n_steps(plan), dtype=jnp.int32))
    out = out.astype(v.dtype)
    z = jnp.where(z == -jnp.inf, tiles.FAR, z)
    return out, (q, k, v, mask, rng, bias, out, z)


def _ring_backward(plan: flash.Plan, kept: Any, d_out: jax.Array) -> Any:
    q, k, v, mask, rng, bias, out, z = kept
    z = flash.cut_queries(plan, z)

    def step(carry: Any, s: jax.Array) -> Any:
        round_, d_round, d_q, d_bias = carry
        given = q, *_of_turn(plan, round_, s, rng, bias), out, z
        made = flash.attend_backward(plan, given, d_out)
        d_round = jax.tree.map(_added, d_round, made[1:3])
        d_bias = None if bias is None else _added(d_bias, made[6])
        return (_passed_on(round_), _passed_on(d_round), _added(d_q, made[0]), d_bias), None

    def zeros(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, jnp.float32)

    carry = (k, v, mask), (zeros(k), zeros(v)), zeros(q), None if bias is None else zeros(bias)
    n = _n_steps(plan)
    (_, d_round, d_q, d_bias), _ = lax.scan(step, carry, jnp.arange(n, dtype=jnp.int32))
    d_k, d_v = _passed_on(d_round, -n)
    d_bias = None if d_bias is None else d_bias.astype(bias.dtype)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None, d_bias


ring.defvjp(_ring_forward, _ring_backward)


def _of_turn(plan: flash.Plan, round_: Any, s: jax.Array, rng: Any, bias: Any) -> tuple[Any, ...]:
    """The arguments of `flash.attend` after q: the keys that come by in step s, and where they are.

    Positions of queries are counted from the first of these keys.
    """
    k, v, mask = round_
    owner = (lax.axis_index(SEQUENCE) - s) % sequence_parts()
    offset = first_position(plan.n_queries) - owner * jnp.int32(plan.n_keys)
    if rng is not None:
        fold = jax.random.fold_in
        rng = jax.vmap(fold, (0, None))(rng, owner) if rng.ndim else fold(rng, owner)
    where = jnp.full(len(k), offset, jnp.int32) if plan.causal or bias is not None else None
    return k, v, mask, where, rng, bias, None


def _n_steps(plan: flash.Plan) -> int:
    """How many devices' keys a device sees."""
    n = sequence_parts()
    if plan.window is None or plan.n_queries != plan.n_keys:
        return n
    return min(n, 1 - (1 - plan.window) // plan.n_keys)


def _passed_on(tree: Any, by: int = 1) -> Any:
    """What the device had that is so many before, in the ring."""
    n = sequence_parts()
    if by % n == 0:
        return tree
    ways = [(i, (i + by) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, SEQUENCE, ways), tree)


def _by_query(plan: flash.Plan, z: jax.Array) -> jax.Array:
    """Logsumexps in blocks of queries → (B, H, L/n)."""
    return flash.join(tiles.join_group(z, plan.group), plan.n_queries)


def _added(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x.astype(jnp.float32)
