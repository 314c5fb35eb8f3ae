"""Runs that tests make where there are eight devices: what they return can be sent back."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from layercomb import (
    Model,
    UsageError,
    losses,
    models,
    optimizers,
    parallel,
    supervised,
    tl,
    transforms,
    trees,
)
from layercomb.parallel import halves
from layercomb.shapes import signature_of
from layercomb.supervised import steps
from layercomb.supervised.offloading.across import across
from layercomb.supervised.offloading.dividing import divided

LENGTH, VOCAB = 16, 32
SIZES = (VOCAB, 32, 64, 2, 4, LENGTH)

NETS = {
    'transformer': lambda: models.TransformerLM(*SIZES),
    'tied': lambda: transforms.Tied(
        models.TransformerLM(*SIZES), 'embedding/table', 'head/kernel', jnp.transpose
    ),
    'llama': lambda: models.Llama(VOCAB, 32, 64, n_layers=2, n_heads=4, max_len=LENGTH),
    'reformer': lambda: models.ReformerLM(*SIZES),
    'lsh': lambda: models.ReformerLM(
        *SIZES, attention=tl.LSHSelfAttention(4, n_hashes=2, chunk_len=4)
    ),
    'terraformer': lambda: models.TerraformerLM(*SIZES, ff_block_size=None),
    'mixture': lambda: models.TransformerLM(*SIZES, ff=tl.MixtureFF(64, 8, 2, 1, balance=0.01)),
    'dropout': lambda: models.TransformerLM(*SIZES, dropout=0.5),
}


class Own(tl.Layer):
    """A layer whose class declares no axes: y = x tanh(W)."""

    def init(self, signature, rng, mode=tl.Mode.TRAIN):
        d = signature[0].shape[-1]
        return {'w': jax.random.normal(rng, (d, d))}, {}

    def apply(self, weights, state, inputs, *, rng=None, mode=tl.Mode.EVAL):
        (x,) = inputs
        return (x @ jnp.tanh(weights['w']),), state


NETS['batch_norm'] = lambda: tl.Serial(
    tl.Embedding(VOCAB, 32), tl.Repeat(tl.Residual(tl.BatchNorm(), Own()), 2), tl.Dense(VOCAB)
)
for n in (2, 10):
    NETS[f'deep_{n}'] = functools.partial(models.TransformerLM, VOCAB, 64, 512, n, 4, LENGTH)
NETS['own'] = lambda: tl.Serial(
    tl.Embedding(VOCAB, 32), tl.Repeat(tl.Residual(tl.LayerNorm(), Own()), 2), tl.Dense(VOCAB)
)


class Batches:
    """Batches of random tokens, the same each time."""

    def __init__(self, n_rows=8):
        self.n_rows = n_rows

    def __iter__(self):
        rng = np.random.default_rng(0)
        while True:
            x = rng.integers(1, VOCAB, (self.n_rows, LENGTH + 1)).astype(np.int32)
            loss_weights = np.ones((self.n_rows, LENGTH), np.float32)
            loss_weights[0, LENGTH // 2 :] = 0  # devices have unequal weights
            yield x[:, :-1], x[:, 1:], loss_weights


class Losses(supervised.Callback):
    """Keeps the losses of a run."""

    def __init__(self):
        self.found = []

    def after_step(self, loop, row):
        self.found.append(row['train/loss'])


def mesh_of(sizes):
    """A mesh on the first devices, of data, fsdp, tensor and sequence; None for one device."""
    if sizes is None:
        return None
    n = int(np.prod(sizes))
    named = dict(zip(('data', 'fsdp', 'tensor', 'sequence'), sizes, strict=False))
    return parallel.make_mesh(**named, devices=jax.devices()[:n])


def loop_of(name, sizes, directory=None, *, optimizer='adamw', n_rows=8, **task):
    """A small run and the losses it will have."""
    given = {key: task.pop(key) for key in ('offload', 'offload_dtype') if key in task}
    recipe, _, bits = optimizer.partition('/')
    made = getattr(optimizers, recipe)(1e-3)
    made = optimizers.narrow_state(made, int(bits), min_size=1024) if bits else made
    train = supervised.TrainTask(Batches(n_rows), tl.CrossEntropyLoss(), made, **task)
    valid = supervised.EvalTask(Batches(6), tl.CrossEntropyLoss(), n_batches=2)
    found = Losses()
    loop = supervised.Loop(
        NETS[name](), train, valid, directory,
        progress=False, eval_every=None, checkpoint_every=None, callbacks=(found,),
        mesh=mesh_of(sizes), **given,
    )  # fmt: skip
    return loop, found.found


def train(name, sizes, n_steps=3, directory=None, options=None):
    """The losses of a run, and what it measures at the end."""
    loop, found = loop_of(name, sizes, directory, **(options or {}))
    row = loop.run(n_steps)
    return [*found, row['valid/loss']]


def gradient_of(net, sizes, dtype, batch):
    """The gradient of a batch's mean loss in weights of a dtype, and what it is computed from."""
    layout = parallel.Layout(mesh_of(sizes))
    loss = tl.L2Loss() if isinstance(net, tl.Dense) else tl.CrossEntropyLoss()
    weights, state = net.init(signature_of(batch[:1]), jax.random.key(0))
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(dtype), weights)
    how = functools.partial(steps._gradient, loss, 1, False, layout)
    made = layout.gradient(losses.attach(net, loss, None), how)
    weights = layout.put(net, weights, weights)
    frozen = jax.tree.map(lambda _: None, weights)
    return made, (weights, frozen, state, jax.random.key(1), layout.rows(batch))


def gradient(net, sizes, dtype, batch):
    """That gradient, in float32."""
    made, given = gradient_of(net, sizes, dtype, batch)
    with jax.numpy_dtype_promotion('standard'):  # layers of two dtypes meet
        _, _, grads = jax.jit(made)(*given)
    flat = trees.flatten(grads)
    assert all(x.dtype == dtype for x in flat.values())
    return {path: np.asarray(x, np.float32) for path, x in flat.items()}


def dtypes_of_sums(sizes):
    """The dtypes in which sums over devices are computed, of bfloat16 weights."""
    batch = next(iter(Batches()))
    made, given = gradient_of(NETS['transformer'](), sizes, jnp.bfloat16, batch)
    with jax.numpy_dtype_promotion('standard'):
        text = str(jax.make_jaxpr(made)(*given))
    found = re.findall(r':(\w+)\[[\d,]*\](?:\{[^}]*\})? = (psum\w*|reduce_scatter)\b', text)
    return sorted(set(found))


def far_from_float32(name, sizes):
    """How far the gradient in bfloat16 is from that in float32 of the same weights, relatively."""
    net, batch = NETS[name](), next(iter(Batches()))
    truth = gradient(net, None, jnp.float32, batch)
    found = gradient(net, sizes, jnp.bfloat16, batch)
    squares = [(np.sum((found[p] - x) ** 2), np.sum(x**2)) for p, x in truth.items()]
    return float(np.sqrt(np.divide(*np.sum(squares, 0))))


def large_and_small(sizes):
    """Gradients of a large row on one device and small ones on the others, by weight."""
    x = np.full((8, 8), 1 / 8, np.float32)
    x[0] *= 256
    y = np.zeros((8, 8), np.float32)
    batch = x.astype(jnp.bfloat16), y, np.ones((8, 8), np.float32)
    truth = gradient(tl.Dense(8), None, jnp.float32, batch)
    found = gradient(tl.Dense(8), sizes, jnp.bfloat16, batch)
    return {p: float(np.max(np.abs(found[p] - t) / np.abs(t))) for p, t in truth.items()}


def bytes_a_device(name, sizes, optimizer='adamw'):
    """Bytes of weights and optimizer state on the first device, and in all."""
    carry = loop_of(name, sizes, optimizer=optimizer)[0]._carry
    leaves = jax.tree.leaves((carry.trainable, carry.opt_state))
    return sum(x.addressable_shards[0].data.nbytes for x in leaves), trees.n_bytes(leaves)


def collectives(name, sizes):
    """What the program of a step communicates: (kind, shape of the result) and how often."""
    text = program(name, sizes).as_text()
    found = re.findall(
        r'= \(?(\w+\[[\d,]*\])[^=]* (all-gather|all-reduce|reduce-scatter|all-to-all)\(', text
    )
    return collections.Counter((kind, shape) for shape, kind in found)


def temporary_bytes(name, sizes):
    """Bytes that a step takes beside weights, state and batch, on a device."""
    return program(name, sizes).memory_analysis().temp_size_in_bytes


def program(name, sizes):
    """The compiled step."""
    loop, _ = loop_of(name, sizes)
    batch = loop._layout.rows(next(iter(Batches())))
    return loop._compiled.lower(loop._carry, loop._frozen, loop._key, batch).compile()


def adapters(sizes, bits):
    """The losses of adapters that are trained beside narrow weights."""
    net = models.Llama(VOCAB, 128, 256, n_layers=2, n_heads=4, max_len=LENGTH)
    signature = (jax.ShapeDtypeStruct((8, LENGTH), jnp.int32),)
    net, weights = transforms.quantize(net, net.init(signature, jax.random.key(0))[0], bits=bits)
    assert any(x.dtype == jnp.uint32 for x in jax.tree.leaves(weights))
    model = Model(*transforms.lora(net, weights, rank=4), {})
    found = Losses()
    task = supervised.TrainTask(
        Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-3), trainable=transforms.is_lora
    )
    loop = supervised.Loop(
        model, task, progress=False, eval_every=None, callbacks=(found,), mesh=mesh_of(sizes)
    )
    loop.run(3)
    return found.found


def masks():
    """How many of eight devices' masks of dropout differ."""
    layout = parallel.Layout(mesh_of((8, 1, 1)))
    drop = tl.Dropout(0.5)

    def drawn(net, weights, state, batch):
        (y,), _ = drop.apply({}, {}, batch, rng=jax.random.key(0), mode=tl.Mode.TRAIN)
        at = jax.lax.axis_index('data')
        return jnp.zeros((8, *y.shape)).at[at].set(y)

    batch = layout.rows((np.ones((8, 16), np.float32),))
    made = jax.jit(layout.sums(tl.Serial(), drawn))({}, {}, batch)
    return len({bytes(np.asarray(x)) for x in made})


def mesh_by_name(sizes):
    """A mesh of all devices."""
    parallel.make_mesh(**sizes)


def loop_on(mesh):
    """A run on what may be no mesh."""
    train = supervised.TrainTask(Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-2))
    supervised.Loop(NETS['transformer'](), train, mesh=mesh)


def raised(function, *args):
    """The text of the error that a call raises."""
    try:
        function(*args)
    except (ValueError, TypeError, UsageError) as e:
        return f'{type(e).__name__}: {e}'
    return None


def batch_of(sizes, *arrays):
    """A batch on its devices."""
    parallel.Layout(mesh_of(sizes)).rows(arrays)


def loop_measured_by(metric, sizes):
    """A run whose evaluation may not fit the mesh."""
    train = supervised.TrainTask(Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-2))
    valid = supervised.EvalTask(Batches(), metric, n_batches=1)
    supervised.Loop(NETS['llama'](), train, valid, mesh=mesh_of(sizes), progress=False)


def loop_of_layer(layer, sizes):
    """A run of a model with one layer of one's own between embedding and head."""
    net = tl.Serial(tl.Embedding(VOCAB, 32), layer, tl.Dense(VOCAB))
    task = supervised.TrainTask(Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-2))
    supervised.Loop(net, task, mesh=mesh_of(sizes), progress=False, eval_every=None).run(1)


def offloaded(sizes, **given):
    """Of a run with blocks in host memory: whether devices move parts of blocks by themselves, and
    what share of the blocks' bytes the first device has in its host memory."""
    loop, _ = loop_of('transformer', sizes, offload='blocks', **given)
    carry, places = loop._carry, loop._places
    arrays = jax.tree.leaves((carry.trainable, carry.opt_state))
    hosted = [x for x in arrays if x.sharding.memory_kind == 'pinned_host']
    share = sum(x.addressable_shards[0].data.nbytes for x in hosted) / trees.n_bytes(hosted)
    like = jax.eval_shape(halves.joined, carry.trainable)
    parts = divided(places.optimizer, like, places.n_blocks)
    made = across(loop._layout, places.net, like, parts, places.by_parts)
    return made.by_parts, share


def loop_with_streams(sizes):
    """A run whose streams are in host memory, on a mesh."""
    task = supervised.TrainTask(
        Batches(), tl.CrossEntropyLoss(), optimizers.adamw(1e-2), loss_chunk_len=4
    )
    supervised.Loop(NETS['reformer'](), task, mesh=mesh_of(sizes), offload='streams')


class Pairs:
    """Sources and shorter targets, both with padding; and a mask of the sources."""

    def __iter__(self):
        rng = np.random.default_rng(0)
        source, inputs, targets = (rng.integers(1, VOCAB, (4, n), np.int32) for n in (24, 16, 16))
        source[1, 10:] = 0
        loss_weights = np.ones(targets.shape, np.float32)
        loss_weights[0, 9:] = 0
        while True:
            yield source, inputs, source > 0, targets, loss_weights


def train_pairs(sizes):
    """The losses of an encoder-decoder."""
    net = models.Transformer(VOCAB, 32, 64, 2, 2, 4, 32, masked=True)
    found = Losses()
    task = supervised.TrainTask(Pairs(), tl.CrossEntropyLoss(), optimizers.adamw(1e-2))
    loop = supervised.Loop(
        net, task, progress=False, eval_every=None, callbacks=(found,), mesh=mesh_of(sizes)
    )
    loop.run(2)
    return found.found
