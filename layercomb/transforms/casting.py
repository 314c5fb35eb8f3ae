"""`cast`: a model computed in another dtype, with float32 weights, norms and streams."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Arrays, Key, Layer
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.walk import walk
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.facts.positionwise import of_sublayers
from layercomb.layers.quantized.matrix import Narrow
from layercomb.layers.reversible.one_pass import one_pass
from layercomb.shapes import Signature, is_float
from layercomb.transforms.rewriting import rewrite
from layercomb.trees import Tree


class Cast(Wrapper):
    """Computes a layer in another dtype: weights and inputs are cast on the way in.

    Stored weights and their gradients stay float32. Outputs have the given dtype.

    Attributes:
      layer: what to compute: a leaf, or a wrapper around one.
      dtype: the name of a floating-point dtype.

    Raises:
      TypeError: if there is a combinator inside, or a layer that stays in float32 (a norm).
    """

    carries_counted = True
    position_wise = property(of_sublayers)

    dtype: str = 'bfloat16'

    def __post_init__(self) -> None:
        object.__setattr__(self, 'dtype', jnp.dtype(self.dtype).name)
        super().__post_init__()
        wrong = _uncastable(self.layer)
        if wrong is not None:
            raise TypeError(
                f'Cast computes a leaf, not a {type(wrong).__name__}: transforms.cast(net) '
                'reaches every leaf inside, and leaves alone what stays in float32'
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f'Cast: dtype must be floating-point, got {self.dtype!r}')

    def init(
        self, signature: Signature, rng: jax.Array, mode: Mode = Mode.TRAIN
    ) -> tuple[Tree, Tree]:
        narrow = tuple(
            jax.ShapeDtypeStruct(x.shape, jnp.dtype(self.dtype)) if is_float(x) else x
            for x in signature
        )
        return self.layer.init(narrow, rng, mode)

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        narrow_weights, narrow_inputs = self.narrowed(weights), self.narrowed(tuple(inputs))
        return self.layer.apply(narrow_weights, state, narrow_inputs, rng=rng, mode=mode)

    def narrowed(self, tree: Any) -> Any:
        """Casts the floats of a tree to the dtype; narrow matrices stay as they are.

        Args:
          tree: weights, or a tuple of inputs.
        """

        def one(x: Any) -> Any:
            return x if isinstance(x, Narrow) or not is_float(x) else x.astype(self.dtype)

        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Narrow))


@one_pass.register(Cast)
def _cast(layer, weights, state, inputs, cts, **given):
    """The inner layer's rule on cast weights and inputs; gradients are cast back."""
    wide = weights, tuple(inputs)
    outputs, d_inputs, d_weights = one_pass(
        layer.layer, layer.narrowed(weights), state, layer.narrowed(wide[1]), cts, **given
    )
    d_weights, d_inputs = jax.tree.map(
        lambda x, ct: None if ct is None else ct.astype(x.dtype), wide, (d_weights, d_inputs)
    )
    return outputs, d_inputs, d_weights


def _uncastable(layer: Layer) -> Layer | None:
    """The first layer inside that must not be computed in another dtype as a whole."""
    wide = (each for _, each in walk(layer) if isinstance(each, Combinator) or each.float32)
    return next(wide, None)


def cast(net: Layer, dtype: Any = 'bfloat16') -> Layer:
    """Computes a model in `dtype`, with float32 weights, norms, softmaxes, losses and streams.

    Leaves with ``float32 = True`` stay as they are. Attention and matrix products sum in float32
    for any dtype of inputs.

    Args:
      net: any layer.
      dtype: a floating-point dtype or its name.

    >>> from layercomb import tl, transforms
    >>> transforms.cast(tl.Serial(tl.LayerNorm(), tl.Dense(4)))
    Serial(LayerNorm(), Cast(Dense(4)))
    """
    name = jnp.dtype(dtype).name

    def one(layer: Layer) -> Layer:
        if isinstance(layer, Cast):
            return layer.layer  # the layer inside is cast already
        routes = layer.sublayers or isinstance(layer, Combinator)  # Serial() has none
        return layer if routes or layer.float32 else Cast(layer, name)

    return rewrite(net, one)
