"""What the class of a layer declares: `Declares`, all of it with defaults."""

from __future__ import annotations

from typing import ClassVar, cast


class Declares:
    """What a layer declares as attributes of its class, beside `n_in` and `n_out`.

    An attribute without annotation may be a field or a property of a subclass.

    Attributes:
      float32: whether `transforms.cast` leaves it in float32 (norms, losses, sums of streams).
      weight_axes: the axes of each of its own weights, by path, in letters: ``{'kernel': 'D->F',
        'bias': '->F'}``; see `facts.axes`. Muon and Adafactor refuse a layer with undeclared
        weights of two axes or more.
      position_wise: True if each output position depends only on the same position of the inputs;
        False if it depends on other positions, or on its index; None if unknown. `Chunk` takes only
        layers that say True. Decoding takes others only if they hold a cache. A subclass that
        overrides one of the methods `computes_in` must declare it again.
      cacheless: whether it decodes without a cache although it is not position-wise: it mixes
        positions only in training, or is given the whole sequence at every step.
      counts_positions: whether it averages over positions in training. It then calls
        `counted_positions` first, and leaves out the positions that do not count.
      sees_segments: whether a layer that mixes positions keeps the documents of a packed row apart.
        It reads them by `segments_of`, or mixes nothing that depends on the position.
      spans_devices: whether a layer that mixes positions, or depends on their numbers, is right
        where each device has a part of the positions: it takes what it needs of the others' by the
        functions of `facts.sequence`. It says nothing of layers inside. A metric whose `sums` are
        its own says it if they are sums over positions.
      carries_counted: whether a layer made of layers tells them which positions count, and which
        are of one document. It gives them their states unchanged, or, where it loops over states or
        slices positions, uses `take_counted` and `put_counted`.
      reads_memory: whether the layer inside works on another sequence than the decoded one: an
        encoder (`Once`), or attention to a memory.
      sees_padding: whether an output position depends on later ones even in a causal model;
        decoding then refuses prompts of several lengths.
      makes_logits: whether it is a head, (B, L, D) → (B, L, V), position by position. Decoding may
        then compute the logits of one position alone.
      needs_max_len: whether its field ``max_len`` is not set, so that the model around it should.

    Four more are read if a layer has them, as a field or a property: ``causal``; if it is
    False, decoding refuses the layer; ``max_len``, the longest sequence; ``vocab_size``, above all
    ids that it looks up; and a field ``rotary``, for positions applied to queries and keys.
    """

    position_wise = cast('bool | None', None)
    cacheless = False
    computes_in: ClassVar[tuple[str, ...]] = ('apply',)
    float32: ClassVar[bool] = False
    counts_positions: ClassVar[bool] = False
    sees_segments: ClassVar[bool] = False
    spans_devices = False
    carries_counted: ClassVar[bool] = False
    weight_axes: ClassVar[dict[str, str]] = {}
    sees_padding = False
    makes_logits = False
    needs_max_len = False
    reads_memory: ClassVar[bool] = False
    shown_before: ClassVar[dict[str, str]] = {}  # which keyword `repr` shows before which other
