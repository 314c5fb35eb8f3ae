"""`sparsify`: dense feed-forwards made mixtures of experts."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
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
from layercomb.transforms.sparsifying.placing import Sizes, placed
from layercomb.transforms.sparsifying.walking import Fitting, Rows
from layercomb.trees import Tree

_LOG = logging.getLogger(__name__)


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
    sizes = Sizes(n_experts, n_chosen, n_shared, where)
    MixtureFF(n_experts, *sizes[:3])  # says which numbers do not go together
    given = batches_of(net, batches, 'sparsify: batches')
    made, dense = placed(net, weights, sizes)
    _check_found(net, made, where)
    if state is None:
        state = init_state(net, given[0], Mode.EVAL)

    def fit(mixture: MixtureFF, own: Tree, now: Rows, before: Rows, path: str) -> Tree:
        x, was = (np.concatenate([_flat(rows) for rows in each]) for each in (now, before))
        fit_weights, errors = fitted(mixture, own, x, was, seed)
        _LOG.info('%s: errors %.3f with the best experts, %.3f with those that the router chooses, %.3f fitted', path, *errors)
        return fit_weights

    walked = Fitting(fit, len(given)).through(made, dense, state, '', stack_of(given + given))
    return walked[0], walked[1]


def _flat(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float32).reshape(-1, x.shape[-1])


def _check_found(net, made, where): pass
