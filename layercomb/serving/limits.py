"""What a server allows, since anybody who reaches it may ask for anything."""

from __future__ import annotations

import dataclasses

from layercomb.checks import Count, Positive, Size, take_fields


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
      TypeError: if a value is no number.
      ValueError: if one is out of its range.
    """

    max_tokens: Size = 1024
    max_prompt: Size = 8192
    max_choices: Size = 8
    max_body: Size = 1 << 20
    max_concurrent: Size = 4
    max_queue: Count = 64
    patience: Positive = 30.0
    reading: Positive = 30.0

    def __post_init__(self) -> None:
        take_fields(self)
