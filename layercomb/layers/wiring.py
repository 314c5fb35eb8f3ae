"""What goes in and out of layers is checked, and an error says in which of them it arose."""

from __future__ import annotations

import functools
import re
from typing import Any

from layercomb.layers.mode import Mode, check_mode
from layercomb.shapes import describe, signature_of


def checking_init(init: Any) -> Any:
    """`Layer.init` that takes one signature alone too, and refuses what is no mode."""

    @functools.wraps(init)
    def checking(self: Any, signature: Any, rng: Any, mode: Any = Mode.TRAIN) -> Any:
        check_mode(f'{type(self).__name__}.init', mode)
        signature = signature if isinstance(signature, tuple) else signature_of(signature)
        return init(self, signature, rng, mode)

    return checking


def checking_apply(apply: Any) -> Any:
    """`Layer.apply` that refuses other inputs than a tuple of `n_in`, and what is no mode."""

    @functools.wraps(apply)
    def checking(self: Any, weights: Any, state: Any, inputs: Any, **given: Any) -> Any:
        check_mode(f'{type(self).__name__}.apply', given.get('mode', Mode.EVAL))
        if not isinstance(inputs, (tuple, list)):
            raise TypeError(
                f'{type(self).__name__}.apply takes a tuple of inputs, got {describe([inputs])}: '
                'write apply(weights, state, (x,))'
            )
        check_inputs(self, tuple(inputs))
        return apply(self, weights, state, tuple(inputs), **given)

    return checking


def check_inputs(layer: Any, inputs: tuple[Any, ...]) -> None:
    """Raises a TypeError that says what `layer` takes if `inputs` are too few or too many."""
    if len(inputs) != layer.n_in:
        there = f': {describe(inputs)}' if inputs else ''
        raise TypeError(
            f'{type(layer).__name__} takes {_values(layer.n_in)} off the stack, '
            f'{"only " if len(inputs) < layer.n_in else ""}{len(inputs)} '
            f'{"was" if len(inputs) == 1 else "were"} there{there}'
        )


def check_outputs(layer: Any, outputs: Any) -> tuple[Any, ...]:
    """`outputs`, if they are a tuple of as many arrays as `layer.n_out` promises."""
    if not isinstance(outputs, tuple):
        raise TypeError(
            f'{type(layer).__name__}.apply must return a tuple of outputs and the state, its '
            f'outputs were {type(outputs).__name__}: write return (y,), state'
        )
    if len(outputs) != layer.n_out:
        raise TypeError(
            f'{type(layer).__name__} promises n_out={layer.n_out} and returned '
            f'{_values(len(outputs))}: set n_out, or return as many'
        )
    return outputs


def check_sublayers(layer: Any, sublayers: tuple[Any, ...]) -> None:
    """Raises a ValueError unless `sublayers` are as many as `layer` holds."""
    if len(sublayers) != len(layer.sublayers):
        raise ValueError(
            f'{type(layer).__name__} holds {len(layer.sublayers)} layers, {len(sublayers)} were '
            'given: give one for each of layer.sublayers'
        )


class where:
    """Adds to an error that leaves the block a note that says in which sublayer it arose."""

    def __init__(self, parent: Any, key: str, layer: Any, values: tuple[Any, ...]):
        self._parent, self._key, self._layer, self._values = parent, key, layer, values

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            note = f'in {type(self._parent).__name__}.{self._key}'
            if not self._layer.sublayers:
                one_line = re.sub(r'\s*\n\s*', ' ', repr(self._layer))
                note += f': {one_line}({describe(self._values)})'
            error.add_note(note)


def _values(n: int) -> str:
    return '1 value' if n == 1 else f'{n} values'
