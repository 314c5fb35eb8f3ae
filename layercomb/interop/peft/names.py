"""The names of an adapter's tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from layercomb.errors import UsageError
from layercomb.interop.stored import Stored
from layercomb.interop.tensors import Tensor

PREFIX = 'base_model.model.'
_FACTOR = re.compile(r'(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?')
_WHOLE = re.compile(r'(.+?)(?:\.modules_to_save\.default)?\.(weight|bias)')


@dataclasses.dataclass(frozen=True)
class Factors:
    """The adapter of a module.

    Attributes:
      a: (r, in) float32.
      b: (out, r) float32.
      magnitude: (out,) float32; None if columns have none of their own.
    """

    a: np.ndarray
    b: np.ndarray
    magnitude: np.ndarray | None = None

    def by_name(self) -> dict[str, np.ndarray]:
        """The arrays by their names."""
        made = {'lora_A': self.a, 'lora_B': self.b}
        return made if self.magnitude is None else {**made, 'lora_magnitude_vector': self.magnitude}

    def tensors(self, module: str) -> dict[str, np.ndarray]:
        """The arrays by the names of their tensors."""
        return {
            f'{PREFIX}{module}.{name}{"" if x.ndim == 1 else ".weight"}': x
            for name, x in self.by_name().items()
        }


def sorted_tensors(
    tensors: Mapping[str, Stored], dora: bool
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """The tensors of an adapter: factors by module, and all others by their names in the base.

    Args:
      tensors: by name.
      dora: whether each module must have a magnitude; else none may.

    Raises:
      UsageError: for a module of which a half is missing, and for names that are no adapter's.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        inside = name.removeprefix(PREFIX)
        if inside == name or 'lora_embedding_' in inside:
            what = 'an adapter of an embedding' if inside != name else 'no tensor of an adapter'
            raise UsageError(f'{name!r:.100} is {what}, which cannot be loaded: merge it there')
        factor, whole = _FACTOR.fullmatch(inside), _WHOLE.fullmatch(inside)
        if factor:
            found.setdefault(factor[1], {})[factor[2]] = tensor.read().astype(np.float32)
        elif whole and '.lora_' not in inside:
            others[f'{whole[1]}.{whole[2]}'] = tensor
        else:
            raise UsageError(f'{name!r:.100} is unknown in an adapter: merge it into its model')
    wanted = {'lora_A', 'lora_B', *(['lora_magnitude_vector'] if dora else [])}
    for module, its in found.items():
        for name in sorted(wanted ^ its.keys()):
            said = f'has no {name}' if name in wanted else f'has a {name}, without "use_dora"'
            raise UsageError(f'the adapter of {module} {said}: copy the whole adapter')
    return {module: _factors(its) for module, its in found.items()}, others


def _factors(its: Mapping[str, np.ndarray]) -> Factors:
    return Factors(its['lora_A'], its['lora_B'], its.get('lora_magnitude_vector'))
