"""Rows on the device: prompts that are being read, one row each, and the batch that is decoded.

A prompt is read into a state of its own, a piece at a time, and then copied into a slot of the
batch. The batch has as many slots as it needs, in few sizes, and room for as many positions as it
needs, in powers of two: each combination is a program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layercomb.errors import UsageError
from layercomb.layers.core.layer import Layer
from layercomb.model import Model
from layercomb.serving.batching.prefixes import Block, Prefixes
from layercomb.serving.batching.programs import Drawn, Programs, Rows, programs
from layercomb.supervised.decoding.axes import BLOCK, Axes, Leaves, begun
from layercomb.supervised.decoding.prompts import Start, checked, longest, reads_whole_prompts
from layercomb.supervised.decoding.reading.ingesting import ingest
from layercomb.supervised.decoding.sampling import Sampler, stacked
from layercomb.supervised.decoding.scoring import Alternatives, alternatives
from layercomb.transforms.low_rank.many import adapter_names
from layercomb.transforms.unstacking import unstack, unstack_state

_LEAST_ROOM = 512  # positions that caches hold at least, if the model reaches so far
_LONG_PIECE = 4 * BLOCK  # tokens that are read at a time
_PIECE = 2 * BLOCK  # the same while others are decoded, since a step of theirs waits for it
_SHORT_PIECE = BLOCK // 4  # tokens that a short rest is padded to
_TAILS = (8, 1)  # further pieces, where padding would be seen or would not fit
_CALM = 32  # steps after which a batch with free slots becomes smaller
_SPARES = 2  # states of prompts that are kept for the next ones


@dataclasses.dataclass(frozen=True)
class Decodable:
    """A model that is ready to decode rows together.

    Attributes:
      net: unstacked.
      weights: their leaves.
      structure: of the weights.
      trained: the state that training left.
      axes: of its decoding state.
      fresh: the leaves of one row that has taken nothing.
      max_len: the most positions, see `prompts.longest`; None for any number.
      vocab_size: of its logits.
      adapters: the names of those that a row may have, see `transforms.adapters`.
    """

    net: Layer
    weights: Leaves
    structure: Any
    trained: Any
    axes: Axes
    fresh: Leaves
    max_len: int | None
    vocab_size: int
    adapters: tuple[str, ...]

    @classmethod
    def of(cls, model: Model) -> Decodable:
        """Prepares a model.

        Raises:
          TypeError, UsageError: as `decoding.generate`; see also `axes.begun`.
          UsageError: for adapters on a model that reads prompts whole.
        """
        net, weights, state = checked(model)
        names = adapter_names(net)
        if names and reads_whole_prompts(net):
            raise UsageError(
                'adapters that are chosen for each row need a model whose prompts may be padded, '
                'and a layer of this one sees padding: merge one adapter, and serve that'
            )
        net, weights = unstack(net, weights)
        trained = unstack_state(model.layer, state)
        axes, fresh = begun(net, trained)
        leaves, structure = jax.tree.flatten(weights)
        shapes = jax.eval_shape(
            programs(net, structure, axes).read, leaves, fresh, np.zeros((1, 1), np.int32), 0, 1
        )
        return cls(
            net,
            leaves,
            structure,
            trained,
            axes,
            fresh,
            longest(net),
            shapes[0].shape[-1],
            names,
        )

    def adapter(self, name: str | None) -> int:
        """The number of an adapter, as of `transforms.adapters.Adapter`; 0 for None."""
        return 0 if name is None else self.adapters.index(name) + 1

    @functools.cached_property
    def reads_whole(self) -> bool:
        """Whether prompts are read whole, see `reads_whole_prompts`."""
        return reads_whole_prompts(self.net)

    @functools.cached_property
    def programs(self) -> Programs:
        """The compiled programs."""
        return programs(self.net, self.structure, self.axes)

    def room(self, length: int) -> int:
        """The room for a text: a power of two, or as far as the model reaches."""
        room = max(_LEAST_ROOM, 1 << (length - 1).bit_length())
        return room if self.max_len is None else min(room, self.max_len)


class Reading:
    """One prompt that is being read, a piece at a time.

    Args:
      model: what reads.
      prefixes: the blocks of texts that were read before.
      ids: the prompt.
      leaves: of a state with one row, which may hold anything; None to make one.
      room: of the state.
      scored: whether the scores of all tokens are wanted; then all are read.
      adapter: the number of the adapter that reads it; 0 for none.

    Attributes:
      whole: whether the model reads prompts whole; nothing is kept of them then.
      taken: how many tokens are read.
      n_cached: how many of them were found in `prefixes`.
      room: of the state.
      leaves: of the state.
      logits: (1, V), after the last piece.
      scores: of the tokens of each piece, with how many count; empty if not wanted.
    """

    def __init__(
        self,
        model: Decodable,
        prefixes: Prefixes,
        ids: Sequence[int],
        leaves: Leaves | None,
        room: int,
        scored: bool,
        adapter: int = 0,
    ) -> None:
        self._model, self._prefixes, self._ids = model, prefixes, ids
        self._adapter = adapter
        self.whole = model.reads_whole
        self._scored = scored
        self._keys = [] if self.whole else prefixes.keys(ids, adapter)
        self.room = room
        self.taken = self.n_cached = 0
        self.logits: jax.Array | None = None
        self.scores: list[tuple[int, Alternatives]] = []
        self.leaves: Leaves = [] if self.whole else self._begun(leaves)

    @property
    def done(self) -> bool:
        """Whether the prompt is read."""
        return self.taken == len(self._ids)

    def read(self, hurried: bool) -> None:
        """Reads the next piece; a shorter one if others wait for its end."""
        if self.whole:
            return self._read_whole()
        size = self._next_size(_PIECE if hurried else _LONG_PIECE)
        n_real = min(size, len(self._ids) - self.taken)
        padded = np.zeros((1, size + 1), np.int32)
        found = self._ids[self.taken : self.taken + size + 1]
        padded[0, : len(found)] = found
        made = self._model.weights, self.leaves, padded[:, :-1], self.taken, n_real
        run = self._model.programs
        if self._scored:
            self.logits, self.leaves, scores = run.read_scored(*made, padded[:, 1:])
            self.scores.append((n_real, scores))
        else:
            self.logits, self.leaves = run.read(*made)
        before, self.taken = self.taken, self.taken + n_real
        self._keep(before)
        return None

    def _begun(self, leaves: Leaves | None) -> Leaves:
        model, run = self._model, self._model.programs
        if leaves is None:
            leaves = run.moved_leaves(model.fresh, np.zeros(1, np.int32), self.room)
        needs_rest = not model.axes.can_seek
        prefixes = self._prefixes
        found = [] if self._scored else prefixes.find(self._ids, needs_rest, self._adapter)
        for i, block in enumerate(found):
            leaves = run.put_block(leaves, i, block.positions)
        self.taken = self.n_cached = len(found) * BLOCK
        rest = found[-1].rest if found and needs_rest else None
        return run.begin(leaves, model.fresh, rest or [], self.taken, np.int32(self._adapter))

    def _next_size(self, longest: int) -> int:
        left = len(self._ids) - self.taken
        fits = self.room - self.taken
        sizes: tuple[int, ...] = (BLOCK, *_TAILS)
        if self._model.axes.can_seek and not self._scored:
            # Elsewhere what is kept ends with each block, or logits exist for all of a piece.
            sizes = (*(size for size in (_LONG_PIECE, _PIECE) if size <= longest), *sizes)
        if self._model.axes.can_seek:
            padded = (size for size in (_SHORT_PIECE, BLOCK) if left <= size <= fits)
            if (size := next(padded, None)) is not None:
                return size
        return next(size for size in sizes if size <= min(left, fits))

    def _keep(self, before: int) -> None:
        """Keeps the blocks that the last piece has completed."""
        model = self._model
        for i in range(before // BLOCK, self.taken // BLOCK):
            if self._prefixes.wants(self._keys[: i + 1]):
                ends_here = self.taken == (i + 1) * BLOCK and not model.axes.can_seek
                # What the state holds is donated to the next piece, so it is copied.
                rest = jax.tree.map(jnp.copy, model.axes.rest(self.leaves)) if ends_here else None
                positions = model.programs.block(self.leaves, 0, i)
                self._prefixes.keep(self._keys[: i + 1], Block(positions, rest))

    def _read_whole(self) -> None:
        """Reads a prompt whose layers would see padding, or where it was cut."""
        model, ids = self._model, np.asarray([self._ids], np.int32)
        lengths = np.array([ids.shape[1]], np.int32)
        weights = jax.tree.unflatten(model.structure, model.weights)
        arrays = jnp.asarray(ids), jnp.asarray(lengths)
        start = Start(model.net, self.room, weights, model.trained, (), *arrays)
        self.logits, state = ingest(start)
        self.leaves, self.taken = jax.tree.leaves(state), len(self._ids)
        if self._scored:
            targets = np.append(ids[0, 1:], np.int32(0))
            self.scores.append((len(targets), _of_whole(start, targets)))


@jax.jit
def _of_whole(start: Start, targets: jax.Array) -> Alternatives:
    (logits,), _ = start.net.apply(start.weights, start.trained, (start.tokens,))
    return alternatives(logits[0], targets)


class Slots:
    """The batch that is decoded: a row in each slot that is taken.

    Args:
      model: what decodes.
      n_most: the most rows.
      same_program: whether there are always as many slots as that.

    Attributes:
      taken: what was put into each slot, or None.
    """

    def __init__(self, model: Decodable, n_most: int, same_program: bool) -> None:
        self._model = model
        self._sizes = (n_most,) if same_program else tuple(sorted({1, (n_most + 1) // 2, n_most}))
        self._rows: Rows | None = None
        self._room = self._calm = 0
        self.taken: list[Any] = []

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of rows for which there is a program."""
        return self._sizes

    @property
    def room(self) -> int:
        """The room of all slots."""
        return self._room

    @property
    def n_free(self) -> int:
        """How many more rows may be put in."""
        return self._sizes[-1] - self.n_taken

    @property
    def n_taken(self) -> int:
        """How many slots are taken."""
        return sum(each is not None for each in self.taken)

    def put(self, what: Any, one: Rows, length: int, room: int, wanted: int) -> None:
        """Puts a row into a free slot.

        Args:
          what: stands in `taken`.
          one: the row, alone.
          length: how many positions it has taken.
          room: of `one`.
          wanted: how many rows there will be, this one included.
        """
        wanted = min(max(wanted, self.n_taken + 1), self._sizes[-1])
        n = next(size for size in self._sizes if size >= wanted)
        self._fit(max(n, len(self.taken) if self.n_taken else 0), room)
        run = self._model.programs
        if room != self._room:
            order = np.zeros(1, np.int32)
            one = one._replace(leaves=run.moved_leaves(one.leaves, order, self._room))
        assert self._rows is not None
        slot = self.taken.index(None)
        n_blocks = -(-length // BLOCK)
        self._rows = run.place(self._rows, np.int32(slot), one, np.int32(n_blocks))
        self.taken[slot] = what

    def free(self, what: Any, spoilt: bool = False) -> None:
        """Frees the slot of a row; one that is spoilt by NaN is wiped."""
        slot = self.taken.index(what)
        self.taken[slot] = None
        if spoilt and self._rows is not None:
            fresh = self._blank(1, self._room)
            n_blocks = np.int32(-(-self._room // BLOCK))
            self._rows = self._model.programs.place(self._rows, np.int32(slot), fresh, n_blocks)

    def block(self, what: Any, number: int) -> Leaves:
        """A block of a row's state; see `Axes.block`."""
        assert self._rows is not None
        return self._model.programs.block(self._rows.leaves, self.taken.index(what), number)

    def step(self, needed: int, wants_scores: bool) -> Drawn:
        """Makes the next token of each row.

        Args:
          needed: how many positions the longest row will have taken.
          wants_scores: whether any row wants scores.
        """
        if needed > self._room:
            self._fit(len(self.taken), self._model.room(needed))
        self._shrink()
        active = np.array([each is not None for each in self.taken])
        assert self._rows is not None
        drawn, self._rows = self._model.programs.step(
            self._model.weights, self._rows, active, np.bool_(wants_scores)
        )
        return drawn

    @property
    def alone(self) -> Rows | None:
        """What the device holds of a row that is alone, but its state; None if others may be."""
        rows = self._rows if len(self.taken) == 1 and self.n_taken else None
        return None if rows is None else rows._replace(leaves=[])

    def check(self, drafts: jax.Array, taken: int, most: int) -> list[int]:
        """The new tokens of the row that is alone: of its draft what is accepted, and one more.

        Args:
          drafts: (1, k) int32; all k fit into the model.
          taken: how many positions the row has taken.
          most: the most tokens that it may get.
        """
        needed = taken + 1 + drafts.shape[1]
        if needed > self._room:
            self._fit(1, self._model.room(needed))
        assert self._rows is not None
        limits = np.full(1, taken, np.int32), np.full(1, most, np.int32)
        tokens, n_made, self._rows = self._model.programs.check(
            self._model.weights, self._rows, drafts, *limits
        )
        made: list[int] = np.asarray(tokens)[0, : int(n_made[0])].tolist()
        return made

    def clear(self) -> None:
        """Drops all rows, and their memory."""
        self._rows, self.taken, self._room = None, [], 0

    def _shrink(self) -> None:
        """Makes the batch smaller if it has had free slots for some time."""
        smaller = next(size for size in self._sizes if size >= self.n_taken)
        self._calm = self._calm + 1 if smaller < len(self.taken) else 0
        if self._calm > _CALM:
            self._fit(smaller, self._room)

    def _fit(self, n: int, room: int) -> None:
        """Makes the batch one of `n` slots, with room for at least as many positions."""
        self._calm = 0
        if self._rows is None or not self.n_taken:
            if (len(self.taken), self._room) != (n, room):
                self._rows = None  # before the next ones are made
                self._rows, self.taken, self._room = self._blank(n, room), [None] * n, room
            return
        room = max(room, self._room)
        if (len(self.taken), self._room) == (n, room):
            return
        kept = [slot for slot, each in enumerate(self.taken) if each is not None]
        order = np.array((kept + [0] * n)[:n], np.int32)
        self._rows = self._model.programs.moved(self._rows, order, room)
        self.taken = [self.taken[slot] for slot in kept] + [None] * (n - len(kept))
        self._room = room

    def _blank(self, n: int, room: int) -> Rows:
        model, order = self._model, np.zeros(n, np.int32)
        keys = jax.random.key_data(jax.random.key(0))
        return Rows(
            model.programs.moved_leaves(model.fresh, order, room),
            jnp.zeros(n, jnp.int32),
            jnp.zeros((n, model.vocab_size), jnp.int32),
            jnp.tile(keys, (n, 1)),
            jnp.zeros(n, jnp.int32),
            jax.device_put(stacked([Sampler()] * n)),
        )


class Chosen(NamedTuple):
    """How the tokens of one row are chosen.

    Attributes:
      sampler: with one number for one row.
      keys: (1, …) uint32, the data of its key.
      held: (1, V) int32, the tokens of its prompt.
    """

    sampler: Sampler
    keys: jax.Array
    held: np.ndarray


class Desk:
    """Where prompts are read, and whose states are used again."""

    def __init__(self, model: Decodable, prefixes: Prefixes) -> None:
        self._model, self._prefixes = model, prefixes
        self._spare: list[tuple[int, Leaves]] = []

    def begin(self, ids: Sequence[int], room: int, scored: bool, adapter: int = 0) -> Reading:
        """Begins to read a prompt; arguments as of `Reading`."""
        at = next((i for i, (size, _) in enumerate(self._spare) if size == room), None)
        leaves = None if at is None else self._spare.pop(at)[1]
        return Reading(self._model, self._prefixes, ids, leaves, room, scored, adapter)

    def end(self, reading: Reading) -> None:
        """Takes the state of a prompt whose logits were no NaN; nobody else may use it then."""
        if not reading.whole and len(self._spare) < _SPARES:
            self._spare.append((reading.room, reading.leaves))
            reading.leaves = []

    def first(self, reading: Reading, chosen: Chosen, wants_scores: bool) -> tuple[Drawn, Rows]:
        """The first token after a prompt that is read, and a row that goes on from there."""
        assert reading.logits is not None
        drawn, held = self._model.programs.first(
            reading.logits, chosen.held, chosen.keys, chosen.sampler, np.bool_(wants_scores)
        )
        step = jnp.ones(1, jnp.int32)
        row = Rows(reading.leaves, drawn.token, held, chosen.keys, step, chosen.sampler)
        return drawn, row

    def clear(self) -> None:
        """Drops the states that are kept."""
        self._spare.clear()
