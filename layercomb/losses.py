"""Attaches losses to models, and leaves out of averages the positions that the loss leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from layercomb.checks import ChunkLen
from layercomb.errors import UsageWarning
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode, check_mode
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers, unsaid
from layercomb.layers.metrics.metric import Metric
from layercomb.layers.state.counted import Counted, put_counted, take_counted, tell
from layercomb.layers.state.parts import AuxLoss
from layercomb.shapes import Signature
from layercomb.transforms.segments import Segmented
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


class Scored(Wrapper):
    """A head, and losses of its output: (x, targets, weights) → (values, weights, …).

    The losses have no weights and stand beside the head, so its paths stay what they are.

    Attributes:
      layer: the head, from which the logits come.
      losses: metrics, each of which returns values and weights, float32.
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    losses: tuple[Metric, ...]

    n_in = property(lambda self: self.layer.n_in + 2)
    n_out = property(lambda self: 2 * len(self.losses))

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The head's weights and state; checks the signatures of targets and weights."""
        head = signature[: self.layer.n_in]
        logits, weights, state = self.layer.init_with_outputs(head, rng, mode)
        for loss in self.losses:
            loss.init((*logits, *signature[self.layer.n_in :]), rng, mode)
        return weights, state

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """(x, targets, weights) → values and weights of each loss, float32."""
        k = self.layer.n_in
        logits, state = self.layer.apply(weights, state, inputs[:k], rng=fold(rng, 0), mode=mode)
        outputs: tuple[jax.Array, ...] = ()
        for loss in self.losses:
            outputs += loss.apply({}, {}, (*logits, *inputs[k:]), mode=mode)[0]
        return outputs, state


def attach(
    net: Layer, loss: Metric | tuple[Metric, ...], chunk_len: ChunkLen | None = None
) -> Layer:
    """A model with its loss: (inputs, targets, weights) → (values, weights), a position each.

    A language model is ``Serial(body…, head)``. What comes out is ``Serial(body…, Chunk(head and
    loss))`` with the same paths, so weights fit both. With `chunk_len`, logits exist for so many
    positions at a time and (B, L, V) never does. A head may be layers in series: if all of them say
    ``position_wise = True``, all work on a piece at a time. A layer that does not say so, such as
    one of your own, works on the whole sequence instead: the result is right, and takes more
    memory. Where it makes the logits itself, they exist whole.

    Args:
      net: gives logits (…, V).
      loss: one metric, or several; several give two outputs each, in order.
      chunk_len: the length of a piece, as of `Chunk`, or None for no pieces.

    Returns:
      A layer with ``n_in = net.n_in + 2``.

    Raises:
      TypeError: if `loss` is not made of metrics, or there are pieces and one of them needs whole
        sequences or does not say ``position_wise = True``; if `net` has more outputs than logits,
        or there are pieces and the layer that makes the logits mixes positions.
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
        if chunk_len is None or metric.position_wise is True:
            continue
        if metric.position_wise is None:
            raise TypeError(
                f'attach: {unsaid(metric)}, or measure it without chunk_len (of a task, '
                'loss_chunk_len=None)'
            )
        raise TypeError(
            f'attach: {type(metric).__name__} needs all positions of a sequence and cannot be '
            'made of pieces: measure it without chunk_len (of a task, loss_chunk_len=None)'
        )
    if net.n_out != 1:
        raise TypeError(f'attach: the model must give logits alone, it has {net.n_out} outputs')
    return _attach(net, wanted, chunk_len)


def _attach(
    net: Layer, losses: tuple[Metric, ...], chunk_len: ChunkLen | None, whole: bool = False
) -> Layer:
    """`net` with its losses; `whole` takes all of it for the head if it is position-wise."""
    if isinstance(net, Tied):
        return net.replace(layer=_attach(net.layer, losses, chunk_len, whole))
    if isinstance(net, Segmented):  # which stay where they are, before targets and weights
        return net.replace(layer=_attach(net.layer, losses, chunk_len, whole), at=net.place)
    is_head = whole and net.position_wise is True
    if type(net) is Serial and net.layers and not is_head:
        named = [layer.replace(name=key) for key, layer in zip(net.keys, net.layers, strict=True)]
        return Serial(*named[:-1], _attach(named[-1], losses, chunk_len, True), name=net.name)
    if net.n_out != 1:
        raise ValueError(
            f'attach: the last layer, {type(net).__name__}, puts back {net.n_out} values and must '
            'put back the logits alone: move it before the layer that makes them'
        )
    scored = Scored(net, losses)
    return scored if chunk_len is None or net.position_wise is None else Chunk(scored, chunk_len)


def apply_counted(
    net: Layer,
    weights: Tree,
    state: Tree,
    inputs: Arrays,
    loss_weights: Any,
    *,
    rng: jax.Array | None = None,
    mode: Mode = Mode.TRAIN,
) -> tuple[Arrays, Tree]:
    """`net.apply` in training, where positions of loss weight 0 count nowhere inside either.

    Whatever averages over positions (`SwitchFF`'s balance, the statistics of `BatchNorm`) is told
    which of them count; see `tl.counted_positions`. A `Loop` does this; use it in a loop of your
    own. In an encoder of `Once`, whose positions are others, all of a row count if one of its loss
    weights is not 0. A model without such layers is applied as it is, and so is any outside of
    training.

    Args:
      net: a model, or one that a loss is attached to.
      weights, state, inputs, rng, mode: as of `Layer.apply`.
      loss_weights: (B, …), the last array of a batch.

    Returns:
      Outputs, and the new state, of the structure that `apply` gives it.

    Raises:
      TypeError: if `mode` is no `Mode`.
      ValueError: if `loss_weights` have other rows than the inputs.

    Warns:
      UsageWarning: if a layer of another kind than the library's holds one that averages, and does
        not say ``carries_counted``: inside it all positions count.

    >>> import jax, jax.numpy as jnp
    >>> from layercomb import tl, losses
    >>> x, loss_weights = jnp.array([[[1.0], [3.0], [99.0]]]), jnp.array([[1, 1, 0]])
    >>> weights, state = tl.BatchNorm(momentum=0.0).init((x,), jax.random.key(0))
    >>> _, state = losses.apply_counted(tl.BatchNorm(0.0), weights, state, (x,), loss_weights)
    >>> float(state['mean'][0])
    2.0
    """
    check_mode('apply_counted', mode)
    if not (mode.is_training and _counts(net)):
        return net.apply(weights, state, inputs, rng=rng, mode=mode)
    counted = jnp.asarray(loss_weights).astype(bool)
    if counted.shape[:1] != inputs[0].shape[:1] or not counted.ndim:
        raise ValueError(
            f'apply_counted: loss weights {tuple(counted.shape)} beside inputs of the shape '
            f'{tuple(inputs[0].shape)}: give a weight for each row, (B,), or position, (B, L)'
        )
    state = put_counted(state, _given(net, counted))
    outputs, new = net.apply(weights, state, inputs, rng=rng, mode=mode)
    return outputs, take_counted(new)[0]


def total(state: Tree) -> jax.Array:
    """The sum of all auxiliary losses that layers left in a state, as a `Loop` adds it to the loss.

    Args:
      state: what `apply` gave in training.

    Returns:
      float32 (); 0 if there are none.

    Warns:
      UsageWarning: if a bare array stands under ``aux_loss``, which is not added.

    A training loop of one's own:

    >>> import jax, jax.numpy as jnp, optax
    >>> from layercomb import Mode, losses, tl
    >>> net = tl.Serial(tl.Embedding(16, 8), tl.SwitchFF(8, 2), tl.Dense(16))
    >>> scored, optimizer = losses.attach(net, tl.CrossEntropyLoss()), optax.sgd(0.1)
    >>> @jax.jit
    ... def step(weights, state, opt_state, key, batch):
    ...     def loss(weights):
    ...         args = weights, state, batch, batch[-1]
    ...         outputs, new = losses.apply_counted(scored, *args, rng=key, mode=Mode.TRAIN)
    ...         return tl.weighted_mean(*outputs) + losses.total(new), new
    ...     (value, new), grads = jax.value_and_grad(loss, has_aux=True)(weights)
    ...     updates, opt_state = optimizer.update(grads, opt_state, weights)
    ...     return optax.apply_updates(weights, updates), new, opt_state, value
    >>> x = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    >>> weights, state = net.init((x,), jax.random.key(0))
    >>> key, opt_state, batch = jax.random.key(1), optimizer.init(weights), (x, x, jnp.ones((2, 6)))
    >>> weights, state, opt_state, loss = step(weights, state, opt_state, key, batch)
    >>> bool(losses.total(state) > 0)
    True
    """
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AuxLoss))
    values = [part.value for part in parts if isinstance(part, AuxLoss)]
    found = [jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(values)]
    if any(isinstance(x, jax.Array) for x in _under('aux_loss', state)):
        warnings.warn(
            "an array under 'aux_loss' in a state is no auxiliary loss, and is not added: let the "
            'layer leave tl.AuxLoss(value) there, in init too',
            UsageWarning,
            stacklevel=2,
        )
    return sum(found[1:], found[0]) if found else jnp.float32(0)


def _under(name: str, state: Tree) -> Iterator[Any]:
    """What stands under a key, anywhere in a state."""
    for key, value in state.items():
        if key == name:
            yield value
        if isinstance(value, dict):
            yield from _under(name, value)


def _counts(net: Layer) -> bool:
    return any(layer.counts_positions for _, layer in walk(net))


def _given(net: Layer, counted: jax.Array) -> Tree:
    """What `put_counted` puts into the state of a model."""
    for _, layer in walk(net, enter=lambda layer: layer.carries_counted):
        averaging = [each for each in layer.sublayers if _counts(each)]
        if averaging and not layer.carries_counted:
            warnings.warn(
                f'{type(layer).__name__} holds {type(averaging[0]).__name__}, and does not tell it '
                'which positions count, so padding counts there: set carries_counted = True on a '
                'class that passes its state on unchanged, or by tl.take_counted and '
                'tl.put_counted',
                UsageWarning,
                stacklevel=2,
            )
    return tell(net, lambda layer: layer.counts_positions, Counted(counted))
