"""A layer is a value: `Layer`, two pure functions and what describes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from layercomb.checks import check_fields, frozen
from layercomb.layers.core.checks import (
    check_inputs,
    check_outputs,
    check_sublayers,
    checking_apply,
    checking_init,
)
from layercomb.layers.core.hashed import KeepsHash, frozen_dataclass
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import code_of, set_field
from layercomb.layers.facts.axes import check_declared
from layercomb.layers.facts.declared import Declares
from layercomb.layers.facts.positionwise import forget_if_overridden
from layercomb.shapes import Signature, signature_of
from layercomb.trees import Tree

Arrays = tuple[jax.Array, ...]
Key = jax.Array | None  # a typed key of random numbers, where something may be drawn
L = TypeVar('L', bound='Layer')


POSITION_AXES = (1, -2)  # the axis of positions in (B, L, D)


@dataclass_transform(frozen_default=True, kw_only_default=False)
@dataclasses.dataclass(frozen=True, repr=False)
class Layer(KeepsHash, Declares):
    """An immutable, hashable, array-free description of a function with weights and state.

    A subclass becomes a frozen dataclass without a decorator. Annotate its fields, and write
    `apply`, and `init` if it has weights or state. Fields are checked against their annotations,
    and lists become tuples. A layer stores nothing, so equal layers are interchangeable.

    >>> class Scale(Layer):
    ...     factor: float = 1.0
    ...     position_wise = True
    ...
    ...     def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
    ...         (x,) = inputs
    ...         return (self.factor * x,), state
    >>> Scale(2.0), Scale(2.0) == Scale(2.0), Scale(2.0).n_in
    (Scale(2.0), True, 1)

    Attributes:
      name: the key of its weights in the combinator around it; None takes the class's name.
      n_in: how many values it takes off the stack.
      n_out: how many values it puts back.

    `Declares` lists what else a class may declare: `position_wise`, `weight_axes`, `float32` …
    """

    name: str | None = dataclasses.field(default=None, kw_only=True)

    # Without annotations, so that a subclass may make fields of them, in its own order.
    n_in = 1
    n_out = 1

    def __init_subclass__(cls, *, init: bool = True, **kwargs: Any) -> None:
        """Makes the class a frozen dataclass; ``init=False`` leaves the constructor it has.

        Its `init` and `apply` check what they are given, whoever calls them.
        """
        super().__init_subclass__(**kwargs)
        check_declared(cls.__name__, cls.weight_axes)
        for name, checks in (('init', checking_init), ('apply', checking_apply)):
            if name in vars(cls):
                setattr(cls, name, checks(vars(cls)[name]))
        forget_if_overridden(cls)
        frozen_dataclass(cls, init)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            set_field(self, field.name, frozen(getattr(self, field.name)))
        check_fields(self)
        if self.name is not None and ('/' in self.name or not self.name):
            raise ValueError(
                f'{type(self).__name__}: a layer cannot be named {self.name!r}: names have no "/" '
                'and are not empty'
            )

    @checking_init
    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """Initial weights and state.

        Args:
          signature: of the inputs, a tuple of `jax.ShapeDtypeStruct`, or one alone, which becomes
            a tuple of one before a subclass's `init` sees it.
          rng: a typed key, from `jax.random.key`.
          mode: weights do not depend on it; state may: in ``PREDICT`` it holds caches as long as
            the signature.

        Returns:
          Weights and state: nested dicts of arrays, ``{}`` if there are none. Parts of a state are
          known by their types: an auxiliary loss is an `AuxLoss`; in ``PREDICT`` the position of
          each row is a `Position`.

        Raises:
          TypeError: if there are not `n_in` signatures, or `mode` is no `Mode`.
        """
        del signature, rng, mode
        return {}, {}

    def apply(
        self,
        weights: Tree,
        state: Tree,
        inputs: Arrays,
        *,
        rng: jax.Array | None = None,
        mode: Mode = Mode.EVAL,
    ) -> tuple[Arrays, Tree]:
        """The function itself, pure: weights, state and inputs to outputs and new state.

        Args:
          weights: as `init` gives them.
          state: as `init` or an earlier `apply` gives it.
          inputs: a tuple of `n_in` arrays.
          rng: a typed key; only layers that draw (dropout) need one, and only in training.
          mode: see `Mode`.

        Returns:
          A tuple of `n_out` arrays, and the new state.

        Raises:
          TypeError: if the inputs are no tuple of `n_in` values, or `mode` is no `Mode`.
        """
        raise NotImplementedError(f'{type(self).__name__} has no apply')

    def output_signature(self, signature: Any, mode: Mode = Mode.TRAIN) -> Signature:
        """The signature of the outputs; nothing is computed.

        Args:
          signature: of the inputs, or example inputs: one, or a tuple of `n_in`.
          mode: see `Mode`.

        Returns:
          A tuple of `n_out` `jax.ShapeDtypeStruct`.

        >>> from layercomb import tl, shape_dtype
        >>> tl.Dense(3).output_signature(shape_dtype((2, 5)))
        (ShapeDtypeStruct(shape=(2, 3), dtype=float32),)
        """
        signature = signature_of(signature)

        def outputs(rng: jax.Array) -> Arrays:
            made, _, _ = self.init_with_outputs(signature, rng, mode)
            return tuple(jnp.zeros(s.shape, s.dtype) for s in made)

        return jax.eval_shape(outputs, jax.eval_shape(jax.random.key, 0))

    @property
    def _class_name(self) -> str:
        """What a layer without a name is called after."""
        return type(self).__name__

    @property
    def children(self) -> tuple[tuple[str, Layer], ...]:
        """The layers inside, each as (key, layer); keys make up the paths of weights.

        A key of '' adds no level to the path. `walk`, and all code that looks into layers, uses
        this. A class of one's own that holds layers, and is no combinator or wrapper, overrides
        `children`, or `sublayers`, whose keys are all ''.
        """
        own = type(self).sublayers is not Layer.sublayers
        return tuple(('', layer) for layer in self.sublayers) if own else ()

    @property
    def sublayers(self) -> tuple[Layer, ...]:
        """The layers inside, without their keys."""
        return tuple(layer for _, layer in self.children)

    def with_sublayers(self: L, sublayers: tuple[Layer, ...]) -> L:
        """The same layer around other sublayers, as many as there are.

        A class that says `sublayers` says this too, or `transforms.rewrite` could not change them.

        Args:
          sublayers: the layers to hold, in the order of `sublayers`.

        Raises:
          ValueError: if there are more or fewer than `sublayers`.
          TypeError: if they are others than `sublayers`, and the class has no `with_sublayers`.
        """
        check_sublayers(self, sublayers)
        if tuple(sublayers) != self.sublayers:
            raise TypeError(
                f'{type(self).__name__} holds layers and cannot be given others: write '
                'with_sublayers(self, sublayers), or make it a Combinator or a Wrapper'
            )
        return self

    def replace(self: L, **changes: Any) -> L:
        """The same layer with other values in some fields.

        >>> from layercomb import tl
        >>> tl.Dense(4).replace(name='head')
        Dense(4, name='head')
        """
        return dataclasses.replace(self, **changes)

    def init_with_outputs(
        self, signature: Signature, rng: jax.Array, mode: Mode
    ) -> tuple[Signature, Tree, Tree]:
        """Outputs' signature, weights and state in one pass, so that nested layers are traced once.

        Args:
          signature: of the inputs, a tuple of `n_in`.
          rng: a typed key.
          mode: see `Mode`.

        Raises:
          TypeError: if there are not `n_in` inputs or `n_out` outputs.
        """
        check_inputs(self, signature)
        weights, state = self.init(signature, rng, mode)
        # Shapes alone are asked for, and there is nothing to replay yet.
        outputs = outputs_of(self, Mode.TRAIN if mode is Mode.REPLAY else mode)
        return jax.eval_shape(outputs, weights, state, signature, rng), weights, state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a description holds no weights.

        Raises:
          TypeError: always, naming the fix.
        """
        raise TypeError(
            f'{type(self).__name__} is a description and holds no weights: bind it first, '
            'lc.Model(layer).init(x)(x), or call layer.apply(weights, state, (x,))'
        )

    __repr__ = code_of


@functools.lru_cache(maxsize=1024)
def outputs_of(layer: Layer, mode: Mode) -> Callable[..., Arrays]:
    """`apply` without the state; equal layers share one function, which JAX traces once.

    What was traced is kept, some megabytes for a large model, until `outputs_of.cache_clear()`.
    """

    def outputs(weights: Tree, state: Tree, inputs: Arrays, rng: Key) -> Arrays:
        return check_outputs(layer, layer.apply(weights, state, inputs, rng=rng, mode=mode)[0])

    return outputs


def is_layers(value: Any) -> bool:
    """Whether a field's value is a layer, or a tuple of layers that is not empty."""
    many = isinstance(value, tuple) and bool(value) and all(isinstance(v, Layer) for v in value)
    return many or isinstance(value, Layer)


def init_state(layer: Layer, signature: Any, mode: Mode = Mode.PREDICT) -> Tree:
    """A fresh state alone: `init` under `jit`, which leaves the unused weights out.

    Args:
      layer: any layer.
      signature: of its inputs, or example inputs. In ``PREDICT`` caches are as long as these.
      mode: what the state is for.
    """
    return _state(layer, signature_of(signature), mode)


def fold(rng: jax.Array | None, i: Any) -> jax.Array | None:
    """The key of the i-th sublayer, `rng` folded with `i`; None if `rng` is None."""
    return None if rng is None else jax.random.fold_in(rng, i)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _state(layer: Layer, signature: Signature, mode: Mode) -> Tree:
    return layer.init(signature, jax.random.key(0), mode)[1]
