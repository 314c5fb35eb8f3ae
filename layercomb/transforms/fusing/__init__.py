"""Layers of a decoding step in one native call: the program, what writes it, and the layer."""

from layercomb.transforms.fusing import sparse_rules

__all__ = ['sparse_rules']  # they are registered
