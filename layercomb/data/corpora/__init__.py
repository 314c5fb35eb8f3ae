"""Data sets: found in files or TFDS, made from what Python brings along, or drawn."""
