"""Layers made of layers: in series, side by side, again and again, a slice at a time."""
