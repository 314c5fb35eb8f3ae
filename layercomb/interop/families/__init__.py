"""Families of pretrained models: what a `config.json` means, and which tensor is which weight."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from layercomb.errors import UsageError
from layercomb.interop.configs import Config
from layercomb.interop.evaluated import evaluated
from layercomb.interop.tensors import Entry
from layercomb.layers.core.layer import Layer
from layercomb.layers.metrics.class_names import class_names
from layercomb.shapes import Signature, shape_dtype

# Where each family is, module and name, by the model_type of a config.json; it is imported when it
# is needed.
PLACES: dict[str, str] = {
    'albert': 'bert.ALBERT',
    'bert': 'bert.BERT',
    'fnet': 'bert.FNET',
    'gemma2': 'gemma.GEMMA',
    'gemma3': 'gemma.GEMMA',
    'gemma3_text': 'gemma.GEMMA',
    'gpt2': 'gpt2.GPT2',
    'llama': 'llama.LLAMA',
    'marian': 'marian.MARIAN',
    'mistral': 'llama.LLAMA',
    'mt5': 't5.T5',
    'phi3': 'phi.PHI',
    'qwen2': 'qwen.QWEN',
    'qwen3': 'qwen.QWEN',
    'reformer': 'reformer.REFORMER',
    'roberta': 'bert.ROBERTA',
    't5': 't5.T5',
}


def tokens(net: Layer) -> Signature:
    """The signature of a model whose inputs are token ids (B, L): as many as it takes."""
    return (shape_dtype((1, 8), 'int32'),) * net.n_in


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """How models of one kind come in and go out.

    Attributes:
      name: of the family, for messages.
      net: makes the model that a configuration describes. It asks for every entry that matters;
        what it never asked for, and is not neutral, is refused by `Config.check_read`.
      entries: the tensors of the model that a configuration describes.
      config: the inverse of `net`: what to write into config.json. `config_of` proves it.
      signature: of the model's inputs.
      ignored: patterns of names of tensors that hold nothing to load.
    """

    name: str
    net: Callable[[Config], Layer]
    entries: Callable[[Config], list[Entry]]
    config: Callable[[Layer], dict[str, Any]]
    signature: Callable[[Layer], Signature] = tokens
    ignored: Sequence[str] = ()


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration names.

    Args:
      config: the content of a config.json.

    Raises:
      UsageError: if it is unknown, listing those known.
    """
    kind = config.get('model_type')
    if not isinstance(kind, str) or kind not in PLACES:
        raise UsageError(
            f'config.json describes a model of type {kind!r}, and known are '
            f'{", ".join(sorted(PLACES))}: convert one of those'
        )
    return _imported(kind)


def config_of(net: Layer) -> tuple[Family, dict[str, Any]]:
    """The family and configuration of a model, read off its layers: the first that fits.

    Args:
      net: a model as the family makes it, or an equal one. What matters in training alone, such as
        dropout, may differ.

    Raises:
      UsageError: if no family makes this model.
    """
    found = next(configs_of(net), None)
    if found is not None:
        return found
    if class_names(net) is not None:
        raise UsageError(
            "this classifier averages over positions, and other programs' heads read the first "
            'one, so none of them can read it: keep the run, or save it by layercomb export'
        )
    names = sorted({_imported(kind).name for kind in PLACES})
    raise UsageError(
        f'this model belongs to none of the families {", ".join(names)}, so other programs '
        'cannot read it: save it by layercomb export, or build it by models.Llama or the like'
    )


def configs_of(net: Layer) -> Iterator[tuple[Family, dict[str, Any]]]:
    """All families that make a model, and its configuration in each.

    A configuration is right if it makes an equal model, so each family is tried and proved.

    Args:
      net: as of `config_of`.
    """
    net = evaluated(net)
    tried: list[str] = []
    for kind in PLACES:
        family = _imported(kind)
        if family.name in tried:
            continue
        tried.append(family.name)
        try:
            config = family.config(net)
            fits = evaluated(family.net(Config(config))) == net
        except (UsageError, TypeError, ValueError, LookupError, AttributeError, StopIteration):
            continue  # it has other layers
        if fits:
            yield family, config


def _imported(kind: str) -> Family:
    module, _, name = PLACES[kind].partition('.')
    family: Family = getattr(importlib.import_module(f'{__name__}.{module}'), name)
    return family
