"""Decoding state: caches, positions, and layers that run once."""
