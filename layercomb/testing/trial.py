"""A trial of a layer: its results for one signature, computed once for all checks."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.core.checks import check_inputs
from layercomb.layers.core.layer import Arrays, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import vjp
from layercomb.shapes import Signature, is_float, signature_of
from layercomb.testing import declared
from layercomb.testing.comparing import difference
from layercomb.transforms import Cast, cast
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True)
class Traced:
    """One `apply` seen without values.

    Attributes:
      program: its jaxpr as text, and the constants in it.
      kind: the types of what came back: of the whole, of the outputs, of the state.
      outputs: their signature.
      state: shapes and dtypes.
      changed: what `apply` changed in place, in words; empty if nothing.
    """

    program: tuple[str, tuple[Any, ...]]
    kind: tuple[type, ...]
    outputs: tuple[Any, ...]
    state: Any
    changed: str

    def same_program(self, other: Traced) -> bool:
        """Whether both compute the same, by the text and the constants of their programs."""
        (text, consts), (text_2, consts_2) = self.program, other.program
        return text == text_2 and all(map(_same, consts, consts_2))


class Trial:
    """A layer with example inputs, and its results, computed when they are first needed.

    Args:
      layer: the layer.
      signature: of its inputs.
      positions: the axis of positions in each input, None for one that is given whole at every
        step; empty for a layer that does not decode.
      positions_out: the axis of positions in the outputs.
      vocab_size: integers among the inputs are below it.
      must_draw: whether training must draw from the key or must not; None if both are right.
      tolerance: relative and absolute, of float32.
    """

    def __init__(
        self,
        layer: Layer,
        signature: Any,
        positions: tuple[int | None, ...] | None,
        positions_out: int,
        vocab_size: int | None,
        must_draw: bool | None,
        tolerance: float,
    ):
        self.layer, self.signature = layer, signature_of(signature)
        check_inputs(layer, self.signature)
        self.positions = _positions(positions, self.signature)
        self.positions_out, self.must_draw, self.tolerance = positions_out, must_draw, tolerance
        self.key_error: Exception | None = None  # a key that was used twice
        self._inits: dict[Mode, Any] = {}
        self._results: dict[int, dict[str, Any]] = {}
        self.inputs = example_inputs(self.signature, vocab_size or _vocab_size(layer) or 2)

    @property
    def length(self) -> int:
        """How many positions there are; 0 for a layer that does not decode."""
        found = zip(self.signature, self.positions, strict=False)
        return next((x.shape[axis] for x, axis in found if axis is not None), 0)

    def piece(self, values: Any, begin: int, end: int) -> Arrays:
        """A slice of the inputs along the positions.

        Args:
          values: the inputs.
          begin, end: the first position, and the one after the last.
        """
        return tuple(
            x if axis is None else jax.lax.slice_in_dim(x, begin, end, axis=axis)
            for x, axis in zip(values, self.positions, strict=True)
        )

    def abstract_init(self, mode: Mode = Mode.TRAIN) -> Any:
        """What `init` returns, as shapes and dtypes."""
        if mode not in self._inits:
            init = functools.partial(self.layer.init, self.signature, mode=mode)
            self._inits[mode] = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
        return self._inits[mode]

    @functools.cached_property
    def training(self) -> Traced:
        """`apply` in TRAIN."""
        return self.trace(Mode.TRAIN)

    @functools.cached_property
    def evaluation(self) -> Traced:
        """`apply` in EVAL."""
        return self.trace(Mode.EVAL)

    @functools.cached_property
    def trains_as_it_evaluates(self) -> bool:
        """Whether TRAIN and EVAL are one program."""
        return self.training.same_program(self.evaluation)

    def trace(self, mode: Mode) -> Traced:
        """`apply` in a mode, with a key."""
        weights, state = self.abstract_init()
        found: list[Any] = []

        def run(*given: Any) -> Any:
            weights, state, inputs, rng = given
            before = _containers(weights), _containers(state), _stored(self.layer)
            made = self.layer.apply(weights, state, inputs, rng=rng, mode=mode)
            after = _containers(weights), _containers(state), _stored(self.layer)
            found[:] = [_kind(made), _changes(before, after)]
            return made

        key = jax.eval_shape(jax.random.key, 0)
        program, made = jax.make_jaxpr(run, return_shape=True)(weights, state, self.signature, key)
        kind, changed = found
        pair = made if len(kind) > 1 else (made, {})
        outputs = pair[0] if isinstance(pair[0], (tuple, list)) else (pair[0],)
        return Traced((str(program), tuple(program.consts)), kind, tuple(outputs), pair[1], changed)

    def get(self, part: str, apply_key: int = 1) -> Any:
        """What a part of the trial gives (see `PARTS`) with a key, or the error that it raised."""
        found = self.results(apply_key)[part]
        if isinstance(found, Exception):
            raise found
        return found

    @functools.cached_property
    def parts(self) -> dict[str, Callable[..., Any]]:
        """The parts that say something about this layer."""
        left_out = {
            'evaluated': self.trains_as_it_evaluates,
            'one_pass': not declared.has_own_one_pass(self.layer),
            'cut': not (self.may_be_cut and declared.says_position_wise(self.layer)),
            'decoded': not self.length,
        }
        return {name: part for name, part in PARTS.items() if not left_out.get(name)}

    @property
    def may_be_cut(self) -> bool:
        """Whether every input has positions, more than one."""
        return self.length > 1 and None not in self.positions

    @functools.cached_property
    def draws(self) -> bool:
        """Whether outputs of training depend on the key."""
        return bool(difference(self.get('trained', 2)[0], self.get('trained')[0], 0))

    def outputs(self, mode: Mode, apply_key: int = 1) -> tuple[Arrays, Tree]:
        """Outputs and state in TRAIN or EVAL, compiled."""
        same = mode is Mode.TRAIN or self.trains_as_it_evaluates
        made = self.get('trained' if same else 'evaluated', apply_key)
        return made[0], made[1]

    def results(self, apply_key: int) -> dict[str, Any]:
        """The results of all parts, compiled as one program; an error in the place of a broken one.

        Args:
          apply_key: the seed of the key that `apply` gets.
        """
        if apply_key not in self._results:
            self._results[apply_key] = self._computed(apply_key)
        return self._results[apply_key]

    def _computed(self, apply_key: int) -> dict[str, Any]:
        try:
            with jax.debug_key_reuse(True):
                return dict(self._run(tuple(self.parts), self.inputs, *keys(apply_key)))
        except jax.errors.KeyReuseError as error:
            self.key_error = error
        except Exception:
            pass  # something is broken: find out what, part by part
        return {part: self._alone(part, apply_key) for part in self.parts}

    def _alone(self, part: str, apply_key: int) -> Any:
        try:
            with jax.debug_key_reuse(False):
                return self._run((part,), self.inputs, *keys(apply_key))[part]
        except Exception as error:
            return error

    @functools.cached_property
    def _run(self) -> Callable[..., dict[str, Any]]:
        return jax.jit(functools.partial(_all_parts, self), static_argnums=0)


def keys(apply: int = 1) -> tuple[jax.Array, jax.Array]:
    """A key for `init` and one for `apply`, fresh ones each time: to use one twice is an error."""
    return jax.random.key(0), jax.random.key(apply)


def example_inputs(signature: Signature, vocab_size: int = 2) -> Arrays:
    """Arrays of a signature: normal floats, ids below `vocab_size`, masks with both values.

    Every row of a mask, along its last axis, has at least one True.
    """
    made = np.random.default_rng(0)

    def one(x: Any) -> jax.Array:
        if x.dtype == bool:
            mask = np.asarray(made.random(x.shape) < 0.7)
            if x.shape and x.shape[-1] > 1:
                mask[(0,) * (mask.ndim - 1) + (-1,)] = False
            mask[(..., 0) if x.shape else ...] = True
            return jnp.asarray(mask)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.asarray(made.integers(0, vocab_size, x.shape), x.dtype)
        return jnp.asarray(made.normal(size=x.shape), x.dtype)

    return tuple(map(one, signature))


def cotangents(outputs: Any) -> Any:
    """A cotangent for each floating-point output, no two numbers alike; None for the rest."""

    def one(y: Any) -> Any:
        return jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)

    return tuple(one(y) if is_float(y) else None for y in outputs)


def narrowed(inputs: Any) -> Any:
    """Floats as bfloat16, arrays or signatures."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
        return x.astype(jnp.bfloat16)

    return tuple(one(x) if is_float(x) else x for x in inputs)


def narrow_layer(layer: Layer) -> Layer:
    """The layer computed in bfloat16, or in what it says itself."""
    return layer if isinstance(layer, Cast) else cast(layer)


def _all_parts(
    trial: Trial, names: tuple[str, ...], inputs: Any, init_key: Any, key: Any
) -> dict[str, Any]:
    weights, state = trial.layer.init(trial.signature, init_key)
    return {
        name: PARTS[name](trial, weights, state, inputs, jax.random.clone(key)) for name in names
    }


def _initial(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    return weights, state


def _trained(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    """Outputs, new state, gradients of inputs (if they are compared) and of weights."""
    compared = 'one_pass' in trial.parts

    def run(weights: Tree, inputs: Any) -> Any:
        return trial.layer.apply(weights, state, inputs, rng=rng, mode=Mode.TRAIN)

    if compared:
        (outputs, new), pull = vjp(run, weights, inputs)
        d_weights, d_inputs = pull((cotangents(outputs), jax.tree.map(lambda x: None, new)))
        return outputs, new, d_inputs, d_weights
    (outputs, new), pull = vjp(lambda weights: run(weights, inputs), weights)
    (d_weights,) = pull((cotangents(outputs), jax.tree.map(lambda x: None, new)))
    return outputs, new, (), d_weights


def _evaluated(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    return trial.layer.apply(weights, state, inputs, rng=rng, mode=Mode.EVAL)


def _narrow(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    narrow = narrow_layer(trial.layer)
    return narrow.apply(weights, state, narrowed(inputs), rng=rng, mode=Mode.TRAIN)


def _one_pass(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    cts = cotangents(trial.training.outputs)
    return declared.one_pass(trial.layer, weights, state, inputs, cts, rng)


def _cut(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    """Outputs of all positions but the first, given these alone."""
    return trial.layer.apply(weights, state, trial.piece(inputs, 1, trial.length))[0]


def _decoded(trial: Trial, weights: Tree, state: Tree, inputs: Any, rng: Any) -> Any:
    """The state before, and outputs and state after a prompt and after each next position.

    One step is enough of a layer without state.
    """
    has_state = bool(trial.abstract_init(Mode.PREDICT)[1])
    start = trial.layer.init(trial.signature, rng, Mode.PREDICT)[1] if has_state else {}
    step = jax.jit(functools.partial(trial.layer.apply, mode=Mode.PREDICT))
    length, made, state = trial.length, [], start
    ends = [n for n in ((length - 2) if has_state else 0, length - 1, length) if n > 0]
    for begin, end in zip((0, *ends), ends, strict=False):
        outputs, state = step(weights, state, trial.piece(inputs, begin, end))
        made.append((outputs, state))
    return start, made


PARTS: dict[str, Callable[..., Any]] = {
    'initial': _initial,
    'trained': _trained,
    'evaluated': _evaluated,
    'narrow': _narrow,
    'one_pass': _one_pass,
    'cut': _cut,
    'decoded': _decoded,
}


def _positions(given: tuple[int | None, ...] | None, signature: Signature) -> Any:
    if given is None:
        given = tuple(1 if len(x.shape) > 1 else None for x in signature)
    if given and len(given) != len(signature):
        raise ValueError(
            f'positions={given} are {len(given)} and there are {len(signature)} inputs: give an '
            'axis for each, None for one that is given whole at every step, or () for no positions'
        )
    return () if all(axis is None for axis in given) else given


def _vocab_size(layer: Layer) -> int | None:
    """The smallest vocabulary among a layer and those inside it."""
    own = getattr(layer, 'vocab_size', None)
    found = [own if isinstance(own, int) else None, *map(_vocab_size, layer.sublayers)]
    return min((n for n in found if n is not None), default=None)


def _kind(made: Any) -> tuple[type, ...]:
    """Types of the outputs and of the state; of the whole alone if it is no pair."""
    return (
        (type(made[0]), type(made[1])) if type(made) is tuple and len(made) == 2 else (type(made),)
    )


def _containers(tree: Any) -> Any:
    """A copy of a nested dict, with the very same leaves."""
    if not isinstance(tree, dict):
        return tree
    return {key: _containers(value) for key, value in tree.items()}


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[k], b[k]) for k in a)
    return a is b


def _stored(layer: Layer) -> dict[str, Any]:
    """What lies on a layer beside properties that are computed once."""
    cached = {
        name
        for cls in type(layer).__mro__
        for name, value in vars(cls).items()
        if isinstance(value, functools.cached_property)
    }
    return {name: copy.copy(v) for name, v in vars(layer).items() if name not in cached}


def _changes(before: Any, after: Any) -> str:
    """What changed in place, in words."""
    for name, old, new in zip(('the weights', 'the state'), before, after, strict=False):
        if not _is_same(old, new):
            return name
    old, new = before[2], after[2]
    changed = [k for k in {**old, **new} if k not in old or k not in new or old[k] != new[k]]
    return f'its own attribute {changed[0]!r}' if changed else ''


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())
