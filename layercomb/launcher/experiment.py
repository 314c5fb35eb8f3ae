"""An experiment: a model, its training and eval tasks, and the sample at the end."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from layercomb.checks import check_values, frozen
from layercomb.data import checks
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError
from layercomb.launcher.training.forecast import Forecast
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.model import Model
from layercomb.parallel.layout import laid_out
from layercomb.parallel.mesh import make_mesh
from layercomb.shapes import Signature
from layercomb.supervised import Callback, Loop
from layercomb.supervised.decoding.prompts import Start, begin, given
from layercomb.supervised.decoding.sampling import Sampler
from layercomb.supervised.fit import check_arguments, check_arity, check_fit, on_device
from layercomb.supervised.tasks import EvalTask, TrainTask, check_count
from layercomb.trees import Tree

_LOOP = inspect.signature(Loop).parameters
# The arguments that an experiment passes to its `Loop`.
_OPTIONS = (
    'seed', 'eval_every', 'checkpoint_every', 'log_every', 'keep', 'keep_best', 'callbacks',
)  # fmt: skip


def _of_loop(name: str) -> Any:
    """A field with the default of `Loop`."""
    return dataclasses.field(default=_LOOP[name].default)


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The experiment that a configuration describes, as plain values.

    Attributes:
      model: a layer that gives logits; or an `lc.Model`, whose weights are where training starts.
      train_task: data, loss and optimizer.
      eval_tasks: what to measure, one or several.
      steps: how many steps to train.
      seed, eval_every, checkpoint_every, log_every, keep, keep_best, callbacks: as for `Loop`.
      tokenizer: turns text into tokens and back, see `data.Tokenizer`; None for that of a
        `Pretrained` model, or if the data is not text.
      sample_prompt: the prompt of the sample that is shown after training; None for no sample.
      sample_tokens: the sample's length, in tokens.
      sample_temperature: the temperature it is drawn at, see `Sampler`.
      baseline_text: training text, a source of documents, for simple byte models that are compared
        with the trained model on the batches of the first eval task; None for no comparison.
      mesh: of `parallel.make_mesh`, to train on several devices, as for `Loop`.
      offload: 'blocks' keeps blocks and their optimizer's state in host memory, 'streams' residual
        streams, as for `Loop`.
      offload_dtype: 'bfloat16' sends half of a block's weights to compute it, as for `Loop`.

    Raises:
      TypeError, ValueError: for a field that cannot be right, or fields that do not fit together.
    """

    model: Layer | Model
    train_task: TrainTask
    eval_tasks: Sequence[EvalTask] = ()
    _: dataclasses.KW_ONLY
    steps: int = 1000
    seed: int = _of_loop('seed')
    eval_every: int | None = _of_loop('eval_every')
    checkpoint_every: int | None = _of_loop('checkpoint_every')
    log_every: int = _of_loop('log_every')
    keep: int = _of_loop('keep')
    keep_best: str | None = _of_loop('keep_best')
    callbacks: Sequence[Callback] = _of_loop('callbacks')
    tokenizer: Any = None
    sample_prompt: str | None = None
    sample_tokens: int = 300
    sample_temperature: float = 0.8
    baseline_text: Any = None
    mesh: Any = None
    offload: str | None = _of_loop('offload')
    offload_dtype: str = _of_loop('offload_dtype')

    def __post_init__(self) -> None:
        given: Any = self.eval_tasks
        tasks = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        object.__setattr__(self, 'eval_tasks', tasks)
        object.__setattr__(self, 'callbacks', frozen(self.callbacks))
        if self.tokenizer is None:
            object.__setattr__(self, 'tokenizer', getattr(self.model, 'tokenizer', None))
        check_values('train', vars(self), Experiment)
        check_arguments(self.model, self.train_task, tasks, self._options())
        check_count('train', 'steps', self.steps)
        check_count('train', 'sample_tokens', self.sample_tokens)
        Sampler(self.sample_temperature)
        if self.tokenizer is not None:
            adapted(self.tokenizer, 'train', must_decode=self.sample_prompt is not None)
        if self.sample_prompt is not None and self.tokenizer is None:
            raise ValueError('train.sample_prompt needs train.tokenizer = @data.ByteTokenizer()')
        if self.baseline_text is None:
            return
        if not self.eval_tasks:
            raise ValueError('train.baseline_text needs train.eval_tasks to be measured on')
        first = checks.source('train', self.baseline_text, 'baseline_text')[0]
        if not isinstance(first, (str, bytes)):
            raise TypeError('train.baseline_text must be one source of documents, str or bytes')

    @property
    def net(self) -> Layer:
        """The model's layer."""
        return self.model.layer if isinstance(self.model, Model) else self.model

    def loop(
        self,
        directory: str | Path,
        allow_changes: Sequence[str] = (),
        callbacks: Sequence[Callback] = (),
        mesh: Any = None,
    ) -> Loop:
        """The `Loop` that trains it.

        Args:
          directory: the run's directory.
          allow_changes: as for `Loop`.
          callbacks: called after those of the experiment.
          mesh: in the place of the experiment's; None leaves that.

        Raises:
          UsageError: if a run that began from a model that exists has lost its checkpoints.
        """
        made = Loop(
            self.model,
            self.train_task,
            self.eval_tasks,
            directory,
            allow_changes=allow_changes,
            mesh=self._mesh if mesh is None else mesh,
            offload=self.offload,
            offload_dtype=self.offload_dtype,
            **{**self._options(), 'callbacks': (*self.callbacks, *callbacks)},
        )
        if isinstance(self.model, Model) and self.model.weights is None and made.step == 0:
            raise UsageError(
                f'{str(directory)!r} has lost its checkpoints: delete it, to begin anew'
            )
        return made

    @property
    def _mesh(self) -> Any:
        """The mesh; several processes have one of all devices if none is said."""
        return make_mesh() if self.mesh is None and jax.process_count() > 1 else self.mesh

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

    def batch_signature(self) -> Signature:
        """The signature of a batch: inputs, segments if packed, targets and loss weights.

        Raises:
          UsageError: if the data has no batch.
        """
        return on_device(_first_batch(self.train_task.data))

    def abstract(self, signature: Signature) -> tuple[Any, Any]:
        """Weights and state as `jax.ShapeDtypeStruct`, in ``TRAIN``.

        Args:
          signature: of the model's inputs.
        """
        return jax.eval_shape(
            lambda rng: self.net.init(signature, rng, Mode.TRAIN),
            jax.eval_shape(jax.random.key, 0),
        )

    def check(self) -> None:
        """Traces model, losses and sample on the first batches; nothing is computed.

        Raises:
          TypeError, ValueError: if they do not fit together, or not to the data.
          UsageError: if the data has no batch, or one that does not fit.
        """
        first = _first_batch(self.train_task.data)
        check_arity(self.train_task, self.net, first, 'the data')
        abstract = self.abstract(on_device(first[: self.net.n_in]))
        check_fit(self.net, *abstract, self.train_task, self.eval_tasks, first)
        self.check_sample()

    def check_sample(self) -> None:
        """Traces the sample that is shown at the end, if there is one; nothing is computed.

        Raises:
          ValueError, UsageError: if the model cannot make it.
        """
        if self.sample_prompt is None:
            return
        signature = self.batch_signature()
        weights, state = self.abstract(signature[: self.net.n_in])
        jax.eval_shape(self._begin_sample, weights, state)

    def _begin_sample(self, weights: Tree, state: Tree) -> Start:
        """The start of the sample; raises an error if the sample cannot be made."""
        model = Model(self.net, weights, state)
        start = given(model, self.sample_prompt or '', self.tokenizer)
        return begin(model, n_tokens=self.sample_tokens, eos_id=self.tokenizer.eos_id, **start)

    def training_bytes(self, mesh: Any = None, offload: str | None = None) -> dict[str, int]:
        """The memory of a training step, in bytes on a device: the step is compiled and not run.

        Args:
          mesh: in the place of the experiment's; None leaves that.
          offload: as for `Loop`; None is a step without, whatever the experiment says.

        Returns:
          Bytes of 'weights', 'optimizer' and 'temporaries' (activations and gradients). With
          `offload` also of 'host', in its memory: see `Forecast.offloaded`.

        Raises:
          ValueError: if the mesh does not divide a weight or the rows of a batch, or a run with
            `offload` would be refused.
        """
        layout = laid_out(self.mesh if mesh is None else mesh)
        asked = Forecast(self.net, self.train_task, self.batch_signature(), layout)
        return asked.plain() if offload is None else asked.offloaded(offload)


def _first_batch(data: Any) -> tuple[Any, ...]:
    batch = next(iter(data), None)
    if batch is None:
        raise UsageError('the data has no batch: give more text, or a smaller batch_size or length')
    return tuple(batch)
