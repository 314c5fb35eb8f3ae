"""What a server allows: whoever can reach it may ask for anything."""

from __future__ import annotations

import dataclasses

from layercomb.checks import Count, Positive, Size, take_fields


@dataclasses.dataclass(frozen=True)
class Limits:
    """The bounds of one request, and of how many are answered at once.

    Attributes:
      max_tokens: the most new tokens that a request may ask for, for each choice.
      max_prompt: the most tokens of a prompt.
      max_choices: the most choices of a request, over all its prompts.
      max_body: the most bytes of a request's body.
      max_concurrent: how many choices are decoded at once, in one batch. Each holds a cache as long
        as the longest text needs. Further choices of a request wait for a place.
      max_queue: how many requests may wait for a place; more are refused at once.
      patience: the most seconds that a request waits for a place.
      reading: the seconds in which a body must arrive.
      prefix_cache: the bytes that states of read prompts may take, to be used again; 0 keeps none,
        and None takes a tenth of the memory that is free at the beginning.
      same_program: whether one program decodes any number of choices, so that not even rounding
        depends on the other requests. Without it a few choices take a smaller and faster program.

    Raises:
      TypeError: if a value is of another type.
      ValueError: if one is out of its range.
    """

    max_tokens: Size = 1024
    max_prompt: Size = 8192
    max_choices: Size = 8
    max_body: Size = 1 << 20
    max_concurrent: Size = 8
    max_queue: Count = 64
    patience: Positive = 30.0
    reading: Positive = 30.0
    prefix_cache: Count | None = None
    same_program: bool = False

    def __post_init__(self) -> None:
        take_fields(self)
