"""`LowRank`: a leaf whose matrices have an adapter of low rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.checks import Positive, Rate, Size
from layercomb.layers.attention.by_head import by_head
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.core.layer import Arrays, Key, Layer, fold
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper, wrapped
from layercomb.layers.facts.axes import Axes
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.adapted import PRODUCT, Adapted
from layercomb.layers.quantized.matrix import SCALES
from layercomb.shapes import Signature
from layercomb.transforms.quantization.layer import Quantized, bare
from layercomb.trees import Tree

A, B, MAGNITUDE = '_lora_a', '_lora_b', trees.MAGNITUDE  # after the path of the matrix


@functools.singledispatch
def lora_paths(layer: Layer) -> tuple[str, ...]:
    """The paths of a leaf's matrices that may have adapters.

    Your own layer can take part if it multiplies by the matrices through `core.dense`,
    `core.matmul` or `core.contract`, and declares their axes in `weight_axes`. Register it::

        transforms.lora_paths.register(Mine, lambda layer: ('kernel',))
    """
    del layer
    return ()


@lora_paths.register(Dense)
@lora_paths.register(SplitHeads)
@lora_paths.register(MergeHeads)
def _of_kernel(layer: Layer) -> tuple[str, ...]:
    del layer
    return ('kernel',)


@lora_paths.register(GatedDense)
def _of_gate(layer: Layer) -> tuple[str, ...]:
    del layer
    return 'gate', 'up'


def is_lora(path: str) -> bool:
    """Whether a weight belongs to an adapter: ``TrainTask(trainable=transforms.is_lora)``.

    Args:
      path: of the weight.

    >>> is_lora('block/feed_forward/dense/kernel_lora_a'), is_lora('block/norm/scale')
    (True, False)
    """
    return path.endswith((A, B, MAGNITUDE))


class LowRank(Wrapper):
    """A leaf with y = x W + s · drop(x) A B in the place of x W, for each of its matrices.

    `lora` makes it, with the weights. W stays as it is, wide or narrow. With `dora`, each column of
    W + s A B is scaled to a norm of its own, a weight that trains; the norm that it is divided by
    is taken as constant in the gradient. B is zero at first, so the leaf computes what it did.

    Weights: beside each matrix ``X`` (*i, *o) of the leaf, float32 ``X_lora_a`` (*i, r) and
    ``X_lora_b`` (r, *o) and, with `dora`, ``X_lora_magnitude`` (*o). Kernels (D, F) and (D, H, K)
    have one axis *i, kernels (H, K, D) from heads two.

    Attributes:
      layer: a leaf with matrices, or a `Cast` or `Quantized` around one.
      rank: r.
      alpha: s = alpha / r.
      dropout: the rate on the inputs of A, in training.
      dora: whether columns have norms of their own.
      rank_stabilized: s = alpha / √r instead.

    Raises:
      TypeError: if the layer has no matrices that may have adapters.
      ValueError: when applied in training with dropout, without a key.

    References:
      LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685
      DoRA, Liu et al. 2024, https://arxiv.org/abs/2402.09353
      rsLoRA, Kalajdzievski 2023, https://arxiv.org/abs/2312.03732

    >>> import jax
    >>> from layercomb import shape_dtype, tl, transforms, trees
    >>> layer = transforms.LowRank(tl.Dense(3), rank=2)
    >>> weights, _ = layer.init(shape_dtype((2, 4)), jax.random.key(0))
    >>> {path: x.shape for path, x in weights.items() if transforms.is_lora(path)}
    {'kernel_lora_a': (4, 2), 'kernel_lora_b': (2, 3)}
    """

    carries_counted = True
    position_wise = property(of_sublayers)
    makes_logits = property(lambda self: bare(self.layer).makes_logits)

    rank: Size = 8
    alpha: Positive = 16.0
    dropout: Rate = 0.0
    dora: bool = False
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not lora_paths(bare(self.layer)):
            raise TypeError(
                f'LowRank holds a leaf with matrices, not a {type(self.layer).__name__}: '
                'transforms.lora(net, weights) reaches every one inside'
            )

    @property
    def scale(self) -> float:
        """s, which multiplies A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def weight_axes(self) -> dict[str, str]:  # type: ignore[override]
        """The axes of the adapters; those of other weights are the leaf's."""
        made: dict[str, str] = {}
        for path in lora_paths(bare(self.layer)):
            axes = Axes(bare(self.layer).weight_axes[path])
            first, second = (
                ''.join(axes.letters[i] for i in side) for side in (axes.summed, axes.given)
            )
            rank = next(letter for letter in 'RPQ' if letter not in axes.letters)
            made |= {path + A: f'{first}->{rank}', path + B: f'{rank}->{second}'}
            if self.dora:
                made[path + MAGNITUDE] = f'->{second}'
        return made

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        """The leaf's weights and state, with A drawn and B zero."""
        inner, drawn = jax.random.split(rng)
        weights, state = self.layer.init(signature, inner, mode)
        wide = jax.eval_shape(lambda key: bare(self.layer).init(signature, key, mode)[0], rng)
        shapes = {path: trees.get(wide, path).shape for path in lora_paths(bare(self.layer))}
        return self.with_adapters(weights, shapes, drawn), state

    def with_adapters(
        self, weights: Tree, shapes: dict[str, tuple[int, ...]], key: jax.Array
    ) -> Tree:
        """The leaf's weights with new adapters.

        Args:
          weights: of the leaf, possibly stacked on leading axes, wide or narrow.
          shapes: of each matrix as it is wide, (*i, *o), without the stacked axes.
          key: from which A is drawn: uniform within ±1 / √D, where W sums over D values.
        """
        for n, (path, shape) in enumerate(shapes.items()):
            i, o = self._sides(path, shape)
            stored = trees.get(weights, path)
            is_wide = stored.dtype == jnp.float32
            lead = stored.shape[: stored.ndim - (len(shape) if is_wide else 1 + len(o))]
            bound = 1 / math.sqrt(math.prod(i))
            a = jax.random.uniform(
                jax.random.fold_in(key, n), (*lead, *i, self.rank), jnp.float32, -bound, bound
            )
            b = jnp.zeros((*lead, self.rank, *o), jnp.float32)
            weights = trees.put(trees.put(weights, path + A, a), path + B, b)
        if self.dora:
            plain = self.replace(dora=False)
            for path, x in plain.each(Adapted.norms, weights).items():
                weights = trees.put(weights, path + MAGNITUDE, x)
        return weights

    def _sides(self, path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The sizes *i and *o of a matrix."""
        axes = Axes(bare(self.layer).weight_axes[path])
        return tuple(tuple(shape[axis] for axis in side) for side in (axes.summed, axes.given))

    def plain(self) -> Layer:
        """The layer inside, under the same name."""
        return self.layer if self.name is None else self.layer.replace(name=self.name)

    def others(self, weights: Tree) -> Tree:
        """The weights that belong to no matrix: biases.

        Args:
          weights: of the leaf and its adapters.
        """
        mine = {
            path + end
            for path in lora_paths(bare(self.layer))
            for end in ('', SCALES, A, B, MAGNITUDE)
        }
        found = trees.flatten(weights)
        return trees.unflatten({path: x for path, x in found.items() if path not in mine})

    def each(self, f: Callable[[Adapted], jax.Array], weights: Tree) -> dict[str, jax.Array]:
        """A function of each matrix with its adapter, by path.

        Args:
          f: the function; of stacked matrices it is given one after the other.
          weights: of the leaf and its adapters, possibly stacked.
        """

        def one(weights: Tree) -> dict[str, jax.Array]:
            inside = self.inside(weights)
            narrow = [each for each in wrapped(self.layer) if isinstance(each, Quantized)]
            inside = narrow[0].seen(inside) if narrow else inside
            return {path: f(trees.get(inside, path)) for path in lora_paths(bare(self.layer))}

        path = lora_paths(bare(self.layer))[0] + A
        for _ in range(trees.get(weights, path).ndim - Axes(self.weight_axes[path]).ndim):
            one = functools.partial(jax.lax.map, one)
        return one(weights)

    def inside(self, weights: Tree, rng: Key = None) -> Tree:
        """The weights of the layer inside, each matrix with its adapter, as an `Adapted`.

        Args:
          weights: of the leaf and its adapters, not stacked.
          rng: for dropout; None for none.
        """
        for n, path in enumerate(lora_paths(bare(self.layer))):
            given = {}
            for name in (path, path + A, path + B, *([path + MAGNITUDE] if self.dora else ())):
                given[name] = trees.get(weights, name)
                weights = trees.drop(weights, name)
            matrix = Adapted(
                given[path],
                given[path + A],
                given[path + B] * self.scale,
                given.get(path + MAGNITUDE),
                fold(rng, n),
                self.dropout,
            )
            weights = trees.put(weights, path, matrix)
        return weights

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        """The leaf, whose matrices are given to it with their adapters."""
        drawn = None
        if self.dropout and mode.is_training:
            if rng is None:
                raise ValueError(
                    f'LowRank with dropout={self.dropout} draws in training: pass '
                    'rng=jax.random.key(…) to apply'
                )
            rng, drawn = jax.random.split(rng)

        def run(weights: Tree, drawn: Key, state: Tree, inputs: Arrays) -> tuple[Arrays, Tree]:
            inside = self.inside(weights, drawn)
            return self.layer.apply(inside, state, inputs, rng=rng, mode=mode)

        # For a gradient, inputs and products are kept. What is between, such as inputs in another
        # order or an activation, would be kept beside them, and is quickly made again.
        kept = jax.checkpoint_policies.save_only_these_names(PRODUCT)
        return jax.checkpoint(run, prevent_cse=False, policy=kept)(weights, drawn, state, inputs)


@by_head.register(LowRank)
def _by_head(layer, weights):
    """The leaf's rule; the factor that heads share has a leading axis of 1.

    None with dropout, which needs a key, and where a norm is over all heads.
    """
    leaf = bare(layer.layer)
    if layer.dropout or not isinstance(leaf, (SplitHeads, MergeHeads)):
        return None
    splits = isinstance(leaf, SplitHeads)
    if layer.dora and not splits:
        return None
    made = by_head(layer.layer, {key: x for key, x in weights.items() if not is_lora(key)})
    if made is None:
        return None
    a, b = weights['kernel' + A], weights['kernel' + B]
    if not splits:
        return {**made, 'kernel' + A: a[:, None], 'kernel' + B: b[None]}  # (H, 1, K, r), (1, r, D)
    b = jnp.moveaxis(b, 1, 0)[:, :, None]  # (r, H, K) → (H, r, 1, K)
    norms = {key: x[:, None] for key, x in weights.items() if key.endswith(MAGNITUDE)}
    return {**made, **norms, 'kernel' + A: a[None], 'kernel' + B: b}
