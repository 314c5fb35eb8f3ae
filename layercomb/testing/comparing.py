"""Trees of arrays compared, and how they differ, in words."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from layercomb.shapes import describe

HALF = 1e-2  # the least tolerance of what is in half precision


def shapes(tree: Any) -> Any:
    """The structure of a tree, with shapes and dtypes."""
    return jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)


def unlike(got: Any, wanted: Any) -> str:
    """The first place in which shapes or dtypes of two trees differ."""
    one, two = _flat(got), _flat(wanted)
    for path in sorted({*one, *two}):
        a, b = one.get(path, 'nothing'), two.get(path, 'nothing')
        if a != b:
            return f'at {path or "the root"} there is {a} and not {b}'
    return 'the structure is another'


def difference(got: Any, wanted: Any, tolerance: float) -> str:
    """Where two trees of arrays differ, in words; empty if they are close.

    Args:
      got, wanted: trees of arrays.
      tolerance: relative and absolute; 0 asks for equality. Halves are given `HALF`.
    """
    if shapes(got) != shapes(wanted):
        return unlike(got, wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        half = np.dtype(a.dtype).itemsize < 4 and tolerance
        one, two = np.asarray(a, np.float64), np.asarray(b, np.float64)
        allowed = max(tolerance, HALF) if half else tolerance
        if not np.allclose(one, two, rtol=allowed, atol=allowed, equal_nan=True):
            far = np.abs(one - two).max()
            return f'{_name(path)}{describe([a])} is off by up to {far:.3g}'
    return ''


def all_finite(tree: Any) -> bool:
    """Whether all numbers of a tree are finite."""
    return all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


def _flat(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path).strip(): describe([x]) for path, x in leaves}


def _name(path: Any) -> str:
    text = '/'.join(str(getattr(k, 'key', getattr(k, 'idx', k))) for k in path)
    return text + ' ' if text else ''
