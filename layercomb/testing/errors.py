"""A broken promise in words: `LayerCheckError`, and what the checks raise inside."""

from __future__ import annotations

import re

import jax


class LayerCheckError(AssertionError):
    """A layer broke a promise.

    Attributes:
      check: the name of the check, one of `testing.checks()`.
      promise: what every layer promises.
      came: what this one did.
      expected: what it should have done.
      fix: what most likely mends it.
    """

    def __init__(self, layer: str, check: str, promise: str, came: str, expected: str, fix: str):
        super().__init__(
            f'{layer} breaks the promise {check!r}:\n{promise}.\n'
            f'  came:     {came}\n'
            f'  expected: {expected}\n'
            f'  fix:      {fix}'
        )
        self.check, self.promise = check, promise
        self.came, self.expected, self.fix = came, expected, fix


class Broken(Exception):
    """Raised by a check: what came, what was expected, and the likely fix."""

    def __init__(self, came: str, expected: str, fix: str):
        super().__init__(came)
        self.came, self.expected, self.fix = came, expected, fix


def expect(holds: bool, came: str, expected: str, fix: str) -> None:
    """Raises `Broken` unless `holds`."""
    if not holds:
        raise Broken(came, expected, fix)


# Errors of JAX that say more about the fix than the check during which they arose.
_TRACED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def from_error(error: Exception, fix: str) -> Broken:
    """A layer's own error as a broken promise."""
    if isinstance(error, _TRACED):
        fix = (
            'init and apply must not look at the values of arrays, which jit does not know: '
            'write jnp.where or jax.lax.cond for if, jnp for np, and no float() or int()'
        )
    elif isinstance(error, AttributeError) and 'cannot assign to field' in str(error):
        fix = 'store nothing on self: return what changes as the new state'
    notes = getattr(error, '__notes__', [])
    text = re.sub(r'\s*\n\s*', ' ', '; '.join([str(error), *notes])).strip()
    text = text if len(text) <= 300 else text[:300] + ' …'
    return Broken(f'{type(error).__name__}: {text}', 'no error', fix)
