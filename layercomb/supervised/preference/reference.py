"""The log-likelihoods of a reference: computed once, before training, and kept with the run.

The reference of `tl.PreferenceLoss` is the model that training starts from. A `Loop` asks it once
for the log-likelihood of every answer in its tasks, and keeps these in ``reference/`` in the run's
directory, a file for each data set. So a resumed run, and an evaluation of it, computes none again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import losses, paths, trees
from layercomb.data.judged.batches import PreferenceBatches
from layercomb.data.packing import Arrays
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.metrics.classification import CrossEntropyLoss
from layercomb.model import Model, check_tokens
from layercomb.supervised.decoding.prompts import reads_whole_prompts, round_up
from layercomb.supervised.tasks import EvalTask, TrainTask
from layercomb.trees import Tree

FOLDER = 'reference'
_ROWS = 16  # that are read together
_TOGETHER = 512  # positions whose logits exist at a time

Task = TypeVar('Task', TrainTask, EvalTask)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept of a reference.

    Attributes:
      model: a digest of the weights that computed it.
      values: (N, 2) float32, the log-likelihood of each preferred and rejected answer, in nats.
    """

    model: str
    values: np.ndarray


class References:
    """The log-likelihoods that tasks of one run need.

    Args:
      model: what training starts from. A layer without weights can only take what was kept.
      directory: the run's; None for a run that writes nothing.
    """

    def __init__(self, model: Layer | Model, directory: Path | None = None) -> None:
        self._model = model if isinstance(model, Model) else None
        self._folder = None if directory is None else directory / FOLDER
        self._new: dict[str, Kept] = {}

    def referred(self, task: Task) -> Task:
        """The task, with the reference in the batches of its data; another kind of task as it is.

        Raises:
          ValueError: if there are no weights to compute a reference with.
          UsageError: if another model computed what was kept, or it is damaged; if a token is
            outside the vocabulary, or a log-likelihood is NaN.
        """
        if not isinstance(task.data, PreferenceBatches):
            return task
        return dataclasses.replace(task, data=task.data.referred(self._values(task.data.source)))

    def write(self) -> None:
        """Writes what was computed into the run's directory, each file whole or not at all."""
        if self._folder is None or jax.process_index() > 0:
            return
        for name, kept in self._new.items():
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f'{name}.npz'
            with paths.whole(file) as unfinished, open(unfinished, 'wb') as opened:
                np.savez(opened, model=np.array(kept.model), values=kept.values)
        self._new = {}

    @functools.cached_property
    def _digest(self) -> str:
        """Of the weights that training starts from."""
        weights = self._model.weights if self._model is not None else None
        return digest_of(_named(weights or {}))

    def _values(self, source: Sequence[Arrays]) -> np.ndarray:
        name = digest_of(_arrays(source))
        kept = self._new.get(name)
        if kept is None and self._folder is not None:
            kept = _read(self._folder / f'{name}.npz')
        if self._model is None or self._model.weights is None:
            if kept is None and self._folder is not None and self._folder.is_dir():
                raise UsageError(
                    f'{self._folder} has no log-likelihoods of these answers: go on with the data '
                    'that the run began with, or choose another output_dir'
                )
            if kept is None:
                raise ValueError(
                    'the reference of a preference loss is the model that training starts from: '
                    'give the Loop an lc.Model with its weights, instead of a layer'
                )
            return kept.values
        if kept is None:
            made = log_likelihoods(self._model, source)
            kept = self._new[name] = Kept(self._digest, made)
        elif kept.model != self._digest:
            raise UsageError(
                f'{self._folder}: the log-likelihoods there are those of another model: start from '
                'the same weights, or choose another output_dir'
            )
        return kept.values


def recalled(tasks: Sequence[EvalTask], directory: str | Path) -> tuple[EvalTask, ...]:
    """Eval tasks of a run with the reference that was kept with it; others as they are.

    Args:
      tasks: as the run's configuration makes them.
      directory: the run's.

    Raises:
      UsageError: if the run keeps no log-likelihoods of a task's answers.
    """
    folder = paths.local(directory, 'run_dir') / FOLDER
    made = []
    for task in tasks:
        if isinstance(task.data, PreferenceBatches):
            kept = _read(folder / f'{digest_of(_arrays(task.data.source))}.npz')
            if kept is None:
                raise UsageError(
                    f'EvalTask {task.name!r}: {folder} has no log-likelihoods of these answers: '
                    'measure on the data that the run was trained with'
                )
            task = dataclasses.replace(task, data=task.data.referred(kept.values))
        made.append(task)
    return tuple(made)


def log_likelihoods(model: Model, source: Sequence[Arrays]) -> np.ndarray:
    """Σ_t log π(y_t | y_<t) over the tokens of each answer, in nats, without dropout.

    Rows of similar length are read together, padded to few lengths; logits exist for a slice of the
    positions at a time.

    Args:
      model: a language model with weights.
      source: pairs of `data.preferences`.

    Returns:
      (N, 2) float32, for preferred and rejected answers.

    Raises:
      UsageError: if a token is outside the vocabulary, or a log-likelihood is not finite.
    """
    lengths = [int(np.flatnonzero(w)[-1]) + 1 for pair in source for w in pair[2]]
    order = np.argsort(lengths, kind='stable')
    made = np.zeros(len(lengths), np.float32)
    whole = reads_whole_prompts(model.layer)  # a layer that sees padding is given that of training
    room = len(source[0][0][0])
    for first in range(0, len(order), _ROWS):
        chosen = order[first : first + _ROWS].tolist()
        length = room if whole else min(room, round_up(lengths[chosen[-1]]))
        rows = [tuple(x[i % 2, :length] for x in source[i // 2]) for i in chosen]
        rows += [tuple(map(np.zeros_like, rows[0]))] * (_ROWS - len(rows))
        inputs, targets, weights = (np.stack(column) for column in zip(*rows, strict=True))
        made[chosen] = _totals(model, inputs, targets[..., 0], weights)[: len(chosen)]
    strange = np.flatnonzero(~np.isfinite(made))
    if strange.size:
        raise UsageError(
            f'the log-likelihood of answer {strange[0] % 2} of pair {strange[0] // 2} is '
            f'{made[strange[0]]} under the model that training starts from: look at its weights'
        )
    return made.reshape(-1, 2)


def digest_of(parts: Iterator[Any]) -> str:
    """A digest of texts and arrays, in order: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        x = np.ascontiguousarray(part)
        digest.update(f'{x.dtype}{x.shape}'.encode())
        digest.update(x.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _arrays(source: Sequence[Arrays]) -> Iterator[Any]:
    """What identifies the pairs."""
    for i in range(len(source)):
        inputs, targets, weights = source[i]
        yield from (inputs, targets[..., 0], weights)


def _named(weights: Tree) -> Iterator[Any]:
    for path, x in sorted(trees.flatten(weights).items()):
        yield path
        yield np.asarray(x)


def _totals(model: Model, inputs: Any, tokens: Any, weights: Any) -> np.ndarray:
    """Σ w log π of each row, (B,) float32."""
    try:
        check_tokens(model.layer, (inputs,))
    except ValueError as e:
        raise UsageError(f'the preferences do not fit the model: {e}') from None
    batch = tuple(map(jnp.asarray, (inputs, tokens, weights)))
    return np.asarray(_summed(model.layer, model.weights, model.state, batch))


@functools.partial(jax.jit, static_argnums=0)
def _summed(net: Layer, weights: Any, state: Any, batch: Any) -> jax.Array:
    scoring = losses.attach(net, CrossEntropyLoss(), chunk_len=_TOGETHER)
    (values, counts), _ = scoring.apply(weights, state, batch, mode=Mode.EVAL)
    return -jnp.sum(jnp.where(counts == 0, 0, values * counts), 1)


def _read(path: Path) -> Kept | None:
    """What a file keeps; None if there is none."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            return Kept(str(file['model']), file['values'])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise UsageError(f'{path} is damaged ({e}): remove it, to have it computed again') from None
