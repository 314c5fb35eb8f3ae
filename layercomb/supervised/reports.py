"""Reports of a run: `metrics.jsonl`, TensorBoard events and `report.png`.

A row of metrics is a dict: `step`, then names such as `train/loss` and `valid/accuracy`: where it
was measured, and which metric. A value is a number, or lists of lists of numbers for a table (a
confusion matrix). Tables are only in `metrics.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercomb import paths
from layercomb.errors import UsageError, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

_FILE = 'metrics.jsonl'


class MetricsLog:
    """Writes rows of metrics to `metrics.jsonl` and to TensorBoard.

    Args:
      directory: the run's directory.
      step: the step the run starts from. Rows of later steps, logged by a run that was killed
        before it could save, are dropped, so that no step appears twice.

    Raises:
      UsageError: if the directory cannot be written to.
    """

    def __init__(self, directory: str | Path, step: int = 0) -> None:
        self.directory = paths.local(directory, 'directory')
        self._step = step
        self._events: Any = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            path = self.directory / _FILE
            _rewrite(path, [row for row in read_metrics(self.directory) if row['step'] <= step])
            self._file = path.open('a', encoding='utf-8')
        except OSError as e:
            raise UsageError(
                f'cannot write to {str(directory)!r} ({e.strerror}): choose another output_dir'
            ) from None

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row.

        Args:
          row: 'step', and metrics by name; a number that is not finite is written as null.
        """
        self._file.write(_line(row))
        self._file.flush()
        if self._events is None:
            tensorboard = require('tensorboardX', 'train')
            self._events = tensorboard.SummaryWriter(
                str(self.directory),
                purge_step=self._step + 1 if self._step else None,
                filename_suffix=f'.{self._step}',  # names have seconds, and runs may be shorter
            )
        for name, value in row.items():
            if name != 'step' and not isinstance(value, list):
                self._events.add_scalar(name, value, row['step'])

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(run_dir: str | Path) -> list[Row]:
    """Reads the rows of a run's `metrics.jsonl`.

    Args:
      run_dir: the output directory of a run.

    Returns:
      The rows, in order; [] if there is no such file. Lines that cannot be parsed, such as one that
      a killed process left unfinished, are left out.
    """
    path = paths.local(run_dir, 'run_dir') / _FILE
    rows = []
    for line in path.read_text('utf-8', 'replace').splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.append({**row, 'step': int(row['step'])})
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def write_report(run_dir: str | Path) -> Path | None:
    """Draws `report.png`: every metric of `metrics.jsonl` against the step.

    Args:
      run_dir: the output directory of a run.

    Returns:
      The picture's path; None if there are no metrics.
    """
    path = paths.local(run_dir, 'run_dir') / 'report.png'
    rows = read_metrics(path.parent)
    if not rows:
        return None
    unfinished = path.with_name('.report.png')  # so that a killed run leaves no half a picture
    with warnings.catch_warnings():  # what the font lacks becomes a box: the run's name, a task's
        warnings.filterwarnings('ignore', r'Glyph \d+ .*missing from')
        draw(rows, paths.shown(path.parent.name)).savefig(unfinished, dpi=150, format='png')
    os.replace(unfinished, path)
    return path


def draw(rows: Sequence[Row], title: str) -> Figure:
    """A figure of the loss across the top and of each other metric below it.

    Args:
      rows: rows of metrics, by step.
      title: the title above.

    Returns:
      A matplotlib figure, 11 inches wide, independent of pyplot's state.
    """
    figure_module = require('matplotlib.figure', 'train')
    series = _series(rows)
    labels = sorted({name.split('/')[-1] for name in series}, key=_rank)
    n_below = len(labels) - 1
    columns = min(3, max(1, n_below))
    n_rows = 1 + math.ceil(n_below / columns)
    height = 5.0 + 2.6 * (n_rows - 1)
    figure = figure_module.Figure(figsize=(11, height), layout='constrained', facecolor='white')
    figure.get_layout_engine().set(
        rect=(0.012, 0.1 / height, 0.976, 1 - 0.75 / height), w_pad=0.12, h_pad=0.12
    )
    grid = figure.add_gridspec(n_rows, columns, height_ratios=[1.6] + [1] * (n_rows - 1))
    places = [grid[0, :]] + [grid[1 + i // columns, i % columns] for i in range(n_below)]
    for label, place in zip(labels, places, strict=True):
        axes = figure.add_subplot(place)
        _plot(axes, label, {n: series[n] for n in sorted(series) if n.split('/')[-1] == label})
        _dress(axes, label, last_step=rows[-1]['step'], wide=label == labels[0])
    y = 1 - 0.28 / height
    figure.text(0.026, y, title, fontsize=16, fontweight='bold', color=_INK, va='center')
    figure.text(
        0.974, y, _summary(rows, labels), fontsize=9.5, color=_FAINT, va='center', ha='right'
    )
    for text in figure.findobj(require('matplotlib.text', 'train').Text):
        text.set_parse_math(False)  # a name with two dollar signs is no formula
    return figure


_INK, _FAINT, _GRID = '#1f2430', '#6b7280', '#e5e7eb'
_COLORS = ('#2563eb', '#ea580c', '#059669', '#9333ea', '#ca8a04', '#db2777')
_ORDER = ('loss', 'bits_per_byte', 'perplexity', 'accuracy')
_LAST = ('grad_norm', 'learning_rate', 'tokens_per_second')
_LOGARITHMIC = ('perplexity', 'grad_norm')


def _rank(label: str) -> tuple[int, str]:
    """The place of a metric in the report: loss first, speed last."""
    if label in _ORDER:
        return _ORDER.index(label), label
    return (len(_ORDER) + 1 + _LAST.index(label) if label in _LAST else len(_ORDER)), label


def _series(rows: Iterable[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> steps and values, where the value is a finite number."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != 'step' and isinstance(value, (int, float)) and math.isfinite(value):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row['step'])
                values.append(float(value))
    return series


def _plot(axes: Axes, label: str, lines: Mapping[str, tuple[list[int], list[float]]]) -> None:
    """Draws each line in the colour of its group, the first part of its name."""
    evaluations = (name for name in lines if not name.startswith('train/'))
    colors = dict(zip(evaluations, _COLORS[1:] * len(lines), strict=False))
    for name, (steps, values) in lines.items():
        color = colors.get(name, _COLORS[0])
        said = f'{name.split("/")[0]}  {_short(values[-1])}'
        if len(steps) >= 40 and label != 'learning_rate':
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
            values = _smooth(values)
        marker = 'o' if len(steps) < 40 else None
        axes.plot(
            steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, label=said
        )
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor='linecolor', loc='upper right')
    else:
        axes.set_title(said.split()[-1], loc='right', fontsize=9.5, color=color, pad=8)
    if label in _LOGARITHMIC and all(min(values) > 0 for _, values in lines.values()):
        axes.set_yscale('log')
        ticker = require('matplotlib.ticker', 'train')
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter('')
    if label == 'tokens_per_second':
        axes.set_ylim(bottom=0)


def _dress(axes: Axes, label: str, last_step: int, wide: bool) -> None:
    axes.set_title(
        label.replace('_', ' '), loc='left', fontsize=12 if wide else 10.5, color=_INK, pad=8
    )
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ('top', 'right', 'left'):
        axes.spines[side].set_visible(False)
    axes.spines['bottom'].set_color(_GRID)
    axes.tick_params(which='both', colors=_FAINT, labelsize=8.5, length=0)
    axes.set_xlim(-0.015 * last_step, 1.015 * last_step)
    ticker = require('matplotlib.ticker', 'train')
    axes.xaxis.set_major_locator(ticker.MaxNLocator(10 if wide else 5, integer=True))
    axes.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
    axes.yaxis.set_major_formatter(lambda y, _: _short(y))
    if wide:
        axes.set_xlabel('step', fontsize=9, color=_FAINT)


def _summary(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """The last values of the metrics: 'step 2,000 · train loss 1.53 · valid loss 1.61'."""
    parts = [f'step {rows[-1]["step"]:,}']
    last = {name: values[-1] for name, (_, values) in _series(rows).items()}
    for label in labels:
        if label not in _LAST:
            parts += [
                f'{name.replace("/", " ").replace("_", " ")} {_short(value)}'
                for name, value in last.items()
                if name.split('/')[-1] == label
            ]
    return '  ·  '.join(parts)


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving mean over a fortieth of the curve around each point, narrower at its ends."""
    half = max(1, len(values) // 80)
    smooth = []
    for i in range(len(values)):
        around = values[i - min(i, half) : i + min(i, half) + 1]
        smooth.append(math.fsum(around) / len(around))
    return smooth


def _short(value: float) -> str:
    """Four digits: 1.534, 0.0003, 12,300."""
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + '\n'


def _rewrite(path: Path, rows: Sequence[Row]) -> None:
    """Replaces the rows in `path` atomically."""
    if not path.exists() and not rows:
        return
    unfinished = path.with_name(f'.{path.name}')
    unfinished.write_text(''.join(map(_line, rows)), encoding='utf-8')
    os.replace(unfinished, path)
