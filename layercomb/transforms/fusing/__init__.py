"""Layers of a decoding step in one native call: the program, what writes it, and the layer."""
