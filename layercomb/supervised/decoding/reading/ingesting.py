"""What reads prompts: a fresh state, the model over prompts, and over the positions that follow.

Prompts are read whole, with caches of the prompt's length, so that attention does not see empty
places. The caches then grow to the full length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Key, Layer, outputs_of
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper, given_name
from layercomb.layers.state.parts import AuxLoss, take_out
from layercomb.shapes import Signature, is_float
from layercomb.supervised.decoding.prompts import Start
from layercomb.supervised.decoding.reading.fitness import judged_init
from layercomb.supervised.decoding.reading.parts import (
    Settled,
    apply_in_parts,
    with_equal_blocks_once,
)
from layercomb.transforms.fusing.layer import Fused
from layercomb.transforms.quantization.layer import bare
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


def fresh_state(net: Layer, trained: Tree, signature: Signature) -> Tree:
    """A decoding state with empty caches, and with the running statistics of training.

    Args:
      net: the model.
      trained: its state after training.
      signature: of its inputs; caches are as long as it says.

    Returns:
      Arrays that nobody else has, so that they may be donated.

    Raises:
      UsageError: if the decoding state has no place for a statistic, or if a layer may mix
        positions and keeps no cache.
    """
    made = _fresh(net, signature)
    _refuse_unfit(net, made, signature)
    return _with_statistics(net, trained, signature, made.state())


class _Fresh(NamedTuple):
    """How a decoding state with empty caches is made."""

    program: ClosedJaxpr  # a key → its leaves
    shapes: Tree
    refusal: str | None  # why the model cannot decode, if so

    def leaves(self, wanted: Sequence[bool]) -> list[jax.Array]:
        """The leaves that are wanted."""
        made, n_keys = _leaves(self.program, tuple(wanted))
        leaves: list[jax.Array] = made(*(jax.random.key(0) for _ in range(n_keys)))
        return leaves

    def state(self) -> Tree:
        """All of it."""
        shapes, structure = jax.tree.flatten(self.shapes)
        return jax.tree.unflatten(structure, self.leaves([True] * len(shapes)))


@functools.lru_cache(maxsize=64)
def _leaves(program: ClosedJaxpr, wanted: tuple[bool, ...]) -> tuple[Any, int]:
    """A compiled function of some leaves, each an array of its own, and how many keys it takes."""
    needed, used = dce_jaxpr(program.jaxpr, list(wanted))
    return jax.jit(jaxpr_as_fun(ClosedJaxpr(needed, program.consts))), sum(used)


@functools.lru_cache(maxsize=32)
def _fresh(net: Layer, signature: Signature) -> _Fresh:
    """What a decoding state is made by.

    The random weights that `init` makes beside it are cut out of what is traced: they are some
    thousand operations that programs would keep in memory, though none is ever carried out.
    """
    lean = with_equal_blocks_once(net)
    made, draws = _traced(lean, signature)
    return made if lean is net or not draws else _traced(net, signature)[0]


def _traced(net: Layer, signature: Signature) -> tuple[_Fresh, bool]:
    """What makes a state, and whether it depends on the key."""
    refusals = []

    def state(key: jax.Array) -> Tree:
        (_, fresh), refusal = judged_init(net, signature, key)
        refusals.append(refusal)
        return fresh

    traced, shapes = jax.make_jaxpr(state, return_shape=True)(jax.eval_shape(jax.random.key, 0))
    outputs_of.cache_clear()
    every = [True] * len(traced.jaxpr.outvars)
    needed, used = dce_jaxpr(traced.jaxpr, every, instantiate=True)
    _, used = dce_jaxpr(traced.jaxpr, every)
    return _Fresh(ClosedJaxpr(needed, traced.consts), shapes, refusals[-1]), any(used)


def _refuse_unfit(net: Layer, made: _Fresh, signature: Signature) -> None:
    """Raises a UsageError if a language model cannot decode; `logits_of` refuses other models."""
    is_refused = made.refusal is not None
    if is_refused and _is_of_each_position(net.output_signature(signature, Mode.PREDICT)):
        raise UsageError(made.refusal)


def _with_statistics(net: Layer, trained: Tree, signature: Signature, fresh: Tree) -> Tree:
    """A decoding state with the running statistics of training in the place of its own."""
    statistics, _ = take_out(trained, AuxLoss)  # decoding needs no auxiliary losses
    if not jax.tree.leaves(statistics):
        return fresh
    made = jax.eval_shape(lambda: net.init(signature, jax.random.key(0), Mode.TRAIN)[1])
    of_training = trees.flatten(made)
    kept = {path: x for path, x in trees.flatten(statistics).items() if path in of_training}
    homeless = sorted(kept.keys() - trees.flatten(fresh).keys())
    if homeless:
        raise UsageError(
            f'training left {homeless[0]!r} in a layer that decoding runs once, or after a memory, '
            'where it cannot be taken along: use a norm without running statistics there'
        )
    return trees.map_with_path(lambda path, x: jnp.array(kept[path]) if path in kept else x, fresh)


def ingest(start: Start) -> tuple[jax.Array, Tree]:
    """Reads the prompts.

    Called outside `jit` it is several programs, see `apply_in_parts`.

    Returns:
      (logits, state): (B, V) after each prompt's last token, and a state with room for all
      positions, in which each row stands at its prompt's length.
    """
    at, whole = start.lengths - 1, _fresh(start.net, start.signature(start.room))
    state, settled = _before(start, whole), Settled(whole.shapes, start.lengths)
    inputs, short = start.inputs(start.tokens), at_one_position(start.net)
    if short is None:
        outputs, state = apply_in_parts(start.net, start.weights, state, inputs, settled)
        return _take(logits_of(outputs), at)[:, 0], state
    inputs = (*inputs, at)
    (logits,), state = apply_in_parts(short, start.weights, state, inputs, settled)
    return logits[:, 0], state


def _before(start: Start, whole: _Fresh) -> Tree:
    """A state for the prompts alone; what is not as long as they are comes from `whole`.

    Rotations that go by the length of the text then turn the prompt as they turn what follows.
    """
    signature = start.signature(start.tokens.shape[1])
    made = _fresh(start.net, signature)
    _refuse_unfit(start.net, made, signature)
    shapes, structure = jax.tree.flatten(made.shapes)
    is_of_whole = [
        x.shape == there.shape
        for x, there in zip(shapes, jax.tree.leaves(whole.shapes), strict=True)
    ]
    longer = iter(whole.leaves(is_of_whole))
    shorter = iter(made.leaves([not of_whole for of_whole in is_of_whole]))
    leaves = [next(longer if of_whole else shorter) for of_whole in is_of_whole]
    state = jax.tree.unflatten(structure, leaves)
    return _with_statistics(start.net, start.trained, signature, state)


def logits_of(outputs: tuple[jax.Array, ...]) -> jax.Array:
    """A language model's only output, (B, L, V).

    Args:
      outputs: of the model.

    Raises:
      UsageError: if they are anything else than one float array of three axes.
    """
    return _of_each_position(outputs, 'of tokens')


def _of_each_position(values: tuple[jax.Array, ...], where: str) -> jax.Array:
    """The only value, (B, L, …) floats; `where` says which part of a model makes it."""
    if not _is_of_each_position(values):
        given = ', '.join(f'{x.dtype}{list(x.shape)}' for x in values)
        raise UsageError(
            f'decoding needs a language model, (B, L) → logits (B, L, V), and {where} this one '
            f'makes {given}'
        )
    return values[0]


def _is_of_each_position(values: tuple[Any, ...]) -> bool:
    """Whether arrays, or their signatures, are a single one, of three axes and floats."""
    return len(values) == 1 and values[0].ndim == 3 and is_float(values[0])


def advance(start: Start, state: Tree, tokens: jax.Array) -> tuple[jax.Array, Tree]:
    """Runs the next positions.

    Args:
      start: what decoding starts from.
      state: in ``PREDICT``.
      tokens: (B, T) int32, each row's next tokens.

    Returns:
      (logits, state): (B, T, V) after each of the tokens, and the new state.
    """
    inputs = start.inputs(tokens)
    (logits,), state = start.net.apply(start.weights, state, inputs, mode=Mode.PREDICT)
    return logits, state


class _AtPosition(Wrapper):
    """A head at one position of each row: (x (B, L, D), positions (B,)) → (B, 1, V)."""

    n_in = property(lambda self: 2)
    position_wise = False

    def apply(
        self, weights: Tree, state: Tree, inputs: Arrays, *, rng: Key = None, mode: Mode = Mode.EVAL
    ) -> tuple[Arrays, Tree]:
        x, at = inputs
        x = _take(_of_each_position((x,), 'before its last layer'), at)
        return self.layer.apply(weights, state, (x,), rng=rng, mode=mode)


def at_one_position(net: Layer) -> Layer | None:
    """The model with another last input, positions (B,), and logits (B, 1, V) only there.

    Returns:
      A layer with the same paths; None if the model does not end with a layer that says
      ``makes_logits``.
    """
    if isinstance(net, Tied):
        inner = at_one_position(net.layer)
        return None if inner is None else net.replace(layer=inner)
    if isinstance(net, Fused):  # prompts are too long for it
        inner = at_one_position(net.layer)
        return None if inner is None else inner.replace(name=given_name(net))
    if type(net) is Serial and net.layers:
        named = [layer.replace(name=key) for key, layer in zip(net.keys, net.layers, strict=True)]
        last = at_one_position(named[-1])
        return None if last is None else Serial(*named[:-1], last, name=net.name)
    return _AtPosition(net) if bare(net).makes_logits else None


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, at[:, None, None], axis=1)  # (B, L, D) → (B, 1, D)
