"""Checks of numbers: bfloat16, float32 where float64 is the default, gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from layercomb.layers.core.mode import Mode
from layercomb.layers.reversible.cotangents import vjp
from layercomb.shapes import describe, is_float
from layercomb.testing.comparing import all_finite, difference, shapes, unlike
from layercomb.testing.errors import expect
from layercomb.testing.trial import Trial, cotangents, narrow_layer, narrowed
from layercomb.transforms import Cast


def computes_in_bfloat16(trial: Trial) -> None:
    """`transforms.cast` computes it in bfloat16, with float32 weights and state."""
    narrow, plain = narrow_layer(trial.layer), trial.abstract_init()
    init = functools.partial(narrow.init, narrowed(trial.signature))
    made = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0))
    outputs, state = trial.get('narrow')
    for what, got, wanted in (
        ('weights', made[0], plain[0]),
        ('state', made[1], plain[1]),
        ('state after apply', state, plain[1]),
    ):
        expect(
            shapes(got) == shapes(wanted),
            f'of the {what}, {unlike(got, wanted)}',
            'the same as without cast, float32',
            'make weights and state with dtype jnp.float32, not with that of the inputs',
        )
    if isinstance(narrow, Cast):
        wrong = [y for y in outputs if is_float(y) and y.dtype != narrow.dtype]
        expect(
            not wrong,
            f'weights and inputs of {narrow.dtype} gave {describe(wrong)}',
            f'outputs of {narrow.dtype}',
            'make constants with the dtype of the inputs, jnp.zeros(shape, x.dtype); a layer that '
            'must compute in float32 sets float32 = True in its class',
        )
    expect(
        all_finite(outputs),
        'an output in bfloat16 is infinite or not a number',
        'finite numbers',
        'set float32 = True in the class if narrow arithmetic hurts',
    )


def stays_in_float32(trial: Trial) -> None:
    """Where JAX's default is float64, weights, state and outputs are float32 all the same."""

    def train(weights: Any, state: Any, inputs: Any, rng: Any) -> Any:
        def run(weights: Any) -> Any:
            return trial.layer.apply(weights, state, inputs, rng=rng, mode=Mode.TRAIN)

        (outputs, new), pull = vjp(run, weights)
        return outputs, new, pull((cotangents(outputs), jax.tree.map(lambda x: None, new)))

    def decode(weights: Any, state: Any, inputs: Any, rng: Any) -> Any:
        return trial.layer.apply(weights, state, inputs, mode=Mode.PREDICT)

    with jax.enable_x64(True):
        key = jax.eval_shape(jax.random.key, 0)
        for mode, run in ((Mode.TRAIN, train), (Mode.PREDICT, decode)):
            if mode is Mode.PREDICT and not trial.length:
                continue
            init = functools.partial(trial.layer.init, trial.signature, mode=mode)
            weights, state = jax.eval_shape(init, key)
            made = jax.eval_shape(run, weights, state, trial.signature, key)
            for what, tree in (('init', (weights, state)), (f'apply in {mode.name}', made)):
                wide = [x for x in jax.tree.leaves(tree) if str(x.dtype) in ('float64', 'int64')]
                expect(
                    not wide,
                    f'{what} made {describe(wide[:1])} under jax_enable_x64',
                    'float32 and int32',
                    'give a dtype to what is made: jnp.zeros(shape, jnp.float32), '
                    'jax.random.normal(rng, shape, jnp.float32), jnp.arange(n, dtype=jnp.int32)',
                )


def has_finite_gradients(trial: Trial) -> None:
    """Every weight has a finite gradient, of its own shape and dtype."""
    weights, _ = trial.abstract_init()
    grads = trial.get('trained')[3]
    floats = jax.tree.map(lambda w: w if is_float(w) else None, weights)
    expect(
        shapes(grads) == shapes(floats),
        f'of the gradients, {unlike(grads, floats)}',
        'a gradient for each weight',
        'in a custom_vjp, return a gradient for each weight',
    )
    wrong = [p for p, g in jax.tree_util.tree_leaves_with_path(grads) if not np.isfinite(g).all()]
    expect(
        not wrong,
        f'the gradient of weights{jax.tree_util.keystr(wrong[0]) if wrong else ""} is not finite',
        'finite numbers, for inputs around 1',
        'the derivatives of sqrt, norms and x / x at 0 are infinite: add an epsilon inside, and '
        'choose with jnp.where before the function, not after it',
    )


def gives_gradients_in_one_pass(trial: Trial) -> None:
    """Outputs and gradients in one pass, if the layer has a rule, are those of `jax.vjp`."""
    if 'one_pass' not in trial.parts:
        return
    outputs, _, d_inputs, d_weights = trial.get('trained')
    got = trial.get('one_pass')
    names = ('outputs', 'gradients of inputs', 'gradients of weights')
    for what, one, two in zip(names, got, (outputs, d_inputs, d_weights), strict=True):
        found = difference(one, two, 10 * trial.tolerance)
        expect(
            not found,
            f'of the {what}, {found}',
            'what jax.vjp of apply gives with the same key',
            'leave the rule out (vjp is the default), or draw and compute in it as apply does',
        )
