"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from layercomb import layers as tl
from layercomb.checks import checked


@checked
def MLP(
    layer_widths: Sequence[int] = (128, 64),
    n_classes: int = 10,
    activation: str | tl.Layer = 'relu',
    dropout: float = 0.0,
    flatten: bool = False,
) -> tl.Serial:
    """Dense layers with an activation after each, and a last one to logits.

    Args:
      layer_widths: of the hidden layers.
      n_classes: the width of the logits.
      activation: a name or a layer.
      dropout: the rate after each hidden layer.
      flatten: whether to join all axes but the batch first, e.g. for images.

    Returns:
      A layer (B, …) → (B, n_classes).

    >>> MLP((32,), n_classes=2)
    Serial(Dense(32), Relu(), Dense(2, name='head'))
    """
    hidden = [
        [tl.Dense(width), tl.activation(activation), tl.Dropout(dropout) if dropout else None]
        for width in layer_widths
    ]
    return tl.Serial(tl.Flatten() if flatten else None, hidden, tl.Dense(n_classes, name='head'))
