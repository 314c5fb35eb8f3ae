"""What the layers cost: TransformerLM's training step beside one written by hand in plain JAX.

Both compute the same function with the same attention function and the same optimizer; the losses
are checked to agree. They run alternately in one process.

    python benchmarks/overhead.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import machine
import optax

import layercomb as lc
from layercomb import tl
from layercomb.layers.attention.functions import dot_product_attention
from layercomb.supervised import steps

V, D, F, N, H = 256, 256, 1024, 6, 4
B, L = 4, 512
OPTIMIZER = optax.adamw(1e-3)


def norm(w, x):
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    return x * w['scale'] + w['bias']


def heads(w, x):
    return jnp.einsum('bld,dhk->bhlk', x, w['kernel']) + w['bias'][:, None]


def block(x, w):
    a = w['residual']['self_attention']
    h = norm(w['residual']['layer_norm'], x)
    y = dot_product_attention(
        heads(a['query'], h), heads(a['key'], h), heads(a['value'], h), causal=True
    )
    x = x + jnp.einsum('bhlk,hkd->bld', y, a['output']['kernel']) + a['output']['bias']
    up, down = (w['residual_1']['feed_forward'][n] for n in ('dense', 'dense_1'))
    h = norm(w['residual_1']['layer_norm'], x)
    h = jax.nn.gelu(h @ up['kernel'] + up['bias'])
    return x + h @ down['kernel'] + down['bias'], None


def loss(w, batch):
    inputs, targets, weights = batch
    x = w['embedding']['table'][inputs] + w['learned_positions']['table'][:L]
    x, _ = jax.lax.scan(block, x, w['block'])
    logits = norm(w['norm'], x) @ w['head']['kernel'] + w['head']['bias']
    picked = jnp.sum(jnp.where(jnp.arange(V) == targets[..., None], logits, 0), -1)
    nll = jax.nn.logsumexp(logits, -1) - picked
    return jnp.sum(nll * weights) / jnp.sum(weights)


def by_hand(carry, batch):
    """The step by hand, which reports the gradient's norm as the Loop's does."""
    w, opt_state = carry
    value, grads = jax.value_and_grad(loss)(w, batch)
    norm_of_all = optax.global_norm(grads)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, w)
    return (optax.apply_updates(w, updates), opt_state), (value, norm_of_all)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--steps', type=int, default=4, help='steps in a round')
    options = parser.parse_args()
    print(machine.describe('jaxlib', 'optax'))
    net = lc.models.TransformerLM(V, D, F, N, H, max_len=L)
    keys = jax.random.split(jax.random.key(0), 3)
    weights, state = net.init(lc.signature_of(lc.shape_dtype((B, L), 'int32')), keys[0])
    tokens = jax.random.randint(keys[1], (2, B, L), 0, V)
    batch = (tokens[0], tokens[1], jnp.ones((B, L)))
    copy = jax.tree.map(jnp.copy, weights)

    ours = steps.compiled(net, tl.CrossEntropyLoss(), OPTIMIZER, 1, None)
    carry = steps.Carry(weights, state, OPTIMIZER.init(weights), jnp.int32(0))
    _, frozen = lc.trees.partition(weights)
    ours = ours.lower(carry, frozen, keys[2], batch).compile()
    hand = jax.jit(by_hand, donate_argnums=0)
    hand_carry = (copy, OPTIMIZER.init(copy))
    hand = hand.lower(hand_carry, batch).compile()

    flops = [c.cost_analysis()['flops'] for c in (ours, hand)]
    print(f'FLOPs (a scanned block counted once): {flops[0]:.6g} ours, {flops[1]:.6g} by hand, ')
    print(f'  ratio {flops[0] / flops[1]:.4f}  (at most 1.01)')
    carry, metrics = ours(carry, frozen, keys[2], batch)
    hand_carry, (value, _) = hand(hand_carry, batch)
    print(f'first losses: {float(metrics["loss"]):.6f} and {float(value):.6f}')

    times: dict[str, list[tuple[float, float]]] = {'ours': [], 'by hand': []}
    for _ in range(options.rounds):
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(options.steps):
            carry, metrics = ours(carry, frozen, keys[2], batch)
        jax.block_until_ready((carry, metrics))
        times['ours'].append((time.process_time() - cpu, time.perf_counter() - wall))
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(options.steps):
            hand_carry, value = hand(hand_carry, batch)
        jax.block_until_ready((hand_carry, value))
        times['by hand'].append((time.process_time() - cpu, time.perf_counter() - wall))
    for i, what in enumerate(('CPU', 'wall')):
        a, b = ([t[i] / options.steps for t in times[k]] for k in ('ours', 'by hand'))
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        print(
            f'{what} seconds a step, median: {statistics.median(a):.4f} ours, '
            f'{statistics.median(b):.4f} by hand; ratio {ratio:.3f}  (at most 1.05)'
        )


if __name__ == '__main__':
    main()
