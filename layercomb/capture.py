"""`capture`: the outputs of layers inside a model, by their paths.

The chosen layers put their outputs into the new state, under keys that no layer can have. So it
works wherever a state does: under `jit` and `grad`, in scans, and in the gradient of a reversible
stack.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from layercomb.checks import Size
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.map import Map
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.combinators.residual import Add
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined
from layercomb.layers.core.wrapper import Wrapper, wrapped
from layercomb.layers.decoding.once import Once
from layercomb.layers.reversible.cotangents import add_cts
from layercomb.layers.reversible.layers import Reversible
from layercomb.layers.state.parts import WHOLE, Part
from layercomb.trees import Tree

Activations = dict[str, Any]


def capture(
    net: Layer,
    weights: Tree,
    state: Tree,
    inputs: Arrays,
    path_pattern: str,
    *,
    rng: jax.Array | None = None,
    mode: Mode = Mode.EVAL,
) -> tuple[Arrays, Activations]:
    """Applies a model, and returns the outputs of the layers at some paths, too.

    Paths are those of the weights, as `walk` gives them. Each names one layer: the outermost there,
    and under `Repeat` and `Map` the repeated layer. So ``'block'`` gives the outputs of all blocks.
    Compiled programs compute only the chosen outputs in addition.

    Args:
      net: any layer. A captured layer inside `Chunk` runs on the whole sequence and not on slices,
        so it takes more memory, and its dropout draws from other keys.
      weights, state, inputs, rng, mode: as of `Layer.apply`; the new state is left out. In
        ``PREDICT`` an encoder in `Once` is run again.
      path_pattern: a path or a pattern of `fnmatch`, whose ``*`` stands for any text, ``/`` too:
        ``'block/*'`` is everything inside blocks, ``'*core'`` every core. '' is the whole model.

    Returns:
      The outputs, and for each path an array, or a tuple unless the layer has one output. An array
      has a leading axis for each `Repeat` and `Map` around it, the outermost first: of n blocks,
      (n, B, …). (A loop in a class of one's own adds what it makes of a state.)

    Raises:
      ValueError: if no layer matches, naming the paths that are nearest; if a class of one's own
        drops the state of the layers in it.

    >>> import jax
    >>> from layercomb import tl, capture, shape_dtype
    >>> net = tl.Serial(tl.Dense(4), tl.Repeat(tl.Serial(tl.Dense(4), tl.Relu(), name='block'), 3))
    >>> weights, state = net.init(shape_dtype((2, 8)), jax.random.key(0))
    >>> x = jax.numpy.ones((2, 8))
    >>> (y,), found = capture(net, weights, state, (x,), 'block/*')
    >>> {path: values.shape for path, values in found.items()}
    {'block/dense': (3, 2, 4), 'block/relu': (3, 2, 4)}
    """
    places = {place.path: place for place in _places(net, mode)}
    chosen = [path for path in places if fnmatch.fnmatchcase(path, path_pattern)]
    if not chosen:
        near = difflib.get_close_matches(path_pattern, places, n=5, cutoff=0)
        raise ValueError(
            f'capture: no layer at {path_pattern!r}; the nearest are '
            f'{", ".join(map(repr, near))}: choose one of them, or a pattern such as '
            f"'*{near[0].rpartition('/')[2]}'"
        )
    keeping = _keeping(net, '', frozenset(chosen), mode)
    outputs, new = keeping.apply(weights, state, inputs, rng=rng, mode=mode)
    found: dict[str, list[Tree]] = {}
    _take(new, found)
    return outputs, {path: places[path].arranged(found.get(path, [])) for path in chosen}


class _Place(NamedTuple):
    """Where a layer stands.

    Attributes:
      path: of it.
      loops: around it, the outermost first: how often each runs, and whether it is a scan, which
        stacks what is kept, or else keeps one after the other.
    """

    path: str
    loops: tuple[tuple[int, bool], ...]

    def arranged(self, found: Sequence[Tree]) -> Any:
        """What was kept of a layer, with a leading axis for each loop in their order."""
        stacked = [i for i, (_, scan) in enumerate(self.loops) if scan]
        listed = [i for i, (_, scan) in enumerate(self.loops) if not scan]
        sizes = tuple(self.loops[i][0] for i in listed)
        if len(found) != math.prod(sizes):
            raise ValueError(
                f'capture: the state that the layer at {self.path!r} leaves does not come out: a '
                'class around it must hand the new state of its layers on'
            )
        order = [[*listed, *stacked].index(i) for i in range(len(self.loops))]

        def one(*values: jax.Array) -> jax.Array:
            if not sizes:
                return values[0]
            x = jnp.stack(values).reshape(*sizes, *values[0].shape)
            return x.transpose(*order, *range(len(order), x.ndim))

        made = jax.tree.map(one, *found)
        outputs = tuple(made[str(i)] for i in range(len(made)))
        return outputs[0] if len(outputs) == 1 else outputs


def _places(
    layer: Layer, mode: Mode, path: str = '', loops: tuple[tuple[int, bool], ...] = ()
) -> Iterator[_Place]:
    """The paths at which something can be kept."""
    if isinstance(layer, (Repeat, Map)):
        loops += ((layer.n, isinstance(layer, Repeat) and mode is not Mode.PREDICT),)
    if isinstance(layer, Once) and mode is Mode.PREDICT:
        mode = Mode.EVAL
    if isinstance(layer, Wrapper):
        yield from _places(layer.layer, mode, path, loops)
        return
    yield _Place(path, loops)
    for key, child in layer.children:
        if _can_keep(layer, key, child):
            yield from _places(child, mode, joined(path, key), loops)


def _can_keep(layer: Layer, key: str, child: Layer) -> bool:
    """Whether a child can be kept by its path; a reversible residual's sum must stay an `Add`."""
    return bool(key) and not (isinstance(layer, Reversible) and isinstance(child, Add))


def _keeping(layer: Layer, path: str, chosen: frozenset[str], mode: Mode) -> Layer:
    """The layer, of which those at chosen paths keep their outputs."""
    keeps = path in chosen
    if isinstance(layer, Wrapper):
        loops = any(isinstance(each, (Repeat, Map)) for each in wrapped(layer))
        inside = _keeping(layer.layer, path, chosen if loops else chosen - {path}, mode)
        made = layer if inside == layer.layer else _around(layer, inside, mode)
        return _kept(made, path) if keeps and not loops else made
    children = []
    for key, child in layer.children:
        made = child
        if _can_keep(layer, key, child):
            made = _keeping(child, joined(path, key), chosen, mode)
        children.append(child if made == child else made.replace(name=key))
    made = layer if tuple(children) == layer.sublayers else layer.with_sublayers(tuple(children))
    return _kept(made, path) if keeps else made


def _around(layer: Wrapper, inside: Layer, mode: Mode) -> Layer:
    """A wrapper around a layer in which something is kept, as far as its loop can hand that on."""
    if isinstance(layer, Chunk):
        return inside
    if isinstance(layer, Map):
        return _Each(inside, layer.n)
    made: Layer = layer.with_sublayers((inside, *layer.sublayers[1:]))
    return _Again(made) if isinstance(layer, Once) and mode is Mode.PREDICT else made


class _Kept(Wrapper):
    """A layer that leaves its outputs in its new state too."""

    path: str

    @property
    def key(self) -> str:
        """Under which the outputs stand: no layer and no array is called so."""
        return f'/{self.path}'

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        outputs, new = self.layer.apply(weights, state, inputs, rng=rng, mode=mode)
        rest = new if isinstance(new, dict) else {WHOLE: new}
        return outputs, {**rest, self.key: {str(i): y for i, y in enumerate(outputs)}}


class _KeptReversible(_Kept, Reversible):
    """The same for a layer that runs backwards."""

    def reverse_and_grad(
        self, weights, state, outputs, cts, *, rng, mode=Mode.REPLAY, state_cts=None
    ):
        """The layer's own; what was kept are its outputs, so their cotangents add up."""
        layer: Any = self.layer
        rest = dict(state_cts or {})
        kept = rest.pop(self.key, {})
        cts = tuple(add_cts(ct, kept.get(str(i))) for i, ct in enumerate(cts))
        return layer.reverse_and_grad(
            weights, state, outputs, cts, rng=rng, mode=mode, state_cts=rest
        )


def _kept(layer: Layer, path: str) -> Layer:
    kind = _KeptReversible if hasattr(layer, 'reverse_and_grad') else _Kept
    return kind(layer, path)


class _Each(Wrapper):
    """As `Map`, with a state for each group, so that all that is kept comes out."""

    n: Size

    n_in = property(lambda self: self.n * self.layer.n_in)
    n_out = property(lambda self: self.n * self.layer.n_out)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        outputs: Arrays = ()
        new: Tree = {}
        for i in range(self.n):
            group = inputs[i * self.layer.n_in : (i + 1) * self.layer.n_in]
            its_state = state.get(str(i), {}) if mode is Mode.PREDICT else state
            made, new[str(i)] = self.layer.apply(
                weights, its_state, group, rng=fold(rng, i), mode=mode
            )
            outputs += made
        return outputs, new


class _Again(Wrapper):
    """A `Once` that computes its layer at every call, where what is kept can come out."""

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        once: Any = self.layer
        return once.layer.apply(weights, once.inner_state(state), inputs, mode=Mode.EVAL)


def _take(state: Tree, found: dict[str, list[Tree]]) -> None:
    """Puts what was kept, by path and in order, into `found`."""
    for key in sorted(state, key=lambda key: (len(key), key)):  # '10' after '9'
        if isinstance(state[key], Part):
            _take(state[key].fields(), found)
        elif key.startswith('/'):
            found.setdefault(key[1:], []).append(state[key])
        elif isinstance(state[key], dict):
            _take(state[key], found)
