"""Models in .gguf files, the format of llama.cpp."""

from layercomb.interop.gguf.loading import load, tokenizer
from layercomb.interop.gguf.saving import save

__all__ = ['load', 'save', 'tokenizer']
