"""Adapters in PEFT's format: `load` puts one on a model, and `save` writes one alone.

Hu et al., LoRA, 2021, https://arxiv.org/abs/2106.09685; the format:
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from layercomb.interop.peft.loading import load
from layercomb.interop.peft.saving import save

__all__ = ['load', 'save']
