"""`classifier`: an encoder with a new head, which tells classes of texts apart."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from layercomb.checks import Count, Rate, checked
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.dropout import Dropout
from layercomb.layers.basic.reduce import Mean
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Layer
from layercomb.layers.metrics.class_names import ClassNames
from layercomb.shapes import Signature, shape_dtype
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_HEAD = 'head'


@checked
def classifier(
    net: Layer,
    weights: Tree,
    labels: Sequence[str | int] | int,
    *,
    dropout: Rate = 0.0,
    seed: Count = 0,
) -> tuple[Layer, Tree]:
    """An encoder as a classifier of texts: the body stays, and a new head is put in its place.

    The head is the mean over real positions, dropout if any, and a dense layer::

        logits = W · Dropout(Σ_t m_t x_t / Σ_t m_t) + b            (B, n_classes)

    of the last hidden states x (B, L, D) and the mask m (B, L). W is drawn by `seed`, b is 0.

    Args:
      net: a `models.BERT` with any head (RoBERTa and ALBERT too), as `interop.load` gives it: ids
        (B, L)[, types (B, L)], mask (B, L) → anything.
      weights: of `net`.
      labels: the names of the classes, in the order of the logits, such as `data.labels` finds
        them; or how many classes there are, 0 … n − 1.
      dropout: the rate on the mean.
      seed: of W.

    Returns:
      The new model and its weights; those of the body are the given ones, at the same paths.

    Raises:
      TypeError, ValueError: if an argument has the wrong type or range.
      ValueError: if `net` is no encoder of ids and a mask with a head.

    References:
      Reimers & Gurevych, Sentence-BERT (the mean), 2019, https://arxiv.org/abs/1908.10084

    >>> import jax
    >>> from layercomb import models, shape_dtype, transforms
    >>> net = models.BERT(64, 16, 32, n_layers=1, n_heads=2, max_len=8, head='mean')
    >>> signature = shape_dtype((1, 8), 'int32'), shape_dtype((1, 8), bool)
    >>> weights, _ = net.init(signature, jax.random.key(0))
    >>> net, weights = transforms.classifier(net, weights, ('good', 'bad'))
    >>> weights['head']['classes']['kernel'].shape
    (16, 2)
    """
    names = tuple(range(labels)) if isinstance(labels, int) else tuple(labels)
    body = _body(net)
    head = Serial(
        Mean(masked=True),
        Dropout(dropout) if dropout else None,
        Dense(len(names), name='classes'),
        ClassNames(names),
        name=_HEAD,
    )
    made = Serial(*body, head)
    kept = {name: value for name, value in weights.items() if name != _HEAD}
    return made, {**kept, _HEAD: _fresh(body, kept, head, net, seed)}


def _untied(net: Layer) -> Layer:
    while isinstance(net, Tied):
        net = net.layer
    return net


def _body(net: Layer) -> list[Layer]:
    """The layers before the head, which put back hidden states and the mask."""
    inner = _untied(net)
    if type(inner) is not Serial or not inner.layers or inner.keys[-1] != _HEAD:
        raise ValueError(
            f'classifier: {type(inner).__name__} has no head as the last of its layers: give an '
            'encoder such as models.BERT'
        )
    head = inner.layers[-1]
    if net.n_in < 2 or head.n_in != 2:
        raise ValueError(
            f'classifier takes an encoder of ids and a mask, and this model has {net.n_in} '
            f"inputs and a head of {head.n_in}: make it with masked=True; a language model's last "
            'hidden states are no mean of a text'
        )
    named = zip(inner.keys[:-1], inner.layers[:-1], strict=True)
    return [layer.replace(name=key) for key, layer in named]


def _fresh(body: list[Layer], kept: Tree, head: Layer, net: Layer, seed: int) -> Tree:
    """New weights of the head, made for the hidden states of the body."""
    ids = shape_dtype((1, 4), 'int32')
    signature: Signature = (*(ids,) * (net.n_in - 1), shape_dtype((1, 4), bool))
    hidden = Serial(*body).output_signature(signature)
    return head.init(hidden, jax.random.key(seed))[0]
