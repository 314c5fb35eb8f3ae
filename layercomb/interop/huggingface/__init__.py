"""Directories of Hugging Face: `load` reads what transformers writes, and `save` the reverse."""

from layercomb.interop.huggingface.loading import load
from layercomb.interop.huggingface.saving import save

__all__ = ['load', 'save']
