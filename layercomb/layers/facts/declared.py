"""What the class of a layer declares: `Declares`, all of it with defaults."""

from __future__ import annotations

from typing import ClassVar, cast


class Declares:
    """What a layer declares as attributes of its class, beside `n_in` and `n_out`.

    Those without annotation may be fields or properties of a subclass.

    Attributes:
      float32: whether `transforms.cast` leaves it in float32 (norms, losses, sums of streams).
      weight_axes: the axes of each of its own weights, by path, in letters: ``{'kernel': 'D->F',
        'bias': '->F'}``. `facts.axes` explains them. Muon and Adafactor refuse a layer whose
        weights have two axes or more, and are not declared.
      position_wise: True if each output position depends on the same position of the inputs alone;
        False if it depends on others, or on where it lies; None if nobody has said. `Chunk` takes
        what says True, and decoding a layer that says another thing only if it holds a cache. A
        subclass that computes anew, in one of the methods `computes_in`, says it anew.
      cacheless: whether it decodes without a cache although it is not position-wise: it mixes
        positions in training alone, or those of what it is given whole at every step.
      counts_positions: whether it averages over positions in training. Its state then says which of
        them count: it begins with `counted_positions`, and leaves the others out.
      carries_counted: whether a layer made of layers hands that on to them: it gives them their
        states as they are, or takes it out and puts it back by `take_counted` and `put_counted`
        where it loops over states or cuts positions.
      reads_memory: whether what is inside works on another sequence than the one that decoding
        writes: an encoder (`Once`), or attention to a memory.
      sees_padding: whether an output position depends on what stands after it, even where
        positions see only what stands before them; prompts of several lengths are then refused.
      makes_logits: whether it is a head, (B, L, D) → (B, L, V) for each position by itself, so that
        decoding may ask for one position alone.
      needs_max_len: whether its field ``max_len`` is open, so that a model around it should set it.

    Four more are read where a layer has them, as a field or a property: ``causal``, which decoding
    refuses if it is False; ``max_len``, the longest sequence; ``vocab_size``, below which the ids
    that it looks up must lie; and a field ``rotary``, for positions put into queries and keys.
    """

    position_wise = cast('bool | None', None)
    cacheless = False
    computes_in: ClassVar[tuple[str, ...]] = ('apply',)
    float32: ClassVar[bool] = False
    counts_positions: ClassVar[bool] = False
    carries_counted: ClassVar[bool] = False
    weight_axes: ClassVar[dict[str, str]] = {}
    sees_padding = False
    makes_logits = False
    needs_max_len = False
    reads_memory: ClassVar[bool] = False
    shown_before: ClassVar[dict[str, str]] = {}  # which keyword `repr` shows before which other
