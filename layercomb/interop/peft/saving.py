"""`save`: the adapter of a model alone, as PEFT reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layercomb import paths, trees
from layercomb.errors import UsageError, machine_errors
from layercomb.interop.families import Family, config_of, configs_of, family_of
from layercomb.interop.huggingface.saving import widened
from layercomb.interop.peft.config import CONFIG, WEIGHTS, Written, content_of, targets_of
from layercomb.interop.peft.fused import Part, fused
from layercomb.interop.peft.modules import Module, Modules, modules_of
from layercomb.interop.peft.names import PREFIX
from layercomb.interop.safetensors import write_tensors
from layercomb.interop.stored import read_json
from layercomb.interop.tensors import spill
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.model import Model
from layercomb.transforms.low_rank.adapting import without_lora
from layercomb.transforms.low_rank.layer import LowRank, is_lora
from layercomb.transforms.quantization.holding import hold_wide
from layercomb.trees import Tree

_TASKS = {
    'ForCausalLM': 'CAUSAL_LM',
    'LMHeadModel': 'CAUSAL_LM',
    'ForSequenceClassification': 'SEQ_CLS',
    'ForConditionalGeneration': 'SEQ_2_SEQ_LM',
    'MTModel': 'SEQ_2_SEQ_LM',
    'Model': 'FEATURE_EXTRACTION',
}


def save(
    directory: str | Path, model: Model, base: str = '', model_type: str | None = None
) -> dict[str, int]:
    """Writes the adapter of a model as a directory that PEFT reads, whole or not at all.

    Of all other weights only the head of a classifier is written, as PEFT does; whatever else was
    trained besides is not in it. Where several leaves here are one module there, such as GPT-2's
    ``c_attn``, and their A differ, A is stacked and B is block-diagonal: the function is the same,
    and the rank the sum of theirs. Layers whose A and B are all zeros have no adapter.

    Args:
      directory: the path; it must be empty, or not exist yet.
      model: of one of the families, with `transforms.LowRank` layers.
      base: the name of the model without the adapter, which PEFT looks up.
      model_type: whose names modules have, such as 'phi3', where several kinds have these layers;
        None takes that of ``config.json`` if `base` is a directory, else that which `interop.save`
        would take.

    Returns:
      The size in bytes of each file by its name.

    Raises:
      UsageError: if the model has no adapter, or is of no family; if adapters differ in what PEFT
        has once for all, or stand where it has none; if something is there already, or it cannot be
        written.
    """
    if model.weights is None:
        raise UsageError('this model has no weights to save: call model.init(x) first')
    layers = [layer for _, layer in walk(model.layer) if isinstance(layer, LowRank)]
    if not layers:
        raise UsageError('this model has no adapter: transforms.lora(net, weights) gives it one')
    out = paths.local(directory, 'directory')
    plain = without_lora(model.layer)
    wide = hold_wide(plain)
    family, config = _family(wide, base, model_type)
    modules = modules_of(wide, family, config)
    flat = trees.flatten(model.weights)
    rest = trees.unflatten({path: x for path, x in flat.items() if not is_lora(path)})
    whole_model = widened(plain, wide, rest, family.signature(wide))
    made = _adapters(model.layer, flat, modules, trees.flatten(whole_model))
    if not made:
        raise UsageError('all adapters of this model are zeros: there is nothing to write')
    task = next((t for end, t in _TASKS.items() if config['architectures'][0].endswith(end)), None)
    whole = _head(wide, whole_model, modules, made) if task == 'SEQ_CLS' else {}
    dora, stabilized = _same(layers, 'dora'), _same(layers, 'rank_stabilized')
    written = content_of(
        {name: Written(len(factors.a), scale) for name, (factors, scale) in made.items()},
        targets_of(
            {name: modules.by_name[name].number for name in made},
            {name: each.number for name, each in modules.by_name.items()},
        ),
        dropout=_same(layers, 'dropout'),
        dora=dora,
        rank_stabilized=stabilized,
        whole=_modules(whole),
        base=base,
        task=task,
        fan_in_fan_out=not all(modules.by_name[name].transposed for name in made),
    )
    tensors = {
        name: x for module, (each, _) in made.items() for name, x in each.tensors(module).items()
    }
    return _write(out, directory, written, {**tensors, **whole})


def _family(wide: Layer, base: str, model_type: str | None) -> tuple[Family, dict[str, Any]]:
    """The family whose names are written, and the model's configuration in it.

    Raises:
      UsageError: if the one that is asked for makes another model.
    """
    config = Path(base) / 'config.json'
    if model_type is None and base and config.is_file():
        model_type = read_json(config).get('model_type')
    if model_type is None:
        return config_of(wide)
    wanted = family_of({'model_type': model_type})
    found = next((each for each in configs_of(wide) if each[0] is wanted), None)
    if found is None:
        raise UsageError(f'this model is no {model_type!r:.40}: give another base, or leave it out')
    return found


def _same(layers: list[LowRank], name: str) -> Any:
    """The value of a field that all adapters must share.

    Raises:
      UsageError: if they differ.
    """
    values = {getattr(layer, name) for layer in layers}
    if len(values) > 1:
        raise UsageError(
            f'the adapters differ in {name} ({", ".join(map(str, sorted(values)))}), which PEFT '
            'has once for all: save the merged model, by interop.save'
        )
    return values.pop()


def _adapters(
    net: Layer, flat: Mapping[str, Any], modules: Modules, base: Mapping[str, Any]
) -> dict[str, Any]:
    """For each module that has one: its `Factors` and their scale.

    Raises:
      UsageError: if a weight of an adapter is in no module.
    """
    leaves = {path: layer for path, layer in walk(net) if isinstance(layer, LowRank)}
    found = {name: _parts(each, leaves, flat) for name, each in modules.by_name.items()}
    placed = {part.path for parts in found.values() for part in parts}
    lost = sorted(
        path for path in flat if is_lora(path) and path.rpartition('_lora_')[0] not in placed
    )
    if lost:
        raise UsageError(
            f'PEFT has no place for {lost[0]}, since the matrix is no module of its own there: '
            'save the merged model, by interop.save'
        )
    made = {}
    for name, parts in found.items():
        factors = fused(parts, base) if any(part.is_adapted for part in parts) else None
        if factors is not None:
            made[name] = factors
    return made


def _parts(module: Module, leaves: Mapping[str, LowRank], flat: Mapping[str, Any]) -> list[Part]:
    """The matrices of a module, with their adapters; none if no leaf of it has any."""
    if not any(matrix.leaf in leaves for matrix in module.parts):
        return []
    made = []
    for matrix in module.parts:
        values: dict[str, np.ndarray] = {}
        for name in ('a', 'b', 'magnitude'):
            x = flat.get(f'{matrix.path}_lora_{name}')
            if x is not None:
                values[name] = np.asarray(x if matrix.number is None else x[matrix.number])
        layer = leaves.get(matrix.leaf)
        made.append(Part(matrix, layer.scale if layer is not None else 1.0, values))
    return made


def _head(
    wide: Layer, weights: Tree, modules: Modules, made: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of a classifier's head.

    Raises:
      UsageError: if it has an adapter too.
    """
    entries = [entry for entry in modules.entries if entry.ours.startswith('head/')]
    adapted = sorted({entry.theirs.rpartition('.')[0] for entry in entries} & made.keys())
    if adapted:
        raise UsageError(
            f'PEFT holds the head of a classifier whole, and {adapted[0]} has an adapter here: '
            'train the head itself, or save the merged model, by interop.save'
        )
    part = {'head': weights['head']}
    return {PREFIX + name: np.asarray(x, np.float32) for name, x in spill(wide, part, entries)}


def _modules(whole: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules of tensors; of a head of several, the one around them."""
    names = {name.removeprefix(PREFIX).rpartition('.')[0] for name in whole}
    return tuple(sorted({x.split('.')[0] if x.startswith('classifier.') else x for x in names}))


def _write(
    out: Path, directory: str | Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, int]:
    with machine_errors('choose another directory, or free some space'):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f'{str(directory)!r} is there already: choose another directory')
        with paths.whole(out) as made:
            made.mkdir()
            arrays = {name: np.ascontiguousarray(x) for name, x in sorted(tensors.items())}
            write_tensors(made / WEIGHTS, arrays, {'format': 'pt'})
            text = json.dumps(config, indent=2, ensure_ascii=False)
            (made / CONFIG).write_text(text + '\n', encoding='utf-8')
            return {path.name: path.stat().st_size for path in sorted(made.iterdir())}
