"""The jitted step of training whose stacks live in host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import losses
from layercomb.checks import ChunkLen
from layercomb.layers.core.layer import Layer
from layercomb.layers.metrics.metric import Metric
from layercomb.parallel import halves
from layercomb.parallel.layout import ALONE
from layercomb.parallel.swapped import Held, stacks, swapped
from layercomb.supervised import steps
from layercomb.supervised.offloading.dividing import (
    Divided,
    by_name,
    divided,
    only,
    outside,
    replaced,
    subtree,
)
from layercomb.supervised.offloading.independence import unknown_loss
from layercomb.supervised.offloading.wire import closed, opened
from layercomb.supervised.updates import update
from layercomb.trees import Tree


@functools.lru_cache(maxsize=16)
def compiled(
    net: Layer, loss: Metric, optimizer: Any, chunk_len: ChunkLen | None, host_inputs: bool
) -> Callable[..., tuple[steps.Carry, steps.Metrics]]:
    """The jitted training step, as of `steps.compiled`, for a carry as `Places` puts it.

    Args:
      net: gives logits.
      loss: a metric with a gradient.
      optimizer: an `optax.GradientTransformation` that moves each block by itself.
      chunk_len: how many positions of logits exist at a time, as of `losses.attach`.
      host_inputs: whether the inputs of blocks that keep them are in host memory.
    """
    n_blocks = stacks(net)
    scored = steps.Scored(losses.attach(swapped(net, host_inputs), loss, chunk_len), loss, ALONE)

    def step(
        carry: steps.Carry, frozen: Tree, key: jax.Array, batch: steps.Batch
    ) -> tuple[steps.Carry, steps.Metrics]:
        key = jax.random.fold_in(key, carry.step)
        like = jax.eval_shape(halves.joined, carry.trainable)
        parts = divided(optimizer, like, n_blocks)
        arrays = by_name(carry.opt_state)
        rest = outside(halves.first(carry.trainable), n_blocks)
        trained = {
            path: (
                subtree(carry.trainable, path),
                {name: arrays[name] for name in part.own},
                jnp.zeros((), jnp.float32),
            )
            for path, part in parts.stacks.items()
        }

        moved: set[str] = set()

        def mean(rest: Tree, trained: Any) -> tuple[jax.Array, Tree]:
            weights, others = rest, frozen
            for path, its in trained.items():
                move = functools.partial(_moved, optimizer, parts, path, like, moved)
                shared = {name: arrays[name] for name in parts.rest.names}
                held = Held(its[0], subtree(frozen, path), its[1], its[2], shared, move)
                weights = replaced(weights, path, held)
                others = replaced(others, path, None)
            return steps.mean(scored, weights, others, carry.state, key, batch)

        gradient = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
        (value, state), (grads, trained) = gradient(rest, trained)
        _check_moved(parts.stacks.keys() - moved)
        made, rest_state = update(
            optimizer, grads, parts.rest.state(arrays), rest, value, unknown_loss
        )
        arrays = {**arrays, **by_name(rest_state)}
        squares = jnp.square(steps.norm(grads))
        for path, (weights, moments, its_squares) in trained.items():
            made, squares = replaced(made, path, weights), squares + its_squares
            arrays |= moments
        opt_state = parts.whole.state(arrays)
        metrics = {'loss': value, 'grad_norm': jnp.sqrt(squares)}
        metrics |= steps.learning_rate(opt_state)
        return steps.Carry(made, state, opt_state, carry.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _moved(
    optimizer: Any, parts: Divided, path: str, like: Tree, moved: set[str],
    grads: Tree, moments: Any, shared: Any, weights: Tree,
) -> tuple[Tree, Any]:  # fmt: skip
    """The new weights and moments of a block, which the optimizer sees as a stack of one."""
    moved.add(path)
    part, nothing = parts.stacks[path], only(outside(like, (path,)), path)
    own = {name: opened(x, parts.abstract[name]) for name, x in moments.items()}
    made, state = update(
        optimizer,
        replaced(nothing, path, grads),
        part.state({**shared, **own}),
        replaced(nothing, path, weights),
        jnp.zeros((), jnp.float32),
        unknown_loss,
    )
    new = by_name(state)
    return subtree(made, path), {name: closed(new[name]) for name in part.own}


def _check_moved(left: set[str]) -> None:
    """Raises for stacks whose gradient was not asked for: their weights would be lost."""
    for path in sorted(left):
        raise ValueError(
            f"offload='blocks': the loss does not depend on the outputs of {path!r}, so that its "
            'blocks are not reached backwards: leave offload out'
        )
