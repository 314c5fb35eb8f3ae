"""`Layout`: where arrays are on a mesh, and a gradient that is computed by all of its devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layercomb import trees
from layercomb.checks import frozen
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.layers.facts.devices import ROW_AXES, SPLIT_AXES
from layercomb.layers.facts.sequence import SEQUENCE
from layercomb.parallel import halves
from layercomb.parallel.gathered import gathered
from layercomb.parallel.mesh import AXES, told
from layercomb.parallel.positions import check_parts, check_spans
from layercomb.parallel.specs import (
    RULES,
    cut_along,
    is_spec,
    like_tree,
    like_weights,
    only,
    renamed,
    weight_specs,
)
from layercomb.shapes import is_float, nearest_multiple
from layercomb.trees import Tree

_CUTS = ('fsdp', 'tensor')  # the mesh axes that rules cut weights by
_WEIGHTS = ('fsdp', SEQUENCE)  # those that cut together where a rule says fsdp

# (net, trainable, frozen, state, key, batch) → (value, state, gradient)
Gradient = Callable[..., tuple[jax.Array, Tree, Tree]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where weights, their optimizer's state and the rows of a batch are.

    Rows are split over ``data`` and ``fsdp``, positions over ``sequence``; each device computes its
    own, as if it was alone, with weights that are gathered where they are used. These are cut along
    ``fsdp`` and ``sequence`` together. Axis ``tensor`` is left to XLA: it splits products along the
    axes by which their weights are cut, and joins what they give.

    Attributes:
      mesh: of `make_mesh`; None for one device, on which everything stays as it is.
      rules: as of `weight_specs`, for the axes fsdp and tensor.

    Raises:
      ValueError: for a rule that is none.
      UsageError: if several processes would have to bring the same rows.
    """

    mesh: Mesh | None = None
    rules: tuple[tuple[str, str], ...] = RULES

    def __post_init__(self) -> None:
        object.__setattr__(self, 'rules', frozen(self.rules))
        for rule in self.rules:
            if len(rule) != 2 or rule[1] not in _CUTS:
                raise ValueError(
                    f'Layout: {rule!r} is no rule: give pairs of a letter and one of '
                    f"{', '.join(_CUTS)}, such as ('D', 'fsdp')"
                )
        if self.mesh is not None and jax.process_count() > 1:
            _check_processes(self.mesh)

    @property
    def n_parts(self) -> int:
        """How many parts the rows of a batch are split into."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in ROW_AXES)

    def specs(self, net: Layer, weights: Tree) -> Tree:
        """A `PartitionSpec` for each weight.

        Args:
          net: the model.
          weights: its weights or a part of them, arrays or `jax.ShapeDtypeStruct`. Some may be in
            `halves`, which are cut as the whole.

        Raises:
          ValueError: if the mesh does not divide a weight, as of `weight_specs`.
        """
        sizes = {} if self.mesh is None else {**self.mesh.shape, 'fsdp': self.n_cut}
        specs = weight_specs(net, halves.first(weights), sizes, self.rules)
        specs = jax.tree.map(lambda s: renamed(s, 'fsdp', self.cut), specs, is_leaf=is_spec)
        for path in halves.halved(weights):
            specs = trees.put(specs, path + halves.LOW, trees.get(specs, path))
        return specs

    def shardings(self, net: Layer, weights: Tree, tree: Any) -> Any:
        """Where the arrays of a tree go that has weights in it: a carry, or an optimizer's state.

        Args:
          net: the model.
          weights: its weights or a part of them.
          tree: arrays or `jax.ShapeDtypeStruct`. What is no weight, nor like one, is everywhere.

        Returns:
          A tree like `tree`, of shardings; None without a mesh.
        """
        if self.mesh is None:
            return None
        flat = trees.flatten(self.specs(net, weights))
        shapes = {p: x.shape for p, x in trees.flatten(weights).items() if hasattr(x, 'shape')}
        specs = like_weights({p: (flat[p], shape) for p, shape in shapes.items()}, tree)
        return jax.tree.map(lambda s: NamedSharding(self._mesh, s), specs, is_leaf=is_spec)

    def put(self, net: Layer, weights: Tree, tree: Any) -> Any:
        """A tree of arrays, each where it belongs: see `shardings`. Without a mesh, the tree."""
        places = self.shardings(net, weights, tree)
        return tree if places is None else jax.tree.map(jax.device_put, tree, places)

    def constrained(self, net: Layer, weights: Tree, tree: Any) -> Any:
        """The same inside a compiled function."""
        places = self.shardings(net, weights, tree)
        return tree if places is None else jax.lax.with_sharding_constraint(tree, places)

    def placed(self, net: Layer, weights: Tree, tree: Any) -> Any:
        """The same for `jax.ShapeDtypeStruct`, to which a sharding is added."""
        places = self.shardings(net, weights, tree)
        if places is None:
            return tree
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, places
        )

    def rows(self, batch: Any) -> Any:
        """A batch on its devices, each of which gets its rows; without a mesh, as it is.

        Args:
          batch: arrays of this process, of one number of rows.

        Raises:
          ValueError: if the mesh does not divide their positions.
        """
        if self.mesh is None:
            return batch
        self._check_parts(batch)
        at = NamedSharding(self.mesh, self.of_batch)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(at, np.asarray(x)), batch
        )

    def abstract_rows(self, signature: Any) -> Any:
        """The same for a signature of a batch, to which a sharding is added."""
        if self.mesh is None:
            return signature
        self._check_parts(signature)
        at = NamedSharding(self.mesh, self.of_batch)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), signature
        )

    def bytes_of_one(self, tree: Any) -> int:
        """The bytes of a device's part of a tree of `placed`.

        Args:
          tree: `jax.ShapeDtypeStruct`, with shardings if there is a mesh.
        """

        def one(x: Any) -> int:
            shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
            return math.prod(shape) * x.dtype.itemsize

        return sum(map(one, jax.tree.leaves(tree)))

    def check_rows(self, n_rows: int, what: str, each: int = 1) -> None:
        """Checks that the mesh divides the rows of a batch.

        Args:
          n_rows: of the batch of this process.
          what: what messages call the batch.
          each: what must divide the rows of a device: micro batches, and rows that belong together.

        Raises:
          ValueError: if it does not.
        """
        n = self.n_parts // self._n_processes
        if self.mesh is None or n_rows % (n * each) == 0:
            return
        parts = f'{n} parts' + (f' of a multiple of {each} rows' if each > 1 else '')
        raise ValueError(
            f'{what} has {n_rows} rows, which the mesh ({self.told}) does not divide into '
            f'{parts}: use a batch of {nearest_multiple(n_rows, n * each)}'
        )

    def total(self, x: jax.Array) -> jax.Array:
        """The sum over all devices, without a gradient; inside of `gradient` alone.

        Args:
          x: each device's summand.
        """
        x = jax.lax.stop_gradient(x)
        return self.sum(x)

    def share(self, x: jax.Array) -> jax.Array:
        """A device's part of a mean over all devices.

        Args:
          x: each device's own value.
        """
        if self.mesh is None:
            return x
        return x / math.prod(self.mesh.shape[axis] for axis in SPLIT_AXES)

    @property
    def told(self) -> str:
        """The sizes of the mesh, for messages."""
        return told(self._mesh.shape)

    def gradient(self, net: Layer, compute: Gradient) -> Gradient:
        """A gradient of a whole batch, from one that each device computes of its own rows.

        Args:
          net: the model.
          compute: (net, trainable, frozen, state, key, batch) → (value, state, gradient), where
            value and gradient are this device's summands of the whole ones: see `total`, `share`.

        Returns:
          The same without `net`. Floats of the state are means over the devices.

        Raises:
          TypeError: if devices split positions, and a layer would not see those of the others.
        """
        if self.mesh is None:
            return lambda *args: compute(net, *args)
        self.check_spans(net)

        def gradient(trainable: Tree, frozen: Tree, state: Tree, key: Any, batch: Any) -> Any:
            whole = trees.merge(trainable, frozen)
            specs = self.by_rows(net, whole)
            cut = gathered(net, specs, self.cut)
            of_trainable, of_frozen = (like_tree(specs, x) for x in (trainable, frozen))

            def one(*args: Any) -> Any:
                value, state, grads = compute(cut, *args)
                return self.sum(value), self.mean(state), self.summed(grads, of_trainable)

            given = of_trainable, of_frozen, PartitionSpec(), PartitionSpec()
            return self.each(
                one,
                (*given, self.of_batch),
                (PartitionSpec(), PartitionSpec(), of_trainable),
            )(trainable, frozen, state, key, batch)

        return gradient

    def sums(self, net: Layer, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Sums over a whole batch, from those that each device computes of its own rows.

        Args:
          net: the model.
          compute: (net, weights, state, batch) → a tree of sums.

        Returns:
          The same without `net`.

        Raises:
          TypeError: as of `gradient`.
        """
        if self.mesh is None:
            return functools.partial(compute, net)
        self.check_spans(net)

        def whole(weights: Tree, state: Tree, batch: Any) -> Any:
            specs = self.by_rows(net, weights)
            cut = gathered(net, specs, self.cut)

            def one(*args: Any) -> Any:
                return self.sum(compute(cut, *args))

            given = specs, PartitionSpec(), self.of_batch
            return self.each(one, given, PartitionSpec())(weights, state, batch)

        return whole

    def filled(self, batch: Any, together: int = 1, at_least: int = 0) -> Any:
        """A batch for `rows`, filled up to rows that the mesh divides; those count for nothing.

        Args:
          batch: arrays of this process, the last of them loss weights.
          together: how many rows in sequence belong together.
          at_least: how many rows there have to be.
        """
        n = len(batch[0])
        if self.mesh is None:
            return batch
        unit = self.n_parts * together // self._n_processes
        whole = -(-max(n, at_least) // unit) * unit
        if whole == n:
            return batch
        again = np.arange(whole) % n
        *others, loss_weights = (np.asarray(x)[again] for x in batch)
        loss_weights[n:] = 0
        return (*others, loss_weights)

    def by_rows(self, net: Layer, weights: Tree) -> Tree:
        """The specs of weights where rows are split: the axes that XLA splits are left out.

        Args:
          net: the model.
          weights: as of `specs`.
        """
        return jax.tree.map(
            lambda s: only(s, SPLIT_AXES), self.specs(net, weights), is_leaf=is_spec
        )

    def each(self, one: Callable[..., Any], given: Any, made: Any) -> Callable[..., Any]:
        """A function that each device computes of its own parts; without a mesh, the function.

        Args:
          one: what a device computes.
          given: specs of its arguments.
          made: specs of what it gives.
        """
        if self.mesh is None:
            return one
        # XLA partitions what is left to it; where nothing is, all axes are in our hands.
        whole = self.mesh.shape['tensor'] == 1
        return jax.shard_map(
            one,
            mesh=self.mesh,
            in_specs=given,
            out_specs=made,
            axis_names=set(AXES if whole else SPLIT_AXES),
            check_vma=False,
        )

    def sum(self, x: Any) -> Any:
        """The sum over all devices of arrays, inside of `each` alone.

        Args:
          x: each device's summands, a tree.
        """
        return jax.lax.psum(x, self._split) if self._split else x

    def mean(self, state: Tree) -> Tree:
        """A state whose floats are means over all devices, inside of `each` alone.

        Args:
          state: each device's own.
        """

        def one(x: jax.Array) -> jax.Array:
            return jax.lax.pmean(x, self._split) if self._split and is_float(x) else x

        return jax.tree.map(one, state)

    def summed(self, grads: Tree, specs: Tree) -> Tree:
        """Gradients summed over devices; a weight that was gathered has its sum over those.

        Narrow ones are summed in float32: a sum of many would lose what each device adds.

        Args:
          grads: each device's own.
          specs: of `by_rows`, a tree like `grads`.
        """

        def one(spec: PartitionSpec, g: jax.Array) -> jax.Array:
            left = tuple(axis for axis in self._split if cut_along(spec, axis) is None)
            if not left:
                return g
            wide = g.astype(jnp.float32) if g.dtype.itemsize < 4 else g
            return jax.lax.psum(wide, left).astype(g.dtype)

        return jax.tree.map(one, specs, grads, is_leaf=is_spec)

    @property
    def cut(self) -> tuple[str, ...]:
        """The mesh axes that cut weights together."""
        return self._long(_WEIGHTS)

    @property
    def n_cut(self) -> int:
        """How many parts a weight is cut into along these axes."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in _WEIGHTS)

    @property
    def of_batch(self) -> PartitionSpec:
        """Of an array of a batch: rows, and positions if these are split."""
        rows = tuple(axis for axis in self._split if axis in ROW_AXES) or None
        return PartitionSpec(rows, SEQUENCE) if SEQUENCE in self._split else PartitionSpec(rows)

    def check_spans(self, net: Layer, batch: Any = (), where: str = 'a batch') -> None:
        """Checks that positions can be split, if the mesh splits them.

        Args:
          net: the model, with its loss or metrics.
          batch: arrays or their signatures.
          where: what messages call the batch.

        Raises:
          TypeError: if a layer would not see the positions of other devices.
          ValueError: if the mesh does not divide the positions of the batch.
        """
        if self.mesh is not None and (n := self.mesh.shape[SEQUENCE]) > 1:
            check_spans(net)
            check_parts(batch, n, where)

    @property
    def _n_processes(self) -> int:
        """How many there are; each brings its own rows."""
        return jax.process_count()

    @property
    def _split(self) -> tuple[str, ...]:
        """The mesh axes that split a batch; XLA refuses sums over one device beside `tensor`."""
        return self._long(SPLIT_AXES)

    def _long(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of more than one device."""
        return tuple(axis for axis in axes if self.mesh is not None and self.mesh.shape[axis] > 1)

    def _check_parts(self, batch: Any) -> None:
        check_parts(batch, self._mesh.shape[SEQUENCE])

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None
        return self.mesh


def _check_processes(mesh: Mesh) -> None:
    """Raises a UsageError unless each part of the rows is one process's own."""
    inner = mesh.shape[SEQUENCE] * mesh.shape['tensor']  # devices that share rows
    parts = mesh.devices.reshape(-1, inner)  # (data · fsdp, sequence · tensor)
    owners = [{device.process_index for device in part} for part in parts]
    if any(len(owner) > 1 for owner in owners) or len(parts) % jax.process_count():
        here = jax.local_device_count()
        raise UsageError(
            f'devices along sequence and tensor share rows, {inner} at a time on a mesh of '
            f'{told(mesh.shape)}, and belong to several processes of {here} devices: use axes '
            f'whose product divides {here}, or start one process a machine'
        )


ALONE = Layout()


def laid_out(mesh: Any) -> Layout:
    """The layout on a mesh.

    Args:
      mesh: of `make_mesh`, a `Layout`, or None for one device.

    Raises:
      TypeError: for anything else, or a mesh with other axes.
      UsageError: for None, if there are several processes.
    """
    if isinstance(mesh, Layout):
        return mesh
    if mesh is None:
        if jax.process_count() > 1:
            raise UsageError(
                f'{jax.process_count()} processes train together, and no mesh says how: give '
                'mesh=parallel.make_mesh()'
            )
        return ALONE
    if not isinstance(mesh, Mesh) or tuple(mesh.axis_names) != AXES:
        raise TypeError(
            f'mesh={mesh!r} is no mesh with the axes {", ".join(AXES)}: give '
            'parallel.make_mesh(…), or a parallel.Layout'
        )
    return Layout(mesh)
