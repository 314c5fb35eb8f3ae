"""Weights as safetensors: one file, each array under its path; reading it runs no code.

The format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import paths, trees
from layercomb.errors import UsageError, machine_errors, require


def save_weights(path: str | Path, weights: Mapping[str, Any]) -> None:
    """Writes a tree of arrays, each of its own dtype (bfloat16 too), as one file.

    Args:
      path: of the file, ``….safetensors``; an existing file is replaced.
      weights: a nested dict of arrays, none of which may be a random key.

    Raises:
      UsageError: if safetensors is not installed, or the file cannot be written.
    """
    numpy = require('safetensors.numpy', 'export')
    from safetensors import SafetensorError

    file = paths.local(path, 'path')
    arrays = {  # the format has no strides, so a view would be written in the wrong order
        name: np.array(jax.device_get(x), order='C') for name, x in trees.flatten(weights).items()
    }
    with machine_errors('free some space, or write elsewhere'):
        try:
            numpy.save_file(arrays, file, {'format': 'layercomb'})
        except SafetensorError as e:
            raise _of_the_system(e, file) from None


def load_weights(path: str | Path) -> dict[str, Any]:
    """Reads a safetensors file as a tree.

    Args:
      path: of the file; a ``/`` in the name of an array separates levels of the tree.

    Returns:
      A nested dict of JAX arrays.

    Raises:
      UsageError: if safetensors is not installed, or the file does not exist, is damaged, or is
        no safetensors file.
    """
    numpy = require('safetensors.numpy', 'export')
    from safetensors import SafetensorError

    file = paths.local(path, 'path')
    with machine_errors('check the path'):
        try:
            return jax.tree.map(jnp.asarray, trees.unflatten(numpy.load_file(file)))
        except SafetensorError as e:
            raise UsageError(f'{str(file)!r} is no file of safetensors ({e})') from None


def _of_the_system(error: Exception, file: Path) -> Exception:
    """The OSError behind an error of the library, or the error itself."""
    code = re.search(r'\(os error (\d+)\)', str(error))
    return error if code is None else OSError(int(code[1]), os.strerror(int(code[1])), str(file))
