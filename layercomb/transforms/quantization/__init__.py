"""Matrices in few bits: the layer that holds them, and how they are rounded, loaded and tied."""
