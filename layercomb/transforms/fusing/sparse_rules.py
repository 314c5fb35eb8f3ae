"""How sparse layers, and those that keep several streams, become instructions: see `rules`."""

from __future__ import annotations

import math

from layercomb.layers.combinators.routing import Concatenate, Rearrange
from layercomb.layers.core.combinator import Combinator
from layercomb.layers.decoding.caches import Past, refuse_overflow
from layercomb.layers.reversible.stack import ReversibleSerial
from layercomb.layers.sparse.attention import FoldHeads, UnfoldHeads
from layercomb.layers.sparse.feed_forward import SparseFF
from layercomb.layers.sparse.local_conv import LocalConv
from layercomb.layers.sparse.mixture import MixtureFF
from layercomb.layers.sparse.multiplicative import MultiplicativeDense, MultiplicativeHead
from layercomb.transforms.fusing.program import ACTIVATIONS, need
from layercomb.transforms.fusing.rules import write
from layercomb.transforms.fusing.sparse_program import Routing

# Streams of a program are float32 already.
write.register(ReversibleSerial, of=('apply', 'run'))(write.rule(Combinator))


@write.register(Rearrange, of=('apply',))
def _rearrange(layer, program, weights, state, inputs):
    return layer.pick(tuple(inputs)), state


@write.register(Concatenate)
def _concatenate(layer, program, weights, state, inputs):
    need(layer.axis in (-1, 2) and all(x.ndim == 3 for x in inputs), 'values joined elsewhere')
    return (program.join(inputs, sum(x.width for x in inputs)),), state


@write.register(FoldHeads)
def _fold_heads(layer, program, weights, state, inputs):
    (x,), n = inputs, layer.n_heads
    need(x.ndim == 3 and x.width % n == 0, 'features that heads do not divide')
    return (program.view(x, (x.shape[0], n, x.shape[1], x.width // n)),), state


@write.register(UnfoldHeads)
def _unfold_heads(layer, program, weights, state, inputs):
    (x,) = inputs
    need(x.ndim == 4, 'values without heads')
    return (program.view(x, (x.shape[0], x.shape[2], x.width)),), state


@write.register(MultiplicativeDense)
def _multiplicative_dense(layer, program, weights, state, inputs):
    return (_factored(layer, program, weights, *inputs),), state


@write.register(MultiplicativeHead)
def _multiplicative_head(layer, program, weights, state, inputs):
    y = _factored(layer, program, weights, *inputs)
    need(y.width >= layer.vocab_size, 'a vocabulary of another size')
    return (y if y.width == layer.vocab_size else program.join([y], layer.vocab_size),), state


def _factored(layer, program, weights, x):
    need(x.ndim == 3, 'a product over heads')
    bias = weights['bias'] if layer.use_bias else None
    return program.factored_product(x, weights['modules'], weights['features'], bias)


@write.register(LocalConv)
def _local_conv(layer, program, weights, state, inputs):
    (x,), kernel, bias = inputs, weights['kernel'], weights['bias']
    need(x.ndim == 3 and type(state) is Past, 'past inputs of another kind')
    known = kernel.ndim == 4 and kernel.shape[:2] == layer.kernel_size
    need(known and x.width == layer.n_modules * kernel.shape[2], 'a kernel of another shape')
    need(bias.ndim == 2 and len(bias) == layer.n_outputs, 'a bias of another shape')
    taken, reach = state.position.rows, layer.kernel_size[0] - 1
    refuse_overflow(taken, program.length, state.past.shape[1] - reach)
    made, past = program.convolve(x, state.past, taken, kernel, bias)
    return made, state.replace(past=past, position=program.moved(state.position))


@write.register(SparseFF)
def _sparse_ff(layer, program, weights, state, inputs):
    (x,) = inputs
    few = math.prod(x.shape[:-1]) < layer.block_size  # of more, all units are computed
    need(x.ndim == 3 and few and layer.activation in ACTIVATIONS, 'all units, or another function')
    first, second, its = (weights[key] for key in ('in', 'out', 'controller'))
    controller = its['in']['kernel'], its['out']['kernel']
    need(controller[1].shape[1] == layer.d_ff, 'a controller of another width')
    kernels = first['kernel_transposed'], second['kernel']
    biases = first.get('bias'), second['bias'] if layer.use_bias else None
    n, kind = layer.block_size, layer.activation
    return (program.chosen(x, kernels, controller, biases, n, kind),), state


@write.register(MixtureFF)
def _mixture_ff(layer, program, weights, state, inputs):
    (x,), n = inputs, layer.n_experts
    few = math.prod(x.shape[:-1]) * layer.n_chosen <= n - layer.n_shared  # as the layer says
    need(x.ndim == 3 and few and layer.activation in ACTIVATIONS, 'tiles, or another function')
    first, second, router = (weights[key] for key in ('in', 'out', 'router'))
    kernels = [first['kernel_transposed'], second['kernel']]
    kernels += [weights['up']['kernel_transposed']] if layer.gated else []
    its = router['kernel'], router['bias'] if layer.balance_bias else None
    biases = (first['bias'], second['bias']) if layer.use_bias else (None, None)
    need(math.prod(kernels[0].shape[:-1]) == layer.d_ff, 'units of another number')
    softmax = layer.routing == 'softmax'
    how = n, layer.n_chosen, layer.n_shared, softmax, layer.normalize, layer.scale
    routing = Routing(*how, layer.activation)
    return (program.mixture(x, kernels, its, biases, routing),), state
