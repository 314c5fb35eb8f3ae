"""`Streamed`: a language model with its loss, whose residual streams live in host memory."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from layercomb import trees
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.constants import refuse_narrow
from layercomb.layers.reversible.stack import ReversibleStack
from layercomb.losses import Scored
from layercomb.parallel import halves
from layercomb.parallel.streams.ends import COUNTING, Back, Front, Part
from layercomb.parallel.streams.stacks import Lengths, Moving, backwards, forwards, misfit
from layercomb.parallel.swapped import Held, Update
from layercomb.shapes import Signature
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

PIECE_LEN = 4096
_CURE = "leave offload out, or say 'blocks'"


class Streamed(Wrapper):
    """A model with its loss, of whose streams one piece at a time is on the device in training.

    (tokens, targets, loss weights), (B, L) each → losses and weights of positions, as `layer`.

    Attributes:
      layer: ``Serial(front…, stack, between…, Chunk(head and losses))``, as `losses.attach` makes
        it. The front makes two streams of token ids, the stack is reversible.
      piece_len: positions in a piece, where no `Chunk` says another number.

    Raises:
      ValueError: if it is no such model, or a layer in it cannot be computed in pieces.
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    piece_len: int = PIECE_LEN

    def __post_init__(self) -> None:
        super().__post_init__()
        why = _why_not(self.layer)
        if why is not None:
            raise ValueError(f"offload='streams': {why}: {_CURE}")

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The model's weights and state."""
        return self.layer.init(signature, rng, mode)

    def init_with_outputs(self, signature: Signature, rng: jax.Array, mode: Mode) -> Any:
        """As of the model."""
        return self.layer.init_with_outputs(signature, rng, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """As the model; in ``TRAIN`` its streams are in host memory.

        Raises:
          ValueError: in training, if a layer keeps a state.
        """
        if mode is not Mode.TRAIN:
            return self.layer.apply(weights, state, inputs, rng=rng, mode=mode)
        if jax.tree.leaves(state):
            raise ValueError(
                "offload='streams': layers that keep a state in training, such as mixtures and "
                f'batch norms, are not computed in pieces: {_CURE}'
            )
        held = weights.get(self.stack_key)
        if not isinstance(held, Held):
            refuse_narrow(weights)
            return _trained(_Static(self), weights, None, tuple(inputs), rng), state
        refuse_narrow(halves.others(trees.merge(held.weights, held.frozen)))
        frozen = held.frozen, held.shared
        weights = {**weights, self.stack_key: (held.weights, held.moments, held.squares)}
        static = _Static(self, held.update)
        return _trained(static, weights, frozen, tuple(inputs), rng), state

    @property
    def _at(self) -> int:
        """Where the stack is."""
        layers: Any = self.layer.sublayers
        return next(i for i, x in enumerate(layers) if isinstance(x, ReversibleStack))

    @property
    def stack(self) -> Any:
        """The reversible stack."""
        return self.layer.sublayers[self._at]

    @property
    def stack_key(self) -> str:
        """The name of the stack."""
        net: Any = self.layer
        key: str = net.keys[self._at]
        return key

    @property
    def front(self) -> Front:
        """What makes the streams."""
        return Front(Part(self.layer, 0, self.layer.sublayers[: self._at]), self.piece_len)

    @property
    def back(self) -> Back:
        """What makes losses of the streams."""
        first = self._at + 1
        return Back(Part(self.layer, first, self.layer.sublayers[first:]))

    def key_of_stack(self, rng: Key) -> Key:
        """The random key of the stack."""
        return fold(rng, self._at)


@dataclasses.dataclass(frozen=True)
class _Static:
    """The model, and what applies a block's gradient if blocks are in host memory."""

    net: Streamed
    update: Update | None = None

    def of_stack(self, weights: Tree, frozen: Any) -> Any:
        """What the stack is given as its weights."""
        its = weights.get(self.net.stack_key, {})
        return its if self.update is None else Moving(its, frozen, self.update)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _trained(static: _Static, weights: Tree, frozen: Any, inputs: Arrays, rng: Key) -> Arrays:
    """The losses and their weights; the gradient goes through the model piece by piece."""
    return _forward(static, weights, frozen, inputs, rng)[0]


def _forward(
    static: _Static, weights: Tree, frozen: Any, inputs: Arrays, rng: Key
) -> tuple[Arrays, Any]:
    net, (tokens, *others) = static.net, inputs
    lengths = Lengths(tokens.shape[1], net.piece_len)
    front, back, its = net.front, net.back, static.of_stack(weights, frozen)
    streams = front.forward(front.part.weights(weights), tokens, rng)
    streams, found = forwards(net.stack, its, streams, net.key_of_stack(rng), lengths)
    outputs = back.forward(back.part.weights(weights), streams, tuple(others), rng)
    return outputs, (weights, frozen, inputs, rng, streams, found)


def _backward(static: _Static, kept: Any, cts: Any) -> tuple[Any, ...]:
    weights, frozen, inputs, rng, streams, found = kept
    net, (tokens, *others) = static.net, inputs
    lengths = Lengths(tokens.shape[1], net.piece_len)
    front, back, its = net.front, net.back, static.of_stack(weights, frozen)
    d_streams, d_back = back.backward(back.part.weights(weights), streams, tuple(others), cts, rng)
    _, d_streams, d_stack = backwards(
        net.stack, its, found, streams, d_streams, net.key_of_stack(rng), lengths
    )
    d_front = front.backward(front.part.weights(weights), tokens, d_streams, rng)
    made = {**d_front, net.stack_key: d_stack, **d_back}
    return {key: made[key] for key in weights}, None, None, None


_trained.defvjp(_forward, _backward)


def streamed(net: Layer, piece_len: int = PIECE_LEN) -> Layer:
    """A model with its loss, whose streams are in host memory in training. Paths stay.

    Args:
      net: what `losses.attach` made, with `chunk_len`.
      piece_len: as of `Streamed`.

    Raises:
      ValueError: as of `Streamed`.
    """
    if isinstance(net, Tied):
        return net.replace(layer=streamed(net.layer, piece_len))
    return Streamed(net, piece_len=piece_len)


def unwrapped_ties(net: Layer) -> Layer:
    """What is inside all `Tied` around it.

    Args:
      net: any layer.
    """
    while isinstance(net, Tied):
        net = net.layer
    return net


def _why_not(net: Layer) -> str | None:
    """Why a model cannot be computed so; None if it can."""
    name = type(net).__name__
    if type(net) is not Serial:
        return f'a {name} is not layers in series around a reversible stack'
    layers = net.layers
    stacks = [i for i, layer in enumerate(layers) if isinstance(layer, ReversibleStack)]
    if len(stacks) != 1:
        return f'it takes one reversible stack in series with the rest, and there are {len(stacks)}'
    at = stacks[0]
    last: Any = layers[-1]
    if type(last) is not Chunk or type(last.layer) is not Scored:
        return (
            'the loss is not computed in pieces, as loss_chunk_len=64 of the task makes it if the '
            'head is position-wise'
        )
    if net.n_in != 3 or layers[at].n_in != 2:
        return 'it takes a model of token ids alone, with two streams'
    for layer in (*layers[:at], *layers[at + 1 : -1]):
        if layer.position_wise is not True and not isinstance(layer, COUNTING):
            return f'{type(layer).__name__} needs all positions at once'
    return misfit(layers[at])
