"""What varies is a rewrite, not a flag: functions from a description to a description.

Precision, quantization, tying and unstacking change no layer's code and keep every path. What needs
the description alone is built on one bottom-up `rewrite`, which reaches every layer, inside
combinators and wrappers alike.
"""

from layercomb.transforms.casting import Cast, cast
from layercomb.transforms.quantization import Quantized, bare, narrow_paths, quantize
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tying import Tied
from layercomb.transforms.unstacking import unstack, unstack_state
from layercomb.transforms.weight_axes import axes

__all__ = [
    'Cast',
    'Quantized',
    'Tied',
    'axes',
    'bare',
    'cast',
    'narrow_paths',
    'quantize',
    'rewrite',
    'unstack',
    'unstack_state',
]
