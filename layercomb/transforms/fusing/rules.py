"""`write`: how each layer becomes instructions of a `Program`.

Layers are found by class, as elsewhere. Combinators need no rules: their own `route` says what goes
where. What has no rule raises `Unfit`, and so does what a rule does not cover; the layer's own
`apply` then computes it. A subclass with an `apply` of its own does not inherit a rule.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import jax
import numpy as np

from layercomb.layers.attention.cores import DotProductAttention
from layercomb.layers.attention.multihead import MultiHead
from layercomb.layers.attention.projections import MergeHeads, SplitHeads
from layercomb.layers.basic.activations import NAMES, Activation
from layercomb.layers.basic.dense import Dense
from layercomb.layers.basic.dropout import Dropout
from layercomb.layers.basic.gated import GatedDense
from layercomb.layers.basic.normalization import LayerNorm, RMSNorm
from layercomb.layers.combinators.chunk import Chunk
from layercomb.layers.combinators.remat import Remat
from layercomb.layers.combinators.residual import Add
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.core.layer import Layer
from layercomb.layers.decoding.caches import KVCache, refuse_overflow
from layercomb.layers.positions.position import check_next
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.layers.reversible.rules import Rules
from layercomb.transforms.fusing.program import ACTIVATIONS, Program, Unfit, Value, need
from layercomb.transforms.quantization.layer import Quantized
from layercomb.trees import Tree

Values = tuple[Value, ...]


@Rules
def write(
    layer: Layer, program: Program, weights: Tree, state: Any, inputs: Values
) -> tuple[Values, Any]:
    """Writes what `apply` computes in ``PREDICT`` for a few positions.

    Args:
      layer: what is written.
      program: where to.
      weights, state: as of `apply`.
      inputs: as of `apply`, values of the program in the place of arrays.

    Returns:
      The outputs and the new state, as of `apply`; in it `Written` stands for what the call writes.

    Raises:
      Unfit: if there is no native way.
    """
    raise Unfit(f'there is no rule for {type(layer).__name__}')


def knows(layer: Layer) -> bool:
    """Whether there are rules for a layer and all layers inside, whatever its weights are.

    For layers that take a mask there are none.
    """
    ruled = write.rule(type(layer)) is not write.default and not getattr(layer, 'masked', False)
    return ruled and all(map(knows, layer.sublayers))


@write.register(Combinator, of=('apply',))
@write.register(MultiHead, of=('apply',))  # whose `apply` is another in training alone
def _combinator(layer, program, weights, state, inputs):
    new_state = copy.copy(state)

    def call(i: int, values: Values) -> Values:
        key, child = layer.children[i]
        its = weights.get(key, {}), state.get(key, {})
        outputs, new = write(child, program, *its, values)
        if new:
            new_state[key] = new
        return outputs

    return layer.route(call, inputs), new_state


@write.register(Remat)
def _remat(layer, program, weights, state, inputs):
    return write(layer.layer, program, weights, state, inputs)


@write.register(Chunk)
def _chunk(layer, program, weights, state, inputs):
    need(program.length <= layer.slice_len, 'more than a chunk')
    return write(layer.layer, program, weights, state, inputs)


@write.register(Quantized)
def _quantized(layer, program, weights, state, inputs):
    return write(layer.layer, program, layer.seen(weights), state, inputs)


@write.register(Dropout)
def _dropout(layer, program, weights, state, inputs):
    return inputs, state


@write.register(Add)
def _add(layer, program, weights, state, inputs):
    return (program.combine('add', *inputs),), state


@write.register(Activation)
def _activation(layer, program, weights, state, inputs):
    kinds = [name for name in ACTIVATIONS if type(layer) is NAMES[name]]
    need(bool(kinds), f'there is no native {type(layer).__name__}')
    return (program.activate(*inputs, *kinds),), state


@write.register(LayerNorm)
def _layer_norm(layer, program, weights, state, inputs):
    need(layer.use_bias, 'a layer norm without bias')
    y = program.normalize(*inputs, weights['scale'], weights['bias'], layer.epsilon)
    return (y,), state


@write.register(RMSNorm)
def _rms_norm(layer, program, weights, state, inputs):
    scale = weights['scale'] + layer.offset if layer.offset else weights['scale']
    return (program.normalize(*inputs, scale, None, layer.epsilon),), state


@write.register(Dense)
def _dense(layer, program, weights, state, inputs):
    (x,) = inputs
    return (_product(program, x, weights['kernel'], weights.get('bias')),), state


@write.register(GatedDense)
def _gated_dense(layer, program, weights, state, inputs):
    (x,) = inputs
    both = (layer._kernel_and_bias(weights, name) for name in ('gate', 'up'))
    gate, up = (_product(program, x, each['kernel'], each.get('bias')) for each in both)
    return (program.combine('multiply', program.activate(gate, layer.activation), up),), state


def _product(program: Program, x: Value, kernel: Any, bias: Any) -> Value:
    """A product over the features of x (B, T, D): (B, T, F)."""
    need(x.ndim == 3 and len(kernel.shape) == 2, 'a product over heads')
    return program.product(x, kernel, bias, (*x.shape[:2], kernel.shape[-1]))


@write.register(SplitHeads)
def _split_heads(layer, program, weights, state, inputs):
    (x,), kernel = inputs, weights['kernel']
    need(x.ndim == 3 and len(kernel.shape) == 3, 'heads of heads')
    batch, length, _ = x.shape
    shape = batch, kernel.shape[1], length, kernel.shape[2]
    bias = weights['bias'] if layer.use_bias else None
    return (program.product(x, kernel, bias, shape),), state


@write.register(MergeHeads)
def _merge_heads(layer, program, weights, state, inputs):
    x, like = inputs
    need(x.ndim == 4, 'values without heads')
    kernel, width = weights['kernel'], like.shape[-1]
    heads = (x.shape[1] * x.shape[3],), (x.shape[1], x.shape[3])  # a narrow matrix has them merged
    need(kernel.shape[:-1] in heads and kernel.shape[-1] == width, 'other heads, or another width')
    shape = *like.shape[:2], width
    bias = weights['bias'] if layer.use_bias else None
    return (program.product(x, kernel, bias, shape),), state


@write.register(RotaryPositions, of=('apply', '_turned'))
def _rotary(layer, program, weights, state, inputs):
    q, k = inputs
    position, depth = state['position'], q.shape[-1]
    need(q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:], 'queries and keys that differ')
    check_next(layer, position, program.length)
    speeds = state.get('frequencies')
    if speeds is None:
        speeds = _speeds(layer, depth)
    in_pairs = layer.layout == 'pairs'
    turned = program.turn(q, k, position.rows, speeds, layer.max_len, in_pairs, layer.magnitude)
    return turned, {**state, 'position': program.moved(position)}


@functools.lru_cache(maxsize=64)
def _speeds(layer: RotaryPositions, depth: int) -> Any:
    """The frequencies, where they do not depend on the length: the same array in all blocks."""
    with jax.ensure_compile_time_eval():
        return np.asarray(layer.speeds({}, depth, 1))


@write.register(DotProductAttention, of=('apply', '_attend', '_extend'))
def _attention(layer, program, weights, state, inputs):
    q, k, v = inputs
    need(layer.causal and not layer.masked and not layer.relative, 'attention of another kind')
    need(type(state) is KVCache and state.mask is None, 'a cache of another kind')
    taken = state.position.rows
    refuse_overflow(taken, program.length, state.room)
    caches = program.append(k, state.k, taken), program.append(v, state.v, taken)
    scale = 1 / math.sqrt(q.shape[-1]) if layer.scale is None else layer.scale
    y = program.attend(q, caches, taken, layer.window, scale, layer.softcap)
    cache = state.replace(k=caches[0], v=caches[1], position=program.moved(state.position))
    return (y,), cache
