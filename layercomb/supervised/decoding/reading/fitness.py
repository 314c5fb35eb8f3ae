"""Checks that a model's layers can decode one position at a time.

A position-wise layer can, and so can a layer that keeps a cache of earlier positions in
``PREDICT``. Any other layer would silently give wrong numbers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator

import jax

from layercomb import trees
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.once import Once
from layercomb.layers.facts.observing import observing
from layercomb.layers.facts.positionwise import of_sublayers, unsaid
from layercomb.shapes import Signature
from layercomb.trees import Tree


@dataclasses.dataclass
class _Seen:
    """What was observed of a layer while a model was initialised for decoding."""

    layer: Layer
    signatures: list[Signature] = dataclasses.field(default_factory=list)
    paths: frozenset[str] = frozenset()


def judged_init(
    net: Layer, signature: Signature, rng: jax.Array
) -> tuple[tuple[Tree, Tree], str | None]:
    """Initialises a model for ``PREDICT``, and finds a layer that cannot decode, if there is one.

    A layer cannot decode if it gets one position at a time, is not known to be position-wise, and
    keeps no state of earlier positions. Inputs that a layer gets whole at every step, such as a
    source, do not count as positions.

    Args:
      net: a model.
      signature: of its inputs; tokens are the first, or the second after a source.
      rng: a key.

    Returns:
      ((weights, state), refusal): what `net.init` returns, and the error text for the first layer
      that cannot decode, or None.
    """
    suspects = frozenset(_suspects(net))  # values, not objects: a class may make its layers anew
    seen, made = _observed(suspects, lambda: net.init(signature, rng, Mode.PREDICT))
    unfit = [each for each in seen.values() if not _holds_cache(each)]
    if unfit:
        other = _with_other_length(signature)
        again, _ = _observed(
            suspects,
            lambda: jax.eval_shape(lambda: net.init(other, jax.random.key(0), Mode.PREDICT)),
        )
        for each in unfit:
            if again[each.layer].signatures != each.signatures:
                return made, _refusal(each.layer)
    return made, None


def _suspects(layer: Layer, given_whole: bool = False) -> Iterator[Layer]:
    """Layers that do not say ``position_wise = True``, unless only because of a layer inside."""
    said = layer.position_wise
    if said is True:
        return
    given_whole = given_whole or layer.cacheless
    is_routed = isinstance(inspect.getattr_static(type(layer), 'position_wise', None), property)
    of_inside = bool(layer.sublayers) and said is of_sublayers(layer)
    if not (of_inside and (said is False or is_routed)) and not (given_whole and said is False):
        yield layer
    if isinstance(layer, Once):  # layers inside run in EVAL; one elsewhere may be equal to them
        return
    for each in layer.sublayers:
        yield from _suspects(each, given_whole)


def _observed(
    suspects: frozenset[Layer], init: Callable[[], tuple[Tree, Tree]]
) -> tuple[dict[Layer, _Seen], tuple[Tree, Tree]]:
    """Runs `init`; returns what was observed of suspects in ``PREDICT``, and its result.

    Layers inside `Once` are initialised in ``EVAL``, so they are not observed.
    """
    seen: dict[Layer, _Seen] = {}

    def observe(layer: Layer, signature: Signature, mode: Mode, made: tuple[Tree, Tree]) -> None:
        if mode is Mode.PREDICT and layer in suspects:
            each = seen.setdefault(layer, _Seen(layer))
            each.signatures.append(signature)
            each.paths = frozenset(trees.flatten(made[1]))

    with observing(observe):
        made = init()
    return seen, made


def _holds_cache(seen: _Seen) -> bool:
    """Whether the layer itself has state in ``PREDICT`` that it does not have in training."""
    layer, signature = seen.layer, seen.signatures[-1]
    own = seen.paths - _paths(layer, signature, Mode.TRAIN)
    if isinstance(layer, Combinator):
        own = frozenset(path for path in own if path.split('/')[0] not in layer.keys)
    elif isinstance(layer, Wrapper):
        own -= _paths(layer.layer, layer.inner_signature(signature), Mode.PREDICT)
    return bool(own)


def _paths(layer: Layer, signature: Signature, mode: Mode) -> frozenset[str]:
    made = jax.eval_shape(lambda: layer.init(signature, jax.random.key(0), mode)[1])
    return frozenset(trees.flatten(made))


def _with_other_length(signature: Signature) -> Signature:
    """The same signature with one token less a row, or with two tokens instead of one."""
    at = min(1, len(signature) - 1)
    batch, length, *rest = signature[at].shape
    shape = (batch, length - 1 if length > 1 else 2, *rest)
    other = jax.ShapeDtypeStruct(shape, signature[at].dtype)
    return (*signature[:at], other, *signature[at + 1 :])


def _refusal(layer: Layer) -> str:
    if layer.position_wise is None:
        return (
            f'decoding: {unsaid(layer)}; if not, it needs a state in PREDICT that keeps what it '
            'sees of the positions before'
        )
    return (
        f'decoding: {type(layer).__name__} mixes positions and keeps none of those before, and it '
        'would be given one at a time: use a causal layer that keeps them in its state in PREDICT, '
        'or say cacheless = True in the class if it needs none'
    )
