"""`by_head`: which parts of attention can be computed for one head at a time, a rule a class."""

from __future__ import annotations

import re

from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.core.layer import Layer
from layercomb.layers.decoding.once import Once
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.layers.reversible.rules import Rules
from layercomb.trees import Tree


@Rules
def by_head(layer: Layer, weights: Tree) -> Tree | None:
    """The weights of each head alone, on a leading axis H; None if a layer needs all heads at once.

    Inside reversible layers a multi-head layer goes head by head if each of its parts has a rule:
    queries, keys and values of all heads then never exist at once. This also takes float32 streams
    and a CPU. By default the answer is None, and attention is computed for all heads at once. It is
    another tree for `SplitHeads` and `MergeHeads`; layers without weights, such as
    `DotProductAttention`, `LSHAttention` and `RotaryPositions`, answer with the ``{}`` they have.

    A layer of one's own joins by `by_head.register`, under these conditions. Given the weights of
    one head, as if H were 1, it computes of (B, 1, …) what it computes for that head among all. A
    projection from heads gives that head's part of a sum. A core draws for (B, H, …) from one key a
    head, and has no state but decisions (B, H, …). A subclass that overrides `apply` does not
    inherit the rule of the class above.

    Args:
      layer: a part of a multi-head layer: a projection, positions, or the core.
      weights: its weights.

    Returns:
      A tree of the same keys, each array (H, …).

    >>> import jax, jax.numpy as jnp
    >>> from layercomb import tl
    >>> class Scaled(tl.Layer):
    ...     '''Heads of features as they are, times a number for each head.'''
    ...     n_heads: int
    ...
    ...     def init(self, signature, rng, mode=tl.Mode.TRAIN):
    ...         return {'scale': jnp.ones(self.n_heads)}, {}
    ...
    ...     def apply(self, weights, state, inputs, *, rng=None, mode=tl.Mode.EVAL):
    ...         (x,) = inputs
    ...         return (x[:, None] * weights['scale'][:, None, None],), state
    >>> @tl.by_head.register(Scaled)
    ... def _(layer, weights):
    ...     return {'scale': weights['scale'][:, None]}  # (H, 1): as `Scaled(1)` has it
    >>> tl.by_head(Scaled(2), {'scale': jnp.ones(2)})['scale'].shape
    (2, 1)
    """
    return None


def as_it_is(layer: Layer, weights: Tree) -> Tree:
    """The rule of layers without weights that treat every head alike."""
    return weights


by_head.register(RotaryPositions)(as_it_is)


@by_head.register(Once)
def _inner(layer, weights):
    return by_head(layer.layer, weights)


@by_head.register(AssertShape)
def _if_one_head_fits(layer, weights):
    if not fits_one_head(layer.spec):
        return None
    return weights if layer.changes_nothing else by_head(layer.layer, weights)


def fits_one_head(spec: str) -> bool:
    """Whether a spec that fits values (B, H, …) fits one of their heads too, where H is 1.

    It does not if it gives H a number, or uses its letter for another axis. A letter beside '...'
    may be that of H; then it counts as not fitting.

    >>> fits_one_head('bhlk,bhmk->bhlk'), fits_one_head('b2lk'), fits_one_head('bhlh')
    (True, False, False)
    """
    specs = re.split('->|,', spec.replace(' ', ''))
    heads = {one[1] for one in specs if len(one) == 4 and '.' not in one}
    others = {c for one in specs for c in (one[0] + one[2:] if one[1:2] in heads else one)}
    dotted = all(re.fullmatch(r'\w?\.\.\.\w?\w?', one) for one in specs if '.' in one)
    return dotted and not heads & others and not any(head.isdigit() for head in heads)
