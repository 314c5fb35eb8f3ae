"""A layer is a value: `Layer`, two pure functions and what describes them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, TypeVar, dataclass_transform

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
from layercomb.layers.core.cotangents import Cotangents, matched, vjp
from layercomb.layers.core.counted import COUNTED
from layercomb.layers.core.decisions import DECISIONS
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.printing import call_text, set_field, show
from layercomb.shapes import Signature, signature_of
from layercomb.trees import Tree

Arrays = tuple[jax.Array, ...]


L = TypeVar('L', bound='Layer')


AUX_LOSS = 'aux_loss'


POSITION = 'position'


POSITION_AXES = (1, -2)  # the axis of positions in (B, L, D)


RESERVED = (COUNTED, DECISIONS, AUX_LOSS)  # what a state may hold beside the states of sublayers


@dataclass_transform(frozen_default=True, kw_only_default=False)
@dataclasses.dataclass(frozen=True, repr=False)
class Layer:
    """An immutable, hashable, array-free description of a function with weights and state.

    A subclass is made a frozen dataclass by being one: annotate its fields, write `init` where it
    has weights or state, and `apply`. Fields are checked against their annotations and lists
    become tuples. Two equal descriptions are interchangeable; nothing is ever stored on one.

    >>> class Scale(Layer):
    ...     factor: float = 1.0
    ...
    ...     def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
    ...         (x,) = inputs
    ...         return (self.factor * x,), state
    >>> Scale(2.0), Scale(2.0) == Scale(2.0), Scale(2.0).n_in
    (Scale(2.0), True, 1)

    Attributes:
      name: the key of its weights in the combinator around it; None takes the class's name.
      n_in: how many values it takes off the stack.
      n_out: how many it puts back.
      float32: whether `transforms.cast` leaves it in float32 (norms, losses, sums of streams).
      diagonal: whether the one output is the one input times numbers that depend on the key alone,
        as in dropout, so that cotangents go the same way; such a layer has no weights and no state.
      headwise: whether, given some of the heads of (B, H, …), it does for each what it does among
        all, so that attention may go a head at a time; with weights it has a `by_head`, and what it
        draws comes from a key for every head.
      recomputes: whether its gradient computes the layer again, so that to keep what is inside
        would be in vain.
      matrices: the paths of weights that `transforms.quantize` may make narrow, each with its axes
        in letters, as `narrow` explains.
      mixes_positions: whether an output position depends on other positions, so that `Chunk` must
        not cut it.
      counts_positions: whether it averages over positions in training, so that its state is told
        which of them count: see `counted_positions`.
      carries_counted: whether it hands on to its layers what their states are told so: as it is, or
        by `take_counted` and `put_counted` where it loops over states or cuts positions.
    """

    name: str | None = dataclasses.field(default=None, kw_only=True)

    # Without annotations, so that a subclass may make fields of them, in its own order.
    n_in = 1
    n_out = 1
    mixes_positions = False
    diagonal = False
    recomputes = False
    headwise = False
    float32: ClassVar[bool] = False
    counts_positions: ClassVar[bool] = False
    carries_counted: ClassVar[bool] = False
    matrices: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls, *, init: bool = True, **kwargs: Any) -> None:
        """Makes the class a frozen dataclass; ``init=False`` leaves the constructor it has.

        Its `init` and `apply` check what they are given, whoever calls them.
        """
        super().__init_subclass__(**kwargs)
        for name, checks in (('init', checking_init), ('apply', checking_apply)):
            if name in vars(cls):
                setattr(cls, name, checks(vars(cls)[name]))
        dataclasses.dataclass(frozen=True, repr=False, init=init)(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            set_field(self, field.name, frozen(getattr(self, field.name)))
        check_fields(self)
        if self.name is not None and ('/' in self.name or self.name in (*RESERVED, '')):
            raise ValueError(
                f'{type(self).__name__}: a layer cannot be named {self.name!r}: names have no "/", '
                f'and {RESERVED[0]!r}, {RESERVED[1]!r} and {RESERVED[2]!r} are reserved'
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
          Two nested dicts of arrays, empty where there is nothing.

        Raises:
          TypeError: if the signatures are not `n_in`, or `mode` is no `Mode`.
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
        """The function itself: pure, from weights, state and inputs to outputs and new state.

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

    def apply_and_grad(
        self,
        weights: Tree,
        state: Tree,
        inputs: Arrays,
        cts: Cotangents,
        *,
        rng: jax.Array | None = None,
        mode: Mode = Mode.TRAIN,
        state_cts: Tree | None = None,
    ) -> tuple[Arrays, Cotangents, Tree]:
        """Outputs and gradients in one pass, for a caller who knows the outputs' cotangents.

        By default `vjp` of `apply`. A layer that works piece by piece overrides it, so that no
        piece is computed a third time.

        Args:
          weights, state, inputs, rng, mode: as of `apply`; `state` is taken as constant.
          cts: of the outputs; they may be wider than these, and are None for integers.
          state_cts: of the new state (its auxiliary losses), by path; what is absent is zero.

        Returns:
          Outputs, cotangents of inputs, cotangents of weights: None for what is no float.
        """

        def run(weights: Tree, inputs: Arrays) -> tuple[Arrays, Tree]:
            return self.apply(weights, state, inputs, rng=rng, mode=mode)

        (outputs, new), pull = vjp(run, weights, tuple(inputs))
        d_weights, d_inputs = pull((tuple(cts), matched(state_cts, new)))
        return outputs, d_inputs, d_weights

    def output_signature(self, signature: Any, mode: Mode = Mode.TRAIN) -> Signature:
        """The signature of the outputs, for inputs of `signature`; nothing is computed.

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
    def sublayers(self) -> tuple[Layer, ...]:
        """The layers that this one holds."""
        return ()

    def with_sublayers(self: L, sublayers: tuple[Layer, ...]) -> L:
        """The same layer around other sublayers, as many as there are."""
        check_sublayers(self, sublayers)
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
        """Outputs' signature, weights and state in one pass, so that nesting costs nothing."""
        check_inputs(self, signature)
        weights, state = self.init(signature, rng, mode)
        if mode is Mode.REPLAY:  # shapes alone are asked for, and there is nothing to replay yet
            mode = Mode.TRAIN

        def outputs(weights: Tree, state: Tree, inputs: Arrays, rng: jax.Array) -> Arrays:
            made = self.apply(weights, state, inputs, rng=rng, mode=mode)[0]
            return check_outputs(self, made)

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

    def __repr__(self) -> str:
        parts, positional = [], True
        name, *own = dataclasses.fields(self)
        for field in (*own, name):
            value = getattr(self, field.name)
            if self._shows(field, value):
                bare = positional and not field.kw_only
                parts.append(show(value) if bare else f'{field.name}={show(value)}')
            positional = positional and field.default is dataclasses.MISSING
        return call_text(type(self).__name__, parts)

    def _shows(self, field: dataclasses.Field[Any], value: Any) -> bool:
        """A field is worth showing if leaving it out would make another layer."""
        if field.default is dataclasses.MISSING:
            return True
        if value == field.default:
            return False
        if field.name == 'name':
            return True
        try:
            return self.replace(**{field.name: field.default}) != self
        except (TypeError, ValueError):  # the default does not go with the other fields
            return True


def init_state(layer: Layer, signature: Any, mode: Mode = Mode.PREDICT) -> Tree:
    """A fresh state alone: `init` under `jit`, its unused weights never computed.

    Args:
      layer: any layer.
      signature: of its inputs, or example inputs. In ``PREDICT`` caches are as long as it.
      mode: what the state is for.
    """
    return _state(layer, signature_of(signature), mode)


def fold(rng: jax.Array | None, i: Any) -> jax.Array | None:
    """The key of the i-th sublayer; no key where there is none."""
    return None if rng is None else jax.random.fold_in(rng, i)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _state(layer: Layer, signature: Signature, mode: Mode) -> Tree:
    return layer.init(signature, jax.random.key(0), mode)[1]
