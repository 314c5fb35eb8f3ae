"""What to train on, and what to measure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, cast

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Bound, ChunkLen, Size, check_value, fault, frozen
from layercomb.errors import require
from layercomb.layers.basic.dense import Dense
from layercomb.layers.core.layer import Layer
from layercomb.layers.metrics.metric import Metric
from layercomb.optimizers.tensors import bound
from layercomb.supervised import updates
from layercomb.supervised.batches import Batch, check_data, checked, is_endless
from layercomb.transforms.densifying import denser
from layercomb.transforms.segments import segmented
from layercomb.trees import Tree

_ClipNorm = Annotated[float, Bound(above=0)] | None
_AccumulateDtype = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True, eq=False)
class TrainTask:
    """What a `Loop` trains on: data, a loss, an optimizer.

    Attributes:
      data: an iterable whose iterators yield batches (inputs…, targets, loss_weights) of numpy
        arrays; the first axis is the batch. Positions of loss weight 0 do not count: not in the
        loss, the balance of mixtures, the statistics of `BatchNorm`, or tokens a second. Other
        positions still attend to them, unless attention and means are `masked`. Each iterator must
        start from the beginning. A Grain data set's position is saved. With other data, a resumed
        run skips the batches it has seen, so they must come in the same order again.
      loss: a metric, such as `tl.CrossEntropyLoss()`, of the model's output. The step minimises
        Σ wv / Σ w over all positions of a batch, 0 where none counts, plus auxiliary losses.
      optimizer: an `optax.GradientTransformation`. If its update asks for them, it gets the loss as
        `value` and `value_fn`, and the gradient as `grad`.
      accumulate: how many micro batches a batch is cut into, to save memory. Losses and weights are
        summed and divided once, so the gradient is that of the whole batch; but what layers average
        over a batch (balance, statistics) is averaged over a micro batch.
      accumulate_dtype: of the sums of micro batches' gradients. 'bfloat16' takes half the memory of
        'float32'. Each sum is then rounded by chance to one of its neighbours, so that on average
        the gradient is the same.
      clip_norm: gradients of a greater global norm are scaled down to it.
      loss_chunk_len: how many positions of a row have logits at a time: a number, 'auto' for what
        suits the platform and a small vocabulary (see `tl.Chunk`), or None for all.
      trainable: a predicate on paths of weights; None trains all. Frozen weights have no gradient
        and no optimizer state. Integer weights are always frozen.
      packed: whether rows hold several documents, which do not see each other. Batches are then
        (inputs…, segments, targets, loss_weights), with segments (B, L) int32, as of
        `transforms.segmented`. The model stays one of a sequence a row.
      denser: pairs (step, factor), in order of steps. Until that step the model trains as
        `transforms.denser` of that factor, with the same weights: units that few positions choose
        learn slowly. Evaluations, and what is saved, are of the model itself. Each stage is
        compiled when it begins.

    Raises:
      TypeError, ValueError: at construction, for an argument that cannot be right.
    """

    data: Iterable[Batch]
    loss: Metric
    optimizer: Any
    accumulate: int = 1
    clip_norm: float | None = None
    loss_chunk_len: ChunkLen | None = None
    trainable: Callable[[str], bool] | None = None
    packed: bool = False
    denser: tuple[tuple[Size, Size], ...] = ()
    accumulate_dtype: _AccumulateDtype = 'float32'

    def __post_init__(self) -> None:
        check_data('TrainTask', self.data)
        check_value('TrainTask', 'packed', self.packed, bool)
        object.__setattr__(self, 'denser', frozen(self.denser))
        _check_stages(self.denser)
        _check_metric('TrainTask', 'loss', self.loss)
        if not self.loss.is_mean:
            raise ValueError(
                f'TrainTask: loss={self.loss!r} is no mean over positions, so it has no gradient '
                'of a batch: give e.g. tl.CrossEntropyLoss(), and measure this one in an EvalTask'
            )
        if not self.loss.has_gradient:
            raise ValueError(
                f'TrainTask: loss={self.loss!r} has no gradient, so nothing would train: give e.g. '
                'tl.CrossEntropyLoss(), and measure this one in an EvalTask'
            )
        check_optimizer(self.optimizer)
        check_count('TrainTask', 'accumulate', self.accumulate)
        check_value('TrainTask', 'accumulate_dtype', self.accumulate_dtype, _AccumulateDtype)
        check_value('TrainTask', 'loss_chunk_len', self.loss_chunk_len, ChunkLen | None)
        check_value('TrainTask', 'clip_norm', self.clip_norm, _ClipNorm)
        if self.trainable is not None and not callable(self.trainable):
            raise TypeError(
                f'TrainTask: trainable={self.trainable!r}: give a function of a path, such as '
                "lambda path: path.endswith('bias')"
            )

    def partition(self, weights: Tree) -> tuple[Tree, Tree]:
        """Splits weights into (trainable, frozen); see `trees.partition`.

        Args:
          weights: all weights of a model.

        Returns:
          Two trees like `weights`, each with None in the other's places.

        Raises:
          ValueError: if no weight trains.
        """
        trainable, frozen = trees.partition(weights, self.trainable)
        if not jax.tree.leaves(trainable):
            raise ValueError('TrainTask: no weight trains: check the predicate trainable')
        return trainable, frozen


@dataclasses.dataclass(frozen=True, eq=False)
class EvalTask:
    """What a `Loop` measures in its evaluations: metrics over held-out data.

    Attributes:
      data: as for `TrainTask`; each evaluation goes through it from the start.
      metrics: one metric, or several.
      name: what comes before the `/` in reports: `valid/loss`.
      n_batches: how many batches to go through; None for all. The data must then end: a Grain data
        set that repeats for ever is refused.
      loss_chunk_len: how many positions of a row have logits at a time: a number, 'auto' for what
        suits the platform and a small vocabulary (see `tl.Chunk`), or None for all.
      packed: as for `TrainTask`.

    Raises:
      TypeError, ValueError: at construction, for an argument that cannot be right.
    """

    data: Iterable[Batch]
    metrics: Metric | tuple[Metric, ...]
    name: str = 'valid'
    n_batches: int | None = None
    loss_chunk_len: ChunkLen | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        metrics = self.metrics if isinstance(self.metrics, (tuple, list)) else (self.metrics,)
        object.__setattr__(self, 'metrics', tuple(metrics))
        check_data('EvalTask', self.data)
        check_value('EvalTask', 'packed', self.packed, bool)
        if not metrics:
            raise ValueError('EvalTask: metrics is empty: give one, e.g. tl.CrossEntropyLoss()')
        for metric in metrics:
            _check_metric('EvalTask', 'metrics', metric)
        labels = [metric.label for metric in metrics]
        if len(set(labels)) < len(labels):
            raise ValueError(f'EvalTask: two metrics have one label in {labels}: give one a name=')
        if not isinstance(self.name, str) or not self.name or '/' in self.name:
            raise ValueError(f'EvalTask: name={self.name!r}: give a word without "/"')
        if self.name == 'train':
            raise ValueError("EvalTask: the name 'train' is that of training: choose another")
        check_count('EvalTask', 'n_batches', self.n_batches, optional=True)
        check_value('EvalTask', 'loss_chunk_len', self.loss_chunk_len, ChunkLen | None)
        if self.n_batches is None and is_endless(self.data):
            raise ValueError(
                f'EvalTask {self.name!r}: the data repeats for ever, so a measurement of it would '
                'never end: give n_batches, or data that ends (num_epochs=1)'
            )

    def batches(self) -> Iterator[Batch]:
        """The batches of one evaluation: the first `n_batches` of the data, the same each time."""
        return map(checked, itertools.islice(iter(self.data), self.n_batches))


def _check_stages(denser: Any) -> None:
    """Raises unless `denser` is a tuple of pairs (step, factor), whose steps rise."""
    said = (
        f'TrainTask: denser={denser!r}: give pairs (step, factor) of integers from 1 on, whose '
        'steps rise, such as ((500, 16), (1000, 4))'
    )
    if fault(denser, tuple[tuple[Size, Size], ...]) or any(len(pair) != 2 for pair in denser):
        raise TypeError(said)
    ends = [step for step, _ in denser]
    if ends != sorted(set(ends)) or any(n < 1 for pair in denser for n in pair):
        raise ValueError(said)


def reading(task: TrainTask | EvalTask, net: Layer) -> Layer:
    """The layer that reads the inputs of a task's batches: the model, or `segmented` if packed.

    Args:
      task: what it trains on, or what is measured.
      net: the model of one sequence a row.

    Raises:
      TypeError: if documents of a row would see each other in the model.
    """
    return segmented(net) if task.packed else net


def early(task: TrainTask, net: Layer) -> list[tuple[int, Layer]]:
    """What trains in the place of the model at first, and the steps until which each does.

    Args:
      task: what it trains on.
      net: the model of one sequence a row.

    Raises:
      ValueError: if `denser` does not fit the model.
    """
    return [(step, reading(task, denser(net, factor))) for step, factor in task.denser]


def lower_is_better(name: str, tasks: Sequence[EvalTask]) -> bool:
    """Whether lower values of a metric are better.

    Args:
      name: 'task/metric', as reports call it.
      tasks: what is measured.

    Raises:
      ValueError: if no task measures the metric, or its class does not say which way is better.
    """
    metrics = {
        f'{task.name}/{metric.label}': metric
        for task in tasks
        for metric in cast(tuple[Metric, ...], task.metrics)  # made one by the task
    }
    if name not in metrics:
        there = f'there are {", ".join(metrics)}' if metrics else 'there are no eval_tasks'
        raise ValueError(f'Loop: keep_best={name!r} is not measured: {there}')
    lower = metrics[name].lower_is_better
    if lower is None:
        raise ValueError(
            f'Loop: keep_best={name!r}: {type(metrics[name]).__name__} does not say which of two '
            'numbers is better: set lower_is_better = True or False on its class'
        )
    return lower


def check_count(owner: str, name: str, value: Any, optional: bool = False) -> None:
    """Raises TypeError or ValueError unless `value` is a positive integer, or None if optional."""
    check_value(owner, name, value, Size | None if optional else Size)


def check_optimizer(optimizer: Any) -> None:
    """Raises a TypeError unless `optimizer` is an optax transformation that can take a step.

    Wrong arguments of an optax constructor show only when the optimizer is used, so this traces
    one step on two small weights. The Loop checks masks and labels, which fit only real weights.
    """
    optax = require('optax', 'train')
    if not isinstance(optimizer, optax.GradientTransformation):
        said = getattr(optimizer, '__name__', None) or repr(optimizer)
        raise TypeError(
            f'TrainTask: optimizer={said} is no optax.GradientTransformation: '
            'give e.g. optax.adamw(1e-3)'
        )
    weights = {
        'kernel': jnp.zeros((2, 2), jnp.float32),
        'bias': jnp.zeros(2, jnp.float32),
    }
    try:
        updates.traced(bound(optimizer, Dense()), weights)
    except TypeError as e:
        if 'shape' in str(e):  # a mask or label that fits only the real weights
            return
        raise TypeError(f'TrainTask: {updates.why_not(optimizer, e)}') from None
    except Exception:
        return


def _check_metric(owner: str, name: str, metric: Any) -> None:
    if not isinstance(metric, Metric):
        said = getattr(metric, '__name__', None) or repr(metric)
        raise TypeError(f'{owner}: {name}: {said} is no metric: give e.g. tl.CrossEntropyLoss()')
