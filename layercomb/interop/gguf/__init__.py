"""Models in .gguf files, the format of llama.cpp."""

from layercomb.interop.gguf.loading import describe, load, net, tokenizer
from layercomb.interop.gguf.saving import save

__all__ = ['describe', 'load', 'net', 'save', 'tokenizer']
