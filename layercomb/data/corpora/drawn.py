"""Images drawn on the fly: simple shapes, for machines that have no published images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from layercomb.checks import Size, checked
from layercomb.data.checks import Seed
from layercomb.data.sources import labelled
from layercomb.data.tasks import Example, Generated

# Whether a point (u, v) lies in a shape about the origin, within radius 1 or a bit more.
_INSIDE: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: np.hypot(u, v) < 0.9,  # disc
    lambda u, v: abs(np.hypot(u, v) - 0.75) < 0.2,  # ring
    lambda u, v: (np.hypot(u, v) < 1) & (v > -0.1),  # half a disc
    lambda u, v: _square(u, v) < 0.8,  # square
    lambda u, v: abs(_square(u, v) - 0.65) < 0.2,  # frame
    lambda u, v: np.maximum(v, abs(u) * 3**0.5 / 2 - v / 2) < 0.5,  # triangle
    lambda u, v: (_square(u, v) < 0.9) & (np.minimum(abs(u), abs(v)) < 0.25),  # cross
    lambda u, v: (_square(u, v) < 0.9) & (np.cos(3.5 * np.pi * u) > 0),  # stripes
    lambda u, v: (_square(u, v) < 0.9) & (u * v > 0),  # checks
    lambda u, v: np.hypot(u, v) < 0.6 + 0.35 * np.cos(5 * np.arctan2(v, u)),  # star
)


@checked
def shapes(size: Size = 32, n_examples: Size = 50_000, seed: Seed = 0) -> Sequence[Example]:
    """Returns labelled images of ten shapes, which stand in for CIFAR-10 and other images.

    A shape of one colour, at any place, size and angle, on a ground of another colour, with noise.
    The classes: disc, ring, half a disc, square, frame, triangle, cross, stripes, checks, star.

    Args:
      size: height and width.
      n_examples: how many there are.
      seed: another seed gives other examples.

    Returns:
      A sequence of (inputs, targets, loss_weights): (size, size, 3) float32 in 0 … 1, multiples of
      1/255; int32 in 0 … 9; float32.

    Raises:
      TypeError: if an argument is no integer.
      ValueError: if one is out of range.

    >>> image, label, weight = shapes(8, seed=1)[0]
    >>> image.shape, label.dtype, weight
    ((8, 8, 3), dtype('int32'), array(1., dtype=float32))
    """
    return Generated(_draw, (size,), n_examples, seed)


def _draw(size: int, rng: np.random.Generator) -> Example:
    label = int(rng.integers(len(_INSIDE)))
    radius, angle = rng.uniform(0.3, 0.7), rng.uniform(0, 2 * np.pi)
    ground = rng.random(3)
    colour = (ground + rng.uniform(0.3, 0.7, 3)) % 1  # at least 0.3 away, on a circle
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = line - rng.uniform(-0.3, 0.3), line[:, None] - rng.uniform(-0.3, 0.3)
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    inside = _INSIDE[label](cos * x + sin * y, cos * y - sin * x)  # (size, size)
    image = np.where(inside[..., None], colour, ground)  # (size, size, 3)
    image = image + 0.05 * rng.standard_normal(image.shape, np.float32)
    return labelled(np.rint(255 * image.clip(0, 1)).astype(np.uint8), label)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v))
