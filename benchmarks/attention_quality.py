"""What each kind of attention costs in quality: models of Python, trained alike.

One model, a reversible one of d_model 128 with 4 layers and 2 heads, as `reversible` in
reversible_parity.py, whose attention alone differs; data in the same order, optimizer and budget.
The kinds are those of attentions.py. A query of most sees 96 keys at most; of the two full ones it
sees all, of shared LSH 256, and of 4 rounds of 64 beside 64 near ones 320. On text of this length a
window as wide does as well as anything, so this says whether an attention *harms*; recall.py says
whether its reach helps.

How they are trained and measured, and what is kept between calls, is in quality.py.

    python benchmarks/attention_quality.py --out attention.jsonl [--runs 'full/0' 'local 96/0']

Prints bits per byte, and the difference from `full`, a plain `SelfAttention`: at most 1.5 % is
asked of the default, by the mean over two seeds. A run takes 10 to 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import functools

import attentions
import quality

from layercomb import models, tl

SIZES = {'vocab_size': 256, 'd_model': 128, 'd_ff': 512, 'n_layers': 4, 'n_heads': 2}
DEFAULT = 'mixed 5 + 3 x 8 + local 32'


def model(kind: str, options: argparse.Namespace) -> tl.Layer:
    """The reversible model with one kind of attention."""
    length = options.length
    attention = attentions.KINDS[kind].make(SIZES['n_heads'], length)
    return models.ReformerLM(
        **SIZES, max_len=length, positions='rotary', norm=tl.RMSNorm(), attention=attention,
        ff_chunk_len=None,
    )  # fmt: skip


MODELS: quality.Models = {kind: functools.partial(model, kind) for kind in attentions.KINDS}
PAIRS = [
    (kind, 'full', 0.015 if kind == DEFAULT else None)
    for kind in attentions.KINDS
    if kind != 'full'
]


def main() -> None:
    parser = quality.parser(__doc__.splitlines()[0], MODELS, steps=2400)
    quality.study(MODELS, PAIRS, SIZES, parser.parse_args())


if __name__ == '__main__':
    main()
