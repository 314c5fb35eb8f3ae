"""`held_out`: a part of a sequence for measuring, and the rest for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from layercomb.checks import Bound, checked
from layercomb.data.checks import Source
from layercomb.data.finetuning.documents import Measurable, Part
from layercomb.data.sources import Mapped


@checked
def held_out(
    documents: Source[Any],
    split: Literal['train', 'valid'] = 'train',
    every: Annotated[int, Bound(2)] = 20,
) -> Sequence[Any]:
    """Returns a part of a sequence: 'valid' is every 20th element, and 'train' are all others.

    Args:
      documents: any sequence, such as `chat` returns; elements are read when they are asked for.
      split: 'train' or 'valid'.
      every: one in so many is in 'valid', the last of each.

    Returns:
      A sequence. Of fewer than `every` elements, 'valid' has none.

    Raises:
      TypeError, ValueError: for an argument of another type, or out of its range.

    >>> list(held_out('abcdefg', 'valid', every=3)), list(held_out('abcdefg', every=3))
    (['c', 'f'], ['a', 'b', 'd', 'e', 'g'])
    """
    chosen = [i for i in range(len(documents)) if (i % every == every - 1) == (split == 'valid')]
    if isinstance(documents, Measurable):
        return Part(documents, chosen)  # which goes on saying where each stands
    return Mapped(chosen, documents.__getitem__)
