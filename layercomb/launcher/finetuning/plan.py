"""What ``layercomb finetune`` trains, as a configuration."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from layercomb import data, paths
from layercomb.errors import UsageError, usage_errors
from layercomb.launcher import pretrained, runs
from layercomb.launcher.sources import GGUF, HUGGING_FACE, Source

CHAT, INSTRUCTIONS, TEXT, ABOUT = 'chat', 'instructions', 'text_folder', 'about_layercomb'
PREFERENCES = 'preferences'

MINUTES = 5.0
HELD_OUT = 20  # one document in so many is measured on
EVALUATIONS = 2  # of a run
_LOGITS = 2048  # positions of a batch whose logits may all exist: else they are computed twice
_LENGTH = 512
_SHORT = 256  # of questions about the library, for more steps in the same time
_RANK = 16
_TABLES = ('.jsonl', '.ndjson', '.jsonl.gz', '.ndjson.gz', '.json', '.json.gz', '.parquet')
_OF_ADAPTERS = ('rank', 'alpha', 'dora', 'bits')
_IMPORTS = """\
from __gin__ import dynamic_registration

from layercomb import cli
from layercomb import data
from layercomb import layers as tl
from layercomb import optimizers
from layercomb import supervised
from layercomb import transforms
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A fine-tuning: from which model, on what, and how.

    Attributes:
      source: the model.
      kind: of the data: `CHAT`, `INSTRUCTIONS`, `TEXT`, `ABOUT` or `PREFERENCES`.
      data: the path of the data, absolute; None for the set that comes with the library.
      directory: of the run, absolute.
      length, batch_size: of a batch.
      learning_rate: the peak.
      rank: of the adapters; None trains all weights.
      alpha, dora: of the adapters.
      bits: of the base under adapters; None for float32.
      reversible: the m of `transforms.reversible`; None keeps activations.
      remat: whether blocks are computed again in the backward pass.
      steps: how many; None to choose them by `minutes`.
      minutes: how long the command may take up to the end of training.
    """

    source: Source
    kind: str
    data: str | None
    directory: Path
    length: int
    batch_size: int
    learning_rate: float
    rank: int | None
    alpha: float
    dora: bool
    bits: int | None
    reversible: int | None
    remat: bool
    steps: int | None
    minutes: float

    def documents(self, tokenizer: Any, split: str = 'train') -> Any:
        """What there is to learn, as the configuration reads it.

        Args:
          tokenizer: of the model.
          split: 'valid' for what the set that comes with the library is measured on; of other data
            all is returned.

        Raises:
          UsageError: if it cannot be read, or holds nothing.
        """
        with usage_errors():
            if self.kind == PREFERENCES:
                return data.preferences(self.data, tokenizer, self.length, drop_long=True)
            if self.kind == ABOUT:
                return data.chat(data.about_layercomb(split), tokenizer, self.length + 1)
            return getattr(data, self.kind)(self.data, tokenizer, self.length + 1)

    def text(self, n_documents: int) -> str:
        """The configuration, without what `pace` says.

        Args:
          n_documents: of all the data; a few are measured with nothing.
        """
        measures = self.kind == ABOUT or n_documents >= HELD_OUT
        loss = 'PreferenceLoss' if self.kind == PREFERENCES else 'CrossEntropyLoss'
        lines = [
            f'SOURCE = {str(self.source.path)!r}' if self._is_path else f'SOURCE = {self._name!r}',
            f'LENGTH = {self.length}',
            'cli.train.model = @cli.pretrained()',
            'cli.train.train_task = @supervised.TrainTask()',
            'cli.train.eval_tasks = (@supervised.EvalTask(),)' if measures else '',
            'cli.train.steps = %STEPS',
            'cli.train.keep = 1',
            'cli.pretrained.source = %SOURCE',
            'cli.pretrained_tokenizer.source = %SOURCE',
            *self._adapters(),
            f'supervised.TrainTask.loss = @tl.{loss}()',
            'supervised.TrainTask.optimizer = @optimizers.adamw()',
            'supervised.TrainTask.clip_norm = 1.0',
            self._pieces('TrainTask'),
            'optimizers.adamw.learning_rate = @optimizers.warmup_cosine()',
            f'optimizers.warmup_cosine.learning_rate = {self.learning_rate}',
            'optimizers.warmup_cosine.steps = %STEPS',
            *self._batches('train', 'supervised.TrainTask'),
        ]
        if measures:
            lines += self._batches('valid', 'supervised.EvalTask')
            lines += [
                f'supervised.EvalTask.metrics = @tl.{loss}()',
                'supervised.EvalTask.n_batches = 8',
                self._pieces('EvalTask'),
            ]
        return f'{_IMPORTS}\n' + '\n'.join(filter(None, lines)) + '\n'

    def pace(self, steps: int) -> str:
        """The bindings that go with a number of steps, to be added to `text`."""
        every = max(1, -(-steps // EVALUATIONS))
        return (
            f'STEPS = {steps}\n'
            f'optimizers.warmup_cosine.warmup_steps = {min(steps // 10, 50)}\n'
            f'cli.train.eval_every = {every}\n'
            f'cli.train.checkpoint_every = {every}\n'
            f'cli.train.log_every = {min(10, every)}\n'
        )

    def known_steps(self) -> int | None:
        """How many steps to take, if that is known: it was said, or the run has begun."""
        if self.steps is not None or not runs.is_run(self.directory):
            return self.steps
        begun = re.search(r'^STEPS = (\d+)$', runs.config_of(self.directory), re.MULTILINE)
        return None if begun is None else int(begun[1])

    @property
    def _name(self) -> str:
        return self.source.name

    @property
    def _is_path(self) -> bool:
        """Whether the source is a path, which is written so that it holds in other directories."""
        return paths.local(self._name, 'the model').resolve() == self.source.path

    def _pieces(self, task: str) -> str:
        """The binding that keeps all logits of a large batch from existing at once."""
        rows = self.batch_size * (2 if self.kind == PREFERENCES else 1)
        whole = rows * self.length <= _LOGITS
        return '' if whole else f'supervised.{task}.loss_chunk_len = 128'

    def _adapters(self) -> list[str]:
        """The bindings about what trains."""
        lines = []
        if self.bits is not None:
            lines.append(f'cli.pretrained.bits = {self.bits}')
        if self.reversible is not None:
            lines.append(f'cli.pretrained.reversible = {self.reversible}')
        if self.remat:
            lines.append('cli.pretrained.remat = True')
        if self.rank is not None:
            lines += [
                'cli.pretrained.adapt = @transforms.lora',
                f'transforms.lora.rank = {self.rank}',
                f'transforms.lora.alpha = {self.alpha}',
                f'transforms.lora.dora = {self.dora}',
                'supervised.TrainTask.trainable = @transforms.is_lora',
            ]
        return lines

    def _batches(self, split: str, task: str) -> list[str]:
        """The bindings of the data of a task."""
        if self.kind == PREFERENCES:
            return [
                f'{task}.data = @{split}/data.preference_batches()',
                f'{split}/data.preference_batches.source = @{split}/data.held_out()',
                f'{split}/data.preference_batches.batch_size = {self.batch_size}',
                *self._once(split, 'data.preference_batches'),
                *self._held_out(split, 'data.preferences'),
                'data.preferences.length = %LENGTH',
                'data.preferences.drop_long = True',
            ]
        read = 'data.chat' if self.kind == ABOUT else f'data.{self.kind}'
        lines = [
            f'{task}.data = @{split}/data.packed_documents()',
            f'{task}.packed = True',
            f'{split}/data.packed_documents.length = %LENGTH',
            f'{split}/data.packed_documents.batch_size = {self.batch_size}',
            f'{read}.max_len = {self.length + 1}',
            *self._once(split, 'data.packed_documents'),
        ]
        if self.kind == ABOUT:  # it has a part of its own to be measured on
            return [
                *lines,
                f'{split}/data.packed_documents.documents = @{split}/data.chat()',
                f'{split}/data.chat.source = @{split}/data.about_layercomb()',
                f"{split}/data.about_layercomb.split = '{split}'",
                'data.chat.tokenizer = @cli.pretrained_tokenizer()',
            ]
        return [
            *lines,
            f'{split}/data.packed_documents.documents = @{split}/data.held_out()',
            *self._held_out(split, read),
        ]

    def _held_out(self, split: str, read: str) -> list[str]:
        argument = 'path' if self.kind == TEXT else 'source'
        return [
            f'data.held_out.documents = @{read}()',
            f'data.held_out.every = {HELD_OUT}',
            f"{split}/data.held_out.split = '{split}'",
            f'{read}.{argument} = {self.data!r}',
            f'{read}.tokenizer = @cli.pretrained_tokenizer()',
        ]

    @staticmethod
    def _once(split: str, batches: str) -> list[str]:
        """What is measured comes once, in its order."""
        if split == 'train':
            return []
        return [f'{split}/{batches}.num_epochs = 1', f'{split}/{batches}.shuffle = False']


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
    if options.remat and options.reversible is not None:
        raise UsageError('--reversible keeps less than --remat: leave one out')
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


def _learning_rate(options: argparse.Namespace, kind: str) -> float:
    """The peak: adapters take more than weights, and preferences less than texts.

    Adapters learn faster by higher rates, and the model then forgets what it knew.
    """
    if options.learning_rate is not None:
        return float(options.learning_rate)
    usual = 1e-4 if options.all_weights else 1.5e-3 if kind == ABOUT else 4e-4
    return usual / 10 if kind == PREFERENCES else usual


def _stem(given: Path | None) -> str:
    """The name of the data in that of the run."""
    return ABOUT if given is None else paths.shown(given.name).partition('.')[0] or 'data'


_OF_DATA = (
    '.jsonl, .json or .parquet of conversations or instructions; a file or folder of text; by '
    'default questions about this library'
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
    add('--learning_rate', type=float, help='the peak (0.0004; all weights 0.0001)')
    add('--remat', action='store_true', help='compute blocks again: less memory, a third slower')
    add('--reversible', type=int, metavar='M', help='do not keep the inputs of blocks either')
    add('--preferences', metavar='FILE', help='rows of prompt, chosen and rejected: trains by DPO')
