"""Gradients of trees in which integers, booleans and keys lie among the floats: None for these."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.layers.quantized.constants import all_constant
from layercomb.shapes import is_float
from layercomb.trees import Tree

Cotangents = tuple[jax.Array | None, ...]


_constants: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    'constants', default=frozenset()
)


@contextlib.contextmanager
def constant(arrays: Iterable[Any]) -> Iterator[None]:
    """Within it, `vjp` takes these very arrays as constants, and their cotangents are None.

    So a gradient goes through frozen weights, also narrow ones, which have none. An array made from
    one of these, such as a slice, is none of them: its cotangent is computed, and dropped later.
    """
    before = _constants.get()
    token = _constants.set(before | {id(x) for x in arrays})
    try:
        yield
    finally:
        _constants.reset(token)


def _is_variable(x: Any) -> bool:
    return is_float(x) and id(x) not in _constants.get()


def vjp(f: Callable[..., Any], *args: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As `jax.vjp`, for trees in which integers, booleans and keys lie among the floats.

    Args:
      f: a function of trees, to a tree.
      *args: trees.

    Returns:
      The value, and the pullback: from a tree like the value, whose cotangents may be wider than
      what they belong to and are None where there is none, to a tuple of trees like `args`, with
      None for what is no float or is `constant`. (JAX's own zero for integers, float0, cannot be
      scanned.) The cotangents of narrow weights that are not are zero.

    >>> y, pull = vjp(lambda x, i: (x * i, i), jnp.float32(2), jnp.int32(3))
    >>> float(y[0]), pull((jnp.float32(1), None))[1]
    (6.0, None)
    """
    tree: Any
    made_tree: Any
    leaves, tree = jax.tree.flatten(args)
    floats = [i for i, x in enumerate(leaves) if _is_variable(x)]

    def of_floats(values: list[jax.Array]) -> Any:
        given = list(leaves)
        for i, x in zip(floats, values, strict=True):
            given[i] = x
        return f(*tree.unflatten(given))

    with all_constant():
        made, pull = jax.vjp(of_floats, [leaves[i] for i in floats])
    outputs, made_tree = jax.tree.flatten(made)

    def pullback(cts: Any) -> tuple[Any, ...]:
        given = map(_cotangent, made_tree.flatten_up_to(cts), outputs)
        (found,) = pull(made_tree.unflatten(given))
        all_cts: list[Any] = [None] * len(leaves)
        for i, ct in zip(floats, found, strict=True):
            all_cts[i] = ct
        return tree.unflatten(all_cts)

    return made, pullback


def _cotangent(ct: Any, value: jax.Array) -> Any:
    """`ct` as JAX wants it for `value`: of its dtype, zero for None."""
    if not is_float(value):
        return np.zeros(value.shape, jax.dtypes.float0)
    return jnp.zeros(value.shape, value.dtype) if ct is None else ct.astype(value.dtype)


def add_cts(a: Any, b: Any) -> Any:
    """The sum of two cotangents, either of which may be None, in the dtype of the first."""
    if a is None or b is None:
        return b if a is None else a
    return a + b.astype(a.dtype)


def zero_cts(tree: Any, known: jax.Array | None = None) -> Any:
    """Zeros like the floats of `tree`, None for the rest; `known` is as of `zeros_once`."""
    return jax.tree.map(
        lambda x: zeros_once(x.shape, x.dtype, known) if _is_variable(x) else None, tree
    )


def add_wanted(total: Any, cts: Any) -> Any:
    """A tree of cotangents with others added; None where `total` has None."""

    def add(total: jax.Array | None, ct: jax.Array | None) -> jax.Array | None:
        return total if total is None or ct is None else total + ct

    return jax.tree.map(add, total, cts, is_leaf=lambda x: x is None)


def zeros_once(shape: tuple[int, ...], dtype: Any, known: jax.Array | None) -> jax.Array:
    """Zeros that cannot be made before the floats `known` are.

    A loop that fills or adds to a large array starts from zeros. All loops share zeros that are a
    constant: these live from the first loop to the last, and each loop copies them, long before its
    turn. Comparing `known` with infinity makes the zeros depend on data; it is false for NaN too.
    """
    if known is None or not known.size:
        return jnp.zeros(shape, dtype)
    return jnp.broadcast_to((known.ravel()[0] > jnp.inf).astype(dtype), shape)


def matched(cts: Tree | None, state: Tree) -> Tree:
    """A tree like `state` with the cotangents found in `cts` under the same paths, else None."""
    cts = cts or {}

    def found(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return matched(cts.get(key), value)
        given = cts.get(key)
        return jax.tree.map(lambda _: None, value) if given is None else given

    return {key: found(key, value) for key, value in state.items()}


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which leaves of a tree a gradient is asked of, as a `jax.custom_vjp` is told.

    Attributes:
      leaves: a flag for each.
    """

    leaves: tuple[bool, ...]

    @staticmethod
    def split(primals: Any) -> tuple[Any, Wanted]:
        """The values of an argument, and which are wanted.

        Args:
          primals: a tree of `jax.custom_derivatives.CustomVJPPrimal`.
        """
        tree: Any
        leaves, tree = jax.tree.flatten(primals)
        return tree.unflatten([x.value for x in leaves]), Wanted(
            tuple(x.perturbed and is_float(x.value) for x in leaves)
        )

    def others(self, tree: Any) -> list[Any]:
        """The leaves of a tree that are not wanted."""
        return [x for x, flag in zip(jax.tree.leaves(tree), self.leaves, strict=True) if not flag]

    def only(self, tree: Any, cts: Any) -> Any:
        """Cotangents of a tree without those that are not wanted, for which None stands."""
        structure: Any = jax.tree.structure(tree)
        found = structure.flatten_up_to(cts)
        kept = [ct if flag else None for ct, flag in zip(found, self.leaves, strict=True)]
        return structure.unflatten(kept)


def known(ct: Any) -> jax.Array | None:
    """A cotangent as JAX hands it to a `custom_vjp`; None for zeros, and for what is no float."""
    is_zero = isinstance(ct, jax.custom_derivatives.SymbolicZero)
    return None if is_zero or ct.dtype == jax.dtypes.float0 else ct
