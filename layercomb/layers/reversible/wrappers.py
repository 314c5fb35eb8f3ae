"""The rules of layers around one other, and of dropout."""

from __future__ import annotations

from layercomb.layers.basic.assert_shape import AssertShape
from layercomb.layers.basic.dropout import Dropout
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.decoding.once import Once
from layercomb.layers.reversible.one_pass import is_diagonal, one_pass, recomputes


@one_pass.register(Remat)
@one_pass.register(Once)
def _inner(layer, weights, state, inputs, cts, **given):
    """The inner layer's rule: in one pass there is nothing to compute again."""
    return one_pass(layer.layer, weights, state, inputs, cts, **given)


@one_pass.register(AssertShape)
def _between_checks(layer, weights, state, inputs, cts, **given):
    """The inner layer's rule, between the checks."""
    sizes = layer.check_before(inputs)
    made = one_pass(layer.layer, weights, state, inputs, cts, **given)
    layer.check_after(made[0], sizes)
    return made


@recomputes.register(Remat)
@recomputes.register(Chunk)
def _always(layer):
    return True


@recomputes.register(AssertShape)
def _as_inside(layer):
    return recomputes(layer.layer)


@is_diagonal.register(Dropout)
def _mask_from_the_key(layer):
    return True


@is_diagonal.register(AssertShape)
def _of_one_value(layer):
    return layer.n_in == 1 if layer.changes_nothing else is_diagonal(layer.layer)
