"""What varies is a rewrite, not a flag: functions from a description to a description.

Precision, quantization, tying and unstacking change no layer's code and keep every path. What needs
the description alone is built on one bottom-up `rewrite`, which reaches every layer, inside
combinators and wrappers alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layercomb import trees
from layercomb.layers.base import Layer, Mode, Tree, Wrapper, default_name, given_name
from layercomb.layers.combinators import Combinator, Parallel, Serial
from layercomb.layers.control import Map, Repeat
from layercomb.layers.cotangents import vjp
from layercomb.layers.fields import Size
from layercomb.layers.narrow import BITS, Narrow, can_narrow, constant, narrow
from layercomb.layers.reversible import ReversibleRepeat, ReversibleSerial
from layercomb.shapes import is_float


def rewrite(net: Layer, fn: Callable[[Layer], Layer]) -> Layer:
    """Applies `fn` to every layer, from the leaves up, and puts its results in their places.

    Args:
      net: any layer.
      fn: gets a layer whose sublayers are rewritten already, and returns it or another one.

    >>> from layercomb import tl, transforms
    >>> def wider(layer):
    ...     return layer.replace(n_units=8) if isinstance(layer, tl.Dense) else layer
    >>> transforms.rewrite(tl.Serial(tl.Dense(4), tl.Relu()), wider)
    Serial(Dense(8), Relu())
    """
    if net.sublayers:
        net = net.with_sublayers(tuple(rewrite(layer, fn) for layer in net.sublayers))
    return fn(net)


class Cast(Wrapper):
    """Computes a layer in another dtype: weights and inputs are cast on the way in.

    The weights that are kept, and their gradients, stay as they are (float32); what comes out is
    of the given dtype.

    Attributes:
      layer: what to compute: a leaf, or a wrapper around one.
      dtype: the name of a floating-point dtype.

    Raises:
      TypeError: if there is a combinator inside, or a layer that stays in float32 (a norm).
    """

    carries_counted = True

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

    def init(self, signature, rng, mode=Mode.TRAIN):
        narrow = tuple(
            jax.ShapeDtypeStruct(x.shape, jnp.dtype(self.dtype)) if is_float(x) else x
            for x in signature
        )
        return self.layer.init(narrow, rng, mode)

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        narrow_weights, narrow_inputs = self._cast(weights), self._cast(tuple(inputs))
        return self.layer.apply(narrow_weights, state, narrow_inputs, rng=rng, mode=mode)

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """The layer's own, on what is cast; gradients are cast back."""
        given = weights, tuple(inputs)
        outputs, d_inputs, d_weights = self.layer.apply_and_grad(
            self._cast(weights),
            state,
            self._cast(tuple(inputs)),
            cts,
            rng=rng,
            mode=mode,
            state_cts=state_cts,
        )
        d_weights, d_inputs = jax.tree.map(
            lambda x, ct: None if ct is None else ct.astype(x.dtype), given, (d_weights, d_inputs)
        )
        return outputs, d_inputs, d_weights

    def _cast(self, tree: Any) -> Any:
        def one(x: Any) -> Any:
            return x if isinstance(x, Narrow) or not is_float(x) else x.astype(self.dtype)

        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, Narrow))


def _uncastable(layer: Layer) -> Layer | None:
    """The first layer inside that must not be computed in another dtype as a whole."""
    if isinstance(layer, Combinator) or layer.float32:
        return layer
    return next((found for found in map(_uncastable, layer.sublayers) if found is not None), None)


def cast(net: Layer, dtype: Any = 'bfloat16') -> Layer:
    """Computes a model in `dtype`, with float32 weights, norms, softmaxes, losses and streams.

    Leaves that say ``float32 = True`` are left alone; attention and matrix products sum in float32
    whatever they are given.

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
            return layer.layer  # cast anew, inside
        routes = layer.sublayers or isinstance(layer, Combinator)  # Serial() has none
        return layer if routes or layer.float32 else Cast(layer, name)

    return rewrite(net, one)


class Tied(Wrapper):
    """A model in which one weight is another one: there is no weight at `target`.

    Attributes:
      layer: the model.
      source: the path of the weight that is there, e.g. ``'embedding/table'``.
      target: the path of the weight that it also serves as, e.g. ``'head/kernel'``.
      via: a module-level function from the one to the other, e.g. ``jnp.transpose``.

    Raises:
      KeyError: at `init`, if one of the paths does not exist.
      ValueError: at `init`, if the shapes do not fit.

    References:
      Press & Wolf 2017, https://arxiv.org/abs/1608.05859
    """

    carries_counted = True

    source: str
    target: str
    via: Callable[..., Any] | None = None

    def init(self, signature, rng, mode=Mode.TRAIN):
        return self._build(signature, rng, mode)[1:]

    def _build(self, signature: Any, rng: jax.Array, mode: Mode) -> Any:
        outputs, weights, state = self.layer._build(signature, rng, mode)
        target, source = trees.get(weights, self.target), trees.get(weights, self.source)
        given = jax.eval_shape(self.via, source) if self.via else source
        if given.shape != target.shape:
            raise ValueError(
                f'Tied: {self.source!r} gives {tuple(given.shape)} and {self.target!r} is '
                f'{tuple(target.shape)}: choose another via='
            )
        return outputs, trees.drop(weights, self.target), state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(self.untied(weights), state, inputs, rng=rng, mode=mode)

    def apply_and_grad(
        self, weights, state, inputs, cts, *, rng=None, mode=Mode.TRAIN, state_cts=None
    ):
        """The layer's own; the weight gets the gradients of both its places."""
        whole, pull = vjp(self.untied, weights)
        outputs, d_inputs, d_whole = self.layer.apply_and_grad(
            whole, state, inputs, cts, rng=rng, mode=mode, state_cts=state_cts
        )
        (d_weights,) = pull(d_whole)
        return outputs, d_inputs, d_weights

    def untied(self, weights: Tree) -> Tree:
        """The weights with one at `target` too."""
        value = trees.get(weights, self.source)
        return trees.put(weights, self.target, self.via(value) if self.via else value)


class Quantized(Wrapper):
    """A leaf whose matrices are kept in few bits; `quantize` makes it, with the weights.

    What was ``kernel`` is integers under the same name, and ``kernel_scales`` beside it; bfloat16
    has no scales. Its gradient is for its inputs, and for the weights that are not narrow.

    Attributes:
      layer: a leaf, or a `Cast` around one.
      bits: 8, 4, or 16 for bfloat16.
      group_size: how many weights share a scale, about: see `quantize`.
      smallest: matrices with fewer weights stay as they are.

    Raises:
      ValueError: for other bits.
      TypeError: if the layer has no matrices.
    """

    carries_counted = True

    bits: int = 8
    group_size: Size = 64
    smallest: Size = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in BITS:
            raise ValueError(
                f'Quantized: bits={self.bits} is not to be had: choose 8 or 4, or 16 for bfloat16'
            )
        if not bare(self.layer).matrices:
            raise TypeError(
                f'Quantized holds a leaf with matrices, not a {type(self.layer).__name__}: '
                'transforms.quantize(net, weights) reaches every one inside'
            )

    def init(self, signature, rng, mode=Mode.TRAIN):
        weights, state = self.layer.init(signature, rng, mode)
        return self.narrow(weights), state

    def apply(self, weights, state, inputs, *, rng=None, mode=Mode.EVAL):
        return self.layer.apply(self._seen(weights), state, inputs, rng=rng, mode=mode)

    def narrow(self, weights: Tree) -> Tree:
        """The leaf's weights, possibly stacked on leading axes, with its large matrices narrow."""
        for path, axes in bare(self.layer).matrices.items():
            wide = trees.get(weights, path)
            shape = wide.shape[wide.ndim - len(axes) :]
            if math.prod(shape) < self.smallest or not can_narrow(shape, axes, self.bits):
                continue
            values, scales = narrow(wide, axes, self.bits, self.group_size)
            weights = trees.put(trees.drop(weights, path), path, values)
            if scales is not None:
                weights = trees.put(weights, path + _SCALES, scales)
        return weights

    def _seen(self, weights: Tree) -> Tree:
        """The weights as the leaf sees them, each narrow matrix as one `Narrow`."""
        for path, axes in bare(self.layer).matrices.items():
            values, scales = trees.get(weights, path), None
            if values.dtype == jnp.float32:
                continue
            if is_float(values):
                values = constant(values)
            else:
                scales = constant(trees.get(weights, path + _SCALES))
                weights = trees.drop(weights, path + _SCALES)
            matrix = Narrow(values, scales, axes, self.bits)
            weights = trees.put(trees.drop(weights, path), path, matrix)
        return weights


_SCALES = '_scales'


def bare(layer: Layer) -> Layer:
    """The leaf that a model computes, out of what says in which precision: `Cast`, `Quantized`."""
    return bare(layer.layer) if isinstance(layer, (Cast, Quantized)) else layer


def quantize(
    net: Layer, weights: Tree, bits: int = 8, group_size: int = 64, *, smallest: int = 4096
) -> tuple[Layer, Tree]:
    """The same model with its large matrices in few bits, to be decoded or evaluated.

    Kernels of dense layers and projections, tables of embeddings, units of sparse feed-forwards and
    features of multiplicative layers become int8, int4 or bfloat16; biases, norms, positions,
    controllers and whatever is small stay as they are. Narrow matrices are rows along what a
    product sums over, a kernel (D, F) being (F, D), and integers have a float32 scale for each
    group of a row, at ``…_scales``; all names are kept. Both ends of a `Tied` model are
    quantized, each along its own sum, and it is tied no longer.

    Args:
      net: any layer, stacked or `unstack`ed.
      weights: its weights, which are not changed.
      bits: 8, 4, or 16 for bfloat16, which has no scales.
      group_size: how many weights share a scale. Where it does not divide what there is, the
        divisor nearest to it, by ratio, takes its place.
      smallest: matrices with fewer weights stay as they are.

    Raises:
      ValueError: for other bits; and when the gradient for a quantized weight is asked for.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl, transforms
    >>> net, weights = transforms.quantize(tl.Dense(64), {'kernel': jnp.ones((64, 64))})
    >>> net, weights['kernel'].dtype, weights['kernel_scales'].shape
    (Quantized(Dense(64)), dtype('int8'), (64, 1))
    """
    if isinstance(net, Tied):
        return quantize(net.layer, net.untied(weights), bits, group_size, smallest=smallest)
    if isinstance(net, Quantized):
        raise ValueError('the model is quantized already: quantize the one that it was made from')
    if bare(net).matrices:
        quantized = Quantized(net, bits, group_size, smallest)
        made = quantized.narrow(weights)
        return (net, weights) if made is weights else (quantized, made)
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in zip(net.keys, net.sublayers, strict=True):
            child, part = quantize(layer, weights.get(key, {}), bits, group_size, smallest=smallest)
            children.append(child)
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Wrapper):
        inner, weights = quantize(net.layer, weights, bits, group_size, smallest=smallest)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights


def unstack(net: Layer, weights: Tree) -> tuple[Layer, Tree]:
    """The same model with one subtree of weights a layer where `Repeat` or `Map` had one for all.

    For decoding: slicing stacked weights copies them at every token. Do it once, before the first.
    The state in ``PREDICT`` is the same for both models; `unstack_state` unstacks training's.

    Args:
      net: any layer.
      weights: its weights.

    Returns:
      A layer in which each `Repeat` has become a `Serial`, and each `Map` a `Parallel`, with keys
      ``'0'``, ``'1'`` …, and weights to match; shared ones are referred to n times, not copied.

    >>> from layercomb import tl, transforms
    >>> net, _ = transforms.unstack(tl.Repeat(tl.Dense(4), 2), {})
    >>> net
    Serial(Dense(4, name='0'), Dense(4, name='1'), name='dense')
    """
    if not _is_stacked(net):  # building it again would take longer than some tokens
        return net, weights
    if isinstance(net, (Repeat, Map)):
        blocks, parts = [], {}
        for i in range(net.n):
            block, part = unstack(net.layer, net.block_weights(weights, i))
            blocks.append(block.replace(name=str(i)))
            if part:
                parts[str(i)] = part
        kind = Parallel if isinstance(net, Map) else Serial
        kind = ReversibleSerial if isinstance(net, ReversibleRepeat) else kind
        return kind(*blocks, name=given_name(net) or default_name(net)), parts
    if isinstance(net, Combinator):
        children, parts = [], dict(weights)
        for key, layer in zip(net.keys, net.sublayers, strict=True):
            child, part = unstack(layer, weights.get(key, {}))
            children.append(child if child == layer else child.replace(name=key))
            if part:
                parts[key] = part
        return net.with_sublayers(tuple(children)), parts
    if isinstance(net, Tied) and _moved(net, weights):
        return unstack(net.layer, net.untied(weights))
    if isinstance(net, Wrapper):
        inner, weights = unstack(net.layer, weights)
        return net.with_sublayers((inner, *net.sublayers[1:])), weights
    return net, weights


def unstack_state(net: Layer, state: Tree) -> Tree:
    """The state of training (running statistics) for the model that `unstack` gives.

    Args:
      net: the layer before it was unstacked.
      state: its state in ``TRAIN`` or ``EVAL``.

    Returns:
      One subtree a layer, as `unstack` arranges weights; what `Map` threads is in each of its own.

    >>> import jax.numpy as jnp
    >>> from layercomb import tl, transforms
    >>> net = tl.Repeat(tl.BatchNorm(), 2, shared=True)
    >>> transforms.unstack_state(net, {'mean': jnp.zeros((2, 4))})['1']['mean'].shape
    (4,)
    """
    if isinstance(net, (Repeat, Map)):
        blocks = range(net.n) if state else ()
        return {str(i): unstack_state(net.layer, net.block_state(state, i)) for i in blocks}
    if isinstance(net, Combinator):
        inner = dict(zip(net.keys, net.sublayers, strict=True))
        return {
            key: unstack_state(inner[key], x) if key in inner else x for key, x in state.items()
        }
    return unstack_state(net.layer, state) if isinstance(net, Wrapper) else state


def _is_stacked(net: Layer) -> bool:
    return isinstance(net, (Repeat, Map)) or any(map(_is_stacked, net.sublayers))


def _moved(net: Tied, weights: Tree) -> bool:
    """Whether unstacking moves an end of a tie, so that its paths would lead nowhere."""
    if net.source not in trees.flatten(weights):
        return False  # the description alone is wanted
    _, parts = unstack(net.layer, weights)
    there = trees.flatten(parts)
    beside = net.target.rpartition('/')[0]
    return net.source not in there or not any(path.startswith(f'{beside}/') for path in there)
