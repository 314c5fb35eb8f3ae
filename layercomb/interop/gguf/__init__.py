"""Models in .gguf files, the format of llama.cpp."""

from layercomb.interop.gguf.loading import load

__all__ = ['load']
