"""`calibrated`: a model whose matrices are rounded for the inputs that they get.

A matrix is rounded when the walk reaches it. So its inputs come through what is rounded already,
as they will. Beside them go those of the model as it was, so that the matrix can make up for what
was rounded before it.
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
from layercomb.transforms.quantization.calibration.inputs import Read, read_by, together
from layercomb.transforms.quantization.calibration.values import Stack, apart, beside, run
from layercomb.transforms.quantization.calibration.walking import Made, Walk
from layercomb.transforms.quantization.choosing import Choices
from layercomb.transforms.quantization.layer import Quantized, bare, narrow_axes
from layercomb.transforms.quantization.quantizing import TRANSPOSED, rounded, tied_again
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

_SHOWN = 4  # paths in a warning


def calibrated(
    net: Layer, weights: Tree, chosen: Choices, batches: Any, state: Tree | None
) -> tuple[Layer, Tree]:
    """The same model with its large matrices in few bits: what `quantize` does with ``calibrate=``.

    Args:
      net, weights, batches, state: as of `quantize`.
      chosen: what becomes of each leaf.

    Returns:
      (layer, weights).

    Raises:
      TypeError: for batches that the model does not take.
      ValueError: without batches; if values on the way are not finite; if a state is
        needed.
    """
    if any(isinstance(layer, Quantized) for _, layer in walk(net)):
        rounded(net, weights, chosen)  # which says what is wrong
    given = on_stack.batches_of(net, batches)
    net.output_signature(given[0], Mode.EVAL)  # says what the model does not take
    if state is None:
        state = init_state(net, given[0], Mode.EVAL)
        if any(is_float(x) for x in jax.tree.leaves(take_out(state, AuxLoss)[0])):
            raise ValueError(
                'quantize: the model has a state, such as running statistics, that calibrate= '
                'needs: give state='
            )
    rounding = _Rounding(chosen, len(given))
    made, narrow, _ = rounding.through(net, weights, state, '', on_stack.stack_of(given + given))
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
    """Sums what some weights multiply, and changes nothing.

    Args:
      wanted: whether a weight is one of these, by its path.
    """

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted
        self.read: Read = {}

    def leaf(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        if any(self.wanted(joined(path, rest)) for rest in narrow_axes(bare(net))):
            found = _read(net, path, values) or {}
            own = {joined(path, rest): inputs for rest, inputs in found.items()}
            self.read = together(self.read, {at: x for at, x in own.items() if self.wanted(at)})
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

    Values have every batch twice: behind what is rounded, and then as it was.

    Args:
      chosen: what becomes of each leaf.
      n: how many batches there are.

    Attributes:
      left: the paths of leaves that were rounded without their inputs.
    """

    def __init__(self, chosen: Choices, n: int) -> None:
        self.chosen, self.n = chosen, n
        self.left: list[str] = []
        self._given: Read = {}  # by paths, for weights that are used several times
        self._last: tuple[Any, ...] = (None, None, None)

    def leaf(self, net: Layer, weights: Tree, state: Tree, path: str, values: Stack) -> Made:
        made = self.chosen.leaf(net, path)
        chosen = {} if made is None else made.chosen(weights)
        if made is None or not chosen:
            return net, weights, run(net, weights, state, values)
        given = {rest: self._given.get(joined(path, rest)) for rest in chosen}
        found: Read | None = {rest: inputs for rest, inputs in given.items() if inputs is not None}
        if len(found or {}) < len(given):
            own = self._own(net, path, values)
            found = found if own is None else {**own, **(found or {})}
            self.left += [path] if own is None and path not in self.left else []
        for rest in chosen:
            if not jnp.isfinite(trees.get(weights, rest)).all():
                raise ValueError(f'quantize: weights at {joined(path, rest)!r} are not finite')
        narrow = made.narrow(weights, found or {})
        return made, narrow, self.again((made, narrow), (net, weights), state, values)

    def again(
        self, made: tuple[Layer, Tree], was: tuple[Layer, Tree], state: Tree, values: Stack
    ) -> Stack:
        now, before = apart(values, self.n)
        return beside(run(*made, state, now), run(*was, state, before))

    def _own(self, net: Layer, path: str, values: Stack) -> Read | None:
        """What a leaf multiplies, once for neighbours of one kind that read the same value."""
        kind = type(bare(net)), net.dtype if isinstance(net, Cast) else None
        if self._last[0] != kind or self._last[1] is not values[0]:
            self._last = kind, values[0], _read(net, path, *apart(values, self.n))
        made: Read | None = self._last[2]
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
            was = net, weights
            one, its_state = values[: net.layer.n_in], net.block_state(state, 0)
            inner, weights, _ = self.through(net.layer, weights, its_state, path, one)
            made = net.with_sublayers((inner, *net.sublayers[1:]))
            return made, weights, self.again((made, weights), was, state, values)
        parts, inner = [], net.layer
        for i in range(net.n):
            its_weights, its_state = net.block_weights(weights, i), net.block_state(state, i)
            inner, part, values = self.through(net.layer, its_weights, its_state, path, values)
            parts.append(part)
        made = net.with_sublayers((inner, *net.sublayers[1:]))
        return made, jax.tree.map(lambda *xs: jnp.stack(xs), *parts), values

    def _observe(
        self,
        ends: tuple[str, ...],
        net: Layer,
        weights: Tree,
        state: Tree,
        path: str,
        values: Stack,
    ) -> None:
        """Sums what weights at or below some paths multiply, each for all of these paths.

        Args:
          ends: the paths.
          net, weights, state, path, values: as of `through`.
        """

        def rest(at: str) -> str | None:
            below = (at.removeprefix(e) for e in ends if not e or f'{at}/'.startswith(f'{e}/'))
            return next(below, None)

        seen = _Observing(lambda at: rest(at) is not None)
        seen.through(net, weights, state, path, apart(values, self.n)[0])
        total: Read = {}
        for at, inputs in seen.read.items():
            total = together(total, {rest(at) or '': inputs})
        self._given.update({end + below: total[below] for end in ends for below in total})

    def unreached(self, net: Layer, weights: Tree, path: str) -> tuple[Layer, Tree]:
        made, weights = rounded(net, weights, self.chosen, path)
        self.left += [at for at, layer in walk(made, path) if isinstance(layer, Quantized)]
        return made, weights


def _read(net: Layer, path: str, values: Stack, before: Stack | None = None) -> Read | None:
    """What a leaf multiplies, which must be finite."""
    made = read_by(net, values, before)
    for inputs in (made or {}).values():
        if not jnp.isfinite(jnp.trace(inputs.gram)):
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
