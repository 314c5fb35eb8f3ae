"""The progress of a run: a live bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from layercomb.errors import require

_SECONDS_BETWEEN_LINES = 10.0


class Throughput:
    """Tokens a second, over the time spent in training steps.

    Tokens are positions whose loss weight is not 0, so padding does not count. An example with one
    weight, as in classification, is one token.

    The clock starts after the first step, which compiles. `pause` stops it for evaluations and
    checkpoints.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._each: float | None = None
        self._together = 0
        self._seconds = self._reported = 0.0
        self._tokens = self._steps = 0
        self._total_steps = 0

    @property
    def paused(self) -> bool:
        """Whether the clock is stopped until the next step is finished."""
        return self._started is None

    def together(self, n: int) -> None:
        """Splits the time since the last call equally among the next `n` steps.

        Args:
          n: how many steps were found finished now.
        """
        if not n:
            return
        now = time.perf_counter()
        self._each = None if self._started is None else (now - self._started) / n
        self._started, self._together = now, n

    def step(self, tokens: int) -> None:
        """Counts a finished step, which has finished now unless `together` announced it.

        Args:
          tokens: its positions whose loss weight is not 0.
        """
        if not self._together:
            self.together(1)
        self._together -= 1
        if self._each is not None:
            self._seconds += self._each
            self._tokens, self._steps = self._tokens + tokens, self._steps + 1
            self._total_steps += 1

    def pause(self) -> None:
        """Stops the clock until the next step is finished; that step is not counted."""
        self._started = None

    def tokens_per_second(self) -> float | None:
        """Tokens a second since the last call; None if no step was timed since then."""
        seconds, tokens = self._seconds - self._reported, self._tokens
        if not self._steps:
            return None
        self._reported, self._tokens, self._steps = self._seconds, 0, 0
        return tokens / max(seconds, 1e-9)

    def seconds_left(self, steps: int) -> float | None:
        """The time that `steps` steps will take, in seconds; None if no step was timed yet."""
        return steps * self._seconds / self._total_steps if self._total_steps else None


class Progress:
    """Shows steps, loss, tokens a second and the time left.

    Args:
      step: where the run starts.
      n_steps: where it ends.
      out: a text stream, by default standard error; False shows nothing. A bar is drawn if it is a
        terminal; else a line appears every ten seconds, and for the first and last row.
    """

    def __init__(self, step: int, n_steps: int, out: TextIO | bool | None = None) -> None:
        self._step, self._n_steps = step, n_steps
        self._out: TextIO | None = None
        if out is not False:
            self._out = sys.stderr if out is None or out is True else out
        self._bar: Any = None
        self._last_line = -_SECONDS_BETWEEN_LINES
        if self._out is not None and self._out.isatty():
            tqdm = require('tqdm', 'train').tqdm
            self._bar = tqdm(
                total=n_steps, initial=step, unit='step', file=self._out, dynamic_ncols=True,
                bar_format='{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}',
            )  # fmt: skip

    def step(self) -> None:
        """Counts a finished step."""
        self._step += 1
        if self._bar is not None:
            self._bar.update()

    def row(self, row: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Shows a row of metrics; an evaluation always gets a line of its own.

        Args:
          row: 'step' and metrics by name; tables are left out.
          seconds_left: the time until the run ends, in seconds; None if it is not known.
        """
        if self._out is None:
            return
        evaluated = [
            name
            for name, value in row.items()
            if name != 'step' and not name.startswith('train/') and not isinstance(value, list)
        ]
        text = _training(row, seconds_left)
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            if evaluated:
                self._bar.write(_evaluation(row, evaluated, self._n_steps), file=self._out)
        elif evaluated or self._due(row['step']):
            print(f'step {row["step"]:,}/{self._n_steps:,}  {text}', file=self._out, flush=True)
            self._last_line = time.monotonic()
            if evaluated:
                print(_evaluation(row, evaluated, self._n_steps), file=self._out, flush=True)

    def close(self) -> None:
        """Closes the bar, which stays visible."""
        if self._bar is not None:
            self._bar.close()

    def _due(self, step: int) -> bool:
        recently = time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES
        return step == self._n_steps or not recently


def _training(row: Mapping[str, Any], seconds_left: float | None) -> str:
    parts = []
    if 'train/loss' in row:
        parts.append(f'loss {row["train/loss"]:.4f}')
    if row.get('train/tokens_per_second') is not None:
        parts.append(f'{row["train/tokens_per_second"]:,.0f} tokens/s')
    if seconds_left is not None:
        parts.append(f'{_clock(seconds_left)} left')
    return '  '.join(parts)


def _evaluation(row: Mapping[str, Any], names: list[str], n_steps: int) -> str:
    values = '  '.join(f'{name} {row[name]:.4f}' for name in names)
    return f'step {row["step"]:,}/{n_steps:,}  {values}'


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
