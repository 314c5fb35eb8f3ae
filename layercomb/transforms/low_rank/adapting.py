"""`lora`: adapters beside the matrices of a model; `without_lora`: the model without them."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.attention.projections import SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import joined, walk
from layercomb.layers.core.wrapper import Wrapper, wrapped
from layercomb.layers.facts.axes import Axes
from layercomb.layers.quantized.matrix import n_columns
from layercomb.transforms.low_rank.layer import LowRank, lora_paths
from layercomb.transforms.quantization.layer import Quantized, bare, bits_of
from layercomb.transforms.rewriting import rewrite
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree

Where = str | Sequence[str] | Callable[[str], bool]
Heads = tuple[int, ...] | None  # (H, K) of the attention around, if it is known

_HEAD = 'head'  # the name of what makes logits, in every model of the library
_SHOWN = 20  # paths in an error


def lora(
    net: Layer,
    weights: Tree,
    rank: int = 8,
    alpha: float = 16.0,
    where: Where = '*',
    dropout: float = 0.0,
    *,
    dora: bool = False,
    rank_stabilized: bool = False,
    seed: int = 0,
) -> tuple[Layer, Tree]:
    """The same model with adapters of low rank beside its matrices, to train these alone.

    y = x W becomes y = x W + s · drop(x) A B, with s = alpha / rank. The weights A and B stand
    beside W, whose path and value stay: see `LowRank`. B is zero, so the model computes what it
    did. W may be narrow: `quantize` first, or load narrow weights. Train with
    ``TrainTask(trainable=transforms.is_lora)``; afterwards `merge` adds s A B to W.

    Args:
      net: any layer, stacked or `unstack`ed.
      weights: its weights, which are not changed.
      rank: of A B.
      alpha: s = alpha / rank.
      where: which layers: a path, a pattern such as ``'*attention*'`` whose ``*`` stands for any
        text, ``/`` too, several of them, or a predicate on paths. ``'*'`` is every layer with
        matrices but those in a ``head``; embeddings have no adapters.
      dropout: the rate on the inputs of A, in training.
      dora: whether each column of W + s A B has a norm that trains.
      rank_stabilized: s = alpha / √rank instead.
      seed: of the random A.

    Returns:
      (layer, weights). The weights that were there are those given, not copies.

    Raises:
      ValueError: if a pattern matches no layer, naming those there are; if the model has adapters
        already; if a wide matrix is not float32; if an end of a tie of layers would have adapters
        and the other none; if a narrow projection from heads stands alone, so that nothing says how
        many heads there are.
      TypeError, ValueError: for a rank, alpha or rate that cannot be.

    References:
      Hu et al. 2021, https://arxiv.org/abs/2106.09685

    >>> import jax
    >>> from layercomb import shape_dtype, tl, transforms, trees
    >>> net = tl.Serial(tl.Repeat(tl.Residual(tl.Dense(4)), 2), tl.Dense(9, name='head'))
    >>> weights, _ = net.init(shape_dtype((2, 4)), jax.random.key(0))
    >>> net, weights = transforms.lora(net, weights, rank=2)
    >>> {path: x.shape for path, x in trees.flatten(weights).items() if transforms.is_lora(path)}
    {'residual/dense/kernel_lora_a': (2, 4, 2), 'residual/dense/kernel_lora_b': (2, 2, 4)}
    """
    example = LowRank(Dense(), rank, alpha, dropout, dora, rank_stabilized)
    if any(isinstance(layer, LowRank) for _, layer in walk(net)):
        raise ValueError(
            'lora: the model has adapters already: merge them first, with '
            'transforms.merge(net, weights), or adapt the model that they were added to'
        )
    chosen = _chosen(net, where)
    _check_ties(net, chosen)
    return _Adding(chosen, example, jax.random.key(seed)).to(net, weights)


def without_lora(net: Layer) -> Layer:
    """The model without its adapters, a description alone; `merge` keeps what they learned.

    Args:
      net: any layer.

    >>> from layercomb import tl, transforms
    >>> transforms.without_lora(tl.Serial(transforms.LowRank(tl.Dense(4)), tl.Relu()))
    Serial(Dense(4), Relu())
    """
    return rewrite(net, lambda layer: layer.plain() if isinstance(layer, LowRank) else layer)


@dataclasses.dataclass(frozen=True, eq=False)
class _Adding:
    """Adds adapters to the layers at some paths.

    Attributes:
      chosen: the paths.
      example: a `LowRank` around another layer.
      key: from which A is drawn; the path is folded in.
    """

    chosen: frozenset[str]
    example: LowRank
    key: jax.Array

    def to(
        self, net: Layer, weights: Tree, path: str = '', heads: Heads = None
    ) -> tuple[Layer, Tree]:
        """A layer and its weights, with adapters where they were chosen.

        Args:
          net: a layer of the model.
          weights: its weights.
          path: its path.
          heads: of the attention that it is a part of.
        """
        if lora_paths(bare(net)):
            if path not in self.chosen:
                return net, weights
            made = self.example.replace(layer=net)
            drawn = jax.random.fold_in(self.key, zlib.crc32(path.encode()))
            return made, made.with_adapters(weights, _shapes(net, weights, path, heads), drawn)
        if isinstance(net, Tied):
            inner, whole = self.to(net.layer, net.untied(weights), path, heads)
            return net.with_sublayers((inner,)), net.tied(whole)
        if isinstance(net, Combinator):
            heads = _heads(net, weights) or heads
            children, parts = [], dict(weights)
            for name, layer in net.children:
                child, part = self.to(layer, weights.get(name, {}), joined(path, name), heads)
                children.append(child)
                if part:
                    parts[name] = part
            return net.with_sublayers(tuple(children)), parts
        if isinstance(net, Wrapper):
            inner, weights = self.to(net.layer, weights, path, heads)
            return net.with_sublayers((inner, *net.sublayers[1:])), weights
        return net, weights


def _chosen(net: Layer, where: Where) -> frozenset[str]:
    """The paths of the layers that get adapters."""
    places = list(dict.fromkeys(path for path, layer in walk(net) if lora_paths(bare(layer))))
    if callable(where):
        asked = {'the predicate where': [path for path in places if where(path)]}
    else:
        patterns = (where,) if isinstance(where, str) else tuple(where)
        wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
        if wrong or not patterns:
            raise TypeError(
                f'lora: where={where!r}: give a path, a pattern such as "*attention*", several of '
                'them, or a function of a path'
            )
        asked = {f'where={pattern!r}': _matching(pattern, places) for pattern in patterns}
    for what, found in asked.items():
        if not found:
            shown = ', '.join(map(repr, places[:_SHOWN])) + (', …' if places[_SHOWN:] else '')
            raise ValueError(
                f'lora: {what} matches no layer with matrices: choose of {shown}'
                if places
                else 'lora: the model has no layer with matrices that could have adapters'
            )
    return frozenset(path for found in asked.values() for path in found)


def _matching(pattern: str, places: list[str]) -> list[str]:
    if pattern == '*':
        return [path for path in places if _HEAD not in path.split('/')]
    return [path for path in places if fnmatch.fnmatchcase(path, pattern)]


def _check_ties(net: Layer, chosen: frozenset[str]) -> None:
    """Raises a ValueError if one of two tied layers would have adapters and the other not."""
    for path, tie in walk(net):
        if not isinstance(tie, Tied):
            continue
        ends = [joined(path, end) for end in (tie.source, tie.target)]
        source, target = (
            {p.removeprefix(end) for p in chosen if f'{p}/'.startswith(f'{end}/')} for end in ends
        )
        if source != target:
            raise ValueError(
                f'lora: {ends[0]!r} and {ends[1]!r} are tied, and where= chooses layers of one of '
                'them: choose those of both, or of neither'
            )


def _shapes(net: Layer, weights: Tree, path: str, heads: Heads) -> dict[str, tuple[int, ...]]:
    """The shape of each matrix of a leaf as it is wide, without stacked axes."""
    made = {}
    for name in lora_paths(bare(net)):
        axes, stored = Axes(bare(net).weight_axes[name]), trees.get(weights, name)
        if stored.dtype != jnp.float32 and not _is_narrow(net):
            raise ValueError(
                f'lora: {joined(path, name)!r} is {stored.dtype}, and wide weights are float32: '
                'convert it, and let transforms.cast compute in fewer bits, or transforms.quantize '
                'keep fewer'
            )
        if stored.dtype == jnp.float32:
            made[name] = tuple(stored.shape[stored.ndim - axes.ndim :])
            continue
        rows = stored.shape[:-1]
        summed: tuple[int, ...] = (n_columns(stored, bits_of(net)),)
        if len(axes.summed) > 1:
            if heads is None or math.prod(heads) != summed[0]:
                raise ValueError(
                    f'lora: {path!r} is narrow, and nothing beside it says how many heads it '
                    'merges: add the adapters first, and quantize then'
                )
            summed = heads
        made[name] = (*summed, *rows[len(rows) - len(axes.given) :])
    return made


def _is_narrow(net: Layer) -> bool:
    return any(isinstance(layer, Quantized) for layer in wrapped(net))


def _heads(net: Combinator, weights: Tree) -> Heads:
    """(H, K) of an attention's queries; None for any other layer."""
    query = dict(net.children).get('query')
    if query is None or not isinstance(bare(query), SplitHeads):
        return None
    kernel = trees.get(weights, 'query/kernel')
    return tuple(kernel.shape[-2:] if kernel.dtype == jnp.float32 else kernel.shape[-3:-1])
