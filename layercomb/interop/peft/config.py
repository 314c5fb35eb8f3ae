"""What an adapter_config.json says, there and back."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from layercomb.errors import UsageError
from layercomb.interop.configs import Config

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
# Where it came from, how it began or was trained, and which modules it was put on: the file of
# tensors says that too.
_NEUTRAL = (
    'auto_mapping', 'base_model_name_or_path', 'corda_config', 'eva_config', 'exclude_modules',
    'fan_in_fan_out', 'inference_mode', 'layers_pattern', 'layers_to_transform', 'loftq_config',
    'lora_ga_config', 'megatron_core', 'peft_version', 'qalora_group_size', 'revision',
    'runtime_config', 'target_modules', 'task_type',
)  # fmt: skip
# Ways to begin that leave the base as it is. Others take from it what they put into the adapter.
_BEGINNINGS = (True, False, 'gaussian', 'eva', 'orthogonal')


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How an adapter is to be read.

    Attributes:
      rank, alpha: of modules that no pattern names.
      ranks, alphas: of others, by a pattern of their names.
      dropout: of its inputs, in training.
      dora: whether columns have magnitudes of their own.
      rank_stabilized: whether the scale is alpha / √rank.
      whole: modules of which the file holds all weights.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float
    dora: bool
    rank_stabilized: bool
    whole: tuple[str, ...]

    def of(self, module: str) -> tuple[int, float]:
        """The rank and the alpha of a module."""
        return (
            self.ranks.get(_fitting(self.ranks, module), self.rank),
            self.alphas.get(_fitting(self.alphas, module), self.alpha),
        )

    def scale(self, rank: int, alpha: float) -> float:
        """What multiplies the product of both factors."""
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def holds_whole(self, module: str) -> bool:
        """Whether all weights of a module are in the file."""
        return any(f'.{module}.'.find(f'.{name}.') >= 0 for name in self.whole)


def adapter_of(entries: Mapping[str, Any]) -> Adapter:
    """Reads an adapter_config.json.

    Args:
      entries: its content.

    Raises:
      UsageError: for another kind of adapter, and for an entry that changes what is computed and is
        not understood.
    """
    config = Config(entries, CONFIG)
    kind = config.get('peft_type')
    if kind != 'LORA':
        raise UsageError(
            f'{CONFIG} describes an adapter of type {kind!r:.40}, and only LORA is known: merge it '
            'into its model there, and load that'
        )
    config.must_be('bias', 'none')
    for name in ('lora_bias', 'use_qalora', 'ensure_weight_tying'):
        config.must_be(name, False)
    for name in _NEUTRAL:
        config.get(name)
    _check_beginning(config)
    made = Adapter(
        rank=config.count('r', 8),
        alpha=config.number('lora_alpha', 8),
        ranks=_patterns(config, 'rank_pattern', lambda x: isinstance(x, int) and x > 0),
        alphas=_patterns(config, 'alpha_pattern', lambda x: isinstance(x, int | float)),
        dropout=config.number('lora_dropout', 0.0),
        dora=config.flag('use_dora'),
        rank_stabilized=config.flag('use_rslora'),
        whole=_names(config, 'modules_to_save'),
    )
    config.check_read('an adapter of type LORA')
    if not 0 <= made.dropout < 1:
        raise UsageError(f'{CONFIG}: lora_dropout is {made.dropout}, and must be from 0 to below 1')
    return made


def _check_beginning(config: Config) -> None:
    found = config.get('init_lora_weights', True)
    if found not in _BEGINNINGS:
        raise UsageError(
            f'{CONFIG}: init_lora_weights is {found!r:.40}, which changes the base model too: save '
            'it there with path_initial_model_for_weight_conversion, as an ordinary adapter'
        )


def _patterns(config: Config, name: str, fits: Any) -> dict[str, Any]:
    found = config.get(name, {})
    known = isinstance(found, dict) and all(
        isinstance(key, str) and not isinstance(x, bool) and fits(x) for key, x in found.items()
    )
    if not known:
        raise UsageError(f'{CONFIG}: {name} is {found!r:.60}, and must give a number by each name')
    return dict(found)


def _names(config: Config, name: str) -> tuple[str, ...]:
    found = config.get(name, [])
    if not isinstance(found, list) or not all(isinstance(x, str) and x for x in found):
        raise UsageError(f'{CONFIG}: {name} is {found!r:.60}, and must be a list of names')
    return tuple(found)


def _fitting(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that fits the end of a module's name; '' if none does."""
    for pattern in patterns:
        try:
            if re.match(rf'(.*\.)?({pattern})$', module):
                return pattern
        except re.error as e:
            raise UsageError(f'{CONFIG}: {pattern!r:.60} is no pattern ({e}): mend it') from None
    return ''


@dataclasses.dataclass(frozen=True)
class Written:
    """The rank and the scale of the adapter of one module, to be written.

    Attributes:
      rank: of both factors.
      scale: of their product.
    """

    rank: int
    scale: float


def content_of(
    modules: Mapping[str, Written],
    targets: Mapping[str, Any],
    *,
    dropout: float,
    dora: bool,
    rank_stabilized: bool,
    whole: tuple[str, ...] = (),
    base: str = '',
    task: str | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Args:
      modules: what is written for each module, by its name.
      targets: ``target_modules``, and others that say where it is, as `targets_of` gives them.
      dropout, dora, rank_stabilized, whole: as of `Adapter`.
      base: the name of the base model.
      task: the kind of model, in PEFT's words.
      fan_in_fan_out: whether their matrices are (in, out).
    """

    def alpha(each: Written) -> float:
        made = each.scale * (math.sqrt(each.rank) if rank_stabilized else each.rank)
        near = round(made)
        return near if abs(made - near) <= 1e-9 * max(1, abs(near)) else made

    rank = _usual(each.rank for each in modules.values())
    usual = _usual(alpha(each) for each in modules.values())
    return {
        'peft_type': 'LORA',
        'task_type': task,
        'base_model_name_or_path': base or None,
        'r': rank,
        'lora_alpha': usual,
        'lora_dropout': dropout,
        'bias': 'none',
        'fan_in_fan_out': fan_in_fan_out,
        'use_rslora': rank_stabilized,
        'use_dora': dora,
        **targets,
        'rank_pattern': {name: each.rank for name, each in modules.items() if each.rank != rank},
        'alpha_pattern': {
            name: alpha(each) for name, each in modules.items() if alpha(each) != usual
        },
        'modules_to_save': list(whole) or None,
        'init_lora_weights': True,
        'inference_mode': True,
    }


def _usual(values: Any) -> Any:
    ((value, _),) = collections.Counter(values).most_common(1)
    return value


def targets_of(adapted: Mapping[str, int | None], all_modules: Mapping[str, int | None]) -> Any:
    """Where an adapter is, as briefly as it can be said.

    Args:
      adapted: the names of its modules, and the numbers of their layers; None outside of layers.
      all_modules: the same of all modules that there are, of any kind.

    Returns:
      ``target_modules``: ends of names, where they fit no other modules; with
      ``layers_to_transform`` where some layers have it, and all of its modules; else whole names.
    """
    ends = _ends(set(adapted), set(all_modules))
    if ends is not None:
        return {'target_modules': ends, 'layers_to_transform': None}
    layers = {number for number in adapted.values() if number is not None}
    inside = {name for name, number in all_modules.items() if number in layers}
    ends = _ends(set(adapted), inside)
    if ends is None or None in adapted.values():
        return {'target_modules': sorted(adapted), 'layers_to_transform': None}
    return {'target_modules': ends, 'layers_to_transform': sorted(layers)}


def _ends(adapted: set[str], among: set[str]) -> list[str] | None:
    """The shortest ends of names that fit the adapted modules alone; None if there are none."""
    made: list[str] = []
    for name in sorted(adapted):
        parts = name.split('.')
        least = 2 if parts[-1] == 'dense' else 1  # the heads of other models have one too
        ends = ('.'.join(parts[-n:]) for n in range(min(least, len(parts)), len(parts) + 1))
        fits = (end for end in ends if not any(_has_end(x, end) for x in among - adapted))
        end = next(fits)
        if re.search(r'(^|\.)\d+(\.|$)', end):  # it names one layer alone
            return None
        if end not in made:
            made.append(end)
    return made


def _has_end(name: str, end: str) -> bool:
    return f'.{name}'.endswith(f'.{end}')
