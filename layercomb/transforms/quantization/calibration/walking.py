"""`Walk`: through a model with all batches side by side, by the routes that `apply` takes."""

from __future__ import annotations

from typing import Any

from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined
from layercomb.layers.decoding.once import Once
from layercomb.layers.reversible.stack import ReversibleStack
from layercomb.transforms.quantization.calibration.values import Stack, run
from layercomb.transforms.quantization.layer import bare, narrow_axes
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

Made = tuple[Layer, Tree, Stack]

# In ``EVAL`` these wrappers compute what the layer inside does.
_PASSING = (AssertShape, Chunk, Once, Remat)
# In ``EVAL`` these methods do what `route` says.
_ROUTING = (Combinator.apply, MultiHead.apply, ReversibleStack.apply)


class Walk:
    """Base of walks: what is done at leaves with matrices, and at layers with weights of others.

    Each method takes a layer, its weights and state, its path, and its inputs as `Values`. It
    returns the layer and the weights that take their place, and the outputs.
    """

    def through(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        """Goes through a layer, whatever it is."""
        given = weights, state, path, values
        if isinstance(net, ReversibleStack):
            given = weights, state, path, tuple(each.float32() for each in values)
        if narrow_axes(bare(net)):
            return self.leaf(net, *given)
        if isinstance(net, Tied):
            return self.tied(net, *given)
        if isinstance(net, Repeat | Map):
            return self.several(net, *given)
        if isinstance(net, _PASSING):
            inner, weights, outputs = self.through(net.layer, *given)
            return net.with_sublayers((inner, *net.sublayers[1:])), weights, outputs
        if isinstance(net, Combinator) and type(net).apply in _ROUTING:
            return self._routed(net, *given)
        return self.whole(net, *given)

    def leaf(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        """At a leaf with matrices, or a `Cast` around one."""
        raise NotImplementedError

    def tied(self, net: Tied, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        """At a model that uses weights twice."""
        raise NotImplementedError

    def several(
        self, net: Repeat | Map, weights: Tree, state: Tree, path: str, values: Stack
    ) -> Made:
        """At a layer that is applied several times."""
        raise NotImplementedError

    def whole(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        """At a layer that is not entered: one without layers inside, or of an unknown kind."""
        made = self.unreached(net, weights, path)
        return *made, self.again(made, (net, weights), state, values)

    def again(
        self, made: tuple[Layer, Tree], was: tuple[Layer, Tree], state: Tree, values: Stack
    ) -> Stack:
        """The outputs of a layer whose place is taken already.

        Args:
          made, was: the layer and its weights as they are now, and as they were.
          state, values: its state and inputs.
        """
        del was
        return run(*made, state, values)

    def unreached(self, net: Layer, weights: Tree, path: str) -> tuple[Layer, Tree]:
        """What takes the place of a layer whose inside the walk does not see."""
        raise NotImplementedError

    def _routed(
        self, net: Combinator, weights: Tree, state: Tree, path: str, values: Stack
    ) -> Made:
        made: dict[str, tuple[Layer, Tree]] = {}

        def call(i: int, values: Stack) -> Stack:
            key, layer = net.children[i]
            its_state = state.get(key, {})
            if key in made:  # a second time, with the weights of the first
                was = layer, weights.get(key, {})
                return self.again(made[key], was, its_state, values)
            its_weights, at = weights.get(key, {}), joined(path, key)
            child, part, outputs = self.through(layer, its_weights, its_state, at, values)
            made[key] = child, part
            return outputs

        outputs: Any = net.route(call, values)
        for key, layer in net.children:
            if key not in made:
                made[key] = self.unreached(layer, weights.get(key, {}), joined(path, key))
        parts = {key: part for key, (_, part) in made.items() if part}
        children = tuple(made[key][0] for key in net.keys)
        return net.with_sublayers(children), {**weights, **parts}, outputs
