"""Input and output of commands: prompts, streamed text, results."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layercomb import paths
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError, UsageWarning, machine_errors, usage_errors
from layercomb.launcher import runs
from layercomb.launcher.training import devices
from layercomb.layers.facts import processes
from layercomb.model import Model

if TYPE_CHECKING:
    from layercomb.launcher.experiment import Experiment
    from layercomb.supervised import Loop


@contextlib.contextmanager
def any_console() -> Iterator[None]:
    """Inside the context, standard output and error accept any text, without encoding errors.

    A character that their encoding lacks becomes '?', and on standard error an escape such as
    '\\u20ac'. If a stream is missing (a Windows program without a console) or closed, text is
    dropped. Afterwards the streams are as before.
    """
    with contextlib.ExitStack() as stack:
        for name, errors in (('stdout', 'replace'), ('stderr', 'backslashreplace')):
            stream: Any = getattr(sys, name)
            if stream is None or getattr(stream, 'closed', False):
                nowhere = stack.enter_context(open(os.devnull, 'w', encoding='utf-8'))
                stack.callback(setattr, sys, name, stream)
                setattr(sys, name, nowhere)
            elif hasattr(stream, 'reconfigure'):
                stack.callback(_give_back, stream, stream.errors)
                stream.reconfigure(errors=errors)
        yield


def flush() -> None:
    """Flushes standard output now, so that a full disk or a closed pipe can still be reported."""
    sys.stdout.flush()


def check_text(text: str, what: str) -> None:
    """Raises a UsageError if an argument of the command line was not UTF-8.

    Args:
      text: the argument.
      what: what the message calls it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f'{what} {text!r} is no UTF-8: check the encoding of the terminal'
        ) from None


def read_prompt(text: str | None, file: str | None, from_stdin: bool) -> str:
    """Reads the prompt from exactly one source.

    Args:
      text: the prompt itself, or None.
      file: the path of a file in UTF-8, or None.
      from_stdin: whether to read standard input.

    Raises:
      UsageError: if no source or several are given, it cannot be read, or it is empty.
    """
    if (text is not None) + (file is not None) + from_stdin != 1:
        raise UsageError("give one of --prompt TEXT, --prompt_file FILE, or '-' (standard input)")
    if from_stdin:
        text = _standard_input()
    elif file is not None:
        text = runs.read_text(paths.local(file, '--prompt_file'))
    if not text:
        raise UsageError('the prompt is empty: give at least one character to continue')
    check_text(text, 'the prompt')
    return text


def _standard_input() -> str:
    """All of standard input, with every line end as a newline.

    Bytes are decoded as UTF-8, or if they are not, in the encoding that the stream declares.
    """
    stream = sys.stdin
    if stream is None or stream.closed:
        raise UsageError('there is no standard input: give --prompt TEXT or --prompt_file FILE')
    with machine_errors('give --prompt TEXT or --prompt_file FILE'):
        given: str | bytes = (getattr(stream, 'buffer', None) or stream).read()
    text = given if isinstance(given, str) else _decoded(given, stream.encoding or 'ascii')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def _decoded(given: bytes, declared: str) -> str:
    try:
        return given.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        try:
            return given.decode(declared)
        except UnicodeDecodeError:
            cause = f'standard input: {runs.not_utf8(e)}'
            raise UsageError(f'{cause}: convert it to UTF-8') from None


def until(tokens: Iterator[np.ndarray], ends: Collection[int]) -> Iterator[np.ndarray]:
    """Yields tokens (1,) up to the first that ends an answer, which is left out.

    Args:
      tokens: (1,) token ids.
      ends: those that end an answer.
    """
    return itertools.takewhile(lambda token: int(token[0]) not in ends, tokens)


def write_stream(prompt: Sequence[int], tokens: Iterator[np.ndarray], tokenizer: Any) -> None:
    """Prints a prompt and its continuation as it is made, then its speed on standard error.

    Args:
      prompt: token ids that are continued; they are decoded together with what follows.
      tokens: yields (1,) token ids.
      tokenizer: turns tokens into text, see `data.Tokenizer`.
    """
    tokenizer = adapted(tokenizer, must_decode=True)
    decoder = tokenizer.incremental_decoder()
    print(_text(decoder, prompt), end='', flush=True)
    started, n = time.perf_counter(), 0
    first = started
    for token in tokens:
        n += 1
        first = time.perf_counter() if n == 1 else first
        if token[0] != tokenizer.eos_id:
            print(_text(decoder, token), end='', flush=True)
    print(_text(decoder, [], final=True))
    seconds = time.perf_counter() - first
    speed = f', then {(n - 1) / seconds:.1f} tokens a second' if n > 1 else ''
    print(f'{n} tokens: the first after {first - started:.2f} s{speed}', file=sys.stderr)


def write_text(prompt: Sequence[int], tokens: np.ndarray, tokenizer: Any) -> None:
    """Prints a prompt and its continuation, up to the first `eos_id`.

    Args:
      prompt: token ids.
      tokens: (T,) token ids that continue it.
      tokenizer: turns tokens into text, see `data.Tokenizer`.
    """
    tokenizer = adapted(tokenizer, must_decode=True)
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    made = tokens[: ends[0]] if ends.size else tokens
    print(_text(tokenizer.incremental_decoder(), [*prompt, *made], final=True))


def write_measured(measured: Mapping[str, Any]) -> None:
    """Prints metrics, one line each: name and number. A table is its name and a line for each row.

    Args:
      measured: what `evaluate` returned.
    """
    for name, value in measured.items():
        if not isinstance(value, list):
            print(f'{name} {value:.6g}')
            continue
        rows = [[f'{x:.6g}' for x in row] for row in value]
        width = max(len(x) for row in rows for x in (*row, str(len(rows) - 1)))
        print(f'{name}, a row a target, a column a found class:')
        for i, row in enumerate([[str(i) for i in range(len(rows))], *rows]):
            label = '' if i == 0 else str(i - 1)
            print('  '.join(x.rjust(width) for x in (label, *row)))


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows a `UsageWarning` in one line, without the place in the program that it comes from."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, UsageWarning):
                print(f'layercomb: {message}', file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = shown
        yield


def stop_writing() -> None:
    """Drops further standard output, after its reader has closed the pipe (``| head``)."""
    _to_nowhere(sys.stdout)


def write_result(experiment: Experiment, loop: Loop, row: dict[str, Any], directory: Path) -> None:
    """Prints the result of a run: metrics, a comparison with byte models, and a sample.

    Args:
      experiment: what was run.
      loop: the `Loop` that ran it.
      row: the last row of its metrics.
      directory: the run's directory.
    """
    numbers = [f'{k} {v:.4g}' for k, v in row.items() if k != 'step' and not isinstance(v, list)]
    print(f'\nstep {row["step"]}: ' + ', '.join(numbers))
    if experiment.baseline_text is not None and processes.is_alone():
        from layercomb.data import witten_bell_bits_on_batches

        same_text = experiment.eval_tasks[0].batches()
        bits = witten_bell_bits_on_batches(experiment.baseline_text, same_text)
        orders = ' / '.join(map(str, bits))
        values = ' / '.join(f'{b:.2f}' for b in bits.values())
        print(f'beside it, Witten–Bell byte models of order {orders}: {values} bits per byte')
    weights = None if experiment.sample_prompt is None else devices.on_one(loop.weights)
    if weights is not None:
        from layercomb.supervised import decoding
        from layercomb.supervised.decoding.prompts import given

        model = Model(experiment.net, weights, devices.on_one(loop.state))
        tokenizer, prompt = adapted(experiment.tokenizer), experiment.sample_prompt or ''
        start = given(model, prompt, tokenizer)
        tokens = decoding.generate(
            model,
            n_tokens=experiment.sample_tokens,
            temperature=experiment.sample_temperature,
            eos_id=tokenizer.eos_id,
            **start,
        )[0]
        print('\na sample:')
        if 'inputs' in start:
            print(prompt)
        write_text([] if 'inputs' in start else start['prompts'][0], tokens, tokenizer)
    elif experiment.sample_prompt is not None:
        print(f'\na sample: layercomb generate {directory}')
    print(f'\nkept in {directory}: report.png, metrics.jsonl, checkpoints, TensorBoard events')


def _give_back(stream: Any, errors: str) -> None:
    """Restores a stream's handling of encoding errors; drops text that it cannot write."""
    try:
        stream.reconfigure(errors=errors)
    except (OSError, ValueError):
        _to_nowhere(stream)


def _to_nowhere(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):  # one in memory has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _text(decoder: Any, tokens: Any, final: bool = False) -> str:
    with usage_errors():  # an id beyond the tokenizer's, where the model's vocabulary is larger
        return decoder.decode([int(i) for i in tokens], final=final)
