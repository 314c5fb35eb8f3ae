"""`classify`: the classes of texts, by a classifier of `transforms.classifier`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from layercomb.checks import Size, check_value
from layercomb.errors import UsageError
from layercomb.layers.metrics.class_names import Label, class_names
from layercomb.model import Model
from layercomb.supervised.decoding.embedding import outputs_of


class Classified(NamedTuple):
    """The class of a text.

    Attributes:
      label: the name of the likeliest class.
      probability: of it, in 0 … 1.
      probabilities: of all classes by name, in the order of the logits.
    """

    label: Label
    probability: float
    probabilities: dict[Label, float]


def classify(
    model: Model,
    tokenizer: Any,
    texts: Sequence[str | tuple[str, str]],
    *,
    batch_size: int = 32,
) -> list[Classified]:
    """The classes of texts: softmax of the logits, p(c) = e^z_c / Σ_k e^z_k.

    Texts of similar length share a batch. A text longer than the model reads is cut, as in
    `data.labelled`.

    Args:
      model: with weights, of `transforms.classifier`, which names its classes.
      tokenizer: see `data.Tokenizer`.
      texts: strings, or pairs of them that are read as one, as `text_a` and `text_b` of
        `data.labelled`.
      batch_size: how many are read at once.

    Returns:
      A `Classified` for each text, in their order.

    Raises:
      TypeError: if the model has no weights.
      UsageError: if the model is no classifier, or a text has no tokens.
    """
    batch_size = check_value('classify', 'batch_size', batch_size, Size)
    names = class_names(model.layer)
    if names is None:
        raise UsageError(
            'classify takes a model that names its classes, and this one does not: make it by '
            'transforms.classifier, and train it'
        )
    found = []
    for z in outputs_of('classify', model, tokenizer, texts, batch_size, None):
        p = np.exp(z.astype(np.float64) - z.max())
        p /= p.sum()
        best = int(p.argmax())
        each = dict(zip(names, p.tolist(), strict=True))
        found.append(Classified(names[best], float(p[best]), each))
    return found
