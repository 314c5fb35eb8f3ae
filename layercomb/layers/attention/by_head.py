"""`by_head`: which layers can compute attention one head at a time, one rule per class."""

from __future__ import annotations

import re

import jax

from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.basic.normalization import LayerNorm, RMSNorm
from layercomb.layers.core.layer import Layer
from layercomb.layers.decoding.once import Once
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.layers.reversible.rules import Rules
from layercomb.trees import Tree


@Rules
def by_head(layer: Layer, weights: Tree) -> Tree | None:
    """The weights of a layer split by head, on a leading axis H; None if it cannot be split.

    Inside reversible layers, a multi-head layer is computed head by head if each of its parts has a
    rule, the streams are float32 and the platform is a CPU. Queries, keys and values of all heads
    then never exist at once. The default rule returns None: all heads are computed at once.

    `SplitHeads` and `MergeHeads` return a tree of split weights. Layers without weights, such as
    `DotProductAttention`, `LSHAttention` and `RotaryPositions`, return their ``{}``. A leading axis
    of another length G, which divides H, is of weights that H/G heads in turn share: of a
    projection to G heads of keys, or of `RMSNorm`, whose weights all heads share (G = 1).

    Register a rule for your own layer with `by_head.register`. The layer must meet these
    conditions:

    * given the weights of one head and values (B, 1, …), it computes the same as for that head
      among all H;
    * a projection from heads gives that head's term of the sum over heads;
    * a core takes one random key per head, and has no state but decisions (B, H, …).

    A subclass that overrides `apply` does not inherit the rule of its base class.

    Args:
      layer: a part of a multi-head layer: a projection, positions, or the core.
      weights: its weights.

    Returns:
      A tree with the same keys, each array (H, …), or (G, …) if H/G heads share it; or None.

    >>> import jax, jax.numpy as jnp
    >>> from layercomb import tl
    >>> class Scaled(tl.Layer):
    ...     '''Copies the features to each head, times a number per head.'''
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
    """The rule of layers without weights that treat every head alike.

    Args:
      layer: the layer; not used.
      weights: its weights, ``{}``, or a tree of such.

    Returns:
      `weights`, unchanged.
    """
    return weights


by_head.register(RotaryPositions)(as_it_is)


@by_head.register(LayerNorm)
@by_head.register(RMSNorm)
def _shared(layer, weights):
    return jax.tree.map(lambda x: x[None], weights)  # (1, K)


@by_head.register(Once)
def _inner(layer, weights):
    return by_head(layer.layer, weights)


@by_head.register(AssertShape)
def _if_one_head_fits(layer, weights):
    if not fits_one_head(layer.spec):
        return None
    return weights if layer.changes_nothing else by_head(layer.layer, weights)


def fits_one_head(spec: str) -> bool:
    """Whether a spec for values (B, H, …) also fits one head of them, (B, 1, …).

    It does not if it gives H as a number, or uses the letter of H for another axis. A letter beside
    '...' might stand for H, so it counts as not fitting.

    Args:
      spec: as of `AssertShape`, e.g. ``'bhlk,bhmk->bhlk'``.

    >>> fits_one_head('bhlk,bhmk->bhlk'), fits_one_head('b2lk'), fits_one_head('bhlh')
    (True, False, False)
    """
    specs = re.split('->|,', spec.replace(' ', ''))
    heads = {one[1] for one in specs if len(one) == 4 and '.' not in one}
    others = {c for one in specs for c in (one[0] + one[2:] if one[1:2] in heads else one)}
    dotted = all(re.fullmatch(r'\w?\.\.\.\w?\w?', one) for one in specs if '.' in one)
    return dotted and not heads & others and not any(head.isdigit() for head in heads)
