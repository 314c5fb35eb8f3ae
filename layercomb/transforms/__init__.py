"""Transforms: functions from a description of a model to another description.

Precision, quantization, tying and unstacking are transforms, not flags of layers. They keep every
path. Those that need only the description use `rewrite`, which reaches every layer, inside
combinators and wrappers too.
"""

from layercomb.transforms.caching import narrow_caches
from layercomb.transforms.casting import Cast, cast
from layercomb.transforms.classifying import classifier
from layercomb.transforms.densifying import chosen_more, denser
from layercomb.transforms.fusing.layer import Fused, fuse
from layercomb.transforms.low_rank.adapting import lora, without_lora
from layercomb.transforms.low_rank.layer import LowRank, is_lora, lora_paths
from layercomb.transforms.low_rank.many import ManyLowRank, adapter_names, adapters, with_adapter
from layercomb.transforms.low_rank.merging import merge
from layercomb.transforms.quantization.calibration.inputs import multiplied
from layercomb.transforms.quantization.holding import hold_narrow, hold_wide
from layercomb.transforms.quantization.layer import Quantized, bare, narrow_paths
from layercomb.transforms.quantization.quantizing import quantize
from layercomb.transforms.quantization.tied_rows import TiedRows
from layercomb.transforms.rematerializing import remat
from layercomb.transforms.reversing import reversible
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.segments import Segmented, segmented
from layercomb.transforms.selecting import sparse_attention
from layercomb.transforms.sparsifying.sparsify import sparsify
from layercomb.transforms.stretching import stretch
from layercomb.transforms.tying import Tied
from layercomb.transforms.unstacking import unstack, unstack_state
from layercomb.transforms.weight_axes import axes

__all__ = [
    'Cast',
    'Fused',
    'LowRank',
    'ManyLowRank',
    'Quantized',
    'Segmented',
    'Tied',
    'TiedRows',
    'adapter_names',
    'adapters',
    'axes',
    'bare',
    'cast',
    'chosen_more',
    'classifier',
    'denser',
    'fuse',
    'hold_narrow',
    'hold_wide',
    'is_lora',
    'lora',
    'lora_paths',
    'merge',
    'multiplied',
    'narrow_caches',
    'narrow_paths',
    'quantize',
    'remat',
    'reversible',
    'rewrite',
    'segmented',
    'sparse_attention',
    'sparsify',
    'stretch',
    'unstack',
    'unstack_state',
    'with_adapter',
    'without_lora',
]
