"""What the models of Trax have in common: the plan of a model, and what shapes tell of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from layercomb.errors import UsageError
from layercomb.interop.trax.flat_weights import Entry, Shape
from layercomb.interop.trax.parameters import Parameters
from layercomb.layers.core.layer import Layer
from layercomb.shapes import Signature, shape_dtype

# Trax's activations, and the names that they have here.
ACTIVATIONS = {
    'Elu': 'elu',
    'FastGelu': 'gelu',
    'Gelu': 'exact_gelu',
    'LeakyRelu': 'leaky_relu',
    'Relu': 'relu',
    'Sigmoid': 'sigmoid',
    'Softplus': 'softplus',
    'Swish': 'silu',
    'Tanh': 'tanh',
}
N_BLOCKS = 10_000  # at most
TOKENS = shape_dtype((1, 2), 'int32')


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is read.

    Attributes:
      net: the model.
      signature: of inputs that it takes.
      entries: all its weights, in the order of Trax.
      shapes: those of the file, without the leading 1 that old tables of positions have.
    """

    net: Layer
    signature: Signature
    entries: list[Entry]
    shapes: list[Shape]


def table(shape: Shape) -> Shape:
    """The shape of a table of positions, which old checkpoints have as (1, L, D)."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def width_inside(shapes: Sequence[Shape], d: int) -> int:
    """The width inside the feed-forwards: that of the first Dense that does not keep D.

    Args:
      shapes: of weights, in the order of Trax.
      d: D.
    """
    for one, bias, other in zip(shapes, shapes[1:], shapes[2:], strict=False):
        if len(one) == 2 and one[0] == d != one[1] and bias == one[1:] and other == one[::-1]:
            return one[1]
    return d


def n_blocks(name: str, parameter: str, counted: float, known: Parameters) -> int:
    """How many blocks there are.

    Args:
      name: of the model in Trax.
      parameter: the name of their number there.
      counted: the number by the weights, which may be short of some.
      known: what else is known; a number that is given comes first.

    Raises:
      UsageError: if there are too many.
    """
    n = known.size(name, parameter, max(1, round(counted)))
    if n > N_BLOCKS:
        raise UsageError(f'{name}.{parameter} = {n}: at most {N_BLOCKS:,} blocks are read')
    return n


def heads_of(name: str, known: Parameters, d: int) -> int:
    """The number of heads, which matrices of all heads do not tell; 1 if it will be asked for.

    Args:
      name: of the model in Trax.
      known: what is known.
      d: D, the width of all heads.

    Raises:
      UsageError: if it does not divide D.
    """
    heads = known.ask(name, 'n_heads')
    if heads is not None and d % known.size(name, 'n_heads', 1):
        raise UsageError(f'{name}.n_heads = {heads} does not divide the width {d}: check it')
    return 1 if heads is None else int(heads)


def activation_of(name: str, known: Parameters, default: str) -> str:
    """The activation of the feed-forwards, by its name here.

    Args:
      name: of the model in Trax.
      known: what is known.
      default: the activation that the model has by default, by its name in Trax.

    Raises:
      UsageError: if there is none like it here.
    """
    theirs = known.ask(name, 'ff_activation', default)
    if theirs not in list(ACTIVATIONS):
        raise UsageError(
            f'{name}.ff_activation = {theirs!r}: those that can be read are '
            f'{", ".join(ACTIVATIONS)}'
        )
    return ACTIVATIONS[theirs]
