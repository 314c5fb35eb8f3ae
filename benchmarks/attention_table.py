"""One table and one picture of what attention_quality.py and recall.py found.

    pip install -e '.[train]'
    python benchmarks/attention_table.py --quality attention.jsonl --recall recall.jsonl \\
        --picture docs/attention.svg

A row for each kind of attention: keys that a query sees at most, bits per byte of text, the share
of pairs recalled, and CPU seconds of a step on text. The picture has both against the keys seen,
with the front of kinds that no other beats by fewer keys and a better figure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import attentions
import matplotlib.pyplot as plt

ALL = 512  # keys that full attention sees in a text of this length, at most


def quality(path: Path) -> dict[str, tuple[float, float]]:
    """Bits per byte and CPU seconds a step of each kind, from its last row; the mean over seeds."""
    last: dict[str, dict[str, Any]] = {}
    for row in map(json.loads, path.read_text('utf-8').splitlines()):
        if row['run'].rpartition('/')[0] in attentions.KINDS and row['step'] == _steps(row):
            last[row['run']] = row
    found: dict[str, list[tuple[float, float]]] = {}
    for run, row in last.items():
        kind = run.rpartition('/')[0]
        found.setdefault(kind, []).append((row['bits'], row['cpu_s'] / row['step']))
    return {kind: _means(seeds) for kind, seeds in found.items()}


def _steps(row: dict[str, Any]) -> int:
    return row['settings']['steps']


def _means(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return sum(first) / len(first), sum(second) / len(second)


def recall(path: Path, length: int) -> dict[str, tuple[float, float]]:
    """The share of pairs recalled at the trained length, and at four times that, of each kind."""
    rows = map(json.loads, path.read_text('utf-8').splitlines())
    return {
        row['kind']: (row['right'], row['four'])
        for row in rows
        if row['task'] == 'pairs' and row['length'] == length
    }


def table(text: dict[str, Any], pairs: dict[str, Any]) -> None:
    """Prints a row for each kind that was measured."""
    print('| attention | keys at most | bits per byte | recalled | at four times | CPU s a step |')
    print('|---|---:|---:|---:|---:|---:|')
    for kind, made in attentions.KINDS.items():
        if kind in text or kind in pairs:
            bits, cpu = (f'{x:.3f}' for x in text[kind]) if kind in text else ('', '')
            right, four = (f'{x:.3f}' for x in pairs[kind]) if kind in pairs else ('', '')
            print(f'| {kind} | {made.keys or "all"} | {bits} | {right} | {four} | {cpu} |')


def draw(path: Path, text: dict[str, Any], pairs: dict[str, Any]) -> None:
    """Writes the picture."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    panels = (
        (text, 'bits per byte of text (less is better)', -1),
        (pairs, 'share of pairs recalled (more is better)', 1),
    )
    for axis, (found, label, sign) in zip(axes, panels, strict=True):
        points = sorted((attentions.KINDS[k].keys or ALL, x[0], k) for k, x in found.items())
        axis.scatter([x for x, *_ in points], [y for _, y, _ in points])
        for x, y, kind in points:
            side = 'right' if x == ALL else 'left'
            axis.annotate(f' {kind} ', (x, y), ha=side, va='center', fontsize=7)
        front, best = [], -float('inf')
        for x, y, _ in sorted(points, key=lambda point: (point[0], -sign * point[1])):
            if sign * y > best:
                best = sign * y
                front.append((x, y))
        axis.plot(*zip(*front, strict=True), alpha=0.5)
        axis.set(xlabel='keys that a query sees at most', ylabel=label, xscale='log')
        axis.set_xticks([64, 96, 128, 256, ALL], ['64', '96', '128', '256', 'all'])
        axis.minorticks_off()
        axis.margins(0.1)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--quality', type=Path, required=True)
    parser.add_argument('--recall', type=Path, required=True)
    parser.add_argument('--length', type=int, default=256, help='of the pairs')
    parser.add_argument('--picture', type=Path, help='where to draw it')
    options = parser.parse_args()
    text, pairs = quality(options.quality), recall(options.recall, options.length)
    table(text, pairs)
    if options.picture:
        draw(options.picture, text, pairs)


if __name__ == '__main__':
    main()
