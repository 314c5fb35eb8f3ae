"""`pretrained`: a model of another library as that of an experiment.

A run that starts from one keeps a description of it in its directory, `pretrained/`: configuration,
tokenizer, chat template, and what the source was like. With the checkpoints, that is all it takes
to go on, to measure and to talk, when the source is gone or has changed.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from layercomb import interop, paths, transforms, trees
from layercomb.checks import Size, checked
from layercomb.errors import UsageError, UsageWarning, machine_errors
from layercomb.interop import descriptions
from layercomb.launcher import runs, sources
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.shapes import Signature
from layercomb.trees import Tree

FOLDER = 'pretrained'
_SOURCE = 'source.json'
_GROUP, _GROUP_4 = 64, 32  # weights that share a scale; 4 bits lose much less in small groups
_SAMPLES, _SAMPLE = 16, 1 << 16  # parts of a file that are compared, and the bytes of one

Adapt = Callable[[Layer, Tree], tuple[Layer, Tree]]


class Pretrained(Model):
    """A model that training starts from, with its tokenizer; `pretrained` makes it.

    Args:
      layer: what trains.
      weights: where it starts; None in a run that has checkpoints, which hold them.
      loaded: the model before it was rewritten, without weights.
      plain: `layer` without what is for training alone: the same paths, and the same outputs.
      tokenizer: the model's own; None if it has none.
      name: of the source, as it was given.
      source: where it was read from.
      is_wide: whether the weights of the loaded model stayed float32.
    """

    def __init__(
        self,
        layer: Layer,
        weights: Tree | None,
        *,
        loaded: Layer,
        plain: Layer,
        tokenizer: Any,
        name: str,
        source: Path,
        is_wide: bool,
    ) -> None:
        super().__init__(layer, weights)
        self.loaded, self.plain = loaded, plain
        self.tokenizer, self.name = tokenizer, name
        self.source, self.is_wide = source, is_wide

    @property
    def signature(self) -> Signature:
        """Of its inputs, such as token ids and a mask."""
        return interop.signature(Model(self.loaded))

    def wide_count(self, weights: Tree) -> int:
        """How many weights there are, of which narrow ones count as the wide ones.

        Args:
          weights: of `layer`, arrays or their shapes.
        """
        if self.is_wide:
            return trees.count(weights)
        loaded = _shapes(self.loaded)
        new = trees.flatten(weights)
        return trees.count(loaded) + trees.count(
            {path: x for path, x in new.items() if transforms.is_lora(path)}
        )

    def finished(self, weights: Tree, state: Tree, *, merge: bool | None = None) -> Model:
        """The model as it is used after training: without what is for training alone.

        Args:
          weights, state: of `layer`.
          merge: whether adapters become a part of the weights beside which they stand, which are
            widened for it; None does so if those are wide.
        """
        net, merging = self.plain, self.is_wide if merge is None else merge
        if merging and any(map(transforms.is_lora, trees.flatten(weights))):
            net, weights = transforms.merge(net, weights)
        return Model(net, weights, state)


_run: contextvars.ContextVar[Path | None] = contextvars.ContextVar('run', default=None)


@contextlib.contextmanager
def inside(run: str | Path | None) -> Iterator[None]:
    """Inside the context, `pretrained` takes what a run keeps in the place of its source.

    Args:
      run: the run's directory, which need not exist yet; None for none.
    """
    held = _run.set(None if run is None else paths.local(run, 'run_dir'))
    try:
        yield
    finally:
        _run.reset(held)


@checked
def pretrained(
    source: str,
    *,
    bits: int | None = None,
    adapt: Callable[..., Any] | None = None,
    reversible: Size | None = None,
    remat: bool = False,
) -> Pretrained:
    """Returns a model that exists, with its weights and its tokenizer, to be trained further.

    A configuration says ``cli.train.model = @cli.pretrained()``. In a run that has checkpoints the
    source is not read: the run's own description gives the layers, and the checkpoint the weights.

    Args:
      source: a directory of Hugging Face, a .gguf file, or the name of a model that a package
        carries, such as 'smollm2'.
      bits: 16, 8 or 4 narrows the large matrices, which then do not train: for `adapt`. None makes
        all weights float32.
      adapt: a function (net, weights) -> (net, weights), such as `transforms.lora`.
      reversible: trains without keeping the inputs of blocks: the m of `transforms.reversible`.
      remat: keeps the inputs of blocks and computes the rest again, see `transforms.remat`.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range.
      UsageError: if there is no such model, or it cannot be read.
    """
    if bits not in (None, 16, 8, 4):
        raise ValueError(f'pretrained: bits={bits}: give 16, 8 or 4, or None for float32')
    if reversible is not None and remat:
        raise ValueError('pretrained: reversible= and remat= both save memory: leave one out')
    run = _run.get()
    if run is not None and _goes_on(run):
        net, tokenizer = descriptions.read(run / FOLDER)
        path, weights = Path(_kept(run)['path']), None
    else:
        path = found(source).path
        model, tokenizer = interop.load(path, dtype='float32')
        net, weights = model.layer, model.weights

    def rewritten(weights: Tree) -> tuple[Layer, Tree]:
        layer = net
        if bits is not None:
            group = _GROUP_4 if bits == 4 else _GROUP
            layer, weights = transforms.quantize(layer, weights, bits, group)
        return (layer, weights) if adapt is None else adapt(layer, weights)

    plain, weights = _described(rewritten, net) if weights is None else rewritten(weights)
    layer = transforms.remat(plain) if remat else plain
    layer = layer if reversible is None else transforms.reversible(plain, m=reversible)
    return Pretrained(
        layer, weights, loaded=net, plain=plain, tokenizer=tokenizer, name=source,
        source=path, is_wide=bits is None,
    )  # fmt: skip


def pretrained_tokenizer(source: str) -> Any:
    """Returns the tokenizer of a model that exists, for the data; no weights are read.

    Args:
      source: as of `pretrained`.

    Raises:
      UsageError: if there is no such model, or it has no tokenizer.
    """
    run = _run.get()
    if run is not None and _goes_on(run):
        _, tokenizer = descriptions.read(run / FOLDER)
    else:
        tokenizer = descriptions.tokenizer_of(found(source).path)
    if tokenizer is None:
        raise UsageError(f'{source!r} has no tokenizer, so it reads no text: put one beside it')
    return tokenizer


def found(name: str) -> sources.Source:
    """Finds a model that training can start from.

    Args:
      name: as of `pretrained`.

    Raises:
      UsageError: if there is none, or it is of a kind that cannot be kept in a run.
    """
    source = sources.find(name)
    if source.kind == sources.RUN:
        raise UsageError(
            f'{name!r} is a run: layercomb convert {name} DIR writes its model, and DIR can be '
            'trained further'
        )
    if source.kind not in (sources.HUGGING_FACE, sources.GGUF):
        raise UsageError(
            f'{name!r} is a model of Trax, which is not trained further here: give a directory of '
            'Hugging Face or a .gguf file'
        )
    return source


def kept_source(source: sources.Source, run: Path) -> sources.Source | None:
    """The source of a run that goes on, which may be gone; None if it began from another one.

    Args:
      source: as it is named now; its path is where it would be.
      run: the run's directory, which need not exist.
    """
    if not _goes_on(run):
        return None
    said = _kept(run)
    if source.name != said['name'] and str(source.path) != said['path']:
        return None
    return sources.Source(source.name, source.kind, Path(said['path']))


def net_of(source: sources.Source, run: Path) -> Layer:
    """The layers of a model, from what the run keeps if it goes on. No weights are read.

    Args:
      source: of the model.
      run: the run's directory, which need not exist.

    Raises:
      UsageError: if it cannot be read.
    """
    if _goes_on(run):
        return descriptions.read(run / FOLDER)[0]
    return descriptions.net_of(source.path)


def keep(model: Pretrained, run: Path) -> None:
    """Writes into a run what rebuilds its model, before training starts.

    A run that has it already keeps it; if its source is another one now, a warning says so.

    Args:
      model: of the run.
      run: the run's directory, which exists.

    Raises:
      UsageError: if it cannot be written.
    """
    if model.weights is None:
        _warn_if_changed(run)
        return
    descriptions.keep(model.source, run / FOLDER, Model(model.loaded), model.tokenizer)
    files = _fingerprint(model.source)
    said = {'name': model.name, 'path': str(model.source), 'files': files}
    runs.write_text(run / FOLDER / _SOURCE, json.dumps(said, indent=2) + '\n')


def _described(rewrite: Callable[[Tree], tuple[Layer, Tree]], net: Layer) -> tuple[Layer, None]:
    """The layer that `rewrite` makes, which is traced: there are no weights."""
    layers: list[Layer] = []

    def traced(weights: Tree) -> Tree:
        layer, weights = rewrite(weights)
        layers.append(layer)
        return weights

    jax.eval_shape(traced, _shapes(net))
    return layers[0], None


def _shapes(net: Layer) -> Tree:
    """The weights of a layer that was loaded, as `jax.ShapeDtypeStruct`."""
    signature = interop.signature(Model(net))
    key = jax.eval_shape(jax.random.key, 0)
    shapes: Tree = jax.eval_shape(lambda rng: net.init(signature, rng)[0], key)
    return shapes


def _goes_on(run: Path) -> bool:
    """Whether a run has a checkpoint, and keeps a description of its model."""
    if not (run / FOLDER / _SOURCE).is_file():
        return False
    from layercomb.supervised.checkpoints import Checkpoints

    return Checkpoints(run / 'checkpoints').latest() is not None


def _kept(run: Path) -> dict[str, Any]:
    """What a run says of its source."""
    file = run / FOLDER / _SOURCE
    try:
        made = json.loads(runs.read_text(file))
        return {'name': str(made['name']), 'path': str(made['path']), 'files': made['files']}
    except (ValueError, TypeError, LookupError):
        raise UsageError(f'{str(file)!r} is damaged: take it from a copy of the run') from None


def _warn_if_changed(run: Path) -> None:
    said = _kept(run)
    path = Path(said['path'])
    with contextlib.suppress(OSError):
        if path.exists() and _fingerprint(path) != said['files']:
            warnings.warn(
                f'{said["name"]!r} has changed since this run began, which goes on from what it '
                'began with: for the new one, choose another --output_dir',
                UsageWarning,
                stacklevel=2,
            )


def _fingerprint(source: Path) -> dict[str, list[int]]:
    """Size and checksum of the files of a source: of `_SAMPLES` parts, quick for large models."""
    files = [source] if source.is_file() else sorted(source.glob('*'))
    wanted = [file for file in files if file.is_file() and not file.name.startswith('.')]
    with machine_errors('check the path of the model'):
        return {file.name: _sampled(file) for file in wanted}


def _sampled(file: Path) -> list[int]:
    size, checksum = file.stat().st_size, 0
    with file.open('rb') as opened:
        for i in range(_SAMPLES):
            opened.seek(i * max(size - _SAMPLE, 0) // (_SAMPLES - 1))
            checksum = zlib.crc32(opened.read(_SAMPLE), checksum)
    return [size, checksum]
