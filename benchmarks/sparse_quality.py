"""What sparse layers cost in quality: five models of Python, two seeds.

All are `TerraformerLM` of one shape, with the same data in the same order, optimizer and budget:

* dense: sparsity off, the baseline;
* ff16, ff64: sparse feed-forwards, of which one unit in 16 or 64 works for a position;
* qkv: sparse projections of queries, keys, values and output;
* both: ff64 and qkv.

Sparse layers have more or fewer weights than dense ones by their nature; the numbers are printed.
How they are trained and measured, and what is kept between calls, is in quality.py.

    python benchmarks/sparse_quality.py --out sparse.jsonl [--runs dense/0 ff64/0]

Prints bits per byte at the end and at three quarters, then each difference beside the spread of the
seeds and what is asked for. The default budget takes two hours on two quiet CPU cores.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import quality

from layercomb import models, tl

SIZES = {'vocab_size': 256, 'd_model': 128, 'd_ff': 2048, 'n_layers': 2, 'n_heads': 4}
OFF: dict[str, Any] = {'ff_block_size': None, 'qkv_modules': None, 'head_modules': None}


def model(options: argparse.Namespace, **sparse: int) -> tl.Layer:
    """The baseline, or what `sparse` makes of it."""
    return models.TerraformerLM(
        **SIZES, max_len=options.length, norm=tl.RMSNorm(), **{**OFF, **sparse}
    )


MODELS: quality.Models = {
    'dense': model,
    'ff64': functools.partial(model, ff_block_size=64),
    'qkv': functools.partial(model, qkv_modules=4),
    'both': functools.partial(model, ff_block_size=64, qkv_modules=4),
    'ff16': functools.partial(model, ff_block_size=16),
}
PAIRS = (
    ('ff16', 'dense', None),
    ('ff64', 'dense', 0.02),
    ('qkv', 'dense', 0.02),
    ('both', 'dense', None),
)


def main() -> None:
    parser = quality.parser(__doc__.splitlines()[0], MODELS, steps=2000, length=256, batch=4)
    quality.study(MODELS, PAIRS, SIZES, parser.parse_args())


if __name__ == '__main__':
    main()
