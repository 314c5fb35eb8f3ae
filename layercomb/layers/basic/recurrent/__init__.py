"""Layers that carry a memory along positions."""
