"""The start of decoding: prompts as arrays, and a model that is ready to read them.

Weights are unstacked, since slicing stacked ones copies them at every token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.checks import Count, Size, check_value
from layercomb.data.adapted import adapted
from layercomb.errors import UsageError, one_line
from layercomb.layers.core.layer import Layer
from layercomb.layers.core.walk import walk
from layercomb.layers.metrics.class_names import class_names
from layercomb.layers.positions.rotary import RotaryPositions
from layercomb.model import Model, check_tokens
from layercomb.shapes import Signature, shape_dtype
from layercomb.supervised.decoding.sampling import Sampler
from layercomb.transforms.fusing.layer import fuse
from layercomb.transforms.unstacking import unstack, unstack_state
from layercomb.trees import Tree

Sequences = Any  # (B, P) integers, or a list of sequences of them, of any lengths


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['weights', 'trained', 'context', 'tokens', 'lengths'],
    meta_fields=['net', 'room'],
)
@dataclasses.dataclass(frozen=True)
class Start:
    """Everything that decoding starts from.

    Attributes:
      net: the model, unstacked.
      room: how many positions the caches hold.
      weights: of the model.
      trained: the state that training left, such as running statistics.
      context: the inputs besides tokens, the same at each step: none, or an encoder's source
        (B, S) int32 and, if the model takes one, its mask (B, S) bool.
      tokens: (B, P) int32, the prompts, padded at the end.
      lengths: (B,) int32, of the prompts.
    """

    net: Layer
    room: int
    weights: Tree
    trained: Tree
    context: tuple[jax.Array, ...]
    tokens: jax.Array
    lengths: jax.Array

    def signature(self, length: int, n_rows: int | None = None) -> Signature:
        """The signature of the model's inputs.

        Args:
          length: how many tokens a row has.
          n_rows: how many rows there are; None takes the number of prompts.
        """
        n = len(self.tokens) if n_rows is None else n_rows
        around = tuple(shape_dtype((n, *x.shape[1:]), x.dtype) for x in self.context)
        tokens = shape_dtype((n, length), 'int32')
        return (*around[:1], tokens, *around[1:])

    def inputs(self, tokens: jax.Array) -> tuple[jax.Array, ...]:
        """The model's inputs: tokens (B, T) int32, between the source and its mask, if any."""
        return (*self.context[:1], tokens, *self.context[1:])


def begin(
    model: Model,
    prompts: Sequences,
    n_tokens: int,
    inputs: Sequences | None = None,
    eos_id: int | None = None,
) -> Start:
    """Prepares decoding; arguments and errors are those of `decoding.generate`."""
    net, weights, state = checked(model)
    n_tokens = check_value('decoding', 'n_tokens', n_tokens, Size)
    tokens, lengths = padded('prompt', prompts)
    longest, limit = tokens.shape[1], max_len(net)
    context = context_of(net, inputs, len(tokens))
    check_ids(net, 'prompt', tokens)
    if eos_id is not None:
        check_ids(net, 'eos_id', np.full((1, 1), check_value('decoding', 'eos_id', eos_id, Count)))
    needed = longest + n_tokens
    if limit is not None and needed > limit:
        raise UsageError(
            f'the prompt of {longest} tokens and {n_tokens} new ones make {needed}, and '
            f"the model's max_len is {limit}: shorten the prompt, or ask for fewer"
        )
    steps = (n for n in (limit, *_steady_lens(net)) if n is not None and n >= needed)
    room = min((round_up(needed), *steps))
    padding = min(padded_length(net, 'prompt', lengths), room) - longest
    tokens = np.pad(tokens, ((0, 0), (0, padding)))
    unstacked, weights = unstack(net, weights)
    unstacked = fuse(unstacked)
    trained = unstack_state(net, state)
    arrays = jnp.asarray(tokens), jnp.asarray(lengths)
    return Start(unstacked, room, weights, trained, context, *arrays)


def given(model: Model, prompt: str, tokenizer: Any) -> dict[str, Any]:
    """The arguments `prompts` and `inputs` of `decoding.generate`, from one prompt as text.

    A language model continues the prompt. An encoder-decoder reads it, and its decoder starts from
    the tokenizer's ``start_id`` if it has one, as those of pretrained models do, or else from
    `eos_id`, as answers of `data.pairs` do.

    Args:
      model: a language model or an encoder-decoder.
      prompt: the text.
      tokenizer: see `data.Tokenizer`.

    Raises:
      UsageError: if the tokenizer makes no token of the prompt.
    """
    tokenizer = adapted(tokenizer)
    ids = tokenizer.encode(prompt)
    if not ids.size:
        whose = type(tokenizer.tokenizer).__name__
        raise UsageError(f'{whose} makes no token of the prompt {prompt!r:.60}: give another one')
    if model.layer.n_in == 1:
        return {'prompts': [ids]}
    start = getattr(tokenizer.tokenizer, 'start_id', None)
    return {'inputs': [ids], 'prompts': [[tokenizer.eos_id if start is None else start]]}


def as_id(eos_id: int | None) -> np.int32:
    """The id of the token that ends a row; −1, which no token has, for None."""
    return np.int32(-1 if eos_id is None else eos_id)


def padded_length(net: Layer, what: str, lengths: np.ndarray) -> int:
    """The length that rows are padded to: by `round_up`, unless a layer would see the padding.

    Args:
      net: the model.
      what: what messages call a row.
      lengths: (B,) integers, of the rows.

    Raises:
      UsageError: if a layer sees padding, and lengths differ.
    """
    seeing = _seeing_padding(net)
    if seeing is None:
        return round_up(int(lengths.max()))
    if len(set(lengths.tolist())) > 1:
        option = getattr(seeing, 'neighbourhood', None)
        its = '' if option is None else f' with neighbourhood={option!r}'
        raise UsageError(
            f'{type(seeing).__name__}{its} sees what a shorter {what} is padded with: give {what}s '
            'of one length, or take them one by one; LSH attention sees nothing of it with '
            "neighbourhood='bucket'"
        )
    return int(lengths.max())


def reads_whole_prompts(net: Layer) -> bool:
    """Whether a layer would see what a prompt is padded with, so that it is read as it is."""
    return _seeing_padding(net) is not None


def _seeing_padding(net: Layer) -> Layer | None:
    return next((layer for layer in _of_what_is_written(net) if layer.sees_padding), None)


def _of_what_is_written(net: Layer) -> Iterator[Layer]:
    """The layers that work on the sequence that decoding writes.

    A layer that reads a memory is one of them; layers inside it, such as an encoder, are not: an
    encoder has its own length and mask, and may look ahead.
    """
    for _, layer in walk(net, enter=lambda layer: not layer.reads_memory):
        yield layer


def checked(model: Model) -> tuple[Layer, Tree, Tree]:
    """A model's layer, weights and state, checked.

    Args:
      model: an `lc.Model`.

    Raises:
      TypeError: if it has no weights.
      UsageError: if it sees later positions, or tells classes apart.
    """
    if not isinstance(model, Model) or model.weights is None:
        raise TypeError('decoding needs an lc.Model with weights: init, load or train it first')
    if (names := class_names(model.layer)) is not None:
        raise UsageError(
            f'this model tells {len(names)} classes of texts apart ({str(names[0])!r}, …), and is '
            'no language model: give it texts by decoding.classify'
        )
    _refuse_looking_ahead(model.layer)
    return model.layer, model.weights, model.state


def context_of(net: Layer, inputs: Sequences | None, n_rows: int) -> tuple[jax.Array, ...]:
    """The source that an encoder reads, and its mask if the model takes one.

    Args:
      net: the model.
      inputs: (B, S) integers, or a list of sequences of them; None for a language model.
      n_rows: B, the number of prompts.

    Returns:
      (), or a source (B, S) int32, or that and a mask (B, S) bool.

    Raises:
      UsageError: if there is a source and no encoder, or an encoder and no source; if the source
        has another number of rows; or if rows differ in length and the model takes no mask.
    """
    if net.n_in > 1 and not any(layer.reads_memory for _, layer in walk(net)):
        raise UsageError(
            f'the model takes {net.n_in} inputs, and no part of it reads one of them as an encoder '
            'does, in tl.Once: decoding knows language models of tokens alone (prompts need no '
            'mask, for each is read at its own length) and encoder-decoders'
        )
    if (inputs is not None) != (net.n_in > 1):
        raise UsageError(
            'the model reads a source before it writes: give inputs= beside the prompts'
            if inputs is None
            else 'inputs= is for a model with an encoder: give a language model prompts alone'
        )
    if inputs is None:
        return ()
    if net.n_in > 3:
        raise UsageError(
            f'the model takes {net.n_in} inputs: decoding knows models of tokens, or of a source '
            'and tokens, and perhaps the mask of the source'
        )
    source, lengths = padded('source', inputs)
    if len(source) != n_rows:
        raise UsageError(f'{len(source)} sources and {n_rows} prompts: give as many of each')
    longest, limit = source.shape[1], source_max_len(net)
    check_ids(net, 'source', source)
    if limit is not None and longest > limit:
        raise UsageError(
            f"the source has {longest} tokens, and the model's max_len is {limit}: shorten it"
        )
    if net.n_in == 2:
        if len(set(lengths.tolist())) > 1:
            raise UsageError(
                'sources of different lengths need a mask: make the model with masked=True, or '
                'give sources of one length'
            )
        return (jnp.asarray(source),)
    room = round_up(longest) if limit is None else min(round_up(longest), limit)
    source = np.pad(source, ((0, 0), (0, room - longest)))
    mask = np.arange(room) < lengths[:, None]
    return jnp.asarray(source), jnp.asarray(mask)


def padded(what: str, sequences: Sequences) -> tuple[np.ndarray, np.ndarray]:
    """Makes one array of ragged sequences.

    Args:
      what: what messages call a sequence.
      sequences: (B, P) integers, or a list of B sequences of integers.

    Returns:
      (tokens, lengths): (B, P) int32, padded with 0 at the end, and (B,) int32.

    Raises:
      UsageError: if they are not sequences of integers, if one is empty, or if there is none.
    """
    try:
        rows: Sequence[np.ndarray] = [np.asarray(row) for row in sequences]
    except (TypeError, ValueError) as e:  # no list, or lists in it that are ragged themselves
        raise UsageError(f'{what}s are a list of sequences of token ids ({one_line(e)})') from None
    for row in rows:
        if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
            raise UsageError(
                f'a {what} is a sequence of at least one token id, and {what}s are a list of them: '
                f'got {row.dtype} of shape {row.shape}'
            )
    if not rows:
        raise UsageError(f'there is no {what}: give at least one')
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for i, row in enumerate(rows):
        if row.min() < 0 or row.max() > np.iinfo(np.int32).max:
            raise UsageError(f'a {what} holds ids that no vocabulary has: check the tokenizer')
        tokens[i, : len(row)] = row
    return tokens, lengths


def check_ids(net: Layer, what: str, tokens: np.ndarray) -> None:
    """Raises a UsageError if ids lie outside the vocabulary of the layer that reads them.

    Args:
      net: the model.
      what: 'source' for what an encoder reads; else what messages call the ids.
      tokens: (B, L) integers.
    """
    after_source = net.n_in > 1 and what != 'source'
    try:
        check_tokens(net, (None, tokens) if after_source else (tokens,))
    except ValueError as e:
        raise UsageError(f'the {what} does not fit the model: {e}') from None


def check_bias(net: Layer, sampler: Sampler) -> None:
    """Raises a UsageError if `logit_bias` names a token outside the vocabulary."""
    if sampler.logit_bias:
        check_ids(net, 'logit_bias', np.array([[token for token, _ in sampler.logit_bias]]))


def max_len(net: Layer) -> int | None:
    """The most positions that a model can write, prompt included; None if nothing limits them.

    Args:
      net: the model; its least ``max_len`` counts.
    """
    limits = (getattr(layer, 'max_len', None) for layer in _of_what_is_written(net))
    return min((n for n in limits if n is not None), default=None)


def longest(net: Layer) -> int | None:
    """The most positions of texts that are decoded together; None for any number.

    It is `max_len`, or less: where rotations go by the length of a text (`DynamicScaling`,
    `LongRopeScaling`), only texts up to the length from which they change can share a state.
    """
    limits = (max_len(net), *_steady_lens(net))
    return min((n for n in limits if n is not None), default=None)


def _steady_lens(net: Layer) -> list[int]:
    """The lengths up to which the rotations of a model do not go by the length."""
    turning = (layer for layer in _of_what_is_written(net) if isinstance(layer, RotaryPositions))
    found = [layer.scaling.steady_len for layer in turning if layer.scaling is not None]
    return [n for n in found if n is not None]


def source_max_len(net: Layer) -> int | None:
    """The most positions that a model's encoder can read; None if nothing limits them."""
    readers = [layer for layer in _of_what_is_written(net) if layer.reads_memory]
    limits = [max_len(inside) for layer in readers for inside in layer.sublayers]
    return min((n for n in limits if n is not None), default=None)


def round_up(length: int) -> int:
    """Rounds a length up, so that few programs are compiled.

    The result is a multiple of 64, or of an eighth of the power of two below the length if that is
    more. Beyond 512, padding is at most an eighth of the length.

    >>> [round_up(n) for n in (1, 64, 65, 1000, 1025, 4097)]
    [64, 64, 128, 1024, 1152, 4608]
    """
    step = max(64, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _refuse_looking_ahead(net: Layer) -> None:
    """Raises a UsageError if a layer sees later positions, which decoding does not have."""
    for layer in _of_what_is_written(net):
        if getattr(layer, 'causal', True) is False:
            raise UsageError(
                f'{type(layer).__name__} with causal=False sees later positions, so it cannot make '
                'them one by one: decode a model with causal attention; a class of your own that '
                'attends to a memory says reads_memory = True'
            )
