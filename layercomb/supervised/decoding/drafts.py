"""What may come next, guessed cheaply: `Lookup` in the text so far, or a smaller model's `Draft`.

Shape letters: B rows, L room for tokens, N n-gram, k drafted tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from layercomb.checks import Bound, Size, take_fields
from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.shapes import shape_dtype
from layercomb.supervised.decoding.axes import axes_of
from layercomb.supervised.decoding.prompts import reads_whole_prompts
from layercomb.trees import Tree

DraftLen = Annotated[int, Bound(1, high=64)]
NO_DRAFT = -2  # in the place of a draft that there is not; equal to no token, nor to `NO_TOKEN`


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts that are copied from the text itself, prompt included.

    The last `ngram` tokens are looked for earlier in the row, and what followed them there, last
    time, is the draft. If the text ends before the draft does, it goes on as it repeats. A row
    whose last tokens never came before has no draft, and where no row has one, a token is made as
    without speculation. It pays where answers repeat their prompt: code that is edited, summaries,
    quotations.

    Attributes:
      n_draft: k, how many tokens are drafted, at most 64.
      ngram: N, how many tokens must be the same.

    Raises:
      TypeError, ValueError: if one is no number, or out of its range.

    References:
      Yang et al., inference with reference, 2023, https://arxiv.org/abs/2304.04487
    """

    n_draft: DraftLen = 7
    ngram: Size = 3

    def __post_init__(self) -> None:
        take_fields(self)

    def drafts(self, texts: jax.Array, lengths: jax.Array) -> jax.Array:
        """The drafts of rows.

        Args:
          texts: (B, L) int32; what stands behind the end of a row is not read.
          lengths: (B,) int32.

        Returns:
          (B, k) int32, `NO_DRAFT` in rows that have none.

        >>> import jax.numpy as jnp
        >>> text = jnp.array([[5, 6, 7, 8, 5, 6, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]])
        >>> Lookup(n_draft=3, ngram=2).drafts(text, jnp.array([6, 8])).tolist()
        [[7, 8, 5], [-2, -2, -2]]
        """
        rows = jax.vmap(self._of_row)(texts, lengths)
        return jnp.where(rows >= 0, rows, NO_DRAFT)

    def _of_row(self, text: jax.Array, length: jax.Array) -> jax.Array:
        at = jnp.arange(len(text), dtype=jnp.int32)
        is_same = (at >= self.ngram) & (at < length)  # whether the N tokens before are the last N
        for back in range(1, self.ngram + 1):
            last = jnp.take(text, length - back, mode='clip')
            is_same &= jnp.roll(text, back) == last
        start = jnp.where(is_same, at, 0).max()  # of the latest that there is
        steps = jnp.arange(self.n_draft, dtype=jnp.int32) % jnp.maximum(length - start, 1)
        found = jnp.take(text, start + steps, mode='clip')
        return jnp.where(start > 0, found, NO_DRAFT)


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """Drafts that a smaller model makes: the tokens that it would draw with the same numbers.

    It draws with the same random numbers as the model, so drafts of samples are accepted too, where
    the two agree.

    Attributes:
      model: a language model with weights, of the same vocabulary.
      n_draft: k, how many tokens are drafted, at most 64.

    Raises:
      TypeError, ValueError: if `n_draft` is no number or out of its range, or `model` is no model.

    References:
      Leviathan et al. 2022, https://arxiv.org/abs/2211.17192
      Chen et al. 2023, https://arxiv.org/abs/2302.01318
    """

    model: Model
    n_draft: DraftLen = 4

    def __post_init__(self) -> None:
        take_fields(self)


Speculation = Lookup | Draft


def check_speculation(given: Any) -> None:
    """Raises a TypeError if it is neither a `Lookup` nor a `Draft`."""
    if not isinstance(given, Speculation):
        raise TypeError(
            f'speculate must be decoding.Lookup(…) or decoding.Draft(model), got {given!r:.100}'
        )


def check_can_go_back(net: Layer, trained: Tree, whose: str = 'the model') -> None:
    """Refuses a model whose rows cannot go back to before a draft that was refused.

    Args:
      net: the model, unstacked.
      trained: the state that training left.
      whose: what messages call the model.

    Raises:
      UsageError: if it is an encoder-decoder; if a layer sees later positions; if a row remembers
        something whole; or if going back costs as much as reading the text again.
    """
    shapes, structure = jax.tree.flatten(jax.eval_shape(lambda: trained))
    said = _why_not(net, tuple(shapes), structure)
    if said is not None:
        raise UsageError(f'{whose} cannot speculate: {said}; decode it without')


@functools.lru_cache(maxsize=32)
def _why_not(net: Layer, shapes: tuple[Any, ...], structure: Any) -> str | None:
    """Why the rows of a model cannot go back; None if they can."""
    if net.n_in > 1:
        return 'it reads a source, and drafts are for models that continue texts'
    if reads_whole_prompts(net):
        return 'one of its layers sees later positions, so a draft would change what is before it'
    axes = axes_of(net, jax.tree.unflatten(structure, shapes))
    if (path := axes.memory()) is not None:
        return f'{path!r} remembers all positions in one, and cannot forget a draft that is refused'
    if (path := axes.made_again()) is not None:
        return (
            f'{path!r} is of attention that chooses what it reads, which reads all that is before '
            'a draft to check it, so that a check takes longer than the tokens it could save'
        )
    return None


def check_vocabulary(size: int, of_draft: int) -> None:
    """Raises a UsageError if a draft's model has another number of tokens than the model itself."""
    if size != of_draft:
        raise UsageError(
            f'the draft model has {of_draft} tokens and the model {size}: a draft needs a model '
            'with the same vocabulary'
        )


def size_of_logits(net: Layer) -> int:
    """V, the width of a language model's logits."""
    (logits,) = net.output_signature((shape_dtype((1, 1), 'int32'),))
    return int(logits.shape[-1])
