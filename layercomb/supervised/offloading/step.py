"""The jitted step of training whose stacks live in host memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from layercomb import losses, trees
from layercomb.checks import ChunkLen
from layercomb.layers.core.layer import Layer
from layercomb.layers.metrics.metric import Metric
from layercomb.parallel import halves
from layercomb.parallel.gathered import gathered
from layercomb.parallel.layout import ALONE, Layout
from layercomb.parallel.specs import like_tree
from layercomb.parallel.streams import streamed, unwrapped_ties
from layercomb.parallel.swapped import Held, stacks, swapped
from layercomb.supervised import steps
from layercomb.supervised.offloading.across import Across, across
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
    net: Layer,
    loss: Metric,
    optimizer: Any,
    chunk_len: ChunkLen | None,
    host_inputs: bool,
    layout: Layout = ALONE,
    by_parts: bool = True,
    streams: bool = False,
) -> Callable[..., tuple[steps.Carry, steps.Metrics]]:
    """The jitted training step, as of `steps.compiled`, for a carry as `Places` puts it.

    Args:
      net: gives logits.
      loss: a metric with a gradient.
      optimizer: an `optax.GradientTransformation` that moves each block by itself.
      chunk_len: how many positions of logits exist at a time, as of `losses.attach`.
      host_inputs: whether the inputs of blocks that keep them are in host memory.
      layout: where the arrays are.
      by_parts: whether the optimizer moves each number by itself.
      streams: whether residual streams are in host memory.
    """
    n_blocks = stacks(net)
    layout.check_spans(net)
    whole = losses.attach(net if streams else swapped(net, host_inputs), loss, chunk_len)
    whole = _with_streams(whole, n_blocks) if streams else whole

    def step(
        carry: steps.Carry, frozen: Tree, key: jax.Array, batch: steps.Batch
    ) -> tuple[steps.Carry, steps.Metrics]:
        key = jax.random.fold_in(key, carry.step)
        like = jax.eval_shape(halves.joined, carry.trainable)
        parts = divided(optimizer, like, n_blocks)
        together = across(layout, net, like, parts, by_parts)
        arrays = by_name(carry.opt_state)
        rest = outside(halves.first(carry.trainable), n_blocks)
        stacked, shared = _of_stacks(carry.trainable, arrays, parts)
        specs = layout.by_rows(net, trees.merge(carry.trainable, frozen))
        scored = steps.Scored(gathered(whole, specs, layout.cut), loss, layout)
        moving = _Moving(scored, optimizer, parts, like, together)
        of_rest, everywhere = like_tree(specs, rest), PartitionSpec()
        of_stacks, _ = _of_stacks(like_tree(specs, carry.trainable), together.of_state, parts)
        given = of_rest, of_stacks, like_tree(specs, frozen), *(everywhere,) * 3, layout.of_batch
        made = everywhere, everywhere, of_rest, of_stacks, everywhere
        value, state, grads, stacked, squares = layout.each(moving, given, made)(
            rest, stacked, frozen, shared, carry.state, key, batch
        )
        made_rest, rest_state = update(
            optimizer, grads, parts.rest.state(arrays), rest, value, unknown_loss
        )
        trainable, rest_state, state = (
            layout.constrained(net, like, x) for x in (made_rest, rest_state, state)
        )
        arrays = {**arrays, **by_name(rest_state)}
        for path, (weights, moments) in stacked.items():
            trainable = replaced(trainable, path, weights)
            arrays |= moments
        opt_state = parts.whole.state(arrays)
        metrics = {'loss': value, 'grad_norm': jnp.sqrt(jnp.square(steps.norm(grads)) + squares)}
        metrics |= steps.learning_rate(opt_state)
        return steps.Carry(trainable, state, opt_state, carry.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _of_stacks(trainable: Tree, of_state: Mapping[str, Any], parts: Divided) -> tuple[Any, Any]:
    """(weights and moments of its own, what it shares) of each stack, or their specs."""
    stacked = {
        path: (subtree(trainable, path), {name: of_state[name] for name in part.own})
        for path, part in parts.stacks.items()
    }
    shared = {
        path: {name: of_state[name] for name in part.names if name not in part.own}
        for path, part in parts.stacks.items()
    }
    return stacked, shared


@dataclasses.dataclass(frozen=True)
class _Moving:
    """What each device computes: a gradient of what is outside of stacks, and stacks that moved.

    Attributes:
      scored: the model that reads weights where they are.
      optimizer: moves each block.
      parts: of its state.
      like: the weights that train.
      together: what devices do when a block is moved.
    """

    scored: steps.Scored
    optimizer: Any
    parts: Divided
    like: Tree
    together: Across

    def __call__(
        self, rest: Tree, stacked: Any, frozen: Tree, shared: Any, state: Tree, key: Any, batch: Any
    ) -> tuple[jax.Array, Tree, Tree, Any, jax.Array]:
        """(loss, state, gradient of the rest, weights and moments of stacks, Σ gradient²)."""
        moved: set[str] = set()

        def mean(rest: Tree, trained: Any) -> tuple[jax.Array, Tree]:
            weights, others = rest, frozen
            for path, its in trained.items():
                move = functools.partial(self._moved, path, moved)
                held = Held(its[0], subtree(frozen, path), its[1], its[2], shared[path], move)
                weights = replaced(weights, path, held)
                others = replaced(others, path, None)
            return steps.mean(self.scored, weights, others, state, key, batch)

        trained = {path: (*its, jnp.zeros((), jnp.float32)) for path, its in stacked.items()}
        gradient = jax.value_and_grad(mean, argnums=(0, 1), has_aux=True)
        (value, state), (grads, trained) = gradient(rest, trained)
        _check_moved(self.parts.stacks.keys() - moved)
        layout = self.scored.layout
        grads = layout.summed(grads, like_tree(self.together.of_weights, grads))
        squares = sum((its[2] for its in trained.values()), jnp.float32(0))
        stacked = {path: its[:2] for path, its in trained.items()}
        return layout.sum(value), layout.mean(state), grads, stacked, squares

    def _moved(
        self, path: str, moved: set[str], grads: Tree, moments: Any, shared: Any, weights: Tree
    ) -> tuple[Tree, Any, jax.Array]:
        """The new weights and moments of a block, which the optimizer sees as a stack of one."""
        moved.add(path)
        part, nothing = self.parts.stacks[path], only(outside(self.like, (path,)), path)
        own = {name: opened(x, self.parts.abstract[name]) for name, x in moments.items()}

        def move(grads: Tree, own: dict[str, Any], weights: Tree) -> tuple[Tree, dict[str, Any]]:
            made, state = update(
                self.optimizer, grads, part.state({**shared, **own}), weights,
                jnp.zeros((), jnp.float32), unknown_loss,
            )  # fmt: skip
            new = by_name(state)
            return made, {name: new[name] for name in part.own}

        whole, squares = self.together.summed(replaced(nothing, path, grads))
        made, new = self.together.moved(move, whole, own, replaced(nothing, path, weights))
        return subtree(made, path), {name: closed(x) for name, x in new.items()}, squares


def _with_streams(whole: Layer, n_blocks: Mapping[str, int]) -> Layer:
    """A model with its loss whose streams are in host memory, as are the blocks of its stack."""
    made = streamed(whole)
    inside: Any = unwrapped_ties(made)
    others = sorted(n_blocks.keys() - {inside.stack_key})
    if others:
        raise ValueError(
            f"offload='blocks+streams': beside the reversible stack, {others[0]!r} is a stack too: "
            "take offload='streams', or 'blocks'"
        )
    return made


def _check_moved(left: set[str]) -> None:
    """Raises for stacks whose gradient was not asked for: their weights would be lost."""
    for path in sorted(left):
        raise ValueError(
            f"offload='blocks': the loss does not depend on the outputs of {path!r}, so that its "
            'blocks are not reached backwards: leave offload out'
        )
