"""Pure layers composed on a data stack, in JAX.

>>> import layercomb as lc
>>> from layercomb import tl
>>> net = tl.Serial(tl.Embedding(256, 32), tl.Residual(tl.LayerNorm(), tl.Dense(32)), tl.Dense(256))
>>> model = lc.Model(net).init(lc.shape_dtype((1, 8), 'int32'))
>>> model.n_weights
17760
"""

import importlib
from typing import Any

from layercomb import layers as tl
from layercomb import losses, models, transforms, trees
from layercomb.capture import capture
from layercomb.errors import UsageError
from layercomb.layers.basic.fn import Fn
from layercomb.layers.core.layer import Layer, init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.facts.axes import Axes
from layercomb.model import Model
from layercomb.shapes import describe, shape_dtype, signature_of
from layercomb.summary import summary
from layercomb.transforms import axes, cast, rewrite, unstack
from layercomb.version import __version__

__all__ = [
    'Axes',
    'Fn',
    'Layer',
    'Mode',
    'Model',
    'UsageError',
    '__version__',
    'axes',
    'capture',
    'cast',
    'describe',
    'init_state',
    'losses',
    'models',
    'rewrite',
    'shape_dtype',
    'signature_of',
    'summary',
    'testing',
    'tl',
    'transforms',
    'trees',
    'unstack',
    'walk',
]


def __getattr__(name: str) -> Any:
    """Imports `testing` at its first use, which most programs never make."""
    if name == 'testing':
        return importlib.import_module('layercomb.testing')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
