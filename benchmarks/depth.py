"""What depth costs before anything runs: tracing, compiling and the size of the program.

A training step of TransformerLM at 6 and at 48 layers, each in a process of its own, alternately.

    python benchmarks/depth.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import machine

WIDTH = {'vocab_size': 256, 'd_model': 128, 'd_ff': 512, 'n_heads': 4, 'max_len': 256}


def measure(n_layers: int) -> dict[str, float]:
    """Seconds to trace `init`, seconds and size of the compiled training step."""
    import jax
    import jax.numpy as jnp
    import optax

    import layercomb as lc
    from layercomb import tl
    from layercomb.supervised import steps

    net = lc.models.TransformerLM(n_layers=n_layers, dropout=0.1, **WIDTH)
    tokens = lc.shape_dtype((2, 256), 'int32')
    key = jax.eval_shape(jax.random.key, 0)
    start = time.perf_counter()
    weights, state = jax.eval_shape(lambda key: net.init((tokens,), key), key)
    init = time.perf_counter() - start
    optimizer = optax.adamw(1e-3)
    opt_state = jax.eval_shape(optimizer.init, weights)
    carry = steps.Carry(weights, state, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    batch = (tokens, tokens, lc.shape_dtype((2, 256)))
    step = steps.compiled(net, tl.CrossEntropyLoss(), optimizer, 1, None)
    start = time.process_time()
    _, frozen = lc.trees.partition(weights)
    compiled = step.lower(carry, frozen, key, batch).compile()
    return {
        'init': init,
        'compile': time.process_time() - start,
        'lines': compiled.as_text().count('\n'),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--layers', type=int, help='measure one depth and print JSON')
    options = parser.parse_args()
    if options.layers:
        print(json.dumps(measure(options.layers)))
        return
    print(machine.describe('jaxlib'))
    found: dict[int, list[dict[str, float]]] = {6: [], 48: []}
    for _ in range(options.rounds):
        for n in found:
            out = subprocess.run(
                [sys.executable, __file__, '--layers', str(n)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            found[n].append(json.loads(out.stdout))
    for what, unit in (('init', 's to trace init'), ('compile', 'CPU s to compile a step'),
                       ('lines', 'lines of optimized HLO')):  # fmt: skip
        low, high = (statistics.median(row[what] for row in found[n]) for n in (6, 48))
        print(f'{unit}: {low:.4g} at 6 layers, {high:.4g} at 48; ratio {high / low:.3f}')


if __name__ == '__main__':
    main()
