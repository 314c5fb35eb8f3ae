"""What a server allows: whoever can reach it may ask for anything."""

from __future__ import annotations

import dataclasses

from layercomb.checks import Count, Positive, Size, take_fields


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of one request, and of how many requests are answered at once.

    Attributes:
      max_tokens: the most new tokens that a request may ask for, for each choice.
      max_prompt: the most tokens of a prompt.
      max_choices: the most choices of a request, over all its prompts; they are one batch.
      max_body: the most bytes of a request's body.
      max_concurrent: how many requests are answered at once, each in a thread. A step on a CPU is
        bound by memory, so more requests share the same speed.
      max_queue: how many requests may wait for a place; more are refused at once.
      patience: the most seconds that a request waits for a place.
      reading: the seconds in which a body must arrive.

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
