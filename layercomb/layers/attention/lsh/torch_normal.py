"""The normal numbers that ``torch.randn`` draws from a seed on a CPU, without torch.

Weights that were trained by torch under a fixed seed of hashing need its rotations. The numbers
come from the Mersenne Twister (mt19937) and the Box-Muller transform. They are equal to torch's but
for the last bits, which its own processors do not share either.
"""

from __future__ import annotations

import functools
import math

import numpy as np

BLOCK = 16  # floats that torch transforms together
HALF = BLOCK // 2


@functools.lru_cache(maxsize=8)
def torch_normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """What ``torch.manual_seed(seed); torch.randn(shape)`` gives on a CPU.

    Args:
      seed: as of ``torch.manual_seed``; its low 32 bits count.
      shape: of the array.

    Returns:
      float32, of the given shape; not writable.
    """
    draw = np.random.RandomState(seed % 2**32)
    n = math.prod(shape)
    made = (_few if n < BLOCK else _many)(draw, n).reshape(shape)
    made.setflags(write=False)
    return made


def _words(draw: np.random.RandomState, n: int) -> np.ndarray:
    """The next n words of 32 bits, uint32."""
    return draw.randint(0, 2**32, n, dtype=np.uint32)


def _few(draw: np.random.RandomState, n: int) -> np.ndarray:
    """Fewer than a block: pairs of float64, each uniform number made of two words."""
    pairs = -(-n // 2)
    words = _words(draw, 4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
    bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    uniform = bits * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:, 1])), 2 * np.pi * uniform[:, 0]
    made = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return made.reshape(-1)[:n].astype(np.float32)


def _many(draw: np.random.RandomState, n: int) -> np.ndarray:
    """Whole blocks; if they do not divide n, the last 16 numbers are drawn once more."""
    uniform = _uniform(draw, n)
    made = np.concatenate([_blocks(uniform[: n - n % BLOCK]), uniform[n - n % BLOCK :]])
    if n % BLOCK:
        made[-BLOCK:] = _blocks(_uniform(draw, BLOCK))
    return made


def _uniform(draw: np.random.RandomState, n: int) -> np.ndarray:
    """n numbers in [0, 1) of 24 bits, float32."""
    return (_words(draw, n) & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)


def _blocks(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller: the first half of a block makes radii, the second half angles; float32."""
    first, second = uniform.reshape(-1, 2, HALF).swapaxes(0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * np.pi) * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
