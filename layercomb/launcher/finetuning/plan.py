"""What ``layercomb finetune`` trains, as a configuration."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from layercomb import data, paths
from layercomb.errors import usage_errors
from layercomb.launcher import runs
from layercomb.launcher.sources import Source

CHAT, INSTRUCTIONS, TEXT, ABOUT = 'chat', 'instructions', 'text_folder', 'about_layercomb'
PREFERENCES = 'preferences'

HELD_OUT = 20  # one document in so many is measured on
EVALUATIONS = 2  # of a run
_REHEARSAL_WEIGHT = 0.6  # of a token of other text, of which there are more than of answers
_LOGITS = 2048  # positions of a batch whose logits may all exist: else they are computed twice
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
      rehearse: the share of each row that is kept for Python's manual.
      steps: how many; None to choose them by `minutes`.
      minutes: about how long the command may take.
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
    rehearse: float
    steps: int | None
    minutes: float

    @property
    def max_len(self) -> int:
        """The most tokens of a document; pieces of text leave room for what is rehearsed."""
        rehearsed = self.rehearse if self.kind == TEXT else 0.0
        return max(2, self.length - round(rehearsed * self.length) + 1)

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
                return data.chat(data.about_layercomb(split), tokenizer, self.max_len)
            return getattr(data, self.kind)(self.data, tokenizer, self.max_len)

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
            f'{read}.max_len = {self.max_len}',
            *self._once(split, 'data.packed_documents'),
            *(self._rehearsal() if split == 'train' and self.rehearse else ()),
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

    def _rehearsal(self) -> list[str]:
        return [
            'train/data.packed_documents.rehearsal = @data.python_manual()',
            f'train/data.packed_documents.rehearsal_share = {self.rehearse}',
            f'train/data.packed_documents.rehearsal_weight = {_REHEARSAL_WEIGHT}',
            'data.python_manual.tokenizer = @cli.pretrained_tokenizer()',
        ]

    @staticmethod
    def _once(split: str, batches: str) -> list[str]:
        """What is measured comes once, in its order."""
        if split == 'train':
            return []
        return [f'{split}/{batches}.num_epochs = 1', f'{split}/{batches}.shuffle = False']
