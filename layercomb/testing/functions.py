"""Checks of `init` and `apply` as pure functions: what they return, for which keys and modes."""

from __future__ import annotations

from typing import Any

import jax

from layercomb import trees
from layercomb.layers.core.mode import Mode
from layercomb.shapes import describe
from layercomb.testing import declared
from layercomb.testing.comparing import all_finite, difference, shapes, unlike
from layercomb.testing.errors import Broken, expect
from layercomb.testing.trial import Trial, keys


def initialises_abstractly(trial: Trial) -> None:
    """`init` runs without values, and gives weights that do not depend on the mode."""
    made = trial.abstract_init()
    expect(
        isinstance(made, tuple) and len(made) == 2 and all(isinstance(x, dict) for x in made),
        f'init returned {_types(made)}',
        'two nested dicts, of weights and of state',
        "return {'kernel': kernel}, {}; what is not there is {}",
    )
    weights, state = made
    for mode in Mode:
        if mode is Mode.PREDICT and not trial.length:
            continue
        other_weights, other_state = trial.abstract_init(mode)
        expect(
            shapes(other_weights) == shapes(weights),
            f'in {mode.name}, {unlike(other_weights, weights)}',
            'the weights of TRAIN',
            'let weights depend on the signature and the fields alone; what PREDICT needs is state',
        )
        expect(
            mode is Mode.PREDICT or shapes(other_state) == shapes(state),
            f'in {mode.name}, of the state, {unlike(other_state, state)}',
            'the state of TRAIN: it may differ in PREDICT alone',
            'ask for mode is Mode.PREDICT in init, and for nothing else',
        )


def names_its_weights(trial: Trial) -> None:
    """Weights and state lie in nested dicts, under unique paths."""
    _, state = trial.abstract_init()
    expect(
        shapes(declared.kept_state(state)) == shapes(state),
        'init makes decisions',
        'a state without them: only apply in RECORD leaves some',
        'leave them out of init',
    )
    for what, tree in zip(('weights', 'state'), trial.abstract_init(), strict=True):
        for path, leaf in _paths(tree):
            odd = [key for key in path if not _is_key(key)]
            expect(
                not odd,
                f'{what} have the key {", ".join(map(repr, odd))}',
                'keys that are names, without "/", which separates them in a path',
                'nest dicts: {"dense": {"kernel": …}} has the path dense/kernel',
            )
            expect(
                declared.is_entry(leaf),
                f'at {"/".join(path)} of the {what} lies a {type(leaf).__name__}',
                'nested dicts with arrays as leaves',
                'give each array a key of its own in a dict',
            )


def declares_axes_of_weights(trial: Trial) -> None:
    """A layer that declares axes of weights declares them for each, as many as it has."""
    weights, _ = trial.abstract_init()
    axes = declared.weight_axes(trial.layer)
    for path, weight in trees.flatten(weights).items() if axes else ():
        expect(
            path in axes or bool(trial.layer.sublayers),
            f'axes are declared for {", ".join(axes)}, and init made {path!r}',
            'axes for each weight',
            'declare the path that init uses',
        )
        n = len(weight.shape)
        expect(
            path not in axes or n == declared.n_axes(axes[path]),
            f'{path!r} has {n} axes, and {axes.get(path)!r} are declared',
            'a letter for each axis',
            "write a letter for each axis: 'D->F' for a kernel (D, F)",
        )


def gives_what_it_announces(trial: Trial) -> None:
    """`apply` returns `n_out` outputs as `output_signature` says, and a state like its own."""
    layer = trial.layer
    _, state = trial.abstract_init()
    seen = {Mode.TRAIN: trial.training}
    if not trial.trains_as_it_evaluates:
        seen[Mode.EVAL] = trial.evaluation
    for mode, traced in seen.items():
        pair = len(traced.kind) == 2 and issubclass(traced.kind[0], tuple)
        expect(
            pair and issubclass(traced.kind[1], dict),
            f'apply returned {" and ".join(kind.__name__ for kind in traced.kind)}',
            'a tuple of outputs and a dict, the state',
            'write return (y,), state',
        )
        expect(
            len(traced.outputs) == layer.n_out,
            f'{len(traced.outputs)} outputs: {describe(traced.outputs)}',
            f'n_out = {layer.n_out}',
            f'set n_out = {len(traced.outputs)} in the class, or return {layer.n_out}',
        )
        announced = layer.output_signature(trial.signature, mode)
        expect(
            describe(announced) == describe(traced.outputs),
            f'output_signature says {describe(announced)} in {mode.name}',
            f'what apply returns, {describe(traced.outputs)}',
            'do not write output_signature: it is found from apply',
        )
        expect(
            shapes(traced.state) == shapes(state),
            f'the state after apply in {mode.name} is another: {unlike(traced.state, state)}',
            'the structure, shapes and dtypes that init gave',
            'return every entry of the state, also one that did not change, in its dtype',
        )


def is_pure(trial: Trial) -> None:
    """`apply` changes nothing in place and gives the same for the same arguments."""
    for traced in (trial.training, trial.evaluation):
        expect(
            not traced.changed,
            f'apply changed {traced.changed} in place',
            'what was given stays as it was',
            'make a new dict: return (y,), {**state, "n": n}; store nothing on self',
        )
    if not trial.trains_as_it_evaluates:
        expect(
            trial.training.same_program(trial.trace(Mode.TRAIN)),
            'two calls with the same arguments made two programs',
            'the same program',
            'draw from rng, with jax.random: NumPy, random and clocks know no key, and jit keeps '
            'what they gave once',
        )


def uses_each_key_once(trial: Trial) -> None:
    """No key is used for two draws."""
    trial.results(1)
    error = trial.key_error
    if error is not None:
        raise Broken(
            f'a key was used twice ({str(error).splitlines()[0]})',
            'a key for each draw: one key gives the same numbers again',
            'split it: a, b = jax.random.split(rng)',
        ) from error


def compiles(trial: Trial) -> None:
    """Compiled and op by op, `apply` gives the same, finite numbers."""
    weights, state = trial.get('initial')
    mode = Mode.EVAL if trial.trains_as_it_evaluates or not trial.draws else Mode.TRAIN
    key = keys()[1] if mode is Mode.TRAIN else None
    eager = trial.layer.apply(weights, state, trial.inputs, rng=key, mode=mode)
    compiled = trial.outputs(mode)
    found = difference(eager, compiled, trial.tolerance)
    expect(
        not found,
        f'without jit, {found}',
        'what the compiled function gives',
        'do not ask whether an array is a tracer, and do not use np on arrays',
    )
    expect(
        all_finite(compiled[0]),
        'an output is infinite or not a number, for inputs around 1',
        'finite numbers',
        'guard divisions, logarithms and roots: jnp.log(jnp.maximum(x, 1e-9))',
    )


def knows_its_modes(trial: Trial) -> None:
    """EVAL needs no key; training differs from it by draws from the key, or by state."""
    weights, state = trial.abstract_init()
    jax.eval_shape(lambda w, s, x: trial.layer.apply(w, s, x), weights, state, trial.signature)
    _draws_as_said(trial, bool(state))
    if trial.trains_as_it_evaluates and not state:
        _same_as_training(trial, Mode.RECORD)
        if not trial.trace(Mode.RECORD).state:  # else REPLAY needs what was decided
            _same_as_training(trial, Mode.REPLAY)
        if not trial.draws:
            return
    first = trial.outputs(Mode.EVAL)
    found = difference(trial.outputs(Mode.EVAL, 2), first, 0)
    expect(
        not found,
        f'in EVAL another key gave other outputs: {found}',
        'EVAL is the same for every key',
        'draw only if mode.is_training',
    )
    trained = trial.outputs(Mode.TRAIN)
    expect(
        bool(state) or trial.draws or not difference(trained[0], first[0], trial.tolerance),
        'TRAIN gives other outputs than EVAL, and the same ones for two keys',
        'draws that depend on rng, or a state, or the same outputs',
        'draw from rng, not from a key of its own; compute in EVAL what training computes',
    )


def _draws_as_said(trial: Trial, has_state: bool) -> None:
    """Training draws if it must, and is EVAL's program if it must not."""
    if trial.must_draw is None:
        return
    expect(
        trial.draws == trial.must_draw,
        f'training gives {"other" if trial.draws else "the same"} outputs for another key',
        f'draws={trial.must_draw}, as check_layer was told',
        'draw from rng in training' if trial.must_draw else 'draw nothing, or say draws=True',
    )
    expect(
        trial.must_draw or has_state or trial.trains_as_it_evaluates,
        'TRAIN is another program than EVAL',
        'the same, since it has no state and draws nothing',
        'do not ask for the mode',
    )


def _same_as_training(trial: Trial, mode: Mode) -> None:
    """In `mode`, a layer without draws, state and decisions computes what it does in TRAIN."""
    traced = trial.trace(mode)
    if trial.training.same_program(traced) or traced.state:
        return
    weights, _ = trial.get('initial')
    apply = jax.jit(lambda w, x: trial.layer.apply(w, {}, x, mode=mode))
    found = difference(apply(weights, trial.inputs)[0], trial.outputs(mode)[0], trial.tolerance)
    expect(
        not found,
        f'in {mode.name}, {found}',
        f'{mode.name} is TRAIN, but for decisions that are recorded',
        'ask for mode.is_training, which is true in RECORD and REPLAY too',
    )


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and bool(key) and '/' not in key


def _paths(tree: Any, above: tuple[Any, ...] = ()) -> Any:
    if not isinstance(tree, dict):
        yield above, tree
        return
    for key, value in tree.items():
        yield from _paths(value, (*above, key))


def _types(made: Any) -> str:
    if isinstance(made, tuple):
        return 'a tuple of ' + ', '.join(type(x).__name__ for x in made)
    return f'a {type(made).__name__}'
