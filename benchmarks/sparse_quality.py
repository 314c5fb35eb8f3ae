"""What sparse layers cost in quality, and what they read: models of Python, alike but for one part.

All are `TerraformerLM` of one shape, with the same data in the same order, optimizer and budget.
The feed-forwards have 2,048 units, of which a token uses 1/4, 1/8, 1/16 or 1/64:

* dense, dense-relu2: all units, with ReLU, and the same with ReLU² for an activation;
* mixture-8 and others: `MixtureFF`, experts with ReLU, one in 8 shared or chosen; mixture-64
  learns as a denser one in the first 60 % of its steps;
* units-8 and others: `SparseFF`, one unit of each 8;
* small-8 and others: a dense feed-forward of as many weights as mixture-8 reads for a token, its
  router included;
* qkv, both: sparse projections of queries, keys and values; with units-64 too.

How they are trained and measured, and what is kept between calls, is in quality.py.

    python benchmarks/sparse_quality.py --out sparse.jsonl [--runs dense/0 mixture-8/0]
        [--picture docs/sparse.svg]

Prints bits per byte at the end and at three quarters, each difference beside the spread of the
seeds and what is asked for, and the share of choices of the experts of each mixture that was
trained in this call. One seed of the curve takes two hours on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import quality

from layercomb import models, tl

D_MODEL, D_FF = 128, 2048
SIZES = {'vocab_size': 256, 'd_model': D_MODEL, 'n_layers': 2, 'n_heads': 4}
OFF: dict[str, Any] = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}
# Of one unit in so many: experts in all, chosen, shared.
EXPERTS = {4: (64, 14, 2), 8: (64, 7, 1), 16: (64, 3, 1), 64: (64, 1, 0)}


def model(options: argparse.Namespace, d_ff: int = D_FF, **given: Any) -> tl.Layer:
    """The baseline, or what `given` makes of it."""
    made = {**OFF, **given}
    return models.TerraformerLM(
        **SIZES, d_ff=d_ff, max_len=options.length, norm=tl.RMSNorm(), **made
    )


def mixture(share: int) -> tl.MixtureFF:
    """One unit in `share`, the shared ones included."""
    n_experts, n_chosen, n_shared = EXPERTS[share]
    return tl.MixtureFF(D_FF, n_experts, n_chosen, n_shared, activation='relu', gated=False)


def one_of_many() -> tl.MixtureFF:
    """One expert of 64, by a softmax; `DENSER` says how it begins."""
    return tl.MixtureFF(
        D_FF, *EXPERTS[64], activation='relu', gated=False, routing='softmax', scale=4.0,
        balance_bias=False, balance=0.01,
    )  # fmt: skip


def n_read(layer: tl.MixtureFF) -> int:
    """The weights of a mixture that a token reads, its router included."""
    units = (layer.n_chosen + layer.n_shared) * layer.d_ff // layer.n_experts
    return D_MODEL * (2 * units + layer.n_experts - layer.n_shared)


def as_small(share: int) -> int:
    """Units of a dense feed-forward that has as many weights as a mixture reads."""
    return -(-n_read(mixture(share)) // (2 * D_MODEL))


MODELS: quality.Models = {
    'dense': model,
    'dense-relu2': functools.partial(model, activation='relu2'),
    **{f'mixture-{n}': functools.partial(model, ff=mixture(n)) for n in (4, 8, 16)},
    'mixture-64': functools.partial(model, ff=one_of_many()),
    **{f'small-{n}': functools.partial(model, d_ff=as_small(n)) for n in EXPERTS},
    **{f'units-{n}': functools.partial(model, ff_block_size=n) for n in EXPERTS},
    'qkv': functools.partial(model, qkv_modules=4),
    'both': functools.partial(model, ff_block_size=64, qkv_modules=4),
}
DENSER: quality.Denser = {'mixture-64': ((0.2, 64), (0.4, 16), (0.6, 4))}
LIMITS = {4: None, 8: 0.02, 16: 0.04, 64: 0.06}
PAIRS = (
    ('dense-relu2', 'dense', None),
    *((f'mixture-{n}', 'dense', limit) for n, limit in LIMITS.items()),
    *((f'mixture-{n}', f'small-{n}', 0.0) for n in EXPERTS),
    *((f'units-{n}', 'dense', None) for n in EXPERTS),
    ('qkv', 'dense', 0.02),
    ('both', 'dense', None),
)


def draw(path: Path, done: quality.Done, steps: int) -> None:
    """The curve: bits per byte against the share of the feed-forward's weights that a token reads.

    Of `SparseFF` the controller, of a mixture the router is among what is read.
    """
    import matplotlib.pyplot as plt

    whole, rank = 2 * D_FF * D_MODEL, 16
    read = {
        'mixture': {n: n_read(mixture(n)) for n in EXPERTS},
        'small': {n: as_small(n) * 2 * D_MODEL for n in EXPERTS},
        'units': {n: whole // n + rank * (D_MODEL + D_FF) for n in EXPERTS},
    }
    labels = {'mixture': 'mixture of experts', 'small': 'small and dense', 'units': 'SparseFF'}
    figure, axis = plt.subplots(figsize=(7, 4.5), layout='constrained')

    def bits(name: str) -> float | None:
        found = [rows[steps]['bits'] for run, rows in done.items() if _of(run, name, rows, steps)]
        return sum(found) / len(found) if found else None

    for kind, sizes in read.items():
        points = [(sizes[n] / whole, bits(f'{kind}-{n}')) for n in EXPERTS]
        known = [(x, y) for x, y in points if y is not None]
        if known:
            axis.plot(*zip(*known, strict=True), marker='o', label=labels[kind])
    for name, style in (('dense', '--'), ('dense-relu2', ':')):
        if (y := bits(name)) is not None:
            axis.axhline(y, linestyle=style, color='gray', label=f'all units, {name}')
    axis.set(xscale='log', ylabel='bits per byte of text (less is better)')
    axis.set_xlabel("the feed-forward's weights that a token reads, router included")
    axis.set_xticks([1 / n for n in (4, 8, 16, 32, 64)], ['1/4', '1/8', '1/16', '1/32', '1/64'])
    axis.minorticks_off()
    axis.legend()
    figure.savefig(path)


def _of(run: str, name: str, rows: dict[int, quality.Row], steps: int) -> bool:
    return run.rpartition('/')[0] == name and steps in rows


def main() -> None:
    parser = quality.parser(__doc__.splitlines()[0], MODELS, steps=2000, length=256, batch=4)
    parser.add_argument('--picture', type=Path, help='where to draw the curve')
    options = parser.parse_args()
    picture = options.picture
    del options.picture  # it is no setting of a run
    done = quality.study(MODELS, PAIRS, {**SIZES, 'd_ff': D_FF}, options, DENSER)
    if picture:
        draw(picture, done, options.steps)


if __name__ == '__main__':
    main()
