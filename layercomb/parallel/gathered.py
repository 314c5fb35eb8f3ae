"""`gathered`: layers whose weights are gathered from all devices where they are used."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.reversible.cotangents import vjp
from layercomb.layers.reversible.one_pass import one_pass, recomputes
from layercomb.layers.reversible.passing import routed
from layercomb.parallel.specs import cut_along
from layercomb.shapes import is_float
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_Axes = tuple[str, ...]


class Gathered(Wrapper):
    """A layer that gathers parts of its weights from the devices along some axes of the mesh.

    It is applied inside `jax.shard_map`, where a device holds its own part. The gradient of a
    weight is summed over these devices, and scattered: each keeps its own part of it. Training
    does not keep what was gathered: the backward pass gathers again.

    Attributes:
      layer: the layer.
      parts: (path, axis), the weights that are cut and the axis along which they are.
      axis_names: of the mesh, which cut together.
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    parts: tuple[tuple[str, int], ...] = ()
    axis_names: _Axes = ('fsdp',)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """Applies the layer with whole weights."""

        leaves, structure = jax.tree.flatten(weights)
        # What is no array, such as a `swapped.Held`, which holds some, is read from outside.
        arrays = [x if hasattr(x, 'dtype') else None for x in leaves]

        def run(arrays: Any, state: Tree, inputs: Arrays, rng: Any) -> tuple[Arrays, Tree]:
            pairs = zip(arrays, leaves, strict=True)
            made = self.whole(
                jax.tree.unflatten(structure, [b if a is None else a for a, b in pairs])
            )
            return self.layer.apply(made, state, inputs, rng=rng, mode=mode)

        if mode is not Mode.TRAIN:
            return run(arrays, state, tuple(inputs), rng)
        return jax.checkpoint(run, policy=_is_kept)(arrays, state, tuple(inputs), rng)

    def whole(self, weights: Tree) -> Tree:
        """The weights, gathered.

        Args:
          weights: each device's parts.
        """
        cuts = dict(self.parts)

        def one(path: str, part: Any) -> Any:
            if path not in cuts:
                return part
            return _whole(part, self.axis_names, cuts[path])

        return trees.map_with_path(one, weights)


def _whole(part: jax.Array, axis_names: _Axes, axis: int) -> jax.Array:
    """A weight, gathered. The gradient of a narrow one is summed over the devices in float32."""
    if is_float(part) and part.dtype.itemsize < 4:
        return _narrow(part, axis_names, axis)
    return jax.lax.all_gather(part, axis_names, axis=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _narrow(part: jax.Array, axis_names: _Axes, axis: int) -> jax.Array:
    return jax.lax.all_gather(part, axis_names, axis=axis, tiled=True)


def _narrow_forward(part: jax.Array, axis_names: _Axes, axis: int) -> tuple[jax.Array, None]:
    return jax.lax.all_gather(part, axis_names, axis=axis, tiled=True), None


def _narrow_backward(axis_names: _Axes, axis: int, _: None, ct: jax.Array) -> tuple[jax.Array]:
    wide = ct.astype(jnp.float32)
    its = jax.lax.psum_scatter(wide, axis_names, scatter_dimension=axis, tiled=True)
    return (its.astype(ct.dtype),)


_narrow.defvjp(_narrow_forward, _narrow_backward)


# What a backward pass makes again: whole weights, and the same weights cast or laid out otherwise.
_MADE_AGAIN = ('all_gather', 'convert_element_type', 'reshape', 'transpose', 'squeeze')


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _MADE_AGAIN


@one_pass.register(Gathered)
def _gathered(layer, weights, state, inputs, cts, **given):
    """The inner layer's rule on whole weights, whose gradients are summed and scattered."""
    whole, pull = vjp(layer.whole, weights)
    outputs, d_inputs, d_whole = one_pass(layer.layer, whole, state, inputs, cts, **given)
    (d_weights,) = pull(d_whole)
    return outputs, d_inputs, d_weights


@recomputes.register(Gathered)
def _as_inside(layer):
    return recomputes(layer.layer)


@routed.register(Gathered)
def _routed_inside(layer, values):
    return routed(layer.layer, values)


def gathered(net: Layer, specs: Tree, axis_names: _Axes) -> Layer:
    """A model in which each layer gathers its own weights, inside the scan over blocks too.

    A layer with whole weights is a leaf, an attention layer with its projections, or what a `Chunk`
    or another wrapper holds: the pieces of a sequence share what was gathered. Paths stay.

    Args:
      net: the model.
      specs: a `PartitionSpec` for each weight.
      axis_names: of the mesh, along which together weights are gathered.
    """
    if not axis_names:
        return net
    cuts = {path: cut_along(spec, axis_names) for path, spec in trees.flatten(specs).items()}
    return _rewritten(net, '', 0, {p: at for p, at in cuts.items() if at is not None}, axis_names)


def _rewritten(
    net: Layer, path: str, stacked: int, cuts: dict[str, int], axes: tuple[str, ...]
) -> Layer:
    its = {p: at for p, at in cuts.items() if _is_inside(p, path)}
    if not its and not isinstance(net, Tied):
        return net
    if isinstance(net, Tied):
        # The weight of two places is gathered outside of both.
        shared = {p: at for p, at in its.items() if _is_inside(p, joined(path, net.source))}
        its = {p: at for p, at in its.items() if p not in shared}
        inside = net.replace(layer=_rewritten(net.layer, path, stacked, its, axes))
        return _wrapped(inside, path, stacked, shared, axes)
    if not _is_entered(net):
        return _wrapped(net, path, stacked, its, axes)
    places = [joined(path, key) for key, _ in net.children]
    if any(not any(_is_inside(p, place) for place in places) for p in its):
        return _wrapped(net, path, stacked, its, axes)  # it has weights of its own
    more = net.stacked_axes if isinstance(net, Wrapper) else 0
    made = (
        _rewritten(child, joined(path, key), stacked + more, its, axes)
        for key, child in net.children
    )
    return net.with_sublayers(tuple(made))


def _wrapped(
    net: Layer, path: str, stacked: int, cuts: dict[str, int], axes: tuple[str, ...]
) -> Layer:
    if not cuts:
        return net
    start = f'{path}/' if path else ''
    parts = tuple((p.removeprefix(start), at - stacked) for p, at in sorted(cuts.items()))
    return Gathered(net, parts=parts, axis_names=axes)


def _is_entered(net: Layer) -> bool:
    """Whether the layers inside gather, each its own weights."""
    if isinstance(net, Combinator):
        return not isinstance(net, MultiHead)
    return isinstance(net, Repeat) or any(isinstance(layer, Repeat) for _, layer in walk(net))


def _is_inside(path: str, of: str) -> bool:
    return not of or path == of or path.startswith(f'{of}/')
