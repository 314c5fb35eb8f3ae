"""`compile_for`: compiles a program before its first call, and gives back what that took."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import numpy as np

from layercomb.transforms import buffers

# Hashes of what each program was compiled for, which keep no model. Weakly, so that programs go
# when nobody else has them.
_known: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


def compile_for(program: Any, *args: Any) -> None:
    """Compiles a program for a first call with such arguments, or reads it from JAX's cache.

    Either takes tens of megabytes for a moment, which the allocator would keep beside what the
    program itself then takes. JAX finds what is compiled here when the program is called.

    Args:
      program: what `jax.jit` made.
      *args: of the call, of which only shapes and dtypes are looked at.
    """
    leaves, structure = jax.tree.flatten(args)
    kind = hash((structure, tuple((np.shape(x), getattr(x, 'dtype', type(x))) for x in leaves)))
    known = _known.setdefault(program, set())
    if kind in known:
        return
    buffers.give_back()
    program.lower(*args).compile()
    buffers.give_back()
    known.add(kind)
