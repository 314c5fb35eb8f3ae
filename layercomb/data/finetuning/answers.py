"""Which tokens of a conversation are answers: those that a model would have made itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from layercomb.data.adapted import Adapted
from layercomb.data.finetuning.turns import Conversation
from layercomb.errors import UsageError

Span = tuple[int, int]


class Weighted(NamedTuple):
    """Tokens, and which of them are to be learnt.

    Attributes:
      ids: (n,) int32.
      weights: (n,) float32.
      n_skipped: answers that are not to be learnt, since the template writes them in another way
        when more follows.
    """

    ids: np.ndarray
    weights: np.ndarray
    n_skipped: int = 0


@dataclass(frozen=True)
class Texts:
    """Texts as ids, in the middle of a document and at its start.

    Attributes:
      tokenizer: what encodes them.
    """

    tokenizer: Adapted

    @cached_property
    def start(self) -> np.ndarray:
        """The token that the tokenizer puts before a text, if it puts one there; (0,) or (1,)."""
        bos, vocabulary = getattr(self._given, 'bos_id', None), self._vocabulary
        if bos is None or vocabulary is None or vocabulary.encode('', whole=True)[:1] != [bos]:
            return np.zeros(0, np.int32)
        return np.array([bos], np.int32)

    @property
    def eos(self) -> np.ndarray:
        """The token that ends a document, (1,)."""
        return np.array([self.tokenizer.eos_id], np.int32)

    @property
    def stops(self) -> list[int]:
        """The tokens that end an answer."""
        return list(getattr(self._given, 'stop_ids', ()) or (self.tokenizer.eos_id,))

    @property
    def template(self) -> Any:
        """The template of conversations; None if there is none."""
        return getattr(self._given, 'chat', None)

    def inside(self, text: str) -> np.ndarray:
        """The ids of a text without those that start and end one, (n,) int32.

        Half of a surrogate pair, which JSON may hold, becomes U+FFFD.
        """
        text = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        if self._vocabulary is None:
            return self.tokenizer.encode(text)
        return np.array(self._vocabulary.encode(text, whole=False), np.int32)

    @property
    def _given(self) -> Any:
        return self.tokenizer.tokenizer

    @property
    def _vocabulary(self) -> Any:
        return getattr(self._given, 'vocabulary', None)


def of_chat(told: Conversation, texts: Texts, where: str) -> Weighted:
    """The tokens of a conversation as its template writes it, to the end of the last answer.

    Weighted is what a model makes: what follows the text that it is given for an answer, the
    messages before it and the beginning of a turn, up to the token that ends the answer. The text
    is found by writing the conversation up to there, and proved to be its beginning. An answer for
    which it is not, since the template writes it in another way when more follows, has no weight.

    Args:
      told: the conversation.
      texts: of a tokenizer with a template.
      where: what messages call the conversation.

    Raises:
      UsageError: if the template refuses the conversation, or no answer can be found.
    """

    def render(n: int, begin: bool) -> str:
        try:
            text: str = texts.template.render(told.messages[:n], add_generation_prompt=begin)
        except UsageError as e:
            raise UsageError(f'{where}: {e}') from None
        return text

    whole = render(len(told.messages), False)
    spans = []
    for i in told.answers:
        start, end = render(i, True), render(i + 1, False)
        if whole.startswith(start) and whole.startswith(end) and len(start) < len(end):
            spans.append((len(start), len(end)))
    if not spans:
        raise UsageError(
            f'{where}: the chat template does not write an answer after what it writes to ask for '
            'one, so the answers cannot be told apart: take the template of the model that answers'
        )
    ids, places = _tokens(whole, spans, texts)
    return _weighted(ids, places, spans[-1][1] == len(whole), texts)._replace(
        n_skipped=len(told.answers) - len(spans)
    )


def of_parts(prompt: str, answer: str, texts: Texts) -> Weighted:
    """The tokens of a plain prompt and its answer, which alone is weighted, and of the end.

    Args:
      prompt: may be empty; then all is weighted.
      answer: what is to be learnt.
      texts: of a tokenizer.
    """
    before = [texts.start, texts.inside(prompt)] if prompt else [texts.start]
    ids = np.concatenate([*before, texts.inside(answer), texts.eos])
    weights = np.ones(ids.size, np.float32)
    weights[: max(1, sum(x.size for x in before))] = 0  # the first is predicted from nothing
    return Weighted(ids, weights)


def _tokens(text: str, spans: Sequence[Span], texts: Texts) -> tuple[np.ndarray, list[Span]]:
    """The ids of a text, and the tokens of spans of its letters.

    A token that reaches over the beginning of a span belongs to it, since a model has to make it.
    """
    ids = texts.inside(text)
    cuts = [0, *sorted({at for span in spans for at in span}), len(text)]
    parts = [texts.inside(text[a:b]) for a, b in itertools.pairwise(cuts)]
    if np.array_equal(np.concatenate(parts), ids):
        sizes = np.cumsum([0, *(part.size for part in parts)]).tolist()
        place = dict(zip(cuts, sizes, strict=True))
    else:  # a token reaches over a cut
        place = {at: _agreed(texts.inside(text[:at]), ids) for at in cuts}
    return ids, [(place[a], place[b]) for a, b in spans]


def _agreed(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two arrays begin with in common."""
    n = min(a.size, b.size)
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if differ.size else n


def _weighted(ids: np.ndarray, spans: Sequence[Span], to_end: bool, texts: Texts) -> Weighted:
    """Ids with weights on spans of them, each to the last token that ends an answer.

    If the last span has no such token and reaches to the end, `eos` is put there: a model that
    never sees an end does not learn to stop.
    """
    weights = np.zeros(ids.size, np.float32)
    end = 0
    for a, b in spans:
        stops = np.flatnonzero(np.isin(ids[a:b], texts.stops))
        end = a + int(stops[-1]) + 1 if stops.size else b
        weights[a:end] = 1
    ids, weights = ids[:end], weights[:end]
    if to_end and not stops.size:
        ids, weights = np.concatenate([ids, texts.eos]), np.append(weights, np.float32(1))
    return Weighted(ids, weights)
