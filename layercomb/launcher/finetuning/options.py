"""The options of ``layercomb finetune``, and the plan that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from layercomb import paths
from layercomb.errors import UsageError, usage_errors
from layercomb.launcher import pretrained
from layercomb.launcher.finetuning.plan import ABOUT, CHAT, INSTRUCTIONS, PREFERENCES, TEXT, Plan
from layercomb.launcher.sources import GGUF, HUGGING_FACE, Source

MINUTES = 5.0
_LENGTH = 512
_SHORT = 256  # of questions about the library, for more steps in the same time
_RANK = 16
_REHEARSED = 0.25  # of a row of questions about the library
_TABLES = ('.jsonl', '.ndjson', '.jsonl.gz', '.ndjson.gz', '.json', '.json.gz', '.parquet')
_OF_ADAPTERS = ('rank', 'alpha', 'dora', 'bits')


def plan(options: argparse.Namespace) -> Plan:
    """Makes a plan of the options of the command; nothing is written.

    Args:
      options: of the command ``finetune``.

    Raises:
      UsageError: for options that cannot be, or not together; for a model or data that is not
        there, or does not fit.
    """
    _check_together(options)
    kind, given = _data(options)
    source, directory = _source(options, given)
    rank = None if options.all_weights else options.rank or _RANK
    return Plan(
        source=source,
        kind=kind,
        data=None if given is None else str(given),
        directory=directory,
        length=_length(options.length, source, directory, _SHORT if kind == ABOUT else _LENGTH),
        batch_size=options.batch_size or 1,
        learning_rate=_learning_rate(options, kind),
        rank=rank,
        alpha=2.0 * (rank or 0) if options.alpha is None else options.alpha,
        dora=options.dora,
        bits=options.bits,
        reversible=options.reversible,
        remat=options.remat,
        rehearse=_rehearsed(options, kind),
        steps=options.steps,
        minutes=options.minutes or MINUTES,
    )


def _check_together(options: argparse.Namespace) -> None:
    """Refuses numbers that cannot be, and options that mean nothing together."""
    for name in ('steps', 'minutes', 'rank', 'alpha', 'length', 'batch_size', 'learning_rate'):
        value = getattr(options, name)
        least = 2 if name == 'length' else 0
        if value is not None and not least < value < float('inf'):
            raise UsageError(f'--{name} {value}: give a number above {least}')
    if options.steps is not None and options.minutes is not None:
        raise UsageError('--steps and --minutes both say when to end: leave one out')
    if options.all_weights:
        said = [f'--{name}' for name in _OF_ADAPTERS if getattr(options, name)]
        if said:
            raise UsageError(
                f'--all_weights trains the weights themselves, without adapters: leave out '
                f'{" and ".join(said)}'
            )
    if options.rehearse is not None and not 0 <= options.rehearse < 1:
        raise UsageError(f'--rehearse {options.rehearse}: give a share of 0 or more, below 1')
    if options.rehearse and options.preferences is not None:
        raise UsageError('--rehearse goes with texts, and not with --preferences: leave it out')
    if options.remat and options.reversible is not None:
        raise UsageError('--remat and --reversible both save memory: leave one out')
    if options.preferences is not None and options.data is not None:
        raise UsageError('--preferences FILE is the data: leave out the other')


def _data(options: argparse.Namespace) -> tuple[str, Path | None]:
    """The kind of the data, and its path."""
    if options.preferences is not None:
        return PREFERENCES, _existing(options.preferences)
    if options.data is None:
        return ABOUT, None
    path = _existing(options.data)
    if path.is_dir() or not path.name.endswith(_TABLES):
        return TEXT, path
    return _of_table(path), path


def _existing(name: str) -> Path:
    path = paths.local(name, 'the data')
    if not path.exists():
        raise UsageError(
            f'no data {name!r}: give a file of .jsonl, .json or .parquet with conversations or '
            'instructions, or a file or folder of text'
        )
    return path


def _of_table(path: Path) -> str:
    """The kind of rows, found by the columns of the first."""
    from layercomb.data.finetuning import rows, turns

    with usage_errors():
        first = rows.rows_of(str(path), 'finetune')[0]
    return CHAT if any(first.get(name) is not None for name in turns.LISTS) else INSTRUCTIONS


def _source(options: argparse.Namespace, given: Path | None) -> tuple[Source, Path]:
    """The model and the run's directory; a run that goes on does not need the model any more."""

    def directory(source: Source) -> Path:
        named = options.output_dir or Path('runs') / f'{source.title}-{_stem(given)}'
        return paths.local(named, '--output_dir')

    try:
        source = pretrained.found(options.source)
    except UsageError:
        path = paths.local(options.source, 'the model').resolve()
        kind = GGUF if path.suffix == '.gguf' else HUGGING_FACE
        lost = Source(options.source, kind, path)
        begun = directory(lost)
        kept = pretrained.kept_source(lost, begun)
        if kept is None:
            raise
        return kept, begun
    return source, directory(source)


def _length(given: int | None, source: Source, run: Path, usual: int) -> int:
    """The length of a row: what was asked for, else what is usual or the model reaches."""
    from layercomb.supervised.decoding import prompts

    net = pretrained.net_of(source, run)
    if net.n_in != 1:
        raise UsageError(
            f'{source.name!r} is no language model (it takes {net.n_in} inputs), and makes no '
            'text: for classes of texts, see layercomb train finetune_minilm'
        )
    most = prompts.max_len(net)
    if given is not None and most is not None and given > most:
        raise UsageError(
            f'--length {given} is more than the context of {source.name!r}, {most} tokens: give at '
            'most that'
        )
    return given or min(most or usual, usual)


def _rehearsed(options: argparse.Namespace, kind: str) -> float:
    """The share of a row for other text: people's own data are left as they are."""
    if options.rehearse is not None:
        return float(options.rehearse)
    return _REHEARSED if kind == ABOUT else 0.0


def _learning_rate(options: argparse.Namespace, kind: str) -> float:
    """The peak: adapters take more than weights, and preferences less than texts.

    Adapters learn faster by higher rates, and the model then forgets what it knew.
    """
    if options.learning_rate is not None:
        return float(options.learning_rate)
    usual = 1e-4 if options.all_weights else 2e-3 if kind == ABOUT else 4e-4
    return usual / 10 if kind == PREFERENCES else usual


def _stem(given: Path | None) -> str:
    """The name of the data in that of the run."""
    return ABOUT if given is None else paths.shown(given.name).partition('.')[0] or 'data'


_OF_DATA = (
    '.jsonl, .json or .parquet of conversations or instructions; a file or folder of text; by '
    'default questions about this library'
)

_OF_RATE = 'the peak (0.0004; questions about this library 0.002; all weights 0.0001)'
_OF_REHEARSAL = (
    "fill each row with text of Python's manual, a share of it at least, to forget less "
    f'({_REHEARSED} for questions about this library, else 0)'
)


def options_of(add: Any) -> None:
    """Adds the options of the command to its parser.

    Args:
      add: adds one, as `argparse.ArgumentParser.add_argument`.
    """
    add('data', nargs='?', help=_OF_DATA)
    add('--output_dir', help='where the run is kept; by default runs/SOURCE-DATA')
    add('--steps', type=int, help='how many steps to train')
    add('--minutes', type=float, help=f'how long it may take, in the place of steps ({MINUTES:g})')
    add('--rank', type=int, help=f'of the adapters ({_RANK})')
    add('--alpha', type=float, help='their weight is alpha / rank (twice the rank)')
    add('--dora', action='store_true', help='adapters with a magnitude of their own')
    add('--all_weights', action='store_true', help='train the weights themselves, without adapters')
    add('--bits', type=int, choices=(16, 8, 4), help='narrow weights under the adapters')
    add('--length', type=int, help=f'tokens of a row ({_LENGTH}, or what the model reaches)')
    add('--batch_size', type=int, help='rows of a batch (1)')
    add('--learning_rate', type=float, help=_OF_RATE)
    add('--rehearse', type=float, metavar='SHARE', help=_OF_REHEARSAL)
    add('--remat', action='store_true', help='compute blocks again: less memory, slower')
    add('--reversible', type=int, metavar='M', help='do not keep the inputs of blocks either')
    add('--preferences', metavar='FILE', help='rows of prompt, chosen and rejected: trains by DPO')
