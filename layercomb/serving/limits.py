"""What a server allows, since anybody who reaches it may ask for anything."""

from __future__ import annotations

import dataclasses
import math

from layercomb.supervised.decoding.numbers import real, whole


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of what one request takes, and of how many are taken at once.

    Attributes:
      max_tokens: new tokens that a request may ask for, for each choice.
      max_prompt: tokens of a prompt.
      max_choices: choices of a request, over all its prompts; they are made as one batch.
      max_body: bytes of a request's body.
      max_concurrent: requests that are answered at once, each in a thread. A step on a CPU waits
        for memory, so more of them share one speed.
      max_queue: requests that may wait for one of those places; more are refused at once.
      patience: seconds that they wait.
      reading: seconds in which a body has to arrive.

    Raises:
      ValueError: if a value is out of its range.
    """

    max_tokens: int = 1024
    max_prompt: int = 8192
    max_choices: int = 8
    max_body: int = 1 << 20
    max_concurrent: int = 4
    max_queue: int = 64
    patience: float = 30.0
    reading: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == 'float':
                value = real(name, value, 'above 0', 0, math.inf, above=True)
            else:
                value = whole(name, value, least=0 if name == 'max_queue' else 1)
            object.__setattr__(self, name, value)
