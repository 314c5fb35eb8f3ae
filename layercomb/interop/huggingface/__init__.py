"""Directories of Hugging Face: `load` reads what transformers writes, and `save` the reverse."""

from layercomb.interop.huggingface.loading import describe, load
from layercomb.interop.huggingface.saving import save, save_description

__all__ = ['describe', 'load', 'save', 'save_description']
