"""Decoding steps in one call: models for them, how they are run, and where their values lie."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import layercomb as lc
from layercomb import Mode, transforms
from layercomb.transforms.fusing.program import Value


def unstacked(net, bits, batch, room):
    """A model of 100 tokens, its weights and a fresh state, in `bits` if any."""
    signature = jax.ShapeDtypeStruct((batch, room), jnp.int32)
    weights = net.init((signature,), jax.random.key(0))[0]
    weights = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), weights
    )
    if bits:
        net, weights = transforms.quantize(net, weights, bits=bits, smallest=1)
    net, weights = transforms.unstack(net, weights)
    return net, weights, lc.init_state(net, signature, Mode.PREDICT)


def steps(net, weights, state, length, batch, n):
    apply = jax.jit(lambda w, s, x: net.apply(w, s, (x,), mode=Mode.PREDICT))
    rng = np.random.default_rng(0)
    for _ in range(n):
        (y,), state = apply(weights, state, jnp.asarray(rng.integers(0, 100, (batch, length))))
        yield y, state


def calls(net, weights, state, batch, length):
    """How many native calls a step has."""
    x = jnp.zeros((batch, length), jnp.int32)
    run = jax.jit(lambda w, s, x: net.apply(w, s, (x,), mode=Mode.PREDICT))
    return run.lower(weights, state, x).as_text().count('custom_call @layercomb_run_program')


def near(a, b, error):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a, b, atol=error * scale, rtol=0)


def check_places(program, outputs):
    """Values that are needed in the same phases lie apart; returns how many have places."""
    phases = program._phases()
    begins, size = program._begins(phases, outputs)
    born, last = {}, {}
    for p, phase in enumerate(phases):
        for each in phase:
            for token in (*each.reads, *each.writes):
                if isinstance(token, Value):
                    born.setdefault(token, p)
                    last[token] = p
    placed = [v for v in born if begins[v.number] >= 0]
    for a, b in itertools.combinations(placed, 2):
        meet = born[a] <= last[b] and born[b] <= last[a]
        at_a, at_b = begins[a.number], begins[b.number]
        apart = at_a + a.width <= at_b or at_b + b.width <= at_a
        assert apart or not meet, (a, b)
    assert all(begins[v.number] + v.width <= size for v in placed)
    return len(placed)
