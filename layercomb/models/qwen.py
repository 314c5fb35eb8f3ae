"""Qwen 2 and Qwen 3: options of `Llama`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from layercomb import layers as tl
from layercomb.models.llama import Llama


def Qwen2(vocab_size: int, *args: Any, **options: Any) -> tl.Layer:
    """The decoder Qwen 2: token ids (B, L) → logits (B, L, vocab_size).

    It is `Llama` with biases on queries, keys and values, and a rotary period of 1,000,000.

    Args:
      vocab_size: V.
      *args, **options: as of `Llama`.

    Raises:
      TypeError, ValueError: as `Llama`.

    References:
      Yang et al. 2024, https://arxiv.org/abs/2407.10671

    >>> Qwen2(256, 64, 128, n_layers=2, n_heads=4, max_len=32).n_out
    1
    """
    return _relative(vocab_size, *args, **{'qkv_bias': True, **options})


def Qwen3(vocab_size: int, *args: Any, **options: Any) -> tl.Layer:
    """The decoder Qwen 3: token ids (B, L) → logits (B, L, vocab_size).

    It is `Llama` with normalized queries and keys, and a rotary period of 1,000,000.

    Args:
      vocab_size: V.
      *args, **options: as of `Llama`.

    Raises:
      TypeError, ValueError: as `Llama`.

    References:
      Yang et al. 2025, https://arxiv.org/abs/2505.09388

    >>> Qwen3(256, 64, 128, n_layers=2, n_heads=4, max_len=32).n_out
    1
    """
    return _relative(vocab_size, *args, **{'qk_norm': True, **options})


_relative: Callable[..., tl.Layer] = functools.partial(Llama, period=1000000.0)
