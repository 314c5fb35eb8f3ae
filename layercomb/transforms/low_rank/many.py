"""`adapters`: several low-rank adapters on one model, of which each row of a batch has its own.

Shape letters: B rows, N adapters and the base, R the greatest rank, i and o the axes of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Size
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.seek import Seekable, held
from layercomb.layers.facts.axes import Axes
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.matrix import n_columns
from layercomb.shapes import Signature
from layercomb.transforms.leaves import rewrite_leaves
from layercomb.transforms.low_rank.layer import LowRank, is_lora
from layercomb.transforms.low_rank.products import LEAVES, outputs_with
from layercomb.transforms.quantization.layer import bare, bits_of, narrow_axes
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.weight_axes import holder
from layercomb.trees import Tree

T = TypeVar('T')


class Adapter(Seekable):
    """Which adapter each row of a decoding state has; it is the same at all positions.

    Attributes:
      rows: (B,) int32: 0 for none, i for the i-th.
    """

    rows: jax.Array

    def seek(self, lengths: jax.Array) -> Adapter:
        """Itself, wherever the rows stand."""
        del lengths
        return self


def put_adapters(state: T, rows: jax.Array) -> T:
    """A decoding state whose rows have other adapters.

    Args:
      state: of a model that `adapters` made, in ``PREDICT``; any other one stays as it is.
      rows: (B,) int32, as of `Adapter`.
    """

    def one(part: Any) -> Any:
        return Adapter(rows) if isinstance(part, Adapter) else part

    made: T = jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Adapter))
    return made


class ManyLowRank(Wrapper):
    """A leaf with several low-rank adapters; `adapters` makes it, with the weights.

    In ``PREDICT`` the state says which adapter each row has, and a fresh state says none: see
    `put_adapters`. In other modes no row has any.

    Weights: those of the leaf, and for each of its matrices ``X`` also ``X_lora_a`` (N, *i, R) and
    ``X_lora_b`` (N, R, *o), float32; the first of N are zeros.

    Attributes:
      layer: a leaf, or `Cast` or `Quantized` around one; narrow matrices stay narrow.
      names: of the adapters.
      rank: R.

    Raises:
      TypeError: for a layer that is no such leaf.
    """

    position_wise = property(of_sublayers)
    makes_logits = property(lambda self: self.layer.makes_logits)

    names: tuple[str, ...]
    rank: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(bare(self.layer), LEAVES):
            known = ', '.join(leaf.__name__ for leaf in LEAVES)
            raise TypeError(
                f'ManyLowRank holds {known}, not a {type(bare(self.layer)).__name__}: '
                'transforms.adapters reaches every one that has an adapter'
            )

    @property
    def weight_axes(self) -> dict[str, str]:  # type: ignore[override]
        """The axes of the adapters."""
        made: dict[str, str] = {}
        for name in narrow_axes(bare(self.layer)):
            first, _, second = bare(self.layer).weight_axes[name].partition('->')
            made |= {f'{name}_lora_a': f'N|{first}->R', f'{name}_lora_b': f'N|R->{second}'}
        return made

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The leaf's weights, and adapters that are zeros; in ``PREDICT`` an `Adapter`."""
        weights, _ = self.layer.init(signature, rng, mode)
        wide = _shapes(bare(self.layer), signature)
        n = len(self.names) + 1
        for name in narrow_axes(bare(self.layer)):
            summed, given = _sides(bare(self.layer), name, wide[name].shape)
            weights[f'{name}_lora_a'] = jnp.zeros((n, *summed, self.rank), jnp.float32)
            weights[f'{name}_lora_b'] = jnp.zeros((n, self.rank, *given), jnp.float32)
        rows = jnp.zeros(signature[0].shape[0], jnp.int32)
        return weights, Adapter(rows) if mode is Mode.PREDICT else {}  # type: ignore[return-value]

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The leaf's outputs, with the adapter of each row."""
        plain = {name: x for name, x in weights.items() if not is_lora(name)}
        if mode is not Mode.PREDICT:
            return self.layer.apply(plain, state, inputs, rng=rng, mode=mode)
        rows = held(state, Adapter).rows

        def factors(name: str) -> tuple[jax.Array, jax.Array]:
            both = (weights[f'{name}_lora_{which}'] for which in 'ab')
            a, b = (jnp.take(x, rows, axis=0, mode='clip') for x in both)
            return a, b

        return (outputs_with(self.layer, plain, inputs, factors),), state


def adapters(
    net: Layer, weights: Tree, named: Mapping[str, tuple[Layer, Tree]]
) -> tuple[Layer, Tree]:
    """One model with several low-rank adapters, of which each row of a decoded batch has its own.

    The weights of the base are there once, at their paths; the adapters are stacked beside them,
    padded with zeros to the greatest rank.

    Args:
      net: the base, wide or narrow, without adapters.
      weights: of it.
      named: by name, the same model with an adapter each, as `lora`, `interop.peft.load` or a run
        gives them: a layer with `LowRank` layers, and its weights, of which only those of the
        adapter are read. The base need not be stored alike.

    Returns:
      (layer, weights): a `ManyLowRank` around each leaf for which there is an adapter.

    Raises:
      ValueError: if there are none, or a base that has adapters; for a model without an adapter,
        an adapter for other layers or shapes, and DoRA, whose magnitudes scale the base's own
        products.

    >>> from layercomb import Model, shape_dtype, tl, transforms
    >>> model = Model(tl.Serial(tl.Dense(4), tl.Relu())).init(shape_dtype((1, 3)))
    >>> one = transforms.lora(model.layer, model.weights, rank=2)
    >>> net, weights = transforms.adapters(model.layer, model.weights, {'one': one})
    >>> weights['dense']['kernel_lora_a'].shape, transforms.adapter_names(net)
    ((2, 3, 2), ('one',))
    """
    if not named:
        raise ValueError('adapters: give at least one, by its name')
    if any(isinstance(layer, (LowRank, ManyLowRank)) for _, layer in walk(net)):
        raise ValueError('adapters: the base has adapters already: give transforms.without_lora')
    leaves = {name: _leaves(name, its) for name, (its, _) in named.items()}
    base, bare_base = trees.flatten(weights), _matrices(net)
    ranks: dict[str, int] = {}
    for its in leaves.values():
        for path, layer in its.items():
            ranks[path] = max(layer.rank, ranks.get(path, 0))
    flat = {name: trees.flatten(its) for name, (_, its) in named.items()}
    made = dict(base)
    for path, rank in ranks.items():
        for matrix in bare_base.get(path, ()):
            at = joined(path, matrix)
            made |= _stacked(
                net, base, at, rank, [(n, x.get(path), flat[n]) for n, x in leaves.items()]
            )
    lost = sorted(ranks.keys() - bare_base.keys())
    if lost:
        name = next(name for name, its in leaves.items() if lost[0] in its)
        there = next((bare(layer) for path, layer in walk(net) if path == lost[0]), None)
        if there is not None and type(there) is type(bare(leaves[name][lost[0]].layer)):
            known = ', '.join(leaf.__name__ for leaf in LEAVES)
            raise ValueError(
                f'the adapter {name!r} is for {lost[0]!r}, a {type(there).__name__}, and rows can '
                f'have adapters of their own on {known}: transforms.merge it, and use that model'
            )
        raise ValueError(
            f'the adapter {name!r} is for {lost[0]!r}, which this model does not have: it belongs '
            'to another base'
        )
    names = tuple(named)

    def one(path: str, layer: Layer) -> Layer:
        return ManyLowRank(layer, names, ranks[path]) if path in ranks else layer

    return rewrite_leaves(net, one), trees.unflatten(made)


def adapter_names(net: Layer) -> tuple[str, ...]:
    """The names of the adapters that `adapters` has put on a model; none for any other."""
    many = (layer for _, layer in walk(net) if isinstance(layer, ManyLowRank))
    return next((layer.names for layer in many), ())


def with_adapter(net: Layer, weights: Tree, name: str | None) -> tuple[Layer, Tree]:
    """The model with one of its adapters alone, e.g. for `decoding.generate`.

    Args:
      net, weights: as `adapters` gives them.
      name: of the adapter; None for the base.

    Returns:
      (layer, weights), with `LowRank` layers; `merge` makes plain ones of them.

    Raises:
      ValueError: for a name that there is not.
    """
    names = adapter_names(net)
    if name is not None and name not in names:
        raise ValueError(f'there is no adapter {name!r}: choose one of {", ".join(names)}')
    index = 0 if name is None else names.index(name) + 1
    made = {}
    for path, x in trees.flatten(weights).items():
        if not is_lora(path):
            made[path] = x
        elif index:
            made[path] = jnp.take(x, index, holder(net, path)[2])

    def one(layer: Layer) -> Layer:
        if not isinstance(layer, ManyLowRank):
            return layer
        if not index:
            return layer.layer if layer.name is None else layer.layer.replace(name=layer.name)
        return LowRank(layer.layer, layer.rank, float(layer.rank), name=layer.name)

    return rewrite(net, one), trees.unflatten(made)


def _leaves(name: str, net: Layer) -> dict[str, LowRank]:
    """The leaves of a model that have an adapter, by path.

    Raises:
      ValueError: if there are none, or they are DoRA's.
    """
    made = {path: layer for path, layer in walk(net) if isinstance(layer, LowRank)}
    if not made:
        raise ValueError(f'{name!r} has no adapter: give a model that transforms.lora made')
    if any(layer.dora for layer in made.values()):
        raise ValueError(
            f'the adapter {name!r} is DoRA, whose magnitudes scale the products of the base, so it '
            'cannot share a base with others: transforms.merge it, and use the merged model'
        )
    return made


def _matrices(net: Layer) -> dict[str, tuple[str, ...]]:
    """The names of the matrices of each leaf that may have adapters, by its path."""
    found = ((path, layer) for path, layer in walk(net) if isinstance(layer, LEAVES))
    return {path: tuple(narrow_axes(layer)) for path, layer in found}


def _stacked(
    net: Layer, base: Tree, at: str, rank: int, named: list[tuple[str, LowRank | None, Tree]]
) -> Iterator[tuple[str, Any]]:
    """The factors of all adapters of one matrix, by path; the scale is in B.

    Args:
      net, base: the model, and its weights by path.
      at: the path of the matrix.
      rank: R.
      named: the name of each adapter, its layer here if it has one, and its weights by path.
    """
    _, _, lead = holder(net, at)
    parts: list[tuple[Any, Any] | None] = [None]
    like: tuple[Any, Any] | None = None
    for name, layer, flat in named:
        if layer is None or f'{at}_lora_a' not in flat:
            parts.append(None)
            continue
        a, b = (jnp.asarray(flat[f'{at}_lora_{which}'], jnp.float32) for which in 'ab')
        _check_fits(name, net, base, at, a.shape, b.shape)
        a = _padded(a, a.ndim - 1, rank)
        b = _padded(b, lead, rank) * jnp.float32(layer.scale)
        like = like or (a, b)
        parts.append((a, b))
    if like is None:
        return
    for i, which in enumerate('ab'):
        zeros = jnp.zeros_like(like[i])
        arrays = [zeros if part is None else part[i] for part in parts]
        yield f'{at}_lora_{which}', jnp.stack(arrays, lead)


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, size - x.shape[axis]
    return jnp.pad(x, widths)


def _check_fits(
    name: str, net: Layer, base: Tree, at: str, a: tuple[int, ...], b: tuple[int, ...]
) -> None:
    """Raises a ValueError if factors are for a matrix of another shape than the base's."""
    if at not in base:  # one that is tied has the shape of its source
        return
    held = holder(net, at)[0]
    leaf = bare(held)
    _, matrix = at.rpartition('/')[::2]
    lead = len(b) - 1 - len(Axes(leaf.weight_axes[matrix]).second)
    given = (a[:lead], math.prod(a[lead:-1]), math.prod(b[lead + 1 :]))
    x = base[at]
    if x.dtype == jnp.float32:
        summed, results = _sides(leaf, matrix, x.shape[lead:])
        own = (x.shape[:lead], math.prod(summed), math.prod(results))
    else:  # rows (*o, i)
        own = (x.shape[:lead], n_columns(x, bits_of(held)), math.prod(x.shape[lead:-1]))
    if given != own:
        shapes = ('×'.join(map(str, (*each[0], *each[1:]))) for each in (given, own))
        theirs, ours = shapes
        raise ValueError(
            f'the adapter {name!r} is for a matrix of {theirs} at {at!r}, and this model has one '
            f'of {ours}: it belongs to another base'
        )


def _shapes(leaf: Layer, signature: Signature) -> Tree:
    """The wide weights of a leaf as `jax.ShapeDtypeStruct`."""
    key = jax.eval_shape(jax.random.key, 0)
    made: Tree = jax.eval_shape(lambda rng: leaf.init(signature, rng)[0], key)
    return made


def _sides(leaf: Layer, name: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The sizes of the axes i and o of a leaf's matrix."""
    n = len(Axes(leaf.weight_axes[name]).first)
    return shape[:n], shape[n:]
