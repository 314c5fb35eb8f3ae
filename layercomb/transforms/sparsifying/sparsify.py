"""`sparsify`: dense feed-forwards made mixtures of experts."""

from __future__ import annotations

import logging
import re
from typing import Any

import jax
import numpy as np

from layercomb.checks import Count, Size, checked
from layercomb.layers.core.layer import Layer, init_state
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.state.parts import AuxLoss, take_out
from layercomb.shapes import is_float
from layercomb.transforms.quantization.calibration.values import batches_of, stack_of
from layercomb.transforms.sparsifying.fitting import fitted
from layercomb.transforms.sparsifying.placing import Sizes, feed_forwards, placed
from layercomb.transforms.sparsifying.units import Array
from layercomb.transforms.sparsifying.walking import Fitting, Rows
from layercomb.trees import Tree

_LOG = logging.getLogger(__name__)
_SHOWN = 20  # paths in an error


@checked
def sparsify(
    net: Layer,
    weights: Any,
    batches: Any,
    *,
    n_experts: Size = 32,
    n_chosen: Size = 14,
    n_shared: Count = 2,
    where: str | None = None,
    state: Any = None,
    seed: int = 0,
) -> tuple[Layer, Tree]:
    """The same model with mixtures of experts in the place of its dense feed-forwards.

    A feed-forward is a `GatedDense` and a `Dense`, or a `Dense`, an activation and a `Dense`, that
    is wider inside and gives back the width that it takes. It becomes a `MixtureFF` with the same
    units in another order, of which a position reads (n_shared + n_chosen) / n_experts::

        dense    y = Σᵤ hᵤ(x) W₂[u]                          over all units u
        mixture  y = Σᵤ hᵤ(x) W₂'[u] + Σₑ 2 s[e] yₑ          over shared u, and chosen e
                 yₑ = Σᵤ hᵤ(x) W₂'[u]                        over the units of e

    Shared are the units with the largest mean of (hᵤ |W₂[u]| / |y|)². The others are put together
    so that few experts hold most of a position's sum of these squares. The router Wᵣ, b is a ridge
    regression of the root of each expert's sum on x. Experts and router are made in turns: units go
    to the experts that the router chooses where they add most. Its logits are small, so that all
    gates s are about a half, and it still learns. Then W₂' is the ridge regression that brings y
    nearest to that of the dense layer, as near to W₂ as that allows; a model with biases has its b₂
    fitted, too. Mixtures are fitted one after the other, to what comes through those before.

    If all experts are chosen, the model computes what it did. If few are, what it computes differs
    much, and it is to be trained afterwards, as any model: with ``lc.Loop``, ``TrainTask`` and the
    loss that it was trained with. The result is the same each time.

    Blocks of a `Repeat` have experts of their own, stacked as the weights were. Weights that a
    `Map`, or a `Repeat` with ``shared=True``, uses several times are fitted to the inputs of all
    uses. Other weights, and their paths, stay. A `Dropout` inside a feed-forward is left out. The
    errors of each layer are logged, at the level INFO.

    Args:
      net: any layer, stacked or `unstack`ed.
      weights: its weights, which are not changed; those of feed-forwards are not narrow.
      batches: of what the model reads, without padding: an iterable of arrays such as token ids
        (B, L), or of tuples if the model takes several inputs. 10,000 positions are few. All are
        held in memory as the inputs of one layer, and as its hidden units.
      n_experts: E, which divides the number of units of each feed-forward.
      n_chosen: K, how many experts a position chooses.
      n_shared: S, how many more all positions use.
      where: a regular expression, such as ``'encoder'``, or ``'^(?!decoder)'`` for all but the
        decoder's; only feed-forwards whose first matrix has a path that it matches somewhere are
        changed. None changes all.
      state: of the model; it is needed if there are running statistics.
      seed: of the order of units that the search for experts begins with.

    Returns:
      (layer, weights).

    Raises:
      TypeError: for batches that the model does not take.
      ValueError: if no feed-forward is found; if n_experts does not divide its units, or S + K is
        more than E; if it has narrow or tied weights, adapters, or a bias beside its gate; if it is
        inside a layer that is not entered, such as `Segmented`; if the batches have fewer positions
        than x has features; if values are not finite; if a state is needed.

    References:
      Zhang et al. 2021, MoEfication, https://arxiv.org/abs/2110.01786; Zhu et al. 2024, LLaMA-MoE,
      https://arxiv.org/abs/2406.16554; Dai et al. 2024, shared experts,
      https://arxiv.org/abs/2401.06066

    >>> import jax
    >>> from layercomb import shape_dtype, tl, transforms
    >>> net = tl.Residual(tl.GatedDense(64), tl.Dense(8, use_bias=False))
    >>> weights, _ = net.init(shape_dtype((2, 8)), jax.random.key(0))
    >>> batches = [jax.random.normal(jax.random.key(1), (32, 8))]
    >>> transforms.sparsify(net, weights, batches, n_experts=8, n_chosen=3, n_shared=1)[0]
    Residual(MixtureFF(64, 8, n_chosen=3))
    """
    _check_pattern(where)
    sizes = Sizes(n_experts, n_chosen, n_shared, where)
    MixtureFF(n_experts, *sizes[:3])  # says which numbers do not go together
    given = batches_of(net, batches, 'sparsify: batches')
    net.output_signature(given[0], Mode.EVAL)  # says what the model does not take
    made, dense = placed(net, weights, sizes)
    if made == net:
        raise ValueError(_nothing_found(net, where))
    state = _state(net, given[0]) if state is None else state

    def fit(mixture: MixtureFF, own: Tree, read: Rows, path: str) -> Tree:
        its_weights, errors = fitted(mixture, own, _rows(read, path), seed)
        _LOG.info('%s: %s', path, errors)
        return its_weights

    walked = Fitting(fit).through(made, dense, state, '', stack_of(given))
    return walked[:2]


def _check_pattern(where: str | None) -> None:
    """Raises a ValueError for what is no regular expression, such as ``'*feed_forward*'``."""
    try:
        re.compile(where or '')
    except re.error as e:
        raise ValueError(
            f'sparsify: where={where!r} is no regular expression ({e}): it need match a part of a '
            "path only, as where='feed_forward' does"
        ) from e


def _nothing_found(net: Layer, where: str | None) -> str:
    """Why nothing became sparse, and what can be done."""
    there = feed_forwards(net) if where else []
    if there:
        shown = ', '.join(map(repr, there[:_SHOWN])) + (', …' if there[_SHOWN:] else '')
        return (
            f'sparsify: no dense feed-forward has a path that matches where={where!r}: their first '
            f'matrices are at {shown}'
        )
    sparse = [path for path, layer in walk(net) if isinstance(layer, MixtureFF)]
    found = f'; {sparse[0]!r} is a mixture already' if sparse else ''
    return (
        f'sparsify: no dense feed-forward in this {type(net).__name__}{found}: it looks '
        'for a GatedDense and a Dense, or a Dense, an activation and a Dense, one after the other '
        'in a Serial or Residual, wider inside, that give back the width they take'
    )


def _state(net: Layer, inputs: Any) -> Tree:
    """The state of a model that has none of importance."""
    state = init_state(net, inputs, Mode.EVAL)
    if any(is_float(x) for x in jax.tree.leaves(take_out(state, AuxLoss)[0])):
        raise ValueError(
            'sparsify: the model has a state, such as running statistics, that its inputs depend '
            'on: give state='
        )
    return state


def _rows(values: Rows, path: str) -> Array:
    """All positions of all batches, (T, D), in float32."""
    x = np.concatenate([np.asarray(x, np.float32).reshape(-1, x.shape[-1]) for x in values])
    if len(x) < x.shape[1]:
        raise ValueError(
            f'sparsify: the batches have {len(x)} positions, too few to fit the router at {path!r} '
            f'to {x.shape[1]} features: give {x.shape[1]} at the least, and better ten thousand'
        )
    if not np.isfinite(x).all():
        raise ValueError(
            f'sparsify: with these batches, the feed-forward at {path!r} gets inputs that are not '
            'finite: look for ids outside the vocabulary, and for weights that are NaN'
        )
    return x
