"""Initializers: frozen, comparable values that make a weight from a key and a shape.

They are fields of layers, so layers with equal initializers can be equal. Fans are the sizes of the
last two axes times those of all axes before them, as in `jax.nn.initializers`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A function that makes a weight: ``initializer(key, shape, dtype) -> array``.

    Subclasses are frozen dataclasses, and write `__call__`.
    """

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        """A fresh weight.

        Args:
          key: a typed key.
          shape: of the weight.
          dtype: of the weight.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Constant(Initializer):
    """Every entry is `value`."""

    value: float = 0.0

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        """See `Initializer`."""
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Normal(Initializer):
    """N(0, stddev²): a normal distribution."""

    stddev: float = 0.02

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        """See `Initializer`."""
        return self.stddev * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform(Initializer):
    """U(−limit, limit): a uniform distribution."""

    limit: float = 0.05

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        """See `Initializer`."""
        return jax.random.uniform(key, shape, dtype, -self.limit, self.limit)


@dataclasses.dataclass(frozen=True)
class VarianceScaling(Initializer):
    """Random entries of variance scale / fan, as Glorot, He and LeCun initialization have them.

    Attributes:
      scale: the numerator.
      fan: 'in', 'out', or 'avg' for the mean of both.
      distribution: 'normal', 'truncated_normal' or 'uniform'.

    Raises:
      ValueError: for another fan or distribution.

    References:
      Glorot & Bengio 2010; He et al. 2015, https://arxiv.org/abs/1502.01852
    """

    scale: float = 1.0
    fan: str = 'in'
    distribution: str = 'truncated_normal'

    def __post_init__(self) -> None:
        if self.fan not in ('in', 'out', 'avg'):
            raise ValueError(f"VarianceScaling: fan is 'in', 'out' or 'avg', got {self.fan!r}")
        if self.distribution not in ('normal', 'truncated_normal', 'uniform'):
            raise ValueError(
                "VarianceScaling: distribution is 'normal', 'truncated_normal' or 'uniform', got "
                f'{self.distribution!r}'
            )

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        """See `Initializer`."""
        how: Any = (self.scale, f'fan_{self.fan}', self.distribution)
        return jax.nn.initializers.variance_scaling(*how)(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Orthogonal(Initializer):
    """A random matrix with orthonormal rows or columns, whichever are fewer, times `scale`."""

    scale: float = 1.0

    def __call__(self, key: jax.Array, shape: Shape, dtype: Any = jnp.float32) -> jax.Array:
        """See `Initializer`."""
        return jax.nn.initializers.orthogonal(self.scale)(key, shape, dtype)


def zeros() -> Constant:
    """All 0."""
    return Constant(0.0)


def ones() -> Constant:
    """All 1."""
    return Constant(1.0)


def glorot_uniform() -> VarianceScaling:
    """Variance 2 / (fan in + fan out), uniform: the default of `Dense`."""
    return VarianceScaling(1.0, 'avg', 'uniform')


def he_normal() -> VarianceScaling:
    """Variance 2 / fan in, for layers before a ReLU."""
    return VarianceScaling(2.0, 'in', 'truncated_normal')


def lecun_normal() -> VarianceScaling:
    """Variance 1 / fan in: keeps the scale of activations."""
    return VarianceScaling(1.0, 'in', 'truncated_normal')
