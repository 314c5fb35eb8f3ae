"""Where the arrays of a run are whose stacks live in host memory: `Places`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from layercomb import trees
from layercomb.layers.combinators.repeat import Repeat
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.optimizers.tensors import decayed
from layercomb.parallel import halves
from layercomb.parallel.layout import ALONE, Layout
from layercomb.parallel.swapped import fetched, stacks, swapped
from layercomb.shapes import Signature
from layercomb.supervised.beginning import fresh
from layercomb.supervised.offloading import wire
from layercomb.supervised.offloading.across import cut_axis, state_specs
from layercomb.supervised.offloading.dividing import Divided, by_name, divided, is_inside
from layercomb.supervised.offloading.independence import check_independent, moves_by_parts
from layercomb.supervised.offloading.step import compiled
from layercomb.supervised.steps import Carry
from layercomb.trees import Tree

if TYPE_CHECKING:
    from layercomb.supervised.tasks import TrainTask

MODES = ('blocks', 'blocks+inputs', 'streams', 'blocks+streams')
DTYPES = ('float32', 'bfloat16')
_HOST = 'pinned_host'


@dataclasses.dataclass(frozen=True)
class Places:
    """Where weights and the optimizer's state are: those of stacks in host memory.

    Integers of the state are carried as floats of the same bits; see `wire`.

    Attributes:
      net: the model.
      optimizer: the task's, told the model.
      host_inputs: whether the inputs of blocks are in host memory too.
      in_halves: whether the matrices of blocks are in `halves`, as far as they can be.
      layout: of several devices, each of which has parts in its host memory.
      by_parts: whether the optimizer moves each number by itself, as `checked` finds out.
      streams: whether residual streams are in host memory.
    """

    net: Layer
    optimizer: Any
    host_inputs: bool
    in_halves: bool = False
    layout: Layout = ALONE
    by_parts: bool = False
    streams: bool = False

    @functools.cached_property
    def n_blocks(self) -> dict[str, int]:
        """The stacks: path -> how many blocks."""
        return stacks(self.net)

    @functools.cached_property
    def reading(self) -> Layer:
        """The model that reads weights where they are."""
        return swapped(self.net)

    def step(self, task: TrainTask, net: Layer) -> Callable[..., Any]:
        """The jitted step of a task, as of `steps.of_task`.

        Args:
          task: says the rest.
          net: what reads the task's inputs.
        """
        how = task.loss_chunk_len, self.host_inputs, self.layout, self.by_parts, self.streams
        return compiled(net, task.loss, self.optimizer, *how)

    def checked(self, trainable: Tree) -> Places:
        """The same, told whether devices can move their parts of weights by themselves.

        Args:
          trainable: the weights that train, arrays or `jax.ShapeDtypeStruct`.

        Raises:
          ValueError: unless the optimizer moves each tensor of each block by itself.
        """
        check_independent(self.optimizer, trainable, self.n_blocks)
        specs = trees.flatten(self.layout.by_rows(self.net, trainable))
        axes = ((p, cut_axis(self.layout, at)) for p, at in specs.items() if at is not None)
        cuts = {p: at for p, at in axes if at is not None}
        by_parts = moves_by_parts(self.optimizer, trainable, self.n_blocks, cuts)
        return dataclasses.replace(self, by_parts=by_parts)

    def fresh(self, signature: Signature, key: jax.Array) -> tuple[Tree, Tree]:
        """Weights and state from a key, the weights where they belong.

        Args:
          signature: of the model's inputs.
          key: a typed key.
        """

        if self.layout.mesh is not None:
            return fresh(self.net, signature, key, self.layout)

        def made(key: jax.Array) -> tuple[Tree, Tree]:
            weights, state = self.net.init(signature, key)
            return jax.tree.map(_to_space, weights, self._of_weights(weights)), state

        return jax.jit(made)(key)

    def first_state(self, trainable: Tree) -> Any:
        """The optimizer's first state, as it is carried.

        Args:
          trainable: the weights that train, where they belong.
        """

        def made(trainable: Tree) -> Any:
            device = jax.memory.Space.Device
            trainable = jax.tree.map(lambda x: jax.device_put(x, device), trainable)
            state = self.optimizer.init(halves.joined(trainable))
            return jax.tree.map(_to_space, state, self._of_state(trainable, state))

        with jax.numpy_dtype_promotion('standard'):  # optax mixes dtypes
            return self.sent(trainable, jax.jit(made)(trainable))

    def put(self, trainable: Tree, frozen: Tree) -> tuple[Tree, Tree]:
        """Weights as steps carry them, where they belong.

        Args:
          trainable: the weights that train.
          frozen: the others.
        """
        chosen = self._chosen(trees.merge(trainable, frozen)) if self.in_halves else ()
        both = (halves.split(_on_host(x, chosen), chosen) for x in (trainable, frozen))
        trainable, frozen = (jax.tree.map(_put, x, self._of_weights(x)) for x in both)
        return trainable, frozen

    def put_rest(self, carry: Carry) -> Carry:
        """A carry whose weights and optimizer's state are where they belong, with the rest so.

        Args:
          carry: what steps carry.
        """
        rest = carry.state, carry.step
        state, step = self.layout.put(self.net, carry.trainable, rest)
        return carry._replace(state=state, step=step)

    def saved(self, weights: Tree) -> Tree:
        """Weights as a checkpoint has them, in the memory where they belong.

        Args:
          weights: as steps carry them.
        """
        if not halves.halved(weights):
            return weights
        made = _joined(weights)
        return jax.tree.map(_put, made, self._of_weights(made))

    def whole(self, weights: Tree) -> Tree:
        """The inverse of `put`: all weights on the device.

        Args:
          weights: as steps carry them.
        """
        made = _joined(weights)
        return jax.tree.map(jax.device_put, made, self._of_weights(made, on_host=False))

    def sent(self, trainable: Tree, opt_state: Any) -> Any:
        """An optimizer's state as steps carry it, where it belongs.

        Args:
          trainable: the weights that train.
          opt_state: as the optimizer made it.
        """

        def one(x: Any, place: Any) -> Any:
            return _put(wire.sent(x) if _is_host(place) else x, place)

        return jax.tree.map(one, opt_state, self._of_state(trainable, opt_state))

    def received(self, trainable: Tree, opt_state: Any) -> Any:
        """The inverse of `sent`: a state as the optimizer makes it.

        Args:
          trainable: the weights that train.
          opt_state: as steps carry it.
        """
        parts = self._parts(trainable)

        def one(name: str, x: Any) -> Any:
            return wire.received(x, parts.abstract[name]) if name in parts.hosted else x

        arrays = {name: one(name, x) for name, x in by_name(opt_state).items()}
        return parts.whole.state(arrays)

    def placed(self, trainable: Tree, tree: dict[str, Any]) -> dict[str, Any]:
        """The trees of a checkpoint as `jax.ShapeDtypeStruct`, with the places of their arrays.

        Args:
          trainable: the weights that train.
          tree: 'weights', 'state' and 'opt_state'.
        """
        tree = self.layout.placed(self.net, tree['weights'], tree)
        places = {
            'weights': self._of_weights(tree['weights']),
            'opt_state': self._of_state(trainable, tree['opt_state']),
        }

        def one(x: Any, place: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        return {**tree, **{key: jax.tree.map(one, tree[key], at) for key, at in places.items()}}

    def finite(self, trainable: Tree) -> Tree:
        """Which weights are finite throughout; None where a weight does not train.

        Args:
          trainable: where they belong.
        """
        return _finite(frozenset(self.n_blocks.items()), halves.first(trainable))

    def _chosen(self, weights: Tree) -> list[str]:
        """The paths of weights that are carried in halves: the matrices of stacks."""
        flat, matrices = (trees.flatten(x) for x in (weights, decayed(self.net, weights)))
        stacked = (path for path in flat if self._is_of_stack(path))
        n = self.layout.n_cut
        return [path for path in stacked if matrices[path] and halves.is_halved(flat[path], n)]

    def _parts(self, trainable: Tree) -> Divided:
        like = jax.eval_shape(halves.joined, trainable)
        return divided(self.optimizer, like, self.n_blocks)

    def _is_of_stack(self, path: str) -> bool:
        return any(is_inside(path, stack) for stack in self.n_blocks)

    def _of_weights(self, weights: Tree, on_host: bool = True) -> Tree:
        """Places of weights, all on devices unless those of stacks are to be `on_host`."""
        specs = self.layout.specs(self.net, weights)
        return trees.map_with_path(
            lambda path, x, spec: self._at(spec, on_host and self._is_of_stack(path)),
            weights,
            specs,
        )

    def _of_state(self, trainable: Tree, opt_state: Any) -> Any:
        parts = self._parts(trainable)
        like = jax.eval_shape(halves.joined, trainable)
        specs = state_specs(self.layout, self.net, like, parts)
        hosted = parts.hosted
        return parts.whole.state({n: self._at(specs[n], n in hosted) for n in by_name(opt_state)})

    def _at(self, spec: PartitionSpec, on_host: bool) -> jax.sharding.Sharding:
        if self.layout.mesh is None:
            return _place(on_host)
        kind = _HOST if on_host else 'device'
        return NamedSharding(self.layout.mesh, spec, memory_kind=kind)


@functools.partial(jax.jit, static_argnums=0)
def _finite(n_blocks: frozenset[tuple[str, int]], weights: Tree) -> Tree:
    def one(path: str, x: jax.Array) -> jax.Array:
        n = next((n for stack, n in n_blocks if is_inside(path, stack)), None)
        if n is None:
            return jnp.isfinite(x).all()
        numbers = jnp.arange(n, dtype=jnp.int32)
        return jax.lax.map(lambda i: jnp.isfinite(fetched(x, n, i)).all(), numbers).all()

    return trees.map_with_path(one, weights)


def _place(on_host: bool) -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0], memory_kind=_HOST if on_host else 'device')


def _joined(weights: Tree) -> Tree:
    """Weights as they are without halves; what was in halves is an array of NumPy."""
    found = halves.halved(weights)
    return halves.joined(_on_host(weights, [*found, *(path + halves.LOW for path in found)]))


def _on_host(weights: Tree, paths: Sequence[str]) -> Tree:
    """Weights, those at some paths as arrays of NumPy."""
    chosen = set(paths)

    def one(path: str, x: Any) -> Any:
        return np.asarray(x) if path in chosen else x

    return trees.map_with_path(one, weights)


def _to_space(x: jax.Array, place: Any) -> jax.Array:
    """An array in the memory of a place, inside of a compiled function."""
    space = jax.memory.Space.Host if _is_host(place) else jax.memory.Space.Device
    return jax.device_put(x, space)


def _put(x: Any, place: Any) -> jax.Array:
    """An array in its place, which its type says too: that of a restored one does not."""
    said = getattr(jax.typeof(x), 'memory_space', None)
    if _is_host(place) and said != jax.memory.Space.Host:
        x = np.asarray(x)
    return jax.device_put(x, place)


def _is_host(place: Any) -> bool:
    return bool(place.memory_kind == _HOST)


def places_of(
    offload: str | None,
    task: TrainTask,
    net: Layer,
    optimizer: Any,
    layout: Layout,
    dtype: str = 'float32',
) -> Places | None:
    """Where a run's arrays are, if its stacks are to live in host memory; None if they are not.

    Args:
      offload: out of `MODES`; with 'streams' alone, and with None, stacks stay on the device.
      task: what it trains on.
      net: the model.
      optimizer: the task's, told the model.
      layout: of several devices.
      dtype: out of `DTYPES`, in which blocks are computed.

    Raises:
      ValueError: if `offload` or `dtype` is another, or the run's parts need all gradients at once.
    """
    if dtype not in DTYPES:
        raise ValueError(f"offload_dtype={dtype!r}: it is 'float32' or 'bfloat16'")
    if dtype != 'float32' and offload in (None, 'streams'):
        raise ValueError(
            f"offload_dtype={dtype!r} is of blocks in host memory: say offload='blocks' too, "
            'or leave it out'
        )
    if offload is None:
        return None
    if offload not in MODES:
        raise ValueError(f'offload={offload!r}: it is None, {", ".join(map(repr, MODES))}')
    if offload == 'streams':
        _check_mesh(offload, layout)
        _check_host_memory(offload)
        return None  # weights and the optimizer's state stay where they are
    if task.clip_norm is not None:
        raise ValueError(
            f'offload={offload!r} moves each block before the norm of all gradients is known: '
            f'leave out clip_norm={task.clip_norm}, or clip numbers, by an optimizer '
            'optax.chain(optax.clip(…), …)'
        )
    if task.accumulate > 1:
        raise ValueError(
            f'offload={offload!r} moves each block as soon as its gradient is known, and sums '
            f'none: leave out accumulate={task.accumulate}, or offload'
        )
    _check_mesh(offload, layout)
    if not stacks(net):
        raise ValueError(f'offload={offload!r}: {_why_none(net)}')
    _check_host_memory(offload)
    inputs, streams = (offload == f'blocks+{what}' for what in ('inputs', 'streams'))
    return Places(net, optimizer, inputs, dtype == 'bfloat16', layout, streams=streams)


def _check_mesh(offload: str, layout: Layout) -> None:
    """Raises a ValueError for a mesh whose parts cannot be moved in host memory."""
    if layout.mesh is not None and layout.mesh.size > 1 and 'streams' in offload:
        raise ValueError(
            f'offload={offload!r} is for one device: leave out mesh, or offload; a mesh with '
            'sequence splits streams over devices'
        )
    if layout.mesh is not None and layout.mesh.shape['tensor'] > 1:
        raise ValueError(
            f'offload={offload!r} is for a mesh of data, fsdp and sequence, and this one has '
            f'{layout.told}: leave out tensor, or offload'
        )
    if jax.process_count() > 1:
        raise ValueError(
            f'offload={offload!r} is for the devices of one process, and there are '
            f'{jax.process_count()}: leave it out'
        )


def _check_host_memory(offload: str) -> None:
    device = jax.devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if _HOST not in kinds:
        raise ValueError(
            f'offload={offload!r} needs host memory that the device can reach ({_HOST}), and '
            f'{device} has {", ".join(kinds) or "none"}: leave it out'
        )


def _why_none(net: Layer) -> str:
    name = type(net).__name__
    if any(isinstance(layer, Repeat) for _, layer in walk(net)):
        return (
            f'the blocks of this {name} share their weights, or are inside other layers than '
            'tl.Serial: leave it out, or put tl.Repeat(block, n) in series with the rest'
        )
    return (
        f'no blocks of this {name} are in a Repeat: build them as tl.Repeat(block, n), or take '
        'the model as it was before transforms.unstack'
    )
