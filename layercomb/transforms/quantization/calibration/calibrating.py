"""`calibrated`: a model whose matrices are rounded for the inputs that they get.

A matrix is rounded when the walk reaches it. So its inputs come through what is rounded already,
as they will.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.errors import UsageWarning
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer, init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.state.parts import AuxLoss, take_out
from layercomb.shapes import is_float
from layercomb.transforms.casting import Cast
from layercomb.transforms.quantization.calibration import values as on_stack
from layercomb.transforms.quantization.calibration.inputs import Grams, grams
from layercomb.transforms.quantization.calibration.values import Stack, run
from layercomb.transforms.quantization.calibration.walking import Made, Walk
from layercomb.transforms.quantization.layer import Quantized, bare, narrow_axes
from layercomb.transforms.quantization.quantizing import TRANSPOSED, quantize, tied_again
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_SHOWN = 4  # paths in a warning


def calibrated(
    net: Layer, weights: Tree, options: tuple[int, int, int], batches: Any, state: Tree | None
) -> tuple[Layer, Tree]:
    """The same model with its large matrices in few bits: what `quantize` does with ``calibrate=``.

    Args:
      net, weights, batches, state: as of `quantize`.
      options: bits, group_size and smallest.

    Returns:
      (layer, weights).

    Raises:
      TypeError: for batches that the model does not take.
      ValueError: for 16 bits; without batches; if values on the way are not finite; if a state is
        needed.
    """
    if options[0] == 16:
        raise ValueError(
            'quantize: bfloat16 has no scales, so calibrate= changes nothing: leave it out, or '
            'choose 8 or 4 bits'
        )
    if any(isinstance(layer, Quantized) for _, layer in walk(net)):
        quantize(net, weights, *options[:2], smallest=options[2])  # which says what is wrong
    given = on_stack.batches_of(net, batches)
    net.output_signature(given[0], Mode.EVAL)  # says what the model does not take
    if state is None:
        state = init_state(net, given[0], Mode.EVAL)
        if any(is_float(x) for x in jax.tree.leaves(take_out(state, AuxLoss)[0])):
            raise ValueError(
                'quantize: the model has a state, such as running statistics, that calibrate= '
                'needs: give state='
            )
    rounding = _Rounding(options)
    made, narrow, _ = rounding.through(net, weights, state, '', on_stack.stack_of(given))
    _tell(rounding.left)
    return made, narrow


def _tell(left: list[str]) -> None:
    """Warns of leaves that were rounded without their inputs."""
    if left:
        shown = ', '.join(map(repr, left[:_SHOWN]))
        more = f' and {len(left) - _SHOWN} more' if len(left) > _SHOWN else ''
        warnings.warn(
            f'quantize: calibrate= does not reach {shown}{more}: they are rounded to the nearest. '
            'It sees into layers of the library that route or wrap others, and into leaves that '
            'are registered at transforms.multiplied',
            UsageWarning,
            stacklevel=4,
        )


class _Observing(Walk):
    """Sums the grams of some weights, and changes nothing.

    Args:
      wanted: whether a weight is one of these, by its path.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted
        self.grams: Grams = {}

    def leaf(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        if any(self.wanted(joined(path, rest)) for rest in narrow_axes(bare(net))):
            for rest, gram in (_grams(net, path, values) or {}).items():
                at = joined(path, rest)
                if self.wanted(at):
                    self.grams[at] = self.grams[at] + gram if at in self.grams else gram
        return net, weights, run(net, weights, state, values)

    def tied(self, net: Tied, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        *_, outputs = self.through(net.layer, net.untied(weights), state, path, values)
        return net, weights, outputs

    def several(
        self, net: Repeat | Map, weights: Tree, state: Tree, path: str, values: Stack
    ) -> Made:
        outputs: Stack = ()
        for i in range(net.n):
            its_weights = net.block_weights(weights, i)
            its_state = net.block_state(state, i)
            if isinstance(net, Map):
                k = net.layer.n_in
                group = values[i * k : (i + 1) * k]
                outputs += self.through(net.layer, its_weights, its_state, path, group)[2]
            else:
                values = self.through(net.layer, its_weights, its_state, path, values)[2]
        return net, weights, outputs if isinstance(net, Map) else values

    def unreached(self, net: Layer, weights: Tree, path: str) -> tuple[Layer, Tree]:
        del path
        return net, weights


class _Rounding(Walk):
    """Rounds each matrix that it reaches.

    Args:
      options: bits, group_size and smallest.

    Attributes:
      left: the paths of leaves that were rounded without their inputs.
    """

    def __init__(self, options: tuple[int, int, int]) -> None:
        self.options = options
        self.left: list[str] = []
        self._given: Grams = {}  # by paths, for weights that are used several times
        self._last: tuple[Any, ...] = (None, None, None)

    def leaf(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        made = Quantized(net, *self.options)
        chosen = made.chosen(weights)
        if not chosen:
            return net, weights, run(net, weights, state, values)
        given = {rest: self._given.get(joined(path, rest)) for rest in chosen}
        found: Grams | None = {rest: gram for rest, gram in given.items() if gram is not None}
        if len(found or {}) < len(given):
            own = self._own(net, path, values)
            found = found if own is None else {**own, **(found or {})}
            self.left += [path] if own is None and path not in self.left else []
        for rest in chosen:
            if not jnp.isfinite(trees.get(weights, rest)).all():
                raise ValueError(f'quantize: weights at {joined(path, rest)!r} are not finite')
        narrow = made.narrow(weights, found or {})
        return made, narrow, run(made, narrow, state, values)

    def _own(self, net: Layer, path: str, values: Stack) -> Grams | None:
        """The grams of a leaf, once for neighbours of one kind that read the same value."""
        kind = type(bare(net)), net.dtype if isinstance(net, Cast) else None
        if self._last[0] != kind or self._last[1] is not values[0]:
            self._last = kind, values[0], _grams(net, path, values)
        made: Grams | None = self._last[2]
        return made

    def tied(self, net: Tied, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        """Both ends are rounded alike, for the inputs of both in the model as it was."""
        whole = net.untied(weights)
        if _alike(net):
            ends = tuple(joined(path, end) for end in (net.source, net.target))
            self._observe(ends, net.layer, whole, state, path, values)
        inner, whole, outputs = self.through(net.layer, whole, state, path, values)
        return *tied_again(net, inner, whole), outputs

    def several(
        self, net: Repeat | Map, weights: Tree, state: Tree, path: str, values: Stack
    ) -> Made:
        """Blocks with weights of their own one after the other; shared ones for all inputs."""
        if isinstance(net, Map) or net.shared:
            self._observe((path,), net, weights, state, path, values)
            one, its_state = values[: net.layer.n_in], net.block_state(state, 0)
            inner, weights, _ = self.through(net.layer, weights, its_state, path, one)
            made = net.with_sublayers((inner, *net.sublayers[1:]))
            return made, weights, run(made, weights, state, values)
        parts, inner = [], net.layer
        for i in range(net.n):
            its_weights, its_state = net.block_weights(weights, i), net.block_state(state, i)
            inner, part, values = self.through(net.layer, its_weights, its_state, path, values)
            parts.append(part)
        made = net.with_sublayers((inner, *net.sublayers[1:]))
        return made, jax.tree.map(lambda *xs: jnp.stack(xs), *parts), values

    def _observe(self, ends: tuple[str, ...], net: Layer, *given: Any) -> None:
        """Sums the grams of weights at or below some paths, each for all of these paths.

        Args:
          ends: the paths.
          net, *given: as of `through`.
        """

        def rest(at: str) -> str | None:
            below = (at.removeprefix(e) for e in ends if not e or f'{at}/'.startswith(f'{e}/'))
            return next(below, None)

        seen = _Observing(lambda at: rest(at) is not None)
        seen.through(net, *given)
        total: Grams = {}
        for at, gram in seen.grams.items():
            below = rest(at) or ''
            total[below] = total[below] + gram if below in total else gram
        self._given.update({end + below: total[below] for end in ends for below in total})

    def unreached(self, net: Layer, weights: Tree, path: str) -> tuple[Layer, Tree]:
        bits, group_size, smallest = self.options
        made, weights = quantize(net, weights, bits, group_size, smallest=smallest)
        self.left += [at for at, layer in walk(made, path) if isinstance(layer, Quantized)]
        return made, weights


def _grams(net: Layer, path: str, values: Stack) -> Grams | None:
    """The grams of a leaf, which must be finite."""
    made = grams(net, values)
    for gram in (made or {}).values():
        if not jnp.isfinite(jnp.trace(gram)):
            raise ValueError(
                f'quantize: with the batches of calibrate=, the layer at {path!r} gets inputs that '
                'are not finite: look for ids outside the vocabulary, and for weights that are NaN'
            )
    return made


def _alike(net: Tied) -> bool:
    """Whether the two ends of a tie are the same rows when they are narrow."""
    source, target = (_letters(net.layer, end) for end in (net.source, net.target))
    if net.via is None:
        return source == target
    return net.via is jnp.transpose and (source, target) in TRANSPOSED


def _letters(net: Layer, end: str) -> dict[str, str]:
    """The axes of the weights at or below a path, as `Narrow` writes them."""
    found = {}
    for where, layer in walk(net):
        for rest, axes in narrow_axes(bare(layer)).items():
            at = joined(where, rest)
            if f'{at}/'.startswith(f'{end}/'):
                found[at.removeprefix(end)] = axes
    return found
