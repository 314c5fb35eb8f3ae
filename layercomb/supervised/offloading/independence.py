"""Whether an optimizer moves each tensor, and each block of a stack, by itself: it is tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import trees
from layercomb.supervised.offloading.dividing import by_name, divided, is_inside, outside
from layercomb.supervised.updates import moved, update
from layercomb.trees import Tree

_CURE = (
    'choose one that goes by tensors, such as optimizers.adamw, muon or adafactor, or leave '
    'offload out'
)
_SMALL = 4  # no axis of the weights that it is tried on is longer


def check_independent(optimizer: Any, trainable: Tree, n_blocks: Mapping[str, int]) -> None:
    """Raises a ValueError unless an optimizer moves each tensor of each block by itself.

    It takes a step with small weights of the same names, then one in which all gradients and
    weights but those of one block are others: as large, far larger, and not finite. What becomes
    of that block must be the same.

    Args:
      optimizer: an `optax.GradientTransformation`.
      trainable: the weights that train, arrays or `jax.ShapeDtypeStruct`.
      n_blocks: of each stack, by path.
    """
    few = {path: min(n, 2) for path, n in n_blocks.items()}
    weights, others = _small(trainable, few, 0), _small(trainable, few, 1)
    step = _step(optimizer)
    first = step(weights, weights, jnp.float32(1))
    parts = divided(optimizer, weights, few)
    for factor in (1, 1e6, np.nan):
        scaled = jax.tree.map(lambda x, factor=factor: x * jnp.asarray(factor, x.dtype), others)
        _check_stacks(step, first, weights, scaled, parts, few)
        _check_rest(step, first, weights, scaled, parts.rest.names, few)


def moves_by_parts(
    optimizer: Any, trainable: Tree, n_blocks: Mapping[str, int], cuts: Mapping[str, int]
) -> bool:
    """Whether an optimizer moves each half of each weight by itself, which is tried likewise.

    It takes two steps, as a learning rate may begin with 0.

    Args:
      optimizer: an `optax.GradientTransformation`.
      trainable: the weights that train, arrays or `jax.ShapeDtypeStruct`.
      n_blocks: of each stack, by path.
      cuts: path -> the axis along which a weight is cut.
    """
    if not cuts:
        return True
    few = {path: min(n, 2) for path, n in n_blocks.items()}
    weights, others = _small(trainable, few, 0), _small(trainable, few, 1)

    @jax.jit
    def two_steps(weights: Tree) -> dict[str, jax.Array]:
        with jax.numpy_dtype_promotion('standard'):
            state = optimizer.init(weights)
        for _ in range(2):
            given = optimizer, weights, state, weights, jnp.float32(1), unknown_loss
            moves, state = moved(*given)
        return trees.flatten(moves)

    def halves(path: str, x: jax.Array) -> list[jax.Array]:
        return jnp.split(x, (x.shape[cuts[path]] // 2,), cuts[path])

    first = two_steps(weights)
    for factor in (1, 1e6, np.nan):

        def mixed(path: str, a: jax.Array, b: jax.Array, factor: float = factor) -> jax.Array:
            if path not in cuts:
                return a
            far = b * jnp.asarray(factor, b.dtype)
            return jnp.concatenate((halves(path, a)[0], halves(path, far)[1]), cuts[path])

        then = two_steps(trees.map_with_path(mixed, weights, others))
        if not all(_equal(halves(p, first[p])[0], halves(p, then[p])[0]) for p in cuts):
            return False
    return True


def _check_stacks(
    step: Any, first: Any, weights: Tree, others: Tree, parts: Any, few: Mapping[str, int]
) -> None:
    """Raises unless each block of a stack moves by itself."""
    for path, n in few.items():
        mixed = _mixed(weights, others, path, n)
        then = step(mixed, mixed, jnp.float32(2))
        own = parts.stacks[path].own
        shared = [name for name in parts.stacks[path].names if name not in own]
        same = all(_equal(first[1][name], then[1][name]) for name in shared)
        for where in (0, 1):
            for name, x in first[where].items():
                if name in own or (where == 0 and is_inside(name, path)):
                    k = x.shape[0] // n
                    same &= _equal(x[:k], then[where][name][:k])
        if not same:
            raise ValueError(
                "offload='blocks' moves a block before the gradients of others are known, and this "
                f"optimizer moves a block of {path!r} otherwise if others' gradients, or the "
                f'loss, are others: {_CURE}'
            )


def _check_rest(
    step: Any, first: Any, weights: Tree, others: Tree, names: Any, few: Mapping[str, int]
) -> None:
    """Raises unless what is outside of stacks moves by itself."""
    mixed = trees.map_with_path(
        lambda path, a, b: b if any(is_inside(path, stack) for stack in few) else a, weights, others
    )
    then = step(mixed, mixed, jnp.float32(1))
    rest = trees.flatten(outside(weights, few))
    same = all(_equal(first[0][p], then[0][p]) for p, x in rest.items() if x is not None)
    if not same or not all(_equal(first[1][name], then[1][name]) for name in names):
        raise ValueError(
            "offload='blocks': this optimizer moves what is outside of stacks otherwise if "
            f'gradients of blocks are others, which are gone by then: {_CURE}'
        )


def unknown_loss(weights: Tree) -> NoReturn:
    """Stands for the loss as a function of weights, which line searches ask for.

    Args:
      weights: at which it is asked for.

    Raises:
      ValueError: always.
    """
    raise ValueError(
        "offload='blocks': this optimizer asks for losses at other weights, as line searches do, "
        f'which only exist one block at a time: {_CURE}'
    )


def _step(optimizer: Any) -> Any:
    """The first step: (gradients, weights, loss) → new weights and new state, by name."""

    @jax.jit
    def step(grads: Tree, weights: Tree, value: jax.Array) -> Any:
        with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
            state = optimizer.init(weights)
        made, state = update(optimizer, grads, state, weights, value, unknown_loss)
        return {p: x for p, x in trees.flatten(made).items() if x is not None}, by_name(state)

    return step


def _small(trainable: Tree, few: Mapping[str, int], seed: int) -> Tree:
    """Small random weights of the names of others."""
    rng = np.random.default_rng(seed)

    def one(path: str, x: Any) -> Any:
        if x is None:
            return None
        shape = [min(n, _SMALL) for n in x.shape]
        n = next((n for stack, n in few.items() if is_inside(path, stack)), None)
        shape = shape if n is None else [n, *shape[1:]]
        return jnp.asarray((1 + seed) * rng.normal(size=shape), x.dtype)

    return trees.map_with_path(one, trainable)


def _mixed(weights: Tree, others: Tree, stack: str, n: int) -> Tree:
    """Other weights, but for the first block of a stack."""

    def one(path: str, a: Any, b: Any) -> Any:
        k = a.shape[0] // n if is_inside(path, stack) else 0
        return jnp.concatenate((a[:k], b[k:])) if k else b

    return trees.map_with_path(one, weights, others)


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=a.dtype.kind == 'f')
