"""How a loss is attached to a model, without the logits of a whole sequence ever existing."""

from __future__ import annotations

from typing import Any

import jax

from layercomb.layers.base import Layer, Mode, Wrapper, fold
from layercomb.layers.combinators import Serial
from layercomb.layers.control import Chunk
from layercomb.layers.fn import Fn
from layercomb.layers.metrics import Metric
from layercomb.transforms import Tied


class Scored(Wrapper):
    """A head, and losses of its output: (x, targets, weights) → (values, weights, …).

    The losses have no weights and stand beside the head, so its paths stay what they are.

    Attributes:
      layer: the head, from which the logits come.
      losses: metrics, each of which gives values and weights.
    """

    losses: tuple[Metric, ...]

    n_in = property(lambda self: self.layer.n_in + 2)
    n_out = property(lambda self: 2 * len(self.losses))

    @property
    def sublayers(self) -> tuple[Layer, ...]:
        """The head, then the losses."""
        return (self.layer, *self.losses)

    def with_sublayers(self, sublayers: tuple[Layer, ...]) -> Any:
        """The same with another head and other losses."""
        return self.replace(layer=sublayers[0], losses=tuple(sublayers[1:]))

    def init(self, signature, rng, mode=Mode.TRAIN):
        head = signature[: self.layer.n_in]
        logits, weights, state = self.layer._build(head, rng, mode)
        for loss in self.losses:
            loss.init((*logits, *signature[self.layer.n_in :]), rng, mode)
        return weights, state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        k = self.layer.n_in
        logits, state = self.layer.apply(weights, state, inputs[:k], rng=fold(rng, 0), mode=mode)
        outputs: tuple[jax.Array, ...] = ()
        for loss in self.losses:
            outputs += loss.apply({}, {}, (*logits, *inputs[k:]), mode=mode)[0]
        return outputs, state


def attach(net: Layer, loss: Metric | tuple[Metric, ...], chunk_len: int | None = None) -> Layer:
    """A model with its loss: (inputs, targets, weights) → (values, weights), a position each.

    A language model is ``Serial(body…, head)``. What comes out is ``Serial(body…, Chunk(head and
    loss))`` with the same paths, so weights fit both. With `chunk_len`, logits exist for so many
    positions at a time and (B, L, V) never does. A head may be layers of this library in series: if
    none of them mixes positions, all work on a piece at a time.

    Args:
      net: gives logits (…, V).
      loss: one metric, or several; several give two outputs each, in order.
      chunk_len: the length of a piece, or None for no pieces.

    Returns:
      A layer with ``n_in = net.n_in + 2``.

    Raises:
      TypeError: if `loss` is not made of metrics, or there are pieces and one of them needs whole
        sequences; if `net` has more outputs than logits.
      ValueError: if the logits are not what the last layer puts back.

    >>> from layercomb import tl, losses
    >>> net = tl.Serial(tl.Embedding(16, 8), tl.Dense(16))
    >>> losses.attach(net, tl.CrossEntropyLoss(), chunk_len=4).n_in
    3
    """
    wanted = tuple(loss) if isinstance(loss, (tuple, list)) else (loss,)
    if not wanted:
        raise TypeError('attach: give at least one metric, such as tl.CrossEntropyLoss()')
    for metric in wanted:
        if not isinstance(metric, Metric):
            raise TypeError(
                f'attach: a loss is a metric such as tl.CrossEntropyLoss(), got {metric!r}'
            )
        if chunk_len is not None and metric.mixes_positions:
            raise TypeError(
                f'attach: {type(metric).__name__} needs all positions of a sequence and cannot be '
                'made of pieces: measure it without chunk_len (of a task, loss_chunk_len=None)'
            )
    if net.n_out != 1:
        raise TypeError(f'attach: the model must give logits alone, it has {net.n_out} outputs')
    return _attach(net, wanted, chunk_len)


def _is_position_wise(layer: Layer) -> bool:
    """Whether it is known to be so: nobody has said it of functions and layers from elsewhere."""
    known = type(layer).__module__.startswith('layercomb.') and not isinstance(layer, Fn)
    return known and not layer.mixes_positions and all(map(_is_position_wise, layer.sublayers))


def _attach(
    net: Layer, losses: tuple[Metric, ...], chunk_len: int | None, whole: bool = False
) -> Layer:
    """`net` with its losses; `whole` takes all of it for the head if it mixes no positions."""
    if isinstance(net, Tied):
        return net.replace(layer=_attach(net.layer, losses, chunk_len, whole))
    is_head = whole and _is_position_wise(net)
    if type(net) is Serial and net.layers and not is_head:
        named = [layer.replace(name=key) for key, layer in zip(net.keys, net.layers, strict=True)]
        return Serial(*named[:-1], _attach(named[-1], losses, chunk_len, True), name=net.name)
    if net.n_out != 1:
        raise ValueError(
            f'attach: the last layer, {type(net).__name__}, puts back {net.n_out} values and must '
            'put back the logits alone: move it before the layer that makes them'
        )
    scored = Scored(net, losses)
    return scored if chunk_len is None else Chunk(scored, chunk_len)
