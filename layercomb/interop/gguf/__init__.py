"""Models in .gguf files, the format of llama.cpp."""

from layercomb.interop.gguf.loading import load, net, tokenizer
from layercomb.interop.gguf.saving import save

__all__ = ['load', 'net', 'save', 'tokenizer']
