"""`check_layer`: checks what every layer promises, of any layer, also your own.

>>> import jax, jax.numpy as jnp
>>> import layercomb as lc
>>> class Scale(lc.Layer):
...     factor: float = 1.0
...
...     def init(self, signature, rng, mode=lc.Mode.TRAIN):
...         (x,) = signature
...         return {'scale': jnp.ones(x.shape[-1], jnp.float32)}, {}
...
...     def apply(self, weights, state, inputs, *, rng=None, mode=lc.Mode.EVAL):
...         (x,) = inputs
...         return (self.factor * weights['scale'] * x,), state
>>> lc.testing.check_layer(Scale(2.0), lc.shape_dtype((2, 4, 8)))

A layer that keeps its promises gives no output. For any other, an error names the broken promise:

>>> class Centred(Scale):
...     position_wise = True
...
...     def apply(self, weights, state, inputs, *, rng=None, mode=lc.Mode.EVAL):
...         (x,) = inputs
...         return (x - x.mean(axis=1, keepdims=True),), state
>>> try:
...     lc.testing.check_layer(Centred(), lc.shape_dtype((2, 4, 8)), skip=('decoding',))
... except AssertionError as error:
...     print(error)
Centred() breaks the promise 'position_wise':
a layer that says it is position-wise gives the same for a slice of the positions.
  came:     output 0, given all positions but the first: float32[2,3,8] is off by up to 0.569
  expected: what it gives for them among all
  fix:      say that it is not position-wise: position_wise = False in the class
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from layercomb.layers.core.layer import Layer
from layercomb.testing.errors import LayerCheckError
from layercomb.testing.table import CHECKS
from layercomb.testing.trial import Trial, example_inputs

__all__ = ['LayerCheckError', 'check_layer', 'checks', 'example_inputs', 'layer_checks']


def checks() -> tuple[str, ...]:
    """The names of all checks, in the order in which they run.

    >>> checks()[:4]
    ('value', 'printing', 'rewriting', 'init')
    """
    return tuple(CHECKS)


def check_layer(
    layer: Layer,
    signature: Any,
    *,
    positions: tuple[int | None, ...] | None = None,
    positions_out: int = 1,
    vocab_size: int | None = None,
    draws: bool | None = None,
    tolerance: float = 1e-5,
    skip: Collection[str] = (),
) -> None:
    """Checks that a layer keeps what every layer promises. See `checks` for what that is.

    Inputs are made up: floats from a normal distribution, ids below `vocab_size`, masks with at
    least one True in each row. It takes a second or so, most of it compiling.

    Args:
      layer: any layer.
      signature: of its inputs: a `shape_dtype`, or a tuple of them. Small ones are quick; with
        positions there should be four or so.
      positions: the axis of positions in each input; None for an input that is given whole at every
        step of decoding. By default axis 1 of inputs with two axes or more. ``()`` says that there
        are no positions; the layer is then not decoded.
      positions_out: the axis of positions in the outputs.
      vocab_size: integers among the inputs are below it. By default the smallest `vocab_size` of
        the layer and of those inside it, else 2.
      draws: whether training must draw from the key (True) or must not (False); None allows both.
      tolerance: relative and absolute, for comparing float32 results.
      skip: names of checks to leave out.

    Raises:
      LayerCheckError: for the first promise that is broken: what came, what was expected, and the
        likely fix. Later checks are not run, since what breaks one promise often breaks others.
      TypeError: if `layer` is no layer, or takes another number of inputs.
      ValueError: if `positions` does not fit the inputs, or `skip` names no check.
    """
    every = layer_checks(
        layer,
        signature,
        positions=positions,
        positions_out=positions_out,
        vocab_size=vocab_size,
        draws=draws,
        tolerance=tolerance,
        skip=skip,
    )
    for _, check in every:
        check()


def layer_checks(
    layer: Layer,
    signature: Any,
    *,
    positions: tuple[int | None, ...] | None = None,
    positions_out: int = 1,
    vocab_size: int | None = None,
    draws: bool | None = None,
    tolerance: float = 1e-5,
    skip: Collection[str] = (),
) -> Iterator[tuple[str, Callable[[], None]]]:
    """The checks of `check_layer` one by one, for a test of each.

    They share their computations, which run when a check first needs them. With pytest::

        CHECKS = dict(lc.testing.layer_checks(Scale(2.0), lc.shape_dtype((2, 4, 8))))

        @pytest.mark.parametrize('name', CHECKS)
        def test_scale_keeps_what_layers_promise(name):
            CHECKS[name]()

    Args:
      layer, signature, positions, positions_out, vocab_size, draws, tolerance, skip: as those
        of `check_layer`.

    Yields:
      The name of a check, and a function without arguments that raises a `LayerCheckError` if the
      layer breaks its promise.

    Raises:
      TypeError, ValueError: as `check_layer` does.
    """
    if not isinstance(layer, Layer):
        made = f'{layer.__name__}(…)' if isinstance(layer, type) else 'an instance of lc.Layer'
        raise TypeError(f'check_layer takes a layer, got {layer!r}: give {made}')
    unknown = sorted(set(skip) - set(CHECKS))
    if unknown:
        raise ValueError(f'skip: there is no check {unknown[0]!r}: choose of {", ".join(CHECKS)}')
    trial = Trial(layer, signature, positions, positions_out, vocab_size, draws, tolerance)
    return (
        (name, functools.partial(check, name, trial))
        for name, check in CHECKS.items()
        if name not in skip
    )
