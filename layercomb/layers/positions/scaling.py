"""Scalings of rotary positions: models trained on short sequences read longer ones.

A scaling changes the frequencies ω_i of `RotaryPositions`, and may multiply the rotated queries and
keys by a factor. Formulas are those of the Hugging Face library's rope types.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from layercomb.checks import Positive, Size, take_fields


def plain_frequencies(depth: int, period: float) -> np.ndarray:
    """ω_i = period^(−2i/depth) for i = 0 … depth/2 − 1, (depth/2,) float64."""
    made: np.ndarray = float(period) ** (-np.arange(0, depth, 2, dtype=np.float64) / depth)
    return made


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Base of scalings: write `frequencies`, and `magnitude` if it is not 1.

    One whose frequencies go by the length also says ``by_length = True`` and `steady_len`.

    Attributes:
      by_length: whether the frequencies depend on the length of the sequence.
    """

    by_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        take_fields(self)

    @property
    def magnitude(self) -> float:
        """What the rotated queries and keys are multiplied by; scores grow by its square."""
        return 1.0

    def frequencies(self, depth: int, period: float, length: int) -> np.ndarray:
        """The frequencies, in radians per position.

        Args:
          depth: how many features turn, an even number.
          period: of `RotaryPositions`.
          length: of the whole sequence; read only if `by_length`.

        Returns:
          (depth/2,) float64.
        """
        raise NotImplementedError(f'{type(self).__name__} has no frequencies')

    @property
    def steady_len(self) -> int | None:
        """The length up to which the frequencies are the same; None if they always are."""
        if self.by_length:
            raise NotImplementedError(
                f'{type(self).__name__} has no steady_len: say up to which length its frequencies '
                'stay the same, 1 if they never do'
            )
        return None


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Positions are divided by a factor: ω_i / factor. Type 'linear'.

    Attributes:
      factor: how many times longer sequences become.

    References:
      Chen et al., Position Interpolation, 2023, https://arxiv.org/abs/2306.15595
    """

    factor: Positive

    def frequencies(self, depth: int, period: float, length: int) -> np.ndarray:
        """See `RotaryScaling`."""
        return plain_frequencies(depth, period) / self.factor


@dataclasses.dataclass(frozen=True)
class DynamicScaling(RotaryScaling):
    """The period grows with the length, from `max_len` on. Type 'dynamic' (NTK-aware).

    With s = factor · L / max_len − (factor − 1) for a sequence of L > max_len positions::

        ω_i · s^(−2i/(depth − 2))

    Sequences up to `max_len` are turned without scaling. `RotaryPositions` says what L is in
    decoding.

    Attributes:
      factor: how fast the period grows; 1 makes s the length over `max_len`.
      max_len: positions that the model was trained on.
    """

    factor: Positive
    max_len: Size

    by_length = True
    steady_len = property(lambda self: self.max_len)

    def frequencies(self, depth: int, period: float, length: int) -> np.ndarray:
        """See `RotaryScaling`."""
        n = depth // 2
        s = self.factor * max(length, self.max_len) / self.max_len - (self.factor - 1)
        steps = np.arange(n, dtype=np.float64) / max(n - 1, 1)
        return plain_frequencies(depth, period) * s**-steps


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Long waves are stretched, short ones kept, those between blended. Type 'llama3'.

    A wave of n = original_max_len · ω_i / 2π turns in the original length becomes::

        ω_i                                      n ≥ high_freq_factor
        ω_i / factor                             n ≤ low_freq_factor
        ω_i · (r + (1 − r) / factor)             between, r = (n − low) / (high − low)

    Attributes:
      factor: how many times longer sequences become.
      low_freq_factor: turns up to which waves are stretched fully.
      high_freq_factor: turns from which waves are kept; more than `low_freq_factor`.
      original_max_len: positions that the model was first trained on.

    Raises:
      ValueError: if high_freq_factor is not more than low_freq_factor.
    """

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_len: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f'Llama3Scaling: high_freq_factor={self.high_freq_factor} must be more than '
                f'low_freq_factor={self.low_freq_factor}'
            )

    def frequencies(self, depth: int, period: float, length: int) -> np.ndarray:
        """See `RotaryScaling`."""
        plain = plain_frequencies(depth, period)
        turns = self.original_max_len * plain / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling(RotaryScaling):
    """YaRN: short waves are kept, long ones stretched, with a ramp over the features. Type 'yarn'.

    ::

        ω_i · (1 − r_i + r_i / factor)      r_i from 0 to 1, linear in i from `low` to `high`

    A wave makes `beta_fast` turns in the original length at feature `low`, and `beta_slow` at
    `high`. Queries and keys are multiplied by `magnitude`: `attention_factor` if given, else
    m(mscale) / m(mscale_all_dim) if both are given, else m(1), where m(x) = 0.1 x ln(factor) + 1.

    Attributes:
      factor: how many times longer sequences become.
      original_max_len: positions that the model was first trained on.
      beta_fast: turns at the start of the ramp.
      beta_slow: turns at its end.
      attention_factor: the magnitude; None to compute it.
      mscale, mscale_all_dim: of the magnitude; None or 0 for none.
      truncate: whether the ends of the ramp are rounded outwards to whole features.

    References:
      Peng et al., YaRN, 2023, https://arxiv.org/abs/2309.00071
    """

    factor: Positive
    original_max_len: Size
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """See `RotaryScaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._grown(self.mscale) / self._grown(self.mscale_all_dim)
        return self._grown(1.0)

    def frequencies(self, depth: int, period: float, length: int) -> np.ndarray:
        """See `RotaryScaling`."""
        plain = plain_frequencies(depth, period)
        low, high = (
            self._feature(beta, depth, period) for beta in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, depth - 1)
        span = high - low or 0.001  # a step instead of a ramp
        stretched = np.clip((np.arange(len(plain)) - low) / span, 0, 1)
        return plain * (1 - stretched + stretched / self.factor)

    def _grown(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def _feature(self, turns: float, depth: int, period: float) -> float:
        """The feature whose wave makes so many turns in the original length; a fraction."""
        length = self.original_max_len / (turns * 2 * math.pi)
        return depth * math.log(length) / (2 * math.log(period))


@dataclasses.dataclass(frozen=True)
class LongRopeScaling(RotaryScaling):
    """LongRoPE: each frequency is divided by its own factor. Type 'longrope' (Phi-3).

    Sequences of more than `original_max_len` positions use `long_factors`, others `short_factors`.
    Queries and keys are multiplied by `attention_factor`, by default
    √(1 + ln(factor) / ln(original_max_len)). `RotaryPositions` says what the length is in decoding.

    Attributes:
      short_factors, long_factors: depth/2 numbers each.
      original_max_len: positions that the model was first trained on; at least 2.
      factor: how many times longer sequences become: the model's greatest length over the original.
      attention_factor: the magnitude; None to compute it.

    Raises:
      ValueError: if the two have different lengths.

    References:
      Ding et al., LongRoPE, 2024, https://arxiv.org/abs/2402.13753
    """

    short_factors: tuple[Positive, ...]
    long_factors: tuple[Positive, ...]
    original_max_len: Size
    factor: Positive
    attention_factor: Positive | None = None

    by_length = True
    steady_len = property(lambda self: self.original_max_len)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                f'LongRopeScaling: {len(self.short_factors)} short_factors and '
                f'{len(self.long_factors)} long_factors: give one each for every pair of features'
            )

    @property
    def magnitude(self) -> float:
        """See `RotaryScaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_len))

    def frequencies(self, depth: int, period: float, length: int) -> np.ndarray:
        """See `RotaryScaling`.

        Raises:
          ValueError: if there are not depth/2 factors.
        """
        factors = self.long_factors if length > self.original_max_len else self.short_factors
        if len(factors) != depth // 2:
            raise ValueError(
                f'LongRopeScaling has {len(factors)} factors for {depth // 2} pairs of features: '
                'give one for each pair that turns'
            )
        return plain_frequencies(depth, period) / np.asarray(factors, np.float64)
