"""What families share: words for activations, and entries of dense layers and norms."""

from __future__ import annotations

from collections.abc import Sequence

from layercomb.interop.tensors import Entry, linear

# What an activation of a configuration is here, and back.
ACTIVATIONS = {
    'gelu': 'exact_gelu',
    'gelu_new': 'gelu',
    'gelu_fast': 'gelu',
    'gelu_pytorch_tanh': 'gelu',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
    'tanh': 'tanh',
}
WORDS = {'exact_gelu': 'gelu', 'gelu': 'gelu_new', 'relu': 'relu', 'silu': 'silu', 'tanh': 'tanh'}


def dense(ours: str, theirs: str, layers: Sequence[int] | None = None) -> list[Entry]:
    """The entries of a dense layer that is a ``torch.nn.Linear`` there, kernel and bias.

    Args:
      ours: the path of the layer.
      theirs: the name of the module.
      layers: as of `Entry`.
    """
    return [
        linear(f'{ours}/kernel', f'{theirs}.weight', layers),
        Entry(f'{ours}/bias', f'{theirs}.bias', layers=layers),
    ]


def norm(ours: str, theirs: str, layers: Sequence[int] | None = None) -> list[Entry]:
    """The entries of a layer normalization, scale and bias.

    Args:
      ours, theirs, layers: as of `dense`.
    """
    return [
        Entry(f'{ours}/scale', f'{theirs}.weight', layers=layers),
        Entry(f'{ours}/bias', f'{theirs}.bias', layers=layers),
    ]
