"""Optimizers whose moments are kept narrow between steps: `narrow_state`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Size, checked
from layercomb.errors import require
from layercomb.layers.core.layer import Layer
from layercomb.optimizers import blockwise, rounding
from layercomb.optimizers.tensors import bound, decayed, for_model
from layercomb.trees import Tree

# What optax and its `contrib` call running means of gradients and of their squares.
MOMENTS = frozenset(
    ('mu', 'nu', 'nu_max', 'trace', 'ema', 'm', 'm1', 'm2', 'v', 'n', 'exp_avg', 'exp_avg_sq')
)
_SHORTEST = 32  # a shorter last axis would have more scales than it saves

Which = Callable[[str], bool]


class NarrowState(NamedTuple):
    """The state of `narrow_state`.

    Attributes:
      n_steps: int32 (), how many steps were taken.
      inner_state: that of the optimizer, with `blockwise.Bytes` or `Halves` in the place of arrays.
    """

    n_steps: jax.Array
    inner_state: Any


class Halves(NamedTuple):
    """An array in two bytes a number.

    Attributes:
      values: bfloat16, of the array's shape.
    """

    values: jax.Array


@checked
def narrow_state(
    optimizer: Any,
    bits: Literal[8, 16] = 8,
    *,
    min_size: Size = 4096,
    which: Callable[..., Any] | None = None,
    net: Layer | None = None,
) -> Any:
    """Keeps the moments of any optimizer in 8 or 16 bits between its steps.

    With a state s, the optimizer's step f, and Q what rounds::

        u, s' = f(g, Q⁻¹(q))        q' = Q(s')

    8 bits are those of `blockwise`: blocks of 256 numbers that share a scale, and a code that is
    fine near 0, so that the small numbers of a second moment keep their precision. It takes 1.02
    bytes a number, 2.03 a parameter for Adam. 16 bits are bfloat16. Second moments, and all that is
    bfloat16, are rounded by chance and not to the nearest: they change by less a step than narrow
    numbers can tell, and would freeze. The chances come from the number of the step, so a run that
    resumes is the same bit for bit.

    No array of moments is ever wide in memory: the step is computed once for the scales, once for
    what is kept, and once for the weights, each time only as far as that needs.

    Biases, scales and small arrays stay float32, and so does what is no moment, such as learning
    rates, which reports still find. Weights that `Repeat` stacked never share a block with another
    layer.

    Args:
      optimizer: a recipe such as `adamw` or `muon`, or any `optax.GradientTransformation`.
      bits: 8, or 16 for bfloat16.
      min_size: arrays of fewer numbers stay float32.
      which: whether the array at a path of the optimizer's state, ``'0/mu/dense/kernel'``, is a
        moment to be kept so; None goes by the names that optax gives moments, `MOMENTS`.
      net: the model, whose vectors are biases and scales, and which is told to the recipe; None
        takes that of the `Loop`. Without a model, names of weights decide, as in
        `trees.decay_mask`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      TypeError, ValueError: for an argument of another type, or another number of bits; when used,
        if the optimizer keeps large arrays, and none that is known as a moment.

    References:
      Dettmers et al. 2022, https://arxiv.org/abs/2110.02861
    """
    optax = require('optax', 'train')
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f'optimizers.narrow_state: {optimizer!r} is no optax.GradientTransformation: give e.g. '
            'optimizers.adamw(1e-3)'
        )
    named = _is_moment if which is None else lambda path, keys: bool(which(path))

    def made(net: Layer | None) -> Any:
        inner = optax.with_extra_args_support(optimizer if net is None else bound(optimizer, net))

        def init(weights: Any) -> NarrowState:
            state = jax.lax.optimization_barrier(inner.init(weights))  # zeros, not to be folded
            chosen = _chosen(state, _spared(net, weights), named, min_size)
            n_steps = jnp.zeros((), jnp.int32)
            return NarrowState(n_steps, _narrowed(state, chosen, bits, n_steps))

        def update(grads: Any, state: NarrowState, weights: Any = None, **extra: Any) -> Any:
            chosen = jax.tree.map(_is_narrow, state.inner_state, is_leaf=_is_narrow)
            n_steps = optax.safe_increment(state.n_steps)

            def step(given: Any) -> Any:
                grads, kept, weights = given
                return inner.update(grads, _widened(kept), weights, **extra)

            # Computed anew for each of what reads the wide moments, which so are never laid out.
            given = grads, state.inner_state, weights
            again = jax.lax.optimization_barrier
            scales = _scales(step(again(given))[1], chosen) if bits == 8 else []
            later, scales = again((given, scales))
            kept = _narrowed(step(later)[1], chosen, bits, n_steps, scales)
            steps, new = step(again(given))
            kept = jax.tree.map(lambda yes, a, b: a if yes else b, chosen, kept, new)
            return steps, NarrowState(n_steps, kept)

        return optax.GradientTransformationExtraArgs(init, update)

    return for_model('optimizers.narrow_state', made, net)


def _is_narrow(x: Any) -> bool:
    return isinstance(x, (blockwise.Bytes, Halves))


def _widened(state: Any) -> Any:
    """A state with float32 arrays in the places of narrow ones."""

    def one(x: Any) -> Any:
        if isinstance(x, Halves):
            return x.values.astype(jnp.float32)
        return blockwise.wide(x) if isinstance(x, blockwise.Bytes) else x

    return jax.tree.map(one, state, is_leaf=_is_narrow)


def _scales(state: Any, chosen: Any) -> list[jax.Array]:
    """The scales of the arrays that are chosen, in their order."""
    both = zip(jax.tree.leaves(state), jax.tree.leaves(chosen), strict=True)
    return [blockwise.scales(x) for x, yes in both if yes]


def _narrowed(
    state: Any, chosen: Any, bits: int, n_steps: jax.Array, scales: Iterable[jax.Array] = ()
) -> Any:
    """A state with narrow arrays in the places that are chosen, a tree of bools.

    The scales of 8 bits, in their order, are those given, if they are.
    """
    leaves, structure = jax.tree.flatten(state)
    key = jax.random.fold_in(jax.random.key(0), n_steps)
    known = iter(scales)

    def one(i: int, x: jax.Array) -> Any:
        own = jax.random.fold_in(key, i)
        if bits == 16:
            return Halves(rounding.to_bfloat16(x, own))
        return blockwise.narrow(x, own, next(known, None))

    pairs = enumerate(zip(leaves, jax.tree.leaves(chosen), strict=True))
    return jax.tree.unflatten(structure, [one(i, x) if yes else x for i, (x, yes) in pairs])


def _spared(net: Layer | None, weights: Tree) -> dict[str, bool]:
    """For the path of each weight, whether it is a bias or a scale."""
    flat = trees.flatten(decayed(net, weights))
    return {path: not decays for path, decays in flat.items() if decays is not None}


def _chosen(state: Any, spared: dict[str, bool], named: Any, min_size: int) -> Any:
    """A tree like a state: True at the arrays that are to be narrow.

    Raises:
      ValueError: if there are large arrays of weights, and none is a moment.
    """
    others: list[str] = []

    def one(keys: Any, x: Any) -> bool:
        path = jax.tree_util.keystr(keys, simple=True, separator='/')
        fits = x.ndim > 0 and x.dtype == jnp.float32 and x.size >= min_size
        if not fits or x.shape[-1] < _SHORTEST or _of(path, spared):
            return False
        chosen = named(path, keys)
        if not chosen:
            others.append(path)
        return chosen

    made = jax.tree_util.tree_map_with_path(one, state)
    if others and not any(jax.tree.leaves(made)):
        raise ValueError(
            f'optimizers.narrow_state finds no moment in the state of this optimizer, where '
            f'{others[0]!r} is large: say which=lambda path: … is one, or leave narrow_state out'
        )
    return made


def _of(path: str, spared: dict[str, bool]) -> bool:
    """Whether an array of a state belongs to a weight that is spared: its path holds the weight's.

    The longest such path counts.
    """
    held = [weight for weight in spared if f'/{weight}/' in f'/{path}/']
    return spared[max(held, key=len)] if held else False


def _is_moment(_: str, keys: Any) -> bool:
    """Whether a field of a state that an array lies in is called like a moment."""
    return any(getattr(key, 'name', None) in MOMENTS for key in keys)
