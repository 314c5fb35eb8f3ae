"""Models that Trax trained: ``trax.load``."""

from layercomb.interop.trax.loading import load

__all__ = ['load']
