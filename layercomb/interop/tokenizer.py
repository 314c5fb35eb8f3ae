"""`PretrainedTokenizer`: the tokenizer of a pretrained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from layercomb.data.tokenizers import as_document
from layercomb.errors import UsageError
from layercomb.interop.chat_template import ChatTemplate, Message
from layercomb.interop.vocabularies import Subwords, Vocabulary


@dataclasses.dataclass(frozen=True)
class PretrainedTokenizer:
    """A tokenizer as the library uses it, see `data.Tokenizer`, made of a pretrained vocabulary.

    Special tokens in a text count, as in other programs: ``'<|im_end|>'`` in a document or a
    message is the token.

    Attributes:
      vocabulary: a `Vocabulary`; a `tokenizers.Tokenizer` becomes one.
      eos_id: the token that ends a document.
      bos_id: the token that starts a text; None if there is none.
      stop_ids: all tokens that end an answer; `eos_id` is always one of them.
      chat: the template of conversations; None for models that have none.
      generation: what the makers advise for sampling: some of 'temperature', 'top_p', 'top_k',
        'repetition_penalty'.
      tokens: names and texts of special tokens, such as ``{'eos_token': '</s>'}``.

    Raises:
      UsageError: if an id is not in the vocabulary.

    >>> import tokenizers
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<s>': 0, 'a': 1, 'b': 2}, '<s>'))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> tokenizer = PretrainedTokenizer(words, eos_id=0)
    >>> tokenizer.encode('a b a'), tokenizer.decode([1, 2]), tokenizer.vocab_size
    (array([1, 2, 1], dtype=int32), 'a b', 3)
    """

    vocabulary: Any
    eos_id: int
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    chat: ChatTemplate | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    tokens: dict[str, str] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not hasattr(self.vocabulary, 'incremental_decoder'):
            object.__setattr__(self, 'vocabulary', Subwords.of(self.vocabulary))
        stop = dict.fromkeys((int(self.eos_id), *(int(i) for i in self.stop_ids)))
        object.__setattr__(self, 'stop_ids', tuple(stop))
        for i in (*self.stop_ids, *(() if self.bos_id is None else (self.bos_id,))):
            if not 0 <= i < self.vocab_size:
                raise UsageError(
                    f'the special token {i} is outside the vocabulary of {self.vocab_size} tokens: '
                    'take the tokenizer that came with the model'
                )

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, those of added tokens included."""
        return self._vocabulary.size

    @property
    def _vocabulary(self) -> Vocabulary:
        vocabulary: Vocabulary = self.vocabulary
        return vocabulary

    def encode(self, text: str | bytes) -> np.ndarray:
        """The ids of a text, (L,) int32, with those that start and end a text in this vocabulary.

        Args:
          text: a str, or bytes in UTF-8; what is none becomes U+FFFD.

        Raises:
          TypeError: if it is neither.
        """
        return self._ids(text, whole=True)

    def encode_chat(self, messages: Sequence[Message], **variables: Any) -> np.ndarray:
        """The ids of a conversation up to where the answer begins, (L,) int32.

        Args:
          messages: as of `ChatTemplate.render`.
          **variables: further arguments of it.

        Raises:
          UsageError: if the model has no template, or it refuses the messages.
        """
        if self.chat is None:
            raise UsageError(
                'this model has no chat template: give it a plain text to continue, or take the '
                'model that was trained for conversations'
            )
        return self._ids(self.chat.render(messages, **variables), whole=False)

    def decode(self, ids: Any) -> str:
        """The text of ids; special tokens have none, nor have ids above the vocabulary.

        Args:
          ids: (L,) integers.

        Raises:
          ValueError: for negative ids.
        """
        return self._vocabulary.decode([int(i) for i in ids])

    def token_bytes(self, i: int) -> bytes | None:
        """The bytes that a token adds to a text; None if only `decode` knows."""
        return self._vocabulary.token_bytes(i)

    def incremental_decoder(self) -> Any:
        """A decoder for ids that come one by one: see `data.Tokenizer`."""
        return self._vocabulary.incremental_decoder()

    def _ids(self, text: str | bytes, whole: bool) -> np.ndarray:
        text = as_document(text)
        if isinstance(text, bytes):
            text = text.decode('utf-8', 'replace')
        return np.array(self._vocabulary.encode(text, whole=whole), np.int32)


def sampling_advice(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a generation_config.json advises for sampling.

    Temperature and the like count only where it says ``do_sample``, as in transformers.

    Args:
      config: its content.

    Returns:
      Some of 'temperature', 'top_p', 'top_k', 'repetition_penalty'.

    Raises:
      UsageError: if one of them is no number in its range.
    """
    made: dict[str, Any] = {}
    always, sampled = ('repetition_penalty',), ('temperature', 'top_p', 'top_k')
    for name in always + (sampled if config.get('do_sample') else ()):
        value = config.get(name)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1e6:
            raise UsageError(
                f'generation_config.json: {name!r} is {value!r:.40} and no number that can be '
                'used: remove it'
            )
        made[name] = value
    return made
