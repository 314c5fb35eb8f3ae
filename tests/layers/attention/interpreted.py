"""Triton's kernels computed by its interpreter, for machines without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

os.environ['TRITON_INTERPRET'] = '1'  # read when Triton is imported, by `launch`


class Pointer:
    """An array as Triton's interpreter reads and writes it: a tensor in memory, by its address."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x
        names = {'float32': 'fp32', 'bfloat16': 'bf16', 'float16': 'fp16', 'int32': 'i32'}
        self.dtype = names[x.dtype.name]

    def data_ptr(self) -> int:
        return self.x.ctypes.data

    # What is below stands in for a copy from a device and back.
    def untyped_storage(self) -> Pointer:
        return self

    def cpu(self) -> Pointer:
        return self

    def new_empty(self, *args: Any, **kwargs: Any) -> Pointer:
        return Pointer(self.x)

    def set_(self, storage: Pointer, *args: Any) -> None:
        self.x = storage.x

    def copy_(self, other: Pointer) -> None:
        assert self.x is other.x

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.x.shape

    stride = size


def launch() -> Callable[..., Any]:
    """A function in the place of `gpu.launch`, which interprets the kernels."""
    from layercomb.layers.attention.selected.backends import gpu, ranges

    def call(name: str, given: Any, lengths: Any, out: Any, grid: Any, sizes: Any) -> Any:
        n = gpu.N_BEFORE_LENGTHS

        def run(*arrays: Any) -> Any:
            read = [np.ascontiguousarray(x) for x in arrays]
            # A kernel that leaves something out shows.
            made = [np.full(x.shape, np.nan, x.dtype) for x in out]
            pointers = [Pointer(x) for x in (*read, *made)]
            getattr(ranges, name)[grid](*pointers[:n], *lengths, *pointers[n:], **sizes)
            return made

        return jax.pure_callback(run, out, *given)

    return call
