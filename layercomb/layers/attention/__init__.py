"""Attention: array functions, and the layers built on them."""
