"""The memory of a training step before it is taken, with stacks in host memory and without."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.capture import capture
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.facts.devices import SPLIT_AXES
from layercomb.optimizers.tensors import bound
from layercomb.parallel.layout import Layout
from layercomb.parallel.swapped import rewritten, stacks
from layercomb.shapes import Signature
from layercomb.supervised import steps
from layercomb.supervised.offloading import places_of
from layercomb.supervised.offloading.dividing import by_name, divided, is_inside
from layercomb.supervised.tasks import TrainTask, reading
from layercomb.trees import Tree


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a step of a task takes: it is traced or compiled, and not run.

    Attributes:
      net: the model.
      task: what it trains on.
      signature: of a batch.
      layout: where arrays are.
    """

    net: Layer
    task: TrainTask
    signature: Signature
    layout: Layout

    def plain(self) -> dict[str, int]:
        """Bytes on a device: 'weights', 'optimizer', and 'temporaries' as its compiler plans them.

        Raises:
          ValueError: if the mesh does not divide a weight or the rows of a batch.
        """
        task, rows = self.task, self.signature[0].shape[0]
        self.layout.check_rows(rows, 'a batch', task.accumulate * task.loss.together)
        carry, frozen = self._arguments()
        step: Any = steps.of_task(task, self._optimizer, reading(task, self.net), self.layout)
        key = jax.eval_shape(jax.random.key, 0)
        batch = self.layout.abstract_rows(self.signature)
        memory = step.lower(carry, frozen, key, batch).compile().memory_analysis()
        return {
            'weights': self.layout.bytes_of_one((carry.trainable, frozen)),
            'optimizer': self.layout.bytes_of_one(carry.opt_state),
            'temporaries': memory.temp_size_in_bytes,
        }

    def offloaded(self, offload: str) -> dict[str, int]:
        """The same of a step whose stacks are in host memory, and bytes of that, 'host'.

        The device holds what is outside of stacks, one block of each, and the temporaries of a
        model whose stacks have one block, which is compiled. Blocks that are not reversible keep
        their inputs.

        Args:
          offload: as for `Loop`.

        Raises:
          ValueError: if the run would be refused.
        """
        if 'streams' in offload:
            raise ValueError(
                f'offload={offload!r}: what streams take is not told yet, only what blocks do: ask '
                "for --offload blocks, and see docs/scaling.md for streams' bytes a token"
            )
        places = places_of(offload, self.task, self.net, self._optimizer, self.layout)
        assert places is not None
        carry, frozen = self._arguments()
        places.checked(carry.trainable)
        n_blocks, bytes_of = stacks(self.net), self.layout.bytes_of_one
        parts = divided(self._optimizer, carry.trainable, n_blocks)
        flat = trees.flatten(trees.merge(carry.trainable, frozen))
        state, takes = by_name(carry.opt_state), self._of_one_block().plain()
        weights, optimizer, host = bytes_of(flat), bytes_of(state), 0
        for path, n in n_blocks.items():
            its = bytes_of([x for p, x in flat.items() if is_inside(p, path)])
            moments = bytes_of([state[name] for name in parts.stacks[path].own])
            host += its + moments
            weights -= its - its // n
            optimizer -= moments - moments // n
        kept = self._kept_bytes(n_blocks)
        on_host = places.host_inputs
        return {
            'weights': weights,
            'optimizer': optimizer,
            'temporaries': takes['temporaries'] + (0 if on_host else kept),
            'host': host + (kept if on_host else 0),
        }

    @property
    def _optimizer(self) -> Any:
        return bound(self.task.optimizer, self.net)

    def _abstract(self) -> tuple[Tree, Tree]:
        """Weights and state in ``TRAIN``."""
        key = jax.eval_shape(jax.random.key, 0)
        its = self.signature[: self.net.n_in]
        return jax.eval_shape(lambda rng: self.net.init(its, rng, Mode.TRAIN), key)

    def _arguments(self) -> tuple[Any, Tree]:
        """The carry of a step and frozen weights, as `jax.ShapeDtypeStruct` in their places."""
        weights, state = self._abstract()
        trainable, frozen = self.task.partition(weights)
        with jax.numpy_dtype_promotion('standard'):
            opt_state = jax.eval_shape(self._optimizer.init, trainable)
        number: Any = jax.ShapeDtypeStruct((), jnp.int32)
        carry = steps.Carry(trainable, state, opt_state, number)
        carry, frozen = (self.layout.placed(self.net, weights, x) for x in (carry, frozen))
        return carry, frozen

    def _of_one_block(self) -> Forecast:
        """The same of the model whose stacks have one block each."""
        net = rewritten(self.net, lambda stack: stack.replace(n=1))
        return dataclasses.replace(self, net=net)

    def _kept_bytes(self, n_blocks: Mapping[str, int]) -> int:
        """What the inputs of blocks take that are not reversible, of a device's rows."""
        paths = {p for p, layer in walk(self.net) if type(layer) is Repeat and p in n_blocks}
        weights, state = self._abstract()
        inputs = self.signature[: self.net.n_in]

        def outputs(weights: Tree, state: Tree, inputs: Any, key: Any) -> Any:
            given = self.net, weights, state, inputs
            return [capture(*given, path, rng=key, mode=Mode.TRAIN)[1] for path in paths]

        key = jax.eval_shape(jax.random.key, 0)
        found = jax.eval_shape(outputs, weights, state, inputs, key)  # of the shapes of inputs
        parts = [self.layout.mesh.shape[axis] for axis in SPLIT_AXES] if self.layout.mesh else []
        return trees.n_bytes(found) // math.prod(parts)
