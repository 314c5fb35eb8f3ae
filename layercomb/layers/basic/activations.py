"""Activations as layers, and by name: ``activation('gelu')``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from layercomb.checks import Positive
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import snake_case
from layercomb.shapes import check_float
from layercomb.trees import Tree


def by_slope(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function whose gradient is f'(x) times the cotangent.

    Then f'(x) is all that training keeps; else it keeps up to five arrays of intermediate results.

    Args:
      f: an elementwise function.
    """

    @jax.custom_jvp
    def wrapped(x: jax.Array) -> jax.Array:
        return f(x)

    @wrapped.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        (x,), (d_x,) = primals, tangents
        y, slope = jax.jvp(f, (x,), (jnp.ones_like(x),))
        return y, slope * d_x

    return wrapped


class Activation(Layer):
    """An elementwise function without weights: (…) → (…).

    A subclass sets `function`, and ``position_wise = True``.

    Attributes:
      function: an array to an array of the same shape and dtype.
    """

    computes_in = ('apply', 'function')
    function: ClassVar[Any]

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """`function` of the one input, (…) → (…)."""
        (x,) = inputs
        return (type(self).function(x),), state


class Relu(Activation):
    """max(x, 0)."""

    position_wise = True
    function = staticmethod(jax.nn.relu)


class Relu2(Activation):
    """max(x, 0)². So et al., Primer, 2021, https://arxiv.org/abs/2109.08668."""

    position_wise = True
    function = staticmethod(lambda x: jnp.square(jax.nn.relu(x)))


class Gelu(Activation):
    """x Φ(x), by its tanh approximation. Hendrycks & Gimpel 2016."""

    position_wise = True
    function = staticmethod(by_slope(jax.nn.gelu))


class ExactGelu(Activation):
    """x Φ(x), exactly, by erf."""

    position_wise = True
    function = staticmethod(by_slope(lambda x: jax.nn.gelu(x, approximate=False)))


class Silu(Activation):
    """x σ(x), also called swish."""

    position_wise = True
    function = staticmethod(by_slope(jax.nn.silu))


class Tanh(Activation):
    """tanh(x)."""

    position_wise = True
    function = staticmethod(jnp.tanh)


class Sigmoid(Activation):
    """1 / (1 + e⁻ˣ)."""

    position_wise = True
    function = staticmethod(jax.nn.sigmoid)


class HardSigmoid(Activation):
    """min(max(x + 3, 0), 6) / 6."""

    position_wise = True
    function = staticmethod(jax.nn.hard_sigmoid)


class Elu(Activation):
    """x where positive, eˣ − 1 elsewhere."""

    position_wise = True
    function = staticmethod(jax.nn.elu)


class LeakyRelu(Activation):
    """x where positive, a x elsewhere.

    Attributes:
      a: the slope below 0; always 0.01 where an activation is chosen by name, as in `SparseFF`.
    """

    a: float = 0.01

    position_wise = True
    function = staticmethod(jax.nn.leaky_relu)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """x where positive, a x elsewhere: (…) → (…)."""
        (x,) = inputs
        return (jax.nn.leaky_relu(x, self.a),), state


class Softplus(Activation):
    """log(1 + eˣ)."""

    position_wise = True
    function = staticmethod(jax.nn.softplus)


_CURE = 'convert scores or counts, x.astype(np.float32)'


def _softmax(x: jax.Array) -> jax.Array:
    check_float('Softmax', x, _CURE)  # integers between 0 and 1 are all 0
    return jax.nn.softmax(x.astype(jnp.float32)).astype(x.dtype)


def _log_softmax(x: jax.Array) -> jax.Array:
    check_float('LogSoftmax', x, _CURE)
    return jax.nn.log_softmax(x.astype(jnp.float32)).astype(x.dtype)


class Softmax(Activation):
    """exp(x) / Σ exp(x) over the last axis, computed in float32: (…, D) → (…, D) in x's dtype.

    Raises:
      TypeError: when applied to integers.
    """

    position_wise = True
    float32 = True
    function = staticmethod(_softmax)


class LogSoftmax(Activation):
    """x − log Σ exp(x) over the last axis, computed in float32: (…, D) → (…, D) in x's dtype.

    Raises:
      TypeError: when applied to integers.
    """

    position_wise = True
    float32 = True
    function = staticmethod(_log_softmax)


class SoftCap(Layer):
    """limit · tanh(x / limit), which lies between −limit and limit: (…) → (…) in x's dtype.

    Attributes:
      limit: above 0.

    Raises:
      TypeError: when applied to integers.

    References:
      Gemma Team 2024, https://arxiv.org/abs/2408.00118
    """

    limit: Positive

    position_wise = True
    float32 = True

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """limit · tanh(x / limit), computed in float32: (…) → (…)."""
        (x,) = inputs
        check_float('SoftCap', x, _CURE)
        h = x.astype(jnp.float32)
        return ((self.limit * jnp.tanh(h / self.limit)).astype(x.dtype),), state


NAMES: dict[str, type[Activation]] = {
    snake_case(c.__name__): c for c in Activation.__subclasses__()
}


def elementwise(owner: str, name: str) -> Any:
    """The function of an elementwise activation, by its name.

    Args:
      owner: what messages begin with.
      name: such as 'relu'.

    Raises:
      ValueError: for an unknown name, or for a function over an axis, such as softmax.
    """
    layer: Any = activation(name)
    if isinstance(layer, (Softmax, LogSoftmax)):
        raise ValueError(
            f'{owner}: activation={name!r} mixes the units, of which some do not work: give an '
            "elementwise one, such as 'relu' or 'gelu'"
        )
    return type(layer).function


def activation(which: str | Layer) -> Layer:
    """An activation layer by name, for models and configurations.

    Args:
      which: a name such as 'relu' or 'gelu', or a layer, which is returned as it is.

    Raises:
      ValueError: for an unknown name, listing the known.

    >>> activation('leaky_relu')
    LeakyRelu()
    """
    if isinstance(which, Layer):
        return which
    if not isinstance(which, str) or which not in NAMES:
        raise ValueError(f'no activation {which!r}: there are {", ".join(sorted(NAMES))}')
    return NAMES[which]()
