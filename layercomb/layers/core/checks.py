"""Checks of what goes in and out of layers; errors name the layer in which they arose."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from layercomb.layers.core.mode import check_mode
from layercomb.layers.facts.observing import tell
from layercomb.methods import ABSENT, Method
from layercomb.shapes import describe, signature_of

F = TypeVar('F', bound=Callable[..., Any])


def checking_init(init: F) -> F:
    """A class's `init` with checks: of the number of signatures, and of the mode.

    The result also takes one signature alone, which becomes a tuple of one. All other arguments are
    passed on unchanged. An `init` without a parameter `mode` is called without it.

    Args:
      init: the function as the class writes it, ``init(self, signature, rng, mode)``.
    """
    method = Method(init, ('signature', 'rng', 'mode'))

    def checking(self: Any, *args: Any, **given: Any) -> Any:
        mode = method.find('mode', args, given)
        if mode is not ABSENT:
            check_mode(f'{type(self).__name__}.init', mode)
            args, given = method.as_taken('mode', args, given)
        signature = method.find('signature', args, given)
        if signature is not ABSENT:
            signature = signature if isinstance(signature, tuple) else signature_of(signature)
            if not hasattr(
                self, 'route'
            ):  # in a combinator the sublayer that finds too few says so
                check_inputs(self, signature)
            args, given = method.put('signature', signature, args, given)
        made = method(self, args, given)
        tell(self, signature, mode, made)
        return made

    wrapper: F = method.wrapper(checking)
    return wrapper


def checking_apply(apply: F) -> F:
    """A class's `apply` with checks: of the number of inputs, and of the mode.

    Arguments are passed on unchanged, but that a list of inputs becomes a tuple.

    Args:
      apply: the function as the class writes it, ``apply(self, weights, state, inputs, …)``.
    """
    method = Method(apply, ('weights', 'state', 'inputs', 'rng', 'mode'))

    def checking(self: Any, *args: Any, **given: Any) -> Any:
        mode = method.find('mode', args, given)
        if mode is not ABSENT:
            check_mode(f'{type(self).__name__}.apply', mode)
        inputs = method.find('inputs', args, given)
        if inputs is not ABSENT:
            if not isinstance(inputs, (tuple, list)):
                raise TypeError(
                    f'{type(self).__name__}.apply takes a tuple of inputs, got '
                    f'{describe([inputs])}: write apply(weights, state, (x,))'
                )
            check_inputs(self, tuple(inputs))
            args, given = method.put('inputs', tuple(inputs), args, given)
        return method(self, args, given)

    made: F = method.wrapper(checking)
    return made


def check_inputs(layer: Any, inputs: tuple[Any, ...]) -> None:
    """Raises a TypeError unless there are `layer.n_in` inputs.

    Args:
      layer: what takes them.
      inputs: arrays or signatures; the message shows their shapes and dtypes.
    """
    if len(inputs) != layer.n_in:
        there = f': {describe(inputs)}' if inputs else ''
        raise TypeError(
            f'{type(layer).__name__} takes {_values(layer.n_in)} off the stack, '
            f'{"only " if len(inputs) < layer.n_in else ""}{len(inputs)} '
            f'{"was" if len(inputs) == 1 else "were"} there{there}'
        )


def check_outputs(layer: Any, outputs: Any) -> tuple[Any, ...]:
    """Returns `outputs` if they are a tuple of `layer.n_out` arrays.

    Raises:
      TypeError: if they are no tuple, or too few or too many.
    """
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
    """Raises a ValueError unless there are as many `sublayers` as `layer` holds."""
    if len(sublayers) != len(layer.sublayers):
        raise ValueError(
            f'{type(layer).__name__} holds {len(layer.sublayers)} layers, {len(sublayers)} were '
            'given: give one for each of layer.sublayers'
        )


class where:
    """A context that adds a note to an error: in which sublayer it arose.

    Args:
      parent: the combinator.
      key: the sublayer's key in it.
      layer: the sublayer.
      values: its inputs, arrays or signatures; the note shows their shapes and dtypes.
    """

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
