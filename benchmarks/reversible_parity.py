"""What reversible blocks and LSH attention cost in quality: four models of Python, two seeds.

The models have the same sizes, data in the same order, optimizer and budget:

* standard: `TransformerLM` with full attention, the baseline;
* reversible: `ReformerLM` with the same full attention, so that the blocks alone differ;
* lsh: `ReformerLM` with LSH attention of 8 hashes in every layer, so that against *reversible* the
  attention alone differs. That full attention has separate keys and sees everything, which asks
  more of LSH than shared-QK attention would;
* shared: the same with one bucket and one chunk, which is full attention with shared queries and
  keys: what of the difference is due to sharing, and what to hashing.

Parameters cannot be quite equal: the head reads both streams of a reversible model, and LSH
attention has no projection of keys. The numbers are printed.

How they are trained and measured, and what is kept between calls, is in quality.py.

    python benchmarks/reversible_parity.py --out parity.jsonl [--runs standard/0 lsh/1]

Prints bits per byte at the end and at three quarters, then each difference beside the spread of the
seeds and what is asked for: the mean over the seeds is to be worse by no more than 1 or 2 %. The
default budget, 4.9 million tokens a run, takes an hour and a half on two quiet CPU cores.
"""

from __future__ import annotations

import argparse

import quality

from layercomb import models, tl

SIZES = {'vocab_size': 256, 'd_model': 128, 'd_ff': 512, 'n_layers': 4, 'n_heads': 2}


def standard(options: argparse.Namespace) -> tl.Layer:
    """The baseline."""
    length = options.length
    return models.TransformerLM(**SIZES, max_len=length, positions='rotary', norm=tl.RMSNorm())


def reversible(options: argparse.Namespace) -> tl.Layer:
    """Reversible blocks with the baseline's attention."""
    return _reformer(options.length, tl.SelfAttention(SIZES['n_heads']))


def lsh(options: argparse.Namespace) -> tl.Layer:
    """Reversible blocks with LSH attention."""
    attention = tl.LSHSelfAttention(
        SIZES['n_heads'], n_hashes=8, chunk_len=options.chunk_len, n_buckets=options.n_buckets
    )
    return _reformer(options.length, attention)


def shared(options: argparse.Namespace) -> tl.Layer:
    """Reversible blocks with full attention whose queries are its keys."""
    attention = tl.LSHSelfAttention(
        SIZES['n_heads'], n_hashes=1, chunk_len=options.length, n_buckets=1
    )
    return _reformer(options.length, attention)


def _reformer(length: int, attention: tl.Layer) -> tl.Layer:
    return models.ReformerLM(
        **SIZES, max_len=length, positions='rotary', norm=tl.RMSNorm(), attention=attention,
        ff_chunk_len=None,
    )  # fmt: skip


MODELS: quality.Models = {
    'standard': standard,
    'reversible': reversible,
    'lsh': lsh,
    'shared': shared,
}
PAIRS = (
    ('reversible', 'standard', 0.01),
    ('lsh', 'reversible', 0.02),
    ('lsh', 'shared', 0.02),
    ('lsh', 'standard', None),
    ('shared', 'reversible', None),
)


def main() -> None:
    parser = quality.parser(__doc__.splitlines()[0], MODELS, steps=2400)
    parser.add_argument('--chunk-len', type=int, default=64, help='of LSH attention')
    parser.add_argument('--n-buckets', type=int, default=8, help='of LSH attention')
    quality.study(MODELS, PAIRS, SIZES, parser.parse_args())


if __name__ == '__main__':
    main()
