"""Transforms: functions from a description of a model to another description.

Precision, quantization, tying and unstacking are transforms, not flags of layers. They keep every
path. Those that need only the description use `rewrite`, which reaches every layer, inside
combinators and wrappers too.
"""

from layercomb.transforms.casting import Cast, cast
from layercomb.transforms.narrowing import hold_narrow, hold_wide
from layercomb.transforms.quantization import Quantized, bare, narrow_paths, quantize
from layercomb.transforms.reversing import reversible
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tied_rows import TiedRows
from layercomb.transforms.tying import Tied
from layercomb.transforms.unstacking import unstack, unstack_state
from layercomb.transforms.weight_axes import axes

__all__ = [
    'Cast',
    'Quantized',
    'Tied',
    'TiedRows',
    'axes',
    'bare',
    'cast',
    'hold_narrow',
    'hold_wide',
    'narrow_paths',
    'quantize',
    'reversible',
    'rewrite',
    'unstack',
    'unstack_state',
]
