"""The states of texts that were read before, in blocks that texts with one beginning share.

A block holds what the model keeps of `BLOCK` positions. Its key is a digest of all tokens up to its
end, so the blocks of two texts are the same as far as the texts are. Each adapter has its own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from layercomb.supervised.decoding.axes import BLOCK, Leaves

_SHARE = 10  # a tenth of the free memory, if nothing is said


class Block(NamedTuple):
    """What is kept of one block.

    Attributes:
      positions: as `Axes.block` gives it.
      rest: as `Axes.rest` gives it after the block; None if the text was not stopped there.
    """

    positions: Leaves
    rest: Leaves | None


class Prefixes:
    """Blocks of texts, of which those that were not used for longest are dropped.

    Args:
      n_bytes: the most that they take together; None for a tenth of the free memory.
    """

    def __init__(self, n_bytes: int | None) -> None:
        self.limit = free_memory() // _SHARE if n_bytes is None else n_bytes
        self.n_bytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def keys(self, ids: Sequence[int], adapter: int = 0) -> list[bytes]:
        """The keys of the whole blocks of a text.

        Args:
          ids: the text.
          adapter: which adapter reads it: another one makes another state of it.
        """
        made, digest = [], hashlib.sha256(b'%d:' % adapter if adapter else b'')
        for at in range(BLOCK, len(ids) + 1, BLOCK):
            digest.update(np.asarray(ids[at - BLOCK : at], np.int64).tobytes())
            made.append(digest.digest())
        return made

    def find(self, ids: Sequence[int], needs_rest: bool, adapter: int = 0) -> list[Block]:
        """The blocks of the longest known beginning of a text, its last token left out.

        Args:
          ids: the text; its last token has to be read, since what follows depends on it.
          needs_rest: whether the model cannot go on from blocks alone.
          adapter: as of `keys`.
        """
        found = []
        for key in self.keys(ids[:-1], adapter):
            if key not in self._blocks:
                break
            found.append(key)
        while needs_rest and found and self._blocks[found[-1]].rest is None:
            found.pop()
        for key in reversed(found):  # the beginning is dropped last
            self._blocks.move_to_end(key)
        return [self._blocks[key] for key in found]

    def wants(self, chain: Sequence[bytes]) -> bool:
        """Whether the last block of a text is not there, and might be kept; see `keep`."""
        *before, key = chain
        found = key in self._blocks or any(each not in self._blocks for each in before)
        return self.limit > 0 and not found

    def keep(self, chain: Sequence[bytes], block: Block) -> None:
        """Keeps a block, and drops old ones to make place, but none that it follows.

        Without what it follows it could not be found, so a text that is too long keeps its
        beginning.

        Args:
          chain: the keys of its text, as `keys` gives them, up to its own.
          block: what is kept.
        """
        *before, key = chain
        size = _n_bytes(block)
        if key in self._blocks or any(each not in self._blocks for each in before):
            return
        for each in reversed(before):  # the beginning is dropped last
            self._blocks.move_to_end(each)
        n_others = len(self._blocks) - len(before)
        while self.n_bytes + size > self.limit and n_others:
            _, dropped = self._blocks.popitem(last=False)
            self.n_bytes -= _n_bytes(dropped)
            n_others -= 1
        if self.n_bytes + size > self.limit:
            return
        self._blocks[key] = block
        for each in reversed(before):
            self._blocks.move_to_end(each)
        self.n_bytes += size

    def clear(self) -> None:
        """Drops all blocks."""
        self._blocks.clear()
        self.n_bytes = 0


def free_memory() -> int:
    """The bytes that are free where the model computes."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != 'cpu' else None
    if stats and 'bytes_limit' in stats:
        return int(stats['bytes_limit'] - stats['bytes_in_use'])
    try:
        with open('/proc/meminfo') as f:
            found = re.search(r'MemAvailable:\s+(\d+) kB', f.read())
        if found:
            return int(found[1]) << 10
    except OSError:
        pass  # not Linux
    names = getattr(os, 'sysconf_names', {})
    if 'SC_PHYS_PAGES' in names:
        return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') // 4
    return 1 << 30


def _n_bytes(block: Block) -> int:
    return sum(x.nbytes for x in (*block.positions, *(block.rest or ())))
