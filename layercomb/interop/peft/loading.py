"""`load`: an adapter of PEFT on a model of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from layercomb import paths, trees
from layercomb.errors import UsageError
from layercomb.interop import pickles, safetensors
from layercomb.interop.families import config_of, configs_of
from layercomb.interop.huggingface.saving import widened
from layercomb.interop.peft.config import CONFIG, WEIGHTS, Adapter, adapter_of
from layercomb.interop.peft.modules import Matrix, Module, Modules, modules_of, with_tied_head
from layercomb.interop.peft.names import Factors, sorted_tensors
from layercomb.interop.peft.whole import put_whole
from layercomb.interop.stored import Stored, read_json
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.model import Model
from layercomb.transforms.leaves import rewrite_leaves
from layercomb.transforms.low_rank.layer import LowRank
from layercomb.transforms.quantization.holding import hold_wide

_SHOWN = 4  # names in a message


@dataclasses.dataclass(frozen=True)
class _Part:
    """The adapter of one matrix of ours.

    Attributes:
      matrix: which.
      a, b: ours, (*i, r) and (r, *o).
      magnitude: (*o); None if there is none.
      alpha, scale: of the module that it comes from.
    """

    matrix: Matrix
    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None
    alpha: float
    scale: float


def load(directory: str | Path, model: Model) -> Model:
    """Puts an adapter that PEFT wrote on the model that it was trained on.

    What ``modules_to_save`` lists, such as the head of a classifier, replaces weights of the model.
    The other weights are shared with it.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
      model: of one of the families, as `interop.load` gives it, wide or narrow, without adapters.

    Returns:
      A model whose adapted leaves are `transforms.LowRank`. A module there that is several leaves
      here, such as GPT-2's ``c_attn``, gives each of them its A, and its part of B.

    Raises:
      UsageError: if a file is missing or damaged; for another kind of adapter, or an entry of its
        configuration that is not understood; if it was made for a model of other names or shapes,
        or a half of it is missing; if the model is of no family, or has adapters already.
    """
    path = paths.local(directory, 'directory')
    if not (path / CONFIG).is_file():
        raise UsageError(f'{str(directory)!r} holds no adapter of PEFT ({CONFIG} is missing)')
    entries = read_json(path / CONFIG)
    adapter = adapter_of(entries)
    if model.weights is None:
        raise UsageError('this model has no weights: load it, or train it first')
    if any(isinstance(layer, LowRank) for _, layer in walk(model.layer)):
        raise UsageError(
            'the model has an adapter already: give the model without it, or transforms.merge it'
        )
    wide = hold_wide(model.layer)
    factors, others = sorted_tensors(_tensors_in(path), adapter.dora)
    modules = _fitting(wide, factors, entries)
    parts = [
        part
        for name, found in factors.items()
        for part in _parts(_found(modules, name), name, found, adapter)
    ]
    base = trees.flatten(model.weights)
    base = put_whole(base, wide, modules.entries, others, adapter)
    seen = widened(model.layer, wide, trees.unflatten(base), modules.family.signature(wide))
    whole = trees.flatten(seen)
    whole = with_tied_head(wide, whole) if adapter.dora else whole
    leaves, made = _leaves(parts, modules, adapter, whole)

    def one(path: str, layer: Layer) -> Layer:
        return LowRank(layer, **leaves[path]) if path in leaves else layer

    net = rewrite_leaves(model.layer, one)
    return Model(net, trees.unflatten({**base, **made}), model.state)


def _tensors_in(path: Path) -> dict[str, Stored]:
    if (path / WEIGHTS).is_file():
        return safetensors.read_tensors(path / WEIGHTS)
    old = path / 'adapter_model.bin'
    if old.is_file():
        return pickles.read_tensors(old)
    raise UsageError(f'{str(path)!r} holds no weights, {WEIGHTS}: copy the whole adapter')


def _found(modules: Modules, name: str) -> Module:
    module = modules.find(name)
    assert module is not None  # `_fitting` has seen it
    return module


def _fitting(wide: Layer, factors: Mapping[str, Factors], entries: Mapping[str, Any]) -> Modules:
    """The modules of a model, in the family whose names the adapter knows.

    Several families may make one model: a Phi-3 is a Mistral whose matrices are merged there.
    """
    if not factors:
        raise UsageError(f'{WEIGHTS} holds no lora_A and lora_B: copy the whole adapter')
    families = list(configs_of(wide)) or [config_of(wide)]
    tried = [modules_of(wide, *found) for found in families]
    lost = [sorted(name for name in factors if each.find(name) is None) for each in tried]
    modules, unknown = min(zip(tried, lost, strict=True), key=lambda found: len(found[1]))
    if unknown:
        base = entries.get('base_model_name_or_path')
        was = f'it was made for {base!r:.80}' if base else 'it was made for another model'
        raise UsageError(
            f'the adapter is for {_some(unknown)}, which can have none in this model: {was}, so '
            'load it on that one'
        )
    return modules


def _parts(module: Module, name: str, found: Factors, adapter: Adapter) -> list[_Part]:
    """The adapter of a module, for each matrix that the module is made of."""
    rank, alpha = adapter.of(module.name)
    if (rank, alpha) == (adapter.rank, adapter.alpha):
        rank, alpha = adapter.of(name)
    n_out, n_in = module.shape
    wanted = {'lora_A': (rank, n_in), 'lora_B': (n_out, rank), 'lora_magnitude_vector': (n_out,)}
    for what, tensor in found.by_name().items():
        if tensor.size != np.prod(wanted[what]) or tensor.shape[0] != wanted[what][0]:
            raise UsageError(
                f'the adapter of {name}: {what} is {tensor.shape} and not {wanted[what]}: it was '
                f'made for a model of other sizes, or {CONFIG} belongs to another adapter'
            )
    made, start = [], 0
    for matrix in module.parts:
        rows = slice(start, start + matrix.n_results)
        start = rows.stop
        magnitude = None
        if found.magnitude is not None:
            magnitude = found.magnitude.reshape(-1)[rows].reshape(matrix.given)
        a, b = matrix.our_a(found.a), matrix.our_b(found.b[rows])
        made.append(_Part(matrix, a, b, magnitude, alpha, adapter.scale(rank, alpha)))
    return made


def _leaves(
    parts: Sequence[_Part], modules: Modules, adapter: Adapter, base: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The fields of `LowRank` by the path of each leaf, and the weights of all adapters by path."""
    by_leaf: dict[str, list[_Part]] = {}
    for part in parts:
        by_leaf.setdefault(part.matrix.leaf, []).append(part)
    of_leaf: dict[str, dict[str, Matrix]] = {}
    for module in modules.by_name.values():
        for matrix in module.parts:
            of_leaf.setdefault(matrix.leaf, {})[matrix.path] = matrix
    fields: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {}
    for leaf, its in by_leaf.items():
        rank = max(part.b.shape[0] for part in its)
        alike = all((len(x.b), x.scale) == (rank, its[0].scale) for x in its)
        alpha = its[0].alpha if alike else its[0].scale * rank / adapter.scale(rank, rank)
        fields[leaf] = {
            'rank': rank,
            'alpha': float(alpha),
            'dropout': adapter.dropout,
            'dora': adapter.dora,
            'rank_stabilized': adapter.rank_stabilized,
        }
        for path, matrix in of_leaf[leaf].items():
            own = [part for part in its if part.matrix.path == path]
            wide = base[path] if adapter.dora else None
            made |= _weights(matrix, own, rank, its[0].scale, wide)
    return fields, made


def _weights(
    matrix: Matrix, parts: Sequence[_Part], rank: int, scale: float, wide: Any
) -> dict[str, Any]:
    """The adapters of one weight by path; layers without one get zeros.

    Args:
      matrix: of the weight, any of those that it stacks.
      parts: the adapters there are.
      rank: of the leaf: others are padded with zeros.
      scale: of the leaf: where another one is asked for, B makes up for it.
      wide: the weight itself, if columns have magnitudes; else None.
    """
    n = matrix.n_stacked or 1
    a = np.zeros((n, *matrix.summed, rank), np.float32)
    b = np.zeros((n, rank, *matrix.given), np.float32)
    made = {'a': a, 'b': b}
    if wide is not None:
        along = tuple(range(1, 1 + len(matrix.summed)))
        whole = np.asarray(wide, np.float32).reshape(n, *matrix.summed, *matrix.given)
        made['magnitude'] = np.sqrt(np.square(whole).sum(along))
    for part in parts:
        at, r = part.matrix.number or 0, len(part.b)
        a[at, ..., :r] = part.a
        b[at, :r] = part.b if part.scale == scale else part.b * np.float32(part.scale / scale)
        if part.magnitude is not None:
            made['magnitude'][at] = part.magnitude
    stacked = matrix.n_stacked is not None
    return {
        f'{matrix.path}_lora_{name}': jnp.asarray(x if stacked else x[0])
        for name, x in made.items()
    }


def _some(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ', '.join(names[:_SHOWN]) + (f' and {more} more' if more > 0 else '')
