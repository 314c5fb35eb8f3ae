"""Checks of a layer as a description: a value, which prints as code and can be rewritten."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from layercomb import layers as tl
from layercomb import losses, transforms
from layercomb.layers.core.layer import Layer
from layercomb.testing.errors import Broken, expect
from layercomb.testing.trial import Trial


def is_a_value(trial: Trial) -> None:
    """Frozen, hashable, equal to its copies, and not callable."""
    layer = trial.layer
    for how, copied in _copies(layer):
        expect(
            copied == layer and hash(copied) == hash(layer),
            f'{how} is another layer than the one it was made of',
            'an equal one, with the same hash',
            'let its fields alone describe it: plain values, functions of a module, and layers',
        )
    other = layer.replace(name='another')
    expect(
        other != layer and other.name == 'another' and type(other) is type(layer),
        f'replace(name="another") gave {other!r}',
        'a layer of the same class that differs in its name',
        'do not write __eq__, replace or __post_init__ so that fields are lost',
    )
    try:
        layer.name = 'other'  # type: ignore[misc]
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise Broken('a field could be set', 'an error', 'do not write __setattr__')
    try:
        layer(*trial.inputs)
    except TypeError as error:
        expect(
            'holds no weights: bind it first' in str(error),
            f'calling it raised {error}',
            'the error of every layer, that a description holds no weights',
            'write apply, not __call__',
        )
    else:
        raise Broken('it can be called', 'an error', 'write apply, not __call__')


def prints_as_code(trial: Trial) -> None:
    """`repr` is the code that makes the layer."""
    layer = trial.layer
    for one in (layer, layer.replace(name='another')):
        text = repr(one)
        name = '' if one.name is None else f'name={one.name!r}'
        expect(
            text.startswith(type(one).__name__ + '(') and name in text,
            text,
            f'{type(one).__name__}(…{name})',
            'do not write __repr__: what Layer prints is enough',
        )
        names = _names(one)
        if any(f in text for f in ('<lambda>', '<locals>')):
            continue  # a function without a name that code could use
        try:
            made = eval(text, names)
        except Exception as error:
            raise Broken(
                f'{text}, which raises {type(error).__name__}: {error}',
                'code that makes the layer',
                'keep plain values in its fields, whose repr is code, and leave __repr__ alone',
            ) from error
        expect(
            made == one,
            f'{text}, which makes another layer: {_difference(made, one)}',
            'code that makes an equal layer',
            'keep each argument in a field of its name; do not change it in __post_init__ so '
            'that the same argument gives another value',
        )


def can_be_rewritten(trial: Trial) -> None:
    """`sublayers` shows every layer inside, and `with_sublayers` puts others in their places."""
    layer = trial.layer
    again = layer.with_sublayers(layer.sublayers)
    fix = 'derive from Combinator or Wrapper, which find the layers in its fields'
    expect(
        again == layer and transforms.rewrite(layer, lambda x: x) == layer,
        f'with_sublayers(sublayers) gave {again!r}',
        'an equal layer',
        fix,
    )
    n = 0

    def mark(leaf: Layer) -> Layer:
        nonlocal n
        n += not leaf.sublayers
        return leaf if leaf.sublayers else leaf.replace(name=f'seen{n}')

    found = list(_leaves(transforms.rewrite(layer, mark)))
    unseen = [leaf for leaf in found if not (leaf.name or '').startswith('seen')]
    expect(not unseen, f'a rewrite did not reach {unseen[:1]!r}', 'it reaches every layer', fix)
    expect(
        len(found) == len(list(_leaves(layer))),
        f'{len(found)} layers inside after a rewrite',
        f'{len(list(_leaves(layer)))}, as before',
        fix,
    )
    try:
        layer.with_sublayers((*layer.sublayers, tl.Dense(3)))
    except ValueError as error:
        expect('layer' in str(error), str(error), 'how many layers it holds', fix)
    else:
        raise Broken('it took a sublayer too many', 'a ValueError', fix)


def _copies(layer: Layer) -> Iterator[tuple[str, Layer]]:
    yield 'what replace() makes', layer.replace()
    yield 'copy.copy', copy.copy(layer)
    yield 'copy.deepcopy', copy.deepcopy(layer)
    try:
        text = pickle.dumps(layer)
    except (pickle.PicklingError, AttributeError):  # a class or a function inside a function
        return
    yield 'what pickle restores', pickle.loads(text)


def _names(layer: Layer) -> dict[str, Any]:
    """What may stand in the code of a layer: the library's names, and its own."""
    names = {**vars(jnp), **vars(losses), **vars(transforms), **vars(tl)}
    for value in _values(layer):
        if isinstance(value, Layer):
            module = sys.modules.get(type(value).__module__)
            names = {**vars(module), **names} if module else names
            names[type(value).__name__] = type(value)
        elif callable(value) and hasattr(value, '__name__'):
            names[value.__name__] = value
    return names


def _values(value: Any) -> Iterator[Any]:
    """A value, and what is in it: in a tuple, in the fields of a layer."""
    yield value
    inside: Any = value if isinstance(value, tuple) else ()
    if isinstance(value, Layer):
        inside = [getattr(value, field.name) for field in dataclasses.fields(value)]
    for one in inside:
        yield from _values(one)


def _leaves(value: Any) -> Iterator[Layer]:
    """Layers that hold no layers, found through fields alone, without `sublayers`."""
    if isinstance(value, tuple):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, Layer):
        below = [
            leaf
            for field in dataclasses.fields(value)
            for leaf in _leaves(getattr(value, field.name))
        ]
        yield from below or [value]


def _difference(made: Any, layer: Layer) -> str:
    if type(made) is not type(layer):
        return f'a {type(made).__name__}'
    for field in dataclasses.fields(layer):
        one, two = getattr(made, field.name), getattr(layer, field.name)
        if one != two:
            return f'{field.name} is {one!r} and not {two!r}'
    return 'its fields are equal, and == says that it is not'
