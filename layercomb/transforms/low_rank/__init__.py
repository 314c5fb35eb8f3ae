"""Adapters of low rank (LoRA): the layer, and the rewrites that add and merge them."""
