"""The table of checks, each with the promise that it checks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import jax

from layercomb.testing import description, functions, numerics, sequences
from layercomb.testing.errors import Broken, LayerCheckError, from_error
from layercomb.testing.trial import Trial


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
      promise: what every layer promises.
      run: raises `Broken` if the promise is broken.
      fix: the most likely fix of an error that the layer itself raises during the check.
    """

    promise: str
    run: Callable[[Trial], None]
    fix: str

    def __call__(self, name: str, trial: Trial) -> None:
        """Runs the check.

        Args:
          name: of the check, for the error.
          trial: the layer with its inputs.

        Raises:
          LayerCheckError: if the promise is broken.
        """
        try:
            with jax.debug_key_reuse(False):  # the check 'keys' covers what all of them compute
                self.run(trial)
        except Exception as error:
            broken = error if isinstance(error, Broken) else from_error(error, self.fix)
            try:
                text = re.sub(r'\s*\n\s*', ' ', repr(trial.layer))
            except Exception:
                text = type(trial.layer).__name__
            raise LayerCheckError(
                text, name, self.promise, broken.came, broken.expected, broken.fix
            ) from (None if error is broken else error)


# Basic promises first, since the others rely on them.
CHECKS: dict[str, Check] = {
    'value': Check(
        'a layer is a frozen description, equal to its copies',
        description.is_a_value,
        'keep plain, hashable values in its fields',
    ),
    'printing': Check(
        'repr is the code that makes the layer',
        description.prints_as_code,
        'do not write __repr__: what Layer prints is enough',
    ),
    'rewriting': Check(
        'sublayers shows every layer inside, and with_sublayers takes others in their places',
        description.can_be_rewritten,
        'derive from Combinator or Wrapper, which write both',
    ),
    'init': Check(
        'init works from shapes alone, and weights do not depend on the mode',
        functions.initialises_abstractly,
        'make weights from the shapes in the signature and from rng, with jax.random and jnp',
    ),
    'paths': Check(
        'weights and state are nested dicts, with a path for each array',
        functions.names_its_weights,
        'nest dicts with names as keys',
    ),
    'axes': Check(
        'declared axes of weights are those that init makes',
        functions.declares_axes_of_weights,
        'declare a letter for each axis of the weight at a path',
    ),
    'outputs': Check(
        'apply returns n_out outputs, as announced, and a state like the one it was given',
        functions.gives_what_it_announces,
        'see the error: it arose in apply, given what init made',
    ),
    'purity': Check(
        'apply changes nothing in place, and the same arguments give the same',
        functions.is_pure,
        'see the error: it arose in apply, given what init made',
    ),
    'keys': Check(
        'no key is used for two draws',
        functions.uses_each_key_once,
        'split the key: a, b = jax.random.split(rng)',
    ),
    'modes': Check(
        'EVAL draws nothing, and training differs from it by draws from the key or by state',
        functions.knows_its_modes,
        'draw only if mode.is_training: in EVAL there is no key, rng is None',
    ),
    'jit': Check(
        'compiled and op by op, apply gives the same finite numbers',
        functions.compiles,
        'see the error: it arose in apply',
    ),
    'decoding': Check(
        'PREDICT, slice by slice, gives what EVAL gives for the whole',
        sequences.decodes_step_by_step,
        'in PREDICT apply takes any number of next positions, without a key; a layer without '
        'positions is checked with positions=()',
    ),
    'position_wise': Check(
        'a layer that says it is position-wise gives the same for a slice of the positions',
        sequences.may_be_cut_if_it_says_so,
        'say that it is not position-wise: position_wise = False in the class',
    ),
    'bfloat16': Check(
        'transforms.cast computes it in bfloat16, with weights and state in float32',
        numerics.computes_in_bfloat16,
        'take dtypes from the inputs, or set float32 = True in the class',
    ),
    'float32': Check(
        'weights, state and outputs are float32 where JAX would make float64',
        numerics.stays_in_float32,
        'give a dtype to every array that is made',
    ),
    'gradients': Check(
        'every weight has a finite gradient',
        numerics.has_finite_gradients,
        'use functions that can be differentiated, or write a custom_vjp',
    ),
    'one_pass': Check(
        'outputs and gradients in one pass are those of jax.vjp',
        numerics.gives_gradients_in_one_pass,
        'leave the rule out: vjp is the default',
    ),
}
