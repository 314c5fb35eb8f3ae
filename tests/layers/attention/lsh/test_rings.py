"""Rings of buckets against the slow and obvious: lists from which the oldest is taken."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layercomb as lc
import layercomb_kernels
from layercomb import tl
from layercomb.layers.attention.lsh import rings
from layercomb.layers.core.mode import Mode

N, R, BUCKETS, C, L = 4, 3, 5, 6, 40  # two rows of two heads


def drawn():
    rng = np.random.default_rng(0)
    return rng.integers(0, BUCKETS, (N, L, R)), rng.random((2, L)) < 0.8


def expected(buckets, mask, lengths):
    """The last C real positions of each bucket, as sets."""
    out = {}
    for n in range(N):
        for r in range(R):
            kept = [[] for _ in range(BUCKETS)]
            for t in range(lengths[n // 2]):
                if mask[n // 2, t]:
                    kept[buckets[n, t, r]].append(t)
            for b in range(BUCKETS):
                out[n, r, b] = set(kept[b][-C:])
    return out


def held(state):
    return {
        at: {int(t) for t in np.asarray(state)[at] if t >= 0} for at in np.ndindex(N, R, BUCKETS)
    }


def filled(buckets, mask, lengths):
    return rings.filled(
        rings.empty(N, R, BUCKETS, C),
        jnp.asarray(buckets, jnp.uint8),
        jnp.asarray(mask),
        jnp.asarray(lengths, jnp.int32),
    )


@pytest.mark.parametrize('lengths', [(L, L), (0, 17), (5, 33)])
def test_refilled_rings_hold_the_last_of_each_bucket(lengths):
    buckets, mask = drawn()
    assert held(filled(buckets, mask, lengths)) == expected(buckets, mask, lengths)


@pytest.mark.parametrize('start', [0, 13])
def test_pushing_goes_on_where_refilling_left_off(start):
    buckets, mask = drawn()
    state, push = filled(buckets, mask, (start, start)), jax.jit(rings.push)
    for t in range(start, L):
        real = jnp.asarray(np.repeat(mask[:, t], 2))
        state, ring = push(state, jnp.asarray(buckets[:, t]), jnp.full(N, t, jnp.int32), real)
        for n, r in np.ndindex(N, R):
            np.testing.assert_array_equal(ring[n, r], state[n, r, buckets[n, t, r]])
    assert held(state) == expected(buckets, mask, (L, L))


def test_padding_behind_a_short_prompt_is_as_if_it_had_never_been():
    layer = tl.LSHSelfAttention(2, n_hashes=2, chunk_len=3, n_buckets=2)
    x = jax.random.normal(jax.random.key(1), (2, 30, 8))
    lengths = jnp.array([4, 19])
    weights, state = layer.init(lc.signature_of((x,)), jax.random.key(0), Mode.PREDICT)
    step = jax.jit(functools.partial(layer.apply, mode=Mode.PREDICT))
    _, state = step(weights, state, (x[:, :19],))  # of row 0 all but 4 are padding
    state = tl.seek(state, lengths)
    (whole,), _ = layer.apply(weights, {}, (x,), mode=Mode.EVAL)
    for i in range(11):
        now = jnp.stack([x[b, lengths[b] + i] for b in range(2)])[:, None]
        (y,), state = step(weights, state, (now,))
        for b in range(2):
            np.testing.assert_allclose(y[b, 0], whole[b, lengths[b] + i], atol=1e-5)


def test_what_a_token_costs_does_not_grow_with_the_room():
    def flops(room):
        layer = tl.LSHSelfAttention(2, n_hashes=2, chunk_len=4, n_buckets=16)
        signature = lc.shape_dtype((1, room, 8))
        weights, _ = jax.eval_shape(lambda key: layer.init((signature,), key), jax.random.key(0))
        state = jax.eval_shape(lambda: lc.init_state(layer, signature))
        step = jax.jit(functools.partial(layer.apply, mode=Mode.PREDICT), donate_argnums=1)
        compiled = step.lower(weights, state, (lc.shape_dtype((1, 1, 8)),)).compile()
        return compiled.cost_analysis()['flops'], compiled.memory_analysis().temp_size_in_bytes

    for how in (contextlib.nullcontext, layercomb_kernels.off):  # only XLA's own work is counted
        with how():
            short, long = flops(64), flops(4096)
        assert long[0] < 1.01 * short[0] and long[1] < 1.01 * short[1] + 1024
