"""Layers of which a token uses a part."""
