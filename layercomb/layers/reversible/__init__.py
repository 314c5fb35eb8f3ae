"""Layers that run backwards, and outputs and gradients in one pass: a rule for each class."""

from layercomb.layers.reversible import chunks, series, wrappers

__all__ = ['chunks', 'series', 'wrappers']  # they register rules
