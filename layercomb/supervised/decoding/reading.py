"""What reads prompts: a fresh state, the model over prompts, and over the positions that follow.

Prompts are read whole, with caches of the prompt's length, so that attention does not see empty
places. The caches then grow to the full length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from layercomb import trees
from layercomb.errors import UsageError
from layercomb.layers.combinators.serial import Serial
from layercomb.layers.core.layer import Arrays, Key, Layer, outputs_of
from layercomb.layers.core.mode import Mode
from layercomb.layers.core.wrapper import Wrapper
from layercomb.layers.decoding.seek import seek
from layercomb.layers.state.parts import AuxLoss, take_out
from layercomb.shapes import Signature, is_float
from layercomb.supervised.decoding.fitness import judged_init
from layercomb.supervised.decoding.prompts import Start
from layercomb.transforms.quantization.layer import bare
from layercomb.transforms.tying import Tied
from layercomb.trees import Tree


def fresh_state(net: Layer, trained: Tree, signature: Signature) -> Tree:
    """A decoding state with empty caches, and with the running statistics of training.

    Args:
      net: the model.
      trained: its state after training.
      signature: of its inputs; caches are as long as it says.

    Raises:
      UsageError: if the decoding state has no place for a statistic, or if a layer may mix
        positions and keeps no cache.
    """
    fresh, refusal = _fresh_and_judged(net, signature)
    if refusal is not None and _is_of_each_position(net.output_signature(signature, Mode.PREDICT)):
        raise UsageError(refusal)  # `logits_of` refuses a model that is no language model
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
    return trees.map_with_path(lambda path, x: kept.get(path, x), fresh)


def _fresh_and_judged(net: Layer, signature: Signature) -> tuple[Tree, str | None]:
    """A decoding state with empty caches, and why the model cannot decode, if so.

    The random weights that `init` makes beside it are cut out of what is traced: they are some
    thousand operations that programs would keep in memory, though none is ever carried out.
    """
    refusals = []

    def state() -> Tree:
        (_, fresh), refusal = judged_init(net, signature, jax.random.key(0))
        refusals.append(refusal)
        return fresh

    traced, shapes = jax.make_jaxpr(state, return_shape=True)()
    outputs_of.cache_clear()
    needed, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    made = jaxpr_as_fun(ClosedJaxpr(needed, traced.consts))()
    # Constants come back as NumPy's, which layers cannot index by what is traced.
    leaves = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in made]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves), refusals[-1]


def ingest(start: Start) -> tuple[jax.Array, Tree]:
    """Reads the prompts.

    Returns:
      (logits, state): (B, V) after each prompt's last token, and a state with room for all
      positions, in which each row stands at its prompt's length.
    """
    at = start.lengths - 1
    whole = fresh_state(start.net, start.trained, start.signature(start.room))
    state = _before(start, whole)
    inputs, short = start.inputs(start.tokens), at_one_position(start.net)
    if short is None:
        outputs, state = start.net.apply(start.weights, state, inputs, mode=Mode.PREDICT)
        logits = _take(logits_of(outputs), at)
    else:
        inputs = (*inputs, at)
        (logits,), state = short.apply(start.weights, state, inputs, mode=Mode.PREDICT)
    return logits[:, 0], seek(_grown(state, whole), start.lengths)


def _before(start: Start, whole: Tree) -> Tree:
    """A state for the prompts alone; what is not as long as they are comes from `whole`.

    Rotations that go by the length of the text then turn the prompt as they turn what follows.
    """
    length = start.tokens.shape[1]
    if length == start.room:
        return whole
    state = fresh_state(start.net, start.trained, start.signature(length))
    return jax.tree.map(lambda x, there: there if x.shape == there.shape else x, state, whole)


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


def _grown(state: Tree, whole: Tree) -> Tree:
    """A state whose caches have grown to those of `whole`, padded with zeros."""

    def grow(x: jax.Array, like: jax.Array) -> jax.Array:
        widths = [(0, there - here) for here, there in zip(x.shape, like.shape, strict=True)]
        return jnp.pad(x, widths) if any(wide for _, wide in widths) else x

    return jax.tree.map(grow, state, whole)


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
    if type(net) is Serial and net.layers:
        named = [layer.replace(name=key) for key, layer in zip(net.keys, net.layers, strict=True)]
        last = at_one_position(named[-1])
        return None if last is None else Serial(*named[:-1], last, name=net.name)
    return _AtPosition(net) if bare(net).makes_logits else None


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, at[:, None, None], axis=1)  # (B, L, D) → (B, 1, D)
