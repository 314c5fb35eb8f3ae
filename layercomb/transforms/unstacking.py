"""`unstack`: a subtree of weights for each layer, for decoding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from layercomb import trees
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.combinators.side_by_side import Parallel
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper, default_name, given_name
from layercomb.layers.reversible.stack import ReversibleRepeat, ReversibleSerial
from layercomb.transforms import buffers
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


def unstack(net: Layer, weights: Tree) -> tuple[Layer, Tree]:
    """The same model with separate weights for each layer of a `Repeat` or `Map`, for decoding.

    Slicing stacked weights would copy them at every token, so unstack once, before the first one.
    On a CPU the weights share the memory of the stacked ones, and no byte is copied.
    The state in ``PREDICT`` is the same for both models; `unstack_state` unstacks that of training.

    Args:
      net: any layer.
      weights: its weights.

    Returns:
      A layer in which each `Repeat` has become a `Serial`, and each `Map` a `Parallel`, with keys
      ``'0'``, ``'1'`` …, and weights to match; shared ones are referred to n times, not copied.

    >>> from layercomb import tl, transforms
    >>> net, _ = transforms.unstack(tl.Repeat(tl.Dense(4), 2), {})
    >>> net
    Serial(Dense(4, name='0'), Dense(4, name='1'), name='dense')
    """
    if not _is_stacked(net):  # building it again would take longer than some tokens
        return net, weights
    if isinstance(net, (Repeat, Map)):
        blocks, parts = [], {}
        for i in range(net.n):
            block, part = unstack(net.layer, _block_weights(net, weights, i))
            blocks.append(block.replace(name=str(i)))
            if part:
                parts[str(i)] = part
        kind = Parallel if isinstance(net, Map) else Serial
        kind = ReversibleSerial if isinstance(net, ReversibleRepeat) else kind
        return kind(*blocks, name=given_name(net) or default_name(net)), parts
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in net.children:
            child, part = unstack(layer, weights.get(key, {}))
            children.append(child if child == layer else child.replace(name=key))
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Tied) and _moved(net, weights):
        return unstack(net.layer, net.untied(weights))
    if isinstance(net, Wrapper):
        inner, weights = unstack(net.layer, weights)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights


def unstack_state(net: Layer, state: Tree) -> Tree:
    """The state of training (running statistics) for the model that `unstack` gives.

    Args:
      net: the layer before it was unstacked.
      state: its state in ``TRAIN`` or ``EVAL``.

    Returns:
      One subtree a layer, as `unstack` arranges weights. Each layer of what was a `Map` has the
      state that the `Map` threaded through all.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl, transforms
    >>> net = tl.Repeat(tl.BatchNorm(), 2, shared=True)
    >>> transforms.unstack_state(net, {'mean': jnp.zeros((2, 4))})['1']['mean'].shape
    (4,)
    """
    if isinstance(net, (Repeat, Map)):
        blocks = range(net.n) if state else ()
        return {str(i): unstack_state(net.layer, net.block_state(state, i)) for i in blocks}
    if isinstance(net, Combinator):
        inner = dict(net.children)
        return {
            key: unstack_state(inner[key], x) if key in inner else x for key, x in state.items()
        }
    return unstack_state(net.layer, state) if isinstance(net, Wrapper) else state


def _block_weights(net: Repeat | Map, weights: Tree, i: int) -> Tree:
    """The weights of block `i`, in the memory of all blocks on a CPU.

    Elsewhere one program slices for all blocks, since it is given the number. What is no array,
    such as a description of one, is sliced by its own ``[i]``.
    """
    leaves = jax.tree.leaves(weights)
    if net.stacked_axes and leaves and all(map(buffers.is_shareable, leaves)):
        return jax.tree.map(lambda x: buffers.shared_slice(x, i), weights)
    arrays = bool(leaves) and all(isinstance(x, jax.Array | np.ndarray) for x in leaves)
    slices = arrays and bool(net.stacked_axes)
    return _sliced(net, weights, np.int32(i)) if slices else net.block_weights(weights, i)


@functools.partial(jax.jit, static_argnums=0)
def _sliced(net: Any, weights: Tree, i: jax.Array) -> Any:
    return net.block_weights(weights, i)


def _is_stacked(net: Layer) -> bool:
    return any(isinstance(layer, (Repeat, Map)) for _, layer in walk(net))


def _moved(net: Tied, weights: Tree) -> bool:
    """Whether unstacking moves an end of a tie, so that its paths are no longer valid."""
    try:
        trees.get(weights, net.source)
    except KeyError:
        return False  # the description alone is wanted
    stacks = [path for path, layer in walk(net.layer) if isinstance(layer, (Repeat, Map))]
    ends = (net.source, net.target)
    return any(not path or f'{end}/'.startswith(f'{path}/') for path in stacks for end in ends)
