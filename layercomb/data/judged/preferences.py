"""Prompts with two answers, of which one is preferred: examples for `tl.PreferenceLoss`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data.adapted import Adapted, adapted
from layercomb.data.judged.rows import rows, text_of
from layercomb.data.packing import Arrays
from layercomb.data.sources import Mapped
from layercomb.data.tokenizers import Tokenizer
from layercomb.errors import UsageError, UsageWarning

_ME = 'preferences'


class Answered(NamedTuple):
    """A prompt with an answer.

    Attributes:
      ids: (n,) int32, tokens of both.
      start: where the answer begins, at least 1.
    """

    ids: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True, eq=False)
class Preferences(Sequence[Arrays]):
    """Pairs of answered prompts as examples of one shape; see `preferences`.

    Attributes:
      pairs: the preferred and the rejected answer of each.
      length: L.
    """

    pairs: tuple[tuple[Answered, Answered], ...]
    length: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Mapped(range(len(self))[index], self.__getitem__)
        made = [_example(row, self.length) for row in self.pairs[index]]
        return tuple(np.stack(column) for column in zip(*made, strict=True))


@checked
def preferences(
    source: Any, tokenizer: Tokenizer, length: Size, *, drop_long: bool = False
) -> Preferences:
    """Returns pairs of answers, a preferred and a rejected one, as examples for DPO.

    A row of the source has a `prompt`, and the answers `chosen` and `rejected`. Each is a text, or
    a list of messages ({'role': …, 'content': …}): `chosen` and `rejected` then are the assistant's
    one message, or whole conversations that are the same but for the last message, as in
    UltraFeedback. If the tokenizer has a chat template, texts are messages of the user and the
    assistant, and the template is applied. Without one the row is: the token that starts a text (or
    ends one, if there is none), prompt, answer, and the token that ends a text.

    Only the answer, with the token that ends it, has weight. All is tokenized at once, so that what
    is wrong shows before training. Make batches of the pairs by `preference_batches`.

    Args:
      source: the path of a .jsonl (.gz), .json or .parquet file, or a sequence of rows, dicts.
      tokenizer: see `data.Tokenizer`; for conversations that of a model with a template.
      length: L, of inputs and targets. Longer answers are cut, and a warning says how many.
      drop_long: whether to leave out pairs whose prompt has no room for an answer, with a warning;
        they are refused otherwise.

    Returns:
      A sequence of (inputs, targets, loss_weights), the preferred row first: (2, L) int32,
      (2, L, 2) int32 and (2, L) float32. Targets hold, beside each token, the bits of a float32,
      see `tl.PreferenceLoss`.

    Raises:
      TypeError, ValueError: if an argument has the wrong type or range, or the source is empty.
      UsageError: if a row lacks something, an answer is empty, both answers are the same, or the
        prompt is too long, naming the row.

    Warns:
      UsageWarning: if answers are cut, or pairs left out.

    >>> from layercomb.data import ByteTokenizer
    >>> rows = [{'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}]
    >>> inputs, targets, weights = preferences(rows, ByteTokenizer(), 8)[0]
    >>> targets[:, :, 0].tolist()
    [[49, 43, 49, 61, 50, 0, 0, 0], [49, 43, 49, 61, 51, 0, 0, 0]]
    >>> weights[0].tolist()
    [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    """
    known = adapted(tokenizer, _ME)
    found, n_long, n_cut = [], 0, 0
    for where, row in rows(_ME, source):
        pair = _pair(where, row, known)
        start = max(each.start for each in pair)
        if start > length:
            n_long += 1
            if drop_long:
                continue
            raise UsageError(
                f'{_ME}: the prompt of {where} has {start} tokens, and length={length} leaves no '
                'room for an answer: give a greater length, or drop_long=True'
            )
        n_cut += any(len(each.ids) > length + 1 for each in pair)
        one, other = (each.ids[: length + 1] for each in pair)
        if np.array_equal(one, other):
            raise UsageError(
                f'{_ME}: chosen and rejected of {where} are the same in {length} tokens, so '
                'nothing is preferred: remove the row, or give a greater length'
            )
        found.append((Answered(one, pair[0].start), Answered(other, pair[1].start)))
    if not found:
        raise UsageError(f'{_ME}: no prompt fits into length={length}: give a greater length')
    _tell(len(found), n_long, n_cut, length)
    return Preferences(tuple(found), length)


def _tell(n: int, n_long: int, n_cut: int, length: int) -> None:
    said = [f'{n_cut} of {n} pairs have an answer that is cut'] * bool(n_cut)
    said += [f'{n_long} pairs are left out, whose prompt has no room for an answer'] * bool(n_long)
    if said:
        warnings.warn(f'{_ME}, length={length}: {"; ".join(said)}', UsageWarning, stacklevel=4)


def _pair(where: str, row: Mapping[str, Any], tokenizer: Adapted) -> tuple[Answered, Answered]:
    """The preferred and the rejected answer of a row, with the prompt before each."""
    for name in ('chosen', 'rejected'):
        if row.get(name) is None:
            raise UsageError(
                f"{_ME}: {where} has no {name!r}: a row has 'prompt', 'chosen' and 'rejected'"
            )
    chat = getattr(tokenizer.tokenizer, 'chat', None)
    talks = any(not isinstance(row.get(x), str | None) for x in ('prompt', 'chosen', 'rejected'))
    if chat is None and talks:
        raise UsageError(
            f'{_ME}: {where} holds messages, and the tokenizer has no chat template: take the '
            'tokenizer of a model that was taught to answer, or give texts'
        )
    make = _plain if chat is None else _talked
    one, other = (make(where, row, name, tokenizer) for name in ('chosen', 'rejected'))
    if not np.array_equal(one.ids[: one.start], other.ids[: other.start]):
        raise UsageError(
            f'{_ME}: chosen and rejected of {where} answer different prompts: give conversations '
            'that are the same but for the last message'
        )
    return one, other


def _plain(where: str, row: Mapping[str, Any], name: str, tokenizer: Adapted) -> Answered:
    bos = getattr(tokenizer.tokenizer, 'bos_id', None)
    first = tokenizer.eos_id if bos is None else bos
    prompt = _inside(tokenizer, text_of(_ME, where, row, 'prompt'), first)
    answer = _inside(tokenizer, text_of(_ME, where, row, name), first)
    ids = np.concatenate([[first], prompt, answer, [tokenizer.eos_id]])
    return Answered(ids.astype(np.int32), len(prompt) + 1)


def _inside(tokenizer: Adapted, text: str, first: int) -> np.ndarray:
    """The ids of a text without those that a tokenizer puts around it."""
    ids = tokenizer.encode(text)
    ids = ids[1:] if ids.size and ids[0] == first else ids
    return ids[:-1] if ids.size and ids[-1] == tokenizer.eos_id else ids


def _talked(where: str, row: Mapping[str, Any], name: str, tokenizer: Adapted) -> Answered:
    """By the template: what comes before the answer, and the answer up to the end of its turn."""
    messages = _messages(where, row, name)
    theirs: Any = tokenizer.tokenizer
    before = theirs.chat.render(messages[:-1])
    whole = theirs.chat.render(messages, add_generation_prompt=False)
    if not whole.startswith(before) or whole == before:
        raise UsageError(
            f'{_ME}: the chat template changes what is before the answer of {where}, so the answer '
            'cannot be found: give texts, and a tokenizer without a template'
        )
    prompt = theirs.encode_chat(messages[:-1])
    answer = np.asarray(theirs.vocabulary.encode(whole[len(before) :], whole=False), np.int32)
    ends = np.flatnonzero(np.isin(answer, theirs.stop_ids))
    answer = answer[: ends[-1] + 1] if ends.size else np.append(answer, tokenizer.eos_id)
    return Answered(np.concatenate([prompt, answer]).astype(np.int32), len(prompt))


def _messages(where: str, row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A conversation that ends with the answer."""
    prompt, answer = row.get('prompt'), row[name]
    if isinstance(answer, str):
        answer = [{'role': 'assistant', 'content': answer}]
    if isinstance(prompt, str):
        prompt = [{'role': 'user', 'content': prompt}]
    whole = [*_listed(where, 'prompt', prompt), *_listed(where, name, answer)]
    if len(answer) > 1:  # a conversation of its own; what is before it repeats its beginning
        whole = _listed(where, name, answer)
    last = whole[-1]
    if len(whole) < 2 or last.get('role') != 'assistant':
        raise UsageError(
            f'{_ME}: {name!r} of {where} must end with a message of the assistant, after a prompt: '
            "give e.g. {'role': 'assistant', 'content': …}"
        )
    text_of(_ME, where, {name: last.get('content')}, name)
    return whole


def _listed(where: str, name: str, messages: Any) -> list[dict[str, Any]]:
    if messages is None and name == 'prompt':
        return []
    is_list = isinstance(messages, Sequence | np.ndarray) and not isinstance(messages, str | bytes)
    if not is_list or not all(isinstance(each, Mapping) for each in messages):
        raise UsageError(
            f'{_ME}: {name!r} of {where} is {messages!r:.40}: give a text, or a list of messages'
        )
    return [dict(each) for each in messages]


def _example(row: Answered, length: int) -> Arrays:
    """(inputs, targets, weights) of one row, without a reference: (L,), (L, 2) and (L,)."""
    n = len(row.ids) - 1
    inputs, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
    targets = np.zeros((length, 2), np.int32)
    inputs[:n], targets[:n, 0] = row.ids[:-1], row.ids[1:]
    weights[row.start - 1 : n] = 1
    return inputs, with_reference(targets, weights, np.float32(np.nan)), weights


def with_reference(
    targets: np.ndarray, weights: np.ndarray, reference: np.ndarray | np.float32
) -> np.ndarray:
    """Targets with the log-likelihoods of a reference: each position of weight has the row's mean.

    Args:
      targets: (…, L, 2) int32.
      weights: (…, L) float32.
      reference: (…) float32, in nats, a number for each row.
    """
    total = weights.sum(-1, keepdims=True)
    mean = np.asarray(reference, np.float32)[..., None] / np.where(total == 0, 1, total)
    made = targets.copy()
    made[..., 1] = np.where(weights != 0, mean, np.float32(0)).astype(np.float32).view(np.int32)
    return made
