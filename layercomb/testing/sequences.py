"""Checks along the positions: decoding step by step, and position-wise layers on slices."""

from __future__ import annotations

import jax.numpy as jnp

from layercomb.layers.core.mode import Mode
from layercomb.testing.comparing import difference, shapes, unlike
from layercomb.testing.errors import expect
from layercomb.testing.trial import Trial


def decodes_step_by_step(trial: Trial) -> None:
    """PREDICT, slice by slice, gives what EVAL gives for the whole; the state keeps its form."""
    if not trial.length:
        return
    start, made = trial.get('decoded')
    _, announced = trial.abstract_init(Mode.PREDICT)
    for _, state in [((), start), *made]:
        expect(
            shapes(state) == shapes(announced),
            f'the state after a step of PREDICT is another: {unlike(state, announced)}',
            'the structure, shapes and dtypes that init gave in PREDICT',
            'make caches in init as long as the signature, and write the next positions into them',
        )
    whole = trial.outputs(Mode.EVAL)[0]
    parts = zip(*[outputs for outputs, _ in made], strict=True)
    for n, (pieces, wanted) in enumerate(zip(parts, whole, strict=True)):
        got = jnp.concatenate(pieces, trial.positions_out)
        found = difference(got, wanted, trial.tolerance)
        expect(
            not found,
            f'output {n}, given {len(pieces)} slices of the positions: {found}',
            'what EVAL gives for all positions at once',
            'in PREDICT keep in the state what earlier positions left, and look at no later one; '
            'check_layer(…, positions=(…)) says which axes are positions, () that there are none',
        )


def may_be_cut_if_it_says_so(trial: Trial) -> None:
    """A layer that says it is position-wise gives the same for a slice of the positions."""
    if 'cut' not in trial.parts:
        return
    whole = trial.outputs(Mode.EVAL)[0]
    for n, (got, all_of_it) in enumerate(zip(trial.get('cut'), whole, strict=True)):
        axis = trial.positions_out
        wanted = jnp.take(all_of_it, jnp.arange(1, all_of_it.shape[axis]), axis)
        found = difference(got, wanted, trial.tolerance)
        expect(
            not found,
            f'output {n}, given all positions but the first: {found}',
            'what it gives for them among all',
            'say that it is not position-wise: position_wise = False in the class',
        )
